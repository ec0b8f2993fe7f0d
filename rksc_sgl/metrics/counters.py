"""Counters as plain values."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeAlias

from rksc_sgl.errors import MetricError
from rksc_sgl.metrics.catalogue import CATALOGUE, Metric

Number: TypeAlias = int | float
LabelValues: TypeAlias = tuple[str, ...]
Listener: TypeAlias = Callable[[str, Number, Mapping[str, str]], None]

MAX_SERIES = 128  # of one counter; a monitor keeps each combination of label values for ever
OTHER = "other"


class Counters:
    """Counters by name and labels.

    A counter has at most :data:`MAX_SERIES` combinations of label values; what would be one more is counted under
    ``other`` in every label, so that a sum over a counter is always right.

    Args:
        catalogue: the counters that there are.
    """

    def __init__(self, catalogue: Mapping[str, Metric] = CATALOGUE) -> None:
        self.catalogue = catalogue
        self._values: dict[str, dict[LabelValues, Number]] = {name: {} for name in catalogue}
        self._listeners: list[Listener] = []
        self._lock = threading.Lock()

    def add(self, name: str, amount: Number = 1, **labels: str | Number) -> None:
        """Count ``amount`` more.

        Raises:
            MetricError: a name or label that the catalogue does not have, a label left out, a label value that is
                neither text nor a number, or an amount that is not a finite number from 0 on.
        """
        metric = self._metric(name)
        values = _label_values(metric, labels)
        if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 <= amount < math.inf:
            raise MetricError(f"{name}: a counter grows by a finite number from 0 on, got {amount!r}")
        with self._lock:
            series = self._values[name]
            if values not in series and metric.labels and len(series) >= MAX_SERIES - 1:
                values = (OTHER,) * len(metric.labels)
            series[values] = series.get(values, 0) + amount
            for listener in self._listeners:
                listener(name, amount, dict(zip(metric.labels, values, strict=True)))

    def follow(self, listener: Listener) -> None:
        """Call ``listener(name, amount, labels)`` for what was counted so far, one call a series, and from now on."""
        with self._lock:
            for name, series in self._values.items():
                for values, total in series.items():
                    listener(name, total, dict(zip(self.catalogue[name].labels, values, strict=True)))
            self._listeners.append(listener)

    def snapshot(self, catalogue: Mapping[str, Metric] | None = None) -> dict[str, list[dict[str, Any]]]:
        """Series as plain values, ``{name: [{"labels": {...}, "value": 3}]}``: of some counters, or of all.

        A counter without labels is there from the start, with value 0; one with labels has no series until it counts.
        """
        with self._lock:
            chosen = self.catalogue if catalogue is None else catalogue
            return {name: _series(metric, self._values[name]) for name, metric in chosen.items()}

    def _metric(self, name: str) -> Metric:
        try:
            return self.catalogue[name]
        except KeyError:
            raise MetricError(f"{name!r} is no counter; the counters are {', '.join(self.catalogue)}") from None


@cache
def counters() -> Counters:
    """The counters of this process."""
    return Counters()


def _label_values(metric: Metric, labels: Mapping[str, str | Number]) -> LabelValues:
    if set(labels) != set(metric.labels):
        wanted = ", ".join(metric.labels) or "none"
        raise MetricError(f"{metric.name}: takes the labels {wanted}; got {', '.join(labels) or 'none'}")
    return tuple(_text(metric, label, labels[label]) for label in metric.labels)


def _text(metric: Metric, label: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise MetricError(f"{metric.name}: label {label} must be text or a number, got {value!r}")
    return str(value) if isinstance(value, int) else f"{value:g}"


def _series(metric: Metric, values: Mapping[LabelValues, Number]) -> list[dict[str, Any]]:
    known = values if values or metric.labels else {(): 0}
    return [{"labels": dict(zip(metric.labels, key, strict=True)), "value": value} for key, value in known.items()]
