"""The method: advantages, mask, loss and gradient equal the textbook's; the optimizer; the rollout;
checkpoints. (Invariants 2, 3, 4 and 6.)"""

import copy
import doctest
import itertools
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
from conftest import shallow_model
from test_model import assert_close
from textbook import Row, conversation, prepare
from torch import Tensor

import grpo
import model as models
from grpo import (
    Agent,
    Conversation,
    FailureStream,
    MasterAdamW,
    TrainConfig,
    Turn,
    group_advantages,
    grpo_loss,
    pack_group,
    token_logprobs,
    token_weights,
)
from tasks import Verdict

MAX_NEW_TOKENS = 24  # of prepared conversations
LOSS_TYPES = ("dapo", "grpo", "dr_grpo")


def relative_error(one: Tensor, other: Tensor) -> float:
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


def conversations_of(
    groups: list[list[Row]], rewards: list[list[float]], scale: bool = True
) -> list[list[Conversation]]:
    """Groups of conversations with these rewards; the rows get the textbook's advantages."""
    conversations = []
    for p, (group, values) in enumerate(zip(groups, rewards, strict=True)):
        for row, A in zip(group, textbook.advantages(values, scale), strict=True):
            row.advantage = A
        pairs = enumerate(zip(group, values, strict=True))
        conversations.append([conversation(p, row, reward == 1, g) for g, (row, reward) in pairs])
    return conversations


def failures_of(groups: list[list[Conversation]]) -> list[Conversation]:
    """What a prepared step draws: as many failures as it has groups."""
    return [group[0] for group in groups]


def mixed(P: int, G: int, seed: int = 0) -> list[list[float]]:
    """Rewards of P groups, each of which has both rewards."""
    rewards = torch.randint(0, 2, (P, G), generator=torch.Generator().manual_seed(seed)).float()
    rewards[:, 0], rewards[:, -1] = 1, 0
    return rewards.tolist()


def flat(groups: list[list]) -> list:
    return [item for group in groups for item in group]


# -- Advantages and loss ---------------------------------------------------------------------------


def test_worked_examples_in_docstrings():
    found = doctest.testmod(grpo, extraglobs={"torch": torch})
    assert found.attempted >= 2 and found.failed == 0


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
@pytest.mark.parametrize("delta", [1e-4, 0.1])
def test_advantages_are_the_textbooks_group_by_group(scale, delta):
    for G in range(2, 9):
        rewards = mixed(5, G, seed=G)
        found = group_advantages(torch.tensor(rewards), delta, scale)
        for A, group in zip(found.tolist(), rewards, strict=True):
            assert pytest.approx(A, rel=1e-5) == textbook.advantages(group, scale, delta)


LENGTHS = (3, 1, 7, 5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("beta, clip", [(0.0, 0.2), (0.3, 0.2), (0.3, 0.1)])
def test_the_loss_equals_the_textbook_in_float64(loss_type, beta, clip):
    """Value and gradient, also if the step is split into two halves with the step's weights."""
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
    config = TrainConfig(loss_type=loss_type, beta=beta, clip=clip)
    now = [free[row][mask[row]] for row in range(4)]
    assert 0.35 < textbook.clipped(rows, now, clip) < 0.65
    wanted = textbook.textbook_loss(rows, now, config, max_new_tokens=8)
    [gradient] = torch.autograd.grad(wanted, free)
    w = token_weights(torch.tensor([LENGTHS]), loss_type, max_length=8)[0]
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        own = new.clone().requires_grad_()
        value = sum(
            grpo_loss(
                own[i], old[i], ref[i] if beta else None, A[i], mask[i], w[i], clip=clip, beta=beta
            )
            for i in parts
        )
        value.backward()
        assert value.item() == pytest.approx(wanted.item(), rel=1e-12)
        assert relative_error(own.grad, gradient) < 1e-12


def test_the_papers_values_are_the_defaults():
    rng = torch.Generator().manual_seed(0)
    new, old, ref = torch.randn(3, 4, 8, generator=rng)
    A, mask = torch.randn(4, generator=rng), torch.randn(4, 8, generator=rng) > 0
    w = token_weights(mask.sum(dim=1)[None], "dapo", max_length=8)[0].float()
    assert grpo_loss(new, old, ref, A, mask).item() == pytest.approx(
        grpo_loss(new, old, ref, A, mask, w, clip=0.2, beta=0.001).item(), rel=1e-6
    )
    config = TrainConfig()
    assert (config.clip, config.beta, config.loss_type) == (0.2, 0.001, "dapo")
    assert (config.lr, config.warmup, config.max_grad_norm) == (5e-7, 0.03, 1.0)
    assert (config.steps, config.batch_size, config.group_size) == (1750, 256, 8)
    assert config.scale_advantages and config.updates == 1


def test_clip_takes_the_worse_of_both_for_both_signs():
    """min(ratio A, clip(ratio) A): good tokens stop being pushed up, bad ones down."""
    for A, ratio, flows in ((1, 1.5, False), (1, 0.5, True), (-1, 0.5, False), (-1, 1.5, True)):
        logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
        old = torch.zeros(1, 1)
        advantages, mask = torch.tensor([float(A)]), torch.ones(1, 1).bool()
        loss = grpo_loss(logprobs, old, None, advantages, mask, beta=0.0)
        loss.backward()
        assert (logprobs.grad.abs().item() > 0) == flows
        bounded = min(max(ratio, 0.8), 1.2)
        assert loss.item() == pytest.approx(-min(ratio * A, bounded * A))


def test_k3_is_the_formula_also_where_the_models_hardly_differ():
    def k3(d: Tensor) -> Tensor:
        return grpo.kl_k3(torch.zeros_like(d), d, torch.ones_like(d).bool())

    for d in (-3.0, -0.1, 0.0, 0.1, 3.0):
        assert k3(torch.tensor(d)).item() == pytest.approx(math.exp(d) - 1 - d, rel=1e-5)
    small = torch.tensor([-1e-3, 1e-3, 2e-3])  # exp(d) - 1 in float32 would leave four digits
    assert torch.allclose(k3(small), small**2 / 2, rtol=2e-3, atol=0)


def test_nothing_outside_the_mask_is_trained():
    """Invariant 3: other log-probabilities outside the mask leave loss and gradient as they are."""
    rng = torch.Generator().manual_seed(0)
    logprobs, old, ref = (torch.randn(3, 7, generator=rng) for _ in range(3))
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 2:4] = mask[1, 1:7] = mask[2, 6] = True
    A = torch.randn(3, generator=rng)
    for loss_type in LOSS_TYPES:
        w = token_weights(mask.sum(dim=1)[None], loss_type, max_length=7)[0].float()
        free = logprobs.clone().requires_grad_(True)
        value = grpo_loss(free, old, ref, A, mask, w)
        value.backward()
        assert (free.grad[~mask] == 0).all() and (free.grad[mask] != 0).any()
        wild = torch.where(mask, logprobs, torch.randn(3, 7, generator=rng) * 500)
        wild.requires_grad_(True)
        other = grpo_loss(wild, old, ref, A, mask, w)
        other.backward()
        assert other.item() == value.item() and torch.equal(wild.grad, free.grad)
    inside = logprobs.clone()
    inside[0, 2] += 0.1
    assert grpo_loss(inside, old, ref, A, mask) != grpo_loss(logprobs, old, ref, A, mask)


