"""How the cached keys of an SGLang model are rotated.

Which models can be re-rotated is decided by class, as read in SGLang 0.5.23. Tables (``sglang.srt.layers.
rotary_embedding``) that are taken, because they are fixed and indexed by position alone:

- ``RotaryEmbedding``: plain, also partial and interleaved (``is_neox_style=False``);
- ``LinearScalingRotaryEmbedding`` with one scaling factor (with several, the row depends on the LoRA adapter);
- ``Llama3RotaryEmbedding``; ``DynamicNTKScalingRotaryEmbedding`` and ``DynamicNTKAlphaRotaryEmbedding``, whose base
  is computed once for the longest length or from a fixed alpha; ``YaRNScalingRotaryEmbedding``;
- ``Gemma4RotaryEmbedding``: a plain one over the whole head with angle 0 for the dimensions that stay.

Not taken, by name: ``MRotaryEmbedding``, ``YaRNScalingMRotaryEmbedding``, ``Ernie4_5_VLRotaryEmbedding`` and
``BailingMRotaryEmbedding`` (several positions for one token), ``Phi3LongRoPEScaledRotaryEmbedding`` (a long and a
short table, chosen by the batch's longest position), ``DualChunkRotaryEmbedding`` (a table for each chunk),
``FourierRotaryEmbedding`` (sums of cosines: no rotation), ``DeepseekScalingRotaryEmbedding`` (made for keys without
heads), ``Llama4VisionRotaryEmbedding`` (no text), and every class not named here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch

from rksc_sgl.blending.rotation import Rotation
from rksc_sgl.errors import RotationError

ACCEPTED = (
    "RotaryEmbedding",
    "LinearScalingRotaryEmbedding",
    "Llama3RotaryEmbedding",
    "DynamicNTKScalingRotaryEmbedding",
    "DynamicNTKAlphaRotaryEmbedding",
    "YaRNScalingRotaryEmbedding",
    "Gemma4RotaryEmbedding",
)
REASONS = {
    "Phi3LongRoPEScaledRotaryEmbedding": "it has a short and a long table and chooses by the length of the sequence",
    "DualChunkRotaryEmbedding": "it has one table for each kind of chunk",
    "FourierRotaryEmbedding": "its sums of cosines are no rotation",
    "DeepseekScalingRotaryEmbedding": "it rotates latent keys that all heads share",
    "Llama4VisionRotaryEmbedding": "it rotates image patches",
}
# attention classes that hold a rotary embedding and use it in some layers only
USES_ROTARY: dict[str, Callable[[Any], bool]] = {
    "AfmoeAttention": lambda layer: bool(layer.is_local_attention),
    "Cohere2MoeAttention": lambda layer: bool(layer.is_sliding or layer.force_rope),
    "CohereAttention": lambda layer: bool(layer.v1 or layer.sliding_window_size > 0),
    "Exaone4Attention": lambda layer: bool(not layer.sliding_window_pattern or layer.is_sliding),
    "ExaoneMoEAttention": lambda layer: bool(layer.sliding_window or layer.apply_rope_all_layers),
    "MiniCPMAttention": lambda layer: bool(layer.attn_use_rope),
}
# attention classes whose cached keys are not simply rotated ones
NOT_ROTATED_LAST = {"HunYuanAttention": "it normalizes keys with weights after their rotation"}


def rotation_of(model: Any) -> Rotation | list[Rotation | None]:
    """How the cached keys of an SGLang model are rotated. Build it after the model is loaded and has run once.

    Returns:
        The one rotation if all attention layers share a table; otherwise one for each attention layer, by ascending
        ``layer_id``. None stands for a layer without position (NoPE), whose keys stay as they are.

    Raises:
        RotationError: the model cannot be re-rotated; it says which class is why.
    """
    each = _Model(model).in_layers
    first = each[0]
    return first if first is not None and all(one is first for one in each) else each


def refusal_of(model: Any) -> str:
    """Why the keys of a model cannot be re-rotated, naming the class; empty if they can."""
    try:
        rotation_of(model)
    except RotationError as error:
        return str(error)
    return ""


def rotation_in_layers(model: Any) -> list[Rotation | None]:
    """:func:`rotation_of` for each layer; found once a model, and again where SGLang has replaced a table."""
    known = _known.get(model)
    if known is None or not known.is_current:
        known = _known[model] = _Model(model)
    return known.in_layers


def attention_modules(model: Any) -> list[Any]:
    """The attention of each layer of a model that can be re-rotated, as SGLang calls it, by ascending ``layer_id``."""
    rotation_in_layers(model)
    return [layer.attention for layer in _known[model].layers]


@dataclass(frozen=True)
class _Layer:
    """An attention layer: the module that owns the paged attention (``RadixAttention``), and that attention."""

    owner: Any
    attention: Any

    @property
    def kind(self) -> str:
        return type(self.owner).__name__

    @property
    def rotary(self) -> Any:
        """The rotary embedding that this layer applies, or None."""
        rotary = getattr(self.owner, "rotary_emb", None)
        applies = USES_ROTARY.get(self.kind)
        return None if rotary is None or (applies and not applies(self.owner)) else rotary

    def check(self) -> None:
        kind = self.kind
        latent = "MLA" in kind or kind.startswith(("MQA", "Mqa")) or hasattr(self.owner, "kv_lora_rank")
        if latent:
            raise RotationError(f"{kind} cannot be re-rotated: it caches latent keys, none for each head")
        if getattr(self.attention, "is_cross_attention", False):
            raise RotationError(f"{kind} cannot be re-rotated: it attends to another sequence")
        if kind in NOT_ROTATED_LAST:
            raise RotationError(f"{kind} cannot be re-rotated: {NOT_ROTATED_LAST[kind]}")
        if self.rotary is not None:
            _check_rotary(self.rotary)


class _Model:
    """What is found by a walk through a model's modules."""

    def __init__(self, model: Any) -> None:
        self.name = type(model).__name__
        self.modules = list(model.modules())

    @cached_property
    def layers(self) -> list[_Layer]:
        found = [_Layer(owner, child) for owner in self.modules for child in owner.children() if _is_attention(child)]
        return sorted(found, key=lambda layer: layer.attention.layer_id)

    @cached_property
    def in_layers(self) -> list[Rotation | None]:
        """The rotation of each attention layer, by ascending ``layer_id``."""
        if not self.layers:
            raise RotationError(f"{self.name} cannot be re-rotated: no attention layer was found in it")
        for layer in self.layers:
            layer.check()
        if all(layer.rotary is None for layer in self.layers):
            kind = self.layers[0].kind
            raise RotationError(f"{self.name} cannot be re-rotated: no {kind} has a rotary_emb")
        known: dict[int, Rotation] = {}
        each = [None if layer.rotary is None else _shared(layer.rotary, known) for layer in self.layers]
        self._check_strays(list(known.values()))
        return each

    @property
    def is_current(self) -> bool:
        """Whether the table of each layer is still the one that was found."""
        pairs = zip(self.layers, self.in_layers, strict=True)
        return all(one is None or layer.rotary.cos_sin_cache is one.cos_sin for layer, one in pairs)

    def _check_strays(self, known: list[Rotation]) -> None:
        """Rotary modules outside the layers may be what is applied (Gemma 3): they must say the same."""
        inside = {id(getattr(layer.owner, "rotary_emb", None)) for layer in self.layers}
        bare = any(not hasattr(layer.owner, "rotary_emb") for layer in self.layers)
        for module in _strays(self.modules, inside):
            if bare or not any(_agrees(module, rotation) for rotation in known):
                kind = type(module).__name__
                raise RotationError(
                    f"{kind} cannot be re-rotated: "
                    "its rotation is applied outside the attention layers, with a table that no layer has"
                )


