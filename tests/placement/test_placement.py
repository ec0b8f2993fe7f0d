"""What a waiting branch gets, decided without a server."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rksc_sgl.blending.plan import LEAD
from rksc_sgl.donors.forks import Donor, ForkKey, Namespace
from rksc_sgl.options import RequestOptions
from rksc_sgl.placement.choose import (
    ANCHOR_GONE,
    AUTO_IS_EXACT,
    DONORS_GONE,
    NO_GROUP,
    NOT_PROBED,
    TOO_FEW,
    TOO_FEW_ALIGN,
    TOO_FEW_TAKEN,
    Server,
    follow_alias,
    place_alone,
    place_beside,
    place_in_fork,
)
from rksc_sgl.placement.compare import Comparison, Comparisons
from rksc_sgl.placement.values import Branch, ForkFacts, Placement, Resident
from rksc_sgl.placement.worth import NOT_FASTER, PassCost

SPACE = Namespace("tenant", None, None)
WORDS = (
    *("zero", "one", "Anna", "counts", "apples", "in", "the", "old", "mill", "and", "Boris", "has"),
    *("seven", "of", "them", "left", "today"),
)
SIZE = 1000


class Tokenizer:
    """A word a token; ids from 100 on are numbers from 0 on."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [str(one - 100) if 100 <= one < 200 else WORDS[one % len(WORDS)] for one in ids]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(self.convert_ids_to_tokens(ids))


TOKENIZER = Tokenizer()
SERVER = Server(probe_share=0.1)


