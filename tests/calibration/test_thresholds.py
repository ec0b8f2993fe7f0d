from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.calibration.readout import fit_readouts
from rksc_sgl.calibration.risk_control import clopper_pearson_p
from rksc_sgl.calibration.thresholds import (
    FULL_DEPTH,
    T_GRID,
    SkipOutcomes,
    Traces,
    certify,
    certify_skip,
    measure_curve,
    simulate,
)
from rksc_sgl.early_exit.certainty import CONFIRMATION
from rksc_sgl.early_exit.readout import LinearReadout
from rksc_sgl.errors import OptionError
from rksc_sgl.options import Scope

LAYERS, MODEL_LAYERS, HIDDEN, BRANCHES = (4, 8), 20, 12, 6
COARSE = (12.0, 8.0, 6.0, 5.0, 4.5, 4.0, 3.5, 3.0, 2.75, 2.5, 2.25, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.0)


def synthetic(groups: int, seed: int, noise: tuple[float, ...] = (0.8, 0.3), family: str | None = None) -> Traces:
    """Margins that calls of a group share in part; layers hold them with noise that falls with depth."""
    random = np.random.default_rng(seed)
    n = groups * BRANCHES
    margin = np.repeat(random.normal(0.5, 1.5, groups), BRANCHES) + random.normal(0, 1.5, n)
    hidden = random.normal(size=(n, len(LAYERS), HIDDEN))
    shared = np.repeat(random.normal(size=groups), BRANCHES)
    for column, level in enumerate(noise):
        hidden[:, column, 0] = margin + level * (0.7 * shared + 0.7 * random.standard_t(4, n))
    return Traces(
        hidden=hidden.astype(np.float32),
        margin=margin,
        group=np.repeat(np.arange(groups), BRANCHES),
        confidence=random.uniform(0.4, 1.0, n),
        layers=LAYERS,
        model_layers=MODEL_LAYERS,
        family=None if family is None else np.full(n, family),
    )


def fitted(noise: tuple[float, ...] = (0.8, 0.3), groups: int = 100) -> dict[int, LinearReadout]:
    traces = synthetic(groups, 1000, noise)
    return fit_readouts(traces.hidden, traces.margin, LAYERS)


READOUTS = fitted()


def by_hand(predicted: list[list[float]], margin: list[float], group: list[int], confidence: list[float]):
    """Traces whose layers hold their prediction in unit 0, and read-outs with an error of 1 that read it."""
    states = np.zeros((len(margin), 2, 3), dtype=np.float32)
    states[:, :, 0] = predicted
    readout = LinearReadout(np.array([1, 0, 0], dtype=np.float32), 0.0, 1.0)
    traces = Traces(states, np.array(margin), np.array(group), np.array(confidence), (5, 10), 20)
    return traces, {5: readout, 10: readout}


def slow_walk(traces: Traces, readouts: dict[int, LinearReadout], t: float):
    """The rule of exit and of reruns, call by call and group by group."""
    n = traces.margin.size
    used, width, layer = traces.margin.copy(), np.zeros(n), np.full(n, FULL_DEPTH)
    cost, rerun = np.ones(n), np.zeros(n, dtype=bool)
    for call in range(n):
        before, needed = 0.0, math.inf
        for column, name in enumerate(traces.layers):
            said = float(readouts[name].predict(traces.hidden[call : call + 1, column])[0])
            confirmed = math.copysign(1, said) * before >= needed
            before, needed = said, CONFIRMATION * t * readouts[name].scale
            if abs(said) >= t * readouts[name].scale and confirmed:
                used[call], width[call], layer[call] = said, t * readouts[name].scale, name
                cost[call] = name / traces.model_layers
                break

    def score(margin: float, call: int) -> float:
        return 1 / (1 + math.exp(-margin)) * math.sqrt(traces.confidence[call])

    def best(margins: np.ndarray, calls: list[int]) -> int:
        return max(calls, key=lambda call: (score(margins[call], call), -call))

    differs = []
    for name in sorted(set(traces.group.tolist())):
        calls = [call for call in range(n) if traces.group[call] == name]
        leader = best(used, calls)
        floor = score(used[leader] - width[leader], leader)
        rivals = [call for call in calls if call != leader and score(used[call] + width[call], call) >= floor]
        for call in [*rivals, leader] if rivals else []:
            if layer[call] != FULL_DEPTH:
                rerun[call], layer[call], cost[call] = True, FULL_DEPTH, cost[call] + 1
        used = np.where(rerun, traces.margin, used)
        differs.append(best(used, calls) != best(traces.margin, calls))
    return used, layer, rerun, np.array(differs), cost.mean()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 5))
