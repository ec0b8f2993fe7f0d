"""What the runs of a proof say: a row for each, and whether all of it is as it must be."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from rksc_sgl.placement.worth import NOT_FASTER
from rksc_sgl.proof import arms
from rksc_sgl.proof.arms import Answer, Arm, Measured
from rksc_sgl.proof.divergence import divergence

NOISE_FACTOR = 10.0  # KL may be so many times that of two equal requests
FLOOR_FULL, FLOOR_HALF = 1e-4, 3e-2  # nats of KL that are noise in float32, and in number types of 16 bits or fewer
WIDE = 10.0  # a wrong number's KL is so many times a blend's, and so many times the limit of noise
NEARLY_ALL = 0.9  # of a prompt that is cached; the last page of it never is


@dataclass(frozen=True)
class Row:
    """One arm, over its repeats.

    Attributes:
        name: of the arm.
        prompt_tokens: as SGLang counts them.
        cached_tokens: of these, found in the cache, SGLang's number.
        reused_tokens, taken_tokens, merged_tokens, recomputed_tokens, replaced_tokens: from the report, 0 without one.
        computed_tokens: that went through every layer.
        seconds: median.
        ratio: of ``seconds`` to those of the cold arm.
        kl: to the same prompt's exact run, nats, the largest of the repeats.
        expected: what must be.
        declined: why nothing was shared, as the report says; empty where it does not.
        problems: what is not so; each names the arm.
    """

    name: str
    prompt_tokens: int
    cached_tokens: int
    reused_tokens: int
    taken_tokens: int
    merged_tokens: int
    recomputed_tokens: int
    replaced_tokens: int
    computed_tokens: int
    seconds: float
    ratio: float
    kl: float
    expected: str
    declined: str
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether all is as it must be."""
        return not self.problems


@dataclass(frozen=True)
class Proof:
    """The result.

    Attributes:
        rows: in the order of the arms.
        noise_limit: KL up to which two distributions count as equal, nats.
        blend_limit: KL up to which a blend is far enough from a wrong number, nats.
        offered: those of :data:`~rksc_sgl.proof.arms.OPTIONAL` that the server offers.
        notes: what is worth knowing and no failure.
    """

    rows: tuple[Row, ...]
    noise_limit: float
    blend_limit: float
    offered: frozenset[str]
    notes: tuple[str, ...]

    @property
    def proven(self) -> bool:
        """Whether every row is as it must be."""
        return all(row.ok for row in self.rows)

    @property
    def verdict(self) -> str:
        """One line; where something failed, what and why."""
        if not self.proven:
            return "not proven: " + "; ".join(problem for row in self.rows for problem in row.problems)
        missing = ", ".join(name for name in arms.OPTIONAL if name not in self.offered)
        without = f" ({missing}: not offered by this server)" if missing else ""
        return f"proven: all {len(self.rows)} rows are as they must be{without}"


def judge(measured: Measured, plan: Sequence[Arm], offered: Collection[str], full_precision: bool) -> Proof:
    """Judge every repeat of every arm; a row fails if one of its repeats does.

    Args:
        plan: the arms that were run.
        offered: those of :data:`~rksc_sgl.proof.arms.OPTIONAL` that the server offers.
        full_precision: whether the model is served in float32.
    """
    judging = _Judging(measured, full_precision)
    rows = tuple(judging.row(arm) for arm in plan)
    return Proof(rows, judging.noise_limit, judging.blend_limit, frozenset(offered), tuple(_notes(rows)))


