"""The keeper of forks on SGLang's real tree and allocator, under a scheduler that is small enough to take any course.

The scheduler here does with requests what SGLang's does with their KV: match, lock, evict, prefill, decode one token a
step, retract, finish. After every step each slot must be free, in the tree, or a running request's own; where slots are
shared, as blends do it, several of these own one, and none is free before all have let go of it.
"""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from rksc_sgl.memory.retraction import order_to_keep, retracted_together
from rksc_sgl.memory.shared_slots import SharedSlots
from rksc_sgl.options import RequestOptions
from rksc_sgl.sglang_plugin.branch_state import BranchState

pytestmark = pytest.mark.slow  # imports SGLang

PREFIX, NEW, QUESTION = 12, 5, 3


class Scheduler:
    """As much of SGLang's as the keeper asks."""

    page_size = 1
    chunked_req = None
    result_queue = ()

    def __init__(self, tree: Any, allocator: Any, pool: int) -> None:
        self.tree_cache, self.token_to_kv_pool_allocator, self.max_total_num_tokens = tree, allocator, pool
        self.waiting_queue: list[Any] = []
        self.last_batch = None
        self.attn_tp_group = SimpleNamespace(world_size=1)
        self.new_token_ratio_tracker = SimpleNamespace(current=0.3)

    def get_num_allocatable_reqs(self, running_bs: int, running_batch: Any) -> int:
        return 100

    def is_fully_idle(self) -> bool:
        return not self.waiting_queue


class Batch:
    forward_mode = SimpleNamespace(is_extend=lambda: True)

    def __init__(self, reqs: list[Any]) -> None:
        self.reqs, self.batch_is_full = reqs, False

    def is_empty(self) -> bool:
        return not self.reqs


class Req:
    """A request: ids, what it may generate, and where its KV is."""

    chunked_req = None
    extra_key = cache_salt = lora_id = beam_group = None

    def __init__(self, rid: str, ids: list[int], new: int, options: dict[str, Any] | None) -> None:
        self.rid, self.origin_input_ids, self.output_ids = rid, array("q", ids), array("q")
        self.sampling_params = SimpleNamespace(max_new_tokens=new, ignore_eos=True)
        self.rksc = None if options is None else BranchState(RequestOptions(**options))
        self.prefix_len = self.extend_end = 0
        self.lock: Any = None
        self.own: list[int] = []
        self.finished_reason: Any = None

    def finished(self) -> bool:
        return self.finished_reason is not None

    @property
    def ids(self) -> array[int]:
        return self.origin_input_ids + self.output_ids


