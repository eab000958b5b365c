"""Tasks: problems, the texts that pose them, and verifiers that say right or wrong.

R3 needs nothing else from a task, so a task is a subclass of `Task` with these:

    Problem                         a dataclass: what is asked, with a whole number `id`
    draw(rng) -> Problem            a random problem; or `load`, where problems come from elsewhere
    messages(problem)               the question, as a chat, and tools for the chat template or None
    verify(problem, completion)     a Verdict: right or wrong, and which kind of wrong

`Task` brings the rest: problems from files and how they are split, and the texts of the
conversation, which a task may replace. README shows a whole one. Here are two:

Countdown: combine the given numbers with + - * / to reach a target, each number exactly once.
Usually 3 or 4 numbers from 1 to 99. A small one (`tiny=True`: 3 numbers from 1 to 10) is for a
model of 0.3 million parameters that is trained from nothing in minutes, and brings along what such
a model needs: a vocabulary, short texts, and the dialogues of its cold start.

APIGen: call the right functions with the right arguments (records of xlam-function-calling-60k).

This file is plain Python, knows nothing of models or training, and never lets the model's text near
`eval`. A verifier is attacked by its student: a policy finds every answer that is rewarded without
being right. So Countdown parses and computes for itself, and APIGen compares JSON strictly.
"""

import itertools
import json
import math
import operator
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

MAX_CHARS = 1_000  # a longer expression is malformed: the verifier's time is bounded
MAX_DEPTH = 100  # so is anything nested deeper than this
MAX_TEXT = 20_000  # so is a longer text with calls in it


@dataclass(frozen=True)
class Verdict:
    """What a verifier says: right or not, and the reason in one word (a key for counting)."""

    right: bool
    reason: str


# -- What tasks have in common ---------------------------------------------------------------------

SPLITS = {"cold": 55, "train": 16, "dev": 13, "test": 16}  # per cent of the generated problems


def split_of(key: str) -> str:
    """Which split a generated problem belongs to: a fixed draw keyed by what identifies it."""
    return random.Random(key).choices(list(SPLITS), weights=SPLITS.values())[0]


