from __future__ import annotations

import json

import pytest
import torch

from benchmarks import cpu_linear

pytestmark = pytest.mark.slow  # imports SGLang


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "LAYERS", 1)
    monkeypatch.setattr(cpu_linear, "HEAD", (50, 576))
    monkeypatch.setattr(cpu_linear, "read_bandwidth", lambda: 1e9)


def test_all_ways_compute_the_same() -> None:
    with torch.inference_mode():
        for linears, (_, width) in zip(
            zip(*cpu_linear.ways().values(), strict=True), (*cpu_linear.SHAPES, cpu_linear.HEAD), strict=True
        ):
            x = torch.randn(3, width)
            ours, *others = (linear(x) for linear in linears)
            for other in others:
                torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-3)


def test_the_last_line_has_a_ratio_for_every_number_of_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert cpu_linear.main(["--rows", "1", "3", "--repeats", "2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ratios"].keys() == {"1", "3"}
    assert result["lowest"] == min(min(one.values()) for one in result["ratios"].values()) > 0
