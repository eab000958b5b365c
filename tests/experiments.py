"""Experiments around R3. Each command prints Markdown tables, and what it has done is not redone.

    python tests/experiments.py controls --run runs/NAME                what explains a run's gain
    python tests/experiments.py turns --run runs/NAME --train attempt   train other turns instead
    python tests/experiments.py variants [--seeds 0 1 2]                variants beside each other
    python tests/experiments.py seeds [--seeds 0 1 2]                   r3.py train, several seeds
    python tests/experiments.py heldout --runs runs/A runs/B            runs on the same problems
    python tests/experiments.py transfer --run runs/NAME                other tasks, other texts

runs/NAME is a finished run of `r3.py train`. Its model and its failures are used as they are.
"""

import argparse
import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sentence  # makes its task known

import grpo
import model as models
import r3
from grpo import Agent, Conversation, Conversations
from tasks import TinyCountdown

# -- A finished run --------------------------------------------------------------------------------


def open_run(run: Path) -> tuple[r3.Config, Agent]:
    """The settings of a run of `r3.py train`, and its vanilla model. Raises ValueError where the
    run is not finished."""
    if not (run / "report.json").exists():
        raise ValueError(f"{run} is no finished run: python r3.py train makes one")
    c = r3.load_config(run, "train")
    return c, r3.load_agent(c, training=True)


def with_weights(c: r3.Config, vanilla: Agent, folder: Path) -> Agent:
    """The same chat with the weights in another folder."""
    model = models.Model.from_pretrained(folder, getattr(torch, c.dtype), c.device)
    model.vocab_size = vanilla.model.vocab_size
    return replace(vanilla, model=model)


def in_order(conversations: Conversations) -> Conversations:
    return sorted(conversations, key=lambda t: (t.problem.id, t.attempt_index))


# -- Controls: what else could explain the gain? ---------------------------------------------------

GENERIC = (  # where the task has none of its own
    "I made a mistake. Next time I will read the problem carefully, work step by step, and check "
    "my result before I answer."
)
SWAPS = ("an empty reflection", "a fixed generic reflection", "another problem's reflection")
EQUAL = 16  # tries at a failure, from which the chance for fewer is estimated


def controls(
    run: Path, on: Path | None = None, limit: int | None = None, crossed_only: bool = False
) -> dict:
    """The tables. Everything is measured on the vanilla model's failures, its wrong first tries.
    What was sampled is kept in run/controls.

    on: a file of the vanilla model's conversations, where not the run's own are to be taken
    (`heldout` leaves one); limit: problems of it; crossed_only: nothing but who reflects and who
    retries."""
    c, vanilla = open_run(run)
    folder = run / "controls"
    conversations = in_order(r3.load_conversations(on or run / "vanilla.jsonl", vanilla))
    chosen = list(dict.fromkeys(t.problem.id for t in conversations))[:limit]
    failures = [
        t for t in conversations if t.problem.id in chosen and not t.attempt_verdict.correct
    ]
    if not failures:
        raise ValueError(f"{run}: the vanilla model got every problem right at once")
    if not crossed_only:  # done first: no third model in memory
        shuffled = shuffled_rewards(run, c, vanilla, failures)
    trained = with_weights(c, vanilla, run / "model")
    agents = {"vanilla": vanilla, "trained": trained}
    own = {"vanilla": failures}
    own["trained"] = second_tries(trained, failures, 1, grpo.EVALUATE, folder / "trained.jsonl")
    on = f"the vanilla model's {len(failures)} failures"
    tables = {
        f"Who reflects (rows) and who retries (columns), on {on}: % of retries right [95%]": {
            name: crossed(agents, name, own[name], folder) for name in agents
        },
        f"Tokens in a reflection on {on}": {
            name: {"mean": f"{np.mean([len(t.reflection) for t in own[name]]):.1f}"} for name in own
        },
    }
    if crossed_only:
        return tables
    rows = {"its own reflection": {name: right(own[name]) for name in own}}
    for label in SWAPS:
        rows[label] = {}
        for name, agent in agents.items():
            path = folder / f"{name}, {label}.jsonl"
            rows[label][name] = right(retries(agent, swapped(agent, own[name], label), path))
    rows["no failure in view: a second attempt"] = {
        name: second_attempts(agent, failures, folder / f"{name}, a second attempt.jsonl")
        for name, agent in agents.items()
    }
    rows["its own, trained on shuffled rewards"] = {"trained": shuffled}
    rows |= equal_tokens(vanilla, own["vanilla"], own["trained"], folder / "equal tokens.jsonl")
    tables[f"Retries on {on}, after …: % right [95%]"] = rows
    if isinstance(vanilla.task, TinyCountdown):
        title = "Texts like the cold start's, about development problems: nats a token"
        tables[title] = {
            name: {"nll": f"{forgetting(agent):.3f}"} for name, agent in agents.items()
        }
    return tables


