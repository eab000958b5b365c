"""Reflect, Retry, Reward: the method, from a dataset of failures to the update of the weights.

    question -> attempt, wrong -> "reflect" -> reflection_1 … reflection_G       the trained tokens
                                                   |              |
                                                "again"        "again"
                                                   |              |
                                                retry_1   …    retry_G  ->  rewards r_1 … r_G

    A_g  = (r_g - mean r) / (std r + epsilon)                               `group_advantages`
    mask = 1 on the tokens of the reflections, 0 everywhere else            `reflection_rows`
    loss = - sum mask * (min(ratio A, clip(ratio) A) - beta KL) / sum mask  `grpo_loss`

The file reads from top to bottom: the loop (`train`), then what it calls: advantages and loss, the
mask and the log-probabilities, the conversation (`attempt`, `reflect`, `retry`), what a step
reports, the optimizer, and the checkpoint. A conversation is token ids from end to end: what is
trained is what was sampled, never text that was decoded and tokenized again.

This file knows a task only by `messages`, `verify`, `reflect` and `again`; a problem by its `id`;
and a verdict by `right` (both are dataclasses).

Shapes: P failures with G reflections each; T tokens of a conversation; V the vocabulary.
"""

import json
import math
import os
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model import Generation, KVCache, Model, Tokenizer, generate, replace_file


# -- The loop --------------------------------------------------------------------------------------
def train(
    chat: "Chat", reference: Model | None, failures: "Tries", c: "Config", folder: Path
) -> Iterator[tuple[int, dict[str, float]]]:
    """R3 on a dataset of failures. Changes chat.model in place; yields (steps done, metrics).

    reference: the model that training started with, for the KL term; None where c.beta is 0. What
    was sampled is added to folder/samples.jsonl, and training goes on from folder's checkpoint.
    Raises ValueError for a gradient that is not finite."""
    policy, G = chat.model, c.group
    policy.checkpointing = c.checkpointing
    optimizer = MasterAdamW(policy, c.lr, c.offload)
    start, state = load_checkpoint(folder, optimizer)  # state: what a variant wants kept
    if start == 0:
        yield 0, {}
    for step in range(start, c.steps):
        # 1-2. Draw failures, reflect G times on each, and retry once after each reflection.
        drawn = draw_failures(failures, step, c.batch, chat.seed)
        tries = rollout(chat, drawn, G, key=(TRAIN, step))  # P * G conversations

        # 3. The reward of a reflection is 1 if its retry is right, and it was not cut itself.
        rewards = torch.tensor([float(t.second.right and not t.cut) for t in tries]).view(-1, G)

        # 4. How much better was each reflection than the others on the same failure?
        advantages = group_advantages(rewards, scale=c.scale)  # (P, G)

        # 5. The gradient of the step's loss, one failure with its G reflections at a time.
        tokens = sum(len(t.reflection) for t in tries)
        most = len(tries) * chat.max_new_tokens  # tokens, if all were the longest
        normalizer = {"dapo": tokens, "grpo": len(tries), "dr_grpo": most}[c.loss]
        parts = []
        for p, A in enumerate(advantages):  # (G,)
            if not A.any() and not c.beta:
                continue  # all right or all wrong: no gradient comes from it
            ids, mask, old = reflection_rows(tries[p * G : (p + 1) * G])  # (G, T) each
            ref = None
            if c.beta:
                with torch.no_grad():
                    ref = token_logprobs(reference, ids, mask, chat.temperature)
            new = token_logprobs(policy, ids, mask, chat.temperature)  # (G, T)
            A, mask, old = A.to(policy.device), mask.to(policy.device), old.to(policy.device)
            loss = grpo_loss(new, old, ref, A, mask, c.clip, c.beta, c.loss, normalizer)
            loss.backward()
            optimizer.collect()
            parts.append(token_sums(loss, new.detach(), old, ref, A, mask, c.clip))

        # 6. One update of the weights.
        lr = c.lr * lr_share(step, c.steps, c.warmup)
        norm = optimizer.update(lr, c.max_grad_norm)

        for t, r, A in zip(tries, rewards.flatten(), advantages.flatten(), strict=True):
            worth = {"step": step + 1, "reward": r.item(), "advantage": A.item()}
            append_jsonl(folder / "samples.jsonl", {**worth, **to_json(t, chat.tokenizer)})
        yield step + 1, {**describe(tries, rewards, parts), "grad_norm": norm, "lr": lr}
        if step + 1 == c.steps or (step + 1) % c.save_every == 0:  # it is logged by now
            save_checkpoint(folder, step + 1, optimizer, state)


