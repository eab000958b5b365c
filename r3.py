"""Reflect, Retry, Reward: the experiment around the method, and the command line.

    python r3.py train      evaluate a model, train it with R3 on its failures, evaluate it again
    python r3.py failures   collect a dataset of failures, for train --failures
    python r3.py eval       measure the accuracy on the first try and within two tries
    python r3.py play       type a problem, and watch a model attempt it, reflect and retry
    python r3.py show       print sampled reflections with their rewards, and the retries
    python r3.py plot       plot the curves of one or more runs

The method itself is in grpo.py. This file contains, in this order: the settings, the cold start
that makes the tiny model, the search for failures and the evaluation, the tables, what a run needs
(memory, disk), the commands, the folder of a run, and the command line.
"""

import argparse
import copy
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
import textwrap
import time
import typing
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import filelock
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import grpo
from grpo import Agent, Conversation, append_jsonl, attempt_all, gather, longest_first, rollout
from model import (
    DivergenceError,
    Linear,
    Model,
    Tokenizer,
    is_rank_0,
    local_path,
    read_json,
    replace_file,
    tiny_model,
)
from tasks import TASKS, Task, TinyCountdown

RUNS = Path("runs")
NUM_LOCAL_PROCESSES = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine; from torchrun


# -- Settings --------------------------------------------------------------------------------------
@dataclass
class Config(grpo.TrainConfig):
    """All settings of a run. The command line is generated from this class: each setting is a flag,
    and the text beside its type is the flag's help. The values here are the defaults for pretrained
    models. TINY, below, has others for the tiny model."""

    model: Annotated[str, "Hugging Face folder or hub id; tiny: a model made from scratch"] = "tiny"
    task: Annotated[str, "the task to solve"] = "countdown"
    data: Annotated[str | None, "problems: a JSON, JSONL or parquet file, or a hub id"] = None
    name: Annotated[str | None, "name of the run's folder in runs/"] = None
    seed: Annotated[int, "random seed"] = 0
    device: Annotated[str, "cpu, cuda or mps"] = "cpu"
    dtype: Annotated[Literal["float32", "bfloat16"], "data type of the model's weights"] = "float32"
    temperature: Annotated[float, "sampling temperature; 0 means greedy decoding"] = 1.0
    max_new_tokens: Annotated[int, "maximum number of tokens in a turn"] = 512
    cache_tokens: Annotated[
        int | None, "size of the KV cache in tokens; None: what fits on a GPU, else 65,536"
    ] = None
    split: Annotated[Literal["dev", "test", "train", "all"], "problems to evaluate on"] = "dev"
    limit: Annotated[int | None, "maximum number of problems to evaluate on"] = None
    num_samples: Annotated[int, "number of attempts at each problem in the evaluation"] = 1
    num_problems: Annotated[int | None, "maximum number of problems in the failure search"] = None
    max_attempts: Annotated[int, "maximum number of attempts at each of these problems"] = 64
    failures: Annotated[str | None, "failures.jsonl to train on, instead of a new search"] = None
    lora_rank: Annotated[
        int, "rank of LoRA adapters, whose default --lr is ten times as high; 0 trains all weights"
    ] = 0
    curve: Annotated[int, "number of points of the learning curve after step 0; 0 for none"] = 4
    keep_checkpoint: Annotated[bool, "keep the checkpoint of a finished run"] = False

    def __post_init__(self):
        if self.temperature == 0:
            self.num_samples = self.max_attempts = 1  # Greedy attempts are all the same.
        for name in SETTINGS:  # It is made from this class, below.
            check_setting(name, getattr(self, name))
        if self.task not in TASKS:
            hint = "for a task of your own, start the file that adds it"
            raise ValueError(f"--task {self.task}: must be one of {', '.join(TASKS)}; {hint}")
        if self.name is not None and not re.fullmatch(r"\w[\w .+-]*(/\w[\w .+-]*)*", self.name):
            raise ValueError(f"--name {self.name}: must be the name of a folder within {RUNS}/")


def flag_name(setting: str) -> str:
    """num_samples -> --num-samples"""
    return f"--{setting.replace('_', '-')}"


class Setting(NamedTuple):
    """What is known about a setting from its annotation."""

    type: type
    optional: bool  # whether it may be None
    choices: tuple
    help: str


# The lowest and the highest allowed values. Other numbers must be at least 0 and finite.
LOWEST = {
    "steps": 1, "batch_size": 1, "updates": 1, "save_every": 1, "max_new_tokens": 1,
    "cache_tokens": 1, "log_failures": 1, "num_samples": 1, "num_problems": 1, "max_attempts": 1,
    "group_size": 2, "limit": 2,  # A standard deviation needs at least two values.
    "max_grad_norm": 1e-9,
}  # fmt: skip
HIGHEST = {"warmup": 1, "clip": 1e30, "seed": 2**63 - 1}  # 1 + clip must fit into float32


def read_setting(annotation: Any) -> Setting:
    """Make a Setting of an annotation in Config, for example Annotated[int | None, "help"]."""
    hint, help_text = typing.get_args(annotation)  # int | None, "help"
    arguments = typing.get_args(hint)  # (int, NoneType), or the choices of a Literal
    optional = type(None) in arguments
    choices = arguments if typing.get_origin(hint) is Literal else ()
    value_type = str if choices else arguments[0] if optional else hint
    return Setting(value_type, optional, choices, help_text)


annotations = typing.get_type_hints(Config, include_extras=True)
SETTINGS = {name: read_setting(annotation) for name, annotation in annotations.items()}


def check_setting(name: str, value: Any) -> None:
    """Raise ValueError if a setting cannot have this value."""
    setting, flag = SETTINGS[name], flag_name(name)
    if value is None and setting.optional:
        return
    allowed = (int, float) if setting.type is float else setting.type
    if not isinstance(value, allowed) or (isinstance(value, bool) and setting.type is not bool):
        raise ValueError(f"{flag} {value!r}: must be of type {setting.type.__name__}")
    if setting.choices and value not in setting.choices:
        raise ValueError(f"{flag} {value}: must be one of {', '.join(setting.choices)}")
    if setting.type in (int, float):
        lowest, highest = LOWEST.get(name, 0), HIGHEST.get(name, sys.float_info.max)
        if not lowest <= value <= highest:  # This is also true if the value is nan.
            bound = f"at most {highest:g}" if value > highest else f"at least {lowest:g}"
            raise ValueError(f"{flag} {value}: must be {bound}")


# TINY has the defaults for the tiny model, and PRETRAINED those for pretrained models. These are
# the values of Config, but if there is a GPU, the device is cuda and the dtype bfloat16. The values
# of Config are the paper's, except for group_size and max_new_tokens, which it does not state.
TINY = Config(
    steps=16, batch_size=32, lr=3e-4, save_every=1, num_samples=4, max_attempts=4,
    max_new_tokens=134, cache_tokens=131_072, log_failures=None,
)  # fmt: skip
PRETRAINED = Config(device="cuda", dtype="bfloat16") if torch.cuda.is_available() else Config()
CURVE_PROBLEMS, CURVE_SAMPLES = 200, 2  # what is evaluated for a point of the learning curves


# -- The cold start: how the tiny model is made ----------------------------------------------------
COLD_START = {
    "version": 2,  # of the dialogues: increase it if their texts change
    "steps": 4_000,
    "batch_size": 8,  # dialogues per step
    # In this first part of the steps, every reflection is a full search: it tries one way to
    # combine the numbers after another, until one reaches the target. In the last part, there are
    # others, too: see TinyCountdown.cold_start_dialogue.
    "full_search_fraction": 0.8,
    "lr": 4e-3,
    "betas": [0.9, 0.99],
    "weight_decay": 0.1,
}
STEPS_PER_CHUNK = 8  # the number of steps whose dialogues are drawn together


def make_tiny_model(task: TinyCountdown, seed: int, width: int = 1) -> Path:
    """Make the tiny model for a seed, unless it exists already; return its folder. A larger width
    makes a larger model, with a lower learning rate.

    It is trained from random weights on dialogues that a program writes, with the cross-entropy of
    the assistant's tokens. The folder's name contains a hash of the recipe, so that a changed
    recipe makes a new model.
    """
    model, tokenizer = tiny_model(task.words(), seed, width=width)
    recipe = json.dumps([COLD_START, model.config_dict, tokenizer.settings, task.words()])
    path = RUNS / f"base-seed{seed}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    if (path / "model.safetensors").exists():
        return path
    problems = task.load(split="cold", seed=seed)
    steps, betas = COLD_START["steps"], COLD_START["betas"]
    weight_decay = COLD_START["weight_decay"]
    adamw = torch.optim.AdamW(
        model.parameters(), betas=betas, weight_decay=weight_decay, fused=True
    )
    with progress_bar(range(steps), "cold start") as bar:
        for step in bar:
            if step % STEPS_PER_CHUNK == 0:
                full_search = step < COLD_START["full_search_fraction"] * steps
                rng = random.Random(f"cold {seed} {step}")
                chunk = dialogue_batches(task, tokenizer, problems, rng, full_search)
            ids, mask = chunk[step % STEPS_PER_CHUNK]  # (B, T) both
            is_target = mask[:, 1:]  # (B, T - 1): each position predicts the next token
            # Causal attention never sees the padding, which is on the right.
            hidden = model.hidden(ids)[:, :-1][is_target]  # (N, E)
            loss = F.cross_entropy(model.head(hidden), ids[:, 1:][is_target])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            multiplier = grpo.lr_multiplier(step, steps, warmup=0.03)
            adamw.param_groups[0]["lr"] = COLD_START["lr"] / width * multiplier
            adamw.step()
            adamw.zero_grad()
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    tokenizer.save_pretrained(path)
    model.save_pretrained(path)  # The weights come last: a folder that has them is complete.
    return path


