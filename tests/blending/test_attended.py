"""What the end of a prompt attends to, against attention written down plainly."""

from __future__ import annotations

import math

import pytest
import torch

from rksc_sgl.blending.attended import attention_received

TOKENS, LAST, HEADS, KV_HEADS, SIZE = 40, 6, 4, 2, 8


def plainly(queries: torch.Tensor, keys: torch.Tensor, scaling: float, window: int, cap: float) -> torch.Tensor:
    total = torch.zeros(TOKENS)
    for row in range(LAST):
        place = TOKENS - LAST + row
        first = 0 if window < 0 else max(0, place - window)
        for head in range(HEADS):
            seen = keys[first : place + 1, head // (HEADS // KV_HEADS)]
            scores = seen @ queries[row, head] * scaling
            scores = cap * torch.tanh(scores / cap) if cap else scores
            total[first : place + 1] += scores.softmax(0)
    return total / (LAST * HEADS)


@pytest.mark.parametrize(("window", "cap"), [(-1, 0.0), (5, 0.0), (0, 0.0), (-1, 1.5)])
def test_attention_of_the_last_tokens_is_that_of_the_model(window: int, cap: float) -> None:
    source = torch.Generator().manual_seed(window + 2)
    queries = torch.randn(LAST, HEADS, SIZE, generator=source)
    keys = torch.randn(TOKENS, KV_HEADS, SIZE, generator=source)
    scaling = 1.0 / math.sqrt(SIZE)
    found = attention_received(queries, keys, scaling=scaling, window=window, cap=cap)
    torch.testing.assert_close(found, plainly(queries, keys, scaling, window, cap))
    assert float(found.sum()) == pytest.approx(1.0)


def test_numbers_of_a_smaller_type_are_computed_in_float32() -> None:
    queries, keys = torch.randn(1, 2, 8).bfloat16(), torch.randn(3, 1, 8).bfloat16()
    found = attention_received(queries, keys, scaling=0.3)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, attention_received(queries.float(), keys.float(), scaling=0.3))
