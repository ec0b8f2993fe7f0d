"""Which resident prefixes share the most material with a new prompt.

Of each prefix the :data:`SKETCH` grams (windows of :data:`GRAM` tokens) with the smallest hashes are kept: a bottom-k
sketch (Broder 1997; Beyer et al. 2007). The choice depends on content alone, so that prompts with common material
choose the same grams of it wherever it stands. An inverted index leads from gram to prefixes; the sketches of the
prefixes that most grams lead to are then compared, which estimates the number of common tokens.

A gram in many prefixes (a chat template) tells little: it leads to the :data:`POSTINGS` prefixes added last that
have it, and counts only between prefixes that nothing rarer tells apart. Repeated material counts once.

Cost: a lookup does the same amount of work among 100 and among 100,000 prefixes, near linear in the prompt's tokens;
``python -m benchmarks.donor_index`` measures it. An addition does so too, but for the few in which the arrays double,
which take time in proportion to all that is held. Hashes depend on tokens and on the order in which namespaces came
up, never on the process: the same calls give the same answers on every tensor-parallel rank.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rksc_sgl.errors import OptionError
from rksc_sgl.similarity.alignment import Tokens, gram_hashes, mixed

GRAM = 8  # tokens of a gram
SKETCH = 64  # grams kept of one prefix; a prefix of n tokens is sampled every n / 64 tokens
POSTINGS = 8  # prefixes that one gram leads to
SHORTLIST = 16  # prefixes whose sketches are compared, at least
_WAYS = 16  # slots of a bucket of the inverted index
_FEWEST_BUCKETS = 4
_COLUMN_BYTES = 4 * SKETCH + 6 * 8
_TABLE_BYTES = 4 * SKETCH * 8  # slots are at least a quarter full when the table has just grown
_KEY_BYTES = 256  # a key and its place in a dictionary, about
BYTES_PER_PREFIX = _COLUMN_BYTES + _TABLE_BYTES + _KEY_BYTES
DEFAULT_MAX_BYTES = 64 << 20  # some 25,000 prefixes
_RARE = 2 * SKETCH  # weight of a rare gram: more than all the frequent ones of a sketch


@dataclass(frozen=True)
class Candidate:
    """A resident prefix and the estimated number of tokens that it has in common with the prompt."""

    key: Hashable
    overlap: int


class DonorIndex:
    """Resident prefixes by content, in bounded memory.

    Args:
        max_bytes: memory budget; the prefix that was not used for longest is dropped to stay within it. While its
            arrays grow, up to as much again is taken for a moment.

    Raises:
        OptionError: ``max_bytes`` has no room for one prefix.
    """

    def __init__(self, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.capacity = max_bytes // BYTES_PER_PREFIX
        if self.capacity < 1:
            raise OptionError(f"max_bytes: must be at least {BYTES_PER_PREFIX}, room for one prefix, got {max_bytes}")
        self._entries: OrderedDict[Hashable, int] = OrderedDict()  # least recently used first
        self._columns = _Columns()
        self._table = _PostingTable()
        self._spaces: dict[Hashable, _Space] = {}
        self._spaces_seen = 0
        self._clock = 0
        self._dropped: list[Hashable] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    @property
    def memory_bytes(self) -> int:
        """Bytes held: arrays as they are, keys by estimate."""
        return self._columns.nbytes + self._table.nbytes + _KEY_BYTES * len(self._entries)

    def add(self, key: Hashable, tokens: Tokens, namespace: Hashable = None) -> None:
        """Register a prefix; one of the same key is replaced. It counts as just used."""
        self.remove(key)
        while len(self._entries) >= self.capacity:
            oldest = next(iter(self._entries))
            self.remove(oldest)
            self._dropped.append(oldest)
        space = self._space(namespace)
        sketch = _sketch(tokens, space.number)
        entry = self._columns.claim(self.capacity)
        self._clock += 1
        self._columns.write(entry, key, namespace, sketch, self._clock)
        self._table.add(sketch.grams, entry, self._columns.stamps)
        self._entries[key] = entry
        space.prefixes += 1

    def remove(self, key: Hashable) -> bool:
        """Forget a prefix; False if it is not there."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        namespace = self._columns.namespaces[entry]
        self._table.remove(self._columns.grams_of(entry), entry)
        self._columns.release(entry)
        self._spaces[namespace].prefixes -= 1
        if not self._spaces[namespace].prefixes:
            del self._spaces[namespace]
        return True

    def touch(self, key: Hashable) -> bool:
        """Say that a prefix was used, so that it is dropped later; False if it is not there."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        self._entries.move_to_end(key)
        self._clock += 1
        self._columns.stamps[entry] = self._clock
        return True

    def pop_dropped(self) -> list[Hashable]:
        """Keys dropped for want of room since the last call, the first dropped first."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def candidates(
        self, tokens: Tokens, namespace: Hashable = None, limit: int = 4, minimum_overlap: int = 32
    ) -> list[Candidate]:
        """Prefixes of one namespace with the most tokens in common, then the most recently used; changes nothing.

        Args:
            tokens: the new prompt's token ids [n].
            namespace: only prefixes added under an equal one are answered.
            limit: most prefixes to answer.
            minimum_overlap: estimated common tokens below which a prefix is not answered.
        """
        if namespace not in self._spaces or limit < 1:
            return []
        sketch = _sketch(tokens, self._spaces[namespace].number)
        entries = self._shortlist(sketch, max(SHORTLIST, 4 * limit))
        overlaps = self._columns.overlaps(entries, sketch)
        order = np.lexsort((-self._columns.stamps[entries], -overlaps))[:limit]
        best = [(self._columns.keys[entries[index]], int(overlaps[index])) for index in order]
        return [Candidate(key, overlap) for key, overlap in best if overlap >= max(minimum_overlap, 1)]

    def _shortlist(self, sketch: _Sketch, most: int) -> NDArray[np.int64]:
        hits = self._table.find(sketch.grams)
        frequent = (hits >= 0).sum(axis=1, keepdims=True) >= POSTINGS
        weights = np.broadcast_to(np.where(frequent, 1, _RARE), hits.shape)[hits >= 0]
        entries, which = np.unique(hits[hits >= 0], return_inverse=True)
        votes = np.bincount(which, weights=weights, minlength=len(entries))
        return entries[np.lexsort((-self._columns.stamps[entries], -votes))[:most]].astype(np.int64)

    def _space(self, namespace: Hashable) -> _Space:
        if namespace not in self._spaces:
            self._spaces_seen += 1
            self._spaces[namespace] = _Space(self._spaces_seen)
        return self._spaces[namespace]


