"""Which prompts a tree was made of, as far as they are remembered.

SGLang's tree (its Rust core) says how many tokens a node stands for and not which. Asked how far a given prompt
matches, it says that too, so the last prompts are kept: what they match tells the tokens of the nodes on the way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAX_REMEMBERED_TOKENS = 2_000_000  # 16 MB


@dataclass(frozen=True)
class Prompt:
    """What a request put into the tree.

    Attributes:
        parts: token ids, to be read one part after the other.
        extra_key: SGLang's namespace.
        cache_salt: what keeps it apart from other clients.
    """

    parts: tuple[Sequence[int], ...]
    extra_key: str | None = None
    cache_salt: str | None = None

    def __len__(self) -> int:
        return sum(map(len, self.parts))


class RecentPrompts:
    """The last prompts, of at most so many tokens together.

    Args:
        max_tokens: a prompt longer than this is not remembered.
    """

    def __init__(self, max_tokens: int = MAX_REMEMBERED_TOKENS) -> None:
        self.max_tokens = max_tokens
        self.tokens = 0
        self._prompts: deque[Prompt] = deque()

    def add(self, prompt: Prompt) -> None:
        """Remember one more, and forget the oldest where there are too many."""
        if not 0 < len(prompt) <= self.max_tokens:
            return
        self._prompts.append(prompt)
        self.tokens += len(prompt)
        while self.tokens > self.max_tokens:
            self.tokens -= len(self._prompts.popleft())

    def __iter__(self) -> Iterator[Prompt]:
        """The newest first."""
        return reversed(self._prompts)

    def __len__(self) -> int:
        return len(self._prompts)
