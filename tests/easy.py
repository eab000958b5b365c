"""The paper's two tasks, made so easy that a model of 135 million parameters is right at times.

python tests/easy.py train --model HuggingFaceTB/SmolLM2-135M-Instruct --task easy-countdown
"""

import itertools
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import r3
from tasks import TASKS, APIGen, Countdown, CountdownProblem, split_of


def chat(*turns: str) -> list[dict]:
    """A chat of turns, the user's first."""
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]


class EasyCountdown(Countdown):
    """Two numbers up to 12 and one sign."""

    hub_id = None
    question = "Make {target} from {numbers[0]} and {numbers[1]}. Use +, - or *."
    answer = "<answer> {} </answer>"
    reflection_instruction = "That is wrong. Which sign must you use?"
    reflection = "I must use the sign {}."
    input_format = "two numbers and then the target, such as 6 10 16"
    typed = re.compile(r"[0-9]{1,3}(\s+[0-9]{1,3}){2}")
    retry_instruction = "Now answer again."

    def draw_problems(self, split, limit, rng):
        parts, problems = {"train": ("cold", "train")}.get(split, (split,)), []
        for a, b in itertools.combinations_with_replacement(range(1, 13), 2):
            if split_of(f"Countdown {[a, b]}") in parts:
                for target in sorted({a + b, b - a, a * b}):
                    problems.append((rng.sample((a, b), 2), target))
        rng.shuffle(problems)
        return [CountdownProblem(i, tuple(n), t) for i, (n, t) in enumerate(problems[:limit])]

    def messages(self, problem):
        """The question, after three examples: right at once, and twice at the second try."""
        said = [self.question.format(numbers=(8, 6), target=14), self.answer.format("8 + 6")]
        for numbers, sign, target in (((17, 5), "-", 12), ((3, 14), "*", 42)):
            wrong, right = (
                self.answer.format(s.join(map(str, numbers))) for s in (" + ", f" {sign} ")
            )
            said += [
                self.question.format(numbers=numbers, target=target),
                wrong,
                self.reflection_instruction,
            ]
            said += [self.reflection.format(sign), self.retry_instruction, right]
        asked = self.question.format(numbers=problem.numbers, target=problem.target)
        return chat(*said, asked), None


class OneTool(APIGen):
    """One function, one call. Problems come from a file in xlam's form."""

    name = "one-tool"
    question = "Function: {}\nRequest: {}\nWrite the call as JSON, with the values of the request."
    reflection_instruction = "That is wrong. Which values are in the request?"
    reflection = "The values are 4 and Friday."
    retry_instruction = "Now write the call again."

    def read(self, path):
        """The problems with one tool and one call."""
        problems = super().read(path)
        return [p for p in problems if len(json.loads(p.answers)) == len(json.loads(p.tools)) == 1]

    def messages(self, problem):
        """The query, after an example of one that was right at the second try."""
        example = {"name": "book_table", "arguments": {"guests": "int", "day": "str"}}
        wrong = {"name": "book_table", "arguments": {"guests": 2, "day": "Sunday"}}
        right = {"name": "book_table", "arguments": {"guests": 4, "day": "Friday"}}
        tool = next(iter(json.loads(problem.tools)), {"name": "", "parameters": {}})
        types = {name: given.get("type", "str") for name, given in tool["parameters"].items()}
        offered = {"name": tool["name"], "arguments": types}
        said = self.question.format(json.dumps(example), "A table for 4 on Friday, please.")
        asked = self.question.format(json.dumps(offered), problem.query)
        tried = (
            json.dumps(wrong),
            self.reflection_instruction,
            self.reflection,
            self.retry_instruction,
            json.dumps(right),
        )
        return chat(said, *tried, asked), None


TASKS |= {"easy-countdown": EasyCountdown, "one-tool": OneTool}

if __name__ == "__main__":
    r3.main()
