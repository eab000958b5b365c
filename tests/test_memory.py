"""The estimate of memory, its refusals with flags that fit, and the check of the disk.

The estimate is compared with measured peaks by gpu.py."""

import itertools
import re
import shutil
from dataclasses import replace
from pathlib import Path

import gpu
import pytest
import torch

import grpo
import r3
from model import Model

QWEN = "qwen2.5-1.5b"
QWEN_PARAMETERS = 1_543_714_304
# Bytes of a token in the cache: k and v, layers, heads, head_dim, bfloat16.
KEY_VALUE_SIZE = 2 * 28 * 2 * 128 * 2
GB = 1e9


def on_meta(config: dict) -> Model:
    """A model of this shape without storage."""
    with torch.device("meta"):
        return Model(config)


@pytest.fixture(scope="module")
def qwen():
    return on_meta(gpu.read_shape(QWEN))


@pytest.fixture(scope="module")
def llama():
    return on_meta(gpu.read_shape("llama-3.1-8b"))


@pytest.fixture
def config():
    return replace(r3.Config(), model="x", device="cuda", dtype="bfloat16")


@pytest.fixture
def free_memory(monkeypatch):
    """A function that sets the free bytes of the GPU and of the main memory (None: unknown)."""

    def set_free(device: float | None, main: float | None = None) -> None:
        monkeypatch.setattr(r3, "free_memory", lambda name: main if name == "cpu" else device)

    return set_free


# -- The estimate ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shape", "billions"),
    [(QWEN, 1.54), ("qwen2.5-3b", 3.09), ("qwen2.5-7b", 7.62), ("llama-3.1-8b", 8.03)],
)
def test_the_shapes_have_the_published_numbers_of_parameters(shape, billions):
    model = on_meta(gpu.read_shape(shape))
    assert round(sum(p.numel() for p in model.parameters()) / GB, 2) == billions


# A model whose terms can be computed by hand. Each layer has the matrices q and o (8 x 8), k and v
# (4 x 8), gate, up and down (16 x 8), and two norms of 8.
SMALL = dict(
    model_type="llama", vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=512,
    tie_word_embeddings=False,
)  # fmt: skip
LAYER = 2 * 64 + 2 * 32 + 3 * 128 + 2 * 8
PARAMETERS = 3 * LAYER + 2 * 100 * 8 + 8
T, G = 10, 4  # tokens per turn, reflections: a packed group has 2 T + G T = 60 tokens
# What a block keeps: 4 vectors of 8, 5 of the heads' size 8, and 4 of 16 for each of 60 tokens; for
# each branch, keys and values (2 vectors of 8) of 30 tokens, and a mask of 10 x 30.
BLOCK = 60 * (4 * 8 + 5 * 8 + 4 * 16) + 4 * 30 * 16 + 4 * 10 * 30
AFTER_BLOCKS = 60 * 2 * 8 + 40 * 8  # input and output of the last norm; what predicts 40 tokens
BLOCK_BACKWARD = 60 * (2 * 16 + 2 * 8)
LOGITS = 3 * 4 * 40 * 100
HEAD = 100 * 8


def small_memory(**changes) -> r3.Memory:
    settings = dict(device="cuda", dtype="bfloat16", max_new_tokens=T, group_size=G)
    config = replace(r3.Config(), model="x", **{**settings, **changes})
    return r3.memory_needed(config, on_meta(SMALL), training=True)


def test_the_terms_of_training_all_weights():
    memory = small_memory()
    assert memory.always == {
        "weights": 2 * PARAMETERS,
        "reference model": 2 * PARAMETERS,
        "master weights": 4 * PARAMETERS,
        "moments": 8 * PARAMETERS,
    }
    assert memory.update == {
        "gradients of the master weights": 4 * PARAMETERS,
        "gradients of the weights": 2 * PARAMETERS,
        "activations": 2 * (AFTER_BLOCKS + 3 * BLOCK),
        "logits": LOGITS,
        "gradient of the head": 2 * HEAD,
    }
    assert memory.cpu == {"copies to be saved": 12 * PARAMETERS}
    assert memory.least_cache == 2 * T + G * 2 * (T + 50)
    per_token = 2 * 3 * 1 * 4 * 2  # k and v, layers, one head of size 4, bfloat16
    copies = 1 + 1 / 2 + 3 / 4 + 9 / 16
    assert memory.rollout["keys and values"] == copies * per_token
    assert memory.rollout["logits of a decode step"] == pytest.approx(4 * 4 * 100 / (2 * (T + 50)))
    always, update = sum(memory.always.values()), sum(memory.update.values())
    assert memory.peak(0) == always + update
    assert memory.peak(10**6) == always + 10**6 * memory.per_cache_token


