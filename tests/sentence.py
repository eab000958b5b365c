"""A task of your own: write a sentence with one word and without another."""

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
WORDS = {  # no word of a test problem occurs in training
    "train": """apple bell book brother bridge cake camera candle cat clock coffee cow dance doctor
        dream eagle egg flower friend garden glass goat guitar hat honey horse bread ice key lamp
        lemon letter mirror money mother music paper picture rain river window winter""",
    "dev": "arrow bird box chair door dog feather gold knife moon nurse orange piano ring",
    "test": """autumn ball basket bicycle blanket boat bottle cheese cloud coat cup daughter dollar
        fire fox hammer ladder map mouse pencil pillow queen rope salt shadow snow soap umbrella""",
}


@dataclass(frozen=True)
class Life:
    id: int
    place: str
    use: str
    avoid: str


class Sentence(Task):
    """Write a sentence about life in a place, with one word and without another."""

    Problem = Life
    question = "Write one short sentence about life {}. Use the word {}, but not the word {}."
    answer = "I put on one boot before a long walk uphill."  # to the example
    reflection_instruction = "That is wrong. Which word must you use?"
    retry_instruction = "Now write one sentence with it."

    def draw_problems(self, split, limit, rng):
        words = itertools.permutations(WORDS[split].split(), 2)
        lives = list(itertools.product(re.split(r",\s+", PLACES), words))
        chosen = rng.sample(lives, min(limit or 1_000, len(lives)))
        return [Life(i, place, *words) for i, (place, words) in enumerate(chosen)]

    def messages(self, problem):
        """An example with its answer, then the question."""
        example = self.question.format("in the mountains", "boot", "stone")
        asked = self.question.format(problem.place, problem.use, problem.avoid)
        said = ("user", example), ("assistant", self.answer), ("user", asked)
        return [{"role": role, "content": text} for role, text in said], None

    def faults(self, problem, text):
        """Each fault that a verdict can name, and whether it is there."""
        words = re.findall("[a-z]+", text.lower())
        return {
            "not_one_sentence": not re.fullmatch('[A-Za-z ,;:\'"-]*[.!?]?"?', text.strip()),
            "wrong_length": len(words) > 25 or len(set(words)) < 5,  # 5 different ones
            "about_the_task": not {"word", "words", "sentence"}.isdisjoint(words),
            "missing_word": problem.use not in words,
            "forbidden_word": problem.avoid in words,
        }

    def verify(self, problem, completion):
        faults = self.faults(problem, completion)
        reason = next((fault for fault, found in faults.items() if found), "correct")
        return Verdict(reason == "correct", reason)


TASKS["sentence"] = Sentence

if __name__ == "__main__":
    r3.main()
