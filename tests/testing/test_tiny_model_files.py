from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rksc_sgl.errors import OptionError
from rksc_sgl.testing import ARCHITECTURES, write_tiny_model

TEXT = "The answer is correct: a farmer has 12 cows and thinks step by step."


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_every_file_is_reproduced_exactly(tmp_path: Path) -> None:
    assert contents(write_tiny_model(tmp_path / "a")) == contents(write_tiny_model(tmp_path / "b"))


def test_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)  # not the seed of the model
    before = torch.get_rng_state()
    write_tiny_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_loads_it_and_runs_it(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = write_tiny_model(tmp_path, architecture)
    ids = AutoTokenizer.from_pretrained(path)(TEXT, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    assert model.dtype == torch.float32
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.isfinite().all()
    assert logits[0].argmax(-1).unique().numel() > 1  # what it says depends on what it reads


def test_a_smaller_vocabulary_has_a_tokenizer_that_keeps_to_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_tiny_model(tmp_path, vocab_size=300))
    ids = tokenizer(TEXT).input_ids
    assert len(tokenizer) <= 300 and max(ids) < 300
    assert tokenizer.decode(ids) == TEXT


def test_a_longer_context_is_the_tokenizers_too(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = write_tiny_model(tmp_path, max_position_embeddings=8192)
    assert AutoTokenizer.from_pretrained(path).model_max_length == 8192


def test_the_chat_template_is_chatml(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_tiny_model(tmp_path))
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    turns = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert chat == turns + "<|im_start|>assistant\n"


@pytest.mark.parametrize(("name", "value"), [("vocab_size", 258), ("head_dim", 8)])
def test_a_shape_that_cannot_be_served_is_refused(name: str, value: int, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {name: value}
    with pytest.raises(OptionError, match=f"{name}: must be at least .* got {value}"):
        write_tiny_model(tmp_path / "model", **overrides)
    assert not (tmp_path / "model").exists()
