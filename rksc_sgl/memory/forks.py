"""What is still to come of each fork, and what of its KV is kept until then.

Pure: what happens to requests comes in as calls, and which leases are taken and which end goes out. Whoever calls locks
and unlocks KV. Everything is decided by the order of the calls and the times that come with them, so that ranks which
are told the same decide the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

MOST_FORKS = 4096
MOST_ENDED = 4096  # names of forks that ended are remembered, so that what comes after is no new fork

REUSED, ENDED, GONE, EXPIRED, BROKEN, FLUSHED = "reused", "ended", "gone", "expired", "broken", "flushed"
REASONS = (REUSED, ENDED, GONE, EXPIRED, BROKEN, FLUSHED)


class Lease(NamedTuple):
    """What is kept: a branch, or with branch None what a fork's branches have in common."""

    fork: Hashable
    branch: int | None


@dataclass(frozen=True)
class Take:
    """A lease begins, on the KV of the request whose event this answers; one of the same name ends with it."""

    lease: Lease


@dataclass(frozen=True)
class Release:
    """A lease ends, for one of :data:`REASONS`."""

    lease: Lease
    why: str


Action = Take | Release


@dataclass
class Fork:
    """One fork.

    Attributes:
        name: what separates it from others.
        group: the name that the client gave it.
        branches: that it has.
        arrival: its place in the order in which forks came.
        heard, heard_at: its place in the order of all events, and the time of it.
        admitted: whether its requests may be scheduled.
        larger: whether it needs more than there is.
        live: requests that wait or run, and their branches.
        verifying: of these, verifications.
        begun: branches that were scheduled.
        ended: branches that ended, and whose verification is to come.
        done: branches of which nothing is to come.
        useful: whether any of its branches ended by itself.
        leases: branches that are leased; None is the beginning.
    """

    name: Hashable
    group: str
    branches: int
    arrival: int
    heard: int = 0
    heard_at: float = 0.0
    admitted: bool = False
    larger: bool = False
    live: dict[str, int] = field(default_factory=dict)
    verifying: set[str] = field(default_factory=set)
    begun: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)
    done: set[int] = field(default_factory=set)
    useful: bool = False
    leases: set[int | None] = field(default_factory=set)

    @property
    def unstarted(self) -> int:
        """Branches that may still start."""
        return max(0, self.branches - len(self.begun | self.done))

    def is_unheard(self, since: float) -> bool:
        """Whether it has no request, and had none since then."""
        return not self.live and self.heard_at <= since

    @property
    def to_come(self) -> int:
        """Branches that its beginning still serves."""
        running = {branch for rid, branch in self.live.items() if rid not in self.verifying}
        return self.unstarted + len(running | self.ended)


