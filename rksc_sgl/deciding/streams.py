"""Vote streams of a known truth, many at once: what a boundary does with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from rksc_sgl.deciding.bound import Boundary, worst_case

Streams: TypeAlias = npt.NDArray[np.int_]
"""``[streams, branches]``: the number of each branch's answer in the order of launch, -1 for no vote."""


def shuffled(votes: Sequence[int], branches: int, streams: int, generator: np.random.Generator) -> Streams:
    """Random orders of these answers.

    Args:
        votes: how many branches give each answer; what is missing to ``branches`` has no answer.
        branches: N.
        streams: how many orders.
        generator: of the orders.
    """
    given: Streams = np.repeat(np.arange(len(votes)), votes)
    answers: Streams = np.concatenate([given, np.full(branches - len(given), -1)])
    return generator.permuted(np.tile(answers, (streams, 1)), axis=1)


def sets_of_answers(limit: Boundary) -> dict[str, tuple[int, ...]]:
    """Sets of N answers that are hard to tell early, the worst case of the boundary among them: votes of each."""
    n = limit.branches
    half = n // 2
    return {
        "worst case": worst_case(n, limit.region)[1],
        "even": (half, half),
        "nearly even": (n - half + (n % 2 == 0), half - (n % 2 == 0)),
        "nearly even, one without an answer": (half, n - 1 - half),
        "three alike": (n - 2 * (n // 3), n // 3, n // 3),
        "many alike": (2,) * half,
        "all different": (1,) * n,
        "a third leads": (n // 3, *(1,) * (n - n // 3)),
        "half without an answer": (n // 4 + 1, n // 4),
        "clear": (3 * n // 4, n // 8, n // 8),
        "nobody": (),
    }


def errors_and_looks(streams: Streams, limit: Boundary) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int_]]:
    """For each stream whether it stops with another answer than its vote of all, and after how many branches."""
    count, n = streams.shape
    names = int(streams.max(initial=0)) + 1
    votes = np.cumsum(streams[:, :, None] == np.arange(names), axis=1)
    first = np.where(
        (streams[:, :, None] == np.arange(names)).any(1), (streams[:, :, None] == np.arange(names)).argmax(1), n
    )
    ranked = np.sort(votes, axis=2)
    ahead, behind = ranked[:, :, -1], ranked[:, :, -2] if names > 1 else np.zeros_like(ranked[:, :, -1])
    stops = limit.region[np.arange(1, n + 1), ahead, behind] & (ahead > behind)
    stopped = stops.any(1)
    looks = np.where(stopped, stops.argmax(1) + 1, n)
    leader = votes[np.arange(count), looks - 1].argmax(1)
    winner = (votes[:, -1].astype(np.int_) * (n + 1) - first).argmax(
        1
    )  # ties to the answer whose first branch comes first
    return stopped & (leader != winner), looks
