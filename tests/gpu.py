"""What this code does on a device, in figures: one table for each shape of model.

    python tests/gpu.py                              the three real shapes, on a GPU if there is one
    python tests/gpu.py --shape tiny --device cpu    every line of the table, in less than a minute
    python tests/gpu.py --shape smollm2-135m --new 32 --failures 4

Weights are random, in bfloat16, and shapes are those of real checkpoints: nothing is downloaded. A
line of the table says pass or fail where there is a bound, "figure" where there is none, and why
where it was skipped (no room for the model, no transformers, no vLLM). The exit code is 1 if a
line failed.

On a GPU the 135M model should take a few minutes, the 8B model some twenty and 17 GB of disk; this
is a guess: it has run on CPUs only.
"""

import argparse
import copy
import gc
import importlib.util
import io
import json
import re
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench

import grpo
import model as models
import r3
from model import Model
from tasks import TinyCountdown

TINY = dict(
    model_type="llama", vocab_size=768, hidden_size=64, intermediate_size=224,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=4096, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
)  # fmt: skip
REAL = ("smollm2-135m", "qwen2.5-1.5b", "llama-3.1-8b")
MODES = {  # of training, with what they change in a Config
    "": {},
    " --offload": {"offload": True},
    " --checkpointing": {"checkpointing": True},
    " --offload --checkpointing": {"offload": True, "checkpointing": True},
}
Rows = dict[str, dict[str, str]]  # of a table: line, column, cell
LINE = "| {:61} | {:15} | {:66} | {:7} |"


@dataclass
class Work:
    """What is measured: a model's folder and shape, and how much is sampled and trained."""

    folder: Path
    config: dict  # the contents of config.json
    device: str
    failures: int
    group: int  # reflections on each failure
    context: int  # tokens before a reflection
    new: int  # tokens a turn

    def settings(self, **mode) -> r3.Config:
        return r3.Config(
            model=str(self.folder), device=self.device, dtype="bfloat16", group_size=self.group,
            max_new_tokens=self.new, lr=5e-7, **mode,
        )  # fmt: skip


# -- Lines of the table ----------------------------------------------------------------------------
def figure(result: str, beside: str = "") -> dict[str, str]:
    return {"result": result, "beside": beside, "verdict": "figure"}


def check(passed: bool, result: str, beside: str) -> dict[str, str]:
    """beside: what is asked, in words."""
    return {"result": result, "beside": beside, "verdict": "pass" if passed else "fail"}


def skipped(why: str) -> dict[str, str]:
    return {"result": "", "beside": why, "verdict": "skipped"}


# -- The device ------------------------------------------------------------------------------------
def synchronize(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds(device: str, function: Callable, repeat: int = 1) -> float:
    """The least of a few runs."""
    times = []
    for _ in range(repeat):
        synchronize(device)
        begun = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times)


def matrix_rate(device: str) -> float:
    """Floating-point operations a second of a large bfloat16 matrix product, as layers make it."""
    size = 8192 if device.startswith("cuda") else 1024
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / seconds(device, lambda: torch.nn.functional.linear(a, a), 5)


def free_memory(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)


