"""Reflect, Retry, Reward: the experiment around the method, and the command line.

    python r3.py train      evaluate a model, train it by R3 on its failures, evaluate it again
    python r3.py failures   collect a dataset of failures, for train --failures
    python r3.py eval       the first try and within two tries, with intervals
    python r3.py play       type a problem, and watch a model attempt, reflect and retry
    python r3.py show       read what was sampled, rewarded and trained
    python r3.py plot       draw the curves of one run or several

The method itself is in grpo.py. This file reads from top to bottom: the settings, the cold start of
the tiny model, failures and evaluation, tables and pictures, the commands, the command line.
"""

import argparse
import copy
import datetime
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import textwrap
import time
import typing
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import grpo
import model as models
from grpo import (
    Chat,
    Conversation,
    Tries,
    append_jsonl,
    attempt,
    batches,
    first_tries,
    rollout,
    setting,
)
from model import Model, Tokenizer
from tasks import TASKS, TinyCountdown

RUNS = Path("runs")

# -- Settings --------------------------------------------------------------------------------------

MOST, ALL = "train failures eval", "train failures eval play"  # commands


@dataclass
class Config(grpo.Config):
    """Every setting of a run, by name. The command line is made from it."""

    model: str = setting("tiny", "a Hugging Face folder or hub id; tiny: made here", commands=ALL)
    task: str = setting("countdown", "what to solve", choices=TASKS, commands=ALL)
    data: str | None = setting(None, "problems: JSON, JSONL, parquet or a hub id", commands=MOST)
    split: str | None = setting(None, "evaluate on: dev, test, train, all", commands="train eval")
    limit: int | None = setting(
        None, "evaluate on at most so many problems", 2, commands="train eval"
    )
    samples: int = setting(1, "first tries at each problem", 1, commands="train eval")
    problems: int | None = setting(
        None, "look for failures among so many problems", 1, commands=MOST
    )
    responses: int = setting(
        64, "at most so many tries at each of them", 1, commands="train failures"
    )
    failures: str | None = setting(None, "train on this failures.jsonl of another run")
    temperature: float = setting(1.0, "of sampling; 0 is greedy", 0, commands=ALL)
    max_new_tokens: int = setting(512, "the longest turn", 1, commands=ALL)
    seed: int = setting(0, "of all random numbers", 0, commands=ALL)
    device: str = setting("cpu", "cpu, cuda or mps", commands=ALL)
    dtype: str = setting("float32", "of the weights", choices=("float32", "bfloat16"), commands=ALL)
    cache_tokens: int | None = setting(None, "tokens in the KV cache at once", 1, commands=ALL)
    name: str | None = setting(None, "the run's folder in runs/", commands=MOST)
    date: str = field(default_factory=lambda: str(datetime.date.today()))  # that templates print

    def __post_init__(self):
        for f in fields(self):
            value, least = getattr(self, f.name), f.metadata.get("least")
            choices = f.metadata.get("choices")
            flag = f"--{f.name.replace('_', '-')} {value}"
            if value is not None and least is not None and not least <= value < math.inf:
                raise ValueError(f"{flag}: give a number from {least} on")
            if choices and value not in choices:
                raise ValueError(f"{flag}: choose from {', '.join(choices)}")


# Defaults for the tiny model, and for a checkpoint: the paper's values where it states them (it
# does not state the group size and the longest turn).
TINY = Config(
    steps=18, batch=32, lr=3e-4, save_every=1, samples=4, responses=4, max_new_tokens=134,
    cache_tokens=131_072,
)  # fmt: skip
PAPER = Config(
    steps=1_750, batch=256, lr=5e-7, save_every=25, samples=1, responses=64, max_new_tokens=512,
    device="cuda" if torch.cuda.is_available() else "cpu",
    dtype="bfloat16" if torch.cuda.is_available() else "float32",
)  # fmt: skip
HELD_OUT = (200, 2)  # problems behind a point of the curves, and tries at each


# -- The cold start: how the tiny model is made ----------------------------------------------------

COLD = {"steps": 2_800, "dialogues": 16, "diligent": 0.7, "lr": 4e-3, "betas": [0.9, 0.99]}
WINDOW = 8  # steps whose dialogues are drawn together


