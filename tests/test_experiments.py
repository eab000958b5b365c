"""The experiments measure what the titles of their tables say."""

import copy
import itertools
import random
import re
import shutil
from dataclasses import replace

import experiments
import numpy as np
import pytest
import sentence
import torch
from conftest import countdown_file, shrink_r3

import grpo
import r3
from grpo import Conversation, Turn
from tasks import Verdict


class LenientAgent(grpo.Agent):
    """An agent whose verifier an untrained model satisfies now and then. It records all prompts."""

    prompts: list = []

    def verify(self, problem, turn):
        correct = sum(turn.tokens) % 2 == 0
        return Verdict(correct, "correct" if correct else "wrong_value")

    def sample_turns(self, prompts, *arguments, **options):
        self.prompts = [*self.prompts, *prompts]
        return super().sample_turns(prompts, *arguments, **options)


@pytest.fixture
def agent(tiny, task):
    model, tokenizer = tiny
    tokenizer.stop_ids = list(range(20))  # so that many turns end before the length limit
    return LenientAgent(model, tokenizer, task, max_new_tokens=10, seed=3)


@pytest.fixture
def failures(agent, task):
    """Wrong first attempts at a few problems."""
    attempts = grpo.attempt_all(agent, task.load(split="dev", limit=16), 1, (grpo.COLLECT, 0))
    return [c for c in attempts if not c.attempt_verdict.correct]


def make_config(**settings) -> r3.Config:
    return replace(r3.TINY, **{"steps": 2, "batch_size": 4, "group_size": 3, **settings})


def copy_agent(agent) -> LenientAgent:
    return replace(agent, model=copy.deepcopy(agent.model))


def all_weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def retry_each(agent, failures) -> list[Conversation]:
    """One reflection and one retry on each failure."""
    return sum(grpo.rollout(agent, failures, 1, (grpo.EVALUATE, 0)), [])


# -- Controls --------------------------------------------------------------------------------------
def test_pass_at_k_is_the_fraction_of_subsets_that_contain_a_success():
    n = 6
    for k, successes in itertools.product(range(1, n + 1), range(n + 1)):
        subsets = list(itertools.combinations(range(n), k))
        fraction = sum(min(subset) < successes for subset in subsets) / len(subsets)
        assert experiments.pass_at_k(k, n, successes) == pytest.approx(fraction)
    two, three = (experiments.pass_at_k(k, n, 2) for k in (2, 3))
    assert experiments.pass_at_k(2.25, n, 2) == pytest.approx(0.75 * two + 0.25 * three)


def test_equal_tokens_gives_the_vanilla_model_the_tokens_of_the_trained_one(
    agent, failures, tmp_path
):
    before = retry_each(agent, failures)
    after = [
        replace(
            c,
            reflection=replace(c.reflection, tokens=c.reflection.tokens * 3),
            retry=replace(c.retry, tokens=c.retry.tokens * 3),
        )
        for c in before
    ]
    [[label, row]] = experiments.equal_tokens(agent, before, after, tmp_path / "kept").items()
    assert label == "its own, pass@3.00 (trained model: pass@1)"
    groups = grpo.rollout(agent, failures, experiments.MAX_TRIES, (grpo.PLAY, 0))
    successes = [sum(c.retry_verdict.correct for c in group) for group in groups]
    chances = [experiments.pass_at_k(3.0, 16, count) for count in successes]
    assert row["vanilla"][0] == pytest.approx(np.mean(chances)) and 0 < row["vanilla"][0] < 1
    assert row["trained"][0] == pytest.approx(np.mean([c.retry_verdict.correct for c in after]))


