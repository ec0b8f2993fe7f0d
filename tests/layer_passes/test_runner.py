"""One pass with several policies, on a pass that only remembers what it was asked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rksc_sgl.layer_passes.contract import Decision, LayerPass, Run
from rksc_sgl.layer_passes.runner import run_pass


class Pass:
    def __init__(self, *lengths: int) -> None:
        self.lengths = lengths
        self.done: list[Any] = []

    def run_to(self, layer: int) -> None:
        self.done.append(layer)

    def run_to_kv(self, layer: int) -> None:
        self.done.append(f"KV of {layer}")

    @property
    def depth(self) -> float:
        return 0.0

    def last_states(self, places: Sequence[int]) -> torch.Tensor:
        return torch.tensor(places)

    def narrow(self, runs: Sequence[Run]) -> None:
        self.done.append([(run.place, run.begin, run.end) for run in runs])

    def finish(self) -> str:
        self.done.append("finish")
        return "logits"

    def give_up(self) -> str:
        self.done.append("give up")
        return "nothing"


class Policy:
    """Decides what it is told to at each layer."""

    probes = False

    def __init__(self, decisions: Mapping[int, Decision]) -> None:
        self.decisions = dict(decisions)
        self.seen: list[tuple[int, list[int]]] = []
        self.written: list[Any] = []

    def stops(self) -> Collection[int]:
        return self.decisions.keys()

    def at_work(self) -> AbstractContextManager[None]:
        return nullcontext()

    def look(self, layer: int, layer_pass: LayerPass, there: Collection[int]) -> Decision:
        self.seen.append((layer, sorted(there)))
        return self.decisions.pop(layer)

    def write(self, output: Any) -> None:
        self.written.append(output)


def test_the_pass_stops_where_anybody_looks_and_narrows_once_a_stop() -> None:
    first = Policy({2: Decision(leaving={1}), 5: Decision()})
    second = Policy({2: Decision(runs={0: [(0, 2), (4, 6)]}), 3: Decision(leaving={2})})
    layer_pass = Pass(6, 3, 4)
    outcome = run_pass(layer_pass, [first, second])
    assert layer_pass.done == [2, [(0, 0, 2), (0, 4, 6), (2, 0, 4)], 3, [(0, 0, 2), (0, 4, 6)], 5, "finish"]
    assert first.seen == [(2, [0, 1, 2]), (5, [0])]
    assert second.seen == [(2, [0, 2]), (3, [0, 2])], "it is told who left by the first one's decision"
    assert outcome.output == "logits" and first.written == second.written == ["logits"]
    assert list(outcome.seconds) == [2, 3, 5] and list(outcome.seconds.values()) == sorted(outcome.seconds.values())


def test_a_verification_leaves_a_batch_in_which_others_are_blended() -> None:
    blends, exits = Policy({2: Decision(runs={0: [(3, 9)]})}), Policy({4: Decision(leaving={1})})
    layer_pass = Pass(9, 5)
    run_pass(layer_pass, [blends, exits])
    assert layer_pass.done == [2, [(0, 3, 9), (1, 0, 5)], 4, [(0, 3, 9)], "finish"]


def test_where_all_look_at_kv_alone_no_more_than_that_is_computed() -> None:
    blends, merges, exits = (Policy({2: Decision()}), Policy({2: Decision()}), Policy({2: Decision(), 4: Decision()}))
    blends.probes = merges.probes = True
    layer_pass = Pass(9, 5)
    run_pass(layer_pass, [blends, merges])
    assert layer_pass.done == ["KV of 2", "finish"]
    blends.decisions, layer_pass = {2: Decision(runs={0: [(3, 9)]})}, Pass(9, 5)
    run_pass(layer_pass, [blends, exits])
    assert layer_pass.done == [2, [(0, 3, 9), (1, 0, 5)], 4, "finish"], "exits read the states after the layer"


def test_a_pass_that_nobody_needs_any_more_is_given_up_and_still_written() -> None:
    policy, late = Policy({2: Decision(leaving={0, 1})}), Policy({4: Decision()})
    layer_pass = Pass(1, 1)
    outcome = run_pass(layer_pass, [policy, late])
    assert layer_pass.done == [2, "give up"] and late.seen == []
    assert outcome.output == "nothing" and policy.written == late.written == ["nothing"]


def test_a_decision_that_changes_nothing_does_not_narrow() -> None:
    layer_pass = Pass(4)
    run_pass(layer_pass, [Policy({1: Decision(), 2: Decision(runs={0: [(0, 4)]})})])
    assert layer_pass.done == [1, 2, "finish"]


def test_who_left_cannot_leave_again() -> None:
    with pytest.raises(KeyError):
        run_pass(Pass(1, 1), [Policy({1: Decision(leaving={0})}), Policy({1: Decision(leaving={0})})])


@given(st.lists(st.dictionaries(st.integers(1, 9), st.sets(st.integers(0, 5))), min_size=1, max_size=3))
def test_everybody_is_shown_each_layer_that_they_asked_for_until_nobody_is_left(
    plans: list[dict[int, set[int]]],
) -> None:
    gone: set[int] = set()
    policies = []
    for plan in plans:
        policies.append(Policy({layer: Decision() for layer in plan}))
    order = sorted({layer for plan in plans for layer in plan})
    for layer in order:  # each place leaves once, by the first policy that says so
        for policy, plan in zip(policies, plans, strict=True):
            leaving = plan.get(layer, set()) - gone
            if layer in plan:
                policy.decisions[layer] = Decision(leaving=leaving)
            gone |= leaving
    layer_pass = Pass(*[1] * 6)
    run_pass(layer_pass, policies)
    ran = [one for one in layer_pass.done if isinstance(one, int)]
    assert ran == order[: len(ran)]
    assert (layer_pass.done[-1] == "give up") == (len(gone) == 6)
    if len(gone) < 6:
        assert ran == order