def test_the_simulation_is_the_rule_call_by_call(seed: int, t: float) -> None:
    traces = synthetic(8, seed)
    shuffled = traces.where(np.random.default_rng(seed).random(traces.margin.size) < 0.8)
    order = np.random.default_rng(seed + 1).permutation(shuffled.margin.size)
    shuffled = shuffled.where(order)  # groups need not be contiguous
    used, layer, rerun, differs, cost = slow_walk(shuffled, READOUTS, t)
    run = simulate(shuffled, READOUTS, t)
    np.testing.assert_allclose(run.margin, used, atol=1e-5)
    np.testing.assert_array_equal(run.exit_layer, layer)
    np.testing.assert_array_equal(run.rerun, rerun)
    np.testing.assert_array_equal(run.selected_differs, differs)
    assert run.layers_fraction == pytest.approx(cost)


def test_calls_leave_at_the_first_layer_that_is_certain() -> None:
    traces, readouts = by_hand(
        predicted=[[1.5, 3], [-2, -2.5], [1, 1], [-1.5, -4], [1.4, 9], [-9, 9]],
        margin=[2.0, -1.0, 0.5, 0.5, 0.1, 0.1],
        group=[0, 1, 2, 3, 4, 5],
        confidence=[1] * 6,
    )
    run = simulate(traces, readouts, 2.0)
    assert run.exit_layer.tolist() == [10, 10, FULL_DEPTH, 10, FULL_DEPTH, FULL_DEPTH]
    assert run.margin.tolist() == [3.0, -2.5, 0.5, -4.0, 0.1, 0.1]
    assert run.flip.tolist() == [False, False, False, True, False, False]
    assert run.layers_fraction == pytest.approx((0.5 * 3 + 1 * 3) / 6)
    assert not run.selected_differs.any() and not run.rerun.any()


def test_a_selection_within_the_error_is_resolved_at_full_depth_and_paid_for() -> None:
    traces, readouts = by_hand(
        predicted=[[4, 4], [3, 3], [-9, -9]],
        margin=[3.0, 3.5, -9.0],
        group=[7, 7, 7],
        confidence=[1, 1, 1],
    )
    resolved = simulate(traces, readouts, 2.0)
    assert resolved.rerun.tolist() == [True, True, False]
    assert resolved.exit_layer.tolist() == [FULL_DEPTH, FULL_DEPTH, 10]
    assert resolved.margin.tolist() == [3.0, 3.5, -9.0]
    assert resolved.selected_differs.tolist() == [False]
    assert resolved.layers_fraction == pytest.approx((1.5 + 1.5 + 0.5) / 3)
    trusting = simulate(traces, readouts, 2.0, resolve_ties=False)
    assert trusting.selected_differs.tolist() == [True]
    assert trusting.layers_fraction == pytest.approx(0.5)


def test_a_leader_that_nobody_can_reach_stands() -> None:
    traces, readouts = by_hand([[3, 3], [-3, -3]], [3.0, -3.0], [0, 0], [0.9, 0.9])
    run = simulate(traces, readouts, 1.0)
    assert not run.rerun.any() and not run.selected_differs.any()


