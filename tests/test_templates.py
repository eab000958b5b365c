"""Real chat templates: the same text and token ids as in transformers, turn by turn.

The templates of the Qwen, Llama, and Phi families come with the package trl. SmolLM2's is below.
The tokenizers have one token per byte, and the special tokens of each family.
"""

import copy
import importlib.util
import itertools
import json
import re
from pathlib import Path

import jinja2
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from model import Tokenizer, add_tool_descriptions
from tasks import APIGen, Countdown, CountdownProblem

RECORDS = Path(__file__).resolve().parents[2] / "shared" / "data" / "apigen_bfcl.json"

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
HEADERS += ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
ROLES = ["<|user|>", "<|assistant|>", "<|system|>"]
LLAMA = dict(special=HEADERS, bos="<|begin_of_text|>", eos="<|eot_id|>")
LLAMA_STOPS = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
PHI_STOPS = ["<|end|>", "<|assistant|>", "<|endoftext|>"]
FAMILIES = {
    "smollm2": dict(special=CHATML, bos="<|im_start|>", eos="<|im_end|>", stops=["<|im_end|>"]),
    "qwen2_5": dict(special=CHATML, bos=None, eos="<|im_end|>", stops=CHATML[::-2]),
    "qwen3": dict(special=CHATML, bos=None, eos="<|im_end|>", stops=CHATML[::-2]),
    "llama3": {**LLAMA, "stops": ["<|end_of_text|>", "<|eot_id|>"]},
    "llama3_1": {**LLAMA, "stops": LLAMA_STOPS},
    "llama3_2": {**LLAMA, "stops": LLAMA_STOPS},
    "phi3_5": dict(
        special=["<|end|>", "<|endoftext|>"], bos="<s>", eos="<|endoftext|>", stops=PHI_STOPS
    ),
}
SHOWS_TOOLS = {"qwen2_5", "qwen3", "llama3_1", "llama3_2"}
DATE = {
    "date_string": "26 Jul 2024"
}  # the date in Llama's templates if they do not know the current one

every_family = pytest.mark.parametrize("family", FAMILIES)