def base_model(task: TinyCountdown, seed: int) -> Path:
    """The folder of the tiny model of a seed, made if it is not there. Its name holds a hash of the
    recipe (numbers, architecture, dialogues), so that another recipe makes another folder."""
    problems = task.load(split="cold", seed=seed)
    said = [task.cold_dialogue(problems, random.Random(i), i % 2 > 0)[1] for i in range(200)]
    architecture = models.tiny(task.words(), seed)[0].config_dict
    recipe = json.dumps([COLD, WINDOW, architecture, task.words(), said])
    path = RUNS / f"base-seed{seed}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    if not (path / "model.safetensors").exists():
        model, tokenizer = cold_start(task, problems, seed)
        tokenizer.save_pretrained(path)
        model.save_pretrained(path)  # weights last: a folder that has them is complete
    return path


def cold_start(task: TinyCountdown, problems: list, seed: int) -> tuple[Model, Tokenizer]:
    """A tiny model trained from random weights on dialogues, by the cross-entropy of the
    assistant's tokens."""
    model, tokenizer = tiny_model(task, seed)
    adamw = torch.optim.AdamW(model.parameters(), betas=COLD["betas"], weight_decay=0, fused=True)
    with tqdm(range(COLD["steps"]), "cold start") as bar:
        for step in bar:
            if step % WINDOW == 0:
                diligent = step < COLD["diligent"] * COLD["steps"]
                drawn = dialogues(task, tokenizer, problems, f"cold {seed} {step}", diligent)
            ids, mask = drawn[step % WINDOW]  # (B, T) both; the assistant's tokens are trained
            hidden = model.hidden(ids)[:, :-1][mask[:, 1:]]  # (tokens, E)
            loss = F.cross_entropy(model.head(hidden), ids[:, 1:][mask[:, 1:]])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            [group] = adamw.param_groups
            group["lr"] = COLD["lr"] * grpo.lr_share(step, COLD["steps"], warmup=0.03)
            adamw.step()
            adamw.zero_grad()
            bar.set_postfix_str(f"nll {loss.item():.3f}", refresh=False)
            if grpo.STOP.is_set():
                raise grpo.Stopped
    return model, tokenizer


def tiny_model(task: TinyCountdown, seed: int) -> tuple[Model, Tokenizer]:
    """The tiny model before its cold start."""
    model, tokenizer = models.tiny(task.words(), seed)
    tokenizer.settings["texts"] = "tiny"  # it knows the short texts of TinyCountdown alone
    return model, tokenizer


def dialogues(task: TinyCountdown, tokenizer: Tokenizer, problems: list, key: str, diligent: bool):
    """What WINDOW steps of the cold start learn from: (ids, mask) each, padded on the right."""
    rng, rows, size = random.Random(key), [], COLD["dialogues"]
    for _ in range(size * WINDOW):
        problem, turns = task.cold_dialogue(problems, rng, diligent)
        ids, mask = tokenizer.prompt(*task.messages(problem)), []
        for turn, before in zip(turns, (None, task.reflect, task.again), strict=False):
            if before:
                ids = tokenizer.next_turn(ids, tokenizer.bridge(before))
            said = tokenizer.encode(turn) + tokenizer.stop_ids[:1]
            mask += [False] * (len(ids) - len(mask)) + [True] * len(said)
            ids += said
        rows.append((ids, mask))
    rows.sort(key=lambda row: len(row[0]))  # rows of about one length go together: less padding
    drawn = []
    for i in rng.sample(range(WINDOW), WINDOW):
        some = rows[i * size : (i + 1) * size]
        padded = torch.zeros(2, size, len(some[-1][0]), dtype=torch.long)
        for row, both in enumerate(some):
            padded[:, row, : len(both[0])] = torch.tensor(both)
        drawn.append((padded[0], padded[1].bool()))
    return drawn


# -- Failures and evaluation -----------------------------------------------------------------------


def find_failures(chat: Chat, problems: list, responses: int, path: Path) -> Tries:
    """A dataset of failures: the first wrong one of up to `responses` tries at each problem. The
    last try at each problem is kept in a file, as in `evaluate`."""
    found = {c.problem.id: c for c in kept_conversations(path, chat, problems)}
    todo = [problem for problem in problems if problem.id not in found]
    with tqdm(total=len(problems), initial=len(problems) - len(todo), desc="failures") as bar:
        for some in batches(chat, todo, 1, turns=1):
            last: dict[int, Conversation] = {}
            for number in range(responses):
                left = [p for p in some if p.id not in last or last[p.id].first.right]
                tries = first_tries(chat, left, 1, (grpo.COLLECT, 0), first=number)
                last |= {c.problem.id: c for c in tries}
            keep_conversations(path, list(last.values()), chat)
            found |= last
            bar.update(len(some))
    return [found[p.id] for p in problems if not found[p.id].first.right]