def test_without_readouts_everything_runs_at_full_depth() -> None:
    traces = synthetic(5, 1)
    run = simulate(traces, {}, 0.0)
    assert (run.exit_layer == FULL_DEPTH).all() and not run.flip.any() and run.layers_fraction == 1.0


def test_a_bigger_knob_never_flips_more_on_average() -> None:
    curve = measure_curve(synthetic(300, 2), READOUTS, grid=(6.0, 3.0, 1.0, 0.0))
    flips = [point.flip_rate for point in curve]
    assert flips == sorted(flips) and flips[0] == 0.0 < flips[-1]
    assert [point.t for point in curve] == [6.0, 3.0, 1.0, 0.0]


@pytest.mark.parametrize("scope", ["verdict", "selection"])
def test_a_certified_point_saves_layers_and_holds_on_fresh_forks(scope: Scope) -> None:
    points = certify(synthetic(1500, 3), READOUTS, (0.02, 0.01, 0.05), 0.1, scope=scope)
    assert [point.risk for point in points] == [0.01, 0.02, 0.05]
    fresh = synthetic(4000, 4)
    for point in points:
        assert point.scope == scope
        assert (point.n_groups, point.n_calls) == (1500, 1500 * BRANCHES)
        assert point.layers_fraction < 0.9
        run = simulate(fresh, READOUTS, point.t, resolve_ties=scope == "selection")
        assert run.flip.mean() <= point.risk
        assert scope == "verdict" or run.selected_differs.mean() <= point.risk
    assert [point.t for point in points] == sorted((point.t for point in points), reverse=True)


def test_certificates_are_broken_at_most_alpha_of_the_time() -> None:
    """Many calibrations of the same read-outs; the truth is taken from very many fresh forks."""
    alpha, risk, trials = 0.2, 0.05, 80
    truth = {point.t: point for point in measure_curve(synthetic(20_000, 5), READOUTS, grid=COARSE)}
    broken = savings = 0
    for trial in range(trials):
        (point,) = certify(synthetic(150, 10_000 + trial), READOUTS, [risk], alpha, scope="selection", grid=COARSE)
        broken += truth[point.t].flip_rate > risk or truth[point.t].selection_rate > risk
        savings += point.layers_fraction < 1.0
    assert broken / trials <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / trials)
    assert savings > trials / 2


def test_read_outs_of_noise_never_save_anything() -> None:
    """The states say nothing and the verdicts are split in halves, so there is nothing to be certain of."""
    fit, calibrate = synthetic(100, 6), synthetic(1500, 7)
    random = np.random.default_rng(8)
    readouts = fit_readouts(random.normal(size=fit.hidden.shape), fit.margin - fit.margin.mean(), LAYERS)
    noise = Traces(
        hidden=random.normal(size=calibrate.hidden.shape).astype(np.float32),
        margin=calibrate.margin - np.median(calibrate.margin),
        group=calibrate.group,
        confidence=calibrate.confidence,
        layers=LAYERS,
        model_layers=MODEL_LAYERS,
    )
    for prefer in ("boldest", "cheapest"):
        points = certify(noise, readouts, (0.005, 0.01, 0.05), 0.05, prefer=prefer)  # type: ignore[arg-type]
        assert [point.risk for point in points] == [0.005, 0.01, 0.05]
        assert all(point.layers_fraction >= 0.99 for point in points)


def test_the_cheapest_of_the_certified_never_costs_more_than_the_boldest() -> None:
    traces = synthetic(400, 9)
    boldest = certify(traces, READOUTS, (0.02, 0.1), 0.1)
    cheapest = certify(traces, READOUTS, (0.02, 0.1), 0.1, prefer="cheapest")
    assert [point.risk for point in boldest] == [point.risk for point in cheapest] == [0.02, 0.1]
    for bold, cheap in zip(boldest, cheapest, strict=True):
        assert cheap.layers_fraction <= bold.layers_fraction and cheap.t >= bold.t