def dialogue_batches(
    task: TinyCountdown, tokenizer: Tokenizer, problems: list, rng: random.Random, full_search: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The training batches of STEPS_PER_CHUNK steps of the cold start: (ids, mask) pairs, (B, T)
    each, padded on the right. The mask is True on the assistant's tokens. full_search: whether
    every reflection searches until it succeeds."""
    instructions = task.reflection_instruction, task.retry_instruction
    bridges = [tokenizer.bridge(text) for text in instructions]  # the tokens between two turns
    batch_size = COLD_START["batch_size"]
    rows = []
    for _ in range(batch_size * STEPS_PER_CHUNK):
        problem, turns = task.cold_start_dialogue(problems, rng, full_search)
        messages, tools = task.messages(problem)
        ids = tokenizer.prompt(messages, tools)
        mask: list[bool] = []
        for i, turn in enumerate(turns):
            if i > 0:  # The user's instruction comes before each later turn.
                ids = tokenizer.append_bridge(ids, bridges[i - 1])
            mask += [False] * (len(ids) - len(mask))
            trained = [*tokenizer.encode(turn), tokenizer.stop_ids[0]]
            ids += trained
            mask += [True] * len(trained)
        rows.append((torch.tensor(ids), torch.tensor(mask)))
    rows.sort(key=lambda row: len(row[0]))  # Rows of similar length share a batch: less padding.
    batches = []
    for i in rng.sample(range(STEPS_PER_CHUNK), STEPS_PER_CHUNK):  # in random order
        batch = rows[i * batch_size : (i + 1) * batch_size]
        batch_ids = pad_sequence([ids for ids, _ in batch], batch_first=True)
        batch_mask = pad_sequence([mask for _, mask in batch], batch_first=True)
        batches.append((batch_ids, batch_mask))
    return batches


# -- Failures and evaluation -----------------------------------------------------------------------
def find_failures(
    agent: Agent, problems: list, max_attempts: int, path: Path
) -> list[Conversation]:
    """Collect a dataset of failures: the first wrong attempt at each problem, among at most
    `max_attempts`. The result is in the order of `problems`. The search itself goes from the
    longest problem to the shortest, and appends the failures of each batch to the file. If the file
    exists, the search resumes: it skips all problems up to the last one with a failure in it."""
    saved = load_conversations(path, agent) if path.exists() else []
    found = {c.problem.id: c for c in saved}
    write_conversations(path, list(found.values()), agent)  # This drops an incomplete last line.
    by_length = longest_first(agent, problems)
    searched = max((i + 1 for i, p in enumerate(by_length) if p.id in found), default=0)
    rng_prefix = (grpo.COLLECT, 0)  # (purpose, step): how the keys of the random numbers begin
    for batch in batches(agent, by_length[searched:], 1, "failures", searched):
        for attempt_index in range(max_attempts):
            without_failure = [problem for problem in batch if problem.id not in found]
            attempts = attempt_all(agent, without_failure, 1, rng_prefix, attempt_index)
            found |= {c.problem.id: c for c in attempts if not c.attempt_verdict.correct}
        failures = [found[problem.id] for problem in batch if problem.id in found]
        append_jsonl(path, *(grpo.to_json(c, agent.tokenizer) for c in failures))
    return [found[problem.id] for problem in problems if problem.id in found]


def evaluate(
    agent: Agent,
    problems: list,
    num_samples: int,
    title: str,
    path: Path | None = None,
    trained_steps: int = 0,
) -> list[Conversation]:
    """Attempt every problem `num_samples` times; reflect once on each failure, and retry once.

    The result is sorted by problem and attempt. With a path, it is written to this file. If the
    file already holds these attempts by the model after `trained_steps` training steps, the result
    is read from it instead.
    """
    if path and path.exists() and path.stat().st_size > 0:
        conversations = load_conversations(path, agent)
        steps = {record["trained_steps"] for record in read_jsonl(path, "trained_steps")}
        attempts_in_file = [(c.problem, c.attempt_index) for c in conversations]
        by_id = sorted(problems, key=lambda problem: problem.id)
        expected = [(problem, i) for problem in by_id for i in range(num_samples)]
        if steps == {trained_steps} and attempts_in_file == expected:
            return conversations
    conversations = []
    rng_prefix = (grpo.EVALUATE, 0)
    for batch in batches(agent, longest_first(agent, problems), num_samples, title):
        attempts = attempt_all(agent, batch, num_samples, rng_prefix)
        conversations += [c for c in attempts if c.attempt_verdict.correct]
        failures = [c for c in attempts if not c.attempt_verdict.correct]
        for group in rollout(agent, failures, 1, rng_prefix):
            conversations += group  # one conversation for each failure
    conversations.sort(key=lambda c: c.attempt_id)  # (problem id, attempt index)
    if path:
        write_conversations(path, conversations, agent, trained_steps=trained_steps)
    return conversations


def batches(
    agent: Agent, remaining: list, num_samples: int, title: str, num_done: int = 0
) -> Iterator[list]:
    """Split problems into batches, so that results can be saved and progress shown after each. The
    attempts at a batch just fit into the memory of all processes together. remaining: problems
    sorted by `longest_first`; num_done: how many came before them. (The failures of a batch need
    more memory: `rollout` divides them again.)"""
    with progress_bar(desc=title, total=num_done + len(remaining), initial=num_done) as bar:
        while remaining:
            batch = grpo.next_batch(agent, remaining, num_samples, turns=1)
            size = sum(gather([len(batch)]))  # Of several processes, each has memory for a batch.
            yield remaining[:size]
            bar.update(min(size, len(remaining)))
            remaining = remaining[size:]


def write_conversations(
    path: Path, conversations: list[Conversation], agent: Agent, **extra_fields: Any
) -> None:
    """Write conversations to a file, one line each. The file is replaced atomically. (Of several
    processes, only the first one writes, in `replace_file` and `append_jsonl`.)"""
    records = [{**extra_fields, **grpo.to_json(c, agent.tokenizer)} for c in conversations]
    replace_file(path, "".join(json.dumps(record) + "\n" for record in records))


def load_conversations(path: Path, agent: Agent) -> list[Conversation]:
    """Read the conversations in a file, and verify their answers again. An incomplete last line is
    ignored. Raises ValueError, with the line's number, if a conversation does not fit this task and
    this model's tokenizer."""
    conversations = []
    lines = path.read_bytes().split(b"\n")
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if line_number == len(lines):  # It has no newline, so its writer was killed.
                break
            raise ValueError(f"{path}, line {line_number}: it is not valid JSON") from None
        try:
            conversations.append(grpo.from_json(record, agent))
        except Exception as error:  # --failures may be any file, so any error is possible.
            reason = f"it does not fit this run: {error}"
            if isinstance(error, KeyError):
                reason = f"{error} is missing; an older version or another task may have written it"
            raise ValueError(f"{path}, line {line_number}: {reason}") from None
    return conversations


def usable_failures(path: Path, agent: Agent, problems: list) -> list[Conversation]:
    """The failures in another run's file that can be trained on here. Failures on the problems
    that this run evaluates, and those that would outgrow the model's context, are dropped, and
    the number of each is printed. If two failures have the same attempt_id, because files of
    several runs were joined, the problem of the second one gets a new id."""
    failures = [c for c in load_conversations(path, agent) if not c.attempt_verdict.correct]
    evaluated = {agent.task.problem_key(problem) for problem in problems}
    unseen = [c for c in failures if agent.task.problem_key(c.problem) not in evaluated]
    max_length = max_prompt_length(agent, turns=grpo.MAX_TURNS - 1)  # reflection and retry
    fitting = [c for c in unseen if grpo.prompt_length(agent, c) <= max_length]
    if len(fitting) < len(failures):
        on_evaluated = plural(len(failures) - len(unseen), "failure")
        too_long = f"{len(unseen) - len(fitting)} that might not fit into the model's context"
        print(f"Dropped {on_evaluated} on evaluated problems, and {too_long}")
    usable: dict[tuple[int, int], Conversation] = {}
    next_id = 1 + max((failure.problem.id for failure in fitting), default=0)
    for failure in fitting:
        if failure.attempt_id in usable:
            failure = replace(failure, problem=replace(failure.problem, id=next_id))
            next_id += 1
        usable[failure.attempt_id] = failure
    return list(usable.values())


# -- Tables ----------------------------------------------------------------------------------------
def mean_with_interval(values: np.ndarray, conversations: list[Conversation]) -> list[float]:
    """The mean of N values, one for each conversation, and its 95% interval: [mean, low, high].

    Several attempts at one problem are not independent. So the interval is cluster-robust, which
    means that deviations from the mean are summed by problem first. With n problems, its half width
    is

        1.96 * sqrt(n / (n - 1) * sum over problems of (sum of deviations)^2) / N

    If this is 0, because all problems have the same result, 3 / n is used (the rule of three).
    """
    _, cluster = np.unique([c.problem.id for c in conversations], return_inverse=True)
    mean = float(values.mean())
    sums = np.bincount(cluster, weights=values - mean)  # (n,)
    n = len(sums)
    variance = n / max(1, n - 1) * (sums**2).sum() / len(values) ** 2
    half_width = 1.96 * math.sqrt(variance)
    if half_width < 1e-9:  # zero, except for rounding errors
        half_width = 3 / n
    return [mean, mean - half_width, mean + half_width]


def accuracy(by_model: dict[str, list[Conversation]]) -> dict[str, dict[str, list[float]]]:
    """The two accuracies that the paper reports, measured on these conversations: a row for each
    model, with the accuracy on the first try and within two tries. With two models, a row "gain"
    has the difference, paired by problem and attempt."""
    rows: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for column, verdict in (("1st try", "attempt_verdict"), ("within two", "final_verdict")):
        correct = []  # for each model, an array with a 1 or a 0 for each conversation
        for name, conversations in by_model.items():
            values = np.array([getattr(c, verdict).correct for c in conversations], float)
            interval = mean_with_interval(values, conversations)
            rows[name][column] = np.clip(interval, 0, 1).tolist()
            correct.append(values)
        if len(correct) == 2:  # Both models have attempted the same problems, in the same order.
            before, after = correct
            # The conversations, here those of the last model, tell to which problem a difference
            # belongs.
            rows["gain"][column] = mean_with_interval(after - before, conversations)
    return rows


def markdown(tables: dict[str, dict]) -> str:
    """Format {title: {row: {column: value}}} as Markdown tables. A value is a count, or a list
    [mean, low, high], which is printed in percent."""
    parts = []
    for title, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        cells = [["", *columns]]
        for name, row in rows.items():
            cells.append([name])
            for value in (row.get(column, "") for column in columns):
                if isinstance(value, list):
                    sign = "+" if name == "gain" else ""
                    mean, low, high = (f"{100 * x:{sign}.1f}" for x in value)
                    value = f"{mean} [{low}, {high}]"
                cells[-1].append(str(value))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
        lines.insert(1, "|-" + "-|-".join("-" * width for width in widths) + "-|")
        parts += [title, "", *lines, ""]
    return "\n".join(parts)


def read_jsonl(path: Path, *required_keys: str) -> Iterator[dict]:
    """Read a JSONL file line by line. An incomplete last line, which a running process may be
    writing, is ignored. Raises OSError, or ValueError if there is no complete line, or if one is
    not an object with these keys."""
    error = ValueError(f"{path} was not written by this version of r3.py")
    record = None
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise error from None
            if not isinstance(record, dict) or not record.keys() >= set(required_keys):
                raise error
            yield record
    if record is None:  # There was no complete line.
        raise error


# -- What a run needs, checked before anything expensive -------------------------------------------
def load_task(config: Config) -> Task:
    """The task of a run. Raises ValueError if the model does not support it."""
    if not is_tiny(config.model):
        return TASKS[config.task]()
    if config.data or config.task != "countdown":
        hint = "for other tasks use --model"
        raise ValueError(f"the tiny model supports only its own Countdown; {hint}")
    return TinyCountdown()


def load_problems(config: Config, task: Task, split: str, limit: int | None) -> list:
    """The problems of a split: from the file or hub dataset --data, from the task's own dataset on
    the hub, or drawn by the task."""
    data = config.data or task.hub_id
    path = None
    if data:
        path = local_path(data, ["*.json", "*.jsonl", "*.parquet"], "dataset")
        if not path.exists():
            raise ValueError(f"{data} has no JSON, JSONL or parquet file")
    problems = task.load(path, split, limit, config.seed)
    for problem in problems[:1]:  # A run saves problems as JSON, and must recognize them later.
        if task.parse_record(json.loads(json.dumps(asdict(problem)))) != problem:
            raise ValueError(
                f"the task's parse_record does not restore {problem} from JSON; for example, JSON "
                "turns tuples into lists"
            )
    return problems


def model_path(config: Config, task: Task) -> str | Path:
    """The folder or hub id of a run's model. The tiny one is made first, if necessary."""
    if (Path(config.model) / "model" / "config.json").is_file():
        raise ValueError(
            f"--model {config.model}: this is a run; its model is {config.model}/model"
        )
    if config.model != "tiny":
        return config.model
    # Of several processes, the first one makes it. The others wait, and get the path from it.
    return gather([is_rank_0() and make_tiny_model(task, config.seed)])[0]


def select_device(config: Config) -> None:
    """Select and try the device. Raises ValueError if --device is not available."""
    try:
        if config.device == "cuda" and "LOCAL_RANK" in os.environ:  # set by torchrun
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=config.device).item()
    except Exception:  # of a type that depends on the device
        raise ValueError(f"--device {config.device} is not available here") from None