def evaluate(
    chat: Chat, problems: list, samples: int, title: str, path: Path | None = None
) -> Tries:
    """Attempt every problem `samples` times; reflect once on each failure, and retry once.

    With a path, conversations are added to this file, a batch at a time, and those that it has are
    not sampled again. Raises grpo.Stopped between two batches where the run is to stop.
    """
    kept = kept_conversations(path, chat, problems) if path else []
    found = {(c.problem.id, c.sample): c for c in kept}
    numbers = range(samples)
    todo = [p for p in problems if not all((p.id, s) in found for s in numbers)]
    with tqdm(total=len(problems), initial=len(problems) - len(todo), desc=title) as bar:
        for some in batches(chat, todo, samples, turns=1):
            tries = first_tries(chat, some, samples, (grpo.EVALUATE, 0))
            wrong = [c for c in tries if not c.first.right]
            second = rollout(chat, wrong, 1, (grpo.EVALUATE, 0))
            tries = [c for c in tries if c.first.right] + second
            found |= {(c.problem.id, c.sample): c for c in tries}
            bar.update(len(some))
            if path:
                keep_conversations(path, tries, chat)
    return [found[p.id, s] for p in problems for s in numbers]


def record(c: Conversation, chat: Chat) -> dict:
    """A conversation as JSON: as text for its readers, and as token ids for load_conversations."""
    ids = {"attempt": c.attempt, "reflection": c.reflection, "retry": c.retry}
    return {**grpo.as_text(c, chat.tokenizer), "ids": ids}


def keep_conversations(path: Path, tries: Tries, chat: Chat) -> None:
    """Add a line a conversation to a file. Raises grpo.Stopped where the run is to stop."""
    for c in tries:
        append_jsonl(path, record(c, chat))
    if grpo.STOP.is_set():
        raise grpo.Stopped


def kept_conversations(path: Path, chat: Chat, problems: list) -> Tries:
    """What keep_conversations kept. An unfinished last line is cut off. Raises ValueError for
    conversations about other problems."""
    if not path.exists():
        return []
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    tries = load_conversations(path, chat)
    known = {json.dumps(asdict(problem)) for problem in problems}
    if any(json.dumps(asdict(c.problem)) not in known for c in tries):
        raise ValueError(f"{path} is about other problems: --data has changed")
    return tries


def load_conversations(path: Path, chat: Chat) -> Tries:
    """The conversations in a file, judged again. Raises FileNotFoundError, or ValueError, with the
    line, for what is not a conversation about this task in this model's tokens."""
    tries = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            saved = json.loads(line)
            problem, ids = chat.task.problem(saved["problem"]), saved["ids"]
            tokens = [token for turn in ids.values() for token in turn]
            if not ids["attempt"] or not all(0 <= t < chat.model.vocab_size for t in tokens):
                raise ValueError("no token ids of this model's vocabulary")
            if max(map(len, ids.values())) > chat.max_new_tokens:
                raise ValueError("a turn longer than --max-new-tokens")
            prompt, first = chat.question(problem), chat.verify(problem, ids["attempt"])
            c = Conversation(problem, int(saved["sample"]), prompt, first=first, **ids)
            if c.retry:
                c.context = chat.context(c)
                c.second = chat.verify(problem, c.retry)
            # What would be written today must be what the file says.
            if saved != {**saved, **json.loads(json.dumps(record(c, chat)))}:
                raise ValueError("texts or verdicts do not match the token ids")
            tries.append(c)
        except (
            ValueError, KeyError, TypeError, OverflowError, AttributeError, RecursionError,
        ) as error:  # fmt: skip
            raise ValueError(f"{path}, line {number} does not fit this run: {error!r}") from None
    return tries


# -- Tables and pictures ---------------------------------------------------------------------------


def interval(values: np.ndarray, tries: Tries) -> list[float]:
    """[mean, low, high]: a 95% interval that is robust to several tries at one problem.

    Tries at one problem are not independent, so the variance of the mean is that of the residuals
    summed problem by problem (the cluster-robust one, normal approximation).
    """
    if not tries:
        return [math.nan] * 3
    _, cluster = np.unique([c.problem.id for c in tries], return_inverse=True)
    sums = np.bincount(cluster, weights=values - values.mean())
    n, mean = len(sums), float(values.mean())
    half = 1.96 * math.sqrt(n / max(1, n - 1) * (sums**2).sum()) / len(values)
    return [mean, mean - half, mean + half]


def wilson(values: np.ndarray) -> list[float]:
    """[share, low, high]: Wilson's 95% interval, for one try at each problem."""
    n, p, z = len(values), float(values.mean()), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return [p, max(0.0, low), min(1.0, high)]


