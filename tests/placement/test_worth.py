"""When sharing pays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.donors.forks import Namespace
from rksc_sgl.errors import OptionError
from rksc_sgl.options import RequestOptions
from rksc_sgl.placement.values import Branch
from rksc_sgl.placement.worth import (
    LEAST_TOKENS,
    PassCost,
    faster_blending,
    learns,
    pass_tokens,
    worth_blending,
    worth_waiting,
)


@settings(deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.5))
def test_blending_is_worth_it_only_where_it_computes_less(n: int, c: float, a: float, probe: float) -> None:
    cached, aligned = int(c * n), int(a * n)
    if worth_blending(n, cached, aligned, probe):
        assert n - cached >= LEAST_TOKENS
        assert n * probe + (n - aligned) * (1 - probe) < n - cached
    assert not worth_blending(n, n, n, probe)
    assert not worth_blending(n, 0, 0, probe)


def test_a_merge_must_save_more_than_a_step() -> None:
    def little_left(size: int, exact: int, blended: int = 0) -> bool:
        return Branch(RequestOptions(), np.arange(size), Namespace(None, None, None), exact, blended).little_left

    assert not little_left(LEAST_TOKENS, 0) and not little_left(500, 500 - LEAST_TOKENS)
    assert little_left(500, 501 - LEAST_TOKENS) and little_left(500, 0, 501 - LEAST_TOKENS)


def test_a_wait_pays_when_what_all_siblings_save_outweighs_a_pass() -> None:
    assert worth_waiting(10, siblings=7, pass_tokens=64) and not worth_waiting(9, siblings=7, pass_tokens=64)
    assert worth_waiting(64, siblings=1, pass_tokens=64)
    assert not worth_waiting(0, siblings=9, pass_tokens=0) and not worth_waiting(-5, siblings=9, pass_tokens=1)


def test_what_a_pass_costs_is_known_by_device_or_said_by_the_operator() -> None:
    assert pass_tokens("cpu", {}) < pass_tokens("cuda", {}) == pass_tokens("another accelerator", {})
    assert pass_tokens("cpu", {"RKSC_PASS_TOKENS": "7"}) == 7
    assert pass_tokens("cpu", {"RKSC_PASS_TOKENS": "learn"}) == pass_tokens("cpu", {})
    for wrong in ("-1", "many", "1.5", ""):
        with pytest.raises(OptionError, match="RKSC_PASS_TOKENS"):
            pass_tokens("cpu", {"RKSC_PASS_TOKENS": wrong})


def test_it_is_learned_on_a_gpu_unless_a_number_is_given_and_on_a_cpu_where_that_is_asked_for() -> None:
    assert learns("cuda", {}) and not learns("cpu", {}) and not learns("xpu", {})
    assert learns("cpu", {"RKSC_PASS_TOKENS": "learn"}) and not learns("cuda", {"RKSC_PASS_TOKENS": "7"})


def test_a_pass_that_is_bound_by_launches_takes_as_long_whatever_it_computes() -> None:
    gpu, cpu = PassCost.on("cuda", {"RKSC_PASS_TOKENS": "1000"}), PassCost.on("cpu", {"RKSC_PASS_TOKENS": "1000"})
    assert (gpu.of(1), gpu.of(999), gpu.of(4000)) == (1000, 1000, 4000)
    assert (cpu.of(1), cpu.of(4000)) == (1001, 5000)


@settings(deadline=None)
@given(st.integers(64, 5000), st.floats(0, 1), st.integers(0, 4000), st.integers(1, 8))
def test_what_is_worth_it_by_tokens_is_faster_on_a_cpu_and_on_a_gpu_above_what_a_pass_costs(
    n: int, a: float, tokens: int, siblings: int
) -> None:
    aligned, gpu = int(a * n), PassCost(tokens, overlaps=True)
    if worth_blending(n, 0, aligned, 0.1):
        assert faster_blending(n, 0, aligned, 0.1, PassCost(28), siblings)
        assert faster_blending(n, 0, aligned, 0.1, gpu, siblings) == (0.95 * (siblings * n) >= tokens)
    if siblings * n <= tokens:
        assert not faster_blending(n, 0, n, 0.1, gpu, siblings)