def right(conversations: Conversations) -> list[float]:
    """The share of retries that are right: [mean, low, high]."""
    return r3.interval(
        np.array([t.retry_verdict.correct for t in conversations], float), conversations
    )


def crossed(
    agents: dict[str, Agent], reflector: str, reflected: Conversations, folder: Path
) -> dict:
    """Retries after one model's reflections, by either model."""
    row = {}
    for name, agent in agents.items():
        path = folder / f"{reflector} reflects, {name} retries.jsonl"
        row[name] = right(reflected if name == reflector else retries(agent, reflected, path))
    return row


def second_tries(
    agent: Agent, failures: Conversations, samples: int, purpose: int, path: Path
) -> Conversations:
    """`samples` reflections on each failure with a retry each, kept in a file."""
    if not path.exists():
        print(path.stem, file=sys.stderr)
        r3.write_conversations(path, grpo.rollout(agent, failures, samples, (purpose, 0)), agent)
    return r3.load_conversations(path, agent)


def retries(agent: Agent, reflected: Conversations, path: Path) -> Conversations:
    """A retry after each of some reflections that this model did not write, kept in a file."""
    if not path.exists():
        conversations: Conversations = []
        for some in tqdm(grpo.batches(agent, reflected, 1, turns=2), path.stem):
            conversations += grpo.sample_retries(agent, some, (grpo.EVALUATE, 0))
        r3.write_conversations(path, in_order(conversations), agent)
    return r3.load_conversations(path, agent)


def swapped(agent: Agent, conversations: Conversations, label: str) -> Conversations:
    """The same conversations with other reflections; label: one of SWAPS."""
    end = agent.tokenizer.stop_ids[:1]
    generic = agent.tokenizer.encode(getattr(agent.task, "generic_reflection", GENERIC))
    reflections = {
        "an empty reflection": [end] * len(conversations),
        "a fixed generic reflection": [generic[: agent.max_new_tokens - 1] + end]
        * len(conversations),
        "another problem's reflection": [
            elsewhere(conversations, i) for i in range(len(conversations))
        ],
    }[label]
    return [replace(t, reflection=r) for t, r in zip(conversations, reflections, strict=True)]