def load_shapes(config: Config, task: Task) -> Model:
    """The run's model without weights, on the device "meta". Only its config.json is read, but the
    tiny model is made first if it does not exist. Raises OSError if there is no such model, and
    ValueError if it is not supported."""
    return Model.from_pretrained(model_path(config, task), getattr(torch, config.dtype), "meta")


class Memory(NamedTuple):
    """An estimate of the memory that a run needs, in bytes by purpose."""

    always: dict[str, float]  # on the device, during the whole run
    rollout: dict[str, float]  # on the device, while sampling, for each token of the KV cache
    update: dict[str, float]  # on the device, while gradients are computed
    cpu: dict[str, float]  # in main memory, if the device has a memory of its own
    least_cache: int  # the smallest KV cache, in tokens: one problem or failure with its samples

    @property
    def per_cache_token(self) -> float:
        return sum(self.rollout.values())

    def peak(self, cache_tokens: int) -> float:
        """Bytes on the device. Rollouts and updates alternate, so the larger of them counts."""
        cache_tokens = max(cache_tokens, self.least_cache)  # A batch has at least one item.
        largest = max(self.per_cache_token * cache_tokens, sum(self.update.values()))
        return sum(self.always.values()) + largest


def memory_needed(config: Config, model: Model, training: bool) -> Memory:
    """Estimate the memory that a run needs. The model may be on the "meta" device. The lengths of
    questions and turns are not known yet: each is counted as max_new_tokens tokens."""
    size = getattr(torch, config.dtype).itemsize  # bytes of a number: 4 or 2
    weights = size * sum(p.numel() for p in model.parameters())
    T = config.max_new_tokens
    turn_in_cache = T + grpo.TEMPLATE_TOKENS
    group_size = config.group_size if training else 1
    with_attempts = T + config.num_samples * turn_in_cache  # a question with its attempts
    with_retries = 2 * T + group_size * 2 * turn_in_cache  # a failure, reflections and retries
    least_cache = max(with_attempts, with_retries)
    rollout = rollout_memory(config, model)
    if not training:
        return Memory({"weights": weights}, rollout, {}, {}, least_cache)

    num_trained = count_trained(config, model)
    always = {
        "weights": weights,
        "adapters": size * num_trained if config.lora_rank else 0,
        # With LoRA, the reference model needs no copy: it is the policy without the adapters.
        "reference model": weights if config.beta and not config.lora_rank else 0,
    }
    # AdamW has two float32 moments for each trained weight. The masters that it updates are float32
    # copies with gradients of their own. Float32 weights without --offload are their own masters,
    # so there are no copies. (The gradients of the weights are counted in update_memory.)
    num_masters = num_trained if config.offload or config.dtype != "float32" else 0
    optimizer = {"master weights": 4 * num_masters, "moments": 8 * num_trained}
    gradients = {"gradients of the master weights": 4 * num_masters}
    update, cpu = update_memory(config, model), {}
    if config.device == "cpu" or not config.offload:
        always, update = always | optimizer, gradients | update
    else:
        cpu = optimizer | gradients
    # What is saved is first copied to main memory: a checkpoint or the model, never both at once. A
    # checkpoint is saved during training, so its copy comes on top of what `cpu` counts. (With
    # --offload, its tensors are there already, and are not copied.) The model is saved after
    # training: its copy can use the memory that `cpu` counts, which is free again, and needs more
    # only if that does not suffice.
    if config.device != "cpu":
        checkpoint = 0 if config.offload else 12 * num_trained  # master weights and moments
        cpu["copies to be saved"] = max(checkpoint, weights - sum(cpu.values()))
    # Leave out what does not exist in this mode.
    parts = (always, rollout, update, cpu)
    existing = [{name: size for name, size in part.items() if size} for part in parts]
    return Memory(*existing, least_cache)


def count_trained(config: Config, model: Model) -> int:
    """The number of parameters that are trained: all of them, or those of the adapters. The model
    has no adapters yet."""
    if not config.lora_rank:
        return sum(p.numel() for p in model.parameters())
    linears = [x for x in model.model.layers.modules() if isinstance(x, Linear)]
    return sum(config.lora_rank * (x.in_features + x.out_features) for x in linears)


def rollout_memory(config: Config, model: Model) -> dict[str, float]:
    """The bytes that sampling needs for each token of the KV cache, by purpose."""
    shape, size = model.config, getattr(torch, config.dtype).itemsize
    E, width, V = shape.hidden_size, shape.intermediate_size, model.vocab_size
    # Each layer has a key and a value of each token.
    kv = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * size
    # Once at most 3/4 of the rows are unfinished, these are copied to a smaller cache, and so on
    # (see drop_finished in model.py). The first cache is kept. So three exist during the second
    # copy: with all rows, 3/4 and 9/16 of them.
    copies = 1 + 3 / 4 + 9 / 16
    # A decode step has four float32 arrays of V numbers for each row: logits, log-probabilities,
    # probabilities, and cumulative probabilities. Here they are divided by the number of tokens
    # that a row has in the cache: at least one turn.
    logits = 4 * 4 * V / (config.max_new_tokens + grpo.TEMPLATE_TOKENS)
    first_turn = {"keys and values": copies * kv, "logits of a decode step": logits}
    # The first turn of a batch is an attempt or a reflection. A batch of attempts has the most
    # rows, because one turn per row fills the cache. In a batch of failures, each row has room for
    # two turns, a reflection and a retry, so there are half as many rows, and half the logits.
    # During the retries, the cache of the reflections still exists. It is half as large: 0.5.
    second_turn = {"keys and values": (copies + 0.5) * kv, "logits of a decode step": logits / 2}
    # Prefill, the reading of prompts, needs for each token of a prompt: the block's input, the sum
    # after attention, its normalization, and three vectors of the MLP. If prompts are padded, there
    # is also a row of the attention mask, as long as a prompt: 2 * max_new_tokens (see
    # memory_needed). Prompts take at most about half of the cache, and what the new tokens take is
    # allocated after prefill. Hence both are halved.
    prompt_token = size * (3 * E + 3 * width + 2 * config.max_new_tokens)
    prefill = {"keys and values": kv / 2, "reading of prompts": prompt_token / 2}
    return max(first_turn, second_turn, prefill, key=lambda phase: sum(phase.values()))


