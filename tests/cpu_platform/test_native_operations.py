"""``layers.c`` against the same in PyTorch, on random ragged batches; how it is built, and what is done without it."""

from __future__ import annotations

import ctypes
import itertools
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sgl.cpu_platform.attention.sequences import QuerySequence
from rksc_sgl.cpu_platform.native import build
from rksc_sgl.cpu_platform.native.passes import LayerStruct, native_pass
from rksc_sgl.errors import NativeBuildError

SLOTS = 700


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


def check(library: ctypes.CDLL, sequences: list[QuerySequence], shape: Shape, normed: bool, unit_keys: int) -> None:
    torch.manual_seed(len(sequences))
    rows = sum(one.tokens for one in sequences)
    qkv = torch.randn(rows, shape.queries + 2 * shape.kv_heads, shape.dim)
    keys, values = (torch.randn(SLOTS, shape.kv_heads, shape.dim) for _ in range(2))
    angles = torch.rand(rows, shape.dim // 2) * 6
    cosines, sines = angles.cos(), angles.sin()
    new = torch.from_numpy(np.concatenate([one.slots[one.prefix :] for one in sequences]))
    weights = [torch.rand(shape.dim) + 0.5 for _ in range(2)] if normed else [None, None]
    queries, own = qkv[:, : shape.queries], qkv[:, shape.queries : -shape.kv_heads]
    if normed:
        queries = F.rms_norm(queries, (shape.dim,), weights[0], 1e-5)
        own = F.rms_norm(own, (shape.dim,), weights[1], 1e-6)
    wanted_keys, wanted_values = keys.clone(), values.clone()
    wanted_keys[new], wanted_values[new] = turned(own, cosines, sines), qkv[:, -shape.kv_heads :]
    queries = turned(queries, cosines, sines)
    wanted = torch.empty(rows, shape.queries, shape.dim)
    for one in sequences:
        for step in range(one.tokens):
            seen = torch.from_numpy(one.slots[: one.prefix + step + 1].astype(np.int64))
            all_keys = wanted_keys[seen].repeat_interleave(shape.group, dim=1)
            scores = torch.einsum("hd,thd->ht", queries[one.row + step], all_keys) * 0.3
            mixed = wanted_values[seen].repeat_interleave(shape.group, dim=1)
            wanted[one.row + step] = torch.einsum("ht,thd->hd", scores.softmax(dim=-1), mixed)

    heads = (shape.queries, shape.kv_heads, shape.dim)
    reads = native_pass(sequences, heads, (cosines, sines), new, unit_keys)
    out = torch.full((rows, shape.queries, shape.dim), torch.nan)
    layer = LayerStruct(
        *(one.data_ptr() for one in (qkv, keys, values)),
        *(None if one is None else one.data_ptr() for one in weights),
        *(1e-5, 1e-6, 0.3),
        out.data_ptr(),
    )
    library.rksc_attend(ctypes.byref(reads.struct), ctypes.byref(layer))
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(keys, wanted_keys, rtol=0, atol=1e-5)
    assert torch.equal(values, wanted_values)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([Shape(3, 3, 64), Shape(1, 1, 16), Shape(2, 4, 128), Shape(2, 2, 32), Shape(1, 7, 48)]),
    page=st.sampled_from([1, 16]),
    shared=st.sampled_from([0, 16, 48, 144]),
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 6)), min_size=1, max_size=4),
    normed=st.booleans(),
    seed=st.integers(0, 9),
)
def test_attention_is_that_of_plain_tensors(
    shape: Shape, page: int, shared: int, lengths: list[tuple[int, int]], normed: bool, seed: int
) -> None:
    found = build.library()
    assert found is not None
    prefixes, tokens = [prefix for prefix, _ in lengths], [count for _, count in lengths]
    check(found, ragged(shared, prefixes, tokens, page, seed), shape, normed, int(found.rksc_unit_keys()))


def test_several_units_of_one_sequence_are_merged(library: ctypes.CDLL) -> None:
    sequences = ragged(0, [300, 299, 3], [5, 1, 2], 1, 0)
    for unit_keys in (1, 7, 8, 128):
        check(library, sequences, Shape(2, 3, 64), False, unit_keys)


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


@pytest.mark.parametrize("width", [8, 13, 576])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_a_norm_with_an_addend_is_rms_norm_of_the_sum(library: ctypes.CDLL, rows: int, width: int, added: bool) -> None:
    torch.manual_seed(rows)
    hidden, addend, weight = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    summed = hidden + addend if added else hidden.clone()
    out = torch.full_like(hidden, torch.nan)
    library.rksc_add_norm(
        hidden.data_ptr(), addend.data_ptr() if added else None, weight.data_ptr(), out.data_ptr(), rows, width, 1e-5
    )
    assert torch.equal(hidden, summed)
    torch.testing.assert_close(out, F.rms_norm(summed, (width,), weight, 1e-5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "half"), [(1, 5), (3, 1536), (40, 512)])
def test_the_gate_is_silu(library: ctypes.CDLL, rows: int, half: int) -> None:
    torch.manual_seed(half)
    gate_up = torch.randn(rows, 2 * half) * 20
    gate_up[0, :4] = torch.tensor([0.0, -200.0, 200.0, -87.5])
    out = torch.full((rows, half), torch.nan)
    library.rksc_silu_mul(gate_up.data_ptr(), out.data_ptr(), rows, half)
    gate, up = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(out, F.silu(gate) * up, rtol=1e-5, atol=1e-5)


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
