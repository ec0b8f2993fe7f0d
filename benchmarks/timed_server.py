"""Our server with a stopwatch around every hook: what the hooks themselves take, for ``overhead``.

Every worker process is forked from this one, so the stopwatches are in each of them. ``GET /rksc/info`` has their
totals among what the scheduler reports, as ``hook_seconds``.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, ClassVar

from rksc_sgl.options import KEY
from rksc_sgl.server_process import main
from rksc_sgl.sglang_plugin.inspection import report
from rksc_sgl.sglang_plugin.wiring import hooks
from rksc_sgl.sglang_plugin.wiring.registry import Hook

_seconds: dict[str, float] = {}


class Stopwatch:
    """Seconds of calls, less those in which another stopwatch ran within them."""

    running: ClassVar[list[float]] = []  # seconds of inner calls, one entry a call under way

    @classmethod
    def call(cls, name: str | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function; what it takes is counted under the name, or under none (SGLang's own)."""
        cls.running.append(0.0)
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            taken = time.perf_counter() - began
            inner = cls.running.pop()
            if cls.running:
                cls.running[-1] += taken
            if name is not None:
                _seconds[name] = _seconds.get(name, 0.0) + taken - inner


def timed(hook: Hook) -> Hook:
    """The hook with a stopwatch around its function."""
    name = hook.target.rpartition(".")[2]

    def function(*args: Any, **kwargs: Any) -> Any:
        if hook.kind == "around":
            original, *rest = args
            args = (lambda *a, **k: Stopwatch.call(None, original, *a, **k), *rest)
        return Stopwatch.call(name, hook.function, *args, **kwargs)

    return dataclasses.replace(hook, function=function)


def timed_streamer_class(result: type, scheduler: Any) -> type:
    """The output streamer of ours with a stopwatch around what it adds to SGLang's."""

    class Inner(result):  # type: ignore[valid-type,misc]
        def stream_output(self, *args: Any, **kwargs: Any) -> None:
            Stopwatch.call(None, super().stream_output, *args, **kwargs)

    class Outer(report.reporting_streamer_class(Inner, scheduler)):  # type: ignore[misc]
        def stream_output(self, *args: Any, **kwargs: Any) -> None:
            Stopwatch.call("stream_output", super().stream_output, *args, **kwargs)

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
            return Stopwatch.call("reports", super().build_additional_customized_info, reqs)

    return Outer


def with_seconds(result: Any, controller: Any, recv_req: Any) -> Any:
    """What the scheduler reports, with the seconds."""
    report.add_internal_state(result, controller, recv_req)
    result.internal_state[KEY]["hook_seconds"] = dict(_seconds)
    return result


def _timed(hook: Hook) -> Hook:
    replaced: dict[Any, Callable[..., Any]] = {
        report.reporting_streamer_class: timed_streamer_class,
        report.add_internal_state: with_seconds,
    }
    if hook.function in replaced:
        return dataclasses.replace(hook, function=replaced[hook.function])
    return timed(hook)


if __name__ == "__main__":
    hooks.HOOKS = tuple(map(_timed, hooks.HOOKS))
    main()
