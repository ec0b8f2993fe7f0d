"""Who starts: a fork as a whole, in the order of arrival, where there is room for it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

PATIENCE_S = 2.0  # without a request, after which a fork's leases make way for whoever waits for nothing else
TURN_S = 30.0  # that a plain request waits before any lease makes way, and a fork before plain requests wait for it


@dataclass(frozen=True)
class Waiting:
    """A plain request, or a fork that has not begun.

    Attributes:
        name: of it.
        slots: of KV that it needs, with what it may generate.
        is_fork: whether it is a fork.
        waited_s: since it came.
    """

    name: Hashable
    slots: int
    is_fork: bool
    waited_s: float


@dataclass(frozen=True)
class Admission:
    """Who starts.

    Attributes:
        forks: that begin now.
        larger: of these, one that needs more than there is.
        behind: plain requests that wait, for a fork before them has waited too long.
        first: the fork that waits and whose turn it is; None where none waits.
    """

    forks: frozenset[Hashable] = frozenset()
    larger: frozenset[Hashable] = frozenset()
    behind: frozenset[Hashable] = frozenset()
    first: Waiting | None = None


def admit(waiting: Sequence[Waiting], room: int, capacity: int, *, alone: bool) -> Admission:
    """Who of those that wait starts.

    Args:
        waiting: in the order of arrival.
        room: slots that are neither used, nor leased, nor promised to what runs and to forks that have begun.
        capacity: slots that there are in all.
        alone: whether no fork is under way and nothing runs: the first that waits begins then, whatever it needs.
    """
    forks: set[Hashable] = set()
    larger: set[Hashable] = set()
    behind: set[Hashable] = set()
    first: Waiting | None = None
    for one in waiting:
        if not one.is_fork:
            if first is not None and first.waited_s >= TURN_S:
                behind.add(one.name)
            else:
                room -= one.slots
        elif first is None and (one.slots <= room or (alone and not forks)):
            forks.add(one.name)
            room -= one.slots
            if one.slots > capacity:
                larger.add(one.name)
        elif first is None:
            first = one
    return Admission(frozenset(forks), frozenset(larger), frozenset(behind), first)
