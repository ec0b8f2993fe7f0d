"""Who was merged with whom: found by the beginning of a prompt, bounded, and gone with the donor."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.donors.forks import (
    MOST_ALIASES,
    MOST_DONORS,
    Alias,
    Donor,
    ForkKey,
    ForkTable,
)

KEY = ForkKey("g", None, None, None)


def tokens(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_the_longest_alias_that_a_prompt_begins_with_is_followed() -> None:
    table: ForkTable[str] = ForkTable()
    donor = table.add_donor(KEY, Donor("d", tokens(9, 9)))
    for name, own in (("short", (1, 2)), ("long", (1, 2, 3)), ("other", (1, 5))):
        table.add_alias(KEY, Alias(name, tokens(*own), donor, 0.9))
    found = table.alias_of(KEY, tokens(1, 2, 3, 4))
    assert found is not None and found.name == "long" and found.canonical is donor
    assert table.alias_of(KEY, tokens(1, 2)).name == "short"
    assert table.alias_of(KEY, tokens(1)) is None
    assert table.alias_of(KEY._replace(extra_key="e"), tokens(1, 2, 3)) is None


def test_an_alias_is_gone_with_its_donor_and_with_its_fork() -> None:
    table: ForkTable[str] = ForkTable(most_forks=1)
    donor = table.add_donor(KEY, Donor("d", tokens(9, 9)))
    table.add_alias(KEY, Alias("a", tokens(1, 2, 3), donor, 0.9))
    assert table.tokens == 5 and [alias.name for _, alias in table.aliases()] == ["a"]
    table.drop_donor(KEY, donor)
    assert table.tokens == 0 and not list(table.aliases())
    table.add_alias(KEY, Alias("a", tokens(1, 2, 3), donor, 0.9))
    assert [one for _, one in table.donors()] == [donor]
    table.fork(KEY._replace(group="h"))
    assert table.tokens == 0 and not list(table.aliases()) and not list(table.donors())


def test_a_donor_that_is_pushed_out_takes_its_aliases_along() -> None:
    table: ForkTable[str] = ForkTable()
    first = table.add_donor(KEY, Donor("first", tokens(0)))
    table.add_alias(KEY, Alias("a", tokens(1, 2), first, 0.9))
    for index in range(MOST_DONORS):
        table.add_donor(KEY, Donor(str(index), tokens(10 + index)))
    assert not list(table.aliases())
    assert table.tokens == MOST_DONORS


def test_the_same_prompt_is_one_donor_and_one_alias() -> None:
    table: ForkTable[str] = ForkTable()
    first = table.add_donor(KEY, Donor("first", tokens(1, 2)))
    assert table.add_donor(KEY, Donor("second", tokens(1, 2))) is first
    table.add_alias(KEY, Alias("a", tokens(5, 6), Donor("third", tokens(1, 2)), 0.8))
    table.add_alias(KEY, Alias("b", tokens(5, 6), first, 0.9))
    assert [(alias.name, alias.canonical) for _, alias in table.aliases()] == [("b", first)]
    assert table.tokens == 4


def test_the_oldest_aliases_are_forgotten_first() -> None:
    table: ForkTable[str] = ForkTable()
    donor = table.add_donor(KEY, Donor("d", tokens(0)))
    for index in range(MOST_ALIASES + 3):
        table.add_alias(KEY, Alias(str(index), tokens(index, 7), donor, 0.9))
    names = [alias.name for _, alias in table.aliases()]
    assert len(names) == MOST_ALIASES and names[0] == "3"


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from(["donor", "alias", "drop"]), st.integers(1, 40)), max_size=60
    )
)
def test_the_token_count_is_right_and_bounded(steps: list[tuple[str, str, int]]) -> None:
    table: ForkTable[str] = ForkTable(most_tokens=150, most_forks=3)
    for number, (group, what, size) in enumerate(steps):
        key = KEY._replace(group=group)
        prompt = np.full(size, number)
        if what == "donor":
            table.add_donor(key, Donor(str(number), prompt))
        elif what == "alias":
            known = table.fork(key).donors
            table.add_alias(key, Alias(str(number), prompt, known[-1] if known else Donor("new", prompt[:1]), 0.5))
        elif table.fork(key).donors:
            table.drop_donor(key, table.fork(key).donors[0])
        held = [*(one for _, one in table.donors()), *(one for _, one in table.aliases())]
        assert table.tokens == sum(one.tokens.size for one in held)
        assert table.tokens <= 150 or len(table) == 1
        for one, alias in table.aliases():
            assert any(alias.canonical is donor for other, donor in table.donors() if other == one)
