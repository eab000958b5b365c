"""Each diff in VARIANTS.md applies to the code, is short, and does what it says: its gradient is
that of plain rows, and a killed run resumes to the same weights."""

import copy
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import experiments
import pytest
import textbook
import torch
from conftest import enlarge_weights, few_threads, shallow_model
from textbook import Row

import grpo
from tasks import Verdict

ROOT = Path(grpo.__file__).parent
DIFFS = experiments.diffs((ROOT / "tests" / "VARIANTS.md").read_text())
LINES = {  # the largest number of changed lines; a line that is replaced counts once
    "train the retry, too": 8,
    "two rounds of reflection": 25,
    "dynamic sampling": 15,
    "the ratio of the whole sequence (with --loss-type grpo)": 12,
    "solved failures leave": 8,
}


def load_variant(title: str, folder: Path):
    """grpo.py with the diff applied, as a module of its own."""
    file, hunks = DIFFS[title]
    text = (ROOT / file).read_text()
    for old, new in hunks:
        assert text.count(old) == 1, (title, old)
        text = text.replace(old, new)
    path = folder / "grpo_variant.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("grpo_variant", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["grpo_variant"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def make_agent(module, one_layer, task, divisor: int = 3):
    """An agent whose verifier an untrained model satisfies now and then."""

    class LenientAgent(module.Agent):
        def verify(self, problem, turn):
            correct = sum(turn.tokens) % divisor == 0
            return Verdict(correct, "correct" if correct else "wrong_value")

    model, tokenizer = one_layer
    tokenizer.stop_ids = [0, *range(1, 72, 3)]  # so that turns end at different times
    return LenientAgent(model, tokenizer, task, max_new_tokens=10, seed=3)


def find_failures(module, agent, count: int):
    """Wrong attempts at a few problems."""
    problems = agent.task.load(split="dev", limit=24)
    attempts = module.attempt_all(agent, problems, 1, (module.COLLECT, 0))
    return [c for c in attempts if not c.attempt_verdict.correct][:count]


def gradient_of(module, agent, groups, config) -> torch.Tensor:
    """The gradient of a step with these groups."""
    rewards = torch.tensor([[module.reward(c) for c in group] for group in groups])
    optimizer = module.MasterAdamW(agent.model, 1e-3)
    advantages = module.group_advantages(rewards)
    module.backpropagate_step(agent, None, groups, advantages, config, optimizer)
    return torch.cat([p.grad.flatten() for p in agent.model.parameters()])


def gradient_of_plain_rows(agent, groups, turns_of, rewards, config) -> torch.Tensor:
    """The textbook's gradient, with one row for each trained turn of each conversation."""
    rows = []
    for group, values in zip(groups, rewards, strict=True):
        for c, A in zip(group, textbook.advantages(values), strict=True):
            rows += [Row(t.prompt, t.tokens, t.logprobs, None, A) for t in turns_of(c)]
    return textbook.textbook(agent.model, rows, config, agent.max_new_tokens)[1]


def run(module, agent, failures, folder, until: int = 10**6, **changes) -> torch.Tensor:
    """Train a copy of the model and leave after `until` steps as if killed. Returns its weights."""
    own = replace(agent, model=copy.deepcopy(agent.model))
    settings = {"steps": 4, "batch_size": 2, "group_size": 4, "lr": 1e-3, "beta": 0.0}
    config = module.TrainConfig(**{**settings, "save_every": 2, **changes})
    for step, _ in module.train(own, None, failures, config, folder):
        if step == until:
            break
    return torch.cat([p.detach().flatten() for p in own.model.parameters()])


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_variant_is_short():
    assert DIFFS.keys() == LINES.keys()
    for title, (_, hunks) in DIFFS.items():
        changed = 0
        for old, new in hunks:
            common = set(old.splitlines()) & set(new.splitlines())
            removed = [line for line in old.splitlines() if line not in common]
            added = [line for line in new.splitlines() if line not in common]
            changed += max(len(removed), len(added))
        assert changed <= LINES[title], (title, changed)


