from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rksc_sgl.blending.rotation import Rotation
from rksc_sgl.errors import RotationError
from rksc_sgl.sglang_plugin.passes.rotary_models import refusal_of, rotation_of

HEADS, HEAD, POSITIONS = 3, 32, 512


def rotate_reference(rotation: Rotation, keys: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Pairs of key dimensions as complex numbers, token by token, in float64."""
    half = rotation.rotary_dim // 2
    table = torch.complex(rotation.cos_sin[:, :half].double(), rotation.cos_sin[:, half:].double())
    result = keys.double().clone()
    for token in range(len(keys)):
        factor = table[new[token]] / table[old[token]]
        for pair in range(half):
            places = [pair, pair + half] if rotation.is_neox_style else [2 * pair, 2 * pair + 1]
            value = torch.view_as_complex(keys[token][:, places].double().contiguous()) * factor[pair]
            result[token][:, places] = torch.view_as_real(value)
    return result


def plain_table(rotary_dim: int, scale: float = 1.0, base: float = 10000.0) -> torch.Tensor:
    frequencies = base ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(POSITIONS)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * scale


def places(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(POSITIONS, (count,), generator=source), torch.randint(POSITIONS, (count,), generator=source)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(0, 6), st.sampled_from([2, 16, 32]), st.booleans(), st.sampled_from([1.0, 1.3])
)
def test_keys_turn_as_complex_numbers_do(seed: int, count: int, rotary_dim: int, neox: bool, scale: float) -> None:
    rotation = Rotation(plain_table(rotary_dim, scale), HEAD, rotary_dim, neox)
    keys = torch.randn(count, HEADS, HEAD, generator=torch.Generator().manual_seed(seed))
    old, new = places(seed, count)
    found = rotation.rotate(keys, old, new)
    torch.testing.assert_close(found.double(), rotate_reference(rotation, keys, old, new), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotation.rotate(found, new, old), keys, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_does_not_move_and_what_is_not_rotated_stays_bit_for_bit(dtype: torch.dtype) -> None:
    rotation = Rotation(plain_table(16, 1.3), HEAD, 16, True)
    keys = torch.randn(4, HEADS, HEAD).to(dtype)
    keys[0, 0, 0] = float("nan")
    kept = keys.clone()
    old, new = torch.tensor([5, 6, 7, 8]), torch.tensor([5, 60, 7, 80])
    found = rotation.rotate(keys, old, new)
    assert found.dtype == dtype
    assert torch.equal(found[::2].nan_to_num(), kept[::2].nan_to_num())
    assert found[0, 0, 0].isnan()
    assert torch.equal(found[..., 16:], kept[..., 16:])
    assert not torch.equal(found[1::2, :, :16], kept[1::2, :, :16])
    assert torch.equal(keys.nan_to_num(), kept.nan_to_num()), "the keys given were changed"


def test_a_table_in_bfloat16_is_undone_as_it_is() -> None:
    rotation = Rotation(plain_table(HEAD).bfloat16(), HEAD, HEAD, True)
    keys = torch.randn(5, HEADS, HEAD)
    old, new = places(0, 5)
    expected = rotate_reference(rotation, keys, old, new)
    torch.testing.assert_close(rotation.rotate(keys, old, new).double(), expected, atol=1e-5, rtol=0)


def test_a_turn_serves_several_layers() -> None:
    rotation = Rotation(plain_table(HEAD), HEAD, HEAD, False)
    old, new = places(1, 4)
    turn = rotation.turn(old, new)
    for layer in (torch.randn(4, 2, HEAD), torch.randn(4, 5, HEAD)):
        assert torch.equal(turn.rotate(layer), rotation.rotate(layer, old, new))


def test_shapes_and_positions_that_do_not_fit_are_errors() -> None:
    rotation = Rotation(plain_table(16), HEAD, 16, True)
    keys, here = torch.randn(2, HEADS, HEAD), torch.tensor([0, 1])
    with pytest.raises(RotationError, match="positions must be from 0 to 511, got 0 to 512"):
        rotation.rotate(keys, here, torch.tensor([0, 512]))
    with pytest.raises(RotationError, match="positions must be from 0 to 511, got -1 to 3"):
        rotation.rotate(keys, torch.tensor([-1, 3]), here)
    with pytest.raises(RotationError, match=r"keys must be \[n = 2, kv_heads, head_size = 32\], got \[2, 3, 31\]"):
        rotation.rotate(keys[..., 1:], here, here)
    with pytest.raises(RotationError, match=r"old and new must be \[n\] each"):
        rotation.turn(here, torch.tensor([0]))
    with pytest.raises(RotationError, match="rotary_dim must be even"):
        Rotation(plain_table(16), 8, 16, True)
    with pytest.raises(RotationError, match=r"cos_sin must be \[positions, rotary_dim = 8\], got \[512, 16\]"):
        Rotation(plain_table(16), HEAD, 8, True)


def double(name: str, **values: Any) -> Any:
    """A module of a class of this name with these attributes; modules among them become its children."""
    module = type(name, (nn.Module,), {})()
    for key, value in values.items():
        setattr(module, key, value)
    return module


def rotary(name: str = "RotaryEmbedding", **values: Any) -> Any:
    table = {"cos_sin_cache": plain_table(HEAD), "head_size": HEAD, "rotary_dim": HEAD, "is_neox_style": True}
    return double(name, **{**table, **values})


def model_of(*rotaries: Any, attention: str = "LlamaAttention", **values: Any) -> Any:
    layers = []
    for index, one in enumerate(rotaries):
        inner = double("RadixAttention", layer_id=index, tp_k_head_num=2)
        layers.append(double(attention, attn=inner, rotary_emb=one, **values))
    return double("TinyForCausalLM", layers=nn.ModuleList(layers[::-1]))


def test_layers_with_equal_tables_have_one_rotation() -> None:
    shared = rotary()
    for model in (model_of(shared, shared), model_of(rotary(), rotary())):
        found = rotation_of(model)
        assert isinstance(found, Rotation)
        assert (found.positions, found.head_size, found.rotary_dim, found.is_neox_style) == (512, HEAD, HEAD, True)
        assert refusal_of(model) == ""


def test_layers_with_other_tables_are_listed_in_order() -> None:
    local, everywhere = rotary(), rotary(cos_sin_cache=plain_table(HEAD, base=1e6))
    found = rotation_of(model_of(local, local, everywhere))
    assert isinstance(found, list)
    assert found[0] is found[1] is not found[2]
    assert found[2] is not None and found[2].cos_sin is everywhere.cos_sin_cache


def test_layers_without_position_keep_their_keys() -> None:
    found = rotation_of(model_of(rotary(), None))
    assert isinstance(found, list)
    assert isinstance(found[0], Rotation) and found[1] is None
    cohere = model_of(rotary(), rotary(), attention="CohereAttention", v1=False, sliding_window_size=0)
    cohere.layers[1].sliding_window_size = 64  # the first layer: the list is reversed
    assert [one is None for one in rotation_of(cohere)] == [False, True]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (model_of(rotary("MRotaryEmbedding", mrope_section=[4, 6, 6])), "MRotaryEmbedding.*mrope_section"),
        (model_of(rotary("Phi3LongRoPEScaledRotaryEmbedding")), "Phi3LongRoPE.*length of the sequence"),
        (model_of(rotary("DualChunkRotaryEmbedding", cos_sin_cache=None)), "DualChunk.*kind of chunk"),
        (model_of(rotary("SomeRotaryEmbedding", cos_sin_cache=None)), "SomeRotaryEmbedding.*has no cos_sin_cache"),
        (model_of(rotary("SomeRotaryEmbedding")), "SomeRotaryEmbedding.*only RotaryEmbedding"),
        (model_of(rotary("LinearScalingRotaryEmbedding", scaling_factors=[1.0, 4.0])), "several scaling factors"),
        (model_of(rotary(), attention="DeepseekV2AttentionMLA"), "DeepseekV2AttentionMLA.*latent keys"),
        (model_of(rotary(), kv_lora_rank=512), "LlamaAttention.*latent keys"),
        (model_of(rotary(), attention="HunYuanAttention"), "HunYuanAttention.*normalizes keys"),
        (model_of(None, attention="GPT2Attention"), "TinyForCausalLM.*no GPT2Attention has a rotary_emb"),
        (double("NoForCausalLM"), "NoForCausalLM.*no attention layer"),
    ],
)
def test_what_cannot_be_rerotated_is_refused_by_name(model: Any, reason: str) -> None:
    with pytest.raises(RotationError, match=reason):
        rotation_of(model)
    assert re.search(reason, refusal_of(model))


def test_a_rotary_module_outside_the_layers_must_agree_with_them() -> None:
    frequencies = 10000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)
    model = model_of(rotary())
    model.rotary_emb = double("Gemma3RotaryEmbedding", inv_freq=frequencies, rope_type="default")
    assert refusal_of(model) == ""
    model.rotary_emb = double("Gemma3RotaryEmbedding", inv_freq=frequencies / 8, rope_type="linear")
    assert refusal_of(model).startswith(
        "Gemma3RotaryEmbedding cannot be re-rotated: its rotation is applied outside the attention layers"
    )


SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain interleaved": {"is_neox_style": False},
    "partial": {"partial_rotary_factor": 0.5},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "dynamic alpha": {"rope_scaling": {"rope_type": "dynamic", "alpha": 1000.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    "proportional": {"rope_scaling": {"rope_type": "proportional"}, "partial_rotary_factor": 0.25},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALINGS)
def test_rerotated_keys_are_those_that_sglang_computes_at_the_new_place(name: str) -> None:
    from sglang.srt.layers.rotary_embedding import get_rope

    embedding = get_rope(HEAD, HEAD, POSITIONS, 10000, dtype=torch.float32, **SCALINGS[name])
    rotation = rotation_of(model_of(embedding))
    assert isinstance(rotation, Rotation) and rotation.positions >= POSITIONS
    keys = torch.randn(40, HEADS, HEAD, generator=torch.Generator().manual_seed(2))
    old, new = places(3, 40)
    flat = keys.flatten(1)
    at_old = embedding.forward_native(old, flat, flat)[1].view_as(keys)
    at_new = embedding.forward_native(new, flat, flat)[1].view_as(keys)
    torch.testing.assert_close(rotation.rotate(at_old, old, new), at_new, atol=1e-5, rtol=0)
    assert not torch.allclose(at_old, at_new, atol=0.1)


@pytest.mark.slow
def test_every_rotary_class_of_sglang_is_either_taken_or_refused_on_purpose() -> None:
    from sglang.srt.layers.rotary_embedding import bailing_mrope, base, mrope, rope_variant, yarn

    from rksc_sgl.sglang_plugin.passes.rotary_models import ACCEPTED, REASONS

    names = {
        name
        for module in (bailing_mrope, base, mrope, rope_variant, yarn)
        for name, value in vars(module).items()
        if isinstance(value, type) and name.endswith("RotaryEmbedding")
    }
    multimodal = {name for name in names if "MRotary" in name or name == "Ernie4_5_VLRotaryEmbedding"}
    assert names == {*ACCEPTED, *REASONS} | multimodal
