"""Invariants 3 and 6, and the loss against the textbook."""

import copy
import doctest
import math
import shutil

import pytest
import torch

import grpo
import model as models
from grpo import Batch, Settings, group_advantages, grpo_loss, trained_mask


def random_batch(model, rows=6, seed=0, beta_ref=True, temperature=1.0) -> Batch:
    """Rows of unequal lengths, with log-probabilities that get some ratios clipped."""
    rng = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=rng))

    ids, spans, old, ref = [], [], [], []
    for _ in range(rows):
        context, length = draw(3, 12), draw(1, 9)
        row = torch.randint(0, model.config.vocab_size, (context + length,), generator=rng).tolist()
        with torch.no_grad():
            log_p = (model(torch.tensor([row]))[0] / temperature).log_softmax(-1)
        now = [log_p[t - 1, row[t]].item() for t in range(context, context + length)]
        ids.append(row)
        spans.append([(context, context + length)])
        old.append([v + 0.4 * torch.randn((), generator=rng).item() for v in now])
        ref.append([v + 0.4 * torch.randn((), generator=rng).item() for v in now])
    advantages = torch.randn(rows, generator=rng)
    return Batch(ids, spans, advantages, old_logprobs=old, ref_logprobs=ref if beta_ref else None)


def gradient_of(model, batch, settings):
    model.zero_grad(set_to_none=True)
    metrics = grpo.gradients(model, None, batch, settings)
    return metrics, torch.cat([p.grad.flatten().clone() for p in model.parameters()])


def test_worked_examples_in_docstrings():
    assert doctest.testmod(grpo, extraglobs={"torch": torch}).failed == 0
    assert doctest.testmod(grpo).attempted >= 2


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


def test_mask_is_by_position():
    mask = trained_mask([[(3, 5)], [(1, 2), (4, 6)]], width=6)
    assert mask.int().tolist() == [[0, 0, 1, 1, 0], [1, 0, 0, 1, 1]]


@pytest.mark.parametrize("loss", grpo.LOSSES)
@pytest.mark.parametrize("beta, temperature", [(0.0, 1.0), (0.3, 1.0), (0.3, 0.7)])
def test_step_equals_the_textbook_in_float64(tiny, loss, beta, temperature):
    model, _ = tiny
    settings = Settings(
        loss=loss, beta=beta, temperature=temperature, max_new_tokens=20, micro_tokens=40
    )
    batch = random_batch(model, temperature=temperature)
    metrics, ours = gradient_of(model, batch, settings)
    value, exact = grpo.textbook(model, batch, settings)
    assert 0.1 < metrics["clipped"] < 0.9
    assert metrics["loss"] == pytest.approx(value, rel=1e-5)
    assert ((ours - exact).norm() / exact.norm()).item() < 1e-5


@pytest.mark.parametrize("loss", grpo.LOSSES)
def test_micro_batches_never_change_the_gradient(tiny, loss):
    model, _ = tiny
    batch = random_batch(model, rows=8)
    results = [
        gradient_of(model, batch, Settings(loss=loss, beta=0.1, max_new_tokens=20, micro_tokens=n))[
            1
        ]
        for n in (1, 50, 10_000)
    ]
    for other in results[1:]:
        assert ((other - results[0]).norm() / results[0].norm()).item() < 1e-5


