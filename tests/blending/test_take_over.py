"""Every take-over is the plain one: the compiled one on this machine, the GPUs' in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.blending.rotation import Rotation
from rksc_sgl.blending.take_over import DonorRows, Layers, PlainTakeOver, TakeOver, deviation_of
from rksc_sgl.cpu_platform.native.take_over import NativeTakeOver
from rksc_sgl.errors import RotationError
from rksc_sgl.sglang_plugin.passes.taking_over import proven_or_plain
from tests.interpreter import interpreted

SLOTS, POSITIONS = 90, 64


def table(pairs: int, scale: float = 1.0) -> torch.Tensor:
    angles = torch.arange(POSITIONS)[:, None] * 100.0 ** -(torch.arange(pairs) / pairs)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * scale


def layers_of(
    count: int, heads: int, size: int, rotary: int, *, neox: bool, value_size: int, dtype: torch.dtype, seed: int
) -> Layers:
    source = torch.Generator().manual_seed(seed)
    rotation = Rotation(table(rotary // 2, 1.2), size, rotary, neox) if rotary else None
    keys, values = (
        [torch.randn(SLOTS, heads, width, generator=source).to(dtype) for _ in range(count)]
        for width in (size, value_size)
    )
    return Layers(keys, values, rotation)


def rows_of(count: int, seed: int) -> DonorRows:
    """Random slots, no one of which is both; some tokens stay where they were."""
    source = torch.Generator().manual_seed(seed)
    slots = torch.randperm(SLOTS, generator=source)
    old, new = torch.randint(POSITIONS, (2, count), generator=source)
    new[::3] = old[::3]
    return DonorRows(slots[:count], slots[count : 2 * count], old, new, POSITIONS - 1)


def copied(layers: Layers) -> Layers:
    return Layers([one.clone() for one in layers.keys], [one.clone() for one in layers.values], layers.rotation)


def check(make: type, layers: Layers, rows: DonorRows, taken: torch.Tensor, tolerance: float) -> TakeOver:
    """One operation does what the plain one does, and leaves all other slots as they were."""
    expected, found = copied(layers), copied(layers)
    PlainTakeOver(expected)(rows, taken)
    operation = make(found)
    assert operation is not None
    operation(rows, taken)
    moved = torch.zeros(SLOTS, dtype=torch.bool)
    moved[rows.own[taken][rows.old[taken] != rows.new[taken]]] = True
    for ours, right in zip([*found.keys, *found.values], [*expected.keys, *expected.values], strict=True):
        assert torch.equal(ours[~moved], right[~moved]), "what does not turn is the same to the bit"
        torch.testing.assert_close(ours.float(), right.float(), atol=tolerance, rtol=tolerance)
    return operation


SHAPES: Sequence[tuple[int, int, int, int]] = ((1, 16, 16, 16), (2, 64, 64, 64), (3, 96, 96, 40), (2, 128, 64, 128))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SHAPES), st.integers(1, 5), st.integers(0, 40), st.booleans(), st.booleans(), st.integers(0, 2**20)
)
def test_the_compiled_take_over_is_the_plain_one(
    shape: tuple[int, int, int, int], count: int, tokens: int, neox: bool, turned: bool, seed: int
) -> None:
    heads, size, rotary, value_size = shape
    layers = layers_of(
        count, heads, size, rotary if turned else 0, neox=neox, value_size=value_size, dtype=torch.float32, seed=seed
    )
    rows = rows_of(tokens, seed)
    taken = torch.randperm(tokens)[: tokens // 2]
    check(NativeTakeOver.of, layers, rows, taken, 1e-5)  # type: ignore[arg-type]


def test_no_take_over_reads_a_table_past_its_end() -> None:
    layers = layers_of(1, 1, 16, 16, neox=True, value_size=16, dtype=torch.float32, seed=0)
    operation = NativeTakeOver.of(layers)
    assert operation is not None
    with pytest.raises(RotationError, match="positions must be from 0 to 63, got 64"):
        operation(replace(rows_of(4, 0), highest=POSITIONS), torch.arange(4))


@pytest.mark.parametrize("rotary", [0, 16])
def test_an_operation_is_used_where_a_sample_agrees_with_the_plain_one_and_only_there(
    rotary: int, caplog: pytest.LogCaptureFixture
) -> None:
    layers = layers_of(3, 2, 16, rotary, neox=True, value_size=8, dtype=torch.float32, seed=0)
    before = copied(layers)
    assert isinstance(proven_or_plain(NativeTakeOver.of, layers), NativeTakeOver)  # type: ignore[arg-type]

    class Wrong(PlainTakeOver):
        def __call__(self, rows: DonorRows, taken: torch.Tensor) -> None:
            super().__call__(rows, taken)
            self.layers.values[-1][rows.own[taken[-1]]] += 1.0

    class Failing(PlainTakeOver):
        def __call__(self, rows: DonorRows, taken: torch.Tensor) -> None:
            raise RuntimeError("no such instruction")

    for make, said in ((Wrong, "values are 1 apart"), (Failing, "no such instruction")):
        assert type(proven_or_plain(make, layers)) is PlainTakeOver
        assert said in caplog.text
    assert all(map(torch.equal, layers.keys, before.keys)), "the sample has memory of its own"


def test_what_the_library_does_not_read_is_left_to_the_plain_take_over() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert NativeTakeOver.of(layers_of(1, 1, 16, 16, neox=True, value_size=16, dtype=dtype, seed=0)) is None


def test_deviation_is_relative_to_the_donor() -> None:
    values = torch.zeros(3, 2, 4)
    values[0], values[1], values[2] = 3.0, 2.0, 2.0
    rows = DonorRows(torch.tensor([0, 1]), torch.tensor([1, 2]), torch.zeros(2).long(), torch.zeros(2).long(), 0)
    torch.testing.assert_close(deviation_of(values, rows), torch.tensor([0.5, 0.0]))


def test_the_launches_of_gpus_are_the_plain_ones_in_the_interpreter() -> None:
    assert "12 take-overs and 6 deviations" in interpreted(Path(__file__).with_name("interpreted_take_over.py"))