def elsewhere(conversations: Conversations, number: int) -> list[int]:
    """A reflection on another problem: on the next such failure from half-way round. (On the same
    one, where all failures are of one problem.)"""
    start = (number + len(conversations) // 2) % len(conversations)
    others = (
        t
        for t in conversations[start:] + conversations[:start]
        if t.problem.id != conversations[number].problem.id
    )
    return next(others, conversations[number]).reflection


def second_attempts(agent: Agent, failures: Conversations, path: Path) -> list[float]:
    """The share that is right of new attempts at the problems of the failures."""
    if not path.exists():
        print(path.stem, file=sys.stderr)
        problems = list({f.problem.id: f.problem for f in failures}.values())
        samples = 1 + max(f.attempt_index for f in failures)
        r3.write_conversations(
            path, grpo.attempt_all(agent, problems, samples, (grpo.PLAY, 0)), agent
        )
    failed = {(f.problem.id, f.attempt_index) for f in failures}
    again = r3.load_conversations(path, agent)
    again = [t for t in again if (t.problem.id, t.attempt_index) in failed]
    return r3.interval(np.array([t.attempt_verdict.correct for t in again], float), again)


def shuffled_rewards(
    run: Path, c: r3.Config, vanilla: Agent, failures: Conversations
) -> list[float]:
    """The share of retries that are right after training on shuffled rewards."""
    agent = trained_on(run, c, vanilla, "reflection", run / "shuffled", shuffle=True)
    path = run / "controls/shuffled.jsonl"
    return right(second_tries(agent, failures, 1, grpo.EVALUATE, path))


def equal_tokens(vanilla: Agent, before: Conversations, after: Conversations, path: Path) -> dict:
    """The vanilla model with as many tokens a failure as the trained one spends, in more tries.

    before, after: the two models' second tries at the same failures. k is the ratio of the tokens
    that they spend on reflections and retries. A failure counts if any of k tries at it is right,
    which needs an oracle to say which one. One failure a problem, to save time.
    """
    spent = [
        sum(len(t.reflection) + len(t.retry) for t in conversations)
        for conversations in (before, after)
    ]
    k = min(EQUAL, spent[1] / spent[0])
    chosen = {t.problem.id: i for i, t in reversed(list(enumerate(before)))}.values()
    failures = in_order([before[i] for i in chosen])
    conversations = second_tries(vanilla, failures, EQUAL, grpo.PLAY, path)
    successes = (
        np.array([t.retry_verdict.correct for t in conversations]).reshape(-1, EQUAL).sum(axis=1)
    )
    chances = np.array([any_of(k, EQUAL, int(r)) for r in successes])
    row = {"vanilla": r3.interval(chances, failures)}
    row["trained"] = right([after[i] for i in chosen])
    return {f"its own, any of {k:.2f} tries; trained: one": row}


def any_of(k: float, n: int, successes: int) -> float:
    """The chance that any of k tries is right, without bias, where so many of n were: among the
    subsets of k, those with a success. A broken k lies between its two neighbours."""
    below, above = (
        1 - math.comb(n - successes, whole) / math.comb(n, whole)
        for whole in (math.floor(k), math.ceil(k))
    )
    return below + (k - math.floor(k)) * (above - below)


@torch.no_grad()
def forgetting(agent: Agent) -> float:
    """Nats a token of the tiny model on texts like the cold start's, about development problems."""
    problems = agent.task.load(split="dev", seed=agent.seed)
    key = f"held out {agent.seed}"
    total, tokens = 0.0, 0
    for ids, mask in r3.dialogues(agent.task, agent.tokenizer, problems, key, diligent=False):
        log_p = agent.model(ids.to(agent.model.device)).log_softmax(-1)[:, :-1].cpu()  # (B, T-1, V)
        chosen = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)[mask[:, 1:]]
        total -= chosen.sum().item()
        tokens += len(chosen)
    return total / tokens


# -- Training other turns, or on shuffled rewards --------------------------------------------------

TURNS = {
    "reflection": ("reflection",),  # R3
    "retry": ("retry",),
    "both": ("reflection", "retry"),
    "attempt": ("attempt",),  # plain GRPO on the answer
}


def train_turns(
    agent: Agent,
    reference,
    failures: Conversations,
    c: r3.Config,
    folder: Path,
    turns,
    shuffle=False,
) -> None:
    """`grpo.train` with other turns trained. Changes chat.model in place.

    turns: a value of TURNS. For the attempt, G answers are drawn to each failure's question. With
    `shuffle` the rewards of a step are dealt out anew: nothing can be learnt from them.
    """
    agent.model.gradient_checkpointing = c.checkpointing
    optimizer = grpo.MasterAdamW(agent.model, c.lr, c.offload)
    start, _ = grpo.load_checkpoint(folder, optimizer)
    for step in tqdm(range(start, c.steps), folder.name, c.steps, initial=start):
        drawn, key = (
            grpo.draw_failures(failures, step, c.batch_size, agent.seed),
            (grpo.TRAIN, step),
        )
        if turns == ("attempt",):
            problems = list({f.problem.id: f.problem for f in drawn}.values())
            conversations = grpo.attempt_all(agent, problems, c.group_size, key)
        else:
            conversations = grpo.rollout(agent, drawn, c.group_size, key)
        rewards = np.array([reward(agent, t, turns) for t in conversations], np.float32)
        if shuffle:
            rewards = np.random.default_rng([agent.seed, step]).permutation(rewards)
        add_gradient(agent, reference, conversations, torch.tensor(rewards), c, turns, optimizer)
        lr = c.lr * grpo.lr_multiplier(step, c.steps, c.warmup)
        norm = optimizer.update(lr, c.max_grad_norm)
        said = ("attempt",) if turns == ("attempt",) else ("reflection", "retry")
        metrics = {"step": step + 1, "reward": float(rewards.mean()), "grad_norm": norm}
        metrics["sampled_tokens"] = sum(
            len(getattr(t, turn)) for t in conversations for turn in said
        )
        grpo.append_jsonl(folder / "metrics.jsonl", metrics)
        if step + 1 == c.steps or (step + 1) % c.save_every == 0:
            grpo.save_checkpoint(folder, step + 1, optimizer, {})


