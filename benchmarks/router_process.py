"""A router before several servers: the real ``smg``, or ``sglang-router`` before it, as a process of ours."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
import time
from collections.abc import Sequence

from rksc_sgl.errors import OptionError, ServerError, ServerStartError
from rksc_sgl.http_client import HttpClient
from rksc_sgl.parent_death import end_with_parent
from rksc_sgl.server_process import ServerProcess, free_port

MODULES = ("smg", "sglang_router")  # the second one's development goes on as the first


def is_installed(module: str) -> bool:
    """Whether a router can be started."""
    return importlib.util.find_spec(module) is not None


class RouterProcess(ServerProcess):
    """One router; a context manager that ends it on the way out.

    Args:
        workers: base URLs of servers that run.
        policy: how it chooses a worker, in its own words.
        module: which router, one of :data:`MODULES`.
        flags: further ones of its command line.

    Raises:
        OptionError: it is not installed.
    """

    def __init__(self, workers: Sequence[str], policy: str, *flags: str, module: str = MODULES[0]) -> None:
        if not is_installed(module):
            raise OptionError(f"{module} is not installed: pip install {module.replace('_', '-')}")
        self.workers, self.router = list(workers), module
        own = ["--policy", policy, "--prometheus-port", str(free_port()), "--worker-startup-check-interval", "1"]
        super().__init__(["--worker-urls", *self.workers, *own, *flags])

    def command(self) -> list[str]:
        """What is run."""
        return [sys.executable, "-m", __name__, str(os.getpid()), self.router, *self.args]

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until it has found all of its workers."""
        deadline = time.monotonic() + timeout
        with HttpClient(self.url, timeout=5.0) as client:
            while time.monotonic() < deadline and self.returncode is None:
                try:
                    if client.get_json("/readiness").get("healthy_workers") == len(self.workers):
                        return
                except ServerError:  # not yet
                    pass
                time.sleep(0.1)
        raise ServerStartError(f"the router did not find {self.workers}; its last words:\n{self.log_tail()}")


def main() -> None:
    """``python -m benchmarks.router_process PARENT MODULE [the router's arguments]``: end when the parent does."""
    end_with_parent(int(sys.argv[1]))
    module = f"{sys.argv[2]}.launch_router"
    sys.modules["sglang"] = None  # type: ignore[assignment]  # the older one would load all of it, for traces
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()