def words(seed: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(200, SIZE, count)


def prompt(*parts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate(parts)


def branch(
    ids: NDArray[np.int64],
    exact: int = 0,
    blended: int = 0,
    fixed: str = "",
    whole: str = "",
    shift: int = 0,
    most_shift: int = 0,
    **options: Any,
) -> Branch:
    asked = RequestOptions(**{"group": "g", "branches": 8, "share": "blend", **options})
    return Branch(asked, ids, SPACE, exact, blended, fixed, whole, shift, most_shift)


def compared(one: Branch) -> Comparisons:
    return Comparisons(one.ids, one.options.minimum_span, TOKENIZER)


def in_fork(one: Branch, fork: ForkFacts, server: Server = SERVER) -> Placement:
    return place_in_fork(one, fork, [], server, compared(one))


def whole(name: str, ids: NDArray[np.int64]) -> Resident:
    return Resident(Donor(name, ids), ids.size)


MATERIAL = words(0, 600)
DONOR = prompt(words(1, 17), MATERIAL)
OTHER = prompt(words(2, 31), MATERIAL)


def test_the_first_branch_of_a_fork_is_its_anchor() -> None:
    placement = in_fork(branch(DONOR), ForkFacts())
    assert placement.is_anchor and placement.waits_for is None and placement.blend is None
    assert placement.report.to_plain() == {}


def test_a_sibling_that_gains_waits_and_one_that_does_not_goes_on_and_says_why() -> None:
    anchor = Donor("a", DONOR)
    waiting = in_fork(branch(OTHER), ForkFacts(anchor))
    assert waiting.waits_for is anchor and not waiting.is_anchor
    assert waiting.waits_until == DONOR.size, "what it takes stands at the end of the anchor's prompt"
    going = in_fork(branch(words(9, 600)), ForkFacts(anchor))
    assert going.waits_for is None and not going.is_anchor and going.report.declined == TOO_FEW_ALIGN
    cached = in_fork(branch(OTHER, exact=OTHER.size - 10), ForkFacts(anchor))
    assert cached.waits_for is None


def test_a_sibling_with_the_same_beginning_waits_for_exact_kv() -> None:
    anchor = Donor("a", prompt(MATERIAL, words(3, 5)))
    assert in_fork(branch(prompt(MATERIAL, words(4, 5)), share="auto"), ForkFacts(anchor)).waits_for is anchor


def test_who_waits_for_exact_kv_depends_on_what_all_siblings_save() -> None:
    server = Server(pass_cost=PassCost(100))
    anchor = Donor("a", prompt(MATERIAL[:40], words(3, 9)))
    sibling = branch(prompt(MATERIAL[:40], words(4, 9)), share="exact")
    waiting = in_fork(sibling, ForkFacts(anchor, siblings=3), server)
    assert waiting.waits_for is anchor and waiting.waits_until == 40, "not for the rest of the anchor's prompt"
    alone = in_fork(sibling, ForkFacts(anchor, siblings=2), server)
    assert alone.waits_for is None and alone.report.to_plain() == {}, "nothing was declined: it asked for nothing more"
    cached = branch(prompt(MATERIAL[:40], words(4, 9)), exact=30, share="exact")
    assert in_fork(cached, ForkFacts(anchor, siblings=9), server).waits_for is None
    paged = Server(pass_cost=PassCost(100), page=16)
    assert in_fork(sibling, ForkFacts(anchor, siblings=3), paged).waits_for is None, "only 32 tokens fill pages"


def test_a_blend_that_would_not_be_faster_is_declined_though_it_was_asked_for() -> None:
    fork = ForkFacts(donors=(whole("d", DONOR),))
    launching = Server(probe_share=0.1, pass_cost=PassCost(OTHER.size, overlaps=True))
    placement = in_fork(branch(OTHER), fork, launching)
    assert placement.blend is None and placement.report.declined == NOT_FASTER
    assert in_fork(branch(OTHER, share="auto"), fork, launching).report.declined is None, "it was no loss"
    assert in_fork(branch(OTHER), ForkFacts(Donor("a", DONOR)), launching).waits_for is None
    together = in_fork(branch(OTHER), ForkFacts(donors=fork.donors, siblings=2), launching)
    assert together.blend is not None, "two of them outweigh what their pass costs"
    reading = in_fork(branch(OTHER, exact=20, blended=300), fork, launching)
    assert reading.blend is not None, "what is there of a blend is not given up"


def test_auto_never_takes_over_and_says_so_where_it_could_have() -> None:
    placement = in_fork(branch(OTHER, share="auto"), ForkFacts(donors=(whole("d", DONOR),)))
    assert placement.blend is None and not placement.blended and placement.report.declined == AUTO_IS_EXACT
    nothing_left = in_fork(branch(DONOR, exact=DONOR.size - 1, share="auto"), ForkFacts(donors=(whole("d", DONOR),)))
    assert nothing_left.report.declined is None
    other = branch(prompt(MATERIAL, words(4, 90)), exact=MATERIAL.size, share="auto")
    fork = ForkFacts(donors=(whole("d", prompt(MATERIAL, words(3, 90))),))
    assert in_fork(other, fork).report.declined is None, "nothing but the beginning is equal"


def test_a_request_that_needs_every_layer_is_not_blended() -> None:
    one = branch(OTHER, whole="log-probabilities of the prompt are asked for")
    placement = in_fork(one, ForkFacts(donors=(whole("d", DONOR),)))
    assert placement.blend is None and not placement.blended and placement.report.declined == one.whole
    assert in_fork(one, ForkFacts(Donor("a", DONOR))).waits_for is None


def test_a_branch_takes_over_from_the_donor_that_has_most_of_it() -> None:
    some, most = whole("some", prompt(words(5, 9), MATERIAL[:200])), whole("most", DONOR)
    placement = in_fork(branch(OTHER), ForkFacts(donors=(some, most)))
    plan = placement.blend
    assert plan is not None and plan.donor is most.donor and placement.adopts is most.donor
    assert placement.blended and plan.extra_key == "tenant"
    assert plan.source[-1] == DONOR.size - 1 and plan.source[0] == -1
    assert placement.report.to_plain() == {"donor": "most", "aligned_tokens": MATERIAL.size}


def test_what_a_blend_computes_anyway_counts_as_not_taken() -> None:
    beside = compared(branch(OTHER)).with_donor(Donor("d", DONOR))
    aligned = beside.alignment.aligned
    assert beside.taken(RequestOptions(recompute=0.0)) == aligned - LEAD, "after the one break"
    assert beside.taken(RequestOptions(recompute=0.25)) == aligned - int(0.25 * aligned)
    donors = ForkFacts(donors=(whole("d", DONOR),))
    placement = in_fork(branch(OTHER, recompute=0.9), donors)
    assert placement.blend is None and placement.report.declined == TOO_FEW_TAKEN
    assert in_fork(branch(OTHER, recompute=0.9, deviation=0.3), donors).blend is not None, "few may move so far"


def test_blended_kv_of_the_same_prompt_is_read_even_where_a_blend_would_not_pay() -> None:
    one = branch(OTHER, exact=0, blended=OTHER.size - 1)
    placement = in_fork(one, ForkFacts(donors=(whole("far", words(9, 600)),)))
    assert placement.blended and placement.report.declined is None
    assert place_alone(branch(OTHER, blended=40, op="verify")).blended
    assert not place_alone(branch(OTHER, exact=40, blended=40, op="verify")).blended


def test_a_server_that_cannot_blend_declines_by_name_and_waits_for_equal_beginnings_only() -> None:
    server = Server(blend_refusal="no rotary table", merge_refusal="no tokenizer")
    placement = in_fork(branch(OTHER), ForkFacts(donors=(whole("d", DONOR),)), server)
    assert placement.blend is None and not placement.blended and placement.report.declined == "no rotary table"
    assert in_fork(branch(OTHER), ForkFacts(Donor("a", DONOR)), server).waits_for is None
    same = branch(prompt(DONOR, words(8, 9)))
    assert in_fork(same, ForkFacts(Donor("a", DONOR)), server).waits_for is not None


@pytest.mark.parametrize(
    ("fork", "said"), [(ForkFacts(anchor_gone=True), ANCHOR_GONE), (ForkFacts(donors_gone=True), DONORS_GONE)]
)
def test_a_branch_that_is_left_alone_says_so_and_is_the_next_anchor(fork: ForkFacts, said: str) -> None:
    placement = in_fork(branch(OTHER), fork)
    assert placement.is_anchor and placement.report.declined == said


def asking(*ids: int) -> NDArray[np.int64]:
    """A text of words that the guard reads as equal wherever the ids are."""
    return prompt(np.tile(np.arange(2, 17), 10), np.array(ids, dtype=np.int64))


def spelled(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same text with its first "seven" as "7": other tokens that ask the same."""
    changed = ids.copy()
    changed[np.flatnonzero(ids == WORDS.index("seven"))[0]] = 107
    return changed


def test_a_merge_takes_the_first_whole_donor_that_asks_the_same() -> None:
    one = branch(spelled(asking(3, 4)), share="merge")
    part, full = Resident(Donor("part", asking(3, 4)), 20), whole("full", asking(3, 4))
    placement = in_fork(one, ForkFacts(donors=(part, full)))
    assert placement.merge is not None and placement.merge.donor is full.donor
    assert placement.merge.key == ForkKey("g", *SPACE) and placement.merge.centre is None
    assert placement.report.to_plain() == {"donor": "full", "declined": NOT_PROBED}
    assert not placement.blended and placement.blend is None and placement.adopts is None
    gone = in_fork(one, ForkFacts(donors=(part,)))
    assert gone.merge is None and gone.report.declined == DONORS_GONE


def test_a_changed_number_is_never_merged_and_its_sibling_does_not_wait_for_it() -> None:
    one = branch(asking(150), share="merge", tau=-1.0)
    placement = in_fork(one, ForkFacts(donors=(whole("d", asking(151)),)))
    assert placement.merge is None and placement.report.declined == "content guard: numbers"
    beside = in_fork(branch(prompt(words(3, 70), asking(150)), share="merge"), ForkFacts(Donor("a", asking(151))))
    assert beside.waits_for is None and (beside.report.declined or "").startswith("content guard")


def test_what_cannot_be_replaced_or_is_nearly_cached_is_not_merged() -> None:
    donors = (whole("d", asking(3, 4)),)
    fixed = in_fork(branch(spelled(asking(3, 4)), fixed="its session", share="merge"), ForkFacts(donors=donors))
    assert fixed.merge is None and fixed.report.declined == "its session"
    own = spelled(asking(3, 4))
    little = in_fork(branch(own, exact=own.size - 5, share="merge"), ForkFacts(donors=donors))
    assert little.merge is None and little.report.declined == TOO_FEW
    exact = in_fork(branch(prompt(asking(3, 4), words(1, 80)), share="merge"), ForkFacts(donors=donors))
    assert exact.merge is None and exact.report.declined is None, "what a donor has from the start is exact reuse"


def test_a_merge_and_a_blend_may_both_be_planned() -> None:
    long = np.tile(np.arange(2, 17), 60)
    one = branch(spelled(long), share="blend", allow_merge=True)
    placement = in_fork(one, ForkFacts(donors=(whole("d", long),)))
    assert placement.merge is not None and placement.blend is not None
    assert placement.report.declined == NOT_PROBED and placement.report.aligned_tokens is not None


def test_a_request_without_a_group_takes_from_the_whole_cache_or_says_that_it_has_nobody() -> None:
    alone = branch(OTHER, group=None, branches=1, share="merge")
    assert place_alone(alone).report.declined == NO_GROUP
    one = branch(OTHER, group=None, branches=1, share_scope="cache")
    placement = place_beside(one, [whole("cached", DONOR)], SERVER, compared(one))
    assert placement.blend is not None and not placement.is_anchor


def test_a_comparison_is_made_once_for_a_donor_and_anew_for_another() -> None:
    known, donor = compared(branch(OTHER)), Donor("d", DONOR)
    first = known.with_donor(donor)
    assert known.with_donor(donor) is first and first.alignment is first.alignment
    assert known.with_donor(Donor("d", DONOR)) is not first


def test_a_donor_counts_as_lost_or_whole_by_what_the_tree_has() -> None:
    donor = Donor("d", words(1, 100))
    assert Resident(donor, 96).is_whole(page=8) and not Resident(donor, 92).is_whole(page=8)
    assert Resident(donor, 15).is_lost(16) and not Resident(donor, 16).is_lost(16)
    short = Donor("s", words(1, 10))
    assert Resident(short, 8).is_lost(16) and not Resident(short, 9).is_lost(16)


def test_an_alias_is_followed_where_its_prompt_is_there_and_fits() -> None:
    donor = Donor("d", words(1, 100))
    assert follow_alias(Resident(donor, 100), "", 120, 500, 1).replaces
    gone = follow_alias(Resident(donor, 40), "", 120, 500, 1)
    assert gone.drop and not gone.replaces and "gone" in gone.declined
    long = follow_alias(Resident(donor, 100), "", 500, 500, 1)
    assert not long.drop and not long.replaces and "too long" in long.declined
    assert follow_alias(Resident(donor, 100), "its session", 120, 500, 1).declined == "its session"


def test_common_beginnings_are_counted_in_tokens() -> None:
    beside = Comparison(Donor("d", np.array([1, 2, 3])), np.array([1, 2, 4, 5]), 16, TOKENIZER)
    assert beside.common == 2 and not beside.begins_with_donor
    assert Comparison(Donor("d", np.array([1, 2])), np.array([1, 2, 4]), 16, TOKENIZER).begins_with_donor


@pytest.mark.parametrize(
    ("donor", "ids", "most_shift", "shift"),
    [
        (OTHER, DONOR, 14, 14),  # what both have stands 14 positions later in the longer one
        (OTHER, DONOR, 13, 0),  # there is no room
        (DONOR, OTHER, 100, 0),  # no position is below 0
        (prompt(words(1, 9), OTHER), prompt(words(2, 30), MATERIAL[:100], words(3, 4), MATERIAL[100:]), 90, 6),
    ],
)
def test_a_branch_stands_where_most_of_it_stands_in_its_donor(
    donor: NDArray[np.int64], ids: NDArray[np.int64], most_shift: int, shift: int
) -> None:
    placement = in_fork(branch(ids, most_shift=most_shift), ForkFacts(donors=(whole("donor", donor),)))
    assert placement.blend is not None
    assert placement.shift == placement.blend.shift == shift


def test_a_branch_whose_blended_kv_is_there_goes_on_where_that_stands() -> None:
    known = branch(DONOR, blended=300, shift=5, most_shift=100)
    in_its_fork = in_fork(known, ForkFacts(donors=(whole("donor", OTHER),)))
    assert in_its_fork.blended and in_its_fork.blend is not None and in_its_fork.shift == in_its_fork.blend.shift == 5
    alone = place_alone(branch(DONOR, blended=300, shift=5, op="verify"))
    assert alone.blended and alone.shift == 5
    exact = place_alone(branch(DONOR, exact=400, blended=300, shift=5, op="verify"))
    assert not exact.blended and exact.shift == 0