class Task:
    """What a task need not say for itself: texts, problems from files, splits."""

    reflect = (  # the paper's words, as recalled; each task says what was attempted
        "You tried performing the task, but failed. Reflect on what went wrong and write a short "
        "explanation that will help you do better next time."
    )
    again = "Now try again."
    generic_reflection = (
        "I made a mistake. Next time I will read the problem carefully, work step by step, and "
        "check my result before I answer."
    )
    reasons = ("right",)  # that `verify` gives, for the tables
    how_to_type = "the number of a problem, such as 7"
    test_size = 12_000  # of a data file, at most a fifth of it

    def __init__(self, tiny: bool = False):
        self.tiny, self.files = tiny, {}  # files: problems by path, read once
        if tiny and not hasattr(self, "words"):
            name = type(self).__name__
            raise ValueError(f"the tiny model was not raised on {name}: give --model a folder")

    def load(
        self, path: str | None = None, split: str = "train", limit=None, seed: int = 0, **options
    ) -> list:
        """Problems of a split, in an order drawn from `seed`: drawn ones, or those of a data file.

        Drawn problems (`limit` of them, else 1,000) are "cold", "train", "dev" or "test"; those of
        a file are split as `from_file` says, which takes the options. No two splits share a
        problem's `key`. Raises ValueError for an unknown or empty split, and for a bad record.
        """
        rng = random.Random(f"{type(self).__name__.lower()} {split} {seed}")
        if path is not None:
            problems = self.from_file(path, split, **options)
            return rng.sample(problems, len(problems))[:limit]
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
        return self.drawn(split, limit, rng)

    def drawn(self, split: str, limit: int | None, rng: random.Random) -> list:
        """Up to `limit` different problems of a split, by `draw` until they are found."""
        found: dict[str, object] = {}
        wanted = limit or 1_000
        for _ in range(200 * wanted):
            problem = self.draw(rng)
            if problem is not None and split_of(self.key(problem)) == split:
                found.setdefault(repr(problem), problem)
            if len(found) == wanted:
                break
        return [replace(problem, id=i) for i, problem in enumerate(found.values())]

    def from_file(self, path, split, skip_bad=False, train_size=None, test_size=None) -> list:
        """Problems of a JSON, JSONL or parquet file, or of a folder of such, that are in a split.

        A fixed shuffle, whatever the seed, gives a fifth of them, at most the paper's number, to
        "test" and the rest to "train"; "all" is everything; "dev" is what explicit sizes leave. (A
        problem that has copies in an earlier split is left out.)
        """
        problems = self.read(path, skip_bad)
        if split != "all":
            test = min(self.test_size, len(problems) // 5) if test_size is None else test_size
            train = len(problems) - test if train_size is None else train_size
            if train + test > len(problems):
                raise ValueError(f"{path} has {len(problems)} problems, not {train} + {test}")
            keys = list(dict.fromkeys(map(self.key, problems)))
            random.Random("split").shuffle(keys)
            place = {key: number for number, key in enumerate(keys)}
            problems = sorted(problems, key=lambda problem: place[self.key(problem)])
            parts = {"test": (0, test), "train": (test, test + train), "dev": (test + train, None)}
            start, end = parts.get(split, (0, 0))
            taken = set(map(self.key, problems[:start]))  # by the splits before this one
            problems = [p for p in problems[start:end] if self.key(p) not in taken]
        if not problems:
            raise ValueError(f"{path} leaves no problems for the split {split!r}")
        return problems

    def read(self, path: str, skip_bad: bool) -> list:
        """All problems of a data file, numbered by their places in it.

        Raises ValueError for a bad record, with file, line and reason; skip_bad goes on without it,
        and says how many there were.
        """
        if path in self.files:
            return self.files[path]
        problems, skipped, place, folder = [], 0, 0, Path(path)
        inside = [file for file in sorted(folder.rglob("*")) if file.suffix in DATA_FILES]
        for file in inside if folder.is_dir() else [folder]:
            for line, record in records(file):
                try:
                    if isinstance(record, Exception):
                        raise record
                    problems.append(self.problem({**record, "id": place}))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    if not skip_bad:
                        reason = f"no {error}" if isinstance(error, KeyError) else error
                        raise ValueError(f"{file}, line {line}: {reason}") from None
                    skipped += 1
                place += 1
        if skipped:
            print(f"{path}: skipped {skipped} bad records of {place}")
        self.files[path] = problems
        return problems

    def problem(self, record: dict):
        """A problem from its JSON record. Raises ValueError, KeyError, TypeError for a bad one."""
        return self.Problem(**record)

    def key(self, problem) -> str:
        """What identifies a problem: two of one key never belong to two splits."""
        return repr(replace(problem, id=0))

    def parse(self, line: str):
        """A problem from what a person typed. Raises ValueError if it is none."""
        if not re.fullmatch("[0-9]{1,4}", line, flags=re.ASCII):
            raise ValueError(f"type {self.how_to_type}")
        return self.load(split="dev", limit=int(line) + 1)[-1]


DATA_FILES = (".json", ".jsonl", ".parquet")
GAP, NEXT_OBJECT = re.compile(r"[\s,\[\]]*"), re.compile(r"\n\s*\{")


def records(file: Path) -> Iterator[tuple[int, dict | Exception]]:
    """(line, record) of a file of JSON objects, in a list or one after the other, or of parquet.

    What cannot be read comes as the exception that says why; reading goes on at the next line that
    begins an object.
    """
    if file.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{file}: to read parquet, pip install pyarrow") from None
        yield from enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1)
        return
    text, place = file.read_bytes().decode("utf-8", errors="surrogateescape"), 0
    line, counted = 1, 0
    while (place := GAP.match(text, place).end()) < len(text):
        line, counted = line + text.count("\n", counted, place), place
        try:
            record, place = JSON.raw_decode(text, place)
            json.dumps(record, ensure_ascii=False).encode()  # is it Unicode?
            yield line, record if isinstance(record, dict) else TypeError("no JSON object")
        except (ValueError, RecursionError) as error:
            yield line, ValueError(f"no JSON: {error}")
            following = NEXT_OBJECT.search(text, place)
            place = following.end() - 1 if following else len(text)
    if text.lstrip().startswith("[") and not text.rstrip().endswith("]"):
        yield line, ValueError("the list does not end: the file was cut")


