"""Whether packed attention is asked for: ``rksc serve --rksc-packed-attention``."""

from __future__ import annotations

import os

PACKED_ATTENTION_VARIABLE = "RKSC_PACKED_ATTENTION"  # the same, from `rksc serve` to SGLang's processes


def is_asked_for() -> bool:
    """Whether this process is one of a server that was started with it."""
    return os.environ.get(PACKED_ATTENTION_VARIABLE) == "1"
