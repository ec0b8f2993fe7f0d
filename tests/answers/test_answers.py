from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.answers import (
    agreement,
    branch_answer,
    calls_answer,
    extract_answer,
    extractor_of,
    json_field,
    majority,
    normalize_answer,
    stated_answer,
)
from rksc_sgl.errors import OptionError


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
        ("The answer is \\(B\\).", "b"),
        ("The answer is **(B)** because", "b"),
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
        ("The answer is \\(12 + 3\\).", "12 + 3"),
        ("The answer is (12 + 3).", "12 + 3"),
        ("The answer is 12 + 3 because of that", "12 + 3"),
        ("The answer is -2.0 - 15.0i.", "-2.0 - 15.0i"),
        ("The answer is x^2 + 3x.", "x ^ 2 + 3x"),
        ("The answer is (1, 2).", "(1, 2)"),
        ("The answer is (1,200).", "1200"),
        ("The answer is \\(3, 5\\)", "3, 5"),
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
        ("(1, 2)", "(1, 2)"),
        ("(1,200)", "1200"),
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


@pytest.mark.parametrize(
    "text",
    [
        "I checked that the answer is accurate.",
        "The answer is not clear",
        "So the answer is correct, as the sum shows",
        "The answer is obtained by adding them",
        "End with 'The answer is N'.",
        "The answer is [number]",
        "Answer: <answer>",
        "The answer is ...",
        "\\boxed{N}",
        "The answer is ____.",
        "I will end with 'The answer is N' as was asked",
        "The answer is N, the answer is N",
        "The answer is [number] apples",
        "The answer is N dollars",
        "The answer is X apples.",
        "The answer is x apples.",
        "The answer is as above",
        "Answer: as above",
        "Answer: see above",
        "Answer: e.g. ten",
        "Answer: for example ten",
        "The answer is easy to see. We have it",
    ],
)
def test_a_remark_on_an_answer_or_a_place_for_one_is_no_answer(text: str) -> None:
    assert extract_answer(text) is None
    assert stated_answer(text) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 12. I am sure that the answer is correct.", "12"),
        ("End with 'The answer is N'. 3 + 4 = 7.\nThe answer is 7", "7"),
        ("The total is 31. The answer is accurate.", "31"),
        ("Answer: correct", "correct"),
        ("The answer is what we were looking for", None),
        ("Answer: e.g. 5, but here it is\nThe answer is 7. It is as above: the answer is as above", "7"),
        ("Answer: n", None),
        ("Answer: x", "x"),
    ],
)
def test_what_stands_beside_a_remark_or_a_template_is_found(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("First 48 / 2 = 24, and then 12/6", None),
        ("She has 3 apples and", None),
        ("Option (B) is correct because", None),
        ("The answer is", None),
        ("The answer is 3 +", None),
        ("The answer is 1,", None),
        ("The answer is \\boxed{1", None),
        ("The answer is accurate and", None),
        ("The answer is the number of apples that", None),
        ("The answer is 12", None),
        ("The answer is 1", None),
        ("The answer is 12.", None),
        ("The answer is **12**", None),
        ("The answer is $12", None),
        ("The answer is 12 ", None),
        ("The answer is 12 dollars", None),
        ("The answer is 12 dollars plus", None),
        ("The answer is 48 + 2", None),
        ("The answer is 48 + 24 = 7", None),
        ("The answer is 12/6", None),
        ("The answer is 12, 1", None),
        ("The answer is 3, 5 and", None),
        ("The answer is 50%", None),
        ("The answer is x^2 + 3", None),
        ("The answer is B", None),
        ("The answer is no", None),
        ("The answer is New York", None),
        ("The answer is easy to see. We have", None),
        ("Answer: 1", None),
        ("#### 12", None),
        ("The answer is 5.\nSo the answer is 1", "5"),
        ("The answer is 12. ", "12"),
        ("The answer is **12**. So", "12"),
        ("The answer is $12$, which", None),
        ("The answer is $12$, which is", "12"),
        ("The answer is 12 dollars. It", "12"),
        ("The answer is 48 + 24 = 72. T", "72"),
        ("The answer is 12\n", "12"),
        ("#### 12\nIt", "12"),
        ("The answer is no, because", "no"),
        ("The answer is 12, because she", "12"),
        ("The answer is Friday. It is", "friday"),
        ("The answer is (B) because", "b"),
        ("so \\boxed{7} apples, which", "7"),
        ("The answer is 5. Let me check: 3 + 9 =", "5"),
        ("Answer: yes, since", "yes"),
    ],
)
def test_a_text_that_was_cut_has_no_answer_but_one_that_it_stated(text: str, answer: str | None) -> None:
    assert extract_answer(text, truncated=True) == answer