def accuracy(**by_model: Tries) -> dict:
    """Rows of the paper's numbers, first try and within two, one per model; and the paired gain."""
    rows: dict[str, dict] = defaultdict(dict)
    for label in ("1st try", "within two"):
        right = {}
        for name, tries in by_model.items():
            verdicts = [c.first if label == "1st try" else c.second or c.first for c in tries]
            right[name] = np.array([verdict.right for verdict in verdicts], float)
            single = len({c.problem.id for c in tries}) == len(tries)
            rows[name][label] = wilson(right[name]) if single else interval(right[name], tries)
        if len(right) == 2:
            before, after = right.values()
            rows["gain"][label] = interval(after - before, tries)
    return rows


def reasons(**by_model: Tries) -> dict:
    """How often the verifier gave which reason."""
    columns = {}
    for name, tries in by_model.items():
        columns[f"{name}, 1st"] = Counter(c.first.reason for c in tries)
        columns[f"{name}, retry"] = Counter(c.second.reason for c in tries if c.second)
    kinds = sorted({kind for count in columns.values() for kind in count})
    return {kind: {name: count[kind] for name, count in columns.items()} for kind in kinds}


def markdown(tables: dict[str, dict]) -> str:
    """{title: {row: {column: [share, low, high] or a count}}} as Markdown tables, in per cent."""
    parts = []
    for title, rows in tables.items():
        columns = dict.fromkeys(column for row in rows.values() for column in row)
        cells = [["", *columns]]
        for name, row in rows.items():
            cells.append([name])
            for value in (row.get(column, "") for column in columns):
                if isinstance(value, list):
                    sign = "+" if name == "gain" else ""
                    value = "{} [{}, {}]".format(*(f"{100 * x:{sign}.1f}" for x in value))
                cells[-1].append(str(value))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
        lines.insert(1, "|-" + "-|-".join("-" * width for width in widths) + "-|")
        parts += [title, "", *lines, ""]
    return "\n".join(parts)


PANELS = {  # of the curves: what is drawn of metrics.jsonl, and its title
    "within two": "right within two tries, held out (95%)",
    "1st try": "right at the first try, held out (95%)",
    "reward": "mean reward",
    "length": "tokens in a reflection",
    "kl": "KL to the vanilla model, per token",
    "mixed_groups": "share of groups with mixed rewards",
}


def draw_curves(folders: list[Path], path: Path) -> None:
    """How training went, step by step, one colour per run. Raises FileNotFoundError or ValueError
    for a folder that is no training run."""
    from matplotlib.figure import Figure  # imported here: few commands need it

    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = list(figure.subplots(2, 3).flat)
    for folder in folders:
        lines = read_lines(folder / "metrics.jsonl", {"step"})
        for axis, name in zip(axes, PANELS, strict=True):
            points = [(line["step"], *np.ravel(line[name])) for line in lines if name in line]
            if points:
                x, y, *ends = np.array(points).T  # ends: low and high, if it has an interval
                error = [y - ends[0], ends[1] - y] if ends else None
                axis.errorbar(x, y, error, fmt="o-" if ends else "-", capsize=3, label=folder.name)
    for axis, title in zip(axes, PANELS.values(), strict=True):
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    if len(folders) > 1:
        axes[0].legend()
    figure.savefig(path, dpi=110)


def read_lines(path: Path, names: set[str]) -> list[dict]:
    """A JSONL file's whole lines, objects with some names (a run may be writing the last one).
    Raises FileNotFoundError or ValueError with the path in the message."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    text = path.read_bytes()
    try:
        lines = [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
        if all(names <= set(line) for line in lines):
            return lines
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{path} is not what a run of r3.py writes")


# -- The commands ----------------------------------------------------------------------------------


def open_chat(c: Config) -> Chat:
    """A chat for these settings. Its model has no weights yet, so that everything else is
    checked first. Raises ValueError for settings that do not fit together."""
    try:
        torch.zeros(1, device=c.device).item()
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {c.device}: torch finds no such device here") from None
    if c.model == "tiny":
        model, tokenizer = tiny_model(TinyCountdown(), c.seed)
    else:
        model = Model.from_pretrained(c.model, device="meta")
        tokenizer = Tokenizer.from_pretrained(c.model)
    tiny = tokenizer.settings.get("texts") == "tiny"
    if tiny and (c.data or c.task != "countdown"):
        raise ValueError("the tiny model plays its own Countdown: for this, give --model a folder")
    tokenizer.date = datetime.date.fromisoformat(c.date)
    model.vocab_size = min(model.vocab_size, tokenizer.vocab_size)
    task = TinyCountdown() if tiny else TASKS[c.task]()
    limits = (c.max_new_tokens, c.temperature, c.seed, c.cache_tokens or 65_536)
    return Chat(model, tokenizer, task, *limits)


def load_problems(c: Config, chat: Chat, split: str | None, limit: int | None) -> list:
    """Problems of a split, without those whose conversations might outgrow the model's context."""
    data = c.data or chat.task.hub_id
    if data and not Path(data).exists():
        if not models.is_hub_id(data):
            raise ValueError(f"--data {data}: no such file")
        data = models.from_hub(data, ["*.json", "*.jsonl", "*.parquet"], "dataset")
    split = split or ("test" if data else "dev")
    problems = chat.task.load(data and str(data), split, limit, c.seed)
    bridges = [chat.tokenizer.bridge(text) for text in (chat.task.reflect, chat.task.again)]
    room = chat.model.config.context - 3 * c.max_new_tokens - sum(map(len, bridges))
    fitting = [problem for problem in problems if len(chat.question(problem)) <= room]
    if not fitting:
        raise ValueError("no problem fits the model's context: lower --max-new-tokens")
    if len(fitting) < len(problems):
        print(f"{len(problems) - len(fitting)} problems dropped: they might outgrow the context")
    return fitting


