"""README is true: its length, links, commands, example of a task, and diffs."""

import importlib
import json
import re
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import bench
import experiments
import pytest
import sentence
from conftest import countdown_file, shrink_r3
from drawn_apigen import DrawnAPIGen

import grpo
import r3
import tasks
from tasks import Verdict

ROOT = Path(r3.__file__).parent
README = (ROOT / "README.md").read_text()
DIFFS = experiments.diffs(README)
RENEW = "; to renew README's line numbers, run: "
RENEW += "python tests/experiments.py readme"
MODULES = ("r3", "grpo", "model", "tasks")


def commands() -> list[list[str]]:
    """Every command in README, split into words: in blocks of commands, and within sentences."""
    found = [shlex.split(words) for words in re.findall(r"`(python r3.py [^`]+)`", README)]
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            found += [shlex.split(command, comments=True) for command in line.split("&&")]
    return [words for words in found if words]  # A line may be a comment alone.


def commands_of(program: str) -> list[list[str]]:
    """The arguments of all commands that run a program."""
    found = [words for words in commands() if program in words]
    return [words[words.index(program) + 1 :] for words in found]


def test_it_is_short():
    assert len(README.split()) <= 3_500


def test_links_lead_to_the_lines_they_name():
    links = re.findall(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) >= 7
    for code, file, number in links:
        line = (ROOT / file).read_text().splitlines()[int(number) - 1]
        assert code in line, f"{file}, line {number} has no {code!r}{RENEW}"
    places = re.findall(r"\]\(([^)#h][^)]*?)(?:#L\d+)?\)", README)
    assert "tests/RESULTS.md" in places
    for place in places:
        assert (ROOT / place).exists(), place
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in headings, anchor


def test_every_command_can_be_parsed():
    """By the parsers of the programs themselves."""
    ours = commands_of("r3.py") + commands_of("tests/sentence.py")
    assert len(ours) >= 8
    for words in ours:
        if words[-1] == "--help":
            continue  # tests/test_r3.py tests the help of each command
        given = r3.read_command_line(words)
        if given.pop("command") in ("train", "eval", "failures"):
            given.pop("resume", None)
            r3.Config(**given)
    for program, parser in (("tests/bench.py", bench), ("tests/experiments.py", experiments)):
        assert commands_of(program)
        for words in commands_of(program):
            parser.parser().parse_args(words)
    assert {words[0] for words in commands()} == {"pip", "pytest", "python"}


@pytest.fixture
def problems(tmp_path):
    """A file of problems for each task, in place of the datasets that README names."""
    calls = [
        vars(p) for split in ("train", "dev") for p in DrawnAPIGen().load(split=split, limit=9)
    ]
    (tmp_path / "apigen.jsonl").write_text("".join(json.dumps(call) + "\n" for call in calls))
    countdown_file(tmp_path / "countdown.jsonl")
    return tmp_path


def verdict_by_chance(self, problem, completion):
    """A verdict that depends on the text alone."""
    return Verdict(sum(completion.encode()) % 3 == 0, "wrong_value")


@pytest.fixture
def short_experiment(monkeypatch, tmp_path, base_folder):
    """Let an experiment take seconds."""
    shrink_r3(monkeypatch)
    monkeypatch.setattr(r3, "RUNS", tmp_path / "runs")
    shutil.copytree(base_folder, tmp_path / "runs" / base_folder.name)
    monkeypatch.setattr(r3, "plot_command", lambda folders: None)  # `train` draws no curves
    for task in (tasks.Countdown, tasks.APIGen):
        monkeypatch.setattr(task, "verify", verdict_by_chance)
    monkeypatch.chdir(tmp_path)


FEW = "--steps 1 --batch-size 2 --group-size 2 --limit 2 --num-samples 1 --max-attempts 2"
FEW = [*FEW.split(), "--max-new-tokens", "12", "--num-problems", "6"]


def test_the_commands_for_a_laptop_run(short_experiment, capsys):
    """README's train, show and plot, with smaller sizes."""
    assert [] in [words[1:] for words in commands_of("r3.py")]
    r3.main(["train", *FEW])
    for command in ("show", "plot"):
        for words in commands_of("r3.py"):
            if words[0] == command:
                r3.main(words)
                assert capsys.readouterr().out


@pytest.mark.parametrize("words", [w for w in commands_of("r3.py") if "--model" in w], ids=" ".join)
def test_the_commands_for_a_checkpoint_run(short_experiment, problems, folder, words, capsys):
    """README's commands with another model, other data and smaller sizes."""
    task = words[words.index("--task") + 1] if "--task" in words else "countdown"
    words = [*words, "--model", str(folder), "--data", str(problems / f"{task}.jsonl")]
    few = FEW if words[0] == "train" else FEW[FEW.index("--limit") : FEW.index("--max-attempts")]
    few = [*few, "--max-new-tokens", "12", "--device", "cpu", "--dtype", "float32"]
    r3.main([*words, *few, "--name", "real"])
    assert "% correct" in capsys.readouterr().out


