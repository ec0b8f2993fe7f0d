"""``n > 1`` on SGLang's own endpoints."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from rksc_sgl.options import RequestOptions
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.sglang_plugin.one_request.samples import numbered
from tests.one_request.asking import STORY, counted, events_of, is_clean


def test_samples_are_numbered_from_the_clients_branch_on() -> None:
    assert numbered(RequestOptions(group="g"), 2, 4) == RequestOptions(group="g", branch=2, branches=4)
    late = RequestOptions(group="g", branch=4, branches=8, share="blend")
    assert numbered(late, 3, 4) == RequestOptions(group="g", branch=7, branches=8, share="blend")
    assert numbered(RequestOptions(group="g", branch=6, branches=8), 3, 4).branches == 10


def reports_of(server: ServerProcess, route: str, rksc: Any, *, stream: bool, text: str = STORY) -> list[dict]:
    """The reports of four samples, by index."""
    if route == "/generate":
        sampling = {"max_new_tokens": 4, "n": 4, "custom_params": {"rksc": rksc}}
        asked: dict[str, Any] = {"text": text, "sampling_params": sampling, "stream": stream}
    else:
        prompt = {"messages": [{"role": "user", "content": text}]} if "chat" in route else {"prompt": text}
        asked = {"model": "m", "max_tokens": 4, "n": 4, "custom_params": {"rksc": rksc}, "stream": stream, **prompt}
    answer = httpx.post(server.url + route, json=asked, timeout=120.0)
    answer.raise_for_status()
    if not stream:
        said = answer.json()
        return [one["meta_info"]["rksc"] for one in said] if route == "/generate" else said["metadata"]["rksc"]
    events = events_of(answer.text)
    if route != "/generate":
        return events[-1]["metadata"]["rksc"]
    last = {event["index"]: event["meta_info"]["rksc"] for event in events if event["meta_info"]["finish_reason"]}
    return [last[index] for index in sorted(last)]


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["/generate", "/v1/chat/completions", "/v1/completions"])
def test_each_of_n_samples_is_a_branch_of_one_group_and_counts_once(
    tiny_server: ServerProcess, route: str, stream: bool
) -> None:
    text = f"{route} {stream} {STORY}"
    for rksc in ({"group": f"n {route} {stream}"}, {}):
        before = counted(tiny_server, op="branch")
        reports = reports_of(tiny_server, route, rksc, stream=stream, text=json.dumps(rksc) + text)
        assert [report["branch"] for report in reports] == [0, 1, 2, 3]
        assert {report["branches"] for report in reports} == {4}
        groups = {report["group"] for report in reports}
        assert len(groups) == 1 and groups <= ({rksc["group"]} if rksc else groups)
        assert counted(tiny_server, op="branch") == before + 4
        reused = sorted(report["reused_tokens"] for report in reports)
        assert reused[1] > reused[0] + 50, "the prompt is computed once"
    assert is_clean(tiny_server)


@pytest.mark.server
@pytest.mark.slow
def test_prompts_of_one_batch_have_groups_of_their_own_and_only_those_that_opted_in(
    tiny_server: ServerProcess,
) -> None:
    before = counted(tiny_server)
    opted = {"max_new_tokens": 3, "n": 2, "custom_params": {"rksc": {"branch": 2, "branches": 8}, "mine": 1}}
    sampling = [opted, {"max_new_tokens": 3, "n": 2}, opted]
    asked = {"text": ["one " + STORY, "two " + STORY, "three " + STORY], "sampling_params": sampling}
    said = httpx.post(f"{tiny_server.url}/generate", json=asked, timeout=120.0).json()
    reports = [one["meta_info"].get("rksc") for one in said]
    assert [report and (report["branch"], report["branches"]) for report in reports] == [
        *((2, 8), (3, 8)),
        *(None, None),
        *((2, 8), (3, 8)),
    ]
    assert len({report["group"] for report in reports if report}) == 2
    assert counted(tiny_server) == before + 4
    assert is_clean(tiny_server)
