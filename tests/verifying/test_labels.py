from __future__ import annotations

import math

import pytest

from rksc_sgl.errors import LabelError, OptionError
from rksc_sgl.verifying.labels import resolve_labels, spellings


def by_words(text: str) -> list[int]:
    """A tokenizer with one token for each text."""
    return [sum(ord(character) << (7 * place) for place, character in enumerate(text)) % 100_003]


def by_letters(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_every_spelling_counts_once() -> None:
    found = resolve_labels(["YES", "NO"], by_words)
    assert len(found.ids[0]) == len(spellings("YES")) == 6
    assert not set(found.ids[0]) & set(found.ids[1])


def test_a_label_of_several_tokens_counts_by_its_first() -> None:
    found = resolve_labels(["YES", "NO"], by_letters)
    assert set(found.ids[0]) == {ord("Y"), ord("y")}  # a leading space begins both labels, so it says nothing
    assert set(found.ids[1]) == {ord("N"), ord("n")}


def test_labels_that_begin_alike_are_refused() -> None:
    with pytest.raises(LabelError, match="cannot be told from the others"):
        resolve_labels(["true", "two"], by_letters)


@pytest.mark.parametrize("labels", [["YES"], ["YES", ""], ["yes", "YES"], []])
def test_labels_that_make_no_choice_are_refused(labels: list[str]) -> None:
    with pytest.raises(OptionError, match="labels"):
        resolve_labels(labels, by_words)


def test_probabilities_are_of_the_labels_and_add_up() -> None:
    found = resolve_labels(["YES", "NO"], by_letters)
    logprobs = dict.fromkeys(found.all_ids, math.log(0.1))
    logprobs[ord("Y")] = math.log(0.5)
    yes, no = found.probabilities(logprobs)
    assert yes == pytest.approx(0.6 / 0.8)
    assert yes + no == pytest.approx(1.0)


def test_the_mass_of_labels_is_what_the_model_would_say_of_them_at_all() -> None:
    found = resolve_labels(["YES", "NO"], by_letters)
    logprobs = dict.fromkeys(found.all_ids, math.log(0.0001))
    assert found.probabilities(logprobs) == pytest.approx((0.5, 0.5))
    assert found.mass(logprobs) == pytest.approx(0.0004)
    assert found.mass({**logprobs, ord("Y"): 0.0}) == 1.0


def test_missing_or_impossible_label_tokens_are_an_error() -> None:
    found = resolve_labels(["YES", "NO"], by_letters)
    with pytest.raises(LabelError, match="no logprob"):
        found.probabilities({ord("Y"): -1.0})
    with pytest.raises(LabelError, match="no finite"):
        found.probabilities(dict.fromkeys(found.all_ids, float("-inf")))
