"""README's commands with hub ids, against a server that answers as the hub does (see hub.py).

Each test runs several commands in a process of its own, because `huggingface_hub` reads the hub's
address and the cache's folder when it is imported. The model's tokens are single bytes; its weights
are in two files with an index, and its chat template is in a file of its own, as at the hub.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from conftest import CHATML, byte_tokenizer, countdown_file
from drawn_apigen import DrawnAPIGen
from hub import MEMBER, VISITOR, Hub, Repository

from model import Model, tiny_model
from tasks import APIGen, TinyCountdown

ROOT = Path(__file__).parents[1]
COUNTDOWN = "datasets/Jiayi-Pan/Countdown-Tasks-3to4"
PARQUET = "--data Jiayi-Pan/Countdown-Tasks-3to4"  # the dataset of the paper, in parquet files
APIGEN = f"datasets/{APIGen.hub_id}"
PYARROW = ("pyarrow", "pyarrow.parquet")

EVAL = "eval --model org/letters --limit 2 --max-new-tokens 8"
FAILURES = "failures --model org/letters --num-problems 4 --max-attempts 1 --max-new-tokens 8"
TRAIN = "train --model org/letters --limit 2 --max-new-tokens 8 --steps 1 --keep-checkpoint"
TRAIN += " --batch-size 2"
TRAIN += " --group-size 2 --num-problems 4 --max-attempts 1"
PLAY = "play --model org/letters --max-new-tokens 8"

# The program of a process that runs commands one after the other, each as `python r3.py` does (see
# `forks` in conftest.py). What each of them printed, and the message that it exited with, are
# written as a line of JSON. Its variables are given by `run`.
PROGRAM = """
import contextlib, io, json, os, runpy, sys, traceback
for name in [name for name in os.environ if name.startswith("HF_")]:
    del os.environ[name]
os.environ |= environment
import matplotlib.figure, torch
torch.set_num_threads(1)
matplotlib.figure.Figure.savefig = lambda figure, path, **options: None  # saves a second
os.chdir(folder)
sys.path.insert(0, os.path.dirname(script))
for flags, typed, token, missing_packages in commands:
    sys.argv[1:], sys.stdin = flags.split(), io.StringIO(typed)
    os.environ["HF_TOKEN"] = token
    printed, error = io.StringIO(), None
    installed = {name: sys.modules.pop(name) for name in missing_packages if name in sys.modules}
    sys.modules |= dict.fromkeys(missing_packages)  # None makes importing it an ImportError
    with contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as exit:
            error = exit.code
        except Exception:
            error = traceback.format_exc()
    for name in missing_packages:
        del sys.modules[name]
    sys.modules |= installed
    with open("results.jsonl", "a") as file:
        file.write(json.dumps([printed.getvalue(), error]) + "\\n")
"""


class Command(NamedTuple):
    """A command line, and what is around it."""

    flags: str
    typed: str = ""  # by the user of `play`
    token: str = ""  # the user's token at the hub, in the environment
    missing_packages: tuple[str, ...] = ()


class Result(NamedTuple):
    """What a command printed, and the message that it exited with (None if it succeeded)."""

    printed: str
    error: str | None


def run(forks, hub: Hub, folder: Path, *commands: Command) -> list[Result]:
    """Run commands in one process, in a folder whose subfolder home/ has the cache of the hub."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    variables = {
        "script": str(ROOT / "r3.py"),
        "folder": str(folder),
        "commands": [*map(tuple, commands)],
    }
    variables["environment"] = environment
    (folder / "results.jsonl").unlink(missing_ok=True)
    process = forks.Process(target=exec, args=(PROGRAM, variables))
    process.start()
    process.join(300)
    process.kill()  # if it is still running
    assert process.exitcode == 0
    lines = (folder / "results.jsonl").read_text().splitlines()
    return [Result(*json.loads(line)) for line in lines]


