"""Which branch is taken, from scores, confidences and answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rksc_sgl.errors import OptionError, VerificationError
from rksc_sgl.frontend.answers import majority


@dataclass(frozen=True)
class Candidate:
    """What selection knows of one branch that did not fail.

    Attributes:
        index: its position in the group.
        text: the generated text.
        answer: the answer extracted from it, None where there is none.
        score: P(affirmative label) of its verification; None where it was not verified.
        confidence: mean top-1 probability of its tokens; None where it was not measured.
    """

    index: int
    text: str
    answer: str | None
    score: float | None
    confidence: float | None


Selector = Callable[[Sequence[Candidate]], int]
"""Takes the candidates (never empty) and returns the ``index`` of one."""

NEEDS_SCORES = ("score", "weighted_majority")
NAMES = ("score", "weighted_majority", "majority")


def score_of(candidate: Candidate) -> float:
    """RKSC's selection value: P(YES) * sqrt(confidence); a part that is missing counts as 1."""
    score = 1.0 if candidate.score is None else candidate.score
    confidence = 1.0 if candidate.confidence is None else candidate.confidence
    return score * math.sqrt(confidence)


def by_score(candidates: Sequence[Candidate]) -> int:
    """The highest ``score * sqrt(confidence)``; the first of equals. Source: RKSC (arXiv 2606.09937)."""
    return max(candidates, key=lambda one: (score_of(one), -one.index)).index


def unresolved(candidates: Sequence[Candidate], errors: Sequence[float]) -> list[int]:
    """Whose exact verdict the selection by score still hangs on.

    The rule under which selections are certified: a foreseen margin may be off by its error, and the leader stands
    only where its score at ``margin - error`` is above every other's at ``margin + error``.

    Args:
        candidates: at least one, with scores.
        errors: for each, how far the log-odds of its score may be off; 0 where the score is exact.

    Returns:
        Places of candidates with an error whose interval reaches the leader's, the leader's own among them; empty
        where the leader stands.
    """
    low = [score_of(_moved(one, -error)) for one, error in zip(candidates, errors, strict=True)]
    high = [score_of(_moved(one, error)) for one, error in zip(candidates, errors, strict=True)]
    leader = max(range(len(candidates)), key=lambda place: (score_of(candidates[place]), -place))
    rivals = [place for place in range(len(candidates)) if place != leader and high[place] >= low[leader]]
    return [place for place in sorted([leader, *rivals]) if errors[place] > 0.0] if rivals else []


def _moved(candidate: Candidate, by: float) -> Candidate:
    """The candidate with the log-odds of its score moved."""
    score = candidate.score
    if score is None or by == 0.0 or score in (0.0, 1.0):
        return candidate
    return replace(candidate, score=_sigmoid(math.log(score / (1.0 - score)) + by))


def candidates_of(margins: Sequence[float], confidences: Sequence[float]) -> list[Candidate]:
    """Branches of which only the verdicts' log-odds and the confidences are known, in their order."""
    pairs = zip(margins, confidences, strict=True)
    return [Candidate(index, "", None, _sigmoid(margin), value) for index, (margin, value) in enumerate(pairs)]


def _sigmoid(odds: float) -> float:
    """Without overflow."""
    return 0.5 * (1.0 + math.tanh(0.5 * odds))


def by_majority(candidates: Sequence[Candidate]) -> int:
    """The answer that most branches give (self-consistency); among those the most confident branch."""
    weights = [1.0] * len(candidates)
    return _voted(candidates, weights)


def by_weighted_majority(candidates: Sequence[Candidate]) -> int:
    """The answer with the largest sum of ``score * sqrt(confidence)``."""
    return _voted(candidates, [score_of(one) for one in candidates])


def selector_of(select: str | Selector) -> Selector:
    """The selector of that name, or the callable itself.

    Raises:
        OptionError: no such name.
    """
    if callable(select):
        return select
    named = {"score": by_score, "majority": by_majority, "weighted_majority": by_weighted_majority}
    if select not in named:
        raise OptionError(f"select: must be one of {', '.join(NAMES)} or a callable, got {select!r}")
    return named[select]


def choose(select: str | Selector, candidates: Sequence[Candidate]) -> int:
    """Apply a selector and check what it returns.

    Raises:
        VerificationError: no candidates.
        OptionError: a callable returned something else than the index of a candidate.
    """
    if not candidates:
        raise VerificationError("no branch produced an answer: there is nothing to select from")
    index = selector_of(select)(candidates)
    if index not in [candidate.index for candidate in candidates]:
        raise OptionError(
            f"select: must return the index of a candidate, one of "
            f"{[candidate.index for candidate in candidates]}, got {index!r}"
        )
    return index


def _voted(candidates: Sequence[Candidate], weights: Sequence[float]) -> int:
    position = majority([candidate.answer for candidate in candidates], list(weights))
    if position is None:  # no branch has an answer that can be compared
        return by_score(candidates)
    alike = [one for one in candidates if one.answer == candidates[position].answer]
    return by_score(alike)
