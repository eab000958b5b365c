"""Real chat templates: what transformers renders and encodes, turn after turn.

trl's package ships the templates of the Qwen, Llama and Phi families; SmolLM2's is written here.
The tokenizers have one token a byte, and each family's special tokens.
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

from model import Tokenizer, tools_in_words
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
DATE = {"date_string": "26 Jul 2024"}  # what Llama's say where they see no clock: given to theirs

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
TOLD = {"role": "user", "content": "\nThat's wrong.\nWhy?"}
PLAY = {"role": "user", "content": "Again 🙂"}
CONVERSATIONS = [
    [*start, USER, *rest]
    for start in ([], [SYSTEM])
    for rest in ([], [ATTEMPT], [ATTEMPT, TOLD], [THOUGHT, TOLD, ATTEMPT, PLAY])
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
    """256 bytes and the special tokens; `stripping` ones take the whitespace behind them along."""
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
    """Our tokenizer and transformers', of the same parts."""
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
    """Every shape of R3's conversations, with tools and without; a refusal is one for both."""
    ours, theirs = both(family)
    seen, refused = set(), []
    for agent, tools, opened in itertools.product(
        [*CONVERSATIONS, [SYSTEM]], (None, TOOLS), (True, False)
    ):
        before = copy.deepcopy((agent, tools))
        options = dict(tools=tools, add_generation_prompt=opened, **DATE)
        try:
            want = theirs.apply_chat_template(agent, tokenize=False, **options)
        except jinja2.TemplateError:
            refused.append(agent)
            with pytest.raises(ValueError, match="template refuses"):
                ours.render(agent, tools, add_generation_prompt=opened)
            continue
        assert ours.render(agent, tools, add_generation_prompt=opened) == want
        assert (agent, tools) == before
        seen.add(want)
        if opened:
            assert ours.render(agent, tools) == want
            ids = theirs.apply_chat_template(agent, tokenize=True, return_dict=False, **options)
            if tools is None or family in SHOWS_TOOLS:
                assert ours.prompt(agent, tools) == ids
            assert ours.encode(want) == ids
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    # Llama 3.1 on puts tools into the first user's turn: where there is none, it refuses.
    assert refused == ([[SYSTEM], [SYSTEM]] if family in ("llama3_1", "llama3_2") else [])
    assert len(seen) == 18 * (2 if family in SHOWS_TOOLS else 1) - len(refused)


def asked(theirs, family: str, agent: list[dict], tools: list[dict] | None = None) -> list[int]:
    """A question's tokens by transformers, its tools in words where the template has no place."""
    if tools and family not in SHOWS_TOOLS:
        agent, tools = tools_in_words(agent, tools), None
    options = dict(add_generation_prompt=True, return_dict=False, **DATE)
    return theirs.apply_chat_template(agent, tools=tools, **options)


@every_family
def test_the_tools_stand_in_every_prompt(family):
    """By the template, escaped nowhere; or in words, once, where it has no place for them."""
    ours, theirs = both(family)
    for agent in CONVERSATIONS:
        if agent[-1]["role"] == "user":
            assert ours.prompt(agent, TOOLS) == asked(theirs, family, agent, TOOLS)
    text = ours.tokenizer.decode(ours.prompt([USER], TOOLS), skip_special_tokens=False)
    assert text.count("<outside> & in Zürich, 東京 or O'Hare") == 1
    assert text.count(USER["content"]) == 1
    assert ("You can call these functions" in text) is (family not in SHOWS_TOOLS)
    assert ours.prompt([USER]) == ours.encode(ours.render([USER]))


