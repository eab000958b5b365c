"""Tasks: problems, the prompts that pose them, and verifiers that judge the answers.

A task is a subclass of `Task`. It must define:

    Problem                           a dataclass with an integer `id` and whatever else is needed
    draw_problems(split, limit, rng)  random problems of a split, unless they come from data files
    messages(problem)                 the question as chat messages, and tools (or None)
    verify(problem, completion)       a Verdict: whether the model's answer is correct, and why

`Task` provides the rest, and a subclass may override it. The README shows a complete task. This
file has Countdown, APIGen (function calling) and, for a tiny model made from scratch,
TinyCountdown.

Make the verifier strict. If it accepts some wrong answers, the policy will learn to produce them.
In particular, never pass a model's text to `eval`: Countdown has its own parser for arithmetic,
and APIGen compares strictly decoded JSON.
"""

import ast
import functools
import inspect
import itertools
import json
import math
import operator
import random
import re
import warnings
from collections import Counter, deque
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

# Limits that keep verification fast. An answer that exceeds one of them is "malformed".
MAX_EXPRESSION_CHARS = 1_000  # length of an arithmetic expression
MAX_EXPRESSION_DEPTH = 100  # nested parentheses and minus signs
MAX_CALLS_CHARS = 20_000  # length of a completion of APIGen, without its reasoning
MAX_NUMBER_CHARS = 100  # length of a number in JSON

# Percent of the problems in each split. "cold" is for the cold start, the supervised training that
# teaches a tiny model the game before RL.
SPLITS = {"cold": 55, "train": 16, "dev": 13, "test": 16}
# Coarser splits, for problems from files and for pretrained models: each is a set of the splits
# above. Pretrained models need no cold start, so "train" includes the "cold" problems.
MERGED_SPLITS = {"train": {"cold", "train"}, "dev": {"dev"}, "test": {"test"}, "all": set(SPLITS)}

# The reflection prompt of the paper, "Reflect, Retry, Reward", quoted from memory. The braces stand
# for what the model tried and how it failed.
REFLECTION_TEMPLATE = (
    "You tried {}. Reflect on what went wrong and write a short explanation that will help you do "
    "better next time."
)


@dataclass(frozen=True)
class Verdict:
    """A verifier's judgment. The reason is a short label for tallying, such as "wrong_value"."""

    correct: bool
    reason: str


def split_of(problem_key: str) -> str:
    """The split of a problem: a random choice that is seeded by the problem's key, and therefore
    the same in every run. Its probabilities are `SPLITS`."""
    return random.Random(problem_key).choices(list(SPLITS), weights=SPLITS.values())[0]


