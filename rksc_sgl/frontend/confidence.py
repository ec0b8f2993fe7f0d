"""RKSC's branch confidence c_b."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_top1_probability(top_logprobs: Sequence[Sequence[Sequence[float]] | None]) -> float | None:
    """Mean over the generated tokens of the most likely token's probability; None without tokens.

    Args:
        top_logprobs: for each token the alternatives as ``(logprob, token_id, text)``, most likely first, as
            SGLang returns them in ``output_top_logprobs``.

    Source: RKSC (arXiv 2606.09937), the confidence of confidence-gated early exit.
    """
    best = [math.exp(alternatives[0][0]) for alternatives in top_logprobs if alternatives]
    return sum(best) / len(best) if best else None
