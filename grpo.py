"""Reflect, Retry, Reward: the method, from a dataset of failures to the update of the weights.

    question -> attempt, wrong -> "reflect" -> reflection_1 … reflection_G       the trained tokens
                                                   |              |
                                                "again"        "again"
                                                   |              |
                                                retry_1   …    retry_G  ->  rewards r_1 … r_G

    A_g  = (r_g - mean r) / (std r + epsilon)                               `group_advantages`
    mask = 1 on the tokens of the reflections, 0 everywhere else            `reflection_rows`
    loss = - sum mask * (min(ratio A, clip(ratio) A) - beta KL) / sum mask  `grpo_loss`

The file reads from top to bottom: the loop (`train`), then what it calls: advantages and loss, the
mask and the log-probabilities, the conversation (`attempt`, `reflect`, `retry`), what a step
reports, the optimizer, and the checkpoint. A conversation is token ids from end to end: what is
trained is what was sampled, never text that was decoded and tokenized again.

This file knows a task only by `messages`, `verify`, `reflect` and `again`; a problem by its `id`;
and a verdict by `right` (both are dataclasses).

Shapes: P failures with G reflections each; T tokens of a conversation; V the vocabulary.
"""

import json
import math
import os
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model import Generation, KVCache, Model, Tokenizer, generate, replace_file


# -- The loop --------------------------------------------------------------------------------------
def train(
    agent: "Agent",
    reference: Model | None,
    failures: "Conversations",
    config: "Config",
    folder: Path,
) -> Iterator[tuple[int, dict[str, float]]]:
    """R3 on a dataset of failures. Changes agent.model in place; yields (steps done, metrics).

    reference: the model that training started with, for the KL term; None where beta is 0. What
    was sampled is added to folder/samples.jsonl, and training goes on from folder's checkpoint.
    Raises ValueError for a gradient that is not finite."""
    policy, G = agent.model, config.group_size
    policy.gradient_checkpointing = config.checkpointing
    optimizer = MasterAdamW(policy, config.lr, config.offload)
    start, state = load_checkpoint(folder, optimizer)  # state: what a variant wants kept
    if start == 0:
        yield 0, {}
    for step in range(start, config.steps):
        # 1-2. Draw failures, reflect G times on each, and retry once after each reflection.
        batch = draw_failures(failures, step, config.batch_size, agent.seed)
        conversations = rollout(agent, batch, G, rng_key=(TRAIN, step))  # P * G conversations

        # 3. The reward of a reflection is 1 if its retry is right, and it was not cut itself.
        rewards = torch.tensor(
            [
                float(conversation.retry_verdict.correct and not conversation.truncated)
                for conversation in conversations
            ]
        ).view(-1, G)

        # 4. How much better was each reflection than the others on the same failure?
        advantages = group_advantages(rewards, scale=config.scale_advantages)  # (P, G)

        # 5. The gradient of the step's loss, one failure with its G reflections at a time.
        num_tokens = sum(len(conversation.reflection) for conversation in conversations)
        max_tokens = len(conversations) * agent.max_new_tokens  # tokens, if all were the longest
        normalizer = {"dapo": num_tokens, "grpo": len(conversations), "dr_grpo": max_tokens}[
            config.loss_type
        ]
        loss_sums = []
        for index, advantage in enumerate(advantages):  # (G,)
            if not advantage.any() and not config.beta:
                continue  # all right or all wrong: no gradient comes from it
            ids, mask, old_logprobs = reflection_rows(
                conversations[index * G : (index + 1) * G]
            )  # (G, T) each
            ref_logprobs = None
            if config.beta:
                with torch.no_grad():
                    ref_logprobs = token_logprobs(reference, ids, mask, agent.temperature)
            logprobs = token_logprobs(policy, ids, mask, agent.temperature)  # (G, T)
            advantage, mask, old_logprobs = (
                advantage.to(policy.device),
                mask.to(policy.device),
                old_logprobs.to(policy.device),
            )
            loss = grpo_loss(
                logprobs,
                old_logprobs,
                ref_logprobs,
                advantage,
                mask,
                config.clip,
                config.beta,
                config.loss_type,
                normalizer,
            )
            loss.backward()
            optimizer.accumulate_gradients()
            loss_sums.append(
                loss_metrics(
                    loss,
                    logprobs.detach(),
                    old_logprobs,
                    ref_logprobs,
                    advantage,
                    mask,
                    config.clip,
                )
            )

        # 6. One update of the weights.
        lr = config.lr * lr_multiplier(step, config.steps, config.warmup)
        grad_norm = optimizer.update(lr, config.max_grad_norm)

        for conversation, reward, advantage in zip(
            conversations, rewards.flatten(), advantages.flatten(), strict=True
        ):
            scores = {"step": step + 1, "reward": reward.item(), "advantage": advantage.item()}
            append_jsonl(
                folder / "samples.jsonl", {**scores, **to_json(conversation, agent.tokenizer)}
            )
        yield (
            step + 1,
            {**step_metrics(conversations, rewards, loss_sums), "grad_norm": grad_norm, "lr": lr},
        )
        if step + 1 == config.steps or (step + 1) % config.save_every == 0:  # it is logged by now
            save_checkpoint(folder, step + 1, optimizer, state)