class Allocated(TorchDispatchMode):
    """The bytes that the tensors made meanwhile hold, now and at most: for a CPU, whose allocator
    keeps no account. What an operator takes and gives back inside itself is not seen."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                # An operator that writes in place, or a view, gives a storage that was there.
                fresh = storage._cdata not in self.known and not owned_by(args, kwargs, storage)
                if fresh and storage.nbytes():
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def owned_by(args, kwargs, storage) -> bool:
    given = torch.utils._pytree.tree_leaves((args, kwargs))
    return any(
        isinstance(x, Tensor) and x.untyped_storage()._cdata == storage._cdata for x in given
    )


def memory(device: str, function: Callable) -> tuple[object, int, int]:
    """What a function returns, and the bytes that it took on the device: those that are still
    taken, and the most at any time."""
    if not device.startswith("cuda"):
        with Allocated() as allocated:
            returned = function()
        return returned, allocated.now, allocated.most
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    returned = function()
    synchronize(device)
    most = torch.cuda.max_memory_allocated(device)
    return returned, torch.cuda.memory_allocated(device) - before, most - before


# -- The model and the failures --------------------------------------------------------------------
def save_random(shape: str, folder: Path, device: str) -> dict:
    """Write a model of this shape, with random weights in bfloat16, and a tokenizer of as many
    words. Returns its config."""
    config = {"tiny": TINY, "smollm2-135m": bench.SMOL}.get(shape)
    config = config or json.loads((ROOT / f"tests/configs/{shape}.json").read_text())
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
    words += [f"filler{i}" for i in range(config["vocab_size"] - 3 - len(set(words)))]
    models.tiny_model(words)[1].save_pretrained(folder)
    return config


def load_agent(c: r3.Config) -> tuple[grpo.Agent, dict[str, float]]:
    """r3.load_agent, and the bytes of the estimate that it prints, by part."""
    with redirect_stdout(io.StringIO()) as printed:
        agent = r3.load_agent(c, training=True)
    return agent, estimate(printed.getvalue())


def estimate(printed: str) -> dict[str, float]:
    """The parts of "… GB, about: weights 0.269, reference 0.269, …", in bytes."""
    listed = printed.partition("GB, about: ")[2].strip()
    parts = (part.rpartition(" ") for part in re.split(r"(?<=\d), ", listed))
    return {name: 1e9 * float(size) for name, _, size in parts}


def make_failures(agent: grpo.Agent, w: Work) -> grpo.Conversations:
    """Failures whose contexts, up to and with "reflect", are w.context random tokens long."""
    bridge = agent.tokenizer.bridge(agent.task.reflection_instruction)
    length = w.context - len(bridge)
    draws = torch.Generator().manual_seed(0)
    failures = []
    for problem in agent.task.load(split="train", limit=w.failures):
        ids = torch.randint(3, agent.model.vocab_size, (length,), generator=draws).tolist()
        prompt, attempt = ids[: length // 2], [*ids[length // 2 :], agent.tokenizer.stop_ids[0]]
        verdict = agent.verify(problem, attempt)
        failures.append(grpo.Conversation(problem, 0, prompt, attempt, verdict))
    return failures


def make_groups(agent: grpo.Agent, w: Work) -> list[grpo.Conversations]:
    """Reflections on each failure, of w.new random tokens, as if the model had drawn them."""
    draws, groups = torch.Generator().manual_seed(1), []
    for f in make_failures(agent, w):
        f.reflection_prompt = agent.reflection_prompt(f)
        turns = torch.randint(3, agent.model.vocab_size, (w.group, w.new), generator=draws).tolist()
        said = [{"reflection": turn, "reflection_logprobs": [0.0] * w.new} for turn in turns]
        groups.append([grpo.replace(f, **one) for one in said])
    return groups


# -- Precision -------------------------------------------------------------------------------------
@torch.no_grad()
def logits(w: Work) -> Rows:
    """The same weights in bfloat16 and in float32: what changes in the logits."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = Model.from_pretrained(w.folder, dtype, w.device)
        draws = torch.Generator().manual_seed(2)
        ids = torch.randint(0, model.vocab_size, (2, min(w.context, 512)), generator=draws)
        found.append(model(ids.to(w.device)).cpu())
        del model
    exact, rounded = found
    difference = ((rounded - exact).abs().max() / exact.abs().max()).item()
    agree = (rounded.argmax(-1) == exact.argmax(-1)).float().mean().item()
    return {
        "logits in bfloat16 and float32: largest difference": check(
            difference < 0.05, f"{difference:.4f}", "of the largest logit, below 0.05"
        ),
        "… : greedy tokens that agree": check(
            agree > 0.8, f"{agree:.1%}", "above 80%: random weights have close seconds"
        ),
    }


