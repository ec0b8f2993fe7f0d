"""Which forks and donors are remembered, and when blending is worth it."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.radix.forks import LEAST_TOKENS, MOST_DONORS, Donor, ForkKey, ForkTable, worth_blending


def key(group: str = "g", extra: str | None = None, salt: str | None = None, lora: str | None = None) -> ForkKey:
    return ForkKey(group, extra, salt, lora)


def donor(name: str, tokens: int = 10) -> Donor:
    return Donor(name, np.arange(tokens))


def test_forks_of_other_namespaces_are_other_forks() -> None:
    table: ForkTable[str] = ForkTable()
    table.fork(key()).anchor = "a"
    others = [key("h"), key(extra="e"), key(salt="s"), key(lora="l")]
    assert [table.fork(one).anchor for one in others] == [None] * 4
    assert table.fork(key()).anchor == "a"


def test_the_oldest_donors_of_a_fork_are_forgotten_first() -> None:
    table: ForkTable[str] = ForkTable()
    for index in range(MOST_DONORS + 2):
        table.add_donor(key(), donor(str(index), 10 + index))
    assert [one.name for one in table.fork(key()).donors] == [str(index) for index in range(2, MOST_DONORS + 2)]
    assert table.tokens == sum(10 + index for index in range(2, MOST_DONORS + 2))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 60)), max_size=60))
def test_memory_stays_within_its_bounds_and_the_count_is_true(steps: list[tuple[str, int]]) -> None:
    table: ForkTable[str] = ForkTable(most_tokens=150, most_forks=3)
    for group, tokens in steps:
        table.add_donor(key(group), donor("d", tokens))
        known = [table._forks[one] for one in table._forks]
        assert table.tokens == sum(one.tokens.size for fork in known for one in fork.donors)
        assert len(table) <= 3
        assert table.tokens <= 150 or len(table) == 1
        assert table._forks[key(group)].donors, "what was just added is there"


@settings(deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.5))
def test_blending_is_worth_it_only_where_it_computes_less(n: int, c: float, a: float, probe: float) -> None:
    cached, aligned = int(c * n), int(a * n)
    if worth_blending(n, cached, aligned, probe):
        assert n - cached >= LEAST_TOKENS
        assert n * probe + (n - aligned) * (1 - probe) < n - cached
    assert not worth_blending(n, n, n, probe)
    assert not worth_blending(n, 0, 0, probe)
