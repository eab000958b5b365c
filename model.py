"""A decoder-only language model from scratch: the network, the sampler, files, and the tokenizer.

    Model        a decoder (Llama, Mistral, Qwen2, Qwen3, or OLMo 2) as a plain PyTorch module
    generate     the sampler: it reads each prompt once, samples several continuations of it, and
                 returns the KV cache, so that only new tokens have to be read in the next turn
    Tokenizer    text to token ids and back; conversations to text, with the model's chat template
    tiny_model   builds a Llama with 260,000 random weights, and a tokenizer for a list of words

To add an architecture, add an entry to `ARCHITECTURES` below and a test case to
tests/test_architectures.py, which compares the model with the one in `transformers`.

The letters in shapes, first in the network and then in the sampler:

    B  rows of a batch            T  tokens per row             V  size of the vocabulary
    E  hidden size                H  query heads                K  key and value heads
    D  size of a head

    P  prompts of the first turn  S  samples per prompt         R  rows: P * S, one per sample
    C  columns of these prompts, which are padded on the left to the same length
    L  columns in use after them, for what the rows have read since: turns and later prompts
    N  rows that have not been dropped yet: all unfinished ones, and some finished ones
"""

import copy
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from functools import partial
from pathlib import Path

import huggingface_hub
import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
import safetensors
import safetensors.torch
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import errors as hub_errors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# PyTorch's kernels for attention and RMSNorm are faster and need less memory than the formulas
# below. Set this to False to run the formulas instead, for example when debugging. The tests
# compare the two.
FUSED_KERNELS = True

# -- The configuration -----------------------------------------------------------------------------
# The supported values of model_type, and how each of them differs from Llama: properties that
# config.json does not mention, and default values (of head_dim and rms_norm_eps).
ARCHITECTURES = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head", "head_dim": 128},
    "olmo2": {"qk_norm": "projection", "norm_after": True, "rms_norm_eps": 1e-5},
}
# The entries of config.json that would change the computation, and the values that are implemented.
# Only model_type must be present. If another of these entries is missing, transformers uses a
# supported value or, for quantization_config, no quantization.
SUPPORTED = {
    "model_type": list(ARCHITECTURES),
    "hidden_act": ["silu"],
    "rope_type": ["default", "llama3"],
    "partial_rotary_factor": [1],
    "use_sliding_window": [False],
    "quantization_config": [],  # no value is supported
}