def update_memory(config: Config, model: Model) -> dict[str, float]:
    """The bytes, by purpose, that the backward pass of a packed group needs at its peak. The group
    is one sequence: a context, then G branches, the reflections, which do not see each other."""
    shape, size = model.config, getattr(torch, config.dtype).itemsize
    E, width, V = shape.hidden_size, shape.intermediate_size, model.vocab_size
    q_size = shape.num_attention_heads * shape.head_dim  # of the queries of all heads
    T, G = config.max_new_tokens, config.group_size  # T: tokens of a turn
    context = 2 * T  # a question and an attempt
    tokens = context + G * T
    # `block`, `kept` and `block_backward` count numbers of the model's dtype.
    # A block keeps, for each token: its input and the sum after attention, both normalized as well
    # (4 E); the queries, the repeated keys and values, and the output of attention, before and
    # after it is transposed (5 q_size); the gate before and after silu, the other projection, and
    # their product (4 width). For each branch, it keeps the keys and values of the context and the
    # branch, and a mask.
    block = tokens * (4 * E + 5 * q_size + 4 * width)
    block += G * (context + T) * 2 * q_size + G * T * (context + T)
    # After the blocks: the input and the output of the last norm, and the hidden states that
    # predict the tokens of the reflections.
    kept = tokens * 2 * E + G * T * E
    if config.device == "cpu":
        # RMSNorm is several operators there, which keep more than its input x, the one array (of
        # tokens * E numbers) that is counted above. With float32, they keep x and x / rms(x): 2
        # arrays, so 1 more. With bfloat16, they keep both of these in float32. That is as much as 4
        # arrays in bfloat16, so 3 more.
        norm = tokens * E * (1 if size == 4 else 3)
        block, kept = block + 2 * norm, kept + norm
    block += tokens * 7 * config.lora_rank  # the inputs of the matrices B of its 7 adapters
    if shape.qk_norm:  # queries and keys before their normalization
        block += tokens * (q_size + shape.num_key_value_heads * shape.head_dim)
    block_backward = tokens * (2 * width + 2 * E)  # gradients, while they pass through a block
    if config.checkpointing:
        # Only the inputs of the blocks are kept. The backward pass computes one block again.
        kept += shape.num_hidden_layers * tokens * E
        block_backward += block - tokens * E  # Its input is in `kept` already.
    else:
        kept += shape.num_hidden_layers * block
    # The logits of a chunk exist three times, in float32: as log-probabilities, and as gradients
    # before and after log_softmax. If there are several chunks, the gradient of the head exists
    # three times: that of a chunk, and the sum before and after it is added.
    num_logits = min(G * T * V, grpo.MAX_LOGITS)
    head = 0 if config.lora_rank else size * V * E
    # The backward pass begins with the head, and continues with the last block. The "gradients of
    # the weights" below include that of the head, but it is first computed as a further tensor. If
    # the embeddings share the head's weights, this tensor exists until the end of the pass. (If
    # they do not, it is gone before the last block, and at_block is too high by its size.)
    at_head = {
        "activations": size * kept,
        "logits": 3 * 4 * num_logits,
        "gradient of the head": head * (3 if num_logits < G * T * V else 1),
    }
    at_block = {"activations": size * (kept + block_backward), "gradient of the head": head}
    largest = max(at_head, at_block, key=lambda phase: sum(phase.values()))
    # The gradients of several groups are added up, so they exist from the first group on.
    return {"gradients of the weights": size * count_trained(config, model), **largest}


USABLE_GPU_MEMORY = 0.9  # of what is free; kernels and fragmentation need the rest


def free_memory(device: str) -> float | None:
    """The bytes that this process can use on a device, or None if this is not known."""
    if device.startswith("cuda"):
        return USABLE_GPU_MEMORY * torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")  # Linux has it
    if device == "cpu" and meminfo.is_file():
        kilobytes = re.search(r"^MemAvailable: +(\d+) kB", meminfo.read_text(), re.MULTILINE)
        return 1024 * int(kilobytes[1]) / NUM_LOCAL_PROCESSES if kilobytes else None
    return None


def check_memory(config: Config, model: Model, training: bool) -> int:
    """Print how much memory the run will need, and return the size of its KV cache in tokens.
    Raises ValueError if the run does not fit. The message says with which flags it would, if any.
    """
    memory = memory_needed(config, model, training)
    free, main_free = free_memory(config.device), free_memory("cpu")
    cache_tokens = choose_cache_tokens(config, memory, free)
    device_bytes, cpu_bytes = memory.peak(cache_tokens), sum(memory.cpu.values())
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters in {config.dtype} on {config.device}")
    print(f"Estimated memory in GB: at most {gigabytes(device_bytes)} on {config.device}")
    largest_cache = max(cache_tokens, memory.least_cache)
    rollout = {name: size * largest_cache for name, size in memory.rollout.items()}
    parts = {
        "always": memory.always,
        f"while sampling, with a KV cache of {largest_cache:,} tokens": rollout,
        "while updating": memory.update,
        "in main memory": memory.cpu,
    }
    for title, sizes in parts.items():
        if sizes:
            print(f"  {title}: {list_gigabytes(sizes)}")
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    in_float32 = config.device == "cpu" and config.dtype == "float32"
    if has_amx and in_float32 and not is_tiny(config.model):
        print("This processor multiplies bfloat16 matrices: --dtype bfloat16 may be faster")

    device_name = "main memory" if config.device == "cpu" else f"memory on {config.device}"
    needs = [(device_name, device_bytes, free), ("main memory", cpu_bytes, main_free)]
    lacking = [
        f"{gigabytes(needed)} GB of {name}, where {gigabytes(usable)} GB can be used"
        for name, needed, usable in needs
        if usable is not None and needed > usable
    ]
    if lacking:
        hint = what_would_fit(config, model, training, free, main_free)
        raise ValueError(f"the run needs {' and '.join(lacking)}; {hint}")
    return cache_tokens


def choose_cache_tokens(config: Config, memory: Memory, free: float | None) -> int:
    """The size of the KV cache in tokens: --cache-tokens or, without it, what fits on a GPU, and
    65,536 on other devices."""
    if config.cache_tokens or free is None or not config.device.startswith("cuda"):
        return config.cache_tokens or 65_536
    free_for_cache = free - sum(memory.always.values())
    return max(memory.least_cache, int(free_for_cache / memory.per_cache_token))


def smaller_configs(config: Config, training: bool) -> Iterator[Config]:
    """Variants of the settings that may need less memory, in the order in which they are preferred:
    the settings themselves, those with harmless changes (which change the result at most by
    rounding), and those with a costly change as well. Then all of these again, in bfloat16."""
    harmless: list[dict[str, Any]] = [{}]
    costly: list[dict[str, Any]] = [{}]  # These change the result of the run.
    adapters = {"lora_rank": 32, "lr": 10 * config.lr}  # They need a higher learning rate.
    if training:  # Offloading saves memory of the device; not offloading saves main memory.
        toggled = {"offload": not config.offload}
        harmless += [{"checkpointing": True}, toggled, {"checkpointing": True, **toggled}]
        if not config.lora_rank:
            costly += [{"beta": 0.0}, adapters]
    for dtype, cost, change in itertools.product([config.dtype, "bfloat16"], costly, harmless):
        yield replace(config, dtype=dtype, **cost, **change)


def fit_memory(
    config: Config, model: Model, training: bool, free: float | None, main_free: float | None
) -> Config | None:
    """The first of the `smaller_configs` that fits, perhaps with a lower cache_tokens; None if none
    does. free, main_free: the bytes that can be used on the device and in main memory, or None if
    they are not known."""
    for smaller in smaller_configs(config, training):
        memory = memory_needed(smaller, model, training)
        if main_free is not None and sum(memory.cpu.values()) > main_free:
            continue
        cache_tokens = choose_cache_tokens(smaller, memory, free)
        if free is None or memory.peak(cache_tokens) <= free:
            return smaller
        free_for_cache = free - sum(memory.always.values())
        lower = int(free_for_cache / memory.per_cache_token) // 1000 * 1000
        lower = min(cache_tokens, max(lower, memory.least_cache))
        if memory.peak(lower) <= free:
            return replace(smaller, cache_tokens=lower)
    return None


def what_would_fit(
    config: Config, model: Model, training: bool, free: float | None, main_free: float | None
) -> str:
    """A hint for a run that does not fit: flags with which it fits or, if none of those that are
    tried suffice, the least that it needs."""
    smaller = fit_memory(config, model, training, free, main_free)
    if smaller:
        return f"it fits with {flags_for(smaller, config)}"
    estimates = [memory_needed(c, model, training) for c in smaller_configs(config, training)]
    least = min(estimates, key=lambda memory: memory.peak(memory.least_cache))
    needs = f"{gigabytes(least.peak(least.least_cache))} GB"
    if least.cpu:
        needs += f" and {gigabytes(sum(least.cpu.values()))} GB of main memory"
    shorter = "--max-new-tokens or --group-size" if training else "--max-new-tokens"
    return f"it needs at least {needs}; use a lower {shorter}, or a smaller model"


def gigabytes(size: float) -> str:
    """Bytes as a number of gigabytes (10**9 bytes), to three digits, or to whole gigabytes."""
    return f"{size / 1e9:.3g}" if size < 100e9 else f"{size / 1e9:,.0f}"


