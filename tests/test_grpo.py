"""The method: advantages, mask, loss and gradient against the textbook; the optimizer; checkpoints;
the rollout. (Invariants 2, 3, 4 and 6.)"""

import copy
import doctest
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import textbook
import torch
from textbook import Row, conversation, prepare
from torch import Tensor

import grpo
import model as models
from grpo import Agent, Config, MasterAdamW, group_advantages, grpo_loss, token_logprobs
from tasks import Verdict

LONGEST = 24  # the longest turn of prepared conversations
LOSSES = ("dapo", "grpo", "dr_grpo")


def apart(one: Tensor, other: Tensor) -> float:
    """The relative difference of two tensors."""
    return ((one - other).norm() / other.norm()).item()


def weights(model) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def exact(tiny):
    """The tiny model in float64, so that rounding hides nothing."""
    model = tiny[0].double()
    model.inv_freq = model.inv_freq.double()
    return model


def moved(model, seed: int = 0):
    """A copy with other weights: a reference model."""
    other, rng = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1 + 0.3 * torch.randn(p.shape, generator=rng))
    return other.requires_grad_(False)


@torch.no_grad()
def draw_groups(
    model, sizes, G: int, seed: int = 0, temperature: float = 1.0, reference=None, noise: float = 1
) -> list[list[Row]]:
    """A group for each (tokens of the context, tokens of its longest reflection).

    Its shortest reflection is a single token. The old log-probabilities are the policy's with so
    much noise that about half of the tokens are clipped.
    """
    rng, groups = torch.Generator().manual_seed(seed), []
    for size, longest in sizes:
        [context] = torch.randint(1, model.vocab_size, (1, size), generator=rng).tolist()
        group = []
        for g in range(G):
            length = 1 + (longest - 1) * g // (G - 1)
            reflection = torch.randint(model.vocab_size, (length,), generator=rng).tolist()
            now = textbook.logprobs(model, context, reflection, temperature).float()
            old = now + noise * torch.randn(length, generator=rng)
            ref = None
            if reference is not None:
                ref = textbook.logprobs(reference, context, reflection, temperature).tolist()
            group.append(Row(context, reflection, old.tolist(), ref, 0.0))
        groups.append(group)
    return groups


def converse(groups: list[list[Row]], rewards: list[list[float]], scale: bool = True):
    """Conversations with these rewards; the rows get the textbook's advantages."""
    conversations = []
    for number, (group, values) in enumerate(zip(groups, rewards, strict=True)):
        for row, A, r in zip(group, textbook.advantages(values, scale), values, strict=True):
            row.advantage = A
            conversations.append(conversation(number, row, correct=r == 1))
    return conversations


def mixed(P: int, G: int, seed: int = 0) -> list[list[float]]:
    """Rewards of P groups, in each of which some are right and some are wrong."""
    rewards = torch.randint(0, 2, (P, G), generator=torch.Generator().manual_seed(seed)).float()
    rewards[:, 0], rewards[:, -1] = 1, 0
    return rewards.tolist()


def rows_of(groups: list[list[Row]]) -> list[Row]:
    return [row for group in groups for row in group]


# -- Advantages and loss ---------------------------------------------------------------------------


def test_worked_examples_in_docstrings():
    found = doctest.testmod(grpo, extraglobs={"torch": torch})
    assert found.attempted >= 1 and found.failed == 0


def test_advantages_are_the_formula_and_exactly_zero_in_equal_groups():
    rewards = torch.tensor(
        [[1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]]
    ).float()
    A = group_advantages(rewards)
    assert A[0, 0].item() == pytest.approx((1 - 1 / 8) / (math.sqrt(1 / 8) + 1e-4), rel=1e-6)
    assert (A[1:] == 0).all()
    assert group_advantages(rewards, scale=False)[0, 0].item() == 0.875
    for size, reward in ((3, 0.9), (6, 0.3), (7, 0.1)):  # whose mean is not quite the reward
        equal = torch.full((1, size), reward)
        assert equal.mean() != reward and (group_advantages(equal) == 0).all()


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("epsilon", [1e-4, 0.1])
def test_advantages_are_the_textbooks_group_by_group(scale, epsilon):
    for G in range(2, 9):
        rewards = mixed(5, G, seed=G)
        found = group_advantages(torch.tensor(rewards), epsilon, scale)
        for A, group in zip(found.tolist(), rewards, strict=True):
            assert pytest.approx(A, rel=1e-5) == textbook.advantages(group, scale, epsilon)


