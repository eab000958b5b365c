"""Countdown: its verifier cannot be fooled and never raises; problems, splits and dialogues."""

import doctest
import hashlib
import itertools
import json
import random
import re
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache, partial

import pytest
from conftest import countdown_file

import r3
import tasks
from tasks import (
    Countdown,
    CountdownProblem,
    Plan,
    Step,
    Task,
    TinyCountdown,
    Verdict,
    parse_expression,
)

PROBLEM = CountdownProblem(0, (6, 10, 2), 32)


def reason(answer: str, problem: CountdownProblem = PROBLEM) -> str:
    """The verifier's reason for an answer, which is put between answer tags."""
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
def test_correct_answers(answer):
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
def test_malformed_answers(answer):
    assert reason(answer) == "malformed"


@pytest.mark.parametrize(
    "answer", ["32", "10+6", "16*2", "(10+6)*2+0", "(10+6)*2*10/10", "106/2", "(10+6)*2=32+0-0"]
)
def test_answers_with_other_numbers(answer):
    assert reason(answer) in ("wrong_numbers", "malformed")
    assert reason("(10+6)*2*1", CountdownProblem(0, (6, 10, 2), 32)) == "wrong_numbers"
    # 12 is not made from 1 and 2 by writing them side by side.
    assert reason("12+10", CountdownProblem(0, (1, 2, 10), 22)) == "wrong_numbers"
    assert reason("1.5*2", CountdownProblem(0, (1, 5, 2), 3)) == "malformed"


def test_examples_in_docstrings():
    result = doctest.testmod(tasks)
    assert result.failed == 0 and result.attempted >= 4


def test_values_are_exact():
    assert reason("10*6/2") == "wrong_value"
    assert reason("8/3", CountdownProblem(0, (8, 3), 2)) == reason(
        "8/3", CountdownProblem(0, (8, 3), 3)
    )
    assert reason("8/3", CountdownProblem(0, (8, 3), 2)) == "wrong_value"  # no rounding
    assert reason("(1/3)*3", CountdownProblem(0, (1, 3, 3), 1)) == "correct"  # not 0.999…
    assert reason("8/(3-8/3)", CountdownProblem(0, (8, 3, 8, 3), 24)) == "correct"


@pytest.mark.parametrize(
    "answer, numbers",
    [("10/(6-6)", (10, 6, 6)), ("0/0", (0, 0)), ("1-1/0*0", (1, 1, 0, 0)), ("-(5/0)", (5, 0)),
     ("10/(6-6)+(", (10, 6, 6)), ("5/0)**x", (5, 0)), ("0*(5/0)", (0, 5, 0))],
)  # fmt: skip
def test_a_division_by_zero_is_never_correct(answer, numbers):
    """It has no value, and the text that follows it is not parsed."""
    assert parse_expression(answer) == (None, list(numbers))
    for target in (0, 1, 5, 10):
        assert reason(answer, CountdownProblem(0, numbers, target)) == "wrong_value"
        assert reason(answer, CountdownProblem(0, (*numbers, 7), target)) == "wrong_numbers"


def test_a_missing_answer_and_several_answers():
    """The last answer counts."""
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
def test_hostile_answers_are_rejected_quickly(answer):
    start = time.monotonic()
    assert reason(answer) in ("malformed", "wrong_numbers")
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("(1 + 2", "missing '\\)'"),
        ("(1 + 2 3)", "missing '\\)'"),
        ("1 +", "ends too early"),
        ("", "ends too early"),
        ("(", "ends too early"),
        ("1 + 2)", "unexpected '\\)'"),
        ("1 ** 2", "unexpected '\\*'"),
        ("01", "unexpected '01'"),
        ("-" * 101 + "1", "nested too deeply"),
        ("1" * 1_001, "too long"),
    ],
)
def test_the_parser_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        parse_expression(text)


def test_the_depth_of_an_expression_is_bounded():
    assert parse_expression("(" * 100 + "1" + ")" * 100)[0] == 1
    with pytest.raises(ValueError):
        parse_expression("(" * 101 + "1" + ")" * 101)


