"""Which forks and donors are remembered."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.donors.forks import MOST_DONORS, Anchor, Donor, ForkKey, ForkTable


def key(group: str = "g", extra: str | None = None, salt: str | None = None, lora: str | None = None) -> ForkKey:
    return ForkKey(group, extra, salt, lora)


def donor(name: str, tokens: int = 10) -> Donor:
    return Donor(name, np.arange(tokens))


def test_forks_of_other_namespaces_are_other_forks() -> None:
    table: ForkTable[str] = ForkTable()
    anchor = table.fork(key()).anchor = Anchor("a", donor("a"))
    others = [key("h"), key(extra="e"), key(salt="s"), key(lora="l")]
    assert [table.fork(one).anchor for one in others] == [None] * 4
    assert table.fork(key()).anchor is anchor


def test_the_oldest_donors_of_a_fork_are_forgotten_first() -> None:
    table: ForkTable[str] = ForkTable()
    for index in range(MOST_DONORS + 2):
        table.add_donor(key(), donor(str(index), 10 + index))
    assert [one.name for one in table.fork(key()).donors] == [str(index) for index in range(2, MOST_DONORS + 2)]
    assert table.tokens == sum(10 + index for index in range(2, MOST_DONORS + 2))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 60)), max_size=60))
def test_memory_stays_within_its_bounds_and_the_count_is_right(steps: list[tuple[str, int]]) -> None:
    table: ForkTable[str] = ForkTable(most_tokens=150, most_forks=3)
    for group, tokens in steps:
        table.add_donor(key(group), donor("d", tokens))
        known = [table._forks[one] for one in table._forks]
        assert table.tokens == sum(one.tokens.size for fork in known for one in fork.donors)
        assert len(table) <= 3
        assert table.tokens <= 150 or len(table) == 1
        assert table._forks[key(group)].donors, "what was just added is there"
