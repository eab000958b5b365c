"""Tasks: problems, the texts that pose them, and verifiers that say right or wrong.

A task is a subclass of `Task` with these parts:

    Problem                         a dataclass: what is asked, with an integer `id`
    draw_problems(split, limit, rng)  random problems of a split; not needed for those from files
    messages(problem)               the question as a chat, and tools for the chat template or None
    verify(problem, completion)     a Verdict: right or wrong, and why

`Task` has the rest, and a task may override it. README shows a whole task. Here are Countdown,
TinyCountdown (for a tiny model that is made from nothing) and APIGen (function calling).

A policy finds every answer that is rewarded without being right. So no text of a model comes near
`eval`: Countdown has a parser of its own, and APIGen compares JSON strictly.
"""

import itertools
import json
import math
import operator
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

MAX_CHARS = 1_000  # a longer expression is malformed: this bounds the verifier's time
MAX_DEPTH = 100  # so is anything nested deeper than this
MAX_TEXT_CHARS = 20_000  # so is a longer text with calls in it
SPLITS = {"cold": 55, "train": 16, "dev": 13, "test": 16}  # per cent of the problems
REFLECT = (  # the paper's words, as recalled
    "You tried {}. Reflect on what went wrong and write a short explanation that will help you do "
    "better next time."
)


@dataclass(frozen=True)
class Verdict:
    """What a verifier says: right or not, and the reason as a key for counting."""

    correct: bool
    reason: str


def split_of(key: str) -> str:
    """The split of a problem: a fixed draw, keyed by what identifies the problem."""
    return random.Random(key).choices(list(SPLITS), weights=SPLITS.values())[0]


class Task:
    """What a task has unless it says otherwise: texts, problems from files, splits."""

    name = "task"  # keys the order of its problems
    hub_id: str | None = None  # a dataset on the Hugging Face hub, for a task that draws none
    reflection_instruction = REFLECT.format("performing the task, but failed")
    retry_instruction = "Now try again."
    input_format = "the number of a problem, such as 7"

    def load(
        self, path: str | None = None, split: str = "train", limit: int | None = None, seed: int = 0
    ) -> list:
        """Problems of a split, at most `limit`, in an order drawn from `seed`: random ones (from
        `draw_problems`), or those of a file (JSON, JSONL, parquet) or folder. Files have a split
        "all", and no "cold" (it is part of "train"). Two splits share no problem's `key`. Raises
        ValueError for a bad split or record."""
        splits = list(SPLITS) if path is None else ["train", "dev", "test", "all"]
        if split not in splits:
            raise ValueError(f"there is no split {split!r}: choose one of {', '.join(splits)}")
        rng = random.Random(f"{self.name} {split} {seed}")
        if path is None:
            return self.draw_problems(split, limit, rng)
        parts = {"all": SPLITS, "train": ("cold", "train")}.get(split, (split,))
        problems = [p for p in self.read(Path(path)) if split_of(self.key(p)) in parts]
        if not problems:
            raise ValueError(f"{path} leaves no problems for the split {split!r}")
        return rng.sample(problems, len(problems))[:limit]

    def draw_problems(self, split: str, limit: int | None, rng: random.Random) -> list:
        """Problems of a split, at most `limit` if given, ids from 0. Splits share no problem."""
        raise ValueError(f"the task {self.name} draws no problems: give --data a file of them")

    def read(self, path: Path) -> list:
        """All problems of a file or folder, numbered. A ValueError names the place of a bad one."""
        problems = []
        inside = [f for f in sorted(path.rglob("*")) if f.suffix in (".json", ".jsonl", ".parquet")]
        for file in inside or [path]:
            for number, record in enumerate(records(file), 1):
                try:
                    record = JSON.decode(record) if isinstance(record, str) else record
                    problems.append(self.problem({**record, "id": len(problems)}))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    reason = f"{type(error).__name__}: {error}"
                    raise ValueError(f"{file}, record {number}: {reason}") from None
        return problems

    def problem(self, record: dict):
        """A problem from its JSON record. Raises ValueError, KeyError, TypeError for a bad one."""
        return self.Problem(**record)

    def key(self, problem) -> str:
        """What identifies a problem: two with the same key are never in two splits."""
        return repr(replace(problem, id=0))

    def parse(self, line: str):
        """A drawn problem from what a person typed: its number. Raises ValueError if it is none."""
        if not re.fullmatch("[0-9]{1,4}", line):
            raise ValueError(f"type {self.input_format}")
        return self.load(split="dev", limit=int(line) + 1)[-1]


