"""The conversation, the main job shrunken to seconds, and what a user sees when input is bad."""

import argparse
import json
import math
import re
import shutil
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import pytest
import torch
import transformers
from conftest import countdown_file
from drawn_apigen import DrawnAPIGen

import grpo
import model as models
import r3
import tasks
from grpo import Agent, Conversation
from tasks import Verdict

SHORT = [
    *(
        "--steps",
        "3",
        "--batch-size",
        "4",
        "--group-size",
        "3",
        "--limit",
        "4",
        "--num-problems",
        "30",
    ),
    *("--num-samples", "2", "--max-attempts", "1", "--max-new-tokens", "12"),
]
COMMANDS = ("train", "failures", "eval", "play")


def in_steps(patch, steps: int) -> None:
    """A cold start of a few steps, whose model finds its way to right answers by chance alone."""
    patch.setitem(r3.COLD_START, "steps", steps)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny model after a cold start of a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        in_steps(patch, 8)
        patch.setattr(r3, "RUNS", tmp_path_factory.mktemp("base"))
        yield r3.base_model(tasks.TinyCountdown(), 0)


@pytest.fixture
def small(monkeypatch, tmp_path, base):
    """The main job in an empty folder, but for the tiny model of seed 0."""
    in_steps(monkeypatch, 8)
    monkeypatch.setattr(r3, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(r3, "CURVE_SIZE", (3, 2))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "runs" / base.name)
    return tmp_path / "runs"


@pytest.fixture
def agent(tiny, task):
    return Agent(*tiny, task, max_new_tokens=12, seed=5)


@pytest.fixture
def countdown(tmp_path) -> str:
    """A file of Countdown problems."""
    return countdown_file(tmp_path / "countdown.jsonl")


@pytest.fixture
def lenient(monkeypatch):
    """A verifier that an untrained model satisfies now and then: a third of what can be said."""

    def verify(agent, problem, turn):
        right = sum(turn) % 3 == 0
        return Verdict(right, "correct" if right else "wrong_value")

    monkeypatch.setattr(Agent, "verify", verify)


@pytest.fixture
def asked(monkeypatch):
    """The problems that are attempted, in a list."""
    found, attempt = [], grpo.sample_attempts

    def heard(agent, problems, *rest):
        found.extend(problems)
        return attempt(agent, problems, *rest)

    monkeypatch.setattr(grpo, "sample_attempts", heard)
    return found


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def turns(conversations):
    """What was said, without the log-probabilities."""
    return [replace(c, reflection_logprobs=[]) for c in conversations]


# -- The conversation ------------------------------------------------------------------------------


