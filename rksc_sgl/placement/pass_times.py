"""What a pass costs before it computes, learned from passes that were timed.

On an accelerator a pass of few tokens takes as long as its launches and one of many as long as its arithmetic:
``max(a, b * tokens)`` seconds. Short passes show ``a``, long ones ``b``; what counts is ``a / b``, the tokens whose
computation takes as long as the launches. Which passes are short and which long follows from what is known so far, so
that an estimate that was far off is approached in a few steps.
"""

from __future__ import annotations

import json
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rksc_sgl.calibration.atomic_write import write_atomically
from rksc_sgl.placement.worth import PassCost

KEPT = 256  # passes
ENOUGH = 8  # of the short ones and of the long ones
EVERY = 16  # passes between two estimates
SHORT, LONG = 0.25, 2.0  # times what is known
LOOKS = 5  # that are timed
NEWS = 0.1  # a change by less is not kept
MOST = 1_000_000  # tokens; what is more was not measured but is a fault of a clock


@dataclass(frozen=True)
class Timed:
    """A pass in which every token went through all layers.

    Attributes:
        tokens: that it computed, of all sequences.
        seconds: from its first launch to its last result.
    """

    tokens: int
    seconds: float


class PassTimes:
    """Learns from timed passes of one server.

    Args:
        known: what is taken to be true before enough was seen.
        source: where that is from.
    """

    def __init__(self, known: PassCost, source: str) -> None:
        self.cost, self.source = known, source
        self.learned = False  # whether enough was seen to replace what was known
        self._passes: deque[Timed] = deque(maxlen=KEPT)
        self._seen = 0
        self._looks: list[float] = []

    def note(self, one: Timed) -> None:
        """A pass was timed."""
        if one.tokens < 1 or not one.seconds > 0.0:
            return
        self._passes.append(one)
        self._seen += 1
        if self._seen % EVERY == 0:
            self._learn()

    def note_look(self, seconds: float) -> None:
        """A look at which verifications may leave was timed; the first one, which warms up, does not count."""
        self._looks.append(seconds)
        self._learn()

    @property
    def wants_looks(self) -> bool:
        """Whether looks are still to be timed."""
        return len(self._looks) < LOOKS

    def _learn(self) -> None:
        found = tokens_of(self._passes, self.cost.tokens)
        if found is None:
            return
        tokens, rate = found
        self.cost = replace(self.cost, tokens=tokens)
        if len(self._looks) > 1:
            self.cost = replace(self.cost, look=statistics.median(self._looks[1:]) / rate)
        self.learned = True
        self.source = f"learned from {self._seen} passes"


def tokens_of_two(few: Timed, many: Timed, overlaps: bool) -> int:
    """What a pass costs before it computes, in tokens, from a short and a long one.

    Never more than the long one computed: where something else slowed the short one, the two may take the same time,
    which does not say that computing costs nothing.

    Args:
        few: the short pass.
        many: the long pass.
        overlaps: whether a pass computes while it still launches (:class:`~rksc_sgl.placement.worth.PassCost`).
    """
    computing = many.seconds / many.tokens if overlaps else (many.seconds - few.seconds) / (many.tokens - few.tokens)
    if few.seconds >= many.tokens * computing:
        return many.tokens
    return max(1, round(few.seconds / computing))


def tokens_of(passes: Sequence[Timed] | deque[Timed], known: int) -> tuple[int, float] | None:
    """What a pass costs before it computes, in tokens, and the seconds of a token; None where too little was seen.

    Args:
        passes: timed ones.
        known: what was taken to be true until now.
    """
    short = [one.seconds for one in passes if one.tokens <= max(1.0, SHORT * known)]
    long = [one.seconds / one.tokens for one in passes if one.tokens >= LONG * known]
    if min(len(short), len(long)) < ENOUGH:
        return None
    rate = statistics.median(long)
    return min(MOST, max(1, round(statistics.median(short) / rate))), rate


def differs(one: PassCost, other: PassCost) -> bool:
    """Whether two costs differ by more than a measurement does."""
    return abs(one.tokens - other.tokens) > NEWS * max(one.tokens, other.tokens)


def load(path: Path, overlaps: bool) -> PassCost | None:
    """What was kept of servers that serve the same model in the same way; None where nothing, or nothing legible."""
    try:
        found: Any = json.loads(path.read_text())
        tokens, look = found["tokens"], found["look"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    whole = type(tokens) is int and 0 <= tokens <= MOST
    legible = look is None or (isinstance(look, float) and look >= 0.0)
    return PassCost(tokens, overlaps, look) if whole and legible else None


def save(path: Path, cost: PassCost) -> None:
    """Keep a cost for servers to come.

    Raises:
        OSError: it could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"tokens": cost.tokens, "look": cost.look}).encode())