@pytest.mark.skipif(not RECORDS.is_file(), reason="the real records are not here")
@every_family
def test_every_real_record_is_asked_with_all_its_tools(family):
    """Query and tools stand in the text as they are; some questions are compared whole."""
    ours, theirs = both(family)
    task, compared = APIGen(), 0
    problems = task.load(str(RECORDS), split="all")
    assert len(problems) == 1_000
    for problem in problems:
        agent, tools = task.messages(problem)
        ids = ours.prompt(agent, tools)
        text = ours.tokenizer.decode(ids, skip_special_tokens=False)
        assert text.count(problem.query.strip()) == 1  # some templates strip what is said
        dense = re.sub(r"\s", "", text)  # some templates indent the tools
        for tool in tools:
            function = json.dumps(tool["function"], ensure_ascii=False)
            assert re.sub(r"\s", "", function) in dense
        if problem.id % 20 == 0 or not problem.query.isascii():
            assert ids == asked(theirs, family, agent, tools)
            compared += 1
    assert compared >= 60


def test_showing_is_seen_in_the_text_not_guessed():
    """A template may name the tools and not show them, or show them in some conversations only."""

    def in_words(ours, agent):
        return "You can call these functions" in ours.decode(ours.prompt(agent, TOOLS))

    says = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert in_words(with_template("{% if tools %}{# tools #}{% endif %}tools" + says), [USER])
    ours = with_template("{% if messages[0].role == 'system' %}{{ tools }}{% endif %}" + says)
    assert [in_words(ours, agent) for agent in ([USER], [SYSTEM, USER])] == [True, False]


def test_tools_in_words_stand_before_the_last_message():
    """All of them, as JSON; and nothing else of the chat changes."""
    for agent in CONVERSATIONS:
        before = copy.deepcopy(agent)
        *others, last = tools_in_words(agent, TOOLS)
        assert agent == before and others == agent[:-1]
        assert last["role"] == agent[-1]["role"] and last["content"].endswith(agent[-1]["content"])
        words = last["content"].removesuffix(agent[-1]["content"])
        assert words.startswith("You can call these functions:\n{")
        listed = [line for line in words.splitlines() if line.startswith("{")]
        assert list(map(json.loads, listed)) == [tool["function"] for tool in TOOLS]
        assert "東京 or O'Hare" in words  # not escaped


def test_a_template_sees_no_clock():
    """A prompt is the same on every day: Llama's templates fall back to a date of their own."""
    for family in ("llama3_1", "llama3_2"):
        ours, theirs = both(family)
        text = ours.render([USER])
        assert text.count("Today Date: 26 Jul 2024\n") == 1
        assert text == theirs.apply_chat_template(
            [USER], tokenize=False, add_generation_prompt=True, **DATE
        )
    assert with_template("{{ strftime_now is defined }}").render([USER]) == "False"


@every_family
def test_turn_by_turn_gives_the_ids_of_the_whole(family):
    """However a turn ended: cut, on the template's end token, or on another stop token."""
    ours, _ = both(family)
    said, told = ("It rains in Zürich.", "I forgot: 12 °C."), ("Why?", "Once more.\n\n{}")
    endings = [[]] + [[stop] for stop in ours.stop_ids]
    assert len(endings) == 1 + len(FAMILIES[family]["stops"])
    agent = [{"role": "user", "content": "Wie ist's?"}]
    for words, instruction in zip(said, told, strict=True):
        agent.append({"role": "assistant", "content": words})
        agent.append({"role": "user", "content": instruction})
    for start, tools in itertools.product(([], [SYSTEM]), (None, TOOLS)):
        question = start + agent[:1]
        if tools and family not in SHOWS_TOOLS:  # in words they stand in the question
            whole = ours.prompt(tools_in_words(question, tools) + agent[1:])
        else:
            whole = ours.prompt(question + agent[1:], tools)
        for ends in itertools.product(endings, repeat=2):
            ids = ours.prompt(question, tools)
            for words, end, instruction in zip(said, ends, told, strict=True):
                ids += ours.next_turn(ours.encode(words) + end, ours.bridge(instruction))
            assert ids == whole