@torch.no_grad()
def mismatch(w: Work) -> Rows:
    """Log-probabilities of drawn tokens, when they were drawn and when they are trained."""
    agent, _ = load_agent(w.settings())
    few = make_failures(agent, w)[:2]
    conversations, _ = grpo.sample_reflections(agent, few, w.group, rng_key=(grpo.TRAIN, 0))
    gaps = []
    for i in range(0, len(conversations), w.group):
        ids, mask, old = grpo.reflection_rows(conversations[i : i + w.group])
        new = grpo.token_logprobs(agent.model, ids, mask, agent.temperature).cpu()
        gaps.append((new - old)[mask].abs())
    gap = torch.cat(gaps)
    return {
        "mismatch of sampler and trainer: largest": check(
            gap.max().item() < 0.1, f"{gap.max():.4f}", "nats, below 0.1"
        ),
        "… : mean": check(gap.mean().item() < 0.02, f"{gap.mean():.5f}", "nats, below 0.02"),
    }


def kernel(w: Work) -> Rows:
    """Which attention kernel a reflection gets in a packed row. MATH stores all heads' scores."""
    c = models.read_config(w.config)
    length = w.context + w.new
    how = {"device": w.device, "dtype": torch.bfloat16, "requires_grad": True}
    q, k, v = (
        torch.empty(1, c.num_attention_heads, tokens, c.head_dim, **how)
        for tokens in (w.new, length, length)
    )
    mask = torch.ones(w.new, length, dtype=torch.bool, device=w.device)
    name = SDPBackend(torch._fused_sdp_choice(q, k, v, attn_mask=mask)).name
    return {"attention kernel of a packed row": check(name != "MATH", name, "any but MATH")}


# -- Rollout ---------------------------------------------------------------------------------------
def rollout(w: Work) -> Rows:
    """Reflect and retry, by this repository and by others: tokens a second, and memory."""
    fits = [mode for mode in MODES.values() if not no_room(w, mode)]
    if not fits:
        return {"rollout: this repository": skipped(no_room(w, MODES[""]))}
    agent, about = load_agent(w.settings(**fits[0]))
    failures = make_failures(agent, w)
    key = (grpo.TRAIN, 0)
    *_, kv = about.items()  # the last part: keys and values, for so many tokens of the cache
    two_turns = partial(grpo.rollout, agent, failures, w.group, key)
    conversations, _, most = memory(w.device, two_turns)
    tokens = sum(len(t.reflection) + len(t.retry) for t in conversations)
    batches = grpo.batches(agent, failures, w.group, turns=2)
    largest = grpo.cache_tokens_needed(agent, failures[0], w.group, 2) * len(batches[0])
    expected = kv[1] / int(kv[0].split()[0].replace(",", "")) * largest
    rows = len(batches[0]) * w.group
    s = seconds(w.device, two_turns)  # once more: the first time was for the memory
    contexts = [agent.reflection_prompt(f) for f in failures]
    between = agent.tokenizer.bridge(agent.task.retry_instruction)
    del agent, two_turns  # their memory is for the others
    return {
        "rollout: this repository": figure(
            f"{tokens / s:,.0f} tokens/s", f"{rows} rows in the largest of {len(batches)} batches"
        ),
        "memory: keys and values": within(most, expected, f"{largest:,} tokens: "),
        "rollout: transformers.generate": transformers_rollout(w, contexts, between, tokens / s),
        "rollout: vLLM": vllm_rollout(w, contexts, between, tokens / s),
    }


def within(
    measured: float, expected: float, note: str = "", least: float = 0.0, most: float = 1.1
) -> dict[str, str]:
    """A line of memory: what was measured lies between two multiples of the run's estimate."""
    passed = least * expected <= measured <= most * expected
    bound = f"at most {most:g} x the estimate, {gigabytes(expected)}"
    return check(passed, gigabytes(measured), f"{note}{bound}")


