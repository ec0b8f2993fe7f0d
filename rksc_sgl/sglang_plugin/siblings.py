"""In the scheduler: siblings wait for their anchor, and each branch gets the namespace and the donor that serve it.

A fork's first branch to arrive is its anchor and is prefilled as SGLang would. A sibling that would gain from the
anchor's KV stays in the waiting queue while the anchor is being prefilled, and goes on as soon as that KV is in the
tree, or as soon as the anchor is not in the scheduler any more (aborted, refused). SGLang has a rule of its own for
requests with a common prefix that wait together (in-batch prefix caching), which delays no request whose prefix is
partly cached and knows nothing of tokens that are equal at other places.

KV that was blended is approximate and lives under an ``extra_key`` of its own: a request that did not opt in, or that
asked for ``share="exact"``, has another key and cannot meet it. A merged branch has its donor's token ids in place of
its own, so that its KV is that of its ids like any other's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rksc_sgl.blending.plan import always_computed
from rksc_sgl.blending.rotation import refusal_of
from rksc_sgl.options import RequestOptions
from rksc_sgl.radix.forks import (
    AUTO_LEAST,
    LEAST_TOKENS,
    Donor,
    Fork,
    ForkKey,
    ForkTable,
    Namespace,
    worth_blending,
)
from rksc_sgl.radix.residents import ResidentPrompts
from rksc_sgl.sglang_plugin.common_values import common_values
from rksc_sgl.sglang_plugin.layer_pass import probe_layers, refusal_of_model
from rksc_sgl.sglang_plugin.opted import decline, options_of_request
from rksc_sgl.sglang_plugin.replacing import refusal_of_replacing, refusal_of_texts, replace_prompt
from rksc_sgl.sglang_plugin.resident import blended_key, has_tree, is_reserved, refusal_of_pool, resident_slots
from rksc_sgl.similarity.alignment import Alignment, align
from rksc_sgl.similarity.content_guard import GuardVerdict, same_content
from rksc_sgl.similarity.number_tokens import number_tokens

logger = logging.getLogger(__name__)

DONORS_GONE = "the KV of its donors is gone"
TOO_FEW = "too few tokens are left to compute"
TOO_FEW_ALIGN = "too few tokens align for what is cached"
TOO_FEW_FOR_AUTO = f"share auto blends from {AUTO_LEAST} tokens on"
NOT_PROBED = "its batch could not be probed"


@dataclass(eq=False)
class BlendPlan:
    """What a branch may take over, decided when it was scheduled.

    Attributes:
        donor: whose KV.
        extra_key: the donor's namespace in the tree.
        source: int64 ``[n]``, the donor position of each token of the branch, -1 where there is none.
        always: bool ``[n]``, tokens that are computed also where the donor has them: after breaks, and around numbers.
        options: of the request.
    """

    donor: Donor
    extra_key: str | None
    source: NDArray[np.int64]
    always: NDArray[np.bool_]
    options: RequestOptions


@dataclass(frozen=True, eq=False)
class MergePlan:
    """Whose prompt a branch may take in place of its own: the content guard agreed, the similarity is to be measured.

    Attributes:
        donor: the prompt that asks the same.
        extra_key: the donor's namespace in the tree.
        key: the fork in which the merge is remembered; None for a request without a group.
        tau: the least similarity.
        common: ``[probe layers, heads * size]`` what the values of all prompts have in common.
    """

    donor: Donor
    extra_key: str | None
    key: ForkKey | None
    tau: float
    common: torch.Tensor


@dataclass(frozen=True, eq=False)
class Branch:
    """A request that is being placed.

    Attributes:
        req: SGLang's request.
        options: its options.
        ids: int64 ``[n]`` its prompt.
        exact, blended: how many of its tokens the tree has under its own key, and under that of blended KV.
    """

    req: Any
    options: RequestOptions
    ids: NDArray[np.int64]
    exact: int
    blended: int

    @property
    def little_left(self) -> bool:
        """Whether so few tokens are left to compute that neither a blend nor the second step of a merge pays."""
        return self.ids.size - max(self.exact, self.blended) < LEAST_TOKENS

    @property
    def least_taken(self) -> int:
        """Tokens below which it is not blended, though that would compute less."""
        return AUTO_LEAST if self.options.share == "auto" else 0

    @property
    def key(self) -> ForkKey | None:
        """Its fork; None without a group."""
        group = self.options.group
        return None if group is None else ForkKey(group, *namespace_of(self.req))

    def use_blended(self, blended: bool) -> None:
        """Take the namespace of blended KV where that is better."""
        if blended:
            self.req.extra_key = blended_key(self.req.extra_key)
            self.req.rksc_blended = True


class Siblings:
    """Placement of the branches that wait in one scheduler.

    Attributes:
        table: the forks, their donors and their aliases.
        residents: prompts of all namespaces; None until a request asks for ``share_scope="cache"``.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.table: ForkTable[Any] = ForkTable()
        self.residents: ResidentPrompts | None = None
        runner = scheduler.tp_worker.model_runner
        pool_refusal = refusal_of_pool(runner.token_to_kv_pool)
        self.blend_refusal = refusal_of(runner.model) or pool_refusal or refusal_of_texts(scheduler)
        self.merge_refusal = pool_refusal or refusal_of_model(runner.model) or refusal_of_replacing(scheduler)
        self.probe_share = probe_layers(runner) / runner.model_config.num_hidden_layers
        self._common: torch.Tensor | None = None
        self._numbers: NDArray[np.bool_] | None = None

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

    def index(self, reqs: Iterable[Any]) -> None:
        """Remember prompts that were just computed, for requests that may share with the whole cache.

        Those of every request, whether it opted in or not: the tree has their KV for everybody of their namespace.
        """
        if self.residents is None:
            return
        for req in reqs:
            if not len(req.output_ids) or getattr(req, "rksc_indexed", False):
                continue  # its prefill is not complete; or it was seen
            req.rksc_indexed = True
            own = req.multimodal_inputs is not None or req.skip_radix_cache_insert or is_reserved(req.extra_key)
            if not own and len(req.origin_input_ids) >= LEAST_TOKENS:
                self.residents.add(namespace_of(req), _donor_of(req))

    def whole(self, donor: Donor, namespace: Namespace) -> bool:
        """Whether the tree has all of a donor, but for a part of a page."""
        return self._cached(donor.tokens, namespace) > donor.tokens.size - self.scheduler.page_size

    def _waits(self, req: Any, options: RequestOptions, live: set[int]) -> bool:
        """Place a request; or True where it waits for its anchor."""
        if options.merges and options.group is not None and self._follows_alias(req, options.group):
            return False
        namespace = namespace_of(req)
        exact = self._cached(req.origin_input_ids, namespace)
        blended = 0
        if options.blends:
            blended = self._cached(req.origin_input_ids, namespace._replace(extra_key=blended_key(req.extra_key)))
        branch = Branch(req, options, np.asarray(req.origin_input_ids, dtype=np.int64), exact, blended)
        key = branch.key
        if options.op != "branch":
            branch.use_blended(blended > exact)
        elif key is not None:
            return self._waits_in_fork(branch, key, live)
        elif options.share_scope == "cache":
            self._place_beside(branch, self._like(branch))
        elif options.merges:
            decline(req, "without a group there is no donor")
        else:
            branch.use_blended(blended > exact)
        return False

    def _waits_in_fork(self, branch: Branch, key: ForkKey, live: set[int]) -> bool:
        """Place a branch of a fork; or True where it waits for its anchor."""
        fork = self.table.fork(key)
        gone = self._settle_anchor(key, fork, live)
        if fork.anchor is not None:
            gain = self._gain(branch, fork.anchor)
            if worth_blending(branch.ids.size, max(branch.exact, branch.blended), gain, 0.0):
                return True
            self._say_not_shared(branch, TOO_FEW if branch.options.merges else TOO_FEW_ALIGN)
        lost = self._drop_lost(branch, key, fork)
        alone = fork.anchor is None and not fork.donors
        if alone and gone:
            decline(branch.req, "the anchor that it could have shared with is gone")
        elif alone and lost:
            decline(branch.req, DONORS_GONE)
        donors = list(fork.donors)
        if branch.options.share_scope == "cache":
            donors += self._like(branch)
        if alone and not donors:
            fork.anchor = branch.req
            return False
        chosen = self._place_beside(branch, donors)
        if chosen is not None:
            self.table.add_donor(key, chosen)
        elif alone:
            fork.anchor = branch.req
        return False

    def _settle_anchor(self, key: ForkKey, fork: Fork[Any], live: set[int]) -> bool:
        """The anchor becomes a donor once its prompt is in the tree, and is forgotten once it is in no queue.

        Returns:
            Whether it was forgotten.
        """
        anchor = fork.anchor
        if anchor is None:
            return False
        donor = _donor_of(anchor)
        leaving = getattr(anchor, "rksc_leaving", None) is not None
        if not leaving and self._cached(donor.tokens, key.namespace) >= donor.tokens.size - self.scheduler.page_size:
            self.table.add_donor(key, donor)
            fork.anchor = None
        elif id(anchor) not in live or len(anchor.output_ids) > 1:  # aborted; or decoding, and still not in the tree
            logger.info("rksc: the KV of anchor %s of fork %s is gone; its siblings go on", anchor.rid, key.group)
            fork.anchor = None
            return True
        return False

    def _drop_lost(self, branch: Branch, key: ForkKey, fork: Fork[Any]) -> bool:
        """Forget the donors of a fork whose KV is gone; True if there were some and none is left."""
        lost = [donor for donor in fork.donors if self._is_lost(branch, donor)]
        for donor in lost:
            self.table.drop_donor(key, donor)
        return bool(lost) and not fork.donors

    def _is_lost(self, branch: Branch, donor: Donor) -> bool:
        cached = self._cached(donor.tokens, namespace_of(branch.req))
        return cached < min(donor.tokens.size - 1, branch.options.minimum_span)

    def _like(self, branch: Branch) -> list[Donor]:
        """Prompts of the whole cache that have much in common with a branch."""
        if self.residents is None:
            self.residents = ResidentPrompts()
            anchors = [(key, _donor_of(anchor)) for key, anchor in self.table.anchors()]
            for key, donor in (*self.table.donors(), *anchors):
                self.residents.add(key.namespace, donor)
        namespace, found = namespace_of(branch.req), []
        for donor in self.residents.like(namespace, branch.ids, branch.options.minimum_span):
            if self._is_lost(branch, donor):
                self.residents.drop(namespace, donor)
            else:
                found.append(donor)
        return found

    def _place_beside(self, branch: Branch, donors: Sequence[Donor]) -> Donor | None:
        """Plan what a branch takes from these donors, if anything.

        Returns:
            The donor whose tokens it takes over. None also where only a merge is planned: its own prompt may become
            exact KV yet.
        """
        if branch.options.merges:
            self._plan_merge(branch, donors)
        if not branch.options.blends:
            return None
        if not donors or (branch.options.share == "auto" and branch.little_left):
            branch.use_blended(branch.blended > branch.exact)
            return None
        return self._plan_blend(branch, donors)

    def _plan_blend(self, branch: Branch, donors: Sequence[Donor]) -> Donor | None:
        """Give a branch the donor with which it computes least; None where that is not worth it."""
        req, options = branch.req, branch.options
        found = [(align(donor.tokens, branch.ids, options.minimum_span), donor) for donor in donors]
        alignment, donor = max(found, key=lambda one: one[0].aligned)
        report = {"donor": donor.name, "aligned_tokens": alignment.aligned}
        if self.blend_refusal:
            self._say_not_shared(branch, self.blend_refusal, **report)
            return None
        always, taken = self._taken(branch.ids, alignment)
        worth = worth_blending(branch.ids.size, branch.exact, taken, self.probe_share)
        enough = taken >= branch.least_taken
        if not (worth and enough) and branch.blended <= branch.exact:
            self._say_not_shared(branch, TOO_FEW_ALIGN if enough else TOO_FEW_FOR_AUTO, **report)
            return None
        req.rksc_blend = BlendPlan(donor, req.extra_key, alignment.source, always, options)
        not_merged = req.rksc_report if options.merges and hasattr(req, "rksc_report") else {}
        req.rksc_report = {**not_merged, **report}
        branch.use_blended(True)
        logger.debug("rksc: %s takes %d of %d tokens from %s", req.rid, alignment.aligned, branch.ids.size, donor.name)
        return donor

    def _taken(self, ids: NDArray[np.int64], alignment: Alignment) -> tuple[NDArray[np.bool_], int]:
        """Tokens of a branch that are computed also where its donor has them, and how many are left to take over."""
        if self._numbers is None:
            runner = self.scheduler.tp_worker.model_runner
            self._numbers = number_tokens(self.scheduler.tokenizer, runner.model_config.vocab_size)
        numbers = torch.from_numpy(self._numbers[ids.clip(0, self._numbers.size - 1)])
        always = always_computed(torch.from_numpy(alignment.source), numbers).numpy()
        return always, alignment.aligned - int(always.sum())

    @staticmethod
    def _say_not_shared(branch: Branch, reason: str, **report: Any) -> None:
        """Decline, but for what ``share="auto"`` has no need to say: little was left, or it was said already."""
        if branch.options.share == "auto" and branch.little_left:
            return
        if branch.options.share == "blend" or not hasattr(branch.req, "rksc_report"):
            decline(branch.req, reason, **report)

    def _plan_merge(self, branch: Branch, donors: Sequence[Donor]) -> None:
        """Give a branch the first donor that asks the same, or say why there is none."""
        req, namespace = branch.req, namespace_of(branch.req)
        begun = (np.array_equal(donor.tokens, branch.ids[: donor.tokens.size]) for donor in donors)
        if not donors or any(begun):
            return  # what a donor has from the start is exact reuse
        refusal = self.merge_refusal or refusal_of_request(req)
        if not refusal and branch.little_left:
            refusal = TOO_FEW
        if refusal:
            return self._say_not_shared(branch, refusal)
        verdicts = [(self._same(donor.tokens, branch.ids), donor) for donor in donors]
        same = [donor for verdict, donor in verdicts if verdict.same]
        resident = [donor for donor in same if self.whole(donor, namespace)]
        if not same:
            verdict, donor = verdicts[0]
            return decline(req, f"content guard: {verdict.reason}", donor=donor.name)
        if not resident:
            return decline(req, DONORS_GONE, donor=same[0].name)
        if self._common is None:
            self._common = common_values(self.scheduler)
            if self._common is None:
                return decline(req, "no room to compute what all prompts have in common", donor=resident[0].name)
        decline(req, NOT_PROBED, donor=resident[0].name)  # until it is
        req.rksc_merge = MergePlan(resident[0], req.extra_key, branch.key, branch.options.tau, self._common)

    def _same(self, donor: Any, branch: Any) -> GuardVerdict:
        """What the content guard says of two prompts, given as token ids."""
        decode = self.scheduler.tokenizer.decode
        return same_content(*(decode(list(map(int, ids)), skip_special_tokens=False) for ids in (donor, branch)))

    def _follows_alias(self, req: Any, group: str) -> bool:
        """Read the beginning of a prompt as the one that it was merged with before; False where it was not."""
        key = ForkKey(group, *namespace_of(req))
        alias = self.table.alias_of(key, np.asarray(req.origin_input_ids, dtype=np.int64))
        if alias is None:
            return False
        donor, own = alias.canonical, alias.tokens.size
        if not self.whole(donor, key.namespace):
            self.table.drop_donor(key, donor)
            decline(req, "the prompt that it was merged with is gone", alias_dropped=True)
            return False
        length = len(req.origin_input_ids) - own + donor.tokens.size
        refusal = refusal_of_request(req)
        if refusal or length >= self.scheduler.max_req_input_len:
            decline(req, refusal or "the prompt that it was merged with makes it too long", donor=donor.name)
            return True  # as itself, and without another probe
        req.rksc_report = {"donor": donor.name, "similarity": alias.similarity}
        replace_prompt(self.scheduler, req, own, donor)
        return True

    def _gain(self, branch: Branch, anchor: Any) -> int:
        """How many tokens it could have from its anchor; found once, for it is asked in every step of the wait."""
        req, options = branch.req, branch.options
        known = getattr(req, "rksc_gain", None)
        if known is not None and known[0] is anchor:
            return known[1]
        other = np.asarray(anchor.origin_input_ids, dtype=np.int64)
        gain = _common(other, branch.ids)
        if options.merges and not self.merge_refusal:
            verdict = self._same(other, branch.ids)
            if verdict.same:
                gain = branch.ids.size
            else:
                decline(req, f"content guard: {verdict.reason}", donor=anchor.rid)
        if options.blends and not self.blend_refusal and gain + LEAST_TOKENS <= branch.ids.size:
            _, taken = self._taken(branch.ids, align(other, branch.ids, options.minimum_span))
            gain = max(gain, taken if taken >= branch.least_taken else 0)
        req.rksc_gain = (anchor, gain)
        return gain

    def _cached(self, ids: Any, namespace: Namespace) -> int:
        """How many tokens of a prompt the tree has in a namespace."""
        return len(resident_slots(self.scheduler.tree_cache, ids, namespace.extra_key, namespace.cache_salt))

    def _live(self) -> set[int]:
        """Requests that are queued, being prefilled or running, or whose results are still to come."""
        scheduler = self.scheduler
        requests: list[Any] = [*scheduler.waiting_queue, scheduler.chunked_req]
        batches = [getattr(scheduler, name, None) for name in ("running_batch", "last_batch", "cur_batch")]
        batches += [batch for batch, _ in getattr(scheduler, "result_queue", ())]
        for batch in batches:
            requests += batch.reqs if batch is not None else []
        return {id(req) for req in requests if req is not None and not req.finished()}


