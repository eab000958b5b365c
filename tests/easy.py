"""The paper's two tasks, made so easy that a model of 135 million parameters solves some problems.

python tests/easy.py train --model HuggingFaceTB/SmolLM2-135M-Instruct --task easy-countdown
"""

import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import r3
from tasks import MERGED_SPLITS, TASKS, APIGen, Countdown, CountdownProblem, split_of


def chat(*turns: str) -> list[dict]:
    """Chat messages whose roles alternate. The first one is the user's."""
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]


class EasyCountdown(Countdown):
    """Two numbers up to 12 and one operator."""

    question = "Make {target} from {numbers[0]} and {numbers[1]}. Use +, - or *."
    answer_format = "<answer> {} </answer>"
    reflection_instruction = "That is wrong. Which sign must you use?"
    example_reflection = "I must use the sign {}."
    retry_instruction = "Now answer again."
    input_format = "two numbers and then the target, such as 6 10 16"
    input_pattern = re.compile(r"[0-9]{1,3}(\s+[0-9]{1,3}){2}")

    def draw_problems(self, split, limit, rng):
        problems = []
        for a, b in itertools.combinations_with_replacement(range(1, 13), 2):
            for target in sorted({a + b, b - a, a * b}):
                problem = CountdownProblem(0, (a, b), target)
                if split_of(self.problem_key(problem)) in MERGED_SPLITS[split]:
                    problems.append(replace(problem, numbers=tuple(rng.sample((a, b), 2))))
        rng.shuffle(problems)
        return [replace(problem, id=i) for i, problem in enumerate(problems[:limit])]

    def messages(self, problem):
        """Three examples, then the question. The first example is solved at once, the others on
        the second try."""
        turns = [
            self.question.format(numbers=(8, 6), target=14),
            self.answer_format.format("8 + 6"),
        ]
        for numbers, operator, target in (((17, 5), "-", 12), ((3, 14), "*", 42)):
            left, right = numbers
            turns += [
                self.question.format(numbers=numbers, target=target),
                self.answer_format.format(f"{left} + {right}"),  # wrong
                self.reflection_instruction,
                self.example_reflection.format(operator),
                self.retry_instruction,
                self.answer_format.format(f"{left} {operator} {right}"),
            ]
        question = self.question.format(numbers=problem.numbers, target=problem.target)
        return chat(*turns, question), None


class OneTool(APIGen):
    """One function, one call. The problems come from a file in the format of xlam's dataset."""

    shuffle_key = "one-tool"
    question = "Function: {}\nRequest: {}\nWrite the call as JSON, with the values of the request."
    reflection_instruction = "That is wrong. Which values are in the request?"
    example_reflection = "The values are 4 and Friday."
    retry_instruction = "Now write the call again."

    def read(self, path):
        """Read the problems of a file that have exactly one tool and one call."""
        return [
            problem
            for problem in super().read(path)
            if len(json.loads(problem.answers)) == len(json.loads(problem.tools)) == 1
        ]

    def messages(self, problem):
        """An example that is solved on the second try, then the question."""
        example_function = {"name": "book_table", "arguments": {"guests": "int", "day": "str"}}
        wrong_call = {"name": "book_table", "arguments": {"guests": 2, "day": "Sunday"}}
        correct_call = {"name": "book_table", "arguments": {"guests": 4, "day": "Friday"}}
        example = (
            self.question.format(json.dumps(example_function), "A table for 4 on Friday, please."),
            json.dumps(wrong_call),
            self.reflection_instruction,
            self.example_reflection,
            self.retry_instruction,
            json.dumps(correct_call),
        )
        tool = next(iter(json.loads(problem.tools)), {"name": "", "parameters": {}})
        types = {
            name: parameter.get("type", "str") for name, parameter in tool["parameters"].items()
        }
        function = {"name": tool["name"], "arguments": types}
        return chat(*example, self.question.format(json.dumps(function), problem.query)), None


TASKS |= {"easy-countdown": EasyCountdown, "one-tool": OneTool}

if __name__ == "__main__":
    r3.main()