def random_expression(rng: random.Random, operators: str = "+-", depth: int = 0):
    """A random expression and its value: a chain of operands, which are products (if the operators
    are "+-") or factors (if they are "*/"). The value is computed while the text grows."""
    text, value = "", None
    for position in range(rng.randint(1, 3)):
        if operators == "+-":
            operand, operand_value = random_expression(rng, "*/", depth)
        elif depth < 3 and rng.random() < 0.3:
            inner, operand_value = random_expression(rng, "+-", depth + 1)
            minus = rng.choice(["", "-"])
            operand = f"{minus}({inner})"
            operand_value = -operand_value if minus else operand_value
        else:
            operand_value = Fraction(rng.randint(0, 20))
            operand = str(operand_value)
        if position == 0:
            text, value = operand, operand_value
            continue
        symbol = rng.choice(operators)
        if symbol == "/" and operand_value == 0:
            continue
        text, value = f"{text} {symbol}{operand}", tasks.OPERATORS[symbol](value, operand_value)
    return text, value


def test_the_parser_knows_precedence_and_is_exact():
    rng = random.Random(0)
    for _ in range(3_000):
        text, value = random_expression(rng)
        is_too_long = len(text) > tasks.MAX_EXPRESSION_CHARS
        assert is_too_long or parse_expression(text)[0] == value, text


def test_random_text_never_raises():
    rng = random.Random(0)
    reasons = {
        reason("".join(rng.choice("0123 +-*/()=") for _ in range(rng.randint(0, 12))))
        for _ in range(20_000)
    }
    assert reasons == {"malformed", "wrong_numbers"}


def sorted_numbers(problem: CountdownProblem) -> tuple[int, ...]:
    return tuple(sorted(problem.numbers))


def test_two_splits_share_no_numbers(task):
    split_of_numbers: dict[tuple, str] = {}
    sizes = {}
    for split in tasks.SPLITS:
        problems = task.load(split=split)
        sizes[split] = len(problems)
        for problem in problems:
            assert split_of_numbers.setdefault(sorted_numbers(problem), split) == split
    assert sum(sizes.values()) == 2_229  # all pairs of numbers and a target
    assert min(sizes.values()) >= 250
    one, other = (
        {
            (sorted_numbers(problem), problem.target)
            for problem in task.load(split="test", seed=seed)
        }
        for seed in (0, 5)
    )
    assert one == other  # the seed changes the order of a split, but not what belongs to it


def test_every_problem_can_be_solved(task):
    for problem in task.load(split="dev"):
        plans = tasks.all_plans(problem.numbers)
        assert any(task.verify(problem, plan.answer()).correct for plan in plans)
        nearest = tasks.nearest_plans(problem.numbers, problem.target)
        assert any(plan.result == problem.target for plan in nearest)


def test_plans_as_text():
    plan = Plan(first=Step(10, "-", 5, 5), last=Step(5, "*", 5, 25))
    assert str(plan) == "10 - 5 = 5 , 5 * 5 = 25"
    assert plan.answer() == "<answer> ( 10 - 5 ) * 5 </answer>"  # the left one of equal operands
    plan = Plan(first=Step(3, "*", 3, 9), last=Step(10, "-", 9, 1))
    assert plan.answer() == "<answer> 10 - ( 3 * 3 ) </answer>"
    assert tasks.possible_steps(0, 7) == [
        Step(0, "+", 7, 7),
        Step(7, "-", 0, 7),
        Step(0, "*", 7, 0),
    ]
    assert tasks.possible_steps(10, 7) == [Step(10, "+", 7, 17), Step(10, "-", 7, 3)]  # 70 > 40


def test_all_plans_reach_all_values():
    """The results of the plans are those of a plain enumeration of expressions."""
    numbers = (5, 2, 5)
    plans = tasks.all_plans(numbers)
    assert len(plans) == len(set(plans))
    values = set()
    for a, b, third in itertools.permutations(numbers):
        for first, last in itertools.product("+-*/", repeat=2):
            inner = f"({a} {first} {b})"
            for outer in (f"{inner} {last} {third}", f"{third} {last} {inner}"):
                results = [parse_expression(text)[0] for text in (inner, outer)]
                if all(result in range(tasks.MAX_RESULT + 1) for result in results):
                    values.add(results[-1])
    assert {plan.result for plan in plans} == values