def test_the_cheapest_is_not_the_boldest_where_what_leaves_early_is_rerun() -> None:
    """Two branches are too near to each other to select by what was foreseen, and the third is foreseen wrongly."""
    groups = 100
    traces, readouts = by_hand(
        [[3.0, 3.0], [2.9, 2.9], [0.5, 0.5]] * groups,
        [3.0, 2.9, -5.0] * groups,
        np.repeat(np.arange(groups), 3).tolist(),
        [1.0] * 3 * groups,
    )
    for prefer, t, cost in (("boldest", 2.0, (1.5 + 1.5 + 1) / 3), ("cheapest", 6.0, 1.0)):
        (point,) = certify(
            traces,
            readouts,
            [0.1],
            0.1,
            scope="selection",
            grid=(6.0, 2.0, 0.25),
            prefer=prefer,  # type: ignore[arg-type]
        )
        assert (point.t, point.layers_fraction) == (t, pytest.approx(cost))


def test_too_few_groups_certify_nothing() -> None:
    few = synthetic(60, 10)  # (1 - 0.02) ** 60 > 0.1: not even 60 groups without a fault would do
    assert certify(few, READOUTS, [0.02], 0.1) == []
    assert certify(few, READOUTS, [0.02], 0.1, scope="selection") == []
    (point,) = certify(few, READOUTS, [0.1], 0.1, scope="selection")
    assert point.n_groups == 60


def test_calls_that_fall_together_are_not_counted_as_independent() -> None:
    """In 4 of 100 groups all but the leader flip. Calls taken as independent, 20 in 600, would certify 5 %."""
    groups = 100
    predicted = np.tile([30.0] + [-3.0] * (BRANCHES - 1), groups)
    margin = predicted.copy()
    margin[: 4 * BRANCHES] = np.abs(margin[: 4 * BRANCHES])
    traces, readouts = by_hand(
        np.stack([predicted, predicted], axis=1).tolist(),
        margin.tolist(),
        np.repeat(np.arange(groups), BRANCHES).tolist(),
        np.tile([1.0] + [0.5] * (BRANCHES - 1), groups).tolist(),
    )
    assert simulate(traces, readouts, 2.5).flip.sum() == 4 * (BRANCHES - 1)
    assert certify(traces, readouts, [0.05], 0.1, grid=(2.5,)) == []
    assert clopper_pearson_p(4 * (BRANCHES - 1), groups * BRANCHES, 0.05) <= 0.1


def test_the_selection_is_certified_with_reruns_and_the_verdict_without() -> None:
    traces = synthetic(400, 14)
    for scope, resolve in (("verdict", False), ("selection", True)):
        (point,) = certify(traces, READOUTS, [0.1], 0.1, scope=scope)  # type: ignore[arg-type]
        run = simulate(traces, READOUTS, point.t, resolve_ties=resolve)
        assert point.selection_mean == run.selected_differs.mean()
        assert point.layers_fraction == run.layers_fraction
    with pytest.raises(OptionError, match="scope"):
        certify(traces, READOUTS, [0.1], 0.1, scope="branch")  # type: ignore[arg-type]


def test_the_grid_goes_from_the_safest_to_the_boldest() -> None:
    assert list(T_GRID) == sorted(set(T_GRID), reverse=True) and T_GRID[-1] == 0.0


def test_families_can_be_looked_at_apart() -> None:
    traces = synthetic(4, 11, family="algebra")
    assert traces.family is not None
    kept = traces.where((traces.family == "algebra") & (traces.group < 2))
    assert kept.margin.size == 2 * BRANCHES and kept.layers == LAYERS
    assert kept.family is not None and kept.family.size == 2 * BRANCHES


