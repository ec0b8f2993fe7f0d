"""Facts to be read from a short text: problems that a very small model answers rightly most of the time."""

from __future__ import annotations

import random
from dataclasses import dataclass

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Kate", "Leo", "Mary", "Paul", "Sam")
CITIES = ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Oslo", "Lisbon", "Dublin", "Prague", "Athens")
COLORS = ("red", "blue", "green", "yellow", "black", "white", "brown", "orange", "purple", "pink")
THINGS = ("apples", "pears", "books", "pens", "coins", "stamps", "cards", "marbles", "cups", "shells")

EXAMPLES = 3  # worked ones before each problem


@dataclass(frozen=True)
class Reading:
    """One question on a text.

    Attributes:
        question: text and question.
        answer: a name, a color or a whole number, as it stands in the text.
        examples: worked ones of the same kind on other texts: question and reply.
    """

    question: str
    answer: str
    examples: tuple[tuple[str, str], ...]


def readings(count: int, seed: int) -> list[Reading]:
    """``count`` questions on texts of three sentences about one person, each after examples that ask the same."""
    source = random.Random(seed)
    return [_reading(source) for _ in range(count)]


def _reading(source: random.Random) -> Reading:
    kind = source.randrange(3)  # where, what color, how many
    worked = [_one(source, kind) for _ in range(EXAMPLES)]
    question, answer = _one(source, kind)
    while question in [other for other, _ in worked]:
        question, answer = _one(source, kind)
    return Reading(question, answer, tuple((other, f"The answer is {found}.") for other, found in worked))


def _one(source: random.Random, kind: int) -> tuple[str, str]:
    name, city, color = source.choice(NAMES), source.choice(CITIES), source.choice(COLORS)
    number, things = str(source.randrange(2, 60)), source.choice(THINGS)
    facts = [
        (f"{name} lives in {city}.", f"Where does {name} live?", city),
        (f"The car of {name} is {color}.", f"What color is the car of {name}?", color),
        (f"{name} has {number} {things}.", f"How many {things} does {name} have?", number),
    ]
    _, question, answer = facts[kind]
    source.shuffle(facts)
    return f"{' '.join(sentence for sentence, _, _ in facts)} {question}", answer