def test_the_problems_of_a_file_are_split_by_their_numbers(tmp_path):
    """The seed determines the order of a split. Problems with the same numbers, in any order and
    with any target, are in the same split."""
    countdown_file(tmp_path / "d.jsonl", 200)
    records = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    records += [{"nums": r["nums"][::-1], "target": r["target"] + 1} for r in records]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, records)))
    load = partial(Countdown().load, str(tmp_path / "d.jsonl"))
    problems = load(split="train", seed=3)
    assert problems == load(split="train", seed=3) != load(split="train", seed=4)
    assert set(problems) == set(load(split="train", seed=4))
    assert load(split="train", seed=3, limit=5) == problems[:5]
    split_of_numbers: dict[tuple, str] = {}
    for split in ("train", "dev", "test"):
        for problem in load(split=split):
            assert split_of_numbers.setdefault(sorted_numbers(problem), split) == split
            record = {"nums": list(problem.numbers), "target": problem.target}
            assert records[problem.id] == record
    assert len(split_of_numbers) == 200
    assert set(split_of_numbers.values()) == {"train", "dev", "test"}
    assert len(load(split="all")) == 400


def test_cold_start_dialogues_are_consistent(task):
    """The arithmetic in a dialogue is true, and a retry follows its reflection."""
    rng = random.Random(0)
    vocabulary, problems = set(task.words()), task.load(split="cold")
    outcomes = {True: Counter(), False: Counter()}  # by always_full_search: correct retries
    for i in range(2_000):
        always_full_search = i % 2 == 0
        problem, turns = task.cold_start_dialogue(problems, rng, always_full_search)
        text = " ".join(turns)
        assert set(text.split()) <= vocabulary
        for expression, result in re.findall(r"(\d+ [-+*/] \d+) = (\d+)", text):
            assert parse_expression(expression)[0] == int(result)
        for result, judgment in re.findall(r"= (\d+) (yes|no)", text):
            assert (judgment == "yes") == (int(result) == problem.target)
        attempt_verdict = task.verify(problem, turns[0])
        assert attempt_verdict.reason in ("correct", "wrong_value")
        assert attempt_verdict.correct == (len(turns) == 1)
        if len(turns) == 3:
            attempt, reflection, retry = turns
            outcomes[always_full_search][task.verify(problem, retry).correct] += 1
            parts = re.search(
                r"That is (\d+) , not (\d+) \..*Start with (.*) = \d+ \.$", reflection
            )
            if parts:
                attempted_value, target, first_step = parts.groups()
                attempted = attempt.split("<answer>")[1].split("</answer>")[0]
                assert parse_expression(attempted)[0] == int(attempted_value)
                assert problem.target == int(target) and f"( {first_step} )" in retry
            else:
                assert reflection in ("", task.generic_reflection) and not always_full_search
    assert outcomes[True][False] == 0  # a search to the end always finds the solution
    assert 0.2 < outcomes[False][True] / outcomes[False].total() < 0.6


def test_cold_start_dialogues_have_the_documented_frequencies(task):
    rng, problems = random.Random(1), task.load(split="cold")
    dialogues = [task.cold_start_dialogue(problems, rng, False)[1] for _ in range(10_000)]
    searched = sum(" no" in turns[0] or " yes" in turns[0] for turns in dialogues)
    assert searched / len(dialogues) == pytest.approx(0.08, abs=0.01)
    reflections = [turns[1] for turns in dialogues if len(turns) == 3]
    generic = sum(text in ("", task.generic_reflection) for text in reflections)
    assert generic / len(reflections) == pytest.approx(0.1, abs=0.015)
    searches = sum(" no " in text or " yes " in text for text in reflections)
    assert searches / len(reflections) == pytest.approx(0.36, abs=0.02)
    for turns in (task.cold_start_dialogue(problems, rng, True)[1] for _ in range(1_000)):
        assert len(turns) == 1 or " yes " in turns[1]


