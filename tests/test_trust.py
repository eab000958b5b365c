"""Kills, Ctrl-C, full disks and damaged files: a run resumes as if nothing had happened, or it ends
in one line that says what is wrong.

The long tests are behind `pytest -m slow`.
"""

import contextlib
import os
import random
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

import r3

# The program of a process that runs r3.py in a folder (see `forks` in conftest.py). Its variables
# are `paths` and the arguments of `Runner.start`.
PROGRAM = """
import os, resource, signal, sys, threading, time
import pytest
sys.path[:0] = paths
import grpo, r3
from conftest import shrink_r3, verdict_by_chance

os.chdir(folder)
for descriptor, name in ((1, "stdout"), (2, "stderr")):
    os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
signal.signal(signal.SIGINT, signal.default_int_handler)  # Background processes ignore it.
r3.torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
shrink_r3(pytest.MonkeyPatch())
grpo.Agent.verify = verdict_by_chance
r3.plot_command = lambda folders: (folders[0] / "curves.png").touch()  # saves a second
if cold_start_steps:
    r3.COLD_START["steps"] = cold_start_steps
if max_file_size:  # A write beyond this size fails, as on a full disk.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # What is printed takes no disk space.
def interrupt():
    while not os.path.exists(interrupt_at):
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGINT)
if interrupt_at:  # Ctrl-C as soon as this file exists
    threading.Thread(target=interrupt, daemon=True).start()
sys.argv = ["r3.py"]
r3.main(flags)
"""
PATHS = [str(Path(r3.__file__).parent), str(Path(__file__).parent)]
FLAGS = [
    "train", "--steps=3", "--batch-size=3", "--group-size=3", "--limit=3", "--num-samples=2",
    "--max-attempts=2", "--num-problems=16", "--max-new-tokens=12", "--lr=1e-3",
    "--cache-tokens=500", "--save-every=1", "--name=x", "--keep-checkpoint",
]  # fmt: skip
RESUME = ["train", "--resume", "runs/x"]
REPRODUCIBLE = (
    "failures.jsonl", "vanilla.jsonl", "metrics.jsonl", "samples.jsonl", "trained.jsonl",
    "report.json", "model/model.safetensors",
)  # fmt: skip


class Runner:
    """Runs r3.py in processes of their own, one at a time."""

    def __init__(self, forks):
        self.forks = forks

    def start(
        self,
        folder: Path,
        flags: list[str],
        cold_start_steps: int | None = None,
        max_file_size: int | None = None,
        interrupt_at: str | None = None,
    ) -> None:
        """Start a run of r3.py with these flags in a folder."""
        folder.mkdir(exist_ok=True)
        (folder / "stderr").unlink(missing_ok=True)
        self.folder = folder
        variables = {"paths": PATHS, "folder": str(folder), "flags": flags}
        variables |= {"cold_start_steps": cold_start_steps, "max_file_size": max_file_size}
        variables["interrupt_at"] = interrupt_at
        self.process = self.forks.Process(target=exec, args=(PROGRAM, variables))
        self.process.start()

    def is_running(self, seconds: float = 0) -> bool:
        """Whether the run is still running after this time. If it ends earlier, return at once."""
        self.process.join(seconds)
        return self.process.is_alive()

    def wait_for_file(self, name: str, text: str = "") -> None:
        """Wait until a file of the folder exists and contains a text."""
        path = self.folder / name
        while not path.exists() or (text and text not in path.read_text(errors="replace")):
            assert self.is_running(0.002), (name, self.stderr())

    def send(self, signal_number: int) -> None:
        if self.is_running():
            with contextlib.suppress(ProcessLookupError):  # It may have ended in this moment.
                os.kill(self.process.pid, signal_number)

    def wait(self, seconds: float = 200) -> int:
        """Wait until the run has ended, and return its exit status, which is negative for a signal.
        After this time the run is killed."""
        if self.is_running(seconds):
            self.process.kill()
        self.process.join()
        return self.process.exitcode

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def succeed(self, folder: Path, flags: list[str]) -> None:
        """Run to the end, without an error."""
        self.start(folder, flags)
        assert self.wait() == 0, self.stderr()[-3000:]

    def fail(self, folder: Path, flags: list[str], **options) -> str:
        """Run to an error, and return the one line that reports it."""
        self.start(folder, flags, **options)
        assert self.wait() == 1
        return self.error_line()

    def error_line(self) -> str:
        stderr = self.stderr()
        assert "Traceback" not in stderr, stderr[-3000:]
        line = stderr.strip().splitlines()[-1]
        assert line.startswith("r3.py: "), stderr[-500:]
        return line


