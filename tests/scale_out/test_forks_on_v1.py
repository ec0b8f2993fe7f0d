"""A fork on SGLang's own endpoints: where a request asks for one, and nowhere else."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from rksc_sgl.server_process import ServerProcess
from tests.one_request.asking import NUMBER, SEVEN, body, events_of

pytestmark = [pytest.mark.server, pytest.mark.slow]

FORK = {"branches": 3, "verify": False, "early_stop": False}


def ask(
    server: ServerProcess, *, route: str = "chat/completions", headers: Any = None, **fields: Any
) -> httpx.Response:
    asked = body(route=route, **fields)
    return httpx.post(f"{server.url}/v1/{route}", json=asked, headers=headers, timeout=60.0, trust_env=False)


def text_of(choice: dict[str, Any]) -> str:
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
@pytest.mark.parametrize("place", ["body", "arguments", "header"])
def test_whoever_asks_for_a_fork_gets_one(tiny_server: ServerProcess, route: str, place: str) -> None:
    fields: dict[str, Any] = {"regex": SEVEN}
    headers = {"x-rksc-fork": json.dumps(FORK)} if place == "header" else None
    if place != "header":
        fields |= {"rksc": FORK} if place == "body" else {"chat_template_kwargs": {"rksc": FORK}}
    answer = ask(tiny_server, route=route, headers=headers, **fields).json()
    assert [branch["fate"] for branch in answer["rksc"]["branches"]] == ["finished"] * 3
    assert [text_of(choice) for choice in answer["choices"]] == ["The answer is 7."]


def test_a_fork_on_v1_streams(tiny_server: ServerProcess) -> None:
    answer = ask(tiny_server, chat_template_kwargs={"rksc": FORK}, regex=SEVEN, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream") and ": rksc " in answer.text
    events = events_of(answer.text)
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "The answer is 7."
    assert len(events[-1]["choices"][0].get("rksc", events[-1]["rksc"])["branches"]) == 3


@pytest.mark.parametrize("asked", [True, {}])
def test_a_fork_with_the_servers_defaults_is_true_or_an_empty_object(tiny_server: ServerProcess, asked: Any) -> None:
    answer = ask(tiny_server, chat_template_kwargs={"rksc": asked}, regex=SEVEN).json()
    assert len(answer["rksc"]["branches"]) == 8 and answer["rksc"]["decided"]["reason"] == "certain"


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_nobody_else_does(tiny_server: ServerProcess, route: str) -> None:
    plain = ask(tiny_server, route=route, regex=SEVEN)
    assert "rksc" not in plain.json() and text_of(plain.json()["choices"][0]) == "The answer is 7."
    for no in ({"rksc": False}, {"chat_template_kwargs": {"rksc": False}}, {"rksc": None}):
        answer = ask(tiny_server, route=route, regex=SEVEN, **no).json()
        assert answer.keys() == plain.json().keys()
        assert answer["usage"]["prompt_tokens"] == plain.json()["usage"]["prompt_tokens"]


def test_a_branch_that_a_client_drives_is_no_fork(tiny_server: ServerProcess) -> None:
    own = {"rksc": {"group": "a-client-s-own-on-v1", "branch": 1, "branches": 2}}
    answer = ask(tiny_server, custom_params=own, regex=SEVEN).json()
    assert "rksc" not in answer and answer["metadata"]["rksc"]["branch"] == 1


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"rksc": {"branches": 0}}, "rksc.branches"),
        ({"chat_template_kwargs": {"rksc": {"branch": 1}}}, "rksc.branch"),
        ({"chat_template_kwargs": {"rksc": "many"}}, "rksc"),
        ({"rksc": True, "custom_params": {"rksc": {"group": "g"}}}, "custom_params.rksc"),
    ],
)
def test_what_is_wrong_with_a_fork_is_named(tiny_server: ServerProcess, wrong: Any, param: str) -> None:
    answer = ask(tiny_server, **wrong)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_a_header_that_is_no_json_is_named(tiny_server: ServerProcess) -> None:
    answer = ask(tiny_server, headers={"x-rksc-fork": "eight"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "x-rksc-fork"


def test_what_no_fork_can_do_is_refused_where_a_fork_was_asked_for(tiny_server: ServerProcess) -> None:
    answer = ask(tiny_server, route="completions", rksc=FORK, prompt=["One.", "Two."])
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"


def test_the_other_endpoints_of_chats_have_no_forks(tiny_server: ServerProcess) -> None:
    asked = body({"branches": 3}, regex=NUMBER)
    answer = httpx.post(f"{tiny_server.url}/invocations", json=asked, timeout=60.0, trust_env=False)
    assert answer.status_code == 200 and "rksc" not in answer.json()
