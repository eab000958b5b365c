"""Kills, faults and several processes: what a run survives, and how it ends where it cannot.

The long forms are behind `pytest -m slow`.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import model as models
import r3

ROOT = Path(r3.__file__).parent
DRIVER = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import grpo, r3
from tasks import Verdict

r3.COLD["steps"], r3.HELD_OUT = 40, (5, 2)

def verify(speaker, problem, turn):
    right = sum(turn) % 3 == 0
    return Verdict(right, "right" if right else "wrong_value")

r3.Speaker.verify = verify
sample_batch = r3.sample_batch
if "DIE" in os.environ:
    def dies(speaker, failures, args, step, *rest):
        if grpo.rank()[0] == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return sample_batch(speaker, failures, args, step, *rest)
    r3.sample_batch = dies
r3.main()
"""
FLAGS = [
    *("train", "--steps", "4", "--batch", "6", "--group", "3", "--limit", "8", "--samples", "2"),
    *("--responses", "2", "--problems", "40", "--max-new-tokens", "24", "--lr", "1e-4"),
    *("--cache-tokens", "2000", "--micro-tokens", "300", "--name", "x"),
]
SAME = ("metrics.jsonl", "samples.jsonl", "failures.jsonl", "report.json")


def start(folder: Path, flags: list[str], processes: int = 0, **environment):
    folder.mkdir(exist_ok=True)
    (folder / "driver.py").write_text(DRIVER)
    command = [sys.executable]
    if processes:
        port = 20_000 + random.SystemRandom().randrange(20_000)
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--master-port", str(port)]
    return subprocess.Popen(
        [*command, "driver.py", *flags],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(folder: Path, flags: list[str], processes: int = 0, **environment) -> str:
    process = start(folder, flags, processes, **environment)
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    begun = time.time()
    finish(folder, [*FLAGS, "--controls"])
    return folder / "runs" / "x", time.time() - begun


def same(run: Path, whole: Path) -> None:
    for name in (*SAME, "model/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def killed_and_resumed(folder: Path, whole, after: float, number=signal.SIGKILL) -> str:
    process = start(folder, [*FLAGS, "--controls"])
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    said = process.communicate()[1]
    run = folder / "runs" / "x"
    if not (run / "config.json").exists():  # it had not even begun
        finish(folder, [*FLAGS, "--controls"])
    elif not (run / "report.json").exists():
        finish(folder, ["train", "--resume", "runs/x"])
    same(run, whole[0])
    return said


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, whole):
    killed_and_resumed(tmp_path / "a", whole, 0.6 * whole[1])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(tmp_path, whole, number):
    after = random.SystemRandom().uniform(1.5, whole[1])
    print(f"killed after {after:.2f} of {whole[1]:.2f} s")
    killed_and_resumed(tmp_path / "a", whole, after)


SLOW = pytest.param(signal.SIGTERM, marks=pytest.mark.slow)


@pytest.mark.parametrize("number", [signal.SIGINT, SLOW])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, whole, number):
    said = killed_and_resumed(tmp_path / "a", whole, 0.6 * whole[1], number)
    assert "go on with: r3.py train --resume runs/x" in said and "Traceback" not in said


