"""The take-over of donor KV as one call into the library."""

from __future__ import annotations

import ctypes

import torch

from rksc_sgl.blending.take_over import DonorRows, Layers
from rksc_sgl.cpu_platform.native import build


class TakeOverStruct(ctypes.Structure):
    """``TakeOver`` of ``take_over.h``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "tokens", "heads", "key_size", "value_width", "pairs", "neox")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "table", "own", "theirs", "old", "new", "taken")),
    )


class NativeTakeOver:
    """All layers at once (:class:`~rksc_sgl.blending.take_over.TakeOver`); float32 on the CPU.

    The addresses of the layers' buffers are looked up when it is made: buffers that are allocated anew need another.
    """

    def __init__(self, library: ctypes.CDLL, layers: Layers) -> None:
        self.layers, self._library = layers, library
        self._keys, self._values = (
            (ctypes.c_void_p * len(part))(*(one.data_ptr() for one in part)) for part in (layers.keys, layers.values)
        )

    @classmethod
    def of(cls, layers: Layers) -> NativeTakeOver | None:
        """None where there is no library, or where the layers' KV is not what it reads."""
        library, rotation = build.library(), layers.rotation
        buffers = [*layers.keys, *layers.values, *([] if rotation is None else [rotation.cos_sin])]
        plain = all(one.device.type == "cpu" and one.dtype == torch.float32 and one.is_contiguous() for one in buffers)
        if library is None or not plain:
            return None
        fits = rotation is None or rotation.rotary_dim // 2 <= int(library.rksc_most_pairs())
        return cls(library, layers) if fits else None

    def __call__(self, rows: DonorRows, taken: torch.Tensor) -> None:
        keys, values, rotation = self.layers.keys[0], self.layers.values[0], self.layers.rotation
        numbers = [rows.own, rows.theirs, rows.old, rows.new, taken]
        assert all(one.dtype == torch.int64 and one.is_contiguous() for one in numbers)
        if rotation is not None:
            rotation.covers(rows.highest)
        struct = TakeOverStruct(
            *(len(self.layers.keys), taken.numel(), *keys.shape[1:], values[0].numel()),
            *((0, 0) if rotation is None else (rotation.rotary_dim // 2, int(rotation.is_neox_style))),
            *(ctypes.addressof(self._keys), ctypes.addressof(self._values)),
            None if rotation is None else rotation.cos_sin.data_ptr(),
            *(one.data_ptr() for one in numbers),
        )
        self._library.rksc_take_over(ctypes.byref(struct))