# -- What is at the hub ----------------------------------------------------------------------------
def save_letters(path: Path) -> None:
    """An untrained Qwen2 whose tokens are single bytes, in the files of a repository."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(path)
    settings = {name: x for name, x in tokenizer.settings.items() if name != "chat_template"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").write_text(CHATML)
    config = dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=300, hidden_size=16,
        intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    Model(config).save_pretrained(path)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        part = {name: x for name, x in tensors.items() if weight_map[name] == file}
        safetensors.torch.save_file(part, path / file, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Hub]:
    """A hub with a model and datasets, under the ids that README and the tasks name."""
    root, hub = tmp_path_factory.mktemp("repositories"), Hub()

    def add(repository_id: str, gated: bool = False, **files: str) -> Path:
        folder = root / repository_id
        folder.mkdir(parents=True)
        for name, content in {"README_md": "Hello.", ".gitattributes": "", **files}.items():
            (folder / name.replace("_", ".")).write_text(content)
        hub.repositories[repository_id] = Repository(folder, gated)
        return folder

    letters = add("org/letters", pytorch_model_bin="never load this")
    save_letters(letters)
    for path in ("original/params.json", "onnx/model.onnx"):
        (letters / path).parent.mkdir()
        (letters / path).write_text("{}")
    shutil.copytree(letters, add("org/restricted", gated=True), dirs_exist_ok=True)
    tiny, tokenizer = tiny_model(TinyCountdown().words())
    tiny.save_pretrained(add("org/tiny"))
    tokenizer.save_pretrained(root / "org/tiny")
    add("org/pickled", config_json=(letters / "config.json").read_text())

    lines = countdown_file(root / "countdown.jsonl")
    shutil.copy(lines, add("datasets/org/lines"))
    (add(COUNTDOWN) / "data").mkdir()
    records = [json.loads(line) for line in Path(lines).read_text().splitlines()]
    table, file = pyarrow.Table.from_pylist(records), "data/train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(table, root / COUNTDOWN / file)
    problems = [asdict(problem) for problem in DrawnAPIGen().load(split="dev", limit=4)]
    add(APIGEN, gated=True, xlam_json=json.dumps(problems))
    add("datasets/org/spreadsheet", problems_csv="nums,target\n")
    with hub:
        yield hub


def downloaded_files(requests: list[str]) -> list[str]:
    """The names of the files that were downloaded by these requests."""
    pattern = "GET .*/(?:stored|resolve-cache)/.+/resolve/[0-9a-f]{40}/(.+)"
    matches = [re.fullmatch(pattern, request) for request in requests]
    return [match[1] for match in matches if match]


class User(NamedTuple):
    """A user's folder, what the commands did that were run there, and the files that they
    downloaded."""

    folder: Path
    results: list[Result]
    downloads: list[str]


@pytest.fixture(scope="module")
def user(forks, hub, tmp_path_factory) -> User:
    """A user who has accepted the terms of the gated dataset, and has run README's commands."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "home").mkdir()
    (folder / "home" / "token").write_text(MEMBER)  # as `hf auth login` does
    before = len(hub.requests)
    results = run(forks, hub, folder, *readme_commands("online"))
    return User(folder, results, downloaded_files(hub.requests[before:]))


def readme_commands(name: str) -> list[Command]:
    """The commands of README, whose runs are in the folder runs/NAME."""
    return [
        Command(f"{EVAL} {PARQUET} --name {name}/parquet"),
        Command(f"{EVAL} --data org/lines --name {name}/lines"),
        Command(f"{EVAL} --task apigen --name {name}/apigen"),
        Command(f"{FAILURES} --name {name}/found"),
        Command(f"{TRAIN} --failures runs/{name}/found/failures.jsonl --name {name}/trained"),
        Command(f"train --resume runs/{name}/trained"),
        Command(PLAY, typed="3 5 7 22\n0\n\n"),
        Command(f"play --model runs/{name}/trained/model --split test", typed="3 5 7 22\n0\n\n"),
        # Without pyarrow, the dataset cannot be read; other problems can be typed.
        Command(f"{PLAY} {PARQUET}", typed="0\n3 5 7 22\n\n", missing_packages=PYARROW),
        Command(f"{EVAL} --data org/lines", missing_packages=PYARROW),
    ]


# -- The walk --------------------------------------------------------------------------------------
def test_the_commands_of_the_readme_work_with_hub_ids(user):
    folder, results, _ = user
    assert [result.error for result in results] == [None] * len(results)
    texts = [result.printed for result in results]
    for evaluation in (*texts[:3], texts[-1]):
        assert "2 problems, 1 sample each" in evaluation and "no_answer" in evaluation
    assert "Found failures on 4 of 4 problems" in texts[3]
    for training in texts[4:6]:
        assert "Dropped" not in training and "gain" in training
    for play in texts[6:8]:
        assert "equals 22" in play  # the typed problem
        assert play.count("<- no_answer") == 4  # the attempts and the retries at two problems
    assert re.search(r"^>   \S+\.parquet: .* pip install pyarrow$", texts[8], re.MULTILINE)
    assert texts[8].count("<- no_answer") == 2
    # The run's settings have the ids, and its model is complete.
    settings = json.loads((folder / "runs/online/trained/config.json").read_text())
    assert settings["model"] == "org/letters" and settings["data"] is None
    trained = safetensors.torch.load_file(folder / "runs/online/trained/model/model.safetensors")
    assert trained["model.embed_tokens.weight"].shape == (300, 16)


def test_only_the_files_that_are_needed_are_downloaded_and_once(user):
    """Not, for example, the same weights in other formats."""
    assert sorted(user.downloads) == [
        "chat_template.jinja", "config.json", "countdown.jsonl",
        "data/train-00000-of-00001.parquet", "generation_config.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "xlam.json",
    ]  # fmt: skip


