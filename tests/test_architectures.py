"""Invariants 1 and 7 for every architecture: our logits equal those of `transformers`, in both
directions: it loads what we save, and we load what it saves. To test a new architecture, add an
entry to KINDS: the name of its class in `transformers`, and options of its configuration."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from test_model import assert_close, logits_in_pieces, padded_hidden

from model import Model, ModelConfig, Tokenizer, generate

INDEX = "model.safetensors.index.json"
CONFIGS = sorted((Path(__file__).parent / "configs").glob("*.json"))
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
KINDS = {
    "llama, tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama, biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama, llama3": ("Llama", dict(rope_parameters=LLAMA3)),
    "llama, free head_dim": ("Llama", dict(head_dim=12)),
    "qwen2": ("Qwen2", dict(sliding_window=8)),  # not used, so it limits nothing
    "qwen3": ("Qwen3", dict(head_dim=12)),
    "qwen3, biases": ("Qwen3", dict(head_dim=12, attention_bias=True)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral, window": ("Mistral", dict(sliding_window=128, head_dim=12)),  # as long as the context
    "olmo2": ("Olmo2", dict()),
    "olmo2, biases, tied": ("Olmo2", dict(attention_bias=True, tie_word_embeddings=True)),
}
T = 40  # beyond the original context of llama3


def made(kind, path, **more):
    """A random model of transformers, saved, and ours, loaded from the same folder."""
    name, options = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(
        **dict(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
            rms_norm_eps=1e-5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ) | options | more
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # so that biases and norms have random values, too
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(path)
    return theirs, Model.from_pretrained(path)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_equal_transformers(kind, tmp_path):
    """Without a cache, with padding on either side, and with a cache and shared contexts."""
    theirs, ours = made(kind, tmp_path)
    ids = torch.randint(0, 61, (4, T))
    ids[1, :7], ids[3, :7] = ids[0, :7], ids[2, :7]
    expected = theirs(ids).logits
    assert_close(ours(ids), expected)
    assert_close(ours(ids[:, :10]), theirs(ids[:, :10]).logits)
    for side in (slice(0, 13), slice(27, T)):
        mask = torch.ones(4, T, dtype=torch.bool)
        mask[1, side], mask[2, slice(0, 30) if side.start == 0 else slice(10, T)] = False, False
        got = ours.head(padded_hidden(ours, ids, mask))
        for row in range(3):
            assert_close(got[row][mask[row]], theirs(ids[row][mask[row]][None]).logits[0])
    assert_close(logits_in_pieces(ours, ids, range(7, T + 1)), expected)
    assert_close(logits_in_pieces(ours, ids, (7, 8, 20, T), num_samples=2), expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_transformers_loads_what_we_save(kind, tmp_path):
    theirs, ours = made(kind, tmp_path / "a")
    ids = torch.randint(0, 61, (2, T))
    for parameter in ours.parameters():
        parameter.mul_(1.1)
    expected = ours(ids)
    assert not torch.allclose(expected, theirs(ids).logits, rtol=1e-2)
    b = tmp_path / "b"
    theirs.save_pretrained(b, max_shard_size="30KB")  # what is saved over it wins
    assert (b / INDEX).exists()
    ours.save_pretrained(b)
    assert_close(transformers.AutoModelForCausalLM.from_pretrained(b)(ids).logits, expected)
    assert_close(Model.from_pretrained(b)(ids), expected)
    names = set(theirs.state_dict()) - ({"lm_head.weight"} if "tied" in kind else set())
    assert set(dict(ours.named_parameters())) == names  # the original ones
    half = Model.from_pretrained(b, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert opened.dtype == torch.bfloat16
    Model.from_pretrained(tmp_path / "half").save_pretrained(tmp_path / "half")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert opened.dtype == torch.float32


@pytest.mark.parametrize("kind", ["llama, llama3", "qwen2", "qwen3, biases", "olmo2"])
@torch.no_grad()
def test_a_sampled_conversation_of_two_turns(kind, tmp_path):
    """Two greedy turns of rows of different lengths equal a forward pass of the whole text."""
    _, ours = made(kind, tmp_path)
    ids = torch.randint(12, 61, (6, 24)).tolist()
    prompts = [ids[row][:length] for row, length in enumerate((3, 9, 12, 14, 15, 17))]
    options = dict(temperature=0, stop=range(3))
    first = generate(ours, prompts, max_new_tokens=14, **options)
    next_prompts = [turn[-1:] + [30, 31, 32] for [turn] in first.tokens]
    second = generate(ours, next_prompts, max_new_tokens=8, cache=first.cache, **options)
    for prompt, [turn], bridge, [reply] in zip(
        prompts, first.tokens, next_prompts, second.tokens, strict=True
    ):
        for context, turn_ids in ((prompt, turn), (prompt + turn[:-1] + bridge, reply)):
            for i, token in enumerate(turn_ids):
                logits = ours(torch.tensor([context + turn_ids[:i]]))[0, -1]
                assert logits.max() - logits[token] < 1e-4 * logits.abs().max()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "olmo2"])
def test_defaults_of_missing_entries_equal_transformers(kind):
    config = dict(
        model_type=kind, vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=8, max_position_embeddings=4096, pad_token_id=0,
    )  # fmt: skip
    ours, theirs = ModelConfig.from_dict(config), transformers.AutoConfig.for_model(**config)
    for name in ("rms_norm_eps", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name, None), name
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 32 // 8)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    for name in ("attention_bias", "mlp_bias"):
        assert getattr(ours, name) == getattr(theirs, name, False), name
    if kind == "llama":
        assert ours.num_key_value_heads == theirs.num_key_value_heads == 8


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_the_shapes_of_real_checkpoints_are_as_in_transformers(path):
    """The names and shapes of all parameters, and the frequencies of RoPE."""
    with torch.device("meta"):
        ours = Model(json.loads(path.read_text()))
        config = transformers.AutoConfig.from_pretrained(path)
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {name: p.shape for name, p in ours.state_dict().items()}
    assert shapes == {name: p.shape for name, p in theirs.state_dict().items()}
    assert ours.config.max_position_embeddings == config.max_position_embeddings
    angles = type(theirs.model.rotary_emb)(config).inv_freq
    torch.testing.assert_close(ours.inv_freq, angles, rtol=1e-5, atol=0)


@pytest.mark.parametrize("old", ["rope_type", "type"])
@torch.no_grad()
def test_old_names_of_the_rope_parameters(old, tmp_path):
    theirs, _ = made("llama, llama3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if old == "type":
        rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = rope
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = torch.randint(0, 61, (1, T))
    assert_close(Model.from_pretrained(tmp_path)(ids), theirs(ids).logits)
    for other in ("yarn", "linear", "dynamic", "longrope"):
        config["rope_scaling"] = {"type": other, "factor": 2.0}
        (tmp_path / "config.json").write_text(json.dumps(config))
        message = f"rope_type '{other}' is not supported; supported: default, llama3"
        with pytest.raises(ValueError, match=message):
            Model.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "kind", ["llama, tied", "llama, llama3", "qwen2", "qwen3", "mistral", "olmo2"]
)
@torch.no_grad()
def test_conversations_beyond_the_context_length_are_refused(kind, tmp_path):
    theirs, ours = made(kind, tmp_path, max_position_embeddings=16)
    ids = torch.randint(0, 61, (1, 17))
    assert_close(ours(ids[:, :16]), theirs(ids[:, :16]).logits)
    refused = pytest.raises(ValueError, match="17 tokens do not fit the model's context of 16")
    with refused:
        ours(ids)
    with refused:
        generate(ours, [[5] * 10], max_new_tokens=7)
    first = generate(ours, [[5] * 10], max_new_tokens=3)
    with refused:
        generate(ours, [[5, 6]], max_new_tokens=3, cache=first.cache)


def test_a_sliding_window_is_refused_if_it_limits_anything():
    config = dict(
        model_type="mistral", vocab_size=61, hidden_size=32, intermediate_size=48,
        num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=8192,
    )  # fmt: skip
    for window in (None, 8192, 10_000):
        ModelConfig.from_dict({**config, "sliding_window": window})
    for entry, window in (({"sliding_window": 8191}, 8191), ({}, 4096)):  # 4096 by default
        with pytest.raises(
            ValueError, match=f"^sliding_window {window} is not supported; .* 8192$"
        ):
            ModelConfig.from_dict({**config, **entry})
    ModelConfig.from_dict({**config, "model_type": "llama", "sliding_window": 16})  # ignored there


def test_sharded_weights_and_damaged_indexes(tmp_path):
    theirs, _ = made("llama, tied", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    ids = torch.randint(0, 61, (1, 9))
    with torch.no_grad():
        assert_close(Model.from_pretrained(tmp_path)(ids), theirs(ids).logits)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    index = json.loads((tmp_path / INDEX).read_text())
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    for stranger, message in (
        ("../x.safetensors", "does not exist"),
        ("/etc/passwd", "is damaged"),
    ):
        places = {**index["weight_map"], "model.norm.weight": stranger}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
        with pytest.raises((OSError, ValueError), match=f"{re.escape(stranger)} {message}"):
            Model.from_pretrained(tmp_path)
    left_out = {name: x for name, x in index["weight_map"].items() if x != first.name}
    for broken in (
        {"weight_map": {}}, {"weight_map": left_out}, {}, {"weight_map": []}, {"weight_map": None},
        {"weight_map": {"model.norm.weight": 5}}, {"weight_map": {"a": "b", "c": None}},
    ):  # fmt: skip
        (tmp_path / INDEX).write_text(json.dumps(broken))
        with pytest.raises((OSError, ValueError)) as error:
            Model.from_pretrained(tmp_path)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    (tmp_path / INDEX).write_text(json.dumps(index))
    content = first.read_bytes()
    first.write_bytes(content[:-9])
    with pytest.raises(ValueError, match=f"{first.name} is damaged"):
        Model.from_pretrained(tmp_path)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=first.name):
        Model.from_pretrained(tmp_path)


@torch.no_grad()
def test_additional_tensors_of_old_checkpoints_are_ignored(tmp_path):
    """A copy of a tied head, and constants of RoPE, as in transformers."""
    from safetensors.torch import load_file, save_file

    theirs, _ = made("llama, tied", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(stored, tmp_path / "model.safetensors")
    ids = torch.randint(0, 61, (1, 9))
    assert_close(Model.from_pretrained(tmp_path)(ids), theirs(ids).logits)


@torch.no_grad()
def test_padding_rows_of_the_head_are_never_sampled(tmp_path):
    """The trainer ignores them, too, so that its log-probabilities equal the sampler's."""
    _, ours = made("qwen2", tmp_path)
    prompt = [5, 6, 7]
    unlimited = generate(ours, [prompt], num_samples=40, max_new_tokens=5).tokens[0]
    assert max(max(turn) for turn in unlimited) >= 30
    ours.vocab_size = 30
    generation = generate(ours, [prompt], num_samples=40, max_new_tokens=5)
    assert max(max(turn) for turn in generation.tokens[0]) < 30
    rows = torch.tensor([prompt + turn for turn in generation.tokens[0]])
    logits = ours(rows)
    assert logits.shape[-1] == 30
    logprobs = logits[:, 2:-1].log_softmax(-1).gather(-1, rows[:, 3:, None])[..., 0]
    assert_close(logprobs, torch.tensor(generation.logprobs[0]))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_equals_separate_rows(kind, checkpointing, tmp_path):
    """A context with three branches: the same logits and gradients as three separate rows."""
    _, ours = made(kind, tmp_path)
    rng = torch.Generator().manual_seed(0)
    context, lengths = torch.randint(0, 61, (12,), generator=rng), (2, 9, 3)
    parts = [torch.randint(0, 61, (length,), generator=rng) for length in lengths]
    weights = [torch.randn(length, 61, generator=rng) for length in lengths]

    def gradients(outputs):
        ours.zero_grad(set_to_none=True)
        sum((w * x).sum() for w, x in zip(weights, outputs, strict=True)).backward()
        return torch.cat([p.grad.flatten() for p in ours.parameters()])

    plain = [ours(torch.cat([context, x])[None])[0, 12:] for x in parts]
    expected = gradients(plain)
    ours.gradient_checkpointing = checkpointing
    packed = torch.cat([context, *parts])[None]
    hidden = ours.hidden(packed, lengths=[12, *lengths])
    got = ours.head(hidden)[0, 12:].split(lengths)
    for x, y in zip(got, plain, strict=True):
        assert_close(x, y)
    assert ((gradients(got) - expected).norm() / expected.norm()).item() < 1e-4