def as_one_process(run: Path, whole: Path) -> None:
    """The same samples, and after them the same weights to 1e-5."""
    for name in ("samples.jsonl", "failures.jsonl"):
        assert (run / name).read_text() == (whole / name).read_text()
    ours, one = (load_file(path / "model" / "model.safetensors") for path in (run, whole))
    for name in one:
        assert torch.allclose(ours[name], one[name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize("before, after", [(2, 0), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_a_process_dies_and_another_number_goes_on(tmp_path, whole, before, after):
    """The run ends with an error within seconds; 6 failures and 3 processes: uneven shares."""
    process = start(tmp_path, FLAGS, before, DIE="1")
    metrics = tmp_path / "runs" / "x" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") == 3):  # it dies in step 3
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    begun = time.time()
    said = process.communicate()[1]
    assert time.time() - begun < 20 and process.returncode != 0
    assert "another process of this run has died" in said
    finish(tmp_path, ["train", "--resume", "runs/x"], after)
    as_one_process(tmp_path / "runs" / "x", whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_several_processes_do_what_one_does(tmp_path, whole, number):
    out = finish(tmp_path, FLAGS, number)
    assert out.count("within two") == 2  # two tables, printed once
    as_one_process(tmp_path / "runs" / "x", whole[0])
    for line in (tmp_path / "runs" / "x" / "metrics.jsonl").read_text().splitlines():
        assert "skipped" not in line or '"skipped": 0' in line


@pytest.mark.slow
def test_several_processes_stop_together(tmp_path, whole):
    process = start(tmp_path, FLAGS, 2)
    metrics = tmp_path / "runs" / "x" / "metrics.jsonl"
    while not metrics.exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert "go on with: r3.py train --resume runs/x" in said
    finish(tmp_path, ["train", "--resume", "runs/x"], 3)
    as_one_process(tmp_path / "runs" / "x", whole[0])


def limited(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [100, 20_000, 2_000_000])
def test_a_full_disk_ends_in_one_line(tmp_path, whole, size):
    (tmp_path / "driver.py").write_text(DRIVER)
    shutil.copytree(next(whole[0].parent.glob("base-*")), tmp_path / "runs" / next(
        whole[0].parent.glob("base-*")).name)  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "driver.py", *FLAGS], cwd=tmp_path, capture_output=True, text=True,
        preexec_fn=lambda: limited(size),
    )  # fmt: skip
    last = ran.stderr.strip().splitlines()[-1]
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    assert last.startswith("r3.py: ") and "File too large" in last, ran.stderr[-500:]
    if (tmp_path / "runs" / "x" / "config.json").exists():
        finish(tmp_path, ["train", "--resume", "runs/x"])
        for name in SAME[:3]:
            assert (tmp_path / "runs" / "x" / name).read_bytes() == (whole[0] / name).read_bytes()


def damaged(change):
    def prepare(folder: Path) -> list[str]:
        change(folder / "runs" / "x")
        return ["train", "--resume", "runs/x"]

    return prepare


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda run: flip(next((run / "checkpoints/step-4").glob("*.safetensors"))), "is damaged"),
        (lambda run: cut(run / "config.json"), "config.json is not JSON"),
        (lambda run: cut(run / "metrics.jsonl"), "metrics.jsonl is shorter"),
        (lambda run: flip(run / "measured" / "failures.jsonl"), "failures.jsonl is damaged"),
        (lambda run: [cut(f, 0) for f in run.parent.glob("base*/*.safetensors")], "is damaged"),
        (lambda run: [cut(f) for f in run.parent.glob("base*/*.safetensors")], "is damaged"),
        (lambda run: [cut(f, 0.9) for f in (run / "measured").iterdir()], ""),
    ],
)
def test_damaged_files_end_in_one_line_or_are_mended(tmp_path, whole, change, message):
    shutil.copytree(whole[0].parent, tmp_path / "runs")
    run = tmp_path / "runs" / "x"
    for name in ("report.json", "model", "curves.png"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    change(run)
    process = start(tmp_path, ["train", "--resume", "runs/x"])
    _, said = process.communicate()
    assert "Traceback" not in said, said[-2000:]
    if process.returncode:
        last = said.strip().splitlines()[-1]
        assert last.startswith("r3.py: ") and message and message in last
    else:
        same(run, whole[0])
        assert not message


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "runs").write_text("")
    process = start(tmp_path, FLAGS)
    said = process.communicate()[1]
    assert process.returncode == 1 and "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("r3.py: ") and "runs" in said


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--failures nowhere.jsonl", "no such file"),
        ("--failures torn.jsonl", "torn.jsonl, line 1 is no failure"),
        ("--max-new-tokens 300", "lower --max-new-tokens"),
        ("--temperature 0", "nothing to compare"),
        ("--data driver.py", "the tiny model plays its own small game"),
        ("--device banana", "no such device"),
    ],
)
def test_flags_are_refused_before_any_weight(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(r3, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(r3, "load_weights", lambda *_: pytest.fail("weights were loaded"))
    (tmp_path / "driver.py").write_text("")
    (tmp_path / "torn.jsonl").write_text('{"problem": {"id": 1, "num')
    with pytest.raises(SystemExit, match=message):
        r3.main(["train", *flags.split()])
    assert not (tmp_path / "runs").exists()


MEASURED = f"""
import itertools, sys
sys.path.insert(0, {str(ROOT)!r})
import r3, tasks, matplotlib.figure

def status(name):  # not getrusage, which begins with what the parent process took
    return [int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)][0]

before = status("VmRSS")
said = itertools.count()
r3.Speaker.verify = lambda *_: tasks.Verdict(next(said) % 3 == 2, "x")  # two failures first
r3.HELD_OUT = (2, 1)
r3.main(sys.argv[1:])
print("PEAK", (status("VmHWM") - before) * 1024)
"""


def shape(folder: Path, **config) -> None:
    """A folder of random weights of a given shape, with the tests' tokenizer."""
    torch.manual_seed(0)
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", max_position_embeddings=4096,
        tie_word_embeddings=True, **config,
    )  # fmt: skip
    models.Model(config).save_pretrained(folder)


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "configs").glob("*b.json")))
def test_what_fits_where_is_what_the_plan_computes(folder, path, capsys):
    """README's table, for the shapes of the paper's models (no weights are needed for it)."""
    shutil.copy(path, folder / "config.json")
    flags = ["train", "--dry-run", "--model", str(folder), "--device", "cuda", "--dtype"]
    flags += ["bfloat16", "--checkpointing", "--limit", "4", "--problems", "4"]
    cells = []
    for more in ([], ["--offload"], ["--offload", "--beta", "0"]):
        r3.main([*flags, *more])
        lines = capsys.readouterr().out.splitlines()
        row = next(line for line in lines if line.startswith("| the most at a time"))
        cells += [f"{float(cell):.0f}" for cell in row.split("|")[2:4]]
    readme = (ROOT / "README.md").read_text()
    a, _, b, c, d, _ = cells
    assert f"| {path.stem} | {a} | {b} + {c} | {d} + {cells[5]} |" in readme


