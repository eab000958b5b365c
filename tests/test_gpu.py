"""Check what can be known about a GPU without one: `gpu.py` runs, and how often the host waits for
the device or copies to it in a decode step and in a training step.

A pretended device holds its tensors in CPU memory, computes on the CPU, and counts operators,
copies to the device, and waits for it. As with a GPU, tensors of the host and of the device cannot
be mixed. PyTorch keeps such a device until the process ends, so these tests run in a process of
their own:

    PRETENDED=1 python -m pytest tests/test_gpu.py
"""

import collections
import json
import os
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import gpu
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import grpo
import r3
from model import Linear, Model, generate

ROOT = Path(__file__).resolve().parents[1]
PRETENDED = "PRETENDED" in os.environ
pretended = pytest.mark.skipif(not PRETENDED, reason="runs in a process of its own")
plain = pytest.mark.skipif(PRETENDED, reason="runs without the pretended device")
aten = torch.ops.aten
TINY = dict(
    model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    tie_word_embeddings=True,
)  # fmt: skip


# -- A device that counts --------------------------------------------------------------------------
class OnDevice(torch.Tensor):
    """A tensor of the pretended device. `held` is the CPU tensor with its values."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device="pretended:0",
        )  # fmt: skip

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of the pretended device")


WAITS = {  # operators after which the host must know the result, or the shape of the result
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
    aten.equal.default, aten.masked_scatter_backward.default,
}  # fmt: skip
# The host waits for these only if they are called with a Boolean mask.
WAITS_FOR_MASK = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
FREE = {aten._unsafe_view.default, aten.promote_types.default}  # These compute nothing.


def is_view(func) -> bool:
    return any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)


class Pretended(TorchDispatchMode):
    """Runs the operators of the pretended device on the CPU, and counts them. Waits and copies are
    counted by the function of this repository in which they happen."""

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()
        self.copies = collections.Counter()
        self.kernels = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        reads_device = any(isinstance(x, OnDevice) for x in inputs)
        host_inputs = [x for x in inputs if not isinstance(x, OnDevice)]
        device = kwargs.get("device")
        writes_device = reads_device if device is None else torch.device(device).type == "pretended"
        if device is not None:
            kwargs["device"] = "cpu"
        host_args, host_kwargs = tree_map(held, (args, kwargs))
        is_copy = func in (aten._to_copy.default, aten.copy_.default)
        if func is aten.copy_.default:
            writes_device = isinstance(args[0], OnDevice)
        if is_copy and writes_device and host_inputs:
            self.copies[place()] += 1
        elif reads_device and (self.must_wait(func, host_args) or is_copy and not writes_device):
            self.waits[place()] += 1
        elif reads_device and any(x.dim() for x in host_inputs):
            raise RuntimeError(f"{func} mixes tensors of the host and the device")
        if writes_device and not is_view(func) and func not in FREE:
            self.kernels[func] += 1
        output = func(*host_args, **host_kwargs)
        in_place = {id(held(x)): x for x in inputs}  # An operator in place returns its input.

        def wrap(x):
            if not isinstance(x, torch.Tensor):
                return x
            if id(x) in in_place:
                return in_place[id(x)]
            return OnDevice(x) if writes_device else x

        return tree_map(wrap, output)

    @staticmethod
    def must_wait(func, args) -> bool:
        if func in WAITS_FOR_MASK:
            return any(x is not None and x.dtype == torch.bool for x in args[1])
        return func in WAITS


def held(x):
    return x.held if isinstance(x, OnDevice) else x


def place() -> str:
    """The innermost function of model.py or grpo.py that is running; "backward" if there is none,
    because PyTorch runs the backward pass in a thread of its own."""
    files = {str(ROOT / name) for name in ("model.py", "grpo.py")}
    codes = (frame.f_code for frame, _ in traceback.walk_stack(None))
    names = (code.co_name for code in codes if code.co_filename in files)
    return next((name for name in names if not name.startswith("<")), "backward")


class Lists(TorchFunctionMode):
    """Lets a list become a tensor of the host first and then a copy on the device, and back."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if func is torch.Tensor.tolist:
            return args[0].to("cpu").tolist()
        return func(*args, **kwargs)


