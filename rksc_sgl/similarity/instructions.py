"""Instructions around a question that do not change what is asked, and where they may be left out.

A sentence is such an instruction only as a whole, by the grammar below: "Think step by step." is one, "The teacher is
kind." is not, though it has no other words. It may be left out only at the edges of the one question of a chat: before
it, or directly after it. The rest of the text must ask by itself, must not speak with its reader, and must not point
back at what is left out; then the whole system text may go too, if it is made of such sentences.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from rksc_sgl.similarity import wording

# --- the grammar: lower case, words and single commas ----------------------------------------------------------------

_MATERIAL = (  # what there is to solve
    r"(?:it|this|the following|each (?:one|part)|(?:word|math|maths) problems"
    r"|(?:(?:the|this|my|our|every|each) )?(?:following )?(?:(?:math|maths|word) )*"
    r"(?:problem|question|exercise|task|puzzle)(?: below)?)"
)
_SOLUTION = (  # what there is to tell; "the number" of nothing in particular
    r"(?:(?:the|your|a|an|all|all the|all your|each|every) )?(?:(?:final|correct|full|complete|clear|detailed) )?"
    r"(?:answers?|solution|result|reasoning|work|working|thinking|steps?|calculations?|number"
    r"|(?:short |brief )?(?:derivation|explanation))"
)
_MANNER = (
    r"(?: (?:carefully|thoroughly|clearly|logically|accurately|precisely|properly|systematically|methodically|patiently"
    r"|well|step[ -]by[ -]step|one step at a time|line by line|in detail|for (?:me|us)"
    r"|as (?:accurately|carefully|clearly|precisely|well|thoroughly) as (?:you can|possible)))"
)
_BEFORE = (
    r"(?: before (?:you (?:answer|begin|start)|answering|(?:you give|giving) (?:an|the|your) (?:final )?answer"
    r"|solving " + _MATERIAL + "))"
)
_SOLVE = r"(?:solve|answer|tackle|consider|understand|read|work (?:on|through|out)|think (?:about|through))"
_TELL = r"(?:show|give|state|write|report|explain|present|provide)"
_COMMAND = (
    r"(?:"
    + "|".join(
        (
            rf"{_SOLVE} {_MATERIAL}{_MANNER}*{_BEFORE}?",
            rf"read {_MATERIAL} (?:twice|again){_BEFORE}?",
            rf"(?:think|reason|work)(?: (?:it|this|everything) through)?{_MANNER}*{_BEFORE}?",
            rf"(?:answer|respond){_MANNER}+",
            rf"{_TELL} (?:(?:me|us) )?{_SOLUTION}{_MANNER}*",
            r"give the answer as one number",
            r"(?:explain|show)(?: (?:me|us))? how you (?:got|found|reached|arrived at) (?:the|your) (?:answer|result)",
            r"(?:find|compute|calculate|determine) (?:what is asked|the (?:final )?(?:answer|solution|result))",
            r"(?:check|double-check) (?:your|the) (?:work|answer|arithmetic|calculations|reasoning)",
            r"break (?:it|this|the problem|the question) (?:down )?into (?:small |smaller |simple )?(?:steps|parts)",
            r"list the quantities that are given",
            r"take your time|take a deep breath|do your best",
            rf"help (?:me|us) (?:with|solve) {_MATERIAL}{_MANNER}*",
        )
    )
    + ")"
)
_CALL = r"(?:please|kindly|now|first|then|let's|let us|you should|you must)"
_COMMANDS = (  # "give a short derivation and then the answer as one number" has one verb for two objects
    rf"(?:{_CALL},? )*{_COMMAND}"
    rf"(?:(?:,? and|,) (?:(?:{_CALL} )*{_COMMAND}|(?:then )?the answer(?: as one number)?))*(?:,? please)?"
)
_GREETING = r"(?:(?:hi|hello|hey)(?: there)?)"
_ROLE = (
    r"(?:a|an|the) (?:(?:helpful|careful|patient|friendly|kind|good|great|brilliant|skilled|talented|experienced|expert"
    r"|thorough) )*(?:(?:math|maths|mathematics|ai) )?"
    r"(?:assistant|tutor|teacher|mathematician|expert|(?:problem )?solver)(?: (?:in|at) (?:math|maths|mathematics))?"
)
_WHO = rf"(?: who (?:(?:explains|shows) {_SOLUTION}|(?:solves|answers) {_MATERIAL}|thinks|reasons){_MANNER}*)?"
_SENTENCE = re.compile(
    r"(?:"
    + "|".join(
        (
            rf"(?:{_GREETING},? )?{_COMMANDS}",
            rf"(?:{_GREETING},? )?(?:i|we)(?: would|'d) like you to {_COMMANDS}",
            rf"(?:{_GREETING},? )?(?:i|we) need (?:your )?help with {_MATERIAL}",
            _GREETING,
            r"thank you(?: very much| in advance)?|thanks(?: a lot| in advance)?|good luck",
            rf"you are {_ROLE}{_WHO}",
            rf"you (?:solve|answer) {_MATERIAL}{_MANNER}*",
            r"(?:here is|here's) (?:(?:a|an|one|the|my) )?(?:(?:math|maths|word) )*"
            r"(?:problem|question|exercise|task|puzzle|one)(?: for you)?",
            rf"a student asks for help with {_MATERIAL}",
        )
    )
    + ")"
)
_REQUEST = re.compile(  # ends in a question mark and asks nothing but to go on
    rf"(?:{_GREETING},? )?(?:(?:can|could|will|would) you(?:,? please)? {_COMMANDS}"
    r"|what is the (?:final |correct )?(?:answer|result|solution))"
)
_LABEL_BEFORE = re.compile(r"(?:(?:math|maths|word) )*(?:problem|question|exercise|task|puzzle)")
_LABEL_AFTER = re.compile(r"(?:the )?(?:final )?(?:answer|solution|reasoning)")

# --- where they stand ------------------------------------------------------------------------------------------------

_LONGEST = 240  # characters of a sentence that is looked at
_MOST = 16  # sentences left out at each edge
_BLANK = " \t\r\n"  # and no other white space, which nobody sees
_PLAIN = rf"([A-Za-z][A-Za-z'’, -]{{1,{_LONGEST}}})"  # letters and commas; an instruction has nothing else
_FIRST = re.compile(rf"[{_BLANK}]*{_PLAIN}(?:([.!?:])(?=[{_BLANK}]|\Z)|(?=\n[{_BLANK}]*[^a-z{_BLANK}])|\Z)")
_LAST = re.compile(rf"(?:\A|[.!?:][{_BLANK}]+|\n[{_BLANK}]*){_PLAIN}([.!?:]?)[{_BLANK}]*\Z")
_ASKS = re.compile(rf"\?(?=[\"')\]]*(?:\s|\Z))|(?:\A|[.!?:]\s|\n)\s*(?:{'|'.join(sorted(wording.ASKING))})\b", re.I)
_LAST_ASKS = re.compile(
    rf"(?:\A|[.!?:]\s|\n)\s*(?:{'|'.join(sorted(wording.ASKING))})\b(?:[^.?!:\n]|\.(?=\S))*\Z", re.I
)
_ASKS_A_NUMBER = re.compile(  # and nothing else: "Who won? Give the number." asks for another answer than "Who won?"
    r"\bhow (?:many|much|old|long|far)\b[^.?\n]*\?\s*\Z"
    r"|\bwhat(?: is| was| are| will be|['’]s) the (?:\w+ ){0,2}(?:number|amount|sum|total|average|cost|price|age)\b"
    r"[^.?\n]*\?\s*\Z"
    r"|\b(?:calculate|compute) [^.?\n]*[.?]\s*\Z",
    re.I,
)
_STOP = re.compile(r"[.!?:](?:\s|\Z)|\n")
_WORD = re.compile(r"[^\W\d_]+")


class Turn(NamedTuple):
    """What one chat marker begins.

    Attributes:
        marker: as it is written; empty before the first marker of a text.
        role: ``user``, ``system`` or ``assistant``; empty for markers that end a turn.
        body: the text up to the next marker.
    """

    marker: str
    role: str
    body: str


@lru_cache(maxsize=8)  # of one text, asked for more than once
def words_of(text: str) -> frozenset[str]:
    """The words of a text in lower case."""
    return frozenset(_WORD.findall(text.lower()))


def without_instructions(turns: Sequence[Turn]) -> list[Turn]:
    """The turns without the instructions that do not change what is asked; all as they are where these may matter."""
    written = [turn for turn in turns if turn.body.strip(_BLANK)]
    users = [turn for turn in written if turn.role == "user" or not turn.marker]
    systems = [turn for turn in written if turn.role == "system"]
    if len(users) != 1 or len(systems) > 1 or len(written) > len(users) + len(systems):
        return list(turns)
    question = _question(users[0].body, " ".join(turn.body for turn in systems))
    if question is None or not all(is_harmless_text(turn.body) for turn in systems):
        return list(turns)
    kept: list[Turn] = []
    dropped = False  # whether the turn before is left out; then the marker that ends it goes too
    for turn in turns:
        if turn.role == "system":
            dropped = True
        elif not (dropped and not turn.role):
            dropped = False
            kept.append(turn._replace(body=question) if turn is users[0] else turn)
    return kept


def is_harmless(sentence: str, stop: str = ".") -> bool:
    """Whether a sentence is an instruction that does not change what is asked.

    Args:
        sentence: without the sign that ends it.
        stop: that sign; a question is harmless in other forms than a command.
    """
    plain = " ".join(sentence.lower().replace("’", "'").split())
    return (_REQUEST if stop == "?" else _SENTENCE).fullmatch(plain) is not None


def is_harmless_text(text: str) -> bool:
    """Whether a text is made of such instructions only."""
    return not text[_after_instructions(text) :].strip(_BLANK)


def _question(body: str, system: str) -> str | None:
    """A user's text without the instructions before and after its question; None where nothing may be left out."""
    start = _after_instructions(body)
    end = _before_instructions(body, start)
    content, left_out = body[start:end], f"{system} {body[:start]} {body[end:]}".lower()
    if not _ASKS.search(content):
        return None
    if content.count("```") % 2 or content.count('"') % 2 or content.count("“") != content.count("”"):
        return None  # an edge may be inside of code or a quotation
    words = words_of(content)
    lone = not _STOP.search(content.strip().rstrip(".?!:"))
    points = lone and left_out.strip() and words & wording.POINTING_BACK  # "Solve this puzzle. Who wrote it?"
    named = words & wording.POINTED_AT & words_of(left_out)
    other_answer = "number" in left_out and not (content.count("?") <= 1 and _ASKS_A_NUMBER.search(content))
    return None if points or named or other_answer or words & wording.READER else content


def _after_instructions(text: str) -> int:
    """Where the instructions at the beginning of a text end."""
    start = 0
    for _ in range(_MOST):
        match = _FIRST.match(text, start)
        if match is None:
            break
        sentence, stop = match[1], match[2] or ""
        label = stop == ":" and _LABEL_BEFORE.fullmatch(" ".join(sentence.lower().split()))
        if not (label or is_harmless(sentence, stop)):
            break
        start = match.end()
    return start


def _before_instructions(text: str, start: int) -> int:
    """Where the instructions at the end of a text begin, if they stand directly after a question; else its end."""
    end = len(text)
    for _ in range(_MOST):
        window = max(start, end - _LONGEST - 40)
        match = _LAST.search(text[window:end])
        if match is None or (match.start(1) == 0 and window > start):
            break  # no sentence, or one whose beginning is not in the window
        sentence, stop = match[1], match[2]
        label = stop == ":" and _LABEL_AFTER.fullmatch(" ".join(sentence.lower().split()))
        if not (label or (stop != ":" and is_harmless(sentence, stop))):
            break
        end = window + match.start(1)
    rest = text[max(start, end - 1000) : end].rstrip()
    return end if rest.endswith("?") or _LAST_ASKS.search(rest.rstrip(".")) else len(text)