LENGTHS = (3, 1, 7, 5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("beta, clip", [(0.0, 0.2), (0.3, 0.2), (0.3, 0.1)])
def test_the_loss_equals_the_textbook_in_float64(loss, beta, clip):
    """Value and gradient; the normalizer is taken from the mask, or given."""
    rng = torch.Generator().manual_seed(0)
    new, old, ref = torch.randn(3, 4, 8, generator=rng, dtype=torch.float64)
    A = torch.randn(4, generator=rng, dtype=torch.float64)
    mask = torch.zeros(4, 8, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        mask[row, row % 2 : row % 2 + length] = True
    rows, free = [], new.clone().requires_grad_()
    for row, length in enumerate(LENGTHS):
        values = (x[row][mask[row]].tolist() for x in (old, ref))
        rows.append(Row([], [0] * length, *values, A[row].item()))
    c = Config(loss_type=loss, beta=beta, clip=clip)
    now = [free[row][mask[row]] for row in range(4)]
    assert 0.35 < textbook.clipped(rows, now, clip) < 0.65
    wanted = textbook.textbook_loss(rows, now, c, max_new_tokens=8)
    [gradient] = torch.autograd.grad(wanted, free)
    normalizer = {"dapo": sum(LENGTHS), "grpo": 4, "dr_grpo": 4 * 8}[loss]
    for given, share in ((None, 1), (normalizer, 1), (3 * normalizer, 3)):
        own = new.clone().requires_grad_()
        value = grpo_loss(own, old, ref if beta else None, A, mask, clip, beta, loss, given)
        value.backward()
        assert share * value.item() == pytest.approx(wanted.item(), rel=1e-12)
        assert apart(share * own.grad, gradient) < 1e-12


def test_the_papers_values_are_the_defaults():
    rng = torch.Generator().manual_seed(0)
    new, old, ref = torch.randn(3, 4, 8, generator=rng)
    A, mask = torch.randn(4, generator=rng), torch.ones(4, 8, dtype=torch.bool)
    plain = grpo_loss(new, old, ref, A, mask)
    assert plain == grpo_loss(new, old, ref, A, mask, clip=0.2, beta=0.001, loss_type="dapo")
    c = Config()
    assert (c.clip, c.beta, c.loss_type, c.lr, c.warmup) == (0.2, 0.001, "dapo", 5e-7, 0.03)
    assert (c.steps, c.batch_size, c.group_size, c.max_grad_norm, c.scale_advantages) == (
        1750,
        256,
        8,
        1.0,
        True,
    )


def test_clip_takes_the_worse_of_both_for_both_signs():
    """min(ratio A, clip(ratio) A): good tokens stop being pushed up, bad ones down."""
    for A, ratio, flows in ((1, 1.5, False), (1, 0.5, True), (-1, 0.5, False), (-1, 1.5, True)):
        logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
        old = torch.zeros(1, 1)
        loss = grpo_loss(
            logprobs, old, None, torch.tensor([float(A)]), torch.ones(1, 1).bool(), beta=0.0
        )
        loss.backward()
        assert (logprobs.grad.abs().item() > 0) == flows
        bounded = min(max(ratio, 0.8), 1.2)
        assert loss.item() == pytest.approx(-min(ratio * A, bounded * A))


def test_k3_is_the_formula_also_where_the_models_hardly_differ():
    for d in (-3.0, -0.1, 0.0, 0.1, 3.0):
        assert grpo.k3(torch.tensor(d)).item() == pytest.approx(math.exp(d) - 1 - d, abs=1e-6)
    small = torch.tensor([-1e-3, 1e-3, 2e-3])  # exp(d) - 1 in float32 would leave four digits
    assert torch.allclose(grpo.k3(small), small**2 / 2, rtol=2e-3, atol=0)


def test_nothing_outside_the_mask_is_trained():
    """Invariant 3: other log-probabilities outside the mask leave loss and gradient as they are."""
    rng = torch.Generator().manual_seed(0)
    logprobs, old, ref = (torch.randn(3, 7, generator=rng) for _ in range(3))
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 2:4] = mask[1, 1:7] = mask[2, 6] = True
    A = torch.randn(3, generator=rng)
    for loss in LOSSES:
        free = logprobs.clone().requires_grad_(True)
        value = grpo_loss(free, old, ref, A, mask, loss_type=loss)
        value.backward()
        assert (free.grad[~mask] == 0).all() and (free.grad[mask] != 0).any()
        wild = torch.where(mask, logprobs, torch.randn(3, 7, generator=rng) * 500)
        wild.requires_grad_(True)
        again = grpo_loss(wild, old, ref, A, mask, loss_type=loss)
        again.backward()
        assert again.item() == value.item() and torch.equal(wild.grad, free.grad)
    inside = logprobs.clone()
    inside[0, 2] += 0.1
    assert grpo_loss(inside, old, ref, A, mask) != grpo_loss(logprobs, old, ref, A, mask)


# -- The mask and the log-probabilities ------------------------------------------------------------


def test_the_mask_is_by_position():
    """The end of turn, 0, is trained where the model wrote it; padding, also 0, is not."""
    context, turns = [5, 0, 7], ([8, 9, 0], [8, 0], [0])
    rows = [Row(context, turn, [-1.0 - t for t in range(len(turn))], None, 0.0) for turn in turns]
    ids, mask, old = grpo.reflection_rows([conversation(0, row, correct=False) for row in rows])
    assert ids.tolist() == [[5, 0, 7, 8, 9, 0], [5, 0, 7, 8, 0, 0], [5, 0, 7, 0, 0, 0]]
    assert mask.int().tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0]]
    assert old.tolist() == [[0, 0, 0, -1, -2, -3], [0, 0, 0, -1, -2, 0], [0, 0, 0, -1, 0, 0]]


SIZES = [(30, 1, 2), (9, 7, 3), (40, 12, 8), (1, 20, 5), (17, 40, 2)]


@pytest.mark.parametrize("context, longest, G", SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_packed_row_is_one_row_per_reflection(
    exact, monkeypatch, context, longest, G, temperature
):
    """Invariant 4: the same log-probabilities and gradients, to 1e-9 in float64; also with layers
    computed twice, and with the head in several parts."""
    [group] = draw_groups(exact, [(context, longest)], G)
    ids, mask, _ = grpo.reflection_rows(converse([group], [[1.0] + [0.0] * (G - 1)]))
    exact.zero_grad(set_to_none=True)
    plain, weigh = [], torch.randn(mask.shape, dtype=torch.float64)
    for row in group:
        plain.append(textbook.logprobs(exact, row.context, row.reflection, temperature))
    (torch.cat(plain) * weigh[mask]).sum().backward()
    wanted = torch.cat([p.grad.flatten() for p in exact.parameters()])
    for checkpointing, logits in ((False, 2**25), (True, 2**25), (False, 1), (True, 400)):
        monkeypatch.setattr(grpo, "MAX_LOGITS", logits)
        exact.gradient_checkpointing = checkpointing
        exact.zero_grad(set_to_none=True)
        new = token_logprobs(exact, ids, mask, temperature)
        assert new.shape == mask.shape and (new[~mask] == 0).all()
        assert apart(new[mask], torch.cat(plain)) < 1e-9
        (new * weigh).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in exact.parameters()])
        assert apart(gradient, wanted) < 1e-9


def test_any_mask_after_the_context_is_scored(exact):
    """Rows whose trained tokens begin late, have gaps, or end early; and what follows is unread."""
    [group] = draw_groups(exact, [(6, 9)], 4)
    for row in group:
        row.reflection, row.old = (row.reflection * 9)[:9], [0.0] * 9
    ids, _, _ = grpo.reflection_rows(converse([group], [[1.0, 0, 0, 0]]))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, 6:9] = mask[1, 10:15] = mask[2, [7, 9, 12]] = mask[3, 14] = True
    found = token_logprobs(exact, ids, mask)
    for row, values, marks in zip(group, found, mask[:, 6:], strict=True):
        wanted = textbook.logprobs(exact, row.context, row.reflection)
        assert apart(values[6:][marks], wanted[marks]) < 1e-9
    other = ids.clone()
    other[0, 9:] = 3  # after the row's last trained token: padding
    again = token_logprobs(exact, other, mask)
    assert torch.equal(found, again)