def test_the_command_for_a_pretrained_model_runs(short_experiment, folder, monkeypatch, capsys):
    """README's command for tests/sentence.py, with another model and smaller sizes."""
    monkeypatch.setattr(sentence.Sentence, "verify", verdict_by_chance)
    [words] = commands_of("tests/sentence.py")
    r3.main([*words, *FEW, "--model", str(folder)])
    assert "% correct" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["drawn", "file"])
def test_the_example_of_a_task_runs(short_experiment, source, folder, monkeypatch, capsys):
    """The task that README shows: first as it is, then with the method that reads a file."""
    whole, method = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    lines_of_code = [line for line in whole.splitlines() if line]
    assert len(lines_of_code) <= 30 and len(method.splitlines()) <= 6
    flags = ["train", "--model", str(folder), "--task", "multiply", *FEW]
    if source == "file":
        line = "    Problem = Product\n"
        assert whole.count(line) == 1
        whole = whole.replace(line, f"{line}\n{method}")
        questions = [f"{a} * {a + 7}" for a in range(11, 90)]
        records = [json.dumps({"question": question}) + "\n" for question in questions]
        Path("questions.jsonl").write_text("".join(records))
        flags += ["--data", "questions.jsonl"]
    Path("multiply.py").write_text(whole)
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.setitem(tasks.TASKS, "multiply", None)  # so that it is removed after the test
    monkeypatch.delitem(sys.modules, "multiply", raising=False)
    example = importlib.import_module("multiply")
    problem = example.Product(0, 12, 34)
    for text, reason in (("12 * 34\n= 408", "wrong_value"), ("It is:\n408\n", "wrong_value")):
        assert example.Multiply().verify(problem, text).reason == reason
    assert example.Multiply().verify(problem, "It is:\n408").correct
    monkeypatch.setattr(example.Multiply, "verify", verdict_by_chance)
    r3.main([*flags, "--name", "x"])
    assert "% correct" in capsys.readouterr().out
    assert example.Multiply().parse_record(asdict(problem)) == problem
    # The problems that it has saved can be read.
    r3.main([*flags, "--failures", "runs/x/failures.jsonl"])
    assert "% correct" in capsys.readouterr().out


def two_steps(where: Path, title: str | None, model: Path, monkeypatch) -> bytes:
    """The weights after two steps of the code, with the diff of this title if there is one."""
    experiments.code(where, title)
    flags = "--no-scale-advantages" if title and "--no-scale-advantages" in title else ""
    few = f"train --model {model} --steps 2 --batch-size 4 --group-size 4 --limit 2 --name r"
    few += " --num-problems 8"
    few += f" --max-attempts 3 --max-new-tokens 12 --lr 1e-3 --num-samples 1 {flags}"
    few += f" --data {countdown_file(where / 'countdown.jsonl')}"
    with monkeypatch.context() as patch:
        for name in MODULES:
            patch.delitem(sys.modules, name)  # so that the copy is imported
        patch.syspath_prepend(where)
        patch.chdir(where)
        code = importlib.import_module("r3")
        assert code.__file__ == str(where / "r3.py")
        patch.setattr(code, "CURVE_PROBLEMS", 2)
        patch.setattr(code, "plot_command", lambda folders: None)  # takes a second
        patch.setattr(sys.modules["tasks"].Countdown, "verify", verdict_by_chance)
        code.main(few.split())
        for name in MODULES:
            del sys.modules[name]
    lines = (where / "runs" / "r" / "metrics.jsonl").read_text().splitlines()
    mixed = [json.loads(line).get("mixed_groups", 0.0) for line in lines]
    assert max(mixed) > 0, "no group has mixed rewards: nothing is trained, nothing is compared"
    return (where / "runs" / "r" / "model" / "model.safetensors").read_bytes()


PLAIN: dict[bool, bytes] = {}  # with --no-scale-advantages or without


@pytest.mark.parametrize("title", DIFFS)
def test_the_diffs_apply_and_run(title, tmp_path, folder, monkeypatch):
    """Two steps with each variant do not give the weights that the code as it is gives."""
    assert len(DIFFS) >= 2
    _, hunks = DIFFS[title]
    assert sum(len(set(new.splitlines()) ^ set(old.splitlines())) for old, new in hunks) <= 25
    varied = two_steps(tmp_path / "varied", title, folder, monkeypatch)
    scaled = "--no-scale-advantages" not in title
    if scaled not in PLAIN:
        plain = None if scaled else "plain (with --no-scale-advantages)"
        monkeypatch.setattr(experiments, "diffs", lambda _: {**DIFFS, plain: ("grpo.py", [])})
        PLAIN[scaled] = two_steps(tmp_path / "plain", plain, folder, monkeypatch)
    assert varied != PLAIN[scaled]


def test_the_steps_have_the_numbers_of_the_loop():
    """README and `train` number the same six steps."""
    steps = re.findall(r"^(\d)\. \*\*", README, re.MULTILINE)
    source = Path(grpo.__file__).read_text().split("def train(")[1].split("\ndef ")[0]
    numbers = re.findall(r"# (\d)(?:-(\d))?\. ", source)
    assert [int(n) for pair in numbers for n in pair if n] == list(map(int, steps))
