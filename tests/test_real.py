"""A real model, SmolLM2-135M-Instruct, gives the same token ids, probabilities and replies as with
transformers.

These tests take minutes, so they are skipped unless the environment variable R3_REAL_MODEL is set:
to the model's folder, or to nothing if a tool beside the repository should make one, once.
"""

import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from model import Model, Tokenizer, generate

TOOL = Path(__file__).resolve().parents[2] / "shared" / "tools" / "real-model"
MAX_NEW_TOKENS = 24
QUESTIONS = [
    "Hi!",
    "What is 2 + 2? Answer with one number.",
    "What is the capital of France? Answer in one word.",
    "Say yes.",
    "Write a haiku about rain.",
    "Wie heißt die Hauptstadt von Österreich?",
    "¿Qué hora es?",
    "Translate to French: the cat sleeps.",
    "Name three colours.",
    "Count from 1 to 10.",
    "Using the numbers 3, 5 and 7, write an expression that is worth 22.",
    'Return JSON with the keys "name" and "age" for Ada, who is 36.',
    "def add(a, b):\n    return\n\nComplete the function.",
    "Why is the sky blue? Explain it to a child, in two sentences, without the word light.",
    "Is 97 a prime number? Think step by step, then answer yes or no.",
    "Who wrote the play Hamlet, and in about which year was it first performed in London?",
    "List the planets of the solar system in the order of their distance from the sun.",
    "Correct the spelling: I recieved teh adress yesterday, but it was definately wrong.",
    "Tom has 12 apples. He gives 3 to Ann, who has twice as many pears as he has apples left, and "
    "buys 5 more at the market for 40 cents each. How many apples does Tom have at the end?",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey? " * 2,
]
PARAGRAPH = (
    "The lighthouse stood at the end of a narrow strip of land, where the road gave way to stones "
    "and the stones gave way to the sea. Every evening, an hour before dark, the keeper climbed "
    "its one hundred and twelve steps, wiped the salt from the glass, and lit the lamp. He had "
    "done so for thirty years. Ships that he would never see changed their course because of him, "
    "and sailors whose names he would never learn came home. One winter a letter arrived: the "
    "light was to be run by a clock, and there would be no need of a keeper. He read it twice, put "
    "it in a drawer, and went upstairs, because it was almost dark."
)


@pytest.fixture(scope="module")
def folder(request) -> Path:
    """The folder of the real model."""
    given = os.environ.get("R3_REAL_MODEL")
    if given:
        return Path(given)
    if given is None:
        pytest.skip("takes minutes; set R3_REAL_MODEL to a folder, or to nothing to make one")
    if not TOOL.is_file():
        pytest.skip("R3_REAL_MODEL names no folder, and there is no tool that makes one")
    cache = Path(request.config.cache.mkdir("real-model"))
    unfinished, finished = cache / "part", cache / "whole"
    if not finished.is_dir():
        result = subprocess.run([TOOL, unfinished], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"the real model could not be made: {result.stderr.strip()[-200:]}")
        unfinished.rename(finished)
    return finished


@pytest.fixture(scope="module")
def ours(folder):
    """Our model and tokenizer."""
    return Model.from_pretrained(folder), Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    """The model and the tokenizer of transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def test_a_chat_is_encoded_and_decoded_as_by_transformers(ours, theirs):
    (_, our_tokenizer), (_, their_tokenizer) = ours, theirs
    replies = ["“Wien”, of course.\n\n```json\n[{}]\n```", "東京  🙂\t12,000 \n", "Fine."]
    questions, messages = QUESTIONS[3:6], []
    for question, reply in zip(questions, replies, strict=True):
        messages.append({"role": "user", "content": question})
        expected = their_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert our_tokenizer.prompt(messages) == expected
        text = their_tokenizer.decode(expected, skip_special_tokens=True)
        assert our_tokenizer.decode(expected) == text
        messages.append({"role": "assistant", "content": reply})
        reply_ids = our_tokenizer.encode(reply)
        assert our_tokenizer.decode(reply_ids + our_tokenizer.stop_ids) == reply
        assert their_tokenizer.decode(reply_ids) == reply
    turn_by_turn = our_tokenizer.prompt(messages[:1])
    for reply, question in zip(replies[:2], questions[1:], strict=True):
        turn_by_turn += our_tokenizer.append_bridge(
            our_tokenizer.encode(reply) + our_tokenizer.stop_ids, our_tokenizer.bridge(question)
        )
    assert turn_by_turn == expected
    end_of_turn = their_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert our_tokenizer.stop_ids == [end_of_turn] == [their_tokenizer.eos_token_id]


@torch.no_grad()
def test_perplexity_equals_that_of_transformers(ours, theirs):
    (our_model, our_tokenizer), (their_model, their_tokenizer) = ours, theirs
    ids = torch.tensor([our_tokenizer.encode(PARAGRAPH)])
    assert ids.shape[1] > 120 and ids.tolist() == their_tokenizer([PARAGRAPH]).input_ids
    logprobs = our_model(ids)[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
    perplexity = math.exp(-logprobs.mean())
    expected = math.exp(their_model(ids, labels=ids).loss)
    assert perplexity == pytest.approx(expected, rel=1e-4)
    assert 5 < perplexity < 30  # The model was trained on English.


@torch.no_grad()
def test_greedy_replies_equal_those_of_transformers(ours, theirs):
    """20 prompts in one batch, token by token, to the end or to a tie of the two best tokens."""
    (our_model, our_tokenizer), (their_model, their_tokenizer) = ours, theirs
    prompts = [our_tokenizer.prompt([{"role": "user", "content": q}]) for q in QUESTIONS]
    assert len(prompts) == 20 and len({len(prompt) for prompt in prompts}) > 12
    [end_of_turn] = stop_ids = our_tokenizer.stop_ids
    our_replies = generate(
        our_model, prompts, max_new_tokens=MAX_NEW_TOKENS, temperature=0, stop=stop_ids
    ).tokens
    batch = their_tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    their_replies = their_model.generate(
        **batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, use_cache=True
    )
    their_replies = their_replies[:, batch.input_ids.shape[1] :].tolist()
    equal = ended = 0
    for prompt, (our_reply,), their_reply in zip(prompts, our_replies, their_replies, strict=True):
        if end_of_turn in their_reply:  # What follows is padding.
            their_reply = their_reply[: their_reply.index(end_of_turn) + 1]
        if our_reply == their_reply:
            equal, ended = equal + 1, ended + (end_of_turn in our_reply)
            continue
        # They differ at some token, because neither can be the beginning of the other.
        position = len(os.path.commonprefix([our_reply, their_reply]))
        ids = torch.tensor([prompt + their_reply[:position]])
        best = their_model(ids).logits[0, -1].topk(2)
        assert best.values[0] - best.values[1] < 1e-3
        assert {our_reply[position], their_reply[position]} == set(best.indices.tolist())
    assert equal >= 15 and 0 < ended < equal
