"""``layers.c`` against the same in PyTorch, on random ragged batches; how it is built, and what is done without it."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.cpu_platform.attention.sequences import QuerySequence
from rksc_sgl.cpu_platform.native import build
from rksc_sgl.cpu_platform.native.linear import PanelWeight
from rksc_sgl.cpu_platform.native.passes import LayerStruct, native_pass
from rksc_sgl.errors import NativeBuildError

SLOTS = 700
Turn: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"  # cosines and sines, [rows, dim / 2]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found = build.library()
    assert found is not None, "this machine has no C compiler"
    return found


@dataclass(frozen=True)
class Shape:
    kv_heads: int
    group: int
    dim: int

    @property
    def queries(self) -> int:
        return self.kv_heads * self.group


def ragged(shared: int, prefixes: list[int], tokens: list[int], page: int, seed: int) -> list[QuerySequence]:
    """Sequences whose first ``shared`` slots are the same, in shuffled pages."""
    source = np.random.default_rng(seed)
    pages = source.permutation(SLOTS // page)
    slots = (pages[:, None] * page + np.arange(page)).reshape(-1)
    free = iter(slots[shared:])
    sequences, row = [], 0
    for prefix, count in zip(prefixes, tokens, strict=True):
        common = min(shared, prefix)
        own = np.fromiter(itertools.islice(free, prefix + count - common), dtype=np.int64)
        sequences.append(QuerySequence(np.concatenate([slots[:common], own]), prefix, count, row))
        row += count
    return sequences


def turned(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    cos, sin = cosines[:, None], sines[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Layer:
    """Random weights of one decoder layer, in PyTorch and as the library has them."""

    def __init__(self, shape: Shape, normed: bool, biased: bool, hidden: int = 40, half: int = 24) -> None:
        self.shape, self.normed, self.hidden, self.half = shape, normed, hidden, half
        sizes = {
            "qkv": ((shape.queries + 2 * shape.kv_heads) * shape.dim, hidden),
            "output": (hidden, shape.queries * shape.dim),
            "gate_up": (2 * half, hidden),
            "down": (hidden, half),
        }
        self.weights = {name: torch.randn(size) / size[1] ** 0.5 for name, size in sizes.items()}
        self.biases = {name: torch.randn(outputs) if biased else None for name, (outputs, _) in sizes.items()}
        self.panels = {name: PanelWeight.of(weight) for name, weight in self.weights.items()}
        self.norms = [torch.rand(size) + 0.5 for size in (hidden, hidden, shape.dim, shape.dim)]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[name], self.biases[name])

    def struct(self, keys: torch.Tensor, values: torch.Tensor) -> LayerStruct:
        of_heads = [one.data_ptr() if self.normed else None for one in self.norms[2:]]
        return LayerStruct(
            *(self.panels[name].struct(self.biases[name]) for name in ("qkv", "output", "gate_up", "down")),
            *(one.data_ptr() for one in (keys, values, *self.norms[:2])),
            *of_heads,
            *(1e-5, 2e-5, 1e-5, 1e-6, 0.3),
        )

    def forward(
        self, hidden: torch.Tensor, sequences: list[QuerySequence], keys: torch.Tensor, values: torch.Tensor, turn: Turn
    ) -> torch.Tensor:
        """The layer in plain tensors; writes keys ``[slots, kv_heads, dim]`` and values."""
        shape, rows = self.shape, hidden.shape[0]
        normed = F.rms_norm(hidden, (self.hidden,), self.norms[0], 1e-5)
        qkv = self.linear("qkv", normed).view(rows, -1, shape.dim)
        queries, own = qkv[:, : shape.queries], qkv[:, shape.queries : -shape.kv_heads]
        if self.normed:
            queries = F.rms_norm(queries, (shape.dim,), self.norms[2], 1e-5)
            own = F.rms_norm(own, (shape.dim,), self.norms[3], 1e-6)
        new = new_slots(sequences)
        keys[new], values[new] = turned(own, *turn), qkv[:, -shape.kv_heads :]
        queries, out = turned(queries, *turn), torch.empty(rows, shape.queries, shape.dim)
        for one in sequences:
            for step in range(one.tokens):
                seen = torch.from_numpy(one.slots[: one.prefix + step + 1].astype(np.int64))
                all_keys = keys[seen].repeat_interleave(shape.group, dim=1)
                scores = torch.einsum("hd,thd->ht", queries[one.row + step], all_keys) * 0.3
                mixed = values[seen].repeat_interleave(shape.group, dim=1)
                out[one.row + step] = torch.einsum("ht,thd->hd", scores.softmax(dim=-1), mixed)
        hidden = hidden + self.linear("output", out.flatten(1))
        gate, up = self.linear("gate_up", F.rms_norm(hidden, (self.hidden,), self.norms[1], 2e-5)).chunk(2, dim=-1)
        return hidden + self.linear("down", F.silu(gate) * up)


def new_slots(sequences: list[QuerySequence]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([one.slots[one.prefix :] for one in sequences]))


def scratch_of(library: ctypes.CDLL, rows: int, layer: Layer) -> list[torch.Tensor]:
    """Memory for what a pass computes on the way."""
    widest = max(layer.hidden, layer.half, layer.shape.queries * layer.shape.dim)
    ordered = torch.full((int(library.rksc_ordered_floats(rows, widest)),), torch.nan)
    return [*(torch.full((rows, width), torch.nan) for width in (layer.hidden, 2 * layer.half, layer.half)), ordered]


def check(
    library: ctypes.CDLL,
    sequences: list[QuerySequence],
    shape: Shape,
    normed: bool = False,
    biased: bool = False,
    unit_keys: int = 128,
) -> None:
    """Two layers of a pass, on keys and values of their own."""
    torch.manual_seed(len(sequences))
    rows = sum(one.tokens for one in sequences)
    layers = [Layer(shape, normed, biased) for _ in range(2)]
    hidden = torch.randn(rows, layers[0].hidden)
    angles = torch.rand(rows, shape.dim // 2) * 6
    turn = angles.cos(), angles.sin()
    pools = [tuple(torch.randn(SLOTS, shape.kv_heads, shape.dim) for _ in range(2)) for _ in layers]
    wanted_pools = [tuple(one.clone() for one in pool) for pool in pools]
    wanted = hidden
    for layer, (keys, values) in zip(layers, wanted_pools, strict=True):
        wanted = layer.forward(wanted, sequences, keys, values, turn)

    heads = (shape.queries, shape.kv_heads, shape.dim)
    reads = native_pass(sequences, heads, turn, new_slots(sequences), unit_keys)
    structs = (LayerStruct * 2)(*(layer.struct(*pool) for layer, pool in zip(layers, pools, strict=True)))
    scratch = scratch_of(library, rows, layers[0])
    library.rksc_layers(ctypes.byref(reads.struct), structs, 2, hidden.data_ptr(), *(one.data_ptr() for one in scratch))
    torch.testing.assert_close(hidden, wanted, rtol=1e-5, atol=1e-4)
    for pool, wanted_pool in zip(pools, wanted_pools, strict=True):
        torch.testing.assert_close(pool, wanted_pool, rtol=1e-5, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([Shape(3, 3, 64), Shape(1, 1, 16), Shape(2, 4, 128), Shape(2, 2, 32), Shape(1, 7, 48)]),
    page=st.sampled_from([1, 16]),
    shared=st.sampled_from([0, 16, 48, 144]),
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 6)), min_size=1, max_size=4),
    normed=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 9),
)
def test_layers_are_those_of_plain_tensors(
    shape: Shape, page: int, shared: int, lengths: list[tuple[int, int]], normed: bool, biased: bool, seed: int
) -> None:
    found = build.library()
    assert found is not None
    prefixes, tokens = [prefix for prefix, _ in lengths], [count for _, count in lengths]
    check(found, ragged(shared, prefixes, tokens, page, seed), shape, normed, biased, int(found.rksc_unit_keys()))


def test_several_units_of_one_sequence_are_merged(library: ctypes.CDLL) -> None:
    sequences = ragged(0, [300, 299, 3], [5, 1, 2], 1, 0)
    for unit_keys in (1, 7, 8, 128):
        check(library, sequences, Shape(2, 3, 64), unit_keys=unit_keys)


def test_memory_of_partial_results_is_taken_again_where_it_is_large_enough() -> None:
    turns = (torch.ones(1, 8), torch.zeros(1, 8))
    large = native_pass(ragged(0, [200], [1], 1, 0), (2, 1, 16), turns, torch.zeros(1, dtype=torch.int64), 16)
    small = native_pass(
        ragged(0, [20], [1], 1, 0), (2, 1, 16), turns, torch.zeros(1, dtype=torch.int64), 16, large.partial
    )
    assert small.partial is large.partial
    again = native_pass(
        ragged(0, [200], [1], 1, 0), (2, 1, 16), turns, torch.zeros(1, dtype=torch.int64), 16, torch.empty(3)
    )
    assert again.partial.numel() == large.partial.numel()


def test_layers_of_16_bit_weights_are_those_of_the_same_numbers_in_float32(library: ctypes.CDLL) -> None:
    """Also where a pass has so many rows that they are ordered first."""
    shape, sequences = Shape(2, 2, 32), ragged(16, [60, 40, 3], [30, 9, 5], 1, 0)
    rows, found = sum(one.tokens for one in sequences), []
    torch.manual_seed(0)
    layer, start = Layer(shape, normed=False, biased=True), torch.randn(rows, 40)
    angles = torch.rand(rows, shape.dim // 2) * 6
    reads = native_pass(sequences, (4, 2, 32), (angles.cos(), angles.sin()), new_slots(sequences), 128)
    for dtype in (torch.bfloat16, torch.float32):
        layer.panels = {name: PanelWeight.of(one.bfloat16().to(dtype)) for name, one in layer.weights.items()}
        keys, values, hidden = torch.zeros(SLOTS, 2, 32), torch.zeros(SLOTS, 2, 32), start.clone()
        scratch = scratch_of(library, rows, layer)
        struct = layer.struct(keys, values)
        library.rksc_layers(
            *(ctypes.byref(reads.struct), ctypes.byref(struct), 1, hidden.data_ptr()),
            *(one.data_ptr() for one in scratch),
        )
        found.append((hidden, keys, values))
    assert not torch.equal(found[0][0], start)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


SHAPES = [(96, 80), (97, 7), (1, 16), (250, 33), (800, 17), (385, 128)]
ROWS = [0, 1, 2, 5, 6, 7, 11, 12, 13, 24, 25, 32, 33, 34, 100, 240, 241, 252, 253, 600]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_a_weight_in_panels_is_a_linear_layer(rows: int, inputs: int, outputs: int, biased: bool) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    bias = torch.randn(outputs) if biased else None
    packed = PanelWeight.of(weight)
    assert packed is not None
    torch.testing.assert_close(packed(x, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_16_bit_weights_give_what_the_same_numbers_give_in_float32_to_the_bit(
    dtype: torch.dtype, inputs: int, outputs: int
) -> None:
    torch.manual_seed(outputs)
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs)
    half, whole = PanelWeight.of(weight), PanelWeight.of(weight.float())
    assert half is not None and whole is not None and half.panels.dtype == dtype
    for rows in (*range(301), 600):
        x = torch.randn(rows, inputs)
        assert torch.equal(half(x, bias), whole(x, bias)), rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_the_float32_that_it_is(dtype: torch.dtype) -> None:
    """Also subnormal and infinite ones; a number that is none stays none."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1)
    packed = PanelWeight.of(numbers)
    assert packed is not None
    expected = numbers.float()
    for found in (packed(torch.ones(1, 1), None).view(-1, 1), packed.rows(torch.arange(1 << 16))):
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outputs", [1, 16, 50])
def test_rows_are_read_out_of_panels_and_all_of_them_give_the_weight_again(dtype: torch.dtype, outputs: int) -> None:
    weight = torch.randn(outputs, 37).to(dtype)
    packed = PanelWeight.of(weight)
    assert packed is not None
    numbers = torch.randint(0, outputs, (3, 5))
    assert torch.equal(packed.rows(numbers), F.embedding(numbers, weight).float())
    assert packed.rows(numbers[:0]).shape == (0, 5, 37)
    assert packed.unpacked().dtype == dtype and torch.equal(packed.unpacked(), weight)
    for wrong in (-1, outputs):
        with pytest.raises(IndexError, match=f"of a weight that has {outputs}"):
            packed.rows(torch.tensor([0, wrong]))


