"""An SGLang server of our own: started, watched, and gone again without leaving a process behind.

The server runs in a child process and session of its own (``python -m rksc_sgl.server_process ARGS``), so that
everything that it spawns can be found and ended, also after it died half-way. If the watching process is killed,
the kernel ends the server (Linux).
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any

import psutil

from rksc_sgl.errors import ServerError, ServerStartError
from rksc_sgl.http_client import HttpClient
from rksc_sgl.parent_death import end_with_parent

STOP_GRACE_S = 2.0  # SGLang looks for a signal only every five seconds; nothing of it needs an orderly end
START_TIMEOUT_S = 300.0
HEALTH_VARIABLE = "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"
_TAIL_LINES = 200


class ServerProcess:
    """One server; a context manager that stops it on the way out.

    Args:
        args: SGLang server arguments, without host and port where those are given here.
        host: address to listen on.
        port: port to listen on; None takes a free one.
        variables: environment variables of the server, besides ours.
        log: file that the server's output is written to as it comes; None keeps only the end of it, which is
            shown when the start fails.

    Attributes:
        url: base URL of the server.
    """

    module = "rksc_sgl.server_process"  # run as a program; another one ends with :func:`main`

    def __init__(
        self,
        args: Sequence[str],
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        variables: Mapping[str, str] | None = None,
        log: IO[str] | None = None,
    ) -> None:
        self.host = host
        self.port = port if port is not None else free_port(host)
        self.args = [*args, "--host", host, "--port", str(self.port)]
        self.url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{self.port}"
        self._log = log
        self._variables = dict(variables or {})
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Process id of the server; None before it was started."""
        return self._process.pid if self._process else None

    @property
    def returncode(self) -> int | None:
        """Exit code of the server; None while it runs."""
        return self._process.poll() if self._process else None

    def log_tail(self, lines: int = 30) -> str:
        """The last lines that the server wrote."""
        return "".join(list(self._tail)[-lines:])

    def launch(self) -> None:
        """Start the process; it is not ready yet."""
        self._process = subprocess.Popen(
            self.command(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env=self.environment(),
        )
        self._reader = threading.Thread(target=self._read_output, daemon=True)
        self._reader.start()

    def command(self) -> list[str]:
        """What is run."""
        return [sys.executable, "-m", self.module, str(os.getpid()), *self.args]

    def environment(self) -> dict[str, str]:
        """What it is run in."""
        # With this, SGLang's /health answers at once and not after a token and a second.
        environment = {HEALTH_VARIABLE: "0", **os.environ}
        environment |= {"PYTHONUNBUFFERED": "1", **self._variables}
        # Without cached bytecode every one of SGLang's processes compiles some thousand modules anew.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        return environment

    def start(self, timeout: float = START_TIMEOUT_S) -> None:
        """Start the process and wait until it answers.

        Raises:
            ServerStartError: it ended, or did not answer in ``timeout`` seconds.
        """
        self.launch()
        try:
            self.wait_ready(timeout)
        except BaseException:
            self.stop()
            raise

    def wait_ready(self, timeout: float = START_TIMEOUT_S) -> None:
        """Wait until the server answers ``/health`` with 200."""
        deadline = time.monotonic() + timeout
        with HttpClient(self.url, timeout=5.0) as client:
            while time.monotonic() < deadline:
                if self.returncode is not None:
                    if self._reader is not None:
                        self._reader.join(2.0)
                    raise ServerStartError(
                        f"the server ended with exit code {self.returncode} before it was ready; its last words:\n"
                        f"{self.log_tail()}"
                    )
                with contextlib.suppress(ServerError):  # not yet
                    client.request("GET", "/health")
                    return
                time.sleep(0.2)
        raise ServerStartError(f"the server was not ready after {timeout:.0f} s; its last words:\n{self.log_tail()}")

    def wait(self) -> int:
        """Wait until the server ends; its exit code."""
        assert self._process is not None, "wait() before launch()"
        return self._process.wait()

    def stop(self, grace: float = STOP_GRACE_S) -> None:
        """End the server and everything that it started; in order first, by force after ``grace`` seconds."""
        if self._process is None:
            return
        family = _family(self._process.pid)
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=grace)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._reader is not None:
            self._reader.join(2.0)

    def get_json(self, path: str) -> Any:
        """The answer to ``GET path``.

        Raises:
            ServerUnreachableError: no answer.
            ServerRefusedError: an error status.
        """
        with HttpClient(self.url, timeout=30.0) as client:
            return client.get_json(path)

    def _read_output(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            self._tail.append(line)
            if self._log is not None:
                self._log.write(line)
                self._log.flush()


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen on the port now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _family(pid: int) -> list[psutil.Process]:
    """The process and all that descend from it, as far as they are there."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def serve_here(args: list[str]) -> None:
    """SGLang's own server, with plugins loaded, in this process."""
    from rksc_sgl.cpu_platform import warm_fork

    warm_fork.allow()
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args(args))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def main() -> None:
    """``python -m MODULE PARENT [SGLang's arguments]``: serve, and end when the parent does."""
    end_with_parent(int(sys.argv[1]))
    serve_here(sys.argv[2:])


if __name__ == "__main__":
    main()