@dataclass
class ModelConfig:
    """The entries of config.json that the model uses, with the same names."""

    vocab_size: int  # V, unless Model.vocab_size is set to a smaller one (see Model.head)
    hidden_size: int  # E
    intermediate_size: int  # the width of the MLP
    num_hidden_layers: int
    num_attention_heads: int  # H
    max_position_embeddings: int  # the maximum length of a conversation, in tokens
    num_key_value_heads: int = 0  # K; 0 means H
    head_dim: int = 0  # D; 0 means E / H
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False  # whether the output head is the embedding matrix
    attention_bias: bool = False  # whether q_proj, k_proj, v_proj, and o_proj have a bias
    mlp_bias: bool = False
    rope_theta: float = 10_000.0  # sets the lowest frequency of RoPE
    rope_type: str = "default"  # or "llama3"
    rope_scaling: dict | None = None  # the parameters of "llama3"

    # The following are implied by the model_type. They are not read from config.json.
    qkv_bias: bool = False  # whether q_proj, k_proj, and v_proj have a bias, but not o_proj
    qk_norm: str | None = None  # RMSNorm of queries and keys: per "head", or of the "projection"
    norm_after: bool = False  # RMSNorm after attention and MLP, instead of before

    def __post_init__(self) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, config: dict) -> "ModelConfig":
        """The configuration from the contents of a config.json. Raises ValueError for what is not
        supported, and KeyError or TypeError for a required entry that is missing."""
        # The parameters of RoPE are nested, in rope_parameters or (in older files) rope_scaling. If
        # a file has both, transformers ignores rope_parameters.
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        for name, value in rope.items():
            if isinstance(value, dict):
                raise ValueError(f"rope_parameters per layer type ({name}) are not supported")
        # In older files, some parameters of RoPE, such as rope_theta, are at the top level.
        entries = {**config, **rope, "rope_scaling": rope}
        entries["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        # check_supported skips None. The word "none" makes it refuse a missing model_type.
        entries["model_type"] = config.get("model_type") or "none"
        check_supported(entries)
        implied = ("qkv_bias", "qk_norm", "norm_after")
        names = [field.name for field in fields(cls) if field.name not in implied]
        given = {name: entries[name] for name in names if entries.get(name) is not None}
        return cls(**{**ARCHITECTURES[entries["model_type"]], **given})


def check_supported(entries: dict) -> None:
    """Raise ValueError, with the name of the entry, for a configuration that is not implemented."""
    for name, supported in SUPPORTED.items():
        if entries.get(name) is not None and entries[name] not in supported:
            listed = ", ".join(map(str, supported)) or "none"
            raise ValueError(f"{name} {entries[name]!r} is not supported; supported: {listed}")
    if entries["model_type"] == "mistral":
        # A sliding window that is at least as long as the context changes nothing.
        window = entries.get("sliding_window", 4096)  # the default of transformers
        context_length = entries["max_position_embeddings"]
        if window is not None and window < context_length:
            raise ValueError(
                f"sliding_window {window} is not supported; supported: null, or at least the "
                f"context length, {context_length}"
            )


# -- The network -----------------------------------------------------------------------------------
class RMSNorm(nn.Module):
    """Scale the last dimension to a root mean square of 1, and multiply by weights, in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if FUSED_KERNELS:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        x_float = x.to(torch.promote_types(x.dtype, torch.float32))  # float64 stays float64
        mean_square = x_float.square().mean(dim=-1, keepdim=True)
        return (self.weight * x_float * torch.rsqrt(mean_square + self.eps)).to(x.dtype)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """The frequencies of rotary position embeddings (RoPE): (D/2,), in radians per position.

    The two numbers x[i] and x[i + D/2] of a head form a pair, which is rotated in proportion to the
    token's position. The first pair rotates fastest, by 1 radian per position.
    """
    # `from_pretrained` makes "meta" the default device, on which tensors have no values.
    exponents = torch.arange(0, config.head_dim, 2, device="cpu", dtype=torch.float32)
    frequencies = config.rope_theta ** (-exponents / config.head_dim)
    if config.rope_type == "llama3":
        # Llama 3.1 divides the low frequencies by `factor`, to extend the context. A frequency is
        # low if it made few full turns within the context length of pretraining.
        scaling = config.rope_scaling
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept_fraction = ((turns - low) / (high - low)).clamp(0, 1)  # 0: low frequency, 1: high
        frequencies = frequencies * (kept_fraction + (1 - kept_fraction) / scaling["factor"])
    return frequencies


def rope(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `rotate`, (B, 1, T, D) each, from positions (B, T)."""
    angles = positions[:, None, :, None] * frequencies  # (B, 1, T, D/2)
    angles = torch.cat([angles, angles], dim=-1)  # both numbers of a pair get the same angle
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (a, b) of x, (B, heads, T, D), to (a cos - b sin, b cos + a sin).

    The first half of a head holds the a of each pair, the second half the b. After the rotation,
    the dot product of a query and a key depends on the distance between their positions, and not
    on the positions themselves.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([-b, a], dim=-1), sin)  # x * cos + (-b, a) * sin


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of the queries q, (B, H, T, D), to k and v, (B, H, num_keys, D).

    mask: (B, 1, T, num_keys), added to the scores: 0 where a query sees a key, -inf elsewhere. By
    default, attention is causal: the queries belong to the last T of the num_keys tokens, and each
    of them sees all tokens up to and including its own. Returns (B, H, T, D).
    """
    T, num_keys, D = q.shape[2], k.shape[2], q.shape[3]
    if FUSED_KERNELS and mask is None and num_keys == T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if mask is None:
        mask = q.new_full((T, num_keys), -math.inf).triu(diagonal=1 + num_keys - T)
    if FUSED_KERNELS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = q @ k.mT * D**-0.5 + mask  # (B, H, T, num_keys)
    weights = scores.softmax(dim=-1)
    return weights @ v


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """Repeat each head of keys or values H / K times: (B, K, T, D) -> (B, H, T, D). On a GPU, the
    fused kernels that take a mask need as many key heads as query heads."""
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


@dataclass
class Layout:
    """The positions of the tokens in a forward pass, and which tokens each of them sees.

    Without a cache, `lengths` says how the rows are packed (see `packed_layout`). Ordinary rows
    have a single length, T, and causal attention. With a cache, `mask` is used, see `attention`.
    """

    positions: Tensor  # of each token in its conversation: (B, T), or (1, T) for all rows
    lengths: list[int] | None = None  # of the context and of each branch
    cache: "KVCache | None" = None  # what each row has read before; the new tokens are added to it
    mask: Tensor | None = None  # (B, 1, T, columns of the cache)


def packed_layout(lengths: list[int], device: torch.device) -> Layout:
    """The layout of a packed row: a context, then several branches that continue it.

    tokens      a b c | d e | f      lengths = [3, 2, 1]: a context and two branches
    positions   0 1 2 | 3 4 | 3      e sees a, b, c, d, and e; f sees a, b, c, and f
    """
    context_length, *branch_lengths = lengths
    positions = [torch.arange(context_length, device=device)]
    for length in branch_lengths:
        positions.append(torch.arange(context_length, context_length + length, device=device))
    return Layout(torch.cat(positions)[None], lengths=lengths)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention in a packed row: q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D).

    A token sees the context and its own branch, each up to its own position.
    """
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    queries = q.split(lengths, dim=2)  # of the context, of branch 1, of branch 2, …
    keys = k.split(lengths, dim=2)
    values = v.split(lengths, dim=2)
    outputs = [attention(queries[0], keys[0], values[0])]
    for branch in range(1, len(lengths)):
        seen_keys = torch.cat([keys[0], keys[branch]], dim=2)
        seen_values = torch.cat([values[0], values[branch]], dim=2)
        outputs.append(attention(queries[branch], seen_keys, seen_values))
    return torch.cat(outputs, dim=2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, like F.linear, with a faster product for few rows on a CPU."""
    # A single vector (x.dim() == 1) has no rows, which the product below needs.
    if x.device.type != "cpu" or x.dim() == 1 or x.shape[:-1].numel() > 256:
        return F.linear(x, weight, bias)
    # x W^T = (W x^T)^T. For few rows, the second form makes better use of several threads.
    y = (weight @ x.flatten(end_dim=-2).T).T.unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


LORA_ALPHA = 32  # An adapter of rank r is scaled by LORA_ALPHA / r.


class Linear(nn.Linear):
    """nn.Linear, and optionally a LoRA adapter: y = x W^T + scale * (x A^T) B^T.

    A is (r, in_features) and B is (out_features, r), where the rank r is small. The product B A has
    the shape of the weights W but far fewer parameters. Training changes A and B alone. B is zero
    at first, so that a new adapter changes nothing (Hu et al., arXiv 2106.09685).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.lora_scale = 0.0

    def add_adapter(self, rank: int, rng: torch.Generator) -> None:
        """Add an adapter. The entries of A have the standard deviation 1 / sqrt(in_features)."""
        A = torch.randn(rank, self.in_features, generator=rng) * self.in_features**-0.5
        self.lora_A = nn.Parameter(A.to(self.weight))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        self.lora_scale = LORA_ALPHA / rank

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight, self.bias)
        if self.lora_A is None:
            return y
        return y + linear(self.lora_scale * linear(x, self.lora_A), self.lora_B)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + scale * B A, computed in float32 (or float64) and rounded once: (out, in)."""
        W, A, B = (
            x.to(torch.promote_types(x.dtype, torch.float32))
            for x in (self.weight, self.lora_A, self.lora_B)
        )
        return (W + self.lora_scale * B @ A).to(self.weight.dtype)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K heads of keys and values."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer  # the index of this layer in the KV cache
        self.head_dim = config.head_dim
        self.qk_norm = config.qk_norm
        E = config.hidden_size
        q_size = config.num_attention_heads * config.head_dim  # H * D
        kv_size = config.num_key_value_heads * config.head_dim  # K * D
        qkv_bias = config.qkv_bias or config.attention_bias
        self.q_proj = Linear(E, q_size, bias=qkv_bias)
        self.k_proj = Linear(E, kv_size, bias=qkv_bias)
        self.v_proj = Linear(E, kv_size, bias=qkv_bias)
        self.o_proj = Linear(q_size, E, bias=config.attention_bias)
        if self.qk_norm:
            per_head = self.qk_norm == "head"
            self.q_norm = RMSNorm(config.head_dim if per_head else q_size, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim if per_head else kv_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        """(B, T, E) -> (B, T, E)."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, T, heads * D)
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        # (B, T, heads * D) -> (B, heads, T, D)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if layout.cache is None:
            output = packed_attention(q, k, v, layout.lengths)  # (B, H, T, D)
        else:
            output = layout.cache.attend(self.layer, q, k, v, layout.mask)  # (B, H, T, D)
        return self.o_proj(output.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: the product of two projections, one of which is a gate, projected back to E."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(E, width, bias=bias)
        self.up_proj = Linear(E, width, bias=bias)
        self.down_proj = Linear(width, E, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then the MLP, each with a normalization and a residual connection."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        E, eps = config.hidden_size, config.rms_norm_eps
        self.norm_after = config.norm_after
        # The names are those of Hugging Face checkpoints. Note that post_attention_layernorm is
        # the norm before the MLP, except in OLMo 2, where it is the norm after attention.
        if not self.norm_after:
            self.input_layernorm = RMSNorm(E, eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(E, eps)
        self.mlp = MLP(config)
        if self.norm_after:
            self.post_feedforward_layernorm = RMSNorm(E, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        """(B, T, E) -> (B, T, E)."""
        if self.norm_after:  # OLMo 2
            x = x + self.post_attention_layernorm(self.self_attn(x, cos, sin, layout))
            return x + self.post_feedforward_layernorm(self.mlp(x))
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """The decoder and its output head. Parameters are named as in Hugging Face checkpoints."""

    def __init__(self, config_dict: dict):
        """config_dict: the contents of a config.json. The weights are random."""
        super().__init__()
        self.config_dict = config_dict
        self.config = config = ModelConfig.from_dict(config_dict)
        # This is not a buffer, because model.to(torch.bfloat16) would round it.
        self.inv_freq = rope_frequencies(config)
        # nn.Embedding(V, E) would draw the initial values itself. On the device "meta", this would
        # import torch._dynamo, which takes seconds. torch.randn does not.
        embeddings = torch.randn(config.vocab_size, config.hidden_size)
        embed_tokens = nn.Embedding.from_pretrained(embeddings, freeze=False)
        layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.model = nn.ModuleDict(dict(embed_tokens=embed_tokens, layers=layers, norm=norm))
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.context_length = config.max_position_embeddings
        self.vocab_size = config.vocab_size  # can be set to the number of real tokens, see `head`
        self.gradient_checkpointing = False  # recompute activations in the backward pass
        self.tie()

    def tie(self) -> None:
        """Make the output head share the embedding matrix, if the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) -> the logits of the next tokens, (B, T, V), with causal attention.
        Raises ValueError if T exceeds the context length."""
        self.check_context_length(ids.shape[1])
        return self.head(self.hidden(ids))

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., E) -> logits (..., V) in float32 (float64 if the model is float64).

        V is `self.vocab_size`. Some checkpoints pad the head with rows that belong to no token. If
        vocab_size has been set to the tokenizer's, the logits of these rows are dropped here, so
        that neither sampling nor training sees them.
        """
        logits = self.lm_head(hidden)[..., : self.vocab_size]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def hidden(
        self, ids: Tensor, lengths: list[int] | None = None, layout: Layout | None = None
    ) -> Tensor:
        """Token ids (B, T) -> the normalized hidden states after the last block, (B, T, E).

        lengths: for a packed row [context | branch_1 | … | branch_G], the lengths of its parts (see
            `packed_layout`). By default, attention is causal.
        layout: given instead of lengths by the sampler, with its KV cache.

        Raises ValueError if the sum of the lengths is not T.
        """
        if lengths is not None and sum(lengths) != ids.shape[1]:
            raise ValueError(f"lengths {lengths} do not add up to {ids.shape[1]} tokens")
        if layout is None:
            layout = packed_layout(lengths or [ids.shape[1]], ids.device)
        x = self.model.embed_tokens(ids)  # (B, T, E)
        self.inv_freq = self.inv_freq.to(ids.device)
        cos, sin = rope(layout.positions, self.inv_freq, x.dtype)
        for block in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, layout, use_reentrant=False)
            else:
                x = block(x, cos, sin, layout)
        return self.model.norm(x)

    def with_lora(self, rank: int, seed: int = 0) -> "Model":
        """A copy of this model, with a LoRA adapter in each linear layer of the copy's blocks.

        The copy shares the weights with this model, and they are frozen in both: only the adapters
        (see `Linear`) are trained. The outputs of this model, which has no adapters, never change.
        So it can serve as the reference model of the training, without a copy of the weights.
        """
        self.requires_grad_(False)
        memo = {id(p): p for p in self.parameters()}  # deepcopy does not copy what is in memo
        model = copy.deepcopy(self, memo)
        rng = torch.Generator().manual_seed(seed)
        for module in model.model.layers.modules():
            if isinstance(module, Linear):
                module.add_adapter(rank, rng)
        return model

    def check_context_length(self, length: int) -> None:
        """Raise ValueError if a conversation of this many tokens exceeds the context length."""
        if length > self.context_length:
            raise ValueError(
                f"{length} tokens do not fit the model's context of {self.context_length}"
            )

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> "Model":
        """Load config.json and the safetensors files of a Hugging Face folder or hub id.

        On the device "meta", only config.json is read: the parameters have shapes, but no values.
        Raises OSError if a file is missing, and ValueError for a model that is not supported or a
        file that is damaged or does not match the model.
        """
        files = ["config.json"] if str(device) == "meta" else ["config.json", "model*.safetensors*"]
        path = local_path(path_or_id, files)
        try:
            with torch.device("meta"):  # do not allocate or initialize memory
                model = cls(read_json(path / "config.json")).to(dtype)
        except (KeyError, TypeError, AttributeError, ZeroDivisionError, RuntimeError) as error:
            raise ValueError(f"{path / 'config.json'} is incomplete: {error!r}") from None
        if str(device) != "meta":
            model.to_empty(device=device).tie()  # to_empty has separated the shared matrix
            load_weights(model, path)
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and model.safetensors. An existing file is replaced atomically.

        LoRA adapters are merged into the weights, so the result is an ordinary model.
        """
        path, dtype = Path(path), str(self.lm_head.weight.dtype).removeprefix("torch.")
        # Older versions of transformers read "torch_dtype".
        config = {**self.config_dict, "dtype": dtype, "torch_dtype": dtype}
        tensors = {}
        for name, parameter in self.named_parameters():
            if not name.endswith(("lora_A", "lora_B")):
                tensors[name] = parameter.detach().cpu().contiguous()
        for name, module in self.named_modules():
            if isinstance(module, Linear) and module.lora_A is not None:
                tensors[f"{name}.weight"] = module.merged_weight().cpu()
        replace_file(path / "config.json", json.dumps(config, indent=2))
        replace_file(path / "model.safetensors", tensors)


# On a CPU, PyTorch computes these functions with MKL in several threads. If two threads make the
# first call to one of them at the same time, the results may be less exact (PyTorch issue 188792).
# So the first call is made here, with a single number and therefore in a single thread.
for function in (torch.sin, torch.cos, torch.exp, torch.expm1, torch.log, torch.sqrt):
    function(torch.ones(1))


# -- The KV cache ----------------------------------------------------------------------------------
def token_positions(visible: Tensor, num_new: int) -> Tensor:
    """The positions of the last `num_new` tokens of each row: (B, num_new). The position of a token
    is the number of earlier tokens that are `visible`, (B, columns). (The position of a token that
    is not visible itself has no meaning.)"""
    return (visible.cumsum(dim=1) - 1).clamp(min=0)[:, -num_new:]


def attention_mask(visible: Tensor, num_new: int, dtype: torch.dtype) -> Tensor:
    """The mask of `attention` for the last `num_new` tokens of each row: (B, 1, num_new, columns).

    A token sees itself, and all visible columns before it. Even padding sees itself, because a
    softmax over no columns would be nan.

    >>> attention_mask(torch.tensor([[False, True, True]]), 3, torch.float32)[0, 0]
    tensor([[0., -inf, -inf],
            [-inf, 0., -inf],
            [-inf, 0., 0.]])
    """
    columns = torch.arange(visible.shape[1], device=visible.device)
    own_column = columns[-num_new:, None]  # (num_new, 1)
    seen = (visible[:, None, :] & (columns < own_column)) | (columns == own_column)
    mask = torch.zeros(seen.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~seen, -math.inf)[:, None]


@dataclass
class KVCache:
    """The keys and values of the tokens that R = P * S rows have read.

    Each prompt of the first turn is stored once, as the context of its S rows. What a row reads
    after that (its turns, and its own later prompts) is its suffix. The suffixes of all rows have
    the same length, and new tokens are written into the free columns.

        context of a prompt    [ . . x x x x x x ]                  C columns
        suffix of its row 1                        [ x x x _ _ ]    L = 3 columns are in use, 2 free
        suffix of its row 2                        [ x x x _ _ ]    (. padding, x token, _ free)
    """

    contexts: list[Tensor]  # for each layer, keys and values of the prompts: (2, P, K, C, D)
    suffixes: list[Tensor]  # for each layer, keys and values of the rows: (2, R, K, capacity, D)
    # (R, C + L), False for padding. When `generate` has returned, also False for the last token of
    # each turn, with which the next prompt begins (see `generate`), and for what was sampled after.
    visible: Tensor

    @property
    def num_contexts(self) -> int:
        return self.contexts[0].shape[1]

    @property
    def suffix_length(self) -> int:
        return self.visible.shape[1] - self.contexts[0].shape[3]

    def allocate_suffixes(self, capacity: int) -> None:
        """After the contexts have been filled, make room for `capacity` tokens in each row."""
        for context in self.contexts:
            _, _, K, _, D = context.shape
            self.suffixes.append(context.new_zeros(2, len(self.visible), K, capacity, D))

    def extend(self, visible: Tensor) -> Layout:
        """Take the next T free columns into use (L grows by T), for new tokens, which are padding
        where `visible`, (R, T), is False. Returns the layout for reading these tokens. `attend`
        will store their keys and values."""
        self.visible = torch.cat([self.visible, visible], dim=1)
        T = visible.shape[1]
        mask = attention_mask(self.visible, T, self.contexts[0].dtype)
        return Layout(token_positions(self.visible, T), cache=self, mask=mask)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Store the keys and values of new tokens, and return the attention of their queries.

        q: (R, H, T, D); k and v: (R, K, T, D); mask: (R, 1, T, C + L). Returns (R, H, T, D). In the
        first forward pass, the rows are the P prompts, and each layer adds its context.
        """
        if layer == len(self.contexts):  # This layer has no context yet.
            self.contexts.append(torch.stack([k, v]))
            return attention(q, repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1]), mask)
        T, L = q.shape[2], self.suffix_length
        suffix = self.suffixes[layer][:, :, :, :L]  # (2, R, K, L, D)
        # `extend` has already counted the T new tokens in L: they are the last T of L columns.
        suffix[0, :, :, L - T :] = k
        suffix[1, :, :, L - T :] = v
        return shared_context_attention(q, self.contexts[layer], suffix, mask)

    def select_rows(self, rows: Tensor, extra_columns: int) -> "KVCache":
        """A cache that holds only some of the rows, with room for `extra_columns` more tokens.

        rows: a matrix (P', S') of row indices, each line of which lists rows of one prompt. With
        P = 3 and S = 2, for example, [[1], [4]] keeps the second row of the first prompt and the
        first row of the last one. The suffixes are copied. The contexts are shared with this cache,
        unless prompts are dropped.
        """
        contexts = self.contexts
        if len(rows) < self.num_contexts:
            samples_per_prompt = len(self.visible) // self.num_contexts
            # If all prompts are dropped, rows is (0, 0), and rows[:, 0] would fail.
            prompts = rows[:, :1].flatten() // samples_per_prompt  # (P',)
            contexts = [context[:, prompts] for context in contexts]
        L = self.suffix_length
        flat_rows = rows.flatten()  # (R',)
        padding = (0, 0, 0, extra_columns)  # none in D, and extra columns after the L columns
        suffixes = [F.pad(suffix[:, flat_rows, :, :L], padding) for suffix in self.suffixes]
        return KVCache(contexts, suffixes, self.visible[flat_rows])

    def copy_back(self, selected: "KVCache", rows: Tensor) -> None:
        """Copy the suffixes of `selected`, a cache that holds only these rows, into this cache.
        `visible` is not copied: `generate` sets it at the end."""
        if selected is not self:
            L = selected.suffix_length
            for suffix, selected_suffix in zip(self.suffixes, selected.suffixes, strict=True):
                suffix[:, rows, :, :L] = selected_suffix[:, :, :, :L]


def shared_context_attention(q: Tensor, context: Tensor, suffix: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention of each row to the context of its prompt and to its own suffix.

    q: (R, H, T, D); keys and values of contexts (2, P, K, C, D) and suffixes (2, R, K, L, D);
    mask: (R, 1, T, C + L), see `attention`. Returns (R, H, T, D).

    The scores of context and suffix are computed separately, and then go through one softmax. In
    the context, all queries that meet the same keys (from S rows, H / K heads, and T tokens) share
    one matrix product. This loads the keys from memory once instead of S times.

    For example, with P = 3 prompts, S = 8 samples, H = 10 and K = 2 heads of size D = 24, T = 1 new
    token, C = 11 and L = 4 columns, Q = T * H / K = 5 queries of each row meet the same key head:

        queries           (3, 8, 2, 5, 24)    which is P, S, K, Q, D
        context_scores    (3, 8, 2, 5, 11)    from 3 * 2 products of (8 * 5, 24) and (24, 11)
        suffix_scores     (3, 8, 2, 5, 4)     from 3 * 8 * 2 products of (5, 24) and (24, 4)
        weights           (3, 8, 2, 5, 15)    the softmax over both
    """
    R, H, T, D = q.shape
    _, P, K, C, _ = context.shape
    L = suffix.shape[3]
    S, Q = R // P, T * H // K
    context_keys, context_values = context  # (P, K, C, D)
    suffix_keys, suffix_values = suffix.unflatten(1, (P, S))  # (P, S, K, L, D)
    queries = (q * D**-0.5).reshape(P, S, K, Q, D)  # unscaled scores could overflow in float16

    prompt_queries = queries.transpose(1, 2).reshape(P, K, S * Q, D)
    context_scores = (prompt_queries @ context_keys.mT).view(P, K, S, Q, C).transpose(1, 2)
    suffix_scores = queries @ suffix_keys.mT  # (P, S, K, Q, L)
    scores = torch.cat([context_scores, suffix_scores], dim=-1)  # (P, S, K, Q, C + L)
    # Q stands for H / K heads times T tokens, in this order. So the dimensions (K, Q) can be viewed
    # as (H, T), to add the mask in place.
    scores.view(P, S, H, T, C + L).add_(mask.view(P, S, 1, T, C + L))
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    context_weights, suffix_weights = weights.split([C, L], dim=-1)

    prompt_weights = context_weights.transpose(1, 2).reshape(P, K, S * Q, C)
    context_output = (prompt_weights @ context_values).view(P, K, S, Q, D).transpose(1, 2)
    output = context_output + suffix_weights @ suffix_values  # (P, S, K, Q, D)
    return output.reshape(R, H, T, D)


# -- The sampler -----------------------------------------------------------------------------------
# The maximum number of attention scores in memory when new prompts are read into a given cache.
MAX_ATTENTION_SCORES = 2**26


class DivergenceError(ValueError):
    """The model, or its training, has produced numbers that are not finite."""


@dataclass
class Generation:
    """The result of `generate`."""

    tokens: list[list[list[int]]]  # tokens[prompt][sample] is a turn, including its stop token
    logprobs: list[list[list[float]]]  # of these tokens
    cache: KVCache  # for sampling the next turn


@torch.no_grad()
def generate(
    model: Model,
    prompts: list[list[int]],
    num_samples: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    stop: Sequence[int] = (),
    seed: int = 0,
    rng_keys: list[tuple[int, ...]] | None = None,
    cache: KVCache | None = None,
) -> Generation:
    """Sample `num_samples` turns after each prompt. A turn ends with the first stop token.

    Each prompt is read and stored once, however many turns are sampled from it. For the next turn
    of the conversations, pass the returned cache, and one prompt for each of its rows. This prompt
    must begin with the last token of the row's turn or, if that is a stop token, with any stop
    token. The reason is that some rows have not read their last token. Other rows have, because a
    finished row continues until it is dropped. For these, the token is hidden in the cache.
    `Tokenizer.append_bridge(turn[-1:], bridge)` is such a prompt.

    Each row has a random stream of its own, keyed by (seed, *rng_key), and uses one number for each
    token. A sample therefore does not depend on the other rows in the batch, apart from rounding:
    matrix products of other sizes may be rounded differently, especially on a GPU. This can change
    a token if its random number is very close to the boundary between two tokens.

    stop: the ids of the stop tokens.
    rng_keys: a different tuple of non-negative integers for each row, prompt by prompt. The default
        is (prompt index, sample index).
    temperature: 0 means greedy decoding. The log-probabilities that are returned are those at this
        temperature (for greedy decoding, at temperature 1).
    cache: the one that was returned for the previous turn. It is not changed, and requires
        num_samples = 1.

    Raises ValueError for invalid arguments (see `check_arguments`) and for a conversation
    that might exceed the context length, and DivergenceError for logits that are nan or infinite.
    """
    if rng_keys is None:
        rng_keys = [(p, s) for p in range(len(prompts)) for s in range(num_samples)]
    check_arguments(prompts, num_samples, max_new_tokens, temperature, rng_keys, cache)
    uniform = uniform_numbers(seed, rng_keys, max_new_tokens).to(model.device)
    stop_ids = torch.tensor(list(stop), dtype=torch.long, device=model.device)
    hidden, cache = prefill(model, prompts, num_samples, max_new_tokens, cache)  # (R, E)
    visible_before = cache.visible

    tokens = torch.full_like(uniform, -1, dtype=torch.long)  # (R, max_new_tokens); -1: none yet
    logprobs = torch.zeros_like(uniform)
    # The rows that have not been dropped, and their cache: at first, it is the cache of all rows.
    # Whenever rows are dropped, it is replaced by a copy without them.
    rows = torch.arange(len(uniform), device=model.device)  # (N,)
    rows_cache = cache
    for step in tqdm(range(max_new_tokens), "tokens", leave=False, disable=None, delay=5):
        logits = model.head(hidden)  # (N, V)
        token, logprob = sample_tokens(logits, uniform[rows, step], temperature)  # (N,) each
        tokens[rows, step], logprobs[rows, step] = token, logprob.float()
        if step + 1 == max_new_tokens:
            break
        if step % 4 == 0:  # checking after every token would force too many GPU syncs
            finished = torch.isin(tokens[rows], stop_ids).any(dim=1)
            rows, rows_cache = drop_finished(
                finished, rows, rows_cache, cache, extra_columns=max_new_tokens - step
            )
            if len(rows) == 0:
                break
        layout = rows_cache.extend(torch.ones_like(rows, dtype=torch.bool)[:, None])
        hidden = model.hidden(tokens[rows, step, None], layout=layout)[:, 0]  # (N, E)
    cache.copy_back(rows_cache, rows)

    # Both breaks come before the token of this step is read, so the cache has `step` new columns.
    # In each row, show the tokens of the turn except the last, with which the next prompt begins.
    # Hide all later columns: a finished row continues to be sampled and read until it is dropped.
    lengths = turn_lengths(tokens, stop_ids)  # (R,)
    is_shown = torch.arange(step, device=model.device) < lengths[:, None] - 1  # (R, step)
    cache.visible = torch.cat([visible_before, is_shown], dim=1)
    lengths = lengths.tolist()
    turns = split_turns(tokens, lengths, num_samples)
    turn_logprobs = split_turns(logprobs, lengths, num_samples)
    # This is checked only once, because a check after every token would force a GPU sync each time.
    if not all(math.isfinite(x) for samples in turn_logprobs for turn in samples for x in turn):
        raise DivergenceError(
            f"the model's logits, divided by the temperature of {temperature}, are not finite "
            "numbers, or too large: the model has diverged, or the temperature is too close to 0"
        )
    return Generation(turns, turn_logprobs, cache)


def check_arguments(prompts, num_samples, max_new_tokens, temperature, rng_keys, cache) -> None:
    """Raise ValueError for wrong arguments of `generate`."""
    num_rows = len(prompts) * num_samples
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and every prompt at least one token")
    if num_samples < 1 or max_new_tokens < 1:
        raise ValueError("num_samples and max_new_tokens must be at least 1")
    if not temperature >= 0:  # nan is refused, too
        raise ValueError(f"temperature must be at least 0, not {temperature}")
    if len(rng_keys) != num_rows:
        raise ValueError(f"expected {num_rows} rng_keys (one per row), got {len(rng_keys)}")
    if len(set(map(tuple, rng_keys))) < num_rows:
        raise ValueError("rng_keys must differ: rows with the same key get the same random numbers")
    if cache is not None and (num_samples != 1 or len(cache.visible) != len(prompts)):
        raise ValueError(
            f"with a cache, num_samples must be 1, and the number of prompts, {len(prompts)}, must "
            f"be that of the {len(cache.visible)} cached rows"
        )


def uniform_numbers(seed: int, rng_keys: list[tuple[int, ...]], count: int) -> Tensor:
    """Random numbers in [0, 1), (R, count). The stream of each row is keyed by (seed, *rng_key)."""
    streams = [np.random.default_rng([seed, *rng_key]) for rng_key in rng_keys]
    return torch.from_numpy(np.stack([stream.random(count, np.float32) for stream in streams]))


def prefill(
    model: Model,
    prompts: list[list[int]],
    num_samples: int,
    max_new_tokens: int,
    cache: KVCache | None,
) -> tuple[Tensor, KVCache]:
    """Read the prompts. Returns the last hidden state of each row, (R, E), and a cache with room
    for the new tokens. A cache that is given is copied."""
    T, device = max(map(len, prompts)), model.device
    num_padding = [T - len(prompt) for prompt in prompts]  # on the left, so that all end together
    padded = [[0] * n + prompt for n, prompt in zip(num_padding, prompts, strict=True)]
    ids = torch.tensor(padded, device=device)  # (len(prompts), T)
    first_column = torch.tensor(num_padding, device=device)[:, None]
    visible = torch.arange(T, device=device) >= first_column  # (len(prompts), T)
    if cache is None:
        model.check_context_length(T + max_new_tokens)
        cache = KVCache([], [], visible.repeat_interleave(num_samples, dim=0))
        mask = None  # causal attention
        if any(num_padding):
            mask = attention_mask(visible, T, model.lm_head.weight.dtype)
        layout = Layout(token_positions(visible, T), cache=cache, mask=mask)
        hidden = model.hidden(ids, layout=layout)[:, -1]  # (P, E)
        cache.allocate_suffixes(max_new_tokens)
        return hidden.repeat_interleave(num_samples, dim=0), cache

    lengths = cache.visible.sum(dim=1) + visible.sum(dim=1)  # (R,)
    model.check_context_length(int(lengths.max()) + max_new_tokens)
    # Every cached row has a prompt of its own now: len(prompts) is R, and num_contexts is P.
    every_row = torch.arange(len(prompts), device=device).view(cache.num_contexts, -1)
    cache = cache.select_rows(every_row, extra_columns=T + max_new_tokens)  # a copy
    # Read in pieces, to limit the memory of attention scores, (R, H, columns of a piece, C + L).
    num_keys = cache.visible.shape[1] + T
    scores_per_column = len(prompts) * model.config.num_attention_heads * num_keys
    num_columns = max(1, MAX_ATTENTION_SCORES // scores_per_column)
    for start in range(0, T, num_columns):
        piece = slice(start, start + num_columns)
        layout = cache.extend(visible[:, piece])
        hidden = model.hidden(ids[:, piece], layout=layout)[:, -1]  # (R, E)
    return hidden, cache


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample a token for each row. Returns the tokens and their log-probabilities, (N,) each.

    logits: (N, V); uniform: (N,) random numbers in [0, 1). The token is the first one at which the
    cumulative probability exceeds the random number (the inverse CDF). With the probabilities
    (0.2, 0.5, 0.3), the number 0.1 gives token 0, 0.6 gives token 1, and 0.7 gives token 2.
    If a row of logits contains nan, its log-probability is nan, and its token is arbitrary.
    """
    log_probs = (logits / (temperature or 1.0)).log_softmax(dim=-1)  # (N, V)
    if temperature == 0:
        token = logits.argmax(dim=-1, keepdim=True)  # (N, 1)
    else:
        cumulative = log_probs.exp().cumsum(dim=-1)  # (N, V)
        # The total is 1, up to rounding. (searchsorted warns if it is not contiguous.)
        total = cumulative[:, -1:].contiguous()  # (N, 1)
        token = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
        # uniform is below 1, but uniform * total may be rounded up to total. No sum exceeds it, so
        # the index is past the end. Then take the last token that adds something to the sum: it is
        # the first one at which the sum is the total.
        token = token.minimum(torch.searchsorted(cumulative, total))
        token = token.clamp(max=logits.shape[1] - 1)  # nan would give an index past the end
    return token.squeeze(-1), log_probs.gather(-1, token).squeeze(-1)


def drop_finished(
    finished: Tensor, rows: Tensor, rows_cache: KVCache, cache: KVCache, extra_columns: int
) -> tuple[Tensor, KVCache]:
    """Drop finished rows. The remaining prompts keep equally many rows each (see `rows_to_keep`).

    finished: (N,) bool. Returns the rows that are kept, and a cache of them with room for
    `extra_columns` more tokens. rows_cache, which holds `rows`, is first copied back into the cache
    of all rows. If more than three quarters of the rows would be kept, none is dropped, because
    copying would cost too much.
    """
    # These are indices into rows, and so into rows_cache, not into the cache of all rows.
    kept = rows_to_keep(finished.view(rows_cache.num_contexts, -1))
    if kept.numel() > 0.75 * len(rows):
        return rows, rows_cache
    cache.copy_back(rows_cache, rows)
    kept = kept.to(rows.device)
    return rows[kept.flatten()], rows_cache.select_rows(kept, extra_columns)


def rows_to_keep(finished: Tensor) -> Tensor:
    """The rows to keep, (P', S'), given which rows are finished, (P, S) bool.

    A prompt is dropped if all its rows are finished. All other prompts keep the same number of
    rows, so some may also keep finished rows. For example, the second prompt (rows 4 to 7) is
    dropped. The third one keeps its unfinished row, 10, and a finished one, 8, because the first
    prompt has two unfinished rows:

    >>> rows_to_keep(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 1]]).bool())
    tensor([[ 0,  1],
            [10,  8]])
    """
    S = finished.shape[1]
    flags = finished.tolist()
    num_kept = max(prompt_flags.count(False) for prompt_flags in flags)
    kept = []
    for p, prompt_flags in enumerate(flags):
        if not all(prompt_flags):
            unfinished = [p * S + s for s in range(S) if not prompt_flags[s]]
            others = [p * S + s for s in range(S) if prompt_flags[s]]
            kept.append((unfinished + others)[:num_kept])
    return torch.tensor(kept, dtype=torch.long).view(len(kept), num_kept)  # 2-D even if empty


def turn_lengths(tokens: Tensor, stop_ids: Tensor) -> Tensor:
    """The length of the turn in each row of (R, T): up to and including its first stop token. A
    turn without a stop token is truncated, and has T tokens."""
    is_stop = torch.isin(tokens, stop_ids)
    first_stop = is_stop.int().argmax(dim=1)
    return torch.where(is_stop.any(dim=1), first_stop + 1, tokens.shape[1])


def split_turns(values: Tensor, lengths: list[int], num_samples: int) -> list[list[list]]:
    """Values of tokens, (R, T), as nested lists: by prompt, by sample, by token of the turn."""
    turns = [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]
    return [turns[i : i + num_samples] for i in range(0, len(turns), num_samples)]


# -- Files -----------------------------------------------------------------------------------------
def load_weights(model: Model, path: Path) -> None:
    """Load a model's weights from a folder: model.safetensors, or the files listed in its index.

    The files are memory-mapped, so a tensor takes no additional memory until it is copied. Raises
    FileNotFoundError for a missing file, and ValueError for one that is damaged or does not match.
    """
    names = ["model.safetensors"]
    index = path / "model.safetensors.index.json"
    if index.is_file() and not (path / "model.safetensors").is_file():
        try:
            names = sorted({str(name) for name in read_json(index)["weight_map"].values()})
        except (KeyError, AttributeError) as error:
            raise ValueError(f"{index} is incomplete: {error!r}") from None
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path / name} does not exist (only safetensors weights are supported)"
            )
        try:
            tensors |= safetensors.torch.load_file(path / name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path / name} is damaged: {error}") from None
    # Old checkpoints also contain the frequencies of RoPE.
    tensors = {name: x for name, x in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    # A tied output head is usually not stored. (If the embeddings are missing, this is None, and
    # load_state_dict reports it.)
    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors.get("model.embed_tokens.weight")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:  # lists what is missing, unexpected, or has another shape
        raise ValueError(f"{path}: {' '.join(str(error).split())[:500]}") from None


def local_path(path_or_id: str | Path, files: list[str], repo_type: str = "model") -> Path:
    """The path of a local file or folder; or, for a hub id (org/name), the folder to which `files`
    of the repository are downloaded. Raises FileNotFoundError if there is neither, or if the
    download fails; the message says why, and what to do."""
    if Path(path_or_id).exists():
        return Path(path_or_id)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path_or_id)):
        raise FileNotFoundError(f"{path_or_id}: no such file or folder, nor a hub id (org/name)")
    page = f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{path_or_id}"
    message = f"{path_or_id}: no such file or folder"
    try:
        folder = huggingface_hub.snapshot_download(
            str(path_or_id), repo_type=repo_type, allow_patterns=files
        )
        return Path(folder)
    except hub_errors.GatedRepoError:  # a kind of RepositoryNotFoundError
        message = f"access to {path_or_id} is restricted: accept the terms at {page}, "
        message += "then log in with `hf auth login`"
    except hub_errors.RepositoryNotFoundError:
        message += f", and {page} does not exist (if it is private, log in with `hf auth login`)"
    except Exception as error:  # There are many, for example a full disk.
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300]  # in a single line
        if getattr(getattr(cause, "response", None), "status_code", None) == 401:
            message += ", and the hub refuses your token (401): log in again with `hf auth login`, "
            message += "or unset HF_TOKEN"
        # snapshot_download adds this attribute if it has downloaded only a part of the files.
        elif hasattr(error, "snapshot_path"):
            message += f"; its download is incomplete: {' '.join(str(error).split())}"
        elif isinstance(error, hub_errors.LocalEntryNotFoundError):
            message += "; it has not been downloaded before, and the hub cannot be reached: "
            message += reason
        else:
            message += f", and the download from the hub failed: {reason}"
    raise FileNotFoundError(message)


def read_json(path: Path) -> dict:
    """Read a file that contains a JSON object. Raises OSError if it cannot be read, and ValueError
    if it contains something else; the message includes the path."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not contain a JSON object")
    return content


