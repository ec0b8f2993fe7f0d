"""``fork_similar``: B branches of one state, known to the server as one group."""

from __future__ import annotations

import logging
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.interpreter import ProgramState, ProgramStateGroup, StreamExecutor
from sglang.lang.ir import SglConstantText, SglExpr
from sglang.lang.tracer import TracerProgramState

from rksc_sgl.deciding import EarlyStop, Record
from rksc_sgl.errors import BranchStoppedError, OptionError, RkscError, ServerError
from rksc_sgl.frontend.endpoint import BranchEndpoint, Endpoint, RkscDegradedWarning
from rksc_sgl.frontend.executors import (
    BranchExecutor,
    BranchVariables,
    EndWithBranches,
    StoppableExecutor,
    as_rksc_error,
    cancel_forks,
    has_ended,
    wait_idle,
)
from rksc_sgl.frontend.stopping import BranchRun, ForkStop
from rksc_sgl.options import DEFAULT_TAU, MAX_BRANCHES, RequestOptions

logger = logging.getLogger(__name__)


class BranchGroup(ProgramStateGroup):
    """The branches of one fork; behaves like SGLang's own group.

    Attributes:
        group_id: the identifier under which the server knows the branches; None without our plugin there.
        early_stop: when the fork may stop; None without ``early_stop``.
    """

    def __init__(
        self, states: list[ProgramState], src_state: ProgramState, group_id: str | None, stop: ForkStop | None = None
    ) -> None:
        super().__init__(states, src_state)
        self.group_id = group_id
        self.early_stop = None if stop is None else stop.spec
        self._stop = stop

    @property
    def stopping(self) -> Record | None:
        """What became of the branches so far, in the group's order; None without ``early_stop``.

        Who finished, who was stopped or never started, when and why, the tokens that this cost and saved, and in
        ``done.statement`` and ``done.probability`` what decided. It is complete once all branches were waited for, as
        ``verify_gated``, ``join`` and ``sync`` do: the tokens of those that are aborted come last.
        """
        return None if self._stop is None else self._stop.record()

    def cancel(self, why: str = "it was cancelled") -> None:
        """Nobody wants the answer any more: end every branch, and every fork with ``early_stop`` that was made of one.

        Branches that were not started never are, requests in flight are aborted, and what branches that have voted do
        after that ends too. ``stopping.done.reason`` is ``cancelled``, unless the answer was decided before. A program
        that ends by an error, or by Ctrl-C, does this to all of its forks.

        Args:
            why: for the record, and for the error of each branch that is ended.

        Raises:
            OptionError: the fork has no ``early_stop``: its requests have no ids to end them by.
        """
        if self._stop is None:
            raise OptionError("cancel: only a fork with early_stop can be cancelled")
        cancel_forks([state.stream_executor for state in self.states], why)
        self.tell_end()

    def __len__(self) -> int:
        return len(self.states)

    def __iadd__(self, other: Any) -> BranchGroup:
        return super().__iadd__(SglConstantText(other) if isinstance(other, str) else other)

    def join(self, mode: str = "gather_variable") -> None:
        """SGLang's own; ``concate_and_append`` appends the texts, for no server joins KV.

        Branches that were stopped or never started have nothing to join. The fork ends with it.
        """
        ran = [state for state in self.states if not isinstance(state.error(), BranchStoppedError)]
        if mode == "concate_and_append":
            for state in ran:
                if state.error() is not None:
                    raise as_rksc_error(state.error())
            executors = [state.stream_executor for state in ran]
            self.src_state += SglConstantText("".join(one.text_[one.fork_start_text_pos :] for one in executors))
        else:
            ProgramStateGroup(ran, self.src_state).join(mode)
        for state in self.states:
            state.stream_executor.end()
        self.tell_end()

    def tell_end(self) -> None:
        """Tell the server that nothing more of this fork is to come; what it keeps for it may go.

        ``verify_gated`` and ``join`` do it. What is asked of a branch after that is served as any other request.
        """
        backend = self.states[0].stream_executor.backend
        if self.group_id is not None and backend.endpoint_of_group.keeps_forks():
            backend.endpoint_of_group.end_fork(self.group_id)

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
    early_stop: EarlyStop | str | None = None,
) -> BranchGroup:
    """Fork a state into branches that share what they can of its prefix.

    The text so far is computed once, however many branches arrive together: by the first one, for which the others
    wait in the server; or ahead of them all, where the server does not keep forks whole (``docs/memory.md``) or
    declines exact sharing.

    Args:
        s: the state to fork; it stays usable.
        branches: a number of branches with the same text, or one expression or string for each branch, appended
            to it (other wordings of one problem, say).
        share: ``exact`` reuses KV of identical prefixes, which changes nothing; ``blend`` also takes over KV of equal
            tokens at other places, which is approximate; ``merge`` gives a branch the first one's prompt in place of
            its own, where that asks the same in other words (``docs/sharing.md``); ``auto`` takes identical prefixes
            only.
        allow_merge: ``auto`` and ``blend`` may merge too; what cannot be merged is blended with ``blend`` only.
        tau: with merges: the least similarity of hidden states, from -1 to 1.
        share_scope: whose KV a blend or merge may take: the ``group``'s, or any of its namespace in the ``cache``.
        early_stop: when the vote of the branches counts as decided (:class:`rksc_sgl.EarlyStop`, or the name of a
            policy): what cannot matter any more is then not started or aborted (``docs/stopping.md``). A branch that
            is not started yet holds at its first generation. One that was stopped, or never started, has no
            variable; asking for it raises :class:`~rksc_sgl.errors.BranchStoppedError`, which ``error()`` returns.
            ``stopping`` of the group says what became of all. None runs every branch.

    Returns:
        The group: index, iterate, ``+=`` an expression, a list or a callable, ``join`` it, ``verify_gated`` it.
        Each ``sgl.gen`` of a branch gets ``confidence`` in its ``meta_info``, and ``rksc`` from a server with our
        plugin. On a server without it, and on backends other than an SGLang server, the branches run without
        (an :class:`RkscDegradedWarning` says so, once).

    Raises:
        OptionError: ``branches`` is empty, not positive, or of the wrong type; an option of sharing is unknown, out of
            range, or does not go with ``share``; the policy of ``early_stop`` cannot decide so many branches.
        ServerError: the shared prefix could not be computed.
    """
    if isinstance(s, TracerProgramState):
        return s.fork(1)  # SGLang looks for the prefix that a batch of programs shares; it ends here
    appended = _appended(branches)
    size = len(appended)
    parent = s.stream_executor
    stop = _fork_stop(early_stop, size)
    group_id = uuid.uuid4().hex
    sharing = RequestOptions(
        share=share, allow_merge=allow_merge, tau=tau, share_scope=share_scope, root=_root(parent.backend)
    )
    options = [replace(sharing, group=group_id, branch=index, branches=size) for index in range(size)]
    wait_idle(parent)
    if parent.error_ is not None:
        raise as_rksc_error(parent.error_)
    runs = [None] * size if stop is None else stop.runs
    backends = _branch_backends(parent, options, runs)
    if parent.text_ and size > 1 and not _first_branch_computes(parent):
        _compute_prefix(parent, backends[0])
    states = [ProgramState(_branch_executor(parent, *pair)) for pair in zip(backends, runs, strict=True)]
    group = BranchGroup(states, s, _group_id(backends), stop)
    if stop is not None:
        stop.begin()
    for state, expression in zip(states, appended, strict=True):
        if expression is not None:
            state += expression
    logger.debug("fork %s: %d branches, share=%s", group_id, size, share)
    return group