def reward(agent: Agent, t: Conversation, turns: tuple[str, ...]) -> float:
    """1 if the last answer is right, and no trained turn was cut short; else 0."""
    ended = all(getattr(t, turn)[-1] in agent.tokenizer.stop_ids for turn in turns)
    return float(ended and (t.retry_verdict or t.attempt_verdict).correct)


def add_gradient(
    agent, reference, conversations: Conversations, rewards, c: r3.Config, turns, optimizer
) -> None:
    """The gradient of a step's loss, one group and turn at a time. A turn is a sequence.

    tries: group by group; rewards: (P * G,).
    """
    advantages = grpo.group_advantages(
        rewards.view(-1, c.group_size), scale=c.scale_advantages
    )  # (P, G)
    sequences = len(conversations) * len(turns)
    tokens = sum(len(getattr(t, turn)) for t in conversations for turn in turns)
    longest = sequences * agent.max_new_tokens
    normalizer = {"dapo": tokens, "grpo": sequences, "dr_grpo": longest}[c.loss_type]
    for p, A in enumerate(advantages.to(agent.model.device)):
        if not A.any() and not c.beta:
            continue  # all right or all wrong: no gradient comes from it
        for turn in turns:
            group = conversations[p * c.group_size :][: c.group_size]
            ids, scored, trained = rows_of(agent, group, turn)
            ref = None
            if c.beta:
                with torch.no_grad():
                    ref = grpo.token_logprobs(reference, ids, scored, agent.temperature)
            new = grpo.token_logprobs(agent.model, ids, scored, agent.temperature)  # (G, T)
            old = new.detach()  # each step samples anew
            if turn == "reflection":
                old = grpo.reflection_rows(group)[2].to(new.device)  # as `grpo.train` does
            trained = trained.to(new.device)
            loss = grpo.grpo_loss(
                new, old, ref, A, trained, c.clip, c.beta, c.loss_type, normalizer
            )
            loss.backward()
            optimizer.accumulate_gradients()


def rows_of(agent: Agent, group: Conversations, turn: str) -> tuple[torch.Tensor, ...]:
    """One group's conversations up to the end of a turn, padded on the right.

    Returns (G, T) each: the token ids; the mask of what comes after the context that the group
    shares; and the mask of the turn's own tokens.
    """
    again = agent.tokenizer.bridge(agent.task.retry_instruction)
    shared = group[0].attempt_prompt if turn == "attempt" else group[0].reflection_prompt
    rows = []
    for t in group:
        between = agent.tokenizer.next_turn(t.reflection, again) if turn == "retry" else []
        rows.append(shared + between + getattr(t, turn))
    shape = len(rows), max(map(len, rows))
    ids = torch.zeros(shape, dtype=torch.long)
    scored, trained = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
    for g, (t, row) in enumerate(zip(group, rows, strict=True)):
        start = len(row) - len(getattr(t, turn))
        ids[g, : len(row)] = torch.tensor(row)
        scored[g, len(shared) : len(row)] = True
        trained[g, start : len(row)] = True
    return ids, scored, trained


def trained_on(run: Path, c, vanilla: Agent, train: str, folder: Path, shuffle=False) -> Agent:
    """The vanilla model of a run trained by `train_turns` on its failures; loaded, if it is there.
    train: a key of TURNS."""
    if not (folder / "model/model.safetensors").exists():
        failures = r3.load_conversations(run / "failures.jsonl", vanilla)
        trained = replace(vanilla, model=copy.deepcopy(vanilla.model))
        reference = vanilla.model if c.beta else None
        train_turns(trained, reference, failures, c, folder, TURNS[train], shuffle)
        trained.model.save_pretrained(folder / "model")
        return trained
    return with_weights(c, vanilla, folder / "model")