def is_rank_0() -> bool:
    """Whether this is the only process of a run, or the first of several (see grpo.py)."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


def replace_file(
    path: Path, content: str | dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write text or tensors to a file atomically: if this fails, the old file is unchanged.

    Missing folders are created. What an interrupted call has left in the folder is deleted by the
    next one. Raises OSError with the path in the message. Of several processes that share a run,
    only the first one writes.
    """
    if not is_rank_0():
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            # save_file writes to its own file, .tmp and six characters, and then renames it.
            for leftover in [temporary, *path.parent.glob(".tmp??????")]:
                leftover.unlink(missing_ok=True)
            # save_file gives its file permissions for the owner alone. So create an ordinary file
            # first, and restore its permissions after save_file has replaced it.
            temporary.touch()
            mode = temporary.stat().st_mode
            safetensors.torch.save_file(content, temporary, metadata or {"format": "pt"})
            temporary.chmod(mode)
        else:
            temporary.write_text(content, encoding="utf-8")
        with open(temporary, "r+b") as file:  # on Windows, fsync needs a file opened for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:  # for example, a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from None


# -- The tokenizer and the chat template -----------------------------------------------------------
# The date that chat templates get as the current one. If the prompts changed from day to day, a run
# could not be resumed on the next day, and evaluations of different days could not be compared.
# Llama's templates use the same date if they are not told the current one.
TEMPLATE_DATE = datetime(2024, 7, 26)


