"""In the scheduler: a branch that was merged leaves its batch, and comes back with its donor's prompt.

It goes SGLang's own way of a retracted request: its KV is released and never put into the tree, and its sampled token
is nobody's. Three moments matter, with and without overlap scheduling:

1. its batch was launched (``run_batch``): KV is released, the prompt replaced;
2. the next batch is made (``get_next_batch_to_run``): it must not be decoded with the others;
3. the batch's results were processed (``process_batch_result``): only now may it be scheduled again, for until then a
   result is on its way that SGLang would take for its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rksc_sgl.donors.forks import Alias
from rksc_sgl.sglang_plugin.branch_state import BranchState, Phase
from rksc_sgl.sglang_plugin.memory.keeper import known_keeper_of
from rksc_sgl.sglang_plugin.placing.queue import known_queue_of, queue_of
from rksc_sgl.sglang_plugin.placing.replacing import replace_prompt
from rksc_sgl.sglang_plugin.requests import prompt_of


@dataclass(frozen=True, eq=False)
class Departure:
    """Requests that left a batch.

    Attributes:
        batch: the batch as the scheduler has it; results are processed with a copy under overlap scheduling.
        reqs: in the batch's order.
    """

    batch: Any
    reqs: Sequence[Any]


def release_merged(result: Any, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AFTER hook: those that the pass merged give their KV back and take their donor's prompt."""
    if not batch.forward_mode.is_extend():
        return result
    places = [place for place, req in enumerate(batch.reqs) if _is_leaving(req)]
    for place in places:
        batch.release_req(place, 0)
        _take_prompt(scheduler, batch.reqs[place])
    if places:
        result.rksc_departure = Departure(batch, [batch.reqs[place] for place in places])
    return result


def part_from_batch(scheduler: Any, running_batch: Any, last_batch: Any) -> None:
    """BEFORE hook: those that left are not in the batch any more when it is decoded."""
    if last_batch is not None and last_batch.forward_mode.is_extend() and _drop_leaving(last_batch):
        running_batch.batch_is_full = False


def finish_departure(result: Any, scheduler: Any, batch: Any, batch_result: Any) -> Any:
    """AFTER hook: those that left queue up again, in front; of the others, the prompts that were computed are known,
    and what of a fork ended."""
    departure: Departure | None = getattr(batch_result, "rksc_departure", None)
    if departure is not None:
        _drop_leaving(departure.batch)
        returning = []
        for req in departure.reqs:
            if req.to_finish is not None:
                _answer_aborted(scheduler, req)
            else:
                req.rksc.merge = None
                req.rksc.enter(Phase.PLACED)
                returning.append(req)
        scheduler.waiting_queue[:0] = returning
    queue = known_queue_of(scheduler)
    if queue is not None and batch.forward_mode.is_extend():
        queue.note_computed(batch.reqs)
    keeper = known_keeper_of(scheduler)
    if keeper is not None:
        keeper.note_results(batch)
    return result


def _is_leaving(req: Any) -> bool:
    return req.rksc is not None and req.rksc.is_leaving


def _take_prompt(scheduler: Any, req: Any) -> None:
    state: BranchState = req.rksc
    plan, own = state.merge, prompt_of(req)
    assert plan is not None and state.sharing.similarity is not None, "a branch left its batch without a merge"
    replace_prompt(scheduler, req, own.size, plan.donor)
    req.extra_key, state.blended, state.shift, state.blend = plan.extra_key, False, 0, None  # might have been blended
    if plan.key is not None:
        alias = Alias(req.rid, own, plan.donor, state.sharing.similarity)
        queue_of(scheduler).table.add_alias(plan.key, alias)
    # What SGLang counts of this request begins anew; it was not retracted for want of memory.
    req.retraction_count -= 1
    req.retracted_stain = req._cache_breakdown_computed = False
    req.cached_tokens = 0


def _drop_leaving(batch: Any) -> bool:
    """Take those that leave out of a batch; whether there were some."""
    kept = [place for place, req in enumerate(batch.reqs) if not _is_leaving(req)]
    if len(kept) == len(batch.reqs):
        return False
    batch.filter_batch(keep_indices=kept)
    return True


def _answer_aborted(scheduler: Any, req: Any) -> None:
    """A request that was aborted on its way is answered, as SGLang does with one that is queued."""
    from sglang.srt.managers.scheduler import _make_abort_req

    scheduler._release_aborted_request(req)
    scheduler.send_abort_output(_make_abort_req(req, finished_reason=req.to_finish.to_json()), req)
