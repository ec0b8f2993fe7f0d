from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rksc_sgl.similarity import wording
from rksc_sgl.similarity.content_guard import same_content

CHAT = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TOM = "Tom has 5 apples and gives 2 to Ann. How many apples does Tom have?"
TURNS = f"<|im_start|>user\n{TOM}<|im_end|>\n<|im_start|>assistant\nHe has 3.<|im_end|>\n<|im_start|>user\n"


@pytest.mark.parametrize(
    ("donor", "branch"),
    [
        ("He has twelve apples. How many?", "He has 12 apples. How many?"),
        ("Add twenty-one. What is it?", "Add 21. What is it?"),
        ("He has 1,000 of them. Why?", "He has 1000 of them. Why?"),
        ("It costs $5. Why?", "It costs 5 dollars. Why?"),
        ("It rose by 10%. Why?", "It rose by 10 percent. Why?"),
        ("He doesn't go. Why?", "He does not go. Why?"),
        ("He can’t go. Why?", "He cannot go. Why?"),
        ("He ran 5km at 10 mph. When?", "He ran 5 kilometers at 10 miles per hour. When?"),
        ("He gets $3 a day. Why?", "He gets $3 per day. Why?"),
        ("He sees the cow. Why?", "He sees a cow. Why?"),
        ("Red, green, and blue. Why?", "Red, green and blue. Why?"),
        ("How many are there in all?", "How many are there in total?"),
        ("His mom is here. Why?", "His mother is here. Why?"),
        (TOM, "Think step by step.\n\n" + TOM),
        ("Problem: " + TOM, TOM + " Please explain your reasoning."),
        (CHAT.format("You are a careful mathematician.", TOM), CHAT.format("You are a helpful assistant.", TOM)),
    ],
)
def test_other_spellings_and_harmless_instructions_are_the_same(donor: str, branch: str) -> None:
    assert same_content(donor, branch).same
    assert same_content(branch, donor).same


@pytest.mark.parametrize(
    ("donor", "branch", "reason"),
    [
        ("He has 12. Why?", "He has 13. Why?", "numbers"),
        ("He has 3.5. Why?", "He has 35. Why?", "numbers"),
        ("Version 3.10. Why?", "Version 3.1. Why?", "numbers"),
        ("Add one hundred and five. What is it?", "Add 105. What is it?", "numbers"),
        ("He has twenty five-dollar bills. Why?", "He has twenty-five dollar bills. Why?", "numbers"),
        ("What is m²?", "What is m2?", "numbers"),
        ("He ran 5 km. Why?", "He ran 5 miles. Why?", "units"),
        ("It costs $5. Why?", "It costs €5. Why?", "units"),
        ("At 8 a.m. he left. Why?", "At 8 p.m. he left. Why?", "units"),
        ("Tom ran. Why?", "Tim ran. Why?", "names"),
        ("He does go. Why?", "He doesn't go. Why?", "negation"),
        ("He is with her. Why?", "He is without her. Why?", "negation"),
        ("He has all of it. Why?", "He has some of it. Why?", "quantifier"),
        ("He has more. Why?", "He has fewer. Why?", "comparison"),
        ("It rose by 5. Why?", "It rose to 5. Why?", "comparison"),
        ("What is 3 + 4?", "What is 3 * 4?", "operator"),
        ("What is 3 - 4?", "What is 3 -4?", "operator"),
        ("It rose by 10%. Why?", "It rose by 10. Why?", "operator"),
        ("What does `f(x)` do?", "What does `f(y)` do?", "code"),
        ("Why?\n```\nif a:\n  b\nc\n```", "Why?\n```\nif a:\n  b\n  c\n```", "code"),
        ("Why?\nif a:\n    b\n    c", "Why?\nif a:\n    b\nc", "code"),
        ("Who said 'go on'?", "Who said 'go in'?", "quoted"),
        ("Tom gave Ann 5. Why?", "Ann gave Tom 5. Why?", "order"),
        ("A) 5\nB) 6\nWhich?", "A) 6\nB) 5\nWhich?", "order"),
        ("His brother ran. Why?", "His brothers ran. Why?", "words"),
        ("Tom, Ann and Bob ran. Why?", "Tom Ann and Bob ran. Why?", "words"),
        ("1 2\n3?", "1 2 3?", "words"),
        ("3 bikes and 2 bicycles. Why?", "3 bicycles and 2 bikes. Why?", "order"),
    ],
)
def test_a_changed_fact_is_named(donor: str, branch: str, reason: str) -> None:
    verdict = same_content(donor, branch)
    assert (verdict.same, verdict.reason) == (False, reason)
    assert verdict.where.startswith("donor has ")
    assert same_content(branch, donor).reason == reason


