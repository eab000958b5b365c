"""Invariants 1, 2, and 7: logits equal those of transformers, and a token has one probability."""

import doctest
import json
import re

import numpy as np
import pytest
import torch
import transformers

import model as models
from model import KVCache, Layout, Model, Tokenizer, generate, sample_tokens

SHAPES = {
    "tied head, grouped queries": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "as many key heads as query heads": dict(num_key_value_heads=4, tie_word_embeddings=False),
    "other head_dim and rope_theta": dict(num_key_value_heads=1, head_dim=12, rope_theta=500.0),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def reference(tmp_path, shape, seed=0):
    """A random Llama of transformers, saved, and ours, loaded from the same folder."""
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=128, rms_norm_eps=1e-5, **shape,
    )  # fmt: skip
    torch.manual_seed(seed)
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # large enough that every part makes a difference
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    return theirs, Model.from_pretrained(tmp_path)


def assert_close(ours, theirs, tolerance=1e-4):
    """Equal up to `tolerance` times the largest expected value."""
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < tolerance


def padded_hidden(model, ids, visible, cache=None):
    """Hidden states of rows with padding, which is where `visible` is False: (B, T, E)."""
    T, dtype = ids.shape[1], model.lm_head.weight.dtype
    cache = cache or KVCache([], [], visible)
    mask = models.attention_mask(visible, T, dtype)
    layout = Layout(models.token_positions(visible, T), cache=cache, mask=mask)
    return model.hidden(ids, layout=layout)


def logits_in_pieces(model, ids, ends, visible=None, num_samples=1):
    """Logits of rows (R, T) that are read in several pieces, which end before the columns `ends`.

    The first piece is the context, which `num_samples` rows share. The others go through the cache.
    """
    if visible is None:
        visible = torch.ones_like(ids, dtype=torch.bool)
    context_ids = ids[::num_samples, : ends[0]]
    cache = KVCache([], [], visible[:, : ends[0]])
    hidden = padded_hidden(model, context_ids, visible[::num_samples, : ends[0]], cache)
    cache.allocate_suffixes(ids.shape[1] - ends[0])
    pieces = [hidden.repeat_interleave(num_samples, dim=0)]
    for start, end in zip(ends, ends[1:], strict=False):
        layout = cache.extend(visible[:, start:end])
        pieces.append(model.hidden(ids[:, start:end], layout=layout))
    return model.head(torch.cat(pieces, dim=1))


@every_shape
@torch.no_grad()
def test_logits_equal_transformers(tmp_path, shape):
    theirs, ours = reference(tmp_path, shape)
    ids = torch.randint(0, 61, (3, 20))
    expected = theirs(ids).logits
    assert_close(ours(ids), expected)
    for side in ("left", "right"):
        visible = torch.ones(3, 20, dtype=torch.bool)
        for row, padding in enumerate((0, 4, 9)):
            visible[row, slice(padding) if side == "left" else slice(20 - padding, 20)] = False
        positions = models.token_positions(visible, 20)
        padded = theirs(ids, attention_mask=visible.long(), position_ids=positions).logits
        assert_close(ours.head(padded_hidden(ours, ids, visible))[visible], padded[visible])
    assert_close(logits_in_pieces(ours, ids, range(7, 21)), expected)  # token by token
    assert_close(logits_in_pieces(ours, ids, (7, 11, 12, 20)), expected)


@every_shape
@torch.no_grad()
def test_padding_in_the_cache_changes_nothing(tmp_path, shape):
    """Contexts are shared by rows, and padding is anywhere in contexts and suffixes."""
    _, ours = reference(tmp_path, shape)
    ids = torch.randint(0, 61, (4, 14))
    visible = torch.ones(4, 14, dtype=torch.bool)
    ids[1, :5], ids[3, :5] = ids[0, :5], ids[2, :5]
    for row, columns in ((2, [0, 1]), (3, [0, 1]), (0, [5]), (1, [6, 7, 8]), (3, [*range(7, 13)])):
        visible[row, columns] = False
    visible[2, 13] = False
    logits = logits_in_pieces(ours, ids, (5, 6, 9, 13, 14), visible, num_samples=2)
    for row in range(4):
        assert_close(logits[row][visible[row]], ours(ids[row][visible[row]][None])[0])


