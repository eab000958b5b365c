"""A decoder-only language model, from scratch: weights, tokens, chat template, and a sampler.

    Model        Llama, Mistral, Qwen2, Qwen3 and Phi-3 as one plain torch module; its parameters
                 have the names that they have in checkpoints: safetensors load by name
    Tokenizer    text to token ids and back; a chat to text, through the checkpoint's own template
    generate     the sampler: reads every prompt once, draws many samples from it, and keeps what
                 it read for the next turn

Nothing here knows what a task or a reward is. `tiny` builds a model of 0.3 million parameters and
its word-level tokenizer from a list of words; from then on it is a checkpoint like any other.

Shapes: B sequences, T tokens, E the width, H query heads, K key and value heads, D numbers a head,
V words in the vocabulary; R rows of the sampler (prompts times samples), C columns of its cache.
"""

import datetime
import json
import math
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

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

# The first call of a vector function of MKL chooses its code, and where two threads make it at once
# one of them may compute less exactly (pytorch issue 188792). So here one thread calls each first.
for function in (torch.sin, torch.cos, torch.exp, torch.expm1, torch.log, torch.sqrt):
    function(torch.ones(1))

# -- The decoder -----------------------------------------------------------------------------------


# What holds where a config.json is silent, by model_type: first of any, then its own.
SILENT = dict(
    head_dim=None, num_key_value_heads=None, rms_norm_eps=1e-6, tie_word_embeddings=False,
    attention_bias=False, mlp_bias=False, sliding_window=None, rope_theta=10_000.0,
    factor=None, attention_factor=None, original_max_position_embeddings=None,
    qkv_bias=False, qk_norm=False, fused=False,
)  # fmt: skip
ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"qkv_bias": True},  # a bias on q, k and v, none on o
    "qwen3": {"qk_norm": True, "head_dim": 128},  # RMSNorm on each head's query and key
    # one matrix for q, k and v, and one for gate and up
    "phi3": {"fused": True, "rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
}
SUPPORTED = {  # the rest is refused, by name
    "model_type": list(ARCHITECTURES),
    "hidden_act": ["silu"],
    "rope_type": ["default", "llama3", "longrope"],
    "partial_rotary_factor": [1],
    "quantization_config": [],
}