@pytest.mark.parametrize("label", experiments.REPLACEMENTS)
def test_a_control_changes_the_reflection_and_nothing_else(agent, failures, tmp_path, label):
    own = retry_each(agent, failures)
    replaced = experiments.replace_reflections(agent, own, label)
    problem_of = {tuple(c.reflection.tokens): c.problem.id for c in own}
    end_of_turn = agent.tokenizer.stop_ids[0]
    for before, after in zip(own, replaced, strict=True):
        assert replace(after, reflection=before.reflection) == before
        assert after.reflection.tokens != before.reflection.tokens
        assert after.reflection.prompt == before.reflection.prompt
        ended = after.reflection.tokens[-1] in agent.tokenizer.stop_ids
        assert after.reflection.truncated is not ended
        if label == experiments.EMPTY:
            assert after.reflection.tokens == [end_of_turn]
        elif label == experiments.GENERIC:
            text = agent.tokenizer.decode(after.reflection.tokens)
            assert text == agent.task.generic_reflection
        else:
            assert problem_of[tuple(after.reflection.tokens)] != before.problem.id
    agent.prompts = []
    retried = experiments.retry_only(agent, replaced, tmp_path / "kept")
    bridge = agent.tokenizer.bridge(agent.task.retry_instruction)
    expected = [
        c.reflection.prompt + agent.tokenizer.append_bridge(c.reflection.tokens, bridge)
        for c in replaced
    ]
    assert sorted(agent.prompts) == sorted(expected)
    assert [c.reflection for c in retried] == [c.reflection for c in replaced]


# -- Training other turns --------------------------------------------------------------------------
def textbook_gradient(agent, reference, groups, rewards, config, turn_names) -> torch.Tensor:
    """The gradient of the formula, one turn at a time by the plain forward pass.

    rewards: (P, G). turn_names: the trained turns.
    """
    conversations = sum(groups, [])
    advantages = []
    for group_rewards in rewards:
        deviation = group_rewards.std() + 1e-4
        advantages += [(r - group_rewards.mean()) / deviation for r in group_rewards]
    reflect, retry = (
        agent.tokenizer.bridge(text)
        for text in (agent.task.reflection_instruction, agent.task.retry_instruction)
    )
    lengths = [sum(len(getattr(c, name).tokens) for name in turn_names) for c in conversations]
    loss = 0.0
    for c, A, length in zip(conversations, advantages, lengths, strict=True):
        weight = {"dapo": 1 / sum(lengths), "grpo": 1 / (len(conversations) * length)}
        max_length = len(turn_names) * agent.max_new_tokens
        weight["dr_grpo"] = 1 / (len(conversations) * max_length)
        prompts = {"attempt": agent.attempt_prompt(c.problem)}
        end = agent.tokenizer.append_bridge(c.attempt.tokens, reflect)
        prompts["reflection"] = prompts["attempt"] + end
        if c.reflection:
            end = agent.tokenizer.append_bridge(c.reflection.tokens, retry)
            prompts["retry"] = prompts["reflection"] + end
        for name in turn_names:
            prompt, tokens = prompts[name], getattr(c, name).tokens
            predictors = range(len(prompt) - 1, len(prompt) - 1 + len(tokens))
            ids = torch.tensor([prompt + tokens])
            logprobs, ref_logprobs = (
                model(ids)[0].log_softmax(-1)[predictors, tokens]
                for model in (agent.model, reference)
            )
            ratio = (logprobs - torch.tensor(getattr(c, name).logprobs)).exp()
            clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
            d = ref_logprobs.detach() - logprobs
            per_token = torch.minimum(ratio * A, clipped * A) - config.beta * (d.exp() - d - 1)
            loss = loss - weight[config.loss_type] * per_token.sum()
    agent.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in agent.model.parameters()])


