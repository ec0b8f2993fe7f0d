"""Forks on a server: the anchor that is being prefilled, and the donors whose KV is there."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

MOST_DONORS = 4  # of one fork; the oldest goes first
MOST_TOKENS = 4_000_000  # of all donors together, 32 MB of token ids
MOST_FORKS = 4096
LEAST_TOKENS = 64  # a prefill shorter than this costs little more than the step that it rides on
WORTH = 0.8  # of what the exact prefill would compute, at most

Request = TypeVar("Request")


class ForkKey(NamedTuple):
    """What separates forks: nothing is ever shared between two keys.

    Attributes:
        group: the name that the client gave the fork.
        extra_key, cache_salt, lora: SGLang's own namespaces of the request.
    """

    group: str
    extra_key: str | None
    cache_salt: str | None
    lora: str | None


@dataclass(frozen=True, eq=False)
class Donor:
    """A prompt whose KV was in the tree when it was last looked for.

    Attributes:
        name: the request that computed it.
        tokens: int64 ``[n]``.
    """

    name: str
    tokens: NDArray[np.int64]


@dataclass
class Fork(Generic[Request]):
    """One fork.

    Attributes:
        anchor: the branch that is being prefilled and that its siblings wait for.
        donors: oldest first.
    """

    anchor: Request | None = None
    donors: list[Donor] = field(default_factory=list)


class ForkTable(Generic[Request]):
    """The forks of a server, in bounded memory: the one that was longest not asked for is forgotten first."""

    def __init__(self, most_tokens: int = MOST_TOKENS, most_forks: int = MOST_FORKS) -> None:
        self._forks: OrderedDict[ForkKey, Fork[Request]] = OrderedDict()
        self._most_tokens, self._most_forks = most_tokens, most_forks
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._forks)

    def fork(self, key: ForkKey) -> Fork[Request]:
        """The fork of that key, made where there is none."""
        found = self._forks.setdefault(key, Fork())
        self._forks.move_to_end(key)
        self._forget()
        return found

    def add_donor(self, key: ForkKey, donor: Donor) -> None:
        """Remember a donor of a fork; the oldest of too many is forgotten."""
        fork = self.fork(key)
        fork.donors.append(donor)
        self.tokens += donor.tokens.size
        while len(fork.donors) > MOST_DONORS:
            self.drop_donor(key, fork.donors[0])
        self._forget()

    def drop_donor(self, key: ForkKey, donor: Donor) -> None:
        """Forget a donor whose KV is gone."""
        self._forks[key].donors.remove(donor)
        self.tokens -= donor.tokens.size

    def _forget(self) -> None:
        while len(self._forks) > 1 and (len(self._forks) > self._most_forks or self.tokens > self._most_tokens):
            _, fork = self._forks.popitem(last=False)
            self.tokens -= sum(donor.tokens.size for donor in fork.donors)


def worth_blending(tokens: int, cached: int, aligned: int, probe_share: float) -> bool:
    """Whether blending computes clearly less than a prefill after the exact prefix.

    Args:
        tokens: of the branch.
        cached: its tokens that the exact tree has already.
        aligned: its tokens that the donor has too, those of ``cached`` among them.
        probe_share: layers that run for every token, as a share of the model's.
    """
    exact = tokens - cached
    blend = tokens * probe_share + (tokens - aligned) * (1.0 - probe_share)
    return exact >= LEAST_TOKENS and blend <= WORTH * exact
