"""Variants of R3 beside each other: the tiny model, a few seeds, one table.

    python tests/variants.py [--seeds 0 1 2] [--jobs 2]

A variant is a row of README's table: flags, and perhaps one of README's diffs, which is applied to
a copy of the code. Every run of a seed starts from the same base model and the same failures, so
that rows differ in the variant alone. It takes about two minutes a run and a process; runs that
are there already are not made again. Nothing here is a test; test_readme.py applies the diffs.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from bench import table

ROOT = Path(__file__).resolve().parents[1]
FILES = ("r3.py", "grpo.py", "model.py", "tasks.py")

# What is compared: a name, flags, and the title of a diff in README.
COMPARED = [
    ("reflection: the paper's R3", "", None),
    ("retry", "--train-on retry", None),
    ("reflection and retry", "--train-on both", None),
    ("attempt: plain GRPO on the answer", "--train-on attempt --group 16 --steps 20", None),
    ("no division by the deviation, no length bias", "--no-std --loss dr_grpo", None),
    ("no KL", "--beta 0", None),
    ("two updates per batch", "--steps 36 --save-every 2", "several updates per batch"),
]


def diffs(readme: str) -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """README's diffs: {title: (file, [(old text, new text), …])}.

    A diff's first line is `--- FILE: title`, and `@@` parts its hunks.
    """
    found = {}
    for block in re.findall(r"```diff\n--- (.*?)```", readme, re.DOTALL):
        head, _, body = block.partition("\n")
        file, _, title = head.partition(": ")
        hunks = []
        for hunk in re.split(r"^@@\n", body, flags=re.MULTILINE):
            lines = [(line[:1], line[1:]) for line in hunk.splitlines()]
            old, new = (
                "".join(text + "\n" for mark, text in lines if mark != other) for other in "+-"
            )
            hunks.append((old, new))
        found[title] = file, hunks
    return found


def code(folder: Path, title: str | None) -> None:
    """A copy of the code in a folder, with a diff of README applied to it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    if title:
        file, hunks = diffs((ROOT / "README.md").read_text())[title]
        text = (folder / file).read_text()
        for old, new in hunks:
            if text.count(old) != 1:
                sys.exit(f"{title}: these lines are not once in {file}:\n{old}")
            text = text.replace(old, new)
        (folder / file).write_text(text)


def train(folder: Path, seed: int, flags: str, title: str | None, name: str) -> Path:
    """A run's folder; the base and the failures of the seed are those of `runs/seed-S`."""
    run = folder / "runs" / f"{name}-{seed}"
    if not (run / "report.json").exists():
        copy = folder / "code" / run.name
        code(copy, title)
        shutil.rmtree(run, ignore_errors=True)
        command = [
            sys.executable,
            str(copy / "r3.py"),
            "train",
            "--seed",
            str(seed),
            *flags.split(),
        ]
        given = folder / "runs" / f"seed-{seed}" / "failures.jsonl"
        command += ["--name", run.name, *(["--failures", str(given)] if given.exists() else [])]
        with open(folder / f"{run.name}.log", "w") as log:
            one = {**os.environ, "OMP_NUM_THREADS": "1"}  # small matrices: a run a core is faster
            done = subprocess.run(command, cwd=folder, stdout=log, stderr=log, env=one)
        if done.returncode:
            sys.exit(f"{run.name} failed: see {folder / run.name}.log")
    return run


def found(runs: list[Path]) -> tuple[dict[str, np.ndarray], float]:
    """What the runs of a variant gained over the vanilla model, in points, seed by seed; and how
    many million tokens they sampled in training, on average."""
    gains, tokens = {"1st try": [], "within two": []}, []
    for run in runs:
        tables = json.loads((run / "report.json").read_text())["tables"]
        sampled = next(t for title, t in tables.items() if "temperature 1" in title)
        for column, values in gains.items():
            values.append(100 * sampled["gain"][column][0])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").open()][1:]
        batches = {(line["sampled"], line["length"], line["reward"]) for line in lines}
        tokens.append(sum(sampled for sampled, *_ in batches) / 1e6)  # each batch once
    return {name: np.array(values) for name, values in gains.items()}, float(np.mean(tokens))


def row(gains: dict[str, np.ndarray], tokens: float, paper: dict[str, np.ndarray]) -> list[str]:
    """Each gain: mean (seed by seed), and how far it is from the paper's, with a 95% interval."""
    cells = []
    for name, values in gains.items():
        cells.append(f"{values.mean():+.1f} ({', '.join(f'{value:+.1f}' for value in values)})")
        apart, n = values - paper[name], len(values)
        t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(n, np.nan)  # Student's, n - 1 degrees
        half = t * np.std(apart, ddof=1) / n**0.5 if n > 1 else np.nan
        cells.append(f"{apart.mean():+.1f} ± {half:.1f}" if apart.any() else "")
    return [*cells, f"{tokens:.2f}"]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/variants"))
    return parser


def main() -> None:
    args = parser().parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        # First the paper's: the others take its failures.
        list(pool.map(lambda seed: train(folder, seed, "", None, "seed"), args.seeds))
        made = []
        for number, (name, flags, title) in enumerate(COMPARED):
            label = "seed" if number == 0 else re.sub(r"\W+", "-", name)
            for seed in args.seeds:
                made.append((name, pool.submit(train, folder, seed, flags, title, label)))
        runs = {}
        for name, run in made:
            runs.setdefault(name, []).append(run.result())
    each = {name: found(of) for name, of in runs.items()}
    paper, _ = next(iter(each.values()))
    head = ["trained", "gain, 1st try", "apart", "gain, within two", "apart", "M tokens"]
    rows = [head, *([name, *row(*what, paper)] for name, what in each.items())]
    table("Points over the vanilla model; apart: from the paper's, mean ± 95% over seeds", rows)


if __name__ == "__main__":
    main()
