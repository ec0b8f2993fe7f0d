"""Other spellings of the same thing: the items of a text in the one spelling that the content guard compares.

Each step is a function of one text's items alone. So the same content is an equivalence: it is symmetric, and who is
the same as a third text is the same as every text that the third one is the same as.
"""

from __future__ import annotations

from collections.abc import Sequence

from rksc_sgl.similarity import wording
from rksc_sgl.similarity.content_items import Item, Kind, starts_sentence, word_item

_WORDS = wording.NUMBER_WORDS | frozenset(wording.CONTRACTIONS)
_TELLING = (  # where a spelling may begin; any other item stays as it is
    _WORDS
    | {word.capitalize() for word in _WORDS}
    | frozenset(wording.ABBREVIATED_UNITS)
    | frozenset(wording.CLOCK)
    | frozenset(wording.CURRENCY)
    | {"%", "% ", " %", " % ", "per", "mph", "in"}
)
_LAST_OF_SENTENCE = (".", "?", "!", "\n")


def in_one_spelling(items: Sequence[Item]) -> list[Item]:
    """The items with every forgiven spelling replaced by the one that stands for it."""
    told: list[Item] = []
    done = 0
    for index in [
        i for i, (kind, text) in enumerate(items) if text in _TELLING or (kind is Kind.NUMBER and "," in text)
    ]:
        if index >= done:
            told.extend(items[done:index])
            spelled, done = _spelled(items, index, told)
            told.extend(spelled)
    told.extend(items[done:])
    return _without_synonyms(told)


def _spelled(items: Sequence[Item], index: int, told: Sequence[Item]) -> tuple[list[Item], int]:
    """What the items from ``index`` on say in the common spelling, and where the next ones begin."""
    item = items[index]
    lower = item.text.lower()
    if lower in wording.NUMBER_WORDS:
        return _number(items, index)
    if item.kind is Kind.NUMBER:
        return [Item(Kind.NUMBER, _without_thousands(item.text, told[-1] if told else None))], index + 1
    if lower in wording.CONTRACTIONS:
        return _contraction(items, index), index + 1
    if _is_currency(item):
        return _money(items, index)
    after_number = bool(told) and told[-1].kind is Kind.NUMBER
    if after_number and item.text in wording.CLOCK:
        return [Item(Kind.UNIT, wording.CLOCK[item.text])], index + 1
    if item.text in wording.ABBREVIATED_UNITS and (after_number or item.text in wording.UNITS_WITHOUT_NUMBER):
        one = after_number and told[-1].text == "1"
        return [_unit(wording.ABBREVIATED_UNITS[item.text], one)], index + 1
    if item.text == "mph":
        return [_unit("mile", False), word_item("per"), word_item("hour")], index + 1
    if after_number and item.text.strip() == "%" and not _is_operand(items, index + 1):
        return [word_item("percent")], index + 1
    if after_number and _texts(items, index, 2) == ["per", "cent"]:
        return [word_item("percent")], index + 2
    ends = index + 2 == len(items) or (index + 2 < len(items) and items[index + 2].text in _LAST_OF_SENTENCE)
    if ends and _texts(items, index, 2) in (["in", "total"], ["in", "all"]):
        return [word_item("altogether")], index + 2
    return [item], index + 1


def _number(items: Sequence[Item], index: int) -> tuple[list[Item], int]:
    """Number words as digits where they can be read in one way only; as they are otherwise."""
    end = index
    words: list[str] = []
    while end < len(items) and items[end].text.lower() in wording.NUMBER_WORDS:
        words.append(items[end].text.lower())
        end += 1
        if _texts(items, end, 1) == ["-"] and _is_number_word(items, end + 1):
            words.append("-")
            end += 1
    run = list(items[index:end])
    follows = index > 0 and (items[index - 1].kind is Kind.NUMBER or items[index - 1].text in ("-", "no", "No"))
    goes_on = _is_digits(items, end) or (_texts(items, end, 1) == ["and"] and _is_number_word(items, end + 1))
    hyphen = len(words) == 2 and _texts(items, end, 1) == ["-"]  # "twenty five-dollar bills"
    value = None if follows or goes_on or hyphen or _is_named(items, index, end) else value_of(words)
    return ([Item(Kind.NUMBER, str(value))] if value is not None else run), end


