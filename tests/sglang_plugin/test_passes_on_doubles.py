"""What a pass tells an attention backend, and what it asks of it, on doubles of SGLang's objects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rksc_sgl.blending.take_over import DonorRows
from rksc_sgl.donors.forks import Donor
from rksc_sgl.errors import RkscError
from rksc_sgl.layer_passes.contract import Run
from rksc_sgl.options import RequestOptions
from rksc_sgl.placement.values import BlendPlan, MergePlan
from rksc_sgl.sglang_plugin.branch_state import BranchState, Phase
from rksc_sgl.sglang_plugin.passes import common_values, taking_over
from rksc_sgl.sglang_plugin.passes.blends import BlendJob, Blends
from rksc_sgl.sglang_plugin.passes.claims import Batch
from rksc_sgl.sglang_plugin.passes.forward import shifted_positions
from rksc_sgl.sglang_plugin.passes.merges import BELOW_TAU, MergeJob, Merges
from rksc_sgl.sglang_plugin.passes.split_pass import SplitPass
from rksc_sgl.similarity.gate import pooled_similarity

TOKENS, LAYERS = 120, 4
ROTATIONS = [None] * LAYERS


class Pool:
    """Keys and values of a few slots."""

    def __init__(self, slots: int) -> None:
        self.keys = [torch.randn(slots, 2, 8) for _ in range(LAYERS)]
        self.values = [torch.randn(slots, 2, 8) for _ in range(LAYERS)]

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        return self.keys[layer]

    def get_value_buffer(self, layer: int) -> torch.Tensor:
        return self.values[layer]


class Tree:
    """Of a server whose slots have one owner."""

    token_to_kv_pool_allocator = object


PROBED: Any = SimpleNamespace(depth=2.0)


def job(place: int, every: int) -> BlendJob:
    """A sequence of which every so many tokens must be computed; its donor has all of it in other slots."""
    always = np.zeros(TOKENS, dtype=np.bool_)
    always[::every] = True
    options = RequestOptions(recompute=0.05)
    plan = BlendPlan(Donor("d", np.arange(TOKENS)), None, np.arange(TOKENS), always, options)
    slots = torch.arange(TOKENS) + (2 * place + 1) * TOKENS
    stays = np.ones(TOKENS, dtype=np.bool_)  # but slots have one owner here
    return BlendJob(place, BranchState(RequestOptions()), plan, np.arange(TOKENS), always, slots, np.arange(8), stays)


def rows_of(jobs: list[BlendJob]) -> DonorRows:
    """Each sequence in slots after those of its donor."""
    own = torch.cat([torch.arange(TOKENS) + (2 * one.place + 1) * TOKENS for one in jobs])
    positions = torch.arange(TOKENS).repeat(len(jobs))
    return DonorRows(own, own - TOKENS, positions, positions, TOKENS - 1)


def decided(
    monkeypatch: pytest.MonkeyPatch, jobs: list[BlendJob], backend: Any, there: int, pool: Pool | None = None
) -> dict[int, Any]:
    monkeypatch.setattr(taking_over, "rotation_in_layers", lambda model: ROTATIONS)
    config = SimpleNamespace(num_hidden_layers=LAYERS)
    pool = pool or Pool(2 * len(jobs) * TOKENS)
    runner = SimpleNamespace(model=None, model_config=config, token_to_kv_pool=pool, attn_backend=backend)
    batch = Batch(runner, None, SimpleNamespace(reqs=[], tree_cache=Tree()), "", lambda mask: mask)
    heard: Any = SimpleNamespace(attention_received=lambda sequences: None)  # all are attended to alike
    return dict(Blends(batch, jobs, rows_of(jobs), heard).look(2, PROBED, range(there)).runs)  # type: ignore[arg-type]


def test_a_backend_that_takes_few_sequences_gets_fewer_runs_and_nothing_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = decided(monkeypatch, [job(0, 10), job(1, 20)], SimpleNamespace(), there=5)
    assert [len(free[place]) for place in (0, 1)] == [13, 7]
    jobs, limited = (
        [job(0, 10), job(1, 20)],
        SimpleNamespace(kv_indptr=torch.zeros(13)),
    )  # takes 12 sequences, of which 3 are others'
    runs = decided(monkeypatch, jobs, limited, there=5)
    assert sum(map(len, runs.values())) == 9
    for one in jobs:
        covered = torch.zeros(TOKENS, dtype=torch.bool)
        for begin, end in runs[one.place]:
            covered[begin:end] = True
        assert bool(covered[torch.from_numpy(one.always)].all()) and bool(covered[-1])
        assert one.state.sharing.taken_tokens == int((~covered).sum()) > 0


def test_what_was_not_computed_is_the_donors(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, pool = [job(0, 10), job(1, 30)], Pool(4 * TOKENS)
    pool.values[1][TOKENS : 2 * TOKENS] = pool.values[1][:TOKENS]  # nothing of the first one moved
    before, rows = [values.clone() for values in pool.values], rows_of(jobs)
    runs = decided(monkeypatch, jobs, SimpleNamespace(), there=2, pool=pool)
    taken = torch.ones(2 * TOKENS, dtype=torch.bool)
    for place, some in runs.items():
        for begin, end in some:
            taken[place * TOKENS + begin : place * TOKENS + end] = False
    assert taken[:TOKENS].sum() > 50, "most of the first one is taken over"
    for layer in range(LAYERS):
        same = torch.equal(pool.values[layer][rows.own[taken]], before[layer][rows.theirs[taken]])
        assert same == (layer >= 2), "the first layers are the branch's own"
        assert torch.equal(pool.values[layer][rows.own[~taken]], before[layer][rows.own[~taken]])


class FlashInferAttnBackend:
    """As far as a pass knows it: it reads before it writes, unless it is told to use its paged path."""

    use_paged = False


def split_pass(backend: Any, **fields: Any) -> tuple[SplitPass, list[bool]]:
    seen: list[bool] = []
    runner = SimpleNamespace(model_config=SimpleNamespace(num_hidden_layers=LAYERS), attn_backend=backend)
    forward_batch = SimpleNamespace(extend_seq_lens_cpu=[3, 2], **fields)

    def run(part: Any, **kwargs: Any) -> None:
        seen.append(getattr(backend, "use_paged", None))

    return SplitPass(runner, forward_batch, run), seen


def test_flashinfer_writes_first_where_sequences_go_on_in_runs_and_only_there() -> None:
    backend = FlashInferAttnBackend()
    layer_pass, seen = split_pass(backend)
    layer_pass.run_to(2)
    layer_pass.current = SimpleNamespace()  # as after it was narrowed
    layer_pass.run_to(3)
    assert seen == [False, True] and not backend.use_paged


def test_a_batch_that_must_not_lose_rows_is_not_narrowed() -> None:
    names = (
        *("attn_tp_sequence_sharded", "_original_num_tokens", "attn_cp_metadata", "attn_dcp_metadata", "dcp_kv_mask"),
        *("origin_out_cache_loc", "multi_item_delimiter_indices", "token_indices_to_pool", "decision_layouts"),
        *("model_specific_states", "residual", "mamba_track_indices", "out_cache_loc_dsv4"),
    )
    layer_pass, _ = split_pass(SimpleNamespace(), **{**dict.fromkeys(names), "mamba_track_indices": torch.zeros(1)})
    with pytest.raises(RkscError, match="recurrent state"):
        layer_pass.narrow([Run(0, 0, 3)])


def merge_job(place: int, own: torch.Tensor, theirs: torch.Tensor, tau: float, centre: torch.Tensor) -> MergeJob:
    state = BranchState(RequestOptions(), phase=Phase.PROBING)
    state.merge = MergePlan(Donor(f"donor {place}", np.arange(9)), None, None, tau, centre)
    return MergeJob(place, state, state.merge, own, theirs)


def test_merges_of_a_batch_are_decided_by_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common_values, "tp_group", lambda: SimpleNamespace(world_size=1))
    pool, transfers = Pool(60), []
    pool.values[0][20:29], pool.values[1][20:29] = pool.values[0][:9], pool.values[1][:9]
    centre = torch.zeros(2, 16)
    jobs = [
        merge_job(0, torch.arange(20, 29), torch.arange(9), 0.9, centre),  # values as its donor's
        merge_job(3, torch.arange(40, 52), torch.arange(9), 0.9, centre),
    ]
    runner = SimpleNamespace(token_to_kv_pool=pool)
    batch = Batch(runner, None, SimpleNamespace(reqs=[]), "", lambda found: transfers.append(found) or found)
    decision = Merges(batch, jobs).look(2, PROBED, range(4))  # type: ignore[arg-type]
    assert decision.leaving == {0} and len(transfers) == 1
    assert jobs[0].state.phase is Phase.MERGED and jobs[0].state.sharing.similarity == pytest.approx(1.0)
    assert jobs[1].state.merge is None and jobs[1].state.sharing.declined == BELOW_TAU
    assert -1.0 < (jobs[1].state.sharing.similarity or 1.0) < 0.9
    theirs, own = (common_values.pooled_values(pool, slots, 2) for slots in (jobs[1].theirs, jobs[1].own))
    assert jobs[1].state.sharing.similarity == round(pooled_similarity(theirs, own, centre), 4)


@pytest.mark.parametrize(("decode", "tail"), [(True, 0), (True, 3), (False, 0)])
def test_shifted_tokens_stand_later_and_nobody_else_does_and_only_within_the_pass(decode: bool, tail: int) -> None:
    requests = [
        SimpleNamespace(rksc=None),
        SimpleNamespace(rksc=BranchState(RequestOptions(), shift=7)),
        SimpleNamespace(rksc=BranchState(RequestOptions())),
    ]
    sizes = [1, 1, 1] if decode else [2, 3, 1]
    rows = sum(sizes) + tail  # other beams of requests come after all requests
    places = torch.arange(rows, dtype=torch.int64)
    batch = SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: decode), extend_seq_lens_cpu=sizes, positions=places
    )
    later = [0] * sizes[0] + [7] * sizes[1] + [0] * (sizes[2] + tail)
    with shifted_positions(batch, requests):
        assert (batch.positions - places).tolist() == later and batch.positions.dtype == places.dtype
    assert batch.positions is places, "sampling with a seed takes the places"
    with shifted_positions(batch, requests[:1]):
        assert batch.positions is places