class Tokenizer:
    """A checkpoint's tokenizer and chat template, and the ids of its stop tokens."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, settings: dict, generation_config: dict):
        """settings: the contents of tokenizer_config.json, including the chat template.

        Raises ValueError if there is no valid chat template, or no stop token.
        """
        self.tokenizer, self.settings = tokenizer, settings
        self.generation_config = generation_config
        tokenizer.no_truncation()  # some files were saved with the settings of their training
        tokenizer.no_padding()
        self.vocab_size = 1 + max(tokenizer.get_vocab().values(), default=0)
        self.templates = compile_templates(settings.get("chat_template"))
        self.special_tokens: dict[str, str] = {}  # variables of the template
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = settings.get(name)  # a string, or a dict {"content": string, …}
            if token is not None:
                content = token.get("content") if isinstance(token, dict) else token
                if not isinstance(content, str):
                    raise ValueError(f"{name} {token!r} in tokenizer_config.json is not a text")
                self.special_tokens[name] = content
        eos_ids = generation_config.get("eos_token_id")  # an id, a list of ids, or None
        if not isinstance(eos_ids, list):
            eos_ids = [eos_ids]
        eos_id = tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        candidates = [i for i in [*eos_ids, eos_id] if i is not None]
        if not all(type(i) is int and i >= 0 for i in candidates):
            raise ValueError(f"eos_token_id {eos_ids} must be a token id or a list of token ids")
        self.stop_ids: list[int] = list(dict.fromkeys(candidates))
        if not self.stop_ids:
            raise ValueError(
                "generation_config.json, config.json, and tokenizer_config.json name no stop token"
            )

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path) -> "Tokenizer":
        """Load tokenizer.json and its settings from a Hugging Face folder or hub id. Raises OSError
        for a missing file, and ValueError for one that is damaged or not supported."""
        path = local_path(path_or_id, ["*config.json", "tokenizer.json", "*.jinja"])
        settings = read_json(path / "tokenizer_config.json")
        default_path = path / "chat_template.jinja"
        tool_use_path = path / "additional_chat_templates" / "tool_use.jinja"
        if default_path.is_file():
            settings["chat_template"] = default_path.read_text(encoding="utf-8")
            if tool_use_path.is_file():
                tool_use = tool_use_path.read_text(encoding="utf-8")
                settings["chat_template"] = [
                    {"name": "default", "template": settings["chat_template"]},
                    {"name": "tool_use", "template": tool_use},
                ]
        # As in transformers, the ids of special tokens are taken from config.json if there is no
        # generation_config.json.
        generation_config = {}
        if (path / "generation_config.json").is_file():
            generation_config = read_json(path / "generation_config.json")
        elif (path / "config.json").is_file():
            config = read_json(path / "config.json")
            names = ("bos_token_id", "eos_token_id", "pad_token_id")
            generation_config = {name: config[name] for name in names if name in config}
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # tokenizers raises a plain Exception
            raise ValueError(f"{path / 'tokenizer.json'} is missing or damaged: {error}") from None
        return cls(tokenizer, settings, generation_config)

    def save_pretrained(self, path: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, and generation_config.json.

        The last one names all stop tokens, so that other programs stop where `generate` does.
        """
        path = Path(path)
        generation_config = {**self.generation_config, "eos_token_id": self.stop_ids}
        replace_file(path / "tokenizer.json", self.tokenizer.to_str(pretty=True))
        replace_file(path / "tokenizer_config.json", json.dumps(self.settings, indent=2))
        replace_file(path / "generation_config.json", json.dumps(generation_config, indent=2))

    def encode(self, text: str) -> list[int]:
        """Text to token ids, without adding special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Token ids to text, without special tokens such as the end of a turn."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def render(
        self, messages: list[dict], tools: list | None = None, add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, formatted by the chat template. The text is the same as that of
        `transformers`, if the current date is `TEMPLATE_DATE`. Raises ValueError if the template
        fails or rejects the conversation."""
        name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        variables = dict(messages=messages, tools=tools, **self.special_tokens)
        variables["add_generation_prompt"] = add_generation_prompt
        try:
            return self.templates[name].render(variables)
        except Exception as error:  # a template is a program and can raise anything
            raise ValueError(f"the chat template rejects this conversation: {error}") from None

    def prompt(self, messages: list[dict], tools: list | None = None) -> list[int]:
        """A conversation as token ids, up to where the assistant's turn begins.

        If the chat template ignores tools, they are described in the last message.
        """
        text = self.render(messages, tools)
        if tools and text == self.render(messages):
            text = self.render(add_tool_descriptions(messages, tools))
        return self.encode(text)

    def append_bridge(self, turn: list[int], bridge: list[int]) -> list[int]:
        """A sampled turn, followed by the bridge to the next one. The bridge begins with a stop
        token. So the turn's own stop token is removed, if there is one (a truncated turn has none).
        """
        if turn and turn[-1] in self.stop_ids:
            turn = turn[:-1]
        return turn + bridge

    def bridge(self, instruction: str) -> list[int]:
        """The tokens between two turns of the assistant: the stop token of the first turn, the
        user's turn with this instruction, and the beginning of the second turn.

        They are what two conversations have in common after the assistant's answers, 2 and 3:

            <|user|> 1 <|end|> <|assistant|> 2 <|end|> <|user|> Try again. <|end|> <|assistant|>
            <|user|> 1 <|end|> <|assistant|> 3 <|end|> <|user|> Try again. <|end|> <|assistant|>
                                               └──────────────── the bridge ──────────────────┘

        (The bridge is not encoded by itself, because that could give other tokens than in a whole
        conversation.) Raises ValueError if the assistant's turn does not end with a stop token.
        """
        question = {"role": "user", "content": "1"}
        request = {"role": "user", "content": instruction}
        ids_2, ids_3 = (
            self.prompt([question, {"role": "assistant", "content": answer}, request])
            for answer in ("2", "3")
        )
        # The common suffix is the common prefix in reverse. (commonprefix works on lists, too.)
        common = os.path.commonprefix([ids_2[::-1], ids_3[::-1]])[::-1]
        start = next((i for i, token in enumerate(common) if token in self.stop_ids), None)
        # Refuse a template that omits the answer (so that both conversations are equal), that has
        # no stop token after it, or that has anything but whitespace between the two.
        if ids_2 == ids_3 or start is None or self.decode(common[:start]).strip():
            raise ValueError("the chat template does not end an assistant's turn with a stop token")
        return common[start:]


