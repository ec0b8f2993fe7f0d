"""Cached keys at other positions: rotary embeddings undone at the old position and applied at the new one.

A rotary embedding (Su et al. 2021) turns each pair of key dimensions by an angle that depends on position only, so
that a key moves by the difference of two rows of the table that the model itself uses. YaRN (Peng et al. 2023) also
scales by m; the table holds m cos and m sin, and m^2 = cos^2 + sin^2 is divided out, pair by pair.

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

import torch

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


@dataclass(frozen=True)
class Turn:
    """The turn of ``n`` tokens from old to new positions; computed once, used in every layer of one rotation.

    Attributes:
        cos: float32 [n, 1, rotary_dim / 2].
        sin: float32, as ``cos``.
        moved: bool [n, 1, 1], whether the position changes at all.
        is_neox_style: pairs are (i, i + rotary_dim / 2); otherwise (2i, 2i + 1).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    moved: torch.Tensor
    is_neox_style: bool

    def rotate(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys [n, kv_heads, head_size] at their new positions, in a new tensor of their dtype.

        Computed in float32. Keys that do not move, and dimensions beyond ``rotary_dim``, are equal bit for bit.
        """
        half = self.cos.shape[-1]
        rotary = keys[..., : 2 * half].float()
        pairs = rotary.unflatten(-1, (2, half) if self.is_neox_style else (half, 2))
        first, second = pairs.unbind(-2 if self.is_neox_style else -1)
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        rotary = torch.stack(turned, dim=-2 if self.is_neox_style else -1).flatten(-2).to(keys.dtype)
        result = keys.clone()
        result[..., : 2 * half] = torch.where(self.moved, rotary, keys[..., : 2 * half])
        return result


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotary embedding of one attention layer, or of all.

    Attributes:
        cos_sin: [positions, rotary_dim], cosines then sines, scaled as the model scales them; any float dtype.
            Kept, not copied: a table that SGLang replaces later (another dtype, more positions) needs another Rotation.
        head_size: dimensions of a key.
        rotary_dim: how many of them, from the first on, are rotated.
        is_neox_style: which dimensions are pairs; see :class:`Turn`.
    """

    cos_sin: torch.Tensor
    head_size: int
    rotary_dim: int
    is_neox_style: bool

    def __post_init__(self) -> None:
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_size:
            raise RotationError(
                f"rotary_dim must be even, above 0 and at most head_size {self.head_size}, got {self.rotary_dim}"
            )
        if self.cos_sin.ndim != 2 or self.cos_sin.shape[1] != self.rotary_dim:
            raise RotationError(
                f"cos_sin must be [positions, rotary_dim = {self.rotary_dim}], got {list(self.cos_sin.shape)}"
            )

    @property
    def positions(self) -> int:
        """Positions that the table covers, from 0."""
        return self.cos_sin.shape[0]

    def turn(self, old: torch.Tensor, new: torch.Tensor) -> Turn:
        """The turn from positions ``old`` to ``new``, int64 [n] each, on the table's device.

        Raises:
            RotationError: a position is not in the table (found on the CPU; on other devices the lookup itself fails).
        """
        if old.shape != new.shape or old.ndim != 1:
            raise RotationError(f"old and new must be [n] each, got {list(old.shape)} and {list(new.shape)}")
        if old.device.type == "cpu":
            self._check(old)
            self._check(new)
        cos_old, sin_old = self.cos_sin[old].float().chunk(2, dim=-1)
        cos_new, sin_new = self.cos_sin[new].float().chunk(2, dim=-1)
        square = cos_old * cos_old + sin_old * sin_old
        cos = (cos_new * cos_old + sin_new * sin_old) / square
        sin = (sin_new * cos_old - cos_new * sin_old) / square
        return Turn(cos.unsqueeze(1), sin.unsqueeze(1), (old != new).view(-1, 1, 1), self.is_neox_style)

    def rotate(self, keys: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """``R(new) R(old)^-1 keys`` in a new tensor; the same keys bit for bit where ``old`` equals ``new``.

        Args:
            keys: [n, kv_heads, head_size], rotated for ``old``, any float dtype.
            old: int64 [n], positions that the keys have.
            new: int64 [n], positions that they are to have.

        Raises:
            RotationError: shapes do not fit, or a position is not in the table.
        """
        if keys.ndim != 3 or keys.shape[0] != len(old) or keys.shape[2] != self.head_size:
            expected = f"[n = {len(old)}, kv_heads, head_size = {self.head_size}]"
            raise RotationError(f"keys must be {expected}, got {list(keys.shape)}")
        return self.turn(old, new).rotate(keys)

    def _check(self, positions: torch.Tensor) -> None:
        if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < self.positions:
            span = f"{int(positions.min())} to {int(positions.max())}"
            raise RotationError(f"positions must be from 0 to {self.positions - 1}, got {span}")


def rotation_of(model: Any) -> Rotation | list[Rotation | None]:
    """How the cached keys of an SGLang model are rotated. Build it after the model is loaded and has run once.

    Returns:
        The one rotation if all attention layers share a table; otherwise one for each attention layer, by ascending
        ``layer_id``. None stands for a layer without position (NoPE), whose keys stay as they are.

    Raises:
        RotationError: the model cannot be re-rotated; it says which class is why.
    """
    return _Model(model).rotations()


def refusal_of(model: Any) -> str:
    """Why the keys of a model cannot be re-rotated, naming the class; empty if they can."""
    try:
        rotation_of(model)
    except RotationError as error:
        return str(error)
    return ""


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

    def rotations(self) -> Rotation | list[Rotation | None]:
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
        first = each[0]
        return first if first is not None and all(one is first for one in each) else each

    def _check_strays(self, known: list[Rotation]) -> None:
        """Rotary modules outside the layers may be what is applied (Gemma 3): they must say the same."""
        inside = {id(getattr(layer.owner, "rotary_emb", None)) for layer in self.layers}
        bare = any(not hasattr(layer.owner, "rotary_emb") for layer in self.layers)
        for module in _strays(self.modules, inside):
            if bare or not any(_agrees(module, rotation) for rotation in known):
                kind = type(module).__name__
                raise RotationError(
                    f"{kind} cannot be re-rotated: it rotates outside the layers, by no table of theirs"
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
