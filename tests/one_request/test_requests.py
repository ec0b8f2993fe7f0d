"""The requests that a fork becomes."""

from __future__ import annotations

import asyncio
import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest

from rksc_sgl.one_request.options import ForkSettings
from rksc_sgl.options import KEY
from rksc_sgl.sglang_plugin.one_request.service import Service, _schedulers

INFOS: dict[bool, list[dict[str, Any]]] = {
    True: [{KEY: {"confidence": {"offered": True}}}] * 2,
    False: [{KEY: {"confidence": {"offered": True}}}, {KEY: {"confidence": {"offered": False}}}],
}


class Dialect:
    """One of a request that asks for this much."""

    def __init__(self, offered: bool, logprobs: int | None) -> None:
        self.asked, self._logprobs = 0, logprobs

        async def state() -> list[dict[str, Any]]:
            self.asked += 1
            return INFOS[offered]

        config = SimpleNamespace(context_len=100)
        self.manager = SimpleNamespace(
            tokenizer=object(), model_config=config, get_internal_state=state, incremental_streaming_output=False
        )

    def parse(self, body: dict[str, Any]) -> Any:
        return SimpleNamespace(n=1, rid=None, stream=False, model_copy=lambda deep: SimpleNamespace(n=1))

    def check(self, request: Any) -> None:
        pass

    def convert(self, request: Any, raw: Any) -> Any:
        logprobs = self._logprobs
        sampling = {"max_new_tokens": 8, "temperature": 0.5, "custom_params": {"theirs": 1}}
        return SimpleNamespace(
            input_ids=[1, 2, 3],
            text=None,
            sampling_params=sampling,
            return_logprob=logprobs is not None,
            top_logprobs_num=logprobs,
        )

    def wants_json(self, request: Any) -> bool:
        return False


def requests_of(dialect: Dialect, service: Service) -> list[Any]:
    async def body() -> bytes:
        return json.dumps({"rksc": {"branches": 2, "verify": False}}).encode()

    raw = SimpleNamespace(headers={"content-type": "application/json"}, body=body)
    prepared = asyncio.run(service._prepare(dialect, raw))  # type: ignore[arg-type]
    return [copy.copy(branch.request) for branch in prepared.driver._branches]


@pytest.mark.parametrize("logprobs", [None, 0, 3])
def test_confidence_is_asked_for_by_name_where_the_server_measures_it(logprobs: int | None) -> None:
    dialect, service = Dialect(True, logprobs), Service(ForkSettings())
    for request in (*requests_of(dialect, service), *requests_of(dialect, service)):
        custom = request.sampling_params["custom_params"]
        assert custom["theirs"] == 1 and custom[KEY]["confidence"] is True
        assert request.return_logprob == (logprobs is not None) and request.top_logprobs_num == logprobs
    assert dialect.asked == 1, "what a server offers does not change"


@pytest.mark.parametrize(("logprobs", "alternatives"), [(None, 1), (0, 1), (3, 3)])
def test_elsewhere_it_is_made_of_log_probabilities(logprobs: int | None, alternatives: int) -> None:
    for request in requests_of(Dialect(False, logprobs), Service(ForkSettings())):
        assert "confidence" not in request.sampling_params["custom_params"][KEY]
        assert request.return_logprob and request.top_logprobs_num == alternatives


def test_a_question_to_the_scheduler_is_not_left_before_its_answer() -> None:
    async def left() -> bool:
        answered, may_answer = asyncio.Event(), asyncio.Event()

        async def state() -> list[dict[str, Any]]:
            await may_answer.wait()
            answered.set()
            return []

        asking = asyncio.create_task(_schedulers(SimpleNamespace(get_internal_state=state)))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        may_answer.set()
        await asyncio.wait_for(answered.wait(), 5.0)
        return asking.cancelled()

    assert asyncio.run(left())