def add_tool_descriptions(messages: list[dict], tools: list[dict]) -> list[dict]:
    """The conversation with a description of the tools at the beginning of its last message."""
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    description = (
        f"You can call these functions:\n{functions}\n\nAnswer with a JSON list of calls and "
        "nothing else, for example "
        '[{"name": "function", "arguments": {"parameter": "value"}}].\n\n'
    )
    *earlier, last = messages
    return [*earlier, {**last, "content": description + last["content"]}]


def raise_template_error(message: str) -> None:
    """What chat templates call as raise_exception."""
    raise jinja2.TemplateError(message)


class GenerationTag(jinja2.ext.Extension):
    """The blocks {% generation %} … {% endgeneration %} of chat templates, which mark the answers
    of the assistant. Their contents are rendered as if the tags were not there."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line_number = next(parser.stream).lineno  # of the token "generation", which is consumed
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line_number)


def compile_templates(chat_template: str | list[dict] | None) -> dict[str, jinja2.Template]:
    """The compiled chat templates: the usual one as "default", the one for tools as "tool_use".

    chat_template: a template, or a list of {"name": …, "template": …}. Raises ValueError if there
    is no default template, or one of the two is not valid.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", GenerationTag],
    )  # fmt: skip
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_template_error
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    if isinstance(chat_template, str):
        chat_template = [{"name": "default", "template": chat_template}]
    try:
        templates = {
            entry["name"]: environment.from_string(entry["template"])
            for entry in chat_template or []
            if entry["name"] in ("default", "tool_use")
        }
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is not a valid jinja2 template: {error}") from None
    except (KeyError, TypeError):  # neither a text nor a list of named templates
        templates = {}
    if "default" not in templates:
        raise ValueError(
            "the tokenizer has no chat template: use an instruct model "
            "(if there are several templates, one of them has to be named default)"
        )
    return templates


