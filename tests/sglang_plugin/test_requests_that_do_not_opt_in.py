"""A request that does not opt in is answered as on SGLang's default tree without our hooks, bit for bit."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from rksc_sgl.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]


def bodies() -> Iterator[dict[str, Any]]:
    """Requests one after another: shared and repeated prefixes, chunks, several at once, namespaces."""
    source = random.Random(0)

    def words(count: int) -> list[int]:
        return [source.randrange(3, 250) for _ in range(count)]

    common, greedy = words(150), {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    for tail in (0, 1, 40, 200, 40):
        yield {"input_ids": common + words(tail), "sampling_params": greedy}
    yield {"input_ids": common, "sampling_params": greedy, "extra_key": "somebody"}
    yield {"input_ids": common[:70] + words(30), "sampling_params": greedy, "extra_key": "somebody"}
    yield {"input_ids": [common + words(5) for _ in range(4)], "sampling_params": greedy}


def test_answers_are_those_of_the_default_tree(tiny_server: ServerProcess, bare_tiny_server: ServerProcess) -> None:
    found: dict[str, list[Any]] = {}
    for server in (tiny_server, bare_tiny_server):
        with httpx.Client(base_url=server.url, timeout=120.0, trust_env=False) as client:
            client.post("/flush_cache").raise_for_status()
            answers = []
            for body in bodies():
                asked = {**body, "return_logprob": True, "top_logprobs_num": 3}
                given = client.post("/generate", json=asked).raise_for_status().json()
                for one in given if isinstance(given, list) else [given]:
                    meta = one["meta_info"]
                    assert "rksc" not in meta
                    names = ("cached_tokens", "prompt_tokens", "output_token_logprobs", "output_top_logprobs")
                    answers.append([one["output_ids"], *(meta[name] for name in names)])
        found[server.url] = answers
    ours, bare = found[tiny_server.url], found[bare_tiny_server.url]
    assert any(answer[1] > 0 for answer in bare), "nothing was cached: the test shows nothing"
    assert ours == bare


def openai_bodies() -> Iterator[tuple[str, dict[str, Any]]]:
    greedy = {"model": "m", "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    for stream in (False, True):
        chat = {"messages": [{"role": "user", "content": "How many cows are left?"}], "stream": stream, **greedy}
        yield "chat/completions", {**chat, "n": 2, "logprobs": True, "top_logprobs": 2}
        yield "chat/completions", {**chat, "chat_template_kwargs": {"enable_thinking": False}}
        yield "completions", {"prompt": "rksc counts the cows.", "stream": stream, "logprobs": 2, **greedy}
    yield "chat/completions", {"messages": [], **greedy}
    yield "completions", {"prompt": "A cow", "max_tokens": -1, "model": "m"}


def test_answers_on_v1_are_sglangs(tiny_server: ServerProcess, bare_tiny_server: ServerProcess) -> None:
    found = {}
    for server in (tiny_server, bare_tiny_server):
        with httpx.Client(base_url=server.url, timeout=120.0, trust_env=False) as client:
            client.post("/flush_cache").raise_for_status()
            answers = [client.post(f"/v1/{route}", json=body) for route, body in openai_bodies()]
        found[server.url] = [(answer.status_code, said(answer)) for answer in answers]
    assert found[tiny_server.url] == found[bare_tiny_server.url]
    assert [status for status, _ in found[tiny_server.url]].count(200) == 6


def said(answer: httpx.Response) -> Any:
    """An answer without its id and time; of a stream, which may come in other pieces, texts and ends."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        body = answer.json()
        return {name: value for name, value in body.items() if name not in ("id", "created")}
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                piece = choice["text"] if "text" in choice else choice["delta"].get("content")
                texts[choice["index"]] = texts.get(choice["index"], "") + (piece or "")
                if choice["finish_reason"]:
                    ends[choice["index"]] = choice["finish_reason"]
    return texts, ends
