from __future__ import annotations

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.gate_pairs import TEMPLATES, Pair, positives, reworded
from programs.problems import load_problems
from rksc_sgl.similarity.content_guard import same_content

QUESTIONS = [problem.question for problem in load_problems("gsm8k", 60)]
PAIRS = positives(80)


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
        ("He solved 3 problems. How many?", "He answered 3 questions. How many?", "words"),
        ("How many words: he has color?", "How many words: he has colour?", "words"),
        ("Answer slowly. He has twelve. Why?", "He has 12. Why?", "words"),
    ],
)
def test_a_changed_fact_is_named(donor: str, branch: str, reason: str) -> None:
    found = same_content(donor, branch)
    assert (found.same, found.reason) == (False, reason)
    assert found.where.startswith("donor has ")
    assert same_content(branch, donor).reason == reason


@pytest.mark.parametrize(
    ("donor", "branch"),
    [
        # digits
        ("He has 5. Why?", "He has ５. Why?"),
        ("He has 5. Why?", "He has ٥. Why?"),
        ("What is 52?", "What is 5²?"),
        ("Louis IV ran. Why?", "Louis VI ran. Why?"),
        ("Louis IV ran. Why?", "Louis Ⅳ ran. Why?"),
        ("Louis IV ran. Why?", "Louis 4 ran. Why?"),
        ("Is it 1.5?", "Is it 1,5?"),
        ("Is it -5?", "Is it 5?"),
        ("Is it −5?", "Is it 5?"),
        ("Which is largest?\n-5\n-3", "Which is largest?\n- 5\n- 3"),
        ("From 10 to 15. Why?", "From 10 15. Why?"),
        ("From 10-15. Why?", "From 10 - 15. Why?"),
        ("Add 1/2. What is it?", "Add 1 2. What is it?"),
        ("Add 1/2. What is it?", "Add ½. What is it?"),
        ("Add 1 1/2. What is it?", "Add 11/2. What is it?"),
        ("Find 3 + 5!", "Find 3 + 5."),
        ("It is 4 ", "It is 4"),
        # money, dates, times
        ("It costs $5. Why?", "It costs 5$. Why?"),
        ("It costs $5. Why?", "It costs £5. Why?"),
        ("It costs $5. Why?", "It costs 5. Why?"),
        ("On 3/5/2024. Why?", "On 5/3/2024. Why?"),
        ("On 2024-03-05. Why?", "On 2024-05-03. Why?"),
        ("On May 5 he ran. Why?", "On may 5 he ran. Why?"),
        ("At 10:30. Why?", "At 10.30. Why?"),
        ("At 17:00. Why?", "At 5 PM. Why?"),
        ("At 5 AM. Why?", "At 5 PM. Why?"),
        # negation
        ("He isnt in. Why?", "He is in. Why?"),
        ("He cannot go. Why?", "He can go. Why?"),
        ("He is not unhappy. Why?", "He is unhappy. Why?"),
        ("He does not not go. Why?", "He does go. Why?"),
        ("He doesn't not go. Why?", "He doesn't go. Why?"),
        ("He won't go. Why?", "He wont go. Why?"),
        # look-alikes and what is not seen
        ("Anna ran. Why?", "Аnna ran. Why?"),
        ("Ann ran. Why?", "A\u200bnn ran. Why?"),
        ("Ann ran. Why?", "Ann\u200f ran. Why?"),
        ("Ann ran. Why?", "\ufeffAnn ran. Why?"),
        ("Ann ran. Why?", "Ann\u202e ran. Why?"),
        ("Why, é?", "Why, e\u0301?"),
        ("What is 1 2?", "What is 1\u20282?"),
        ("What is 1 2?", "What is 1\x0c2?"),
        ("What is 1 2?", "What is 1\u30002?"),
        ("", " "),
        ("", "\n"),
        # lists, tables, code, quotations
        ("1. Tom\n2. Ann\nWho is first?", "2. Tom\n1. Ann\nWho is first?"),
        ("1. Tom\n2. Ann\nWho?", "a. Tom\nb. Ann\nWho?"),
        ("- Tom\n- Ann\nWho?", "Tom\nAnn\nWho?"),
        ("Apples 5\nPears 3\nWhy?", "Apples 5. Pears 3\nWhy?"),
        ("A B C\n1   3\nWhich?", "A B C\n1 3\nWhich?"),
        ("|a|b|\n|1|2|\nWhich?", "|a|b|\n|2|1|\nWhich?"),
        ("Why?\nif a:\n b\n c", "Why?\nif a:\n b\nc"),
        ("Why?\nif a:\n\tb", "Why?\nif a:\n    b"),
        ("Why is a = = b?", "Why is a == b?"),
        ("Why x = *p?", "Why x = * p?"),
        ("Why?\n```\nprint(“a”)\n```", 'Why?\n```\nprint("a")\n```'),
        ("Why is it “e”?", 'Why is it "e"?'),
        ('Who said "in total"?', 'Who said "altogether"?'),
        ('Who said "I can\'t\ngo"?', 'Who said "I cannot\ngo"?'),
        ("Which sign is −?", "Which sign is -?"),
        ("Will ran. Why?", "will ran. Why?"),
    ],
)
def test_what_looks_alike_but_is_not_the_same_is_refused(donor: str, branch: str) -> None:
    assert not same_content(donor, branch).same
    assert not same_content(branch, donor).same


