"""A decoder-only language model, from scratch: weights, tokens, chat template, and a sampler.

    Model        the Llama architecture as a plain torch module; its parameters have the names that
                 they have in checkpoints, so a folder of safetensors loads by name
    Tokenizer    text to token ids and back; a chat to text, through the checkpoint's own template
    generate     the sampler: reads every prompt once, draws many samples from it, and keeps what
                 it read for the next turn

Nothing here knows what a task or a reward is. `tiny` builds a model of 0.3 million parameters and
its word-level tokenizer from a list of words; from then on it is a checkpoint like any other.

Shapes: B sequences, T tokens, E the width, H query heads, K key and value heads, D numbers a head,
V words in the vocabulary; R rows of the sampler (prompts times samples), C columns of its cache.
"""

import json
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jinja2
import jinja2.sandbox
import numpy as np
import safetensors
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -- The decoder -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What the decoder needs to know of a config.json, under the names that it has there."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, config: dict) -> "Config":
        """Read a config.json. Raises ValueError, by name, for what is not computed here."""
        if config.get("model_type") != "llama":
            kind = config.get("model_type")
            raise ValueError(f"model_type {kind!r} is not supported; supported: llama")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        for where, name, wanted in (
            (rope, "rope_type", "default"), (rope, "type", "default"),
            (rope, "partial_rotary_factor", 1), (config, "hidden_act", "silu"),
            (config, "attention_bias", False), (config, "mlp_bias", False),
            (config, "quantization_config", None),
        ):  # fmt: skip
            if where.get(name, wanted) != wanted:
                raise ValueError(f"{name} = {where[name]!r} in config.json is not supported")
        heads = config["num_attention_heads"]
        known = {name: config[name] for name in cls.__dataclass_fields__ if name in config}
        known["num_key_value_heads"] = config.get("num_key_value_heads") or heads
        known["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
        known["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta", 10_000.0)
        return cls(**known)


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

    x: (B, heads, T, D); cos, sin: (B, 1, T, D/2). The dot product of a query and a key turned so
    depends on the two positions by their difference alone.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K heads of keys and values."""

    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rope, mask: Tensor | None, cache: "Cache | None", layer: int
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (  # (B, heads, T, D)
            project(x).view(B, T, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.write(layer, k, v)  # (B, K, C, D): all that was read so far
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return self.o_proj(x.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: one projection decides how much of the other passes."""

    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, *context) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Model(nn.Module):
    """The decoder and its output head. Attribute names spell the checkpoints' parameter names."""

    def __init__(self, config: dict):
        """config: the contents of a config.json. Weights are random until loaded."""
        super().__init__()
        self.config_dict, self.config = config, Config.from_dict(config)
        self.model = Decoder(self.config)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
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
        """(..., E) -> (..., V) logits in float32 (or better)."""
        return at_least_float32(self.lm_head(hidden))

    def hidden(
        self, ids: Tensor, cache: "Cache | None" = None, live: Tensor | None = None
    ) -> Tensor:
        """(B, T) token ids -> (B, T, E), the last layer's normalised output.

        With a cache, the ids continue what its rows have read, and are added to it. A token that
        is not `live` is a hole: no other token sees it, and positions count live tokens only.
        """
        B, T = ids.shape
        if cache is None and live is None:  # nothing padded: plain causal attention
            positions, mask = torch.arange(T, device=ids.device)[None], None  # (1, T)
        else:
            live = torch.ones_like(ids, dtype=torch.bool) if live is None else live
            start = cache.length if cache else 0
            read = torch.cat([cache.add(live), live], dim=1) if cache else live  # (B, C)
            positions = (read.sum(1, keepdim=True) - live.sum(1, keepdim=True)) + live.cumsum(1) - 1
            positions = positions.clamp(min=0)  # a hole before the first token: any number will do
            row = torch.arange(start, start + T, device=ids.device)[:, None]  # (T, 1)
            column = torch.arange(start + T, device=ids.device)  # (C,)
            # A token sees the live ones up to itself; a hole sees itself: its softmax must exist.
            mask = ((column <= row) & read[:, None] | (column == row))[:, None]  # (B, 1, T, C)
        c = self.config
        pair = torch.arange(0, c.head_dim, 2, device=ids.device, dtype=torch.float32)
        angle = positions[..., None] * c.rope_theta ** (-pair / c.head_dim)  # (B, T, D/2)
        x = self.model.embed_tokens(ids)
        rope = (angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None])
        for layer, block in enumerate(self.model.layers):
            x = block(x, rope, mask, cache, layer)
        return self.model.norm(x)

    # -- Files ------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> "Model":
        """Load a Hugging Face folder: config.json and model.safetensors.

        Raises FileNotFoundError where a file is absent, and ValueError if this decoder does not
        compute such a model, or if a tensor, which is named, is missing, left over or misshapen.
        """
        path = Path(path)
        try:
            model = cls(read_json(path / "config.json")).to(dtype)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path / 'config.json'} is incomplete: {error}") from None
        try:
            stored = safetensors.torch.load_file(path / "model.safetensors")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path / 'model.safetensors'} is damaged: {error}") from None
        own = model.tensors()
        if model.config.tie_word_embeddings:
            stored.pop("lm_head.weight", None)  # saved all the same by some
        for name in sorted(own.keys() ^ stored.keys()):
            what = "is missing" if name in own else "is none of this architecture's"
            raise ValueError(f"{path}: the tensor {name} {what}")
        for name, tensor in own.items():
            if tensor.shape != stored[name].shape:
                shapes = f"{tuple(stored[name].shape)} instead of {tuple(tensor.shape)}"
                raise ValueError(f"{path}: the tensor {name} has the shape {shapes}")
            tensor.data.copy_(stored[name])
        return model.to(device)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name, a tied head left out: what a checkpoint holds."""
        return dict(self.named_parameters())

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and model.safetensors, each file replaced at once or not at all."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.tensors().items()}
        replace_file(path / "config.json", json.dumps(self.config_dict, indent=2))
        replace_file(
            path / "model.safetensors", safetensors.torch.save(tensors, metadata={"format": "pt"})
        )


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


def replace_file(path: str | Path, content: str | bytes) -> None:
    """Write a file under a temporary name, then rename it: others see the old or the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# -- Tokens and chat templates ---------------------------------------------------------------------


