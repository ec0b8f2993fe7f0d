"""``--dp-size 2``: each rank has a cache of its own, and all of a fork is on one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sglang as sgl
from sglang.lang.interpreter import ProgramState

import rksc_sgl
from rksc_sgl import metrics
from rksc_sgl.cli.serve import problems_in
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.support.offers import ALLOW_VARIABLE
from tests.one_request.asking import NUMBER, ask

pytestmark = [pytest.mark.server, pytest.mark.slow]

TINY = ("--max-total-tokens", "20000", "--max-running-requests", "32")


@pytest.fixture(scope="module")
def ranks(tiny_model: Path) -> Iterator[ServerProcess]:
    arguments = server_arguments(["--model-path", str(tiny_model), *TINY, "--dp-size", "2"])
    with ServerProcess(arguments, variables={ALLOW_VARIABLE: "1"}) as server:
        yield server


def counted(server: ServerProcess, op: str) -> list[int]:
    """Requests of forks that each rank has answered."""
    schedulers = sorted(server.get_json("/rksc/stats")["schedulers"], key=lambda one: one["dp_rank"])
    assert [one["dp_rank"] for one in schedulers] == [0, 1]
    series = [one["counters"][metrics.REQUESTS] for one in schedulers]
    return [int(sum(one["value"] for one in each if one["labels"].get("op") == op)) for each in series]


def grown(server: ServerProcess, op: str, before: list[int]) -> list[int]:
    return [now - then for now, then in zip(counted(server, op), before, strict=True)]


def test_every_hook_is_in_place_in_both(ranks: ServerProcess) -> None:
    info = ranks.get_json("/rksc/info")
    assert len(info["schedulers"]) == 2 and problems_in(info) == []
    for scheduler in info["schedulers"]:
        assert scheduler["offers"]["exact"]["offered"] and scheduler["offers"]["verify"]["offered"]


def test_a_fork_of_one_request_and_its_verifications_are_on_one_rank(ranks: ServerProcess) -> None:
    homes = set()
    for turn in range(8):
        before = {op: counted(ranks, op) for op in ("branch", "verify")}
        asked = [{"role": "user", "content": f"Text {turn}. " + "How many cows are left? " * 8}]
        answer = ask(ranks, {"branches": 4, "early_stop": False, "select": "score"}, messages=asked, regex=NUMBER)
        told = answer.json()["rksc"]
        assert told["verified"] == [0, 1, 2, 3]
        new = {op: grown(ranks, op, before[op]) for op in before}
        assert sorted(new["branch"]) == sorted(new["verify"]) == [0, 4] and new["branch"] == new["verify"]
        computed = [branch["prompt_tokens"] - branch["cached_tokens"] for branch in told["branches"]]
        assert sorted(computed)[:3] == [1, 1, 1] and computed[0] > 50, "the prompt was computed once"
        homes.add(new["branch"].index(4))
    assert homes == {0, 1}, "forks are spread"


@pytest.mark.parametrize("name", ["routed_dp_rank", "data_parallel_rank"])
def test_a_rank_that_the_client_or_a_router_names_is_kept(ranks: ServerProcess, name: str) -> None:
    for rank in (0, 1, 1, 0):
        before = {op: counted(ranks, op) for op in ("branch", "verify")}
        asked = {"branches": 3, "early_stop": False, "select": "score"}
        assert ask(ranks, asked, regex=NUMBER, **{name: rank}).status_code == 200
        assert all(grown(ranks, op, before[op])[rank] == 3 for op in before)


def test_several_samples_are_on_one_rank(ranks: ServerProcess) -> None:
    for _ in range(4):
        before = counted(ranks, "branch")
        body = {
            "text": "How many cows?",
            "sampling_params": {"n": 4, "max_new_tokens": 4, "custom_params": {"rksc": {}}},
        }
        httpx.post(f"{ranks.url}/generate", json=body, timeout=60.0, trust_env=False).raise_for_status()
        assert sorted(grown(ranks, "branch", before)) == [0, 4]


def test_a_client_s_fork_and_what_is_forked_from_it_are_on_one_rank(ranks: ServerProcess) -> None:
    endpoint, kept = rksc_sgl.Endpoint(ranks.url), {}

    @sgl.function
    def program(s: ProgramState, turn: int) -> None:
        s += sgl.user(f"Program {turn}. " + "How many cows are left? " * 8)
        branches = rksc_sgl.fork_similar(s, 4)
        branches += sgl.assistant(sgl.gen("answer", max_tokens=8, ignore_eos=True))
        rksc_sgl.verify_gated(branches, "answer", select="score", skip=rksc_sgl.SkipGate.never())
        nested = rksc_sgl.fork_similar(branches[3], 4)
        nested += sgl.gen("more", max_tokens=4, ignore_eos=True)
        kept["of"] = [cached_of(branch, "answer") for branch in branches]
        kept["nested"] = [cached_of(branch, "more") for branch in nested]

    for turn in range(4):
        before = {op: counted(ranks, op) for op in ("branch", "verify")}
        assert program.run(turn=turn, backend=endpoint).error() is None
        new = {op: grown(ranks, op, before[op]) for op in before}
        assert min(new["branch"]) == min(new["verify"]) == 0, new
        first, *others = sorted(kept["of"] + kept["nested"], reverse=True)
        assert first > 50, "the first branch computes what all have in common"
        assert all(left < 10 for left in others), kept  # what opens the answer


def cached_of(branch: Any, variable: str) -> int:
    """Prompt tokens that a generation had to compute."""
    meta_info = branch.get_meta_info(variable)
    return meta_info["prompt_tokens"] - meta_info["cached_tokens"]
