"""README is true: its links, its commands and its diffs."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import bench
import pytest
import variants

import r3
import tasks
from tasks import Verdict

ROOT = Path(r3.__file__).parent
README = (ROOT / "README.md").read_text()
DIFFS = variants.diffs(README)


def commands() -> list[list[str]]:
    """Every command in README, as words: those in blocks, and those within a sentence."""
    found = [shlex.split(words) for words in re.findall(r"`(python r3.py [^`]+)`", README)]
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            found += [shlex.split(command, comments=True) for command in line.split("&&")]
    return found


def of(*program: str) -> list[list[str]]:
    """The arguments of the commands that run a program."""
    found = [words for words in commands() if {*program} <= {*words} and "--help" not in words]
    return [words[words.index(program[-1]) + 1 :] for words in found]


OURS = [*of("r3.py"), *of("mine.py")]


def test_links_lead_to_the_lines_they_name():
    links = re.findall(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) >= 8
    for code, file, number in links:
        assert code in (ROOT / file).read_text().splitlines()[int(number) - 1], (code, file)
    places = re.findall(r"\]\(([^)#h][^)]*?)(?:#L\d+)?\)", README)
    for place in places:
        assert (ROOT / place).exists(), place
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in headings, anchor


def test_every_command_is_one_that_is_there(monkeypatch):
    """Parsed by the very parsers that will parse it."""
    monkeypatch.setitem(tasks.TASKS, "sentence", None)  # README's own, of mine.py
    parsed = []
    for name in ("train", "failures", "eval", "play", "show", "plot"):
        about = getattr(r3, f"{name}_command").__doc__

        def function(args):
            parsed.append(args)

        function.__name__, function.__doc__ = f"{name}_command", about
        monkeypatch.setattr(r3, f"{name}_command", function)
    monkeypatch.setattr(r3, "resumed", lambda args: args)
    for words in OURS:
        r3.main(words)
    assert len(parsed) == len(OURS) >= 20
    for program, parser in (("tests/bench.py", bench), ("tests/variants.py", variants)):
        found = of(program)
        assert found
        for words in found:
            parser.parser().parse_args(words)
    others = {words[0] for words in commands()}
    assert others == {"pip", "pytest", "python", "torchrun", "vllm", "lm_eval"}


# The shapes that stand for the paper's models; no weights are read.
SHAPES = {
    "Qwen2.5-1.5B-Instruct": "qwen2.5-1.5b", "Qwen2-1.5B-Instruct": "qwen2.5-1.5b",
    "Qwen2.5-7B-Instruct": "qwen2.5-7b", "Qwen2-7B-Instruct": "qwen2.5-7b",
    "Llama-3.1-8B-Instruct": "llama-3.1-8b", "Phi-3.5-mini-instruct": "phi-3.5-mini",
}  # fmt: skip


@pytest.fixture
def problems(tmp_path):
    """A file of problems for each task, where README names a dataset of the hub."""
    calls = [vars(p) for p in tasks.APIGen().load(limit=20)]
    numbers = [
        {"nums": list(p.numbers), "target": p.target} for p in tasks.Countdown().load(limit=20)
    ]
    for name, records in (("apigen", calls), ("countdown", numbers)):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    return tmp_path


GPU = [words for words in of("r3.py", "train") if "--model" in words]


@pytest.mark.parametrize("words", GPU, ids=[" ".join(words[1:4]) for words in GPU])
def test_the_papers_experiments_can_be_planned(words, problems, folder, monkeypatch, capsys):
    """As README has them, but for the model's numbers, the data, and how many problems."""
    words = ["train", *words]
    at = words.index("--model") + 1
    shape = SHAPES[words[at].split("/")[1]]
    (folder / "config.json").write_text((ROOT / "tests" / "configs" / f"{shape}.json").read_text())
    words[at] = str(folder)
    words[words.index("--data") + 1] = str(problems / f"{words[words.index('--task') + 1]}.json")
    few = [("--test-size", "4"), ("--problems", "8"), ("--limit", "3")]
    for name, value in few:
        if name in words:
            words[words.index(name) + 1] = value
    if "--failures" in words:
        at = words.index("--failures")
        del words[at : at + 2]
    monkeypatch.chdir(problems)
    r3.main([*words, "--dry-run", "--device", "cuda", "--dtype", "bfloat16"])
    printed = capsys.readouterr().out
    assert "parameters, bfloat16, on cuda\n1750 steps" in printed and "moments" in printed