def read_config(config: dict) -> SimpleNamespace:
    """A config.json completed, every entry an attribute under its own name, `rope_…` among them.

    Adds `context`, the longest conversation in tokens. Raises ValueError, by name, for what is not
    computed here, and KeyError or TypeError for what is missing or of a wrong kind.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = config.get("model_type") or "none"
    rope = {"rope_type": rope.get("type"), **rope}
    c = {**SILENT, **ARCHITECTURES.get(kind, {}), **config, "model_type": kind, **rope}
    for name, values in SUPPORTED.items():
        if c.get(name) is not None and c[name] not in values:
            known = ", ".join(map(str, values)) or "none"
            raise ValueError(f"{name} {c[name]!r} is not supported; supported: {known}")
    c["rope_type"] = c["rope_type"] or "default"
    if kind == "llama" or kind.startswith("qwen") and not c.get("use_sliding_window"):
        c["sliding_window"] = None
    longest, heads = c["max_position_embeddings"], c["num_attention_heads"]
    c["num_key_value_heads"] = c["num_key_value_heads"] or heads
    c["head_dim"] = c["head_dim"] or c["hidden_size"] // heads
    c["original_max_position_embeddings"] = c["original_max_position_embeddings"] or longest
    return SimpleNamespace(**c, context=min(longest, c["sliding_window"] or longest))


def frequencies(c: SimpleNamespace) -> tuple[Tensor, float]:
    """(1, D/2) radians a position by which the pairs of a head turn, and a scale of cos and sin.

    llama3 slows down the pairs that turn so slowly that pretraining never saw them come round.
    longrope (Ding et al., 2024, arXiv 2402.13753) has two rows of divisors, (2, D/2): the first for
    conversations within the context of pretraining, the second for those beyond it.
    """
    pair = torch.arange(0, c.head_dim, 2, device="cpu", dtype=torch.float32)
    turns = (c.rope_theta ** (-pair / c.head_dim))[None]
    original = c.original_max_position_embeddings
    if c.rope_type == "llama3":
        rounds = original * turns / (2 * math.pi)  # that a pair made within the original context
        share = (rounds - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)
        share = share.clamp(0, 1)
        return turns * (share + (1 - share) / c.factor), 1.0
    if c.rope_type == "longrope":
        factor = c.factor or c.max_position_embeddings / original
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        divisors = torch.tensor([c.short_factor, c.long_factor], device="cpu")
        return turns / divisors, c.attention_factor or scale
    return turns, 1.0


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the root computed in float32 (or better)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(at_least_float32(x), self.weight.shape, eps=self.eps)
        return normed.to(x.dtype) * self.weight


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of a head by the angle of their position: RoPE.

    x: (B, heads, T, D); cos, sin: (B, 1, T, D), of the angles twice, and the first sines negative:
    (a, b) becomes (a cos - b sin, b cos + a sin). The dot product of a query and a key turned so
    depends on the two positions by their difference alone.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


@dataclass
class Pass:
    """What the layers have in common while they read (B, T) tokens.

    Where some places of a block are holes, the matrices see its N tokens alone: `places` says where
    these belong, and they are laid out only where they meet each other, in the attention.
    """

    shape: tuple[int, int]
    rope: list[Tensor]  # cos and sin, (B, 1, T, D)
    mask: Tensor | None  # (B, T, C + T): 0 where a token sees, else -inf; None: all up to itself
    places: Tensor | None  # (N,), None where all places hold a token
    cache: "Cache | None"  # what was read before
    keep: list | None  # where the keys and values of this pass go

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, W) -> (N, W)"""
        x = x.reshape(-1, x.shape[-1])
        return x if self.places is None else x[self.places]

    def spread(self, x: Tensor) -> Tensor:
        """(N, W) -> (B, T, W), zero in the holes"""
        if self.places is not None:
            B, T = self.shape
            x = x.new_zeros(B * T, x.shape[-1]).index_copy(0, self.places, x)
        return x.view(*self.shape, -1)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K heads of keys and values."""

    def __init__(self, c: SimpleNamespace, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.fused, self.qk_norm = layer, c.head_dim, c.fused, c.qk_norm
        queries, shared = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.widths = (queries, shared, shared)
        bias = c.attention_bias or c.qkv_bias
        if c.fused:
            self.qkv_proj = nn.Linear(c.hidden_size, sum(self.widths), bias=bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (
                nn.Linear(c.hidden_size, width, bias=bias) for width in self.widths
            )
        self.o_proj = nn.Linear(queries, c.hidden_size, bias=c.attention_bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x: Tensor, this: Pass) -> Tensor:
        """(N, E) -> (N, E)"""
        if self.fused:
            parts = self.qkv_proj(x).split(self.widths, dim=-1)
        else:
            parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (  # (B, heads, T, D)
            this.spread(part).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts
        )
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *this.rope), rotate(k, *this.rope)
        if this.keep is not None and len(this.keep) == self.layer:  # not when computed twice
            this.keep.append((k, v))
        if this.cache:
            x = self.on_shared_contexts(q, k, v, this)
        else:
            mask = None if this.mask is None else this.mask[:, None]
            x = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
        return self.o_proj(this.gather(x.transpose(1, 2).flatten(2)))

    def on_shared_contexts(self, q: Tensor, k: Tensor, v: Tensor, this: Pass) -> Tensor:
        """Attention of P S rows to P contexts and to their own suffixes: (B, H, T, D), B = P S.

        A token that was just drawn (T = 1) is one softmax over two pieces, so that the queries of
        all S rows, and of the heads that share a key head, meet the context's keys in one matrix
        product, where row by row it would be as many products of a vector:

                      context, C columns      suffix of row 1    of row 2
            row 1   [ one matrix product    |  its own         |           ]
            row 2   [ for all rows          |                  |  its own  ]

        A longer block is a matrix product in each row anyway.
        """
        keys, values = this.cache.contexts[self.layer]  # (P, K, C, D)
        P, K, C, D = keys.shape
        S, T, shares = len(q) // P, q.shape[2], q.shape[1] // K
        k, v = (x.view(P, S, K, T, D).transpose(1, 2) for x in (k, v))
        k, v = this.cache.write(self.layer, k, v)  # (P, K, S, c, D)
        if T > 1:
            pairs = ((keys, k), (values, v))
            rows = ((x[:, None].expand(-1, S, -1, -1, -1), own.transpose(1, 2)) for x, own in pairs)
            k, v = (torch.cat(parts, dim=3).flatten(0, 1) for parts in rows)  # (B, K, C + c, D)
            mask = this.mask[:, None]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        q = q.view(P, S, K, shares, D).transpose(1, 2) * D**-0.5  # (P, K, S, shares, D)
        met = (q.flatten(2, 3) @ keys.mT).view(*q.shape[:-1], C)
        scores = torch.cat([met, q @ k.mT], dim=-1) + this.mask.view(P, 1, S, 1, -1)
        weights = at_least_float32(scores).softmax(-1).to(q.dtype)
        met, own = weights.split([C, k.shape[3]], dim=-1)
        x = (met.flatten(2, 3) @ values).view(q.shape) + own @ v
        return x.transpose(1, 2).reshape(P * S, K * shares, 1, D)


class MLP(nn.Module):
    """SwiGLU: one projection decides how much of the other passes."""

    def __init__(self, c: SimpleNamespace):
        super().__init__()
        E, inner = c.hidden_size, c.intermediate_size
        self.fused = c.fused
        if c.fused:
            self.gate_up_proj = nn.Linear(E, 2 * inner, bias=c.mlp_bias)
        else:
            self.gate_proj = nn.Linear(E, inner, bias=c.mlp_bias)
            self.up_proj = nn.Linear(E, inner, bias=c.mlp_bias)
        self.down_proj = nn.Linear(inner, E, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c: SimpleNamespace, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, this: Pass) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), this)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, layer) for layer in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Model(nn.Module):
    """The decoder and its output head. Attribute names spell the checkpoints' parameter names."""

    def __init__(self, config: dict):
        """config: the contents of a config.json. Weights are random until loaded."""
        super().__init__()
        self.config_dict, self.config = config, read_config(config)
        self.turns, self.turn_scale = frequencies(self.config)
        self.model = Decoder(self.config)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.words = self.config.vocab_size  # may be lowered to what the tokenizer knows
        self.checkpointing = False  # whether training computes each layer twice, to store less
        self.tie()

    def tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def forward(self, ids: Tensor, live: Tensor | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, V) logits, each position seeing itself and what is before it.

        live: (B, T) bool, False on padding, which nothing sees and which takes up no position.
        """
        return self.head(self.hidden(ids, live=live))

    def head(self, hidden: Tensor) -> Tensor:
        """(..., E) -> (..., V) logits in float32 (or better), V being `self.words`.

        Some heads are padded with rows that are no token's; they would take probability, so they
        are cut off here, for sampler and trainer alike.
        """
        return at_least_float32(self.lm_head(hidden)[..., : self.words])

    def hidden(
        self, ids: Tensor, cache: "Cache | None" = None, live: Tensor | None = None, keep=None
    ) -> Tensor:
        """(B, T) token ids -> (B, T, E), the last layer's normalised output.

        With a cache, the ids continue what its rows have read, and are added to it. A token that
        is not `live` is a hole: no other token sees it, and positions count live tokens only.
        keep: a list, to which each layer adds its keys and values, (B, K, T, D) both. Raises
        ValueError where a row outgrows the model's sliding window.
        """
        (B, T), c, places, mask = ids.shape, self.config, None, None
        holes = live is not None and T > 1 and not bool(live.all())
        live = torch.ones_like(ids, dtype=torch.bool) if live is None else live
        if cache and cache.crosses(live, c):
            return self.reread(ids, cache, live)
        read = cache.add(ids, live) if cache else live  # (B, C + T): these T and all before
        lengths = read.sum(1)
        if read.shape[1] > (c.sliding_window or math.inf) and lengths.max() > c.sliding_window:
            raise ValueError(
                f"{int(lengths.max())} tokens: longer than the model's sliding window of "
                f"{c.sliding_window}, beyond which its attention is not computed here"
            )
        if holes:
            places = live.flatten().nonzero().squeeze(1)
        if cache or holes and bool((live[:, 1:] > live[:, :-1]).any()):  # not on the right alone
            column = torch.arange(read.shape[1], device=ids.device)
            own = column[-T:, None]  # (T, 1)
            # A token sees the live ones up to itself; a hole sees itself: its softmax must exist.
            seen = (column <= own) & read[:, None] | (column == own)  # (B, T, C + T)
            mask = torch.where(seen, 0.0, -math.inf).to(self.lm_head.weight.dtype)
        turns = self.turns.to(ids.device)
        if len(turns) == 2:  # longrope: each row by its length
            turns = turns[(lengths > c.original_max_position_embeddings).long()][:, None]
        positions = (lengths - live.sum(1))[:, None] + live.cumsum(1) - 1  # (B, T)
        angle = positions[..., None] * turns  # (B, T, D/2)
        cos, sin = (f(angle) * self.turn_scale for f in (torch.cos, torch.sin))
        rope = [torch.cat(pair, -1)[:, None] for pair in ((cos, cos), (-sin, sin))]
        rope = [x.to(self.lm_head.weight.dtype) for x in rope]
        this = Pass((B, T), rope, mask, places, cache, keep)
        x = self.model.embed_tokens(this.gather(ids[..., None]).squeeze(-1))  # (N, E)
        for block in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, this, use_reentrant=False)
            else:
                x = block(x, this)
        return this.spread(self.model.norm(x))

    def read(
        self, ids: Tensor, live: Tensor | None = None, samples: int = 1, room: int = 0
    ) -> tuple[Tensor, "Cache"]:
        """Read P contexts, (P, C), once: their hidden states, and a cache with `samples` rows on
        each, whose suffixes have room for so many tokens."""
        kept: list[tuple[Tensor, Tensor]] = []
        hidden = self.hidden(ids, live=live, keep=kept)
        return hidden, Cache(kept, ids, live, samples, room)

    def reread(self, ids: Tensor, cache: "Cache", live: Tensor) -> Tensor:
        """`hidden` where longrope changes its frequencies: every row is read again, as a whole."""
        new = ids.shape[1]
        ids = torch.cat([cache.rows(cache.ids, cache.own_ids), ids], dim=1)
        live = torch.cat([cache.rows(cache.live, cache.own_live), live], dim=1)
        hidden, fresh = self.read(ids, live, room=cache.own_ids.shape[1])
        cache.__dict__ = fresh.__dict__
        return hidden[:, -new:]

    # -- Files ------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | Path, dtype=torch.float32, device="cpu", revision: str | None = None
    ) -> "Model":
        """Load a Hugging Face folder or hub id: config.json, and safetensors, sharded or not.

        Tensors go from the mapped file into the model one at a time, so that the memory taken is
        one copy of the model and one tensor. On the device "meta" nothing is read but the config:
        there are shapes, and no numbers. Raises FileNotFoundError where a file is absent, and
        ValueError if this decoder does not compute such a model, or if a tensor, which is named, is
        missing, left over or misshapen.
        """
        path = model_folder(path_or_id, revision, weights=str(device) != "meta")
        try:
            with torch.device("meta"):  # shapes without memory
                model = cls(read_json(path / "config.json")).to(dtype)
        except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise ValueError(f"{path / 'config.json'} is incomplete: {error!r}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if str(device) == "meta":
            return model
        model.to_empty(device=device).tie()
        own = dict(model.named_parameters())  # a tied head is not among them
        missing = set(own)
        for shard in shards(path):
            try:
                with safetensors.safe_open(shard, framework="pt") as stored:
                    for name in set(stored.keys()):
                        if name not in own:
                            if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq"):
                                continue  # a tied head, or constants: some save them all the same
                            raise ValueError(f"{shard}: no tensor of this architecture is {name}")
                        shape = tuple(stored.get_slice(name).get_shape())
                        if shape != own[name].shape:
                            is_not = f"{shape} instead of {tuple(own[name].shape)}"
                            raise ValueError(f"{shard}: the tensor {name} has the shape {is_not}")
                        own[name].data.copy_(stored.get_tensor(name))
                        missing.discard(name)
            except safetensors.SafetensorError as error:
                raise ValueError(f"{shard} is damaged: {error}") from None
        if missing:
            raise ValueError(f"{path}: the tensor {min(missing)} is missing")
        return model

    def save_pretrained(self, path: str | Path, shard_bytes: int = 5_000_000_000) -> None:
        """Write config.json and the weights, each file replaced at once or not at all.

        More than `shard_bytes` are split over several files and an index, as transformers does.
        """
        path, tensors = Path(path), dict(self.named_parameters())
        path.mkdir(parents=True, exist_ok=True)
        dtype = str(self.lm_head.weight.dtype).removeprefix("torch.")
        config = {**self.config_dict, "dtype": dtype, "torch_dtype": dtype}  # the new name, the old
        replace_file(path / "config.json", to_json(config))
        plan = huggingface_hub.split_torch_state_dict_into_shards(
            tensors, max_shard_size=shard_bytes
        )
        for file, names in plan.filename_to_tensors.items():
            part = {name: tensors[name].detach().cpu().contiguous() for name in names}
            replace_file(path / file, part)
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            replace_file(path / INDEX, to_json(index))
        for old in path.glob("model*.safetensors*"):  # of a model that was split otherwise
            if old.name not in {*plan.filename_to_tensors, INDEX if plan.is_sharded else ""}:
                old.unlink()


INDEX = "model.safetensors.index.json"


def shards(path: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those that its index names."""
    names = ["model.safetensors"]
    if not (path / names[0]).is_file() and (path / INDEX).is_file():
        places = read_json(path / INDEX).get("weight_map")
        names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"{path / INDEX} does not name files of its own folder")
    for name in names:
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name} does not exist (weights must be safetensors)")
    return [path / name for name in names]