def function(name: str, description: str, **properties: str) -> dict:
    properties = {key: {"type": kind, "description": key} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    about = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": about}


TOOLS = [
    function("wetter", 'Says "how it is" <outside> & in Zürich, 東京 or O\'Hare', place="string"),
    function("file_claim", "Ends a {{ contract }} 🙂", type="string", amount="number"),
]
SYSTEM = {"role": "system", "content": " Be brief & <kind>.\n"}
USER = {"role": "user", "content": "Wie ist's in “Zürich”? {{ 1 }} {% x %}"}
ATTEMPT = {
    "role": "assistant",
    "content": '[{"name": "wetter",\n\t"place": "Zürich"}]\n\nÜber & <b>',
}
THOUGHT = {"role": "assistant", "content": "<think>\nhm, “东”\n</think>\n\nIt is <5 °C.\n"}
FOLLOW_UP = {"role": "user", "content": "\nThat's wrong.\nWhy?"}
LAST_REQUEST = {"role": "user", "content": "Again 🙂"}
CONVERSATIONS = [
    [*start, USER, *rest]
    for start in ([], [SYSTEM])
    for rest in ([], [ATTEMPT], [ATTEMPT, FOLLOW_UP], [THOUGHT, FOLLOW_UP, ATTEMPT, LAST_REQUEST])
]


def real_template(family: str) -> str:
    if family == "smollm2":
        return SMOLLM2
    package = importlib.util.find_spec("trl")  # found, not imported
    if package is None:
        pytest.skip("the real templates come with trl, which is not installed")
    path = Path(package.submodule_search_locations[0], "chat_templates", f"{family}.jinja")
    if not path.is_file():
        pytest.skip(f"this version of trl ships no template of {family}")
    return path.read_text(encoding="utf-8")


def bytes_tokenizer(special: list[str] = CHATML, stripping: list[str] = ROLES):
    """256 bytes and special tokens. Those in `stripping` swallow the whitespace after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, rstrip=True) for t in stripping])
    return tokenizer


def with_template(template, tokenizer=None, **settings) -> Tokenizer:
    settings = {"eos_token": "<|im_end|>", "chat_template": template, **settings}
    return Tokenizer(tokenizer or bytes_tokenizer(), settings, {})


def both(family: str):
    """Our tokenizer and that of transformers, with the same template and vocabulary."""
    f, template = FAMILIES[family], real_template(family)
    tokenizer = bytes_tokenizer(f["special"] + [f["bos"]] * (f["bos"] == "<s>"))
    special = {"eos_token": f["eos"]} | ({"bos_token": f["bos"]} if f["bos"] else {})
    stops = [tokenizer.token_to_id(stop) for stop in f["stops"]]
    settings = {**special, "chat_template": template}
    if f["bos"]:  # put before a text; but a template writes it itself
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[f["bos"], "$A"], special_tokens=[(f["bos"], tokenizer.token_to_id(f["bos"]))]
        )
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    return Tokenizer(tokenizer, settings, {"eos_token_id": stops}), theirs


@every_family
def test_texts_and_ids_equal_transformers(family):
    """All forms of conversations in R3, with and without tools. Both reject the same ones."""
    ours, theirs = both(family)
    seen, refused = set(), []
    for messages, tools, opened in itertools.product(
        [*CONVERSATIONS, [SYSTEM]], (None, TOOLS), (True, False)
    ):
        before = copy.deepcopy((messages, tools))
        options = dict(tools=tools, add_generation_prompt=opened, **DATE)
        try:
            expected = theirs.apply_chat_template(messages, tokenize=False, **options)
        except jinja2.TemplateError:
            refused.append(messages)
            with pytest.raises(ValueError, match="template rejects"):
                ours.render(messages, tools, add_generation_prompt=opened)
            continue
        assert ours.render(messages, tools, add_generation_prompt=opened) == expected
        assert (messages, tools) == before
        seen.add(expected)
        if opened:
            assert ours.render(messages, tools) == expected
            ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
            if tools is None or family in SHOWS_TOOLS:
                assert ours.prompt(messages, tools) == ids
            assert ours.encode(expected) == ids
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    # Llama 3.1 puts tools into the first turn of the user, and rejects conversations without one.
    assert refused == ([[SYSTEM], [SYSTEM]] if family in ("llama3_1", "llama3_2") else [])
    assert len(seen) == 18 * (2 if family in SHOWS_TOOLS else 1) - len(refused)


def their_prompt(
    theirs, family: str, messages: list[dict], tools: list[dict] | None = None
) -> list[int]:
    """The prompt by transformers. Tools are described in words if the template ignores them."""
    if tools and family not in SHOWS_TOOLS:
        messages, tools = add_tool_descriptions(messages, tools), None
    options = dict(add_generation_prompt=True, return_dict=False, **DATE)
    return theirs.apply_chat_template(messages, tools=tools, **options)


@every_family
def test_every_prompt_contains_the_tools(family):
    """Either by the template, without escapes, or in words if the template ignores them; once."""
    ours, theirs = both(family)
    for messages in CONVERSATIONS:
        if messages[-1]["role"] == "user":
            assert ours.prompt(messages, TOOLS) == their_prompt(theirs, family, messages, TOOLS)
    text = ours.tokenizer.decode(ours.prompt([USER], TOOLS), skip_special_tokens=False)
    assert text.count("<outside> & in Zürich, 東京 or O'Hare") == 1
    assert text.count(USER["content"]) == 1
    assert ("You can call these functions" in text) is (family not in SHOWS_TOOLS)
    assert ours.prompt([USER]) == ours.encode(ours.render([USER]))


@pytest.mark.skipif(not RECORDS.is_file(), reason="the real records are not here")
@every_family
def test_prompts_of_real_records_contain_all_tools(family):
    """The text contains the query and the tools unchanged. Some prompts are compared as a whole."""
    ours, theirs = both(family)
    task, compared = APIGen(), 0
    problems = task.load(str(RECORDS), split="all")
    assert len(problems) == 1_000
    for problem in problems:
        messages, tools = task.messages(problem)
        ids = ours.prompt(messages, tools)
        text = ours.tokenizer.decode(ids, skip_special_tokens=False)
        assert text.count(problem.query.strip()) == 1  # some templates strip what is said
        dense = re.sub(r"\s", "", text)  # some templates indent the tools
        for tool in tools:
            function = json.dumps(tool["function"], ensure_ascii=False)
            assert re.sub(r"\s", "", function) in dense
        if problem.id % 20 == 0 or not problem.query.isascii():
            assert ids == their_prompt(theirs, family, messages, tools)
            compared += 1
    assert compared >= 60


def test_whether_a_template_shows_tools_is_decided_by_its_output():
    """A template may mention tools without showing them, or show them in some conversations."""

    def in_words(ours, messages):
        return "You can call these functions" in ours.decode(ours.prompt(messages, TOOLS))

    says = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert in_words(with_template("{% if tools %}{# tools #}{% endif %}tools" + says), [USER])
    ours = with_template("{% if messages[0].role == 'system' %}{{ tools }}{% endif %}" + says)
    assert [in_words(ours, messages) for messages in ([USER], [SYSTEM, USER])] == [True, False]


def test_add_tool_descriptions_precede_the_last_message():
    """All tools are listed as JSON, and the conversation is otherwise unchanged."""
    for messages in CONVERSATIONS:
        before = copy.deepcopy(messages)
        *others, last = add_tool_descriptions(messages, TOOLS)
        assert messages == before and others == messages[:-1]
        assert last["role"] == messages[-1]["role"] and last["content"].endswith(
            messages[-1]["content"]
        )
        words = last["content"].removesuffix(messages[-1]["content"])
        assert words.startswith("You can call these functions:\n{")
        listed = [line for line in words.splitlines() if line.startswith("{")]
        assert list(map(json.loads, listed)) == [tool["function"] for tool in TOOLS]
        assert "東京 or O'Hare" in words  # not escaped


def test_templates_do_not_see_the_date():
    """A prompt is the same on every day. Llama's templates then use a fixed date."""
    for family in ("llama3_1", "llama3_2"):
        ours, theirs = both(family)
        text = ours.render([USER])
        assert text.count("Today Date: 26 Jul 2024\n") == 1
        assert text == theirs.apply_chat_template(
            [USER], tokenize=False, add_generation_prompt=True, **DATE
        )
    assert with_template("{{ strftime_now('%d %b %Y') }}").render([USER]) == "26 Jul 2024"


@every_family
def test_turn_by_turn_equals_the_whole_conversation(family):
    """Whether a turn is truncated, ends with the template's stop token, or with another one."""
    ours, _ = both(family)
    replies, instructions = (
        ("It rains in Zürich.", "I forgot: 12 °C."),
        ("Why?", "Once more.\n\n{}"),
    )
    endings = [[]] + [[stop] for stop in ours.stop_ids]
    assert len(endings) == 1 + len(FAMILIES[family]["stops"])
    messages = [{"role": "user", "content": "Wie ist's?"}]
    for words, instruction in zip(replies, instructions, strict=True):
        messages.append({"role": "assistant", "content": words})
        messages.append({"role": "user", "content": instruction})
    for start, tools in itertools.product(([], [SYSTEM]), (None, TOOLS)):
        question = start + messages[:1]
        if tools and family not in SHOWS_TOOLS:  # in words they stand in the question
            whole = ours.prompt(add_tool_descriptions(question, tools) + messages[1:])
        else:
            whole = ours.prompt(question + messages[1:], tools)
        for ends in itertools.product(endings, repeat=2):
            ids = ours.prompt(question, tools)
            for words, end, instruction in zip(replies, ends, instructions, strict=True):
                ids += ours.append_bridge(ours.encode(words) + end, ours.bridge(instruction))
            assert ids == whole


@every_family
def test_turns_with_thinking(family):
    """Equal to transformers, except where the template drops the thinking of earlier turns."""
    ours, theirs = both(family)
    task, end = Countdown(), ours.stop_ids[:1]
    problem = CountdownProblem(0, (6, 10, 2), 32)
    thought, plain = "<think>hm, 3?</think>\n\nIt is 3.", "I see."
    for turns in itertools.product((thought, plain), repeat=2):
        messages = list(task.messages(problem)[0])
        ids = ours.prompt(messages)
        for turn, instruction in zip(
            turns, (task.reflection_instruction, task.retry_instruction), strict=True
        ):
            ids = ids + ours.append_bridge(ours.encode(turn) + end, ours.bridge(instruction))
            messages.append({"role": "assistant", "content": turn})
            messages.append({"role": "user", "content": instruction})
        expected = their_prompt(theirs, family, messages)
        assert (ids == expected) is not (family == "qwen3" and thought in turns)


def test_thinking_is_kept_as_sampled():
    """Qwen3's template drops the thinking of earlier turns, but we keep what was sampled."""
    ours, _ = both("qwen3")
    prompt, bridge = ours.prompt([USER]), ours.bridge("Again")
    turn = ours.encode("<think>hm</think>answer")
    ids = prompt + ours.append_bridge(turn + ours.stop_ids[:1], bridge)
    assert ids[: len(prompt) + len(turn)] == prompt + turn
    messages = [USER, {"role": "assistant", "content": "<think>hm</think>answer"}]
    messages.append({"role": "user", "content": "Again"})
    assert "hm" not in ours.render(messages)
    text = ours.tokenizer.decode(ids, skip_special_tokens=False)
    assert text.endswith(
        "answer<|im_end|>\n<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "after",
    ["\n", "", "\n--\n<|im_end|>", "<|endoftext|>\n", "<|im_start|><|im_start|>"],
    ids=["a line break", "nothing", "text first", "no stop token", "no stop tokens"],
)
def test_turns_without_a_stop_token_are_refused(after):
    """The user's turns end with <|im_end|>, but the assistant's do not, or not directly."""

    def bridge(end_of_user: str, end: str, each: str = "true", last: str = "") -> bool:
        ends = json.dumps({"user": end_of_user, "assistant": end}, ensure_ascii=False)
        ours = with_template(
            f"{{% for m in messages if {each} %}}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}"
            f"{{{{ {ends}[m.role] }}}}{{% endfor %}}<|im_start|>assistant\n{last}"
        )
        return ours.bridge("Again.")[0] == ours.stop_ids[0]

    end = "<|im_end|>\n"
    for template in (
        (end, after),
        (after, after),  # nor do the user's
        (end, end, "m.role == 'user'"),  # the assistant's words are not shown,
        (end, end, "true", "{{ messages[1].content }}"),  # or at the very end
    ):
        with pytest.raises(ValueError, match="does not end an assistant's turn"):
            bridge(*template)
    assert bridge(end, " \n" + end) and bridge(after, end)  # these do


INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def sentencepiece(trainer) -> tokenizers.Tokenizer:
    """Spaces are letters, and a text begins with one, except after a special token."""
    kind = {"BpeTrainer": models.BPE, "UnigramTrainer": models.Unigram}[type(trainer).__name__]
    tokenizer = tokenizers.Tokenizer(kind())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    lines = ["[INST] Make it rain, 1 2 3. [/INST] It rains.", "[INST] Why? [/INST] I forgot it."]
    tokenizer.train_from_iterator(lines * 20, trainer)
    return tokenizer


@pytest.mark.parametrize("trainer", [trainers.BpeTrainer, trainers.UnigramTrainer])
def test_bridges_are_tokenized_in_their_context(trainer):
    """At the beginning of a text, sentencepiece encodes [INST] as '▁[…', after a turn as '[…'."""
    special = dict(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer = sentencepiece(trainer(vocab_size=70, **special))
    ours = with_template(INST, tokenizer, eos_token="</s>", bos_token="<s>")
    words = ("Make it rain.", "It rains.", "Why?", "I forgot.", "Make rain.", "It rains in it.")
    roles = ["user", "assistant"] * 3
    messages = [{"role": role, "content": w} for role, w in zip(roles, words, strict=True)]
    ids = alone = ours.prompt(messages[:1])
    for turn in (1, 3, 5):
        whole = ours.prompt(messages[: turn + 1])
        sampled = whole[len(ours.prompt(messages[:turn])) :]  # as it would be sampled
        assert sampled[-1] == ours.stop_ids[0] and sampled[:-1] and ids + sampled == whole
        if turn < 5:
            instruction = words[turn + 1]
            ids, alone = (
                ids + ours.append_bridge(sampled, ours.bridge(instruction)),
                alone + sampled + ours.encode(f"[INST] {instruction} [/INST]"),
            )
            assert alone != ids == ours.prompt(messages[: turn + 2])
            assert tokenizer.decode(alone, False) != tokenizer.decode(ids, False)


def saved(folder: Path, settings: dict, generation: dict | None = None, jinja: str = "") -> Path:
    """Write the tokenizer's files of a checkpoint, and return their folder."""
    bytes_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    if jinja:
        (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    return folder


def test_chat_template_jinja_takes_precedence_over_a_list(tmp_path):
    several = [{"name": "default", "template": "plain {{ tools }}"}]
    settings = {"chat_template": several, "eos_token": "<|im_end|>"}
    path = saved(tmp_path, settings, jinja="its own")
    assert Tokenizer.from_pretrained(path).render([USER]) == "its own"


def test_chat_template_jinja_takes_precedence(tmp_path):
    own = "ö{{ messages[0].content }}"
    for inside in ({"chat_template": "inside"}, {}):
        path = saved(tmp_path, {"eos_token": "<|im_end|>", **inside}, jinja=own)
        theirs = transformers.AutoTokenizer.from_pretrained(path)
        expected = theirs.apply_chat_template([USER], tokenize=False)
        assert Tokenizer.from_pretrained(path).render([USER]) == expected == "ö" + USER["content"]


def test_special_tokens_and_stop_ids(tmp_path):
    """Special tokens are strings, or dicts with the content. All eos tokens end a turn."""
    template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token is defined }}"
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    flags = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
    id_of = bytes_tokenizer().token_to_id
    end, text_end, user = map(id_of, ("<|im_end|>", "<|endoftext|>", "<|user|>"))
    for tokens in (
        names,
        {name: {"__type": "AddedToken", "content": t, **flags} for name, t in names.items()},
    ):
        settings = {"chat_template": template, **tokens}
        for generation, stops in (
            ({"eos_token_id": [text_end, user]}, [text_end, user, end]),
            ({"eos_token_id": [end, text_end]}, [end, text_end]),
            ({"eos_token_id": text_end}, [text_end, end]),
            ({"eos_token_id": None}, [end]),
            ({}, [end]),
        ):
            ours = Tokenizer.from_pretrained(saved(tmp_path, settings, generation))
            assert ours.stop_ids == stops
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        expected = theirs.apply_chat_template([USER], tokenize=False)
        assert ours.render([USER]) == expected == "<|im_start|>|<|im_end|>|<|endoftext|>|False"
    settings["eos_token"] = None
    path = saved(tmp_path, settings, {"eos_token_id": 0})
    assert Tokenizer.from_pretrained(path).stop_ids == [0]  # the number 0 is a token's id
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="name no stop token"):
        Tokenizer.from_pretrained(path)