def load_weights(c: Config, chat: Chat, training: bool = False) -> None:
    """Load the model, the tiny one made where it is not there yet. Says first what memory the run
    will need, about; on a GPU, keys and values get what is left."""
    m, size = chat.model.config, 2 if c.dtype == "bfloat16" else 4
    n = sum(p.numel() for p in chat.model.parameters())
    kv = 2 * m.num_hidden_layers * m.num_key_value_heads * m.head_dim * size  # bytes a token
    needs = {"weights": n * size}
    if training:
        kept = (6 * m.hidden_size + 4 * m.intermediate_size) * size  # by a layer, a token
        layers = 2 if c.checkpointing else m.num_hidden_layers
        needs["reference"] = n * size if c.beta else 0
        needs["gradients, masters, moments"] = n * (size if c.offload else 12 if size == 4 else 18)
        needs["activations"] = (c.group + 2) * c.max_new_tokens * kept * layers
    if c.device.startswith("cuda") and c.cache_tokens is None:
        left = 0.9 * torch.cuda.mem_get_info(c.device)[0] - sum(needs.values())
        chat.cache_tokens = max(4_096, int(left / (2.5 * kv)))  # a retry copies the cache
    needs[f"{chat.cache_tokens:,} tokens' keys and values"] = 2.5 * kv * chat.cache_tokens
    listed = ", ".join(f"{name} {need / 1e9:.3g}" for name, need in needs.items())
    print(f"{n:,} parameters in {c.dtype} on {c.device}; GB, about: {listed}")
    path = base_model(chat.task, c.seed) if c.model == "tiny" else c.model
    vocab_size = chat.model.vocab_size
    chat.model = Model.from_pretrained(path, getattr(torch, c.dtype), c.device)
    chat.model.vocab_size = vocab_size