# -- JSON, strictly --------------------------------------------------------------------------------


def refuse(text: str):
    raise ValueError(f"{text[:20]} is not JSON here")


def number(text: str) -> int | float:
    """A JSON number; 5.0 is read as 5, so that equal numbers are written alike."""
    value = float(text)
    if not math.isfinite(value) or len(text) > 100:
        refuse(text)
    return int(value) if value.is_integer() else value


JSON = json.JSONDecoder(  # no key twice, no NaN, no infinity, no number of 5,000 digits
    object_pairs_hook=lambda p: dict(p) if len(dict(p)) == len(p) else refuse("a key given twice"),
    parse_constant=refuse,
    parse_int=lambda text: int(text) if len(text) <= 100 else refuse(text),
    parse_float=number,
)


# -- Arithmetic: a parser that can only add, subtract, multiply and divide -------------------------

SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def parse_expression(text: str) -> tuple[Fraction | None, list[int]]:
    """Read an arithmetic expression: its exact value, and the integer literals in it, in order.

    Grammar, and nothing beyond it (no `**`, `//`, decimals, names, leading zeros, other digits):

        sum     = product (("+" | "-") product)*
        product = factor (("*" | "/") factor)*
        factor  = "-" factor | "(" sum ")" | integer

    >>> parse_expression("(10 + 6) * 2")
    (Fraction(32, 1), [10, 6, 2])

    The value is None where the expression divides by zero. Raises ValueError if the text is not
    such an expression, is over MAX_CHARS, or nests over MAX_DEPTH levels.
    """
    if len(text) > MAX_CHARS:
        raise ValueError("too long")
    tokens = re.findall(r"[0-9]+|\S", text, flags=re.ASCII)[::-1]  # the next one is the last
    literals: list[int] = []

    def chain(signs: str, operand, depth: int) -> Fraction | None:
        value = operand(depth)
        while tokens and tokens[-1] in signs:
            sign, right = tokens.pop(), operand(depth)
            undefined = value is None or right is None or (sign == "/" and right == 0)
            value = None if undefined else SIGNS[sign](value, right)
        return value

    def sum_(depth: int) -> Fraction | None:
        return chain("+-", lambda depth: chain("*/", factor, depth), depth)

    def factor(depth: int) -> Fraction | None:
        token = tokens.pop() if tokens and depth <= MAX_DEPTH else "an end, or brackets too deep"
        if token == "-":
            value = factor(depth + 1)
            return None if value is None else -value
        if token == "(":
            value = sum_(depth + 1)
            if tokens and tokens.pop() == ")":
                return value
        if not re.fullmatch(r"0|[1-9][0-9]*", token, flags=re.ASCII):
            raise ValueError(f"unexpected {token!r}")
        literals.append(int(token))
        return Fraction(literals[-1])

    value = sum_(0)
    if tokens:
        raise ValueError(f"unexpected {tokens[-1]!r}")
    return value, literals


# -- Countdown -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbers:
    """A Countdown problem: reach `target` with each of `numbers` used exactly once."""

    id: int
    numbers: tuple[int, ...]
    target: int


