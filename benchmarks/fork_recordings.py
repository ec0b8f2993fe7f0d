"""Full runs of forks, recorded through any OpenAI-compatible server: one JSON line a problem, when it finishes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from tqdm import tqdm

from programs.openai_errors import server_errors
from programs.problems import Problem
from rksc_sgl.answers import branch_answer, classes_of
from rksc_sgl.calibration.recorded_lines import Recordings
from rksc_sgl.deciding.replay import RecordedBranch
from rksc_sgl.errors import ServerRefusedError

SYSTEM = "You are a careful mathematician."
TIMEOUT_S = 3600.0  # of one branch, which may wait for many others


@dataclass(frozen=True)
class Settings:
    """What the recorded runs are runs of; a file holds runs of one."""

    model: str
    source: str
    seed: int
    branches: int
    max_tokens: int
    temperature: float
    confidence: bool  # whether the log-probability of each token was asked for


@dataclass(frozen=True)
class RecordedFork:
    """One problem. Lists have one item for each branch, in the order of launch.

    Attributes:
        problem: its id.
        texts: what the branches wrote.
        tokens: that they generated.
        truncated: cut by the token limit.
        correct: the problem's own grader.
        failed: why a branch failed; None where it did not.
        confidence: log-probability of each token; empty where it was not asked for.
    """

    problem: str
    texts: list[str]
    tokens: list[int]
    truncated: list[bool]
    correct: list[bool]
    failed: list[str | None]
    confidence: list[list[float]]

    def branches(self, count: int) -> list[RecordedBranch]:
        """The first branches, equal answers under one name; one that failed at once counts as one token."""
        answers = [
            None if failed else branch_answer(text, truncated=cut)
            for text, cut, failed in zip(self.texts, self.truncated, self.failed, strict=True)
        ]
        names = classes_of(answers[:count])
        return [
            RecordedBranch(
                tokens=max(1, self.tokens[index]),
                answer=names[index],
                truncated=self.truncated[index],
                failed=self.failed[index],
                confidence=tuple(self.confidence[index]),
            )
            for index in range(count)
        ]


def recordings(path: Path) -> Recordings[Settings, RecordedFork]:
    """The file of that path."""
    return Recordings(path, Settings, RecordedFork, "recorded forks")


def load(path: Path) -> tuple[Settings, list[RecordedFork]]:
    """What is in a file of recordings; a last line that was cut is left out.

    Raises:
        OptionError: it is missing or no such file.
    """
    return recordings(path).load()


def record(url: str, problems: Sequence[Problem], settings: Settings, path: Path, at_once: int) -> None:
    """Record the problems that the file does not have yet.

    Args:
        url: of a server with ``/v1/chat/completions``.
        problems: of ``settings.source``.
        settings: must be those of the file, where there is one.
        path: is appended to.
        at_once: requests in flight.

    Raises:
        OptionError: the file holds runs of other settings.
        ServerUnreachableError: the server went away; what was finished is in the file.
    """
    file = recordings(path)
    done = {fork.problem for fork in file.resume(settings)}
    missing = [problem for problem in problems if problem.id not in done]
    client = openai.OpenAI(base_url=f"{url.rstrip('/')}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)
    bar = tqdm(
        total=len(problems), initial=len(problems) - len(missing), desc="record", unit="problem", file=sys.stderr
    )
    with file.appending() as append, bar, ThreadPoolExecutor(max(1, at_once)) as pool:
        try:
            for problem in _window(missing, max(1, at_once // settings.branches), pool, client, settings):
                append(problem)
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _window(
    problems: Sequence[Problem], size: int, pool: ThreadPoolExecutor, client: openai.OpenAI, settings: Settings
) -> Iterator[RecordedFork]:
    """Recorded problems as they finish, ``size`` of them under way at a time."""
    waiting = list(reversed(problems))
    under_way: dict[Any, tuple[Problem, list[Any]]] = {}
    while waiting or under_way:
        while waiting and len(under_way) < size:
            problem = waiting.pop()
            futures = [pool.submit(_branch, client, problem, settings) for _ in range(settings.branches)]
            under_way[problem.id] = (problem, futures)
        pending = [future for _, futures in under_way.values() for future in futures if not future.done()]
        if pending:
            wait(pending, return_when=FIRST_COMPLETED)
        for name in [name for name, (_, futures) in under_way.items() if all(future.done() for future in futures)]:
            problem, futures = under_way.pop(name)
            yield _fork(problem, [future.result() for future in futures])


def _branch(client: openai.OpenAI, problem: Problem, settings: Settings) -> dict[str, Any]:
    asked: dict[str, Any] = {"logprobs": True} if settings.confidence else {}
    try:
        with server_errors(str(client.base_url)):
            reply = client.chat.completions.create(
                model="default",
                messages=problem.messages(SYSTEM),  # type: ignore[arg-type]
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                **asked,
            )
    except ServerRefusedError as error:
        if error.status < 500:
            raise
        return {"failed": f"status {error.status}"}
    choice = reply.choices[0]
    tokens = choice.logprobs.content if settings.confidence and choice.logprobs is not None else None
    return {
        "text": choice.message.content or "",
        "tokens": reply.usage.completion_tokens if reply.usage is not None else 0,
        "truncated": choice.finish_reason == "length",
        "confidence": [round(token.logprob, 4) for token in tokens or ()],
    }


def _fork(problem: Problem, replies: list[dict[str, Any]]) -> RecordedFork:
    texts = [reply.get("text", "") for reply in replies]
    return RecordedFork(
        problem=problem.id,
        texts=texts,
        tokens=[reply.get("tokens", 0) for reply in replies],
        truncated=[reply.get("truncated", False) for reply in replies],
        correct=[problem.grade(text) for text in texts],
        failed=[reply.get("failed") for reply in replies],
        confidence=[reply.get("confidence", []) for reply in replies],
    )