class Tokenizer:
    """A checkpoint's tokenizer.json, its chat template, and the ids on which a turn ends."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, settings: dict, generation: dict):
        """settings: tokenizer_config.json, with the template; generation: generation_config.json"""
        self.tokenizer, self.settings, self.generation = tokenizer, settings, generation
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = raise_template_error
        if not settings.get("chat_template"):
            raise ValueError("the tokenizer has no chat template: R3 needs an instruct model")
        try:
            self.template = environment.from_string(settings["chat_template"])
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template is no jinja2 template: {error}") from None
        ends = generation.get("eos_token_id")
        ends = [*(ends if isinstance(ends, list) else [ends])]
        ends.append(tokenizer.token_to_id(special_token(settings, "eos_token") or ""))
        self.stop_ids: list[int] = list(dict.fromkeys(end for end in ends if end is not None))
        if not self.stop_ids:
            raise ValueError("neither generation_config.json nor the tokenizer ends a turn")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Load tokenizer.json and its settings from a Hugging Face folder."""
        path = Path(path)
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
        replace_file(path / "tokenizer_config.json", json.dumps(self.settings, indent=2))
        replace_file(path / "generation_config.json", json.dumps(self.generation, indent=2))

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
        try:
            return self.template.render(
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **{name: token for name, token in special.items() if token is not None},
            )
        except Exception as error:  # a template is a program of somebody else's
            raise ValueError(f"the chat template refuses this conversation: {error}") from None

    def prompt(self, messages: list[dict], tools: list | None = None) -> list[int]:
        """A chat as token ids, up to where the assistant's turn begins."""
        return self.encode(self.render(messages, tools))

    def next_turn(self, turn: list[int], bridge: list[int]) -> list[int]:
        """A sampled turn with what the template puts after it (`bridge`), ready for the next turn.

        A turn that was cut before its end gets the end that the template would have written.
        """
        return turn + (bridge[1:] if turn and turn[-1] in self.stop_ids else bridge)

    def bridge(self, instruction: str) -> list[int]:
        """What the template puts between an assistant's words and the assistant's next ones.

        The end-of-turn token, a user's turn that says `instruction`, and the next turn's opening:
        cut out of a whole rendering, since a piece of text by itself may tokenise differently.
        """
        turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        before = self.encode(self.render(turns, add_generation_prompt=False))
        after = self.prompt([*turns, {"role": "user", "content": instruction}])
        ends = [i for i, token in enumerate(before) if token in self.stop_ids]
        if not ends or after[: ends[-1] + 1] != before[: ends[-1] + 1]:
            raise ValueError("the chat template does not end an assistant's turn on an end token")
        return after[ends[-1] :]


