"""Counters of blends and forks, in ``/rksc/stats`` and in ``/metrics``, on a real server."""

from __future__ import annotations

import httpx
import pytest

from rksc_sgl.metrics import PROBE_SECONDS, REQUESTS, TOKENS_REUSED
from tests.six_layers import Served, report_of

pytestmark = [pytest.mark.server, pytest.mark.slow]


def exported(served: Served, name: str) -> float:
    """The sum of a counter in ``/metrics``."""
    lines = httpx.get(f"{served.process.url}/metrics", timeout=30.0, follow_redirects=True).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


def test_each_request_that_opted_in_is_counted_once_in_both_places(served: Served) -> None:
    before, out = served.total(REQUESTS), exported(served, REQUESTS)
    for index in range(3):
        served.ask([10, 11, 12, 13, index], {"group": "told, counted", "branch": index, "branches": 3})
    served.ask([20, 21, 22])
    assert served.total(REQUESTS) == before + 3
    assert exported(served, REQUESTS) == out + 3


def test_tokens_taken_over_are_counted_apart_from_exact_reuse(served: Served) -> None:
    served.flush()
    kinds = ("blend", "exact", "merge")
    before = {kind: served.total(TOKENS_REUSED, kind=kind) for kind in kinds}
    blends, probed = served.total(REQUESTS, mode="blend"), served.total(PROBE_SECONDS)
    material = [100 + index * 7 % 300 for index in range(200)]
    fork = {"group": "told, kinds", "branches": 2, "share": "blend"}
    served.ask([1, 2, 3, *material], {**fork, "branch": 0})
    report = report_of(served.ask([4, 5, 6, 7, *material], {**fork, "branch": 1}))
    grown = {kind: served.total(TOKENS_REUSED, kind=kind) - before[kind] for kind in kinds}
    assert grown == {"blend": report["taken_tokens"], "exact": 0, "merge": 0} and report["taken_tokens"] > 100
    assert served.total(REQUESTS, mode="blend") == blends + 1
    assert served.total(PROBE_SECONDS) > probed
