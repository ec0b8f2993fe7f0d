"""Attention backends that prompts go on in as several runs: SGLang's own FlashInfer code around kernels of torch."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rksc_sgl.sglang_plugin.passes.attention_adapters import (
    extending_backend,
    most_runs,
    refusal_of_runs,
    writing_first,
)

flashinfer_backend = pytest.importorskip("sglang.srt.layers.attention.flashinfer_backend")
HEADS, SIZE, SLOTS = 2, 4, 32
PREFIX, TAKEN = (0, 3), (6, 9)  # positions whose KV is in the pool already
RUNS = ((3, 6), (9, 12))  # positions that are computed, as two sequences


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> tuple[Any, Any]:
    """``[rows, heads, size]`` and the log-sum-exp; rows that see nothing are zero, with a weight of nothing."""
    scores = torch.einsum("qhd,khd->qhk", q, k) / math.sqrt(SIZE)
    scores = scores.masked_fill(~visible[:, None, :], -torch.inf)
    out = torch.einsum("qhk,khd->qhd", scores.softmax(-1).nan_to_num(), v).contiguous()
    return out, scores.logsumexp(-1)


class Ragged:
    """FlashInfer's wrapper for new tokens as they come."""

    def begin_forward(self, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, *_: Any, **__: Any) -> None:
        self.bounds = qo_indptr.tolist()

    def forward_return_lse(self, q: Any, k: Any, v: Any, *, causal: bool, **_: Any) -> tuple[Any, Any]:
        assert causal
        owner = torch.bucketize(torch.arange(len(q)), torch.tensor(self.bounds[1:]), right=True)
        order = torch.arange(len(q))
        return attention(q, k, v, (owner[:, None] == owner) & (order[:, None] >= order))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_return_lse(*args, **kwargs)[0]


class Paged:
    """FlashInfer's wrapper for what is in the pool."""

    is_cuda_graph_enabled = False

    def begin_forward(self, qo_indptr: Any, kv_indptr: Any, kv_indices: Any, *_: Any, **__: Any) -> None:
        self.queries, self.keys, self.slots = qo_indptr.tolist(), kv_indptr.tolist(), kv_indices.long()

    def forward_return_lse(self, q: Any, kv: Any, *, causal: bool, **_: Any) -> tuple[Any, Any]:
        parts = []
        for place in range(len(self.queries) - 1):
            rows = q[self.queries[place] : self.queries[place + 1]]
            slots = self.slots[self.keys[place] : self.keys[place + 1]]
            visible = torch.ones(len(rows), len(slots), dtype=torch.bool)
            if causal:
                visible = visible.tril(len(slots) - len(rows))
            parts.append(attention(rows, kv[0][slots], kv[1][slots], visible))
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_return_lse(*args, **kwargs)[0]


class Pool:
    def __init__(self) -> None:
        self.keys = torch.full((SLOTS, HEADS, SIZE), 9.0)  # what other requests left in the slots
        self.values = torch.full((SLOTS, HEADS, SIZE), 9.0)

    def get_kv_buffer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values

    def set_kv_buffer(self, layer: Any, loc: Any, k: torch.Tensor, v: torch.Tensor, *_: Any) -> None:
        self.keys[loc.loc], self.values[loc.loc] = k, v