def train_command(c: Config, folder: Path) -> None:
    """Evaluate a model, train it by R3, evaluate it again. Without flags: the whole experiment with
    a tiny model, from nothing, on a laptop."""
    begun = time.time()
    if not c.temperature:
        raise ValueError("--temperature 0 draws equal reflections: there is nothing to compare")
    vanilla = open_chat(c)
    problems = load_problems(c, vanilla, c.split, c.limit)
    if c.failures:
        failures = load_conversations(Path(c.failures), vanilla)
    else:
        training = load_problems(c, vanilla, "train", c.problems)
    write_config(folder, "train", c)
    load_weights(c, vanilla, training=True)
    if not c.failures:
        failures = find_failures(vanilla, training, c.responses, folder / "measured/tries.jsonl")
    failures = [t for t in failures if not t.first.right]
    if not failures:
        raise ValueError("no training problem was got wrong: there is nothing to learn from")
    write_failures(folder / "failures.jsonl", failures, vanilla)
    before = evaluate_both_ways(c, vanilla, problems, folder / "measured/vanilla")

    trained = replace(vanilla, model=copy.deepcopy(vanilla.model))
    reference = vanilla.model if c.beta else None
    vanilla.model.to(c.device if c.beta else "cpu")  # without the KL term it is not needed
    with tqdm(total=c.steps, desc="R3") as bar:
        for step, metrics in grpo.train(trained, reference, failures, c, folder):
            if step % max(1, c.steps // 4) == 0 or step == c.steps:
                some = problems[: HELD_OUT[0]]
                tries = evaluate(trained, some, HELD_OUT[1], f"held out, step {step}")
                metrics |= accuracy(at=tries)["at"]
            append_jsonl(folder / "metrics.jsonl", {"step": step, **metrics})
            seconds = round(time.time() - begun, 2)
            append_jsonl(folder / "timings.jsonl", {"step": step, "seconds": seconds})
            bar.set_postfix_str(f"reward {metrics.get('reward', 0):.2f}")
            bar.update(step - bar.n)
    trained.model.save_pretrained(folder / "model")
    trained.tokenizer.save_pretrained(folder / "model")

    after = evaluate_both_ways(c, trained, problems, folder / "measured/trained")
    tables = {}
    for way, tries in before.items():
        title = f"{len(problems)} problems, {way}: % right [95%]"
        tables[title] = accuracy(vanilla=tries, trained=after[way])
    sampled = list(before)[-1]
    both = reasons(vanilla=before[sampled], trained=after[sampled])
    tables[f"The verifier's reasons, {sampled}"] = both
    report(folder, tables)
    draw_curves([folder], folder / "curves.png")
    print(f"{(time.time() - begun) / 60:.1f} minutes; all in {folder}/")


def evaluate_both_ways(c: Config, chat: Chat, problems: list, path: Path) -> dict[str, Tries]:
    """Greedy, one try at each problem; and at the temperature of training, c.samples tries."""
    sampled = f"{c.samples} samples each, temperature {c.temperature:g}"
    greedy, files = replace(chat, temperature=0.0), [f"{path}-greedy.jsonl", f"{path}.jsonl"]
    return {
        "greedy": evaluate(greedy, problems, 1, f"{path.name}, greedy", Path(files[0])),
        sampled: evaluate(chat, problems, c.samples, path.name, Path(files[1])),
    }


def failures_command(c: Config, folder: Path) -> None:
    """Collect problems that a model gets wrong, with a wrong answer each, for train --failures."""
    chat = open_chat(c)
    problems = load_problems(c, chat, "train", c.problems)
    write_config(folder, "failures", c)
    load_weights(c, chat)
    found = find_failures(chat, problems, c.responses, folder / "measured/tries.jsonl")
    write_failures(folder / "failures.jsonl", found, chat)
    print(f"{len(found)} failures on {len(problems)} problems, in {folder / 'failures.jsonl'}")


def eval_command(c: Config, folder: Path) -> None:
    """Evaluate a model: right at the first try, and within two."""
    chat, samples = open_chat(c), c.samples if c.temperature else 1
    problems = load_problems(c, chat, c.split, c.limit)
    write_config(folder, "eval", c)
    load_weights(c, chat)
    tries = evaluate(chat, problems, samples, "eval", folder / "conversations.jsonl")
    way = f"{samples} samples each, temperature {c.temperature:g}"
    title = f"{len(problems)} problems, {way}: % right [95%]"
    report(folder, {title: accuracy(model=tries), "The verifier's reasons": reasons(model=tries)})
    print(f"The conversations are in {folder}/")


def write_failures(path: Path, failures: Tries, chat: Chat) -> None:
    """The whole dataset of failures at once, a line each."""
    lines = [json.dumps(record(c, chat)) + "\n" for c in failures]
    models.replace_file(path, "".join(lines))


def report(folder: Path, tables: dict) -> None:
    """Write report.json, and print its tables."""
    models.replace_file(folder / "report.json", json.dumps({"tables": tables}, indent=2))
    print("\n" + markdown(tables))


def play_command(c: Config) -> None:
    """Watch a model attempt, reflect and retry on a problem you type."""
    chat = open_chat(c)
    load_weights(c, chat)
    print(f"This is {c.model}. Type {chat.task.how_to_type}; an empty line ends.")
    number = 0
    while line := input("> ").strip():
        number += 1
        key = (grpo.AGAIN, number)  # a new key each time: the answer may differ
        try:
            [t] = attempt(chat, [chat.task.parse(line)], 1, key)
        except ValueError as error:
            print(f"  {error}")
            continue
        said = [("question", t.prompt, None), ("attempt", t.attempt, t.first)]
        if not t.first.right:
            [t] = rollout(chat, [t], 1, key)
            said += [("reflection", t.reflection, None), ("retry", t.retry, t.second)]
        for name, ids, verdict in said:
            judged = f"   <- {verdict.reason}" if verdict else ""
            say(name, chat.tokenizer.decode(ids) + judged)


def show_command(folder: Path, step: list[int] | None, only: str, limit: int) -> None:
    """Read the conversations of a run: what was said, rewarded and trained."""
    path = folder / "samples.jsonl"  # of train
    path = path if path.is_file() else folder / "conversations.jsonl"  # of eval
    lines = read_lines(path, {"problem", "context", "first"})
    if not all(isinstance(line["first"], dict) for line in lines):
        raise ValueError(f"{path} is not what a run of r3.py writes")
    steps = step or [line.get("step") for line in lines[-1:]]
    groups = defaultdict(list)
    for line in lines:
        if line.get("step") in steps:
            right = (line.get("second") or line["first"])["right"]
            line = {"reward": float(right), "advantage": 0.0, **line}
            groups[line.get("step"), line["problem"]["id"], line["context"]].append(line)
    found = []
    for group in groups.values():
        rewarded = [line for line in group if line["reward"] > 0]
        unrewarded = [line for line in group if not line["reward"] > 0]
        mixed = group if rewarded and unrewarded else []
        of_kind = {"all": group, "rewarded": rewarded, "unrewarded": unrewarded, "mixed": mixed}
        if of_kind[only]:
            found.append((f"{len(rewarded)} of {len(group)} rewarded", of_kind[only]))
    if not found:
        raise ValueError(f"{path} has no such conversations")
    for rewarded, group in found[:limit]:
        show_group(rewarded, group)
    if len(found) > limit:
        print(f"\n{len(found) - limit} groups more: --limit {len(found)} shows all")


def show_group(rewarded: str, group: list[dict]) -> None:
    """Conversations that begin alike: reflections are green where A is above zero, red below."""
    step = f"step {group[0]['step']}, " if "step" in group[0] else ""
    print(f"\n{step}problem {group[0]['problem']['id']}: {rewarded}")
    say("context", group[0]["context"], colour="2")
    for line in group:
        A, verdict = line["advantage"], line.get("second") or line["first"]
        if "reflection" in line:
            label = f"{A:+.2f} reflection" if "trained_span" in line else "reflection"
            say(label, line["reflection"], colour="32" if A > 0 else "31" if A < 0 else "")
        last = "retry" if "retry" in line else "attempt"
        say(last, f"{line[last]}   <- {verdict['reason']}")


def say(label: str, text: str, colour: str = "") -> None:
    """Print a turn, wrapped. Control characters, which a terminal would obey, become spaces."""
    width = max(20, min(100, shutil.get_terminal_size().columns) - 22)
    colour = colour if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ""
    for part in text.strip().splitlines() or [""]:
        part = "".join(letter if letter.isprintable() else " " for letter in part)
        for line in textwrap.wrap(part, width) or [""]:
            line = f"\033[{colour}m{line}\033[0m" if colour else line
            print(f"{label:>20}  {line}")
            label = ""


def plot_command(folders: list[Path], out: Path | None) -> None:
    """Draw the curves of a training run, or of several for comparison."""
    path = out or (folders[0] / "curves.png" if len(folders) == 1 else Path("curves.png"))
    draw_curves(folders, path)
    print(f"The curves are in {path}")


# -- The run's folder, and the command line --------------------------------------------------------


def newest(pattern: str) -> Path:
    """The newest such file of all runs. Raises FileNotFoundError where there is none."""
    path = max(RUNS.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)
    if path is None:
        raise FileNotFoundError(f"no run in {RUNS}/ yet: r3.py train makes one")
    return path


def new_folder(command: str, c: Config) -> Path:
    """Where a command leaves its files."""
    path = Path(c.model).resolve()
    model = path.parent.name if path.name == "model" else path.name
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = RUNS / (c.name or f"{command}-{c.task}-{model}-seed{c.seed}-{stamp}")
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} exists: choose another --name, or --resume {folder}")
    return folder


