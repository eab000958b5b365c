"""The conversation, the main job shrunken to seconds, and what a user sees when input is bad."""

import datetime
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch
import transformers

import grpo
import model as models
import r3
import tasks
from tasks import Verdict

SHORT = [
    *("--steps", "3", "--batch", "4", "--group", "3", "--limit", "6"),
    *("--samples", "2", "--responses", "1", "--max-new-tokens", "24"),
]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The main job in an empty folder, with a cold start of a few steps."""
    monkeypatch.setitem(r3.COLD, "steps", 8)
    monkeypatch.setattr(r3, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(r3, "HELD_OUT", (5, 2))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.fixture
def speaker(tiny, task):
    return r3.Speaker(*tiny, task, max_new_tokens=12, seed=3)


@pytest.fixture
def lenient(monkeypatch):
    """A verifier that an untrained model satisfies now and then: a third of what can be said."""

    def verify(speaker, problem, turn):
        right = sum(turn) % 3 == 0
        return Verdict(right, "right" if right else "wrong_value")

    monkeypatch.setattr(r3.Speaker, "verify", verify)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_conversation_is_its_turns_in_a_row(speaker, task):
    problems = task.load(split="dev", limit=5)
    tries = r3.attempt(speaker, problems, 2, (0, 0))
    assert [c.problem for c in tries] == [p for p in problems for _ in range(2)]
    done = r3.second_tries(speaker, tries, 3, (0, 0))
    assert len(done) == 30
    end, encode = speaker.tokenizer.stop_ids[0], speaker.tokenizer.encode
    for number, c in enumerate(done):
        first = tries[number // 3]
        assert (c.problem, c.attempt, c.sample) == (first.problem, first.attempt, first.sample)
        ended = c.attempt if c.attempt[-1] == end else [*c.attempt, end]
        assert c.context == c.prompt + ended + encode(
            f"<|user|> {task.reflect} <|end|> <|assistant|>"
        )
        assert {turn: len(values) for turn, values in c.logprobs.items()} == {
            turn: len(getattr(c, turn)) for turn in ("attempt", "reflection", "retry")
        }
        assert len(c.reflection) <= 12
        assert c.second == speaker.verify(c.problem, c.retry)
    assert len({tuple(c.reflection) for c in done[:3]}) > 1  # samples of one failure differ


def test_a_retry_from_the_cache_is_the_retry_from_the_beginning(speaker, task):
    tries = r3.attempt(speaker, task.load(split="dev", limit=6), 1, (0, 0))
    reflected, cache = r3.reflect(speaker, tries, 2, (0, 0))
    again, anew = (r3.retry(speaker, reflected, (0, 0), each) for each in (cache, None))
    for one, other in zip(again, anew, strict=True):
        assert one.logprobs["retry"] == pytest.approx(other.logprobs["retry"], abs=1e-4)
        assert replace(one, logprobs={}) == replace(other, logprobs={})


def test_how_the_work_is_split_changes_nothing(speaker, task, monkeypatch):
    problems = task.load(split="dev", limit=7)

    def turns():
        tries = r3.measure(speaker, problems, 2, "")
        return [(c.problem, c.attempt, c.reflection, c.retry, c.second) for c in tries]

    together = turns()
    speaker.cache_tokens = 300
    assert turns() == together


def test_what_a_template_forgets_is_not_read_from_the_cache(speaker, task, monkeypatch):
    tries = r3.attempt(speaker, task.load(split="dev", limit=4), 1, (0, 0))
    reflected, cache = r3.reflect(speaker, tries, 2, (0, 0))
    odd = {tuple(c.reflection) for c in reflected[1:4]}
    monkeypatch.setattr(models.Tokenizer, "forgets", lambda self, turn: tuple(turn) in odd)
    asked, speak = [], r3.Speaker.speak

    def heard(self, prompts, *rest, cache=None):
        assert cache is None
        asked.extend(prompts)
        return speak(self, prompts, *rest, cache=cache)

    monkeypatch.setattr(r3.Speaker, "speak", heard)
    r3.retry(speaker, reflected, (0, 0), cache)
    for c, ids in zip(reflected, asked, strict=True):
        turns = zip((c.attempt, c.reflection), (task.reflect, task.again), strict=True)
        chat = [*task.messages(c.problem)[0]]
        for turn, told in turns:
            chat.append({"role": "assistant", "content": speaker.tokenizer.decode(turn)})
            chat.append({"role": "user", "content": told})
        if tuple(c.reflection) in odd:
            assert ids == speaker.tokenizer.prompt(chat)
        else:
            assert ids[: len(c.context + c.reflection) - 1] == (c.context + c.reflection)[:-1]


def test_what_was_measured_is_not_measured_again(speaker, task, tmp_path, monkeypatch):
    """Another budget, or number of processes, cuts the work elsewhere; lines say how far it is."""
    problems, asked = task.load(split="dev", limit=12), []

    def measured():
        tries = r3.measure(speaker, problems, 2, "m")
        return [(c.problem, c.attempt, c.first, c.reflection, c.retry, c.second) for c in tries]

    whole = measured()
    speaker.folder, speaker.cache_tokens = tmp_path, 400
    assert measured() == whole
    path, attempt = tmp_path / "measured" / "m-first-tries.jsonl", r3.attempt
    written = path.read_text().splitlines(keepends=True)
    assert len(written) > 3
    monkeypatch.setattr(r3, "attempt", lambda s, p, **k: asked.extend(p) or attempt(s, p, **k))
    for lines_left, budget in ((2, 400), (1, 600), (3, 99_999), (len(written), 400)):
        path.write_text("".join(written[:lines_left]) + written[0][:40])
        asked.clear()
        speaker.cache_tokens = budget
        assert measured() == whole
        done = sum(json.loads(line)["items"] for line in written[:lines_left])
        assert asked == problems[done:]
    path.write_text("".join(written).replace('"sample": 1', '"sample": 0', 1))
    with pytest.raises(ValueError, match="m-first-tries.jsonl is damaged"):
        measured()


def test_work_is_split_by_a_budget_of_tokens():
    sizes = [5, 3, 9, 1, 1, 1, 40, 2]
    bunches = r3.bunches(sizes, sizes, 20, 9)
    assert bunches == [[5, 3], [9, 1], [1, 1], [40], [2]]  # one that does not fit goes alone
    assert r3.bunches(sizes[2:6], sizes[2:6], 99, 3) == [[9, 1, 1], [1]]
    assert r3.bunches([], [], 20, 9) == []


def test_a_stop_during_a_held_out_measurement_saves_its_step(small, lenient, monkeypatch):
    measure = r3.measure

    def stops(speaker, problems, samples, name):
        if name == "held out, step 2":
            grpo.STOP.set()
        return measure(speaker, problems, samples, name)

    monkeypatch.setattr(r3, "measure", stops)
    with pytest.raises(SystemExit, match="stopped, and saved; .*--resume .*/x/y"):
        r3.main(["train", *SHORT, "--steps", "8", "--save-every", "25", "--name", "x/y"])
    run = small / "x" / "y"
    assert [path.name for path in grpo.checkpoints(run / "checkpoints")] == ["step-2"]
    assert len(lines(run / "metrics.jsonl")) == 3
    monkeypatch.setattr(r3, "measure", measure)
    monkeypatch.setattr(r3.Speaker, "verify", lambda *_: Verdict(True, "right"))
    with pytest.raises(SystemExit, match="failures.jsonl is of other problems"):
        found = run / "measured" / "failures.jsonl"
        line = json.loads(found.read_text().splitlines()[0])
        line["found"][0]["problem"] = 99_999
        line["sha256"] = r3.digest({"items": line["items"], "found": line["found"]})
        found.write_text(json.dumps(line) + "\n")
        r3.main(["train", "--resume", str(run)])


def test_rewards_go_to_reflections_and_cut_ones_earn_nothing(speaker, task, lenient):
    speaker.tokenizer.stop_ids = [0, *range(20, 30)]  # so that some turns end and some are cut
    failures = r3.attempt(speaker, task.load(split="dev", limit=3), 1, (0, 0))
    args = type("Args", (), {"group": 8, "no_std": False, "train_on": "reflection"})
    rows, batch = r3.sample_batch(speaker, failures, args, step=0)
    tries = [c for c, _ in rows]
    ended = [c.reflection[-1] in speaker.tokenizer.stop_ids for c in tries]
    right = [sum(c.retry) % 3 == 0 for c in tries]
    outcomes = set(zip(ended, right, strict=True))
    assert len(outcomes) == 4  # all of: ended or cut, right or wrong
    want = torch.tensor([float(e and r) for e, r in zip(ended, right, strict=True)])
    assert torch.equal(batch.rewards, want)
    assert torch.equal(batch.advantages, grpo.group_advantages(want.view(3, 8)).flatten())
    for c, ids, [(start, end)] in zip(tries, batch.ids, batch.spans, strict=True):
        assert (ids[:start], ids[start:end], end) == (c.context, c.reflection, len(ids))
    _, shuffled = r3.sample_batch(speaker, failures, args, step=0, shuffle_rewards=True)
    assert sorted(shuffled.rewards.tolist()) == sorted(want.tolist())
    assert shuffled.ids == batch.ids and not torch.equal(shuffled.rewards, want)


@pytest.mark.parametrize("train_on, turns", r3.TRAINED.items())
def test_what_is_trained_is_what_the_flag_names(speaker, task, lenient, train_on, turns):
    """Those turns' tokens, each after all that was in its view; and the step is the textbook's."""
    speaker.tokenizer.stop_ids = [0, *range(20, 40)]  # many turns end before they are cut
    failures = r3.attempt(speaker, task.load(split="dev", limit=3), 1, (0, 0))
    args = type("Args", (), {"group": 4, "no_std": False, "train_on": train_on})
    rows, batch = r3.sample_batch(speaker, failures, args, step=0)
    assert Counter(turn for _, turn in rows) == dict.fromkeys(turns, 12)
    assert batch.group == 4 * len(turns)
    for (c, turn), ids, [(start, end)], logprobs in zip(
        rows, batch.ids, batch.spans, batch.old_logprobs, strict=True
    ):
        said = {"attempt": c.prompt, "reflection": c.context}
        said["retry"] = speaker.tokenizer.next_turn(
            c.context + c.reflection, speaker.tokenizer.bridge(task.again)
        )
        assert ids == said[turn] + getattr(c, turn)
        assert (start, end) == (len(said[turn]), len(ids)) and len(logprobs) == end - start
    drawn = {id(c): c for c, _ in rows}.values()
    assert batch.metrics["sampled"] == sum(
        len(c.attempt) if train_on == "attempt" else len(c.reflection + c.retry) for c in drawn
    )
    same = [r[0] for r in zip(batch.advantages.view(3, -1, 4).unbind(1), strict=True)]
    assert all(torch.equal(same[0], other) for other in same)  # of one conversation, one advantage
    found = grpo.gradients(speaker.model, None, batch, grpo.Settings(beta=0.0))
    assert found["mismatch"] < 1e-4 and found["tokens"] == sum(b - a for [(a, b)] in batch.spans)
    speaker.model.double()
    for micro_tokens in (400, 8_192):
        checked = grpo.check(speaker.model, batch, grpo.Settings(micro_tokens=micro_tokens))
        assert max(checked["loss_error"], checked["gradient_error"]) < 1e-9


def test_every_failure_comes_once_an_epoch_and_never_twice_a_step():
    failures = conversations(range(10))
    drawn = [
        [c.problem.id for c in r3.draw_failures(failures, step, 5, seed=0)] for step in range(4)
    ]
    assert sorted(drawn[0] + drawn[1]) == sorted(drawn[2] + drawn[3]) == list(range(10))
    assert drawn[:2] != drawn[2:]
    for step in range(9):
        ids = [c.problem.id for c in r3.draw_failures(failures, step, 7, seed=0)]
        assert len(ids) == len(set(ids))
    assert len(r3.draw_failures(failures, 0, 25, seed=0)) == 10


def test_a_dataset_of_failures_holds_first_wrong_tries(speaker, task, lenient):
    problems = task.load(split="train", limit=20)
    tries = r3.attempt(speaker, problems, 4, (r3.COLLECT, 0))
    assert 0 < sum(c.first.right for c in tries) < 80
    small = replace(speaker, cache_tokens=500)  # the work is split, the samples are the same
    kept = {}
    for keep in ("any", "all"):
        failures = r3.find_failures(small, problems, 4, keep)
        kept[keep] = [failure.problem.id for failure in failures]
        for problem in problems:
            wrong = [c for c in tries if c.problem == problem and not c.first.right]
            got = [c for c in failures if c.problem == problem]
            wanted = wrong[:1] if keep == "any" or len(wrong) == 4 else []
            assert [(c.sample, c.attempt) for c in got] == [(c.sample, c.attempt) for c in wanted]
    assert 0 < len(kept["all"]) < len(kept["any"])


def test_every_step_samples_anew(speaker, task):
    failures = r3.attempt(speaker, task.load(limit=2), 1, (0, 0))
    args = type("Args", (), {"group": 2, "no_std": False, "train_on": "reflection"})
    one, two = (r3.sample_batch(speaker, failures, args, step)[1].ids for step in (0, 1))
    assert one != two


def test_the_numbers_are_those_of_the_conversations(speaker, task, lenient):
    tries = r3.measure(speaker, task.load(split="dev", limit=30), 2, "")
    first = [c.first.right for c in tries]
    two = [c.first.right or c.second.right for c in tries]
    assert 0 < sum(first) < sum(two) < 60
    rows = r3.accuracy(model=tries)["model"]
    assert rows["1st try"][0] == pytest.approx(np.mean(first))
    assert rows["within two"][0] == pytest.approx(np.mean(two))
    assert rows["1st try"] == r3.interval(np.array(first, float), tries)
    once = tries[::2]  # one try a problem: Wilson's
    assert r3.accuracy(model=once)["model"]["1st try"] == r3.wilson(r3.first_right(once))
    counts = r3.reasons(task, model=tries)
    assert list(counts) == list(task.reasons)  # all of them, in the task's order
    assert counts["no_answer"] == {"model, 1st": 0, "model, retry": 0}
    assert counts["right"] == {"model, 1st": sum(first), "model, retry": sum(two) - sum(first)}


def test_controls_change_what_they_say_and_nothing_else(speaker, task, lenient, monkeypatch):
    """Which speaker retries after which reflections, and on which random numbers."""
    vanilla, trained = speaker, replace(speaker, seed=speaker.seed)
    failures = [
        c for c in r3.measure(speaker, task.load(split="dev", limit=6), 2, "") if not c.first.right
    ]
    own = [replace(c, reflection=[9, *c.reflection]) for c in failures]
    seen, fresh = [], []
    retry, attempt = r3.retry, r3.attempt
    monkeypatch.setattr(r3, "equal_tokens", lambda *_: {})
    monkeypatch.setattr(
        r3, "retry", lambda s, c, *a, **k: seen.append((s, c)) or retry(s, c, *a, **k)
    )
    monkeypatch.setattr(
        r3,
        "attempt",
        lambda s, p, samples, key: fresh.append((s, key)) or attempt(s, p, samples, key),
    )
    speakers = {"vanilla": vanilla, "trained": trained, "shuffled": vanilla}
    rows = r3.controls(speakers, {"vanilla": failures, "trained": own})
    end = speaker.tokenizer.stop_ids
    generic = speaker.tokenizer.encode(task.generic_reflection) + end
    for number, (who, mine) in enumerate(((vanilla, failures), (trained, own))):
        empty, fixed, others = seen[3 * number : 3 * number + 3]
        assert empty[0] is fixed[0] is others[0] is who
        assert all(c.reflection == end for c in empty[1])
        assert all(c.reflection == generic for c in fixed[1])
        for c, swapped in zip(mine, others[1], strict=True):
            origin = [o for o in mine if o.reflection == swapped.reflection]
            assert swapped.context == c.context
            assert origin and all(o.problem.id != c.problem.id for o in origin)
        assert fresh[number] == (who, (r3.AGAIN, 0))  # other numbers than the failed attempt's
    assert len(rows) == 6 and rows["its own reflection"]["trained"] == r3.second_right(own)
    label = "no failure in view: a second attempt"
    assert rows[label]["vanilla"][0] > 0  # not the failed attempts again


def test_the_main_job_and_the_files_it_leaves(small, lenient, capsys):
    r3.main(["train", *SHORT, "--name", "a", "--controls"])
    printed = capsys.readouterr().out
    run = small / "a"
    left = {path.name for path in run.iterdir()}
    assert left == {
        "config.json", "failures.jsonl", "metrics.jsonl", "timings.jsonl", "samples.jsonl",
        "checkpoints", "model", "report.json", "curves.png", "measured",
    }  # fmt: skip
    tables = json.loads((run / "report.json").read_text())["tables"]
    for title, rows in tables.items():
        assert title in printed and all(name in printed for name in rows)
    for rows in list(tables.values())[:2]:  # gain is after minus before
        for column in ("1st try", "within two"):
            gain = rows["trained"][column][0] - rows["vanilla"][column][0]
            assert rows["gain"][column][0] == pytest.approx(gain)
    assert (
        len([row for title, rows in tables.items() if title.startswith("Controls") for row in rows])
        == 7
    )
    config = json.loads((run / "config.json").read_text())
    assert config["seed"] == 0 and config["lr"] == 3e-4 and "torch" in config["versions"]
    steps = lines(run / "metrics.jsonl")
    assert [line["step"] for line in steps] == [0, 1, 2, 3] and "within two" in steps[0]
    assert max(line.get("mismatch", 0) for line in steps) < 1e-4  # invariant 2, over a whole run
    # The reference is the model as it was, not as it is: no divergence at first, and then some.
    assert abs(steps[1]["kl"]) < 1e-6 < steps[2]["kl"] < steps[3]["kl"]
    for record in lines(run / "failures.jsonl"):
        assert record["first"] == "wrong_value" and record["attempt_ids"]

    tokenizer = models.Tokenizer.from_pretrained(run / "model")
    samples = lines(run / "samples.jsonl")
    assert len(samples) == 3 * 4 * 3
    for group in range(0, 36, 3):
        rewards = torch.tensor([[s["reward"] for s in samples[group : group + 3]]])
        got = [s["advantage"] for s in samples[group : group + 3]]
        assert got == pytest.approx(grpo.group_advantages(rewards)[0].tolist())
    for sample in samples:
        start, end = sample["trained_span"]
        ids = tokenizer.encode(f"{sample['context']} {sample['reflection']}")
        assert ids[start:end] == tokenizer.encode(sample["reflection"]) and end == len(ids)
        assert sample["context"].endswith("Wrong. Reflect. <|end|> <|assistant|>")
    assert [path.name for path in (run / "checkpoints").iterdir()]

    # Invariant 6: the same seed gives the same weights, the base made anew, the failures given.
    weights = (run / "model" / "model.safetensors").read_bytes()
    r3.main(["train", *SHORT, "--name", "b", "--fresh", "--controls"])
    r3.main(["train", *SHORT, "--name", "c", "--failures", str(run / "failures.jsonl")])
    for name in ("failures.jsonl", "metrics.jsonl", "samples.jsonl", "report.json"):
        assert (small / "b" / name).read_text() == (run / name).read_text()
    assert (small / "b" / "model" / "model.safetensors").read_bytes() == weights
    assert (small / "c" / "model" / "model.safetensors").read_bytes() == weights
    assert len(list(small.glob("base-*"))) == 1
    base = next(small.glob("base-*")) / "model.safetensors"
    assert base.read_bytes() != weights  # training did change them
    r3.main(["train", *SHORT, "--name", "d", "--seed", "1"])
    assert (small / "d" / "model" / "model.safetensors").read_bytes() != weights

    r3.main(["eval", "--model", str(run / "model"), "--limit", "5", "--max-new-tokens", "20"])
    assert "5 dev problems, 4 samples each" in capsys.readouterr().out


def test_check_compares_with_the_textbook(small, lenient, capsys, monkeypatch):
    for loss in grpo.LOSSES:
        r3.main(["train", *SHORT, "--check", "--loss", loss])
        printed = capsys.readouterr().out
        assert "relative difference of the gradients" in printed
        clipped = float(printed.split("tokens, ")[1].split("%")[0])
        assert 10 <= clipped <= 90
    assert not list(small.glob("countdown-*"))  # nothing is left behind

    exact = grpo.textbook
    monkeypatch.setattr(grpo, "textbook", lambda *a: (exact(*a)[0], exact(*a)[1] * 1.001))
    with pytest.raises(SystemExit, match="differs from the textbook"):
        r3.main(["train", *SHORT, "--check"])


def test_play(small, capsys, monkeypatch):
    said = iter(["6 10 2 32", "nonsense", "6 10 2 99", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    r3.main(["play", "--model", "tiny", "--max-new-tokens", "12"])
    printed = capsys.readouterr().out
    assert "question  Make 32 from 6 10 2 ." in printed and "reflection  " in printed
    assert "type the numbers" in printed and "knows 3 numbers" in printed


@pytest.mark.parametrize(
    "flags, message",
    [
        ("train --steps 0", "--steps"),
        ("train --group 1", "--group"),
        ("train --lr x", "--lr"),
        ("train --lr nan", "--lr"),
        ("train --seed -1", "--seed"),
        ("train --split cold", "--split"),
        ("train --temperature 0", "nothing to compare"),
        ("eval --model nowhere", "no such folder"),
        ("eval --model .", "config.json does not exist"),
        ("eval --data nowhere.json", "nowhere.json: no such file"),
        ("eval --task apigen", "give --model a folder"),
        ("eval --split all", "no split 'all'"),
        ("train --failures nowhere.jsonl", "nowhere.jsonl"),
        ("train --device banana", "no such device"),
        ("dance", "COMMAND"),
    ],
)
def test_bad_input_ends_in_one_line(small, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        r3.main(flags.split())
    said = (
        str(stop.value)
        if isinstance(stop.value.code, str)
        else capsys.readouterr().err.splitlines()[-1]
    )
    assert message in said and stop.value.code not in (0, None) and "\n" not in said
    assert not list(small.glob("countdown-*"))


@pytest.mark.parametrize(
    "change",
    [
        lambda r: "{",
        lambda r: json.dumps({k: v for k, v in r.items() if k != "attempt_ids"}),
        lambda r: json.dumps({**r, "attempt_ids": [5, 99_999_999_999]}),
        lambda r: json.dumps({**r, "attempt": "something else"}),
        lambda r: json.dumps({**r, "attempt_ids": r["attempt_ids"] + [5000]}),
        lambda r: json.dumps({**r, "problem": {"id": 1}}),
        lambda r: json.dumps({**r, "sample": "a"}),
        lambda r: "7",
    ],
)
def test_a_damaged_failure_is_named_by_its_line(speaker, task, tmp_path, change):
    failures = r3.attempt(speaker, task.load(limit=3), 1, (0, 0))
    path = tmp_path / "failures.jsonl"
    r3.write_failures(path, failures, speaker.tokenizer)
    again = r3.read_failures(path, speaker)
    assert again == [replace(c, logprobs={}) for c in failures]
    text = path.read_text().splitlines()
    path.write_text("\n".join([text[0], change(json.loads(text[1])), text[2]]))
    with pytest.raises(ValueError, match="failures.jsonl, line 2"):
        r3.read_failures(path, speaker)


def test_a_right_attempt_is_no_failure(speaker, task, tmp_path, monkeypatch):
    path, failures = tmp_path / "failures.jsonl", r3.attempt(speaker, task.load(limit=1), 1, (0, 0))
    r3.write_failures(path, failures, speaker.tokenizer)
    assert len(r3.read_failures(path, speaker)) == 1
    monkeypatch.setattr(tasks.Countdown, "verify", lambda *_: Verdict(True, "right"))
    with pytest.raises(ValueError, match="failures.jsonl, line 1"):
        r3.read_failures(path, speaker)


# -- Looking at a run ------------------------------------------------------------------------------


@pytest.fixture
def samples():
    """Two steps: of one failure two tries in the first, of two failures one each in the last."""

    def line(step, number, context, reward, advantage, **more):
        turns = {"context": context, "attempt": "7", "reflection": "Hm </script>", "retry": "8"}
        verdicts = {"first": "wrong_value", "second": "right" if reward else "wrong_value"}
        worth = {"reward": reward, "advantage": advantage, "trained": ["reflection"]}
        known = {"step": step, "problem": {"id": number}, "sample": 0}
        return {**known, **turns, **verdicts, **worth, **more}

    return [
        line(1, 5, "five", 1.0, 0.7), line(1, 5, "five", 0.0, -0.7),
        line(2, 5, "five", 0.0, 0.0), line(2, 6, "six", 1.0, 0.0),
    ]  # fmt: skip


def test_conversations_that_begin_alike_are_one_group(samples):
    def found(*rest):
        groups = r3.groups_of(samples, *rest)
        return [(g["title"], g["rewarded"], [t["reward"] for t in g["tries"]]) for g in groups]

    five = ("step 1, problem 5", "1 of 2 rewarded", [1.0, 0.0])
    last = [("step 2, problem 5", "0 of 1 rewarded", [0.0])]
    last += [("step 2, problem 6", "1 of 1 rewarded", [1.0])]
    assert found() == last and found([1, 2]) == [five, *last]
    assert found([1, 2], "mixed") == [five] and found(None, "mixed") == []
    assert found([1, 2], "rewarded") == [(*five[:2], [1.0]), last[1]]
    assert found([1], "unrewarded") == [(*five[:2], [0.0])]
    measured = {"problem": {"id": 1}, "context": "a", "attempt": "b", "first": "right"}
    [group] = r3.groups_of([{**measured, "second": None}])
    assert group["title"] == "problem 1" and group["tries"][0]["turns"] == {"attempt": "b"}
    assert group["rewarded"] == "1 of 1 rewarded" and r3.groups_of([]) == []


def test_show(small, samples, capsys, monkeypatch):
    run = small / "x"
    with pytest.raises(SystemExit, match="no run in .*: r3.py train makes one"):
        r3.main(["show"])
    run.mkdir(parents=True)
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    r3.main(["show", str(run), "--step", "1"])
    plain = capsys.readouterr().out
    assert "\033" not in plain and "problem 5: 1 of 2 rewarded" in plain
    assert "+0.70 reflection  Hm" in plain and "-0.70 reflection" in plain
    assert "<- right" in plain and "<- wrong value" in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    r3.main(["show", "--step", "1", "--limit", "1"])  # the last run
    printed = capsys.readouterr().out
    assert f"\033[{r3.UP[-1]}mHm </script>\033[0m" in printed  # trained, and upwards
    assert f"\033[{r3.DOWN[-1]}mHm </script>\033[0m" in printed
    assert f"\033[{r3.DIM}mfive\033[0m" in printed and "  8\n" in printed  # the retry: plain
    assert re.sub(r"\033\[[\d;]*m", "", printed) == plain
    escape = {**samples[3], "reflection": "\033[2Jgone\a\n\tTab"}
    (run / "samples.jsonl").write_text(json.dumps(escape) + "\n")
    r3.main(["show"])  # no terminal obeys what a model says
    printed = re.sub(r"\033\[(2|38;5;\d+|0)m", "", capsys.readouterr().out)
    assert "[2Jgone" in printed and "Tab" in printed and printed.isascii()
    assert all(c.isprintable() or c == "\n" for c in printed)
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    r3.main(["show", "--limit", "1"])
    assert "1 groups more: --limit 2 shows all" in capsys.readouterr().out
    page = small / "page.html"
    r3.main(["show", str(run), "--step", "1", "2", "--html", str(page)])
    html = page.read_text()
    [data] = re.findall("const groups = (.*);", html)
    assert json.loads(data) == r3.groups_of(samples, [1, 2])
    assert (
        html.count("</script>") == 1 and "//" not in html
    )  # what is said ends no script; no network
    for flags, message in (
        (["nowhere"], "nowhere/conversations.jsonl does not exist"),
        (["--step", "7"], "has no such conversations"),
    ):
        with pytest.raises(SystemExit, match=message):
            r3.main(["show", *flags])
    (run / "samples.jsonl").open("a").write('{"step": 3')  # a run may be writing it
    r3.main(["show"])
    for text in ('{"step": 1}', "[]", "7", "{"):
        (run / "samples.jsonl").write_text(text + "\n")
        with pytest.raises(SystemExit, match="samples.jsonl is not what a run of r3.py writes"):
            r3.main(["show"])


def test_plot(small, monkeypatch):
    runs = []
    for name in ("one", "two"):
        (small / name).mkdir(parents=True)
        rows = [{"step": 0, "1st try": [0.1, 0.05, 0.2]}, {"step": 1, "reward": 0.2, "length": 7}]
        (small / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs.append(str(small / name))
    r3.main(["plot", runs[0]])
    assert (small / "one" / "curves.png").read_bytes()[1:4] == b"PNG"
    r3.main(["plot", *runs])
    assert Path("curves.png").read_bytes() != (small / "one" / "curves.png").read_bytes()
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda f, *a, **k: drawn.append(f))
    r3.draw_curves([Path(run) for run in runs], Path("x.png"))
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["one: 1st try", "two: 1st try"]
    with pytest.raises(SystemExit, match="metrics.jsonl does not exist"):
        r3.main(["plot", "nowhere"])


def test_what_r3_makes_the_tiny_model_forget(speaker, task, monkeypatch):
    """The mean over tokens, against a plain pass; and no text of the cold start is among them."""
    monkeypatch.setattr(r3, "WINDOW", 2)
    problems, tokenizer = task.load(split="dev", seed=speaker.seed), speaker.tokenizer
    batches = r3.dialogues(task, tokenizer, problems, "held out 3", False)
    total = tokens = 0
    with torch.no_grad():
        for batch in batches:
            for ids, spans in zip(batch.ids, batch.spans, strict=True):
                log_p = speaker.model(torch.tensor([ids]))[0].double().log_softmax(-1)
                for t in (t for start, end in spans for t in range(start, end)):
                    total, tokens = total - log_p[t - 1, ids[t]].item(), tokens + 1
    assert r3.forgetting(speaker) == pytest.approx(total / tokens, rel=1e-5)
    cold = {tuple(sorted(p.numbers)) for p in task.load(split="cold")}
    assert not cold & {tuple(sorted(p.numbers)) for p in problems}


# -- Real checkpoints ------------------------------------------------------------------------------


def test_a_folder_with_apigen_from_a_file(small, folder, capsys, tmp_path):
    """Every flag's default is the paper's; eval prints its tables and leaves the conversations."""
    problems = tasks.APIGen().load(split="train", limit=10)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(asdict(problem)) for problem in problems) + "\n{")
    flags = ["--model", str(folder), "--task", "apigen", "--data", str(data)]
    with pytest.raises(SystemExit, match=r"data.jsonl, line 11: no JSON"):
        r3.main(["eval", *flags])
    r3.main(
        ["eval", *flags, "--skip-bad", "--split", "all", "--max-new-tokens", "9", "--name", "e"]
    )
    printed = capsys.readouterr().out
    assert "skipped 1 bad records of 11" in printed and "10 all problems, 1 samples" in printed
    assert "no_answer" in printed and "paper's where not given" in printed
    told = lines(small / "e" / "conversations.jsonl")
    assert sorted(c["problem"]["id"] for c in told) == list(range(10))
    for c in told:
        # The template has no place for tools: they are in the text.
        assert c["problem"]["tools"].split('"name": "')[1].split('"')[0] in c["context"]
        assert c["first"] != "right" and c["retry"] and c["second"]
    rows = json.loads((small / "e" / "report.json").read_text())["tables"]
    assert next(iter(rows.values()))["model"]["within two"][0] == 0


def test_the_papers_settings_are_a_folders_defaults(small, folder, lenient, capsys):
    flags = ["--model", str(folder), "--task", "apigen", "--max-new-tokens", "8", "--limit", "4"]
    few = ["--problems", "6", "--steps", "2", "--batch", "3", "--name", "f", "--responses", "2"]
    r3.main(["train", *flags, *few, "--lr", "0.01"])
    config = json.loads((small / "f" / "config.json").read_text())
    assert config["group"] == 8 and config["beta"] == 0.001 and config["samples"] == 1
    assert config["date"] == datetime.date.today().isoformat()
    assert r3.DEFAULTS["lr"][1] == 5e-7 and r3.DEFAULTS["batch"][1] == 256
    assert r3.DEFAULTS["steps"][1] == 1750 and grpo.Settings().warmup == 0.03
    printed = capsys.readouterr().out
    assert "lr 0.01" in printed and "group 8" in printed
    trained = transformers.AutoModelForCausalLM.from_pretrained(small / "f" / "model")
    before = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, 257, (1, 9))
    assert not torch.allclose(trained(ids).logits, before(ids).logits, atol=1e-4)
    ours = models.Model.from_pretrained(small / "f" / "model")
    assert torch.allclose(ours(ids), trained(ids).logits, atol=1e-4)
    assert max(s.get("mismatch", 0) for s in lines(small / "f" / "metrics.jsonl")) < 1e-4


def test_a_dataset_of_failures_goes_on_where_it_was_killed(small, lenient, monkeypatch, capsys):
    command = ["failures", "--model", "tiny", "--limit", "30", "--responses", "3"]
    command += ["--cache-tokens", "600", "--max-new-tokens", "12", "--name"]
    r3.main([*command, "whole"])
    log, attempt, asked = r3.log, r3.attempt, []

    def dies(path, record):
        log(path, record)
        if len(path.read_text().splitlines()) == 2:
            raise KeyboardInterrupt

    def heard(speaker, problems, *rest, **more):
        asked.extend(problems)
        return attempt(speaker, problems, *rest, **more)

    monkeypatch.setattr(r3, "attempt", heard)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="interrupted"):
        patch.setattr(r3, "log", dies)
        r3.main([*command, "killed"])
    whole, killed = small / "whole" / "failures.jsonl", small / "killed" / "failures.jsonl"
    assert not killed.exists()
    before = {problem.id for problem in asked}
    with open(small / "killed" / "measured" / "failures.jsonl", "a") as file:
        file.write('[{"problem": 1')  # the next line was being written
    config = small / "killed" / "config.json"  # begun on another day
    config.write_text(json.dumps({**json.loads(config.read_text()), "date": "2025-05-30"}))
    asked.clear()
    r3.main(["failures", "--resume", str(small / "killed")])
    assert killed.read_text() == whole.read_text()
    after = {problem.id for problem in asked}
    assert before and after and not before & after and len(before | after) == 30
    count = len(lines(whole))
    assert f"{count} failures on 30 train problems" in capsys.readouterr().out
    assert json.loads(config.read_text())["date"] == "2025-05-30"
    for flags, message in (
        (["failures", "--resume", str(small / "killed")], "is done"),
        (["eval", "--resume", str(small / "killed")], "was begun by failures, not eval"),
        (["eval", "--resume", str(small / "nothing")], "config.json does not exist"),
        (["failures", "--resume", str(small / "killed"), "--keep", "all"], "from the run"),
        ([*command, "killed"], "choose another --name, or --resume"),
    ):
        with pytest.raises(SystemExit, match=message):
            r3.main(flags)
    r3.main(["train", *SHORT, "--failures", str(killed)])
    r3.main([*command, "hard", "--keep", "all"])
    assert 0 < len(lines(small / "hard" / "failures.jsonl")) < count


def test_problems_that_might_outgrow_the_context_are_dropped_and_counted(
    speaker, task, capsys, monkeypatch
):
    problems = task.load(split="dev", limit=8)
    args = r3.argparse.Namespace(data=None, seed=0, skip_bad=False, train_size=None, test_size=None)
    speaker.max_new_tokens = 160
    assert r3.load_problems(args, speaker, "dev", 8) == problems and capsys.readouterr().out == ""
    question = r3.Speaker.question
    bridges = speaker.tokenizer.bridge(task.reflect) + speaker.tokenizer.bridge(task.again)
    room = 512 - 3 * 160 - len(bridges)
    monkeypatch.setattr(r3.Speaker, "question", lambda s, p: question(s, p) + [9] * (3 * p.id))
    longest = max(p.id for p in problems if len(question(speaker, p)) + 3 * p.id <= room)
    assert 0 < longest < 7
    kept = r3.load_problems(args, speaker, "dev", 8)
    assert kept == problems[: longest + 1]
    assert f"{7 - longest} of 8 problems dropped" in capsys.readouterr().out
    [c] = r3.second_tries(speaker, r3.attempt(speaker, kept[-1:], 1, (0, 0)), 1, (0, 0))
    assert len(c.context) + len(c.reflection) + len(c.retry) < 512
    speaker.max_new_tokens = 200
    with pytest.raises(ValueError, match="lower --max-new-tokens"):
        r3.load_problems(args, speaker, "dev", 8)


def test_padded_rows_of_the_head_are_neither_sampled_nor_trained(folder):
    args = r3.argparse.Namespace(
        model=str(folder), task="countdown", seed=0, device=None, temperature=1.0,
        date="2025-05-30", revision=None, max_new_tokens=40, cache_tokens=None, compile=False,
        dtype=None, resume=None,
    )  # fmt: skip
    speaker = r3.open_speaker(args)
    r3.load_weights(args, speaker)
    assert speaker.tokenizer.date == datetime.date(2025, 5, 30)
    assert speaker.model.words == 258 < speaker.model.config.vocab_size == 300
    with torch.no_grad():
        speaker.model.model.embed_tokens.weight[258:] = speaker.model.model.embed_tokens.weight[65]
    tries = r3.attempt(speaker, tasks.Countdown().load(limit=3), 4, (0, 0))
    assert max(token for c in tries for token in c.attempt) < 258


def test_the_readmes_task_runs(folder, tmp_path):
    """README's third task, as it stands there, in a file of its own."""
    root = Path(r3.__file__).parent
    readme = (root / "README.md").read_text()
    [code] = [c for c in re.findall("```python\n(.*?)```", readme, re.DOTALL) if "(Task)" in c]
    assert len(code.splitlines()) < 50
    (tmp_path / "mine.py").write_text(code)
    name = re.search(r'TASKS\["(\w+)"\]', code)[1]
    flags = f"train --model {folder} --task {name} --steps 1 --batch 2 --group 2 --limit 3"
    flags += " --problems 4 --responses 1 --max-new-tokens 6 --name r"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    ran = subprocess.run(
        [sys.executable, "mine.py", *flags.split()],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "within two" in ran.stdout and (tmp_path / "runs" / "r" / "model").is_dir()


# -- Statistics ------------------------------------------------------------------------------------


def conversations(ids):
    problems = [type("P", (), {"id": i}) for i in ids]
    return [r3.Conversation(p, 0, [], [], Verdict(False, "x")) for p in problems]


def test_interval_is_the_cluster_robust_one():
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(50), 4)
    values = (rng.random(200) < np.repeat(rng.random(50), 4)).astype(float)
    mean, low, high = r3.interval(values, conversations(ids))
    means = values.reshape(50, 4).mean(
        1
    )  # with equal clusters: the interval of the problems' means
    half = 1.96 * means.std(ddof=1) / math.sqrt(50)
    assert (mean, low, high) == pytest.approx((means.mean(), mean - half, mean + half))