def test_a_conversation_is_its_turns_in_a_row(agent, task):
    problems = task.load(split="dev", limit=5)
    conversations = grpo.sample_attempts(agent, problems, 2, (0, 0))
    assert [c.problem for c in conversations] == [p for p in problems for _ in range(2)]
    done = grpo.rollout(agent, conversations, 3, (0, 0))
    assert len(done) == 30
    end, encode = agent.tokenizer.stop_ids[0], agent.tokenizer.encode
    for number, c in enumerate(done):
        first = conversations[number // 3]
        assert (c.problem, c.attempt, c.attempt_index) == (
            first.problem,
            first.attempt,
            first.attempt_index,
        )
        ended = c.attempt if c.attempt[-1] == end else [*c.attempt, end]
        assert c.reflection_prompt == c.attempt_prompt + ended + encode(
            f"<|user|> {task.reflection_instruction} <|end|> <|assistant|>"
        )
        assert c.reflection_index == number % 3 and len(c.reflection_logprobs) == len(c.reflection)
        assert len(c.reflection) <= 12 and c.truncated == (c.reflection[-1] != end)
        assert c.retry_verdict == agent.verify(c.problem, c.retry)
    assert len({tuple(c.reflection) for c in done[:3]}) > 1  # samples of one failure differ


def test_a_retry_from_the_cache_is_the_retry_from_the_beginning(agent, task):
    conversations = grpo.sample_attempts(agent, task.load(split="dev", limit=6), 1, (0, 0))
    reflected, cache = grpo.sample_reflections(agent, conversations, 2, (0, 0))
    again, anew = (grpo.sample_retries(agent, reflected, (0, 0), each) for each in (cache, None))
    assert turns(again) == turns(anew) and len({tuple(c.retry) for c in again}) > 6


def test_how_the_work_is_split_changes_nothing(agent, task, lenient, tmp_path, monkeypatch):
    """By a small cache, or by a device whose memory holds two conversations."""
    problems = task.load(split="dev", limit=7)
    sample, calls = Agent.generate, []

    def memory_of_two(agent, prompts, samples, *rest):
        if len(prompts) * samples > 2:
            raise torch.OutOfMemoryError
        return sample(agent, prompts, samples, *rest)

    def counted(agent, prompts, *rest):
        calls.append(len(prompts))
        return sample(agent, prompts, *rest)

    def said(name):
        calls.clear()
        found = r3.find_failures(agent, problems, 3, tmp_path / name)
        conversations = r3.evaluate(agent, problems, 2, "")
        return (
            turns(found),
            turns(conversations),
            turns(grpo.rollout(agent, conversations[:3], 2, (0, 0))),
        )

    monkeypatch.setattr(Agent, "generate", counted)
    together = said("one")
    assert max(calls) >= 7 and all(together)
    agent.cache_tokens = 300
    assert said("two") == together and max(calls) < 5
    agent.cache_tokens = 100_000
    monkeypatch.setattr(Agent, "generate", memory_of_two)
    assert said("three") == together and agent.cache_tokens < 100_000
    monkeypatch.setattr(Agent, "generate", lambda *_: memory_of_two(agent, [0] * 3, 1))
    with pytest.raises(torch.OutOfMemoryError):  # there is nothing left to halve
        said("four")


def test_batches_are_as_large_as_the_cache(agent, task):
    problems = task.load(split="dev", limit=40)

    def width(problem, samples, count):
        return len(agent.attempt_prompt(problem)) + samples * count * (12 + 50)

    for room, samples, count in ((2_000, 2, 1), (3_000, 3, 2), (1, 1, 1)):
        agent.cache_tokens = room
        found = grpo.batches(agent, problems, samples, count)
        assert sorted(p.id for some in found for p in some) == list(range(40))
        widths = [[width(p, samples, count) for p in some] for some in found]
        assert sum(widths, []) == sorted(sum(widths, []), reverse=True)  # longest first
        for some, after in zip(widths, widths[1:] + [[]], strict=True):
            assert len(some) == 1 or len(some) * some[0] <= room
            assert not after or (len(some) + 1) * some[0] > room  # one more does not fit
    assert len(found) == 40 and grpo.batches(agent, [], 1, 1) == []


# -- Failures and evaluation -----------------------------------------------------------------------


def test_a_dataset_of_failures_holds_first_wrong_tries(agent, task, monkeypatch, tmp_path):
    def verify(agent, problem, turn):  # some problems are solved at every try
        return Verdict(problem.id % 5 == 0 or sum(turn) % 2 == 0, "x")

    monkeypatch.setattr(Agent, "verify", verify)
    problems = task.load(split="train", limit=20)
    conversations = grpo.sample_attempts(agent, problems, 4, (grpo.COLLECT, 0))
    agent.cache_tokens = 500  # the work is split, the samples are the same
    failures = r3.find_failures(agent, problems, 4, tmp_path / "tries.jsonl")
    wanted = []
    for problem in problems:
        wanted += [
            c for c in conversations if c.problem == problem and not c.attempt_verdict.correct
        ][:1]
    assert turns(failures) == turns(wanted)
    assert {c.attempt_index for c in wanted} > {0, 1} and 8 < len(wanted) <= 16


def test_what_was_evaluated_is_not_evaluated_again(agent, task, lenient, tmp_path, asked):
    """A file is complete or absent, and a complete one is read."""
    problems, path = task.load(split="dev", limit=12), tmp_path / "kept" / "conversations.jsonl"
    agent.cache_tokens = 400  # several batches
    whole = turns(r3.evaluate(agent, problems, 2, "m", path))
    assert asked and whole == turns(r3.evaluate(agent, problems, 2, "m"))
    ids = sorted(p.id for p in problems)
    assert [(c.problem.id, c.attempt_index) for c in whole] == [(i, s) for i in ids for s in (0, 1)]
    assert len(lines(path)) == 24
    asked.clear()
    again = r3.evaluate(agent, problems, 2, "m", path)
    assert [replace(c, truncated=False) for c in whole] == again and not asked


def test_a_dataset_of_failures_is_not_found_again(agent, task, lenient, tmp_path, asked):
    """Killed after any line, within a line, and with another budget: the same failures."""
    problems, path = task.load(split="train", limit=12), tmp_path / "tries.jsonl"
    agent.cache_tokens = 400
    whole = turns(r3.find_failures(agent, problems, 3, path))
    written = path.read_text().splitlines(keepends=True)
    assert len(written) == len(whole) > 5
    order = [p.id for some in grpo.batches(agent, problems, 1, turns=1) for p in some]
    for count, budget in ((0, 99_999), (5, 400), (len(written), 800)):
        path.write_text("".join(written[:count]) + written[0][:-1])
        agent.cache_tokens = budget
        asked.clear()
        again = turns(r3.find_failures(agent, problems, 3, path))
        assert [replace(c, truncated=False) for c in again] == whole
        assert path.read_text() == "".join(written)  # each line is whole, and in its place
        last = json.loads(written[count - 1])["problem"]["id"] if count else None
        left = order[order.index(last) + 1 :] if count else order
        assert {p.id for p in asked} == set(left)


DAMAGE = [
    lambda r: "{",
    lambda r: "7",
    lambda r: "[" * 100_000,
    lambda r: "\udcff",
    lambda r: json.dumps({k: v for k, v in r.items() if k != "ids"}),
    lambda r: json.dumps({**r, "ids": {**r["ids"], "attempt": []}}),
    lambda r: json.dumps({**r, "ids": {**r["ids"], "attempt": [5, 99_999_999_999]}}),
    lambda r: json.dumps({**r, "ids": {**r["ids"], "attempt": [5, -1]}}),
    lambda r: json.dumps({**r, "ids": {**r["ids"], "attempt": r["ids"]["attempt"] + [5000]}}),
    lambda r: json.dumps({**r, "ids": {**r["ids"], "attempt": "abc"}}),
    lambda r: json.dumps({**r, "ids": {**r["ids"], "answer": [1]}}),
    lambda r: json.dumps({**r, "attempt": "something else"}),
    lambda r: json.dumps({**r, "retry": "something else"}),
    lambda r: json.dumps({**r, "problem": {"id": 1}}),
    lambda r: json.dumps({**r, "problem": {**r["problem"], "target": 61}}),
    lambda r: json.dumps({**r, "attempt_index": "a"}),
    lambda r: json.dumps({**r, "attempt_index": 1e999}),
    lambda r: json.dumps({**r, "attempt_verdict": {"correct": True, "reason": "correct"}}),
]


@pytest.mark.parametrize("change", DAMAGE)
def test_a_damaged_conversation_is_named_by_its_line(agent, task, tmp_path, change):
    path = tmp_path / "failures.jsonl"
    conversations = r3.evaluate(agent, task.load(limit=3), 1, "m", path)
    assert r3.load_conversations(path, agent) == [
        replace(c, reflection_logprobs=[], truncated=False) for c in conversations
    ]
    text = path.read_text().splitlines(keepends=True)
    changed = change(json.loads(text[1])) + "\n"
    path.write_bytes("".join([text[0], changed, text[2]]).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="failures.jsonl, line 2 "):
        r3.load_conversations(path, agent)


def test_failures_are_judged_again(agent, task, tmp_path, monkeypatch):
    path = tmp_path / "failures.jsonl"
    r3.evaluate(agent, task.load(limit=1), 1, "m", path)
    assert len(r3.load_conversations(path, agent)) == 1
    monkeypatch.setattr(tasks.Countdown, "verify", lambda *_: Verdict(True, "correct"))
    with pytest.raises(ValueError, match="failures.jsonl, line 1 "):
        r3.load_conversations(path, agent)


def test_the_numbers_are_those_of_the_conversations(agent, task, lenient, tmp_path):
    conversations = r3.evaluate(agent, task.load(split="dev", limit=30), 2, "")
    first = [c.attempt_verdict.correct for c in conversations]
    two = [c.attempt_verdict.correct or c.retry_verdict.correct for c in conversations]
    assert 0 < sum(first) < sum(two) < 60
    rows = r3.accuracy(model=conversations)
    assert list(rows) == ["model"]
    assert rows["model"]["1st try"][0] == pytest.approx(np.mean(first))
    assert rows["model"]["within two"][0] == pytest.approx(np.mean(two))
    assert rows["model"]["1st try"] == r3.interval(np.array(first, float), conversations)
    none = [
        replace(c, attempt_verdict=Verdict(False, "x")) for c in conversations
    ]  # the rule of three, from 0 on
    assert r3.accuracy(model=none)["model"]["1st try"] == pytest.approx([0, 0, 3 / 30])

    worse = [
        replace(c, retry_verdict=Verdict(False, "x")) for c in conversations
    ]  # all retries are wrong
    rows = r3.accuracy(before=worse, after=conversations)
    assert list(rows) == ["before", "after", "gain"]
    assert rows["before"]["within two"][0] == 0  # of those with first tries right, too
    assert rows["gain"]["within two"] == r3.interval(np.array(two, float), conversations)
    assert rows["gain"]["1st try"] == pytest.approx([0, -0.1, 0.1])
    r3.report(r3.TINY, tmp_path, model=conversations)
    tables = json.loads((tmp_path / "report.json").read_text())["tables"]
    assert tables["The verifier's reasons"] == {
        "model, 1st try": {"correct": sum(first), "wrong_value": 60 - sum(first)},
        "model, retry": {"correct": sum(two) - sum(first), "wrong_value": 60 - sum(two)},
    }


def test_tables_are_markdown():
    rows = {"vanilla": {"1st try": [0.25, 0.125, 0.5]}, "gain": {"1st try": [0.1, -0.1, 0.3]}}
    assert r3.markdown({"Right": rows, "Reasons": {"right": {"a": 7}, "x": {"b": 12}}}) == (
        "Right\n\n"
        "|         | 1st try              |\n"
        "|---------|----------------------|\n"
        "| vanilla | 25.0 [12.5, 50.0]    |\n"
        "| gain    | +10.0 [-10.0, +30.0] |\n\n"
        "Reasons\n\n"
        "|       | a | b  |\n"
        "|-------|---|----|\n"
        "| right | 7 |    |\n"
        "| x     |   | 12 |\n"
    )


# -- Training --------------------------------------------------------------------------------------


def failures_of(agent, task, count):
    return grpo.sample_attempts(agent, task.load(split="dev", limit=count), 1, (0, 0))


def trained(agent, failures, folder, **settings):
    """The lines of samples.jsonl after training without the KL term, and the metrics."""
    c = grpo.Config(beta=0.0, lr=0.0, **settings)
    found = [metrics for _, metrics in grpo.train(agent, None, failures, c, folder)]
    return lines(folder / "samples.jsonl"), found[1:]


def test_rewards_go_to_reflections_and_cut_ones_earn_nothing(agent, task, lenient, tmp_path):
    agent.tokenizer.stop_ids = [0, *range(20, 30)]  # so that some turns end and some are cut
    failures = failures_of(agent, task, 3)
    order = grpo.draw_failures(failures, 0, 3, agent.seed)
    conversations = grpo.rollout(agent, order, 8, (grpo.TRAIN, 0))
    ended = [c.reflection[-1] in agent.tokenizer.stop_ids for c in conversations]
    right = [sum(c.retry) % 3 == 0 for c in conversations]
    assert len(set(zip(ended, right, strict=True))) == 4  # ended or cut, right or wrong: all four
    samples, [metrics] = trained(agent, failures, tmp_path, steps=1, batch_size=3, group_size=8)
    wanted = torch.tensor([float(e and r) for e, r in zip(ended, right, strict=True)])
    assert [line["reward"] for line in samples] == wanted.tolist()
    advantages = grpo.group_advantages(wanted.view(3, 8)).flatten()
    assert [line["advantage"] for line in samples] == advantages.tolist()
    for c, line in zip(conversations, samples, strict=True):
        assert line["ids"]["reflection"] == c.reflection  # the trained tokens
        assert line["step"] == 1 and line["problem"] == json.loads(json.dumps(asdict(c.problem)))
        turns = {name: getattr(c, name) for name in ("attempt", "reflection", "retry")}
        for name, turn in {"context": c.reflection_prompt, **turns}.items():
            assert line[name] == agent.tokenizer.tokenizer.decode(turn, False)
        assert (line["attempt_verdict"], line["retry_verdict"]) == (
            asdict(c.attempt_verdict),
            asdict(c.retry_verdict),
        )
    assert metrics["reward"] == pytest.approx(wanted.mean().item())
    assert metrics["truncated"] == pytest.approx(1 - np.mean(ended))


def test_every_step_samples_anew(agent, task, lenient, tmp_path):
    """The same failures, the same weights: other reflections."""
    samples, _ = trained(
        agent, failures_of(agent, task, 2), tmp_path, steps=3, batch_size=2, group_size=3
    )
    by_step = [[line for line in samples if line["step"] == step] for step in (1, 2, 3)]
    said = [[(line["context"], line["reflection"]) for line in some] for some in by_step]
    assert {context for context, _ in said[0]} == {context for context, _ in said[1]}
    assert len({tuple(some) for some in said}) == 3


def test_every_failure_comes_once_an_epoch_and_never_twice_a_step():
    failures = conversations(range(10))
    drawn = [
        [c.problem.id for c in grpo.draw_failures(failures, step, 5, seed=0)] for step in range(4)
    ]
    assert sorted(drawn[0] + drawn[1]) == sorted(drawn[2] + drawn[3]) == list(range(10))
    assert drawn[:2] != drawn[2:]
    for step in range(9):
        ids = [c.problem.id for c in grpo.draw_failures(failures, step, 7, seed=0)]
        assert len(ids) == len(set(ids))
    assert len(grpo.draw_failures(failures, 0, 25, seed=0)) == 10


def test_dialogues_of_the_cold_start_train_the_assistants_turns(task, tiny, monkeypatch):
    monkeypatch.setitem(r3.COLD_START, "dialogues", 4)
    tokenizer, problems = tiny[1], task.load(split="cold")
    drawn = r3.dialogues(task, tokenizer, problems, "key", diligent=False)
    assert len(drawn) == r3.STEPS_PER_DRAW and {len(ids) for ids, _ in drawn} == {4}
    retries = 0
    for ids, mask in drawn:
        for row, trained in zip(ids.tolist(), mask.tolist(), strict=True):
            size = 1 + max(i for i, it in enumerate(trained) if it)  # then padding
            text = tokenizer.tokenizer.decode(row[:size], False)
            said = re.split(r"(?<=<\|assistant\|>)|(?<=<\|end\|>)", text)
            wanted = []
            for part in said:
                own = "<|assistant|>" not in part and "<|user|>" not in part
                wanted += [own] * len(tokenizer.encode(part))
            assert trained[:size] == wanted and text.endswith("<|end|>")
            if task.retry_instruction in text:
                assert text.index(task.reflection_instruction) < text.index(task.retry_instruction)
                retries += 1
    assert retries
    again = r3.dialogues(task, tokenizer, problems, "key", diligent=False)
    assert all(torch.equal(a, b) for a, b in zip(sum(drawn, ()), sum(again, ()), strict=True))
    other = r3.dialogues(task, tokenizer, problems, "other key", diligent=False)
    assert any(
        a[0].shape != b[0].shape or (a[0] != b[0]).any() for a, b in zip(drawn, other, strict=True)
    )


def test_a_recipe_that_changes_makes_another_base(small, task, base, monkeypatch):
    weights = (base / "model.safetensors").read_bytes()
    made = time.time()
    assert r3.base_model(task, 0).name == base.name
    (small / base.name / "model.safetensors").unlink()  # it was killed before it was complete
    assert (r3.base_model(task, 0) / "model.safetensors").read_bytes() == weights
    assert (small / base.name / "model.safetensors").stat().st_mtime > made - 1
    monkeypatch.setitem(r3.COLD_START, "steps", 2)
    two = r3.base_model(task, 0)
    assert two.name != base.name and (two / "model.safetensors").read_bytes() != weights
    assert r3.base_model(task, 1).name not in (two.name, base.name)


def test_the_cold_start_learns(task, monkeypatch, tmp_path):
    """The loss falls well below that of random words, which is log 150 = 5."""
    monkeypatch.setitem(r3.COLD_START, "steps", 16)
    monkeypatch.setattr(r3, "RUNS", tmp_path)
    path, problems = r3.base_model(task, 0), task.load(split="cold")
    model, tokenizer = models.Model.from_pretrained(path), models.Tokenizer.from_pretrained(path)
    ids, mask = r3.dialogues(task, tokenizer, problems, "other", diligent=True)[0]
    with torch.no_grad():
        log_p = model(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert -log_p[mask[:, 1:]].mean() < 2.5


def test_an_interrupted_run_says_how_to_go_on(small, lenient, monkeypatch):
    """With Ctrl-C during an evaluation: the steps before it are kept."""
    evaluate = r3.evaluate

    def stops(agent, problems, samples, title, path=None):
        if title == "step 4":
            raise KeyboardInterrupt
        return evaluate(agent, problems, samples, title, path)

    flags = ["train", *SHORT, "--steps", "8", "--save-every", "3", "--name"]
    r3.main([*flags, "whole"])
    monkeypatch.setattr(r3, "evaluate", stops)
    with pytest.raises(SystemExit, match="interrupted; go on with: r3.py train --resume .*/x/y"):
        r3.main([*flags, "x/y"])
    monkeypatch.setattr(r3, "evaluate", evaluate)
    run = small / "x" / "y"
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [0, 1, 2, 3]
    r3.main(["train", "--resume", str(run)])
    for name in ("metrics.jsonl", "samples.jsonl", "report.json", "failures.jsonl"):
        assert (run / name).read_text() == (small / "whole" / name).read_text(), name


def test_the_main_job_and_the_files_it_leaves(small, base, lenient, capsys):
    r3.main(["train", *SHORT, "--name", "a"])
    printed = capsys.readouterr().out
    run = small / "a"
    assert {path.name for path in run.iterdir()} == {
        "config.json", "failures.jsonl", "metrics.jsonl", "timings.jsonl", "samples.jsonl",
        "checkpoint.safetensors", "model", "report.json", "curves.png", "vanilla.jsonl",
        "trained.jsonl",
    }  # fmt: skip
    assert len(lines(run / "trained.jsonl")) == 2 * 4 == len(lines(run / "vanilla.jsonl"))
    tables = json.loads((run / "report.json").read_text())["tables"]
    assert r3.markdown(tables) in printed
    assert list(tables) == [
        "4 problems, 2 samples each, temperature 1: % right [95%]",
        "The verifier's reasons",
    ]
    rows = next(iter(tables.values()))
    assert list(rows) == ["vanilla", "trained", "gain"]
    for column in ("1st try", "within two"):  # gain is after minus before
        gain = rows["trained"][column][0] - rows["vanilla"][column][0]
        assert rows["gain"][column][0] == pytest.approx(gain)
    config = json.loads((run / "config.json").read_text())
    assert config["seed"] == 0 and config["lr"] == 3e-4 and config["command"] == "train"
    assert config["torch"] == torch.__version__
    steps = lines(run / "metrics.jsonl")
    assert [line["step"] for line in steps] == [0, 1, 2, 3] and "within two" in steps[0]
    assert max(line.get("mismatch", 0) for line in steps) < 1e-4  # invariant 2, over a whole run
    # The reference is the model as it was, not as it is: no divergence at first, and then some.
    assert abs(steps[1]["kl"]) < 1e-6 < steps[2]["kl"] < steps[3]["kl"]
    for record in lines(run / "failures.jsonl"):
        assert record["attempt_verdict"] == {"correct": False, "reason": "wrong_value"}
        assert record["ids"]["attempt"] and record["retry_verdict"] is None

    tokenizer = models.Tokenizer.from_pretrained(run / "model")
    samples = lines(run / "samples.jsonl")
    assert len(samples) == 3 * 4 * 3
    for group in range(0, 36, 3):
        rewards = torch.tensor([[s["reward"] for s in samples[group : group + 3]]])
        got = [s["advantage"] for s in samples[group : group + 3]]
        assert got == pytest.approx(grpo.group_advantages(rewards)[0].tolist())
    for sample in samples:
        assert sample["ids"]["reflection"] == tokenizer.encode(sample["reflection"])
        assert sample["context"].endswith("Wrong. Reflect. <|end|> <|assistant|>")

    # Invariant 6: the same seed gives the same weights, the base made anew, the failures given.
    weights = (run / "model" / "model.safetensors").read_bytes()
    base_weights = (small / base.name / "model.safetensors").read_bytes()
    assert base_weights != weights  # training did change them
    shutil.rmtree(small / base.name)
    r3.main(["train", *SHORT, "--name", "b"])
    for name in ("failures.jsonl", "metrics.jsonl", "samples.jsonl", "report.json"):
        assert (small / "b" / name).read_text() == (run / name).read_text()
    assert (small / "b" / "model" / "model.safetensors").read_bytes() == weights
    assert (small / base.name / "model.safetensors").read_bytes() == base_weights
    r3.main(["train", *SHORT, "--name", "c", "--failures", str(run / "failures.jsonl")])
    assert (small / "c" / "model" / "model.safetensors").read_bytes() == weights

    r3.main(["eval", "--model", str(run / "model"), "--limit", "5", "--max-new-tokens", "9"])
    assert "5 problems, 4 samples each, temperature 1" in capsys.readouterr().out
    [evaluated] = small.glob("eval-countdown-*")
    assert len(lines(evaluated / "conversations.jsonl")) == 20
    r3.main(["eval", "--limit", "5", "--max-new-tokens", "9", "--temperature", "0", "--name", "e"])
    assert "5 problems, 1 samples each, temperature 0" in capsys.readouterr().out
    assert len(lines(small / "e" / "conversations.jsonl")) == 5


def test_seeds_differ(small, lenient, monkeypatch):
    """In the tiny model, in the problems, in what is sampled."""
    in_steps(monkeypatch, 1)
    found = []
    for seed in ("1", "2"):
        flags = ["--seed", seed, "--limit", "4", "--max-new-tokens", "9", "--name", seed]
        r3.main(["eval", *flags])
        found.append(lines(small / seed / "conversations.jsonl"))
    assert not {line["context"] for line in found[0]} & {line["context"] for line in found[1]}
    assert not {line["attempt"] for line in found[0]} & {line["attempt"] for line in found[1]}


def test_a_dataset_of_failures_goes_on_where_it_was_killed(
    small, lenient, monkeypatch, capsys, asked
):
    command = ["failures", "--model", "tiny", "--num-problems", "30", "--max-attempts", "3"]
    command += ["--cache-tokens", "600", "--max-new-tokens", "12", "--name"]
    r3.main([*command, "whole"])
    append = r3.append_jsonl

    def dies(path, *records):
        append(path, *records)
        if len(path.read_text().splitlines()) >= 12:
            raise KeyboardInterrupt

    hint = "interrupted; go on with: r3.py failures --resume"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=hint):
        patch.setattr(r3, "append_jsonl", dies)
        r3.main([*command, "killed"])
    whole, killed = small / "whole" / "failures.jsonl", small / "killed" / "failures.jsonl"
    kept = {line["problem"]["id"] for line in lines(killed)}
    with open(killed, "a") as file:
        file.write('{"problem": {"id"')  # the next line was being written
    asked.clear()
    r3.main(["failures", "--resume", str(small / "killed")])
    assert killed.read_text() == whole.read_text()
    after = {problem.id for problem in asked}
    assert after and not kept & after
    count = len(lines(whole))
    assert 12 < count < 30 and f"{count} failures on 30 problems" in capsys.readouterr().out
    for flags, message in (
        (["train", "--resume", str(small / "killed")], "is a run of failures, not of train"),
        (["failures", "--resume", str(small / "nothing")], "No such file"),
        (["failures", "--resume", str(small / "killed"), "--seed", "1"], "from the run"),
        ([*command, "killed"], "choose another --name, or --resume"),
    ):
        with pytest.raises(SystemExit, match=message):
            r3.main(flags)


def test_play(small, capsys, monkeypatch):
    said = iter(["6 10 2 32", "nonsense", "6 10 2 99", "6 10 2 32", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    r3.main(["play", "--model", "tiny", "--max-new-tokens", "12"])
    printed = capsys.readouterr().out
    assert (
        printed.count("question  <|user|> Make 32 from 6 10 2 .") == 2
        or printed.count("question  Make 32 from 6 10 2 .") == 2
    )
    assert "reflection  " in printed and "<- no_answer" in printed
    assert printed.count("  type 3 numbers from 1 to 10") == 2  # for nonsense, and a target of 99
    answers = re.findall(r"attempt  (.*)", printed)
    assert len(answers) == 2 and answers[0] != answers[1]  # asked again, it answers otherwise

    def ends(_):
        raise EOFError

    monkeypatch.setattr("builtins.input", ends)
    r3.main(["play", "--model", "tiny"])  # Ctrl-D
    with pytest.raises(SystemExit, match="no run in .*: r3.py train makes one"):
        r3.main(["play"])


# -- Settings and bad input ------------------------------------------------------------------------


def refused(flags: list, capsys) -> str:
    """The one line that the command line ends in."""
    with pytest.raises(SystemExit) as stop:
        r3.main(flags)
    assert stop.value.code not in (0, None)
    if isinstance(stop.value.code, str):
        assert stop.value.code.startswith("r3.py: ") and "\n" not in stop.value.code
        return stop.value.code
    return capsys.readouterr().err.splitlines()[-1]  # argparse: the usage, then the line


def settings(command: str) -> list:
    """The fields of Config whose metadata names a command."""
    return [f for f in fields(r3.Config) if command in f.metadata.get("commands", "").split()]


@pytest.fixture
def parsers(monkeypatch):
    """The parser of each command."""
    found = []
    with monkeypatch.context() as patch:
        parse = argparse.ArgumentParser.parse_args
        patch.setattr(
            argparse.ArgumentParser, "parse_args", lambda s, a: found.append(s) or parse(s, a)
        )
        r3.read_command_line(["plot"])
    [commands] = [a.choices for a in found[0]._actions if a.dest == "command"]
    return commands


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flags_of_a_command_are_the_fields_that_name_it(parsers, command):
    actions = {action.dest: action for action in parsers[command]._actions}
    assert set(actions) - {"help", "resume"} == {f.name for f in settings(command)}
    assert ("resume" in actions) == (command in ("train", "failures"))
    for f in settings(command):
        action, tiny, paper = actions[f.name], getattr(r3.TINY, f.name), getattr(r3.PAPER, f.name)
        assert action.option_strings[0] == f"--{f.name.replace('_', '-')}"
        assert action.help.startswith(f.metadata["help"])
        assert action.default == argparse.SUPPRESS  # what is not given takes TINY's or PAPER's
        assert action.choices is None or action.choices == list(f.metadata["choices"])
        if tiny is not None:
            default = f"{tiny}" if tiny == paper else f"{tiny}; a checkpoint's: {paper}"
            assert f"(default: {default})" in action.help


@pytest.mark.parametrize("command", ["", *COMMANDS, "show", "plot"])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        r3.main([*command.split(), "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and printed.startswith("usage: r3.py")
    for each in ("train", "failures", "eval", "play", "show", "plot") if not command else ():
        assert f"    {each} " in printed  # with what it does
    assert max(map(len, printed.splitlines())) <= 200


def test_what_is_given_stands_over_the_defaults(folder, monkeypatch, small):
    commands, found = ("train_command", "eval_command", "play_command"), []
    for name in commands:
        monkeypatch.setitem(r3.COMMANDS, name[:-8], lambda c, folder=None: found.append(c))
    monkeypatch.setattr(r3, "play_command", r3.COMMANDS["play"])

    def settings_of(flags: str) -> r3.Config:
        r3.main(flags.split())
        return found.pop()

    tiny, paper = settings_of("train"), settings_of(f"train --model {folder}")
    assert tiny == r3.TINY and paper == replace(r3.PAPER, model=str(folder))
    assert (tiny.steps, tiny.batch_size, tiny.lr, tiny.num_samples) == (18, 32, 3e-4, 4)
    # The paper's values; and those of the method.
    assert (paper.steps, paper.batch_size, paper.lr, paper.beta) == (1_750, 256, 5e-7, 0.001)
    assert (paper.warmup, paper.temperature, paper.max_attempts, paper.num_samples) == (
        0.03,
        1.0,
        64,
        1,
    )
    assert paper.loss_type == "dapo" and paper.scale_advantages and paper.clip == 0.2
    assert paper.group_size == tiny.group_size == 8
    given = {"steps": 3, "scale_advantages": False, "limit": 7, "model": str(folder)}
    flags = f"train --steps 3 --no-scale-advantages --limit 7 --model {folder}"
    assert settings_of(flags) == replace(r3.PAPER, **given)
    model, tokenizer = models.tiny_model(tasks.TinyCountdown().words(), 0)
    tokenizer.save_pretrained(Path("a/model"))  # a tiny model's folder has the tiny's defaults
    assert settings_of("eval --model a/model") == replace(r3.TINY, model="a/model")
    model.save_pretrained(small / "x" / "model")
    tokenizer.save_pretrained(small / "x" / "model")
    newest = replace(r3.TINY, model=str(small / "x" / "model"), seed=7)
    assert settings_of("play --seed 7") == newest
    assert settings_of("eval --temperature 0").num_samples == 1  # greedy tries are all alike
    read = r3.read_command_line
    flags = "--no-scale-advantages --steps 5 --lr 1e-5 --data d.json --loss-type grpo"
    flags += " --offload --seed 3"
    assert read(["train", *flags.split()]) == {
        "command": "train", "scale_advantages": False, "steps": 5, "lr": 1e-5, "data": "d.json",
        "loss_type": "grpo", "offload": True, "seed": 3,
    }  # fmt: skip


def bad_values():
    """Each flag of each command with values that it cannot have."""
    for command in COMMANDS:
        for f in settings(command):
            kind, least, choices = f.type, f.metadata["least"], f.metadata["choices"]
            values = ["nonsense"] if choices or kind in (int, float, int | None) else []
            values += [str(least - 1)] if least is not None else []
            values += ["nan", "inf"] if kind is float else []
            for value in values:
                yield command, f.name, value


def test_every_flag_refuses_what_it_cannot_be(small, capsys):
    values = list(bad_values())
    assert len(values) > 80
    for command, name, value in values:
        model = ["--model", "tiny"] if command == "play" else []
        said = refused([command, *model, f"--{name.replace('_', '-')}={value}"], capsys)
        assert f"--{name.replace('_', '-')}" in said and value in said, (command, name, said)
    with pytest.raises(ValueError, match="--group-size 1: give a number from 2 on"):
        r3.Config(group_size=1)
    assert {path.name[:5] for path in small.iterdir()} == {"base-"}


@pytest.mark.parametrize(
    "flags, message",
    [
        ("dance", "COMMAND"),
        ("", "COMMAND"),
        ("train --stepps 3", "--stepps"),
        ("play --steps 3", "--steps"),
        ("train --temperature 0", "nothing to compare"),
        ("eval --model nowhere", "nowhere: no such file or folder"),
        ("eval --model no/where", "no/where is not to be had from the hub"),
        ("eval --model .", "No such file or directory: 'tokenizer_config.json'"),
        ("eval --model {folder} --data nowhere.json", "nowhere.json: no such file"),
        ("eval --model {folder} --task apigen", "xlam-function-calling-60k is not to be had"),
        ("eval --model {folder}", "Countdown-Tasks-3to4 is not to be had"),
        ("eval --model {folder} --split cold", "--split"),
        ("eval --model tiny --max-new-tokens 300", "lower --max-new-tokens"),
        ("eval --task apigen", "give --model a folder for"),
        ("eval --data x.json", "give --model a folder for"),
        ("play --model tiny --task apigen", "give --model a folder for"),
        ("eval --split all", "no split 'all'"),
        ("train --failures nowhere.jsonl", "nowhere.jsonl"),
        ("train --failures .", "directory"),
        ("train --device banana", "torch finds no such device here"),
        ("train --device cuda:99", "torch finds no such device here"),
        ("train --device meta", "torch finds no such device here"),
        ("train --resume nowhere", "No such file or directory: 'nowhere/config.json'"),
        ("train --resume . --steps 3", "--resume takes all other settings from the run"),
        ("show nowhere", "No such file or directory: 'nowhere/conversations.jsonl'"),
        ("show --limit x", "--limit"),
        ("show", "no run in"),
        ("plot nowhere", "No such file or directory: 'nowhere/metrics.jsonl'"),
        ("plot", "no run in"),
    ],
)
def test_bad_input_ends_in_one_line(small, folder, capsys, flags, message, monkeypatch):
    monkeypatch.setattr(models.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert message in refused(flags.format(folder=folder).split(), capsys)
    assert {path.name[:5] for path in small.iterdir()} == {"base-"}  # nothing is left behind


@pytest.mark.parametrize(
    "config, message",
    [
        ("", "config.json is not JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "is a run of None, not of train"),
        ('{"command": "train"}', "config.json is damaged"),
        ({"steps": "absent"}, "config.json is damaged"),
        ({"steps": [1]}, "config.json is damaged"),
        ({"steps": 0}, "--steps 0"),
    ],
)
def test_a_damaged_config_ends_in_one_line(small, capsys, config, message):
    run = small / "x"
    r3.write_config(run, "train", r3.TINY)
    whole = json.loads((run / "config.json").read_text())
    if isinstance(config, dict):
        config = {**whole, **config}
        config = json.dumps({name: value for name, value in config.items() if value != "absent"})
    (run / "config.json").write_text(config)
    assert message in refused(["train", "--resume", str(run)], capsys)


def test_a_run_without_failures_says_so(small, capsys, monkeypatch):
    """Also where --failures holds right attempts alone."""
    monkeypatch.setattr(Agent, "verify", lambda *_: Verdict(True, "correct"))
    nothing = "there are no failures to learn from"
    assert nothing in refused(["train", *SHORT, "--name", "a"], capsys)
    assert lines(small / "a" / "failures.jsonl") == []
    r3.main(["eval", "--limit", "5", "--max-new-tokens", "12", "--name", "e"])
    capsys.readouterr()
    path = small / "e" / "conversations.jsonl"
    flags = ["train", *SHORT, "--name", "b", "--failures", str(path)]
    assert nothing in refused(flags, capsys)


def test_right_attempts_are_not_trained_on(small, lenient, capsys):
    """Of a file with right and wrong ones, as `eval` leaves it, the wrong ones are taken."""
    r3.main(["eval", "--limit", "5", "--max-new-tokens", "12", "--name", "e"])
    path = small / "e" / "conversations.jsonl"
    wrong = [line for line in lines(path) if not line["attempt_verdict"]["correct"]]
    assert 0 < len(wrong) < len(lines(path))
    r3.main(["train", *SHORT, "--steps", "1", "--name", "t", "--failures", str(path)])
    assert lines(small / "t" / "failures.jsonl") == wrong
    capsys.readouterr()
    wrong[0]["ids"]["attempt"][0] = 5_000  # no token of this model
    path.write_text(json.dumps(wrong[0]) + "\n")
    flags = ["train", *SHORT, "--name", "u", "--failures", str(path)]
    assert "conversations.jsonl, line 1 does not fit this run" in refused(flags, capsys)
    assert not (small / "u").exists()


def test_out_of_memory_ends_in_one_line(small, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 MiB")

    monkeypatch.setattr(Agent, "generate", full)
    said = refused(["eval", "--limit", "2", "--name", "x"], capsys)
    assert "out of GPU memory; lower --cache-tokens" in said


# -- Looking at a run ------------------------------------------------------------------------------


@pytest.fixture
def samples():
    """Two steps: of one failure two tries in the first, of two failures one each in the last."""

    def line(step, number, context, reward, advantage, **more):
        turns = {"context": context, "attempt": "7", "reflection": "Hm", "retry": "8"}
        second = {"correct": reward > 0, "reason": "correct" if reward else "wrong_value"}
        verdicts = {
            "attempt_verdict": {"correct": False, "reason": "wrong_value"},
            "retry_verdict": second,
        }
        worth = {"reward": reward, "advantage": advantage}
        known = {"step": step, "problem": {"id": number}, "attempt_index": 0}
        return {**known, **turns, **verdicts, **worth, **more}

    return [
        line(1, 5, "five", 1.0, 0.7), line(1, 5, "five", 0.0, -0.7),
        line(2, 5, "five", 0.0, 0.0), line(2, 6, "six", 1.0, 0.0),
    ]  # fmt: skip


@pytest.fixture
def run(small, samples):
    """A run that sampled them."""
    (small / "x").mkdir(parents=True)
    write(small / "x" / "samples.jsonl", samples)
    return small / "x"


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_show_groups_the_tries_of_a_step(run, samples, capsys):
    def found(*flags):
        """(context, reasons of its tries) of each group."""
        r3.main(["show", str(run), *flags])
        groups = re.split(r" +context  ", capsys.readouterr().out)[1:]
        conversations = [re.findall("<- (correct|wrong_value)", group) for group in groups]
        return list(zip((group.split()[0] for group in groups), conversations, strict=True))

    assert found() == [("five", ["wrong_value"]), ("six", ["correct"])]  # of the last step
    assert found("--step", "1") == [("five", ["correct", "wrong_value"])]
    assert found("--limit", "1") == [("five", ["wrong_value"])]
    assert "has no step 7" in refused(["show", "--step", "7"], capsys)
    six = {**samples[3], "context": "seven"}
    write(run / "samples.jsonl", [*samples[2:], {**six, "advantage": 0.5}])
    assert [context for context, _ in found()] == ["seven", "five", "six"]  # the mixed one first


def test_show_prints_what_was_said(run, samples, capsys):
    r3.main(["show", str(run), "--step", "1"])
    plain = capsys.readouterr().out
    assert "+0.70 reflection  Hm" in plain and "-0.70 reflection  Hm" in plain
    assert "retry  8   <- correct" in plain and "retry  8   <- wrong_value" in plain
    assert "             context  five" in plain
    long = {**samples[3], "reflection": "\033[2Jgone\a\n\tTab " + "word " * 100}
    write(run / "samples.jsonl", [long])
    r3.main(["show"])  # no terminal obeys what a model says
    printed = capsys.readouterr().out
    assert "[2Jgone" in printed and "Tab word" in printed and printed.isascii()
    assert all(c.isprintable() or c == "\n" for c in printed)
    assert printed.count("word") == 100 and max(map(len, printed.splitlines())) <= 100

    right = {
        "problem": {"id": 1},
        "attempt_index": 0,
        "context": "a",
        "attempt": "b",
        "retry_verdict": None,
    }
    right["attempt_verdict"] = {"correct": True, "reason": "correct"}
    write(run / "conversations.jsonl", [right])  # what eval leaves
    (run / "samples.jsonl").unlink()
    r3.main(["show", str(run)])
    printed = capsys.readouterr().out
    assert "attempt  b   <- correct" in printed
    assert "reflection" not in printed and "retry" not in printed


def test_show_refuses_what_is_no_run(run, samples, capsys):
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 3')  # a run may be writing it
    r3.main(["show"])
    assert "context  six" in capsys.readouterr().out
    for text in ('{"step": 1}', "[]", "7", "{", "", "\udcff"):
        (run / "samples.jsonl").write_bytes(f"{text}\n".encode(errors="surrogateescape"))
        said = refused(["show"], capsys)
        assert "samples.jsonl is not what a run of r3.py writes" in said, text


def test_plot(small, monkeypatch, capsys):
    runs = []
    for name in ("one", "two"):
        (small / name).mkdir(parents=True)
        rows = [
            {"step": 0, "within two": [0.1, 0.05, 0.2]},
            {"step": 1, "reward": 0.2, "reflection_tokens": 7},
        ]
        rows += [{"step": 2, "within two": [0.2, 0.1, 0.4], "reward": 0.4, "kl": math.nan}]
        write(small / name / "metrics.jsonl", rows)
        runs.append(str(small / name))
    with (small / "two" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')  # a run may be writing it
    r3.main(["plot", runs[0]])
    assert (small / "one" / "curves.png").read_bytes()[1:4] == b"PNG"
    assert f"The curves are in {small / 'one' / 'curves.png'}" in capsys.readouterr().out
    r3.main(["plot", *runs])
    assert Path("curves.png").read_bytes() != (small / "one" / "curves.png").read_bytes()
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda f, path, **_: drawn.append(f))
    r3.main(["plot", *runs])
    assert "curves.png" in capsys.readouterr().out
    axes = dict(zip(r3.PANELS, drawn[0].axes, strict=True))
    for name, axis in axes.items():
        assert axis.get_title() == r3.PANELS[name]
        assert len(axis.containers) == {
            "within two": 2,
            "reward": 2,
            "reflection_tokens": 2,
            "kl": 2,
        }.get(name, 0)
    line, _, [bars] = axes["within two"].containers[0]
    assert line.get_xydata().tolist() == [[0, 0.1], [2, 0.2]]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert np.allclose(ends, [[0.05, 0.2], [0.1, 0.4]])  # low and high
    assert axes["reward"].containers[0][0].get_xydata().tolist() == [[1, 0.2], [2, 0.4]]
    labels = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert labels == ["one", "two"]
    for text in ('{"reward": 1}', "[]", "{"):
        (small / "one" / "metrics.jsonl").write_text(text + "\n")
        said = refused(["plot", *runs], capsys)
        assert "one/metrics.jsonl is not what a run of r3.py writes" in said


# -- Checkpoints of others -------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """A file of function-calling problems: 6 to train on, 2 and 2 to evaluate on."""
    task, problems = DrawnAPIGen(), []
    for split, count in (("train", 6), ("dev", 2), ("test", 2)):
        problems += task.load(split=split, limit=count)
    write(tmp_path / "data.jsonl", [asdict(problem) for problem in problems])
    return tmp_path / "data.jsonl"


def test_a_folder_with_apigen_from_a_file(small, folder, data, capsys):
    flags = ["eval", "--model", str(folder), "--task", "apigen", "--data", str(data)]
    whole = data.read_text()
    data.write_text(whole + "{")
    assert "data.jsonl, record 11: " in refused(flags, capsys)
    data.write_text(whole)
    r3.main([*flags, "--split", "all", "--max-new-tokens", "9", "--name", "e"])
    printed = capsys.readouterr().out
    assert "10 problems, 1 samples each, temperature 1" in printed and "no_answer" in printed
    told = lines(small / "e" / "conversations.jsonl")
    assert sorted(c["problem"]["id"] for c in told) == list(range(10))
    for c in told:
        # The template has no place for tools: they are in the text.
        assert c["problem"]["tools"].split('"name": "')[1].split('"')[0] in c["context"]
        assert not c["attempt_verdict"]["correct"] and c["retry"] and c["retry_verdict"]
    rows = json.loads((small / "e" / "report.json").read_text())["tables"]
    assert next(iter(rows.values()))["model"]["within two"][0] == 0
    r3.main([*flags, "--max-new-tokens", "9", "--name", "dev"])
    assert "2 problems" in capsys.readouterr().out


def test_a_folder_is_trained(small, folder, lenient, countdown):
    few = [
        "--num-problems",
        "4",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--name",
        "f",
        "--max-attempts",
        "1",
    ]
    few += ["--max-new-tokens", "8", "--limit", "2", "--lr", "0.01", "--data", countdown]
    r3.main(["train", "--model", str(folder), *few])
    config = json.loads((small / "f" / "config.json").read_text())
    given = {
        "max_new_tokens",
        "limit",
        "num_problems",
        "steps",
        "batch_size",
        "name",
        "max_attempts",
        "lr",
    }
    given |= {"model", "data"}
    for f in fields(r3.Config):  # what is not given is the paper's
        assert f.name in given or config[f.name] == getattr(r3.PAPER, f.name)
    assert config["group_size"] == 8 and config["beta"] == 0.001 and config["lr"] == 0.01
    trained = transformers.AutoModelForCausalLM.from_pretrained(small / "f" / "model")
    before = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, 257, (1, 9))
    assert not torch.allclose(trained(ids).logits, before(ids).logits, atol=1e-4)
    ours = models.Model.from_pretrained(small / "f" / "model")
    assert torch.allclose(ours(ids), trained(ids).logits, atol=1e-4)
    assert max(s.get("mismatch", 0) for s in lines(small / "f" / "metrics.jsonl")) < 1e-4


def test_the_papers_experiment_finds_its_splits(small, folder, data, monkeypatch, capsys):
    """Without --data the hub's: trained on "train", evaluated on the split that is asked for."""
    found, load, from_hub = [], tasks.APIGen.load, models.from_hub

    def asked_for(name, files, kind="model"):
        if kind == "model":
            return from_hub(name, files)
        found.append(name)
        return data

    def stops(*_):
        raise ValueError("nothing but failures is missing")

    monkeypatch.setattr(models, "from_hub", asked_for)
    monkeypatch.setattr(r3, "find_failures", stops)
    monkeypatch.setattr(
        tasks.APIGen, "load", lambda self, *rest: found.append(rest[1]) or load(self, *rest)
    )
    flags = ["--model", str(folder), "--task", "apigen", "--max-new-tokens", "8"]
    name = "Salesforce/xlam-function-calling-60k"
    for split, more in (("dev", []), ("test", ["--split", "test"])):
        flags += ["--name", split]
        assert "nothing but failures is missing" in refused(["train", *flags, *more], capsys)
        assert found == [name, split, name, "train"]
        found.clear()


def open_folder(folder, **more):
    return r3.load_agent(
        replace(r3.PAPER, model=str(folder), device="cpu", dtype="float32", **more)
    )


def test_problems_that_might_outgrow_the_context_are_dropped_and_counted(
    agent, task, capsys, monkeypatch
):
    problems = task.load(split="dev", limit=8)
    agent.max_new_tokens = 160
    c = replace(r3.TINY, max_new_tokens=160)
    assert r3.load_problems(c, agent, "dev", 8) == problems and capsys.readouterr().out == ""
    question = Agent.attempt_prompt
    bridges = agent.tokenizer.bridge(task.reflection_instruction) + agent.tokenizer.bridge(
        task.retry_instruction
    )
    room = 512 - 3 * 160 - len(bridges)
    monkeypatch.setattr(Agent, "attempt_prompt", lambda s, p: question(s, p) + [9] * (3 * p.id))
    longest = max(p.id for p in problems if len(question(agent, p)) + 3 * p.id <= room)
    assert 0 < longest < 7
    kept = r3.load_problems(c, agent, "dev", 8)
    assert kept == problems[: longest + 1]
    assert f"{7 - longest} problems dropped" in capsys.readouterr().out
    [last] = grpo.rollout(agent, grpo.sample_attempts(agent, kept[-1:], 1, (0, 0)), 1, (0, 0))
    assert len(last.reflection_prompt) + len(last.reflection) + len(last.retry) < 512
    with pytest.raises(ValueError, match="lower --max-new-tokens"):
        r3.load_problems(replace(c, max_new_tokens=200), agent, "dev", 8)


def test_padded_rows_of_the_head_are_neither_sampled_nor_trained(folder):
    agent = open_folder(folder, max_new_tokens=40, seed=0)
    assert agent.model.vocab_size == 258 < agent.model.config.vocab_size == 300
    with torch.no_grad():
        agent.model.model.embed_tokens.weight[258:] = agent.model.model.embed_tokens.weight[65]
    problem = tasks.CountdownProblem(0, (6, 10, 2), 32)
    conversations = grpo.rollout(
        agent, grpo.sample_attempts(agent, [problem], 16, (0, 0)), 1, (0, 0)
    )
    said = [token for c in conversations for token in c.attempt + c.reflection]
    assert len(said) > 100 and max(said) < 258
    ids, mask, old = grpo.reflection_rows(conversations[:1])
    logprobs = grpo.token_logprobs(agent.model, ids, mask)
    assert torch.allclose(logprobs.detach(), old, atol=1e-4)


# -- Memory ----------------------------------------------------------------------------------------


class Loader:
    """Instead of Model: shapes of a model with 1.5 billion parameters, and no weights."""

    config = json.loads((Path(__file__).parent / "configs" / "qwen2.5-1.5b.json").read_text())
    loaded: list = []

    @classmethod
    def from_pretrained(cls, path, dtype, device):
        cls.loaded.append((path, dtype, device))
        with torch.device("meta"):
            return models.Model(cls.config)


@pytest.fixture
def memory(tiny, monkeypatch, capsys):
    """load_agent on a GPU that has so many free bytes: the keys' and values' tokens, and what was
    said to be needed, in GB by name."""

    def load(free: float, training=False, **settings):
        asked, zeros = [], torch.zeros
        free_of_all = int(free), 10**12
        with monkeypatch.context() as patch:
            patch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
            patch.setattr(
                torch.cuda, "mem_get_info", lambda device: asked.append(device) or free_of_all
            )
            patch.setattr(r3, "Model", Loader)
            patch.setattr(r3.Tokenizer, "from_pretrained", lambda path: tiny[1])
            given = {"model": "x", "device": "cuda:1", "dtype": "bfloat16", **settings}
            c = replace(r3.PAPER, **given)
            agent = r3.load_agent(c, training)
        dtype = getattr(torch, c.dtype)
        assert Loader.loaded == [("x", dtype, "meta"), ("x", dtype, c.device)]
        Loader.loaded.clear()
        assert agent.model.vocab_size == tiny[1].vocab_size
        assert asked == (["cuda:1"] if c.cache_tokens is None and c.device != "cpu" else [])
        said = capsys.readouterr().out
        needs = re.findall(r"[:,] ([a-z][\w ',]*?|[\d,]+ tokens[\w ']*) (\d[\d.]*)(?=,|\n)", said)
        assert len(needs) == 2 + 3 * training, said  # and none is 1.3e+02
        return agent.cache_tokens, {name: float(need) for name, need in needs}

    return load


def test_keys_and_values_get_what_is_left_of_a_gpu(memory):
    # In bfloat16 a token's keys and values: 2 x 28 layers x 2 heads x 128 numbers x 2 bytes.
    size, n = 28_672, 1_543_714_304
    tokens, needs = memory(40e9)
    assert tokens == int((0.9 * 40e9 - 2 * n) / (2.5 * size))
    assert needs["weights"] == pytest.approx(2 * n / 1e9, rel=0.01)
    assert sum(needs.values()) == pytest.approx(0.9 * 40, rel=0.01)  # all is used, and no more

    more, needs = memory(300e9, training=True)
    assert sum(needs.values()) == pytest.approx(0.9 * 300, rel=0.01)
    assert needs["reference"] == needs["weights"]
    assert needs["gradients, masters, moments"] == pytest.approx(18 * n / 1e9, rel=0.01)
    for saving in ({"offload": True}, {"beta": 0.0}, {"checkpointing": True}):
        assert memory(300e9, training=True, **saving)[0] > more
    fewer, _ = memory(300e9, training=True, group_size=16)
    assert fewer < more
    assert memory(1e9) == (4_096, memory(1e9)[1])  # never less than this
    assert memory(40e9, cache_tokens=7_000)[0] == 7_000  # given
    tokens, needs = memory(40e9, device="cpu", dtype="float32")
    assert tokens == 65_536 and needs["weights"] == pytest.approx(4 * n / 1e9, rel=0.01)
    assert needs["65,536 tokens' keys and values"] == pytest.approx(
        2.5 * 2 * size * 65_536 / 1e9, abs=0.01
    )


# -- Statistics ------------------------------------------------------------------------------------


def conversations(ids):
    problems = [SimpleNamespace(id=i) for i in ids]
    return [Conversation(p, 0, [], [], Verdict(False, "x")) for p in problems]


def test_interval_is_the_cluster_robust_one():
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(50), 4)
    values = (rng.random(200) < np.repeat(rng.random(50), 4)).astype(float)
    mean, low, high = r3.interval(values, conversations(ids))
    means = values.reshape(50, 4).mean(axis=1)  # equal clusters: the interval of problems' means
    half = 1.96 * means.std(ddof=1) / math.sqrt(50)
    assert (mean, low, high) == pytest.approx((means.mean(), mean - half, mean + half))
    for value in (0.0, 1.0):  # all alike: the rule of three, on the number of problems
        found = r3.interval(np.full(200, value), conversations(ids))
        assert found == pytest.approx([value, value - 3 / 50, value + 3 / 50])


def test_interval_covers_the_truth_about_95_times_of_100():
    rng, hits = np.random.default_rng(1), 0
    same = conversations(np.repeat(np.arange(80), 4))
    for _ in range(1_000):
        values = (rng.random(320) < np.repeat(rng.beta(2, 3, 80), 4)).astype(float)
        _, low, high = r3.interval(values, same)
        hits += low <= 0.4 <= high
    assert 920 <= hits <= 975
