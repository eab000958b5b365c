"""Files that are read and written, and what happens if a file, a model, or the hub fails."""

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import errors as hub_errors

import model as models
from model import Model, Tokenizer, generate, replace_file

USER = {"role": "user", "content": "Hello."}
ASSISTANT = {"role": "assistant", "content": "Hi."}


# -- The sampler -----------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("where", ["everywhere", "one weight"])
def test_logits_that_are_not_finite_end_generate_with_an_explanation(tiny, where, temperature, bad):
    model, tokenizer = tiny
    with torch.no_grad():
        weight = model.model.norm.weight
        weight[slice(None) if where == "everywhere" else slice(1)] = bad
    with pytest.raises(ValueError, match="are not finite numbers, or too large: the model"):
        generate(
            model, [[1, 2], [3]], 3, max_new_tokens=9, temperature=temperature,
            stop=tokenizer.stop_ids,
        )  # fmt: skip


@pytest.mark.parametrize("temperature", [1e-40, 1e-300])
def test_a_temperature_that_is_too_close_to_zero_is_refused(tiny, temperature):
    model, _ = tiny
    with pytest.raises(ValueError, match=f"temperature of {temperature}, are not finite"):
        generate(model, [[1, 2]], 3, max_new_tokens=4, temperature=temperature)


def test_a_token_is_sampled_within_the_vocabulary_even_from_nan():
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, float("nan"), 3.0]])
    token, logprob = models.sample_tokens(logits, torch.tensor([0.5, 0.5]), 1.0)
    assert token.max() < 3 and logprob.isfinite().tolist() == [True, False]


def test_a_token_with_a_logit_of_minus_infinity_is_never_sampled_but_no_error():
    logits = torch.tensor([[0.0, float("-inf"), 0.0]]).expand(100, 3)
    token, logprob = models.sample_tokens(logits, torch.linspace(0, 0.999, 100), 1.0)
    assert set(token.tolist()) == {0, 2} and logprob.isfinite().all()