class Task:
    """Base class of all tasks: default prompts, problems from files, and splits."""

    Problem: type  # the dataclass of a problem
    shuffle_key = "task"  # mixed into the seed for drawing and shuffling problems
    # The splits that `draw_problems` knows: SPLITS (with "cold") or MERGED_SPLITS (with "all").
    drawn_splits: dict = SPLITS
    # Without --data, a run downloads this Hugging Face dataset and passes its folder to `load`.
    hub_id: str | None = None
    reflection_instruction = REFLECTION_TEMPLATE.format("performing the task, but failed")
    retry_instruction = "Now try again."
    input_format = "the number of a problem, such as 7"  # what a user of `play` may type

    def load(
        self, path: str | None = None, split: str = "train", limit: int | None = None, seed: int = 0
    ) -> list:
        """Load the problems of a split, at most `limit` of them, in random order. The seed sets the
        order. With a limit, or if the task draws its problems at random, another seed also gives
        other problems. Without a path, the problems come from `draw_problems`, and the split is one
        of `drawn_splits`. Otherwise the path is a file (JSON, JSONL or parquet) or a folder of
        files, and the split is one of `MERGED_SPLITS`.

        Raises ValueError if there is no such split, if a record is invalid, or if the file has no
        problem in the split. Raises OSError if a file cannot be read."""
        splits = self.drawn_splits if path is None else MERGED_SPLITS
        if split not in splits:
            offered = ", ".join(name for name in splits if name != "cold")  # No flag takes it.
            raise ValueError(f"there is no split {split!r}: choose one of {offered}")
        rng = random.Random(f"{self.shuffle_key} {split} {seed}")
        if path is None:
            return self.draw_problems(split, limit, rng)
        problems = [
            problem
            for problem in self.read(Path(path))
            if split_of(self.problem_key(problem)) in MERGED_SPLITS[split]
        ]
        if not problems:
            raise ValueError(f"{path} contains no problems for the split {split!r}")
        return rng.sample(problems, len(problems))[:limit]

    def draw_problems(self, split: str, limit: int | None, rng: random.Random) -> list:
        """Draw at most `limit` random problems of a split, with the ids 0, 1, 2, … If the limit is
        None, the task chooses the number. No problem may be in two splits, except that "all" may
        contain problems of every split."""
        raise ValueError("the problems of this task come from a file: pass it with --data")

    def read(self, path: Path) -> list:
        """Read all problems of a data file or folder, with the ids 0, 1, 2, … Raises ValueError if
        a record is invalid. The message names the file and the record or line."""
        files = [path]
        if path.is_dir():
            suffixes = (".json", ".jsonl", ".parquet")
            files = sorted(
                file
                for file in path.rglob("*")
                if file.suffix in suffixes
                and file.is_file()
                and not file.name.startswith(".")
                and file.name != "dataset_infos.json"  # metadata from the hub, no problems
            )
        problems = []
        for file in files:
            for location, record in read_records(file):
                try:
                    if isinstance(record, str):  # a line of JSONL, not yet decoded
                        record = STRICT_JSON.decode(record)
                    problems.append(self.parse_record({**record, "id": len(problems)}))
                except KeyError as error:
                    reason = f"the field {error} is missing; this may be a file of another task"
                    raise ValueError(f"{file}, {location}: {reason}") from None
                except (ValueError, TypeError, AttributeError, RecursionError) as error:
                    # str() of a JSONDecodeError adds "line 1 column 5", which is counted in the
                    # record but would look like a line of the file. Its `msg` has no position.
                    reason = f"{type(error).__name__}: {getattr(error, 'msg', error)}"
                    raise ValueError(f"{file}, {location}: {reason}") from None
        return problems

    def parse_record(self, record: dict):
        """Make a problem from its JSON record. Fields that `Problem` does not have are ignored. A
        method that overrides this one gets the records of data files and also those that a run
        saves, whose fields are those of `Problem`. Raises KeyError with the name of a field that is
        missing and has no default value, and ValueError, TypeError or AttributeError if the record
        is otherwise invalid."""
        values = {}
        for name, parameter in inspect.signature(self.Problem).parameters.items():
            is_required = parameter.default is parameter.empty
            if is_required or name in record:
                values[name] = record[name]
        return self.Problem(**values)

    def problem_key(self, problem) -> str:
        """A text that identifies a problem, whatever its id. Problems with equal keys are always in
        the same split, so that no test problem occurs in training."""
        return repr(replace(problem, id=0))

    def parse_input(self, line: str):
        """Make a problem from a line that was typed in `play`. A single number never gets here: it
        is the position of a loaded problem, which `play` looks up. By default, every line raises
        ValueError."""
        raise ValueError(f"type {self.input_format}")


def remove_reasoning(text: str) -> str:
    """The text after the last </think>, or the whole text if there is none. If it still contains a
    <think>, that reasoning was truncated and is removed too: "a <think> b" becomes "a "."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


# -- Data files and strict JSON --------------------------------------------------------------------
def dict_without_duplicates(pairs: list[tuple]) -> dict:
    """A dict of (key, value) pairs. Raises ValueError if a key occurs twice, unlike dict."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key occurs twice")
    return result


def parse_json_number(text: str) -> int | float:
    """A JSON number. 5.0 becomes the integer 5, so that `json.dumps` writes equal numbers in the
    same way. Raises ValueError if the number is too long, infinite or NaN."""
    if len(text) > MAX_NUMBER_CHARS:
        raise ValueError(f"a number has more than {MAX_NUMBER_CHARS} characters")
    if text.lstrip("-").isdigit():
        return int(text)  # exact, even above 2**53
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return int(value) if value.is_integer() else value


STRICT_JSON = json.JSONDecoder(
    object_pairs_hook=dict_without_duplicates,
    parse_int=parse_json_number,
    parse_float=parse_json_number,
    parse_constant=parse_json_number,  # called for NaN, Infinity and -Infinity: raises ValueError
)


def read_records(file: Path) -> list[tuple[str, Any]]:
    """The records of a data file as (location, record) pairs, where a location is "record 7", or
    "line 7" in a JSONL file. A record of JSONL is a line that the caller still has to decode, so
    that an error in one line can be located. Raises ValueError if the whole file is invalid."""
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            records = pyarrow.parquet.read_table(file).to_pylist()
        else:
            text = file.read_text(encoding="utf-8-sig")  # ignores a byte order mark
            if not text.lstrip().startswith("["):  # It is JSONL, whatever its suffix.
                lines = enumerate(text.split("\n"), 1)
                return [(f"line {number}", line) for number, line in lines if line.strip()]
            records = STRICT_JSON.decode(text)
    except ImportError:
        raise ValueError(f"{file}: to read parquet files, pip install pyarrow") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from None
    return [(f"record {number}", record) for number, record in enumerate(records, 1)]


