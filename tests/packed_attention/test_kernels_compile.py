"""Triton's compiler makes machine code of every launch of ours, for GPUs that are not here; in bfloat16 too, which its
interpreter cannot multiply."""

from __future__ import annotations

from typing import Any

import pytest

triton = pytest.importorskip("triton")

ARCHITECTURE, WARP = 90, 32  # H100
SHARED = 99 * 1024  # bytes that a block may have on any GPU since Ampere


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int = 4) -> bytes:
    """The machine code of a kernel, which fits a GPU; what is in neither mapping is an int64 scalar."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i64") for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", ARCHITECTURE, WARP)
    made = triton.compile(source, target=target, options={"num_warps": warps})
    assert made.metadata.shared <= SHARED
    return made.asm["cubin"]


@pytest.mark.parametrize(
    ("size", "dtype", "window", "splits"),
    [(64, "fp16", -1, 1), (96, "bf16", 512, 1), (128, "bf16", -1, 4), (256, "bf16", 512, 4)],
)
def test_packed_attention_compiles(size: int, dtype: str, window: int, splits: int) -> None:
    from rksc_sgl.packed_attention.kernel import Blocks, _attend, _merge

    blocks, block = Blocks.of(32, 8, size), triton.next_power_of_2(size)
    out = f"*{dtype}" if splits == 1 else "*fp32"
    types = dict.fromkeys(("queries", "keys", "values"), f"*{dtype}") | {"slots": "*i32", "out": out, "sums": "*fp32"}
    types |= {"positions": "*i64", "tiles": "*i64", "scale": "fp32", "cap": "fp32"}
    constants = {"HEADS": 32, "GROUP": 4, "GROUP_BLOCK": blocks.group, "ROWS": blocks.queries * blocks.group}
    constants |= {"KEYS": blocks.keys, "SIZE": size, "SIZE_BLOCK": block, "VALUE_SIZE": size, "VALUE_BLOCK": block}
    constants |= {"WINDOW": window, "HAS_CAP": window > 0, "SPLITS": splits}
    assert compiled(_attend, types, constants, blocks.warps)
    merging = {"partial": "*fp32", "sums": "*fp32", "out": f"*{dtype}"}
    shape = {name: constants[name] for name in ("HEADS", "VALUE_SIZE", "VALUE_BLOCK", "SPLITS")}
    assert compiled(_merge, merging, shape)


@pytest.mark.parametrize(("dtype", "half", "is_neox"), [("bf16", 64, True), ("fp16", 32, False), ("fp32", 0, True)])
def test_take_overs_compile(dtype: str, half: int, is_neox: bool) -> None:
    from rksc_sgl.blending.kernels import TOKENS, TYPES, _deviation, _take_over

    pointers = ("key_addresses", "value_addresses", "own_ptr", "theirs_ptr", "old_ptr", "new_ptr", "taken_ptr")
    types = dict.fromkeys(pointers, "*i64") | {"table_ptr": "*fp32" if half else f"*{dtype}"}
    kind = next(one for one in TYPES.values() if one.name == dtype)
    constants = {"HEADS": 8, "SIZE": 128, "HALF": half, "HALF_BLOCK": max(1, half), "IS_NEOX": is_neox}
    constants |= {"REST_BLOCK": max(1, 128 - 2 * half), "VALUE_BLOCK": 512, "DTYPE": kind, "TOKENS": TOKENS}
    assert compiled(_take_over, types, constants)
    beside = {"values": f"*{dtype}", "own_ptr": "*i64", "theirs_ptr": "*i64", "found_ptr": "*fp32"}
    assert compiled(_deviation, beside, {"BLOCK": 1024})
