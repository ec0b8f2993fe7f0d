"""Whether two answers are the same: by their exact form, else by math-verify in a process of its own, to be killed."""

from __future__ import annotations

import json
import logging
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from rksc_sgl.answers.quantities import exact_value, is_unit

logger = logging.getLogger(__name__)

START_S = 60.0  # imports, on a busy machine
DEADLINE_S = 2.0
WAIT_S = 10.0  # for the comparisons of others, while the worker runs
ORPHAN_S = 1.0  # the worker ends itself this much after the deadline, in case nobody is left to kill it
MEMORY_BYTES = 1 << 30
LONGEST = 200  # characters of an answer that is read as mathematics
MAX_STRIKES = 2  # comparisons that failed, after which an answer is only compared as a string
MAX_FAILURES = 8  # of one process in FAILURES_WITHIN_S; after that, all answers are compared as strings for a while
FAILURES_WITHIN_S = 300.0
_REMEMBERED = 1000  # answers with strikes
_REMEMBERED_PAIRS = 1 << 14
_REMEMBERED_FORMS = 1 << 13
_LONGEST_INTEGER_BITS = 600  # of a value that is compared with an expression; about LONGEST digits

_NUMBER_AND_UNIT = re.compile(r"(?P<value>.*[0-9)}])(?P<unit>\s*[^\W\d].*)", re.DOTALL)
_FUNCTIONS = r"sqrt|pi|sin|cos|tan|log|ln|exp|frac|infinity|inf"
_MATHEMATICAL = re.compile(
    rf"(?:[0-9\s+\-*/^=(){{}}\[\]|!.,%_<>×÷·√π∞]|\\[a-z]+|\b(?:{_FUNCTIONS})\b|(?<![a-z])[a-z](?![a-z]))+",
    re.IGNORECASE,
)
# 1e3 is read as a product with Euler's number, 3 1/2 as 3, and what is divided by zero equals nothing.
_MISREAD = re.compile(r"[0-9]e-?[0-9]|[0-9]\s+[0-9]|/\s*0(?:\.0*)?(?![0-9.])", re.IGNORECASE)
_SAYS_SOMETHING = re.compile(r"[0-9π∞]|\\[a-z]+|\bpi\b", re.IGNORECASE)
_BRACKETED = re.compile(r"(?P<opening>[\[({]?)(?P<items>[^\[\](){}]*)(?P<closing>[\])}]?)")


@dataclass(frozen=True)
class AnswerForm:
    """What an answer is compared by.

    Attributes:
        key: answers of the same key are equal.
        exact: the key says all: an answer of another key that is exact too is another answer.
        mathematics: as math-verify is given it; None where it is not asked.
    """

    key: Hashable
    exact: bool
    mathematics: str | None