# -- Fast paths and the formulas -------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernels_compute_the_formulas(monkeypatch, dtype):
    """RMSNorm and attention, causal, of the last tokens only, and with a mask."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 8, generator=rng).to(dtype) for _ in range(3))
    visible = torch.arange(9) >= torch.tensor([[0], [4]])
    mask = models.attention_mask(visible, 9, dtype)
    norm = models.RMSNorm(8, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight += torch.randn(8, generator=rng).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    results = []
    for fused in (True, False):
        monkeypatch.setattr(models, "FUSED_KERNELS", fused)
        outputs = [norm(q), models.attention(q, k, v), models.attention(q[:, :, 6:], k, v)]
        results.append([*outputs, models.attention(q, k, v, mask)])
    for fused, formula in zip(*results, strict=True):
        assert fused.dtype == formula.dtype == dtype
        assert_close(fused.float(), formula.float(), tolerance)
    _, causal, last, masked = results[1]
    assert_close(last.float(), causal[:, :, 6:].float(), tolerance)
    assert_close(masked[0].float(), causal[0].float(), tolerance)  # the first row has no padding


@every_shape
def test_the_model_computes_the_formulas(tmp_path, monkeypatch, shape):
    """Logits and gradients of a whole model, with and without fused kernels."""
    _, ours = reference(tmp_path, shape)
    ids = torch.randint(0, 61, (1, 20))
    results = []
    for fused in (True, False):
        monkeypatch.setattr(models, "FUSED_KERNELS", fused)
        ours.zero_grad(set_to_none=True)
        logits = ours.head(ours.hidden(ids, lengths=[9, 4, 7]))
        logits.square().mean().backward()
        results.append((logits, torch.cat([p.grad.flatten() for p in ours.parameters()])))
    for fused, formula in zip(*results, strict=True):
        assert_close(fused, formula)


@pytest.mark.parametrize(
    "P, S, H, K, T, C, L",
    [(1, 1, 4, 2, 1, 5, 1), (3, 2, 4, 2, 1, 7, 4), (2, 3, 6, 2, 5, 1, 5), (2, 4, 3, 3, 2, 9, 6)],
)
def test_attention_to_a_shared_context_is_attention(P, S, H, K, T, C, L):
    """Each row attends to its prompt's context and its own suffix as if both were its own."""
    rng = torch.Generator().manual_seed(0)
    R, D = P * S, 8
    q = torch.randn(R, H, T, D, generator=rng)
    context = torch.randn(2, P, K, C, D, generator=rng)
    suffix = torch.randn(2, R, K, L, D, generator=rng)
    visible = torch.rand(R, C + L, generator=rng) < 0.7
    mask = models.attention_mask(visible, T, torch.float32)
    output = models.shared_context_attention(q, context, suffix, mask)
    for row in range(R):
        own = torch.cat([context[:, row // S], suffix[:, row]], dim=2)  # (2, K, C + L, D)
        keys, values = models.repeat_heads(own, H)[:, None]
        expected = models.attention(q[row : row + 1], keys, values, mask[row : row + 1])
        assert_close(output[row], expected[0], 1e-5)


def test_large_scores_do_not_overflow_in_float16():
    """Queries are scaled before the product: unscaled, these equal scores would exceed 65,504."""
    q, keys = torch.full((1, 1, 1, 64), 64.0), torch.full((1, 1, 9, 64), 20.0)
    assert (q @ keys.mT).min() > 65_504
    values = torch.randn(2, 1, 1, 9, 64)
    context, suffix = (torch.stack([keys, v]) for v in values)
    arguments = q, context, suffix, torch.zeros(1, 1, 1, 18)
    output = models.shared_context_attention(*(x.half() for x in arguments))
    assert_close(output[0, 0].float(), values.mean(dim=(0, 3))[0], 1e-2)


@every_shape
@torch.no_grad()
def test_transformers_loads_what_we_save(tmp_path, shape):
    theirs, ours = reference(tmp_path / "a", shape)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.1)
    ours.save_pretrained(tmp_path / "b")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    ids = torch.randint(0, 61, (2, 9))
    assert_close(ours(ids), again(ids).logits)
    assert not torch.allclose(ours(ids), theirs(ids).logits, rtol=1e-2)


@torch.no_grad()
def test_transformers_loads_the_tiny_model(tiny, tmp_path):
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
    assert_close(model(torch.tensor([ids])), theirs(torch.tensor([ids])).logits)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.prompt(agent) == ids and again.stop_ids == tokenizer.stop_ids == [0]


# -- The sampler -----------------------------------------------------------------------------------
STOPS = set(range(1, 72, 4))  # so many that most turns of an untrained model end early


def plain_generate(model, prompt, rng_key, max_new_tokens, temperature=1.0, stop=(), seed=0):
    """The sampler without cache and batch, which reads the whole text again for every token."""
    ids = list(prompt)
    for u in np.random.default_rng([seed, *rng_key]).random(max_new_tokens, np.float32):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]  # (V,)
        cumulative = (logits / (temperature or 1.0)).softmax(dim=-1).cumsum(dim=-1)
        token = (cumulative <= u * cumulative[-1]).sum() if temperature else logits.argmax()
        ids.append(int(token))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


def tiny_prompts(tiny, task, n=5):
    """The prompts of n problems, with some more tokens, so that all lengths differ."""
    _, tokenizer = tiny
    return [tokenizer.prompt(*task.messages(p)) + [3] * i for i, p in enumerate(task.load(limit=n))]


def flat(nested):
    """By prompt and sample -> by row."""
    return [turn for samples in nested for turn in samples]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_the_sampler_equals_the_plain_one(tiny, task, temperature):
    """In two turns, the second of them with the cache; rows finish at different times."""
    model, _ = tiny
    prompts, options = tiny_prompts(tiny, task), dict(temperature=temperature, stop=STOPS)
    first = generate(model, prompts, 3, max_new_tokens=12, seed=2, **options)
    keys = [(p, s) for p in range(5) for s in range(3)]
    turns, conversations = flat(first.tokens), []
    for row, (p, s) in enumerate(keys):
        expected = plain_generate(model, prompts[p], (p, s), 12, seed=2, **options)
        assert turns[row] == expected
        conversations.append(prompts[p] + turns[row] + [7, 8, 9][: 1 + row % 3])
    assert len(set(map(len, turns))) > 3  # they finish at different times
    new = [
        ids[len(prompts[p]) + len(turn) - 1 :]
        for ids, turn, (p, _) in zip(conversations, turns, keys, strict=True)
    ]
    second = generate(
        model, new, max_new_tokens=9, rng_keys=keys, seed=3, cache=first.cache, **options
    )
    for ids, [turn], key in zip(conversations, second.tokens, keys, strict=True):
        assert turn == plain_generate(model, ids, key, 9, seed=3, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_the_trainer_computes_what_the_sampler_records(tiny, task, temperature):
    """Invariant 2, over three turns, with rows that finish at different times."""
    model, _ = tiny
    prompts, cache = tiny_prompts(tiny, task), None
    conversations = [prompt for prompt in prompts for _ in range(3)]
    options = dict(max_new_tokens=12, temperature=temperature, stop=STOPS)
    for turn in range(3):
        num_samples = 1 if turn else 3
        generation = generate(model, prompts, num_samples, seed=turn, cache=cache, **options)
        cache, prompts = generation.cache, []
        turns, recorded = flat(generation.tokens), flat(generation.logprobs)
        assert len(turns) == 15
        assert len(set(map(len, turns))) > 2  # they do finish at different times
        for row, (tokens, logprobs) in enumerate(zip(turns, recorded, strict=True)):
            ids = conversations[row]
            with torch.no_grad():
                logits = model(torch.tensor([ids + tokens]))[0, len(ids) - 1 : -1]
            log_p = (logits / (temperature or 1.0)).log_softmax(-1)
            expected = log_p[torch.arange(len(tokens)), tokens]
            assert (expected - torch.tensor(logprobs)).abs().max() < 1e-5 * log_p.abs().max()
            if temperature == 0:
                assert tokens == logits.argmax(-1).tolist()
            assert STOPS.isdisjoint(tokens[:-1])  # it stopped at the first stop token
            assert len(tokens) == 12 or tokens[-1] in STOPS
            bridge = [5, 6, 7, 8][: 1 + (row + turn) % 4]
            conversations[row] = ids + tokens + bridge
            prompts.append(tokens[-1:] + bridge)


def test_a_sample_does_not_depend_on_its_batch(tiny, task):
    """Alone or in a batch, with few samples or many: the same tokens for the same key."""
    model, _ = tiny
    prompts = tiny_prompts(tiny, task, 8)
    options = dict(max_new_tokens=20, stop=range(14), seed=3)
    together = generate(model, prompts, num_samples=4, **options).tokens
    for p, prompt in enumerate(prompts):
        keys = [(p, s) for s in range(4)]
        alone = generate(model, [prompt], num_samples=4, rng_keys=keys, **options)
        assert alone.tokens == [together[p]]
        one = generate(model, [prompt], rng_keys=keys[2:3], **options)
        assert one.tokens == [together[p][2:3]]
    two = generate(model, prompts, num_samples=2, **options).tokens
    assert two == [samples[:2] for samples in together]
    assert generate(model, prompts, num_samples=4, **{**options, "seed": 4}).tokens != together
    assert len(set(map(tuple, flat(together)))) > 24


def test_the_append_bridge_on_a_cache_equals_reading_the_conversation_again(tiny, task):
    model, tokenizer = tiny
    prompts = tiny_prompts(tiny, task, 4)
    first = generate(model, prompts, num_samples=2, max_new_tokens=9, stop=range(16))
    bridge = tokenizer.bridge("Again.")
    turns = flat(first.tokens)
    continued = [tokenizer.append_bridge(turn, bridge) for turn in turns]
    new = [ids[len(turn) - 1 :] for ids, turn in zip(continued, turns, strict=True)]
    assert first.cache.num_contexts == 4  # the keys of each prompt are stored once
    options = dict(max_new_tokens=9, stop=range(16), rng_keys=[(7, i) for i in range(8)])
    cached = generate(model, new, cache=first.cache, **options)
    whole = generate(model, [prompts[i // 2] + continued[i] for i in range(8)], **options)
    assert cached.tokens == whole.tokens
    for [logprobs], [expected] in zip(cached.logprobs, whole.logprobs, strict=True):
        assert_close(torch.tensor(logprobs), torch.tensor(expected))
    # The cache of the first turn is unchanged: another second turn can be sampled from it.
    assert generate(model, new, cache=first.cache, **options).tokens == cached.tokens


@pytest.mark.parametrize("max_scores", [1, 4_000, 10**9])
def test_a_long_turn_is_read_in_pieces(tiny, task, monkeypatch, max_scores):
    """Token by token, in a few pieces, or at once: the same samples."""
    model, _ = tiny
    prompts = tiny_prompts(tiny, task, 3)
    first = generate(model, prompts, num_samples=2, max_new_tokens=6)
    new = [
        turn[-1:] + [5, 6, 7, 8, 9, 10, 11][: 2 + i] for i, turn in enumerate(flat(first.tokens))
    ]
    expected = [
        plain_generate(model, prompts[i // 2] + flat(first.tokens)[i] + new[i][1:], (9, i), 8)
        for i in range(6)
    ]
    sizes = []
    model.hidden = lambda ids, **k: sizes.append(ids.shape[1]) or Model.hidden(model, ids, **k)
    monkeypatch.setattr(models, "MAX_ATTENTION_SCORES", max_scores)
    keys = [(9, i) for i in range(6)]
    second = generate(model, new, max_new_tokens=8, rng_keys=keys, cache=first.cache)
    assert flat(second.tokens) == expected
    pieces = sizes[: len(sizes) - 7]  # the others are tokens that were sampled
    assert sum(pieces) == 8 and len(pieces) == {1: 8, 4_000: 2, 10**9: 1}[max_scores]


def test_prompts_of_one_length_are_read_without_a_mask(tiny):
    model, masks = tiny[0], []
    model.hidden = lambda ids, layout, **options: (
        masks.append(layout.mask) or Model.hidden(model, ids, layout=layout, **options)
    )
    generate(model, [[5, 6], [7, 8]], max_new_tokens=1)
    generate(model, [[5, 6], [7, 8, 9]], max_new_tokens=1)
    assert masks[0] is None and masks[1].shape == (2, 1, 3, 3)


def test_finished_rows_are_dropped_and_continue_in_the_append_bridge(tiny, task):
    """The batch shrinks during a turn, and the next turn continues all rows."""
    model, _ = tiny
    sizes = []
    prompts = tiny_prompts(tiny, task, 6)
    model.hidden = lambda ids, **k: sizes.append(len(ids)) or Model.hidden(model, ids, **k)
    first = generate(model, prompts, num_samples=5, max_new_tokens=40, stop=range(7))
    assert sizes[:2] == [6, 30] and sizes[1:] == sorted(sizes[1:], reverse=True)
    assert 0 < sizes[-1] < 10
    turns = flat(first.tokens)
    options = dict(max_new_tokens=5, rng_keys=[(1, i) for i in range(30)])
    second = generate(model, [turn[-1:] + [7] for turn in turns], cache=first.cache, **options)
    whole = [prompts[i // 5] + turn + [7] for i, turn in enumerate(turns)]
    assert second.tokens == generate(model, whole, **options).tokens


def test_rows_to_keep():
    """Prompts without an unfinished row are dropped, and columns that no prompt needs."""
    o, x = False, True
    finished = torch.tensor([[o, o, x, x], [x, x, x, x], [o, x, x, o]])
    assert models.rows_to_keep(finished).tolist() == [[0, 1], [8, 11]]
    finished = torch.tensor([[o, o, x], [x, x, o]])  # prompt 1 has to keep a finished row
    assert models.rows_to_keep(finished).tolist() == [[0, 1], [5, 3]]
    assert models.rows_to_keep(torch.ones(2, 3, dtype=torch.bool)).shape == (0, 0)


def test_select_rows_and_copy_back():
    """The example of the docstring. What the selected rows read is copied back to their rows."""
    rng = torch.Generator().manual_seed(0)
    contexts, suffixes = [torch.randn(2, 3, 1, 4, 2)], [torch.randn(2, 6, 1, 5, 2, generator=rng)]
    cache = KVCache(contexts, suffixes, torch.ones(6, 4 + 2, dtype=torch.bool))
    assert cache.num_contexts == 3 and cache.suffix_length == 2
    selected = cache.select_rows(torch.tensor([[1], [4]]), extra_columns=3)
    assert torch.equal(selected.contexts[0], contexts[0][:, [0, 2]])
    assert selected.suffixes[0].shape == (2, 2, 1, 5, 2)
    assert torch.equal(selected.suffixes[0][:, :, :, :2], suffixes[0][:, [1, 4], :, :2])
    before = suffixes[0].clone()
    selected.extend(torch.ones(2, 1, dtype=torch.bool))
    selected.suffixes[0][:, :, :, 2] = 7.0
    cache.copy_back(selected, torch.tensor([1, 4]))
    before[:, [1, 4], :, 2] = 7.0
    assert torch.equal(cache.suffixes[0], before)


def test_padding_is_on_the_left(tiny):
    """The positions of two prompts in a batch, and which columns their tokens see."""
    model, calls = tiny[0], []

    def recorded(ids, layout, **options):
        calls.append((ids.tolist(), layout.positions.tolist()))
        return Model.hidden(model, ids, layout=layout, **options)

    model.hidden = recorded
    generation = generate(model, [[5, 6], [7, 8, 9]], max_new_tokens=2)
    assert calls[0] == ([[0, 5, 6], [7, 8, 9]], [[0, 0, 1], [0, 1, 2]])
    assert calls[1] == ([turn[:1] for [turn] in generation.tokens], [[2], [3]])
    visible = torch.tensor([[False, True, True], [True, True, True]])
    assert generation.cache.visible[:, :3].tolist() == visible.tolist()
    assert models.token_positions(visible, 2).tolist() == [[0, 1], [1, 2]]
    assert models.token_positions(visible, 3).tolist() == [[0, 0, 1], [0, 1, 2]]
    seen = (models.attention_mask(visible, 2, torch.float32)[:, 0] == 0).int()
    assert seen.tolist() == [[[0, 1, 0], [0, 1, 1]], [[1, 1, 0], [1, 1, 1]]]
    seen = (models.attention_mask(visible, 3, torch.float32)[0, 0] == 0).int()
    assert seen.tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]  # padding sees itself


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(prompts=[]), "at least one prompt"),
        (dict(prompts=[[1], []]), "at least one token"),
        (dict(max_new_tokens=0), "must be at least 1"),
        (dict(num_samples=0), "must be at least 1"),
        (dict(temperature=-0.1), "temperature must be at least 0"),
        (dict(temperature=float("nan")), "temperature must be at least 0"),
        (dict(rng_keys=[(1, 2), (1, 2)]), "rng_keys must differ"),
        (dict(rng_keys=[(1, 2)]), "one per row"),
        (dict(prompts=[[1]], rng_keys=[(0,)]), "2 cached rows"),
        (dict(num_samples=2, rng_keys=None), "num_samples must be 1"),
    ],
)
def test_bad_arguments_of_generate_are_refused(tiny, changes, message):
    model, _ = tiny
    cache = generate(model, [[1], [2, 3]], max_new_tokens=2).cache
    arguments = dict(prompts=[[1], [2, 3]], max_new_tokens=2, cache=cache)
    generate(model, **arguments)
    with pytest.raises(ValueError, match=message):
        generate(model, **{**arguments, **changes})


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_samples_follow_the_distribution(temperature):
    logits = torch.tensor([2.0, 0.5, 1.5, -1.0, 0.0, 1.9, -3.0])
    p = (logits / temperature).softmax(-1).double().numpy()
    n = 200_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(n, dtype=np.float32))
    tokens, logprobs = sample_tokens(logits.expand(n, -1), uniform, temperature)
    count = np.bincount(tokens.numpy(), minlength=7)
    spread = np.sqrt(p * (1 - p) / n)
    assert (np.abs(count / n - p) <= 4.5 * spread).all()
    full = (logits / temperature).log_softmax(-1)
    assert_close(logprobs, full[tokens], 1e-5)


def test_sampled_tokens_have_a_probability():
    uniform = torch.tensor([0.0, 1 - 2**-24])
    tokens, _ = sample_tokens(torch.tensor([[-200.0, 0.0, 1.0, -200.0]] * 2), uniform, 1.0)
    assert tokens.tolist() == [1, 2]


def test_a_conversation_beyond_the_context_length_is_refused(tiny):
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


def test_lengths_that_do_not_add_up_are_refused(tiny):
    with pytest.raises(ValueError, match="do not add up to 7 tokens"):
        tiny[0].hidden(torch.ones(1, 7, dtype=torch.long), lengths=[3, 3])


def test_append_bridge_adds_a_stop_token_to_a_truncated_turn_only(tiny):
    _, tokenizer = tiny
    bridge = tokenizer.bridge("Again.")
    words = tokenizer.encode
    assert bridge == words("<|end|> <|user|> Again. <|end|> <|assistant|>")
    assert tokenizer.append_bridge(words("1 2"), bridge) == words("1 2") + bridge
    assert tokenizer.append_bridge(words("1 2 <|end|>"), bridge) == words("1 2") + bridge


def refused(load, path, *words, error=ValueError):
    """Loading raises this error, in one line that contains the path and these words."""
    with pytest.raises(error) as raised:
        load(path)
    message = str(raised.value)
    assert str(path) in message and "\n" not in message and len(message) < 700, message
    assert all(word in message for word in words), message


def test_bad_weights_are_refused(tmp_path, tiny):
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


def test_unsupported_configurations_are_refused(tmp_path, tiny):
    model, _ = tiny
    model.save_pretrained(tmp_path)
    for change, words in (
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama, mistral"),
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported"),
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
def test_incomplete_configurations_are_refused(tmp_path, tiny, device):
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
        ("[1]", "config.json does not contain a JSON object"),
        ("{", "config.json is not valid JSON"),
        ('{"model_type": "llama"}', "config.json is incomplete"),
        (json.dumps({**model.config_dict, "hidden_size": "96"}), "config.json is incomplete"),
        (json.dumps(llama3), "config.json is incomplete"),
    ):
        (tmp_path / "config.json").write_text(change)
        refused(load, tmp_path, words)


def test_bad_tokenizers_are_refused(tmp_path, tiny):
    model, tokenizer = tiny
    load = Tokenizer.from_pretrained
    refused(load, tmp_path, "tokenizer_config.json", error=FileNotFoundError)
    tokenizer.save_pretrained(tmp_path)
    for name, words in (
        ("tokenizer.json", "tokenizer.json is missing or damaged"),
        ("tokenizer_config.json", "tokenizer_config.json does not contain a JSON object"),
        ("generation_config.json", "generation_config.json does not contain a JSON object"),
    ):
        whole = (tmp_path / name).read_text()
        (tmp_path / name).write_text("[]")
        refused(load, tmp_path, words)
        (tmp_path / name).write_text(whole)
    (tmp_path / "tokenizer.json").unlink()
    refused(load, tmp_path, "tokenizer.json is missing or damaged")

    def with_template(template):
        return Tokenizer(tokenizer.tokenizer, {**tokenizer.settings, "chat_template": template}, {})

    several = [{"name": "default", "template": "a"}]
    assert with_template(several).render([]) == "a"
    for wrong in (None, ["a"], 5, {"default": "a"}, [{"name": "rag", "template": "a"}]):
        with pytest.raises(ValueError, match="use an instruct model"):
            with_template(wrong)
    with pytest.raises(ValueError, match="the chat template is not a valid jinja2 template"):
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


def test_replace_file(tmp_path):
    path = tmp_path / "a" / "b" / "file.json"
    models.replace_file(path, "one")
    models.replace_file(path, "zwei ü")
    assert path.read_text(encoding="utf-8") == "zwei ü" and len(list(path.parent.iterdir())) == 1
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken could not be written"):
        models.replace_file(tmp_path / "taken", "three")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "taken"]


def test_the_examples_in_docstrings():
    results = doctest.testmod(models)
    assert results.attempted >= 2 and results.failed == 0
