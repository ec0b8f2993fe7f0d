"""In the scheduler: siblings wait for their anchor, and each branch gets the namespace and the donor that serve it.

A fork's first branch to arrive is its anchor and is prefilled as SGLang would. A sibling that would gain from the
anchor's KV stays in the waiting queue while the anchor is being prefilled, and goes on as soon as that KV is in the
tree, or as soon as the anchor is not in the scheduler any more (aborted, refused). SGLang has a rule of its own for
requests with a common prefix that wait together (in-batch prefix caching), which delays no request whose prefix is
partly cached and knows nothing of tokens that are equal at other places.

KV that was blended is approximate and lives under an ``extra_key`` of its own: a request that did not opt in, or that
asked for ``share="exact"``, has another key and cannot meet it. A merged branch has its donor's token ids in place of
its own, so that its KV is that of its ids like any other's.

What a branch gets is decided in :mod:`rksc_sgl.placement`; here the tree is read for it, and the decision carried out.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Set
from dataclasses import replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch

from rksc_sgl.donors.forks import ALL_S, Anchor, Donor, ForkKey, ForkTable, Namespace
from rksc_sgl.donors.residents import ResidentPrompts
from rksc_sgl.options import RequestOptions
from rksc_sgl.placement.choose import Server, follow_alias, place_alone, place_beside, place_in_fork
from rksc_sgl.placement.compare import Comparisons
from rksc_sgl.placement.report import SharingReport
from rksc_sgl.placement.values import Branch, ForkFacts, Placement, Resident
from rksc_sgl.placement.worth import LEAST_TOKENS
from rksc_sgl.sglang_plugin.branch_state import BranchState, Phase
from rksc_sgl.sglang_plugin.memory.keeper import keeper_for
from rksc_sgl.sglang_plugin.memory.slots import share_slots
from rksc_sgl.sglang_plugin.offering.offers_here import offers_by
from rksc_sgl.sglang_plugin.passes.common_values import common_values
from rksc_sgl.sglang_plugin.passes.exit_profiles import profiles_of
from rksc_sgl.sglang_plugin.passes.pass_clock import clock_of
from rksc_sgl.sglang_plugin.passes.ranks import tp_group
from rksc_sgl.sglang_plugin.passes.split_pass import probe_layers
from rksc_sgl.sglang_plugin.placing import certified_blends
from rksc_sgl.sglang_plugin.placing.budget import admitting
from rksc_sgl.sglang_plugin.placing.replacing import replace_prompt
from rksc_sgl.sglang_plugin.requests import namespace_of, prompt_of, refusal_of_replacing, refusal_of_splitting
from rksc_sgl.sglang_plugin.tree import blended_key, is_reserved, resident_tokens

logger = logging.getLogger(__name__)

LONG = 256  # tokens of a prompt whose prefill is long beside the moment that its siblings are waited for
NO_ROOM = "no room to compute what all prompts have in common"


class PlacingQueue:
    """Places the branches that wait in one scheduler.

    Attributes:
        table: the forks, their anchors, donors and aliases.
        residents: prompts of all namespaces; None until a request asks for ``share_scope="cache"``.
        server: what this server can do with prompts.
        shares_slots: whether blended branches may use slots of their donors.
        awaits: whether the first branches of a fork wait a moment for others, so that the longest is the anchor.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.table: ForkTable[Any] = ForkTable()
        self.residents: ResidentPrompts | None = None
        self.server = server_of(scheduler)
        self.shares_slots = share_slots(scheduler)
        self.awaits = self.shares_slots and tp_group().world_size == 1  # ranks would not agree when a moment is over
        self._offers = offers_by(scheduler)
        self._centre: torch.Tensor | None = None

    def place(self, withheld: Set[str] = frozenset()) -> set[str]:
        """Decide for every waiting request that was not decided on yet; the ids of those that go on waiting.

        Args:
            withheld: ids of requests whose turn it is not.
        """
        cost = clock_of(self.scheduler.tp_worker.model_runner).cost
        if cost is not self.server.pass_cost:
            self.server = replace(self.server, pass_cost=cost)
        step = _Step(self)
        held = set(withheld)
        for req in self._longest_first(req for req in self.scheduler.waiting_queue if req.rid not in withheld):
            state: BranchState = req.rksc
            if state.phase is Phase.NEW:
                self._tell_offers(state)
            if state.phase is Phase.COMPUTED:  # retracted: it goes on with what was decided for it
                state.enter(Phase.PLACED)
            elif not state.is_undecided:
                continue
            elif not self._offers["exact"].offered or (state.options.share == "exact" and state.options.group is None):
                self._place_plainly(state)
            elif step.place_or_hold(req, state):
                held.add(req.rid)
        return held

    def _longest_first(self, waiting: Iterable[Any]) -> list[Any]:
        """Those that opted in, of each fork that blends the longest prompt first.

        What others have in common with it then stands at later positions there, so that they can be shifted to these
        and use its slots (:attr:`~rksc_sgl.placement.compare.Comparison.shift`).
        """
        asked = [req for req in waiting if req.rksc is not None]
        if not self.shares_slots:
            return asked
        places: dict[ForkKey, list[int]] = {}
        for place, req in enumerate(asked):
            key = _fork_of(req, req.rksc.options)
            if key is not None and req.rksc.is_undecided and req.rksc.options.blends:
                places.setdefault(key, []).append(place)
        for some in places.values():
            longest = max(some, key=lambda place: len(asked[place].origin_input_ids))
            asked[some[0]], asked[longest] = asked[longest], asked[some[0]]
        return asked

    def _place_plainly(self, state: BranchState) -> None:
        """A request that shares what SGLang finds for it; it is told where the server refuses more."""
        if state.options.group is not None or state.options.share != "exact":
            state.sharing.declined = self._offers["exact"].refusal or None
        state.enter(Phase.PLACED)

    def _tell_offers(self, state: BranchState) -> None:
        """A request is told what this server refuses of its verification, and what it offers untested."""
        options = state.options
        if options.op == "verify" and not self._offers["exit"].offered:
            state.exit_refusal = self._offers["exit"].refusal
            state.exit = {"rule": None, "reason": state.exit_refusal}
        wanted = {
            "exact": options.group is not None,
            "blend": options.blends,
            "merge": options.merges,
            "exit": options.op == "verify" and options.exit != "off",
            "verify": options.op == "verify",
        }
        state.warnings = tuple(
            self._offers[name].warning for name, asked in wanted.items() if asked and self._offers[name].warning
        )

    def note_computed(self, reqs: Iterable[Any]) -> None:
        """The results of a prefill are there: those whose prompt is complete may be donors of the whole cache.

        Those of every request, whether it opted in or not: the tree has their KV for everybody of their namespace.
        """
        for req in reqs:
            if len(req.output_ids) and req.rksc is not None and req.rksc.phase is Phase.PLACED:
                req.rksc.enter(Phase.COMPUTED)
            if self.residents is not None and len(req.output_ids) == 1 and _is_shareable(req):
                self.residents.add(namespace_of(req), Donor(req.rid, prompt_of(req)))

    def resident(self, donor: Donor, namespace: Namespace) -> Resident:
        """A donor, and how much of it the tree has."""
        return Resident(donor, resident_tokens(self.scheduler.tree_cache, donor.tokens, namespace))

    def like(self, branch: Branch) -> list[Resident]:
        """Prompts of the whole cache that have much in common with a branch."""
        if self.residents is None:
            self.residents = ResidentPrompts()
            anchors = ((key, anchor.donor) for key, anchor in self.table.anchors())
            for key, donor in (*self.table.donors(), *anchors):
                self.residents.add(key.namespace, donor)
        found = []
        for donor in self.residents.like(branch.namespace, branch.ids, branch.options.minimum_span):
            one = self.resident(donor, branch.namespace)
            if one.is_lost(branch.options.minimum_span):
                self.residents.drop(branch.namespace, donor)
            else:
                found.append(one)
        return found

    def compared(self, req: Any, state: BranchState) -> Comparisons:
        """A branch's prompt beside donors; kept while it waits."""
        if state.compared is None:
            state.compared = Comparisons(prompt_of(req), state.options.minimum_span, self.scheduler.tokenizer)
        return state.compared

    def forget_centre(self) -> None:
        """What the values of all prompts have in common is computed anew when it is next needed."""
        self._centre = None

    def with_centre(self, placement: Placement) -> Placement:
        """A placement whose merge can be measured; without the merge where there is no room for that just now."""
        if placement.merge is None:
            return placement
        if self._centre is None:
            self._centre = common_values(self.scheduler)
        if self._centre is None:
            placement.report.decline(NO_ROOM, donor=placement.merge.donor.name)
            return replace(placement, merge=None)
        return replace(placement, merge=replace(placement.merge, centre=self._centre))