def _fork_stop(early_stop: EarlyStop | str | None, branches: int) -> ForkStop | None:
    if early_stop is None:
        return None
    if not isinstance(early_stop, (EarlyStop, str)):
        raise OptionError(
            f"early_stop: must be an EarlyStop, the name of a policy, or None, got {type(early_stop).__name__}"
        )
    spec = EarlyStop(early_stop) if isinstance(early_stop, str) else early_stop
    return ForkStop(branches, spec)


def _root(backend: Any) -> str | None:
    """The group of the first fork, where a branch of one is forked."""
    return (backend.options.root or backend.options.group) if isinstance(backend, BranchEndpoint) else None


def _first_branch_computes(parent: StreamExecutor) -> bool:
    """Whether siblings wait in the server for what they have in common, so that nothing need be computed ahead.

    What was computed ahead would be nobody's there until the first branch came, and go where memory is short.
    """
    backend = parent.backend
    return isinstance(backend, RuntimeEndpoint) and not parent.images_ and Endpoint.of(backend).schedules_forks()


def _compute_prefix(parent: StreamExecutor, branch: Any) -> None:
    """Compute the text so far once; here and not in the parent's worker, which may have ended with its program."""
    try:
        if isinstance(branch, BranchEndpoint) and not isinstance(parent.backend, BranchEndpoint):
            branch.endpoint_of_group.compute_prefix(parent, branch.options)
        else:
            parent.backend.commit_lazy_operations(parent)
    except RkscError:
        raise
    except Exception as error:
        raise ServerError(f"the common prefix of the branches could not be computed: {error}") from error


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


