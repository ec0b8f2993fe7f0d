"""Which tokens of a vocabulary are parts of a number."""

from __future__ import annotations

from pathlib import Path

from rksc_sgl.similarity.number_tokens import number_tokens
from rksc_sgl.testing import write_tiny_model


class Tokenizer:
    """As much of a tokenizer as is asked for."""

    def __init__(self, *tokens: str | bytes | None) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | bytes | None]:
        return [self.tokens[index] for index in ids]


def test_numbers_are_tokens_with_a_numeric_character_and_no_markers() -> None:
    tokenizer = Tokenizer("a", "7", "Ġ12", "x2", "½", "<0x0A>", "<|reserved_3|>", b"45", b"\xff", None, "٣", "<", ">")
    found = number_tokens(tokenizer, 20).nonzero()[0].tolist()
    assert found == [1, 2, 3, 4, 7, 10]
    assert number_tokens(tokenizer, 2).tolist() == [False, True], "ids of the model only"


def test_every_digit_of_a_text_is_found_with_a_real_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_tiny_model(tmp_path))
    numbers = number_tokens(tokenizer, 512)
    ids = tokenizer.encode("A farmer has 12 cows and sells 5 of 307.")
    said = [tokenizer.decode([token]).strip() for token in ids if numbers[token]]
    assert "".join(said) == "125307"
    assert not any(any(map(str.isdigit, tokenizer.decode([token]))) for token in ids if not numbers[token])
