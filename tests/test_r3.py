"""The experiment: failures, evaluation, the cold start, a whole run shrunk to seconds, and what a
user sees when the input is bad. Kills and damaged files are in test_trust.py."""

import argparse
import contextlib
import copy
import io
import itertools
import json
import math
import random
import re
import shutil
import sys
import time
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from conftest import (
    countdown_file,
    enlarge_weights,
    few_threads,
    shallow_model,
    shrink_r3,
    verdict_by_chance,
)
from drawn_apigen import DrawnAPIGen
from test_model import assert_close

import grpo
import r3
import tasks
from grpo import Agent, Conversation, Turn
from model import Model, Tokenizer, tiny_model
from tasks import Verdict

SMALL_RUN = [
    "--steps=4", "--batch-size=4", "--group-size=3", "--limit=4", "--num-problems=30",
    "--num-samples=2", "--max-attempts=1", "--max-new-tokens=16", "--save-every=3",
]  # fmt: skip


def shrink_runs(patch: pytest.MonkeyPatch, folder: Path, base_folder: Path) -> Path:
    """Make runs quick, and make the folder the current one. Returns its runs/, which contains the
    tiny model of seed 0 alone."""
    shrink_r3(patch)
    patch.setattr(r3, "RUNS", folder / "runs")
    patch.chdir(folder)
    shutil.copytree(base_folder, folder / "runs" / base_folder.name)
    return folder / "runs"


@pytest.fixture(scope="module", autouse=True)
def few_threads_in_this_file():
    with few_threads():
        yield


@pytest.fixture(autouse=True)
def program_name(monkeypatch):
    """The program that usage lines, hints and errors name."""
    monkeypatch.setattr(sys, "argv", ["r3.py"])


@pytest.fixture
def runs_folder(monkeypatch, tmp_path, base_folder):
    """The folder of small runs. It contains the tiny model alone. A run of `train` does not draw
    its curves, which takes a second."""
    monkeypatch.setattr(r3, "plot_command", lambda folders: None)
    return shrink_runs(monkeypatch, tmp_path, base_folder)