@pytest.fixture(scope="module")
def runner(forks):
    return Runner(forks)


@pytest.fixture(scope="module")
def undisturbed(runner, tmp_path_factory) -> tuple[Path, float]:
    """The folder of a run that nothing disturbs, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    start_time = time.time()
    runner.succeed(folder, FLAGS)
    return folder / "runs" / "x", time.time() - start_time


@pytest.fixture
def folder_with_base(tmp_path, base_folder) -> Path:
    """A folder in which the tiny model exists already, so that no run needs a cold start."""
    shutil.copytree(base_folder, tmp_path / "runs" / base_folder.name)
    return tmp_path


def assert_same_files(run: Path, other: Path) -> None:
    for name in REPRODUCIBLE:
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


def resume_and_compare(runner: Runner, folder: Path, undisturbed: Path) -> None:
    """Resume the run in this folder, or start it if it had not begun. It must leave the same files
    as the run that was not disturbed."""
    run = folder / "runs" / "x"
    if not (run / "report.json").exists():
        runner.succeed(folder, RESUME if (run / "config.json").exists() else FLAGS)
    assert_same_files(run, undisturbed)


# -- Kills and Ctrl-C ------------------------------------------------------------------------------
def test_a_killed_run_resumes_bit_for_bit(tmp_path, runner, undisturbed):
    """At a random time, the cold start included."""
    seconds = random.SystemRandom().uniform(0.1, 0.9) * undisturbed[1]
    print(f"killed after {seconds:.2f} of {undisturbed[1]:.2f} s")
    runner.start(tmp_path, FLAGS)
    runner.is_running(seconds)
    runner.send(signal.SIGKILL)
    assert runner.wait() in (-signal.SIGKILL, 0)
    resume_and_compare(runner, tmp_path, undisturbed[0])


FILES_IN_ORDER = [
    "failures.jsonl", "vanilla.jsonl", "metrics.jsonl", "samples.jsonl",
    "checkpoint.safetensors.tmp", "checkpoint.safetensors", "model/config.json", "trained.jsonl",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES_IN_ORDER)
def test_a_run_that_is_killed_at_any_moment_resumes_bit_for_bit(
    tmp_path, runner, undisturbed, file
):
    """Twice: as soon as the file exists, and a little later."""
    for delay in (0, random.SystemRandom().uniform(0, 0.05)):
        folder = tmp_path / f"{delay}"
        runner.start(folder, FLAGS)
        runner.wait_for_file(f"runs/x/{file}")
        runner.is_running(delay)
        runner.send(signal.SIGKILL)
        # After the delay, the run may have ended, if the file is one of the last.
        assert runner.wait() in ((-signal.SIGKILL, 0) if delay else (-signal.SIGKILL,)), file
        resume_and_compare(runner, folder, undisturbed[0])


@pytest.mark.parametrize(
    "file",
    [
        "samples.jsonl",
        pytest.param("failures.jsonl", marks=pytest.mark.slow),
        pytest.param("vanilla.jsonl", marks=pytest.mark.slow),
        pytest.param("model/model.safetensors", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_prints_the_command_that_resumes(folder_with_base, runner, undisturbed, file):
    runner.start(folder_with_base, FLAGS, interrupt_at=f"runs/x/{file}")
    assert runner.wait() == 1
    message, command = runner.error_line().split("; to resume: ")
    assert message == "r3.py: interrupted" and command.endswith(f"r3.py {shlex.join(RESUME)}")
    run = folder_with_base / "runs" / "x"
    assert not (run / "report.json").exists()
    runner.succeed(folder_with_base, RESUME)
    assert_same_files(run, undisturbed[0])


def test_ctrl_c_ends_the_cold_start_within_a_step(tmp_path, runner):
    runner.start(tmp_path, FLAGS, cold_start_steps=1_000_000)
    runner.wait_for_file("stderr", "cold start: 0 of 1000000")
    runner.send(signal.SIGINT)
    assert runner.wait(seconds=60) == 1  # A million steps would take hours.
    assert runner.error_line() == "r3.py: interrupted"  # There is nothing to resume.
    assert not list((tmp_path / "runs").glob("*"))


# -- Full disks and damaged files ------------------------------------------------------------------
@pytest.mark.parametrize("file", ["config.json", "failures.jsonl", "checkpoint.safetensors"])
def test_a_full_disk_ends_in_one_line(folder_with_base, runner, undisturbed, file):
    """Half of this file can be written, and all of the files before it."""
    limit = (undisturbed[0] / file).stat().st_size // 2
    message = runner.fail(folder_with_base, FLAGS, max_file_size=limit)
    assert "File too large" in message
    expected_files = {
        "config.json": set(),
        "failures.jsonl": {"config.json", "failures.jsonl"},  # some lines of the latter
        "checkpoint.safetensors": {
            "config.json", "failures.jsonl", "vanilla.jsonl", "metrics.jsonl", "samples.jsonl",
            "timings.jsonl",
        },
    }  # fmt: skip
    run = folder_with_base / "runs" / "x"
    files = {path.name for path in run.glob("*") if path.suffix != ".tmp"}
    assert files - {".lock"} == expected_files[file]
    resume_and_compare(runner, folder_with_base, undisturbed[0])


def truncate(path: Path, fraction: float = 0.5) -> None:
    """Keep this fraction of a file's bytes."""
    os.truncate(path, int(fraction * path.stat().st_size))


