"""What is sent to a server, in which order, seen from a double of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rksc_sgl.proof.arms import (
    AFTER_MERGE,
    BLEND,
    COLD,
    DECLINED_MERGE,
    EXACT,
    MERGE,
    NOISE,
    OPTIONAL,
    Answer,
    arms_of,
    measure,
)
from rksc_sgl.proof.texts import Prompts, prompts


class Recording:
    """A server that remembers what it is asked, and caches whole prompts as SGLang would."""

    def __init__(self) -> None:
        self.runs: list[list[dict[str, Any]]] = []
        self.cached: set[str] = set()

    def flush_cache(self, wait_s: float = 0.0) -> None:
        self.runs.append([])
        self.cached.clear()

    def post_json(self, path: str, body: dict[str, Any]) -> Any:
        assert path == "/generate"
        self.runs[-1].append(body)
        text, tokens = body["text"], len(body["text"].split())
        options = body["sampling_params"].get("custom_params")
        meta: dict[str, Any] = {
            "prompt_tokens": tokens,
            "cached_tokens": tokens - 1 if text in self.cached else 0,
            "output_top_logprobs": [[[-0.1, 7, None], [-3.0, 9, None]]],
        }
        if options:
            meta["rksc"] = {"mode": "exact", "reused_tokens": meta["cached_tokens"]}
        self.cached.add(text)
        return {"meta_info": meta}

    def options(self, run: int) -> list[dict[str, Any] | None]:
        sent = [body["sampling_params"].get("custom_params") for body in self.runs[run]]
        return [one and one["rksc"] for one in sent]


@pytest.fixture
def server() -> Iterator[Recording]:
    yield Recording()


def run_of(name: str) -> int:
    """The place of an arm's first run; the exact runs come before all."""
    return 1 + [arm.name for arm in arms_of(OPTIONAL)].index(name)


def test_each_run_begins_with_a_flush(server: Recording) -> None:
    plan = arms_of(OPTIONAL)
    measure(server, prompts(), plan, 3)
    assert len(server.runs) == 1 + 3 * len(plan)
    assert [len(run) for run in server.runs[1 : 1 + len(plan)]] == [len(arm.before) + 1 for arm in plan]


def test_every_second_repeat_runs_in_the_opposite_order(server: Recording) -> None:
    steps: list[str] = []

    def watch(planned: list[Any]) -> Iterator[Any]:
        for step in planned:
            steps.append(step[1].name)
            yield step

    plan = arms_of(("blend",))
    measure(server, prompts(), plan, 2, watch)
    names = [arm.name for arm in plan]
    assert steps == names + names[::-1]


def test_every_arm_has_one_answer_for_each_repeat_and_every_prompt_an_exact_one(server: Recording) -> None:
    measured = measure(server, prompts(), arms_of(OPTIONAL), 2)
    assert {name: len(answers) for name, answers in measured.answers.items()} == {
        arm.name: 2 for arm in arms_of(OPTIONAL)
    }
    assert set(measured.exact) == set(Prompts.__annotations__)
    found = measured.answers[EXACT][0]
    assert isinstance(found, Answer) and found.cached_tokens == found.prompt_tokens - 1
    assert found.logprobs == {7: -0.1, 9: -3.0} and found.seconds >= 0.0


def test_exact_runs_and_controls_do_not_opt_in(server: Recording) -> None:
    measure(server, prompts(), arms_of(OPTIONAL), 1)
    assert server.options(0) == [None] * 6
    assert server.options(run_of(COLD)) == server.options(run_of(NOISE)) == [None]
    *before, control = server.options(run_of(AFTER_MERGE))
    assert control is None
    assert [one["share"] for one in before] == ["blend", "blend", "merge", "merge"]


def test_two_runs_never_share_a_fork(server: Recording) -> None:
    measure(server, prompts(), arms_of(OPTIONAL), 2)
    groups: list[set[str]] = []
    for run in range(len(server.runs)):
        groups.append({one["group"] for one in server.options(run) if one})
    named = [group for run in groups for group in run]
    assert len(named) == len(set(named)) > 10
    other = Recording()
    measure(other, prompts(), arms_of(OPTIONAL), 1)
    later = {one["group"] for run in range(len(other.runs)) for one in other.options(run) if one}
    assert len(later) > 5 and not later & set(named), "a second proof of one server is of other forks"


def test_a_branch_follows_its_donor_in_one_fork(server: Recording) -> None:
    measure(server, prompts(), arms_of(OPTIONAL), 1)
    for name, share in ((BLEND, "blend"), (MERGE, "merge"), (DECLINED_MERGE, "merge")):
        first, second = server.options(run_of(name))
        assert first and second
        assert first["group"] == second["group"]
        assert (first["branch"], second["branch"]) == (0, 1)
        assert first["share"] == second["share"] == share


@pytest.mark.parametrize(
    ("offered", "asked", "exact_runs"),
    [(("blend",), {"exact", "blend"}, 4), (("merge",), {"exact", "merge"}, 5), ((), {"exact"}, 3)],
)
def test_a_server_is_not_asked_for_what_it_declines(
    server: Recording, offered: tuple[str, ...], asked: set[str], exact_runs: int
) -> None:
    measure(server, prompts(), arms_of(offered), 1)
    shares = {one["share"] for run in range(len(server.runs)) for one in server.options(run) if one}
    assert shares == asked
    assert len(server.options(0)) == exact_runs, "no exact run of a prompt that nothing is compared with"
