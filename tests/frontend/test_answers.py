from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rksc_sgl.errors import OptionError
from rksc_sgl.frontend.answers import agreement, extract_answer, majority, normalize_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48 / 2 = 24, and 48 + 24 = 72.\n#### 72", "72"),
        ("The answer is 1,200.00.", "1200"),
        ("So \\boxed{\\text{Yes}} it is", "yes"),
        ("first \\boxed{1}, then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("Final answer: (B) because of that", "b"),
        ("The answer is B.", "b"),
        ("The answer is: 18 dollars", "18"),
        ("The answer is $5.50", "5.5"),
        ("It costs −5% more", "-5%"),
        ("Answer: **42**", "42"),
        ("She keeps 3/4 of it", "3/4"),
        ("The answer is 7. No wait, the answer is 8.", "8"),
        ("nothing to see", None),
        ("", None),
        ("\\boxed{unfinished 5", "5"),
    ],
)
def test_the_final_answer_is_found(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@given(st.text(max_size=200))
def test_no_text_makes_extraction_fail_and_a_text_without_letters_and_digits_has_no_number(text: str) -> None:
    answer = extract_answer(text)
    assert answer is None or answer
    if not any(character.isalnum() for character in text):
        assert answer is None or not any(character.isdigit() for character in answer)


@given(st.integers(-(10**9), 10**9))
def test_every_way_to_write_a_whole_number_is_the_same_answer(value: int) -> None:
    spelled = {str(value), f"{value:,}", f"{value}.0", f"{value:,}.00", f" {value} ", f"{value}."}
    assert {normalize_answer(text) for text in spelled} == {str(value)}


@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    once = normalize_answer(text)
    if once is not None:
        assert normalize_answer(once) == once


def test_branches_without_an_answer_count_against_agreement() -> None:
    found = agreement(["7", None, "7", "8"])
    assert (found.leader, found.votes, found.share, found.lead, found.indices) == ("7", 2, 0.5, 0.25, (0, 2))
    assert agreement([None, None]).leader is None


def test_the_majority_goes_by_weight_and_ties_to_the_first() -> None:
    assert majority(["1", "2", "2"]) == 1
    assert majority(["1", "2", "2"], [0.9, 0.3, 0.3]) == 0
    assert majority(["1", "2"]) == 0
    assert majority([None, None]) is None
    with pytest.raises(OptionError, match="weights"):
        majority(["1"], [1.0, 2.0])