# -- Arithmetic: a parser that can only add, subtract, multiply and divide -------------------------
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def parse_expression(text: str) -> tuple[Fraction | None, list[int]]:
    """Parse an arithmetic expression. Returns its exact value and all integers in it, in order.

    The grammar has no other operators (such as `**` or `//`), no names, no decimals, no leading
    zeros, and no digits other than 0 to 9:

        sum     = product (("+" | "-") product)*
        product = factor (("*" | "/") factor)*
        factor  = "-" factor | "(" sum ")" | integer

    >>> parse_expression("(10 + 6) * 2")
    (Fraction(32, 1), [10, 6, 2])

    The value is None if there is a division by zero; what follows it is not parsed. Raises
    ValueError if the text does not follow the grammar or exceeds a limit on its length or depth.
    """
    if len(text) > MAX_EXPRESSION_CHARS:
        raise ValueError("the expression is too long")
    integers = [int(digits) for digits in re.findall("[0-9]+", text)]
    # With re.ASCII, a no-break space is not whitespace but a token, which the grammar refuses.
    tokens = deque(re.findall(r"[0-9]+|\S", text, flags=re.ASCII))
    try:
        value = parse_sum(tokens, depth=0)
    except ZeroDivisionError:
        return None, integers
    if tokens:
        raise ValueError(f"unexpected {tokens[0]!r}")
    return value, integers


def parse_sum(tokens: deque[str], depth: int) -> Fraction:
    """Remove a sum (see the grammar) from the left end of the tokens, and return its value."""
    value = parse_product(tokens, depth)
    while tokens and tokens[0] in ("+", "-"):
        symbol = tokens.popleft()
        value = OPERATORS[symbol](value, parse_product(tokens, depth))
    return value


def parse_product(tokens: deque[str], depth: int) -> Fraction:
    """Remove a product from the left end of the tokens, and return its value."""
    value = parse_factor(tokens, depth)
    while tokens and tokens[0] in ("*", "/"):
        symbol = tokens.popleft()
        value = OPERATORS[symbol](value, parse_factor(tokens, depth))
    return value


def parse_factor(tokens: deque[str], depth: int) -> Fraction:
    """Remove a factor from the left end of the tokens, and return its value."""
    if depth > MAX_EXPRESSION_DEPTH:
        raise ValueError("the expression is nested too deeply")
    if not tokens:
        raise ValueError("the expression ends too early")
    token = tokens.popleft()
    if token == "-":
        return -parse_factor(tokens, depth + 1)
    if token == "(":
        value = parse_sum(tokens, depth + 1)
        if not tokens or tokens.popleft() != ")":
            raise ValueError("missing ')'")
        return value
    if not re.fullmatch("0|[1-9][0-9]*", token):  # no leading zeros
        raise ValueError(f"unexpected {token!r}")
    return Fraction(token)


# -- Countdown -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class CountdownProblem:
    """Make `target` from `numbers` by arithmetic in which each number is used exactly once."""

    id: int
    numbers: tuple[int, ...]
    target: int