class _Step:
    """One scheduling step: what is looked up once for all who wait."""

    def __init__(self, queue: PlacingQueue) -> None:
        self.queue, self.table, self.scheduler = queue, queue.table, queue.scheduler
        self._gone: dict[ForkKey, bool] = {}
        self._awaited: set[ForkKey] = set()  # forks of which more is likely to come in a moment
        self._prefilled: dict[ForkKey, int] = {}  # tokens of a fork's anchor that are in the tree

    def place_or_hold(self, req: Any, state: BranchState) -> bool:
        """Place a request; True where it goes on waiting for its anchor."""
        if state.phase is Phase.HELD and self._still_waits(req, state):
            state.waited_passes += 1
            return True
        options, key = state.options, _fork_of(req, state.options)
        if key is not None and self._awaits_siblings(key, req, options):
            state.waited_passes += 1
            return True
        if options.merges and options.group is not None and self._follow_alias(req, state, options.group):
            self._place(state, key)
            return False
        placement = self._placement(self._branch(req, options), req, state)
        if placement.waits_for is not None:
            if state.phase is Phase.NEW:
                state.enter(Phase.HELD)
            state.waits_for, state.waits_until = placement.waits_for, placement.waits_until
            state.sharing = placement.report
            state.waited_passes += 1
            return True
        self._carry_out(placement, req, state)
        self._place(state, key)
        return False

    def _awaits_siblings(self, key: ForkKey, req: Any, options: RequestOptions) -> bool:
        """Whether the first of a fork wait a moment for those that come with them, one of which may be longer."""
        queue, fork = self.queue, self.table.fork(key)
        fresh = fork.anchor is None and not fork.donors and not fork.shifts
        if not (queue.awaits and fresh and options.blends) or options.branches <= self._waiting[key]:
            return False
        state, now = req.rksc, time.monotonic()
        state.arrived_s = now if state.arrived_s is None else state.arrived_s
        if now - state.arrived_s >= ALL_S:
            return False
        if key not in self._awaited and len(req.origin_input_ids) >= LONG and fork.arriving(self._waiting[key], now):
            self._awaited.add(key)
        return key in self._awaited

    def _place(self, state: BranchState, key: ForkKey | None) -> None:
        """A request waits no longer, and is none of its siblings that do."""
        self._waiting[key] -= 1
        state.enter(Phase.PLACED)

    def _still_waits(self, req: Any, state: BranchState) -> bool:
        """Whether the anchor that it waits for is still being prefilled, and not far enough yet."""
        key = _fork_of(req, state.options)
        assert key is not None, "only branches of a fork wait"
        self._look_at_anchor(key)
        anchor = self.table.fork(key).anchor
        return anchor is not None and anchor.donor is state.waits_for and self._prefilled[key] < state.waits_until

    def _branch(self, req: Any, options: RequestOptions) -> Branch:
        tree_cache, namespace = self.scheduler.tree_cache, namespace_of(req)
        exact = resident_tokens(tree_cache, req.origin_input_ids, namespace)
        blended, shift, most, whole = 0, 0, 0, refusal_of_splitting(req) if options.blends else ""
        if options.blends and not whole:
            most = self._most_shift(req)
            shifts = () if options.group is None else self.table.shifts_of(ForkKey(options.group, *namespace))
            for one in (0, *shifts):
                beside = namespace._replace(extra_key=blended_key(namespace.extra_key, one))
                found = resident_tokens(tree_cache, req.origin_input_ids, beside) if one <= most else 0
                blended, shift = max((blended, shift), (found, one), key=lambda there: there[0])
        fixed = refusal_of_replacing(req) if options.merges else ""
        return Branch(options, prompt_of(req), namespace, exact, blended, fixed, whole, shift, most)

    def _most_shift(self, req: Any) -> int:
        """By how many positions a request may be shifted; 0 where slots have one owner."""
        if not self.queue.shares_slots or req.beam_group is not None or req.session is not None:
            return 0  # a session reads its own KV whatever the key, and so at positions that it was not told
        generated = req.sampling_params.max_new_tokens or 0
        return max(0, int(self.scheduler.model_config.context_len) - len(req.origin_input_ids) - generated)

    def _placement(self, branch: Branch, req: Any, state: BranchState) -> Placement:
        queue, options = self.queue, branch.options
        if options.op != "branch":
            return place_alone(branch)
        others = queue.like(branch) if options.share_scope == "cache" else []
        if branch.key is not None:
            fork = self._fork_facts(branch, branch.key)
            return place_in_fork(branch, fork, others, queue.server, queue.compared(req, state))
        if options.share_scope == "cache":
            return place_beside(branch, others, queue.server, queue.compared(req, state))
        return place_alone(branch)

    def _fork_facts(self, branch: Branch, key: ForkKey) -> ForkFacts:
        anchor_gone = self._look_at_anchor(key)
        fork = self.table.fork(key)
        donors = [self.queue.resident(donor, key.namespace) for donor in fork.donors]
        kept = [one for one in donors if not one.is_lost(branch.options.minimum_span)]
        for one in donors:
            if one not in kept:
                self.table.drop_donor(key, one.donor)
        anchor = None if fork.anchor is None else fork.anchor.donor
        return ForkFacts(anchor, tuple(kept), anchor_gone, bool(donors) and not kept, self._waiting[key])

    def _look_at_anchor(self, key: ForkKey) -> bool:
        """Bring a fork's anchor up to date, once a step.

        Returns:
            Whether it ended, in this step, before its KV was in the tree.
        """
        if key not in self._gone:
            self._gone[key] = self._update_anchor(key)
        return self._gone[key]

    def _update_anchor(self, key: ForkKey) -> bool:
        """A fork's anchor becomes a donor once its prompt is in the tree, and is forgotten once it is in no queue.

        Returns:
            Whether it was forgotten.
        """
        fork = self.table.fork(key)
        if fork.anchor is None:
            return False
        req, donor = fork.anchor.request, fork.anchor.donor
        there = self._prefilled[key] = self.queue.resident(donor, key.namespace).cached
        if req.rksc.is_leaving:
            return False  # it comes back with another prompt
        if req.rksc.canonical_tokens:
            fork.anchor = None  # its prompt is a donor's now, which its alias made one of the fork
        elif there >= donor.tokens.size - self.queue.server.page:
            self.table.add_donor(key, donor)
            fork.anchor = None
        elif id(req) not in self._live or len(req.output_ids) > 1:  # aborted; or decoding, and still not in the tree
            logger.info("rksc: the KV of anchor %s of fork %s is gone; its siblings go on", req.rid, key.group)
            fork.anchor = None
            return True
        return False

    @cached_property
    def _waiting(self) -> Counter[ForkKey | None]:
        """How many branches of each fork wait: those that this step has placed are none of them any more."""
        waiting = ((req, req.rksc) for req in self.scheduler.waiting_queue)
        return Counter(
            _fork_of(req, state.options) for req, state in waiting if state is not None and state.is_undecided
        )

    @cached_property
    def _live(self) -> set[int]:
        """Requests that are queued, being prefilled or running, or whose results are still to come."""
        scheduler = self.scheduler
        requests: list[Any] = [*scheduler.waiting_queue, scheduler.chunked_req]
        batches = [getattr(scheduler, name, None) for name in ("running_batch", "last_batch", "cur_batch")]
        batches += [batch for batch, _ in getattr(scheduler, "result_queue", ())]
        for batch in batches:
            requests += batch.reqs if batch is not None else []
        return {id(req) for req in requests if req is not None and not req.finished()}

    def _follow_alias(self, req: Any, state: BranchState, group: str) -> bool:
        """Read the beginning of a prompt as the one that it was merged with before; False where it was not."""
        key = ForkKey(group, *namespace_of(req))
        alias = self.table.alias_of(key, prompt_of(req))
        if alias is None:
            return False
        donor, own = alias.canonical, alias.tokens.size
        found = follow_alias(
            self.queue.resident(donor, key.namespace),
            refusal_of_replacing(req),
            len(req.origin_input_ids) - own + donor.tokens.size,
            self.scheduler.max_req_input_len,
            self.queue.server.page,
        )
        if found.drop:
            self.table.drop_donor(key, donor)
            state.sharing = SharingReport(alias_dropped=True, declined=found.declined)
            return False
        if found.replaces:
            state.sharing = SharingReport(donor=donor.name, similarity=alias.similarity)
            replace_prompt(self.scheduler, req, own, donor)
        else:
            state.sharing.decline(found.declined, donor=donor.name)
        return True  # where it was not replaced: as itself, and without another probe

    def _carry_out(self, placement: Placement, req: Any, state: BranchState) -> None:
        placement = self.queue.with_centre(placement)
        key = None if state.options.group is None else ForkKey(state.options.group, *namespace_of(req))
        if key is not None and placement.adopts is not None:
            self.table.add_donor(key, placement.adopts)
        if key is not None and placement.is_anchor:
            self.table.fork(key).anchor = Anchor(req, Donor(req.rid, prompt_of(req)))
        if placement.blended:
            state.blended, state.shift = True, placement.shift
            req.extra_key = blended_key(req.extra_key, placement.shift)
            if key is not None and placement.shift:
                self.table.note_shift(key, placement.shift)
        before, report = state.sharing, placement.report
        if before.alias_dropped:
            report.alias_dropped, report.declined = True, report.declined or before.declined
        state.blend, state.merge, state.sharing = placement.blend, placement.merge, report
        state.waits_for = state.compared = None
        if placement.blend is not None:
            logger.debug("rksc: %s may take tokens from %s", req.rid, placement.blend.donor.name)


