"""A decoder-only language model, from scratch: the network, a sampler, weights, tokens, chats.

    Model        Llama, Qwen2 and Qwen3 as one plain torch module
    generate     the sampler: reads every prompt once, draws many samples from it, and returns the
                 cache, so that the next turn reads only what is new
    Tokenizer    text to token ids and back; a chat to text, through the checkpoint's own template
    tiny_model   a model of 0.3 million random weights and its tokenizer, from a list of words

Shapes: B rows, T tokens, E the hidden size, H query heads, K key and value heads, D numbers a head,
V the vocabulary; P prompts with S samples each make R = P S rows of the sampler; C columns hold a
prompt, padded on the left.
"""

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

# -- Which decoders --------------------------------------------------------------------------------
# What holds where a config.json is silent: of any model_type first, then of each.
CONFIG_DEFAULTS = dict(
    head_dim=None, num_key_value_heads=None, rms_norm_eps=1e-6, tie_word_embeddings=False,
    attention_bias=False, mlp_bias=False, rope_theta=10_000.0, qkv_bias=False, qk_norm=False,
)  # fmt: skip
ARCHITECTURES = {
    "llama": {},
    "qwen2": {"qkv_bias": True},  # a bias on q, k and v, none on o
    "qwen3": {"qk_norm": True, "head_dim": 128},  # RMSNorm on each head's query and key
}
SUPPORTED = {  # the rest is refused, by name
    "model_type": list(ARCHITECTURES),
    "hidden_act": ["silu"],
    "rope_type": ["default", "llama3"],
    "partial_rotary_factor": [1],
    "use_sliding_window": [False],
    "quantization_config": [],
}


def read_config(config: dict) -> SimpleNamespace:
    """A config.json completed, every entry an attribute under its own name. Raises ValueError, by
    name, for what is not computed here, and KeyError or TypeError for what is missing."""
    model_type = config.get("model_type") or "none"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = {"rope_type": rope.get("type", "default"), **rope}  # "type" is its old name
    config_ = {
        **CONFIG_DEFAULTS,
        **ARCHITECTURES.get(model_type, {}),
        **config,
        "model_type": model_type,
        **rope,
    }
    for name, values in SUPPORTED.items():
        if config_.get(name) is not None and config_[name] not in values:
            known = ", ".join(map(str, values)) or "none"
            raise ValueError(f"{name} {config_[name]!r} is not supported; supported: {known}")
    config_["num_key_value_heads"] = (
        config_["num_key_value_heads"] or config_["num_attention_heads"]
    )
    config_["head_dim"] = (
        config_["head_dim"] or config_["hidden_size"] // config_["num_attention_heads"]
    )
    return SimpleNamespace(**config_)


def inv_freq(config: SimpleNamespace) -> Tensor:
    """(D/2,) radians a position by which the pairs of a head turn. llama3 slows down the pairs that
    turn so slowly that pretraining never saw them come round."""
    pair = torch.arange(0, config.head_dim, 2, device="cpu", dtype=torch.float32)
    inv_freq = config.rope_theta ** (-pair / config.head_dim)
    if config.rope_type == "llama3":
        rounds = (
            config.original_max_position_embeddings * inv_freq / (2 * math.pi)
        )  # in pretraining
        share = (rounds - config.low_freq_factor) / (
            config.high_freq_factor - config.low_freq_factor
        )
        share.clamp_(0, 1)
        inv_freq = inv_freq * (share + (1 - share) / config.factor)
    return inv_freq


# -- Attention and its cache -----------------------------------------------------------------------
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turn the pairs (i, i + D/2) of x, (B, heads, T, D), by the angle of their position.

    cos, sin: (B, 1, T, D), of the angles twice, and the first sines negative: (a, b) becomes
    (a cos - b sin, b cos + a sin). The dot product of a query and a key turned so depends on the
    two positions by their difference alone.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def causal_mask(attention_mask: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """The positions of the last T tokens of each row, (B, T), without counting padding; and what
    they see, their mask, (B, T, S) bool. attention_mask: (B, S) bool. A token sees all up to itself
    that is no padding; padding sees itself (its softmax must exist)."""
    column = torch.arange(attention_mask.shape[1], device=attention_mask.device)  # (S,)
    own = column[-T:, None]  # (T, 1)
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -T:]
    return positions, attention_mask[:, None] & (column <= own) | (column == own)


