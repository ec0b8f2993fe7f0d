"""In the scheduler: what :mod:`rksc_sgl.memory` decides of forks, carried out on SGLang's tree, queue and batches."""

from __future__ import annotations

import logging
import time
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from rksc_sgl.donors.forks import ForkKey
from rksc_sgl.memory.admission import PATIENCE_S, TURN_S, Admission, Waiting, admit
from rksc_sgl.memory.forks import ENDED, REUSED, Action, Fork, Forks, Lease, Take
from rksc_sgl.memory.settings import lease_seconds
from rksc_sgl.metrics import LEASES, LEASES_ENDED, TOKENS_TWICE, counters
from rksc_sgl.sglang_plugin.branch_state import BranchState
from rksc_sgl.sglang_plugin.inspection.counting import counts_here
from rksc_sgl.sglang_plugin.memory.computed import Computed, common_beginning
from rksc_sgl.sglang_plugin.memory.slots import surplus_of_locked
from rksc_sgl.sglang_plugin.memory.tried import refusal_of_memory
from rksc_sgl.sglang_plugin.requests import namespace_of
from rksc_sgl.sglang_plugin.tree import as_ids

logger = logging.getLogger(__name__)

FIRST_QUESTION, MOST_QUESTION = 32, 256  # tokens of a verification: before one was seen, and that are believed
STALL_S = 0.002  # that a step sleeps in which nothing can run; those that are waited for need the processor
COMPARED_FORKS = 8  # with whose beginnings that of a new fork is compared
MOST_BEGINNING = 16  # forks that may begin in one step


@dataclass(frozen=True)
class Turn:
    """One scheduling step.

    Attributes:
        queue: those that SGLang may schedule, in this order.
        withheld: ids of those that wait.
    """

    queue: list[Any]
    withheld: set[str]


