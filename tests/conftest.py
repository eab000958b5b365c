import json
import random

import pytest
import tokenizers
import torch

import model as models
from tasks import TinyCountdown


@pytest.fixture(scope="session")
def task():
    return TinyCountdown()


@pytest.fixture
def tiny(task):
    """An untrained tiny model, its weights drawn wide enough that its choices are not uniform."""
    model, tokenizer = models.tiny_model(task.words(), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model, tokenizer


def countdown_file(path, n=60) -> str:
    """Write a data file of n Countdown problems, each of which can be solved; returns its path."""
    rng, lines = random.Random(0), []
    for _ in range(n):
        *added, last = numbers = rng.sample(range(1, 100), rng.choice((3, 4)))
        lines.append(json.dumps({"nums": numbers, "target": sum(added) - last}) + "\n")
    path.write_text("".join(lines))
    return str(path)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    """An untrained model that reads any text, byte by byte: a Hugging Face folder."""
    bytes_ = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate([*bytes_, "<|im_start|>", "<|im_end|>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(words)[-2:])
    settings = {"chat_template": CHATML, "eos_token": "<|im_end|>"}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    config = dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=300, hidden_size=16,
        intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = models.Model(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[257] *= 3  # turns end now and then
    model.save_pretrained(tmp_path / "letters")
    models.Tokenizer(tokenizer, settings, {}).save_pretrained(tmp_path / "letters")
    return tmp_path / "letters"
