"""What a server counts of our work: plain values by name and labels, in the process where it happens.

``counters().add(EXITS, rule="certified")`` is all that the place of the event does. Whoever exports the values reads
:meth:`Counters.snapshot` or follows along with :meth:`Counters.follow`; nothing here knows of Prometheus or SGLang.
"""

from rksc_sgl.metrics.catalogue import (
    CATALOGUE,
    EXIT_AUDITS,
    EXIT_DISAGREEMENTS,
    EXIT_LAYERS_SAVED,
    EXITS,
    FORKS,
    LEASES,
    LEASES_ENDED,
    OF_HTTP_PROCESSES,
    OF_SCHEDULERS,
    PROBE_SECONDS,
    REQUESTS,
    STOPPED_BRANCHES,
    STOPPED_FORK_BRANCHES,
    STOPPED_FORK_TOKENS,
    TOKENS_RECOMPUTED,
    TOKENS_REPLACED,
    TOKENS_REUSED,
    TOKENS_TWICE,
    Metric,
)
from rksc_sgl.metrics.counters import Counters, counters

__all__ = [
    "CATALOGUE",
    "EXITS",
    "EXIT_AUDITS",
    "EXIT_DISAGREEMENTS",
    "EXIT_LAYERS_SAVED",
    "FORKS",
    "LEASES",
    "LEASES_ENDED",
    "OF_HTTP_PROCESSES",
    "OF_SCHEDULERS",
    "PROBE_SECONDS",
    "REQUESTS",
    "STOPPED_BRANCHES",
    "STOPPED_FORK_BRANCHES",
    "STOPPED_FORK_TOKENS",
    "TOKENS_RECOMPUTED",
    "TOKENS_REPLACED",
    "TOKENS_REUSED",
    "TOKENS_TWICE",
    "Counters",
    "Metric",
    "counters",
]
