"""Linear layers on weights that lie as ``linear.h`` reads them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from rksc_sgl.cpu_platform.mapped_memory import mapped_zeros
from rksc_sgl.cpu_platform.native import build

TYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights, in the order of ``linear.h``


class LinearStruct(ctypes.Structure):
    """``Linear`` of ``linear.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("panels", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "type")),
    )


@dataclass(frozen=True, eq=False)
class PanelWeight:
    """A weight in panels of some outputs each, read one after another by a pass of any number of rows.

    Its numbers are float32, or of a 16-bit type; all arithmetic is float32. What a row gives depends neither on the
    rows beside it nor on the type that the same numbers are stored in, to the bit.

    Attributes:
        panels: of one of :data:`TYPES`, ``[panels, in, outputs of a panel]``; the last panel is filled up with zeros.
        outputs: how many there are.
    """

    library: ctypes.CDLL
    panels: torch.Tensor
    outputs: int

    @classmethod
    def of(cls, weight: torch.Tensor) -> PanelWeight | None:
        """A copy of ``weight`` ``[out, in]``, of one of :data:`TYPES` on the CPU; None where there is no library."""
        library = build.library()
        if library is None:
            return None
        outputs, inputs = weight.shape
        panel = int(library.rksc_panel())
        panels = mapped_zeros((-(-outputs // panel), inputs, panel), weight.dtype, whole=True)
        packed = cls(library, panels, outputs)
        rows = weight.detach().contiguous()
        library.rksc_pack(rows.data_ptr(), packed.panels.data_ptr(), outputs, inputs, TYPES.index(weight.dtype))
        return packed

    @property
    def dtype(self) -> torch.dtype:
        """The type that the numbers are stored in."""
        return self.panels.dtype

    def unpacked(self) -> torch.Tensor:
        """The weight ``[out, in]`` again, of the stored type."""
        rows = mapped_zeros((self.outputs, self.panels.shape[1]), self.dtype, whole=True)
        number = TYPES.index(self.dtype)
        self.library.rksc_unpack(self.panels.data_ptr(), rows.data_ptr(), *rows.shape, number)
        return rows

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, float32 ``[..., in]``, for numbers ``[...]``.

        Raises:
            IndexError: a number is not that of a row.
        """
        numbers = numbers.to(torch.int64).contiguous()
        found = torch.empty(*numbers.shape, self.panels.shape[1])
        if numbers.numel():
            lowest, highest = (int(one) for one in numbers.aminmax())
            if lowest < 0 or highest >= self.outputs:
                raise IndexError(f"rows {lowest} to {highest} of a weight that has {self.outputs}")
            struct = self.struct(None)
            self.library.rksc_rows(ctypes.byref(struct), numbers.data_ptr(), found.data_ptr(), numbers.numel())
        return found

    def struct(self, bias: torch.Tensor | None) -> LinearStruct:
        """For the library; the caller keeps this and the bias."""
        address = None if bias is None else bias.data_ptr()
        return LinearStruct(
            self.panels.data_ptr(), address, self.panels.shape[1], self.outputs, TYPES.index(self.dtype)
        )

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
        """``F.linear(x, weight, bias)`` up to rounding; ``x`` ``[..., in]`` and ``bias``, float32 on the CPU.

        Args:
            out: where the result goes, float32 ``[..., out]``, contiguous; None takes new memory.
        """
        x = x.contiguous()
        shape = (*x.shape[:-1], self.outputs)
        if out is None:
            out = torch.empty(shape)
        assert out.shape == shape and out.is_contiguous()
        rows = x.numel() // x.shape[-1]
        ordered = torch.empty(int(self.library.rksc_ordered_floats(rows, x.shape[-1])))
        self.library.rksc_linear(
            *(ctypes.byref(self.struct(bias)), x.data_ptr(), out.data_ptr(), rows, ordered.data_ptr())
        )
        return out
