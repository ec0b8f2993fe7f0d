"""Every counter that there is: its name, its labels, and what it says. Counters only ever grow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

REQUESTS = "sglang:rksc_requests_total"
TOKENS_REUSED = "sglang:rksc_tokens_reused_total"
TOKENS_RECOMPUTED = "sglang:rksc_tokens_recomputed_total"
TOKENS_REPLACED = "sglang:rksc_tokens_replaced_total"
PROBE_SECONDS = "sglang:rksc_probe_seconds_total"
STOPPED_BRANCHES = "sglang:rksc_stopped_branches_total"
FORKS = "sglang:rksc_forks_total"
STOPPED_FORK_BRANCHES = "sglang:rksc_stopped_fork_branches_total"
STOPPED_FORK_TOKENS = "sglang:rksc_stopped_fork_tokens_total"
EXITS = "sglang:rksc_exits_total"
EXIT_LAYERS_SAVED = "sglang:rksc_exit_layers_saved_total"
EXIT_AUDITS = "sglang:rksc_exit_audit_total"
EXIT_DISAGREEMENTS = "sglang:rksc_exit_audit_disagree_total"

LEASES = "sglang:rksc_leases_total"
LEASES_ENDED = "sglang:rksc_leases_ended_total"
TOKENS_TWICE = "sglang:rksc_tokens_computed_twice_total"


@dataclass(frozen=True)
class Metric:
    """One counter.

    Attributes:
        name: as Prometheus shows it, with SGLang's own prefix.
        help: what is counted, and in which unit.
        labels: names of the labels that every increment must give.
    """

    name: str
    help: str
    labels: tuple[str, ...] = ()


_ALL = (
    Metric(
        REQUESTS,
        "Finished requests that opted in: what they were for, how their prefix came to be, and why no more was shared",
        ("op", "mode", "reason"),
    ),
    Metric(
        TOKENS_REUSED,
        "Prompt tokens of requests that opted in, served from KV that was there already: exact, approximate (blend), "
        "or of the prompt that replaced theirs (merge)",
        ("kind",),
    ),
    Metric(TOKENS_RECOMPUTED, "Prompt tokens that had KV of a donor and were computed again"),
    Metric(TOKENS_REPLACED, "Prompt tokens that were replaced by those of the prompt they were merged with"),
    Metric(
        STOPPED_BRANCHES,
        "Requests of branches of a named fork that were aborted: the answer was decided without them, or their client "
        "went away. Branches that a client never started are not known here",
    ),
    Metric(LEASES, "Leases on KV of forks: what their branches have in common, and branches that are to be verified"),
    Metric(
        LEASES_ENDED,
        "Leases that ended: reused, ended (the fork was), gone (its client was), expired, broken (for want of room), "
        "flushed",
        ("reason",),
    ),
    Metric(TOKENS_TWICE, "Tokens of forks that were computed before, and again because they were evicted", ("op",)),
    Metric(
        PROBE_SECONDS,
        "Seconds in the layers that run for every token of a batch with blends or merges, copies of KV included",
    ),
    Metric(EXITS, "Verifications that left before the last layer", ("rule",)),
    Metric(EXIT_LAYERS_SAVED, "Layers that verifications which left early did not run"),
    Metric(EXIT_AUDITS, "Exits that were run to full depth and compared, by certified risk", ("risk",)),
    Metric(EXIT_DISAGREEMENTS, "Audited exits whose verdict differs from full depth, by certified risk", ("risk",)),
)

_FORKS = (
    Metric(FORKS, "Forks of one request that ended, by what ended them", ("end",)),
    Metric(
        STOPPED_FORK_BRANCHES,
        "Branches of forks of one request that were stopped while they ran, or never started (fate), by what ended "
        "their fork",
        ("fate", "end"),
    ),
    Metric(
        STOPPED_FORK_TOKENS,
        "Tokens that these branches were spared, estimated by the mean length of their fork's branches that finished",
        ("end",),
    ),
)

OF_SCHEDULERS: Mapping[str, Metric] = MappingProxyType({metric.name: metric for metric in _ALL})
"""What the schedulers count, each its own requests."""

OF_HTTP_PROCESSES: Mapping[str, Metric] = MappingProxyType({metric.name: metric for metric in _FORKS})
"""What the processes count that answer HTTP, each its own forks."""

CATALOGUE: Mapping[str, Metric] = MappingProxyType({**OF_SCHEDULERS, **OF_HTTP_PROCESSES})
