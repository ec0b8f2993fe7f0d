"""Forks on a server: the anchor that is being prefilled, the donors whose KV is there, and who was merged with them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

MOST_DONORS = 4  # of one fork; the oldest goes first
MOST_ALIASES = 256  # of one fork; the oldest goes first
MOST_TOKENS = 4_000_000  # of all donors and aliases together, 32 MB of token ids
MOST_FORKS = 4096
MOST_SHIFTS = 16  # of one fork; each is a look into the tree for whoever comes back
NEXT_S, ALL_S = 0.02, 0.2  # how long a fork's next branch is waited for, and how long any of them waits for others

Request = TypeVar("Request")


class Namespace(NamedTuple):
    """What SGLang keeps apart: KV of one namespace is never used in another.

    Attributes:
        extra_key, cache_salt, lora: of the request.
    """

    extra_key: str | None
    cache_salt: str | None
    lora: str | None


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

    @property
    def namespace(self) -> Namespace:
        return Namespace(self.extra_key, self.cache_salt, self.lora)


@dataclass(frozen=True, eq=False)
class Donor:
    """A prompt whose KV was in the tree when it was last looked for.

    Attributes:
        name: the request that computed it.
        tokens: int64 ``[n]``.
    """

    name: str
    tokens: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Alias:
    """A prompt that is read as another one, because a branch was merged.

    Attributes:
        name: the request that was merged.
        tokens: int64 ``[n]``, its own prompt.
        canonical: the donor whose prompt it took.
        similarity: what the gate found.
    """

    name: str
    tokens: NDArray[np.int64]
    canonical: Donor
    similarity: float


@dataclass(frozen=True, eq=False)
class Anchor(Generic[Request]):
    """A branch that is being prefilled and that its siblings wait for.

    Attributes:
        request: the branch.
        donor: its prompt, which siblings may take from once its KV is there.
    """

    request: Request
    donor: Donor


@dataclass
class Fork(Generic[Request]):
    """One fork.

    Attributes:
        anchor: whom siblings wait for, if anybody.
        donors: oldest first.
        aliases: oldest first; the canonical donor of each is among the donors.
        shifts: at how many positions later than from 0 on blended KV of its branches stands; the oldest first.
    """

    anchor: Anchor[Request] | None = None
    donors: list[Donor] = field(default_factory=list)
    aliases: list[Alias] = field(default_factory=list)
    shifts: list[int] = field(default_factory=list)
    _arrived: int = 0
    _last_s: float = 0.0

    def arriving(self, waiting: int, now: float) -> bool:
        """Whether more of its branches are likely to come in a moment: one came just now.

        Args:
            waiting: branches of it that wait.
            now: seconds.
        """
        if waiting > self._arrived:
            self._arrived, self._last_s = waiting, now
        return now - self._last_s < NEXT_S

    @property
    def tokens(self) -> int:
        """Token ids that are held."""
        return sum(one.tokens.size for one in self.donors) + sum(one.tokens.size for one in self.aliases)


class ForkTable(Generic[Request]):
    """The forks of a server, in bounded memory: the one that was longest not asked for is forgotten first.

    Attributes:
        tokens: token ids that are held, of donors and aliases.
    """

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

    def add_donor(self, key: ForkKey, donor: Donor) -> Donor:
        """Remember a donor of a fork; the oldest of too many is forgotten, with its aliases.

        Returns:
            The fork's donor of that prompt: the one that was there before, if it was.
        """
        fork = self.fork(key)
        known = next((one for one in fork.donors if np.array_equal(one.tokens, donor.tokens)), None)
        if known is not None:
            return known
        fork.donors.append(donor)
        self.tokens += donor.tokens.size
        while len(fork.donors) > MOST_DONORS:
            self.drop_donor(key, fork.donors[0])
        self._forget()
        return donor

    def drop_donor(self, key: ForkKey, donor: Donor) -> None:
        """Forget a donor whose KV is gone, and those who were merged with it."""
        fork = self._forks[key]
        fork.donors.remove(donor)
        self.tokens -= donor.tokens.size
        for alias in [one for one in fork.aliases if one.canonical is donor]:
            self.drop_alias(key, alias)

    def add_alias(self, key: ForkKey, alias: Alias) -> None:
        """Remember that a prompt is read as a donor's; the donor is one of the fork from then on."""
        canonical = self.add_donor(key, alias.canonical)
        fork = self._forks[key]
        for known in [one for one in fork.aliases if np.array_equal(one.tokens, alias.tokens)]:
            self.drop_alias(key, known)
        fork.aliases.append(Alias(alias.name, alias.tokens, canonical, alias.similarity))
        self.tokens += alias.tokens.size
        while len(fork.aliases) > MOST_ALIASES:
            self.drop_alias(key, fork.aliases[0])
        self._forget()

    def drop_alias(self, key: ForkKey, alias: Alias) -> None:
        """Forget that a prompt is read as another."""
        self._forks[key].aliases.remove(alias)
        self.tokens -= alias.tokens.size

    def alias_of(self, key: ForkKey, tokens: NDArray[np.int64]) -> Alias | None:
        """The longest alias of a fork with which these tokens begin."""
        fork = self._forks.get(key)
        if fork is None:
            return None
        fitting = (one for one in fork.aliases if np.array_equal(tokens[: one.tokens.size], one.tokens))
        return max(fitting, key=lambda one: one.tokens.size, default=None)

    def shifts_of(self, key: ForkKey) -> Sequence[int]:
        """At how many positions later than from 0 on blended KV of a fork stands; none of one that is not known."""
        fork = self._forks.get(key)
        return () if fork is None else tuple(fork.shifts)

    def note_shift(self, key: ForkKey, shift: int) -> None:
        """Blended KV of a fork stands at so many later positions; the oldest of too many shifts is forgotten."""
        shifts = self.fork(key).shifts
        if shift in shifts:
            shifts.remove(shift)
        shifts.append(shift)
        del shifts[:-MOST_SHIFTS]

    def anchors(self) -> Iterator[tuple[ForkKey, Anchor[Request]]]:
        """Every anchor that is waited for, or whose KV nobody has looked for yet."""
        return ((key, fork.anchor) for key, fork in self._forks.items() if fork.anchor is not None)

    def donors(self) -> Iterator[tuple[ForkKey, Donor]]:
        """Every donor of every fork."""
        return ((key, donor) for key, fork in self._forks.items() for donor in fork.donors)

    def aliases(self) -> Iterator[tuple[ForkKey, Alias]]:
        """Every alias of every fork."""
        return ((key, alias) for key, fork in self._forks.items() for alias in fork.aliases)

    def _forget(self) -> None:
        while len(self._forks) > 1 and (len(self._forks) > self._most_forks or self.tokens > self._most_tokens):
            _, fork = self._forks.popitem(last=False)
            self.tokens -= fork.tokens
