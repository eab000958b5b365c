"""Thousands of bad inputs: no exception but the documented ones, no reward that was not earned.

Time is bounded by the limits on length and depth in tasks.py, not by a clock. A few hundred inputs
of each kind here, thousands behind `pytest -m slow`.
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

AMOUNTS = [200, pytest.param(5_000, marks=pytest.mark.slow)]


COUNTDOWN_REASONS = {"correct", "wrong_value", "wrong_numbers", "malformed", "no_answer"}
APIGEN_REASONS = COUNTDOWN_REASONS - {"wrong_value", "wrong_numbers"}
APIGEN_REASONS |= {"wrong_arguments", "wrong_tool", "wrong_count"}


def fuzz(amount: int, check, *strategies) -> None:
    quiet = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    settings(max_examples=amount, **quiet)(given(*strategies)(check))()


def pieces(*words: str):
    """Texts out of words that mean something, and of anything else."""
    return st.lists(st.sampled_from(words) | st.text(max_size=3), max_size=40).map("".join)


EXPRESSIONS = pieces(
    "<answer>", "</answer>", *"0123456789+-*/()= ", "6", "10", "2", "(6+10)*2", "=32", "**", "//",
    "1e9", "0x6", "２", "٣", "−", "(" * 150, "-" * 150, "9" * 1_200, "__import__('os')", "\n",
)  # fmt: skip


def computed(text: str) -> Fraction:
    """The value of an expression by Python's own parser, as fractions."""

    def value(node) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                return Fraction(number)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=op, right=right):
                a, b = value(left), value(right)
                known = {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b}
                return known[type(op)] if type(op) in known else a / b
        raise AssertionError(f"{ast.dump(node)} was rewarded")

    return value(ast.parse(text, mode="eval").body)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_countdown_rewards_solutions_alone(amount):
    problem, rewarded = CountdownProblem(0, (6, 10, 2), 32), []

    def check(before, inside, after):
        completion = f"{before}<answer>{inside}</answer>{after}"
        for kind in (Countdown, TinyCountdown):
            verdict = kind().verify(problem, completion)
            assert verdict.reason in COUNTDOWN_REASONS
            assert verdict.correct == (verdict.reason == "correct")
        if verdict.correct:
            answer = completion.rpartition("</answer>")[0].rpartition("<answer>")[2].strip()
            answer = re.sub(r"=\s*32$", "", answer).strip()
            assert set(answer) <= set(string.digits + "+-*/() \n\t")
            assert computed(" ".join(answer.split())) == 32
            assert sorted(map(int, re.findall("[0-9]+", answer))) == [2, 6, 10]
            rewarded.append(answer)

    terms = st.permutations(["6", "10", "2"])
    sums = st.builds(
        lambda n, a, b: f"({n[0]}{a}{n[1]}){b}{n[2]}",
        terms, st.sampled_from("+-"), st.sampled_from("*/"),
    )  # fmt: skip
    fuzz(amount, check, EXPRESSIONS, EXPRESSIONS | sums, EXPRESSIONS)
    assert rewarded  # or nothing was tried


@pytest.mark.parametrize("amount", AMOUNTS)
def test_an_expression_is_its_value_or_refused(amount):
    def check(text):
        try:
            value, literals = tasks.parse_expression(text)
        except ValueError:
            return
        assert literals == list(map(int, re.findall("[0-9]+", text)))
        if value is not None:
            assert computed(" ".join(text.split())) == value

    fuzz(amount, check, EXPRESSIONS)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
CALLS = pieces(
    "<tool_call>", "</tool_call>", "<|python_tag|>", "```json\n", "```", *'[]{},:"', " ", "\n",
    '{"name": "add", "arguments": {"a": 1, "b": [true, "x"]}}', '{"name": "f", "parameters": {}}',
    '"name"', '"arguments"', "null", "NaN", "1e999", "[" * 3_000, '{"a":' * 300, "'", "\\u0000",
)  # fmt: skip


