"""Runs and their folders: one owner, nothing lost, nothing left behind, and messages that help."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

import grpo
import model as models
import r3
from tasks import TinyCountdown, Verdict

FEW = [
    "--steps",
    "3",
    "--batch-size",
    "3",
    "--group-size",
    "3",
    "--limit",
    "4",
    "--num-samples",
    "2",
    "--max-attempts",
    "2",
    "--num-problems",
    "16",
    "--max-new-tokens",
    "12",
    "--lr",
    "1e-4",
    "--cache-tokens",
    "4000",
    "--seed",
    "1",
]


PLOT = r3.plot_command


def load_agent(**changes) -> grpo.Agent:
    """The agent of a run of a tiny model with these settings."""
    config = replace(r3.TINY, **changes)
    return r3.load_agent(config, r3.load_task(config))


def verdict_by_chance(self, problem, completion):
    """A verdict that depends on the text alone."""
    return Verdict(sum(completion.encode()) % 3 == 0, "by chance")


@pytest.fixture
def train(base_folder, tmp_path, monkeypatch):
    """A function that runs a short `train` with the given flags, in a new working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["r3.py"])
    monkeypatch.setattr(r3, "CURVE_PROBLEMS", 2)
    monkeypatch.setattr(TinyCountdown, "verify", verdict_by_chance)
    monkeypatch.setattr(r3, "plot_command", lambda folders: None)  # takes a second

    def run(*flags: str, few=FEW) -> None:
        resumed = "--resume" in flags
        r3.main(
            ["train", *flags] if resumed else ["train", "--model", str(base_folder), *few, *flags]
        )

    return run


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
        "import sys, time; sys.path.insert(0, sys.argv[1]); import r3\n"
        "with r3.locked_folder(r3.RUNS / 'x'): print('owned', flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(r3.__file__).parent)], stdout=subprocess.PIPE
    )
    try:
        assert owner.stdout.readline() == b"owned\n"
        assert "another process is using runs/x" in error_of(train, "--name", "x")
        Path("runs/x/config.json").write_text("{}")
        assert "another process is using runs/x" in error_of(train, "--resume", "runs/x")
    finally:
        owner.kill()
        owner.wait()
    Path("runs/x/config.json").unlink()
    train("--name", "x")  # The lock has ended with its process.
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


def test_what_a_killed_process_was_writing_is_deleted(train):
    train("--name", "x", "--steps", "1")
    for leftover in (".tmpAb3xYz", "checkpoint.safetensors.tmp", "model/.tmp123456"):
        (Path("runs/x") / leftover).write_bytes(b"half a file")
    train("--resume", "runs/x")
    names = {path.name for path in Path("runs/x").rglob("*")}
    assert not any("tmp" in name for name in names)


# -- Results belong to their model and their problems ----------------------------------------------


def test_an_evaluation_is_reused_only_for_the_same_steps(train, capsys):
    train("--name", "x", "--steps", "1")
    before = read_lines(Path("runs/x/trained.jsonl"))
    config = json.loads(Path("runs/x/config.json").read_text())
    Path("runs/x/config.json").write_text(json.dumps({**config, "steps": 2, "lr": 0.1}))
    train("--resume", "runs/x")
    after = read_lines(Path("runs/x/trained.jsonl"))
    assert [r["trained_steps"] for r in before + after] == [1] * 8 + [2] * 8
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
    monkeypatch.setattr(r3, "attempt_all", lambda *a: sampled.append(a) or grpo.attempt_all(*a))
    assert r3.evaluate(agent, problems, 2, "", path) == first and not sampled
    swapped = [replace(p, id=q.id) for p, q in zip(problems, reversed(problems), strict=True)]
    other = r3.evaluate(agent, swapped, 2, "", path)
    assert sampled and {c.problem for c in other} == set(swapped)
    assert len(r3.evaluate(agent, swapped[:3], 2, "", path)) == 6


# -- Failures of another run -----------------------------------------------------------------------


@pytest.fixture
def failures(train):
    """The file of a run's failures, elsewhere."""
    train("--name", "source", "--steps", "1")
    path = Path("failures.jsonl").resolve()
    path.write_bytes(Path("runs/source/failures.jsonl").read_bytes())
    return path


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
    train("--name", "x", "--failures", str(failures))
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
    train("--name", "x", "--failures", str(failures))
    kept = read_lines(Path("runs/x/failures.jsonl"))
    assert len(kept) == 2 * count
    assert len({(r["problem"]["id"], r["attempt_index"]) for r in kept}) == 2 * count
    failures.write_text(text + '{"problem": {"id"\n')
    message = error_of(train, "--name", "y", "--failures", str(failures))
    assert f"line {count + 1}: it is not valid JSON" in message


def test_failures_that_would_outgrow_the_context_are_dropped(failures, capsys):
    agent = load_agent(model="runs/source/model", max_new_tokens=12)
    whole = r3.usable_failures(failures, agent, [])
    lengths = sorted(len(c.attempt.prompt) + len(c.attempt.tokens) for c in whole)
    assert lengths[-1] > lengths[0]
    longest = r3.longest_prompt(agent, turns=grpo.MAX_TURNS - 1)
    agent.model.context_length -= longest - (lengths[-1] - 1)  # one token too few for the longest
    capsys.readouterr()
    usable = r3.usable_failures(failures, agent, [])
    dropped = lengths.count(lengths[-1])
    assert len(usable) == len(whole) - dropped and len(usable) > 0
    assert f"and {dropped} that might not fit" in capsys.readouterr().out
    groups = grpo.rollout(agent, usable, 2, (grpo.TRAIN, 0))
    assert len(groups) == len(usable)


# -- Checkpoints and weights -----------------------------------------------------------------------