def hold_siblings(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook: a prefill batch is made of what does not wait for an anchor."""
    queue = scheduler.waiting_queue
    if not queue or not has_tree(scheduler.tree_cache):
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


def siblings_of(scheduler: Any) -> Siblings:
    """The placement of a scheduler, made when it is first asked for."""
    found = getattr(scheduler, "rksc_siblings", None)
    if found is None:
        found = scheduler.rksc_siblings = Siblings(scheduler)
    return found


def namespace_of(req: Any) -> Namespace:
    """What SGLang keeps a request's KV apart by."""
    return Namespace(req.extra_key, req.cache_salt, req.lora_id)


def refusal_of_request(req: Any) -> str:
    """Why the prompt of a request cannot be replaced by another; empty if it can."""
    unsupported = {
        "log-probabilities of the prompt are asked for": req.return_logprob
        and 0 <= req.logprob_start_len < len(req.origin_input_ids),
        "its session has a prompt of its own": req.session is not None,
        "its prompt is more than token ids": req.multimodal_inputs is not None
        or req.input_embeds is not None
        or req.positional_embed_overrides is not None,
        "beam search keeps its prompt": req.beam_group is not None,
    }
    return next((reason for reason, found in unsupported.items() if found), "")


def _donor_of(req: Any) -> Donor:
    return Donor(req.rid, np.asarray(req.origin_input_ids, dtype=np.int64))


def _common(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    size = min(first.size, second.size)
    differ = np.flatnonzero(first[:size] != second[:size])
    return int(differ[0]) if differ.size else size