@pytest.fixture(scope="module")
def finished_run(base_folder, tmp_path_factory):
    """The folder of a complete small run of `train`, and what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        runs_folder = shrink_runs(patch, tmp_path_factory.mktemp("finished"), base_folder)
        patch.setattr(Agent, "verify", verdict_by_chance)
        r3.main(["train", *SMALL_RUN, "--name", "finished"])
    return runs_folder / "finished", printed.getvalue()


@pytest.fixture
def agent(task):
    """An agent with an untrained model."""
    return make_agent(task)


def make_agent(task) -> Agent:
    model, tokenizer = shallow_model(task.words(), seed=1)
    enlarge_weights(model)
    return Agent(model, tokenizer, task, max_new_tokens=12, seed=5)


@pytest.fixture
def chance_verifier(monkeypatch):
    """Verdicts depend on the token ids alone, so that an untrained model is correct at times."""
    monkeypatch.setattr(Agent, "verify", verdict_by_chance)


@pytest.fixture
def attempted_problems(monkeypatch):
    """A list, to which each problem is added when it is attempted."""
    problems, sample_attempts = [], grpo.sample_attempts

    def record(agent, batch, *rest, **options):
        problems.extend(batch)
        return sample_attempts(agent, batch, *rest, **options)

    monkeypatch.setattr(grpo, "sample_attempts", record)
    return problems


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def error_line(flags: list[str], capsys) -> str:
    """The one line with which the command line ends, which must be an error."""
    with pytest.raises(SystemExit) as stop:
        r3.main(flags)
    assert stop.value.code not in (0, None)
    if isinstance(stop.value.code, str):
        assert stop.value.code.startswith("r3.py: ") and "\n" not in stop.value.code
        return stop.value.code
    return capsys.readouterr().err.splitlines()[-1]  # argparse prints its usage before the error


# -- The conversation ------------------------------------------------------------------------------
def test_a_conversation_is_a_sequence_of_turns(agent, task):
    problems = task.load(split="dev", limit=5)
    attempts = grpo.sample_attempts(agent, problems, 2, (0, 0))
    assert [c.problem for c in attempts] == [p for p in problems for _ in range(2)]
    groups = grpo.rollout(agent, attempts, 3, (0, 0))
    assert [len(group) for group in groups] == [3] * 10
    end, encode = agent.tokenizer.stop_ids[0], agent.tokenizer.encode
    for before, group in zip(attempts, groups, strict=True):
        assert len({tuple(c.reflection.tokens) for c in group}) > 1
        for g, c in enumerate(group):
            assert (c.problem, c.attempt) == (before.problem, before.attempt)
            assert (c.attempt_index, c.reflection_index) == (before.attempt_index, g)
            prompt = c.attempt.prompt
            for turn, append_bridge, instruction in (
                (c.attempt, c.reflection, task.reflection_instruction),
                (c.reflection, c.retry, task.retry_instruction),
            ):
                assert len(turn.logprobs) == len(turn.tokens) <= 12
                assert turn.truncated == (turn.tokens[-1] != end)
                prompt = prompt + turn.tokens + [end] * turn.truncated
                prompt = prompt + encode(f"<|user|> {instruction} <|end|> <|assistant|>")
                assert append_bridge.prompt == prompt
            assert c.retry_verdict == agent.verify(c.problem, c.retry)


def test_a_retry_with_the_cache_equals_the_retry_without_it(agent, task, tiny):
    agent.model = tiny[0]  # a model with several layers
    failures = grpo.sample_attempts(agent, task.load(split="dev", limit=6), 1, (0, 0))
    reflected, cache = grpo.sample_reflections(agent, failures, 2, (0, 0))
    with_cache = grpo.sample_retries(agent, reflected, (0, 0), cache)
    assert with_cache == grpo.sample_retries(agent, reflected, (0, 0))
    assert len({tuple(c.retry.tokens) for c in with_cache}) > 6


# -- Failures and evaluation -----------------------------------------------------------------------
def test_failures_and_evaluation_do_not_depend_on_the_batches(
    agent, task, chance_verifier, tmp_path, monkeypatch
):
    """The batches are small because of a small cache, or of a device that runs out of memory."""
    problems, sample_turns, batch_sizes = task.load(split="dev", limit=6), Agent.sample_turns, []

    def count(agent, prompts, *rest, **options):
        batch_sizes.append(len(prompts))
        return sample_turns(agent, prompts, *rest, **options)

    def memory_for_two_turns(agent, prompts, num_samples, *rest, **options):
        if len(prompts) * num_samples > 2:
            raise torch.OutOfMemoryError
        return sample_turns(agent, prompts, num_samples, *rest, **options)

    def sample(file_name):
        batch_sizes.clear()
        failures = r3.find_failures(agent, problems, 3, tmp_path / file_name)
        return failures, r3.evaluate(agent, problems, 2, "")

    monkeypatch.setattr(Agent, "sample_turns", count)
    in_large_batches = sample("large.jsonl")
    assert max(batch_sizes) >= 6 and all(in_large_batches)
    agent.cache_tokens = 300
    assert sample("small.jsonl") == in_large_batches and max(batch_sizes) < 5
    agent.cache_tokens = 100_000
    monkeypatch.setattr(Agent, "sample_turns", memory_for_two_turns)
    assert sample("out_of_memory.jsonl") == in_large_batches and agent.cache_tokens < 100_000


def test_a_failure_is_the_first_wrong_attempt_at_a_problem(agent, task, monkeypatch, tmp_path):
    def verify(agent, problem, turn):  # Every fifth problem is always solved.
        return Verdict(problem.id % 5 == 0 or sum(turn.tokens) % 2 == 0, "x")

    monkeypatch.setattr(Agent, "verify", verify)
    problems = task.load(split="train", limit=20)
    attempts = grpo.attempt_all(agent, problems, 4, (grpo.COLLECT, 0))
    first_wrong = {}
    for attempt in attempts:
        if not attempt.attempt_verdict.correct:
            first_wrong.setdefault(attempt.problem.id, attempt)
    agent.cache_tokens = 500  # several batches
    failures = r3.find_failures(agent, problems, 4, tmp_path / "failures.jsonl")
    assert failures == list(first_wrong.values())
    assert {c.attempt_index for c in failures} > {0, 1} and 8 < len(failures) <= 16


def test_a_complete_evaluation_is_read_and_not_repeated(
    agent, task, chance_verifier, tmp_path, attempted_problems
):
    problems, path = task.load(split="dev", limit=8), tmp_path / "new" / "conversations.jsonl"
    agent.cache_tokens = 400  # several batches
    conversations = r3.evaluate(agent, problems, 2, "", path)
    ids = sorted(problem.id for problem in problems)
    assert [c.attempt_id for c in conversations] == [
        (i, attempt) for i in ids for attempt in (0, 1)
    ]
    assert attempted_problems and len(read_lines(path)) == 16
    attempted_problems.clear()
    assert r3.evaluate(agent, problems, 2, "", path) == conversations and not attempted_problems
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert r3.evaluate(agent, problems, 2, "", path) == conversations and attempted_problems


def test_an_interrupted_search_resumes_after_the_last_failure_in_its_file(
    agent, task, chance_verifier, tmp_path, attempted_problems
):
    """It may have been killed after a line or within one, and may resume with another cache."""
    problems, path = task.load(split="train", limit=12), tmp_path / "failures.jsonl"
    agent.cache_tokens = 400
    failures = r3.find_failures(agent, problems, 3, path)
    written = path.read_text().splitlines(keepends=True)
    assert len(written) == len(failures) > 5
    order = [problem.id for problem in grpo.longest_first(agent, problems)]
    for num_lines, cache_tokens in ((0, 99_999), (5, 400), (len(written), 800)):
        path.write_text("".join(written[:num_lines]) + written[0][:-9])
        agent.cache_tokens = cache_tokens
        attempted_problems.clear()
        assert r3.find_failures(agent, problems, 3, path) == failures
        assert path.read_text() == "".join(written)
        last = json.loads(written[num_lines - 1])["problem"]["id"] if num_lines else None
        not_searched = order[order.index(last) + 1 :] if num_lines else order
        assert {problem.id for problem in attempted_problems} == set(not_searched)


# -- Conversations in files ------------------------------------------------------------------------
def test_loaded_conversations_equal_the_saved_ones(agent, task, chance_verifier, tmp_path):
    """With all their fields, except for the log-probabilities, which are not saved."""
    agent.tokenizer.stop_ids = [0, *range(10, 20)]  # so that some turns end and some are truncated
    path, problems = tmp_path / "conversations.jsonl", task.load(split="dev", limit=12)
    attempts = grpo.sample_attempts(agent, problems, 2, (0, 0))
    failures = [c for c in attempts if not c.attempt_verdict.correct]
    groups = grpo.rollout(agent, failures, 2, (0, 0))
    saved = attempts + sum(groups, [])
    for name in ("attempt", "reflection", "retry"):
        turns = [getattr(c, name) for c in saved if getattr(c, name)]
        assert {turn.truncated for turn in turns} == {False, True}, name
    assert {c.attempt_verdict.correct for c in saved} == {False, True}
    assert {c.retry_verdict.correct for c in saved if c.retry_verdict} == {False, True}
    r3.write_conversations(path, saved, agent)
    loaded = r3.load_conversations(path, agent)
    assert loaded == saved
    for conversation in loaded:
        for turn in (conversation.attempt, conversation.reflection, conversation.retry):
            assert turn is None or not turn.logprobs
    r3.write_conversations(tmp_path / "copy.jsonl", loaded, agent)
    assert (tmp_path / "copy.jsonl").read_text() == path.read_text()


def change(record: dict, turn: str, **changes) -> dict:
    """The record of a conversation with another attempt, reflection or retry."""
    return {**record, turn: {**record[turn], **changes}}


def remove(record: dict, name: str) -> dict:
    return {key: value for key, value in record.items() if key != name}


DAMAGE = {  # what is wrong with a line, and a function that makes such a line from a correct record
    "incomplete JSON": lambda record: "{",
    "not an object": lambda record: "7",
    "nested too deeply": lambda record: "[" * 100_000,
    "not UTF-8": lambda record: "\udcff",
    "no problem": lambda record: {**record, "problem": None},
    "an incomplete problem": lambda record: {**record, "problem": {"id": 1}},
    "another problem": lambda record: change(record, "problem", target=61),
    "attempt_index is text": lambda record: {**record, "attempt_index": "a"},
    "attempt_index is infinite": lambda record: {**record, "attempt_index": 1e999},
    "no tokens": lambda record: change(record, "attempt", tokens=[]),
    "too large a token": lambda record: change(record, "attempt", tokens=[5, 99_999_999_999]),
    "a negative token": lambda record: change(record, "attempt", tokens=[5, -1]),
    "an additional token": lambda record: change(
        record, "attempt", tokens=[*record["attempt"]["tokens"], 9]
    ),
    "tokens are text": lambda record: change(record, "attempt", tokens="abc"),
    "another attempt": lambda record: change(record, "attempt", text="something else"),
    "another retry": lambda record: change(record, "retry", text="something else"),
    "another context": lambda record: {**record, "context": "something else"},
    "another verdict": lambda record: change(
        record, "attempt_verdict", correct=True, reason="correct"
    ),
    "attempt_index is missing": lambda record: remove(record, "attempt_index"),
    "reflection_index is missing": lambda record: remove(record, "reflection_index"),
    "attempt is missing": lambda record: remove(record, "attempt"),
    "context is missing": lambda record: remove(record, "context"),
    "attempt_verdict is missing": lambda record: remove(record, "attempt_verdict"),
    "text is missing": lambda r: {**r, "reflection": remove(r["reflection"], "text")},
    "tokens are missing": lambda r: {**r, "reflection": remove(r["reflection"], "tokens")},
    "truncated is missing": lambda r: {**r, "reflection": remove(r["reflection"], "truncated")},
}


@pytest.fixture(scope="module")
def evaluation_text(task, tmp_path_factory) -> str:
    """The file of an evaluation of three problems, which are not solved."""
    agent, path = make_agent(task), tmp_path_factory.mktemp("e") / "conversations.jsonl"
    r3.evaluate(agent, task.load(limit=3), 1, "", path)
    return path.read_text()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_conversation_is_named_by_its_line(agent, tmp_path, evaluation_text, damage):
    path = tmp_path / "failures.jsonl"
    path.write_text(evaluation_text)
    assert len(r3.load_conversations(path, agent)) == 3
    lines = evaluation_text.splitlines()
    damaged_line = DAMAGE[damage](json.loads(lines[1]))
    lines[1] = damaged_line if isinstance(damaged_line, str) else json.dumps(damaged_line)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="failures.jsonl, line 2: ") as error:
        r3.load_conversations(path, agent)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_loaded_conversations_are_judged_again(agent, tmp_path, evaluation_text, monkeypatch):
    path = tmp_path / "failures.jsonl"
    path.write_text(evaluation_text)
    assert len(r3.load_conversations(path, agent)) == 3
    monkeypatch.setattr(tasks.Countdown, "verify", lambda *_: Verdict(True, "correct"))
    with pytest.raises(ValueError, match="failures.jsonl, line 1: .* do not match"):
        r3.load_conversations(path, agent)


# What an older version wrote: one line each of failures.jsonl and of samples.jsonl, and some of the
# settings in config.json.
OLDER_FAILURE = {
    "problem": {"id": 0, "numbers": [9, 1, 5], "target": 50}, "sample": 0,
    "context": "<|user|> Make 50 from 9 1 5 . <|end|> <|assistant|>", "attempt": "<|end|>",
    "first": {"right": False, "reason": "no_answer"}, "second": None,
    "ids": {"attempt": [0], "reflection": [], "retry": []},
}  # fmt: skip
OLDER_SAMPLE = {
    "step": 1, "reward": 0.0, "advantage": 0.0, **OLDER_FAILURE, "reflection": "That <|end|>",
    "retry": "* 9 <|end|>", "second": {"right": False, "reason": "no_answer"},
    "ids": {"attempt": [0], "reflection": [123, 0], "retry": [106, 12, 0]},
}  # fmt: skip
OLDER_SETTINGS = {"command": "train", "steps": 3, "batch": 4, "group": 3, "model": "tiny"}


def test_files_of_older_versions_are_refused_in_one_line(runs_folder, capsys):
    older_run = runs_folder / "older"
    older_run.mkdir()
    write_lines(older_run / "failures.jsonl", [OLDER_FAILURE])
    flags = ["train", *SMALL_RUN, "--failures", str(older_run / "failures.jsonl")]
    message = error_line(flags, capsys)
    assert "failures.jsonl, line 1: 'attempt_index' is missing" in message
    assert "an older version or another task may have written it" in message
    write_lines(older_run / "samples.jsonl", [OLDER_SAMPLE])
    message = "samples.jsonl was not written by this version of r3.py"
    assert message in error_line(["show", str(older_run)], capsys)
    (older_run / "config.json").write_text(json.dumps(OLDER_SETTINGS))
    message = "config.json has settings of another version of this code: 'batch, group'"
    assert message in error_line(["train", "--resume", str(older_run)], capsys)


# -- Tables ----------------------------------------------------------------------------------------
def test_the_tables_count_the_conversations(agent, task, chance_verifier, tmp_path):
    conversations = r3.evaluate(agent, task.load(split="dev", limit=30), 2, "")
    first = [c.attempt_verdict.correct for c in conversations]
    within_two = [c.attempt_verdict.correct or c.retry_verdict.correct for c in conversations]
    assert 0 < sum(first) < sum(within_two) < 60
    # Two models with the same first tries, one of which never corrects them.
    never_corrected = [
        replace(c, retry_verdict=c.retry_verdict and Verdict(False, "x")) for c in conversations
    ]
    assert list(r3.accuracy({"model": conversations})) == ["model"]
    all_wrong = [replace(c, attempt_verdict=Verdict(False, "x")) for c in conversations]
    first_try = r3.accuracy({"model": all_wrong})["model"]["1st try"]
    assert first_try == pytest.approx([0, 0, 3 / 30])  # the rule of three, cut off at 0
    rows = r3.accuracy({"vanilla": never_corrected, "trained": conversations})
    assert list(rows) == ["vanilla", "trained", "gain"]
    assert rows["trained"] == {
        "1st try": r3.mean_with_interval(np.array(first, float), conversations),
        "within two": r3.mean_with_interval(np.array(within_two, float), conversations),
    }
    assert rows["vanilla"]["within two"][0] == pytest.approx(np.mean(first))
    gain = np.array(within_two, float) - np.array(first, float)
    assert rows["gain"]["within two"] == r3.mean_with_interval(gain, conversations)
    assert rows["gain"]["1st try"] == pytest.approx([0, -0.1, 0.1])
    r3.report(r3.TINY, tmp_path, {"model": conversations})
    tables = json.loads((tmp_path / "report.json").read_text())["tables"]
    first_truncated = sum(c.attempt.truncated for c in conversations)
    retry_truncated = sum(c.retry.truncated for c in conversations if c.retry)
    assert first_truncated > 0 < retry_truncated
    assert tables["The verifier's reasons"] == {
        "model, 1st try": {
            "correct": sum(first),
            "wrong_value": 60 - sum(first),
            "of these, truncated": first_truncated,
        },
        "model, retry": {
            "correct": sum(within_two) - sum(first),
            "wrong_value": 60 - sum(within_two),
            "of these, truncated": retry_truncated,
        },
    }


def test_tables_are_markdown():
    rows = {"vanilla": {"1st try": [0.25, 0.125, 0.5]}, "gain": {"1st try": [0.1, -0.1, 0.3]}}
    reasons = {"correct": {"a": 7}, "x": {"b": 12}}
    assert r3.markdown({"% correct": rows, "Reasons": reasons}) == (
        "% correct\n\n"
        "|         | 1st try              |\n"
        "|---------|----------------------|\n"
        "| vanilla | 25.0 [12.5, 50.0]    |\n"
        "| gain    | +10.0 [-10.0, +30.0] |\n\n"
        "Reasons\n\n"
        "|         | a | b  |\n"
        "|---------|---|----|\n"
        "| correct | 7 |    |\n"
        "| x       |   | 12 |\n"
    )


def conversations_about(ids) -> list[Conversation]:
    """Wrong attempts at problems with these ids."""
    wrong = Verdict(False, "x")
    return [Conversation(SimpleNamespace(id=i), 0, Turn([], [], False), wrong) for i in ids]


def test_the_interval_is_cluster_robust():
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(50), 4)
    values = (rng.random(200) < np.repeat(rng.random(50), 4)).astype(float)
    mean, low, high = r3.mean_with_interval(values, conversations_about(ids))
    # The clusters have equal sizes, so it is the interval of the means of the problems.
    means = values.reshape(50, 4).mean(axis=1)
    half_width = 1.96 * means.std(ddof=1) / math.sqrt(50)
    expected = (means.mean(), mean - half_width, mean + half_width)
    assert (mean, low, high) == pytest.approx(expected)
    for value in (0.0, 1.0):  # All values are equal: the rule of three for 50 problems.
        interval = r3.mean_with_interval(np.full(200, value), conversations_about(ids))
        assert interval == pytest.approx([value, value - 3 / 50, value + 3 / 50])


def test_the_interval_contains_the_truth_in_about_95_percent_of_cases():
    rng, hits = np.random.default_rng(1), 0
    conversations = conversations_about(np.repeat(np.arange(80), 4))
    for _ in range(1_000):
        values = (rng.random(320) < np.repeat(rng.beta(2, 3, 80), 4)).astype(float)
        _, low, high = r3.mean_with_interval(values, conversations)
        hits += low <= 0.4 <= high
    assert 920 <= hits <= 975


# -- The cold start --------------------------------------------------------------------------------
def test_the_cold_start_trains_the_assistants_turns(task, tiny, monkeypatch):
    monkeypatch.setitem(r3.COLD_START, "batch_size", 4)
    tokenizer, problems = tiny[1], task.load(split="cold")

    def batches_of(seed: int):
        return r3.dialogue_batches(task, tokenizer, problems, random.Random(seed), False)

    batches, num_retries = batches_of(0), 0
    assert len(batches) == r3.STEPS_PER_CHUNK and {len(ids) for ids, _ in batches} == {4}
    for batch_ids, batch_mask in batches:
        for ids, mask in zip(batch_ids.tolist(), batch_mask.tolist(), strict=True):
            length = len(mask) - mask[::-1].index(True)  # without the padding
            text = tokenizer.tokenizer.decode(ids[:length], skip_special_tokens=False)
            expected_mask = []
            for part in re.split(r"(?<=<\|assistant\|>)|(?<=<\|end\|>)", text):
                is_assistant = "<|assistant|>" not in part and "<|user|>" not in part
                expected_mask += [is_assistant] * len(tokenizer.encode(part))
            assert mask[:length] == expected_mask and text.endswith("<|end|>")
            if task.retry_instruction in text:
                assert text.index(task.reflection_instruction) < text.index(task.retry_instruction)
                num_retries += 1
    assert num_retries
    tensors = sum(batches, ())
    assert all(torch.equal(a, b) for a, b in zip(tensors, sum(batches_of(0), ()), strict=True))
    assert not all(
        a.shape == b.shape and torch.equal(a, b)
        for a, b in zip(tensors, sum(batches_of(1), ()), strict=True)
    )


def test_another_recipe_makes_another_tiny_model(runs_folder, task, base_folder, monkeypatch):
    weights = (base_folder / "model.safetensors").read_bytes()
    start_time = time.time()
    assert r3.make_tiny_model(task, 0).name == base_folder.name
    # A folder without weights was interrupted before it was complete: the model is made again.
    (runs_folder / base_folder.name / "model.safetensors").unlink()
    path = r3.make_tiny_model(task, 0) / "model.safetensors"
    assert path.read_bytes() == weights and path.stat().st_mtime > start_time - 1
    names = {base_folder.name}
    monkeypatch.setitem(r3.COLD_START, "steps", 1)
    other = r3.make_tiny_model(task, 0)
    names.add(other.name)
    assert (other / "model.safetensors").read_bytes() != weights
    names.add(r3.make_tiny_model(task, 1).name)
    monkeypatch.setitem(r3.COLD_START, "version", 3)
    names.add(r3.make_tiny_model(task, 0).name)
    assert len(names) == 4


def test_the_cold_start_learns(task, monkeypatch, tmp_path):
    """The loss falls well below that of random words, which is log 72 = 4.3."""
    monkeypatch.setattr(r3, "tiny_model", shallow_model)
    monkeypatch.setitem(r3.COLD_START, "steps", 16)
    monkeypatch.setattr(r3, "RUNS", tmp_path)
    path, problems = r3.make_tiny_model(task, 0), task.load(split="cold")
    model, tokenizer = Model.from_pretrained(path), Tokenizer.from_pretrained(path)
    ids, mask = r3.dialogue_batches(task, tokenizer, problems, random.Random(1), True)[0]
    with torch.no_grad():
        logprobs = model(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert -logprobs[mask[:, 1:]].mean() < 2.5


# -- A whole run -----------------------------------------------------------------------------------
def test_a_run_leaves_its_files(finished_run, base_folder):
    run, printed = finished_run
    assert {path.name for path in run.iterdir()} == {
        "config.json", "failures.jsonl", "metrics.jsonl", "timings.jsonl", "samples.jsonl",
        "model", "report.json", "curves.png", "vanilla.jsonl", "trained.jsonl", ".lock",
    }  # fmt: skip
    assert len(read_lines(run / "vanilla.jsonl")) == len(read_lines(run / "trained.jsonl")) == 2 * 4
    tables = json.loads((run / "report.json").read_text())["tables"]
    assert r3.markdown(tables) in printed
    title = "4 problems, 2 samples each, temperature 1: % correct [95% interval]"
    assert list(tables) == [title, "The verifier's reasons"]
    rows = tables[title]
    assert list(rows) == ["vanilla", "trained", "gain"]
    for column in ("1st try", "within two"):
        gain = rows["trained"][column][0] - rows["vanilla"][column][0]
        assert rows["gain"][column][0] == pytest.approx(gain)
    config = json.loads((run / "config.json").read_text())
    assert (config["command"], config["torch"]) == ("train", torch.__version__)
    assert r3.load_config(run, "train") == replace(
        r3.TINY, steps=4, batch_size=4, group_size=3, limit=4, num_problems=30, num_samples=2,
        max_attempts=1, max_new_tokens=16, save_every=3, name="finished",
    )  # fmt: skip
    for record in read_lines(run / "failures.jsonl"):
        assert record["attempt_verdict"] == {"correct": False, "reason": "wrong_value"}
        assert record["attempt"]["tokens"] and "retry_verdict" not in record
    weights = (run / "model" / "model.safetensors").read_bytes()
    assert weights != (base_folder / "model.safetensors").read_bytes()


def test_the_logs_of_a_run_fit_together(finished_run):
    run, _ = finished_run
    *metrics, end_of_curve = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in read_lines(run / "timings.jsonl")] == [1, 2, 3, 4]
    assert all("within two" in line and "1st try" in line for line in metrics[:4])
    assert end_of_curve.keys() == {"step", "1st try", "within two"} and end_of_curve["step"] == 4
    for line in metrics[1:]:  # invariant 2, over a whole run
        assert line["mismatch"] < 1e-4 * line["nll"]
    # The reference model is the model before training: the KL divergence is zero at first.
    kl = [line["kl"] for line in metrics[1:]]
    assert kl[0] < 1e-3 * min(kl[1:])
    tokenizer, samples = Tokenizer.from_pretrained(run / "model"), read_lines(run / "samples.jsonl")
    assert len(samples) == 4 * 4 * 3
    for i in range(0, len(samples), 3):
        group = samples[i : i + 3]
        assert len({(s["step"], s["problem"]["id"], s["attempt_index"]) for s in group}) == 1
        assert [s["reflection_index"] for s in group] == [0, 1, 2]
        advantages = grpo.group_advantages(torch.tensor([[s["reward"] for s in group]]))[0]
        assert [s["advantage"] for s in group] == pytest.approx(advantages.tolist())
    for sample in samples:
        assert sample["reflection"]["tokens"] == tokenizer.encode(sample["reflection"]["text"])
        assert sample["context"].endswith("Wrong. Reflect. <|end|> <|assistant|>")
    for step, line in enumerate(metrics[1:], 1):
        rewards = [sample["reward"] for sample in samples if sample["step"] == step]
        truncated = [s["reflection"]["truncated"] for s in samples if s["step"] == step]
        assert line["reward"] == pytest.approx(np.mean(rewards))
        assert line["truncated"] == pytest.approx(np.mean(truncated))


REPRODUCIBLE = ("failures.jsonl", "metrics.jsonl", "samples.jsonl", "report.json", "vanilla.jsonl",
                "trained.jsonl", "model/model.safetensors")  # fmt: skip


def assert_same_files(run: Path, other: Path) -> None:
    for name in REPRODUCIBLE:
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


def test_a_run_depends_on_its_seed_alone(runs_folder, base_folder, finished_run, chance_verifier):
    """Invariant 6, with the tiny model made again, and with the failures of the first run."""
    shutil.rmtree(runs_folder / base_folder.name)
    failures = finished_run[0] / "failures.jsonl"
    r3.main(["train", *SMALL_RUN, "--name", "again", "--failures", str(failures)])
    for path in base_folder.iterdir():
        assert (runs_folder / base_folder.name / path.name).read_bytes() == path.read_bytes()
    assert_same_files(runs_folder / "again", finished_run[0])


def test_ctrl_c_prints_how_to_resume(runs_folder, finished_run, chance_verifier, monkeypatch):
    """The evaluation after the training is interrupted, and the training is not repeated."""
    evaluate, run = r3.evaluate, runs_folder / "x" / "y"

    def interrupt(agent, problems, num_samples, title, *rest, **options):
        if title == "trained":
            raise KeyboardInterrupt
        return evaluate(agent, problems, num_samples, title, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(r3, "evaluate", interrupt)
        message = "interrupted; to resume: .*r3.py train --resume .*/x/y"
        with pytest.raises(SystemExit, match=message):
            r3.main(["train", *SMALL_RUN, "--name", "x/y"])
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    steps, rollout = [], grpo.rollout

    def record(agent, failures, group_size, rng_prefix, **options):
        steps.append(rng_prefix[1])
        return rollout(agent, failures, group_size, rng_prefix, **options)

    monkeypatch.setattr(grpo, "rollout", record)
    r3.main(["train", "--resume", str(run)])
    assert steps == []
    assert_same_files(run, finished_run[0])


# Functions of grpo.py, and the step to which a call with some arguments belongs.
STEP_OF_CALL = {
    "append_jsonl": lambda path, *records: records[0]["step"],
    "log_samples": lambda path, step, *_: step,
    "save_checkpoint": lambda folder, step, *_: step,
}


def test_the_callers_metrics_are_logged_before_the_checkpoint_is_saved(
    agent, task, chance_verifier, tmp_path, monkeypatch
):
    """A run that is killed between the two has no line twice after it resumes, and lacks none."""
    agent.max_new_tokens = 6
    failures = grpo.sample_attempts(agent, task.load(split="dev", limit=3), 1, (0, 0))
    config = grpo.TrainConfig(steps=3, batch_size=2, group_size=2, beta=0.0, lr=1e-3, save_every=1)
    save_checkpoint, logged_steps = grpo.save_checkpoint, []

    def train(folder: Path) -> None:
        learner = replace(agent, model=copy.deepcopy(agent.model))
        for step, metrics in grpo.train(learner, None, failures, config, folder):
            metrics["measured by the caller"] = 10 * step

    def check_logs_and_save(folder, step, *rest):
        metrics = read_lines(folder / "metrics.jsonl")[-1]
        assert (metrics["step"], metrics["measured by the caller"]) == (step, 10 * step)
        assert read_lines(folder / "samples.jsonl")[-1]["step"] == step
        logged_steps.append(step)
        save_checkpoint(folder, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "save_checkpoint", check_logs_and_save)
        train(tmp_path / "undisturbed")
    assert logged_steps == [1, 2, 3]

    def kill_in_step_2(name, moment, *arguments):
        function, in_step_2 = functions[name], STEP_OF_CALL[name](*arguments) == 2
        if not in_step_2 or moment == "after":
            function(*arguments)
        if in_step_2:
            raise KeyboardInterrupt

    functions = {name: getattr(grpo, name) for name in STEP_OF_CALL}
    for name, moment in itertools.product(STEP_OF_CALL, ("before", "after")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(grpo, name, partial(kill_in_step_2, name, moment))
            train(tmp_path / f"{moment} {name}")
        train(tmp_path / f"{moment} {name}")
        for log in ("metrics.jsonl", "samples.jsonl"):
            undisturbed = (tmp_path / "undisturbed" / log).read_text()
            assert (tmp_path / f"{moment} {name}" / log).read_text() == undisturbed, (name, moment)


def test_the_trained_model_can_be_evaluated(finished_run, runs_folder, capsys):
    flags = ["--limit", "5", "--max-new-tokens", "9"]
    samples = ["--num-samples", "4"]  # instead of the number of its run
    r3.main(["eval", "--model", str(finished_run[0] / "model"), *flags, *samples])
    assert "5 problems, 4 samples each, temperature 1" in capsys.readouterr().out
    [run] = runs_folder.glob("eval-countdown-*")
    assert len(read_lines(run / "conversations.jsonl")) == 20
    r3.main(["eval", *flags, "--temperature", "0", "--name", "greedy"])
    assert re.search("5 problems, 1 samples? each, temperature 0", capsys.readouterr().out)
    assert len(read_lines(runs_folder / "greedy" / "conversations.jsonl")) == 5


def test_another_seed_changes_the_model_the_problems_and_the_samples(
    runs_folder, chance_verifier, monkeypatch
):
    monkeypatch.setitem(r3.COLD_START, "steps", 1)
    runs = []
    for seed in ("1", "2"):
        r3.main(["eval", "--seed", seed, "--limit", "4", "--max-new-tokens", "9", "--name", seed])
        runs.append(read_lines(runs_folder / seed / "conversations.jsonl"))
    for values in (
        [{line["context"] for line in run} for run in runs],
        [{line["attempt"]["text"] for line in run} for run in runs],
    ):
        assert not values[0] & values[1]


def test_an_interrupted_search_for_failures_resumes(
    runs_folder, chance_verifier, monkeypatch, capsys, attempted_problems
):
    command = ["failures", "--model", "tiny", "--num-problems", "30", "--max-attempts", "2"]
    command += ["--cache-tokens", "600", "--max-new-tokens", "12", "--name"]
    r3.main([*command, "whole"])
    append_jsonl = r3.append_jsonl

    def interrupt(path, *records):
        append_jsonl(path, *records)
        if len(path.read_text().splitlines()) >= 12:
            raise KeyboardInterrupt

    message = "interrupted; to resume: .*r3.py failures --resume"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=message):
        patch.setattr(r3, "append_jsonl", interrupt)
        r3.main([*command, "killed"])
    whole, killed = runs_folder / "whole" / "failures.jsonl", runs_folder / "killed"
    before = {line["problem"]["id"] for line in read_lines(killed / "failures.jsonl")}
    with open(killed / "failures.jsonl", "a") as file:
        file.write('{"problem": {"id"')  # an incomplete line
    attempted_problems.clear()
    r3.main(["failures", "--resume", str(killed)])
    assert (killed / "failures.jsonl").read_text() == whole.read_text()
    after = {problem.id for problem in attempted_problems}
    assert after and not before & after
    num_failures = len(read_lines(whole))
    assert 12 < num_failures < 30
    assert f"failures on {num_failures} of 30 problems" in capsys.readouterr().out
    for flags, message in (
        (["train", "--resume", str(killed)], "is not a run of"),
        (["failures", "--resume", str(runs_folder / "nothing")], "nothing"),
        (
            ["failures", "--resume", str(killed), "--seed", "1"],
            "--seed cannot be given with --resume",
        ),
        ([*command, "killed"], "choose another --name"),
    ):
        assert message in error_line(flags, capsys)


def test_play(runs_folder, capsys, monkeypatch):
    typed_lines = iter(["6 10 2 32", "nonsense", "6 10 2 99", "6 10 2 32", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed_lines))
    r3.main(["play", "--model", "tiny", "--max-new-tokens", "12"])
    printed = capsys.readouterr().out
    assert len(re.findall(r"user  Make 32 from 10 6 2 \.", printed)) == 2
    assert "reflection  " in printed and "<- no_answer" in printed
    assert printed.count("  type 3 numbers from 1 to 10") == 2  # nonsense, and a target of 99
    attempts = re.findall(r"attempt  (.*)", printed)
    assert len(attempts) == 2 and attempts[0] != attempts[1]

    def end_of_input(_):
        raise EOFError

    monkeypatch.setattr("builtins.input", end_of_input)
    r3.main(["play", "--model", "tiny"])  # Ctrl-D
    assert "no run in " in error_line(["play"], capsys)


# -- Settings --------------------------------------------------------------------------------------
SETTINGS = [field.name for field in fields(r3.Config)]
SHARED = [
    "model", "task", "data", "seed", "device", "dtype", "temperature", "max_new_tokens",
    "cache_tokens",
]  # fmt: skip
SETTINGS_OF_COMMANDS = {
    "train": SETTINGS,
    "failures": [*SHARED, "name", "num_problems", "max_attempts"],
    "eval": [*SHARED, "name", "split", "limit", "num_samples"],
    "play": [*(name for name in SHARED if name != "cache_tokens"), "split"],
}
WRONG_VALUES = {  # values that a setting cannot have
    **dict.fromkeys(("steps", "batch_size", "updates", "save_every", "max_new_tokens"), (0, -1)),
    **dict.fromkeys(("num_samples", "num_problems", "max_attempts", "cache_tokens"), (0, -1)),
    "log_failures": (0, -1),
    **dict.fromkeys(("lora_rank", "curve"), (-1,)),
    **dict.fromkeys(("group_size", "limit"), (1, 0, -1)),
    "seed": (-1,),
    **dict.fromkeys(
        ("lr", "beta", "clip", "temperature"), (-1e-9, -1.0, math.nan, math.inf, -math.inf)
    ),
    "warmup": (-1e-9, 1.1, 50.0, math.nan, math.inf),  # a fraction of the steps
    "max_grad_norm": (0.0, -1.0, math.nan, math.inf),  # With 0, nothing would be trained.
    **dict.fromkeys(("loss_type", "dtype", "split"), ("nonsense", "")),
}
OPTIONAL = ("data", "name", "cache_tokens", "limit", "num_problems", "failures", "log_failures")


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def values_of_wrong_types(name: str) -> list:
    default = getattr(r3.Config(), name)
    if isinstance(default, bool):
        values = [0, 1, "yes", None]
    elif r3.SETTINGS[name].type in (int, float):
        values = ["3", True, [1]] + ([] if isinstance(default, float) else [3.0])
    else:
        values = [3, True, ["x"]]
    return values if name in OPTIONAL else [*values, None]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_refuses_what_it_cannot_be(name):
    values = [*values_of_wrong_types(name), *WRONG_VALUES.get(name, ())]
    assert len(values) >= 3
    for value in values:
        with pytest.raises(ValueError) as error:
            r3.Config(**{name: value})
        message = str(error.value)
        assert message.startswith(f"{flag_of(name)} ") and f"{value}" in message, message
        assert "must be" in message and "\n" not in message
    if name in OPTIONAL:
        assert getattr(r3.Config(**{name: None}), name) is None


def test_messages_about_settings_say_what_they_must_be():
    for settings, message in (
        ({"group_size": 1}, "--group-size 1: must be at least 2"),
        ({"steps": "3"}, "--steps '3': must be of type int"),
        ({"loss_type": "ppo"}, "--loss-type ppo: must be one of dapo, grpo, dr_grpo"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            r3.Config(**settings)
    assert r3.Config(lr=1).lr == 1 and r3.Config(temperature=0).temperature == 0


@pytest.fixture
def parsers(monkeypatch):
    """The parser of each command."""
    parse_args, parsers = argparse.ArgumentParser.parse_args, []

    def record(parser, arguments):
        parsers.append(parser)
        return parse_args(parser, arguments)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", record)
        r3.read_command_line(["plot"])
    [choices] = [action.choices for action in parsers[0]._actions if action.dest == "command"]
    return choices


@pytest.mark.parametrize("command", SETTINGS_OF_COMMANDS)
def test_a_command_has_a_flag_for_each_of_its_settings(parsers, command):
    actions = {action.dest: action for action in parsers[command]._actions}
    assert ("resume" in actions) == (command in ("train", "failures"))
    assert actions.keys() - {"help", "resume"} == set(SETTINGS_OF_COMMANDS[command])
    for name in SETTINGS_OF_COMMANDS[command]:
        action, tiny, paper = actions[name], getattr(r3.TINY, name), getattr(r3.PRETRAINED, name)
        assert action.option_strings[0] == flag_of(name)
        assert action.default == argparse.SUPPRESS  # A flag that is not given is not a setting.
        assert (action.choices is not None) == (name in ("loss_type", "dtype", "split", "task"))
        default = f"{tiny}" if tiny == paper else f"{tiny} with the tiny model, else {paper}"
        assert len(action.help.partition(" (default")[0]) > 10
        has_default = (tiny, paper) != (None, None)
        assert (f"(default: {default})" in action.help) == has_default


@pytest.mark.parametrize("command", ["", *SETTINGS_OF_COMMANDS, "show", "plot"])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        r3.main([*command.split(), "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and re.match("usage: .*r3.py ", printed)
    if not command:
        for name in r3.COMMANDS:
            assert f"    {name} " in printed
    if command == "train":
        for title, (commands, _) in r3.FLAG_GROUPS.items():
            assert (f"\n{title}:\n" in printed) == ("train" in commands.split())
    assert max(map(len, printed.splitlines())) <= 200


@pytest.fixture
def settings_of(monkeypatch):
    """A function that returns the Config with which a command line would run its command."""
    configs = []
    for command in ("train", "failures", "eval", "play"):
        monkeypatch.setitem(r3.COMMANDS, command, lambda config, *_: configs.append(config))
    monkeypatch.setattr(r3, "play_command", r3.COMMANDS["play"])

    def settings_of(flags: str) -> r3.Config:
        r3.main(flags.split())
        return configs.pop()

    return settings_of


def test_the_defaults_are_those_of_the_model(folder, settings_of, runs_folder):
    tiny, paper = settings_of("train"), settings_of(f"train --model {folder}")
    assert tiny == r3.TINY and paper == replace(r3.PRETRAINED, model=str(folder))
    assert (tiny.steps, tiny.batch_size, tiny.lr, tiny.num_samples) == (16, 32, 3e-4, 4)
    # The paper's values, and then those of the method.
    assert (paper.steps, paper.batch_size, paper.lr, paper.beta) == (1_750, 256, 5e-7, 0.001)
    assert (paper.warmup, paper.temperature) == (0.03, 1.0)
    assert (paper.max_attempts, paper.num_samples) == (64, 1)
    assert paper.loss_type == "dapo" and paper.scale_advantages and paper.clip == 0.2
    assert paper.group_size == tiny.group_size == 8 and paper.updates == tiny.updates == 1
    # The folder of a tiny model has the tiny model's defaults, and play takes the newest model.
    model, tokenizer = tiny_model(tasks.TinyCountdown().words(), 0)
    for path in (Path("a/model"), runs_folder / "x" / "model"):
        tokenizer.save_pretrained(path)
        model.save_pretrained(path)
    assert settings_of("eval --model a/model") == replace(r3.TINY, model="a/model")
    newest = str(runs_folder / "x" / "model")
    assert settings_of("play --seed 7") == replace(r3.TINY, model=newest, seed=7)


def test_flags_override_the_defaults(folder, settings_of):
    flags = f"train --steps 3 --no-scale-advantages --limit 7 --updates 2 --model {folder}"
    given = {"steps": 3, "scale_advantages": False, "limit": 7, "updates": 2, "model": str(folder)}
    assert settings_of(flags) == replace(r3.PRETRAINED, **given)
    greedy = settings_of("eval --temperature 0")
    assert (greedy.num_samples, greedy.max_attempts) == (1, 1)  # Greedy attempts are all the same.
    flags = "train --no-scale-advantages --steps 5 --lr 1e-5 --data d.json --loss-type grpo"
    assert r3.read_command_line([*flags.split(), "--offload", "--seed", "3"]) == {
        "command": "train", "scale_advantages": False, "steps": 5, "lr": 1e-5, "data": "d.json",
        "loss_type": "grpo", "offload": True, "seed": 3,
    }  # fmt: skip


def wrong_flags():
    """Each flag of each command, with values that it cannot have."""
    for command, names in SETTINGS_OF_COMMANDS.items():
        for name in [*WRONG_VALUES, "task"]:
            if name in names:
                for value in (*WRONG_VALUES.get(name, ()), "nonsense"):
                    yield command, flag_of(name), str(value)


def test_every_flag_refuses_what_it_cannot_be(runs_folder, capsys):
    flags = list(wrong_flags())
    assert len(flags) > 80
    for command, flag, value in flags:
        model = ["--model", "tiny"] if command == "play" else []
        message = error_line([command, *model, f"{flag}={value}"], capsys)
        assert flag in message and value in message, message
    assert {path.name[:5] for path in runs_folder.iterdir()} == {"base-"}


def write_settings(run: Path, changes: dict, without: tuple = ()) -> None:
    """Write the config.json of a run of `train` with the tiny model's settings, but for changes."""
    r3.write_config(run, "train", r3.TINY)
    settings = json.loads((run / "config.json").read_text()) | changes
    kept = {name: value for name, value in settings.items() if name not in without}
    (run / "config.json").write_text(json.dumps(kept))


