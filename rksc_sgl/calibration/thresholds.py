"""Which thresholds: exits and skips simulated on full-depth traces, and the boldest ones that can be certified.

The rule for exits has one knob, ``t``: at a candidate layer the read-out says margin ``m`` with error ``scale``, and a
call leaves when ``abs(m) >= t * scale`` and the candidate layer before said the same verdict with at least
:data:`CONFIRMATION` of that distance. (To wait until layers agree is the patience of arXiv 2006.04152.) Bigger is
safer. ``certify`` walks a grid that is fixed beforehand from the safest ``t`` to the boldest
(:mod:`rksc_sgl.calibration.risk_control`).

What makes a certificate hold: the traces to certify on were not used to fit the read-outs, come from whole forks
(every call of a fork on the same side of the split), and look like those met in serving. Each delta has a certificate
of its own at confidence 1 - alpha; several deltas together do not have it at the same alpha.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from rksc_sgl.calibration.readout import LinearReadout
from rksc_sgl.calibration.risk_control import check_share, clopper_pearson_p, fixed_sequence, hoeffding_bentkus_p
from rksc_sgl.errors import OptionError

Floats: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]
Flags: TypeAlias = npt.NDArray[np.bool_]
Unit: TypeAlias = Literal["group", "call"]
Scope: TypeAlias = Literal["verdict", "selection"]

SCOPES: tuple[Scope, ...] = ("verdict", "selection")
CONFIRMATION = 0.75  # of t, at the candidate layer before
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
        delta: the bound on each certified risk.
        scope: ``verdict``: P(a verdict is not that of full depth) <= delta. ``selection``: that, and P(another branch
            of the fork is selected by score) <= delta, where calls that the selection hangs on are run again at full
            depth (``resolve_ties`` of :func:`simulate`).
        t: the knob.
        flip_mean: risk of a flipped verdict as measured (with ``unit="group"`` the mean over groups).
        selection_mean: share of groups with another branch selected, as measured.
        layers_fraction: mean layers run a call as a share of the model's, as measured.
        n_calls: calls that it was tested on.
        n_groups: forks that they belong to.
        unit: what was taken as independent, see :func:`certify`.
    """

    delta: float
    scope: Scope
    t: float
    flip_mean: float
    selection_mean: float
    layers_fraction: float
    n_calls: int
    n_groups: int
    unit: Unit


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
        resolve_ties: whether to run again what the selection hangs on.

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
    deltas: Sequence[float],
    alpha: float,
    *,
    scope: Scope = "verdict",
    unit: Unit = "group",
    grid: Sequence[float] = T_GRID,
    prefer: Literal["boldest", "cheapest"] = "boldest",
) -> list[CertifiedPoint]:
    """For each delta, a ``t`` whose risks are at most delta with confidence 1 - alpha.

    The risk of ``scope="verdict"`` is that a verdict is not that of full depth. That of ``scope="selection"`` is this
    and that another branch of the group is selected: a ``t`` passes when both are rejected at alpha (an
    intersection-union test, which needs no correction). The second is tested by Clopper-Pearson over groups. The
    first, by ``unit``:

    ``group``
        Calls of one fork share a problem and are not independent, so the loss of a group is its share of flipped
        calls, and Hoeffding-Bentkus is applied to these losses, n being the number of groups. Valid however calls
        depend on each other inside a group. The risk is that of a call drawn from a fork drawn at random.
    ``call``
        Every call is taken as a group of its own: Clopper-Pearson over calls. Right only where calls are
        independent, such as one call a problem.

    A delta for which nothing passes has no point.

    Args:
        traces_calibrate: not those that the read-outs were fitted on.
        readouts: by layer.
        deltas: bounds to try, each above 0 and below 1.
        alpha: 1 - confidence.
        scope: what is certified.
        unit: what is independent.
        grid: values of ``t``, strictly descending; chosen without looking at the traces.
        prefer: of the ``t`` that passed, the smallest, or the one with the fewest layers run on these traces (both
            are covered by the certificate; they differ where reruns outweigh exits).

    Returns:
        Points by ascending delta.

    Raises:
        OptionError: an argument is of no use; the message names it.
    """
    _check_certify(deltas, alpha, scope, unit, grid, prefer)
    predicted = _predict(traces_calibrate, readouts)
    runs = [_simulate(predicted, t, scope == "selection") for t in grid]
    points = []
    for delta in sorted(set(deltas)):
        p_values = [_flip_p(predicted, run, delta, unit) for run in runs]
        if scope == "selection":
            p_values = [max(p, _rate_p(run.selected_differs, delta)) for p, run in zip(p_values, runs, strict=True)]
        passed = fixed_sequence(p_values, alpha)
        if passed:
            best = _preferred(runs[:passed], prefer)
            points.append(_point(predicted, runs[best], _Rule(float(grid[best]), scope, unit), delta))
    return points


