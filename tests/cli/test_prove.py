"""``rksc prove`` against real servers, against one that reuses nothing, and against none."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rksc_sgl import __version__
from rksc_sgl.cli import app, main
from rksc_sgl.cli.prove import FULL, check_version, number_types
from rksc_sgl.errors import ServerRefusedError, ServerVersionError
from rksc_sgl.model_fetch import DEFAULT_MODEL
from rksc_sgl.options import KEY, SHARE_MODES
from rksc_sgl.proof.arms import OPTIONAL
from rksc_sgl.proof.texts import OTHER_NUMBER
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess, free_port
from tests.serving import serving


class Silent:
    """A server that takes a request and does not answer until it is released."""

    def __init__(self) -> None:
        self.asked, self.released = threading.Event(), threading.Event()
        silent = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                silent.asked.set()
                silent.released.wait(60.0)
                self.send_error(404)

            def log_message(self, *args: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


class Exact:
    """A server that shares identical prompts only, as one that offers neither blends nor merges."""

    def __init__(self, refusals: dict[str, str]) -> None:
        self.shares: set[str | None] = set()
        self.cached: set[str] = set()
        offers = {name: {"offered": name not in refusals, "refusal": refusals.get(name, "")} for name in OPTIONAL}
        info = {"version": __version__, "share_modes": list(SHARE_MODES), "schedulers": [{"offers": offers}]}
        told = {
            "/rksc/info": info,
            "/model_info": {"model_path": "meta-llama/Llama-3.1-8B-Instruct"},
            "/server_info": {"dtype": "float32", "kv_cache_dtype": "auto"},
        }
        exact = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(told[self.path])

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.path.startswith("/flush_cache"):
                    exact.cached.clear()
                self._answer(exact.generated(json.loads(body)) if self.path == "/generate" else {})

            def _answer(self, value: Any) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(value).encode())

            def log_message(self, *args: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def generated(self, body: dict[str, Any]) -> dict[str, Any]:
        text, tokens = body["text"], len(body["text"].split())
        options = body["sampling_params"].get("custom_params", {}).get(KEY)
        self.shares.add(options and options["share"])
        cached = tokens - 1 if text in self.cached else 0
        self.cached.add(text)
        likely, other = (9, 7) if f"H-{OTHER_NUMBER}" in text else (7, 9)
        meta: dict[str, Any] = {
            "prompt_tokens": tokens,
            "cached_tokens": cached,
            "output_top_logprobs": [[[-0.01, likely, None], [-5.0, other, None]]],
        }
        if options:
            meta[KEY] = {"mode": "exact", "reused_tokens": cached, "declined": "not offered"}
        return {"meta_info": meta}


@pytest.fixture
def silent() -> Iterator[Silent]:
    one = Silent()
    with serving(one.server, one.released.set):
        yield one


def proof_of(url: str) -> tuple[int, dict[str, Any]]:
    """Exit code and the JSON object of one run."""
    result = CliRunner().invoke(app, ["prove", "--url", url, "--repeats", "1", "--json"])
    assert result.stdout, result.exception
    return result.exit_code, json.loads(result.stdout)


def test_help_says_what_is_proven_and_that_the_cache_is_flushed() -> None:
    result = CliRunner().invoke(app, ["prove", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0
    for word in ("--url", "--api-key", "--repeats", "--json", "flushed", "Exit code 1"):
        assert word in result.stdout


def test_a_missing_server_is_reported_in_one_line_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rksc", "prove", "--url", f"http://127.0.0.1:{free_port()}"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rksc: the SGLang server at ") and err.count("\n") == 1


def test_a_server_without_the_plugin_is_recognised(silent: Silent) -> None:
    silent.released.set()
    result = CliRunner().invoke(app, ["prove", "--url", silent.url])
    assert isinstance(result.exception, ServerRefusedError)
    assert "runs without the rksc plugin" in str(result.exception)


@pytest.mark.parametrize("info", [{"version": "9.9.9"}, {}])
def test_a_server_of_another_version_is_refused_by_name(info: dict[str, Any]) -> None:
    with pytest.raises(ServerVersionError, match="use the same version on both sides"):
        check_version("http://there", info)


def test_only_full_precision_of_model_and_kv_is_judged_as_such() -> None:
    assert number_types({"dtype": "float32", "kv_cache_dtype": "auto"}) == FULL
    assert number_types({"dtype": "float32", "kv_cache_dtype": "float32"}) == FULL
    assert number_types({"dtype": "bfloat16", "kv_cache_dtype": "auto"}) == "bfloat16"
    assert number_types({"dtype": "float32", "kv_cache_dtype": "fp8_e4m3"}) == "float32 with KV in fp8_e4m3"


@pytest.mark.slow  # imports SGLang
@pytest.mark.parametrize("declined", [("merge",), ("blend", "merge")])
def test_a_server_is_not_asked_for_what_it_declines(declined: tuple[str, ...]) -> None:
    server = Exact({name: f"no {name} on this server" for name in declined})
    with serving(server.server):
        code, found = proof_of(server.url)
        shown = CliRunner().invoke(app, ["prove", "--url", server.url, "--repeats", "1"]).stdout
    assert not server.shares & set(declined)
    assert [found["blend_offered"], found["merge_offered"]] == [name not in declined for name in OPTIONAL]
    failed = {row["name"] for row in found["rows"] if not row["ok"]}
    assert ("blend" in failed) == ("blend" not in declined), "where it offers blends, it makes none"
    assert code == (1 if failed else 0), found["verdict"]
    for name in declined:
        assert f"{name} is not offered: no {name} on this server" in shown


def test_zero_repeats_are_refused() -> None:
    assert CliRunner().invoke(app, ["prove", "--repeats", "0"]).exit_code == 2


def interrupted(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a process says that is interrupted, again where need be: the first interrupt is held back until its request
    times out if it comes between Python's look for signals and the system call that waits."""
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=10.0)
    process.kill()
    raise AssertionError(f"it goes on; it said {process.communicate()}")