@pytest.mark.parametrize(
    "said",
    [
        "1,234.56",
        "18 dollars and nothing else",
        "$18.50",
        "48 + 24 = 72",
        "10 dollars + 5 dollars = 15 dollars",
        "2 × 3 × 5",
        "3 1/2 hours",
        "12/64",
        "5 million",
        "3, 5 and 15",
        "12:30",
        "-7.5%",
        "**42**",
        "$x = \\frac{1}{2}$",
        "\\(12 + 3\\)",
        "(1, 2)",
        "(B)",
        "B",
        "yes",
        "New York",
        "a dog",
        "not 5 but 6",
        "the sum of 12 and 15, which is 27",
        "50% of 36, which is 18",
        "1e3",
        "-2.5 - 15.5i",
        "x^2 + 3",
        "Ann is a knight, and Bob is a knave",
        "those, found, where",
    ],
)
@pytest.mark.parametrize("form", ["The answer is {}. So it was.", "Answer: {}\nSo it was.", "It is \\boxed{{{}}}. So."])
def test_wherever_a_text_is_cut_it_states_its_answer_or_none(form: str, said: str) -> None:
    text = form.format(said)
    answer = extract_answer(text)
    assert answer is not None
    found = {extract_answer(text[:cut], truncated=True) for cut in range(len(text) + 1)}
    assert found == {None, answer}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### Step 3: add them\n12 + 6 = 18\nThe answer is 18.", "18"),
        ("The answer is 18.\n#### Step 3: check it", "18"),
        ("#### 3. Add them\nThe answer is 18", "18"),
        ("#### 3 Steps Of It\nThe answer is 18", "18"),
        ("#### Step 3: add them\n12 + 6 = 18", "18"),
        ("#### Solution\nShe has 18", "18"),
        ("#### 12\nNo, wait. The answer is 15.", "15"),
        ("She adds them.\n#### 18 dollars", "18"),
        ("#### Step 1\nall\n#### **18**", "18"),
        ("#### 1/2", "1/2"),
        ("We look at it.\n#### Friday", "friday"),
        ("#### B", "b"),
    ],
)
def test_four_signs_before_a_heading_state_no_answer(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is not 5 but 6", "6"),
        ("The answer is not 5, but rather 6.", "6"),
        ("The answer is not 5, it is 6.", "6"),
        ("The answer is 4. Is the answer 5? The answer is not 5.", "4"),
        ("The answer is the sum of 12 and 15, which is 27", "27"),
        ("The answer is the sum of 12 and 15.\nThe answer is 27.", "27"),
        ("The answer is the product of 3 and 5 = 15.", "15"),
        ("The answer is 50% of 36, which is 18.", "18"),
        ("The answer is 3 more than 5, which equals 8", "8"),
        ("The answer is a total of 18 dollars.", "18"),
        ("The answer is that she has 18 apples left.", "18"),
        ("The answer is 20 - 5", "20 - 5"),
        ("The answer is therefore 18.", "18"),
        ("The answer is approximately 3.14.", "3.14"),
    ],
)
def test_a_number_on_the_way_to_the_answer_is_not_the_answer(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 3 1/2.", "3 1/2"),
        ("She needs 3 1/2 hours", "3 1/2"),
        ("\\boxed{3\\frac{1}{2}}", "3 1/2"),
        ("\\boxed{3 \\dfrac{1}{2} \\text{ cups}}", "3 1/2"),
        ("The answer is -1 3/4", "-1 3/4"),
        ("The answer is 5 million.", "5 million"),
        ("\\boxed{5 million}", "5 million"),
        ("\\boxed{5x}", "5x"),
        ("\\boxed{5 x}", "5 x"),
        ("\\boxed{x = 5}", "x = 5"),
    ],
)
def test_what_belongs_to_a_number_stays_with_it(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "The answer is \\boxed{18}.",
        "The final answer is: $\\boxed{18}$.",
        "The final answer is: **18**",
        "**The final answer is: 18**",
        "The answer is **$18**.",
        "### Answer:\n\n**18**",
        "\\[ 20 - 2 = 18 \\]",
        "So we get:\n\\[\n\\text{Total} = 12 + 6 = 18 \\text{ dollars}\n\\]",
        "Therefore, Janet makes a total of 18 dollars.",
        "Therefore, Janet makes a total of \\(18\\) dollars at the farmers' market.",
        "Therefore, she makes \\$18 every day.",
        "The answer is \\(\\$18\\).",
        "The answer is $\\$18.00$.",
        "The answer is \\text{18 dollars}.",
        "The answer is \\(18 \\text{ dollars}\\).",
        "\\boxed{\\$18}",
        "\\boxed{18\\text{ dollars}}",
        "\\boxed{\\text{18}}",
        "The answer is `18`.",
        "Answer: $18.00 per day",
        'The answer is "18".',
    ],
)
def test_forms_in_which_models_write_a_number_give_that_number(text: str) -> None:
    assert extract_answer(text) == "18"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is New York.", "new york"),
        ("The answer is Friday, because it is the fifth day", "friday"),
        ('The answer is "to be or not to be".', "to be or not to be"),
        ("The answer is apple, pear, plum, fig, lime.", "apple, pear, plum, fig, lime"),
        ("The answer is those, except, found, where.", "those, except, found, where"),
        ("The answer is Ann is a knight, and Bob is a knave.", "ann is a knight, and bob is a knave"),
        ("The answer is THIS IS WHAT IT SAYS.", "this is what it says"),
        ("Answer: this is what it says", "this is what it says"),
        ("The answer is **Yes**, because", "yes"),
        ("The answer is yes because 3 is odd", "yes"),
    ],
)
def test_words_that_name_something_are_an_answer(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


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


@settings(deadline=None)  # a busy machine fails no test
@given(_TEXTS)
def test_no_text_makes_extraction_fail_and_its_answer_is_in_normal_form(text: str) -> None:
    answer = extract_answer(text)
    assert answer is None or answer
    if answer is not None and ", " not in answer:
        assert normalize_answer(answer) == answer


@settings(deadline=None)
@given(_TEXTS)
def test_an_answer_has_no_digit_but_zero_and_no_letter_that_the_text_has_not(text: str) -> None:
    answer = extract_answer(text) or ""
    exponent_free = re.sub(r"e-?[0-9]+$", "", answer)
    assert set(re.findall("[1-9]", exponent_free)) <= set(text)
    assert {letter for letter in exponent_free if letter.isalpha()} <= set(text.lower())


@settings(deadline=None)
@given(st.integers(-(10**9), 10**9), st.sampled_from(["So it is {}.", "#### {}", "\\boxed{{{}}}", "The answer is {}."]))
def test_every_way_to_write_a_whole_number_is_the_same_answer(value: int, sentence: str) -> None:
    spelled = {str(value), f"{value:,}", f"{value}.0", f"{value:,}.00", f"{value}".replace("-", "−")}
    assert {normalize_answer(text) for text in {*spelled, f" {value} ", f"{value}."}} == {str(value)}
    assert {extract_answer(sentence.format(text)) for text in spelled} == {str(value)}


@settings(deadline=None)
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


@settings(deadline=None)
@given(st.lists(st.none() | st.sampled_from("123"), max_size=9))
def test_the_leader_has_the_votes_and_the_majority_is_its_first_branch(answers: list[str | None]) -> None:
    found = agreement(answers)
    assert found.votes == len(found.indices) == sum(answer == found.leader for answer in answers if answer is not None)
    assert majority(answers) == (found.indices[0] if found.indices else None)
    assert 0.0 <= found.lead <= found.share <= 1.0


def test_equal_answers_in_different_spelling_are_one_vote() -> None:
    answers = ["3", "0.5", None, "3", "1/2", "2/4"]
    found = agreement(answers)
    assert (found.leader, found.votes, found.indices) == ("0.5", 3, (1, 4, 5))
    assert majority(answers) == 1
    assert majority(answers, [2.0, 1.0, 1.0, 2.0, 1.0, 1.5]) == 0
    assert majority(answers, equal=str.__eq__) == 0


def test_the_majority_goes_by_weight_and_ties_to_the_first() -> None:
    assert majority(["1", "2", "2"]) == 1
    assert majority(["1", "2", "2"], [0.9, 0.3, 0.3]) == 0
    assert majority(["1", "2"]) == 0
    assert majority([None, None]) is None
    with pytest.raises(OptionError, match="weights"):
        majority(["1"], [1.0, 2.0])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('{"answer": 12.0}', "12"),
        ('First {"answer": 1}, then ```json\n{"steps": [1, 2], "answer": " New York "}\n```', "new york"),
        ('{"answer": {"b": 1, "a": 2}}', '{"a": 2, "b": 1}'),
        ('{"answer": true}', "true"),
        ('{"answer": null}', None),
        ('{"other": 1}', None),
        ('{"answer": 12', None),
        ("no object", None),
        ('{"answer":5,"work":{"answer":3}}', "5"),
        ('{"work":{"answer":3},"answer":5} {"other":{"answer":4}}', "5"),
        ('{"answer":5,"work":{"answer":3}', None),
        ('{"answer":5,"work":{"answer":3},}', None),
        ('{"answer":1} then {"answer":5,"work":{"answer":3}', "1"),
        ('{x} and \\frac{1}{2}: {"answer": 5} {y}', "5"),
        ('[{"answer": 1}, {"answer": 2}]', "2"),
    ],
)
def test_a_field_of_the_last_json_object_is_an_answer(text: str, answer: str | None) -> None:
    assert json_field("answer")(text) == answer
    assert branch_answer(text, "json:answer", truncated=True) == answer