def test_bad_input_is_refused(task):
    with pytest.raises(ValueError, match="no split"):
        task.load(split="nowhere")
    for line in ("", "1 2", "a b c d", "1 2 3 99", "11 2 3 9", "1 2 3 4 5", "1 2 3 -4"):
        with pytest.raises(ValueError, match="^type 3 numbers from 1 to 10 and a target up to 40"):
            task.parse_input(line)
    for line in ("6 10 2 32", "10 6 2 32"):  # The question lists the numbers in descending order.
        assert task.parse_input(line) == CountdownProblem(0, (10, 6, 2), 32)
    assert Countdown().parse_input("6 10 2 32") == PROBLEM
    with pytest.raises(ValueError, match="^type the numbers and then the target, such as 6 10 2"):
        Countdown().parse_input("6 10")
    problem = Countdown().parse_input("58 11 19 87 21")
    assert problem == CountdownProblem(0, (58, 11, 19, 87), 21)


def test_problems_and_dialogues_never_change(tmp_path):
    """Results are reproduced from a seed, so the same seed must always draw the same."""
    [tiny] = TinyCountdown().load(split="train", limit=1, seed=0)
    assert (tiny.numbers, tiny.target) == ((8, 8, 3), 32)
    (tmp_path / "d.jsonl").write_text("".join(f'{{"nums":[{i}],"target":1}}\n' for i in range(99)))
    from_file = Countdown().load(str(tmp_path / "d.jsonl"), split="all", limit=6, seed=0)
    assert [problem.id for problem in from_file] == [11, 9, 30, 4, 76, 70]
    problems, rng = TinyCountdown().load(split="cold"), random.Random(0)
    dialogues = [
        TinyCountdown().cold_start_dialogue(problems, rng, always_full_search=i % 2 > 0)[1]
        for i in range(200)
    ]
    digest = hashlib.sha256(json.dumps(dialogues).encode()).hexdigest()
    assert digest[:16] == "5084b64a4b441035"


def test_an_answer_in_the_reasoning_does_not_count():
    problem = CountdownProblem(0, (6, 10, 2), 32)
    right, wrong = "<answer>(10+6)*2</answer>", "<answer>10+6</answer>"
    for completion, expected in (
        (f"<think> try {right} </think> I give up", "no_answer"),
        (f"<think> try {right}", "no_answer"),  # truncated
        (f"<think> try {right} </think> {wrong}", "wrong_numbers"),
        (f"<think> try {wrong} </think> {right}", "correct"),
        (f"try {wrong} </think> {right}", "correct"),  # The template has opened the reasoning.
    ):
        assert Countdown().verify(problem, completion).reason == expected, completion


def test_files_that_hold_no_problems_do_not_block_a_folder(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"nums": [1, 2, 3], "target": 6}\n')
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    (tmp_path / "._train.jsonl").write_bytes(b"\xff\x00")  # macOS writes such files
    (tmp_path / "folder.json").mkdir()
    [problem] = Countdown().load(str(tmp_path), split="all")
    assert problem.numbers == (1, 2, 3)


@cache
def all_values(numbers: tuple[int, ...]) -> dict[int, str]:
    """All integers that the numbers make, each with an expression. A brute force for comparison: it
    divides the numbers into two groups in every way. Intermediate results must be integers, but may
    be negative."""
    if len(numbers) == 1:
        return {numbers[0]: str(numbers[0])}
    values = {}
    for in_left in itertools.product((True, False), repeat=len(numbers)):
        left = tuple(itertools.compress(numbers, in_left))
        right = tuple(itertools.compress(numbers, (not flag for flag in in_left)))
        if left and right:
            operands = itertools.product(all_values(left).items(), all_values(right).items())
            for (a, a_text), (b, b_text) in operands:
                results = {"+": a + b, "-": a - b, "*": a * b}
                if b and a % b == 0:
                    results["/"] = a // b
                for symbol, result in results.items():
                    values[result] = f"({a_text} {symbol} {b_text})"
    return values