def packed_batch(model, sizes, G, seed=0, same=()) -> Batch:
    """Groups of a context and G reflections, of these lengths; those in `same` of equal rewards."""
    rng = torch.Generator().manual_seed(seed)

    def tokens(length):
        return torch.randint(0, model.config.vocab_size, (length,), generator=rng).tolist()

    contexts, reflections, old = [], [], []
    for context, longest in sizes:
        shared = tokens(context)
        for g in range(G):
            contexts.append(shared)
            reflections.append(tokens(1 + (longest - 1) * g // max(1, G - 1)))
    rows = [c + r for c, r in zip(contexts, reflections, strict=True)]
    for row, r in zip(rows, reflections, strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([row]))[0].log_softmax(-1)[-len(r) - 1 : -1]
        now = log_p.gather(1, torch.tensor(r)[:, None]).squeeze(1)
        old.append((now + 0.4 * torch.randn(len(r), generator=rng)).tolist())
    rewards = torch.randint(0, 2, (len(sizes), G), generator=rng).float()
    rewards[:, 0], rewards[:, -1] = 1, 0
    rewards[list(same)] = 1
    batch = grpo.reflection_batch(contexts, reflections, old, rewards)
    batch.ref_logprobs = [[v - 0.3 for v in values] for values in old]
    return batch


@pytest.mark.parametrize("loss", grpo.LOSSES)
@pytest.mark.parametrize("sizes", [[(30, 1)], [(9, 7)], [(40, 12), (3, 20), (17, 1), (25, 6)]])
def test_a_shared_context_changes_nothing(tiny, loss, sizes):
    """Invariant 4: the packed step is the textbook's, one row per reflection, however split."""
    model = tiny[0].double()  # so that rounding hides nothing
    batch = packed_batch(model, sizes, G=5)
    for micro_tokens, checkpointing in ((1, False), (200, True), (10_000, False)):
        settings = Settings(loss=loss, beta=0.2, max_new_tokens=20, micro_tokens=micro_tokens)
        model.checkpointing = checkpointing
        metrics, ours = gradient_of(model, batch, settings)
        model.checkpointing = False
        value, exact = grpo.textbook(model, batch, settings)
        assert 0.1 < metrics["clipped"] < 0.9
        assert metrics["loss"] == pytest.approx(value, rel=1e-9)
        assert ((ours - exact).norm() / exact.norm()).item() < 1e-9


def test_a_step_is_the_same_bits_each_time(tiny):
    """Invariant 6: no sum whose order is left to the threads."""
    model, _ = tiny
    batch = packed_batch(model, [(90, 40)] * 16, G=8)
    _, one = gradient_of(model, batch, Settings(beta=0.2))
    for _ in range(5):
        assert torch.equal(gradient_of(model, batch, Settings(beta=0.2))[1], one)


def test_the_head_in_parts_is_the_head_in_one(tiny, monkeypatch):
    model, _ = tiny
    batch = packed_batch(model, [(9, 7), (5, 12)], G=4)
    whole, one = gradient_of(model, batch, Settings(beta=0.2))
    monkeypatch.setattr(grpo, "LOGITS", 10 * model.words)
    parts, other = gradient_of(model, batch, Settings(beta=0.2))
    assert ((one - other).norm() / one.norm()).item() < 1e-6
    assert parts == pytest.approx(whole, rel=1e-5)


def test_groups_of_equal_rewards_are_left_out_at_no_price(tiny, monkeypatch):
    """Without KL their gradient is zero, and their tokens still count in the normaliser."""
    model = tiny[0].double()
    batch = packed_batch(model, [(9, 7), (5, 12), (20, 3)], G=4, same=(1,))
    read = []
    predictions = grpo.predictions
    monkeypatch.setattr(grpo, "predictions", lambda *a: read.extend(a[2]) or predictions(*a))
    for beta, skip, rows in ((0.0, False, 8), (0.2, False, 12), (0.2, True, 8)):
        settings = Settings(beta=beta, skip_equal=skip)
        read.clear()
        metrics, ours = gradient_of(model, batch, settings)
        value, exact = grpo.textbook(model, batch, settings)
        assert sorted(read) == ([0, 1, 2, 3, 8, 9, 10, 11] if rows == 8 else list(range(12)))
        assert metrics["tokens"] == sum(len(values) for values in batch.old_logprobs)
        if not skip:
            assert metrics["loss"] == pytest.approx(value, rel=1e-9)
            assert ((ours - exact).norm() / exact.norm()).item() < 1e-9


def test_metrics_are_means_over_the_trained_tokens(tiny):
    model, _ = tiny
    batch = random_batch(model)
    metrics, _ = gradient_of(model, batch, Settings(micro_tokens=40))
    nll, entropy, kl, moved = [], [], [], []
    for i, (row, [(start, end)]) in enumerate(zip(batch.ids, batch.spans, strict=True)):
        with torch.no_grad():
            log_p = model(torch.tensor([row]))[0].log_softmax(-1)
        recorded = zip(batch.old_logprobs[i], batch.ref_logprobs[i], strict=True)
        for t, (old, ref) in zip(range(start, end), recorded, strict=True):
            now = log_p[t - 1, row[t]].item()
            nll.append(-now)
            entropy.append(torch.distributions.Categorical(logits=log_p[t - 1]).entropy().item())
            kl.append(math.exp(ref - now) - (ref - now) - 1)
            moved.append(abs(now - old))
    for name, values in (("nll", nll), ("entropy", entropy), ("kl", kl)):
        assert metrics[name] == pytest.approx(sum(values) / len(values), rel=1e-4), name
    assert metrics["mismatch"] == pytest.approx(max(moved), rel=1e-4)
    assert metrics["tokens"] == len(moved)


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
        clipped = min(max(ratio, 0.8), 1.2)
        assert loss.item() == pytest.approx(-min(ratio * A, clipped * A))


def test_nothing_but_the_reflection_is_trained(tiny):
    """Invariant 3: another target outside the mask, or more padding, leaves the loss as it is."""
    rng = torch.Generator().manual_seed(0)
    logprobs, old, ref = (torch.randn(3, 7, generator=rng) for _ in range(3))
    mask = trained_mask([[(3, 5)], [(2, 8)], [(7, 8)]], width=8)
    A = torch.randn(3, generator=rng)
    for loss in grpo.LOSSES:
        free = logprobs.clone().requires_grad_(True)
        value = grpo_loss(free, old, ref, A, mask, loss=loss)
        value.backward()
        assert (free.grad[~mask] == 0).all() and (free.grad[mask] != 0).any()
        wild = torch.where(mask, logprobs, torch.randn(3, 7, generator=rng) * 500)
        wild.requires_grad_(True)
        again = grpo_loss(wild, old, ref, A, mask, loss=loss)
        again.backward()
        assert again.item() == value.item() and torch.equal(wild.grad, free.grad)
    inside = logprobs.clone()
    inside[0, 2] += 0.1
    assert grpo_loss(inside, old, ref, A, mask) != grpo_loss(logprobs, old, ref, A, mask)


def test_the_end_of_turn_is_trained_and_the_context_is_not(tiny):
    batch = grpo.reflection_batch(
        contexts=[[5, 6, 7], [5, 6, 7]],
        reflections=[[8, 9, 0], [8, 0]],  # 0 is the end of turn
        logprobs=[[-1.0] * 3, [-1.0] * 2],
        rewards=torch.tensor([[1.0, 0.0]]),
    )
    assert batch.ids == [[5, 6, 7, 8, 9, 0], [5, 6, 7, 8, 0]]
    _, targets, mask = grpo.predictions(tiny[0], batch, [0, 1])
    assert targets.tolist() == [8, 9, 0, 8, 0]  # a third 0 would be padding
    assert mask.int().tolist() == [[1, 1, 1], [1, 1, 0]]
    batch.group = 1  # a row of its own each
    _, targets, mask = grpo.predictions(tiny[0], batch, [0, 1])
    assert targets.tolist() == [8, 9, 0, 8, 0]
    assert mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 1, 0]]


