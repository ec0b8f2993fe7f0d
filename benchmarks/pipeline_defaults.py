"""What a user gets who asks for nothing: votes that may be decided early, beside stock SGLang with all branches.

Stock is asked as most people ask it: one request of the OpenAI API with ``n`` samples a problem, whose vote is counted
here. Ours is a program with ``early_stop``, whose branches are verified where votes do not decide. Samples differ from
run to run, and so may answers; stock beside itself says how much.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import openai
import sglang as sgl
from tqdm import tqdm

from benchmarks.fork_recordings import SYSTEM, TIMEOUT_S, Settings
from benchmarks.overhead import median_ratio
from benchmarks.stop_live import Solved, sampled
from programs.asking import ask
from programs.problems import Problem
from rksc_sgl import EarlyStop, Endpoint, SkipGate
from rksc_sgl.answers import same_answer

STOCK, AGAIN, CERTAIN, PROBABLE = "stock", "stock again", "certain", "probable(0.01)"
SPECS = {CERTAIN: EarlyStop("certain"), PROBABLE: EarlyStop("probable", risk=0.01)}
TEMPERATURE = 0.7

Given = TypeVar("Given")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Voted:
    """What a fork's vote came to.

    Attributes:
        solved: tokens, grade and answer.
        verified: branches that were verified.
        left_out: branches that were stopped or never started.
    """

    solved: Solved
    verified: int
    left_out: int


def solve_all(solve: Callable[[Given], Found], given: Sequence[Given], at_once: int) -> tuple[float, list[Found]]:
    """Seconds that all take, so many at a time, and what came of each."""
    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(solve, given))
    return time.perf_counter() - began, found


@dataclass
class Answers:
    """What the rounds gave.

    Attributes:
        branches, at_once: how it was asked.
        problems: of a round.
        source: of the problems.
        rounds: by arm, seconds of each round and its solved problems, in their order.
    """

    branches: int
    at_once: int
    problems: int
    source: str
    rounds: dict[str, list[tuple[float, list[Solved]]]] = field(default_factory=dict)

    @classmethod
    def measure(
        cls,
        ours: Endpoint,
        stock: Endpoint,
        problems: Sequence[Problem],
        source: str,
        branches: int,
        tokens: int,
        at_once: int,
        rounds: int,
    ) -> Answers:
        """All problems in every arm, so many times."""
        settings = Settings("", "", 0, branches, tokens, TEMPERATURE, confidence=False)
        client = openai.OpenAI(base_url=f"{stock.base_url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)
        arms: dict[str, tuple[Endpoint, Callable[[Problem], Solved]]] = {
            STOCK: (stock, lambda problem: sampled(client, problem, settings)),
            AGAIN: (stock, lambda problem: sampled(client, problem, settings)),
        }
        for name, spec in SPECS.items():
            arms[name] = (ours, lambda problem, spec=spec: vote(ours, problem, settings, spec).solved)  # type: ignore[misc]
        made = cls(branches, at_once, len(problems), source)
        bar = tqdm(total=rounds * len(arms), desc=f"defaults, {branches} branches", unit="round", file=sys.stderr)
        with bar:
            for number in range(rounds):
                order = list(arms)
                random.Random(number).shuffle(order)
                for name in order:
                    endpoint, solve = arms[name]
                    endpoint.flush_cache(wait_s=60.0)
                    made.rounds.setdefault(name, []).append(solve_all(solve, problems, at_once))
                    bar.update()
        return made

    def figures(self) -> dict[str, Any]:
        """By arm: seconds, tokens, the share of right answers; of all but stock, the ratio to it and equal answers."""
        others = [name for name in self.rounds if name != STOCK]
        seconds = {name: [round(one, 4) for one, _ in self.rounds[name]] for name in (STOCK, *others)}
        solved = {name: [one for _, round_ in self.rounds[name] for one in round_] for name in (STOCK, *others)}
        return {
            "branches": self.branches,
            "at_once": self.at_once,
            "problems": self.problems,
            "source": self.source,
            "seconds": seconds,
            "tokens": {name: sum(one.tokens for one in rows) for name, rows in solved.items()},
            "accuracy": {name: _share([one.right for one in rows]) for name, rows in solved.items()},
            "answers": len(solved[STOCK]),
            "ratios": {name: list(median_ratio(seconds[STOCK], seconds[name])) for name in others},
            "same_answer": {name: _share(_same(solved[name], solved[STOCK])) for name in others},
        }


@sgl.function
def _vote(s: Any, problem: Problem, settings: Settings, spec: EarlyStop | None, skip: SkipGate | None) -> None:
    ask(s, problem.messages(SYSTEM))
    branches = sgl.fork_similar(s, settings.branches, early_stop=spec)
    branches += sgl.assistant(sgl.gen("answer", max_tokens=settings.max_tokens, temperature=settings.temperature))
    verdict = sgl.verify_gated(branches, "answer", skip=skip)
    answer, record = verdict.answers[verdict.index], branches.stopping
    if record is None:
        tokens, left_out = sum(branch.get_meta_info("answer")["completion_tokens"] for branch in branches), 0
    else:
        tokens, left_out = record.tokens_spent, len(record.of_fate("stopped") + record.of_fate("not_started"))
    solved = Solved(tokens, problem.grade(verdict.best["answer"]), answer)
    s["voted"] = Voted(solved, sum(score is not None for score in verdict.scores), left_out)


def vote(
    endpoint: Endpoint, problem: Problem, settings: Settings, spec: EarlyStop | None, skip: SkipGate | None = None
) -> Voted:
    """One problem's fork.

    Args:
        spec: when its vote counts as decided; None runs all branches.
        skip: when to do without verification; None where votes decide.
    """
    voted: Voted = _vote.run(problem=problem, settings=settings, spec=spec, skip=skip, backend=endpoint)["voted"]
    return voted


def _same(found: Sequence[Solved], others: Sequence[Solved]) -> list[bool]:
    """Whether both have the same answer, or both have none."""
    return [equal_answers(one.answer, other.answer) for one, other in zip(found, others, strict=True)]


def equal_answers(one: str | None, other: str | None) -> bool:
    """Whether two votes have the same answer, or both have none."""
    return one == other or (one is not None and other is not None and same_answer(one, other))


def _share(values: Sequence[bool]) -> float:
    return round(sum(values) / len(values), 4)
