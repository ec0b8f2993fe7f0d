"""In the model runner: whether a branch whose prompt asks the same as a donor's is merged with it.

The branch's own prefill is the probe. After its first layers the values that they left in the KV pool, averaged over
the prompt's tokens and less what all prompts have in common, are compared with the donor's, which are in the pool
already. From tau on the branch leaves the pass (:mod:`rksc_sgl.sglang_plugin.merging.departures` gives it the donor's
prompt); below, the same pass goes on, and nothing was computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from rksc_sgl.layer_passes.contract import Decision, LayerPass
from rksc_sgl.placement.choose import DONOR_GONE
from rksc_sgl.placement.report import SharingReport
from rksc_sgl.placement.values import MergePlan
from rksc_sgl.sglang_plugin.branch_state import BranchState, Phase
from rksc_sgl.sglang_plugin.passes.claims import Batch
from rksc_sgl.sglang_plugin.passes.common_values import pooled_values
from rksc_sgl.sglang_plugin.passes.split_pass import probe_layers
from rksc_sgl.sglang_plugin.tree import resident_slots
from rksc_sgl.similarity.gate import pooled_similarity

BELOW_TAU = "similarity is below tau"


@dataclass(frozen=True, eq=False)
class MergeJob:
    """One sequence of an extend batch whose prompt is complete after this pass and may be replaced.

    Attributes:
        place: its place in the batch.
        state: of its request.
        plan: from placement.
        own: int64 ``[n]`` slots of its prompt.
        theirs: int64 ``[m]`` slots of the donor's prompt, as far as the tree has it: all but a part of a page.
    """

    place: int
    state: BranchState
    plan: MergePlan
    own: torch.Tensor
    theirs: torch.Tensor


class Merges:
    """The policy of branches that may be merged (:class:`~rksc_sgl.layer_passes.contract.PassPolicy`)."""

    probes = True

    def __init__(self, batch: Batch, jobs: Sequence[MergeJob]) -> None:
        self._batch, self._jobs = batch, jobs

    def stops(self) -> Collection[int]:
        return (probe_layers(self._batch.runner),)

    def at_work(self) -> AbstractContextManager[None]:
        return nullcontext()

    def look(self, layer: int, layer_pass: LayerPass, there: Collection[int]) -> Decision:
        """Those that are similar enough leave, to come back with their donor's prompt; one transfer for all of them."""
        pool = self._batch.runner.token_to_kv_pool
        sides = [slots for job in self._jobs for slots in (job.theirs, job.own)]
        found = self._batch.agree(torch.stack([pooled_values(pool, slots, layer) for slots in sides])).cpu()
        pairs = zip(self._jobs, found[::2], found[1::2], strict=True)
        return Decision(
            leaving={job.place for job, theirs, own in pairs if _merge_if_similar(job, theirs, own, layer_pass.depth)}
        )

    def write(self, output: Any) -> None:
        """Nothing: who left has no output, and the others' is their own."""


def _merge_if_similar(job: MergeJob, theirs: torch.Tensor, own: torch.Tensor, layers: float) -> bool:
    """Decide for one branch, of pooled values on the host, and say so in its report; True where it leaves."""
    state = job.state
    assert job.plan.centre is not None, "a merge was planned without what all prompts have in common"
    score = pooled_similarity(theirs, own, job.plan.centre)
    similarity = round(score, 4) if math.isfinite(score) else None
    if score >= job.plan.tau:
        state.sharing = SharingReport(donor=job.plan.donor.name, probe_layers=round(layers, 2), similarity=similarity)
        state.enter(Phase.MERGED)
        return True
    if state.blend is None:  # else donor and similarity are the blend's
        state.sharing.donor, state.sharing.probe_layers = job.plan.donor.name, round(layers, 2)
        state.sharing.similarity = similarity
    state.sharing.decline(BELOW_TAU)
    state.merge = None
    return False


def claim(batch: Batch) -> Merges | None:
    """The sequences of a batch that have a plan, are complete and have their donor; others say why not.

    A prompt that is prefilled in chunks is probed in the pass of its last one: all its values are in the pool then.
    """
    jobs = []
    for place, req in enumerate(batch.requests):
        if req.rksc is None or req.rksc.merge is None or req.extend_end < len(req.origin_input_ids):
            continue
        job = _job(batch, place, req, req.rksc.merge)
        if isinstance(job, MergeJob):
            jobs.append(job)
        else:
            req.rksc.sharing.decline(job)
            req.rksc.merge = None
    return Merges(batch, jobs) if jobs else None


def _job(batch: Batch, place: int, req: Any, plan: MergePlan) -> MergeJob | str:
    """What is to be compared, or why it cannot be."""
    if batch.refusal or len(req.output_ids):
        return batch.refusal or "it was generating already"
    device = batch.forward_batch.out_cache_loc.device
    theirs = resident_slots(batch.tree_cache, plan.donor.tokens, plan.extra_key, req.cache_salt)
    if len(theirs) <= plan.donor.tokens.size - batch.tree_cache.page_size:
        return DONOR_GONE
    row = batch.schedule_batch.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : len(req.origin_input_ids)]
    return MergeJob(place, req.rksc, plan, row.to(device, torch.int64), theirs.to(device, torch.int64))
