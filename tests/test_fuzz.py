"""Fuzzing: bad inputs raise only the documented exceptions, and wrong answers are never rewarded.

The time for an input is bounded by the limits on length and depth in tasks.py, so that no test
needs a timeout. Each test tries a hundred inputs, and thousands with `pytest -m slow`.
"""

import ast
import json
import re
import string
from dataclasses import asdict
from fractions import Fraction

import pytest
import tokenizers
from drawn_apigen import DrawnAPIGen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import model as models
import tasks
from tasks import APIGen, Countdown, CountdownProblem, TinyCountdown

NUM_INPUTS = [100, pytest.param(5_000, marks=pytest.mark.slow)]

COUNTDOWN_REASONS = {"correct", "wrong_value", "wrong_numbers", "malformed", "no_answer"}
APIGEN_REASONS = COUNTDOWN_REASONS - {"wrong_value", "wrong_numbers"}
APIGEN_REASONS |= {"wrong_arguments", "wrong_tool", "wrong_count"}


def fuzz(num_inputs: int, check, *strategies) -> None:
    """Call `check` with inputs that hypothesis draws from the strategies."""
    options = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    settings(max_examples=num_inputs, **options)(given(*strategies)(check))()


def pieces(*words: str):
    """A strategy for texts that mix meaningful words with arbitrary characters."""
    return st.lists(st.sampled_from(words) | st.text(max_size=3), max_size=40).map("".join)


EXPRESSIONS = pieces(
    "<answer>", "</answer>", *"0123456789+-*/()= ", "6", "10", "2", "(6+10)*2", "=32", "**", "//",
    "1e9", "0x6", "２", "٣", "−", "(" * 150, "-" * 150, "9" * 1_200, "__import__('os')", "\n",
)  # fmt: skip


def exact_value(text: str) -> Fraction:
    """The exact value of an expression, according to Python's own parser."""

    def value(node) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                return Fraction(number)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=op, right=right):
                a, b = value(left), value(right)
                results = {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b}
                return results[type(op)] if type(op) in results else a / b
        raise AssertionError(f"{ast.dump(node)} was rewarded")

    return value(ast.parse(text, mode="eval").body)


@pytest.mark.parametrize("num_inputs", NUM_INPUTS)
def test_countdown_rewards_nothing_but_solutions(num_inputs):
    problem, rewarded = CountdownProblem(0, (6, 10, 2), 32), []

    def check(before, inside, after):
        completion = f"{before}<answer>{inside}</answer>{after}"
        for task in (Countdown(), TinyCountdown()):
            verdict = task.verify(problem, completion)
            assert verdict.reason in COUNTDOWN_REASONS
            assert verdict.correct == (verdict.reason == "correct")
        if verdict.correct:
            answer = completion.rpartition("</answer>")[0].rpartition("<answer>")[2].strip()
            answer = re.sub(r"=\s*32$", "", answer).strip()
            assert set(answer) <= set(string.digits + "+-*/() \n\t")
            assert exact_value(" ".join(answer.split())) == 32
            assert sorted(map(int, re.findall("[0-9]+", answer))) == [2, 6, 10]
            rewarded.append(answer)

    likely_answers = st.builds(
        lambda numbers, first, last: f"({numbers[0]}{first}{numbers[1]}){last}{numbers[2]}",
        st.permutations(["6", "10", "2"]), st.sampled_from("+-"), st.sampled_from("*/"),
    )  # fmt: skip
    surroundings = st.just("") | EXPRESSIONS
    fuzz(num_inputs, check, surroundings, EXPRESSIONS | likely_answers, surroundings)
    assert rewarded  # otherwise the inputs were too bad to test anything


@pytest.mark.parametrize("num_inputs", NUM_INPUTS)
def test_an_expression_has_the_right_value_or_is_refused(num_inputs):
    def check(text):
        try:
            value, literals = tasks.parse_expression(text)
        except ValueError:
            return
        assert literals == list(map(int, re.findall("[0-9]+", text)))
        if value is not None:
            assert exact_value(" ".join(text.split())) == value

    fuzz(num_inputs, check, EXPRESSIONS)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