def test_the_terms_of_offloading():
    memory = small_memory(offload=True, beta=0.0)
    assert memory.always == {"weights": 2 * PARAMETERS}
    assert set(memory.update) == {
        "gradients of the weights", "activations", "logits", "gradient of the head",
    }  # fmt: skip
    assert memory.cpu == {
        "master weights": 4 * PARAMETERS,
        "moments": 8 * PARAMETERS,
        "gradients of the master weights": 4 * PARAMETERS,
    }
    # A CPU has only the main memory.
    on_cpu = small_memory(offload=True, device="cpu")
    assert on_cpu.cpu == {} and on_cpu.always["master weights"] == 4 * PARAMETERS
    assert on_cpu.update["gradients of the master weights"] == 4 * PARAMETERS


def test_the_terms_of_checkpointing(monkeypatch):
    """The inputs of three layers are kept. The peak is at the logits or, if there are few of them,
    where the last layer is computed again (its input is one of the three)."""
    memory = small_memory(checkpointing=True, lora_rank=1)
    one_block = BLOCK + 60 * 7 * 1 - 60 * 8 + BLOCK_BACKWARD  # seven adapters of rank 1
    kept = AFTER_BLOCKS + 3 * 60 * 8
    assert memory.update["activations"] == 2 * kept and memory.update["logits"] == LOGITS
    monkeypatch.setattr(grpo, "MAX_LOGITS", 100)
    memory = small_memory(checkpointing=True, lora_rank=1)
    assert memory.update["activations"] == 2 * (kept + one_block)
    assert "logits" not in memory.update


def test_the_terms_of_lora():
    rank = 3
    sizes = [(8, 8), (8, 4), (8, 4), (8, 8), (8, 16), (8, 16), (16, 8)]
    adapters = 3 * rank * sum(a + b for a, b in sizes)
    memory = small_memory(lora_rank=rank)
    assert memory.always == {
        "weights": 2 * PARAMETERS,
        "adapters": 2 * adapters,
        "master weights": 4 * adapters,
        "moments": 8 * adapters,
    }
    assert memory.update["gradients of the weights"] == 2 * adapters
    assert "gradient of the head" not in memory.update
    saved = max(12 * adapters, 2 * PARAMETERS)  # the checkpoint, or the merged model
    assert memory.cpu == {"copies to be saved": saved}
    # The formula counts the parameters that with_lora really adds.
    model = Model(SMALL)
    config = replace(r3.Config(), lora_rank=rank)
    counted = r3.count_trained(config, model)
    policy = model.with_lora(rank)
    assert counted == adapters == sum(p.numel() for p in policy.parameters() if p.requires_grad)


def test_the_terms_of_float32():
    """The weights are their own masters."""
    memory = small_memory(dtype="float32")
    assert memory.always == {
        "weights": 4 * PARAMETERS, "reference model": 4 * PARAMETERS, "moments": 8 * PARAMETERS
    }  # fmt: skip
    assert memory.update["gradients of the weights"] == 4 * PARAMETERS
    assert memory.update["gradient of the head"] == 4 * HEAD
    on_cpu = small_memory(dtype="float32", device="cpu")
    norms = 60 * 8 * (2 * 3 + 1)  # One more vector is kept for each norm.
    difference = on_cpu.update["activations"] - memory.update["activations"]
    assert difference == 4 * norms


def test_the_logits_are_bounded(config, qwen):
    update = r3.memory_needed(config, qwen, training=True).update
    assert update["logits"] == 12 * grpo.MAX_LOGITS
    assert update["gradient of the head"] == 3 * 2 * 151_936 * 1536


def test_without_training_there_are_weights_and_a_cache(config, qwen):
    memory = r3.memory_needed(config, qwen, training=False)
    assert memory.always == {"weights": 2 * QWEN_PARAMETERS}
    assert memory.update == memory.cpu == {}
    assert memory.rollout["keys and values"] == (1 + 1 / 2 + 3 / 4 + 9 / 16) * KEY_VALUE_SIZE
    assert memory.least_cache == 2 * 512 + 2 * 562
    many = replace(config, num_samples=100)
    assert r3.memory_needed(many, qwen, training=False).least_cache == 512 + 100 * 562


