"""The task of tests/sentence.py: its verifier under attack, and its splits."""

import itertools
import math
import time

import experiments
import pytest
import sentence
import torch

import grpo
import r3

PROBLEM = sentence.Life(0, "by the sea", use="kettle", avoid="stone")
TASK = sentence.Sentence()


@pytest.mark.parametrize(
    "text",
    [
        "The kettle sings while the waves roll in.",
        "  Kettle after kettle of tea keeps my old father warm!\n",
        "Why is the fisherman's kettle always hot, even at night?",
        '"The kettle is full of sea-water again"',
        "A " + "very " * 17 + "old kettle stands on my table.",
        "The kettle sings while the waves roll in and then",  # cut at the longest turn
    ],
)
def test_a_sentence_is_right(text):
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
def test_an_attack_is_wrong_and_the_reason_is_told(reason):
    begun = time.process_time()
    for text in ATTACKS[reason]:
        verdict = TASK.verify(PROBLEM, text)
        assert not verdict.correct and verdict.reason == reason, text[:80]
    assert time.process_time() - begun < 1


def test_no_text_of_the_question_is_an_answer():
    """Nor is the answer of the example, nor a list of all words."""
    texts = [m["content"] for m in TASK.messages(PROBLEM)[0]]
    texts += [part for text in texts for part in text.split(". ")]
    texts += [" ".join(words.split()) for words in sentence.WORDS.values()]
    for problem in (PROBLEM, *TASK.load(split="train", limit=5)):
        assert not any(TASK.verify(problem, text).correct for text in texts)


def test_no_word_of_a_split_occurs_in_another():
    splits = {split: TASK.load(split=split) for split in sentence.WORDS}
    found = {split: {w for p in of for w in (p.use, p.avoid)} for split, of in splits.items()}
    assert all(found[a].isdisjoint(found[b]) for a, b in itertools.combinations(found, 2))
    assert {s: len(words) for s, words in found.items()} == {"train": 42, "dev": 14, "test": 28}
    places = {word for place in sentence.PLACES.split(",") for word in place.split()}
    assert all(words.isdisjoint(places) for words in found.values())


def test_problems_are_numbered_different_and_drawn_from_the_seed():
    one, two = (TASK.load(split="test", limit=50, seed=seed) for seed in (1, 2))
    assert one == TASK.load(split="test", limit=50, seed=1) != two
    assert [p.id for p in one] == list(range(50))
    assert len({(p.place, p.use, p.avoid) for p in one}) == 50
    assert all(p.use != p.avoid for p in one + two)


def test_the_question_names_both_words():
    [*_, asked], tools = TASK.messages(PROBLEM)
    assert tools is None and asked["content"].endswith(
        "sentence about life by the sea. Use the word kettle, but not the word stone."
    )


# -- Experiments on a finished run of it -----------------------------------------------------------

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
        "3 test problems, 2 samples each, temperature-1: % right [95%]",
        "3 test problems, 1 samples each, temperature-0: % right [95%]",
        "both: 3 dev problems, 2 samples each: % right [95%]",
        "the Python licence",
    ):
        assert title in printed
    assert len(list(run.rglob("*heldout/*.jsonl"))) == 4


def test_divergence_and_perplexity_are_what_they_say(run):
    c, vanilla = experiments.open_run(run)
    _, other = experiments.open_run(run)
    with torch.no_grad():
        other.model.lm_head.weight += 0.3 * torch.randn_like(other.model.lm_head.weight)
    problems = sentence.Sentence().load(limit=8)
    conversations = grpo.rollout(other, grpo.attempt_all(other, problems, 1, (0, 0)), 4, (0, 0))
    assert experiments.divergence(vanilla, vanilla, conversations) == 0
    assert experiments.divergence(other, vanilla, conversations) > 0

    ids = vanilla.tokenizer.encode("The waves.")
    log_p = vanilla.model(torch.tensor([ids]))[0].log_softmax(-1)
    nll = -sum(log_p[i, ids[i + 1]].item() for i in range(len(ids) - 1)) / (len(ids) - 1)
    assert experiments.perplexity(vanilla, "The waves.") == pytest.approx(math.exp(nll), rel=1e-5)
