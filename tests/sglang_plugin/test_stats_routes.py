"""What a live server counts and shows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from rksc_sgl import metrics
from rksc_sgl.metrics import OF_SCHEDULERS
from rksc_sgl.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]

STORY = "A farmer has 12 cows and sells 5 of them on Monday. How many cows are left? " * 3


def generate(server: ServerProcess, text: str, *, options: dict | None = None, new: int = 4, **more: Any) -> dict:
    params: dict[str, Any] = {"max_new_tokens": new, "temperature": 0}
    if options is not None:
        params["custom_params"] = {"rksc": options}
    body = {"text": text, "sampling_params": params, **more}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=120.0)
    answer.raise_for_status()
    return answer.json()["meta_info"]


def stats(server: ServerProcess) -> dict[str, Any]:
    (scheduler,) = server.get_json("/rksc/stats")["schedulers"]
    return scheduler


def tree(server: ServerProcess, **params: Any) -> dict[str, Any]:
    answer = httpx.get(f"{server.url}/rksc/tree", params=params, timeout=60.0)
    answer.raise_for_status()
    (scheduler,) = answer.json()["schedulers"]
    assert scheduler["problem"] is None
    return scheduler["tree"]


def total(scheduler: dict[str, Any], name: str, **labels: str) -> float:
    """Sum of a counter's series that have these label values."""
    return sum(one["value"] for one in scheduler["counters"][name] if labels.items() <= one["labels"].items())


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


def test_requests_that_opted_in_are_counted_once_with_the_tokens_that_they_reused(tiny_server: ServerProcess) -> None:
    before = stats(tiny_server)
    metas = [
        generate(tiny_server, STORY + f"branch {i}", options={"group": "c", "branch": i, "branches": 3}, new=3 + i)
        for i in range(3)
    ]
    generate(tiny_server, STORY + "not one of ours")
    metas.append(generate(tiny_server, STORY + "branch 0 right?", options={"op": "verify", "exit": "off"}, new=1))
    after = stats(tiny_server)

    def grown(name: str, **labels: str) -> float:
        return total(after, name, **labels) - total(before, name, **labels)

    assert grown(metrics.REQUESTS, op="branch", mode="exact", reason="") == 3
    assert grown(metrics.REQUESTS, op="verify", mode="exact", reason="") == 1
    assert grown(metrics.REQUESTS) == 4
    assert grown(metrics.TOKENS_REUSED, kind="blend") == 0
    assert grown(metrics.TOKENS_REUSED, kind="exact") == sum(meta["cached_tokens"] for meta in metas) > 100
    assert grown(metrics.TOKENS_REPLACED) == 0
    assert tiny_server.get_json("/rksc/info")["schedulers"][0]["counters"] == after["counters"]


def test_streamed_and_batched_requests_are_counted_once_too(tiny_server: ServerProcess) -> None:
    before = total(stats(tiny_server), metrics.REQUESTS)
    params = {"max_new_tokens": 8, "temperature": 0, "custom_params": {"rksc": {"group": "s"}}}
    body = {"text": ["one prompt", "another prompt"], "sampling_params": params, "stream": True}
    with httpx.stream("POST", f"{tiny_server.url}/generate", json=body, timeout=120.0) as response:
        assert len([line for line in response.iter_lines() if line.startswith("data:")]) > 3
    assert total(stats(tiny_server), metrics.REQUESTS) == before + 2


def test_a_client_that_leaves_is_counted_as_aborted(tiny_server: ServerProcess) -> None:
    before = total(stats(tiny_server), metrics.REQUESTS, reason="aborted")
    params = {"max_new_tokens": 3000, "ignore_eos": True, "custom_params": {"rksc": {"group": "gone"}}}
    body = {"text": "once upon a time", "sampling_params": params, "stream": True}
    with httpx.stream("POST", f"{tiny_server.url}/generate", json=body, timeout=120.0) as response:
        next(response.iter_lines())  # and then it is closed
    eventually(lambda: total(stats(tiny_server), metrics.REQUESTS, reason="aborted") == before + 1)