@dataclass
class KVCache:
    """What R = P S rows have read: P contexts, each stored once, and a suffix for every row.

    context   [ . . x x x x x x ]      keys and values, read once for S rows
    row 1       [ x x x _ _ ]          what a row reads after its context, written in place;
    row 2       [ x x x _ _ ]          suffixes grow together
    """

    contexts: list[Tensor]  # keys and values of a layer each, (2, P, K, C, D)
    suffixes: list[Tensor]  # (2, R, K, room, D)
    attention_mask: Tensor  # (R, C + length), False on padding and on what a finished row drew

    @property
    def length(self) -> int:
        return self.attention_mask.shape[1] - self.contexts[0].shape[3]

    def append(self, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Open columns for (R, T) tokens: their positions and their mask, as from `causal_mask`."""
        self.attention_mask = torch.cat([self.attention_mask, attention_mask], dim=1)
        return causal_mask(self.attention_mask, attention_mask.shape[1])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Attention of the newest T tokens of each row: q (R, H, T, D); k, v (R, K, T, D).

        One softmax over two pieces: the queries of all S rows, and of the heads that share a key
        head, meet the context's keys in one matrix product, not in a product of a vector each:

                      context, C columns      suffix of row 1    of row 2
            row 1   [ one matrix product    |  its own         |           ]
            row 2   [ for all rows          |                  |  its own  ]
        """
        keys, values = self.contexts[layer]  # (P, K, C, D)
        (P, K, C, D), (R, H, T, _), end = keys.shape, q.shape, self.length
        S = R // P
        self.suffixes[layer][:, :, :, end - T : end] = torch.stack([k, v])
        own_keys, own_values = self.suffixes[layer][:, :, :, :end]  # (R, K, end, D)
        q = q.reshape(R, K, -1, D)  # the queries of a row that share a key head: q of them
        of_all_rows = q.unflatten(0, (P, S)).transpose(1, 2).flatten(2, 3)  # (P, K, S q, D)
        to_context = (of_all_rows @ keys.mT).unflatten(2, (S, -1))  # (P, K, S, q, C)
        to_suffix = (q @ own_keys.mT).unflatten(0, (P, S)).transpose(1, 2)
        scores = torch.cat([to_context, to_suffix], dim=-1).view(P, K, S, -1, T, C + end)
        torch.add(mask.view(P, 1, S, 1, T, C + end), scores, alpha=D**-0.5, out=scores)
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        to_context, to_suffix = weights.flatten(3, 4).split([C, end], dim=-1)
        x = (to_context.flatten(2, 3) @ values).unflatten(2, (S, -1))  # (P, K, S, q, D)
        x = x.transpose(1, 2).flatten(0, 1) + to_suffix.transpose(1, 2).flatten(0, 1) @ own_values
        return x.reshape(R, H, T, D)

    def select_rows(self, rows: Tensor, room: int) -> "KVCache":
        """A copy of some rows, (P', S') row numbers, a context a line; room for so many columns."""
        P, chosen, length = self.contexts[0].shape[1], rows.flatten(), self.length
        contexts = self.contexts
        if len(rows) < P:
            owner = rows[:, 0] // (len(self.attention_mask) // P)
            contexts = [context[:, owner] for context in contexts]
        suffixes = [F.pad(x[:, chosen, :, :length], (0, 0, 0, room)) for x in self.suffixes]
        return KVCache(contexts, suffixes, self.attention_mask[chosen])

    def copy_back(self, part: "KVCache", rows: Tensor, start: int) -> None:
        """Take back what `part`, a selection of these rows, has read from column `start` on."""
        if part is not self:
            for own, theirs in zip(self.suffixes, part.suffixes, strict=True):
                own[:, rows, :, start : part.length] = theirs[:, :, :, start : part.length]


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b. On a CPU few rows are computed as (W x^T)^T, which uses all threads better."""
        if x.device.type != "cpu" or x.dim() == 1 or x.shape[:-1].numel() > 256:
            return super().forward(x)
        y = (self.weight @ x.flatten(end_dim=-2).T).T.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K heads of keys and values."""

    def __init__(self, config: SimpleNamespace, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.qk_norm = layer, config.head_dim, config.qk_norm
        self.shares = (
            config.num_attention_heads // config.num_key_value_heads
        )  # query heads per key head
        E, bias = config.hidden_size, config.attention_bias or config.qkv_bias
        queries, keys = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        self.q_proj = Linear(E, queries, bias=bias)
        self.k_proj = Linear(E, keys, bias=bias)
        self.v_proj = Linear(E, keys, bias=bias)
        self.o_proj = Linear(queries, E, bias=config.attention_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rope, mask=None, kv_cache=None, keep=None, lengths=None) -> Tensor:
        """(B, T, E) -> (B, T, E). The arguments are those of Model.hidden; rope: cos and sin."""
        parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)  # (B, heads, T, D)
        if keep is not None:
            keep.append(torch.stack([k, v]))
        if kv_cache is not None:
            x = kv_cache.attend(self.layer, q, k, v, mask)
        else:
            # Key heads are repeated: with a mask, a GPU's fast kernels do not group query heads.
            k, v = (part.repeat_interleave(self.shares, dim=1) for part in (k, v))
            if mask is not None:
                x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
            else:
                x = causal_attention(q, k, v, lengths or [x.shape[1]])
        return self.o_proj(x.transpose(1, 2).flatten(2))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Each token sees itself and what is before it in the context and in its own branch:

    [ context | branch_1 | … | branch_G ]     lengths: of these parts; q, k, v: (B, H, T, D)
    """
    (q, *queries), (k, *keys), (v, *values) = (x.split(lengths, dim=2) for x in (q, k, v))
    found = [F.scaled_dot_product_attention(q, k, v, is_causal=True)]
    for own_q, own_k, own_v in zip(queries, keys, values, strict=True):
        seen = torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2)
        mask = own_q.new_ones(own_q.shape[2], seen[0].shape[2]).bool().tril(k.shape[2])
        found.append(F.scaled_dot_product_attention(own_q, *seen, attn_mask=mask))
    return torch.cat(found, dim=2)


class MLP(nn.Module):
    """SwiGLU: one projection decides how much of the other passes."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        E, intermediate = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(E, intermediate, bias=config.mlp_bias)
        self.up_proj = Linear(E, intermediate, bias=config.mlp_bias)
        self.down_proj = Linear(intermediate, E, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: SimpleNamespace, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *attention) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *attention)
        return x + self.mlp(self.post_attention_layernorm(x))


