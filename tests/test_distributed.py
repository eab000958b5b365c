"""Several processes do what one process does: they sample the same conversations, and their weights
differ by rounding alone. This file is also the program that torchrun starts, see `program`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import few_threads, shrink_r3
from safetensors.torch import load_file

import grpo
import r3
from tasks import TinyCountdown, Verdict

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not torch.distributed.is_available(), reason="needs torchrun"
)

SEARCH = ["--max-new-tokens=16", "--num-problems=14", "--max-attempts=2", "--seed=1"]
EVALUATION = ["--limit=5", "--num-samples=2"]
# With several updates between two checkpoints, a run that was killed has logs that must be cut. The
# KV cache is so small that every process needs several batches.
TRAINING = [
    "--steps=4", "--batch-size=5", "--group-size=3", "--save-every=2", "--lr=1e-3", "--warmup=0",
    "--cache-tokens=600", "--curve=2", "--beta=0", "--keep-checkpoint",
]  # fmt: skip
TRAIN = ["train", *SEARCH, *EVALUATION, *TRAINING]
FILES = ["failures.jsonl", "vanilla.jsonl", "samples.jsonl", "trained.jsonl", "report.json"]


# -- The program that torchrun starts --------------------------------------------------------------
def verdict_by_chance(self, problem, completion):
    """A verdict that depends on the text alone."""
    return Verdict(sum(completion.encode()) % 3 == 0, "by chance")


def note(name: str) -> None:
    """Append this process's rank to a file in the working directory."""
    with open(name, "a") as file:
        file.write(os.environ.get("RANK", "0"))


def prepare(patch: pytest.MonkeyPatch) -> None:
    """Make runs quick."""
    shrink_r3(patch)
    patch.setattr(TinyCountdown, "verify", verdict_by_chance)
    patch.setattr(r3, "plot_command", lambda folders: note("plotted"))  # takes a second


def fail_in_one_process(patch: pytest.MonkeyPatch, fault: str, rank: int) -> None:
    """Let the process with this rank fail in its third update: "killed", for example."""
    num_updates = 0
    update = grpo.MasterAdamW.update

    def failing_update(optimizer, *arguments):
        nonlocal num_updates
        num_updates += 1
        if num_updates == 3 and fault == "all killed":  # torchrun first, so that it ends nobody
            os.kill(os.getppid(), signal.SIGKILL) if rank == 0 else time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        if num_updates == 3 and rank == 1:
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "error":
                raise ValueError("this is wrong")
            if fault == "out of memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            if fault == "nan":
                # It may have no gradients yet, if no group of its share had mixed rewards.
                weight = optimizer.weights[0]
                weight.grad = torch.full_like(weight, float("nan"))
        return update(optimizer, *arguments)

    patch.setattr(grpo.MasterAdamW, "update", failing_update)


def run_out_of_memory(patch: pytest.MonkeyPatch) -> None:
    """Let this process run out of memory whenever it samples for more than one failure at a time,
    and note it."""
    sample_reflections = grpo.sample_reflections

    def sample(agent, failures, *arguments):
        if len(failures) > 1:
            note("out of memory")
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample_reflections(agent, failures, *arguments)

    patch.setattr(grpo, "sample_reflections", sample)


def program() -> None:
    """r3.py with a small tiny model, and with the fault that a variable names."""
    with pytest.MonkeyPatch.context() as patch, few_threads():
        prepare(patch)
        fault, rank = os.environ.get("FAULT", ""), int(os.environ["RANK"])
        if fault == "small memory" and rank == 1:
            run_out_of_memory(patch)
        elif fault:
            fail_in_one_process(patch, fault, rank)
        r3.main()


# -- Running it ------------------------------------------------------------------------------------
@pytest.fixture
def one(tmp_path, monkeypatch):
    """A function that runs a command in this process, in the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["r3.py"])
    prepare(monkeypatch)
    return lambda *flags: r3.main([*flags])


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """The folder of a training run in this process, with which runs of others are compared."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch, few_threads():
        patch.chdir(folder)
        prepare(patch)
        r3.main([*TRAIN, "--name=one"])
    return folder / "runs" / "one"


def environment_of(fault: str) -> dict[str, str]:
    """The environment variables of processes with this fault."""
    # The processes talk through the loopback interface, even if there is a network.
    interfaces = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return {
        "OMP_NUM_THREADS": "1", "FAULT": fault, "PYTHONPATH": str(Path(r3.__file__).parent),
        "GLOO_SOCKET_IFNAME": interfaces[0],
    }  # fmt: skip


