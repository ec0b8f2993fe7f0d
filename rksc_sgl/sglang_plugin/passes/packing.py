"""Attention of a narrowed batch by its sequences: where they are, the runs of one sequence read its keys together.

Without it a run of computed tokens is a sequence of its own to the backend and reads its whole prefix for itself. On
the CPU platform it is what narrowed batches do (:mod:`rksc_sgl.cpu_platform.attention.packed`). On SGLang's Triton
backend it is one operation a layer (:mod:`rksc_sgl.packed_attention`), which was not run on a GPU, and so it is off
unless the server was started with ``--rksc-packed-attention``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch

from rksc_sgl.blending.plan import GAP
from rksc_sgl.cpu_platform.attention.backend import RkscCpuAttnBackend
from rksc_sgl.cpu_platform.attention.packed import PackedRows
from rksc_sgl.layer_passes.contract import Run
from rksc_sgl.packed_attention.layout import Queries, lay_out
from rksc_sgl.packed_attention.proof import difference_from_plain
from rksc_sgl.packed_attention.switch import is_asked_for
from rksc_sgl.sglang_plugin.passes.attention_adapters import extending_backend

logger = logging.getLogger(__name__)

BACKENDS = {"TritonAttnBackend"}
PROGRAMS_A_CORE = 2  # of a device, that lay_out cuts keys for


class Packing(Protocol):
    """The attention of one narrowed batch."""

    def in_use(self) -> AbstractContextManager[None]:
        """The backend computes it within."""


class CpuPacking:
    """On the CPU platform.

    Args:
        runner: SGLang's ``ModelRunner``.
        batch: the narrowed ``ForwardBatch``, a sequence for each run.
        runs: its runs, in order.
    """

    def __init__(self, runner: Any, batch: Any, runs: Sequence[Run]) -> None:
        self._backend, table = runner.attn_backend, runner.req_to_token_pool.req_to_token
        sequences = queries_of(runs, batch.extend_prefix_lens_cpu, batch.req_pool_indices.tolist())
        self._packed = PackedRows([(table[one.table_row], torch.from_numpy(one.positions)) for one in sequences])

    @contextmanager
    def in_use(self) -> Iterator[None]:
        self._backend.packed = self._packed
        try:
            yield
        finally:
            self._backend.packed = None


class TritonPacking:
    """On SGLang's Triton backend.

    Args:
        runner: SGLang's ``ModelRunner``, against which :func:`refusal_of_packing` has nothing.
        batch: the narrowed ``ForwardBatch``, a sequence for each run.
        runs: its runs, in order.
    """

    def __init__(self, runner: Any, batch: Any, runs: Sequence[Run]) -> None:
        from rksc_sgl.packed_attention.kernel import Blocks, DeviceLayout

        self._backend, self._batch = extending_backend(runner.attn_backend), batch
        self._pool, self._table = runner.token_to_kv_pool, runner.req_to_token_pool.req_to_token
        keys = self._pool.get_key_buffer(0)
        self._blocks = Blocks.of(query_heads_of(runner), keys.shape[1], keys.shape[2])
        rows = batch.req_pool_indices if batch.req_pool_indices_cpu is None else batch.req_pool_indices_cpu
        sequences = queries_of(runs, batch.extend_prefix_lens_cpu, rows.tolist())
        layout = lay_out(sequences, self._blocks.queries, keys.shape[1], PROGRAMS_A_CORE * _cores(keys.device))
        self._layout = DeviceLayout.of(layout, keys.device)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The backend extends with it inside."""
        self._backend.forward_extend = self.forward_extend
        try:
            yield
        finally:
            del self._backend.forward_extend

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **more: Any,
    ) -> torch.Tensor:
        """``[rows, query_heads * value_size]``; keys and values of the batch are written before any is read."""
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        from rksc_sgl.packed_attention.kernel import packed_attention

        asked = [name for name, value in more.items() if value is not None]
        assert forward_batch is self._batch and not asked, f"packed attention knows nothing of {asked}"
        if save_kv_cache:
            self._pool.set_kv_buffer(layer, KVWriteLoc.for_batch(forward_batch), k, v)
        window = layer.sliding_window_size
        out = packed_attention(
            q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
            self._pool.get_key_buffer(layer.layer_id),
            self._pool.get_value_buffer(layer.layer_id),
            self._table,
            self._layout,
            self._blocks,
            scale=layer.scaling,
            window=window if window is not None and window > -1 else None,
            cap=layer.logit_cap or 0.0,
        )
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)


