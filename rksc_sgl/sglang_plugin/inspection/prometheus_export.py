"""The counters of this process in SGLang's own ``/metrics``.

With ``--enable-metrics`` SGLang's HTTP server shows what every process of the server wrote to files under
``PROMETHEUS_MULTIPROC_DIR``. ``prometheus_client`` looks at that variable when it is first imported, so it is imported
here only when a process of the server asks for the export: SGLang has set the variable by then, and imported it itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from rksc_sgl.errors import MetricError
from rksc_sgl.metrics import OF_HTTP_PROCESSES, OF_SCHEDULERS, Metric, counters
from rksc_sgl.sglang_plugin.inspection.counting import counts_here

logger = logging.getLogger(__name__)

_exports: list[Export] = []


class Export:
    """Prometheus counters that follow ours.

    Args:
        catalogue: the counters.
        base_labels: the labels that SGLang gives to everything of this process.
        counter_class: ``prometheus_client.Counter``, or what SGLang was told to use in its place.

    Raises:
        MetricError: one of our labels is among the base labels (``--extra-metric-labels``).
    """

    def __init__(self, catalogue: Mapping[str, Metric], base_labels: Mapping[str, Any], counter_class: Any) -> None:
        self._base = dict(base_labels)
        self._counters = {}
        for metric in catalogue.values():
            taken = set(metric.labels) & set(self._base)
            if taken:
                raise MetricError(f"{metric.name}: label {', '.join(sorted(taken))} is ours; name yours otherwise")
            labels = (*self._base, *metric.labels)
            self._counters[metric.name] = counter_class(name=metric.name, documentation=metric.help, labelnames=labels)
            if not metric.labels:  # visible from the start
                self._counters[metric.name].labels(**self._base)

    def add(self, name: str, amount: int | float, labels: Mapping[str, str]) -> None:
        """A listener for :meth:`rksc_sgl.metrics.Counters.follow`."""
        if name in self._counters:
            self._counters[name].labels(**self._base, **labels).inc(amount)


def export_from(scheduler: Any) -> None:
    """Export this scheduler's counters, where the server was asked for metrics; once a process."""
    if scheduler.metrics_collector is not None and counts_here():
        _export(OF_SCHEDULERS, scheduler.metrics_collector)


def export_from_http(tokenizer_manager: Any) -> None:
    """Export the counters of a process that answers HTTP, where the server was asked for metrics; once a process."""
    if tokenizer_manager.enable_metrics:
        _export(OF_HTTP_PROCESSES, tokenizer_manager.metrics_collector)


def _export(catalogue: Mapping[str, Metric], collector: Any) -> None:
    if _exports:
        return
    from prometheus_client import Counter

    export = Export(catalogue, collector.labels, getattr(type(collector), "_counter_cls", None) or Counter)
    _exports.append(export)
    counters().follow(export.add)
    logger.info("rksc: %d counters of this process are in /metrics", len(catalogue))
