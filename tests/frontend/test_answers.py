from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rksc_sgl.errors import OptionError
from rksc_sgl.frontend.answers import agreement, extract_answer, majority, normalize_answer, stated_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48 / 2 = 24, and 48 + 24 = 72.\n#### 72", "72"),
        ("#### $1,200", "1200"),
        ("#### 18\nThat took 3 steps.", "18"),
        ("The answer is 12, or rather\n#### 15", "15"),
        ("The answer is 1,200.00.", "1200"),
        ("So \\boxed{\\text{Yes}} it is", "yes"),
        ("first \\boxed{1}, then \\boxed{\\frac{1}{2}}", "1/2"),
        ("\\boxed{5 \\text{ apples}}", "5"),
        ("\\boxed{50\\%}", "50%"),
        ("\\boxed{1{,}200}", "1200"),
        ("\\boxed{x^2 + 3}", "x^2 + 3"),
        ("\\boxed{7}, and then an empty \\boxed{}", "7"),
        ("Final answer: 7", "7"),
        ("The final answer is \\(12\\).", "12"),
        ("the answer is $x = \\frac{1}{2}$", "1/2"),
        ("The answer is: 18 dollars", "18"),
        ("The answer is $5.50", "5.5"),
        ("The answer is 60 percent.", "60%"),
        ("Answer: **42**", "42"),
        ("**Answer:** 42", "42"),
        ("The answer is:\n\n18", "18"),
        ("The answer is 7. No wait, the answer is 8.", "8"),
        ("The answer is 5. Let me check: 3 + 9 = 12. The answer is", "5"),
        ("Answer: Yes, because 3 is prime", "yes"),
        ("The answer is not clear", "not clear"),
        ("It costs −5% more", "-5%"),
        ("She keeps 3/4 of it", "3/4"),
        ("She needs 18cm.", "18"),
        ("The show begins at 12:30", "12:30"),
        ("In total:\n- 18", "18"),
        ("which leaves 20 - 5", "5"),
        ("\\boxed{unfinished 5", "5"),
        ("the answer is \\boxed{", None),
        ("nothing to see in room 12B", None),
        ("", None),
    ],
)
def test_the_final_answer_is_found(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Final answer: (B) because of that", "b"),
        ("The answer is B.", "b"),
        ("answer is b", "b"),
        ("Answer: C) 12 apples", "c"),
        ("The answer is option C", "c"),
        ("The correct option is (D).", "d"),
        ("So (B) is correct: 12 is even.", "b"),
        ("\\boxed{\\text{(B)}}", "b"),
        ("(B)", "b"),
        ("**B**", "b"),
    ],
)
def test_a_choice_is_its_letter_in_every_form(text: str, letter: str) -> None:
    assert extract_answer(text) == letter


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is A dog", "a dog"),
        ("Let her apples (A) be 5, so she has 12 in all", "12"),
        ("Option A costs $5, option B costs $7. She pays 7", "7"),
    ],
)
def test_a_letter_that_is_only_mentioned_is_no_choice(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 48 + 24 = 72.", "72"),
        ("The answer is 10 dollars + 5 dollars = 15 dollars", "15"),
        ("The answer is 18 because 3*6=18", "18"),
        ("The answer is 18 (20-2=18, 5+5=10)", "18"),
        ("The answer is 2 × 2 × 3", "2 × 2 × 3"),
        ("The answer is 3, 5", "3, 5"),
        ("The answer is 3, 7 and 1,200.0.", "3, 7, 1200"),
        ("The answer is 18, 3 more than before", "18"),
        ("The answer is 00:34:28", "00:34:28"),
    ],
)
def test_a_statement_of_several_numbers_is_not_cut_to_its_first(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("written", "form"),
    [
        ("007", "7"),
        ("-0.0", "0"),
        (".5", "0.5"),
        ("+5", "5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("5€", "5"),
        ("1.5e3", "1500"),
        ("1E-3", "0.001"),
        ("1e400", "1e400"),
        ("10e399", "1e400"),
        ("5 %", "5%"),
        ("2 / 4", "2/4"),
        ("12345678901234567890.5", "12345678901234567890.5"),
        ("(5)", "5"),
        ("f(x)", "f(x)"),
        ("  New   York! ", "new york"),
        ("0_:", "0"),
        ("...", None),
    ],
)
def test_numbers_and_words_have_one_exact_form(written: str, form: str | None) -> None:
    assert normalize_answer(written) == form


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("It is so. The answer is Friday.", "Friday"),
        ("**Answer:** thought, Only", "thought, Only"),
        ("\\boxed{ 2 × 2 × 3 }", "2 × 2 × 3"),
        ("#### 1,200", "1,200"),
        ("there are 12 of them", None),
    ],
)
def test_a_stated_answer_keeps_its_spelling(text: str, stated: str | None) -> None:
    assert stated_answer(text) == stated


