from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rksc_sgl.calibration.risk_control import (
    clopper_pearson_p,
    clopper_pearson_upper,
    fixed_sequence,
    hoeffding_bentkus_p,
)
from rksc_sgl.errors import OptionError

ALPHA = 0.1
TRIALS = 20_000
counts = st.integers(1, 3000)
shares = st.floats(0.001, 0.999)


def allowed(trials: int = TRIALS) -> float:
    """alpha and three standard deviations of a rate that is alpha."""
    return ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / trials)


@given(counts, shares, st.floats(0, 1), st.floats(0, 1))
def test_hoeffding_bentkus_is_a_probability_that_grows_with_the_loss(n: int, risk: float, a: float, b: float) -> None:
    low, high = (hoeffding_bentkus_p(loss, n, risk) for loss in sorted((a, b)))
    assert 0.0 <= low <= high + 1e-12 <= 1.0 + 1e-9


@given(counts, shares)
def test_a_risk_at_the_bound_is_never_rejected_by_hoeffding_bentkus(n: int, risk: float) -> None:
    assert hoeffding_bentkus_p(risk, n, risk) == 1.0


@given(counts, shares)
def test_without_a_loss_both_p_values_are_the_chance_of_no_error_at_the_bound(n: int, risk: float) -> None:
    assert hoeffding_bentkus_p(0.0, n, risk) == pytest.approx((1 - risk) ** n, rel=1e-6, abs=1e-300)
    assert clopper_pearson_p(0, n, risk) == pytest.approx((1 - risk) ** n, rel=1e-6, abs=1e-300)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.001, 0.3))
def test_the_exact_p_value_is_the_binomial_sum(drawn: tuple[int, int], risk: float) -> None:
    errors, n = drawn
    summed = sum(math.comb(n, k) * risk**k * (1 - risk) ** (n - k) for k in range(errors + 1))
    assert clopper_pearson_p(errors, n, risk) == pytest.approx(summed, rel=1e-8)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_the_upper_bound_is_the_rate_whose_p_value_is_what_confidence_leaves(
    drawn: tuple[int, int], confidence: float
) -> None:
    errors, n = drawn
    upper = clopper_pearson_upper(errors, n, confidence)
    assert errors / n <= upper <= 1.0
    if errors < n:
        assert clopper_pearson_p(errors, n, upper) == pytest.approx(1 - confidence, rel=1e-6)


def test_known_values_of_the_upper_bound() -> None:
    assert clopper_pearson_upper(0, 299) == pytest.approx(1 - 0.05 ** (1 / 299))
    assert clopper_pearson_upper(5, 5) == 1.0
    assert clopper_pearson_upper(6, 1616) == pytest.approx(0.0073, abs=1e-4)


@given(st.lists(st.floats(0, 1)), st.floats(0.001, 0.999))
def test_a_sequence_stops_at_its_first_failure(p_values: list[float], alpha: float) -> None:
    rejected = fixed_sequence(p_values, alpha)
    assert all(p_value <= alpha for p_value in p_values[:rejected])
    assert rejected == len(p_values) or p_values[rejected] > alpha


def test_a_p_value_that_is_not_a_number_rejects_nothing() -> None:
    assert fixed_sequence([0.01, float("nan"), 0.0], 0.1) == 1


@pytest.mark.parametrize(("n", "risk"), [(100, 0.05), (700, 0.01), (40, 0.3)])
def test_exact_tests_of_a_risk_at_the_bound_reject_at_most_alpha_of_the_time(n: int, risk: float) -> None:
    errors = np.random.default_rng(1).binomial(n, risk, TRIALS)
    table = np.array([clopper_pearson_p(count, n, risk) for count in range(n + 1)])
    rejected = float((table[errors] <= ALPHA).mean())
    assert 0.0 < rejected <= allowed()


@pytest.mark.parametrize("together", [True, False], ids=["calls of a group fall together", "calls fall alone"])
def test_group_means_at_the_bound_are_rejected_at_most_alpha_of_the_time(together: bool) -> None:
    groups, size, risk, trials = 400, 8, 0.05, 4000
    random = np.random.default_rng(2)
    if together:
        means = random.binomial(groups, risk, trials) / groups
    else:
        means = random.binomial(groups * size, risk, trials) / (groups * size)
    rejected = np.mean([hoeffding_bentkus_p(float(mean), groups, risk) <= ALPHA for mean in means])
    assert rejected <= allowed(trials)


def test_no_setting_above_the_bound_is_rejected_more_often_than_alpha_in_a_whole_sequence() -> None:
    """Losses grow along the sequence; from the fourth setting on the risk is exactly at the bound or above."""
    n, risk, trials = 300, 0.04, 4000
    rates = [0.0, 0.005, 0.01, risk, 0.045, 0.05]
    draws = np.random.default_rng(3).random((trials, n))
    table = np.array([clopper_pearson_p(count, n, risk) for count in range(n + 1)])
    errors = np.stack([(draws < rate).sum(axis=1) for rate in rates], axis=1)
    wrong = np.mean([fixed_sequence(table[row], ALPHA) > 3 for row in errors])
    assert 0.0 < wrong <= allowed(trials)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: hoeffding_bentkus_p(1.5, 10, 0.1), "mean_loss"),
        (lambda: hoeffding_bentkus_p(float("nan"), 10, 0.1), "mean_loss"),
        (lambda: hoeffding_bentkus_p(0.5, 0, 0.1), "n: must"),
        (lambda: hoeffding_bentkus_p(0.5, 10, 1.0), "risk"),
        (lambda: clopper_pearson_p(11, 10, 0.1), "errors"),
        (lambda: clopper_pearson_p(-1, 10, 0.1), "errors"),
        (lambda: clopper_pearson_upper(1, 10, 0.0), "confidence"),
        (lambda: fixed_sequence([0.1], 0), "alpha"),
    ],
)
def test_an_argument_out_of_range_is_refused_by_name(call, named: str) -> None:
    with pytest.raises(OptionError, match=named):
        call()