# -- JSON, strictly --------------------------------------------------------------------------------
def read_object(pairs: list[tuple]) -> dict:
    """A JSON object in which no key is given twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def read_number(text: str) -> int | float:
    """A finite JSON number; 5.0 is read as 5, so that equal numbers are written alike."""
    value = float(text)
    if len(text) > 100 or not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no number here")
    if text.lstrip("-").isdigit():
        return int(text)  # exact, as 2**53 + 1
    return int(value) if value.is_integer() else value


# The constants are NaN and the infinities: errors.
NUMBERS = dict.fromkeys(("parse_int", "parse_float", "parse_constant"), read_number)
JSON = json.JSONDecoder(object_pairs_hook=read_object, **NUMBERS)


def records(file: Path) -> list:
    """The records in a file: objects of a JSON list or of parquet, or else lines, not yet read."""
    if file.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{file}: to read parquet, pip install pyarrow") from None
        return pyarrow.parquet.read_table(file).to_pylist()
    try:
        text = file.read_text(encoding="utf-8").strip()
        return JSON.decode(text) if text.startswith("[") else text.split("\n")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from None


# -- Arithmetic: a parser that can only add, subtract, multiply and divide -------------------------
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}  # of precedence


def parse_expression(text: str) -> tuple[Fraction | None, list[int]]:
    """Read an arithmetic expression: its exact value, and the integer literals in it, in order.

    Grammar, and nothing beyond it (no `**`, `//`, decimals, names, leading zeros, other digits):

        sum     = product (("+" | "-") product)*
        product = factor (("*" | "/") factor)*
        factor  = "-" factor | "(" sum ")" | integer

    >>> parse_expression("(10 + 6) * 2")
    (Fraction(32, 1), [10, 6, 2])

    The value is None where it divides by zero. Raises ValueError for other text, and for one that
    is over MAX_CHARS or nests over MAX_DEPTH levels.
    """
    if len(text) > MAX_CHARS:
        raise ValueError("too long")
    literals = [int(digits) for digits in re.findall("[0-9]+", text)]
    tokens = re.findall(r"[0-9]+|\S", text, flags=re.ASCII)[::-1]  # the next one is the last
    try:
        value = parse_terms(tokens, level=1, depth=0)
    except ZeroDivisionError:
        return None, literals
    if tokens:
        raise ValueError(f"unexpected {tokens[-1]!r}")
    return value, literals


def parse_terms(tokens: list[str], level: int, depth: int) -> Fraction:
    """A factor and the operations after it that have at least this level of precedence."""
    value = parse_factor(tokens, depth)
    while tokens and PRECEDENCE.get(tokens[-1], 0) >= level:
        operator_ = tokens.pop()
        value = OPERATORS[operator_](value, parse_terms(tokens, PRECEDENCE[operator_] + 1, depth))
    return value


def parse_factor(tokens: list[str], depth: int) -> Fraction:
    token = tokens.pop() if tokens and depth <= MAX_DEPTH else "an end, or brackets too deep"
    if token == "-":
        return -parse_factor(tokens, depth + 1)
    if token == "(":
        value = parse_terms(tokens, level=1, depth=depth + 1)
        if tokens and tokens.pop() == ")":
            return value
    if not re.fullmatch("0|[1-9][0-9]*", token):
        raise ValueError(f"unexpected {token!r}")
    return Fraction(token)


# -- Countdown -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class CountdownProblem:
    """A Countdown problem: reach `target` with each of `numbers` used exactly once."""

    id: int
    numbers: tuple[int, ...]
    target: int


class Countdown(Task):
    """The numbers game, as in TinyZero and in the paper: 3 or 4 numbers from 1 to 99."""

    Problem = CountdownProblem
    name = "countdown"
    hub_id = "Jiayi-Pan/Countdown-Tasks-3to4"
    reflection_instruction = REFLECT.format("solving the problem and got the wrong answer")
    retry_instruction = "Now try again. Give your equation inside <answer> </answer>."
    question = (
        "Using the numbers {numbers}, create an equation that equals {target}. You can use basic "
        "arithmetic operations (+, -, *, /) and parentheses, and you must use every number exactly "
        "once. Think step by step, then give the equation inside <answer> </answer>, for example "
        "<answer> (1 + 2) / 3 </answer>."
    )
    input_format = "the numbers and then the target, such as 6 10 2 32"
    typed_pattern = re.compile(r"[0-9]{1,3}(\s+[0-9]{1,3}){2,}")

    def key(self, problem: CountdownProblem) -> str:
        """The numbers, whatever their order: those of a test problem are never seen in training."""
        return f"Countdown {sorted(problem.numbers)}"

    def problem(self, record: dict) -> CountdownProblem:
        """A problem from {"nums", "target"}, as in TinyZero's dataset, or as we write it."""
        numbers, target = record["nums" if "nums" in record else "numbers"], record["target"]
        if not 1 <= len(numbers) <= 10 or min(map(int, numbers)) < 0:
            raise ValueError(f"{numbers!r} are no Countdown numbers")
        return CountdownProblem(int(record["id"]), tuple(map(int, numbers)), int(target))

    def parse(self, line: str) -> CountdownProblem:
        if not self.typed_pattern.fullmatch(line):
            raise ValueError(f"type {self.input_format}")
        *numbers, target = map(int, line.split())
        return CountdownProblem(0, tuple(numbers), target)

    def messages(self, problem: CountdownProblem) -> tuple[list[dict], None]:
        text = self.question.format(numbers=list(problem.numbers), target=problem.target)
        return [{"role": "user", "content": text}], None

    def verify(self, problem: CountdownProblem, completion: str) -> Verdict:
        """Judge the last `<answer>…</answer>`: exact arithmetic, each number exactly once.

        >>> problem = CountdownProblem(0, (6, 10, 2), 32)
        >>> Countdown().verify(problem, "<answer> (10 + 6) * 2 = 32 </answer>")
        Verdict(correct=True, reason='correct')
        """
        _, opening, answer = completion.rpartition("</answer>")[0].rpartition("<answer>")
        if not opening:
            return Verdict(False, "no_answer")
        answer = answer.strip()
        if len(answer) <= MAX_CHARS:  # "= target" may stand at the end
            answer = re.sub(rf"=\s*{problem.target}\Z", "", answer)
        try:
            value, literals = parse_expression(answer)
        except ValueError:
            return Verdict(False, "malformed")
        if sorted(literals) != sorted(problem.numbers):
            return Verdict(False, "wrong_numbers")
        right = value == problem.target
        return Verdict(right, "correct" if right else "wrong_value")