class Translator:
    """A plain pool's: the slots of a request's row."""

    reads_are_translated = False

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    def pack_read_stream(
        self, plan: Any, *, req_pool_indices: Any, seq_lens: Any, indptr: Any, out: Any, **_: Any
    ) -> bool:
        for place, (row, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
            out[indptr[place] : indptr[place] + length] = self.table[row, :length]
        return False


def flashinfer(monkeypatch: pytest.MonkeyPatch, pool: Pool, table: torch.Tensor) -> Any:
    """SGLang's backend with kernels of torch; nothing of what decides the order of reading and writing is replaced."""

    def merged(o1: Any, s1: Any, o2: Any, s2: Any) -> tuple[Any, Any]:
        total = torch.logaddexp(s1, s2)
        return o1 * (s1 - total).exp()[..., None] + o2 * (s2 - total).exp()[..., None], total

    monkeypatch.setattr(flashinfer_backend, "_safe_merge_state", merged, raising=False)
    backend = object.__new__(flashinfer_backend.FlashInferAttnBackend)
    backend.__dict__.update(
        use_paged=False,
        is_multimodal=False,
        enable_mis=False,
        enable_deterministic=False,
        is_dllm_model=False,
        use_sliding_window_kv_pool=False,
        prefill_uses_dequant_workspace=False,
        num_wrappers=1,
        dispatch_reason=None,
        prefill_split_tile_size=None,
        kv_index_translator=Translator(table),
        token_to_kv_pool=pool,
        kv_cache_quant_method=SimpleNamespace(needs_global_scale=lambda: False),
        kv_indptr=[torch.zeros(5, dtype=torch.int32)],
        qo_indptr=[torch.zeros(5, dtype=torch.int32)],
        kv_last_page_len=torch.ones(4, dtype=torch.int32),
        prefill_wrapper_ragged=Ragged(),
        prefill_wrappers_paged=[Paged()],
    )
    updater = object.__new__(flashinfer_backend.FlashInferIndicesUpdaterPrefill)
    updater.__dict__.update(
        attn_backend=backend,
        num_qo_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=SIZE,
        data_type=torch.float32,
        q_data_type=torch.float32,
        kv_indptr=backend.kv_indptr,
        qo_indptr=backend.qo_indptr,
        kv_last_page_len=backend.kv_last_page_len,
        prefill_wrapper_ragged=backend.prefill_wrapper_ragged,
        update=updater.update_single_wrapper,
    )
    backend.indices_updater_prefill = updater
    return backend


class Blend:
    """One layer of a prompt of 12 tokens, of which two runs are computed and the rest is in the pool."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        self.k, self.v, self.q = (torch.randn(12, HEADS, SIZE) for _ in range(3))
        slots = torch.randperm(SLOTS)[:12]
        self.pool, table = Pool(), torch.zeros(2, 16, dtype=torch.int64)
        table[1, :12] = slots
        for begin, end in (PREFIX, TAKEN):
            self.pool.keys[slots[begin:end]] = self.k[begin:end]
            self.pool.values[slots[begin:end]] = self.v[begin:end]
        self.rows = torch.cat([torch.arange(*run) for run in RUNS])
        mode = flashinfer_backend.ForwardMode.SPLIT_PREFILL
        prefixes, ends = [begin for begin, _ in RUNS], [end for _, end in RUNS]
        self.batch = SimpleNamespace(
            forward_mode=mode,
            req_pool_indices=torch.tensor([1, 1]),
            seq_lens=torch.tensor(ends),
            seq_lens_cpu=torch.tensor(ends),
            seq_lens_sum=sum(ends),
            extend_prefix_lens=torch.tensor(prefixes),
            extend_prefix_lens_cpu=prefixes,
            encoder_lens=None,
            cross_attention_custom_mask=None,
            kv_loc_plan=None,
            out_cache_loc=slots[self.rows],
            out_cache_loc_is_physical=False,
        )
        self.backend = flashinfer(monkeypatch, self.pool, table)
        self.layer = SimpleNamespace(
            layer_id=0,
            logit_cap=0.0,
            scaling=1 / math.sqrt(SIZE),
            is_cross_attention=False,
            attn_type=flashinfer_backend.AttentionType.DECODER,
            sliding_window_size=-1,
            tp_q_head_num=HEADS,
            tp_k_head_num=HEADS,
            tp_v_head_num=HEADS,
            head_dim=SIZE,
            k_scale=None,
            v_scale=None,
            k_scale_float=None,
            v_scale_float=None,
        )

    def computed(self) -> torch.Tensor:
        rows = self.rows
        return self.backend.forward_extend(self.q[rows], self.k[rows], self.v[rows], self.layer, self.batch)

    def expected(self) -> torch.Tensor:
        positions = torch.arange(12)
        out, _ = attention(self.q[self.rows], self.k, self.v, self.rows[:, None] >= positions)
        return out.reshape(len(self.rows), -1)


def test_flashinfer_reads_slots_of_an_earlier_run_before_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong without us. When this fails, SGLang writes first, and :func:`writing_first` can go."""
    blend = Blend(monkeypatch)
    blend.backend.init_forward_metadata(blend.batch)
    difference = (blend.computed() - blend.expected()).abs().amax(1)
    assert difference[:3].max() < 1e-5, "the first run has its whole prefix in the pool"
    assert difference[3:].min() > 1e-2


def test_flashinfer_computes_a_later_run_right_where_it_is_told_to_write_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blend = Blend(monkeypatch)
    with writing_first(blend.backend):
        blend.backend.init_forward_metadata(blend.batch)
    assert torch.allclose(blend.computed(), blend.expected(), atol=1e-5)


def test_other_batches_of_flashinfer_keep_their_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    blend = Blend(monkeypatch)
    with pytest.raises(RuntimeError, match="in the middle"), writing_first(blend.backend):
        raise RuntimeError("in the middle")
    blend.backend.init_forward_metadata(blend.batch)
    assert blend.backend.forward_metadata.use_ragged


class TritonAttnBackend:
    def __init__(self, pool: int, windows: bool = False) -> None:
        self.kv_indptr, self.qo_indptr = torch.zeros(pool + 1), torch.zeros(pool + 1)
        self.window_kv_indptr = torch.zeros(pool + 1) if windows else None


class HybridAttnBackend:
    def __init__(self, prefill: Any, decode: Any) -> None:
        self.prefill_backend, self.decode_backend = prefill, decode


class Named:
    extend_dummy_seqs_capped_by_req_pool = True
    req_to_token_pool = SimpleNamespace(size=24)


def test_a_backend_takes_as_many_runs_as_its_smallest_index_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert most_runs(Blend(monkeypatch).backend) == 4
    assert most_runs(TritonAttnBackend(48, windows=True)) == 48
    assert most_runs(HybridAttnBackend(TritonAttnBackend(8), TritonAttnBackend(99))) == 8
    assert most_runs(Named()) == 24
    assert most_runs(object()) is None


def test_the_limit_is_where_sglang_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Blend(monkeypatch).backend
    for runs in (4, 5):
        batch = Blend(monkeypatch).batch
        ones = torch.ones(runs, dtype=torch.int64)
        batch.req_pool_indices, batch.seq_lens = ones, 4 * ones
        batch.extend_prefix_lens, batch.extend_prefix_lens_cpu = 3 * ones, [3] * runs
        if runs <= most_runs(backend):
            backend.init_forward_metadata(batch)
        else:
            with pytest.raises(RuntimeError):
                backend.init_forward_metadata(batch)


def test_the_backend_that_extends_is_found_in_a_mixed_one() -> None:
    inner = TritonAttnBackend(4)
    assert extending_backend(HybridAttnBackend(inner, Named())) is inner


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prefill_uses_dequant_workspace": True}, "4-bit KV"),
        ({"enable_mis": True}, "multi-item scoring"),
        ({"is_dllm_model": True}, "block diffusion"),
        ({"dispatch_reason": flashinfer_backend.WrapperDispatch.CROSS_ATTENTION}, "encoder"),
    ],
)
def test_flashinfer_is_refused_where_its_paged_path_does_not_write_first(
    change: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Blend(monkeypatch).backend
    assert refusal_of_runs(backend) == ""
    backend.__dict__.update(change)
    assert named in refusal_of_runs(backend)
    assert refusal_of_runs(HybridAttnBackend(backend, Named())) == refusal_of_runs(backend)
