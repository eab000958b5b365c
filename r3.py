"""Reflect, Retry, Reward (Bensal et al., 2025, arXiv 2505.24726), and the command line around it.

    question -> attempt -> wrong? -> reflection_1 … reflection_G -> retry_1 … retry_G -> rewards

A model that fails a task writes a reflection on what went wrong and tries again with it in view.
If the second try is right, the tokens of the reflection are rewarded, and no others: the model is
taught no answer, it is taught to reflect.

The method is three functions, `attempt`, `reflect` and `retry`, and the loop in `reinforce` that
calls them. The rest of this file makes an experiment of it: train, failures, eval and play.

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
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
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
    logprobs: list[float] = field(default_factory=list)  # of the reflection's tokens, when drawn
    retry: list[int] = field(default_factory=list)
    second: Verdict | None = None


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
    drawn = speaker.speak(prompts, samples, keys, first=first).tokens
    return [
        Conversation(problem, sample, prompt, turn, speaker.verify(problem, turn))
        for problem, prompt, turns in zip(problems, prompts, drawn, strict=True)
        for sample, turn in enumerate(turns, first)
    ]


def reflect(speaker: Speaker, failures: Tries, samples: int, key: tuple) -> tuple[Tries, Cache]:
    """`samples` reflections on each failure, failure by failure, and the cache to retry from."""
    told = speaker.task.reflect
    contexts = [speaker.after(f.problem, f.prompt, (f.attempt, told)) for f in failures]
    keys = [(*key, REFLECT, f.problem.id, f.sample) for f in failures]
    drawn = speaker.speak(contexts, samples, keys)
    reflected = []
    for f, context, *group in zip(failures, contexts, drawn.tokens, drawn.logprobs, strict=True):
        for turn, logprobs in zip(*group, strict=True):
            reflected.append(replace(f, context=context, reflection=turn, logprobs=logprobs))
    return reflected, drawn.cache


def retry(speaker: Speaker, reflected: Tries, key: tuple, cache: Cache | None = None) -> Tries:
    """A second try after each reflection.

    With the cache from `reflect`, only what lies between the turns is read; without one (the
    reflections are another model's, or a control's) each conversation is read from its beginning.
    """
    told, again = speaker.task.reflect, speaker.task.again
    turns = (turn for c in reflected for turn in (c.attempt, c.reflection))
    if any(map(speaker.tokenizer.forgets, turns)):
        cache = None  # what it has read is not what the template shows
    asked, keys, seen = [], [], Counter()
    for c in reflected:
        ids = speaker.after(c.problem, c.context, (c.attempt, told), (c.reflection, again))
        # The cache has read all of a reflection but its last token.
        asked.append(ids[len(c.context) + len(c.reflection) - 1 :] if cache else ids)
        keys.append((*key, RETRY, c.problem.id, c.sample, seen[c.problem.id, c.sample]))
        seen[c.problem.id, c.sample] += 1
    drawn = speaker.speak(asked, 1, keys, cache=cache).tokens
    return [
        replace(c, retry=turn, second=speaker.verify(c.problem, turn))
        for c, [turn] in zip(reflected, drawn, strict=True)
    ]


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
    """A conversation as JSON, its problem by number."""
    return {**asdict(c), "problem": c.problem.id}


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


def sample_batch(
    speaker: Speaker, failures: Tries, args, step: int, shuffle_rewards: bool = False
) -> tuple[Tries, grpo.Batch]:
    """G reflections on each failure, a retry after each, and what the optimiser learns from them.

    A reflection is worth 1 if the retry after it is right, else 0; one that was cut at the longest
    length is worth 0. shuffle_rewards deals the step's rewards out anew among its reflections: a
    control, from which nothing can be learnt.
    """

    def work(some: Tries) -> Tries:
        return second_tries(speaker, some, args.group, (TRAIN, step))

    tries = work_through(speaker, work, failures, args.group, 2)
    cut = np.array([c.reflection[-1] not in speaker.tokenizer.stop_ids for c in tries])
    rewards = np.array([c.second.right for c in tries]) & ~cut
    if shuffle_rewards:
        rewards = np.random.default_rng([speaker.seed, step]).permutation(rewards)
    batch = grpo.reflection_batch(
        contexts=[c.context for c in tries],
        reflections=[c.reflection for c in tries],
        logprobs=[c.logprobs for c in tries],
        rewards=torch.tensor(rewards).float().view(len(failures), args.group),  # (P, G)
        scale=not args.no_std,
    )
    batch.metrics["cut"] = float(cut.mean())
    return tries, batch


def reinforce(
    speaker: Speaker, failures: Tries, args, reference: Model | None, shuffle_rewards=False
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train the speaker's model by R3 on a dataset of failures, in place.

    Yields (steps done, metrics) before the first step and after each. Checkpoints go into the run's
    folder, from where it goes on, and what was sampled into samples.jsonl.
    """
    folder, files = speaker.folder / "checkpoints", ("metrics.jsonl", "samples.jsonl")
    files = tuple(speaker.folder / name for name in files)
    if shuffle_rewards:
        folder, files = speaker.folder / "checkpoints" / "shuffled", ()
    optimizers = grpo.adamw(speaker.model, args.lr, args.offload)
    start = grpo.load_checkpoint(folder, optimizers, files)

    def batches(step: int) -> grpo.Batch:
        chosen = draw_failures(failures, step, args.batch, speaker.seed)
        tries, batch = sample_batch(speaker, chosen, args, step, shuffle_rewards)
        if not shuffle_rewards:
            write_samples(files[1], step + 1, tries, batch, speaker.tokenizer)
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
    names = ("steps", "lr", "clip", "beta", "loss", "temperature", "max_new_tokens")
    names += ("micro_tokens", "skip_equal", "save_every", "keep_checkpoints")
    return grpo.Settings(**{name: getattr(args, name) for name in names})


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


