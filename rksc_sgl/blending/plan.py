"""Which tokens of a blended prompt are computed, and in which runs."""

from __future__ import annotations

import torch

LEAD = 4  # tokens after another predecessor than the donor's that are always computed
GAP = 4  # tokens between two runs that cost less to compute than a run more, where a backend attends run by run


def after_breaks(source: torch.Tensor) -> torch.Tensor:
    """The first :data:`LEAD` tokens of every stretch that stands after other tokens than in the donor.

    What a token's keys tell of the tokens before it is how attention heads find what follows a word elsewhere
    (induction heads: Olsson et al. 2022). Values of the first layers hardly show it, so deviation does not choose these
    tokens; a number of which one digit was changed is read wrongly when the digits after it are taken over.

    Args:
        source: int64 ``[n]``, the donor position of each token of a prompt, -1 where there is none.

    Returns:
        ``[n]`` bool.
    """
    broken = source >= 0
    broken[1:] &= (source[:-1] < 0) | (source[1:] != source[:-1] + 1)
    broken[:1] &= source[:1] > 0
    result = broken.clone()
    for distance in range(1, LEAD):
        result[distance:] |= broken[:-distance]
    return result & (source >= 0)


def to_compute(
    candidate: torch.Tensor,
    deviation: torch.Tensor,
    attended: torch.Tensor,
    always: torch.Tensor,
    *,
    threshold: float,
    share: float,
) -> torch.Tensor:
    """Tokens that are not taken over: those that the donor has not, those that always are, and those that matter most.

    A token matters by how far its state is from the donor's times how much the end of the prompt attends to it: what
    deviates most is often what nobody asks for (``benchmarks.blend_rules`` draws both). To compute anew what deviates
    most is the rule of CacheBlend (arXiv 2405.16444).

    Args:
        candidate: ``[n]`` bool, tokens whose KV could be taken over.
        deviation: ``[n]`` float, how far each one's state is from the donor's; a NaN counts as the largest.
        attended: ``[n]`` float, how much the end of the prompt attends to each.
        always: ``[n]`` bool, tokens that are computed though the donor has them, as :func:`after_breaks` has it.
        threshold: deviation from which on a token is computed ...
        share: ... but no more, with those that always are, than this share of the candidates: those that matter most.

    Returns:
        ``[n]`` bool; the last token is always among them.
    """
    leading = candidate & always
    moved = torch.where(candidate & ~leading, deviation.nan_to_num(nan=torch.inf), -torch.inf)
    chosen = moved > threshold
    most = max(0, int(share * int(candidate.sum())) - int(leading.sum()))
    if int(chosen.sum()) > most:
        weight = torch.where(moved.isinf(), moved, moved * attended).masked_fill(~chosen, -torch.inf)
        chosen = torch.zeros_like(candidate)
        chosen[weight.topk(most).indices] = True
    result = ~candidate | leading | chosen
    result[-1] = True
    return result


def runs_of(mask: torch.Tensor, gap: int) -> list[tuple[int, int]]:
    """Runs ``(begin, end)`` of true values, joined where at most ``gap`` false ones lie between them."""
    places = mask.nonzero().flatten()
    if not len(places):
        return []
    breaks = (places.diff() > gap + 1).nonzero().flatten()
    begins = torch.cat([places[:1], places[breaks + 1]])
    ends = torch.cat([places[breaks], places[-1:]]) + 1
    return list(zip(begins.tolist(), ends.tolist(), strict=True))
