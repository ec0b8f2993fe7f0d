"""A layer stack whose layers are four matrix products and four calls of ``layers.c`` each."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from rksc_sgl.cpu_platform.native import build
from rksc_sgl.cpu_platform.native.passes import LayerStruct, NativePass, native_pass
from rksc_sgl.cpu_platform.packed_linear import through

MOST_ROWS = 256  # of a pass; beyond, matrix products are nearly all of it
LANES = 16  # the dimension of a head is a multiple of this


class NativeStack:
    """Decoder layers through the library.

    Args:
        first: one of the layers, all of which are of its kind.
        library: from :func:`~rksc_sgl.cpu_platform.native.build.library`.
    """

    def __init__(self, first: Any, library: ctypes.CDLL) -> None:
        self.first, self.library = first, library
        self.heads = (first.queries, first.kv_heads, first.head_dim)
        self.unit_keys = int(library.rksc_unit_keys())
        self._partial: torch.Tensor | None = None

    @classmethod
    def of(cls, layers: Sequence[Any]) -> NativeStack | None:
        """For layers as :class:`~rksc_sgl.cpu_platform.lean_layers.LeanStack` has them.

        None where they are not all of one kind that the library has, or there is no library.
        """
        if not layers or not all(_is_served(layer, layers[0]) for layer in layers):
            return None
        library = build.library()
        return None if library is None else cls(layers[0], library)

    def serves(self, backend: Any, batch: Any) -> bool:
        """Whether a pass is one of few rows over a pool whose slots are float32 rows."""
        return (
            backend.plain_pool
            and backend.token_to_kv_pool.dtype == torch.float32
            and 0 < batch.input_ids.shape[0] <= MOST_ROWS
        )

    def run(
        self, layers: Sequence[Any], hidden: torch.Tensor, positions: torch.Tensor, backend: Any, batch: Any
    ) -> None:
        """Add to hidden states ``[rows, hidden]`` what these layers give, in place; not to rows that only pad."""
        sequences = backend.sequences(batch)
        rows = sum(sequence.tokens for sequence in sequences)
        hidden = hidden[:rows]
        reads = self._reads(sequences, positions[:rows], batch.out_cache_loc[:rows])
        pool, normed = backend.token_to_kv_pool, torch.empty_like(hidden)
        added: torch.Tensor | None = None
        for layer in layers:
            self._add_norm(hidden, added, layer.before_attention, normed)
            out = self._attend(layer, through(layer.qkv, normed), reads, pool)
            self._add_norm(hidden, through(layer.output, out), layer.before_mlp, normed)
            added = through(layer.down, self._silu(through(layer.gate_up, normed)))
        if added is not None:
            hidden.add_(added)

    def _reads(self, sequences: Any, positions: torch.Tensor, slots: torch.Tensor) -> NativePass:
        turns = self.first.rotary.cos_sin_cache.index_select(0, positions).chunk(2, dim=-1)
        reads = native_pass(
            sequences,
            self.heads,
            (turns[0].contiguous(), turns[1].contiguous()),
            slots.to(torch.int64).contiguous(),
            self.unit_keys,
            self._partial,
        )
        self._partial = reads.partial
        return reads

    def _attend(self, layer: Any, qkv: torch.Tensor, reads: NativePass, pool: Any) -> torch.Tensor:
        out = torch.empty(qkv.shape[0], layer.queries * layer.head_dim)
        of_queries, of_keys = layer.of_queries, layer.of_keys
        struct = LayerStruct(
            qkv.data_ptr(),
            pool.get_key_buffer(layer.attn.layer_id).data_ptr(),
            pool.get_value_buffer(layer.attn.layer_id).data_ptr(),
            None if of_queries is None else of_queries.weight.data_ptr(),
            None if of_keys is None else of_keys.weight.data_ptr(),
            0.0 if of_queries is None else of_queries.variance_epsilon,
            0.0 if of_keys is None else of_keys.variance_epsilon,
            layer.attn.scaling,
            out.data_ptr(),
        )
        self.library.rksc_attend(ctypes.byref(reads.struct), ctypes.byref(struct))
        return out

    def _add_norm(self, hidden: torch.Tensor, added: torch.Tensor | None, norm: Any, out: torch.Tensor) -> None:
        """``hidden += added``, then its norm into ``out``; all ``[rows, hidden]``."""
        self.library.rksc_add_norm(
            hidden.data_ptr(),
            None if added is None else added.data_ptr(),
            norm.weight.data_ptr(),
            out.data_ptr(),
            *hidden.shape,
            norm.variance_epsilon,
        )

    def _silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, both = gate_up.shape
        out = torch.empty(rows, both // 2)
        self.library.rksc_silu_mul(gate_up.data_ptr(), out.data_ptr(), rows, both // 2)
        return out


def _is_served(layer: Any, first: Any) -> bool:
    """Whether the library has this kind of layer, and it is of the first one's kind."""
    window = layer.attn.sliding_window_size
    return (
        (layer.queries, layer.kv_heads, layer.head_dim) == (first.queries, first.kv_heads, first.head_dim)
        and layer.rotary is first.rotary
        and layer.head_dim % LANES == 0
        and layer.attn.v_head_dim == layer.head_dim
        and (window is None or window < 0)
        and not layer.attn.logit_cap
        and (layer.of_queries is None) == (layer.of_keys is None)
    )
