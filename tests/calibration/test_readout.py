from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.calibration.readout import fit_readout, fit_readouts, r2
from rksc_sgl.early_exit.readout import LinearReadout
from rksc_sgl.errors import OptionError


def linear_traces(n: int, hidden: int, noise: float, seed: int = 0, rank: int = 12):
    """Hidden states of a few strong directions and much noise; the margin is linear in the strong ones."""
    fixed = np.random.default_rng(99)
    directions, direction = fixed.normal(size=(rank, hidden)), fixed.normal(size=rank)
    offset, spread = fixed.normal(size=hidden) * 50, np.exp(fixed.normal(size=hidden))
    random = np.random.default_rng(seed)
    latent = random.normal(size=(n, rank))
    states = (latent @ directions + 0.1 * random.normal(size=(n, hidden))) * spread + offset
    return states.astype(np.float32), 3.0 + latent @ direction + noise * random.normal(size=n)


@pytest.mark.parametrize(("n", "hidden"), [(150, 576), (60, 576), (576, 576), (800, 64)])
def test_a_linear_margin_is_read_with_fewer_and_with_more_traces_than_units(n: int, hidden: int) -> None:
    fitted = fit_readout(*linear_traces(n, hidden, noise=0.2, seed=1))
    states, margin = linear_traces(500, hidden, noise=0.2, seed=2)
    assert r2(fitted.predict(states), margin) > 0.95
    assert fitted.weight.shape == (hidden,) and fitted.weight.dtype == np.float32


@pytest.mark.parametrize(("n", "hidden"), [(150, 576), (800, 64)])
def test_the_scale_is_the_error_on_traces_that_the_fit_never_saw(n: int, hidden: int) -> None:
    fitted = fit_readout(*linear_traces(n, hidden, noise=0.5, seed=3))
    states, margin = linear_traces(2000, hidden, noise=0.5, seed=4)
    assert fitted.scale == pytest.approx(float((fitted.predict(states) - margin).std()), rel=0.2)


def test_a_margin_that_the_states_say_nothing_about_is_read_as_its_mean() -> None:
    states, _ = linear_traces(200, 576, noise=0.0, seed=5)
    margin = np.random.default_rng(6).normal(2.0, 1.0, 200)
    fitted = fit_readout(states, margin)
    fresh, _ = linear_traces(1000, 576, noise=0.0, seed=7)
    predicted = fitted.predict(fresh)
    assert float(predicted.mean()) == pytest.approx(2.0, abs=0.3)
    assert float(predicted.std()) < 0.5
    assert fitted.scale > 0.8


@settings(max_examples=15, deadline=None)
@given(st.floats(0.01, 1000), st.floats(-100, 100))
def test_units_and_offsets_of_the_states_do_not_matter(factor: float, offset: float) -> None:
    states, margin = linear_traces(80, 32, noise=0.3, seed=8)
    moved = (states.astype(np.float64) * factor + offset).astype(np.float32)
    original, other = fit_readout(states, margin), fit_readout(moved, margin)
    np.testing.assert_allclose(other.predict(moved), original.predict(states), atol=0.05)


def test_a_constant_unit_and_copies_of_a_trace_do_no_harm() -> None:
    states, margin = linear_traces(40, 64, noise=0.1, seed=9)
    states[:, 0] = 1234.5
    fitted = fit_readout(np.repeat(states, 3, axis=0), np.repeat(margin, 3))
    assert fitted.weight[0] == 0.0
    assert r2(fitted.predict(states), margin) > 0.9


def test_margins_that_are_all_the_same_are_predicted_exactly() -> None:
    states, _ = linear_traces(20, 16, noise=0.0)
    fitted = fit_readout(states, np.full(20, -1.5))
    np.testing.assert_allclose(fitted.predict(states), -1.5, rtol=1e-6)
    assert fitted.scale == pytest.approx(0.0, abs=1e-9)


def test_each_layer_has_a_readout_of_its_own() -> None:
    states, margin = linear_traces(100, 32, noise=0.1, seed=10)
    noise = np.random.default_rng(11).normal(size=states.shape).astype(np.float32)
    fitted = fit_readouts(np.stack([noise, states], axis=1), margin, (3, 7))
    assert list(fitted) == [3, 7]
    assert fitted[7] == fit_readout(states, margin) and fitted[7].scale < fitted[3].scale


def test_r2_is_one_for_the_truth_and_zero_for_its_mean() -> None:
    margin = np.array([1.0, 2.0, 4.0])
    assert r2(margin, margin) == 1.0
    assert r2(np.full(3, margin.mean()), margin) == pytest.approx(0.0)


def test_what_cannot_be_fitted_is_refused_by_name() -> None:
    states, margin = linear_traces(20, 16, noise=0.1)
    broken = states.copy()
    broken[3, 4] = np.nan
    infinite = margin.copy()
    infinite[2] = np.inf
    for arguments, named in (
        ((broken, margin), "hidden: must be finite, got 1"),
        ((states, infinite), "margin: must be finite, got 1"),
        ((states, margin[:-1]), "margin: must be"),
        ((states[0], margin), "hidden: must be"),
        ((states[:5], margin[:5]), "at least 8"),
    ):
        with pytest.raises(OptionError, match=named):
            fit_readout(*arguments)
    with pytest.raises(OptionError, match="hidden: must be"):
        fit_readouts(states[:, None], margin, (1, 2))
    with pytest.raises(OptionError, match="not be the same"):
        r2(np.ones(3), np.ones(3))


def test_a_readout_that_is_not_finite_is_refused() -> None:
    with pytest.raises(OptionError, match="finite"):
        LinearReadout(np.array([np.nan], dtype=np.float32), 0.0, 1.0)
    with pytest.raises(OptionError, match="scale"):
        LinearReadout(np.zeros(1, dtype=np.float32), 0.0, -1.0)
    with pytest.raises(OptionError, match="float32"):
        LinearReadout(np.zeros(1), 0.0, 1.0)  # type: ignore[arg-type]
