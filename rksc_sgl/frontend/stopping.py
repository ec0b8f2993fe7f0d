"""Stops the branches of one fork: what a :class:`~rksc_sgl.deciding.Decision` says, done to executors and requests.

A branch that is not started yet holds at its first ``sgl.gen`` or ``sgl.select``; what comes before that is text and
costs nothing. One that runs is ended through SGLang's ``/abort_request``, which any server has. Each branch votes as
soon as its variable is there, whatever it does after that.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from queue import Queue
from typing import Any

from rksc_sgl.answers import AnswerClasses, branch_answer
from rksc_sgl.deciding import Abort, Action, Decision, Done, EarlyStop, Record, Ruling, Standing, Start
from rksc_sgl.deciding.policies import Policy
from rksc_sgl.errors import BranchStoppedError, OptionError, ServerUnreachableError
from rksc_sgl.generated.finish import is_truncated, why_ended
from rksc_sgl.http_client import Connection

logger = logging.getLogger(__name__)

POLL_S = 0.2
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0  # between two times that a server is asked to end a request
_ENOUGH_S = 60.0  # of asking

EndRequest = Callable[[str], bool]
"""Ends a request by its id; False where the server does not let us."""


class BranchEnds(BaseException):
    """Ends the worker of a branch that was stopped; no Exception, for SGLang prints a traceback of these."""


class BranchRun:
    """One branch of such a fork, between its executor, its requests and the decision.

    Attributes:
        index: its position in the group.
        queue: of its executor.
        stopped: the error that says why it was stopped or never started; None while it may run.
        request: id of the generation in flight that an abort would end; None where there is none.
        connection: of that request.
        abandoned: nobody could end its request: it may run on there, and nobody waits for it.
        settled: its vote, or why it has none, was told to the decision; from then on it is a branch like others.
        pending: the same, of a branch that needed no start for it; told when it is started.
    """

    def __init__(self, fork: ForkStop, index: int) -> None:
        self.index = index
        self.queue: Queue[Any] | None = None
        self.started = self.settled = self.abandoned = False
        self.pending: Callable[[], list[Action]] | None = None
        self.stopped: BranchStoppedError | None = None
        self.request: str | None = None
        self.connection: Connection | None = None
        self.returned = threading.Event()
        self._end_request: EndRequest | None = None
        self._fork = fork
        self._go = threading.Event()
        self._lock = threading.Lock()

    @property
    def variable(self) -> str:
        """The variable that votes."""
        return self._fork.spec.variable

    @property
    def follows_confidence(self) -> bool:
        """Whether the policy follows the confidence of tokens while they come."""
        return self._fork.spec.policy == "confidence" and not self.settled

    @property
    def window(self) -> int:
        """The tokens over which the policy takes the mean of their confidence."""
        return self._fork.spec.window_size

    @property
    def is_busy(self) -> bool:
        """Whether there is something left to do for it."""
        return self.queue is None or bool(self.queue.unfinished_tasks)

    # -- the decision's side -------------------------------------------------------------------------

    def start(self) -> None:
        """Let it run."""
        self.started = True
        self._go.set()

    def cancel_fork(self, why: str) -> None:
        """End it, and all its siblings."""
        self._fork.cancel(why)

    def stop(self, fate: str, why: str) -> None:
        """End it; for good, also where it is to be started later."""
        with self._lock:
            self.stopped = BranchStoppedError(f"branch {self.index} was {fate}: {why}")
        self._go.set()

    @property
    def in_flight(self) -> bool:
        """Whether there is a request to be ended."""
        with self._lock:
            return self.request is not None and not self.abandoned

    def end_request(self) -> None:
        """Have the server end the request in flight, if there is one.

        It is asked again and again until the request has returned, for it ignores an abort that overtakes its request.
        Where it refuses to, or does not, the connection is closed: no worker must wait for what nobody ends.
        """
        pause, until = _FIRST_PAUSE_S, time.monotonic() + _ENOUGH_S
        while self.in_flight:
            with self._lock:
                request, connection, end = self.request, self.connection, self._end_request
            if request is None or connection is None:
                return
            try:
                ends = end is not None and end(request) and time.monotonic() < until
            except ServerUnreachableError as error:
                logger.info("branch %d cannot be stopped: %s", self.index, error)
                ends = time.monotonic() < until
            if not ends:
                logger.info("branch %d was abandoned: nobody ends its request", self.index)
                self.abandoned = True
                self._fork.abandoned(self)
                connection.close()
                return
            self.returned.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    # -- the executor's side -------------------------------------------------------------------------

    def hold(self, has_ended: Callable[[], bool]) -> None:
        """Wait until the branch is started.

        Args:
            has_ended: whether its program is over, so that nothing more will be appended to the others.

        Raises:
            BranchEnds: it was stopped instead.
        """
        while not self._go.wait(POLL_S):
            if has_ended():
                self._fork.pass_over_idle()
        if self.stopped is not None:
            raise BranchEnds

    @contextmanager
    def generation(self, end: EndRequest | None) -> Iterator[None]:
        """What is done here can be ended.

        Args:
            end: ends a request by its id; None where the backend cannot.

        Raises:
            BranchEnds: it was stopped before this began.
        """
        with self._lock:
            if self.stopped is not None:
                raise BranchEnds
            self.request, self.connection, self._end_request = uuid.uuid4().hex, Connection(), end
            self.returned.clear()
        try:
            yield
        finally:
            with self._lock:
                self.request = self.connection = None
            self.returned.set()

    def generated(self, tokens: int, confidence: float | None) -> None:
        """So many tokens more, of this mean confidence; those after its vote are its own."""
        if not self.settled:
            self._fork.generated(self, tokens, confidence)

    def answered(self, text: Any, meta_info: dict[str, Any]) -> None:
        """Its variable is there."""
        self._fork.answered(self, text, meta_info)

    def failed(self, why: str) -> None:
        """It ended with an error."""
        self._fork.failed(self, why)

    def waits_on(self) -> bool:
        """Called every now and then by whoever waits for it; whether that is of use."""
        if not self._go.is_set():
            self._fork.pass_over_idle()
        return not self.abandoned


class ForkStop:
    """The decision of one fork, and its branches. Threads may tell it of events at any time.

    Args:
        branches: of the fork.
        spec: when to stop. ``probable`` takes the branches for draws of one kind; they are launched in a random order,
            so that they are, whatever a program appends to each.

    Raises:
        OptionError: the policy cannot decide so many branches.
    """

    def __init__(self, branches: int, spec: EarlyStop) -> None:
        if callable(spec.policy):
            spec = replace(spec, policy=_without_verification(spec.policy))
        self.spec = spec
        self._decision = Decision(branches, spec)
        self._classes = AnswerClasses()
        self._lock = threading.RLock()  # a policy may look at the record
        self._events: deque[Callable[[], list[Action]]] = deque()
        self._ending: list[BranchRun] = []  # whose requests are to be ended once all is told
        self._telling = False
        self._branch_at = list(range(branches))  # in the order of launch
        if spec.policy == "probable":
            random.shuffle(self._branch_at)
        self._place_of = {branch: place for place, branch in enumerate(self._branch_at)}
        self.runs = [BranchRun(self, index) for index in range(branches)]

    def begin(self) -> None:
        """Start the first branches."""
        self._tell(self._decision.start)

    def record(self) -> Record:
        """What became of the branches so far, in the order of the group."""
        with self._lock:
            record = self._decision.record()
        branches = tuple(record.branches[self._place_of[index]] for index in range(len(self.runs)))
        done = record.done
        if done is not None and done.branch is not None:
            done = replace(done, branch=self._branch_at[done.branch])
        return replace(record, branches=branches, done=done)

    # -- events --------------------------------------------------------------------------------------

    def generated(self, run: BranchRun, tokens: int, confidence: float | None) -> None:
        self._tell(lambda: self._decision.tokens(self._place_of[run.index], max(0, tokens), confidence))

    def answered(self, run: BranchRun, text: Any, meta_info: dict[str, Any]) -> None:
        if not isinstance(text, str):
            self.failed(run, f"{self.spec.variable!r} is no text but {type(text).__name__}")
            return
        if why := why_ended(meta_info):
            self.failed(run, why)
            return
        truncated = is_truncated(meta_info)
        try:
            answer = self._classes.of(branch_answer(text, self.spec.extract, truncated=truncated))
        except Exception as error:  # a caller's own code: the branch has no vote, and is there all the same
            self.failed(run, f"extract raised {type(error).__name__}: {error}")
            return
        confidence = meta_info.get("confidence")
        place = self._place_of[run.index]
        self._settle(run, lambda: self._decision.finished(place, answer, truncated=truncated, confidence=confidence))

    def failed(self, run: BranchRun, why: str) -> None:
        self._settle(run, lambda: self._decision.failed(self._place_of[run.index], why))

    def abandoned(self, run: BranchRun) -> None:
        """A branch that was stopped runs on all the same."""
        self._tell(lambda: [] if run.settled else self._decision.abandoned(self._place_of[run.index]))

    def cancel(self, why: str) -> None:
        """End every branch: those that run, those that were not started, and what those do that have voted."""

        def everything() -> list[Action]:
            self._stop([run for run in self.runs if run.settled and run.stopped is None and run.is_busy], why)
            return self._decision.cancelled(why)

        self._tell(everything)

    def pass_over_idle(self) -> None:
        """Somebody waits for a branch that is not started: those that run and have nothing left to do never will vote.

        So it is where the program generates another variable than the one that votes.
        """
        with self._lock:
            running = [run for run in self.runs if run.started and not run.settled and run.stopped is None]
            if any(run.is_busy for run in running):
                return
        why = f"it has nothing left to do and no variable {self.spec.variable!r}"
        for run in running:
            logger.warning("early stop: branch %d has no vote: %s", run.index, why)
            self.failed(run, why)

    def _settle(self, run: BranchRun, event: Callable[[], list[Action]]) -> None:
        def once() -> list[Action]:
            if run.settled:
                return []
            if not run.started:
                run.pending = event
                return []
            run.settled = True
            return event()

        self._tell(once)

    # -- actions -------------------------------------------------------------------------------------

    def _tell(self, event: Callable[[], list[Action]]) -> None:
        """Tell the decision, and do what it says before anything else may happen.

        A branch that finishes after the decision aborted it has no vote; it must find itself stopped then, or it would
        go on as one that finished. Events come one after the other: one of this same thread, from a policy or a branch
        that is being started, is told after the one that is under way.
        """
        with self._lock:
            self._events.append(event)
            if self._telling:
                return
            self._telling, was_open = True, self._decision.done is None
            try:
                while self._events:
                    for action in self._events.popleft()():
                        self._carry_out(action)
            finally:
                self._telling = False
            ending, self._ending = self._ending, []
            record = self._decision.record() if was_open and self._decision.done is not None else None
        for run in ending:  # all at once: each takes the time of an HTTP request
            if run.in_flight:
                threading.Thread(target=run.end_request, name="rksc-abort", daemon=True).start()
        if record is not None and record.done is not None:
            if record.policy_error is not None:
                logger.warning("early stop: the policy raised, and all branches ran: %s", record.policy_error)
            logger.info("early stop: %s", record.done.statement)

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, Start):
            for run in map(self._run_at, action.branches):
                run.start()
                if run.pending is not None:
                    self._settle(run, run.pending)
        elif isinstance(action, Abort):
            self._stop([self._run_at(place) for place in action.branches], action.reason)
        elif isinstance(action, Done):
            for run in map(self._run_at, self._decision.record().of_fate("not_started")):
                run.stop("not started", action.statement)

    def _stop(self, runs: list[BranchRun], why: str) -> None:
        for run in runs:
            run.stop("stopped", why)
        self._ending += runs

    def _run_at(self, place: int) -> BranchRun:
        return self.runs[self._branch_at[place]]


def _without_verification(policy: Policy) -> Policy:
    """A caller's policy that may not ask for scores, which nobody gives it while branches run."""

    def asked(standing: Standing) -> Ruling | str | None:
        ruling = policy(standing)
        if isinstance(ruling, Ruling) and ruling.verify:
            raise OptionError("verify: fork_similar verifies nothing while branches run; verify_gated does, after that")
        return ruling

    return asked