@dataclass
class _Space:
    """A namespace: a number that goes into every hash, so that no gram leads from one namespace to another."""

    number: int
    prefixes: int = 0


@dataclass(frozen=True)
class _Sketch:
    """Grams [at most SKETCH] with hashes below ``bound``, ascending; ``length`` tokens were sampled."""

    grams: NDArray[np.uint32]
    bound: int
    length: int


def _sketch(tokens: Tokens, space: int) -> _Sketch:
    salt = np.uint64(space * 0x9E3779B97F4A7C15 % 2**64)
    hashes = np.unique(mixed(gram_hashes(tokens, GRAM) ^ salt))
    bound = int(hashes[SKETCH]) if len(hashes) > SKETCH else 2**64 - 1
    # the high bits chose the gram, the low bits name it
    grams = np.unique((hashes[:SKETCH] & np.uint64(0xFFFFFFFF)).astype(np.uint32))
    return _Sketch(grams, bound, len(tokens))


class _Columns:
    """What is known of each prefix, by entry number."""

    def __init__(self) -> None:
        self.sketches: NDArray[np.uint32] = np.zeros((0, SKETCH), dtype=np.uint32)
        self.sizes: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.lengths: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.stamps: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.bounds: NDArray[np.float64] = np.zeros(0, dtype=np.float64)
        self.keys: list[Hashable] = []
        self.namespaces: list[Hashable] = []
        self.vacant: list[int] = []

    @property
    def nbytes(self) -> int:
        arrays = (self.sketches, self.sizes, self.lengths, self.stamps, self.bounds)
        return sum(array.nbytes for array in arrays) + 16 * len(self.keys)

    def claim(self, capacity: int) -> int:
        """A vacant entry number, below ``capacity``."""
        if not self.vacant:
            old = len(self.keys)
            more = min(max(2 * old, 16), capacity) - old
            for name in ("sketches", "sizes", "lengths", "stamps", "bounds"):
                array = getattr(self, name)
                setattr(self, name, np.concatenate((array, np.zeros((more, *array.shape[1:]), dtype=array.dtype))))
            self.keys += [None] * more
            self.namespaces += [None] * more
            self.vacant += range(old + more - 1, old - 1, -1)
        return self.vacant.pop()

    def write(self, entry: int, key: Hashable, namespace: Hashable, sketch: _Sketch, stamp: int) -> None:
        self.keys[entry], self.namespaces[entry] = key, namespace
        self.sketches[entry, : len(sketch.grams)] = sketch.grams
        self.sizes[entry], self.lengths[entry], self.bounds[entry] = len(sketch.grams), sketch.length, sketch.bound
        self.stamps[entry] = stamp

    def release(self, entry: int) -> None:
        self.keys[entry] = self.namespaces[entry] = None
        self.vacant.append(entry)

    def grams_of(self, entry: int) -> NDArray[np.uint32]:
        return self.sketches[entry, : self.sizes[entry]]

    def overlaps(self, entries: NDArray[np.int64], sketch: _Sketch) -> NDArray[np.int64]:
        """Estimated common tokens [entries]: common grams below both bounds, over the share of grams below them."""
        if not len(entries):
            return entries
        theirs = self.sketches[entries]
        place = np.minimum(np.searchsorted(sketch.grams, theirs), len(sketch.grams) - 1)
        common = (sketch.grams[place] == theirs) & (np.arange(SKETCH) < self.sizes[entries, None])
        share = np.minimum(self.bounds[entries], float(sketch.bound)) / 2.0**64
        grams = common.sum(axis=1) / share
        tokens = np.where(grams > 0, np.rint(grams) + GRAM - 1, 0).astype(np.int64)
        return np.minimum(tokens, np.minimum(self.lengths[entries], sketch.length))