@pytest.mark.parametrize(
    "template, expected",
    [
        ("{{ v | tojson }}", '{"é": ["<a> & \'b\' \\"c\\" 東🙂\\n", 1.5, true, null]}'),
        ("{{ v | tojson(indent=1) }}", None),
        ("{{ [v, v] | tojson(separators=(',', ':'), sort_keys=true) }}", None),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("{{ '<&>' }}{{ '<&>' | e }}", "<&>&lt;&amp;&gt;"),
        ("{% for i in [1, 2, 3, 4] %}{% if i == 2 %}{% continue %}{% endif %}"
         "{% if i == 4 %}{% break %}{% endif %}{{ i }},{% endfor %}", "1,3,"),
        ("a\n  {% if true %}\n  b\n  {% endif %}\nc\n", "a\n  b\nc"),  # blocks take their lines
        ("{% set n = namespace(x=0) %}{% for i in [1, 2] %}{% set n.x = n.x + i %}{% endfor %}"
         "{{ n.x }}", "3"),
        ("{{ nothing }}{{ nothing is defined }}", "False"),
    ],
)  # fmt: skip
def test_template_features_equal_transformers(template, expected):
    """tojson escapes nothing, loops have break, and the lines of blocks are removed."""
    messages = [{"role": "user", "content": {"é": ["<a> & 'b' \"c\" 東🙂\n", 1.5, True, None]}}]
    template = "{% set v = messages[0].content %}" + template
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_tokenizer())
    text = theirs.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert with_template(template).render(messages) == text
    assert expected is None or text == expected


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ 1 / 0 }}", "zero"),
    ],
)
def test_errors_in_templates_become_value_errors(template, reason):
    """The message contains the reason. Other conversations are rendered."""
    ours = with_template("{% if messages | length == 1 %}" + template + "{% endif %}fine")
    with pytest.raises(ValueError, match=f"the chat template rejects .*{reason}"):
        ours.render([USER])
    assert ours.render([USER, ATTEMPT]) == "fine"


def test_saved_truncation_and_padding_are_ignored(tmp_path):
    """As in transformers. Such settings in a tokenizer.json are those of its training."""
    path = saved(tmp_path, {"chat_template": SMOLLM2, "eos_token": "<|im_end|>"})
    tokenizer = bytes_tokenizer()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=300, pad_id=0, pad_token="!")
    tokenizer.save(str(path / "tokenizer.json"))
    ours, theirs = Tokenizer.from_pretrained(path), transformers.AutoTokenizer.from_pretrained(path)
    ids = theirs.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert ours.prompt([USER]) == ids


def test_templates_that_hide_the_answer_are_refused():
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}"
    settings = {"chat_template": "<|im_end|>" + template, "eos_token": "<|im_end|>"}
    with pytest.raises(ValueError, match="does not end an assistant's turn"):
        Tokenizer(bytes_tokenizer(), settings, {}).bridge("Reflect.")