def setting(default, about: str, least: float | None = None, choices=(), commands="train"):
    """A field of a Config: its default, its help, its values, and the commands that have it."""
    how = {"help": about, "least": least, "choices": choices, "commands": commands}
    return field(default=default, metadata=how)


@dataclass
class Config:
    """The settings of `train`, with the paper's values where it states them."""

    steps: int = setting(1_750, "optimizer steps", least=1)
    batch: int = setting(256, "failures in a step", least=1)
    group: int = setting(8, "G, reflections on each failure", least=2)
    lr: float = setting(5e-7, "learning rate at its highest", least=0)
    warmup: float = setting(0.03, "share of the steps in which the learning rate rises", least=0)
    beta: float = setting(0.001, "weight of the KL term; 0 needs no reference model", least=0)
    clip: float = setting(0.2, "epsilon: the ratio is clipped to 1 - epsilon … 1 + epsilon", 0)
    loss: str = setting(
        "dapo", "what a token weighs, see grpo_loss", choices=("dapo", "grpo", "dr_grpo")
    )
    scale: bool = setting(True, "divide advantages by the group's standard deviation")
    max_grad_norm: float = setting(1.0, "a longer gradient is cut to this norm", least=0)
    offload: bool = setting(False, "keep float32 weights and moments in main memory")
    checkpointing: bool = setting(False, "compute layers twice in training, to store less")
    save_every: int = setting(25, "steps between two checkpoints", least=1)


# -- Advantages and loss ---------------------------------------------------------------------------
def group_advantages(rewards: Tensor, epsilon: float = 1e-4, scale: bool = True) -> Tensor:
    """(P, G) rewards -> (P, G) advantages: how far above the group's mean, in standard deviations.

    One success among G = 4: the mean is 0.25, the (sample) standard deviation 0.5, so

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([[ 1.4997, -0.4999, -0.4999, -0.4999],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])

    A group of equal rewards has nothing to compare: its advantages are exactly zero. With
    scale=False they are not divided by the deviation (Dr. GRPO): 0.75 and -0.25 in the example.
    """
    A = rewards - rewards.mean(dim=1, keepdim=True)
    if scale:
        A = A / (rewards.std(dim=1, keepdim=True) + epsilon)  # needs G >= 2
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return A.masked_fill(equal, 0.0)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    beta: float = 0.001,
    loss: str = "dapo",
    normalizer: float | None = None,
) -> Tensor:
    """The clipped surrogate with the k3 KL term, over the tokens where mask is True. A scalar.

    logprobs, old_logprobs, ref_logprobs, mask: (N, T); advantages: (N,). ref_logprobs may be None
    when beta = 0. `loss` says what a token weighs:

        dapo      the mean over all tokens of the step: every token weighs the same
        grpo      the mean over sequences of each sequence's mean: the original
        dr_grpo   the sum over a constant, N times the longest length allowed: no length bias

    normalizer: what the sum is divided by: tokens, sequences, or sequences times longest length.
    The caller gives the whole step's, so that splitting a step never changes its gradient; by
    default it is taken from `mask` (its width being the longest length).
    """
    A = advantages[:, None]  # (N, 1)
    # Untrained positions are 0 first: else exp may overflow there, and 0 * inf is nan.
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()  # (N, T)
    per_token = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    if beta:
        per_token = per_token + beta * k3(torch.where(mask, ref_logprobs - logprobs, 0.0))
    per_token = torch.where(mask, per_token, 0.0)
    if loss == "grpo":
        per_token = per_token / mask.sum(dim=1, keepdim=True).clamp(min=1)
    if normalizer is None:
        normalizer = {"dapo": mask.sum(), "grpo": len(mask), "dr_grpo": mask.numel()}[loss]
    return per_token.sum() / normalizer


