"""The easy forms of the paper's tasks: problems, prompts and verdicts."""

import json

import easy
import pytest

from tasks import CountdownProblem


def test_easy_countdown_draws_problems_that_one_operator_solves():
    task = easy.EasyCountdown()
    problems = {split: task.load(split=split) for split in ("train", "dev", "test")}
    pairs = [
        {tuple(sorted(problem.numbers)) for problem in problems_of_split}
        for problems_of_split in problems.values()
    ]
    assert sum(map(len, pairs)) == len(set.union(*pairs)) == 78
    for problem in problems["dev"]:
        a, b = problem.numbers
        completions = [
            f"<answer> {left} {operator} {right} </answer>"
            for left, right in ((a, b), (b, a))
            for operator in "+-*"
        ]
        assert 1 <= sum(task.verify(problem, text).correct for text in completions) <= 4
    assert len(task.load(split="test", limit=7)) == 7


def test_easy_countdown_reads_two_numbers_and_a_target():
    task = easy.EasyCountdown()
    assert task.parse_input("6 10 16") == CountdownProblem(0, (6, 10), 16)
    for line in ("6 10", "6 10 2 32", "six ten 16"):
        with pytest.raises(ValueError, match="^type two numbers and then the target"):
            task.parse_input(line)


def test_the_examples_of_easy_countdown_are_what_they_claim_to_be():
    task = easy.EasyCountdown()
    messages, tools = task.messages(CountdownProblem(0, (3, 8), 24))
    texts = [message["content"] for message in messages]
    assert tools is None and [m["role"] for m in messages[:2]] == ["user", "assistant"]
    assert texts[-1] == "Make 24 from 3 and 8. Use +, - or *." and messages[-1]["role"] == "user"
    examples = [  # numbers, target, and where the question, a wrong and a correct answer are
        ((8, 6), 14, 0, None, 1),
        ((17, 5), 12, 2, 3, 7),
        ((3, 14), 42, 8, 9, 13),
    ]
    for numbers, target, question, wrong_answer, correct_answer in examples:
        problem = CountdownProblem(0, numbers, target)
        assert texts[question] == task.question.format(numbers=numbers, target=target)
        assert task.verify(problem, texts[correct_answer]).correct
        if wrong_answer is not None:
            assert not task.verify(problem, texts[wrong_answer]).correct


def test_one_tool_keeps_the_records_with_one_tool_and_one_call(tmp_path):
    tool = {"name": "area", "parameters": {"side": {"type": "int"}}}
    call = {"name": "area", "arguments": {"side": 3}}
    records = [
        {
            "id": i,
            "query": f"A square of side 3, {i}?",
            "answers": json.dumps([call] * num_calls),
            "tools": json.dumps([tool] * num_tools),
        }
        for i, (num_calls, num_tools) in enumerate(((1, 1), (2, 1), (1, 2), (1, 1)))
    ]
    path = tmp_path / "calls.json"
    path.write_text(json.dumps(records))
    task = easy.OneTool()
    problems = task.load(str(path), split="all")
    assert sorted(problem.query[-2] for problem in problems) == ["0", "3"]
    messages, tools = task.messages(problems[0])
    assert tools is None
    assert '{"name": "area", "arguments": {"side": "int"}}' in messages[-1]["content"]
    assert task.verify(problems[0], json.dumps(call)).correct
    assert not task.verify(problems[0], messages[1]["content"]).correct
