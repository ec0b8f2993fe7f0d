"""``fork_similar``: B branches of one state, known to the server as one group."""

from __future__ import annotations

import logging
import uuid
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.interpreter import ProgramState, ProgramStateGroup, StreamExecutor
from sglang.lang.ir import SglCommitLazy, SglConstantText, SglExpr
from sglang.lang.tracer import TracerProgramState

from rksc_sgl.errors import OptionError, RkscError, ServerError
from rksc_sgl.frontend.endpoint import BranchEndpoint, Endpoint, RkscDegradedWarning
from rksc_sgl.options import DEFAULT_TAU, MAX_BRANCHES, RequestOptions

logger = logging.getLogger(__name__)


class BranchExecutor(StreamExecutor):
    """A stream executor that does not wait for a worker that has failed.

    SGLang's own accepts expressions after its worker thread died of an error, and then waits for ever in ``sync``.
    Here ``submit`` raises that error, and ``sync`` returns when the worker is gone.
    """

    def submit(self, expr: Any) -> None:
        if self.error_ is not None:
            raise _as_rksc_error(self.error_)
        super().submit(expr)

    def sync(self) -> None:
        if not self.use_thread:
            return
        with self.queue.all_tasks_done:
            while self.queue.unfinished_tasks and self.worker.is_alive():
                self.queue.all_tasks_done.wait(0.2)

    def end_with(self, parent: StreamExecutor) -> None:
        """End this executor's worker, after what it still has to do, when the parent's program ends.

        SGLang ends a program's own executor and leaves those of its forks to the garbage collector; where an
        error keeps them alive, their threads would keep the whole process from ending.
        """
        end_parent, this = parent.end, weakref.ref(self)

        def end() -> None:
            end_parent()
            branch = this()
            if branch is not None:
                branch.end()

        parent.end = end


class BranchGroup(ProgramStateGroup):
    """The branches of one fork; behaves like SGLang's own group.

    Attributes:
        group_id: the identifier under which the server knows the branches; None without our plugin there.
    """

    def __init__(self, states: list[ProgramState], src_state: ProgramState, group_id: str | None) -> None:
        super().__init__(states, src_state)
        self.group_id = group_id

    def __len__(self) -> int:
        return len(self.states)

    def __iadd__(self, other: Any) -> BranchGroup:
        return super().__iadd__(SglConstantText(other) if isinstance(other, str) else other)

    def verify_gated(self, var: str, **options: Any) -> Any:
        """See :func:`rksc_sgl.verify_gated`."""
        from rksc_sgl.frontend.verify import verify_gated

        return verify_gated(self, var, **options)


def fork_similar(
    s: ProgramState,
    branches: int | Sequence[SglExpr | str],
    *,
    share: str = "auto",
    allow_merge: bool = False,
    tau: float = DEFAULT_TAU,
    share_scope: str = "group",
) -> BranchGroup:
    """Fork a state into branches that share what they can of its prefix.

    The text so far is computed once, before any branch starts, so that every branch finds it cached however many
    arrive together.

    Args:
        s: the state to fork; it stays usable.
        branches: a number of branches with the same text, or one expression or string for each branch, appended
            to it (other wordings of one problem, say).
        share: ``exact`` reuses KV of identical prefixes, which changes nothing; ``blend`` also takes over KV of equal
            tokens at other places, which is approximate; ``merge`` gives a branch the first one's prompt in place of
            its own, where that asks the same in other words (``docs/sharing.md``); ``auto`` takes identical prefixes,
            and blends branches that begin differently and have long material in common.
        allow_merge: ``auto`` may merge too, and blends only what cannot be merged.
        tau: with merges: the least similarity of hidden states, from -1 to 1.
        share_scope: whose KV a blend or merge may take: the ``group``'s, or any of its namespace in the ``cache``.

    Returns:
        The group: index, iterate, ``+=`` an expression, a list or a callable, ``join`` it, ``verify_gated`` it.
        Each ``sgl.gen`` of a branch gets ``confidence`` in its ``meta_info``, and ``rksc`` from a server with our
        plugin. On a server without it, and on backends other than an SGLang server, the branches run without
        (an :class:`RkscDegradedWarning` says so, once).

    Raises:
        OptionError: ``branches`` is empty, not positive, or of the wrong type; an option of sharing is unknown, out of
            range, or does not go with ``share``.
        ServerError: the shared prefix could not be computed.
    """
    if isinstance(s, TracerProgramState):
        return s.fork(1)  # SGLang looks for the prefix that a batch of programs shares; it ends here
    appended = _appended(branches)
    size = len(appended)
    parent = s.stream_executor
    group_id = uuid.uuid4().hex
    sharing = RequestOptions(share=share, allow_merge=allow_merge, tau=tau, share_scope=share_scope)
    options = [replace(sharing, group=group_id, branch=index, branches=size) for index in range(size)]
    parent.sync()
    if parent.error_ is None and parent.text_ and size > 1:
        parent.submit(SglCommitLazy())
        parent.sync()
    if parent.error_ is not None:
        raise _as_rksc_error(parent.error_)

    backends = _branch_backends(parent, options)
    states = [ProgramState(_branch_executor(parent, backend)) for backend in backends]
    group = BranchGroup(states, s, _group_id(backends))
    for state, expression in zip(states, appended, strict=True):
        if expression is not None:
            state += expression
    logger.debug("fork %s: %d branches, share=%s", group_id, size, share)
    return group


