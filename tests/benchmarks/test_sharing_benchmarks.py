"""What the sharing benchmarks make of what they measured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import divergent_prefix, overhead
from benchmarks.divergent_prefix import BLEND, BRANCHES, NONE, STOCK, branches_of, compute_fraction

TEMPLATE = SimpleNamespace(get_prompt=lambda messages: messages[0]["content"] + "\n")


def test_a_set_has_other_openings_and_in_every_second_branch_other_numbers() -> None:
    branches = branches_of(3, TEMPLATE)
    assert len(branches) == BRANCHES
    assert len({branch.prompt[:20] for branch in branches}) == BRANCHES
    for index, branch in enumerate(branches):
        named = branch.prompt.rsplit("The ", 1)[1].strip().removesuffix(" has the number")
        assert f"The {named} has the number {branch.answer} and" in branch.prompt
        same = f"The {named} has the number {branch.answer} and" in branches[0].prompt
        assert same == (index % 2 == 0), "what was changed is what is asked for"
    assert branches_of(3, TEMPLATE) == branches


def test_the_share_of_the_compute_counts_layers_and_tokens() -> None:
    assert compute_fraction({}, 30) == 1.0
    assert compute_fraction({"taken_tokens": 90, "computed_tokens": 10, "probe_layers": 3}, 30) == pytest.approx(0.19)


def test_ratios_and_recall_come_from_what_was_measured() -> None:
    base = {"kl": 0.01, "noise": 0.0, "control": 2.0, "agree": True, "agree_exact": True, "changed": True}
    rows = [
        {**base, "known": True, "exact": True, "blend": False, "report": {"mode": "blend"}},
        {**base, "known": True, "exact": True, "blend": True, "changed": False, "report": {"mode": "exact"}},
        {**base, "known": False, "exact": False, "blend": True, "report": {}},
    ]
    seconds = {NONE: [9.0], STOCK: [8.0], BLEND: [2.0], f"{STOCK} again": [8.8]}
    result = divergent_prefix.summary(seconds, rows, 30)
    assert (result["prefill_ratio_vs_stock"], result["prefill_ratio_vs_none"], result["noise_ratio"]) == (4.0, 4.5, 1.1)
    assert (result["facts_known"], result["fact_recall_exact"], result["fact_recall_blend"]) == (2, 1.0, 0.5)
    assert result["fact_recall_blend_changed"] == 0.0
    assert result["blended"] == 1


def test_overhead_is_the_median_over_pairs() -> None:
    seconds = {"bare": [1.0, 1.0, 1.2], "rksc": [1.0, 1.25, 1.2]}
    result = overhead.summary(seconds, 5, 6)
    assert (result["throughput_ratio"], result["ratio_lowest"], result["noise"]) == (1.0, 0.8, 1.2)
    prompts = overhead.prompts_of(0, 6)
    assert prompts[1][: overhead.PREFIX] == prompts[3][: overhead.PREFIX] != prompts[2][: overhead.OWN]
