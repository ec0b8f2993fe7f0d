from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rksc_sgl.memory.admission import TURN_S, Waiting, admit


def fork(name: str, slots: int, waited_s: float = 0.0) -> Waiting:
    return Waiting(name, slots, True, waited_s)


def plain(name: str, slots: int, waited_s: float = 0.0) -> Waiting:
    return Waiting(name, slots, False, waited_s)


def test_forks_begin_in_the_order_of_arrival_while_there_is_room() -> None:
    found = admit([fork("a", 40), fork("b", 40), fork("c", 40), fork("d", 10)], 100, 200, alone=False)
    assert found.forks == {"a", "b"}
    assert found.first is not None
    assert found.first.name == "c", "d would fit, and does not overtake"


def test_a_plain_request_takes_room_from_forks_that_came_later_only() -> None:
    assert admit([plain("p", 30), fork("a", 80)], 100, 200, alone=False).forks == frozenset()
    assert admit([fork("a", 80), plain("p", 30)], 100, 200, alone=False).forks == {"a"}


def test_plain_requests_overtake_a_fork_that_waits_until_it_has_waited_too_long() -> None:
    assert not admit([fork("a", 80, TURN_S - 1), plain("p", 1)], 10, 200, alone=False).behind
    assert admit([fork("a", 80, TURN_S), plain("p", 1)], 10, 200, alone=False).behind == {"p"}
    assert not admit([plain("p", 1), fork("a", 80, TURN_S)], 10, 200, alone=False).behind


def test_a_fork_that_could_never_fit_begins_when_it_is_alone_and_says_so() -> None:
    waiting = [fork("huge", 500), fork("small", 10)]
    assert not admit(waiting, 100, 200, alone=False).forks
    found = admit(waiting, 100, 200, alone=True)
    assert (found.forks, found.larger) == ({"huge"}, {"huge"})
    assert found.first is not None
    assert found.first.name == "small"


UNITS = st.lists(st.builds(Waiting, st.uuids(), st.integers(0, 100), st.booleans(), st.floats(0, 60)), max_size=12)


@given(UNITS, st.integers(-50, 300), st.booleans())
def test_no_fork_overtakes_another_and_none_starts_without_room_unless_alone(
    waiting: list[Waiting], room: int, alone: bool
) -> None:
    found = admit(waiting, room, 200, alone=alone)
    forks = [one for one in waiting if one.is_fork]
    begun = [one for one in forks if one.name in found.forks]
    assert begun == forks[: len(begun)]
    assert (found.first is None) == (len(begun) == len(forks))
    before = [one.slots for one in waiting[: waiting.index(begun[-1]) + 1]] if begun else []
    assert sum(before) <= max(room, 0) or (alone and begun) or not begun
    if alone and forks:
        assert begun, "somebody begins where nothing else could"
