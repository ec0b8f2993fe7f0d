"""How the HTTP process tells the scheduler that a fork has ended: nothing more of it is to come.

It goes SGLang's way of an abort, which reaches every scheduler and every rank in the order in which requests do, and
waits for no answer. No request has such an id.
"""

from __future__ import annotations

from typing import Any

from rksc_sgl.memory.settings import lease_seconds

_PREFIX = "\x1frksc-fork-ended:"


def tell_end(tokenizer_manager: Any, group: str) -> None:
    """What is kept of a fork may go; a server that keeps nothing need not be told."""
    from sglang.srt.managers.io_struct import AbortReq

    if lease_seconds():
        tokenizer_manager._dispatch_to_scheduler(AbortReq(rid=_PREFIX + group))


def group_that_ended(rid: str) -> str | None:
    """The fork that an abort tells of; None where it is one of a request."""
    return rid[len(_PREFIX) :] if rid.startswith(_PREFIX) else None