def test_each_flag_lowers_what_it_should(config, qwen):
    def total(name: str, **changes) -> float:
        memory = r3.memory_needed(replace(config, **changes), qwen, training=True)
        return sum(getattr(memory, name).values())

    for flags, part in (
        ({"offload": True}, "always"), ({"offload": True}, "update"), ({"beta": 0.0}, "always"),
        ({"checkpointing": True}, "update"), ({"lora_rank": 32}, "always"),
        ({"lora_rank": 32}, "update"), ({"lora_rank": 32}, "cpu"), ({"group_size": 4}, "update"),
        ({"max_new_tokens": 256}, "update"),
    ):  # fmt: skip
        assert total(part, **flags) < total(part), (flags, part)
    assert total("cpu", offload=True) > total("cpu")
    assert total("always", lora_rank=32, beta=0.0) == total("always", lora_rank=32)


# -- The check -------------------------------------------------------------------------------------
def test_the_kv_cache_gets_the_free_memory_of_a_gpu(config, qwen, free_memory, capsys):
    memory = r3.memory_needed(config, qwen, training=True)
    free_memory(80 * GB)
    cache_tokens = r3.check_memory(config, qwen, training=True)
    left = 80 * GB - sum(memory.always.values())
    assert cache_tokens == int(left / memory.per_cache_token)
    printed = capsys.readouterr().out
    assert printed.startswith("1,543,714,304 parameters in bfloat16 on cuda\n")
    assert f"with a KV cache of {cache_tokens:,} tokens: keys and values" in printed
    assert "at most 80 on cuda" in printed and "always: weights 3.09, reference model" in printed
    assert "in main memory: copies to be saved 18.5" in printed
    assert r3.check_memory(replace(config, cache_tokens=20_000), qwen, True) == 20_000
    on_cpu = replace(config, device="cpu")
    free_memory(80 * GB, 80 * GB)
    assert r3.check_memory(on_cpu, qwen, training=True) == 65_536
    free_memory(None, None)  # For example, on a Mac it is not known how much is free.
    assert r3.check_memory(replace(config, device="mps"), qwen, training=True) == 65_536


def suggested(config: r3.Config, model: Model, training: bool = True) -> r3.Config | None:
    """The settings with the flags that the refusal names; None if it names none."""
    with pytest.raises(ValueError, match=r"the run needs .* GB of .*, where .* GB") as refusal:
        r3.check_memory(config, model, training)
    message = str(refusal.value)
    assert "\n" not in message
    flags = re.search(r"it fits with (.*)", message)
    if not flags:
        assert "it needs at least" in message
        return None
    command_line = ["train", *flags[1].split()]
    changes = r3.read_command_line(command_line)
    del changes["command"]
    assert changes
    return replace(config, **changes)


SEARCHED = [  # model, free GB on the GPU, free GB of main memory (None: unknown), expected changes
    ("qwen", 45, None, {"checkpointing": True}),
    ("qwen", 21, None, {"offload": True, "checkpointing": True}),
    ("qwen", 22, 10, {"lora_rank": 32}),
    ("qwen", 10, None, {"offload": True, "checkpointing": True, "beta": 0.0}),
    ("qwen", 7, None, {"lora_rank": 32, "checkpointing": True}),
    ("llama", 43, None, {"offload": True, "checkpointing": True, "beta": 0.0}),
    ("llama", 43, 64, {"lora_rank": 32, "checkpointing": True}),
    ("llama", 12, None, None),
    ("llama", 43, 8, None),
]


@pytest.mark.parametrize(("name", "free", "main", "expected"), SEARCHED)
def test_a_refusal_names_flags_that_fit(request, config, free_memory, name, free, main, expected):
    model = request.getfixturevalue(name)
    free_memory(free * GB, main and main * GB)
    changed = suggested(config, model)
    if expected is None:
        assert changed is None
        return
    if "lora_rank" in expected:
        expected = {**expected, "lr": 5e-6}  # ten times as high
    assert changed == replace(config, **expected)
    assert r3.check_memory(changed, model, training=True) >= 10_000