def write_config(folder: Path, command: str, c: Config) -> None:
    """config.json: every setting, and what the last bits depend on. A run is resumed from it."""
    folder.mkdir(parents=True, exist_ok=True)
    computed = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    config = {"command": command, **asdict(c), **computed}
    models.replace_file(folder / "config.json", json.dumps(config, indent=2))


def resumed(folder: Path, command: str) -> Config:
    """The settings of the run to resume. Raises ValueError if it is another command's, or done."""
    config = models.read_json(folder / "config.json")
    if config.get("command") != command:
        raise ValueError(f"{folder} is a run of {config.get('command')}, not of {command}")
    last = folder / ("failures.jsonl" if command == "failures" else "report.json")
    if last.exists():
        raise ValueError(f"{folder} is finished: {last} exists")
    try:
        computed = config["torch"], config["threads"]
        c = Config(**{f.name: config[f.name] for f in fields(Config)})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: {error!r}") from None
    if computed != (torch.__version__, torch.get_num_threads()):
        print("Another torch, or another number of threads: the last bits may differ")
    return c


def settings_of(given: dict, command: str) -> Config:
    """The settings that were given, over the tiny model's or a checkpoint's defaults."""
    if command == "play" and "model" not in given:
        given["model"] = str(newest("*/model/config.json").parent)
    settings = Path(given.get("model", "tiny")) / "tokenizer_config.json"
    tiny = given.get("model", "tiny") == "tiny"
    tiny = tiny or settings.is_file() and models.read_json(settings).get("texts") == "tiny"
    return replace(TINY if tiny else PAPER, **given)