def setting(default, help_text: str, minimum: float | None = None, choices=(), commands="train"):
    """A field of a Config: its default, its help, its values, and the commands that have it."""
    metadata = {"help": help_text, "least": minimum, "choices": choices, "commands": commands}
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """The settings of `train`, with the paper's values where it states them."""

    steps: int = setting(1_750, "optimizer steps", minimum=1)
    batch_size: int = setting(256, "failures in a step", minimum=1)
    group_size: int = setting(8, "G, reflections on each failure", minimum=2)
    lr: float = setting(5e-7, "learning rate at its highest", minimum=0)
    warmup: float = setting(0.03, "share of the steps in which the learning rate rises", minimum=0)
    beta: float = setting(0.001, "weight of the KL term; 0 needs no reference model", minimum=0)
    clip: float = setting(0.2, "epsilon: the ratio is clipped to 1 - epsilon … 1 + epsilon", 0)
    loss_type: str = setting(
        "dapo", "what a token weighs, see grpo_loss", choices=("dapo", "grpo", "dr_grpo")
    )
    scale_advantages: bool = setting(True, "divide advantages by the group's standard deviation")
    max_grad_norm: float = setting(1.0, "a longer gradient is cut to this norm", minimum=0)
    offload: bool = setting(False, "keep float32 weights and moments in main memory")
    checkpointing: bool = setting(False, "compute layers twice in training, to store less")
    save_every: int = setting(25, "steps between two checkpoints", minimum=1)


# -- Advantages and loss ---------------------------------------------------------------------------
def group_advantages(rewards: Tensor, epsilon: float = 1e-4, scale: bool = True) -> Tensor:
    """(P, G) rewards -> (P, G) advantages: how far above the group's mean, in standard deviations.

    One success among G = 4: the mean is 0.25, the (sample) standard deviation 0.5, so

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([[ 1.4997, -0.4999, -0.4999, -0.4999],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])

    A group of equal rewards has nothing to compare: its advantages are exactly zero. With
    scale=False they are not divided by the deviation (Dr. GRPO): 0.75 and -0.25 in the example.
    """
    A = rewards - rewards.mean(dim=1, keepdim=True)
    if scale:
        A = A / (rewards.std(dim=1, keepdim=True) + epsilon)  # needs G >= 2
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return A.masked_fill(equal, 0.0)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    beta: float = 0.001,
    loss_type: str = "dapo",
    normalizer: float | None = None,
) -> Tensor:
    """The clipped surrogate with the k3 KL term, over the tokens where mask is True. A scalar.

    logprobs, old_logprobs, ref_logprobs, mask: (N, T); advantages: (N,). ref_logprobs may be None
    when beta = 0. `loss` says what a token weighs:

        dapo      the mean over all tokens of the step: every token weighs the same
        grpo      the mean over sequences of each sequence's mean: the original
        dr_grpo   the sum over a constant, N times the longest length allowed: no length bias

    normalizer: what the sum is divided by: tokens, sequences, or sequences times longest length.
    The caller gives the whole step's, so that splitting a step never changes its gradient; by
    default it is taken from `mask` (its width being the longest length).
    """
    A = advantages[:, None]  # (N, 1)
    # Untrained positions are 0 first: else exp may overflow there, and 0 * inf is nan.
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()  # (N, T)
    per_token = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    if beta:
        per_token = per_token + beta * k3(torch.where(mask, ref_logprobs - logprobs, 0.0))
    per_token = torch.where(mask, per_token, 0.0)
    if loss_type == "grpo":
        per_token = per_token / mask.sum(dim=1, keepdim=True).clamp(min=1)
    if normalizer is None:
        normalizer = {"dapo": mask.sum(), "grpo": len(mask), "dr_grpo": mask.numel()}[loss_type]
    return per_token.sum() / normalizer


