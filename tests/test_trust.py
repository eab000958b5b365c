"""Kills, Ctrl-C, full disks and damaged files: what a run survives, and how else it ends.

The long forms are behind `pytest -m slow`.
"""

import contextlib
import json
import os
import random
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import r3

ROOT = Path(r3.__file__).parent
DRIVER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import grpo, r3
from tasks import Verdict

r3.COLD_START["steps"], r3.CURVE_SIZE = 4, (3, 2)

def verify(chat, problem, turn):
    right = sum(turn) % 3 == 0
    return Verdict(right, "correct" if right else "wrong_value")

grpo.Agent.verify = verify
r3.plot_command = lambda folders: (folders[0] / "curves.png").write_text("")  # a second each
"""
# Imports once, also what torch imports late, and forks for each run, of which it is given the
# folder and the flags. It says the run's process id, and then how it ended.
SERVER = f"""{DRIVER}
import json, os, signal, traceback
import torch._dynamo

for line in sys.stdin:
    folder, flags, cold = json.loads(line)
    process = os.fork()
    if not process:
        break
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
else:
    sys.exit()
os.chdir(folder)
for number, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
r3.COLD_START["steps"], status = cold, 1
try:
    r3.main(flags)
    status = 0
except SystemExit as stop:
    print(stop, file=sys.stderr)
except BaseException:
    traceback.print_exc()
print(flush=True)
os._exit(status)  # at once: to tear down a fork of torch takes a second
"""
FLAGS = [
    *(
        "train",
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
    ),
    *("--max-attempts", "2", "--num-problems", "16", "--max-new-tokens", "12", "--lr", "1e-4"),
    *("--cache-tokens", "500", "--save-every", "1", "--name", "x"),
]
RESUME = ["train", "--resume", "runs/x"]
SAME = ("metrics.jsonl", "samples.jsonl", "failures.jsonl", "report.json")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


class Runs:
    """Runs of r3.py in processes of their own, one at a time."""

    def __init__(self):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], env=ONE_THREAD, **pipes)

    def start(self, folder: Path, flags: list[str], cold: int = 4) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.server.stdin.write(json.dumps([str(folder), flags, cold]).encode() + b"\n")
        self.process = int(self.server.stdout.readline())

    def goes_on(self, seconds: float = 0) -> bool:
        """Whether the run has not ended, and does not within so many seconds."""
        return not select.select([self.server.stdout], [], [], seconds)[0]

    def until(self, file: str, text: str = "") -> None:
        """Wait until a file of the folder is there and has some text."""
        path = self.folder / file
        while not (path.exists() and (not text or text in path.read_text(errors="replace"))):
            assert self.goes_on(0.002), (file, self.said())

    def send(self, number: int) -> None:
        if self.goes_on():
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(self.process, number)

    def end(self, seconds: float = 200) -> int:
        """Wait for the run, no longer than this: its exit status, negative for a signal."""
        if self.goes_on(seconds):
            os.kill(self.process, signal.SIGKILL)
        return int(self.server.stdout.readline())

    def said(self) -> str:
        """What stands in standard error."""
        return (self.folder / "err").read_text(errors="replace")

    def finish(self, folder: Path, flags: list[str]) -> None:
        self.start(folder, flags)
        assert self.end() == 0, self.said()[-3000:]

    def last_line(self, folder: Path, flags: list[str]) -> str:
        """The one line that a run without success ends in."""
        self.start(folder, flags)
        assert self.end() == 1
        return one_line(self.said())


def one_line(said: str) -> str:
    assert "Traceback" not in said, said[-3000:]
    last = said.strip().splitlines()[-1]
    assert last.startswith("r3.py: "), said[-500:]
    return last


@pytest.fixture(scope="module")
def runs():
    runs = Runs()
    yield runs
    runs.server.stdin.close()
    assert runs.server.wait(60) == 0


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """A run that nothing disturbs, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    begun = time.time()
    runs.finish(folder, FLAGS)
    return folder / "runs" / "x", time.time() - begun


def same(run: Path, whole: Path) -> None:
    """Not a bit of what a run leaves differs."""
    for name in (*SAME, "model/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    for name in ("vanilla.jsonl", "trained.jsonl"):
        assert (run / name).read_text() == (whole / name).read_text(), name


def go_on(runs, folder: Path, whole: Path) -> None:
    """Resume the run, however far it had come, or begin it."""
    run = folder / "runs" / "x"
    if not (run / "report.json").exists():
        runs.finish(folder, RESUME if (run / "config.json").exists() else FLAGS)
    same(run, whole)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, runs, whole):
    after = random.SystemRandom().uniform(0.1, 0.9) * whole[1]
    print(f"killed after {after:.2f} of {whole[1]:.2f} s")
    runs.start(tmp_path, FLAGS)
    runs.goes_on(after)
    runs.send(signal.SIGKILL)
    assert runs.end() in (-signal.SIGKILL, 0)
    go_on(runs, tmp_path, whole[0])