WORDS = "Tom Ann gave sold 5 12 apples the not more $ - , . ? two twenty half per ' ( ` km"
words = st.sampled_from([*WORDS.split(), '"', "\n", "Think step by step.", "<|im_start|>user\n", "<|im_end|>"])
texts = st.lists(words, min_size=1, max_size=14).map(" ".join)
prompts = st.one_of(
    st.sampled_from(QUESTIONS),
    st.builds(
        lambda template, question: template.format(question=question), *map(st.sampled_from, (TEMPLATES, QUESTIONS))
    ),
    st.sampled_from(PAIRS).map(lambda pair: pair.branch),
)
three_alike = st.tuples(st.sampled_from(QUESTIONS[:20]), st.randoms()).map(
    lambda drawn: [drawn[1].choice(TEMPLATES).format(question=reworded(*drawn)) for _ in range(3)]
)


@settings(deadline=None)  # a busy machine fails no comparison
@given(texts, texts)
def test_the_comparison_is_symmetric_and_always_explained(donor: str, branch: str) -> None:
    found, reverse = same_content(donor, branch), same_content(branch, donor)
    assert (found.same, found.reason) == (reverse.same, reverse.reason)
    assert found.same == (found.reason == "") == (found.where == "")
    assert same_content(donor, donor).same


@settings(deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_can_be_compared(donor: str, branch: str) -> None:
    assert same_content(donor, donor).same
    assert same_content(donor, branch).same == same_content(branch, donor).same


@settings(deadline=None)
@given(three_alike)
def test_what_is_the_same_as_a_third_is_the_same(three: list[str]) -> None:
    first, second, third = three
    assume(same_content(first, second).same and same_content(second, third).same)  # hypothesis fails if this is rare
    assert same_content(first, third).same


@settings(deadline=None)
@given(texts, st.integers(0, 99), st.integers(0, 99))
def test_another_number_is_never_the_same(text: str, one: int, other: int) -> None:
    assert same_content(f"{text} x {one} y?", f"{text} x {other} y?").same == (one == other)


@settings(deadline=None)
@given(prompts, st.data())
def test_one_changed_digit_anywhere_is_refused(text: str, data: st.DataObject) -> None:
    place = data.draw(st.sampled_from([match.start() for match in re.finditer(r"\d", text)] or [None]))
    if place is not None:
        digit = data.draw(st.sampled_from([one for one in "0123456789" if one != text[place]]))
        assert not same_content(text, text[:place] + digit + text[place + 1 :]).same


@settings(deadline=None)
@given(prompts, st.data())
def test_one_inserted_negation_anywhere_is_refused(text: str, data: st.DataObject) -> None:
    place = data.draw(st.sampled_from([match.start() for match in re.finditer(r" ", text)]))
    negation = data.draw(st.sampled_from([" not", " never", " no", "n't", " cannot", " without"]))
    assert not same_content(text, text[:place] + negation + text[place:]).same


@settings(deadline=None)
@given(prompts, st.data())
def test_one_inserted_character_that_nobody_sees_is_refused(text: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(text)))
    unseen = data.draw(st.sampled_from("\u200b\u200d\u200f\u202e\u2060\ufeff\u00ad\u00a0\u2009\u3000\x0b"))
    assert not same_content(text, text[:place] + unseen + text[place:]).same


@settings(deadline=None)
@given(prompts, st.data())
def test_two_exchanged_words_are_refused(text: str, data: st.DataObject) -> None:
    pairs = [match for match in re.finditer(r"\b([a-z]+) ([a-z]+)\b", text) if match[1] != match[2]]
    match = data.draw(st.sampled_from(pairs))
    assert not same_content(text, f"{text[: match.start()]}{match[2]} {match[1]}{text[match.end() :]}").same


@settings(deadline=None)
@given(st.sampled_from(PAIRS), st.integers(1, 9))
def test_a_pair_with_one_more_fact_on_one_side_is_refused(pair: Pair, count: int) -> None:
    more = re.sub(r"(?<=[.?])\s+(?=[A-Z])", f" Zoe has {count} pins. ", pair.branch, count=1)
    assert more != pair.branch
    assert not same_content(pair.donor, more).same
