"""Each way in which a server can fail to be what it says makes the verdict say so."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from rksc_sgl.placement.worth import NOT_FASTER
from rksc_sgl.proof.arms import (
    AFTER_BLEND,
    AFTER_MERGE,
    BLEND,
    COLD,
    DECLINED_BLEND,
    DECLINED_MERGE,
    EXACT,
    MERGE,
    NOISE,
    OPTIONAL,
    WRONG,
    Answer,
    Measured,
    arms_of,
)
from rksc_sgl.proof.outcome import FLOOR_FULL, FLOOR_HALF, Proof, computed_tokens, judge

PROMPT = 700
RIGHT = {4: math.log(0.90), 7: math.log(0.05)}
NEAR = {4: math.log(0.88), 7: math.log(0.06)}  # KL 0.002
OTHERWISE = {4: math.log(0.80), 7: math.log(0.15)}  # KL 0.05
WRONG_NUMBER = {4: math.log(0.05), 7: math.log(0.90)}  # KL 2.5


def answer(cached: int = 0, report: dict[str, Any] | None = None, seconds: float = 1.0, **changes: Any) -> Answer:
    return replace(Answer(RIGHT, PROMPT, cached, report, seconds), **changes)


def blended(**changes: Any) -> dict[str, Any]:
    report = {"mode": "blend", "reused_tokens": 0, "taken_tokens": 640, "computed_tokens": 60}
    return {**report, "recomputed_tokens": 30, "replaced_tokens": 0, **changes}


def merged(**changes: Any) -> dict[str, Any]:
    return {"mode": "merge", "reused_tokens": 0, "merged_tokens": PROMPT - 1, "replaced_tokens": PROMPT, **changes}


def declined(**changes: Any) -> dict[str, Any]:
    return {"mode": "exact", "reused_tokens": 0, "declined": "too few tokens align", **changes}


def measured() -> Measured:
    """What a server answers that is in order."""
    return Measured(
        exact={name: answer() for name in ("first", "other", "same", "changed", "wrong", "stray")},
        answers={
            COLD: [answer(), answer()],
            NOISE: [answer(), answer(seconds=1.1)],
            EXACT: [answer(PROMPT - 1, {"mode": "exact", "reused_tokens": PROMPT - 1}, 0.1)] * 2,
            BLEND: [answer(0, blended(), 0.3, logprobs=NEAR)] * 2,
            MERGE: [answer(PROMPT - 1, merged(), 0.2)] * 2,
            DECLINED_BLEND: [answer(0, declined())] * 2,
            DECLINED_MERGE: [answer(0, declined(declined="numbers"))] * 2,
            AFTER_BLEND: [answer()] * 2,
            AFTER_MERGE: [answer()] * 2,
            WRONG: [answer(logprobs=WRONG_NUMBER)] * 2,
        },
    )


def proof_of(found: Measured, offered: tuple[str, ...] = OPTIONAL, full: bool = True) -> Proof:
    return judge(found, arms_of(offered), offered, full)


def with_answer(name: str, other: Answer) -> Measured:
    """In order, but for the second repeat of an arm."""
    found = measured()
    found.answers[name] = [found.answers[name][0], other]
    return found


def test_a_server_that_works_is_proven() -> None:
    proof = proof_of(measured())
    assert proof.proven and proof.verdict == "proven: all 10 rows are as they must be"
    assert proof.notes == ()


def test_the_rows_say_what_was_measured() -> None:
    rows = {row.name: row for row in proof_of(measured()).rows}
    blend, merge = rows[BLEND], rows[MERGE]
    assert (blend.taken_tokens, blend.recomputed_tokens, blend.computed_tokens) == (640, 30, 60)
    assert (merge.merged_tokens, merge.replaced_tokens, merge.computed_tokens) == (PROMPT - 1, PROMPT, 1)
    assert (rows[DECLINED_MERGE].declined, rows[COLD].declined) == ("numbers", "")
    assert rows[EXACT].reused_tokens == PROMPT - 1
    assert (rows[NOISE].seconds, rows[NOISE].ratio) == (1.05, 1.05)
    assert blend.ratio == pytest.approx(0.3)
    assert rows[COLD].kl == 0.0 < blend.kl < 0.01 < 2.0 < rows[WRONG].kl


@pytest.mark.parametrize(
    ("offered", "rows", "said"),
    [(("blend",), 7, "(merge: not"), (("merge",), 7, "(blend: not"), ((), 4, "(blend, merge: not")],
)
def test_a_server_that_declines_something_is_proven_and_the_verdict_says_so(
    offered: tuple[str, ...], rows: int, said: str
) -> None:
    proof = proof_of(measured(), offered)
    assert proof.proven and len(proof.rows) == rows
    assert f"{said} offered by this server)" in proof.verdict


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        (COLD, answer(5), "cold found 5 tokens cached after a flush"),
        (COLD, answer(logprobs=NEAR), "cold has KL"),
        (NOISE, answer(report=declined()), "noise floor has a report in meta_info, and did not opt in"),
        (EXACT, answer(0, {"mode": "exact", "reused_tokens": 0}), "exact found 0 of 700 tokens cached"),
        (EXACT, answer(PROMPT - 1), "exact has no report in meta_info"),
        (EXACT, answer(PROMPT - 1, {"mode": "exact", "reused_tokens": 3}), "exact reports 3 tokens reused, and 699"),
        (EXACT, answer(PROMPT - 1, {"mode": "blend", "reused_tokens": PROMPT - 1}), "exact ran as blend"),
        (
            EXACT,
            answer(PROMPT - 1, {"mode": "exact", "reused_tokens": PROMPT - 1}, logprobs=NEAR),
            "exact has KL 0.00",
        ),
        (BLEND, answer(), "blend has no report in meta_info"),
        (BLEND, answer(0, {"mode": "exact"}), "blend took over 0 tokens (no reason is reported)"),
        (
            BLEND,
            answer(0, declined(declined="the model has no rotary table")),
            "blend took over 0 tokens (declined: the model has no rotary table)",
        ),
        (BLEND, answer(0, blended(mode="exact")), "blend ran as exact"),
        (BLEND, answer(0, blended(computed_tokens=PROMPT)), "blend computed 700 tokens, no fewer than"),
        (BLEND, answer(0, blended(), logprobs=WRONG_NUMBER), "blend has KL 2.5 to its exact run, and a wrong number"),
        (MERGE, answer(), "merge has no report in meta_info"),
        (MERGE, answer(0, declined(declined="similarity 0.3")), "merge replaced 0 tokens (declined: similarity 0.3)"),
        (MERGE, answer(PROMPT - 1, merged(mode="blend")), "merge ran as blend"),
        (MERGE, answer(PROMPT - 1, merged(merged_tokens=0)), "merge found none of its donor's tokens cached"),
        (MERGE, answer(0, merged()), "merge computed 700 tokens, no fewer than"),
        (MERGE, answer(PROMPT - 1, merged(), logprobs=OTHERWISE), "to the prompt that it was merged into"),
        (DECLINED_BLEND, answer(0, blended()), "declined blend ran as blend"),
        (DECLINED_BLEND, answer(0, declined(declined="")), "declined blend was not declined, or without a reason"),
        (DECLINED_BLEND, answer(0, declined(), logprobs=NEAR), "declined blend has KL"),
        (DECLINED_MERGE, answer(PROMPT - 1, merged()), "declined merge ran as merge"),
        (DECLINED_MERGE, answer(0, declined(replaced_tokens=9)), "declined merge reports 9 replaced_tokens"),
        (DECLINED_MERGE, answer(0, declined(), logprobs=WRONG_NUMBER), "declined merge has KL"),
        (AFTER_BLEND, answer(PROMPT - 1), "control after blend found 699 tokens cached, and SGLang alone finds 0"),
        (AFTER_BLEND, answer(report={"mode": "blend"}), "control after blend has a report"),
        (AFTER_BLEND, answer(logprobs=NEAR), "control after blend has KL"),
        (AFTER_MERGE, answer(PROMPT - 1), "control after merge found 699 tokens cached"),
        (AFTER_MERGE, answer(logprobs=OTHERWISE), "control after merge has KL"),
        (WRONG, answer(logprobs=RIGHT), "wrong number has KL 0, too near to noise"),
    ],
)
def test_one_wrong_repeat_fails_the_proof_and_is_named(name: str, given: Answer, said: str) -> None:
    proof = proof_of(with_answer(name, given))
    assert not proof.proven
    assert proof.verdict.startswith("not proven: ") and "\n" not in proof.verdict
    assert said in proof.verdict
    assert name in [row.name for row in proof.rows if not row.ok]


def test_a_number_that_was_merged_away_shows_in_mode_and_kl_only() -> None:
    verdict = proof_of(with_answer(DECLINED_MERGE, answer(PROMPT - 1, merged(), logprobs=WRONG_NUMBER))).verdict
    assert verdict.count("declined merge") == 2 and "ran as merge" in verdict and "KL 2.5" in verdict


def test_a_row_that_fails_shows_the_repeat_that_failed() -> None:
    rows = {row.name: row for row in proof_of(with_answer(BLEND, answer(0, declined()))).rows}
    assert rows[BLEND].taken_tokens == 0 and rows[BLEND].computed_tokens == PROMPT


def test_a_cache_that_is_switched_off_fails_every_row_that_reuses() -> None:
    found = measured()
    for name in (EXACT, BLEND, DECLINED_BLEND):
        found.answers[name] = [answer(0, {"mode": "exact", "reused_tokens": 0})]
    failed = {row.name for row in proof_of(found).rows if not row.ok}
    assert failed == {EXACT, BLEND, DECLINED_BLEND}


def test_noise_is_taken_from_the_repeats_and_wider_for_sixteen_bits() -> None:
    assert proof_of(measured()).noise_limit == FLOOR_FULL
    assert proof_of(measured(), full=False).noise_limit == FLOOR_HALF
    noisy = proof_of(with_answer(NOISE, answer(logprobs=NEAR)))
    assert noisy.noise_limit > 10 * FLOOR_FULL and noisy.proven


def test_a_server_that_differs_from_itself_as_much_as_wrong_answers_do_proves_nothing() -> None:
    proof = proof_of(with_answer(NOISE, answer(logprobs=WRONG_NUMBER)))
    assert "wrong number has KL 2.5, too near to noise" in proof.verdict


def test_the_same_answer_is_judged_by_sixteen_bits_or_thirty_two() -> None:
    near = with_answer(EXACT, answer(PROMPT - 1, {"mode": "exact", "reused_tokens": PROMPT - 1}, logprobs=NEAR))
    assert not proof_of(near).proven
    assert proof_of(near, full=False).proven


def test_reuse_that_saves_no_time_is_a_note_and_no_failure() -> None:
    found = measured()
    found.answers[BLEND] = [answer(0, blended(), 1.2, logprobs=NEAR)]
    proof = proof_of(found)
    assert proof.proven
    assert proof.notes == ("blend saved no time here: 1.20 times the cold run",)


def test_a_blend_that_would_not_be_faster_is_a_note_and_no_failure() -> None:
    found = measured()
    found.answers[BLEND] = [answer(0, declined(declined=NOT_FASTER))] * 2
    proof = proof_of(found)
    assert proof.proven and "--rksc-pass-tokens 0" in proof.notes[0]
    found.answers[BLEND][1] = answer(0, declined(declined=NOT_FASTER), logprobs=NEAR)
    assert "blend has KL" in proof_of(found).verdict, "then it must be exact"


def test_computed_tokens_are_those_of_the_report_where_a_blend_took_some_over() -> None:
    assert computed_tokens(answer(100)) == PROMPT - 100
    assert computed_tokens(answer(0, blended())) == 60
    assert computed_tokens(answer(PROMPT - 1, merged())) == 1
