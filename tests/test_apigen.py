"""APIGen: what its verifier accepts, attacks on it, and problems from data files."""

import importlib.util
import itertools
import json
import random
import re
import time
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import tokenizers
from drawn_apigen import DrawnAPIGen
from sentence import Sentence

import tasks
from model import add_tool_descriptions
from tasks import APIGen, APIGenProblem, Countdown

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

task = APIGen()
TOOLS = [
    {"name": "add", "description": "Add.", "parameters": {"a": {"type": "float"}}},
    {"name": "find", "description": "", "parameters": {"type": {"type": "str, optional"}}},
]


def problem_with(*calls):
    """A problem whose ground truth is these calls."""
    return APIGenProblem(0, "?", json.dumps(list(calls)), json.dumps(TOOLS))


def call(name, **arguments):
    return {"name": name, "arguments": arguments}


def formats(calls):
    """The calls in all formats that the supported model families write."""
    llama = [{"name": call["name"], "parameters": call["arguments"]} for call in calls]
    typed = [json.dumps({"type": "function", **call}, indent=4) for call in llama]
    # Qwen 2.5 and 3, SmolLM2
    yield "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)
    yield f"<tool_call>[\n{', '.join(map(json.dumps, calls))}\n]</tool_call>"
    # models whose chat template shows no tools
    yield f"<think>maybe [{{}}] or\n{json.dumps(calls[:1])}</think>\n\n{json.dumps(calls)}"
    yield json.dumps(calls[::-1])  # the order does not matter
    yield f"Sure [1], here {{it}} is:\n```json\n{json.dumps(llama, indent=2)}\n```\nDone."
    # Llama 3
    yield "; ".join(map(json.dumps, llama))
    yield "\n".join(json.dumps(call, ensure_ascii=False) for call in llama)
    yield "<|python_tag|>" + ";\n".join(typed)
    if all(word.isidentifier() for call in calls for word in call["arguments"]):
        yield python_calls(calls)
        yield f"<|python_tag|>{python_calls(calls)}\n"
    # Mistral, with and without its special tokens
    yield f"[TOOL_CALLS] {json.dumps([{**call, 'id': 'D681PevKs'} for call in calls])}"
    texts = [(call["name"], json.dumps(call["arguments"])) for call in calls]
    yield "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in texts)
    yield "".join(f"[TOOL_CALLS]{name}[CALL_ID]D681PevKs[ARGS]{text}" for name, text in texts)
    yield "".join(f"{name}{arguments}" for name, arguments in texts)


def python_calls(calls):
    """The calls in Llama 3.2's format, such as "[add(a=1), find(type='x')]"."""
    texts = []
    for call in calls:
        arguments = ", ".join(f"{name}={value!r}" for name, value in call["arguments"].items())
        texts.append(f"{call['name']}({arguments})")
    return f"[{', '.join(texts)}]"


