"""Experiments around R3. Each command prints Markdown tables and keeps what it sampled in files, so
that running it again continues where it stopped.

    python tests/experiments.py controls --run runs/NAME                what explains a run's gain
    python tests/experiments.py turns --run runs/NAME --train attempt   train other turns instead
    python tests/experiments.py variants [--seeds 0 1 2]                compare variants of R3
    python tests/experiments.py seeds [--seeds 0 1 2]                   r3.py train on several seeds
    python tests/experiments.py heldout --runs runs/A runs/B            runs on the same problems
    python tests/experiments.py transfer --run runs/NAME                other tasks and other texts
    python tests/experiments.py larger --run runs/NAME                  a larger vanilla model
    python tests/experiments.py all [--tiny]                            the tables of RESULTS.md
    python tests/experiments.py picture --run runs/NAME                 a group with its advantages

runs/NAME is a finished run of `r3.py train`. Its model and its failures are used as they are.

One command is for authors of variants, who move lines that README.md quotes:

    python tests/experiments.py readme    renew README's line numbers
"""

import argparse
import copy
import math
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sentence  # adds its task to TASKS

import grpo
import r3
from grpo import Agent, Conversation, Group, RngPrefix, Turn, reward, rollout
from model import Model, read_json, replace_file
from tasks import TinyCountdown

Rows = dict[str, dict]  # a table: {row: {column: value}}, for r3.markdown
Tables = dict[str, Rows]  # {title: table}
CORRECT = "% correct [95% interval]"  # ends the title of a table of accuracies


# -- A finished run --------------------------------------------------------------------------------
def open_run(run: Path) -> tuple[r3.Config, Agent]:
    """The settings of a run of `r3.py train`, and its vanilla model. Raises ValueError if the run
    has not finished."""
    if not (run / "report.json").exists():
        raise ValueError(f"{run} is not a finished run; make one with: python r3.py train")
    config = r3.load_config(run, "train")
    return config, r3.load_agent(config, r3.load_task(config), training=True)


def load_trained(config: r3.Config, vanilla: Agent, folder: Path) -> Agent:
    """The vanilla agent with the weights in another folder."""
    model = Model.from_pretrained(folder, getattr(torch, config.dtype), config.device)
    model.vocab_size = vanilla.model.vocab_size
    return replace(vanilla, model=model)


def sort_conversations(conversations: list[Conversation]) -> list[Conversation]:
    """Sort by problem and attempt, the order in which two models' conversations are paired."""
    return sorted(conversations, key=attrgetter("attempt_id"))


def distinct_problems(conversations: list[Conversation]) -> list:
    """The problems of some conversations, each once, in order of appearance."""
    return list({c.problem.id: c.problem for c in conversations}.values())


# -- Controls: what else could explain the gain? ---------------------------------------------------
GENERIC_REFLECTION = (  # for tasks that do not define `generic_reflection`
    "I made a mistake. Next time I will read the problem carefully, work step by step, and check "
    "my result before I answer."
)
EMPTY, GENERIC, ANOTHER = (  # reflections that replace a model's own
    "an empty reflection", "a fixed generic reflection", "another problem's reflection",
)  # fmt: skip
REPLACEMENTS = (EMPTY, GENERIC, ANOTHER)
MAX_TRIES = 16  # reflections and retries on a failure, from which pass@k is estimated


def controls(
    run: Path,
    conversations_path: Path | None = None,
    limit: int | None = None,
    quick: bool = False,
) -> Tables:
    """Measure what explains a run's gain: who reflects and who retries, and what happens after
    other reflections. Everything is measured on the wrong first attempts of the vanilla model.

    conversations_path: a file of the vanilla model's conversations to take the failures from (for
    example one that `heldout` wrote); by default, the run's own evaluation. limit: the maximum
    number of problems. quick: only measure who reflects and who retries, and the trained model's
    retries after an empty reflection. Samples are kept in the folder run/controls. Raises
    ValueError if the vanilla model made no mistake.
    """
    config, vanilla = open_run(run)
    folder = run / "controls"
    conversations = r3.load_conversations(conversations_path or run / "vanilla.jsonl", vanilla)
    conversations = sort_conversations(conversations)
    problem_ids = [problem.id for problem in distinct_problems(conversations)[:limit]]
    failures = [
        c for c in conversations if c.problem.id in problem_ids and not c.attempt_verdict.correct
    ]
    if not failures:
        raise ValueError(f"{run}: the vanilla model solved every problem on the first try")
    if not quick:  # This comes first because it needs memory for a model of its own.
        shuffled = shuffled_rewards(run, config, vanilla, failures)
    trained = load_trained(config, vanilla, run / "model")
    agents = {"vanilla": vanilla, "trained": trained}
    own = {"vanilla": failures}  # each model's own reflections and retries
    own["trained"] = reflect_and_retry(
        trained, failures, 1, grpo.EVALUATE, folder / "trained.jsonl"
    )
    subset = f"the vanilla model's {len(failures)} failures"
    title = f"Who reflects (rows) and who retries (columns), on {subset}: % of retries correct "
    tables: Tables = {
        f"{title}[95% interval]": {
            name: crossed(agents, name, own[name], folder) for name in agents
        },
        f"Reflections on {subset}": {
            name: describe_reflections(agents[name], own[name]) for name in own
        },
    }
    rows: Rows = {"its own reflection": {name: retry_accuracy(own[name]) for name in own}}
    retrying_agents = {"trained": trained} if quick else agents
    for label in [EMPTY] if quick else REPLACEMENTS:
        rows[label] = {}
        for name, agent in retrying_agents.items():
            path = folder / f"{name}, {label}.jsonl"
            replaced = replace_reflections(agent, own[name], label)
            rows[label][name] = retry_accuracy(retry_only(agent, replaced, path))
    title = f"Retries on {subset}, after …: {CORRECT}"
    if quick:
        return {**tables, title: rows}
    rows["no failure in view: a second attempt"] = {
        name: second_attempts(agent, failures, folder / f"{name}, a second attempt.jsonl")
        for name, agent in agents.items()
    }
    rows["its own, trained on shuffled rewards"] = {"trained": shuffled}
    rows |= equal_tokens(vanilla, own["vanilla"], own["trained"], folder / "equal tokens.jsonl")
    tables[title] = rows
    if isinstance(vanilla.task, TinyCountdown):
        title = "Dialogues like those of the cold start, about development problems: nats per token"
        tables[title] = {
            name: {"nll": f"{cold_start_nll(agent):.3f}"} for name, agent in agents.items()
        }
        attempts = {
            name: [c.attempt for c in r3.load_conversations(run / f"{name}.jsonl", vanilla)]
            for name in agents
        }
        tables["First attempts in the run's evaluations that search, %"] = {
            name: {"search": percent(searching(vanilla, turns))} for name, turns in attempts.items()
        }
    return tables


