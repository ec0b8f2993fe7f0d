"""What the benchmark of forks under memory pressure makes of what it measured."""

from __future__ import annotations

import json

import pytest

from benchmarks import pressure
from benchmarks.pressure import Run, Size, prompt_of, summary


def run(seconds: float, computed: int, first_token_s: float = 1.0) -> Run:
    return Run(seconds, [computed // 2] * 2, [computed // 4, computed // 4], [first_token_s] * 100)


def test_slowdown_is_against_the_largest_pool_and_twice_is_what_was_computed_beyond_it() -> None:
    runs = {
        "rksc": {1.4: run(30.0, 1000), 0.9: run(33.0, 1000), 0.6: run(39.0, 1040, 2.0)},
        "stock": {1.4: run(30.0, 1000), 0.9: run(45.0, 2000), 0.6: run(90.0, 4000, 4.0)},
    }
    found = summary([1.4, 0.9, 0.6], runs, Size(forks=2))
    assert found["slowdown"] == 1.3
    assert found["slowdown_at_0_9"] == 1.1
    assert found["stock_slowdown"] == 3.0
    assert found["computed_twice_fraction"] == pytest.approx(60 / 1560, abs=1e-3)
    assert found["stock_computed_twice_fraction"] == pytest.approx(4500 / 6000, abs=1e-3)
    assert found["plain_p99_ratio_vs_stock"] == 0.5
    json.dumps(found)


def test_no_two_prompts_begin_alike() -> None:
    size = Size()
    assert len({prompt_of(fork, size)[:12] for fork in range(20)}) == 20
    assert prompt_of(3, size) == prompt_of(3, size)


def test_quick_is_the_largest_and_the_smallest_pool() -> None:
    assert pressure._parse(["--quick"]).pools == [1.4, 0.6]
