"""Linear layers at the speed of memory, on weights that are laid out once for being read.

A decode step multiplies a few rows, one for each sequence, with every weight. ``F.linear`` computes ``x @ W.T``
through MKL at a fraction of the memory's bandwidth when ``x`` has few rows. Our own product
(:class:`~rksc_sgl.cpu_platform.native.linear.PanelWeight`) reads the weight as fast as it can be read. The panels are
all that there is of a weight (:mod:`~rksc_sgl.cpu_platform.held_weight`): a 16-bit checkpoint stays in its 16 bits, and
is multiplied in float32.

Without a compiled library the weights are SGLang's own, float32, and oneDNN's inner product works beside them on a copy
in blocks of its own choice, somewhat slower.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from sglang.srt.utils import set_weight_attrs

from rksc_sgl.cpu_platform.held_weight import Held, HeldWeight, held_of, load_into
from rksc_sgl.cpu_platform.native import build
from rksc_sgl.cpu_platform.native.linear import PanelWeight

logger = logging.getLogger(__name__)

ONEDNN_ROWS = 512  # beyond, as in a long prefill, MKL on the weight as it is was measured faster than oneDNN
_ROWS_HINT = 8  # rows for which oneDNN chooses the layout; it serves any number
_MEMORY_SHARE = 0.4  # of the free memory that oneDNN's copies may take


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


def panels_of(linear: Any) -> PanelWeight | None:
    """The panels of one of SGLang's linear layers, where it has some."""
    held = held_of(linear)
    return None if held is None else held.panels()


