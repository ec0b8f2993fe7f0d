"""What was computed of forks before, so that what is computed again can be told."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rksc_sgl.donors.forks import ForkKey
from rksc_sgl.memory.forks import MOST_FORKS

MOST_TOKENS = 4_000_000  # of all beginnings together, 32 MB of token ids


@dataclass
class _Fork:
    """One fork.

    Attributes:
        beginning: the prompt that was computed first; None before that.
        branches: of those that ended: how many tokens have KV, and a digest of these.
    """

    beginning: array[int] | None = None
    branches: dict[int, tuple[int, int]] = field(default_factory=dict)


class Computed:
    """Beginnings and branches of forks, in bounded memory: what was longest not asked for is forgotten first."""

    def __init__(self) -> None:
        self._forks: OrderedDict[ForkKey, _Fork] = OrderedDict()
        self._tokens = 0

    def beginning(self, key: ForkKey) -> array[int] | None:
        """The prompt that was computed first of a fork."""
        fork = self._forks.get(key)
        return None if fork is None else fork.beginning

    def note_prompt(self, key: ForkKey, ids: array[int]) -> None:
        """A prompt was computed."""
        fork = self._fork(key)
        if fork.beginning is None:
            fork.beginning = ids
            self._tokens += len(ids)
            self._forget()

    def note_branch(self, key: ForkKey, branch: int, ids: array[int]) -> None:
        """A branch ended: these ids have KV."""
        self._fork(key).branches[branch] = (len(ids), hash(ids.tobytes()))

    def known(self, key: ForkKey, branch: int, ids: array[int]) -> int:
        """How many tokens of a prompt, from the first on, were computed before for its fork."""
        fork = self._forks.get(key)
        if fork is None:
            return 0
        tokens, digest = fork.branches.get(branch, (0, 0))
        if 0 < tokens <= len(ids) and hash(ids[:tokens].tobytes()) == digest:
            return tokens
        return 0 if fork.beginning is None else common_beginning(fork.beginning, ids)

    def forget(self, key: ForkKey) -> None:
        """Nothing more of a fork is to come."""
        fork = self._forks.pop(key, None)
        if fork is not None and fork.beginning is not None:
            self._tokens -= len(fork.beginning)

    def clear(self) -> None:
        """There is no KV any more."""
        self._forks.clear()
        self._tokens = 0

    def _fork(self, key: ForkKey) -> _Fork:
        fork = self._forks.setdefault(key, _Fork())
        self._forks.move_to_end(key)
        self._forget()
        return fork

    def _forget(self) -> None:
        while len(self._forks) > 1 and (len(self._forks) > MOST_FORKS or self._tokens > MOST_TOKENS):
            self.forget(next(iter(self._forks)))


def common_beginning(one: Any, other: Any) -> int:
    """How many tokens two prompts have in common, from the first on."""
    size = min(len(one), len(other))
    differ = np.nonzero(np.frombuffer(one, np.int64, size) != np.frombuffer(other, np.int64, size))[0]
    return int(differ[0]) if differ.size else size
