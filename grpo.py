"""Reflect, Retry, Reward: the method, from a dataset of failures to the update of the weights.

    question -> attempt (wrong) -> "reflect" -> reflection_1  …  reflection_G      trained tokens
                                                     |                |
                                                "try again"      "try again"
                                                     |                |
                                                  retry_1     …    retry_G  ->  rewards r_1 … r_G

    A_g  = (r_g - mean r) / (std r + delta)                                   `group_advantages`
    mask = 1 on the tokens of the reflections, 0 on all other tokens          `pack_group`
    w    = the weight of a token: 1 / (number of trained tokens of the step)  `token_weights`
    loss = - sum of w * mask * (min(ratio * A, clip(ratio) * A) - beta * KL)  `grpo_loss`

The file starts with the training loop, `train`. Then come the parts of the method: advantages and
loss, the mask and the log-probabilities, the conversation, and how conversations are sampled. The
rest makes the method practical: metrics, optimizer, checkpoint, several processes.

R3 is short for Reflect, Retry, Reward. A "variant" is another method that is built from these
parts, such as those in tests/VARIANTS.md. A few lines are needed only by variants, and say so.

A conversation is stored as token ids from beginning to end. The tokens that are trained are exactly
the tokens that were sampled: they are never decoded to text and tokenized again.

Shapes: P failures per step with G reflections each; C tokens of context; T tokens after the
context; L tokens of a packed sequence; N trained tokens in it; E the hidden size; V the vocabulary.
"""

import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import safetensors
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm

from model import DivergenceError, KVCache, Model, Tokenizer, generate, is_rank_0, replace_file
from tasks import Task, Verdict