def list_gigabytes(sizes: dict[str, float]) -> str:
    """The sizes of several things in gigabytes, for example "weights 3.09, moments 12.3"."""
    return ", ".join(f"{name} {gigabytes(size)}" for name, size in sizes.items())


# Upper bounds for what conversations take on the disk. (Those of SmolLM2, on both tasks, took about
# 4.5 bytes of JSON text per token, and 400 bytes for names of fields and verdicts.)
TEXT_BYTES = 5  # per token
FIELD_BYTES = 500  # per conversation
QUESTION_TOKENS = 512  # the assumed length of a question, unless max_new_tokens is higher


def check_disk(
    config: Config, model: Model, folder: Path, num_problems: int, num_searched: int
) -> None:
    """Print how much a training run will write at most. Raises ValueError if the disk has less free
    space than that. What the folder of a resumed run holds already is counted as free."""
    T = config.max_new_tokens
    # A turn is written as text and as token ids. A conversation has the fields of the problem, a
    # context (the question again, and the attempt), and three turns; a failure has a context
    # without the attempt, and one turn.
    turn = T * (TEXT_BYTES + len(f"{model.vocab_size}, "))
    # Questions that leave no room for three turns in the model's context are dropped.
    longest_question = max(T, model.context_length - 3 * T)  # in tokens
    question = min(max(T, QUESTION_TOKENS), longest_question) * TEXT_BYTES
    conversation = FIELD_BYTES + 2 * question + T * TEXT_BYTES + 3 * turn
    failure = FIELD_BYTES + 2 * question + turn
    logged = min(config.batch_size, config.log_failures or config.batch_size) * config.group_size
    weights = sum(p.numel() for p in model.parameters()) * getattr(torch, config.dtype).itemsize
    failures = num_searched * failure
    if config.failures and Path(config.failures).is_file():
        failures = Path(config.failures).stat().st_size
    sizes = {  # While a checkpoint is replaced, there are two.
        "two checkpoints": 2 * 12 * count_trained(config, model),
        "the trained model": weights,
        "samples.jsonl": config.steps * logged * conversation,
        "failures.jsonl": failures,
        "vanilla.jsonl and trained.jsonl": 2 * num_problems * config.num_samples * conversation,
    }
    total = sum(sizes.values())
    print(f"Disk: at most {gigabytes(total)} GB: {list_gigabytes(sizes)}")
    existing = next(path for path in [folder, *folder.absolute().parents] if path.is_dir())
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(existing).free + written
    if total > free:
        hints = ["use another disk"]
        if sizes["samples.jsonl"] > 0.1 * total:
            hints.append("a lower --log-failures")
        if sizes["two checkpoints"] > 0.1 * total and not config.lora_rank:
            hints.append(f"--lora-rank 32 --lr {10 * config.lr:g}")
        needs = f"up to {gigabytes(total)} GB, but only {gigabytes(free)} GB are free for {folder}"
        raise ValueError(f"the run writes {needs}; {' or '.join(hints)}")


# -- The commands ----------------------------------------------------------------------------------
def load_agent(config: Config, task: Task, training: bool = False) -> Agent:
    """The model with its tokenizer and the task. Raises ValueError if the memory does not suffice,
    or if model and tokenizer do not fit together."""
    select_device(config)
    cache_tokens = check_memory(config, load_shapes(config, task), training)
    gather([])  # No process takes memory before all of them have measured what is free.
    path = model_path(config, task)
    model = Model.from_pretrained(path, getattr(torch, config.dtype), config.device)
    tokenizer = Tokenizer.from_pretrained(path)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, but its model has "
            f"embeddings for {model.vocab_size}"
        )
    # is_tiny recognizes a tiny model only in a local folder, not on the hub.
    if tokenizer.settings.get("tiny") and not isinstance(task, TinyCountdown):
        raise ValueError(f"{path}: this is a tiny model; download it, and pass its folder")
    model.vocab_size = tokenizer.vocab_size  # Compute no logits for padding of the embeddings.
    return Agent(
        model, tokenizer, task, max_new_tokens=config.max_new_tokens, seed=config.seed,
        temperature=config.temperature, cache_tokens=cache_tokens,
    )  # fmt: skip


def drop_long_problems(agent: Agent, problems: list) -> list:
    """The problems whose conversations are sure to fit into the model's context. The number of the
    others is printed. Raises ValueError if none fits."""
    max_length = max_prompt_length(agent, turns=grpo.MAX_TURNS)
    fitting = [p for p in problems if grpo.prompt_length(agent, p) <= max_length]
    if not fitting:
        raise ValueError("no problem fits into the model's context; use a lower --max-new-tokens")
    if len(fitting) < len(problems):
        dropped = plural(len(problems) - len(fitting), "problem")
        print(f"Dropped {dropped} that might not fit into the model's context")
    return fitting


def max_prompt_length(agent: Agent, turns: int) -> int:
    """The largest `grpo.prompt_length` that leaves room for `turns` turns in the context."""
    instructions = agent.task.reflection_instruction, agent.task.retry_instruction
    bridges = sum(len(agent.tokenizer.bridge(text)) for text in instructions)
    return agent.model.context_length - turns * agent.max_new_tokens - bridges


