from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rksc_sgl.proof.divergence import divergence


@st.composite
def distributions(draw: st.DrawFn) -> dict[int, float]:
    weights = draw(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=8))
    reported = draw(st.integers(1, len(weights)))
    return {token: math.log(weight / sum(weights)) for token, weight in enumerate(weights[:reported])}


@given(distributions())
def test_a_distribution_does_not_differ_from_itself(one: dict[int, float]) -> None:
    assert divergence(one, one) == pytest.approx(0.0, abs=1e-12)


@given(distributions(), distributions())
def test_it_is_never_negative_and_always_finite(one: dict[int, float], other: dict[int, float]) -> None:
    assert 0.0 <= divergence(one, other) < math.inf


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_two_outcomes_give_the_formula(p: float, q: float) -> None:
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert divergence({1: math.log(p)}, {1: math.log(q)}) == pytest.approx(max(0.0, expected), abs=1e-9)


def test_answers_with_no_token_in_common_are_far_apart() -> None:
    assert divergence({1: math.log(0.9)}, {2: math.log(0.9)}) > 1.5


def test_tokens_that_only_one_reports_count_no_more_than_they_must() -> None:
    exact = {1: math.log(0.9), 2: math.log(0.04)}
    assert divergence(exact, {1: math.log(0.9), 3: math.log(0.03)}) == pytest.approx(0.0, abs=0.03)
    assert divergence(exact, {1: math.log(0.9)}) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("other", [{}, {1: math.nan}, {1: math.log(0.9), 2: math.inf}])
def test_an_answer_that_reports_no_probabilities_is_infinitely_far(other: dict[int, float]) -> None:
    assert divergence({1: math.log(0.9)}, other) == math.inf


def test_another_favourite_differs_more_than_another_confidence() -> None:
    exact = {4: math.log(0.9), 7: math.log(0.05)}
    surer = {4: math.log(0.92), 7: math.log(0.03)}
    turned = {4: math.log(0.05), 7: math.log(0.9)}
    assert divergence(exact, surer) < 0.02 < 2.0 < divergence(exact, turned)