def k3(difference: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi || pi_ref) per token, from d = log pi_ref - log pi: never
    negative. Used as a loss, its expected gradient is that of KL(pi_ref || pi)."""
    return torch.expm1(difference) - difference  # exp(d) - 1 - d, exact for small d, too


# -- The mask and the log-probabilities ------------------------------------------------------------
def reflection_rows(group: "Tries") -> tuple[Tensor, Tensor, Tensor]:
    """One failure's G conversations up to the end of the reflection, padded on the right.

    Returns (G, T) each: the token ids; the mask, True on the reflection's own tokens (with the
    end-of-turn token that the model wrote); and their log-probabilities when they were drawn. The
    mask is made from positions, never from ids: a padding token's id may be a real token elsewhere.
    """
    T = max(len(t.context) + len(t.reflection) for t in group)
    ids = torch.zeros(len(group), T, dtype=torch.long)
    mask = torch.zeros(len(group), T, dtype=torch.bool)
    old = torch.zeros(len(group), T)
    for row, t in enumerate(group):
        start, end = len(t.context), len(t.context) + len(t.reflection)
        ids[row, :end] = torch.tensor(t.context + t.reflection)
        mask[row, start:end] = True
        old[row, start:end] = torch.tensor(t.logprobs)
    return ids, mask, old


def token_logprobs(model: Model, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """The log-probabilities of the tokens where mask is True: (G, T), zero elsewhere.

    ids, mask: (G, T) on the CPU; the rows begin with the same context, which is computed once for
    all of them. All rows become one, in which each token keeps its position:

        packed     [ context    | reflection_1 | reflection_2 | … | reflection_G ]
        positions    0 1 … C-1    C C+1 …        C C+1 …            C C+1 …
        sees         the context and, up to itself, its own reflection

    Raises ValueError where the rows differ before their first trained token, or have none before.
    """
    column = torch.arange(ids.shape[1])
    C = int(mask.any(dim=0).int().argmax())  # the context: all before the first trained token
    if C == 0 or (ids[:, :C] != ids[0, :C]).any():
        raise ValueError("rows need a trained token, and the same context before the first one")
    last = (mask * column).amax(dim=1, keepdim=True)  # (G, 1)
    row, place = ((column >= C) & (column <= last)).nonzero(as_tuple=True)  # of each own token
    packed = torch.cat([ids[0, :C], ids[row, place]])  # (L,)
    positions = torch.cat([column[:C], place])
    lengths = [C, *row.bincount(minlength=len(ids)).tolist()]  # context, then reflections

    # Own token j is at C + j, and predicted at C + j - 1; the first of each row, at C - 1.
    before = torch.where(place == C, C - 1, C - 1 + torch.arange(len(row)))[mask[row, place]]
    inputs = packed[None].to(model.device), positions[None].to(model.device)
    hidden = model.hidden(*inputs, lengths=lengths)[0, before.to(model.device)]  # (tokens, E)
    values = score(model, hidden, ids[mask].to(model.device), temperature)  # (tokens,)
    return values.new_zeros(ids.shape).masked_scatter(mask.to(model.device), values)


LOGITS = 2**25  # at most so many exist at once


def score(model: Model, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """(tokens, E) hidden states, (tokens,) targets -> their log-probabilities, (tokens,).

    The output head is the widest matrix. It is applied to a part of the tokens at a time. If there
    are several parts, the backward pass computes each again: all logits never exist at once.
    """
    size = max(1, LOGITS // model.vocab_size)
    if len(targets) <= size:
        log_p = F.log_softmax(model.head(hidden) / temperature, dim=-1)  # (tokens, V)
        return -F.nll_loss(log_p, targets, reduction="none")
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    scored = [checkpoint(score, model, *part, temperature, use_reentrant=False) for part in parts]
    return torch.cat(scored)


# -- The conversation ------------------------------------------------------------------------------
@dataclass
class Chat:
    """A model with what it needs to talk about a task, and how its turns are sampled."""

    model: Model
    tokenizer: Tokenizer
    task: object
    max_new_tokens: int  # the longest turn
    temperature: float = 1.0
    seed: int = 0
    cache_tokens: int = 131_072  # in the KV cache at once: this bounds the memory

    def question(self, problem) -> list[int]:
        """The prompt of the first try, up to where the assistant's turn begins."""
        return self.tokenizer.prompt(*self.task.messages(problem))

    def context(self, c: "Conversation") -> list[int]:
        """All that is read before a reflection: question, attempt, and "reflect"."""
        bridge = self.tokenizer.bridge(self.task.reflect)
        return c.prompt + self.tokenizer.next_turn(c.attempt, bridge)

    def sample(self, prompts, samples, keys, cache=None) -> Generation:
        how = self.max_new_tokens, self.temperature, self.tokenizer.stop_ids, self.seed
        return generate(self.model, prompts, samples, *how, keys, cache)

    def verify(self, problem, turn: list[int]):
        return self.task.verify(problem, self.tokenizer.decode(turn))