@dataclass(frozen=True)
class SkipTraces:
    """Forks that were verified at full depth, with what the skip gate saw. g forks.

    Attributes:
        agreement: ``[g]`` share of branches that give the most frequent answer, 0 to 1.
        lead: ``[g]`` confidence of the most confident branch less that of the next.
        differs: ``[g]`` true where skipping selects another answer than full verification does.
    """

    agreement: Floats
    lead: Floats
    differs: Flags

    def __post_init__(self) -> None:
        if self.agreement.ndim != 1 or self.agreement.size == 0:
            raise OptionError(f"agreement: must be [g] with at least one fork, got {self.agreement.shape}")
        for name in ("agreement", "lead", "differs"):
            value = getattr(self, name)
            if value.shape != self.agreement.shape:
                raise OptionError(f"{name}: must be {self.agreement.shape} as agreement, got {value.shape}")
            if not np.isfinite(value).all():
                raise OptionError(f"{name}: must be finite, got NaN or infinite numbers")


@dataclass(frozen=True)
class SkipPoint:
    """A skip rule with its certificate: skip when ``agreement`` and ``min_lead`` are both reached.

    Attributes:
        delta: the bound on P(skipped, and the selected answer is not that of full verification).
        agreement: share of branches with one answer; 1 is all.
        min_lead: confidence lead asked for besides.
        skipped_share: share of forks skipped, as measured.
        differ_mean: the risk as measured.
        n_groups: forks that it was tested on.
    """

    delta: float
    agreement: float
    min_lead: float
    skipped_share: float
    differ_mean: float
    n_groups: int


def certify_skip(
    traces: SkipTraces, deltas: Sequence[float], alpha: float, *, min_lead: float = 0.0
) -> list[SkipPoint]:
    """For each delta the smallest agreement at which skipping is certified, from unanimity downwards.

    Fixed-sequence testing with Clopper-Pearson over forks; a fork that is not skipped has no loss. What is certified is
    the smallest share that was observed among those skipped, so that forks with another number of branches are not
    skipped at shares that these forks cannot have.

    Args:
        traces: forks with the outcome of full verification.
        deltas: bounds to try, each above 0 and below 1.
        alpha: 1 - confidence.
        min_lead: a confidence lead that is asked for besides; chosen without looking at the traces. 0 asks none.

    Returns:
        Points by ascending delta; a delta for which not even unanimity passes has none.

    Raises:
        OptionError: an argument is out of range; the message names it.
    """
    _check_deltas(deltas, alpha)
    leads = (traces.lead >= min_lead) | (min_lead == 0.0)
    skipped = [leads & (traces.agreement >= agreement - 1e-9) for agreement in AGREEMENT_GRID]
    points = []
    for delta in sorted(set(deltas)):
        passed = fixed_sequence((_rate_p(skip & traces.differs, delta) for skip in skipped), alpha)
        if passed:
            skip, agreement = skipped[passed - 1], AGREEMENT_GRID[passed - 1]
            if skip.any():  # shares between the observed ones were not tested: other numbers of branches have them
                agreement = float(traces.agreement[skip].min())
            risk = float((skip & traces.differs).mean())
            points.append(SkipPoint(delta, agreement, min_lead, float(skip.mean()), risk, int(skip.size)))
    return points


@dataclass(frozen=True)
class _Groups:
    """Groups as rows of a sorted order, so that a best of each is found without a loop."""

    index: Integers  # [n] group of each call, from 0
    starts: Integers  # [groups] where each begins in an order sorted by group
    sizes: Integers  # [groups]

    @classmethod
    def of(cls, group: Integers) -> _Groups:
        _, index, sizes = np.unique(group, return_inverse=True, return_counts=True)
        return cls(index, np.cumsum(sizes) - sizes, sizes)

    def leaders(self, score: Floats) -> Integers:
        """``[groups]`` the call with the highest score, the first of equals."""
        return np.lexsort((np.arange(score.size), -score, self.index))[self.starts]

    def mean(self, losses: Flags) -> Floats:
        """``[groups]`` mean loss of each."""
        return np.bincount(self.index, weights=losses, minlength=self.sizes.size) / self.sizes

    def any(self, flags: Flags) -> Flags:
        """``[groups]`` whether any of a group's."""
        return np.bincount(self.index, weights=flags, minlength=self.sizes.size) > 0


@dataclass(frozen=True)
class _Rule:
    """What a point certifies."""

    t: float
    scope: Scope
    unit: Unit


@dataclass(frozen=True)
class _Predicted:
    """Traces with the read-outs applied, once for all ``t``."""

    traces: Traces
    groups: _Groups
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
    return _Predicted(traces, _Groups.of(traces.group), np.array(layers, dtype=np.int64), margin, scale)


