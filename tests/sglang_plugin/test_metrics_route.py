"""A live server with Prometheus metrics and a key for administrators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from rksc_sgl import metrics
from rksc_sgl.cli.serve import problems_in
from rksc_sgl.metrics import CATALOGUE, OF_SCHEDULERS
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]

SMALL_SERVER = ("--max-total-tokens", "4000", "--max-running-requests", "8")


@pytest.fixture(scope="module")
def metered_server(tiny_model: Path) -> Iterator[ServerProcess]:
    own = ("--enable-metrics", "--admin-api-key", "sesame", "--extra-metric-labels", '{"fleet": "tests"}')
    with ServerProcess(server_arguments(["--model-path", str(tiny_model), *SMALL_SERVER, *own])) as server:
        yield server


def test_prometheus_reads_what_the_scheduler_counted(metered_server: ServerProcess) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    assert problems_in(metered_server.get_json("/rksc/info")) == []
    for branch in range(2):
        params = {"max_new_tokens": 2, "custom_params": {"rksc": {"branch": branch, "branches": 2}}}
        body = {"text": "The quick brown fox jumps over the lazy dog", "sampling_params": params}
        httpx.post(f"{metered_server.url}/generate", json=body, timeout=120.0).raise_for_status()
    forked = {
        "model": "m",
        "prompt": "The quick brown fox",
        "max_tokens": 2,
        "rksc": {"branches": 3, "early_stop": False},
    }
    httpx.post(f"{metered_server.url}/rksc/v1/completions", json=forked, timeout=120.0).raise_for_status()
    stats = metered_server.get_json("/rksc/stats")
    ours = {**stats["schedulers"][0]["counters"], **stats["http"]["counters"]}
    text = httpx.get(f"{metered_server.url}/metrics", follow_redirects=True, timeout=30.0).text
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    exported = [one for one in samples if one.name in CATALOGUE]
    assert sum(one["value"] for one in ours[metrics.REQUESTS] if one["labels"]["op"] == "branch") == 5
    assert [one["value"] for one in ours[metrics.FORKS]] == [1]
    assert {one["labels"]["kind"] for one in ours[metrics.TOKENS_REUSED] if one["value"]} == {"exact"}
    for name, metric in CATALOGUE.items():
        found = {
            tuple(one.labels.get(label, "") for label in metric.labels): one.value
            for one in exported
            if one.name == name
        }
        assert found == {tuple(one["labels"].values()): one["value"] for one in ours[name]}
    assert all(one.labels["fleet"] == "tests" for one in exported)
    assert all(one.labels["tp_rank"] == "0" for one in exported if one.name in OF_SCHEDULERS)
    assert any(one.name.startswith("sglang:") and one.name not in CATALOGUE for one in samples)


def test_prompts_are_for_administrators_where_there_is_a_key(metered_server: ServerProcess) -> None:
    tree = f"{metered_server.url}/rksc/tree"
    assert httpx.get(tree, timeout=30.0).status_code == 401
    assert httpx.get(tree, headers={"Authorization": "Bearer sesame"}, timeout=30.0).status_code == 200
    assert httpx.get(f"{metered_server.url}/rksc/stats", timeout=30.0).status_code == 200
