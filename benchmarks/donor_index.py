"""What it costs to find a donor among many resident prefixes, and whether the right one is found.

Prefixes are a template that all share and material of their own. Every prompt looked up has a planted donor: another
opening, then most of one prefix's material in two pieces whose order is changed. Before a time is taken seriously,
the share of prompts that get their planted donor as the first answer is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from rksc_sgl.similarity.donor_index import BYTES_PER_PREFIX, DonorIndex

SIZES = (1_000, 10_000, 100_000)
TEMPLATE, OPENING = 60, 100  # tokens
VOCABULARY = 40_000
SAMPLES = 300  # timed calls of each kind at each size
OPENING_SEED = 1 << 40


@dataclass(frozen=True)
class Timing:
    """Microseconds of single calls."""

    p50: float
    p95: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        return cls(float(np.percentile(seconds, 50)) * 1e6, float(np.percentile(seconds, 95)) * 1e6)

    def __str__(self) -> str:
        return f"{self.p50:.0f} / {self.p95:.0f}"


@dataclass(frozen=True)
class Outcome:
    """Figures of an index with ``prefixes`` prefixes.

    Attributes:
        add: the last additions, at this size.
        lookup: for the four best donors.
        remove: at this size.
        slowest_add: of all additions, microseconds: one in which the arrays grew.
        bytes_per_prefix: memory that the index reports.
        found: share of lookups whose first answer was the planted donor.
    """

    prefixes: int
    add: Timing
    lookup: Timing
    remove: Timing
    slowest_add: float
    bytes_per_prefix: float
    found: float


def prefix(key: int, tokens: int) -> NDArray[np.int64]:
    """Token ids [tokens] of one prefix: the template, then its own material."""
    template = np.random.default_rng(0).integers(0, VOCABULARY, TEMPLATE)
    own = np.random.default_rng(1 + key).integers(0, VOCABULARY, tokens - TEMPLATE)
    return np.concatenate((template, own))


def prompt(key: int, tokens: int) -> NDArray[np.int64]:
    """A prompt whose planted donor is ``key``: another opening, its material in another order, a tenth left out."""
    donor = prefix(key, tokens)
    opening = np.random.default_rng(OPENING_SEED + key).integers(0, VOCABULARY, OPENING)
    material = donor[TEMPLATE:]
    cut, skip = len(material) // 2, len(material) // 10
    return np.concatenate((donor[:TEMPLATE], opening, material[cut:], material[skip:cut]))


def timed(work: Callable[[], object]) -> tuple[float, object]:
    """Seconds of a call, and its answer."""
    began = time.perf_counter()
    answer = work()
    return time.perf_counter() - began, answer


def fill(index: DonorIndex, prefixes: int, tokens: int) -> list[float]:
    """Add prefixes up to this number; seconds of each addition."""
    seconds = []
    for key in tqdm(range(len(index), prefixes), unit="prefix", file=sys.stderr):
        own = prefix(key, tokens)
        seconds.append(timed(lambda own=own, key=key: index.add(key, own))[0])  # type: ignore[misc]
    return seconds


def measure(index: DonorIndex, prefixes: int, tokens: int, samples: int) -> Outcome:
    """Fill the index, look up planted prompts, remove prefixes and add them again."""
    added = fill(index, prefixes, tokens)
    held = index.memory_bytes / len(index)
    keys = [int(key) for key in np.random.default_rng(prefixes).choice(prefixes, min(samples, prefixes), replace=False)]
    lookups, found = [], 0
    for key in keys:
        wanted = prompt(key, tokens)
        seconds, best = timed(lambda wanted=wanted: index.candidates(wanted)[:1])  # type: ignore[misc]
        lookups.append(seconds)
        found += [one.key for one in best] == [key]  # type: ignore[attr-defined]
    removed = [timed(lambda key=key: index.remove(key))[0] for key in keys]  # type: ignore[misc]
    for key in keys:
        index.add(key, prefix(key, tokens))
    last, slowest = Timing.of(added[-samples:]), max(added) * 1e6
    return Outcome(prefixes, last, Timing.of(lookups), Timing.of(removed), slowest, held, found / len(keys))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.donor_index", description=__doc__)
    parser.add_argument("--prefixes", type=int, default=SIZES[-1], help="resident prefixes at most")
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of a prefix")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="timed calls of each kind at each size")
    arguments = parser.parse_args(words)
    if arguments.prefixes < 1 or arguments.samples < 1 or arguments.tokens < 2 * TEMPLATE:
        parser.error(f"needs at least 1 prefix, 1 sample and {2 * TEMPLATE} tokens")
    index = DonorIndex(arguments.prefixes * BYTES_PER_PREFIX)
    sizes = [size for size in SIZES if size < arguments.prefixes] + [arguments.prefixes]
    outcomes = [measure(index, size, arguments.tokens, arguments.samples) for size in sizes]
    Console(width=None if sys.stdout.isatty() else 110).print(_table(outcomes, arguments.tokens))
    print(json.dumps(summary(outcomes[-1])), flush=True)
    return 0


def summary(outcome: Outcome) -> dict[str, float]:
    """The last line: figures at the largest size, which is in their names."""
    size = outcome.prefixes
    name = f"{size // 1000}k" if size % 1000 == 0 else str(size)
    return {
        f"lookup_us_p50_{name}": round(outcome.lookup.p50, 1),
        f"lookup_us_p95_{name}": round(outcome.lookup.p95, 1),
        "bytes_per_prefix": round(outcome.bytes_per_prefix),
        "found": round(outcome.found, 4),
    }


def _table(outcomes: list[Outcome], tokens: int) -> Table:
    table = Table(title=f"microseconds, median / 95th percentile; prefixes of {tokens} tokens")
    for heading in ("prefixes", "add", "lookup", "remove", "slowest add", "bytes a prefix", "found"):
        table.add_column(heading, justify="right")
    for one in outcomes:
        figures = (str(one.add), str(one.lookup), str(one.remove), f"{one.slowest_add:.0f}")
        table.add_row(f"{one.prefixes:,}", *figures, f"{one.bytes_per_prefix:.0f}", f"{one.found:.1%}")
    return table


if __name__ == "__main__":
    sys.exit(main())