# -- The model -------------------------------------------------------------------------------------
class Model(nn.Module):
    """The decoder and its output head. Attribute names spell the checkpoints' parameter names."""

    def __init__(self, config: dict):
        """config: the contents of a config.json. Weights are random until loaded."""
        super().__init__()
        self.config_dict, self.config = config, read_config(config)
        self.inv_freq = inv_freq(self.config)
        c = self.config
        embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        layers = nn.ModuleList(Block(c, layer) for layer in range(c.num_hidden_layers))
        norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.model = nn.ModuleDict(dict(embed_tokens=embed_tokens, layers=layers, norm=norm))
        self.lm_head = Linear(c.hidden_size, c.vocab_size, bias=False)
        self.context_length = c.max_position_embeddings  # the longest conversation, in tokens
        self.vocab_size = c.vocab_size  # may be lowered to what the tokenizer knows
        self.gradient_checkpointing = (
            False  # whether training computes each layer twice, to store less
        )
        self.tie()

    def tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, V) logits, each position seeing itself and what is before it.
        Raises ValueError where T is more than the model's context."""
        self.check_context_length(ids.shape[1])
        return self.head(self.hidden(ids))

    def head(self, hidden: Tensor) -> Tensor:
        """(..., E) -> (..., V) logits in float32 (or better), V being `self.vocab_size`. Rows of
        the head that are no token's would take probability: they are cut off for all users."""
        logits = self.lm_head(hidden)[..., : self.vocab_size]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
        keep: list | None = None,
        lengths: list[int] | None = None,
    ) -> Tensor:
        """(B, T) token ids -> (B, T, E), the last layer's normalised output.

        The only way into the decoder. The caller gives each token's place, `positions` (B, T), and
        what it sees: a `mask` (B, T, columns) bool, or the `lengths` of a context and its branches
        (see `causal_attention`), or neither: all up to itself. A cache needs a mask; ids are then
        its newest T tokens. To `keep`, each layer adds its keys and values, (2, B, K, T, D)."""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.model.embed_tokens(ids)  # (B, T, E)
        if mask is not None:  # from here on it is added to the scores: 0 or -inf
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, -math.inf)
        how = self.rope(positions), mask, kv_cache, keep, lengths
        for block in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *how, use_reentrant=False)
            else:
                x = block(x, *how)
        return self.model.norm(x)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) positions -> their cos and sin as `rotate` takes them, (B, 1, T, D) both."""
        self.inv_freq = self.inv_freq.to(positions.device)
        angle = positions[..., None] * self.inv_freq  # (B, T, D/2)
        cos, sin = angle.cos(), angle.sin()
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        dtype = self.lm_head.weight.dtype
        return cos[:, None].to(dtype), sin[:, None].to(dtype)

    def check_context_length(self, length: int) -> None:
        if length > self.context_length:
            raise ValueError(
                f"{length} tokens do not fit the model's context of {self.context_length}"
            )

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> "Model":
        """Load a Hugging Face folder or hub id: config.json, and safetensors, sharded or not. On
        the device "meta" only the config is read: there are shapes, and no numbers. Raises OSError
        where a file is absent, and ValueError, by name, for a model or tensor that does not fit.
        """
        path = from_hub(path_or_id, ["config.json", "model*.safetensors*"])
        try:
            with torch.device("meta"):  # shapes without memory
                model = cls(read_json(path / "config.json")).to(dtype)
        except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise ValueError(f"{path / 'config.json'} is incomplete: {error!r}") from None
        if str(device) != "meta":
            model.to_empty(device=device).tie()
            load_weights(model, path)
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and model.safetensors, each file replaced at once or not at all."""
        path, dtype = Path(path), str(self.lm_head.weight.dtype).removeprefix("torch.")
        config = {**self.config_dict, "dtype": dtype, "torch_dtype": dtype}  # the new name, the old
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.named_parameters()}
        replace_file(path / "config.json", json.dumps(config, indent=2))
        replace_file(path / "model.safetensors", tensors)


