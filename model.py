"""A decoder-only language model from scratch: the network, the sampler, files, and the tokenizer.

    Model        a decoder (Llama, Mistral, Qwen2, Qwen3, or OLMo 2) as a plain PyTorch module
    generate     the sampler: it reads each prompt once, samples several continuations of it, and
                 returns the KV cache, so that only new tokens have to be read in the next turn
    Tokenizer    text to token ids and back; conversations to text, with the model's chat template
    tiny_model   builds a Llama with 300,000 random weights, and a tokenizer for a list of words

To add an architecture, add an entry to `ARCHITECTURES` below and a kind to
tests/test_architectures.py, which compares the model with the one in `transformers`.

The letters in shapes, first in the network and then in the sampler:

    B  rows of a batch            T  tokens per row             V  size of the vocabulary
    E  hidden size                H  query heads                K  key and value heads
    D  size of a head

    P  prompts                    S  samples per prompt         R  rows: P * S, one per sample
    C  columns of the prompts, which are padded on the left to the same length
    L  columns after the prompts: the tokens that each row has read or sampled since
"""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path

import huggingface_hub
import jinja2
import jinja2.sandbox
import numpy as np
import safetensors
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# PyTorch's kernels for attention and RMSNorm are faster and need less memory than the formulas
# below. With False, the formulas run instead, for example to debug. The tests compare both.
FUSED_KERNELS = True

# -- The configuration -----------------------------------------------------------------------------
# What each model_type implies: properties that config.json does not mention, and default values.
ARCHITECTURES = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head", "head_dim": 128},
    "olmo2": {"qk_norm": "projection", "norm_after": True, "rms_norm_eps": 1e-5},
}
SUPPORTED = {  # entries of config.json that would change the computation, and what is implemented
    "model_type": list(ARCHITECTURES),
    "hidden_act": ["silu"],
    "rope_type": ["default", "llama3"],
    "partial_rotary_factor": [1],
    "use_sliding_window": [False],
    "quantization_config": [],  # no value is supported
}