def cold_start(task, seed: int, folder: Path | None) -> tuple[Model, Tokenizer]:
    """A tiny model trained from random weights on dialogues: grpo.py with an advantage of one.
    Checkpoints go into the folder, from where it goes on."""
    model, tokenizer = unborn(task, seed)
    problems, size = task.load(split="cold", seed=seed), COLD["dialogues"]
    # What comes before each of the assistant's turns: the first follows the prompt itself.
    bridges = [[], tokenizer.bridge(task.reflect), tokenizer.bridge(task.again)]
    batches = []
    quiet = grpo.rank()[0] > 0
    for start in tqdm(range(0, COLD["steps"], WINDOW), "dialogues", leave=False, disable=quiet):
        rng, rows = random.Random(f"cold {seed} {start}"), []
        diligent = start < COLD["diligent"] * COLD["steps"]
        for _ in range(size * WINDOW):
            problem, turns = task.cold_dialogue(problems, rng, diligent)
            ids, spans = tokenizer.prompt(*task.messages(problem)), []
            for bridge, turn in zip(bridges, turns, strict=False):
                ids = tokenizer.next_turn(ids, bridge)
                said = tokenizer.encode(turn) + tokenizer.stop_ids[:1]
                spans.append((len(ids), len(ids) + len(said)))
                ids += said
            rows.append((ids, spans))
        # Dealt out by length, so that a batch holds rows of about one length and hardly any
        # padding; then the batches are shuffled.
        rows.sort(key=lambda row: len(row[0]))
        for i in rng.sample(range(WINDOW), WINDOW):
            ids, spans = zip(*rows[i * size : (i + 1) * size], strict=True)
            batches.append(grpo.Batch(list(ids), list(spans), advantages=torch.ones(size)))
    settings = grpo.Settings(steps=COLD["steps"], lr=COLD["muon_lr"], beta=0.0)
    optimizers = grpo.muon(model, COLD["muon_lr"], COLD["adamw_lr"])
    done = grpo.load_checkpoint(folder, optimizers) if folder else 0
    steps = grpo.train(model, batches.__getitem__, settings, optimizers, None, done, folder)
    with tqdm(total=settings.steps, desc="cold start", initial=done, disable=quiet) as bar:
        for _, metrics in steps:
            bar.set_postfix_str(f"nll {metrics['nll']:.3f}", refresh=False)
            bar.update()
    return model, tokenizer


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

    def first(some: list) -> Tries:
        return attempt(speaker, some, samples, (MEASURE, 0))

    tries = work_through(speaker, first, problems, samples, 1, f"{name}, first tries")
    second = iter(once_more(speaker, [c for c in tries if not c.first.right], name))
    return [c if c.first.right else next(second) for c in tries]