# -- The mask and the log-probabilities ------------------------------------------------------------


def test_the_mask_is_by_position():
    """The end-of-turn token, 0, is trained where the model wrote it; padding, also 0, is not."""
    context, turns = [5, 0, 7], ([8, 9, 0], [8, 0], [0])
    rows = [Row(context, turn, [-1.0 - t for t in range(len(turn))], None, 0.0) for turn in turns]
    found = pack_group([conversation(0, row, correct=False) for row in rows])
    assert found.context == context and found.branches == [*turns]
    assert found.targets.tolist() == [[8, 9, 0], [8, 0, 0], [0, 0, 0]]
    assert found.mask.int().tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert found.old_logprobs.tolist() == [[-1, -2, -3], [-1, -2, 0], [-1, 0, 0]]


class ReflectionAndRetryTrained(Conversation):
    def trained_turns(self):
        return [self.reflection, self.retry]


def test_two_trained_turns_are_one_branch_with_a_gap(exact):
    """What the user says between them is read and not trained. The reflection's end-of-turn token
    is the one that the model sampled (2), also where the template writes another one (0)."""
    context = [5, 1, 7]
    reflections, retries = ([8, 9, 2], [8, 2]), ([4, 2], [6, 3, 2])
    group, plain = [], []
    for reflection, retry in zip(reflections, retries, strict=True):
        c = conversation(0, Row(context, reflection, [-1.0] * len(reflection), None, 0.0), True)
        prompt = context + reflection[:-1] + [0, 11, 12]
        c.retry = Turn(prompt, retry, truncated=False, logprobs=[-2.0] * len(retry))
        group.append(ReflectionAndRetryTrained(**vars(c)))
        plain.append(textbook.logprobs(exact, context, reflection))
        plain.append(textbook.logprobs(exact, prompt, retry))
    rows = pack_group(group)
    assert rows.branches == [[8, 9, 0, 11, 12, 4, 2], [8, 0, 11, 12, 6, 3, 2]]
    assert rows.targets.tolist() == [[8, 9, 2, 0, 0, 4, 2], [8, 2, 0, 0, 6, 3, 2]]
    assert rows.mask.int().tolist() == [[1, 1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1, 1]]
    assert rows.old_logprobs.tolist() == [[-1, -1, -1, 0, 0, -2, -2], [-1, -1, 0, 0, -2, -2, -2]]
    found = token_logprobs(exact, rows)
    assert relative_error(found[rows.mask], torch.cat(plain)) < 1e-9
    assert (found[~rows.mask] == 0).all()


SIZES = [(30, 1, 2), (9, 7, 3), (40, 12, 8), (1, 20, 5), (17, 40, 2)]


@pytest.mark.parametrize("context, longest, G", SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_packed_row_is_one_row_per_reflection(
    exact, monkeypatch, context, longest, G, temperature
):
    """Invariant 4: the same log-probabilities and gradients, to 1e-9 in float64; also with gradient
    checkpointing, and with the logits computed in chunks."""
    [group] = draw_groups(exact, [(context, longest)], G)
    [conversations] = conversations_of([group], [[1.0] + [0.0] * (G - 1)])
    rows = pack_group(conversations)
    exact.zero_grad(set_to_none=True)
    plain, weigh, mask = [], torch.randn(rows.mask.shape, dtype=torch.float64), rows.mask
    for row in group:
        plain.append(textbook.logprobs(exact, row.context, row.reflection, temperature))
    (torch.cat(plain) * weigh[mask]).sum().backward()
    wanted = torch.cat([p.grad.flatten() for p in exact.parameters()])
    for checkpointing, logits in ((False, 2**25), (True, 2**25), (False, 1), (True, 400)):
        monkeypatch.setattr(grpo, "MAX_LOGITS", logits)
        exact.gradient_checkpointing = checkpointing
        exact.zero_grad(set_to_none=True)
        new = token_logprobs(exact, rows, temperature)
        assert new.shape == mask.shape and (new[~mask] == 0).all()
        assert relative_error(new[mask], torch.cat(plain)) < 1e-9
        (new * weigh).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in exact.parameters()])
        assert relative_error(gradient, wanted) < 1e-9


def test_any_mask_is_computed(exact):
    """Trained tokens may begin late, have gaps, and end early."""
    [group] = draw_groups(exact, [(6, 9)], 4)
    for row in group:
        row.reflection, row.old = (row.reflection * 9)[:9], [0.0] * 9
    rows = pack_group(conversations_of([group], [[1.0, 0, 0, 0]])[0])
    mask = torch.zeros_like(rows.mask)
    mask[0, 0:3] = mask[1, 4:9] = mask[2, [1, 3, 6]] = mask[3, 8] = True
    found = token_logprobs(exact, rows._replace(mask=mask))
    for row, values, marks in zip(group, found, mask, strict=True):
        wanted = textbook.logprobs(exact, row.context, row.reflection)
        assert relative_error(values[marks], wanted[marks]) < 1e-9


def test_the_logits_of_one_chunk_exist_at_a_time(tiny, monkeypatch):
    model, sizes = tiny[0], []
    [group] = draw_groups(model, [(5, 12)], 4)
    rows = pack_group(conversations_of([group], mixed(1, 4))[0])
    head = model.head
    model.head = lambda hidden: sizes.append(len(hidden)) or head(hidden)
    monkeypatch.setattr(grpo, "MAX_LOGITS", 10 * model.vocab_size + 5)
    new = token_logprobs(model, rows)
    assert sum(sizes) == rows.mask.sum() and max(sizes) == 10
    new.sum().backward()
    assert sum(sizes) == 2 * rows.mask.sum()  # computed again in the backward pass, not stored
    with torch.no_grad():
        token_logprobs(model, rows)
    assert sum(sizes) == 3 * rows.mask.sum()


