"""Rows of few sequences, attended together, next to attention written out run by run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rksc_sgl.cpu_platform.attention.backend import RkscCpuAttnBackend
from rksc_sgl.cpu_platform.attention.packed import PackedRows
from rksc_sgl.cpu_platform.attention.reference import reference_attention
from rksc_sgl.layer_passes.contract import Run
from rksc_sgl.sglang_plugin.passes.packing import CpuPacking, joined_over, packing_for
from tests.cpu_platform.test_attention_backend import DIM, HEADS, SCALE, fill, make_layer, make_runner

RUNS = [Run(0, 3, 5), Run(0, 40, 41), Run(0, 90, 99), Run(1, 0, 1), Run(2, 7, 30), Run(2, 31, 32)]
PREFIXES = {0: 20, 1: 0, 2: 5}  # tokens before a sequence's new ones
ROWS = {0: 2, 1: 4, 2: 1}  # of the table of slots


def batch() -> Any:
    prefixes = [PREFIXES[run.place] + run.begin for run in RUNS]
    return SimpleNamespace(
        extend_prefix_lens_cpu=prefixes, req_pool_indices=torch.tensor([ROWS[run.place] for run in RUNS])
    )


@pytest.mark.parametrize("v_dim", [DIM, 8])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_each_row_sees_its_own_sequence_up_to_itself(v_dim: int, dtype: torch.dtype, close: float) -> None:
    runner = make_runner(v_dim=v_dim, dtype=dtype)
    fill(runner)
    backend = runner.attn_backend = RkscCpuAttnBackend(runner)
    runner.model = torch.nn.ModuleList([make_layer(v_head_dim=v_dim)])
    rows = sum(run.end - run.begin for run in RUNS)
    queries = torch.randn(rows, HEADS, DIM)
    packing = packing_for(runner, batch(), RUNS)
    assert isinstance(packing, CpuPacking)
    layer, forward_batch = runner.model[0], SimpleNamespace()
    with packing.in_use():
        assert isinstance(backend.packed, PackedRows)
        found = backend._read(queries, layer, forward_batch).view(rows, HEADS, v_dim)
    assert backend.packed is None
    expected = reference_attention(
        queries,
        runner.token_to_kv_pool.get_key_buffer(1).float(),
        runner.token_to_kv_pool.get_value_buffer(1).float(),
        runner.req_to_token_pool.req_to_token,
        batch().req_pool_indices.tolist(),
        batch().extend_prefix_lens_cpu,
        [run.end - run.begin for run in RUNS],
        scale=SCALE,
    )
    torch.testing.assert_close(found, expected, atol=close, rtol=close)


def test_sequences_that_go_on_in_one_piece_are_planned_as_ever() -> None:
    runner = make_runner()
    runner.attn_backend = RkscCpuAttnBackend(runner)
    runner.model = torch.nn.ModuleList([make_layer()])
    assert packing_for(runner, batch(), [Run(0, 3, 9), Run(2, 0, 4)]) is None
    assert joined_over(runner) == 0
    assert joined_over(SimpleNamespace(attn_backend=SimpleNamespace())) > 0


@pytest.mark.parametrize("other", [{"sliding_window_size": 7}, {"logit_cap": 30.0}])
def test_a_model_with_windows_or_caps_attends_run_by_run(other: dict[str, float]) -> None:
    runner = make_runner()
    runner.attn_backend = RkscCpuAttnBackend(runner)
    runner.model = torch.nn.ModuleList([make_layer(), make_layer(**other)])
    assert packing_for(runner, batch(), RUNS) is None
    assert joined_over(runner) > 0


def test_the_backend_is_left_as_it_was_where_a_pass_fails() -> None:
    runner = make_runner()
    fill(runner)
    runner.attn_backend = RkscCpuAttnBackend(runner)
    with pytest.raises(ZeroDivisionError), CpuPacking(runner, batch(), RUNS).in_use():
        _ = 1 / 0
    assert runner.attn_backend.packed is None
