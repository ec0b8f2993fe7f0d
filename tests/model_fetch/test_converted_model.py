from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from rksc_sgl import model_fetch
from rksc_sgl.errors import ModelFetchError
from rksc_sgl.model_fetch import convert

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Downloaded and converted by this run, whatever is in the user's cache; half a gigabyte, so not kept."""
    path = model_fetch.fetch(cache_dir=tmp_path_factory.mktemp("cache"))
    yield path
    shutil.rmtree(path)


def pieces(rule: str, text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in convert.split_text(rule).pre_tokenize_str(text)]


def test_white_space_before_a_number_stays_together_where_digits_stand_alone() -> None:
    assert pieces("smollm", "Steps:\n\n1. Add  42") == ["Steps", ":", "\n\n", "1", ".", " Add", "  ", "4", "2"]
    assert pieces("gpt-2", "Steps:\n\n1. Add  42") == ["Steps", ":", "\n", "\n", "1", ".", " Add", " ", " 42"]


def test_an_unknown_rule_to_split_text_is_refused() -> None:
    with pytest.raises(ModelFetchError, match="'qwen2'"):
        convert.split_text("qwen2")


def test_the_split_survives_in_a_tokenizer_file(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = convert.split_text("smollm")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    kept = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).pre_tokenizer
    assert kept is not None
    assert [word for word, _ in kept.pre_tokenize_str("a  42")] == ["a", "ĠĠ", "4", "2"]


@pytest.mark.slow
def test_numbered_lists_and_indented_numbers_get_the_tokens_that_the_model_was_trained_on(converted: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.tokenize("Steps:\n\n1. Add") == ["Steps", ":", "ĊĊ", "1", ".", "ĠAdd"]
    assert tokenizer.tokenize("x =  12") == ["x", "Ġ=", "ĠĠ", "1", "2"]
    for text in ("Steps:\n\n1. Add\n\n2. Sub", "    5\t½ ② ٣\r\n\n 7", "naïve 🙂 <|im_end|> x"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.slow
def test_special_tokens_and_stop_tokens_are_those_of_the_file(converted: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(tokenizer, name) for name in names] == [1, 2, 2]
    assert tokenizer("hello").input_ids == tokenizer("hello", add_special_tokens=False).input_ids
    for file in ("config.json", "generation_config.json"):
        written = json.loads((converted / file).read_text())
        assert [written[name] for name in names] == [1, 2, 2]
    without_system = tokenizer.apply_chat_template(QUESTION, tokenize=False)
    assert without_system.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


@pytest.mark.slow
def test_the_converted_model_answers_and_stops(converted: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_the_weights_are_those_of_the_file_in_float32(converted: Path) -> None:
    import torch
    from safetensors import safe_open

    with safe_open(converted / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
        embedding = weights.get_tensor("model.embed_tokens.weight")
    assert len(names) == 272
    assert "lm_head.weight" not in names  # tied
    assert embedding.dtype == torch.float32
    assert embedding.shape == (49152, 576)
    assert not torch.equal(embedding.bfloat16().float(), embedding)  # 16 bits would not hold them
