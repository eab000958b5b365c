"""Runs and their folders: one owner, nothing lost, nothing left behind, and messages that help."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import few_threads

import grpo
import model as models
import r3
from tasks import Task, TinyCountdown, Verdict

FEW = [
    "--steps=2", "--batch-size=3", "--group-size=3", "--limit=4", "--num-samples=2",
    "--max-attempts=2", "--num-problems=16", "--max-new-tokens=12", "--lr=1e-4",
    "--cache-tokens=4000", "--seed=1", "--keep-checkpoint",
]  # fmt: skip


PLOT = r3.plot_command


def load_agent(**changes) -> grpo.Agent:
    """The agent of a run of a tiny model with these settings."""
    config = replace(r3.TINY, **changes)
    return r3.load_agent(config, r3.load_task(config))


def verdict_by_chance(self, problem, completion):
    """A verdict that depends on the text alone."""
    return Verdict(sum(completion.encode()) % 3 == 0, "by chance")


def prepare_short_runs(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make runs quick, and make the folder the working directory."""
    patch.chdir(folder)
    patch.setattr(sys, "argv", ["r3.py"])
    patch.setattr(r3, "CURVE_PROBLEMS", 2)
    patch.setattr(TinyCountdown, "verify", verdict_by_chance)
    patch.setattr(r3, "plot_command", lambda folders: None)  # takes a second


@pytest.fixture
def train(base_folder, tmp_path, monkeypatch):
    """A function that runs a short `train` with the given flags, in a new working directory."""
    prepare_short_runs(monkeypatch, tmp_path)

    def run(*flags: str) -> None:
        resumed = "--resume" in flags
        r3.main(["train", *([] if resumed else ["--model", str(base_folder), *FEW]), *flags])

    return run


