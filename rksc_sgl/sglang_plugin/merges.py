"""In the model runner: whether a branch whose prompt asks the same as a donor's is merged with it.

The branch's own prefill is the probe. After its first layers the values that they left in the KV pool, averaged over
the prompt's tokens and less what all prompts have in common, are compared with the donor's, which are in the pool
already. From tau on the branch leaves the pass (:mod:`rksc_sgl.sglang_plugin.departures` gives it the donor's prompt);
below, the same pass goes on, and nothing was computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rksc_sgl.sglang_plugin.blends import Agreement
from rksc_sgl.sglang_plugin.common_values import pooled_values
from rksc_sgl.sglang_plugin.layer_pass import probe_layers
from rksc_sgl.sglang_plugin.opted import decline
from rksc_sgl.sglang_plugin.resident import resident_slots
from rksc_sgl.sglang_plugin.siblings import MergePlan
from rksc_sgl.similarity.gate import pooled_similarity

BELOW_TAU = "similarity is below tau"


@dataclass(frozen=True, eq=False)
class MergeJob:
    """One sequence of an extend batch whose prompt is complete after this pass and may be replaced.

    Attributes:
        place: its place in the batch.
        plan: from placement.
        own: int64 ``[n]`` slots of its prompt.
        theirs: int64 ``[m]`` slots of the donor's prompt, as far as the tree has it: all but a part of a page.
    """

    place: int
    plan: MergePlan
    own: torch.Tensor
    theirs: torch.Tensor


def jobs_of(forward_batch: Any, requests: Sequence[Any], batch: Any, refusal: str) -> list[MergeJob]:
    """The sequences of a batch that have a plan, are complete and have their donor; others say why not.

    A prompt that is prefilled in chunks is probed in the pass of its last one: all its values are in the pool then.

    Args:
        batch: SGLang's ``ScheduleBatch``.
        refusal: why nothing of the batch can be probed; empty if it can.
    """
    jobs = []
    for place, req in enumerate(requests):
        plan: MergePlan | None = getattr(req, "rksc_merge", None)
        if plan is None or req.extend_end < len(req.origin_input_ids):
            continue
        req.rksc_merge = None  # one decision a request
        device = forward_batch.out_cache_loc.device
        row = batch.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : len(req.origin_input_ids)]
        theirs = resident_slots(batch.tree_cache, plan.donor.tokens, plan.extra_key, req.cache_salt)
        if refusal or len(req.output_ids):
            decline(req, refusal or "it was generating already")
        elif len(theirs) <= plan.donor.tokens.size - batch.tree_cache.page_size:
            decline(req, "the KV of its donor is gone")
        else:
            jobs.append(MergeJob(place, plan, row.to(device, torch.int64), theirs.to(device, torch.int64)))
    return jobs


def decide(runner: Any, jobs: Sequence[MergeJob], requests: Sequence[Any], agree: Agreement) -> set[int]:
    """After the probe: the places of those that leave the batch, to come back with their donor's prompt."""
    leaving = set()
    for job in jobs:
        req, probe = requests[job.place], probe_layers(runner)
        pool = runner.token_to_kv_pool
        score = pooled_similarity(
            pooled_values(pool, job.theirs, probe), pooled_values(pool, job.own, probe), job.plan.common
        )
        similar = agree(torch.tensor([score >= job.plan.tau], device=job.own.device))
        report = {"donor": job.plan.donor.name, "probe_layers": probe}
        if math.isfinite(score):
            report["similarity"] = round(score, 4)
        if bool(similar):
            req.rksc_leaving = job.plan
            req.rksc_report = report
            leaving.add(job.place)
        elif getattr(req, "rksc_blend", None) is None:
            decline(req, BELOW_TAU, **report)
        else:  # donor and similarity are the blend's
            decline(req, BELOW_TAU)
    return leaving
