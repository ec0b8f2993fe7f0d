"""Counting in the HTTP process: each fork of one request once, when it ends."""

from __future__ import annotations

from typing import Literal

from rksc_sgl.metrics import FORKS, STOPPED_FORK_BRANCHES, STOPPED_FORK_TOKENS, counters
from rksc_sgl.one_request.fork import Chosen, Failed, Fork

CLIENT, DEADLINE, FAILED = "client", "deadline", "failed"


def end_of(fork: Fork, end: Chosen | Failed) -> str:
    """What ended a fork that came to its end: the deadline, a failure, or what decided the vote (``Done.reason``)."""
    if isinstance(end, Failed):
        return DEADLINE if end.late else FAILED
    done = fork.record().done
    return DEADLINE if end.partial or done is None else done.reason


def count_fork(fork: Fork, end: str) -> None:
    """Count a fork that nobody drives any more, by what ended it."""
    record = fork.record()
    counters().add(FORKS, end=end)
    fates: tuple[Literal["stopped", "not_started"], ...] = ("stopped", "not_started")
    for fate in fates:
        if branches := record.of_fate(fate):
            counters().add(STOPPED_FORK_BRANCHES, len(branches), fate=fate, end=end)
    if record.tokens_saved:
        counters().add(STOPPED_FORK_TOKENS, record.tokens_saved, end=end)