def test_the_head_is_never_whole_where_it_is_in_parts(tiny, monkeypatch):
    """The logits that exist at once are no more than MAX_LOGITS, for each part of the tokens."""
    model, sizes = tiny[0], []
    [group] = draw_groups(model, [(5, 12)], 4)
    ids, mask, _ = grpo.reflection_rows(converse([group], mixed(1, 4)))
    head = model.head
    model.head = lambda hidden: sizes.append(len(hidden)) or head(hidden)
    monkeypatch.setattr(grpo, "MAX_LOGITS", 10 * model.vocab_size + 5)
    new = token_logprobs(model, ids, mask)
    assert sum(sizes) == mask.sum() and max(sizes) == 10
    new.sum().backward()
    assert sum(sizes) == 2 * mask.sum()  # computed anew in the backward pass, not stored
    with torch.no_grad():
        token_logprobs(model, ids, mask)
    assert sum(sizes) == 3 * mask.sum()


def test_rows_that_cannot_be_packed_are_refused(tiny):
    ids, mask = torch.ones(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 3:] = mask[1, 4:] = True
    token_logprobs(tiny[0], ids, mask)
    for row, column in ((0, 0), (1, 2)):
        other = ids.clone()
        other[row, column] = 2
        with pytest.raises(ValueError, match="rows need a trained token"):
            token_logprobs(tiny[0], other, mask)
    mask[1, 0] = True
    with pytest.raises(ValueError, match="rows need a trained token"):
        token_logprobs(tiny[0], ids, mask)


# -- A whole step ----------------------------------------------------------------------------------

GROUPS = [(40, 12), (3, 20), (17, 1), (25, 6), (9, 9)]
KINDS = [(0.0, 1.0, True), (0.3, 1.0, True), (0.3, 0.7, False)]


def chat_of(tiny, task, temperature: float = 1.0) -> Agent:
    return Agent(*tiny, task, max_new_tokens=LONGEST, temperature=temperature, seed=3)


def some_rewards(P: int, G: int, seed: int = 0) -> list[list[float]]:
    """Groups with both rewards; but the third is all right, and the last is all wrong."""
    rewards = mixed(P, G, seed)
    rewards[2], rewards[-1] = [1.0] * G, [0.0] * G
    return rewards


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("beta, temperature, scale", KINDS)
def test_a_step_equals_the_textbook(
    exact, tiny, task, tmp_path, monkeypatch, loss, beta, temperature, scale
):
    """Two steps of `train`: the gradient over all failures, and the loss, are the textbook's.

    The masters' gradients are float32; the rest is float64.
    """
    reference = moved(exact) if beta else None
    c = Config(
        steps=2,
        batch_size=5,
        group_size=4,
        loss_type=loss,
        beta=beta,
        scale_advantages=scale,
        lr=1e-3,
        clip=0.1,
    )
    c.checkpointing = temperature != 1.0
    agent, drawn = chat_of((exact, tiny[1]), task, temperature), []
    for step in range(2):
        groups = draw_groups(exact, GROUPS, 4, step, temperature, reference)
        drawn.append((rows_of(groups), converse(groups, some_rewards(5, 4, step), scale)))
    gradients = prepare(monkeypatch, [conversations for _, conversations in drawn])
    steps = grpo.train(agent, reference, drawn[0][1][::4], c, tmp_path)
    assert next(steps) == (0, {})
    before = weights(exact)
    assert exact.gradient_checkpointing == c.checkpointing
    for step, (rows, _) in enumerate(drawn):
        value, wanted = textbook.textbook(exact, rows, c, LONGEST, temperature)
        done, metrics = next(steps)
        assert done == step + 1
        assert apart(gradients[step], wanted) < 1e-6
        assert metrics["loss"] == pytest.approx(value, rel=1e-6, abs=1e-8)
        assert metrics["grad_norm"] == pytest.approx(wanted.norm().item(), rel=1e-5)
        assert 0.2 < metrics["clipped"] < 0.8
    assert next(steps, None) is None
    assert not torch.equal(before, weights(exact))


def test_groups_of_equal_rewards_cost_nothing_without_kl(tiny, task, tmp_path, monkeypatch):
    model, computed = tiny[0], []
    groups = draw_groups(model, GROUPS, 4, reference=model)
    conversations = converse(groups, some_rewards(5, 4))
    packed = grpo.token_logprobs
    monkeypatch.setattr(grpo, "token_logprobs", lambda *a: computed.append(a[0]) or packed(*a))
    prepare(monkeypatch, [conversations])
    reference = copy.deepcopy(model)
    for beta, times in ((0.0, {model: 3}), (0.3, {model: 5, reference: 5})):
        computed.clear()
        c, folder = Config(steps=1, batch_size=5, group_size=4, beta=beta), tmp_path / str(beta)
        for _ in grpo.train(
            chat_of(tiny, task), reference if beta else None, conversations[::4], c, folder
        ):
            pass
        assert {m: computed.count(m) for m in computed} == times
    assert all(p.grad is None for p in reference.parameters())  # and has no gradient of its own


def test_a_step_of_equal_rewards_alone_changes_nothing(tiny, task, tmp_path, monkeypatch):
    groups = draw_groups(tiny[0], GROUPS[:2], 3)
    conversations = converse(groups, [[1.0] * 3, [0.0] * 3])
    gradients = prepare(monkeypatch, [conversations])
    before = weights(tiny[0])
    c = Config(steps=1, batch_size=2, group_size=3, beta=0.0)
    _, (_, metrics) = grpo.train(chat_of(tiny, task), None, conversations[::3], c, tmp_path)
    assert (gradients[0] == 0).all() and torch.equal(weights(tiny[0]), before)
    assert (metrics["grad_norm"], metrics["loss"], metrics["mixed_groups"]) == (0, 0, 0)


def test_metrics_are_means_over_the_trained_tokens(tiny, task, tmp_path, monkeypatch):
    model, reference = tiny[0], moved(tiny[0])
    groups = draw_groups(model, GROUPS, 4, temperature=0.8, reference=reference)
    conversations = converse(groups, mixed(5, 4))
    conversations[1].truncated = conversations[2].truncated = True
    rewards = [float(t.retry_verdict.correct and not t.truncated) for t in conversations]
    for p, group in enumerate(groups):
        for row, A in zip(group, textbook.advantages(rewards[4 * p : 4 * p + 4]), strict=True):
            row.advantage = A
    nll, kl, apart_ = [], [], []
    with torch.no_grad():
        now = [textbook.logprobs(model, r.context, r.reflection, 0.8) for r in rows_of(groups)]
    for row, values in zip(rows_of(groups), now, strict=True):
        for value, old, ref in zip(values.tolist(), row.old, row.ref, strict=True):
            nll.append(-value)
            kl.append(math.exp(ref - value) - (ref - value) - 1)
            apart_.append(abs(value - old))
    share = textbook.clipped(rows_of(groups), now, 0.2)
    prepare(monkeypatch, [conversations])
    c = Config(steps=1, batch_size=5, group_size=4, beta=0.01)
    steps = grpo.train(chat_of(tiny, task, 0.8), reference, conversations[::4], c, tmp_path)
    _, (_, metrics) = steps
    for name, values in (("nll", nll), ("kl", kl)):
        assert metrics[name] == pytest.approx(statistics.fmean(values), rel=1e-4), name
    assert metrics["mismatch"] == pytest.approx(max(apart_), rel=1e-4)
    assert metrics["clipped"] == pytest.approx(share, rel=1e-6)
    assert metrics["reward"] == pytest.approx(statistics.fmean(rewards))
    assert metrics["reflection_tokens"] == pytest.approx(len(nll) / 20)
    assert metrics["sampled_tokens"] == len(nll) + 2 * 20
    assert metrics["truncated"] == 0.1
    assert metrics["mixed_groups"] == sum(0 < sum(rewards[4 * p :][:4]) < 4 for p in range(5)) / 5


