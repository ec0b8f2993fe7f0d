"""Whether two prompts ask the same thing, so that the KV of one may stand for the other.

Hidden states do not see a changed number (similarity 1.000 in our measurements), so this decides by the words. A false
yes answers the wrong question; a false no costs one prefill. Hence the rule is equality, not likeness: both texts are
read into items (:mod:`rksc_sgl.similarity.content_items`, with the rule of each kind) and the two sequences of items
must be equal. Two things are forgiven, both closed:

- other spellings of the same thing, such as ``twelve`` and ``12`` (:mod:`rksc_sgl.similarity.spellings`);
- instructions around the question that do not change what is asked, such as "Think step by step."
  (:mod:`rksc_sgl.similarity.instructions`).

Neither is forgiven in a text that speaks about words, spelling or the prompt, and no spelling in one with code, tables
or a quotation mark without its partner. Articles, commas, grammatical number and tense are never forgiven: "his
brother" and "his brothers" ask for different sums.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from rksc_sgl.similarity import wording
from rksc_sgl.similarity.content_items import Item, Kind, read_items
from rksc_sgl.similarity.instructions import Turn, without_instructions, words_of
from rksc_sgl.similarity.spellings import in_one_spelling

_MARKER = re.compile(
    r"<\|(?:im_start|start_header_id|im_end|end_header_id|eot_id|end|endoftext|begin_of_text|user|system|assistant)\|>"
    r"(?:(?:user|system|assistant|developer)\b)?(?:<\|end_header_id\|>)?"
    r"|<start_of_turn>(?:user|model)|<end_of_turn>|\[/?INST\]"
)
_ROLE = re.compile(r"user|system|assistant|developer|model|/?INST")
_SAME_ROLE = {"developer": "system", "model": "assistant", "INST": "user", "/INST": "assistant"}
_LETTER = re.compile(r"letters?", re.IGNORECASE)
_UNPAIRED = frozenset("\"'“”‘’„«»")
_OF_MANY = "' "  # "the dogs' bones"


@dataclass(frozen=True)
class ContentComparison:
    """Whether two prompts ask the same thing.

    Attributes:
        same: True if the KV of one may stand for the other.
        reason: why not, short and stable, for counters: ``numbers``, ``units``, ``names``, ``negation``,
            ``quantifier``, ``comparison``, ``operator``, ``code``, ``quoted``, ``order`` (the same items, arranged
            otherwise) or ``words``; empty when ``same``.
        where: the items that differ, for people; empty when ``same``.
    """

    same: bool
    reason: str = ""
    where: str = ""


def same_content(donor: str, branch: str) -> ContentComparison:
    """Decide for two whole decoded prefixes, with their chat markers, system texts and instructions.

    Linear in the length of the texts. An equivalence but for the wording of ``where``: reflexive, symmetric and
    transitive. In doubt the answer is no.
    """
    if donor == branch:
        return ContentComparison(True)
    first, second = content_of(donor), content_of(branch)
    return ContentComparison(True) if first.items == second.items else _difference(first, second)


class Content(NamedTuple):
    """What a prompt is compared by.

    Attributes:
        items: equal for two prompts just if they ask the same thing.
        read: the items before spellings were forgiven; empty where ``items`` has all of them forgiven.
    """

    items: tuple[Item, ...]
    read: tuple[Item, ...] = ()

    def in_one_spelling(self) -> tuple[Item, ...]:
        """The items with every spelling forgiven, in which differences are looked for."""
        return tuple(in_one_spelling(self.read)) if self.read else self.items


@lru_cache(maxsize=64)  # an anchor is compared with each of its siblings
def content_of(text: str) -> Content:
    """Read a prompt, and forgive what may be forgiven in it."""
    turns = turns_of(text)
    kept = without_instructions(turns)
    read = tuple(_items(kept))
    if not read or any(_is_about_wording(turn.body) for turn in kept):
        return Content((*read, Item(Kind.TEXT, text)), read)
    return Content(read, read) if _is_literal(read) else Content(tuple(in_one_spelling(read)))


def turns_of(text: str) -> list[Turn]:
    """A text split at its chat markers; the whole text is one turn where there are none."""
    markers = list(_MARKER.finditer(text))
    starts = [match.start() for match in markers] + [len(text)]
    turns = [Turn("", "", text[: starts[0]])] if starts[0] else []
    for match, end in zip(markers, starts[1:], strict=True):
        turns.append(Turn(match[0], _role(match[0]), text[match.end() : end]))
    return turns


def _role(marker: str) -> str:
    found = None if marker.endswith(("end|>", "eot_id|>", "text|>")) else _ROLE.search(marker)
    return _SAME_ROLE.get(found[0], found[0]) if found else ""


def _items(turns: Sequence[Turn]) -> list[Item]:
    items: list[Item] = []
    for turn in turns:
        if turn.marker:
            items.append(Item(Kind.MARKER, turn.marker))
        items.extend(read_items(turn.body))
    return items


def _is_about_wording(text: str) -> bool:
    words = words_of(text)
    if words & wording.ABOUT_WORDING:
        return True
    if not words & {"letter", "letters"}:
        return False
    around = (text[max(0, match.start() - 12) : match.end() + 20] for match in _LETTER.finditer(text))
    return any(wording.LETTERS.search(part) for part in around)


def _is_literal(items: Sequence[Item]) -> bool:
    """Whether spellings matter in a text of these items: it has code, columns, or half a quotation."""
    return any(
        kind is Kind.CODE or (kind is Kind.PUNCTUATION and text.strip() in _UNPAIRED and text != _OF_MANY)
        for kind, text in items
    )


def _difference(donor: Content, branch: Content) -> ContentComparison:
    """Why two contents are not the same: what they tell, or else how they are written."""
    first, second = donor.in_one_spelling(), branch.in_one_spelling()
    if first == second:
        first, second = donor.items, branch.items
    counts = Counter(first)
    counts.subtract(Counter(second))
    here, there = ([item for item in counts if sign * counts[item] > 0] for sign in (1, -1))
    if not here and not there:
        index = next(index for index, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1])
        return ContentComparison(False, "order", _where(first[index : index + 3], second[index : index + 3]))
    reason = next(kind.reason for kind in Kind if any(item.kind is kind for item in (*here, *there)))
    only_here, only_there = ([item for item in side if item.kind.reason == reason] for side in (here, there))
    return ContentComparison(False, reason, _where(only_here, only_there))


def _where(donor: Sequence[Item], branch: Sequence[Item]) -> str:
    return f"donor has {_listed(donor)}; branch has {_listed(branch)}"


def _listed(items: Sequence[Item]) -> str:
    shown = ", ".join(repr(item.text[:40]) for item in items[:4])
    return (shown or "nothing else") + (" and more" if len(items) > 4 else "")