def turns(
    run: Path, train: str, group_size: int | None, steps: int | None, out: Path | None
) -> None:
    """Train other turns than the reflection on a run's failures, and evaluate as the run did.
    Leaves metrics.jsonl, trained.jsonl, report.json and the model in a folder of the run."""
    c, vanilla = open_run(run)
    c = replace(c, group_size=group_size or c.group_size, steps=steps or c.steps)
    folder = out or run / f"{train}-group{c.group_size}-steps{c.steps}"
    trained = trained_on(run, c, vanilla, train, folder)
    before = in_order(r3.load_conversations(run / "vanilla.jsonl", vanilla))
    problems = list({t.problem.id: t.problem for t in before}.values())
    after = r3.evaluate(trained, problems, c.num_samples, folder.name, folder / "trained.jsonl")
    print(f"Trained: {train}")
    r3.report(c, folder, vanilla=before, trained=after)


# -- Several runs on the same held-out problems ----------------------------------------------------


def heldout(runs: list[Path], split: str, limit: int, num_samples: int, temperature: float) -> dict:
    """The vanilla and the trained models of some runs (of one vanilla model), on the same problems
    with the same random numbers: those of the first run's seed. The vanilla model is evaluated
    once. What was sampled is kept in each run's folder. Temperature 0 is greedy: one sample."""
    c, vanilla = open_run(runs[0])
    problems = r3.load_problems(c, vanilla, split, limit)
    vanilla, num_samples = (
        replace(vanilla, temperature=temperature),
        num_samples if temperature else 1,
    )
    way = f"temperature-{temperature:g}"
    file = f"heldout/{split}-{limit}-{way}.jsonl"
    conversations = {
        "vanilla": evaluated(vanilla, problems, num_samples, runs[0] / f"vanilla-{file}")
    }
    gains, reflections = {}, {"vanilla": about_reflections(vanilla, conversations["vanilla"])}
    for run in runs:
        trained, name = with_weights(c, vanilla, run / "model"), run.name
        conversations[name] = evaluated(trained, problems, num_samples, run / f"trained-{file}")
        gains[name] = r3.accuracy(vanilla=conversations["vanilla"], trained=conversations[name])
        reflections[name] = about_reflections(vanilla, conversations[name])
        if temperature:
            reflections[name]["KL"] = f"{divergence(trained, vanilla, conversations[name]):.3f}"
    on = f"{len(problems)} {split} problems, {num_samples} samples each, {way}"
    return {
        f"{on}: % right [95%]": seed_rows(gains),
        f"The verifier's reasons, {on}": reasons(**conversations),
        f"Reflections, {on}": reflections,
    }


def evaluated(agent: Agent, problems: list, samples: int, path: Path) -> Conversations:
    """`r3.evaluate`, kept in a file and taken from there."""
    return in_order(r3.evaluate(agent, problems, samples, path.stem, path))


def reasons(**by_model: Conversations) -> dict:
    """How often the verifier gave which reason, at the first try and at the retry."""
    rows = {}
    for name, conversations in by_model.items():
        rows[f"{name}, 1st try"] = Counter(t.attempt_verdict.reason for t in conversations)
        rows[f"{name}, retry"] = Counter(
            t.retry_verdict.reason for t in conversations if t.retry_verdict
        )
    return rows


def about_reflections(agent: Agent, conversations: Conversations) -> dict[str, str]:
    """How many reflections there are, how long they are, and the share that the verifier would take
    for a right answer. For tests/sentence.py also how often they name the word that is to be used,
    and the share of retries that are right if so, and if not."""
    conversations = [t for t in conversations if t.reflection]
    lengths = [len(t.reflection) for t in conversations]
    row = {"reflections": str(len(conversations)), "tokens": f"{np.mean(lengths or [0]):.1f}"}
    answers = np.array([agent.verify(t.problem, t.reflection).correct for t in conversations])
    row["right answers"] = percent(answers)
    if isinstance(agent.task, sentence.Sentence):
        said = [
            re.findall("[a-z]+", agent.tokenizer.decode(t.reflection).lower())
            for t in conversations
        ]
        named = np.array(
            [t.problem.use in words for t, words in zip(conversations, said, strict=True)]
        )
        good = np.array([t.retry_verdict.correct for t in conversations])
        row |= {"name the word": percent(named)}
        row |= {"right if so": percent(good[named]), "right if not": percent(good[~named])}
    return row


def percent(values: np.ndarray) -> str:
    return f"{100 * values.mean():.1f}" if len(values) else ""


