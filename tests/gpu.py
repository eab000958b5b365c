"""Measure what this code does on a device: one table for each shape of model.

    python tests/gpu.py                              three real shapes, on a GPU if there is one
    python tests/gpu.py --shape tiny --device cpu    every line of the table in less than a minute
    python tests/gpu.py --shape small --device cpu   the same in some minutes, with larger sizes
    python tests/gpu.py --fits                       which flags fit which GPU: a table, in seconds

The models have random weights in bfloat16 and the shapes of real checkpoints, so nothing is
downloaded. If a line of the table has a bound, its verdict is pass or fail; otherwise it is
"figure". If something is missing (memory for the model, transformers, vLLM), the line is "skipped"
and says why. The exit code is 1 if a line failed.

This is the one place that compares the estimate of memory, `r3.memory_needed`, with the peaks that
are measured. On a CPU, the peak is that of the tensors that PyTorch's operators create. A packed
row must have more than 256 tokens there: for fewer, `model.linear` lays out its result in a way for
which PyTorch has no fused attention, and scores are kept.

On a GPU, the 135M model should take a few minutes, and the 8B model about twenty minutes and 17 GB
of disk. This is a guess, because so far the table was only measured on CPUs.
"""

import argparse
import copy
import gc
import importlib.util
import io
import json
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench

import grpo
import r3
from grpo import Agent, Conversation, Group, Turn
from model import Model, tiny_model
from tasks import TinyCountdown

TINY = dict(
    model_type="llama", vocab_size=768, hidden_size=64, intermediate_size=160,
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=4096, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
)  # fmt: skip
# Like Qwen2.5, but small enough for a CPU, and with a head that is not tied to the embeddings.
SMALL = dict(
    model_type="qwen2", vocab_size=16_384, hidden_size=256, intermediate_size=704,
    num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2,
    max_position_embeddings=4096, tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"],
)  # fmt: skip
SHAPES = {"tiny": TINY, "small": SMALL, "smollm2-135m": bench.SMOLLM2_135M}
REAL_SHAPES = ("smollm2-135m", "qwen2.5-1.5b", "llama-3.1-8b")
MODES = {  # modes of training, with the settings that they change
    "": {},
    " --offload": {"offload": True},
    " --checkpointing": {"checkpointing": True},
    " --offload --checkpointing": {"offload": True, "checkpointing": True},
    " --lora-rank 8": {"lora_rank": 8},
    " --lora-rank 8 --checkpointing": {"lora_rank": 8, "checkpointing": True},
}
Rows = dict[str, dict[str, str]]  # a table: {line: {column: cell}}
LINE = "| {:65} | {:15} | {:66} | {:7} |"
LR, MAX_GRAD_NORM = 5e-7, 1.0  # the paper's learning rate; clip the gradient norm to this value
# The gradient norm of the first step: in the first mode that trains all weights, or the adapters.
MODE_NORMS: dict[str, float] = {}


@dataclass
class Workload:
    """What is measured: a model's folder and shape, and how much is sampled and trained."""

    folder: Path
    config: dict  # the contents of config.json
    device: str
    failures: int
    group_size: int  # reflections on each failure
    turn_length: int  # tokens per turn

    @property
    def context_length(self) -> int:
        """Tokens before a reflection: a question and an attempt, as r3.memory_needed expects."""
        return 2 * self.turn_length

    def settings(self, **mode: Any) -> r3.Config:
        """The settings of a run. mode: a value of MODES."""
        return r3.Config(
            model=str(self.folder), device=self.device, dtype="bfloat16", lr=LR,
            group_size=self.group_size, max_new_tokens=self.turn_length, **mode,
        )  # fmt: skip


# -- Lines of the table ----------------------------------------------------------------------------
def figure(result: str, note: str = "") -> dict[str, str]:
    """A line without a bound."""
    return {"result": result, "note": note, "verdict": "figure"}


