"""What the benchmark of waiting siblings makes of what it measured."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from benchmarks import siblings_together


def test_the_break_even_is_the_shortest_beginning_from_which_on_waiting_is_never_slower(
    capsys: pytest.CaptureFixture[str],
) -> None:
    times = {
        8: {"waits": [2.0, 2.0, 2.0], "never": [2.2, 2.2, 2.2]},  # faster, but not at the next one
        16: {"waits": [2.0, 2.0, 2.0], "never": [1.8, 1.9, 2.0]},
        32: {"waits": [2.0, 2.0, 2.0], "never": [2.0, 2.0, 3.0]},
        64: {"waits": [2.0, 2.0, 2.0], "never": [4.0, 4.0, 4.4]},
    }
    computed = {size: {"waits": size + 64, "never": 8 * size + 64} for size in times}
    arguments = SimpleNamespace(model_path="m", branches=8)
    result = siblings_together._result(arguments, times, computed)
    assert (result["break_even_common"], result["break_even_tokens"]) == (32, 7 * 32)
    assert result["by_common"][64] == {"ratio": 2.0, "noise": 1.1, "saved_tokens": 7 * 64}
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["break_even_common"] == 32
    slow = {8: {"waits": [2.0], "never": [1.0]}}
    assert siblings_together._result(arguments, slow, computed)["break_even_tokens"] is None
