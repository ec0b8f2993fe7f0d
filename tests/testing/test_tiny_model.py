from __future__ import annotations

from pathlib import Path

import pytest

from rksc_sgl.errors import OptionError
from rksc_sgl.testing import ARCHITECTURES, write_tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_arguments_give_the_same_model(architecture: str, tmp_path: Path) -> None:
    first = write_tiny_model(tmp_path / "a", architecture)
    again = write_tiny_model(tmp_path / "b", architecture)
    other = write_tiny_model(tmp_path / "c", architecture, seed=1)
    weights = [(path / "model.safetensors").read_bytes() for path in (first, again, other)]
    assert weights[0] == weights[1] != weights[2]


def test_its_tokenizer_speaks_chatml(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_tiny_model(tmp_path))
    text = "Any text, even ünïcode, survives."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_end|>").input_ids == [2]


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="architecture"):
        write_tiny_model(tmp_path, "mamba")
