"""Cached keys at other positions: rotary embeddings undone at the old position and applied at the new one.

A rotary embedding (Su et al. 2021) turns each pair of key dimensions by an angle that depends on position only, so
that a key moves by the difference of two rows of the table that the model itself uses. YaRN (Peng et al. 2023) also
scales by m; the table holds m cos and m sin, and m^2 = cos^2 + sin^2 is divided out, pair by pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rksc_sgl.errors import RotationError


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

    def covers(self, highest: int) -> None:
        """Refuse positions up to this one where the table does not have it.

        Raises:
            RotationError: saying up to where it goes.
        """
        if highest >= self.positions:
            raise RotationError(f"positions must be from 0 to {self.positions - 1}, got {highest}")

    def _check(self, positions: torch.Tensor) -> None:
        if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < self.positions:
            span = f"{int(positions.min())} to {int(positions.max())}"
            raise RotationError(f"positions must be from 0 to {self.positions - 1}, got {span}")
