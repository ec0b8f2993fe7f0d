"""Which branch is taken, from scores, confidences and answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rksc_sgl.answers import classes_of, majority
from rksc_sgl.early_exit import selection
from rksc_sgl.early_exit.selection import Floats, Groups
from rksc_sgl.errors import OptionError, VerificationError


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

NAMES = ("vote", "score", "weighted_majority", "majority")


def by_score(candidates: Sequence[Candidate]) -> int:
    """The highest ``score * sqrt(confidence)``; the first of equals. Source: RKSC (arXiv 2606.09937).

    A part that is missing counts as 1.
    """
    ordered = sorted(candidates, key=lambda one: one.index)
    (leader,) = Groups.one(len(ordered)).leaders(_scores(ordered))
    return ordered[leader].index


def unresolved(candidates: Sequence[Candidate], errors: Sequence[float]) -> list[int]:
    """Places of the candidates whose exact verdict the selection by score still hangs on.

    :func:`rksc_sgl.early_exit.selection.unresolved`, the rule under which selections are certified.

    Args:
        candidates: at least one; a score that is missing counts as 1.
        errors: for each, how far the log-odds of its score may be off; 0 where the score is exact.
    """
    margins, groups = selection.log_odds(_probabilities(candidates)), Groups.one(len(candidates))
    flags = selection.unresolved(margins, np.array(errors, dtype=np.float64), _confidences(candidates), groups)
    return [int(place) for place in np.flatnonzero(flags)]


def candidates_of(margins: Sequence[float], confidences: Sequence[float]) -> list[Candidate]:
    """Branches of which only the verdicts' log-odds and the confidences are known, in their order."""
    scores = selection.probability_of(np.array(margins, dtype=np.float64)).tolist()
    pairs = zip(scores, confidences, strict=True)
    return [Candidate(index, "", None, score, confidence) for index, (score, confidence) in enumerate(pairs)]


def _scores(candidates: Sequence[Candidate]) -> Floats:
    return selection.score(_probabilities(candidates), _confidences(candidates))


def _probabilities(candidates: Sequence[Candidate]) -> Floats:
    return np.array([1.0 if one.score is None else one.score for one in candidates], dtype=np.float64)


def _confidences(candidates: Sequence[Candidate]) -> Floats:
    return np.array([1.0 if one.confidence is None else one.confidence for one in candidates], dtype=np.float64)


def tied_leaders(answers: Sequence[str | None]) -> list[int]:
    """Places of the branches whose answer no other answer has more votes than; of several answers where they tie.

    Empty where fewer than two branches have an answer: there is nothing to compare.
    """
    classes = classes_of(answers)
    votes = Counter(name for name in classes if name is not None)
    if votes.total() < 2:
        return []
    most = max(votes.values())
    return [place for place, name in enumerate(classes) if name is not None and votes[name] == most]


def by_vote(candidates: Sequence[Candidate]) -> int:
    """The most frequent answer; of several, the one with the largest sum of scores; without answers, the best score.

    Among the branches that give it, the one with the best score; where nothing was verified that is the most confident.
    """
    leaders = [candidates[place] for place in tied_leaders([one.answer for one in candidates])]
    return by_weighted_majority(leaders) if leaders else by_score(candidates)


def by_majority(candidates: Sequence[Candidate]) -> int:
    """The answer that most branches give (self-consistency); among those the most confident branch."""
    weights = [1.0] * len(candidates)
    return _voted(candidates, weights)


def by_weighted_majority(candidates: Sequence[Candidate]) -> int:
    """The answer with the largest sum of ``score * sqrt(confidence)``."""
    return _voted(candidates, _scores(candidates).tolist())


def selector_of(select: str | Selector) -> Selector:
    """The selector of that name, or the callable itself.

    Raises:
        OptionError: no such name.
    """
    if callable(select):
        return select
    named = {"vote": by_vote, "score": by_score, "majority": by_majority, "weighted_majority": by_weighted_majority}
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
    classes = classes_of([one.answer for one in candidates])
    alike = [one for one, name in zip(candidates, classes, strict=True) if name == classes[position]]
    return by_score(alike)


def ranking(select: str | Selector, candidates: Sequence[Candidate], first: int) -> list[int]:
    """The ``index`` of every candidate in the order of the selection.

    Where answers decide, the other branches with the first one's answer come next, by score, then the selection among
    the rest, and so on; else the selection is repeated among what is left.

    Args:
        select: as in :func:`choose`.
        candidates: at least one.
        first: the candidate that was selected.
    """
    by_answer = select in ("vote", "majority", "weighted_majority")
    classes = dict(zip([one.index for one in candidates], classes_of([one.answer for one in candidates]), strict=True))
    order: list[int] = []
    left = list(candidates)
    while left:
        chosen = choose(select, left) if order else first
        order.append(chosen)
        left = [one for one in left if one.index != chosen]
        if by_answer and classes[chosen] is not None:
            alike = [one for one in left if classes[one.index] == classes[chosen]]
            while alike:
                order.append(by_score(alike))
                alike = [one for one in alike if one.index != order[-1]]
            left = [one for one in left if one.index not in order]
    return order
