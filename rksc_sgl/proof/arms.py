"""The runs of a proof on one server: each from a flushed cache, some after others that leave their KV there."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rksc_sgl.options import KEY
from rksc_sgl.proof.texts import Prompts

COLD, NOISE, EXACT, BLEND, MERGE = "cold", "noise floor", "exact", "blend", "merge"
DECLINED_BLEND, DECLINED_MERGE = "declined blend", "declined merge"
AFTER_BLEND, AFTER_MERGE, WRONG = "control after blend", "control after merge", "wrong number"
FLUSH_WAIT_S = 30.0  # for requests of others that are still running
TOP = 256  # most likely tokens that a divergence is taken over
BRANCHES = 2
OPTIONAL = ("blend", "merge")  # ways to share that a server may decline


class Server(Protocol):
    """What a proof needs of a server; :class:`rksc_sgl.Endpoint` is one."""

    def post_json(self, path: str, body: dict[str, Any]) -> Any:
        """Answer of ``POST path``."""

    def flush_cache(self, wait_s: float = 0.0) -> None:
        """Empty the cache, waiting so many seconds for requests that run."""


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        prompt: a name of :class:`~rksc_sgl.proof.texts.Prompts`.
        share: how it may share within the arm's fork of that name; None if it does not opt in.
        branch: of that fork; 0 is the donor.
    """

    prompt: str
    share: str | None = None
    branch: int = 0


@dataclass(frozen=True)
class Arm:
    """One row of a proof.

    Attributes:
        name: unique.
        ask: the request that is judged.
        before: what is asked first, after the flush, in order.
        expected: what must be, for people.
    """

    name: str
    ask: Ask
    before: tuple[Ask, ...] = ()
    expected: str = ""


@dataclass(frozen=True)
class Answer:
    """What a request got.

    Attributes:
        logprobs: of the next token, the most likely ones, by token id.
        prompt_tokens: as the server counts them.
        cached_tokens: of these, found in the cache; SGLang's own number.
        report: ``meta_info["rksc"]``; None where there is none.
        seconds: from sending it to its first token.
    """

    logprobs: Mapping[int, float]
    prompt_tokens: int
    cached_tokens: int
    report: Mapping[str, Any] | None
    seconds: float


@dataclass
class Measured:
    """Everything that was answered.

    Attributes:
        exact: by prompt, its answer without sharing, each after those before it; ``cached_tokens`` is what SGLang
            alone finds.
        answers: by arm, one answer a repeat.
    """

    exact: dict[str, Answer] = field(default_factory=dict)
    answers: dict[str, list[Answer]] = field(default_factory=dict)


_FORKS = (Ask("first", "blend"), Ask("other", "blend", 1))
_MERGED = (Ask("first", "merge"), Ask("same", "merge", 1))


def arms_of(offered: Collection[str]) -> list[Arm]:
    """The arms on a server that offers these of :data:`OPTIONAL`; no arm asks for what it declines."""
    used = tuple(ask for ask in (*_FORKS, *_MERGED) if ask.share in offered)
    arms = [
        Arm(COLD, Ask("first"), expected="nothing cached"),
        Arm(NOISE, Ask("first"), expected="the same again: how much repeats differ"),
        Arm(EXACT, Ask("first", "exact"), (Ask("first"),), "all cached, KL as noise"),
    ]
    if "blend" in offered:
        arms += [
            Arm(BLEND, _FORKS[1], _FORKS[:1], "tokens taken over, KL far from a wrong number's"),
            Arm(DECLINED_BLEND, Ask("stray", "blend", 1), _FORKS[:1], "another text: declined, KL as noise"),
            Arm(AFTER_BLEND, Ask("other"), used, "not opted in: no report, no blended KV, KL as noise"),
        ]
    arms.append(Arm(WRONG, Ask("wrong"), expected="the KL that an answer to another prompt has"))
    if "merge" in offered:
        arms += [
            Arm(MERGE, _MERGED[1], _MERGED[:1], "answered as the donor's prompt"),
            Arm(DECLINED_MERGE, Ask("changed", "merge", 1), _MERGED[:1], "a number changed: declined, KL as noise"),
            Arm(AFTER_MERGE, Ask("same"), used, "not opted in: no report, not merged, KL as noise"),
        ]
    return arms


Steps = list[tuple[int, Arm]]
Progress = Callable[[Steps], Iterable[tuple[int, Arm]]]


def measure(
    server: Server, prompts: Prompts, arms: Sequence[Arm], repeats: int, progress: Progress = lambda steps: steps
) -> Measured:
    """Run every arm so many times, each from a flushed cache, every second time in the opposite order.

    Args:
        progress: is given all steps and yields each when it is to be done.

    Raises:
        ServerError: the server refused a request or went away.
    """
    runs = _Runs(server, prompts)
    measured = Measured()
    server.flush_cache(wait_s=FLUSH_WAIT_S)
    names = dict.fromkeys(["first", "other", *(arm.ask.prompt for arm in arms)])
    measured.exact = {name: runs.ask(Ask(name), "") for name in names}
    steps: Steps = []
    for repeat in range(repeats):
        steps += [(repeat, arm) for arm in (arms if repeat % 2 == 0 else reversed(arms))]
    for repeat, arm in progress(steps):
        measured.answers.setdefault(arm.name, []).append(runs.run(arm, repeat))
    return measured


class _Runs:
    """Sends the requests of arms; forks of two runs never have one name."""

    def __init__(self, server: Server, prompts: Prompts) -> None:
        self.server, self.prompts = server, prompts
        self.name = f"prove {secrets.token_hex(4)}"

    def run(self, arm: Arm, repeat: int) -> Answer:
        self.server.flush_cache(wait_s=FLUSH_WAIT_S)
        for ask in arm.before:
            self.ask(ask, f"{arm.name} {repeat}")
        return self.ask(arm.ask, f"{arm.name} {repeat}")

    def ask(self, ask: Ask, run: str) -> Answer:
        sampling: dict[str, Any] = {"max_new_tokens": 1, "temperature": 0}
        if ask.share is not None:
            fork = f"{self.name} {run} {ask.share}"
            options = {"group": fork, "branch": ask.branch, "branches": BRANCHES, "share": ask.share}
            sampling["custom_params"] = {KEY: options}
        body = {
            "text": getattr(self.prompts, ask.prompt),
            "sampling_params": sampling,
            "return_logprob": True,
            "top_logprobs_num": TOP,
        }
        began = time.perf_counter()
        response = self.server.post_json("/generate", body)
        return _answer(response["meta_info"], time.perf_counter() - began)


def _answer(meta: Mapping[str, Any], seconds: float) -> Answer:
    # impossible tokens come as minus infinity, which JSON has not
    logprobs = {int(token): float(value) for value, token, *_ in meta["output_top_logprobs"][0] if value is not None}
    return Answer(logprobs, meta["prompt_tokens"], meta["cached_tokens"], meta.get(KEY), seconds)
