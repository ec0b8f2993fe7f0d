"""Where a request may go from where it stands."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from rksc_sgl.donors.forks import Donor
from rksc_sgl.options import RequestOptions
from rksc_sgl.placement.values import BlendPlan, MergePlan
from rksc_sgl.sglang_plugin.branch_state import BranchState, Phase, attach_state

ALLOWED = {
    ("NEW", "HELD"),
    ("NEW", "PLACED"),
    ("HELD", "PLACED"),
    ("PLACED", "PROBING"),
    ("PLACED", "COMPUTED"),
    ("PROBING", "PLACED"),
    ("PROBING", "MERGED"),
    ("MERGED", "PLACED"),
    ("COMPUTED", "PLACED"),
    *((phase.name, "FINISHED") for phase in Phase),
}


@pytest.mark.parametrize(("before", "after"), itertools.product(Phase, Phase))
def test_only_known_steps_are_taken(before: Phase, after: Phase) -> None:
    state = BranchState(RequestOptions(), before)
    if (before.name, after.name) in ALLOWED:
        state.enter(after)
        assert state.phase is after
    else:
        with pytest.raises(AssertionError, match=f"from {before.name} to {after.name}"):
            state.enter(after)
        assert state.phase is before


def test_a_request_has_a_state_only_where_it_opted_in() -> None:
    def made(custom_params: object) -> BranchState | None:
        req = SimpleNamespace(sampling_params=SimpleNamespace(custom_params=custom_params), origin_input_ids=[1, 2])
        return attach_state(req, threading.Event(), None).rksc  # any object that can be a key

    state = made({"rksc": {"group": "g", "share": "exact"}})
    assert state is not None and (state.options.group, state.phase) == ("g", Phase.NEW)
    assert made(None) is None and made({"other": 1}) is None


def test_a_pass_is_needed_by_verifications_and_by_those_with_a_plan() -> None:
    assert BranchState(RequestOptions(op="verify")).needs_pass
    plain = BranchState(RequestOptions())
    assert not plain.needs_pass
    donor = Donor("d", np.arange(9))
    plain.merge = MergePlan(donor, None, None, 0.5)
    assert plain.needs_pass
    plain.merge, plain.blend = None, BlendPlan(donor, None, np.arange(9), np.zeros(9, np.bool_), plain.options)
    assert plain.needs_pass
    with pytest.raises(AttributeError):
        plain.unknown = 1  # type: ignore[attr-defined]