@pytest.mark.parametrize(
    "train, loss_type",
    [
        ("attempt", "dapo"), ("attempt", "grpo"), ("attempt", "dr_grpo"),
        ("retry", "dapo"), ("retry", "grpo"), ("retry", "dr_grpo"),
        ("both", "dapo"), ("both", "grpo"), ("both", "dr_grpo"),
    ],
)  # fmt: skip
def test_the_gradient_of_other_turns_is_that_of_the_textbook(agent, failures, train, loss_type):
    config = make_config(beta=0.3, loss_type=loss_type)
    turn_names = ("reflection", "retry") if train == "both" else (train,)
    reference = copy.deepcopy(agent.model)
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.7)
    failures = [experiments.TRAINED[train](**vars(failure)) for failure in failures[:3]]
    rollout = experiments.REPLACED.get(train, {}).get("rollout", grpo.rollout)
    groups = rollout(agent, failures, config.group_size, (grpo.TRAIN, 0))
    rng = torch.Generator().manual_seed(0)
    for conversation in sum(groups, []):  # so that the ratios of some tokens are clipped
        for name in turn_names:
            turn = getattr(conversation, name)
            noise = 0.3 * torch.randn(len(turn.tokens), generator=rng)
            turn.logprobs = (torch.tensor(turn.logprobs) + noise).tolist()
    rewards = torch.tensor([float(i % 3 == 0 or i > 7) for i in range(sum(map(len, groups)))])
    rewards = rewards.view(-1, config.group_size)
    expected = textbook_gradient(agent, reference, groups, rewards, config, turn_names)
    optimizer = grpo.MasterAdamW(agent.model, config.lr)
    optimizer.zero_grad()
    advantages = grpo.group_advantages(rewards)
    grpo.backpropagate_step(agent, reference, groups, advantages, config, optimizer)
    gradient = torch.cat([p.grad.flatten() for p in agent.model.parameters()])
    assert expected.norm() > 0.01
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_training_reflections_is_r3_bit_for_bit(agent, failures, tmp_path):
    config, one, other = make_config(), copy_agent(agent), copy_agent(agent)
    for _ in grpo.train(one, agent.model, failures, config, tmp_path / "r3"):
        pass
    experiments.train_turns(
        other, agent.model, failures, config, tmp_path / "turns", train="reflection"
    )
    assert not torch.equal(all_weights(one.model), all_weights(agent.model))
    assert torch.equal(all_weights(one.model), all_weights(other.model))
    for log in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "r3" / log).read_bytes() == (tmp_path / "turns" / log).read_bytes()


@pytest.mark.parametrize("train", ["retry", "attempt", "shuffled"])
def test_resumed_training_ends_with_the_same_weights(agent, failures, tmp_path, monkeypatch, train):
    """After the run, its checkpoint from the first step is restored, and the run is resumed."""
    config, results = make_config(beta=0.0, save_every=1), []
    save_checkpoint = grpo.save_checkpoint

    def save_and_keep(folder, step, *arguments, **options):
        save_checkpoint(folder, step, *arguments, **options)
        if step == 1:
            shutil.copy(folder / "checkpoint.safetensors", folder / "at step 1")

    monkeypatch.setattr(grpo, "save_checkpoint", save_and_keep)
    for _ in range(2):
        trained = copy_agent(agent)
        experiments.train_turns(trained, None, failures, config, tmp_path, train)
        metrics = list(r3.read_jsonl(tmp_path / "metrics.jsonl", "step"))
        results.append((all_weights(trained.model), metrics))
        if len(results) == 1:
            shutil.move(tmp_path / "at step 1", tmp_path / "checkpoint.safetensors")
    assert not torch.equal(all_weights(agent.model), results[0][0])
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert [record["step"] for record in metrics] == [0, 1, 2]
    assert metrics[1]["sampled_tokens"] > 0


def test_other_turns_leave_the_functions_of_grpo_as_they_were(agent, failures, tmp_path):
    names = ("rollout", "reward")
    before = [getattr(grpo, name) for name in names]
    for train in ("attempt", "shuffled"):
        config, folder = make_config(steps=1, beta=0.0), tmp_path / train
        experiments.train_turns(copy_agent(agent), None, failures, config, folder, train)
    assert [getattr(grpo, name) for name in names] == before


def test_shuffled_rewards_are_the_same_rewards_in_another_order(
    agent, failures, tmp_path, monkeypatch
):
    recorded, reward = [], grpo.reward

    def record(path, step, groups, rewards, advantages, *_, **__):
        earned = torch.tensor([[reward(c) for c in group] for group in groups])
        recorded.append((earned, rewards, advantages))

    monkeypatch.setattr(grpo, "log_samples", record)
    experiments.train_turns(agent, None, failures, make_config(beta=0.0), tmp_path, "shuffled")
    assert len(recorded) == 2
    for earned, rewards, advantages in recorded:
        assert 0 < earned.sum() < earned.numel()
        assert rewards.sum() == earned.sum() and not torch.equal(rewards, earned)
        assert torch.equal(advantages, grpo.group_advantages(rewards))