def test_whatever_is_suggested_fits(config, free_memory):
    """Llama's shape with two layers instead of 32, in many situations."""
    model = on_meta({**gpu.read_shape("llama-3.1-8b"), "num_hidden_layers": 2})
    variants = (
        {}, {"cache_tokens": 200_000}, {"lora_rank": 8}, {"dtype": "float32"}, {"offload": True},
        {"device": "cpu"},
    )  # fmt: skip
    fits, helped, hopeless = 0, 0, 0
    for free, main, changes in itertools.product((2, 5, 8, 12, 20, 40), (None, 8, 30), variants):
        settings = replace(config, **changes)
        main_free = free if settings.device == "cpu" else main
        free_memory(free * GB, main_free and main_free * GB)
        try:
            r3.check_memory(settings, model, training=True)
            fits += 1
        except ValueError:
            changed = suggested(settings, model)
            if changed:
                r3.check_memory(changed, model, training=True)
            helped, hopeless = helped + bool(changed), hopeless + (not changed)
    assert min(fits, helped, hopeless) > 5


def test_a_refusal_names_a_lower_cache(config, qwen, free_memory):
    """If that is enough, no other flag is named. Without training, there is nothing else."""
    free_memory(60 * GB)
    changed = suggested(replace(config, cache_tokens=10**6), qwen)
    assert changed == replace(config, cache_tokens=changed.cache_tokens)
    assert 10_016 <= changed.cache_tokens < 10**6
    assert r3.check_memory(changed, qwen, training=True) == changed.cache_tokens
    free_memory(6 * GB, 6 * GB)
    on_cpu = replace(config, device="cpu")
    changed = suggested(on_cpu, qwen, training=False)
    assert changed == replace(on_cpu, cache_tokens=changed.cache_tokens)
    free_memory(3 * GB, 3 * GB)
    assert suggested(on_cpu, qwen, training=False) is None
    free_memory(5 * GB, 5 * GB)
    in_float32 = replace(on_cpu, dtype="float32")
    assert suggested(in_float32, qwen, training=False).dtype == "bfloat16"


def test_offloading_without_enough_main_memory(config, qwen, free_memory):
    free_memory(200 * GB, 20 * GB)
    assert suggested(replace(config, offload=True), qwen) == config
    free_memory(200 * GB, 10 * GB)
    assert suggested(config, qwen) == replace(config, lora_rank=32, lr=5e-6)


def test_the_free_memory_of_the_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(10e9), int(80e9)))
    assert r3.free_memory("cuda:1") == 9e9
    assert r3.free_memory("mps") is None
    free = r3.free_memory("cpu")
    assert free is None or 1e8 < free < 1e15
    meminfo = "MemTotal:  8 kB\nMemFree:  1 kB\nMemAvailable:       3 kB\n"
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: meminfo)
    assert r3.free_memory("cpu") == 3 * 1024
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    assert r3.free_memory("cpu") is None


@pytest.mark.parametrize("supported", [True, False, None])
def test_bfloat16_is_recommended_for_processors_with_amx(
    config, qwen, free_memory, monkeypatch, capsys, supported
):
    free_memory(100 * GB, 100 * GB)
    if supported is None:  # a version of torch that does not tell
        monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: supported, raising=False)
    changes_and_hints = {("cpu", "float32"): bool(supported), ("cpu", "bfloat16"): False}
    for (device, dtype), hint in changes_and_hints.items():
        r3.check_memory(replace(config, device=device, dtype=dtype), qwen, training=False)
        assert ("--dtype bfloat16 may be faster" in capsys.readouterr().out) == hint
    tiny = replace(config, model="tiny", device="cpu", dtype="float32")
    r3.check_memory(tiny, qwen, training=False)
    assert "may be faster" not in capsys.readouterr().out


def test_load_agent_gets_the_cache_that_was_checked(config, tiny, qwen, monkeypatch):
    loaded = []

    def from_pretrained(path, dtype, device):
        loaded.append((path, dtype, device))
        return on_meta(SMALL)

    on_cpu = replace(config, device="cpu", cache_tokens=777)
    monkeypatch.setattr(r3.Model, "from_pretrained", from_pretrained)
    monkeypatch.setattr(r3.Tokenizer, "from_pretrained", lambda path: tiny[1])
    monkeypatch.setattr(tiny[1], "vocab_size", 100)
    monkeypatch.setitem(tiny[1].settings, "tiny", False)
    monkeypatch.setattr(r3, "check_memory", lambda config, model, training: 555)
    agent = r3.load_agent(on_cpu, r3.load_task(on_cpu), training=True)
    assert agent.cache_tokens == 555
    assert loaded == [("x", torch.bfloat16, "meta"), ("x", torch.bfloat16, "cpu")]