def add_settings(parser: argparse.ArgumentParser, command: str) -> None:
    """A flag for each setting that a command has."""
    for f in fields(Config):
        if command not in f.metadata.get("commands", "").split():
            continue
        tiny, paper = getattr(TINY, f.name), getattr(PAPER, f.name)
        default = f"{tiny}" if tiny == paper else f"{tiny}; a checkpoint's: {paper}"
        about = f.metadata["help"] + (f" (default: {default})" if tiny is not None else "")
        kind = (typing.get_args(f.type) or [f.type])[0]  # of "int | None": int
        how = {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif f.metadata["choices"]:
            how = {"choices": list(f.metadata["choices"])}
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=about, **how)


COMMANDS = {
    "train": train_command, "failures": failures_command, "eval": eval_command,
    "play": play_command, "show": show_command, "plot": plot_command,
}  # fmt: skip


def read_command_line(argv: list[str] | None) -> dict:
    """What was given on the command line, by name, and no defaults of settings."""
    about = "Reflect, Retry, Reward: train a language model to reflect."
    parser = argparse.ArgumentParser(prog="r3.py", description=about)
    subs = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name, function in COMMANDS.items():
        about = function.__doc__
        sub = subs.add_parser(
            name, help=about, description=about, argument_default=argparse.SUPPRESS
        )
        add_settings(sub, name)
        if name in MOST.split():
            about = "go on with a run that was stopped, with its settings"
            sub.add_argument("--resume", type=Path, metavar="FOLDER", help=about)
    show, plot = subs.choices["show"], subs.choices["plot"]
    run = "the run's folder (default: the one trained last)"
    show.add_argument("folder", nargs="?", type=Path, metavar="RUN", help=run, default=None)
    about = "of these steps; RUN comes before (default: the last)"
    show.add_argument("--step", type=int, nargs="+", help=about, default=None)
    kinds = ("all", "rewarded", "unrewarded", "mixed")
    show.add_argument("--only", choices=kinds, default="all", help="such conversations, or groups")
    show.add_argument("--limit", type=int, default=5, help="so many groups (default: 5)")
    plot.add_argument("folders", nargs="*", type=Path, metavar="RUN", help=run, default=[])
    about = "the picture (default: curves.png of the run)"
    plot.add_argument("--out", type=Path, metavar="FILE", help=about, default=None)
    return vars(parser.parse_args(argv))


def run(command: str, given: dict) -> None:
    """Run a command. Raises SystemExit with where to go on if it is stopped by a signal."""
    if command == "show":
        given["folder"] = given["folder"] or newest("*/samples.jsonl").parent
        show_command(**given)
    elif command == "plot":
        plot_command(given["folders"] or [newest("*/samples.jsonl").parent], given["out"])
    elif command == "play":
        play_command(settings_of(given, command))
    else:
        folder = given.pop("resume", None)
        if folder and given:
            raise ValueError("--resume takes all other settings from the run")
        c = resumed(folder, command) if folder else settings_of(given, command)
        folder = folder or new_folder(command, c)
        grpo.STOP.clear()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask_to_stop)
        try:
            COMMANDS[command](c, folder)
        except grpo.Stopped:
            sys.exit(f"r3.py: stopped, and saved; go on with: r3.py {command} --resume {folder}")


def ask_to_stop(number: int, _frame) -> None:
    """A signal: the step under way is finished and saved first; at a second Ctrl-C, it is not."""
    if grpo.STOP.is_set() and number == signal.SIGINT:
        raise KeyboardInterrupt
    grpo.STOP.set()
    os.write(2, b"\nr3.py: stopping after this step or batch (Ctrl-C again: at once)\n")


def main(argv: list[str] | None = None) -> None:
    """The command line. An error that a user can fix is one line."""
    given = read_command_line(argv)
    try:
        run(given.pop("command"), given)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (ValueError, OSError) as error:
        sys.exit(f"r3.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("r3.py: out of GPU memory; lower --cache-tokens, or take --checkpointing")
    except EOFError:
        print()
    except KeyboardInterrupt:
        sys.exit("r3.py: interrupted")


if __name__ == "__main__":
    main()
