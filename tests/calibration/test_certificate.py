"""Splitting, storing and certifying traces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from rksc_sgl.calibration.certificate import certificate, split_forks
from rksc_sgl.calibration.thresholds import SkipOutcomes
from rksc_sgl.calibration.trace_store import ForkRecord, TraceStore, as_traces
from rksc_sgl.errors import OptionError

DESCRIPTION = {"model": "m", "layers": [2, 4]}


def record(seed: int, branches: int = 4, noise: float = 0.05) -> ForkRecord:
    """The margin is three times the first hidden unit, with noise that fades with depth."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(branches, 2, 8)).astype(np.float32)
    margin = 3.0 * hidden[:, 1, 0].astype(np.float64)
    hidden[:, 0, 0] = hidden[:, 1, 0] + 10 * noise * rng.normal(size=branches)
    hidden[:, 1, 0] += noise * rng.normal(size=branches)
    return ForkRecord(hidden, margin, rng.uniform(0.6, 1.0, branches), tuple("abcd"[:branches]), "family")


def test_records_come_back_as_they_were_put(tmp_path: Path) -> None:
    store = TraceStore(tmp_path / "s", DESCRIPTION)
    assert not store.has(3)
    store.put(3, record(1))
    again = TraceStore(tmp_path / "s", DESCRIPTION)
    assert again.has(3)
    found, put = again.get(3), record(1)
    np.testing.assert_array_equal(found.hidden, put.hidden)
    np.testing.assert_array_equal(found.margin, put.margin)
    assert (found.answers, found.family) == (put.answers, put.family)


def test_a_directory_of_another_workload_is_refused_with_what_differs(tmp_path: Path) -> None:
    TraceStore(tmp_path, DESCRIPTION)
    with pytest.raises(OptionError, match="other layers"):
        TraceStore(tmp_path, {**DESCRIPTION, "layers": [2]})


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    store = TraceStore(tmp_path, DESCRIPTION)
    store.put(0, record(1))
    file = tmp_path / "fork-000000.npz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(OptionError, match="fork-000000"):
        store.get(0)


def test_every_fork_is_on_one_side_of_the_split() -> None:
    split = split_forks(101, seed=5)
    assert (split.fit.astype(int) + split.certify + split.test == 1).all()
    assert split.certify.sum() == pytest.approx(50, abs=1)
    assert (split.fit == split_forks(101, seed=5).fit).all()
    with pytest.raises(OptionError, match="forks"):
        split_forks(19)


def test_a_signal_is_certified_and_holds_on_forks_that_were_not_used() -> None:
    records = [record(seed) for seed in range(900)]
    traces = as_traces(records, (2, 4), 10)
    assert (traces.group == np.repeat(np.arange(900), 4)).all()
    skip = SkipOutcomes(np.ones(900), np.zeros(900, dtype=np.bool_))
    found = certificate(traces, skip, (0.02, 0.05), 0.05)
    assert found.r2[4] > found.r2[2] > 0.7
    assert [(point.scope, point.risk) for point in found.points] == [
        (scope, risk) for scope in ("verdict", "selection") for risk in (0.02, 0.05)
    ]
    assert all(point.layers_fraction < 1.0 for point in found.points)
    for point, test in zip(found.points, found.test, strict=True):
        assert test.flips / test.calls <= point.risk
        assert test.calls == 135 * 4
        bound = binomtest(test.flips, test.calls).proportion_ci(0.90, "exact").high  # both sides of 90%: one of 95%
        assert test.flip_upper95 == pytest.approx(bound) and bound > test.flips / test.calls
    assert found.skip_points[0].agreement == 1.0  # skipping never differed, and no fork agreed less


def test_noise_certifies_nothing_that_exits() -> None:
    rng = np.random.default_rng(0)
    records = [
        ForkRecord(one.hidden, rng.normal(size=4), one.confidence, one.answers, one.family)
        for one in (record(seed) for seed in range(300))
    ]
    skip = SkipOutcomes(np.ones(300), np.ones(300, dtype=np.bool_))
    found = certificate(as_traces(records, (2, 4), 10), skip, (0.05,), 0.05)
    assert all(point.layers_fraction == 1.0 for point in found.points)
    assert found.skip_points == ()