def k3(difference: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi || pi_ref) per token, from d = log pi_ref - log pi: never
    negative. Used as a loss, its expected gradient is that of KL(pi_ref || pi)."""
    return torch.expm1(difference) - difference  # exp(d) - 1 - d, exact for small d, too


# -- The mask and the log-probabilities ------------------------------------------------------------
def reflection_rows(group: "Conversations") -> tuple[Tensor, Tensor, Tensor]:
    """One failure's G conversations up to the end of the reflection, padded on the right.

    Returns (G, T) each: the token ids; the mask, True on the reflection's own tokens (with the
    end-of-turn token that the model wrote); and their log-probabilities when they were drawn. The
    mask is made from positions, never from ids: a padding token's id may be a real token elsewhere.
    """
    T = max(
        len(conversation.reflection_prompt) + len(conversation.reflection) for conversation in group
    )
    ids = torch.zeros(len(group), T, dtype=torch.long)
    mask = torch.zeros(len(group), T, dtype=torch.bool)
    old_logprobs = torch.zeros(len(group), T)
    for row, conversation in enumerate(group):
        start, end = (
            len(conversation.reflection_prompt),
            len(conversation.reflection_prompt) + len(conversation.reflection),
        )
        ids[row, :end] = torch.tensor(conversation.reflection_prompt + conversation.reflection)
        mask[row, start:end] = True
        old_logprobs[row, start:end] = torch.tensor(conversation.reflection_logprobs)
    return ids, mask, old_logprobs


def token_logprobs(model: Model, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """The log-probabilities of the tokens where mask is True: (G, T), zero elsewhere.

    ids, mask: (G, T) on the CPU; the rows begin with the same context, which is computed once for
    all of them. All rows become one, in which each token keeps its position:

        packed     [ context    | reflection_1 | reflection_2 | … | reflection_G ]
        positions    0 1 … C-1    C C+1 …        C C+1 …            C C+1 …
        sees         the context and, up to itself, its own reflection

    Raises ValueError where the rows differ before their first trained token, or have none before.
    """
    columns = torch.arange(ids.shape[1])
    C = int(mask.any(dim=0).int().argmax())  # the context: all before the first trained token
    if C == 0 or (ids[:, :C] != ids[0, :C]).any():
        raise ValueError("rows need a trained token, and the same context before the first one")
    last_trained = (mask * columns).amax(dim=1, keepdim=True)  # (G, 1)
    row, position = ((columns >= C) & (columns <= last_trained)).nonzero(
        as_tuple=True
    )  # of each own token
    packed = torch.cat([ids[0, :C], ids[row, position]])  # (L,)
    positions = torch.cat([columns[:C], position])
    lengths = [C, *row.bincount(minlength=len(ids)).tolist()]  # context, then reflections

    # Own token j is at C + j, and predicted at C + j - 1; the first of each row, at C - 1.
    predictors = torch.where(position == C, C - 1, C - 1 + torch.arange(len(row)))[
        mask[row, position]
    ]
    inputs = packed[None].to(model.device), positions[None].to(model.device)
    hidden = model.hidden(*inputs, lengths=lengths)[0, predictors.to(model.device)]  # (tokens, E)
    logprobs = score(model, hidden, ids[mask].to(model.device), temperature)  # (tokens,)
    return logprobs.new_zeros(ids.shape).masked_scatter(mask.to(model.device), logprobs)


MAX_LOGITS = 2**25  # at most so many exist at once


def score(model: Model, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """(tokens, E) hidden states, (tokens,) targets -> their log-probabilities, (tokens,).

    The output head is the widest matrix. It is applied to a part of the tokens at a time. If there
    are several parts, the backward pass computes each again: all logits never exist at once.
    """
    chunk_size = max(1, MAX_LOGITS // model.vocab_size)
    if len(targets) <= chunk_size:
        log_probs = F.log_softmax(model.head(hidden) / temperature, dim=-1)  # (tokens, V)
        return -F.nll_loss(log_probs, targets, reduction="none")
    chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    logprobs = [
        checkpoint(score, model, *chunk, temperature, use_reentrant=False) for chunk in chunks
    ]
    return torch.cat(logprobs)


# -- The conversation ------------------------------------------------------------------------------
@dataclass
class Agent:
    """A model with what it needs to talk about a task, and how its turns are sampled."""

    model: Model
    tokenizer: Tokenizer
    task: object
    max_new_tokens: int  # the longest turn
    temperature: float = 1.0
    seed: int = 0
    cache_tokens: int = 131_072  # in the KV cache at once: this bounds the memory

    def attempt_prompt(self, problem) -> list[int]:
        """The prompt of the first try, up to where the assistant's turn begins."""
        return self.tokenizer.prompt(*self.task.messages(problem))

    def reflection_prompt(self, conversation: "Conversation") -> list[int]:
        """All that is read before a reflection: question, attempt, and "reflect"."""
        bridge = self.tokenizer.bridge(self.task.reflection_instruction)
        return conversation.attempt_prompt + self.tokenizer.next_turn(conversation.attempt, bridge)

    def generate(self, prompts, num_samples, rng_keys, cache=None) -> Generation:
        options = self.max_new_tokens, self.temperature, self.tokenizer.stop_ids, self.seed
        return generate(self.model, prompts, num_samples, *options, rng_keys, cache)

    def verify(self, problem, turn: list[int]):
        return self.task.verify(problem, self.tokenizer.decode(turn))


