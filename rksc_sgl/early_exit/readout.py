"""A linear read-out: what the full-depth verdict will be, said from the hidden state of an earlier layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rksc_sgl.errors import OptionError


@dataclass(frozen=True, eq=False)
class LinearReadout:
    """``margin = hidden @ weight + bias``.

    Attributes:
        weight: ``[hidden]`` float32, to be applied to the hidden state as it is (standardisation is folded in).
        bias: in logits.
        scale: standard deviation of the prediction's error in logits, leave-one-out on the traces of the fit.
            (The plain residual tends to 0 where there are fewer traces than hidden units.)
    """

    weight: npt.NDArray[np.float32]
    bias: float
    scale: float

    def __post_init__(self) -> None:
        if self.weight.ndim != 1 or self.weight.dtype != np.float32:
            raise OptionError(f"weight: must be float32 of one dimension, got {self.weight.dtype} {self.weight.shape}")
        if not (np.isfinite(self.weight).all() and np.isfinite(self.bias)):
            raise OptionError("weight and bias: must be finite")
        if not (np.isfinite(self.scale) and self.scale >= 0.0):
            raise OptionError(f"scale: must be finite and at least 0, got {self.scale!r}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LinearReadout):
            return NotImplemented
        same = self.bias == other.bias and self.scale == other.scale
        return same and np.array_equal(self.weight, other.weight)

    def predict(self, hidden: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Margins ``[n]`` for hidden states ``[n, hidden]``; computed in float32, as in serving."""
        return np.asarray(hidden, dtype=np.float32) @ self.weight + np.float32(self.bias)