def test_the_pool_and_the_tree_add_up(tiny_server: ServerProcess) -> None:
    generate(tiny_server, STORY)
    eventually(lambda: stats(tiny_server)["requests"] == {"running": 0, "waiting": 0})
    now = stats(tiny_server)
    pool, cached = now["pool"], now["tree"]
    assert pool["full_available_size"] + pool["full_evictable_size"] + pool["full_num_used"] == 20000
    assert pool["full_capacity"] == 20000
    assert cached["cached_tokens"] == cached["evictable_tokens"] + cached["protected_tokens"] > 0
    assert cached["evictable_tokens"] == pool["full_evictable_size"]
    shown = tree(tiny_server, max_nodes=10000)
    assert shown["total"] == cached["nodes"] == len(shown["nodes"])
    assert sum(node["tokens"] for node in shown["nodes"]) == cached["cached_tokens"]
    assert cached["problem"] is None
    uncounted = tiny_server.get_json("/rksc/stats?nodes=false")["schedulers"][0]["tree"]
    assert uncounted == {**cached, "nodes": None}


def test_the_tree_shows_words_and_namespaces_and_keeps_salts(tiny_server: ServerProcess) -> None:
    generate(tiny_server, "Owls count 14 mice at night")
    generate(tiny_server, "Is the answer correct? <b>", extra_key="tenant-7")
    generate(tiny_server, "Think step by step", cache_salt="open-sesame-1")
    nodes = tree(tiny_server, max_nodes=10000)["nodes"]
    assert any((node["text"] or "").startswith("Owls count") and node["namespace"] is None for node in nodes)
    (named,) = (node for node in nodes if node["namespace"] == "tenant-7" and node["depth"] == 1)
    assert named["text"].startswith("Is the answer")
    assert len(named["first_ids"]) == min(16, named["tokens"])
    assert any(node["salted"] and (node["text"] or "").startswith("Think step") for node in nodes)
    assert "open-sesame-1" not in httpx.get(f"{tiny_server.url}/rksc/tree?max_nodes=10000", timeout=60.0).text
    assert all(len(node["first_ids"] or ()) <= 16 for node in nodes)


def test_a_node_in_use_is_held(tiny_server: ServerProcess) -> None:
    params = {"max_new_tokens": 3000, "ignore_eos": True}
    body = {"text": STORY + "held", "sampling_params": params, "stream": True}
    with httpx.stream("POST", f"{tiny_server.url}/generate", json=body, timeout=120.0) as response:
        lines = response.iter_lines()  # dropping it would end the request
        next(lines)

        def held_are_protected() -> bool:  # two questions, and in between another request may let go of its own
            nodes = tree(tiny_server, max_nodes=10000)["nodes"]
            held = sum(node["tokens"] for node in nodes if node["locks"] and node["parent"] is not None)
            return held > 0 and stats(tiny_server)["tree"]["protected_tokens"] == held

        eventually(held_are_protected, seconds=5.0)

    def only_leases_are() -> bool:  # of forks of other tests
        now = stats(tiny_server)
        return now["tree"]["protected_tokens"] == now["memory"]["leased_tokens"]

    eventually(only_leases_are)


@pytest.mark.parametrize("query", ["max_nodes=0", "max_nodes=10001", "depth=-1", "max_nodes=x"])
def test_bounds_are_checked(tiny_server: ServerProcess, query: str) -> None:
    answer = httpx.get(f"{tiny_server.url}/rksc/tree?{query}", timeout=30.0)
    assert answer.status_code in (400, 422)
    assert query.split("=")[0] in answer.text


def test_a_part_of_the_tree_says_how_much_is_missing(tiny_server: ServerProcess) -> None:
    for i in range(4):
        generate(tiny_server, f"{i} is a prompt of its own")
    whole, part, top = tree(tiny_server, max_nodes=10000), tree(tiny_server, max_nodes=2), tree(tiny_server, depth=0)
    assert whole["left_out"] == 0
    assert (part["total"], part["left_out"], len(part["nodes"])) == (whole["total"], whole["total"] - 2, 2)
    assert [node["left_out"] for node in top["nodes"]] == [whole["total"] - 1]


def test_without_metrics_there_is_no_endpoint_and_counting_goes_on(tiny_server: ServerProcess) -> None:
    assert httpx.get(f"{tiny_server.url}/metrics", follow_redirects=True, timeout=30.0).status_code == 404
    assert set(stats(tiny_server)["counters"]) == set(OF_SCHEDULERS)
