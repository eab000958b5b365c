"""Invariant 5: the verifier cannot be fooled, and never raises."""

import doctest
import hashlib
import json
import random
import re
import time
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import pytest
from conftest import countdown_file

import tasks
from tasks import Countdown, CountdownProblem, Task, TinyCountdown, Verdict, parse_expression

PROBLEM = CountdownProblem(0, (6, 10, 2), 32)


def reason(answer: str, problem: CountdownProblem = PROBLEM) -> str:
    verdict = Countdown().verify(problem, f"<answer>{answer}</answer>")
    assert verdict.correct == (verdict.reason == "correct")
    return verdict.reason


@pytest.mark.parametrize(
    "answer",
    [
        "(10 + 6) * 2",
        "2*(6+10)",
        " ( 10+6 )*2 = 32 ",
        "(10\n+ 6) * 2 =32",
        "-(-10-6)*2",
        "((10+6))*2",
    ],
)
def test_right(answer):
    assert reason(answer) == "correct"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "  ",
        "(10+6)*2=33",
        "(10+6)*2==32",
        "(10+6)*2=32=32",
        "2**5",
        "7//2",
        "(10+6)(2)",
        "10 6 2",
        "10+6*",
        "(10+6*2",
        "10+6)*2",
        "1_0+6",
        "٣+6+2",
        "1e1+6",
        "0x10",
        "010+6+2",
        "10.0+6+2",
        "1.5*2",
        "abs(10)",
        "x",
        "+10+6",
        "(10+6)×2",
        "(10 + 6) * 2 = 32.0",
        "(10 + 6) *\u00a02",
        "__import__('os')",
        "()",
        "10+(+6)",
        "10,6",
        "(10+6)*2 = 0032",
    ],
)
def test_malformed(answer):
    assert reason(answer) == "malformed"


@pytest.mark.parametrize(
    "answer", ["32", "10+6", "16*2", "(10+6)*2+0", "(10+6)*2*10/10", "106/2", "(10+6)*2=32+0-0"]
)
def test_not_the_given_numbers(answer):
    assert reason(answer) in ("wrong_numbers", "malformed")
    assert reason("(10+6)*2*1", CountdownProblem(0, (6, 10, 2), 32)) == "wrong_numbers"
    assert (
        reason("12+10", CountdownProblem(0, (1, 2, 10), 22)) == "wrong_numbers"
    )  # 12 glued from 1 and 2
    assert reason("1.5*2", CountdownProblem(0, (1, 5, 2), 3)) == "malformed"


def test_worked_examples_in_docstrings():
    result = doctest.testmod(tasks)
    assert result.failed == 0 and result.attempted >= 2


def test_wrong_value_is_exact():
    assert reason("10*6/2") == "wrong_value"
    assert reason("8/3", CountdownProblem(0, (8, 3), 2)) == reason(
        "8/3", CountdownProblem(0, (8, 3), 3)
    )
    assert reason("8/3", CountdownProblem(0, (8, 3), 2)) == "wrong_value"  # nothing is rounded
    assert reason("(1/3)*3", CountdownProblem(0, (1, 3, 3), 1)) == "correct"  # not 0.999…
    assert reason("8/(3-8/3)", CountdownProblem(0, (8, 3, 8, 3), 24)) == "correct"


@pytest.mark.parametrize(
    "answer, numbers",
    [("10/(6-6)", (10, 6, 6)), ("0/0", (0, 0)), ("1-1/0*0", (1, 1, 0, 0)), ("-(5/0)", (5, 0)),
     ("10/(6-6)+(", (10, 6, 6)), ("5/0)**x", (5, 0)), ("0*(5/0)", (0, 5, 0))],
)  # fmt: skip
def test_what_divides_by_zero_is_never_right(answer, numbers):
    """It has no value, and what comes after it is not read."""
    assert parse_expression(answer) == (None, list(numbers))
    for target in (0, 1, 5, 10):
        assert reason(answer, CountdownProblem(0, numbers, target)) == "wrong_value"
        assert reason(answer, CountdownProblem(0, (*numbers, 7), target)) == "wrong_numbers"


def test_no_answer_and_the_last_answer_counts():
    verify = Countdown().verify
    assert verify(PROBLEM, "").reason == "no_answer"
    assert verify(PROBLEM, "(10+6)*2").reason == "no_answer"
    assert verify(PROBLEM, "<answer>(10+6)*2").reason == "no_answer"
    assert verify(PROBLEM, "</answer><answer>(10+6)*2").reason == "no_answer"
    assert verify(PROBLEM, "<answer>1</answer> <answer>(10+6)*2</answer>").correct
    assert not verify(PROBLEM, "<answer>(10+6)*2</answer> <answer>1</answer>").correct