def test_conversations_without_a_common_context_are_refused():
    group = [conversation(0, Row([1, 2, 3], [4], [-1.0], None, 0.0), True) for _ in range(2)]
    assert pack_group(group).context == [1, 2, 3]
    group[1].reflection = Turn([9, 2, 3], [4], truncated=False, logprobs=[-1.0])
    with pytest.raises(ValueError, match="must begin with the same context"):
        pack_group(group)


# -- A whole step ----------------------------------------------------------------------------------

GROUPS = [(40, 12), (3, 20), (17, 1), (25, 6), (9, 9)]
# beta, temperature, whether advantages are scaled, and the type of the loss
KINDS = [
    (0.0, 1.0, True, "dapo"),
    (0.3, 1.0, True, "grpo"),
    (0.3, 0.7, False, "dapo"),
    (0.3, 0.7, False, "dr_grpo"),
]
OTHER_KINDS = [
    pytest.param(*kind, marks=pytest.mark.slow)
    for kind in itertools.product((0.0, 0.3), (1.0, 0.7), (True, False), LOSS_TYPES)
    if kind not in KINDS
]


def agent_of(tiny, task, temperature: float = 1.0) -> Agent:
    return Agent(*tiny, task, max_new_tokens=MAX_NEW_TOKENS, temperature=temperature, seed=3)


def some_rewards(P: int, G: int, seed: int = 0) -> list[list[float]]:
    """Groups with both rewards, except that the third has only ones and the last only zeros."""
    rewards = mixed(P, G, seed)
    rewards[2], rewards[-1] = [1.0] * G, [0.0] * G
    return rewards


@pytest.mark.parametrize("beta, temperature, scale, loss_type", [*KINDS, *OTHER_KINDS])
def test_a_step_equals_the_textbook(
    exact, tiny, task, tmp_path, monkeypatch, beta, temperature, scale, loss_type
):
    """Two steps of `train`: the gradient over all failures, and the loss, are the textbook's.

    The gradients of the masters are float32; the rest is float64.
    """
    reference = moved(exact) if beta else None
    config = TrainConfig(
        steps=2, batch_size=5, group_size=4, loss_type=loss_type, beta=beta,
        scale_advantages=scale, lr=1e-3, clip=0.1, checkpointing=temperature != 1.0,
    )  # fmt: skip
    agent, rows, steps = agent_of((exact, tiny[1]), task, temperature), [], []
    for step in range(2):
        groups = draw_groups(exact, GROUPS, 4, step, temperature, reference)
        steps.append(conversations_of(groups, some_rewards(5, 4, step), scale))
        rows.append(flat(groups))
    gradients = prepare(monkeypatch, steps)
    training = grpo.train(agent, reference, failures_of(steps[0]), config, tmp_path)
    assert next(training) == (0, {})
    before = weights(exact)
    assert exact.gradient_checkpointing == config.checkpointing
    for step in range(2):
        value, wanted = textbook.textbook(exact, rows[step], config, MAX_NEW_TOKENS, temperature)
        done, metrics = next(training)
        assert done == step + 1
        assert relative_error(gradients[step], wanted) < 1e-6
        # The loss is a sum of float32 terms of about 1, which may nearly cancel.
        assert metrics["loss"] == pytest.approx(value, rel=1e-6, abs=1e-6)
        assert metrics["grad_norm"] == pytest.approx(wanted.norm().item(), rel=1e-5)
        assert 0.2 < metrics["clipped"] < 0.8
    assert next(training, None) is None
    assert not torch.equal(before, weights(exact))


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_several_updates_on_the_same_samples(exact, tiny, task, tmp_path, monkeypatch, beta):
    """Each update has the textbook's gradient at the weights that the one before left, with the
    log-probabilities of sampling time; and the learning rate is the step's."""
    reference = moved(exact) if beta else None
    groups = draw_groups(exact, GROUPS, 4, reference=reference, noise=0.1)
    steps = [conversations_of(groups, some_rewards(5, 4))]
    gradients = prepare(monkeypatch, steps)
    config = TrainConfig(steps=1, batch_size=5, group_size=4, updates=3, beta=beta, lr=1e-2)
    update, wanted = grpo.MasterAdamW.update, []

    def update_after_the_textbook(optimizer, lr, *arguments, **options):
        assert lr == 1e-2
        wanted.append(textbook.textbook(exact, flat(groups), config, MAX_NEW_TOKENS)[1])
        return update(optimizer, lr, *arguments, **options)

    monkeypatch.setattr(grpo.MasterAdamW, "update", update_after_the_textbook)
    agent = agent_of((exact, tiny[1]), task)
    _, (_, metrics) = grpo.train(agent, reference, failures_of(steps[0]), config, tmp_path)
    assert len(gradients) == len(wanted) == 3 and metrics["mismatch"] > 0.1
    for gradient, expected in zip(gradients, wanted, strict=True):
        assert relative_error(gradient, expected) < 1e-6


def test_groups_of_equal_rewards_cost_nothing_without_kl(tiny, task, tmp_path, monkeypatch):
    model, computed = tiny[0], []
    groups = conversations_of(draw_groups(model, GROUPS, 4, reference=model), some_rewards(5, 4))
    packed = grpo.token_logprobs

    def recorded(model, *arguments, **options):
        computed.append(model)
        return packed(model, *arguments, **options)

    monkeypatch.setattr(grpo, "token_logprobs", recorded)
    prepare(monkeypatch, [groups])
    monkeypatch.setattr(grpo, "check_outputs", lambda *_, **__: None)
    reference = copy.deepcopy(model)
    for beta, times in ((0.0, {model: 3}), (0.3, {model: 5, reference: 5})):
        computed.clear()
        config = TrainConfig(steps=1, batch_size=5, group_size=4, beta=beta)
        training = grpo.train(
            agent_of(tiny, task), reference if beta else None, failures_of(groups), config,
            tmp_path / str(beta),
        )  # fmt: skip
        _, (_, metrics) = training
        assert {m: computed.count(m) for m in computed} == times
        assert (metrics["sampled_groups"], metrics["trained_groups"]) == (5, times[model])
    assert all(p.grad is None for p in reference.parameters())


def test_a_step_of_equal_rewards_alone_changes_nothing(tiny, task, tmp_path, monkeypatch):
    groups = conversations_of(draw_groups(tiny[0], GROUPS[:2], 3), [[1.0] * 3, [0.0] * 3])
    gradients = prepare(monkeypatch, [groups])
    before = weights(tiny[0])
    config = TrainConfig(steps=1, batch_size=2, group_size=3, beta=0.0)
    training = grpo.train(agent_of(tiny, task), None, failures_of(groups), config, tmp_path)
    _, (_, metrics) = training
    assert (gradients[0] == 0).all() and torch.equal(weights(tiny[0]), before)
    assert (metrics["grad_norm"], metrics["loss"], metrics["mixed_groups"]) == (0, 0, 0)