def retry_accuracy(conversations: list[Conversation]) -> list[float]:
    """The fraction of retries that are correct: [mean, low, high]."""
    correct = np.array([c.retry_verdict.correct for c in conversations], float)
    return r3.mean_with_interval(correct, conversations)


def mean_tokens(conversations: list[Conversation]) -> float:
    """The mean number of tokens in a reflection; 0 if there is none."""
    return grpo.mean([len(c.reflection.tokens) for c in conversations])


def crossed(
    agents: dict[str, Agent], reflector: str, reflected: list[Conversation], folder: Path
) -> dict[str, list[float]]:
    """The accuracy of each model's retries after the reflections of one model, the `reflector`.
    reflected: that model's own reflections and retries."""
    row = {}
    for name, agent in agents.items():
        path = folder / f"{reflector} reflects, {name} retries.jsonl"
        own = name == reflector
        row[name] = retry_accuracy(reflected if own else retry_only(agent, reflected, path))
    return row


def reflect_and_retry(
    agent: Agent, failures: list[Conversation], num_samples: int, purpose: int, path: Path
) -> list[Conversation]:
    """Reflect `num_samples` times on each failure and retry after each, unless the file exists."""
    if not path.exists():
        print(path.stem, file=sys.stderr)
        groups = rollout(agent, failures, num_samples, (purpose, 0))
        r3.write_conversations(path, sum(groups, []), agent)
    return r3.load_conversations(path, agent)


def retry_only(agent: Agent, reflected: list[Conversation], path: Path) -> list[Conversation]:
    """Retry after reflections that this model did not write, unless the file exists."""
    if not path.exists():
        conversations: list[Conversation] = []
        remaining = grpo.longest_first(agent, reflected)
        with tqdm(total=len(remaining), desc=path.stem) as bar:
            while remaining:
                batch = grpo.next_batch(agent, remaining, 1, turns=2)
                remaining = remaining[len(batch) :]
                conversations += grpo.sample_retries(agent, batch, (grpo.EVALUATE, 0))
                bar.update(len(batch))
        r3.write_conversations(path, sort_conversations(conversations), agent)
    return r3.load_conversations(path, agent)


def replace_reflections(
    agent: Agent, conversations: list[Conversation], label: str
) -> list[Conversation]:
    """The same conversations with other reflections. label: one of REPLACEMENTS."""
    end_of_turn = agent.tokenizer.stop_ids[:1]
    generic = agent.tokenizer.encode(getattr(agent.task, "generic_reflection", GENERIC_REFLECTION))
    generic = generic[: agent.max_new_tokens - 1] + end_of_turn
    replaced = []
    for index, conversation in enumerate(conversations):
        tokens = {EMPTY: end_of_turn, GENERIC: generic}.get(label)
        if label == ANOTHER:
            tokens = another_reflection(conversations, index)
        truncated = tokens[-1] not in agent.tokenizer.stop_ids
        reflection = Turn(conversation.reflection.prompt, tokens, truncated)
        replaced.append(replace(conversation, reflection=reflection))
    return replaced


def another_reflection(conversations: list[Conversation], index: int) -> list[int]:
    """The tokens of a reflection on another problem. The search for it starts half the list away
    from conversation `index`. If all conversations are about one problem, they are its own."""
    start = (index + len(conversations) // 2) % len(conversations)
    for other in conversations[start:] + conversations[:start]:
        if other.problem.id != conversations[index].problem.id:
            return other.reflection.tokens
    return conversations[index].reflection.tokens


def second_attempts(agent: Agent, failures: list[Conversation], path: Path) -> list[float]:
    """The accuracy of new attempts at the problems of the failures, as many as there are failures:
    [mean, low, high]."""
    if not path.exists():
        print(path.stem, file=sys.stderr)
        num_samples = 1 + max(failure.attempt_index for failure in failures)
        problems = distinct_problems(failures)
        attempts = grpo.attempt_all(agent, problems, num_samples, (grpo.PLAY, 0))
        r3.write_conversations(path, attempts, agent)
    failed = {failure.attempt_id for failure in failures}
    attempts = [c for c in r3.load_conversations(path, agent) if c.attempt_id in failed]
    correct = np.array([c.attempt_verdict.correct for c in attempts], float)
    return r3.mean_with_interval(correct, attempts)


def shuffled_rewards(
    run: Path, config: r3.Config, vanilla: Agent, failures: list[Conversation]
) -> list[float]:
    """The accuracy of retries after training on shuffled rewards: [mean, low, high]."""
    agent = trained_on(run, config, vanilla, "shuffled", run / "shuffled")
    path = run / "controls/shuffled.jsonl"
    return retry_accuracy(reflect_and_retry(agent, failures, 1, grpo.EVALUATE, path))


def equal_tokens(
    vanilla: Agent, before: list[Conversation], after: list[Conversation], path: Path
) -> Rows:
    """Give the vanilla model as many tokens per failure as the trained one uses, in several tries.

    before, after: the two models' reflections and retries on the same failures. k is the ratio of
    the tokens in them. The row compares the vanilla model's pass@k with the trained model's pass@1.
    (pass@k counts a failure if any of k tries is correct, so it assumes an oracle that picks it.)
    To save time, it is measured on one failure per problem.
    """
    tokens_before, tokens_after = (
        sum(len(c.reflection.tokens) + len(c.retry.tokens) for c in conversations)
        for conversations in (before, after)
    )
    k = min(MAX_TRIES, tokens_after / tokens_before)
    first_of_problem = {c.problem.id: i for i, c in reversed(list(enumerate(before)))}
    failures = sort_conversations([before[i] for i in first_of_problem.values()])
    tries = reflect_and_retry(vanilla, failures, MAX_TRIES, grpo.PLAY, path)
    correct = np.array([c.retry_verdict.correct for c in tries]).reshape(-1, MAX_TRIES)
    chances = np.array([pass_at_k(k, MAX_TRIES, int(n)) for n in correct.sum(axis=1)])
    row = {
        "vanilla": r3.mean_with_interval(chances, failures),
        "trained": retry_accuracy([after[i] for i in first_of_problem.values()]),
    }
    return {f"its own, pass@{k:.2f} (trained model: pass@1)": row}


def pass_at_k(k: float, n: int, successes: int) -> float:
    """The unbiased estimate of the probability that any of k tries is correct, if `successes` of n
    tries were: the fraction of subsets of size k that contain a success. If k is not an integer,
    interpolate between its two neighbors."""
    below, above = (
        1 - math.comb(n - successes, size) / math.comb(n, size)
        for size in (math.floor(k), math.ceil(k))
    )
    return below + (k - math.floor(k)) * (above - below)


@torch.no_grad()
def cold_start_nll(agent: Agent) -> float:
    """The tiny model's mean negative log-likelihood, in nats per token, on dialogues like those of
    its cold start, but about development problems. It rises if training makes it forget them."""
    problems = agent.task.load(split="dev", seed=agent.seed)
    rng = random.Random(f"held out {agent.seed}")
    total, num_tokens = 0.0, 0
    for ids, mask in r3.dialogue_batches(agent.task, agent.tokenizer, problems, rng, False):
        log_p = agent.model(ids.to(agent.model.device)).log_softmax(-1)[:, :-1].cpu()  # (B, T-1, V)
        log_p = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)[mask[:, 1:]]  # (N,)
        total -= log_p.sum().item()
        num_tokens += len(log_p)
    return total / num_tokens