def check(passed: bool, result: str, note: str) -> dict[str, str]:
    """A line with a bound. note: the bound in words."""
    return {"result": result, "note": note, "verdict": "pass" if passed else "fail"}


def skipped(reason: str) -> dict[str, str]:
    """A line about something that could not be measured."""
    return {"result": "", "note": reason, "verdict": "skipped"}


def check_memory(
    measured: float, expected: float, lower: float = 0.85, upper: float = 1.15
) -> dict[str, str]:
    """A line about memory: the measured bytes must lie between `lower` times and `upper` times the
    estimate."""
    passed = lower * expected <= measured <= upper * expected
    ratio = f"{measured / expected:.2f} of the estimate, {gigabytes(expected)}"
    return check(passed, gigabytes(measured), f"{ratio}; {lower:g} to {upper:g}")


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


# -- The device ------------------------------------------------------------------------------------
def synchronize(device: str) -> None:
    """Wait until the device has finished what was launched."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def timed(device: str, function: Callable[[], Any], repeat: int = 1) -> float:
    """Call a function `repeat` times. Returns the seconds of the fastest call."""
    times = []
    for _ in range(repeat):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def matrix_rate(device: str) -> float:
    """Floating-point operations per second of a large bfloat16 matrix product like a layer's."""
    size = 8192 if device.startswith("cuda") else 1024
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / timed(device, lambda: torch.nn.functional.linear(a, a), 5)


