"""The token ids behind a branch's text.

A model's sampled tokens are not always those that the tokenizer would give for the text they spell. A request that
re-tokenizes generated text may therefore miss the cached KV from the first such token on. So a branch remembers
the ids that the server reported and sends them back, and only text that was added since is tokenized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TokenTrace:
    """Ids of a leading part of a text.

    Attributes:
        text: the covered text.
        ids: its token ids, as the server computed KV for them.
    """

    text: str
    ids: tuple[int, ...]

    def covers(self, text: str) -> bool:
        """Whether ``text`` still begins with the covered text."""
        return text.startswith(self.text)


def trace_of_response(prompt_text: str, prompt_ids: list[int], response: dict[str, Any]) -> TokenTrace:
    """The trace after one generation.

    The generated ids are taken where they spell exactly the returned text: the text runs to the end, or a stop
    *token* was cut off. After a stop *string* the last tokens may spell more than the text, and only the prompt
    is covered.
    """
    output_ids = response.get("output_ids")
    finish = response["meta_info"].get("finish_reason") or {}
    matched = finish.get("matched")
    if isinstance(output_ids, list) and len(output_ids) == response["meta_info"].get("completion_tokens"):
        if finish.get("type") == "length":
            return TokenTrace(prompt_text + response["text"], (*prompt_ids, *output_ids))
        if finish.get("type") == "stop" and isinstance(matched, int) and output_ids[-1:] == [matched]:
            return TokenTrace(prompt_text + response["text"], (*prompt_ids, *output_ids[:-1]))
    return TokenTrace(prompt_text, tuple(prompt_ids))