@pytest.fixture
def seconds(monkeypatch, tmp_path):
    """An experiment that takes seconds."""
    monkeypatch.setitem(r3.COLD, "steps", 8)
    monkeypatch.setattr(r3, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(r3, "HELD_OUT", (5, 2))
    monkeypatch.setattr(
        r3.Speaker, "verify", lambda s, p, turn: Verdict(sum(turn) % 3 == 0, "wrong_value")
    )
    monkeypatch.chdir(tmp_path)


def test_the_commands_for_a_laptop_run(seconds, problems, folder, capsys):
    """train, show and plot as README has them, but for sizes; the others on a small model."""
    few = ["--steps", "18", "--batch", "3", "--group", "3", "--limit", "6", "--samples", "2"]
    few += ["--responses", "1", "--max-new-tokens", "16", "--problems", "20"]
    tiny = [words for words in of("r3.py", "train") if not {"--model", "--resume"} & set(words)]
    assert [] in tiny and ["--check"] in tiny
    for words in tiny:
        r3.main(["train", *words, *few])
    for command in ("show", "plot"):
        for words in of("r3.py", command):
            r3.main([command, *words])
            assert capsys.readouterr().out
    assert "problem" in Path("conversations.html").read_text()
    few = ["--limit", "4", "--max-new-tokens", "6"]
    for command in ("eval", "failures"):
        for number, words in enumerate(of("r3.py", command)):
            data = problems / f"{words[words.index('--task') + 1]}.json"
            more = ["--responses", "2"] if command == "failures" else []
            words = [command, *words, "--model", str(folder), "--data", str(data), *few, *more]
            words += ["--name", f"{command}{number}"]
            r3.main(words)
            assert "problems" in capsys.readouterr().out


def stepped(where: Path, title: str | None, model: Path, flags: str, monkeypatch) -> bytes:
    """The weights after two steps of the code with a diff of README applied, or as it is."""
    variants.code(where, title)
    few = f"train --model {model} --steps 2 --batch 3 --group 4 --limit 2 --problems 12 --name r"
    few += " --responses 3 --max-new-tokens 12 --lr 1e-3"
    with monkeypatch.context() as patch:
        for name in ("r3", "grpo", "model", "tasks"):
            patch.delitem(sys.modules, name)  # imported anew, from there
        patch.syspath_prepend(where)
        patch.chdir(where)
        code = importlib.import_module("r3")
        assert code.__file__ == str(where / "r3.py")
        patch.setattr(code, "HELD_OUT", (2, 1))
        right = lambda s, p, turn: code.Verdict(sum(turn) % 3 == 0, "wrong_value")  # noqa: E731
        patch.setattr(code.Speaker, "verify", right)
        code.main([*few.split(), *flags.split()])
        for name in ("r3", "grpo", "model", "tasks"):
            del sys.modules[name]
    return (where / "runs" / "r" / "model" / "model.safetensors").read_bytes()


PLAIN: dict[str, bytes] = {}  # by flags


@pytest.mark.parametrize("title", DIFFS)
def test_the_diffs_apply_and_run(title, tmp_path, folder, monkeypatch):
    """Two steps with each variant; they are not the steps of the code as it is."""
    assert len(DIFFS) >= 9
    _, hunks = DIFFS[title]
    assert sum(len(set(new.splitlines()) ^ set(old.splitlines())) for old, new in hunks) <= 15
    flags = {"hindsight": "--train-on retry", "leave-one-out advantages": "--no-std"}.get(title, "")
    varied = stepped(tmp_path / "varied", title, folder, flags, monkeypatch)
    if title not in ("clip higher", "sequence-level ratios"):  # on-policy, the ratio is 1
        if flags not in PLAIN:
            PLAIN[flags] = stepped(tmp_path / "plain", None, folder, flags, monkeypatch)
        assert varied != PLAIN[flags]