# -- What goes wrong -------------------------------------------------------------------------------
ACCEPT = "access to {} is restricted: accept the terms at {}, then log in with `hf auth login`"
ACCEPT_APIGEN = ACCEPT.format(APIGen.hub_id, f"https://huggingface.co/{APIGEN}")
UNKNOWN = (
    "org/{0}: no such file or folder, and https://huggingface.co/{1}org/{0} does not exist "
    "(if it is private, log in with `hf auth login`)"
)
REFUSED = [  # commands, with few problems, and the messages that they end with
    (Command(f"{EVAL} --task apigen"), re.escape(ACCEPT_APIGEN)),
    (Command(f"{EVAL} --task apigen", token=VISITOR), re.escape(ACCEPT_APIGEN)),
    (Command(f"{FAILURES} --task apigen"), re.escape(ACCEPT_APIGEN)),
    (Command(f"{TRAIN} --task apigen"), re.escape(ACCEPT_APIGEN)),
    (
        Command("eval --model org/restricted --limit 2"),
        re.escape(ACCEPT.format("org/restricted", "https://huggingface.co/org/restricted")),
    ),
    (Command("eval --model org/unknown --limit 2"), re.escape(UNKNOWN.format("unknown", ""))),
    (Command("play --model org/unknown"), re.escape(UNKNOWN.format("unknown", ""))),
    (
        Command("eval --model org/unknown --limit 2", token=VISITOR),
        re.escape(UNKNOWN.format("unknown", "")),
    ),
    (Command(f"{EVAL} --data org/unknown"), re.escape(UNKNOWN.format("unknown", "datasets/"))),
    # A model's id is not that of a dataset.
    (Command(f"{EVAL} --data org/letters"), re.escape(UNKNOWN.format("letters", "datasets/"))),
    (
        Command("eval --model letters --limit 2"),
        r"letters: no such file or folder, nor a hub id \(org/name\)",
    ),
    # The hub refuses an expired token even for what everyone may read.
    (Command(EVAL, token="hf_expired"), "[^/]+/[^/]+: .*401.*`hf auth login`.*"),
    # The tiny model knows no other words than those of its own task.
    (Command("eval --model org/tiny --limit 2"), "org/tiny: .*"),
    (Command("eval --model org/pickled --limit 2"), r".*only safetensors weights are supported\)"),
    (Command(f"{EVAL} --data org/spreadsheet"), ".*org/spreadsheet.* JSON, JSONL or parquet.*"),
    (Command(f"{EVAL} {PARQUET}", missing_packages=PYARROW), r".*parquet.*pip install pyarrow"),
    (Command(f"{TRAIN} {PARQUET}", missing_packages=PYARROW), r".*parquet.*pip install pyarrow"),
]


@pytest.fixture(scope="module")
def refused(forks, hub, tmp_path_factory) -> User:
    """A user who has run the commands in REFUSED."""
    folder, before = tmp_path_factory.mktemp("refused"), len(hub.requests)
    results = run(forks, hub, folder, *(command for command, _ in REFUSED))
    assert not (folder / "runs").exists()
    return User(folder, results, downloaded_files(hub.requests[before:]))


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_cannot_be_used_ends_in_a_line_that_says_what_to_do(refused, number):
    command, message = REFUSED[number]
    error = refused.results[number].error
    assert error and re.fullmatch(rf"r3\.py: {message}", error), command


def test_problems_are_read_before_the_weights_are_downloaded(refused):
    """The weights may be many gigabytes, and useless if there are no problems."""
    assert not [name for name in refused.downloads if name.startswith("model-0000")]


# -- Without a network -----------------------------------------------------------------------------
@pytest.fixture
def stopped(hub, user) -> Iterator[Hub]:
    """The hub, which cannot be reached during a test."""
    hub.stop()
    yield hub
    hub.start()


def test_without_a_network_everything_works_from_the_cache(forks, stopped, user):
    folder, online, _ = user
    cache, requests = folder / "home" / "hub", len(stopped.requests)
    shutil.copytree(cache / "models--org--letters", cache / "models--org--part", symlinks=True)
    [weights] = cache.glob("models--org--part/snapshots/*/model-00002*")
    weights.unlink()  # as if the download had been interrupted
    commands = readme_commands("offline")
    missing = [Command("eval --model org/unknown --limit 2"), Command(f"{EVAL} --data org/unknown")]
    results = run(
        forks, stopped, folder, *commands, Command("eval --model org/part --limit 2"), *missing
    )
    assert len(stopped.requests) == requests
    for before, after in zip(online, results[: len(commands)], strict=True):
        assert after.error is None and minutes_removed(after) == minutes_removed(before)
    for name in ("found/failures.jsonl", "trained/model/model.safetensors"):
        files = [folder / "runs" / run / name for run in ("online", "offline")]
        assert files[0].read_bytes() == files[1].read_bytes()
    part, *unknown = [result.error for result in results[len(commands) :]]
    for error in unknown:
        assert error.startswith(
            "r3.py: org/unknown: no such file or folder; it has not been downloaded before, and "
            "the hub cannot be reached: "
        )
    assert re.fullmatch(r"r3\.py: .*model-00002-of-00002\.safetensors.*", part)


def minutes_removed(result: Result) -> str:
    """What a command printed, without the names of folders and the time that it took."""
    text = re.sub(r"[\d.]+ (s|seconds?|minutes)\b", "", result.printed)
    return re.sub(r"runs/\S+|\S*/snapshots/", "", text)