# -- The training loop -----------------------------------------------------------------------------
def train(
    agent: "Agent",
    reference: Model | None,
    failures: list["Conversation"],
    config: "TrainConfig",
    folder: Path,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Train `agent.model` in place with R3; yield (number of steps done, metrics) after each step.

    reference: the model as it was before training, for the KL term; None if config.beta is 0.
    failures: conversations whose attempts are wrong. folder: the run's folder. If it holds a
    checkpoint, training resumes from it.

    A new run first yields (0, {}), before any update. The caller may add entries to the dict that
    it gets, for example an evaluation: it is written to the log only when the caller asks for the
    next pair. The entry "seconds" says what took how long. It is logged to a file of its own, so
    that all other files depend on the seed alone. The numbered comments match the six steps in the
    README. Raises DivergenceError if a gradient is not finite. Before a checkpoint is saved, also
    raises it if the outputs of the updated model are not finite.
    """
    policy, G = agent.model, config.group_size
    policy.gradient_checkpointing = config.checkpointing
    optimizer = MasterAdamW(policy, config.lr, config.offload)
    step, state = load_checkpoint(folder, optimizer)
    if step > config.steps:
        raise ValueError(f"the checkpoint in {folder} is of step {step}, beyond {config.steps}")
    stream = FailureStream(failures, agent.seed, position=state.get("position", 0))
    if step == 0:
        metrics: dict[str, Any] = {}
        yield 0, metrics
        append_jsonl(folder / "metrics.jsonl", {"step": 0, **metrics})

    while step < config.steps:
        # 1-2. Draw P failures. Reflect G times on each, and retry once after each reflection.
        # The prefix gives each step its own random numbers.
        start_time = time.perf_counter()
        batch = stream.draw(config.batch_size)
        groups = rollout(agent, batch, G, rng_prefix=(TRAIN, step))  # P groups of G conversations
        rollout_seconds = time.perf_counter() - start_time

        # 3. A reflection earns 1 if it was not truncated and its retry is correct, else 0.
        rewards = torch.tensor([reward(c) for group in groups for c in group]).view(-1, G)

        # 4. The advantage compares each reflection with the others about the same failure.
        advantages = group_advantages(rewards, scale=config.scale_advantages)  # (P, G)

        # 5-6. Compute the gradient on the reflections' tokens alone, and update the weights.
        lr = config.lr * lr_multiplier(step, config.steps, config.warmup)
        for _ in range(config.updates):
            metrics = backpropagate_step(agent, reference, groups, advantages, config, optimizer)
            metrics["grad_norm"] = optimizer.update(lr, config.max_grad_norm)

        # Log the step, then save: a checkpoint must never be ahead of the logs.
        step += 1
        update_seconds = time.perf_counter() - start_time - rollout_seconds
        metrics = {**rollout_metrics(groups), **metrics, "lr": lr}
        metrics["seconds"] = {"rollout": rollout_seconds, "update": update_seconds}
        yield step, metrics
        append_jsonl(folder / "timings.jsonl", {"step": step, **metrics.pop("seconds")})
        append_jsonl(folder / "metrics.jsonl", {"step": step, **metrics})
        logged = slice(config.log_failures)  # the first groups of the step; None: all of them
        log_samples(
            folder / "samples.jsonl", step, groups[logged], rewards[logged], advantages[logged],
            agent.tokenizer,
        )  # fmt: skip
        if is_rank_0() and (step % config.save_every == 0 or step == config.steps):
            check_outputs(agent, groups)
            state["position"] = stream.position
            save_checkpoint(folder, step, optimizer, state)


def backpropagate_step(
    agent: "Agent",
    reference: Model | None,
    groups: list["Group"],
    advantages: Tensor,
    config: "TrainConfig",
    optimizer: "MasterAdamW",
) -> dict[str, float]:
    """Backpropagate the loss of a step into the optimizer's gradients, and return its metrics.

    advantages: (P, G). Groups are processed one at a time, each as one packed sequence, so that
    only one group's activations are in memory. Their gradients add up to the gradient of the step,
    because the weights of the tokens are computed for the whole step. Several processes share the
    groups, and `update` adds up their gradients.
    """
    policy, temperature = agent.model, agent.temperature
    packed_groups = [pack_group(group) for group in groups]
    lengths = torch.tensor([packed.mask.sum(dim=1).tolist() for packed in packed_groups])  # (P, G)
    # The most trained tokens that a conversation can have. In R3, one of its turns is trained.
    num_turns = [len(c.trained_turns()) for group in groups for c in group]
    max_length = max(num_turns, default=0) * agent.max_new_tokens
    weights = token_weights(lengths, config.loss_type, max_length)  # (P, G)
    terms = []
    inputs_of_groups = share(list(zip(packed_groups, advantages, weights, strict=True)))
    # The progress bar appears on a terminal, if this takes more than 5 seconds.
    for packed, A, w in tqdm(inputs_of_groups, "update", leave=False, disable=None, delay=5):
        if not A.any() and not config.beta:
            continue  # The rewards of this group are all equal: its gradient is zero.
        ref_logprobs = None
        if config.beta:
            with torch.no_grad():
                ref_logprobs = token_logprobs(reference, packed, temperature)  # (G, T)
        logprobs = token_logprobs(policy, packed, temperature)  # (G, T)
        inputs = {
            "logprobs": logprobs,
            "old_logprobs": packed.old_logprobs.to(policy.device),  # (G, T)
            "ref_logprobs": ref_logprobs,
            "advantages": A.to(policy.device),  # (G,)
            "mask": packed.mask.to(policy.device),  # (G, T)
            "clip": config.clip,
        }
        # Convert the float64 token weights before moving them, because MPS has no float64.
        w = w.to(logprobs.dtype).to(policy.device)  # (G,)
        loss = grpo_loss(**inputs, weights=w, beta=config.beta)
        loss.backward()
        optimizer.after_backward()
        terms.append(loss_terms(loss, **inputs))
    return loss_metrics(terms)


@torch.no_grad()
def check_outputs(agent: "Agent", groups: list["Group"]) -> None:
    """Raise DivergenceError if the updated model's log-probabilities on a group of the step are not
    finite. This is checked before each checkpoint, so that the last one always holds good weights.
    """
    if groups:  # A variant may have dropped all groups of a step.
        logprobs = token_logprobs(agent.model, pack_group(groups[0]), agent.temperature)
        if not logprobs.isfinite().all():
            raise DivergenceError("the updated model's outputs are not finite")


# -- Advantages and loss ---------------------------------------------------------------------------
def reward(conversation: "Conversation") -> float:
    """1 if the last answer is correct, else 0. A trained turn that was truncated earns 0, so that
    the model learns to finish within the token limit."""
    truncated = any(turn.truncated for turn in conversation.trained_turns())
    return float(conversation.final_verdict.correct and not truncated)


def group_advantages(rewards: Tensor, delta: float = 1e-4, scale: bool = True) -> Tensor:
    """The advantage of each reflection: by how many standard deviations its reward exceeds the mean
    of its group. (P, G) rewards -> (P, G) advantages; G must be at least 2.

    With one success among G = 4, the mean is 0.25 and the (sample) standard deviation is 0.5:

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([[ 1.4997, -0.4999, -0.4999, -0.4999],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])

    If all rewards of a group are equal, there is nothing to compare, and its advantages are exactly
    zero. With scale=False the division by the standard deviation is left out (as in Dr. GRPO): the
    example then has 0.75 and -0.25.
    """
    A = rewards - rewards.mean(dim=1, keepdim=True)
    if scale and len(rewards):  # torch warns about an empty tensor, if a variant has no groups
        A = A / (rewards.std(dim=1, keepdim=True) + delta)
    all_equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return A.masked_fill(all_equal, 0.0)  # The mean may be off by a rounding error.


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    clip: float = 0.2,
    beta: float = 0.001,
) -> Tensor:
    """The clipped surrogate with a KL penalty, summed over the tokens where `mask` is True. Scalar.

    logprobs, old_logprobs, ref_logprobs: (G, T), log-probabilities of the same tokens under the
    current policy, the policy at sampling time, and the reference model (None if beta is 0).
    mask: (G, T) bool. advantages: (G,). weights: (G,), the weight of each token of a row, from
    `token_weights`; by default every token has the weight 1 / (number of tokens in the mask).
    """
    A = advantages[:, None]  # (G, 1)
    ratio = log_ratio(logprobs, old_logprobs, mask).exp()  # (G, T)
    per_token = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    if beta:
        per_token = per_token + beta * kl_k3(logprobs, ref_logprobs, mask)
    if weights is None:
        weights = torch.ones_like(advantages) / mask.sum()
    return (torch.where(mask, per_token, 0.0) * weights[:, None]).sum()


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log(pi / pi_old) of each token, (G, T). Outside the mask it is set to 0 before `grpo_loss`
    takes its exponential. To mask only the finished loss would not be enough: if the exponential of
    a value outside the mask overflowed, its gradient would be 0 * inf, which is nan."""
    return torch.where(mask, logprobs - old_logprobs, 0.0)


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi || pi_ref) for each token, (G, T): exp(d) - 1 - d, where
    d = log pi_ref - log pi. It is never negative. On samples from pi, its expected value is
    KL(pi || pi_ref), but its expected gradient is that of KL(pi_ref || pi), because the gradient
    does not take into account that the samples depend on pi, too."""
    d = torch.where(mask, ref_logprobs - logprobs, 0.0)
    return torch.expm1(d) - d


def token_weights(lengths: Tensor, loss_type: str, max_length: int) -> Tensor:
    """The weight of a token in the loss, for each reflection of a step: (P, G) -> (P, G), float64.

    lengths: (P, G), how many trained tokens each reflection has; max_length: the most it can have.

        dapo      1 / (tokens of the step): the mean over all tokens, as in DAPO
        grpo      1 / (number of reflections * tokens of this one): each reflection counts equally
        dr_grpo   1 / (number of reflections * max_length): without length bias, as in Dr. GRPO
    """
    lengths, num_reflections = lengths.double(), lengths.numel()
    if loss_type == "dapo":
        return torch.ones_like(lengths) / lengths.sum()
    if loss_type == "grpo":
        return 1 / (lengths * num_reflections)
    return torch.ones_like(lengths) / (num_reflections * max_length)


@dataclass
class TrainConfig:
    """The settings of `train`. The defaults are the paper's values where it states them."""

    steps: Annotated[int, "number of training steps"] = 1_750
    batch_size: Annotated[int, "number of failures per step"] = 256
    group_size: Annotated[int, "G, the number of reflections on each failure"] = 8
    updates: Annotated[int, "number of optimizer updates per step, on the same samples"] = 1
    lr: Annotated[float, "peak learning rate"] = 5e-7
    warmup: Annotated[float, "fraction of the steps in which the learning rate rises"] = 0.03
    beta: Annotated[float, "weight of the KL penalty; 0 needs no reference model"] = 0.001
    clip: Annotated[float, "epsilon: clip the ratio to the range 1 - epsilon to 1 + epsilon"] = 0.2
    loss_type: Annotated[
        Literal["dapo", "grpo", "dr_grpo"],
        "how tokens are weighted; dapo is the mean over all tokens of a step (see token_weights)",
    ] = "dapo"
    scale_advantages: Annotated[bool, "divide advantages by the group's standard deviation"] = True
    max_grad_norm: Annotated[float, "clip the gradient norm to this value"] = 1.0
    offload: Annotated[bool, "keep float32 master weights and moments in CPU memory"] = False
    checkpointing: Annotated[bool, "recompute activations to save memory"] = False
    save_every: Annotated[int, "number of steps between two checkpoints"] = 25
    log_failures: Annotated[
        int | None, "number of failures per step whose conversations are logged; None: all"
    ] = 8


