"""A step of `train`: advantages, loss and gradient equal those of TRL's GRPOTrainer on one batch.

TRL pads, scores and weights the batch by its own code. It is given only the tokens, with their
log-probabilities at sampling time and under a reference model.
"""

import itertools
import json

import pytest
import torch
import transformers
from textbook import Row, conversation, prepare

import grpo
from grpo import Agent, TrainConfig
from model import Model

BETA, CLIP, TEMPERATURE, MAX_NEW_TOKENS = 0.04, 0.2, 0.9, 16
REWARDS = torch.tensor([[0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]])


def rollouts(vocabulary: int, seed: int) -> dict[str, list | None]:
    """Random tokens: a prompt of its own length per group, a completion of its own per row."""
    rng = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:  # padding's id may be among them, as in a real text
        return torch.randint(vocabulary, (length,), generator=rng).tolist()

    N, G = REWARDS.numel(), REWARDS.shape[1]
    prompts = [prompt for prompt in map(tokens, (3, 11, 6)) for _ in range(G)]
    completions = [tokens(1 + row * 7 % N) for row in range(N)]  # lengths 1 to 12, mixed
    return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": None}


def trl_trainer(path, loss_type: str, scale: bool, rows: dict):
    # Imported here, because it takes seconds, and would do so in each process of pytest.
    trl, datasets = (pytest.importorskip(name) for name in ("trl", "datasets"))
    config = trl.GRPOConfig(
        output_dir=str(path / "trl"), use_cpu=True, bf16=False, report_to=[],
        per_device_train_batch_size=REWARDS.numel(), num_generations=REWARDS.shape[1],
        max_completion_length=MAX_NEW_TOKENS, temperature=TEMPERATURE,
        loss_type=loss_type, scale_rewards=scale, beta=BETA, epsilon=CLIP,
        use_bias_correction_kl=False,  # by default TRL multiplies the k3 term by the ratio
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=str(path),
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["?"]}),
        processing_class=transformers.AutoTokenizer.from_pretrained(path),
        reward_funcs=lambda **_: REWARDS.flatten().tolist(),
        rollout_func=lambda prompts, trainer: rows,
    )
    trainer.model.train()
    # transformers gives the padding token's embedding no gradient, also where the token is text:
    # here it is the end-of-turn token, which R3 trains. Without that, the two must agree.
    trainer.model.model.embed_tokens.padding_idx = None
    # TRL divides by this number, which only train() sets: here the whole step is one batch.
    trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps
    assert config.gradient_accumulation_steps == config.steps_per_generation == 1
    return trainer


@torch.no_grad()
def reference_of(path):
    """Another model, saved: in transformers' form, and in ours."""
    model = Model.from_pretrained(path)
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.mul_(1 + 0.3 * torch.randn(p.shape, generator=rng))
    model.save_pretrained(path / "reference")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path / "reference")
    return theirs.eval(), model.requires_grad_(False)


@torch.no_grad()
def reference_logprobs(model, rows: dict, width: int) -> torch.Tensor:
    """By transformers, row by row: (N, width), padded on the right."""
    found = torch.zeros(len(rows["prompt_ids"]), width)
    for row, (prompt, completion) in enumerate(
        zip(rows["prompt_ids"], rows["completion_ids"], strict=True)
    ):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        log_p = (logits / TEMPERATURE).log_softmax(-1)
        found[row, : len(completion)] = log_p[range(len(completion)), completion]
    return found


CASES = [("dapo", 10), ("dapo", 11), ("grpo", 13), ("dr_grpo", 16)]
OTHER_CASES = [
    pytest.param(loss_type, seed, marks=pytest.mark.slow)
    for loss_type, seed in itertools.product(("dapo", "grpo", "dr_grpo"), (10, 11, 13, 16))
    if (loss_type, seed) not in CASES
]


# In all seeds but the first, the id of the padding token occurs as text.
@pytest.mark.parametrize("loss_type, seed", [*CASES, *OTHER_CASES])
def test_a_step_equals_trl(tiny, task, tmp_path, monkeypatch, loss_type, seed):
    for part in tiny:
        part.save_pretrained(tmp_path)
    scale = loss_type != "dr_grpo"  # Dr. GRPO does not divide by the deviation either
    rows = rollouts(tiny[0].config.vocab_size, seed)
    trainer = trl_trainer(tmp_path, loss_type, scale, rows)
    inputs = trainer._generate_and_score_completions([{"prompt": "?"}] * REWARDS.numel())

    # TRL's reference model is still the policy, so these are the current log-probabilities.
    now, live = inputs["ref_per_token_logps"], inputs["completion_mask"].bool()
    rng = torch.Generator().manual_seed(seed - 10)
    old = now + 0.3 * torch.randn(now.shape, generator=rng)
    theirs_reference, reference = reference_of(tmp_path)
    ref = reference_logprobs(theirs_reference, rows, now.shape[1])
    theirs = trainer.compute_loss(
        trainer.model, {**inputs, "old_per_token_logps": old, "ref_per_token_logps": ref}
    )
    theirs.backward()

    P, G = REWARDS.shape
    conversations, rewards = [], REWARDS.flatten().tolist()
    for i, (context, reflection) in enumerate(
        zip(rows["prompt_ids"], rows["completion_ids"], strict=True)
    ):
        row = Row(context, reflection, old[i][live[i]].tolist(), None, 0.0)
        conversations.append(conversation(i // G, row, rewards[i] == 1, index=i % G))
    groups = [conversations[p * G : (p + 1) * G] for p in range(P)]
    gradients = prepare(monkeypatch, [groups])
    model = Model.from_pretrained(tmp_path)
    agent = Agent(model, tiny[1], task, max_new_tokens=MAX_NEW_TOKENS, temperature=TEMPERATURE)
    config = TrainConfig(
        steps=1, batch_size=P, group_size=G, loss_type=loss_type, scale_advantages=scale,
        beta=BETA, clip=CLIP,
    )  # fmt: skip
    failures = [group[0] for group in groups]
    _, (_, ours) = grpo.train(agent, reference, failures, config, tmp_path / "run")

    lines = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    advantages = torch.tensor([json.loads(line)["advantage"] for line in lines])
    torch.testing.assert_close(advantages, inputs["advantages"], rtol=1e-5, atol=0)
    assert advantages.min() < 0 < advantages.max()
    sides = (f"clip_ratio/{side}_mean" for side in ("low", "high", "region"))
    low, high, clipped = (trainer._metrics["train"][side][0] for side in sides)
    assert min(low, high) > 0.05  # the clip bites on both sides
    assert ours["clipped"] == pytest.approx(clipped, rel=1e-6)
    [kl] = trainer._metrics["train"]["kl"]
    assert ours["kl"] == pytest.approx(kl, rel=1e-4) and kl > 0.1
    # Terms of about 1 that may nearly cancel, from logits in float32.
    assert ours["loss"] == pytest.approx(theirs.item(), rel=1e-4, abs=1e-5)
    wanted = dict(trainer.model.named_parameters())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert wanted.keys() == sizes.keys()
    for name, gradient in zip(sizes, gradients[0].split(list(sizes.values())), strict=True):
        theirs = wanted[name].grad.flatten()
        assert (gradient - theirs).norm() / theirs.norm() < 1e-4, name
