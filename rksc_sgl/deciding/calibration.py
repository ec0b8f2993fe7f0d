"""The cutoff of ``probable`` from recorded forks: bolder than the exact bound, for problems like the recorded ones.

The exact bound holds for the worst answers that N branches can give. Real problems are seldom the worst, and a user who
has recorded full forks of them can spend the risk on the mixture that they are. Learn-then-Test (arXiv 2110.01052):
cutoffs are tested in a fixed order, from the exact bound's own to the boldest, until the first that is not rejected.
Then P(a fork stops with another answer than the vote of all) <= risk, over problems like these and the order of their
branches, with confidence 1 - alpha over the draw of the recorded problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rksc_sgl.calibration.risk_control import check_share, clopper_pearson_p, fixed_sequence
from rksc_sgl.deciding.bound import boundary, statistic
from rksc_sgl.deciding.standing import full_vote
from rksc_sgl.errors import OptionError

CANDIDATES = 24  # cutoffs between the exact bound's and BOLDEST
BOLDEST = 0.25


@dataclass(frozen=True)
class CalibratedCutoff:
    """A cutoff for ``EarlyStop("probable", risk=..., cutoff=..., calibrated_for=...)``, and what it rests on.

    Attributes:
        cutoff: of :func:`rksc_sgl.deciding.bound.statistic`.
        risk: what is certified.
        alpha: one less the confidence.
        branches: of each recorded fork, for which alone the cutoff holds: ``calibrated_for``.
        problems: how many recorded forks.
        errors: how many of these stop with another answer at this cutoff.
    """

    cutoff: float
    risk: float
    alpha: float
    branches: int
    problems: int
    errors: int


def calibrate_cutoff(forks: Sequence[Sequence[str | None]], risk: float, alpha: float = 0.05) -> CalibratedCutoff:
    """The boldest cutoff that recorded forks certify.

    Args:
        forks: for each problem the answers of all N branches in the order of launch, equal ones under one name, None
            for no vote. Problems must be independent of each other, and all have the same N.
        risk: P(another answer than the vote of all N) that is accepted.
        alpha: one less the confidence.

    Raises:
        OptionError: no forks, forks of different sizes, a value out of range, or too few forks to certify any cutoff
            (an exact binomial test without an error needs ``log(alpha) / log(1 - risk)`` of them).
    """
    check_share("risk", risk)
    check_share("alpha", alpha)
    sizes = {len(answers) for answers in forks}
    if len(sizes) != 1:
        raise OptionError(f"forks: must be at least one, all of the same number of branches, got sizes {sorted(sizes)}")
    (branches,) = sizes
    exact = boundary(branches, risk).cutoff
    cutoffs = np.geomspace(max(exact, 1e-6), BOLDEST, CANDIDATES)
    paths = [_path(answers) for answers in forks]
    errors = [sum(_errs(path, cutoff) for path in paths) for cutoff in cutoffs]
    certified = fixed_sequence((clopper_pearson_p(count, len(forks), risk) for count in errors), alpha)
    if certified == 0:
        raise OptionError(
            f"forks: {len(forks)} recorded forks with {errors[0]} errors at the most careful cutoff do not certify "
            f"risk {risk:g} at alpha {alpha:g}; record more (without an error it takes "
            f"{int(np.ceil(np.log(alpha) / np.log1p(-risk)))}), or use the exact bound"
        )
    best = certified - 1
    return CalibratedCutoff(float(cutoffs[best]), risk, alpha, branches, len(forks), errors[best])


def _path(answers: Sequence[str | None]) -> list[tuple[float, bool]]:
    """For each look the statistic, and whether the leader is another answer than the vote of all."""
    values, winner = statistic(len(answers)), full_vote(answers)
    counts: dict[str, int] = {}
    path = []
    for look, answer in enumerate(answers, 1):
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
        leader = max(counts, key=lambda name: counts[name], default=None)
        ahead, behind = [*sorted(counts.values(), reverse=True), 0, 0][:2]
        path.append((float(values[look, ahead, behind]) if ahead > behind else 1.0, leader != winner))
    return path


def _errs(path: Sequence[tuple[float, bool]], cutoff: float) -> bool:
    return next((differs for value, differs in path if value <= cutoff), False)
