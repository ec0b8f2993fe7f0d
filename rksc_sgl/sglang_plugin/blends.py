"""In the model runner: a branch's prefill with the KV that its donor has already.

The first layers run for every token. Then the values of the last of these layers are compared with the donor's, token
by token; what the donor has not, and what moved most, is computed in the remaining layers, and the rest gets copies of
the donor's KV in its own slots, keys turned to their new positions. Runs of computed tokens go through SGLang's own
attention as sequences of their own (:class:`~rksc_sgl.sglang_plugin.layer_pass.SplitPass`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rksc_sgl.blending.plan import runs_of, to_compute
from rksc_sgl.blending.rotation import Rotation, rotation_of
from rksc_sgl.sglang_plugin.layer_pass import probe_layers
from rksc_sgl.sglang_plugin.opted import wants_prompt_logprobs
from rksc_sgl.sglang_plugin.resident import resident_slots
from rksc_sgl.sglang_plugin.siblings import BlendPlan

Agreement = Callable[[torch.Tensor], torch.Tensor]  # makes a decision the same on every rank

LEAST_CANDIDATES = 32  # of one forward pass; fewer are not worth a pass of their own


@dataclass
class BlendJob:
    """One sequence of an extend batch that takes over KV.

    Attributes:
        place: its place in the batch.
        plan: from placement.
        own: int64 ``[n]`` slots of its new tokens.
        theirs: int64 ``[n]`` slots of the donor's tokens; -1 where there is none.
        new: int64 ``[n]`` positions of its new tokens.
        old: int64 ``[n]`` positions of the donor's tokens, -1 where there is none.
        always: bool ``[n]``, computed whatever they moved; of the whole prompt, so that chunks break nothing.
    """

    place: int
    plan: BlendPlan
    own: torch.Tensor
    theirs: torch.Tensor
    new: torch.Tensor
    old: torch.Tensor
    always: torch.Tensor


def jobs_of(forward_batch: Any, requests: Sequence[Any], tree_cache: Any, refusal: str) -> list[BlendJob]:
    """The sequences of a batch that have a plan and whose donor is still there; others say why not.

    Args:
        refusal: why nothing of the batch can be blended; empty if it can.
    """
    jobs = []
    start = 0
    for place, req in enumerate(requests):
        length = forward_batch.extend_seq_lens_cpu[place]
        plan: BlendPlan | None = getattr(req, "rksc_blend", None)
        if plan is not None:
            begin = forward_batch.extend_prefix_lens_cpu[place]
            own = forward_batch.out_cache_loc[start : start + length]
            job = refusal or _job(plan, place, begin, own, req, tree_cache)
            if isinstance(job, BlendJob):
                jobs.append(job)
            elif not req.rksc_report.get("taken_tokens"):  # the few tokens of a last chunk decline nothing
                req.rksc_report["declined"] = job
        start += length
    return jobs


def _job(plan: BlendPlan, place: int, begin: int, own: torch.Tensor, req: Any, tree_cache: Any) -> BlendJob | str:
    if wants_prompt_logprobs(req):
        return "log-probabilities of the prompt are asked for"
    slots = resident_slots(tree_cache, plan.donor.tokens, plan.extra_key, req.cache_salt).to(own.device, torch.int64)
    source = torch.full((own.numel(),), -1, dtype=torch.int64)
    known = torch.from_numpy(plan.source[begin : begin + own.numel()])
    source[: known.numel()] = known  # tokens after the prompt, of a branch that was retracted, have no source
    source = source.to(own.device)
    there = (source >= 0) & (source < slots.numel())
    if int(there.sum()) < LEAST_CANDIDATES:
        return "too few of its new tokens are resident with its donor"
    theirs = torch.where(there, slots[source.clamp(0, slots.numel() - 1)], -1)
    new = torch.arange(begin, begin + own.numel(), device=own.device)
    always = torch.zeros(own.numel(), dtype=torch.bool)
    always[: known.numel()] = torch.from_numpy(plan.always)[begin : begin + own.numel()]
    old = torch.where(there, source, -1)
    return BlendJob(place, plan, own.to(torch.int64), theirs, new, old, always.to(own.device))


def decide(
    runner: Any, jobs: Sequence[BlendJob], requests: Sequence[Any], agree: Agreement
) -> dict[int, list[tuple[int, int]]]:
    """After the probe: what is computed of each blended sequence, by its place; the rest is taken over here."""
    return {job.place: _runs_of_job(runner, job, requests[job.place], agree) for job in jobs}


def _runs_of_job(runner: Any, job: BlendJob, req: Any, agree: Agreement) -> list[tuple[int, int]]:
    """Decide what is computed, take over the rest, and report it."""
    probe, options = probe_layers(runner), job.plan.options
    candidate = job.theirs >= 0
    values = runner.token_to_kv_pool.get_value_buffer(probe - 1)
    deviation = _deviation(values[job.own], values[job.theirs.clamp(min=0)])
    chosen = to_compute(candidate, deviation, job.always, threshold=options.deviation, share=options.recompute)
    mask = agree(chosen)
    runs = runs_of(mask.cpu())
    taken = torch.ones_like(mask)
    for begin, end in runs:
        taken[begin:end] = False
    _take_over(runner, job, taken.nonzero().flatten(), probe)
    similar = 1.0 - float(deviation[candidate].clamp(max=1.0).mean())
    _count(req, int(taken.sum()), int(mask.numel()), int((mask & candidate).sum()), similar, probe)
    return runs


def _deviation(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """``[n]`` distance of values ``[n, heads, size]`` from the donor's, relative to these."""
    ours, theirs = ours.flatten(1).float(), theirs.flatten(1).float()
    return (ours - theirs).norm(dim=1) / theirs.norm(dim=1).clamp(min=1e-6)


def _take_over(runner: Any, job: BlendJob, taken: torch.Tensor, probe: int) -> None:
    """Copy the donor's KV of these tokens, in every layer after the probe, keys turned to their new positions."""
    if not taken.numel():
        return
    pool, rotations = runner.token_to_kv_pool, rotation_of(runner.model)
    own, theirs = job.own[taken], job.theirs[taken]
    turns: dict[int, Any] = {}
    for layer in range(probe, runner.model_config.num_hidden_layers):
        rotation = rotations if isinstance(rotations, Rotation) else rotations[layer]
        keys, values = pool.get_key_buffer(layer), pool.get_value_buffer(layer)
        found = keys[theirs]
        if rotation is not None:
            if id(rotation) not in turns:
                turns[id(rotation)] = rotation.turn(job.old[taken], job.new[taken])
            found = turns[id(rotation)].rotate(found)
        keys[own] = found
        values[own] = values[theirs]


def _count(req: Any, taken: int, tokens: int, moved: int, similar: float, probe: int) -> None:
    """Add one forward pass to the request's report."""
    report = req.rksc_report
    before = report.get("taken_tokens", 0)
    report.update(
        mode="blend",
        taken_tokens=before + taken,
        computed_tokens=report.get("computed_tokens", 0) + tokens - taken,
        recomputed_tokens=report.get("recomputed_tokens", 0) + moved,
        replaced_tokens=0,
        probe_layers=probe,
        similarity=round((report.get("similarity", 0.0) * before + similar * taken) / max(1, before + taken), 4),
    )
