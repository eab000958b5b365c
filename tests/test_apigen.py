"""APIGen: what the verifier takes, how it is attacked, and where problems come from."""

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


def request(*calls):
    return APIGenProblem(0, "?", json.dumps(list(calls)), json.dumps(TOOLS))


def call(name, **arguments):
    return {"name": name, "arguments": arguments}


def ways(calls):
    """The labelled calls as the families of models write them."""
    llama = [{"name": c["name"], "parameters": c["arguments"]} for c in calls]
    yield "\n".join(f"<tool_call>\n{json.dumps(c)}\n</tool_call>" for c in calls)
    yield f"<think>maybe [{{}}] or\n{json.dumps(calls[:1])}</think>\n\n{json.dumps(calls)}"
    yield json.dumps(calls[::-1])  # their order does not matter
    yield f"Sure [1], here {{it}} is:\n```json\n{json.dumps(llama, indent=2)}\n```\nDone."
    if len(calls) == 1:
        yield json.dumps(llama[0])
        yield f"<|python_tag|>{json.dumps(llama[0], ensure_ascii=False)}"
        yield json.dumps({"type": "function", **calls[0]})


def spoilt(value):
    """Another value, of another kind where one exists that a lax comparison takes for the same."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | float):
        return str(value)
    return [value]


def check_both_ways(problem):
    calls = json.loads(problem.answers)
    for text in ways(calls):
        assert task.verify(problem, text).correct, text
    for number, one in enumerate(calls):
        for name, value in one["arguments"].items():
            changed = json.loads(problem.answers)
            changed[number]["arguments"][name] = spoilt(value)
            for text in ways(changed):
                assert task.verify(problem, text).reason == "wrong_arguments", text
        changed = json.loads(problem.answers)
        changed[number]["name"] += "_"
        assert task.verify(problem, json.dumps(changed)).reason == "wrong_tool"
        changed = json.loads(problem.answers)
        changed[number]["arguments"]["besides"] = 1
        assert task.verify(problem, json.dumps(changed)).reason == "wrong_arguments"
        fewer = calls[:number] + calls[number + 1 :]
        assert task.verify(problem, json.dumps(fewer)).reason == "wrong_count"
    assert task.verify(problem, json.dumps(calls + calls[:1])).reason == "wrong_count"


def test_drawn_problems_can_be_answered_in_every_familys_way():
    task = DrawnAPIGen()
    problems = task.load(split="train", limit=60)
    assert {len(json.loads(p.answers)) for p in problems} == {1, 2, 3}
    for problem in problems:
        check_both_ways(problem)
        offered = [tool["name"] for tool in json.loads(problem.tools)]
        asked = {c["name"] for c in json.loads(problem.answers)}
        assert asked < set(offered) and len(set(offered)) == len(offered)  # distractors, no doubles
        messages, tools = task.messages(problem)
        assert messages == [{"role": "user", "content": problem.query}]
        assert [tool["function"]["name"] for tool in tools] == offered
        said = tools_in_words(messages, tools)[0]["content"]
        assert said.endswith(problem.query) and all(name in said for name in offered)
    again = task.load(split="train", limit=60)
    assert again == problems != task.load(split="train", limit=60, seed=1)
    queries = {split: {p.query for p in task.load(split=split)} for split in tasks.SPLITS}
    assert sum(map(len, queries.values())) == len(set.union(*queries.values()))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real records are not here")
def test_every_real_record_loads_and_its_labels_verify():
    problems = task.load(str(SHARED / "apigen_bfcl.json"), split="all")
    assert len(problems) == 1000
    for problem in problems:
        check_both_ways(problem)
    for problem in problems[:50]:
        assert task.problem(asdict(problem)) == problem


@pytest.mark.parametrize(
    "label, said, right",
    [
        (5, "5.0", True), (5.0, "5", True), (1e20, "100000000000000000000", True),
        (5, '"5"', False), (1, "true", False), (True, "1", False), (0, "false", False),
        (0, "-0.0", True), (None, "null", True), (None, '""', False), (0.1, "0.10", True),
        (2**53 + 1, str(2.0**53), False), ([1, 2], "[1.0, 2]", True), ([1, 2], "[2, 1]", False),
        ({"a": 1, "b": [True]}, '{"b": [true], "a": 1.0}', True), ("é", '"\\u00e9"', True),
        ({"a": 1}, '{"a": 1, "b": null}', False), ("x", '"x "', False), ([], "{}", False),
    ],
)  # fmt: skip
def test_json_equality(label, said, right):
    text = f'[{{"name": "add", "arguments": {{"a": {said}}}}}]'
    assert task.verify(request(call("add", a=label)), text).correct is right


def test_how_often_a_call_is_made_counts():
    one, two = call("add", a=1), call("add", a=2)
    for said, reason in (([one, two, one], "correct"), ([one, two, two], "wrong_arguments")):
        assert task.verify(request(one, one, two), json.dumps(said)).reason == reason


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
def test_what_is_no_answer(text, reason):
    assert task.verify(request(call("add", a=1)), text).reason == reason


@pytest.mark.parametrize(
    "text",
    [sign * 19_999 for sign in "[{\"<'"] + ["[1," * 6_000, '["a",[' * 3_000, "<tool_call>" * 1_800,
     "</tool_call>" * 900 + "<tool_call>" * 800, '{"a":' * 3_900, "[1]" * 6_000, "{'a'" * 4_000,
     "</think>[" * 2_000, "[ " * 9_999, "[" + " " * 19_998, '{"' * 9_999,
     "<tool_call>[1]</tool_call>" * 760]
    # and what is too long to be looked at
    + ["<tool_call>" * 5_000, "<tool_call>" + "[" * 1_000_000 + "</tool_call>", "[" * 10_000_000,
       f"<tool_call>{ONE}</tool_call>" * 100_000],
)  # fmt: skip
def test_hostile_text_is_wrong_and_quick(text):
    begun = time.perf_counter()
    assert not task.verify(request(call("add", a=1)), text).correct
    assert time.perf_counter() - begun < 2  # a tenth of a second on an idle machine


def test_random_text_never_raises_and_never_wins():
    rng = random.Random(0)
    pieces = [*'[]{}":,', '"name"', '"arguments"', '"add"', '{"a": 2}', "true", "1e5", "é", "\\",
              "<tool_call>", "</tool_call>", "<think>", "</think>", '{"name": "add", ',
              '[{"name": "add", "arguments": {"a": 2}}]']  # fmt: skip
    seen = Counter()
    for _ in range(20_000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 25)))
        seen[task.verify(request(call("add", a=1)), text).reason] += 1
    assert seen["correct"] == 0 and len(seen) >= 4


@pytest.mark.parametrize(
    "kind, schema",
    [
        ("str", {"type": "string"}), ("int, optional", {"type": "integer"}), ("any", {}),
        ("List[float]", {"type": "array"}), ("set", {"type": "array"}), ("", {}),
        ("Dict[str, List[int]], optional", {"type": "object"}), ("Callable[[int], int]", {}),
        ("Optional[str]", {"type": "string"}), ("Optional[List[int]]", {"type": "array"}),
        ("Union[int, List[str]]", {}), ("Tuple[str, int], optional", {"type": "array"}),
    ],
)  # fmt: skip
def test_types_become_schemas(kind, schema):
    tool = {"name": "f", "parameters": {"x": {"type": kind, "description": "X."}}}
    parameters = tasks.function_schema(tool)["function"]["parameters"]
    assert parameters["properties"] == {"x": {**schema, "description": "X."}}
    assert parameters["required"] == ([] if "ptional" in kind else ["x"])


def test_a_tool_as_a_schema():
    """A parameter may be called "type"; optional ones and those with a default are not required."""
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


def records(n):
    return [
        {"id": 7, "query": f"add {i}", "answers": json.dumps([call("add", a=i)]),
         "tools": json.dumps(TOOLS)} for i in range(n)
    ]  # fmt: skip


def written(path, some, kind):
    if kind == "jsonl":
        text = "\n".join(map(json.dumps, some)) + "\n"
    elif kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist(some), path / "d.parquet")
        return str(path / "d.parquet")
    else:
        text = json.dumps(some, indent={"lines": 0, "pretty": 2, "dense": None}[kind])
    file = path / ("d.jsonl" if kind == "jsonl" else "d.json")
    file.write_text(text)
    return str(file)


FILE_SPLITS = {"train": ("cold", "train"), "dev": ("dev",), "test": ("test",)}


@pytest.mark.parametrize("kind", ["jsonl", "lines", "pretty", "dense", "parquet"])
def test_files_of_all_kinds_are_read_and_split(tmp_path, kind):
    path = written(tmp_path, records(50), kind)
    whole = task.load(path, split="all")
    assert sorted(p.id for p in whole) == list(range(50))
    assert all(p.query == f"add {p.id}" for p in whole)
    parts = {split: task.load(path, split=split) for split in FILE_SPLITS}
    assert sorted(p.id for part in parts.values() for p in part) == list(range(50))
    assert all(tasks.split_of(p.query) in FILE_SPLITS[s] for s in parts for p in parts[s])
    assert min(map(len, parts.values())) >= 4
    again = APIGen().load(path, split="train", seed=9)
    assert again != parts["train"] and set(again) == set(parts["train"])  # the split is fixed
    assert task.load(path, split="all", limit=3) == whole[:3]
    assert task.load(path, split="dev", limit=3) == parts["dev"][:3]
    for split in ("cold", "nowhere"):
        choose = "choose one of train, dev, test, all"
        with pytest.raises(ValueError, match=f"no split '{split}': {choose}"):
            task.load(path, split=split)


def test_a_folder_is_its_data_files_in_order(tmp_path):
    some = records(9)
    (tmp_path / "b").mkdir()
    written(tmp_path / "b", some[3:5], "parquet")
    written(tmp_path / "b", some[5:], "jsonl")
    (tmp_path / "a.json").write_text(json.dumps(some[:3]))
    (tmp_path / "README.md").write_text("no data")
    whole = task.load(str(tmp_path), split="all", limit=9)
    assert {p.id: p.query for p in whole} == {
        i: f"add {n}" for i, n in enumerate([0, 1, 2, 5, 6, 7, 8, 3, 4])
    }
    written(tmp_path / "b", [*some[:2], {**some[2], "tools": "[1]"}], "parquet")
    with pytest.raises(ValueError, match="b/d.parquet, record 3: "):
        task.load(str(tmp_path))


def test_a_files_splits_have_their_shares_and_stay(tmp_path):
    """Results are reproduced from a file, so what belongs to a split may not change."""
    path = tmp_path / "d.jsonl"
    path.write_text("".join(f'{{"nums": [1, 2, {i}], "target": 3}}\n' for i in range(10_000)))
    parts = {split: Countdown().load(str(path), split=split) for split in FILE_SPLITS}
    for split, share in (("train", 0.71), ("dev", 0.13), ("test", 0.16)):
        assert abs(len(parts[split]) / 10_000 - share) < 0.015
    assert sum(map(len, parts.values())) == 10_000 == len(set().union(*parts.values()))
    assert sorted(p.id for p in parts["dev"])[:8] == [4, 16, 33, 48, 58, 63, 67, 70]
    assert sorted(p.id for p in parts["test"])[:8] == [5, 6, 11, 14, 24, 31, 42, 43]


def test_problems_that_are_alike_stay_on_one_side(tmp_path):
    """Whatever else differs, a query is in one split; and no problem is lost."""
    others = [{**record, "tools": json.dumps(TOOLS[:1])} for record in records(28)]
    path = written(tmp_path, records(28) + others * 2, "jsonl")
    parts = [{p.id for p in task.load(path, split=split)} for split in FILE_SPLITS]
    assert all(parts) and sorted(set.union(*parts)) == list(range(84))
    assert sum(map(len, parts)) == 84 and all(
        {i % 28 for i in one}.isdisjoint({i % 28 for i in other})
        for one, other in itertools.combinations(parts, 2)
    )


DAMAGE = {
    "cut in half": lambda line: line[: len(line) // 2],
    "a key is missing": lambda line: line.replace('"tools"', '"stools"'),
    "answers are no JSON": lambda line: line.replace('"[{\\"name', '"[{\\"na\\"me'),
    "answers are no calls": lambda line: line.replace("arguments", "argument"),
    "answers are a list": lambda line: json.dumps({**json.loads(line), "answers": [1]}),
    "a tool without a name": lambda line: line.replace('\\"name\\": \\"find\\", ', ""),
    "a type is a number": lambda line: line.replace('\\"float\\"', "5"),
    "a query is a list": lambda line: json.dumps({**json.loads(line), "query": ["add"]}),
    "a query is a number": lambda line: json.dumps({**json.loads(line), "query": 5}),
    "no Unicode in a query": lambda line: line.replace("add 6", "\\ud800"),
    "no Unicode in a tool": lambda line: line.replace("Add.", "\\\\ud800"),
    "no object": lambda line: "17",
    "an empty line": lambda line: "",
    "a key is given twice": lambda line: line.replace('"tools"', '"query"'),
    "no finite number": lambda line: line.replace("7,", "NaN,"),
    "no UTF-8": lambda line: line.replace("add", "\udcff"),
    "too deep": lambda line: '{"a":' + "[" * 9_000,
}
NO_JSON = ("cut in half", "too deep", "an empty line", "a key is given twice", "no finite number")


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("kind", ["jsonl", "list"])
def test_a_bad_record_is_named_by_file_and_place(tmp_path, damage, kind):
    lines = [json.dumps(record) for record in records(20)]
    assert damage(lines[6]) != lines[6]
    lines[6] = damage(lines[6])
    ends = (",\n", "[\n", "\n]") if kind == "list" else ("\n", "", "\n")
    path = tmp_path / "d.json"
    text = ends[1] + ends[0].join(lines) + ends[2]
    path.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    whole = damage is DAMAGE["no UTF-8"]  # it is of the file as a whole
    whole |= kind == "list" and damage in [DAMAGE[name] for name in NO_JSON]
    with pytest.raises(ValueError) as e:
        APIGen().load(str(path))
    assert re.match(rf"{path}: \S+" if whole else rf"{path}, record 7: \w+", str(e.value))
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_a_list_that_was_cut_between_two_records_is_noticed(tmp_path):
    path = tmp_path / "d.json"
    path.write_text("[\n" + ",\n".join(map(json.dumps, records(5))) + ",\n")
    with pytest.raises(ValueError, match="d.json: .* line 6 column "):
        APIGen().load(str(path))
    with pytest.raises((OSError, ValueError)):
        APIGen().load(str(tmp_path / "nowhere.json"))
    for content, said in (
        ("", "d.json, record 1: "),
        ("\n \n", "record 1: "),
        ("[]", "no problems"),
    ):
        (tmp_path / "d.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            APIGen().load(str(path))


@pytest.mark.parametrize("more", [{}, {"id": 7}, {"id": 7, "nums": [30, 100, 93]}])
@pytest.mark.parametrize("name", ["nums", "numbers"])
def test_countdown_reads_two_forms(tmp_path, name, more):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({name: [30, 100, 93], "target": 23, **more}))
    [problem] = Countdown().load(str(path), split="all")
    assert (problem.id, problem.numbers, problem.target) == (0, (30, 100, 93), 23)
    assert Countdown().verify(problem, "<answer>30 - (100 - 93)</answer>").correct
    for wrong in (
        {name: [], "target": 1}, {name: [1], "target": "x"}, {name: [1]}, {name: 5, "target": 5},
        {name: [1] * 11, "target": 1}, {name: [3, -1], "target": 2}, {name: ["a"], "target": 2},
        {name: [[1]], "target": 1}, {name: None, "target": 1}, {"target": 1}, {},
        {"input": "30,100,93", "output": "23"},
    ):  # fmt: skip
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="d.jsonl, record 1: "):
            Countdown().load(str(path), split="all")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real records are not here")
def test_real_countdown_records(tmp_path):
    """Their form is turned into the dataset's: {"input": "30,100,93", "output": "23"}."""
    lines = (SHARED / "countdown_cd3_test.jsonl").read_text().splitlines()
    given = [json.loads(line) for line in lines]
    some = [{"nums": r["input"].split(","), "target": r["output"]} for r in given]
    path = written(tmp_path, some, "jsonl")
    whole = Countdown().load(path, split="all")
    assert len(whole) == 256 and all(len(p.numbers) == 3 for p in whole)
    keys = {}
    for split in FILE_SPLITS:
        for p in Countdown().load(path, split=split):
            assert keys.setdefault(tuple(sorted(p.numbers)), split) == split
    assert {*keys.values()} == {*FILE_SPLITS}


def test_without_a_file_it_says_to_give_one():
    for kind in (APIGen, Countdown):
        for split in tasks.SPLITS:
            said = f"the task {kind.name} draws no problems: give --data a file of them"
            with pytest.raises(ValueError, match=said) as error:
                kind().load(split=split)
            assert "\n" not in str(error.value)
    assert APIGen.hub_id == "Salesforce/xlam-function-calling-60k"
    assert Countdown.hub_id == "Jiayi-Pan/Countdown-Tasks-3to4"
    assert tasks.TinyCountdown.hub_id is None
