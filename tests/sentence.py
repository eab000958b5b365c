"""A task of your own: write a sentence that contains one word and avoids another."""

import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import r3
from tasks import TASKS, Task, Verdict

PLACES = """at home, in the city, at school, by the sea, on a farm, on a train, in the forest,
    in the desert, on an island, in a castle, at the market, in the kitchen"""
WORDS = {  # no word is in two splits, so that the words of the test problems are new to the model
    "train": """apple bell book brother bridge cake camera candle cat clock coffee cow dance doctor
        dream eagle egg flower friend garden glass goat guitar hat honey horse bread ice key lamp
        lemon letter mirror money mother music paper picture rain river window winter""",
    "dev": "arrow bird box chair door dog feather gold knife moon nurse orange piano ring",
    "test": """autumn ball basket bicycle blanket boat bottle cheese cloud coat cup daughter dollar
        fire fox hammer ladder map mouse pencil pillow queen rope salt shadow snow soap umbrella""",
}


@dataclass(frozen=True)
class SentenceProblem:
    id: int
    place: str
    required_word: str
    forbidden_word: str


class Sentence(Task):
    """Write a sentence about life in a place that contains one word and avoids another."""

    Problem = SentenceProblem
    question = "Write one short sentence about life {}. Use the word {}, but not the word {}."
    example_answer = "I put on one boot before a long walk uphill."
    reflection_instruction = "That is wrong. Which word must you use?"
    retry_instruction = "Now write one sentence with it."

    def draw_problems(self, split, limit, rng):
        word_pairs = itertools.permutations(WORDS[split].split(), 2)
        combinations = list(itertools.product(re.split(r",\s+", PLACES), word_pairs))
        chosen = rng.sample(combinations, min(limit or 1_000, len(combinations)))
        return [SentenceProblem(i, place, *words) for i, (place, words) in enumerate(chosen)]

    def messages(self, problem):
        """A solved example, then the question. There are no tools."""
        example = self.question.format("in the mountains", "boot", "stone")
        words = problem.required_word, problem.forbidden_word
        return [
            {"role": "user", "content": example},
            {"role": "assistant", "content": self.example_answer},
            {"role": "user", "content": self.question.format(problem.place, *words)},
        ], None

    def faults(self, problem, text):
        """All faults that an answer can have, each with True if this text has it."""
        words = re.findall("[a-z]+", text.lower())
        return {
            "not_one_sentence": not re.fullmatch('[A-Za-z ,;:\'"-]*[.!?]?"?', text.strip()),
            "wrong_length": len(words) > 25 or len(set(words)) < 5,  # counts different words
            "about_the_task": not {"word", "words", "sentence"}.isdisjoint(words),
            "missing_word": problem.required_word not in words,
            "forbidden_word": problem.forbidden_word in words,
        }

    def verify(self, problem, completion):
        """The answer is correct if it has no fault. Otherwise its first fault is the reason."""
        faults = [fault for fault, found in self.faults(problem, completion).items() if found]
        return Verdict(correct=not faults, reason=faults[0] if faults else "correct")


TASKS["sentence"] = Sentence

if __name__ == "__main__":
    r3.main()
