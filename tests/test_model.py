"""Invariants 1, 2 and 7: logits are transformers', a token's probability is one number."""

import json
import re

import numpy as np
import pytest
import torch
import transformers

import model as models
from model import KVCache, Model, Tokenizer, generate, sample_tokens

SHAPES = {
    "tied, grouped": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "untied, one key head a query head": dict(num_key_value_heads=4, tie_word_embeddings=False),
    "free head_dim, other theta": dict(num_key_value_heads=1, head_dim=12, rope_theta=500.0),
}


def reference(tmp_path, shape, seed=0):
    """A random Llama of transformers, saved; and ours, loaded from there."""
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=128, rms_norm_eps=1e-5, **shape,
    )  # fmt: skip
    torch.manual_seed(seed)
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # wide enough that every part of the model shows
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    return theirs, Model.from_pretrained(tmp_path)


def close(ours, theirs):
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-4


def in_pieces(model, ids, ends, attention_mask=None, num_samples=1):
    """Logits of rows (R, T) read in several pieces: the first are contexts, each of which the next
    `num_samples` rows share; the others go through the cache. `ends`: the pieces' last columns."""
    mask = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask
    contexts, first = [], mask[::num_samples, : ends[0]]
    hidden = model.hidden(
        ids[::num_samples, : ends[0]], *models.causal_mask(first, ends[0]), keep=contexts
    )
    _, _, K, _, D = contexts[0].shape
    suffixes = [torch.zeros(2, len(ids), K, ids.shape[1] - ends[0], D) for _ in contexts]
    cache = KVCache(contexts, suffixes, mask[:, : ends[0]])
    parts = [hidden.repeat_interleave(num_samples, dim=0)]
    for start, end in zip(ends, ends[1:], strict=False):
        seen = cache.append(mask[:, start:end])
        parts.append(model.hidden(ids[:, start:end], *seen, cache))
    return model.head(torch.cat(parts, dim=1))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_logits_equal_transformers(tmp_path, shape):
    theirs, ours = reference(tmp_path, shape)
    ids = torch.randint(0, 61, (3, 20))
    want = theirs(ids).logits
    close(ours(ids), want)
    for side in ("left", "correct"):  # padding, on either side
        mask = torch.ones(3, 20, dtype=torch.bool)
        for row, pads in enumerate((0, 4, 9)):
            mask[row, slice(pads) if side == "left" else slice(20 - pads, 20)] = False
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits
        ours_padded = ours.head(ours.hidden(ids, *models.causal_mask(mask, 20)))
        close(ours_padded[mask], padded[mask])
    close(in_pieces(ours, ids, range(7, 21)), want)  # a block, then token by token
    close(in_pieces(ours, ids, (7, 11, 12, 20)), want)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_a_cache_with_padding_is_as_if_there_were_none(tmp_path, shape):
    """Contexts that rows share, and padding anywhere in what comes after them."""
    _, ours = reference(tmp_path, shape)
    ids = torch.randint(0, 61, (4, 14))
    mask = torch.ones(4, 14, dtype=torch.bool)
    ids[1, :5], ids[3, :5] = ids[0, :5], ids[2, :5]
    mask[2:, :2] = mask[0, 5] = mask[1, 6:9] = mask[3, 7:13] = mask[2, 13] = False
    got = in_pieces(ours, ids, (5, 6, 9, 13, 14), mask, num_samples=2)
    for row in range(4):
        close(got[row][mask[row]], ours(ids[row][mask[row]][None])[0])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_what_we_save_transformers_opens(tmp_path, shape):
    theirs, ours = reference(tmp_path / "a", shape)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.1)
    ours.save_pretrained(tmp_path / "b")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    ids = torch.randint(0, 61, (2, 9))
    close(ours(ids), again(ids).logits)
    assert not torch.allclose(ours(ids), theirs(ids).logits, rtol=1e-2)


