"""The certified exit rule: when a foreseen verdict is certain enough to stop at a layer.

A read-out says margin ``m`` (logit of YES less logit of NO), with an error of standard deviation ``scale``. A call may
leave when

* ``abs(m) >= t * scale``, and
* the read-out looked at before said the same verdict with at least :data:`CONFIRMATION` of that distance, counted in
  its own scale. (To wait until layers agree is the patience of arXiv 2006.04152.)

The rule has one knob, ``t``; bigger is safer. Serving (:mod:`rksc_sgl.early_exit.rules`, on tensors) and calibration
(:mod:`rksc_sgl.calibration.thresholds`, on arrays) both call :func:`may_leave`, so that what is certified is what is
served.
"""

from __future__ import annotations

from typing import Any

CONFIRMATION = 0.75  # of t, at the look before


def may_leave(margin: Any, scale: Any, t: float, before: tuple[Any, Any] | None) -> Any:
    """Which calls may leave at one look, or at several looks at once.

    Args:
        margin: float64 NumPy array or torch tensor: the foreseen margins, in logits. float64, because a threshold
            that is rounded to float32 is another threshold.
        scale: the read-out's error; a number, or an array that broadcasts to ``margin``.
        t: the knob, at least 0.
        before: margins and scale of the look before; None at the first look, which nothing confirms.

    Returns:
        Booleans in the shape of ``margin``, of the same library. A NaN is never certain and confirms nothing.
    """
    if before is None:
        return abs(margin) < 0.0  # nobody
    earlier, earlier_scale = before
    verdict = (margin > 0.0) * 1.0 - (margin < 0.0) * 1.0
    confirmed = verdict * earlier >= CONFIRMATION * t * earlier_scale
    return (abs(margin) >= error_of(scale, t)) & confirmed


def error_of(scale: Any, t: float) -> Any:
    """How far the margin of a call that left may be off, in logits; what the selection must allow for."""
    return t * scale
