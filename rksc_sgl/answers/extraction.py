"""The answer in a free text, in a form that can be compared."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rksc_sgl.answers.quantities import NUMBER_IN_TEXT, SIGNED_NUMBER, is_unit, normalize_number
from rksc_sgl.errors import OptionError

_DASHES = str.maketrans(dict.fromkeys("−–﹣－", "-"))
_MARKUP = "*_`\"' \t\r\n"  # what surrounds an answer without being part of it
_PUNCTUATION = _MARKUP + ".!?,;:"
_WRAPPERS = {"(": ")", "[": "]", "{": "}", "$": "$"}
_CLOSERS = r"[*_`$)\]}\"'”’]*"

_NUMBER_LIST = re.compile(
    rf"{SIGNED_NUMBER}(?:\s*(?:,\s*and|,|;|and)\s+{SIGNED_NUMBER})+(?=\s*(?:[A-Za-z]+\s*)?(?:[.!?;)$*](?:\s|$)|$))"
)
_TERM = rf"(?:{SIGNED_NUMBER}[a-z]?|[-+]?[a-z])(?![\w%]|\.[0-9])"  # 3, x, 3x, and 3i of a complex number
_EXPRESSION = re.compile(rf"{_TERM}(?:(?:\s*[+*×÷·^]\s*|\s+[-/]\s+){_TERM})+")
_OPERAND = rf"\(*{SIGNED_NUMBER}%?\)*(?:\s?[A-Za-z]+)?"
_CALCULATION = re.compile(rf"(?:{_OPERAND}(?:\s*[-+*/×÷·^]\s*{_OPERAND})*|[A-Za-z]\w*)\s*=\s*")

_MARK = re.compile(r"^[ \t]*####[ \t]+|\banswer\**\s*(?P<link>is|:|=)\s*:?\s*", re.IGNORECASE | re.MULTILINE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_OPEN_BOX = re.compile(_BOXED.pattern + r"\s*\}?")  # of a text that ends too early, or of an empty box
_CLAUSE_END = re.compile(r"[.,;:!?\"'”’)\]>}]+(?:\s|$)")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_CHOICE = re.compile(
    r"(?:(?:option|choice)\s+)?(?:\((?P<round>[A-Z])\)|(?P<bare>[A-H])(?=\)|\s?[.:,](?!\w)|[*_`\"'.!?,;:\s]*$))"
    r"|(?:option|choice)\s+(?P<named>[A-H])\b",
    re.IGNORECASE,
)
_CHOICE_IN_TEXT = re.compile(
    r"^[\s*_]*\((?P<first>[A-H])\)"  # the text begins with it
    r"|\b(?:correct|right|best)\s+(?:option|choice)\s*(?:is|:)?\s*\**\(?(?P<named>[A-H])\b"
    r"|(?:\((?P<said>[A-H])\)|\b(?:[Oo]ption|[Cc]hoice)\s+(?P<told>[A-H]))[*_]*\s+is\s+(?:the\s+)?(?:right|correct|best)\b"
    r"|(?:\((?P<last>[A-H])\)|\b(?:[Oo]ption|[Cc]hoice)\s+(?P<end>[A-H]))[\s*_.!]*$"  # or ends with it
    r"|^[\s*_]*(?P<alone>[A-H])[\s*_.!]*$"
)
_REASON = r"because|since|as|so|which|where|when|if|but|given|due"
_DECISION = re.compile(rf"(yes|no|true|false)\b(?={_CLOSERS}\s*(?:[,.;:!]|$)|\s+(?:{_REASON})\b)", re.IGNORECASE)
_FILLER = re.compile(
    r"(?:(?:therefore|thus|then|hence|indeed|simply|just|exactly|precisely|approximately|about|around|roughly|now"
    r"|i\.e\.|equal\s+to)\b[.,:]*[\s*_$]*)+(?=\S)",
    re.IGNORECASE,
)
_CORRECTED = re.compile(  # "not 5 but 6"
    r"not\s+[^.;!?\n]{1,60}?[,;]?\s+(?:but(?:\s+(?:rather|instead))?|(?:it|that)(?:\s+is|'s))[\s*_$]+", re.IGNORECASE
)
_REMARK = re.compile(  # on an answer: "the answer is correct" states none
    r"[\s*_]*(?:(?:not|also|indeed|now|then|thus|therefore|quite|very|simply|already)\s+)*"
    r"(?:(?:in)?correct|(?:in)?accurate|right|wrong|(?:un)?clear|obvious|reasonable|consistent|as\s+follows|here|below|above"
    r"|found|given|obtained|calculated|computed|derived|shown|based|in\s+the\s+(?:form|format))\b"
    r"(?=[\s*_'\")]*(?:$|[,.;:!?])|\s+(?:as|because|since|and|so|but|if|when|to|by|in|on|from|with|for|of|below|above)\b)"
    r"|[\s*_]*(?:easy|simple|hard|difficult|straightforward|possible|known|ready)\b",
    re.IGNORECASE,
)
_REFERENCE = re.compile(  # to what stands elsewhere, or an example of what an answer could be
    r"(?:as|like|same\s+as|see|shown|given|stated|the)\s+(?:\w+\s+)?(?:above|below|before|follows|example)\b|(?:above|below)$"
    r"|e\.?\s?g\.?(?:[\s,:]|$)|for\s+(?:example|instance)\b|such\s+as\b",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(  # of a template: "end with 'The answer is N'", with or without what is counted
    r"(?:(?-i:[NXn])|_{2,}|(?:\.{2,}|…)|\?*)(?:\s+[A-Za-z]+){0,2}"
    r"|[\[<{(]?(?:(?:the|your|a|an|insert|final|correct|right)\s+)*(?:number|answer|value|result|letter|option|choice|n)"
    r"(?:\s+here)?[\]>})]?",
    re.IGNORECASE,
)
_UNKNOWN = re.compile(
    r"[b-hj-z]\s+(?!(?:is|equals)\b)[A-Za-z]{2,}.*", re.DOTALL
)  # "x apples": a variable that counts something
_OPERATION = re.compile(
    r"\b(?:sums?|difference|product|quotient|ratio|average|mean|half|twice|double|triple|third|quarter|remainder"
    r"|adding|subtracting|multiplying|dividing|between)\b",
    re.IGNORECASE,
)
_OPERATION_ON = re.compile(  # "3 more than 5", "50% of 36"
    r"[^\d.;!?]{0,30}?\b(?:of|than|times|plus|minus|over|divided\s+by|multiplied\s+by)\s+[$€£(]*[0-9]", re.IGNORECASE
)
_RESULT = re.compile(
    rf"(?:\b(?:which|that|this|it)\s+(?:is|equals|gives|makes|comes\s+to)|\bequals?|\bis\s+equal\s+to|\bgives|\bmakes|=)"
    rf"(?:\s+(?:about|exactly|equal\s+to))?[\s*_$:(]*(?={SIGNED_NUMBER})",
    re.IGNORECASE,
)
_NAME_END = re.compile(rf",?\s+(?:{_REASON}|that)\b|[;:!?](?:\s|$)|\.(?:\s|$)|[.*_`\"”]+$|\s[(—-]", re.IGNORECASE)
_LONGEST_NAME = 5  # words
# No name has such a word: a phrase with one of them says something about an answer.
_SENTENCE_WORD = re.compile(
    r"\b(?:i|we|you|he|she|they|it|this|these|those|there|is|are|was|were|be|been|being|am|has|have|had|do|does"
    r"|did|not|can|could|will|would|shall|should|may|might|must|let|need|needs|to|that|which|who|what|how"
    r"|why|when|because|since|so|by|from|into|if|then|than|therefore|thus|also|very|here|above|below"
    r"|following|obvious|obviously|clear|clearly|easy|simple|found|given|obtained|calculated|computed"
    r"|derived|shown|based|number|amount|total|sum|difference|product|value|result|quantity|answer|question"
    r"|problem|solution|step|steps)\b",
    re.IGNORECASE,
)
_LIST_OF_WORDS = re.compile(r"[^\W_][\w'’-]*(?:,\s*[^\W_][\w'’-]*){2,}")
_FULL_NAME = re.compile(r"\s*(?:\*\*|[\"'`“])[^\n]*?(?:\*\*|[\"'`”])[\s.]*")  # in quotes or bold
# What may follow an answer in a text that was cut, so that the answer itself was not.
_FOLLOWED = re.compile(
    rf"\s?{_CLOSERS}(?:\s*[A-Za-z°²³/'-]+(?![A-Za-z°²³/'-])){{0,4}}?{_CLOSERS}"
    rf"(?:[.!?;]{_CLOSERS}\s|,\s+(?!(?:and|or)\b)[A-Za-z]+\W|\s+(?:{_REASON})\W)",
    re.IGNORECASE,
)
_TUPLE = re.compile(rf"[(\[]\s*{SIGNED_NUMBER}(?:\s*,\s*{SIGNED_NUMBER})+\s*[)\]]")
_OPENED = re.compile(r"[(\[{$*_`\s]+(?=[-+$€£]?\s?[0-9.])")
_GSM8K = re.compile(rf"(?P<number>{SIGNED_NUMBER}(?:\s?/\s?[0-9]+|\x20[0-9]+/[0-9]+)?%?)(?P<unit>[^\d]*)")

Extractor = Callable[[str], "str | None"]


def extract_answer(text: str, *, truncated: bool = False) -> str | None:
    r"""The final answer in a text, normalised; None where there is none.

    Looked for in this order: the last ``\boxed{...}`` that says something; the latest statement, which is ``#### ...``
    or "answer is ..." or "answer: ..." followed by what looks like an answer; a choice's letter such as "option B" or
    "(B) is correct"; and else the last number.

    A number, numbers, an expression, a letter, yes or no, a short name, a list of words and a sentence that begins with
    a name look like an answer; after "answer:", and in quotes or bold, any words do. A remark ("the answer is
    correct"), a reference ("as above"), an example ("e.g. 5") and a template's place for an answer ("the answer is N
    dollars") do not. ``####`` begins an answer as GSM8K writes it, a number alone on its line say, and else a heading.

    Args:
        text: what a branch wrote.
        truncated: it was cut, by its token limit say. Its last number is then an intermediate one, so that only an
            answer that it stated counts, and only one that something follows which is no part of it: ``1`` at the end
            may have been going to be ``18``, and ``48 + 2`` to be ``48 + 24 = 72``.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return _from_boxed(boxed)
    for statement in _statements(text, truncated):
        found = _read(statement)
        if found is not None and not (truncated and not statement.ends and not found.is_complete):
            return found.answer
    if truncated:
        return None
    plain = _without_latex(text)
    choices = list(_CHOICE_IN_TEXT.finditer(plain))
    if choices:
        return _letter(choices[-1])
    numbers = [match.group("number") for match in NUMBER_IN_TEXT.finditer(plain)]
    return normalize_answer(numbers[-1]) if numbers else None


def stated_answer(text: str) -> str | None:
    """What the text states as its final answer, as it was written; None where it states nothing.

    For graders that want the answer's own spelling. Marks are those of :func:`extract_answer`; a text without a mark
    states nothing, whatever numbers are in it.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    for statement in _statements(text, truncated=False):
        if _read(statement) is not None or normalize_answer(statement.line) is not None:
            return statement.line.strip(_MARKUP).rstrip(".").rstrip(_MARKUP) or None
    return None


def json_field(name: str) -> Extractor:
    """An extractor of one field of the last JSON object in a text that has it, normalised; None where there is none.

    Objects inside of others do not count, nor what is inside of one that was cut or is no JSON. A value that is no
    text, number or truth value is compared as compact JSON with sorted keys.
    """

    def extract(text: str) -> str | None:
        decoder = json.JSONDecoder()
        found = None
        position = text.find("{")
        while position >= 0:
            try:
                value, end = decoder.raw_decode(text, position)
            except json.JSONDecodeError as error:  # a brace that begins no JSON, or one that was cut
                end = max(error.pos, position + 1)
            except (ValueError, RecursionError):  # numbers too long, or objects too deep, to be read
                break
            else:
                if value.get(name) is not None:
                    found = _from_json(value[name])
            position = text.find("{", end)
        return found

    return extract


def json_text(text: str) -> str | None:
    """A text that is one JSON value, in a form that does not depend on spaces or the order of keys; else None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return None if value is None else _from_json(value)


def extractor_of(extract: str | Callable[[str], str | None]) -> Extractor:
    """The extractor of that name, or the callable itself.

    Args:
        extract: ``answer`` (:func:`extract_answer`), ``text`` (all of it, normalised), ``json`` (all of it, which is
            JSON), ``json:FIELD``, or a callable.

    Raises:
        OptionError: no such name.
    """
    if callable(extract):
        return extract
    if extract == "answer":
        return extract_answer
    if extract == "text":
        return normalize_answer
    if extract == "json":
        return json_text
    if isinstance(extract, str) and extract.startswith("json:") and extract != "json:":
        return json_field(extract.removeprefix("json:"))
    raise OptionError(f"extract: must be answer, text, json, json:FIELD or a callable, got {extract!r}")


def branch_answer(text: str, extract: str | Callable[[str], str | None] = "answer", *, truncated: bool) -> str | None:
    """The answer with which a branch votes.

    A branch that was cut votes with an answer that it stated, where ``extract`` is ``answer``, and with a field of a
    JSON object that is complete; all of a text that was cut is no answer. What a callable finds is for its author to
    judge.

    Raises:
        OptionError: no such extractor, or a callable returned something else than a string or None.
    """
    if extract == "answer":
        return extract_answer(text, truncated=truncated)
    if truncated and extract == "text":
        return None
    answer = extractor_of(extract)(text)
    if answer is not None and not isinstance(answer, str):
        raise OptionError(f"extract: must return a string or None, got {type(answer).__name__}")
    return answer or None


def normalize_answer(text: str) -> str | None:
    r"""One form for equal answers; None where nothing is left. Normalising twice changes nothing more.

    Numbers lose separators, currency signs and trailing zeros, and keep ``%``; ``a/b`` and ``\frac{a}{b}`` become
    ``a/b``, unreduced; words become lower case without the punctuation around them.
    """
    form = _normalize_once(text)
    while (again := _normalize_once(form)) != form:
        form = again
    return form or None


def _last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` that is closed and says something."""
    closed_at = _closing_braces(text)
    for box in reversed(list(_BOXED.finditer(text))):
        end = closed_at.get(box.end() - 1)
        content = "" if end is None else text[box.end() : end]
        if not _PLACEHOLDER.fullmatch(content.strip(_MARKUP)) and normalize_answer(content) is not None:
            return content
    return None


def _closing_braces(text: str) -> dict[int, int]:
    """Where each brace that is closed closes: position of ``{`` to that of its ``}``."""
    closed_at: dict[int, int] = {}
    pending: list[int] = []
    for brace in re.finditer(r"[{}]", text):
        if brace.group() == "{":
            pending.append(brace.start())
        elif pending:
            closed_at[pending.pop()] = brace.start()
    return closed_at


@dataclass(frozen=True)
class _Statement:
    """What follows a mark on its line.

    Attributes:
        line: as it was written.
        read: of the line, what is before the next mark: an answer is looked for there.
        labelled: a label is before it ("answer:"), rather than prose ("the answer is").
        ends: its line ends before the text does.
    """

    line: str
    read: str
    labelled: bool
    ends: bool


@dataclass(frozen=True)
class _Found:
    """An answer in a statement.

    Attributes:
        answer: normalised.
        is_complete: what follows it shows that the answer itself was not cut.
    """

    answer: str
    is_complete: bool


def _statements(text: str, truncated: bool) -> Iterator[_Statement]:
    """All statements that are no remark, reference or placeholder, the latest first."""
    last, next_mark = len(text.rstrip()), len(text)
    for mark in reversed(list(_MARK.finditer(text))):
        end = text.find("\n", mark.end())
        line, ends = text[mark.end() : end if end >= 0 else len(text)], end >= 0
        read, next_mark = line[: next_mark - mark.end()], mark.start()
        if mark["link"] is None:
            if _is_final_line(line, is_last=not truncated and mark.end() + len(line) >= last):
                yield _Statement(line, read, True, ends)
            continue
        labelled = mark["link"].lower() != "is" or mark.group().rstrip().endswith(":")
        bare = line.strip(_MARKUP)
        clause_end = _CLAUSE_END.search(line)
        clause = (line if clause_end is None else line[: clause_end.start()]).strip(_PUNCTUATION)
        is_remark = not labelled and _REMARK.match(line) is not None
        if not (is_remark or _REFERENCE.match(bare) or _PLACEHOLDER.fullmatch(clause) or _UNKNOWN.fullmatch(clause)):
            yield _Statement(line, read, labelled, ends)


def _is_final_line(line: str, is_last: bool) -> bool:
    """Whether what follows ``####`` is an answer as GSM8K has it, rather than a heading."""
    plain = _unwrapped(_without_latex(line))
    number = _GSM8K.fullmatch(plain)
    if number is not None:
        unit = number["unit"]
        return not unit.strip(" %") or (unit == unit.lower() and is_unit(unit) and len(unit.split()) <= 2)
    if _CHOICE.fullmatch(plain) or _DECISION.fullmatch(plain) or _EXPRESSION.fullmatch(plain):
        return True
    several = _NUMBER_LIST.fullmatch(plain) is not None
    return several or (is_last and _is_name(plain))


def _from_json(value: object) -> str | None:
    if isinstance(value, (dict, list)):
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    return normalize_answer(value if isinstance(value, str) else json.dumps(value))


def _from_boxed(content: str) -> str | None:
    """A box holds nothing but the answer: at most units follow its number."""
    plain = _unwrapped(_without_latex(content))
    number = NUMBER_IN_TEXT.match(plain)
    if number and is_unit(plain[number.end() :]):
        return normalize_answer(number.group("number"))
    return normalize_answer(content)


def _read(statement: _Statement) -> _Found | None:
    """The answer in what follows "the answer is"; None where nothing in it looks like one."""
    plain = _without_latex(_OPEN_BOX.sub("", statement.read)).lstrip(_MARKUP)
    for opening in (_FILLER, _CORRECTED):
        opened = opening.match(plain)
        plain = plain[opened.end() :] if opened else plain
    if re.match(r"not\b", plain, re.IGNORECASE):
        return None
    choice = _CHOICE.match(plain)
    if choice:
        rest = plain[choice.end() :]
        return _Found(_letter(choice), choice["round"] is not None or re.match(r"\)|[\s.:,*_]+\S", rest) is not None)
    while calculation := _CALCULATION.match(plain):
        plain = plain[calculation.end() :]
    point = _TUPLE.match(plain)
    if point and "," in (answer := normalize_answer(point.group(0)) or ""):  # (1,200) is a number
        return _Found(answer, _is_followed(plain, point.end()))
    opened = _OPENED.match(plain)
    plain = plain[opened.end() :] if opened else plain
    expression, several, decision = _EXPRESSION.match(plain), _NUMBER_LIST.match(plain), _DECISION.match(plain)
    if expression:  # not worked out: its first number is not the answer
        answer = re.sub(r"\s*([+*×÷·^])\s*", r" \1 ", expression.group(0))
        return _Found(answer, _is_followed(plain, expression.end()))
    if several:
        parts = re.split(r"\s*(?:,\s*and|,|;|and)\s+", several.group(0))
        answer = ", ".join(normalize_answer(part) or part for part in parts)
        return _Found(answer, _is_followed(plain, several.end()))
    if decision:
        return _Found(decision.group(1).lower(), bool(plain[decision.end() :].strip(_MARKUP)))
    return _number_in(plain) if NUMBER_IN_TEXT.search(_sentence(plain)) else _name_in(plain, statement)


def _sentence(plain: str) -> str:
    end = _SENTENCE_END.search(plain)
    return plain if end is None else plain[: end.start()]


def _number_in(plain: str) -> _Found | None:
    """The number that the first sentence gives; None where it only says how to work one out."""
    sentence = _sentence(plain)
    number = NUMBER_IN_TEXT.search(sentence)
    assert number is not None
    if _OPERATION.search(sentence[: number.start()]) or _OPERATION_ON.match(sentence[number.end() :]):
        results = list(_RESULT.finditer(sentence))
        number = NUMBER_IN_TEXT.search(sentence, results[-1].end()) if results else None
    if number is None:
        return None
    answer = normalize_answer(number.group("number"))
    return None if answer is None else _Found(answer, _is_followed(plain, number.end()))


def _name_in(plain: str, statement: _Statement) -> _Found | None:
    """Words that are an answer: a short name, or any where they are marked as the answer."""
    sentence = _sentence(plain)
    if statement.labelled or _FULL_NAME.fullmatch(statement.read) or _LIST_OF_WORDS.fullmatch(sentence):
        name = sentence
    else:
        end = _NAME_END.search(plain)
        name = plain if end is None else plain[: end.start()]
        if not _is_name(name):
            if not _is_claim(sentence):
                return None
            name = sentence
    rest = plain[len(name) :]
    answer = normalize_answer(name)
    return None if answer is None else _Found(answer, bool(rest.strip(_MARKUP)))


def _is_name(text: str) -> bool:
    """Whether words could name something: a few, or a list of such, none of which makes a sentence of them."""
    if len(text.split()) > 1 and text.isupper():
        return True
    items = [item.split() for item in text.split(",")]
    longest = _LONGEST_NAME if len(items) == 1 else 3
    return max(len(item) for item in items) <= longest and _SENTENCE_WORD.search(text) is None


def _is_claim(sentence: str) -> bool:
    """Whether a sentence says something about somebody or something by name: "Ann is a knight, and Bob is a knave"."""
    first = re.match(r"[^\W\d_]+", sentence)
    return first is not None and first.group().istitle() and _SENTENCE_WORD.fullmatch(first.group()) is None


def _is_followed(plain: str, end: int) -> bool:
    return _FOLLOWED.match(plain, end) is not None


def _letter(match: re.Match[str]) -> str:
    return next(letter for letter in match.groups() if letter is not None).lower()


def _without_latex(text: str) -> str:
    """Mathematical markup as plain characters; typographic dashes as ``-``."""
    plain = text.translate(_DASHES)
    plain = re.sub(r"\{,\}", ",", plain)
    plain = re.sub(r"\\[!,;:]|\\(?:left|right)(?![A-Za-z])", "", plain)
    plain = re.sub(r"(?<=[0-9])\s*(?=\\[dt]?frac\s*\{)", " ", plain)  # a mixed number
    plain = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", plain)
    plain = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", plain)
    plain = re.sub(r"\\[()\[\]]", " ", plain)  # where mathematics begins and ends
    return re.sub(r"\\([$%{}])", r"\1", plain)


def _unwrapped(text: str) -> str:
    """Without the punctuation around it, and without brackets that enclose all of it."""
    bare = text.strip(_MARKUP).rstrip(_PUNCTUATION)
    while len(bare) > 1 and _encloses(bare):
        bare = bare[1:-1].strip(_MARKUP).rstrip(_PUNCTUATION)
    return bare


def _encloses(text: str) -> bool:
    opening, closing = text[0], _WRAPPERS.get(text[0])
    if closing is None or text[-1] != closing:
        return False
    if opening in "([" and "," in text and normalize_number(text[1:-1].strip(_MARKUP)) is None:
        return False  # a point or a list, whose order counts
    return opening not in text[1:-1] and closing not in text[1:-1]


def _normalize_once(text: str) -> str:
    bare = _unwrapped(_without_latex(text))
    number = normalize_number(bare)
    if number is not None:
        return number
    return re.sub(r"\s+", " ", bare.lower()).strip(_PUNCTUATION)
