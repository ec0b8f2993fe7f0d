"""What an abort does in the engine: how soon a branch ends, what it leaves behind, and who takes it along."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import sglang as sgl
from sglang.lang.interpreter import ProgramState, StreamExecutor
from sglang.lang.ir import SglSamplingParams
from two_wordings import problem

from rksc_sgl import EarlyStop, Endpoint
from rksc_sgl.metrics import STOPPED_BRANCHES
from tests.six_layers import Served, SixLayers, report_of, sampling, server_of

pytestmark = [pytest.mark.server, pytest.mark.slow]

STEP_S = 0.4  # of a server that is slowed down


@pytest.fixture(scope="module")
def narrow(six_layers: SixLayers) -> Iterator[Served]:
    """Of eight branches four run, and four wait in its queue."""
    variables = {"XDG_CACHE_HOME": str(six_layers.cache())}
    with server_of(six_layers.path, "--max-running-requests", "4", variables=variables) as process:
        yield Served.of(process, six_layers.path)


@contextmanager
def slowed(served: Served) -> Iterator[None]:
    """Every step of the scheduler takes ``STEP_S`` longer."""
    url = f"{served.process.url}/slow_down"
    httpx.post(url, json={"forward_sleep_time": STEP_S}, timeout=30.0).raise_for_status()
    try:
        yield
    finally:
        httpx.post(url, json={"forward_sleep_time": None}, timeout=30.0).raise_for_status()


def test_an_abort_ends_a_branch_within_two_steps_and_what_it_wrote_stays_of_use(narrow: Served) -> None:
    narrow.settle()
    narrow.flush()
    before = narrow.total(STOPPED_BRANCHES)
    prompt, after = narrow.ids(problem(41)), 4
    body = {"input_ids": prompt, "rid": "slow", "stream": True}
    body["sampling_params"] = sampling({"group": "slow", "branch": 0, "branches": 1}, 200)
    with slowed(narrow), httpx.stream("POST", f"{narrow.process.url}/generate", json=body, timeout=60.0) as response:
        events = (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {"))
        seen = next(one for one in events if one["meta_info"]["completion_tokens"] >= after)
        narrow.abort("slow")
        *_, last = [seen, *events]
    told, info = seen["meta_info"]["completion_tokens"], last["meta_info"]
    assert info["finish_reason"]["type"] == "abort"
    assert told <= info["completion_tokens"] <= told + 2
    narrow.check_pool()
    assert narrow.total(STOPPED_BRANCHES) == before + 1
    written = [*prompt, *last["output_ids"]]
    again = narrow.ask(written)["meta_info"]
    assert again["cached_tokens"] == len(written) - 1, "its last token was never read, so it has no KV"
    narrow.check_pool()


def test_a_client_that_goes_away_takes_all_branches_of_its_fork_along(narrow: Served) -> None:
    narrow.settle()
    narrow.flush()
    before = narrow.total(STOPPED_BRANCHES)
    code = (
        "import sys; sys.path.insert(0, 'tests/frontend')\n"
        "from test_early_stop_on_a_server import *\n"
        "spec = EarlyStop('certain', launch='all')\n"
        "group = sgl.fork_similar(state_on(Endpoint(sys.argv[1])), 8, early_stop=spec)\n"
        "group += sgl.gen('answer', max_tokens=3000, ignore_eos=True)\n"
        "group[0].sync()\n"
    )
    client = subprocess.Popen([sys.executable, "-c", code, narrow.process.url])
    try:
        narrow.until(lambda: narrow.stats()["requests"] == {"running": 4, "waiting": 4})
    finally:
        client.kill()
        client.wait()
    narrow.until(lambda: narrow.stats()["requests"] == {"running": 0, "waiting": 0}, seconds=30.0)
    assert narrow.total(STOPPED_BRANCHES) == before + 8
    narrow.check_pool()


@pytest.mark.parametrize("launch", ["fewest", "all"])
def test_branches_that_are_stopped_may_be_blends(narrow: Served, launch: str) -> None:
    narrow.settle()
    narrow.flush()
    endpoint = Endpoint(narrow.process.url)
    state = ProgramState(StreamExecutor(endpoint, {}, SglSamplingParams(temperature=1.0), None, False))
    material = problem(42, sentences=12)
    wordings = [
        f"{start} {material} " for start in ("Read this.", "Think.", "Go step by step.", "Be careful. Read on.")
    ]
    stop = EarlyStop("certain", launch=launch, extract=lambda text: "7")
    group = sgl.fork_similar(state, wordings, share="blend", early_stop=stop)
    short = {"max_tokens": 12, "ignore_eos": True}
    group.states[0] += sgl.gen("answer", **short)
    group[0].sync()  # it comes first, so that the others take over its KV
    for branch in group.states[2:]:
        branch += sgl.gen("answer", max_tokens=3000, ignore_eos=True)
    if launch == "all":
        narrow.until(lambda: narrow.stats()["requests"]["running"] == 2)
    group.states[1] += sgl.gen("answer", **short)
    verdict = sgl.verify_gated(group, "answer")
    assert (verdict.index, verdict.skipped, verdict.answers[:2]) == (0, True, ["7", "7"])
    record = group.stopping
    assert record.done.reason == "certain" and record.of_fate("finished") == [0, 1]
    assert record.of_fate("not_started" if launch == "fewest" else "stopped") == [2, 3]
    report = report_of({"meta_info": group[1].get_meta_info("answer")})
    assert report["mode"] == "blend" and report["taken_tokens"] > 0, json.dumps(report)
    narrow.check_pool()
    state.stream_executor.end()
