"""Linear layers at the speed of memory, on weights that are laid out once for being read.

A decode step multiplies a few rows, one for each sequence, with every weight. ``F.linear`` computes ``x @ W.T``
through MKL at a fraction of the memory's bandwidth when ``x`` has few rows. Our own product
(:class:`~rksc_sgl.cpu_platform.native.linear.PanelWeight`) reads a copy of the weight as fast as it can be read.
Without a compiled library oneDNN's inner product does, on a copy in blocks of its own choice, somewhat slower.

The copy costs as much memory as the weights. The weights themselves stay: embeddings are looked up in them, weight
updates are written to them, and SGLang's own step after loading packs them anew.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod

from rksc_sgl.cpu_platform.native import build
from rksc_sgl.cpu_platform.native.linear import PanelWeight

logger = logging.getLogger(__name__)

ONEDNN_ROWS = 512  # beyond, as in a long prefill, MKL on the weight as it is was measured faster than oneDNN
_ROWS_HINT = 8  # rows for which oneDNN chooses the layout; it serves any number
_MEMORY_SHARE = 0.4  # of the free memory that the copies may take


@dataclass(frozen=True, eq=False)
class OneDnnWeight:
    """A weight beside an opaque copy that oneDNN reads."""

    weight: torch.Tensor
    packed: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> OneDnnWeight:
        return cls(weight, torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT))

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As :meth:`PanelWeight.__call__`."""
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.weight.shape[0])
        if x.numel() > ONEDNN_ROWS * x.shape[-1]:
            return F.linear(x, self.weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")


def pack(weight: torch.Tensor) -> PanelWeight | OneDnnWeight:
    """A copy of ``weight`` ``[out, in]``, float32 on the CPU, through which rows can be sent."""
    weight = weight.detach()
    return PanelWeight.of(weight) or OneDnnWeight.of(weight)


def panels_of(linear: Any) -> PanelWeight | None:
    """The panels of one of SGLang's linear layers, where it has some."""
    packed = getattr(linear.quant_method, "packed", None)
    return packed if isinstance(packed, PanelWeight) else None


def through(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """``x`` ``[rows, in]`` through one of SGLang's linear layers, by its own method and without its bookkeeping."""
    return linear.quant_method.apply(linear, x, linear.bias)


class _Packed:
    """A packed copy of a layer's weight, made anew whenever SGLang has loaded weights: at start and in every update."""

    packed: PanelWeight | OneDnnWeight

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.packed = pack(layer.weight)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.packed(x, bias)


class PackedLinearMethod(_Packed, UnquantizedLinearMethod):
    """SGLang's unquantized linear layer on a packed weight."""


class PackedEmbeddingMethod(_Packed, UnquantizedEmbeddingMethod):
    """The same for the language-model head, which may share its weight with the embedding."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return super().apply(layer, x.to(torch.float32), bias)


_METHODS: dict[type, Any] = {
    UnquantizedLinearMethod: PackedLinearMethod,
    UnquantizedEmbeddingMethod: PackedEmbeddingMethod,
}


def use_packed_linear(model: torch.nn.Module) -> int:
    """Let every plain float32 linear layer of a loaded model work on a packed weight; how many do.

    None does, and the log says so, where there is neither a library nor oneDNN, or the copies would take more than
    :data:`_MEMORY_SHARE` of the free memory. Other layers (quantized, 16-bit, on another device) stay as they are.
    """
    if build.library() is None and not torch.backends.mkldnn.is_available():
        logger.info("linear layers are SGLang's own: there is no compiled library, and this PyTorch has no oneDNN")
        return 0
    layers = [module for module in model.modules() if _can_be_packed(module)]
    needed = sum(module.weight.numel() * 4 for module in layers)
    free = psutil.virtual_memory().available
    if needed > _MEMORY_SHARE * free:
        logger.warning(
            "linear layers are SGLang's own: packed copies would take %.1f GB of %.1f GB free", needed / 1e9, free / 1e9
        )
        return 0
    for module in layers:
        method = _METHODS[type(module.quant_method)]()
        method.process_weights_after_loading(module)
        module.quant_method = method
    return len(layers)


def _can_be_packed(module: torch.nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(getattr(module, "quant_method", None)) in _METHODS
        and isinstance(weight, torch.Tensor)
        and weight.dim() == 2
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
    )