@every_family
def test_a_turn_with_thinking(family):
    """Whole conversations are transformers', but where the template drops earlier thinking."""
    ours, theirs = both(family)
    task, end = Countdown(), ours.stop_ids[:1]
    problem = CountdownProblem(0, (6, 10, 2), 32)
    thought, plain = "<think>hm, 3?</think>\n\nIt is 3.", "I see."
    for turns in itertools.product((thought, plain), repeat=2):
        agent = list(task.messages(problem)[0])
        ids = ours.prompt(agent)
        for turn, told in zip(
            turns, (task.reflection_instruction, task.retry_instruction), strict=True
        ):
            ids = ids + ours.next_turn(ours.encode(turn) + end, ours.bridge(told))
            agent.append({"role": "assistant", "content": turn})
            agent.append({"role": "user", "content": told})
        want = asked(theirs, family, agent)
        assert (ids == want) is not (family == "qwen3" and thought in turns)


def test_thinking_stays_as_sampled():
    """Qwen3's template drops the thinking of earlier turns; what was sampled is kept."""
    ours, _ = both("qwen3")
    prompt, bridge = ours.prompt([USER]), ours.bridge("Again")
    turn = ours.encode("<think>hm</think>answer")
    ids = prompt + ours.next_turn(turn + ours.stop_ids[:1], bridge)
    assert ids[: len(prompt) + len(turn)] == prompt + turn
    told = [USER, {"role": "assistant", "content": "<think>hm</think>answer"}]
    told.append({"role": "user", "content": "Again"})
    assert "hm" not in ours.render(told)
    text = ours.tokenizer.decode(ids, skip_special_tokens=False)
    assert text.endswith(
        "answer<|im_end|>\n<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "after",
    ["\n", "", "\n--\n<|im_end|>", "<|endoftext|>\n", "<|im_start|><|im_start|>"],
    ids=["a line break", "nothing", "text first", "no stop token", "no stop tokens"],
)
def test_a_turn_without_an_end_token_is_refused(after):
    """The user's turns do end on <|im_end|>; the assistant's do not, or not at once."""

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
    """A space is a letter, and one is put before a text, though not after a special token."""
    kind = {"BpeTrainer": models.BPE, "UnigramTrainer": models.Unigram}[type(trainer).__name__]
    tokenizer = tokenizers.Tokenizer(kind())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    lines = ["[INST] Make it rain, 1 2 3. [/INST] It rains.", "[INST] Why? [/INST] I forgot it."]
    tokenizer.train_from_iterator(lines * 20, trainer)
    return tokenizer