class Countdown(Task):
    """Countdown as in the paper and in TinyZero: 3 or 4 numbers from 1 to 99. By default, the
    problems are drawn at random. `--data Jiayi-Pan/Countdown-Tasks-3to4` downloads the paper's
    problems."""

    Problem = CountdownProblem
    shuffle_key = "countdown"
    drawn_splits = MERGED_SPLITS  # there is no cold start
    reflection_instruction = REFLECTION_TEMPLATE.format(
        "solving the problem and got the wrong answer"
    )
    retry_instruction = "Now try again. Give your equation inside <answer> </answer>."
    question = (
        "Using the numbers {numbers}, create an equation that equals {target}. You can use basic "
        "arithmetic operations (+, -, *, /) and parentheses, and you must use every number exactly "
        "once. Think step by step, then give the equation inside <answer> </answer>, for example "
        "<answer> (1 + 2) / 3 </answer>."
    )
    input_format = "the numbers and then the target, such as 6 10 2 32"
    input_pattern = re.compile(r"[0-9]{1,3}(\s+[0-9]{1,3}){2,}")

    def draw_problems(self, split: str, limit: int | None, rng: random.Random) -> list:
        """Draw `limit` problems, each of which can be solved: 3 or 4 numbers from 1 to 99, and a
        target from 10 to 99. By default, 30,000 problems are drawn for "train", and 1,000 for
        "dev", "test" or "all". No two have the same numbers (in any order) and the same target.

        >>> for problem in Countdown().load(split="train", limit=2):
        ...     print(problem)
        CountdownProblem(id=0, numbers=(61, 29, 98, 51), target=59)
        CountdownProblem(id=1, numbers=(14, 72, 63, 96), target=25)
        """
        if limit is None:
            limit = 30_000 if split == "train" else 1_000
        problems: dict[tuple[str, int], CountdownProblem] = {}
        while len(problems) < limit:
            numbers = tuple(rng.randint(1, 99) for _ in range(rng.choice((3, 4))))
            # Try up to 20 expressions. If none has a value from 10 to 99, draw other numbers.
            results = (random_result(numbers, rng) for _ in range(20))
            target = next((result for result in results if 10 <= result <= 99), None)
            if target is None:
                continue
            problem = CountdownProblem(len(problems), numbers, target)
            key = self.problem_key(problem)
            if split_of(key) in MERGED_SPLITS[split]:
                problems.setdefault((key, target), problem)  # keeps the first of equal problems
        return list(problems.values())

    def problem_key(self, problem: CountdownProblem) -> str:
        """The sorted numbers. The key leaves out the target, so that training never uses the
        numbers of a test problem, not even in another order or for another target."""
        return f"Countdown {sorted(problem.numbers)}"

    def parse_record(self, record: dict) -> CountdownProblem:
        """Make a problem from {"nums", "target"}, as in TinyZero's dataset, or from {"numbers",
        "target"}, as saved by a run. Values are checked and not converted: the string "123" must
        not become the numbers 1, 2 and 3."""
        numbers = record["nums"] if "nums" in record else record["numbers"]
        problem = super().parse_record({**record, "numbers": numbers})
        is_valid_list = isinstance(numbers, list | tuple) and 1 <= len(numbers) <= 10
        # `type(n) is int` excludes True, which isinstance(n, int) would accept.
        if not is_valid_list or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{numbers!r:.60} is not a list of 1 to 10 non-negative integers")
        if type(problem.target) is not int:
            raise ValueError(f"the target {problem.target!r:.60} is not an integer")
        return replace(problem, numbers=tuple(numbers))

    def parse_input(self, line: str) -> CountdownProblem:
        if not self.input_pattern.fullmatch(line):
            raise ValueError(f"type {self.input_format}")
        *numbers, target = map(int, line.split())
        return CountdownProblem(id=0, numbers=tuple(numbers), target=target)

    def messages(self, problem: CountdownProblem) -> tuple[list[dict], None]:
        text = self.question.format(numbers=list(problem.numbers), target=problem.target)
        return [{"role": "user", "content": text}], None

    def verify(self, problem: CountdownProblem, completion: str) -> Verdict:
        """Judge the last `<answer> … </answer>` after the reasoning. It is correct if its exact
        value is the target and it uses each number exactly once. It may end in "= target".

        >>> problem = CountdownProblem(id=0, numbers=(6, 10, 2), target=32)
        >>> Countdown().verify(problem, "<answer> (10 + 6) * 2 = 32 </answer>")
        Verdict(correct=True, reason='correct')
        """
        answer = remove_reasoning(completion)
        before_closing_tag = answer.rpartition("</answer>")[0]  # "" if there is no such tag
        _, opening_tag, expression = before_closing_tag.rpartition("<answer>")
        if not opening_tag:
            return Verdict(False, "no_answer")
        expression = re.sub(rf"=\s*{problem.target}\Z", "", expression.strip())
        try:
            value, integers = parse_expression(expression)
        except ValueError:
            return Verdict(False, "malformed")
        if sorted(integers) != sorted(problem.numbers):
            return Verdict(False, "wrong_numbers")
        if value != problem.target:
            return Verdict(False, "wrong_value")
        return Verdict(True, "correct")


def random_result(numbers: tuple[int, ...], rng: random.Random) -> int:
    """The value of a random expression that uses each number once. Two random values are replaced
    by the result of a random operator, until one value is left. All results are integers that are
    at least 0. For example, 3 5 20 becomes 5 60, which becomes 12: the value of (20 * 3) / 5."""
    values = list(numbers)
    while len(values) > 1:
        rng.shuffle(values)
        a, b = values.pop(), values.pop()
        results = [a + b, abs(a - b), a * b]
        large, small = max(a, b), min(a, b)
        if small > 0 and large % small == 0:
            results.append(large // small)
        values.append(rng.choice(results))
    return values[0]


# -- TinyCountdown: problems for a tiny model, and the dialogues that teach it to play -------------
MAX_RESULT = 40  # the largest result of a step, and therefore the largest target


class Step(NamedTuple):
    """One arithmetic operation. `str` writes it as "10 / 2 = 5"."""

    left: int
    symbol: str  # one of + - * /
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.symbol} {self.right} = {self.result}"


