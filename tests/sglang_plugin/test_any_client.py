"""The HTTP surface that every client has."""

from __future__ import annotations

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


def test_the_live_processes_report_every_hook_in_place(tiny_server: ServerProcess) -> None:
    info = tiny_server.get_json("/rksc/info")
    assert problems_in(info) == []
    assert info["radix_cache_backend"] == "rksc"
