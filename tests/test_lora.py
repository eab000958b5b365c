"""LoRA: adapters on frozen, shared weights equal those of a textbook and of `peft`; what is
trained and saved, and how a run resumes. (Invariants 2, 6 and 7 with LoRA.)"""

from pathlib import Path

import pytest
import safetensors
import torch
import transformers
from test_architectures import KINDS, made
from test_grpo import agent, failures, run, weights  # noqa: F401 (agent and failures are fixtures)
from test_model import assert_close
from torch.func import functional_call

import grpo
from grpo import MasterAdamW, pack_group, token_logprobs
from model import LORA_ALPHA, Linear, Model


def with_trained_adapters(model: Model, rank: int, seed: int = 0) -> Model:
    """`model` with adapters whose B is not zero, as after some training."""
    adapted, rng = model.with_lora(rank, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=rng))
    return adapted


def adapters(model: Model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def linear_layers(model: Model) -> dict[str, Linear]:
    """The linear layers of the blocks, which are all that should have adapters."""
    return {name: m for name, m in model.model.layers.named_modules() if isinstance(m, Linear)}


@pytest.mark.parametrize("kind", ["llama, tied", "qwen2", "qwen3", "olmo2"])
@torch.no_grad()
def test_new_adapters_change_nothing_and_share_the_weights(kind, tmp_path):
    """Without and with a cache. The model itself stays as it is when the adapters are trained."""
    _, model = made(kind, tmp_path)
    ids = torch.randint(0, 61, (2, 9))
    before = model(ids)
    adapted = model.with_lora(rank=4)
    assert torch.equal(adapted(ids), before)
    layers = linear_layers(adapted)
    assert len(layers) == 3 * 7  # q, k, v, o, gate, up, and down in each of three blocks
    for layer in layers.values():
        assert layer.lora_A.shape == (4, layer.in_features)
        assert layer.lora_B.shape == (layer.out_features, 4) and not layer.lora_B.any()
        assert layer.lora_scale == LORA_ALPHA / 4
    shared = dict(model.named_parameters())
    for name, parameter in adapted.named_parameters():
        if name in adapters(adapted):
            assert parameter.requires_grad
        else:  # one storage, not an equal copy
            assert parameter is shared[name] and not parameter.requires_grad
    assert adapted.lm_head.lora_A is None
    for parameter in adapters(adapted).values():
        parameter.add_(0.1)
    assert torch.equal(model(ids), before) and not torch.allclose(adapted(ids), before)


def test_the_deviation_of_A_and_its_seed(folder):
    model = Model.from_pretrained(folder)
    one, same, other = (model.with_lora(64, seed) for seed in (0, 0, 1))
    for name, layer in linear_layers(one).items():
        expected = layer.in_features**-0.5
        assert layer.lora_A.std().item() == pytest.approx(expected, rel=0.15)
        assert torch.equal(layer.lora_A, linear_layers(same)[name].lora_A)
        assert not torch.equal(layer.lora_A, linear_layers(other)[name].lora_A)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradients_are_the_textbooks(tiny, checkpointing):
    """In float64: the derivative of the plain model at the weights W + (alpha / r) B A."""
    model = tiny[0].double()
    model.inv_freq = model.inv_freq.double()
    adapted = with_trained_adapters(model, rank=3)
    adapted.gradient_checkpointing = checkpointing
    ids = torch.randint(1, model.vocab_size, (2, 11))
    targets = torch.randint(model.vocab_size, (2, 11))

    def loss(logits):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    loss(adapted(ids)).backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == (name in adapters(adapted)), name

    factors = {name: p.detach().clone().requires_grad_() for name, p in adapters(adapted).items()}
    effective = {}
    for name, W in model.named_parameters():
        effective[name] = W
        A = factors.get(name.removesuffix("weight") + "lora_A")
        if A is not None:
            B = factors[name.removesuffix("weight") + "lora_B"]
            effective[name] = W + LORA_ALPHA / 3 * B @ A
    effective["lm_head.weight"] = effective["model.embed_tokens.weight"]
    loss(functional_call(model, effective, (ids,))).backward()
    for name, parameter in adapters(adapted).items():
        assert_close(parameter.grad, factors[name].grad, tolerance=1e-10)


@pytest.mark.parametrize("kind", ["llama, biases", "qwen2"])
def test_logits_and_gradients_equal_those_of_peft(kind, tmp_path):
    import peft  # takes seconds, and would do so in each process of pytest

    theirs, ours = made(kind, tmp_path)
    adapted = with_trained_adapters(ours, rank=4)
    config = peft.LoraConfig(r=4, lora_alpha=LORA_ALPHA, target_modules="all-linear")
    theirs = peft.get_peft_model(theirs, config)
    pairs = []
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            name = name.removeprefix("base_model.model.").replace(".default.weight", "")
            pairs.append((parameter, adapters(adapted)[name]))
            parameter.data.copy_(pairs[-1][1].data)
    assert len(pairs) == len(adapters(adapted)) == 2 * 21
    ids = torch.randint(0, 61, (2, 12))
    our_logits, their_logits = adapted(ids), theirs(ids).logits
    assert_close(our_logits, their_logits)
    factors = torch.randn(our_logits.shape)
    (our_logits * factors).sum().backward()
    (their_logits * factors).sum().backward()
    for parameter, our_parameter in pairs:
        assert_close(our_parameter.grad, parameter.grad)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_saved_model_is_merged_and_opens_in_transformers(kind, tmp_path):
    _, model = made(kind, tmp_path / "plain")
    adapted = with_trained_adapters(model, rank=4)
    adapted.save_pretrained(tmp_path / "merged")
    ids = torch.randint(0, 61, (2, 12))
    expected = adapted(ids)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(loaded(ids).logits, expected)
    ours = Model.from_pretrained(tmp_path / "merged")
    assert_close(ours(ids), expected)
    assert not adapters(ours)
    assert (model(ids) - expected).abs().max() > 0.01 * expected.abs().max()


def test_bfloat16_weights_are_merged_in_float32(folder, tmp_path):
    """A change that is too small for bfloat16 in each adapter is still rounded only once."""
    adapted = with_trained_adapters(Model.from_pretrained(folder, torch.bfloat16), rank=4)
    adapted.save_pretrained(tmp_path / "merged")
    merged = Model.from_pretrained(tmp_path / "merged", torch.bfloat16)
    for name, layer in linear_layers(adapted).items():
        W, A, B = (x.detach().double() for x in (layer.weight, layer.lora_A, layer.lora_B))
        exact = W + LORA_ALPHA / 4 * B @ A
        error = (linear_layers(merged)[name].weight.double() - exact).abs()
        assert (error <= 2**-8 * exact.abs() + 1e-6).all(), name  # half of a unit in the last place


def test_what_the_sampler_recorded_the_trainer_computes(agent, failures):  # noqa: F811
    """Invariant 2, with adapters that matter."""
    plain = agent.model
    agent.model = with_trained_adapters(plain, rank=4)
    for group in grpo.rollout(agent, failures, 4, (grpo.TRAIN, 0)):
        rows = pack_group(group)
        with torch.no_grad():
            new, without = (token_logprobs(model, rows) for model in (agent.model, plain))
        assert_close(new, rows.old_logprobs)
        assert (without - rows.old_logprobs).abs().max() > 0.01


@pytest.mark.parametrize(
    "dtype, changes",
    [
        (torch.float32, {}),
        (torch.float32, {"checkpointing": True, "offload": True}),
        (torch.bfloat16, {"updates": 2}),
    ],
    ids=str,
)
def test_a_resumed_run_is_one_that_never_stopped(
    agent, failures, tmp_path, dtype, changes  # noqa: F811
):  # fmt: skip
    """Invariant 6: only adapters are trained, and only they and their moments are saved."""
    model = agent.model.to(dtype)
    before = weights(model)
    # `run` trains a copy of the model that it gets; here that copy has its own frozen weights.
    whole = run(agent, failures, tmp_path / "whole", model.with_lora(4), **changes)
    run(agent, failures, tmp_path / "cut", model.with_lora(4), until=3, **changes)
    resumed = run(agent, failures, tmp_path / "cut", model.with_lora(4), **changes)
    assert torch.equal(resumed, whole)
    assert torch.equal(weights(model), before)
    start = weights(model.with_lora(4))
    changed = sum(p.numel() for p in adapters(model.with_lora(4)).values())
    assert 0 < (whole != start).sum() <= changed
    paths = [tmp_path / name / "checkpoint.safetensors" for name in ("whole", "cut")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    # Three float32 numbers for each number of the adapters, and a header.
    size = paths[0].stat().st_size
    assert 12 * changed < size < 12 * changed + 50_000 < 12 * sum(p.numel() for p in [before])


def test_bfloat16_adapters_have_float32_masters(folder):
    model = Model.from_pretrained(folder, torch.bfloat16).with_lora(4)
    optimizer = MasterAdamW(model, lr=1e-3)
    assert len(optimizer.masters) == len(adapters(model))
    for master, parameter in zip(optimizer.masters, adapters(model).values(), strict=True):
        assert master.dtype == torch.float32 and parameter.dtype == torch.bfloat16
        assert torch.equal(master.bfloat16(), parameter)


def test_a_checkpoint_of_another_rank_is_refused(agent, failures, tmp_path):  # noqa: F811
    run(agent, failures, tmp_path, agent.model.with_lora(4))
    with pytest.raises(ValueError, match="belongs to another model"):
        run(agent, failures, tmp_path, agent.model.with_lora(2))


def test_the_saved_folder_has_the_names_of_a_plain_model(folder, tmp_path):
    model = Model.from_pretrained(folder)
    model.with_lora(2).save_pretrained(tmp_path / "merged")
    names = []
    for path in (folder, tmp_path / "merged"):
        with safetensors.safe_open(Path(path) / "model.safetensors", "pt") as file:
            names.append(set(file.keys()))
    assert names[0] == names[1]
