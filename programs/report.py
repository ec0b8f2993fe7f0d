"""What a program prints at its end: a table for people, one JSON line for others."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from programs.problems import Problem
from rksc_sgl.frontend import BranchGroup, Verdict

REPORT_WIDTH = 120


@dataclass(frozen=True)
class Row:
    """What became of one problem; token counts are sums over its branches.

    Attributes:
        answers: of the branches that were not stopped.
        cached_tokens: prompt tokens that the server had KV of already, in SGLang's sense.
        verify_new_tokens: tokens that verification computed.
        verify_new_tokens_max: the most of these for any one branch.
        stopped_branches, not_started_branches: that could not change the vote any more.
        tokens_saved: estimate of what these would have generated.
        error: why there is no answer; None where there is one.
    """

    problem: str
    question: str
    answers: tuple[str | None, ...] = ()
    chosen: str | None = None
    correct: bool = False
    verify_skipped: bool = False
    reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    verify_new_tokens: int = 0
    verify_new_tokens_max: int = 0
    failed_branches: int = 0
    stopped_branches: int = 0
    not_started_branches: int = 0
    tokens_saved: int = 0
    error: str | None = None


def row_of(problem: Problem, group: BranchGroup, verdict: Verdict, var: str) -> Row:
    """The row of one verified fork."""
    infos = [
        state.get_meta_info(var) or {}
        for state, error in zip(group.states, verdict.errors, strict=True)
        if error is None
    ]
    stopping = group.stopping
    stopped = [] if stopping is None else stopping.of_fate("stopped")
    not_started = [] if stopping is None else stopping.of_fate("not_started")
    ran = [index for index in range(len(group)) if index not in {*stopped, *not_started}]
    generated = sum(info.get("completion_tokens", 0) for info in infos)
    decided = None if stopping is None or len(ran) == len(group) else stopping.done
    return Row(
        problem=problem.id,
        question=problem.question,
        answers=tuple(verdict.answers[index] for index in ran),
        chosen=verdict.answers[verdict.index],
        correct=problem.grade(verdict.best[var]),
        verify_skipped=verdict.skipped,
        reason=verdict.reason if decided is None else f"decided early, {decided.reason}",
        prompt_tokens=sum(info.get("prompt_tokens", 0) for info in infos),
        cached_tokens=sum(info.get("cached_tokens", 0) for info in infos),
        completion_tokens=generated if stopping is None else stopping.tokens_spent,
        verify_new_tokens=verdict.tokens_spent,
        verify_new_tokens_max=max(verdict.new_tokens, default=0),
        failed_branches=sum(verdict.errors[index] is not None for index in ran),
        stopped_branches=len(stopped),
        not_started_branches=len(not_started),
        tokens_saved=0 if stopping is None else stopping.tokens_saved,
    )


def row_of_reply(problem: Problem, text: str, rksc: Mapping[str, Any]) -> Row:
    """The row of a fork that was one request.

    Args:
        problem: that was asked.
        text: the selected answer.
        rksc: what the server told of the fork.
    """
    branches, tokens = rksc["branches"], rksc["tokens"]
    fates = [branch["fate"] for branch in branches]
    ran = [branch for branch in branches if branch["fate"] in ("finished", "failed")]
    early = len(ran) < len(branches)
    return Row(
        problem=problem.id,
        question=problem.question,
        answers=tuple(branch["answer"] for branch in ran),
        chosen=rksc["answer"],
        correct=problem.grade(text),
        verify_skipped=not rksc["verified"],
        reason=f"decided early, {rksc['decided']['reason']}" if early else rksc["reason"],
        prompt_tokens=tokens["prompts_computed"] + tokens["prompts_reused"],
        cached_tokens=tokens["prompts_reused"],
        completion_tokens=tokens["generated"],
        verify_new_tokens=tokens["verifications_computed"],
        verify_new_tokens_max=max(branch["verification_tokens"] for branch in branches),
        failed_branches=sum(branch["error"] is not None for branch in ran),
        stopped_branches=fates.count("stopped"),
        not_started_branches=fates.count("not_started"),
        tokens_saved=tokens["not_generated"],
    )


def summary(program: str, model: str, rows: Sequence[Row], branches: int, wall_s: float, **more: Any) -> dict[str, Any]:
    """The JSON object of a run; sums over its problems, except the one named ``max``."""
    return {
        "program": program,
        "model": model,
        "problems": len(rows),
        "branches": branches,
        "correct": sum(row.correct for row in rows),
        "verify_skipped": sum(row.verify_skipped for row in rows),
        "prompt_tokens": sum(row.prompt_tokens for row in rows),
        "cached_tokens": sum(row.cached_tokens for row in rows),
        "completion_tokens": sum(row.completion_tokens for row in rows),
        "verify_new_tokens": sum(row.verify_new_tokens for row in rows),
        "verify_new_tokens_max_branch": max((row.verify_new_tokens_max for row in rows), default=0),
        "failed_branches": sum(row.failed_branches for row in rows),
        "stopped_branches": sum(row.stopped_branches for row in rows),
        "not_started_branches": sum(row.not_started_branches for row in rows),
        "tokens_saved_by_stopping": sum(row.tokens_saved for row in rows),
        "errors": sum(row.error is not None for row in rows),
        "wall_s": round(wall_s, 2),
        **more,
    }


def table(rows: Sequence[Row]) -> Table:
    """One line a problem."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("problem", no_wrap=True)
    result.add_column("question", no_wrap=True, overflow="ellipsis", max_width=28)
    result.add_column("answers of the branches", overflow="fold")
    result.add_column("chosen")
    result.add_column("right")
    result.add_column("verification", overflow="fold")
    for heading in ("prompt", "cached", "new", "saved", "verify"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        # as Text: brackets in questions and answers are theirs, not markup
        result.add_row(*(Text(cell) for cell in _cells(row)))
    return result


def _cells(row: Row) -> list[str]:
    question = " ".join(row.question.split())
    if row.error is not None:
        return [row.problem, question, "", "", "error", row.error]
    return [
        row.problem,
        question,
        " ".join([*(answer if answer is not None else "-" for answer in row.answers), *_stopped(row)]),
        row.chosen or "-",
        "yes" if row.correct else "no",
        f"skipped: {row.reason}" if row.verify_skipped else "done",
        str(row.prompt_tokens),
        str(row.cached_tokens),
        str(row.completion_tokens),
        str(row.tokens_saved),
        str(row.verify_new_tokens),
    ]


def _stopped(row: Row) -> list[str]:
    counts = ((row.stopped_branches, "stopped"), (row.not_started_branches, "not started"))
    said = ", ".join(f"{count} {what}" for count, what in counts if count)
    return [f"({said})"] if said else []


def _what_stopping_saved(rows: Sequence[Row]) -> str | None:
    """In one sentence; None where nothing was stopped."""
    stopped, waiting = (sum(row.stopped_branches for row in rows), sum(row.not_started_branches for row in rows))
    if not stopped + waiting:
        return None
    generated, saved = sum(row.completion_tokens for row in rows), sum(row.tokens_saved for row in rows)
    share = saved / (generated + saved) if saved else 0.0
    return (
        f"votes that were decided early: {waiting} branches were not started, {stopped} aborted; {generated} tokens "
        f"were generated and about {saved} saved ({share:.0%} of what all branches would have taken)"
    )


def finish(rows: Sequence[Row], result: dict[str, Any], json_path: Path | None) -> None:
    """Print the table and, as the last line, the JSON object; write it to ``json_path`` too."""
    console = Console(width=None if sys.stdout.isatty() else REPORT_WIDTH)
    console.print(table(rows))
    console.print(
        "tokens of all branches: prompt, of these cached, newly generated, saved by stopping (an estimate), computed "
        "by verification",
        style="dim",
    )
    if saved := _what_stopping_saved(rows):
        console.print(saved)
    line = json.dumps(result)
    print(line, flush=True)  # first, so that a path that cannot be written costs nothing
    if json_path is not None:
        json_path.write_text(line + "\n")