def test_a_reward_needs_a_correct_answer_and_trained_turns_that_ended():
    wrong, correct = Verdict(False, "wrong_value"), Verdict(True, "correct")
    ended, truncated = Turn([1], [2, 0], truncated=False), Turn([1], [2, 2], truncated=True)

    def reward(train, retry_verdict):
        c = Conversation(
            None, 0, ended, wrong, reflection=truncated, retry=ended, retry_verdict=retry_verdict
        )
        return grpo.reward(experiments.TRAINED[train](**vars(c)))

    turns = ("reflection", "retry", "both")
    assert {train: reward(train, correct) for train in turns} == {
        "reflection": 0, "retry": 1, "both": 0,
    }  # fmt: skip
    assert reward("retry", wrong) == 0
    for turn, verdict, expected in (
        (ended, correct, 1),
        (ended, wrong, 0),
        (truncated, correct, 0),
    ):
        assert grpo.reward(experiments.AttemptTrained(None, 0, turn, verdict)) == expected


def test_the_examples_in_the_prompts_of_other_tasks_are_correct():
    problem = sentence.SentenceProblem(0, "in the mountains", "boot", "stone")
    for task in (experiments.Both(), experiments.Question()):
        [_, example_answer, question], _ = task.messages(problem)
        assert task.verify(problem, example_answer["content"]).correct
        assert "the word boot" in question["content"]
        assert not task.verify(problem, sentence.Sentence.example_answer).correct


# -- Whole experiments -----------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["tiny", "letters"])
def test_the_controls_of_a_run_and_its_other_turns(
    model, folder, base_folder, monkeypatch, tmp_path, capsys
):
    """The whole experiment in seconds, for the tiny model and for a folder. A second call samples
    nothing."""
    shrink_r3(monkeypatch)
    monkeypatch.setattr(r3, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(r3, "CURVE_PROBLEMS", 2)
    monkeypatch.setattr(r3, "CURVE_SAMPLES", 1)
    monkeypatch.setattr(r3, "plot_command", lambda folders: None)  # takes a second
    shutil.copytree(base_folder, tmp_path / "runs" / base_folder.name)
    monkeypatch.setattr(grpo.Agent, "verify", LenientAgent.verify)
    monkeypatch.chdir(tmp_path)
    flags = "--steps 2 --batch-size 3 --group-size 3 --limit 4 --num-samples 2"
    flags += " --max-attempts 1 --num-problems 20 --max-new-tokens 12 --name run"
    data = countdown_file(tmp_path / "countdown.jsonl")
    model_flags = ["--model", str(folder), "--data", data] if model == "letters" else []
    r3.main(["train", *flags.split(), *model_flags])
    run = tmp_path / "runs/run"
    tables = experiments.controls(run)
    crossed, lengths, retries = list(tables.values())[:3]
    assert list(crossed) == list(crossed["vanilla"]) == list(lengths) == ["vanilla", "trained"]
    assert crossed["trained"]["trained"] == retries["its own reflection"]["trained"]
    assert len(retries) == 7 and len(tables) == (5 if model == "tiny" else 3)
    experiments.main(["turns", "--run", str(run), "--train", "attempt", "--steps", "1"])
    assert not (run / "attempt-group3-steps1/checkpoint.safetensors").exists()
    assert "Trained: attempt" in capsys.readouterr().out
    gained, tokens = experiments.gains([run / "attempt-group3-steps1"])
    assert tokens > 0 and gained["1st try"].shape == (1,)
    experiments.main(["picture", "--run", str(run), "--out", "group.png"])
    assert (tmp_path / "group.png").read_bytes().startswith(b"\x89PNG")
    if model == "tiny":
        accuracies, losses = experiments.larger(run, width=2).values()
        assert [name.split(",")[0] for name in accuracies] == ["vanilla", "trained", "larger"]
        table, _ = r3.read_json(run / "report.json")["tables"].values()
        assert list(accuracies.values())[:2] == [table["vanilla"], table["trained"]]
        sizes = [int(re.sub("[^0-9]", "", name)) for name in accuracies]
        assert sizes[0] == sizes[1] < sizes[2] / 3 and len(losses) == 2
    else:
        with pytest.raises(ValueError, match="not a run of the tiny model"):
            experiments.larger(run)
    monkeypatch.setattr(grpo, "generate", None)
    assert str(experiments.controls(run)) == str(tables)
    quick = experiments.controls(run, quick=True)
    assert list(quick) == list(tables)[:3]
    empty = retries["an empty reflection"]["trained"]
    assert quick[list(tables)[2]]["an empty reflection"] == {"trained": empty}
    experiments.main(["controls", "--run", str(run)])
    assert "| its own reflection " in capsys.readouterr().out


def test_turns_of_the_cold_start_search_as_often_as_its_recipe_says(agent, task):
    """In the last part of the cold start, 36% of the reflections and 8% of the attempts search; in
    the first part, all reflections do."""
    problems, rng = task.load(split="cold"), random.Random(0)
    for full_search, share in ((True, 1.0), (False, 0.36)):
        dialogues = [task.cold_start_dialogue(problems, rng, full_search)[1] for _ in range(3_000)]
        reflections = [turns[1] for turns in dialogues if len(turns) > 1]
        for texts, expected in ((reflections, share), ([t[0] for t in dialogues], 0.08)):
            turns = [Turn([], agent.tokenizer.encode(text), False) for text in texts]
            assert abs(experiments.searching(agent, turns).mean() - expected) < 0.03


def test_all_tiny_prints_the_tables_of_every_seed(monkeypatch, capsys):
    """Without training: each experiment is replaced by a table that names it."""
    called = []

    def table(name):
        return lambda *arguments, **options: called.append((name, *arguments)) or {name: {}}

    for name in ("seeds_table", "controls", "larger", "heldout", "transfer", "turns"):
        monkeypatch.setattr(experiments, name, table(name))
    runs = []
    monkeypatch.setattr(
        experiments, "train_unless_finished", lambda program, run, flags: runs.append((run, flags))
    )
    experiments.main(["all", "--tiny", "--seeds", "4", "5"])
    folders = [r3.RUNS / f"test-seed{seed}" for seed in (4, 5)]
    expected = [("seeds_table", [4, 5])]
    expected += [("controls", folder) for folder in folders]
    expected += [("turns", folder, "attempt") for folder in folders]
    expected += [("larger", folder) for folder in folders]
    assert called == expected and not runs
    assert "Seed 5. controls" in capsys.readouterr().out
    experiments.main(["all", "--seeds", "4"])
    assert [run.name for run, _ in runs] == ["sentence-all-weights-seed4", "sentence-lora-seed4"]
    for _, flags in runs:  # r3 knows these flags, and tests/sentence.py has this task
        given = r3.read_command_line(["train", *flags])
        assert given.pop("command") == "train" and r3.Config(**given).seed == 4


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="not a finished run"):
        experiments.main(["controls", "--run", str(tmp_path)])