def _is_named(items: Sequence[Item], index: int, end: int) -> bool:
    """Whether number words are written as names are: with a capital that does not begin a sentence."""
    first = items[index].text
    rest = [first[1:], *(item.text for item in items[index + 1 : end])]
    capital = first[0].isupper() and not starts_sentence(items, index)
    return capital or any(text != text.lower() for text in rest)


def value_of(words: Sequence[str]) -> int | None:
    """The number that number words and hyphens say; None where that is not certain."""
    match words:
        case [word]:
            return wording.ONES.get(word, wording.TENS.get(word))
        case [tens, "-", one] if tens in wording.TENS and 0 < wording.ONES.get(one, 0) < 10:
            return wording.TENS[tens] + wording.ONES[one]
        case [count, scale] if count in wording.ONES | wording.TENS and scale in wording.SCALES:
            return (wording.ONES | wording.TENS)[count] * wording.SCALES[scale]
    return None


def _without_thousands(number: str, before: Item | None) -> str:
    """``1,000`` as ``1000``. Only round ones, and money: ``1,200`` may be two numbers, ``,000`` is never one."""
    whole = number.partition(".")[0]
    money = before is not None and _is_currency(before)
    return number.replace(",", "") if money or whole.endswith(",000") else number


def _money(items: Sequence[Item], index: int) -> tuple[list[Item], int]:
    """``$5`` as ``5 dollars``, but not ``$5 million``."""
    following = items[index + 1] if index + 1 < len(items) else None
    if following is None or following.kind is not Kind.NUMBER or _is_number_word(items, index + 2):
        return [items[index]], index + 1
    number = Item(Kind.NUMBER, _without_thousands(following.text, items[index]))
    return [number, _unit(wording.CURRENCY[items[index].text], number.text == "1")], index + 2


def _unit(name: str, one: bool) -> Item:
    return word_item(name if one else wording.PLURALS.get(name, name + "s"))


def _contraction(items: Sequence[Item], index: int) -> list[Item]:
    """``don't`` as ``do not``, with the capital that it began with."""
    text = items[index].text
    if text[1:] != text[1:].lower():
        return [items[index]]  # emphasis: DON'T
    first, *second = wording.CONTRACTIONS[text.lower()]
    first = first.capitalize() if text[0].isupper() else first
    return [word_item(first, starts_sentence(items, index)), *map(word_item, second)]


def _is_currency(item: Item) -> bool:
    return item.kind is Kind.UNIT and item.text in wording.CURRENCY  # in A$5 the sign is a symbol as any other


def _texts(items: Sequence[Item], index: int, count: int) -> list[str]:
    return [item.text for item in items[index : index + count]]


def _is_number_word(items: Sequence[Item], index: int) -> bool:
    return index < len(items) and items[index].text.lower() in wording.NUMBER_WORDS


def _is_digits(items: Sequence[Item], index: int) -> bool:
    return index < len(items) and items[index].kind is Kind.NUMBER and not _is_number_word(items, index)


def _is_operand(items: Sequence[Item], index: int) -> bool:
    return index < len(items) and (items[index].kind is Kind.NUMBER or items[index].text.strip() in ("(", "-", "$"))


def _without_synonyms(items: list[Item]) -> list[Item]:
    """Words of :data:`wording.SPELLINGS` in the first spelling of their row, if the text uses one of a row only."""
    found = [index for index, item in enumerate(items) if item.text in wording.SPELLINGS]
    used: dict[str, set[str]] = {}
    for index in found:
        used.setdefault(wording.SPELLINGS[items[index].text], set()).add(items[index].text)
    for index in found:
        row = wording.SPELLINGS[items[index].text]
        if len(used[row]) == 1:
            items[index] = word_item(row)
    return items