class _PostingTable:
    """Gram to entries: buckets of :data:`_WAYS` slots, found by the low bits of the gram, at most half of them full.

    A bucket that is full all the same (rare) gives up the posting of the entry used longest ago.
    """

    def __init__(self) -> None:
        self.grams: NDArray[np.uint32] = np.zeros((_FEWEST_BUCKETS, _WAYS), dtype=np.uint32)
        self.entries: NDArray[np.int32] = np.full((_FEWEST_BUCKETS, _WAYS), -1, dtype=np.int32)
        self.used = 0

    @property
    def nbytes(self) -> int:
        return self.grams.nbytes + self.entries.nbytes

    def find(self, grams: NDArray[np.uint32]) -> NDArray[np.int32]:
        """Entries [grams, _WAYS] that have each gram; -1 fills up."""
        rows = self._rows(grams)
        return np.where(self.grams[rows] == grams[:, None], self.entries[rows], -1)

    def add(self, grams: NDArray[np.uint32], entry: int, stamps: NDArray[np.int64]) -> None:
        """Lead from these grams, all different, to the entry."""
        while 2 * (self.used + len(grams)) > self.entries.size:
            self._grow()
        while len(grams):  # one gram of each bucket in a round
            _, first = np.unique(self._rows(grams), return_index=True)
            self._place(grams[first], entry, stamps)
            grams = np.delete(grams, first)

    def remove(self, grams: NDArray[np.uint32], entry: int) -> None:
        rows = self._rows(grams)
        which, slots = np.nonzero((self.grams[rows] == grams[:, None]) & (self.entries[rows] == entry))
        self.entries[rows[which], slots] = -1
        self.used -= len(which)

    def _place(self, grams: NDArray[np.uint32], entry: int, stamps: NDArray[np.int64]) -> None:
        rows = self._rows(grams)
        held = self.entries[rows]
        ages = np.where(held >= 0, stamps[held], -1)
        same = (self.grams[rows] == grams[:, None]) & (held >= 0)
        oldest_same = np.where(same, ages, np.iinfo(np.int64).max).argmin(axis=1)
        slots = np.where(same.sum(axis=1) >= POSTINGS, oldest_same, ages.argmin(axis=1))
        self.used += int((self.entries[rows, slots] < 0).sum())
        self.grams[rows, slots] = grams
        self.entries[rows, slots] = entry

    def _grow(self) -> None:
        """Twice the buckets: each one's postings stay, or move to its twin, by the next bit of their gram."""
        bit = np.uint32(len(self.grams))
        upper = (self.grams & bit) != 0
        self.grams = np.concatenate((self.grams, self.grams))
        self.entries = np.concatenate((np.where(upper, -1, self.entries), np.where(upper, self.entries, -1)))

    def _rows(self, grams: NDArray[np.uint32]) -> NDArray[np.uint32]:
        return grams & np.uint32(len(self.grams) - 1)
