"""RKSC's branch confidence c_b."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rksc_sgl.options import CONFIDENCE


def is_measured(schedulers: Sequence[Mapping[str, Any] | None]) -> bool:
    """Whether a server tells how sure it was of each token, without log-probabilities, to requests that ask for it.

    Args:
        schedulers: what each of them says of itself, as in ``GET /rksc/info``; None of one without our plugin.
    """
    return all((one or {}).get("confidence", {}).get("offered", False) for one in schedulers)


def mean_top1_probability(meta_info: Mapping[str, Any], first: int = 0) -> float | None:
    """Mean over the generated tokens of the most likely token's probability; None without tokens.

    Args:
        meta_info: of an answer whose request asked a server with our plugin for ``confidence``, or any server for
            ``top_logprobs_num``.
        first: leave out this many tokens at the beginning.

    Source: RKSC (arXiv 2606.09937), the confidence of confidence-gated early exit.
    """
    measured = meta_info.get(CONFIDENCE)
    if measured is not None:
        best = [value for value in measured[first:] if value is not None]
    else:
        top_logprobs = meta_info.get("output_top_logprobs") or []  # (logprob, token id, text), most likely first
        best = [math.exp(alternatives[0][0]) for alternatives in top_logprobs[first:] if alternatives]
    return sum(best) / len(best) if best else None