# Where two threads make MKL's first call of a function at once, one may compute less exactly
# (pytorch issue 188792). So one thread calls each first, here.
for function in (torch.sin, torch.cos, torch.exp, torch.expm1, torch.log, torch.sqrt):
    function(torch.ones(1))


# -- The sampler -----------------------------------------------------------------------------------
@dataclass
class Generation:
    """What `generate` drew, by prompt, by sample, by token; and the cache for the next turn."""

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
    stop: list[int] | tuple[int, ...] = (),
    seed: int = 0,
    rng_keys: list[tuple[int, ...]] | None = None,
    cache: KVCache | None = None,
) -> Generation:
    """Draw `num_samples` continuations of each prompt, each up to a token of `stop` (it is kept).

    Every prompt is read and stored once, however many samples are drawn from it. With a `cache`
    (of the turn before), prompt r is appended to what row r has read, which is everything but the
    last token that was drawn: the prompt begins in that one's place; `num_samples` is then 1.

    Token t of a row is decided by number t of a random stream keyed by (seed, *key), so a sample
    does not depend on its batch (but for a draw that falls between two roundings of a probability).
    rng_keys: non-negative integers for each row, prompt by prompt; by default (prompt, sample).

    temperature 0 takes the likeliest token. Log-probabilities are those at the given temperature
    (at 0: at 1). Raises ValueError for an empty prompt, or one that leaves too little context.
    """
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and every prompt at least one token")
    rng_keys = rng_keys or [(p, s) for p in range(len(prompts)) for s in range(num_samples)]
    uniform = [
        np.random.default_rng([seed, *k]).random(max_new_tokens, np.float32) for k in rng_keys
    ]
    uniform = torch.tensor(np.array(uniform), device=model.device)  # (R, max_new_tokens)
    stop = torch.tensor(list(stop), dtype=torch.long, device=model.device)

    hidden, cache = prefill(model, prompts, num_samples, max_new_tokens, cache)
    start, seen = cache.length, cache.attention_mask
    tokens = torch.zeros_like(uniform, dtype=torch.long)
    logprobs = torch.zeros_like(uniform)
    rows = torch.arange(len(uniform), device=model.device)  # those still in the batch,
    work = cache  # what they have read: the cache itself, or a copy of some of its rows,
    done = torch.zeros_like(rows, dtype=torch.bool)  # and which of them have finished
    for t in range(max_new_tokens):
        token, logprob = sample_tokens(
            model.head(hidden), uniform[rows, t], temperature
        )  # (rows,) both
        tokens[rows, t], logprobs[rows, t] = token, logprob.float()
        done |= torch.isin(token, stop)
        if t + 1 == max_new_tokens:
            break
        if t % 4 == 0:  # finished rows draw on blindly: to ask for them waits for the device
            stay = rows_to_keep(done.view(work.contexts[0].shape[1], -1))
            if stay.numel() == 0:
                break
            if stay.numel() <= 0.75 * len(rows):
                cache.copy_back(work, rows, start)
                work, stay = work.select_rows(stay, room=max_new_tokens - t), stay.flatten()
                rows, token, done = rows[stay], token[stay], done[stay]
        new = torch.ones_like(token, dtype=torch.bool)[:, None]  # (rows, 1)
        hidden = model.hidden(token[:, None], *work.append(new), work)[:, 0]
    cache.copy_back(work, rows, start)

    # A row ends at its first stop token. The last token that it drew was not read.
    ended = torch.isin(tokens, stop)
    count = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, max_new_tokens)  # (R,)
    column = torch.arange(work.length - start, device=model.device)
    cache.attention_mask = torch.cat([seen, column < count[:, None] - 1], dim=1)
    drawn = []
    for values in (tokens.tolist(), logprobs.tolist()):
        turns = [row[:n] for row, n in zip(values, count.tolist(), strict=True)]
        drawn.append([turns[i : i + num_samples] for i in range(0, len(turns), num_samples)])
    return Generation(*drawn, cache)