def test_padding_does_not_change_gradients(tmp_path):
    """Two rows in a batch, one of them padded, have the gradients of separate rows."""
    _, ours = made("llama, tied", tmp_path)
    rows = [torch.randint(3, 61, (n,)) for n in (5, 9)]
    weights = torch.randn(61)
    total = 0
    for row in rows:
        ours.zero_grad(set_to_none=True)
        (ours(row[None])[0] @ weights).sum().backward()
        total = total + torch.cat([p.grad.flatten() for p in ours.parameters()])
    ours.zero_grad(set_to_none=True)
    ids = torch.stack([torch.cat([torch.zeros(4, dtype=torch.long), rows[0]]), rows[1]])
    mask = torch.arange(9) >= torch.tensor([[4], [0]])
    (ours.head(padded_hidden(ours, ids, mask))[mask] @ weights).sum().backward()
    got = torch.cat([p.grad.flatten() for p in ours.parameters()])
    assert ((got - total).norm() / total.norm()).item() < 1e-4


MEASURE = """
import sys, threading, time
from model import Model
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
Model.from_pretrained(sys.argv[2])  # what is imported when a first model is loaded stays
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
thread = threading.Thread(target=watch); thread.start()
model = Model.from_pretrained(sys.argv[1])
done = True; thread.join()
sizes = [p.nbytes for p in model.parameters()]
print(peak - before, sum(sizes), max(sizes))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_memory_of_loading(folder, tmp_path):
    """Loading takes the memory of the weights and of one more tensor, plus some of the allocator.
    Measured as anonymous memory in a process of its own."""
    config = dict(
        model_type="llama", vocab_size=20_000, hidden_size=512, intermediate_size=1024,
        num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    Model(config).save_pretrained(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(folder)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    peak, total, largest = map(int, ran.stdout.split())
    assert total > 110_000_000 and total * 0.95 < peak < total + largest + total / 4


def test_a_hub_id_works_offline_from_its_cache(folder, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--org--name"
    model, commit = Model.from_pretrained(folder), "0" * 40
    model.model.norm.weight.data.fill_(2)
    model.save_pretrained(cache / "snapshots" / commit)
    Tokenizer.from_pretrained(folder).save_pretrained(cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert Model.from_pretrained("org/name").model.norm.weight[0] == 2
    assert len(Tokenizer.from_pretrained("org/name").encode("abc")) == 3
    for name, message in (
        ("org/other", "org/other: no such file or folder; it has not been downloaded"),
        ("nowhere", "nowhere: no such file or folder, nor a hub id"),
        ("../x/y", "../x/y: no such file or folder"),
    ):
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}") as error:
            Model.from_pretrained(name)
        assert "\n" not in str(error.value)