@pytest.fixture(scope="module")
def shared_run(base_folder, tmp_path_factory) -> Path:
    """The folder of a finished run of two steps, which no test may change."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch, few_threads():
        prepare_short_runs(patch, folder)
        r3.main(["train", "--model", str(base_folder), *FEW, "--name", "x"])
    return folder / "runs" / "x"


@pytest.fixture
def finished(train, shared_run) -> Path:
    """A copy of the finished run: runs/x in the working directory."""
    shutil.copytree(shared_run, "runs/x")
    return Path("runs/x")


def error_of(call, *arguments) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as stopped:
        call(*arguments)
    message = str(stopped.value)
    assert "\n" not in message.strip()
    return message


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- One folder, one owner -------------------------------------------------------------------------


def test_two_runs_never_share_a_folder(train, base_folder):
    """A second process is told so, whatever the first one is doing at the moment."""
    code = (
        "import filelock, os, time; os.makedirs('runs/x', exist_ok=True)\n"
        "lock = filelock.FileLock('runs/x/.lock')\n"
        "lock.acquire(blocking=False)\n"
        "print('owned', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code]
    with r3.locked_folder(Path("runs/x")):
        refused = subprocess.run(command, capture_output=True, text=True)
        assert refused.returncode and "Timeout: The file lock" in refused.stderr
    owner = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert owner.stdout.readline() == b"owned\n"
        assert "another process is using runs/x" in error_of(train, "--name", "x")
        Path("runs/x/config.json").write_text('{"command": "train"}')
        assert "another process is using runs/x" in error_of(train, "--resume", "runs/x")
    finally:
        owner.kill()
        owner.wait()
    Path("runs/x/config.json").unlink()
    train("--name", "x", "--steps", "1")  # The lock has ended with its process.
    with r3.locked_folder(Path("runs/x")):  # And it can be locked again.
        pass


@pytest.mark.parametrize("name", [".", "..", "a/../..", "/tmp", ""])
def test_a_name_is_not_a_path(name):
    with pytest.raises(ValueError, match="must be the name of a folder"):
        replace(r3.TINY, name=name)


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    folders = {r3.new_folder("train", r3.TINY) for _ in range(3)}
    assert len(folders) == 3 and all(folder.is_dir() for folder in folders)


def test_a_run_that_could_not_start_leaves_no_folder(train):
    assert "--failures none.jsonl" in error_of(train, "--failures", "none.jsonl", "--name", "x")
    assert not Path("runs/x").exists()


def test_what_a_killed_process_was_writing_is_deleted(train, finished):
    for leftover in (".tmpAb3xYz", "checkpoint.safetensors.tmp", "model/.tmp123456"):
        (finished / leftover).write_bytes(b"half a file")
    train("--resume", "runs/x")
    names = {path.name for path in finished.rglob("*")}
    assert not any("tmp" in name for name in names)


# -- Results belong to their model and their problems ----------------------------------------------


def test_an_evaluation_is_reused_only_for_the_same_steps(train, finished):
    before = read_lines(Path("runs/x/trained.jsonl"))
    config = json.loads(Path("runs/x/config.json").read_text())
    Path("runs/x/config.json").write_text(json.dumps({**config, "steps": 3, "lr": 0.1}))
    train("--resume", "runs/x")
    after = read_lines(Path("runs/x/trained.jsonl"))
    assert [r["trained_steps"] for r in before + after] == [2] * 8 + [3] * 8
    assert [r["attempt"] for r in before] != [r["attempt"] for r in after]
    text = Path("runs/x/trained.jsonl").read_text()
    train("--resume", "runs/x")  # There is nothing left to do.
    assert Path("runs/x/trained.jsonl").read_text() == text


def test_an_evaluation_is_reused_only_for_the_same_problems(base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(TinyCountdown, "verify", verdict_by_chance)
    agent = load_agent(model=str(base_folder), max_new_tokens=12)
    problems, path = agent.task.load(split="dev", limit=4), tmp_path / "evaluated.jsonl"
    first = r3.evaluate(agent, problems, 2, "", path)
    sampled = []

    def recorded(*arguments, **options):
        sampled.append(arguments)
        return grpo.attempt_all(*arguments, **options)

    monkeypatch.setattr(r3, "attempt_all", recorded)
    assert r3.evaluate(agent, problems, 2, "", path) == first and not sampled
    swapped = [replace(p, id=q.id) for p, q in zip(problems, reversed(problems), strict=True)]
    other = r3.evaluate(agent, swapped, 2, "", path)
    assert sampled and {c.problem for c in other} == set(swapped)
    assert len(r3.evaluate(agent, swapped[:3], 2, "", path)) == 6


# -- Failures of another run -----------------------------------------------------------------------


@pytest.fixture
def failures(train, shared_run) -> Path:
    """A file with the failures of another run."""
    return Path(shutil.copy(shared_run / "failures.jsonl", "failures.jsonl")).resolve()


def test_a_run_resumes_from_its_own_copy_of_the_failures(train, failures):
    train("--name", "whole", "--failures", str(failures))
    wanted = Path("runs/whole/model/model.safetensors").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "rollout_metrics", None)  # the first step ends in an error
        with pytest.raises(TypeError):
            train("--name", "x", "--failures", str(failures))
    failures.unlink()
    train("--resume", "runs/x")
    assert Path("runs/x/model/model.safetensors").read_bytes() == wanted


def test_failures_on_evaluated_problems_are_dropped_and_counted(
    train, base_folder, failures, capsys
):
    agent = load_agent(model=str(base_folder), max_new_tokens=12, seed=1)
    evaluated = agent.task.load(split="dev", limit=4, seed=1)
    attempts = grpo.attempt_all(agent, evaluated, 2, (grpo.COLLECT, 0))
    wrong = [c for c in attempts if not c.attempt_verdict.correct]
    assert wrong
    more = "".join(json.dumps(grpo.to_json(c, agent.tokenizer)) + "\n" for c in wrong)
    count = len(read_lines(failures))
    failures.write_text(failures.read_text() + more)
    train("--name", "x", "--failures", str(failures), "--steps", "1")
    assert f"{len(wrong)} failure" in capsys.readouterr().out
    kept = read_lines(Path("runs/x/failures.jsonl"))
    keys = {agent.task.problem_key(problem) for problem in evaluated}
    assert len(kept) == count
    assert not any(
        agent.task.problem_key(agent.task.parse_record(r["problem"])) in keys for r in kept
    )


def test_failures_of_joined_files_are_all_kept(train, failures):
    """Also if ids are equal, and if the last line has no newline."""
    text = failures.read_text()
    count = len(text.splitlines())
    failures.write_text((text + text).rstrip("\n"))
    train("--name", "x", "--failures", str(failures), "--steps", "1")
    kept = read_lines(Path("runs/x/failures.jsonl"))
    assert len(kept) == 2 * count
    assert len({(r["problem"]["id"], r["attempt_index"]) for r in kept}) == 2 * count
    failures.write_text(text + '{"problem": {"id"\n')
    message = error_of(train, "--name", "y", "--failures", str(failures))
    assert f"line {count + 1}: it is not valid JSON" in message


def test_failures_that_would_outgrow_the_context_are_dropped(failures, base_folder, capsys):
    agent = load_agent(model=str(base_folder), max_new_tokens=12)
    whole = r3.usable_failures(failures, agent, [])
    lengths = sorted(len(c.attempt.prompt) + len(c.attempt.tokens) for c in whole)
    assert lengths[-1] > lengths[0]
    longest = r3.max_prompt_length(agent, turns=grpo.MAX_TURNS - 1)
    agent.model.context_length -= longest - (lengths[-1] - 1)  # one token too few for the longest
    capsys.readouterr()
    usable = r3.usable_failures(failures, agent, [])
    dropped = lengths.count(lengths[-1])
    assert len(usable) == len(whole) - dropped and len(usable) > 0
    assert f"and {dropped} that might not fit" in capsys.readouterr().out
    groups = grpo.rollout(agent, usable, 2, (grpo.TRAIN, 0))
    assert len(groups) == len(usable)


def test_a_search_that_was_completed_is_not_repeated(train, finished, monkeypatch):
    """Its file does not show where it ended: the last problems may have had no failures."""
    monkeypatch.setattr(r3, "find_failures", None)
    text = (finished / "failures.jsonl").read_text()
    train("--resume", "runs/x", "--save-every", "2")
    assert (finished / "failures.jsonl").read_text() == text
    assert r3.load_config(finished, "train").save_every == 2


# -- Checkpoints and weights -----------------------------------------------------------------------


def test_a_run_without_its_checkpoint_is_not_started_over(train, finished, base_folder):
    text = Path("runs/x/metrics.jsonl").read_text()
    Path("runs/x/checkpoint.safetensors").unlink()
    message = error_of(train, "--resume", "runs/x")
    assert message == "r3.py: runs/x has finished; its results are in runs/x/report.json"
    Path("runs/x/report.json").unlink()
    message = error_of(train, "--resume", "runs/x")
    assert "checkpoint.safetensors is missing" in message
    command = message.partition("from its failures: python r3.py train ")[2]
    assert "--failures runs/x/failures.jsonl" in command
    assert Path("runs/x/metrics.jsonl").read_text() == text
    # The command that is suggested works, and has the settings of the run.
    r3.main(["train", *shlex.split(command), "--name", "again"])
    configs = [r3.load_config(Path("runs") / name, "train") for name in ("x", "again")]
    expected = replace(configs[0], name="again", failures="runs/x/failures.jsonl")
    assert configs[1] == expected and configs[1].model == str(base_folder)


def test_a_run_is_resumed_before_its_first_checkpoint(train, finished):
    """Also if a lower --save-every is given, with which there would have been one."""
    weights = Path("runs/x/model/model.safetensors").read_bytes()
    for name in ("checkpoint.safetensors", "report.json", "trained.jsonl"):
        (finished / name).unlink()
    config = json.loads((finished / "config.json").read_text())
    config["save_every"] = 100
    (finished / "config.json").write_text(json.dumps(config))
    train("--resume", "runs/x", "--save-every", "1")
    assert Path("runs/x/model/model.safetensors").read_bytes() == weights


def test_an_evaluation_whose_file_is_empty_is_made_again(train, finished):
    text = (finished / "trained.jsonl").read_text()
    (finished / "trained.jsonl").write_text("")
    train("--resume", "runs/x")
    assert (finished / "trained.jsonl").read_text() == text


def test_a_finished_run_has_no_checkpoint(train, finished):
    assert Path("runs/x/checkpoint.safetensors").exists()  # because of --keep-checkpoint
    train("--resume", "runs/x", "--no-keep-checkpoint")
    assert not Path("runs/x/checkpoint.safetensors").exists()


def test_a_resumed_run_takes_only_what_cannot_change_its_result(train, finished):
    before = r3.load_config(Path("runs/x"), "train")
    message = error_of(train, "--resume", "runs/x", "--lr", "1", "--lora-rank", "4")
    assert "cannot be given with --resume" in message and "--cache-tokens" in message
    again = message.partition("; to start a new run from the run's failures: ")[2]
    flags = r3.read_command_line(shlex.split(again)[2:])
    assert flags.pop("command") == "train"
    changes = {"lr": 1.0, "lora_rank": 4, "name": None, "failures": "runs/x/failures.jsonl"}
    assert r3.new_config(flags) == replace(before, **changes)
    # With another seed, the failures are those of another model.
    message = error_of(train, "--resume", "runs/x", "--lr", "1", "--seed", "7")
    assert message.endswith("--keep-checkpoint")
    text = Path("runs/x/trained.jsonl").read_text()
    flags = ["--offload", "--checkpointing", "--cache-tokens", "3000", "--save-every", "2"]
    train("--resume", "runs/x", *flags)
    assert Path("runs/x/trained.jsonl").read_text() == text
    config = r3.load_config(Path("runs/x"), "train")
    assert config.offload and config.checkpointing and config.cache_tokens == 3_000


@pytest.mark.parametrize("name", ["model", "runs/x/model"])
def test_resuming_what_is_not_a_run_leaves_its_files_alone(train, finished, base_folder, name):
    """Folders of models have a config.json, too."""
    if name == "model":
        shutil.copytree(base_folder, name)
    Path(name, "thesis.tmp").write_text("x")
    Path(name, ".tmp_backup").write_text("x")
    before = sorted(Path(name).iterdir())
    assert "is not a run of the command train" in error_of(train, "--resume", name)
    assert sorted(Path(name).iterdir()) == before


def test_a_folder_of_runs_that_is_not_there_ends_in_one_line(train):
    Path("runs").symlink_to("nowhere/at/all")
    assert "runs" in error_of(train)


def test_a_resumed_optimizer_does_not_hold_the_file(tiny, tmp_path):
    """Its moments are copies. A mapped tensor would keep the disk space of a deleted file."""
    optimizer = grpo.MasterAdamW(tiny[0], 1e-3)
    for p in tiny[0].parameters():
        p.grad = torch.ones_like(p)
    optimizer.update(1e-3, 1.0)
    grpo.save_checkpoint(tmp_path, 1, optimizer, {})
    grpo.load_checkpoint(tmp_path, optimizer)
    if Path("/proc/self/maps").exists():
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_weights_that_compute_nonsense_are_not_saved(train):
    """The run ends in a line, and the checkpoint and the model are the last good ones."""
    message = error_of(train, "--name", "x", "--steps", "6", "--lr", "1e30", "--save-every", "1")
    assert "not finite" in message and "--lr" in message
    path = Path("runs/x/checkpoint.safetensors")
    if path.exists():
        tensors = safetensors.torch.load_file(path)
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_without_kl_the_vanilla_model_is_not_kept(train, monkeypatch):
    copies = []
    deepcopy = r3.copy.deepcopy
    monkeypatch.setattr(r3.copy, "deepcopy", lambda *a: copies.append(a[0]) or deepcopy(*a))
    train("--name", "x", "--steps", "1", "--beta", "0")
    assert not any(isinstance(x, models.Model) for x in copies)
    train("--name", "y", "--steps", "1")
    assert any(isinstance(x, models.Model) for x in copies)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(base_folder, tmp_path):
    model, tokenizer = models.tiny_model([*TinyCountdown().words(), "one", "more"])
    tokenizer.save_pretrained(tmp_path / "x")
    models.Model.from_pretrained(base_folder).save_pretrained(tmp_path / "x")
    with pytest.raises(ValueError, match="its tokenizer has .* tokens, but its model has"):
        r3.load_agent(replace(r3.TINY, model=str(tmp_path / "x")), TinyCountdown())


# -- Settings and messages -------------------------------------------------------------------------


def test_hints_name_the_program_that_was_started(train, finished, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tests/sentence.py"])
    (finished / "report.json").unlink()
    message = error_of(train, "--name", "x")
    assert message.startswith("sentence.py: runs/x exists")
    assert message.endswith("python tests/sentence.py train --resume runs/x")
    monkeypatch.setattr(r3, "load_problems", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert "to resume" not in error_of(train, "--name", "y")  # There is nothing to resume.
    message = error_of(train, "--resume", "runs/x")
    assert "interrupted; to resume: python tests/sentence.py train --resume runs/x" in message


def test_an_evaluation_is_shown_without_advantages_and_not_resumed(train, base_folder, capsys):
    flags = ["eval", "--limit=6", "--num-samples=1", "--max-new-tokens=12", "--name=x"]
    flags += ["--model", str(base_folder)]
    r3.main(flags)
    assert "6 problems, 1 sample each" in capsys.readouterr().out  # A count of one is singular.
    assert r3.plural(1, "problem") == "1 problem" and r3.plural(1_000, "x") == "1,000 xs"
    r3.main(["show", "runs/x", "--limit", "50"])
    printed = capsys.readouterr().out
    assert "reflection  " in printed and "+0.00" not in printed
    message = error_of(r3.main, flags)
    assert message.endswith("runs/x exists: choose another --name")
    message = error_of(train, "--name", "x")
    assert message.endswith("runs/x exists: choose another --name")


def test_only_a_run_that_can_be_resumed_is_offered(train, finished):
    message = error_of(train, "--name", "x")
    assert message.endswith("runs/x exists: choose another --name")
    (finished / "report.json").unlink()
    message = error_of(train, "--name", "x")
    assert message.endswith("--name, or resume it: python r3.py train --resume runs/x")


def play(monkeypatch, *lines: str, flags=()) -> None:
    typed = iter([*lines, ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    r3.main(["play", *flags])


def test_play_knows_the_run_of_its_model(finished, monkeypatch):
    configs = []
    monkeypatch.setattr(r3, "play_command", configs.append)
    play(monkeypatch)
    [config] = configs
    assert (config.model, config.max_new_tokens, config.seed) == ("runs/x/model", 12, 1)
    play(monkeypatch, flags=["--model", "runs/x/model", "--temperature", "0.5"])
    assert (configs[1].max_new_tokens, configs[1].temperature) == (12, 0.5)


def test_play_needs_memory_for_one_conversation(finished, monkeypatch):
    model = r3.load_shapes(replace(r3.TINY, model="runs/x/model"), TinyCountdown())
    config = r3.config_of_model({"model": "runs/x/model"})
    memory = r3.memory_needed(config, model, training=False)
    monkeypatch.setattr(r3, "free_memory", lambda device: memory.peak(1))
    play(monkeypatch)
    monkeypatch.setattr(r3, "free_memory", lambda device: 0.9 * memory.peak(1))
    message = error_of(r3.main, ["play"])
    assert "the run needs" in message and "--cache-tokens" not in message


def test_eval_knows_the_run_of_its_model(finished, monkeypatch):
    """Otherwise, it would evaluate another task, with other lengths."""
    configs = []
    monkeypatch.setitem(r3.COMMANDS, "eval", lambda config, folder: configs.append(config))
    r3.main(["eval", "--model", "runs/x/model", "--split", "test"])
    trained = r3.load_config(finished, "train")
    inherited = {name: getattr(trained, name) for name in r3.SETTINGS_OF_MODEL}
    expected = replace(r3.TINY, model="runs/x/model", split="test", **inherited)
    assert configs == [expected]
    assert (expected.max_new_tokens, expected.seed) == (12, 1)
    shutil.copytree(finished / "model", "model")  # a model of no run
    r3.main(["eval", "--model", "model"])
    assert configs[1] == replace(r3.TINY, model="model")


def test_eval_does_not_need_what_it_does_not_take_from_a_run(finished, monkeypatch):
    """A run may come from another machine, from another version, or from a task of one's own."""
    path = finished / "config.json"
    record = json.loads(path.read_text())
    record |= {"device": "cuda", "old_setting": 1, "task": "mine", "data": "mine.jsonl"}
    path.write_text(json.dumps(record))
    configs = []
    monkeypatch.setitem(r3.COMMANDS, "eval", lambda config, folder: configs.append(config))
    flags = ["eval", "--model", "runs/x/model"]
    assert "--task mine: must be one of countdown" in error_of(r3.main, flags)
    r3.main([*flags, "--task", "countdown"])
    [config] = configs
    assert (config.device, config.data, config.seed) == (r3.TINY.device, None, 1)


