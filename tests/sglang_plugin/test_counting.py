from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rksc_sgl import metrics
from rksc_sgl.errors import MetricError
from rksc_sgl.metrics import OF_SCHEDULERS, Counters
from rksc_sgl.sglang_plugin.inspection import counting
from rksc_sgl.sglang_plugin.inspection.prometheus_export import Export


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counters:
    own = Counters()
    monkeypatch.setattr(counting, "counters", lambda: own)
    return own


def request(finished: bool, sent: bool | None = None) -> Any:
    return SimpleNamespace(finished=lambda: finished, finished_output=sent)


def test_only_the_last_output_of_a_request_is_its_end() -> None:
    running, last, again, skipped = request(False), request(True), request(True, True), request(True)
    assert counting.about_to_finish([running, last, again, skipped], skipped) == [last]


def test_a_report_is_counted_with_its_tokens_and_its_reason(counted: Counters) -> None:
    report = {"op": "branch", "mode": "blend", "reused_tokens": 0, "taken_tokens": 7, "blended_before_tokens": 3}
    counting.count_request({**report, "recomputed_tokens": 2}, aborted=False)
    counting.count_request({"op": "branch", "mode": "exact", "reused_tokens": 4, "declined": "short"}, aborted=False)
    merged = {"op": "branch", "mode": "merge", "reused_tokens": 1, "merged_tokens": 6, "replaced_tokens": 8}
    counting.count_request(merged, aborted=False)
    counting.count_request({"op": "verify", "mode": "exact", "reused_tokens": 5}, aborted=False)
    counting.count_request({"op": "verify", "mode": "exact", "reused_tokens": 0}, aborted=True)
    snapshot = counted.snapshot()
    assert [(*one["labels"].values(), one["value"]) for one in snapshot[metrics.REQUESTS]] == [
        ("branch", "blend", "", 1),
        ("branch", "exact", "short", 1),
        ("branch", "merge", "", 1),
        ("verify", "exact", "", 1),
        ("verify", "exact", "aborted", 1),
    ]
    assert {one["labels"]["kind"]: one["value"] for one in snapshot[metrics.TOKENS_REUSED]} == {
        "exact": 10,
        "blend": 10,
        "merge": 6,
    }
    assert snapshot[metrics.TOKENS_RECOMPUTED][0]["value"] == 2
    assert snapshot[metrics.TOKENS_REPLACED][0]["value"] == 8


def test_branches_of_a_fork_that_are_aborted_are_counted_and_nothing_else_that_is(counted: Counters) -> None:
    branch = {"op": "branch", "mode": "exact", "group": "g"}
    for report, aborted in (
        (branch, True),
        (branch, False),
        ({**branch, "op": "verify"}, True),
        ({"op": "branch", "mode": "exact"}, True),
    ):
        counting.count_request(report, aborted=aborted)
    assert counted.snapshot()[metrics.STOPPED_BRANCHES] == [{"labels": {}, "value": 1}]


def test_prometheus_counters_follow_ours() -> None:
    from prometheus_client import CollectorRegistry, Counter, generate_latest

    registry, own = CollectorRegistry(), Counters()
    own.add(metrics.EXITS, 2, rule="certified")  # before anybody exports
    export = Export(OF_SCHEDULERS, {"model_name": "m", "tp_rank": 0}, lambda **kw: Counter(**kw, registry=registry))
    own.follow(export.add)
    own.add(metrics.EXITS, rule="certified")
    own.add(metrics.PROBE_SECONDS, 0.25)
    text = generate_latest(registry).decode()
    assert 'sglang:rksc_exits_total{model_name="m",rule="certified",tp_rank="0"} 3.0' in text
    assert 'sglang:rksc_probe_seconds_total{model_name="m",tp_rank="0"} 0.25' in text
    assert 'sglang:rksc_tokens_replaced_total{model_name="m",tp_rank="0"} 0.0' in text
    assert all(f"# HELP {name} " in text for name in OF_SCHEDULERS)


def test_an_operators_label_may_not_have_the_name_of_one_of_ours() -> None:
    from prometheus_client import CollectorRegistry, Counter

    registry = CollectorRegistry()
    with pytest.raises(MetricError, match="label mode is ours"):
        Export(OF_SCHEDULERS, {"mode": "prod"}, lambda **kw: Counter(**kw, registry=registry))