@pytest.mark.parametrize(
    "answer",
    [
        *("95**97**99", "9" * 100_000, "(" * 10_000 + "1" + ")" * 10_000, "-" * 999 + "1"),
        *("(" * 400 + "1" + ")" * 400, "9" * 900 + "*" + "9" * 90, "1/0/0", "=" * 1000),
        "1" + "+1" * 499,
    ],
)
def test_hostile_answers_are_wrong_and_quick(answer):
    start = time.monotonic()
    assert reason(answer) in ("malformed", "wrong_numbers")
    assert time.monotonic() - start < 1


def test_depth_is_bounded_not_merely_survived():
    assert parse_expression("(" * 100 + "1" + ")" * 100)[0] == 1
    with pytest.raises(ValueError):
        parse_expression("(" * 101 + "1" + ")" * 101)


def random_expression(rng: random.Random, signs: str = "+-", depth: int = 0):
    """A random expression and its value: a chain of products or factors, folded as it grows."""
    text, value = "", None
    for place in range(rng.randint(1, 3)):
        if signs == "+-":
            part, part_value = random_expression(rng, "*/", depth)
        elif depth < 3 and rng.random() < 0.3:
            part, part_value = random_expression(rng, "+-", depth + 1)
            minus = rng.choice(["", "-"])
            part, part_value = f"{minus}({part})", -part_value if minus else part_value
        else:
            part_value = Fraction(rng.randint(0, 20))
            part = str(part_value)
        if place == 0:
            text, value = part, part_value
            continue
        sign = rng.choice(signs)
        if sign == "/" and part_value == 0:
            continue
        text, value = f"{text} {sign}{part}", tasks.OPERATORS[sign](value, part_value)
    return text, value


def test_the_parser_knows_precedence_and_is_exact():
    rng = random.Random(0)
    for _ in range(3_000):
        text, value = random_expression(rng)
        assert len(text) > tasks.MAX_CHARS or parse_expression(text)[0] == value, text


def test_random_text_never_raises():
    rng = random.Random(0)
    said = {
        reason("".join(rng.choice("0123 +-*/()=") for _ in range(rng.randint(0, 12))))
        for _ in range(20_000)
    }
    assert said == {"malformed", "wrong_numbers"}


def test_splits_share_no_numbers(task):
    seen: dict[tuple, str] = {}
    sizes = {}
    for split in tasks.SPLITS:
        problems = task.load(split=split)
        sizes[split] = len(problems)
        for problem in problems:
            assert seen.setdefault(tuple(sorted(problem.numbers)), split) == split
    assert sum(sizes.values()) == 2_559  # every pair of numbers and target there is
    assert min(sizes.values()) >= 300
    other = task.load(split="test", seed=5)
    assert {(tuple(sorted(p.numbers)), p.target) for p in other} == {
        (tuple(sorted(p.numbers)), p.target) for p in task.load(split="test")
    }  # the seed orders a split, it never changes what belongs to it


def test_every_problem_can_be_solved(task):
    for problem in task.load(split="dev"):
        plans = tasks.all_plans(problem.numbers).items()
        answers = [tasks.answer((first, last)) for first, lasts in plans for last in lasts]
        assert any(task.verify(problem, answer).correct for answer in answers)


def test_the_numbers_of_a_file_are_seeded_and_split_by_their_numbers(tmp_path):
    """The seed orders a split; the same numbers, in any order and for any target, are in one."""
    countdown_file(tmp_path / "d.jsonl", 200)
    lines = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    lines += [{"nums": line["nums"][::-1], "target": line["target"] + 1} for line in lines]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    load = partial(Countdown().load, str(tmp_path / "d.jsonl"))
    problems = load(split="train", seed=3)
    assert problems == load(split="train", seed=3) != load(split="train", seed=4)
    assert set(problems) == set(load(split="train", seed=4))
    assert load(split="train", seed=3, limit=5) == problems[:5]
    seen: dict[tuple, str] = {}
    for split in ("train", "dev", "test"):
        for p in load(split=split):
            assert seen.setdefault(tuple(sorted(p.numbers)), split) == split
            assert lines[p.id] == {"nums": list(p.numbers), "target": p.target}
    assert len(seen) == 200 and set(seen.values()) == {"train", "dev", "test"}
    assert len(load(split="all")) == 400