def special_token(settings: dict, name: str) -> str | None:
    token = settings.get(name)  # a string, or {"content": string, …}
    return token["content"] if isinstance(token, dict) else token


def raise_template_error(message: str):
    raise jinja2.TemplateError(message)


# -- The sampler -----------------------------------------------------------------------------------


class Cache:
    """The keys and values of what R rows have read, so that no token is ever read twice.

    Rows grow together, a column at a time. Where a row has nothing to add (it is finished, or its
    block was shorter than its neighbour's), the column is a hole: `live` is False there.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], live: Tensor, length: int = 0):
        self.keys, self.values = keys, values  # a layer each: (R, K, capacity, D)
        self.live = live  # (R, capacity) bool
        self.length = length  # C, the columns in use
        self.unread = None  # (R,) the token sampled last, which no row has read yet

    @classmethod
    def empty(cls, model: Model, rows: int, capacity: int) -> "Cache":
        c, weight = model.config, model.lm_head.weight
        shape = (rows, c.num_key_value_heads, capacity, c.head_dim)
        keys = [weight.new_empty(shape) for _ in range(c.num_hidden_layers)]
        values = [weight.new_empty(shape) for _ in range(c.num_hidden_layers)]
        return cls(
            keys, values, torch.zeros(rows, capacity, dtype=torch.bool, device=weight.device)
        )

    def add(self, live: Tensor) -> Tensor:
        """Open columns for a block of tokens, (R, T) bool; returns `live` of those before."""
        before = self.live[:, : self.length]
        self.live[:, self.length : self.length + live.shape[1]] = live
        self.length += live.shape[1]
        return before

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put a layer's keys and values, (R, K, T, D), into the newest columns; returns all."""
        new = slice(self.length - k.shape[2], self.length)
        self.keys[layer][:, :, new], self.values[layer][:, :, new] = k, v
        return self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]

    def pick(self, rows: Tensor, extra: int) -> "Cache":
        """A copy of some rows (one may be named repeatedly), with room for `extra` columns."""
        keys, values = (
            [F.pad(t[rows, :, : self.length], (0, 0, 0, extra)) for t in tensors]
            for tensors in (self.keys, self.values)
        )
        return Cache(keys, values, F.pad(self.live[rows, : self.length], (0, extra)), self.length)

    def put_back(self, rows: Tensor, part: "Cache", start: int) -> None:
        """Copy what the working copy `part` of these rows has read from column `start` on."""
        new = slice(start, part.length)
        for own, theirs in zip(self.keys + self.values, part.keys + part.values, strict=True):
            own[rows, :, new] = theirs[:, :, new]
        self.live[rows, new] = part.live[:, new]


