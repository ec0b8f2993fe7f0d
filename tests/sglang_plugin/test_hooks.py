from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from rksc_sgl.sglang_plugin.wiring.hooks import HOOKS
from rksc_sgl.sglang_plugin.wiring.registry import Hook, problem_of

pytestmark = pytest.mark.slow  # resolving targets imports SGLang


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.target)
def test_every_hooked_target_is_what_this_release_expects(hook: Hook) -> None:
    assert problem_of(hook) is None
    assert hook.target.startswith(f"{hook.module}.")


def test_a_renamed_target_fails_the_doctor_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers.scheduler import Scheduler

    from rksc_sgl.cli import app

    monkeypatch.delattr(Scheduler, "get_output_streamer_class")
    result = CliRunner().invoke(app, ["doctor", "--json", "--no-round-trip"])
    assert result.exit_code == 1
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["ok"] is False
    failed = [check for check in report["checks"] if not check["ok"]]
    assert [check["name"] for check in failed] == [
        "hook sglang.srt.managers.scheduler.Scheduler.get_output_streamer_class"
    ]
    assert "does not exist" in failed[0]["detail"]
    assert "pip install sglang==" in failed[0]["detail"]


def test_changed_parameters_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.entrypoints import http_server

    monkeypatch.setattr(http_server, "generate_contract_error", lambda body, strict: None)
    (hook,) = (hook for hook in HOOKS if hook.target.endswith(".generate_contract_error"))
    problem = problem_of(hook)
    assert problem is not None
    assert "('body', 'strict')" in problem


def test_the_whole_installation_passes_without_a_round_trip(embedded_model: object) -> None:
    from rksc_sgl.cli import app

    result = CliRunner().invoke(app, ["doctor", "--json", "--no-round-trip"])
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["ok"], [check for check in report["checks"] if not check["ok"]]
    assert result.exit_code == 0
    assert {frozenset(check) for check in report["checks"]} == {frozenset({"name", "ok", "detail"})}
