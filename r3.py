"""Reflect, Retry, Reward (Bensal et al., 2025, arXiv 2505.24726), and the command line around it.

    question -> attempt -> wrong? -> reflection_1 … reflection_G -> retry_1 … retry_G -> rewards

A model that fails a task writes a reflection on what went wrong and tries again with it in view.
If the second try is right, the tokens of the reflection are rewarded, and no others: the model is
taught no answer, it is taught to reflect.

The method is three functions, `attempt`, `reflect` and `retry`, and the loop in `reinforce` that
calls them. The rest of this file makes an experiment of it.

A conversation is token ids from end to end: what is trained is what was sampled, never text that
was decoded and tokenised again.
"""

import argparse
import copy
import datetime
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import textwrap
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import grpo
import model as models
from model import Cache, Model, Tokenizer, generate
from tasks import TASKS, Verdict, tools_in_words

# -- The conversation ------------------------------------------------------------------------------


@dataclass
class Speaker:
    """A model with what it needs to hold a conversation about a task."""

    model: Model
    tokenizer: Tokenizer
    task: object
    max_new_tokens: int  # the longest turn
    temperature: float = 1.0
    seed: int = 0
    cache_tokens: int = 131_072  # whose keys and values are held at once: this bounds the memory
    folder: Path | None = None  # of the run, where what was measured is kept

    def chat(self, problem) -> tuple[list[dict], list | None]:
        """The question. Tools that the chat template has no place for go into the text."""
        messages, tools = self.task.messages(problem)
        if tools and not self.tokenizer.shows(messages, tools):
            messages, tools = tools_in_words(messages, tools), None
        return messages, tools

    def question(self, problem) -> list[int]:
        """The prompt, up to where the assistant speaks."""
        return self.tokenizer.prompt(*self.chat(problem))

    def after(self, problem, context: list[int], *said: tuple[list[int], str]) -> list[int]:
        """The context and what follows: the last turn that was `said`, and the instruction to it.

        Some templates show an earlier turn without its thinking (Qwen3's). Where that is so, the
        whole conversation, of which `said` holds all turns, is rendered anew.
        """
        turn, instruction = said[-1]
        if not any(self.tokenizer.forgets(turn) for turn, _ in said):
            return context + self.tokenizer.next_turn(turn, self.tokenizer.bridge(instruction))
        messages, tools = self.chat(problem)
        for turn, instruction in said:
            messages = [*messages, {"role": "assistant", "content": self.tokenizer.decode(turn)}]
            messages.append({"role": "user", "content": instruction})
        return self.tokenizer.prompt(messages, tools)

    def speak(self, prompts, samples, keys, **rest) -> models.Generation:
        limits, stop = (samples, self.max_new_tokens, self.temperature), self.tokenizer.stop_ids
        return generate(self.model, prompts, *limits, stop=stop, seed=self.seed, keys=keys, **rest)

    def verify(self, problem, turn: list[int]) -> Verdict:
        return self.task.verify(problem, self.tokenizer.decode(turn))


@dataclass
class Conversation:
    """What was said about a problem, as token ids, and what the verifier said to it."""

    problem: object
    sample: int  # which attempt at the problem this is
    prompt: list[int]  # the question, up to where the assistant speaks
    attempt: list[int]  # the assistant's turns end with their end-of-turn token, unless cut
    first: Verdict
    context: list[int] = field(default_factory=list)  # question, attempt, and "now reflect"
    reflection: list[int] = field(default_factory=list)
    retry: list[int] = field(default_factory=list)
    second: Verdict | None = None
    logprobs: dict[str, list[float]] = field(default_factory=dict)  # of a turn's tokens, when drawn


Tries = list[Conversation]

# A turn's random stream is keyed by (seed, purpose, step, turn, problem, attempt, sample); a `key`
# below is its (purpose, step).
MEASURE, COLLECT, TRAIN, AGAIN = range(4)  # purposes
ATTEMPT, REFLECT, RETRY = range(3)  # turns
BRIDGES = 50  # about so many tokens are put between two turns


def attempt(speaker: Speaker, problems: list, samples: int, key: tuple, first=0) -> Tries:
    """First tries: `samples` at each problem, problem by problem, numbered from `first`."""
    prompts = [speaker.question(problem) for problem in problems]
    keys = [(*key, ATTEMPT, problem.id) for problem in problems]
    drawn, tries = speaker.speak(prompts, samples, keys, first=first), []
    for p, problem in enumerate(problems):
        for s, turn in enumerate(drawn.tokens[p]):
            verdict, own = speaker.verify(problem, turn), {"attempt": drawn.logprobs[p][s]}
            c = Conversation(problem, first + s, prompts[p], turn, verdict, logprobs=own)
            tries.append(c)
    return tries


def reflect(speaker: Speaker, failures: Tries, samples: int, key: tuple) -> tuple[Tries, Cache]:
    """`samples` reflections on each failure, failure by failure, and the cache to retry from."""
    told = speaker.task.reflect
    contexts = [speaker.after(f.problem, f.prompt, (f.attempt, told)) for f in failures]
    keys = [(*key, REFLECT, f.problem.id, f.sample) for f in failures]
    drawn = speaker.speak(contexts, samples, keys)
    reflected = []
    for f, context, *group in zip(failures, contexts, drawn.tokens, drawn.logprobs, strict=True):
        for turn, logprobs in zip(*group, strict=True):
            own = {**f.logprobs, "reflection": logprobs}
            reflected.append(replace(f, context=context, reflection=turn, logprobs=own))
    return reflected, drawn.cache


def before_retry(speaker: Speaker, c: Conversation) -> list[int]:
    """All that is in view of a retry: the reflection and the instruction after the context."""
    said = (c.attempt, speaker.task.reflect), (c.reflection, speaker.task.again)
    return speaker.after(c.problem, c.context, *said)


def retry(speaker: Speaker, reflected: Tries, key: tuple, cache: Cache | None = None) -> Tries:
    """A second try after each reflection.

    With the cache from `reflect`, only what lies between the turns is read; without one (the
    reflections are another model's, or a control's) each conversation is read from its beginning.
    """
    turns = (turn for c in reflected for turn in (c.attempt, c.reflection))
    if any(map(speaker.tokenizer.forgets, turns)):
        cache = None  # what it has read is not what the template shows
    asked, keys, seen = [], [], Counter()
    for c in reflected:
        ids = before_retry(speaker, c)
        # The cache has read all of a reflection but its last token.
        asked.append(ids[len(c.context) + len(c.reflection) - 1 :] if cache else ids)
        keys.append((*key, RETRY, c.problem.id, c.sample, seen[c.problem.id, c.sample]))
        seen[c.problem.id, c.sample] += 1
    drawn, tries = speaker.speak(asked, 1, keys, cache=cache), []
    for c, [turn], [logprobs] in zip(reflected, drawn.tokens, drawn.logprobs, strict=True):
        own, second = {**c.logprobs, "retry": logprobs}, speaker.verify(c.problem, turn)
        tries.append(replace(c, retry=turn, second=second, logprobs=own))
    return tries


def second_tries(speaker: Speaker, failures: Tries, samples: int, key: tuple) -> Tries:
    """Reflect `samples` times on each failure, and retry after each reflection."""
    reflected, cache = reflect(speaker, failures, samples, key)
    return retry(speaker, reflected, key, cache)


# -- Long work, in bunches -------------------------------------------------------------------------


def bunches(items: list, sizes: list[int], budget: int, most: int) -> list[list]:
    """Items in bunches of up to `most` that fit a budget of tokens, each as wide as its longest."""
    bunch, longest, found = [], 0, []
    for item, size in zip(items, sizes, strict=True):
        longest = max(longest, size)
        if bunch and (longest * (len(bunch) + 1) > budget or len(bunch) == most):
            found, bunch, longest = [*found, bunch], [], size
        bunch.append(item)
    return [*found, bunch] if bunch else found


