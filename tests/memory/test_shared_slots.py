"""Slots with several owners: none is free before its last owner let go, none is lost, none is free twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rksc_sgl.errors import RkscError
from rksc_sgl.memory.shared_slots import SharedSlots

SLOTS = 24


class Pool(RuleBasedStateMachine):
    """A pool, owners of which each knows its own slots only, and the counts beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = SharedSlots(SLOTS, "cpu")
        self.free = list(range(1, SLOTS + 1))
        self.owners: list[list[int]] = []

    @rule(count=st.integers(1, 8))
    def computes(self, count: int) -> None:
        """Somebody gets slots of their own."""
        got, self.free = self.free[:count], self.free[count:]
        self.owners.append(got)

    @rule(data=st.data(), count=st.integers(1, 3))
    def use_others(self, data: st.DataObject, count: int) -> None:
        """Some use slots of others, at once."""
        held = sorted({slot for owner in self.owners for slot in owner})
        if held:
            new = [data.draw(st.lists(st.sampled_from(held), unique=True)) for _ in range(count)]
            self.shared.share(torch.tensor([slot for some in new for slot in some], dtype=torch.int64))
            self.owners += new

    @rule(data=st.data(), count=st.integers(1, 3))
    def let_go(self, data: st.DataObject, count: int) -> None:
        """Some let go of part of what they own, in one call."""
        freed: list[int] = []
        for _ in range(count):
            if self.owners:
                owner = data.draw(st.sampled_from(self.owners))
                keep = data.draw(st.integers(0, len(owner)))
                freed += owner[keep:]
                del owner[keep:]
        self.free += self.shared.without_owner(torch.tensor(freed, dtype=torch.int64)).tolist()

    @invariant()
    def nothing_is_lost_and_nothing_is_free_twice(self) -> None:
        held = [slot for owner in self.owners for slot in owner]
        assert sorted([*self.free, *set(held)]) == list(range(1, SLOTS + 1))
        assert self.shared.surplus == len(held) - len(set(held))
        assert self.shared.counts().tolist() == [max(0, held.count(slot) - 1) for slot in range(SLOTS + 1)]


Pool.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestPool = Pool.TestCase


def test_a_slot_that_is_freed_more_often_than_it_is_owned_is_an_error() -> None:
    shared = SharedSlots(8, "cpu")
    shared.share(torch.tensor([3, 3, 5]))
    with pytest.raises(RkscError, match=r"slots \[5\] are freed more often"):
        shared.without_owner(torch.tensor([3, 5, 5, 5]))


def test_without_shared_slots_nothing_is_looked_at() -> None:
    shared, slots = SharedSlots(8, "cpu"), torch.tensor([4, 2])
    assert shared.without_owner(slots) is slots
    shared.share(torch.tensor([4]))
    shared.clear()
    assert shared.surplus == 0 and shared.without_owner(slots) is slots
