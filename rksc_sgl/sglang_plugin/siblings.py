"""In the scheduler: siblings wait for their anchor, and each branch gets the namespace and the donor that serve it.

A fork's first branch to arrive is its anchor and is prefilled as SGLang would. A sibling that would gain from the
anchor's KV stays in the waiting queue while the anchor is being prefilled, and goes on as soon as that KV is in the
tree, or as soon as the anchor is not in the scheduler any more (aborted, refused). SGLang has a rule of its own for
requests with a common prefix that wait together (in-batch prefix caching), which delays no request whose prefix is
partly cached and knows nothing of tokens that are equal at other places.

KV that was blended is approximate and lives under an ``extra_key`` of its own: a request that did not opt in, or that
asked for ``share="exact"``, has another key and cannot meet it.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rksc_sgl.blending.rotation import refusal_of
from rksc_sgl.options import RequestOptions
from rksc_sgl.radix.forks import Donor, Fork, ForkKey, ForkTable, worth_blending
from rksc_sgl.sglang_plugin.layer_pass import probe_layers
from rksc_sgl.sglang_plugin.opted import options_of_request
from rksc_sgl.similarity.alignment import align

logger = logging.getLogger(__name__)

BLENDED = "\x1frksc-blended"  # ends the extra_key of blended KV; no printable key ends so


@dataclass(eq=False)
class BlendPlan:
    """What a branch may take over, decided when it was scheduled.

    Attributes:
        donor: whose KV.
        extra_key: the donor's namespace in the tree.
        source: int64 ``[n]``, the donor position of each token of the branch, -1 where there is none.
        options: of the request.
    """

    donor: Donor
    extra_key: str | None
    source: NDArray[np.int64]
    options: RequestOptions


class Siblings:
    """Placement of the branches that wait in one scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.table: ForkTable[Any] = ForkTable()
        runner = scheduler.tp_worker.model_runner
        self.refusal = refusal_of(runner.model) or refusal_of_pool(runner.token_to_kv_pool)
        self.probe_share = probe_layers(runner) / runner.model_config.num_hidden_layers

    def place(self) -> set[str]:
        """Decide for every waiting request that was not decided on yet; the ids of those that go on waiting."""
        held: set[str] = set()
        live: set[int] | None = None
        for req in self.scheduler.waiting_queue:
            if getattr(req, "rksc_placed", False):
                continue
            options = options_of_request(req)
            if options is None or options.share == "exact":
                req.rksc_placed = True
                continue
            live = live if live is not None else self._live()
            if self._waits(req, options, live):
                held.add(req.rid)
                req.rksc_waited = getattr(req, "rksc_waited", 0) + 1
            else:
                req.rksc_placed = True
        return held

    def _waits(self, req: Any, options: RequestOptions, live: set[int]) -> bool:
        """Place a request; or True where it waits for its anchor."""
        ids, approximate = np.asarray(req.origin_input_ids, dtype=np.int64), options.share == "blend"
        exact = self._cached(req.origin_input_ids, req.extra_key, req)
        blended = self._cached(req.origin_input_ids, blended_key(req.extra_key), req) if approximate else 0
        if options.group is None or options.op != "branch":
            _use_blended(req, blended > exact)
            return False
        key = ForkKey(options.group, req.extra_key, req.cache_salt, req.lora_id)
        fork = self.table.fork(key)
        gone = self._settle_anchor(key, fork, live)
        if fork.anchor is not None:
            if worth_blending(ids.size, max(exact, blended), _gain(req, fork.anchor, ids, options), 0.0):
                return True
            _use_blended(req, blended > exact)
        elif fork.donors:
            if approximate:  # others find in the tree what is equal from the start
                self._place_beside(req, options, key, fork, ids, exact, blended)
        else:
            fork.anchor = req
            if gone:
                _decline(req, "the anchor that it could have shared with is gone")
        return False

    def _settle_anchor(self, key: ForkKey, fork: Fork[Any], live: set[int]) -> bool:
        """The anchor becomes a donor once its prompt is in the tree, and is forgotten once it is in no queue.

        Returns:
            Whether it was forgotten.
        """
        anchor = fork.anchor
        if anchor is None:
            return False
        ids = anchor.origin_input_ids
        if self._cached(ids, key.extra_key, anchor) >= len(ids) - self.scheduler.tree_cache.page_size:
            self.table.add_donor(key, Donor(anchor.rid, np.asarray(ids, dtype=np.int64)))
            fork.anchor = None
        elif id(anchor) not in live or len(anchor.output_ids) > 1:  # aborted; or decoding, and still not in the tree
            logger.info("rksc: the KV of anchor %s of fork %s is gone; its siblings go on", anchor.rid, key.group)
            fork.anchor = None
            return True
        return False

    def _place_beside(
        self,
        req: Any,
        options: RequestOptions,
        key: ForkKey,
        fork: Fork[Any],
        ids: NDArray[np.int64],
        exact: int,
        blended: int,
    ) -> None:
        """Give a branch the donor with which it computes least, or none."""
        for donor in list(fork.donors):
            if self._cached(donor.tokens, key.extra_key, req) < min(donor.tokens.size - 1, options.minimum_span):
                self.table.drop_donor(key, donor)
        if not fork.donors:
            fork.anchor = req
            return _decline(req, "the KV of its donors is gone")
        found = [(align(donor.tokens, ids, options.minimum_span), donor) for donor in fork.donors]
        alignment, donor = max(found, key=lambda one: one[0].aligned)
        report = {"donor": donor.name, "aligned_tokens": alignment.aligned}
        if self.refusal:
            return _decline(req, self.refusal, **report)
        if not worth_blending(ids.size, exact, alignment.aligned, self.probe_share) and blended <= exact:
            return _decline(req, "too few tokens align for what is cached", **report)
        _use_blended(req, True)
        req.rksc_blend = BlendPlan(donor, key.extra_key, alignment.source, options)
        req.rksc_report = report
        logger.debug("rksc: %s takes %d of %d tokens from %s", req.rid, alignment.aligned, ids.size, donor.name)

    def _cached(self, ids: Any, extra_key: str | None, req: Any) -> int:
        """How many tokens of a prompt the tree has under a key."""
        return len(resident_slots(self.scheduler.tree_cache, ids, extra_key, req.cache_salt))

    def _live(self) -> set[int]:
        """Requests that are queued, being prefilled or running."""
        scheduler = self.scheduler
        requests: list[Any] = [*scheduler.waiting_queue, scheduler.chunked_req]
        for name in ("running_batch", "last_batch", "cur_batch"):
            batch = getattr(scheduler, name, None)
            requests += batch.reqs if batch is not None else []
        return {id(req) for req in requests if req is not None and not req.finished()}