# -- The mask and the log-probabilities ------------------------------------------------------------
class PackedGroup(NamedTuple):
    """The G conversations of a group, ready for training. All of them begin with the same context;
    what follows in each is its branch, up to its last trained token. T is the length of the longest
    branch. The tensors have a row for each conversation."""

    context: list[int]  # C token ids
    branches: list[list[int]]  # G lists of token ids
    targets: Tensor  # (G, T) the ids of the trained tokens, 0 elsewhere
    mask: Tensor  # (G, T) True on the trained tokens
    old_logprobs: Tensor  # (G, T) their log-probabilities at sampling time, 0 elsewhere


def pack_group(group: "Group") -> PackedGroup:
    """Pack a group; `Conversation.trained_turns` says which tokens are trained.

    The context is the longest common prefix of G prompts: from each conversation, the prompt of its
    first trained turn. In R3, these prompts are all equal. A trained turn includes the end-of-turn
    token that the model sampled. The mask is computed from positions, never by comparing ids with a
    padding id, because the padding id can also occur as a real token. Raises ValueError if there is
    no common prefix, or if a turn was not sampled in this run.
    """
    trained_turns = [conversation.trained_turns() for conversation in group]
    first_prompts = [turns[0].prompt for turns in trained_turns]
    context = os.path.commonprefix(first_prompts)  # It works on lists of token ids, too.
    C = len(context)
    if C == 0:
        raise ValueError("the conversations of a group must begin with the same context")
    # The prompt of the last trained turn contains all earlier turns.
    branches = [(turns[-1].prompt + turns[-1].tokens)[C:] for turns in trained_turns]
    shape = len(group), max(map(len, branches))  # (G, T)
    targets = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    old_logprobs = torch.zeros(shape)
    for g, turns in enumerate(trained_turns):
        for turn in turns:
            if len(turn.logprobs) != len(turn.tokens):
                raise ValueError("cannot train on a turn from a file: it has no log-probabilities")
            start = len(turn.prompt) - C
            end = start + len(turn.tokens)
            targets[g, start:end] = torch.tensor(turn.tokens)
            mask[g, start:end] = True
            old_logprobs[g, start:end] = torch.tensor(turn.logprobs)
    return PackedGroup(context, branches, targets, mask, old_logprobs)


def token_logprobs(model: Model, packed: PackedGroup, temperature: float = 1.0) -> Tensor:
    """The log-probabilities of the tokens where packed.mask is True: (G, T), 0 elsewhere.

    The context is computed once for all G branches, because they are packed into one sequence, in
    which each branch sees the context and itself. With three tokens of context and two branches:

        index      [ 0  1  2 |  3  4 |  5 ]        in the packed sequence
        ids        [ 7  8  9 | 10 11 | 12 ]        context | branch_1 | branch_2
        positions  [ 0  1  2 |  3  4 |  3 ]        each branch continues after the context
        predictors              2  3     2         the index of the token that predicts this one:
                                                   index 2 (id 9) predicts the ids 10 and 12
    """
    C, branch_lengths = len(packed.context), [len(branch) for branch in packed.branches]
    ids = torch.tensor([packed.context + sum(packed.branches, [])], device=model.device)  # (1, L)
    # From the lengths, the model derives the positions, and which tokens see each other.
    hidden = model.hidden(ids, lengths=[C, *branch_lengths])[0]  # (L, E)
    predictors = predictor_indices(C, branch_lengths)[packed.mask].to(model.device)  # (N,)
    targets = packed.targets[packed.mask].to(model.device)  # (N,)
    logprobs = target_logprobs(model, hidden[predictors], targets, temperature)  # (N,)
    mask = packed.mask.to(model.device)
    return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs)  # (G, T)


def predictor_indices(context_length: int, branch_lengths: list[int]) -> Tensor:
    """The index, in the packed sequence, of the token that predicts token t of branch g: (G, T). It
    is 0 where a branch has no token t. For the example above:

    >>> predictor_indices(3, [2, 1])
    tensor([[2, 3],
            [2, 0]])
    """
    indices = torch.zeros(len(branch_lengths), max(branch_lengths), dtype=torch.long)
    start = context_length
    for g, length in enumerate(branch_lengths):
        indices[g, :length] = torch.arange(start - 1, start + length - 1)
        # For the branch's first token, the line above has the last token of branch g - 1 (unless g
        # is 0). It has to be the last token of the context.
        indices[g, 0] = context_length - 1
        start += length
    return indices


MAX_LOGITS = 2**25  # the largest number of logits in memory at once


