"""lm-eval, unchanged but for its URL."""

from __future__ import annotations

import json

import pytest

from benchmarks import harness
from tests.six_layers import Served


@pytest.mark.server
@pytest.mark.slow
def test_the_harness_runs_on_both_routes_and_reads_their_answers(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--url", served.process.url, "--source", "gsm8k", "--problems", "2", "--turns", "1", "--max-tokens", "6"]
    assert harness.main(asked) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    one, fork = (result["routes"][route] for route in harness.ROUTES)
    assert 0.0 <= one["accuracy"] <= 1.0 and 0.0 <= fork["accuracy"] <= 1.0
    assert 0 < one["decoded"] <= 2 * 5 < fork["decoded"] <= 8 * 2 * 5
    assert fork["prompts_computed"] > 0 and fork["seconds"] > 0
