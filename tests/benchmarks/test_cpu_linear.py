from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import cpu_linear
from benchmarks.cpu_linear import Sizes, Taken
from rksc_sgl.errors import RkscError
from rksc_sgl.testing import write_tiny_model

pytestmark = pytest.mark.slow  # imports SGLang

SMALL = Sizes(1, ((96, 57), (57, 48)), (50, 57))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpu_linear.SIZES, "qwen2.5-0.5b", SMALL)
    monkeypatch.setattr(cpu_linear, "read_bandwidth", lambda: 1e9)


def test_all_ways_compute_the_same() -> None:
    names = (cpu_linear.HALF, cpu_linear.OURS, cpu_linear.ONEDNN, cpu_linear.MKL)
    with torch.inference_mode():
        made = cpu_linear.ways(SMALL, names)
        assert tuple(made) == names
        for linears, (outputs, width) in zip(zip(*made.values(), strict=True), SMALL.all, strict=True):
            x = torch.randn(3, width)
            half, ours, *others = (linear(x) for linear in linears)
            assert half.shape == (3, outputs) and torch.equal(half, ours)
            for other in others:
                torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-3)


def test_what_a_way_takes_is_the_sum_of_each_weights_median() -> None:
    taken = Taken(torch.tensor([[1.0, 10.0], [2.0, 90.0], [30.0, 20.0]], dtype=torch.float64))
    assert taken.total() == 22.0
    assert taken.total(0.0) == 11.0


def test_every_way_is_measured_at_every_weight() -> None:
    order: list[tuple[str, int]] = []
    ways = {name: [lambda x, key=(name, place): order.append(key) for place in range(3)] for name in "ab"}
    taken = cpu_linear.measure(ways, SMALL, 2, 2)  # type: ignore[arg-type]
    assert order[:6] == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert order[6:8] == [("b", 0), ("a", 0)]
    assert taken.keys() == set("ab") and taken["a"].turns.shape == (2, 3) and (taken["b"].turns > 0).all()


def test_the_last_line_has_all_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert cpu_linear.main(["--rows", "1", "3", "--repeats", "2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ratios"].keys() == {"1", "3", "8"}
    assert result["ratio_bf16_vs_fp32_b8"] == result["ratios"]["8"]["bf16_vs_fp32"] > 0
    others = [one[name] for one in result["ratios"].values() for name in ("vs_onednn", "vs_mkl")]
    assert result["lowest"] == min(others) > 0
    assert result["bits_equal"] is True and result["bandwidth_bound_fraction"] > 0
    assert result["resident_over_file"] is None, "needs --model-path"


def test_the_weights_of_a_16_bit_checkpoint_are_compared_and_others_refused(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model")
    with pytest.raises(RkscError, match="no 16-bit matrix"):
        cpu_linear.same_bits(cpu_linear.weights_of(path))
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    assert len(list(cpu_linear.weights_of(path))) == 2 * 7 + 2
    assert cpu_linear.same_bits(cpu_linear.weights_of(path))


def test_memory_over_the_files_is_what_a_model_takes_more_than_a_tiny_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "one.safetensors").write_bytes(bytes(150))
    (tmp_path / "two.safetensors").write_bytes(bytes(50))
    (tmp_path / "config.json").write_bytes(bytes(1000))
    monkeypatch.setattr(
        cpu_linear, "memory_of_scheduler", lambda model: (1210, 1500) if model == tmp_path else (1000, 1080)
    )
    assert cpu_linear.over_file(tmp_path) == {"resident_over_file": 1.05, "peak_over_file": 2.1}


@pytest.mark.server
def test_the_memory_of_a_models_scheduler_is_read(tiny_model: Path) -> None:
    resident, peak = cpu_linear.memory_of_scheduler(tiny_model)
    assert 10**7 < resident <= peak < 10**10
