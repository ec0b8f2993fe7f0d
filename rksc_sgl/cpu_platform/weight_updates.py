"""Packed copies of the weights follow SGLang's weight updates."""

from __future__ import annotations

import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)

_PACKED = "rksc_sgl.cpu_platform.packed_linear"


def repack(result: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER hook on the scheduler's weight updates; also after one that failed, which may have written a part."""
    if _PACKED not in sys.modules:  # no layer of this process is packed
        return
    changed = sys.modules[_PACKED].repack(manager.tp_worker.model_runner.model)
    logger.info("%d linear layers were packed anew after a weight update", changed)