def similar_value(value):
    """A different value that a comparison which ignores types might take for the same."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | float):
        return str(value)
    return [value]


def check_correct_calls(problem):
    """The ground truth is correct in all formats, and with one more call it is not."""
    calls = json.loads(problem.answers)
    for text in formats(calls):
        assert task.verify(problem, text).correct, text
    for text in formats(calls + calls[:1]):
        assert task.verify(problem, text).reason == "wrong_count", text


def check_changed_calls(problem):
    """The ground truth with any change is wrong, in all formats."""
    calls = json.loads(problem.answers)
    for index, correct_call in enumerate(calls):
        for name, value in correct_call["arguments"].items():
            changed = json.loads(problem.answers)
            changed[index]["arguments"][name] = similar_value(value)
            for text in formats(changed):
                assert task.verify(problem, text).reason == "wrong_arguments", text
        changed = json.loads(problem.answers)
        changed[index]["name"] += "_"
        for text in formats(changed):
            assert task.verify(problem, text).reason == "wrong_tool", text
        changed = json.loads(problem.answers)
        changed[index]["arguments"]["another"] = 1
        assert task.verify(problem, json.dumps(changed)).reason == "wrong_arguments"
        fewer = calls[:index] + calls[index + 1 :]
        assert task.verify(problem, json.dumps(fewer)).reason == "wrong_count"


def test_drawn_problems_can_be_answered_in_all_formats():
    task = DrawnAPIGen()
    problems = task.load(split="train", limit=20)
    assert {len(json.loads(problem.answers)) for problem in problems} == {1, 2, 3}
    for problem in problems:
        check_correct_calls(problem)
        check_changed_calls(problem)
        offered = [tool["name"] for tool in json.loads(problem.tools)]
        needed = {call["name"] for call in json.loads(problem.answers)}
        assert needed < set(offered)  # there are tools that are not needed
        assert len(set(offered)) == len(offered)
        messages, tools = task.messages(problem)
        assert messages == [{"role": "user", "content": problem.query}]
        assert [tool["function"]["name"] for tool in tools] == offered
        prompt = add_tool_descriptions(messages, tools)[0]["content"]
        assert prompt.endswith(problem.query) and all(name in prompt for name in offered)
    loaded_again = task.load(split="train", limit=20)
    assert loaded_again == problems != task.load(split="train", limit=60, seed=1)
    queries = [{problem.query for problem in task.load(split=split)} for split in tasks.SPLITS]
    assert sum(map(len, queries)) == len(set.union(*queries))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real records are not here")
def test_every_real_record_loads_and_its_ground_truth_is_correct():
    problems = task.load(str(SHARED / "apigen_bfcl.json"), split="all")
    assert len(problems) == 1000
    for problem in problems:
        check_correct_calls(problem)
    for problem in problems[:50]:
        check_changed_calls(problem)
        assert task.parse_record(asdict(problem)) == problem


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "llama3_1", "llama3_2"])
def test_calls_as_real_chat_templates_write_them(family):
    """The templates show what a model was trained to write. They come with trl."""
    package = importlib.util.find_spec("trl")  # found, not imported
    transformers = pytest.importorskip("transformers")
    if package is None:
        pytest.skip("the real templates come with trl, which is not installed")
    path = Path(package.submodule_search_locations[0], "chat_templates", f"{family}.jinja")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({})),
        chat_template=path.read_text(encoding="utf-8"),
        bos_token="<|begin_of_text|>",
    )
    calls = [
        call("add", a=[1, 2.5, None], b={"é": True}),
        call("find", type="</tool_call>\n}"),
    ]
    for used in [calls[:1], calls] if family.startswith("qwen") else [calls[:1], calls[1:]]:
        tool_calls = [{"type": "function", "function": each} for each in used]
        turns = [{"role": "user", "content": "?"}]
        turns += [{"role": "assistant", "content": "", "tool_calls": tool_calls}]
        _, schemas = task.messages(problem_with(*used))
        prompt, chat = (
            tokenizer.apply_chat_template(
                turns[:end], schemas, tokenize=False, add_generation_prompt=end == 1
            )
            for end in (1, 2)
        )
        assert chat.startswith(prompt)
        text = re.sub(r"<\|\w+\|>", "", chat.removeprefix(prompt))  # without special tokens
        assert task.verify(problem_with(*used), text).correct, text


@pytest.mark.parametrize(
    "expected_value, json_text, correct",
    [
        (5, "5.0", True), (5.0, "5", True), (1e20, "100000000000000000000", True),
        (5, '"5"', False), (1, "true", False), (True, "1", False), (0, "false", False),
        (0, "-0.0", True), (None, "null", True), (None, '""', False), (0.1, "0.10", True),
        (2**53 + 1, str(2.0**53), False), ([1, 2], "[1.0, 2]", True), ([1, 2], "[2, 1]", False),
        ({"a": 1, "b": [True]}, '{"b": [true], "a": 1.0}', True), ("é", '"\\u00e9"', True),
        ({"a": 1}, '{"a": 1, "b": null}', False), ("x", '"x "', False), ([], "{}", False),
    ],
)  # fmt: skip
def test_json_equality(expected_value, json_text, correct):
    text = f'[{{"name": "add", "arguments": {{"a": {json_text}}}}}]'
    problem = problem_with(call("add", a=expected_value))
    assert task.verify(problem, text).correct is correct


def test_a_repeated_call_must_be_repeated_as_often():
    one, two = call("add", a=1), call("add", a=2)
    problem = problem_with(one, one, two)
    assert task.verify(problem, json.dumps([one, two, one])).reason == "correct"
    assert task.verify(problem, json.dumps([one, two, two])).reason == "wrong_arguments"


ONE = json.dumps([call("add", a=1)])


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "no_answer"),
        ("I cannot do that {sorry} [1].", "no_answer"),
        ("add(a=1)", "no_answer"),
        (f"<think>{ONE}", "no_answer"),
        ('{"a": 1}', "malformed"),
        ("I cannot do that {'a': 1} [1, 2].", "no_answer"),
        (f"{ONE} [1]", "correct"),
        (f"{ONE} {{}}", "correct"),
        (f"{ONE} []", "malformed"),
        (f"[1] {ONE}", "correct"),
        (f"[] {ONE}", "malformed"),
        (f"[{{'name': 'add'}}] {ONE}", "malformed"),
        ("[]", "wrong_count"),
        (f"{ONE} or rather {ONE}", "malformed"),
        (f"<tool_call>{ONE[1:-1]}</tool_call>{ONE}", "malformed"),
        (f"<tool_call>{ONE[1:-1]}", "malformed"),
        (f"<tool_call>{ONE[1:-1]}</tool_call></tool_call>", "malformed"),
        ("<tool_call>add</tool_call>", "malformed"),
        (f"<tool_call>{ONE[1:-1]} {ONE[1:-1]}</tool_call>", "malformed"),
        (f"<tool_call>{ONE}, 5</tool_call>", "malformed"),
        (f"<tool_call>{ONE[1:-1]}</tool_calls>", "malformed"),
        (f"</tool_call>{ONE[1:-1]}<tool_call>", "malformed"),
        (f"{ONE}</tool_call>", "malformed"),
        (f"<tool_call>[{ONE}]</tool_call>", "malformed"),
        ("<tool_call>5</tool_call>", "malformed"),
        (ONE[:-1], "malformed"),
        (ONE[:-1] + ", 5]", "malformed"),
        (ONE[:-1] + ", {'name': 'add'}]", "malformed"),
        ('{"name": "add"}', "malformed"),
        ('{"name": "add", "arguments": "a"}', "malformed"),
        ('{"name": ["add"], "arguments": {}}', "malformed"),
        ('{"name": "add", "arguments": {"a": 1}, "parameters": {"a": 2}}', "malformed"),
        ('[{"name": "add", "name": "find", "arguments": {"a": 1}}]', "malformed"),
        ('[{"name": "add", "arguments": {"a": 2, "a": 1}}]', "malformed"),
        ('[{"name": "add", "arguments": {"a": NaN}}]', "malformed"),
        ('[{"name": "add", "arguments": {"a": -Infinity}}]', "malformed"),
        ('[{"name": "add", "arguments": {"a": 1e999}}]', "malformed"),
        ('[{"name": "add", "arguments": {"a": ' + "1" * 5_000 + "}}]", "malformed"),
        ('[{"name": "add", "arguments": {"a": ' + "1" * 101 + "}}]", "malformed"),
        ('[{"name": "add", "arguments": {"a": ' + "1" * 100 + "}}]", "wrong_arguments"),
        ('[{"name": "add", "arguments": {"a": ' + "[" * 200 + "]" * 200 + "}}]", "wrong_arguments"),
        ('[{"name": "add", "arguments": {"a": ' + "[" * 9_000 + "]" * 9_000 + "}}]", "malformed"),
        (" " * 20_001 + ONE, "malformed"),
        (f"<tool_call>{ONE[1:-1]}</tool_call>" + " " * 20_000, "malformed"),
        (" " * 20_001, "malformed"),
        ("<think>" + "hm [{ " * 9_000 + f"</think>{ONE}", "correct"),
    ],
)
def test_the_reason_for_a_text(text, reason):
    assert task.verify(problem_with(call("add", a=1)), text).reason == reason


CALLS = [call("add", a=1), call("find", type="x")]
LLAMA_CALLS = [
    json.dumps({"name": call["name"], "parameters": call["arguments"]}) for call in CALLS
]


@pytest.mark.parametrize("separator", ["; ", ";", "\n", " ;\n\n", ""])
def test_several_calls_of_llama(separator):
    """Llama 3 writes one JSON object for each call."""
    first, second = LLAMA_CALLS
    problem = problem_with(*CALLS)
    for prefix, suffix in (("", ""), ("<|python_tag|>", ";"), ("Sure: ", "\nThat is [all].")):
        several = separator.join([first, second])
        assert task.verify(problem, prefix + several + suffix).correct
        several = separator.join([second, first, first])
        assert task.verify(problem, prefix + several + suffix).reason == "wrong_count"
        assert task.verify(problem, prefix + first + suffix).reason == "wrong_count"
        several = separator.join([first, first])
        assert task.verify(problem, prefix + several + suffix).reason == "wrong_tool"


@pytest.mark.parametrize(
    "text",
    [
        "{0}, {1}", "{0} and {1}", "{0}; and {1}", "{0};; {1}", "{0}; [{1}]", "[{0}]; [{1}]",
        "[{0}] [{1}]", "[{0}, {1}] {1}", "[{0}, {1}] []", '[{0}, {1}] {{"a": 1}}',
        "[{{'name': 'add'}}] [{0}, {1}]", "{0} {1} [TOOL_CALLS]add[ARGS]{{}}",
        "<tool_call>{0}</tool_call> {1}", "{0} <tool_call>{1}</tool_call>",
        "[TOOL_CALLS]find[ARGS]{{}} [{0}, {1}]", "[add(a=1)] [{0}, {1}]", "[{0}, {1}] [f.g()]",
        "[TOOL_CALLS] [{0}] [TOOL_CALLS] [{1}]",
    ],
)  # fmt: skip
def test_a_second_list_of_calls_is_refused(text):
    problem = problem_with(*CALLS)
    assert task.verify(problem, text.format(*LLAMA_CALLS)).reason == "malformed"


@pytest.mark.parametrize(
    "value",
    ["</tool_call>", "<tool_call>", '</tool_call>{"name": "find", "arguments": {}}', "a; b",
     "[TOOL_CALLS]find[ARGS]{}", '"}}]', "[{", "}\n{", "\\", "find{}", "[f(a=1)]", "it's \"so\""],
)  # fmt: skip
def test_a_string_may_contain_the_marks_of_a_call(value):
    """JSON, or Python, decides where a call ends."""
    calls = [call("add", a=value), call("find", type=[value])]
    for text in formats(calls):
        assert task.verify(problem_with(*calls), text).correct, text
        assert task.verify(problem_with(calls[0]), text).reason == "wrong_count"
        assert task.verify(problem_with(call("add", a=value + " "), calls[1]), text).reason == (
            "wrong_arguments"
        )


@pytest.mark.parametrize(
    "prose",
    ["I used [a] and {b}.", "f(x) = {1, 2} [see above]", "} ] ; {", "[1]", "{}", "[TODO] {'a': 1}"],
)
def test_prose_around_the_calls_does_not_matter(prose):
    tagged = "\n".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in CALLS)
    mistral = '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]find[ARGS]{"type": "x"}'
    for text in (tagged, json.dumps(CALLS), "; ".join(LLAMA_CALLS), mistral):
        for completion in (f"{text}\n{prose}", f"{prose}\n{text}", f"{prose} {text} {prose}"):
            assert task.verify(problem_with(*CALLS), completion).correct, completion
            assert task.verify(problem_with(CALLS[0]), completion).reason == "wrong_count"


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ("a=1", "correct"), ("a=1.0", "correct"), (" a = +1, ", "correct"),
        ("a=2", "wrong_arguments"), ("a='1'", "wrong_arguments"), ("a=True", "wrong_arguments"),
        ("", "wrong_arguments"), ("a=1, b=None", "wrong_arguments"),
        ("a=1), add(a=1", "wrong_count"), ("1", "malformed"),
        ("1, a=1", "malformed"), ("a=1, a=1", "malformed"), ("**{'a': 1}", "malformed"),
        ("a=1, **{}", "malformed"), ("*[], a=1", "malformed"), ("a=(1,)", "malformed"),
        ("a={1: 1}", "malformed"), ("a={1}", "malformed"), ("a=b'1'", "malformed"),
        ("a=1j", "malformed"), ("a=1e999", "malformed"), ("a=" + "1" * 101, "malformed"),
        ("a=...", "malformed"), ("a=b", "malformed"), ("a=int('1')", "malformed"),
        ("a=2-1", "malformed"), ("a=f'1'", "malformed"), ("a=1 if 1 else 2", "malformed"),
        ("a=[1 for _ in 'x']", "malformed"), ("a=1)(a=1", "wrong_tool"),
        ("a=1)], [add(a=1", "malformed"), ("a=1)] + [add(a=1", "malformed"), ("a=1;", "malformed"),
        ("a='\\d'", "wrong_arguments"), ("a='\ud800'", "malformed"), ("a='\0'", "malformed"),
    ],
)  # fmt: skip
def test_python_calls(arguments, reason):
    """Llama 3.2 and 3.3 write calls in Python. Nothing is evaluated."""
    for text in (f"[add({arguments})]", f"<|python_tag|>[ add({arguments}) ]\n"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert task.verify(problem_with(call("add", a=1)), text).reason == reason
    assert task.verify(problem_with(call("add", a=1)), "Sure: [add(a=1)]").reason == "malformed"


def test_names_in_python_calls_are_compared_as_they_are_written():
    """Python itself takes letters of other alphabets and styles for the ordinary ones."""
    add = call("add", a=1)
    degrees = {"name": "temperature", "arguments": {"\u00b5": 1}}  # the sign for micro
    for text in ("[ａｄｄ(a=1)]", "[𝐚𝐝𝐝(a=1)]"):
        assert task.verify(problem_with(add), text).reason == "wrong_tool", text
    assert task.verify(problem_with(add), "[add(ａ=1)]").reason == "wrong_arguments"
    assert task.verify(problem_with(degrees), "[temperature(µ=1)]").correct
    assert not task.verify(problem_with(degrees), "[temperature(μ=1)]").correct  # the letter mu
    assert task.verify(problem_with(add, degrees), "[add(\r\n a=1),\n temperature(µ=1)]").correct
    for text in ("[f(x=2).add(a=1)]", "[add(b=2).add(a=1)]", "[add[0](a=1)]"):
        assert not task.verify(problem_with(add), text).correct, text


def test_python_calls_have_all_types_of_json():
    value = {"a": [1, -2.5, True, None, "ü\n'\""], "b": {"c": {}}}
    for correct_call in (call("math.add", a=value), call("find")):
        text = python_calls([correct_call])
        assert task.verify(problem_with(correct_call), text).correct, text


@pytest.mark.parametrize(
    "text, reason",
    [
        ('add{"a": 1}', "correct"), ('\n add{"a": 1}', "correct"), ('add {"a": 1}', "malformed"),
        ('Sure: add{"a": 1}', "malformed"), ('add{"a": 1} Done.', "correct"),
        ('[TOOL_CALLS]add{"a": 1}', "correct"), ('Sure.[TOOL_CALLS]add[ARGS]{"a": 1}', "correct"),
        ('[TOOL_CALLS]add[ARGS] {"a": 1}', "malformed"), ('add[ARGS]{"a": 1}', "correct"),
        ('add{"a": 1}add{"a": 1}', "wrong_count"), ('add{"a": 1}find{}', "wrong_count"),
        ('add{"a": 1}; add{"a": 1}', "malformed"), ('add{"a": 1', "malformed"),
        ("add{}", "wrong_arguments"), ("find{}", "wrong_tool"), ("add{a: 1}", "no_answer"),
        ('add{"name": "add", "arguments": {"a": 1}}', "wrong_arguments"),
        ('add{"name": "add"}', "wrong_arguments"), ("[TOOL_CALLS]", "no_answer"),
    ],
)  # fmt: skip
def test_calls_of_mistral(text, reason):
    """Mistral writes the name before the arguments. Its markers are special tokens, so that they
    are usually missing from the text."""
    assert task.verify(problem_with(call("add", a=1)), text).reason == reason


def test_no_calls_are_correct_if_none_are_expected():
    for text in ("[]", "<tool_call>[]</tool_call>", "[TOOL_CALLS] []"):
        assert task.verify(problem_with(), text).correct
        assert task.verify(problem_with(*CALLS), text).reason == "wrong_count"
    assert task.verify(problem_with(), "There is nothing to call.").reason == "no_answer"


@pytest.mark.parametrize(
    "text",
    [sign * 19_999 for sign in "[{\"<'"] + ["[1," * 6_000, '["a",[' * 3_000, "<tool_call>" * 1_800,
     "</tool_call>" * 900 + "<tool_call>" * 800, '{"a":' * 3_900, "[1]" * 6_000, "{'a'" * 4_000,
     "</think>[" * 2_000, "[ " * 9_999, "[" + " " * 19_998, '{"' * 9_999,
     "<tool_call>[1]</tool_call>" * 760, '{"name": "f", "arguments": {}}\n' * 640, "f{}" * 6_600,
     "[TOOL_CALLS]" * 1_600, "}" * 9_000 + "a" * 9_000, "} a" * 6_600, "[CALL_ID]" * 2_000,
     "[f(a=" + "-" * 19_000 + "1)]", "[f(a=" + "[" * 9_000 + "]" * 9_000 + ")]",
     "[f(" + "a." * 9_000 + "b)]", "[" + "a." * 9_000 + "b(x=1)]", "[f(a=" + "1+" * 9_000 + "1)]",
     "[" + "f(" * 9_000 + ")]", "[f(" + ")] " * 6_000 + ")]", "[f(" + "a=1," * 4_000 + ")]",
     "[f(a=" + "'a' " * 4_000 + ")]", "[f(a=" + "{'a':" * 3_000 + ")]", "[f()" + " " * 19_000,
     "[f(a=" + "9" * 19_000 + ")]", "[f(a=x" + "()" * 9_000 + ")]", "[f(" + ") " * 9_000]
    # the rest is too long to be parsed
    + ["<tool_call>" * 5_000, "<tool_call>" + "[" * 1_000_000 + "</tool_call>", "[" * 10_000_000,
       f"<tool_call>{ONE}</tool_call>" * 100_000],
)  # fmt: skip
def test_hostile_text_is_rejected_quickly(text):
    start = time.process_time()
    assert not task.verify(problem_with(call("add", a=1)), text).correct
    assert time.process_time() - start < 2  # It takes about 0.1 s.


def test_random_text_never_raises_and_is_never_correct():
    rng = random.Random(0)
    pieces = [*'[]{}":,', '"name"', '"arguments"', '"add"', '{"a": 2}', "true", "1e5", "é", "\\",
              "<tool_call>", "</tool_call>", "<think>", "</think>", '{"name": "add", ',
              '[{"name": "add", "arguments": {"a": 2}}]']  # fmt: skip
    reasons = Counter()
    for _ in range(5_000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 25)))
        reasons[task.verify(problem_with(call("add", a=1)), text).reason] += 1
    assert reasons["correct"] == 0 and len(reasons) >= 4


@pytest.mark.parametrize(
    "python_type, schema",
    [
        ("str", {"type": "string"}), ("int, optional", {"type": "integer"}), ("any", {}),
        ("List[float]", {"type": "array"}), ("set", {"type": "array"}), ("", {}),
        ("Dict[str, List[int]], optional", {"type": "object"}), ("Callable[[int], int]", {}),
        ("Optional[str]", {"type": "string"}), ("Optional[List[int]]", {"type": "array"}),
        ("Union[int, List[str]]", {}), ("Tuple[str, int], optional", {"type": "array"}),
    ],
)  # fmt: skip
def test_python_types_become_schemas(python_type, schema):
    tool = {"name": "f", "parameters": {"x": {"type": python_type, "description": "X."}}}
    parameters = tasks.function_schema(tool)["function"]["parameters"]
    assert parameters["properties"] == {"x": {**schema, "description": "X."}}
    assert parameters["required"] == ([] if "ptional" in python_type else ["x"])


def test_a_tool_becomes_a_schema():
    """A parameter may have the name "type". Optional parameters and those with a default value are
    not required."""
    parameters = {
        "type": {"type": "str", "description": "Kind."},
        "n": {"type": "int, optional", "description": ""},
        "m": {"type": "int", "description": "", "default": 3},
    }
    tool = {"name": "f", "description": "Does.", "parameters": parameters}
    function = tasks.function_schema(tool)["function"]
    assert function["name"] == "f" and function["description"] == "Does."
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "type": {"type": "string", "description": "Kind."},
            "n": {"type": "integer", "description": ""},
            "m": {"type": "integer", "description": "", "default": 3},
        },
        "required": ["type"],
    }


# -- Data files ------------------------------------------------------------------------------------


def make_records(count):
    return [
        {"id": 7, "query": f"add {i}", "answers": json.dumps([call("add", a=i)]),
         "tools": json.dumps(TOOLS)} for i in range(count)
    ]  # fmt: skip


def write_records(folder, records, file_format):
    """Write a data file "d" and return its path. The formats "lines", "pretty" and "dense" are JSON
    lists with different whitespace."""
    if file_format == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        file = folder / "d.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(records), file)
    elif file_format == "jsonl":
        file = folder / "d.jsonl"
        file.write_text("\n".join(map(json.dumps, records)) + "\n")
    else:
        file = folder / "d.json"
        indent = {"lines": 0, "pretty": 2, "dense": None}[file_format]
        file.write_text(json.dumps(records, indent=indent))
    return str(file)


MERGED_SPLITS = {"train": ("cold", "train"), "dev": ("dev",), "test": ("test",)}


@pytest.mark.parametrize("file_format", ["jsonl", "lines", "pretty", "dense", "parquet"])
def test_files_of_all_formats_are_read_and_split(tmp_path, file_format):
    path = write_records(tmp_path, make_records(50), file_format)
    all_problems = task.load(path, split="all")
    assert sorted(problem.id for problem in all_problems) == list(range(50))
    assert all(problem.query == f"add {problem.id}" for problem in all_problems)
    problems = {split: task.load(path, split=split) for split in MERGED_SPLITS}
    ids = [problem.id for split in problems for problem in problems[split]]
    assert sorted(ids) == list(range(50))
    for split in problems:
        assert len(problems[split]) >= 4
        assert all(tasks.split_of(p.query) in MERGED_SPLITS[split] for p in problems[split])
    other_order = APIGen().load(path, split="train", seed=9)
    assert other_order != problems["train"]
    assert set(other_order) == set(problems["train"])  # the split does not depend on the seed
    assert task.load(path, split="all", limit=3) == all_problems[:3]
    assert task.load(path, split="dev", limit=3) == problems["dev"][:3]
    for split in ("cold", "nowhere"):
        choose = "choose one of train, dev, test, all"
        with pytest.raises(ValueError, match=f"no split '{split}': {choose}"):
            task.load(path, split=split)


def test_the_data_files_of_a_folder_are_read_in_order(tmp_path):
    records = make_records(9)
    (tmp_path / "b").mkdir()
    write_records(tmp_path / "b", records[3:5], "parquet")
    write_records(tmp_path / "b", records[5:], "jsonl")
    (tmp_path / "a.json").write_text(json.dumps(records[:3]))
    (tmp_path / "README.md").write_text("no data")
    problems = task.load(str(tmp_path), split="all", limit=9)
    queries = [problem.query for problem in sorted(problems, key=lambda problem: problem.id)]
    assert queries == [f"add {i}" for i in (0, 1, 2, 5, 6, 7, 8, 3, 4)]
    assert sorted(problem.id for problem in problems) == list(range(9))
    write_records(tmp_path / "b", [*records[:2], {**records[2], "tools": "[1]"}], "parquet")
    with pytest.raises(ValueError, match="b/d.parquet, record 3: "):
        task.load(str(tmp_path))


def test_the_splits_of_a_file_have_their_shares_and_never_change(tmp_path):
    """Results are reproduced from a file, so the same problems must always be in a split."""
    path = tmp_path / "d.jsonl"
    path.write_text("".join(f'{{"nums": [1, 2, {i}], "target": 3}}\n' for i in range(4_000)))
    problems = {split: Countdown().load(str(path), split=split) for split in MERGED_SPLITS}
    for split, share in (("train", 0.71), ("dev", 0.13), ("test", 0.16)):
        assert abs(len(problems[split]) / 4_000 - share) < 0.015
    assert sum(map(len, problems.values())) == 4_000 == len(set().union(*problems.values()))
    first_ids = {split: sorted(p.id for p in problems[split])[:8] for split in problems}
    assert first_ids["dev"] == [4, 16, 33, 48, 58, 63, 67, 70]
    assert first_ids["test"] == [5, 6, 11, 14, 24, 31, 42, 43]


def test_problems_with_equal_queries_are_in_the_same_split(tmp_path):
    """Even if their tools differ. No problem is lost."""
    records = make_records(28)
    with_other_tools = [{**record, "tools": json.dumps(TOOLS[:1])} for record in records]
    path = write_records(tmp_path, records + with_other_tools * 2, "jsonl")
    ids = [{problem.id for problem in task.load(path, split=split)} for split in MERGED_SPLITS]
    assert all(ids) and sorted(set.union(*ids)) == list(range(84))
    assert sum(map(len, ids)) == 84
    queries = [{i % 28 for i in ids_of_split} for ids_of_split in ids]
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(queries, 2))


DAMAGE = {
    "cut in half": lambda line: line[: len(line) // 2],
    "a field is missing": lambda line: line.replace('"tools"', '"stools"'),
    "answers are not JSON": lambda line: line.replace('"[{\\"name', '"[{\\"na\\"me'),
    "answers are not calls": lambda line: line.replace("arguments", "argument"),
    "answers are not a list": lambda line: json.dumps({**json.loads(line), "answers": "{}"}),
    "answers are not a text": lambda line: json.dumps({**json.loads(line), "answers": [1]}),
    "a tool without a name": lambda line: line.replace('\\"name\\": \\"find\\", ', ""),
    "a type is a number": lambda line: line.replace('\\"float\\"', "5"),
    "a query is a list": lambda line: json.dumps({**json.loads(line), "query": ["add"]}),
    "a query is a number": lambda line: json.dumps({**json.loads(line), "query": 5}),
    "a query is not valid Unicode": lambda line: line.replace("add 6", "\\ud800"),
    "a tool is not valid Unicode": lambda line: line.replace("Add.", "\\\\ud800"),
    "a record is not an object": lambda line: "17",
    "a key occurs twice": lambda line: line.replace('"tools"', '"query"'),
    "a number is not finite": lambda line: line.replace("7,", "NaN,"),
    "not UTF-8": lambda line: line.replace("add", "\udcff"),
    "nested too deeply": lambda line: '{"a":' + "[" * 9_000,
}
NOT_JSON = ("cut in half", "nested too deeply", "a key occurs twice", "a number is not finite")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file_format", ["jsonl", "list"])
def test_the_error_for_a_bad_record_names_file_and_record(tmp_path, damage, file_format):
    lines = [json.dumps(record) for record in make_records(20)]
    assert DAMAGE[damage](lines[6]) != lines[6]
    lines[6] = DAMAGE[damage](lines[6])
    text = "\n".join(lines) + "\n"
    if file_format == "list":
        text = "[\n" + ",\n".join(lines) + "\n]"
    path = tmp_path / "d.json"
    path.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    # Some damage makes the file as a whole unreadable, so that no record can be named.
    whole_file = damage == "not UTF-8" or (file_format == "list" and damage in NOT_JSON)
    with pytest.raises(ValueError) as error:
        APIGen().load(str(path))
    message = str(error.value)
    place = "record" if file_format == "list" else "line"
    assert re.match(rf"{path}: \S+" if whole_file else rf"{path}, {place} 7: \w+", message)
    assert "\n" not in message and len(message) < 300


def test_a_list_that_ends_between_two_records_is_refused(tmp_path):
    path = tmp_path / "d.json"
    path.write_text("[\n" + ",\n".join(map(json.dumps, make_records(5))) + ",\n")
    with pytest.raises(ValueError, match="d.json: .* line 7 column 1 "):
        APIGen().load(str(path))
    with pytest.raises((OSError, ValueError)):
        APIGen().load(str(tmp_path / "nowhere.json"))
    for content, message in (
        ("", "no problems"),
        ("\n \n", "no problems"),
        ("[]", "no problems"),
        ("\n \n17", "d.json, line 3: "),
    ):
        (tmp_path / "d.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            APIGen().load(str(path))


@pytest.mark.parametrize("file_format", ["jsonl", "lines", "dense"])
def test_a_byte_order_mark_is_ignored(tmp_path, file_format):
    """Some programs on Windows write it at the beginning of a file."""
    path = Path(write_records(tmp_path, make_records(9), file_format))
    expected = task.load(str(path), split="all")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert task.load(str(path), split="all") == expected and len(expected) == 9


def test_empty_lines_are_skipped_and_counted(tmp_path):
    lines = [json.dumps(record) for record in make_records(3)]
    path = tmp_path / "d.jsonl"
    path.write_text("\n" + lines[0] + "\n\n \t\r\n" + "\n".join(lines[1:]) + "\n\n")
    assert {problem.id for problem in task.load(str(path), split="all")} == {0, 1, 2}
    path.write_text("\n" + lines[0] + "\n\n\n{'a'}\n")
    message = f"^{path}, line 5: JSONDecodeError: Expecting property name"
    with pytest.raises(ValueError, match=message) as error:
        task.load(str(path))
    assert "line 1" not in str(error.value)  # the decoder only knows its own text, a single line


def test_unknown_fields_are_ignored_and_missing_ones_are_named(tmp_path):
    """In a file of another task, the hint says what may be wrong."""
    path = tmp_path / "d.jsonl"
    apigen_record = make_records(1)[0]
    countdown_record = {"nums": [1, 2, 3], "target": 6}
    sentence = {"place": "at home", "required_word": "cat", "forbidden_word": "dog"}
    records = {"apigen": apigen_record, "countdown": countdown_record, "sentence": sentence}
    missing = {"apigen": "query", "countdown": "numbers", "sentence": "place"}
    task_classes = {"apigen": APIGen, "countdown": Countdown, "sentence": Sentence}
    for name, record in records.items():
        path.write_text(json.dumps({**record, "source": "a", "difficulty": [3]}))
        [problem] = task_classes[name]().load(str(path), split="all")
        assert problem == task_classes[name]().parse_record({**record, "id": 0})
        for other in records.keys() - {name}:
            with pytest.raises(ValueError) as error:
                task_classes[other]().load(str(path), split="all")
            assert str(error.value) == (
                f"{path}, line 1: the field '{missing[other]}' is missing; "
                "this may be a file of another task"
            )
            with pytest.raises(KeyError, match=missing[other]):
                task_classes[other]().parse_record({**record, "id": 0})


@pytest.mark.parametrize("other_fields", [{}, {"id": 7}, {"id": 7, "nums": [30, 100, 93]}])
@pytest.mark.parametrize("name", ["nums", "numbers"])
def test_countdown_reads_both_forms_of_records(tmp_path, name, other_fields):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({name: [30, 100, 93], "target": 23, **other_fields}))
    [problem] = Countdown().load(str(path), split="all")
    assert (problem.id, problem.numbers, problem.target) == (0, (30, 100, 93), 23)
    assert Countdown().verify(problem, "<answer>30 - (100 - 93)</answer>").correct
    for bad_record in (
        {name: [], "target": 1}, {name: [1], "target": "x"}, {name: [1]}, {name: 5, "target": 5},
        {name: [1] * 11, "target": 1}, {name: [3, -1], "target": 2}, {name: ["a"], "target": 2},
        {name: [[1]], "target": 1}, {name: None, "target": 1}, {"target": 1}, {},
        {"input": "30,100,93", "output": "23"},
    ):  # fmt: skip
        path.write_text(json.dumps(bad_record))
        with pytest.raises(ValueError, match="d.jsonl, line 1: "):
            Countdown().load(str(path), split="all")


@pytest.mark.parametrize(
    "record",
    [
        {"nums": "123", "target": 6}, {"nums": ["1", "2"], "target": 3},
        {"nums": [1, 2], "target": "3"}, {"nums": [5.9, 1], "target": 6},
        {"nums": [5, 1], "target": 6.5}, {"nums": [True, 2], "target": 3},
        {"nums": [1, 2], "target": True}, {"nums": {"1": 0, "2": 0}, "target": 3},
        {"nums": [1, None], "target": 1}, {"nums": [1, 2], "target": None},
        {"nums": "1" * 999, "target": 1},
    ],
)  # fmt: skip
def test_countdown_does_not_convert_what_is_not_an_integer(tmp_path, record):
    (tmp_path / "d.jsonl").write_text("\n" + json.dumps(record))
    with pytest.raises(ValueError, match=r"d.jsonl, line 2: ValueError: .* is not a") as error:
        Countdown().load(str(tmp_path / "d.jsonl"), split="all")
    assert len(str(error.value)) < 300


def test_countdown_reads_integers_that_are_written_as_decimals(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"nums": [5.0, 1e1], "target": 15.0}')
    [problem] = Countdown().load(str(tmp_path / "d.jsonl"), split="all")
    assert (problem.numbers, problem.target) == ((5, 10), 15)
    assert all(type(number) is int for number in (*problem.numbers, problem.target))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real records are not here")
def test_real_countdown_records(tmp_path):
    """Their form, {"input": "30,100,93", "output": "23"}, is converted to TinyZero's first."""
    lines = (SHARED / "countdown_cd3_test.jsonl").read_text().splitlines()
    originals = [json.loads(line) for line in lines]
    records = [
        {"nums": [*map(int, r["input"].split(","))], "target": int(r["output"])} for r in originals
    ]
    path = write_records(tmp_path, records, "jsonl")
    all_problems = Countdown().load(path, split="all")
    assert len(all_problems) == 256
    assert all(len(problem.numbers) == 3 for problem in all_problems)
    split_of_numbers = {}
    for split in MERGED_SPLITS:
        for problem in Countdown().load(path, split=split):
            numbers = tuple(sorted(problem.numbers))
            assert split_of_numbers.setdefault(numbers, split) == split
    assert {*split_of_numbers.values()} == {*MERGED_SPLITS}


def test_without_a_file_the_error_says_to_pass_one():
    for split in tasks.SPLITS:
        message = "the problems of this task come from a file: pass it with --data"
        with pytest.raises(ValueError, match=message) as error:
            APIGen().load(split=split)
        assert "\n" not in str(error.value)
    assert APIGen.hub_id == "Salesforce/xlam-function-calling-60k"
