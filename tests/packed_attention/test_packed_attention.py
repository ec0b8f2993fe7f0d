"""Attention of packed queries: its tiles, its oracle, and the GPUs' launch in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from rksc_sgl.packed_attention.layout import Queries, lay_out
from rksc_sgl.packed_attention.reference import plain_attention
from tests.interpreter import interpreted


@given(st.lists(st.sets(st.integers(0, 300), min_size=1), min_size=1, max_size=4), st.sampled_from([1, 16, 64]))
def test_every_query_is_in_one_tile_of_its_own_sequence(positions: list[set[int]], queries: int) -> None:
    sequences = [Queries(7 * row, np.array(sorted(some))) for row, some in enumerate(positions)]
    layout = lay_out(sequences, queries, kv_heads=2, programs=64)
    rows = np.concatenate([np.arange(first, first + count) for first, count, *_ in layout.tiles])
    assert rows.tolist() == list(range(sum(map(len, positions))))
    owners = np.repeat([7 * row for row in range(len(positions))], [len(some) for some in positions])
    for first, count, row, last in layout.tiles:
        assert 1 <= count <= queries and set(owners[first : first + count]) == {row}
        assert last == layout.positions[first : first + count].max()


def test_keys_are_read_in_parts_only_where_there_are_few_tiles() -> None:
    few, many = [Queries(0, np.arange(5))], [Queries(0, np.arange(900))]
    assert lay_out(few, 16, 2, programs=64).splits == 8
    assert lay_out(many, 16, 2, programs=64).splits == 1


def test_the_oracle_is_causal_attention_where_every_token_is_computed() -> None:
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(20, heads, 16) for heads in (4, 2, 2))
    slots = torch.randperm(20)[None]
    found = plain_attention(queries, keys, values, slots, [Queries(0, np.arange(20))], scale=0.3)
    q, k, v = queries.transpose(0, 1), keys[slots[0]].transpose(0, 1), values[slots[0]].transpose(0, 1)
    expected = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, expected[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_the_launch_of_gpus_is_the_plain_attention_in_the_interpreter() -> None:
    assert "12 batches, keys in up to 8 parts" in interpreted(Path(__file__).with_name("interpreted_attention.py"))