def _fork_of(req: Any, options: RequestOptions) -> ForkKey | None:
    """The fork of which a request, not placed yet, is a branch; None where it is none."""
    if options.group is None or options.op != "branch":
        return None
    return ForkKey(options.group, *namespace_of(req))


def forget_old_weights(result: Any, updater: Any, *args: Any, **kwargs: Any) -> Any:
    """AFTER hook: what was found of the weights before an update holds no more, certificates above all."""
    scheduler = updater.scheduler
    profiles_of(scheduler.tp_worker.model_runner).retire()
    certified_blends.retire(scheduler)
    queue = known_queue_of(scheduler)
    if queue is not None:
        queue.forget_centre()
    return result


def hold_siblings(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook: a prefill batch is made of forks whose turn it is, and of what does not wait for an anchor."""
    _let_in_compiled(scheduler)
    queue = scheduler.waiting_queue
    running = kwargs["running_batch"] if "running_batch" in kwargs else args[1]
    keeper = keeper_for(scheduler, queue)
    turn = None if keeper is None else keeper.turn(running)
    held = queue_of(scheduler).place(turn.withheld if turn else frozenset()) if queue else set()

    def made() -> Any:
        with admitting(scheduler):
            return original(scheduler, *args, **kwargs)

    if turn is None and not held:
        return made()
    allowed = [req for req in (turn.queue if turn else queue) if req.rid not in held]
    scheduler.waiting_queue = list(allowed)
    try:
        result = made()
        if keeper is not None and turn is not None and keeper.after(result[0], allowed, running):
            result = made()
            keeper.after(result[0], (), running)
        return result
    finally:
        left = scheduler.waiting_queue
        staying = {id(req) for req in left} | {id(req) for req in queue if req.rid in held}
        known = {id(req) for req in queue}
        scheduler.waiting_queue = [
            *(req for req in queue if id(req) in staying),
            *(req for req in left if id(req) not in known),
        ]


def _let_in_compiled(scheduler: Any) -> None:
    """Branches whose grammar is compiled now join the queue before it is placed, and not just after, as SGLang does it.

    They would be computed without a place. Where none of those that wait for a grammar is a branch, SGLang is left to
    it: asking twice in a step waits twice.
    """
    grammars = scheduler.grammar_manager
    if any(req.rksc is not None and req.rksc.options.group is not None for req in grammars.grammar_queue):
        for req in grammars.get_ready_grammar_requests():
            scheduler._add_request_to_queue(req)


_queues: WeakKeyDictionary[Any, PlacingQueue] = WeakKeyDictionary()


def known_queue_of(scheduler: Any) -> PlacingQueue | None:
    """The placing queue of a scheduler; None while nothing has waited in it."""
    return _queues.get(scheduler)


def queue_of(scheduler: Any) -> PlacingQueue:
    """The placing queue of a scheduler, made when it is first asked for."""
    found = _queues.get(scheduler)
    if found is None:
        found = _queues[scheduler] = PlacingQueue(scheduler)
    return found


def server_of(scheduler: Any) -> Server:
    """What a scheduler can do with prompts."""
    runner, offers = scheduler.tp_worker.model_runner, offers_by(scheduler)
    return Server(
        blend_refusal=offers["blend"].refusal,
        merge_refusal=offers["merge"].refusal,
        probe_share=probe_layers(runner) / runner.model_config.num_hidden_layers,
        page=scheduler.page_size,
        pass_cost=clock_of(runner).cost,
    )


def _is_shareable(req: Any) -> bool:
    """Whether a prompt that was computed may be anybody's donor."""
    own = req.multimodal_inputs is not None or req.skip_radix_cache_insert or is_reserved(req.extra_key)
    return not own and len(req.origin_input_ids) >= LEAST_TOKENS
