"""What the queue decides in one scheduling step, on doubles of SGLang's scheduler and requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from rksc_sgl.donors.forks import NEXT_S
from rksc_sgl.options import RequestOptions
from rksc_sgl.sglang_plugin.branch_state import BranchState, Phase
from rksc_sgl.sglang_plugin.inspection.report import request_report
from rksc_sgl.sglang_plugin.placing import queue as queue_module
from rksc_sgl.sglang_plugin.placing.queue import PlacingQueue
from rksc_sgl.support import Facts, offers_of

PASS = 30  # tokens that a pass costs
PLAIN = Facts()
Made = Callable[..., PlacingQueue]


class Runner(SimpleNamespace):
    """A double that can be a key, as SGLang's ``ModelRunner`` can."""

    __hash__ = object.__hash__


@pytest.fixture
def queue_with(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Makes the queue of a scheduler with an empty tree, in which these requests wait."""
    monkeypatch.setenv("RKSC_PASS_TOKENS", str(PASS))
    monkeypatch.setattr(queue_module, "resident_tokens", lambda tree, ids, namespace: 0)

    def made(*requests: Any, facts: Facts = PLAIN, allow_untested: bool = False) -> PlacingQueue:
        offers = offers_of(facts, allow_untested=allow_untested)
        monkeypatch.setattr(queue_module, "offers_by", lambda scheduler: offers)
        config = SimpleNamespace(num_hidden_layers=6, vocab_size=512)
        scheduler = SimpleNamespace(
            tp_worker=SimpleNamespace(model_runner=Runner(model_config=config, device="cpu")),
            tree_cache=None,
            token_to_kv_pool_allocator=Runner(),
            model_config=SimpleNamespace(context_len=2048),
            tokenizer=None,
            page_size=1,
            waiting_queue=list(requests),
            chunked_req=None,
        )
        return PlacingQueue(scheduler)

    return made


def request(rid: str, ids: list[int], **options: Any) -> Any:
    made = SimpleNamespace(
        rid=rid,
        origin_input_ids=ids,
        output_ids=[],
        cached_tokens=0,
        return_logprob=False,
        return_hidden_states=False,
        sampling_params=SimpleNamespace(max_new_tokens=16),
        **dict.fromkeys(("extra_key", "cache_salt", "lora_id", "session", "beam_group")),
        **dict.fromkeys(("multimodal_inputs", "input_embeds", "positional_embed_overrides")),
        finished=lambda: False,
    )
    made.rksc = BranchState(RequestOptions(**options))
    return made


def branches(count: int, common: int, **options: Any) -> list[Any]:
    """Branches of one fork: so many tokens in common, and five of their own."""
    asked = {"group": "fork", "branches": 16, "share": "exact", **options}
    return [
        request(f"branch {index}", [*range(common), *[400 + index] * 5], branch=index, **asked)
        for index in range(count)
    ]


@pytest.mark.parametrize(("count", "common", "held"), [(2, PASS, 1), (2, PASS - 1, 0), (4, 10, 3), (4, 9, 0)])
def test_siblings_wait_where_what_they_save_without_the_anchor_is_worth_a_pass(
    queue_with: Made, count: int, common: int, held: int
) -> None:
    """The anchor, placed in the same step, saves nothing and is not counted."""
    waiting = branches(count, common)
    assert len(queue_with(*waiting).place()) == held
    assert [one.rksc.phase is Phase.HELD for one in waiting] == [False, *[held > 0] * (count - 1)]


@pytest.mark.parametrize(("shares", "anchor"), [(True, "branch 2"), (False, "branch 0")])
def test_where_slots_are_shared_the_longest_of_those_that_arrive_together_is_the_anchor(
    queue_with: Made, shares: bool, anchor: str
) -> None:
    waiting = branches(4, 400, share="blend")
    for branch, opening in zip(waiting, (8, 30, 40, 20), strict=True):
        branch.origin_input_ids[:0] = range(1000 + 100 * opening, 1000 + 100 * opening + opening)
    queue = queue_with(*waiting)
    queue.shares_slots = shares
    queue.place()
    assert [one.rid for one in waiting if one.rksc.phase is Phase.PLACED] == [anchor]
    assert [one.rid for one in queue.scheduler.waiting_queue] == [f"branch {index}" for index in range(4)]


def test_the_first_of_a_fork_wait_a_moment_for_those_that_come_with_them(
    queue_with: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(queue_module.time, "monotonic", lambda: now[0])
    first, longer, *rest = branches(5, 400, share="blend", branches=5)
    longer.origin_input_ids[:0] = range(1000, 1040)
    queue = queue_with(first)
    queue.shares_slots = queue.awaits = True
    assert queue.place() == {first.rid} and first.rksc.phase is Phase.NEW
    now[0] += NEXT_S / 2
    queue.scheduler.waiting_queue.append(longer)
    assert queue.place() == {first.rid, longer.rid}
    now[0] += 2 * NEXT_S  # nobody came in the meantime
    assert queue.place() == {first.rid} and longer.rksc.phase is Phase.PLACED, "its shorter sibling waits for its KV"
    queue.scheduler.waiting_queue.extend(rest)
    queue.place()
    assert all(one.rksc.phase is Phase.HELD for one in (first, *rest)), "these wait for the anchor, and not for others"


def test_where_all_of_a_fork_are_there_nobody_waits_for_more(queue_with: Made) -> None:
    waiting = branches(3, 400, share="blend", branches=3)
    queue = queue_with(*waiting)
    queue.shares_slots = queue.awaits = True
    queue.place()
    assert waiting[0].rksc.phase is Phase.PLACED
    short = branches(1, 40, share="blend", branches=3)
    queue = queue_with(*short)
    queue.shares_slots = queue.awaits = True
    queue.place()
    assert short[0].rksc.phase is Phase.PLACED, "its prefill takes no longer than the moment"


def test_only_branches_of_the_same_fork_and_namespace_count_as_siblings(queue_with: Made) -> None:
    fork = branches(2, PASS - 1)
    verification = request("verification", [7] * 50, op="verify", group="fork")
    other = request("other tenant", [7] * 50, group="fork", share="exact")
    other.extra_key = "tenant"
    assert queue_with(*fork, verification, other).place() == set()


@pytest.mark.parametrize("share", ["exact", "auto", "blend", "merge"])
def test_a_request_is_told_what_of_that_it_asked_for_is_offered_untested(queue_with: Made, share: str) -> None:
    (waiting,) = branches(1, PASS, share=share)
    queue_with(waiting, facts=replace(PLAIN, lora=True), allow_untested=True).place()
    told = request_report(waiting).get("warnings", [])
    name = {"blend": "a blend", "merge": "a merge"}.get(share)
    assert told == ([f"{name} was not run with this adapter (LoRA)"] if name else [])


def test_a_verification_is_told_of_an_untested_exit_only_where_it_may_leave(queue_with: Made) -> None:
    asked = [request("may", [7] * 50, op="verify"), request("may not", [7] * 50, op="verify", exit="off")]
    queue_with(*asked, facts=replace(PLAIN, lora=True), allow_untested=True).place()
    told = [request_report(one).get("warnings") for one in asked]
    assert told == [["an early exit was not run with this adapter (LoRA)"], None]
    assert not any(one.rksc.exit_refusal for one in asked)


def test_a_verification_is_told_why_its_server_refuses_exits(queue_with: Made) -> None:
    refused = request("refused", [7] * 50, op="verify")
    queue_with(refused, facts=replace(PLAIN, lora=True)).place()
    report = request_report(refused)
    assert report["exit"]["rule"] is None and "adapter (LoRA)" in report["exit"]["reason"]
    assert "warnings" not in report and not refused.rksc.needs_pass


@pytest.mark.parametrize("options", [{"group": "fork", "branch": 1, "branches": 2}, {}, None])
def test_only_branches_that_wait_for_a_grammar_are_let_in_before_the_queue_is_placed(
    options: dict[str, Any] | None,
) -> None:
    waits = request("compiled", [1, 2, 3], **(options or {}))
    if options is None:
        waits.rksc = None
    waiting: list[Any] = []
    scheduler = SimpleNamespace(
        grammar_manager=SimpleNamespace(grammar_queue=[waits], get_ready_grammar_requests=lambda: [waits]),
        _add_request_to_queue=waiting.append,
    )
    queue_module._let_in_compiled(scheduler)
    assert waiting == ([waits] if options else [])
