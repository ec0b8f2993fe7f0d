"""What calibration simulates is what serving does, verdict by verdict and branch by branch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from recorded_pass import RecordedPass, walk

from rksc_sgl.calibration.thresholds import FULL_DEPTH, Traces, simulate
from rksc_sgl.early_exit.certainty import CONFIRMATION, may_leave
from rksc_sgl.early_exit.leaving import Watched
from rksc_sgl.early_exit.readout import LinearReadout
from rksc_sgl.early_exit.rules import CertifiedRule
from rksc_sgl.verifying.select import candidates_of, choose, unresolved

LAYERS, MODEL_LAYERS = (2, 4, 6, 8), 10
WEIGHT = np.array([1, 0], np.float32)
# Quarters hit thresholds exactly; the others do not.
margins = st.one_of(st.integers(-24, 24).map(lambda n: n / 4), st.floats(-8, 8, width=32))
scales = st.one_of(st.integers(0, 8).map(lambda n: n / 4), st.floats(0, 2))
knobs = st.one_of(st.integers(0, 12).map(lambda n: n / 4), st.floats(0, 4))


@dataclass(frozen=True)
class Case:
    """One fork: what each layer foresees ``[B, layers]``, the exact margins ``[B]`` and the confidences ``[B]``."""

    foreseen: np.ndarray
    exact: np.ndarray
    confidence: np.ndarray


@st.composite
def cases(draw: st.DrawFn) -> Case:
    branches = draw(st.integers(1, 6))

    def row(element: st.SearchStrategy[float], size: int) -> list[float]:
        return draw(st.lists(element, min_size=size, max_size=size))

    return Case(
        np.array([row(margins, len(LAYERS)) for _ in range(branches)], dtype=np.float32),
        np.array(row(margins, branches), dtype=np.float64),
        np.array(row(st.floats(0.1, 1), branches), dtype=np.float64),
    )


def served(case: Case, readouts: dict[int, LinearReadout], t: float) -> list[Watched]:
    """The verifications of a fork after the walk that a server takes."""
    rule = CertifiedRule(readouts, t, 0.01, [0], [1])
    states = {
        layer: torch.from_numpy(np.stack([case.foreseen[:, column], np.zeros(len(case.exact), np.float32)], axis=1))
        for column, layer in enumerate(LAYERS)
    }
    watched = [Watched(place, rule) for place in range(len(case.exact))]
    walk(RecordedPass(states, len(watched)), len(watched), watched)
    return watched


def near_tie(margin: np.ndarray, error: np.ndarray, confidence: np.ndarray) -> bool:
    """Whether rounding alone may decide; a server sends probabilities, not margins."""
    low, used, high = (1 / (1 + np.exp(-(margin + by * error))) * np.sqrt(confidence) for by in (-1, 0, 1))
    leader = used.argmax()
    others = np.arange(len(used)) != leader
    return bool((np.abs(high[others] - low[leader]) < 1e-9).any() or (np.abs(used[others] - used[leader]) < 1e-9).any())


@settings(max_examples=300, deadline=None)
@given(cases(), st.lists(scales, min_size=len(LAYERS), max_size=len(LAYERS)), knobs)
def test_the_simulation_is_what_a_server_and_its_client_do(case: Case, scale: list[float], t: float) -> None:
    readouts = {layer: LinearReadout(WEIGHT, 0.0, one) for layer, one in zip(LAYERS, scale, strict=True)}
    hidden = np.stack([case.foreseen, np.zeros_like(case.foreseen)], axis=2)
    group = np.zeros(len(case.exact), dtype=np.int64)
    traces = Traces(hidden, case.exact, group, case.confidence, LAYERS, MODEL_LAYERS)
    watched = served(case, readouts, t)

    verdicts = simulate(traces, readouts, t, resolve_ties=False)
    assert [one.exit_layer or FULL_DEPTH for one in watched] == verdicts.exit_layer.tolist()
    said = [exact if one.margin is None else one.margin for one, exact in zip(watched, case.exact, strict=True)]
    assert said == verdicts.margin.tolist()

    errors = [one.error for one in watched]
    assume(not near_tie(np.array(said), np.array(errors), case.confidence))
    selection = simulate(traces, readouts, t)
    again = unresolved(candidates_of(said, case.confidence.tolist()), errors)
    assert again == np.flatnonzero(selection.rerun).tolist()
    for place in again:
        said[place] = float(case.exact[place])
    assume(not near_tie(np.array(said), np.zeros(len(said)), case.confidence))
    assume(not near_tie(case.exact, np.zeros(len(said)), case.confidence))
    taken, right = (choose("score", candidates_of(used, case.confidence.tolist())) for used in (said, case.exact))
    assert (taken != right) == bool(selection.selected_differs[0])


@given(margins, margins, scales, scales, knobs)
def test_the_rule_is_the_same_on_tensors_and_arrays_and_as_it_is_described(
    margin: float, earlier: float, scale: float, earlier_scale: float, t: float
) -> None:
    expected = abs(margin) >= t * scale and np.sign(margin) * earlier >= CONFIRMATION * t * earlier_scale
    now, then = np.array([margin]), np.array([earlier])
    array = may_leave(now, scale, t, (then, earlier_scale))
    tensor = may_leave(torch.from_numpy(now), scale, t, (torch.from_numpy(then), earlier_scale))
    assert array.tolist() == tensor.tolist() == [expected]
    assert may_leave(np.array([margin]), scale, t, None).tolist() == [False]


def test_what_is_no_number_is_never_certain_and_confirms_nothing() -> None:
    nan, sure = np.array([np.nan]), np.array([9.0])
    for margin, earlier in ((nan, sure), (sure, nan), (nan, nan)):
        assert not may_leave(margin, 1.0, 1.0, (earlier, 1.0)).any()
