from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from rksc_sgl.deciding import EarlyStop, bound
from rksc_sgl.deciding.bound import MAX_BRANCHES, Boundary, boundary, crossing, statistic, worst_case
from rksc_sgl.deciding.calibration import calibrate_cutoff
from rksc_sgl.deciding.replay import RecordedBranch, replay
from rksc_sgl.deciding.standing import full_vote
from rksc_sgl.deciding.streams import errors_and_looks, sets_of_answers, shuffled
from rksc_sgl.errors import OptionError

TRIALS = 10_000


def _first_answer(order: tuple[int | None, ...], limit: Boundary) -> int | None:
    counts: dict[int, int] = {}
    for look, answer in enumerate(order, 1):
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
        ahead, behind = [*sorted(counts.values(), reverse=True), 0, 0][:2]
        if limit.reached(look, ahead, behind):
            return max(counts, key=lambda name: counts[name])
    return full_vote([None if answer is None else str(answer) for answer in order])  # type: ignore[return-value]


def _error(votes: tuple[int, ...], limit: Boundary) -> float:
    """P(another answer than the vote of all), by going through every order."""
    answers: list[int | None] = [index for index, count in enumerate(votes) for _ in range(count)]
    answers += [None] * (limit.branches - len(answers))
    orders = list(permutations(answers))
    wrong = 0
    for order in orders:
        stopped = _first_answer(order, limit)
        if isinstance(stopped, int):
            winner = full_vote([None if answer is None else str(answer) for answer in order])
            wrong += str(stopped) != winner
    return wrong / len(orders)


@lru_cache
def _partitions(total: int, largest: int) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for first in range(1, min(total, largest) + 1):
        found += [(first, *rest) for rest in _partitions(total - first, first)]
    return found


@pytest.mark.parametrize("risk", [0.05, 0.2, 0.4])
def test_no_set_of_answers_errs_more_often_than_the_worst_case_says_and_the_worst_case_is_within_the_risk(
    risk: float,
) -> None:
    limit = boundary(7, risk)
    worst, votes = worst_case(7, limit.region)
    assert worst <= risk
    assert worst > 0.0 or risk < 0.1  # else the boundary is that of certain votes, which cannot err
    errors = {shares: _error(shares, limit) for shares in _partitions(7, 7)}
    assert max(errors.values()) <= worst + 1e-12
    if len(votes) == 2:  # with two answers the bound is exact
        assert errors[votes] == pytest.approx(worst)


def test_the_walk_of_two_answers_enters_a_region_as_often_as_all_orders_say() -> None:
    region = statistic(6) <= 0.2
    totals = [(2, 3), (1, 4), (3, 3)]
    for (low, top), found in zip(totals, crossing(6, region, totals), strict=True):
        orders = list(permutations("i" * low + "w" * top + "r" * (6 - low - top)))
        entered = sum(
            any(region[look, order[:look].count("i"), order[:look].count("w")] for look in range(1, 7))
            for order in orders
        )
        assert found == pytest.approx(entered / len(orders))


@pytest.mark.parametrize("branches", [2, 5, 8, 16, 32])
def test_more_votes_for_the_leader_or_fewer_for_others_never_make_a_stop_less_likely(branches: int) -> None:
    values = statistic(branches)
    for look in range(1, branches + 1):
        for ahead in range(1, look + 1):
            for behind in range(min(ahead, look - ahead + 1)):
                if behind > 0:
                    assert values[look, ahead, behind] >= values[look, ahead, behind - 1]
                if ahead + 1 + behind <= look:
                    assert values[look, ahead, behind] >= values[look, ahead + 1, behind]


@pytest.mark.parametrize(("branches", "risk"), [(2, 0.01), (8, 0.01), (16, 0.05), (32, 0.001), (32, 0.01), (48, 0.05)])
def test_the_worst_case_of_a_boundary_is_within_its_risk(branches: int, risk: float) -> None:
    assert worst_case(branches, boundary(branches, risk).region)[0] <= risk


def test_six_of_thirty_two_that_agree_decide_at_one_percent() -> None:
    limit = boundary(32, 0.01)
    assert limit.reached(6, 6, 0) and not limit.reached(5, 5, 0)
    assert limit.reached(10, 9, 1) and not limit.reached(9, 8, 1)