class Allocated(TorchDispatchMode):
    """Counts the bytes of the tensors that are created on a type of device while it is active:
    those that are alive now, and their peak. It is meant for the CPU, whose allocator keeps no
    statistics, and for "meta". Memory that an operator allocates and frees internally is not seen.
    """

    def __init__(self, device_type: str = "cpu"):
        super().__init__()
        self.device_type = device_type
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device_type:
                storage = tensor.untyped_storage()
                # A view, or an operator that writes in place, returns a storage that exists.
                existed = storage._cdata in self.known or is_input(storage, args, kwargs)
                if storage.nbytes() and not existed:
                    self.known.add(storage._cdata)
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return output

    def freed(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.alive -= size


def is_input(storage, args, kwargs) -> bool:
    """Whether a storage belongs to one of the tensors that an operator was called with."""
    inputs = torch.utils._pytree.tree_leaves((args, kwargs))
    return any(
        isinstance(x, Tensor) and x.untyped_storage()._cdata == storage._cdata for x in inputs
    )


def measure_memory(device: str, function: Callable[[], Any]) -> tuple[Any, int, int]:
    """Call a function. Returns its result, the bytes on the device that it left allocated, and the
    peak of the bytes that it allocated."""
    if not device.startswith("cuda"):
        with Allocated() as allocated:
            result = function()
        return result, allocated.alive, allocated.peak
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = function()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return result, torch.cuda.memory_allocated(device) - before, peak - before


# -- The model and the failures --------------------------------------------------------------------
def read_shape(name: str) -> dict:
    """The contents of a config.json in tests/configs."""
    return json.loads((ROOT / f"tests/configs/{name}.json").read_text())


def save_random(shape: str, folder: Path, device: str) -> dict:
    """Write a model of this shape, with random weights in bfloat16, and a tokenizer with the same
    number of words. Returns the model's config."""
    config = SHAPES.get(shape) or read_shape(shape)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Model(config).to(torch.bfloat16)
    model.to_empty(device=device).tie()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(1.0 if "norm" in name else 0.0)
    model.save_pretrained(folder)
    words = TinyCountdown().words()
    num_special = 3  # <|end|>, <|user|>, <|assistant|>
    words += [f"filler{i}" for i in range(config["vocab_size"] - num_special - len(set(words)))]
    tiny_model(words)[1].save_pretrained(folder)
    return config


def load_agent(config: r3.Config) -> Agent:
    """`r3.load_agent` without what it prints."""
    with redirect_stdout(io.StringIO()):
        return r3.load_agent(config, r3.load_task(config), training=True)


def estimate_memory(work: Workload, **mode: Any) -> r3.Memory:
    """What r3 expects of a training run, from shapes alone. mode: a value of MODES."""
    model = Model.from_pretrained(work.folder, torch.bfloat16, "meta")
    return r3.memory_needed(work.settings(**mode), model, training=True)


def reason_not_to_train(work: Workload, mode: dict[str, Any]) -> str:
    """Why training in this mode would not fit in memory, by r3's estimate; empty if it fits."""
    memory = estimate_memory(work, **mode)
    needed = {work.device: memory.peak(memory.least_cache)}
    needed["cpu"] = needed.get("cpu", 0) + sum(memory.cpu.values())
    for device, size in needed.items():
        free = r3.free_memory(device)
        if free is not None and size > free:
            return f"needs {gigabytes(size)} on {device}, where {gigabytes(free)} are free"
    return ""


def make_failures(agent: Agent, work: Workload) -> list[Conversation]:
    """Failures of random tokens. With the instruction to reflect, each has the context length of
    the workload."""
    bridge = agent.tokenizer.bridge(agent.task.reflection_instruction)
    length = work.context_length - len(bridge)
    rng = torch.Generator().manual_seed(0)
    failures = []
    for problem in agent.task.load(split="train", limit=work.failures):
        ids = torch.randint(3, agent.model.vocab_size, (length,), generator=rng).tolist()
        prompt, tokens = ids[: length // 2], [*ids[length // 2 :], agent.tokenizer.stop_ids[0]]
        attempt = Turn(prompt, tokens, truncated=False)
        failures.append(Conversation(problem, 0, attempt, agent.verify(problem, attempt)))
    return failures


def make_groups(agent: Agent, work: Workload) -> list[Group]:
    """Reflections of random tokens on each failure, as if the model had sampled them."""
    rng, groups = torch.Generator().manual_seed(1), []
    shape, logprobs = (work.group_size, work.turn_length), [0.0] * work.turn_length
    for failure in make_failures(agent, work):
        prompt = agent.reflection_prompt(failure)
        ids = torch.randint(3, agent.model.vocab_size, shape, generator=rng).tolist()
        groups.append(
            [replace(failure, reflection=Turn(prompt, tokens, True, logprobs)) for tokens in ids]
        )
    return groups


# -- Precision -------------------------------------------------------------------------------------
@torch.no_grad()
def logits(work: Workload) -> Rows:
    """How far the logits in bfloat16 are from those of the same weights in float32."""
    by_dtype = []
    for dtype in (torch.float32, torch.bfloat16):
        model = Model.from_pretrained(work.folder, dtype, work.device)
        rng = torch.Generator().manual_seed(2)
        shape = 2, min(work.context_length, 512)
        ids = torch.randint(0, model.vocab_size, shape, generator=rng)
        by_dtype.append(model(ids.to(work.device)).cpu())
        del model
    exact, rounded = by_dtype
    difference = ((rounded - exact).abs().max() / exact.abs().max()).item()
    agreement = (rounded.argmax(-1) == exact.argmax(-1)).float().mean().item()
    return {
        "logits in bfloat16 and float32: largest difference": check(
            difference < 0.05, f"{difference:.4f}", "of the largest logit; below 0.05"
        ),
        "logits in bfloat16 and float32: equal greedy tokens": check(
            agreement > 0.8, f"{agreement:.1%}", "above 80%; random weights have many near ties"
        ),
    }


@torch.no_grad()
def mismatch(work: Workload) -> Rows:
    """The difference of the log-probabilities that the sampler recorded and those that the trainer
    computes for the same tokens."""
    agent = load_agent(work.settings())
    failures = make_failures(agent, work)[:2]
    G, differences = work.group_size, []
    conversations, _ = grpo.sample_reflections(agent, failures, G, rng_prefix=(grpo.TRAIN, 0))
    for i in range(0, len(conversations), G):
        rows = grpo.pack_group(conversations[i : i + G])
        logprobs = grpo.token_logprobs(agent.model, rows, agent.temperature).cpu()
        differences.append((logprobs - rows.old_logprobs)[rows.mask].abs())
    difference = torch.cat(differences)
    largest, mean = difference.max().item(), difference.mean().item()
    name = "mismatch of sampler and trainer"
    return {
        f"{name}: largest": check(largest < 0.1, f"{largest:.4f}", "nats; below 0.1"),
        f"{name}: mean": check(mean < 0.02, f"{mean:.5f}", "nats; below 0.02"),
    }


def attention_kernel(work: Workload) -> Rows:
    """Which attention kernel PyTorch chooses for a reflection in a packed row. MATH would store the
    scores of all heads."""
    H = work.config["num_attention_heads"]
    D = work.config.get("head_dim") or work.config["hidden_size"] // H
    total_length = work.context_length + work.turn_length
    options = {"device": work.device, "dtype": torch.bfloat16, "requires_grad": True}
    q, k, v = (
        torch.empty(1, H, length, D, **options)
        for length in (work.turn_length, total_length, total_length)
    )
    mask = torch.ones(work.turn_length, total_length, dtype=torch.bool, device=work.device)
    name = SDPBackend(torch._fused_sdp_choice(q, k, v, attn_mask=mask)).name
    return {"attention kernel of a packed row": check(name != "MATH", name, "any but MATH")}


# -- Rollout ---------------------------------------------------------------------------------------
def rollout(work: Workload) -> Rows:
    """Reflect and retry, by this repository and by others: tokens per second, and memory."""
    reasons = {mode: reason_not_to_train(work, settings) for mode, settings in MODES.items()}
    fitting = [mode for mode, reason in reasons.items() if not reason]
    if not fitting:
        return {"rollout: this repository": skipped(reasons[""])}
    agent = load_agent(work.settings(**MODES[fitting[0]]))
    failures, G = make_failures(agent, work), work.group_size
    memory_rows = {
        "memory: rollout, turns of random lengths": rollout_memory(work, agent, failures, True),
        "memory: rollout, all turns of full length": rollout_memory(work, agent, failures, False),
    }
    two_turns = partial(grpo.rollout, agent, failures, G, (grpo.TRAIN, 0))
    groups = two_turns()
    turns = [turn for group in groups for c in group for turn in (c.reflection, c.retry)]
    tokens = sum(len(turn.tokens) for turn in turns)
    batch = grpo.next_batch(agent, failures, G, turns=2)
    num_batches = -(-len(failures) // len(batch))  # rounded up
    seconds = timed(work.device, two_turns)
    contexts = [agent.reflection_prompt(failure) for failure in failures]
    bridge = agent.tokenizer.bridge(agent.task.retry_instruction)
    del agent, two_turns  # The others need their memory.
    rate = tokens / seconds
    return {
        "rollout: this repository": figure(
            f"{rate:,.0f} tokens/s",
            f"{len(batch) * G} rows per batch; number of batches: {num_batches}",
        ),
        **memory_rows,
        "rollout: transformers.generate": transformers_rollout(work, contexts, bridge, rate),
        "rollout: vLLM": vllm_rollout(work, contexts, bridge, rate),
    }


def rollout_memory(
    work: Workload, agent: Agent, failures: list[Conversation], random_lengths: bool
) -> dict[str, str]:
    """The peak of a rollout, compared with the estimate for the tokens that it stores at most.

    random_lengths: let some of the words at the end of the vocabulary end a turn, so that about
    three quarters of the turns end early, and rows are dropped. The peak comes closest to the
    estimate if there are many rows. If all turns have the full length, no row is dropped, and the
    copies for which the estimate allows do not exist.
    """
    batch = grpo.next_batch(agent, failures, work.group_size, turns=2)
    bridge = agent.tokenizer.bridge(agent.task.retry_instruction)
    stop_ids = agent.tokenizer.stop_ids
    vocab_size = agent.model.vocab_size
    num_stops = round(1.4 * vocab_size / work.turn_length) if random_lengths else 0
    agent.tokenizer.stop_ids = stop_ids[:1] + list(range(vocab_size - num_stops, vocab_size))
    two_turns = partial(grpo.rollout, agent, batch, work.group_size, (grpo.TRAIN, 0))
    _, _, peak = measure_memory(work.device, two_turns)
    agent.tokenizer.stop_ids = stop_ids
    tokens_per_row = 2 * work.turn_length + len(bridge)
    cache_tokens = len(batch) * (work.context_length + work.group_size * tokens_per_row)
    memory = estimate_memory(work)
    expected = memory.per_cache_token * cache_tokens
    return check_memory(peak, expected, lower=0.5)


def compare_rates(work: Workload, seconds: float, our_rate: float) -> dict[str, str]:
    """The line of another implementation that took so many seconds for the two turns."""
    rate = 2 * work.turn_length * work.failures * work.group_size / seconds
    return figure(
        f"{rate:,.0f} tokens/s", f"this repository is {our_rate / rate:.2f} times as fast"
    )


def transformers_rollout(
    work: Workload, contexts: list[list[int]], bridge: list[int], our_rate: float
) -> dict[str, str]:
    """Two turns by transformers.generate, batched; the cache is kept between the turns."""
    if not importlib.util.find_spec("transformers"):
        return skipped("transformers is not installed")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(work.folder, dtype=torch.bfloat16)
    model = model.to(work.device)
    model.generation_config.eos_token_id = None
    ids = torch.tensor(contexts, device=work.device)  # All contexts have the same length.
    options = dict(max_new_tokens=work.turn_length, do_sample=True, top_k=0, pad_token_id=0)

    def two_turns() -> None:
        first = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_return_sequences=work.group_size,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
        rows = first.sequences
        prompts = torch.cat([rows, torch.tensor([bridge] * len(rows), device=work.device)], dim=1)
        mask = torch.ones_like(prompts)
        cache = first.past_key_values
        model.generate(prompts, attention_mask=mask, past_key_values=cache, **options)

    return compare_rates(work, timed(work.device, two_turns), our_rate)


def vllm_rollout(
    work: Workload, contexts: list[list[int]], bridge: list[int], our_rate: float
) -> dict[str, str]:
    """Two turns by vLLM, in a process of its own, because it takes most of the GPU's memory."""
    if not importlib.util.find_spec("vllm"):
        return skipped("vllm is not installed")
    record = dict(
        folder=str(work.folder), contexts=contexts, bridge=bridge, group_size=work.group_size,
        turn_length=work.turn_length,
    )  # fmt: skip
    file = work.folder / "vllm.json"
    file.write_text(json.dumps(record))
    free_cache(work.device)
    command = [sys.executable, __file__, "--vllm", str(file)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        return check(False, "", f"fails: {finished.stderr.strip().splitlines()[-1][:80]}")
    return compare_rates(work, float(finished.stdout.split()[-1]), our_rate)


def run_vllm(file: Path) -> None:
    """Print the seconds that vLLM takes for two turns. file: what `vllm_rollout` wrote."""
    from vllm import LLM, SamplingParams

    record = json.loads(file.read_text())
    contexts, bridge = record["contexts"], record["bridge"]
    G, length = record["group_size"], record["turn_length"]
    llm = LLM(
        record["folder"], dtype="bfloat16", skip_tokenizer_init=True, enable_prefix_caching=True,
        max_model_len=len(contexts[0]) + 2 * length + len(bridge) + 1,
    )  # fmt: skip

    def sample(prompts: list[list[int]], num_samples: int) -> list[list[int]]:
        sampling = SamplingParams(
            n=num_samples, temperature=1.0, detokenize=False, ignore_eos=True, max_tokens=length,
            min_tokens=length,
        )  # fmt: skip
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = llm.generate(inputs, sampling, use_tqdm=False)
        return [list(output.token_ids) for result in results for output in result.outputs]

    sample([contexts[0][:64]], 1)  # loads the kernels
    start = time.perf_counter()
    turns = sample(contexts, G)
    sample([contexts[i // G] + turn + bridge for i, turn in enumerate(turns)], 1)
    print(time.perf_counter() - start)


# -- The training step -----------------------------------------------------------------------------
def backward(agent: Agent, reference: Model, group: Group, num_tokens: int) -> None:
    """Backpropagate the loss of one group, as grpo.train does. Every third reflection is rewarded.
    num_tokens: the number of trained tokens in the step."""
    rows, device = grpo.pack_group(group), agent.model.device
    rewards = torch.tensor([[float(g % 3 == 0) for g in range(len(group))]])
    A = grpo.group_advantages(rewards)[0].to(device)
    weights = torch.full((len(group),), 1 / num_tokens, device=device)
    with torch.no_grad():
        ref_logprobs = grpo.token_logprobs(reference, rows)
    logprobs = grpo.token_logprobs(agent.model, rows)
    mask = rows.mask.to(device)
    loss = grpo.grpo_loss(logprobs, logprobs.detach(), ref_logprobs, A, mask, weights=weights)
    loss.backward()


def step(work: Workload, mode: str, rate: float) -> Rows:
    """One training step in a mode: seconds, its percentage of the matrix rate, and its memory."""
    reason = reason_not_to_train(work, MODES[mode])
    if reason:
        return {f"step{mode}": skipped(reason)}
    device, config = work.device, work.settings(**MODES[mode])
    memory = estimate_memory(work, **MODES[mode])
    agent, weights, _ = measure_memory(device, lambda: load_agent(config))
    reference = agent.model

    def make_policy() -> Model:
        if config.lora_rank:
            return reference.with_lora(config.lora_rank)
        return copy.deepcopy(reference)

    agent.model, policy_size, _ = measure_memory(device, make_policy)
    agent.model.gradient_checkpointing = config.checkpointing
    groups = make_groups(agent, work)
    num_tokens, norms = work.failures * work.group_size * work.turn_length, []

    def one_step(optimizer: grpo.MasterAdamW) -> None:
        for group in groups:
            backward(agent, reference, group, num_tokens)
            optimizer.after_backward()
        norms.append(optimizer.update(LR, MAX_GRAD_NORM))

    def make_optimizer() -> grpo.MasterAdamW:
        optimizer = grpo.MasterAdamW(agent.model, LR, config.offload)
        one_step(optimizer)  # makes the moments
        return optimizer

    def two_groups() -> None:
        backward(agent, reference, groups[0], num_tokens)
        optimizer.move_gradients()  # Now the gradients of the masters exist.
        for group in (groups[0], groups[0]):  # The second adds to the gradients of the first.
            backward(agent, reference, group, num_tokens)
        optimizer.move_gradients()

    optimizer, optimizer_size, _ = measure_memory(device, make_optimizer)
    _, _, peak = measure_memory(device, two_groups)
    optimizer.zero_grad()
    seconds = timed(device, lambda: one_step(optimizer))
    always = dict(memory.always)
    expected_weights = always.pop("weights")
    expected_policy = always.pop("adapters" if config.lora_rank else "reference model")
    rows = {
        f"step{mode}": figure(f"{seconds:.2f} s", step_rate(work, seconds, rate)),
        f"step{mode}: norm of the gradient": check_norm(norms[0], mode),
        f"memory{mode}: weights": check_memory(weights, expected_weights),
        f"memory{mode}: {'adapters' if config.lora_rank else 'reference model'}": check_memory(
            policy_size, expected_policy
        ),
        f"memory{mode}: update": check_memory(peak, sum(memory.update.values())),
    }
    if always:  # With offload, they are not on a GPU.
        name = f"memory{mode}: master weights, moments"
        rows[name] = check_memory(optimizer_size, sum(always.values()))
    return rows


def step_rate(work: Workload, seconds: float, rate: float) -> str:
    """The arithmetic of a step in percent of what the matrix rate would allow, in words."""
    bench.TURN_LENGTH = work.turn_length
    contexts = [[0] * work.context_length] * work.failures
    workload = {"contexts": contexts, "group_size": work.group_size}
    flop = bench.step_flop(work.config, workload, shared=True)
    flop *= 4 / 3  # and the forward pass of the reference model
    return f"{flop / seconds / rate:.1%} of the {rate / 1e9:,.0f} GFLOP/s of a matrix product"


def check_norm(norm: float, mode: str) -> dict[str, str]:
    """The line about the norm of the gradient, which must be the same in all modes that train the
    same weights."""
    trained = "adapters" if "lora_rank" in MODES[mode] else "all weights"
    if trained not in MODE_NORMS:
        MODE_NORMS[trained] = norm
        return figure(f"{norm:.5g}", f"the other modes that train {trained} are compared with it")
    first = MODE_NORMS[trained]
    passed = abs(norm / first - 1) < 0.02
    return check(passed, f"{norm:.5g}", f"within 2% of the first such mode, {first:.5g}")


def ten_steps(work: Workload) -> Rows:
    """How many weights change in ten steps with a learning rate of 5e-7: with float32 master
    weights, and with everything in bfloat16."""
    name = "weights that 10 steps of 5e-7 change"
    reason = reason_not_to_train(work, MODES[""])
    if reason:
        return {name: skipped(reason)}
    masters, bfloat16 = (changed_weights(work, with_masters) for with_masters in (True, False))
    note = f"at least 3 times the {bfloat16:.2%} of pure bfloat16"
    return {name: check(masters > 3 * bfloat16, f"{masters:.2%}", note)}


def changed_weights(work: Workload, with_masters: bool) -> float:
    """The fraction of weights that ten steps change, among the first 100,000 of each parameter."""
    agent = load_agent(work.settings())
    model = agent.model
    small = replace(work, failures=1, group_size=2, turn_length=32)
    [group] = make_groups(agent, small)
    before = [p.detach().flatten()[:100_000].clone() for p in model.parameters()]
    if with_masters:
        optimizer = grpo.MasterAdamW(model, lr=LR)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for _ in range(10):
        backward(agent, model, group, num_tokens=64)
        if with_masters:
            optimizer.after_backward()
            optimizer.update(LR, MAX_GRAD_NORM)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
    after = [p.detach().flatten()[:100_000] for p in model.parameters()]
    changed = sum((a != b).sum().item() for a, b in zip(before, after, strict=True))
    return changed / sum(map(len, before))


# -- What fits where -------------------------------------------------------------------------------
FITS_SHAPES = ("qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b", "llama-3.1-8b")
GPU_SIZES = (12, 16, 24, 48, 80)  # memory in GB


def fits_table() -> str:
    """A Markdown table: with which flags r3.py trains a model on a GPU of some size. The settings
    are the defaults for a pretrained model, and all the GPU's memory is free."""
    columns = ("model", "GPU", "flags", "reflections sampled at once", "main memory", "disk")
    lines = [columns, ["---"] * len(columns)]
    for shape in FITS_SHAPES:
        with torch.device("meta"):
            model = Model(read_shape(shape))
        for gpu_size in GPU_SIZES:
            config = r3.Config(model=shape, device="cuda", dtype="bfloat16")
            free = r3.USABLE_GPU_MEMORY * gpu_size * 1e9
            smaller = r3.fit_memory(config, model, training=True, free=free, main_free=None)
            if smaller is None:
                lines.append([shape, f"{gpu_size} GB", "does not fit", "", "", ""])
                continue
            memory = r3.memory_needed(smaller, model, training=True)
            batch = r3.choose_cache_tokens(smaller, memory, free) // memory.least_cache
            # As in r3.check_disk: two checkpoints, while one replaces the other, and the model.
            disk = 2 * 12 * r3.count_trained(smaller, model) + memory.always["weights"]
            # --lora-rank raises the default of --lr, so that --lr need not be given.
            flags = r3.flags_for(replace(smaller, lr=config.lr), config)
            main_memory = gigabytes(sum(memory.cpu.values()))
            sizes = [str(batch * config.group_size), main_memory, gigabytes(disk)]
            lines.append([shape, f"{gpu_size} GB", f"`{flags}`" if flags else "none", *sizes])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -- The command line ------------------------------------------------------------------------------
def free_cache(device: str) -> None:
    """Give unused memory back to the device."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def make_table(work: Workload) -> Rows:
    """All lines about one model, printed as soon as they are known. If a part raises an error, it
    is a line that failed, and the other parts are measured all the same."""
    rate = matrix_rate(work.device)
    parts: dict[str, Callable[[], Rows]] = {
        "logits": lambda: logits(work),
        "mismatch": lambda: mismatch(work),
        "attention kernel": lambda: attention_kernel(work),
        "rollout": lambda: rollout(work),
        **{f"step{mode}": partial(step, work, mode, rate) for mode in MODES},
        "ten steps": lambda: ten_steps(work),
    }
    table: Rows = {}
    MODE_NORMS.clear()
    print(LINE.format("", "result", "note", "verdict"))
    print(LINE.format(*4 * ["---"]), flush=True)
    for name, part in parts.items():
        start = time.perf_counter()
        try:
            rows = part()
        except Exception as error:  # of any kind, for example out of memory
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            rows = {name: check(False, "", reason)}
        table |= rows
        for line, row in rows.items():
            print(LINE.format(line, *row.values()), flush=True)
        free_cache(work.device)
        print(f"  {name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return table


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    help_text = f"shapes of models (default: {' '.join(REAL_SHAPES)})"
    shapes = ("tiny", "small", *REAL_SHAPES)
    parser.add_argument("--shape", nargs="+", choices=shapes, default=REAL_SHAPES, help=help_text)
    parser.add_argument("--device", default=device, help=f"default: {device}")
    help_text = "number of failures (default: 16, or 2 with the shapes tiny and small)"
    parser.add_argument("--failures", type=int, help=help_text)
    help_text = "reflections on each failure (default: 8, or 4 with the shapes tiny and small)"
    parser.add_argument("--group", type=int, help=help_text)
    help_text = "tokens per turn (default: 256, or 48 with the shape tiny, and 64 with small)"
    parser.add_argument("--new", type=int, help=help_text)
    help_text = "print which flags fit which GPU, by the estimate"
    parser.add_argument("--fits", action="store_true", help=help_text)
    help_text = "existing folder in which the model is written, and deleted at the end"
    parser.add_argument("--folder", type=Path, help=help_text)
    parser.add_argument("--vllm", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> dict[str, Rows]:
    """Print the tables of the chosen shapes, and return them: {title: table}."""
    args = parser().parse_args(argv)
    if args.vllm:
        run_vllm(args.vllm)
        return {}
    if args.fits:
        print(fits_table())
        return {}
    tables = {}
    for shape in args.shape:
        defaults = {"tiny": (2, 4, 48), "small": (2, 4, 64)}.get(shape, (16, 8, 256))
        flags = (args.failures, args.group, args.new)
        sizes = [flag or default for flag, default in zip(flags, defaults, strict=True)]
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            config = save_random(shape, Path(folder), args.device)
            work = Workload(Path(folder), config, args.device, *sizes)
            title = (
                f"{shape} on {args.device}: {work.failures} failures x {work.group_size}, contexts "
                f"of {work.context_length} tokens, turns of {work.turn_length}, bfloat16, "
                f"torch {torch.__version__}"
            )
            print(f"\n{title}\n", flush=True)
            tables[title] = make_table(work)
    return tables


if __name__ == "__main__":
    tables = main()
    sys.exit(any(row["verdict"] == "fail" for rows in tables.values() for row in rows.values()))
