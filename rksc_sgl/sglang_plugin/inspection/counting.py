"""Counting in the scheduler: each request that opted in once, when it finishes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rksc_sgl.metrics import REQUESTS, STOPPED_BRANCHES, TOKENS_RECOMPUTED, TOKENS_REPLACED, TOKENS_REUSED, counters

ABORTED = "aborted"
_TOKENS = {
    TOKENS_RECOMPUTED: "recomputed_tokens",
    TOKENS_REPLACED: "replaced_tokens",
}


def counts_here() -> bool:
    """Whether this process counts: of the ranks that compute one batch together, the one that answers for them."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return parallel.pp_rank == parallel.attn_tp_rank == parallel.attn_cp_rank == 0


def about_to_finish(reqs: Iterable[Any], skip_req: Any) -> list[Any]:
    """Of the requests whose output is about to leave the scheduler, those for which it is the last.

    SGLang sets ``finished_output`` when it sends a request's last output, and never sends it again; with the overlap
    schedule a finished request comes by twice.
    """
    return [req for req in reqs if req is not skip_req and req.finished() and not req.finished_output]


def count_request(report: dict[str, Any], *, aborted: bool) -> None:
    """Count one finished request by its report.

    ``reason`` is the report's, where it has one: why no more was shared.
    """
    reason = ABORTED if aborted else report.get("declined") or ""
    counters().add(REQUESTS, op=report["op"], mode=report["mode"], reason=reason)
    if aborted and report["op"] == "branch" and report.get("group") is not None:
        counters().add(STOPPED_BRANCHES)
    counters().add(TOKENS_REUSED, report.get("reused_tokens", 0), kind="exact")
    counters().add(TOKENS_REUSED, report.get("taken_tokens", 0) + report.get("blended_before_tokens", 0), kind="blend")
    counters().add(TOKENS_REUSED, report.get("merged_tokens", 0), kind="merge")
    for name, key in _TOKENS.items():
        counters().add(name, report.get(key, 0))
