from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.memory.forks import (
    BROKEN,
    ENDED,
    EXPIRED,
    FLUSHED,
    GONE,
    REUSED,
    Action,
    Forks,
    Lease,
    Release,
    Take,
)


class Told:
    """Forks, and what was said of leases; every action must fit what was said before."""

    def __init__(self, lease_s: float = 30.0, most: int = 4096) -> None:
        self.forks = Forks(lease_s, most)
        self.held: set[Lease] = set()
        self.why: list[str] = []
        self.now = 0.0

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Take):
                self.held.add(action.lease)
            else:
                assert action.lease in self.held, f"{action} of what is not held"
                self.held.remove(action.lease)
                self.why.append(action.why)
        assert sorted(self.held, key=str) == sorted(self.forks.leases, key=str)

    def arrives(self, name: str, branch: int, branches: int = 3, *, verifies: bool = False) -> str:
        rid = f"{name}.{branch}{'v' if verifies else ''}.{self.now}"
        self.do(self.forks.arrives(name, name, branch, branches, rid, self.now, verifies=verifies))
        self.now += 0.001
        return rid

    def runs(self, name: str, branch: int, branches: int = 3) -> str:
        rid = self.arrives(name, branch, branches)
        self.forks.begins(rid, self.now)
        self.do(self.forks.computed(rid, self.now))
        return rid

    def ends(self, rid: str, *, aborted: bool = False) -> None:
        self.do(self.forks.ends(rid, self.now, aborted=aborted))

    def verified(self, name: str, branch: int) -> None:
        self.ends(self.arrives(name, branch, verifies=True))


def test_a_fork_is_kept_until_what_is_still_to_come_of_it_has_come() -> None:
    told = Told()
    running = [told.runs("f", branch) for branch in range(3)]
    assert told.held == {Lease("f", None)}
    for rid in running:
        told.ends(rid)
    assert told.held == {Lease("f", branch) for branch in (None, 0, 1, 2)}
    told.verified("f", 0)
    told.verified("f", 1)
    assert told.held == {Lease("f", None), Lease("f", 2)}
    told.verified("f", 2)
    assert not told.held
    assert not len(told.forks)
    assert set(told.why) == {REUSED}


def test_branches_that_come_one_after_the_other_find_their_beginning() -> None:
    told = Told()
    for branch in range(3):
        told.ends(told.runs("f", branch))
        told.verified("f", branch)
        assert told.held == ({Lease("f", None)} if branch < 2 else set())


def test_a_next_turn_of_a_branch_is_what_is_leased_then() -> None:
    told = Told()
    told.ends(told.runs("f", 0))
    turn = told.runs("f", 0)
    assert Lease("f", 0) in told.held
    told.ends(turn)
    told.verified("f", 0)
    assert told.held == {Lease("f", None)}


def test_a_fork_whose_client_says_so_ends_and_does_not_come_back() -> None:
    told = Told()
    told.ends(told.runs("f", 0))
    running = told.runs("f", 1)
    told.do(told.forks.end("f"))
    assert (told.held, set(told.why)) == (set(), {ENDED})
    told.ends(running)
    told.ends(told.runs("f", 2))
    assert not told.held
    assert not len(told.forks)


def test_a_fork_of_which_nothing_is_heard_expires_and_one_that_runs_does_not() -> None:
    told = Told(lease_s=30.0)
    told.ends(told.runs("left", 0))
    told.runs("running", 0)
    told.do(told.forks.expire(29.9))
    assert len(told.held) == 3
    told.do(told.forks.expire(31.0))
    assert told.held == {Lease("running", None)}
    assert set(told.why) == {EXPIRED}


def test_a_client_that_goes_away_leaves_nothing() -> None:
    told = Told()
    for rid in [told.runs("f", branch) for branch in range(2)]:
        told.ends(rid, aborted=True)
    assert (told.held, len(told.forks), set(told.why)) == (set(), 0, {GONE})


def test_a_branch_that_is_aborted_takes_its_own_lease_along_and_no_other() -> None:
    told = Told()
    told.ends(told.runs("f", 0))
    told.ends(told.runs("f", 1))
    told.ends(told.runs("f", 1), aborted=True)
    assert told.held == {Lease("f", None), Lease("f", 0)}


def test_what_serves_the_fewest_branches_breaks_first_and_of_equals_what_was_longest_not_heard_of() -> None:
    told = Told()
    for name in ("old", "new"):
        for branch in range(2):
            told.ends(told.runs(name, branch))
    broken = []
    while (release := told.forks.break_first()) is not None:
        told.do([release])
        broken.append(release.lease)
    assert broken == [("old", 1), ("old", 0), ("new", 1), ("new", 0), ("old", None), ("new", None)]
    assert set(told.why) == {BROKEN}


def test_a_fork_is_spared_while_there_are_others() -> None:
    told = Told()
    told.ends(told.runs("old", 0))
    told.ends(told.runs("new", 0))
    release = told.forks.break_first(spare="old")
    assert release == Release(Lease("new", 0), BROKEN)


def test_a_flush_ends_all_leases_and_no_fork() -> None:
    told = Told()
    told.ends(told.runs("f", 0))
    told.do(told.forks.flushed())
    assert (told.held, set(told.why), len(told.forks)) == (set(), {FLUSHED}, 1)
    told.verified("f", 0)
    assert not told.held


def test_thousands_of_forks_that_are_begun_and_left_do_not_fill_the_table() -> None:
    told = Told(most=100)
    for number in range(5000):
        told.ends(told.runs(f"f{number}", 0))
    assert len(told.forks) == 100
    assert len(told.held) == 200


def test_a_verification_of_no_fork_is_nobodys() -> None:
    told = Told()
    told.verified("f", 0)
    assert not len(told.forks)


@pytest.mark.parametrize("seed", range(4))
def test_in_ten_thousand_random_steps_leases_fit_forks_and_all_of_them_end(seed: int) -> None:
    source, told, live = random.Random(seed), Told(lease_s=5.0, most=8), []
    for _ in range(2500):
        told.now += source.choice([0.0, 0.01, 0.5])
        step = source.random()
        name = f"f{source.randrange(12)}"
        if step < 0.45:
            live.append((told.runs(name, source.randrange(3)), name))
        elif step < 0.55:
            live.append((told.arrives(name, source.randrange(3), verifies=True), name))
        elif step < 0.85 and live:
            rid, _ = live.pop(source.randrange(len(live)))
            told.ends(rid, aborted=source.random() < 0.2)
        elif step < 0.9:
            told.do(told.forks.expire(told.now))
        elif step < 0.95:
            release = told.forks.break_first(spare=name)
            told.do([] if release is None else [release])
        elif step < 0.96:
            told.do(told.forks.flushed())
        elif step < 0.965:
            told.do(told.forks.end(name))
        for fork in told.forks:
            assert set(fork.leases) <= {None} | fork.ended | set(fork.live.values())
            assert not fork.done & fork.ended
    for rid, _ in live:
        told.ends(rid)
    told.now += 6.0
    told.do(told.forks.expire(told.now))
    assert (told.held, len(told.forks)) == (set(), 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=40))
def test_ranks_that_are_told_the_same_decide_the_same(steps: list[tuple[int, bool]]) -> None:
    ranks = [Told(), Told()]
    for rank in ranks:
        for branch, aborted in steps:
            rank.ends(rank.runs(f"f{branch}", branch), aborted=aborted)
    assert ranks[0].forks.leases == ranks[1].forks.leases