if PRETENDED:
    backend_registration._setup_privateuseone_for_python_backend("pretended")


@plain
@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this version of torch cannot pretend a device",
)
def test_counts_on_a_pretended_device():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "PRETENDED": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0 and "6 passed" in finished.stdout, finished.stdout[-5000:]


def device_model(layers: int = 2, dtype: torch.dtype = torch.float32) -> Model:
    """A model with random weights on the pretended device."""
    torch.manual_seed(0)
    model = Model({**TINY, "num_hidden_layers": layers}).to(dtype)
    model.to("pretended:0")
    with torch.no_grad():  # The first forward pass also moves what is not a parameter.
        model(torch.zeros(1, 1, dtype=torch.long).to("pretended:0"))
    return model


# -- Waits and copies ------------------------------------------------------------------------------
PROMPTS = [[1, 2, 3], [4, 5]]


@pretended
def test_the_pretended_device_computes_and_counts():
    on_host = torch.arange(6.0)
    with Lists(), Pretended() as counts:
        x = on_host.to("pretended:0")
        assert x.device.type == "pretended" and (x + 1).sum().item() == 21.0
        assert x[x > 2].tolist() == [3, 4, 5]
        with pytest.raises(RuntimeError, match="mixes"):
            x + on_host
    assert sum(counts.copies.values()) == 1
    assert sum(counts.waits.values()) == 3  # item, the Boolean index, tolist


@pretended
@pytest.mark.parametrize("layers", [1, 3])
def test_sampling_waits_once_in_four_tokens(layers):
    """After tokens 0, 4, 8, …, except the last one, the host waits to learn which rows have
    finished. At the end it waits for lengths, tokens and log-probabilities. The number of layers
    does not matter."""
    torch.manual_seed(0)
    model = Model({**TINY, "num_hidden_layers": layers})
    expected = generate(model, PROMPTS, num_samples=4, max_new_tokens=17)
    with Lists(), Pretended():
        model = device_model(layers)
        for max_new_tokens, checks in ((9, 2), (17, 4)):
            with Pretended() as counts:
                sampled = generate(model, PROMPTS, num_samples=4, max_new_tokens=max_new_tokens)
            assert counts.waits == {"rows_to_keep": checks, "generate": 1, "split_turns": 2}
            assert counts.copies == {"generate": 2, "prefill": 2}
    assert sampled.tokens == expected.tokens


@pretended
def test_a_training_step_waits_once_per_failure(task, tiny, tmp_path):
    """It never waits for a layer or a token. For each failure, there are 4 copies of its packed
    row, twice because the reference model reads it too, 4 more for the loss, and one wait in the
    backward pass. For each step, the host waits for the metrics, for the norm of the gradient and,
    before it saves, for the check of the outputs on one more packed row."""
    model, tokenizer = tiny
    agent = grpo.Agent(model, tokenizer, task, max_new_tokens=8)
    attempts = grpo.attempt_all(agent, task.load(split="train", limit=6), 1, (grpo.COLLECT, 0))
    failures = [c for c in attempts if not c.attempt_verdict.correct]
    counts = {}
    with Lists(), Pretended():
        model.to("pretended:0")
        for num_failures in (1, 3):
            config = grpo.TrainConfig(
                steps=1, batch_size=num_failures, group_size=2, beta=0.1, lr=1e-5
            )
            folder = tmp_path / str(num_failures)
            with Pretended() as counts[num_failures]:
                assert len(list(grpo.train(agent, model, failures, config, folder))) == 2
    for num_failures, count in counts.items():
        waits, copies, packed_rows = count.waits, count.copies, 2 * num_failures + 1
        assert waits["backward"] == num_failures
        assert waits["loss_metrics"] == waits["update"] == waits["check_outputs"] == 1
        assert copies["token_logprobs"] == 4 * packed_rows
        assert copies["backpropagate_step"] == 4 * num_failures
        assert copies["hidden"] <= 1  # the frequencies of RoPE, once per model
        generation = {"prefill", "rows_to_keep", "generate", "split_turns"}
        step = {"backward", "loss_metrics", "update", "check_outputs", "save_checkpoint"}
        assert set(waits) <= generation | step
        rows = {"token_logprobs", "backpropagate_step", "hidden"}
        assert set(copies) <= rows | {"prefill", "generate", "drop_finished", "backward"}