def strict(value) -> str:
    """A JSON value written so that equal texts are equal values: 1 is not true, nor "1"; 1.0 is."""
    if isinstance(value, dict):
        value = [f"{key!r}:{strict(each)}" for key, each in sorted(value.items())]
        return "{" + ",".join(value) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(strict, value))}]"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return repr(value)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_apigen_rewards_the_labelled_calls_alone(amount):
    wanted = [{"name": "add", "arguments": {"a": 1, "b": [True, "x"]}}]
    problem = tasks.APIGenProblem(0, "?", json.dumps(wanted), "[]")
    rewarded = []

    def check(before, arguments, wrap, after):
        calls = [{"name": "add", "arguments": arguments}]
        completion = before + wrap.replace("@", json.dumps(calls)) + after
        verdict = APIGen().verify(problem, completion)
        assert verdict.reason in APIGEN_REASONS
        if verdict.correct:
            if before == after == "":
                assert strict(calls) == strict(wanted)
            found = re.findall(r'\{"name": "add", "arguments": (.*?\})\}', completion)
            assert strict(wanted[0]["arguments"]) in [strict(json.loads(text)) for text in found]
            rewarded.append(completion)

    a, b = st.sampled_from([1, 1.0, True, "1", 2, None]), st.sampled_from([[True, "x"], [1, "x"]])
    near = st.fixed_dictionaries({"a": a, "b": b})
    wraps = st.sampled_from(["@", "```json\n@\n```", "Sure: @", "<tool_call>@</tool_call>"])
    nothing = st.just("")
    fuzz(amount, check, nothing | CALLS, near | VALUES, wraps, nothing | CALLS)
    assert rewarded


@pytest.mark.parametrize("amount", AMOUNTS)
def test_data_files_are_read_or_refused_by_record(amount, tmp_path):
    good = json.dumps(asdict(DrawnAPIGen().load(split="dev", limit=1)[0]))
    count = json.dumps({"nums": [6, 10, 2], "target": 32})
    words = pieces(
        good, count, "\n", *'[]{},:"', '"id"', "null", "1e999", "[" * 2_000, '{"nums": 7}',
        '{"query": "", "answers": "[]", "tools": "[]"}', '{"numbers": [1], "target": 1}',
        '{"answers": "{}", "query": 1, "tools": []}', "\ufeff", "\\ud800",
        '{"query": "\\ud800", "answers": "[]", "tools": "[]"}',
    )  # fmt: skip

    def one_value(path) -> bool:
        """Whether a file is a single JSON list, or not even text."""
        try:
            return path.read_text(encoding="utf-8").strip().startswith("[")
        except UnicodeDecodeError:
            return True

    def check(text, cut):
        for kind in (Countdown, APIGen):
            path = tmp_path / f"data.{'json' if cut % 2 else 'jsonl'}"
            path.write_bytes(text.encode(errors="surrogatepass")[: len(text) - cut % 9])
            try:
                problems = kind().load(str(path), "all")
            except ValueError as error:
                place = "(, record [0-9]+)?" if one_value(path) else ", record [0-9]+"
                said = rf"{path}({place}: \S| leaves no problems)"
                assert re.match(said, str(error)) and "\n" not in str(error), error
                continue
            for problem in problems:  # what the model reads is Unicode
                json.dumps(kind().messages(problem), ensure_ascii=False).encode()
                assert not kind().verify(problem, "").correct or problem.answers == "[]"

    fuzz(amount, check, words, st.integers(0, 100))


@pytest.mark.parametrize("amount", AMOUNTS)
def test_templates_render_or_refuse(amount, tiny):
    """Any template with any conversation, and any tools: a text, or a ValueError."""
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
            said = tokenizer.render([{"role": role, "content": content}], tools)
        except ValueError:
            return
        assert isinstance(said, str) and "<class" not in said

    roles = st.sampled_from(["user", "assistant", "system", "tool"]) | st.text(max_size=4)
    fuzz(
        amount, check, words, roles, st.text(max_size=20), st.none() | st.lists(VALUES, max_size=2)
    )

    def shown(content):  # the tiny model's own template, whatever is said
        text = tiny[1].render([{"role": "user", "content": content}])
        assert content in text and text.endswith("<|assistant|>")

    fuzz(amount, shown, st.text(max_size=60))


@pytest.mark.parametrize("amount", AMOUNTS)
def test_safetensors_load_or_refuse(amount, folder):
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
    fuzz(amount, check, edits, st.sampled_from([0, 0, 0, 1, 100]), st.booleans())
