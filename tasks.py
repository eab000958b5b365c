"""Tasks: problems, the texts that pose them, and verifiers that say right or wrong.

R3 needs nothing else from a task, so a task is a subclass of `Task` with these:

    Problem                         a dataclass: what is asked, with a whole number `id`
    draw(rng) -> Problem            a random problem; or `load`, where problems come from elsewhere
    messages(problem)               the question, as a chat, and tools for the chat template or None
    verify(problem, completion)     a Verdict: right or wrong, and which kind of wrong

`Task` brings the rest: problems from files and how they are split, and the three texts of the
conversation, which a task may replace. README shows a whole one.

This file is plain Python. It knows nothing of models, tokens or training, and it never lets the
model's text near `eval`: a verifier is attacked by its student (a policy finds every answer that is
rewarded without being right), so Countdown parses and computes for itself, exactly, and APIGen
compares JSON strictly.

Countdown: combine the given numbers with + - * / to reach a target, each number exactly once.
It comes in two sizes. The usual one (3 or 4 numbers from 1 to 99) is for real checkpoints. The
small one (`Countdown(tiny=True)`: 3 numbers from 1 to 10) is for a model of 0.3 million parameters
that is trained from nothing in minutes, and brings along what such a model needs: a vocabulary,
short texts, and the dialogues of its cold start.

APIGen: call the right functions with the right arguments (records of xlam-function-calling-60k).
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
    how_to_type = "the number of a problem, such as 7"
    test_size = 12_000  # of a data file, at most a fifth of it

    def __init__(self, tiny: bool = False):
        self.tiny, self.files = tiny, {}  # files: problems by path, read once
        if tiny and not hasattr(self, "words"):
            name = type(self).__name__
            raise ValueError(f"the tiny model was not raised on {name}: give --model a folder")

    def load(
        self,
        path: str | None = None,
        split: str = "train",
        limit: int | None = None,
        seed: int = 0,
        skip_bad: bool = False,
        train_size: int | None = None,
        test_size: int | None = None,
    ) -> list:
        """Problems of a split, in an order drawn from `seed`: those of a file, else drawn ones.

        path: a JSON, JSONL or parquet file, or a folder of such. A fixed shuffle, whatever the
        seed, gives a fifth of its problems, at most the paper's number, to "test" and the rest to
        "train"; "all" is everything; "dev" is what explicit sizes leave over. Drawn problems (1,000
        by default) are "cold", "train", "dev" or "test". No two splits share a problem's `key`.

        Raises ValueError for an unknown or empty split, and for a bad record, with file, line and
        reason; skip_bad goes on without it, and says how many there were.
        """
        rng = random.Random(f"{type(self).__name__.lower()} {split} {seed}")
        if path is None:
            if split not in SPLITS:
                raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
            return self.drawn(split, limit, rng)
        problems = self.read(path, skip_bad)
        if split != "all":
            test = min(self.test_size, len(problems) // 5) if test_size is None else test_size
            train = len(problems) - test if train_size is None else train_size
            if train + test > len(problems):
                raise ValueError(f"{path} has {len(problems)} problems, not {train} + {test}")
            alike: dict[str, list] = {}
            for problem in problems:
                alike.setdefault(self.key(problem), []).append(problem)
            groups, parts = list(alike.values()), {"test": [], "train": [], "dev": []}
            random.Random("split").shuffle(groups)
            for group in groups:
                room = {"test": test, "train": train, "dev": len(problems)}
                fits = (name for name in parts if len(parts[name]) + len(group) <= room[name])
                parts[next(fits)] += group
            problems = parts.get(split, [])
        if not problems:
            raise ValueError(f"{path} leaves no problems for the split {split!r}")
        return rng.sample(problems, len(problems))[:limit]

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

    def read(self, path: str, skip_bad: bool) -> list:
        """All problems of a data file, numbered by their places in it."""
        if path in self.files:
            return self.files[path]
        problems, skipped, place, path = [], 0, 0, Path(path)
        kinds = (".json", ".jsonl", ".parquet")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            for line, record in records(file) if file.suffix in kinds or file is path else ():
                place += 1
                try:
                    if isinstance(record, Exception):
                        raise record
                    problems.append(self.problem({**record, "id": place - 1}))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    if not skip_bad:
                        reason = f"no {error}" if isinstance(error, KeyError) else error
                        raise ValueError(f"{file}, line {line}: {reason}") from None
                    skipped += 1
        if skipped:
            print(f"{path}: skipped {skipped} bad records of {place}")
        self.files[str(path)] = problems
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


GAP, NEXT_OBJECT = re.compile(r"[\s,\[\]]*"), re.compile(r"\n\s*\{")


# -- JSON, strictly --------------------------------------------------------------------------------


def _refuse(text: str):
    raise ValueError(f"{text[:20]} is no JSON number")


def _unique(pairs: list[tuple]) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)


JSON = json.JSONDecoder(  # no key twice, no NaN, no infinity, no number of 5,000 digits
    object_pairs_hook=_unique,
    parse_constant=_refuse,
    parse_int=lambda text: int(text) if len(text) <= 100 else _refuse(text),
    parse_float=lambda text: float(text) if math.isfinite(float(text)) else _refuse(text),
)


def canonical(value, depth: int = 0) -> str:
    """A text that two JSON values share if they are equal: 5 and 5.0, but not "5"; true is not 1.

    Raises ValueError beyond MAX_DEPTH levels.
    """
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    if isinstance(value, dict):
        pairs = (f"{json.dumps(k)}:{canonical(v, depth + 1)}" for k, v in sorted(value.items()))
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(canonical(item, depth + 1) for item in value) + "]"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value)


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
        if depth > MAX_DEPTH or not tokens:
            raise ValueError("nested too deep, or cut short")
        token = tokens.pop()
        if token == "-":
            value = factor(depth + 1)
            return None if value is None else -value
        if token == "(":
            value = sum_(depth + 1)
            if not tokens or tokens.pop() != ")":
                raise ValueError("a bracket is not closed")
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
    how_to_type = "the numbers and then the target, such as 6 10 2 32"

    def __init__(self, tiny: bool = False):
        super().__init__(tiny)
        if tiny:
            self.reflect = "Wrong. Reflect."
            self.again = "Again."
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
        if self.tiny and (
            len(numbers) != 3 or not set(numbers) <= set(range(1, 11)) or target > 60
        ):
            raise ValueError("the tiny model knows 3 numbers from 1 to 10 and targets up to 60")
        return Numbers(0, tuple(numbers), target)

    def messages(self, problem: Numbers) -> tuple[list[dict], None]:
        """The question as a chat of one user message; Countdown has no tools."""
        numbers = " ".join(map(str, problem.numbers))
        if self.tiny:
            text = f"Make {problem.target} from {numbers} ."
        else:
            text = (
                f"Using the numbers [{numbers.replace(' ', ', ')}], create an equation that equals "
                f"{problem.target}. You can use basic arithmetic operations (+, -, *, /) and "
                "parentheses, and you must use every number exactly once. Think step by step, then "
                "give the equation inside <answer> </answer>, for example <answer> (1 + 2) / 3 "
                "</answer>."
            )
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
        texts = (
            f"Make from Start with I need That is not {self.reflect} {self.again} will be careful"
        )
        return [str(n) for n in range(101)] + f"{signs} {texts}".split()

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


def second_step(numbers, step: Step, target: int) -> Step:
    """After a first step, the second one whose result is nearest to the target."""
    (rest,) = left_over(numbers, step)
    return min(steps_on(step[3], rest), key=lambda s: abs(s[3] - target))


def left_over(numbers, step: Step) -> list[int]:
    rest = list(numbers)
    rest.remove(step[0])
    rest.remove(step[2])
    return rest


def reachable(numbers) -> set[int]:
    """All results of two steps on three numbers."""
    return {
        last[3]
        for step in first_steps(numbers)
        for last in steps_on(step[3], *left_over(numbers, step))
    }


def say(step: Step) -> str:
    return f"{step[0]} {step[1]} {step[2]} = {step[3]}"


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

    def problem(self, record: dict) -> Request:
        texts = [record[name] for name in ("query", "answers", "tools")]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("query, answers and tools must be strings")
        request = Request(int(record["id"]), *texts)
        for call in json_list("answers", request.answers):
            read_call(call)
        for tool in json_list("tools", request.tools):
            given = tool["parameters"].values()
            if not isinstance(tool["name"], str) or not all(
                isinstance(value, dict) and isinstance(value.get("type", ""), str)
                for value in given
            ):
                raise TypeError("a tool needs a name, and parameters with types")
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
        wanted = [read_call(call) for call in json.loads(problem.answers)]
        names, wanted_names = (Counter(name for name, _ in some) for some in (calls, wanted))
        if len(calls) != len(wanted):
            return Verdict(False, "wrong_count")
        if names != wanted_names:
            return Verdict(False, "wrong_tool")
        right = Counter(calls) == Counter(wanted)
        return Verdict(right, "right" if right else "wrong_arguments")

    def draw(self, rng: random.Random) -> Request:
        """One to three requests for tools of the table below, among tools that are not needed."""
        asked = [rng.choice(TOOLS) for _ in range(rng.choice((1, 1, 2, 3)))]
        said, calls = [], []
        for name, _, phrase in asked:
            arguments = {slot: rng.choice(SLOTS[slot][2]) for slot in re.findall("{(.+?)}", phrase)}
            said.append(phrase.format(**arguments))
            calls.append({"name": name, "arguments": arguments})
        others = [tool for tool in TOOLS if tool not in asked]
        offered = list(dict.fromkeys(asked)) + rng.sample(others, rng.randint(1, 4))
        rng.shuffle(offered)
        tools = []
        for name, about, phrase in offered:
            slots = {slot: SLOTS[slot] for slot in re.findall("{(.+?)}", phrase)}
            given = {s: {"description": text, "type": kind} for s, (kind, text, _) in slots.items()}
            tools.append({"name": name, "description": about, "parameters": given})
        return Request(0, " ".join(said), json.dumps(calls), json.dumps(tools))


def json_list(name: str, text: str) -> list:
    try:
        found = JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {error}") from None
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise TypeError(f"{name} is no JSON list of objects")
    return found


def read_call(value) -> tuple[str, str]:
    """A call as its name and its arguments in canonical form. Raises ValueError if it is none."""
    given = [value[k] for k in ("arguments", "parameters") if k in value]  # Llama 3: parameters
    if len(given) != 1 or not isinstance(given[0], dict) or not isinstance(value["name"], str):
        raise ValueError("a call is a name and arguments")
    return value["name"], canonical(given[0])


def read_calls(text: str) -> list[tuple[str, str]] | None:
    """The one list of calls in a model's text, whatever the model's family; None if there is none.

    Read are <tool_call>{…}</tool_call>, any number of times (Qwen), a JSON list, and one JSON
    object (Llama 3, after <|python_tag|> or not), bare, in a code fence or within prose. What is
    thought within <think> is no answer. Raises ValueError for two lists, and for what looks like
    JSON or a call and is none.
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    if len(text) > MAX_TEXT or text.count("<tool_call>") != text.count("</tool_call>"):
        raise ValueError("too long, or a tag is not closed")
    tagged = re.findall("<tool_call>(.*?)</tool_call>", text, flags=re.DOTALL)
    text = re.sub("<tool_call>.*?</tool_call>", " ", text, flags=re.DOTALL)
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


