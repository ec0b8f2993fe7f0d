"""Prompts whose KV is, or was lately, in the tree, found by what they have in common with another prompt."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rksc_sgl.donors.forks import Donor, Namespace
from rksc_sgl.similarity.donor_index import DEFAULT_MAX_BYTES, DonorIndex

MOST_TOKENS = 4_000_000  # of all prompts together, 32 MB of token ids
MOST_CANDIDATES = 4  # prompts that a lookup answers


class _Key(NamedTuple):
    namespace: Namespace
    digest: bytes  # of the tokens: the same prompt is held once


class ResidentPrompts:
    """Donors for every prompt of their namespace, in bounded memory; the one that was not used for longest goes first.

    Whether a prompt's KV is still in the tree is for the caller to say, who drops those that are gone.

    Args:
        most_tokens: token ids that are held.
        max_bytes: of the index that finds them.

    Attributes:
        tokens: token ids that are held.
    """

    def __init__(self, most_tokens: int = MOST_TOKENS, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._index = DonorIndex(max_bytes)
        self._donors: dict[Hashable, Donor] = {}  # least recently used first
        self._most_tokens = most_tokens
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._donors)

    def __iter__(self) -> Iterator[tuple[Namespace, Donor]]:
        return ((key.namespace, donor) for key, donor in self._donors.items() if isinstance(key, _Key))

    @property
    def memory_bytes(self) -> int:
        """Bytes held by token ids and index."""
        return self._index.memory_bytes + 8 * self.tokens

    def add(self, namespace: Namespace, donor: Donor) -> None:
        """Remember a prompt; one with the same tokens counts as just used. What is too long is not remembered."""
        if donor.tokens.size > self._most_tokens:
            return
        key = _key(namespace, donor.tokens)
        if key in self._donors:
            self._touch(key)
            return
        self._index.add(key, donor.tokens, namespace)
        self._donors[key] = donor
        self.tokens += donor.tokens.size
        for dropped in self._index.pop_dropped():
            self._forget(dropped)
        while self.tokens > self._most_tokens:
            oldest = next(iter(self._donors))
            self._index.remove(oldest)
            self._forget(oldest)

    def drop(self, namespace: Namespace, donor: Donor) -> None:
        """Forget a prompt whose KV is gone."""
        key = _key(namespace, donor.tokens)
        if self._index.remove(key):
            self._forget(key)

    def like(self, namespace: Namespace, tokens: NDArray[np.int64], least: int) -> list[Donor]:
        """The prompts of a namespace that have most in common with this one, the best first.

        Args:
            namespace: of the prompt.
            tokens: int64 ``[n]``, its tokens.
            least: tokens that they must have in common, by estimate.
        """
        found = self._index.candidates(tokens, namespace, MOST_CANDIDATES, least)
        for one in reversed(found):
            self._touch(one.key)
        return [self._donors[one.key] for one in found]

    def _touch(self, key: Hashable) -> None:
        self._index.touch(key)
        self._donors[key] = self._donors.pop(key)

    def _forget(self, key: Hashable) -> None:
        self.tokens -= self._donors.pop(key).tokens.size


def _key(namespace: Namespace, tokens: NDArray[np.int64]) -> _Key:
    return _Key(namespace, blake2b(np.ascontiguousarray(tokens, dtype=np.int64).tobytes(), digest_size=16).digest())