@dataclass
class Conversation:
    """What was said about a problem, as token ids, and the verifier's two verdicts. Turns end with
    their end-of-turn token, unless they were cut."""

    problem: object
    sample: int  # which attempt at the problem this is
    prompt: list[int]  # the question, up to where the assistant's turn begins
    attempt: list[int]
    first: object  # the verdict on the attempt
    context: list[int] = field(default_factory=list)  # question, attempt, and "reflect"
    number: int = 0  # which reflection on the attempt this is
    reflection: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of the reflection, when it was drawn
    cut: bool = False  # whether the reflection reached the longest length
    retry: list[int] = field(default_factory=list)
    second: object = None  # the verdict on the retry


Tries = list[Conversation]

# The random numbers of a turn are keyed by (seed, purpose, step, turn, problem, attempt, …), so
# that they do not depend on the batch. A `key` below is its (purpose, step).
EVALUATE, COLLECT, TRAIN, AGAIN = range(4)  # purposes
ATTEMPT, REFLECT, RETRY = range(3)  # turns


def attempt(chat: Chat, problems: list, samples: int, key: tuple, start: int = 0) -> Tries:
    """First tries: `samples` at each problem, problem by problem, numbered from `start`."""
    prompts = [chat.question(problem) for problem in problems]
    keys = [(*key, ATTEMPT, p.id, start + s) for p in problems for s in range(samples)]
    drawn = chat.sample(prompts, samples, keys)
    tries = []
    for problem, prompt, turns in zip(problems, prompts, drawn.tokens, strict=True):
        for s, turn in enumerate(turns, start):
            tries.append(Conversation(problem, s, prompt, turn, chat.verify(problem, turn)))
    return tries


def reflect(chat: Chat, failures: Tries, samples: int, key: tuple) -> tuple[Tries, KVCache]:
    """`samples` reflections on each failure, failure by failure, and the cache to retry from."""
    contexts = [chat.context(f) for f in failures]
    keys = [(*key, REFLECT, f.problem.id, f.sample, g) for f in failures for g in range(samples)]
    drawn = chat.sample(contexts, samples, keys)
    reflected = []
    for i, f in enumerate(failures):
        for g, turn in enumerate(drawn.tokens[i]):
            said = {"reflection": turn, "logprobs": drawn.logprobs[i][g], "number": g}
            cut = turn[-1] not in chat.tokenizer.stop_ids
            reflected.append(replace(f, context=contexts[i], cut=cut, **said))
    return reflected, drawn.cache


def retry(chat: Chat, reflected: Tries, key: tuple, cache: KVCache | None = None) -> Tries:
    """A second try after each reflection. With the cache from `reflect`, which it leaves as it is,
    only what comes after is read. Without (the reflections may be another model's), all is read."""
    prompts, bridge = [], chat.tokenizer.bridge(chat.task.again)
    for c in reflected:
        ids = c.context + chat.tokenizer.next_turn(c.reflection, bridge)
        # The last token that was drawn is not in the cache: the prompt begins in its place.
        prompts.append(ids[len(c.context) + len(c.reflection) - 1 :] if cache else ids)
    keys = [(*key, RETRY, c.problem.id, c.sample, c.number) for c in reflected]
    drawn = chat.sample(prompts, 1, keys, cache)
    tries = []
    for c, [turn] in zip(reflected, drawn.tokens, strict=True):
        tries.append(replace(c, retry=turn, second=chat.verify(c.problem, turn)))
    return tries


def first_tries(chat: Chat, problems: list, samples: int, key: tuple, start: int = 0) -> Tries:
    """`attempt` at any number of problems, in batches that fit the memory. Sorted by their ids."""
    tries, todo = [], batches(chat, problems, samples, turns=1)
    while todo:
        try:
            tries += attempt(chat, todo[0], samples, key, start)
            todo = todo[1:]
        except torch.OutOfMemoryError:
            todo = smaller(chat, todo, samples, turns=1)
    return sorted(tries, key=lambda c: (c.problem.id, c.sample))


def rollout(chat: Chat, failures: Tries, samples: int, key: tuple) -> Tries:
    """Reflect `samples` times on any number of failures, and retry once after each reflection, in
    batches that fit the memory. Sorted by problem id; the tries on one failure stand together."""
    tries, todo = [], batches(chat, failures, samples, turns=2)
    while todo:
        try:
            reflected, cache = reflect(chat, todo[0], samples, key)
            tries += retry(chat, reflected, key, cache)
            todo = todo[1:]
        except torch.OutOfMemoryError:
            todo = smaller(chat, todo, samples, turns=2)
        cache = None  # its memory is free for the next batch
    return sorted(tries, key=lambda c: (c.problem.id, c.sample))


