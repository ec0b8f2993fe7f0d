r"""An exact sequential bound: when the first branches of a fork tell the vote of all of them.

The N answers of a fork are taken as given, whatever they are. Their order is random: branches are exchangeable draws,
so that every order of the same answers is equally likely. A look at the first k branches sees the leader's votes ``a``
and the strongest other answer's ``b``. The fork stops at the first look whose ``(k, a, b)`` lies in a region R, and
gives the leader's answer. What is bounded is

    P(it stops with another answer than the vote of all N), over the order, for the worst N answers.

Proof that the bound holds. Let W win the vote of all N, with T_W votes, and let another answer i have T_i <= T_W. To
stop with i, the walk of (votes of i, votes of W) must enter R at some k, because the strongest other answer has at
least W's votes, and R is closed under fewer votes for others. That walk is an urn of three kinds, i, W and the rest,
drawn without replacement; :func:`crossing` computes the probability that it ever enters R, over all looks at once, by
dynamic programming. So looking often costs exactly what it costs; no union bound over looks is needed. Stops with
different i exclude each other, so that their probabilities add up, and :func:`worst_case` takes the largest sum over
all ways to share N votes among answers (a knapsack). Where T_i = T_W, i loses only if W's first branch comes first;
the walk is restricted to those orders. Branches without an answer are part of the rest.

Which region does not matter for the proof, only for what is saved. Here it holds the ``(k, a, b)`` at which k / N times
the probability that the strongest other answer still catches up is at most a cutoff, where the probability is that of
a Polya urn (a uniform prior on the shares of leader, other and rest). :func:`boundary` takes the largest cutoff whose
worst case is within the risk. The statistic is that of Adaptive-Consistency (arXiv 2305.11860) with a finite number of
branches left; there it comes with no bound.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import ParamSpec, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln

from rksc_sgl.errors import OptionError

MAX_BRANCHES = 64  # the worst case of more takes too long to work out
_STEP_DOWN = 0.97  # from a cutoff whose worst case is too large
_REMEMBERED = 64  # boundaries, and statistics

Arguments = ParamSpec("Arguments")
Found = TypeVar("Found")
Floats: TypeAlias = npt.NDArray[np.float64]
Region: TypeAlias = npt.NDArray[np.bool_]


def _worked_out_once(function: Callable[Arguments, Found]) -> Callable[Arguments, Found]:
    """Remember what was found; threads that ask for the same at once wait for the first of them."""
    remembered = lru_cache(maxsize=_REMEMBERED)(function)
    locks = [threading.Lock() for _ in range(_REMEMBERED)]

    @wraps(function)
    def once(*arguments: Arguments.args, **named: Arguments.kwargs) -> Found:
        with locks[hash((arguments, *named.items())) % len(locks)]:
            return remembered(*arguments, **named)  # type: ignore[arg-type]

    return once


@dataclass(frozen=True, eq=False)
class Boundary:
    """When to stop.

    Attributes:
        branches: N.
        risk: bound on P(another answer than the vote of all N).
        cutoff: of the statistic.
        statistic: ``[N + 1, N + 1, N + 1]`` at ``[k, a, b]``; more votes for the leader or fewer for the next answer
            never raise it.
        statement: what is promised, as half a sentence.
    """

    branches: int
    risk: float
    cutoff: float
    statistic: Floats
    statement: str

    def reached(self, look: int, ahead: int, behind: int) -> bool:
        """Whether ``ahead`` votes of the first ``look`` branches decide, if no other has more than ``behind``."""
        return ahead > behind and bool(self.statistic[look, ahead, behind] <= self.cutoff)

    @property
    def region(self) -> Region:
        """``[k, a, b]``: where it stops."""
        return self.statistic <= self.cutoff


def boundary(branches: int, risk: float) -> Boundary:
    """The boundary with the largest cutoff whose worst case over all sets of answers is within the risk.

    Raises:
        OptionError: more branches than can be worked out, or a risk that is not between 0 and 1.
    """
    if not 1 <= branches <= MAX_BRANCHES:
        raise OptionError(f"branches: probable is worked out for 1 to {MAX_BRANCHES} branches, got {branches}")
    if not 0.0 < risk < 1.0:
        raise OptionError(f"risk: must be above 0 and below 1, got {risk!r}")
    return _boundary(branches, float(risk))


def calibrated_boundary(branches: int, risk: float, cutoff: float) -> Boundary:
    """The boundary with a cutoff from :func:`rksc_sgl.deciding.calibration.calibrate_cutoff`.

    Raises:
        OptionError: more branches than there is a statistic for, or a cutoff that is not between 0 and 1.
    """
    if not 1 <= branches <= MAX_BRANCHES:
        raise OptionError(f"branches: probable is worked out for 1 to {MAX_BRANCHES} branches, got {branches}")
    if not 0.0 < cutoff < 1.0:
        raise OptionError(f"cutoff: must be above 0 and below 1, got {cutoff!r}")
    return Boundary(
        branches,
        risk,
        cutoff,
        statistic(branches),
        f"P(another answer than that of all {branches}) <= {risk:g} over problems like those it was calibrated on",
    )


@_worked_out_once
def _boundary(branches: int, risk: float) -> Boundary:
    values = statistic(branches)
    cutoffs = np.unique(values[values < 1.0])
    low, high = -1, len(cutoffs) - 1
    while low < high:
        middle = (low + high + 1) // 2
        fits = _even_shares(branches, values <= cutoffs[middle]) <= risk
        low, high = (middle, high) if fits else (low, middle - 1)
    while low >= 0 and worst_case(branches, values <= cutoffs[low])[0] > risk:
        low = min(low, int(np.searchsorted(cutoffs, cutoffs[low] * _STEP_DOWN))) - 1
    cutoff = float(cutoffs[low]) if low >= 0 else 0.0
    return Boundary(
        branches,
        risk,
        cutoff,
        values,
        f"P(another answer than that of all {branches}) <= {risk:g} over the order of the branches",
    )


@_worked_out_once
def statistic(branches: int) -> Floats:
    """``[k, a, b]``: k / N times the probability that the strongest other answer still reaches the leader's votes.

    1 where it has already, and where no such votes are possible. Made monotone in a and b.
    """
    n = branches
    values = np.ones((n + 1, n + 1, n + 1))
    for look in range(1, n + 1):
        left = n - look
        ahead, behind = (array.ravel() for array in np.meshgrid(range(look + 1), range(look + 1), indexing="ij"))
        possible = (ahead > behind) & (ahead + behind <= look)
        ahead, behind = ahead[possible], behind[possible]
        grid = np.zeros((look + 1, look + 1))
        grid[ahead, behind] = look / n * _catches_up(ahead, behind, look - ahead - behind, left)
        grid = np.maximum.accumulate(grid[::-1], axis=0)[::-1]
        grid = np.maximum.accumulate(grid, axis=1)
        values[look, ahead, behind] = grid[ahead, behind]
    return values


def _catches_up(
    ahead: npt.NDArray[np.int_], behind: npt.NDArray[np.int_], rest: npt.NDArray[np.int_], left: int
) -> Floats:
    """P(behind + Y >= ahead + X) for ``left`` further draws of a Polya urn that began with one ball of each kind."""
    a, b, c = (array[:, None, None].astype(float) for array in (ahead, behind, rest))
    x, y = np.arange(left + 1.0)[None, :, None], np.arange(left + 1.0)[None, None, :]
    z = left - x - y
    inside = z >= 0
    z = np.maximum(z, 0.0)
    log = gammaln(left + 1) - gammaln(x + 1) - gammaln(y + 1) - gammaln(z + 1)
    log = log + gammaln(a + 1 + x) - gammaln(a + 1) + gammaln(b + 1 + y) - gammaln(b + 1)
    log = log + gammaln(c + 1 + z) - gammaln(c + 1) + gammaln(a + b + c + 3) - gammaln(a + b + c + 3 + left)
    reached = inside & (b + y >= a + x)
    total: Floats = np.where(reached, np.exp(log), 0.0).sum(axis=(1, 2))
    return np.minimum(total, 1.0)


def crossing(branches: int, region: Region, totals: Sequence[tuple[int, int]], *, winner_first: bool = False) -> Floats:
    """P(the walk of two answers' votes ever enters the region), for answers with these total votes.

    Args:
        branches: N.
        region: ``[k, a, b]``.
        totals: pairs of all votes of the answer that is taken for the leader, and of the winner.
        winner_first: count only orders in which the winner's first branch comes before the other's.

    Returns:
        One probability for each pair.
    """
    if not totals:
        return np.zeros(0)
    of_leader = np.array([pair[0] for pair in totals])[:, None, None]
    of_winner = np.array([pair[1] for pair in totals])[:, None, None]
    size_a, size_b = int(of_leader.max()) + 1, int(of_winner.max()) + 1
    a, b = np.arange(size_a)[None, :, None], np.arange(size_b)[None, None, :]
    rest = branches - of_leader - of_winner
    walk = np.zeros((len(totals), size_a, size_b))
    walk[:, 0, 0] = 1.0
    crossed = np.zeros(len(totals))
    left_a, left_b = np.maximum(of_leader - a, 0), np.maximum(of_winner - b, 0)
    for drawn in range(branches):
        after = walk * np.maximum(rest - (drawn - a - b), 0)
        after[:, 1:] += (walk * left_a)[:, :-1]
        after[:, :, 1:] += (walk * left_b)[:, :, :-1]
        after /= branches - drawn
        if winner_first:
            after[:, 1:, 0] = 0.0
        enters = region[drawn + 1, :size_a, :size_b]
        crossed += np.where(enters, after, 0.0).sum(axis=(1, 2))
        walk = np.where(enters, 0.0, after)
    return crossed


def worst_case(branches: int, region: Region) -> tuple[float, tuple[int, ...]]:
    """The largest P(it stops with another answer than the vote of all), or a bound on it, and the votes it belongs to.

    Returns:
        The probability, and how many votes each answer has then; what is missing to N are branches without an answer.
    """
    pairs = [(low, top) for top in range(1, branches) for low in range(1, min(top, branches - top) + 1)]
    if not pairs:
        return 0.0, (branches,)
    loses: dict[tuple[int, int], float] = {}
    for top in range(1, branches):  # apart, because the walk of few votes is short
        together = [pair for pair in pairs if pair[1] == top]
        loses.update(zip(together, crossing(branches, region, together), strict=True))
    even = [(top, top) for top in range(1, branches // 2 + 1)]
    loses_tie = dict(zip(even, crossing(branches, region, even, winner_first=True), strict=True))
    worst: tuple[float, tuple[int, ...]] = (0.0, (branches,))
    for top in range(1, branches + 1):
        smaller = _largest_sums(branches, top, loses)
        for tied in range(1, branches // top + 1):
            ties = 0.0 if tied == 1 else _of_ties(tied, loses[top, top], loses_tie[top, top])
            value, votes = smaller[branches - tied * top]
            if ties + value > worst[0]:
                worst = (float(ties + value), (top,) * tied + votes)
    return worst


def _of_ties(tied: int, loses: float, loses_tie: float) -> float:
    """Stops with one of several answers of equal votes whose first branch is not the first of all of theirs.

    It enters the region against any other of them, and one of the others came before it.
    """
    return tied * min((tied - 1) * loses_tie, loses)


def _even_shares(branches: int, region: Region) -> float:
    """The largest of :func:`worst_case` over answers of equal or nearly equal votes only: close to it, and cheap."""
    shared = [(tied, branches // tied) for tied in range(2, branches + 1)]
    even = [(votes, votes) for _, votes in shared]
    near = [(votes - 1, votes) for _, votes in shared]
    loses, loses_tie = crossing(branches, region, even), crossing(branches, region, even, winner_first=True)
    ahead = crossing(branches, region, near)
    ties = [_of_ties(tied, *values) for (tied, _), *values in zip(shared, loses, loses_tie, strict=True)]
    others = [(branches - votes) // (votes - 1) if votes > 1 else 0 for _, votes in shared]
    return max([0.0, *ties, *(count * value for count, value in zip(others, ahead, strict=True))])


def _largest_sums(branches: int, top: int, loses: dict[tuple[int, int], float]) -> list[tuple[float, tuple[int, ...]]]:
    """For 0 to N - top votes: the largest sum of probabilities of answers that have fewer votes than ``top``."""
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for votes in range(1, branches - top + 1):
        options = [best[-1]]
        for low in range(1, min(top - 1, votes) + 1):
            value, others = best[votes - low]
            options.append((value + loses[low, top], (low, *others)))
        best.append(max(options))
    return best
