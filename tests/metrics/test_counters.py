from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rksc_sgl import metrics
from rksc_sgl.errors import MetricError
from rksc_sgl.metrics import CATALOGUE, Counters
from rksc_sgl.metrics.counters import MAX_SERIES, OTHER


def values_of(counters: Counters, name: str) -> dict[tuple[str, ...], float]:
    return {tuple(one["labels"].values()): one["value"] for one in counters.snapshot()[name]}


def test_what_is_added_is_in_the_snapshot() -> None:
    counters = Counters()
    counters.add(metrics.REQUESTS, op="branch", mode="exact", reason="")
    counters.add(metrics.REQUESTS, 2, mode="exact", op="branch", reason="")
    counters.add(metrics.REQUESTS, op="verify", mode="exact", reason="aborted")
    counters.add(metrics.TOKENS_RECOMPUTED, 40)
    assert counters.snapshot()[metrics.REQUESTS] == [
        {"labels": {"op": "branch", "mode": "exact", "reason": ""}, "value": 3},
        {"labels": {"op": "verify", "mode": "exact", "reason": "aborted"}, "value": 1},
    ]
    assert counters.snapshot()[metrics.TOKENS_RECOMPUTED] == [{"labels": {}, "value": 40}]


def test_every_counter_is_in_an_empty_snapshot_and_those_without_labels_are_zero() -> None:
    snapshot = Counters().snapshot()
    assert set(snapshot) == set(CATALOGUE)
    assert snapshot[metrics.TOKENS_REPLACED] == [{"labels": {}, "value": 0}]
    assert snapshot[metrics.EXITS] == []


def test_the_catalogue_is_what_a_monitor_expects() -> None:
    for name, metric in CATALOGUE.items():
        assert name == metric.name
        assert name.startswith("sglang:rksc_")
        assert name.endswith("_total")
        assert metric.help


@pytest.mark.parametrize(
    ("name", "labels", "named"),
    [
        ("sglang:rksc_request_total", {}, "is no counter"),
        (metrics.EXITS, {}, "takes the labels rule; got none"),
        (metrics.EXITS, {"rule": "a", "risk": 1}, "got rule, risk"),
        (metrics.TOKENS_RECOMPUTED, {"op": "branch"}, "takes the labels none; got op"),
        (metrics.EXITS, {"rule": None}, "label rule must be text or a number"),
        (metrics.EXITS, {"rule": True}, "label rule must be text or a number"),
    ],
)
def test_unknown_names_and_labels_raise_and_count_nothing(name: str, labels: dict, named: str) -> None:
    counters = Counters()
    with pytest.raises(MetricError, match=named):
        counters.add(name, **labels)
    assert counters.snapshot() == Counters().snapshot()


@pytest.mark.parametrize("amount", [-1, math.inf, math.nan, "1", True, None])
def test_a_counter_never_goes_back(amount: object) -> None:
    counters = Counters()
    with pytest.raises(MetricError, match="finite number from 0 on"):
        counters.add(metrics.TOKENS_RECOMPUTED, amount)  # type: ignore[arg-type]
    assert counters.snapshot()[metrics.TOKENS_RECOMPUTED] == [{"labels": {}, "value": 0}]


def test_a_risk_is_a_label_as_people_write_it() -> None:
    counters = Counters()
    counters.add(metrics.EXIT_AUDITS, risk=0.01)
    counters.add(metrics.EXIT_AUDITS, risk="0.01")
    assert values_of(counters, metrics.EXIT_AUDITS) == {("0.01",): 2}


@given(st.lists(st.tuples(st.integers(0, 2 * MAX_SERIES), st.integers(0, 5)), max_size=4 * MAX_SERIES))
def test_label_values_without_end_are_bounded_and_the_sum_stays_right(events: list[tuple[int, int]]) -> None:
    counters, followed = Counters(), Counter[tuple[str, ...]]()
    counters.follow(lambda name, amount, labels: followed.update({tuple(labels.values()): amount}))
    for value, amount in events:
        counters.add(metrics.EXITS, amount, rule=str(value))
    series = values_of(counters, metrics.EXITS)
    assert len(series) <= MAX_SERIES
    assert sum(series.values()) == sum(amount for _, amount in events)
    assert dict(followed) == series
    distinct = len({value for value, _ in events})
    assert ((OTHER,) in series) == (distinct > MAX_SERIES - 1)


def test_a_late_follower_hears_of_earlier_counts() -> None:
    counters, heard = Counters(), []
    counters.add(metrics.EXITS, 2, rule="certified")
    counters.follow(lambda *event: heard.append(event))
    counters.add(metrics.EXITS, rule="published")
    assert heard == [(metrics.EXITS, 2, {"rule": "certified"}), (metrics.EXITS, 1, {"rule": "published"})]


def test_a_process_has_one_set_of_counters() -> None:
    assert metrics.counters() is metrics.counters()