# -- Training other turns, or on shuffled rewards --------------------------------------------------
class RetryTrained(Conversation):
    """The retry is trained, and the reflection is not."""

    def trained_turns(self) -> list[Turn]:
        return [self.retry]


class BothTrained(Conversation):
    """The reflection and the retry are trained."""

    def trained_turns(self) -> list[Turn]:
        return [self.reflection, self.retry]


class AttemptTrained(Conversation):
    """The attempt is trained. There is no reflection and no retry: this is plain GRPO."""

    def trained_turns(self) -> list[Turn]:
        return [self.attempt]


class RewardShuffled(Conversation):
    """The reflection is trained, but its reward is that of a random conversation of the step."""

    shuffled_reward = 0.0


TRAINED = {  # the classes of conversations that `train_turns` can train
    "reflection": Conversation,  # R3
    "retry": RetryTrained,
    "both": BothTrained,
    "attempt": AttemptTrained,
    "shuffled": RewardShuffled,  # only for `controls`
}


def rollout_attempts(
    agent: Agent, failures: list[Conversation], group_size: int, rng_prefix: RngPrefix
) -> list[Group]:
    """Attempt the problem of each failure `group_size` times, instead of `grpo.rollout`."""
    problems = distinct_problems(failures)
    attempts = grpo.attempt_all(agent, problems, group_size, rng_prefix)
    attempts = [AttemptTrained(**vars(attempt)) for attempt in attempts]
    return [attempts[i : i + group_size] for i in range(0, len(attempts), group_size)]


def rollout_shuffled(
    agent: Agent, failures: list[Conversation], group_size: int, rng_prefix: RngPrefix
) -> list[Group]:
    """`grpo.rollout`, after which the rewards of the step are permuted at random."""
    groups = rollout(agent, failures, group_size, rng_prefix)
    conversations, (_, step) = sum(groups, []), rng_prefix
    rewards = [reward(conversation) for conversation in conversations]
    shuffled = np.random.default_rng([agent.seed, step]).permutation(rewards).tolist()
    for conversation, shuffled_reward in zip(conversations, shuffled, strict=True):
        conversation.shuffled_reward = shuffled_reward
    return groups


REPLACED: dict[str, dict[str, Callable]] = {  # the functions of grpo.py that are replaced
    "attempt": {"rollout": rollout_attempts},
    "shuffled": {"rollout": rollout_shuffled, "reward": attrgetter("shuffled_reward")},
}


def train_turns(
    agent: Agent,
    reference: Model | None,
    failures: list[Conversation],
    config: r3.Config,
    folder: Path,
    train: str,
) -> None:
    """`grpo.train` with other turns trained. Changes agent.model in place.

    train: a key of TRAINED. The class of the failures is what says which turns are trained, because
    the conversations about a failure are made from it. Resumes from a checkpoint in the folder.
    """
    failures = [TRAINED[train](**vars(failure)) for failure in failures]
    with ExitStack() as stack, tqdm(total=config.steps, desc=folder.name) as bar:
        for name, function in REPLACED.get(train, {}).items():
            stack.enter_context(patch.object(grpo, name, function))
        for step, _ in grpo.train(agent, reference, failures, config, folder):
            bar.update(step - bar.n)


def trained_on(run: Path, config: r3.Config, vanilla: Agent, train: str, folder: Path) -> Agent:
    """The vanilla model of a run after `train_turns` on the run's failures. If the trained model is
    in the folder already, it is loaded. train: a key of TRAINED."""
    if (folder / "model/model.safetensors").exists():
        return load_trained(config, vanilla, folder / "model")
    failures = r3.load_conversations(run / "failures.jsonl", vanilla)
    trained = replace(vanilla, model=copy.deepcopy(vanilla.model))
    reference = vanilla.model if config.beta else None
    train_turns(trained, reference, failures, config, folder, train)
    trained.model.save_pretrained(folder / "model")
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)  # three times as large as the model
    return trained


