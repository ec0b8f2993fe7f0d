"""Donors outside the fork, on a real server: any prompt of the namespace that is in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sharing_server import Served, branch, logprobs_of, problem, report_of, reworded, server_of

from rksc_sgl.testing import write_tiny_model

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = write_tiny_model(tmp_path_factory.mktemp("scope") / "six-layers", num_hidden_layers=6)
    with server_of(model) as process:
        yield Served.of(process, model)


@pytest.fixture
def served(fresh: Served) -> Served:
    """With an empty cache, and after the first request that asked for the whole of it."""
    fresh.flush()
    fresh.ask(problem(999), branch(None, share_scope="cache"))
    return fresh


def test_nothing_is_indexed_before_a_request_asks_for_the_whole_cache(fresh: Served) -> None:
    text = problem(1)
    anchor = fresh.ask(text, branch("known before", 0))["meta_info"]["id"]
    fresh.ask(problem(2))
    assert fresh.stats()["sharing"]["indexed"] is None
    report = report_of(fresh.ask(reworded(text), branch(None, share_scope="cache")))
    assert (report["mode"], report["donor"]) == ("merge", anchor), "the donors of forks are known from the start"
    indexed = fresh.stats()["sharing"]["indexed"]
    assert indexed["prompts"] >= 1 and indexed["tokens"] > 100 and indexed["bytes"] > 8 * indexed["tokens"]


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
    text = problem(8)
    served.ask(text)
    before = served.stats()["sharing"]["indexed"]["prompts"]
    served.flush()
    report = report_of(served.ask(reworded(text), branch(None, share_scope="cache")))
    assert report["mode"] == "exact" and "donor" not in report
    names = {donor["name"] for donor in served.stats()["donors"] if donor["group"] is None}
    assert len(names) == served.stats()["sharing"]["indexed"]["prompts"] <= before


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