OPENING = re.compile(r"""[\[{](?P<json>\s*["'\[{])?""")  # a bracket; one that begins JSON


def function_schema(tool: dict) -> dict:
    """A tool of xlam's as chat templates expect it: OpenAI's form, parameters as JSON schema."""
    properties, required = {}, []
    for name, given in tool["parameters"].items():
        kind = given.get("type", "str")
        rest = {key: value for key, value in given.items() if key != "type"}
        properties[name] = {**json_schema(kind), **rest}
        if (
            not kind.endswith("optional")
            and not kind.startswith("Optional")
            and "default" not in rest
        ):
            required.append(name)
    parameters = {"type": "object", "properties": properties, "required": required}
    about = {"name": tool["name"], "description": tool.get("description", "")}
    return {"type": "function", "function": {**about, "parameters": parameters}}


def json_schema(kind: str) -> dict:
    """A Python type as xlam writes it, as a JSON schema; what is unknown may be anything.

    >>> json_schema("Dict[str, List[int]], optional")
    {'type': 'object', 'additionalProperties': {'type': 'array', 'items': {'type': 'integer'}}}
    """
    name, _, inside = kind.removesuffix(", optional").strip().partition("[")
    parts, depth = [""], 0
    for sign in inside.removesuffix("]"):
        depth += (sign == "[") - (sign == "]")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
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


