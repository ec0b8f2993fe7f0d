"""What the sharing benchmarks make of what they measured."""

from __future__ import annotations

import re

import pytest
from sglang.lang.chat_template import get_chat_template

from benchmarks import divergent_items, divergent_prefix, overhead, timed_server
from benchmarks.divergent_items import CHANGED, FACTS, HOW_MANY, OPENINGS, Item, branches_of
from benchmarks.divergent_prefix import AGAIN, MERGE, NONE, STOCK, Answer, Row, compute_fraction, parting
from rksc_sgl.sglang_plugin.wiring.registry import Hook

TEMPLATE = get_chat_template("chatml")
REAL, OTHER = 5, 7  # token ids
TAKEN = {"mode": "blend", "taken_tokens": 90, "computed_tokens": 10, "probe_layers": 3}
SECONDS = {NONE: [9.0], STOCK: [8.0], "blend 0.05": [2.0], AGAIN: [8.8]}


@pytest.mark.parametrize("seed", range(5))
def test_branches_of_a_set_have_different_openings_and_every_second_one_different_facts(seed: int) -> None:
    branches = branches_of(seed, TEMPLATE, 3)
    assert len(branches) == len(OPENINGS) == len({items[0].prompt.split("\n\n")[0] for items in branches})
    materials = [_material(items[0]).split(". ") for items in branches]
    for index, material in enumerate(materials):
        differing = [(own, other) for own, other in zip(material, materials[0], strict=True) if own != other]
        assert len(differing) == (CHANGED if index % 2 else 0)
        for own, other in differing:
            numbers = set(re.findall(r"\d+", own))
            assert not numbers & set(re.findall(r"\d+", " ".join(materials[0]))), (
                "a changed number is none of the donor's"
            )
            assert own.split()[:2] == other.split()[:2]
    assert branches_of(seed, TEMPLATE, 3) == branches != branches_of(seed + 1, TEMPLATE, 3)


@pytest.mark.parametrize("seed", range(5))
def test_each_prompt_ends_with_the_words_before_what_answers_it(seed: int) -> None:
    first = _material(branches_of(seed, TEMPLATE, 4)[0][0])
    for index, items in enumerate(branches_of(seed, TEMPLATE, 4)):
        assert len({item.prompt for item in items}) == 4
        assert [item.changed for item in items] == ([True, False, True, False] if index % 2 else [False] * 4)
        for item in items:
            start = item.prompt.rsplit("\n", 1)[1]
            between = "" if item.kind == "number" else " "
            assert start.endswith(" ") is (item.kind == "number"), "a word brings its space along"
            assert _material(item).count(start) == 1
            assert f"{start}{between}{item.answer} " in _material(item)
            assert f"{start}{between}{item.donors} " in first


def test_every_kind_of_fact_is_asked_for_also_where_it_changed() -> None:
    items = [item for seed in range(12) for branch in branches_of(seed, TEMPLATE, 4) for item in branch]
    for kind, count in HOW_MANY.items():
        of_kind = [item for item in items if item.kind == kind]
        assert len(of_kind) > 0.6 * len(items) * count / FACTS
        assert any(item.changed for item in of_kind) and not all(item.changed for item in of_kind)


def test_branches_with_the_same_numbers_are_asked_the_same_first() -> None:
    branches = branches_of(1, TEMPLATE, 2)
    asked = {(items[0].prompt.rsplit("\n", 1)[1], items[0].answer) for items in branches[::2]}
    assert len(asked) == 1


def test_the_material_is_about_a_thousand_tokens_of_facts_that_are_not_alike() -> None:
    for seed in range(3):
        words = len(_material(branches_of(seed, TEMPLATE, 1)[0][0]).split())
        assert 750 <= words <= 900  # of 1.2 tokens
    for material in (2000, 4000, 12000):
        words = len(_material(branches_of(1, TEMPLATE, 1, material)[0][0]).split())
        assert 0.75 * material <= words <= 0.9 * material
        assert all(len(items) == 1 for items in branches_of(1, TEMPLATE, 1, material))
    lines = [line.text for line in (*divergent_items.LINES_ON_PEOPLE, *divergent_items.LINES_ON_PLACES)]
    assert len({line.split("{value}")[1] for line in lines}) == len(lines)
    assert not re.search(r"\d", " ".join((*divergent_items.FILLER, *OPENINGS)))


def test_the_share_of_the_compute_counts_layers_and_tokens() -> None:
    assert compute_fraction({}, 30) == 1.0
    assert compute_fraction(TAKEN, 30) == pytest.approx(0.19)


