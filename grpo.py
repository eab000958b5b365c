"""GRPO on chosen tokens: rewards to advantages, advantages to a loss, a loss to a step.

R3 trains the tokens of reflections and no others. A failure is shown to the model G times, it
writes G reflections, each is followed by a retry, and the retry's verdict is the reflection's
reward r. Then

    A_g  = (r_g - mean r) / (std r + epsilon)                            group_advantages
    mask = 1 on the reflection's own tokens, 0 on everything else        trained_mask
    loss = - sum mask * (min(ratio A, clip(ratio) A) - beta KL) / sum mask       grpo_loss

where ratio = pi(token) / pi_old(token) and KL is against the model that training started with. The
retry comes after the last reflection token, so training need not read it: a row is a failure's
context and one reflection. (The cold start of the tiny model goes through the same code: with an
advantage of one and pi_old = pi, the gradient of this loss is that of the mean log-likelihood.)

This file knows token ids and rewards. What the tokens say is r3.py's business.
"""

import copy
import hashlib
import json
import math
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model import Model, padded, read_json, replace_file

# -- From rewards to a loss ------------------------------------------------------------------------


def group_advantages(rewards: Tensor, epsilon: float = 1e-4, scale: bool = True) -> Tensor:
    """(P, G) rewards -> (P, G) advantages: how far above the group's mean, in its deviations.

    One success among G = 4: the mean is 0.25, the (sample) standard deviation 0.5, so

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([[ 1.4997, -0.4999, -0.4999, -0.4999],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])

    A group of equal rewards has nothing to compare: its advantages are exactly zero. With
    scale=False the deviation is not divided by (Dr. GRPO): 0.75 and -0.25 in the example.
    """
    deviation = rewards - rewards.mean(dim=1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    if scale:
        deviation = deviation / (rewards.std(dim=1, keepdim=True) + epsilon)  # needs G >= 2
    return deviation.masked_fill(equal, 0.0)


def trained_mask(spans: list[list[tuple[int, int]]], width: int) -> Tensor:
    """Where the gradient flows: (N, width - 1) bool over each row's targets, its tokens 1, 2, ….

    spans: per row, the (start, end) of its trained tokens; for R3 that is one span, the reflection
    with its end-of-turn token where the model wrote one. Built from positions, never from token
    ids: a padding token's id may be a real token elsewhere.

    A context of 3 tokens and a reflection of 2, in a batch 6 tokens wide: tokens 3 and 4 are
    trained, and token t is target t - 1.

    >>> trained_mask([[(3, 5)]], width=6).int()
    tensor([[0, 0, 1, 1, 0]], dtype=torch.int32)
    """
    mask = torch.zeros(len(spans), width, dtype=torch.bool)
    for row, row_spans in enumerate(spans):
        for start, end in row_spans:
            mask[row, start:end] = True
    return mask[:, 1:]


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
    when beta = 0. `loss` says what a token's share is:

        dapo      the mean over all tokens of the step: every token weighs the same
        grpo      the mean over sequences of each sequence's mean: the original
        dr_grpo   the sum over a constant, N times the longest length allowed: no length bias

    normalizer: what the sum is divided by: tokens, sequences, or sequences times longest length.
    The caller gives the whole step's, so that splitting a step into micro-batches never changes
    its gradient; by default it is taken from `mask` (its width being the longest length).
    """
    A = advantages[:, None]  # (N, 1)
    # What is not trained is taken out first: its exponential might overflow, and 0 * inf is no 0.
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()  # (N, T)
    per_token = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    if beta:
        difference = torch.where(mask, ref_logprobs - logprobs, 0.0)
        per_token = per_token + beta * k3(difference)
    per_token = torch.where(mask, per_token, 0.0)
    if loss == "grpo":
        per_token = per_token / mask.sum(dim=1, keepdim=True).clamp(min=1)
    if normalizer is None:
        normalizer = {"dapo": mask.sum(), "grpo": len(mask), "dr_grpo": mask.numel()}[loss]
    return per_token.sum() / normalizer


def k3(difference: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi || pi_ref) per token, from log pi_ref - log pi.

    Never negative; its gradient, used as a loss, is that of the forward KL. (expm1(d) is exp(d) - 1
    without the rounding where d is small.)
    """
    return torch.expm1(difference) - difference


# -- One optimiser step ----------------------------------------------------------------------------


LOSSES = ("dapo", "grpo", "dr_grpo")


@dataclass
class Settings:
    """What one training run is made of. The defaults are the paper's where it states them."""

    steps: int = 1_750
    lr: float = 5e-7
    warmup: float = 0.03  # share of the steps in which the learning rate rises; then a cosine to 0
    clip: float = 0.2  # epsilon of the clipped ratio
    beta: float = 0.001  # weight of the KL term
    loss: str = "dapo"
    temperature: float = 1.0  # what sampling divided the logits by
    max_new_tokens: int = 512  # the longest reflection: the constant of "dr_grpo"
    max_grad_norm: float = 1.0
    micro_tokens: int = 8_192  # tokens in one forward and backward pass
    skip_equal: bool = False  # leave groups of equal rewards out with beta > 0 too
    save_every: int = 25  # steps between two checkpoints
    keep_checkpoints: int = 2  # the last ones


@dataclass
class Batch:
    """What one optimiser step learns from: N rows, with nothing after their last trained token.

    `group` rows at a time begin alike: they share a context, which is read once.
    """

    ids: list[list[int]]
    spans: list[list[tuple[int, int]]]  # (start, end) of a row's trained tokens
    advantages: Tensor  # (N,)
    old_logprobs: list[list[float]] | None = None  # of the trained tokens; None: as they are now
    ref_logprobs: list[list[float]] | None = None  # likewise; None: the reference model's
    rewards: Tensor | None = None  # (N,)
    metrics: dict[str, float] = field(default_factory=dict)
    group: int = 1

    def shared(self, first: int) -> int:
        """How many tokens the group from row `first` on has in common before any trained one."""
        rows = range(first, first + self.group)
        start = min(self.spans[row][0][0] for row in rows)
        return len(os.path.commonprefix([self.ids[row][:start] for row in rows]))


def reflection_batch(
    contexts: list[list[int]],
    reflections: list[list[int]],
    logprobs: list[list[float]],
    rewards: Tensor,
    scale: bool = True,
) -> Batch:
    """P failures with G reflections each as N = P * G rows; rewards: (P, G).

    Where more than the reflection is trained, a failure has G rows for each such turn, and all the
    rows of one conversation get its advantage.
    """
    turns = len(contexts) // rewards.numel()
    return Batch(
        ids=[c + r for c, r in zip(contexts, reflections, strict=True)],
        spans=[[(len(c), len(c) + len(r))] for c, r in zip(contexts, reflections, strict=True)],
        advantages=group_advantages(rewards, scale=scale).repeat(1, turns).flatten(),
        old_logprobs=logprobs,
        rewards=rewards.repeat(1, turns).flatten(),
        group=turns * rewards.shape[1],
        metrics={
            "reward": rewards.mean().item(),
            "mixed_groups": (rewards != rewards[:, :1]).any(dim=1).float().mean().item(),
            "length": sum(map(len, reflections)) / len(reflections),
        },
    )


def micro_batches(batch: Batch, micro_tokens: int, skip_equal: bool = False) -> Iterator[list[int]]:
    """Row numbers, whole groups of similar length up to `micro_tokens` tokens, shortest row first.

    Where all rewards of a group are equal its advantages are zero, and no policy gradient comes
    from it: skip_equal leaves such groups out (all but one, where all are such).
    """
    G, sizes = batch.group, {}
    for first in range(0, len(batch.ids), G):
        context = batch.shared(first)
        sizes[first] = context + sum(len(row) - context for row in batch.ids[first : first + G])
    if skip_equal:
        unequal = {first for first in sizes if batch.advantages[first : first + G].any()}
        sizes = {first: sizes[first] for first in unequal or list(sizes)[:1]}
    rows: list[int] = []
    for first in sorted(sizes, key=sizes.get):
        if rows and (len(rows) // G + 1) * sizes[first] > micro_tokens:
            yield sorted(rows, key=lambda row: len(batch.ids[row]))
            rows = []
        rows += range(first, first + G)
    yield sorted(rows, key=lambda row: len(batch.ids[row]))


def predictions(model: Model, batch: Batch, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The hidden states that some rows' trained tokens are predicted from, (tokens, E), these
    tokens, (tokens,), and where they stand: the mask, (n, T), whose order is theirs.

    A group's context is several times longer than its reflections, so it is read once:

        context, C tokens ┬ reflection_1      each sees the context and itself, its positions go on
                          ├ reflection_2      after the context's; the result is that of one row
                          ┴ reflection_G      per reflection, at a fraction of its arithmetic

    The context's last position predicts the first token of each; a reflection's positions but the
    last one predict the others. Rows come shortest first; those of about one length are read
    together.
    """
    c, G, spans = model.config, batch.group, [batch.spans[row] for row in rows]
    longest = max(len(batch.ids[row]) for row in rows)
    if G == 1 or c.rope_type == "longrope" and longest > c.original_max_position_embeddings:
        # (longrope reads a context otherwise where what follows is long)
        ids, live = padded([batch.ids[row] for row in rows], model.device)
        mask = trained_mask(spans, ids.shape[1]).to(ids.device)
        return model.hidden(ids, live=live)[:, :-1][mask], ids[:, 1:][mask], mask
    groups = sorted({row // G for row in rows})
    ends = [batch.shared(group * G) for group in groups]  # where contexts end
    contexts = [batch.ids[g * G][:end] for g, end in zip(groups, ends, strict=True)]
    contexts, live = padded(contexts, model.device)  # (P, C)
    hidden, cache = model.read(contexts, live)
    owner = [groups.index(row // G) for row in rows]  # each row's context
    last = hidden[torch.arange(len(groups)), live.sum(1) - 1]  # (P, E)
    last = last.index_select(0, torch.tensor(owner, device=last.device))  # (n, E)
    ends = [ends[own] for own in owner]
    tails = [batch.ids[row][end:] for row, end in zip(rows, ends, strict=True)]
    # Counted from the context's last token, which is token 0 here and predicts the first target.
    spans = [[(a - e + 1, b - e + 1) for a, b in row] for row, e in zip(spans, ends, strict=True)]
    mask = trained_mask(spans, 1 + max(map(len, tails))).to(model.device)  # (n, T)
    states, targets, start = [], [], 0
    while start < len(rows):
        limit = 1.25 * len(tails[start]) + 8
        end = next((i for i in range(start, len(rows)) if len(tails[i]) > limit), len(rows))
        ids, live = padded(tails[start:end], model.device)
        h = last[start:end, None]
        if ids.shape[1] > 1:
            inner = model.hidden(ids[:, :-1], cache.of(owner[start:end]), live[:, 1:])
            h = torch.cat([h, inner], dim=1)  # (rows, T, E)
        trained = mask[start:end, : ids.shape[1]]
        states, targets, start = [*states, h[trained]], [*targets, ids[trained]], end
    return torch.cat(states), torch.cat(targets), mask


LOGITS = 2**25  # that exist at once


def token_logprobs(
    model: Model, batch: Batch, rows: list[int], temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the trained targets, zero elsewhere, (n, T); their entropies, (tokens,);
    and the mask of trained targets, (n, T).

    The output head, the widest matrix, is applied only where a trained token is predicted, a part
    at a time; of several parts, the logits are computed anew in the backward pass.
    """
    hidden, targets, mask = predictions(model, batch, rows)

    def score(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.head(hidden)  # (tokens, V)
        log_p = F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
        entropy = -log_p.detach().exp().mul_(log_p.detach()).sum(dim=-1)
        return -F.nll_loss(log_p, targets, reduction="none"), entropy

    parts = [x.split(max(1, LOGITS // model.words)) for x in (hidden, targets)]
    again = len(parts[0]) > 1 and torch.is_grad_enabled()
    scored = [
        checkpoint(score, *part, use_reentrant=False) if again else score(*part)
        for part in zip(*parts, strict=True)
    ]
    chosen, entropy = (torch.cat(values) for values in zip(*scored, strict=True))
    return spread(chosen, mask), entropy, mask


@torch.no_grad()
def mean_nll(model: Model, batches: list[Batch]) -> float:
    """The mean of -log p over the trained tokens of some batches: nats a token."""
    scored = [token_logprobs(model, b, list(range(len(b.ids))), 1.0) for b in batches]
    total = sum(logprobs.sum().item() for logprobs, _, _ in scored)
    return -total / sum(mask.sum().item() for _, _, mask in scored)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """(tokens,) values to their places in (n, T), zero elsewhere."""
    return torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask, values)


def gradients(model: Model, reference: Model | None, batch: Batch, s: Settings) -> dict[str, float]:
    """Add the gradient of the whole step's loss to the parameters, a micro-batch at a time.

    Returns the metrics: `loss`; the number of trained `tokens`; the means over them (without those
    of groups left out) of nll, entropy, `clipped` and, with a reference, kl; and `mismatch`, the
    largest difference between a log-probability as recorded when its token was drawn and as it is
    computed here.
    """
    tokens = sum(end - start for spans in batch.spans for start, end in spans)
    N = len(batch.ids)
    normalizer = {"dapo": tokens, "grpo": N, "dr_grpo": N * s.max_new_tokens}[s.loss]
    total, mismatch = dict.fromkeys(("seen", "loss", "nll", "entropy", "clipped", "kl"), 0.0), 0.0
    process, processes = rank()  # each takes its share of the micro-batches
    micro = list(micro_batches(batch, s.micro_tokens, s.skip_equal or not s.beta))
    for rows in micro[process::processes]:
        ref = None
        if s.beta and batch.ref_logprobs is None:
            with torch.no_grad():  # first: the other pass keeps what its gradient needs
                ref, _, _ = token_logprobs(reference, batch, rows, s.temperature)
        logprobs, entropy, mask = token_logprobs(model, batch, rows, s.temperature)
        A, now = batch.advantages[rows].to(model.device), logprobs.detach()

        def recorded(values: list[list[float]], rows=rows, mask=mask, now=now) -> Tensor:
            flat = [value for row in rows for value in values[row]]
            return spread(torch.tensor(flat, dtype=now.dtype, device=now.device), mask)

        old = now if batch.old_logprobs is None else recorded(batch.old_logprobs)
        ref = recorded(batch.ref_logprobs) if batch.ref_logprobs is not None else ref
        loss = grpo_loss(logprobs, old, ref, A, mask, s.clip, s.beta, s.loss, normalizer)
        loss.backward()

        beyond = ((now - old).exp() - 1) * A[:, None].sign() > s.clip  # where the clip bites
        total["seen"] += len(entropy)
        total["loss"] += loss.item()
        total["nll"] -= now.sum().item()
        if ref is not None:
            total["kl"] += k3(ref - now).sum().item()
        total["entropy"] += entropy.sum().item()
        total["clipped"] += beyond.sum().item()
        mismatch = max(mismatch, (now - old).abs().max().item())
    sums = all_reduce(torch.tensor(list(total.values()), dtype=torch.float64)).tolist()
    total = dict(zip(total, sums, strict=True))
    mismatch = all_reduce(torch.tensor(mismatch), dist.ReduceOp.MAX).item()
    loss, seen = total.pop("loss"), total.pop("seen")
    if not s.beta and batch.ref_logprobs is None:
        del total["kl"]
    means = {name: value / seen for name, value in total.items()}
    return {"loss": loss, **means, "mismatch": mismatch, "tokens": tokens}


def train(
    model: Model,
    batches: Callable[[int], Batch],
    s: Settings,
    optimizers: list[torch.optim.Optimizer],
    reference: Model | None = None,
    start: int = 0,
    folder: Path | None = None,
    files: tuple[Path, ...] = (),
) -> Iterator[tuple[int, dict[str, float]]]:
    """The loop. `batches(step)` samples what a step learns from; yields (step, metrics) after each.

    Every step samples from the model as the step before left it (on-policy, one update a batch).
    The caller logs and evaluates between the steps, in its own for loop; then, with a `folder`,
    the step is saved there (every s.save_every steps), and how long the caller's `files` are.
    A step whose loss or gradient is not finite is skipped (`skipped` is 1). Raises ValueError
    after five in a row, and Stopped where STOP was set.
    """
    parameters = [p for optimizer in optimizers for p in moved_by(optimizer)]
    in_a_row = 0
    for step in range(start, s.steps):
        batch = batches(step)
        metrics = gradients(model, reference, batch, s)
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # it had no micro-batch
            all_reduce(p.grad)
        norm = torch.nn.utils.clip_grad_norm_(parameters, s.max_grad_norm).item()
        finite = math.isfinite(norm) and math.isfinite(metrics["loss"])
        in_a_row = 0 if finite else in_a_row + 1
        if in_a_row == 5:
            raise ValueError(f"step {step + 1}: no finite loss or gradient in 5 steps in a row")
        share = lr_share(step, s.steps, s.warmup)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * share
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        metrics |= {"grad_norm": norm, "lr": s.lr * share, "skipped": int(not finite)}
        yield step, {**batch.metrics, **metrics}
        last, stop = step + 1 == s.steps, stopping()
        if folder and (last or stop or (step + 1) % s.save_every == 0):
            save_checkpoint(folder, step + 1, optimizers, files, s.keep_checkpoints)
        if stop:
            stopping()  # all wait until it is saved
            raise Stopped


def moved_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The weights that an optimiser moves, in the order of its states' numbers."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def lr_share(step: int, steps: int, warmup: float) -> float:
    """The share of the full learning rate at a step: a linear rise, then a cosine towards 0."""
    rise = math.ceil(steps * warmup)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def adamw(model: Model, lr: float, offload: bool = False) -> list[torch.optim.Optimizer]:
    """What R3 trains with: AdamW on float32 weights, or on float32 copies of them."""
    if offload or next(model.parameters()).dtype != torch.float32:
        return [Masters(model, lr, offload)]
    return [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)]


class Masters(torch.optim.AdamW):
    """AdamW on float32 masters of the weights, kept in main memory with `offload`.

    A bfloat16 has 8 significant bits: at a learning rate of 5e-7 nearly every update of a weight
    rounds away. So updates add up in a float32 copy, from which the weight is rounded anew after
    each step. Gradients, too, add up over the micro-batches in float32: each goes to its master as
    soon as a backward pass has it, and the model itself never holds any.
    """

    def __init__(self, model: Model, lr: float, offload: bool):
        self.weights = list(model.parameters())
        device = "cpu" if offload else model.device
        masters = [p.detach().to(device, torch.float32, copy=True) for p in self.weights]
        super().__init__(masters, lr=lr, weight_decay=0.0, fused=True)
        for weight, master in zip(self.weights, masters, strict=True):
            weight.register_post_accumulate_grad_hook(partial(self.collect, weakref.ref(master)))

    @staticmethod
    def collect(to: weakref.ref, weight: Tensor) -> None:
        master = to()  # the model outlives its masters
        gradient, weight.grad = weight.grad.to(master), None
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    def step(self) -> None:
        super().step()
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        for weight, master in zip(self.weights, self.param_groups[0]["params"], strict=True):
            weight.copy_(master)


# -- Several processes: torchrun starts one a GPU --------------------------------------------------

STOP = threading.Event()  # set by a signal: finish the step, save it, and leave


class Stopped(Exception):
    """The run was asked to stop, and has saved what it did."""


def rank() -> tuple[int, int]:
    """The number of this process, and of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce(values: Tensor, how=dist.ReduceOp.SUM) -> Tensor:
    """Sum over all processes, in place; every one gets the same bits."""
    if rank()[1] > 1:
        dist.all_reduce(values, how)
    return values


def stopping() -> bool:
    """Whether any process was asked to stop: all of them agree."""
    return bool(all_reduce(torch.tensor(float(STOP.is_set()))))


# -- Is it right? The same step by the textbook, in float64 ----------------------------------------


def check(model: Model, batch: Batch, s: Settings, seed: int = 0) -> dict[str, float]:
    """Compare one micro-batch's loss and gradients with `textbook`, as relative differences.

    On-policy, every ratio is 1 and clipping sleeps, so noise first moves the old and the reference
    log-probabilities until a good part of the tokens is clipped. And advantages that add up to zero
    give a loss of about zero, to which nothing can be relative, so the positive ones are made
    larger. Raises ValueError where no micro-batch has both signs of A.
    """
    rng = torch.Generator().manual_seed(seed)
    for rows in map(sorted, micro_batches(batch, s.micro_tokens)):  # group by group
        A = batch.advantages[rows]
        if A.min() < 0 < A.max():
            break
    else:
        raise ValueError("nothing to check: no group has both right and wrong retries")
    old = [batch.old_logprobs[row] for row in rows]

    def moved() -> list[list[float]]:
        noise = [0.4 * torch.randn(len(values), generator=rng) for values in old]
        return [(torch.tensor(v) + n).tolist() for v, n in zip(old, noise, strict=True)]

    ids, spans = [batch.ids[row] for row in rows], [batch.spans[row] for row in rows]
    small = Batch(ids, spans, A + 0.9 * A.abs(), moved(), moved(), group=batch.group)
    model.zero_grad(set_to_none=True)
    metrics = gradients(model, None, small, s)
    ours = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    loss, exact = textbook(model, small, s)
    return {
        "loss_error": abs(metrics["loss"] - loss) / abs(loss),
        "gradient_error": ((ours - exact).norm() / exact.norm()).item(),
        "clipped": metrics["clipped"],
        "rows": len(rows),
        "tokens": metrics["tokens"],
    }


def textbook(model: Model, batch: Batch, s: Settings) -> tuple[float, Tensor]:
    """A batch's loss and its gradient as one vector: float64, one row at a time, no padding."""
    model = copy.deepcopy(model).double()
    tokens = sum(end - start for spans in batch.spans for start, end in spans)
    N, loss = len(batch.ids), torch.zeros((), dtype=torch.float64, device=model.device)
    for row, ids in enumerate(batch.ids):
        ids = torch.tensor(ids, device=model.device)
        log_p = (model(ids[None])[0] / s.temperature).log_softmax(dim=-1)  # (T, V)
        A, length = batch.advantages[row].item(), len(batch.old_logprobs[row])
        positions = [t for start, end in batch.spans[row] for t in range(start, end)]
        share = {"dapo": tokens, "grpo": N * length, "dr_grpo": N * s.max_new_tokens}[s.loss]
        for i, t in enumerate(positions):
            now = log_p[t - 1, ids[t]]
            ratio = torch.exp(now - batch.old_logprobs[row][i])
            bound = {"max": 1 + s.clip} if A >= 0 else {"min": 1 - s.clip}
            surrogate = A * torch.clamp(ratio, **bound)
            towards_reference = batch.ref_logprobs[row][i] - now
            kl = torch.exp(towards_reference) - towards_reference - 1
            loss = loss - (surrogate - s.beta * kl) / share
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


# -- Checkpoints -----------------------------------------------------------------------------------


PART = 2**28  # bytes in one file, about: writing a file takes a copy of it in memory


def save_checkpoint(
    folder: Path,
    step: int,
    optimizers: list[torch.optim.Optimizer],
    files: tuple[Path, ...] = (),
    keep: int = 2,
) -> None:
    """What training needs to go on after `step` steps, in folder/step-N/: complete or absent.

    The optimisers' weights (float32 masters, where there are any) and states, how long `files`
    are, and SHA-256 sums of it all. There is no random state: each draw is keyed by its step.
    """
    if rank()[0] > 0:
        return
    tensors, groups = {}, []
    for number, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        groups.append(state["param_groups"])
        for i, weight in enumerate(moved_by(optimizer)):
            for name, value in {"weight": weight, **state["state"].get(i, {})}.items():
                tensors[f"{number}.{i}.{name}"] = value.detach()
    lengths = {}
    for file in files:
        with open(file, "rb") as written:
            os.fsync(written.fileno())
        lengths[file.name] = file.stat().st_size
    final, temporary = folder / f"step-{step}", folder / f"step-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    part, size = {}, 0
    for number, (key, tensor) in enumerate(tensors.items(), 1):
        part[key], size = tensor.cpu().contiguous(), size + tensor.nbytes
        if size > PART or number == len(tensors):
            replace_file(temporary / f"state-{number}.safetensors", part)
            part, size = {}, 0
    state = {"step": step, "param_groups": groups, "files": lengths}
    replace_file(temporary / "state.json", json.dumps(state))
    replace_file(temporary / "SHA256SUMS", sha256_sums(temporary))
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, in the order of their steps."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def load_checkpoint(
    folder: Path, optimizers: list[torch.optim.Optimizer], files: tuple[Path, ...] = ()
) -> int:
    """Go back to the last checkpoint in a folder; returns the steps done, 0 where there is none.

    Weights and optimiser states are those of that step, and `files` are cut to what they were.
    Raises ValueError for a checkpoint that is damaged, or of another model.
    """
    path = next(reversed(checkpoints(folder)), None)
    lengths, step = {}, 0
    if path:
        sums = path / "SHA256SUMS"
        if not sums.is_file() or sums.read_bytes() != sha256_sums(path).encode():
            raise ValueError(f"{path} is damaged; delete it to go on from the one before it")
        files_of = [safetensors.torch.load_file(file) for file in path.glob("*.safetensors")]
        tensors = {key: tensor for part in files_of for key, tensor in part.items()}
        saved = read_json(path / "state.json")
        step, lengths = saved["step"], saved["files"]
        if len(saved["param_groups"]) != len(optimizers):
            raise ValueError(f"{path} is of another training")
        for number, optimizer in enumerate(optimizers):
            weights = moved_by(optimizer)
            states: dict[int, dict] = {i: {} for i in range(len(weights))}
            for key in [key for key in tensors if key.startswith(f"{number}.")]:
                _, i, name = key.split(".")
                states.setdefault(int(i), {})[name] = tensors[key]
            shapes = [getattr(states[i].get("weight"), "shape", None) for i in range(len(weights))]
            if len(states) > len(weights) or shapes != [p.shape for p in weights]:
                raise ValueError(f"{path} is of another model")
            for i, weight in enumerate(weights):
                weight.data.copy_(states[i].pop("weight"))
            states = {i: state for i, state in states.items() if state}
            groups = saved["param_groups"][number]
            optimizer.load_state_dict({"state": states, "param_groups": groups})
            if isinstance(optimizer, Masters):
                optimizer.round()
    for file in files:
        length = lengths.get(file.name, 0)
        if length > (file.stat().st_size if file.exists() else 0):
            raise ValueError(f"{file} is shorter than when {path} was saved: delete {path}")
        if file.exists() and rank()[0] == 0:
            os.truncate(file, length)
    return step


def sha256_sums(folder: Path) -> str:
    """The sums of a checkpoint's files, as `sha256sum -c SHA256SUMS` reads them."""
    files = sorted(file for file in folder.iterdir() if file.name != "SHA256SUMS")
    return "".join(f"{sha256(file)}  {file.name}\n" for file in files)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- Muon, for the cold start of the tiny model ----------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised: all directions of a matrix move by the same amount.

    (Jordan et al., 2024, kellerjordan.github.io/posts/muon.) torch.optim.Muon does the same in
    bfloat16, which a CPU without bfloat16 arithmetic emulates, many times slower. Matrices of one
    shape are orthogonalised together.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            updates: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])  # Nesterov's look ahead
                updates.setdefault(p.shape, []).append((p, update))
            for (rows, columns), pairs in updates.items():
                directions = orthogonalize(torch.stack([update for _, update in pairs]))
                scale = max(1.0, rows / columns) ** 0.5
                for (p, _), direction in zip(pairs, directions, strict=True):
                    p.add_(direction, alpha=-group["lr"] * scale)


def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """(n, rows, columns) -> the nearest orthogonal matrices, roughly: singular values of about 1.

    Newton-Schulz: an odd polynomial of x leaves its singular vectors alone and moves every singular
    value, applied five times from anywhere in (0, 1] to between about 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def muon(model: Model, lr: float, rest_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between embedding and head, AdamW for everything else."""
    hidden = [p for p in model.model.layers.parameters() if p.dim() == 2]
    chosen = set(map(id, hidden))
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(hidden, lr), torch.optim.AdamW(rest, lr=rest_lr, weight_decay=0.0)]
