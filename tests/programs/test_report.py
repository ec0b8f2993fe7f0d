from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from programs.report import Row, finish, summary, table


def _printed(rows: list[Row]) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table(rows))
    return capture.get()


def test_brackets_in_questions_answers_and_errors_are_printed_and_not_read_as_markup() -> None:
    row = Row("p1", "close [/b] or [red]", ("[1, 2]", None), "[1, 2]", True)
    printed = _printed([row, Row("p2", "q", error="server said [/nothing]")])
    for text in ("close [/b] or [red]", "[1, 2] -", "server said [/nothing]"):
        assert text in printed


def test_a_row_says_why_verification_was_skipped_and_when_it_was_done() -> None:
    printed = _printed([Row("p1", "q", verify_skipped=True, reason="2 of 2 agree"), Row("p2", "q")])
    skipped, done = (line for line in printed.splitlines() if line.strip().startswith(("p1", "p2")))
    assert "skipped: 2 of 2 agree" in skipped
    assert "done" in done


def test_what_stopping_saved_is_said_once_and_only_where_something_was_stopped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stopped = Row("p1", "q", ("7", "7"), "7", completion_tokens=20, not_started_branches=2, tokens_saved=20)
    aborted = Row("p2", "q", ("7", "8"), "7", completion_tokens=40, stopped_branches=1)
    printed = _printed([stopped, aborted])
    assert "7 7 (2 not started)" in printed and "7 8 (1 stopped)" in printed
    finish([stopped, aborted], {}, None)
    said = " ".join(capsys.readouterr().out.split())
    assert "2 branches were not started, 1 aborted; 60 tokens were generated and about 20 saved (25% of" in said
    finish([Row("p1", "q", ("7",))], {}, None)
    assert "not started" not in capsys.readouterr().out
    result = summary("program", "model", [stopped, aborted], 2, 0.0)
    keys = ("stopped_branches", "not_started_branches", "tokens_saved_by_stopping")
    assert [result[key] for key in keys] == [1, 2, 20]


def test_the_summary_adds_up_its_rows_and_keeps_extra_fields() -> None:
    rows = [
        Row("p1", "q", correct=True, verify_skipped=True, prompt_tokens=100, cached_tokens=80, completion_tokens=20),
        Row("p2", "q", prompt_tokens=50, completion_tokens=5, verify_new_tokens=52, verify_new_tokens_max=26),
    ]
    result = summary("program", "model", rows, 2, 1.234, note="extra")
    assert result["problems"] == 2
    assert (result["correct"], result["verify_skipped"]) == (1, 1)
    assert [result[f"{kind}_tokens"] for kind in ("prompt", "cached", "completion")] == [150, 80, 25]
    assert (result["verify_new_tokens"], result["verify_new_tokens_max_branch"]) == (52, 26)
    assert (result["wall_s"], result["note"]) == (1.23, "extra")


def test_a_run_without_rows_has_a_summary_too() -> None:
    assert summary("program", "model", [], 8, 0.0)["verify_new_tokens_max_branch"] == 0


def test_the_json_line_is_printed_even_where_its_file_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result = summary("program", "model", [], 8, 0.0)
    with pytest.raises(FileNotFoundError):
        finish([], result, tmp_path / "missing" / "out.json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