@torch.no_grad()
def test_the_tiny_folder_is_an_ordinary_one(tiny, tmp_path):
    model, tokenizer = tiny
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)
    agent = [
        {"role": "user", "content": "Make 32 from 6 10 2 ."},
        {"role": "assistant", "content": "Start with 10 / 2 = 5 ."},
        {"role": "user", "content": "Wrong. Reflect."},
    ]
    ids = tokenizer.prompt(agent)
    assert tokenizer.render(agent) == tokens.apply_chat_template(
        agent, tokenize=False, add_generation_prompt=True
    )
    assert ids == tokens(tokenizer.render(agent), add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == tokens.decode(ids, skip_special_tokens=True)
    close(model(torch.tensor([ids])), theirs(torch.tensor([ids])).logits)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.prompt(agent) == ids and again.stop_ids == tokenizer.stop_ids == [0]


def prompts_of(tiny, task, n=5):
    _, tokenizer = tiny
    return [tokenizer.prompt(*task.messages(p)) + [3] * i for i, p in enumerate(task.load(limit=n))]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_what_the_sampler_records_the_trainer_computes(tiny, task, temperature):
    """Invariant 2, over three turns, with rows that finish at different times."""
    model, _ = tiny
    prompts, cache = prompts_of(tiny, task), None
    contexts = [prompt for prompt in prompts for _ in range(3)]
    options = dict(max_new_tokens=12, temperature=temperature, stop=range(40))
    for turn in range(3):
        drawn = generate(
            model, prompts, num_samples=1 if turn else 3, seed=turn, cache=cache, **options
        )
        cache, prompts = drawn.cache, []
        turns = [tokens for group in drawn.tokens for tokens in group]
        recorded = [logprobs for group in drawn.logprobs for logprobs in group]
        assert len(turns) == 15
        assert len({len(turn) for turn in turns}) > 3  # they do finish at different times
        for i, (sampled, logprobs) in enumerate(zip(turns, recorded, strict=True)):
            with torch.no_grad():
                logits = model(torch.tensor([contexts[i] + sampled]))[0, len(contexts[i]) - 1 : -1]
            log_p = (logits / (temperature or 1.0)).log_softmax(-1)
            want = log_p[torch.arange(len(sampled)), sampled]
            assert (want - torch.tensor(logprobs)).abs().max() < 1e-4
            if temperature == 0:
                assert sampled == logits.argmax(-1).tolist()
            assert all(token >= 40 for token in sampled[:-1])  # it stopped at the first stop token
            assert len(sampled) == 12 or sampled[-1] < 40
            bridge = [5, 6, 7, 8][: 1 + (i + turn) % 4]
            contexts[i] = contexts[i] + sampled + bridge
            prompts.append(sampled[-1:] + bridge)


def test_a_sample_does_not_depend_on_its_batch(tiny, task):
    """Alone or together, in one go or split, dropped early or late: the same tokens."""
    model, _ = tiny
    prompts = prompts_of(tiny, task, 8)
    options = dict(max_new_tokens=20, stop=range(25), seed=3)
    together = generate(model, prompts, num_samples=4, **options).tokens
    for p, prompt in enumerate(prompts):
        keys = [(p, s) for s in range(4)]
        assert (
            generate(model, [prompt], num_samples=4, rng_keys=keys, **options).tokens[0]
            == together[p]
        )
        one = generate(model, [prompt], rng_keys=keys[2:3], **options)
        assert one.tokens == [together[p][2:3]]
    assert generate(model, prompts, num_samples=2, **options).tokens == [
        group[:2] for group in together
    ]
    assert generate(model, prompts, num_samples=4, **{**options, "seed": 4}).tokens != together
    assert len({tuple(turn) for group in together for turn in group}) > 24


def test_the_next_turn_on_a_cache_is_the_conversation_read_anew(tiny, task):
    model, tokenizer = tiny
    prompts = prompts_of(tiny, task, 4)
    first = generate(model, prompts, num_samples=2, max_new_tokens=9, stop=range(30))
    bridge = tokenizer.bridge("Again.")
    turns = [turn for group in first.tokens for turn in group]
    keys = [(7, i) for i in range(8)]
    told = [tokenizer.next_turn(turn, bridge)[len(turn) - 1 :] for turn in turns]
    assert first.cache.contexts[0].shape[1] == 4  # each prompt's keys are stored once
    onward = generate(
        model, told, max_new_tokens=9, stop=range(30), rng_keys=keys, cache=first.cache
    )
    whole = [prompts[i // 2] + tokenizer.next_turn(turns[i], bridge) for i in range(8)]
    anew = generate(model, whole, max_new_tokens=9, stop=range(30), rng_keys=keys)
    assert onward.tokens == anew.tokens
    for one, other in zip(onward.logprobs, anew.logprobs, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-5)
    # The cache of the first turn is as it was: the next turn may be drawn from it twice.
    again = generate(
        model, told, max_new_tokens=9, stop=range(30), rng_keys=keys, cache=first.cache
    )
    assert again.tokens == onward.tokens


def test_finished_rows_leave_and_are_found_again(tiny, task):
    """The longer a turn, the fewer rows it has; the next one goes on from all of them."""
    model, _ = tiny
    sizes, hidden = [], Model.hidden
    prompts = prompts_of(tiny, task, 6)
    try:
        Model.hidden = lambda self, ids, *a, **k: (
            sizes.append(len(ids)) or hidden(self, ids, *a, **k)
        )
        first = generate(model, prompts, num_samples=5, max_new_tokens=40, stop=range(12))
    finally:
        Model.hidden = hidden
    assert sizes[:2] == [6, 30] and sizes[1:] == sorted(sizes[1:], reverse=True)
    assert 0 < sizes[-1] < 10
    turns = [turn for group in first.tokens for turn in group]
    options = dict(max_new_tokens=5, rng_keys=[(1, i) for i in range(30)])
    onward = generate(model, [turn[-1:] + [7] for turn in turns], cache=first.cache, **options)
    whole = [prompts[i // 5] + turn + [7] for i, turn in enumerate(turns)]
    assert onward.tokens == generate(model, whole, **options).tokens


def test_the_table_of_rows_that_go_on():
    """Contexts without an unfinished row go, and the columns that no context needs."""
    o, x = False, True
    done = torch.tensor([[o, o, x, x], [x, x, x, x], [o, x, x, o]])
    assert models.rows_to_keep(done).tolist() == [[0, 1], [8, 11]]
    done = torch.tensor([[o, o, x], [x, x, o]])  # a line may have to take a finished row along
    assert models.rows_to_keep(done).tolist() == [[0, 1], [5, 3]]
    assert models.rows_to_keep(torch.ones(2, 3, dtype=torch.bool)).numel() == 0


def test_padding_stands_on_the_left(tiny):
    """Of two prompts in one batch; and what a token sees of the padding."""
    model, read = tiny[0], []
    hidden = model.hidden
    model.hidden = lambda ids, positions, *a, **k: (
        read.append((ids.tolist(), positions.tolist())) or hidden(ids, positions, *a, **k)
    )
    drawn = generate(model, [[5, 6], [7, 8, 9]], max_new_tokens=2)
    assert read[0] == ([[0, 5, 6], [7, 8, 9]], [[0, 0, 1], [0, 1, 2]])
    assert read[1] == ([turn[:1] for [turn] in drawn.tokens], [[2], [3]])
    mask = torch.tensor([[False, True, True], [True, True, True]])
    assert drawn.cache.attention_mask[:, :3].tolist() == mask.tolist()
    positions, seen = models.causal_mask(mask, 2)
    assert positions.tolist() == [[0, 1], [1, 2]]
    assert seen.int().tolist() == [[[0, 1, 0], [0, 1, 1]], [[1, 1, 0], [1, 1, 1]]]
    positions, seen = models.causal_mask(mask, 3)
    assert positions.tolist() == [[0, 0, 1], [0, 1, 2]]
    assert seen[0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]  # padding sees itself


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_draws_follow_the_textbook_distribution(temperature):
    logits = torch.tensor([2.0, 0.5, 1.5, -1.0, 0.0, 1.9, -3.0])
    p = (logits / temperature).softmax(-1).double().numpy()
    n = 200_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(n, dtype=np.float32))
    tokens, logprobs = sample_tokens(logits.expand(n, -1), uniform, temperature)
    count = np.bincount(tokens.numpy(), minlength=7)
    spread = np.sqrt(p * (1 - p) / n)
    assert (np.abs(count / n - p) <= 4.5 * spread).all()
    full = (logits / temperature).log_softmax(-1)
    assert torch.allclose(logprobs, full[tokens])


def test_the_inverse_cdf_stays_in_the_vocabulary():
    uniform = torch.tensor([0.0, 1 - 2**-24])
    tokens, _ = sample_tokens(torch.tensor([[-60.0, 0.0, 1.0, -60.0]] * 2), uniform, 1.0)
    assert tokens.tolist() == [1, 2] or tokens.tolist() == [0, 2]
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one prompt"):
            generate(None, prompts)


def test_a_conversation_that_outgrows_the_context_is_refused(tiny):
    model, _ = tiny
    refused = pytest.raises(ValueError, match="513 tokens do not fit the model's context of 512")
    with refused:
        generate(model, [[1], [1] * 500], max_new_tokens=13)
    with refused, torch.no_grad():
        model(torch.ones(1, 513, dtype=torch.long))
    first = generate(model, [[1], [1] * 500], max_new_tokens=4)  # 503 tokens are in the cache
    generate(model, [[1], [1] * 4], max_new_tokens=5, cache=first.cache)
    with refused:
        generate(model, [[1], [1] * 4], max_new_tokens=6, cache=first.cache)


def test_a_cut_turn_gets_its_end_and_an_ended_one_keeps_it(tiny):
    _, tokenizer = tiny
    bridge = tokenizer.bridge("Again.")
    words = tokenizer.encode
    assert bridge == words("<|end|> <|user|> Again. <|end|> <|assistant|>")
    assert tokenizer.next_turn(words("1 2"), bridge) == words("1 2") + bridge
    assert tokenizer.next_turn(words("1 2 <|end|>"), bridge) == words("1 2") + bridge


def refused(load, path, *words, error=ValueError):
    """Loading raises this error, in one line that has the folder or file and these words."""
    with pytest.raises(error) as raised:
        load(path)
    said = str(raised.value)
    assert str(path) in said and "\n" not in said and len(said) < 700, said
    assert all(word in said for word in words), said


def test_bad_weights_are_refused_by_name(tmp_path, tiny):
    model, _ = tiny
    refused(Model.from_pretrained, tmp_path, "config.json", error=FileNotFoundError)
    model.save_pretrained(tmp_path)
    tensors = {name: p.detach().clone() for name, p in dict(model.named_parameters()).items()}
    (tmp_path / "model.safetensors").unlink()
    words = ("model.safetensors", "does not exist")
    refused(Model.from_pretrained, tmp_path, *words, error=FileNotFoundError)

    def with_tensors(changed):
        path = tmp_path / "model.safetensors"
        path.write_bytes(models.safetensors.torch.save(changed))
        return tmp_path

    norm, embedding = "model.norm.weight", "model.embed_tokens.weight"
    for name in (norm, embedding):
        without = with_tensors({k: v for k, v in tensors.items() if k != name})
        refused(Model.from_pretrained, without, name)
    strange = with_tensors({**tensors, "stranger": torch.zeros(1)})
    refused(Model.from_pretrained, strange, "Unexpected", '"stranger"')
    misshapen = with_tensors({**tensors, norm: torch.zeros(3)})
    refused(Model.from_pretrained, misshapen, f"size mismatch for {norm}", "[3]", "[96]")
    Model.from_pretrained(with_tensors(tensors))
    (tmp_path / "model.safetensors").write_bytes(b"\x05" * 100)
    refused(Model.from_pretrained, tmp_path, "model.safetensors is damaged")


def test_what_is_not_computed_here_is_refused_by_name(tmp_path, tiny):
    model, _ = tiny
    model.save_pretrained(tmp_path)
    for change, words in (
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama, qwen2, qw"),
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported"),
        ({"model_type": None}, "model_type 'none' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
        ({"partial_rotary_factor": 0.75}, "partial_rotary_factor 0.75 is not supported"),
        ({"quantization_config": {}}, "quantization_config {} is not supported; supported: none"),
        ({"use_sliding_window": True}, "use_sliding_window True is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope' is not supported; supported:"
         " default, llama3"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps({**model.config_dict, **change}))
        with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
            Model.from_pretrained(tmp_path)
    for same in ({"use_sliding_window": False}, {"rope_scaling": None}, {"hidden_act": None}):
        (tmp_path / "config.json").write_text(json.dumps({**model.config_dict, **same}))
        Model.from_pretrained(tmp_path)


NEEDED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_incomplete_config_is_refused_by_name(tmp_path, tiny, device):
    model, _ = tiny
    model.save_pretrained(tmp_path)

    def load(path):
        return Model.from_pretrained(path, device=device)

    for missing in NEEDED:
        config = {name: x for name, x in model.config_dict.items() if name != missing}
        (tmp_path / "config.json").write_text(json.dumps(config))
        refused(load, tmp_path, "config.json is incomplete", missing)
    llama3 = {**model.config_dict, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    for change, words in (
        ("[1]", "config.json holds no JSON object"),
        ("{", "config.json is not JSON"),
        ('{"model_type": "llama"}', "config.json is incomplete"),
        (json.dumps({**model.config_dict, "hidden_size": "96"}), "config.json is incomplete"),
        (json.dumps(llama3), "config.json is incomplete"),
    ):
        (tmp_path / "config.json").write_text(change)
        refused(load, tmp_path, words)


def test_a_bad_tokenizer_is_refused_by_name(tmp_path, tiny):
    model, tokenizer = tiny
    load = Tokenizer.from_pretrained
    refused(load, tmp_path, "tokenizer_config.json", error=FileNotFoundError)
    tokenizer.save_pretrained(tmp_path)
    for name, words in (
        ("tokenizer.json", "tokenizer.json is absent or damaged"),
        ("tokenizer_config.json", "tokenizer_config.json holds no JSON object"),
        ("generation_config.json", "generation_config.json holds no JSON object"),
    ):
        whole = (tmp_path / name).read_text()
        (tmp_path / name).write_text("[]")
        refused(load, tmp_path, words)
        (tmp_path / name).write_text(whole)
    (tmp_path / "tokenizer.json").unlink()
    refused(load, tmp_path, "tokenizer.json is absent or damaged")

    def with_template(template):
        return Tokenizer(tokenizer.tokenizer, {**tokenizer.settings, "chat_template": template}, {})

    several = [{"name": "default", "template": "a"}]
    for wrong in (None, ["a"], several, 5, {"default": "a"}):
        with pytest.raises(ValueError, match="no chat template: R3 needs an instruct model"):
            with_template(wrong)
    with pytest.raises(ValueError, match="the chat template is no jinja2 template"):
        with_template("{% if %}")
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(tokenizer.tokenizer, {}, {})


def test_templates_run_in_a_sandbox(tiny):
    _, tokenizer = tiny
    for template in (
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
    ):
        evil = Tokenizer(tokenizer.tokenizer, {**tokenizer.settings, "chat_template": template}, {})
        with pytest.raises(ValueError, match="chat template"):
            evil.render([{"role": "user", "content": "1"}])


def test_a_folder_is_made_and_a_file_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "file.json"
    models.replace_file(path, "one")
    models.replace_file(path, "zwei ü")
    assert path.read_text(encoding="utf-8") == "zwei ü" and len(list(path.parent.iterdir())) == 1
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken could not be written"):
        models.replace_file(tmp_path / "taken", "three")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "taken"]
