"""The selection by score, and the verdicts that it depends on. B branches in one or many groups.

``verify_gated`` selects with this code, and calibration simulates the selection with it. Source of the score: RKSC
(arXiv 2606.09937).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]
Flags: TypeAlias = npt.NDArray[np.bool_]


def score(probability: Floats, confidence: Floats) -> Floats:
    """``P(YES) * sqrt(confidence)`` ``[B]``: what a branch is selected by."""
    return probability * np.sqrt(confidence)


def probability_of(margin: Floats) -> Floats:
    """P(YES) ``[B]`` of log-odds, without overflow; 0 and 1 at infinite ones."""
    return 0.5 * (1.0 + np.tanh(0.5 * margin))


def log_odds(probability: Floats) -> Floats:
    """Log-odds ``[B]`` of P(YES); infinite at 0 and 1."""
    with np.errstate(divide="ignore"):
        return np.log(probability / (1.0 - probability))


@dataclass(frozen=True)
class Groups:
    """Which branches compete with each other. Groups are kept in a sorted order, so that nothing loops over them.

    Attributes:
        index: ``[B]`` group of each branch, from 0.
        starts: ``[groups]`` where each begins in an order sorted by group.
        sizes: ``[groups]``.
    """

    index: Integers
    starts: Integers
    sizes: Integers

    @classmethod
    def of(cls, names: Integers) -> Groups:
        """From the name of each branch's group ``[B]``, in any order; groups are numbered by ascending name."""
        _, index, sizes = np.unique(names, return_inverse=True, return_counts=True)
        return cls(index, np.cumsum(sizes) - sizes, sizes)

    @classmethod
    def one(cls, branches: int) -> Groups:
        """All branches in one group."""
        return cls.of(np.zeros(branches, dtype=np.int64))

    def leaders(self, scores: Floats) -> Integers:
        """``[groups]`` the branch with the highest score, the first of equals."""
        return np.lexsort((np.arange(scores.size), -scores, self.index))[self.starts]

    def mean(self, losses: Flags) -> Floats:
        """``[groups]`` mean loss of each."""
        return np.bincount(self.index, weights=losses, minlength=self.sizes.size) / self.sizes

    def any(self, flags: Flags) -> Flags:
        """``[groups]`` whether any of a group's."""
        return np.bincount(self.index, weights=flags, minlength=self.sizes.size) > 0


def unresolved(margin: Floats, error: Floats, confidence: Floats, groups: Groups) -> Flags:
    """Whose exact verdict the selection by score still depends on.

    A margin may be off by its error. The leader stands only where its score at ``margin - error`` is above every
    other's of its group at ``margin + error``; else the leader and those that reach it are unresolved, as far as
    their verdicts are not exact.

    Args:
        margin: ``[B]`` log-odds of the verdicts; may be infinite.
        error: ``[B]`` at least 0; 0 where the verdict is exact.
        confidence: ``[B]`` 0 to 1.
        groups: of the B branches.

    Returns:
        ``[B]`` whether a branch must be asked again at full depth.
    """
    leaders = groups.leaders(score(probability_of(margin), confidence))
    lower = score(probability_of(margin - error), confidence)[leaders]
    rivals = score(probability_of(margin + error), confidence) >= lower[groups.index]
    rivals[leaders] = False
    contested = rivals.copy()
    contested[leaders] = groups.any(rivals)
    return contested & (error > 0.0)