class Countdown(Task):
    """The numbers game, as in TinyZero and in the paper. `tiny=True` is the small one."""

    test_size = 15_000
    reflect = (
        "You tried solving the problem and got the wrong answer. Reflect on what went wrong and "
        "write a short explanation that will help you do better next time."
    )
    again = "Now try again. Give your equation inside <answer> </answer>."
    question = (
        "Using the numbers [{numbers}], create an equation that equals {target}. You can use basic "
        "arithmetic operations (+, -, *, /) and parentheses, and you must use every number exactly "
        "once. Think step by step, then give the equation inside <answer> </answer>, for example "
        "<answer> (1 + 2) / 3 </answer>."
    )
    reasons = ("right", "wrong_value", "wrong_numbers", "malformed", "no_answer")
    how_to_type = "the numbers and then the target, such as 6 10 2 32"

    def __init__(self, tiny: bool = False):
        super().__init__(tiny)
        if tiny:
            self.reflect, self.again = "Wrong. Reflect.", "Again."
            self.generic_reflection = "I will be careful ."

    def drawn(self, split: str, limit: int | None, rng: random.Random) -> list[Numbers]:
        """Drawn problems; of the small game, which can be counted, all that there are."""
        if not self.tiny:
            return super().drawn(split, limit, rng)
        problems = []
        for multiset in itertools.combinations_with_replacement(range(1, 11), 3):
            if split_of(f"Countdown {list(multiset)}") == split:
                for target in sorted(reachable(multiset) - {0}):
                    problems.append((rng.sample(multiset, 3), target))
        rng.shuffle(problems)
        return [Numbers(i, tuple(n), t) for i, (n, t) in enumerate(problems[:limit])]

    def draw(self, rng: random.Random) -> Numbers | None:
        """3 or 4 numbers from 1 to 99, and a target that a random way of combining them reaches."""
        numbers = [rng.randint(1, 99) for _ in range(rng.choice((3, 4)))]
        values = [Fraction(n) for n in numbers]
        while len(values) > 1:
            rng.shuffle(values)
            a, b, sign = values.pop(), values.pop(), rng.choice("+-*/")
            if sign == "/" and b == 0:
                return None
            values.append(SIGNS[sign](a, b))
        return Numbers(0, tuple(numbers), int(values[0])) if values[0] in range(1, 100) else None

    def key(self, problem: Numbers) -> str:
        """The multiset of numbers: those of a test problem were never seen in training."""
        return f"Countdown {sorted(problem.numbers)}"

    def problem(self, record: dict) -> Numbers:
        """A problem from {"numbers", "target"}, as we write it; from {"nums", "target"}, as in
        Jiayi-Pan/Countdown-Tasks-3to4; or from {"input": "30,100,93", "output": "23"}."""
        if "input" in record:
            numbers, target = record["input"].split(","), record["output"]
        else:
            numbers, target = record["nums" if "nums" in record else "numbers"], record["target"]
        if not 1 <= len(numbers) <= 10 or min(map(int, numbers)) < 0:
            raise ValueError(f"{numbers!r} are no Countdown numbers")
        return Numbers(int(record["id"]), tuple(map(int, numbers)), int(target))

    def parse(self, line: str) -> Numbers:
        """A problem from what a person typed. Raises ValueError if it is none."""
        if not re.fullmatch(r"[0-9]{1,3}(\s+[0-9]{1,3}){2,}", line, flags=re.ASCII):
            raise ValueError(f"type {self.how_to_type}")
        *numbers, target = map(int, line.split())
        if self.tiny and not (
            len(numbers) == 3 and set(numbers) <= set(range(1, 11)) and target <= 60
        ):
            raise ValueError("the tiny model knows 3 numbers from 1 to 10 and targets up to 60")
        return Numbers(0, tuple(numbers), target)

    def messages(self, problem: Numbers) -> tuple[list[dict], None]:
        """The question as a chat of one user message; Countdown has no tools."""
        numbers = ", ".join(map(str, problem.numbers))
        text = self.question.format(numbers=numbers, target=problem.target)
        if self.tiny:
            text = f"Make {problem.target} from {numbers.replace(',', '')} ."
        return [{"role": "user", "content": text}], None

    def verify(self, problem: Numbers, completion: str) -> Verdict:
        """Judge the last `<answer>…</answer>`: exact arithmetic, each number exactly once.

        >>> Countdown().verify(Numbers(0, (6, 10, 2), 32), "<answer> (10 + 6) * 2 = 32 </answer>")
        Verdict(right=True, reason='right')
        """
        end = completion.rfind("</answer>")
        start = completion.rfind("<answer>", 0, max(end, 0))
        if start < 0:
            return Verdict(False, "no_answer")
        answer = completion[start + len("<answer>") : end].strip()
        if len(answer) <= MAX_CHARS:  # "= target" may stand at the end
            answer = re.sub(rf"=\s*{problem.target}\Z", "", answer)
        try:
            value, literals = parse_expression(answer)
        except ValueError:
            return Verdict(False, "malformed")
        if sorted(literals) != sorted(problem.numbers):
            return Verdict(False, "wrong_numbers")
        right = value == problem.target
        return Verdict(right, "right" if right else "wrong_value")

    # -- What only the tiny model needs: its words, and the dialogues that it is born from ---------

    def words(self) -> list[str]:
        """The vocabulary of the small Countdown: numbers, signs, and the words of its texts."""
        signs = "+ - * / = ( ) , . <answer> </answer> yes no"
        texts = "Make from Start with I need That is not {} {} will be careful"
        said = f"{signs} {texts.format(self.reflect, self.again)}"
        return [str(n) for n in range(101)] + said.split()

    def cold_dialogue(
        self, problems: list[Numbers], rng: random.Random, diligent: bool
    ) -> tuple[Numbers, list[str]]:
        """A problem (its numbers in any order) and the assistant's turns in a dialogue about it.

        The turns are [attempt] where that is right, else [attempt, reflection, retry].
        A first attempt picks its first step at random and then the second step that comes nearest.
        After a failure, a reflection may check candidate first steps before it commits to one; the
        retry follows the commitment. Nothing here knows a solution except by such a check.

        diligent: every reflection checks until it finds. Otherwise 60% check nothing, 20% go on
        with probability 0.7 after each check, 20% check until they find, and a tenth of all
        reflections is empty or says nothing of use (the retry then stands on its own).
        """
        drawn = rng.choice(problems)
        numbers, target = tuple(rng.sample(drawn.numbers, len(drawn.numbers))), drawn.target
        problem, steps = Numbers(drawn.id, numbers, target), first_steps(numbers)
        start, said = rng.choice(steps), []
        if rng.random() < 0.08:  # a first attempt that checks a little
            said, start = check(numbers, target, rng, go_on=0.5)
        solution = answer(numbers, start, target)
        attempt = " ".join([f"I need {target} .", *said, commit(start), solution])
        value = second_step(numbers, start, target)[3]
        if value == target:
            return problem, [attempt]
        if not diligent and rng.random() < 0.1:  # an empty or a useless reflection
            reflection = rng.choice(["", self.generic_reflection])
            return problem, [attempt, reflection, answer(numbers, rng.choice(steps), target)]
        go_on = 1.0 if diligent else rng.choices([0.0, 0.7, 1.0], weights=[3, 1, 1])[0]
        said, start = check(numbers, target, rng, go_on) if go_on else ([], rng.choice(steps))
        reflection = " ".join([f"That is {value} , not {target} .", *said, commit(start)])
        return problem, [attempt, reflection, answer(numbers, start, target)]


