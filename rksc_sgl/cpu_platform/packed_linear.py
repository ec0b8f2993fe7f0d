"""Linear layers at the speed of memory, on weights that oneDNN has laid out once.

A decode step multiplies a few rows, one for each sequence, with every weight. ``F.linear`` computes ``x @ W.T``
through MKL at a fraction of the memory's bandwidth when ``x`` has few rows. oneDNN's inner product reads a copy of
the weight in blocks of its own choice nearly as fast as it can be read. From some hundred rows on both are equal, and
beyond :data:`MOST_ROWS` the weight itself is used.

The copy costs as much memory as the weights. The weights themselves stay: embeddings are looked up in them, weight
updates are written to them, and SGLang's own step after loading packs them anew.
"""

from __future__ import annotations

import logging
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod

logger = logging.getLogger(__name__)

MOST_ROWS = 512  # beyond, as in a long prefill, MKL on the weight as it is was measured faster
_ROWS_HINT = 8  # rows for which oneDNN chooses the layout; it serves any number
_MEMORY_SHARE = 0.4  # of the free memory that the copies may take


def pack(weight: torch.Tensor) -> torch.Tensor:
    """An opaque copy of ``weight`` ``[out, in]``, float32 on the CPU, for :func:`packed_linear`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS_HINT)


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``F.linear(x, weight, bias)`` up to rounding.

    Args:
        x: ``[..., in]``, float32 on the CPU.
        packed: what :func:`pack` made of the weight.
        bias: ``[out]`` or None.

    Returns:
        ``[..., out]``, contiguous.
    """
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], packed.shape[0])
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def through(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """``x`` ``[rows, in]`` through one of SGLang's linear layers, by its own method and without its bookkeeping."""
    return linear.quant_method.apply(linear, x, linear.bias)


class _Packed:
    """A packed copy of a layer's weight, made anew whenever SGLang has loaded weights: at start and in every update."""

    packed: torch.Tensor

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.packed = pack(layer.weight)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x.numel() > MOST_ROWS * x.shape[-1]:
            return F.linear(x, layer.weight, bias)
        return packed_linear(x, self.packed, bias)


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

    None does, and the log says so, where PyTorch lacks oneDNN or the copies would take more than
    :data:`_MEMORY_SHARE` of the free memory. Other layers (quantized, 16-bit, on another device) stay as they are.
    """
    if not torch.backends.mkldnn.is_available():
        logger.info("linear layers are SGLang's own: this PyTorch has no oneDNN")
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
