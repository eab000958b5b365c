"""What can be said about a GPU without one: `gpu.py` runs, and what the host and the device would
say to each other in a decode step and a training step.

A pretended device holds its tensors in main memory, computes on the CPU, and counts: operators,
copies to it, and waits for it. As on a GPU, a tensor of the host does not mix with one of its own.
PyTorch keeps such a device until the process ends, so these tests run in a process of their own:

    PRETENDED=1 python -m pytest tests/test_gpu.py
"""

import collections
import os
import subprocess
import sys
import traceback
from pathlib import Path

import gpu
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import grpo
from model import Model, generate

ROOT = Path(__file__).resolve().parents[1]
PRETENDED = "PRETENDED" in os.environ
pretended = pytest.mark.skipif(not PRETENDED, reason="in a process of its own")
plain = pytest.mark.skipif(PRETENDED, reason="without the pretended device")
aten = torch.ops.aten
TINY = dict(
    model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    tie_word_embeddings=True,
)  # fmt: skip


# -- A device that counts --------------------------------------------------------------------------
class OnDevice(torch.Tensor):
    """A tensor of the pretended device; `held` is what it holds, on the CPU."""

    @staticmethod
    def __new__(cls, held):
        how = dict(strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, device="pretended:0", **how)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of the pretended device")


WAITS = {  # operators whose result, or its shape, the host must know
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
    aten.equal.default, aten.masked_scatter_backward.default,
}  # fmt: skip
BY_MASK = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # if one is bool
FREE = {aten._unsafe_view.default, aten.promote_types.default}  # nothing is computed


def is_view(func) -> bool:
    return any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)


class Pretended(TorchDispatchMode):
    """Runs what happens on the pretended device, and counts it; waits and copies by where."""

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()
        self.copies = collections.Counter()
        self.kernels = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = any(isinstance(x, OnDevice) for x in given)
        from_host = [x for x in given if not isinstance(x, OnDevice)]
        target = kwargs.get("device")
        there = here if target is None else torch.device(target).type == "pretended"
        if target is not None:
            kwargs["device"] = "cpu"
        args_, kwargs_ = tree_map(held, (args, kwargs))
        copies = func in (aten._to_copy.default, aten.copy_.default)
        if func is aten.copy_.default:
            there = isinstance(args[0], OnDevice)
        if copies and there and from_host:
            self.copies[place()] += 1
        elif here and (self.must_wait(func, args_) or copies and not there):
            self.waits[place()] += 1
        elif here and any(x.dim() for x in from_host):
            raise RuntimeError(f"{func} mixes tensors of the host and the device")
        if there and not is_view(func) and func not in FREE:
            self.kernels[func] += 1
        out = func(*args_, **kwargs_)
        before = {id(held(x)): x for x in given}  # in place: the tensor that was given

        def wrap(x):
            if not isinstance(x, torch.Tensor):
                return x
            return before.get(id(x)) if id(x) in before else (OnDevice(x) if there else x)

        return tree_map(wrap, out)

    @staticmethod
    def must_wait(func, args) -> bool:
        if func in BY_MASK:
            return any(x is not None and x.dtype == torch.bool for x in args[1])
        return func in WAITS


def held(x):
    return x.held if isinstance(x, OnDevice) else x


def place() -> str:
    """The function of this repository that is at work; none in a backward pass."""
    files = {str(ROOT / name) for name in ("model.py", "grpo.py")}
    codes = (frame.f_code for frame, _ in traceback.walk_stack(None))
    names = (code.co_name for code in codes if code.co_filename in files)
    return next((name for name in names if not name.startswith("<")), "backward")


