"""Donors outside the fork, on a real server: any prompt of the namespace that is in the cache."""

from __future__ import annotations

from typing import Any

import pytest
from two_wordings import branch as branch_of
from two_wordings import problem as problem_of
from two_wordings import reworded

from tests.six_layers import Served, logprobs_of, report_of

pytestmark = [pytest.mark.server, pytest.mark.slow]


def problem(number: int) -> str:
    """One that no other module asks: the index knows a prompt by its tokens, whoever computed it."""
    return problem_of(500 + number)


def branch(group: str | None, index: int = 0, **options: Any) -> dict[str, Any]:
    return branch_of(group and f"scope, {group}", index, **options)


@pytest.fixture(autouse=True)
def indexed(served: Served) -> None:
    """The cache is empty, and somebody asked for the whole of it."""
    served.flush()
    served.ask(problem(999), branch(None, share_scope="cache"))


def test_a_request_without_a_group_merges_with_a_prompt_that_did_not_opt_in(served: Served) -> None:
    text = problem(3)
    plain = served.ask(text, tokens=8)
    merged = served.ask(reworded(text), branch(None, share_scope="cache"), 8)
    report = report_of(merged)
    assert (report["mode"], report["donor"]) == ("merge", plain["meta_info"]["id"])
    assert merged["output_ids"] == plain["output_ids"]
    again = served.ask(text, tokens=8)
    assert again["output_ids"] == plain["output_ids"] and "rksc" not in again["meta_info"]


def test_a_blend_takes_from_any_prompt_of_the_cache(served: Served) -> None:
    material = problem(4)
    plain = served.ask("Boris counts. " + material)
    options = branch("new fork", 0, share="blend", share_scope="cache", recompute=0.0)
    report = report_of(served.ask("Greta counts again. " + material, options))
    assert (report["mode"], report["donor"]) == ("blend", plain["meta_info"]["id"])
    assert report["taken_tokens"] > 50
    later = report_of(served.ask("Now Irene. " + material, {**options, "branch": 1, "share_scope": "group"}))
    assert (later["mode"], later["donor"]) == ("blend", plain["meta_info"]["id"]), (
        "it is one of the fork's from then on"
    )


def test_the_scope_of_a_group_sees_no_other_prompt(served: Served) -> None:
    text = problem(5)
    served.ask(text)
    served.ask(text, branch("a fork", 0))
    report = report_of(served.ask(reworded(text), branch("another fork", 0)))
    assert report["mode"] == "exact" and "donor" not in report
    alone = report_of(served.ask(reworded(text, "Please solve this problem. "), branch(None)))
    assert alone["declined"] == "without a group there is no donor"


@pytest.mark.parametrize("extra", [{"extra_key": "tenant"}, {"cache_salt": "salt"}])
def test_another_namespace_is_another_cache(served: Served, extra: dict[str, str]) -> None:
    text = problem(6)
    there = served.ask(text, **extra)["meta_info"]["id"]
    other = report_of(served.ask(reworded(text), branch(None, share_scope="cache")))
    assert other["mode"] == "exact" and other.get("donor") != there
    same = report_of(served.ask(reworded(text), branch(None, share_scope="cache"), **extra))
    assert same["mode"] == "merge"


def test_blended_kv_is_never_a_donor(served: Served) -> None:
    material = problem(7)
    exact = served.ask("Boris counts. " + material)["meta_info"]["id"]
    options = branch(None, share="blend", share_scope="cache", recompute=0.0)
    blended = served.ask("Greta counts again. " + material, options)
    assert report_of(blended)["mode"] == "blend"
    third = served.ask("Greta counts again, slowly. " + material, options)
    assert report_of(third)["donor"] == exact


def test_what_was_flushed_is_dropped_when_it_is_looked_up(served: Served) -> None:
    def names() -> set[str]:
        return {donor["name"] for donor in served.stats()["donors"] if donor["group"] is None}

    text = problem(8)
    plain = served.ask(text)["meta_info"]["id"]
    assert plain in names()
    served.flush()
    report = report_of(served.ask(reworded(text), branch(None, share_scope="cache")))
    assert report["mode"] == "exact" and "donor" not in report
    assert plain not in names()


def test_siblings_wait_for_their_anchor_where_the_cache_has_nothing_for_them(served: Served) -> None:
    text = problem(9)
    prompts = [text, *(reworded(text, start) for start in ("Think step by step. ", "You are a careful tutor. "))]
    options = [branch("waiting", index, share_scope="cache") for index in range(3)]
    answers = served.ask_together(prompts, options, 4)
    assert [report_of(answer)["mode"] for answer in answers] == ["exact", "merge", "merge"]
    assert all(answer["output_ids"] == answers[0]["output_ids"] for answer in answers)
    assert any(report_of(answer).get("waited_passes") for answer in answers[1:])


def test_a_whole_fork_merges_with_a_prompt_of_the_cache_and_its_later_turns_follow(served: Served) -> None:
    text = problem(10)
    plain = served.ask(text, tokens=4)
    prompts = [reworded(text, start) for start in ("Think step by step. ", "You are a careful tutor. ")]
    options = [branch("all merged", index, share_scope="cache") for index in range(2)]
    answers = served.ask_together(prompts, options, 4)
    assert [report_of(answer)["mode"] for answer in answers] == ["merge", "merge"]
    assert [answer["output_ids"] for answer in answers] == [plain["output_ids"]] * 2
    later = [*plain["output_ids"], *served.ids(" How many hens?")]
    direct = served.ask([*served.ids(text), *later])
    followed = served.ask([*served.ids(prompts[1]), *later], branch("all merged", 1))
    assert report_of(followed)["mode"] == "merge"
    assert logprobs_of(followed) == pytest.approx(logprobs_of(direct), abs=1e-4)


def test_an_anchor_that_the_gate_declines_serves_its_siblings_itself(served: Served) -> None:
    text = problem(11)
    served.ask(text)
    own = reworded(text)
    first = served.ask(own, branch("declined", 0, share_scope="cache", tau=1.0), 4)
    assert report_of(first)["declined"] == "similarity is below tau"
    second = served.ask(reworded(text, "You are a careful tutor. "), branch("declined", 1), 4)
    assert (report_of(second)["mode"], report_of(second)["donor"]) == ("merge", first["meta_info"]["id"])
    assert second["output_ids"] == first["output_ids"]