class TinyCountdown(Countdown):
    """3 numbers from 1 to 10, and all that makes a tiny model: short texts, words, dialogues."""

    hub_id = None
    reflection_instruction = "Wrong. Reflect."
    retry_instruction = "Again."
    question = "Make {target} from {numbers[0]} {numbers[1]} {numbers[2]} ."
    generic_reflection = "I will be careful ."
    input_format = "3 numbers from 1 to 10 and a target up to 60, such as 6 10 2 32"
    typed_pattern = re.compile(r"((10|[1-9])\s+){3}(60|[1-5]?[0-9])")

    def draw_problems(
        self, split: str, limit: int | None, rng: random.Random
    ) -> list[CountdownProblem]:
        """All problems of a split, or `limit` of them: this game is small enough to list them."""
        problems = []
        for numbers in itertools.combinations_with_replacement(range(1, 11), 3):
            if split_of(f"Countdown {list(numbers)}") == split:
                last_steps = itertools.chain(*all_plans(numbers).values())
                for target in sorted({result(step) for step in last_steps} - {0}):
                    problems.append((rng.sample(numbers, 3), target))
        rng.shuffle(problems)
        return [CountdownProblem(i, tuple(n), t) for i, (n, t) in enumerate(problems[:limit])]

    def words(self) -> list[str]:
        """The vocabulary: the numbers up to 100, signs, and the words of the texts."""
        signs = "+ - * / = ( ) , . <answer> </answer> yes no"
        texts = (
            f"Make from Start with I need That is not {self.reflection_instruction} "
            f"{self.retry_instruction}"
        )
        return [*map(str, range(101)), *f"{signs} {texts} will be careful".split()]

    def cold_dialogue(
        self, problems: list, rng, diligent: bool
    ) -> tuple[CountdownProblem, list[str]]:
        """A problem (its numbers in any order) and the assistant's turns in a dialogue about it:
        [attempt] where that is right, else [attempt, reflection, retry]. A reflection may check
        plans before it chooses the one of the retry: only a check can find a solution.
        diligent: every reflection checks until it finds. Otherwise 60% check nothing, 20% go on
        with probability 0.7 after each check, 20% check until they find, and a tenth of all
        reflections is empty or generic (the retry then takes a random plan)."""
        drawn = rng.choice(problems)
        problem = replace(drawn, numbers=tuple(rng.sample(drawn.numbers, 3)))
        target, plans = problem.target, []
        for first, lasts in all_plans(problem.numbers).items():  # the last step that comes nearest
            plans.append((first, min(lasts, key=lambda last: abs(result(last) - target))))
        checks, plan = [], rng.choice(plans)
        if rng.random() < 0.08:  # an attempt that checks a little
            checks, plan = search(plans, target, rng, go_on=0.5)
        first, last = plan
        attempt = [f"I need {target} .", *checks, f"Start with {first} .", answer(plan)]
        if result(last) == target:
            return problem, [" ".join(attempt)]
        if not diligent and rng.random() < 0.1:
            reflection = [rng.choice(["", self.generic_reflection])]
            plan = rng.choice(plans)
        else:
            go_on = 1.0 if diligent else rng.choices([0.0, 0.7, 1.0], weights=[3, 1, 1])[0]
            checks, plan = search(plans, target, rng, go_on) if go_on else ([], rng.choice(plans))
            wrong = f"That is {result(last)} , not {target} ."
            reflection = [wrong, *checks, f"Start with {plan[0]} ."]
        return problem, [" ".join(attempt), " ".join(reflection), answer(plan)]


