"""SmolLM2-135M-Instruct, a real model: the words, the odds and the ids are transformers'.

R3_REAL_MODEL names its folder; where it is unset, a tool beside the repository makes one, once.
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
LENGTH = 24
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
    given = os.environ.get("R3_REAL_MODEL")
    if given:
        return Path(given)
    if given is None:  # set but empty: make one
        pytest.skip("minutes long: set R3_REAL_MODEL to a folder, or to nothing to make one")
    if not TOOL.is_file():
        pytest.skip(
            "no real model: R3_REAL_MODEL is not set, and the tool that makes one is absent"
        )
    kept = Path(request.config.cache.mkdir("real-model"))
    if not (kept / "whole").is_dir():
        made = subprocess.run([TOOL, kept / "part"], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"the real model could not be made: {made.stderr.strip()[-200:]}")
        (kept / "part").rename(kept / "whole")
    return kept / "whole"


@pytest.fixture(scope="module")
def ours(folder):
    return Model.from_pretrained(folder), Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def test_the_chat_is_encoded_and_decoded_as_by_transformers(ours, theirs):
    (_, our), (_, their) = ours, theirs
    replies = ["“Wien”, of course.\n\n```json\n[{}]\n```", "東京  🙂\t12,000 \n", "Fine."]
    agent = []
    for question, reply in zip(QUESTIONS[3:6], replies, strict=True):
        agent.append({"role": "user", "content": question})
        ids = their.apply_chat_template(agent, add_generation_prompt=True, return_dict=False)
        assert our.prompt(agent) == ids
        assert our.decode(ids) == their.decode(ids, skip_special_tokens=True)
        agent.append({"role": "assistant", "content": reply})
        said = our.encode(reply)
        assert our.decode(said + our.stop_ids) == reply == their.decode(said)
    turn_by_turn = our.prompt(agent[:1])
    for said, told in zip(replies, QUESTIONS[4:6], strict=False):
        turn_by_turn += our.next_turn(our.encode(said) + our.stop_ids, our.bridge(told))
    assert turn_by_turn == ids
    assert our.stop_ids == [their.convert_tokens_to_ids("<|im_end|>")] == [their.eos_token_id]


@torch.no_grad()
def test_perplexity_equals_transformers(ours, theirs):
    ids = torch.tensor([ours[1].encode(PARAGRAPH)])
    assert ids.shape[1] > 120 and ids.tolist() == theirs[1]([PARAGRAPH]).input_ids
    log_p = ours[0](ids)[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
    ppl = math.exp(-log_p.mean())
    assert ppl == pytest.approx(math.exp(theirs[0](ids, labels=ids).loss), rel=1e-4)
    assert 5 < ppl < 30  # English is what it was taught


@torch.no_grad()
def test_greedy_replies_equal_transformers(ours, theirs):
    """20 prompts in one batch, token by token, to the end or to a tie of the two likeliest."""
    (our, tokenizer), (their, their_tokenizer) = ours, theirs
    prompts = [tokenizer.prompt([{"role": "user", "content": q}]) for q in QUESTIONS]
    assert len(prompts) == 20 and len({len(prompt) for prompt in prompts}) > 12
    drawn = generate(
        our, prompts, max_new_tokens=LENGTH, temperature=0, stop=tokenizer.stop_ids
    ).tokens
    batch = their_tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    replies = their.generate(**batch, max_new_tokens=LENGTH, do_sample=False, use_cache=True)
    replies = replies[:, batch.input_ids.shape[1] :].tolist()
    [end] = tokenizer.stop_ids
    agree = ended = 0
    for prompt, (got,), want in zip(prompts, drawn, replies, strict=True):
        want = want[: want.index(end) + 1] if end in want else want  # what follows is padding
        if got == want:
            agree, ended = agree + 1, ended + (end in got)
            continue
        at = len(os.path.commonprefix([got, want]))  # neither is the other's beginning
        best = their(torch.tensor([prompt + want[:at]])).logits[0, -1].topk(2)
        assert best.values[0] - best.values[1] < 1e-3
        assert {got[at], want[at]} == set(best.indices.tolist())
    assert agree >= 15 and 0 < ended < agree
