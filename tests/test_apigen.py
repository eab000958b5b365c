"""APIGen: what its verifier accepts, attacks on it, and problems from data files."""

import itertools
import json
import random
import re
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from drawn_apigen import DrawnAPIGen

import tasks
from model import tools_in_words
from tasks import APIGen, APIGenProblem, Countdown

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

task = APIGen()
TOOLS = [
    {"name": "add", "description": "Add.", "parameters": {"a": {"type": "float"}}},
    {"name": "find", "description": "", "parameters": {"type": {"type": "str, optional"}}},
]


def problem_with(*calls):
    """A problem whose ground truth is these calls."""
    return APIGenProblem(0, "?", json.dumps(list(calls)), json.dumps(TOOLS))


def call(name, **arguments):
    return {"name": name, "arguments": arguments}


def formats(calls):
    """The calls in all formats that the supported model families write."""
    llama = [{"name": call["name"], "parameters": call["arguments"]} for call in calls]
    yield "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)
    yield f"<think>maybe [{{}}] or\n{json.dumps(calls[:1])}</think>\n\n{json.dumps(calls)}"
    yield json.dumps(calls[::-1])  # the order does not matter
    yield f"Sure [1], here {{it}} is:\n```json\n{json.dumps(llama, indent=2)}\n```\nDone."
    if len(calls) == 1:
        yield json.dumps(llama[0])
        yield f"<|python_tag|>{json.dumps(llama[0], ensure_ascii=False)}"
        yield json.dumps({"type": "function", **calls[0]})