def test_the_tables_of_variants_and_seeds():
    paper = {"1st try": np.array([5.0, 7.0]), "within two": np.array([20.0, 30.0])}
    gain = {"1st try": np.array([6.0, 9.0]), "within two": paper["within two"]}
    row = experiments.variant_row(gain, 0.314, paper)
    assert row["gain, 1st try"] == "+7.5 (+6.0, +9.0)" and row["M tokens"] == "0.31"
    assert row["difference, 1st try"] == "+1.5 ± 6.4" and row["difference, within two"] == ""
    accuracies = {"1st try": [0.1, 0.0, 0.2], "within two": [0.5, 0.4, 0.6]}
    by_seed = {
        seed: dict.fromkeys(("vanilla", "trained", "gain"), accuracies) for seed in ("a", "b")
    }
    rows = experiments.seed_rows(by_seed)
    assert rows["a"]["1st try, gain"] == "+10.0 [+0.0, +20.0]"
    assert rows["mean"]["within two, trained"] == "50.0"


# -- README ----------------------------------------------------------------------------------------
SOURCE = """\
def first(x):
    y = x + 1
    return y


def second(x):
    y = x + 1
    return 2 * y
"""
README = """\
See [`def second(`](code.py#L2), and [`return 2`](code.py#L8).

```diff
--- code.py: triple
-    return 2 * y
+    return 3 * y
@@
 def first(x):
+    print(x)
```
"""


