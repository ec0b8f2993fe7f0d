"""Packed attention inside SGLang: where it is used, and blends through it on a real server, in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rksc_sgl.layer_passes.contract import Run
from rksc_sgl.packed_attention.switch import PACKED_ATTENTION_VARIABLE
from rksc_sgl.server_arguments import server_arguments, take_switches
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.sglang_plugin.passes.packing import packing_for, queries_of, refusal_of_packing
from tests.sglang_plugin.test_blends_on_a_server import branch, eager_logprobs, pair
from tests.six_layers import Served, SixLayers, logprobs_of, report_of


class PackingServer(ServerProcess):
    module = "tests.sglang_plugin.packing_server"


@pytest.mark.server
@pytest.mark.slow
def test_a_blend_through_packed_attention_is_what_the_plain_computation_gives(
    six_layers: SixLayers, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    arguments = server_arguments(["--model-path", str(six_layers.path), "--max-total-tokens", "20000"])
    result = tmp_path / "layers"
    variables = {"TRITON_INTERPRET": "1", PACKED_ATTENTION_VARIABLE: "1", "PACKING_RESULT": str(result)}
    with PackingServer(arguments, variables=variables) as process:
        served = Served.of(process, six_layers.path)
        pairs = [pair(10), pair(50)]
        served.ask_together([donor for donor, _ in pairs], [branch(f"packed {index}", 0) for index in range(2)])
        walked = int(result.read_text())  # the walk at the start of the server
        options = [branch(f"packed {index}", 1, recompute=0.15, deviation=0.0) for index in range(2)]
        answers = served.ask_together([prompt for _, prompt in pairs], options)
        for answer, (donor, prompt) in zip(answers, pairs, strict=True):
            expected, taken = eager_logprobs(six_layers, donor, prompt, 0.15)
            assert report_of(answer)["taken_tokens"] == taken
            for token, value in logprobs_of(answer).items():
                assert value == pytest.approx(float(expected[token]), abs=2e-3)
        assert int(result.read_text()) - walked in (4, 8), "the layers after the probe, of one pass or two"


def runner_of(backend: Any, *layers: Any) -> Any:
    return SimpleNamespace(attn_backend=backend, model=torch.nn.ModuleList(layers))


class TritonAttnBackend:
    """As far as packed attention knows it."""

    def __init__(self, **found: Any) -> None:
        self.__dict__.update(found)


def attention(**found: Any) -> Any:
    from sglang.srt.layers.radix_attention import RadixAttention

    layer = RadixAttention(4, 64, 0.1, 2, 0)
    for name, value in found.items():
        setattr(layer, name, value)
    return layer


def test_it_is_used_on_the_triton_backend_alone_and_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(TritonAttnBackend(), attention())
    assert refusal_of_packing(runner) == ""
    monkeypatch.delenv(PACKED_ATTENTION_VARIABLE, raising=False)
    assert packing_for(runner, None, []) is None, "it was not asked for"
    monkeypatch.setenv(PACKED_ATTENTION_VARIABLE, "1")
    assert packing_for(runner_of(SimpleNamespace(), attention()), None, []) is None
    assert take_switches(["--rksc-packed-attention"]) == ([], {PACKED_ATTENTION_VARIABLE: "1"})


@pytest.mark.parametrize(
    ("backend", "layer", "said"),
    [
        (SimpleNamespace(), {}, "SimpleNamespace keeps its own"),
        (TritonAttnBackend(enable_deterministic=True), {}, "deterministic"),
        (TritonAttnBackend(dcp_size=2), {}, "context parallelism"),
        (TritonAttnBackend(use_mla=True), {}, "MLA"),
        (TritonAttnBackend(use_sliding_window_kv_pool=True), {}, "sliding windows"),
        (TritonAttnBackend(), {"is_cross_attention": True}, "not causal"),
        (TritonAttnBackend(), {"k_scale": torch.ones(1)}, "scaled"),
        (TritonAttnBackend(), {"xai_temperature_len": 4}, "temperature"),
        (TritonAttnBackend(), {"qk_head_dim": 32}, "differ between layers"),
        (TritonAttnBackend(), {"sinks": torch.ones(1)}, "sinks"),
    ],
)
def test_what_it_cannot_do_stays_the_backends(backend: Any, layer: dict[str, Any], said: str) -> None:
    assert said in refusal_of_packing(runner_of(backend, attention(), attention(**layer)))


def test_runs_of_a_sequence_are_its_queries() -> None:
    runs = [Run(0, 2, 4), Run(2, 0, 1), Run(2, 3, 5)]
    first, second = queries_of(runs, [12, 7, 10], [5, 9, 9])
    assert (first.table_row, first.positions.tolist()) == (5, [12, 13])
    assert (second.table_row, second.positions.tolist()) == (9, [7, 10, 11])