def test_a_step_is_the_same_bits_each_time(tiny, task, tmp_path, monkeypatch):
    """Invariant 6: no sum whose order is left to the threads."""
    groups = draw_groups(tiny[0], [(90, 40)] * 3, G=8, noise=0.1)
    conversations = converse(groups, mixed(3, 8))
    gradients, found = prepare(monkeypatch, [conversations]), []
    for number in range(4):
        model = copy.deepcopy(tiny[0])
        c = Config(steps=1, batch_size=3, group_size=8, beta=0.2, lr=1e-3)
        agent = chat_of((model, tiny[1]), task)
        for _ in grpo.train(agent, tiny[0], conversations[::8], c, tmp_path / str(number)):
            pass
        found.append(weights(model))
    for gradient, other in zip(gradients[1:], found[1:], strict=True):
        assert torch.equal(gradient, gradients[0]) and torch.equal(other, found[0])


def test_the_update_is_adamw_clipped_and_scheduled(tiny, task, tmp_path, monkeypatch):
    """Three steps: torch's plain AdamW with the same gradients, which start each step from zero."""
    model = tiny[0]
    c = Config(
        steps=3, batch_size=5, group_size=4, beta=0.0, lr=1e-2, warmup=0.5, max_grad_norm=0.01
    )
    drawn = [draw_groups(model, GROUPS, 4, step) for step in range(3)]
    steps = [converse(groups, mixed(5, 4, step)) for step, groups in enumerate(drawn)]
    gradients, expected = prepare(monkeypatch, steps), copy.deepcopy(model)
    plain = torch.optim.AdamW(expected.parameters(), c.lr, weight_decay=0.0, fused=False)
    for done, metrics in grpo.train(chat_of(tiny, task), None, steps[0][::4], c, tmp_path):
        if done:
            _, gradient = textbook.textbook(expected, rows_of(drawn[done - 1]), c, LONGEST)
            assert apart(gradients[-1], gradient) < 1e-4
            norm = gradients[-1].norm()
            assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 0.02
            assert metrics["lr"] == pytest.approx(0.01 * (0.5, 1.0, 1.0)[done - 1])
            parts = gradients[-1].split([p.numel() for p in expected.parameters()])
            for p, part in zip(expected.parameters(), parts, strict=True):
                p.grad = part.view_as(p) * (0.01 / norm)
            plain.param_groups[0]["lr"] = metrics["lr"]
            plain.step()
        assert (weights(model) - weights(expected)).abs().max() < 1e-6