def test_a_branch_that_was_cut_votes_only_with_what_is_complete() -> None:
    assert branch_answer("The answer is 12. It", truncated=True) == "12"
    assert branch_answer("12 apples", truncated=True) is None
    assert branch_answer("12 apples", "text", truncated=True) is None
    assert branch_answer("12 apples", "text", truncated=False) == "12 apples"
    assert branch_answer("12 apples", lambda text: text[:2], truncated=True) == "12", "its author judges that"
    assert branch_answer("12 apples", lambda text: text[:2], truncated=False) == "12"


def test_an_extractor_that_is_unknown_or_returns_no_text_is_refused() -> None:
    with pytest.raises(OptionError, match="extract: must be answer, text, json, json:FIELD"):
        branch_answer("12", "number", truncated=False)
    with pytest.raises(OptionError, match="extract: must return a string or None, got int"):
        branch_answer("12", lambda text: 12, truncated=False)  # type: ignore[arg-type, return-value]


def test_calls_are_equal_where_names_and_arguments_are() -> None:
    one = calls_answer([("add", '{"a": 1, "b": [2, 3]}'), ("stop", "")])
    assert one == calls_answer([("stop", " "), ("add", '{"b":[2,3],"a":1}')])
    assert one != calls_answer([("add", '{"a": 1, "b": [3, 2]}'), ("stop", "")])
    assert calls_answer([("add", '{"a": 1')]) != calls_answer([("add", '{"a": 1}')])


def test_json_as_a_whole_is_compared_without_spaces_and_the_order_of_keys() -> None:
    extract = extractor_of("json")
    assert extract('{"a": 1, "b": "x"}') == extract(' {"b":"x","a":1}') is not None
    assert extract('{"a": 1') is None and extract("the answer is 4") is None and extract("null") is None