def once_more(speaker: Speaker, failures: Tries, name: str) -> Tries:
    """Reflect once on each failure, and retry."""

    def work(some: Tries) -> Tries:
        return second_tries(speaker, some, 1, (MEASURE, 0))

    return work_through(speaker, work, failures, 1, 2, f"{name}, second tries")


def retry_all(speaker: Speaker, reflected: Tries, name: str) -> Tries:
    """Retry after reflections that are another speaker's, or a control's."""

    def work(some: Tries) -> Tries:
        return retry(speaker, some, (MEASURE, 0))

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

        def anew(some: list, name=name, samples=samples) -> Tries:
            return attempt(speakers[name], some, samples, (AGAIN, 0))

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

    def work(some: Tries) -> Tries:
        return second_tries(vanilla, some, n, (AGAIN, 0))

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


def write_samples(path: Path, step: int, tries: Tries, batch: grpo.Batch, tokenizer) -> None:
    """A line a reflection: its conversation, reward, advantage, and the trained span."""
    rows = zip(tries, batch.rewards.tolist(), batch.advantages.tolist(), batch.spans, strict=True)
    for c, reward, advantage, [span] in rows:  # span: token numbers in context + reflection
        worth = {"reward": reward, "advantage": advantage, "trained_span": span}
        log(path, {"step": step, **told(c, tokenizer), **worth})


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
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}, line {number} is no failure: {error!r}") from None
    return failures


def show(tables: dict[str, dict]) -> str:
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


def draw_curves(folder: Path) -> None:
    """curves.png from metrics.jsonl: how a training run went, step by step."""
    from matplotlib.figure import Figure  # here, since no other command wants it

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axis, (title, *names) in zip(figure.subplots(2, 3).flat, (
        ("right on held-out problems (95%)", "within two", "1st try"),
        ("reward: share of right retries", "reward"),
        ("tokens in a reflection", "length"),
        ("KL to the vanilla model, per token", "kl"),
        ("entropy per token (nats)", "entropy"),
        ("share of groups with equal rewards", "equal_groups"),
    ), strict=True):  # fmt: skip
        for name, mark, colour in zip(names, ("o-", "s--"), ("#0072B2", "#D55E00"), strict=False):
            points = [(line["step"], *np.ravel(line[name])) for line in lines if name in line]
            if not points:
                continue  # without a KL term there is no KL
            x, y, *ends = np.array(points).T  # ends: low and high, if it has an interval
            error, style = ([y - ends[0], ends[1] - y], mark) if ends else (None, "-")
            axis.errorbar(x, y, error, fmt=style, color=colour, capsize=3, label=name)
        if len(names) > 1:
            axis.legend(frameon=False)
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=110)


def report(folder: Path, found: dict) -> None:
    """Write report.json, and print its tables."""
    if grpo.rank()[0] == 0:
        models.replace_file(folder / "report.json", json.dumps(found, indent=2))
    print("\n" + show(found["tables"]))


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
    own = args.group * args.max_new_tokens
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
    parts["the most at a time"] = {
        "device": max(training, sampling),
        "main memory": sum(part.get("main memory", 0) for part in parts.values()),
    }
    return parts


