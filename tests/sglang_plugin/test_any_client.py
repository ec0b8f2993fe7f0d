"""The HTTP surface that every client has."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from rksc_sgl.cli.serve import problems_in
from rksc_sgl.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]

BAD = [({"grop": "x"}, "rksc.grop"), ({"branch": "x"}, "rksc.branch"), ({"share": "blend!"}, "rksc.share")]


def body_for(route: str, custom_params: dict[str, Any], stream: bool) -> dict[str, Any]:
    if route == "/generate":
        sampling = {"max_new_tokens": 3, "custom_params": custom_params}
        return {"text": "hello there", "sampling_params": sampling, "stream": stream}
    prompt = {"messages": [{"role": "user", "content": "hello"}]} if "chat" in route else {"prompt": "hello there"}
    return {"model": "m", "max_tokens": 3, "custom_params": custom_params, "stream": stream, **prompt}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["/generate", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(("options", "named"), BAD)
def test_bad_options_answer_400_and_name_the_key(
    tiny_server: ServerProcess, route: str, options: dict, named: str, stream: bool
) -> None:
    response = httpx.post(tiny_server.url + route, json=body_for(route, {"rksc": options}, stream), timeout=30.0)
    assert response.status_code == 400
    assert named in response.text


def test_good_options_come_back_and_only_where_they_were_given(tiny_server: ServerProcess) -> None:
    opted = {"rksc": {"group": "g", "branch": 1, "branches": 2}}
    body = {
        "text": ["first prompt", "second prompt"],
        "sampling_params": [{"max_new_tokens": 6, "custom_params": opted}, {"max_new_tokens": 6}],
    }
    first, second = httpx.post(f"{tiny_server.url}/generate", json=body, timeout=60.0).json()
    assert first["meta_info"]["rksc"] == {
        "mode": "exact",
        "op": "branch",
        "reused_tokens": first["meta_info"]["cached_tokens"],
        "group": "g",
        "branch": 1,
        "branches": 2,
    }
    assert "rksc" not in second["meta_info"]


def test_a_chat_client_reads_the_report_in_its_choices(tiny_server: ServerProcess) -> None:
    body = {**body_for("/v1/chat/completions", {"rksc": {"group": "g"}}, False), "return_meta_info": True}
    answer = httpx.post(f"{tiny_server.url}/v1/chat/completions", json=body, timeout=60.0).json()
    assert answer["choices"][0]["meta_info"]["rksc"]["group"] == "g"


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_every_openai_client_gets_its_report_without_asking(tiny_server: ServerProcess, route: str) -> None:
    options = {"rksc": {"group": "metadata", "branch": 1, "branches": 2}}
    answer = httpx.post(tiny_server.url + route, json=body_for(route, options, False), timeout=60.0).json()
    report = answer["metadata"]["rksc"]
    assert (report["group"], report["branch"], report["mode"]) == ("metadata", 1, "exact")
    several = httpx.post(tiny_server.url + route, json={**body_for(route, options, False), "n": 2}, timeout=60.0).json()
    assert [one["group"] for one in several["metadata"]["rksc"]] == ["metadata"] * 2
    plain = httpx.post(tiny_server.url + route, json=body_for(route, {}, False), timeout=60.0).json()
    assert "rksc" not in (plain["metadata"] or {})


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_ends_with_its_report(tiny_server: ServerProcess, route: str, usage: bool) -> None:
    body = {**body_for(route, {"rksc": {"group": "streamed"}}, True), "stream_options": {"include_usage": usage}}
    text = httpx.post(tiny_server.url + route, json=body, timeout=60.0).text
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert events[-1] == "[DONE]"
    last = json.loads(events[-2])
    assert last["choices"] == [] and last["metadata"]["rksc"]["group"] == "streamed"
    plain = httpx.post(tiny_server.url + route, json=body_for(route, {}, True), timeout=60.0).text
    assert "rksc" not in plain and plain.rstrip().endswith("[DONE]")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["/generate", "/v1/chat/completions", "/v1/completions"])
def test_reserved_keys_and_values_that_are_not_objects_answer_400(
    tiny_server: ServerProcess, route: str, stream: bool
) -> None:
    for wrong, named in (
        ({**body_for(route, {}, stream), "extra_key": "x\x1frksc-blended"}, "extra_key"),
        (body_for(route, "rksc", stream), "custom_params"),  # type: ignore[arg-type]
        (body_for(route, {"rksc": {"group": "g" * 200_000}}, stream), "rksc.group"),
    ):
        response = httpx.post(tiny_server.url + route, json=wrong, timeout=30.0)
        assert response.status_code == 400, response.text[:300]
        assert named in response.text and len(response.text) < 2000


def test_the_live_processes_report_every_hook_in_place(tiny_server: ServerProcess) -> None:
    info = tiny_server.get_json("/rksc/info")
    assert problems_in(info) == []
    assert info["radix_cache_backend"] is None, "SGLang's default tree, with all that a named one turns off"
    assert info["schedulers"][0]["tree_cache"] == "UnifiedRadixCache"