# -- A tiny model ----------------------------------------------------------------------------------
TINY_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|> {{ message.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_model(
    words: list[str], seed: int = 0, context_length: int = 512, width: int = 1
) -> tuple[Model, Tokenizer]:
    """A Llama with about 260,000 random weights, and a tokenizer for `words` separated by spaces.

    The tokenizer raises an exception for any other word. The embeddings of numbers are a random
    projection of sines and cosines of the number and of its logarithm. With these, the model learns
    in fewer steps to add and, because multiplication adds logarithms, to multiply.

    width: multiplies the sizes of all vectors, and the number of heads.
    """
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(special + words))}
    # The unknown token is not in the vocabulary, which makes unknown words an error.
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast", chat_template=TINY_TEMPLATE,
        eos_token=special[0], pad_token=special[0], model_max_length=context_length,
        tiny=True,  # marks a saved folder as a tiny model
    )  # fmt: skip
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=len(vocabulary),
        hidden_size=96 * width, intermediate_size=192 * width, num_hidden_layers=3,
        num_attention_heads=4 * width, num_key_value_heads=2 * width, head_dim=24,
        hidden_act="silu",
        max_position_embeddings=context_length, rms_norm_eps=1e-6, rope_theta=10_000.0,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = Model(config)
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=rng)
    ids_of_numbers = {int(word): i for word, i in vocabulary.items() if word.isdigit()}
    numbers = torch.tensor(list(ids_of_numbers))[:, None].float()  # (numbers, 1)
    # Short periods tell neighbors apart. The longest period is 400. For the numbers from 0 to 200,
    # half of this period, its cosine only decreases, so that no two of them have the same features.
    # (The logarithm of 0.5 stands for that of 0.)
    angles = numbers / torch.logspace(math.log10(2), math.log10(400), 24)
    log_angles = numbers.clamp(min=0.5).log() / torch.logspace(math.log10(0.2), math.log10(8), 12)
    angles = 2 * math.pi * torch.cat([angles, log_angles], dim=1)  # (numbers, 36)
    features = torch.cat([angles.sin(), angles.cos()], dim=1)  # (numbers, 72)
    projection = torch.randn(features.shape[1], config["hidden_size"], generator=rng)
    # Here, the entries have a standard deviation of 1. Below, they get that of other embeddings.
    embeddings = features @ projection / features.norm(dim=1, keepdim=True)  # (numbers, E)
    with torch.no_grad():
        embeddings *= config["hidden_size"] ** -0.5
        model.model.embed_tokens.weight[list(ids_of_numbers.values())] = embeddings
    return model, Tokenizer(tokenizer, settings, {"eos_token_id": [0], "pad_token_id": 0})