def torchrun(num_processes: int, *flags: str) -> list[str]:
    """The command that runs this program in several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*command, f"--nproc-per-node={num_processes}", __file__, *flags]


def several(num_processes: int, *flags: str, fault: str = "") -> subprocess.CompletedProcess:
    """Run a command in several processes, in the working directory of the test."""
    environment = {**os.environ, **environment_of(fault)}
    command = torchrun(num_processes, *flags)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def succeed(num_processes: int, *flags: str, fault: str = "") -> str:
    """The same, for a command that succeeds. Returns what it has printed."""
    completed = several(num_processes, *flags, fault=fault)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


# The program of a process that takes the place of one that torchrun starts (see `forks` in
# conftest.py). Its variables are the arguments of `fork_several`.
FORK = """
import os, runpy, sys
os.environ |= environment
for descriptor, name in ((1, "stdout"), (2, "stderr")):
    path = f"{name} of rank {environment['RANK']}"
    os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
sys.path[:0] = paths
sys.argv = [script, *flags]
runpy.run_path(script, run_name="__main__")
"""


def fork_several(forks, num_processes: int, *flags: str, fault: str = "") -> str:
    """The same as `succeed` without torchrun, whose processes take seconds to import torch. Returns
    what the first process has printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = environment_of(fault) | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "TORCHELASTIC_RUN_ID": "none",
        "WORLD_SIZE": f"{num_processes}", "LOCAL_WORLD_SIZE": f"{num_processes}",
    }  # fmt: skip
    processes = []
    for rank in range(num_processes):
        own = {**environment, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
        variables = {"environment": own, "flags": flags, "script": __file__}
        variables["paths"] = [environment["PYTHONPATH"], str(Path(__file__).parent)]
        processes.append(forks.Process(target=exec, args=(FORK, variables)))
        processes[-1].start()
    for process in processes:
        process.join(300)
        process.kill()  # if it is still running
        assert process.exitcode == 0, Path("stderr of rank 0").read_text()
    return Path("stdout of rank 0").read_text()


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_run(a: Path, b: Path) -> None:
    """Two runs have the same conversations, metrics and weights."""
    assert {path.name for path in a.iterdir()} == {path.name for path in b.iterdir()}
    for file in FILES:
        assert (a / file).read_text() == (b / file).read_text(), file
    for expected, metrics in zip(
        read_lines(a / "metrics.jsonl"), read_lines(b / "metrics.jsonl"), strict=True
    ):
        # Before the first of several updates, the mismatch is a rounding error.
        tolerance = {key: 1e-4 if key == "mismatch" else 1e-6 for key in expected}
        assert metrics == {
            key: pytest.approx(value, rel=1e-3, abs=tolerance[key])
            for key, value in expected.items()
        }
    weights, other = (load_file(run / "model" / "model.safetensors") for run in (a, b))
    assert weights.keys() == other.keys()
    for key, weight in weights.items():
        assert (other[key] - weight).abs().max() <= 1e-4 * weight.abs().max(), key
    [base] = a.parent.glob("base-*")
    before = load_file(base / "model.safetensors")
    largest_change = max((weights[key] - before[key]).abs().max() for key in weights)
    assert largest_change > 1e-3  # The comparison of the weights has compared something.


# -- Tests -----------------------------------------------------------------------------------------
def test_two_processes_do_what_one_does(forks, one, reference):
    """Although one of them has less memory than the other. Without a KL penalty, a process has no
    gradient if the rewards are equal in each of its groups; this happens in some of the steps."""
    output = fork_several(forks, 2, *TRAIN, "--name=two", fault="small memory")
    assert output.count("step 4/4") == output.count("The results are in") == 1
    assert Path("plotted").read_text() == "0"  # by the first process alone
    assert set(Path("out of memory").read_text()) == {"1"}
    assert_same_run(reference, Path("runs/two"))
    samples = read_lines(reference / "samples.jsonl")
    has_gradient = set()
    for step in range(1, 5):
        rows = [record["advantage"] != 0 for record in samples if record["step"] == step]
        mixed = [any(rows[i : i + 3]) for i in range(0, len(rows), 3)]  # of each group
        has_gradient.add((any(mixed[0::2]), any(mixed[1::2])))  # of the two processes
    assert (True, True) in has_gradient
    assert has_gradient & {(True, False), (False, True)}


def test_a_killed_process_ends_all_and_the_run_resumes(one, reference):
    start = time.time()
    killed = several(2, *TRAIN, "--name=two", fault="killed")
    assert killed.returncode and time.time() - start < 60
    assert "Signal 9 (SIGKILL)" in killed.stderr
    assert len(read_lines(Path("runs/two/metrics.jsonl"))) == 3  # steps 0, 1 and 2
    one("train", "--resume", "runs/two")
    assert_same_run(reference, Path("runs/two"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, before, after",
    [("killed", 2, 3), ("all killed", 1, 3), ("all killed", 2, 1), ("all killed", 3, 2)],
)
def test_a_run_resumes_with_any_number_of_processes(one, reference, fault, before, after):
    assert several(before, *TRAIN, "--name=x", fault=fault).returncode
    time.sleep(2)  # until the last process is dead
    succeed(after, "train", "--resume", "runs/x")
    assert_same_run(reference, Path("runs/x"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--beta=0.1"],
        ["--batch-size=2"],  # The third process has nothing to do.
        ["--offload"],
        ["--checkpointing", "--updates=2"],
        ["--lora-rank=4", "--lr=1e-2", "--beta=0.1"],
        ["--lora-rank=4", "--lr=1e-2", "--offload", "--checkpointing"],
    ],
    ids=" ".join,
)
def test_three_processes_with_options(one, flags):
    succeed(3, *TRAIN, *flags, "--name=three")
    one(*TRAIN, *flags, "--name=one")
    assert_same_run(Path("runs/one"), Path("runs/three"))


@pytest.mark.slow
def test_search_and_evaluation_write_the_same_files(one):
    for command, flags, file in (
        ("failures", SEARCH, "failures.jsonl"),
        ("eval", [*EVALUATION, "--max-new-tokens=16"], "conversations.jsonl"),
    ):
        small_cache = "--cache-tokens=200"
        succeed(3, command, *flags, small_cache, f"--name={command}-three")
        one(command, *flags, f"--name={command}-one")
        a, b = (Path("runs", f"{command}-{name}", file) for name in ("one", "three"))
        assert len(read_lines(a)) > 5 and a.read_bytes() == b.read_bytes()


@pytest.mark.slow
def test_failures_of_another_run_and_a_name_made_from_the_time(one, reference):
    flags = [*TRAIN, f"--failures={reference / 'failures.jsonl'}"]
    output = succeed(2, *flags)
    [folder] = Path("runs").glob("train-*")
    assert f"The results are in {folder}" in output
    assert_same_run(reference, folder)


@pytest.mark.parametrize(("has_gpu", "backend"), [(False, "gloo"), (True, "cpu:gloo,cuda:nccl")])
def test_tensors_of_the_cpu_can_be_sent_on_a_machine_with_gpus(monkeypatch, has_gpu, backend):
    """Conversations and offloaded gradients are on the CPU."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, timeout: calls.append(backend)
    )
    with grpo.join_processes():
        assert calls == [backend]


@pytest.mark.slow
def test_ctrl_c_is_reported_in_one_line(one, reference):
    """torchrun passes the signal on to all processes."""
    command = torchrun(2, *TRAIN, "--name=two", "--steps=400")
    environment = {**os.environ, **environment_of("")}
    metrics = Path("runs/two/metrics.jsonl")
    start = time.time()
    with open("errors", "w") as errors, subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
    ) as processes:  # fmt: skip
        while not metrics.exists() or len(read_lines(metrics)) < 3:
            assert processes.poll() is None and time.time() - start < 120, "training has not begun"
            time.sleep(0.1)
        os.killpg(processes.pid, signal.SIGINT)
        assert processes.wait(60)
    lines = [
        line for line in Path("errors").read_text().splitlines() if "test_distributed.py" in line
    ]
    hint = f"to resume: torchrun --nproc-per-node 2 {__file__} train --resume runs/two"
    assert lines == [f"test_distributed.py: interrupted; {hint}"]


@pytest.mark.slow
def test_an_error_is_reported_in_one_line(one):
    def error_lines(*flags: str, fault: str = "") -> list[str]:
        failed = several(2, *flags, fault=fault)
        assert failed.returncode and "[rank" not in failed.stderr  # no traceback of a process
        lines = failed.stderr.splitlines()
        return [line for line in lines if line.startswith("test_distributed.py: ")]

    # An error in one process
    resume = f"torchrun --nproc-per-node 2 {__file__} train --resume runs/x"
    assert error_lines(*TRAIN, "--name=x", fault="error") == ["test_distributed.py: this is wrong"]
    [line] = error_lines(*TRAIN, "--name=y", fault="out of memory")
    assert line.endswith("train --resume runs/y --checkpointing")
    # The same error in all of them
    [line] = error_lines(*TRAIN, "--name=x")
    assert line.endswith(f"runs/x exists: choose another --name, or resume it: {resume}")
    [line] = error_lines(*TRAIN, "--name=z", fault="nan")
    assert "the gradient is not finite; to start again" in line
    [line] = error_lines("eval", "--model", "none/none")
    assert "none/none" in line


if __name__ == "__main__":
    program()