@torch.no_grad()
def divergence(
    trained: Agent, vanilla: Agent, conversations: Conversations, most: int = 64
) -> float:
    """KL(trained || vanilla) in nats per reflection token, estimated on `most` reflections of the
    trained model: the mean of log pi - log pi_vanilla over their tokens."""
    differences = []
    for t in [t for t in conversations if t.reflection][:most]:
        ids = torch.tensor([t.reflection_prompt + t.reflection])
        mask = torch.arange(ids.shape[1])[None] >= len(t.reflection_prompt)
        new, old = (
            grpo.token_logprobs(agent.model, ids, mask, trained.temperature).cpu()[mask]
            for agent in (trained, vanilla)
        )
        differences.append(new - old)
    return torch.cat(differences).mean().item()


# -- Transfer and forgetting -----------------------------------------------------------------------


class Both(sentence.Sentence):
    """The opposite condition: the other word is to be used, too."""

    question = "Write one short sentence about life {}. Use the word {}, and the word {}."
    answer = "I put one boot on a stone before a long walk uphill."
    reflection_instruction = "That is wrong. Which two words must you use?"
    retry_instruction = "Now write one sentence with them."

    def faults(self, problem, text):
        faults = super().faults(problem, text)
        return {**faults, "forbidden_word": False, "missing_other": not faults["forbidden_word"]}


class Question(sentence.Sentence):
    """Another kind of sentence, with one word."""

    question = "Ask one short question about life {}. Use the word {}."
    answer = "Why do I need more than one boot up here?"
    retry_instruction = "Now write one question with it."

    def faults(self, problem, text):
        faults = super().faults(problem, text)
        return {**faults, "forbidden_word": False, "no_question": not text.strip().endswith("?")}


def prose() -> dict[str, str]:
    """Two English texts that every Python has: its licence, and its reference manual in part."""
    licence = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    manual = "\n\n".join(topics[name] for name in ("objects", "execmodel", "exceptions"))
    return {"the Python licence": licence.read_text()[:8_000], "the Python manual": manual[:8_000]}


def transfer(run: Path, split: str, limit: int, num_samples: int) -> dict:
    """What a run changed beyond its task: accuracy on two tasks that were never trained, and
    perplexity on English prose. Only for runs of tests/sentence.py."""
    c, vanilla = open_run(run)
    agents = {"vanilla": vanilla, "trained": with_weights(c, vanilla, run / "model")}
    tables = {}
    for task in (Both(), Question()):
        name = type(task).__name__.lower()
        problems, conversations = task.load(split=split, limit=limit, seed=c.seed), {}
        for who, agent in agents.items():
            path = run / f"transfer/{name}-{split}-{limit}-{who}.jsonl"
            conversations[who] = evaluated(replace(agent, task=task), problems, num_samples, path)
        on = f"{name}: {limit} {split} problems, {num_samples} samples each"
        tables[f"{on}: % right [95%]"] = r3.accuracy(**conversations)
        tables[f"The verifier's reasons, {on}"] = reasons(**conversations)
    tables["Perplexity"] = {
        title: {who: f"{perplexity(agent, text):.2f}" for who, agent in agents.items()}
        for title, text in prose().items()
    }
    return tables


@torch.no_grad()
def perplexity(agent: Agent, text: str, width: int = 512) -> float:
    """exp of the mean negative log-probability of a text's tokens, in rows of `width` tokens."""
    total, tokens = 0.0, 0
    for row in torch.tensor(agent.tokenizer.encode(text)).split(width):
        log_p = agent.model(row[None].to(agent.model.device))[0].log_softmax(-1)  # (T, V)
        total -= log_p[:-1].cpu().gather(1, row[1:, None]).sum().item()
        tokens += len(row) - 1
    return math.exp(total / tokens)


# -- Variants --------------------------------------------------------------------------------------

FILES = ("r3.py", "grpo.py", "model.py", "tasks.py")

# What is compared: a name, flags, and the title of a diff in README. Flags that begin with `turns`
# are of this file's command of that name; others, of `r3.py train`.
COMPARED = [
    ("reflection: the paper's R3", "", None),
    ("retry", "turns --train retry", None),
    ("reflection and retry", "turns --train both", None),
    ("attempt: plain GRPO on the answer", "turns --train attempt --group-size 16 --steps 20", None),
    (
        "no division by the deviation, no length bias",
        "--no-scale-advantages --loss-type dr_grpo",
        None,
    ),
    ("no KL", "--beta 0", None),
    ("two updates per batch", "--steps 36 --save-every 2", "several updates per batch"),
]