def test_a_step_without_any_group_changes_nothing(tiny, task, tmp_path, monkeypatch):
    """A variant may drop all failures that it drew."""
    monkeypatch.setattr(grpo, "rollout", lambda *_, **__: [])
    before = weights(tiny[0])
    failure = conversation(0, Row([1], [2], [-1.0], None, 0.0), False)
    config = TrainConfig(steps=1, batch_size=2, group_size=3, beta=0.0)
    _, (_, metrics) = grpo.train(agent_of(tiny, task), None, [failure], config, tmp_path)
    assert torch.equal(weights(tiny[0]), before)
    assert metrics["sampled_groups"] == metrics["trained_groups"] == metrics["grad_norm"] == 0


def test_metrics_are_means_over_the_trained_tokens(tiny, task, tmp_path, monkeypatch):
    model, reference = tiny[0], moved(tiny[0])
    rows = draw_groups(model, GROUPS, 4, temperature=0.8, reference=reference)
    groups = conversations_of(rows, mixed(5, 4))
    groups[0][1].reflection.truncated = groups[0][2].reflection.truncated = True
    rewards = [
        [float(c.retry_verdict.correct and not c.reflection.truncated) for c in group]
        for group in groups
    ]
    for group, values in zip(rows, rewards, strict=True):
        for row, A in zip(group, textbook.advantages(values), strict=True):
            row.advantage = A
    nll, kl, changes = [], [], []
    with torch.no_grad():
        now = [textbook.logprobs(model, r.context, r.reflection, 0.8) for r in flat(rows)]
    for row, values in zip(flat(rows), now, strict=True):
        for value, old, ref in zip(values.tolist(), row.old, row.ref, strict=True):
            nll.append(-value)
            kl.append(math.exp(ref - value) - (ref - value) - 1)
            changes.append(abs(value - old))
    share = textbook.clipped(flat(rows), now, 0.2)
    prepare(monkeypatch, [groups])
    config = TrainConfig(steps=1, batch_size=5, group_size=4, beta=0.01)
    agent = agent_of(tiny, task, 0.8)
    _, (_, metrics) = grpo.train(agent, reference, failures_of(groups), config, tmp_path)
    for name, values in (("nll", nll), ("kl", kl)):
        assert metrics[name] == pytest.approx(statistics.fmean(values), rel=1e-4), name
    assert metrics["mismatch"] == pytest.approx(max(changes), rel=1e-4)
    assert metrics["clipped"] == pytest.approx(share, rel=1e-6)
    assert metrics["reward"] == pytest.approx(statistics.fmean(flat(rewards)))
    assert metrics["reflection_tokens"] == pytest.approx(len(nll) / 20)
    assert metrics["sampled_tokens"] == len(nll) + 2 * 20
    assert metrics["truncated"] == 0.1
    assert metrics["mixed_groups"] == sum(0 < sum(values) < 4 for values in rewards) / 5


@pytest.mark.slow
def test_a_step_is_the_same_bits_each_time(tiny, task, tmp_path, monkeypatch):
    """Invariant 6: no sum depends on the order in which threads finish."""
    torch.set_num_threads(2)
    rows = draw_groups(tiny[0], [(90, 40)] * 2, G=8, noise=0.1)
    groups = conversations_of(rows, mixed(2, 8))
    gradients, found = prepare(monkeypatch, [groups]), []
    for number in range(3):
        model = copy.deepcopy(tiny[0])
        config = TrainConfig(steps=1, batch_size=2, group_size=8, beta=0.2, lr=1e-3)
        agent, folder = agent_of((model, tiny[1]), task), tmp_path / str(number)
        for _ in grpo.train(agent, tiny[0], failures_of(groups), config, folder):
            pass
        found.append(weights(model))
    for gradient, other in zip(gradients[1:], found[1:], strict=True):
        assert torch.equal(gradient, gradients[0]) and torch.equal(other, found[0])


def test_the_update_is_adamw_clipped_and_scheduled(tiny, task, tmp_path, monkeypatch):
    """Three steps: torch's plain AdamW with the same gradients, which start each step from zero."""
    model = tiny[0]
    config = TrainConfig(
        steps=3, batch_size=5, group_size=4, beta=0.0, lr=1e-2, warmup=0.5, max_grad_norm=0.01
    )
    rows = [draw_groups(model, GROUPS, 4, step) for step in range(3)]
    steps = [conversations_of(groups, mixed(5, 4, step)) for step, groups in enumerate(rows)]
    gradients, expected = prepare(monkeypatch, steps), copy.deepcopy(model)
    plain = torch.optim.AdamW(expected.parameters(), config.lr, weight_decay=0.0, fused=False)
    training = grpo.train(agent_of(tiny, task), None, failures_of(steps[0]), config, tmp_path)
    for done, metrics in training:
        if done:
            groups = flat(rows[done - 1])
            _, gradient = textbook.textbook(expected, groups, config, MAX_NEW_TOKENS)
            assert relative_error(gradients[-1], gradient) < 1e-4
            norm = gradients[-1].norm()
            assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 0.02
            assert metrics["lr"] == pytest.approx(0.01 * (0.5, 1.0, 1.0)[done - 1])
            parts = gradients[-1].split([p.numel() for p in expected.parameters()])
            for p, part in zip(expected.parameters(), parts, strict=True):
                p.grad = part.view_as(p) * (0.01 / norm)
            plain.param_groups[0]["lr"] = metrics["lr"]
            plain.step()
        # A wrong update is wrong by about the learning rate.
        assert (weights(model) - weights(expected)).abs().max() < 1e-3 * config.lr


