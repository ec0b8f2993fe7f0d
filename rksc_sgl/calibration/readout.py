"""Fitting linear read-outs.

A ridge regression from the last position's hidden state to the full-depth margin (logit of YES less logit of NO).
The penalty is chosen by generalised cross-validation (Golub, Heath, Wahba 1979), so that nothing is held out and
fewer traces than hidden units do no harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from rksc_sgl.early_exit.readout import LinearReadout
from rksc_sgl.errors import OptionError

Array: TypeAlias = npt.NDArray[np.float64]

MIN_TRACES = 8
# Penalties as shares of the total variance n * hidden: from next to none, to one that leaves only the mean.
PENALTIES = tuple(float(value) for value in np.logspace(-8, 2, 61))


@dataclass(frozen=True)
class _Principal:
    """The standardised features in their principal directions: ``features = scores @ directions.T``."""

    scores: Array  # [n, rank]
    directions: Array  # [hidden, rank]
    variances: Array  # [rank] squared singular values, all above 0


def fit_readout(hidden: npt.ArrayLike, margin: npt.ArrayLike) -> LinearReadout:
    """Fit one layer.

    Args:
        hidden: ``[n, hidden]`` of the last position, normed or not, as serving will see it.
        margin: ``[n]`` full-depth margins in logits.

    Raises:
        OptionError: a shape does not fit, there are fewer than 8 traces, or a number is not finite.
    """
    features, target = _checked(hidden, margin)
    mean, spread = features.mean(axis=0), features.std(axis=0)
    constant = spread <= 1e-7 * np.abs(mean)  # float32 noise on a unit that says nothing
    inverse = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, spread))
    principal = _principal((features - mean) * inverse)
    centred = target - target.mean()
    penalty = _best_penalty(principal, centred, features.size)
    coefficients = (principal.scores.T @ centred) / (principal.variances + penalty)
    weight = ((principal.directions @ coefficients) * inverse).astype(np.float32)
    bias = float(target.mean() - weight.astype(np.float64) @ mean)
    return LinearReadout(weight, bias, _leave_one_out_deviation(principal, centred, penalty))


def fit_readouts(hidden: npt.ArrayLike, margin: npt.ArrayLike, layers: Sequence[int]) -> dict[int, LinearReadout]:
    """Fit every candidate layer.

    Args:
        hidden: ``[n, layers, hidden]``.
        margin: ``[n]`` full-depth margins in logits.
        layers: the names of the second dimension: how many layers had run.

    Raises:
        OptionError: as :func:`fit_readout`.
    """
    states = np.asarray(hidden)
    if states.ndim != 3 or states.shape[1] != len(layers):
        raise OptionError(f"hidden: must be [n, {len(layers)} layers, hidden], got {states.shape}")
    return {layer: fit_readout(states[:, index], margin) for index, layer in enumerate(layers)}


def r2(predicted: npt.ArrayLike, margin: npt.ArrayLike) -> float:
    """Share of the margins' variance that is predicted: 1 is all; 0 is no better than their mean; can be negative.

    Raises:
        OptionError: the shapes differ, or the margins do not vary.
    """
    said, true = np.asarray(predicted, dtype=np.float64), np.asarray(margin, dtype=np.float64)
    if said.shape != true.shape or true.ndim != 1:
        raise OptionError(f"predicted and margin: must be [n] both, got {said.shape} and {true.shape}")
    total = float(((true - true.mean()) ** 2).sum()) if true.size else 0.0
    if total == 0.0:
        raise OptionError("margin: must not be the same for all, or there is nothing to explain")
    return 1.0 - float(((true - said) ** 2).sum()) / total


def _checked(hidden: npt.ArrayLike, margin: npt.ArrayLike) -> tuple[Array, Array]:
    features, target = np.asarray(hidden, dtype=np.float64), np.asarray(margin, dtype=np.float64)
    if features.ndim != 2 or features.shape[1] == 0:
        raise OptionError(f"hidden: must be [n, hidden], got {features.shape}")
    if target.shape != features.shape[:1]:
        raise OptionError(f"margin: must be [{features.shape[0]}] as hidden has it, got {target.shape}")
    if target.size < MIN_TRACES:
        raise OptionError(f"margin: must have at least {MIN_TRACES} traces to fit on, got {target.size}")
    for name, values in (("hidden", features), ("margin", target)):
        if not np.isfinite(values).all():
            raise OptionError(f"{name}: must be finite, got {np.count_nonzero(~np.isfinite(values))} NaN or infinite")
    return features, target


def _principal(features: Array) -> _Principal:
    """By the smaller of the two Gram matrices, so that the cost is that of min(n, hidden) cubed."""
    n, hidden = features.shape
    wide = n <= hidden
    variances, vectors = np.linalg.eigh(features @ features.T if wide else features.T @ features)
    kept = variances > max(variances[-1], 0.0) * 1e-12
    variances, vectors = variances[kept], vectors[:, kept]
    if wide:
        root = np.sqrt(variances)
        return _Principal(vectors * root, features.T @ vectors / root, variances)
    return _Principal(features @ vectors, vectors, variances)


def _best_penalty(principal: _Principal, centred: Array, size: int) -> float:
    """Of equal scores the larger penalty."""
    penalties = [share * size for share in reversed(PENALTIES)]
    return min(penalties, key=lambda penalty: _gcv(principal, centred, penalty))


def _gcv(principal: _Principal, centred: Array, penalty: float) -> float:
    """Golub, Heath, Wahba 1979, with one degree of freedom for the mean."""
    shrunk = principal.variances / (principal.variances + penalty)
    freedom = centred.size - 1.0 - float(shrunk.sum())
    residual = _residual(principal, centred, penalty)
    return float(residual @ residual) / max(freedom, 1e-9) ** 2


def _residual(principal: _Principal, centred: Array, penalty: float) -> Array:
    return centred - principal.scores @ ((principal.scores.T @ centred) / (principal.variances + penalty))


def _leave_one_out_deviation(principal: _Principal, centred: Array, penalty: float) -> float:
    """What each trace's error would be had it not been in the fit, from the diagonal of the hat matrix."""
    leverage = (principal.scores**2 / (principal.variances + penalty)).sum(axis=1) + 1.0 / centred.size
    errors = _residual(principal, centred, penalty) / np.maximum(1.0 - leverage, 1e-9)
    return float(np.sqrt((errors**2).mean()))
