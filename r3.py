"""Reflect, Retry, Reward: the experiment around the method, and the command line.

    python r3.py train      evaluate a model, train it by R3 on its failures, evaluate it again
    python r3.py failures   collect a dataset of failures, for train --failures
    python r3.py eval       the first try and within two tries, with intervals
    python r3.py play       type a problem, and watch a model attempt, reflect and retry
    python r3.py show       read what was sampled, rewarded and trained
    python r3.py plot       draw the curves of one run or several

The method itself is in grpo.py. This file reads from top to bottom: the settings, the cold start of
the tiny model, failures and evaluation, tables, the commands, the command line.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import random
import sys
import textwrap
import time
import typing
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import grpo
import model as models
from grpo import (
    Agent,
    Conversation,
    Conversations,
    append_jsonl,
    attempt_all,
    batches,
    rollout,
    setting,
)
from model import Model, Tokenizer
from tasks import TASKS, TinyCountdown

RUNS = Path("runs")

# -- Settings --------------------------------------------------------------------------------------
EVAL_SPLITS = ("dev", "test", "train", "all")
EVALUATION_COMMANDS, SEARCH_COMMANDS = (
    "train eval",
    "train failures",
)  # the commands that have a setting
RUN_COMMANDS, MODEL_COMMANDS = "train failures eval", "train failures eval play"


@dataclass
class Config(grpo.Config):
    """Every setting of a run, by name. The command line is made from it."""

    model: str = setting(
        "tiny", "a Hugging Face folder or hub id; tiny: made here", commands=MODEL_COMMANDS
    )
    task: str = setting("countdown", "what to solve", choices=TASKS, commands=MODEL_COMMANDS)
    data: str | None = setting(
        None, "problems: JSON, JSONL, parquet or a hub id", commands=RUN_COMMANDS
    )
    split: str = setting(
        "dev", "evaluate on this part", choices=EVAL_SPLITS, commands=EVALUATION_COMMANDS
    )
    limit: int | None = setting(
        None, "evaluate on at most so many problems", 2, commands=EVALUATION_COMMANDS
    )
    num_samples: int = setting(1, "first tries at each problem", 1, commands=EVALUATION_COMMANDS)
    num_problems: int | None = setting(
        None, "look for failures among so many", 1, commands=SEARCH_COMMANDS
    )
    max_attempts: int = setting(
        64, "at most so many tries at each of them", 1, commands=SEARCH_COMMANDS
    )
    failures: str | None = setting(None, "train on this failures.jsonl of another run")
    temperature: float = setting(1.0, "of sampling; 0 is greedy", 0, commands=MODEL_COMMANDS)
    max_new_tokens: int = setting(512, "the longest turn", 1, commands=MODEL_COMMANDS)
    seed: int = setting(0, "of all random numbers", 0, commands=MODEL_COMMANDS)
    device: str = setting("cpu", "cpu, cuda or mps", commands=MODEL_COMMANDS)
    dtype: str = setting(
        "float32", "of the weights", choices=("float32", "bfloat16"), commands=MODEL_COMMANDS
    )
    cache_tokens: int | None = setting(
        None, "tokens in the KV cache at once", 1, commands=MODEL_COMMANDS
    )
    name: str | None = setting(None, "the run's folder in runs/", commands=RUN_COMMANDS)

    def __post_init__(self):
        if self.temperature == 0:
            self.num_samples = self.max_attempts = 1  # greedy tries are all alike
        for field in fields(self):
            value, minimum = getattr(self, field.name), field.metadata["least"]
            if value is not None and minimum is not None and not minimum <= value < math.inf:
                flag = f"--{field.name.replace('_', '-')}"
                raise ValueError(f"{flag} {value}: give a number from {minimum} on")


# Defaults for the tiny model, and for a checkpoint: the paper's values where it states them (it
# does not state the group size and the longest turn).
TINY = Config(
    steps=18, batch_size=32, lr=3e-4, save_every=1, num_samples=4, max_attempts=4,
    max_new_tokens=134,
    cache_tokens=131_072,
)  # fmt: skip
PAPER = Config(
    steps=1_750, batch_size=256, lr=5e-7, save_every=25, num_samples=1, max_attempts=64,
    max_new_tokens=512,
)  # fmt: skip
if torch.cuda.is_available():
    PAPER.device, PAPER.dtype = "cuda", "bfloat16"
CURVE_SIZE = (200, 2)  # problems behind a point of the curves, and tries at each


# -- The cold start: how the tiny model is made ----------------------------------------------------
COLD_START = {"steps": 2_800, "dialogues": 16, "diligent": 0.7, "lr": 4e-3, "betas": [0.9, 0.99]}
STEPS_PER_DRAW = 8  # steps whose dialogues are drawn together


def base_model(task: TinyCountdown, seed: int) -> Path:
    """The folder of the tiny model of a seed. If it is not there, the model is trained from random
    weights on dialogues, by the cross-entropy of the assistant's tokens. The name holds a hash of
    the recipe (numbers, architecture, dialogues): another recipe makes another folder."""
    model, tokenizer = models.tiny_model(task.words(), seed)
    problems = task.load(split="cold", seed=seed)
    dialogues_ = [task.cold_dialogue(problems, random.Random(i), i % 2 > 0)[1] for i in range(200)]
    messages, settings = task.messages(problems[0]), tokenizer.settings
    recipe = json.dumps(
        [
            COLD_START,
            STEPS_PER_DRAW,
            model.config_dict,
            settings,
            task.words(),
            messages,
            dialogues_,
        ]
    )
    path = RUNS / f"base-seed{seed}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    if (path / "model.safetensors").exists():
        return path
    adamw = torch.optim.AdamW(
        model.parameters(), betas=COLD_START["betas"], weight_decay=0, fused=True
    )
    with tqdm(range(COLD_START["steps"]), "cold start") as bar:
        for step in bar:
            if step % STEPS_PER_DRAW == 0:
                diligent = step < COLD_START["diligent"] * COLD_START["steps"]
                drawn = dialogues(task, tokenizer, problems, f"cold {seed} {step}", diligent)
            ids, mask = drawn[
                step % STEPS_PER_DRAW
            ]  # (B, T) both; the assistant's tokens are trained
            hidden = model.hidden(ids)[:, :-1][mask[:, 1:]]  # (tokens, E)
            loss = F.cross_entropy(model.head(hidden), ids[:, 1:][mask[:, 1:]])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            [group] = adamw.param_groups
            group["lr"] = COLD_START["lr"] * grpo.lr_multiplier(
                step, COLD_START["steps"], warmup=0.03
            )
            adamw.step()
            adamw.zero_grad()
            bar.set_postfix_str(f"nll {loss.item():.3f}", refresh=False)
    tokenizer.save_pretrained(path)
    model.save_pretrained(path)  # weights last: a folder that has them is complete
    return path


def dialogues(
    task: TinyCountdown, tokenizer: Tokenizer, problems: list, rng_key: str, diligent: bool
):
    """What STEPS_PER_DRAW steps of the cold start learn from: (ids, mask) each, padded right."""
    rng, rows, size = random.Random(rng_key), [], COLD_START["dialogues"]
    bridges = [
        [],
        *(tokenizer.bridge(text) for text in (task.reflection_instruction, task.retry_instruction)),
    ]
    for _ in range(size * STEPS_PER_DRAW):
        problem, turns = task.cold_dialogue(problems, rng, diligent)
        ids, mask = tokenizer.prompt(*task.messages(problem)), []
        for turn, bridge in zip(turns, bridges, strict=False):
            ids = tokenizer.next_turn(ids, bridge)
            tokens = tokenizer.encode(turn) + tokenizer.stop_ids[:1]
            mask += [False] * (len(ids) - len(mask)) + [True] * len(tokens)
            ids += tokens
        rows.append((ids, mask))
    rows.sort(key=lambda row: len(row[0]))  # rows of about one length go together: less padding
    batches_ = []
    for i in rng.sample(range(STEPS_PER_DRAW), STEPS_PER_DRAW):
        batch = rows[i * size : (i + 1) * size]
        padded = torch.zeros(2, size, len(batch[-1][0]), dtype=torch.long)
        for row, row_ in enumerate(batch):
            padded[:, row, : len(row_[0])] = torch.tensor(row_)
        batches_.append((padded[0], padded[1].bool()))
    return batches_


# -- Failures and evaluation -----------------------------------------------------------------------
def find_failures(agent: Agent, problems: list, responses: int, path: Path) -> Conversations:
    """A dataset of failures: the first wrong one of up to `max_attempts` tries at each problem.
    They are added to a file, a batch at a time; a stopped search goes on after the last one."""
    found = (
        {conversation.problem.id: conversation for conversation in load_conversations(path, agent)}
        if path.exists()
        else {}
    )
    write_conversations(path, list(found.values()), agent)  # without an unfinished last line
    remaining = sum(batches(agent, problems, 1, turns=1), [])  # in the order of the search
    remaining = remaining[
        max(
            (index + 1 for index, problem in enumerate(remaining) if problem.id in found), default=0
        ) :
    ]
    with tqdm(total=len(problems), initial=len(problems) - len(remaining), desc="failures") as bar:
        for batch in batches(agent, remaining, 1, turns=1):
            for attempt_index in range(responses):
                unsolved = [problem for problem in batch if problem.id not in found]
                conversations = attempt_all(
                    agent, unsolved, 1, (grpo.COLLECT, 0), start=attempt_index
                )
                found |= {
                    conversation.problem.id: conversation
                    for conversation in conversations
                    if not conversation.attempt_verdict.correct
                }
            wrong = [found[problem.id] for problem in batch if problem.id in found]
            append_jsonl(
                path, *(grpo.to_json(conversation, agent.tokenizer) for conversation in wrong)
            )
            bar.update(len(batch))
    return [found[problem.id] for problem in problems if problem.id in found]


def evaluate(
    agent: Agent, problems: list, num_samples: int, title: str, path=None
) -> Conversations:
    """Attempt every problem `samples` times; reflect once on each failure, and retry once. With a
    path: what is in this file, if it is whole; else the conversations are written to it."""
    conversations = load_conversations(path, agent) if path and path.exists() else []
    if len(conversations) == num_samples * len(problems):
        return conversations
    conversations = []
    with tqdm(total=len(problems), desc=title) as bar:
        for batch in batches(agent, problems, num_samples, turns=1):
            attempts = attempt_all(agent, batch, num_samples, (grpo.EVALUATE, 0))
            conversations += [
                conversation for conversation in attempts if conversation.attempt_verdict.correct
            ]
            conversations += rollout(
                agent,
                [
                    conversation
                    for conversation in attempts
                    if not conversation.attempt_verdict.correct
                ],
                1,
                (grpo.EVALUATE, 0),
            )
            bar.update(len(batch))
    conversations.sort(
        key=lambda conversation: (conversation.problem.id, conversation.attempt_index)
    )
    if path:
        write_conversations(path, conversations, agent)
    return conversations


def write_conversations(path: Path, conversations: Conversations, agent: Agent) -> None:
    """A file of conversations, a line each, replaced at once."""
    lines = [
        json.dumps(grpo.to_json(conversation, agent.tokenizer)) + "\n"
        for conversation in conversations
    ]
    models.replace_file(path, "".join(lines))


def load_conversations(path: Path, agent: Agent) -> Conversations:
    """The conversations in a file, judged again; an unfinished last line is left out. Raises
    ValueError, with the line, for what is not one about this task in this model's tokens."""
    conversations = []
    for line_number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            saved = json.loads(line)
            problem, ids = agent.task.problem(saved["problem"]), saved["ids"]
            prompt, attempt_verdict = (
                agent.attempt_prompt(problem),
                agent.verify(problem, ids["attempt"]),
            )
            conversation = Conversation(
                problem, int(saved["attempt_index"]), prompt, attempt_verdict=attempt_verdict, **ids
            )
            if conversation.retry:
                conversation.reflection_prompt = agent.reflection_prompt(conversation)
                conversation.retry_verdict = agent.verify(problem, conversation.retry)
            tokens = [token for turn in ids.values() for token in turn]
            known = ids["attempt"] and all(0 <= token < agent.model.vocab_size for token in tokens)
            # What would be written today (as lists, not tuples) must be what the file says.
            current = json.loads(json.dumps(grpo.to_json(conversation, agent.tokenizer)))
            if not known or saved != {**saved, **current}:
                raise ValueError("texts or verdicts do not match the token ids")
            conversations.append(conversation)
        except Exception as error:  # of many kinds: it may be anybody's file
            raise ValueError(
                f"{path}, line {line_number} does not fit this run: {error!r}"
            ) from None
    return conversations