def target_logprobs(model: Model, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The log-probabilities of target tokens: hidden (N, E), targets (N,) -> (N,).

    If N * V exceeds MAX_LOGITS, the logits are computed in chunks, each by a recursive call. The
    backward pass computes them again, so that only one chunk of them is in memory at a time.
    """
    chunk_size = max(1, MAX_LOGITS // model.vocab_size)
    if len(targets) <= chunk_size:
        log_p = F.log_softmax(model.head(hidden) / temperature, dim=-1)  # (N, V)
        return -F.nll_loss(log_p, targets, reduction="none")  # log_p[n, targets[n]] for each n
    logprobs = []
    for chunk in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
        inputs = model, *chunk, temperature
        logprobs.append(recompute_in_backward(target_logprobs, *inputs, use_reentrant=False))
    return torch.cat(logprobs)


# -- The conversation ------------------------------------------------------------------------------
@dataclass
class Turn:
    """A turn of the assistant, as token ids."""

    prompt: list[int]  # everything before the turn
    tokens: list[int]  # the turn; it ends with its end-of-turn token, unless it was truncated
    truncated: bool  # whether the turn was cut off at max_new_tokens
    # The log-probabilities of the tokens at sampling time. They are not saved to files.
    logprobs: list[float] = field(default_factory=list, compare=False)


@dataclass
class Conversation:
    """An attempt at a problem with its verdict; then, perhaps, a reflection and a retry."""

    problem: Any  # a dataclass with an integer `id`; its other fields depend on the task
    attempt_index: int  # which attempt at the problem this is
    attempt: Turn
    attempt_verdict: Verdict
    # The number of this reflection among those on the same attempt. In a failure, which has no
    # reflection yet: where `sample_reflections` starts to count. In R3 that is always 0.
    reflection_index: int = 0
    reflection: Turn | None = None
    retry: Turn | None = None
    retry_verdict: Verdict | None = None

    def trained_turns(self) -> list[Turn]:
        """The turns whose tokens are trained. R3 trains the reflection, and nothing else. Variants
        change this method."""
        return [self.reflection]

    @property
    def attempt_id(self) -> tuple[int, int]:
        """(problem id, attempt index). All conversations that continue one attempt share it."""
        return self.problem.id, self.attempt_index

    @property
    def final_verdict(self) -> Verdict:
        """The verdict on the last answer: the retry's if there is one, else the attempt's."""
        return self.attempt_verdict if self.retry_verdict is None else self.retry_verdict


MAX_TURNS = 3  # of the assistant: attempt, reflection, retry
Group = list[Conversation]  # the G conversations about one failure, with different reflections


@dataclass
class Agent:
    """A model with everything that it needs to work on a task: a tokenizer, the task, and the
    sampling settings."""

    model: Model
    tokenizer: Tokenizer
    task: Task
    max_new_tokens: int  # the maximum number of tokens in a turn
    temperature: float = 1.0
    seed: int = 0
    cache_tokens: int = 131_072  # the maximum number of tokens in the KV cache: bounds the memory

    def attempt_prompt(self, problem: Any) -> list[int]:
        """The question, up to the point where the assistant's turn begins."""
        return self.tokenizer.prompt(*self.task.messages(problem))

    def reflection_prompt(self, conversation: Conversation) -> list[int]:
        """The question, the attempt, and the instruction to reflect. A bridge is the text between
        two turns of the assistant, with the user's instruction. Before it, `append_bridge` adds the
        end-of-turn token, if the attempt lacks it because it was truncated."""
        bridge = self.tokenizer.bridge(self.task.reflection_instruction)
        attempt = conversation.attempt
        return attempt.prompt + self.tokenizer.append_bridge(attempt.tokens, bridge)

    def retry_prompt(self, conversation: Conversation) -> list[int]:
        """The reflection's prompt, the reflection, and the instruction to try again."""
        bridge = self.tokenizer.bridge(self.task.retry_instruction)
        reflection = conversation.reflection
        return reflection.prompt + self.tokenizer.append_bridge(reflection.tokens, bridge)

    def sample_turns(
        self,
        prompts: list[list[int]],
        num_samples: int,
        rng_keys: list[tuple[int, ...]],
        cache: KVCache | None = None,
        cached_lengths: list[int] | None = None,
    ) -> tuple[list[list[Turn]], KVCache]:
        """Sample `num_samples` turns after each prompt. Returns a list of turns for each prompt,
        and the cache, from which the turns that follow can be sampled.

        rng_keys: one for each new turn, prompt by prompt.
        cache: the cache that an earlier call returned, to continue the turns which it sampled.
            There must be one prompt for each of these turns, in the same order, and num_samples
            must be 1. The first cached_lengths[i] tokens of prompt i are in the cache already, so
            only the rest goes through the model.
        """
        cached_lengths = cached_lengths or [0] * len(prompts)
        generation = generate(
            self.model,
            [prompt[length:] for prompt, length in zip(prompts, cached_lengths, strict=True)],
            num_samples=num_samples,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            stop=self.tokenizer.stop_ids,
            seed=self.seed,
            rng_keys=rng_keys,
            cache=cache,
        )
        turns: list[list[Turn]] = [[] for _ in prompts]
        for p, prompt in enumerate(prompts):
            for tokens, logprobs in zip(generation.tokens[p], generation.logprobs[p], strict=True):
                truncated = tokens[-1] not in self.tokenizer.stop_ids
                turns[p].append(Turn(prompt, tokens, truncated, logprobs))
        return turns, generation.cache

    def verify(self, problem: Any, turn: Turn) -> Verdict:
        """The verifier's verdict on an answer."""
        answer = self.tokenizer.decode(turn.tokens)
        try:
            return self.task.verify(problem, answer)
        except Exception as error:  # An answer may be any text, so this is a bug of the verifier.
            raise RuntimeError(f"the task's verifier failed on the answer {answer!r}") from error


# -- Sampling conversations ------------------------------------------------------------------------
# The random numbers of a turn depend on the seed and on the turn's key, but not on the other turns
# in its batch. The key is (purpose, step, which turn, problem, attempt, reflection); the key
# of an attempt ends with the attempt.
RngPrefix = tuple[int, int]  # the first two entries of a key: (purpose, step)
EVALUATE, COLLECT, TRAIN, PLAY = range(4)  # purposes
ATTEMPT, REFLECTION, RETRY = range(3)  # turns


def sample_attempts(
    agent: Agent, problems: list, num_samples: int, rng_prefix: RngPrefix, first_index: int = 0
) -> list[Conversation]:
    """Attempt each problem `num_samples` times. The attempts are numbered from `first_index`."""
    prompts = [agent.attempt_prompt(problem) for problem in problems]
    indices = range(first_index, first_index + num_samples)
    rng_keys = [(*rng_prefix, ATTEMPT, problem.id, i) for problem in problems for i in indices]
    turns, _ = agent.sample_turns(prompts, num_samples, rng_keys)
    return [
        Conversation(problem, i, attempt, agent.verify(problem, attempt))
        for problem, attempts in zip(problems, turns, strict=True)
        for i, attempt in zip(indices, attempts, strict=True)
    ]


def sample_reflections(
    agent: Agent, failures: list[Conversation], num_samples: int, rng_prefix: RngPrefix
) -> tuple[list[Conversation], KVCache]:
    """Reflect `num_samples` times on each failure. The new reflections are numbered from
    failure.reflection_index, which is 0 in R3. (A variant that reflects on the same attempt a
    second time has to set it to a number that was not used yet: otherwise the same random numbers
    are drawn again.) Returns the conversations, failure by failure, and the cache from which the
    retries can be sampled."""
    prompts = [agent.reflection_prompt(failure) for failure in failures]
    rng_keys = [
        (*rng_prefix, REFLECTION, *failure.attempt_id, failure.reflection_index + g)
        for failure in failures
        for g in range(num_samples)
    ]
    turns, cache = agent.sample_turns(prompts, num_samples, rng_keys)
    conversations = [
        replace(failure, reflection_index=failure.reflection_index + g, reflection=reflection)
        for failure, reflections in zip(failures, turns, strict=True)
        for g, reflection in enumerate(reflections)
    ]
    return conversations, cache


def sample_retries(
    agent: Agent,
    conversations: list[Conversation],
    rng_prefix: RngPrefix,
    cache: KVCache | None = None,
) -> list[Conversation]:
    """Retry once after each reflection.

    cache: the one from `sample_reflections`; this function leaves it as it is. Without a cache, for
    example if another model wrote the reflections, the whole prompts go through the model.
    """
    prompts = [agent.retry_prompt(c) for c in conversations]
    rng_keys = [(*rng_prefix, RETRY, *c.attempt_id, c.reflection_index) for c in conversations]
    cached_lengths = None
    if cache is not None:
        # The last token of a reflection has been sampled, but has not gone through the model.
        reflections = [c.reflection for c in conversations]
        cached_lengths = [len(turn.prompt) + len(turn.tokens) - 1 for turn in reflections]
    turns, _ = agent.sample_turns(prompts, 1, rng_keys, cache, cached_lengths)
    retried = []
    for conversation, (turn,) in zip(conversations, turns, strict=True):
        verdict = agent.verify(conversation.problem, turn)
        retried.append(replace(conversation, retry=turn, retry_verdict=verdict))
    return retried


def attempt_all(
    agent: Agent, problems: list, num_samples: int, rng_prefix: RngPrefix, first_index: int = 0
) -> list[Conversation]:
    """`sample_attempts` for any number of problems, in batches that fit in memory. The result is in
    the order of the problems."""
    conversations: list[Conversation] = []
    remaining = share(longest_first(agent, problems))
    while remaining:
        batch = next_batch(agent, remaining, num_samples, turns=1)
        try:
            conversations += sample_attempts(agent, batch, num_samples, rng_prefix, first_index)
            remaining = remaining[len(batch) :]
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            lower_cache_limit(agent, batch, num_samples, turns=1)
    order = {problem.id: place for place, problem in enumerate(problems)}
    return sorted(gather(conversations), key=lambda c: (order[c.problem.id], c.attempt_index))


def rollout(
    agent: Agent, failures: list[Conversation], group_size: int, rng_prefix: RngPrefix
) -> list[Group]:
    """Reflect `group_size` times on each failure and retry once after each reflection, for any
    number of failures, in batches that fit in memory. Returns a group of conversations for each
    failure, in the order of the failures."""
    remaining = share(longest_first(agent, failures))
    conversations: list[Conversation] = []
    new_turns = MAX_TURNS - 1  # The attempt has been made already.
    while remaining:
        batch = next_batch(agent, remaining, group_size, new_turns)
        cache = None  # Free the cache of the previous batch before allocating the next one.
        try:
            reflected, cache = sample_reflections(agent, batch, group_size, rng_prefix)
            conversations += sample_retries(agent, reflected, rng_prefix, cache)
            remaining = remaining[len(batch) :]
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            lower_cache_limit(agent, batch, group_size, new_turns)
    groups: dict[tuple[int, int], Group] = {failure.attempt_id: [] for failure in failures}
    for conversation in gather(conversations):
        groups[conversation.attempt_id].append(conversation)
    return [groups[failure.attempt_id] for failure in failures]


def longest_first(agent: Agent, items: list) -> list:
    """Sort items, which are problems or failures, so that a batch has prompts of similar length."""
    return sorted(items, key=lambda item: prompt_length(agent, item), reverse=True)


def next_batch(agent: Agent, remaining: list, num_samples: int, turns: int) -> list:
    """As many items from the start of `remaining` as fit together in a KV cache of
    agent.cache_tokens tokens, but at least one. Each item is counted as if it were as long as the
    first, which is the longest."""
    tokens = cache_tokens_needed(agent, remaining[0], num_samples, turns)
    return remaining[: max(1, agent.cache_tokens // tokens)]


def lower_cache_limit(agent: Agent, batch: list, num_samples: int, turns: int) -> None:
    """After a batch ran out of memory, lower agent.cache_tokens to what half of the batch needs."""
    tokens = cache_tokens_needed(agent, batch[0], num_samples, turns)
    agent.cache_tokens = len(batch) * tokens // 2


TEMPLATE_TOKENS = 50  # about as many as an instruction and the chat template's tokens around it


def cache_tokens_needed(agent: Agent, item: Any, num_samples: int, turns: int) -> int:
    """How many tokens of the KV cache an item takes: its prompt, which is stored once, and `turns`
    new turns for each sample, each with TEMPLATE_TOKENS for the instruction before it."""
    turn_length = agent.max_new_tokens + TEMPLATE_TOKENS
    return prompt_length(agent, item) + num_samples * turns * turn_length


def prompt_length(agent: Agent, item: Any) -> int:
    """The number of tokens in a problem's question, or in the question and attempt of a failure."""
    if isinstance(item, Conversation):
        return len(item.attempt.prompt) + len(item.attempt.tokens)
    return len(agent.attempt_prompt(item))


class FailureStream:
    """The order in which failures are drawn for training: epoch after epoch, endlessly.

    Each epoch is a new permutation of all failures, which depends on the seed and the number of the
    epoch alone. `position` counts the failures drawn so far; training saves it with the checkpoint.
    The order does not depend on how many are drawn at a time. So a variant of the training loop may
    draw more or less than one batch per step, or drop some failures after they were drawn.
    """

    def __init__(self, failures: list[Conversation], seed: int, position: int = 0):
        self.failures, self.seed, self.position = failures, seed, position

    def draw(self, size: int) -> list[Conversation]:
        """The next `size` failures. If the batch crosses an epoch boundary, a failure may be drawn
        more than once. Then the batch is smaller: duplicates are dropped, because in the same step
        they would get the same random numbers. Raises ValueError if there are no failures."""
        if not self.failures:
            raise ValueError("there are no failures to train on")
        # With n failures, make at most 2n draws. Wherever in an epoch the batch starts, at most n
        # draws complete this epoch, and the next n draws are all failures. So more draws could only
        # add duplicates.
        size = min(size, 2 * len(self.failures))
        epoch, start = divmod(self.position, len(self.failures))
        order: list[Conversation] = []  # from the beginning of this epoch
        while len(order) < start + size:
            rng = random.Random(f"{self.seed} {epoch}")
            order += rng.sample(self.failures, len(self.failures))
            epoch += 1
        self.position += size
        drawn = order[start : start + size]
        return list({failure.attempt_id: failure for failure in drawn}.values())  # no duplicates


# -- Metrics and samples ---------------------------------------------------------------------------
def rollout_metrics(groups: list[Group]) -> dict[str, float]:
    """Metrics of what was sampled in a step.

    reward and reflection_tokens are means over the conversations. truncated is the fraction of the
    trained turns that were truncated, and mixed_groups the fraction of the groups whose rewards
    differ: only these have advantages other than zero. The other two are counts.
    """
    conversations = sum(groups, [])
    rewards = [[reward(c) for c in group] for group in groups]
    reflections = [c.reflection for c in conversations if c.reflection]
    # Count only what was sampled in this step: in R3 the reflection and the retry, because the
    # attempt is an old one. In a variant without reflections, the attempt is new.
    sampled = [turn for c in conversations for turn in (c.reflection or c.attempt, c.retry) if turn]
    trained = [turn for c in conversations for turn in c.trained_turns()]
    return {
        "sampled_groups": len(groups),
        "sampled_tokens": sum(len(turn.tokens) for turn in sampled),
        "reward": mean(sum(rewards, [])),
        "mixed_groups": mean([len(set(values)) > 1 for values in rewards]),
        "reflection_tokens": mean([len(turn.tokens) for turn in reflections]),
        "truncated": mean([turn.truncated for turn in trained]),
    }


def mean(values: list[float]) -> float:
    """The mean of some values; 0 if there are none."""
    return sum(values) / max(1, len(values))


def loss_terms(
    loss: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
) -> dict[str, Tensor]:
    """What `loss_metrics` needs of a group, as scalar tensors. The arguments are `grpo_loss`'s."""
    logprobs = logprobs.detach()
    log_ratios = log_ratio(logprobs, old_logprobs, mask)  # (G, T)
    # The clip removes a token's policy gradient if A > 0 and ratio > 1 + clip, or if A < 0 and
    # ratio < 1 - clip.
    clipped = mask & ((log_ratios.exp() - 1) * advantages[:, None].sign() > clip)
    terms = {
        "loss": loss.detach(),
        "tokens": mask.sum(),
        "nll": -torch.where(mask, logprobs, 0.0).sum(),
        "clipped": clipped.sum(),
        "mismatch": log_ratios.abs().max(),
    }
    if ref_logprobs is not None:
        terms["kl"] = kl_k3(logprobs, ref_logprobs, mask).sum()
    return terms


def loss_metrics(terms: list[dict[str, Tensor]]) -> dict[str, float]:
    """The metrics of an update, from the `loss_terms` of the groups that this process trained.

    nll (an estimate of the policy's entropy), clipped and kl are means over the trained tokens;
    there is a kl only with a reference model. mismatch is the largest |log pi - log pi_old| of a
    token. In the first update of a step, pi and pi_old have the same weights. The mismatch then
    measures only the numerical difference between sampling, token by token with a KV cache, and
    training on a packed sequence. If a step has several updates, the metrics are those of the last.
    """
    # All values go into one tensor, so that the host waits for the GPU only once.
    stacked = [torch.stack([x.float() for x in group_terms.values()]) for group_terms in terms]
    table = torch.stack(stacked).tolist() if stacked else []
    rows = gather([dict(zip(terms[0], values, strict=True)) for values in table])
    metrics = {"trained_groups": len(rows), "loss": 0.0, "mismatch": 0.0}
    if rows:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        tokens = sum(columns.pop("tokens"))
        metrics["mismatch"] = max(columns.pop("mismatch"))
        metrics["loss"] = sum(columns.pop("loss"))
        metrics |= {name: sum(values) / tokens for name, values in columns.items()}
    return metrics


def log_samples(
    path: Path,
    step: int,
    groups: list[Group],
    rewards: Tensor,
    advantages: Tensor,
    tokenizer: Tokenizer,
) -> None:
    """Append the conversations of a step to a file, with their rewards and advantages, (P, G)."""
    columns = sum(groups, []), rewards.flatten().tolist(), advantages.flatten().tolist()
    records = [
        {"step": step, "reward": r, "advantage": a, **to_json(conversation, tokenizer)}
        for conversation, r, a in zip(*columns, strict=True)
    ]
    append_jsonl(path, *records)


def to_json(conversation: Conversation, tokenizer: Tokenizer) -> dict:
    """A conversation as a JSON record: its turns as text, for people, and as token ids. `context`
    is the text before the reflection or, if there is none, before the attempt."""
    c = conversation
    context = (c.reflection or c.attempt).prompt

    def text(ids: list[int]) -> str:
        # Tokenizer.decode would leave out the special tokens.
        return tokenizer.tokenizer.decode(ids, skip_special_tokens=False)

    record = {"problem": asdict(c.problem), "attempt_index": c.attempt_index}
    record |= {"reflection_index": c.reflection_index, "context": text(context)}
    for name in ("attempt", "reflection", "retry"):
        turn = getattr(c, name)
        if turn:
            tokens, truncated = turn.tokens, turn.truncated
            record[name] = {"text": text(tokens), "tokens": tokens, "truncated": truncated}
    record["attempt_verdict"] = asdict(c.attempt_verdict)
    if c.retry_verdict:
        record["retry_verdict"] = asdict(c.retry_verdict)
    return record


def from_json(record: dict, agent: Agent) -> Conversation:
    """The conversation that `to_json` wrote, judged again. Prompts are rendered again, and
    log-probabilities are not restored. Raises KeyError if a field is missing, and ValueError or
    TypeError if the record does not fit the agent's task or tokenizer."""
    problem = agent.task.parse_record(record["problem"])
    indices = {name: record[name] for name in ("attempt_index", "reflection_index")}
    for name, value in {"the problem's id": problem.id, **indices}.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} {value!r} must be a non-negative integer")

    def turn(name: str, prompt: list[int]) -> Turn:
        tokens = record[name]["tokens"]
        if not tokens or not all(0 <= token < agent.model.vocab_size for token in tokens):
            raise ValueError(f"the {name} is empty or has tokens outside this model's vocabulary")
        return Turn(prompt, tokens, record[name]["truncated"])

    attempt = turn("attempt", agent.attempt_prompt(problem))
    verdict = agent.verify(problem, attempt)
    c = Conversation(problem, record["attempt_index"], attempt, verdict, record["reflection_index"])
    if "reflection" in record:
        c.reflection = turn("reflection", agent.reflection_prompt(c))
    if "retry" in record:
        c.retry = turn("retry", agent.retry_prompt(c))
        c.retry_verdict = agent.verify(problem, c.retry)
    # Compare after a round trip through JSON, which converts tuples to lists. The record may have
    # more fields than to_json writes, for example a reward.
    written = json.loads(json.dumps(to_json(c, agent.tokenizer)))
    if written != {name: record[name] for name in written}:
        raise ValueError("the texts or verdicts in the record do not match its token ids")
    return c


def append_jsonl(path: Path, *records: dict) -> None:
    """Append records to a file, one line each. Only the first process writes."""
    if is_rank_0():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))