def test_learning_rate_rises_then_falls_to_nearly_nothing():
    shares = [grpo.lr_multiplier(step, 100, 0.03) for step in range(100)]
    assert shares[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert shares[3] == 1.0 and all(a > b for a, b in zip(shares[3:], shares[4:], strict=False))
    assert shares[3 + 97 // 2] == pytest.approx(0.5, abs=0.01)
    assert 0 < shares[-1] < 0.001
    assert {grpo.lr_multiplier(0, 1, warmup) for warmup in (0.0, 0.03, 1.0)} == {1}


# -- The optimizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_gradient_that_is_not_finite_ends_the_run(tiny, task, tmp_path, monkeypatch, bad):
    """And changes nothing: the checkpoint of the step before is still the newest."""
    model = tiny[0]
    rows = draw_groups(model, GROUPS[:2], 3)
    good = conversations_of(rows, mixed(2, 3))
    broken_rows = copy.deepcopy(rows)
    broken_rows[1][2].old[7] = bad  # its retry is wrong
    broken, found = conversations_of(broken_rows, mixed(2, 3)), []
    prepare(monkeypatch, [good, good, broken])
    config = TrainConfig(steps=4, batch_size=2, group_size=3, beta=0.0, lr=1e-3, save_every=1)
    with pytest.raises(ValueError, match="the gradient is not finite"):
        for _ in grpo.train(agent_of(tiny, task), None, failures_of(good), config, tmp_path):
            found.append(weights(model))
    assert len(found) == 3 and torch.equal(weights(model), found[2])
    assert not torch.equal(found[1], found[2])
    state = {"position": 4}  # of the stream of failures
    assert grpo.load_checkpoint(tmp_path, MasterAdamW(model, 1e-3)) == (2, state)


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
    """256 small gradients and a large one: in bfloat16, each small one would be rounded to zero.
    Only those that are gathered together with the large one are."""
    model = tiny[0].bfloat16()
    optimizer = MasterAdamW(model, 1e-3)
    for number in range(257):
        for p in model.parameters():
            gradient = torch.full_like(p, 2**-9 if number else 1.0)
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        optimizer.after_backward()
        waits = (number + 1) % grpo.PASSES_PER_MOVE > 0
        assert all((p.grad is not None) == waits for p in model.parameters())
    optimizer.move_gradients()
    lost = (grpo.PASSES_PER_MOVE - 1) * 2**-9
    for master in optimizer.masters:
        assert master.dtype == master.grad.dtype == torch.float32
        assert (master.grad == 1.5 - lost).all()


def test_a_steps_gradients_add_up_in_float32(tiny, task, tmp_path, monkeypatch):
    """The gradients of two groups of a bfloat16 model are added up in bfloat16, and their sums in
    float32."""
    monkeypatch.setattr(grpo, "PASSES_PER_MOVE", 2)
    model = copy.deepcopy(tiny[0]).bfloat16()
    groups, wanted = conversations_of(draw_groups(tiny[0], GROUPS, 4), mixed(5, 4)), 0.0
    lengths = torch.tensor([[len(c.reflection.tokens) for c in group] for group in groups])
    for i, w in enumerate(token_weights(lengths, "dapo", MAX_NEW_TOKENS)):
        rows = pack_group(groups[i])
        correct = [[float(c.retry_verdict.correct) for c in groups[i]]]
        A = group_advantages(torch.tensor(correct))[0]
        new = token_logprobs(model, rows)
        grpo_loss(new, rows.old_logprobs, None, A, rows.mask, w.to(new), beta=0.0).backward()
        if i in (1, 3, 4):
            wanted = wanted + torch.cat([p.grad.flatten().float() for p in model.parameters()])
            model.zero_grad(set_to_none=True)
    gradients = prepare(monkeypatch, [groups])
    config = TrainConfig(steps=1, batch_size=5, group_size=4, beta=0.0)
    agent = agent_of((model, tiny[1]), task)
    for _ in grpo.train(agent, None, failures_of(groups), config, tmp_path):
        pass
    assert torch.equal(gradients[0], wanted)


def test_bfloat16_moves_with_masters_and_hardly_without(task, tmp_path, monkeypatch):
    """At the paper's learning rate: four steps from the same bfloat16 weights, on the same data."""
    low, tokenizer = shallow_model(task.words(), seed=1, num_layers=2)
    low = low.bfloat16()
    start = copy.deepcopy(low).float()
    rows = [draw_groups(start, [(9, 8)] * 3, 8, step, noise=0.02) for step in range(4)]
    steps = [conversations_of(groups, mixed(3, 8, step)) for step, groups in enumerate(rows)]
    prepare(monkeypatch, steps)
    config = TrainConfig(steps=4, batch_size=3, group_size=8, beta=0.0, warmup=0.0)
    runs = iter(range(9))

    def trained(model, **changes):
        """How far the weights that are trained have moved, and what the model's own are then."""
        optimizers = []
        made = MasterAdamW.__init__

        def keep(optimizer, *arguments, **options):
            made(optimizer, *arguments, **options)
            optimizers.append((optimizer, [m.detach().clone() for m in optimizer.masters]))

        monkeypatch.setattr(MasterAdamW, "__init__", keep)
        agent = agent_of((model, tokenizer), task)
        folder = tmp_path / str(next(runs))
        changed, failures = replace(config, **changes), failures_of(steps[0])
        for _ in grpo.train(agent, None, failures, changed, folder):
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
    adamw = torch.optim.AdamW(plain.parameters(), config.lr, weight_decay=0.0)
    for step in range(4):
        for group in steps[step]:
            rows = pack_group(group)
            A = group_advantages(torch.tensor([[float(c.retry_verdict.correct) for c in group]]))[0]
            new = token_logprobs(plain, rows)
            grpo_loss(new, rows.old_logprobs, None, A, rows.mask, beta=0.0).backward()
        adamw.step()
        adamw.zero_grad()
    assert (weights(plain) != weights(low)).float().mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offload_changes_no_bit(tiny, task, tmp_path, monkeypatch, dtype):
    groups = conversations_of(draw_groups(tiny[0], GROUPS, 4, noise=0.1), mixed(5, 4))
    prepare(monkeypatch, [groups] * 3)
    found = []
    for offload in (False, True):
        model = copy.deepcopy(tiny[0]).to(dtype)
        config = TrainConfig(
            steps=3, batch_size=5, group_size=4, beta=0.0, lr=1e-3, offload=offload
        )
        agent, folder = agent_of((model, tiny[1]), task), tmp_path / str(offload)
        for _ in grpo.train(agent, None, failures_of(groups), config, folder):
            pass
        found.append(weights(model))
        assert not torch.equal(found[-1], weights(tiny[0]).to(dtype))
    assert torch.equal(*found)


def test_offloaded_masters_are_copies_in_cpu_memory(tiny):
    own, offloaded = MasterAdamW(tiny[0], 1e-3), MasterAdamW(tiny[0], 1e-3, offload=True)
    for weight, one, other in zip(
        tiny[0].parameters(), own.masters, offloaded.masters, strict=True
    ):
        assert one is weight and other is not weight
        assert other.data_ptr() != weight.data_ptr() and other.device.type == "cpu"
        assert torch.equal(weight, other)


# -- The rollout -----------------------------------------------------------------------------------


class LenientAgent(Agent):
    """An agent whose verifier an untrained model satisfies now and then."""

    def verify(self, problem, turn):
        correct = sum(turn.tokens) % 3 == 0
        return Verdict(correct, "correct" if correct else "wrong_value")


@pytest.fixture
def agent(tiny, task):
    model, tokenizer = tiny
    tokenizer.stop_ids = list(range(20))  # so that turns end at different times
    return LenientAgent(model, tokenizer, task, max_new_tokens=10, seed=3)


@pytest.fixture
def failures(agent, task):
    """Wrong attempts at a few problems, of unequal lengths."""
    attempts = grpo.attempt_all(agent, task.load(split="dev", limit=40), 1, (grpo.COLLECT, 0))
    wrong = [c for c in attempts if not c.attempt_verdict.correct][:7]
    assert len(wrong) == 7
    return wrong


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_the_sampler_recorded_the_trainer_computes(agent, failures, tmp_path, temperature):
    """Invariant 2: for each trained token of a rollout, and in a step's `mismatch`."""
    agent.temperature = temperature
    groups = grpo.rollout(agent, failures, 4, (grpo.TRAIN, 0))
    for group in groups:
        for kind in (Conversation, ReflectionAndRetryTrained):
            rows = pack_group([kind(**vars(c)) for c in group])
            with torch.no_grad():
                new = token_logprobs(agent.model, rows, temperature)
            assert_close(new, rows.old_logprobs)
            assert (rows.old_logprobs[rows.mask] < -0.1).any()
    tokenizer, task = agent.tokenizer, agent.task
    for c in flat(groups):
        prompt = c.attempt.prompt
        for turn, instruction in (
            (c.attempt, task.reflection_instruction),
            (c.reflection, task.retry_instruction),
        ):
            assert turn.prompt == prompt
            ended = turn.tokens[-1] in tokenizer.stop_ids
            assert turn.truncated != ended and len(turn.tokens) == len(turn.logprobs) <= 10
            kept = turn.tokens[:-1] if ended else turn.tokens  # the template ends the turn
            prompt = prompt + kept + tokenizer.bridge(instruction)
        assert c.retry.prompt == prompt
    config = TrainConfig(steps=2, batch_size=5, group_size=4, lr=1e-3, beta=0.01)
    reference, kl = copy.deepcopy(agent.model), []
    for step, metrics in grpo.train(agent, reference, failures, config, tmp_path):
        if step:
            assert metrics["mismatch"] < 1e-4 * metrics["nll"] and metrics["clipped"] == 0
            kl.append(metrics["kl"])
    assert kl[0] < 1e-3 * kl[1]  # policy and reference begin as one


def test_the_reward_is_for_a_correct_retry_after_a_reflection_that_ended(agent, failures, tmp_path):
    """And samples.jsonl has what was sampled, with rewards, advantages and the trained tokens, in
    the order in which the failures were drawn."""
    agent.tokenizer.stop_ids = [0, *range(20, 30)]  # some reflections end, some are truncated
    config = TrainConfig(steps=3, batch_size=3, group_size=6, beta=0.0, lr=1e-3)
    rewards, model = [], copy.deepcopy(agent.model)
    for step, metrics in grpo.train(agent, None, failures, config, tmp_path):
        if step:
            rewards.append(metrics["reward"])
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 3 * 6
    stream = FailureStream(failures, agent.seed)
    for step in range(3):
        records = [line for line in lines if line["step"] == step + 1]
        drawn = stream.draw(3)
        identities = [(line["problem"]["id"], line["attempt_index"]) for line in records]
        assert identities == [failure.attempt_id for failure in drawn for _ in range(6)]
        assert [line["reflection_index"] for line in records] == [*range(6)] * 3
        values = [line["reward"] for line in records]
        assert statistics.fmean(values) == pytest.approx(rewards[step])
        A = group_advantages(torch.tensor(values).view(3, 6)).flatten()
        assert [line["advantage"] for line in records] == pytest.approx(A.tolist())
    first = FailureStream(failures, agent.seed).draw(3)
    groups = grpo.rollout(replace(agent, model=model), first, 6, (grpo.TRAIN, 0))
    outcomes, decode = set(), agent.tokenizer.tokenizer.decode
    for c, line in zip(flat(groups), lines, strict=False):
        ended = c.reflection.tokens[-1] in agent.tokenizer.stop_ids
        correct = sum(c.retry.tokens) % 3 == 0
        outcomes.add((ended, correct))
        assert c.reflection.truncated != ended and line["reward"] == (ended and correct)
        for name in ("attempt", "reflection", "retry"):
            turn = getattr(c, name)
            text = decode(turn.tokens, skip_special_tokens=False)
            expected = {"text": text, "tokens": turn.tokens, "truncated": turn.truncated}
            assert line[name] == expected
        assert line["context"] == decode(c.reflection.prompt, skip_special_tokens=False)
        reason = "correct" if correct else "wrong_value"
        assert line["retry_verdict"] == {"correct": correct, "reason": reason}
        assert line["attempt_verdict"] == {"correct": False, "reason": "wrong_value"}
    assert len(outcomes) == 4  # ended or truncated, correct or wrong


def test_every_step_samples_anew_and_every_sample_is_its_own(agent, failures):
    one, two = (flat(grpo.rollout(agent, failures, 3, (grpo.TRAIN, step))) for step in (0, 1))
    assert [c.reflection for c in one] != [c.reflection for c in two]
    for conversations in (one, two):
        for name in ("reflection", "retry"):
            turns = {tuple(getattr(c, name).tokens) for c in conversations}
            assert len(turns) > 1.5 * len(failures)
    problems, rng_prefix = [f.problem for f in failures], (grpo.EVALUATE, 0)
    five = grpo.attempt_all(agent, problems, 5, rng_prefix)
    three = grpo.attempt_all(agent, problems, 3, rng_prefix, first_index=2)
    assert three == [c for c in five if c.attempt_index > 1]
    other = flat(grpo.rollout(replace(agent, seed=4), failures, 3, (grpo.TRAIN, 0)))
    assert [c.reflection for c in one] != [c.reflection for c in other]


def test_groups_are_in_the_order_of_their_failures(agent, failures):
    failures = failures[3:] + failures[:3]
    groups = grpo.rollout(agent, failures, 3, (grpo.TRAIN, 0))
    assert [[c.attempt_id for c in group] for group in groups] == [
        [f.attempt_id] * 3 for f in failures
    ]
    assert [[c.reflection_index for c in group] for group in groups] == [[0, 1, 2]] * 7


def limit_rows(model, rows: int, only: range = range(10**6)) -> list[int]:
    """Let the model run out of memory with more than this many rows, in the calls numbered in
    `only`. Returns a list, to which the number of rows of each call is added."""
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
        attempts = grpo.attempt_all(agent, problems, 3, (grpo.EVALUATE, 0), first_index=2)
        return attempts, grpo.rollout(agent, failures, 3, (grpo.TRAIN, 0))

    wanted = sampled()
    assert [c.attempt_id for c in wanted[0]] == [(p.id, i) for p in problems for i in (2, 3, 4)]
    agent.cache_tokens = 10_000
    calls = limit_rows(agent.model, 12)  # a batch of 7, with 3 samples each, is too large
    assert sampled() == wanted and max(calls) == 21
    assert agent.cache_tokens < 7 * grpo.cache_tokens_needed(agent, problems[0], 3, turns=1)
    calls.clear()
    agent.cache_tokens = 500  # this fits
    assert sampled() == wanted
    assert max(calls) <= 12 and agent.cache_tokens == 500
    del agent.model.hidden
    limit_rows(agent.model, 2)  # the samples of one item are too many
    with pytest.raises(torch.OutOfMemoryError):
        grpo.attempt_all(agent, problems, 3, (grpo.EVALUATE, 0))
    with pytest.raises(torch.OutOfMemoryError):
        grpo.rollout(agent, failures, 3, (grpo.TRAIN, 0))


def test_one_halving_of_the_cache_is_for_all_remaining_batches(agent, failures):
    """Several batches of a step are each too large: the cache is halved once, not for each."""
    wanted = grpo.rollout(agent, failures, 3, (grpo.TRAIN, 0))
    sizes = [len(f.attempt.prompt + f.attempt.tokens) + 3 * 2 * 60 for f in failures]
    agent.cache_tokens = 2 * max(sizes)
    calls = limit_rows(agent.model, 3)
    assert grpo.rollout(agent, failures, 3, (grpo.TRAIN, 0)) == wanted
    assert agent.cache_tokens == max(sizes) and sum(rows > 3 for rows in calls) == 1


@pytest.mark.parametrize("call", [0, 5, 11, 14])
def test_out_of_memory_at_any_moment_changes_nothing(agent, failures, call):
    """While prompts are read or turns are sampled: no conversation is lost, and none is doubled."""
    wanted = grpo.rollout(agent, failures, 3, (grpo.TRAIN, 0))
    calls = limit_rows(agent.model, 0, only=range(call, call + 1))
    assert grpo.rollout(agent, failures, 3, (grpo.TRAIN, 0)) == wanted
    assert len(calls) > call + 10


def test_batches_hold_what_the_budget_allows_the_longest_first(agent, task, failures):
    problems = task.load(split="dev", limit=9)
    longer = []
    for i, failure in enumerate(failures):
        attempt = replace(failure.attempt, tokens=failure.attempt.tokens * (1 + 40 * i))
        longer.append(replace(failure, attempt=attempt))
    for items, turns in ((problems, 1), (longer, 2)):
        lengths = {}
        for item in items:
            prompt = (
                agent.attempt_prompt(item)
                if turns == 1
                else item.attempt.prompt + item.attempt.tokens
            )
            lengths[id(item)] = len(prompt) + 4 * turns * (10 + 50)
        for budget in (1, 700, 1_500, 2_500, 3_000, 3_500, 10**6):
            agent.cache_tokens = budget
            remaining, batches = grpo.longest_first(agent, items), []
            while remaining:
                batches.append(grpo.next_batch(agent, remaining, 4, turns))
                remaining = remaining[len(batches[-1]) :]
            in_order = [lengths[id(item)] for item in flat(batches)]
            assert in_order == sorted(lengths.values(), reverse=True)
            assert {id(item) for item in flat(batches)} == lengths.keys()
            for batch in batches:
                assert len(batch) == 1 or len(batch) * lengths[id(batch[0])] <= budget
            for batch in batches[:-1]:  # one more would not fit
                assert (len(batch) + 1) * lengths[id(batch[0])] > budget


def identities(conversations) -> list[tuple[int, int]]:
    return [c.attempt_id for c in conversations]


def test_every_failure_is_drawn_once_an_epoch_and_never_twice_a_step(failures):
    many = [
        replace(failures[0], attempt_index=i, problem=replace(failures[0].problem, id=p))
        for p in range(5)
        for i in range(2)
    ]
    everything, stream = identities(many), FailureStream(many, seed=0)
    steps = [identities(stream.draw(5)) for _ in range(4)]
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == everything
    assert steps[:2] != steps[2:] and steps[0] + steps[1] != everything
    stream = FailureStream(many, seed=0)
    for _ in range(9):  # across the borders of epochs
        drawn = identities(stream.draw(7))
        assert 4 <= len(drawn) == len(set(drawn)) <= 7
    assert sorted(identities(FailureStream(many, seed=0, position=75).draw(25))) == everything
    assert identities(FailureStream(many, seed=1).draw(5)) != steps[0]
    with pytest.raises(ValueError, match="there are no failures to train on"):
        FailureStream([], seed=0).draw(5)


def test_the_order_of_failures_does_not_depend_on_how_many_are_drawn_at_a_time(failures):
    """So a variant may draw more or less often; and the position is all that a resume needs."""
    stream = FailureStream(failures, seed=0)
    order = [identity for _ in range(21) for identity in identities(stream.draw(1))]
    assert stream.position == 21
    stream, drawn = FailureStream(failures, seed=0), []
    for size in (1, 4, 2, 7, 3, 4):  # no batch crosses the border of an epoch
        drawn += identities(stream.draw(size))
    assert drawn == order
    assert identities(FailureStream(failures, seed=0, position=9).draw(5)) == order[9:14]


def test_a_conversation_is_read_as_it_was_written(agent, failures):
    agent.tokenizer.stop_ids = [0, *range(20, 30)]  # some turns end, some are truncated
    reflected, _ = grpo.sample_reflections(agent, failures, 2, (grpo.TRAIN, 0))
    retried = grpo.sample_retries(agent, reflected, (grpo.TRAIN, 0))
    truncated = [c.reflection.truncated for c in retried]
    assert any(truncated) and not all(truncated)
    for c in [*failures, *reflected, *retried]:
        record = json.loads(json.dumps(grpo.to_json(c, agent.tokenizer)))
        loaded = grpo.from_json(record, agent)
        assert loaded == c and loaded.reflection_index == c.reflection_index
        for key in record:  # whatever is missing is named
            if key not in ("reflection", "retry", "retry_verdict"):
                with pytest.raises(KeyError, match=key):
                    grpo.from_json({k: v for k, v in record.items() if k != key}, agent)


# -- Stopping and resuming ------------------------------------------------------------------------

LOGS = ("metrics.jsonl", "samples.jsonl")


def run(agent, failures, folder, model, until: int = 10**6, **changes) -> Tensor:
    """Train a copy of a model and leave after `until` steps as if killed. Returns its weights."""
    own = replace(agent, model=copy.deepcopy(model))
    settings = {"steps": 4, "batch_size": 2, "group_size": 3, "lr": 1e-3, "beta": 0.1}
    config = TrainConfig(**{**settings, "save_every": 2, **changes})
    reference = model if config.beta else None
    for step, metrics in grpo.train(own, reference, failures, config, folder):
        metrics["measured"] = step * 7  # the caller's own, which `train` logs
        if step == until:
            break
    return weights(own.model)


@pytest.mark.parametrize(
    "dtype, changes, moments",
    [
        (torch.float32, {}, range(4)),
        (torch.float32, {"offload": True}, [3]),
        (torch.bfloat16, {"beta": 0.0}, [3]),
        (torch.float32, {"updates": 2, "steps": 5, "batch_size": 3}, [3, 4]),
    ],
    ids=str,
)
def test_a_resumed_run_is_one_that_never_stopped(
    agent, failures, one_layer, tmp_path, dtype, changes, moments
):
    """Invariant 6, bit for bit: weights, moments, logs; killed after each of the steps, or after
    some that follow a checkpoint."""
    model = one_layer[0].to(dtype)
    whole = run(agent, failures, tmp_path / "whole", model, **changes)
    for until in moments:
        folder = tmp_path / str(until)
        run(agent, failures, folder, model, until, **changes)
        folder.mkdir(exist_ok=True)
        with open(folder / "samples.jsonl", "a") as file:
            file.write('{"step": 4, "prob')
        assert (folder / "checkpoint.safetensors").exists() == (until >= 3)
        assert torch.equal(run(agent, failures, folder, model, **changes), whole)
        names = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
        names.remove(Path("timings.jsonl"))  # all other files depend on the seed alone
        assert Path("checkpoint.safetensors") in names
        for name in names:
            same = (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
            assert same, name
    lines = (tmp_path / "3" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = changes.get("steps", 4)
    assert [r["step"] for r in records] == [*range(steps + 1)]
    assert [r["measured"] for r in records] == [step * 7 for step in range(steps + 1)]
    finished = run(agent, failures, tmp_path / "whole", model, **changes)
    assert torch.equal(finished, whole)  # there was nothing left to do


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


def test_train_keeps_the_state_of_a_variant(agent, failures, tmp_path):
    state = {"left out": [7], "position": 2}
    grpo.save_checkpoint(tmp_path, 1, MasterAdamW(agent.model, 1e-3), state)
    run(agent, failures, tmp_path, agent.model, steps=3)
    state["position"] = 6
    assert grpo.load_checkpoint(tmp_path, MasterAdamW(agent.model, 1e-3)) == (3, state)


def test_weights_that_never_had_a_gradient_have_no_moments(tiny, tmp_path):
    """A variant may leave some of them out of the loss."""
    optimizer = MasterAdamW(tiny[0], 1e-3)
    for master in optimizer.masters[:3]:
        master.grad = torch.ones_like(master)
    optimizer.update(1e-3, 1.0)
    grpo.save_checkpoint(tmp_path, 1, optimizer, {})
    other = MasterAdamW(copy.deepcopy(tiny[0]), 1e-3)
    assert grpo.load_checkpoint(tmp_path, other) == (1, {})
    for one, two in zip(optimizer.masters, other.masters, strict=True):
        assert torch.equal(one, two)
        kept = optimizer.state.get(one, {})
        assert other.state[two].keys() == kept.keys()
        assert all(torch.equal(kept[name], other.state[two][name]) for name in kept)
    other.masters[5].grad = torch.ones_like(other.masters[5])
    other.update(1e-3, 1.0)  # It begins with moments of zero.
    assert other.state[other.masters[5]]["step"] == 1


def edit_checkpoint(folder, edit) -> None:
    """Save the checkpoint in a folder again, after `edit` has changed the dict of its tensors."""
    path = folder / "checkpoint.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    edit(tensors)
    safetensors.torch.save_file(tensors, path, metadata)


@pytest.mark.parametrize("name", ["0.exp_avg", "2.weight", "1.step"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(tiny, tmp_path, name):
    saved(tiny[0], tmp_path)
    edit_checkpoint(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match="is damaged or belongs to another model"):
        grpo.load_checkpoint(tmp_path, MasterAdamW(tiny[0], 1e-3))


def test_a_damaged_checkpoint_is_named(tiny, tmp_path):
    """Cut, emptied, or its beginning overwritten: one line."""
    optimizer = saved(tiny[0], tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    ends = [len(whole) - 1, len(whole) // 2, 7, 0]
    for content in [*(whole[:end] for end in ends), b"\xff" * 16 + whole[16:], b"[]"]:
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match="checkpoint.safetensors is damaged or belongs"
        ) as error:
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
    with pytest.raises(ValueError, match=f"damaged or belongs to another model: .*{missing}"):
        grpo.load_checkpoint(tmp_path, optimizer)
    models.replace_file(path, tensors)  # and one that is no run's
    with pytest.raises(ValueError, match="damaged or belongs to another model"):
        grpo.load_checkpoint(tmp_path, optimizer)


@pytest.mark.parametrize("name", ["0.weight", "0.exp_avg", "3.exp_avg_sq", "1.step"])
def test_a_tensor_of_another_shape_is_refused(tiny, tmp_path, name):
    """A moment of another shape would be read beyond its end."""
    saved(tiny[0], tmp_path)

    def reshape(tensors):
        x = tensors[name]
        tensors[name] = x.T.contiguous() if x.dim() == 2 else torch.zeros(3)

    edit_checkpoint(tmp_path, reshape)
    before = weights(tiny[0])
    with pytest.raises(ValueError, match=f"belongs to another model: {name} has the shape"):
        grpo.load_checkpoint(tmp_path, MasterAdamW(tiny[0], 1e-3))
    assert torch.equal(weights(tiny[0]), before)


def test_a_batch_is_never_larger_than_the_failures(failures):
    stream = FailureStream(failures, seed=0)
    for number in range(1, 4):
        assert len(stream.draw(10**12)) == len(failures)
        assert stream.position == number * 2 * len(failures)


def test_another_models_checkpoint_is_refused(tiny, folder, tmp_path):
    """Of another vocabulary or architecture; or the same with more layers, or fewer."""
    saved(tiny[0], tmp_path / "a")
    others = [models.tiny_model(["1", "2"])[0], models.Model.from_pretrained(folder)]
    for layers in (3, 5):
        others.append(models.Model({**tiny[0].config_dict, "num_hidden_layers": layers}))
    for other in others:
        with pytest.raises(ValueError, match="is damaged or belongs to another model: .+"):
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