def activations_at_most(device: str) -> float:
    """Times the estimate. On a CPU, RMSNorm is six operators, some of which keep float32 copies;
    on a GPU it is one."""
    return 1.1 if device.startswith("cuda") else 2.0


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def transformers_rollout(w: Work, contexts: list, between: list, ours: float) -> dict:
    """Two turns by transformers.generate, batched, its cache kept between the turns."""
    if not importlib.util.find_spec("transformers"):
        return skipped("transformers is not installed")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(w.folder, dtype=torch.bfloat16)
    model = model.to(w.device)
    model.generation_config.eos_token_id = None
    ids = torch.tensor(contexts, device=w.device)  # all of one length
    options = dict(max_new_tokens=w.new, do_sample=True, top_k=0, pad_token_id=0)

    def two_turns() -> None:
        one = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_return_sequences=w.group,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
        bridge = torch.tensor([between] * len(one.sequences), device=w.device)
        told = torch.cat([one.sequences, bridge], dim=1)
        cache = one.past_key_values
        seen = torch.ones_like(told)
        model.generate(told, attention_mask=seen, past_key_values=cache, **options)

    rate = 2 * w.new * len(contexts) * w.group / seconds(w.device, two_turns)
    return figure(f"{rate:,.0f} tokens/s", f"this repository: {ours / rate:.2f} times as fast")