def test_advantage_of_one_is_the_gradient_of_the_likelihood(tiny):
    """The cold start's loss: on-policy and with A = 1 it is the mean negative log-likelihood's."""
    model, _ = tiny
    batch = random_batch(model, beta_ref=False)
    batch.old_logprobs, batch.advantages = None, torch.ones(6)
    metrics, ours = gradient_of(model, batch, Settings(beta=0.0))
    model.zero_grad(set_to_none=True)
    total, count = 0.0, 0
    for row, ((start, end),) in zip(batch.ids, batch.spans, strict=True):
        log_p = model(torch.tensor([row]))[0].log_softmax(-1)
        total = total - sum(log_p[t - 1, row[t]] for t in range(start, end))
        count += end - start
    (total / count).backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert metrics["nll"] == pytest.approx((total / count).item(), rel=1e-5)
    assert ((ours - exact).norm() / exact.norm()).item() < 1e-5


def test_the_loop_clips_schedules_and_starts_every_step_afresh(tiny):
    """Two steps of SGD are the two clipped gradients, each times its own learning rate."""
    model, _ = tiny
    settings = Settings(steps=2, lr=0.1, warmup=0.5, beta=0.0, max_grad_norm=0.01)
    batch, expected = random_batch(model, beta_ref=False), copy.deepcopy(model)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.2)]  # its own, scheduled alike
    for _, metrics in grpo.train(model, lambda step: batch, settings, optimizers):
        assert metrics["grad_norm"] > 0.01
        _, gradient = gradient_of(expected, batch, settings)
        gradient *= 0.01 / gradient.norm()
        with torch.no_grad():
            for p, g in zip(
                expected.parameters(),
                gradient.split([p.numel() for p in expected.parameters()]),
                strict=True,
            ):
                p -= 2 * metrics["lr"] * g.view_as(p)
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.allclose(one, other, atol=1e-7)
    assert metrics["lr"] == pytest.approx(0.1 * grpo.lr_share(1, 2, 0.5))


