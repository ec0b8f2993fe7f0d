"""What is learned from timed passes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.placement.pass_times import ENOUGH, LOOKS, PassTimes, Timed, differs, load, save, tokens_of, tokens_of_two
from rksc_sgl.placement.worth import PassCost

LAUNCH_S = 0.030


def passes(true: int, count: int, seed: int = 0) -> list[Timed]:
    """Passes of an accelerator whose launches take as long as so many tokens, of all lengths."""
    source = random.Random(seed)
    made = []
    for _ in range(count):
        tokens = int(2 ** source.uniform(0, 14))
        seconds = max(LAUNCH_S, LAUNCH_S / true * tokens) * source.uniform(0.95, 1.05)
        made.append(Timed(tokens, seconds))
    return made


def learned(true: int, known: int, count: int = 600) -> PassTimes:
    times = PassTimes(PassCost(known, overlaps=True), "constant")
    for one in passes(true, count):
        times.note(one)
    return times


@settings(deadline=None, max_examples=30)
@given(st.integers(100, 4000), st.sampled_from([100, 1024, 4000]))
def test_an_estimate_that_was_far_off_is_approached(true: int, known: int) -> None:
    found = learned(true, known)
    assert found.cost.tokens == pytest.approx(true, rel=0.25) and found.cost.overlaps
    assert found.source.startswith("learned from ")


@pytest.mark.parametrize("overlaps", [False, True])
@given(few=st.floats(1e-5, 1.0), many=st.floats(1e-5, 1.0))
def test_two_passes_tell_and_noise_makes_no_pass_cost_more_than_the_long_one_computed(
    overlaps: bool, few: float, many: float
) -> None:
    found = tokens_of_two(Timed(2, few), Timed(2048, many), overlaps)
    assert 1 <= found <= 2048
    if few >= many:
        assert found == 2048


def test_two_passes_without_noise_tell_the_cost() -> None:
    assert tokens_of_two(Timed(2, 0.102), Timed(2000, 2.1), overlaps=False) == 102
    assert tokens_of_two(Timed(2, 0.1), Timed(2000, 2.0), overlaps=True) == 100


def test_too_little_teaches_nothing() -> None:
    few = [Timed(1, LAUNCH_S)] * ENOUGH + [Timed(5000, 0.15)] * (ENOUGH - 1)
    assert tokens_of(few, 1024) is None
    assert tokens_of([*few, Timed(5000, 0.15)], 1024) == (1000, pytest.approx(0.15 / 5000))
    times = PassTimes(PassCost(1024, overlaps=True), "constant")
    for one in [Timed(600, 0.03)] * 500:  # neither short nor long
        times.note(one)
    assert times.cost == PassCost(1024, overlaps=True) and times.source == "constant"


def test_what_no_clock_can_say_is_left_out() -> None:
    times = PassTimes(PassCost(1000, overlaps=True), "constant")
    for _ in range(100):
        times.note(Timed(0, 1.0))
        times.note(Timed(5000, 0.0))
        times.note(Timed(5000, float("nan")))
    assert times.cost.tokens == 1000


def test_a_look_is_worth_so_many_tokens_once_passes_and_looks_were_timed() -> None:
    times = learned(1000, 1024)
    assert times.cost.look is None and times.wants_looks
    for seconds in [1.0, *[0.0015] * (LOOKS - 1)]:  # the first one warms up
        times.note_look(seconds)
    assert not times.wants_looks
    assert times.cost.look == pytest.approx(0.0015 / (LAUNCH_S / 1000), rel=0.1)
    assert times.cost.of_look(layers=32) == times.cost.look
    assert PassCost(1024).of_look(layers=32) == 32, "as long as a layer's launch, where nobody measured"


def test_it_is_kept_for_servers_to_come(tmp_path: Path) -> None:
    path = tmp_path / "pass-times" / "one.json"
    assert load(path, True) is None
    for cost in (PassCost(700, True, 44.5), PassCost(700, True)):
        save(path, cost)
        assert load(path, True) == cost
    for broken in (
        "",
        "[]",
        '{"tokens": 5}',
        '{"tokens": -1, "look": null}',
        '{"tokens": 1.5, "look": null}',
        '{"tokens": true, "look": null}',
        '{"tokens": 5, "look": "soon"}',
    ):
        path.write_text(broken)
        assert load(path, True) is None, broken


def test_news_are_more_than_noise() -> None:
    assert not differs(PassCost(1000), PassCost(1050)) and differs(PassCost(1000), PassCost(1200))
