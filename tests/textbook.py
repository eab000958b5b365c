"""The training step by the textbook: float64, one row per reflection, the formula spelled out.

Nothing in the textbook is packed, padded, masked or shared, and it calls nothing in grpo.py. Tests
compare `grpo.train` and its parts with it. At the end of the file: how tests give prepared
conversations to `train`.
"""

import copy
import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

import grpo
from grpo import Conversation, Turn
from tasks import CountdownProblem, Verdict


@dataclass
class Row:
    """One reflection: its context, its tokens, and what the loss needs for each token."""

    context: list[int]
    reflection: list[int]
    old: list[float]  # log-probabilities at sampling time
    ref: list[float] | None  # log-probabilities under the reference model; None if beta is 0
    advantage: float


def advantages(rewards: list[float], scale: bool = True, delta: float = 1e-4) -> list[float]:
    """The advantages of one group of rewards."""
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    return [(r - mean) / ((deviation + delta) if scale else 1.0) for r in rewards]


def log_distributions(
    model, context: list[int], tokens: list[int], temperature: float = 1.0
) -> Tensor:
    """The distributions from which each token is drawn, by the plain forward pass: (tokens, V)
    log-probabilities."""
    logits = model(torch.tensor([context + tokens]))[0]  # (T, V)
    return (logits / temperature).log_softmax(dim=-1)[len(context) - 1 : -1]


def logprobs(model, context: list[int], tokens: list[int], temperature: float = 1.0) -> Tensor:
    """The log-probabilities of tokens after a context, (tokens,)."""
    log_p = log_distributions(model, context, tokens, temperature)
    return torch.stack([log_p[t, token] for t, token in enumerate(tokens)])


def textbook_loss(rows: list[Row], now: list[Tensor], config, max_new_tokens: int) -> Tensor:
    """The loss of a step, a scalar.

    rows: all reflections of the step; now: the log-probabilities of each one's tokens under the
    policy, (its tokens,); config: has `loss_type`, `clip` and `beta`.
    """
    tokens = sum(len(row.reflection) for row in rows)
    loss = torch.zeros((), dtype=torch.float64)
    for row, values in zip(rows, now, strict=True):
        A, length = row.advantage, len(row.reflection)
        divisor = {
            "dapo": tokens, "grpo": len(rows) * length, "dr_grpo": len(rows) * max_new_tokens
        }[config.loss_type]  # fmt: skip
        for t in range(length):
            ratio = torch.exp(values[t] - row.old[t])
            bound = {"max": 1 + config.clip} if A >= 0 else {"min": 1 - config.clip}
            objective = A * torch.clamp(ratio, **bound)
            if config.beta:
                d = row.ref[t] - values[t]
                objective = objective - config.beta * (torch.exp(d) - d - 1)
            loss = loss - objective / divisor
    return loss


def textbook(
    model, rows: list[Row], config, max_new_tokens: int, temperature: float = 1.0
) -> tuple[float, Tensor]:
    """The loss of a step and its gradient as one vector. The model is not changed."""
    model = copy.deepcopy(model).double()
    now = [logprobs(model, row.context, row.reflection, temperature) for row in rows]
    model.zero_grad(set_to_none=True)
    loss = textbook_loss(rows, now, config, max_new_tokens)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def clipped(rows: list[Row], now: list[Tensor], clip: float) -> float:
    """The fraction of tokens whose gradient the clip stops."""
    stopped = []
    for row, values in zip(rows, now, strict=True):
        for value, old in zip(values.tolist(), row.old, strict=True):
            ratio = math.exp(value - old)
            up, down = row.advantage > 0, row.advantage < 0
            stopped.append(up and ratio > 1 + clip or down and ratio < 1 - clip)
    return sum(stopped) / len(stopped)


# -- Steps of `train` on conversations that are prepared, not sampled ------------------------------


def conversation(
    problem_id: int, row: Row, correct: bool, index: int = 0, truncated: bool = False
) -> Conversation:
    """A failure with the reflection of a row, and a retry that is correct or wrong.

    Every sampled turn has log-probabilities, so that a variant of the method can train the retry.
    """
    wrong = Verdict(False, "wrong_value")
    return Conversation(
        problem=CountdownProblem(problem_id, (1, 2, 3), 7),
        attempt_index=0,
        attempt=Turn([], row.context, truncated=False),
        attempt_verdict=wrong,
        reflection_index=index,
        reflection=Turn(row.context, row.reflection, truncated, row.old),
        retry=Turn(row.context + row.reflection, [5, 0], truncated=False, logprobs=[-1.0, -1.0]),
        retry_verdict=Verdict(True, "correct") if correct else wrong,
    )


def prepare(monkeypatch, steps: list[list[list[Conversation]]]) -> list[Tensor]:
    """Let the steps of `train` have these groups instead of sampling them, in this order. Returns a
    list, to which each update adds its gradient as it is before it is clipped."""
    gradients: list[Tensor] = []
    update = grpo.MasterAdamW.update

    def recorded_update(optimizer, *arguments, **options) -> float:
        optimizer.move_gradients()
        each = [torch.zeros_like(m) if m.grad is None else m.grad for m in optimizer.masters]
        gradients.append(torch.cat([gradient.flatten() for gradient in each]))
        return update(optimizer, *arguments, **options)

    def prepared_rollout(agent, failures, group_size, rng_prefix, **options):
        purpose, step, *_ = rng_prefix
        assert purpose == grpo.TRAIN
        assert [len(group) for group in steps[step]] == [group_size] * len(failures)
        return steps[step]

    monkeypatch.setattr(grpo, "rollout", prepared_rollout)
    monkeypatch.setattr(grpo.MasterAdamW, "update", recorded_update)
    return gradients