def plural(count: int, noun: str) -> str:
    """1 problem, 2 problems"""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class LogLines(tqdm):
    """A progress bar for a log file, where a line cannot be overwritten: a new line each minute."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        self.fp.write(f"{self}\n")


def progress_bar(*args: Any, **options: Any) -> tqdm:
    """A tqdm progress bar, or `LogLines` if the output is not a terminal."""
    if sys.stderr.isatty():
        return tqdm(*args, **options)
    line = "{desc}: {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left{postfix}"
    return LogLines(*args, **options, bar_format=line, mininterval=60, maxinterval=60)


def train_command(config: Config, folder: Path) -> None:
    """Evaluate a model, train it with R3, and evaluate it again. Without any flags, this is the
    whole experiment with a tiny model made from scratch."""
    start_time = time.time()
    if config.temperature == 0:
        raise ValueError(
            "--temperature 0 makes the reflections of a group equal, so there is nothing to compare"
        )
    # A resumed run that has its own copy of the failures does not need the file of --failures.
    has_failures = (folder / "failures.jsonl").exists()
    if config.failures and not has_failures and not Path(config.failures).is_file():
        raise FileNotFoundError(f"--failures {config.failures}: there is no such file")
    task = load_task(config)
    problems = load_problems(config, task, config.split, config.limit)  # to evaluate on
    to_search = []  # the problems on which to search for failures
    if not config.failures:
        to_search = load_problems(config, task, "train", config.num_problems)
    select_device(config)  # before the tiny model is made, which takes minutes
    shapes = load_shapes(config, task)
    check_disk(config, shapes, folder, len(problems), len(to_search))
    vanilla = load_agent(config, task, training=True)
    problems = drop_long_problems(vanilla, problems)
    failures = collect_failures(config, vanilla, problems, to_search, folder)
    before = evaluate(vanilla, problems, config.num_samples, "vanilla", folder / "vanilla.jsonl")

    policy, reference = copy_for_training(vanilla, config)
    curve_problems = problems[:CURVE_PROBLEMS]
    curve_steps = {round(config.steps * i / config.curve) for i in range(1, config.curve)}
    curve_steps -= {0, config.steps}  # These ends of the curve are evaluated anyway.
    print(f"Training on {plural(len(failures), 'failure')}")
    durations = []
    # grpo.train logs the metrics after each pass of this loop, with what is added to them here.
    for step, metrics in grpo.train(policy, reference, failures, config, folder):
        if step == 0:
            metrics |= curve_point(config, curve_problems, before)
            continue
        if step in curve_steps:
            evaluation_start = time.time()
            samples = min(CURVE_SAMPLES, config.num_samples)
            conversations = evaluate(policy, curve_problems, samples, f"step {step}")
            metrics |= curve_point(config, curve_problems, conversations)
            metrics["seconds"]["evaluation"] = time.time() - evaluation_start
        durations.append(sum(metrics["seconds"].values()))
        remaining = (config.steps - step) * sum(durations) / len(durations)
        print(step_line(step, metrics, config.steps, remaining), flush=True)
    if is_rank_0():
        policy.tokenizer.save_pretrained(folder / "model")
        policy.model.save_pretrained(folder / "model")

    path = folder / "trained.jsonl"
    after = evaluate(policy, problems, config.num_samples, "trained", path, config.steps)
    if is_rank_0():
        last_point = curve_point(config, curve_problems, after)
        append_jsonl(folder / "metrics.jsonl", {"step": config.steps, **last_point})
        report(config, folder, {"vanilla": before, "trained": after})
        print(what_was_learned(folder, config))
        plot_command([folder])
        if not config.keep_checkpoint:
            (folder / "checkpoint.safetensors").unlink(missing_ok=True)
        print(f"This took {duration(time.time() - start_time)}. The results are in {folder}/")


def collect_failures(
    config: Config, vanilla: Agent, problems: list, to_search: list, folder: Path
) -> list[Conversation]:
    """The failures to train on: those of --failures, or else those found on the problems
    `to_search`. They are kept in the run's folder, where a resumed run finds them. problems: those
    that the run evaluates. Raises ValueError if there are no failures."""
    path = folder / "failures.jsonl"
    is_whole = path.exists() and path.read_bytes().endswith(b"\n")  # It has not been cut off.
    if is_whole and has_all_failures(folder):  # The run is resumed.
        write_config(folder, "train", config)  # It may have been given other settings.
        return load_conversations(path, vanilla)
    if not config.failures:
        to_search = drop_long_problems(vanilla, to_search)
        write_config(folder, "train", config)  # From here on, the run can be resumed.
        failures = find_failures(vanilla, to_search, config.max_attempts, path)
    else:
        source = path if path.exists() else Path(config.failures)
        failures = usable_failures(source, vanilla, problems)
    if not failures:
        raise ValueError("there are no failures to learn from")
    write_config(folder, "train", config)  # Without usable failures, there is no run to resume.
    # Training permutes the failures in this order. So a new run with --failures and this file draws
    # them in the same sequence, if it has the same seed. (A process that reads the failures after
    # another one has written them here finds the same ones, because none is left to be dropped.)
    write_conversations(path, failures, vanilla)
    return failures


def copy_for_training(vanilla: Agent, config: Config) -> tuple[Agent, Model | None]:
    """The policy to train, and the reference model for the KL term (None with --beta 0)."""
    reference = vanilla.model if config.beta else None
    if config.lora_rank:
        adapted_model = vanilla.model.with_lora(config.lora_rank, config.seed)
        return replace(vanilla, model=adapted_model), reference
    if config.beta:
        return replace(vanilla, model=copy.deepcopy(vanilla.model)), reference
    return vanilla, None  # The vanilla model is no longer needed.


def curve_point(
    config: Config, problems: list, conversations: list[Conversation]
) -> dict[str, list[float]]:
    """The accuracies of a point of the learning curve: those on `problems`, with CURVE_SAMPLES
    attempts each. `conversations` may have more problems and attempts, which are left out. If
    --curve is 0, the result is {}."""
    if config.curve == 0:
        return {}
    ids = {problem.id for problem in problems}
    chosen = [c for c in conversations if c.problem.id in ids and c.attempt_index < CURVE_SAMPLES]
    return accuracy({"model": chosen})["model"]


def step_line(step: int, metrics: dict[str, Any], steps: int, seconds_left: float) -> str:
    """What is printed about a training step."""
    parts = [
        f"step {step}/{steps}",
        f"reward {metrics['reward']:.2f}",
        f"mixed groups {metrics['mixed_groups']:.0%}",
        f"{metrics['reflection_tokens']:.0f} tokens per reflection",
        f"truncated {metrics['truncated']:.0%}",
    ]
    if "kl" in metrics:
        parts.append(f"KL {metrics['kl']:.2g}")
    if "within two" in metrics:
        parts.append(f"within two {metrics['within two'][0]:.1%}")
    parts += [f"{name} {seconds:.1f} s" for name, seconds in metrics["seconds"].items()]
    return ", ".join([*parts, f"{duration(seconds_left)} left"])


def duration(seconds: float) -> str:
    """45 seconds, 6.4 minutes, 3.2 hours"""
    if seconds < 60:
        return plural(round(seconds), "second")
    return f"{seconds / 60:.1f} minutes" if seconds < 3_600 else f"{seconds / 3_600:.1f} hours"


def what_was_learned(folder: Path, config: Config) -> str:
    """A sentence about the training: how many groups taught something, and how many reflections
    were truncated."""
    steps = [record for record in read_jsonl(folder / "metrics.jsonl") if "reward" in record]
    num_groups = sum(record["sampled_groups"] for record in steps)
    # mixed_groups is a fraction of sampled_groups.
    num_mixed = round(sum(r["sampled_groups"] * r["mixed_groups"] for r in steps))
    text = f"{num_mixed:,} of {num_groups:,} groups had mixed rewards"
    if num_mixed == 0:
        text += ", so there was nothing to learn from, and the weights did not change"
    truncated = grpo.mean([record["truncated"] for record in steps])
    limit = f"--max-new-tokens {config.max_new_tokens}"
    return f"{text}; {truncated:.1%} of the reflections were truncated at {limit}."


def failures_command(config: Config, folder: Path) -> None:
    """Collect problems that a model gets wrong, each with a wrong attempt, for train --failures."""
    task, path = load_task(config), folder / "failures.jsonl"
    problems = load_problems(config, task, "train", config.num_problems)
    agent = load_agent(config, task)
    problems = drop_long_problems(agent, problems)
    write_config(folder, "failures", config)
    failures = find_failures(agent, problems, config.max_attempts, path)
    print(f"Found failures on {len(failures)} of {plural(len(problems), 'problem')}: see {path}")


def eval_command(config: Config, folder: Path) -> None:
    """Evaluate a model: measure its accuracy on the first try and within two tries. For the model
    of a training run, runs/NAME/model, the task, the data, the seed and the sampling are those of
    the run, unless flags change them."""
    task = load_task(config)
    problems = load_problems(config, task, config.split, config.limit)
    agent = load_agent(config, task)
    problems = drop_long_problems(agent, problems)
    write_config(folder, "eval", config)
    path = folder / "conversations.jsonl"
    conversations = evaluate(agent, problems, config.num_samples, "eval", path)
    report(config, folder, {"model": conversations})
    print(f"The conversations are in {path}")


def report(config: Config, folder: Path, by_model: dict[str, list[Conversation]]) -> None:
    """Write report.json and print its tables: the accuracy, and how often the verifier gave each
    reason."""
    ids = {c.problem.id for conversations in by_model.values() for c in conversations}
    title = f"{plural(len(ids), 'problem')}, {plural(config.num_samples, 'sample')} each, "
    title += f"temperature {config.temperature:g}: % correct [95% interval]"
    reasons: dict[str, Counter] = {}
    for name, conversations in by_model.items():
        attempts = [(c.attempt, c.attempt_verdict) for c in conversations]
        retries = [(c.retry, c.retry_verdict) for c in conversations if c.retry]
        for label, answers in (("1st try", attempts), ("retry", retries)):
            counts = reasons[f"{name}, {label}"] = Counter(v.reason for _, v in answers)
            if num_truncated := sum(turn.truncated for turn, _ in answers):
                counts["of these, truncated"] = num_truncated  # also counted under their reasons
    tables = {title: accuracy(by_model), "The verifier's reasons": reasons}
    replace_file(folder / "report.json", json.dumps({"tables": tables}, indent=2))
    print("\n" + markdown(tables))


def play_command(config: Config) -> None:
    """Type a problem, and watch a model attempt it, reflect and retry."""
    task = load_task(config)
    config = replace(config, cache_tokens=1)  # as small as possible: for one conversation
    agent = load_agent(config, task)
    decode = agent.tokenizer.decode
    problems, count = None, 0
    print(f"The model is {config.model}. Type {agent.task.input_format}.")
    print(f"A number alone selects a problem of the {config.split} split. An empty line quits.")
    while line := input("> ").strip():
        count += 1
        rng_prefix = (grpo.PLAY, count)  # A repeated problem gets new random numbers.
        try:
            if line.isdecimal():
                if problems is None:
                    loaded = load_problems(config, task, config.split, None)
                    problems = drop_long_problems(agent, loaded)
                if int(line) >= len(problems):
                    raise ValueError(f"the problems are numbered from 0 to {len(problems) - 1}")
                problem = problems[int(line)]
            else:
                [problem] = drop_long_problems(agent, [agent.task.parse_input(line)])
            [conversation] = attempt_all(agent, [problem], 1, rng_prefix)
        except (ValueError, OSError) as error:
            print(f"  {error}")
            continue
        messages, tools = agent.task.messages(problem)
        for tool in tools or []:
            print_turn("tool", json.dumps(tool["function"], ensure_ascii=False), DIM)
        for message in messages:
            print_turn(message["role"], message["content"], DIM)
        attempt, verdict = conversation.attempt, conversation.attempt_verdict
        print_turn("attempt", decode(attempt.tokens), "", attempt.truncated, verdict.reason)
        if not verdict.correct:
            [[conversation]] = rollout(agent, [conversation], 1, rng_prefix)
            reflection, retry = conversation.reflection, conversation.retry
            reason = conversation.retry_verdict.reason
            print_turn("reflection", decode(reflection.tokens), "", reflection.truncated)
            print_turn("retry", decode(retry.tokens), "", retry.truncated, reason)


def show_command(folder: Path | None, step: int | None, limit: int) -> None:
    """Read what was sampled at a step: the reflections, their advantages, and the retries. Groups
    with mixed rewards, the ones that R3 learns from, come first. On a terminal, reflections with a
    positive advantage are green, those with a negative one red, and what is not trained is dim."""
    folder = folder or newest_file("**/samples.jsonl").parent
    # `train` writes the first of these files, and `eval` the second.
    paths = [folder / name for name in ("samples.jsonl", "conversations.jsonl")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} is not the folder of a train or eval run with samples")
    groups: dict[str, list[dict]] = {}  # by what comes before the reflections (or the attempts)
    all_records = read_jsonl(path, "reflection_index", "context", "attempt_verdict")
    for record_step, records in itertools.groupby(all_records, lambda record: record.get("step")):
        if step in (None, record_step):  # Without --step, the last step replaces the others.
            groups, step_shown = defaultdict(list), record_step
            for record in records:
                groups[record["context"]].append(record)
    if not groups:
        raise ValueError(f"{path} has no step {step}")
    at_step = "" if step_shown is None else f", step {step_shown}"
    print(f"{path}{at_step}: {plural(len(groups), 'group')}\n")
    # Only groups with mixed rewards have advantages other than 0.
    ordered = sorted(groups.values(), key=lambda group: not any(r.get("advantage") for r in group))
    for group in ordered[:limit]:
        print_turn("context", group[0]["context"], DIM)
        if "reflection" in group[0]:  # The context has shown the attempt. Its verdict follows.
            attempt, reason = group[0]["attempt"], group[0]["attempt_verdict"]["reason"]
            print_turn("", "", DIM, attempt["truncated"], reason)
        for record in group:
            show_record(record)
        print()


def show_record(record: dict) -> None:
    """Print what follows the context: the attempt, or a reflection and a retry."""
    if "reflection" not in record:
        attempt, reason = record["attempt"], record["attempt_verdict"]["reason"]
        print_turn("attempt", attempt["text"], "", attempt["truncated"], reason)
        return
    advantage, label, color = record.get("advantage"), "reflection", ""
    if advantage is not None:
        label = f"{advantage:+.2f} reflection"
        color = GREEN if advantage > 0 else RED if advantage < 0 else ""
    reflection, retry = record["reflection"], record["retry"]
    print_turn(label, reflection["text"], color, reflection["truncated"])
    reason = record["retry_verdict"]["reason"]
    print_turn("retry", retry["text"], DIM, retry["truncated"], reason)


DIM, GREEN, RED = "2", "32", "31"  # ANSI codes


def print_turn(
    label: str, text: str, color: str = "", truncated: bool = False, reason: str = ""
) -> None:
    """Print a turn with its label, and after it the verifier's reason and whether it was truncated.
    It is wrapped to the terminal's width, and in color if stdout is a terminal. Control characters,
    which a terminal would interpret, are replaced by spaces."""
    notes = [note for note in (reason, "truncated" if truncated else "") if note]
    if notes:
        text += f"   <- {', '.join(notes)}"
    width = max(40, shutil.get_terminal_size((100, 24)).columns)
    colored = color and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for line in text.strip().splitlines() or [""]:
        line = "".join(character if character.isprintable() else " " for character in line)
        start = f"{label:>20}  "
        line = textwrap.fill(line, width, initial_indent=start, subsequent_indent=" " * 22)
        line = line or start.rstrip()  # textwrap returns "" for an empty line, even with a label.
        print(f"\033[{color}m{line}\033[0m" if colored else line)
        label = ""  # Only the first line has the label.


PANELS = {  # the metrics that are plotted, with the titles of their panels
    "within two": "correct within two tries (95% interval)",
    "1st try": "correct on the first try (95% interval)",
    "reward": "mean reward",
    "reflection_tokens": "tokens per reflection",
    "kl": "KL from the vanilla model, per token",
    "mixed_groups": "fraction of groups with mixed rewards",
}


def plot_command(folders: list[Path]) -> None:
    """Plot the curves of a training run to curves.png, or those of several runs for comparison."""
    from matplotlib.figure import Figure  # imported here because most commands do not need it

    folders = folders or [newest_file("**/samples.jsonl").parent]
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            raise FileNotFoundError(f"{folder} is not the folder of a training run with metrics")
    path = folders[0] / "curves.png" if len(folders) == 1 else Path("curves.png")
    names = [folder.name for folder in folders]
    labels = names if len(set(names)) == len(names) else map(str, folders)
    runs = {
        label: list(read_jsonl(folder / "metrics.jsonl", "step"))
        for label, folder in zip(labels, folders, strict=True)
    }
    measured = {name for records in runs.values() for record in records for name in record}
    panels = [name for name in PANELS if name in measured]
    if not panels:
        raise ValueError(f"{folders[0]} has no metrics to plot yet")
    rows, columns = math.ceil(len(panels) / 3), min(3, len(panels))
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    for i, name in enumerate(panels, 1):
        axis = figure.add_subplot(rows, columns, i)
        for run, records in runs.items():
            # A point is (step, value) or (step, mean, low, high).
            points = [(r["step"], *np.ravel(r[name])) for r in records if name in r]
            if points:
                x, y, *bounds = np.array(points).T  # bounds: low and high, if there is an interval
                distances = [y - bounds[0], bounds[1] - y] if bounds else None
                line_format = "o-" if bounds or len(points) == 1 else "-"
                axis.errorbar(x, y, distances, fmt=line_format, capsize=3, label=run)
        axis.set(title=PANELS[name], xlabel="step", ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if len(folders) > 1:
        curves = figure.axes[0].get_legend_handles_labels()
        figure.legend(*curves, loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=110)
    print(f"The curves are in {path}")


# -- The run's folder ------------------------------------------------------------------------------
@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make a run's folder, and lock it within a `with` block, so that no other process can use it.
    The operating system releases the lock even if the process is killed. Raises ValueError if
    another process has the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        hint = "wait until it has finished, or use another folder"
        raise ValueError(f"another process is using {folder}; {hint}") from None
    try:
        yield
    finally:
        if [path.name for path in folder.iterdir()] == [".lock"]:  # The command wrote no file.
            with suppress(OSError):  # Windows does not delete an open file.
                (folder / ".lock").unlink()
                folder.rmdir()
                RUNS.rmdir()  # This fails if there are other runs.
        lock.release()


def delete_temporary_files(folder: Path) -> None:
    """Delete the temporary files that a killed process left in the folder of its run."""
    for directory in (folder, folder / "model"):
        # The last pattern is that of the safetensors library.
        for pattern in ("*.json.tmp", "*.jsonl.tmp", "*.safetensors.tmp", ".tmp??????"):
            for leftover in directory.glob(pattern):
                leftover.unlink()


def new_folder(command: str, config: Config) -> Path:
    """The folder of a new run: --name, or else a unique name that is made from the time."""
    if config.name:
        return RUNS / config.name
    name = f"{command}-{config.task}-{time.strftime('%Y%m%d-%H%M%S')}"
    RUNS.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):  # Another run started in the same second.
            folder.mkdir()
            return folder


def newest_file(pattern: str) -> Path:
    """The newest file in runs/ that matches a pattern. Raises FileNotFoundError if none does."""
    path = max(RUNS.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)
    if path is None:
        name = pattern.removeprefix("**/")
        raise FileNotFoundError(f"no run in {RUNS}/ has {name} yet; to make one: {program()} train")
    return path


def write_config(folder: Path, command: str, config: Config) -> None:
    """Write config.json: the command, all its settings, and the version of torch. The file makes
    its folder the folder of a run, so the folder is printed when the file is new."""
    if not (folder / "config.json").exists():
        print(f"The folder of this run is {folder}/")
    record = {"command": command, **asdict(config), "torch": torch.__version__}
    replace_file(folder / "config.json", json.dumps(record, indent=2))


def load_config(folder: Path, command: str) -> Config:
    """The settings of the run in a folder. Settings that were added since the run was made, and are
    missing from its config.json, have their defaults. Raises ValueError if the run belongs to
    another command, or has settings that are unknown to this version."""
    path = folder / "config.json"
    record = read_json(path)
    record.pop("torch", None)
    if record.pop("command", None) != command:
        raise ValueError(f"{folder} is not a run of the command {command}")
    unknown = record.keys() - SETTINGS.keys()
    if unknown:
        names = ", ".join(sorted(unknown))
        raise ValueError(f"{path} has settings of another version of this code: {names!r}")
    Config(**record)  # This checks the values, before default_config opens the model's folder.
    return replace(default_config(record.get("model", "tiny")), **record)


def check_resumable(folder: Path, config: Config) -> None:
    """Raise ValueError if a training run's checkpoint was deleted at its end, or has been lost."""
    metrics, checkpoint = folder / "metrics.jsonl", folder / "checkpoint.safetensors"
    if checkpoint.exists() or not metrics.exists():
        return
    if (folder / "report.json").exists():
        raise ValueError(f"{folder} has finished; its results are in {folder / 'report.json'}")
    # Without a checkpoint, a run starts again at step 0. That is right if it was interrupted before
    # its first checkpoint was saved. But if there are metrics of step save_every + 1, a checkpoint
    # was saved before them, and has been lost.
    steps = metrics.read_bytes().count(b"\n") - 1  # There is also a line for step 0.
    if steps > config.save_every:
        raise ValueError(
            f"{checkpoint} is missing, so the run cannot be resumed; to start a new run from its "
            f"failures: {restart_command(config, folder)}"
        )


