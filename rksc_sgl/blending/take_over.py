"""Donor KV of many tokens and layers brought into a branch's own slots, keys turned to their new positions.

:class:`PlainTakeOver` says what is done, layer by layer; the others do it in one operation whatever the number of
layers: :mod:`rksc_sgl.blending.kernels` on GPUs, ``rksc_sgl.cpu_platform.native.take_over`` on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rksc_sgl.blending.rotation import Rotation


@dataclass(frozen=True, eq=False)
class DonorRows:
    """Tokens beside their donors' tokens, of one sequence after another. All int64 ``[n]``, on one device.

    Attributes:
        own: slots of the tokens.
        theirs: slots of the donors' tokens; any slot where there is none.
        old: positions of the donors' tokens.
        new: positions of the tokens.
        highest: the largest of these positions, on the host.
    """

    own: torch.Tensor
    theirs: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor
    highest: int


@dataclass(frozen=True, eq=False)
class Layers:
    """KV of layers whose keys are turned alike.

    Attributes:
        keys: of each layer, ``[slots, kv_heads, head_size]``; all of one shape, type and device.
        values: of each layer, ``[slots, kv_heads, value_size]``.
        rotation: of their keys; None where these have no position.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    rotation: Rotation | None


class TakeOver(Protocol):
    """Brings donor KV over, in all layers that it was made for."""

    def __call__(self, rows: DonorRows, taken: torch.Tensor) -> None:
        """
        Args:
            rows: tokens beside their donors'. No slot of ``own`` may be one of ``theirs``.
            taken: int64 ``[t]``, which of the rows are taken over, on their device.

        Raises:
            RotationError: the rotary table does not cover the rows' positions.
        """


class PlainTakeOver:
    """One layer after another, in PyTorch's operations: the oracle of the others."""

    def __init__(self, layers: Layers) -> None:
        self.layers = layers

    def __call__(self, rows: DonorRows, taken: torch.Tensor) -> None:
        own, theirs = rows.own[taken], rows.theirs[taken]
        rotation = self.layers.rotation
        turn = None if rotation is None else rotation.turn(rows.old[taken], rows.new[taken])
        for keys, values in zip(self.layers.keys, self.layers.values, strict=True):
            found = keys[theirs]
            keys[own] = found if turn is None else turn.rotate(found)
            values[own] = values[theirs]


def deviation_of(values: torch.Tensor, rows: DonorRows) -> torch.Tensor:
    """How far the values of tokens are from their donors', relative to these.

    Args:
        values: ``[slots, kv_heads, value_size]`` of one layer.
        rows: tokens beside their donors'.

    Returns:
        float32 ``[n]``; of no meaning where there is no donor.
    """
    ours, theirs = values[rows.own].flatten(1).float(), values[rows.theirs].flatten(1).float()
    return (ours - theirs).norm(dim=1) / theirs.norm(dim=1).clamp(min=1e-6)


ALLOWED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}  # what rounding may move a number near 1
_SAMPLE = 24  # tokens


def difference_from_plain(make: Callable[[Layers], TakeOver], layers: Layers) -> str:
    """What an operation does otherwise than the plain one, on a small sample of such layers; empty where nothing.

    For operations that were never run on the device that is here.
    """
    source = torch.Generator().manual_seed(0)

    def numbers(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(2 * _SAMPLE, *like.shape[1:], generator=source).to(like.device, like.dtype)

    keys, values = ([numbers(part[0]) for _ in part[:2]] for part in (layers.keys, layers.values))
    expected, found = (Layers([k.clone() for k in keys], [v.clone() for v in values], layers.rotation) for _ in "12")
    positions = 2 * _SAMPLE if layers.rotation is None else layers.rotation.positions
    slots = torch.randperm(2 * _SAMPLE, generator=source)
    old, new = torch.randint(positions, (2, _SAMPLE), generator=source)
    new[::3] = old[::3]  # these stay where they were
    on_device = [one.to(keys[0].device) for one in (slots[:_SAMPLE], slots[_SAMPLE:], old, new)]
    rows = DonorRows(on_device[0], on_device[1], on_device[2], on_device[3], positions - 1)
    taken = torch.arange(0, _SAMPLE, 2, device=keys[0].device)
    PlainTakeOver(expected)(rows, taken)
    make(found)(rows, taken)
    for name in ("keys", "values"):
        for ours, right in zip(getattr(found, name), getattr(expected, name), strict=True):
            apart = float((ours.float() - right.float()).abs().max())
            if not apart <= ALLOWED.get(right.dtype, 0.0):
                return f"{name} are {apart:.3g} apart from what they should be"
    return ""