CALLS = pieces(
    "<tool_call>", "</tool_call>", "<|python_tag|>", "```json\n", "```", *'[]{},:"', " ", "\n",
    "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "add", "; ", "[add(", "a=1", ")]", "</think>",
    '{"name": "add", "arguments": {"a": 1, "b": [true, "x"]}}', '{"name": "f", "parameters": {}}',
    '"name"', '"arguments"', "null", "NaN", "1e999", "[" * 3_000, '{"a":' * 300, "'", "\\u0000",
)  # fmt: skip


def canonical(value) -> str:
    """A text for a JSON value, such that values are equal if and only if their texts are equal: 1
    equals 1.0, but neither true nor "1"."""
    if isinstance(value, dict):
        items = [f"{key!r}:{canonical(item)}" for key, item in sorted(value.items())]
        return "{" + ",".join(items) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(canonical, value))}]"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return repr(value)


def json_objects(text: str) -> list[dict]:
    """All JSON objects that begin anywhere in a text."""
    objects = []
    for start in (match.start() for match in re.finditer("{", text)):
        try:
            objects.append(json.JSONDecoder().raw_decode(text, start)[0])
        except (ValueError, RecursionError):
            continue
    return objects


@pytest.mark.parametrize("num_inputs", NUM_INPUTS)
def test_apigen_rewards_nothing_but_the_ground_truth(num_inputs):
    expected_calls = [{"name": "add", "arguments": {"a": 1, "b": [True, "x"]}}]
    expected_arguments = canonical(expected_calls[0]["arguments"])
    problem = tasks.APIGenProblem(0, "?", json.dumps(expected_calls), "[]")
    rewarded = set()

    def check(before, arguments, wrapper, after):
        call = {"name": "add", "arguments": arguments}
        keywords = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        text = wrapper.replace("#call", json.dumps(call)).replace("#python", keywords)
        completion = before + text.replace("#arguments", json.dumps(arguments)) + after
        verdict = APIGen().verify(problem, completion)
        assert verdict.reason in APIGEN_REASONS
        if verdict.correct:
            if before == after == "":
                assert canonical(arguments) == expected_arguments
            readings = [arguments] if "#python" in wrapper else []
            for json_object in json_objects(completion):
                readings.append(json_object)  # the arguments of a call of Mistral
                readings += [json_object.get(key) for key in ("arguments", "parameters")]
            assert expected_arguments in map(canonical, readings)
            rewarded.add(wrapper)

    a, b = st.sampled_from([1, 1.0, True, "1", 2, None]), st.sampled_from([[True, "x"], [1, "x"]])
    similar_arguments = st.fixed_dictionaries({"a": a, "b": b})
    likely_arguments = st.just(expected_calls[0]["arguments"]) | similar_arguments
    wrappers = [
        "[#call]", "#call", "```json\n[#call]\n```", "Sure: [#call]",
        "<tool_call>#call</tool_call>", "<tool_call>[#call]</tool_call>", "add#arguments",
        "[TOOL_CALLS]add[ARGS]#arguments", "[add(#python)]",
    ]  # fmt: skip
    surroundings = st.just("") | CALLS
    arguments = likely_arguments | st.dictionaries(st.text(max_size=3), VALUES, max_size=3)
    fuzz(num_inputs, check, surroundings, arguments, st.sampled_from(wrappers), surroundings)
    assert len(rewarded) >= 3