def resumed_config(folder: Path, command: str, flags: dict[str, Any]) -> Config:
    """The settings of a run that is resumed, with the given flags. Raises ValueError for a flag
    that could change the result, and OSError or ValueError if the run cannot be resumed."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--resume {folder}: this is not the folder of a run")
    config = load_config(folder, command)
    refused = [flag_name(name) for name in flags if name not in RESUME_FLAGS]
    if refused:
        allowed = ", ".join(map(flag_name, RESUME_FLAGS))
        message = f"{', '.join(refused)} cannot be given with --resume, which uses the settings of "
        message += f"the run; it allows only {allowed}"
        # With another model, for example, the failures of this run would be the wrong ones.
        training_flags = {*FLAG_GROUPS["training"][1].split(), *RESUME_FLAGS} - {"failures"}
        if command == "train" and has_all_failures(folder) and training_flags >= flags.keys():
            again = restart_command(config, folder, **flags)
            message += f"; to start a new run from the run's failures: {again}"
        raise ValueError(message)
    if command == "train":
        check_resumable(folder, config)
    return replace(config, **flags)


def has_all_failures(folder: Path) -> bool:
    """Whether a training run has all its failures. (The search for them adds to their file. What
    comes next is the evaluation of the vanilla model.)"""
    return (folder / "vanilla.jsonl").exists()


def resume_command(command: str, folder: Path) -> str:
    """The command that resumes an interrupted run."""
    return f"{program()} {command} --resume {shlex.quote(str(folder))}"


def restart_command(config: Config, folder: Path, **changes: Any) -> str:
    """The command that starts a new run with a run's settings, some changes, and its failures. LoRA
    adapters get ten times the learning rate of all weights, unless the changes contain another."""
    lora_rank = changes.get("lora_rank", config.lora_rank)
    if bool(lora_rank) != bool(config.lora_rank):
        changes.setdefault("lr", 10 * config.lr if lora_rank else config.lr / 10)
    changes |= {"failures": str(folder / "failures.jsonl"), "name": None}
    config = replace(config, **changes)
    # The default of --lr depends on --lora-rank.
    default_lr = new_config({"model": config.model, "lora_rank": config.lora_rank}).lr
    defaults = replace(default_config(config.model), lr=default_lr)
    return f"{program()} train {flags_for(config, defaults)}"


def flags_for(config: Config, defaults: Config) -> str:
    """The flags that turn some defaults into these settings."""
    flags = []
    for name, value in asdict(config).items():
        if value == getattr(defaults, name) or value is None:  # No flag can set None.
            continue
        if isinstance(value, bool):
            flags.append(flag_name(name) if value else flag_name(f"no_{name}"))
        else:
            text = f"{value:.15g}" if isinstance(value, float) else str(value)
            flags.append(f"{flag_name(name)} {shlex.quote(text)}")
    return " ".join(flags)


def memory_advice(command: str, config: Config | None, folder: Path | None) -> str:
    """What to do after a command ran out of memory."""
    if command == "train" and has_all_failures(folder):
        # On a CPU, --offload would only add copies in the same memory.
        useful = ("checkpointing",) if config.device == "cpu" else ("checkpointing", "offload")
        savings = [name for name in useful if not getattr(config, name)]
        if savings:
            flags = " ".join(map(flag_name, savings))
            return f"to resume with less: {resume_command(command, folder)} {flags}"
        if not config.lora_rank:
            again = restart_command(config, folder, lora_rank=32)
            return f"to train adapters instead of all weights: {again}"
    flags = "--max-new-tokens"
    if command != "play":
        flags += " or --cache-tokens"
    if command == "train":
        flags += " or --group-size"
    return f"use a lower {flags}"


def is_tiny(model: str) -> bool:
    """Whether --model is "tiny", or the folder of a trained tiny model."""
    if model == "tiny":
        return True
    settings = Path(model) / "tokenizer_config.json"
    return settings.is_file() and "tiny" in read_json(settings)


def default_config(model: str) -> Config:
    """The defaults for a model: a tiny one, or a pretrained one."""
    return TINY if is_tiny(model) else PRETRAINED


def new_config(flags: dict[str, Any]) -> Config:
    """The settings of a new run: the defaults for its model, and the given flags. LoRA adapters
    are trained with ten times the learning rate, unless --lr is given."""
    config = replace(default_config(flags.get("model", "tiny")), **flags)
    if config.lora_rank and "lr" not in flags:
        config = replace(config, lr=10 * config.lr)
    return config


# What `play` and `eval` take from the run that trained their model.
SETTINGS_OF_MODEL = (
    "task", "data", "seed", "dtype", "temperature", "max_new_tokens", "num_samples",
)  # fmt: skip


def config_of_model(flags: dict[str, Any]) -> Config:
    """The settings of `play` and `eval`: the given flags, some settings of the run that trained the
    model, if there is one, and defaults."""
    model = flags.get("model", "tiny")
    path = Path(model).parent / "config.json"
    settings = {}
    if Path(model).name == "model" and path.is_file():
        record = read_json(path)
        if record.get("command") == "train":
            settings = {name: record[name] for name in SETTINGS_OF_MODEL if name in record}
    if flags.get("task", settings.get("task")) != settings.get("task"):
        settings.pop("data", None)  # The run's problems are those of another task.
    return replace(default_config(model), **{**settings, **flags})


# -- The command line ------------------------------------------------------------------------------
COMMANDS = {
    "train": train_command, "failures": failures_command, "eval": eval_command,
    "play": play_command, "show": show_command, "plot": plot_command,
}  # fmt: skip
RESUMABLE = ("train", "failures")
# Settings that change the result at most by rounding, so that they can be given with --resume.
RESUME_FLAGS = (
    "device", "offload", "checkpointing", "cache_tokens", "save_every", "keep_checkpoint",
)  # fmt: skip
TRAIN_FLAGS = " ".join(field.name for field in fields(grpo.TrainConfig))
FLAG_GROUPS = {  # title in --help: (the commands that have these flags, the settings they set)
    "model and task": ("train failures eval play", "model task data seed device dtype"),
    "sampling": ("train failures eval", "temperature max_new_tokens cache_tokens"),
    "sampling and problems": ("play", "temperature max_new_tokens split"),
    "run": ("train failures eval", "name"),
    "evaluation": ("train eval", "split limit num_samples"),
    "search for failures": ("train failures", "num_problems max_attempts"),
    "training": ("train", f"failures lora_rank {TRAIN_FLAGS} curve keep_checkpoint"),
}


def add_flags(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the flags of a command, in groups. Their defaults are in TINY and PRETRAINED."""
    for title, (commands, names) in FLAG_GROUPS.items():
        if command not in commands.split():
            continue
        group = parser.add_argument_group(title)
        for name in names.split():
            setting = SETTINGS[name]
            default, other_default = getattr(TINY, name), getattr(PRETRAINED, name)
            if default != other_default:
                default = f"{default} with the tiny model, else {other_default}"
            help_text = f"{setting.help} (default: {default})"
            help_text = setting.help if default is None else help_text
            options = {"type": setting.type, "metavar": setting.type.__name__.upper()}
            if setting.type is bool:
                options = {"action": argparse.BooleanOptionalAction}
            elif setting.choices or name == "task":
                options = {"choices": setting.choices or list(TASKS)}
            group.add_argument(flag_name(name), help=help_text, **options)


