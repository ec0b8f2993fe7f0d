"""Planned attention against attention written out, for any batch that hypothesis can think of."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rksc_sgl.cpu_platform.attention.cover import TileCosts
from rksc_sgl.cpu_platform.attention.kernels import LogitRule, Workspace, planned_attention
from rksc_sgl.cpu_platform.attention.plan import AttentionPlan, HeadShape, build_plan
from rksc_sgl.cpu_platform.attention.reference import reference_attention
from rksc_sgl.cpu_platform.attention.sequences import batch_sequences
from rksc_sgl.errors import OptionError

POOL_SLOTS = 1536
CONTEXT = 320

# Costs that force the layouts which small batches would not choose on their own.
EVERYTHING_TOGETHER = TileCosts(tile=1e9)
SHARED_APART = TileCosts(tile=1, merge=0, gather=1, run=8)
READS_ARE_DEAR = TileCosts(tile=1, read=1e6, run=16)
NO_MASKS = TileCosts(tile=1, max_mask=0)
ALL_COSTS = [TileCosts(), EVERYTHING_TOGETHER, SHARED_APART, READS_ARE_DEAR, NO_MASKS]


@dataclass(frozen=True)
class Batch:
    """Rows of req_to_token and what is asked of them."""

    table: torch.Tensor  # [rows, CONTEXT] int32
    pool_rows: list[int]
    prefix_lens: list[int]
    extend_lens: list[int]

    @property
    def rows(self) -> int:
        return sum(self.extend_lens)


@dataclass(frozen=True)
class Layer:
    kv_heads: int = 2
    group: int = 3
    qk_dim: int = 16
    v_dim: int = 16
    scale: float = 0.3
    window: int | None = None
    cap: float = 0.0

    @property
    def heads(self) -> HeadShape:
        return HeadShape(self.kv_heads * self.group, self.kv_heads)


def check(batch: Batch, layer: Layer, *, costs: TileCosts | None = None, threads: int = 2) -> AttentionPlan:
    """Run the plan and compare it with the reference; gives the plan for further checks."""
    torch.manual_seed(0)
    q = torch.randn(batch.rows, layer.heads.query_heads, layer.qk_dim)
    k = torch.randn(POOL_SLOTS, layer.kv_heads, layer.qk_dim)
    v = torch.randn(POOL_SLOTS, layer.kv_heads, layer.v_dim)
    lists = (batch.pool_rows, batch.prefix_lens, batch.extend_lens)
    plan = build_plan(
        batch_sequences(batch.table, *lists), layer.heads, window=layer.window, threads=threads, costs=costs
    )
    out = torch.full((batch.rows, layer.heads.query_heads, layer.v_dim), float("nan"))
    planned_attention(plan, q, k, v, LogitRule(layer.scale, layer.cap), out, Workspace())
    expected = reference_attention(
        q, k, v, batch.table, *lists, scale=layer.scale, window=layer.window, logit_cap=layer.cap
    )
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)
    return plan


def reads(plan: AttentionPlan) -> int:
    """Keys that a plan reads from the pool."""
    return sum(tile.sequences * tile.parts * tile.width for tile in plan.tiles)


class Slots:
    """Hands out pool slots page by page, in pool order or shuffled."""

    def __init__(self, page_size: int, shuffled: bool) -> None:
        pages = torch.randperm(POOL_SLOTS // page_size - 1) if shuffled else torch.arange(POOL_SLOTS // page_size - 1)
        self._slots = ((pages + 1)[:, None] * page_size + torch.arange(page_size)).reshape(-1)
        self._page_size, self._next = page_size, 0

    def take(self, count: int) -> torch.Tensor:
        first = self._next
        self._next += -(-count // self._page_size) * self._page_size
        return self._slots[first : first + count].int()


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Up to six sequences: unrelated, sharing part of another one's prefix (nested too), or on another's row."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    slots = Slots(draw(st.sampled_from([1, 16])), draw(st.booleans()))
    count = draw(st.integers(1, 6))
    table = torch.zeros(count, CONTEXT, dtype=torch.int32)
    lengths: list[int] = []
    pool_rows, prefix_lens, extend_lens = [], [], []
    for row in range(count):
        length = draw(st.one_of(st.integers(1, 12), st.integers(1, 220)))
        relation = draw(st.sampled_from(["unrelated", "shares", "shares", "same row"])) if row else "unrelated"
        other = draw(st.integers(0, row - 1)) if row else 0
        common = draw(st.integers(0, min(lengths[other], length - 1))) if relation == "shares" else 0
        table[row, :common] = table[other, :common]
        table[row, common:length] = slots.take(length - common)
        lengths.append(length)
        pool_row = other if relation == "same row" else row
        asked = draw(st.integers(1, lengths[pool_row]))
        extend = draw(st.sampled_from([1, 1, min(asked, 9), asked, asked // 2]))
        pool_rows.append(pool_row)
        prefix_lens.append(asked - extend)
        extend_lens.append(extend)
    if sum(extend_lens) == 0:
        prefix_lens[0], extend_lens[0] = 0, 1
    return Batch(table, pool_rows, prefix_lens, extend_lens)


layers = st.builds(
    Layer,
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3, 4]),
    qk_dim=st.sampled_from([16, 24]),
    v_dim=st.sampled_from([16, 16, 8]),
    scale=st.sampled_from([0.25, 1.0]),
    window=st.sampled_from([None, None, 0, 7, 64]),
    cap=st.sampled_from([0.0, 0.0, 2.5]),
)


@given(batch=batches(), layer=layers, costs=st.sampled_from(ALL_COSTS), threads=st.sampled_from([1, 2, 8]))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_batch_gets_the_attention_that_is_written_out(batch, layer, costs, threads):
    check(batch, layer, costs=costs, threads=threads)


def branches(count: int, prefix: int, tails: list[int], extend: int = 1, *, interleaved: bool = True) -> Batch:
    """Sequences on one shared prefix in consecutive slots; their tails come alternately, as decoding fills them."""
    table = torch.zeros(count, CONTEXT, dtype=torch.int32)
    table[:, :prefix] = torch.arange(1, prefix + 1)
    slot = prefix + 1
    order = (
        [(t, b) for t in range(max(tails)) for b in range(count)]
        if interleaved
        else [(t, b) for b in range(count) for t in range(max(tails))]
    )
    for position, branch in order:
        if position < tails[branch]:
            table[branch, prefix + position] = slot
            slot += 1
    return Batch(table, list(range(count)), [prefix + tail - extend for tail in tails], [extend] * count)


@pytest.mark.parametrize("costs", ALL_COSTS[:3], ids=["measured", "together", "apart"])
def test_decoding_branches_read_their_shared_prefix_once(costs):
    tails = [5, 9, 3, 12, 12, 1, 7, 8]
    plan = check(branches(8, 250, tails), Layer(), costs=costs)
    assert 250 + sum(tails) <= reads(plan) <= 250 + 8 * max(tails) + plan.levels


def test_short_extends_of_branches_read_their_shared_prefix_once():
    plan = check(branches(6, 240, [20] * 6, extend=20), Layer(), costs=SHARED_APART)
    assert reads(plan) < 2 * (240 + 6 * 20)


def test_branches_of_branches_read_every_stretch_once():
    batch = branches(4, 100, [130, 130, 130, 130])
    batch.table[1, :180] = batch.table[0, :180]
    batch.table[3, :160] = batch.table[2, :160]
    plan = check(batch, Layer(), costs=READS_ARE_DEAR)
    distinct = len({int(slot) for row in range(4) for slot in batch.table[row, :230]})
    assert distinct <= reads(plan) <= distinct + 2 * 20 + 2 * plan.levels


def test_consecutive_slots_are_read_in_place():
    plan = check(branches(1, 250, [9], interleaved=False), Layer())
    assert all(tile.index is None for tile in plan.tiles)


def test_a_cold_prefill_is_one_causal_tile_without_a_mask():
    plan = check(branches(1, 0, [300], extend=300), Layer())
    assert [(tile.causal, tile.mask) for tile in plan.tiles] == [(True, None)]


def test_a_windowed_cold_prefill_reads_keys_in_proportion_to_its_length():
    batch = branches(1, 0, [310], extend=310)
    plan = check(batch, Layer(window=16))
    assert reads(plan) <= 310 + 2 * 16


def test_runs_on_one_row_see_each_other_up_to_their_own_position():
    table = torch.zeros(1, CONTEXT, dtype=torch.int32)
    table[0, :300] = torch.arange(900, 1200)
    runs = Batch(table, [0, 0, 0], prefix_lens=[40, 150, 280], extend_lens=[12, 30, 20])
    for costs in ALL_COSTS:
        check(runs, Layer(), costs=costs)


def test_equal_first_slots_do_not_make_a_shared_prefix():
    batch = branches(2, 200, [3, 3])
    batch.table[1, 90] = 1400
    plan = check(batch, Layer(), costs=READS_ARE_DEAR)
    assert reads(plan) >= 90 + 2 * 113


def test_rows_keep_their_places_when_a_group_is_scattered_over_the_batch():
    batch = branches(4, 200, [4, 4, 4, 4])
    for stranger in (1, 3):
        batch.table[stranger, :204] = torch.arange(600, 804).int() + 300 * (stranger == 3)
    plan = check(batch, Layer(), costs=READS_ARE_DEAR)
    assert plan.order is not None


def test_sequences_without_rows_are_left_out():
    batch = branches(3, 40, [4, 4, 4])
    batch.extend_lens[1] = 0
    assert check(batch, Layer()).rows == 2


def test_an_empty_batch_has_an_empty_plan():
    plan = check(Batch(torch.zeros(1, 4, dtype=torch.int32), [], [], []), Layer())
    assert plan.rows == 0
    assert plan.tiles == ()


def test_keys_are_split_between_threads_where_heads_are_fewer():
    plan = check(branches(1, 300, [12]), Layer(kv_heads=1), threads=8, costs=TileCosts(run=8))
    assert plan.tiles[0].parts == 1, "too short to be split"
    table = torch.arange(1200, dtype=torch.int32).unsqueeze(0)
    plan = check(Batch(table, [0], [1199], [1]), Layer(kv_heads=1), threads=2)
    assert (plan.tiles[0].parts, plan.tiles[0].width) == (4, 300), "one row: parts of some 300 keys, two a thread"
    plan = check(Batch(table, [0], [1191], [9]), Layer(kv_heads=1), threads=2)
    assert plan.tiles[0].parts == 2, "many rows: no finer than the threads need"


def test_many_sequences_on_one_row_do_not_nest_without_bound():
    table = torch.zeros(1, 4200, dtype=torch.int32)
    table[0] = torch.arange(4200) % POOL_SLOTS
    ends = list(range(40, 4190, 35))
    plan = check(Batch(table, [0] * len(ends), ends, [1] * len(ends)), Layer(kv_heads=1, group=1))
    assert plan.rows == len(ends)


def test_a_pool_of_another_dtype_is_read_in_the_dtype_of_the_queries():
    batch = branches(3, 60, [5, 5, 5])
    lists = (batch.pool_rows, batch.prefix_lens, batch.extend_lens)
    layer = Layer()
    q = torch.randn(3, 6, 16)
    k, v = (torch.randn(POOL_SLOTS, 2, 16).bfloat16() for _ in range(2))
    out = torch.empty_like(q)
    plan = build_plan(batch_sequences(batch.table, *lists), layer.heads)
    planned_attention(plan, q, k, v, LogitRule(0.3), out, Workspace())
    expected = reference_attention(q, k, v, batch.table, *lists, scale=0.3)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


def test_half_precision_queries_are_close_to_the_reference():
    batch = branches(3, 250, [5, 6, 7])
    lists = (batch.pool_rows, batch.prefix_lens, batch.extend_lens)
    q = torch.randn(3, 6, 16).bfloat16()
    k, v = (torch.randn(POOL_SLOTS, 2, 16).bfloat16() for _ in range(2))
    expected = reference_attention(q, k, v, batch.table, *lists, scale=0.3)
    for costs in ALL_COSTS:
        out = torch.empty_like(q)
        plan = build_plan(batch_sequences(batch.table, *lists), HeadShape(6, 2), costs=costs)
        planned_attention(plan, q, k, v, LogitRule(0.3), out, Workspace())
        torch.testing.assert_close(out, expected, atol=2e-2, rtol=0)


def test_a_workspace_serves_gathers_of_any_size():
    workspace = Workspace()
    large = workspace.lend("keys", 8, 4, torch.float32)
    small = workspace.lend("keys", 2, 4, torch.float32)
    other = workspace.lend("values", 2, 4, torch.float32)
    assert small.data_ptr() == large.data_ptr() != other.data_ptr()
    assert workspace.lend("keys", 9, 4, torch.float32).shape == (9, 4)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (([0], [1, 2], [1]), "each sequence needs one of each"),
        (([0], [-1], [1]), "at least 0"),
        (([0], [10], [7]), "at most 16"),
    ],
)
def test_impossible_lengths_are_refused(lists, message):
    with pytest.raises(OptionError, match=message):
        batch_sequences(torch.zeros(1, 16, dtype=torch.int32), *lists)