def test_ratios_and_recall_come_from_what_was_measured() -> None:
    rows = [
        _row("123", "456", exact="123.", blend="456.", report=TAKEN),
        _row("123", "123", exact=" 123 and", blend="123", report={"mode": "blend", "declined": "why"}),
        _row("123", "456", exact="789", blend="1234", first=False),
    ]
    result = divergent_prefix.summary(SECONDS, rows, ["blend 0.05"], 30)
    assert (result["prefill_ratio_vs_stock"], result["prefill_ratio_vs_none"], result["noise_ratio"]) == (4.0, 4.5, 1.1)
    assert (result["facts_asked"], result["facts_known"], result["fact_recall_blend"]) == (3, 2, 0.5)
    assert (result["facts_known_changed"], result["fact_recall_blend_changed"]) == (1, 0.0)
    assert (result["facts_known_unchanged"], result["fact_recall_blend_unchanged"]) == (1, 1.0)
    assert (result["donor_answers"], result["donor_answers_exact"], result["parted_in_fact"]) == (1, 0, 1)
    assert (result["branches"], result["blended"]) == (2, 1)
    assert "by_options" not in result


def test_the_interval_of_lost_facts_is_the_exact_binomial_one() -> None:
    rows = [_row("123", "456", exact="123", blend="123" if index else "9") for index in range(20)]
    assert divergent_prefix.loss_interval(rows, "blend 0.05") == pytest.approx([0.00127, 0.24873], abs=2e-5)
    none = [_row("123", "456", exact="9", blend="9")]
    assert divergent_prefix.loss_interval(none, "blend 0.05") is None


def test_what_was_not_run_is_null() -> None:
    rows = [_row("123", "456", exact="123", blend="123")]
    result = divergent_prefix.summary({}, rows, ["blend 0.05"], 30)
    for name in (
        "prefill_ratio_vs_stock",
        "noise_ratio",
        "noise_kl",
        "fact_recall_exact",
        "fact_recall_merge",
        "merged",
    ):
        assert result[name] is None, name
    assert result["fact_recall_blend_unchanged"] is None and result["fact_recall_blend_changed"] == 1.0


def test_merges_and_what_was_declined_are_counted() -> None:
    merged, declined = {"mode": "merge"}, {"mode": "exact", "declined": "content guard: numbers"}
    rows = [
        _row("123", "456", exact="123", others={MERGE: _answer("456", merged), STOCK: _answer("123")}),
        _row("123", "456", exact="123", others={MERGE: _answer("123", declined), STOCK: _answer("123")}),
        _row("123", "123", exact="123"),
    ]
    result = divergent_prefix.summary(SECONDS, rows, ["blend 0.05"], 30)
    assert (result["merged"], result["merges_declined"]) == (1, {"content guard: numbers": 1})
    assert (result["fact_recall_exact"], result["fact_recall_merge"], result["donor_answers_merge"]) == (1.0, 0.5, 1)


def test_answers_part_at_their_first_other_token() -> None:
    exact = Answer(({REAL: -0.1, OTHER: -3.1}, {REAL: -0.5, OTHER: -0.75}), "", (REAL, REAL), {})
    assert parting(exact, exact) is None
    assert parting(exact, Answer((), "", (REAL, OTHER), {})) == (1, pytest.approx(0.25))
    assert parting(exact, Answer((), "", (OTHER, REAL), {})) == (0, pytest.approx(3.0))
    assert parting(exact, Answer((), "", (REAL,), {})) == (1, 0.0)


def test_overhead_is_the_median_over_pairs() -> None:
    seconds = {"bare": [1.0, 1.0, 1.2, 1.0], "rksc": [1.0, 1.25, 1.2, 1.0]}
    result = overhead.summary(overhead.Measured(seconds, {"rksc": 5, "bare": 3}, {"rksc": 6, "bare": 3}))
    assert (result["throughput_ratio"], result["noise_ratio"]) == (1.0, 1.1)
    assert result["ratio_interval"] == [0.8, 1.0] and result["noise_interval"] == [1.0, 1.2]
    assert (result["equal"], result["requests"], result["bare_equal"], result["bare_requests"]) == (5, 6, 3, 3)
    prompts = overhead.prompts_of(0, 6)
    assert prompts[1][: overhead.PREFIX] == prompts[3][: overhead.PREFIX] != prompts[2][: overhead.OWN]


def test_a_stopwatch_counts_what_is_ours_and_not_what_is_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 3.0, 10.0, 12.0])  # we begin, SGLang's begins and ends, we end
    monkeypatch.setattr(timed_server.time, "perf_counter", clock.__next__)
    hook = Hook("some.where", "some", "around", lambda original: original(), (), "scheduler", "a test")
    assert timed_server.timed(hook).function(lambda: "answer") == "answer"
    assert timed_server._seconds.pop("where") == 5.0
    assert timed_server.Stopwatch.running == []


def _material(item: Item) -> str:
    return item.prompt.split("\n\n")[1]


def _answer(text: str, report: dict | None = None) -> Answer:
    tokens = (REAL,) if text.strip().startswith("123") else (OTHER,)
    return Answer(({REAL: -0.1, OTHER: -3.0},), text, tokens, report or {})


def _row(
    answer: str, donors: str, *, exact: str, blend: str = "123", first: bool = True, report=None, others=None
) -> Row:
    arms = {"blend 0.05": _answer(blend, report), **(others or {})}
    return Row(Item("", "number", answer, donors), first, _answer(exact), _answer(exact), arms)