def hold_siblings(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook: a prefill batch is made of what does not wait for an anchor."""
    queue = scheduler.waiting_queue
    if not queue or not _has_tree(scheduler.tree_cache):
        return original(scheduler, *args, **kwargs)
    held = siblings_of(scheduler).place()
    if not held:
        return original(scheduler, *args, **kwargs)
    scheduler.waiting_queue = [req for req in queue if req.rid not in held]
    try:
        return original(scheduler, *args, **kwargs)
    finally:
        left = scheduler.waiting_queue
        staying = {id(req) for req in left} | {id(req) for req in queue if req.rid in held}
        known = {id(req) for req in queue}
        scheduler.waiting_queue = [
            *(req for req in queue if id(req) in staying),
            *(req for req in left if id(req) not in known),
        ]


def _has_tree(tree_cache: Any) -> bool:
    """Whether this is the unified radix tree and in use (not ``--disable-radix-cache``)."""
    return hasattr(tree_cache, "tree_core") and not tree_cache.disable


def refusal_of_pool(pool: Any) -> str:
    """Why KV cannot be copied within a pool; empty if it can.

    A pool with a part of its own for sliding windows has other slots there; a quantized one hands out copies.
    """
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    from rksc_sgl.cpu_platform.kv_pool import LazyMHATokenToKVPool

    if type(pool) not in (MHATokenToKVPool, LazyMHATokenToKVPool):
        return f"KV in a {type(pool).__name__} cannot be copied token by token"
    return f"quantized KV ({pool.dtype}) cannot be turned" if pool.store_dtype != pool.dtype else ""


def siblings_of(scheduler: Any) -> Siblings:
    """The placement of a scheduler, made when it is first asked for."""
    found = getattr(scheduler, "rksc_siblings", None)
    if found is None:
        found = scheduler.rksc_siblings = Siblings(scheduler)
    return found


def blended_key(extra_key: str | None) -> str:
    """The namespace of blended KV beside that of exact KV."""
    return (extra_key or "") + BLENDED


def resident_slots(tree_cache: Any, ids: Any, extra_key: str | None, cache_salt: str | None) -> torch.Tensor:
    """Slots of the longest prefix of a prompt that the tree has on the device."""
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    tokens = ids if isinstance(ids, array) else array("q", ids.tolist() if hasattr(ids, "tolist") else ids)
    key = RadixKey(token_ids=tokens, extra_key=extra_key, cache_salt=cache_salt)
    found = tree_cache.match_prefix(MatchPrefixParams(key=key))
    if not found.device_prefix_len:
        return torch.empty(0, dtype=torch.int64)
    root = tree_cache.root_node_handle(extra_key)
    return tree_cache.tree_core.collect_full_device_indices(found.last_device_node, root)[: found.device_prefix_len]


def _use_blended(req: Any, blended: bool) -> None:
    if blended:
        req.extra_key = blended_key(req.extra_key)
        req.rksc_blended = True


def _decline(req: Any, reason: str, **report: Any) -> None:
    req.rksc_report = {**report, "declined": reason}


def _gain(req: Any, anchor: Any, ids: NDArray[np.int64], options: RequestOptions) -> int:
    """How many tokens a branch could have from its anchor; found once, for it is asked in every step of the wait."""
    known = getattr(req, "rksc_gain", None)
    if known is not None and known[0] is anchor:
        return known[1]
    other = np.asarray(anchor.origin_input_ids, dtype=np.int64)
    gain = _common(other, ids)
    if options.share == "blend":
        gain = max(gain, align(other, ids, options.minimum_span).aligned)
    req.rksc_gain = (anchor, gain)
    return gain


def _common(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    size = min(first.size, second.size)
    differ = np.flatnonzero(first[:size] != second[:size])
    return int(differ[0]) if differ.size else size


def is_reserved(extra_key: str | Iterable[str] | None) -> bool:
    """Whether a client's ``extra_key`` is one that only we may use."""
    keys = [extra_key] if isinstance(extra_key, str) else list(extra_key or ())
    return any(isinstance(key, str) and key.endswith(BLENDED) for key in keys)