_TEXTS = st.text(max_size=200) | st.lists(
    st.sampled_from(
        [
            "\\boxed{",
            "}",
            "{",
            "answer is ",
            "Answer: ",
            "#### ",
            "(B)",
            "7",
            "1,200",
            "-",
            "$",
            "=",
            "\n",
            "e9",
            "%",
            "/",
        ]
    ),
    max_size=20,
).map("".join)


@given(_TEXTS)
def test_no_text_makes_extraction_fail_and_its_answer_is_in_normal_form(text: str) -> None:
    answer = extract_answer(text)
    assert answer is None or answer
    if answer is not None and ", " not in answer:
        assert normalize_answer(answer) == answer


@given(_TEXTS)
def test_an_answer_has_no_digit_but_zero_and_no_letter_that_the_text_has_not(text: str) -> None:
    answer = extract_answer(text) or ""
    exponent_free = re.sub(r"e-?[0-9]+$", "", answer)
    assert set(re.findall("[1-9]", exponent_free)) <= set(text)
    assert {letter for letter in exponent_free if letter.isalpha()} <= set(text.lower())


@given(st.integers(-(10**9), 10**9), st.sampled_from(["So it is {}.", "#### {}", "\\boxed{{{}}}", "The answer is {}."]))
def test_every_way_to_write_a_whole_number_is_the_same_answer(value: int, sentence: str) -> None:
    spelled = {str(value), f"{value:,}", f"{value}.0", f"{value:,}.00", f"{value}".replace("-", "−")}
    assert {normalize_answer(text) for text in {*spelled, f" {value} ", f"{value}."}} == {str(value)}
    assert {extract_answer(sentence.format(text)) for text in spelled} == {str(value)}


@given(_TEXTS)
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    once = normalize_answer(text)
    if once is not None:
        assert normalize_answer(once) == once


def test_branches_without_an_answer_count_against_agreement() -> None:
    found = agreement(["7", None, "7", "8"])
    assert (found.leader, found.votes, found.share, found.lead, found.indices) == ("7", 2, 0.5, 0.25, (0, 2))
    assert agreement([None, None]).leader is None
    assert agreement([]).share == 0.0


@given(st.lists(st.none() | st.sampled_from("123"), max_size=9))
def test_the_leader_has_the_votes_and_the_majority_is_its_first_branch(answers: list[str | None]) -> None:
    found = agreement(answers)
    assert found.votes == len(found.indices) == sum(answer == found.leader for answer in answers if answer is not None)
    assert majority(answers) == (found.indices[0] if found.indices else None)
    assert 0.0 <= found.lead <= found.share <= 1.0


def test_the_majority_goes_by_weight_and_ties_to_the_first() -> None:
    assert majority(["1", "2", "2"]) == 1
    assert majority(["1", "2", "2"], [0.9, 0.3, 0.3]) == 0
    assert majority(["1", "2"]) == 0
    assert majority([None, None]) is None
    with pytest.raises(OptionError, match="weights"):
        majority(["1"], [1.0, 2.0])
