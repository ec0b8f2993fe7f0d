"""In the model runner: a branch's prefill with the KV that its donor has already.

The first layers run for every token. Then the values of the last of these layers are compared with the donor's, token
by token, and the end of the prompt is asked what it attends to there. What the donor has not, and what moved and is
attended to most, is computed in the remaining layers, and the rest gets copies of the donor's KV in its own slots, keys
turned to their new positions. Runs of computed tokens go through SGLang's own
attention as sequences of their own (:class:`~rksc_sgl.sglang_plugin.passes.split_pass.SplitPass`).

Everything that the host knows is brought to the device before the first layer. How far each token moved, and how much
it is attended to, comes back in one transfer for the whole batch; which tokens are computed is decided on the host,
which has to know it anyway, and what is taken over goes back in one more, for one operation of all layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rksc_sgl.blending.attended import asking
from rksc_sgl.blending.fewer_runs import fewer_runs
from rksc_sgl.blending.plan import runs_of, to_compute
from rksc_sgl.blending.take_over import DonorRows
from rksc_sgl.layer_passes.contract import Decision, LayerPass
from rksc_sgl.placement.report import SharingReport
from rksc_sgl.placement.values import BlendPlan
from rksc_sgl.sglang_plugin.branch_state import BranchState
from rksc_sgl.sglang_plugin.memory.slots import shared_slots_of, use_slots
from rksc_sgl.sglang_plugin.passes.attention_adapters import most_runs
from rksc_sgl.sglang_plugin.passes.claims import Batch
from rksc_sgl.sglang_plugin.passes.heard_queries import HeardQueries
from rksc_sgl.sglang_plugin.passes.packing import joined_over
from rksc_sgl.sglang_plugin.passes.split_pass import probe_layers
from rksc_sgl.sglang_plugin.passes.taking_over import deviations, take_over
from rksc_sgl.sglang_plugin.passes.transfers import to_device
from rksc_sgl.sglang_plugin.tree import resident_slots

LEAST_CANDIDATES = 32  # of one forward pass; fewer are not worth a pass of their own


@dataclass(frozen=True, eq=False)
class BlendJob:
    """One sequence of an extend batch that takes over KV. All of it is on the host.

    Attributes:
        place: its place in the batch.
        state: of its request.
        plan: from placement.
        source: int64 ``[n]`` positions in the donor of its new tokens, -1 where the donor has none.
        always: bool ``[n]``, computed whatever they moved; of the whole prompt, so that chunks break nothing.
        slots: ``[m]`` of all its tokens until the end of the pass, the new ones last.
        asking: int64 ``[w]``, those of its new tokens that say what they attend to.
        stays: bool ``[n]``, new tokens that stand at the very positions at which they do in the donor.
    """

    place: int
    state: BranchState
    plan: BlendPlan
    source: NDArray[np.int64]
    always: NDArray[np.bool_]
    slots: torch.Tensor
    asking: NDArray[np.int64]
    stays: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Compared:
    """A sequence beside its donor, after the probe; on the host.

    Attributes:
        candidate: ``[n]`` bool, new tokens that the donor has.
        computed: ``[n]`` bool, those that must be computed, the same on every rank.
        similar: 1 - mean deviation of the candidates.
    """

    candidate: torch.Tensor
    computed: torch.Tensor
    similar: float


class Blends:
    """The policy of branches that take over KV (:class:`~rksc_sgl.layer_passes.contract.PassPolicy`).

    Args:
        batch: of which they are.
        jobs: its sequences that take over KV.
        rows: their new tokens beside their donors', in this order.
        heard: the queries of their last tokens in the last layer of the probe.
    """

    probes = True

    def __init__(self, batch: Batch, jobs: Sequence[BlendJob], rows: DonorRows, heard: HeardQueries) -> None:
        self._batch, self._jobs, self._rows, self._heard = batch, jobs, rows, heard
        self._starts = [0, *accumulate(job.source.size for job in jobs)]
        self._allocator = batch.tree_cache.token_to_kv_pool_allocator
        self._stays = np.concatenate([job.stays for job in jobs])
        if shared_slots_of(self._allocator) is None:
            self._stays[:] = False

    def stops(self) -> Collection[int]:
        return (probe_layers(self._batch.runner),)

    def at_work(self) -> AbstractContextManager[None]:
        return self._heard.listening()

    def look(self, layer: int, layer_pass: LayerPass, there: Collection[int]) -> Decision:
        """What is computed of each blended sequence; the rest is taken over here."""
        moved = deviations(self._batch.runner, self._rows, layer)
        found = self._batch.agree(torch.stack((moved, self._attended(moved)))).cpu()
        parts = [part for part in zip(self._jobs, pairwise(self._starts), strict=True) if part[0].place in there]
        beside = [(job, begin, _compare(job, *found[:, begin:end])) for job, (begin, end) in parts]
        gap = joined_over(self._batch.runner)
        separate = [runs_of(one.computed, gap) for _, _, one in beside]
        runs = fewer_runs(separate, self._most_runs(len(there) - len(beside)))
        taken = []
        for (job, begin, compared), some in zip(beside, runs, strict=True):
            left = _outside(some, job.source.size)
            taken.append(begin + left.nonzero()[0])
            _report(job, compared, int(left.sum()), int(self._stays[taken[-1]].sum()), layer_pass.depth)
        self._take_over(np.concatenate(taken or [np.empty(0, dtype=np.int64)]), layer)
        return Decision(runs={job.place: some for (job, _, _), some in zip(beside, runs, strict=True)})

    def write(self, output: Any) -> None:
        """Nothing: the last token of a branch is always computed, and its logits are its own."""

    def _attended(self, like: torch.Tensor) -> torch.Tensor:
        """``[n]`` how much those of its sequence that ask attend to each row; all alike where none was heard."""
        found = self._heard.attention_received([(job.asking.size, job.slots) for job in self._jobs])
        if found is None:
            return torch.ones_like(like)
        parts = zip(self._jobs, found.split([job.slots.numel() for job in self._jobs]), strict=True)
        return torch.cat([part[-job.source.size :] for job, part in parts])

    def _most_runs(self, others: int) -> int | None:
        """How many runs the blended sequences may have together, beside so many others of the batch."""
        most = most_runs(self._batch.runner.attn_backend)
        return None if most is None else most - others

    def _take_over(self, taken: NDArray[np.int64], probe: int) -> None:
        """Use the donors' slots for those of these rows that stand where they do there, and copy the others' KV.

        A slot is one of every layer, so that what was computed of such a row in the probe is given up with its own.
        """
        stays = self._stays[taken]
        if not stays.all():
            (rows,) = to_device([taken[~stays]], self._rows.own.device)
            take_over(self._batch.runner, self._rows, rows, probe)
        if stays.any():
            self._use_slots(taken[stays])

    def _use_slots(self, taken: NDArray[np.int64]) -> None:
        requests, jobs = self._batch.requests, self._jobs
        first = self._batch.forward_batch.extend_prefix_lens_cpu
        table_rows = [np.full(job.source.size, requests[job.place].kv.req_pool_idx) for job in jobs]
        positions = [first[job.place] + np.arange(job.source.size) for job in jobs]
        where = (np.concatenate(part)[taken] for part in (table_rows, positions))
        rows, *places = to_device([taken, *where], self._rows.own.device)
        table = self._batch.schedule_batch.req_to_token_pool.req_to_token
        use_slots(self._allocator, table, (places[0], places[1]), self._rows.theirs[rows])


def _compare(job: BlendJob, deviation: torch.Tensor, attended: torch.Tensor) -> Compared:
    """What has to be computed of a sequence, by how far its values are from the donor's and what it attends to."""
    options, candidate = job.plan.options, torch.from_numpy(job.source >= 0)
    always = torch.from_numpy(job.always)
    chosen = to_compute(candidate, deviation, attended, always, threshold=options.deviation, share=options.recompute)
    return Compared(candidate, chosen, 1.0 - float(deviation[candidate].clamp(max=1.0).mean()))