@pytest.mark.parametrize(
    "demand",
    [
        "Answer in one word.",
        "Answer in French.",
        "Round to 2 decimals.",
        "Do not explain.",
        "Explain the problem.",
        "Give the number of steps.",
        "End with 'The answer is N'.",
        "Give only the answer.",
        "Repeat the question.",
        "You are a pirate.",
    ],
)
def test_an_instruction_that_changes_the_answer_is_kept(demand: str) -> None:
    assert not same_content(TOM, f"{TOM}\n{demand}").same
    assert not same_content(f"{demand}\n{TOM}", TOM).same


@pytest.mark.parametrize(
    ("donor", "branch"),
    [
        ("Explain your answer.", "Solve the problem."),
        ("Tom has 5 apples.\nExplain your answer.", "Tom has 5 apples.\nSolve it."),
        ("Solve it.\nHow many words are in this prompt?", "How many words are in this prompt?"),
        (CHAT.format("You are a tutor.", "What are you?"), CHAT.format("You are an assistant.", "What are you?")),
        (f"{TOM}\nQuestion:", f"{TOM}\nAnswer:"),
        ("He said: Explain your answer. Why?", "He said. Why?"),
        (
            TURNS + "Explain your answer.",
            TURNS + "Check your answer.",
        ),
        (CHAT.format("", TOM), CHAT.format("", TOM).removesuffix("<|im_start|>assistant\n")),
        (f"<|im_start|>user\n{TOM}", f"<|im_start|>assistant\n{TOM}"),
        ("", "Solve it."),
    ],
)
def test_instructions_count_where_the_question_leans_on_them(donor: str, branch: str) -> None:
    assert not same_content(donor, branch).same


def test_a_sentence_of_instruction_words_with_content_is_not_dropped() -> None:
    donor, branch = "He solved 3 problems. How many?", "He answered 3 questions. How many?"
    assert same_content(donor, branch).reason == "words"


def test_no_word_that_names_a_difference_is_harmless_by_itself() -> None:
    assert not wording.HARMLESS & wording.NEGATION
    assert not wording.HARMLESS & wording.QUANTIFIER - {"first"}
    assert not wording.HARMLESS & wording.NUMBER_WORDS


WORDS = "Tom Ann gave sold 5 12 apples the not more $ - , . ? two twenty half per ' ( ` km"
words = st.sampled_from([*WORDS.split(), '"', "\n"])
texts = st.lists(words, min_size=1, max_size=14).map(" ".join)


@given(texts, texts)
def test_the_verdict_is_symmetric_and_always_explained(donor: str, branch: str) -> None:
    verdict, reverse = same_content(donor, branch), same_content(branch, donor)
    assert (verdict.same, verdict.reason) == (reverse.same, reverse.reason)
    assert verdict.same == (verdict.reason == "") == (verdict.where == "")
    assert same_content(donor, donor).same


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_can_be_judged(donor: str, branch: str) -> None:
    assert same_content(donor, donor).same
    assert isinstance(same_content(donor, branch).same, bool)


@given(texts, st.integers(0, 99), st.integers(0, 99))
def test_another_number_is_never_the_same(text: str, one: int, other: int) -> None:
    assert same_content(f"{text} x {one} y?", f"{text} x {other} y?").same == (one == other)