class World:
    """A pool, its tree, a keeper, and what a scheduler does."""

    def __init__(self, pool: int, core: str, seed: int = 0, shares: bool = False) -> None:
        import torch
        from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        from rksc_sgl.sglang_plugin.memory import keeper

        self.pool, self.source, self.now, self.counter = pool, random.Random(seed), 0.0, 0
        self.allocator = TokenToKVPoolAllocator(pool, torch.float32, "cpu", None, False)
        self.tree = UnifiedRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=None,
                token_to_kv_pool_allocator=self.allocator,
                page_size=1,
                tree_components=(ComponentType.FULL,),
                tree_core_backend=core,
            )
        )
        self.scheduler = Scheduler(self.tree, self.allocator, pool)
        self.keeper = keeper._by_tree[self.tree] = keeper.Keeper(self.scheduler, 30.0)
        self.keeper._now = self._clock  # type: ignore[method-assign]
        self.running = Batch([])
        self.finished: dict[str, Req] = {}
        self.retractions: list[list[str]] = []
        self.shared, self.most_surplus = self._share_slots() if shares else None, 0

    def _share_slots(self) -> SharedSlots:
        """The hooks on allocator and tree, on these two alone."""
        from rksc_sgl.sglang_plugin.memory import slots

        allocator, tree, free, clear = self.allocator, self.tree, self.allocator.free, self.allocator.clear
        shared = slots._shared[allocator] = SharedSlots(self.pool, "cpu")
        allocator.free = lambda index: slots.free_unowned(lambda _, some: free(some), allocator, index)
        allocator.clear = lambda: (slots.forget_owners(allocator), clear())
        tree.evictable_size = lambda: slots.evictable_slots(tree.tree_core.evictable_size(), tree)
        tree.protected_size = lambda: slots.protected_slots(tree.tree_core.protected_size(), tree)
        return shared

    def _clock(self) -> float:
        self.keeper._last_now = self.now
        return self.now

    # -- clients ---------------------------------------------------------------------------------------

    def ask(self, ids: list[int], new: int, **options: Any) -> Req:
        self.counter += 1
        req = Req(f"r{self.counter}", ids, new, options or None)
        self.scheduler.waiting_queue.append(req)
        return req

    def branch(self, fork: int, branch: int, branches: int = 3, new: int = NEW) -> Req:
        ids = [1000 + fork] * PREFIX
        return self.ask(ids, new, group=f"f{fork}", branch=branch, branches=branches)

    def verify(self, req: Req, branches: int = 3) -> Req:
        options = req.rksc.options
        question = [self.source.randrange(100) for _ in range(QUESTION)]
        return self.ask(
            [*req.ids, *question], 1, group=options.group, branch=options.branch, branches=branches, op="verify"
        )

    def abort(self, req: Req) -> None:
        from sglang.srt.managers.schedule_batch import FINISH_ABORT

        if req in self.scheduler.waiting_queue:
            self.scheduler.waiting_queue.remove(req)
            self.keeper.note_end(req, aborted=True)
        elif req in self.running.reqs:
            self._finish(req, FINISH_ABORT())

    # -- what SGLang does --------------------------------------------------------------------------------

    def room(self) -> int:
        ratio = self.scheduler.new_token_ratio_tracker.current
        left = [
            (req.sampling_params.max_new_tokens - len(req.output_ids))
            * (1.0 if req.sampling_params.ignore_eos else ratio)
            for req in self.running.reqs
        ]
        return int(self.allocator.available_size() + self.tree.evictable_size() - sum(left))

    def step(self) -> None:
        """Schedule, decode, check."""
        if not self._prefill():
            self._decode()
        self.check()

    def _prefill(self) -> bool:
        queue = self.scheduler.waiting_queue
        turn = self.keeper.turn(self.running)
        allowed = list(queue) if turn is None else turn.queue
        begun = self._admit(allowed)
        if turn is not None and self.keeper.after(Batch(begun) if begun else None, allowed, self.running):
            begun = self._admit(allowed)
            self.keeper.after(Batch(begun) if begun else None, (), self.running)
        elif turn is None and begun:
            self.keeper._begin(begun)
        self.scheduler.waiting_queue = [req for req in queue if req not in begun]
        for req in begun:
            self._compute(req)
        self.keeper.note_results(Batch(begun))
        return bool(begun)

    def _admit(self, allowed: list[Req]) -> list[Req]:
        begun: list[Req] = []
        for req in allowed:
            matched, node = self.keeper._match(req.ids[:-1], req)
            lock = self.tree.lock(node)
            left = req.sampling_params.max_new_tokens - len(req.output_ids)
            extend = len(req.ids) - matched
            if extend + left + 1 >= self.room():
                self.tree.unlock(lock)
                break
            req.lock, req.prefix_len, req.extend_end = lock, matched, len(req.ids)
            req.own = self._alloc(extend)
            self.running.reqs.append(req)
            begun.append(req)
        return begun

    def _alloc(self, tokens: int) -> list[int]:
        self._evict(tokens)
        slots = self.allocator.alloc(tokens)
        assert slots is not None, "what was admitted has its slots"
        return slots.tolist()

    def _evict(self, tokens: int) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        from rksc_sgl.sglang_plugin.memory.seams import evict_with_leases

        short = tokens - self.allocator.available_size()
        if short > 0:
            evict = lambda tree, params, **kwargs: UnifiedRadixCache.evict_for_alloc(tree, params, **kwargs)  # noqa: E731
            evict_with_leases(evict, self.tree, EvictParams(num_tokens=short))

    def _compute(self, req: Req) -> None:
        if self.shared is not None and self.source.random() < 0.6:
            self._use_slots_of_others(req, self.shared)
        self._publish(req, req.ids)
        req.output_ids.append(self.source.randrange(100))
        if len(req.output_ids) >= req.sampling_params.max_new_tokens:
            self._finish(req, "length")

    def _use_slots_of_others(self, req: Req, shared: SharedSlots) -> None:
        """Some of what a request computed is another's now, as with a blend."""
        import torch

        from rksc_sgl.sglang_plugin.tree import resident_slots

        donor = self.source.choice([*self.running.reqs, *list(self.finished.values())[-6:]])
        before = resident_slots(self.tree, req.ids[: req.prefix_len], None, None).tolist()
        theirs = sorted(set(resident_slots(self.tree, donor.ids, None, None).tolist()) - {*before, *req.own})
        count = self.source.randint(0, min(len(req.own) - 1, len(theirs)))
        places, taken = self.source.sample(range(len(req.own)), count), self.source.sample(theirs, count)
        shared.share(torch.tensor(taken, dtype=torch.int64))
        self.allocator.free(torch.tensor([req.own[place] for place in places], dtype=torch.int64))
        for place, slot in zip(places, taken, strict=True):
            req.own[place] = slot

    def _publish(self, req: Req, ids: array[int]) -> None:
        """The tree takes over what a request computed of these ids."""
        import torch
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        value = torch.tensor([0] * req.prefix_len + req.own, dtype=torch.int64)
        assert len(value) == len(ids)
        self.tree.insert(InsertParams(key=RadixKey(ids), value=value, prev_prefix_len=req.prefix_len))
        matched, node = self.keeper._match(ids, req)
        assert matched == len(ids)
        before, req.lock, req.own, req.prefix_len = req.lock, self.tree.lock(node), [], len(ids)
        self.tree.unlock(before)

    def _decode(self) -> None:
        reqs = list(self.running.reqs)
        arrivals = [req.rksc.arrival if req.rksc else None for req in reqs]
        order = order_to_keep(sorted(range(len(reqs)), key=lambda at: -len(reqs[at].output_ids)), arrivals)
        retracted: list[int] = []
        while order:
            self._evict(len(order))
            if self.allocator.available_size() >= len(order):
                break
            if len(order) == 1:  # as SGLang: the last one is aborted
                self.abort(reqs[order.pop()])
                break
            retracted.append(order.pop())
            self._release(reqs[retracted[-1]])
        if retracted:
            follow = retracted_together([arrivals[place] for place in retracted], [arrivals[place] for place in order])
            for place in follow:
                self._release(reqs[order[place]])
            gone = [reqs[place] for place in (*retracted, *(order[place] for place in follow))]
            self.retractions.append([req.rid for req in gone])
            self.keeper.note_retracted(gone)
            self.running.reqs = [req for req in self.running.reqs if req not in gone]
            self.scheduler.waiting_queue += gone
        for req in list(self.running.reqs):
            req.own += self._alloc(1)
            req.output_ids.append(self.source.randrange(100))
            if len(req.output_ids) >= req.sampling_params.max_new_tokens:
                self._finish(req, "length")

    def _release(self, req: Req) -> None:
        import torch

        self.allocator.free(torch.tensor(req.own, dtype=torch.int64))
        self.tree.unlock(req.lock)
        req.own, req.lock, req.prefix_len = [], None, 0

    def _finish(self, req: Req, why: Any) -> None:
        self._publish(req, req.ids[: req.prefix_len + len(req.own)])
        self.tree.unlock(req.lock)
        req.lock = None
        self.running.reqs.remove(req)
        req.finished_reason = why
        self.finished[req.rid] = req
        self.keeper.note_results(Batch([req]))

    def check(self) -> None:
        held = sum(len(req.own) for req in self.running.reqs)
        if self.shared is not None:
            self.most_surplus = max(self.most_surplus, self.shared.surplus)
        tree = self.tree.evictable_size() + self.tree.protected_size()
        assert self.allocator.available_size() + tree + held == self.pool, "a slot is lost or has two owners"
        locks = {lease for lease in self.keeper._locks}
        assert locks == set(self.keeper.forks.leases), "every lease is a lock, and every lock a lease"
        if not self.running.reqs:
            assert self.tree.protected_size() == self.keeper.leased_tokens()

    def until(self, req: Req, steps: int = 400) -> Req:
        for _ in range(steps):
            if req.rid in self.finished:
                return req
            self.step()
            self.now += 0.1
        raise AssertionError(f"{req.rid} did not end")


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is no rank of a server."""
    from rksc_sgl.sglang_plugin.memory import keeper

    monkeypatch.setattr(keeper, "counts_here", lambda: True)


@pytest.fixture(params=["rust", "python"])
def core(request: pytest.FixtureRequest) -> str:
    return request.param


def test_what_is_leased_is_not_evicted_and_what_is_not_is(core: str) -> None:
    world = World(100, core)
    ended = world.until(world.branch(1, 0))
    plain = world.until(world.ask([7] * 30, 2))
    for number in range(5):
        world.until(world.ask([50 + number] * 30, 2))
    assert world.keeper._match(ended.ids, ended)[0] == len(ended.ids) - 1
    assert world.keeper._match(plain.ids, plain)[0] == 0
    verification = world.until(world.verify(ended))
    assert "evicted_tokens" not in verification.rksc.memory


def test_a_verification_whose_branch_was_evicted_says_so(core: str) -> None:
    world = World(60, core)
    ended = world.until(world.branch(1, 0, branches=1))
    world.now += 31.0  # its lease expires
    for number in range(4):
        world.until(world.ask([50 + number] * 40, 2))
    verification = world.until(world.verify(ended, branches=1))
    assert verification.rksc.memory == {"evicted_tokens": len(ended.ids) - 1}


def test_forks_that_do_not_fit_together_run_one_after_the_other_and_compute_nothing_twice(core: str) -> None:
    from rksc_sgl.metrics import TOKENS_TWICE, counters

    before = sum(one["value"] for one in counters().snapshot()[TOKENS_TWICE])
    world = World(60, core)  # a fork needs 12 + 3 * (5 + 1), and 3 * 4 for its verifications
    forks = [[world.branch(fork, branch) for branch in range(3)] for fork in range(5)]
    for branches in forks:
        for req in branches:
            world.until(req)
        for verification in [world.verify(req) for req in branches]:
            world.until(verification)
    assert sum(one["value"] for one in counters().snapshot()[TOKENS_TWICE]) == before
    assert not len(world.keeper.forks)


def test_a_fork_that_is_larger_than_the_pool_is_served_and_says_so(core: str) -> None:
    world = World(40, core)
    branches = [world.branch(1, branch, branches=8) for branch in range(8)]
    for req in branches:
        world.until(req)
    assert branches[0].rksc.memory["larger_than_pool"]


def test_a_plain_request_waits_for_leases_no_longer_than_it_must(core: str) -> None:
    world = World(60, core)
    for branch in range(3):
        world.until(world.branch(1, branch, branches=4))
    running = world.ask([3] * 4, 29)
    world.step()
    plain, came = world.ask([9] * 15, 2), world.now
    world.until(plain)
    assert 2.0 <= world.now - came < 2.5
    assert running.rid not in world.finished, "it did not just wait for another to end"


def test_branches_of_the_fork_that_came_last_are_retracted_together(core: str) -> None:
    world = World(64, core)
    asked = [world.branch(fork, branch, branches=2, new=20) for fork in (1, 2) for branch in range(2)]
    for req in asked:
        req.sampling_params.ignore_eos = False
    world.keeper._question, world.scheduler.new_token_ratio_tracker.current = 0, 0.1  # an estimate that is too low
    for req in asked:
        world.until(req)
    assert set(world.retractions[0]) == {req.rid for req in asked[2:]}
    assert {req.finished_reason for req in asked} == {"length"}


@pytest.mark.parametrize("shares", [False, True], ids=["one owner", "several owners"])
@pytest.mark.parametrize("seed", range(2))
def test_in_ten_thousand_random_steps_no_slot_is_lost_and_everybody_is_served(
    core: str, seed: int, shares: bool
) -> None:
    world = World(90, core, seed, shares)
    source, asked = world.source, []
    for number in range(2500):
        world.now += source.choice([0.0, 0.05, 0.3])
        dice = source.random()
        if dice < 0.25 and len(world.scheduler.waiting_queue) < 40:
            fork = number // 60 + source.randrange(2)
            asked.append(world.branch(fork, source.randrange(3), new=source.randrange(1, 9)))
        elif dice < 0.35 and world.finished:
            ended = source.choice(list(world.finished.values())[-20:])
            if ended.rksc is not None and ended.rksc.options.op == "branch" and ended.finished_reason == "length":
                asked.append(world.verify(ended))
        elif dice < 0.42:
            asked.append(world.ask([source.randrange(50)] * source.randrange(1, 60), source.randrange(1, 8)))
        elif dice < 0.46 and asked:
            world.abort(source.choice(asked[-10:]))
        elif dice < 0.47:
            world.keeper.end(f"f{number // 60}")
        elif dice < 0.475 and not world.running.reqs:
            world.keeper.flushed()
            world.tree.reset()
            world.allocator.clear()
        world.step()
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    for _ in range(4000):
        if not world.scheduler.waiting_queue and not world.running.reqs:
            break
        world.step()
        world.now += 0.1
    assert not world.scheduler.waiting_queue, "nobody waits for ever"
    world.now += 60.0
    world.keeper.idle()
    world.check()
    assert world.tree.protected_size() == 0
    if world.shared is not None:
        assert world.most_surplus > 30, "slots were shared"
        world.tree.evict(EvictParams(num_tokens=10 * world.pool))
        assert world.allocator.available_size() == world.pool and world.shared.surplus == 0