JSON_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
JSON_TYPES |= {"list": "array", "tuple": "array", "set": "array", "dict": "object"}


def tools_in_words(messages: list[dict], tools: list[dict]) -> list[dict]:
    """The chat with its tools in the last message, for templates that have no place for them."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = (
        f"You can call these functions:\n{listed}\n\nAnswer with a JSON list of calls and nothing "
        'else, for example [{"name": "function", "arguments": {"parameter": "value"}}].\n\n'
    )
    return [*messages[:-1], {**messages[-1], "content": text + messages[-1]["content"]}]


# What drawn problems are made of: slots (type, description, values), and tools (name, description,
# a request with slots, which are the tool's parameters).
SLOTS = {
    "city": ("str", "The name of a city.", ["Paris", "Lagos", "Osaka", "Lima", "Oslo", "Delhi"]),
    "country": ("str", "The name of a country.", ["Kenya", "Peru", "Japan", "Norway", "Chad"]),
    "person": ("str", "A person's first name.", ["Ada", "Ben", "Chidi", "Dana", "Emeka", "Fay"]),
    "date": ("str", "A date, as YYYY-MM-DD.", ["2025-03-01", "2025-07-14", "2026-11-30"]),
    "currency": ("str", "A currency's code.", ["EUR", "USD", "JPY", "NGN", "PEN"]),
    "language": ("str", "The name of a language.", ["French", "Yoruba", "Hindi", "Spanish"]),
    "topic": ("str", "What it is about.", ["volcanoes", "jazz", "tax law", "bees", "chess"]),
    "word": ("str", "A word.", ["river", "candle", "orbit", "market", "willow"]),
    "company": ("str", "A stock's symbol.", ["ACME", "GLOBO", "INITECH", "HOOLI"]),
    "amount": ("float", "An amount of money.", [12.5, 80, 199.99, 1000, 42.25]),
    "number": ("int", "A whole number.", [7, 12, 36, 97, 360, 1024]),
    "minutes": ("int", "A time in minutes.", [5, 15, 20, 45, 90]),
    "degrees": ("float", "A temperature.", [-4, 18.5, 36.6, 72, 100]),
    "numbers": ("List[int]", "Some whole numbers.", [[3, 1, 2], [10, 20, 30], [8, 6, 7, 5]]),
    "loud": ("bool", "Whether to sound an alarm.", [True, False]),
}
TOOLS = [
    ("get_weather", "The weather in a city now.", "What is the weather in {city}?"),
    ("get_forecast", "A forecast for a day.", "How will the weather in {city} be on {date}?"),
    ("get_time", "The local time in a city.", "What time is it in {city}?"),
    ("find_flights", "Flights to a city on a day.", "Find flights to {city} on {date}."),
    ("book_hotel", "Book a room.", "Book a hotel room in {city} for {person} on {date}."),
    ("get_population", "How many people live there.", "How many people live in {country}?"),
    ("get_capital", "A country's capital.", "What is the capital of {country}?"),
    ("get_holidays", "Public holidays.", "List the public holidays of {country}."),
    ("convert_money", "Convert US dollars.", "Convert {amount} US dollars to {currency}."),
    ("get_rate", "An exchange rate to the dollar.", "What is the exchange rate of {currency}?"),
    ("send_money", "Send US dollars to a person.", "Send {amount} dollars to {person}."),
    ("get_stock_price", "A stock's last price.", "What is the stock price of {company}?"),
    ("buy_stock", "Buy shares.", "Buy {number} shares of {company}."),
    ("translate_word", "Translate a word.", "Translate '{word}' into {language}."),
    ("define_word", "Look up a word.", "What does '{word}' mean?"),
    ("find_rhymes", "Words that rhyme.", "Find words that rhyme with '{word}'."),
    ("search_news", "Search the news.", "Search the news about {topic}."),
    ("find_books", "Find books.", "Find books about {topic} in {language}."),
    ("set_timer", "Set a timer.", "Set a timer for {minutes} minutes (alarm: {loud})."),
    ("call_person", "Call somebody.", "Call {person}."),
    ("add_event", "Put it in the calendar.", "Put a meeting with {person} on {date}."),
    ("factorize", "A number's prime factors.", "What are the prime factors of {number}?"),
    ("is_prime", "Whether a number is prime.", "Is {number} a prime number?"),
    ("sort_numbers", "Sort numbers.", "Sort the numbers {numbers}."),
    ("average", "The mean of numbers.", "What is the average of {numbers}?"),
    ("to_fahrenheit", "Convert from Celsius.", "How much is {degrees} degrees in Fahrenheit?"),
]


TASKS = {"countdown": Countdown, "apigen": APIGen}
