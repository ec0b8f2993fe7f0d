"""What the HTTP process can ask the scheduler beyond SGLang's internal state, and the answers.

A question travels in the ``rid`` of SGLang's own ``GetInternalStateReq``, which nothing else uses, and its answer in
the internal state, so that it takes SGLang's way to every data-parallel scheduler and back.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from rksc_sgl.errors import TreeListingError
from rksc_sgl.metrics import OF_SCHEDULERS, counters
from rksc_sgl.sglang_plugin.inspection import donor_listing, tree_listing
from rksc_sgl.sglang_plugin.memory import slots
from rksc_sgl.sglang_plugin.memory.keeper import described, known_keeper_of
from rksc_sgl.tree_view import Prompt, RecentPrompts, largest

DEFAULT_NODES, MAX_NODES = 500, 10_000
FIRST_IDS = 16
ANSWER = "rksc_answer"  # its key in the internal state
_PREFIX = "rksc:"


@dataclass(frozen=True)
class Inquiry:
    """A question to the scheduler.

    Attributes:
        about: "stats" or "tree".
        nodes: with "stats", whether to count the tree's nodes; with "tree", how many to show at most.
        depth: with "tree", steps from the root that are shown; None shows all.
    """

    about: str
    nodes: int = DEFAULT_NODES
    depth: int | None = None

    def to_rid(self) -> str:
        return _PREFIX + json.dumps(asdict(self))

    @classmethod
    def from_rid(cls, rid: str | None) -> Inquiry | None:
        """The question in a request's ``rid``, or None where there is none of ours."""
        return cls(**json.loads(rid[len(_PREFIX) :])) if rid is not None and rid.startswith(_PREFIX) else None


@cache
def recent_prompts() -> RecentPrompts:
    """The prompts that this scheduler served last."""
    return RecentPrompts()


def remember_prompt(req: Any) -> None:
    """A request has finished: what it put into the tree. Its ids are kept as they are, not copied."""
    recent_prompts().add(Prompt((req.origin_input_ids, req.output_ids), req.extra_key, req.cache_salt))


def answer(inquiry: Inquiry, scheduler: Any) -> dict[str, Any]:
    """The answer as plain values, with ``dp_rank``; ``problem`` says why a tree cannot be listed."""
    from sglang.srt.runtime_context import get_parallel

    about = {"stats": _stats, "tree": _tree}[inquiry.about]
    return {"dp_rank": get_parallel().dp_rank or 0, **about(inquiry, scheduler), **donor_listing.state(scheduler)}


def _stats(inquiry: Inquiry, scheduler: Any) -> dict[str, Any]:
    pool = asdict(scheduler.pool_stats_observer.get_pool_stats())
    return {
        "counters": counters().snapshot(OF_SCHEDULERS),
        "memory": described(scheduler),
        "slots": slots.described(scheduler),
        "tree": _tree_totals(scheduler.tree_cache, bool(inquiry.nodes)),
        "pool": {key: value for key, value in pool.items() if value is not None},
        "requests": {"running": len(_running(scheduler)), "waiting": len(scheduler.waiting_queue)},
    }


def _running(scheduler: Any) -> set[int]:
    """Requests that have not ended; those whose prompt was just computed are in ``last_batch`` only."""
    batches = [batch for batch in (scheduler.running_batch, scheduler.last_batch) if batch is not None]
    return {id(req) for batch in batches for req in batch.reqs if not req.finished()}


def _tree_totals(tree_cache: Any, with_nodes: bool) -> dict[str, Any]:
    evictable, protected = tree_cache.evictable_size(), tree_cache.protected_size()
    totals = {
        "kind": type(tree_cache).__name__,
        "cached_tokens": evictable + protected,
        "evictable_tokens": evictable,
        "protected_tokens": protected,
        "nodes": None,
        "problem": None,
    }
    if with_nodes:
        try:
            totals["nodes"] = len(tree_listing.nodes_of(tree_cache))
        except TreeListingError as error:
            totals["problem"] = str(error)
    return totals


def _tree(inquiry: Inquiry, scheduler: Any) -> dict[str, Any]:
    tree_cache = scheduler.tree_cache
    kind = type(tree_cache).__name__
    try:
        listing = largest(tree_listing.nodes_of(tree_cache), inquiry.nodes, inquiry.depth)
    except TreeListingError as error:
        return {"kind": kind, "problem": str(error), "tree": None}
    ids = tree_listing.first_ids(
        tree_cache, _prompts(scheduler), {node.id for node in listing.nodes if node.parent is not None}, FIRST_IDS
    )
    keeper = known_keeper_of(scheduler)
    leased = {} if keeper is None else keeper.ends_of_leases()
    nodes = []
    for node in listing.nodes:
        namespace, salt = tree_listing.namespace_of(tree_cache, node.id)
        known = replace(node, namespace=namespace, salted=salt is not None, first_ids=ids.get(node.id))
        nodes.append(replace(known, leases=tuple(leased.get(node.id, ()))))
    return {"kind": kind, "problem": None, "tree": replace(listing, nodes=tuple(nodes)).to_plain()}


def _prompts(scheduler: Any) -> list[Prompt]:
    """Those of running requests first: their nodes are in use."""
    running = [req for req in (*scheduler.running_batch.reqs, scheduler.chunked_req) if req is not None]
    return [
        *(Prompt((req.origin_input_ids, req.output_ids), req.extra_key, req.cache_salt) for req in running),
        *recent_prompts(),
    ]