@dataclass
class Conversation:
    """What was said about a problem, as token ids, and the verifier's two verdicts. Turns end with
    their end-of-turn token, unless they were cut."""

    problem: object
    attempt_index: int  # which attempt at the problem this is
    attempt_prompt: list[int]  # the question, up to where the assistant's turn begins
    attempt: list[int]
    attempt_verdict: object  # the verdict on the attempt
    reflection_prompt: list[int] = field(default_factory=list)  # question, attempt, and "reflect"
    reflection_index: int = 0  # which reflection on the attempt this is
    reflection: list[int] = field(default_factory=list)
    reflection_logprobs: list[float] = field(
        default_factory=list
    )  # of the reflection, when it was drawn
    truncated: bool = False  # whether the reflection reached the longest length
    retry: list[int] = field(default_factory=list)
    retry_verdict: object = None  # the verdict on the retry


Conversations = list[Conversation]

# The random numbers of a turn are keyed by (seed, purpose, step, turn, problem, attempt, …), so
# that they do not depend on the batch. A `key` below is its (purpose, step).
EVALUATE, COLLECT, TRAIN, PLAY = range(4)  # purposes
ATTEMPT, REFLECT, RETRY = range(3)  # turns


def sample_attempts(
    agent: Agent, problems: list, num_samples: int, rng_key: tuple, start: int = 0
) -> Conversations:
    """First tries: `num_samples` at each problem, problem by problem, numbered from `start`."""
    prompts = [agent.attempt_prompt(problem) for problem in problems]
    rng_keys = [
        (*rng_key, ATTEMPT, problem.id, start + attempt_index)
        for problem in problems
        for attempt_index in range(num_samples)
    ]
    generation = agent.generate(prompts, num_samples, rng_keys)
    conversations = []
    for problem, prompt, turns in zip(problems, prompts, generation.tokens, strict=True):
        for attempt_index, turn in enumerate(turns, start):
            conversations.append(
                Conversation(problem, attempt_index, prompt, turn, agent.verify(problem, turn))
            )
    return conversations


def sample_reflections(
    agent: Agent, failures: Conversations, num_samples: int, rng_key: tuple
) -> tuple[Conversations, KVCache]:
    """`samples` reflections on each failure, failure by failure, and the cache to retry from."""
    prompts = [agent.reflection_prompt(failure) for failure in failures]
    rng_keys = [
        (*rng_key, REFLECT, failure.problem.id, failure.attempt_index, reflection_index)
        for failure in failures
        for reflection_index in range(num_samples)
    ]
    generation = agent.generate(prompts, num_samples, rng_keys)
    reflected = []
    for index, failure in enumerate(failures):
        for reflection_index, turn in enumerate(generation.tokens[index]):
            fields = {
                "reflection": turn,
                "reflection_logprobs": generation.logprobs[index][reflection_index],
                "reflection_index": reflection_index,
            }
            truncated = turn[-1] not in agent.tokenizer.stop_ids
            reflected.append(
                replace(failure, reflection_prompt=prompts[index], truncated=truncated, **fields)
            )
    return reflected, generation.cache


