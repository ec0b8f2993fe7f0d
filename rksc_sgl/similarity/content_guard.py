"""Whether two prompts ask the same thing, so that the KV of one may stand for the other.

Hidden states do not see a changed number (similarity 1.000 in our measurements), so this decides by the words. A false
yes answers the wrong question; a false no costs one prefill. Hence the rule is equality, not likeness: both texts are
read into items (numbers, units, names, words, symbols, code, quotations) and the two sequences of items must be equal.
Only three things are forgiven, all of them closed lists in :mod:`rksc_sgl.similarity.wording`:

- other spellings of the same thing: ``twelve`` and ``12``, ``1,000`` and ``1000``, ``$5`` and ``5 dollars``,
  ``don't`` and ``do not``, ``kg`` and ``kilograms``, ``mom`` and ``mother``;
- articles, and commas before ``and``, ``or``, ``but``;
- whole sentences made of nothing but harmless instruction words ("Think step by step.", "You are a careful tutor."),
  and only where the rest of the text asks its question by itself, is one turn, and does not speak about the text or
  to its reader.

Grammatical number and tense are not forgiven: "his brother" and "his brothers" ask for different sums.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from rksc_sgl.similarity import wording

REASONS = {
    "k": "code",
    '"': "quoted",
    "n": "numbers",
    "u": "units",
    "N": "names",
    "!": "negation",
    "q": "quantifier",
    "c": "comparison",
    "o": "operator",
}  # first letter of an item -> reason, in the order in which a difference is looked for; other items are "words"

_KINDS: dict[str, str] = {
    word: letter
    for letter, words in (
        ("?", wording.QUESTION),
        ("c", wording.COMPARISON),
        ("q", wording.QUANTIFIER),
        ("u", wording.UNIT),
        ("!", wording.NEGATION),
    )
    for word in words
}
_OPERATORS = frozenset("+-*/=<>^%×÷·±√∑|&~!≤≥≠")
_CHARACTERS = {"‘": "'", "’": "'", "“": '"', "”": '"', "\u00a0": " ", "−": "-", "\r": "\n"}
_BREAK = "."
_TOKEN = re.compile(
    r"""[ ]?(?:
      (?P<word>[^\W\d_]+(?:'[^\W\d_]+)?(?![\d_]|\.m\.))
    | (?P<clock>[ap]\.m\.)
    | (?P<number>(?:(?<![(\[,])\d{1,3}(?:,\d{3})+(?!,?\d|[)\]])|\d+)(?:\.\d+)?(?!\w)|(?<![\w.])\.\d+(?!\w))
    | (?P<alnum>\w+)
    | (?P<stop>[.?!](?=["')\]]*(?:\s|\Z|<)))
    | (?P<newline>\n+[ \t]*)
    | (?P<code>```.*?(?:```|\Z)|`[^`\n]+`)
    | (?P<marker><\|(?:im_start|start_header_id|im_end|end_header_id|eot_id|end|endoftext|begin_of_text|user|system
        |assistant)\|>(?:(?:user|system|assistant|developer)\b)?(?:<\|end_header_id\|>)?
        |<start_of_turn>(?:user|model)|<end_of_turn>|\[/?INST\])
    | (?P<quoted>"[^"\n]*"|(?<![\w'])'[^\n']{1,400}(?:'(?=\w)[^\n']{0,400}){0,8}'(?!\w))
    | (?P<gap>[ \t]+)
    | (?P<other>\S)
    )""",
    re.VERBOSE | re.DOTALL,
)
_ROLE = re.compile(r"user|system|assistant|developer|model|INST\]")
_CLOSING = re.compile(r"<\|(?:im_end|eot_id|end|endoftext|begin_of_text|end_header_id)\|>\Z|<end_of_turn>\Z")
_UNIT_SUFFIX = re.compile(r"(\d+)([A-Za-z]+)\Z")
_TELLING = (  # words that may change what stands around them; any other lower-case word is an item by itself
    frozenset(wording.UNIT_FORMS)
    | wording.NUMBER_WORDS
    | wording.ARTICLES
    | wording.KEEP_ARTICLE_BEFORE
    | wording.RATE_UNITS
    | frozenset(wording.CONTRACTIONS)
    | {"and", "or", "but", "percent"}
)
_ASSISTANT = ("assistant", "model")


@dataclass(frozen=True)
class GuardVerdict:
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


def same_content(donor: str, branch: str) -> GuardVerdict:
    """Decide for two whole decoded prefixes, with their chat markers, system texts and instructions.

    Linear in the length of the texts. Symmetric but for the wording of ``where``. In doubt the answer is no.
    """
    if donor == branch:
        return GuardVerdict(True)
    first, second = read_items(donor), read_items(branch)
    if first != second:
        first, second = _without_synonyms(first, second)
    if first != second:
        return _difference(first, second)
    if not any(item[0] not in _BREAK + "@" for item in first):
        return GuardVerdict(False, "words", "nothing but instructions, and they differ")
    return GuardVerdict(True)


@lru_cache(maxsize=64)  # an anchor is compared with each of its siblings
def read_items(text: str) -> tuple[str, ...]:
    """The items that a text is compared by: each a letter for its kind (:data:`REASONS`) and what it says."""
    text = unicodedata.normalize("NFC", text)
    for character, plain in _CHARACTERS.items():
        text = text.replace(character, plain)
    for needed, pattern, replacement in wording.SAME_PHRASES:
        if needed in text:
            text = pattern.sub(replacement, text)
    return _Reader(text).read()


@dataclass
class _Segment:
    """A sentence, or a label that ends in a colon."""

    role: str = ""
    items: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    plain: bool = True  # only words and commas
    bound: bool = False  # follows a colon after words that count
    end: str = ""  # "?", ":" or "."
    harmless: bool = False


class _Reader:
    """One pass over a text; see :func:`read_items`."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.role = ""
        self.segments: list[_Segment] = []
        self.now = _Segment()
        self.article = ""  # held back until the next item says whether it matters
        self.comma = False  # likewise
        self.currency = ""
        self.run: list[str] = []  # number words that may belong together

    def read(self) -> tuple[str, ...]:
        for match in _TOKEN.finditer(self.text):
            kind = match.lastgroup or "other"
            token = match[kind]
            if kind == "word":
                waiting = self.run or self.comma or self.currency
                if not waiting and token not in _TELLING and token.islower() and "'" not in token:
                    self.article = ""
                    self.now.words.append(token)
                    self.now.items.append(_KINDS.get(token, "w") + token)
                    continue
                self._word(token, match.end())
                continue
            if self.run and not self._joins(token, match):
                self._end_run()
            getattr(self, "_" + kind)(token, match)
        self._end_segment("")
        return tuple(self._kept())

    # --- tokens ---

    def _word(self, token: str, end: int) -> None:
        lower = token.lower()
        self.now.words.append(lower)
        if self.run and not self._continues_run(lower):
            self._end_run()
        if lower in wording.NUMBER_WORDS or (lower == "and" and self.run):
            self._settle(lower)
            self.run.append(lower)
            return
        starts = not self.now.items and not self.article
        if lower in wording.ARTICLES and (token == lower or (starts and self.text[end : end + 1] == " ")):
            self._settle("")
            self.article = lower
            return
        self._settle(lower)
        if "'" in lower:
            self._apostrophe(token, lower, starts)
        else:
            self._add_word(token, lower, starts)

    def _apostrophe(self, token: str, lower: str, starts: bool) -> None:
        """Contractions that have one meaning are written out; possessives keep their mark."""
        base, _, tail = token.partition("'")
        if lower in wording.CONTRACTIONS:
            spelled = wording.CONTRACTIONS[lower]
        elif lower.endswith("n't"):
            spelled = (lower[:-3], "not")
        elif "'" + tail.lower() in wording.ENDINGS:
            spelled = (base, wording.ENDINGS["'" + tail.lower()])
        else:
            self._add_word(base, base.lower(), starts)
            self.now.items.append("w'" + tail)
            return
        for index, word in enumerate(spelled):
            self._add_word(word, word.lower(), starts and index == 0)

    def _add_word(self, token: str, lower: str, starts: bool) -> None:
        items = self.now.items
        if items and items[-1][0] == "n":
            unit = wording.UNIT_FORMS.get(token) or wording.UNIT_FORMS.get(lower if lower != "am" else "")
            if unit or lower == "percent":
                items.append("u" + unit if unit else "o%")
                return
        if token in wording.SPELLINGS:
            items.append("u" + wording.SPELLINGS[token])
        elif lower in wording.CONTRACTIONS and "'" not in token:
            items.extend(_KINDS.get(word, "w") + word for word in wording.CONTRACTIONS[lower])
        elif token == lower or (starts and lower in wording.COMMON and token[1:] == lower[1:]):
            items.append(_KINDS.get(lower, "w") + lower)
        elif lower in _KINDS:
            items.append(_KINDS[lower] + token)  # emphasis: NOT
        else:
            items.append("N" + token)

    def _number(self, token: str, match: re.Match[str]) -> None:
        self._settle("")
        digits = token.replace(",", "")
        self.now.items.append("n" + ("0" + digits if digits[0] == "." else digits))
        if self.currency:
            self.now.items.append("u" + self.currency)
            self.currency = ""
        self.now.plain = False

    def _alnum(self, token: str, match: re.Match[str]) -> None:
        split = _UNIT_SUFFIX.match(token)
        if split and split[2] in wording.UNIT_FORMS:
            self._number(split[1], match)
            self._add_word(split[2], split[2].lower(), False)
        else:
            self._symbol("n" + token)

    def _clock(self, token: str, match: re.Match[str]) -> None:
        self._symbol("u" + token.replace(".", ""))

    def _code(self, token: str, match: re.Match[str]) -> None:
        self._symbol("k" + token)

    def _quoted(self, token: str, match: re.Match[str]) -> None:
        self._symbol('"' + token)

    def _gap(self, token: str, match: re.Match[str]) -> None:
        following = self.text[match.end() : match.end() + 1]
        if self.now.words and following.strip() and not self.comma:
            self._symbol("k" + token)  # columns and grids

    def _newline(self, token: str, match: re.Match[str]) -> None:
        self._end_segment(_BREAK)
        self.now.bound = False
        indent = token.lstrip("\n")
        if len(indent) > 1 or "\t" in indent:
            self._symbol("k" + indent)

    def _stop(self, token: str, match: re.Match[str]) -> None:
        self._end_segment("?" if token == "?" else _BREAK)

    def _marker(self, token: str, match: re.Match[str]) -> None:
        self._end_segment(_BREAK)
        found = None if _CLOSING.fullmatch(token) else _ROLE.search(token)
        if found:
            self.role = {"INST]": "assistant" if "/" in token else "user"}.get(found[0], found[0])
            self.segments.append(_Segment(role=self.role))
            self.now = _Segment(role=self.role)

    def _other(self, token: str, match: re.Match[str]) -> None:
        after = self.text[match.end() : match.end() + 1]
        if token == ",":
            self._settle("")
            self.comma = True
        elif token == "-" and self.run and after.isalpha() and match[0] == "-":
            self.run.append("-")
        elif token in wording.CURRENCY and (after.isdigit() or after == "."):
            self._settle("")
            self.currency = wording.CURRENCY[token]
        elif token == ":" and (not after or after.isspace() or after == "<"):
            self._end_segment(":")
        elif token in "+-" and match[0] != token and not after.isspace():
            self._symbol("o unary " + token)
        else:
            self._symbol(("o" if token in _OPERATORS else "p") + token)

    def _symbol(self, item: str) -> None:
        self._settle("")
        self.now.items.append(item)
        self.now.plain = False

    # --- what was held back ---

    def _settle(self, following: str) -> None:
        """Write the comma and the article that were held back, if they matter before ``following``."""
        items = self.now.items
        if self.comma:
            self.comma = False
            if following not in ("and", "or", "but"):
                items.append("p,")
        if self.currency and following:
            items.append("p" + self.currency)
            self.currency = ""
        if self.article:
            article, self.article = self.article, ""
            rate = items and (items[-1][0] in "un" or items[-1] in ("qonce", "qtwice", "wtimes", "qtimes"))
            if article != "the" and rate and following in wording.RATE_UNITS:
                items.append("cper")
            elif not following or following in wording.KEEP_ARTICLE_BEFORE:
                items.append("w" + ("the" if article == "the" else "a"))

    def _joins(self, token: str, match: re.Match[str]) -> bool:
        return token == "-" and match[0] == "-"

    def _continues_run(self, lower: str) -> bool:
        if lower == "and":
            return self.run[-1] in wording.SCALES
        return lower in wording.NUMBER_WORDS

    def _end_run(self) -> None:
        """Number words to digits where they can be read in one way only; as they are otherwise."""
        run, self.run = self.run, []
        tail = []
        while run[-1] in ("-", "and"):
            tail.append("o-" if run.pop() == "-" else "wand")
        value = None if "o-" in tail and len(run) > 1 else _value(run)
        self.now.items.extend([f"n{value}"] if value is not None else ["n~" + word for word in run])
        self.now.items.extend(tail)
        if value != 1 or tail:
            self.now.plain = False
        if self.currency:
            self.now.items.append("u" + self.currency)
            self.currency = ""

    def _end_segment(self, end: str) -> None:
        if self.run:
            self._end_run()
        self.comma = False
        if self.article or self.currency:
            self._settle("")
        done = self.now
        if done.items or (done.words and end):
            done.end = end
            done.harmless = done.plain and not done.bound and is_harmless(done.words)
            self.segments.append(done)
        elif self.segments and end == "?":
            self.segments[-1].end = "?"
        bound = end == ":" and not done.harmless
        self.now = _Segment(role=self.role, bound=bound)

    # --- what is kept ---

    def _kept(self) -> Iterable[str]:
        segments = self.segments
        if self._may_drop():
            segments = [segment for segment in segments if not segment.harmless]
        role = ""
        for index, segment in enumerate(segments):
            if segment.role != role and (segment.items or index == len(segments) - 1):
                role = segment.role
                yield "@" + role
            if segment.items:
                yield from segment.items
                last = index == len(segments) - 1
                if segment.end in "?:" and segment.end:
                    yield "p" + segment.end
                elif not last and segments[index + 1].items:
                    yield _BREAK

    def _may_drop(self) -> bool:
        """Whether the text asks its question by what is kept, in one turn, and the instructions do not bear on it."""
        content = [segment for segment in self.segments if segment.items and not segment.harmless]
        roles = [segment.role for segment in self.segments if not segment.items and segment.role]
        if roles.count("user") > 1 or any(segment.items for segment in self.segments if segment.role in _ASSISTANT):
            return False
        words = {word for segment in content for word in segment.words}
        if words & wording.ABOUT_THE_TEXT:
            return False
        if not (words & wording.ASKING or any(segment.end == "?" for segment in content)):
            return False
        written = [segment for segment in self.segments if segment.items]
        if words & wording.TO_THE_READER:
            for segment in written:
                segment.harmless = segment.harmless and not _is_persona(segment)
        last = written[-1]
        if last.harmless and last.end == ":" and not set(last.words) & wording.SOLUTION:
            last.harmless = False  # "Question:" at the end asks for another question
        return True


def is_harmless(words: Sequence[str]) -> bool:
    """Whether a sentence of these lower-case words is an instruction that does not change what is asked."""
    found = set(words)
    if not wording.SENTENCE_VOCABULARY.issuperset(found):
        return False
    if found & wording.DELIVERING and not found & wording.SOLUTION:
        return False  # "explain the problem" is not "solve the problem"
    left = wording.HARMLESS_PHRASES.sub(" ", " ".join(words))
    return wording.HARMLESS.issuperset(left.split())


def _is_persona(segment: _Segment) -> bool:
    return segment.role in ("system", "developer") or segment.words[:2] == ["you", "are"]


def _value(run: Sequence[str]) -> int | None:
    """The number that a run of number words says; None where that is not certain."""
    match run:
        case [word]:
            return wording.ONES.get(word, wording.TENS.get(word, wording.SCALES.get(word)))
        case [tens, "-", one] if tens in wording.TENS and 0 < wording.ONES.get(one, 0) < 10:
            return wording.TENS[tens] + wording.ONES[one]
        case [count, scale] if count in wording.ONES | wording.TENS and scale in wording.SCALES:
            return (wording.ONES | wording.TENS)[count] * wording.SCALES[scale]
    return None


def _without_synonyms(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Both with synonyms replaced, except where one text uses two words of a row."""
    used: dict[str, list[set[str]]] = {}
    for side, items in enumerate((first, second)):
        for item in items:
            row = wording.SYNONYMS.get(item[1:]) if item[0] in "wNc" else None
            if row:
                used.setdefault(row, [set(), set()])[side].add(item[1:].lower())
    rows = {row for row, sides in used.items() if all(len(side) <= 1 for side in sides)}
    if not rows:
        return first, second

    def replaced(items: tuple[str, ...]) -> tuple[str, ...]:
        found = ((item, wording.SYNONYMS.get(item[1:], "") if item[0] in "wNc" else "") for item in items)
        return tuple("w" + row if row in rows else item for item, row in found)

    return replaced(first), replaced(second)


def _difference(first: tuple[str, ...], second: tuple[str, ...]) -> GuardVerdict:
    only_first, only_second = Counter(first), Counter(second)
    only_first.subtract(only_second)
    donor = [item for item, count in only_first.items() if count > 0]
    branch = [item for item, count in only_first.items() if count < 0]
    if not donor and not branch:
        index = next(index for index, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1])
        return GuardVerdict(False, "order", _where(first[index : index + 3], second[index : index + 3]))
    for letter, reason in REASONS.items():
        here, there = ([item for item in side if item[0] == letter] for side in (donor, branch))
        if here or there:
            return GuardVerdict(False, reason, _where(here, there))
    return GuardVerdict(False, "words", _where(donor, branch))


def _where(donor: Sequence[str], branch: Sequence[str]) -> str:
    return f"donor has {_listed(donor)}; branch has {_listed(branch)}"


def _listed(items: Sequence[str]) -> str:
    shown = ", ".join(repr(item[1:41] or item) for item in items[:4])
    return (shown or "nothing else") + (" and more" if len(items) > 4 else "")
