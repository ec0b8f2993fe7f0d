"""What a profile is valid for."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rksc_sgl.calibration.fingerprint import Fingerprint, fingerprint_of_model, fingerprint_of_prompt
from rksc_sgl.errors import ProfileError

SERVED = Fingerprint("a" * 64, "float32", "none", "auto", "triton", 1)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("dtype", "bfloat16", "is of number type float32, this server runs bfloat16"),
        ("quantization", "fp8", "is of quantization none, this server runs fp8"),
        ("kv_cache_dtype", "fp8_e4m3", "is of KV cache type auto, this server runs fp8_e4m3"),
        ("attention_backend", "fa3", "is of attention backend triton, this server runs fa3"),
        ("tp_size", 2, "is of tensor-parallel size 1, this server runs 2"),
        ("model", "b" * 64, "is of another model"),
    ],
)
def test_each_field_that_differs_is_named_with_both_values(field: str, value: Any, said: str) -> None:
    assert SERVED.differences(replace(SERVED, **{field: value})) == [said]


def test_all_fields_that_differ_are_named_and_none_where_none_does() -> None:
    assert SERVED.differences(replace(SERVED)) == []
    assert len(SERVED.differences(replace(SERVED, dtype="float16", tp_size=4))) == 2


def test_a_fingerprint_comes_back_from_plain_values() -> None:
    assert Fingerprint.from_mapping(json.loads(json.dumps(asdict(SERVED)))) == SERVED
    with pytest.raises(ProfileError, match="must be an object, got str"):
        Fingerprint.from_mapping("aaaa/float32")


def test_the_fingerprint_of_a_prompt_tells_every_part_of_it_apart() -> None:
    prompts = [
        ((1, 2, 3), (5,), (6,)),
        ((1, 2), (3, 5), (6,)),
        ((1, 2, 3), (6,), (5,)),
        ((1, 2, 3), (5,), (6, 7)),
        ((2, 1, 3), (5,), (6,)),
    ]
    assert len({fingerprint_of_prompt(*prompt) for prompt in prompts}) == len(prompts)
    assert fingerprint_of_prompt((1,), (5, 6), (7,)) == fingerprint_of_prompt([1], [6, 5], [7])


def write_model(root: Path, *, weights: bytes = bytes(range(256)) * 64, shape: Any = (64, 64), **config: Any) -> Path:
    """A configuration and one float32 tensor in the form of safetensors."""
    root.mkdir()
    table = {"w": {"dtype": "F32", "shape": list(shape), "data_offsets": [0, len(weights)]}}
    header = json.dumps(table).encode()
    (root / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64} | config))
    (root / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + weights)
    return root


def test_the_fingerprint_of_a_model_is_of_its_contents_not_of_its_place(tmp_path: Path) -> None:
    first = fingerprint_of_model(write_model(tmp_path / "a"))
    assert fingerprint_of_model(write_model(tmp_path / "b")) == first
    (tmp_path / "b" / "config.json").write_text('{"hidden_size":   64,\n "model_type": "llama"}')
    assert fingerprint_of_model(tmp_path / "b") == first
    scaled = bytes(255 - byte for byte in bytes(range(256)) * 64)
    others = [
        write_model(tmp_path / "c", weights=scaled),
        write_model(tmp_path / "d", shape=(32, 128)),
        write_model(tmp_path / "e", rope_theta=5),
        write_model(tmp_path / "f", weights=bytes(range(256)) * 65),
    ]
    assert len({first, *map(fingerprint_of_model, others)}) == 5


def test_the_first_and_the_last_byte_of_large_weights_count(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).bytes(3_000_000)
    first = fingerprint_of_model(write_model(tmp_path / "a", weights=weights))
    for name, place in (("b", 0), ("c", len(weights) - 1)):
        changed = bytearray(weights)
        changed[place] ^= 1
        assert fingerprint_of_model(write_model(tmp_path / name, weights=bytes(changed))) != first


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"no \*\.safetensors"):
        fingerprint_of_model(tmp_path)
    model = write_model(tmp_path / "a")
    weights = (model / "model.safetensors").read_bytes()
    for broken in (b"", weights[:5], weights[:40], b"\xff" * 100, struct.pack("<Q", 2) + b"[]"):
        (model / "model.safetensors").write_bytes(broken)
        with pytest.raises(ProfileError, match="no fingerprint could be taken"):
            fingerprint_of_model(model)
    (model / "model.safetensors").write_bytes(weights)
    (model / "config.json").unlink()
    with pytest.raises(ProfileError, match=r"config\.json"):
        fingerprint_of_model(model)
