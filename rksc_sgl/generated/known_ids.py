"""The token ids behind a branch's text.

A model's sampled tokens are not always those that the tokenizer would give for the text they spell. A request that
re-tokenizes generated text may therefore miss the cached KV from the first such token on. So a branch remembers
the ids that the server reported and sends them back, and only text that was added since is tokenized.

That holds as long as the ids spell the text. A special token that was sampled is in the ids and not in the text, and
after a stop string the last ids say more than the text does: there the text decides, for it is what the program sees.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MOST_LEDGER_TOKENS = 4_000_000  # 16 MB


@dataclass(frozen=True)
class KnownIds:
    """Ids of a leading part of a text.

    Attributes:
        text: the covered text.
        ids: its token ids, as the server computed KV for them; of a merged branch those of the prompt that it took.
    """

    text: str
    ids: tuple[int, ...]

    def covers(self, text: str) -> bool:
        """Whether ``text`` still begins with the covered text."""
        return text.startswith(self.text)


def ids_after(
    prompt_text: str, prompt_ids: Sequence[int], response: dict[str, Any], spell: Callable[[list[int]], str | None]
) -> KnownIds:
    """The ids that are known after one generation.

    The generated ids are taken where they spell exactly the returned text, less a stop *token* at the end; else only
    the prompt is covered, and the generated text is tokenized anew.

    Args:
        prompt_text, prompt_ids: what was generated from.
        response: the server's answer.
        spell: the text of token ids, special tokens included; None where that cannot be told.
    """
    only_prompt = KnownIds(prompt_text, tuple(prompt_ids))
    ids, text = response.get("output_ids"), response["text"]
    finish = response["meta_info"].get("finish_reason") or {}
    matched = finish.get("matched")
    if isinstance(matched, str) or not isinstance(ids, list) or len(ids) != response["meta_info"]["completion_tokens"]:
        return only_prompt
    if finish.get("type") == "stop" and isinstance(matched, int) and ids[-1:] == [matched]:
        ids = ids[:-1]
    spelled = spell(ids) if ids else ""
    # Tokenizers of the SentencePiece kind drop the space before the first word where they decode it alone.
    if spelled is None or text not in (spelled, f" {spelled}"):
        return only_prompt
    return KnownIds(prompt_text + text, (*prompt_ids, *ids))


class PromptLedger:
    """Prompts that were sent, by request, in bounded memory: the oldest goes first. Threads may share it.

    A branch that was merged reads the prompt of another request; here it finds the ids of that.
    """

    def __init__(self, most_tokens: int = MOST_LEDGER_TOKENS) -> None:
        self._prompts: OrderedDict[str, array[int]] = OrderedDict()
        self._most_tokens, self._tokens = most_tokens, 0
        self._lock = threading.Lock()

    def note(self, request: str, ids: Sequence[int]) -> None:
        """Remember the prompt that a request reads."""
        with self._lock:
            self._tokens -= len(self._prompts.pop(request, ()))
            self._prompts[request] = array("i", ids)
            self._tokens += len(ids)
            while self._tokens > self._most_tokens:
                self._tokens -= len(self._prompts.popitem(last=False)[1])

    def find(self, request: str) -> list[int] | None:
        """The prompt of a request; None where it is not known (any more)."""
        with self._lock:
            found = self._prompts.get(request)
            return None if found is None else list(found)