@dataclass
class Generation:
    """What `generate` drew, by prompt, by sample, by token; and the cache for the next turn."""

    tokens: list[list[list[int]]]
    logprobs: list[list[list[float]]]
    cache: Cache


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
) -> Generation:
    """Draw `samples` continuations of each prompt, each up to a token of `stop` (which is kept).

    Every prompt is read once, however many samples are drawn from it. Rows that are finished leave
    the batch. With a `cache` (of the turn before), prompt r is appended to what row r has read.

    A row's randomness is its own: token t of sample s of prompt p is decided by number t of a
    stream keyed by (seed, *keys[p], s), so a sample does not depend on what else is in the batch
    (but for a draw that falls between two roundings of a probability). `keys` holds non-negative
    integers and is (p,) by default; with a cache, p counts rows.

    temperature 0 takes the likeliest token. `logprobs` are those of the distribution at the given
    temperature (at 0: at 1) before top_k and top_p cut it, as the trainer computes them. Raises
    ValueError for an empty prompt, or a conversation that might outgrow the model's context.
    """
    if not prompts or not all(prompts) and cache is None:
        raise ValueError("generate needs at least one prompt, and every prompt at least one token")
    P, R, device = len(prompts), len(prompts) * samples, model.device
    keys = [(p,) for p in range(P)] if keys is None else keys
    streams = ([seed, *key, s] for key in keys for s in range(samples))
    uniform = [np.random.default_rng(key).random(max_new_tokens, np.float32) for key in streams]
    uniform = torch.tensor(np.array(uniform), device=device)  # (R, max_new_tokens)
    stops = torch.tensor(list(stop), dtype=torch.long, device=device)

    # Read the prompts, padded on the right with holes; keep the output at each one's last token.
    if cache is not None:
        prompts = [[token, *p] for token, p in zip(cache.unread.tolist(), prompts, strict=True)]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(lengths.max())
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)  # (P, width)
    live = torch.arange(width, device=device) < lengths[:, None]
    rows = torch.arange(P, device=device)
    cache = cache.pick(rows, extra=width) if cache else Cache.empty(model, P, width)
    longest = int(cache.live.sum(1).max()) + width + max_new_tokens
    if longest > model.config.max_position_embeddings:
        context = model.config.max_position_embeddings
        raise ValueError(f"up to {longest} tokens do not fit the model's context of {context}")
    hidden = model.hidden(ids, cache, live)[rows, lengths - 1]  # (P, E)
    rows = torch.arange(R, device=device)  # the rows still in the batch
    hidden = hidden[rows // samples]  # (R, E): each sample starts from its prompt
    cache = cache.pick(rows // samples, extra=max_new_tokens)
    start = cache.length

    tokens = torch.zeros(R, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(R, max_new_tokens, device=device)
    count = torch.full((R,), max_new_tokens, device=device)  # how many tokens a row has drawn
    done = torch.zeros(R, dtype=torch.bool, device=device)  # of the rows in the batch
    work = cache  # what the rows in the batch have read: the cache itself, or a copy of some rows
    for t in range(max_new_tokens):
        drawn, logprob = draw(model.head(hidden), uniform[rows, t], temperature, top_k, top_p)
        tokens[rows, t], logprobs[rows, t] = drawn, logprob
        ended = torch.isin(drawn, stops) & ~done
        count[rows[ended]] = t + 1
        done |= ended
        if t + 1 == max_new_tokens or t % 4 == 0 and bool(done.all()):
            break
        if t % 4 == 0 and done.sum() * 4 > len(done):  # a quarter is finished: they leave the batch
            if work is not cache:
                cache.put_back(rows, work, start)
            stay = (~done).nonzero().squeeze(1)
            work = work.pick(stay, extra=max_new_tokens - t)
            rows, drawn, done = rows[stay], drawn[stay], done[stay]
        hidden = model.hidden(drawn[:, None], work, ~done[:, None])[:, 0]
    if work is not cache:
        cache.put_back(rows, work, start)
        cache.length = work.length
    cache.unread = tokens[torch.arange(R, device=device), count - 1]

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
        cdf = kept.softmax(-1).cumsum(-1)
        token = (cdf <= uniform[:, None] * cdf[:, -1:]).sum(-1)
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
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": TINY_TEMPLATE,
        "eos_token": special[0],
        "pad_token": special[0],
        "model_max_length": context,
    }
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
    rows = (
        features @ projection / features.norm(dim=1, keepdim=True) * config["hidden_size"] ** -0.5
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[list(numbers.values())] = rows
    return model, Tokenizer(tokenizer, settings, {"eos_token_id": [0], "pad_token_id": 0})