def variants(seeds: list[int], jobs: int, folder: Path) -> dict:
    """The table of COMPARED. Every run of a seed starts from the same base model and the same
    failures, so that rows differ in the variant alone. It takes minutes a run and a process."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Path]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for rows in (COMPARED[:1], COMPARED[1:]):  # the others take the paper's failures
            made = [(row[0], pool.submit(variant, folder, s, row)) for row in rows for s in seeds]
            for name, run in made:
                runs.setdefault(name, []).append(run.result())
    measured = {name: gains(of) for name, of in runs.items()}
    paper, _ = measured[COMPARED[0][0]]
    title = "Points over the vanilla model; apart: from the paper's, mean ± 95% over seeds"
    return {title: {name: variant_row(*of, paper) for name, of in measured.items()}}


def variant(folder: Path, seed: int, row: tuple[str, str, str | None]) -> Path:
    """Make one run of a row of COMPARED, unless it is there. Returns its folder."""
    name, flags, title = row
    paper = folder / "runs" / f"seed-{seed}"
    run = paper
    if row != COMPARED[0]:
        run = folder / "runs" / f"{re.sub(r'[^a-zA-Z]+', '-', name)}-{seed}"
    if (run / "report.json").exists():
        return run
    if flags.startswith("turns"):
        command = [__file__, *flags.split(), "--run", str(paper), "--out", str(run)]
    else:
        place = folder / "code" / run.name
        code(place, title)
        command = [str(place / "r3.py"), "train"]
        if (run / "config.json").exists():
            command += ["--resume", f"runs/{run.name}"]
        else:
            command += [*flags.split(), "--seed", str(seed), "--name", run.name]
            command += ["--failures", str(paper / "failures.jsonl")] if run != paper else []
    log = folder / f"{run.name}.log"
    with open(log, "w") as file:
        one = {**os.environ, "OMP_NUM_THREADS": "1"}  # small matrices: a run a core is faster
        command = [sys.executable, *command]
        done = subprocess.run(command, cwd=folder, stdout=file, stderr=file, env=one)
    if done.returncode:
        raise ValueError(f"{run.name} failed: see {log}")
    return run


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
    """A copy of the code in a folder, with a diff of README applied to it. Raises ValueError where
    the diff does not fit the code."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    if title:
        file, hunks = diffs((ROOT / "README.md").read_text())[title]
        text = (folder / file).read_text()
        for old, new in hunks:
            if text.count(old) != 1:
                raise ValueError(f"{title}: these lines are not once in {file}:\n{old}")
            text = text.replace(old, new)
        (folder / file).write_text(text)


def gains(runs: list[Path]) -> tuple[dict[str, np.ndarray], float]:
    """What the runs of a variant gained over the vanilla model, in points, seed by seed; and how
    many million tokens they sampled in training, on average."""
    found, tokens = {"1st try": [], "within two": []}, []
    for run in runs:
        tables = models.read_json(run / "report.json")["tables"]
        sampled = next(
            rows for name, rows in tables.items() if "samples each" in name and "gain" in rows
        )
        for column, values in found.items():
            values.append(100 * sampled["gain"][column][0])
        lines = r3.read_lines(run / "metrics.jsonl", "step")
        # Two updates on one batch report it twice: each batch counts once.
        batches = {
            (line["sampled_tokens"], line["reward"]) for line in lines if "sampled_tokens" in line
        }
        tokens.append(sum(sampled for sampled, _ in batches) / 1e6)
    return {name: np.array(values) for name, values in found.items()}, float(np.mean(tokens))


def variant_row(found: dict[str, np.ndarray], tokens: float, paper: dict) -> dict[str, str]:
    """Each gain: mean (seed by seed), and how far it is from the paper's, with a 95% interval."""
    row = {}
    for name, values in found.items():
        each = ", ".join(f"{value:+.1f}" for value in values)
        row[f"gain, {name}"] = f"{values.mean():+.1f} ({each})"
        apart, n = values - paper[name], len(values)
        t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(n, math.nan)  # Student's, n - 1 degrees
        half = t * np.std(apart, ddof=1) / n**0.5 if n > 1 else math.nan
        row[f"apart, {name}"] = f"{apart.mean():+.1f} ± {half:.1f}" if apart.any() else ""
    return row | {"M tokens": f"{tokens:.2f}"}