def turns(
    run: Path, train: str, group_size: int | None, steps: int | None, out: Path | None
) -> None:
    """Train other turns than the reflection on a run's failures, and evaluate the result as the run
    did. Metrics, samples, report and model go to a folder within the run's, or to `out`."""
    config, vanilla = open_run(run)
    config = replace(
        config, group_size=group_size or config.group_size, steps=steps or config.steps
    )
    folder = out or run / f"{train}-group{config.group_size}-steps{config.steps}"
    trained = trained_on(run, config, vanilla, train, folder)
    before = sort_conversations(r3.load_conversations(run / "vanilla.jsonl", vanilla))
    problems = distinct_problems(before)
    path = folder / "trained.jsonl"
    after = r3.evaluate(trained, problems, config.num_samples, folder.name, path)
    print(f"Trained: {train}")
    r3.report(config, folder, {"vanilla": before, "trained": after})


# -- Several runs on the same held-out problems ----------------------------------------------------
def heldout(
    runs: list[Path], split: str, limit: int, num_samples: int, temperature: float
) -> Tables:
    """Compare the trained models of several runs, which started from the same vanilla model, on the
    same held-out problems.

    All models use the same random numbers: those of the first run's seed. The vanilla model is
    evaluated once. Samples are kept in the runs' folders. temperature: 0 means greedy decoding, one
    sample per problem.
    """
    config, vanilla = open_run(runs[0])
    problems = r3.load_problems(config, vanilla.task, split, limit)
    problems = r3.drop_long_problems(vanilla, problems)
    vanilla = replace(vanilla, temperature=temperature)
    num_samples = num_samples if temperature else 1
    file = f"heldout/{split}-{limit}-temperature-{temperature:g}.jsonl"
    before = evaluate(vanilla, problems, num_samples, runs[0] / f"vanilla-{file}")
    conversations = {"vanilla": before}
    reflections = {"vanilla": describe_reflections(vanilla, before)}
    gains: dict[str, Rows] = {}
    for run in runs:
        trained = load_trained(config, vanilla, run / "model")
        after = evaluate(trained, problems, num_samples, run / f"trained-{file}")
        conversations[run.name] = after
        gains[run.name] = r3.accuracy({"vanilla": before, "trained": after})
        reflections[run.name] = describe_reflections(vanilla, after)
        if temperature:
            reflections[run.name]["KL"] = f"{divergence(trained, vanilla, after):.3f}"
    subset = f"{len(problems)} {split} problems, {r3.plural(num_samples, 'sample')} each, "
    subset += f"temperature {temperature:g}"
    return {
        f"{subset}: {CORRECT}": seed_rows(gains),
        f"The verifier's reasons, {subset}": count_reasons(conversations),
        f"Reflections, {subset}": reflections,
    }


def evaluate(agent: Agent, problems: list, num_samples: int, path: Path) -> list[Conversation]:
    """`r3.evaluate`, with the file's name as its title."""
    return sort_conversations(r3.evaluate(agent, problems, num_samples, path.stem, path))


def count_reasons(by_model: dict[str, list[Conversation]]) -> dict[str, Counter]:
    """How often the verifier gave each reason, for first attempts and for retries."""
    rows = {}
    for name, conversations in by_model.items():
        retried = [c for c in conversations if c.retry_verdict]
        rows[f"{name}, 1st try"] = Counter(c.attempt_verdict.reason for c in conversations)
        rows[f"{name}, retry"] = Counter(c.retry_verdict.reason for c in retried)
    return rows


def describe_reflections(agent: Agent, conversations: list[Conversation]) -> dict[str, str]:
    """A row about a model's reflections: how many there are, their mean length, and the percentage
    that the verifier would accept as an answer.

    For the tiny task also the percentage that search. For tests/sentence.py also the percentage
    that name the required word, and the accuracy of the retries after those that do and after those
    that do not."""
    conversations = [c for c in conversations if c.reflection]
    answers = np.array([agent.verify(c.problem, c.reflection).correct for c in conversations])
    row = {
        "reflections": str(len(conversations)),
        "tokens": f"{mean_tokens(conversations):.1f}",
        "correct answers": percent(answers),
    }
    if isinstance(agent.task, TinyCountdown):
        row["search"] = percent(searching(agent, [c.reflection for c in conversations]))
    if isinstance(agent.task, sentence.Sentence):
        texts = [agent.tokenizer.decode(c.reflection.tokens).lower() for c in conversations]
        words = [re.findall("[a-z]+", text) for text in texts]
        required = [c.problem.required_word for c in conversations]
        named = np.array([r in found for r, found in zip(required, words, strict=True)], bool)
        correct = np.array([c.retry_verdict.correct for c in conversations], bool)
        row["name the word"] = percent(named)
        row["retry correct if named"] = percent(correct[named])
        row["retry correct if not"] = percent(correct[~named])
    return row


def searching(agent: Agent, turns: list[Turn]) -> np.ndarray:
    """For each turn of the tiny task, whether it searches: it calls what it has tried "no" or
    "yes"."""
    words = [agent.tokenizer.decode(turn.tokens).split() for turn in turns]
    return np.array(["no" in found or "yes" in found for found in words])


def percent(values: np.ndarray) -> str:
    """The percentage of true values; empty if there are none at all."""
    return f"{100 * values.mean():.1f}" if len(values) else ""


@torch.no_grad()
def divergence(
    trained: Agent, vanilla: Agent, conversations: list[Conversation], max_reflections: int = 64
) -> float:
    """Estimate KL(trained || vanilla) in nats per reflection token: the mean of
    log pi - log pi_vanilla over the tokens of reflections that the trained model sampled."""
    differences = []
    for c in [c for c in conversations if c.reflection][:max_reflections]:
        # A file of conversations has no log-probabilities, and none are needed here.
        reflection = replace(c.reflection, logprobs=[0.0] * len(c.reflection.tokens))
        rows = grpo.pack_group([replace(c, reflection=reflection)])
        new, old = (
            grpo.token_logprobs(agent.model, rows, trained.temperature).cpu()[rows.mask]
            for agent in (trained, vanilla)
        )
        differences.append(new - old)
    return torch.cat(differences).mean().item()


