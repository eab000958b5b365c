"""Models, problems and a verifier that several test files share."""

import contextlib
import json
import multiprocessing
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
import torch

import r3
from grpo import Agent, Turn
from model import Model, Tokenizer, tiny_model
from tasks import TinyCountdown, Verdict


@pytest.fixture(scope="session")
def task():
    return TinyCountdown()


def shallow_model(
    words: list[str], seed: int = 0, num_layers: int = 1, width: int = 1
) -> tuple[Model, Tokenizer]:
    """`tiny_model` without its upper layers. With one layer, it is two times as fast."""
    model, tokenizer = tiny_model(words, seed, width=width)
    small = Model({**model.config_dict, "num_hidden_layers": num_layers})
    small.load_state_dict(model.state_dict(), strict=False)
    return small, tokenizer


def enlarge_weights(model: Model) -> None:
    """Make the choices of an untrained model uneven."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


@pytest.fixture
def tiny(task):
    """An untrained tiny model with two layers, whose choices are uneven."""
    model, tokenizer = shallow_model(task.words(), seed=1, num_layers=2)
    enlarge_weights(model)
    return model, tokenizer


@pytest.fixture
def one_layer(task):
    """The same with one layer, for tests that train."""
    model, tokenizer = shallow_model(task.words(), seed=1)
    enlarge_weights(model)
    return model, tokenizer


def shrink_r3(patch: pytest.MonkeyPatch) -> None:
    """Make the runs of r3.py quick: a small tiny model, which answers correctly only by chance, and
    few problems for the learning curves."""
    patch.setattr(r3, "tiny_model", shallow_model)
    patch.setitem(r3.COLD_START, "steps", 4)  # instead of 4,000
    patch.setattr(r3, "CURVE_PROBLEMS", 3)


@contextlib.contextmanager
def few_threads() -> Iterator[None]:
    """Let torch use a single thread, or TEST_THREADS of them if this environment variable is set.
    For tiny models, several threads are slower: they wait for each other after each small
    operation, for very long if other processes use the cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def use_few_threads():
    with few_threads():
        yield


@pytest.fixture(scope="session")
def forks():
    """A context of `multiprocessing`, whose processes are forked from a server that has imported
    torch and other packages, because importing them takes seconds. It has imported neither this
    project nor `huggingface_hub`, which reads environment variables when it is imported.

    Tests run a program in such a process with `forks.Process(target=exec, args=(code, globals))`.
    """
    context = multiprocessing.get_context("forkserver")
    # torch._dynamo is imported here, because otherwise the optimizer would do it in each process.
    packages = "torch torch._dynamo safetensors.torch tokenizers jinja2.sandbox numpy filelock tqdm"
    context.set_forkserver_preload([*packages.split(), "pyarrow.parquet", "pytest"])
    first = context.Process(target=exec, args=("",))
    first.start()
    first.join()  # Now the server has imported everything.
    return context


@pytest.fixture(scope="session")
def base_folder(task, tmp_path_factory):
    """The folder of the tiny model of seed 0 in quick runs. It is made with as many threads as the
    runs that are compared with each other, because that number may change roundings."""
    with pytest.MonkeyPatch.context() as patch, few_threads():
        shrink_r3(patch)
        patch.setattr(r3, "RUNS", tmp_path_factory.mktemp("base"))
        return r3.make_tiny_model(task, 0)


def verdict_by_chance(agent: Agent, problem, turn: Turn) -> Verdict:
    """A verdict that depends on the token ids alone, in place of `Agent.verify`. About a third of
    the answers of an untrained model are correct."""
    correct = sum(turn.tokens) % 3 == 0
    return Verdict(correct, "correct" if correct else "wrong_value")


def countdown_file(path: Path, num_problems: int = 60) -> str:
    """Write a file of Countdown problems, each of which can be solved, and return its path."""
    rng, lines = random.Random(0), []
    for _ in range(num_problems):
        *added, last = numbers = rng.sample(range(1, 100), rng.choice((3, 4)))
        lines.append(json.dumps({"nums": numbers, "target": sum(added) - last}) + "\n")
    path.write_text("".join(lines))
    return str(path)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose tokens are single bytes, with the ChatML template."""
    byte_tokens = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    special_tokens = ["<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*byte_tokens, *special_tokens])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(special_tokens)
    settings = {"chat_template": CHATML, "eos_token": "<|im_end|>"}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return Tokenizer(tokenizer, settings, {})


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder with an untrained model whose tokens are single bytes."""
    config = dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=300, hidden_size=16,
        intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Model(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[257] *= 3  # makes <|im_end|> likelier: some turns end
    model.save_pretrained(tmp_path / "letters")
    byte_tokenizer().save_pretrained(tmp_path / "letters")
    return tmp_path / "letters"
