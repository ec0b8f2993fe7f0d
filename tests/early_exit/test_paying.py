"""Where leaving a pass cannot save time."""

from __future__ import annotations

from test_exit_rules_and_leaving import rule_of

from rksc_sgl.early_exit.leaving import Watched
from rksc_sgl.early_exit.paying import can_pay
from rksc_sgl.early_exit.rules import PublishedRule
from rksc_sgl.placement.worth import PassCost

GPU = PassCost(1000, overlaps=True)


def watched(*layers: int) -> list[Watched]:
    return [Watched(0, rule_of(layers)), Watched(1, rule_of(layers))]


def test_a_launch_bound_pass_is_not_shorter_while_somebody_stays() -> None:
    assert not can_pay(watched(8, 16), rows=200, leaving_rows=199, layers=32, cost=GPU)
    assert can_pay(watched(8, 16), rows=200, leaving_rows=200, layers=32, cost=GPU), "then no layer is launched"
    assert can_pay(watched(8, 16), rows=6000, leaving_rows=5000, layers=32, cost=GPU), "then there is much to compute"


def test_looks_must_cost_less_than_the_layers_that_they_may_save() -> None:
    every = PublishedRule(lambda states: states, [0], [1], layers=32, theta=1.0, eps=1.0)
    assert can_pay([Watched(0, every)], rows=100, leaving_rows=100, layers=32, cost=GPU)
    assert can_pay(watched(28, 29), rows=100, leaving_rows=100, layers=32, cost=GPU), "two looks, three layers"
    assert not can_pay(watched(29, 30), rows=100, leaving_rows=100, layers=32, cost=GPU), "two looks, two layers"


def test_a_cpu_computes_what_is_left_in_less_time() -> None:
    assert can_pay(watched(8, 16), rows=200, leaving_rows=1, layers=32, cost=PassCost(28))


def test_who_can_never_leave_cannot_pay() -> None:
    assert not can_pay(watched(8), rows=200, leaving_rows=200, layers=32, cost=GPU), "nothing confirms its only look"