def sample_retries(
    agent: Agent, reflected: Conversations, rng_key: tuple, cache: KVCache | None = None
) -> Conversations:
    """A second try after each reflection. With the cache from `reflect`, which it leaves as it is,
    only what comes after is read. Without (the reflections may be another model's), all is read."""
    prompts, bridge = [], agent.tokenizer.bridge(agent.task.retry_instruction)
    for conversation in reflected:
        ids = conversation.reflection_prompt + agent.tokenizer.next_turn(
            conversation.reflection, bridge
        )
        # The last token that was drawn is not in the cache: the prompt begins in its place.
        prompts.append(
            ids[len(conversation.reflection_prompt) + len(conversation.reflection) - 1 :]
            if cache
            else ids
        )
    rng_keys = [
        (
            *rng_key,
            RETRY,
            conversation.problem.id,
            conversation.attempt_index,
            conversation.reflection_index,
        )
        for conversation in reflected
    ]
    generation = agent.generate(prompts, 1, rng_keys, cache)
    conversations = []
    for conversation, [turn] in zip(reflected, generation.tokens, strict=True):
        conversations.append(
            replace(
                conversation, retry=turn, retry_verdict=agent.verify(conversation.problem, turn)
            )
        )
    return conversations


def attempt_all(
    agent: Agent, problems: list, num_samples: int, rng_key: tuple, start: int = 0
) -> Conversations:
    """`attempt` at any number of problems, in batches that fit the memory. Sorted by their ids."""
    conversations, remaining = [], batches(agent, problems, num_samples, turns=1)
    while remaining:
        try:
            conversations += sample_attempts(agent, remaining[0], num_samples, rng_key, start)
            remaining = remaining[1:]
        except torch.OutOfMemoryError:
            remaining = halve_batches(agent, remaining, num_samples, turns=1)
    return sorted(
        conversations,
        key=lambda conversation: (conversation.problem.id, conversation.attempt_index),
    )


def rollout(
    agent: Agent, failures: Conversations, num_samples: int, rng_key: tuple
) -> Conversations:
    """Reflect `samples` times on any number of failures, and retry once after each reflection, in
    batches that fit the memory. Sorted by problem id; the tries on one failure stand together."""
    conversations, remaining = [], batches(agent, failures, num_samples, turns=2)
    while remaining:
        try:
            reflected, cache = sample_reflections(agent, remaining[0], num_samples, rng_key)
            conversations += sample_retries(agent, reflected, rng_key, cache)
            remaining = remaining[1:]
        except torch.OutOfMemoryError:
            remaining = halve_batches(agent, remaining, num_samples, turns=2)
        cache = None  # its memory is free for the next batch
    return sorted(
        conversations,
        key=lambda conversation: (conversation.problem.id, conversation.attempt_index),
    )


def batches(agent: Agent, items: list, num_samples: int, turns: int) -> list[list]:
    """Problems or failures, longest first, in batches whose keys and values fit agent.cache_tokens.
    All items of a batch count as the longest."""
    remaining = sorted(
        items, key=lambda item: -cache_tokens_needed(agent, item, num_samples, turns)
    )
    batches_ = []
    while remaining:
        batch_size = max(
            1, agent.cache_tokens // cache_tokens_needed(agent, remaining[0], num_samples, turns)
        )
        batches_.append(remaining[:batch_size])
        remaining = remaining[batch_size:]
    return batches_


def cache_tokens_needed(agent: Agent, item, num_samples: int, turns: int) -> int:
    """Tokens that a problem or failure takes in the cache: what was said, and samples * turns new
    turns, with about 50 tokens of the template before each."""
    tokens = (
        item.attempt_prompt + item.attempt
        if isinstance(item, Conversation)
        else agent.attempt_prompt(item)
    )
    return len(tokens) + num_samples * turns * (agent.max_new_tokens + 50)