class Forks:
    """The forks of a server.

    Args:
        lease_s: seconds without a request after which a fork is given up.
        most: forks that are kept track of; beyond it the one without requests that was longest not heard of goes.
    """

    def __init__(self, lease_s: float, most: int = MOST_FORKS) -> None:
        self._lease_s, self._most = lease_s, most
        self._forks: OrderedDict[Hashable, Fork] = OrderedDict()  # the one that was longest not heard of first
        self._of: dict[str, Hashable] = {}  # requests that wait or run
        self._over: OrderedDict[str, None] = OrderedDict()  # groups that ended
        self._events = self._arrivals = 0

    def __len__(self) -> int:
        return len(self._forks)

    def __iter__(self) -> Iterator[Fork]:
        """The one that was longest not heard of first."""
        return iter(self._forks.values())

    def of(self, rid: str) -> Fork | None:
        """The fork of a request that waits or runs."""
        name = self._of.get(rid)
        return None if name is None else self._forks[name]

    def named(self, name: Hashable) -> Fork | None:
        """The fork of that name."""
        return self._forks.get(name)

    @property
    def leases(self) -> list[Lease]:
        """All of them."""
        return [Lease(fork.name, branch) for fork in self._forks.values() for branch in fork.leases]

    # -- what happens --------------------------------------------------------------------------------

    def arrives(
        self, name: Hashable, group: str, branch: int, branches: int, rid: str, now: float, *, verifies: bool
    ) -> list[Action]:
        """A request is there. One of a fork that has ended, and a verification of none, are not kept track of."""
        fork = self._forks.get(name)
        if rid in self._of or group in self._over or (fork is None and verifies):
            return []
        if fork is None:
            self._arrivals += 1
            fork = self._forks[name] = Fork(name, group, branches, self._arrivals)
        self._hear(fork, now)
        fork.live[rid] = branch
        self._of[rid] = name
        if verifies:
            fork.verifying.add(rid)
        else:
            fork.done.discard(branch)
        return self._forget_oldest()

    def begins(self, rid: str, now: float) -> None:
        """It is scheduled; also again, after it was retracted."""
        fork = self.of(rid)
        if fork is not None:
            self._hear(fork, now)
            fork.begun.add(fork.live[rid])

    def computed(self, rid: str, now: float) -> list[Action]:
        """The prompt of a request is computed: the first of a fork is what its branches have in common."""
        fork = self.of(rid)
        if fork is None or rid in fork.verifying:
            return []
        self._hear(fork, now)
        if None in fork.leases or fork.to_come < 2:
            return []
        fork.leases.add(None)
        return [Take(Lease(fork.name, None))]

    def ends(self, rid: str, now: float, *, aborted: bool) -> list[Action]:
        """A request is over."""
        fork = self.of(rid)
        if fork is None:
            return []
        self._hear(fork, now)
        branch = fork.live.pop(rid)
        verified = rid in fork.verifying
        fork.verifying.discard(rid)
        del self._of[rid]
        actions: list[Action] = []
        if verified or aborted:
            if branch not in fork.live.values():  # else what is to come of it is not over
                fork.ended.discard(branch)
                fork.done.add(branch)
                actions += self._release(fork, [branch], REUSED if verified and not aborted else GONE)
        else:
            fork.useful = True
            fork.ended.add(branch)
            fork.begun.add(branch)
            fork.leases.add(branch)
            actions.append(Take(Lease(fork.name, branch)))
        return actions + self._settle(fork) + self._forget_oldest()

    def end(self, group: str) -> list[Action]:
        """The client says that nothing more of a fork is to come; requests of it that still run go on unleased."""
        self._over[group] = None
        self._over.move_to_end(group)
        while len(self._over) > MOST_ENDED:
            self._over.popitem(last=False)
        found = [fork for fork in self._forks.values() if fork.group == group]
        return [action for fork in found for action in self._drop(fork, ENDED)]

    def expire(self, now: float) -> list[Action]:
        """Forks of which nothing was heard for too long are given up."""
        old = [
            fork
            for fork in takewhile(lambda fork: now - fork.heard_at >= self._lease_s, self._forks.values())
            if not fork.live
        ]
        return [action for fork in old for action in self._drop(fork, EXPIRED)]

    def break_first(self, spare: Hashable = None, *, unheard_since: float | None = None) -> Release | None:
        """End the lease that is worth least; None where there is none left.

        Args:
            spare: the fork whose leases go last.
            unheard_since: only of forks without requests, of which nothing was heard since then.
        """
        found = self._breakable(unheard_since)
        if not found:
            return None
        fork, branch = min(found, key=lambda one: (one[0].name == spare, _worth(*one)))
        fork.leases.discard(branch)
        return Release(Lease(fork.name, branch), BROKEN)

    def breakable(self, unheard_since: float | None) -> list[Lease]:
        """Leases whose end gives slots, of forks without requests since then or of all."""
        return [
            Lease(fork.name, branch)
            for fork, branch in self._breakable(unheard_since)
            if branch is not None or not fork.live  # those that run hold it too
        ]

    def _breakable(self, unheard_since: float | None) -> list[tuple[Fork, int | None]]:
        return [
            (fork, branch)
            for fork in self._forks.values()
            if unheard_since is None or fork.is_unheard(unheard_since)
            for branch in fork.leases
        ]

    def nothing_kept(self, lease: Lease) -> None:
        """There was no KV that a lease could be taken on."""
        fork = self._forks.get(lease.fork)
        if fork is not None:
            fork.leases.discard(lease.branch)

    def flushed(self) -> list[Action]:
        """There is no KV any more; what is to come will compute it."""
        return [action for fork in self._forks.values() for action in self._release(fork, list(fork.leases), FLUSHED)]

    # -- consequences --------------------------------------------------------------------------------

    def _hear(self, fork: Fork, now: float) -> None:
        self._events += 1
        fork.heard, fork.heard_at = self._events, now
        self._forks.move_to_end(fork.name)

    def _settle(self, fork: Fork) -> list[Action]:
        """What nobody needs any more ends."""
        if not fork.live and not fork.ended and (fork.unstarted == 0 or not fork.useful):
            return self._drop(fork, REUSED if fork.useful else GONE)
        if fork.to_come == 0:
            return self._release(fork, [None], REUSED)
        return []

    def _drop(self, fork: Fork, why: str) -> list[Action]:
        for rid in fork.live:
            del self._of[rid]
        del self._forks[fork.name]
        return self._release(fork, sorted(fork.leases, key=lambda branch: -1 if branch is None else branch), why)

    @staticmethod
    def _release(fork: Fork, branches: Sequence[int | None], why: str) -> list[Action]:
        held = [branch for branch in branches if branch in fork.leases]
        fork.leases.difference_update(held)
        return [Release(Lease(fork.name, branch), why) for branch in held]

    def _forget_oldest(self) -> list[Action]:
        """Forks that were begun and left do not fill the memory of the server."""
        if len(self._forks) <= self._most:
            return []
        oldest = next((fork for fork in self._forks.values() if not fork.live), None)
        return [] if oldest is None else self._drop(oldest, EXPIRED)


def _worth(fork: Fork, branch: int | None) -> tuple[int, int, int]:
    """Least first: branches to come for each slot that is held, then the fork that was longest not heard of.

    Tokens that are reused are the slots that are held: of tokens times branches below, per slot, the branches stay.
    """
    return (1, fork.heard, -branch) if branch is not None else (max(1, fork.to_come), fork.heard, 1)