def query_heads_of(runner: Any) -> int:
    """Of one rank."""
    from sglang.srt.runtime_context import get_parallel

    return runner.model_config.num_attention_heads // get_parallel().attn_tp_size


def queries_of(runs: Sequence[Run], prefixes: Sequence[int], table_rows: Sequence[int]) -> list[Queries]:
    """The computed tokens of each sequence.

    Args:
        runs: in the order of the batch; those of a sequence one after another.
        prefixes: position of the first token of each run.
        table_rows: ``[runs]`` their sequences' rows in the table of slots.
    """
    positions: dict[int, list[np.ndarray]] = {}
    rows: dict[int, int] = {}
    for run, prefix, row in zip(runs, prefixes, table_rows, strict=True):
        positions.setdefault(run.place, []).append(prefix + np.arange(run.end - run.begin))
        rows[run.place] = row
    return [Queries(rows[place], np.concatenate(parts)) for place, parts in positions.items()]


def refusal_of_packing(runner: Any) -> str:
    """Why a server's narrowed batches cannot be computed so; empty if they can."""
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    backend = extending_backend(runner.attn_backend)
    kind = type(backend).__name__
    if kind not in BACKENDS:
        return f"{kind} keeps its own; packed attention is for {' and '.join(sorted(BACKENDS))}"
    layers = [one for one in runner.model.modules() if isinstance(one, RadixAttention)]
    # fmt: off
    unsupported = {
        "deterministic inference has a kernel of its own": getattr(backend, "enable_deterministic", False),
        "context parallelism splits keys over the ranks": getattr(backend, "dcp_size", 1) > 1,
        "latent keys (MLA)": getattr(backend, "use_mla", False),
        "slots of their own for sliding windows": getattr(backend, "use_sliding_window_kv_pool", False),
        "attention that is not causal": any(
            one.is_cross_attention or one.attn_type != AttentionType.DECODER for one in layers
        ),
        "scaled keys and values": any(one.k_scale is not None or one.v_scale is not None for one in layers),
        "a temperature that depends on the position": any(one.xai_temperature_len > 0 for one in layers),
        "heads that differ between layers": len({(one.qk_head_dim, one.tp_k_head_num) for one in layers}) > 1,
        "attention sinks": any(hasattr(one, "sinks") for one in runner.model.modules()),
    }
    # fmt: on
    return next((reason for reason, found in unsupported.items() if found), "")


def joined_over(runner: Any) -> int:
    """So many tokens between two runs are computed rather than that there are two runs; 0 where all attend together."""
    return 0 if _attends_together(runner) else GAP


def packing_for(runner: Any, batch: Any, runs: Sequence[Run]) -> Packing | None:
    """The attention of a narrowed batch; None where the backend's own computes it, run by run."""
    if len(runs) > len({run.place for run in runs}) and _attends_together(runner):
        return CpuPacking(runner, batch, runs)
    if not is_asked_for():
        return None
    if runner.model not in _refusals:
        _refusals[runner.model] = refusal_of_packing(runner) or _difference(runner)
        if _refusals[runner.model]:
            logger.warning("rksc: no packed attention: %s", _refusals[runner.model])
    return None if _refusals[runner.model] else TritonPacking(runner, batch, runs)


def _attends_together(runner: Any) -> bool:
    """Whether several runs of one sequence attend together on our CPU backend."""
    backend = runner.attn_backend
    return type(backend) is RkscCpuAttnBackend and backend.packs(runner.model)


def _difference(runner: Any) -> str:
    """Why packed attention is not what it should be on this device; empty if it is."""
    try:
        return difference_from_plain(runner.token_to_kv_pool.get_key_buffer(0), query_heads_of(runner))
    except Exception as error:  # of a compiler or a driver: whatever it is, it would end the server in a pass
        return f"{type(error).__name__}: {error}"


@cache
def _cores(device: torch.device) -> int:
    """Of a device, that run programs at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


_refusals: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # by model, whose modules are many
