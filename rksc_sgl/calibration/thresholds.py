"""Which thresholds: exits and skips simulated on full-depth traces, and the boldest ones that can be certified.

The rule for exits is that of serving, :mod:`rksc_sgl.early_exit.certainty`, and has one knob, ``t``; bigger is safer.
The selection is that of serving too, :mod:`rksc_sgl.early_exit.selection`. ``certify`` walks a grid that is fixed
beforehand from the safest ``t`` to the boldest (:mod:`rksc_sgl.calibration.risk_control`).

What makes a certificate hold: the traces to certify on were not used to fit the read-outs, come from whole forks
(every call of a fork on the same side of the split), and look like those met in serving. Each risk has a certificate
of its own at confidence 1 - alpha; several risks together do not have it at the same alpha.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from rksc_sgl.calibration.risk_control import check_share, clopper_pearson_p, fixed_sequence, hoeffding_bentkus_p
from rksc_sgl.early_exit.certainty import error_of, may_leave
from rksc_sgl.early_exit.readout import LinearReadout
from rksc_sgl.early_exit.selection import Flags, Floats, Groups, Integers, probability_of, score, unresolved
from rksc_sgl.errors import OptionError
from rksc_sgl.options import SCOPES, Scope

FULL_DEPTH = -1
T_GRID = (64, 32, *range(16, 8, -1), *(round(8.0 - step / 10, 1) for step in range(81)))
AGREEMENT_GRID = tuple(round(1.0 - step / 20, 2) for step in range(20))


@dataclass(frozen=True)
class Traces:
    """Full-depth verification calls with what earlier layers held. n calls, in any order.

    Attributes:
        hidden: ``[n, layers, hidden]`` float32, the last position after each candidate layer.
        margin: ``[n]`` full-depth verdicts: logit of YES less logit of NO; YES is above 0.
        group: ``[n]`` integers: the fork that a call belongs to.
        confidence: ``[n]`` 0 to 1: the branch's confidence, as selection uses it.
        layers: names of the second dimension of ``hidden``: how many layers had run; ascending.
        model_layers: how many the model has.
        family: ``[n]`` strings, the task family of each call; None where it is not known.
    """

    hidden: npt.NDArray[np.float32]
    margin: Floats
    group: Integers
    confidence: Floats
    layers: tuple[int, ...]
    model_layers: int
    family: npt.NDArray[np.str_] | None = None

    def __post_init__(self) -> None:
        if self.hidden.ndim != 3 or self.hidden.shape[1] != len(self.layers):
            raise OptionError(f"hidden: must be [n, {len(self.layers)} layers, hidden], got {self.hidden.shape}")
        if self.hidden.shape[0] == 0:
            raise OptionError("hidden: must hold at least one call, got none")
        for name in ("margin", "group", "confidence", "family"):
            value = getattr(self, name)
            if value is not None and value.shape != self.hidden.shape[:1]:
                raise OptionError(f"{name}: must be [{self.hidden.shape[0]}] as hidden has it, got {value.shape}")
        for name in ("hidden", "margin", "confidence"):
            if not np.isfinite(getattr(self, name)).all():
                raise OptionError(f"{name}: must be finite, got NaN or infinite numbers")
        if not ((self.confidence >= 0.0) & (self.confidence <= 1.0)).all():
            raise OptionError("confidence: must be between 0 and 1")
        bounds = (0, *self.layers, self.model_layers)
        if any(low >= high for low, high in pairwise(bounds)):
            raise OptionError(
                f"layers: must ascend from 1 to below model_layers = {self.model_layers}, got {self.layers}"
            )

    def where(self, chosen: Flags) -> Traces:
        """The calls for which ``chosen [n]`` is true; to split by whole groups, or to look at one family."""
        kept = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name in ("layers", "model_layers") or getattr(self, field.name) is None
        }
        rest = {field.name: getattr(self, field.name)[chosen] for field in fields(self) if field.name not in kept}
        return Traces(**kept, **rest)


@dataclass(frozen=True)
class Simulation:
    """What serving would have done with these traces.

    Attributes:
        exit_layer: ``[n]`` layers run before the call left; -1 where its verdict is of full depth.
        rerun: ``[n]`` true where a call left early and was then run at full depth to resolve the selection.
        margin: ``[n]`` as used: the prediction of those that left, the exact one of the others.
        flip: ``[n]`` true where the verdict as used is not that of full depth.
        selected_differs: ``[groups]`` true where another branch is selected; groups by ascending name.
        layers_fraction: mean layers run a call, as a share of the model's; above 1 where reruns outweigh exits.
    """

    exit_layer: Integers
    rerun: Flags
    margin: Floats
    flip: Flags
    selected_differs: Flags
    layers_fraction: float


@dataclass(frozen=True)
class CurvePoint:
    """What was measured at one ``t``, certified or not: the share of calls flipped, of groups with another branch
    selected, and of layers run."""

    t: float
    flip_rate: float
    selection_rate: float
    layers_fraction: float


@dataclass(frozen=True)
class CertifiedPoint:
    """An exit rule with its certificate.

    Attributes:
        risk: what is bounded, see ``scope``.
        scope: ``verdict``: P(a verdict is not that of full depth) <= risk. ``selection``: that, and P(another branch
            of the fork is selected by score) <= risk, where calls that the selection depends on are run again at full
            depth (``resolve_ties`` of :func:`simulate`).
        t: the knob.
        flip_mean: share of flipped verdicts as measured: the mean over forks.
        selection_mean: share of groups with another branch selected, as measured.
        layers_fraction: mean layers run a call as a share of the model's, as measured.
        n_calls: calls that it was tested on.
        n_groups: forks that they belong to.
    """

    risk: float
    scope: Scope
    t: float
    flip_mean: float
    selection_mean: float
    layers_fraction: float
    n_calls: int
    n_groups: int


def simulate(
    traces: Traces, readouts: Mapping[int, LinearReadout], t: float, *, resolve_ties: bool = True
) -> Simulation:
    """Walk the layers that have a read-out, in order, and then select a branch in each group.

    A group's branch is ``argmax_b sigmoid(margin_b) * sqrt(confidence_b)`` (RKSC, arXiv 2606.09937), the first of
    equals. A prediction may be off by ``t * scale``: with ``resolve_ties`` the leader stands only if its score at
    ``margin - t * scale`` is above every other's at ``margin + t * scale``; else those of the group that left early
    and overlap the leader (itself among them) run again at full depth, at the cost of the whole model each.

    Args:
        traces: full-depth calls.
        readouts: by layer; layers of ``traces`` without one are passed by.
        t: at least 0; bigger exits less.
        resolve_ties: whether to run again what the selection depends on.

    Raises:
        OptionError: ``t`` is out of range, or a read-out does not fit the traces.
    """
    return _simulate(_predict(traces, readouts), t, resolve_ties)


def measure_curve(
    traces: Traces,
    readouts: Mapping[int, LinearReadout],
    *,
    grid: Sequence[float] = T_GRID,
    resolve_ties: bool = True,
) -> tuple[CurvePoint, ...]:
    """Risk against cost over a grid of ``t``.

    Raises:
        OptionError: as :func:`simulate`.
    """
    predicted = _predict(traces, readouts)
    return tuple(_curve_point(float(t), _simulate(predicted, t, resolve_ties)) for t in grid)


def certify(
    traces_calibrate: Traces,
    readouts: Mapping[int, LinearReadout],
    risks: Sequence[float],
    alpha: float,
    *,
    scope: Scope = "verdict",
    grid: Sequence[float] = T_GRID,
    prefer: Literal["boldest", "cheapest"] = "boldest",
) -> list[CertifiedPoint]:
    """For each risk, a ``t`` that keeps it with confidence 1 - alpha.

    The loss of ``scope="verdict"`` is a verdict that is not that of full depth. Calls of one fork share a problem and
    are not independent, so the loss of a group is its share of flipped calls, and Hoeffding-Bentkus is applied to these
    losses, n being the number of groups. This is valid however calls depend on each other inside a group; what is
    bounded is the chance of a flip of a call drawn from a fork drawn at random. With ``scope="selection"`` the chance
    that another branch of the group is selected is bounded too, tested by Clopper-Pearson over groups: a ``t`` passes
    when both are rejected at alpha (an intersection-union test, which needs no correction).

    A risk for which nothing passes has no point.

    Args:
        traces_calibrate: not those that the read-outs were fitted on.
        readouts: by layer.
        risks: bounds to try, each above 0 and below 1.
        alpha: 1 - confidence.
        scope: what is certified.
        grid: values of ``t``, strictly descending; chosen without looking at the traces.
        prefer: of the ``t`` that passed, the smallest, or the one with the fewest layers run on these traces (both
            are covered by the certificate; they differ where reruns outweigh exits).

    Returns:
        Points by ascending risk.

    Raises:
        OptionError: an argument is invalid; the message names it.
    """
    _check_certify(risks, alpha, scope, grid, prefer)
    predicted = _predict(traces_calibrate, readouts)
    runs = [_simulate(predicted, t, scope == "selection") for t in grid]
    points = []
    for risk in sorted(set(risks)):
        p_values = [_flip_p(predicted, run, risk) for run in runs]
        if scope == "selection":
            p_values = [max(p, _rate_p(run.selected_differs, risk)) for p, run in zip(p_values, runs, strict=True)]
        passed = fixed_sequence(p_values, alpha)
        if passed:
            best = _preferred(runs[:passed], prefer)
            points.append(_point(predicted, runs[best], float(risk), scope, float(grid[best])))
    return points


@dataclass(frozen=True)
class SkipOutcomes:
    """Forks that were verified at full depth, with what the skip gate saw. g forks.

    Attributes:
        agreement: ``[g]`` share of branches that give the most frequent answer, 0 to 1.
        differs: ``[g]`` true where skipping selects another answer than full verification does.
    """

    agreement: Floats
    differs: Flags

    def __post_init__(self) -> None:
        if self.agreement.ndim != 1 or self.agreement.size == 0:
            raise OptionError(f"agreement: must be [g] with at least one fork, got {self.agreement.shape}")
        for name in ("agreement", "differs"):
            value = getattr(self, name)
            if value.shape != self.agreement.shape:
                raise OptionError(f"{name}: must be {self.agreement.shape} as agreement, got {value.shape}")
            if not np.isfinite(value).all():
                raise OptionError(f"{name}: must be finite, got NaN or infinite numbers")


@dataclass(frozen=True)
class SkipPoint:
    """A skip rule with its certificate: skip when ``agreement`` is reached.

    Attributes:
        risk: the bound on P(skipped, and the selected answer is not that of full verification).
        agreement: share of branches with one answer; 1 is all.
        skipped_share: share of forks skipped, as measured.
        differ_mean: the share of these as measured.
        n_groups: forks that it was tested on.
    """

    risk: float
    agreement: float
    skipped_share: float
    differ_mean: float
    n_groups: int


def certify_skip(outcomes: SkipOutcomes, risks: Sequence[float], alpha: float) -> list[SkipPoint]:
    """For each risk the smallest agreement at which skipping is certified, from unanimity downwards.

    Fixed-sequence testing with Clopper-Pearson over forks; a fork that is not skipped has no loss. What is certified is
    the smallest share that was observed among those skipped, so that forks with another number of branches are not
    skipped at shares that these forks cannot have.

    Args:
        outcomes: of the forks to certify on.
        risks: bounds to try, each above 0 and below 1.
        alpha: 1 - confidence.

    Returns:
        Points by ascending risk; a risk for which not even unanimity passes has none.

    Raises:
        OptionError: an argument is out of range; the message names it.
    """
    _check_risks(risks, alpha)
    skipped = [outcomes.agreement >= agreement - 1e-9 for agreement in AGREEMENT_GRID]
    points = []
    for risk in sorted(set(risks)):
        passed = fixed_sequence((_rate_p(skip & outcomes.differs, risk) for skip in skipped), alpha)
        if passed:
            skip, agreement = skipped[passed - 1], AGREEMENT_GRID[passed - 1]
            if skip.any():  # shares between the observed ones were not tested: other numbers of branches have them
                agreement = float(outcomes.agreement[skip].min())
            differ_mean = float((skip & outcomes.differs).mean())
            points.append(SkipPoint(float(risk), agreement, float(skip.mean()), differ_mean, int(skip.size)))
    return points


@dataclass(frozen=True)
class _Predicted:
    """Traces with the read-outs applied, once for all ``t``."""

    traces: Traces
    groups: Groups
    layers: Integers  # [walked]
    margin: Floats  # [n, walked]
    scale: Floats  # [walked]


def _predict(traces: Traces, readouts: Mapping[int, LinearReadout]) -> _Predicted:
    layers = sorted(readouts)
    for layer in layers:
        if layer not in traces.layers:
            raise OptionError(f"readouts: layer {layer} is not in the traces, which have {traces.layers}")
        if readouts[layer].weight.size != traces.hidden.shape[2]:
            raise OptionError(
                f"readouts: that of layer {layer} is for {readouts[layer].weight.size} hidden units, "
                f"the traces have {traces.hidden.shape[2]}"
            )
    margin = np.empty((traces.margin.size, len(layers)), dtype=np.float64)
    for column, layer in enumerate(layers):
        margin[:, column] = readouts[layer].predict(traces.hidden[:, traces.layers.index(layer)])
    scale = np.array([readouts[layer].scale for layer in layers], dtype=np.float64)
    return _Predicted(traces, Groups.of(traces.group), np.array(layers, dtype=np.int64), margin, scale)


def _simulate(predicted: _Predicted, t: float, resolve_ties: bool) -> Simulation:
    if not (np.isfinite(t) and t >= 0.0):
        raise OptionError(f"t: must be finite and at least 0, got {t!r}")
    exact, confidence, groups = predicted.traces.margin, predicted.traces.confidence, predicted.groups
    left, column = _walk(predicted, t)
    margin, error, layers = exact.copy(), np.zeros_like(exact), np.full(exact.shape, FULL_DEPTH)
    margin[left] = predicted.margin[left, column[left]]
    error[left] = error_of(predicted.scale[column[left]], t)
    layers[left] = predicted.layers[column[left]]
    cost = np.where(left, layers / predicted.traces.model_layers, 1.0)
    rerun = unresolved(margin, error, confidence, groups) if resolve_ties else np.zeros_like(left)
    margin[rerun], layers[rerun] = exact[rerun], FULL_DEPTH
    differs = _selected(margin, confidence, groups) != _selected(exact, confidence, groups)
    flip = (margin > 0.0) != (exact > 0.0)
    return Simulation(layers, rerun, margin, flip, differs, float((cost + rerun).mean()))


def _walk(predicted: _Predicted, t: float) -> tuple[Flags, Integers]:
    """Which calls leave ``[n]``, and at which column ``[n]`` (of no meaning for the others)."""
    margin, scale = predicted.margin, predicted.scale
    certain = np.zeros((margin.shape[0], max(1, margin.shape[1])), dtype=np.bool_)
    for column in range(margin.shape[1]):
        before = (margin[:, column - 1], scale[column - 1]) if column else None
        certain[:, column] = may_leave(margin[:, column], scale[column], t, before)
    return certain.any(axis=1), certain.argmax(axis=1)


def _selected(margin: Floats, confidence: Floats, groups: Groups) -> Integers:
    """``[groups]`` the call that is selected by score."""
    return groups.leaders(score(probability_of(margin), confidence))


def _flip_p(predicted: _Predicted, run: Simulation, risk: float) -> float:
    losses = predicted.groups.mean(run.flip)
    return hoeffding_bentkus_p(float(losses.mean()), losses.size, risk)


def _rate_p(losses: Flags, risk: float) -> float:
    return clopper_pearson_p(int(losses.sum()), int(losses.size), risk)


def _preferred(runs: Sequence[Simulation], prefer: str) -> int:
    """Which of the runs that passed, the safest first."""
    if prefer == "boldest":
        return len(runs) - 1
    return min(range(len(runs)), key=lambda index: (runs[index].layers_fraction, index))


def _point(predicted: _Predicted, run: Simulation, risk: float, scope: Scope, t: float) -> CertifiedPoint:
    return CertifiedPoint(
        risk=risk,
        scope=scope,
        t=t,
        flip_mean=float(predicted.groups.mean(run.flip).mean()),
        selection_mean=float(run.selected_differs.mean()),
        layers_fraction=run.layers_fraction,
        n_calls=int(run.flip.size),
        n_groups=int(run.selected_differs.size),
    )


def _curve_point(t: float, run: Simulation) -> CurvePoint:
    return CurvePoint(t, float(run.flip.mean()), float(run.selected_differs.mean()), run.layers_fraction)


def _check_risks(risks: Sequence[float], alpha: float) -> None:
    check_share("alpha", alpha)
    for risk in risks:
        check_share("risks", risk)


def _check_certify(risks: Sequence[float], alpha: float, scope: str, grid: Sequence[float], prefer: str) -> None:
    _check_risks(risks, alpha)
    if scope not in SCOPES:
        raise OptionError(f"scope: must be one of {', '.join(SCOPES)}, got {scope!r}")
    if prefer not in ("boldest", "cheapest"):
        raise OptionError(f"prefer: must be boldest or cheapest, got {prefer!r}")
    if not grid or any(first <= second for first, second in pairwise(grid)):
        raise OptionError("grid: must be strictly descending, the safest first, with at least one value")