# -- Tables ----------------------------------------------------------------------------------------
def interval(values: np.ndarray, conversations: Conversations) -> list[float]:
    """[mean, low, high]: a 95% interval that allows for several tries at one problem: residuals are
    summed by problem, and their variance gives the interval (cluster-robust, normal). Where all n
    problems came out alike there is no variance: then 3 / n to either side (rule of three)."""
    _, cluster = np.unique(
        [conversation.problem.id for conversation in conversations], return_inverse=True
    )
    sums = np.bincount(cluster, weights=values - values.mean())
    n, mean = len(sums), float(values.mean())
    half = 1.96 * math.sqrt(n / max(1, n - 1) * (sums**2).sum()) / len(values)
    half = half if half > 1e-9 else 3 / n
    return [mean, mean - half, mean + half]


def accuracy(**by_model: Conversations) -> dict:
    """Rows of the paper's numbers, first try and within two, one per model; and the paired gain."""
    rows: dict[str, dict] = defaultdict(dict)
    for label in ("1st try", "within two"):
        correct = {}
        for name, conversations in by_model.items():
            verdicts = [
                conversation.attempt_verdict
                if label == "1st try"
                else conversation.retry_verdict or conversation.attempt_verdict
                for conversation in conversations
            ]
            correct[name] = np.array([verdict.correct for verdict in verdicts], float)
            rows[name][label] = np.clip(interval(correct[name], conversations), 0, 1).tolist()
        if len(correct) == 2:
            before, after = correct.values()
            rows["gain"][label] = interval(after - before, conversations)  # in the same order
    return rows


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