def test_check_tells_right_from_wrong_on_sparse_rewards(tiny, monkeypatch):
    """One right retry of eight, scaled or not; then a step that is slightly off."""
    model, _ = tiny
    batch = random_batch(model, rows=8)
    for scale in (True, False):
        rewards = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]])
        batch.advantages = group_advantages(rewards, scale=scale).flatten()
        found = grpo.check(model, batch, Settings(beta=0.1))
        assert max(found["loss_error"], found["gradient_error"]) < 1e-5
        assert 0.1 < found["clipped"] < 0.9
    monkeypatch.setattr(grpo, "k3", lambda d: 1.01 * (d.exp() - d - 1))
    assert grpo.check(model, batch, Settings(beta=0.1))["gradient_error"] > 1e-5
    batch.advantages = torch.zeros(8)
    with pytest.raises(ValueError, match="nothing to check"):
        grpo.check(model, batch, Settings())


def test_groups_of_equal_rewards_give_no_gradient_without_kl(tiny):
    model, _ = tiny
    batch = random_batch(model)
    batch.advantages = torch.zeros(6)
    _, gradient = gradient_of(model, batch, Settings(beta=0.0))
    assert (gradient == 0).all()


def test_learning_rate_rises_then_falls_to_nearly_nothing():
    shares = [grpo.lr_share(step, 100, 0.03) for step in range(100)]
    assert shares[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert shares[3] == 1.0 and all(a > b for a, b in zip(shares[3:], shares[4:], strict=False))
    assert 0 < shares[-1] < 0.001


def test_muon_moves_all_directions_alike():
    x = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(grpo.orthogonalize(x))
    assert singular.min() > 0.5 and singular.max() < 1.3
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    assert (
        torch.nn.functional.cosine_similarity(
            grpo.orthogonalize(x).flatten(1), (u @ v).flatten(1)
        ).min()
        > 0.95
    )


OPTIMIZERS = [
    lambda m: grpo.adamw(m, 1e-3),
    lambda m: grpo.adamw(m, 1e-3, offload=True),
    lambda m: grpo.muon(m, 0.01, 1e-3),
]


@pytest.mark.parametrize("optimizers_of", OPTIMIZERS)
def test_a_checkpoint_goes_on_bit_for_bit(tiny, tmp_path, optimizers_of):
    model, _ = tiny
    settings = Settings(steps=4, lr=1e-3, beta=0.1, save_every=2)
    reference, log = copy.deepcopy(model).requires_grad_(False), tmp_path / "log"

    def batches(step):
        batch = random_batch(reference, seed=step, beta_ref=False)
        batch.metrics = {}
        return batch

    def run(model, folder, start, optimizers):
        steps = grpo.train(
            model, batches, settings, optimizers, reference, start, folder, files=(log,)
        )
        for step, _ in steps:
            with open(log, "a") as file:
                file.write(f"{step}\n")

    optimizers = optimizers_of(model)
    assert grpo.load_checkpoint(tmp_path, optimizers, (log,)) == 0
    run(model, tmp_path, 0, optimizers)
    shutil.rmtree(tmp_path / "step-4")  # killed in the last step
    log.write_text(log.read_text() + "4")
    again = copy.deepcopy(reference).requires_grad_(True)
    optimizers = optimizers_of(again)
    start = grpo.load_checkpoint(tmp_path, optimizers, (log,))
    assert start == 2 and log.read_text() == "0\n1\n"
    run(again, tmp_path, start, optimizers)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert log.read_text() == "0\n1\n2\n3\n"


def saved(model, folder, steps=(1, 2, 3)):
    optimizers = grpo.adamw(model, 1e-3)
    for step in steps:
        gradient_of(model, random_batch(model, beta_ref=False), Settings(beta=0.0))
        optimizers[0].step()
        grpo.save_checkpoint(folder, step, optimizers)
    return optimizers


def test_the_last_checkpoints_are_kept(tiny, tmp_path):
    saved(tiny[0], tmp_path, range(8, 12))
    assert [path.name for path in grpo.checkpoints(tmp_path)] == ["step-10", "step-11"]


@pytest.mark.parametrize("name", ["*.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("place", [3, 60, -2])
def test_a_flipped_bit_or_a_cut_file_is_noticed(tiny, tmp_path, name, place):
    optimizers = saved(tiny[0], tmp_path)
    path = next((tmp_path / "step-3").glob(name))
    whole = bytearray(path.read_bytes())
    changed = bytearray(whole)
    changed[place] ^= 4
    for content in (changed, whole[:-1], whole[: len(whole) // 2], b""):
        path.write_bytes(bytes(content))
        with pytest.raises(ValueError, match="step-3 is damaged; delete it"):
            grpo.load_checkpoint(tmp_path, optimizers)
    path.unlink()
    with pytest.raises(ValueError, match="step-3 is damaged"):
        grpo.load_checkpoint(tmp_path, optimizers)
    shutil.rmtree(tmp_path / "step-3")
    assert grpo.load_checkpoint(tmp_path, optimizers) == 2


def test_another_models_checkpoint_is_refused(tiny, folder, tmp_path):
    saved(tiny[0], tmp_path / "a")
    for other in (models.tiny(["1", "2"])[0], models.Model.from_pretrained(folder)):
        with pytest.raises(ValueError, match="step-3 is of another model"):
            grpo.load_checkpoint(tmp_path / "a", grpo.adamw(other, 1e-3))
    with pytest.raises(ValueError, match="is of another"):
        grpo.load_checkpoint(tmp_path / "a", grpo.muon(tiny[0], 0.1, 0.1))
    log = tmp_path / "log"
    log.write_text("a line\n")
    optimizers = grpo.adamw(tiny[0], 1e-3)
    grpo.save_checkpoint(tmp_path / "a", 4, optimizers, (log,))
    log.write_text("a li")
    with pytest.raises(ValueError, match="log is shorter than"):
        grpo.load_checkpoint(tmp_path / "a", optimizers, (log,))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_without_a_finite_gradient_is_skipped(tiny, bad):
    """Skipped and counted; five in a row end the run; four and a good one do not."""
    model, _ = tiny
    settings = Settings(steps=12, lr=1e-3, beta=0.0)

    def batches(step):
        batch = random_batch(model, seed=step, beta_ref=False)
        if step in (1, 2, 3, 4, 6, 7, 8, 9, 10):
            batch.advantages[1] = bad
        return batch

    before, skipped = None, []
    with pytest.raises(ValueError, match="step 11: no finite loss or gradient in 5 steps in a row"):
        for step, metrics in grpo.train(model, batches, settings, grpo.adamw(model, 1e-3)):
            weights = torch.cat([p.detach().flatten() for p in model.parameters()])
            assert bool(weights.isfinite().all())
            if before is not None:
                assert torch.equal(weights, before) == (step not in (0, 5))
            before = weights.clone()
            skipped.append(metrics["skipped"])
    assert skipped == [0, 1, 1, 1, 1, 0, 1, 1, 1, 1]


def test_bfloat16_moves_with_masters_and_hardly_without(task):
    """At the paper's learning rate: ten steps from the same bfloat16 weights, on the same data."""
    low = models.tiny(task.words(), seed=1)[0].bfloat16()
    start = copy.deepcopy(low).float()
    settings = Settings(steps=10, lr=5e-7, beta=0.0, warmup=0.0)
    data = [random_batch(start, rows=64, seed=i, beta_ref=False) for i in range(10)]
    for batch in data:
        batch.old_logprobs = None  # on-policy, as R3 trains

    def moved(model, optimizer):
        weights = optimizer.param_groups[0]["params"]
        before = [p.detach().clone() for p in weights]
        for _ in grpo.train(model, data.__getitem__, settings, [optimizer]):
            pass
        pairs = zip(weights, before, strict=True)
        return torch.cat([(p.detach() - b).flatten().float() for p, b in pairs])

    exact = moved(start, *grpo.adamw(start, 5e-7))
    model = copy.deepcopy(low)
    ours = moved(model, *grpo.adamw(model, 5e-7))
    masters = grpo.adamw(model, 5e-7, offload=True)[0].param_groups[0]["params"]
    assert all(p.dtype == torch.float32 for p in masters)
    assert torch.cosine_similarity(ours, exact, dim=0) > 0.99
    model = copy.deepcopy(low)
    pure = moved(model, torch.optim.AdamW(model.parameters(), 5e-7, weight_decay=0.0))
    assert 0 < (pure != 0).float().mean() < 0.02
