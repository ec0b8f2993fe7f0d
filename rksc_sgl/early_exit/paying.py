"""Whether verifications can save time by leaving a pass, before it is run.

An accelerator that waits for launches takes as long for a few rows as for one. There, leaving saves nothing as long as
others go on through all layers, and where all leave, it saves the layers that are never launched; each look costs what
was measured of looks on this server, or what launching a layer does, for the host waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from rksc_sgl.early_exit.leaving import Watched
from rksc_sgl.placement.worth import PassCost

NOT_PAYING = "leaving early would not save time"


def can_pay(watched: Sequence[Watched], rows: int, leaving_rows: int, layers: int, cost: PassCost) -> bool:
    """Whether it would pay at best: all that may leave do so at the first look that lets them.

    Args:
        watched: those that may leave.
        rows: of the pass.
        leaving_rows: of these.
        layers: of the model.
        cost: of a pass of this server. One that does not overlap computes fewer rows in less time, and looks cost
            nothing beside it.
    """
    if not cost.overlaps:
        return True
    rules = [one.rule for one in watched if one.rule is not None]
    first = min((layer for rule in rules for layer in rule.layers if rule.can_leave(layer)), default=layers)
    looks = len({layer for rule in rules for layer in rule.layers if layer <= first})
    staying = rows - leaving_rows
    saved = cost.of(rows) - (cost.of(staying) if staying else 0.0)
    return (layers - first) / layers * saved > looks * cost.of_look(layers)
