"""Problems that can be told in two wordings, and the options of a branch that may be merged."""

from __future__ import annotations

import random
from typing import Any

NAMES = ("Anna", "Boris", "Clara", "Dmitri", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas")
THINGS = ("cows", "hens", "books", "lamps", "coins", "boats", "roses", "chairs")
SPELLED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def problem(seed: int, *, changed: bool = False, sentences: int = 6) -> str:
    """A word problem in digits; ``changed`` has another number in the middle."""
    source = random.Random(seed)
    told = []
    for index in range(sentences):
        name, thing, count = source.choice(NAMES), source.choice(THINGS), source.randint(2, 11)
        count += changed and index == sentences // 2
        told.append(f"{name} has {count} {thing} and sells {source.randint(2, 11)} of the {thing}.")
    return " ".join([*told, f"How many {source.choice(THINGS)} does {source.choice(NAMES)} have now?"])


def reworded(text: str, start: str = "Think step by step. ") -> str:
    """The same problem with its numbers in words and under an instruction."""
    words = [SPELLED[int(word)] if word.isdigit() else word for word in text.split()]
    return start + " ".join(words)


def branch(group: str | None, index: int = 0, **options: Any) -> dict[str, Any]:
    named = {} if group is None else {"group": group, "branch": index, "branches": 64}
    return {**named, "share": "merge", "tau": -1.0, **options}