def test_interval_covers_the_truth_about_95_times_of_100():
    rng, hits = np.random.default_rng(1), 0
    same = conversations(np.repeat(np.arange(80), 4))
    for _ in range(1_000):
        values = (rng.random(320) < np.repeat(rng.beta(2, 3, 80), 4)).astype(float)
        _, low, high = r3.interval(values, same)
        hits += low <= 0.4 <= high
    assert 920 <= hits <= 975


def test_wilson_is_the_published_interval():
    assert r3.wilson(np.array([1.0] * 8 + [0.0] * 2)) == pytest.approx(
        [0.8, 0.4902, 0.9433], abs=1e-4
    )
    assert r3.wilson(np.zeros(10))[1] == pytest.approx(0, abs=1e-12)


def test_equal_tokens_is_the_chance_of_any_of_k(speaker, monkeypatch):
    """Against brute force over all choices of k tries, between whole numbers by a straight line."""
    right = np.array([[1] * 3 + [0] * 13, [0] * 16, [1] * 16], bool)
    failures = [
        replace(c, reflection=[1] * 4, retry=[1], second=Verdict(False, "x"))
        for c in conversations(range(3))
    ]
    after = [
        replace(c, reflection=[1] * 10, retry=[1] * 2, second=Verdict(True, "right"))
        for c in failures
    ]
    tries = [
        replace(failures[i // 16], second=Verdict(bool(right.flat[i]), "x")) for i in range(48)
    ]
    monkeypatch.setattr(
        r3,
        "second_tries",
        lambda *_, **__: [c for i in (2, 1, 0) for c in tries[16 * i : 16 * i + 16]],
    )
    [(label, row)] = r3.equal_tokens(speaker, failures, after).items()
    assert "2.40" in label and row["trained"][0] == 1.0
    two, three = (
        np.mean(
            [
                [any(line[list(chosen)]) for chosen in itertools.combinations(range(16), k)]
                for line in right
            ]
        )
        for k in (2, 3)
    )
    assert row["vanilla"][0] == pytest.approx(two + 0.4 * (three - two))
    longer = [replace(c, reflection=[1] * 400) for c in after]  # there are 16 tries, no more
    [(label, row)] = r3.equal_tokens(speaker, failures, longer).items()
    assert "16.00" in label and row["vanilla"][0] == pytest.approx(2 / 3)
