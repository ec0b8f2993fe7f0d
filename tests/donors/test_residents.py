"""Prompts of the whole cache: found by content within their namespace, in bounded memory."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.donors.forks import Donor, Namespace
from rksc_sgl.donors.residents import ResidentPrompts

SPACE = Namespace(None, None, None)


def material(seed: int, count: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 40_000, count)


def test_the_prompt_with_most_in_common_comes_first() -> None:
    residents = ResidentPrompts()
    common = material(1)
    far = Donor("far", np.concatenate([material(2), common[:60]]))
    near = Donor("near", np.concatenate([material(3, 20), common]))
    for donor in (far, near, Donor("none", material(4))):
        residents.add(SPACE, donor)
    found = residents.like(SPACE, np.concatenate([material(5, 30), common]), 16)
    assert found[0] is near and all(donor.name != "none" for donor in found)


def test_another_namespace_has_nothing() -> None:
    residents = ResidentPrompts()
    residents.add(SPACE, Donor("d", material(1)))
    others = [SPACE._replace(extra_key="e"), SPACE._replace(cache_salt="s"), SPACE._replace(lora="l")]
    assert [residents.like(other, material(1), 16) for other in others] == [[], [], []]
    assert [donor.name for donor in residents.like(SPACE, material(1), 16)] == ["d"]


def test_a_prompt_is_held_once_and_can_be_dropped() -> None:
    residents = ResidentPrompts()
    first = Donor("first", material(1))
    residents.add(SPACE, first)
    residents.add(SPACE, Donor("second", material(1)))
    assert (len(residents), residents.tokens) == (1, 200)
    assert residents.memory_bytes > 8 * 200
    residents.drop(SPACE, Donor("the same tokens", material(1)))
    residents.drop(SPACE, first)
    assert (len(residents), residents.tokens) == (0, 0)
    assert residents.like(SPACE, material(1), 16) == []


def test_what_was_looked_up_stays_longer() -> None:
    residents = ResidentPrompts(most_tokens=600)
    for seed in range(3):
        residents.add(SPACE, Donor(str(seed), material(seed)))
    residents.like(SPACE, material(0), 16)
    residents.add(SPACE, Donor("3", material(3)))
    assert {donor.name for _, donor in residents} == {"0", "2", "3"}


def test_a_full_index_forgets_prompts_too() -> None:
    one = ResidentPrompts(max_bytes=3 * 3000)
    for seed in range(20):
        one.add(SPACE, Donor(str(seed), material(seed)))
    assert 0 < len(one) < 20
    assert one.tokens == 200 * len(one)
    assert [donor.name for donor in one.like(SPACE, material(19), 16)] == ["19"]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(8, 90)), max_size=30))
def test_the_token_count_is_right_and_bounded(prompts: list[tuple[int, int]]) -> None:
    residents = ResidentPrompts(most_tokens=150)
    for seed, size in prompts:
        residents.add(SPACE, Donor("d", material(seed, size)))
        assert residents.tokens == sum(donor.tokens.size for _, donor in residents) <= 150
