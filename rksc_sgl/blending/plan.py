"""Which tokens of a blended prompt are computed, and in which runs."""

from __future__ import annotations

import torch

BEFORE_NUMBER, AFTER_NUMBER = 1, 2  # tokens beside a number that are computed with it
LEAD = 4  # tokens after another predecessor than the donor's that are always computed
GAP = 4  # tokens between two runs that cost less to compute than a run of their own


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
    return _widened(broken, before=0, after=LEAD - 1) & (source >= 0)


def around_numbers(number: torch.Tensor) -> torch.Tensor:
    """Numbers, and the tokens beside them.

    Few tokens carry what cannot be guessed from the rest, and numbers are the ones that a vocabulary shows. What a
    branch says of them it says from its own KV (measured by ``benchmarks.divergent_prefix``).

    Args:
        number: ``[n]`` bool, tokens of a prompt that are parts of numbers.

    Returns:
        ``[n]`` bool.
    """
    return _widened(number, before=BEFORE_NUMBER, after=AFTER_NUMBER)


def always_computed(source: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """``[n]`` bool, tokens that are computed though the donor has them: after breaks, and around numbers.

    Args:
        source: as :func:`after_breaks` takes it.
        number: as :func:`around_numbers` takes it.
    """
    return after_breaks(source) | (around_numbers(number) & (source >= 0))


def _widened(mask: torch.Tensor, *, before: int, after: int) -> torch.Tensor:
    """A mask, and so many places before and after each of its true values."""
    result = mask.clone()
    for distance in range(1, after + 1):
        result[distance:] |= mask[:-distance]
    for distance in range(1, before + 1):
        result[:-distance] |= mask[distance:]
    return result


def to_compute(
    candidate: torch.Tensor, deviation: torch.Tensor, always: torch.Tensor, *, threshold: float, share: float
) -> torch.Tensor:
    """Tokens that are not taken over: those that the donor has not, those that always are, and those that moved most.

    To compute anew what deviates most is the rule of CacheBlend (arXiv 2405.16444).

    Args:
        candidate: ``[n]`` bool, tokens whose KV could be taken over.
        deviation: ``[n]`` float, how far each one's state is from the donor's; a NaN counts as the largest.
        always: ``[n]`` bool, as :func:`always_computed` has it.
        threshold: deviation from which on a token is computed ...
        share: ... but no more, with those that always are, than this share of the candidates: those that deviate most.

    Returns:
        ``[n]`` bool; the last token is always among them.
    """
    leading = candidate & always
    moved = torch.where(candidate & ~leading, deviation.nan_to_num(nan=torch.inf), -torch.inf)
    chosen = moved > threshold
    most = max(0, int(share * int(candidate.sum())) - int(leading.sum()))
    if int(chosen.sum()) > most:
        chosen = torch.zeros_like(candidate)
        chosen[moved.topk(most).indices] = True
    result = ~candidate | leading | chosen
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