def work_through(
    speaker: Speaker, work: Callable, items: list, samples: int, turns: int, name: str = ""
) -> Tries:
    """The conversations that `work` makes of all items, problems or conversations, in their order.

    It is given as many at once as the cache has room for, each item with `samples` times `turns`
    more turns. Of several processes each takes its share. With a name, it shows a progress bar, and
    in a run's folder what came of each bunch is a line of measured/NAME.jsonl: a run that was
    stopped goes on behind the last whole line. Raises grpo.Stopped where the run is to stop.
    """
    process, processes = grpo.rank()
    own, sizes = samples * turns * (speaker.max_new_tokens + BRIDGES), []
    for item in items:
        if isinstance(item, Conversation):
            read = len(item.prompt) + len(item.attempt) + len(item.reflection) + 2 * BRIDGES
        else:
            read = len(speaker.question(item))
        sizes.append(read + own)
    path, tries, done = None, [], 0
    if name and speaker.folder:
        path = speaker.folder / "measured" / (re.sub(r"\W+", "-", name) + ".jsonl")
        problems = {p.id: p for p in (getattr(item, "problem", item) for item in items)}
        for line in whole_lines(path):
            done += line["items"]
            if any(record["problem"] not in problems for record in line["found"]):
                raise ValueError(f"{path} is of other problems: has --data changed?")
            tries += [restored(record, problems) for record in line["found"]]
    most = math.ceil(len(items) / processes)
    todo = bunches(items[done:], sizes[done:], speaker.cache_tokens, most)
    with tqdm(total=len(items), desc=name, disable=not name or process > 0, leave=False) as bar:
        bar.update(done)
        for start in range(0, len(todo), processes):
            now = todo[start : start + processes]
            everyone = gathered(work(now[process]) if process < len(now) else [])
            for bunch, found in zip(now, everyone, strict=False):
                tries += found
                if path:
                    line = {"items": len(bunch), "found": [kept(c) for c in found]}
                    log(path, {"sha256": digest(line), **line})
            bar.update(sum(map(len, now)))
            bar.set_postfix_str(f"{len(tries)} found")
            if path and grpo.stopping():
                raise grpo.Stopped
    return tries


def gathered(mine) -> list:
    """What every process has."""
    everyone = [mine] * grpo.rank()[1]
    if len(everyone) > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


def kept(c: Conversation) -> dict:
    """A conversation as JSON, its problem by number. (Its log-probabilities are for training.)"""
    return {**asdict(c), "problem": c.problem.id, "logprobs": {}}


def restored(record: dict, problems: dict) -> Conversation:
    first, second = Verdict(**record["first"]), record["second"] and Verdict(**record["second"])
    known = {"problem": problems[record["problem"]], "first": first, "second": second}
    return Conversation(**{**record, **known})


def digest(line: dict) -> str:
    return hashlib.sha256(json.dumps(line).encode()).hexdigest()


def whole_lines(path: Path) -> list[dict]:
    """What the lines of a file in measured/ hold; it is cut behind the last whole one."""
    if not path.exists():
        return []
    text = path.read_bytes()
    length = text.rfind(b"\n") + 1
    if grpo.rank()[0] == 0:
        os.truncate(path, length)
    try:
        lines = [json.loads(line) for line in text[:length].splitlines()]
        if all(line.pop("sha256") == digest(line) for line in lines):
            return lines
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise ValueError(f"{path} is damaged; delete it, and that is measured anew")


# -- Training --------------------------------------------------------------------------------------


def find_failures(speaker: Speaker, problems: list, responses: int, keep: str) -> Tries:
    """A dataset of failures: one wrong try at each problem that the model gets wrong.

    keep says which these are: "any" keeps a problem if any of up to `responses` tries is wrong, and
    stops trying at the first that is; "all" keeps it if all are, and stops at the first that is
    right.
    """

    def look(some: list) -> Tries:
        undecided, wrong = some, {}  # wrong: by their problems' ids
        for number in range(responses):
            tries = attempt(speaker, undecided, 1, (COLLECT, 0), first=number) if undecided else []
            for c in tries:
                if not c.first.right:
                    wrong.setdefault(c.problem.id, c)
                elif keep == "all":
                    wrong.pop(c.problem.id, None)
            undecided = [c.problem for c in tries if c.first.right == (keep == "any")]
        return [wrong[problem.id] for problem in some if problem.id in wrong]

    return work_through(speaker, look, problems, 1, 1, "failures")


# What --train-on says, and the turns that it means.
TRAINED = {"reflection": ["reflection"], "retry": ["retry"], "both": ["reflection", "retry"],
           "attempt": ["attempt"]}  # fmt: skip


def sample_batch(
    speaker: Speaker, failures: Tries, args, step: int, shuffle_rewards: bool = False
) -> tuple[list[tuple[Conversation, str]], grpo.Batch]:
    """G reflections on each failure, a retry after each, and what the optimiser learns from them.

    A reflection is worth 1 if the retry after it is right, else 0; and 0 if it was cut at the
    longest length. shuffle_rewards deals the step's rewards out anew among its reflections: a
    control, from which nothing can be learnt.

    args.train_on may name other turns than the paper's reflection; "attempt" is plain GRPO on G
    answers to each failure's question. Returned are the conversation and the turn that each row of
    the batch ends with, and the batch.
    """
    key, G, trained = (TRAIN, step), args.group, TRAINED[args.train_on]

    def work(some: Tries) -> Tries:
        if args.train_on == "attempt":
            return attempt(speaker, [c.problem for c in some], G, key)
        return second_tries(speaker, some, G, key)

    tries = work_through(speaker, work, failures, G, 2)
    ends = [getattr(c, turn)[-1] for c in tries for turn in trained]
    cut = ~np.isin(ends, speaker.tokenizer.stop_ids).reshape(len(tries), -1).all(axis=1)
    rewards = np.array([(c.second or c.first).right for c in tries]) & ~cut
    if shuffle_rewards:
        rewards = np.random.default_rng([speaker.seed, step]).permutation(rewards)
    groups = [tries[start : start + G] for start in range(0, len(tries), G)]
    rows = [(c, turn) for group in groups for turn in trained for c in group]
    before = {"attempt": lambda c: c.prompt, "reflection": lambda c: c.context}
    before["retry"] = partial(before_retry, speaker)
    batch = grpo.reflection_batch(
        contexts=[before[turn](c) for c, turn in rows],
        reflections=[getattr(c, turn) for c, turn in rows],
        logprobs=[c.logprobs[turn] for c, turn in rows],
        rewards=torch.tensor(rewards).float().view(-1, G),  # (P, G)
        scale=not args.no_std,
    )
    batch.metrics["cut"] = float(cut.mean())
    spoken = ("attempt",) if args.train_on == "attempt" else ("reflection", "retry")
    batch.metrics["sampled"] = sum(len(getattr(c, turn)) for c in tries for turn in spoken)
    return rows, batch