def _outside(runs: Sequence[tuple[int, int]], length: int) -> NDArray[np.bool_]:
    """``[length]``, tokens that are in no run."""
    left: NDArray[np.bool_] = np.ones(length, dtype=np.bool_)
    for begin, end in runs:
        left[begin:end] = False
    return left


def _report(job: BlendJob, compared: Compared, taken: int, shared: int, layers: float) -> None:
    moved = int((compared.computed & compared.candidate).sum())
    _count(job.state.sharing, taken, job.source.size, moved, compared.similar, layers)
    job.state.sharing.shared_slots = (job.state.sharing.shared_slots or 0) + shared


def claim(batch: Batch) -> Blends | None:
    """The sequences of a batch that have a plan and whose donor is still there; others say why not."""
    jobs, slots, found = [], [], _DonorSlots(batch.tree_cache)
    for place, req in enumerate(batch.requests):
        if req.rksc is None or req.rksc.blend is None:
            continue
        theirs = found.of(req, req.rksc.blend)
        job = batch.refusal or _job(batch, place, req, req.rksc.blend, theirs.numel())
        if isinstance(job, BlendJob):
            jobs.append(job)
            slots.append(theirs)
        elif not req.rksc.sharing.taken_tokens:  # a short last chunk is not reported as declined
            req.rksc.sharing.decline(job)
    return Blends(batch, jobs, *_rows_of(batch, jobs, slots)) if jobs else None