def is_hub_id(text: str | Path) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(text)) is not None


def model_folder(path_or_id: str | Path, revision: str | None = None, weights=False) -> Path:
    """A folder as it is; a hub id (org/name) as the folder that the hub's files are cached in,
    with the weights or without."""
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    if not is_hub_id(path_or_id):
        raise FileNotFoundError(f"{path_or_id}: no such folder, and no hub id (org/name) either")
    needed = ["*config.json", "tokenizer.json", "chat_template.jinja"]
    needed += ["model*.safetensors*"] if weights else []
    return from_hub(str(path_or_id), needed, "model", revision)


def from_hub(name: str, files: list[str], kind: str, revision: str | None = None) -> Path:
    """The folder of the hub's files, or of those that are cached here. Or FileNotFoundError."""
    options = {"repo_type": kind, "revision": revision, "allow_patterns": files}
    try:
        return Path(huggingface_hub.snapshot_download(name, **options))
    except Exception as error:  # of many kinds: offline, no such id, not allowed, a full disk
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{name} is not here, nor had from the hub: {reason}") from None


def to_json(content: dict) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)


def read_json(path: Path) -> dict:
    """A JSON object's file. Raises FileNotFoundError or ValueError with the path in the message."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def replace_file(path: str | Path, content: str | dict[str, Tensor]) -> None:
    """Write text, or tensors, under a temporary name, then rename: the old file or the new one.

    Raises OSError, with the path in the message.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        if isinstance(content, dict):
            safetensors.torch.save_file(content, temporary, metadata={"format": "pt"})
        else:
            temporary.write_bytes(content.encode())
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
        self.bridges: dict[str, list[int]] = {}
        self.date = datetime.date.today()  # for templates that print it; one date a run
        self.words = 1 + max(tokenizer.get_vocab().values(), default=0)  # ids from here on: padding
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = raise_template_error
        environment.globals["strftime_now"] = lambda form: self.date.strftime(form)
        given = settings.get("chat_template")
        if not given:
            raise ValueError("the tokenizer has no chat template: R3 needs an instruct model")
        try:
            several = [{"name": "default", "template": given}] if isinstance(given, str) else given
            several = {each["name"]: each["template"] for each in several}
            self.templates = {k: environment.from_string(text) for k, text in several.items()}
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the chat template is no jinja2 template: {error}") from None
        ends = generation.get("eos_token_id")
        ends = [*(ends if isinstance(ends, list) else [ends])]
        ends.append(tokenizer.token_to_id(special_token(settings, "eos_token") or ""))
        self.stop_ids: list[int] = list(dict.fromkeys(end for end in ends if end is not None))
        if not self.stop_ids:
            raise ValueError("neither generation_config.json nor the tokenizer ends a turn")

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, revision: str | None = None) -> "Tokenizer":
        """Load tokenizer.json and its settings from a Hugging Face folder or hub id."""
        path = model_folder(path_or_id, revision)
        if not (path / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{path / 'tokenizer.json'} does not exist")
        settings = read_json(path / "tokenizer_config.json")
        if (path / "chat_template.jinja").is_file():
            settings["chat_template"] = (path / "chat_template.jinja").read_text(encoding="utf-8")
        generation = path / "generation_config.json"
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # tokenizers raises the bare class
            raise ValueError(f"{path / 'tokenizer.json'} is damaged: {error}") from None
        return cls(tokenizer, settings, read_json(generation) if generation.is_file() else {})

    def save_pretrained(self, path: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and generation_config.json."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        replace_file(path / "tokenizer.json", self.tokenizer.to_str(pretty=True))
        replace_file(path / "tokenizer_config.json", to_json(self.settings))
        replace_file(path / "generation_config.json", to_json(self.generation))

    def encode(self, text: str) -> list[int]:
        """Text to token ids, none added. Raises ValueError for text that it has no tokens for."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # tokenizers raises the bare class
            raise ValueError(f"the tokenizer cannot read {text!r}: {error}") from None

    def decode(self, ids: list[int]) -> str:
        """Token ids to text, end-of-turn tokens and the like left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def render(
        self, messages: list[dict], tools: list | None = None, add_generation_prompt: bool = True
    ) -> str:
        """A chat as the text that the model was trained on, by the checkpoint's own template."""
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        special = {name: special_token(self.settings, name) for name in names}
        special = {name: token for name, token in special.items() if token is not None}
        chat = dict(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)
        named = "tool_use" if tools and "tool_use" in self.templates else "default"
        try:
            return self.templates[named].render(chat, **special)
        except Exception as error:  # a template is a program of somebody else's
            raise ValueError(f"the chat template refuses this conversation: {error}") from None

    def shows(self, messages: list[dict], tools: list) -> bool:
        """Whether the template puts the tools into what the model reads; some ignore them."""
        return self.render(messages, tools) != self.render(messages)

    def prompt(self, messages: list[dict], tools: list | None = None) -> list[int]:
        """A chat as token ids, up to where the assistant's turn begins."""
        return self.encode(self.render(messages, tools))

    def next_turn(self, turn: list[int], bridge: list[int]) -> list[int]:
        """A sampled turn with what the template puts after it (`bridge`), ready for the next turn.

        The bridge begins with the template's own end of a turn. That is written after a turn that
        was cut, and in place of another end-of-turn token that the model may have chosen.
        """
        return (turn[:-1] if turn and turn[-1] in self.stop_ids else turn) + bridge

    def forgets(self, turn: list[int]) -> bool:
        """Whether the template shows this turn without its thinking once another follows it."""
        said, chat = self.decode(turn).strip(), []
        if "</think>" in said:
            for role, content in (("user", "1"), ("assistant", said), ("user", "2")):
                chat.append({"role": role, "content": content})
        return bool(chat) and said not in self.render(chat)

    def bridge(self, instruction: str) -> list[int]:
        """What the template puts between an assistant's words and the assistant's next ones.

        The end-of-turn token, a user's turn that says `instruction`, and the next turn's opening:
        the end that two whole renderings, different in the assistant's words, have in common. (A
        piece of text by itself may tokenise differently.)
        """
        if instruction in self.bridges:
            return self.bridges[instruction]
        roles = ("user", "assistant", "user")
        one, two = (
            self.prompt([{"role": r, "content": c} for r, c in zip(roles, said, strict=True)])
            for said in (("1", "2", instruction), ("1", "3", instruction))
        )
        same = len(os.path.commonprefix([one[::-1], two[::-1]]))
        after = one[len(one) - same :]
        end = next((i for i, token in enumerate(after) if token in self.stop_ids), None)
        if one == two or end is None or self.decode(after[:end]).strip():
            raise ValueError("the chat template does not end an assistant's turn on an end token")
        self.bridges[instruction] = after[end:]
        return after[end:]


def special_token(settings: dict, name: str) -> str | None:
    token = settings.get(name)  # a string, or {"content": string, …}
    return token["content"] if isinstance(token, dict) else token


def raise_template_error(message: str):
    raise jinja2.TemplateError(message)


# -- The sampler -----------------------------------------------------------------------------------


class Cache:
    """What R = P S rows have read: P contexts, each stored once, and S suffixes on each of them.

        context    [ x x x x x x x . ]     keys and values (P, K, C, D): read once, shared by S rows
        suffix 1      [ x x x _ _ _ ]      (P, K, S, room, D): one a row, written in place
        suffix 2      [ x x _ _ _ _ ]

    Suffixes grow together, a column at a time. Where a row has nothing to add (it is finished, or
    its block was shorter than its neighbour's), the column is a hole: `own_live` is False there.
    """

    def __init__(self, contexts, ids: Tensor, live: Tensor | None, samples=1, room=0):
        """contexts: each layer's keys and values, (P, K, C, D); ids, live: (P, C)."""
        self.contexts = [(k.contiguous(), v.contiguous()) for k, v in contexts]  # as it is read
        self.ids, self.samples = ids, samples
        self.live = torch.ones_like(ids, dtype=torch.bool) if live is None else live
        (P, K, _, D), self.length = contexts[0][0].shape, 0  # length: of the suffixes, so far
        empty = (contexts[0][0].new_zeros(P, K, samples, room, D) for _ in range(2 * len(contexts)))
        self.suffixes = list(zip(empty, empty, strict=True))  # a layer each: keys and values
        self.own_ids = ids.new_zeros(P * samples, room)
        self.own_live = torch.zeros_like(self.own_ids, dtype=torch.bool)

    def rows(self, context: Tensor, own: Tensor) -> Tensor:
        """(P, C) and (R, room) of contexts and suffixes as whole rows, (R, C + length)."""
        return torch.cat([context.repeat_interleave(self.samples, 0), own[:, : self.length]], 1)

    def add(self, ids: Tensor, live: Tensor) -> Tensor:
        """Open columns for a block of tokens, (R, T); returns `live` of whole rows, with these."""
        new = slice(self.length, self.length + ids.shape[1])
        if not self.own_ids.shape[1]:  # no room: a single block, which is not kept
            return torch.cat([self.rows(self.live, self.own_live), live], dim=1)
        self.own_ids[:, new], self.own_live[:, new], self.length = ids, live, new.stop
        return self.rows(self.live, self.own_live)

    def lengths(self) -> Tensor:
        """How many tokens each row has read, (R,)."""
        return self.rows(self.live, self.own_live).sum(1)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put a layer's keys and values, (P, K, S, T, D), into the newest columns; returns all."""
        if not self.length:
            return k, v
        keys, values = self.suffixes[layer]
        new = slice(self.length - k.shape[3], self.length)
        keys[:, :, :, new], values[:, :, :, new] = k, v
        return keys[:, :, :, : self.length], values[:, :, :, : self.length]

    def crosses(self, live: Tensor, c: SimpleNamespace) -> bool:
        """Whether a row that has been read within longrope's original context now leaves it."""
        if c.rope_type != "longrope":
            return False
        before, original = self.lengths(), c.original_max_position_embeddings
        return bool(((before > 0) & (before <= original) & (before + live.sum(1) > original)).any())

    def of(self, owner: list[int]) -> "Cache":
        """A cache of new rows: S on each context where they come so, else each on its own copy."""
        P = len(self.ids)
        S = len(owner) // P
        if owner == [p for p in range(P) for _ in range(S)]:
            return Cache(self.contexts, self.ids, self.live, S)
        owner = torch.tensor(owner, device=self.ids.device)
        # index_select, since the gradient of [owner] adds up in whatever order threads come
        contexts = [tuple(x.index_select(0, owner) for x in pair) for pair in self.contexts]
        return Cache(contexts, self.ids[owner], self.live[owner])

    def pick(self, rows: Tensor, extra: int) -> "Cache":
        """A copy of some rows, (P', S') numbers, one context a line; room for `extra` columns."""
        p, s, chosen = rows // self.samples, rows % self.samples, rows.flatten()
        same = len(rows) == len(self.ids)  # the contexts, which are then not copied
        contexts = self.contexts if same else [(k[p[:, 0]], v[p[:, 0]]) for k, v in self.contexts]
        picked = Cache(contexts, self.ids[p[:, 0]], self.live[p[:, 0]], rows.shape[1])
        picked.length, pad = self.length, (0, 0, 0, extra)
        picked.suffixes = [
            tuple(F.pad(x[p, :, s, : self.length].transpose(1, 2), pad) for x in pair)
            for pair in self.suffixes
        ]
        own = (x[chosen, : self.length] for x in (self.own_ids, self.own_live))
        picked.own_ids, picked.own_live = (F.pad(x, (0, extra)) for x in own)
        return picked

    def put_back(self, rows: Tensor, part: "Cache", start: int) -> None:
        """Copy what the working copy `part` of these rows has read from column `start` on."""
        table = rows.view(len(part.ids), -1)  # (P', S')
        p, s, chosen = table // self.samples, table % self.samples, rows
        new, self.length = slice(start, part.length), part.length
        for pair, theirs in zip(self.suffixes, part.suffixes, strict=True):
            for own, x in zip(pair, theirs, strict=True):
                own[p, :, s, new] = x[:, :, :, new].transpose(1, 2)
        self.own_ids[chosen, new] = part.own_ids[:, new]
        self.own_live[chosen, new] = part.own_live[:, new]


def padded(rows: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """Token ids as (n, T), padded on the right, and where they are live, (n, T) bool."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None]


@dataclass
class Generation:
    """What `generate` drew, by prompt, by sample, by token; and the cache for the next turn."""

    tokens: list[list[list[int]]]
    logprobs: list[list[list[float]]]
    cache: Cache | None


@torch.no_grad()
def generate(
    model: Model,
    prompts: list[list[int]],
    samples: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: list[int] | tuple = (),
    seed: int = 0,
    keys: list[tuple[int, ...]] | None = None,
    cache: Cache | None = None,
    first: int = 0,
    cache_tokens: int | None = None,
) -> Generation:
    """Draw `samples` continuations of each prompt, each up to a token of `stop` (which is kept).

    Every prompt is read and stored once, however many samples are drawn from it. Rows that are
    finished leave the batch, many at a time. With a `cache` (of the turn before), prompt r is
    appended to what row r has read, which is everything but the last token that was drawn: the
    prompt begins in that one's place; `samples` is then 1.

    A row's randomness is its own: token t of sample s of prompt p is decided by number t of a
    stream keyed by (seed, *keys[p], s), so a sample does not depend on what else is in the batch
    (but for a draw that falls between two roundings of a probability). `keys` holds non-negative
    integers and is (p,) by default; with a cache, p counts rows; s counts from `first`.

    cache_tokens bounds the memory: the tokens, prompts and rows to their full length, whose keys
    and values are held at once. More prompts than that are taken by halves, and leave no cache.

    temperature 0 takes the likeliest token. `logprobs` are those of the distribution at the given
    temperature (at 0: at 1) before top_k and top_p cut it, as the trainer computes them. Raises
    ValueError for an empty prompt, or a conversation that might outgrow the model's context.
    """
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and every prompt at least one token")
    P, R, device = len(prompts), len(prompts) * samples, model.device
    keys = [(p,) for p in range(P)] if keys is None else keys
    widest = max(map(len, prompts)) + samples * max_new_tokens
    if cache is None and P > 1 and P * widest > (cache_tokens or math.inf):
        how = (samples, max_new_tokens, temperature, top_k, top_p, stop, seed)
        rest = dict(first=first, cache_tokens=cache_tokens)
        halves = slice(P // 2), slice(P // 2, P)
        one, two = (generate(model, prompts[h], *how, keys=keys[h], **rest) for h in halves)
        return Generation(one.tokens + two.tokens, one.logprobs + two.logprobs, None)
    streams = ([seed, *key, s] for key in keys for s in range(first, first + samples))
    uniform = [np.random.default_rng(key).random(max_new_tokens, np.float32) for key in streams]
    uniform = torch.tensor(np.array(uniform), device=device)  # (R, max_new_tokens)
    stops = torch.tensor(list(stop), dtype=torch.long, device=device)

    # Read the prompts, padded on the right with holes; keep the output at each one's last token.
    ids, live = padded(prompts, device)  # (P, width)
    lengths, width = live.sum(1), ids.shape[1]
    longest = int((lengths + (cache.lengths() if cache else 0)).max()) + max_new_tokens
    c = model.config
    if longest > c.context:
        raise ValueError(f"up to {longest} tokens do not fit the model's context of {c.context}")
    rows = torch.arange(R, device=device)  # the rows still in the batch
    if cache:
        cache = cache.pick(rows.view(len(cache.ids), -1), extra=width + max_new_tokens)
        start, hidden = cache.length, model.hidden(ids, cache, live)
    else:
        start, (hidden, cache) = 0, model.read(ids, live, samples, room=max_new_tokens)
    # (R, E): each sample starts from its prompt
    hidden = hidden[rows[:P], lengths - 1].repeat_interleave(samples, dim=0)
    steady = c.rope_type != "longrope" or longest <= c.original_max_position_embeddings

    tokens = torch.zeros(R, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(R, max_new_tokens, device=device)
    count = torch.full((R,), max_new_tokens, device=device)  # how many tokens a row has drawn
    done = torch.zeros(R, dtype=torch.bool, device=device)  # of the rows in the batch
    work = cache  # what the rows in the batch have read: the cache itself, or a copy of some rows
    for t in range(max_new_tokens):
        drawn, logprob = draw(model.head(hidden), uniform[rows, t], temperature, top_k, top_p)
        ended = torch.isin(drawn, stops) & ~done
        tokens[rows, t] = torch.where(done, tokens[rows, t], drawn)
        logprobs[rows, t] = torch.where(done, logprobs[rows, t], logprob)
        count[rows[ended]] = t + 1
        done |= ended
        if t + 1 == max_new_tokens or t % 4 == 0 and bool(done.all()):
            break
        if t % 4 == 0 and steady:
            # Finished rows leave. In the (P, S) table of rows, where a dot is a finished one,
            #     a b . .       a b
            #     . . . .  ->   c d     contexts without an unfinished row go, and so many columns
            #     c . . d               as no context needs any more; unfinished rows come first.
            table = done.view(len(work.ids), -1)
            left = (~table).sum(1)
            if int((left > 0).sum()) * int(left.max()) <= 0.75 * len(done):
                order = table.int().argsort(dim=1, stable=True)[left > 0, : int(left.max())]
                stay = (order + (left > 0).nonzero() * table.shape[1]).flatten()
                if work is not cache:
                    cache.put_back(rows, work, start)
                work = work.pick(stay.view(order.shape), extra=max_new_tokens - t)
                rows, drawn, done = rows[stay], drawn[stay], done[stay]
        hidden = model.hidden(drawn[:, None], work, ~done[:, None])[:, 0]
    if work is not cache:
        cache.put_back(rows, work, start)

    def by_prompt(values: Tensor) -> list[list[list]]:
        rows = [row[:n] for row, n in zip(values.tolist(), count.tolist(), strict=True)]
        return [rows[p * samples : (p + 1) * samples] for p in range(P)]

    return Generation(by_prompt(tokens), by_prompt(logprobs), cache)


def draw(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One token per row by the inverse CDF: the first at which the summed probability passes u.

    logits: (R, V); uniform: (R,) in [0, 1). Returns tokens and their log-probabilities, (R,) each.
    With p = (0.2, 0.5, 0.3), u = 0.1 draws token 0, u = 0.6 token 1, and u = 0.7 token 2.
    """
    logprobs = F.log_softmax(logits / (temperature or 1.0), dim=-1)  # (R, V)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        kept = logprobs
        if top_k:  # only the k likeliest tokens
            least = kept.topk(min(top_k, kept.shape[-1]), dim=-1).values[:, -1:]
            kept = kept.masked_fill(kept < least, -math.inf)
        if top_p < 1:  # only the likeliest tokens that together reach p, the one that does included
            sorted_p, order = kept.softmax(-1).sort(dim=-1, descending=True, stable=True)
            beyond = sorted_p.cumsum(-1) - sorted_p >= top_p
            kept = kept.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
        cdf = kept.exp().cumsum(-1)
        total = cdf[:, -1:].contiguous()
        u = uniform[:, None] * total
        last = torch.searchsorted(cdf, total)  # the last token that has any probability
        token = torch.searchsorted(cdf, u, right=True).minimum(last).squeeze(-1)
    return token, logprobs.gather(-1, token[:, None]).squeeze(-1)


# -- A tiny model from a list of words -------------------------------------------------------------

TINY_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|> {{ message.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny(words: list[str], seed: int = 0, context: int = 512) -> tuple[Model, Tokenizer]:
    """A Llama of 0.3 million random weights, and a tokenizer that knows `words` and no others.

    The embeddings of numbers start as a random projection of sin and cos of the number at several
    periods, so that near numbers begin near each other and a difference looks the same everywhere:
    sums are learnt in fewer steps. It is an initialisation only; the architecture stays plain.
    """
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(special + words))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast", chat_template=TINY_TEMPLATE,
        eos_token=special[0], pad_token=special[0], model_max_length=context,
    )  # fmt: skip
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=len(vocabulary),
        hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, hidden_act="silu", max_position_embeddings=context,
        rms_norm_eps=1e-6, rope_theta=10_000.0, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = Model(config)
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            fan_in = parameter.shape[1]
            nn.init.normal_(parameter, std=fan_in**-0.5, generator=rng)
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
