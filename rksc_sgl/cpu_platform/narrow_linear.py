"""Linear layers of a few rows at the speed of memory.

A decode step multiplies a few rows, one for each sequence, with every weight. ``F.linear`` computes ``x @ W.T``,
which MKL does at a fraction of the memory's bandwidth when ``x`` has few rows. The same product written as
``W @ x.T`` reads the weights almost as fast as they can be read; a single row gets a row of zeros beside it, because
MKL's matrix-vector product is slower than a product with two columns. No weight is copied or packed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod

# Columns at which MKL's W @ x.T beats x @ W.T, measured; in between and beyond it does not.
_FAST_COLUMNS = (2, 3, 4, 5, 6, 7, 8, 9, 16, 32)
_MOST_PADDING = 6  # columns of zeros that cost less than they save


def narrow_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``F.linear(x, weight, bias)`` up to rounding, fast for few rows.

    Args:
        x: ``[..., in]``, float32 on the CPU.
        weight: ``[out, in]``.
        bias: ``[out]`` or None.

    Returns:
        ``[..., out]``, contiguous.
    """
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    columns = _columns(count)
    if columns is None:
        return F.linear(x, weight, bias)
    if columns > count:
        rows = torch.cat([rows, rows.new_zeros(columns - count, rows.shape[1])])
    product = torch.mm(weight, rows.t())[:, :count].t().contiguous()
    if bias is not None:
        product += bias
    return product.view(*x.shape[:-1], weight.shape[0])


def _columns(rows: int) -> int | None:
    """With how many columns to multiply for this many rows; None where ``F.linear`` is better."""
    enough = [columns for columns in _FAST_COLUMNS if columns >= rows]
    if rows == 0 or not enough or enough[0] - rows > _MOST_PADDING or (rows > 16 and enough[0] != rows):
        return None
    return enough[0]


class NarrowLinearMethod(UnquantizedLinearMethod):
    """SGLang's unquantized linear layer by way of :func:`narrow_linear`."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return narrow_linear(x, layer.weight, bias)


class NarrowEmbeddingMethod(UnquantizedEmbeddingMethod):
    """The same for the language-model head, which may share its weights with the embedding."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return narrow_linear(x.to(layer.weight.dtype), layer.weight, bias)


_METHODS = {UnquantizedLinearMethod: NarrowLinearMethod, UnquantizedEmbeddingMethod: NarrowEmbeddingMethod}


def use_narrow_linear(model: torch.nn.Module) -> int:
    """Let every plain float32 linear layer of a loaded model use :func:`narrow_linear`; their number.

    Only where PyTorch multiplies with MKL, whose behaviour this answers to; other layers stay as they are.
    """
    if not torch.backends.mkl.is_available():
        return 0
    changed = 0
    for module in model.modules():
        method = _METHODS.get(type(getattr(module, "quant_method", None)))  # type: ignore[arg-type]
        weight = getattr(module, "weight", None)
        if method is None or weight is None or weight.dtype != torch.float32 or weight.device.type != "cpu":
            continue
        module.quant_method = method()
        changed += 1
    return changed