@dataclass
class ModelConfig:
    """The entries of config.json that the model uses, under their names there."""

    vocab_size: int  # V
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
    qkv_bias: bool = False  # whether q_proj, k_proj, and v_proj have a bias
    qk_norm: str | None = None  # RMSNorm of queries and keys: per "head", or of the "projection"
    norm_after: bool = False  # RMSNorm after attention and MLP, instead of before

    def __post_init__(self) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, config: dict) -> "ModelConfig":
        """The configuration from the contents of a config.json. Raises ValueError for what is not
        supported, and KeyError for a required entry that is missing."""
        # The parameters of RoPE are nested, in rope_parameters or (in older files) rope_scaling.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        entries = {**config, **rope, "rope_scaling": rope}
        entries["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        entries["model_type"] = config.get("model_type") or "none"
        check_supported(entries)
        implied = ARCHITECTURES[entries["model_type"]]
        values = {}
        for field in fields(cls):
            if field.name in ("qkv_bias", "qk_norm", "norm_after"):
                continue
            if entries.get(field.name) is not None:
                values[field.name] = entries[field.name]
            elif field.default is MISSING:
                raise KeyError(field.name)
        return cls(**{**implied, **values})


def check_supported(entries: dict) -> None:
    """Raise ValueError, with the name of the entry, for a configuration that is not implemented."""
    for name, supported in SUPPORTED.items():
        if entries.get(name) is not None and entries[name] not in supported:
            listed = ", ".join(map(str, supported)) or "none"
            raise ValueError(f"{name} {entries[name]!r} is not supported; supported: {listed}")
    if entries["model_type"] == "mistral":
        # A sliding window that is as long as the context changes nothing. It is 4096 by default.
        window, context_length = (
            entries.get("sliding_window", 4096),
            entries["max_position_embeddings"],
        )
        if window is not None and window < context_length:
            raise ValueError(
                f"sliding_window {window} is not supported; supported: null, or at least "
                f"max_position_embeddings, which is {context_length}"
            )


# -- The network -----------------------------------------------------------------------------------
class RMSNorm(nn.Module):
    """Scale the last dimension to a root mean square of 1, then multiply it by learned weights."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        if FUSED_KERNELS:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        x_float = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = x_float.square().mean(dim=-1, keepdim=True)
        return (self.weight * x_float * torch.rsqrt(mean_square + self.eps)).to(x.dtype)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """The frequencies of rotary position embeddings (RoPE): (D/2,), in radians per position.

    The two numbers x[i] and x[i + D/2] of a head form a pair, which is rotated in proportion to the
    token's position. The first pair rotates fastest, by 1 radian per position.
    """
    exponents = torch.arange(0, config.head_dim, 2, device="cpu", dtype=torch.float32)
    frequencies = config.rope_theta ** (-exponents / config.head_dim)
    if config.rope_type == "llama3":
        # Llama 3.1 divides the low frequencies by `factor`, to extend the context. A frequency is
        # low if it made few full turns within the context length of pretraining.
        scaling = config.rope_scaling
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(
            0, 1
        )  # 0: divide, 1: keep, between: interpolate
        frequencies = frequencies * (kept + (1 - kept) / scaling["factor"])
    return frequencies


def rope(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `rotate`, (B, 1, T, D) each, from positions (B, T)."""
    angles = positions[:, None, :, None] * frequencies  # (B, 1, T, D/2)
    angles = torch.cat([angles, angles], dim=-1)  # both numbers of a pair get the same angle
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (a, b) of x, (B, heads, T, D), to (a cos - b sin, b cos + a sin).

    The a's are the first half of a head, the b's the second. After the rotation, the dot product of
    a query and a key depends on their positions only through the distance between the two.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([-b, a], dim=-1), sin)  # x cos + (-b, a) sin


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of q, (B, H, T, D), to k and v, (B, H, T', D): (B, H, T, D).

    mask: (B or 1, 1, T, T'), added to the scores: 0 where a query may see a key, -inf elsewhere. By
    default, attention is causal: the queries belong to the last T of the T' tokens, and each sees
    the tokens up to and including its own.
    """
    T, num_keys, D = q.shape[2], k.shape[2], q.shape[3]
    is_causal = mask is None and num_keys == T
    if FUSED_KERNELS and is_causal:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if mask is None:
        mask = q.new_full((T, num_keys), -math.inf).triu(diagonal=1 + num_keys - T)
    if FUSED_KERNELS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = q @ k.mT * D**-0.5  # (B, H, T, T')
    scores = scores + mask
    weights = scores.softmax(dim=-1)
    return weights @ v


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """Keys or values (B, K, T, D) -> (B, H, T, D): each head serves H / K query heads in a row. (On
    a GPU, the fused kernels that take a mask do not group query heads by themselves.)"""
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


@dataclass
class Layout:
    """Where the tokens of one forward pass stand, and which other tokens each of them sees.

    Training uses `lengths`, and the sampler uses `cache` and `mask`.
    """

    positions: Tensor  # (B, T), the position of each token in its conversation
    lengths: list[int] | None = None  # a packed row: the lengths of the context and its branches
    cache: "KVCache | None" = None  # holds the earlier tokens of each row, and takes the new ones
    mask: Tensor | None = None  # with a cache: see `attention`; (B, 1, T, columns of the cache)


def packed_layout(lengths: list[int], device: torch.device) -> Layout:
    """The layout of a packed row: a context and its branches, each of which continues it.

                context   branch_1  branch_2
    tokens      a  b  c    d  e       f          lengths = [3, 2, 1]
    positions   0  1  2    3  4       3          e sees a, b, c, d, e; f sees a, b, c, f
    """
    C, *branch_lengths = lengths
    positions = [torch.arange(C, device=device)]
    positions += [torch.arange(C, C + length, device=device) for length in branch_lengths]
    return Layout(torch.cat(positions)[None], lengths=lengths)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention in packed rows: q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D).

    A token of a branch sees the context and, up to itself, its own branch (see `packed_layout`).
    """
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    (context_q, *branches_q), (context_k, *branches_k), (context_v, *branches_v) = (
        x.split(lengths, dim=2) for x in (q, k, v)
    )
    outputs = [attention(context_q, context_k, context_v)]
    for branch_q, branch_k, branch_v in zip(branches_q, branches_k, branches_v, strict=True):
        seen_k = torch.cat([context_k, branch_k], dim=2)
        seen_v = torch.cat([context_v, branch_v], dim=2)
        outputs.append(attention(branch_q, seen_k, seen_v))
    return torch.cat(outputs, dim=2)


class Linear(nn.Linear):
    """nn.Linear, with a faster product for few rows on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b: (..., in) -> (..., out)."""
        if x.device.type != "cpu" or x.dim() == 1 or x.shape[:-1].numel() > 256:
            return super().forward(x)
        # For few rows, (W x^T)^T is faster because it divides W, not x, among the threads.
        y = (self.weight @ x.flatten(end_dim=-2).T).T.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


# PyTorch runs these functions in several threads, each of which calls MKL. If two threads make the
# first call of the process at the same time, one may return slightly different numbers (PyTorch
# issue 188792). So call each function once, on one number and therefore in one thread.
for function in (torch.sin, torch.cos, torch.exp, torch.expm1, torch.log, torch.sqrt):
    function(torch.ones(1))


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K heads of keys and values."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.qk_norm = layer, config.head_dim, config.qk_norm
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
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, heads, T, D)
        if layout.cache is None:
            x = packed_attention(q, k, v, layout.lengths)
        else:
            x = layout.cache.attend(self.layer, q, k, v, layout.mask)
        return self.o_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: the hidden activations are gated by a second projection of the input."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, intermediate_size = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(E, intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(E, intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(intermediate_size, E, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then the MLP, each with a normalization and a residual connection."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        E, eps = config.hidden_size, config.rms_norm_eps
        self.norm_after = config.norm_after
        if not self.norm_after:
            self.input_layernorm = RMSNorm(E, eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(E, eps)
        self.mlp = MLP(config)
        if self.norm_after:
            self.post_feedforward_layernorm = RMSNorm(E, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        """(B, T, E) -> (B, T, E)."""
        if self.norm_after:
            x = x + self.post_attention_layernorm(self.self_attn(x, cos, sin, layout))
            return x + self.post_feedforward_layernorm(self.mlp(x))
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """The decoder with its output head. Parameters have their names in Hugging Face checkpoints."""

    def __init__(self, config_dict: dict):
        """config_dict: the contents of a config.json. The weights are random."""
        super().__init__()
        self.config_dict = config_dict
        self.config = config = ModelConfig.from_dict(config_dict)
        self.inv_freq = rope_frequencies(config)
        embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.model = nn.ModuleDict(dict(embed_tokens=embed_tokens, layers=layers, norm=norm))
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.context_length = config.max_position_embeddings
        self.vocab_size = config.vocab_size  # may be lowered to the tokenizer's, see `head`
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
        """Token ids (B, T) -> logits (B, T, V) of the next tokens. Attention is causal.

        Raises ValueError if T exceeds the context length.
        """
        self.check_context_length(ids.shape[1])
        return self.head(self.hidden(ids))

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., E) -> logits (..., V), at least in float32.

        V is `self.vocab_size`. Some checkpoints pad the head with rows that belong to no token.
        These rows are cut off here, so that both sampling and training ignore them.
        """
        logits = self.lm_head(hidden)[..., : self.vocab_size]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def hidden(
        self, ids: Tensor, lengths: list[int] | None = None, layout: Layout | None = None
    ) -> Tensor:
        """Token ids (B, T) -> the hidden states after the last layer and its norm, (B, T, E).

        lengths: the lengths of the parts of a packed row, [context | branch_1 | … | branch_G], of
        which T is the sum (see `packed_layout`). By default, a row is one context: attention is
        causal. layout: given by the sampler instead.

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
        """Load a model from a Hugging Face folder or hub id: config.json and safetensors files.

        On the device "meta", only config.json is read, and the parameters have shapes but no
        values. Raises OSError if a file is missing, and ValueError if the model is not supported or
        a file does not match.
        """
        path = from_hub(path_or_id, ["config.json", "model*.safetensors*"])
        try:
            with torch.device("meta"):  # do not allocate or initialize memory
                model = cls(read_json(path / "config.json")).to(dtype)
        except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise ValueError(f"{path / 'config.json'} is incomplete: {error!r}") from None
        if str(device) != "meta":
            model.to_empty(device=device).tie()  # to_empty makes a new tensor for each parameter
            load_weights(model, path)
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and model.safetensors. An existing file is replaced atomically."""
        path, dtype = Path(path), str(self.lm_head.weight.dtype).removeprefix("torch.")
        config = {**self.config_dict, "dtype": dtype, "torch_dtype": dtype}  # new and old name
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.named_parameters()}
        replace_file(path / "config.json", json.dumps(config, indent=2))
        replace_file(path / "model.safetensors", tensors)


# -- The KV cache ----------------------------------------------------------------------------------
def token_positions(visible: Tensor, num_new: int) -> Tensor:
    """The positions of the last tokens of each row, not counting padding: (B, num_new).

    visible: (B, columns), False where a column holds padding.

    >>> token_positions(torch.tensor([[False, True, True], [True, True, True]]), 2)
    tensor([[0, 1],
            [1, 2]])
    """
    return (visible.cumsum(dim=1) - 1).clamp(min=0)[:, -num_new:]


def attention_mask(visible: Tensor, num_new: int, dtype: torch.dtype) -> Tensor:
    """What the last tokens of each row see, as the mask of `attention`: (B, 1, num_new, columns).

    A token sees itself and all earlier visible columns. Padding thus sees at least itself: with
    nothing to see, its softmax would be nan.

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
    """The keys and values of what R = P * S rows have read.

    Each prompt is stored once as the context of its S rows. What a row reads or samples after it is
    its suffix. The suffixes of all rows grow together, in place.

        context of a prompt    [ . . x x x x x x ]                  C columns
        suffix of row 1                            [ x x x _ _ ]    L = 3 of 5 columns are in use
        suffix of row 2                            [ x x x _ _ ]
    """

    contexts: list[Tensor]  # for each layer, keys and values of the prompts: (2, P, K, C, D)
    suffixes: list[Tensor]  # for each layer, keys and values of the rows: (2, R, K, capacity, D)
    visible: Tensor  # (R, C + L), False for padding, and for what was sampled after a stop token

    @property
    def num_prompts(self) -> int:
        return self.contexts[0].shape[1]

    @property
    def suffix_length(self) -> int:
        return self.visible.shape[1] - self.contexts[0].shape[3]

    def allocate_suffixes(self, capacity: int) -> None:
        """Make room for `capacity` tokens in each row, once the prompts are read."""
        for context in self.contexts:
            _, _, K, _, D = context.shape
            self.suffixes.append(context.new_zeros(2, len(self.visible), K, capacity, D))

    def extend(self, visible: Tensor) -> Layout:
        """Add a column for each of T new tokens per row. Returns the layout of these tokens.

        visible: (R, T), False for padding.
        """
        self.visible = torch.cat([self.visible, visible], dim=1)
        T, dtype = visible.shape[1], self.contexts[0].dtype
        positions, mask = token_positions(self.visible, T), attention_mask(self.visible, T, dtype)
        return Layout(positions, cache=self, mask=mask)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Store the keys and values of new tokens, and compute the attention of their queries.

        q: (R, H, T, D); k, v: (R, K, T, D); returns (R, H, T, D). The first pass reads the prompts
        and has P rows: it fills the contexts, one layer after the other.
        """
        if layer == len(self.contexts):
            self.contexts.append(torch.stack([k, v]))
            return attention(q, repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1]), mask)
        L, T = self.suffix_length, q.shape[2]
        suffix_keys, suffix_values = self.suffixes[layer][:, :, :, :L]  # (R, K, L, D) each
        suffix_keys[:, :, L - T :], suffix_values[:, :, L - T :] = k, v
        return shared_context_attention(q, *self.contexts[layer], suffix_keys, suffix_values, mask)

    def select_rows(self, rows: Tensor, extra_columns: int) -> "KVCache":
        """A cache of some of the rows, with room for `extra_columns` more tokens in each.

        rows: (P', S') indices of rows, where each line lists rows of one prompt. For example, with
        P = 3 and S = 2, [[1], [4]] selects the second row of prompt 0, and the first of prompt 2.
        Suffixes are copied. Contexts are shared, or copied if prompts are dropped.
        """
        samples_per_prompt, contexts = len(self.visible) // self.num_prompts, self.contexts
        if len(rows) < self.num_prompts:
            prompts = (rows[:, :1] // samples_per_prompt).flatten()  # (P',)
            contexts = [context[:, prompts] for context in contexts]
        rows, L = rows.flatten(), self.suffix_length
        padding = (0, 0, 0, extra_columns)  # of the last two dimensions: none in D, behind L
        suffixes = [F.pad(suffix[:, rows, :, :L], padding) for suffix in self.suffixes]
        return KVCache(contexts, suffixes, self.visible[rows])

    def copy_back(self, selected: "KVCache", rows: Tensor) -> None:
        """Store in `rows`, (R',), the suffixes of a cache that was made by selecting these rows."""
        if selected is not self:
            for suffix, selected_suffix in zip(self.suffixes, selected.suffixes, strict=True):
                L = selected.suffix_length
                suffix[:, rows, :, :L] = selected_suffix[:, :, :, :L]


def shared_context_attention(
    q: Tensor,
    context_keys: Tensor,
    context_values: Tensor,
    suffix_keys: Tensor,
    suffix_values: Tensor,
    mask: Tensor,
) -> Tensor:
    """Attention of R = P * S rows, each to the context of its prompt and to its own suffix.

    q: (R, H, T, D); context keys and values: (P, K, C, D); suffix keys and values: (R, K, L, D);
    mask: (R, 1, T, C + L), see `attention`. Returns (R, H, T, D).

    It is the same softmax attention as in `attention`. But the context is stored once per prompt,
    and all queries that meet the same context keys (those of S rows, H / K heads, and T tokens) go
    through one matrix product, so that the keys are loaded from memory once and not S times.

    For example, P = 2 prompts, S = 8 samples, H = 4 query heads, K = 2 key heads of size D = 24,
    T = 1 new token, C = 10 and L = 3 columns. Q = T * H / K = 2 queries of a row meet a key head:

        queries            (2, 8, 2, 2, 24)    P, S, K, Q, D
        context_scores     (2, 8, 2, 2, 10)    from 4 products (16, 24) @ (24, 10)
        suffix_scores      (2, 8, 2, 2, 3)     from 32 products (2, 24) @ (24, 3)
        weights            (2, 8, 2, 2, 13)    the softmax over both
    """
    (R, H, T, D), (P, K, C, _), L = q.shape, context_keys.shape, suffix_keys.shape[2]
    S, Q = R // P, T * H // K
    queries = (q * D**-0.5).reshape(P, S, K, Q, D)
    suffix_keys, suffix_values = (x.unflatten(0, (P, S)) for x in (suffix_keys, suffix_values))

    of_prompt = queries.transpose(1, 2).reshape(P, K, S * Q, D)
    context_scores = (of_prompt @ context_keys.mT).view(P, K, S, Q, C).transpose(1, 2)
    suffix_scores = queries @ suffix_keys.mT  # (P, S, K, Q, L)
    scores = torch.cat([context_scores, suffix_scores], dim=-1)  # (P, S, K, Q, C + L)
    scores.view(P, S, H, T, C + L).add_(mask.view(P, S, 1, T, C + L))
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    context_weights, suffix_weights = weights.split([C, L], dim=-1)

    of_prompt = context_weights.transpose(1, 2).reshape(P, K, S * Q, C)
    context_output = (of_prompt @ context_values).view(P, K, S, Q, D).transpose(1, 2)
    output = context_output + suffix_weights @ suffix_values  # (P, S, K, Q, D)
    return output.reshape(R, H, T, D)


# -- The sampler -----------------------------------------------------------------------------------
MAX_SCORES = 2**28  # the largest number of attention scores in memory at once, when reading a turn


@dataclass
class Generation:
    """What `generate` returns: tokens[prompt][sample] is a list of token ids, including the stop
    token; logprobs has the same structure; cache is for the next turn."""

    tokens: list[list[list[int]]]
    logprobs: list[list[list[float]]]
    cache: KVCache


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
    """Sample `num_samples` continuations of each prompt, each up to and including a stop token.

    Each prompt is read and stored once, however many continuations are sampled. To continue with a
    second turn, pass the returned `cache`, one prompt for each of its rows, and num_samples = 1.
    The cache holds everything that a row has read. The last token of a turn was sampled but not
    read, so the new prompt has to begin with this token, or with another one in its place.

    Each row has its own stream of random numbers, which depends on (seed, *rng_key) only, and its
    token t uses number t of the stream. Therefore a sample does not depend on the other rows of the
    batch, except through rounding: matrix products of another size may round differently, above
    all on a GPU. That changes a token only if its random number is so close to the boundary between
    two tokens that the rounding error decides.

    rng_keys: for each row, a tuple of non-negative integers; rows are in the order of the prompts,
        and of the samples of a prompt. The default is (index of the prompt, index of the sample).
    temperature: 0 means greedy decoding. The log-probabilities are those of the distribution at
        this temperature; for greedy decoding, at temperature 1.

    Raises ValueError if there are no prompts or an empty one, if max_new_tokens is below 1, if the
    temperature is negative, if rng_keys are repeated or not one per row, if a conversation might
    exceed the context length of the model, or, with a cache, if num_samples is not 1 or there is
    not one prompt per row.
    """
    if rng_keys is None:
        rng_keys = [(p, s) for p in range(len(prompts)) for s in range(num_samples)]
    check_arguments(prompts, num_samples, max_new_tokens, temperature, rng_keys, cache)
    uniform = uniform_numbers(seed, rng_keys, max_new_tokens).to(model.device)
    stop_ids = torch.tensor(list(stop), dtype=torch.long, device=model.device)
    hidden, cache = prefill(model, prompts, num_samples, max_new_tokens, cache)
    visible_before = cache.visible

    tokens = torch.full_like(uniform, -1, dtype=torch.long)  # (R, max_new_tokens)
    logprobs = torch.zeros_like(uniform)
    rows = torch.arange(len(uniform), device=model.device)  # the N rows that are still sampled
    rows_cache = cache  # what they have read: the cache itself, or a copy of N of its rows
    for step in range(max_new_tokens):
        logits = model.head(hidden)  # (N, V)
        token, logprob = sample_tokens(logits, uniform[rows, step], temperature)  # (N,) each
        tokens[rows, step], logprobs[rows, step] = token, logprob.float()
        if step + 1 == max_new_tokens:
            break
        if step % 4 == 0:  # not after every token, because each time a GPU has to wait for the CPU
            finished = torch.isin(tokens[rows], stop_ids).any(dim=1)
            rows, rows_cache = drop_finished(
                finished, rows, rows_cache, cache, extra_columns=max_new_tokens - step
            )
            if len(rows) == 0:
                break
        layout = rows_cache.extend(torch.ones_like(rows, dtype=torch.bool)[:, None])
        hidden = model.hidden(tokens[rows, step, None], layout=layout)[:, 0]  # (N, E)
    cache.copy_back(rows_cache, rows)

    lengths = turn_lengths(tokens, stop_ids)  # (R,)
    # Hide what a finished row sampled before it was dropped. The last token of a turn is not read.
    columns = torch.arange(
        rows_cache.visible.shape[1] - visible_before.shape[1], device=model.device
    )
    cache.visible = torch.cat([visible_before, columns < lengths[:, None] - 1], dim=1)
    lengths = lengths.tolist()
    return Generation(
        split_turns(tokens, lengths, num_samples),
        split_turns(logprobs, lengths, num_samples),
        cache,
    )


def check_arguments(
    prompts: list[list[int]],
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    rng_keys: list[tuple[int, ...]],
    cache: KVCache | None,
) -> None:
    """Raise ValueError for arguments with which `generate` cannot work. See there."""
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and every prompt at least one token")
    if num_samples < 1 or max_new_tokens < 1:
        raise ValueError("num_samples and max_new_tokens must be at least 1")
    if not temperature >= 0:
        raise ValueError(f"the temperature must be at least 0, not {temperature}")
    if len(rng_keys) != len(prompts) * num_samples:
        raise ValueError(
            f"{len(prompts) * num_samples} rows need as many rng_keys, not {len(rng_keys)}"
        )
    if len(set(map(tuple, rng_keys))) < len(rng_keys):
        raise ValueError("rng_keys must differ: rows with the same key get the same random numbers")
    if cache is not None and num_samples != 1:
        raise ValueError("num_samples must be 1 with a cache")
    if cache is not None and len(cache.visible) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts do not match the {len(cache.visible)} rows of the cache"
        )


def uniform_numbers(seed: int, rng_keys: list[tuple[int, ...]], count: int) -> Tensor:
    """Random numbers in [0, 1), (R, count). A row's stream is keyed by (seed, *rng_key)."""
    streams = [np.random.default_rng([seed, *rng_key]) for rng_key in rng_keys]
    return torch.from_numpy(np.stack([stream.random(count, np.float32) for stream in streams]))


def prefill(
    model: Model,
    prompts: list[list[int]],
    num_samples: int,
    max_new_tokens: int,
    cache: KVCache | None,
) -> tuple[Tensor, KVCache]:
    """Read the prompts. Returns the hidden state before the first new token of each row, (R, E),
    and a cache with room for the new tokens. A given cache is copied, not changed.

    Raises ValueError if prompts and new tokens might exceed the model's context length.
    """
    T = max(map(len, prompts))
    padding = [T - len(prompt) for prompt in prompts]  # on the left: column T - 1 is always a token
    ids = torch.tensor(
        [[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)], device=model.device
    )  # (prompts, T)
    first_column = torch.tensor(padding, device=model.device)[:, None]
    visible = torch.arange(T, device=model.device) >= first_column  # (prompts, T)
    if cache is None:
        model.check_context_length(T + max_new_tokens)
        cache = KVCache([], [], visible.repeat_interleave(num_samples, dim=0))
        # Without padding, attention is causal and needs no mask.
        mask = attention_mask(visible, T, model.lm_head.weight.dtype) if any(padding) else None
        layout = Layout(token_positions(visible, T), cache=cache, mask=mask)
        hidden = model.hidden(ids, layout=layout)[:, -1]  # (P, E)
        cache.allocate_suffixes(max_new_tokens)
        return hidden.repeat_interleave(num_samples, dim=0), cache

    lengths = cache.visible.sum(dim=1) + visible.sum(dim=1)  # (R,)
    model.check_context_length(int(lengths.max()) + max_new_tokens)
    all_rows = torch.arange(len(prompts), device=model.device).view(cache.num_prompts, -1)
    cache = cache.select_rows(all_rows, extra_columns=T + max_new_tokens)
    # Read long prompts in pieces, because a piece of t tokens needs R * H * t * columns scores.
    columns = cache.visible.shape[1] + T
    piece = max(1, MAX_SCORES // (len(prompts) * model.config.num_attention_heads * columns))
    for start in range(0, T, piece):
        layout = cache.extend(visible[:, start : start + piece])
        hidden = model.hidden(ids[:, start : start + piece], layout=layout)[:, -1]  # (R, E)
    return hidden, cache


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample one token per row: logits (R, V), random numbers (R,) in [0, 1) -> the tokens and
    their log-probabilities, (R,) each.

    The token is the first one at which the cumulative probability exceeds the random number. With
    probabilities (0.2, 0.5, 0.3), the number 0.1 gives token 0, 0.6 token 1, and 0.7 token 2.
    """
    log_probs = (logits / (temperature or 1.0)).log_softmax(dim=-1)  # (R, V)
    if temperature == 0:
        token = logits.argmax(dim=-1, keepdim=True)  # (R, 1)
    else:
        cumulative = log_probs.exp().cumsum(dim=-1)  # (R, V)
        total = cumulative[:, -1:].contiguous()  # 1, up to rounding
        token = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
        # Rounding must not lead to a token behind the last one that has any probability.
        token = token.minimum(torch.searchsorted(cumulative, total))
    return token.squeeze(-1), log_probs.gather(-1, token).squeeze(-1)


def drop_finished(
    finished: Tensor, rows: Tensor, rows_cache: KVCache, cache: KVCache, extra_columns: int
) -> tuple[Tensor, KVCache]:
    """Drop finished rows, (N,) bool, from `rows` and from the cache of these rows.

    What has been read is copied back to the cache of all rows. Nothing is dropped if more than
    three quarters would be left, because copying them would cost more than it saves.
    """
    kept = rows_to_keep(finished.view(rows_cache.num_prompts, -1))
    if kept.numel() > 0.75 * len(rows):
        return rows, rows_cache
    cache.copy_back(rows_cache, rows)
    kept = kept.to(rows.device)
    return rows[kept.flatten()], rows_cache.select_rows(kept, extra_columns)


def rows_to_keep(finished: Tensor) -> Tensor:
    """The rows to continue with, (P', S'), given which rows are finished, (P, S) bool.

    Prompts without an unfinished row are dropped. Each other prompt keeps the same number of rows,
    so some may keep a finished row. In this example with P = 3 and S = 4, a dot is a finished row:

        0 1 . .         0  1
        . . . .    ->   8 11
        8 . . 11
    """
    kept, S = [], finished.shape[1]
    finished = finished.tolist()
    num_kept = max(of_prompt.count(False) for of_prompt in finished)
    for p, of_prompt in enumerate(finished):
        if not all(of_prompt):
            unfinished_first = sorted(range(S), key=lambda s: of_prompt[s])
            kept.append([p * S + s for s in unfinished_first[:num_kept]])
    return torch.tensor(kept, dtype=torch.long).view(len(kept), num_kept)


def turn_lengths(tokens: Tensor, stop_ids: Tensor) -> Tensor:
    """How many tokens of each row, (R, T), belong to its turn: (R,). A turn ends with the first
    stop token; without one, it is truncated and has T tokens."""
    is_stop = torch.isin(tokens, stop_ids)
    first_stop = is_stop.int().argmax(dim=1)
    return torch.where(is_stop.any(dim=1), first_stop + 1, tokens.shape[1])


def split_turns(values: Tensor, lengths: list[int], num_samples: int) -> list[list[list]]:
    """One value per token, (R, T), as nested lists: by prompt, by sample, by token of the turn."""
    turns = [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]
    return [turns[i : i + num_samples] for i in range(0, len(turns), num_samples)]


# -- Files -----------------------------------------------------------------------------------------
def load_weights(model: Model, path: Path) -> None:
    """Fill a model from a folder's safetensors, one file or the ones that an index names. They are
    mapped: what is not copied yet takes no memory."""
    index, names = path / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file() and not (path / names[0]).is_file():
        try:
            names = sorted({str(name) for name in read_json(index)["weight_map"].values()})
        except (KeyError, AttributeError) as error:
            raise ValueError(f"{index} is incomplete: {error!r}") from None
    stored: dict[str, Tensor] = {}
    for name in names:
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name} does not exist (weights must be safetensors)")
        try:
            stored |= safetensors.torch.load_file(path / name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path / name} is damaged: {error}") from None
    stored = {name: x for name, x in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    if model.config.tie_word_embeddings:  # some files hold the head, too
        stored["lm_head.weight"] = stored.get("model.embed_tokens.weight")
    try:
        model.load_state_dict(stored)
    except RuntimeError as error:  # missing, left over or misshapen, and which
        raise ValueError(f"{path}: {' '.join(str(error).split())[:500]}") from None


def from_hub(path_or_id: str | Path, files: list[str], repo_type: str = "model") -> Path:
    """A file or folder as it is; a hub id (org/name) as the folder that the hub's files are cached
    in, with these files. Raises FileNotFoundError where it cannot be had."""
    if Path(path_or_id).exists():
        return Path(path_or_id)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path_or_id)):
        raise FileNotFoundError(f"{path_or_id}: no such file or folder, nor a hub id (org/name)")
    try:
        found = huggingface_hub.snapshot_download(
            path_or_id, repo_type=repo_type, allow_patterns=files
        )
    except Exception as error:  # of many kinds: offline, no such id, not allowed, a full disk
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{path_or_id} is not to be had from the hub: {reason}") from None
    return Path(found)


def read_json(path: Path) -> dict:
    """A JSON object's file. Raises OSError, or ValueError with the path in the message."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def replace_file(path: Path, content: str | dict[str, Tensor], metadata=None) -> None:
    """Write text, or tensors, under a temporary name, then rename: the old file or the new one.
    Makes the folder where there is none. Raises OSError, with the path in the message."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            safetensors.torch.save_file(content, temporary, metadata or {"format": "pt"})
        else:
            temporary.write_text(content, encoding="utf-8")
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:  # a full disk, for one
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from None


# -- Tokens and chat templates ---------------------------------------------------------------------
class Tokenizer:
    """A checkpoint's tokenizer.json, its chat template, and the ids on which a turn ends."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, settings: dict, generation: dict):
        """settings: tokenizer_config.json, with the template; generation: generation_config.json"""
        self.tokenizer, self.settings, self.generation = tokenizer, settings, generation
        tokenizer.no_truncation()  # some are saved with the lengths that their training had
        tokenizer.no_padding()
        self.vocab_size = 1 + max(tokenizer.get_vocab().values(), default=0)  # beyond: padding
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = raise_template_error
        template = settings.get("chat_template")
        if not isinstance(template, str):
            raise ValueError("the tokenizer has no chat template: R3 needs an instruct model")
        try:
            self.template = environment.from_string(template)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is no jinja2 template: {error}") from None
        self.special: dict[str, str] = {}  # what the template may print
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = settings.get(name)  # a string, or {"content": string, …}
            if token is not None:
                self.special[name] = token["content"] if isinstance(token, dict) else token
        ends = generation.get("eos_token_id")
        ends = [*(ends if isinstance(ends, list) else [ends])]
        ends.append(tokenizer.token_to_id(self.special.get("eos_token", "")))
        self.stop_ids: list[int] = list(dict.fromkeys(end for end in ends if end is not None))
        if not self.stop_ids:
            raise ValueError("neither generation_config.json nor the tokenizer ends a turn")

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path) -> "Tokenizer":
        """Load tokenizer.json and its settings from a Hugging Face folder or hub id."""
        path = from_hub(path_or_id, ["*config.json", "tokenizer.json", "chat_template.jinja"])
        settings = read_json(path / "tokenizer_config.json")
        if (path / "chat_template.jinja").is_file():
            settings["chat_template"] = (path / "chat_template.jinja").read_text(encoding="utf-8")
        generation = path / "generation_config.json"
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # tokenizers raises the bare class
            raise ValueError(f"{path / 'tokenizer.json'} is absent or damaged: {error}") from None
        return cls(tokenizer, settings, read_json(generation) if generation.is_file() else {})

    def save_pretrained(self, path: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and generation_config.json."""
        path = Path(path)
        replace_file(path / "tokenizer.json", self.tokenizer.to_str(pretty=True))
        replace_file(path / "tokenizer_config.json", json.dumps(self.settings, indent=2))
        replace_file(path / "generation_config.json", json.dumps(self.generation, indent=2))

    def encode(self, text: str) -> list[int]:
        """Text to token ids, none added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Token ids to text, end-of-turn tokens and the like left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def render(self, messages: list[dict], tools=None, add_generation_prompt=True) -> str:
        """A chat as the text that the model was trained on, by the checkpoint's own template."""
        chat = dict(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)
        try:
            return self.template.render(chat, **self.special)
        except Exception as error:  # a template is a program of somebody else's
            raise ValueError(f"the chat template refuses this conversation: {error}") from None

    def prompt(self, messages: list[dict], tools: list | None = None) -> list[int]:
        """A chat as token ids, up to the assistant's turn; tools in words if need be."""
        text = self.render(messages, tools)
        if tools and text == self.render(messages):
            text = self.render(tools_in_words(messages, tools))
        return self.encode(text)

    def next_turn(self, turn: list[int], bridge: list[int]) -> list[int]:
        """A sampled turn and the `bridge` to the next one. That begins with the template's own end
        of a turn, also where the turn was cut or ended on another of the stop ids."""
        return (turn[:-1] if turn and turn[-1] in self.stop_ids else turn) + bridge

    def bridge(self, instruction: str) -> list[int]:
        """The end of an assistant's turn, a user's turn that says `instruction`, the next opening:
        the end that two whole prompts, different in the assistant's words, have in common. (A piece
        of text by itself may tokenise differently.)"""
        ask, told = {"role": "user", "content": "1"}, {"role": "user", "content": instruction}
        one = self.prompt([ask, {"role": "assistant", "content": "2"}, told])
        two = self.prompt([ask, {"role": "assistant", "content": "3"}, told])
        same = len(os.path.commonprefix([one[::-1], two[::-1]]))
        after = one[len(one) - same :]
        end = next((i for i, token in enumerate(after) if token in self.stop_ids), None)
        if one == two or end is None or self.decode(after[:end]).strip():
            raise ValueError("the chat template does not end an assistant's turn on an end token")
        return after[end:]


def tools_in_words(messages: list[dict], tools: list[dict]) -> list[dict]:
    """The chat with its tools in the user's last message, where a template shows none."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = (
        f"You can call these functions:\n{listed}\n\nAnswer with a JSON list of calls and nothing "
        'else, for example [{"name": "function", "arguments": {"parameter": "value"}}].\n\n'
    )
    *before, asked = messages
    return [*before, {**asked, "content": text + asked["content"]}]


def raise_template_error(message: str):
    raise jinja2.TemplateError(message)


# -- A tiny model from a list of words -------------------------------------------------------------
TINY_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|> {{ message.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_model(
    words: list[str], seed: int = 0, context_length: int = 512
) -> tuple[Model, Tokenizer]:
    """A Llama of 0.3 million random weights, and a tokenizer that knows `words` and no others. The
    embeddings of numbers start as a random projection of sin and cos of the number at several
    periods: near numbers begin near each other, and sums are learnt in fewer steps."""
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(special + words))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast", chat_template=TINY_TEMPLATE,
        eos_token=special[0], pad_token=special[0], model_max_length=context_length, tiny=True,
    )  # fmt: skip
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=len(vocabulary),
        hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, hidden_act="silu",
        max_position_embeddings=context_length,
        rms_norm_eps=1e-6, rope_theta=10_000.0, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = Model(config)
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=rng)
    numbers = {int(word): i for word, i in vocabulary.items() if word.isdigit()}
    periods = torch.logspace(math.log10(2), math.log10(400), 24)
    angles = torch.tensor(list(numbers))[:, None] * 2 * math.pi / periods  # (numbers, 24)
    features = torch.cat([angles.sin(), angles.cos()], dim=1)  # (numbers, 48)
    projection = torch.randn(features.shape[1], config["hidden_size"], generator=rng)
    rows = features @ projection / features.norm(dim=1, keepdim=True)
    with torch.no_grad():
        rows *= config["hidden_size"] ** -0.5
        model.model.embed_tokens.weight[list(numbers.values())] = rows
    return model, Tokenizer(tokenizer, settings, {"eos_token_id": [0], "pad_token_id": 0})