def test_a_setting_that_an_older_run_lacks_has_its_default(settings_of, runs_folder, folder):
    run = runs_folder / "x"
    write_settings(run, {"steps": 5}, without=("updates", "lr", "loss_type", "torch"))
    assert settings_of(f"train --resume {run}") == replace(r3.TINY, steps=5)
    write_settings(run, {"model": str(folder)}, without=("lr", "batch_size"))
    config = settings_of(f"train --resume {run}")
    assert (config.lr, config.batch_size, config.steps) == (5e-7, 256, r3.TINY.steps)


@pytest.mark.parametrize(
    "changes, without, message",
    [
        ({"batch": 4, "group": 3}, (), "settings of another version of this code: 'batch, group'"),
        ({"steps": [1]}, (), "--steps [1]: must be of type int"),
        ({"steps": None}, (), "--steps None: must be of type int"),
        ({"steps": 0}, (), "--steps 0: must be at least 1"),
        ({"loss_type": "ppo"}, (), "--loss-type ppo: must be one of dapo, grpo, dr_grpo"),
        ({"model": 5}, (), "--model 5: must be of type str"),
        ({"task": ["countdown"]}, (), "--task ['countdown']: must be of type str"),
        ({"task": "chess"}, (), "--task chess: must be one of countdown, apigen"),
        ({"command": "eval"}, (), "is not a run of"),
        ({}, ("command",), "is not a run of"),
    ],
)
def test_a_damaged_settings_file_ends_in_one_line(runs_folder, capsys, changes, without, message):
    write_settings(runs_folder / "x", changes, without)
    assert message in error_line(["train", "--resume", str(runs_folder / "x")], capsys)


