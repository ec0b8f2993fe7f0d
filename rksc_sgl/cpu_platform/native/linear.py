"""Linear layers on weights that lie as ``layers.c`` reads them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from rksc_sgl.cpu_platform.native import build


class LinearStruct(ctypes.Structure):
    """``Linear`` of ``layers.c``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("panels", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    )


@dataclass(frozen=True, eq=False)
class PanelWeight:
    """A weight in panels of some outputs each, read one after another by a pass of any number of rows.

    What a row gives does not depend on the rows beside it, to the bit.

    Attributes:
        panels: float32 ``[panels, in, outputs of a panel]``; the last panel is filled up with zeros.
        outputs: how many there are.
    """

    library: ctypes.CDLL
    panels: torch.Tensor
    outputs: int

    @classmethod
    def of(cls, weight: torch.Tensor) -> PanelWeight | None:
        """A copy of ``weight`` ``[out, in]``, float32 on the CPU; None where there is no library."""
        library = build.library()
        if library is None:
            return None
        outputs, inputs = weight.shape
        panel = int(library.rksc_panel())
        panels = torch.zeros(-(-outputs // panel), inputs, panel)
        whole = outputs // panel
        panels[:whole] = weight[: whole * panel].unflatten(0, (whole, panel)).transpose(1, 2)
        if whole < len(panels):
            panels[whole, :, : outputs - whole * panel] = weight[whole * panel :].T
        return cls(library, panels, outputs)

    def struct(self, bias: torch.Tensor | None) -> LinearStruct:
        """For the library; the caller keeps this and the bias."""
        address = None if bias is None else bias.data_ptr()
        return LinearStruct(self.panels.data_ptr(), address, self.panels.shape[1], self.outputs)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``F.linear(x, weight, bias)`` up to rounding; ``x`` ``[..., in]``, float32 on the CPU."""
        x = x.contiguous()
        out = torch.empty(*x.shape[:-1], self.outputs)
        self.library.rksc_linear(
            ctypes.byref(self.struct(bias)), x.data_ptr(), out.data_ptr(), x.numel() // x.shape[-1]
        )
        return out
