"""What the verification benchmarks make of what they measured."""

from __future__ import annotations

import pytest

from benchmarks import verify_cost, verify_exit
from benchmarks.verify_cost import EXIT, IN_PLACE, JUDGE, SKIP, Cost
from benchmarks.verify_exit import CERTIFIED, FULL, PUBLISHED, SELECTION, Call, Fork
from rksc_sgl.calibration.workload import CALIBRATION_FAMILIES, HELD_OUT_FAMILIES, WorkloadFork, built_in
from rksc_sgl.errors import RkscError


def fork(family: str, margins: dict[str, list[float]], layers: float = 0.5) -> Fork:
    count = len(margins[FULL])
    calls = {
        arm: [Call(margin, 0.0, 1.0 if arm == FULL else layers) for margin in values] for arm, values in margins.items()
    }
    return Fork(WorkloadFork("p", ("a",) * count, (1.0,) * count, family), calls)


INSIDE, OUTSIDE = CALIBRATION_FAMILIES[0], HELD_OUT_FAMILIES[0]


def test_flips_of_other_families_are_counted_apart() -> None:
    arms = {FULL: [1.0, -1.0], SELECTION: [1.0, -1.0], PUBLISHED: [-1.0, -1.0]}
    forks = [fork(INSIDE, {**arms, CERTIFIED: [2.0, -3.0]}), fork(OUTSIDE, {**arms, CERTIFIED: [-2.0, 3.0]})]
    seconds = {FULL: [3.0], CERTIFIED: [2.0], f"{FULL} again": [3.3], PUBLISHED: [1.0]}
    result = verify_exit.summary(forks, seconds, 0.01)
    assert (result["calls"], result["flips"], result["published_flips"]) == (2, 0, 1)
    assert result["mean_layers_fraction"] == 0.5
    assert result["other_families"]["flips"] == 2
    assert (result["verify_time_ratio"], result["noise_time_ratio"]) == (1.5, 1.1)


def test_another_selected_branch_is_seen() -> None:
    moved = fork(INSIDE, {FULL: [1.0, 2.0], SELECTION: [3.0, 2.0], CERTIFIED: [1.0, 2.0], PUBLISHED: [0.0, 0.0]})
    assert verify_exit.figures([moved])["selected_differs"] == 1
    assert moved.selected(FULL) == 1 and moved.selected(SELECTION) == 0


def test_the_control_flips_where_the_rule_does_not() -> None:
    verdicts = [1.0, -1.0] * 50
    one = fork(INSIDE, {FULL: verdicts, CERTIFIED: verdicts})
    assert verify_exit.flips([one], CERTIFIED) == 0
    assert verify_exit.shuffled_flips([one], CERTIFIED) > 20


def test_problems_of_the_calibration_are_left_out() -> None:
    seen = [one.problem for one in built_in(60)]
    chosen = verify_exit.unseen(1000, 30, 10, 4, seen)
    assert len(chosen) == 40
    assert not {one.problem for one in chosen} & set(seen)
    with pytest.raises(RkscError, match="--seed"):  # the generators' seeds are a row: this one's are nearly the same
        verify_exit.unseen(0, 30, 10, 4, seen)


def row(judge: float, ours: float, same: bool) -> dict[str, Cost]:
    cost = {IN_PLACE: Cost(ours, 200, "7", 1), EXIT: Cost(ours, 200, "7", 1)}
    return {**cost, SKIP: Cost(ours / 2, 100, "7" if same else "8", 0), JUDGE: Cost(judge, 900, None, 0)}


def test_costs_are_fractions_of_the_judge_on_the_same_problems() -> None:
    rows = [{**row(10.0, 1.0, True), "judge again": Cost(11.0, 900, None, 0)}]
    rows.append({name: cost for name, cost in row(1.0, 5.0, False).items() if name != JUDGE})
    result = verify_cost.summary(rows)
    assert (result["time_fraction"], result["time_fraction_in_place"], result["noise"]) == (0.05, 0.1, 1.1)
    assert (result["same_selected"], result["same_selected_exit"]) == (0.5, 1.0)
    assert result["new_tokens_per_problem"] == {JUDGE: 900, IN_PLACE: 200, EXIT: 200, SKIP: 100}
    assert (result["problems"], result["judged"]) == (2, 1)


def test_more_judged_problems_than_there_are_is_an_error() -> None:
    with pytest.raises(RkscError, match="--judged"):
        verify_cost.main(["--problems", "2", "--judged", "3"])
