"""OpenAI's own client: sync, async, streaming, and many forks at once."""

from __future__ import annotations

import asyncio
import re
import subprocess
from typing import Any

import openai
import pytest

from rksc_sgl import Endpoint
from rksc_sgl.frontend.verify import verification_suffix
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.verifying.question import question_with_labels
from tests.one_request.asking import MESSAGES, SEVEN, STORY, client_of, eventually, is_clean

pytestmark = [pytest.mark.server, pytest.mark.slow]

FORKS, CONNECTIONS = 200, 32


def test_the_client_streams_the_selected_answer(tiny_server: ServerProcess) -> None:
    extra = {"rksc": {"branches": 3}, "regex": SEVEN}
    stream = client_of(tiny_server).chat.completions.create(
        model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, extra_body=extra
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "The answer is 7."
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0
    assert [chunk.model_extra["rksc"]["answer"] for chunk in chunks if "rksc" in (chunk.model_extra or {})] == ["7"]


def test_the_client_reads_an_error_of_a_stream(tiny_server: ServerProcess) -> None:
    extra = {"rksc": {"branches": 2, "deadline_s": 0.2}, "ignore_eos": True}
    stream = client_of(tiny_server).chat.completions.create(
        model="m", messages=MESSAGES, stream=True, max_tokens=1500, extra_body=extra
    )
    with pytest.raises(openai.APIError, match=r"the deadline of 0\.2 s passed"):
        list(stream)


def test_forks_of_many_connections_are_neither_lost_nor_mixed_up(tiny_server: ServerProcess) -> None:
    async def fork(client: openai.AsyncOpenAI, gate: asyncio.Semaphore, number: int) -> tuple[int, str, Any]:
        extra = {"rksc": {"branches": 2}, "regex": rf"Fork {number}: the answer is {number}\."}
        async with gate:
            asked: list[Any] = [{"role": "user", "content": f"{number} {STORY}"}]
            streamed = number % 4 == 0
            answer = await client.chat.completions.create(
                model="m", messages=asked, max_tokens=40, extra_body=extra, stream=streamed
            )
            if not streamed:
                return number, answer.choices[0].message.content, answer.model_extra["rksc"]
            chunks = [chunk async for chunk in answer]
            return (
                number,
                "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
                chunks[-1].model_extra["rksc"],
            )

    async def all_forks() -> list[tuple[int, str, Any]]:
        async with openai.AsyncOpenAI(
            base_url=f"{tiny_server.url}/rksc/v1", api_key="none", max_retries=0, timeout=300.0
        ) as client:
            gate = asyncio.Semaphore(CONNECTIONS)
            return await asyncio.gather(*(fork(client, gate, number) for number in range(FORKS)))

    answers = asyncio.run(all_forks())
    assert [number for number, _, _ in answers] == list(range(FORKS))
    for number, text, rksc in answers:
        assert text == f"Fork {number}: the answer is {number}." and rksc["answer"] == str(number)
        assert {branch["report"]["group"] for branch in rksc["branches"] if branch["report"]} == {rksc["group"]}
    assert len({rksc["group"] for _, _, rksc in answers}) == FORKS
    eventually(lambda: is_clean(tiny_server))


def test_curl_gets_an_answer(tiny_server: ServerProcess) -> None:
    asked = '{"model": "m", "messages": [{"role": "user", "content": "12 - 5?"}], "max_tokens": 4}'
    url = f"{tiny_server.url}/rksc/v1/chat/completions"
    command = ["curl", "-sS", url, "-H", "Content-Type: application/json", "-d", asked]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search('"object": ?"chat.completion"', said) and '"rksc"' in said


def test_a_verification_asks_what_a_programs_does(smollm: Endpoint, smollm_server: ServerProcess) -> None:
    extra = {"rksc": {"branches": 2, "early_stop": False}, "regex": r"The answer is [0-9]{8}\."}
    answer = client_of(smollm_server).chat.completions.create(
        model="default", messages=MESSAGES, max_tokens=40, extra_body=extra
    )
    template = smollm.chat_template
    turns = [*MESSAGES, {"role": "assistant", "content": answer.choices[0].message.content}]
    _, closing = template.get_prefix_and_suffix("assistant", turns)
    question = question_with_labels(None, ("YES", "NO"))
    asked = len(smollm.tokenize(closing + verification_suffix(question, template, turns)))
    for branch in answer.model_extra["rksc"]["branches"]:  # type: ignore[index]
        verified = branch["verification"]["reused_tokens"] + branch["verification_tokens"]
        before = branch["prompt_tokens"] + branch["tokens"]
        assert verified - asked in (before, before - 1), "a token that ended the branch is in the question's text"
