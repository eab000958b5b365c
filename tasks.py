"""Tasks: problems, the texts that pose them, and verifiers that say right or wrong.

R3 needs nothing from a task but these three things, so a task is one class with three methods:

    load(path, split, limit, seed) -> problems     where the problems come from
    messages(problem) -> (messages, tools)         the question, as a chat
    verify(problem, completion) -> Verdict         right or wrong, and which kind of wrong

and three texts: `reflect`, said to the model after a failure, `again`, said after its reflection,
and `generic_reflection`, a control. `problem` reads one back from a file, `parse` reads what a
person typed. A problem is a dataclass with a whole number `id`.

This file is plain Python. It knows nothing of models, tokens or training, and it never lets the
model's text near `eval`: a verifier is attacked by its student (a policy finds every answer that is
rewarded without being right), so Countdown parses and computes for itself, exactly.

Countdown: combine the given numbers with + - * / to reach a target, each number exactly once.
It comes in two sizes. The usual one (3 or 4 numbers from 1 to 99) is for real checkpoints. The
small one (`Countdown(tiny=True)`: 3 numbers from 1 to 10) is for a model of 0.3 million parameters
that is trained from nothing in minutes, and brings along what such a model needs: a vocabulary,
short texts, and the dialogues of its cold start.
"""

import itertools
import operator
import random
import re
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARS = 1_000  # a longer answer is malformed: the verifier's time is bounded by construction
MAX_DEPTH = 100  # so is one nested deeper than this


@dataclass(frozen=True)
class Verdict:
    """What a verifier says: right or not, and the reason in one word (a key for counting)."""

    right: bool
    reason: str


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


class Countdown:
    """The numbers game, as in TinyZero and in the paper. `tiny=True` is the small one."""

    def __init__(self, tiny: bool = False):
        self.tiny = tiny
        if tiny:
            self.reflect = "Wrong. Reflect."
            self.again = "Again."
            self.generic_reflection = "I will be careful ."
        else:  # `reflect` is the paper's, as recalled; the others are ours
            self.reflect = (
                "You tried solving the problem and got the wrong answer. Reflect on what went "
                "wrong and write a short explanation that will help you do better next time."
            )
            self.again = "Now try again. Give your equation inside <answer> </answer>."
            self.generic_reflection = (
                "I made a mistake. Next time I will read the problem carefully, work step by step, "
                "and check my result before I answer."
            )

    def load(
        self, path: str | None = None, split: str = "train", limit: int | None = None, seed: int = 0
    ) -> list[Numbers]:
        """Problems of a split ("cold", "train", "dev" or "test"), in an order drawn from `seed`.

        What belongs to which split is fixed by the multiset of numbers alone, whatever the seed: no
        two splits share a multiset, so the numbers of a test problem were never seen in training.
        Raises ValueError for an unknown split, or for a path (problems are generated).
        """
        if path is not None:
            raise ValueError("Countdown generates its problems; it reads no data file")
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
        rng = random.Random(f"countdown {split} {seed}")
        if not self.tiny:
            return self._generate(split, limit or 1_000, rng)
        problems = []
        for multiset in itertools.combinations_with_replacement(range(1, 11), 3):
            if split_of(multiset) == split:
                for target in sorted(reachable(multiset) - {0}):
                    problems.append((rng.sample(multiset, 3), target))
        rng.shuffle(problems)
        return [Numbers(i, tuple(n), t) for i, (n, t) in enumerate(problems[:limit])]

    def _generate(self, split: str, limit: int, rng: random.Random) -> list[Numbers]:
        """3 or 4 numbers from 1 to 99, and a target that a random way of combining them reaches."""
        problems: dict[tuple, None] = {}  # a dict, as an ordered set
        while len(problems) < limit:
            numbers = [rng.randint(1, 99) for _ in range(rng.choice((3, 4)))]
            values = [Fraction(n) for n in numbers]
            while len(values) > 1:
                rng.shuffle(values)
                a, b, sign = values.pop(), values.pop(), rng.choice("+-*/")
                if sign == "/" and b == 0:
                    break
                values.append(SIGNS[sign](a, b))
            reached = len(values) == 1 and values[0] in range(1, 100)
            if reached and split_of(sorted(numbers)) == split:
                problems[tuple(numbers), int(values[0])] = None
        return [Numbers(i, n, t) for i, (n, t) in enumerate(problems)]

    def problem(self, record: dict) -> Numbers:
        """A problem from its JSON record, the inverse of `dataclasses.asdict`."""
        return Numbers(int(record["id"]), tuple(map(int, record["numbers"])), int(record["target"]))

    how_to_type = "the numbers and then the target, such as 6 10 2 32"

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

SPLITS = {"cold": 55, "train": 16, "dev": 13, "test": 16}  # per cent of the multisets of numbers
Step = tuple[int, str, int, int]  # 10 / 2 = 5 is (10, "/", 2, 5)


def split_of(multiset) -> str:
    """Which split a multiset of numbers (sorted) belongs to: a fixed draw keyed by the numbers."""
    draw = random.Random(f"Countdown {list(multiset)}").choices(
        list(SPLITS), weights=SPLITS.values()
    )
    return draw[0]


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


TASKS = {"countdown": Countdown}