@pytest.mark.parametrize("content", ["", "[]", '{"command": "train"'])
def test_a_settings_file_that_is_not_an_object_is_named(runs_folder, capsys, content):
    (runs_folder / "x").mkdir()
    (runs_folder / "x" / "config.json").write_text(content)
    message = error_line(["train", "--resume", str(runs_folder / "x")], capsys)
    assert message.startswith(f"r3.py: {runs_folder / 'x' / 'config.json'} ")


# -- Bad input -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags, message",
    [
        ("dance", "COMMAND"),
        ("", "COMMAND"),
        ("train --stepps 3", "--stepps"),
        ("play --steps 3", "--steps"),
        ("train --temperature 0", "nothing to compare"),
        ("eval --model nowhere", "nowhere: no such file or folder"),
        ("eval --model no/where", "no/where"),
        ("eval --model .", "No such file or directory: 'config.json'"),
        ("eval --model {folder} --data nowhere.json", "nowhere.json: no such file"),
        ("eval --model {folder} --task apigen", "Salesforce/xlam-function-calling-60k"),
        ("eval --model {folder} --split cold", "--split"),
        ("eval --model tiny --max-new-tokens 300", "use a lower --max-new-tokens"),
        ("eval --task apigen", "for other tasks use --model"),
        ("eval --data x.json", "for other tasks use --model"),
        ("play --model tiny --task apigen", "for other tasks use --model"),
        ("eval --split all", "no split 'all'"),
        ("train --failures nowhere.jsonl", "--failures nowhere.jsonl: there is no such file"),
        ("train --failures .", "--failures .: there is no such file"),
        ("train --device banana", "--device banana is not available here"),
        ("train --device cuda:99", "--device cuda:99 is not available here"),
        ("train --device meta", "--device meta is not available here"),
        ("train --resume nowhere", "nowhere"),
        ("train --resume . --steps 3", "this is not the folder of a run"),
        ("show nowhere", "nowhere is not the folder of a train or eval run with samples"),
        ("show --limit x", "--limit"),
        ("show", "no run in "),
        ("plot nowhere", "nowhere is not the folder of a training run with metrics"),
        ("plot", "no run in "),
    ],
)
def test_bad_input_ends_in_one_line(runs_folder, folder, capsys, flags, message, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert message in error_line(flags.format(folder=folder).split(), capsys)
    assert {path.name[:5] for path in runs_folder.iterdir()} == {"base-"}  # no folder is left


def test_a_run_without_failures_is_refused(runs_folder, capsys, monkeypatch):
    """Also if all attempts in the file of --failures are correct."""
    monkeypatch.setattr(Agent, "verify", lambda *_: Verdict(True, "correct"))
    message = "there are no failures to learn from"
    assert message in error_line(["train", *SMALL_RUN, "--name", "a"], capsys)
    assert read_lines(runs_folder / "a" / "failures.jsonl") == []
    r3.main(["eval", "--limit", "5", "--max-new-tokens", "10", "--name", "e"])
    path = runs_folder / "e" / "conversations.jsonl"
    flags = ["train", *SMALL_RUN, "--name", "b", "--failures", str(path)]
    assert message in error_line(flags, capsys)


def test_only_wrong_attempts_of_a_file_are_trained_on(runs_folder, chance_verifier, capsys):
    """The file that `eval` writes also contains correct ones."""
    evaluation = ["eval", "--split", "test", "--limit", "5", "--max-new-tokens", "10"]
    r3.main([*evaluation, "--name", "e"])
    path = runs_folder / "e" / "conversations.jsonl"
    wrong = [line for line in read_lines(path) if not line["attempt_verdict"]["correct"]]
    assert 0 < len(wrong) < len(read_lines(path))
    flags = ["train", *SMALL_RUN, "--failures", str(path), "--name"]
    r3.main([*flags, "t", "--steps", "1"])
    copied = [
        {**record, "trained_steps": 0}
        for record in read_lines(runs_folder / "t" / "failures.jsonl")
    ]
    assert copied == wrong
    wrong[0]["attempt"]["tokens"][0] = 5_000  # not a token of this model
    write_lines(path, wrong[:1])
    message = error_line([*flags, "u"], capsys)
    assert "conversations.jsonl, line 1: it does not fit this run" in message
    assert not (runs_folder / "u").exists()


def test_out_of_memory_ends_in_one_line(runs_folder, capsys, monkeypatch):
    def out_of_memory(*_, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 MiB")

    monkeypatch.setattr(Agent, "sample_turns", out_of_memory)
    message = error_line(["eval", "--limit", "2", "--name", "x"], capsys)
    assert message.endswith("out of memory; use a lower --max-new-tokens or --cache-tokens")


# -- Looking at a run ------------------------------------------------------------------------------
def sample_record(step: int, problem_id: int, context: str, reward: float, advantage: float):
    """A line of samples.jsonl."""
    retry_verdict = {"correct": reward > 0, "reason": "correct" if reward else "wrong_value"}
    turns = {"attempt": "7", "reflection": "Hm", "retry": "8"}
    return {
        "step": step, "reward": reward, "advantage": advantage, "problem": {"id": problem_id},
        "attempt_index": 0, "reflection_index": 0, "context": context,
        **{name: {"text": text, "tokens": [], "truncated": False} for name, text in turns.items()},
        "attempt_verdict": {"correct": False, "reason": "wrong_value"},
        "retry_verdict": retry_verdict,
    }  # fmt: skip


@pytest.fixture
def samples():
    """Two steps. The first has two reflections on one failure, the last has one on each of two."""
    return [
        sample_record(1, 5, "five", 1.0, 0.7), sample_record(1, 5, "five", 0.0, -0.7),
        sample_record(2, 5, "five", 0.0, 0.0), sample_record(2, 6, "six", 1.0, 0.0),
    ]  # fmt: skip


@pytest.fixture
def sampled_run(runs_folder, samples):
    """The folder of a run with these samples."""
    (runs_folder / "x").mkdir(parents=True)
    write_lines(runs_folder / "x" / "samples.jsonl", samples)
    return runs_folder / "x"


def test_show_prints_the_groups_of_a_step(sampled_run, samples, capsys):
    def shown(*flags) -> list[tuple[str, list[str]]]:
        """The context of each group, and the reasons of its retries."""
        r3.main(["show", str(sampled_run), *flags])
        groups = re.split(r" +context  ", capsys.readouterr().out)[1:]
        reasons = [re.findall("retry .*<- (correct|wrong_value)", group) for group in groups]
        return list(zip((group.split()[0] for group in groups), reasons, strict=True))

    assert shown() == [("five", ["wrong_value"]), ("six", ["correct"])]  # the last step
    assert shown("--step", "1") == [("five", ["correct", "wrong_value"])]
    assert shown("--limit", "1") == [("five", ["wrong_value"])]
    assert "has no step 7" in error_line(["show", "--step", "7"], capsys)
    mixed = {**samples[3], "context": "seven", "advantage": 0.5}
    write_lines(sampled_run / "samples.jsonl", [*samples[2:], mixed])
    assert [context for context, _ in shown()] == ["seven", "five", "six"]  # mixed groups first


def test_show_prints_turns_with_their_advantages_and_reasons(sampled_run, samples, capsys):
    r3.main(["show", str(sampled_run), "--step", "1"])
    printed = capsys.readouterr().out
    assert "+0.70 reflection  Hm" in printed and "-0.70 reflection  Hm" in printed
    assert "retry  8   <- correct" in printed and "retry  8   <- wrong_value" in printed
    assert "             context  five" in printed
    samples[3]["reflection"]["text"] = "\033[2Jgone\a\n\tTab " + "word " * 100
    write_lines(sampled_run / "samples.jsonl", samples[3:])
    r3.main(["show"])
    printed = capsys.readouterr().out  # without control characters, which a terminal would obey
    assert "[2Jgone" in printed and "Tab word" in printed and printed.isascii()
    assert all(character.isprintable() or character == "\n" for character in printed)
    _, *turns = printed.splitlines()  # after a line with the path, which may be long
    assert printed.count("word") == 100 and max(map(len, turns)) <= 100


def test_show_prints_correct_attempts_of_an_evaluation(sampled_run, samples, capsys):
    (sampled_run / "samples.jsonl").unlink()
    names = ("problem", "attempt_index", "reflection_index", "context", "attempt")
    record = {name: samples[0][name] for name in names}
    record["attempt_verdict"] = {"correct": True, "reason": "correct"}
    write_lines(sampled_run / "conversations.jsonl", [record])
    r3.main(["show", str(sampled_run)])
    printed = capsys.readouterr().out
    assert "attempt  7   <- correct" in printed
    assert "reflection" not in printed and "retry" not in printed


def test_show_reads_what_train_and_eval_write(finished_run, runs_folder, capsys):
    r3.main(["show", str(finished_run[0]), "--limit", "100"])
    printed = capsys.readouterr().out
    assert len(re.findall("^ +context  ", printed, re.MULTILINE)) == 4
    assert len(re.findall(r"^ +[+-]\d\.\d\d reflection  ", printed, re.MULTILINE)) == 12
    r3.main(["eval", "--limit", "2", "--max-new-tokens", "9", "--num-samples", "1", "--name", "e"])
    capsys.readouterr()
    r3.main(["show", str(runs_folder / "e")])
    assert "<- no_answer" in capsys.readouterr().out


def test_show_refuses_files_that_are_not_samples(sampled_run, capsys):
    with (sampled_run / "samples.jsonl").open("a") as file:
        file.write('{"step": 3')  # an incomplete line, which a running process may be writing
    r3.main(["show"])
    assert "context  six" in capsys.readouterr().out
    for text in ('{"step": 1}', "[]", "7", "{", "", "\udcff"):
        path = sampled_run / "samples.jsonl"
        path.write_bytes(f"{text}\n".encode(errors="surrogateescape"))
        message = error_line(["show"], capsys)
        assert "samples.jsonl was not written by this version of r3.py" in message, text


@pytest.fixture
def plotted_runs(runs_folder):
    """Two runs with a few metrics."""
    runs = [runs_folder / "one", runs_folder / "two"]
    metrics = [
        {"step": 0, "within two": [0.1, 0.05, 0.2]},
        {"step": 1, "reward": 0.2, "reflection_tokens": 7},
        {"step": 2, "within two": [0.2, 0.1, 0.4], "reward": 0.4, "kl": math.nan},
    ]
    for run in runs:
        run.mkdir()
        write_lines(run / "metrics.jsonl", metrics)
    with (runs[1] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')  # an incomplete line, which a running process may be writing
    return runs


def test_plot_draws_one_run_or_several(plotted_runs, monkeypatch, capsys):
    one, two = map(str, plotted_runs)
    r3.main(["plot", one])
    curves = plotted_runs[0] / "curves.png"
    assert curves.read_bytes()[1:4] == b"PNG"
    assert f"The curves are in {curves}" in capsys.readouterr().out
    figures, paths = [], []

    def record(figure, path, **options):
        figures.append(figure)
        paths.append(path)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", record)
    r3.main(["plot", one, two])
    assert paths == [Path("curves.png")] and "curves.png" in capsys.readouterr().out
    panels = ("within two", "reward", "reflection_tokens", "kl")  # those that have data
    axes = dict(zip(panels, figures[0].axes, strict=True))
    for name, axis in axes.items():
        assert axis.get_title() == r3.PANELS[name]
        assert len(axis.containers) == 2
    line, _, [bars] = axes["within two"].containers[0]
    assert line.get_xydata().tolist() == [[0, 0.1], [2, 0.2]]
    bounds = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert np.allclose(bounds, [[0.05, 0.2], [0.1, 0.4]])
    assert axes["reward"].containers[0][0].get_xydata().tolist() == [[1, 0.2], [2, 0.4]]
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["one", "two"]


def test_plot_refuses_files_that_are_not_metrics(plotted_runs, capsys):
    for text in ('{"reward": 1}', "[]", "{"):
        (plotted_runs[0] / "metrics.jsonl").write_text(text + "\n")
        message = error_line(["plot", *map(str, plotted_runs)], capsys)
        assert "one/metrics.jsonl was not written by this version of r3.py" in message


# -- Pretrained models and other tasks -------------------------------------------------------------
@pytest.fixture
def apigen_file(tmp_path):
    """A file of function-calling problems: 2 to train on, and 2 in each split to evaluate on."""
    task, problems = DrawnAPIGen(), []
    for split, num_problems in (("train", 2), ("dev", 2), ("test", 2)):
        problems += task.load(split=split, limit=num_problems)
    write_lines(tmp_path / "data.jsonl", [asdict(problem) for problem in problems])
    return tmp_path / "data.jsonl"


def test_a_pretrained_model_is_evaluated_on_apigen(runs_folder, folder, apigen_file, capsys):
    flags = ["eval", "--model", str(folder), "--task", "apigen", "--data", str(apigen_file)]
    flags += ["--max-new-tokens", "9", "--name"]
    data = apigen_file.read_text()
    apigen_file.write_text(data + "{")
    assert "data.jsonl, line 7: " in error_line([*flags, "damaged"], capsys)
    apigen_file.write_text(data)
    r3.main([*flags, "e", "--split", "all"])
    printed = capsys.readouterr().out
    assert re.search("6 problems, 1 samples? each, temperature 1", printed)
    assert "no_answer" in printed
    conversations = read_lines(runs_folder / "e" / "conversations.jsonl")
    assert sorted(c["problem"]["id"] for c in conversations) == list(range(6))
    for c in conversations:
        # The chat template has no place for tools, so they are in the text.
        tool = c["problem"]["tools"].split('"name": "')[1].split('"')[0]
        assert tool in c["context"]
        assert not c["attempt_verdict"]["correct"] and c["retry"] and c["retry_verdict"]
    tables = json.loads((runs_folder / "e" / "report.json").read_text())["tables"]
    assert next(iter(tables.values()))["model"]["within two"][0] == 0
    r3.main([*flags, "dev"])
    assert "2 problems" in capsys.readouterr().out


def test_a_pretrained_model_is_trained(runs_folder, folder, chance_verifier, tmp_path):
    given = {
        "model": str(folder), "data": countdown_file(tmp_path / "countdown.jsonl"), "name": "f",
        "num_problems": 4, "steps": 2, "batch_size": 2, "max_attempts": 1, "max_new_tokens": 8,
        "limit": 2, "lr": 0.01,
    }  # fmt: skip
    r3.main(["train", *(f"{flag_of(name)}={value}" for name, value in given.items())])
    run = runs_folder / "f"
    assert r3.load_config(run, "train") == replace(r3.PRETRAINED, **given)
    ids = torch.randint(0, 257, (1, 9))
    before = transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    after = transformers.AutoModelForCausalLM.from_pretrained(run / "model")(ids).logits
    assert not torch.allclose(after, before, rtol=1e-2)
    assert_close(Model.from_pretrained(run / "model")(ids), after)
    for line in read_lines(run / "metrics.jsonl")[1:3]:
        assert line["mismatch"] < 1e-4 * line["nll"]


def test_the_papers_experiment_loads_its_splits_from_the_hub(
    runs_folder, folder, apigen_file, monkeypatch, capsys
):
    """It is trained on "train", and evaluated on the split in the settings."""
    loaded, load = [], tasks.APIGen.load

    def local_path(hub_id, files, kind="model"):
        loaded.append(hub_id)
        return apigen_file

    def load_split(task, path, split, *rest):
        loaded.append(split)
        return load(task, path, split, *rest)

    def stop(*_):
        raise ValueError("the search for failures begins")

    monkeypatch.setattr(r3, "local_path", local_path)
    monkeypatch.setattr(tasks.APIGen, "load", load_split)
    monkeypatch.setattr(r3, "find_failures", stop)
    flags = ["train", "--model", str(folder), "--task", "apigen", "--max-new-tokens", "8"]
    hub_id = "Salesforce/xlam-function-calling-60k"
    for split, split_flags in (("dev", []), ("test", ["--split", "test"])):
        message = error_line([*flags, *split_flags, "--name", split], capsys)
        assert "the search for failures begins" in message
        assert loaded == [hub_id, split, hub_id, "train"]
        loaded.clear()


def test_problems_that_might_not_fit_into_the_context_are_dropped_and_counted(
    agent, task, capsys, monkeypatch
):
    problems, attempt_prompt = task.load(split="dev", limit=8), Agent.attempt_prompt
    agent.max_new_tokens = 160
    assert r3.drop_long_problems(agent, problems) == problems
    assert capsys.readouterr().out == ""
    # Make the prompts of later problems longer than those of earlier ones.
    monkeypatch.setattr(
        Agent,
        "attempt_prompt",
        lambda agent, problem: attempt_prompt(agent, problem) + [9] * (3 * problem.id),
    )
    instructions = (task.reflection_instruction, task.retry_instruction)
    bridges = sum(len(agent.tokenizer.bridge(instruction)) for instruction in instructions)
    longest = 512 - 3 * 160 - bridges
    num_fitting = sum(len(agent.attempt_prompt(problem)) <= longest for problem in problems)
    assert 1 < num_fitting < 8
    fitting = r3.drop_long_problems(agent, problems)
    assert fitting == problems[:num_fitting]
    assert f"Dropped {r3.plural(8 - num_fitting, 'problem')}" in capsys.readouterr().out
    failures = grpo.sample_attempts(agent, fitting[-1:], 1, (0, 0))
    [[conversation]] = grpo.rollout(agent, failures, 1, (0, 0))
    assert len(conversation.retry.prompt) + len(conversation.retry.tokens) < 512
    agent.max_new_tokens = 200
    with pytest.raises(ValueError, match="use a lower --max-new-tokens"):
        r3.drop_long_problems(agent, problems)


def test_the_padded_rows_of_the_head_are_neither_sampled_nor_trained(folder):
    """The model has 300 embeddings, and its tokenizer 258 tokens."""
    on_cpu = replace(r3.PRETRAINED, device="cpu", dtype="float32")
    config = replace(on_cpu, model=str(folder), max_new_tokens=40)
    agent = r3.load_agent(config, r3.load_task(config))
    assert agent.model.vocab_size == 258 < agent.model.config.vocab_size == 300
    with torch.no_grad():
        agent.model.model.embed_tokens.weight[258:] = agent.model.model.embed_tokens.weight[65]
    problem = tasks.CountdownProblem(0, (6, 10, 2), 32)
    attempts = grpo.sample_attempts(agent, [problem], 16, (0, 0))
    groups = grpo.rollout(agent, attempts, 1, (0, 0))
    tokens = [t for [c] in groups for turn in (c.attempt, c.reflection) for t in turn.tokens]
    assert len(tokens) > 100 and max(tokens) < 258
    rows = grpo.pack_group(groups[0])
    logprobs = grpo.token_logprobs(agent.model, rows)
    assert_close(logprobs, rows.old_logprobs)
