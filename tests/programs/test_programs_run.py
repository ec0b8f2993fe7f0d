"""Each program, as a user runs it, on a server that is up."""

from __future__ import annotations

import json
import runpy
import sys

import pytest

from rksc_sgl.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]

PROGRAMS = ["self_consistency", "best_of_n_verified", "tree_of_thought", "many_phrasings", "openai_client"]
COUNTS = {
    "problems",
    "branches",
    "correct",
    "verify_skipped",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "verify_new_tokens",
    "wall_s",
}


def run(monkeypatch: pytest.MonkeyPatch, program: str, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", [program, *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"programs.{program}", run_name="__main__")
    return int(ended.value.code or 0)


@pytest.mark.parametrize("program", PROGRAMS)
def test_it_answers_problems_and_ends_with_one_line_of_json(
    smollm_server: ServerProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: str
) -> None:
    options = ["--url", smollm_server.url, "--problems", "2", "--branches", "4", "--max-tokens", "16"]
    assert run(monkeypatch, program, *options) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["program"] == program
    assert result.keys() >= COUNTS
    assert (result["problems"], result["branches"], result["errors"]) == (2, 4, 0)
    assert result["model"] == "smollm2-135m-instruct"
    assert (result["verify_new_tokens_max_branch"] > 0) == (result["verify_skipped"] < result["problems"])
    assert result["verify_new_tokens_max_branch"] <= 40
    if program in ("self_consistency", "best_of_n_verified", "openai_client"):
        shareable = result["prompt_tokens"] * 3 / 4  # what three of four equal branches could share
        assert result["cached_tokens"] >= 0.85 * shareable


def test_a_vote_that_is_decided_early_starts_no_more_branches(
    smollm_server: ServerProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = ["--url", smollm_server.url, "--source", "reading", "--problems", "4", "--max-tokens", "32"]
    results = {}
    for how in ("certain", "off"):
        assert run(monkeypatch, "self_consistency", *shown, "--early-stop", how) == 0
        results[how] = json.loads(capsys.readouterr().out.splitlines()[-1])
    certain, off = results["certain"], results["off"]
    assert certain["not_started_branches"] > 0 == off["not_started_branches"]
    assert certain["completion_tokens"] + certain["tokens_saved_by_stopping"] <= 4 * 8 * 32
    assert certain["verify_skipped"] == 4
    assert certain["failed_branches"] == 0
    assert run(monkeypatch, "best_of_n_verified", *shown, "--early-stop", "probable", "--risk", "0.2") == 0
    best = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert best["verify_skipped"] == 0 < best["verify_new_tokens"]
    assert run(monkeypatch, "self_consistency", *shown, "--early-stop", "certain", "--risk", "0.2") == 1
    assert "early_stop.risk: goes with probable only" in capsys.readouterr().err.splitlines()[-1]


def test_a_bad_option_and_a_missing_server_are_each_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "self_consistency", "--url", "http://127.0.0.1:9", "--problems", "1") == 1
    assert "cannot be reached" in capsys.readouterr().err.splitlines()[-1]
    assert run(monkeypatch, "self_consistency", "--source", "nothing") == 1
    assert "source: must be" in capsys.readouterr().err.splitlines()[-1]
