"""Requests that would end a server: a bounded fuzz over every field of ``/generate``, and what it found."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.sglang_plugin.wiring.fatal_requests import MOST_SAMPLES, Limits, problem_of_body, problem_of_request

LIMITS = Limits(vocabulary=512)
MOST_REQUESTS, TOGETHER = 300, 15
PROMPT = {"text": "The cow has legs"}
SAMPLING = {"max_new_tokens": 2, "temperature": 0}

# Each of these ended a server of SGLang 0.5.23, or kept it busy until it was killed, and the field that is named.
FATAL: list[tuple[dict[str, Any], str]] = [
    ({"text": ""}, "prompt"),
    ({"text": ["", "a"]}, "prompt"),
    ({"input_ids": [[]]}, "prompt"),
    ({"input_ids": [[5, 6], []]}, "prompt"),
    ({"input_ids": [-1]}, "input_ids"),
    ({"input_ids": [3, 512]}, "input_ids"),
    ({"input_ids": [[3], [100000]]}, "input_ids"),
    ({**PROMPT, "return_logprob": True, "logprob_start_len": [-1]}, "logprob_start_len"),
    ({**PROMPT, "return_logprob": True, "logprob_start_len": []}, "logprob_start_len"),
    ({**PROMPT, "return_logprob": True, "top_logprobs_num": 100000}, "top_logprobs_num"),
    ({**PROMPT, "return_logprob": True, "top_logprobs_num": 513}, "top_logprobs_num"),
    ({"text": ["a", "b"], "return_logprob": True, "top_logprobs_num": [1, 2**40]}, "top_logprobs_num"),
    ({**PROMPT, "return_hidden_states": []}, "return_hidden_states"),
    ({**PROMPT, "lora_id": []}, "lora_id"),
    ({**PROMPT, "lora_id": ["x"]}, "lora_id"),
    ({**PROMPT, "positional_embed_overrides": True}, "positional_embed_overrides"),
    ({**PROMPT, "positional_embed_overrides": 0}, "positional_embed_overrides"),
    ({**PROMPT, "sampling_params": {"n": 100000}}, "sampling_params.n"),
    ({**PROMPT, "sampling_params": [{"n": 2**31}]}, "sampling_params.n"),
]

RIGHT: list[dict[str, Any]] = [
    PROMPT,
    {"text": ["a", "b"], "return_logprob": [True, False], "logprob_start_len": [0, -1], "top_logprobs_num": [2, 0]},
    {"input_ids": [0, 511], "return_logprob": True, "top_logprobs_num": 512, "logprob_start_len": 0},
    {"input_ids": [[0], [511]], "lora_path": [None, "adapter"], "return_hidden_states": [False, "last"]},
    {"input_ids": [], "session_params": {"id": "continued"}},
    {**PROMPT, "sampling_params": {"n": MOST_SAMPLES, "max_new_tokens": 0}},
    {**PROMPT, "bootstrap_host": None, "lora_id": None, "return_hidden_states": False},
]

VALUES: list[Any] = [
    *(True, -1, 0, 3, 100000, 2**31, 2**40, 2**63 - 1, 2**64, -(2**31), -(2**63), 0.5, 1e30, -1e30),
    *("", "x", "\ud83d", [], [""], ["x"], [[]], [None], [0], [-1], [1.5], [True], [100000], [[0]], [[-1]], [[100000]]),
    *({}, {"x": 1}, {"0": 1}, {"-1": 1.0}, {"100000": 1.0}, [2**40]),
]


@pytest.mark.parametrize(("body", "named"), FATAL)
def test_what_ended_a_server_is_refused_by_the_name_of_its_field(body: dict[str, Any], named: str) -> None:
    problem = problem_of_body(body, LIMITS)
    assert problem is not None
    assert problem.startswith(f"{named}: ")
    assert len(problem) < 200


@pytest.mark.parametrize("body", RIGHT)
def test_what_a_server_can_do_is_let_through(body: dict[str, Any]) -> None:
    assert problem_of_body(body, LIMITS) is None


@pytest.mark.parametrize("body", [None, [], "text", 3, {}, {"text": 3}, {"input_ids": "x"}, {"input_ids": [0.5]}])
def test_what_is_not_a_request_is_left_to_sglang(body: Any) -> None:
    assert problem_of_body(body, LIMITS) is None


def test_a_prompt_that_tokenizes_to_nothing_is_refused_whatever_way_it_came() -> None:
    request = SimpleNamespace(text="\u200b", input_embeds=None)
    assert problem_of_request(request, [], LIMITS).startswith("prompt: ")
    assert problem_of_request(request, [7], LIMITS) is None
    assert problem_of_request(SimpleNamespace(text=None, input_embeds=[[0.5]]), None, LIMITS) is None
    assert problem_of_request(request, [512], LIMITS).startswith("input_ids: ")


def test_one_request_of_an_engine_is_checked_as_one_of_a_body() -> None:
    request = SimpleNamespace(text="a", input_embeds=None, top_logprobs_num=513)
    assert problem_of_request(request, [7], LIMITS).startswith("top_logprobs_num: ")
    spoiled = SimpleNamespace(text="a", input_embeds=None, positional_embed_overrides=True)
    assert problem_of_request(spoiled, [7], LIMITS).startswith("positional_embed_overrides: ")
    right = SimpleNamespace(reconstruct=lambda: None)
    whole = SimpleNamespace(text="a", input_embeds=None, positional_embed_overrides=right)
    assert problem_of_request(whole, [7], LIMITS) is None


def some_bodies(seed: int) -> list[tuple[str, dict[str, Any]]]:
    """A few values for every field of a body and of its sampling parameters."""
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    source = random.Random(seed)
    names = [field.name for field in dataclasses.fields(GenerateReqInput)]
    inner = list(SamplingParams.__struct_fields__)
    each = MOST_REQUESTS // (len(names) + len(inner))
    assert each >= 2
    bodies = []
    for name in names:
        for value in source.sample(VALUES, each):
            prompt = {} if name in ("text", "input_ids", "input_embeds") else PROMPT
            asked = {"return_logprob": True} if "logprob" in name else {}
            bodies.append((name, {**prompt, "sampling_params": SAMPLING, **asked, name: value}))
    for name in inner:
        for value in source.sample(VALUES, each):
            bodies.append((f"sampling_params.{name}", {**PROMPT, "sampling_params": {**SAMPLING, name: value}}))
    source.shuffle(bodies)
    return bodies


@pytest.fixture(scope="module")
def mortal(tiny_model: Path) -> Iterator[ServerProcess]:
    """A server that these tests may end."""
    arguments = ["--model-path", str(tiny_model), "--max-total-tokens", "20000", "--chunked-prefill-size", "64"]
    with ServerProcess(server_arguments(arguments)) as server:
        yield server


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    alone = httpx.Limits(max_keepalive_connections=0)  # SGLang closes the connection after an error of its own
    with httpx.Client(timeout=60.0, trust_env=False, limits=alone) as one:
        yield one


def sent(client: httpx.Client, server: ServerProcess, body: dict[str, Any]) -> httpx.Response | None:
    """The answer; None where the connection broke, which says nothing of the server yet."""
    with contextlib.suppress(httpx.TransportError):
        url = f"{server.url}/generate"
        with client.stream("POST", url, content=json.dumps(body).encode(), headers=JSON) as response:
            response.read()
        return response
    return None


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_no_value_of_any_field_ends_the_server_and_what_is_refused_is_named(
    mortal: ServerProcess, client: httpx.Client, seed: int
) -> None:
    bodies = some_bodies(seed)
    assert len(bodies) <= MOST_REQUESTS
    answered: Counter[int] = Counter()
    refused = 0
    for begin in range(0, len(bodies), TOGETHER):
        together = bodies[begin : begin + TOGETHER]
        for name, body in together:
            response = sent(client, mortal, body)
            if response is not None:
                answered[response.status_code] += 1
            problem = problem_of_body(body, LIMITS)
            if problem is not None:
                refused += 1
                assert response is not None and response.status_code == 400, (name, body, response)
                # SGLang's own complaint comes first: its parser takes no lone surrogate and no number beyond 64 bits.
                named = (problem.partition(":")[0], name, "json_invalid")
                assert any(one in response.text for one in named), (named, response.text[:300])
        shown = [(name, body[name] if name in body else body["sampling_params"]) for name, body in together]
        assert alive(mortal), f"one of these ended the server: {shown}\n{mortal.log_tail(20)}"
    assert answered[200] >= 10 and answered[400] >= 20 and refused >= 10, (answered, refused)


@pytest.mark.server
@pytest.mark.slow
def test_what_ended_a_server_is_answered_400_by_one_that_goes_on_streamed_or_not(
    mortal: ServerProcess, client: httpx.Client
) -> None:
    for body, named in FATAL:
        for stream in (False, True):
            response = sent(client, mortal, {"sampling_params": SAMPLING, **body, "stream": stream})
            assert response is not None and response.status_code == 400, (body, stream, response)
            assert f"{named}: " in response.text, response.text[:300]
        assert alive(mortal), f"{body} ended the server\n{mortal.log_tail(20)}"


JSON = {"content-type": "application/json"}


def alive(server: ServerProcess) -> bool:
    """Whether a server answers, and still computes."""
    if server.returncode is not None:
        return False
    try:
        health = httpx.get(f"{server.url}/health", timeout=30.0)
        body = {**PROMPT, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=60.0)
    except httpx.TransportError:
        return False
    return health.status_code == 200 and answer.status_code == 200