@pytest.mark.parametrize("branches", [8, 16, 32])
@pytest.mark.parametrize("risk", [0.01, 0.05])
def test_synthetic_streams_keep_the_risk_whatever_the_answers_are(branches: int, risk: float) -> None:
    """The chance that a set of answers whose true error is the risk shows so many errors is below one in a million."""
    limit = boundary(branches, risk)
    generator = np.random.default_rng(branches)
    allowed = TRIALS * risk + 5.0 * np.sqrt(TRIALS * risk)
    for name, votes in sets_of_answers(limit).items():
        wrong, _ = errors_and_looks(shuffled(votes, branches, TRIALS, generator), limit)
        assert wrong.sum() <= allowed, name


def test_streams_show_the_error_that_the_worst_case_says() -> None:
    """A bound that nothing comes near would hide a simulation that cannot err."""
    limit = boundary(32, 0.05)
    votes = (17, 15)
    (expected,) = crossing(32, limit.region, [(15, 17)])
    wrong, _ = errors_and_looks(shuffled(votes, 32, 40_000, np.random.default_rng(1)), limit)
    assert wrong.mean() == pytest.approx(expected, abs=5 * np.sqrt(expected / 40_000))
    assert expected > 0.5 * 0.05


def test_short_branches_that_all_give_the_other_answer_do_not_win() -> None:
    """Whoever counts branches as they end would stop with the other answer every time."""
    limit = boundary(32, 0.05)
    generator = np.random.default_rng(7)
    trials, errors = 150, 0
    for answers in shuffled((17, 15), 32, trials, generator):
        branches = [RecordedBranch(tokens=10 + 500 * (answer == 0), answer=str(answer)) for answer in answers]
        found = replay(branches, EarlyStop("probable", risk=limit.risk, launch="all"))
        errors += found.done.answer != "0"
    assert errors <= trials * limit.risk + 5 * np.sqrt(trials * limit.risk)


@pytest.mark.parametrize(("branches", "risk"), [(0, 0.1), (MAX_BRANCHES + 1, 0.1), (4, 0.0), (4, 1.0)])
def test_what_cannot_be_bounded_is_refused(branches: int, risk: float) -> None:
    with pytest.raises(OptionError, match=r"branches|risk"):
        boundary(branches, risk)


def test_threads_that_ask_for_one_boundary_at_once_have_it_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, worked_out = threading.Barrier(8), []
    even_shares = bound._even_shares

    def slowly(*arguments: Any) -> float:
        worked_out.append(threading.get_ident())
        time.sleep(0.02)
        return even_shares(*arguments)

    monkeypatch.setattr(bound, "_even_shares", slowly)

    def ask(_: int) -> Boundary:
        asked.wait(20)
        return boundary(8, 0.0123)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert len(set(worked_out)) == 1
    assert all(one is found[0] for one in found)


# -- calibrated ----------------------------------------------------------------------------------------


def _recorded(problems: int, seed: int) -> list[list[str | None]]:
    generator = np.random.default_rng(seed)
    forks: list[list[str | None]] = []
    for share in generator.choice([1.0, 0.95, 0.8, 0.4], size=problems, p=[0.5, 0.3, 0.15, 0.05]):
        rest = (1 - share) * np.array([0.5, 0.25, 0.125, 0.125])
        forks.append([str(answer) for answer in generator.choice(5, size=32, p=[share, *rest])])
    return forks


def test_a_calibrated_cutoff_is_bolder_than_the_exact_one_and_keeps_its_risk_on_new_problems() -> None:
    found = calibrate_cutoff(_recorded(1500, 0), risk=0.02)
    exact = boundary(32, 0.02)
    assert found.cutoff > exact.cutoff
    assert found.branches == 32
    limit = Boundary(32, 0.02, found.cutoff, statistic(32), "")
    fresh = np.array([[int(answer or -1) for answer in answers] for answers in _recorded(4000, 1)])
    wrong, looks = errors_and_looks(fresh, limit)
    assert wrong.mean() <= 0.02 + 5 * np.sqrt(0.02 / 4000)
    assert looks.mean() < errors_and_looks(fresh, exact)[1].mean()


def test_too_few_recorded_forks_certify_nothing_and_say_how_many_would() -> None:
    with pytest.raises(OptionError, match=r"forks: 100 recorded forks .* takes 299"):
        calibrate_cutoff([["a"] * 8] * 100, risk=0.01)


def test_forks_of_different_sizes_are_refused() -> None:
    with pytest.raises(OptionError, match=r"got sizes \[2, 3\]"):
        calibrate_cutoff([["a"] * 2, ["a"] * 3], risk=0.1)
    with pytest.raises(OptionError, match="forks"):
        calibrate_cutoff([], risk=0.1)