def _simulate(predicted: _Predicted, t: float, resolve_ties: bool) -> Simulation:
    if not (np.isfinite(t) and t >= 0.0):
        raise OptionError(f"t: must be finite and at least 0, got {t!r}")
    exact = predicted.traces.margin
    left, column = _walk(predicted, t)
    margin, width, layers = exact.copy(), np.zeros_like(exact), np.full(exact.shape, FULL_DEPTH)
    margin[left] = predicted.margin[left, column[left]]
    width[left] = t * predicted.scale[column[left]]
    layers[left] = predicted.layers[column[left]]
    cost = np.where(left, layers / predicted.traces.model_layers, 1.0)
    rerun = left & _contested(predicted, margin, width) if resolve_ties else np.zeros_like(left)
    margin[rerun], layers[rerun] = exact[rerun], FULL_DEPTH
    confidence, groups = predicted.traces.confidence, predicted.groups
    differs = groups.leaders(_score(margin, confidence)) != groups.leaders(_score(exact, confidence))
    flip = (margin > 0.0) != (exact > 0.0)
    return Simulation(layers, rerun, margin, flip, differs, float((cost + rerun).mean()))


def _walk(predicted: _Predicted, t: float) -> tuple[Flags, Integers]:
    """Which calls leave ``[n]``, and at which column ``[n]`` (of no meaning for the others)."""
    if not predicted.layers.size:
        return np.zeros(predicted.margin.shape[0], dtype=np.bool_), np.zeros(predicted.margin.shape[0], dtype=np.int64)
    certain = np.abs(predicted.margin) >= t * predicted.scale
    before = np.sign(predicted.margin[:, 1:]) * predicted.margin[:, :-1]
    certain[:, 1:] &= before >= CONFIRMATION * t * predicted.scale[:-1]
    certain[:, 0] = False  # nothing confirms it
    return certain.any(axis=1), certain.argmax(axis=1)


def _contested(predicted: _Predicted, margin: Floats, width: Floats) -> Flags:
    """``[n]`` the leader of a group and those who may beat it, in groups where there is anyone who may."""
    groups, confidence = predicted.groups, predicted.traces.confidence
    leaders = groups.leaders(_score(margin, confidence))
    lower = _score(margin - width, confidence)[leaders]
    rivals = _score(margin + width, confidence) >= lower[groups.index]
    rivals[leaders] = False
    contested = rivals.copy()
    contested[leaders] = groups.any(rivals)
    return contested


def _score(margin: Floats, confidence: Floats) -> Floats:
    """``sigmoid(margin) * sqrt(confidence)``, without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * margin)) * np.sqrt(confidence)


def _flip_p(predicted: _Predicted, run: Simulation, delta: float, unit: Unit) -> float:
    if unit == "call":
        return _rate_p(run.flip, delta)
    losses = predicted.groups.mean(run.flip)
    return hoeffding_bentkus_p(float(losses.mean()), losses.size, delta)


def _rate_p(losses: Flags, delta: float) -> float:
    return clopper_pearson_p(int(losses.sum()), int(losses.size), delta)


def _preferred(runs: Sequence[Simulation], prefer: str) -> int:
    """Which of the runs that passed, the safest first."""
    if prefer == "boldest":
        return len(runs) - 1
    return min(range(len(runs)), key=lambda index: (runs[index].layers_fraction, index))


def _point(predicted: _Predicted, run: Simulation, rule: _Rule, delta: float) -> CertifiedPoint:
    return CertifiedPoint(
        delta=float(delta),
        scope=rule.scope,
        t=rule.t,
        flip_mean=float((predicted.groups.mean(run.flip) if rule.unit == "group" else run.flip).mean()),
        selection_mean=float(run.selected_differs.mean()),
        layers_fraction=run.layers_fraction,
        n_calls=int(run.flip.size),
        n_groups=int(run.selected_differs.size),
        unit=rule.unit,
    )


def _curve_point(t: float, run: Simulation) -> CurvePoint:
    return CurvePoint(t, float(run.flip.mean()), float(run.selected_differs.mean()), run.layers_fraction)


def _check_deltas(deltas: Sequence[float], alpha: float) -> None:
    check_share("alpha", alpha)
    for delta in deltas:
        check_share("deltas", delta)


def _check_certify(
    deltas: Sequence[float], alpha: float, scope: str, unit: str, grid: Sequence[float], prefer: str
) -> None:
    _check_deltas(deltas, alpha)
    if scope not in SCOPES:
        raise OptionError(f"scope: must be one of {', '.join(SCOPES)}, got {scope!r}")
    if unit not in ("group", "call"):
        raise OptionError(f"unit: must be group or call, got {unit!r}")
    if prefer not in ("boldest", "cheapest"):
        raise OptionError(f"prefer: must be boldest or cheapest, got {prefer!r}")
    if not grid or any(first <= second for first, second in pairwise(grid)):
        raise OptionError("grid: must be strictly descending, the safest first, with at least one value")