# -- Transfer and forgetting -----------------------------------------------------------------------
class Both(sentence.Sentence):
    """The opposite condition: the second word must be used as well."""

    question = "Write one short sentence about life {}. Use the word {}, and the word {}."
    example_answer = "I put one boot on a stone before a long walk uphill."
    reflection_instruction = "That is wrong. Which two words must you use?"
    retry_instruction = "Now write one sentence with them."

    def faults(self, problem, text):
        faults = super().faults(problem, text)
        return {**faults, "forbidden_word": False, "missing_other": not faults["forbidden_word"]}


class Question(sentence.Sentence):
    """Another kind of sentence: a question that uses one word."""

    question = "Ask one short question about life {}. Use the word {}."
    example_answer = "Why do I need more than one boot up here?"
    retry_instruction = "Now write one question with it."

    def faults(self, problem, text):
        faults = super().faults(problem, text)
        return {**faults, "forbidden_word": False, "no_question": not text.strip().endswith("?")}


def prose() -> dict[str, str]:
    """Two English texts that come with every Python: its license, and a part of its reference
    manual."""
    license_text = (Path(sysconfig.get_path("stdlib")) / "LICENSE.txt").read_text()
    manual = "\n\n".join(topics[name] for name in ("objects", "execmodel", "exceptions"))
    return {"the Python license": license_text[:8_000], "the Python manual": manual[:8_000]}


def transfer(run: Path, split: str, limit: int, num_samples: int) -> Tables:
    """Measure what a run changed beyond its task: the accuracy on two tasks that were not trained,
    and the perplexity of English prose. Only for runs of tests/sentence.py."""
    config, vanilla = open_run(run)
    agents = {"vanilla": vanilla, "trained": load_trained(config, vanilla, run / "model")}
    tables: Tables = {}
    for task in (Both(), Question()):
        task_name = type(task).__name__.lower()
        problems = task.load(split=split, limit=limit, seed=config.seed)
        conversations = {}
        for name, agent in agents.items():
            path = run / f"transfer/{task_name}-{split}-{limit}-{name}.jsonl"
            conversations[name] = evaluate(replace(agent, task=task), problems, num_samples, path)
        subset = f"{task_name}: {limit} {split} problems, {r3.plural(num_samples, 'sample')} each"
        tables[f"{subset}: {CORRECT}"] = r3.accuracy(conversations)
        tables[f"The verifier's reasons, {subset}"] = count_reasons(conversations)
    tables["Perplexity"] = {
        title: {name: f"{perplexity(agent, text):.2f}" for name, agent in agents.items()}
        for title, text in prose().items()
    }
    return tables


@torch.no_grad()
def perplexity(agent: Agent, text: str, chunk_length: int = 512) -> float:
    """The perplexity of a text, computed in chunks of `chunk_length` tokens."""
    total, num_tokens = 0.0, 0
    for chunk in torch.tensor(agent.tokenizer.encode(text)).split(chunk_length):
        log_p = agent.model(chunk[None].to(agent.model.device))[0].log_softmax(-1)  # (T, V)
        total -= log_p[:-1].cpu().gather(1, chunk[1:, None]).sum().item()
        num_tokens += len(chunk) - 1
    return math.exp(total / num_tokens)


# -- Variants --------------------------------------------------------------------------------------
FILES = ("r3.py", "grpo.py", "model.py", "tasks.py")


class Variant(NamedTuple):
    """A variant of R3, compared with R3 by `variants`."""

    name: str
    flags: str  # of `r3.py train`; or, if they begin with "turns", of this file's command `turns`
    diff: str | None = None  # the title of a diff in README that is applied to the code first


PAPER = Variant("reflection: the paper's R3", "")
OTHERS = (
    Variant("retry", "turns --train retry"),
    Variant("reflection and retry", "turns --train both"),
    Variant("attempt: plain GRPO", "turns --train attempt --group-size 16 --steps 20"),
    Variant(
        "no division by the standard deviation, no length bias",
        "--no-scale-advantages --loss-type dr_grpo",
    ),
    Variant("no KL penalty", "--beta 0"),
    Variant("two updates per batch", "--updates 2"),
)
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # number of seeds: 97.5% quantile


def variants(seeds: list[int], jobs: int, folder: Path) -> Tables:
    """Train the tiny model with each variant from each seed, and compare the gains. All runs of a
    seed start from the same base model and the same failures. A run takes minutes."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Path]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for group in ((PAPER,), OTHERS):  # The others train on the failures of the paper's runs.
            futures = [
                (v.name, pool.submit(run_variant, folder, s, v)) for v in group for s in seeds
            ]
            for name, future in futures:
                runs.setdefault(name, []).append(future.result())
    measured = {name: gains(folders) for name, folders in runs.items()}
    paper, _ = measured[PAPER.name]
    title = "Gain over the vanilla model in points: mean (each seed); and its difference from R3's "
    title += "gain: mean ± 95% interval"
    return {title: {name: variant_row(*gain, paper) for name, gain in measured.items()}}


def run_variant(folder: Path, seed: int, variant: Variant) -> Path:
    """Make the run of a variant from a seed, unless it is finished. Returns the run's folder.
    Raises ValueError if it fails."""
    paper = run = folder / "runs" / f"seed-{seed}"
    if variant != PAPER:
        run = folder / "runs" / f"{re.sub(r'[^a-zA-Z]+', '-', variant.name)}-{seed}"
    if (run / "report.json").exists():
        return run
    if variant.flags.startswith("turns"):
        command = [__file__, *variant.flags.split(), "--run", str(paper), "--out", str(run)]
    else:
        code_folder = folder / "code" / run.name
        code(code_folder, variant.diff)
        command = [str(code_folder / "r3.py"), "train"]
        if (run / "config.json").exists():
            command += ["--resume", f"runs/{run.name}"]
        else:
            command += [*variant.flags.split(), "--seed", str(seed), "--name", run.name]
            if run != paper:
                command += ["--failures", str(paper / "failures.jsonl")]
    log = folder / f"{run.name}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # Small matrices: one core per run.
    with open(log, "w") as file:
        finished = subprocess.run(
            [sys.executable, *command], cwd=folder, stdout=file, stderr=file, env=environment
        )
    if finished.returncode:
        raise ValueError(f"{run.name} failed: see {log}")
    return run


def gains(runs: list[Path]) -> tuple[dict[str, np.ndarray], float]:
    """How much the runs of a variant gained over the vanilla model, in points, seed by seed; and
    how many million tokens a run sampled in training, on average."""
    points: dict[str, list[float]] = {"1st try": [], "within two": []}
    tokens = []
    for run in runs:
        tables = read_json(run / "report.json")["tables"]
        rows = next(table for table in tables.values() if "gain" in table)
        for column, values in points.items():
            values.append(100 * rows["gain"][column][0])
        metrics = r3.read_jsonl(run / "metrics.jsonl", "step")
        tokens.append(sum(record.get("sampled_tokens", 0) for record in metrics) / 1e6)
    return {name: np.array(values) for name, values in points.items()}, float(np.mean(tokens))


def variant_row(
    gain: dict[str, np.ndarray], tokens: float, paper: dict[str, np.ndarray]
) -> dict[str, str]:
    """The row of a variant: its gains, and their differences from those of the paper's R3."""
    row = {}
    for name, values in gain.items():
        by_seed = ", ".join(f"{value:+.1f}" for value in values)
        row[f"gain, {name}"] = f"{values.mean():+.1f} ({by_seed})"
        difference, n = values - paper[name], len(values)
        half_width = math.nan
        if n > 1:
            half_width = STUDENT_T.get(n, math.nan) * np.std(difference, ddof=1) / n**0.5
        cell = f"{difference.mean():+.1f} ± {half_width:.1f}" if difference.any() else ""
        row[f"difference, {name}"] = cell
    return row | {"M tokens": f"{tokens:.2f}"}