def steps_with(a: int, b: int) -> list[str]:
    """The steps on two numbers whose results are 0 to 60, as "10 / 2 = 5"."""
    large, small = max(a, b), min(a, b)
    steps = [f"{a} + {b} = {a + b}", f"{large} - {small} = {large - small}", f"{a} * {b} = {a * b}"]
    if small and large % small == 0:
        steps.append(f"{large} / {small} = {large // small}")
    return [step for step in steps if result(step) <= 60]


def result(step: str) -> int:
    """What is right of the equals sign."""
    return int(step.partition(" = ")[2])


def all_plans(numbers: tuple[int, ...]) -> dict[str, list[str]]:
    """All ways to combine three numbers in two steps: the last steps after each first step."""
    x, y, z = numbers
    plans = {}
    for a, b, left_over in ((x, y, z), (x, z, y), (y, z, x)):
        for first in steps_with(a, b):
            plans[first] = steps_with(result(first), left_over)
    return plans


def answer(plan: tuple[str, str]) -> str:
    """The whole expression of a plan: "<answer> ( 10 / 2 ) * 6 </answer>"."""
    inner, middle = plan[0].split(" = ")
    outer = plan[1].split()[:3]
    outer[outer.index(middle)] = f"( {inner} )"
    return f"<answer> {' '.join(outer)} </answer>"


def search(plans: list, target: int, rng, go_on: float) -> tuple[list[str], tuple[str, str]]:
    """Check plans in cyclic order from a random one: the checks ("10 / 2 = 5 , 5 * 6 = 30 no"), and
    the choice. A "yes" ends it, or a draw (probability 1 - go_on): then chance chooses."""
    checks, offset = [], rng.randrange(len(plans))
    for first, last in plans[offset:] + plans[:offset]:
        found = result(last) == target
        checks.append(f"{first} , {last} {'yes' if found else 'no'}")
        if found:
            return checks, (first, last)
        if rng.random() > go_on:
            break
    return checks, rng.choice(plans)


# -- APIGen ----------------------------------------------------------------------------------------
OPENING = re.compile(r'\[\s*[{\]]|\{\s*"')  # of a list of calls, or of a call
JSON_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean",
              "list": "array", "tuple": "array", "set": "array", "dict": "object"}  # fmt: skip


@dataclass(frozen=True)
class APIGenProblem:
    """A function-calling problem, under the names and in the form of xlam's records."""

    id: int
    query: str
    answers: str  # a JSON list of the right calls, {"name": …, "arguments": {…}}
    tools: str  # a JSON list: {"name", "description", "parameters": {name: {"type", …}}}