class Lists(TorchFunctionMode):
    """A list becomes a tensor of the host, then a copy on the device; and back."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if func is torch.Tensor.tolist:
            return args[0].to("cpu").tolist()
        return func(*args, **kwargs)


if PRETENDED:
    _setup_privateuseone_for_python_backend("pretended")


@plain
def test_counts_on_a_pretended_device():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PRETENDED": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout[-5000:]


def on_device(layers: int = 2, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    model = Model({**TINY, "num_hidden_layers": layers}).to(dtype)
    model.to("pretended:0")
    model.inv_freq = model.inv_freq.to("pretended:0")  # which stays there
    return model


# -- Waits and copies ------------------------------------------------------------------------------
PROMPTS = [[1, 2, 3], [4, 5]]


@pretended
def test_the_pretended_device_computes_and_counts():
    plain = torch.arange(6.0)
    with Lists(), Pretended() as counts:
        x = plain.to("pretended:0")
        assert x.device.type == "pretended" and (x + 1).sum().item() == 21.0
        assert x[x > 2].tolist() == [3, 4, 5]
        with pytest.raises(RuntimeError, match="mixes"):
            x + plain
    assert sum(counts.copies.values()) == 1
    assert sum(counts.waits.values()) == 3  # item, the boolean index, tolist


@pretended
@pytest.mark.parametrize("layers", [1, 3])
def test_sampling_waits_twice_in_four_tokens(layers):
    """Once for how many rows of a context are left, once for which contexts: after tokens 0, 4, 8,
    …. Reading the prompts waits once, the end four times. No number of layers is in this."""
    torch.manual_seed(0)
    expected = generate(Model({**TINY, "num_hidden_layers": layers}), PROMPTS, 4, 17, stop=[])
    with Lists(), Pretended():
        model = on_device(layers)
        for new, checks in ((9, 2), (17, 4)):  # none after the last token
            with Pretended() as counts:
                drawn = generate(model, PROMPTS, num_samples=4, max_new_tokens=new)
            assert counts.waits == {"rows_to_keep": 2 * checks, "prefill": 1, "generate": 4}
            assert counts.copies == {"generate": 2, "prefill": 2}
    assert drawn.tokens == expected.tokens


@pretended
def test_a_training_step_waits_by_the_failure(task, tiny, tmp_path):
    """Never by the layer or the token. For a failure: the copies of its packed row (5, twice, as
    the reference reads it too), three more to the loss, the sums that a step reports, and one wait
    in the backward pass. For a step: the norm of the gradient."""
    model, tokenizer = tiny
    agent = grpo.Agent(model, tokenizer, task, max_new_tokens=8)
    conversations = grpo.attempt_all(agent, task.load(split="train", limit=6), 1, (grpo.COLLECT, 0))
    failures = [t for t in conversations if not t.attempt_verdict.correct]
    counts = {}
    with Lists(), Pretended():
        model.to("pretended:0")
        for failed in (1, 3):
            c = grpo.Config(steps=1, batch_size=failed, group_size=2, beta=0.1, lr=1e-5)
            with Pretended() as counts[failed]:
                assert len(list(grpo.train(agent, model, failures, c, tmp_path / str(failed)))) == 2
    for failed, counted in counts.items():
        waits, copies = counted.waits, counted.copies
        assert waits["loss_metrics"] == failed
        assert waits["backward"] == failed
        assert waits["update"] == 1
        assert copies["token_logprobs"] == 2 * 5 * failed
        assert copies["train"] == 3 * failed
        assert set(waits) == {
            "loss_metrics", "backward", "update", "save_checkpoint", "prefill", "rows_to_keep",
            "generate",
        }  # fmt: skip
        assert set(copies) <= {"token_logprobs", "train", "prefill", "generate", "rope", "backward"}


# -- Operators -------------------------------------------------------------------------------------
@pretended
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 32), (torch.bfloat16, 34)])
def test_a_decode_step_launches_few_kernels(monkeypatch, dtype, most):
    """A layer's operators that compute something, each a launch of about 5 microseconds on a GPU.
    (transformers 5.24 takes 39 in float32 and 43 in bfloat16, views not counted either.) RMSNorm
    counts as one, as it is on CUDA; on a CPU it is six."""
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda self, x: x * self.weight)
    found = []
    with Lists(), Pretended(), torch.no_grad():
        for layers in (1, 2):
            model = on_device(layers, dtype)
            assert model.lm_head.weight.held.dtype == dtype
            cache = generate(model, PROMPTS, num_samples=3, max_new_tokens=2).cache
            cache = cache.select_rows(torch.arange(6).view(2, 3).to("pretended:0"), room=4)
            new = torch.ones(6, 1, dtype=torch.bool, device="pretended:0")
            token = torch.zeros(6, 1, dtype=torch.long, device="pretended:0")
            positions, mask = cache.append(new)
            with Pretended() as counts:
                model.hidden(token, positions, mask, cache)
            found.append(counts)
    assert not found[1].waits and not found[1].copies
    assert sum(found[1].kernels.values()) - sum(found[0].kernels.values()) <= most


# -- Memory ----------------------------------------------------------------------------------------
@plain
def test_a_packed_row_of_an_8b_model_keeps_less_than_2_gb_a_layer(monkeypatch):
    """A context of 1,000 and 8 reflections of 512 tokens, bfloat16, with the kernel that a mask
    gets on CUDA: efficient attention takes a mask, but no groups of heads; flash takes no mask; and
    math would keep 32 x 512 x 1,512 scores a reflection, several times."""
    config = gpu.json.loads((ROOT / "tests/configs/llama-3.1-8b.json").read_text())
    with torch.device("meta"):
        model = Model({**config, "num_hidden_layers": 1, "vocab_size": 8}).to(torch.bfloat16)
    kept: dict[int, int] = {}

    def attention(q, k, v, attn_mask=None, is_causal=False):
        assert k.shape == v.shape and q.shape[1] == k.shape[1]  # no groups of heads
        assert q.dtype == torch.bfloat16 and q.shape[-1] == 128
        efficient = aten._scaled_dot_product_efficient_attention
        if is_causal:  # the context; flash attention would do, too
            assert attn_mask is None and q.shape == k.shape
            return efficient(q, k, v, None, True, is_causal=True)[0]
        assert attn_mask.shape == (512, 1_512) == (q.shape[2], k.shape[2])
        bias = attn_mask
        if attn_mask.dtype == torch.bool:  # PyTorch makes it a bias, in each layer
            bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
        bias = bias.expand(1, q.shape[1], -1, -1)
        return efficient(q, k, v, bias, True)[0]

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        alive.append(x)
        return x

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    length, alive = 1_000 + 8 * 512, []
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    for parameter in model.parameters():
        kept[parameter.untyped_storage()._cdata] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.hidden(ids, ids, lengths=[1_000] + 8 * [512])
    for parameter in model.parameters():
        kept[parameter.untyped_storage()._cdata] = 0
    assert 0.5e9 < sum(kept.values()) < 2e9


# -- The table -------------------------------------------------------------------------------------
@plain
def test_the_table_of_the_tiny_shape_passes():
    [rows] = gpu.main(["--shape", "tiny", "--device", "cpu"]).values()
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert set(verdicts.values()) <= {"pass", "figure", "skipped"}, verdicts
    assert list(verdicts.values()).count("pass") >= 25
    may = {"rollout: vLLM", "rollout: transformers.generate"}
    assert {name for name, verdict in verdicts.items() if verdict == "skipped"} <= may


@plain
def test_lines_of_the_table_can_fail(monkeypatch, tmp_path):
    config = gpu.save_random("tiny", tmp_path, "cpu")
    w = gpu.Work(tmp_path, config, "cpu", failures=1, group=2, context=64, new=8)
    right = grpo.token_logprobs
    monkeypatch.setattr(grpo, "token_logprobs", lambda *args: right(*args) - 0.2)
    assert [row["verdict"] for row in gpu.mismatch(w).values()] == ["fail", "fail"]
    assert gpu.within(2.0, 1.0)["verdict"] == gpu.within(0.1, 1.0, least=0.9)["verdict"] == "fail"
    monkeypatch.setattr(gpu, "free_memory", lambda device: 0)
    assert "are free" in gpu.no_room(w, {})
