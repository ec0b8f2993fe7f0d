from __future__ import annotations

import pytest

from rksc_sgl.similarity import wording
from rksc_sgl.similarity.content_guard import same_content
from rksc_sgl.similarity.spellings import value_of


@pytest.mark.parametrize(
    ("donor", "branch"),
    [
        ("He has twelve apples. How many?", "He has 12 apples. How many?"),
        ("Add twenty-one. What is it?", "Add 21. What is it?"),
        ("He has fifteen hundred of them. Why?", "He has 1500 of them. Why?"),
        ("Five million ran. Why?", "5,000,000 ran. Why?"),
        ("He has 1,000 of them. Why?", "He has 1000 of them. Why?"),
        ("It costs $5. Why?", "It costs 5 dollars. Why?"),
        ("It costs $1,250.50. Why?", "It costs 1250.50 dollars. Why?"),
        ("It rose by 10%. Why?", "It rose by 10 percent. Why?"),
        ("It rose by 10 %. Why?", "It rose by 10 per cent. Why?"),
        ("He doesn't go. Why?", "He does not go. Why?"),
        ("He can’t go. Why?", "He cannot go. Why?"),
        ("I'm here. Why?", "I am here. Why?"),
        ("He ran 5km at 10 mph. When?", "He ran 5 kilometers at 10 miles per hour. When?"),
        ("He ran 1 km. When?", "He ran 1 kilometer. When?"),
        ("At 8 a.m. he left. Why?", "At 8 AM he left. Why?"),
        ("How many are there in all?", "How many are there in total?"),
        ("His mom is here. Why?", "His mother is here. Why?"),
    ],
)
def test_other_spellings_of_the_same_thing_are_the_same(donor: str, branch: str) -> None:
    assert same_content(donor, branch).same
    assert same_content(branch, donor).same


@pytest.mark.parametrize(
    ("donor", "branch"),
    [
        # numbers
        ("Add one hundred and five. What is it?", "Add 105. What is it?"),
        ("Add one hundred and five. What is it?", "Add 100 and 5. What is it?"),
        ("Four and twenty birds. Why?", "4 and 20 birds. Why?"),
        ("He has twenty five-dollar bills. Why?", "He has twenty-five dollar bills. Why?"),
        ("What is two hundred 5?", "What is 200 5?"),
        ("Say 5 million?", "Say 5 1000000?"),
        ("He is no one. Why?", "He is no 1. Why?"),
        ("He is in room Five. Why?", "He is in room 5. Why?"),
        ("Sum 1,200,300?", "Sum 1200300?"),
        ("Add binary ten. What?", "Add binary 10. What?"),
        ("Is .5 valid JSON?", "Is 0.5 valid JSON?"),
        # units
        ("It is 5 mm long. Why?", "It is 5 Mm long. Why?"),
        ("He adds 5 ml. Why?", "He adds 5 ML. Why?"),
        ("Was it 5 AM I asked?", "Was it 5 am I asked?"),
        ("He has 6 day shifts. Why?", "He has 6 days shifts. Why?"),
        ("He has $5 million. Why?", "He has 5 dollars million. Why?"),
        ("It costs A$5. Why?", "It costs A 5 dollars. Why?"),
        ("What is 10 % 3?", "What is 10 percent 3?"),
        # contractions
        ("He can not only sing. Why?", "He cannot only sing. Why?"),
        ("He can not answer and still win. Why?", "He can't answer and still win. Why?"),
        ("He could not only sing. Why?", "He couldn't only sing. Why?"),
        ("He's gone. Why?", "He is gone. Why?"),
        # words
        ("A farm has 5 goats and 3 kids. How many animals?", "A farm has 5 goats and 3 children. How many animals?"),
        ("Is his little brother here?", "Is his small brother here?"),
        ("He took 2 bikes. Why?", "He took 2 bicycles. Why?"),
        ("3 photos and 2 photographs. Why?", "3 photographs and 2 photos. Why?"),
        ("Mom ran. Why?", "Mother ran. Why?"),
        ("He ate a chicken. Why?", "He ate chicken. Why?"),
        ("It was out of the question. Why?", "It was out of question. Why?"),
        ("He left next week. When?", "He left the next week. When?"),
        ("Is 3 a factor of 12?", "Is 3 the factor of 12?"),
        ("A boy has 5. A boy gets 3. How many has the boy?", "A boy has 5. The boy gets 3. How many has the boy?"),
        ("He lost 5 pounds a week after it. Why?", "He lost 5 pounds per week after it. Why?"),
        ("His parents, Ann, and Bob came. How many?", "His parents, Ann and Bob came. How many?"),
        ("Did he stand in total darkness?", "Did he stand in altogether darkness?"),
    ],
)
def test_what_can_be_read_in_two_ways_is_not_forgiven(donor: str, branch: str) -> None:
    assert not same_content(donor, branch).same


@pytest.mark.parametrize(
    "text",
    [
        "How many letters are in {}?",
        "Which letter does {} begin with?",
        "Sort the letters of {}. What is it?",
        "How many words: {} and he ran?",
        "Does {} rhyme with it?",
        "How do we spell {}?",
        "Translate {} into French. What is it?",
        "Does {}: red work in CSS?",
        'Why?\n"It is\n{}',
        "Why?\n'It is\n{}",
        "What does `f()` say of {}?",
        "A  B\n{}  2\nWhy?",
        "Why {}?\nif a:\n    b",
    ],
)
@pytest.mark.parametrize(("one", "other"), [("twelve", "12"), ("color", "colour"), ("doesn't", "does not")])
def test_no_spelling_is_forgiven_in_a_text_about_words_or_with_code(text: str, one: str, other: str) -> None:
    assert not same_content(text.format(one), text.format(other)).same


def test_letters_to_a_friend_are_not_letters_of_a_word() -> None:
    assert same_content("He wrote twelve letters to Ann. Why?", "He wrote 12 letters to Ann. Why?").same


def test_every_number_below_a_hundred_and_every_round_one_is_read() -> None:
    ones, tens = {v: k for k, v in wording.ONES.items()}, {v: k for k, v in wording.TENS.items()}
    for value in range(100):
        words = [ones[value]] if value < 20 else [tens[value // 10 * 10]]
        words += ["-", ones[value % 10]] if value > 20 and value % 10 else []
        assert value_of(words) == value
    assert value_of(["three", "thousand"]) == 3000
    assert [value_of(words) for words in (["hundred"], ["twenty", "five"], ["two", "hundred", "five"])] == [None] * 3


def test_no_word_of_two_spellings_stops_or_is_a_negation() -> None:
    assert not set(wording.SPELLINGS) & wording.ABOUT_WORDING
    assert not any(wording.KIND_OF_WORD.get(word) in ("NEGATION", "QUANTIFIER", "NUMBER") for word in wording.SPELLINGS)
