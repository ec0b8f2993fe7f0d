"""The moments of a merged branch between two batches, on doubles of SGLang's scheduler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rksc_sgl.options import RequestOptions
from rksc_sgl.sglang_plugin.branch_state import BranchState, Phase
from rksc_sgl.sglang_plugin.merging.departures import Departure, finish_departure, part_from_batch

pytestmark = pytest.mark.slow  # imports SGLang


class Batch:
    """What SGLang's ``ScheduleBatch`` is to a departure."""

    def __init__(self, *reqs: Any, extend: bool = True) -> None:
        self.reqs = list(reqs)
        self.batch_is_full = True
        self.forward_mode = SimpleNamespace(is_extend=lambda: extend)

    def filter_batch(self, keep_indices: list[int]) -> None:
        self.reqs = [self.reqs[index] for index in keep_indices]


class Scheduler:
    def __init__(self, *waiting: Any) -> None:
        self.waiting_queue = list(waiting)
        self.said: list[tuple[str, Any]] = []

    def _release_aborted_request(self, req: Any) -> None:
        self.said.append(("released", req))

    def send_abort_output(self, abort: Any, req: Any) -> None:
        self.said.append((abort.finished_reason["message"], req))


def request(name: str, *, leaving: bool = False, aborted: str = "") -> Any:
    to_finish = SimpleNamespace(to_json=lambda: {"type": "abort", "message": aborted}) if aborted else None
    state = BranchState(RequestOptions(), Phase.MERGED if leaving else Phase.PLACED)
    return SimpleNamespace(rid=name, rksc=state, to_finish=to_finish, output_ids=[], weight_version_events=[])


def test_a_branch_that_left_is_not_decoded_with_its_batch_and_makes_room_in_it() -> None:
    stays, left = request("stays"), request("left", leaving=True)
    running, last = Batch(), Batch(left, stays)
    part_from_batch(Scheduler(), running, last)
    assert last.reqs == [stays] and not running.batch_is_full
    running, last = Batch(), Batch(stays)
    part_from_batch(Scheduler(), running_batch=running, last_batch=last)
    assert last.reqs == [stays] and running.batch_is_full
    part_from_batch(Scheduler(), running, None)


def test_a_branch_that_left_goes_to_the_front_of_the_queue_only_after_the_results_of_its_own_batch() -> None:
    waits, left = request("waits"), request("left", leaving=True)
    scheduler, batch = Scheduler(waits), Batch(left)
    finish_departure(None, scheduler, batch, SimpleNamespace())  # of an earlier chunk
    assert scheduler.waiting_queue == [waits] and left.rksc.is_leaving
    finish_departure(None, scheduler, Batch(left), SimpleNamespace(rksc_departure=Departure(batch, [left])))
    assert scheduler.waiting_queue == [left, waits]
    assert left.rksc.phase is Phase.PLACED and batch.reqs == []


def test_a_branch_that_was_aborted_on_the_way_is_answered_and_does_not_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.managers import scheduler as module

    monkeypatch.setattr(module, "_make_abort_req", lambda req, finished_reason: SimpleNamespace(**locals()))
    gone, left = request("gone", leaving=True, aborted="bye"), request("left", leaving=True)
    scheduler, batch = Scheduler(), Batch(gone, left)
    finish_departure(None, scheduler, batch, SimpleNamespace(rksc_departure=Departure(batch, [gone, left])))
    assert scheduler.waiting_queue == [left]
    assert scheduler.said == [("released", gone), ("bye", gone)]
