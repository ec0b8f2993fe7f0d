"""Fewer, longer runs of computed tokens, where an attention backend takes no more of them in a batch."""

from __future__ import annotations

from collections.abc import Sequence

Run = tuple[int, int]  # begin and end among the new tokens of a sequence


def fewer_runs(sequences: Sequence[Sequence[Run]], most: int | None) -> list[list[Run]]:
    """Join neighbouring runs over the whole batch until there are at most so many, with the fewest extra tokens.

    A join computes the tokens of the gap between two runs of one sequence and saves one run, whatever else is joined.
    So the smallest gaps of the whole batch are the best ones. Of equal gaps the first ones go, so that every rank comes
    to the same runs.

    Args:
        sequences: the runs of each sequence of a batch, ascending and apart; a sequence may have none.
        most: how many runs there may be; None for any number.

    Returns:
        The runs of each sequence. They cover what was given, and the gaps that were closed.

    Raises:
        ValueError: ``most`` is less than the sequences that have runs: no join can help there.
    """
    excess = 0 if most is None else sum(map(len, sequences)) - most
    if excess <= 0:
        return [list(runs) for runs in sequences]
    gaps = sorted(
        (runs[index + 1][0] - runs[index][1], place, index)
        for place, runs in enumerate(sequences)
        for index in range(len(runs) - 1)
    )
    if excess > len(gaps):
        filled = sum(1 for runs in sequences if runs)
        raise ValueError(f"most: must be at least {filled}, the sequences with something to compute; got {most}")
    closed = {(place, index) for _, place, index in gaps[:excess]}
    return [
        [
            (begin, end)
            for begin, end in zip(
                (run[0] for index, run in enumerate(runs) if (place, index - 1) not in closed),
                (run[1] for index, run in enumerate(runs) if (place, index) not in closed),
                strict=True,
            )
        ]
        for place, runs in enumerate(sequences)
    ]
