"""The process that compares mathematical answers: ``python -m rksc_sgl.answers.math_worker PARENT SECONDS BYTES``.

One JSON line in (``[answer, first, second, ...]``); for each but the answer itself one line out, as soon as it is
known: ``true`` or ``false``, whether it equals the answer. Parsing what a model wrote can take any time and memory
(``9^{9^{9^9}}``), in C code that no Python signal handler interrupts. So memory is limited by the kernel, and an alarm
whose default action ends the process is set for each request; whoever asked has a shorter deadline.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

ORPHAN_CHECK_S = 5.0  # how often an idle worker looks whether its parent is still there
PARSED = 512  # answers that are kept as they were read
DIGITS = 30  # to which irrational numbers are compared


def serve(parent: int, seconds: float, memory_bytes: int) -> None:
    """Answer until standard input ends or the parent is gone."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no reply
    logging.disable(logging.CRITICAL)  # math-verify warns that its own time limits are off
    equal = _comparison()
    print("ready", file=replies, flush=True)
    while True:
        while not select.select([sys.stdin], [], [], ORPHAN_CHECK_S)[0]:
            if os.getppid() != parent:
                return
        line = sys.stdin.readline()
        if not line:
            return
        answer, *others = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        for other in others:
            try:
                same = equal(answer, other)
            except (MemoryError, RecursionError):
                same = False
            print(json.dumps(same), file=replies, flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _comparison() -> Callable[[str, str], bool]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from sympy import Eq, Expr, Float, Interval, Rational, nsimplify, simplify

    forms = [LatexExtractionConfig(), ExprExtractionConfig()]

    def rational(parsed: list[Any]) -> Any:
        """The exact value of what was read, where it is one rational number; ``x = 5`` is 5."""
        found = parsed[0] if len(parsed) > 0 else None
        if isinstance(found, Eq) and found.lhs.is_Symbol:
            found = found.rhs
        if not isinstance(found, Expr) or found.free_symbols:
            return None
        exact = found.xreplace({number: nsimplify(number, rational=True) for number in found.atoms(Float)})
        value = simplify(exact)
        return value if isinstance(value, Rational) else None

    @lru_cache(PARSED)
    def read(answer: str) -> tuple[list[Any], Any]:
        parsed = parse(f"${answer}$", extraction_config=forms, fallback_mode="no_fallback", parsing_timeout=None)
        return parsed, rational(parsed)

    def equal(first: str, second: str) -> bool:
        (left, left_value), (right, right_value) = read(first), read(second)
        if left_value is not None or right_value is not None:
            return bool(left_value == right_value)
        if [isinstance(one, Interval) for one in left] != [isinstance(one, Interval) for one in right]:
            return False  # verify() takes (1, 2) for {1, 2}, and would then take {2, 1} for (2, 1)
        # verify() takes more from a reference than from an answer to it; equality of two answers has no such sides
        return all(
            verify(*pair, timeout_seconds=None, float_rounding=DIGITS, numeric_precision=DIGITS)
            for pair in ((left, right), (right, left))
        )

    return equal


if __name__ == "__main__":
    serve(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