def _is_attention(module: Any) -> bool:
    return hasattr(module, "layer_id") and hasattr(module, "tp_k_head_num")


def _check_rotary(rotary: Any) -> None:
    kind = type(rotary).__name__
    if getattr(rotary, "mrope_section", None) is not None:
        raise RotationError(f"{kind} cannot be re-rotated: a token has several positions (mrope_section)")
    if kind in REASONS:
        raise RotationError(f"{kind} cannot be re-rotated: {REASONS[kind]}")
    if getattr(rotary, "cos_sin_cache", None) is None:
        raise RotationError(f"{kind} cannot be re-rotated: it has no cos_sin_cache")
    if kind not in ACCEPTED:
        raise RotationError(f"{kind} cannot be re-rotated: only {', '.join(ACCEPTED)} are known to be fixed tables")
    if len(getattr(rotary, "scaling_factors", ())) > 1:
        raise RotationError(f"{kind} cannot be re-rotated: it has several scaling factors, chosen by adapter")


def _shared(rotary: Any, known: dict[int, Rotation]) -> Rotation:
    """The rotation of a rotary embedding, one and the same for equal tables."""
    if id(rotary) not in known:
        own = Rotation(rotary.cos_sin_cache, rotary.head_size, rotary.rotary_dim, bool(rotary.is_neox_style))
        known[id(rotary)] = next((other for other in known.values() if _same(own, other)), own)
    return known[id(rotary)]


def _same(one: Rotation, other: Rotation) -> bool:
    shape = (one.head_size, one.rotary_dim, one.is_neox_style) == (
        other.head_size,
        other.rotary_dim,
        other.is_neox_style,
    )
    return shape and (one.cos_sin is other.cos_sin or torch.equal(one.cos_sin, other.cos_sin))


def _strays(modules: list[Any], inside: set[int]) -> Iterator[Any]:
    return (module for module in modules if "RotaryEmbedding" in type(module).__name__ and id(module) not in inside)


def _agrees(module: Any, rotation: Rotation) -> bool:
    """Whether a module with frequencies (``inv_freq``) turns as a rotation does, at a few positions."""
    frequencies = getattr(module, "inv_freq", None)
    if frequencies is None or 2 * len(frequencies) != rotation.rotary_dim:
        return False
    if "dynamic" in getattr(module, "rope_type", ""):
        return False
    places = torch.tensor([place for place in (1, 17, 401) if place < rotation.positions], device=frequencies.device)
    angles = places[:, None].float() * frequencies.float()
    expected = torch.cat((angles.cos(), angles.sin()), dim=-1) * getattr(module, "attention_scaling", 1.0)
    table = rotation.cos_sin[places.to(rotation.cos_sin.device)].to(expected)
    return torch.allclose(table, expected, atol=2e-2 if rotation.cos_sin.element_size() < 4 else 1e-3)


_known: WeakKeyDictionary[Any, _Model] = WeakKeyDictionary()