HUNDRED = dict(vocab_size=30_000, hidden_size=640, intermediate_size=1_920, num_hidden_layers=17,
               num_attention_heads=10, num_key_value_heads=5)  # fmt: skip


THIRTY = dict(vocab_size=12_000, hidden_size=448, intermediate_size=1_344, num_hidden_layers=11,
              num_attention_heads=7, num_key_value_heads=7)  # fmt: skip
PLANS = [(HUNDRED, []), (HUNDRED, ["--checkpointing"]), (HUNDRED, ["--beta", "0"]), (THIRTY, [])]


@pytest.mark.slow
@pytest.mark.parametrize("model, more", PLANS)
def test_the_memory_of_a_run_is_as_the_plan_says(folder, tmp_path, model, more):
    shape(folder, **model)
    flags = ["train", "--model", str(folder), "--steps", "2", "--batch", "2", "--group", "8"]
    flags += ["--limit", "2", "--problems", "2", "--max-new-tokens", "100", "--responses", "1"]
    flags += ["--cache-tokens", "9000", "--name", "m", *more]
    runs = [
        subprocess.run(
            [sys.executable, "-c", MEASURED, *flags, *last],
            cwd=tmp_path, capture_output=True, text=True,
        )
        for last in (["--dry-run"], [])
    ]  # fmt: skip
    assert not any(ran.returncode for ran in runs), [ran.stderr[-2000:] for ran in runs]
    row = next(line for line in runs[0].stdout.splitlines() if "the most at a time" in line)
    estimate = 1e9 * float(row.split("|")[2])
    peak = int(runs[1].stdout.split("PEAK")[1])
    print(f"estimated {estimate / 1e9:.2f} GB, measured {peak / 1e9:.2f} GB")
    assert abs(estimate / peak - 1) < 0.15, (estimate, peak)
    assert int(runs[0].stdout.split("PEAK")[1]) < 0.1 * peak  # no weights were loaded


def test_the_plan(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(r3, "load_weights", lambda *_: pytest.fail("weights were loaded"))
    before = sorted(tmp_path.rglob("*"))
    for flags in (["--model", str(folder)], [], ["--offload", "--dtype", "bfloat16"]):
        r3.main(["train", "--dry-run", "--problems", "20", "--limit", "5", *flags])
        printed = capsys.readouterr().out
        for word in ("parameters", "samples on", "Memory", "moments", "checkpoints"):
            assert word in printed
    assert sorted(tmp_path.rglob("*")) == before
