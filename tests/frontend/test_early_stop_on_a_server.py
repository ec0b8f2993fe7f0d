"""Branches that are stopped on a real server: requests end, and what was computed stays of use."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sglang as sgl
from limits import within
from open_states import open_state
from sglang.lang.interpreter import ProgramState

import rksc_sgl
from rksc_sgl import EarlyStop, Endpoint, SkipGate
from rksc_sgl.errors import OptionError, ServerUnreachableError
from rksc_sgl.metrics import STOPPED_BRANCHES

pytestmark = [pytest.mark.server, pytest.mark.slow]

STORY = "A farmer has 12 cows and sells 5 of them on Monday. " * 6
SHORT = {"regex": r"The answer is 7\.", "max_tokens": 40}
LONG = {"max_tokens": 2500, "ignore_eos": True}
MEANING_LESS = EarlyStop("certain", launch="all", extract=lambda text: "7")


def state_on(backend: Any, stream: bool = False) -> ProgramState:
    return open_state(backend, STORY, stream, temperature=1.0)


def stopped_counts(endpoint: Endpoint) -> float:
    return endpoint.get_json("/rksc/stats")["schedulers"][0]["counters"][STOPPED_BRANCHES][0]["value"]


def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.2)


def running(endpoint: Endpoint) -> int:
    (load,) = endpoint.get_json("/v1/loads?include=core")["loads"]
    return int(load["num_running_reqs"] + load["num_waiting_reqs"])


def decoding(endpoint: Endpoint) -> int:
    (load,) = endpoint.get_json("/v1/loads?include=core")["loads"]
    return int(load["num_running_reqs"])


def first_four_short(backend: Endpoint, early_stop: EarlyStop, stream: bool = False) -> rksc_sgl.BranchGroup:
    """Eight branches, of which the last four are decoding before the first four decide."""
    group = sgl.fork_similar(state_on(backend, stream), 8, early_stop=early_stop)
    for branch in group.states[4:]:
        branch += sgl.gen("answer", **LONG)
    eventually(lambda: decoding(backend) >= 4)
    for branch in group.states[:4]:
        branch += sgl.gen("answer", **SHORT)
    return group


def check_stopped(group: rksc_sgl.BranchGroup) -> None:
    verdict = within(120, lambda: sgl.verify_gated(group, "answer"))
    assert (verdict.skipped, verdict.answers[:4]) == (True, ["7"] * 4)
    assert verdict.reason.startswith("stopped early (certain)")
    record = group.stopping
    assert record.of_fate("finished") == [0, 1, 2, 3]
    assert record.of_fate("stopped") == [4, 5, 6, 7]
    assert all(one.tokens < 2500 for one in record.branches[4:])
    assert record.tokens_spent == sum(one.tokens for one in record.branches)
    for branch, error in zip(group, verdict.errors, strict=True):
        assert (str(branch.error()) if branch.error() else None) == error


@pytest.mark.parametrize("stream", [False, True])
def test_branches_that_run_are_aborted_and_their_tokens_known(tiny: Endpoint, stream: bool) -> None:
    before = stopped_counts(tiny)
    group = first_four_short(tiny, MEANING_LESS, stream)
    check_stopped(group)
    assert all(branch.tokens > 0 for branch in group.stopping.branches)
    eventually(lambda: running(tiny) == 0)
    assert stopped_counts(tiny) == before + 4
    again = sgl.fork_similar(state_on(tiny), 2)
    again += sgl.gen("a", max_tokens=2)
    info = again[0].get_meta_info("a")
    assert info["cached_tokens"] >= info["prompt_tokens"] - 1, "the prefix is still there"


def test_branches_that_finished_are_verified_in_place_where_that_is_asked_for(tiny: Endpoint) -> None:
    group = first_four_short(tiny, MEANING_LESS)
    for options in ({"skip": SkipGate.never()}, {"select": "score", "skip": SkipGate.never()}):
        verdict = within(120, lambda: sgl.verify_gated(group, "answer", **options))  # noqa: B023
        assert [score is not None for score in verdict.scores] == [True] * 4 + [False] * 4
        assert verdict.index < 4


def test_the_fewest_that_could_decide_run_and_the_rest_costs_nothing(tiny: Endpoint) -> None:
    group = sgl.fork_similar(state_on(tiny), 8, early_stop="certain")
    group += sgl.gen("answer", **SHORT)
    verdict = within(120, lambda: sgl.verify_gated(group, "answer"))
    record = group.stopping
    assert (verdict.skipped, record.of_fate("not_started")) == (True, [4, 5, 6, 7])
    spent = sum(state.get_meta_info("answer")["completion_tokens"] for state in group.states[:4])
    assert record.tokens_spent == spent == record.tokens_saved


def test_branches_whose_confidence_falls_are_dropped_while_they_decode(
    tiny: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []
    stream_json = Endpoint.stream_json

    def counted(*given: Any) -> Iterator[Any]:
        for event in stream_json(*given):
            events.append(event)
            yield event

    monkeypatch.setattr(Endpoint, "stream_json", counted)

    def asked(threshold: float) -> rksc_sgl.BranchGroup:
        spec = EarlyStop("confidence", threshold=threshold, window=8, extract=lambda text: None)
        group = sgl.fork_similar(state_on(tiny), 3, early_stop=spec)
        group += sgl.gen("answer", max_tokens=600, ignore_eos=True)
        for branch in group:
            within(120, branch.sync)
        return group

    dropped = asked(2.0).stopping
    assert dropped.of_fate("stopped") == [0, 1, 2]
    assert "its group confidence fell to" in str(dropped.branches[0].why)
    assert all(8 <= branch.tokens < 600 for branch in dropped.branches)
    events.clear()
    kept = asked(-1.0)
    assert len(events) <= 3 * (600 / 8 + 2), "an event repeats the tokens before it: there is one for each window"
    assert kept.stopping.of_fate("finished") == [0, 1, 2]
    info = kept[0].get_meta_info("answer")
    assert (info["completion_tokens"], info["finish_reason"]["type"]) == (600, "length")
    assert 0 < info["confidence"] <= 1


def test_several_continuations_have_no_vote_and_are_refused_by_name(tiny: Endpoint) -> None:
    group = sgl.fork_similar(state_on(tiny), 2, early_stop="certain")
    group += sgl.gen("answer", n=3, max_tokens=4)
    error = within(60, group[0].error)
    assert isinstance(error, OptionError) and "n: 3 continuations have no vote" in str(error)


def test_a_request_that_somebody_else_aborts_is_a_failure_and_no_vote(tiny: Endpoint) -> None:
    group = sgl.fork_similar(state_on(tiny), 3, early_stop=MEANING_LESS)
    group[0] += sgl.gen("answer", **LONG)
    run = group[0].stream_executor.run
    eventually(lambda: run.request is not None)
    eventually(lambda: run.request is None or (tiny.end_request(run.request) and run.returned.wait(0.5)))
    for branch in group.states[1:]:
        branch += sgl.gen("answer", **SHORT)
    verdict = within(120, lambda: sgl.verify_gated(group, "answer"))
    assert (group.stopping.branches[0].fate, verdict.index) == ("failed", 1)
    assert "the server ended the request" in str(verdict.errors[0])


def test_aborts_that_race_with_the_end_of_their_branch_lose_nothing(tiny: Endpoint) -> None:
    for _ in range(6):
        group = sgl.fork_similar(state_on(tiny), 8, early_stop=MEANING_LESS)
        group += sgl.gen("answer", **SHORT)
        verdict = within(120, lambda: sgl.verify_gated(group, "answer"))  # noqa: B023
        fates = [branch.fate for branch in group.stopping.branches]
        assert set(fates) <= {"finished", "stopped"} and fates.count("finished") >= 4
        for fate, error, branch in zip(fates, verdict.errors, group, strict=True):
            assert (error is None) == (fate == "finished") == ("answer" in branch)
    eventually(lambda: running(tiny) == 0)


def test_a_client_that_is_gone_leaves_nothing_behind(tiny: Endpoint) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/frontend')\n"
        "from test_early_stop_on_a_server import *\n"
        "group = sgl.fork_similar(state_on(Endpoint(sys.argv[1])), 8, early_stop='certain')\n"
        "group += sgl.gen('answer', max_tokens=3900, ignore_eos=True)\n"
        "eventually(lambda: all(group[i].stream_executor.run.request for i in range(4)))\n"
        "print('running', flush=True)\n"
        "group[0].sync()\n"
    )
    client = subprocess.Popen([sys.executable, "-c", code, tiny.base_url], stdout=subprocess.PIPE, text=True)
    try:
        assert client.stdout is not None and client.stdout.readline() == "running\n"
    finally:
        client.kill()
        client.wait()
    eventually(lambda: running(tiny) == 0)


def test_without_a_server_every_branch_fails_and_the_error_is_its(tiny: Endpoint) -> None:
    group = sgl.fork_similar(state_on(tiny), 8, early_stop="certain")
    for branch in group:
        branch.stream_executor.backend._http = rksc_sgl.frontend.endpoint.HttpClient("http://127.0.0.1:9")
    group += sgl.gen("answer", **SHORT)
    with pytest.raises(ServerUnreachableError):
        within(60, lambda: sgl.verify_gated(group, "answer"))
    assert group.stopping.of_fate("failed") == list(range(8))