def test_an_empty_turn_has_its_label(capsys):
    r3.print_turn("reflection", " \n")
    r3.print_turn("retry", "", reason="wrong")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["reflection"], ["retry", "<-", "wrong"]]


def test_any_problem_can_be_played_by_its_number(finished, monkeypatch, capsys):
    problems = TinyCountdown().load(split="dev", seed=1)
    play(monkeypatch, "7", "100000", "seven")
    printed = capsys.readouterr().out
    a, b, c = problems[7].numbers
    assert f"user  Make {problems[7].target} from {a} {b} {c} ." in printed
    assert f"the problems are numbered from 0 to {len(problems) - 1}" in printed
    assert "type 3 numbers from 1 to 10" in printed


def test_show_says_what_it_shows(finished, monkeypatch, capsys):
    r3.main(["show", "--step", "1", "--limit", "1"])
    printed = capsys.readouterr().out
    assert printed.startswith("runs/x/samples.jsonl, step 1: 3 groups")
    assert "<- by chance" in printed and "\033" not in printed
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    r3.main(["show"])
    printed = capsys.readouterr().out
    assert "step 2" in printed and "\033[2m" in printed
    records = [r for r in read_lines(Path("runs/x/samples.jsonl")) if r["step"] == 2]
    for sign, color in ((1, "\033[32m"), (-1, "\033[31m")):
        assert (color in printed) == any(r["advantage"] * sign > 0 for r in records)
    plain = printed.replace("\033[2m", "").replace("\033[0m", "")
    plain = plain.replace("\033[32m", "").replace("\033[31m", "")
    assert 50 < max(map(len, plain.splitlines()[1:])) <= 60


