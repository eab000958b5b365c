"""The experiments measure what their tables say."""

import copy
import itertools
import shutil
from dataclasses import replace
from types import SimpleNamespace

import experiments
import numpy as np
import pytest
import torch
from conftest import countdown_file

import grpo
import r3
from tasks import Verdict


class Lenient(grpo.Agent):
    """A verifier that an untrained model satisfies now and then. It keeps what was read."""

    read: list = []

    def verify(self, problem, turn):
        right = sum(turn) % 2 == 0
        return Verdict(right, "correct" if right else "wrong_value")

    def generate(self, prompts, *rest):
        self.read = [*self.read, *prompts]
        return super().generate(prompts, *rest)


@pytest.fixture
def agent(tiny, task):
    model, tokenizer = tiny
    tokenizer.stop_ids = list(range(40))  # so that many turns end
    return Lenient(model, tokenizer, task, max_new_tokens=10, seed=3)


TWO_TURNS = ("reflection", "retry", "both")


@pytest.fixture
def failures(agent, task):
    """Wrong first tries at a few problems."""
    conversations = grpo.attempt_all(agent, task.load(split="dev", limit=16), 1, (grpo.COLLECT, 0))
    return [t for t in conversations if not t.attempt_verdict.correct]


def settings(**given) -> r3.Config:
    return replace(r3.TINY, **{"steps": 2, "batch_size": 4, "group_size": 3, **given})


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_equal_tokens_is_the_chance_of_any_of_k():
    n = 6
    for k, successes in itertools.product(range(1, n + 1), range(n + 1)):
        subsets = list(itertools.combinations(range(n), k))
        share = sum(min(chosen) < successes for chosen in subsets) / len(subsets)
        assert experiments.any_of(k, n, successes) == pytest.approx(share)
    two, three = (experiments.any_of(k, n, 2) for k in (2, 3))
    assert experiments.any_of(2.25, n, 2) == pytest.approx(0.75 * two + 0.25 * three)


def test_equal_tokens_spends_what_the_trained_model_spends(agent, failures, tmp_path):
    before = grpo.rollout(agent, failures, 1, (grpo.EVALUATE, 0))
    after = [replace(t, reflection=t.reflection * 3, retry=t.retry * 3) for t in before]
    [[label, row]] = experiments.equal_tokens(agent, before, after, tmp_path / "kept").items()
    assert label == "its own, any of 3.00 tries; trained: one"
    conversations = grpo.rollout(agent, failures, experiments.EQUAL, (grpo.PLAY, 0))
    each = [
        sum(t.retry_verdict.correct for t in conversations[i * 16 : i * 16 + 16])
        for i in range(len(failures))
    ]
    chances = [experiments.any_of(3.0, 16, successes) for successes in each]
    assert row["vanilla"][0] == pytest.approx(np.mean(chances)) and 0 < row["vanilla"][0] < 1
    assert row["trained"][0] == pytest.approx(np.mean([t.retry_verdict.correct for t in after]))


@pytest.mark.parametrize("label", experiments.SWAPS)
def test_a_control_changes_the_reflection_and_nothing_else(agent, failures, tmp_path, label):
    own = grpo.rollout(agent, failures, 1, (grpo.EVALUATE, 0))
    other = experiments.swapped(agent, own, label)
    said = {tuple(t.reflection): t.problem.id for t in own}
    end = agent.tokenizer.stop_ids[0]
    for before, after in zip(own, other, strict=True):
        assert replace(after, reflection=before.reflection) == before
        assert after.reflection != before.reflection
        if label == "an empty reflection":
            assert after.reflection == [end]
        elif label == "a fixed generic reflection":
            assert agent.tokenizer.decode(after.reflection) == agent.task.generic_reflection
        else:
            assert said[tuple(after.reflection)] != before.problem.id
    agent.read = []
    found = experiments.retries(agent, other, tmp_path / "kept")
    again = agent.tokenizer.bridge(agent.task.retry_instruction)
    asked = [t.reflection_prompt + agent.tokenizer.next_turn(t.reflection, again) for t in other]
    assert sorted(agent.read) == sorted(asked)
    assert [t.reflection for t in found] == [t.reflection for t in other]