# -- Stop tokens -----------------------------------------------------------------------------------
def edit_json(path: Path, **changes) -> None:
    """Change entries of a JSON file; None removes an entry."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def saved_generation_config(source: Path, target: Path) -> transformers.GenerationConfig:
    """What transformers reads after our classes have loaded a folder and saved it elsewhere."""
    Tokenizer.from_pretrained(source).save_pretrained(target)
    Model.from_pretrained(source).save_pretrained(target)
    return transformers.AutoModelForCausalLM.from_pretrained(target).generation_config


def test_a_saved_model_stops_in_transformers(folder, tmp_path):
    """Also if the source has no generation_config.json, or an empty one."""
    for has_file in (True, False):
        if has_file:
            (folder / "generation_config.json").write_text("{}")
        else:
            (folder / "generation_config.json").unlink()
        assert saved_generation_config(folder, tmp_path / "saved").eos_token_id == [257]
    prompt = Tokenizer.from_pretrained(tmp_path / "saved").prompt([USER])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():  # the next token is always <|im_end|>
        theirs.get_output_embeddings().weight = torch.nn.Parameter(torch.zeros(300, 16))
        theirs.lm_head.register_forward_hook(
            lambda module, args, logits: logits.index_fill(-1, torch.tensor([257]), 1.0)
        )
    ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)
    assert ids[0, len(prompt) :].tolist() == [257]


def test_what_a_generation_config_contains_is_kept(folder, tmp_path):
    generation = {"eos_token_id": [100, 200], "pad_token_id": 3, "top_p": 0.8, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    saved = saved_generation_config(folder, tmp_path / "saved")
    assert (saved.pad_token_id, saved.top_p) == (3, 0.8)
    assert saved.eos_token_id == [100, 200, 257] == Tokenizer.from_pretrained(folder).stop_ids
    again = Tokenizer.from_pretrained(tmp_path / "saved")
    assert again.stop_ids == [100, 200, 257]


@pytest.mark.parametrize("eos", [100, [100, 200], None])
def test_config_json_names_the_stop_tokens_without_a_generation_config(folder, tmp_path, eos):
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=eos, pad_token_id=7)
    expected = [] if eos is None else [eos] if isinstance(eos, int) else eos
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert theirs.eos_token_id == eos and theirs.pad_token_id == 7
    assert Tokenizer.from_pretrained(folder).stop_ids == [*expected, 257]
    saved = saved_generation_config(folder, tmp_path / "saved")
    assert (saved.eos_token_id, saved.pad_token_id) == ([*expected, 257], 7)


def test_a_generation_config_takes_precedence_over_config_json(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 200}))
    edit_json(folder / "config.json", eos_token_id=100)
    assert Tokenizer.from_pretrained(folder).stop_ids == [200, 257]


def test_a_model_without_any_stop_token_is_refused(folder):
    (folder / "generation_config.json").unlink()
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ValueError, match="tokenizer_config.json name no stop token"):
        Tokenizer.from_pretrained(folder)
    edit_json(folder / "config.json", eos_token_id=100)
    assert Tokenizer.from_pretrained(folder).stop_ids == [100]


# -- Writing files ---------------------------------------------------------------------------------
WEIGHTS = {"weight": torch.zeros(1000)}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_all_files_have_the_permissions_that_the_umask_allows(tiny, tmp_path, umask):
    model, tokenizer = tiny
    before = os.umask(umask)
    try:
        for _ in range(2):  # also when the files are replaced, after a kill left a private one
            (tmp_path / "model.safetensors.tmp").touch(0o600)
            model.save_pretrained(tmp_path)
            tokenizer.save_pretrained(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 5 and set(modes.values()) == {0o666 & ~umask}, modes


@pytest.mark.parametrize("content", ["text", WEIGHTS], ids=["text", "tensors"])
def test_a_file_is_flushed_to_disk_through_a_writable_descriptor(tmp_path, monkeypatch, content):
    """Windows refuses to flush a file that was opened for reading."""
    access_modes, fsync = [], os.fsync

    def record_and_fsync(descriptor):
        access_modes.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_and_fsync)
    replace_file(tmp_path / "file", content)
    assert access_modes and os.O_RDONLY not in access_modes


# The program of a process that writes a larger checkpoint to `path`, and is killed meanwhile.
WRITE_AND_BE_KILLED = """
import resource, signal, sys
import torch
sys.path.insert(0, root)
from model import replace_file
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # kill the process at the limit of the file size
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
replace_file(path, {"weight": torch.zeros(100_000)})
"""


def test_what_a_kill_leaves_behind_is_deleted_by_the_next_write(forks, tmp_path):
    path = tmp_path / "model" / "model.safetensors"
    replace_file(path, WEIGHTS)
    (path.parent / ".tmpAb3xYz").touch()  # what an earlier kill has left
    variables = {"root": str(Path(models.__file__).parent), "path": path}
    process = forks.Process(target=exec, args=(WRITE_AND_BE_KILLED, variables))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGXFSZ
    assert models.safetensors.torch.load_file(path)["weight"].shape == (1000,)
    leftovers = {leftover.name for leftover in path.parent.iterdir()} - {path.name}
    assert any(name.startswith(".tmp") for name in leftovers) and ".tmpAb3xYz" not in leftovers
    replace_file(path, WEIGHTS)
    assert list(path.parent.iterdir()) == [path]


def test_other_hidden_files_are_not_deleted(tmp_path):
    for name in (".tmp", ".tmp-notes.txt", ".gitignore"):
        (tmp_path / name).touch()
    replace_file(tmp_path / "model.safetensors", WEIGHTS)
    assert len(list(tmp_path.iterdir())) == 4


# -- Chat templates --------------------------------------------------------------------------------
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
MARKED = """{% for message in messages %}
    {% if message.role == 'assistant' %}
        {% generation %}
            {% set text = message.content | trim %}
            {{ text }}{{ loop.index }}{{ eos_token }}
        {% endgeneration %}
        {{- text is defined }}
    {% else %}
{{ message.content }}
    {%- endif %}
{% endfor %}"""
DATED = """{{ strftime_now('%d %b %Y') }} {{ strftime_now("Today is %A, the %d. It is %H:%M.") }}
{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"""
NAMED = [
    {"name": "default", "template": "default {{ messages[-1].content }}"},
    {"name": "rag", "template": "{% invalid %}"},
    {"name": "tool_use", "template": "with {{ tools | length }} tools {{ messages[-1].content }}"},
]


class FixedClock(datetime):
    """For transformers, whose templates see the clock."""

    @classmethod
    def now(cls):
        return models.TEMPLATE_DATE


def assert_rendered_as_by_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compare the texts of several conversations, and return them."""
    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", FixedClock)
    ours = Tokenizer.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    texts = []
    for messages in ([USER], [USER, ASSISTANT], [USER, ASSISTANT, USER, ASSISTANT]):
        for tools in (None, TOOLS):
            texts.append(ours.render(messages, tools, add_generation_prompt=False))
            assert texts[-1] == theirs.apply_chat_template(messages, tools, tokenize=False)
    return texts


@pytest.mark.parametrize("template", [MARKED, DATED, NAMED], ids=["marked", "dated", "named"])
def test_a_template_is_rendered_as_by_transformers(folder, tmp_path, monkeypatch, template):
    """Also after it was saved by our tokenizer, or by the one of transformers."""
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    texts = assert_rendered_as_by_transformers(folder, monkeypatch)
    Tokenizer.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    assert assert_rendered_as_by_transformers(tmp_path / "ours", monkeypatch) == texts
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "chat_template.jinja").is_file()
    assert assert_rendered_as_by_transformers(tmp_path / "theirs", monkeypatch) == texts