def test_curves_have_no_holes_and_neat_ticks(finished):
    """The metrics of a run without a KL term have no KL divergence."""
    records = read_lines(finished / "metrics.jsonl")
    assert "kl" in records[1]
    lines = [json.dumps({name: x for name, x in r.items() if name != "kl"}) for r in records]
    (finished / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure)
        )
        PLOT([Path("runs/x")])
    axes = figures[0].get_axes()
    titles = [axis.get_title() for axis in axes]
    assert len(titles) == 5 and not any("KL" in title for title in titles)
    for axis in axes:
        ticks = [tick for tick in axis.get_xticks() if axis.get_xlim()[0] <= tick]
        assert all(float(tick).is_integer() for tick in ticks)


# Runs a command twice, as a script, while nobody reads what it prints: at first the pipe gets its
# errors, too. Each time is in a fork of its own, because importing torch takes seconds.
CLOSED_PIPE = """
import os, runpy, sys
sys.argv[:] = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import r3, torch._dynamo
for outputs in ((1, 2), (1,)):
    process = os.fork()
    if not process:
        reader, writer = os.pipe()
        os.close(reader)
        for output in outputs:
            os.dup2(writer, output)
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


def test_a_closed_pipe_does_not_look_like_success(base_folder, tmp_path):
    """As in `python r3.py train 2>&1 | head -1`, and without `2>&1`."""
    command = [sys.executable, "-c", CLOSED_PIPE, r3.__file__, "eval", "--limit=2"]
    command += ["--num-samples=1", "--max-new-tokens=4", "--model", str(base_folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("1\n1\n", "")


# -- What a run says and keeps ---------------------------------------------------------------------
def test_whole_groups_of_some_failures_are_logged(train):
    train("--name", "x", "--log-failures", "2")
    samples = read_lines(Path("runs/x/samples.jsonl"))
    for step in (1, 2):
        groups = [r["problem"]["id"] for r in samples if r["step"] == step]
        assert len(groups) == 2 * 3 and len(set(groups)) == 2  # of three failures in a step


def test_the_curve_begins_and_ends_with_the_evaluations(train, monkeypatch):
    """They are not made twice. `--curve` is the number of points after step 0."""
    titles, evaluate = [], r3.evaluate

    def record(agent, problems, num_samples, title, *rest, **options):
        titles.append(title)
        return evaluate(agent, problems, num_samples, title, *rest, **options)

    monkeypatch.setattr(r3, "evaluate", record)
    cases = ((0, []), (1, [0, 4]), (2, [0, 2, 4]), (20, [0, 1, 2, 3, 4]), (4, [0, 1, 2, 3, 4]))
    for curve, points in cases:
        titles.clear()
        train("--name", f"curve{curve}", "--curve", f"{curve}", "--steps", "4")
        assert titles == ["vanilla", *(f"step {step}" for step in points[1:-1]), "trained"]
        folder = Path(f"runs/curve{curve}")
        lines = [line for line in read_lines(folder / "metrics.jsonl") if "within two" in line]
        assert [line["step"] for line in lines] == points
    agent = load_agent(model=str(folder / "model"), max_new_tokens=12)
    for line, name in ((lines[0], "vanilla"), (lines[-1], "trained")):
        conversations = r3.load_conversations(folder / f"{name}.jsonl", agent)
        of_two_problems = [c for c in conversations if c.problem.id < 2]  # CURVE_PROBLEMS
        assert len(of_two_problems) == 4
        expected = r3.accuracy({"model": of_two_problems})["model"]
        assert {key: line[key] for key in expected} == expected


def test_each_step_prints_a_line_and_the_end_a_sentence(train, capsys):
    train("--name", "x", "--steps", "3")
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    assert len(lines) == 3
    metrics = [line for line in read_lines(Path("runs/x/metrics.jsonl")) if "reward" in line]
    for step, (line, values) in enumerate(zip(lines, metrics, strict=True), 1):
        assert line.startswith(f"step {step}/3, reward {values['reward']:.2f}, mixed groups ")
        for part in (" tokens per reflection", "truncated", "KL", "rollout", "update", " left"):
            assert part in line
    mixed = round(sum(line["mixed_groups"] * line["sampled_groups"] for line in metrics))
    assert f"{mixed} of 9 groups had mixed rewards; " in printed
    assert "% of the reflections were truncated at --max-new-tokens 12." in printed


def test_a_run_that_learns_nothing_says_so(train, base_folder, monkeypatch, capsys):
    wrong = Verdict(False, "wrong")
    monkeypatch.setattr(TinyCountdown, "verify", lambda self, problem, completion: wrong)
    train("--name", "x")
    text = "0 of 6 groups had mixed rewards, so there was nothing to learn from, and the weights"
    assert text in capsys.readouterr().out
    weights = [path / "model.safetensors" for path in (base_folder, Path("runs/x/model"))]
    before, after = (safetensors.torch.load_file(path) for path in weights)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_adapters_are_trained_with_ten_times_the_learning_rate(train, base_folder):
    """And the model that is saved is an ordinary one, which differs from the vanilla model."""
    few = [flag for flag in FEW if not flag.startswith("--lr")]
    r3.main(["train", "--model", str(base_folder), *few, "--lora-rank", "4", "--name", "x"])
    config = r3.load_config(Path("runs/x"), "train")
    assert config.lora_rank == 4 and config.lr == 10 * r3.TINY.lr
    assert r3.new_config({"lora_rank": 4, "lr": 1e-4}).lr == 1e-4
    assert r3.new_config({"model": "org/x", "lora_rank": 4}).lr == 10 * r3.PRETRAINED.lr
    before, after = (
        safetensors.torch.load_file(path / "model.safetensors")
        for path in (base_folder, Path("runs/x/model"))
    )
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 7 and all("_proj" in name for name in changed)
    small = Path("runs/x/checkpoint.safetensors").stat().st_size
    assert small < 3 * Path("runs/x/model/model.safetensors").stat().st_size
    train("--resume", "runs/x")  # the checkpoint of adapters is read


def test_a_run_that_diverges_says_how_to_start_again(train, monkeypatch):
    message = error_of(train, "--name", "x", "--lr", "1e30", "--steps", "3")
    line, _, command = message.partition("; to start again with a lower learning rate: ")
    assert "finite" in line or "nan" in line
    assert command.startswith("python r3.py train ") and "--lr 3.3e+29" in command
    flags = shlex.split(command.removeprefix("python r3.py "))
    given = r3.read_command_line(flags)
    assert given.pop("command") == "train"
    config = r3.new_config(given)
    assert config.failures == "runs/x/failures.jsonl" and config.group_size == 3


@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.parametrize("lr", [None, r3.PRETRAINED.lr, 5e-6, 3e-6])
def test_a_command_to_start_again_keeps_the_learning_rate(lora_rank, lr):
    """Its default depends on --lora-rank."""
    given = {"model": "org/x", "lora_rank": lora_rank, "lr": lr}
    config = r3.new_config({name: value for name, value in given.items() if value is not None})
    command = r3.restart_command(config, Path("runs/x"))
    flags = r3.read_command_line(shlex.split(command)[2:])
    assert flags.pop("command") == "train"
    assert r3.new_config(flags) == replace(config, failures="runs/x/failures.jsonl")
    adapters = r3.restart_command(config, Path("runs/x"), lora_rank=32)
    flags = r3.read_command_line(shlex.split(adapters)[2:])
    flags.pop("command")
    expected = config.lr if lora_rank else 10 * config.lr
    assert r3.new_config(flags).lr == pytest.approx(expected)
    all_weights = r3.restart_command(config, Path("runs/x"), lora_rank=0)
    flags = r3.read_command_line(shlex.split(all_weights)[2:])
    flags.pop("command")
    expected = config.lr / 10 if lora_rank else config.lr
    assert r3.new_config(flags).lr == pytest.approx(expected)


def test_the_folder_of_a_run_is_not_a_model(finished):
    message = error_of(r3.main, ["eval", "--model", "runs/x", "--limit", "2"])
    assert message.endswith("--model runs/x: this is a run; its model is runs/x/model")


def test_failures_that_teach_nothing_leave_no_run(train, finished):
    """A file without wrong attempts is refused, and the run cannot be resumed."""
    correct = [c for c in read_lines(finished / "vanilla.jsonl") if c["attempt_verdict"]["correct"]]
    lines = [json.dumps(record) + "\n" for record in correct]
    Path("correct.jsonl").write_text("".join(lines))
    message = error_of(train, "--name", "y", "--failures", "correct.jsonl")
    assert message == "r3.py: there are no failures to learn from"
    assert not Path("runs/y").exists()


def test_a_cpu_is_not_advised_to_offload(finished):
    """There, it only adds copies in the same memory."""
    config = r3.load_config(finished, "train")
    advice = r3.memory_advice("train", config, finished)
    assert "--checkpointing" in advice and "--offload" not in advice
    on_gpu = r3.memory_advice("train", replace(config, device="cuda"), finished)
    assert on_gpu.endswith("--checkpointing --offload")
    advice = r3.memory_advice("train", replace(config, checkpointing=True), finished)
    assert advice.startswith("to train adapters instead of all weights: ")


def test_progress_in_a_log_file_is_a_line_a_minute(monkeypatch):
    times, file = iter(range(0, 6000, 20)), io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with r3.progress_bar(desc="search", total=100) as bar:
        bar._time = lambda: next(times)
        for _ in range(10):
            bar.update(10)
    lines = file.getvalue().split("\n")
    assert lines[0].startswith("search: 0 of 100") and lines[-3].startswith("search: 100 of 100")
    assert 4 <= len(lines) <= 8 and "\r" not in file.getvalue()


# -- Mistakes in code of one's own -----------------------------------------------------------------


def test_an_error_of_a_verifier_has_a_traceback(train, monkeypatch):
    """Otherwise, its place would be hard to find: a ValueError ends a command in one line."""
    monkeypatch.setattr(TinyCountdown, "verify", lambda self, problem, answer: int("twelve"))
    with pytest.raises(RuntimeError, match="the task's verifier failed on the answer '") as raised:
        train("--name", "x")
    assert isinstance(raised.value.__cause__, ValueError)


def test_every_error_has_a_traceback_in_development_mode():
    for flags, expected in ((["-X", "dev"], True), ([], False)):
        command = [sys.executable, *flags, r3.__file__, "show", "nowhere"]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 1 and "nowhere is not the folder of a" in ended.stderr
        assert ("Traceback" in ended.stderr) == expected


def test_a_task_has_to_recognize_the_problems_that_a_run_has_saved():
    @dataclass(frozen=True)
    class Pair:
        id: int
        pair: tuple[int, int]

    class Pairs(Task):
        Problem = Pair

        def draw_problems(self, split, limit, rng):
            return [Pair(0, (1, 2))]

    class PairsOfLists(Pairs):
        def parse_record(self, record):
            return Pair(record["id"], tuple(record["pair"]))

    with pytest.raises(ValueError, match=r"restore .*Pair\(id=0, pair=\(1, 2\)\) from JSON"):
        r3.load_problems(r3.PRETRAINED, Pairs(), "train", None)
    assert r3.load_problems(r3.PRETRAINED, PairsOfLists(), "train", None) == [Pair(0, (1, 2))]
