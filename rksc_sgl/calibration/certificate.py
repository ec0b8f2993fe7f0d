"""From traces to what a profile says: split by fork, fit, certify, and look at forks that neither step has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rksc_sgl.calibration.readout import fit_readouts, r2
from rksc_sgl.calibration.risk_control import clopper_pearson_upper
from rksc_sgl.calibration.thresholds import (
    CertifiedPoint,
    CurvePoint,
    SkipOutcomes,
    SkipPoint,
    Traces,
    certify,
    certify_skip,
    measure_curve,
    simulate,
)
from rksc_sgl.early_exit.readout import LinearReadout
from rksc_sgl.early_exit.selection import Flags
from rksc_sgl.errors import OptionError
from rksc_sgl.options import SCOPES, Scope

SHARES = (0.35, 0.5, 0.15)  # of the forks: to fit on, to certify on, to look at afterwards
MIN_FORKS = 20


@dataclass(frozen=True)
class Split:
    """Which forks are for what; each ``[forks]`` bool, disjoint, together all."""

    fit: Flags
    certify: Flags
    test: Flags


@dataclass(frozen=True)
class HeldOutFigures:
    """A certified rule on forks that were not used before.

    Attributes:
        risk: of the point.
        scope: of the point.
        calls: verifications.
        flips: verdicts that are not those of full depth.
        flip_upper95: upper bound of the flip rate, one-sided 95% (Clopper-Pearson over calls).
        groups: forks.
        selected_differs: forks in which another branch is selected.
        layers_fraction: mean layers run, as a share of the model's; reruns included.
    """

    risk: float
    scope: Scope
    calls: int
    flips: int
    flip_upper95: float
    groups: int
    selected_differs: int
    layers_fraction: float


@dataclass(frozen=True)
class Certificate:
    """What was found.

    Attributes:
        readouts: by layer.
        r2: share of the margins' variance that each read-out explains on the forks to certify on.
        points: certified exit rules.
        skip_points: certified skip rules.
        curve: risk against cost on the forks to certify on.
        test: for each point.
    """

    readouts: Mapping[int, LinearReadout]
    r2: Mapping[int, float]
    points: tuple[CertifiedPoint, ...]
    skip_points: tuple[SkipPoint, ...]
    curve: tuple[CurvePoint, ...]
    test: tuple[HeldOutFigures, ...]


def split_forks(forks: int, *, seed: int = 0, shares: tuple[float, float, float] = SHARES) -> Split:
    """Deal the forks at random; whole forks, because the calls of one are not independent.

    Raises:
        OptionError: too few forks.
    """
    if forks < MIN_FORKS:
        raise OptionError(f"forks: must be at least {MIN_FORKS} to split, got {forks}")
    order = np.random.default_rng(seed).permutation(forks)
    first, second = round(shares[0] * forks), round((shares[0] + shares[1]) * forks)
    parts = []
    for members in (order[:first], order[first:second], order[second:]):
        part: Flags = np.zeros(forks, dtype=np.bool_)
        part[members] = True
        parts.append(part)
    return Split(*parts)


def certificate(
    traces: Traces, skip: SkipOutcomes, risks: Sequence[float], alpha: float, *, seed: int = 0
) -> Certificate:
    """Fit, certify and test.

    Args:
        traces: groups are numbered from 0 on, one for each fork of ``skip``.
        skip: the same forks.
        risks: to certify.
        alpha: 1 - confidence.
        seed: of the split.

    Raises:
        OptionError: too few forks, or an argument out of range.
    """
    split = split_forks(skip.agreement.size, seed=seed)
    fit, chosen, test = (traces.where(part[traces.group]) for part in (split.fit, split.certify, split.test))
    readouts = fit_readouts(fit.hidden, fit.margin, fit.layers)
    points = tuple(
        point for scope in SCOPES for point in certify(chosen, readouts, risks, alpha, scope=scope, prefer="cheapest")
    )
    explained = {
        layer: r2(readout.predict(chosen.hidden[:, chosen.layers.index(layer)]), chosen.margin)
        for layer, readout in readouts.items()
    }
    return Certificate(
        readouts=readouts,
        r2=explained,
        points=points,
        # The skip rule has nothing to fit: every fork can be certified on.
        skip_points=tuple(certify_skip(skip, risks, alpha)),
        curve=measure_curve(chosen, readouts, resolve_ties=False),
        test=tuple(figures_on(test, readouts, point) for point in points),
    )


def figures_on(traces: Traces, readouts: Mapping[int, LinearReadout], point: CertifiedPoint) -> HeldOutFigures:
    """What a certified rule does on these traces."""
    run = simulate(traces, readouts, point.t, resolve_ties=point.scope == "selection")
    calls, flips = int(run.flip.size), int(run.flip.sum())
    return HeldOutFigures(
        risk=point.risk,
        scope=point.scope,
        calls=calls,
        flips=flips,
        flip_upper95=clopper_pearson_upper(flips, calls),
        groups=int(run.selected_differs.size),
        selected_differs=int(run.selected_differs.sum()),
        layers_fraction=run.layers_fraction,
    )