@pytest.mark.parametrize("num_inputs", NUM_INPUTS)
def test_data_files_are_read_or_refused_by_record(num_inputs, tmp_path):
    apigen_record = json.dumps(asdict(DrawnAPIGen().load(split="dev", limit=1)[0]))
    countdown_record = json.dumps({"nums": [6, 10, 2], "target": 32})
    texts = pieces(
        apigen_record, countdown_record, "\n", *'[]{},:"', '"id"', "null", "1e999", "[" * 2_000,
        '{"query": "", "answers": "[]", "tools": "[]"}',
        '{"nums": 7}', '{"numbers": [1], "target": 1}',
        '{"answers": "{}", "query": 1, "tools": []}', "\ufeff", "\\ud800",
        '{"query": "\\ud800", "answers": "[]", "tools": "[]"}',
    )  # fmt: skip

    def is_single_value(path) -> bool:
        """Whether a file is a single JSON list, or not valid UTF-8."""
        try:
            return path.read_text(encoding="utf-8-sig").strip().startswith("[")
        except UnicodeDecodeError:
            return True

    def check(text, cut):
        for task in (Countdown(), APIGen()):
            path = tmp_path / f"data.{'json' if cut % 2 else 'jsonl'}"
            path.write_bytes(text.encode(errors="surrogatepass")[: len(text) - cut % 9])
            try:
                problems = task.load(str(path), "all")
            except ValueError as error:
                record = "(, record [0-9]+)?" if is_single_value(path) else ", line [0-9]+"
                message = rf"{path}({record}: \S| contains no problems)"
                assert re.match(message, str(error)) and "\n" not in str(error), error
                continue
            for problem in problems:
                # The prompt is valid Unicode.
                json.dumps(task.messages(problem), ensure_ascii=False).encode()
                assert not task.verify(problem, "").correct or problem.answers == "[]"

    fuzz(num_inputs, check, texts, st.integers(0, 100))


@pytest.mark.parametrize("num_inputs", NUM_INPUTS)
def test_templates_render_or_raise_value_error(num_inputs, tiny):
    """Any template with any conversation and any tools gives a text or a ValueError."""
    words = pieces(
        "{{", "}}", "{%", "%}", " for m in messages ", " endfor ", " if tools ", " endif ", "m",
        ".role", ".content", "|tojson", "|trim", "messages[0]", "[-1]", " set x = ", "tools",
        "raise_exception('no')", "strftime_now('%Y')", "().__class__.__mro__", "''", "namespace()",
        " macro f() ", " endmacro ", " generation ", "loop.previtem", "1/0", "{#", "#}", "\n",
    )  # fmt: skip
    blank = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<unknown>": 1}, "<unknown>"))

    def check(template, role, content, tools):
        if not template:
            return
        settings = {"chat_template": template, "eos_token": "a"}
        try:
            tokenizer = models.Tokenizer(blank, settings, {})
        except ValueError:
            return
        try:
            text = tokenizer.render([{"role": role, "content": content}], tools)
        except ValueError:
            return
        assert isinstance(text, str) and "<class" not in text

    roles = st.sampled_from(["user", "assistant", "system", "tool"]) | st.text(max_size=4)
    fuzz(
        num_inputs,
        check,
        words,
        roles,
        st.text(max_size=20),
        st.none() | st.lists(VALUES, max_size=2),
    )

    def shown(content):  # the template of the tiny model shows any content
        text = tiny[1].render([{"role": "user", "content": content}])
        assert content in text and text.endswith("<|assistant|>")

    fuzz(num_inputs, shown, st.text(max_size=60))


@pytest.mark.parametrize("num_inputs", NUM_INPUTS)
def test_damaged_safetensors_load_or_raise_an_error(num_inputs, folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")

    def check(edits, length, in_header):
        changed = bytearray(whole)
        for place, byte in edits:
            changed[place % (header if in_header else len(whole))] = byte
        path.write_bytes(bytes(changed[: len(whole) - length]))
        try:
            model = models.Model.from_pretrained(folder)
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error)
            return
        assert length == 0 and sum(p.numel() for p in model.parameters()) > 0

    edits = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=4)
    fuzz(num_inputs, check, edits, st.sampled_from([0, 0, 0, 1, 100]), st.booleans())