@pytest.mark.parametrize("num_numbers", [3, 4])
def test_drawn_countdown_problems_can_be_solved(num_numbers):
    drawn = Countdown().load(split="all", limit=600, seed=1)
    problems = [problem for problem in drawn if len(problem.numbers) == num_numbers]
    assert len(problems) > 250
    for problem in problems:
        expression = all_values(problem.numbers)[problem.target]
        assert reason(expression, problem) == "correct"


def test_the_splits_of_drawn_countdown_problems_share_no_numbers():
    """A pretrained model has no cold start, so "train" includes the problems of "cold"."""
    split_of_numbers: dict[tuple, str] = {}
    for split in ("train", "dev", "test"):
        for problem in Countdown().load(split=split, limit=1_000):
            assert split_of_numbers.setdefault(sorted_numbers(problem), split) == split
    shares = Counter(
        tasks.split_of(Countdown().problem_key(problem))
        for problem in Countdown().load(split="train", limit=2_000)
    )
    assert set(shares) == {"cold", "train"}
    assert shares["cold"] / 2_000 == pytest.approx(55 / 71, abs=0.04)
    everything = Countdown().load(split="all", limit=1_000)
    assert {tasks.split_of(Countdown().problem_key(p)) for p in everything} == {*tasks.SPLITS}
    with pytest.raises(ValueError, match="no split 'cold': choose one of train, dev, test, all"):
        Countdown().load(split="cold")
    with pytest.raises(ValueError, match="no split 'all': choose one of train, dev, test$"):
        TinyCountdown().load(split="all")


def test_a_draw_of_countdown_problems_is_determined_by_its_seed():
    load = partial(Countdown().load, split="dev")
    problems = load(limit=40, seed=3)
    assert problems == load(limit=40, seed=3)
    assert load(limit=7, seed=3) == problems[:7] and load(limit=1, seed=3) == problems[:1]
    problem_keys = [
        {(sorted_numbers(problem), problem.target) for problem in load(limit=40, seed=seed)}
        for seed in (3, 4)
    ]
    assert len(set.union(*problem_keys)) > 75  # another seed draws other problems
    assert len(load()) == 1_000


def test_drawn_countdown_problems_are_distinct_and_in_range():
    problems = Countdown().load(split="train")
    assert [problem.id for problem in problems] == [*range(30_000)]
    assert len({(sorted_numbers(p), p.target) for p in problems}) == 30_000
    assert {problem.target for problem in problems} == {*range(10, 100)}
    assert {number for problem in problems for number in problem.numbers} == {*range(1, 100)}
    for value in (value for p in problems for value in (*p.numbers, p.target)):
        assert type(value) is int
    lengths = Counter(len(problem.numbers) for problem in problems)
    assert set(lengths) == {3, 4} and lengths[3] / 30_000 == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    "task_class, split, digest",
    [
        (Countdown, "train", "12f142a7"),
        (Countdown, "dev", "70eaa724"),
        (Countdown, "test", "52dab3a0"),
        (TinyCountdown, "train", "6e1e4793"),
        (TinyCountdown, "dev", "7a3ff228"),
        (TinyCountdown, "test", "15786479"),
    ],
)
def test_drawn_problems_never_change(task_class, split, digest):
    """A resumed run draws its problems again, and results are compared on the same problems."""
    problems = task_class().load(split=split, limit=300, seed=0)
    text = json.dumps([[problem.numbers, problem.target] for problem in problems])
    assert hashlib.sha256(text.encode()).hexdigest()[:8] == digest