class _DonorSlots:
    """Slots of the donors of a batch; siblings have one donor."""

    def __init__(self, tree_cache: Any) -> None:
        self._tree_cache = tree_cache
        self._known: dict[tuple[int, str | None, str | None], torch.Tensor] = {}

    def of(self, req: Any, plan: BlendPlan) -> torch.Tensor:
        """Slots of what the tree has of a donor, from its first token on."""
        key = (id(plan.donor), plan.extra_key, req.cache_salt)
        if key not in self._known:
            self._known[key] = resident_slots(self._tree_cache, plan.donor.tokens, plan.extra_key, req.cache_salt)
        return self._known[key]


def _job(batch: Batch, place: int, req: Any, plan: BlendPlan, resident: int) -> BlendJob | str:
    """What there is to take over, or why there is nothing; so many tokens of the donor are there."""
    begin = batch.forward_batch.extend_prefix_lens_cpu[place]
    length = batch.forward_batch.extend_seq_lens_cpu[place]
    known = plan.source[begin : begin + length]
    source = np.full(length, -1, dtype=np.int64)
    source[: known.size] = known  # tokens after the prompt, of a branch that was retracted, have no source
    source[source >= resident] = -1
    if int((source >= 0).sum()) < LEAST_CANDIDATES:
        return "too few of its new tokens are resident with its donor"
    always = np.zeros(length, dtype=np.bool_)
    always[: known.size] = plan.always[begin : begin + length]
    own = batch.schedule_batch.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : begin + length]
    complete = req.extend_end >= len(req.origin_input_ids)
    stays = source == begin + req.rksc.shift + np.arange(length)
    if req.beam_group is not None:
        stays[:] = False
    return BlendJob(place, req.rksc, plan, source, always, own, asking(length, complete=complete), stays)


def _rows_of(batch: Batch, jobs: Sequence[BlendJob], slots: Sequence[torch.Tensor]) -> tuple[DonorRows, HeardQueries]:
    """The new tokens of all jobs beside their donors', whose slots these are, and those of them to be heard."""
    whole = batch.forward_batch
    starts = [0, *accumulate(whole.extend_seq_lens_cpu)]
    donors = [0, *accumulate(one.numel() for one in slots)]
    here = [np.arange(starts[job.place], starts[job.place + 1]) for job in jobs]
    there = [first + job.source.clip(0) for first, job in zip(donors, jobs, strict=False)]
    new = [whole.extend_prefix_lens_cpu[job.place] + job.state.shift + np.arange(job.source.size) for job in jobs]
    old = [job.source.clip(0) for job in jobs]
    device = whole.out_cache_loc.device
    ask = [own[job.asking] for own, job in zip(here, jobs, strict=True)]
    places = [own[job.asking] - job.state.shift for own, job in zip(new, jobs, strict=True)]
    arrays = [np.concatenate(part) for part in (here, there, old, new, ask, places)]
    rows, sources, old_places, new_places, *heard = to_device(arrays, device)
    theirs = torch.cat([one.to(device, torch.int64) for one in slots])[sources]
    highest = max(int(part.max()) for part in (*new, *old))
    beside = DonorRows(whole.out_cache_loc[rows].to(torch.int64), theirs, old_places, new_places, highest)
    return beside, HeardQueries(batch.runner, probe_layers(batch.runner) - 1, *heard)


def _count(report: SharingReport, taken: int, tokens: int, moved: int, similar: float, probe: float) -> None:
    """Add one forward pass to what is said of a branch."""
    before, similarity = report.taken_tokens or 0, report.similarity or 0.0
    report.mode = "blend"
    report.taken_tokens = before + taken
    report.computed_tokens = (report.computed_tokens or 0) + tokens - taken
    report.recomputed_tokens = (report.recomputed_tokens or 0) + moved
    report.replaced_tokens = 0
    report.probe_layers = round(probe, 2)
    report.similarity = round((similarity * before + similar * taken) / max(1, before + taken), 4)