def read_command_line(argv: list[str] | None) -> dict[str, Any]:
    """Parse the command line into a dict that holds the command and the flags that were given."""
    parser = argparse.ArgumentParser(prog=program(), description="Train a model to reflect (R3).")
    subparsers = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for command, function in COMMANDS.items():
        subparser = subparsers.add_parser(
            command, argument_default=argparse.SUPPRESS, help=function.__doc__,
            description=function.__doc__,
        )  # fmt: skip
        add_flags(subparser, command)
        if command in RESUMABLE:
            help_text = "resume the interrupted run in this folder; it keeps its settings"
            subparser.add_argument("--resume", type=Path, metavar="FOLDER", help=help_text)
    show, plot = subparsers.choices["show"], subparsers.choices["plot"]
    help_text = "the run's folder (default: the newest training run)"
    show.add_argument("folder", nargs="?", type=Path, metavar="RUN", help=help_text, default=None)
    show.add_argument("--step", type=int, help="the step to show (default: the last)", default=None)
    show.add_argument("--limit", type=int, help="maximum number of groups (default: 5)", default=5)
    plot.add_argument("folders", nargs="*", type=Path, metavar="RUN", help=help_text, default=[])
    return vars(parser.parse_args(argv))


def script() -> str:
    """The file that was started: this one, or one that imports it to add a task."""
    return sys.argv[0] if sys.argv[0].endswith(".py") else "r3.py"


def program() -> str:
    """How this program was started, for usage lines and hints that can be copied."""
    torchrun = f"torchrun --nproc-per-node {NUM_LOCAL_PROCESSES}"
    return f"{torchrun if NUM_LOCAL_PROCESSES > 1 else 'python'} {shlex.quote(script())}"


@grpo.join_processes()
def main(argv: list[str] | None = None) -> None:
    """Run a command. An error that a user can fix is reported in one line."""
    flags = read_command_line(argv)
    command, resume = flags.pop("command"), flags.pop("resume", None)
    config, folder, script_name = None, None, Path(script()).name
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # Some terminals cannot show all characters.
    try:
        if command in ("show", "plot"):
            return COMMANDS[command](**flags)
        if command == "play":
            if "model" not in flags:
                flags["model"] = str(newest_file("**/model/config.json").parent)
            return play_command(config_of_model(flags))
        make_config = config_of_model if command == "eval" else new_config
        config = resumed_config(resume, command, flags) if resume else make_config(flags)
        # Of several processes, the first one makes the folder, locks it, and tells the others.
        folder = resume or gather([is_rank_0() and new_folder(command, config)])[0]
        with locked_folder(folder) if is_rank_0() else nullcontext():
            if resume and is_rank_0():
                delete_temporary_files(folder)
            elif is_rank_0() and (folder / "config.json").exists():
                has_finished = (folder / "report.json").exists()
                is_same_command = read_json(folder / "config.json").get("command") == command
                hint = f", or resume it: {resume_command(command, folder)}"
                if has_finished or not is_same_command or command not in RESUMABLE:
                    hint = ""
                raise ValueError(f"{folder} exists: choose another --name{hint}")
            COMMANDS[command](config, folder)
    except BrokenPipeError:  # `head`, for example, has closed the pipe
        # Discard the rest, so that Python's flush at exit does not fail, too.
        for descriptor in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        if command not in ("show", "plot"):
            sys.exit(1)  # The command was not finished.
    except (KeyboardInterrupt, EOFError):
        if command == "play":
            return print()
        begun = command in RESUMABLE and folder and (folder / "config.json").exists()
        hint = f"; to resume: {resume_command(command, folder)}" if begun else ""
        # Of several processes, the first one reports this, and the others end without a word.
        sys.exit(f"\n{script_name}: interrupted{hint}" if is_rank_0() else os._exit(1))
    except DivergenceError as error:
        hint = ""
        if command == "train" and (folder / "metrics.jsonl").exists():
            again = restart_command(config, folder, lr=float(f"{config.lr / 3:.2g}"))
            hint = f"; to start again with a lower learning rate: {again}"
        sys.exit(f"{script_name}: {error}{hint}")
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:  # python -X dev
            raise
        sys.exit(f"{script_name}: {error}")
    except (MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not out_of_memory and "can't allocate memory" not in str(error):  # PyTorch on a CPU
            raise
        sys.exit(f"{script_name}: out of memory; {memory_advice(command, config, folder)}")


if __name__ == "__main__":
    main()