# -- Operators -------------------------------------------------------------------------------------
@pretended
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 35), (torch.bfloat16, 37)])
def test_a_layer_launches_few_kernels_in_a_decode_step(monkeypatch, dtype, limit):
    """Operators that compute something are counted; each of them is a launch of about 5
    microseconds on a GPU. (transformers 5.24 needs 39 in float32 and 43 in bfloat16, also without
    views.) RMSNorm counts as one, as it is on CUDA; on a CPU it is six."""
    kernels = {}
    for layers in (1, 2):
        with Lists(), Pretended():
            model = device_model(layers, dtype)
            assert model.lm_head.weight.held.dtype == dtype
            norm = type(model.model["norm"])
            monkeypatch.setattr(norm, "forward", lambda self, x: x * self.weight)
            counts = []
            for max_new_tokens in (2, 3):  # They differ by one decode step.
                with Pretended() as count:
                    generate(model, PROMPTS, num_samples=3, max_new_tokens=max_new_tokens)
                counts.append(count)
        two, three = counts
        assert three.waits == two.waits and three.copies == two.copies
        kernels[layers] = three.kernels.total() - two.kernels.total()
    assert 10 < kernels[2] - kernels[1] <= limit


# -- Memory ----------------------------------------------------------------------------------------
@plain
def test_a_packed_row_of_an_8b_model_keeps_less_than_2_gb_per_layer(monkeypatch):
    """A context of 1,000 and 8 reflections of 512 tokens in bfloat16, with the kernel that PyTorch
    uses with a mask on CUDA. (Efficient attention takes a mask, but does not group heads; flash
    attention takes no mask; and MATH would keep 32 x 512 x 1,512 scores per reflection, several
    times.)"""
    config = json.loads((ROOT / "tests/configs/llama-3.1-8b.json").read_text())
    with torch.device("meta"):
        model = Model({**config, "num_hidden_layers": 1, "vocab_size": 8}).to(torch.bfloat16)
    sizes: dict[int, int] = {}  # of the storages that are saved for the backward pass
    alive = []  # keeps the tensors, so that no storage's address is used twice

    def efficient_attention(q, k, v, attn_mask=None, is_causal=False):
        assert k.shape == v.shape and q.shape[1] == k.shape[1]  # Heads are not grouped.
        assert q.dtype == torch.bfloat16 and q.shape[-1] == 128
        efficient = aten._scaled_dot_product_efficient_attention
        if is_causal:  # the context; here, flash attention is possible as well
            assert attn_mask is None and q.shape == k.shape
            return efficient(q, k, v, None, True, is_causal=True)[0]
        assert attn_mask.shape == (512, 1_512) == (q.shape[2], k.shape[2])
        bias = attn_mask
        if attn_mask.dtype == torch.bool:  # PyTorch converts it to a bias in each layer.
            bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
        bias = bias.expand(1, q.shape[1], -1, -1)
        return efficient(q, k, v, bias, True)[0]

    def save(x):
        sizes[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        alive.append(x)
        return x

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", efficient_attention)
    lengths = [1_000] + 8 * [512]
    ids = torch.zeros(1, sum(lengths), dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        model.hidden(ids, lengths=lengths)
    for parameter in model.parameters():  # These are in memory anyway.
        sizes[parameter.untyped_storage()._cdata] = 0
    assert 0.5e9 < sum(sizes.values()) < 2e9


class FusedRMSNorm(torch.autograd.Function):
    """What PyTorch's RMSNorm allocates and keeps on CUDA, without values."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def attention_on_cuda(q, k, v, attn_mask=None, is_causal=False):
    """The attention kernels of CUDA: flash attention, or efficient attention with a mask."""
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    bias = attn_mask.expand(1, q.shape[1], -1, -1)
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]


@plain
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mode", [{}, {"checkpointing": True}, {"lora_rank": 32}])
def test_the_estimate_of_an_update_is_its_peak_on_cuda(monkeypatch, mode, tied):
    """The backward pass of a group of 8 reflections with 512 tokens each, on the meta device, with
    Qwen2.5-1.5B's shape and four layers. In r3.memory_needed, the gradients of the masters come on
    top."""
    shape = {**gpu.read_shape("qwen2.5-1.5b"), "num_hidden_layers": 4, "tie_word_embeddings": tied}
    with torch.device("meta"):
        model = Model(shape).to(torch.bfloat16)
    config = replace(r3.Config(), model="x", device="cuda", dtype="bfloat16", **mode)
    update = r3.memory_needed(config, model, training=True).update
    expected = sum(x for name, x in update.items() if name != "gradients of the master weights")
    if config.lora_rank:
        for weight in model.parameters():
            weight.requires_grad_(False)
        for module in model.model.layers.modules():
            if isinstance(module, Linear):
                module.lora_A = nn.Parameter(module.weight.new_empty(32, module.in_features))
                module.lora_B = nn.Parameter(module.weight.new_empty(module.out_features, 32))
    model.gradient_checkpointing = config.checkpointing
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention_on_cuda)
    monkeypatch.setattr(F, "rms_norm", lambda x, _, weight, eps: FusedRMSNorm.apply(x, weight))
    T, G = config.max_new_tokens, config.group_size
    lengths = [2 * T] + G * [T]
    ids = torch.zeros(1, sum(lengths), dtype=torch.long, device="meta")
    with gpu.Allocated("meta") as allocated:
        for weight in model.parameters():  # the gradients of earlier groups
            if weight.requires_grad:
                weight.grad = torch.zeros_like(weight)
        hidden = model.hidden(ids, lengths=lengths)[0]
        targets = ids[0, : G * T]
        logprobs = grpo.target_logprobs(model, hidden[targets], targets, temperature=1.0)
        del hidden
        logprobs.sum().backward()
        head = model.lm_head.weight
        if head.grad is not None:  # as in MasterAdamW.move_gradients
            head.grad.to(torch.float32)
    assert 0.85 * expected < allocated.peak < 1.05 * expected


# -- The table -------------------------------------------------------------------------------------
@plain
@pytest.mark.slow
def test_the_table_of_the_tiny_shape_passes():
    [rows] = gpu.main(["--shape", "tiny", "--device", "cpu", "--failures", "1"]).values()
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert set(verdicts.values()) <= {"pass", "figure", "skipped"}, verdicts
    assert list(verdicts.values()).count("pass") >= 25
    optional = {"rollout: vLLM", "rollout: transformers.generate"}
    assert {name for name, verdict in verdicts.items() if verdict == "skipped"} <= optional


@plain
def test_lines_of_the_table_can_fail(monkeypatch, tmp_path):
    config = gpu.save_random("tiny", tmp_path, "cpu")
    work = gpu.Workload(tmp_path, config, "cpu", failures=1, group_size=2, turn_length=16)
    token_logprobs = grpo.token_logprobs
    monkeypatch.setattr(grpo, "token_logprobs", lambda *a, **k: token_logprobs(*a, **k) - 0.2)
    assert [row["verdict"] for row in gpu.mismatch(work).values()] == ["fail", "fail"]
    assert gpu.check_memory(2.0, 1.0)["verdict"] == "fail"
    assert gpu.check_memory(0.8, 1.0)["verdict"] == gpu.check_memory(1.2, 1.0)["verdict"] == "fail"
    assert gpu.check_memory(0.9, 1.0)["verdict"] == gpu.check_memory(1.1, 1.0)["verdict"] == "pass"
    monkeypatch.setattr(r3, "free_memory", lambda device: 0)
    assert "are free" in gpu.reason_not_to_train(work, {})