# -- The small Countdown: whole numbers from 0 to 60, two steps ------------------------------------

Step = tuple[int, str, int, int]  # 10 / 2 = 5 is (10, "/", 2, 5)


def steps_on(a: int, b: int) -> list[Step]:
    """The steps on two numbers, in their order where it does not matter, with results 0 to 60."""
    large, small = max(a, b), min(a, b)
    steps = [(a, "+", b, a + b), (large, "-", small, large - small), (a, "*", b, a * b)]
    if small and large % small == 0:
        steps.append((large, "/", small, large // small))
    return [step for step in steps if step[3] <= 60]


def first_steps(numbers) -> list[Step]:
    """All first steps on three numbers, in the order in which a search goes through them."""
    x, y, z = numbers
    return list(dict.fromkeys(steps_on(x, y) + steps_on(x, z) + steps_on(y, z)))


def last_steps(numbers, step: Step) -> list[Step]:
    """The steps on a first step's result and the number that it left over."""
    [left_over] = (Counter(numbers) - Counter([step[0], step[2]])).elements()
    return steps_on(step[3], left_over)


def second_step(numbers, step: Step, target: int) -> Step:
    """After a first step, the second one whose result is nearest to the target."""
    return min(last_steps(numbers, step), key=lambda last: abs(last[3] - target))


def reachable(numbers) -> set[int]:
    """All results of two steps on three numbers."""
    return {last[3] for step in first_steps(numbers) for last in last_steps(numbers, step)}


def say(step: Step) -> str:
    return "{} {} {} = {}".format(*step)


def commit(step: Step) -> str:
    return f"Start with {say(step)} ."


def answer(numbers, step: Step, target: int) -> str:
    """The whole expression that a first step leads to: "<answer> ( 10 / 2 ) * 6 </answer>"."""
    a, sign, b, _ = second_step(numbers, step, target)
    inner = "( {} {} {} )".format(*step)
    outer = f"{inner} {sign} {b}" if a == step[3] else f"{a} {sign} {inner}"
    return f"<answer> {outer} </answer>"


def check(numbers, target: int, rng: random.Random, go_on: float) -> tuple[list[str], Step]:
    """Check candidate first steps in cyclic order from a random one: what is said, and the choice.

    Each check writes first step, second step and judgement: "10 / 2 = 5 , 5 * 6 = 30 no".
    A "yes" ends the search, and so does a draw (probability 1 - go_on): then chance chooses.
    """
    steps, said = first_steps(numbers), []
    offset = rng.randrange(len(steps))
    for step in steps[offset:] + steps[:offset]:
        last = second_step(numbers, step, target)
        found = last[3] == target
        said.append(f"{say(step)} , {say(last)} {'yes' if found else 'no'}")
        if found:
            return said, step
        if rng.random() > go_on:
            break
    return said, rng.choice(steps)


# -- APIGen ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A function-calling problem, under the names and in the form of xlam's records."""

    id: int
    query: str
    answers: str  # a JSON list of the right calls, {"name": …, "arguments": {…}}
    tools: str  # a JSON list: {"name", "description", "parameters": {name: {"type", …}}}


class APIGen(Task):
    """Function calling, as in Salesforce/xlam-function-calling-60k and in the paper."""

    reflect = (
        "You tried performing the task, but failed in generating the correct tool call. Reflect on "
        "what went wrong and write a short explanation that will help you do better next time."
    )
    again = "Now try again. Write the correct tool call."
    reasons = ("right", "wrong_arguments", "wrong_tool", "wrong_count", "malformed", "no_answer")

    def problem(self, record: dict) -> Request:
        """A problem from xlam's record, its calls and tools looked through."""
        texts = [record[name] for name in ("query", "answers", "tools")]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("query, answers and tools must be strings")
        request = Request(int(record["id"]), *texts)
        for call in json_list("answers", request.answers):
            read_call(call)
        for tool in json_list("tools", request.tools):
            if not isinstance(tool["name"], str):
                raise TypeError("a tool's name must be a string")
            function_schema(tool)
        return request

    def key(self, problem: Request) -> str:
        return problem.query

    def messages(self, problem: Request) -> tuple[list[dict], list[dict]]:
        """The query as a chat, and the tools as JSON schemas, which chat templates expect."""
        tools = [function_schema(tool) for tool in json.loads(problem.tools)]
        return [{"role": "user", "content": problem.query}], tools

    def verify(self, problem: Request, completion: str) -> Verdict:
        """Right are exactly the labelled calls, in any order: same names, arguments and values."""
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
        return Verdict(right, "right" if right else "wrong_arguments")

    def draw(self, rng: random.Random) -> Request:
        """One to three requests for the tools listed below, among tools that are not needed."""
        asked = rng.choices(list(TOOLS), k=rng.choice((1, 1, 2, 3)))
        said, calls = [], []
        for name in asked:
            given = {slot: rng.choice(SLOTS[slot][1]) for slot in slots_of(name)}
            said.append(TOOLS[name].format(**given))
            calls.append({"name": name, "arguments": given})
        offered = list(dict.fromkeys(asked))
        offered += rng.sample([name for name in TOOLS if name not in asked], rng.randint(1, 4))
        tools = []
        for name in rng.sample(offered, len(offered)):
            slots = {s: {"type": SLOTS[s][0], "description": f"The {s}."} for s in slots_of(name)}
            about = f"Answers requests like: {TOOLS[name]}"
            tools.append({"name": name, "description": about, "parameters": slots})
        return Request(0, " ".join(said), json.dumps(calls), json.dumps(tools))


def json_list(name: str, text: str) -> list[dict]:
    try:
        found = JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {error}") from None
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise TypeError(f"{name} is no JSON list of objects")
    return found


def read_call(value) -> tuple[str, str]:
    """A call, by JSON above, as its name and its arguments' text: equal texts, equal values.

    (5 and 5.0 are equal; 5 and "5" are not, nor are 1 and true.) Raises ValueError if it is none.
    """
    given = [value[k] for k in ("arguments", "parameters") if k in value]  # Llama 3: parameters
    if len(given) != 1 or not isinstance(given[0], dict) or not isinstance(value["name"], str):
        raise ValueError("a call is a name and arguments")
    return value["name"], json.dumps(given[0], sort_keys=True)


OPENING = re.compile(r"""[\[{](?P<json>\s*["'\[{])?""")  # a bracket; one that begins JSON
TAGGED = re.compile("<tool_call>(.*?)</tool_call>", flags=re.DOTALL)


def read_calls(text: str) -> list[tuple[str, str]] | None:
    """The one list of calls in a model's text, whatever the model's family; None if there is none.

    Read are <tool_call>{…}</tool_call>, any number of times (Qwen), a JSON list, and one JSON
    object (Llama 3, after <|python_tag|> or not), bare, in a code fence or within prose. What is
    thought within <think> is no answer. Raises ValueError for two lists, and for what looks like
    JSON or a call and is none.
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    depths = itertools.accumulate((sign in "[{") - (sign in "]}") for sign in text)
    if len(text) > MAX_TEXT or max(depths, default=0) > MAX_DEPTH:
        raise ValueError("too long, or nested too deep")
    if text.count("<tool_call>") != text.count("</tool_call>"):
        raise ValueError("a tag is not closed")
    tagged, text = TAGGED.findall(text), TAGGED.sub(" ", text)
    if "tool_call>" in text:
        raise ValueError("a tag is not closed")
    found = [[JSON.decode(call) for call in tagged]] if tagged else []
    place = brackets = 0
    while opening := OPENING.search(text, place):
        try:
            value, place = JSON.raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            place, brackets = opening.start() + 1, brackets + 1  # a bracket in prose
            if opening["json"] or brackets > MAX_DEPTH:
                raise ValueError("no JSON") from None
            continue
        calls = value if isinstance(value, list) else [value]
        if value == [] or any(isinstance(call, dict) and "name" in call for call in calls):
            found.append(calls)
    if len(found) > 1:
        raise ValueError("two lists of calls")
    if found and not all(isinstance(call, dict) and "name" in call for call in found[0]):
        raise ValueError("something in the list is no call")
    return [read_call(call) for call in found[0]] if found else None


def function_schema(tool: dict) -> dict:
    """A tool of xlam's as chat templates expect it: OpenAI's form, parameters as JSON schema."""
    properties, required = {}, []
    for name, given in tool["parameters"].items():
        if not isinstance(kind := given.get("type", "str"), str):
            raise TypeError(f"the type of {name} must be a string")
        rest = {key: value for key, value in given.items() if key != "type"}
        properties[name] = {**json_schema(kind), **rest}
        if not (kind.endswith("optional") or kind.startswith("Optional") or "default" in rest):
            required.append(name)
    parameters = {"type": "object", "properties": properties, "required": required}
    about = {"name": tool["name"], "description": tool.get("description", "")}
    return {"type": "function", "function": {**about, "parameters": parameters}}


JSON_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean",
              "list": "array", "tuple": "array", "set": "array", "dict": "object"}  # fmt: skip


def json_schema(kind: str) -> dict:
    """A Python type as xlam writes it, as a JSON schema; what is unknown may be anything.

    >>> json_schema("Dict[str, List[int]], optional")
    {'type': 'object', 'additionalProperties': {'type': 'array', 'items': {'type': 'integer'}}}
    """
    name, _, inside = kind.removesuffix(", optional").strip().partition("[")
    parts, depth = [""], 0
    for sign in inside.removesuffix("]"):
        depth += (sign == "[") - (sign == "]")
        parts[-1] += sign
        if sign == "," and not depth:
            parts[-1:] = [parts[-1][:-1], ""]
    inner = [json_schema(part) for part in parts] if inside else []
    name = name.strip().lower()
    if name in ("optional", "union"):
        return inner[0] if len(inner) == 1 else {"anyOf": inner}
    schema = {"type": JSON_TYPES[name]} if name in JSON_TYPES else {}
    if name == "tuple" and inner:
        schema["prefixItems"] = inner
    elif name in ("list", "set") and inner:
        schema["items"] = inner[0]
    elif name == "dict" and len(inner) == 2:
        schema["additionalProperties"] = inner[1]
    return schema


def tools_in_words(messages: list[dict], tools: list[dict]) -> list[dict]:
    """The chat with its tools in the last message, for templates that have no place for them."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = (
        f"You can call these functions:\n{listed}\n\nAnswer with a JSON list of calls and nothing "
        'else, for example [{"name": "function", "arguments": {"parameter": "value"}}].\n\n'
    )
    return [*messages[:-1], {**messages[-1], "content": text + messages[-1]["content"]}]


# What drawn problems are made of: tools by name, each with a request whose slots are the tool's
# parameters; and the slots, with their types and values.
TOOLS = {
    "get_weather": "What is the weather in {city}?", "get_time": "What time is it in {city}?",
    "get_forecast": "How will the weather in {city} be on {date}?",
    "find_flights": "Find flights to {city} on {date}.",
    "book_hotel": "Book a hotel room in {city} for {person} on {date}.",
    "get_population": "How many people live in {country}?",
    "get_capital": "What is the capital of {country}?",
    "get_holidays": "List the public holidays of {country}.",
    "convert_money": "Convert {amount} US dollars to {currency}.",
    "get_rate": "What is the exchange rate of {currency}?",
    "send_money": "Send {amount} dollars to {person}.", "call_person": "Call {person}.",
    "get_stock_price": "What is the stock price of {company}?",
    "buy_stock": "Buy {number} shares of {company}.", "define_word": "What does '{word}' mean?",
    "translate_word": "Translate '{word}' into {language}.",
    "find_rhymes": "Find words that rhyme with '{word}'.",
    "search_news": "Search the news about {topic}.",
    "find_books": "Find books about {topic} in {language}.",
    "set_timer": "Set a timer for {minutes} minutes (alarm: {loud}).",
    "add_event": "Put a meeting with {person} on {date}.",
    "factorize": "What are the prime factors of {number}?",
    "is_prime": "Is {number} a prime number?", "sort_numbers": "Sort the numbers {numbers}.",
    "average": "What is the average of {numbers}?",
    "to_fahrenheit": "How much is {degrees} degrees in Fahrenheit?",
}  # fmt: skip
SLOTS = {
    "city": ("str", ["Paris", "Lagos", "Osaka", "Lima", "Oslo", "Delhi"]),
    "country": ("str", ["Kenya", "Peru", "Japan", "Norway", "Chad"]),
    "person": ("str", ["Ada", "Ben", "Chidi", "Dana", "Emeka", "Fay"]),
    "date": ("str", ["2025-03-01", "2025-07-14", "2026-11-30"]),
    "currency": ("str", ["EUR", "USD", "JPY", "NGN", "PEN"]),
    "language": ("str", ["French", "Yoruba", "Hindi", "Spanish"]),
    "topic": ("str", ["volcanoes", "jazz", "tax law", "bees", "chess"]),
    "word": ("str", ["river", "candle", "orbit", "market", "willow"]),
    "company": ("str", ["ACME", "GLOBO", "INITECH", "HOOLI"]),
    "amount": ("float", [12.5, 80, 199.99, 1000, 42.25]), "loud": ("bool", [True, False]),
    "number": ("int", [7, 12, 36, 97, 360, 1024]), "minutes": ("int", [5, 15, 20, 45, 90]),
    "degrees": ("float", [-4, 18.5, 36.6, 72, 100]),
    "numbers": ("List[int]", [[3, 1, 2], [10, 20, 30], [8, 6, 7, 5]]),
}  # fmt: skip


def slots_of(tool: str) -> list[str]:
    return re.findall("{(.+?)}", TOOLS[tool])


TASKS = {"countdown": Countdown, "apigen": APIGen}