@pytest.fixture(scope="module")
def plain_weights(task, tmp_path_factory) -> torch.Tensor:
    """The weights after a run of grpo.py as it is."""
    model, tokenizer = shallow_model(task.words(), seed=1)
    enlarge_weights(model)
    with few_threads():
        agent = make_agent(grpo, (model, tokenizer), task, divisor=2)
        failures = find_failures(grpo, agent, 6)
        return run(grpo, agent, failures, tmp_path_factory.mktemp("plain"), updates=2)


@pytest.mark.parametrize(
    "title, changes",
    [
        ("train the retry, too", {}),
        ("two rounds of reflection", {}),
        ("dynamic sampling", {}),
        ("the ratio of the whole sequence (with --loss-type grpo)", {"loss_type": "grpo"}),
        ("solved failures leave", {}),
    ],
)
def test_a_killed_run_of_a_variant_resumes_to_the_same_weights(
    title, changes, one_layer, task, plain_weights, tmp_path
):
    module = load_variant(title, tmp_path)
    agent = make_agent(module, one_layer, task, divisor=2)
    failures = find_failures(module, agent, 6)
    changes = {**changes, "updates": 2}
    whole = run(module, agent, failures, tmp_path / "whole", **changes)
    run(module, agent, failures, tmp_path / "killed", until=3, **changes)
    assert torch.equal(run(module, agent, failures, tmp_path / "killed", **changes), whole)
    for name in ("metrics.jsonl", "samples.jsonl"):
        one, other = (tmp_path / run / name for run in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes()
    if title != "solved failures leave":  # in which this run leaves nothing to train
        assert not torch.equal(plain_weights, whole)


@pytest.mark.parametrize("title", ["train the retry, too", "two rounds of reflection"])
def test_its_gradient_is_that_of_plain_rows(title, one_layer, task, tmp_path):
    module = load_variant(title, tmp_path)
    agent = make_agent(module, one_layer, task)
    failures = find_failures(module, agent, 5)
    groups = module.rollout(agent, failures, 4, (module.TRAIN, 0))
    assert [[c.attempt_id for c in group] for group in groups] == [
        [f.attempt_id] * 4 for f in failures
    ]
    if title == "train the retry, too":

        def turns_of(c):
            return [c.reflection, c.retry]
    else:
        plain_agent = make_agent(grpo, one_layer, task)
        plain_failures = find_failures(grpo, plain_agent, 5)
        plain = grpo.rollout(plain_agent, plain_failures, 4, (grpo.TRAIN, 0))
        rounds = set()
        for group, first_round in zip(groups, plain, strict=True):
            in_order = sorted(group, key=lambda c: c.reflection_index)
            for c, first in zip(in_order, first_round, strict=True):
                rounds.add(c.first_reflection is not None)
                if first.retry_verdict.correct:  # there is no second round
                    assert c.first_reflection is None and vars(c.retry) == vars(first.retry)
                else:  # the second round continues after the retry of the first
                    assert vars(c.first_reflection) == vars(first.reflection)
                    asked = agent.tokenizer.append_bridge(
                        first.retry.tokens,
                        agent.tokenizer.bridge(task.reflection_instruction),
                    )
                    assert c.reflection.prompt == first.retry.prompt + asked
                    assert c.retry.prompt[: len(c.reflection.prompt)] == c.reflection.prompt
        assert rounds == {True, False}
        evaluated = module.rollout(agent, failures, 1, (module.EVALUATE, 0))
        assert all(c.first_reflection is None for [c] in evaluated)

        def turns_of(c):
            return [turn for turn in (c.first_reflection, c.reflection) if turn]

    rewards = [
        [
            float(c.retry_verdict.correct and not any(turn.truncated for turn in turns_of(c)))
            for c in group
        ]
        for group in groups
    ]
    assert any(0 < sum(values) < 4 for values in rewards)
    config = module.TrainConfig(beta=0.0, group_size=4)
    wanted = gradient_of_plain_rows(agent, groups, turns_of, rewards, config)
    found = gradient_of(module, agent, groups, config)
    assert ((found - wanted).norm() / wanted.norm()).item() < 1e-4


def test_dynamic_sampling_trains_on_mixed_groups_alone(one_layer, task, tmp_path):
    module = load_variant("dynamic sampling", tmp_path)
    agent = make_agent(module, one_layer, task)
    failures = find_failures(module, agent, 7)
    run(module, agent, failures, tmp_path / "run", steps=4, batch_size=3, group_size=3)
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")[1:]
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    for step, line in enumerate(metrics, 1):
        rewards = [r["reward"] for r in samples if r["step"] == step]
        groups = [rewards[i : i + 3] for i in range(0, len(rewards), 3)]
        assert len(groups) == line["trained_groups"] and all(0 < sum(g) < 3 for g in groups)
        assert line["trained_groups"] == 3 or line["sampled_groups"] > 6
        assert line["sampled_groups"] >= line["trained_groups"]
    assert any(line["sampled_groups"] > 3 for line in metrics)


def test_the_sequence_ratio_is_gspos_formula(tmp_path):
    """J = mean over i of min(s_i A_i, clip(s_i) A_i), with s_i = (pi / pi_old)^(1 / length), in
    float64: value and gradient."""
    title = "the ratio of the whole sequence (with --loss-type grpo)"
    module = load_variant(title, tmp_path)
    rng = torch.Generator().manual_seed(0)
    new, old = torch.randn(2, 5, 8, generator=rng, dtype=torch.float64) * 0.3
    A = torch.randn(5, generator=rng, dtype=torch.float64)
    lengths = (3, 8, 1, 5, 6)
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    w = module.token_weights(torch.tensor([lengths]), "grpo", max_length=8)[0]
    one, other = new.clone().requires_grad_(), new.clone().requires_grad_()
    loss = module.grpo_loss(one, old, None, A, mask, w, clip=0.1, beta=0.0)
    wanted, clipped = torch.zeros((), dtype=torch.float64), 0
    for i, length in enumerate(lengths):
        s = ((other[i, :length] - old[i, :length]).sum() / length).exp()
        wanted = wanted - torch.minimum(s * A[i], s.clamp(0.9, 1.1) * A[i]) / 5
        clipped += not 0.9 < s.item() < 1.1
    assert 0 < clipped < 5
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    loss.backward()
    wanted.backward()
    assert torch.allclose(one.grad, other.grad, rtol=1e-10, atol=0)


def test_solved_failures_leave_and_the_others_keep_their_order(one_layer, task, tmp_path):
    module = load_variant("solved failures leave", tmp_path)
    agent = make_agent(module, one_layer, task)
    failures = find_failures(module, agent, 6)
    easy = {failures[1].problem.id, failures[4].problem.id}
    type(agent).verify = lambda _, problem, turn: Verdict(
        problem.id in easy or sum(turn.tokens) % 3 == 0, "by chance"
    )
    run(module, agent, failures, tmp_path / "run", steps=9)
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    drawn, solved = [], set()
    for step in range(1, 10):
        of_step = [r for r in samples if r["step"] == step]
        identities = list(dict.fromkeys((r["problem"]["id"], r["attempt_index"]) for r in of_step))
        drawn.append(identities)
        assert not solved & set(identities)
        for identity in identities:
            rewards = [r["reward"] for r in of_step if r["problem"]["id"] == identity[0]]
            if sum(rewards) >= 3.5:
                solved.add(identity)
    assert easy <= {problem_id for problem_id, _ in solved}
    stream, gone = grpo.FailureStream(failures, agent.seed), set()
    for identities in drawn:
        expected = [f.attempt_id for f in stream.draw(2) if f.attempt_id not in gone]
        assert identities == expected
        for identity in identities:
            if identity in solved:
                gone.add(identity)
