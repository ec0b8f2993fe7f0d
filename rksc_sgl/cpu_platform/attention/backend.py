"""The attention backend ``rksc_cpu``: SGLang's batches in, planned attention out."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from rksc_sgl.cpu_platform.kv_pool import LazyMHATokenToKVPool
from rksc_sgl.memory.shared_slots import SharedSlots

from .common_first import CommonFirst
from .kernels import LogitRule, Workspace, planned_attention
from .packed import PackedRows
from .plan import AttentionPlan, HeadShape, build_plan
from .sequences import QuerySequence, batch_sequences

_PLANNED_MODES = frozenset({ForwardMode.DECODE, ForwardMode.EXTEND, ForwardMode.MIXED, ForwardMode.SPLIT_PREFILL})


@dataclass(frozen=True)
class _PlanKey:
    """What a plan depends on besides the batch."""

    heads: HeadShape
    window: int | None
    swa_slots: bool  # slots of the sliding-window sub-pool instead of the full one's


@dataclass(frozen=True, eq=False)
class _Kind:
    """What the attention of a layer needs to know of it."""

    key: _PlanKey
    rule: LogitRule

    @property
    def is_plain(self) -> bool:
        """Without a window and a cap."""
        return self.key.window is None and not self.key.swa_slots and not self.rule.cap


@dataclass(frozen=True, eq=False)
class BatchPlans:
    """Plans of one forward pass; the first layer of each kind builds its own.

    Attributes:
        batch: whose they are.
        plans: by kind of layer.
        reads: what a compiled layer stack has laid out for itself, by the stack.
    """

    batch: weakref.ref
    plans: dict[_PlanKey, AttentionPlan] = field(default_factory=dict)
    reads: dict[Any, Any] = field(default_factory=dict)

    def serves(self, forward_batch: Any) -> bool:
        return self.batch() is forward_batch


class RkscCpuAttnBackend(TorchNativeAttnBackend):
    """Reads every distinct key of a batch once; same constructor and calls as ``torch_native``.

    Handled here: causal self-attention in decode, extend, mixed and split prefill passes, with grouped heads,
    sliding windows (also in a pool with a sliding-window part, whose slots are translated), logit soft caps
    (which ``torch_native`` ignores) and values of another width than the keys.

    Left to ``torch_native``, as inherited: encoder-decoder batches (``encoder_lens``), cross-attention,
    encoder-only and bidirectional layers, and the passes of speculative decoding and diffusion models.

    Attributes:
        plain_pool: whether slots of the pool are rows that can be read and written as they are.
        packed: the rows of the passes that are running, by their sequences; None where a pass is planned.
    """

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._workspace = Workspace()
        self.packed: PackedRows | None = None
        self._common_first: CommonFirst | None = None
        pool = self.token_to_kv_pool
        self.plain_pool = type(pool) is LazyMHATokenToKVPool and not pool.use_hnd and pool.store_dtype == pool.dtype

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Forget the last pass's plans. The plans of this one are made by the first layers that need them."""
        super().init_forward_metadata(forward_batch)
        self.forward_metadata = BatchPlans(weakref.ref(forward_batch))

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """``[rows, q_heads * v_head_dim]``; keys and values of the batch are written before any is read."""
        if not _is_planned(layer, forward_batch):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """``[sequences, q_heads * v_head_dim]``."""
        if not _is_planned(layer, forward_batch):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        if save_kv_cache and k is not None and v is not None:
            self.write(k, v, layer, forward_batch)
        return self._read(q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim), layer, forward_batch)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any, forward_batch: Any) -> torch.Tensor:
        """:meth:`forward` for callers that have checked that the pass is planned.

        Args:
            q: ``[rows, q_heads, dim]``, turned to their positions.
            k, v: ``[rows, kv_heads, dim]``; written to the pool.

        Returns:
            ``[rows, q_heads * v_head_dim]``.
        """
        self.write(k, v, layer, forward_batch)
        return self._read(q, layer, forward_batch)

    def write(self, k: torch.Tensor, v: torch.Tensor, layer: Any, forward_batch: Any) -> None:
        """Put the rows' keys and values ``[rows, kv_heads, dim]`` into their slots."""
        pool, slots = self.token_to_kv_pool, forward_batch.out_cache_loc
        if not self.plain_pool or k.dtype != pool.dtype:
            pool.set_kv_buffer(layer, KVWriteLoc(slots, self.swa_out_cache_loc), k, v)
            return
        pool.get_key_buffer(layer.layer_id).index_copy_(0, slots, k)
        pool.get_value_buffer(layer.layer_id).index_copy_(0, slots, v)

    def _read(self, queries: torch.Tensor, layer: Any, forward_batch: Any) -> torch.Tensor:
        kind, pool = self._kind(layer), self.token_to_kv_pool
        out = queries.new_empty(queries.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        if self.packed is not None:
            kv = (pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id))
            self.packed.attend(queries, *kv, kind.rule.scale, out)
            return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)
        plan = self._plan(kind.key, forward_batch)
        if plan.rows < queries.shape[0]:  # rows that only pad the batch
            out[plan.rows :].zero_()
            queries = queries[: plan.rows]
        planned_attention(
            plan,
            queries,
            pool.get_key_buffer(layer.layer_id),
            pool.get_value_buffer(layer.layer_id),
            kind.rule,
            out[: plan.rows],
            self._workspace,
        )
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def packs(self, model: torch.nn.Module) -> bool:
        """Whether rows of one sequence can attend together in every layer: none has a window or a cap."""
        return all(self._kind(one).is_plain for one in model.modules() if isinstance(one, RadixAttention))

    def _kind(self, layer: Any) -> _Kind:
        """Of a layer, found once and kept with it."""
        kind = getattr(layer, "rksc_kind", None)
        if kind is None:
            window = layer.sliding_window_size
            key = _PlanKey(
                heads=HeadShape(layer.tp_q_head_num, layer.tp_k_head_num),
                window=window if window is not None and window > -1 else None,
                swa_slots=self.use_sliding_window_kv_pool and self.token_to_kv_pool.layers_mapping[layer.layer_id][1],
            )
            kind = layer.rksc_kind = _Kind(key, LogitRule(layer.scaling, layer.logit_cap or 0.0))
        return kind

    def plans_of(self, forward_batch: Any) -> BatchPlans:
        """The pass's plans so far.

        Another batch may have come between two intervals of a split prefill; its plans are not valid then.
        """
        if self.forward_metadata is None or not self.forward_metadata.serves(forward_batch):
            self.init_forward_metadata(forward_batch)
        return self.forward_metadata

    def _plan(self, key: _PlanKey, forward_batch: Any) -> AttentionPlan:
        """The pass's plan for layers of a kind."""
        plans = self.plans_of(forward_batch).plans
        if key not in plans:
            sequences = self.sequences(forward_batch, key.swa_slots, any_order=key.window is None)
            plans[key] = build_plan(sequences, key.heads, window=key.window)
        return plans[key]

    def share_slots(self, shared: SharedSlots) -> None:
        """From now on slots of its pool may have several owners; these are theirs."""
        self._common_first = CommonFirst(shared)

    def sequences(
        self, forward_batch: Any, swa_slots: bool = False, *, any_order: bool = True
    ) -> tuple[QuerySequence, ...]:
        """The batch from its own tensors, which are on the CPU here and right also with overlapped scheduling.

        Args:
            forward_batch: the batch.
            swa_slots: slots of the sliding-window sub-pool instead of the full one's.
            any_order: the slots of a prefix may come in another order than by position: no layer has a window.
        """
        if forward_batch.forward_mode.is_decode():
            prefix_lens = [max(length - 1, 0) for length in forward_batch.seq_lens.tolist()]
            extend_lens = [1] * len(prefix_lens)
        else:
            prefix_lens = forward_batch.extend_prefix_lens.tolist()
            extend_lens = forward_batch.extend_seq_lens.tolist()
        table, pool_rows = self.req_to_token_pool.req_to_token, forward_batch.req_pool_indices.tolist()
        if swa_slots:
            longest = max((p + e for p, e in zip(prefix_lens, extend_lens, strict=True)), default=0)
            full = table[forward_batch.req_pool_indices, :longest].long()
            # Positions that have left the window have no slot any more; they are never visible.
            table = self.token_to_kv_pool.translate_loc_from_full_to_swa(full).clamp_(min=0)
            pool_rows = list(range(len(pool_rows)))
        order = self._common_first if any_order and not swa_slots else None
        return batch_sequences(table, pool_rows, prefix_lens, extend_lens, order)


def _is_planned(layer: Any, forward_batch: Any) -> bool:
    return (
        forward_batch.forward_mode in _PLANNED_MODES
        and forward_batch.encoder_lens is None
        and not layer.is_cross_attention
        and layer.attn_type == AttentionType.DECODER
    )