def read_lines(path: Path, name: str) -> list[dict]:
    """A JSONL file's whole lines, objects with this name (a run may be writing the last one).
    Raises OSError, or ValueError with the path in the message."""
    try:
        lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except ValueError:
        lines = []
    if not lines or not all(isinstance(line, dict) and name in line for line in lines):
        raise ValueError(f"{path} is not what a run of r3.py writes")
    return lines


# -- The commands ----------------------------------------------------------------------------------
def load_agent(config: Config, training: bool = False) -> Agent:
    """Load the model (the tiny one is made first) and what it needs to talk. Says what memory the
    run will take; on a GPU, keys and values get what is left (a retry copies them: 2.5 times).
    Raises ValueError for settings that do not fit together."""
    try:
        torch.zeros(1, device=config.device).item()
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {config.device}: torch finds no such device here") from None
    tiny = is_tiny(config.model)
    if tiny and (config.data or config.task != "countdown"):
        raise ValueError("the tiny model plays its own Countdown: give --model a folder for others")
    task = TinyCountdown() if tiny else TASKS[config.task]()
    path = base_model(task, config.seed) if config.model == "tiny" else config.model
    tokenizer, dtype = Tokenizer.from_pretrained(path), getattr(torch, config.dtype)
    model = Model.from_pretrained(path, dtype, "meta")  # shapes alone

    model_config, size = model.config, dtype.itemsize
    num_parameters = sum(p.numel() for p in model.parameters())
    kv = (
        5
        * model_config.num_hidden_layers
        * model_config.num_key_value_heads
        * model_config.head_dim
        * size
    )  # 2.5 copies
    needs = {"weights": num_parameters * size}
    if training:
        kept = (
            13 * model_config.hidden_size + 4 * model_config.intermediate_size
        ) * size  # by a layer, a token
        layers = 2 if config.checkpointing else model_config.num_hidden_layers
        needs["reference"] = num_parameters * size if config.beta else 0
        needs["gradients, masters, moments"] = num_parameters * (
            size if config.offload else 12 if size == 4 else 18
        )
        needs["activations"] = (config.group_size + 2) * config.max_new_tokens * kept * layers
    cache_tokens = config.cache_tokens or 65_536
    if config.device.startswith("cuda") and config.cache_tokens is None:
        left = 0.9 * torch.cuda.mem_get_info(config.device)[0] - sum(needs.values())
        cache_tokens = max(4_096, int(left / kv))
    needs[f"{cache_tokens:,} tokens' keys and values"] = kv * cache_tokens
    listed = ", ".join(f"{name} {need / 1e9:.3g}" for name, need in needs.items())
    print(
        f"{num_parameters:,} parameters in {config.dtype} on {config.device}; GB, about: {listed}"
    )

    model = Model.from_pretrained(path, dtype, config.device)
    model.vocab_size = min(model.vocab_size, tokenizer.vocab_size)
    return Agent(
        model, tokenizer, task, config.max_new_tokens, config.temperature, config.seed, cache_tokens
    )


