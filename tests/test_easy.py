"""The easy forms of the paper's tasks: problems, prompts and verdicts."""

import json

import easy

from tasks import CountdownProblem


def test_easy_countdown_draws_problems_that_one_sign_solves():
    task = easy.EasyCountdown()
    parts = {split: task.load(split=split) for split in ("train", "dev", "test")}
    pairs = {split: {tuple(sorted(p.numbers)) for p in part} for split, part in parts.items()}
    assert sum(map(len, pairs.values())) == len(set.union(*pairs.values())) == 78
    for problem in parts["dev"]:
        a, b = problem.numbers
        conversations = [
            f"<answer> {x} {s} {y} </answer>" for x, y in ((a, b), (b, a)) for s in "+-*"
        ]
        assert 1 <= sum(task.verify(problem, text).correct for text in conversations) <= 4
    assert len(task.load(split="test", limit=7)) == 7


def test_the_examples_of_easy_countdown_are_what_they_say():
    task = easy.EasyCountdown()
    messages, tools = task.messages(CountdownProblem(0, (3, 8), 24))
    said = [m["content"] for m in messages]
    assert tools is None and [m["role"] for m in messages[:2]] == ["user", "assistant"]
    assert said[-1] == "Make 24 from 3 and 8. Use +, - or *." and messages[-1]["role"] == "user"
    for at, numbers, target in ((1, (8, 6), 14), (7, (17, 5), 12), (13, (3, 14), 42)):
        problem = CountdownProblem(0, numbers, target)
        assert said[at - 1 if at == 1 else at - 5] == task.question.format(
            numbers=numbers, target=target
        )
        assert task.verify(problem, said[at]).correct
        if at > 1:  # the second try; the first was wrong
            assert not task.verify(problem, said[at - 4]).correct


def test_one_tool_keeps_the_records_with_one_tool_and_one_call(tmp_path):
    tool = {"name": "area", "parameters": {"side": {"type": "int"}}}
    call = {"name": "area", "arguments": {"side": 3}}
    records = [
        {"id": i, "query": f"A square of side 3, {i}?", "answers": json.dumps([call] * calls),
         "tools": json.dumps([tool] * tools)}
        for i, (calls, tools) in enumerate(((1, 1), (2, 1), (1, 2), (1, 1)))
    ]  # fmt: skip
    path = tmp_path / "calls.json"
    path.write_text(json.dumps(records))
    task = easy.OneTool()
    problems = task.load(str(path), split="all")
    assert sorted(p.query[-2] for p in problems) == ["0", "3"]
    messages, tools = task.messages(problems[0])
    assert (
        tools is None
        and '{"name": "area", "arguments": {"side": "int"}}' in messages[-1]["content"]
    )
    assert task.verify(problems[0], json.dumps(call)).correct
    assert not task.verify(problems[0], messages[1]["content"]).correct