def test_an_interrupt_ends_it_without_a_traceback(silent: Silent) -> None:
    command = [sys.executable, "-m", "rksc_sgl.cli", "prove", "--url", silent.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert silent.asked.wait(60.0)
        out, err = interrupted(process)
    assert process.returncode not in (0, None)
    assert "Traceback" not in out + err


@pytest.mark.server
@pytest.mark.slow
def test_a_server_that_reuses_what_it_says_is_proven(smollm_server: ServerProcess) -> None:
    code, found = proof_of(smollm_server.url)
    assert found["proven"] and code == 0, found["verdict"]
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["exact"]["cached_tokens"] == rows["exact"]["prompt_tokens"] - 1
    assert rows["blend"]["taken_tokens"] > 400
    assert 0 < rows["blend"]["computed_tokens"] < rows["blend"]["prompt_tokens"] / 5, (
        "another opening, and a tenth of the notes"
    )
    assert rows["control after blend"]["cached_tokens"] == 0
    assert "too few tokens align" in rows["declined blend"]["declined"]
    assert rows["blend"]["kl"] < found["blend_limit"] < rows["wrong number"]["kl"]
    assert found["merge_offered"]
    assert rows["merge"]["replaced_tokens"] > 400 and rows["declined merge"]["replaced_tokens"] == 0


@pytest.mark.server
@pytest.mark.slow
def test_the_table_ends_with_the_verdict(smollm_server: ServerProcess) -> None:
    result = CliRunner().invoke(app, ["prove", "--url", smollm_server.url, "--repeats", "1"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.strip().splitlines()
    assert lines[-1].startswith("proven: ")
    for name in ("cold", "noise floor", "exact", "blend", "merge", "declined merge", "control after blend"):
        assert any(line.strip().startswith(name) for line in lines), name


@pytest.mark.server
@pytest.mark.slow
def test_reuse_that_silently_does_not_happen_fails_and_the_rows_are_named(embedded_model: Path) -> None:
    arguments = ["--model-path", DEFAULT_MODEL, "--max-total-tokens", "8000", "--disable-radix-cache"]
    with ServerProcess(server_arguments(arguments)) as server:
        code, found = proof_of(server.url)
    assert code == 1 and not found["proven"]
    failed = {row["name"] for row in found["rows"] if not row["ok"]}
    assert failed == {"exact"}
    assert not found["blend_offered"] and not found["merge_offered"], "without a tree it declines both"
    assert found["verdict"].startswith("not proven: exact found 0 of")
