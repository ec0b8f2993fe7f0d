"""Which tokens of a blended prompt are computed, and in which runs."""

from __future__ import annotations

import torch

GAP = 4  # tokens between two runs that cost less to compute than a run of their own


def to_compute(candidate: torch.Tensor, deviation: torch.Tensor, *, threshold: float, share: float) -> torch.Tensor:
    """Tokens that are not taken over: those that the donor has not, and those whose state moved most.

    To compute anew what deviates most is the rule of CacheBlend (arXiv 2405.16444).

    Args:
        candidate: ``[n]`` bool, tokens whose KV could be taken over.
        deviation: ``[n]`` float, how far each one's state is from the donor's; a NaN counts as the largest.
        threshold: deviation from which on a token is computed ...
        share: ... but of the candidates at most this share, those with the largest deviation.

    Returns:
        ``[n]`` bool; the last token is always among them.
    """
    moved = torch.where(candidate, deviation.nan_to_num(nan=torch.inf), torch.zeros_like(deviation))
    chosen = moved > threshold
    most = int(share * int(candidate.sum()))
    if int(chosen.sum()) > most:
        chosen = torch.zeros_like(candidate)
        chosen[moved.topk(most).indices] = True
    result = ~candidate | chosen
    result[-1] = True
    return result


def runs_of(mask: torch.Tensor, gap: int = GAP) -> list[tuple[int, int]]:
    """Runs ``(begin, end)`` of true values, joined where at most ``gap`` false ones lie between them."""
    places = mask.nonzero().flatten()
    if not len(places):
        return []
    breaks = (places.diff() > gap + 1).nonzero().flatten()
    begins = torch.cat([places[:1], places[breaks + 1]])
    ends = torch.cat([places[breaks], places[-1:]]) + 1
    return list(zip(begins.tolist(), ends.tolist(), strict=True))
