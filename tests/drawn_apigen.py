"""APIGen with randomly drawn problems, so that function calling can be tried without any dataset.

python tests/drawn_apigen.py calls.jsonl
python r3.py eval --model … --task apigen --data calls.jsonl
"""

import json
import random
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tasks import SPLITS, APIGen, APIGenProblem, split_of

# TOOLS maps the name of a tool to a request whose slots, such as {city}, are the tool's parameters.
# SLOTS maps the name of a slot to its type and its possible values.
TOOLS = {
    "get_weather": "What is the weather in {city}?", "get_time": "What time is it in {city}?",
    "get_forecast": "How will the weather in {city} be on {date}?",
    "find_flights": "Find flights to {city} on {date}.",
    "book_hotel": "Book a hotel room in {city} for {person} on {date}.",
    "get_population": "How many people live in {country}?",
    "get_capital": "What is the capital of {country}?",
    "get_holidays": "List the public holidays of {country}.",
    "convert_money": "Convert {amount} US dollars to {currency}.",
    "get_rate": "What is the exchange rate of {currency}?",
    "send_money": "Send {amount} dollars to {person}.", "call_person": "Call {person}.",
    "get_stock_price": "What is the stock price of {company}?",
    "buy_stock": "Buy {number} shares of {company}.", "define_word": "What does '{word}' mean?",
    "translate_word": "Translate '{word}' into {language}.",
    "find_rhymes": "Find words that rhyme with '{word}'.",
    "search_news": "Search the news about {topic}.",
    "find_books": "Find books about {topic} in {language}.",
    "set_timer": "Set a timer for {minutes} minutes (alarm: {loud}).",
    "add_event": "Put a meeting with {person} on {date}.",
    "factorize": "What are the prime factors of {number}?",
    "is_prime": "Is {number} a prime number?", "sort_numbers": "Sort the numbers {numbers}.",
    "average": "What is the average of {numbers}?",
    "to_fahrenheit": "How much is {degrees} degrees in Fahrenheit?",
}  # fmt: skip
SLOTS = {
    "city": ("str", ["Paris", "Lagos", "Osaka", "Lima", "Oslo", "Delhi"]),
    "country": ("str", ["Kenya", "Peru", "Japan", "Norway", "Chad"]),
    "person": ("str", ["Ada", "Ben", "Chidi", "Dana", "Emeka", "Fay"]),
    "date": ("str", ["2025-03-01", "2025-07-14", "2026-11-30"]),
    "currency": ("str", ["EUR", "USD", "JPY", "NGN", "PEN"]),
    "language": ("str", ["French", "Yoruba", "Hindi", "Spanish"]),
    "topic": ("str", ["volcanoes", "jazz", "tax law", "bees", "chess"]),
    "word": ("str", ["river", "candle", "orbit", "market", "willow"]),
    "company": ("str", ["ACME", "GLOBO", "INITECH", "HOOLI"]),
    "amount": ("float", [12.5, 80, 199.99, 1000, 42.25]), "loud": ("bool", [True, False]),
    "number": ("int", [7, 12, 36, 97, 360, 1024]), "minutes": ("int", [5, 15, 20, 45, 90]),
    "degrees": ("float", [-4, 18.5, 36.6, 72, 100]),
    "numbers": ("List[int]", [[3, 1, 2], [10, 20, 30], [8, 6, 7, 5]]),
}  # fmt: skip


def slots_of(tool_name: str) -> list[str]:
    """The names of a tool's parameters."""
    return re.findall("{(.+?)}", TOOLS[tool_name])


class DrawnAPIGen(APIGen):
    """One to three requests for the tools above. The model is offered other tools as well."""

    def draw_problems(
        self, split: str, limit: int | None, rng: random.Random
    ) -> list[APIGenProblem]:
        """Draw `limit` different problems of a split, or 1,000 if it is None."""
        problems: dict[str, APIGenProblem] = {}
        while len(problems) < (limit or 1_000):
            problem = self.draw_problem(rng)
            if split_of(self.problem_key(problem)) == split:
                problems.setdefault(repr(problem), problem)
        return [replace(problem, id=i) for i, problem in enumerate(problems.values())]

    def draw_problem(self, rng: random.Random) -> APIGenProblem:
        """Draw one problem, of any split."""
        needed_tools = rng.choices(list(TOOLS), k=rng.choice((1, 1, 2, 3)))
        requests, calls = [], []
        for name in needed_tools:
            arguments = {slot: rng.choice(SLOTS[slot][1]) for slot in slots_of(name)}
            requests.append(TOOLS[name].format(**arguments))
            calls.append({"name": name, "arguments": arguments})
        other_tools = [name for name in TOOLS if name not in needed_tools]
        offered_tools = list(dict.fromkeys(needed_tools))
        offered_tools += rng.sample(other_tools, rng.randint(1, 4))
        tools = []
        for name in rng.sample(offered_tools, len(offered_tools)):
            parameters = {
                slot: {"type": SLOTS[slot][0], "description": f"The {slot}."}
                for slot in slots_of(name)
            }
            description = f"Answers requests like: {TOOLS[name]}"
            tools.append({"name": name, "description": description, "parameters": parameters})
        return APIGenProblem(0, " ".join(requests), json.dumps(calls), json.dumps(tools))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/drawn_apigen.py FILE.jsonl")
    drawn = [p for split in SPLITS for p in DrawnAPIGen().load(split=split)]
    Path(sys.argv[1]).write_text("".join(json.dumps(asdict(p)) + "\n" for p in drawn))
    print(f"Wrote {len(drawn):,} problems to {sys.argv[1]}")