def batches(chat: Chat, items: list, samples: int, turns: int) -> list[list]:
    """Problems or failures, longest first, in batches whose keys and values fit chat.cache_tokens.
    All items of a batch count as the longest."""
    todo = sorted(items, key=lambda item: -cached(chat, item, samples, turns))
    found = []
    while todo:
        size = max(1, chat.cache_tokens // cached(chat, todo[0], samples, turns))
        found.append(todo[:size])
        todo = todo[size:]
    return found


def cached(chat: Chat, item, samples: int, turns: int) -> int:
    """Tokens that a problem or failure takes in the cache: what was said, and samples * turns new
    turns, with about 50 tokens of the template before each."""
    said = item.prompt + item.attempt if isinstance(item, Conversation) else chat.question(item)
    return len(said) + samples * turns * (chat.max_new_tokens + 50)


def smaller(chat: Chat, todo: list[list], samples: int, turns: int) -> list[list]:
    """What is left to do, in batches of half the size: the first one did not fit the memory. If
    that is a single item, its error goes on."""
    if len(todo[0]) == 1:
        raise  # the error that the caller is handling
    chat.cache_tokens = len(todo[0]) * cached(chat, todo[0][0], samples, turns) // 2
    return batches(chat, sum(todo, []), samples, turns)


def draw_failures(failures: Tries, step: int, size: int, seed: int, leave_out=()) -> Tries:
    """The failures of a step. Each comes once an epoch, in a new random order, and at most once a
    step (which may then be smaller). leave_out: the ids of problems that are not to be drawn.
    Raises ValueError where none is left."""
    left = [c for c in failures if c.problem.id not in leave_out]
    if not left:
        raise ValueError("there is no failure to train on")
    epoch, start = divmod(step * size, len(left))
    order: Tries = []
    while len(order) < start + size:
        order += random.Random(f"{seed} {epoch}").sample(left, len(left))
        epoch += 1
    return list({(c.problem.id, c.sample): c for c in order[start : start + size]}.values())


# -- What a step reports ---------------------------------------------------------------------------
def token_sums(loss, new, old, ref, A, mask, clip) -> dict[str, float]:
    """Sums over one failure's trained tokens, for the metrics of the step."""
    clipped = ((new - old).exp() - 1) * A[:, None].sign() > clip  # the clip stops the gradient
    sums = {"loss": loss, "tokens": mask.sum(), "nll": -new.sum()}
    sums |= {"clipped": clipped.sum(), "mismatch": (new - old).abs().max()}
    sums |= {} if ref is None else {"kl": k3(torch.where(mask, ref - new, 0.0)).sum()}
    values = torch.stack([value.float() for value in sums.values()]).tolist()  # waits once
    return dict(zip(sums, values, strict=True))


def describe(tries: Tries, rewards: Tensor, parts: list[dict]) -> dict[str, float]:
    """The metrics of a step. nll (on average, the entropy), clipped and, with a reference, kl are
    means over trained tokens; mismatch is the largest change of a token's log-probability since it
    was drawn; sampled counts the tokens of reflections and retries."""
    tokens = max(1, sum(part["tokens"] for part in parts))
    means = [n for n in ("nll", "clipped", "kl") if any(n in part for part in parts)]
    lengths = [len(t.reflection) for t in tries]
    return {
        "reward": rewards.mean().item(),
        "mixed_groups": (rewards != rewards[:, :1]).any(dim=1).float().mean().item(),
        "length": sum(lengths) / len(tries),
        "cut": sum(t.cut for t in tries) / len(tries),
        "sampled": sum(lengths) + sum(len(t.retry) for t in tries),
        "loss": sum(part["loss"] for part in parts),
        "mismatch": max((part["mismatch"] for part in parts), default=0.0),
        **{n: sum(part[n] for part in parts) / tokens for n in means},
    }


def to_json(c: Conversation, tokenizer: Tokenizer) -> dict:
    """A conversation as JSON: in words for its readers, and its turns as token ids. The context is
    what was read before the reflection, if there is one, else before the attempt."""
    ids = {"attempt": c.attempt, "reflection": c.reflection, "retry": c.retry}
    words = {
        name: tokenizer.tokenizer.decode(turn, skip_special_tokens=False)
        for name, turn in {"context": c.context or c.prompt, **ids}.items()
        if turn
    }
    verdicts = {"first": asdict(c.first), "second": c.second and asdict(c.second)}
    return {"problem": asdict(c.problem), "sample": c.sample, **words, **verdicts, "ids": ids}


def append_jsonl(path: Path, *records: dict) -> None:
    """Add lines to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


# -- The optimizer ---------------------------------------------------------------------------------
def lr_share(step: int, steps: int, warmup: float) -> float:
    """The share of the full learning rate at a step: a linear rise, then a cosine towards 0."""
    rise = math.ceil(steps * warmup)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


class MasterAdamW(torch.optim.AdamW):
    """AdamW on float32 masters of the weights, kept in main memory with `offload`. bfloat16 has 8
    significant bits: at a learning rate of 5e-7, rounding undoes nearly every update. So updates
    and gradients are summed in float32 copies, the masters, and each step ends by rounding these
    into the weights. A weight that is float32 is its own master."""

    def __init__(self, model: Model, lr: float, offload: bool = False):
        self.weights = list(model.parameters())
        self.masters = self.weights
        if offload or model.lm_head.weight.dtype != torch.float32:
            device = "cpu" if offload else model.device
            self.masters = [w.detach().to(device, torch.float32, copy=True) for w in self.weights]
        super().__init__(self.masters, lr=lr, weight_decay=0.0, fused=True)

    def collect(self) -> None:
        """After a backward pass: add the weights' gradients to their masters'."""
        if self.masters is self.weights:
            return
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight.grad is not None:
                gradient, weight.grad = weight.grad.to(master), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    def update(self, lr: float, max_grad_norm: float) -> float:
        """One step with the gradient, cut to max_grad_norm. Returns its norm before that. Raises
        ValueError, and changes nothing, where it is not finite. Without any gradient: no step."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm).item()
        if not math.isfinite(norm):
            raise ValueError("the gradient is not finite: take a lower --lr")
        self.param_groups[0]["lr"] = lr
        self.step()
        self.round()
        self.zero_grad(set_to_none=True)
        return norm

    def round(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.data.copy_(master.data)


# -- The checkpoint --------------------------------------------------------------------------------
LOGS = ("metrics.jsonl", "samples.jsonl", "timings.jsonl")  # cut back when a run is resumed


def save_checkpoint(folder: Path, step: int, optimizer: MasterAdamW, state: dict) -> None:
    """What training needs to go on after `step` steps, in one file that is replaced at once:
    float32 weights, AdamW's moments, how long the run's logs are, and a small JSON `state`. There
    is no random state: each draw is keyed by its step."""
    tensors = {}
    for i, master in enumerate(optimizer.masters):
        kept = {"weight": master.detach(), **optimizer.state.get(master, {})}
        tensors |= {f"{i}.{name}": tensor.cpu() for name, tensor in kept.items()}
    logs = [folder / name for name in LOGS if (folder / name).exists()]
    lengths = {log.name: log.stat().st_size for log in logs}
    record = json.dumps({"step": step, "logs": lengths, "state": state})
    replace_file(folder / "checkpoint.safetensors", tensors, {"run": record})


def load_checkpoint(folder: Path, optimizer: MasterAdamW) -> tuple[int, dict]:
    """Go back to the run's checkpoint: weights, moments, and the length of its logs. Returns the
    steps done, 0 where there is no checkpoint, and the `state` that was saved. Raises ValueError
    for a checkpoint that is damaged, or of another model."""
    path, step, lengths, state = folder / "checkpoint.safetensors", 0, {}, {}
    if path.exists():
        try:
            with safetensors.safe_open(path, "pt") as file:
                run = json.loads(file.metadata()["run"])
                step, lengths, state = run["step"], run["logs"], run["state"]
                names = {name.partition(".")[2] for name in file.keys()}  # noqa: SIM118
                if len(list(file.keys())) != len(names) * len(optimizer.masters):
                    raise ValueError("other tensors")
                for i, master in enumerate(optimizer.masters):
                    kept = {name: file.get_tensor(f"{i}.{name}") for name in names}
                    master.data.copy_(kept.pop("weight").view_as(master))
                    optimizer.state[master] = {n: x.to(master.device) for n, x in kept.items()}
        except (safetensors.SafetensorError, RuntimeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged, or of another model: {error}") from None
        optimizer.round()
    for log in (folder / name for name in LOGS):
        if log.exists():
            os.truncate(log, min(lengths.get(log.name, 0), log.stat().st_size))
    return step, state