def _branch_backends(
    parent: StreamExecutor, options: list[RequestOptions], runs: Sequence[BranchRun | None]
) -> list[Any]:
    backend = parent.backend
    stops = any(run is not None for run in runs)
    if isinstance(backend, BranchEndpoint):
        if backend.merged_with is not None:
            warnings.warn(
                f"this branch was merged with the prompt of request {backend.merged_with}, whose tokens are not known "
                "here: what is forked from it reads its own wording again",
                RkscDegradedWarning,
                stacklevel=4,
            )
        endpoint, known = backend.endpoint_of_group, backend.known
    elif isinstance(backend, RuntimeEndpoint):
        endpoint, known = Endpoint.of(backend), None
    else:
        return _plain_backends(backend, len(options), stops)
    if stops and endpoint.rksc_info() is None and endpoint.warn_once("early_stop"):
        warnings.warn(
            f"the server at {endpoint.base_url} runs without the rksc plugin: branches are stopped from here all the "
            "same, by SGLang's own /abort_request, and not counted there",
            RkscDegradedWarning,
            stacklevel=4,
        )
    return [BranchEndpoint(endpoint, one, known, run) for one, run in zip(options, runs, strict=True)]


def _plain_backends(backend: Any, branches: int, stops: bool) -> list[Any]:
    of_stops = "; a branch that is stopped while it runs goes on there, unheard" if stops else ""
    warnings.warn(
        f"{type(backend).__name__} is not an SGLang server: the branches run as a plain fork, nothing is shared "
        f"on purpose and no confidence is measured{of_stops}",
        RkscDegradedWarning,
        stacklevel=5,
    )
    return [backend] * branches


def _group_id(backends: list[Any]) -> str | None:
    first = backends[0]
    return first.options.group if isinstance(first, BranchEndpoint) and first.sends_options else None


def _branch_executor(parent: StreamExecutor, backend: Any, run: BranchRun | None) -> BranchExecutor:
    """A copy of the parent at this point, as ``StreamExecutor.fork`` makes it, on the branch's backend."""
    copied = (backend, parent.arguments, parent.default_sampling_para, parent.chat_template, parent.stream)
    if run is None:
        executor = BranchExecutor(*copied)
        executor.variables = dict(parent.variables)
    else:
        executor = StoppableExecutor(run, *copied)
        executor.variables = BranchVariables(parent.variables, run)
    executor.meta_info = {name: info for name, info in parent.meta_info.items() if name in executor.variables}
    executor.text_ = str(parent.text_)
    executor.messages_ = list(parent.messages_)
    executor.cur_role = parent.cur_role
    executor.cur_role_begin_pos = parent.cur_role_begin_pos
    executor.fork_start_text_pos = len(parent.text_)
    executor.images_ = list(parent.images_)
    EndWithBranches.of(parent).branches.add(executor)
    if has_ended(parent):  # with its program: nobody would end the branch
        executor.end()
    return executor
