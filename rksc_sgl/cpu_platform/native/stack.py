"""A layer stack whose layers are computed by ``layers.c``, any number of them in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from rksc_sgl.cpu_platform.native import build
from rksc_sgl.cpu_platform.native.linear import PanelWeight
from rksc_sgl.cpu_platform.native.passes import LayerStruct, NativePass, native_pass
from rksc_sgl.cpu_platform.packed_linear import panels_of

MOST_ROWS = 256  # of a pass; beyond, matrix products are nearly all of it
LANES = 16  # the dimension of a head is a multiple of this


class NativeStack:
    """Decoder layers through the library.

    Args:
        layers: as :class:`~rksc_sgl.cpu_platform.lean_layers.LeanStack` has them, all of one kind.
        library: from :func:`~rksc_sgl.cpu_platform.native.build.library`.
    """

    def __init__(self, layers: Sequence[Any], library: ctypes.CDLL) -> None:
        first = layers[0]
        self.layers, self.library, self.rotary = layers, library, first.rotary
        self.heads = (first.queries, first.kv_heads, first.head_dim)
        self.unit_keys = int(library.rksc_unit_keys())
        self._partial: torch.Tensor | None = None

    @classmethod
    def of(cls, layers: Sequence[Any]) -> NativeStack | None:
        """None where the layers are not all of one kind that the library has, or there is no library."""
        if not layers or not all(_is_served(layer, layers[0]) for layer in layers):
            return None
        library = build.library()
        return None if library is None else cls(layers, library)

    def serves(self, backend: Any, batch: Any) -> bool:
        """Whether a pass is one of few rows over a pool whose slots are float32 rows."""
        return (
            backend.plain_pool
            and backend.packed is None
            and backend.token_to_kv_pool.dtype == torch.float32
            and 0 < batch.input_ids.shape[0] <= MOST_ROWS
        )

    def run(
        self, start: int, end: int, hidden: torch.Tensor, positions: torch.Tensor, backend: Any, batch: Any
    ) -> None:
        """Add to hidden states ``[rows, hidden]`` what layers ``start`` until before ``end`` give, in place.

        Not to rows that only pad.
        """
        reads = self._reads(positions, backend, batch)
        rows, wide = reads.struct.rows, self.layers[0].gate_up.weight.shape[0]
        assert hidden.is_contiguous() and hidden.dtype == torch.float32
        normed, gate_up, gated = (torch.empty(rows, width) for width in (hidden.shape[1], wide, wide // 2))
        widest = max(self.layers[0].down.weight.shape[1], self.layers[0].output.weight.shape[1], hidden.shape[1])
        ordered = torch.empty(int(self.library.rksc_ordered_floats(rows, widest)))
        pool = backend.token_to_kv_pool
        structs = (LayerStruct * (end - start))(*(_struct(layer, pool) for layer in self.layers[start:end]))
        self.library.rksc_layers(
            ctypes.byref(reads.struct),
            structs,
            end - start,
            *(one.data_ptr() for one in (hidden, normed, gate_up, gated, ordered)),
        )

    def _reads(self, positions: torch.Tensor, backend: Any, batch: Any) -> NativePass:
        """The pass, laid out when its first layers are computed."""
        known = backend.plans_of(batch).reads
        if self not in known:
            sequences = backend.sequences(batch)
            rows = sum(sequence.tokens for sequence in sequences)
            cosines, sines = self.rotary.cos_sin_cache.index_select(0, positions[:rows]).chunk(2, dim=-1)
            known[self] = native_pass(
                sequences,
                self.heads,
                (cosines.contiguous(), sines.contiguous()),
                batch.out_cache_loc[:rows].to(torch.int64).contiguous(),
                self.unit_keys,
                self._partial,
            )
            self._partial = known[self].partial
        return known[self]


def _struct(layer: Any, pool: Any) -> LayerStruct:
    """Where everything of a layer is now: an update may have put new weights elsewhere."""
    of_queries, of_keys = layer.of_queries, layer.of_keys
    linears = (layer.qkv, layer.output, layer.gate_up, layer.down)
    return LayerStruct(
        *(_panels(linear).struct(linear.bias) for linear in linears),
        pool.get_key_buffer(layer.attn.layer_id).data_ptr(),
        pool.get_value_buffer(layer.attn.layer_id).data_ptr(),
        layer.before_attention.weight.data_ptr(),
        layer.before_mlp.weight.data_ptr(),
        None if of_queries is None else of_queries.weight.data_ptr(),
        None if of_keys is None else of_keys.weight.data_ptr(),
        layer.before_attention.variance_epsilon,
        layer.before_mlp.variance_epsilon,
        0.0 if of_queries is None else of_queries.variance_epsilon,
        0.0 if of_keys is None else of_keys.variance_epsilon,
        layer.attn.scaling,
    )


def _panels(linear: Any) -> PanelWeight:
    panels = panels_of(linear)
    assert panels is not None, "weights were packed otherwise in an update"
    return panels


def _is_served(layer: Any, first: Any) -> bool:
    """Whether the library has this kind of layer, and it is of the first one's kind."""
    window = layer.attn.sliding_window_size
    return (
        all(panels_of(linear) for linear in (layer.qkv, layer.output, layer.gate_up, layer.down))
        and (layer.queries, layer.kv_heads, layer.head_dim) == (first.queries, first.kv_heads, first.head_dim)
        and layer.rotary is first.rotary
        and layer.head_dim % LANES == 0
        and layer.attn.v_head_dim == layer.head_dim
        and (window is None or window < 0)
        and not layer.attn.logit_cap
        and (layer.of_queries is None) == (layer.of_keys is None)
    )
