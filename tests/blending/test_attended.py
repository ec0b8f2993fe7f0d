"""What the end of a prompt attends to, against attention written down plainly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rksc_sgl.blending import attended
from rksc_sgl.blending.attended import QUERIES, asking, attention_received

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


@pytest.mark.parametrize("scores", [attended.MOST_SCORES, 1])
@pytest.mark.parametrize(("window", "cap"), [(-1, 0.0), (5, 0.0), (0, 0.0), (-1, 1.5)])
def test_attention_of_the_last_tokens_is_that_of_the_model(
    monkeypatch: pytest.MonkeyPatch, window: int, cap: float, scores: int
) -> None:
    monkeypatch.setattr(attended, "MOST_SCORES", scores)
    source = torch.Generator().manual_seed(window + 2)
    queries = torch.randn(LAST, HEADS, SIZE, generator=source)
    keys = torch.randn(TOKENS, KV_HEADS, SIZE, generator=source)
    scaling = 1.0 / math.sqrt(SIZE)
    places = torch.arange(TOKENS)[-LAST:]
    found = attention_received(queries, keys, places, scaling=scaling, window=window, cap=cap)
    torch.testing.assert_close(found, plainly(queries, keys, scaling, window, cap))
    assert float(found.sum()) == pytest.approx(1.0)


def test_numbers_of_a_smaller_type_are_computed_in_float32() -> None:
    queries, keys = torch.randn(1, 2, 8).bfloat16(), torch.randn(3, 1, 8).bfloat16()
    places = torch.tensor([1])
    found = attention_received(queries, keys, places, scaling=0.3)
    assert found.dtype is torch.float32 and found[2] == 0.0, "what stands after the query is not seen"
    torch.testing.assert_close(found, attention_received(queries.float(), keys.float(), places, scaling=0.3))


def test_the_last_tokens_ask_or_some_of_all_where_the_prompt_goes_on() -> None:
    assert asking(100, complete=True).tolist() == list(range(100 - QUERIES, 100))
    assert asking(5, complete=True).tolist() == asking(5, complete=False).tolist() == [0, 1, 2, 3, 4]
    some = asking(1000, complete=False)
    assert some.size == QUERIES and some[-1] == 999 and (np.diff(some) >= 31).all() and (np.diff(some) <= 32).all()