def print_plan(args, speaker: Speaker, folder: Path, failures: int, problems: list) -> None:
    """What a training run would do and need."""
    longest = max(len(speaker.question(problem)) for problem in problems)
    context = longest + args.max_new_tokens + BRIDGES
    weights = sum(p.numel() for p in speaker.model.parameters())
    rows = min(args.batch, failures) * args.group
    steps = f"{args.steps} steps of up to {rows} reflections on {rows // args.group} failures"
    print(
        f"{weights:,} parameters, {args.dtype}, on {args.device}\n{steps}\na step samples up to "
        f"{2 * rows * args.max_new_tokens:,} tokens after contexts of up to {context}, and trains "
        f"up to {rows * args.max_new_tokens:,} of them"
    )
    parts = memory(speaker.model, args, context)
    cells = {k: {w: f"{n / 1e9:.2f}" for w, n in part.items()} for k, part in parts.items()}
    print("\n" + show({"Memory, GB (estimated):": cells}))
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
        draw_curves(folder)
        weights = " ".join(grpo.sha256(file)[:16] for file in models.shards(folder / "model"))
        found = {"tables": tables, "reflection tokens": [was, now], "weights sha256": weights}
        report(folder, found)
        print(f"{(time.time() - begun) / 60:.1f} minutes; weights {weights}; all in {folder}/")


def check_step(speaker: Speaker, failures: Tries, args) -> None:
    """Say how far a step is from the textbook. Raises ValueError if that is too far."""
    _, batch = sample_batch(speaker, draw_failures(failures, 0, args.batch, args.seed), args, 0)
    found = grpo.check(speaker.model, batch, settings_of(args), args.seed)
    print(
        "{rows} reflections of {tokens} tokens, {clipped:.0%} of them clipped, against the "
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
        saved = sorted(RUNS.glob("*/model/config.json"), key=lambda p: p.stat().st_mtime)
        args.model = str(saved[-1].parent) if saved else "tiny"
    speaker = open_speaker(args)
    load_weights(args, speaker)

    def say(who: str, ids: list[int], verdict: Verdict | None = None) -> None:
        judged = f"   <- {verdict.reason.replace('_', ' ')}" if verdict else ""
        print(f"  {who:>10}  {speaker.tokenizer.decode(ids)}{judged}")

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


def main(argv: list[str] | None = None) -> None:
    about = "Reflect, Retry, Reward: train a language model to reflect."
    parser = argparse.ArgumentParser(prog="r3.py", description=about)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    subs, today = {}, datetime.date.today().isoformat()  # for chat templates that print the date
    for function in (train_command, failures_command, eval_command, play_command):
        name, about = function.__name__.removesuffix("_command"), function.__doc__
        subs[name] = commands.add_parser(name, help=about, description=about)
        subs[name].set_defaults(function=function, command=name, date=today, resume=None)

    def flag(of: str, name: str, about: str, **kind) -> None:
        """Add a flag to the commands named in `of`."""
        key = name[2:].replace("-", "_")
        if key in DEFAULTS:
            about += " (default: {} for tiny, else {})".format(*DEFAULTS[key])
        elif kind.get("default") is not None:
            about += " (default: %(default)s)"
        for command in of.split():
            subs[command].add_argument(name, help=about, **kind)

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
    flag(most, "--test-size", "problems of --data to test on (default: a fifth)", type=positive)
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
    args = parser.parse_args(argv)
    try:
        join_processes()
        if args.resume:
            given = [text for text in (sys.argv[1:] if argv is None else argv) if text[:2] == "--"]
            if len(given) > 1:
                raise ValueError("--resume takes all other flags from the run")
            args = resumed(args)
        if args.command != "play":
            grpo.STOP.clear()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, ask_to_stop)
        args.function(args)
    except grpo.Stopped:
        folder = args.resume or RUNS / args.name
        sys.exit(f"r3.py: stopped, and saved; go on with: r3.py {args.command} --resume {folder}")
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