def test_a_run_without_its_checkpoint_is_not_started_over(train):
    train("--name", "x", "--save-every", "1")
    text = Path("runs/x/metrics.jsonl").read_text()
    Path("runs/x/checkpoint.safetensors").unlink()
    message = error_of(train, "--resume", "runs/x")
    assert "checkpoint.safetensors is missing" in message
    assert "train --failures runs/x/failures.jsonl" in message
    assert Path("runs/x/metrics.jsonl").read_text() == text


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
    train("--name", "x", "--beta", "0")
    assert not any(isinstance(x, models.Model) for x in copies)
    train("--name", "y")
    assert any(isinstance(x, models.Model) for x in copies)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(base_folder, tmp_path):
    model, tokenizer = models.tiny_model([*TinyCountdown().words(), "one", "more"])
    tokenizer.save_pretrained(tmp_path / "x")
    models.Model.from_pretrained(base_folder).save_pretrained(tmp_path / "x")
    with pytest.raises(ValueError, match="its tokenizer has .* tokens, but its model has"):
        r3.load_agent(replace(r3.TINY, model=str(tmp_path / "x")), TinyCountdown())


# -- Settings and messages -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"warmup": 50.0}, "--warmup 50.0: must be at most 1"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm 0.0: must be at least"),
        ({"steps": "many"}, "--steps 'many': must be of type int"),
        ({"steps": 1.5}, "--steps 1.5: must be of type int"),
        ({"beta": True}, "--beta True: must be of type float"),
        ({"offload": 1}, "--offload 1: must be of type bool"),
        ({"loss_type": "ppo"}, "--loss-type ppo: must be one of dapo, grpo, dr_grpo"),
        ({"model": None}, "--model None: must be of type str"),
    ],
)
def test_an_edited_config_is_checked(train, changes, message):
    train("--name", "x", "--steps", "1")
    path = Path("runs/x/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert message in error_of(train, "--resume", "runs/x")


def test_hints_name_the_program_that_was_started(train, monkeypatch):
    train("--name", "x", "--steps", "1")
    monkeypatch.setattr(sys, "argv", ["tests/sentence.py"])
    message = error_of(train, "--name", "x")
    assert message.startswith("sentence.py: runs/x exists")
    assert message.endswith("python tests/sentence.py train --resume runs/x")
    monkeypatch.setattr(r3, "load_problems", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert "to resume" not in error_of(train, "--name", "y")  # There is nothing to resume.
    message = error_of(train, "--resume", "runs/x")
    assert "interrupted; to resume: python tests/sentence.py train --resume runs/x" in message


def test_eval_does_not_speak_of_resuming(train, base_folder):
    flags = [
        "eval",
        "--model",
        str(base_folder),
        "--limit",
        "2",
        "--num-samples",
        "1",
        "--name",
        "x",
    ]
    r3.main([*flags, "--max-new-tokens", "12"])
    message = error_of(r3.main, [*flags, "--max-new-tokens", "12"])
    assert message.endswith("runs/x exists: choose another --name")


def play(monkeypatch, *lines: str, flags=()) -> None:
    typed = iter([*lines, ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    r3.main(["play", *flags])


def test_play_knows_the_run_of_its_model(train, monkeypatch, capsys):
    train("--name", "x", "--steps", "1")
    configs = []
    monkeypatch.setattr(r3, "play_command", configs.append)
    play(monkeypatch)
    [config] = configs
    assert (config.model, config.max_new_tokens, config.seed) == ("runs/x/model", 12, 1)
    play(monkeypatch, flags=["--model", "runs/x/model", "--temperature", "0.5"])
    assert (configs[1].max_new_tokens, configs[1].temperature) == (12, 0.5)


def test_any_problem_can_be_played_by_its_number(train, monkeypatch, capsys):
    train("--name", "x", "--steps", "1")
    problems = TinyCountdown().load(split="dev", seed=1)
    play(monkeypatch, "7", "100000", "seven")
    printed = capsys.readouterr().out
    a, b, c = problems[7].numbers
    assert f"user  Make {problems[7].target} from {a} {b} {c} ." in printed
    assert f"the problems are numbered from 0 to {len(problems) - 1}" in printed
    assert "type 3 numbers from 1 to 10" in printed


def test_show_says_what_it_shows(train, monkeypatch, capsys):
    train("--name", "x", "--steps", "2")
    capsys.readouterr()
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


def test_show_of_an_evaluation_has_no_advantages(train, base_folder, capsys):
    flags = [
        "eval",
        "--model",
        str(base_folder),
        "--limit",
        "6",
        "--num-samples",
        "1",
        "--name",
        "x",
    ]
    r3.main([*flags, "--max-new-tokens", "12"])
    capsys.readouterr()
    r3.main(["show", "runs/x", "--limit", "50"])
    printed = capsys.readouterr().out
    assert "reflection  " in printed and "+0.00" not in printed


def test_a_count_of_one_is_singular(train, capsys):
    train("--name", "x", "--steps", "1", "--num-samples", "1")
    assert "4 problems, 1 sample each" in capsys.readouterr().out
    assert r3.plural(1, "problem") == "1 problem" and r3.plural(1_000, "x") == "1,000 xs"


def test_curves_have_no_holes_and_neat_ticks(train):
    train("--name", "x", "--steps", "1", "--beta", "0")
    figures = []
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
        PLOT([Path("runs/x")])
    axes = figures[0].get_axes()
    titles = [axis.get_title() for axis in axes]
    assert len(titles) == 5 and not any("KL" in title for title in titles)
    for axis in axes:
        ticks = [tick for tick in axis.get_xticks() if axis.get_xlim()[0] <= tick]
        assert all(float(tick).is_integer() for tick in ticks)