# -- The disk --------------------------------------------------------------------------------------
@pytest.fixture
def free_disk(monkeypatch):
    """A function that sets the free bytes of every disk, and returns the folders asked about."""
    asked = []

    def set_free(size: float) -> list[Path]:
        def disk_usage(path):
            asked.append(Path(path))
            return shutil._ntuple_diskusage(10**15, 0, int(size))

        monkeypatch.setattr(shutil, "disk_usage", disk_usage)
        return asked

    return set_free


def test_the_disk_that_a_run_needs(config, qwen, free_disk, tmp_path, capsys):
    asked = free_disk(1e15)
    folder = tmp_path / "runs" / "new"
    r3.check_disk(config, qwen, folder, num_problems=100, num_searched=1000)
    assert asked == [tmp_path]  # the nearest folder that exists
    line = capsys.readouterr().out
    assert line.startswith("Disk: at most ") and line.count("\n") == 1
    assert "two checkpoints 37," in line and "the trained model 3.09," in line
    samples = float(re.search(r"samples.jsonl ([\d.]+)", line)[1])
    r3.check_disk(replace(config, log_failures=None), qwen, folder, 100, 1000)
    all_samples = float(re.search(r"samples.jsonl ([\d.]+)", capsys.readouterr().out)[1])
    assert all_samples == pytest.approx(samples * 256 / 8, rel=0.01)
    r3.check_disk(replace(config, lora_rank=32), qwen, folder, 100, 1000)
    assert "two checkpoints 0.8" in capsys.readouterr().out


def test_a_run_that_does_not_fit_the_disk_is_refused(config, qwen, free_disk, tmp_path):
    free_disk(30e9)
    hint = "use another disk or --lora-rank 32 --lr 5e-06$"
    with pytest.raises(ValueError, match=hint) as refusal:
        r3.check_disk(config, qwen, tmp_path, 100, 1000)
    assert "\n" not in str(refusal.value) and "30 GB are free" in str(refusal.value)
    r3.check_disk(replace(config, lora_rank=32), qwen, tmp_path, 100, 1000)
    everything = replace(config, lora_rank=32, log_failures=None)
    with pytest.raises(ValueError, match="use another disk or a lower --log-failures"):
        r3.check_disk(everything, qwen, tmp_path, 100, 1000)
    # What the folder holds already will be replaced, or counts as written.
    with open(tmp_path / "checkpoint.safetensors", "wb") as file:
        file.truncate(20 * 10**9)  # a file without blocks
    r3.check_disk(config, qwen, tmp_path, 100, 1000)


def test_a_conversation_takes_no_more_than_estimated(task, tiny, tmp_path, capsys):
    """The questions of the tiny model are much shorter than the estimate allows."""
    model, tokenizer = tiny
    config = replace(r3.TINY, steps=1, batch_size=2, group_size=2, max_new_tokens=50)
    agent = grpo.Agent(model, tokenizer, task, config.max_new_tokens)
    attempts = grpo.attempt_all(agent, task.load(split="train", limit=2), 1, (0, 0))
    groups = grpo.rollout(agent, attempts, 2, (0, 0))
    zeros = torch.zeros(2, 2)
    grpo.log_samples(tmp_path / "samples.jsonl", 1, groups, zeros, zeros, tokenizer)
    r3.check_disk(config, model, tmp_path, num_problems=0, num_searched=0)
    estimate = 1e9 * float(re.search(r"samples.jsonl ([\de.-]+)", capsys.readouterr().out)[1])
    assert 0.2 * estimate < (tmp_path / "samples.jsonl").stat().st_size < estimate


# -- What fits where -------------------------------------------------------------------------------
def test_the_table_of_what_fits_where():
    table = gpu.fits_table()
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert len(cells) == len(gpu.FITS_SHAPES) * len(gpu.GPU_SIZES)
    flags = {(shape, size): flags for shape, size, flags, *_ in cells}
    assert flags[QWEN, "80 GB"] == "none"
    assert "--lora-rank 32" in flags["qwen2.5-7b", "24 GB"]
    assert flags["llama-3.1-8b", "12 GB"].startswith("does not fit")


@pytest.mark.parametrize("size, text", [(7.14e8, "0.714"), (99.96e9, "100"), (999.6e9, "1,000")])
def test_sizes_are_printed_in_gigabytes(size, text):
    assert r3.gigabytes(size) == text


def test_a_batch_takes_at_least_one_item(config, qwen):
    """A KV cache for one item with all its samples is counted, however low --cache-tokens is."""
    memory = r3.memory_needed(config, qwen, training=True)
    assert memory.least_cache > 1_000
    assert memory.peak(1_000) == memory.peak(memory.least_cache) < memory.peak(10**7)
