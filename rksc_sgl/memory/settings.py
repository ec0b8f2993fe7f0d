"""How long a fork is kept, as the command line and the environment say it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

from rksc_sgl.errors import OptionError

LEASE_S = 30.0  # `python -m benchmarks.pressure` says what it gains
PRIVATE_SLOTS_VARIABLE = "RKSC_PRIVATE_SLOTS"  # --rksc-private-slots: blends copy all that they take over
LEASE_FLAG, LEASE_VARIABLE = "--rksc-lease-seconds", "RKSC_LEASE_SECONDS"


def lease_seconds(environment: Mapping[str, str] = os.environ) -> float:
    """Seconds without a request after which a fork is given up; 0 keeps nothing of any.

    Raises:
        OptionError: the environment says no such number.
    """
    text = environment.get(LEASE_VARIABLE)
    if text is None:
        return LEASE_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.0 <= seconds < math.inf:
        raise OptionError(f"{LEASE_VARIABLE} ({LEASE_FLAG}): must be a number of seconds from 0 on, got {text!r}")
    return seconds