# -- A picture of a group --------------------------------------------------------------------------
def picture(run: Path, step: int | None, out: Path) -> None:
    """Draw what a group of a training step looks like, to a PNG file: the context in gray, then the
    two best and the two worst reflections with their advantages and retries.

    Reflections with a positive advantage are green, those with a negative one red. All that is gray
    is outside the mask. step: by default the last one that has a group with mixed rewards. Raises
    ValueError if there is no such group.
    """
    from matplotlib.figure import Figure  # imported here because other commands do not need it

    groups: dict[tuple[int, str], list[dict]] = {}
    for record in r3.read_jsonl(run / "samples.jsonl", "step", "advantage", "reflection"):
        if record["advantage"] and step in (None, record["step"]):
            groups.setdefault((record["step"], record["context"]), []).append(record)
    if not groups:
        raise ValueError(f"{run}: no group with mixed rewards was sampled")
    # The last group in which at least two reflections are better, and two worse, than the mean.
    balanced = {
        key: group
        for key, group in groups.items()
        if 2 <= sum(record["advantage"] > 0 for record in group) <= len(group) - 2
    }
    (shown_step, context), group = list((balanced or groups).items())[-1]
    group.sort(key=lambda record: -record["advantage"])
    turns = [("context", context, "gray")]  # (label, text, color)
    for record in group[:2] + group[-2:]:
        advantage, reason = record["advantage"], record["retry_verdict"]["reason"]
        color = "green" if advantage > 0 else "red"
        turns.append((f"{advantage:+.2f}  reflection", record["reflection"]["text"], color))
        turns.append(("retry", f"{record['retry']['text']}   <- {reason}", "gray"))
    lines = []  # (label, one line of text, color)
    for label, text, color in turns:
        wrapped = textwrap.wrap(text, 110)
        lines += [(label if i == 0 else "", line, color) for i, line in enumerate(wrapped)]
    height = 0.22 * (len(lines) + 2)  # inches
    figure = Figure(figsize=(11, height))
    figure.text(0.01, 1 - 0.25 / height, f"{run.name}, step {shown_step}", weight="bold")
    for i, (label, line, color) in enumerate(lines):
        y = 1 - 0.22 * (i + 2.2) / height
        figure.text(0.16, y, label, color=color, family="monospace", size=9, ha="right")
        # Dollar signs would start a formula.
        text = line.replace("$", r"\$")
        figure.text(0.18, y, text, color=color, family="monospace", size=9)
    figure.savefig(out, dpi=110)
    print(f"The picture is in {out}")


# -- README's diffs and links -------------------------------------------------------------
Hunk = tuple[str, str]  # old text and new text, whole lines
LINK = re.compile(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)")  # [`code`](file.py#L12)


def diffs(readme: str) -> dict[str, tuple[str, list[Hunk]]]:
    """README's diffs: {title: (file, hunks)}.

    The first line of a diff is `--- FILE: title`, and `@@` separates its hunks.
    """
    found = {}
    for block in re.findall(r"```diff\n--- (.*?)```", readme, re.DOTALL):
        heading, _, body = block.partition("\n")
        file, _, title = heading.partition(": ")
        hunks = []
        for hunk in re.split(r"^@@\n", body, flags=re.MULTILINE):
            lines = [(line[:1], line[1:]) for line in hunk.splitlines()]
            old = "".join(text + "\n" for mark, text in lines if mark != "+")
            new = "".join(text + "\n" for mark, text in lines if mark != "-")
            hunks.append((old, new))
        found[title] = file, hunks
    return found


