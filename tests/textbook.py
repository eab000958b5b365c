"""The step of training by the textbook: float64, one row per reflection, the formula spelled out.

Nothing in the textbook is packed, padded, masked or shared, and it calls nothing of grpo.py. Tests
compare `grpo.train` and its parts with it. Below it: how tests give `train` their conversations.
"""

import copy
import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

import grpo
from tasks import CountdownProblem, Verdict


@dataclass
class Row:
    """One reflection: what was read before it, its tokens, and what the loss needs for each."""

    context: list[int]
    reflection: list[int]
    old: list[float]  # log-probabilities when the tokens were drawn
    ref: list[float] | None  # those of the reference model; None where beta is 0
    advantage: float


def advantages(rewards: list[float], scale: bool = True, epsilon: float = 1e-4) -> list[float]:
    """Of one group of rewards."""
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    return [(r - mean) / ((deviation + epsilon) if scale else 1.0) for r in rewards]


def predicted(model, context: list[int], tokens: list[int], temperature: float = 1.0) -> Tensor:
    """The distributions that each token is drawn from, by the plain forward pass: (tokens, V)
    log-probabilities."""
    logits = model(torch.tensor([context + tokens]))[0]  # (T, V)
    return (logits / temperature).log_softmax(dim=-1)[len(context) - 1 : -1]


def logprobs(model, context: list[int], tokens: list[int], temperature: float = 1.0) -> Tensor:
    """The log-probabilities of tokens after a context, (tokens,)."""
    log_p = predicted(model, context, tokens, temperature)
    return torch.stack([log_p[t, token] for t, token in enumerate(tokens)])


def textbook_loss(rows: list[Row], now: list[Tensor], c, max_new_tokens: int) -> Tensor:
    """The loss of a step, a scalar.

    rows: all reflections of the step; now: their tokens' log-probabilities under the policy, (its
    tokens,) each; c: has `loss`, `clip` and `beta`.
    """
    tokens = sum(len(row.reflection) for row in rows)
    loss = torch.zeros((), dtype=torch.float64)
    for row, values in zip(rows, now, strict=True):
        A, length = row.advantage, len(row.reflection)
        weigh = {"dapo": tokens, "grpo": len(rows) * length, "dr_grpo": len(rows) * max_new_tokens}
        for t in range(length):
            ratio = torch.exp(values[t] - row.old[t])
            bound = {"max": 1 + c.clip} if A >= 0 else {"min": 1 - c.clip}
            objective = A * torch.clamp(ratio, **bound)
            if c.beta:
                d = row.ref[t] - values[t]
                objective = objective - c.beta * (torch.exp(d) - d - 1)
            loss = loss - objective / weigh[c.loss_type]
    return loss


def textbook(
    model, rows: list[Row], c, max_new_tokens: int, temperature: float = 1.0
) -> tuple[float, Tensor]:
    """The loss of a step and its gradient as one vector. The model is left as it is."""
    model = copy.deepcopy(model).double()
    now = [logprobs(model, row.context, row.reflection, temperature) for row in rows]
    model.zero_grad(set_to_none=True)
    loss = textbook_loss(rows, now, c, max_new_tokens)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def clipped(rows: list[Row], now: list[Tensor], clip: float) -> float:
    """The share of tokens whose gradient the clip stops."""
    stopped = []
    for row, values in zip(rows, now, strict=True):
        for value, old in zip(values.tolist(), row.old, strict=True):
            ratio = math.exp(value - old)
            up, down = row.advantage > 0, row.advantage < 0
            stopped.append(up and ratio > 1 + clip or down and ratio < 1 - clip)
    return sum(stopped) / len(stopped)


# -- Steps of `train` on conversations that are prepared, not sampled ------------------------------


def conversation(number: int, row: Row, correct: bool, cut: bool = False) -> grpo.Conversation:
    """A failure with its reflection, and a retry that is right or wrong."""
    problem, wrong = CountdownProblem(number, (1, 2, 3), 7), Verdict(False, "wrong_value")
    c = grpo.Conversation(
        problem, 0, row.context, [], wrong, reflection_prompt=row.context, truncated=cut
    )
    c.reflection, c.reflection_logprobs = row.reflection, row.old
    c.retry, c.retry_verdict = [5, 0], Verdict(correct, "correct" if correct else "wrong_value")
    return c


def prepare(monkeypatch, steps: list[list[grpo.Conversation]]) -> list[Tensor]:
    """From now on step s of `train` has the conversations steps[s]. Returns a list, to which each
    step adds its gradient as it is before it is clipped."""
    gradients: list[Tensor] = []
    update = grpo.MasterAdamW.update

    def recorded(optimizer, lr: float, max_grad_norm: float) -> float:
        each = [torch.zeros_like(m) if m.grad is None else m.grad for m in optimizer.masters]
        gradients.append(torch.cat([gradient.flatten() for gradient in each]))
        return update(optimizer, lr, max_grad_norm)

    def rollout(agent, drawn, samples, rng_key):
        purpose, step = rng_key
        assert purpose == grpo.TRAIN
        assert len(drawn) * samples == len(steps[step])
        return steps[step]

    monkeypatch.setattr(grpo, "rollout", rollout)
    monkeypatch.setattr(grpo.MasterAdamW, "update", recorded)
    return gradients