@pytest.mark.parametrize("trainer", [trainers.BpeTrainer, trainers.UnigramTrainer])
def test_a_bridge_is_cut_from_the_whole_not_encoded_by_itself(trainer):
    """Of a text that begins with [INST], sentencepiece makes '▁[…'; after a turn's end, '[…'."""
    special = dict(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer = sentencepiece(trainer(vocab_size=70, **special))
    ours = with_template(INST, tokenizer, eos_token="</s>", bos_token="<s>")
    words = ("Make it rain.", "It rains.", "Why?", "I forgot.", "Make rain.", "It rains in it.")
    roles = ["user", "assistant"] * 3
    agent = [{"role": role, "content": w} for role, w in zip(roles, words, strict=True)]
    ids = alone = ours.prompt(agent[:1])
    for turn in (1, 3, 5):
        whole = ours.prompt(agent[: turn + 1])
        said = whole[len(ours.prompt(agent[:turn])) :]  # as it would be sampled
        assert said[-1] == ours.stop_ids[0] and said[:-1] and ids + said == whole
        if turn < 5:
            told = words[turn + 1]
            ids, alone = (
                ids + ours.next_turn(said, ours.bridge(told)),
                alone + said + ours.encode(f"[INST] {told} [/INST]"),
            )
            assert alone != ids == ours.prompt(agent[: turn + 2])
            assert tokenizer.decode(alone, False) != tokenizer.decode(ids, False)


def saved(folder: Path, settings: dict, generation: dict | None = None, jinja: str = "") -> Path:
    """A checkpoint's folder, its tokenizer's half."""
    bytes_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    if jinja:
        (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    return folder


def test_several_templates_by_name_are_refused(tmp_path):
    for names in (("default", "rag"), ("default",), ("rag",), ()):
        several = [{"name": name, "template": "plain {{ tools }}"} for name in names]
        path = saved(tmp_path, {"chat_template": several, "eos_token": "<|im_end|>"})
        with pytest.raises(ValueError, match="no chat template: R3 needs an instruct model"):
            Tokenizer.from_pretrained(path)
    path = saved(tmp_path, {"chat_template": several, "eos_token": "<|im_end|>"}, jinja="its own")
    assert Tokenizer.from_pretrained(path).render([USER]) == "its own"


def test_the_template_in_its_own_file_wins(tmp_path):
    own = "ö{{ messages[0].content }}"
    for inside in ({"chat_template": "inside"}, {}):
        path = saved(tmp_path, {"eos_token": "<|im_end|>", **inside}, jinja=own)
        theirs = transformers.AutoTokenizer.from_pretrained(path)
        want = theirs.apply_chat_template([USER], tokenize=False)
        assert Tokenizer.from_pretrained(path).render([USER]) == want == "ö" + USER["content"]


def test_special_tokens_and_every_stop_id(tmp_path):
    """A token is a string, or a dict with its content; a turn ends on every token that is named."""
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
        want = theirs.apply_chat_template([USER], tokenize=False)
        assert ours.render([USER]) == want == "<|im_start|>|<|im_end|>|<|endoftext|>|False"
    settings["eos_token"] = None
    path = saved(tmp_path, settings, {"eos_token_id": 0})
    assert Tokenizer.from_pretrained(path).stop_ids == [0]  # the number 0 is a token's id
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="ends a turn"):
        Tokenizer.from_pretrained(path)


@pytest.mark.parametrize(
    "template, want",
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
def test_a_template_says_what_transformers_says(template, want):
    """tojson escapes nothing; loops break; a block's line is not in the text."""
    agent = [{"role": "user", "content": {"é": ["<a> & 'b' \"c\" 東🙂\n", 1.5, True, None]}}]
    template = "{% set v = messages[0].content %}" + template
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_tokenizer())
    text = theirs.apply_chat_template(agent, chat_template=template, tokenize=False)
    assert with_template(template).render(agent) == text
    assert want is None or text == want


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ 1 / 0 }}", "zero"),
    ],
)
def test_what_a_template_refuses_is_a_value_error(template, reason):
    """And says why; but a conversation for which it does not refuse is rendered."""
    ours = with_template("{% if messages | length == 1 %}" + template + "{% endif %}fine")
    with pytest.raises(ValueError, match=f"the chat template refuses .*{reason}"):
        ours.render([USER])
    assert ours.render([USER, ATTEMPT]) == "fine"


def test_a_saved_tokenizer_neither_cuts_nor_pads(tmp_path):
    """As transformers: the lengths that a tokenizer.json was saved with hold for its training."""
    path = saved(tmp_path, {"chat_template": SMOLLM2, "eos_token": "<|im_end|>"})
    tokenizer = bytes_tokenizer()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=300, pad_id=0, pad_token="!")
    tokenizer.save(str(path / "tokenizer.json"))
    ours, theirs = Tokenizer.from_pretrained(path), transformers.AutoTokenizer.from_pretrained(path)
    ids = theirs.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert ours.prompt([USER]) == ids


def test_a_template_that_hides_the_assistants_words_is_refused():
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}"
    settings = {"chat_template": "<|im_end|>" + template, "eos_token": "<|im_end|>"}
    with pytest.raises(ValueError, match="does not end an assistant's turn"):
        Tokenizer(bytes_tokenizer(), settings, {}).bridge("Reflect.")