# -- Seeds -----------------------------------------------------------------------------------------


def seeds_table(seeds: list[int]) -> dict:
    """`r3.py train --split test` from each seed, and a table a way of sampling: a row a seed."""
    found: dict[str, dict] = {}
    for seed in seeds:
        run = r3.RUNS / f"test-seed{seed}"
        if not (run / "report.json").exists():
            given = ["--seed", str(seed), "--split", "test", "--name", run.name]
            given = ["--resume", str(run)] if (run / "config.json").exists() else given
            if subprocess.run([sys.executable, str(ROOT / "r3.py"), "train", *given]).returncode:
                raise ValueError(f"{run} is not finished: the same command goes on with it")
        for title, rows in models.read_json(run / "report.json")["tables"].items():
            if "gain" in rows:
                found.setdefault(title, {})[f"seed {seed}"] = rows
    return {title: seed_rows(by_seed) for title, by_seed in found.items()}


def seed_rows(by_seed: dict[str, dict]) -> dict[str, dict]:
    """{seed: r3.accuracy's rows} -> {seed: one row of them all}, and the mean over the seeds."""
    rows: dict[str, dict] = {name: {} for name in [*by_seed, "mean"]}
    for label in ("1st try", "within two"):
        for who in ("vanilla", "trained", "gain"):
            values = {seed: found[who][label] for seed, found in by_seed.items()}
            sign, column = "+" if who == "gain" else "", f"{label}, {who}"
            for seed, three in values.items():
                mean, low, high = (f"{100 * x:{sign}.1f}" for x in three)
                rows[seed][column] = f"{mean} [{low}, {high}]"
            mean = 100 * np.mean([three[0] for three in values.values()])
            rows["mean"][column] = f"{mean:{sign}.1f}"
    return rows


# -- The command line ------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    subs = parser.add_subparsers(dest="command", required=True)
    subs.add_parser("controls", help=controls.__doc__)
    train = subs.add_parser("turns", help=turns.__doc__)
    for sub in (subs.choices["controls"], train):
        sub.add_argument("--run", type=Path, required=True, help="a finished run of r3.py train")
    train.add_argument("--train", choices=list(TURNS), required=True, help="the trained turns")
    train.add_argument("--group-size", type=int, help="G (default: the run's)")
    train.add_argument("--steps", type=int, help="optimizer steps (default: the run's)")
    train.add_argument("--out", type=Path, help="where to leave files (default: in the run)")
    subs.choices["controls"].add_argument("--on", type=Path, help="conversations; see `controls`")
    subs.choices["controls"].add_argument("--limit", type=int, help="so many problems of them")
    about = "only who reflects and who retries"
    subs.choices["controls"].add_argument("--crossed-only", action="store_true", help=about)
    several = subs.add_parser("heldout", help=heldout.__doc__)
    several.add_argument("--runs", type=Path, nargs="+", required=True, help="finished runs")
    several.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, the default")
    other = subs.add_parser("transfer", help=transfer.__doc__)
    other.add_argument("--run", type=Path, required=True, help="a finished run")
    for sub in (several, other):
        sub.add_argument("--split", choices=("dev", "test"), default="dev")
        sub.add_argument("--limit", type=int, default=200, help="so many problems")
        sub.add_argument("--num-samples", type=int, default=2, help="first tries at each")
    subs.add_parser("variants", help=variants.__doc__)
    subs.add_parser("seeds", help=seeds_table.__doc__)
    for sub in (subs.choices["variants"], subs.choices["seeds"]):
        sub.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    sub = subs.choices["variants"]
    sub.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    sub.add_argument("--folder", type=Path, default=Path("runs/variants"), help="of all runs")
    return parser


TABLES = {
    "controls": controls, "heldout": heldout, "transfer": transfer, "variants": variants,
    "seeds": seeds_table,
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = vars(parser().parse_args(argv))
    command = args.pop("command")
    try:
        if command == "turns":
            turns(**args)
        else:
            print("\n" + r3.markdown(TABLES[command](**args)))
    except (ValueError, OSError, json.JSONDecodeError) as error:
        sys.exit(f"experiments.py: {error}")


if __name__ == "__main__":
    main()
