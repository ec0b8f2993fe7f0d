"""Program states that a test opens by hand, outside a program."""

from __future__ import annotations

from typing import Any

from sglang.lang.interpreter import ProgramState, StreamExecutor
from sglang.lang.ir import SglSamplingParams

_executors: list[StreamExecutor] = []


def open_state(backend: Any, text: str, stream: bool = False, **sampling: Any) -> ProgramState:
    """A state that begins with ``text``; it is ended with the test."""
    s = ProgramState(StreamExecutor(backend, {}, SglSamplingParams(**sampling), None, stream))
    _executors.append(s.stream_executor)
    s += text
    return s


def end_states() -> None:
    for executor in _executors:
        executor.end()
    _executors.clear()
