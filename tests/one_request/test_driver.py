"""A fork is carried out on a tokenizer manager that answers from a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from rksc_sgl.memory.settings import LEASE_VARIABLE
from rksc_sgl.one_request.fork import Chosen, Completion, Failed, Fork
from rksc_sgl.one_request.options import ForkOptions
from rksc_sgl.options import RequestOptions
from rksc_sgl.sglang_plugin.memory.ending import group_that_ended
from rksc_sgl.sglang_plugin.one_request.driver import Branch, Driver


class Manager:
    """
    Attributes:
        said: what was begun, told and aborted, in order.
        over: the forks that the scheduler was told to have ended, and how many requests there were then.
    """

    incremental_streaming_output = False

    def __init__(self, script: dict[int, Any]) -> None:
        self.script = script
        self.said: list[str] = []
        self.over: list[tuple[str | None, int]] = []
        self.rid_to_state: dict[str, Any] = {}
        self._aborted: dict[str, asyncio.Event] = {}

    def _dispatch_to_scheduler(self, request: Any) -> None:
        self.over.append((group_that_ended(request.rid), len(self.rid_to_state)))

    def abort_request(self, rid: str) -> None:
        self.said.append(f"abort {rid}")
        self._aborted[rid].set()

    async def generate_request(self, request: Any, raw: Any) -> AsyncIterator[dict[str, Any]]:
        """Tokens one by one; a branch without a text runs until it is aborted, and an error is raised."""
        rid, text = request.rid, self.script[int(request.rid)]
        self.said.append(f"begin {rid}")
        self.rid_to_state[rid] = SimpleNamespace(dispatched=True)
        self._aborted[rid] = asyncio.Event()
        try:
            await asyncio.sleep(0)
            if isinstance(text, Exception):
                raise text
            self.said.append(f"token {rid}")
            yield event(rid, "", 1, None)
            if text is None:
                await self._aborted[rid].wait()
                yield event(rid, "", 3, {"type": "abort", "message": "Aborted"})
            else:
                yield event(rid, text, 2, {"type": "stop"})
        except BaseException as error:
            if not isinstance(error, (ValueError, GeneratorExit)):
                self.said.append(f"left {rid}")
            raise
        finally:
            del self.rid_to_state[rid]


def event(rid: str, text: str, tokens: int, finish: Any) -> dict[str, Any]:
    counts = {"prompt_tokens": 9, "cached_tokens": 4, "completion_tokens": tokens}
    return {"text": text, "output_ids": [1] * tokens, "meta_info": {"id": rid, "finish_reason": finish, **counts}}


def driven(manager: Manager, deadline_s: float = 30.0, *, sampling: Any = None, **options: Any) -> tuple[Any, Driver]:
    count = len(manager.script)
    fork = Fork(ForkOptions.from_mapping({"branches": count, "verify": False, **options}))

    async def run() -> tuple[Any, Driver]:
        branches = [
            Branch(
                RequestOptions(group="g", branch=index, branches=count),
                SimpleNamespace(rid=str(index), input_ids=[1, 2], sampling_params=sampling or {}),
            )
            for index in range(count)
        ]
        driver = Driver(manager, branches, lambda branch, one: Completion(one["text"]), None, deadline_s, None)
        return await driver.run(fork), driver

    end, driver = asyncio.run(run())
    return (end, fork.record()), driver


def test_branches_that_run_are_aborted_when_the_vote_is_decided_and_their_tokens_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(LEASE_VARIABLE, "30")
    manager = Manager({0: "The answer is 7.", 1: "The answer is 7.", 2: None})
    (end, record), driver = driven(manager, early_stop={"policy": "certain", "launch": "all"})
    assert isinstance(end, Chosen) and end.order == (0, 1)
    assert "abort 2" in manager.said
    assert [branch.tokens for branch in record.branches] == [2, 2, 3]
    assert not manager.rid_to_state and driver.facts[2].prompt_tokens == 9
    assert manager.over == [("g", 0)], "what the server keeps of the fork goes once no request of it is left"
    monkeypatch.setenv(LEASE_VARIABLE, "0")
    driven(manager)
    assert manager.over == [("g", 0)], "a server that keeps nothing is told nothing"


def test_a_branch_that_raises_loses_and_says_its_status() -> None:
    manager = Manager({0: ValueError("too long"), 1: "The answer is 8."})
    (end, record), driver = driven(manager, early_stop=False)
    assert isinstance(end, Chosen) and end.order == (1,)
    assert record.branches[0].why == "too long" and driver.statuses == {0: 400}
    manager = Manager({0: ValueError("too long"), 1: ValueError("too long")})
    (end, _), driver = driven(manager, early_stop=False)
    assert end == Failed("every branch failed: too long", late=False) and driver.statuses == {0: 400, 1: 400}


def test_at_the_deadline_nothing_is_left() -> None:
    manager = Manager({0: "The answer is 7.", 1: None})
    (end, record), _ = driven(manager, 0.2, early_stop=False)
    assert isinstance(end, Chosen) and end.partial and end.order == (0,)
    assert record.of_fate("stopped") == [1] and not manager.rid_to_state


@pytest.mark.parametrize("ticks", range(6))
def test_who_drives_it_may_be_cancelled_and_nothing_is_left(ticks: int) -> None:
    """Also when an event came shortly before: ``asyncio.wait_for`` of Python 3.11 then drops the cancellation."""
    manager = Manager({0: None, 1: None})

    async def cancelled() -> None:
        fork = Fork(ForkOptions.from_mapping({"branches": 2, "verify": False, "early_stop": False}))
        branches = [
            Branch(
                RequestOptions(group="g", branch=index, branches=2),
                SimpleNamespace(rid=str(index), input_ids=[1], sampling_params={}),
            )
            for index in range(2)
        ]
        driver = Driver(manager, branches, lambda branch, one: Completion(one["text"]), None, 30.0, None)
        task = asyncio.create_task(driver.run(fork))
        while len([said for said in manager.said if said.startswith("token")]) < 2:
            await asyncio.sleep(0.01)
        driver._events.put_nowait((False, lambda: fork.tokens(0, 1, None)))
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 5.0)

    asyncio.run(cancelled())
    assert not manager.rid_to_state
    assert [said for said in manager.said if said.startswith("left")] == ["left 0", "left 1"]


def test_branches_with_a_grammar_begin_when_the_first_has_compiled_it() -> None:
    script = dict.fromkeys(range(3), "The answer is 7.")
    for sampling, first in (({"regex": "."}, "token 0"), ({}, "begin 1")):
        manager = Manager(dict(script))
        driven(manager, early_stop=False, sampling=sampling)
        assert manager.said[:2] == ["begin 0", first]
    manager = Manager({0: ValueError("no such grammar"), 1: "The answer is 7."})
    (end, _), _ = driven(manager, early_stop=False, sampling={"regex": "("})
    assert isinstance(end, Chosen) and end.order == (1,), "a first branch that fails keeps nobody waiting"