class APIGen(Task):
    """Function calling, as in the paper."""

    Problem = APIGenProblem
    name = "apigen"
    hub_id = "Salesforce/xlam-function-calling-60k"
    reflection_instruction = REFLECT.format(
        "performing the task, but failed in generating the correct tool call"
    )
    retry_instruction = "Now try again. Write the correct tool call."

    def problem(self, record: dict) -> APIGenProblem:
        """A problem from xlam's record. Raises an error if its calls or tools are not readable."""
        request = APIGenProblem(
            int(record["id"]), record["query"], record["answers"], record["tools"]
        )
        for call in JSON.decode(request.answers):
            read_call(call)
        JSON.decode(request.tools)
        tools = json.dumps(self.messages(request)[1], ensure_ascii=False)
        (request.query + tools).encode()  # an error where that is not Unicode
        return request

    def key(self, problem: APIGenProblem) -> str:
        return problem.query

    def messages(self, problem: APIGenProblem) -> tuple[list[dict], list[dict]]:
        """The query as a chat of one user message, and the tools with JSON schemas."""
        tools = [function_schema(tool) for tool in json.loads(problem.tools)]
        return [{"role": "user", "content": problem.query}], tools

    def verify(self, problem: APIGenProblem, completion: str) -> Verdict:
        """Right: exactly the labelled calls, in any order, with the same arguments and values."""
        try:
            calls = read_calls(completion)
        except (ValueError, RecursionError):
            return Verdict(False, "malformed")
        if calls is None:
            return Verdict(False, "no_answer")
        wanted = [read_call(call) for call in JSON.decode(problem.answers)]
        if len(calls) != len(wanted):
            return Verdict(False, "wrong_count")
        if Counter(name for name, _ in calls) != Counter(name for name, _ in wanted):
            return Verdict(False, "wrong_tool")
        right = Counter(calls) == Counter(wanted)
        return Verdict(right, "correct" if right else "wrong_arguments")


def read_call(value) -> tuple[str, str]:
    """A call, decoded by `JSON`, as its name and the text of its arguments: equal arguments have
    equal texts (5 and 5.0; but not 5 and "5", nor 1 and true). Raises ValueError if it is none."""
    value = value if isinstance(value, dict) else {}
    given = [value[k] for k in ("arguments", "parameters") if k in value]  # Llama 3: parameters
    if len(given) != 1 or not isinstance(given[0], dict) or not isinstance(value.get("name"), str):
        raise ValueError("a call has a name and an object of arguments")
    return value["name"], json.dumps(given[0], sort_keys=True)


def read_calls(text: str) -> list[tuple[str, str]] | None:
    """The calls in a model's text, whatever the model's family; None if there are none.

    It reads any number of <tool_call>{…}</tool_call> (Qwen), or one JSON list, or one JSON object
    (Llama 3), bare or within prose. A text in <think> is no answer. Raises ValueError for two
    lists, and for broken JSON or a broken call."""
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    tags, parts = re.findall("</?tool_call>", text), re.split("</?tool_call>", text)
    if len(text) > MAX_TEXT_CHARS or tags != ["<tool_call>", "</tool_call>"] * (len(parts) // 2):
        raise ValueError("too long, or a tag is not closed")
    calls, rest = [JSON.decode(call) for call in parts[1::2]], " ".join(parts[::2])
    opening = OPENING.search(rest)
    if calls and opening or "tool_call>" in rest:
        raise ValueError("calls with and without tags, or a broken tag")
    if opening:
        value, end = JSON.raw_decode(rest, opening.start())
        calls = value if isinstance(value, list) else [value]
        if re.search(r"[\[{]", rest[end:]):
            raise ValueError("two lists of calls")
    elif not calls:
        return None
    return [read_call(call) for call in calls]


def function_schema(tool: dict) -> dict:
    """A tool of xlam's in the form of OpenAI, which chat templates expect. Of a Python type, such
    as "List[int], optional", the outermost one is kept: {"type": "array"}."""
    properties, required = {}, []
    for name, given in tool["parameters"].items():
        rest = {**given}
        kind = rest.pop("type", "str")
        outermost = re.match(r"\w*", kind.strip().removeprefix("Optional["))[0].lower()
        known = {"type": JSON_TYPES[outermost]} if outermost in JSON_TYPES else {}
        properties[name] = {**known, **rest}
        if not (kind.endswith("optional") or kind.startswith("Optional") or "default" in rest):
            required.append(name)
    parameters = {"type": "object", "properties": properties, "required": required}
    about = {"name": tool["name"], "description": tool.get("description", "")}
    return {"type": "function", "function": {**about, "parameters": parameters}}


TASKS = {"countdown": Countdown, "apigen": APIGen}
