"""Forks that stop early beside stock SGLang with all branches, live: the same problems, many at once, in turns.

Stock is asked as most people ask it: one request of the OpenAI API with ``n`` samples a problem, whose vote is counted
here. Ours is a program with ``early_stop``. Samples differ from run to run, so the two are compared as samples: tokens,
right answers and time, not answer by answer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai
import sglang as sgl
from tqdm import tqdm

import rksc_sgl
from benchmarks.fork_recordings import SYSTEM, TIMEOUT_S, Settings
from programs.asking import ask
from programs.openai_errors import server_errors
from programs.problems import Problem
from rksc_sgl.answers import branch_answer, classes_of
from rksc_sgl.deciding import EarlyStop, full_vote


@dataclass(frozen=True)
class Solved:
    """One problem: tokens that all of its branches generated, whether the answer of their vote is right, and it."""

    tokens: int
    right: bool
    answer: str | None


@dataclass(frozen=True)
class Round:
    """All problems once, on one server."""

    seconds: float
    solved: tuple[Solved, ...]

    @property
    def tokens(self) -> int:
        return sum(one.tokens for one in self.solved)

    @property
    def accuracy(self) -> float:
        return sum(one.right for one in self.solved) / len(self.solved)


def compare(
    stock_url: str, url: str, problems: Sequence[Problem], settings: Settings, spec: EarlyStop, at_once: int, turns: int
) -> dict[str, Any]:
    """Figures of forks with ``spec`` beside stock's with all branches.

    Args:
        stock_url, url: servers of the same model; one works at a time.
        problems: solved once a turn on each.
        settings: branches, tokens and temperature of both.
        at_once: problems under way.
        turns: of each server; which one begins alternates. The noise is stock's slowest turn over its fastest.
    """
    client = openai.OpenAI(base_url=f"{stock_url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)
    endpoint = rksc_sgl.Endpoint(url)
    arms: dict[str, tuple[str, Callable[[Problem], Solved]]] = {
        "stock": (stock_url, lambda problem: sampled(client, problem, settings)),
        "stop": (url, lambda problem: stopped(endpoint, problem, settings, spec)),
    }
    rounds: dict[str, list[Round]] = {name: [] for name in arms}
    for turn in range(turns):
        for name in list(arms)[:: 1 if turn % 2 == 0 else -1]:
            server, solve = arms[name]
            rounds[name].append(_round(server, solve, problems, at_once, f"live, {name}"))
            last = rounds[name][-1]
            print(
                f"live: {name}: {last.tokens} tokens, {last.accuracy:.2f} right, {last.seconds:.0f} s", file=sys.stderr
            )
    return _figures(rounds, settings.branches, spec, at_once)


def _figures(rounds: dict[str, list[Round]], branches: int, spec: EarlyStop, at_once: int) -> dict[str, Any]:
    stock, stop = rounds["stock"], rounds["stop"]
    times = [one.seconds for one in stock]
    return {
        "live": {
            "policy": spec.policy if spec.risk is None else f"{spec.policy}({spec.risk:g})",
            "branches": branches,
            "problems": len(stock[0].solved),
            "at_once": at_once,
            "turns": len(stock),
            "accuracy_stock": round(sum(one.accuracy for one in stock) / len(stock), 4),
            "accuracy_stop": round(sum(one.accuracy for one in stop) / len(stop), 4),
            "noise": round(max(times) / min(times), 3),
        },
        "live_tokens_fraction": round(sum(one.tokens for one in stop) / sum(one.tokens for one in stock), 4),
        "problems_per_minute_ratio": round(sum(times) / sum(one.seconds for one in stop), 3),
    }


def _round(url: str, solve: Callable[[Problem], Solved], problems: Sequence[Problem], at_once: int, said: str) -> Round:
    rksc_sgl.Endpoint(url).flush_cache(wait_s=60.0)
    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        pending = pool.map(solve, problems)
        try:
            solved = tuple(tqdm(pending, desc=said, total=len(problems), unit="problem", file=sys.stderr))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Round(time.perf_counter() - began, solved)


def sampled(client: openai.OpenAI, problem: Problem, settings: Settings) -> Solved:
    """All branches of a problem from one request with ``n`` samples.

    Raises:
        ServerError: the server went away, or refused the request.
    """
    with server_errors(str(client.base_url)):
        reply = client.chat.completions.create(
            model="default",
            messages=problem.messages(SYSTEM),  # type: ignore[arg-type]
            n=settings.branches,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
        )
    texts = [choice.message.content or "" for choice in reply.choices]
    cut = [choice.finish_reason == "length" for choice in reply.choices]
    answers = classes_of([branch_answer(text, truncated=one) for text, one in zip(texts, cut, strict=True)])
    winner = full_vote(answers)
    right = winner is not None and problem.grade(texts[answers.index(winner)])
    return Solved(reply.usage.completion_tokens if reply.usage else 0, right, winner)


@sgl.function
def _fork(s: Any, problem: Problem, settings: Settings, spec: EarlyStop) -> None:
    ask(s, problem.messages(SYSTEM))
    branches = sgl.fork_similar(s, settings.branches, early_stop=spec)
    branches += sgl.assistant(sgl.gen(spec.variable, max_tokens=settings.max_tokens, temperature=settings.temperature))
    for branch in branches:
        branch.error()  # waits for it
    record = branches.stopping
    winner = None if record.done is None else record.done.branch
    right = winner is not None and problem.grade(branches[winner][spec.variable])
    s["solved"] = Solved(record.tokens_spent, right, None if record.done is None else record.done.answer)


def stopped(endpoint: rksc_sgl.Endpoint, problem: Problem, settings: Settings, spec: EarlyStop) -> Solved:
    """The branches of a problem that its vote needs."""
    solved: Solved = _fork.run(problem=problem, settings=settings, spec=spec, backend=endpoint)["solved"]
    return solved