def _appended(branches: int | Sequence[SglExpr | str]) -> list[SglExpr | str | None]:
    """What is appended to each branch."""
    if isinstance(branches, bool) or not isinstance(branches, (int, list, tuple)):
        raise OptionError(
            f"branches: must be a number of branches or a list of expressions, got {type(branches).__name__}"
        )
    if isinstance(branches, int):
        if not 1 <= branches <= MAX_BRANCHES:
            raise OptionError(f"branches: must be 1 to {MAX_BRANCHES}, got {branches}")
        return [None] * branches
    if not 1 <= len(branches) <= MAX_BRANCHES:
        raise OptionError(f"branches: must name 1 to {MAX_BRANCHES} branches, got {len(branches)}")
    for index, expression in enumerate(branches):
        if not isinstance(expression, (str, SglExpr)):
            raise OptionError(
                f"branches[{index}]: must be a string or an SGLang expression, got {type(expression).__name__}"
            )
    return list(branches)


def _branch_backends(parent: StreamExecutor, options: list[RequestOptions]) -> list[Any]:
    backend = parent.backend
    if isinstance(backend, BranchEndpoint):
        return [BranchEndpoint(backend.endpoint_of_group, one, backend.trace) for one in options]
    if isinstance(backend, RuntimeEndpoint):
        endpoint = Endpoint.of(backend)
        return [BranchEndpoint(endpoint, one, trace=None) for one in options]
    warnings.warn(
        f"{type(backend).__name__} is not an SGLang server: the branches run as a plain fork, nothing is shared "
        "on purpose and no confidence is measured",
        RkscDegradedWarning,
        stacklevel=4,
    )
    return [backend] * len(options)


def _group_id(backends: list[Any]) -> str | None:
    first = backends[0]
    return first.options.group if isinstance(first, BranchEndpoint) and first.sends_options else None


def _branch_executor(parent: StreamExecutor, backend: Any) -> BranchExecutor:
    """A copy of the parent at this point, as ``StreamExecutor.fork`` makes it, on the branch's backend."""
    executor = BranchExecutor(
        backend,
        parent.arguments,
        parent.default_sampling_para,
        parent.chat_template,
        parent.stream,
    )
    executor.variables = dict(parent.variables)
    executor.meta_info = dict(parent.meta_info)
    executor.text_ = str(parent.text_)
    executor.messages_ = list(parent.messages_)
    executor.cur_role = parent.cur_role
    executor.cur_role_begin_pos = parent.cur_role_begin_pos
    executor.fork_start_text_pos = len(parent.text_)
    executor.images_ = list(parent.images_)
    executor.end_with(parent)
    return executor


def _as_rksc_error(error: BaseException) -> Exception:
    """The error that stopped an executor, as one of ours."""
    if isinstance(error, RkscError):
        return error
    wrapped = ServerError(f"the branch stopped: {error or type(error).__name__}")
    wrapped.__cause__ = error
    return wrapped