@pytest.mark.parametrize("flags", [(), ("-march=native", "-mno-avx512f")], ids=["plain C", "AVX2"])
def test_other_processors_find_the_same(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if flags and "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX-512: what it takes is tested by all others")
    monkeypatch.setattr(build, "FLAGS", ("-O2", "-fopenmp", "-shared", "-fPIC", *flags))
    other = build._declared(ctypes.CDLL(str(build.build(tmp_path))))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(50, 391).to(dtype)
        ours = PanelWeight.of(weight)
        assert ours is not None
        theirs = dataclasses.replace(ours, library=other)
        for rows in (1, 5, 12, 30, 50, 300):
            x = torch.randn(rows, 391)
            torch.testing.assert_close(theirs(x, None), ours(x, None), rtol=1e-5, atol=1e-4)
            if flags:
                assert torch.equal(theirs(x, None), ours(x, None)), "the same multiplications and additions"
        assert torch.equal(theirs.rows(torch.arange(50)), weight.float())


def test_what_a_row_gives_does_not_depend_on_the_rows_beside_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 300)
    packed = PanelWeight.of(torch.randn(50, 300))
    assert packed is not None
    alone = torch.cat([packed(row[None], None) for row in x])
    for rows in (2, 3, 4, 5, 6, 7, 8, 13, 24, 25, 32, 33, 100, 241, 253, 400):
        assert torch.equal(packed(x[:rows], None), alone[:rows])
    assert torch.equal(packed(x[::2], None), alone[::2]), "rows that do not lie one after another"