def through(linear: Any, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` ``[rows, in]`` through one of SGLang's linear layers, by its own method and without its bookkeeping.

    Args:
        out: memory ``[rows, out]`` that the result may take.
    """
    panels = panels_of(linear)
    return linear.quant_method.apply(linear, x, linear.bias) if panels is None else panels(x, linear.bias, out)


class _Packed:
    """A method of layers whose weight is in panels, or has oneDNN's copy beside it."""

    in_rows = False
    copy: OneDnnWeight | None = None

    def hold(self, layer: torch.nn.Module, outputs: int, inputs: int, declared: torch.dtype) -> None:
        """Give a layer a weight in panels, empty for the time being, in place of the one that it has, if any."""
        before = getattr(layer, "weight", None)
        held = Held(outputs, inputs, declared=declared, in_rows=self.in_rows)
        weight = torch.nn.Parameter(HeldWeight(held), requires_grad=False)
        if before is not None:
            weight.__dict__.update(before.__dict__)
            held.replace(before.detach())
        layer.register_parameter("weight", weight)
        if hasattr(weight, "weight_loader"):
            weight.weight_loader = load_into(weight.weight_loader)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        held = held_of(layer)
        if held is not None:
            held.pack()
        elif self.copy is not None:
            self.copy = OneDnnWeight.of(layer.weight.detach())

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        packed = panels_of(layer) or self.copy
        return F.linear(x, layer.weight, bias) if packed is None else packed(x.to(torch.float32), bias)


class PackedLinearMethod(_Packed, UnquantizedLinearMethod):
    """SGLang's unquantized linear layer on a packed weight."""


class PackedEmbeddingMethod(_Packed, UnquantizedEmbeddingMethod):
    """The same for the language-model head, and for an embedding, whose weight the head may share."""

    in_rows = True  # until it is multiplied with

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        held = held_of(layer)
        return super().embedding(layer, input_) if held is None else held.lookup(input_)


_METHODS: dict[Any, type[PackedLinearMethod] | type[PackedEmbeddingMethod]] = {  # by SGLang's classes
    UnquantizedLinearMethod: PackedLinearMethod,
    UnquantizedEmbeddingMethod: PackedEmbeddingMethod,
}


def hold_from_the_start() -> None:
    """Let SGLang's plain float32 layers be made with weights in panels, so that no others are ever in memory.

    Only where there is a library. What is made otherwise is packed after loading (:func:`use_packed_linear`).
    """
    for kind in _METHODS:
        if not hasattr(kind.create_weights, "_rksc_holds"):
            kind.create_weights = _holding(kind.create_weights)


def _holding(create_weights: Callable[..., None]) -> Callable[..., None]:
    @wraps(create_weights)
    def create(
        self: Any,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        ours = _METHODS.get(type(self))
        plain = params_dtype == torch.float32 and torch.get_default_device().type == "cpu"
        if ours is None or not plain or build.library() is None:
            sizes = (input_size_per_partition, output_partition_sizes, input_size, output_size)
            create_weights(self, layer, *sizes, params_dtype, **attributes)
            return
        layer.quant_method = ours()
        layer.quant_method.hold(layer, sum(output_partition_sizes), input_size_per_partition, declared_type())
        loader = attributes.pop("weight_loader", None)
        set_weight_attrs(layer.weight, {"input_dim": 1, "output_dim": 0, **attributes})
        if loader is not None:
            layer.weight.weight_loader = load_into(loader)

    create._rksc_holds = True  # type: ignore[attr-defined]
    return create


@cache
def declared_type() -> torch.dtype:
    """The type of numbers that the served model's configuration names; float32 where it names none."""
    from sglang.srt.runtime_context import get_model
    from sglang.srt.utils.hf_transformers import get_config

    model = get_model()
    config = get_config(model.model_path, trust_remote_code=model.trust_remote_code, revision=model.revision)
    named = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    return named if isinstance(named, torch.dtype) else torch.float32


def use_packed_linear(model: torch.nn.Module) -> str:
    """Let every plain float32 linear layer of a loaded model work on a packed weight; see :func:`weights_of`.

    Without a library, oneDNN's copies are left out, and the log says so, where they would take more than
    :data:`_MEMORY_SHARE` of the free memory. Other layers (quantized, 16-bit, on another device) stay as they are.
    """
    layers = [module for module in model.modules() if _can_be_packed(module)]
    if build.library() is not None:
        for module in layers:
            outputs, inputs = module.weight.shape
            module.quant_method = _METHODS[type(module.quant_method)]()
            module.quant_method.hold(module, outputs, inputs, torch.float32)
        _pack_the_head(model)
    elif _copies_fit(layers):
        for module in layers:
            module.quant_method = _METHODS[type(module.quant_method)]()
            module.quant_method.copy = OneDnnWeight.of(module.weight.detach())
    return weights_of(model)


def weights_of(model: torch.nn.Module) -> str:
    """What a model's linear layers, its head and its embedding work on now, for people to read."""
    forms: Counter[str] = Counter()
    for module in model.modules():
        method, held = getattr(module, "quant_method", None), held_of(module)
        if held is not None:
            form = "rows" if held.in_rows else "panels"
            forms[f"{_name(held.dtype or held.declared)} {form}, multiplied in float32"] += 1
        elif isinstance(method, _Packed) and method.copy is not None:
            forms["float32 rows with oneDNN's copies"] += 1
        elif method is not None and isinstance(getattr(module, "weight", None), torch.Tensor):
            forms[f"SGLang's own, {_name(module.weight.dtype)}"] += 1
    if len(forms) == 1:
        return next(iter(forms))
    return "; ".join(f"{count} of {form}" for form, count in forms.most_common()) or "SGLang's own"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pack_the_head(model: torch.nn.Module) -> None:
    """A model without a head of its own multiplies with its embedding: pack that now and not in the first request."""
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

    embeddings = [module for module in model.modules() if isinstance(getattr(module, "quant_method", None), _Packed)]
    embeddings = [module for module in embeddings if isinstance(module.quant_method, PackedEmbeddingMethod)]
    heads = [module for module in embeddings if isinstance(module, ParallelLMHead)]
    for module in heads or embeddings:
        panels_of(module)


def _copies_fit(layers: list[Any]) -> bool:
    if not torch.backends.mkldnn.is_available():
        logger.info("linear layers are SGLang's own: there is no compiled library, and this PyTorch has no oneDNN")
        return False
    needed = sum(module.weight.numel() * 4 for module in layers)
    free = psutil.virtual_memory().available
    if needed > _MEMORY_SHARE * free:
        logger.warning(
            "linear layers are SGLang's own: packed copies would take %.1f GB of %.1f GB free", needed / 1e9, free / 1e9
        )
        return False
    return True


def _can_be_packed(module: torch.nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(getattr(module, "quant_method", None)) in _METHODS
        and isinstance(weight, torch.Tensor)
        and not isinstance(weight, HeldWeight)
        and weight.dim() == 2
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
    )