def test_learning_rate_rises_then_falls_to_nearly_nothing():
    shares = [grpo.lr_multiplier(step, 100, 0.03) for step in range(100)]
    assert shares[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert shares[3] == 1.0 and all(a > b for a, b in zip(shares[3:], shares[4:], strict=False))
    assert shares[3 + 97 // 2] == pytest.approx(0.5, abs=0.01)
    assert 0 < shares[-1] < 0.001
    assert (
        grpo.lr_multiplier(0, 1, 0.0)
        == grpo.lr_multiplier(0, 1, 0.03)
        == grpo.lr_multiplier(0, 1, 1.0)
        == 1
    )


# -- The optimizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_gradient_that_is_not_finite_ends_the_run(tiny, task, tmp_path, monkeypatch, bad):
    """And changes nothing: the checkpoint of the step before is still the newest."""
    model = tiny[0]
    groups = draw_groups(model, GROUPS[:2], 3)
    good = converse(groups, mixed(2, 3))
    groups = copy.deepcopy(groups)
    groups[1][2].old[7] = bad  # of a wrong retry
    broken, found = converse(groups, mixed(2, 3)), []
    prepare(monkeypatch, [good, good, broken])
    c = Config(steps=4, batch_size=2, group_size=3, beta=0.0, lr=1e-3, save_every=1)
    with pytest.raises(ValueError, match="the gradient is not finite: take a lower --lr"):
        for _ in grpo.train(chat_of(tiny, task), None, good[::3], c, tmp_path):
            found.append(weights(model))
    assert len(found) == 3 and torch.equal(weights(model), found[2])
    assert not torch.equal(found[1], found[2])
    assert grpo.load_checkpoint(tmp_path, MasterAdamW(model, 1e-3)) == (2, {})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_the_moments_alone(tiny, bad):
    optimizer = MasterAdamW(tiny[0], 1e-3)
    for value in (1.0, bad):
        for p in tiny[0].parameters():
            p.grad = torch.full_like(p, 1.0)
        p.grad.view(-1)[5] = value
        if value == 1.0:
            assert math.isfinite(optimizer.update(1e-3, 1.0))
            assert all(p.grad is None for p in optimizer.masters)
        else:
            with pytest.raises(ValueError, match="not finite"):
                optimizer.update(1e-3, 1.0)
    for state in optimizer.state.values():
        assert state["step"] == 1
        assert bool(state["exp_avg"].isfinite().all() and state["exp_avg_sq"].isfinite().all())


def test_nothing_to_learn_is_no_step(tiny):
    """Without any gradient neither weights nor moments move, and the norm is 0."""
    optimizer = MasterAdamW(tiny[0], 1e-3)
    for p in tiny[0].parameters():
        p.grad = torch.ones_like(p)
    optimizer.update(1e-3, 1.0)
    before = weights(tiny[0])
    assert optimizer.update(1e-3, 1.0) == 0 and torch.equal(weights(tiny[0]), before)
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_gradients_add_up_in_float32(tiny):
    """256 small gradients to a large one: in bfloat16 each would round away."""
    model = tiny[0].bfloat16()
    optimizer = MasterAdamW(model, 1e-3)
    for number in range(257):
        for p in model.parameters():
            p.grad = torch.full_like(p, 2**-9 if number else 1.0)
        optimizer.accumulate_gradients()
        assert all(p.grad is None for p in model.parameters())
    for master in optimizer.masters:
        assert master.dtype == master.grad.dtype == torch.float32
        assert (master.grad == 1.5).all()


def test_a_steps_gradients_add_up_in_float32(tiny, task, tmp_path, monkeypatch):
    """Of a bfloat16 model: what the backward pass of each failure gives is added in float32."""
    model = copy.deepcopy(tiny[0]).bfloat16()
    groups = draw_groups(tiny[0], GROUPS, 4)
    conversations, wanted = converse(groups, mixed(5, 4)), 0.0
    for group in (conversations[i : i + 4] for i in range(0, 20, 4)):
        ids, mask, old = grpo.reflection_rows(group)
        A = group_advantages(torch.tensor([[float(t.retry_verdict.correct) for t in group]]))[0]
        new = token_logprobs(model, ids, mask)
        tokens = sum(len(t.reflection) for t in conversations)
        grpo_loss(new, old, None, A, mask, beta=0.0, normalizer=tokens).backward()
        wanted = wanted + torch.cat([p.grad.flatten().float() for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    gradients, c = (
        prepare(monkeypatch, [conversations]),
        Config(steps=1, batch_size=5, group_size=4, beta=0.0),
    )
    for _ in grpo.train(chat_of((model, tiny[1]), task), None, conversations[::4], c, tmp_path):
        pass
    assert torch.equal(gradients[0], wanted)


def test_bfloat16_moves_with_masters_and_hardly_without(task, tmp_path, monkeypatch):
    """At the paper's learning rate: four steps from the same bfloat16 weights, on the same data."""
    low, tokenizer = models.tiny_model(task.words(), seed=1)
    low = low.bfloat16()
    start = copy.deepcopy(low).float()
    drawn = [draw_groups(start, [(9, 8)] * 3, 8, step, noise=0.02) for step in range(4)]
    steps = [converse(groups, mixed(3, 8, step)) for step, groups in enumerate(drawn)]
    prepare(monkeypatch, steps)
    c = Config(steps=4, batch_size=3, group_size=8, beta=0.0, warmup=0.0)
    runs = iter(range(9))

    def trained(model, **changes):
        """How far the weights that are trained have moved, and what the model's own are then."""
        optimizers = []
        made = MasterAdamW.__init__

        def keep(optimizer, *args):
            made(optimizer, *args)
            optimizers.append((optimizer, [m.detach().clone() for m in optimizer.masters]))

        monkeypatch.setattr(MasterAdamW, "__init__", keep)
        agent = chat_of((model, tokenizer), task)
        folder = tmp_path / str(next(runs))
        for _ in grpo.train(agent, None, steps[0][::8], replace(c, **changes), folder):
            pass
        monkeypatch.setattr(MasterAdamW, "__init__", made)
        [(optimizer, before)] = optimizers
        pairs = zip(optimizer.masters, before, strict=True)
        return torch.cat([(m.detach().cpu() - b.cpu()).flatten() for m, b in pairs]), optimizer

    exact, _ = trained(copy.deepcopy(start))
    model = copy.deepcopy(low)
    ours, optimizer = trained(model)
    assert torch.cosine_similarity(ours, exact, dim=0) > 0.95
    assert ours.norm() == pytest.approx(exact.norm().item(), rel=0.05)
    for weight, master in zip(model.parameters(), optimizer.masters, strict=True):
        assert weight.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert torch.equal(weight, master.bfloat16())  # rounded anew after each step
    offloaded = copy.deepcopy(low)
    assert torch.equal(trained(offloaded, offload=True)[0], ours)
    assert torch.equal(weights(offloaded), weights(model))

    plain = copy.deepcopy(low)
    adamw = torch.optim.AdamW(plain.parameters(), c.lr, weight_decay=0.0)
    for step in range(4):
        for group in [steps[step][i : i + 8] for i in range(0, 24, 8)]:
            ids, mask, old = grpo.reflection_rows(group)
            A = group_advantages(torch.tensor([[float(t.retry_verdict.correct) for t in group]]))[0]
            new = token_logprobs(plain, ids, mask)
            grpo_loss(new, old, None, A, mask, beta=0.0).backward()
        adamw.step()
        adamw.zero_grad()
    assert (weights(plain) != weights(low)).float().mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offload_changes_no_bit(tiny, task, tmp_path, monkeypatch, dtype):
    groups = draw_groups(tiny[0], GROUPS, 4, noise=0.1)
    conversations, found = converse(groups, mixed(5, 4)), []
    prepare(monkeypatch, [conversations] * 3)
    for offload in (False, True):
        model = copy.deepcopy(tiny[0]).to(dtype)
        c = Config(steps=3, batch_size=5, group_size=4, beta=0.0, lr=1e-3, offload=offload)
        agent = chat_of((model, tiny[1]), task)
        for _ in grpo.train(agent, None, conversations[::4], c, tmp_path / str(offload)):
            pass
        found.append(weights(model))
        assert not torch.equal(found[-1], weights(tiny[0]).to(dtype))
    assert torch.equal(*found)


def test_offloaded_masters_are_copies_in_main_memory(tiny):
    own, offloaded = MasterAdamW(tiny[0], 1e-3), MasterAdamW(tiny[0], 1e-3, offload=True)
    for weight, one, other in zip(
        tiny[0].parameters(), own.masters, offloaded.masters, strict=True
    ):
        assert one is weight and other is not weight
        assert other.data_ptr() != weight.data_ptr() and other.device.type == "cpu"
        assert torch.equal(weight, other)


# -- The rollout -----------------------------------------------------------------------------------


class Lenient(Agent):
    """A verifier that an untrained model satisfies now and then."""

    def verify(self, problem, turn):
        right = sum(turn) % 3 == 0
        return Verdict(right, "correct" if right else "wrong_value")


@pytest.fixture
def agent(tiny, task):
    model, tokenizer = tiny
    tokenizer.stop_ids = list(range(40))  # so that turns end at different times
    return Lenient(model, tokenizer, task, max_new_tokens=10, seed=3)


@pytest.fixture
def failures(agent, task):
    """Wrong first tries at a few problems, of unequal lengths."""
    conversations = grpo.attempt_all(agent, task.load(split="dev", limit=40), 1, (grpo.COLLECT, 0))
    wrong = [t for t in conversations if not t.attempt_verdict.correct][:7]
    assert len(wrong) == 7
    return wrong


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_the_sampler_recorded_the_trainer_computes(agent, failures, tmp_path, temperature):
    """Invariant 2: for each trained token of a rollout, and in a step's `mismatch`."""
    agent.temperature = temperature
    conversations = grpo.rollout(agent, failures, 4, (grpo.TRAIN, 0))
    for p in range(len(failures)):
        ids, mask, old = grpo.reflection_rows(conversations[4 * p : 4 * p + 4])
        with torch.no_grad():
            new = token_logprobs(agent.model, ids, mask, temperature)
        assert (new - old).abs().max() < 1e-4 and (old[mask] < -0.1).any()
    for t in conversations:
        ended = t.attempt[-1] in agent.tokenizer.stop_ids
        said = t.attempt[:-1] if ended else t.attempt  # the template ends the turn
        assert t.reflection_prompt == t.attempt_prompt + said + agent.tokenizer.bridge(
            agent.task.reflection_instruction
        )
    c = Config(steps=2, batch_size=5, group_size=4, lr=1e-3, beta=0.01)
    reference = copy.deepcopy(agent.model)
    for step, metrics in grpo.train(agent, reference, failures, c, tmp_path):
        if step:
            assert 0 < metrics["mismatch"] < 1e-4 and metrics["clipped"] == 0
            assert (metrics["kl"] > 1e-6) == (step == 2)  # policy and reference begin as one


def test_the_reward_is_for_a_right_retry_after_a_reflection_that_ended(agent, failures, tmp_path):
    """And samples.jsonl says what was drawn, what it was worth, and which tokens were trained."""
    agent.tokenizer.stop_ids = [0, *range(20, 30)]  # some reflections end, and some are cut
    c = Config(steps=3, batch_size=3, group_size=6, beta=0.0, lr=1e-3)
    rewards, model = [], copy.deepcopy(agent.model)
    for step, metrics in grpo.train(agent, None, failures, c, tmp_path):
        if step:
            rewards.append(metrics["reward"])
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 3 * 6
    for step in range(3):
        of_step = [line for line in lines if line["step"] == step + 1]
        drawn = grpo.draw_failures(failures, step, 3, agent.seed)
        found = [(line["problem"]["id"], line["attempt_index"]) for line in of_step]
        assert found[::6] == sorted((f.problem.id, f.attempt_index) for f in drawn)
        assert found == [each for each in found[::6] for _ in range(6)]
        values = [line["reward"] for line in of_step]
        assert statistics.fmean(values) == pytest.approx(rewards[step])
        A = group_advantages(torch.tensor(values).view(3, 6)).flatten()
        assert [line["advantage"] for line in of_step] == pytest.approx(A.tolist())
    first = grpo.draw_failures(failures, 0, 3, agent.seed)
    conversations = grpo.rollout(replace(agent, model=model), first, 6, (grpo.TRAIN, 0))
    outcomes, decode = set(), agent.tokenizer.tokenizer.decode
    for t, line in zip(conversations, lines, strict=False):
        ended = t.reflection[-1] in agent.tokenizer.stop_ids
        outcomes.add((ended, sum(t.retry) % 3 == 0))
        assert t.truncated != ended and line["reward"] == (ended and sum(t.retry) % 3 == 0)
        said = {"attempt": t.attempt, "reflection": t.reflection, "retry": t.retry}
        assert line["ids"] == said  # the reflection's are the trained tokens
        said["context"] = t.reflection_prompt
        for name, turn in said.items():
            assert line[name] == decode(turn, skip_special_tokens=False)
        assert line["retry_verdict"] == {
            "correct": t.retry_verdict.correct,
            "reason": t.retry_verdict.reason,
        }
        assert line["attempt_verdict"] == {"correct": False, "reason": "wrong_value"}
    assert len(outcomes) == 4  # ended or cut, right or wrong


def test_every_step_samples_anew_and_every_sample_is_its_own(agent, failures):
    one, two = (grpo.rollout(agent, failures, 3, (grpo.TRAIN, step)) for step in (0, 1))
    assert [t.reflection for t in one] != [t.reflection for t in two]
    for conversations in (one, two):
        assert len({tuple(t.reflection) for t in conversations}) > 1.5 * len(failures)
        assert len({tuple(t.retry) for t in conversations}) > 1.5 * len(failures)
    problems, key = [f.problem for f in failures], (grpo.EVALUATE, 0)
    five = grpo.attempt_all(agent, problems, 5, key)
    three = grpo.attempt_all(agent, problems, 3, key, start=2)
    said = {(t.problem.id, t.attempt_index): t.attempt for t in five if t.attempt_index > 1}
    assert {(t.problem.id, t.attempt_index): t.attempt for t in three} == said
    other = grpo.rollout(replace(agent, seed=4), failures, 3, (grpo.TRAIN, 0))
    assert [t.reflection for t in one] != [t.reflection for t in other]


def remember(model, rows: int, only: range = range(10**6)) -> list[int]:
    """A model whose memory holds so many rows, at the calls numbered in `only`. Returns a list, to
    which the rows of each call are added."""
    hidden, calls = model.hidden, []

    def limited(ids, *rest, **more):
        calls.append(len(ids))
        if len(ids) > rows and len(calls) - 1 in only:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(ids, *rest, **more)

    model.hidden = limited
    return calls


def test_out_of_memory_halves_the_batch_and_changes_nothing(agent, task, failures):
    problems = task.load(split="dev", limit=7)

    def sampled():
        first = grpo.attempt_all(agent, problems, 3, (grpo.EVALUATE, 0), start=2)
        return first, grpo.rollout(agent, failures, 3, (grpo.TRAIN, 0))

    wanted = [
        [replace(t, reflection_logprobs=[]) for t in conversations] for conversations in sampled()
    ]
    assert [(t.problem.id, t.attempt_index) for t in wanted[0]] == [
        (p, s) for p in sorted(p.id for p in problems) for s in (2, 3, 4)
    ]
    agent.cache_tokens = 10_000
    calls = remember(agent.model, 12)  # a batch of 7, with 3 samples each, is too large
    found = [
        [replace(t, reflection_logprobs=[]) for t in conversations] for conversations in sampled()
    ]
    assert found == wanted and max(calls) == 21
    assert agent.cache_tokens < 7 * grpo.cache_tokens_needed(agent, problems[0], 3, turns=1)
    calls.clear()
    agent.cache_tokens = 500  # this fits
    assert [
        [replace(t, reflection_logprobs=[]) for t in conversations] for conversations in sampled()
    ] == wanted
    assert max(calls) <= 12 and agent.cache_tokens == 500
    del agent.model.hidden
    calls = remember(agent.model, 2)  # the samples of one item are too many
    for work in (
        lambda: grpo.attempt_all(agent, problems, 3, (grpo.EVALUATE, 0)),
        lambda: grpo.rollout(agent, failures, 3, (grpo.TRAIN, 0)),
    ):
        with pytest.raises(torch.OutOfMemoryError):
            work()


def test_one_halving_of_the_cache_is_for_all_batches_that_are_left(agent, failures):
    """Several batches of a step are each too large: the cache is halved once and not for each."""
    wanted = [t.retry for t in grpo.rollout(agent, failures, 3, (grpo.TRAIN, 0))]
    sizes = [len(t.attempt_prompt + t.attempt) + 3 * 2 * 60 for t in failures]
    agent.cache_tokens = 2 * max(sizes)
    assert len(grpo.batches(agent, failures, 3, turns=2)) == 4
    remember(agent.model, 3)
    found = [t.retry for t in grpo.rollout(agent, failures, 3, (grpo.TRAIN, 0))]
    assert found == wanted and agent.cache_tokens == max(sizes)


@pytest.mark.parametrize("call", [0, 5, 11, 14])
def test_out_of_memory_at_any_moment_changes_nothing(agent, failures, call):
    """In reading, reflecting or retrying: no conversation is lost, and none comes twice."""
    wanted = [(t.reflection, t.retry) for t in grpo.rollout(agent, failures, 3, (grpo.TRAIN, 0))]
    calls = remember(agent.model, 0, only=range(call, call + 1))
    conversations = grpo.rollout(agent, failures, 3, (grpo.TRAIN, 0))
    assert [(t.reflection, t.retry) for t in conversations] == wanted and len(calls) > call + 10


def test_batches_hold_what_the_budget_allows_the_longest_first(agent, task, failures):
    problems = task.load(split="dev", limit=9)
    longer = {
        f.problem.id: replace(f, attempt=f.attempt * (1 + 40 * i)) for i, f in enumerate(failures)
    }
    failures = list(longer.values())
    for items, turns in ((problems, 1), (failures, 2)):
        lengths = {}
        for item in items:
            read = agent.attempt_prompt(item) if turns == 1 else item.attempt_prompt + item.attempt
            lengths[id(item)] = len(read) + 4 * turns * (10 + 50)
        for budget in (1, 700, 1_500, 2_500, 3_000, 3_500, 10**6):
            agent.cache_tokens = budget
            found = grpo.batches(agent, items, 4, turns)
            flat = [lengths[id(item)] for batch in found for item in batch]
            assert flat == sorted(lengths.values(), reverse=True)
            assert len({id(item) for batch in found for item in batch}) == len(items)
            for batch in found:
                assert len(batch) == 1 or len(batch) * lengths[id(batch[0])] <= budget
            for batch, after in zip(found, found[1:], strict=False):  # one more would not fit
                assert (len(batch) + 1) * lengths[id(batch[0])] > budget and after


def test_every_failure_comes_once_an_epoch_and_never_twice_a_step(failures):
    many = [replace(failures[0], attempt_index=s, problem=replace(failures[0].problem, id=p))
            for p in range(5) for s in range(2)]  # fmt: skip

    def draw(step, size, **more):
        found = grpo.draw_failures(many, step, size, 0, **more)
        assert all(any(f is known for known in many) for f in found)
        return [(f.problem.id, f.attempt_index) for f in found]

    everything = [(p, s) for p in range(5) for s in range(2)]
    steps = [draw(step, 5) for step in range(4)]
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == everything
    assert steps[:2] != steps[2:] and steps[0] + steps[1] != everything
    for step in range(9):  # across the epochs' borders
        found = draw(step, 7)
        assert 4 <= len(found) == len(set(found)) <= 7
    assert sorted(draw(3, 25)) == everything
    left = [draw(step, 3, leave_out=(1, 4)) for step in range(2)]
    assert sorted(left[0] + left[1]) == [(p, s) for p in (0, 2, 3) for s in range(2)]
    assert draw(0, 5) == steps[0]
    other = [(f.problem.id, f.attempt_index) for f in grpo.draw_failures(many, 0, 5, seed=1)]
    assert other != steps[0]
    for none, out in (([], ()), (many, range(5))):
        with pytest.raises(ValueError, match="there is no failure to train on"):
            grpo.draw_failures(none, 0, 5, 0, leave_out=tuple(out))


# -- Stopping and going on -------------------------------------------------------------------------

LOGS = ("metrics.jsonl", "samples.jsonl")


def run(agent, failures, folder, model, until: int = 10**6, **changes) -> Tensor:
    """Train a copy of a model, writing its metrics, and leave after `until` steps as if killed.
    Returns its weights."""
    own = replace(agent, model=copy.deepcopy(model))
    c = Config(
        **{
            "steps": 4,
            "batch_size": 2,
            "group_size": 3,
            "lr": 1e-3,
            "beta": 0.1,
            "save_every": 2,
            **changes,
        }
    )
    reference = model if c.beta else None
    for step, metrics in grpo.train(own, reference, failures, c, folder):
        grpo.append_jsonl(folder / "metrics.jsonl", {"step": step, **metrics})
        if step == until:
            break
    return weights(own.model)


@pytest.mark.parametrize(
    "dtype, changes, moments",
    [
        (torch.float32, {}, range(4)),
        (torch.float32, {"offload": True}, [3]),
        (torch.bfloat16, {"beta": 0.0}, [3]),
    ],
    ids=str,
)
def test_a_resumed_run_is_one_that_never_stopped(
    agent, failures, tmp_path, dtype, changes, moments
):
    """Invariant 6, bit for bit: weights, moments, logs; killed after each of the steps."""
    model = agent.model.to(dtype)
    whole = run(agent, failures, tmp_path / "whole", model, **changes)
    for until in moments:
        folder = tmp_path / str(until)
        run(agent, failures, folder, model, until, **changes)
        with open(folder / "samples.jsonl", "a") as file:
            file.write('{"step": 4, "prob')
        assert (folder / "checkpoint.safetensors").exists() == (until == 3)
        assert torch.equal(run(agent, failures, folder, model, **changes), whole)
        names = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
        assert Path("checkpoint.safetensors") in names
        for name in names:
            same = (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
            assert same, name
    lines = (tmp_path / "3" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4]
    finished = run(agent, failures, tmp_path / "whole", model, **changes)
    assert torch.equal(finished, whole)  # nothing is left to do


def saved(model, folder, steps=(1, 2, 3), state=None) -> MasterAdamW:
    """Checkpoints of some steps one after the other, each with weights and moments of its own."""
    optimizer, rng = MasterAdamW(model, 1e-3), torch.Generator().manual_seed(0)
    for step in steps:
        for master in optimizer.masters:
            master.grad = torch.randn(master.shape, generator=rng)
        optimizer.update(1e-3, 1.0)
        grpo.save_checkpoint(folder, step, optimizer, state or {})
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_read_as_it_was_written(tiny, tmp_path, dtype):
    """Weights, moments and their count, bit for bit; and a state that is the caller's."""
    state = {"left out": [3, 5], "share": 0.1}
    model = tiny[0].to(dtype)
    one = saved(model, tmp_path, state=state)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    two = MasterAdamW(other, 1e-3)
    assert grpo.load_checkpoint(tmp_path, two) == (3, state)
    assert torch.equal(weights(model), weights(other))
    for a, b in zip(one.masters, two.masters, strict=True):
        assert torch.equal(a, b) and one.state[a].keys() == two.state[b].keys()
        for name, value in one.state[a].items():
            assert torch.equal(value, two.state[b][name]), name
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    one.update(1e-3, 1.0)
    two.update(1e-3, 1.0)
    assert torch.equal(weights(model), weights(other))


def test_a_fresh_run_has_no_checkpoint_and_empty_logs(tiny, tmp_path):
    for name in LOGS:
        (tmp_path / name).write_text("of a run that was killed before its first checkpoint\n")
    assert grpo.load_checkpoint(tmp_path, MasterAdamW(tiny[0], 1e-3)) == (0, {})
    assert [(tmp_path / name).read_text() for name in LOGS] == ["", ""]
    assert grpo.load_checkpoint(tmp_path / "none", MasterAdamW(tiny[0], 1e-3)) == (0, {})


def test_a_checkpoint_before_the_first_update(tiny, tmp_path):
    """No step so far had anything to learn: there are weights and no moments."""
    optimizer = MasterAdamW(tiny[0], 1e-3)
    grpo.save_checkpoint(tmp_path, 2, optimizer, {})
    kept = weights(tiny[0])
    other = copy.deepcopy(tiny[0])
    with torch.no_grad():
        other.lm_head.weight.zero_()
    optimizer = MasterAdamW(other, 1e-3)
    assert grpo.load_checkpoint(tmp_path, optimizer) == (2, {})
    assert torch.equal(weights(other), kept)
    saved(other, tmp_path, (3,))  # and training goes on from it


def test_train_hands_the_state_on(agent, failures, tmp_path):
    state = {"left out": [7]}
    grpo.save_checkpoint(tmp_path, 1, MasterAdamW(agent.model, 1e-3), state)
    run(agent, failures, tmp_path, agent.model, steps=3)
    assert grpo.load_checkpoint(tmp_path, MasterAdamW(agent.model, 1e-3)) == (3, state)


def test_a_damaged_checkpoint_is_named(tiny, tmp_path):
    """Cut, emptied, or its beginning overwritten: one line."""
    optimizer = saved(tiny[0], tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    ends = [len(whole) - 1, len(whole) // 2, 7, 0]
    for content in [*(whole[:end] for end in ends), b"\xff" * 16 + whole[16:], b"[]"]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint.safetensors is damaged, or of") as error:
            grpo.load_checkpoint(tmp_path, optimizer)
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    assert grpo.load_checkpoint(tmp_path, optimizer)[0] == 3


@pytest.mark.parametrize("missing", ["step", "state", "logs"])
def test_a_record_with_an_entry_missing_is_damaged(tiny, tmp_path, missing):
    optimizer = saved(tiny[0], tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["run"])
    tensors = safetensors.torch.load_file(path)
    del record[missing]
    models.replace_file(path, tensors, {"run": json.dumps(record)})
    with pytest.raises(ValueError, match=f"damaged, or of another model: .*{missing}"):
        grpo.load_checkpoint(tmp_path, optimizer)
    models.replace_file(path, tensors)  # and one that is no run's
    with pytest.raises(ValueError, match="damaged, or of another model"):
        grpo.load_checkpoint(tmp_path, optimizer)


def test_another_models_checkpoint_is_refused(tiny, folder, tmp_path):
    """Of another vocabulary or architecture; or the same with more layers, or fewer."""
    saved(tiny[0], tmp_path / "a")
    others = [models.tiny_model(["1", "2"])[0], models.Model.from_pretrained(folder)]
    for layers in (3, 5):
        others.append(models.Model({**tiny[0].config_dict, "num_hidden_layers": layers}))
    for other in others:
        with pytest.raises(ValueError, match="is damaged, or of another model: .+"):
            grpo.load_checkpoint(tmp_path / "a", MasterAdamW(other, 1e-3))


def test_logs_are_cut_back(tiny, tmp_path):
    for name in LOGS:
        (tmp_path / name).write_text(f"{name}\n")
    optimizer = saved(tiny[0], tmp_path)
    for name in LOGS:
        with open(tmp_path / name, "a") as file:
            file.write("what came after\n")
    grpo.load_checkpoint(tmp_path, optimizer)
    assert [(tmp_path / name).read_text() for name in LOGS] == [f"{name}\n" for name in LOGS]
    for name in LOGS:  # one that lost something is not filled up with zeros
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text[:-3])
        grpo.load_checkpoint(tmp_path, optimizer)
        assert (tmp_path / name).read_text() == text[:-3]


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("moment", ["save_file", "fsync", "replace"])
def test_killed_while_it_saves_a_run_keeps_what_it_had(tiny, tmp_path, monkeypatch, moment):
    """Half-way through the file, before it is on the disk, or before it takes its name."""
    model = tiny[0]
    optimizer = saved(model, tmp_path, (1, 2))
    kept = weights(model)

    def dies(*args, **more):
        if moment == "save_file":
            Path(args[1]).write_bytes(b"half a file")
        raise Killed

    with monkeypatch.context() as patched:
        where = models.safetensors.torch if moment == "save_file" else models.os
        patched.setattr(where, moment, dies)
        for master in optimizer.masters:
            master.grad = torch.ones_like(master)
        optimizer.update(1e-3, 1.0)
        with pytest.raises(Killed):
            grpo.save_checkpoint(tmp_path, 3, optimizer, {})
    newest = weights(model)
    assert not torch.equal(newest, kept)
    assert grpo.load_checkpoint(tmp_path, optimizer)[0] == 2 and torch.equal(weights(model), kept)
    grpo.save_checkpoint(tmp_path, 3, optimizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
