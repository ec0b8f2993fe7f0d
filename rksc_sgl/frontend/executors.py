"""SGLang's executors, one for each branch: nobody waits for one in vain, and one that is stopped says why."""

from __future__ import annotations

import contextvars
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from queue import Empty, Queue
from types import FrameType
from typing import Any

from sglang.lang.interpreter import StreamExecutor
from sglang.lang.ir import SglGen, SglSelect, SglSeparateReasoning, SglVarScopeBegin

from rksc_sgl.errors import RkscError, ServerError
from rksc_sgl.frontend.endpoint import BranchEndpoint
from rksc_sgl.frontend.stopping import POLL_S, BranchEnds, BranchRun


def wait_idle(executor: StreamExecutor) -> None:
    """Wait until an executor has done what was appended to it, or its worker is gone.

    SGLang's own ``sync`` waits for ever for a worker that has ended or failed.
    """
    if not executor.use_thread:
        return
    queue: Queue[Any] = executor.queue
    while executor.worker.is_alive():
        with queue.all_tasks_done:
            if queue.unfinished_tasks:
                queue.all_tasks_done.wait(POLL_S)
            if not queue.unfinished_tasks:
                return
        if isinstance(executor, BranchExecutor) and not executor.waits_on():
            return


class BranchExecutor(StreamExecutor):
    """A stream executor that nobody waits for in vain.

    SGLang's own accepts expressions after its worker has failed, and then waits for ever in ``sync``; here ``submit``
    raises the error that stopped it. A worker ends with the program that made the fork, for a thread that waits for
    more would keep the process from ending; what is appended after that runs on a worker of its own, in order.

    Attributes:
        has_ended: whether it was told to end.
    """

    worker: threading.Thread
    error_: BaseException | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._lock = threading.RLock()
        self._finished = self.has_ended = False
        super().__init__(*args, **kwargs)

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing more to come; where text is streamed, its readers end then."""
        return self._finished and not self.queue.unfinished_tasks

    @is_finished.setter
    def is_finished(self, value: bool) -> None:
        self._finished = value
        event = getattr(self, "stream_text_event", None)
        if value and event is not None:  # SGLang wakes the readers before it says that this is the end
            event.set()

    def submit(self, expr: Any) -> None:
        with self._lock:
            if self.error_ is not None:
                raise as_rksc_error(self.error_)
            super().submit(expr)
            if self.has_ended:
                self._work_once_more()

    def sync(self) -> None:
        wait_idle(self)

    def waits_on(self) -> bool:
        """Called every now and then by whoever waits for it; whether that is of use."""
        return True

    def end(self) -> None:
        """End the worker, after what it still has to do."""
        with self._lock:
            if not self.has_ended:
                self.has_ended = True
                super().end()

    def _work_once_more(self) -> None:
        """Run what is queued, after the worker before, and end."""
        before = self.worker
        self.queue.put(None)

        def work() -> None:
            before.join()
            self._thread_worker_func()

        self.worker = threading.Thread(target=contextvars.copy_context().run, args=(work,))
        self.worker.start()

    def _thread_worker_func(self) -> None:
        try:
            if self.error_ is None:
                super()._thread_worker_func()
        except BaseException as error:  # SGLang catches those that are an Exception
            if not isinstance(error, BranchEnds):
                self.error_ = error
            self.queue.task_done()  # of what it was about
        with self._lock:
            if self.error_ is not None:
                self._drop_queued()
                self.is_finished = True

    def _drop_queued(self) -> None:
        """After an error: nothing that is queued will be run, and nobody may wait for it."""
        while True:
            try:
                self.queue.get_nowait()
            except Empty:
                break
            self.queue.task_done()
        self._wake_readers()

    def _wake_readers(self) -> None:
        for events in (self.variable_event, self.stream_var_event or {}):
            for event in events.values():
                event.set()


class StoppableExecutor(BranchExecutor):
    """The executor of a branch that may be stopped, or never started.

    Text is appended at once; the first generation or choice holds until the branch is started. Of a branch that is
    stopped nothing more is executed, its variable is taken back, and ``error()`` says why; what is appended to it is
    set aside.
    """

    def __init__(self, run: BranchRun, *args: Any, **kwargs: Any) -> None:
        self.run = run
        self._error: BaseException | None = None
        super().__init__(*args, **kwargs)
        run.queue = self.queue
        if self.stream:
            self.stream_text_event = _WaitedEvent(run)

    @property
    def error_(self) -> BaseException | None:  # type: ignore[override]
        return self.run.stopped if self._error is None else self._error

    @error_.setter
    def error_(self, error: BaseException | None) -> None:
        self._error = error

    def waits_on(self) -> bool:
        return self.run.waits_on()

    def submit(self, expr: Any) -> None:
        with self._lock:
            if self._error is None and self.run.stopped is not None:
                self._init_var_event(expr)
                self._wake_readers()
                return
            super().submit(expr)

    def _init_var_event(self, expr: Any) -> None:
        if isinstance(expr, (SglGen, SglSelect, SglVarScopeBegin, SglSeparateReasoning)):
            self.variable_event[expr.name] = _WaitedEvent(self.run)
            if self.stream:
                self.stream_var_event[expr.name] = _WaitedEvent(self.run)
        else:
            super()._init_var_event(expr)

    def _execute_gen(self, expr: Any) -> None:
        self.run.hold(lambda: self.has_ended)
        backend = self.backend
        try:
            with self.run.generation(backend.end_request if isinstance(backend, BranchEndpoint) else None):
                super()._execute_gen(expr)
        except Exception:
            if self.run.stopped is None:
                raise
            for partial in (self.variables, self.meta_info):
                partial.pop(expr.name, None)
            raise BranchEnds from None
        self._after(expr.name)

    def _execute_select(self, expr: Any) -> None:
        self.run.hold(lambda: self.has_ended)
        super()._execute_select(expr)
        self._after(expr.name)

    def _execute_var_scope_end(self, expr: Any) -> None:
        super()._execute_var_scope_end(expr)
        self._after(expr.name)

    def _execute_commit_lazy_operations(self, expr: Any) -> None:
        self.run.hold(lambda: self.has_ended)
        super()._execute_commit_lazy_operations(expr)

    def _after(self, variable: str | None) -> None:
        """A variable is there: if it is the one that votes, it does."""
        if variable == self.run.variable and not self.run.settled:
            self.run.answered(self.variables[variable], self.meta_info.get(variable) or {})
            if self.run.stopped is not None:  # it finished while it was being stopped
                for late in (self.variables, self.meta_info):
                    late.pop(variable, None)
        if self.run.stopped is not None:
            raise BranchEnds

    def _thread_worker_func(self) -> None:
        super()._thread_worker_func()
        if self._error is not None and self.run.stopped is None:
            self.run.failed(str(self._error) or type(self._error).__name__)


class BranchVariables(dict[str, Any]):
    """The variables of a branch that may be stopped: one that it never got is asked for with an error that says why."""

    def __init__(self, variables: dict[str, Any], run: BranchRun) -> None:
        super().__init__(variables)
        self._run = run
        self.pop(run.variable, None)  # the program's own, from before the fork, has no vote

    def __missing__(self, name: str) -> Any:
        if self._run.stopped is not None:
            raise self._run.stopped
        raise KeyError(name)


class _WaitedEvent(threading.Event):
    """An event that only comes when its branch is started."""

    def __init__(self, run: BranchRun) -> None:
        super().__init__()
        self._run = run

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is not None:
            return super().wait(timeout)
        while not super().wait(POLL_S):
            if not self._run.waits_on():
                break
        return True


class EndWithBranches:
    """What stands in for ``end`` of an executor that was forked: it ends the executor and all that came of it.

    SGLang ends a program's own executor and leaves those of its forks to the garbage collector; where an error keeps
    them alive, their threads would keep the whole process from ending.

    Attributes:
        branches: those that are still there.
    """

    def __init__(self, parent: StreamExecutor) -> None:
        self._parent = weakref.ref(parent)
        self.branches: weakref.WeakSet[BranchExecutor] = weakref.WeakSet()

    @classmethod
    def of(cls, parent: StreamExecutor) -> EndWithBranches:
        """The one of this executor, put in place with its first branch."""
        found = parent.__dict__.get("end")
        if not isinstance(found, cls):
            found = cls(parent)
            parent.end = found
        return found

    def __call__(self) -> None:
        parent = self._parent()
        error = sys.exc_info()[1]
        if error is not None and _passes_through(error, sys._getframe(1)):
            cancel_forks(self.branches, f"the program ended by {type(error).__name__}: {error}")
        for executor in _with_branches(self.branches if parent is None else [parent]):
            type(executor).end(executor)


def _passes_through(error: BaseException, frame: FrameType) -> bool:
    """Whether an error is leaving a function, and not one that was handled when the function was called.

    SGLang ends a program's executor in ``finally``: nothing but the error's traceback tells why.
    """
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame is frame:
            return True
        trace = trace.tb_next
    return False


def _with_branches(executors: Iterable[StreamExecutor]) -> Iterator[StreamExecutor]:
    """These executors and all that came of them."""
    # A loop, not calls of calls: forks may be nested as deep as a program likes.
    pending = list(executors)
    while pending:
        executor = pending.pop()
        own = executor.__dict__.get("end")
        yield executor
        if isinstance(own, EndWithBranches):
            pending.extend(own.branches)


def cancel_forks(executors: Iterable[StreamExecutor], why: str) -> None:
    """Cancel every fork with ``early_stop`` that these branches, or forks of these, belong to."""
    for executor in _with_branches(executors):
        if isinstance(executor, StoppableExecutor):
            executor.run.cancel_fork(why)


def has_ended(executor: StreamExecutor) -> bool:
    if isinstance(executor, BranchExecutor):
        return executor.has_ended
    return bool(executor.use_thread and not executor.worker.is_alive())


def as_rksc_error(error: BaseException) -> Exception:
    """The error that stopped an executor, as one of ours."""
    if isinstance(error, RkscError):
        return error
    wrapped = ServerError(f"the branch stopped: {error or type(error).__name__}")
    wrapped.__cause__ = error
    return wrapped
