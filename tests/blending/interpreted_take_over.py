"""The Triton launches of a take-over against the plain one, on the CPU; run with ``TRITON_INTERPRET=1``."""

from __future__ import annotations

import itertools

import torch

from rksc_sgl.blending.kernels import TritonTakeOver, refusal_of_triton, triton_deviation_of
from rksc_sgl.blending.take_over import deviation_of
from tests.blending.test_take_over import SHAPES, check, layers_of, rows_of

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def main() -> None:
    kinds = itertools.cycle((True, False))
    for number, ((heads, size, rotary, value_size), dtype) in enumerate(itertools.product(SHAPES, TOLERANCE)):
        turned = rotary if number % 5 else 0
        layers = layers_of(
            1 + number % 3, heads, size, turned, neox=next(kinds), value_size=value_size, dtype=dtype, seed=number
        )
        rows, count = rows_of(37, number), (37, 0, 16, 1)[number % 4]
        assert refusal_of_triton(layers) == ""
        check(TritonTakeOver, layers, rows, torch.randperm(37)[:count], TOLERANCE[dtype])
    for number, dtype in enumerate([*TOLERANCE, *TOLERANCE]):
        values = torch.randn(90, 2 + number, 96).to(dtype)
        rows = rows_of(20, number)
        torch.testing.assert_close(triton_deviation_of(values, rows), deviation_of(values, rows), atol=1e-4, rtol=1e-4)
    print("12 take-overs and 6 deviations")


if __name__ == "__main__":
    main()