def halve_batches(agent: Agent, remaining: list[list], num_samples: int, turns: int) -> list[list]:
    """What is left to do, in batches of half the size: the first one did not fit the memory. If
    that is a single item, its error goes on."""
    if len(remaining[0]) == 1:
        raise  # the error that the caller is handling
    agent.cache_tokens = (
        len(remaining[0]) * cache_tokens_needed(agent, remaining[0][0], num_samples, turns) // 2
    )
    return batches(agent, sum(remaining, []), num_samples, turns)


def draw_failures(
    failures: Conversations, step: int, batch_size: int, seed: int, leave_out=()
) -> Conversations:
    """The failures of a step. Each comes once an epoch, in a new random order, and at most once a
    step (which may then be smaller). leave_out: the ids of problems that are not to be drawn.
    Raises ValueError where none is left."""
    remaining = [failure for failure in failures if failure.problem.id not in leave_out]
    if not remaining:
        raise ValueError("there is no failure to train on")
    epoch, start = divmod(step * batch_size, len(remaining))
    order: Conversations = []
    while len(order) < start + batch_size:
        order += random.Random(f"{seed} {epoch}").sample(remaining, len(remaining))
        epoch += 1
    return list(
        {
            (failure.problem.id, failure.attempt_index): failure
            for failure in order[start : start + batch_size]
        }.values()
    )


# -- What a step reports ---------------------------------------------------------------------------
def loss_metrics(
    loss, logprobs, old_logprobs, ref_logprobs, advantages, mask, clip
) -> dict[str, float]:
    """Sums over one failure's trained tokens, for the metrics of the step."""
    clipped = ((logprobs - old_logprobs).exp() - 1) * advantages[
        :, None
    ].sign() > clip  # the clip stops the gradient
    sums = {"loss": loss, "tokens": mask.sum(), "nll": -logprobs.sum()}
    sums |= {"clipped": clipped.sum(), "mismatch": (logprobs - old_logprobs).abs().max()}
    sums |= (
        {}
        if ref_logprobs is None
        else {"kl": k3(torch.where(mask, ref_logprobs - logprobs, 0.0)).sum()}
    )
    values = torch.stack([value.float() for value in sums.values()]).tolist()  # waits once
    return dict(zip(sums, values, strict=True))


def step_metrics(
    conversations: Conversations, rewards: Tensor, loss_sums: list[dict]
) -> dict[str, float]:
    """The metrics of a step. nll (on average, the entropy), clipped and, with a reference, kl are
    means over trained tokens; mismatch is the largest change of a token's log-probability since it
    was drawn; sampled_tokens counts the tokens of reflections and retries."""
    num_tokens = max(1, sum(sums["tokens"] for sums in loss_sums))
    means = [name for name in ("nll", "clipped", "kl") if any(name in sums for sums in loss_sums)]
    lengths = [len(conversation.reflection) for conversation in conversations]
    return {
        "reward": rewards.mean().item(),
        "mixed_groups": (rewards != rewards[:, :1]).any(dim=1).float().mean().item(),
        "reflection_tokens": sum(lengths) / len(conversations),
        "truncated": sum(conversation.truncated for conversation in conversations)
        / len(conversations),
        "sampled_tokens": sum(lengths)
        + sum(len(conversation.retry) for conversation in conversations),
        "loss": sum(sums["loss"] for sums in loss_sums),
        "mismatch": max((sums["mismatch"] for sums in loss_sums), default=0.0),
        **{name: sum(sums[name] for sums in loss_sums) / num_tokens for name in means},
    }


def to_json(conversation: Conversation, tokenizer: Tokenizer) -> dict:
    """A conversation as JSON: in words for its readers, and its turns as token ids. The context is
    what was read before the reflection, if there is one, else before the attempt."""
    ids = {
        "attempt": conversation.attempt,
        "reflection": conversation.reflection,
        "retry": conversation.retry,
    }
    words = {
        name: tokenizer.tokenizer.decode(turn, skip_special_tokens=False)
        for name, turn in {
            "context": conversation.reflection_prompt or conversation.attempt_prompt,
            **ids,
        }.items()
        if turn
    }
    verdicts = {
        "attempt_verdict": asdict(conversation.attempt_verdict),
        "retry_verdict": conversation.retry_verdict and asdict(conversation.retry_verdict),
    }
    return {
        "problem": asdict(conversation.problem),
        "attempt_index": conversation.attempt_index,
        **words,
        **verdicts,
        "ids": ids,
    }