class Keeper:
    """What one scheduler keeps of forks.

    Args:
        scheduler: SGLang's.
        seconds: without a request after which a fork is given up; by default what the environment says.

    Attributes:
        forks: what is under way.
    """

    def __init__(self, scheduler: Any, seconds: float | None = None) -> None:
        self._scheduler, self._counts = scheduler, counts_here()
        self.forks = Forks(lease_seconds() if seconds is None else seconds)
        self._computed = Computed()
        self._locks: dict[Lease, Any] = {}
        self._keys: dict[str, ForkKey] = {}  # of requests that wait or run
        self._own: dict[str, int] = {}  # tokens of a waiting request that its fork's first prompt does not begin with
        self._first: dict[ForkKey, array[int]] = {}  # the prompt that came first, of forks that have not begun
        self._costs: dict[ForkKey, tuple[int, int]] = {}  # slots of a fork's beginning, and of each branch
        self._since: dict[str, float] = {}  # when waiting requests were first seen
        self._scheduled: set[str] = set()  # requests that hold KV
        self._retracted: set[str] = set()
        self._question: int | None = None  # tokens of the largest verification so far
        self._last_now = 0.0

    # -- a scheduling step ---------------------------------------------------------------------------

    def turn(self, running: Any) -> Turn | None:
        """Who may be scheduled; None where SGLang decides alone, for no fork is under way."""
        queue = self._scheduler.waiting_queue
        fresh = [req for req in queue if _group(req) is not None and req.rid not in self._keys]
        if not fresh and not len(self.forks):
            return None
        now = self._now()
        self._do(self.forks.expire(now))
        for req in fresh:
            self._arrive(req, now)
        if not len(self.forks):
            return None
        self._since = {req.rid: self._since.get(req.rid, now) for req in queue}
        admission = self._admit(queue, running, now)
        for name in admission.forks:
            fork = self.forks.named(name)
            assert fork is not None
            fork.admitted, fork.larger = True, name in admission.larger
            if fork.larger:
                logger.warning(
                    "rksc: fork %s needs more than the %d slots of the pool: it runs branch by branch",
                    fork.group,
                    self._capacity,
                )
        return self._ordered(queue, admission, running)

    def after(self, batch: Any | None, left: Sequence[Any], running: Any) -> bool:
        """A prefill batch was made, or none.

        Args:
            batch: None where there is none.
            left: those that may be scheduled and were not.
            running: what is being decoded.

        Returns:
            Whether room was made for those that are left, so that it is worth trying again.
        """
        if batch is not None:
            self._begin(batch.reqs)
            return False
        if not self._idle(running):
            return False
        if not left:
            if self._since:  # some wait, and all of them for a turn or an anchor
                time.sleep(STALL_S)
            return False
        head = left[0]
        return self._make_room(self._whole_need(head), running, spare=self._keys.get(head.rid))

    def _ordered(self, queue: Sequence[Any], admission: Admission, running: Any) -> Turn:
        verifications, branches, others = [], [], []
        withheld = set()
        for req in queue:
            fork = self.forks.of(req.rid)
            if fork is None:
                if req.rid in admission.behind:
                    withheld.add(req.rid)
                else:
                    others.append(req)
            elif req.rid in fork.verifying:
                verifications.append(req)
            elif not fork.admitted:
                withheld.add(req.rid)
            elif fork.name in admission.forks:
                others.append(req)
            else:
                branches.append(req)
        branches.sort(key=lambda req: self._fork_of(req).arrival)
        if verifications or branches or admission.forks:
            running.batch_is_full = False  # a lease that ended gave room, without any request having left
        return Turn([*verifications, *branches, *others], withheld)

    def _admit(self, queue: Sequence[Any], running: Any, now: float) -> Admission:
        waiting: list[Waiting] = []
        seen: set[Any] = set()
        members: defaultdict[Any, list[Any]] = defaultdict(list)
        for req in queue:
            members[self._keys.get(req.rid)].append(req)
        for req in queue:
            fork = self.forks.of(req.rid)
            waited = now - self._since[req.rid]
            if fork is None:
                waiting.append(Waiting(req.rid, self._slots(req), False, waited))
            elif not (fork.admitted or fork.name in seen or req.rid in fork.verifying or len(seen) == MOST_BEGINNING):
                seen.add(fork.name)
                waiting.append(Waiting(fork.name, self._fork_slots(fork, members[fork.name]), True, waited))
        plain = next((one for one in waiting if not one.is_fork and one.waited_s >= PATIENCE_S), None)
        if plain is not None:
            unheard_since = None if plain.waited_s >= TURN_S else now - PATIENCE_S
            self._serve_plain(next(req for req in queue if req.rid == plain.name), running, unheard_since)
        if not seen:
            return Admission()
        admission = self._admit_of(waiting, running, now)
        plain_goes = any(not one.is_fork and one.name not in admission.behind for one in waiting)
        if not self._idle(running) or admission.forks or admission.first is None or plain_goes:
            return admission
        while self._room(running, now) < admission.first.slots and self._break(None, unheard_since=now - PATIENCE_S):
            pass
        return self._admit_of(waiting, running, now)

    def _admit_of(self, waiting: Sequence[Waiting], running: Any, now: float) -> Admission:
        alone = self._idle(running) and not self._locks and not any(fork.admitted and fork.live for fork in self.forks)
        return admit(waiting, self._room(running, now), self._capacity, alone=alone)

    def _serve_plain(self, req: Any, running: Any, unheard_since: float | None) -> None:
        """A plain request that waited long enough gets room, where leases are all that it waits for."""
        if self._scheduler.get_num_allocatable_reqs(len(running.reqs), running_batch=running) <= 0:
            return
        need = self._whole_need(req)
        short = need - (self._evictable_and_free - self._promised(running))
        locks = [self._locks[lease] for lease in self.forks.breakable(unheard_since)]
        if 0 < short <= sum(self._nodes_of(locks).values()) - surplus_of_locked(self._scheduler.tree_cache):
            self._make_room(need, running, spare=None, unheard_since=unheard_since)

    def _arrive(self, req: Any, now: float) -> None:
        state: BranchState = req.rksc
        options = state.options
        assert options.group is not None, "only requests of forks arrive here"
        key = ForkKey(options.group, *namespace_of(req))
        verifies = options.op == "verify"
        state.fork = self._keys[req.rid] = key
        self._do(self.forks.arrives(key, key.group, options.branch, options.branches, req.rid, now, verifies=verifies))
        fork = self.forks.of(req.rid)
        if fork is None:
            return
        state.arrival = fork.arrival
        if verifies:
            return
        ids = as_ids(req.origin_input_ids)
        first = self._first.setdefault(key, ids)
        self._own[req.rid] = len(ids) - common_beginning(first, ids)

    def _begin(self, reqs: Iterable[Any]) -> None:
        """Requests are scheduled, the first time or again: what was computed before is counted."""
        for req in reqs:
            state: BranchState | None = req.rksc
            if state is None or state.fork is None or req.rid in self._scheduled:
                continue
            self._scheduled.add(req.rid)
            self._since.pop(req.rid, None)
            now = self._last_now
            fork = self.forks.of(req.rid)
            self.forks.begins(req.rid, now)
            if fork is not None and fork.larger:
                state.memory["larger_than_pool"] = True
            if state.options.op == "verify":
                asked = min(MOST_QUESTION, req.extend_end - req.prefix_len)
                self._question = max(self._question or 0, asked)
            twice = self._twice(req, state)
            if twice > 0:
                if state.options.op == "verify":
                    state.memory["evicted_tokens"] = twice
                if self._counts:
                    counters().add(TOKENS_TWICE, twice, op=state.options.op)

    def _twice(self, req: Any, state: BranchState) -> int:
        """Tokens that a request computes now and that were computed before for its fork."""
        page = self._scheduler.page_size
        if state.blended or state.canonical_tokens or state.fork is None:
            return 0
        if req.rid in self._retracted:
            self._retracted.discard(req.rid)
            known = len(req.origin_input_ids) + len(req.output_ids) - 1
        else:
            known = self._computed.known(state.fork, state.options.branch, as_ids(req.origin_input_ids))
        known = min(known, len(req.origin_input_ids) + len(req.output_ids) - 1) // page * page
        return max(0, known - req.prefix_len)

    # -- what SGLang did -------------------------------------------------------------------------------

    def note_results(self, batch: Any) -> None:
        """The results of a batch were processed."""
        for req in batch.reqs:
            state: BranchState | None = req.rksc
            if state is None or state.fork is None or req.rid not in self._keys:
                continue
            if req.finished():
                self.note_end(req)
            elif batch.forward_mode.is_extend() and len(req.output_ids) and not state.is_leaving:
                self._note_computed(req, state.fork)

    def _note_computed(self, req: Any, key: ForkKey) -> None:
        if not req.rksc.blended and req.rksc.options.op == "branch":
            self._computed.note_prompt(key, as_ids(req.origin_input_ids))
            self._do(self.forks.computed(req.rid, self._last_now), req, as_ids(req.origin_input_ids))

    def note_end(self, req: Any, *, aborted: bool | None = None) -> None:
        """A request is over, wherever it was."""
        from sglang.srt.managers.schedule_batch import FINISH_ABORT

        key = self._keys.pop(req.rid, None)
        if key is None:
            return
        self._own.pop(req.rid, None)
        self._scheduled.discard(req.rid)
        self._retracted.discard(req.rid)
        if aborted is None:
            aborted = isinstance(req.finished_reason, FINISH_ABORT)
        ids = as_ids(req.origin_input_ids) + as_ids(req.output_ids)
        written = ids[: len(ids) - 1] if len(req.output_ids) else ids
        if not aborted and req.rksc.options.op == "branch":
            if not req.rksc.blended:
                self._computed.note_prompt(key, as_ids(req.origin_input_ids))
            if self.forks.of(req.rid) is not None:
                self._computed.note_branch(key, req.rksc.options.branch, written)
        self._do(self.forks.ends(req.rid, self._last_now, aborted=aborted), req, written)

    def note_retracted(self, reqs: Iterable[Any]) -> None:
        """SGLang took the KV of requests; they wait again."""
        for req in reqs:
            if req.rid in self._keys:
                self._scheduled.discard(req.rid)
                self._retracted.add(req.rid)

    def end(self, group: str) -> None:
        """A client says that its fork has ended."""
        self._do(self.forks.end(group))

    def idle(self) -> None:
        """Nothing runs: what has waited too long ends, and requests that left unseen do too."""
        if not len(self.forks):
            return
        now = self._now()
        self._do(self.forks.expire(now))
        if self._scheduler.is_fully_idle():
            for rid in [rid for fork in self.forks for rid in fork.live]:
                logger.warning("rksc: request %s of a fork is nowhere any more; what was kept for it ends", rid)
                self._keys.pop(rid, None)
                self._scheduled.discard(rid)
                self._do(self.forks.ends(rid, now, aborted=True))

    def flushed(self) -> None:
        """The tree is about to be emptied, and its locks with it."""
        self._locks.clear()
        self._computed.clear()
        self._do(self.forks.flushed())

    # -- room ------------------------------------------------------------------------------------------

    def give_way(self) -> bool:
        """Something that runs needs slots, and unleased KV does not do: end one lease. False where there is none."""
        return self._break(None)

    def _make_room(self, slots: int, running: Any, spare: Any, unheard_since: float | None = None) -> bool:
        """Break leases until so many slots are there for what waits; whether any was."""
        broken = False
        while self._evictable_and_free - self._promised(running) <= slots:
            if not self._break(spare, unheard_since=unheard_since):
                break
            broken = True
        if broken:
            running.batch_is_full = False
        return broken

    def _break(self, spare: Any, *, unheard_since: float | None = None) -> bool:
        """End the lease that is worth least; False where there is none."""
        release = self.forks.break_first(spare, unheard_since=unheard_since)
        if release is None:
            return False
        fork = self.forks.named(release.lease.fork)
        assert fork is not None
        what = "what its branches have in common" if release.lease.branch is None else f"branch {release.lease.branch}"
        logger.warning("rksc: no room: %s of fork %s is not kept any more", what, fork.group)
        self._do([release])
        return True

    @property
    def _capacity(self) -> int:
        return int(self._scheduler.max_total_num_tokens)

    @property
    def _evictable_and_free(self) -> int:
        allocator, tree = self._scheduler.token_to_kv_pool_allocator, self._scheduler.tree_cache
        return int(allocator.available_size() + tree.evictable_size())

    def _room(self, running: Any, now: float) -> int:
        """Slots that are neither used, nor leased, nor promised."""
        admitted = [fork for fork in self.forks if fork.admitted and not fork.is_unheard(now - PATIENCE_S)]
        promised = self._promised(running)
        for fork in admitted:
            beginning, branch = self._costs.get(fork.name, (0, 0))  # type: ignore[call-overload]
            waiting = sum(rid not in self._scheduled and rid not in fork.verifying for rid in fork.live)
            unborn = max(0, fork.unstarted - sum(1 for rid in fork.live if self._is_new(fork, rid)))
            promised += (waiting + unborn) * branch + (0 if fork.begun else beginning)
        branches = max((fork.branches for fork in self.forks), default=0)
        asked = FIRST_QUESTION if self._question is None else self._question
        return self._evictable_and_free - promised - branches * (asked + self._scheduler.page_size)

    @staticmethod
    def _is_new(fork: Fork, rid: str) -> bool:
        """Whether a live request is the first of its branch."""
        return rid not in fork.verifying and fork.live[rid] not in fork.begun

    def _promised(self, running: Any) -> int:
        """Slots that what runs may still take, by SGLang's estimate."""
        reqs = [*running.reqs]
        chunked = self._scheduler.chunked_req
        promised = sum(self._new_tokens(req) for req in reqs)
        if chunked is not None:
            promised += self._new_tokens(chunked) + len(chunked.origin_input_ids) - chunked.prefix_len
        return promised

    def _new_tokens(self, req: Any) -> int:
        from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

        params = req.sampling_params
        ratio = 1.0 if params.ignore_eos else self._scheduler.new_token_ratio_tracker.current
        left = min(max(0, params.max_new_tokens - len(req.output_ids)), CLIP_MAX_NEW_TOKENS)
        return int(left * ratio) + self._scheduler.page_size

    def _slots(self, req: Any) -> int:
        """What a waiting request needs, by the estimate that SGLang has of one that runs."""
        return len(req.origin_input_ids) + len(req.output_ids) + self._new_tokens(req)

    def _whole_need(self, req: Any) -> int:
        """What SGLang wants to find for a request before it schedules it, beside what the tree has of it."""
        from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

        left = min(max(0, req.sampling_params.max_new_tokens - len(req.output_ids)), CLIP_MAX_NEW_TOKENS)
        tokens = len(req.origin_input_ids) + len(req.output_ids)
        matched, _ = self._match(as_ids(req.origin_input_ids) + as_ids(req.output_ids), req)
        return int(tokens - min(matched, tokens - 1) + left + self._scheduler.page_size)

    def _fork_slots(self, fork: Fork, members: Sequence[Any]) -> int:
        """What a fork needs from its beginning to its end, without verification."""
        page = self._scheduler.page_size
        there = [req for req in members if req.rid not in fork.verifying]
        first = self._first[fork.name]  # type: ignore[index]
        own = [self._own.get(req.rid, 0) for req in there]
        branch = max(self._new_tokens(req) for req in there) + (-(-sum(own) // max(1, len(own) - 1)) if own else 0)
        running = [one for one in self.forks if one.admitted and None in one.leases][-COMPARED_FORKS:]
        beginnings = [self._computed.beginning(one.name) for one in running]  # type: ignore[arg-type]
        shared = max((common_beginning(one, first) for one in beginnings if one is not None), default=0)
        beginning = len(first) - shared + page
        self._costs[fork.name] = (beginning, branch)  # type: ignore[index]
        return beginning + fork.branches * branch

    def _idle(self, running: Any) -> bool:
        """Whether nothing runs, and no result is on its way."""
        scheduler = self._scheduler
        last = scheduler.last_batch
        return (
            running.is_empty()
            and scheduler.chunked_req is None
            and (last is None or last.is_empty() or all(req.finished() for req in last.reqs))
            and not getattr(scheduler, "result_queue", ())
        )

    # -- leases ----------------------------------------------------------------------------------------

    def _do(self, actions: Sequence[Action], req: Any = None, ids: array[int] | None = None) -> None:
        tree = self._scheduler.tree_cache
        for action in actions:
            if isinstance(action, Take):
                assert req is not None and ids is not None, "a lease is taken on a request's KV"
                matched, node = self._match(ids, req)
                before = self._locks.pop(action.lease, None)
                if matched:
                    self._locks[action.lease] = tree.lock(node)
                    if before is None and self._counts:
                        counters().add(LEASES)
                else:
                    self.forks.nothing_kept(action.lease)
                tree.unlock(before)
                continue
            tree.unlock(self._locks.pop(action.lease, None))
            if self._counts:
                counters().add(LEASES_ENDED, reason=action.why)
        self._forget_forks(actions)

    def _forget_forks(self, actions: Sequence[Action]) -> None:
        for action in actions:
            name = action.lease.fork
            if isinstance(action, Take) or self.forks.named(name) is not None:
                continue
            self._first.pop(name, None)  # type: ignore[call-overload]
            self._costs.pop(name, None)  # type: ignore[call-overload]
            if action.why in (ENDED, REUSED):
                self._computed.forget(name)  # type: ignore[arg-type]

    def _match(self, ids: array[int], req: Any) -> tuple[int, Any]:
        """How much of a prompt the tree has on the device, and the node in which that ends."""
        from sglang.srt.mem_cache.radix_cache import RadixKey

        key = RadixKey(ids, extra_key=req.extra_key, cache_salt=req.cache_salt)
        matched, node, _ = self._scheduler.tree_cache.tree_core.match_full_device_prefix(key)
        return matched, node

    def leased_tokens(self) -> int:
        """Slots that leases hold, each counted once."""
        return max(0, sum(self.leased_nodes().values()) - surplus_of_locked(self._scheduler.tree_cache))

    def leased_nodes(self) -> dict[int, int]:
        """The tree's nodes that leases hold, and their tokens."""
        return self._nodes_of(self._locks.values())

    def _nodes_of(self, locks: Iterable[Any]) -> dict[int, int]:
        paths = self._scheduler.tree_cache.tree_core.collect_path_info([lock.node for lock in locks])
        return {step.node_id: step.path_end - step.path_start for path in paths for step in path}

    def ends_of_leases(self) -> dict[int, list[str]]:
        """By node: what is leased that ends there, in words."""
        found: dict[int, list[str]] = {}
        for lease, lock in self._locks.items():
            fork = self.forks.named(lease.fork)
            what = "beginning" if lease.branch is None else f"branch {lease.branch}"
            found.setdefault(lock.node, []).append(f"{what} of {'?' if fork is None else fork.group}")
        return found

    def described(self) -> dict[str, int]:
        """For ``/rksc/stats``."""
        return {
            "forks": sum(fork.admitted for fork in self.forks),
            "waiting": sum(not fork.admitted for fork in self.forks),
            "leases": len(self._locks),
            "leased_tokens": self.leased_tokens(),
        }

    # -- time ------------------------------------------------------------------------------------------

    def _now(self) -> float:
        """Seconds, the same on all ranks that schedule the same requests."""
        now, group = time.monotonic(), self._scheduler.attn_tp_group
        if group.world_size > 1:
            told = torch.tensor([now], dtype=torch.float64)
            torch.distributed.broadcast(told, src=group.ranks[0], group=group.cpu_group)
            now = float(told.item())
        self._last_now = now
        return now

    def _fork_of(self, req: Any) -> Fork:
        fork = self.forks.of(req.rid)
        assert fork is not None
        return fork


def _group(req: Any) -> str | None:
    return None if req.rksc is None else req.rksc.options.group


def refusal_of_keeping(scheduler: Any) -> str:
    """Why forks are not kept on this server; empty where they are."""
    return "off: --rksc-lease-seconds is 0" if lease_seconds() == 0.0 else refusal_of_memory(scheduler)


_keepers: WeakKeyDictionary[Any, Keeper | None] = WeakKeyDictionary()
_by_tree: WeakKeyDictionary[Any, Keeper] = WeakKeyDictionary()


def known_keeper_of(scheduler: Any) -> Keeper | None:
    """The keeper of a scheduler; None while no fork was there, and where forks are not kept."""
    return _keepers.get(scheduler)


def described(scheduler: Any) -> dict[str, Any]:
    """What is kept of forks, as plain values; ``refusal`` says why nothing is."""
    keeper = known_keeper_of(scheduler)
    if keeper is not None:
        return {"refusal": None, **keeper.described()}
    return {"refusal": refusal_of_keeping(scheduler) or None, "forks": 0, "waiting": 0, "leases": 0, "leased_tokens": 0}


def keeper_of_tree(tree_cache: Any) -> Keeper | None:
    """The keeper whose leases are in a tree; None where there is none."""
    return _by_tree.get(tree_cache)


def keeper_for(scheduler: Any, queue: Iterable[Any]) -> Keeper | None:
    """The keeper of a scheduler, made when the first branch of a fork waits in it."""
    if scheduler not in _keepers and any(_group(req) is not None for req in queue):
        refusal = refusal_of_keeping(scheduler)
        if refusal:
            logger.info("rksc: forks are not kept under memory pressure: %s", refusal)
            _keepers[scheduler] = None
        else:
            _keepers[scheduler] = _by_tree[scheduler.tree_cache] = Keeper(scheduler)
    return _keepers.get(scheduler)