class _Judging:
    """The limits, from what was measured, and the check of each arm."""

    def __init__(self, measured: Measured, full_precision: bool) -> None:
        self.measured = measured
        floor = FLOOR_FULL if full_precision else FLOOR_HALF
        noise = [divergence(measured.exact["first"].logprobs, one.logprobs) for one in measured.answers[arms.NOISE]]
        other = measured.exact["other"].logprobs
        self.noise_limit = max(floor, NOISE_FACTOR * max(noise))
        self.wrong = min(divergence(other, one.logprobs) for one in measured.answers[arms.WRONG])
        self.blend_limit = max(self.noise_limit, self.wrong / WIDE)
        self.cold_seconds = statistics.median(one.seconds for one in measured.answers[arms.COLD])
        self.cold_computed = min(computed_tokens(one) for one in measured.answers[arms.COLD])
        self.checks: dict[str, Callable[[Answer], Iterator[str]]] = {
            arms.COLD: self._cold,
            arms.NOISE: self._cold,
            arms.EXACT: self._exact,
            arms.BLEND: self._blend,
            arms.MERGE: self._merge,
            arms.DECLINED_BLEND: lambda answer: self._declined(answer, "stray"),
            arms.DECLINED_MERGE: lambda answer: self._declined(answer, "changed"),
            arms.AFTER_BLEND: lambda answer: self._control(answer, "other"),
            arms.AFTER_MERGE: lambda answer: self._control(answer, "same"),
            arms.WRONG: self._wrong,
        }

    def row(self, arm: Arm) -> Row:
        answers = self.measured.answers[arm.name]
        found = [(answer, list(self.checks[arm.name](answer))) for answer in answers]
        shown = next((answer for answer, problems in found if problems), answers[0])
        report = shown.report or {}
        seconds = statistics.median(one.seconds for one in answers)
        exact = self.measured.exact["other" if arm.name == arms.WRONG else arm.ask.prompt]
        return Row(
            name=arm.name,
            prompt_tokens=shown.prompt_tokens,
            cached_tokens=shown.cached_tokens,
            reused_tokens=report.get("reused_tokens", 0),
            taken_tokens=report.get("taken_tokens", 0),
            merged_tokens=report.get("merged_tokens", 0),
            recomputed_tokens=report.get("recomputed_tokens", 0),
            replaced_tokens=report.get("replaced_tokens", 0),
            computed_tokens=computed_tokens(shown),
            seconds=seconds,
            ratio=seconds / self.cold_seconds,
            kl=max(divergence(exact.logprobs, one.logprobs) for one in answers),
            expected=arm.expected,
            declined=report.get("declined") or "",
            problems=tuple(dict.fromkeys(f"{arm.name} {text}" for _, problems in found for text in problems)),
        )

    # --- what must be of each arm ------------------------------------------------------------------------------------

    def _cold(self, answer: Answer) -> Iterator[str]:
        if answer.cached_tokens:
            yield f"found {answer.cached_tokens} tokens cached after a flush: does somebody else use this server?"
        yield from self._unreported(answer)
        yield from self._as_noise(answer, "first")

    def _exact(self, answer: Answer) -> Iterator[str]:
        if answer.cached_tokens < NEARLY_ALL * answer.prompt_tokens:
            yield f"found {answer.cached_tokens} of {answer.prompt_tokens} tokens cached"
        yield from self._mode(answer, "exact")
        if answer.report is not None and answer.report.get("reused_tokens") != answer.cached_tokens:
            yield f"reports {answer.report.get('reused_tokens')} tokens reused, and {answer.cached_tokens} were cached"
        yield from self._as_noise(answer, "first")

    def _blend(self, answer: Answer) -> Iterator[str]:
        if (answer.report or {}).get("declined") == NOT_FASTER:
            yield from self._declined(answer, "other")
            return
        if answer.report is not None and not answer.report.get("taken_tokens"):
            yield f"took over 0 tokens ({_reason(answer)})"
            return
        yield from self._mode(answer, "blend")
        yield from self._computed_less(answer)
        kl = divergence(self.measured.exact["other"].logprobs, answer.logprobs)
        if kl > self.blend_limit:
            yield f"has KL {kl:.2g} to its exact run, and a wrong number has {self.wrong:.2g}"

    def _merge(self, answer: Answer) -> Iterator[str]:
        if answer.report is not None and not answer.report.get("replaced_tokens"):
            yield f"replaced 0 tokens ({_reason(answer)})"
            return
        yield from self._mode(answer, "merge")
        if answer.report is not None and not answer.report.get("merged_tokens"):
            yield "found none of its donor's tokens cached"
        yield from self._computed_less(answer)
        kl = divergence(self.measured.exact["first"].logprobs, answer.logprobs)
        if kl > self.noise_limit:
            yield f"has KL {kl:.2g} to the prompt that it was merged into, more than {self.noise_limit:.2g}"

    def _declined(self, answer: Answer, prompt: str) -> Iterator[str]:
        report = answer.report
        if report is None or report.get("mode") != "exact":
            yield from self._mode(answer, "exact")
        elif not report.get("declined"):
            yield "was not declined, or without a reason"
        else:
            for key in ("taken_tokens", "replaced_tokens", "merged_tokens"):
                if report.get(key):
                    yield f"reports {report[key]} {key}"
        yield from self._as_noise(answer, prompt)

    def _control(self, answer: Answer, prompt: str) -> Iterator[str]:
        yield from self._unreported(answer)
        alone = self.measured.exact[prompt].cached_tokens
        if answer.cached_tokens != alone:
            yield f"found {answer.cached_tokens} tokens cached, and SGLang alone finds {alone}"
        yield from self._as_noise(answer, prompt)

    def _wrong(self, answer: Answer) -> Iterator[str]:
        yield from self._unreported(answer)
        if self.wrong < WIDE * self.noise_limit:
            yield f"has KL {self.wrong:.2g}, too near to noise ({self.noise_limit:.2g}) to judge anything by"

    # --- parts of these ----------------------------------------------------------------------------------------------

    def _mode(self, answer: Answer, mode: str) -> Iterator[str]:
        if answer.report is None:
            yield "has no report in meta_info"
        elif answer.report.get("mode") != mode:
            yield f"ran as {answer.report.get('mode')} ({_reason(answer)})"

    def _unreported(self, answer: Answer) -> Iterator[str]:
        if answer.report is not None:
            yield "has a report in meta_info, and did not opt in"

    def _as_noise(self, answer: Answer, prompt: str) -> Iterator[str]:
        kl = divergence(self.measured.exact[prompt].logprobs, answer.logprobs)
        if kl > self.noise_limit:
            yield f"has KL {kl:.2g} to its exact run, more than {self.noise_limit:.2g}"

    def _computed_less(self, answer: Answer) -> Iterator[str]:
        if computed_tokens(answer) >= self.cold_computed:
            yield f"computed {computed_tokens(answer)} tokens, no fewer than the cold run's {self.cold_computed}"


def computed_tokens(answer: Answer) -> int:
    """Tokens of the prompt that went through every layer."""
    report = answer.report or {}
    if report.get("mode") == "blend" and "computed_tokens" in report:
        return report["computed_tokens"]
    return answer.prompt_tokens - answer.cached_tokens


def _reason(answer: Answer) -> str:
    declined = (answer.report or {}).get("declined")
    return f"declined: {declined}" if declined else "no reason is reported"


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.name == arms.BLEND and row.declined == NOT_FASTER:
            yield f"not blended: {NOT_FASTER} here, at this length; to prove it, serve with --rksc-pass-tokens 0"
            continue
        if row.name in (arms.EXACT, arms.BLEND, arms.MERGE) and row.ratio >= 1.0:
            yield f"{row.name} saved no time here: {row.ratio:.2f} times the cold run"
