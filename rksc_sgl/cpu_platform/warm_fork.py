"""A faster start on a CPU: SGLang's worker processes are forked from one that has imported SGLang already.

SGLang spawns its scheduler and detokenizer as new interpreters after its main process has imported everything, and
each imports everything again: on two cores that is more than half of the time to the first token. Here Python's
fork server starts *with* the main process and imports on the second core while the first does the same; when
SGLang asks for workers, they are forked from it in an instant. The environment variables that SGLang has set by
then travel with each worker.

Not used where an accelerator is present (a process that is to use CUDA should not be a fork), nor for a server
that was not started by ``rksc serve`` or our programs.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import sys
from typing import Any

from rksc_sgl import cpu_platform

logger = logging.getLogger(__name__)

PRELOAD = "rksc_sgl.cpu_platform.preload"
START_METHOD = "rksc_warm_fork"

_started = False


class _WarmProcess(multiprocessing.context.ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        process_obj.environment = dict(os.environ)
        return multiprocessing.context.ForkServerProcess._Popen(process_obj)  # type: ignore[attr-defined]

    def run(self) -> None:
        adopt_environment()
        super().run()


class _WarmContext(multiprocessing.context.ForkServerContext):
    # A worker is told the name of its parent's method and knows only Python's own.
    _name = "forkserver"
    Process = _WarmProcess  # type: ignore[assignment]


def start() -> None:
    """Start the fork server and let it import SGLang; returns at once. Linux only."""
    global _started
    if sys.platform != "linux":
        return
    multiprocessing.set_forkserver_preload([PRELOAD])
    multiprocessing.forkserver.ensure_running()
    _started = True


def use_for_workers(result: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER hook on SGLang's choice of how to start workers."""
    if not _started or not cpu_platform.in_use():
        return
    multiprocessing.context._concrete_contexts[START_METHOD] = _WarmContext()  # type: ignore[attr-defined]
    multiprocessing.set_start_method(START_METHOD, force=True)
    logger.info("workers are forked from a process that has imported SGLang")


def adopt_environment() -> None:
    """In a forked worker: take over the environment of the process that asked for it."""
    environment = getattr(multiprocessing.current_process(), "environment", None)
    if environment is None:
        return
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