def test_the_gate_is_silu_also_at_the_ends_of_its_range(library: ctypes.CDLL) -> None:
    """With a layer that is nothing but its gate: everything else is zero or one."""
    shape, half = Shape(1, 1, 16), 21
    layer = Layer(shape, normed=False, biased=True, hidden=half, half=half)
    for name in ("qkv", "output", "gate_up"):
        layer.panels[name].panels.zero_()
        layer.biases[name].zero_()
    layer.panels["down"] = PanelWeight.of(torch.eye(half))
    layer.biases["down"].zero_()
    gate = torch.linspace(-10, 10, half)
    gate[:4] = torch.tensor([0.0, -200.0, 200.0, -87.5])
    layer.biases["gate_up"].copy_(torch.cat((gate, torch.full((half,), 3.0))))
    reads = native_pass(
        ragged(0, [0], [1], 1, 0),
        (1, 1, 16),
        (torch.ones(1, 8), torch.zeros(1, 8)),
        torch.zeros(1, dtype=torch.int64),
        128,
    )
    keys, values, hidden = torch.zeros(SLOTS, 1, 16), torch.zeros(SLOTS, 1, 16), torch.zeros(1, half)
    scratch = scratch_of(library, 1, layer)
    library.rksc_layers(
        ctypes.byref(reads.struct),
        ctypes.byref(layer.struct(keys, values)),
        1,
        *(one.data_ptr() for one in (hidden, *scratch)),
    )
    torch.testing.assert_close(hidden[0], F.silu(gate) * 3.0, rtol=1e-5, atol=1e-5)


def test_the_library_is_built_once(tmp_path: Path) -> None:
    made = build.build(tmp_path)
    before = made.stat().st_mtime_ns
    assert build.build(tmp_path) == made and made.stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == [made], "nothing is left over"


def test_without_a_compiler_pytorch_takes_over_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv(build.SWITCH, raising=False)
    with pytest.raises(NativeBuildError, match="no C compiler"):
        build.build()
    with caplog.at_level(logging.WARNING):
        assert build.library.__wrapped__() is None
    assert "there is no C compiler" in caplog.text


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "layers.c: not today" >&2\nexit 3\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(NativeBuildError, match=r"ended with 3: layers\.c: not today"):
        build.build(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.SWITCH, "0")
    assert build.library.__wrapped__() is None


def test_it_shares_the_threads_of_pytorch(library: ctypes.CDLL) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    assert len(loaded) == 1, f"two OpenMP runtimes: {loaded}"
