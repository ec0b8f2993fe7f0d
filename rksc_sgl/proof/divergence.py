"""How far one answer's next-token distribution is from another's."""

from __future__ import annotations

import math
from collections.abc import Mapping

LEAST = 1e-9  # probability of what is not reported; keeps its logarithm finite


def divergence(exact: Mapping[int, float], other: Mapping[int, float]) -> float:
    """The least that KL(exact || other) can be, in nats, by the most likely tokens that each reports.

    Tokens that both report count one by one, those that only ``exact`` reports as one outcome, with as much of what
    ``other`` leaves open as suits it best, and everything else as one outcome.

    Args:
        exact: log-probability of each of the most likely next tokens, by token id.
        other: the same of the answer that is compared; its tokens may be others.

    Returns:
        0 or more; infinity where ``other`` reports nothing, or something that is no log-probability.
    """
    if not other or any(math.isnan(value) or value == math.inf for value in other.values()):
        return math.inf
    shared = [token for token in exact if token in other]
    total = sum(math.exp(exact[token]) * (exact[token] - other[token]) for token in shared)
    missing = sum(math.exp(value) for token, value in exact.items() if token not in other)
    rest = _left(exact, exact)
    open_to_it = _left(other, shared)
    if missing:
        most = min(_left(other, other), open_to_it * missing / (missing + rest))
        total += missing * math.log(missing / most)
        open_to_it = max(LEAST, open_to_it - most)
    return max(0.0, total + rest * math.log(rest / open_to_it))


def _left(one: Mapping[int, float], tokens: Mapping[int, float] | list[int]) -> float:
    """The probability that these tokens leave to all others."""
    return max(LEAST, 1.0 - sum(math.exp(one[token]) for token in tokens))
