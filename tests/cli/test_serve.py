from __future__ import annotations

import socket
from dataclasses import asdict, replace
from typing import Any

import pytest
from typer.testing import CliRunner

from rksc_sgl.cli import app
from rksc_sgl.cli.serve import problems_in, run, summary
from rksc_sgl.errors import RkscError
from rksc_sgl.server_arguments import argument, server_arguments, take_switches
from rksc_sgl.support import Facts, offers_of


def test_sglang_flags_pass_through() -> None:
    arguments = server_arguments(["--model-path=org/m", "--tp", "2", "--host", "0.0.0.0", "--port=1"])
    assert arguments == ["--model-path", "org/m", "--tp", "2"]


def test_what_the_user_chose_stays() -> None:
    own = ["--model-path", "m", "--radix-cache-backend", "mine"]
    assert server_arguments(own) == own


def test_a_server_needs_a_model() -> None:
    with pytest.raises(RkscError, match="--model-path"):
        server_arguments(["--tp", "2"])


@pytest.mark.parametrize("port", ["0", "99999", "http", "-1"])
def test_an_invalid_port_is_refused(port: str) -> None:
    with pytest.raises(RkscError, match="--port"):
        run(["--model-path", "m", f"--port={port}"])


def test_a_port_that_is_taken_is_refused_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RkscError, match="is taken"):
            run(["--model-path", "m", "--port", str(taken.getsockname()[1])])


def test_our_switches_become_variables_of_the_servers_processes() -> None:
    left, variables = take_switches(["--tp", "2", "--rksc-allow-untested", "--rksc-pass-tokens", "7", "--port", "1"])
    assert left == ["--tp", "2", "--port", "1"]
    assert variables == {"RKSC_ALLOW_UNTESTED": "1", "RKSC_PASS_TOKENS": "7"}
    assert take_switches(["--rksc-trace", "--rksc-audit-stop", "--rksc-audit-rate=0.5"]) == (
        [],
        {"RKSC_TRACE": "1", "RKSC_AUDIT_STOP": "1", "RKSC_AUDIT_RATE": "0.5"},
    )


@pytest.mark.parametrize(("switch", "value"), [("--rksc-pass-tokens", "many"), ("--rksc-audit-rate", "2")])
def test_an_invalid_value_of_a_switch_is_refused_before_anything_starts(switch: str, value: str) -> None:
    with pytest.raises(RkscError, match=value):
        take_switches([switch, value])


def summary_of(facts: Facts, **options: Any) -> list[str]:
    offers = {name: asdict(offer) for name, offer in offers_of(facts, **options).items()}
    scheduler = {"attention_backend": "A", "tree_cache": "T", "offers": offers}
    info = {"version": "1", "platform": "P", "radix_cache_backend": None, "hooks": {"a": 1}, "schedulers": [scheduler]}
    return summary("http://here", info).splitlines()


def test_the_summary_names_what_is_refused_and_what_is_untested() -> None:
    plain = summary_of(Facts())
    assert "  offered: exact, blend, merge, exit, verify" in plain
    assert not any("refused" in line or "untested" in line for line in plain)
    facts = replace(Facts(), lora=True, speculative="NGRAM")
    refused = summary_of(facts)
    assert "  offered: exact, verify" in refused
    assert any(line.startswith("  merge: refused: a merge was not run with this") for line in refused)
    untested = summary_of(facts, allow_untested=True)
    assert "  offered: exact, merge, verify" in untested
    assert any(line.startswith("  merge: untested: ") and "this adapter (LoRA)" in line for line in untested)
    assert any(line.startswith("  blend: refused: a blend leaves out tokens that NGRAM") for line in untested)


def test_the_last_of_a_repeated_flag_counts() -> None:
    assert argument(["--port", "1", "--port=2"], "--port") == "2"
    assert argument(["--model_path", "m"], "--model-path") == "m"
    assert argument(["--port"], "--port") is None


def test_help_names_sglangs_flags_and_the_environment() -> None:
    result = CliRunner().invoke(app, ["serve", "--help"])
    assert result.exit_code == 0
    assert "--sglang-help" in result.stdout
    assert "RKSC_CACHE_DIR" in result.stdout


def test_a_hook_that_is_in_no_process_is_a_problem() -> None:
    fine, idle = {"applied": True, "problem": None}, {"applied": None, "problem": None}
    broken = {"applied": False, "problem": "b does not exist"}
    assert problems_in({"hooks": {"a": fine, "b": idle}, "schedulers": [{"hooks": {"a": idle, "b": fine}}]}) == []
    assert problems_in({"hooks": {"a": idle}, "schedulers": [{"hooks": {"a": idle}}]}) == ["a is hooked in no process"]
    assert "b does not exist" in problems_in({"hooks": {"b": idle}, "schedulers": [{"hooks": {"b": broken}}]})
    assert problems_in({"hooks": {}, "schedulers": [None]}) == ["the scheduler does not report the rksc plugin"]