# -- The optimizer ---------------------------------------------------------------------------------
def lr_multiplier(step: int, steps: int, warmup: float) -> float:
    """The fraction of the peak learning rate at a step: linear warmup, then cosine decay to 0.
    warmup: the fraction of the steps spent in the warmup."""
    warmup_steps = math.ceil(steps * warmup)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


# The number of backward passes whose gradients are added up in bfloat16 (see after_backward). The
# relative error of a sum of 64 gradients of SmolLM2-135M is 0.90% if all of them are added up in
# bfloat16, 0.40% with 8 passes, and 0.17% with 1. The last is not 0, because each gradient itself
# is rounded to bfloat16.
PASSES_PER_MOVE = 8


class MasterAdamW(torch.optim.AdamW):
    """AdamW on float32 master weights.

    bfloat16 has 8 significant bits. At a learning rate of 5e-7, nearly every update of a bfloat16
    weight would be rounded to zero. So float32 copies of the weights, the masters, accumulate the
    gradients and get the updates. Each step ends by copying the masters, rounded, to the weights.
    With `offload` the masters are kept in CPU memory. Without it, float32 weights are their own
    masters.
    """

    def __init__(self, model: Model, lr: float, offload: bool = False):
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.masters = self.weights
        if offload or self.weights[0].dtype != torch.float32:
            device = "cpu" if offload else model.device
            self.masters = [w.detach().to(device, torch.float32, copy=True) for w in self.weights]
        self.passes_since_move = 0  # backward passes since gradients were moved to the masters
        super().__init__(self.masters, lr=lr, weight_decay=0.0, fused=True)

    def after_backward(self) -> None:
        """Call this after each backward pass. The passes add up their gradients in the `grad` of
        the weights. bfloat16 sums lose precision, so they are moved to the float32 masters after
        every PASSES_PER_MOVE passes. Moving them after each pass would be more precise, but slow,
        because with `offload` each move copies all gradients to CPU memory."""
        self.passes_since_move += 1
        if self.weights[0].dtype != torch.float32 and self.passes_since_move == PASSES_PER_MOVE:
            self.move_gradients()

    def move_gradients(self) -> None:
        """Move the gradients of the weights, in float32, to the masters."""
        self.passes_since_move = 0
        if self.masters is self.weights:
            return
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight.grad is not None:
                gradient = weight.grad.to(master)
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                weight.grad = None

    def update(self, lr: float, max_grad_norm: float) -> float:
        """Clip the gradient to max_grad_norm, make one AdamW step, and return the norm that the
        gradient had before it was clipped. Parameters without a gradient stay as they are. Raises
        DivergenceError if the norm is not finite; the weights are then unchanged."""
        self.move_gradients()
        sum_gradients(self.masters)
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm).item()
        if not math.isfinite(norm):
            raise DivergenceError("the gradient is not finite")
        self.param_groups[0]["lr"] = lr
        self.step()
        self.copy_to_weights()
        self.zero_grad()
        return norm

    def copy_to_weights(self) -> None:
        """Copy the masters, rounded, to the weights of the model."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.data.copy_(master.data)


# -- The checkpoint --------------------------------------------------------------------------------
# The logs that are cut back to the checkpoint when a run resumes. timings.jsonl is not: steps that
# are repeated after a resume appear in it twice.
LOGS = ("metrics.jsonl", "samples.jsonl")


def save_checkpoint(folder: Path, step: int, optimizer: MasterAdamW, state: dict) -> None:
    """Save what training needs to resume after `step` steps, in one file that is replaced
    atomically: master weights, AdamW's moments, the lengths of the run's log files, and `state`, a
    small JSON object. No random state needs saving, because random numbers depend on the step."""
    tensors = {}
    for i, master in enumerate(optimizer.masters):
        values = {"weight": master.detach(), **optimizer.state.get(master, {})}
        tensors |= {f"{i}.{name}": tensor.cpu() for name, tensor in values.items()}
    logs = [folder / name for name in LOGS]
    lengths = {log.name: log.stat().st_size for log in logs if log.exists()}
    record = json.dumps({"step": step, "logs": lengths, "state": state})
    replace_file(folder / "checkpoint.safetensors", tensors, {"run": record})


def load_checkpoint(folder: Path, optimizer: MasterAdamW) -> tuple[int, dict]:
    """Restore weights and moments from the run's checkpoint, and truncate the log files to the
    lengths that they had then. Returns the number of steps done and the `state` that was saved. If
    there is no checkpoint, the logs are emptied, and the result is (0, {}): the run starts over.
    Raises ValueError if the checkpoint is damaged or belongs to another model."""
    path = folder / "checkpoint.safetensors"
    step, lengths, state = 0, {}, {}
    if path.exists():
        try:
            step, lengths, state = read_checkpoint(path, optimizer)
        except Exception as error:  # A damaged file can raise errors of many types.
            raise ValueError(f"{path} is damaged or belongs to another model: {error}") from None
        optimizer.copy_to_weights()
    for log in (folder / name for name in LOGS):
        if log.exists() and is_rank_0():
            # If a log has become shorter, os.truncate would extend it with zeros: hence min.
            os.truncate(log, min(lengths.get(log.name, 0), log.stat().st_size))
    # All processes have read the same step. `gather` waits until they have, because the first one
    # may soon replace or delete the checkpoint.
    return gather([step])[0], state


def read_checkpoint(path: Path, optimizer: MasterAdamW) -> tuple[int, dict, dict]:
    """Read masters and moments into the optimizer; return step, lengths of the logs, and state."""
    with safetensors.safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["run"])
        step, lengths, state = int(record["step"]), dict(record["logs"]), dict(record["state"])
        keys = list(file.keys())  # "0.weight", "0.step", "0.exp_avg", "0.exp_avg_sq", "1.weight", …
        if sum(key.endswith(".weight") for key in keys) != len(optimizer.masters):
            raise ValueError("it has the wrong number of weights")
        for i, master in enumerate(optimizer.masters):
            names = [key.removeprefix(f"{i}.") for key in keys if key.startswith(f"{i}.")]
            # A master that has never had a gradient has no state of AdamW.
            if len(names) not in (1, 4):
                raise ValueError(f"some of the tensors {i}.… are missing")
            tensors = {name: file.get_tensor(f"{i}.{name}") for name in names}
            for name, tensor in tensors.items():
                if tensor.shape != (() if name == "step" else master.shape):
                    raise ValueError(f"{i}.{name} has the shape {tuple(tensor.shape)}")
            master.data.copy_(tensors.pop("weight"))
            # Copy AdamW's moments and step, too, so that nothing depends on the open file.
            copies = {name: x.to(master.device, copy=True) for name, x in tensors.items()}
            optimizer.state[master] = copies
    return step, lengths, state


# -- Several processes -----------------------------------------------------------------------------
# To use several GPUs, torchrun starts a process for each of them. Every process has the whole model
# and works on its share of the problems or failures. The samples are the same as with one process,
# because the random numbers of a sample do not depend on the other samples.
@contextmanager
def join_processes() -> Iterator[None]:
    """Within a `with` block, work together with the other processes that torchrun has started, if
    there are any. Only the first one, rank 0, prints and reports that it was interrupted."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield
        return
    # The timeout can be long, because torchrun ends all processes when one of them fails.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))
    if not is_rank_0():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        yield
    except BaseException as error:
        # When one process fails, the others lose their connection to it, which is a RuntimeError.
        # Only the original error should be printed. So rank 0 reports any other error at once, but
        # all other processes, and rank 0 after a RuntimeError, wait first: meanwhile, torchrun
        # usually ends them. A process that is still alive then has to report its error itself.
        time.sleep(0 if is_rank_0() and not isinstance(error, RuntimeError) else 5)
        sys.stderr = sys.__stderr__  # This undoes the redirection above.
        raise
    dist.destroy_process_group()


def num_processes() -> int:
    """The number of processes that share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(items: list) -> list:
    """This process's share of some items."""
    return items[dist.get_rank() :: num_processes()] if num_processes() > 1 else items


def gather(part: list) -> list:
    """The parts of all processes, joined. This waits until every process has called it."""
    parts = [part] * num_processes()
    if num_processes() > 1:
        dist.all_gather_object(parts, part)
    return sum(parts, [])


def sum_gradients(parameters: list[Tensor]) -> None:
    """Replace the gradients by their sums over all processes, if any process has gradients."""
    if num_processes() > 1 and any(gather([p.grad is not None for p in parameters])):
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
