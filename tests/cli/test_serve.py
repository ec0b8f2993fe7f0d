from __future__ import annotations

import socket

import pytest
from typer.testing import CliRunner

from rksc_sgl.cli import app
from rksc_sgl.cli.serve import problems_in, run, server_arguments
from rksc_sgl.errors import RkscError
from rksc_sgl.server_process import argument


def test_sglang_flags_pass_through_and_our_backend_is_selected() -> None:
    arguments = server_arguments(["--model-path=org/m", "--tp", "2", "--host", "0.0.0.0", "--port=1"])
    assert arguments == ["--model-path", "org/m", "--tp", "2", "--radix-cache-backend", "rksc"]


def test_what_the_user_chose_stays() -> None:
    own = ["--model-path", "m", "--radix-cache-backend", "mine"]
    assert server_arguments(own).count("--radix-cache-backend") == 1
    assert "--radix-cache-backend" not in server_arguments(["--model-path", "m", "--disable-radix-cache"])


def test_a_server_needs_a_model() -> None:
    with pytest.raises(RkscError, match="--model-path"):
        server_arguments(["--tp", "2"])


@pytest.mark.parametrize("port", ["0", "99999", "http", "-1"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(RkscError, match="--port"):
        run(["--model-path", "m", f"--port={port}"])


def test_a_port_that_is_taken_is_refused_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RkscError, match="is taken"):
            run(["--model-path", "m", "--port", str(taken.getsockname()[1])])


def test_the_last_of_a_repeated_flag_counts() -> None:
    assert argument(["--port", "1", "--port=2"], "--port") == "2"
    assert argument(["--model_path", "m"], "--model-path") == "m"
    assert argument(["--port"], "--port") is None


def test_help_names_sglangs_flags() -> None:
    result = CliRunner().invoke(app, ["serve", "--help"])
    assert result.exit_code == 0
    assert "--sglang-help" in result.stdout


def test_a_hook_that_is_in_no_process_is_a_problem() -> None:
    fine, idle = {"applied": True, "problem": None}, {"applied": None, "problem": None}
    broken = {"applied": False, "problem": "b does not exist"}
    assert problems_in({"hooks": {"a": fine, "b": idle}, "schedulers": [{"hooks": {"a": idle, "b": fine}}]}) == []
    assert problems_in({"hooks": {"a": idle}, "schedulers": [{"hooks": {"a": idle}}]}) == ["a is hooked in no process"]
    assert "b does not exist" in problems_in({"hooks": {"b": idle}, "schedulers": [{"hooks": {"b": broken}}]})
    assert problems_in({"hooks": {}, "schedulers": [None]}) == ["the scheduler does not report the rksc plugin"]