MOMENTS = [
    "failures.jsonl", "vanilla.jsonl", "metrics.jsonl", "samples.jsonl",
    "checkpoint.safetensors.tmp", "checkpoint.safetensors", "model/config.json", "trained.jsonl",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(tmp_path, runs, whole, moment):
    """Twice: as soon as a file is there, and a little later."""
    for later in (0, random.SystemRandom().uniform(0, 0.05)):
        folder = tmp_path / f"{later}"
        runs.start(folder, FLAGS)
        runs.until(f"runs/x/{moment}")
        runs.goes_on(later)
        runs.send(signal.SIGKILL)
        ended = (-signal.SIGKILL, 0) if later else (-signal.SIGKILL,)  # the last ones may be done
        assert runs.end() in ended, moment
        go_on(runs, folder, whole[0])


INTERRUPTED = [
    "samples.jsonl",
    pytest.param("failures.jsonl", marks=pytest.mark.slow),
    pytest.param("vanilla.jsonl", marks=pytest.mark.slow),
    pytest.param("model/model.safetensors", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("moment", INTERRUPTED)
def test_ctrl_c_says_how_to_go_on(tmp_path, runs, whole, moment):
    runs.start(tmp_path, FLAGS)
    runs.until(f"runs/x/{moment}")
    runs.send(signal.SIGINT)
    assert runs.end() == 1
    ended, command = one_line(runs.said()).split("; go on with: r3.py ")
    assert ended == "r3.py: interrupted" and shlex.split(command) == RESUME
    assert not (tmp_path / "runs" / "x" / "report.json").exists()
    runs.finish(tmp_path, shlex.split(command))
    same(tmp_path / "runs" / "x", whole[0])


def test_ctrl_c_ends_the_cold_start_within_a_step(tmp_path, runs):
    runs.start(tmp_path, FLAGS, cold=2_800)
    runs.until("err", "nll")  # a step is done
    runs.send(signal.SIGINT)
    assert runs.end(seconds=10) == 1  # all steps take minutes
    assert one_line(runs.said()) == "r3.py: interrupted"  # there is nothing to go on with
    assert not list((tmp_path / "runs").glob("*"))


# -- Full disks, damaged files ---------------------------------------------------------------------


def limited(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [100, 20_000, 1_000_000])
def test_a_full_disk_ends_in_one_line(tmp_path, runs, whole, size):
    """At the settings, at a line of the failures, and at a checkpoint."""
    for base in whole[0].parent.glob("base-*"):
        shutil.copytree(base, tmp_path / "runs" / base.name)
    ran = subprocess.run(
        [sys.executable, "-c", f"{DRIVER}\nr3.main()", *FLAGS],
        cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True,
        preexec_fn=lambda: limited(size),
    )  # fmt: skip
    assert ran.returncode == 1 and "File too large" in one_line(ran.stderr)
    run = tmp_path / "runs" / "x"
    reached = {100: ".", 20_000: "failures.jsonl", 1_000_000: "samples.jsonl"}[size]
    assert (run / reached).exists() and not (run / "checkpoint.safetensors").exists()
    if size == 100:
        assert not list(run.iterdir())  # the run has not begun: it can be begun again
    else:
        go_on(runs, tmp_path, whole[0])


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def spoil(path: Path) -> None:
    """Another letter in the middle of a file's first line."""
    content = bytearray(path.read_bytes())
    content[content.index(b"\n") // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.fixture
def unfinished(tmp_path, whole):
    """A run without its end: what comes after the last step is to be done again."""
    shutil.copytree(whole[0].parent, tmp_path / "runs")
    run = tmp_path / "runs" / "x"
    (run / "report.json").unlink()
    (run / "curves.png").unlink()
    shutil.rmtree(run / "model")
    return run


DAMAGE = [
    (lambda run: cut(run / "checkpoint.safetensors"), "checkpoint.safetensors is damaged"),
    (lambda run: cut(run / "checkpoint.safetensors", 0), "checkpoint.safetensors is damaged"),
    (lambda run: cut(run / "config.json"), "config.json is not JSON"),
    (lambda run: spoil(run / "failures.jsonl"), "failures.jsonl, line 1 does not fit"),
    (lambda run: spoil(run / "vanilla.jsonl"), "vanilla.jsonl, line 1 does not fit"),
    (lambda run: [cut(f, 0) for f in run.parent.glob("base*/*.safetensors")], "is damaged"),
    (lambda run: [cut(f) for f in run.parent.glob("base*/*.safetensors")], "is damaged"),
]


@pytest.mark.parametrize("change, message", DAMAGE)
def test_a_damaged_file_ends_in_one_line(tmp_path, runs, unfinished, change, message):
    change(unfinished)
    assert message in runs.last_line(tmp_path, RESUME)


def test_damage_is_mended_where_it_can_be(tmp_path, runs, unfinished, whole):
    """Lines without an end; a checkpoint or a base half written; no checkpoint at all."""
    for name in ("failures.jsonl", "vanilla.jsonl", "trained.jsonl"):
        cut(unfinished / name, 0.9)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (unfinished / name).open("a") as file:
            file.write('{"step": 4, "')
    (unfinished / "checkpoint.safetensors").rename(unfinished / "checkpoint.safetensors.tmp")
    for base in unfinished.parent.glob("base*"):
        (base / "model.safetensors").rename(base / "model.safetensors.tmp")
    runs.finish(tmp_path, RESUME)
    same(unfinished, whole[0])


def test_a_file_where_the_folder_should_be(tmp_path, runs):
    (tmp_path / "runs").write_text("")
    assert "runs" in runs.last_line(tmp_path, FLAGS)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--failures nowhere.jsonl", "nowhere.jsonl"),
        ("--temperature 0", "nothing to compare"),
        ("--data torn.jsonl", "the tiny model plays its own Countdown"),
        ("--task apigen", "the tiny model plays its own Countdown"),
        ("--device banana", "no such device"),
        ("--group-size 1", "--group-size 1: give a number from 2 on"),
    ],
)
def test_flags_are_refused_before_any_weight(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(r3, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(r3, "base_model", lambda *_: pytest.fail("a model was made"))
    (tmp_path / "torn.jsonl").write_text('{"problem": {"id": 1, "num')
    with pytest.raises(SystemExit, match=message) as stop:
        r3.main(["train", *flags.split()])
    assert "\n" not in stop.value.code and not (tmp_path / "runs").exists()
