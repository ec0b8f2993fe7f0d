"""Keys, limits and defaults of a server, and several HTTP workers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from rksc_sgl.cli.serve import problems_in
from rksc_sgl.errors import OptionError
from rksc_sgl.one_request.options import FORK_VARIABLE
from rksc_sgl.server_arguments import server_arguments, take_switches
from rksc_sgl.server_process import ServerProcess
from tests.one_request.asking import ENDLESS, NUMBER, SEVEN, asking, body, events_of, eventually

KEY = "a secret"
TINY = ("--max-total-tokens", "20000", "--max-running-requests", "32")
FLAGS = (
    *("--api-key", KEY, "--tool-call-parser", "qwen25"),
    "--constrained-json-disable-any-whitespace",  # a random model writes little else
)
DEFAULTS = {
    "branches": 3,
    "verify": False,
    "limits": {"branches": 4, "tokens": 2000, "forks": 1, "deadline_s": 60.0},
    "v1": True,
}


def test_defaults_and_limits_are_checked_before_the_server_starts() -> None:
    left, variables = take_switches(["--tp", "2", "--rksc-fork", '{"branches": 2}'])
    assert left == ["--tp", "2"] and variables == {FORK_VARIABLE: '{"branches": 2}'}
    with pytest.raises(OptionError, match=r"^--rksc-fork: rksc\.branches"):
        take_switches(["--rksc-fork", '{"branches": 0}'])
    with pytest.raises(OptionError, match=r"^--rksc-fork: limits\.forks"):
        take_switches(['--rksc-fork={"limits": {"forks": 0}}'])
    with pytest.raises(OptionError, match=r"^--rksc-fork: v1: must be true or false"):
        take_switches(['--rksc-fork={"v1": "all"}'])


@pytest.fixture(scope="module")
def guarded(tiny_model: Path) -> Iterator[ServerProcess]:
    arguments = server_arguments(["--model-path", str(tiny_model), *TINY, *FLAGS])
    with ServerProcess(arguments, variables={FORK_VARIABLE: json.dumps(DEFAULTS)}) as server:
        yield server


def asked(server: ServerProcess, rksc: Any = None, **fields: Any) -> httpx.Response:
    url, headers = f"{server.url}/rksc/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}
    return httpx.post(url, json=body(rksc, **fields), headers=headers, timeout=60.0)


@pytest.mark.server
@pytest.mark.slow
def test_a_key_guards_every_route_of_ours(guarded: ServerProcess) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    paths = httpx.get(f"{guarded.url}/openapi.json", headers=headers).json()["paths"]
    ours = [(path, method) for path in paths if path.startswith("/rksc") for method in paths[path]]
    assert len(ours) >= 7
    for path, method in ours:
        assert httpx.request(method, guarded.url + path.replace("{model}", "m")).status_code == 401, path
    assert httpx.get(f"{guarded.url}/rksc/v1/models", headers=headers).status_code == 200


@pytest.mark.server
@pytest.mark.slow
def test_defaults_and_limits_are_the_servers(guarded: ServerProcess) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    told = httpx.get(f"{guarded.url}/rksc/info", headers=headers, timeout=30.0).json()["one_request"]
    assert told == {"defaults": {"branches": 3, "verify": False}, "limits": DEFAULTS["limits"], "v1": True}
    assert len(asked(guarded, regex=SEVEN).json()["rksc"]["branches"]) == 3
    many = asked(guarded, {"branches": 5})
    assert many.status_code == 400 and many.json()["error"]["param"] == "rksc.branches"
    tokens = asked(guarded, max_tokens=900)
    assert tokens.status_code == 400 and tokens.json()["error"]["param"] == "max_tokens"
    assert "ask for at most" in tokens.json()["error"]["message"]
    unlimited = body(regex=SEVEN)
    del unlimited["max_tokens"]
    url = f"{guarded.url}/rksc/v1/chat/completions"
    assert httpx.post(url, json=unlimited, headers=headers, timeout=60.0).status_code == 200


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_v1_forks_by_default_where_the_server_says_so(guarded: ServerProcess, route: str) -> None:
    def on_v1(**fields: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        asked = {**body(route=route), "regex": SEVEN, **fields}
        return httpx.post(f"{guarded.url}/v1/{route}", json=asked, headers=headers, timeout=60.0)

    assert len(on_v1().json()["rksc"]["branches"]) == 3
    assert len(on_v1(chat_template_kwargs={"rksc": {"branches": 2}}).json()["rksc"]["branches"]) == 2
    for no in ({"rksc": False}, {"chat_template_kwargs": {"rksc": False}}, {"custom_params": {"rksc": {}}}):
        answer = on_v1(**no)
        assert answer.status_code == 200 and "rksc" not in answer.json()
    wrong = on_v1(n=4)
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "n"
    assert wrong.json()["error"]["message"].endswith("unless it says rksc false (--rksc-fork, v1)")
    assert "--rksc-fork" not in on_v1(rksc={"branches": 3}, n=4).text
    # What no fork can do is SGLang's, for nobody asked for one.
    nothing, own = on_v1(max_tokens=0), on_v1(max_tokens=0, rksc=False)
    assert nothing.status_code == own.status_code and nothing.json().keys() == own.json().keys()
    if route == "completions":
        answer = on_v1(prompt=["One.", "Two."]).json()
        assert len(answer["choices"]) == 2 and "rksc" not in answer


@pytest.mark.server
@pytest.mark.slow
def test_json_votes_as_a_whole(guarded: ServerProcess) -> None:
    schema = {
        "type": "object",
        "properties": {"cows": {"const": 7}},
        "required": ["cows"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "cows", "schema": schema, "strict": True}}
    answer = asked(guarded, {"branches": 3}, response_format=wanted, max_tokens=100).json()
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"cows": 7}
    assert json.loads(answer["rksc"]["answer"]) == {"cows": 7}


@pytest.mark.server
@pytest.mark.slow
def test_tools_are_called_by_vote(guarded: ServerProcess) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "subtract", "parameters": parameters}}]
    call = r"<tool_call>\n\{\"name\": ?\"subtract\", ?\"arguments\": ?\{\"a\": ?5\}\}\n</tool_call>"
    wanted = {"tools": tools, "regex": call, "max_tokens": 100}
    answer = asked(guarded, {"branches": 3}, **wanted).json()
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "subtract" and json.loads(call["function"]["arguments"]) == {"a": 5}
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert answer["rksc"]["answer"] == '[["subtract", "{\\"a\\": 5}"]]'
    assert answer["rksc"]["decided"]["reason"] == "certain"
    events = events_of(asked(guarded, {"branches": 3}, stream=True, **wanted).text)
    calls = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls", [])]
    assert [call["function"]["name"] for call in calls] == ["subtract"]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_fork_too_many_is_told_to_come_back(guarded: ServerProcess, stream: bool) -> None:
    with asking(guarded, {"early_stop": False}, KEY, stream=stream, **ENDLESS | {"max_tokens": 600}):
        eventually(lambda: running(guarded) > 0)
        full = asked(guarded, regex=SEVEN)
        assert full.status_code == 429 and full.headers["Retry-After"] == "1"
        assert full.json()["error"]["type"] == "rate_limit_error"
    eventually(lambda: running(guarded) == 0)
    assert asked(guarded, regex=SEVEN).status_code == 200, "the place is free again"


def running(server: ServerProcess) -> int:
    answer = httpx.get(f"{server.url}/rksc/stats", headers={"Authorization": f"Bearer {KEY}"}, timeout=30.0)
    return int(answer.json()["schedulers"][0]["requests"]["running"])


@pytest.mark.server
@pytest.mark.slow
def test_several_http_workers_serve_forks(tiny_model: Path) -> None:
    flags = [*TINY, "--tokenizer-worker-num", "2", "--reasoning-parser", "qwen3"]
    with ServerProcess(server_arguments(["--model-path", str(tiny_model), *flags])) as server:
        assert problems_in(server.get_json("/rksc/info")) == []
        plain = {"chat_template_kwargs": {"enable_thinking": False}}  # the grammar is of all of the text
        with ThreadPoolExecutor(8) as pool:  # connections of both workers
            answers = list(pool.map(lambda _: asked(server, {"branches": 3}, regex=SEVEN, **plain), range(16)))
        assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == ["The answer is 7."] * 16
        wrong = asked(server, {"branches": 0})
        assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "rksc.branches"
        tied = asked(server, {"branches": 2, "early_stop": False}, regex=NUMBER, **plain).json()
        assert tied["rksc"]["verified"] == [0, 1]
        check_thoughts(server)


def check_thoughts(server: ServerProcess) -> None:
    """On a server with a reasoning parser: thoughts are kept apart, and never vote."""
    aloud = {"regex": r"<think>It is [0-9]{6}\.</think>The answer is 7\.", "max_tokens": 60}
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    said = asked(server, {"branches": 3, "early_stop": False}, **aloud, **off).json()
    message = said["choices"][0]["message"]
    assert message["content"] == "The answer is 7." and message["reasoning_content"].startswith("It is ")
    assert said["rksc"]["reason"] == "vote: 3 of 3 branches answer alike"
    events = events_of(asked(server, {"branches": 2}, stream=True, **aloud, **off).text)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas).startswith("It is ")
    assert "".join(delta.get("content", "") for delta in deltas) == "The answer is 7."
    # The model thinks, and is cut before it has said anything.
    silent = asked(server, {"branches": 2}, max_tokens=8, ignore_eos=True).json()
    assert silent["choices"][0]["message"]["content"] == "" and silent["choices"][0]["finish_reason"] == "length"
    assert silent["rksc"]["answer"] is None and silent["rksc"]["verified"] == []