class Plan(NamedTuple):
    """A way to combine three numbers: `last` combines the result of `first` and the third number.

    >>> Plan(first=Step(10, "/", 2, 5), last=Step(5, "*", 6, 30)).answer()
    '<answer> ( 10 / 2 ) * 6 </answer>'
    """

    first: Step
    last: Step

    def __str__(self) -> str:
        return f"{self.first} , {self.last}"

    @property
    def result(self) -> int:
        return self.last.result

    def answer(self) -> str:
        """The plan as a single expression in answer tags."""
        first, last = self
        inner = f"( {first.left} {first.symbol} {first.right} )"
        # `inner` replaces the operand that equals first.result. If both do, either will do.
        if last.left == first.result:
            return f"<answer> {inner} {last.symbol} {last.right} </answer>"
        return f"<answer> {last.left} {last.symbol} {inner} </answer>"


def possible_steps(a: int, b: int) -> list[Step]:
    """The steps that combine two numbers into an integer from 0 to MAX_RESULT."""
    large, small = max(a, b), min(a, b)
    steps = [Step(a, "+", b, a + b), Step(large, "-", small, large - small), Step(a, "*", b, a * b)]
    if small > 0 and large % small == 0:
        steps.append(Step(large, "/", small, large // small))
    return [step for step in steps if step.result <= MAX_RESULT]


def all_plans(numbers: tuple[int, int, int]) -> list[Plan]:
    """All plans for three numbers, each once."""
    x, y, z = numbers
    plans = [
        Plan(first, last)
        for a, b, third in ((x, y, z), (x, z, y), (y, z, x))
        for first in possible_steps(a, b)
        for last in possible_steps(first.result, third)
    ]
    return list(dict.fromkeys(plans))


@functools.cache  # The cold start asks for the same ones again and again.
def nearest_plans(numbers: tuple[int, int, int], target: int) -> list[Plan]:
    """One plan for each first step: the one whose result is nearest to the target."""
    nearest: dict[Step, Plan] = {}
    for plan in all_plans(numbers):
        best = nearest.get(plan.first, plan)
        nearest[plan.first] = min(best, plan, key=lambda candidate: abs(candidate.result - target))
    return list(nearest.values())


def search_plans(
    plans: list[Plan], target: int, rng: random.Random, continue_probability: float
) -> tuple[list[str], Plan]:
    """Check the given plans in cyclic order, from a random one on, until one reaches the target.
    After each failed check, the search continues with the given probability. If it ends without
    success, any of the given plans is chosen at random, checked or not. Returns the checks as texts
    ("10 / 2 = 5 , 5 * 6 = 30 no") and the chosen plan."""
    checks = []
    start = rng.randrange(len(plans))
    for plan in plans[start:] + plans[:start]:
        if plan.result == target:
            checks.append(f"{plan} yes")
            return checks, plan
        checks.append(f"{plan} no")
        if rng.random() > continue_probability:
            break
    return checks, rng.choice(plans)


class TinyCountdown(Countdown):
    """Countdown with 3 numbers from 1 to 10 and targets from 1 to 40, and all that is needed to
    train a tiny model from scratch: short texts, a vocabulary, and dialogues to imitate.

    The question lists the numbers in descending order. The two numbers that a plan combines first
    are therefore always in the order of the question, even for - and /, where the larger one has to
    come first. That takes the model less training to learn."""

    drawn_splits = SPLITS  # "cold" problems are for the cold start alone
    reflection_instruction = "Wrong. Reflect."
    retry_instruction = "Again."
    question = "Make {target} from {numbers[0]} {numbers[1]} {numbers[2]} ."
    generic_reflection = "I will be careful ."
    input_format = "3 numbers from 1 to 10 and a target up to 40, such as 10 6 2 32"
    input_pattern = re.compile(r"((10|[1-9])\s+){3}(40|[1-3]?[0-9])")  # also accepts target 0

    def draw_problems(self, split: str, limit: int | None, rng: random.Random) -> list:
        """All problems of a split in random order (there are few), or the first `limit` of them."""
        pairs = []  # (numbers, target)
        for numbers in itertools.combinations_with_replacement(range(1, 11), 3):
            key = self.problem_key(CountdownProblem(id=0, numbers=numbers, target=0))
            if split_of(key) == split:  # the key does not depend on the target
                targets = {plan.result for plan in all_plans(numbers)} - {0}  # from 1 to MAX_RESULT
                pairs += [(numbers[::-1], target) for target in sorted(targets)]
        rng.shuffle(pairs)
        return [CountdownProblem(i, *pair) for i, pair in enumerate(pairs[:limit])]

    def parse_input(self, line: str) -> CountdownProblem:
        problem = super().parse_input(line)
        return replace(problem, numbers=tuple(sorted(problem.numbers, reverse=True)))

    def words(self) -> list[str]:
        """The vocabulary: all words of questions, instructions and dialogues. Each is one token."""
        words = (
            "+ - * / = ( ) , . <answer> </answer> yes no Make from Start with I need That is not "
            f"{self.reflection_instruction} {self.retry_instruction} will be careful"
        )
        return [*map(str, range(MAX_RESULT + 1)), *words.split()]

    def cold_start_dialogue(
        self, problems: list[CountdownProblem], rng: random.Random, always_full_search: bool
    ) -> tuple[CountdownProblem, list[str]]:
        """Draw a problem, and write a dialogue about it for the cold start. Returns the problem and
        the assistant's turns: [attempt] if the attempt is correct, else [attempt, reflection,
        retry]. For example, for the numbers 10, 6 and 2 and the target 32:

            attempt:     I need 32 . Start with 6 * 2 = 12 . <answer> ( 6 * 2 ) + 10 </answer>
            reflection:  That is 22 , not 32 . 6 / 2 = 3 , 3 * 10 = 30 no
                         10 + 6 = 16 , 16 * 2 = 32 yes Start with 10 + 6 = 16 .
            retry:       <answer> ( 10 + 6 ) * 2 </answer>

        All plans here are from `nearest_plans`, so that a first step determines its plan. The
        attempt uses a random one of them. In 8% of the dialogues it first searches for one, as the
        reflection does in the example, and continues with probability 0.5 after a failed check.
        A reflection is either empty or generic, or it has three parts: the mistake, a search (or
        none), and "Start with …", the first step of the plan that the retry uses. This is the plan
        that the search found, or else a random one. `always_full_search` determines the shares:

            always_full_search   True   False
            empty or generic       0%     10%   the retry uses a random plan
            no search              0%     54%   suggests a random plan
            short search           0%     18%   continues with probability 0.7 after a failed check
            full search          100%     18%   continues until a plan reaches the target

        A retry with a random plan usually fails. This is intended: reflections that search help
        more often than others, and that is what R3 can discover.
        """
        problem = rng.choice(problems)
        target = problem.target
        plans = nearest_plans(problem.numbers, target)

        checks, plan = [], rng.choice(plans)
        if rng.random() < 0.08:
            checks, plan = search_plans(plans, target, rng, continue_probability=0.5)
        attempt = [f"I need {target} .", *checks, f"Start with {plan.first} .", plan.answer()]
        if plan.result == target:
            return problem, [" ".join(attempt)]

        if not always_full_search and rng.random() < 0.1:
            reflection = [rng.choice(["", self.generic_reflection])]
            retry_plan = rng.choice(plans)
        else:
            search = "full"
            if not always_full_search:
                [search] = rng.choices(["none", "short", "full"], weights=[3, 1, 1])
            if search == "none":
                checks, retry_plan = [], rng.choice(plans)
            else:
                continue_probability = 0.7 if search == "short" else 1.0
                checks, retry_plan = search_plans(plans, target, rng, continue_probability)
            mistake = f"That is {plan.result} , not {target} ."
            reflection = [mistake, *checks, f"Start with {retry_plan.first} ."]
        return problem, [" ".join(attempt), " ".join(reflection), retry_plan.answer()]


# -- APIGen ----------------------------------------------------------------------------------------
JSON_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean",
              "list": "array", "tuple": "array", "set": "array", "dict": "object"}  # fmt: skip


@dataclass(frozen=True)
class APIGenProblem:
    """A function-calling problem. The fields have the names and formats of Salesforce's dataset
    xlam-function-calling-60k, which was made with APIGen."""

    id: int
    query: str
    answers: str  # a JSON list of the correct calls: {"name": …, "arguments": {…}}
    tools: str  # a JSON list of {"name": …, "description": …, "parameters": {name: {"type": …}}}


class APIGen(Task):
    """Function calling, as in the paper."""

    Problem = APIGenProblem
    shuffle_key = "apigen"
    hub_id = "Salesforce/xlam-function-calling-60k"
    reflection_instruction = REFLECTION_TEMPLATE.format(
        "performing the task, but failed in generating the correct tool call"
    )
    retry_instruction = "Now try again. Write the correct tool call."

    def parse_record(self, record: dict) -> APIGenProblem:
        """Make a problem from a record of the dataset, and check its query, calls and tools."""
        problem = super().parse_record(record)
        calls = STRICT_JSON.decode(problem.answers)
        tools = STRICT_JSON.decode(problem.tools)
        if not isinstance(calls, list) or not isinstance(tools, list):
            raise ValueError("answers and tools must be JSON lists")
        for call in calls:
            parse_call(call)  # raises ValueError if it is invalid
        _, prompt_tools = self.messages(problem)
        prompt_text = problem.query + json.dumps(prompt_tools, ensure_ascii=False)
        prompt_text.encode()  # raises UnicodeEncodeError (a ValueError), for example for "\ud800"
        return problem

    def problem_key(self, problem: APIGenProblem) -> str:
        return problem.query

    def messages(self, problem: APIGenProblem) -> tuple[list[dict], list[dict]]:
        """The query as a chat with one user message, and the tools in OpenAI's format."""
        # STRICT_JSON would turn a default value of 5.0 into 5 in the prompt.
        tools = [function_schema(tool) for tool in json.loads(problem.tools)]
        return [{"role": "user", "content": problem.query}], tools

    def verify(self, problem: APIGenProblem, completion: str) -> Verdict:
        """Judge the function calls in a completion. They are correct if they are exactly the
        ground-truth calls, in any order, with the same arguments and values."""
        try:
            calls = extract_calls(completion)
        except (ValueError, RecursionError):
            return Verdict(False, "malformed")
        if calls is None:
            return Verdict(False, "no_answer")
        expected_calls = [parse_call(call) for call in STRICT_JSON.decode(problem.answers)]
        if len(calls) != len(expected_calls):
            return Verdict(False, "wrong_count")
        if Counter(name for name, _ in calls) != Counter(name for name, _ in expected_calls):
            return Verdict(False, "wrong_tool")
        if Counter(calls) != Counter(expected_calls):
            return Verdict(False, "wrong_arguments")
        return Verdict(True, "correct")


def parse_call(value: object) -> tuple[str, str]:
    """The name of a function call, and the canonical JSON of its arguments. The value is the call
    as `STRICT_JSON` has decoded it. Equal arguments have equal texts: 5 equals 5.0, but 5 does not
    equal "5", and 1 does not equal true. Raises ValueError if the value is not a call.

    >>> parse_call({"name": "add", "arguments": {"b": 2, "a": 1}})
    ('add', '{"a": 1, "b": 2}')
    """
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("a call needs a name")
    # Llama 3 writes "parameters" instead of "arguments". There must not be both.
    candidates = [value[key] for key in ("arguments", "parameters") if key in value]
    if len(candidates) != 1 or not isinstance(candidates[0], dict):
        raise ValueError("a call needs one JSON object with its arguments")
    return value["name"], json.dumps(candidates[0], sort_keys=True)


# How a call begins in the documented formats of the supported models. Each alternative has one
# named group, so that `match.lastgroup` is the format. The groups "list" and "object" are empty,
# because the JSON is only looked at, in (?= …): STRICT_JSON will read it. Special tokens, such as
# [TOOL_CALLS] and <|python_tag|>, may be missing, because Tokenizer.decode drops them.
CALL_START = re.compile(
    r"""
    # <tool_call>{…}</tool_call> for each call (Qwen 2.5 and 3) or for a list of calls (SmolLM2)
    (?P<tagged> <tool_call> ) \s*
    # [TOOL_CALLS]add[CALL_ID]x[ARGS]{"a": 1} (Mistral, since version 11 of its tokenizer).
    # Without [TOOL_CALLS], it must begin the text or directly follow another call: extract_calls
    # cuts off each call that it has read, so that \A matches in both cases.
    | (?: \[TOOL_CALLS\] | \A ) \s* (?P<named> [\w.-]+ )
      (?: \[CALL_ID\] \w+ )? (?: \[ARGS\] )? (?= \{ \s* ["}] )
    # [{…}, {…}] or [] (older Mistral; any model whose chat template ignores tools). "[add(" starts
    # a Python list of calls. extract_calls has already dealt with one that is the whole text (see
    # PYTHON_CALLS). Anywhere else it is an error: it is matched, so that STRICT_JSON will raise.
    | (?P<list> (?= \[ \s* (?: [{\]] | [\w.]+\( ) ) )
    # {…} (Llama 3). Several are on lines of their own or separated by semicolons.
    | (?P<object> (?= \{ \s* " ) )
    """,
    re.VERBOSE,
)
# Llama 3.2 and 3.3 also write [add(a=1), find(type='x')], which must be the whole completion.
PYTHON_CALLS = re.compile(r"\s*(?:<\|python_tag\|>\s*)?(\[\s*[\w.]+\(.*\)\s*\])\s*", re.DOTALL)


def extract_calls(text: str) -> list[tuple[str, str]] | None:
    """The function calls in a completion (see `parse_call`), or None if nothing starts like a call.
    An empty list of calls gives [].

    All calls must have the same format, one of those above, and there may be only one list without
    tags. Other text is ignored, with two exceptions: between {…} calls (Llama 3), only whitespace
    and one semicolon are allowed; and text that starts like a call, such as {" or [{, but is not
    one is an error. Calls in <think> do not count. Raises ValueError or RecursionError if tags,
    JSON or calls are malformed."""
    text = remove_reasoning(text)
    if len(text) > MAX_CALLS_CHARS:
        raise ValueError("the text is too long")
    if python_calls := PYTHON_CALLS.fullmatch(text):
        return parse_python_calls(python_calls[1])
    calls, formats = [], []
    prose = []  # the text before, between and after the calls, with their closing tags, if any
    while match := CALL_START.search(text):
        formats.append(match.lastgroup)
        prose.append(text[: match.start()])
        value, end = STRICT_JSON.raw_decode(text, match.end())  # `end` of the JSON in `text`
        text = text[end:]
        if match["tagged"] and not text.lstrip().startswith("</tool_call>"):
            raise ValueError("a closing tag is missing")
        if match["named"]:
            value = {"name": match["named"], "arguments": value}
        calls += value if isinstance(value, list) else [value]
    prose.append(text)
    # The prose has the closing tag of each tagged call, and no opening tag: those were in the
    # matches. Any further "tool_call>" is a tag without a call.
    if " ".join(prose).count("tool_call>") != formats.count("tagged"):
        raise ValueError("there are tags without a call")
    if len(set(formats)) > 1 or formats.count("list") > 1:
        raise ValueError("the calls have two formats, or there are two lists of calls")
    if "object" in formats and any(piece.strip() not in ("", ";") for piece in prose[1:-1]):
        raise ValueError("there is text between the calls")
    return [parse_call(call) for call in calls] if formats else None


def parse_python_calls(text: str) -> list[tuple[str, str]]:
    """The calls in a Python list, whose arguments must be literals. The text is only parsed, never
    evaluated. Raises ValueError or RecursionError for any other text.

    >>> parse_python_calls("[add(a=1), find(type='x')]")
    [('add', '{"a": 1}'), ('find', '{"type": "x"}')]
    """
    calls = []
    # Names will be cut out of the text by their positions in the syntax tree. There, only "\n" ends
    # a line, and columns are counted in UTF-8 bytes.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.encode().split(b"\n")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for example about "\d" in a string
            nodes = ast.parse(text, mode="eval").body.elts
        for node in nodes:
            if node.args or any(keyword.arg is None for keyword in node.keywords):
                raise ValueError("an argument has no name")
            # Names are taken from the text. In the syntax tree, Python has normalized them: a
            # full-width "a" is a plain "a" there, so that a wrong name could pass as correct.
            pairs = []
            for keyword in node.keywords:
                argument = lines[keyword.lineno - 1][keyword.col_offset :].partition(b"=")[0]
                pairs.append((argument.decode().strip(), ast.literal_eval(keyword.value)))
            start, end = node.func.col_offset, node.func.end_col_offset
            function = lines[node.func.lineno - 1][start:end].decode()
            calls.append({"name": function, "arguments": dict_without_duplicates(pairs)})
        json_calls = STRICT_JSON.decode(json.dumps(calls))
    except (SyntaxError, TypeError, AttributeError, MemoryError) as error:
        raise ValueError(f"not a Python list of calls: {error}") from None
    if json_calls != calls:  # for example because of a tuple, or a key that is not a string
        raise ValueError("an argument cannot be written in JSON")
    return [parse_call(call) for call in json_calls]


def function_schema(tool: dict) -> dict:
    """Convert a tool of the dataset to OpenAI's format, which chat templates expect. A Python type
    is reduced to its outermost part, not counting Optional: "List[int], optional" and
    "Optional[List[int]]" become {"type": "array"}. Types that are not in `JSON_TYPES`, such as
    "Union[int, str]", are left out."""
    properties, required = {}, []
    for name, parameter in tool["parameters"].items():
        schema = {**parameter}
        python_type = schema.pop("type", "str")
        outermost_type = re.match(r"(?:Optional\[)?(\w*)", python_type.strip())[1].lower()
        if outermost_type in JSON_TYPES:
            schema = {"type": JSON_TYPES[outermost_type], **schema}
        properties[name] = schema
        is_optional = python_type.startswith("Optional") or python_type.endswith("optional")
        if not is_optional and "default" not in schema:
            required.append(name)
    function = {
        "name": tool["name"],
        "description": tool.get("description", ""),
        "parameters": {"type": "object", "properties": properties, "required": required},
    }
    return {"type": "function", "function": function}


# The tasks for pretrained models, by their names. The tiny model always plays TinyCountdown.
TASKS = {"countdown": Countdown, "apigen": APIGen}