def skip_outcomes(groups: int, seed: int) -> SkipOutcomes:
    """The less the branches agree, the more often skipping selects another answer."""
    random = np.random.default_rng(seed)
    agreement = random.integers(1, 9, groups) / 8
    differs = random.random(groups) < np.where(agreement == 1.0, 0.0, 0.5 * (1 - agreement))
    return SkipOutcomes(agreement, differs)


def test_skipping_is_certified_down_to_the_agreement_that_still_holds() -> None:
    points = certify_skip(skip_outcomes(3000, 1), (0.01, 0.05, 0.3), 0.05)
    agreements = [point.agreement for point in points]
    assert agreements == sorted(agreements, reverse=True) and agreements[-1] < 1.0
    assert all(share * 8 == round(share * 8) for share in agreements), "only shares that were observed"
    fresh = skip_outcomes(50_000, 2)
    for point in points:
        skipped = fresh.agreement >= point.agreement
        assert (skipped & fresh.differs).mean() <= point.risk
        assert point.skipped_share == pytest.approx(skipped.mean(), abs=0.05)
        assert point.n_groups == 3000


def test_too_few_forks_do_not_certify_a_skip() -> None:
    assert certify_skip(skip_outcomes(50, 3), [0.01], 0.05) == []
    assert len(certify_skip(skip_outcomes(2000, 4), [0.05], 0.05)) == 1


def test_skip_certificates_are_broken_at_most_alpha_of_the_time() -> None:
    alpha, risk, trials = 0.2, 0.05, 300
    fresh = skip_outcomes(200_000, 5)
    broken = 0
    for trial in range(trials):
        (point,) = certify_skip(skip_outcomes(300, 100 + trial), [risk], alpha)
        broken += ((fresh.agreement >= point.agreement) & fresh.differs).mean() > risk
    assert broken / trials <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / trials)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden": np.zeros((6, 3, 2), dtype=np.float32)}, "hidden: must be"),
        ({"hidden": np.full((6, 2, 12), np.nan, dtype=np.float32)}, "hidden: must be finite"),
        ({"margin": np.full(6, np.inf)}, "margin: must be finite"),
        ({"margin": np.zeros(5)}, "margin: must be"),
        ({"confidence": np.full(6, 1.5)}, "confidence: must be between"),
        ({"layers": (8, 4)}, "layers: must ascend"),
        ({"layers": (4, 20)}, "layers: must ascend"),
        ({"family": np.array(["a"])}, "family: must be"),
    ],
)
def test_traces_that_make_no_sense_are_refused_by_name(change: dict, named: str) -> None:
    traces = synthetic(1, 12)
    values = {name: getattr(traces, name) for name in traces.__dataclass_fields__}
    with pytest.raises(OptionError, match=named):
        Traces(**(values | change))


def test_arguments_that_make_no_sense_are_refused_by_name() -> None:
    traces = synthetic(5, 13)
    for call, named in (
        (lambda: simulate(traces, READOUTS, -1.0), "t: must"),
        (lambda: simulate(traces, READOUTS, float("nan")), "t: must"),
        (lambda: simulate(traces, {5: READOUTS[4]}, 1.0), "layer 5 is not in the traces"),
        (lambda: simulate(traces, {4: LinearReadout(np.zeros(3, np.float32), 0.0, 1.0)}, 1.0), "3 hidden units"),
        (lambda: certify(traces, READOUTS, [0.0], 0.1), "risks"),
        (lambda: certify(traces, READOUTS, [0.1], 1.0), "alpha"),
        (lambda: certify(traces, READOUTS, [0.1], 0.1, grid=(1.0, 2.0)), "grid"),
        (lambda: certify(traces, READOUTS, [0.1], 0.1, prefer="best"), "prefer"),  # type: ignore[arg-type]
        (lambda: SkipOutcomes(np.ones(3), np.ones(2, dtype=bool)), "differs"),
    ):
        with pytest.raises(OptionError, match=named):
            call()
