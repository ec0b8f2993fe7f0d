"""Verifications that leave a pass that only remembers what it was asked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_pass import RecordedPass, walk

from rksc_sgl.early_exit.audit import Audit
from rksc_sgl.early_exit.certainty import CONFIRMATION
from rksc_sgl.early_exit.leaving import Watched
from rksc_sgl.early_exit.readout import LinearReadout
from rksc_sgl.early_exit.rules import CertifiedRule, PublishedRule, Verdict, margin_of, write_verdicts


def rule_of(layers: Sequence[int], t: float = 1.0, scale: float = 1.0) -> CertifiedRule:
    """Margin is the first entry of the state."""
    readouts = {layer: LinearReadout(np.array([1, 0], np.float32), 0.0, scale) for layer in layers}
    return CertifiedRule(readouts, t, 0.01, [0], [1])


def states_of(margins: dict[int, list[float]]) -> dict[int, torch.Tensor]:
    return {layer: torch.tensor([[m, 0.0] for m in row]) for layer, row in margins.items()}


def test_each_sequence_leaves_at_its_first_certain_layer_and_the_rest_is_compacted() -> None:
    rule = rule_of([2, 4, 6])
    states = {2: [3.0, -0.8, 0.2, 9.0], 4: [3.0, -0.9, 0.3, -9.0], 6: [0.0, -2.0, 9.0, 0.0]}
    a_pass = RecordedPass(states_of(states), 4)
    watched = [Watched(place, rule) for place in range(4)]
    there = walk(a_pass, 4, watched)
    assert there == [2, 3], "the look before must have said the same, and nearly as clearly"
    exits = [(one.exit_layer, one.margin) for one in watched]
    assert exits == [(4, 3.0), (6, -2.0), (None, None), (None, None)]
    assert a_pass.ran == [(2, (0, 1, 2, 3)), (4, (0, 1, 2, 3)), (6, (1, 2, 3))]


def test_sequences_that_are_not_watched_stay_to_the_end() -> None:
    rule, states = rule_of([2, 4]), states_of({2: [5.0] * 3, 4: [5.0] * 3})
    there = walk(RecordedPass(states, 3), 3, [Watched(1, rule)])
    assert there == [0, 2]


def test_nothing_is_run_after_the_last_one_left() -> None:
    a_pass = RecordedPass(states_of({2: [5.0, -5.0], 4: [5.0, -5.0], 6: [0.0, 0.0]}), 2)
    assert walk(a_pass, 2, [Watched(place, rule_of([2, 4, 6])) for place in range(2)]) == []
    assert a_pass.ran == [(2, (0, 1)), (4, (0, 1))]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_state_that_is_no_number_is_never_certain(bad: float) -> None:
    one = Watched(0, rule_of([2, 4]))
    assert walk(RecordedPass(states_of({2: [bad], 4: [bad]}), 1), 1, [one]) == [0]
    assert one.exit_layer is None


def test_a_look_that_was_no_number_confirms_nothing() -> None:
    one = Watched(0, rule_of([2, 4]))
    assert walk(RecordedPass(states_of({2: [float("nan")], 4: [9.0]}), 1), 1, [one]) == [0]


def test_an_audited_sequence_says_where_it_would_have_left_and_goes_on() -> None:
    one, other = Watched(0, rule_of([2, 4]), audited=True), Watched(1, rule_of([2, 4]))
    assert walk(RecordedPass(states_of({2: [5.0, 5.0], 4: [7.0, 5.0]}), 2), 2, [one, other]) == [0]
    assert (one.exit_layer, one.margin, one.left) == (4, 7.0, False)


def test_traces_are_kept_for_each_layer_asked_for_without_a_rule() -> None:
    one = Watched(1, None, trace_layers=(1, 3))
    walk(RecordedPass(states_of({1: [0.0, 4.0], 3: [0.0, 6.0]}), 2), 2, [one])
    assert {layer: state[0].item() for layer, state in one.trace.items()} == {1: 4.0, 3: 6.0}


def test_one_rank_may_overrule_what_another_computed() -> None:
    one = Watched(0, rule_of([2, 4]))
    assert walk(RecordedPass(states_of({2: [5.0], 4: [5.0]}), 1), 1, [one], agree=torch.zeros_like) == [0]


@given(
    margins=st.lists(st.lists(st.floats(-4, 4), min_size=4, max_size=4), min_size=1, max_size=6),
    t=st.floats(0.1, 4),
    audited=st.sets(st.integers(0, 5)),
)
@settings(deadline=None)
def test_the_walk_equals_looking_at_each_sequence_alone(
    margins: list[list[float]], t: float, audited: set[int]
) -> None:
    layers = [1, 2, 5, 7]
    size = len(margins)
    states = states_of({layer: [row[index] for row in margins] for index, layer in enumerate(layers)})
    watched = [Watched(place, rule_of(layers, t), audited=place in audited) for place in range(size)]
    there = walk(RecordedPass(states, size), size, watched)
    for one, row in zip(watched, margins, strict=True):
        told = np.array(row, dtype=np.float32).astype(np.float64)
        certain = [
            (layers[at], row[at])
            for at in range(1, len(layers))
            if abs(told[at]) >= t and np.sign(told[at]) * told[at - 1] >= CONFIRMATION * t
        ]
        expected = certain[0] if certain else (None, None)
        assert one.exit_layer == expected[0]
        assert one.margin == (None if expected[1] is None else pytest.approx(expected[1], abs=1e-6))
        assert (one.place in there) == (not certain or one.place in audited)


def test_the_published_rule_waits_for_an_entropy_that_is_low_and_still() -> None:
    rule = PublishedRule(lambda states: states @ torch.eye(4) * 10.0, [0], [1], layers=6, theta=0.1, eps=0.05)
    sure, unsure = torch.tensor([[9.0, 0, 0, 0]]), torch.tensor([[0.0, 0, 0, 0]])
    a_pass = RecordedPass({1: unsure, 2: sure, 3: sure, 4: sure}, 1)
    one = Watched(0, rule)
    walk(a_pass, 1, [one])
    assert one.exit_layer == 3  # at 2 it is low but has just moved
    assert one.margin == pytest.approx(90.0)


def test_verdict_logits_read_back_as_the_margin_that_was_written() -> None:
    logits = torch.zeros(3, 50)
    write_verdicts(logits, [Verdict(0, -1.25, [3, 4, 5], [7]), Verdict(2, 2.5, [6], [3, 8])])
    for row, margin, yes, no in ((0, -1.25, [3, 4, 5], [7]), (2, 2.5, [6], [3, 8])):
        assert margin_of(logits[row, None], yes, no).item() == pytest.approx(margin, abs=1e-5)
        assert logits[row].softmax(-1)[[*yes, *no]].sum().item() == pytest.approx(1.0)
    assert not logits[1].any(), "who did not leave keeps its own"
    write_verdicts(logits, [])


def test_the_audit_takes_its_share_by_the_name_of_the_request() -> None:
    audit = Audit(rate=0.2)
    chosen = [name for name in map(str, range(4000)) if audit.chooses(name)]
    assert 700 < len(chosen) < 900
    assert all(Audit(rate=0.2).chooses(name) for name in chosen)
    assert not any(Audit(rate=0.0).chooses(name) for name in chosen)


def test_a_refuted_certificate_warns_once_and_stops_where_it_was_asked_to(caplog: pytest.LogCaptureFixture) -> None:
    audit = Audit(rate=1.0, stop=True)
    for _ in range(20):
        audit.record(0.01, False)
    assert audit.allows(0.01) and not caplog.records
    for _ in range(4):
        audit.record(0.01, True)
    assert not audit.allows(0.01)
    assert audit.allows(0.05)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert Audit(rate=1.0, stop=False, broken={0.01}).allows(0.01)
