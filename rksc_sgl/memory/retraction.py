"""Who is retracted when decoding runs out of slots: branches of the fork that came last, together."""

from __future__ import annotations

from collections.abc import Sequence


def order_to_keep(order: Sequence[int], arrivals: Sequence[int | None]) -> list[int]:
    """Places in a batch, those that are kept longest in front.

    Args:
        order: all places, as SGLang would keep them.
        arrivals: of each place the arrival of its fork; None for a request of none.
    """
    # Stable: requests of no fork keep SGLang's order in front, and branches of one fork theirs.
    return sorted(order, key=lambda place: arrivals[place] or 0)


def retracted_together(retracted: Sequence[int | None], left: Sequence[int | None]) -> list[int]:
    """Places of those left in a batch that follow branches of their fork; none where nobody would be left.

    Args:
        retracted: arrivals of the forks of those that were retracted.
        left: the same of those that are left.
    """
    forks = {arrival for arrival in retracted if arrival is not None}
    follow = [place for place, arrival in enumerate(left) if arrival in forks]
    return follow if len(follow) < len(left) else []
