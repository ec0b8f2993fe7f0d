"""A text as the sequence of items that the content guard compares.

Reading forgives nothing but layout: one blank more or less between words, blank lines, and whether a new sentence
begins on a new line. What else is forgiven is decided on the items, in :mod:`rksc_sgl.similarity.spellings`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from rksc_sgl.similarity import wording


class Kind(Enum):
    """What an item is. The value is the reason that is given where items of this kind differ.

    Differences are looked for in this order: a changed number is named rather than the words around it. Each kind's
    rule stands in :data:`RULES`.
    """

    CODE = "code"
    QUOTED = "quoted"
    NUMBER = "numbers"
    UNIT = "units"
    NAME = "names"
    NEGATION = "negation"
    QUANTIFIER = "quantifier"
    COMPARISON = "comparison"
    OPERATOR = "operator"
    WORD = "words"
    PUNCTUATION = "words: punctuation"
    BREAK = "words: end of a sentence or line"
    MARKER = "words: chat marker"
    TEXT = "words: whole text"

    @property
    def reason(self) -> str:
        """The reason as counters know it: one of ten, ``words`` for all that has no reason of its own."""
        return self.value.partition(":")[0]


class Item(NamedTuple):
    """One thing that a text says: its kind, and how it is written."""

    kind: Kind
    text: str


class Rule(NamedTuple):
    """When two items of a kind are equal.

    Attributes:
        says: the rule.
        refused: two texts that differ in such an item and are refused.
        forgiven: two texts that differ in such an item and are the same; None where nothing is forgiven.
    """

    says: str
    refused: tuple[str, str]
    forgiven: tuple[str, str] | None = None


RULES: dict[Kind, Rule] = {
    Kind.CODE: Rule(
        "Between backticks every character counts; so do the indentation of a line and columns (two blanks or more, or "
        "a tab, within a line). A text with any of these is compared without forgiving spellings.",
        ("Why?\nif a:\n b\n c", "Why?\nif a:\n b\nc"),
    ),
    Kind.QUOTED: Rule(
        "Between quotation marks every character counts, and so do the marks.",
        ('Who said "in total"?', 'Who said "altogether"?'),
    ),
    Kind.NUMBER: Rule(
        "Digits are compared as they are written; words that can only be read as one number are read as digits, and "
        "1,000 as 1000.",
        ("He has 3.10. Why?", "He has 3.1. Why?"),
        ("He has twenty-one. Why?", "He has 21. Why?"),
    ),
    Kind.UNIT: Rule(
        "An abbreviation is the unit that it stands for, in exactly this case; $ and euro signs before a number are "
        "the units after it. Singular and plural differ.",
        ("It is 5 mm long. Why?", "It is 5 Mm long. Why?"),
        ("He ran 5km. Why?", "He ran 5 kilometers. Why?"),
    ),
    Kind.NAME: Rule(
        "Words with a capital, but for the first of a sentence where that is a common one, are compared letter by "
        "letter.",
        ("Will ran. Why?", "will ran. Why?"),
    ),
    Kind.NEGATION: Rule(
        "A contraction is what it is short for, where that can be one thing only.",
        ("He can not only sing. Why?", "He can't only sing. Why?"),
        ("He doesn't go. Why?", "He does not go. Why?"),
    ),
    Kind.QUANTIFIER: Rule("A word that says how much of a thing.", ("All ran. Why?", "Some ran. Why?")),
    Kind.COMPARISON: Rule(
        "A word that says which way a difference, a change or a gift goes.",
        ("It rose by 5. Why?", "It rose to 5. Why?"),
    ),
    Kind.OPERATOR: Rule(
        "A sign of arithmetic or logic, with the blanks around it: -5 is a number, - 5 an entry of a list. After a "
        "number % is percent.",
        ("Which is least?\n-5\n-3", "Which is least?\n- 5\n- 3"),
        ("It rose by 10%. Why?", "It rose by 10 percent. Why?"),
    ),
    Kind.WORD: Rule(
        "Any other word, articles included. A closed list of words is known in two spellings.",
        ("He ate a chicken. Why?", "He ate chicken. Why?"),
        ("His mom ran. Why?", "His mother ran. Why?"),
    ),
    Kind.PUNCTUATION: Rule(
        "Any other character, commas and invisible ones included, with the blanks around it.",
        ("His parents, Ann, and Bob ran. How many?", "His parents, Ann and Bob ran. How many?"),
    ),
    Kind.BREAK: Rule(
        "The sign that ends a sentence, and the end of a line that ends none.",
        ("What is 3 + 5!", "What is 3 + 5."),
        ("He ran.\n\nWhy?", "He ran. Why?"),
    ),
    Kind.MARKER: Rule(
        "A token of the chat template that begins or ends a turn. It goes only with a whole system text that is left "
        "out.",
        ("<|im_start|>user\nWhy?", "<|im_start|>assistant\nWhy?"),
    ),
    Kind.TEXT: Rule(
        "The text itself, character by character, where it speaks about words, spelling or the prompt.",
        ("Which letter is first in colour?", "Which letter is first in color?"),
    ),
}

_OPERATORS = frozenset("+-−*/=<>^%×÷·±√∑|&~≤≥≠")
_TOKEN = re.compile(
    r"""[ ]?(?:
      (?P<word>[^\W\d_]+(?!['’][^\W\d_]|\w|\.[mM]\.))
    | (?P<apostrophe>[^\W\d_]+['’][^\W\d_]+(?!\w))
    | (?P<clock>[aApP]\.[mM]\.)
    | (?P<number>(?:(?<![(\[,])\d{1,3}(?:,\d{3})+(?!,?\d|[)\]])|\d+)(?:\.\d+)?(?!\w)|(?<![\w.])\.\d+(?!\w))
    | (?P<quantity>\d+(?:UNITS)(?!\w))
    | (?P<alnum>\w+)
    | (?P<stop>[.?!](?=["'”’)\]]*(?:\s|\Z|<)))
    | (?P<line>(?:[ \t]*\r?\n)+(?P<indent>[ \t]*))
    | (?P<code>```.*?(?:```|\Z)|`[^`\n]+`)
    | (?P<quoted>"[^"]{0,1000}"|“[^“”]{0,1000}”|(?<![\w'])'[^\n']{1,400}(?:'(?=\w)[^\n']{0,400}){0,8}'(?!\w)
        |‘[^\n‘’]{1,400}(?:’(?=\w)[^\n‘’]{0,400}){0,8}’(?!\w))
    | (?P<currency>(?<![^\s(])[$€](?=\.?\d))
    | (?P<columns>[ ]{2,}|[ ]*\t[ \t]*)
    | (?P<symbol>[^ ])
    | (?P<end>[ ]\Z)
    )""".replace("UNITS", "|".join(sorted(wording.ABBREVIATED_UNITS, key=len, reverse=True))),
    re.VERBOSE | re.DOTALL,
)
_END_OF_LINE = Item(Kind.BREAK, "\n")


def read_items(text: str) -> list[Item]:
    """The items of a text without chat markers, in order; a single pass, linear in its length."""
    reader = _Reader(text)
    items = reader.items
    for match in _TOKEN.finditer(text):
        group = match.lastgroup or "symbol"
        if group == "word" and (token := match["word"]).islower():
            items.append(word_item(token))
        else:
            _HANDLERS[group](reader, match)
    while items and items[-1] is _END_OF_LINE:
        items.pop()
    return items


def starts_sentence(items: Sequence[Item], index: int) -> bool:
    """Whether the item at ``index`` is, or would be, the first of its sentence, line or entry."""
    if index == 0:
        return True
    kind, text = items[index - 1]
    return kind is Kind.BREAK or kind is Kind.MARKER or (kind is Kind.PUNCTUATION and text.strip() == ":")


@lru_cache(maxsize=16384)
def word_item(token: str, starts: bool = False) -> Item:
    """A word with its kind, which only names a difference: every word is compared letter by letter."""
    lower = token.lower()
    if lower in wording.KIND_OF_WORD:
        return Item(Kind[wording.KIND_OF_WORD[lower]], token)
    if lower.endswith("n't"):
        return Item(Kind.NEGATION, token)
    if not token.isascii() and any(character.isnumeric() for character in token):
        return Item(Kind.NUMBER, token)
    named = token not in (lower, "I") and not (starts and lower in wording.SENTENCE_OPENERS)
    return Item(Kind.NAME if named else Kind.WORD, token)


class _Reader:
    """What is read so far; the functions below are the table of what each kind of token adds to it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.items: list[Item] = []

    def add(self, kind: Kind, text: str) -> None:
        self.items.append(Item(kind, text))

    def word(self, match: re.Match[str]) -> None:
        token = match[0].lstrip(" ").replace("’", "'")
        self.items.append(word_item(token, starts_sentence(self.items, len(self.items))))

    def number(self, match: re.Match[str]) -> None:
        self.add(Kind.NUMBER, match["number"])

    def quantity(self, match: re.Match[str]) -> None:
        """``5km`` is ``5`` and ``km``."""
        token = match["quantity"]
        digits = re.match(r"\d+", token)
        assert digits is not None
        self.add(Kind.NUMBER, digits[0])
        self.items.append(word_item(token[digits.end() :]))

    def alnum(self, match: re.Match[str]) -> None:
        self.add(Kind.NUMBER, match["alnum"])

    def clock(self, match: re.Match[str]) -> None:
        self.add(Kind.UNIT, match["clock"])

    def currency(self, match: re.Match[str]) -> None:
        self.add(Kind.UNIT, match["currency"])

    def code(self, match: re.Match[str]) -> None:
        self.add(Kind.CODE, match["code"])

    def quoted(self, match: re.Match[str]) -> None:
        self.add(Kind.QUOTED, match["quoted"])

    def stop(self, match: re.Match[str]) -> None:
        self.add(Kind.BREAK, match["stop"])

    def line(self, match: re.Match[str]) -> None:
        if self.items and self.items[-1].kind is not Kind.BREAK:
            self.items.append(_END_OF_LINE)
        if match["indent"] and match.end() < len(self.text):
            self.add(Kind.CODE, match["indent"])

    def columns(self, match: re.Match[str]) -> None:
        """Blanks between the cells of a table; at the end of a line, or between two sentences, they say nothing."""
        after = self.text[match.end() : match.end() + 1]
        if not after:
            self.end(match)
        elif after not in "\r\n" and not (self.items and self.items[-1].kind is Kind.BREAK):
            self.add(Kind.CODE, match[0])

    def symbol(self, match: re.Match[str]) -> None:
        token = match["symbol"]
        before = " " if match[0] != token and self.items else ""
        after = " " if self.text[match.end() : match.end() + 1] == " " else ""
        self.add(Kind.OPERATOR if token in _OPERATORS else Kind.PUNCTUATION, before + token + after)

    def end(self, match: re.Match[str]) -> None:
        """A blank at the end of a text that is to be gone on with: "It is 4 " is not "It is 4"."""
        if self.items and self.items[-1].kind is not Kind.BREAK:
            self.add(Kind.PUNCTUATION, " ")


_HANDLERS: dict[str, Callable[[_Reader, re.Match[str]], None]] = {
    "word": _Reader.word,
    "apostrophe": _Reader.word,
    "number": _Reader.number,
    "quantity": _Reader.quantity,
    "alnum": _Reader.alnum,
    "clock": _Reader.clock,
    "currency": _Reader.currency,
    "code": _Reader.code,
    "quoted": _Reader.quoted,
    "stop": _Reader.stop,
    "line": _Reader.line,
    "columns": _Reader.columns,
    "symbol": _Reader.symbol,
    "end": _Reader.end,
}
