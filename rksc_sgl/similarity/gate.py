"""How alike two prefixes are by their hidden states: the published score, and the pooled one.

Neither is safe alone: a changed number moves them by less than another instruction does. A merge also needs the
content guard (:mod:`rksc_sgl.similarity.content_guard`).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import torch

from rksc_sgl.errors import OptionError

INCOMPARABLE = float("-inf")
STEEPNESS = 1.5  # of the published layer weights


def layer_weights(layers: int) -> torch.Tensor:
    """Weights ``[layers]`` that grow with depth and sum to 1: ``softmax(linspace(0, 1.5, layers))``.

    Source: RKSC (arXiv 2606.09937).

    Raises:
        OptionError: fewer than one layer.
    """
    if layers < 1:
        raise OptionError(f"layers: must be at least 1, got {layers}")
    return torch.softmax(torch.linspace(0.0, STEEPNESS, layers), dim=0)


def published_similarity(donor: torch.Tensor, branch: torch.Tensor) -> float:
    """The published score: cosine of the last tokens' hidden states in each layer, weighted by layer.

    Source: ASKS of RKSC (arXiv 2606.09937), where a branch shares at 0.82 or more.

    Args:
        donor: hidden states of the donor's last token, ``[layers, hidden]``.
        branch: of the branch's, same shape.

    Returns:
        -1 to 1; minus infinity, which no threshold admits, where a state is not finite or a layer has norm zero.

    Raises:
        OptionError: the shapes differ, or are not ``[layers, hidden]``.
    """
    if donor.ndim != 2 or donor.shape != branch.shape:
        raise OptionError(
            f"hidden states: must be two of [layers, hidden], got {list(donor.shape)} and {list(branch.shape)}"
        )
    first, second = donor.to(torch.float32), branch.to(torch.float32)
    norms = first.norm(dim=1) * second.norm(dim=1)
    if not bool(torch.isfinite(norms).all()) or not bool((norms > 0).all()):
        return INCOMPARABLE
    cosines = (first * second).sum(dim=1) / norms
    score = float((layer_weights(len(cosines)).to(cosines.device) * cosines).sum())
    return max(-1.0, min(1.0, score)) if math.isfinite(score) else INCOMPARABLE


def pooled_similarity(donor: torch.Tensor, branch: torch.Tensor, mean: torch.Tensor) -> float:
    """The same score on states that are averaged over all tokens, less what all prompts have in common.

    Args:
        donor: hidden states averaged over the donor's tokens, ``[layers, hidden]``.
        branch: averaged over the branch's, same shape.
        mean: average of such states over many prompts, same shape.

    Returns:
        As :func:`published_similarity`; a prompt that is exactly the mean is incomparable.

    Raises:
        OptionError: the shapes differ, or are not ``[layers, hidden]``.
    """
    if mean.shape != donor.shape:
        raise OptionError(f"mean: must have the shape of the states, {list(donor.shape)}, got {list(mean.shape)}")
    centre = mean.to(torch.float32)
    return published_similarity(donor.to(torch.float32) - centre, branch.to(torch.float32) - centre)


def auc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Chance that a positive pair scores above a negative one, ties counting half (Mann-Whitney).

    Raises:
        OptionError: a side is empty, or has a score that is not a number.
    """
    if not positives or not negatives:
        raise OptionError(f"auc: needs scores on both sides, got {len(positives)} and {len(negatives)}")
    if any(math.isnan(score) for score in (*positives, *negatives)):
        raise OptionError("auc: scores must be numbers, got nan")
    ordered = sorted(negatives)
    below = sum(bisect_left(ordered, score) + bisect_right(ordered, score) for score in positives)
    return below / (2 * len(positives) * len(ordered))