def textbook(agent, reference, conversations, rewards, c, turns) -> torch.Tensor:
    """The formula, one sequence at a time by the plain forward pass: the gradient."""
    again, A = agent.tokenizer.bridge(agent.task.retry_instruction), []
    for group in rewards.view(-1, c.group_size):
        A += [(r - group.mean()) / (group.std() + 1e-4) for r in group]
    kept = [(t, a, turn) for t, a in zip(conversations, A, strict=True) for turn in turns]
    tokens = sum(len(getattr(t, turn)) for t, _, turn in kept)
    total = 0.0
    for t, a, turn in kept:
        before = {"attempt": t.attempt_prompt, "reflection": t.reflection_prompt}
        before["retry"] = t.reflection_prompt + agent.tokenizer.next_turn(t.reflection, again)
        own, start = getattr(t, turn), len(before[turn])
        ids = torch.tensor([before[turn] + own])
        new, ref = (
            (m(ids)[0].log_softmax(-1)[range(start - 1, start - 1 + len(own)), own])
            for m in (agent.model, reference)
        )
        old = torch.tensor(t.reflection_logprobs) if turn == "reflection" else new.detach()
        ratio = (new - old).exp()
        surrogate = torch.minimum(ratio * a, ratio.clamp(1 - c.clip, 1 + c.clip) * a)
        d = ref.detach() - new
        per_token = surrogate - c.beta * (d.exp() - d - 1)
        weigh = {"dapo": tokens, "grpo": len(kept) * len(own)}
        weigh["dr_grpo"] = len(kept) * agent.max_new_tokens
        total = total - per_token.sum() / weigh[c.loss_type]
    agent.model.zero_grad()
    total.backward()
    return torch.cat([p.grad.flatten() for p in agent.model.parameters()])


@pytest.mark.parametrize(
    "train, loss",
    [("attempt", "dapo"), ("attempt", "grpo"), ("attempt", "dr_grpo"), ("retry", "dapo"),
     ("both", "dapo")],
)  # fmt: skip
def test_the_gradient_of_other_turns_is_the_textbooks(agent, failures, train, loss):
    turns, c = experiments.TURNS[train], settings(beta=0.3, loss_type=loss)
    reference = copy.deepcopy(agent.model)
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.7)
    if train == "attempt":
        problems = [f.problem for f in failures[:4]]
        conversations = grpo.attempt_all(agent, problems, c.group_size, (grpo.TRAIN, 0))
    else:
        conversations = grpo.rollout(agent, failures[:4], c.group_size, (grpo.TRAIN, 0))
    rng = torch.Generator().manual_seed(0)
    for t in conversations:  # so that some ratios of reflections are clipped
        noise = 0.3 * torch.randn(len(t.reflection), generator=rng)
        t.reflection_logprobs = (torch.tensor(t.reflection_logprobs) + noise).tolist()
    rewards = torch.tensor([float(i % 3 == 0 or i > 9) for i in range(len(conversations))])
    theirs = textbook(agent, reference, conversations, rewards, c, turns)
    optimizer = grpo.MasterAdamW(agent.model, c.lr)
    optimizer.zero_grad()
    experiments.add_gradient(agent, reference, conversations, rewards, c, turns, optimizer)
    ours = torch.cat([p.grad.flatten() for p in agent.model.parameters()])
    assert theirs.norm() > 0.01
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_trained_on_reflections_it_is_r3(agent, failures, tmp_path):
    c, one, other = settings(), *(replace(agent, model=copy.deepcopy(agent.model)) for _ in "12")
    for _ in grpo.train(one, agent.model, failures, c, tmp_path / "r3"):
        pass
    turns = experiments.TURNS["reflection"]
    experiments.train_turns(other, agent.model, failures, c, tmp_path / "loop", turns)
    assert not torch.equal(weights(one.model), weights(agent.model))
    assert torch.equal(weights(one.model), weights(other.model))


def test_a_stopped_loop_goes_on_to_the_same_weights(agent, failures, tmp_path, monkeypatch):
    """Its checkpoint after the first step is put back, as if the second had never been."""
    c, turns, found = settings(beta=0.0, save_every=1), experiments.TURNS["attempt"], []
    save = grpo.save_checkpoint

    def keep(folder, step, *rest):
        save(folder, step, *rest)
        if step == 1:
            shutil.copy(folder / "checkpoint.safetensors", folder / "at step 1")

    monkeypatch.setattr(grpo, "save_checkpoint", keep)
    for _ in range(2):
        trained = replace(agent, model=copy.deepcopy(agent.model))
        experiments.train_turns(trained, None, failures, c, tmp_path, turns)
        lines = r3.read_lines(tmp_path / "metrics.jsonl", "step")
        found.append((weights(trained.model), lines))
        if len(found) == 1:
            shutil.move(tmp_path / "at step 1", tmp_path / "checkpoint.safetensors")
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert [line["step"] for line in lines] == [1, 2] and lines[0]["sampled_tokens"] > 0


