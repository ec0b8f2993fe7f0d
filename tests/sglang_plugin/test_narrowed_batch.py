"""Batches that go on with some of their rows: SGLang's own plan of KV slots, and every field of its batches."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
from sglang.srt.mem_cache.kv_loc_plan import IdSpace, IdSpaceKind
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from rksc_sgl.layer_passes.contract import Run
from rksc_sgl.sglang_plugin.passes import split_pass
from rksc_sgl.sglang_plugin.passes.narrowed_batch import FIELDS, bind_plan, refusal_of_narrowing

WINDOW = IdSpaceKind.SLIDING_WINDOW
SLOTS = torch.tensor([4, 5, 6, 10, 11, 12, 13])  # of two sequences with 3 and 4 new tokens
KEPT = torch.tensor([3, 4, 6])  # of the second sequence, in two runs


def translator(window_slots: torch.Tensor | None) -> Any:
    """SGLang's own, of a pool whose sliding-window part has other slots, or of a plain one."""
    result = object.__new__(KVIndexTranslator)
    result.is_translating = False
    result._spaces = {IdSpaceKind.FULL: IdSpace(key=(IdSpaceKind.FULL, None))}
    if window_slots is not None:
        result._spaces[WINDOW] = IdSpace(key=(WINDOW, 1), write=lambda slots: window_slots[slots])
    return result


def whole_batch(source: Any) -> ForwardBatch:
    batch = ForwardBatch(
        forward_mode=ForwardMode.SPLIT_PREFILL,
        batch_size=2,
        input_ids=torch.arange(7),
        req_pool_indices=torch.tensor([1, 2]),
        seq_lens=torch.tensor([5, 4]),
        out_cache_loc=SLOTS,
        seq_lens_sum=9,
        seq_lens_cpu=torch.tensor([5, 4]),
        positions=torch.tensor([2, 3, 4, 0, 1, 2, 3]),
        extend_seq_lens=torch.tensor([3, 4]),
        extend_prefix_lens=torch.tensor([2, 0]),
        extend_start_loc=torch.tensor([0, 3]),
        extend_seq_lens_cpu=[3, 4],
        extend_prefix_lens_cpu=[2, 0],
        extend_num_tokens=7,
    )
    source.own_plan(batch).bind(batch, source)
    return batch


def narrowed(full: ForwardBatch, rows: torch.Tensor = KEPT, ends: tuple[int, ...] = (2, 4)) -> ForwardBatch:
    """Rows of the second sequence, in runs that end at these lengths."""
    batch = copy.copy(full)
    batch.req_pool_indices = torch.full((len(ends),), 2)
    batch.seq_lens = batch.seq_lens_cpu = torch.tensor(ends)
    bind_plan(batch, full, rows)
    return batch


def test_rows_of_a_sliding_window_pool_are_written_into_their_own_slots() -> None:
    window_slots = torch.arange(40).flip(0)
    source = translator(window_slots)
    full = whole_batch(source)
    batch = narrowed(full)
    assert source.write_ids(batch, WINDOW).tolist() == window_slots[SLOTS[KEPT]].tolist()
    assert batch.out_cache_loc.tolist() == SLOTS[KEPT].tolist()


def test_the_plan_of_the_whole_batch_names_slots_of_other_rows() -> None:
    """What is wrong without :func:`bind_plan`: the plan goes along with the copy."""
    source = translator(torch.arange(40).flip(0))
    full = whole_batch(source)
    batch = copy.copy(full)
    batch.out_cache_loc = full.out_cache_loc[KEPT]
    assert source.write_ids(batch, WINDOW)[:3].tolist() == source.write_ids(full, WINDOW)[:3].tolist()


def test_reads_are_planned_for_the_runs_that_are_left() -> None:
    full = whole_batch(translator(None))
    batch = narrowed(full)
    assert batch.kv_loc_plan is not full.kv_loc_plan
    assert batch.kv_loc_plan.req_pool_indices.tolist() == [2, 2]
    assert batch.kv_loc_plan.seq_lens.tolist() == [2, 4]
    assert full.out_cache_loc.tolist() == SLOTS.tolist()
    assert full.kv_loc_plan.seq_lens.tolist() == [5, 4]