def prefill(
    model: Model, prompts: list, num_samples: int, room: int, cache
) -> tuple[Tensor, KVCache]:
    """Read the prompts: the hidden states that first tokens are drawn from, (R, E), and the cache,
    with room for so many columns more. Raises ValueError beyond the model's context."""
    P, T = len(prompts), max(map(len, prompts))
    rows = [[0] * (T - len(prompt)) + prompt for prompt in prompts]  # padded on the left
    ids = torch.tensor(rows, device=model.device)  # (P, T)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    attention_mask = torch.arange(T, device=model.device) >= T - lengths[:, None]
    before = 0 if cache is None else cache.attention_mask.sum(dim=1)
    model.check_context_length(int((before + lengths).max()) + room)
    if cache is None:
        contexts: list[Tensor] = []
        hidden = model.hidden(ids, *causal_mask(attention_mask, T), keep=contexts)
        _, _, K, _, D = contexts[0].shape
        suffixes = [context.new_zeros(2, P * num_samples, K, room, D) for context in contexts]
        cache = KVCache(contexts, suffixes, attention_mask.repeat_interleave(num_samples, dim=0))
    else:
        rows = torch.arange(P, device=model.device).view(cache.contexts[0].shape[1], -1)
        cache = cache.select_rows(rows, room=T + room)
        hidden = model.hidden(ids, *cache.append(attention_mask), cache)
    return hidden[:, -1].repeat_interleave(num_samples, dim=0), cache


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row by the inverse CDF: the first at which the summed probability passes u.
    logits: (R, V); uniform: (R,) in [0, 1). Returns tokens and their log-probabilities, (R,) each.
    With p = (0.2, 0.5, 0.3), u = 0.1 draws token 0, u = 0.6 token 1, and u = 0.7 token 2."""
    probs = (logits / (temperature or 1.0)).softmax(dim=-1)  # (R, V)
    if temperature == 0:
        token = logits.argmax(dim=-1)
    else:
        cdf = probs.cumsum(dim=-1)
        total = cdf[:, -1:].contiguous()
        token = torch.searchsorted(cdf, uniform[:, None] * total, right=True)
        last_possible = torch.searchsorted(cdf, total)  # the last token that has any probability
        token = token.minimum(last_possible).squeeze(-1)
    return token, probs.gather(-1, token[:, None]).squeeze(-1).log()


def rows_to_keep(done: Tensor) -> Tensor:
    """(P, S) which rows are done -> (P', S') numbers of the rows to go on with (a dot is done):

    a b . .       a b
    . . . .  ->   c d
    c . . d
    """
    P, S = done.shape
    left = (~done).sum(dim=1)  # (P,)
    order = done.int().argsort(dim=1, stable=True)[:, : int(left.max())]
    return (order + S * torch.arange(P, device=done.device)[:, None])[left > 0]


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


def from_hub(path_or_id: str | Path, files: list[str], kind: str = "model") -> Path:
    """A file or folder as it is; a hub id (org/name) as the folder that the hub's files are cached
    in, with these files. Raises FileNotFoundError where it cannot be had."""
    if Path(path_or_id).exists():
        return Path(path_or_id)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path_or_id)):
        raise FileNotFoundError(f"{path_or_id}: no such file or folder, nor a hub id (org/name)")
    try:
        found = huggingface_hub.snapshot_download(path_or_id, repo_type=kind, allow_patterns=files)
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


def tiny_model(words: list[str], seed: int = 0, context: int = 512) -> tuple[Model, Tokenizer]:
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
        eos_token=special[0], pad_token=special[0], model_max_length=context, tiny=True,
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
