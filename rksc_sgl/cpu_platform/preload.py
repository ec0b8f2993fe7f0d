"""Imported by the fork server: what SGLang's worker processes need, and the server's signals.

A worker that fails sends SIGQUIT to its parent, which SGLang takes to be its main process. Here the parent is the
fork server, so it passes the signal on.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from types import FrameType

from rksc_sgl.parent_death import end_with_parent

_fork_server = os.getpid()


def _pass_on(signum: int, frame: FrameType | None) -> None:
    if os.getpid() == _fork_server:
        os.kill(os.getppid(), signum)
    else:  # a worker inherits this handler and should die of the signal as any process does
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)


signal.signal(signal.SIGQUIT, _pass_on)
# The fork server goes by a pipe that its workers hold open too, and they wait for its end: somebody must begin.
end_with_parent(os.getppid())

import sglang.srt.managers.detokenizer_manager  # noqa: E402
import sglang.srt.managers.scheduler  # noqa: E402
from sglang.srt.plugins import load_plugins  # noqa: E402
from sglang.srt.utils import set_ulimit  # noqa: E402

import rksc_sgl.cpu_platform.lean_layers  # noqa: E402, F401

set_ulimit()
# Applying a hook looks through all modules, some seconds for all of ours: here while the main process imports.
load_plugins()
import sglang.srt.models.registry  # noqa: E402, F401

# What is here stays: the collector need not look at it again, and forked workers share its pages.
gc.collect()
gc.freeze()
sys.stdout.flush()