class MathWorker:
    """Compares answers in a worker process, which starts when it is first needed and again after it was killed.

    Safe to use from several threads, and after a fork of this process. Comparisons block, so that an event loop should
    not call them. One caller has the worker for at most ``deadline_s`` at a time, and ``START_S`` more where it has to
    be started; the next one waits for at most ``WAIT_S`` while the worker runs, and then its answers are compared as
    strings.

    An answer that brought the worker down ``MAX_STRIKES`` times is no longer compared, nor is anything for a while
    after ``MAX_FAILURES`` such comparisons, so that a model that writes towers of powers costs seconds, not hours.

    Args:
        deadline_s: of one request, which compares an answer with others; the worker is killed then.
        memory_bytes: of address space that the worker may have.
        command: of the worker, before its arguments.
        wait_s: for the requests of others.

    Attributes:
        requests: that the worker was sent.
    """

    def __init__(
        self,
        deadline_s: float = DEADLINE_S,
        memory_bytes: int = MEMORY_BYTES,
        command: Sequence[str] = (sys.executable, "-m", "rksc_sgl.answers.math_worker"),
        wait_s: float = WAIT_S,
    ) -> None:
        self._deadline_s = deadline_s
        self._memory_bytes = memory_bytes
        self._command = list(command)
        self._wait_s = wait_s
        self._lock = threading.Lock()
        self._starting = False
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._owner = os.getpid()
        self._strikes: Counter[str] = Counter()
        self._failures: deque[float] = deque(maxlen=MAX_FAILURES)
        self._known: OrderedDict[tuple[str, str], bool] = OrderedDict()
        self._known_lock = threading.Lock()
        self.requests = 0

    @property
    def pid(self) -> int | None:
        """Process id of the worker; None where none runs."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def same(self, first: str, second: str) -> bool | None:
        """Whether two texts mean the same value; None where it cannot be told (in time, in memory, or any more)."""
        return self.same_as(first, [second])[0]

    def same_as(self, answer: str, others: Sequence[str]) -> list[bool | None]:
        """:meth:`same` for the answer and each of the others, in one request for all that is not known yet."""
        if (
            self._owner != os.getpid()
        ):  # the worker, and perhaps the locks, belong to the process that we were forked from
            self.__init__(self._deadline_s, self._memory_bytes, self._command, self._wait_s)  # type: ignore[misc]
        pending = [other for other in dict.fromkeys(others) if self._remembered(answer, other) is None]
        while pending and self._acquired():
            try:
                pending = [other for other in pending if not self._is_barred(answer, other)]
                pending = self._ask(answer, pending) if pending else []
            finally:
                self._lock.release()
        return [self._remembered(answer, other) for other in others]

    def _ask(self, answer: str, others: list[str]) -> list[str]:
        """One request; those of the others that are to be asked again, after one that brought the worker down.

        One that has only used up what others before it left of the deadline is asked again too, as the first.
        """
        told = 0
        try:
            process = self._running()
            began = time.monotonic()
            self.requests += 1
            self._write(process, json.dumps([answer, *others]))
            for other in others:
                self._remember(answer, other, bool(json.loads(self._line(process, began, self._deadline_s))))
                told += 1
        except (OSError, TimeoutError, EOFError) as error:
            self._end()
            if told > 0 and isinstance(error, TimeoutError):
                return others[told:]
            self._note_failure(answer, others[told])
            logger.warning(
                "answers compared as strings: %r and %r could not be compared mathematically (%s)",
                answer[:40],
                others[told][:40],
                error or type(error).__name__,
            )
        return others[told + 1 :]

    def _acquired(self) -> bool:
        """Wait for the lock, for as long as somebody starts the worker and ``wait_s`` beyond."""
        while not self._lock.acquire(timeout=self._wait_s):
            if not self._starting:
                logger.warning("answers compared as strings: the worker was busy for %g s", self._wait_s)
                return False
        return True

    def _remembered(self, first: str, second: str) -> bool | None:
        if first == second:
            return True
        pair = (first, second) if first < second else (second, first)
        with self._known_lock:
            same = self._known.get(pair)
            if same is not None:
                self._known.move_to_end(pair)
            return same

    def _remember(self, first: str, second: str, same: bool) -> None:
        pair = (first, second) if first < second else (second, first)
        with self._known_lock:
            self._known[pair] = same
            if len(self._known) > _REMEMBERED_PAIRS:
                self._known.popitem(last=False)

    def close(self) -> None:
        """End the worker; the next comparison starts another."""
        with self._lock:
            self._end()

    def _is_barred(self, first: str, second: str) -> bool:
        """Whether one of the two, or too much of late, brought the worker down."""
        if max(self._strikes[first], self._strikes[second]) >= MAX_STRIKES:
            return True
        return len(self._failures) == MAX_FAILURES and time.monotonic() - self._failures[0] < FAILURES_WITHIN_S

    def _note_failure(self, first: str, second: str) -> None:
        if len(self._strikes) > _REMEMBERED:
            self._strikes.clear()
        self._strikes.update((first, second))
        self._failures.append(time.monotonic())

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        arguments = [str(os.getpid()), str(self._deadline_s + ORPHAN_S), str(self._memory_bytes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._starting = True
        try:
            self._process = subprocess.Popen(
                [*self._command, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                bufsize=0,
            )
            self._line(self._process, time.monotonic(), START_S)
        finally:
            self._starting = False
        return self._process

    def _write(self, process: subprocess.Popen[bytes], line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(line.encode() + b"\n")

    def _line(self, process: subprocess.Popen[bytes], began: float, seconds: float) -> bytes:
        """The worker's next line, in so many seconds from when it was asked.

        Raises:
            TimeoutError: there was none in time.
            EOFError: the worker ended.
        """
        assert process.stdout is not None
        while b"\n" not in self._unread:
            if not select.select([process.stdout], [], [], max(0.0, began + seconds - time.monotonic()))[0]:
                raise TimeoutError(f"it took more than {seconds:g} s")
            read = os.read(process.stdout.fileno(), 4096)
            if not read:
                raise EOFError("the worker ended")
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _end(self) -> None:
        process, self._process = self._process, None
        self._unread = b""
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


_worker = MathWorker()


def same_answer(first: str, second: str, worker: MathWorker | None = None) -> bool:
    """Whether two answers are equal: by their exact forms (:func:`form_of`), or else by math-verify.

    Args:
        first: as :func:`~rksc_sgl.answers.normalize_answer` gives it.
        second: the same.
        worker: that compares; by default one for the whole process.
    """
    return same_answers(first, [second], worker)[0]


def same_answers(answer: str, others: Sequence[str], worker: MathWorker | None = None) -> list[bool]:
    """:func:`same_answer` for the answer and each of the others, in one request to the worker.

    The worker is not asked where the forms decide: for equal ones, two exact ones, words and answers that are longer
    than ``LONGEST``.
    """
    form = form_of(answer)
    forms = [form_of(other) for other in others]
    told: dict[str | None, bool | None] = {}
    if form.mathematics is not None:
        asked = dict.fromkeys(
            other.mathematics
            for other in forms
            if other.mathematics is not None and other.key != form.key and not (form.exact and other.exact)
        )
        if asked:
            found = (worker or _worker).same_as(form.mathematics, list(asked))
            told = dict(zip(asked, found, strict=True))
    return [other.key == form.key or bool(told.get(other.mathematics)) for other in forms]


@lru_cache(_REMEMBERED_FORMS)
def form_of(answer: str) -> AnswerForm:
    """What an answer is compared by.

    A number is its exact value, whatever it counts (:func:`~rksc_sgl.answers.quantities.exact_value`). Several numbers
    are their values: in any order, each as often as it is there, with braces or without; in their order where they
    stand in other brackets. An expression may have a unit too, which does not count. All else is its spelling.
    """
    if len(answer) > LONGEST:
        return AnswerForm(answer, True, None)
    value = exact_value(answer)
    if value is not None:
        small = max(value.numerator.bit_length(), value.denominator.bit_length()) <= _LONGEST_INTEGER_BITS
        return AnswerForm(value, True, str(value) if small else None)
    several = _several(answer)
    if several is not None:
        return AnswerForm(several, True, None)
    expression = _without_unit(answer)
    if _is_mathematical(expression):
        written = _as_latex(expression)
        return AnswerForm(written, False, written)
    return AnswerForm(answer, True, None)


def _several(answer: str) -> Hashable | None:
    """The values of a list of numbers, and how it is bracketed; None where it is none."""
    match = _BRACKETED.fullmatch(answer.strip())
    if match is None or "," not in match["items"] or bool(match["opening"]) != bool(match["closing"]):
        return None
    values = [exact_value(item) for item in match["items"].split(",")]
    known = [value for value in values if value is not None]
    if len(known) != len(values):
        return None
    brackets = match["opening"] + match["closing"]
    return ("any order", *sorted(known)) if brackets in ("", "{}") else (brackets, *known)


def _without_unit(answer: str) -> str:
    match = _NUMBER_AND_UNIT.fullmatch(answer)
    return match["value"] if match is not None and is_unit(match["unit"]) else answer


def _as_latex(expression: str) -> str:
    """As math-verify reads it rightly."""
    written = re.sub(r"π|(?<![\\A-Za-z])pi\b", r"\\pi ", expression.replace("**", "^"), flags=re.IGNORECASE)
    return re.sub(r"√\s*(\w+)", r"\\sqrt{\1}", re.sub(r"√\s*\(([^()]*)\)", r"\\sqrt{\1}", written)).strip()


def _is_mathematical(answer: str) -> bool:
    return (
        _SAYS_SOMETHING.search(answer) is not None
        and _MATHEMATICAL.fullmatch(answer) is not None
        and _MISREAD.search(answer) is None
    )