@pytest.fixture
def readme(tmp_path):
    """A small repository with a README that quotes its code. Returns the README's path."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "code.py").write_text(SOURCE)
    (tmp_path / "README.md").write_text(README)
    return tmp_path / "README.md"


def test_readme_gets_new_line_numbers(readme, capsys):
    experiments.renew_readme(readme)
    expected = README.replace("#L2", "#L6")
    assert readme.read_text() == expected
    assert capsys.readouterr().out == "README.md was renewed\n"
    experiments.renew_readme(readme)
    assert readme.read_text() == expected and capsys.readouterr().out == ""


def test_what_cannot_be_renewed_in_readme_is_named(readme):
    link = "[`y = x + 1`](code.py#L2) and [`return 4`](code.py#L8) and [`def second(`](code.py#L2)."
    readme.write_text(README.replace("[`return 2`](code.py#L8).", link))
    with pytest.raises(ValueError) as error:
        experiments.renew_readme(readme)
    assert str(error.value).splitlines()[1:] == [
        "  README.md: the link 'y = x + 1' must stand on one line of code.py; it is on the lines "
        "2, 7",
        "  README.md: the link 'return 4' must stand on one line of code.py; it is nowhere",
    ]
    renewed = README.replace("#L2", "#L6")  # what can be renewed is
    assert readme.read_text() == renewed.replace(
        "[`return 2`](code.py#L8).",
        link.replace("def second(`](code.py#L2", "def second(`](code.py#L6"),
    )


def test_a_diff_that_no_longer_applies_is_reported_with_its_lines(readme):
    experiments.renew_readme(readme)
    (readme.parent / "code.py").write_text(SOURCE.replace("2 * y", "y * 2"))
    variants = readme.parent / "tests/VARIANTS.md"
    variants.write_text(
        "```diff\n--- code.py: no sum\n-    y = x + 1\n+    y = x\n```\n"
        "```diff\n--- code.py: shorter\n def first(x):\n-    return y\n+    return x\n```\n"
    )
    readme.write_text(readme.read_text().replace("[`return 2`](code.py#L8)", "`return 2`"))
    with pytest.raises(ValueError) as error:
        experiments.renew_readme(readme)
    assert str(error.value).splitlines()[1:] == [
        "  README.md: the diff 'triple' does not apply to code.py:",
        "    found 0 times:     return 2 * y",
        "  VARIANTS.md: the diff 'no sum' does not apply to code.py:",
        "    found 2 times:     y = x + 1",
        "  VARIANTS.md: the diff 'shorter' does not apply to code.py:",
        "    found, but not in this order, the lines after: def first(x):",
    ]


def test_a_variant_whose_diff_does_not_apply_is_refused(readme, tmp_path, monkeypatch):
    for name in experiments.FILES:
        (readme.parent / name).write_text(SOURCE)
    readme.write_text(README.replace("code.py: triple", "grpo.py: triple"))
    monkeypatch.setattr(experiments, "ROOT", readme.parent)
    experiments.code(tmp_path / "copy", "triple")
    assert "3 * y" in (tmp_path / "copy/grpo.py").read_text()
    assert (tmp_path / "copy/model.py").read_text() == SOURCE
    (readme.parent / "grpo.py").write_text(SOURCE.replace("2 * y", "y * 2"))
    with pytest.raises(ValueError, match="'triple' does not apply to grpo.py:\n  found 0 times"):
        experiments.code(tmp_path / "copy", "triple")


def test_a_hunk_matches_whole_lines(readme):
    [(file, hunks)] = experiments.diffs(README).values()
    source, reasons = experiments.apply_hunks(SOURCE, hunks)
    assert file == "code.py" and not reasons
    changed = SOURCE.replace("2 * y", "3 * y").replace("first(x):\n", "first(x):\n    print(x)\n")
    assert source == changed
    _, reasons = experiments.apply_hunks("if x:\n    return y\n", [("return y\n", "return x\n")])
    assert reasons == ["found 0 times: return y"]


def test_the_command_renews_the_readme_and_names_what_it_cannot(readme, monkeypatch):
    monkeypatch.setattr(experiments, "ROOT", readme.parent)
    experiments.main(["readme"])
    assert "code.py#L6" in readme.read_text()
    readme.write_text(readme.read_text().replace("return 2`", "return 5`"))
    with pytest.raises(SystemExit, match="return 5"):
        experiments.main(["readme"])