def test_a_prompt_is_the_same_on_every_day(folder):
    """So that a run can be resumed on the next day. The clock has no influence."""
    edit_json(folder / "tokenizer_config.json", chat_template=DATED)
    text = Tokenizer.from_pretrained(folder).render([USER])
    assert text.startswith("26 Jul 2024 Today is Friday, the 26. It is 00:00.\nHello.")


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "no chat template: use an instruct model"),
        ([], "no chat template: use an instruct model"),
        (NAMED[1:], "one of them has to be named default"),
        ([{"name": "default"}], "no chat template"),
        ([{"name": "default", "template": 5}], "no chat template"),
        (["default"], "no chat template"),
        ({"default": "text"}, "no chat template"),
        (5, "no chat template"),
        ("{% generation %}", "the chat template is not a valid jinja2 template"),
        ([{"name": "default", "template": "{% x %}"}], "not a valid jinja2 template"),
    ],
)
def test_a_chat_template_that_is_missing_or_not_valid_is_refused(folder, template, message):
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(folder)


def test_a_template_for_tools_is_used_in_prompts(folder):
    edit_json(folder / "tokenizer_config.json", chat_template=NAMED)
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.prompt([USER], TOOLS)) == "with 1 tools Hello."
    assert tokenizer.decode(tokenizer.prompt([USER])) == "default Hello."


# -- The parameters of RoPE ------------------------------------------------------------------------
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_parameters": PLAIN},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": LLAMA3},
        {"rope_theta": 900.0, "rope_parameters": PLAIN},
        {"rope_theta": 900.0, "rope_parameters": PLAIN, "rope_scaling": LLAMA3},
        {"rope_parameters": PLAIN, "rope_scaling": {**LLAMA3, "rope_theta": 700.0}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}, "rope_scaling": PLAIN},
        {"rope_parameters": PLAIN, "rope_scaling": LLAMA3},
        {"rope_parameters": PLAIN, "rope_scaling": {}},
        {"rope_parameters": PLAIN, "rope_scaling": None},
        {"rope_scaling": {"type": "default"}, "rope_theta": 500.0},
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "olmo2"])
def test_the_frequencies_of_rope_equal_transformers(folder, model_type, entries):
    config = {**json.loads((folder / "config.json").read_text()), **entries}
    config |= {"model_type": model_type, "head_dim": 16, "hidden_size": 32, "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder))
    ours = Model(config).inv_freq
    expected = theirs.rotary_emb.inv_freq
    assert ours.shape == expected.shape and ((ours - expected).abs() / expected).max() < 1e-5


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"rope_scaling": YARN}, "rope_type 'yarn' is not supported"),
        ({"rope_parameters": YARN}, "rope_type 'yarn' is not supported"),
        ({"rope_parameters": PLAIN, "rope_scaling": YARN}, "rope_type 'yarn' is not supported"),
        ({"rope_parameters": PLAIN, "rope_scaling": {"type": "yarn"}}, "rope_type 'yarn'"),
        (
            {"rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN}},
            r"rope_parameters per layer type \(full_attention\) are not supported",
        ),
        ({"rope_parameters": {"full_attention": PLAIN}}, "are not supported"),
    ],
)
def test_scaling_of_rope_that_is_not_supported_is_refused(folder, entries, message):
    edit_json(folder / "config.json", **entries)
    with pytest.raises(ValueError, match=message):
        Model.from_pretrained(folder)