def reinforce(
    speaker: Speaker, failures: Tries, args, reference: Model | None, shuffle_rewards=False
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train the speaker's model on a dataset of failures, in place.

    Yields (steps done, metrics) before the first step and after each. Checkpoints go into the run's
    folder, from where it goes on, and what was sampled into samples.jsonl.
    """
    folder = speaker.folder / "checkpoints" / ("shuffled" if shuffle_rewards else "")
    names = () if shuffle_rewards else ("metrics.jsonl", "samples.jsonl")
    files = tuple(speaker.folder / name for name in names)
    optimizers = grpo.adamw(speaker.model, args.lr, args.offload)
    start = grpo.load_checkpoint(folder, optimizers, files)

    def batches(step: int) -> grpo.Batch:
        chosen = draw_failures(failures, step, args.batch, speaker.seed)
        rows, batch = sample_batch(speaker, chosen, args, step, shuffle_rewards)
        if not shuffle_rewards:
            write_samples(files[1], step + 1, rows, batch, speaker.tokenizer)
        return batch

    settings = settings_of(args)
    steps = grpo.train(
        speaker.model, batches, settings, optimizers, reference, start, folder, files
    )
    if start == 0:
        yield 0, {}
    name = "R3, rewards shuffled" if shuffle_rewards else "R3"
    with tqdm(total=args.steps, desc=name, initial=start, disable=grpo.rank()[0] > 0) as bar:
        for step, m in steps:
            bar.set_postfix_str(f"reward {m['reward']:.2f}, length {m['length']:.0f}")
            bar.update()
            yield step + 1, m


def settings_of(args: argparse.Namespace) -> grpo.Settings:
    names = {setting.name for setting in fields(grpo.Settings)}
    return grpo.Settings(**{name: value for name, value in vars(args).items() if name in names})


def draw_failures(failures: Tries, step: int, size: int, seed: int) -> Tries:
    """The failures of a step: each once an epoch, in an order drawn anew, none twice a step."""
    epoch, start = divmod(step * size, len(failures))
    order: Tries = []
    while len(order) < start + size:
        order += random.Random(f"{seed} {epoch}").sample(failures, len(failures))
        epoch += 1
    return list({(c.problem.id, c.sample): c for c in order[start : start + size]}.values())


# -- The cold start: a tiny model is born ----------------------------------------------------------

RUNS = Path("runs")
COLD = {"steps": 1_500, "dialogues": 16, "diligent": 0.7, "muon_lr": 0.01, "adamw_lr": 3e-3}
WINDOW = 8  # steps whose dialogues are drawn together


def unborn(task, seed: int) -> tuple[Model, Tokenizer]:
    """The tiny model before its cold start."""
    model, tokenizer = models.tiny(task.words(), seed)
    tokenizer.settings["texts"] = "tiny"  # it is taught the task's short texts
    return model, tokenizer


def dialogues(task, tokenizer: Tokenizer, problems: list, key: str, diligent) -> list[grpo.Batch]:
    """What WINDOW steps of the cold start learn from, drawn by a key: texts about some problems."""
    # What comes before each of the assistant's turns: the first follows the prompt itself.
    bridges = [[], tokenizer.bridge(task.reflect), tokenizer.bridge(task.again)]
    rng, rows, batches, size = random.Random(key), [], [], COLD["dialogues"]
    for _ in range(size * WINDOW):
        problem, turns = task.cold_dialogue(problems, rng, diligent)
        ids, spans = tokenizer.prompt(*task.messages(problem)), []
        for bridge, turn in zip(bridges, turns, strict=False):
            ids = tokenizer.next_turn(ids, bridge)
            said = tokenizer.encode(turn) + tokenizer.stop_ids[:1]
            spans.append((len(ids), len(ids) + len(said)))
            ids += said
        rows.append((ids, spans))
    # Dealt out by length, so that a batch holds rows of about one length and hardly any padding;
    # then the batches are shuffled.
    rows.sort(key=lambda row: len(row[0]))
    for i in rng.sample(range(WINDOW), WINDOW):
        ids, spans = zip(*rows[i * size : (i + 1) * size], strict=True)
        batches.append(grpo.Batch(list(ids), list(spans), advantages=torch.ones(size)))
    return batches


def cold_start(task, seed: int, folder: Path | None) -> tuple[Model, Tokenizer]:
    """A tiny model trained from random weights on dialogues: grpo.py with an advantage of one.
    Checkpoints go into the folder, from where it goes on."""
    model, tokenizer = unborn(task, seed)
    problems, batches, quiet = task.load(split="cold", seed=seed), [], grpo.rank()[0] > 0
    for start in tqdm(range(0, COLD["steps"], WINDOW), "dialogues", leave=False, disable=quiet):
        diligent = start < COLD["diligent"] * COLD["steps"]
        batches += dialogues(task, tokenizer, problems, f"cold {seed} {start}", diligent)
    settings = grpo.Settings(steps=COLD["steps"], lr=COLD["muon_lr"], beta=0.0)
    optimizers = grpo.muon(model, COLD["muon_lr"], COLD["adamw_lr"])
    done = grpo.load_checkpoint(folder, optimizers) if folder else 0
    steps = grpo.train(model, batches.__getitem__, settings, optimizers, None, done, folder)
    with tqdm(total=settings.steps, desc="cold start", initial=done, disable=quiet) as bar:
        for _, metrics in steps:
            bar.set_postfix_str(f"nll {metrics['nll']:.3f}", refresh=False)
            bar.update()
    return model, tokenizer


def forgetting(speaker: Speaker) -> float:
    """Nats a token on texts like the cold start's, about development problems: how much R3 has made
    the tiny model forget."""
    task, problems = speaker.task, speaker.task.load(split="dev", seed=speaker.seed)
    key = f"held out {speaker.seed}"
    batches = dialogues(task, speaker.tokenizer, problems, key, diligent=False)
    return grpo.mean_nll(speaker.model, batches)


def base_model(task, seed: int, fresh: bool, folder: Path | None) -> Path:
    """The folder of the tiny model for a seed, made or found; `fresh` makes it anew. Change the
    recipe (the numbers, the architecture, the dialogues), and a base is made beside the old one.
    Checkpoints of the cold start go into the run's folder."""
    problems = task.load(split="cold", seed=seed)
    said = [task.cold_dialogue(problems, random.Random(i), i % 2 > 0)[1] for i in range(200)]
    architecture = models.tiny(task.words(), seed)[0].config_dict
    recipe = json.dumps([COLD, WINDOW, architecture, task.words(), said])
    path = RUNS / f"base-seed{seed}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    if fresh or not (path / "model.safetensors").exists():
        model, tokenizer = cold_start(task, seed, folder and folder / "checkpoints" / "cold")
        if grpo.rank()[0] == 0:
            tokenizer.save_pretrained(path)
            model.save_pretrained(path)  # its weights come last: they say that it is complete
    grpo.stopping()  # and so the others wait
    return path


# -- Measuring -------------------------------------------------------------------------------------


def measure(speaker: Speaker, problems: list, samples: int, name: str) -> Tries:
    """Attempt every problem `samples` times; reflect on each failure once, and retry once."""
    first = partial(attempt, speaker, samples=samples, key=(MEASURE, 0))
    tries = work_through(speaker, first, problems, samples, 1, f"{name}, first tries")
    second = iter(once_more(speaker, [c for c in tries if not c.first.right], name))
    return [c if c.first.right else next(second) for c in tries]


def once_more(speaker: Speaker, failures: Tries, name: str) -> Tries:
    """Reflect once on each failure, and retry."""
    work = partial(second_tries, speaker, samples=1, key=(MEASURE, 0))
    return work_through(speaker, work, failures, 1, 2, f"{name}, second tries")


def retry_all(speaker: Speaker, reflected: Tries, name: str) -> Tries:
    """Retry after reflections that are another speaker's, or a control's."""
    work = partial(retry, speaker, key=(MEASURE, 0))
    return work_through(speaker, work, reflected, 1, 1, name)


def first_right(tries: Tries) -> np.ndarray:
    return np.array([c.first.right for c in tries], float)


def within_two(tries: Tries) -> np.ndarray:
    return np.array([(c.second or c.first).right for c in tries], float)


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


def accuracy(**measured: Tries) -> dict:
    """Rows of the paper's numbers, first try and within two, one per model; and the paired gain."""
    rows: dict[str, dict] = defaultdict(dict)
    for label, right in (("1st try", first_right), ("within two", within_two)):
        for name, tries in measured.items():
            single = len({c.problem.id for c in tries}) == len(tries)
            rows[name][label] = wilson(right(tries)) if single else interval(right(tries), tries)
        if len(measured) == 2:
            before, after = measured.values()
            rows["gain"][label] = interval(right(after) - right(before), before)
    return rows


def reasons(task, **measured: Tries) -> dict:
    """How often the verifier said what: the task's own reasons first, then any others."""
    columns = {}
    for name, tries in measured.items():
        columns[f"{name}, 1st"] = Counter(c.first.reason for c in tries)
        columns[f"{name}, retry"] = Counter(c.second.reason for c in tries if c.second)
    kinds = dict.fromkeys([*task.reasons, *(kind for count in columns.values() for kind in count)])
    return {kind: {name: count[kind] for name, count in columns.items()} for kind in kinds}


def second_right(tries: Tries) -> list[float]:
    return interval(np.array([c.second.right for c in tries], float), tries)


def controls(speakers: dict[str, Speaker], tries: dict[str, Tries]) -> dict:
    """What else could explain the gain? Retries after something other than one's own reflection.

    speakers: "vanilla", "trained" and "shuffled" (trained on shuffled rewards); tries: the second
    tries of the first two on the vanilla model's failures, with their reflections.
    """
    vanilla, failures = speakers["vanilla"], tries["vanilla"]
    end = vanilla.tokenizer.stop_ids[:1]
    generic = vanilla.tokenizer.encode(vanilla.task.generic_reflection) + end
    rows: dict[str, dict] = defaultdict(dict)
    for name, own in tries.items():
        rows["its own reflection"][name] = second_right(own)
        for label, reflections in (
            ("an empty reflection", [end] * len(own)),
            ("a fixed generic reflection", [generic] * len(own)),
            ("another problem's reflection", [elsewhere(own, i) for i in range(len(own))]),
        ):
            swapped = [replace(c, reflection=r) for c, r in zip(own, reflections, strict=True)]
            rows[label][name] = second_right(retry_all(speakers[name], swapped, f"{name}, {label}"))
        label = "no failure in view: a second attempt"
        problems = list({c.problem.id: c.problem for c in own}.values())
        samples = 1 + max(c.sample for c in own)
        anew = partial(attempt, speakers[name], samples=samples, key=(AGAIN, 0))
        fresh = work_through(speakers[name], anew, problems, samples, 1, f"{name}, {label}")
        failed = {(c.problem.id, c.sample) for c in own}
        again = [c for c in fresh if (c.problem.id, c.sample) in failed]
        rows[label][name] = interval(first_right(again), again)
    label = "its own, trained on shuffled rewards"
    shuffled = once_more(speakers["shuffled"], failures, label)
    rows[label] = {"trained": second_right(shuffled)}
    return rows | equal_tokens(vanilla, failures, tries["trained"])


def elsewhere(tries: Tries, number: int) -> list[int]:
    """The reflection on another problem: on the next such failure from half-way round."""
    start = (number + len(tries) // 2) % len(tries)
    others = (c for c in tries[start:] + tries[:start] if c.problem.id != tries[number].problem.id)
    return next(others, tries[number]).reflection


def equal_tokens(vanilla: Speaker, before: Tries, after: Tries) -> dict:
    """The vanilla model with as many tokens a failure as the trained one spends, in more tries.

    k is the ratio of the tokens spent (reflection and retry). A failure counts if any of k tries is
    right, which needs an oracle to say which. With c right of n = 16 tries the chance for k of them
    is 1 - C(n - c, k) / C(n, k), without bias; for a broken k, interpolated between its neighbours.
    For time's sake one failure a problem, beside the trained model's one try at the same failures.
    """
    n, spent = 16, [sum(len(c.reflection) + len(c.retry) for c in t) for t in (before, after)]
    k = min(n, spent[1] / spent[0])
    chosen = {c.problem.id: i for i, c in reversed(list(enumerate(before)))}.values()
    failures = [before[i] for i in chosen]
    work = partial(second_tries, vanilla, samples=n, key=(AGAIN, 0))
    tries = work_through(vanilla, work, failures, n, 2, "equal tokens")
    right = np.array([c.second.right for c in tries]).reshape(-1, n).sum(axis=1).tolist()

    def chance(k: int) -> np.ndarray:
        return np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in right])

    below, above = chance(math.floor(k)), chance(math.ceil(k))
    best = interval(below + (k - math.floor(k)) * (above - below), failures)
    one = second_right([after[i] for i in chosen])
    return {f"its own, any of {k:.2f} tries; trained: one": {"vanilla": best, "trained": one}}