def append_jsonl(path: Path, *records: dict) -> None:
    """Add lines to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


# -- The optimizer ---------------------------------------------------------------------------------
def lr_multiplier(step: int, steps: int, warmup: float) -> float:
    """The share of the full learning rate at a step: a linear rise, then a cosine towards 0."""
    warmup_steps = math.ceil(steps * warmup)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


class MasterAdamW(torch.optim.AdamW):
    """AdamW on float32 masters of the weights, kept in main memory with `offload`. bfloat16 has 8
    significant bits: at a learning rate of 5e-7, rounding undoes nearly every update. So updates
    and gradients are summed in float32 copies, the masters, and each step ends by rounding these
    into the weights. A weight that is float32 is its own master."""

    def __init__(self, model: Model, lr: float, offload: bool = False):
        self.weights = list(model.parameters())
        self.masters = self.weights
        if offload or model.lm_head.weight.dtype != torch.float32:
            device = "cpu" if offload else model.device
            self.masters = [w.detach().to(device, torch.float32, copy=True) for w in self.weights]
        super().__init__(self.masters, lr=lr, weight_decay=0.0, fused=True)

    def accumulate_gradients(self) -> None:
        """After a backward pass: add the weights' gradients to their masters'."""
        if self.masters is self.weights:
            return
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight.grad is not None:
                gradient, weight.grad = weight.grad.to(master), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    def update(self, lr: float, max_grad_norm: float) -> float:
        """One step with the gradient, cut to max_grad_norm. Returns its norm before that. Raises
        ValueError, and changes nothing, where it is not finite. Without any gradient: no step."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm).item()
        if not math.isfinite(norm):
            raise ValueError("the gradient is not finite: take a lower --lr")
        self.param_groups[0]["lr"] = lr
        self.step()
        self.copy_to_weights()
        self.zero_grad(set_to_none=True)
        return norm

    def copy_to_weights(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.data.copy_(master.data)


# -- The checkpoint --------------------------------------------------------------------------------
LOGS = ("metrics.jsonl", "samples.jsonl", "timings.jsonl")  # cut back when a run is resumed


def save_checkpoint(folder: Path, step: int, optimizer: MasterAdamW, state: dict) -> None:
    """What training needs to go on after `step` steps, in one file that is replaced at once:
    float32 weights, AdamW's moments, how long the run's logs are, and a small JSON `state`. There
    is no random state: each draw is keyed by its step."""
    tensors = {}
    for i, master in enumerate(optimizer.masters):
        values = {"weight": master.detach(), **optimizer.state.get(master, {})}
        tensors |= {f"{i}.{name}": tensor.cpu() for name, tensor in values.items()}
    logs = [folder / name for name in LOGS if (folder / name).exists()]
    lengths = {log.name: log.stat().st_size for log in logs}
    record = json.dumps({"step": step, "logs": lengths, "state": state})
    replace_file(folder / "checkpoint.safetensors", tensors, {"run": record})


def load_checkpoint(folder: Path, optimizer: MasterAdamW) -> tuple[int, dict]:
    """Go back to the run's checkpoint: weights, moments, and the length of its logs. Returns the
    steps done, 0 where there is no checkpoint, and the `state` that was saved. Raises ValueError
    for a checkpoint that is damaged, or of another model."""
    path, step, lengths, state = folder / "checkpoint.safetensors", 0, {}, {}
    if path.exists():
        try:
            with safetensors.safe_open(path, "pt") as file:
                record = json.loads(file.metadata()["run"])
                step, lengths, state = record["step"], record["logs"], record["state"]
                names = {name.partition(".")[2] for name in file.keys()}  # noqa: SIM118
                if len(list(file.keys())) != len(names) * len(optimizer.masters):
                    raise ValueError("other tensors")
                for i, master in enumerate(optimizer.masters):
                    values = {name: file.get_tensor(f"{i}.{name}") for name in names}
                    master.data.copy_(values.pop("weight").view_as(master))
                    optimizer.state[master] = {n: x.to(master.device) for n, x in values.items()}
        except (safetensors.SafetensorError, RuntimeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged, or of another model: {error}") from None
        optimizer.copy_to_weights()
    for log in (folder / name for name in LOGS):
        if log.exists():
            os.truncate(log, min(lengths.get(log.name, 0), log.stat().st_size))
    return step, state