def load_problems(config: Config, agent: Agent, split: str, limit: int | None) -> list:
    """Problems of a split, without those whose conversations might outgrow the model's context."""
    data = config.data or agent.task.hub_id
    data = data and models.from_hub(data, ["*.json", "*.jsonl", "*.parquet"], "dataset")
    problems = agent.task.load(data, split, limit, config.seed)
    bridges = [
        agent.tokenizer.bridge(text)
        for text in (agent.task.reflection_instruction, agent.task.retry_instruction)
    ]
    max_prompt = agent.model.context_length - 3 * config.max_new_tokens - sum(map(len, bridges))
    fitting = [problem for problem in problems if len(agent.attempt_prompt(problem)) <= max_prompt]
    if not fitting:
        raise ValueError("no problem fits the model's context: lower --max-new-tokens")
    if len(fitting) < len(problems):
        print(f"{len(problems) - len(fitting)} problems dropped: they might outgrow the context")
    return fitting


def train_command(config: Config, folder: Path) -> None:
    """Evaluate a model, train it by R3, evaluate it again. Without flags: the whole experiment with
    a tiny model, from nothing, on a laptop."""
    begun = time.time()
    if not config.temperature:
        raise ValueError("--temperature 0 draws equal reflections: there is nothing to compare")
    Path(config.failures or ".").stat()  # raises the error before a model is made
    vanilla, path = load_agent(config, training=True), folder / "failures.jsonl"
    problems = load_problems(config, vanilla, config.split, config.limit)
    training = (
        [] if config.failures else load_problems(config, vanilla, "train", config.num_problems)
    )
    loaded = load_conversations(Path(config.failures), vanilla) if config.failures else []
    write_config(folder, "train", config)
    failures = (
        loaded if config.failures else find_failures(vanilla, training, config.max_attempts, path)
    )
    failures = [failure for failure in failures if not failure.attempt_verdict.correct]
    write_conversations(path, failures, vanilla)
    if not failures:
        raise ValueError("there are no failures to learn from")
    before = evaluate(vanilla, problems, config.num_samples, "vanilla", folder / "vanilla.jsonl")

    trained = replace(vanilla, model=copy.deepcopy(vanilla.model))
    reference = vanilla.model if config.beta else None
    vanilla.model.to(
        config.device if config.beta else "cpu"
    )  # without the KL term it is not needed
    with tqdm(total=config.steps, desc="R3") as bar:
        for step, metrics in grpo.train(trained, reference, failures, config, folder):
            if step % max(1, config.steps // 4) == 0 or step == config.steps:
                conversations = evaluate(
                    trained, problems[: CURVE_SIZE[0]], CURVE_SIZE[1], f"step {step}"
                )
                metrics |= accuracy(at=conversations)["at"]
            append_jsonl(folder / "metrics.jsonl", {"step": step, **metrics})
            append_jsonl(folder / "timings.jsonl", {"step": step, "seconds": time.time() - begun})
            bar.set_postfix_str(f"reward {metrics.get('reward', 0):.2f}")
            bar.update(step - bar.n)
    trained.model.save_pretrained(folder / "model")
    trained.tokenizer.save_pretrained(folder / "model")

    after = evaluate(trained, problems, config.num_samples, "trained", folder / "trained.jsonl")
    report(config, folder, vanilla=before, trained=after)
    plot_command([folder])
    print(f"{(time.time() - begun) / 60:.1f} minutes; all in {folder}/")


def failures_command(config: Config, folder: Path) -> None:
    """Collect problems that a model gets wrong, with a wrong answer each, for train --failures."""
    agent, path = load_agent(config), folder / "failures.jsonl"
    problems = load_problems(config, agent, "train", config.num_problems)
    write_config(folder, "failures", config)
    found = find_failures(agent, problems, config.max_attempts, path)
    print(f"{len(found)} failures on {len(problems)} problems, in {path}")


def eval_command(config: Config, folder: Path) -> None:
    """Evaluate a model: right at the first try, and within two."""
    agent = load_agent(config)
    problems = load_problems(config, agent, config.split, config.limit)
    write_config(folder, "eval", config)
    conversations = evaluate(
        agent, problems, config.num_samples, "eval", folder / "conversations.jsonl"
    )
    report(config, folder, model=conversations)
    print(f"The conversations are in {folder}/")


def report(config: Config, folder: Path, **by_model: Conversations) -> None:
    """Write report.json, and print its tables."""
    ids = {
        conversation.problem.id
        for conversations in by_model.values()
        for conversation in conversations
    }
    settings = (
        f"{len(ids)} problems, {config.num_samples} samples each, "
        f"temperature {config.temperature:g}"
    )
    reasons: dict[str, Counter] = {}
    for name, conversations in by_model.items():
        reasons[f"{name}, 1st try"] = Counter(
            conversation.attempt_verdict.reason for conversation in conversations
        )
        reasons[f"{name}, retry"] = Counter(
            conversation.retry_verdict.reason
            for conversation in conversations
            if conversation.retry_verdict
        )
    tables = {f"{settings}: % right [95%]": accuracy(**by_model), "The verifier's reasons": reasons}
    models.replace_file(folder / "report.json", json.dumps({"tables": tables}, indent=2))
    print("\n" + markdown(tables))


def play_command(config: Config) -> None:
    """Watch a model attempt, reflect and retry on a problem you type."""
    agent, number = load_agent(config), 0
    print(f"This is {config.model}. Type {agent.task.input_format}; an empty line ends.")
    while line := input("> ").strip():
        number += 1
        rng_key = (grpo.PLAY, number)  # a new key each time: the answer may differ
        try:
            [conversation] = grpo.sample_attempts(agent, [agent.task.parse(line)], 1, rng_key)
        except ValueError as error:
            print(f"  {error}")
            continue
        print_turn("question", agent.tokenizer.decode(conversation.attempt_prompt))
        print_turn(
            "attempt",
            f"{agent.tokenizer.decode(conversation.attempt)}   "
            f"<- {conversation.attempt_verdict.reason}",
        )
        if not conversation.attempt_verdict.correct:
            [conversation] = rollout(agent, [conversation], 1, rng_key)
            print_turn("reflection", agent.tokenizer.decode(conversation.reflection))
            print_turn(
                "retry",
                f"{agent.tokenizer.decode(conversation.retry)}   "
                f"<- {conversation.retry_verdict.reason}",
            )


def show_command(folder: Path | None, step: int | None, limit: int) -> None:
    """Read what was sampled at a step: reflections, their advantages, and the retries. Groups with
    right and wrong retries, from which R3 learns, come first."""
    folder = folder or newest_file("*/samples.jsonl").parent
    path = folder / "samples.jsonl"  # of train
    path = path if path.is_file() else folder / "conversations.jsonl"  # of eval
    groups = defaultdict(list)
    lines = read_lines(path, "context")
    step = lines[-1].get("step") if step is None else step
    for line in lines:
        if line.get("step") == step:
            groups[line["context"]].append(line)
    if not groups:
        raise ValueError(f"{path} has no step {step}")
    ordered = sorted(
        groups.values(), key=lambda group: not any(line.get("advantage") for line in group)
    )
    for group in ordered[:limit]:
        print_turn("context", group[0]["context"])
        for line in group:
            if "reflection" in line:
                print_turn(f"{line.get('advantage', 0):+.2f} reflection", line["reflection"])
            last, verdict = (
                ("retry", "retry_verdict") if "retry" in line else ("attempt", "attempt_verdict")
            )
            print_turn(last, f"{line[last]}   <- {line[verdict]['reason']}")
        print()


def print_turn(label: str, text: str) -> None:
    """Print a turn, wrapped. Control characters, which a terminal would obey, become spaces."""
    for line in text.strip().splitlines() or [""]:
        line = "".join(letter if letter.isprintable() else " " for letter in line)
        indents = f"{label:>20}  ", " " * 22
        print(textwrap.fill(line, 100, initial_indent=indents[0], subsequent_indent=indents[1]))
        label = ""


PANELS = {  # of the curves: what is drawn of metrics.jsonl, and its title
    "within two": "right within two tries, held out (95%)",
    "1st try": "right at the first try, held out (95%)",
    "reward": "mean reward",
    "reflection_tokens": "tokens in a reflection",
    "kl": "KL to the vanilla model, per token",
    "mixed_groups": "share of groups with mixed rewards",
}


def plot_command(folders: list[Path]) -> None:
    """Draw the curves of a training run, curves.png, or of several for comparison."""
    from matplotlib.figure import Figure  # imported here: few commands need it

    folders = folders or [newest_file("*/samples.jsonl").parent]
    path = folders[0] / "curves.png" if len(folders) == 1 else Path("curves.png")
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = list(figure.subplots(2, 3).flat)
    for folder in folders:
        lines = read_lines(folder / "metrics.jsonl", "step")
        for axis, name in zip(axes, PANELS, strict=True):
            points = [(line["step"], *np.ravel(line[name])) for line in lines if name in line]
            if points:
                x, y, *ends = np.array(points).T  # ends: low and high, if it has an interval
                error = [y - ends[0], ends[1] - y] if ends else None
                axis.errorbar(x, y, error, fmt="o-" if ends else "-", capsize=3, label=folder.name)
    for axis, title in zip(axes, PANELS.values(), strict=True):
        axis.set(title=title, xlabel="step", ylim=(0, None), visible=axis.has_data())
        axis.xaxis.get_major_locator().set_params(integer=True)
    if len(folders) > 1:
        axes[0].legend()
    figure.savefig(path, dpi=110)
    print(f"The curves are in {path}")


# -- The run's folder, and the command line --------------------------------------------------------
def newest_file(pattern: str) -> Path:
    """The newest such file of all runs. Raises FileNotFoundError where there is none."""
    path = max(RUNS.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)
    if path is None:
        raise FileNotFoundError(f"no run in {RUNS}/ yet: r3.py train makes one")
    return path


def load_config(folder: Path, command: str) -> Config:
    """The settings of the run to resume. Raises ValueError if it is another command's."""
    config = models.read_json(folder / "config.json")
    if config.get("command") != command or config.get("task", "countdown") not in TASKS:
        what = f"{config.get('command')}, not of {command}, or of a task that is not known here"
        raise ValueError(f"{folder} is a run of {what}")
    try:
        return Config(**{field.name: config[field.name] for field in fields(Config)})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: {error!r}") from None


def write_config(folder: Path, command: str, config: Config) -> None:
    """config.json: every setting, from which a run is resumed, and the version of torch."""
    config = {"command": command, **asdict(config), "torch": torch.__version__}
    models.replace_file(folder / "config.json", json.dumps(config, indent=2))


def is_tiny(model: str) -> bool:
    """Whether this is the tiny model, or a folder of one that was trained."""
    settings = Path(model) / "tokenizer_config.json"
    return model == "tiny" or settings.is_file() and "tiny" in models.read_json(settings)


COMMANDS = {
    "train": train_command, "failures": failures_command, "eval": eval_command,
    "play": play_command, "show": show_command, "plot": plot_command,
}  # fmt: skip


def read_command_line(argv: list[str] | None) -> dict:
    """What was given on the command line, by name, without the defaults, which are in Config. Each
    command has a flag for each setting that names it."""
    parser = argparse.ArgumentParser(prog="r3.py", description="Train a model to reflect: R3.")
    subs = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name, function in COMMANDS.items():
        help_text = {"help": function.__doc__, "description": function.__doc__}
        sub = subs.add_parser(name, argument_default=argparse.SUPPRESS, **help_text)
        for field in fields(Config):
            tiny, paper = getattr(TINY, field.name), getattr(PAPER, field.name)
            default = f"{tiny}" if tiny == paper else f"{tiny}; a checkpoint's: {paper}"
            help_text = field.metadata["help"] + (
                f" (default: {default})" if tiny is not None else ""
            )
            value_type = (typing.get_args(field.type) or [field.type])[0]  # of "int | None": int
            options = {"type": value_type, "metavar": value_type.__name__.upper()}
            if value_type is bool:
                options = {"action": argparse.BooleanOptionalAction}
            elif field.metadata["choices"]:
                options = {"choices": list(field.metadata["choices"])}
            if name in field.metadata["commands"].split():
                sub.add_argument(f"--{field.name.replace('_', '-')}", help=help_text, **options)
        if name in SEARCH_COMMANDS.split():
            help_text = "go on with a run that was stopped, with its settings"
            sub.add_argument("--resume", type=Path, metavar="FOLDER", help=help_text)
    show, plot = subs.choices["show"], subs.choices["plot"]
    run = "the run's folder (default: the one trained last)"
    show.add_argument("folder", nargs="?", type=Path, metavar="RUN", help=run, default=None)
    show.add_argument("--step", type=int, help="of this step (default: the last)", default=None)
    show.add_argument("--limit", type=int, help="so many groups (default: 5)", default=5)
    plot.add_argument("folders", nargs="*", type=Path, metavar="RUN", help=run, default=[])
    return vars(parser.parse_args(argv))


def run(command: str, given: dict, resume: Path | None) -> None:
    """Run a command with what was given, over the tiny model's or a checkpoint's defaults."""
    if command in ("show", "plot"):
        return COMMANDS[command](**given)
    if command == "play" and "model" not in given:
        given["model"] = str(newest_file("*/model/config.json").parent)
    config = replace(TINY if is_tiny(given.get("model", "tiny")) else PAPER, **given)
    if command == "play":
        return play_command(config)
    folder = RUNS / (config.name or f"{command}-{config.task}-{time.strftime('%Y%m%d-%H%M%S')}")
    if resume:
        if given:
            raise ValueError("--resume takes all other settings from the run")
        config, folder = load_config(resume, command), resume
    elif (folder / "config.json").exists():
        raise ValueError(f"{folder} exists: choose another --name, or --resume {folder}")
    try:
        COMMANDS[command](config, folder)
    except KeyboardInterrupt:
        begun = command in SEARCH_COMMANDS and (folder / "config.json").exists()
        hint = f"; go on with: r3.py {command} --resume {folder}" if begun else ""
        sys.exit(f"\nr3.py: interrupted{hint}")


def main(argv: list[str] | None = None) -> None:
    """The command line. An error that a user can fix is one line."""
    given = read_command_line(argv)
    try:
        run(given.pop("command"), given, given.pop("resume", None))
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (ValueError, OSError) as error:
        sys.exit(f"r3.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("r3.py: out of GPU memory; lower --cache-tokens, or take --checkpointing")
    except (KeyboardInterrupt, EOFError):  # of play
        print()


if __name__ == "__main__":
    main()