def test_cold_dialogues_are_consistent(task):
    """What a dialogue says of its arithmetic is true, and a retry follows its reflection."""
    rng = random.Random(0)
    words, problems = set(task.words()), task.load(split="cold")
    outcomes = {True: [0, 0], False: [0, 0]}
    for i in range(2_000):
        diligent = i % 2 == 0
        problem, turns = task.cold_dialogue(problems, rng, diligent)
        text = " ".join(turns)
        assert set(text.split()) <= words
        for sum_, result in re.findall(r"(\d+ [-+*/] \d+) = (\d+)", text):
            assert parse_expression(sum_)[0] == int(result)
        for result, judged in re.findall(r"= (\d+) (yes|no)", text):
            assert (judged == "yes") == (int(result) == problem.target)
        first = task.verify(problem, turns[0])
        assert first.reason in ("correct", "wrong_value")
        assert first.correct == (len(turns) == 1)
        if len(turns) == 3:
            outcomes[diligent][task.verify(problem, turns[2]).correct] += 1
            said = re.search(r"That is (\d+) , not (\d+) \..*Start with (.*) = \d+ \.$", turns[1])
            if said:
                attempted = turns[0].split("<answer>")[1].split("</answer>")[0]
                assert parse_expression(attempted)[0] == int(said[1])
                assert problem.target == int(said[2]) and f"( {said[3]} )" in turns[2]
            else:
                assert turns[1] in ("", task.generic_reflection) and not diligent
    assert outcomes[True][False] == 0  # the diligent always find the solution
    assert 0.2 < outcomes[False][True] / sum(outcomes[False]) < 0.6


def test_bad_input_is_refused(task):
    with pytest.raises(ValueError, match="no split"):
        task.load(split="nowhere")
    for line in ("", "1 2", "a b c d", "1 2 3 99", "11 2 3 9", "1 2 3 4 5", "1 2 3 -4"):
        with pytest.raises(ValueError, match="^type 3 numbers from 1 to 10 and a target up to 60"):
            task.parse(line)
    assert task.parse("6 10 2 32") == PROBLEM
    with pytest.raises(ValueError, match="^type the numbers and then the target, such as 6 10 2"):
        Countdown().parse("6 10")
    assert Countdown().parse("58 11 19 87 21") == CountdownProblem(0, (58, 11, 19, 87), 21)


def test_draws_stay_what_they_are(tmp_path):
    """Results are reproduced from a seed, so problems and dialogues may not change."""
    [tiny] = TinyCountdown().load(split="train", limit=1, seed=0)
    assert (tiny.numbers, tiny.target) == ((9, 1, 5), 50)
    (tmp_path / "d.jsonl").write_text("".join(f'{{"nums":[{i}],"target":1}}\n' for i in range(99)))
    large = Countdown().load(str(tmp_path / "d.jsonl"), split="all", limit=6, seed=0)
    assert [p.id for p in large] == [11, 9, 30, 4, 76, 70]
    problems, rng = TinyCountdown().load(split="cold"), random.Random(0)
    said = [TinyCountdown().cold_dialogue(problems, rng, i % 2 > 0)[1] for i in range(200)]
    assert hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16] == "27a8d4354981d4cc"


@dataclass(frozen=True)
class Double:
    id: int
    number: int


class Doubling(Task):
    """The least that a task of one's own must have."""

    Problem = Double

    def draw_problems(self, split, limit, rng):
        first = 10_000 * list(tasks.SPLITS).index(split)
        numbers = rng.sample(range(first, first + 10_000), limit or 1_000)
        return [Double(i, number) for i, number in enumerate(numbers)]

    def messages(self, problem):
        return [{"role": "user", "content": f"Twice {problem.number}?"}], None

    def verify(self, problem, completion):
        right = completion == str(2 * problem.number)
        return Verdict(right, "correct" if right else "wrong")


def test_a_task_of_ones_own(tmp_path):
    task = Doubling()
    parts = {split: task.load(split=split, limit=100) for split in tasks.SPLITS}
    assert all(
        len(part) == 100 and [p.id for p in part] == [*range(100)] for part in parts.values()
    )
    assert len({p.number for part in parts.values() for p in part}) == 400
    assert parts["dev"] == task.load(split="dev", limit=100) != task.load(split="dev", seed=1)[:100]
    assert task.verify(parts["dev"][0], str(2 * parts["dev"][0].number)).correct
    assert task.parse("7") == parts["dev"][7]
    with pytest.raises(ValueError, match="type the number of a problem, such as 7"):
        task.parse("seven")

    path = tmp_path / "doubles.jsonl"
    path.write_text("".join(json.dumps({"number": i}) + "\n" for i in range(20)))
    parts = [{p.number for p in task.load(str(path), split=s)} for s in ("train", "dev", "test")]
    assert all(parts) and set.union(*parts) == {*range(20)} and sum(map(len, parts)) == 20
    path.write_text('{"number": 1}\n{"numbers": 2}\n')
    with pytest.raises(ValueError, match="doubles.jsonl, record 2: .*numbers"):
        task.load(str(path))
