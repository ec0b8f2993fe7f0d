"""Merges on real servers: a random six-layer Llama for the machinery, the embedded model for the meaning."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import sglang as sgl
from two_wordings import NAMES, branch, problem, reworded

import rksc_sgl
from benchmarks.gate_pairs import negatives, positives
from rksc_sgl.metrics import REQUESTS, TOKENS_REPLACED, TOKENS_REUSED
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.similarity.content_guard import same_content
from tests.six_layers import Served, SixLayers, logprobs_of, report_of, sampling

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_a_merged_branch_goes_on_exactly_as_the_prompt_that_it_took(served: Served) -> None:
    served.flush()
    text = problem(1)
    canonical, own = served.ids(text), served.ids(reworded(text))
    anchor = served.ask(canonical, branch("exact", 0), 12)
    merged = served.ask(own, branch("exact", 1), 12)
    report = report_of(merged)
    assert (report["mode"], report["donor"]) == ("merge", anchor["meta_info"]["id"])
    assert (report["merged_tokens"], report["reused_tokens"]) == (len(canonical) - 1, 0)
    assert report["replaced_tokens"] == len(own)
    assert 1.0 < report["probe_layers"] < 1.5, "of the second layer only KV is computed"
    assert 0.0 < report["similarity"] < 1.0 and "declined" not in report
    assert merged["output_ids"] == anchor["output_ids"]
    assert logprobs_of(merged) == pytest.approx(logprobs_of(anchor), abs=1e-4)
    meta = merged["meta_info"]
    assert (meta["prompt_tokens"], meta["cached_tokens"]) == (len(canonical), len(canonical) - 1)
    assert meta["completion_tokens"] == 12 and not meta.get("num_retractions")
    served.check_pool()


def test_below_tau_the_same_pass_goes_on_and_gives_the_exact_answer(served: Served) -> None:
    served.flush()
    text = problem(2)
    exact = served.ask(reworded(text), tokens=6)
    served.flush()
    served.ask(text, branch("below", 0))
    answer = served.ask(reworded(text), branch("below", 1, tau=1.0), 6)
    report = report_of(answer)
    assert (report["mode"], report["declined"]) == ("exact", "similarity is below tau")
    assert report["similarity"] < 1.0 and "replaced_tokens" not in report
    assert answer["output_ids"] == exact["output_ids"]
    assert logprobs_of(answer) == pytest.approx(logprobs_of(exact), abs=1e-4)


@pytest.mark.parametrize("tau", [-1.0, 0.75])
def test_a_changed_number_never_merges(served: Served, tau: float) -> None:
    served.flush()
    exact = served.ask(reworded(problem(3, changed=True)))
    served.flush()
    served.ask(problem(3), branch(f"number {tau}", 0, tau=tau))
    answer = served.ask(reworded(problem(3, changed=True)), branch(f"number {tau}", 1, tau=tau))
    assert report_of(answer)["mode"] == "exact"
    assert report_of(answer)["declined"] == "content guard: numbers"
    assert logprobs_of(answer) == pytest.approx(logprobs_of(exact), abs=1e-4)


def test_a_prompt_that_was_merged_leaves_nothing_in_the_cache(served: Served) -> None:
    served.flush()
    text = problem(4)
    own = served.ids(reworded(text))
    exact = served.ask(own)
    served.flush()
    served.ask(text, branch("clean", 0))
    assert report_of(served.ask(own, branch("clean", 1), 4))["mode"] == "merge"
    plain = served.ask(own)
    assert plain["meta_info"]["cached_tokens"] == 0
    assert logprobs_of(plain) == pytest.approx(logprobs_of(exact), abs=1e-5)
    assert "rksc" not in plain["meta_info"]


def test_auto_merges_only_where_that_is_allowed(served: Served) -> None:
    served.flush()
    text = problem(5)
    served.ask(text, branch("auto", 0, share="auto"))
    kept = report_of(served.ask(reworded(text), {"group": "auto", "branch": 1, "branches": 3, "share": "auto"}))
    assert kept["mode"] == "exact" and "replaced_tokens" not in kept
    assert "declined" not in kept, "it asked for identical prefixes"
    other = reworded(text, "You are a careful tutor. ")
    allowed = report_of(served.ask(other, branch("auto", 2, share="auto", allow_merge=True)))
    assert allowed["mode"] == "merge"


def prose(seed: int, *, changed: bool = False) -> str:
    """A problem after long material without numbers, which a blend can take over."""
    names = [NAMES[(seed + 3 * index) % len(NAMES)] for index in range(40)]
    told = " ".join(f"{name} meets {other} by the old mill." for name, other in itertools.pairwise(names))
    return f"{told} {problem(seed, changed=changed, sentences=2)}"


def test_a_branch_that_may_blend_or_merge_merges_first(served: Served) -> None:
    """Both are planned: what is merged must not stay in the namespace of blended KV."""
    served.flush()
    options = branch("both", 0, share="blend", allow_merge=True)
    anchor = served.ask(prose(90), options, 6)
    answer = served.ask("Think step by step. " + prose(90), {**options, "branch": 1}, 6)
    report = report_of(answer)
    assert report["mode"] == "merge" and "declined" not in report and "taken_tokens" not in report
    assert answer["output_ids"] == anchor["output_ids"]
    again = served.ask(prose(90), tokens=6)
    assert again["output_ids"] == anchor["output_ids"] and again["meta_info"]["cached_tokens"] > 200
    served.check_pool()


@pytest.mark.parametrize(
    ("tau", "changed", "said"), [(1.0, False, "similarity is below tau"), (-1.0, True, "content guard: numbers")]
)
def test_a_branch_that_may_not_merge_blends(served: Served, tau: float, changed: bool, said: str) -> None:
    served.flush()
    options = branch(f"either {tau}", 0, share="blend", allow_merge=True, tau=tau)
    anchor = served.ask(prose(90), options, 6)
    report = report_of(served.ask("Think step by step. " + prose(90, changed=changed), {**options, "branch": 1}, 6))
    assert (report["mode"], report["declined"]) == ("blend", said)
    assert report["taken_tokens"] > 200 and report["replaced_tokens"] == 0
    assert report["donor"] == anchor["meta_info"]["id"] and 0.0 < report["similarity"] <= 1.0
    served.check_pool()


def test_the_same_prompt_needs_no_merge(served: Served) -> None:
    served.flush()
    ids = served.ids(problem(6))
    served.ask(ids, branch("same", 0))
    report = report_of(served.ask(ids, branch("same", 1)))
    assert (report["mode"], report["reused_tokens"]) == ("exact", len(ids) - 1)
    assert "declined" not in report


def test_siblings_that_arrive_together_wait_and_are_merged_in_one_batch_with_others(served: Served) -> None:
    served.flush()
    text = problem(7)
    starts = ["Think step by step. ", "You are a careful tutor. ", "Please solve this problem. "]
    different = [reworded(problem(70)), problem(71)]
    alone = [logprobs_of(served.ask(one, tokens=5)) for one in different]
    served.flush()
    prompts = [text, *(reworded(text, start) for start in starts), *different, reworded(problem(7, changed=True))]
    options = [*(branch("together", index) for index in range(4)), None, {"op": "verify"}, branch("together", 6)]
    answers = served.ask_together(prompts, options, 5)
    reports = [answer["meta_info"].get("rksc") for answer in answers]
    assert [report["mode"] for report in reports[1:4]] == ["merge"] * 3
    assert all(answer["output_ids"] == answers[0]["output_ids"] for answer in answers[1:4])
    assert reports[4] is None and reports[6]["declined"] == "content guard: numbers"
    assert [logprobs_of(answer) for answer in answers[4:6]] == [pytest.approx(one, abs=1e-4) for one in alone]
    assert any(report.get("waited_passes") for report in reports[1:4])
    served.check_pool()


def test_merges_and_blends_go_through_one_pass(served: Served) -> None:
    served.flush()
    text, material = problem(8), problem(80)
    served.ask(text, branch("one pass", 0))
    served.ask("Boris counts. " + material, branch("other", 0, share="blend"))
    alone = served.ask("Greta counts again. " + material, branch("other", 1, share="blend", recompute=0.0))
    assert report_of(alone)["mode"] == "blend"
    served.flush()
    anchor = served.ask(text, branch("one pass", 0), 3)
    served.ask("Boris counts. " + material, branch("other", 0, share="blend"))
    merged, blended = served.ask_together(
        [reworded(text), "Greta counts again. " + material],
        [branch("one pass", 1), branch("other", 1, share="blend", recompute=0.0)],
        3,
    )
    assert (report_of(merged)["mode"], report_of(blended)["mode"]) == ("merge", "blend")
    assert merged["output_ids"] == anchor["output_ids"]
    assert report_of(blended)["taken_tokens"] == report_of(alone)["taken_tokens"] > 50
    assert logprobs_of(blended) == pytest.approx(logprobs_of(alone), abs=1e-3)


def test_a_prompt_of_the_same_length_is_replaced_too(served: Served) -> None:
    served.flush()
    text = f"Solve it. {problem(9)}"
    canonical, own = served.ids(text), served.ids(text.replace("Solve", "Read"))
    assert len(own) == len(canonical) and own != canonical and same_content(text, served.tokenizer.decode(own)).same
    anchor = served.ask(canonical, branch("length", 0), 8)
    merged = served.ask(own, branch("length", 1), 8)
    assert report_of(merged)["mode"] == "merge"
    assert merged["output_ids"] == anchor["output_ids"]
    assert report_of(merged)["merged_tokens"] == len(canonical) - 1


def test_later_turns_and_verifications_follow_the_alias(served: Served) -> None:
    served.flush()
    text = problem(10)
    canonical, own = served.ids(text), served.ids(reworded(text))
    served.ask(canonical, branch("turns", 0))
    first = served.ask(own, branch("turns", 1), 6)
    later = [*first["output_ids"], *served.ids(" How many hens?")]
    direct = served.ask([*canonical, *later])
    followed = served.ask([*own, *later], branch("turns", 1))
    report = report_of(followed)
    assert (report["mode"], report["replaced_tokens"], report["merged_tokens"]) == ("merge", len(own), len(canonical))
    assert report["similarity"] == report_of(first)["similarity"] and "probe_layers" not in report
    assert followed["meta_info"]["prompt_tokens"] == len(canonical) + len(later)
    assert logprobs_of(followed) == pytest.approx(logprobs_of(direct), abs=1e-4)
    verified = served.ask([*own, *later], branch("turns", 1, op="verify"))
    assert report_of(verified)["mode"] == "merge"
    assert logprobs_of(verified) == pytest.approx(logprobs_of(direct), abs=1e-4)
    for options in (branch("turns", 1, share="exact", tau=0.75), None, branch("another fork", 1)):
        assert served.ask([*own, *later], options)["meta_info"]["prompt_tokens"] == len(own) + len(later)


def test_an_alias_dies_with_the_prompt_that_it_leads_to(served: Served) -> None:
    served.flush()
    text = problem(11)
    own = served.ids(reworded(text))
    served.ask(text, branch("dies", 0))
    first = served.ask(own, branch("dies", 1), 4)
    assert any(one["branch"] == first["meta_info"]["id"] for one in served.stats()["aliases"])
    served.flush()
    exact = served.ask([*own, *first["output_ids"]])
    served.flush()
    answer = served.ask([*own, *first["output_ids"]], branch("dies", 1))
    report = report_of(answer)
    assert (report["mode"], report["alias_dropped"]) == ("exact", True)
    assert "gone" in report["declined"]
    assert logprobs_of(answer) == pytest.approx(logprobs_of(exact), abs=1e-4)
    assert not any(one["branch"] == first["meta_info"]["id"] for one in served.stats()["aliases"])


def test_donors_and_aliases_are_listed(served: Served) -> None:
    served.flush()
    text = problem(12)
    anchor = served.ask(text, branch("told", 0))["meta_info"]
    merged = served.ask(reworded(text), branch("told", 1))["meta_info"]
    tree = served.tree()
    (alias,) = (one for one in tree["aliases"] if one["branch"] == merged["id"])
    assert alias["canonical"] == anchor["id"] and alias["namespace"] is None
    assert (alias["tokens"], alias["canonical_tokens"]) == (len(served.ids(reworded(text))), anchor["prompt_tokens"])
    assert alias["node"] in {node["id"] for node in tree["tree"]["nodes"]}
    (donor,) = (one for one in served.stats()["donors"] if (one["name"], one["group"]) == (anchor["id"], "told"))
    assert donor == {"name": anchor["id"], "tokens": anchor["prompt_tokens"], "group": "told", "resident": True}
    served.flush()
    (donor,) = (one for one in served.stats()["donors"] if (one["name"], one["group"]) == (anchor["id"], "told"))
    assert donor["resident"] is False
    (alias,) = (one for one in served.tree()["aliases"] if one["branch"] == merged["id"])
    assert alias["node"] is None


def test_log_probabilities_of_the_prompt_are_those_of_its_own_tokens(served: Served, six_layers: SixLayers) -> None:
    served.flush()
    text = problem(13)
    own = served.ids(reworded(text))
    served.ask(text, branch("prompt logprobs", 0))
    answer = served.ask(own, branch("prompt logprobs", 1), logprob_start_len=0)
    assert "log-probabilities" in report_of(answer)["declined"]
    found = answer["meta_info"]["input_token_logprobs"]
    assert [token for _, token, *_ in found] == own
    expected = six_layers.logprobs(own)[range(len(own) - 1), own[1:]].tolist()
    assert [value for value, *_ in found[1:]] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_merged_request_may_ask_for_no_token_or_one(served: Served, tokens: int) -> None:
    served.flush()
    text = problem(14)
    served.ask(text, branch(f"few {tokens}", 0))
    answer = served.ask(reworded(text), branch(f"few {tokens}", 1), tokens)
    assert report_of(answer)["mode"] == "merge"
    assert answer["meta_info"]["completion_tokens"] == tokens


def test_a_stream_has_no_event_before_the_first_token(served: Served) -> None:
    served.flush()
    text = problem(15)
    anchor = served.ask(text, branch("stream", 0), 8)
    body = {
        "input_ids": served.ids(reworded(text)),
        "sampling_params": sampling(branch("stream", 1), 8),
        "stream": True,
    }
    with httpx.stream("POST", f"{served.process.url}/generate", json=body, timeout=60.0) as response:
        lines = [line[5:].strip() for line in response.iter_lines() if line.startswith("data:")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    assert events[-1]["text"] == anchor["text"]
    assert events[0]["meta_info"]["completion_tokens"] >= 1
    assert {report_of(event)["mode"] for event in events} == {"merge"}


def test_merges_are_counted_apart(served: Served) -> None:
    served.flush()
    text = problem(16)

    def totals() -> list[float]:
        return [
            served.total(REQUESTS, mode="merge", reason=""),
            served.total(TOKENS_REUSED, kind="merge"),
            served.total(TOKENS_REPLACED),
        ]

    served.ask(text, branch("counted", 0))
    before = totals()
    report = report_of(served.ask(reworded(text), branch("counted", 1)))
    grown = [new - old for new, old in zip(totals(), before, strict=True)]
    assert grown == [1, report["merged_tokens"], report["replaced_tokens"]]


def test_a_program_forks_into_wordings_that_are_merged_and_goes_on_with_them(served: Served) -> None:
    served.flush()
    text = problem(18)
    metas: list[dict[str, Any]] = []

    @sgl.function
    def solve(s: Any) -> None:
        wordings = [text, reworded(text), reworded(text, "You are a careful tutor. ")]
        branches = rksc_sgl.fork_similar(s, wordings, share="merge", tau=-1.0)
        branches += sgl.gen("answer", max_tokens=4, temperature=0, ignore_eos=True)
        branches += " How many hens?"
        branches += sgl.gen("more", max_tokens=2, temperature=0, ignore_eos=True)
        branches.join()
        metas.extend(one.get_meta_info(name) for name in ("answer", "more") for one in branches)

    solve.run(backend=rksc_sgl.Endpoint(served.process.url))
    first, later = metas[:3], metas[3:]
    assert sorted(meta["rksc"]["mode"] for meta in first) == ["exact", "merge", "merge"]
    # The branches know the prompt that they took, and ask for it themselves from then on.
    assert {meta["rksc"]["mode"] for meta in later} == {"exact"}
    assert len({meta["prompt_tokens"] for meta in later}) == 1
    assert all(meta["cached_tokens"] >= first[0]["prompt_tokens"] for meta in later)


def test_merges_on_other_servers_are_those_of_the_plain_one(served: Served, variant: Served) -> None:
    served.flush()
    variant.flush()
    text = problem(17)
    canonical, own = variant.ids(text), variant.ids(reworded(text))
    anchor = variant.ask(canonical, branch("flags", 0), 8)
    merged = variant.ask(own, branch("flags", 1), 8)
    assert report_of(merged)["mode"] == "merge"
    assert report_of(merged)["merged_tokens"] == (len(canonical) - 1) // variant.page * variant.page
    assert merged["output_ids"] == anchor["output_ids"]
    served.ask(canonical, branch(f"flags {variant.process.port}", 0))
    there = report_of(served.ask(own, branch(f"flags {variant.process.port}", 1)))["similarity"]
    last_page = variant.page > 1  # which is not in the tree
    assert report_of(merged)["similarity"] == pytest.approx(there, abs=0.05 if last_page else 1e-3)
    starts = ("Please solve this problem. ", "You are a careful tutor. ")
    texts = [text, *(reworded(text, start) for start in starts)]
    together = variant.ask_together(texts, [branch("more", index) for index in range(3)], 4)
    assert [report_of(answer)["mode"] for answer in together[1:]] == ["merge", "merge"]
    exact = variant.ask(own, branch("flags", 2, tau=1.0, share="exact"))
    assert exact["meta_info"]["prompt_tokens"] == len(own)
    variant.check_pool()


# --- meaning -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def meaning(smollm_server: ServerProcess, embedded_model: Path) -> Served:
    return Served.of(smollm_server, embedded_model)


def test_paraphrases_merge_at_the_default_tau_and_continue_as_the_canonical_prompt(meaning: Served) -> None:
    pairs = [pair for pair in positives(120) if same_content(pair.donor, pair.branch).same]
    chosen = [pair for kind in ("template", "wording", "both") for pair in [p for p in pairs if p.kind == kind][:2]]
    assert len(chosen) == 6
    merged = 0
    for index, pair in enumerate(chosen):
        meaning.flush()
        options = {"group": f"pair {index}", "branches": 2, "share": "merge"}
        anchor = meaning.ask(pair.donor, {**options, "branch": 0}, 8)
        answer = meaning.ask(pair.branch, {**options, "branch": 1}, 8)
        report = report_of(answer)
        if report["mode"] == "merge":
            merged += 1
            assert answer["output_ids"] == anchor["output_ids"]
            assert report["similarity"] >= 0.75
        else:
            assert report["declined"] == "too few tokens are left to compute"  # they differ at the end only
    assert merged >= 4


@pytest.mark.parametrize("kind", ["number", "name", "negation", "unit"])
def test_near_duplicates_never_merge_at_any_tau(meaning: Served, kind: str) -> None:
    pairs = [pair for pair in negatives(1200) if pair.kind == kind][:12]
    declined = []
    for index, pair in enumerate(pairs):
        meaning.flush()
        meaning.ask(pair.donor, branch(f"near {kind} {index}", 0))
        report = report_of(meaning.ask(pair.branch, branch(f"near {kind} {index}", 1)))
        assert report["mode"] == "exact"
        declined.append(report["declined"].partition(":")[0])
    assert "content guard" in declined and set(declined) <= {"content guard", "too few tokens are left to compute"}