def similar_value(value):
    """A different value that a comparison which ignores types might take for the same."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | float):
        return str(value)
    return [value]


def check_correct_and_changed_calls(problem):
    """The ground truth is correct in all formats; with any change it is wrong."""
    calls = json.loads(problem.answers)
    for text in formats(calls):
        assert task.verify(problem, text).correct, text
    for index, correct_call in enumerate(calls):
        for name, value in correct_call["arguments"].items():
            changed = json.loads(problem.answers)
            changed[index]["arguments"][name] = similar_value(value)
            for text in formats(changed):
                assert task.verify(problem, text).reason == "wrong_arguments", text
        changed = json.loads(problem.answers)
        changed[index]["name"] += "_"
        assert task.verify(problem, json.dumps(changed)).reason == "wrong_tool"
        changed = json.loads(problem.answers)
        changed[index]["arguments"]["another"] = 1
        assert task.verify(problem, json.dumps(changed)).reason == "wrong_arguments"
        fewer = calls[:index] + calls[index + 1 :]
        assert task.verify(problem, json.dumps(fewer)).reason == "wrong_count"
    assert task.verify(problem, json.dumps(calls + calls[:1])).reason == "wrong_count"


def test_drawn_problems_can_be_answered_in_all_formats():
    task = DrawnAPIGen()
    problems = task.load(split="train", limit=60)
    assert {len(json.loads(problem.answers)) for problem in problems} == {1, 2, 3}
    for problem in problems:
        check_correct_and_changed_calls(problem)
        offered = [tool["name"] for tool in json.loads(problem.tools)]
        needed = {call["name"] for call in json.loads(problem.answers)}
        assert needed < set(offered)  # there are tools that are not needed
        assert len(set(offered)) == len(offered)
        messages, tools = task.messages(problem)
        assert messages == [{"role": "user", "content": problem.query}]
        assert [tool["function"]["name"] for tool in tools] == offered
        prompt = tools_in_words(messages, tools)[0]["content"]
        assert prompt.endswith(problem.query) and all(name in prompt for name in offered)
    loaded_again = task.load(split="train", limit=60)
    assert loaded_again == problems != task.load(split="train", limit=60, seed=1)
    queries = [{problem.query for problem in task.load(split=split)} for split in tasks.SPLITS]
    assert sum(map(len, queries)) == len(set.union(*queries))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real records are not here")
def test_every_real_record_loads_and_its_ground_truth_is_correct():
    problems = task.load(str(SHARED / "apigen_bfcl.json"), split="all")
    assert len(problems) == 1000
    for problem in problems:
        check_correct_and_changed_calls(problem)
    for problem in problems[:50]:
        assert task.parse_record(asdict(problem)) == problem


@pytest.mark.parametrize(
    "expected_value, json_text, correct",
    [
        (5, "5.0", True), (5.0, "5", True), (1e20, "100000000000000000000", True),
        (5, '"5"', False), (1, "true", False), (True, "1", False), (0, "false", False),
        (0, "-0.0", True), (None, "null", True), (None, '""', False), (0.1, "0.10", True),
        (2**53 + 1, str(2.0**53), False), ([1, 2], "[1.0, 2]", True), ([1, 2], "[2, 1]", False),
        ({"a": 1, "b": [True]}, '{"b": [true], "a": 1.0}', True), ("é", '"\\u00e9"', True),
        ({"a": 1}, '{"a": 1, "b": null}', False), ("x", '"x "', False), ([], "{}", False),
    ],
)  # fmt: skip
def test_json_equality(expected_value, json_text, correct):
    text = f'[{{"name": "add", "arguments": {{"a": {json_text}}}}}]'
    problem = problem_with(call("add", a=expected_value))
    assert task.verify(problem, text).correct is correct


def test_a_repeated_call_must_be_repeated_as_often():
    one, two = call("add", a=1), call("add", a=2)
    problem = problem_with(one, one, two)
    assert task.verify(problem, json.dumps([one, two, one])).reason == "correct"
    assert task.verify(problem, json.dumps([one, two, two])).reason == "wrong_arguments"


ONE = json.dumps([call("add", a=1)])


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "no_answer"),
        ("I cannot do that {sorry} [1].", "no_answer"),
        ("add(a=1)", "no_answer"),
        (f"<think>{ONE}", "no_answer"),
        ('{"a": 1}', "malformed"),
        ("I cannot do that {'a': 1} [1, 2].", "no_answer"),
        (f"{ONE} [1]", "malformed"),
        (f"{ONE} {{}}", "malformed"),
        (f"[1] {ONE}", "correct"),
        (f"[] {ONE}", "malformed"),
        (f"[{{'name': 'add'}}] {ONE}", "malformed"),
        ("[]", "wrong_count"),
        (f"{ONE} or rather {ONE}", "malformed"),
        (ONE[1:-1] + "; " + ONE[1:-1], "malformed"),
        (f"<tool_call>{ONE[1:-1]}</tool_call>{ONE}", "malformed"),
        (f"<tool_call>{ONE[1:-1]}", "malformed"),
        (f"<tool_call>{ONE[1:-1]}</tool_call></tool_call>", "malformed"),
        ("<tool_call>add</tool_call>", "malformed"),
        (f"<tool_call>{ONE}</tool_call>", "malformed"),
        (ONE[:-1], "malformed"),
        (ONE[:-1] + ", 5]", "malformed"),
        (ONE[:-1] + ", {'name': 'add'}]", "malformed"),
        ('{"name": "add"}', "malformed"),
        ('{"name": "add", "arguments": "a"}', "malformed"),
        ('{"name": ["add"], "arguments": {}}', "malformed"),
        ('{"name": "add", "arguments": {"a": 1}, "parameters": {"a": 2}}', "malformed"),
        ('[{"name": "add", "name": "find", "arguments": {"a": 1}}]', "malformed"),
        ('[{"name": "add", "arguments": {"a": 2, "a": 1}}]', "malformed"),
        ('[{"name": "add", "arguments": {"a": NaN}}]', "malformed"),
        ('[{"name": "add", "arguments": {"a": -Infinity}}]', "malformed"),
        ('[{"name": "add", "arguments": {"a": 1e999}}]', "malformed"),
        ('[{"name": "add", "arguments": {"a": ' + "1" * 5_000 + "}}]", "malformed"),
        ('[{"name": "add", "arguments": {"a": ' + "1" * 101 + "}}]", "malformed"),
        ('[{"name": "add", "arguments": {"a": ' + "1" * 100 + "}}]", "wrong_arguments"),
        ('[{"name": "add", "arguments": {"a": ' + "[" * 200 + "]" * 200 + "}}]", "wrong_arguments"),
        ('[{"name": "add", "arguments": {"a": ' + "[" * 9_000 + "]" * 9_000 + "}}]", "malformed"),
        (" " * 20_001 + ONE, "malformed"),
        (f"<tool_call>{ONE[1:-1]}</tool_call>" + " " * 20_000, "malformed"),
        (" " * 20_001, "malformed"),
        ("<think>" + "hm [{ " * 9_000 + f"</think>{ONE}", "correct"),
    ],
)
def test_the_reason_for_a_text(text, reason):
    assert task.verify(problem_with(call("add", a=1)), text).reason == reason


@pytest.mark.parametrize(
    "text",
    [sign * 19_999 for sign in "[{\"<'"] + ["[1," * 6_000, '["a",[' * 3_000, "<tool_call>" * 1_800,
     "</tool_call>" * 900 + "<tool_call>" * 800, '{"a":' * 3_900, "[1]" * 6_000, "{'a'" * 4_000,
     "</think>[" * 2_000, "[ " * 9_999, "[" + " " * 19_998, '{"' * 9_999,
     "<tool_call>[1]</tool_call>" * 760]
    # the rest is too long to be parsed
    + ["<tool_call>" * 5_000, "<tool_call>" + "[" * 1_000_000 + "</tool_call>", "[" * 10_000_000,
       f"<tool_call>{ONE}</tool_call>" * 100_000],
)  # fmt: skip
def test_hostile_text_is_rejected_quickly(text):
    start = time.perf_counter()
    assert not task.verify(problem_with(call("add", a=1)), text).correct
    assert time.perf_counter() - start < 2  # takes at most 0.1 s on an idle machine


def test_random_text_never_raises_and_is_never_correct():
    rng = random.Random(0)
    pieces = [*'[]{}":,', '"name"', '"arguments"', '"add"', '{"a": 2}', "true", "1e5", "é", "\\",
              "<tool_call>", "</tool_call>", "<think>", "</think>", '{"name": "add", ',
              '[{"name": "add", "arguments": {"a": 2}}]']  # fmt: skip
    reasons = Counter()
    for _ in range(20_000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 25)))
        reasons[task.verify(problem_with(call("add", a=1)), text).reason] += 1
    assert reasons["correct"] == 0 and len(reasons) >= 4


@pytest.mark.parametrize(
    "python_type, schema",
    [
        ("str", {"type": "string"}), ("int, optional", {"type": "integer"}), ("any", {}),
        ("List[float]", {"type": "array"}), ("set", {"type": "array"}), ("", {}),
        ("Dict[str, List[int]], optional", {"type": "object"}), ("Callable[[int], int]", {}),
        ("Optional[str]", {"type": "string"}), ("Optional[List[int]]", {"type": "array"}),
        ("Union[int, List[str]]", {}), ("Tuple[str, int], optional", {"type": "array"}),
    ],
)  # fmt: skip
def test_python_types_become_schemas(python_type, schema):
    tool = {"name": "f", "parameters": {"x": {"type": python_type, "description": "X."}}}
    parameters = tasks.function_schema(tool)["function"]["parameters"]
    assert parameters["properties"] == {"x": {**schema, "description": "X."}}
    assert parameters["required"] == ([] if "ptional" in python_type else ["x"])


def test_a_tool_becomes_a_schema():
    """A parameter may have the name "type". Optional parameters and those with a default value are
    not required."""
    parameters = {
        "type": {"type": "str", "description": "Kind."},
        "n": {"type": "int, optional", "description": ""},
        "m": {"type": "int", "description": "", "default": 3},
    }
    tool = {"name": "f", "description": "Does.", "parameters": parameters}
    function = tasks.function_schema(tool)["function"]
    assert function["name"] == "f" and function["description"] == "Does."
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "type": {"type": "string", "description": "Kind."},
            "n": {"type": "integer", "description": ""},
            "m": {"type": "integer", "description": "", "default": 3},
        },
        "required": ["type"],
    }


# -- Data files ------------------------------------------------------------------------------------


def make_records(count):
    return [
        {"id": 7, "query": f"add {i}", "answers": json.dumps([call("add", a=i)]),
         "tools": json.dumps(TOOLS)} for i in range(count)
    ]  # fmt: skip


def write_records(folder, records, file_format):
    """Write a data file "d" and return its path. The formats "lines", "pretty" and "dense" are JSON
    lists with different whitespace."""
    if file_format == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        file = folder / "d.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(records), file)
    elif file_format == "jsonl":
        file = folder / "d.jsonl"
        file.write_text("\n".join(map(json.dumps, records)) + "\n")
    else:
        file = folder / "d.json"
        indent = {"lines": 0, "pretty": 2, "dense": None}[file_format]
        file.write_text(json.dumps(records, indent=indent))
    return str(file)


FILE_SPLITS = {"train": ("cold", "train"), "dev": ("dev",), "test": ("test",)}


@pytest.mark.parametrize("file_format", ["jsonl", "lines", "pretty", "dense", "parquet"])
def test_files_of_all_formats_are_read_and_split(tmp_path, file_format):
    path = write_records(tmp_path, make_records(50), file_format)
    all_problems = task.load(path, split="all")
    assert sorted(problem.id for problem in all_problems) == list(range(50))
    assert all(problem.query == f"add {problem.id}" for problem in all_problems)
    problems = {split: task.load(path, split=split) for split in FILE_SPLITS}
    ids = [problem.id for split in problems for problem in problems[split]]
    assert sorted(ids) == list(range(50))
    for split in problems:
        assert len(problems[split]) >= 4
        assert all(tasks.split_of(p.query) in FILE_SPLITS[split] for p in problems[split])
    other_order = APIGen().load(path, split="train", seed=9)
    assert other_order != problems["train"]
    assert set(other_order) == set(problems["train"])  # the split does not depend on the seed
    assert task.load(path, split="all", limit=3) == all_problems[:3]
    assert task.load(path, split="dev", limit=3) == problems["dev"][:3]
    for split in ("cold", "nowhere"):
        choose = "choose one of train, dev, test, all"
        with pytest.raises(ValueError, match=f"no split '{split}': {choose}"):
            task.load(path, split=split)


def test_the_data_files_of_a_folder_are_read_in_order(tmp_path):
    records = make_records(9)
    (tmp_path / "b").mkdir()
    write_records(tmp_path / "b", records[3:5], "parquet")
    write_records(tmp_path / "b", records[5:], "jsonl")
    (tmp_path / "a.json").write_text(json.dumps(records[:3]))
    (tmp_path / "README.md").write_text("no data")
    problems = task.load(str(tmp_path), split="all", limit=9)
    queries = [problem.query for problem in sorted(problems, key=lambda problem: problem.id)]
    assert queries == [f"add {i}" for i in (0, 1, 2, 5, 6, 7, 8, 3, 4)]
    assert sorted(problem.id for problem in problems) == list(range(9))
    write_records(tmp_path / "b", [*records[:2], {**records[2], "tools": "[1]"}], "parquet")
    with pytest.raises(ValueError, match="b/d.parquet, record 3: "):
        task.load(str(tmp_path))


def test_the_splits_of_a_file_have_their_shares_and_never_change(tmp_path):
    """Results are reproduced from a file, so the same problems must always be in a split."""
    path = tmp_path / "d.jsonl"
    path.write_text("".join(f'{{"nums": [1, 2, {i}], "target": 3}}\n' for i in range(10_000)))
    problems = {split: Countdown().load(str(path), split=split) for split in FILE_SPLITS}
    for split, share in (("train", 0.71), ("dev", 0.13), ("test", 0.16)):
        assert abs(len(problems[split]) / 10_000 - share) < 0.015
    assert sum(map(len, problems.values())) == 10_000 == len(set().union(*problems.values()))
    first_ids = {split: sorted(p.id for p in problems[split])[:8] for split in problems}
    assert first_ids["dev"] == [4, 16, 33, 48, 58, 63, 67, 70]
    assert first_ids["test"] == [5, 6, 11, 14, 24, 31, 42, 43]


def test_problems_with_equal_queries_are_in_the_same_split(tmp_path):
    """Even if their tools differ. No problem is lost."""
    records = make_records(28)
    with_other_tools = [{**record, "tools": json.dumps(TOOLS[:1])} for record in records]
    path = write_records(tmp_path, records + with_other_tools * 2, "jsonl")
    ids = [{problem.id for problem in task.load(path, split=split)} for split in FILE_SPLITS]
    assert all(ids) and sorted(set.union(*ids)) == list(range(84))
    assert sum(map(len, ids)) == 84
    queries = [{i % 28 for i in ids_of_split} for ids_of_split in ids]
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(queries, 2))


DAMAGE = {
    "cut in half": lambda line: line[: len(line) // 2],
    "a key is missing": lambda line: line.replace('"tools"', '"stools"'),
    "answers are not JSON": lambda line: line.replace('"[{\\"name', '"[{\\"na\\"me'),
    "answers are not calls": lambda line: line.replace("arguments", "argument"),
    "answers are a list": lambda line: json.dumps({**json.loads(line), "answers": [1]}),
    "a tool without a name": lambda line: line.replace('\\"name\\": \\"find\\", ', ""),
    "a type is a number": lambda line: line.replace('\\"float\\"', "5"),
    "a query is a list": lambda line: json.dumps({**json.loads(line), "query": ["add"]}),
    "a query is a number": lambda line: json.dumps({**json.loads(line), "query": 5}),
    "a query is not valid Unicode": lambda line: line.replace("add 6", "\\ud800"),
    "a tool is not valid Unicode": lambda line: line.replace("Add.", "\\\\ud800"),
    "a record is not an object": lambda line: "17",
    "an empty line": lambda line: "",
    "a key occurs twice": lambda line: line.replace('"tools"', '"query"'),
    "a number is not finite": lambda line: line.replace("7,", "NaN,"),
    "not UTF-8": lambda line: line.replace("add", "\udcff"),
    "nested too deeply": lambda line: '{"a":' + "[" * 9_000,
}
NOT_JSON = (
    "cut in half", "nested too deeply", "an empty line", "a key occurs twice",
    "a number is not finite",
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file_format", ["jsonl", "list"])
def test_the_error_for_a_bad_record_names_file_and_record(tmp_path, damage, file_format):
    lines = [json.dumps(record) for record in make_records(20)]
    assert DAMAGE[damage](lines[6]) != lines[6]
    lines[6] = DAMAGE[damage](lines[6])
    text = "\n".join(lines) + "\n"
    if file_format == "list":
        text = "[\n" + ",\n".join(lines) + "\n]"
    path = tmp_path / "d.json"
    path.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    # Some damage makes the file as a whole unreadable, so that no record can be named.
    whole_file = damage == "not UTF-8" or (file_format == "list" and damage in NOT_JSON)
    with pytest.raises(ValueError) as error:
        APIGen().load(str(path))
    message = str(error.value)
    assert re.match(rf"{path}: \S+" if whole_file else rf"{path}, record 7: \w+", message)
    assert "\n" not in message and len(message) < 300


def test_a_list_that_ends_between_two_records_is_refused(tmp_path):
    path = tmp_path / "d.json"
    path.write_text("[\n" + ",\n".join(map(json.dumps, make_records(5))) + ",\n")
    with pytest.raises(ValueError, match="d.json: .* line 6 column "):
        APIGen().load(str(path))
    with pytest.raises((OSError, ValueError)):
        APIGen().load(str(tmp_path / "nowhere.json"))
    for content, message in (
        ("", "d.json, record 1: "),
        ("\n \n", "record 1: "),
        ("[]", "no problems"),
    ):
        (tmp_path / "d.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            APIGen().load(str(path))


@pytest.mark.parametrize("other_fields", [{}, {"id": 7}, {"id": 7, "nums": [30, 100, 93]}])
@pytest.mark.parametrize("name", ["nums", "numbers"])
def test_countdown_reads_both_forms_of_records(tmp_path, name, other_fields):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({name: [30, 100, 93], "target": 23, **other_fields}))
    [problem] = Countdown().load(str(path), split="all")
    assert (problem.id, problem.numbers, problem.target) == (0, (30, 100, 93), 23)
    assert Countdown().verify(problem, "<answer>30 - (100 - 93)</answer>").correct
    for bad_record in (
        {name: [], "target": 1}, {name: [1], "target": "x"}, {name: [1]}, {name: 5, "target": 5},
        {name: [1] * 11, "target": 1}, {name: [3, -1], "target": 2}, {name: ["a"], "target": 2},
        {name: [[1]], "target": 1}, {name: None, "target": 1}, {"target": 1}, {},
        {"input": "30,100,93", "output": "23"},
    ):  # fmt: skip
        path.write_text(json.dumps(bad_record))
        with pytest.raises(ValueError, match="d.jsonl, record 1: "):
            Countdown().load(str(path), split="all")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real records are not here")
def test_real_countdown_records(tmp_path):
    """Their form, {"input": "30,100,93", "output": "23"}, is converted to TinyZero's first."""
    lines = (SHARED / "countdown_cd3_test.jsonl").read_text().splitlines()
    originals = [json.loads(line) for line in lines]
    records = [{"nums": r["input"].split(","), "target": r["output"]} for r in originals]
    path = write_records(tmp_path, records, "jsonl")
    all_problems = Countdown().load(path, split="all")
    assert len(all_problems) == 256
    assert all(len(problem.numbers) == 3 for problem in all_problems)
    split_of_numbers = {}
    for split in FILE_SPLITS:
        for problem in Countdown().load(path, split=split):
            numbers = tuple(sorted(problem.numbers))
            assert split_of_numbers.setdefault(numbers, split) == split
    assert {*split_of_numbers.values()} == {*FILE_SPLITS}


def test_without_a_file_the_error_says_to_pass_one():
    for task_class in (APIGen, Countdown):
        for split in tasks.SPLITS:
            message = f"the task {task_class.name} needs a file of problems: pass it with --data"
            with pytest.raises(ValueError, match=message) as error:
                task_class().load(split=split)
            assert "\n" not in str(error.value)
    assert APIGen.hub_id == "Salesforce/xlam-function-calling-60k"
    assert Countdown.hub_id == "Jiayi-Pan/Countdown-Tasks-3to4"
    assert tasks.TinyCountdown.hub_id is None
