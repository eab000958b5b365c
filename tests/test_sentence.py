"""The task of tests/sentence.py: attacks on its verifier, its splits, experiments on its runs."""

import itertools
import math
import time

import experiments
import pytest
import sentence
import torch

import grpo
import r3

TASK = sentence.Sentence()
PROBLEM = sentence.SentenceProblem(
    0, place="by the sea", required_word="kettle", forbidden_word="stone"
)


@pytest.mark.parametrize(
    "text",
    [
        "The kettle sings while the waves roll in.",
        "  Kettle after kettle of tea keeps my old father warm!\n",
        "Why is the fisherman's kettle always hot, even at night?",
        '"The kettle is full of sea-water again"',
        "A " + "very " * 17 + "old kettle stands on my table.",
        "The kettle sings while the waves roll in and then",  # truncated at the length limit
    ],
)
def test_correct_sentences(text):
    assert TASK.verify(PROBLEM, text) == sentence.Verdict(True, "correct")


ATTACKS = {
    "not_one_sentence": [
        "The kettle sings. The waves roll in again.",
        "The kettle sings while the\nwaves roll in.",
        "The kettle sings while the waves roll in...",
        "The **kettle** sings while the waves roll in.",
        "The kettle sings while the waves roll in. kettle",
        "The kettle sings while the waves roll in 2 bays.",
        "The kettle sings on a st\u043ene while the waves roll in.",  # a Cyrillic o
        "The kettle sings on a sto\u200bne while the waves roll in.",
        "The kettle sings while the waves roll in\uff0e",
        "The kettle sings while the waves roll in.\x00",
        "The kettle | sings | while | the | waves",
        "\U0001f600" * 100_000,
    ],
    "wrong_length": [
        "",
        " \n ",
        "kettle",
        "Kettle kettle kettle kettle kettle kettle kettle.",
        "The kettle and the kettle and the kettle.",
        "The kettle sings today.",
        "The kettle sings " + "very " * 25 + "well to me.",
        "The kettle sings " + "and sings " * 100_000 + "well to me.",
        "kettle" * 100_000,
        "," * 100_000,
    ],
    "about_the_task": [
        "The sentence must use the kettle and nothing else.",
        "My word of the day is kettle, as always.",
        "Kettle is one of the words that I must use.",
    ],
    "missing_word": [
        "The kettles sing while the waves roll in.",
        "The teakettle sings while the waves roll in.",
        "The ket-tle sings while the waves roll in.",
        "The ket tle sings while the waves roll in.",
    ],
    "forbidden_word": [
        "The kettle is on a stone by the bay.",
        "The kettle is on a STONE by the bay.",
        "The kettle is on a stone-cold stove again.",
        "The stone's own kettle is a deep and warm bay.",
    ],
}


@pytest.mark.parametrize("reason", ATTACKS)
def test_an_attack_fails_for_the_right_reason(reason):
    start = time.process_time()
    for text in ATTACKS[reason]:
        verdict = TASK.verify(PROBLEM, text)
        assert not verdict.correct and verdict.reason == reason, text[:80]
    assert time.process_time() - start < 1


def test_copying_from_the_prompt_is_not_an_answer():
    """Neither a message of the prompt, nor a sentence of it, nor a list of all words is correct."""
    texts = [message["content"] for message in TASK.messages(PROBLEM)[0]]
    texts += [text_sentence for text in texts for text_sentence in text.split(". ")]
    texts += [" ".join(words.split()) for words in sentence.WORDS.values()]
    for problem in (PROBLEM, *TASK.load(split="train", limit=5)):
        assert not any(TASK.verify(problem, text).correct for text in texts)


def test_no_word_of_a_split_occurs_in_another():
    words = {split: set() for split in sentence.WORDS}
    for split in words:
        for problem in TASK.load(split=split):
            words[split] |= {problem.required_word, problem.forbidden_word}
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(words.values(), 2))
    assert {split: len(words[split]) for split in words} == {"train": 42, "dev": 14, "test": 28}
    words_of_places = {word for place in sentence.PLACES.split(",") for word in place.split()}
    assert all(words[split].isdisjoint(words_of_places) for split in words)


def test_problems_are_numbered_distinct_and_determined_by_the_seed():
    first_seed, second_seed = (TASK.load(split="test", limit=50, seed=seed) for seed in (1, 2))
    assert first_seed == TASK.load(split="test", limit=50, seed=1) != second_seed
    assert [problem.id for problem in first_seed] == list(range(50))
    assert len({TASK.problem_key(problem) for problem in first_seed}) == 50
    for problem in first_seed + second_seed:
        assert problem.required_word != problem.forbidden_word


def test_the_question_names_both_words():
    [*_, question], tools = TASK.messages(PROBLEM)
    assert tools is None and question["content"].endswith(
        "sentence about life by the sea. Use the word kettle, but not the word stone."
    )


# -- Experiments on a finished run of this task ----------------------------------------------------

FEW = "--steps 1 --batch-size 2 --group-size 2 --limit 3 --num-problems 4 --max-attempts 1"
FEW += " --max-new-tokens 4"


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """A run of an untrained model."""
    monkeypatch.chdir(tmp_path)
    flags = f"--task sentence --num-samples 2 --beta 0 --lr 0.1 --name ours {FEW}"
    r3.main(["train", "--model", str(folder), *flags.split()])
    return r3.RUNS / "ours"


def test_heldout_and_transfer_print_their_tables(run, capsys):
    experiments.main(f"heldout --runs {run} --split test --limit 3 --temperature 1".split())
    experiments.main(f"heldout --runs {run} --split test --limit 3".split())
    experiments.main(f"transfer --run {run} --limit 3".split())
    printed = capsys.readouterr().out
    for title in (
        "3 test problems, 2 samples each, temperature 1: % correct [95% interval]",
        "3 test problems, 1 sample each, temperature 0: % correct [95% interval]",
        "both: 3 dev problems, 2 samples each: % correct [95% interval]",
        "the Python license",
    ):
        assert title in printed
    assert len(list(run.rglob("*heldout/*.jsonl"))) == 4


def test_divergence_and_perplexity_follow_their_definitions(run):
    _, vanilla = experiments.open_run(run)
    _, other = experiments.open_run(run)
    with torch.no_grad():
        other.model.lm_head.weight += 0.3 * torch.randn_like(other.model.lm_head.weight)
    problems = sentence.Sentence().load(limit=8)
    attempts = grpo.attempt_all(other, problems, 1, (0, 0))
    conversations = sum(grpo.rollout(other, attempts, 4, (0, 0)), [])
    divergence = experiments.divergence(other, vanilla, conversations)
    assert divergence > 1e-3
    assert abs(experiments.divergence(vanilla, vanilla, conversations)) < 1e-4 * divergence

    ids = vanilla.tokenizer.encode("The waves.")
    logprobs = vanilla.model(torch.tensor([ids]))[0].log_softmax(-1)  # (T, V)
    nll = -sum(logprobs[i, ids[i + 1]].item() for i in range(len(ids) - 1)) / (len(ids) - 1)
    assert experiments.perplexity(vanilla, "The waves.") == pytest.approx(math.exp(nll), rel=1e-4)
