"""Invariants 1, 2 and 7: logits are transformers', a token's probability is one number."""

import json

import numpy as np
import pytest
import torch
import transformers

import model as models
from model import Model, Tokenizer, draw, generate

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


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_logits_equal_transformers(tmp_path, shape):
    theirs, ours = reference(tmp_path, shape)
    ids = torch.randint(0, 61, (3, 20))
    want = theirs(ids).logits
    close(ours(ids), want)
    for side in ("left", "right"):  # padding, on either side
        live = torch.ones(3, 20, dtype=torch.bool)
        for row, pads in enumerate((0, 4, 9)):
            live[row, slice(pads) if side == "left" else slice(20 - pads, 20)] = False
        positions = (live.cumsum(1) - 1).clamp(min=0)
        padded = theirs(ids, attention_mask=live.long(), position_ids=positions).logits
        close(ours(ids, live=live)[live], padded[live])
    hidden, cache = ours.read(ids[:, :7], room=13)  # a block, then token by token
    steps = [hidden] + [ours.hidden(ids[:, t : t + 1], cache) for t in range(7, 20)]
    close(ours.head(torch.cat(steps, dim=1)), want)


@torch.no_grad()
def test_a_cache_with_holes_is_as_if_there_were_none(tmp_path):
    _, ours = reference(tmp_path, SHAPES["tied, grouped"])
    ids = torch.randint(0, 61, (2, 12))
    live = torch.ones(2, 12, dtype=torch.bool)
    live[0, 3:6] = live[1, 0] = live[1, 8] = False
    hidden, cache = ours.read(ids[:, :5], live[:, :5], room=7)
    parts = [ours.hidden(ids[:, a:b], cache, live[:, a:b]) for a, b in ((5, 6), (6, 12))]
    got = torch.cat([hidden, *parts], dim=1)
    for row in range(2):
        alone = ours(ids[row][live[row]][None])[0]
        close(ours.head(got)[row][live[row]], alone)


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
    chat = [
        {"role": "user", "content": "Make 32 from 6 10 2 ."},
        {"role": "assistant", "content": "Start with 10 / 2 = 5 ."},
        {"role": "user", "content": "Wrong. Reflect."},
    ]
    ids = tokenizer.prompt(chat)
    assert tokenizer.render(chat) == tokens.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert ids == tokens(tokenizer.render(chat), add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == tokens.decode(ids, skip_special_tokens=True)
    close(model(torch.tensor([ids])), theirs(torch.tensor([ids])).logits)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.prompt(chat) == ids and again.stop_ids == tokenizer.stop_ids == [0]


def prompts_of(tiny, task, n=5):
    _, tokenizer = tiny
    return [tokenizer.prompt(*task.messages(p)) + [3] * i for i, p in enumerate(task.load(limit=n))]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_what_the_sampler_records_the_trainer_computes(tiny, task, temperature):
    """Invariant 2, over two turns, with rows that finish at different times."""
    model, tokenizer = tiny
    prompts = prompts_of(tiny, task)
    options = dict(max_new_tokens=12, temperature=temperature, stop=range(40))
    first = generate(model, prompts, samples=3, **options)
    turns = [turn for group in first.tokens for turn in group]
    assert len({len(turn) for turn in turns}) > 3  # they do finish at different times
    bridges = [[5, 6, 7, 8][: 1 + i % 4] for i in range(15)]
    told = [turn[-1:] + bridge for turn, bridge in zip(turns, bridges, strict=True)]
    second = generate(model, told, cache=first.cache, seed=1, **options)
    for i in range(15):
        prompt, reply = prompts[i // 3] + turns[i] + bridges[i], second.tokens[i][0]
        for context, sampled, recorded in (
            (prompts[i // 3], turns[i], first.logprobs[i // 3][i % 3]),
            (prompt, reply, second.logprobs[i][0]),
        ):
            with torch.no_grad():
                logits = model(torch.tensor([context + sampled]))[0, len(context) - 1 : -1]
            log_p = (logits / (temperature or 1.0)).log_softmax(-1)
            want = log_p[torch.arange(len(sampled)), sampled]
            assert (want - torch.tensor(recorded)).abs().max() < 1e-4
            if temperature == 0:
                assert sampled == logits.argmax(-1).tolist()
            assert all(token >= 40 for token in sampled[:-1])  # it stopped at the first stop token
            assert len(sampled) == 12 or sampled[-1] < 40


def test_a_sample_does_not_depend_on_its_batch(tiny, task):
    """Alone or together, in one go or split, dropped early or late: the same tokens."""
    model, _ = tiny
    prompts = prompts_of(tiny, task, 8)
    options = dict(max_new_tokens=20, stop=range(25), seed=3)
    together = generate(model, prompts, samples=4, **options).tokens
    for p, prompt in enumerate(prompts):
        assert generate(model, [prompt], samples=4, keys=[(p,)], **options).tokens[0] == together[p]
    assert generate(model, prompts, samples=2, **options).tokens == [
        group[:2] for group in together
    ]
    assert generate(model, prompts, samples=4, **{**options, "seed": 4}).tokens != together


def test_the_next_turn_on_a_cache_is_the_conversation_read_anew(tiny, task):
    model, tokenizer = tiny
    prompts = prompts_of(tiny, task, 4)
    first = generate(model, prompts, samples=2, max_new_tokens=9, stop=range(30))
    bridge = tokenizer.bridge("Again.")
    turns = [turn for group in first.tokens for turn in group]
    keys = [(7, i) for i in range(8)]
    told = [tokenizer.next_turn(turn, bridge)[len(turn) - 1 :] for turn in turns]
    assert len(first.cache.contexts[0][0]) == 4  # each prompt's keys are stored once
    onward = generate(model, told, max_new_tokens=9, stop=range(30), keys=keys, cache=first.cache)
    whole = [prompts[i // 2] + tokenizer.next_turn(turns[i], bridge) for i in range(8)]
    anew = generate(model, whole, max_new_tokens=9, stop=range(30), keys=keys)
    assert onward.tokens == anew.tokens


def test_finished_rows_leave_and_are_found_again(tiny, task):
    """The longer a turn, the fewer rows it has; the next one goes on from all of them."""
    model, _ = tiny
    sizes, hidden = [], Model.hidden
    prompts = prompts_of(tiny, task, 6)
    try:
        Model.hidden = lambda self, ids, *a, **k: (
            sizes.append(len(ids)) or hidden(self, ids, *a, **k)
        )
        first = generate(model, prompts, samples=5, max_new_tokens=40, stop=range(12))
    finally:
        Model.hidden = hidden
    assert sizes[:2] == [6, 30] and sizes[1:] == sorted(sizes[1:], reverse=True)
    assert 0 < sizes[-1] < 10
    turns = [turn for group in first.tokens for turn in group]
    options = dict(max_new_tokens=5, keys=[(1, i) for i in range(30)])
    onward = generate(model, [turn[-1:] + [7] for turn in turns], cache=first.cache, **options)
    whole = [prompts[i // 5] + turn + [7] for i, turn in enumerate(turns)]
    assert onward.tokens == generate(model, whole, **options).tokens


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.8}, {"top_k": 5, "top_p": 0.7}]
)
def test_draws_follow_the_textbook_distribution(options):
    logits = torch.tensor([2.0, 0.5, 1.5, -1.0, 0.0, 1.9, -3.0])
    p = (logits / options.get("temperature", 1.0)).softmax(-1).double().numpy()
    order = np.argsort(-p)
    if "top_k" in options:
        p[order[options["top_k"] :]] = 0
        p /= p.sum()
    if "top_p" in options:
        beyond = np.cumsum(p[order]) - p[order] >= options["top_p"]
        p[order[beyond]] = 0
        p /= p.sum()
    n = 200_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(n, dtype=np.float32))
    tokens, logprobs = draw(logits.expand(n, -1), uniform, **{"temperature": 1.0, **options})
    count = np.bincount(tokens.numpy(), minlength=7)
    assert (count[p == 0] == 0).all()
    spread = np.sqrt(p * (1 - p) / n)
    assert (np.abs(count / n - p) <= 4.5 * spread).all()
    full = (logits / options.get("temperature", 1.0)).log_softmax(-1)
    assert torch.allclose(logprobs, full[tokens])


def test_the_inverse_cdf_stays_in_the_vocabulary():
    uniform = torch.tensor([0.0, 1 - 2**-24])
    tokens, _ = draw(torch.tensor([[-60.0, 0.0, 1.0, -60.0]] * 2), uniform, 1.0)
    assert tokens.tolist() == [1, 2] or tokens.tolist() == [0, 2]
    with pytest.raises(ValueError, match="at least one prompt"):
        generate(None, [])


def test_a_conversation_that_outgrows_the_context_is_refused(tiny):
    model, _ = tiny
    with pytest.raises(ValueError, match="do not fit"):
        generate(model, [[1] * 500], max_new_tokens=13)


def test_a_cut_turn_gets_its_end_and_an_ended_one_keeps_it(tiny):
    _, tokenizer = tiny
    bridge = tokenizer.bridge("Again.")
    words = tokenizer.encode
    assert bridge == words("<|end|> <|user|> Again. <|end|> <|assistant|>")
    assert tokenizer.next_turn(words("1 2"), bridge) == words("1 2") + bridge
    assert tokenizer.next_turn(words("1 2 <|end|>"), bridge) == words("1 2") + bridge


def test_bad_folders_are_refused_by_name(tmp_path, tiny):
    model, tokenizer = tiny
    with pytest.raises(FileNotFoundError, match="config.json"):
        Model.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    tensors = {name: p.detach().clone() for name, p in dict(model.named_parameters()).items()}

    def with_tensors(changed):
        path = tmp_path / "model.safetensors"
        path.write_bytes(models.safetensors.torch.save(changed))
        return Model.from_pretrained(tmp_path)

    norm = "model.norm.weight"
    with pytest.raises(ValueError, match=f"{norm} is missing"):
        with_tensors({k: v for k, v in tensors.items() if k != norm})
    with pytest.raises(ValueError, match="stranger"):
        with_tensors({**tensors, "stranger": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"{norm} has the shape"):
        with_tensors({**tensors, norm: torch.zeros(3)})
    (tmp_path / "model.safetensors").write_bytes(b"\x05" * 100)
    with pytest.raises(ValueError, match="damaged"):
        Model.from_pretrained(tmp_path)
    for change in (
        {"model_type": "gpt2"},
        {"hidden_act": "gelu"},
        {"partial_rotary_factor": 0.75},
        {"quantization_config": {}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4}},
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**model.config_dict, **change}))
        with pytest.raises(ValueError, match="not supported"):
            Model.from_pretrained(tmp_path)
    for content, message in (("[1]", "no JSON object"), ('{"model_type": "llama"}', "incomplete")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            Model.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no jinja2 template"):
        Tokenizer(tokenizer.tokenizer, {**tokenizer.settings, "chat_template": ["a"]}, {})
    with pytest.raises(ValueError, match="cannot read"):
        tokenizer.encode("abracadabra")
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


def test_a_budget_of_tokens_splits_the_work_and_changes_nothing(tiny, monkeypatch):
    model, tokenizer = tiny
    prompts = [[5 + p] * (3 + p % 4) for p in range(9)]
    options = dict(samples=2, max_new_tokens=7, stop=tokenizer.stop_ids, seed=4)
    whole = generate(model, prompts, **options)
    widths, read = [], type(model).read

    def heard(self, ids, *rest, **more):
        widths.append(len(ids))
        return read(self, ids, *rest, **more)

    monkeypatch.setattr(type(model), "read", heard)
    parts = generate(model, prompts, **options, cache_tokens=60)
    assert parts.tokens == whole.tokens and parts.cache is None
    for one, other in zip(sum(parts.logprobs, []), sum(whole.logprobs, []), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert sum(widths) == 9 and max(widths) * (6 + 2 * 7) <= 60
    assert generate(model, prompts, **options, cache_tokens=9_999).cache is not None
