from __future__ import annotations

import math

import pytest

from rksc_sgl.errors import OptionError, VerificationError
from rksc_sgl.verifying.select import Candidate, choose, tied_leaders
from rksc_sgl.verifying.skip import SkipGate


def test_the_default_gate_skips_only_where_all_branches_answer_alike() -> None:
    decision = SkipGate().decide(["7", "7", "7"], [0.5, 0.9, 0.7])
    assert decision.skip and decision.index == 1
    assert not SkipGate().decide(["7", "7", "8"], [0.9, 0.9, 0.1]).skip
    assert not SkipGate().decide(["7", "7", None], [0.9, 0.9, None]).skip
    assert not SkipGate().decide([None, None], [0.9, 0.9]).skip
    assert not SkipGate().decide(["7"], [0.99]).skip


def test_the_gate_and_the_majority_take_equal_answers_in_different_spelling_as_one() -> None:
    assert SkipGate().decide(["0.5", "1/2", "2/4"], [0.5, 0.9, 0.7]).index == 1
    spelled = [Candidate(index, "", answer, None, None) for index, answer in enumerate(["3", "0.5", "3", "1/2", "2/4"])]
    assert choose("majority", spelled) == 1


@pytest.mark.parametrize(
    ("lead", "confidences", "skipped"),
    [
        ("absolute", [0.71, 0.64], True),
        ("absolute", [0.69, 0.10], False),
        ("absolute", [0.90, 0.85], False),
        ("relative", [0.75, 0.69], True),
        ("relative", [0.90, 0.84], False),
    ],
)
def test_the_published_rule_needs_confidence_and_lead(lead: str, confidences: list[float], skipped: bool) -> None:
    decision = SkipGate.published(lead).decide(["1", "2"], confidences)  # type: ignore[arg-type]
    assert decision.skip is skipped
    assert decision.index == (0 if skipped else None)
    assert f"{confidences[0]:.3f}" in decision.reason


def test_never_verifies_always() -> None:
    assert not SkipGate.never().decide(["7", "7"], [1.0, 0.0]).skip


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"agreement": 1.5}, "skip.agreement"),
        ({"min_confidence": 0.7}, "needs both"),
        ({"min_confidence": -1, "min_lead": 0.1}, "skip.min_confidence"),
        ({"lead": "big"}, "skip.lead"),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused_by_name(options: dict, named: str) -> None:
    with pytest.raises(OptionError, match=named):
        SkipGate(**options)


def candidates(*rows: tuple[str | None, float | None, float | None]) -> list[Candidate]:
    return [Candidate(index, "text", *row) for index, row in enumerate(rows)]


def test_score_is_p_yes_times_the_root_of_confidence() -> None:
    found = candidates(("1", 0.9, 0.25), ("2", 0.5, 1.0))
    assert 0.9 * math.sqrt(0.25) < 0.5
    assert choose("score", found) == 1


def test_majority_and_weighted_majority_differ_where_weights_do() -> None:
    found = candidates(("1", 0.9, 1.0), ("2", 0.1, 1.0), ("2", 0.2, 1.0))
    assert choose("majority", found) == 2
    assert choose("weighted_majority", found) == 0


def test_without_any_answer_the_score_decides() -> None:
    assert choose("majority", candidates((None, 0.1, 1.0), (None, 0.2, 1.0))) == 1


def test_a_high_score_does_not_outvote_two_branches() -> None:
    found = candidates(("1", 0.99, 1.0), ("2", 0.1, 1.0), ("2", 0.2, 1.0), (None, 1.0, 1.0))
    assert choose("vote", found) == 2
    assert choose("score", found) == 3


def test_the_scores_of_the_tied_answers_break_a_tie() -> None:
    # the best score is an outlier of the answer with less in all, and "3" has no vote to spare
    found = candidates(("1", 0.9, 1.0), ("1", 0.1, 1.0), ("2", 0.6, 1.0), ("2", 0.7, 1.0), ("3", 1.0, 1.0))
    assert choose("vote", found) == 3


def test_a_tie_that_nobody_verified_goes_to_the_confident() -> None:
    assert choose("vote", candidates(("1", None, 0.2), ("2", None, 0.9))) == 1
    assert choose("vote", candidates(("1", None, None), ("2", None, None))) == 0


@pytest.mark.parametrize(
    ("answers", "leaders"),
    [
        ([], []),
        ([None, None], []),
        (["1", None], []),
        (["1", "1"], [0, 1]),
        (["1", "2", None], [0, 1]),
        (["1", "2", "2"], [1, 2]),
        (["1", "2", "2", "1", "3"], [0, 1, 2, 3]),
    ],
)
def test_leaders_are_the_branches_of_the_answers_with_most_votes(answers: list[str | None], leaders: list[int]) -> None:
    assert tied_leaders(answers) == leaders


def test_a_vote_without_two_answers_goes_by_score() -> None:
    assert choose("vote", candidates((None, 0.1, 1.0), ("1", 0.2, 1.0), (None, 0.3, 1.0))) == 2


def test_a_selector_of_ones_own_is_checked() -> None:
    found = candidates(("1", 0.1, None), ("2", None, None))
    assert choose(lambda ones: ones[0].index, found) == 0
    with pytest.raises(OptionError, match="select: must return the index"):
        choose(lambda ones: 7, found)
    with pytest.raises(OptionError, match="select: must be one of"):
        choose("best", found)
    with pytest.raises(VerificationError):
        choose("score", [])