def vllm_rollout(w: Work, contexts: list, between: list, ours: float) -> dict:
    """Two turns by vLLM, in a process of its own: it takes most of the GPU's memory."""
    if not importlib.util.find_spec("vllm"):
        return skipped("vllm is not installed")
    given = dict(folder=str(w.folder), contexts=contexts, between=between, G=w.group, new=w.new)
    file = w.folder / "vllm.json"
    file.write_text(json.dumps(given))
    gc.collect()
    if w.device.startswith("cuda"):
        torch.cuda.empty_cache()
    command = [sys.executable, __file__, "--vllm", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return check(False, "", f"fails: {done.stderr.strip().splitlines()[-1][:80]}")
    rate = 2 * w.new * len(contexts) * w.group / float(done.stdout.split()[-1])
    return figure(f"{rate:,.0f} tokens/s", f"this repository: {ours / rate:.2f} times as fast")


def run_vllm(file: Path) -> None:
    """Print the seconds of two turns."""
    from vllm import LLM, SamplingParams

    given = json.loads(file.read_text())
    longest = len(given["contexts"][0]) + 2 * given["new"] + len(given["between"]) + 1
    llm = LLM(
        given["folder"], dtype="bfloat16", skip_tokenizer_init=True, enable_prefix_caching=True,
        max_model_len=longest,
    )  # fmt: skip

    def draw(prompts: list, n: int) -> list:
        limits = dict(max_tokens=given["new"], min_tokens=given["new"], ignore_eos=True)
        how = SamplingParams(n=n, temperature=1.0, detokenize=False, **limits)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], how, use_tqdm=False)
        return [list(o.token_ids) for output in outputs for o in output.outputs]

    draw([given["contexts"][0][:64]], 1)  # to load kernels
    begun = time.perf_counter()
    turns = draw(given["contexts"], given["G"])
    told = [
        given["contexts"][i // given["G"]] + turn + given["between"] for i, turn in enumerate(turns)
    ]
    draw(told, 1)
    print(time.perf_counter() - begun)


# -- The training step -----------------------------------------------------------------------------
def backward(agent: grpo.Agent, reference: Model, group: grpo.Conversations, total: int) -> float:
    """The gradient of one failure, as in grpo.train: every third reflection is rewarded."""
    ids, mask, old = grpo.reflection_rows(group)
    rewards = torch.tensor([[float(g % 3 == 0) for g in range(len(group))]])
    A = grpo.group_advantages(rewards)[0].to(agent.model.device)
    with torch.no_grad():
        ref = grpo.token_logprobs(reference, ids, mask)
    new = grpo.token_logprobs(agent.model, ids, mask)
    mask = mask.to(agent.model.device)
    loss = grpo.grpo_loss(new, new.detach(), ref, A, mask, normalizer=total)
    loss.backward()
    return loss.item()


def step(w: Work, mode: str, rate: float) -> Rows:
    """One training step in a mode: seconds, share of the matrix rate, memory by part."""
    why = no_room(w, MODES[mode])
    if why:
        return {f"step{mode}": skipped(why)}
    device, settings = w.device, w.settings(**MODES[mode])
    (agent, about), weights, _ = memory(device, lambda: load_agent(settings))
    reference, copied, _ = memory(device, lambda: copy.deepcopy(agent.model))
    agent.model.gradient_checkpointing = settings.checkpointing
    groups = make_groups(agent, w)
    total = w.failures * w.group * w.new
    norms = []

    def one_step(optimizer: grpo.MasterAdamW) -> None:
        for group in groups:
            backward(agent, reference, group, total)
            optimizer.accumulate_gradients()
        norms.append(optimizer.update(5e-7, 1.0))

    def hold() -> grpo.MasterAdamW:
        """Until all exist: masters, moments, their gradients and the weights'."""
        optimizer = grpo.MasterAdamW(agent.model, 5e-7, settings.offload)
        one_step(optimizer)
        backward(agent, reference, groups[0], total)
        optimizer.accumulate_gradients()
        backward(agent, reference, groups[0], total)
        return optimizer

    optimizer, held, _ = memory(device, hold)
    expected = about["gradients, masters, moments"]
    if settings.offload and not device.startswith("cuda"):
        expected += 8 * weights  # 16 bytes a parameter in main memory, which is the device here
    tokens = w.context + w.group * w.new  # the run's estimate counts 2 turns for the context
    expected_kept = about["activations"] * tokens / ((w.group + 2) * w.new)
    logits = 12 * min(
        w.group * w.new * agent.model.vocab_size, grpo.MAX_LOGITS
    )  # float32, three times
    # The head's gradient, before it is added; where it is the embeddings', too, both and their sum.
    head = agent.model.lm_head.weight.nbytes
    tied = agent.model.config.tie_word_embeddings
    expected_most = max(expected_kept + logits + head, 3 * head * tied)
    _, _, most = memory(device, lambda: backward(agent, reference, groups[0], total))
    optimizer.accumulate_gradients()
    optimizer.zero_grad()
    s = seconds(device, lambda: one_step(optimizer))
    bench.NEW = w.new
    given = {"contexts": [group[0].reflection_prompt for group in groups], "group": w.group}
    flop = bench.step_flop(w.config, given, shared=True) * 4 / 3  # and the reference's forward
    share = f"{flop / s / rate:.1%} of the {rate / 1e9:,.0f} GFLOP/s of a matrix product"
    return {
        f"step{mode}": figure(f"{s:.2f} s", share),
        f"step{mode}: norm of the gradient": norm_line(norms, mode),
        f"memory{mode}: weights": within(weights, about["weights"], least=0.9),
        f"memory{mode}: reference": within(copied, about["reference"], least=0.9),
        f"memory{mode}: gradients, masters, moments": within(held, expected, least=0.9),
        f"memory{mode}: activations": within(
            most, expected_most, "logits, head's gradient: ", most=activations_at_most(device)
        ),
    }


NORMS: dict[str, float] = {}  # of the first step in each mode, for comparison


def norm_line(norms: list[float], mode: str) -> dict:
    """The modes compute one gradient, in different places and orders."""
    NORMS[mode] = norms[0]
    first = next(iter(NORMS.values()))
    if len(NORMS) == 1:
        return figure(f"{norms[0]:.5g}", "the other modes are compared with it")
    passed = abs(norms[0] / first - 1) < 0.02
    return check(passed, f"{norms[0]:.5g}", f"as in the first mode, {first:.5g}, to 2%")


def no_room(w: Work, mode: dict) -> str:
    """Why a training step does not fit, by the estimate of r3.load_agent; empty where it does."""
    load = Model.from_pretrained
    with patch.object(Model, "from_pretrained", lambda path, dtype, _: load(path, dtype, "meta")):
        agent, about = load_agent(w.settings(**mode))  # shapes alone
    needs = {w.device: sum(list(about.values())[:-1])}  # keys and values take what is left
    if mode.get("offload"):
        masters = 16 * sum(p.numel() for p in agent.model.parameters())
        needs["cpu"] = needs.get("cpu", 0) + masters
    for device, size in needs.items():
        if size > free_memory(device):
            free = gigabytes(free_memory(device))
            return f"needs {gigabytes(size)} on {device}, {free} are free"
    return ""


def ten_steps(w: Work) -> Rows:
    """Weights that change in ten steps of 5e-7: with float32 masters, and all in bfloat16."""
    why = no_room(w, MODES[""])
    if why:
        return {"weights that 10 steps of 5e-7 change": skipped(why)}
    changed = {}
    for name in ("float32 masters", "bfloat16"):
        agent, _ = load_agent(w.settings())
        model = agent.model
        few = Work(**{**vars(w), "failures": 1, "group": 2, "context": 64, "new": 16})
        [group] = make_groups(agent, few)
        before = [p.detach().flatten()[:100_000].clone() for p in model.parameters()]
        masters = name == "float32 masters"
        kind = grpo.MasterAdamW if masters else torch.optim.AdamW
        optimizer = kind(model if masters else model.parameters(), lr=5e-7)
        for _ in range(10):
            backward(agent, model, group, total=32)
            if masters:
                optimizer.accumulate_gradients()
                optimizer.update(5e-7, 1.0)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        after = [p.detach().flatten()[:100_000] for p in model.parameters()]
        moved = sum((a != b).sum().item() for a, b in zip(before, after, strict=True))
        changed[name] = moved / sum(map(len, before))
    shares = f"{changed['float32 masters']:.2%}"
    passed = changed["float32 masters"] > 3 * changed["bfloat16"]
    beside = f"3 times the {changed['bfloat16']:.2%} of pure bfloat16, or more"
    return {"weights that 10 steps of 5e-7 change": check(passed, shares, beside)}


# -- The command line ------------------------------------------------------------------------------
def table(w: Work) -> Rows:
    """All lines about one model, printed as they are found. A part that breaks is a line that
    failed; the rest goes on."""
    rate = matrix_rate(w.device)
    parts: dict[str, Callable[[], Rows]] = {
        "logits": lambda: logits(w),
        "mismatch": lambda: mismatch(w),
        "attention kernel": lambda: kernel(w),
        "rollout": lambda: rollout(w),
        **{f"step{mode}": partial(step, w, mode, rate) for mode in MODES},
        "ten steps": lambda: ten_steps(w),
    }
    rows: Rows = {}
    NORMS.clear()
    print(LINE.format("", "result", "beside", "verdict"))
    print(LINE.format(*4 * ["---"]), flush=True)
    for name, part in parts.items():
        begun = time.perf_counter()
        try:
            found = part()
        except Exception as error:  # of many kinds, out of memory among them
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            found = {name: check(False, "", reason)}
        rows |= found
        for line, row in found.items():
            print(LINE.format(line, *row.values()), flush=True)
        gc.collect()
        if w.device.startswith("cuda"):
            torch.cuda.empty_cache()
        print(f"  {name}: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    return rows


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--shape", nargs="+", choices=("tiny", *REAL), default=REAL)
    parser.add_argument("--device", default=default)
    parser.add_argument("--failures", type=int, help="default: 16; of tiny: 2")
    parser.add_argument("--group", type=int, help="reflections on each; default: 8; of tiny: 4")
    parser.add_argument("--context", type=int, help="tokens before them; default: 500; of tiny: 64")
    parser.add_argument("--new", type=int, help="tokens a turn; default: 256; of tiny: 16")
    parser.add_argument("--folder", type=Path, help="where a model is written, for a while")
    parser.add_argument("--vllm", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> dict[str, Rows]:
    args = parser().parse_args(argv)
    if args.vllm:
        run_vllm(args.vllm)
        return {}
    tables = {}
    for shape in args.shape:
        sizes = (2, 4, 64, 16) if shape == "tiny" else (16, 8, 500, 256)
        given = (args.failures, args.group, args.context, args.new)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            config = save_random(shape, Path(folder), args.device)
            chosen = [own or default for own, default in zip(given, sizes, strict=True)]
            w = Work(Path(folder), config, args.device, *chosen)
            title = (
                f"{shape} on {args.device}: {w.failures} failures x {w.group}, contexts of "
                f"{w.context} tokens, turns of {w.new}, bfloat16, torch {torch.__version__}"
            )
            print(f"\n{title}\n", flush=True)
            tables[title] = table(w)
    return tables


if __name__ == "__main__":
    found = main()
    sys.exit(any(row["verdict"] == "fail" for rows in found.values() for row in rows.values()))
