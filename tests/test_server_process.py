"""Servers come up, go down, and are missed when they are gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rksc_sgl.errors import ServerStartError
from rksc_sgl.server_process import ServerProcess, free_port

pytestmark = [pytest.mark.server, pytest.mark.slow]


def family(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def all_gone(processes: list[psutil.Process], seconds: float = 45.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        alive = [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.1)
    return False


def serve(tiny_model: Path, port: int) -> subprocess.Popen[str]:
    """``rksc serve``, waited for until it says what is active."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rksc_sgl.cli", "serve", "--model-path", str(tiny_model), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    said = ""
    while "memory: " not in said:  # its last line
        line = process.stdout.readline()
        assert line, f"it ended, and said {said!r}"
        said += line
    assert f"on http://127.0.0.1:{port}\n" in said
    assert "  offered: exact, blend, merge, exit, verify\n" in said and "refused" not in said and "untested" not in said
    assert "hooks in place" in said and "KV pool up to" in said
    return process


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda end: end.name)
def test_rksc_serve_leaves_no_process_behind(tiny_model: Path, end: signal.Signals) -> None:
    process = serve(tiny_model, free_port())
    members = family(process.pid)
    assert len(members) >= 4  # this command, the server, its scheduler and its detokenizer
    process.send_signal(end)
    assert all_gone(members)
    assert process.wait() == (0 if end is not signal.SIGKILL else -signal.SIGKILL)


def test_a_program_whose_server_is_killed_says_so_in_seconds(embedded_model: Path) -> None:
    with ServerProcess(["--model-path", str(embedded_model), "--max-total-tokens", "20000"]) as server:
        program = subprocess.Popen(
            [
                *(sys.executable, "-m", "programs.self_consistency", "--url", server.url),
                *("--problems", "2", "--max-tokens", "2000", "--temperature", "1.0"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        deadline = time.monotonic() + 120
        while "Decode batch" not in server.log_tail(200) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert program.poll() is None, program.communicate()[1]
        assert server.pid is not None
        members = family(server.pid)
        os.kill(server.pid, signal.SIGKILL)
        began = time.monotonic()
        _, complaint = program.communicate(timeout=60)
        assert time.monotonic() - began < 20
        assert program.returncode == 1
        assert "self_consistency: the SGLang server at" in complaint
        assert "cannot be reached or went away" in complaint
        assert "Traceback" not in complaint
        assert all_gone(members)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    server = ServerProcess(["--model-path", str(tmp_path / "nowhere")])
    with pytest.raises(ServerStartError, match="before it was ready") as caught:
        server.start()
    assert "nowhere" in str(caught.value)
    assert server.returncode not in (None, 0)