# -- The hub ---------------------------------------------------------------------------------------
def hub_error(error_class: type, message: str, cause: Exception | None = None) -> Exception:
    """An exception of huggingface_hub, whose constructors require the response of a server."""
    error = error_class.__new__(error_class)
    error.args, error.__cause__ = (message,), cause
    return error


RESTRICTED = hub_error(hub_errors.GatedRepoError, "401 Client Error. (Request ID: 1)\n\nCannot …")
NOT_FOUND = hub_error(hub_errors.RepositoryNotFoundError, "401 Client Error. (Request ID: 1)\n\n…")
NO_NETWORK = hub_error(
    hub_errors.LocalEntryNotFoundError,
    "Got: ConnectError: Name or service not known\nAn error happened",
    ConnectionError("Name or service not known"),
)
OFFLINE = hub_error(
    hub_errors.LocalEntryNotFoundError,
    "Cannot find an appropriate cached snapshot folder",
    hub_errors.OfflineModeIsEnabled("offline mode is enabled. Unset `HF_HUB_OFFLINE`."),
)


@pytest.mark.parametrize(
    "error, repo_type, message",
    [
        (
            RESTRICTED,
            "dataset",
            "access to org/name is restricted: accept the terms at "
            "https://huggingface.co/datasets/org/name, then log in with `hf auth login`",
        ),
        (
            RESTRICTED,
            "model",
            "access to org/name is restricted: accept the terms at "
            "https://huggingface.co/org/name, then log in with `hf auth login`",
        ),
        (
            NOT_FOUND,
            "model",
            "org/name: no such file or folder, and https://huggingface.co/org/name does not exist "
            "(if it is private, log in with `hf auth login`)",
        ),
        (
            NO_NETWORK,
            "model",
            "org/name: no such file or folder; it has not been downloaded before, and the hub "
            "cannot be reached: Name or service not known",
        ),
        (
            OFFLINE,
            "model",
            "org/name: no such file or folder; it has not been downloaded before, and the hub "
            "cannot be reached: offline mode is enabled. Unset `HF_HUB_OFFLINE`.",
        ),
        (
            hub_error(hub_errors.HfHubHTTPError, "401 Client Error. (ID: 1)\n\nInvalid token."),
            "model",
            "org/name: no such file or folder, and the download from the hub failed: "
            "401 Client Error. (ID: 1) Invalid token.",
        ),
        (
            OSError(28, "No space left on device"),
            "model",
            "org/name: no such file or folder, and the download from the hub failed: "
            "[Errno 28] No space left on device",
        ),
    ],
)
def test_what_the_hub_answers_is_explained(monkeypatch, error, repo_type, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError) as caught:
        models.local_path("org/name", ["*"], repo_type)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["nowhere", "../org/name", "/org/name", "runs/a/model", "./name"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(monkeypatch, tmp_path, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="^[./a-z]+: no such file or folder, nor a hub id"):
        models.local_path(name, ["*"])


# -- Requirements ----------------------------------------------------------------------------------
def test_a_template_cannot_leave_the_sandbox(folder):
    """jinja2 before 3.1.6 let a template call str.format through the filter `attr`."""
    template = "{{ ('{0.__class__}' | attr('format'))(cycler) }}"
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    assert "class" not in Tokenizer.from_pretrained(folder).render([USER])


def test_vulnerable_or_wasteful_versions_are_not_allowed():
    lines = (Path(models.__file__).parent / "requirements.txt").read_text().splitlines()
    requirements = [line.partition("#")[0].strip() for line in lines]
    assert "jinja2>=3.1.6" in requirements and "safetensors>=0.8" in requirements


MEASURE_SAVING = """
import re, sys
from pathlib import Path
import torch
from model import replace_file
def peak_memory():  # in KiB
    return int(re.search("VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
tensors = {str(i): torch.ones(2**21) for i in range(16)}  # 128 MiB
replace_file(Path(sys.argv[1]) / "small", {"0": torch.ones(1)})
before = peak_memory()
replace_file(Path(sys.argv[1]) / "large", tensors)
print(peak_memory() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_saving_does_not_copy_the_checkpoint(tmp_path):
    """safetensors before 0.8 made a copy of all tensors."""
    root = Path(models.__file__).parent
    command = [sys.executable, "-c", MEASURE_SAVING, str(tmp_path)]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 2**14  # KiB, an eighth of the tensors