def test_a_batch_that_was_narrowed_can_be_narrowed_again() -> None:
    window_slots = torch.arange(40).flip(0)
    source = translator(window_slots)
    first = narrowed(whole_batch(source))
    again = narrowed(first, torch.tensor([2]), (4,))
    assert source.write_ids(again, WINDOW).tolist() == window_slots[SLOTS[KEPT][2:]].tolist()


def test_every_field_of_a_batch_is_accounted_for_once() -> None:
    assert {field.name for field in dataclasses.fields(ForwardBatch)} == set(FIELDS)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("attn_tp_sequence_sharded", True, "tensor-parallel ranks"),
        ("_original_num_tokens", 7, "tensor-parallel ranks"),
        ("attn_cp_metadata", SimpleNamespace(), "context parallelism"),
        ("attn_dcp_metadata", SimpleNamespace(), "context parallelism"),
        ("dcp_kv_mask", torch.ones(7), "context parallelism"),
        ("origin_out_cache_loc", SLOTS, "context parallelism"),
        ("multi_item_delimiter_indices", [torch.tensor([1])], "multi-item scoring"),
        ("token_indices_to_pool", [torch.tensor([1])], "pooling"),
        ("decision_layouts", [[1]], "pooling"),
        ("model_specific_states", {"positions": torch.arange(7)}, "beside the residual stream"),
        ("residual", torch.zeros(7, 4), "beside the residual stream"),
        ("mamba_track_indices", torch.tensor([1, 2]), "recurrent state"),
        ("out_cache_loc_dsv4", SimpleNamespace(), "compressed KV"),
    ],
)
def test_a_batch_with_states_that_cannot_be_narrowed_is_refused(field: str, value: Any, named: str) -> None:
    batch = whole_batch(translator(None))
    assert refusal_of_narrowing(batch) == ""
    setattr(batch, field, value)
    assert named in refusal_of_narrowing(batch)


def test_a_narrowed_batch_has_its_runs_as_sequences_and_comes_from_one_transfer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = whole_batch(translator(None))
    full.req_pool_indices_cpu, full.rids = torch.tensor([1, 2]), ["a", "b"]
    transfers = []
    original = split_pass.to_device
    monkeypatch.setattr(split_pass, "to_device", lambda *given: transfers.append(given) or original(*given))
    runs = [Run(0, 1, 3), Run(1, 0, 1), Run(1, 2, 4)]
    there = np.array([1, 2, 3, 5, 6])  # rows of the whole batch
    narrowed = split_pass._Narrowed.of(full, runs, there, np.array([0, 1, 2, 4, 5]))
    batch = narrowed.batch_of(full)
    assert len(transfers) == 1
    assert narrowed.kept.tolist() == [0, 1, 2, 4, 5] and narrowed.rows.tolist() == there.tolist()
    assert batch.input_ids.tolist() == there.tolist() and batch.positions.tolist() == [3, 4, 0, 2, 3]
    assert batch.out_cache_loc.tolist() == SLOTS[there].tolist()
    assert batch.req_pool_indices.tolist() == batch.req_pool_indices_cpu.tolist() == [1, 2, 2]
    assert batch.extend_prefix_lens.tolist() == batch.extend_prefix_lens_cpu == [3, 0, 2]
    assert batch.extend_seq_lens.tolist() == batch.extend_seq_lens_cpu == [2, 1, 2]
    assert batch.seq_lens.tolist() == batch.seq_lens_cpu.tolist() == [5, 1, 4] and batch.seq_lens_sum == 10
    assert batch.extend_start_loc.tolist() == [0, 2, 3]
    assert (batch.batch_size, batch.extend_num_tokens, batch.rids) == (3, 5, ["a", "b", "b"])
    assert full.seq_lens.tolist() == [5, 4] and full.batch_size == 2, "the whole batch is as it was"
