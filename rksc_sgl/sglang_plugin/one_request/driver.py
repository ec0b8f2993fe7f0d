"""Carries one fork out on SGLang's tokenizer manager: each branch a task, one loop that decides.

What a task sees becomes an event of :class:`~rksc_sgl.one_request.fork.Fork`, one after the other. Events in which
answers are compared run in threads, for math-verify may take seconds and an event loop has other clients.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from rksc_sgl.deciding import Abort, Start
from rksc_sgl.errors import LabelError, ServerError, ServerRefusedError
from rksc_sgl.generated.confidence import mean_top1_probability
from rksc_sgl.generated.finish import is_truncated, why_ended
from rksc_sgl.generated.streamed import StreamedAnswer
from rksc_sgl.one_request.fork import Ask, Chosen, Completion, Failed, Fork, ForkAction, Unask
from rksc_sgl.one_request.told import Facts
from rksc_sgl.options import KEY, RequestOptions
from rksc_sgl.sglang_plugin.memory.ending import tell_end
from rksc_sgl.sglang_plugin.one_request.requests import Judge, new_rid
from rksc_sgl.verifying.reading import read_reply

logger = logging.getLogger(__name__)

_GRAMMARS = ("regex", "json_schema", "ebnf", "structural_tag")
SETTLE_S = 2.0  # that an answer waits for the last tokens of branches that were aborted

Event = Callable[[], "list[ForkAction]"]
Read = Callable[[int, "dict[str, Any]"], Completion]
"""Takes a branch and what it generated, and says what it came to; a ``ServerError`` where that cannot be read."""

_threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="rksc-fork")


@dataclass(frozen=True)
class Branch:
    """One branch, before it is sent.

    Attributes:
        options: of its requests.
        request: SGLang's ``GenerateReqInput``.
    """

    options: RequestOptions
    request: Any


class Driver:
    """One fork on a server.

    Args:
        manager: SGLang's tokenizer manager.
        branches: in their order.
        read: what a branch came to.
        judge: asks about branches; None where nobody is verified.
        deadline_s: after which what there is decides.
        rid: prefix of the ids of its requests, the client's own; None for none.

    Attributes:
        generated: of each branch that ended by itself, its text, ids and ``meta_info``.
        facts: of each branch that was sent.
        statuses: of branches that failed, the HTTP status that says why.
    """

    def __init__(
        self,
        manager: Any,
        branches: Sequence[Branch],
        read: Read,
        judge: Judge | None,
        deadline_s: float,
        rid: str | None,
    ) -> None:
        self._manager, self._branches, self._read, self._judge = manager, branches, read, judge
        self._deadline_s, self._rid = deadline_s, rid
        self._events: asyncio.Queue[tuple[bool, Event]] = asyncio.Queue()
        self._generating: dict[int, asyncio.Task[None]] = {}
        self._asking: dict[int, asyncio.Task[None]] = {}
        # SGLang compiles a grammar anew for each request that comes before the first of them is done with it.
        self._compiled = asyncio.Event()
        if not any(branches[0].request.sampling_params.get(name) for name in _GRAMMARS):
            self._compiled.set()
        self._prompts = {branch.request.rid: branch.request.input_ids for branch in branches}
        self.generated: dict[int, dict[str, Any]] = {}
        self.facts: dict[int, Facts] = {}
        self.statuses: dict[int, int] = {}

    async def run(self, fork: Fork) -> Chosen | Failed:
        """Until a branch is selected. However it ends, no request of it is left."""
        loop = asyncio.get_running_loop()
        end_at = loop.time() + self._deadline_s
        try:
            self._do(await self._off_loop(fork.start), fork)
            while fork.end is None:
                try:
                    async with asyncio.timeout_at(end_at):  # Python 3.11's wait_for may drop a cancellation
                        compares, event = await self._events.get()
                except TimeoutError:
                    why = f"the deadline of {self._deadline_s:g} s passed"
                    compares, event = True, lambda why=why: fork.expired(why)  # type: ignore[misc]
                self._do(await self._off_loop(event) if compares else event(), fork)
            await self._settle()
            return fork.end
        finally:
            try:
                await self._end_all()
            finally:
                self._tell_end()

    def read_by(self, branch: int) -> list[int]:
        """Ids of the prompt that was computed for a branch: its own, or with a merge the donor's."""
        sent: list[int] = list(self._branches[branch].request.input_ids)
        meta_info = self.generated[branch]["meta_info"]
        report = meta_info.get(KEY) or {}
        replaced = report.get("replaced_tokens") or 0
        donor = self._prompts.get(report.get("donor")) if replaced else None
        read = sent if donor is None else [*donor, *sent[replaced:]]
        return read if len(read) == meta_info["prompt_tokens"] else sent

    # -- what the fork wants -------------------------------------------------------------------------

    def _do(self, actions: Sequence[ForkAction], fork: Fork) -> None:
        for action in actions:
            if isinstance(action, Start):
                for branch in action.branches:
                    leads = not self._generating
                    self._generating[branch] = asyncio.create_task(self._generate(branch, fork, leads=leads))
            elif isinstance(action, Abort):
                for branch in action.branches:
                    self._abort(branch)
            elif isinstance(action, Ask):
                for branch in action.branches:
                    self._asking[branch] = asyncio.create_task(self._ask(branch, action.exit, fork))
            elif isinstance(action, Unask):
                for branch in action.branches:
                    self._asking[branch].cancel()

    def _abort(self, branch: int) -> None:
        """End a generation; its last event tells the tokens that it had. One that was not sent yet is dropped."""
        rid = self._branches[branch].request.rid
        state = self._manager.rid_to_state.get(rid)
        if state is not None and state.dispatched:
            self._manager.abort_request(rid)
        elif branch not in self.facts:  # else it has just ended, and its last event is on its way
            self._generating[branch].cancel()

    async def _settle(self) -> None:
        """Wait for the last events of what was aborted, and count them."""
        left = [task for task in self._generating.values() if not task.done()]
        if left:
            _, left_over = await asyncio.wait(left, timeout=SETTLE_S)
            if left_over:
                logger.warning(
                    "one request: %d branches have not ended %g s after their abort", len(left_over), SETTLE_S
                )
        while not self._events.empty():
            _, event = self._events.get_nowait()
            await self._off_loop(event)

    def _tell_end(self) -> None:
        """Nothing more is to come, and nothing need be kept for it."""
        group = self._branches[0].options.group
        assert group is not None, "the branches of a fork have a group"
        tell_end(self._manager, group)

    async def _end_all(self) -> None:
        """Whatever still runs is cancelled, which aborts its request."""
        tasks = [*self._generating.values(), *self._asking.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    async def _off_loop(event: Event) -> list[ForkAction]:
        return await asyncio.get_running_loop().run_in_executor(_threads, event)

    # -- what happens --------------------------------------------------------------------------------

    async def _generate(self, branch: int, fork: Fork, *, leads: bool) -> None:
        answer = StreamedAnswer(self._manager.incremental_streaming_output)
        told = 0
        if not leads:
            await self._compiled.wait()
        try:
            async for event in self._manager.generate_request(self._branches[branch].request, None):
                self._compiled.set()
                answer.add(event)
                told = self._tell_tokens(branch, answer.response["meta_info"], told, fork)
            generated = answer.response
            if ended := why_ended(generated["meta_info"]):
                status = generated["meta_info"]["finish_reason"].get("status_code")
                raise ServerRefusedError(ended, int(status or 500))
            self.generated[branch] = generated
            completion = self._completion(branch, generated)
        except Exception as error:  # of SGLang's, or of what reads its answer: the branch loses, the others go on
            self.statuses[branch] = _status_of(error)
            why = _said(error)
            self._events.put_nowait((True, lambda: fork.failed(branch, why)))
            return
        finally:
            self._compiled.set()
        self._events.put_nowait((True, lambda: fork.finished(branch, completion)))

    def _completion(self, branch: int, generated: Mapping[str, Any]) -> Completion:
        meta_info = generated["meta_info"]
        return replace(
            self._read(branch, dict(generated)),
            truncated=is_truncated(meta_info),
            confidence=mean_top1_probability(meta_info),
            blended=(meta_info.get(KEY) or {}).get("mode") == "blend",
        )

    def _tell_tokens(self, branch: int, meta_info: Mapping[str, Any], told: int, fork: Fork) -> int:
        known = Facts.of(meta_info, KEY)
        if known.prompt_tokens is None:  # an abort in the queue, or one that says less than what came before
            before = self.facts.get(branch, Facts())
            known = replace(before, report=known.report or before.report)
        self.facts[branch] = known
        tokens = int(meta_info.get("completion_tokens") or told)
        if tokens > told:
            count, confidence = tokens - told, mean_top1_probability(meta_info, told)
            self._events.put_nowait((False, lambda: fork.tokens(branch, count, confidence)))
        return max(told, tokens)

    async def _ask(self, branch: int, exit: Mapping[str, Any], fork: Fork) -> None:
        judge = self._judge
        assert judge is not None, "a fork that is not verified asks nobody"
        try:
            loop = asyncio.get_running_loop()
            ids = await loop.run_in_executor(_threads, judge.prompt_ids, self.read_by(branch), self.generated[branch])
            request = judge.request(ids, self._branches[branch].options, exit, rid=new_rid(self._rid))
            meta_info: dict[str, Any] = {}
            async for reply in self._manager.generate_request(request, None):
                meta_info = reply["meta_info"]
            if why_ended(meta_info):
                raise LabelError("the server ended the request")
            reading = read_reply(meta_info, judge.tokens)
        except Exception as error:  # as above
            why = _said(error)
            self._events.put_nowait((True, lambda: fork.verified(branch, None, why)))
            return
        self._events.put_nowait((True, lambda: fork.verified(branch, reading)))


def _said(error: Exception) -> str:
    """What went wrong, in a sentence; what nobody expects is logged with its place."""
    if _status_of(error) == 500 and not isinstance(error, ServerError):
        logger.error("one request: a branch failed", exc_info=error)
    return str(getattr(error, "detail", None) or error) or type(error).__name__


def _status_of(error: Exception) -> int:
    """The HTTP status of what went wrong with a branch."""
    status = getattr(error, "status", None) or getattr(error, "status_code", None)
    return int(status) if status else 400 if isinstance(error, ValueError) else 500
