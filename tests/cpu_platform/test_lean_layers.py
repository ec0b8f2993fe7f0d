"""The parts of lean decoder layers, each against what SGLang or PyTorch computes; whole models: test_serving."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.slow  # importing SGLang's layers takes a while


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_heads_are_turned_as_sglang_turns_them(rows: int) -> None:
    from sglang.srt.layers.rotary_embedding.utils import apply_rotary_emb

    from rksc_sgl.cpu_platform.lean_layers import _turn, _turned

    torch.manual_seed(rows)
    angles = torch.rand(100, 8) * 6
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    positions, heads = torch.randint(0, 100, (rows,)), torch.randn(rows, 5, 16)
    cos, sin = table[positions].chunk(2, dim=-1)
    expected = apply_rotary_emb(heads, cos, sin, True)
    torch.testing.assert_close(_turned(heads, *_turn(table, positions)), expected, rtol=1e-6, atol=1e-6)


def test_a_stack_that_is_not_known_is_left_alone_with_the_reason() -> None:
    from rksc_sgl.cpu_platform.lean_layers import use_lean_layers

    model = torch.nn.Module()
    model.model = torch.nn.Linear(2, 2)
    before = model.model.forward
    assert use_lean_layers(model) == "SGLang's own: Linear is not one of the known stacks"
    assert model.model.forward == before


def _stack(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(layers_to_capture=[], **changes)


@pytest.mark.parametrize(
    ("change", "served"),
    [({}, True), ({"lora_ids": ["adapter"]}, False), ({"lora_ids": [None]}, True), ({"encoder_lens": [1]}, False)],
    ids=["plain", "with an adapter", "without one", "encoder"],
)
def test_a_batch_that_needs_more_runs_as_sglang_has_it(change: dict[str, object], served: bool) -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from rksc_sgl.cpu_platform.attention.backend import RkscCpuAttnBackend
    from rksc_sgl.cpu_platform.lean_layers import _MODES, LeanStack

    lean = LeanStack(SimpleNamespace(model=_stack(forward=None, layers=[])))
    ours = RkscCpuAttnBackend.__new__(RkscCpuAttnBackend)
    batch = SimpleNamespace(**{"forward_mode": ForwardMode.DECODE, "encoder_lens": None, "lora_ids": None, **change})
    assert lean._serves(ours, batch, _MODES) is served
    assert not lean._serves(object(), batch, _MODES)
    lean.stack.layers_to_capture = [1]
    assert not lean._serves(ours, batch, _MODES)


def test_only_passes_that_are_known_are_served() -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from rksc_sgl.cpu_platform.lean_layers import _INTERVAL_MODES, _MODES

    assert {mode for mode in ForwardMode if mode in _MODES | _INTERVAL_MODES} == {
        *(ForwardMode.DECODE, ForwardMode.EXTEND, ForwardMode.MIXED, ForwardMode.SPLIT_PREFILL)
    }
    assert not _MODES & _INTERVAL_MODES


# What LeanStack computes is written anew after these; at an upgrade of SGLang, read them again and then change this.
_WRITTEN_AFTER = {
    "models/llama.py:LlamaModel.forward": "15f89b2a7b3c",
    "models/llama.py:LlamaDecoderLayer.forward": "4f39dffc681c",
    "models/llama.py:LlamaAttention.forward": "1fa2bce5cf4f",
    "models/llama.py:LlamaAttention.forward_prepare_native": "072313c3ec72",
    "models/llama.py:LlamaForCausalLM.forward_split_prefill": "edb09896ea70",
    "models/qwen2.py:Qwen2ForCausalLM.forward_split_prefill": "e5bb814d86c8",
    "models/qwen3.py:Qwen3ForCausalLM.forward_split_prefill": "fd6dd81978ed",
    "models/llama.py:LlamaMLP.forward": "4b7cb5695c08",
    "models/qwen2.py:Qwen2Model.forward": "de10718387cb",
    "models/qwen2.py:Qwen2DecoderLayer.forward": "4f39dffc681c",
    "models/qwen2.py:Qwen2Attention.forward": "064e2854b18c",
    "models/qwen2.py:Qwen2MLP.forward": "a8662c764b87",
    "models/qwen3.py:Qwen3DecoderLayer.forward": "45cd14e4a022",
    "models/qwen3.py:Qwen3Attention.forward": "135d9ebad53c",
    "models/qwen3.py:Qwen3Attention.forward_prepare_native": "a494bdaa3a2b",
    "layers/layernorm.py:RMSNorm.forward_native": "9b8cdb4e4d9b",
    "layers/rotary_embedding/base.py:RotaryEmbedding.forward_native": "0d04d87786a6",
    "layers/rotary_embedding/utils.py:apply_rotary_emb": "bcc9ea846a4e",
    "layers/activation.py:SiluAndMul.forward_native": "97427bea4344",
}


def _digest(target: str) -> str:
    """Of a function's source in the installed SGLang, which is not imported for it."""
    file, name = target.split(":")
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "srt" / file).read_text()
    node: ast.AST = ast.parse(source)
    for part in name.split("."):
        node = next(one for one in ast.iter_child_nodes(node) if getattr(one, "name", None) == part)
    return hashlib.sha256((ast.get_source_segment(source, node) or "").encode()).hexdigest()[:12]


def test_the_forwards_that_are_written_anew_are_those_of_the_pinned_release() -> None:
    moved = [target for target, digest in _WRITTEN_AFTER.items() if _digest(target) != digest]
    assert moved == []
