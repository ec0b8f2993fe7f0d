"""How donor KV is compared and taken over on this device, and where SGLang keeps it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from rksc_sgl.blending.rotation import Rotation
from rksc_sgl.blending.take_over import DonorRows, Layers, PlainTakeOver, TakeOver, deviation_of, difference_from_plain
from rksc_sgl.cpu_platform.native.take_over import NativeTakeOver
from rksc_sgl.sglang_plugin.passes.rotary_models import rotation_in_layers

logger = logging.getLogger(__name__)

Deviation = Callable[[torch.Tensor, DonorRows], torch.Tensor]


def prepare(runner: Any, probe: int) -> None:
    """Make ready, and try, what :func:`take_over` and :func:`deviations` use after the first ``probe`` layers.

    A model that has no layer after these never blends.
    """
    if probe < len(rotation_in_layers(runner.model)):
        _ready(runner, probe)


def take_over(runner: Any, rows: DonorRows, taken: torch.Tensor, probe: int) -> None:
    """Bring the donors' KV of some rows over, in every layer after the first ``probe``: one operation for all of them.

    (One for all that turn their keys alike; a model with several rotary tables has as many.)

    Args:
        runner: SGLang's ``ModelRunner``.
        rows: tokens beside their donors'.
        taken: int64 ``[t]``, which of the rows.
        probe: how many layers have run.
    """
    for operation in _ready(runner, probe).operations:
        operation(rows, taken)


def deviations(runner: Any, rows: DonorRows, probe: int) -> torch.Tensor:
    """float32 ``[n]``, how far the values of the last of the first ``probe`` layers are from the donors'."""
    return _ready(runner, probe).deviation(runner.token_to_kv_pool.get_value_buffer(probe - 1), rows)


@dataclass(frozen=True, eq=False)
class _Ready:
    """What was made ready for a pool."""

    probe: int
    rotations: Sequence[Rotation | None]
    first_keys: int  # the address of the keys of the first layer
    operations: Sequence[TakeOver]
    deviation: Deviation

    @classmethod
    def of(cls, pool: Any, rotations: Sequence[Rotation | None], probe: int) -> _Ready:
        alike: dict[int, list[int]] = {}
        for layer in range(probe, len(rotations)):
            alike.setdefault(id(rotations[layer]), []).append(layer)
        operations = [
            operation_for(
                Layers(
                    [pool.get_key_buffer(layer) for layer in layers],
                    [pool.get_value_buffer(layer) for layer in layers],
                    rotations[layers[0]],
                )
            )
            for layers in alike.values()
        ]
        deviation = deviation_for(pool.get_value_buffer(probe - 1))
        return cls(probe, rotations, pool.get_key_buffer(probe).data_ptr(), operations, deviation)

    def serves(self, pool: Any, rotations: Sequence[Rotation | None], probe: int) -> bool:
        """Whether it was made of these, and not of tables or buffers that SGLang has replaced since."""
        same = self.rotations is rotations and self.probe == probe
        return same and self.first_keys == pool.get_key_buffer(probe).data_ptr()


def _ready(runner: Any, probe: int) -> _Ready:
    pool, rotations = runner.token_to_kv_pool, rotation_in_layers(runner.model)
    known = _known.get(pool)
    if known is None or not known.serves(pool, rotations, probe):
        known = _known[pool] = _Ready.of(pool, rotations, probe)
    return known


def operation_for(layers: Layers) -> TakeOver:
    """What takes over KV of these layers on their device; a launch only where it does there what it should."""
    if not layers.keys[0].is_cuda:
        return NativeTakeOver.of(layers) or PlainTakeOver(layers)
    from rksc_sgl.blending.kernels import TritonTakeOver, refusal_of_triton

    return PlainTakeOver(layers) if refusal_of_triton(layers) else proven_or_plain(TritonTakeOver, layers)


def proven_or_plain(make: Callable[[Layers], TakeOver], layers: Layers) -> TakeOver:
    """An operation, where a sample on this device agrees with the plain one; the plain one otherwise."""
    try:
        difference = difference_from_plain(make, layers)
    except Exception as error:  # of a compiler or a driver: whatever it is, it would end the server in a pass
        difference = f"{type(error).__name__}: {error}"
    if not difference:
        return make(layers)
    logger.warning("rksc: donor KV is taken over layer by layer, which is slower: %s", difference)
    return PlainTakeOver(layers)


def deviation_for(values: torch.Tensor) -> Deviation:
    """What compares values such as these on their device; a launch only where it does there what it should."""
    if not values.is_cuda or not values[0].is_contiguous():
        return deviation_of
    try:
        from rksc_sgl.blending.kernels import triton_deviation_of

        sample = torch.randn(32, *values.shape[1:], device=values.device).to(values.dtype)
        first, second = torch.arange(32, device=values.device).chunk(2)
        rows = DonorRows(first, second, first, first, 32)
        torch.testing.assert_close(triton_deviation_of(sample, rows), deviation_of(sample, rows), atol=1e-3, rtol=1e-3)
    except Exception as error:  # as above
        logger.warning("rksc: values are compared in several operations, which is slower: %s", error)
        return deviation_of
    return triton_deviation_of


_known: WeakKeyDictionary[Any, _Ready] = WeakKeyDictionary()