# -- What a run leaves behind ----------------------------------------------------------------------


def log(path: Path, record: dict | list) -> None:
    """Append a line to a JSONL file. (Of several processes, the first one writes.)"""
    if grpo.rank()[0] == 0:
        path.parent.mkdir(exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def told(c: Conversation, tokenizer: Tokenizer) -> dict:
    """A conversation as text. The context is what was read before the reflection, if there is one,
    else before the attempt."""
    turns = {"context": c.context or c.prompt, "attempt": c.attempt}
    turns |= {"reflection": c.reflection, "retry": c.retry}
    said = {name: tokenizer.tokenizer.decode(ids, False) for name, ids in turns.items() if ids}
    verdicts = {"first": c.first.reason, "second": c.second and c.second.reason}
    return {"problem": asdict(c.problem), "sample": c.sample, **said, **verdicts}


def write_samples(path: Path, step: int, rows: list, batch: grpo.Batch, tokenizer) -> None:
    """A line a conversation, with reward, advantage, the trained turns, and the span of the first:
    its token numbers in what was read before it, and the turn."""
    lines: dict[int, dict] = {}
    worth = zip(batch.rewards.tolist(), batch.advantages.tolist(), batch.spans, strict=True)
    for (c, turn), (reward, advantage, [span]) in zip(rows, worth, strict=True):
        known = {"reward": reward, "advantage": advantage, "trained": [], "trained_span": span}
        line = lines.setdefault(id(c), {"step": step, **told(c, tokenizer), **known})
        line["trained"].append(turn)
    for line in lines.values():
        log(path, line)


def write_failures(path: Path, failures: Tries, tokenizer: Tokenizer) -> None:
    """A line a failure: the attempt as the verifier read it, and as token ids."""
    lines = []
    for c in failures:
        attempted = {"attempt": tokenizer.decode(c.attempt), "attempt_ids": c.attempt}
        lines.append(json.dumps({**told(c, tokenizer), **attempted}) + "\n")
    if grpo.rank()[0] == 0:
        models.replace_file(path, "".join(lines))


def read_failures(path: Path, speaker: Speaker) -> Tries:
    """A run's dataset of failures. Raises ValueError, with the line, for one that does not fit."""
    failures = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            problem = speaker.task.problem(record["problem"])
            ids = list(map(int, record["attempt_ids"]))
            if not ids or not all(0 <= token < speaker.model.words for token in ids):
                raise ValueError("no token ids of this model's vocabulary")
            if len(ids) > speaker.max_new_tokens:
                raise ValueError("an attempt longer than --max-new-tokens")
            prompt = speaker.question(problem)
            verdict = speaker.verify(problem, ids)
            if verdict.right or speaker.tokenizer.decode(ids) != record["attempt"]:
                raise ValueError("no failed attempt in this model's tokens")
            failures.append(Conversation(problem, int(record["sample"]), prompt, ids, verdict))
        except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
            raise ValueError(f"{path}, line {number} is no failure: {error!r}") from None
    return failures


def markdown(tables: dict[str, dict]) -> str:
    """{title: {row: {column: [share, low, high] or a count}}} as Markdown tables, in per cent."""

    def cell(value, sign: str) -> str:
        if isinstance(value, list):
            return "{} [{}, {}]".format(*(f"{100 * x:{sign}.1f}" for x in value))
        return str(value)

    parts = []
    for title, rows in tables.items():
        columns = dict.fromkeys(column for row in rows.values() for column in row)
        cells = [["", *columns]]
        for name, row in rows.items():
            sign = "+" if name == "gain" else ""
            cells.append([name, *(cell(row.get(column, ""), sign) for column in columns)])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
        lines.insert(1, "|-" + "-|-".join("-" * width for width in widths) + "-|")
        parts += [title, "", *lines, ""]
    return "\n".join(parts)


PANELS = (  # of the curves: a title, and what is drawn of metrics.jsonl
    ("right on held-out problems (95%)", "within two", "1st try"),
    ("mean reward", "reward"),
    ("tokens in a trained turn", "length"),
    ("KL to the vanilla model, per token", "kl"),
    ("entropy per token (nats)", "entropy"),
    ("share of groups with mixed rewards", "mixed_groups"),
)
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def draw_curves(folders: list[Path], path: Path) -> None:
    """How training went, step by step: a colour a run (or, of one run, a measure), and a mark a
    measure. Raises FileNotFoundError or ValueError for a folder that is no training run."""
    from matplotlib.figure import Figure  # here, since few commands want it

    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = list(figure.subplots(2, 3).flat)
    for run, folder in enumerate(folders):
        lines = read_lines(folder / "metrics.jsonl", {"step"})
        for axis, (_, *names) in zip(axes, PANELS, strict=True):
            for number, name in enumerate(names):
                points = [(line["step"], *np.ravel(line[name])) for line in lines if name in line]
                if not points:
                    continue  # without a KL term there is no KL
                x, y, *ends = np.array(points).T  # ends: low and high, if it has an interval
                error = [y - ends[0], ends[1] - y] if ends else None
                style = ("o-", "s--")[number] if ends else "-"
                single = len(folders) == 1
                colour = COLOURS[(number if single else run) % len(COLOURS)]
                label = name if single else f"{folder.name}: {name}"
                axis.errorbar(x, y, error, fmt=style, color=colour, capsize=3, label=label)
    for axis, (title, *_) in zip(axes, PANELS, strict=True):
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    labels = axes[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def read_lines(path: Path, names: set[str]) -> list[dict]:
    """A JSONL file's whole lines, objects with some names (a run may be writing the last one).
    Raises FileNotFoundError or ValueError with the path in the message."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    text = path.read_text(encoding="utf-8")
    try:
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        if all(names <= set(line) for line in lines):
            return lines
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{path} is not what a run of r3.py writes")


def groups_of(lines: list[dict], steps: list[int] | None = None, only: str = "all") -> list[dict]:
    """Conversations that begin alike, together: those of the last step, or of some steps.

    lines: of samples.jsonl or conversations.jsonl; only: "rewarded" or "unrewarded" conversations,
    or groups whose rewards are "mixed".
    """
    steps = steps or [line.get("step") for line in lines[-1:]]
    groups: dict[tuple, dict] = {}
    for line in lines:
        if line.get("step") not in steps:
            continue
        verdict = line.get("second") or line["first"]
        names = ("reflection", "retry") if "reflection" in line else ("attempt",)
        one = {
            "reward": line.get("reward", float(verdict == "right")),
            "advantage": line.get("advantage"), "trained": line.get("trained", []),
            "turns": {name: line.get(name, "") for name in names}, "verdict": verdict,
        }  # fmt: skip
        number, step = line["problem"]["id"], line.get("step")
        title = f"problem {number}" if step is None else f"step {step}, problem {number}"
        group = {"title": title, "context": line["context"], "tries": []}
        groups.setdefault((step, number, line["context"]), group)["tries"].append(one)
    for group in groups.values():
        right = [one["reward"] > 0 for one in group["tries"]]
        group["rewarded"] = f"{sum(right)} of {len(right)} rewarded"
        both = {True, False} if len(set(right)) > 1 else {}
        fits = {"all": {True, False}, "rewarded": {True}, "unrewarded": {False}, "mixed": both}
        tries = zip(group["tries"], right, strict=True)
        group["tries"] = [one for one, is_right in tries if is_right in fits[only]]
    return [group for group in groups.values() if group["tries"]]


DIM, UP, DOWN = "2", ("38;5;108", "38;5;71", "38;5;34"), ("38;5;174", "38;5;167", "38;5;160")


def harmless(text: str) -> str:
    """Text to print: what a model says may hold codes that a terminal obeys."""
    return "".join(c if c.isprintable() else " " for c in text)


def print_groups(groups: list[dict], colours: bool) -> None:
    """Conversations in the terminal: what is trained green or red, stronger where A is larger."""
    width = min(100, shutil.get_terminal_size().columns)

    def say(label: str, text: str, colour: str = "") -> None:
        for part in map(harmless, text.strip().splitlines() or [""]):
            for line in textwrap.wrap(part, max(20, width - 22)) or [""]:
                line = f"\033[{colour}m{line}\033[0m" if colours and colour else line
                print(f"{label:>20}  {line}")
                label = ""

    largest = max((abs(t["advantage"] or 0) for g in groups for t in g["tries"]), default=0) or 1
    for group in groups:
        print(f"\n{group['title']}: {group['rewarded']}")
        say("context", group["context"], DIM)
        for one in group["tries"]:
            A, verdict = one["advantage"] or 0, one["verdict"].replace("_", " ")
            shade = (UP if A > 0 else DOWN)[min(2, int(3 * abs(A) / largest))] if A else ""
            for name, text in one["turns"].items():
                trained = name in one["trained"]
                say(f"{A:+.2f} {name}" if trained else name, text, shade if trained else "")
            say("", f"<- {verdict}")


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>R3: conversations</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
section { border-top: 1px solid #ccc; margin-top: 1.5rem }
h2 { font-size: 1rem } button { font: inherit; margin-right: .5rem; padding: .2rem .8rem }
button[aria-pressed=true] { background: #222; color: #fff }
main p { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; padding: .2rem .5rem }
.context { color: #767676 } article { border-left: 3px solid #ccc; margin: .8rem 0 }
b { font-weight: 600; margin-right: .5rem }
</style>
<h1>Conversations</h1>
<p>Grey: what was read. Coloured: the trained tokens, green where the advantage A is above zero, red
where it is below, stronger where it is larger.</p>
<nav></nav><main></main>
<script>
const groups = DATA;
const add = (to, tag, text = "", kind = "") => {
  const made = document.createElement(tag);
  made.textContent = text; made.className = kind; to.append(made);
  return made;
};
const sizes = groups.flatMap(group => group.tries.map(one => Math.abs(one.advantage || 0)));
const largest = sizes.reduce((one, other) => Math.max(one, other), 1e-9);
const kept = {
  all: () => true, rewarded: one => one.reward > 0, unrewarded: one => !(one.reward > 0),
  mixed: (one, group) => new Set(group.tries.map(other => other.reward > 0)).size > 1,
};
function draw(only) {
  const main = document.querySelector("main");
  main.replaceChildren();
  for (const button of document.querySelectorAll("button"))
    button.setAttribute("aria-pressed", button.value == only);
  for (const group of groups) {
    const tries = group.tries.filter(one => kept[only](one, group));
    if (!tries.length) continue;
    const section = add(main, "section");
    add(section, "h2", group.title + ": " + group.rewarded);
    add(section, "p", group.context, "context");
    for (const one of tries) {
      const article = add(section, "article"), A = one.advantage || 0;
      for (const [name, text] of Object.entries(one.turns)) {
        const turn = add(article, "p"), trained = one.trained.includes(name);
        add(turn, "b", name + (trained ? " A = " + A.toFixed(2) : ""));
        turn.append(text);
        if (trained && A) turn.style.background =
          `rgba(${A > 0 ? "0, 158, 115" : "213, 60, 0"}, ${0.15 + 0.45 * Math.abs(A) / largest})`;
      }
      add(article, "p", "\u2190 " + one.verdict.replaceAll("_", " "));
    }
  }
}
for (const name in kept) {
  const count = groups.flatMap(group => group.tries.filter(one => kept[name](one, group))).length;
  const button = add(document.querySelector("nav"), "button", name + " (" + count + ")");
  button.value = name;
  button.onclick = () => draw(name);
}
draw("all");
</script></html>
"""


def report(folder: Path, found: dict) -> None:
    """Write report.json, and print its tables."""
    if grpo.rank()[0] == 0:
        models.replace_file(folder / "report.json", json.dumps(found, indent=2))
    print("\n" + markdown(found["tables"]))


# -- The commands ----------------------------------------------------------------------------------

# What a flag is when it is not given: for the tiny model, and for a real checkpoint (the paper's
# numbers; it does not state the group size and the token limit).
DEFAULTS = {
    "steps": (18, 1_750), "batch": (32, 256), "group": (8, 8), "lr": (3e-4, 5e-7),
    "max_new_tokens": (134, 512), "samples": (4, 1), "responses": (4, 64),
    "cache_tokens": (131_072, 65_536), "micro_tokens": (8_192, 2_048), "save_every": (1, 25),
    "device": ("cpu", "cuda" if torch.cuda.is_available() else "cpu"),
    "dtype": ("float32", "bfloat16" if torch.cuda.is_available() else "float32"),
}  # fmt: skip
HELD_OUT = (200, 2)  # development problems behind a point of the curves, and tries at each


def open_speaker(args: argparse.Namespace) -> Speaker:
    """A speaker as the flags name it, its model still without weights (see `load_weights`), so that
    everything else is looked through first. Flags that were not given get their defaults."""
    flags = vars(args)  # a command has not all of them
    data = flags.get("data")
    if data and not Path(data).exists():
        if not models.is_hub_id(data):
            raise ValueError(f"--data {data}: no such file")
        args.data = str(models.from_hub(data, ["*.json", "*.jsonl", "*.parquet"], "dataset"))
    if args.model == "tiny":
        model, tokenizer = unborn(TASKS[args.task](tiny=True), args.seed)
    else:
        model = Model.from_pretrained(args.model, device="meta", revision=args.revision)
        tokenizer = Tokenizer.from_pretrained(args.model, args.revision)
    tokenizer.date = datetime.date.fromisoformat(args.date)
    tiny = tokenizer.settings.get("texts") == "tiny"  # it was taught the task's short texts
    if tiny and data:
        raise ValueError("--data: the tiny model plays its own small game; give --model a folder")
    for name, defaults in DEFAULTS.items():
        if flags.get(name, "no flag") is None:
            flags[name] = defaults[0 if tiny else 1]
    if flags.get("split", "no flag") is None:
        args.split = "test" if data else "dev"
    try:
        if not flags.get("dry_run"):  # which may plan for another machine
            torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {args.device}: torch finds no such device here") from None
    whose = "the tiny model's" if tiny else "the paper's"
    settings = [f"{k} {v}" for k, v in flags.items() if k in {*DEFAULTS, "beta", "clip", "loss"}]
    print(f"Settings ({whose} where not given): {', '.join(settings)}")
    model.words = min(model.words, tokenizer.words)
    limits = args.max_new_tokens, args.temperature, args.seed, args.cache_tokens
    return Speaker(model, tokenizer, TASKS[args.task](tiny=tiny), *limits)


def load_weights(args: argparse.Namespace, speaker: Speaker) -> None:
    """Give a speaker its model's weights; those of "tiny" are made where there are none yet."""
    path, words = args.model, speaker.model.words
    if path == "tiny":
        path = base_model(speaker.task, args.seed, vars(args).get("fresh"), speaker.folder)
    dtype = getattr(torch, args.dtype)
    speaker.model = Model.from_pretrained(path, dtype, args.device, args.revision)
    speaker.model.words = words
    if args.compile:
        Model.hidden = torch.compile(Model.hidden, dynamic=True)


def load_problems(args, speaker: Speaker, split: str, limit: int | None = None) -> list:
    """Problems of a split, from --data if that is given. Those whose conversations might outgrow
    the context are dropped, so that all that is compared is measured on the same problems."""
    options = {name: getattr(args, name) for name in ("skip_bad", "train_size", "test_size")}
    problems = speaker.task.load(args.data, split, limit, args.seed, **options)
    bridges = [speaker.tokenizer.bridge(s) for s in (speaker.task.reflect, speaker.task.again)]
    room = speaker.model.config.context - 3 * speaker.max_new_tokens - sum(map(len, bridges))
    kept = [problem for problem in problems if len(speaker.question(problem)) <= room]
    if len(kept) < len(problems):
        dropped = f"{len(problems) - len(kept)} of {len(problems)} problems dropped: with turns of"
        print(f"{dropped} {speaker.max_new_tokens} tokens they might outgrow the model's context")
    if not kept:
        raise ValueError("no problem fits the model's context: lower --max-new-tokens")
    return kept


def run_folder(args, kind: str) -> Path:
    """Where a command leaves its files: a new folder, or the one of the run that it resumes."""
    if args.resume:
        return Path(args.resume)
    path = Path(args.model).resolve()
    model = path.parent.name if path.name == "model" else path.name
    start = "" if kind == "train" else f"{kind}-"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = RUNS / (args.name or f"{start}{args.task}-{model}-seed{args.seed}-{stamp}")
    folder = gathered(folder)[0]  # the first process's time
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} exists: choose another --name, or --resume {folder}")
    args.name = str(folder.relative_to(RUNS))
    return folder


def write_config(folder: Path, args: argparse.Namespace) -> None:
    """config.json: every flag, and what computed with it. With it a run can be resumed."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    flags = {name: value for name, value in vars(args).items() if name != "function"}
    config = {**flags, "versions": versions, "threads": torch.get_num_threads()}
    if grpo.rank()[0] == 0 and not args.resume:
        folder.mkdir(parents=True, exist_ok=True)
        models.replace_file(folder / "config.json", json.dumps(config, indent=2))
    grpo.stopping()  # all processes wait here for the folder


def resumed(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of the run to resume. Raises ValueError if it is another command's, or done."""
    folder = Path(args.resume)
    config = models.read_json(folder / "config.json")
    if config.get("command") != args.command:
        raise ValueError(f"{folder} was begun by {config.get('command')}, not {args.command}")
    last = "failures.jsonl" if args.command == "failures" else "report.json"
    if (folder / last).exists():
        raise ValueError(f"{folder} is done: there is {folder / last}")
    computed = config.get("versions", {}).get("torch"), config.get("threads")
    if computed != (torch.__version__, torch.get_num_threads()):
        print("Another torch, or another number of threads: the last bits may come out otherwise")
    given = {name: value for name, value in config.items() if name in vars(args)}
    return argparse.Namespace(**{**vars(args), **given, "resume": args.resume})


def memory(model: Model, args: argparse.Namespace, context: int) -> dict[str, dict[str, float]]:
    """Bytes by part, on the device and in main memory, at the height of a training step.

    A model's matrices are counted; what a layer keeps for its backward pass is counted token by
    token, as autograd keeps it (norms' inputs and outputs, rotated queries, keys and values for
    each row, the three stages of SwiGLU).
    """
    c, size = model.config, torch.finfo(getattr(torch, args.dtype)).bits // 8
    weights = sum(p.numel() for p in model.parameters())
    copies = 4 * weights if size < 4 or args.offload else 0
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    # A retry is sampled on copies of what its rows, and then the unfinished ones, have read.
    cache = 2.5 * 2 * c.num_hidden_layers * keys * size * args.cache_tokens
    turns = {"attempt": 1, "reflection": 1, "retry": 2, "both": 3}[args.train_on]  # in a row's tail
    own = args.group * args.max_new_tokens * turns
    groups = max(1, args.micro_tokens // (context + own))
    tokens = groups * (context + own)
    rows = groups * args.group * (context + args.max_new_tokens)  # in which keys stand in attention
    layer = tokens * (6 * c.hidden_size + 3 * queries + 4 * c.intermediate_size)
    layer += (tokens + rows) * 2 * keys
    layers = c.num_hidden_layers
    kept = layers * tokens * c.hidden_size + layer if args.checkpointing else layers * layer
    trained = min(groups * own, max(1, grpo.LOGITS // model.words)) * model.words
    host = "main memory" if args.offload else "device"
    vanilla = "device" if args.beta or args.device == "cpu" else "main memory"
    parts = {
        "weights": {"device": size * weights * (2 if args.controls else 1)},
        "vanilla model, the reference": {vanilla: size * weights},
        "gradients": {host: 4 * weights},
        "float32 masters": {host: copies},
        "moments": {host: 8 * weights},
        "training: activations": {"device": size * kept},
        "training: logits": {"device": 4 * 4 * trained},
        "sampling: keys and values": {"device": cache},
    }
    training = sum(part.get("device", 0) for part in parts.values()) - cache
    sampling = training - size * kept - 16 * trained - parts["gradients"].get("device", 0) + cache
    most = max(training, sampling)
    if args.device == "cpu":  # glibc's heap has holes: about a fifth of what is in use, measured
        parts["holes in the heap"] = {"device": 0.2 * most}
        most *= 1.2
    host = sum(part.get("main memory", 0) for part in parts.values())
    parts["the most at a time"] = {"device": most, "main memory": host}
    return parts


def print_plan(args, speaker: Speaker, folder: Path, failures: int, problems: list) -> None:
    """What a training run would do and need."""
    longest = max(len(speaker.question(problem)) for problem in problems)
    context = longest + args.max_new_tokens + len(speaker.tokenizer.bridge(speaker.task.reflect))
    weights = sum(p.numel() for p in speaker.model.parameters())
    rows = min(args.batch, failures) * args.group
    steps = f"{args.steps} steps of up to {rows} samples on {rows // args.group} failures"
    sampled = rows * args.max_new_tokens * (1 if args.train_on == "attempt" else 2)
    trained = rows * args.max_new_tokens * len(TRAINED[args.train_on])
    print(
        f"{weights:,} parameters, {args.dtype}, on {args.device}\n{steps}\na step samples up to "
        f"{sampled:,} tokens after contexts of up to {context}, and trains {trained:,} of them"
    )
    parts = memory(speaker.model, args, context)
    cells = {k: {w: f"{n / 1e9:.2f}" for w, n in part.items()} for k, part in parts.items()}
    print("\n" + markdown({"Memory, GB (estimated):": cells}))
    kept = 12 * weights * args.keep_checkpoints
    [saved] = parts["vanilla model, the reference"].values()
    print(
        f"{folder}/ would hold {kept / 1e9:.2f} GB of checkpoints, a model of {saved / 1e9:.2f} "
        "GB, config.json, failures.jsonl, metrics.jsonl, samples.jsonl, measured/, report.json"
    )


def train_command(args: argparse.Namespace) -> None:
    """Measure a model, train it by R3, measure it again. Without flags: the whole experiment with
    a tiny model, from nothing, on a laptop."""
    begun = time.time()
    if not args.temperature:
        raise ValueError("--temperature 0 draws equal reflections: there is nothing to compare")
    if args.failures and not Path(args.failures).is_file():
        raise ValueError(f"--failures {args.failures}: no such file")
    if args.check and grpo.rank()[1] > 1:
        raise ValueError("--check is for one process")
    folder, vanilla = run_folder(args, "train"), open_speaker(args)
    args.dtype = "float32" if args.check else args.dtype
    problems = load_problems(args, vanilla, args.split, args.limit)
    points = min(HELD_OUT[0], args.limit or HELD_OUT[0])
    held_out = load_problems(args, vanilla, args.split if args.data else "dev", points)
    training = [] if args.failures else load_problems(args, vanilla, "train", args.problems)
    failures = read_failures(Path(args.failures), vanilla) if args.failures else []
    if args.dry_run:
        asked = [*problems, *held_out, *training, *(c.problem for c in failures)]
        return print_plan(args, vanilla, folder, len(failures or training), asked)
    if not args.check:
        write_config(folder, args)
        vanilla.folder = folder
    load_weights(args, vanilla)
    if not args.failures:
        failures = find_failures(vanilla, training, args.responses, args.keep)
    if not failures:
        raise ValueError("no training problem was got wrong: there is nothing to learn from")
    if args.check:
        return check_step(vanilla, failures, args)
    write_failures(folder / "failures.jsonl", failures, vanilla.tokenizer)
    greedy = measure(replace(vanilla, temperature=0.0), problems, 1, "vanilla, greedy")
    before = measure(vanilla, problems, args.samples, "vanilla")

    def apart() -> Speaker:
        """The vanilla model once more, to be trained."""
        speaker = replace(vanilla, model=copy.deepcopy(vanilla.model))
        speaker.model.checkpointing = args.checkpointing
        return speaker

    trained, reference = apart(), vanilla.model if args.beta else None
    vanilla.model.to(args.device if args.beta else "cpu")  # without KL it is not needed meanwhile
    for step, metrics in reinforce(trained, failures, args, reference):
        if step % max(1, args.steps // 4) == 0 or step == args.steps:
            now = replace(trained, folder=None)  # not kept: the step is saved only after this
            done = measure(now, held_out, HELD_OUT[1], f"held out, step {step}")
            metrics |= accuracy(at=done)["at"]
        log(folder / "metrics.jsonl", {"step": step, **metrics})
        log(folder / "timings.jsonl", {"step": step, "seconds": round(time.time() - begun, 2)})
    if grpo.rank()[0] == 0:
        trained.model.save_pretrained(folder / "model")
        trained.tokenizer.save_pretrained(folder / "model")

    vanilla.model.to(args.device)
    greedy_after = measure(replace(trained, temperature=0.0), problems, 1, "trained, greedy")
    after = measure(trained, problems, args.samples, "trained")
    failed = [c for c in before if not c.first.right]
    own = once_more(trained, failed, "2x2, trained")
    crossed = retry_all(trained, failed, "2x2, trained after vanilla reflections")
    back = retry_all(vanilla, own, "2x2, vanilla after trained reflections")
    on = f"{len(problems)} {args.split} problems"
    fixed = f"the vanilla model's {len(failed)} failures: % of retries right [95%]"
    way = f"{args.samples} samples each, temperature {args.temperature:g}"
    tables = {
        f"{on}, {way}: % right [95%]": accuracy(vanilla=before, trained=after),
        f"{on}, greedy: % right [95%]": accuracy(vanilla=greedy, trained=greedy_after),
        f"Who reflects (rows) and who retries (columns), on {fixed}": {
            "vanilla": {"vanilla": second_right(failed), "trained": second_right(crossed)},
            "trained": {"vanilla": second_right(back), "trained": second_right(own)},
        },
        "What the verifier said, times": reasons(vanilla.task, vanilla=before, trained=after),
    }
    if vanilla.task.tiny:
        texts = "The cold start's kind of texts, about development problems: nats a token"
        both = {"vanilla": vanilla, "trained": trained}
        tables[texts] = {name: {"nll": f"{forgetting(who):.3f}"} for name, who in both.items()}
    if args.controls and failed:
        shuffled = apart()
        for _ in reinforce(shuffled, failures, args, reference, shuffle_rewards=True):
            pass
        speakers = {"vanilla": vanilla, "trained": trained, "shuffled": shuffled}
        rows = controls(speakers, {"vanilla": failed, "trained": own})
        tables[f"Controls, on {fixed}, after …"] = rows
    lengths = [[len(c.reflection) for c in tries] for tries in (failed, own)]
    was, now = (sum(each) / max(1, len(each)) for each in lengths)
    print(f"\nTokens in a reflection on these failures: vanilla {was:.0f}, trained {now:.0f}")
    if grpo.rank()[0] == 0:
        draw_curves([folder], folder / "curves.png")
        weights = " ".join(grpo.sha256(file)[:16] for file in models.shards(folder / "model"))
        found = {"tables": tables, "reflection tokens": [was, now], "weights sha256": weights}
        report(folder, found)
        print(f"{(time.time() - begun) / 60:.1f} minutes; weights {weights}; all in {folder}/")


def check_step(speaker: Speaker, failures: Tries, args) -> None:
    """Say how far a step is from the textbook. Raises ValueError if that is too far."""
    _, batch = sample_batch(speaker, draw_failures(failures, 0, args.batch, args.seed), args, 0)
    found = grpo.check(speaker.model, batch, settings_of(args), args.seed)
    print(
        "{rows} rows with {tokens} trained tokens, {clipped:.0%} of them clipped, against the "
        "textbook formula in float64, one row per reflection\n"
        "relative difference of the loss:      {loss_error:.1e}\n"
        "relative difference of the gradients: {gradient_error:.1e}".format(**found)
    )
    if not max(found["loss_error"], found["gradient_error"]) < 1e-5:
        raise ValueError("the step differs from the textbook by more than 1e-5")


def failures_command(args: argparse.Namespace) -> None:
    """Collect problems that a model gets wrong, with a wrong answer each, for train --failures."""
    folder, speaker = run_folder(args, "failures"), open_speaker(args)
    problems = load_problems(args, speaker, args.split, args.limit)
    write_config(folder, args)
    speaker.folder = folder
    load_weights(args, speaker)
    found = find_failures(speaker, problems, args.responses, args.keep)
    path = folder / "failures.jsonl"
    write_failures(path, found, speaker.tokenizer)
    print(f"{len(found)} failures on {len(problems)} {args.split} problems, in {path}")


def eval_command(args: argparse.Namespace) -> None:
    """Measure a model: right at the first try, and within two."""
    folder, speaker = run_folder(args, "eval"), open_speaker(args)
    problems = load_problems(args, speaker, args.split, args.limit)
    samples = args.samples if args.temperature else 1
    write_config(folder, args)
    speaker.folder = folder
    load_weights(args, speaker)
    tries = measure(speaker, problems, samples, "eval")
    (folder / "conversations.jsonl").unlink(missing_ok=True)
    for c in tries:
        log(folder / "conversations.jsonl", told(c, speaker.tokenizer))
    way = f"{samples} samples each, temperature {args.temperature:g}"
    title = f"{len(problems)} {args.split} problems, {way}: % right [95%]"
    counts = reasons(speaker.task, model=tries)
    tables = {title: accuracy(model=tries), "What the verifier said, times": counts}
    report(folder, {"tables": tables})
    print(f"The conversations are in {folder}/")


def play_command(args: argparse.Namespace) -> None:
    """Watch a model attempt, reflect and retry on a problem you type."""
    if args.model is None:  # the model trained last, else the base that it would start from
        saved = newest("*/model/config.json")
        args.model = str(saved.parent) if saved else "tiny"
    speaker = open_speaker(args)
    load_weights(args, speaker)

    def say(who: str, ids: list[int], verdict: Verdict | None = None) -> None:
        judged = f"   <- {verdict.reason.replace('_', ' ')}" if verdict else ""
        text = "\n".join(map(harmless, speaker.tokenizer.decode(ids).splitlines()))
        print(f"  {who:>10}  {text}{judged}")

    print(f"This is {args.model}. Type {speaker.task.how_to_type}; an empty line ends.")
    for number, line in enumerate(iter(lambda: input("> ").strip(), "")):
        key = (AGAIN, number)  # asked again, it may answer otherwise
        try:
            [c] = attempt(speaker, [speaker.task.parse(line)], 1, key)
            say("question", c.prompt)
            say("attempt", c.attempt, c.first)
            if not c.first.right:
                [c] = second_tries(speaker, [c], 1, key)
                say("reflection", c.reflection)
                say("retry", c.retry, c.second)
        except ValueError as error:
            print(f"  {error}")


def newest(pattern: str) -> Path | None:
    """The newest such file of all runs."""
    return max(RUNS.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)


def last_run() -> Path:
    """The folder of the run that was trained last. Raises FileNotFoundError where there is none."""
    path = newest("*/samples.jsonl")
    if not path:
        raise FileNotFoundError(f"no run in {RUNS}/ yet: r3.py train makes one")
    return path.parent


def show_command(args: argparse.Namespace) -> None:
    """Read the conversations of a run: what was said, rewarded and trained."""
    folder = Path(args.run or last_run())
    path = folder / "samples.jsonl"  # of train
    path = path if path.is_file() else folder / "conversations.jsonl"  # of eval
    groups = groups_of(read_lines(path, {"problem", "context", "first"}), args.step, args.only)
    if not groups:
        raise ValueError(f"{path} has no such conversations")
    if args.html:
        data = json.dumps(groups).replace("<", "\\u003c")  # no text ends the script
        models.replace_file(args.html, PAGE.replace("DATA", data, 1))
        print(f"{len(groups)} groups of conversations in {args.html}")
    else:
        print_groups(groups[: args.limit], sys.stdout.isatty() and "NO_COLOR" not in os.environ)
        if len(groups) > args.limit:
            print(f"\n{len(groups) - args.limit} groups more: --limit {len(groups)} shows all")


def plot_command(args: argparse.Namespace) -> None:
    """Draw the curves of a training run, or of several for comparison."""
    folders = [Path(run) for run in args.run] or [last_run()]
    path = args.out or (folders[0] / "curves.png" if len(folders) == 1 else "curves.png")
    draw_curves(folders, path)
    print(f"The curves are in {path}")


def main(argv: list[str] | None = None) -> None:
    about = "Reflect, Retry, Reward: train a language model to reflect."
    parser = argparse.ArgumentParser(prog="r3.py", description=about)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    subs, today = {}, datetime.date.today().isoformat()  # for chat templates that print the date
    doers = (train_command, eval_command, play_command, show_command, plot_command)
    for function in (*doers, failures_command):
        name, about = function.__name__.removesuffix("_command"), function.__doc__
        subs[name] = commands.add_parser(name, help=about, description=about)
        subs[name].set_defaults(function=function, command=name, date=today, resume=None)

    def flag(of: str, name: str, about: str, **kind) -> None:
        """Add a flag to the commands named in `of`."""
        key = name[2:].replace("-", "_")
        if key in DEFAULTS:
            tiny, other = DEFAULTS[key]
            about += (
                f" (default: {other})"
                if tiny == other
                else f" (default: {tiny}; a folder's: {other})"
            )
        elif kind.get("default") is not None:
            about += " (default: %(default)s)"
        for command in of.split():
            subs[command].add_argument(name, help=about, **kind)

    run = "the run's folder (default: the one trained last)"
    subs["show"].add_argument("run", nargs="?", metavar="RUN", help=run)
    subs["plot"].add_argument("run", nargs="*", metavar="RUN", help=run)
    whole, positive, real = at_least(0), at_least(1), at_least(0.0)
    every, most = "train failures eval play", "train failures eval"
    flag("play", "--model", "as for train (default: the model trained last)")
    flag(most, "--model", "a Hugging Face folder or hub id, or tiny: made here", default="tiny")
    flag(every, "--revision", "of a hub id: a branch, tag or commit")
    flag(every, "--task", "what to solve", choices=TASKS, default="countdown")
    flag(every, "--seed", "of everything random", type=whole, default=0)
    flag(every, "--device", "cpu, cuda or mps")
    flag(every, "--temperature", "of sampling; 0: greedy", type=real, default=1.0)
    flag(every, "--max-new-tokens", "the longest turn", type=positive)
    held = "tokens whose keys and values are held at once; fewer need less memory"
    flag(every, "--cache-tokens", held, type=positive)
    flag(most, "--data", "a JSON, JSONL or parquet file of problems, or a dataset's hub id")
    flag(most, "--skip-bad", "go on without bad records of --data", action="store_true")
    flag(most, "--train-size", "problems of --data to train on", type=positive)
    flag(
        most,
        "--test-size",
        "problems of --data to test on (default: a fifth, at most the paper's)",
        type=positive,
    )
    held_out = "what to measure on (default: test with --data, else dev)"
    flag("train", "--split", held_out, choices=("dev", "test"))
    flag("eval", "--split", held_out + "; all: the whole of --data", choices=("dev", "test", "all"))
    flag("failures", "--split", "where to look", choices=("train", "all"), default="train")
    flag("train eval", "--limit", "measure on so many problems", type=at_least(2))
    flag("failures", "--limit", "look at so many problems", type=positive)
    flag("train eval", "--samples", "first tries at each of them", type=positive)
    flag(most, "--resume", "go on with a run that was stopped, with the flags that it was begun "
         "with", metavar="FOLDER")  # fmt: skip
    flag(every, "--dtype", "of weights and computation (training keeps float32 masters)",
         choices=("float32", "bfloat16"))  # fmt: skip
    flag(most, "--name", "the folder in runs/ (default: task, model, seed, and time)")
    flag("train", "--problems", "look for failures in so many problems", type=positive)
    flag("train failures", "--responses", "tries at most at a problem", type=positive)
    keep = ("keep a problem if any of its tries fails (it is tried no more: cheap, and it may be "
            "solved at times, so that there is something to learn) or if all fail")  # fmt: skip
    flag("train failures", "--keep", keep, choices=("any", "all"), default="any")
    flag("train", "--fresh", "make the tiny base model anew", action="store_true")
    flag("train", "--controls", "measure what else could explain the gain", action="store_true")
    flag("train", "--dry-run", "only print the plan: nothing is loaded", action="store_true")
    flag("train", "--check", "only compare a step with the textbook", action="store_true")
    flag("train", "--failures", "reuse this failures.jsonl of another run", metavar="FILE")
    flag("train", "--steps", "optimiser steps", type=positive)
    flag("train", "--batch", "failures a step", type=positive)
    flag("train", "--group", "G, reflections a failure", type=at_least(2))
    flag("train", "--lr", "learning rate at its highest", type=real)
    flag("train", "--beta", "weight of the KL term", type=real, default=0.001)
    flag("train", "--clip", "epsilon of the clipped ratio", type=real, default=0.2)
    trained = "the turn whose tokens are trained: the paper's, or a baseline; attempt: plain GRPO"
    flag("train", "--train-on", trained, choices=TRAINED, default="reflection")
    flag("train", "--loss", "what a token weighs", choices=grpo.LOSSES, default="dapo")
    flag("train", "--skip-equal", "leave groups of equal rewards out of the KL term too (without "
         "KL they always are: it changes nothing)", action="store_true")  # fmt: skip
    flag("train", "--micro-tokens", "tokens in one forward and backward pass", type=positive)
    flag("train", "--offload", "keep masters and moments in main memory", action="store_true")
    flag("train", "--save-every", "steps between two checkpoints", type=positive)
    flag("train", "--keep-checkpoints", "so many, the last ones", type=positive, default=2)
    flag("train", "--checkpointing", "compute layers twice to store less", action="store_true")
    flag(every, "--compile", "torch.compile the decoder: minutes at first", action="store_true")
    flag("train", "--no-std", "do not divide advantages by the deviation", action="store_true")
    flag("show", "--only", "such conversations, or groups", default="all",
         choices=("all", "rewarded", "unrewarded", "mixed"))  # fmt: skip
    flag("show", "--step", "of these steps; RUN comes before (default: the last)", type=positive,
         nargs="+")  # fmt: skip
    flag("show", "--limit", "so many groups", type=positive, default=5)
    flag("show", "--html", "write a page to filter and read in a browser", metavar="FILE")
    flag("plot", "--out", "the picture (default: curves.png in the run's folder; of several runs, "
         "here)", metavar="FILE")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        join_processes()
        if args.resume:
            given = [text for text in (sys.argv[1:] if argv is None else argv) if text[:2] == "--"]
            if len(given) > 1:
                raise ValueError("--resume takes all other flags from the run")
            args = resumed(args)
        if args.command in most.split() and not vars(args).get("check"):
            grpo.STOP.clear()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, ask_to_stop)
        args.function(args)
    except grpo.Stopped:
        folder = args.resume or RUNS / args.name
        sys.exit(f"r3.py: stopped, and saved; go on with: r3.py {args.command} --resume {folder}")
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (ValueError, OSError) as error:
        sys.exit(f"r3.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("r3.py: out of GPU memory; lower --cache-tokens or --micro-tokens")
    except EOFError:
        print()
    except KeyboardInterrupt:
        sys.exit("r3.py: interrupted")
    except RuntimeError as error:
        if not dist.is_initialized():
            raise
        reason = str(error).strip().partition("\n")[0]
        sys.exit(f"r3.py: another process of this run has died, or is out of reach: {reason}")


def ask_to_stop(number: int, _frame) -> None:
    """A signal: the step under way is finished and saved first; at a second Ctrl-C, it is not."""
    if grpo.STOP.is_set() and number == signal.SIGINT:
        raise KeyboardInterrupt
    grpo.STOP.set()
    os.write(2, b"\nr3.py: stopping as soon as this step is saved (Ctrl-C again: at once)\n")


def join_processes() -> None:
    """Under torchrun: meet the other processes. Each has a GPU of its own, the first one speaks."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def at_least(least: int | float):
    """The type of a flag: a number of the same kind as `least`, and not below it."""

    def number(text: str):
        value = type(least)(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} on")
        return value

    return number


if __name__ == "__main__":
    main()