def test_countdown_is_downloaded_only_if_it_is_asked_for(tmp_path, folder, monkeypatch):
    """--data with a hub id uses exactly the problems of that dataset."""
    on_cpu = replace(r3.PRETRAINED, device="cpu", dtype="float32")
    config = replace(on_cpu, model=str(folder), max_new_tokens=40)
    task, requests = r3.load_task(config), []

    def local_path(hub_id, files, repo_type):
        requests.append((hub_id, repo_type))
        return tmp_path / "dataset"

    monkeypatch.setattr(r3, "local_path", local_path)
    drawn = r3.load_problems(config, task, "dev", 20)
    assert drawn == Countdown().load(split="dev", limit=20) and requests == []
    (tmp_path / "dataset").mkdir()
    countdown_file(tmp_path / "dataset" / "train.jsonl")
    config.data = "Jiayi-Pan/Countdown-Tasks-3to4"
    problems = r3.load_problems(config, task, "all", None)
    assert requests == [(config.data, "dataset")]
    records = map(json.loads, (tmp_path / "dataset" / "train.jsonl").read_text().splitlines())
    expected = [(i, tuple(r["nums"]), r["target"]) for i, r in enumerate(records)]
    assert sorted((p.id, p.numbers, p.target) for p in problems) == expected


@dataclass(frozen=True)
class DoublingProblem:
    id: int
    number: int


class Doubling(Task):
    """A task that defines no more than it must."""

    Problem = DoublingProblem

    def draw_problems(self, split, limit, rng):
        first = 10_000 * list(tasks.SPLITS).index(split)
        numbers = rng.sample(range(first, first + 10_000), limit or 1_000)
        return [DoublingProblem(i, number) for i, number in enumerate(numbers)]

    def messages(self, problem):
        return [{"role": "user", "content": f"Twice {problem.number}?"}], None

    def verify(self, problem, completion):
        correct = completion == str(2 * problem.number)
        return Verdict(correct, "correct" if correct else "wrong")


def test_a_new_task_needs_only_four_definitions(tmp_path):
    task = Doubling()
    problems = {split: task.load(split=split, limit=100) for split in tasks.SPLITS}
    for problems_of_split in problems.values():
        assert [problem.id for problem in problems_of_split] == [*range(100)]
    numbers = {problem.number for split in tasks.SPLITS for problem in problems[split]}
    assert len(numbers) == 400
    dev = problems["dev"]
    assert dev == task.load(split="dev", limit=100) != task.load(split="dev", seed=1)[:100]
    assert task.verify(dev[0], str(2 * dev[0].number)).correct
    for line in ("seven", "7"):  # `play` looks up a problem's number itself
        with pytest.raises(ValueError, match="^type the number of a problem, such as 7$"):
            task.parse_input(line)

    path = tmp_path / "doubles.jsonl"
    path.write_text("".join(json.dumps({"number": i}) + "\n" for i in range(20)))
    file_splits = [
        {problem.number for problem in task.load(str(path), split=split)}
        for split in ("train", "dev", "test")
    ]
    assert all(file_splits) and set.union(*file_splits) == {*range(20)}
    assert sum(map(len, file_splits)) == 20
    path.write_text('{"number": 1}\n{"numbers": 2}\n')
    with pytest.raises(ValueError, match="doubles.jsonl, line 2: the field 'number' is missing"):
        task.load(str(path))


@dataclass(frozen=True)
class DefaultsProblem:
    id: int
    number: int
    unit: str = "cm"
    factors: tuple = field(default_factory=tuple)


def test_a_field_with_a_default_value_may_be_missing():
    task = Doubling()
    task.Problem = DefaultsProblem
    assert task.parse_record({"id": 1, "number": 2, "color": 3}) == DefaultsProblem(1, 2)
    assert task.parse_record({"id": 1, "number": 2, "unit": "m"}) == DefaultsProblem(1, 2, "m")
    with pytest.raises(KeyError, match="number"):
        task.parse_record({"id": 1, "unit": "m"})


def test_the_key_in_tasks_is_the_only_name_of_a_task():
    """A task has no name of its own that could differ from it, or be forgotten."""
    for task_class in (Task, Doubling, TinyCountdown, *tasks.TASKS.values()):
        assert not hasattr(task_class, "name")
    # What seeds the order of the problems need not be unique, and must never change.
    prefixes = {name: task_class.shuffle_key for name, task_class in tasks.TASKS.items()}
    assert prefixes["countdown"] == TinyCountdown.shuffle_key == "countdown"
    assert prefixes["apigen"] == "apigen" and Doubling.shuffle_key == "task"