def test_shuffled_rewards_are_the_same_rewards_elsewhere(agent, failures, tmp_path, monkeypatch):
    given = []

    def keep(agent, reference, conversations, rewards, *rest):
        given.append(
            (rewards, [experiments.reward(agent, t, ("reflection",)) for t in conversations])
        )

    monkeypatch.setattr(experiments, "add_gradient", keep)
    turns, c = experiments.TURNS["reflection"], settings(steps=1)
    experiments.train_turns(agent, None, failures, c, tmp_path, turns, shuffle=True)
    [(rewards, earned)] = given
    assert sorted(rewards.tolist()) == sorted(earned) and rewards.tolist() != earned


def test_a_reward_needs_a_right_answer_and_ended_turns(agent):
    end, right, wrong = agent.tokenizer.stop_ids[0], *(SimpleNamespace(correct=r) for r in (1, 0))
    t = SimpleNamespace(
        reflection=[99], retry=[99, end], attempt_verdict=wrong, retry_verdict=right
    )
    rewards = {name: experiments.reward(agent, t, experiments.TURNS[name]) for name in TWO_TURNS}
    assert rewards == {"reflection": 0, "retry": 1, "both": 0}
    t.retry_verdict = wrong
    assert experiments.reward(agent, t, ("retry",)) == 0
    answers = [
        SimpleNamespace(attempt=[end], attempt_verdict=v, retry_verdict=None)
        for v in (right, wrong)
    ]
    assert [experiments.reward(agent, t, ("attempt",)) for t in answers] == [1, 0]


@pytest.mark.parametrize("model", ["tiny", "letters"])
def test_a_runs_controls_and_its_other_turns(model, folder, monkeypatch, tmp_path, capsys):
    """The whole of it in seconds, for the tiny model and for a folder; done twice, nothing is
    sampled again."""
    monkeypatch.setitem(r3.COLD_START, "steps", 8)
    monkeypatch.setattr(r3, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(r3, "CURVE_SIZE", (2, 1))
    monkeypatch.setattr(grpo.Agent, "verify", Lenient.verify)
    monkeypatch.chdir(tmp_path)
    few = "--steps 2 --batch-size 3 --group-size 3 --limit 5 --num-samples 2"
    few += " --max-attempts 1 --num-problems 8"
    data = countdown_file(tmp_path / "countdown.jsonl")
    given = ["--model", str(folder), "--data", data] if model == "letters" else []
    r3.main(["train", *few.split(), "--max-new-tokens", "12", "--name", "run", *given])
    run = tmp_path / "runs/run"
    tables = experiments.controls(run)
    crossed, lengths, retries = list(tables.values())[:3]
    assert list(crossed) == list(crossed["vanilla"]) == list(lengths) == ["vanilla", "trained"]
    assert crossed["trained"]["trained"] == retries["its own reflection"]["trained"]
    assert len(retries) == 7 and len(tables) == (4 if model == "tiny" else 3)
    experiments.main(["turns", "--run", str(run), "--train", "attempt", "--steps", "1"])
    assert "Trained: attempt" in capsys.readouterr().out
    gained, tokens = experiments.gains([run / "attempt-group3-steps1"])
    assert tokens > 0 and gained["1st try"].shape == (1,)
    monkeypatch.setattr(grpo, "generate", None)
    assert str(experiments.controls(run)) == str(tables)
    assert list(experiments.controls(run, crossed_only=True)) == list(tables)[:2]
    experiments.main(["controls", "--run", str(run)])
    assert "| its own reflection " in capsys.readouterr().out


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        experiments.main(["controls", "--run", str(tmp_path)])


def test_the_tables_of_variants_and_seeds():
    paper = {"1st try": np.array([5.0, 7.0]), "within two": np.array([20.0, 30.0])}
    found = {"1st try": np.array([6.0, 9.0]), "within two": paper["within two"]}
    row = experiments.variant_row(found, 0.314, paper)
    assert row["gain, 1st try"] == "+7.5 (+6.0, +9.0)" and row["M tokens"] == "0.31"
    assert row["apart, 1st try"] == "+1.5 ± 6.4" and row["apart, within two"] == ""
    each = {"1st try": [0.1, 0.0, 0.2], "within two": [0.5, 0.4, 0.6]}
    by_seed = {name: dict.fromkeys(("vanilla", "trained", "gain"), each) for name in ("a", "b")}
    rows = experiments.seed_rows(by_seed)
    assert rows["a"]["1st try, gain"] == "+10.0 [+0.0, +20.0]"
    assert rows["mean"]["within two, trained"] == "50.0"