def flip_bit(path: Path) -> None:
    """Change a character in the middle of a file's first line."""
    content = bytearray(path.read_bytes())
    content[content.index(b"\n") // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def unfinished(tmp_path, undisturbed) -> Path:
    """A copy of the undisturbed run, as it was after its last step."""
    shutil.copytree(undisturbed[0].parent, tmp_path / "runs")
    run = tmp_path / "runs" / "x"
    (run / "report.json").unlink()
    (run / "curves.png").unlink()
    shutil.rmtree(run / "model")
    return run


def base_weights(run: Path) -> Path:
    """The weights of the tiny model from which the run started."""
    [path] = run.parent.glob("base-*/model.safetensors")
    return path


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda run: truncate(run / "checkpoint.safetensors"), "checkpoint.safetensors is damaged"),
        (lambda run: truncate(run / "checkpoint.safetensors", 0), "safetensors is damaged"),
        (lambda run: truncate(run / "config.json"), "config.json is not valid JSON"),
        (lambda run: flip_bit(run / "failures.jsonl"), "failures.jsonl, line 1: "),
        (lambda run: flip_bit(run / "vanilla.jsonl"), "vanilla.jsonl, line 1: "),
        (lambda run: truncate(base_weights(run), 0), "is damaged"),
        (lambda run: truncate(base_weights(run)), "is damaged"),
    ],
)
def test_a_damaged_file_ends_in_one_line(tmp_path, runner, unfinished, damage, message):
    damage(unfinished)
    assert message in runner.fail(tmp_path, RESUME)


def test_incomplete_files_are_completed(tmp_path, runner, unfinished, undisturbed):
    """Files with an incomplete last line, and what was written of a checkpoint and a base model."""
    for name in ("failures.jsonl", "vanilla.jsonl", "trained.jsonl"):
        truncate(unfinished / name, 0.9)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (unfinished / name).open("a") as file:
            file.write('{"step": 4, "')
    (unfinished / "checkpoint.safetensors.tmp").write_bytes(b"half a checkpoint")
    weights = base_weights(unfinished)
    weights.rename(weights.with_name("model.safetensors.tmp"))
    runner.succeed(tmp_path, RESUME)
    assert_same_files(unfinished, undisturbed[0])


def test_a_file_in_place_of_the_folder_ends_in_one_line(tmp_path, runner):
    (tmp_path / "runs").write_text("")
    assert "runs" in runner.fail(tmp_path, FLAGS)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--failures nowhere.jsonl", "--failures nowhere.jsonl: there is no such file"),
        ("--temperature 0", "nothing to compare"),
        ("--data incomplete.jsonl", "the tiny model supports only its own Countdown"),
        ("--task apigen", "the tiny model supports only its own Countdown"),
        ("--device banana", "--device banana is not available here"),
        ("--group-size 1", "--group-size 1: must be at least 2"),
    ],
)
def test_flags_are_refused_before_a_model_is_made(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["r3.py"])
    monkeypatch.setattr(r3, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(r3, "make_tiny_model", lambda *_: pytest.fail("a model was made"))
    (tmp_path / "incomplete.jsonl").write_text('{"problem": {"id": 1, "num')
    with pytest.raises(SystemExit, match=message) as stop:
        r3.main(["train", *flags.split()])
    assert "\n" not in stop.value.code and not list((tmp_path / "runs").glob("*"))