def code(folder: Path, title: str | None) -> None:
    """Copy the code to a folder, and apply the diff with this title in README, if one is given.
    Raises ValueError if the diff does not apply."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    if title:
        file, hunks = diffs((ROOT / "README.md").read_text())[title]
        source, reasons = apply_hunks((folder / file).read_text(), hunks)
        if reasons:
            message = f"the diff {title!r} does not apply to {file}:"
            raise ValueError("\n  ".join([message, *reasons]))
        (folder / file).write_text(source)


def apply_hunks(source: str, hunks: list[Hunk]) -> tuple[str, list[str]]:
    """Apply the hunks of a diff to a file's text. The old lines of a hunk must stand in it exactly
    once, one after another. Returns the new text, and the reasons why hunks were not applied: a
    reason names a line and how often it was found."""
    source, reasons = "\n" + source, []  # so that every line follows a newline
    for old, new in hunks:
        if source.count("\n" + old) == 1:
            source = source.replace("\n" + old, "\n" + new)
            continue
        lines, old_lines = source.splitlines(), [line for line in old.splitlines() if line]
        counts = [(line, lines.count(line)) for line in old_lines]
        wrong = [f"found {count} times: {line}" for line, count in counts if count != 1]
        reasons += wrong or [f"found, but not in this order, the lines after: {old_lines[0]}"]
    return source.removeprefix("\n"), reasons


def renew_readme(path: Path | None = None) -> None:
    """Renew the line numbers of README.md's links to code, after the code has changed. Then check
    that all diffs apply.

    The diffs are those of README.md and of tests/VARIANTS.md. Raises ValueError with a list of what
    the author has to mend: linked code that does not stand on exactly one line of its file, and
    diffs that no longer apply, with the lines that are the cause.
    """
    path = path or ROOT / "README.md"
    root = path.parent
    readme, misfits = renew_links(path.read_text(), root)
    if readme != path.read_text():
        replace_file(path, readme)
        print(f"{path.name} was renewed")
    misfits = [f"{path.name}: {misfit}" for misfit in misfits]
    for page in (path, root / "tests/VARIANTS.md"):
        for title, (file, hunks) in diffs(page.read_text() if page.exists() else "").items():
            _, reasons = apply_hunks((root / file).read_text(), hunks)
            if reasons:
                misfits.append(f"{page.name}: the diff {title!r} does not apply to {file}:")
                misfits += [f"  {reason}" for reason in reasons]
    if misfits:
        raise ValueError("this needs to be mended by hand:\n  " + "\n  ".join(misfits))


def renew_links(readme: str, root: Path) -> tuple[str, list[str]]:
    """Renew the line numbers of the links of the form [`code`](file.py#L12). Returns the new text,
    and a line about each link whose code does not stand on exactly one line of its file."""
    misfits = []

    def renew(link: re.Match) -> str:
        fragment, file, _ = link.groups()
        lines = (root / file).read_text().splitlines()
        numbers = [number for number, line in enumerate(lines, 1) if fragment in line]
        if len(numbers) == 1:
            return f"[`{fragment}`]({file}#L{numbers[0]})"
        places = f"on the lines {', '.join(map(str, numbers))}" if numbers else "nowhere"
        misfits.append(f"the link {fragment!r} must stand on one line of {file}; it is {places}")
        return link[0]

    return LINK.sub(renew, readme), misfits


# -- Seeds -----------------------------------------------------------------------------------------
def seeds_table(seeds: list[int]) -> Tables:
    """Run `r3.py train --split test` with each seed, and show the accuracies, a row for each seed.
    Finished runs are not repeated, and interrupted ones are resumed."""
    tables: dict[str, dict[str, Rows]] = {}  # {title: {seed: rows}}
    for seed in seeds:
        run = r3.RUNS / f"test-seed{seed}"
        train_unless_finished(ROOT / "r3.py", run, ["--seed", str(seed), "--split", "test"])
        for title, rows in read_json(run / "report.json")["tables"].items():
            if "gain" in rows:
                tables.setdefault(title, {})[f"seed {seed}"] = rows
    return {title: seed_rows(by_seed) for title, by_seed in tables.items()}


def seed_rows(by_seed: dict[str, Rows]) -> Rows:
    """Put the rows of `r3.accuracy` for each seed into one row, and add a row with their means."""
    rows: Rows = {name: {} for name in [*by_seed, "mean"]}
    for label in ("1st try", "within two"):
        for name in ("vanilla", "trained", "gain"):
            sign, column = "+" if name == "gain" else "", f"{label}, {name}"
            intervals = {seed: accuracies[name][label] for seed, accuracies in by_seed.items()}
            for seed, interval in intervals.items():
                mean, low, high = (f"{100 * x:{sign}.1f}" for x in interval)
                rows[seed][column] = f"{mean} [{low}, {high}]"
            mean = 100 * np.mean([interval[0] for interval in intervals.values()])
            rows["mean"][column] = f"{mean:{sign}.1f}"
    return rows


# -- A larger vanilla model ------------------------------------------------------------------------
def larger(run: Path, width: int = 4) -> Tables:
    """Make a vanilla model that is several times as wide as that of a run of the tiny model, by the
    same cold start on the same dialogues, and evaluate it on the run's problems, beside the vanilla
    and the trained model of the run.

    A width of 4 means about 16 times the parameters. Raises ValueError if the run's model is not
    the tiny one.
    """
    config, vanilla = open_run(run)
    if config.model != "tiny":
        raise ValueError(f"{run} is not a run of the tiny model")
    conversations = {
        name: sort_conversations(r3.load_conversations(run / f"{name}.jsonl", vanilla))
        for name in ("vanilla", "trained")
    }
    folder = r3.make_tiny_model(vanilla.task, config.seed, width)
    agent = load_trained(config, vanilla, folder)
    problems = distinct_problems(conversations["vanilla"])
    path = run / f"vanilla-width-{width}.jsonl"
    conversations["larger"] = evaluate(agent, problems, config.num_samples, path)
    models = {"vanilla": vanilla.model, "larger": agent.model}
    count = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    count["trained"] = count["vanilla"]
    rows: Rows = {
        f"{name}, {count[name]:,} parameters": r3.accuracy({name: of_model})[name]
        for name, of_model in conversations.items()
    }
    subset = f"{len(problems)} {config.split} problems, seed {config.seed}"
    losses = {
        name: {"nats per token": f"{cold_start_nll(replace(vanilla, model=model)):.3f}"}
        for name, model in models.items()
    }
    return {
        f"A larger vanilla model, {subset}: {CORRECT}": rows,
        "Dialogues like those of the cold start, about development problems": losses,
    }


# -- Everything ------------------------------------------------------------------------------------
SENTENCE_FLAGS = (  # of README's run on a pretrained model
    "--task sentence --max-new-tokens 24 --beta 0 --steps 30 --batch-size 8 --limit 32 "
    "--num-samples 2 --num-problems 120 --max-attempts 2"
)
SENTENCE_MODES = {"all-weights": "--lr 2e-5", "lora": "--lora-rank 32 --lr 4e-4"}


def everything(seeds: list[int], tiny: bool, model: str) -> None:
    """Print the tables of README and tests/RESULTS.md, one after another: those of the tiny model
    and, without --tiny, those of a pretrained model on tests/sentence.py (hours on a laptop).

    Whatever has been measured already is read from runs/.
    """
    print_tables(seeds_table(seeds))
    for seed in seeds:
        print_tables(controls(r3.RUNS / f"test-seed{seed}"), f"Seed {seed}. ")
    for seed in seeds:
        print(f"\nSeed {seed}. Plain GRPO on the attempts, with as many turns as R3")
        turns(r3.RUNS / f"test-seed{seed}", "attempt", group_size=16, steps=None, out=None)
    for seed in seeds:
        print_tables(larger(r3.RUNS / f"test-seed{seed}"))
    if tiny:
        return
    runs = []
    for mode, flags in SENTENCE_MODES.items():
        for seed in seeds:
            run = r3.RUNS / f"sentence-{mode}-seed{seed}"
            new = [*SENTENCE_FLAGS.split(), *flags.split(), "--model", model, "--seed", str(seed)]
            train_unless_finished(ROOT / "tests/sentence.py", run, new)
            runs.append(run)
    print_tables(heldout(runs, split="test", limit=200, num_samples=2, temperature=1.0))
    failures = runs[0] / "vanilla-heldout/test-200-temperature-1.jsonl"
    print_tables(controls(runs[0], failures))
    for run in runs[1:]:
        print_tables(controls(run, failures, quick=True), f"{run.name}. ")
    turns(runs[0], "attempt", group_size=16, steps=None, out=None)
    print_tables(transfer(runs[0], split="test", limit=60, num_samples=2))


def print_tables(tables: Tables, prefix: str = "") -> None:
    """Print tables as Markdown, with a prefix before each title."""
    print("\n" + r3.markdown({prefix + title: rows for title, rows in tables.items()}), flush=True)


def train_unless_finished(program: Path, run: Path, flags: list[str]) -> None:
    """Make a training run with these flags, or resume it. Does nothing if it has finished. Raises
    ValueError if it fails."""
    if (run / "report.json").exists():
        return
    flags = [*flags, "--name", str(run.relative_to(r3.RUNS))]
    if (run / "config.json").exists():
        flags = ["--resume", str(run)]
    if subprocess.run([sys.executable, str(program), "train", *flags]).returncode:
        raise ValueError(f"{run} did not finish; run the same command again to resume it")


# -- The command line ------------------------------------------------------------------------------
TABLES: dict[str, Callable[..., Tables]] = {
    "controls": controls, "variants": variants, "seeds": seeds_table, "heldout": heldout,
    "transfer": transfer, "larger": larger,
}  # fmt: skip
COMMANDS = {
    **TABLES, "all": everything, "turns": turns, "picture": picture, "readme": renew_readme,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The parser of the command line. A command's help is the first paragraph of its docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition(". ")[0] + ".")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands = {}
    for name, function in COMMANDS.items():
        summary = function.__doc__.partition("\n\n")[0]
        commands[name] = subparsers.add_parser(name, help=summary, description=summary)
    for name in ("controls", "turns", "transfer", "larger", "picture"):
        help_text = "folder of a finished run of r3.py train"
        commands[name].add_argument("--run", type=Path, required=True, help=help_text)

    add = commands["controls"].add_argument
    help_text = "take the failures from this file of conversations (default: the run's evaluation)"
    add("--on", type=Path, dest="conversations_path", metavar="FILE", help=help_text)
    add("--limit", type=int, help="maximum number of problems")
    help_text = "only measure who reflects and who retries, and retries after an empty reflection"
    add("--quick", action="store_true", help=help_text)

    add = commands["turns"].add_argument
    choices = [name for name in TRAINED if name != "shuffled"]
    add("--train", choices=choices, required=True, help="the turns that are trained")
    add("--group-size", type=int, help="G, samples per group (default: the run's)")
    add("--steps", type=int, help="number of training steps (default: the run's)")
    add("--out", type=Path, help="folder for the results (default: a folder within the run's)")

    add = commands["picture"].add_argument
    add("--step", type=int, help="the step (default: the last one that has a mixed group)")
    add("--out", type=Path, default=Path("group.png"), help="PNG file (default: group.png)")

    add = commands["heldout"].add_argument
    add("--runs", type=Path, nargs="+", required=True, help="folders of finished runs")
    help_text = "sampling temperature; 0, the default, means greedy decoding"
    add("--temperature", type=float, default=0.0, help=help_text)
    for name in ("heldout", "transfer"):
        add = commands[name].add_argument
        add("--split", choices=("dev", "test"), default="dev", help="default: dev")
        add("--limit", type=int, default=200, help="maximum number of problems (default: 200)")
        help_text = "attempts at each problem (default: 2)"
        add("--num-samples", type=int, default=2, help=help_text)

    for name in ("variants", "seeds", "all"):
        help_text = "default: 0 1 2"
        commands[name].add_argument(
            "--seeds", type=int, nargs="+", default=[0, 1, 2], help=help_text
        )
    help_text = "width of the larger model, relative to the tiny one (default: 4)"
    commands["larger"].add_argument("--width", type=int, default=4, help=help_text)
    add = commands["all"].add_argument
    add("--tiny", action="store_true", help="only the experiments with the tiny model")
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    add("--model", default=model, help=f"folder or hub id (default: {model})")
    add = commands["variants"].add_argument
    add(
        "--jobs", type=int, default=2, help="number of runs at a time, one thread each (default: 2)"
    )
    help_text = "folder of all runs (default: runs/variants)"
    add("--folder", type=Path, default=Path("runs/variants"), help=help_text)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run a command. An error that a user can fix is reported in one line."""
    flags = vars(parser().parse_args(argv))
    command = flags.pop("command")
    try:
        result = COMMANDS[command](**flags)
        if command in TABLES:
            print_tables(result)
    except (ValueError, OSError) as error:  # JSONDecodeError is a ValueError
        sys.exit(f"experiments.py: {error}")


if __name__ == "__main__":
    main()
