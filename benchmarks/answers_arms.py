"""One problem in some arms: a fork that shares exactly, blends or merges, and whose branches are all verified.

What the server reports of a branch is kept, so that whoever compares arms can tell where a blend or merge took place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import sglang as sgl

from benchmarks.answers_items import Item
from programs.asking import SYSTEM
from rksc_sgl import Endpoint, SkipGate, Verdict
from rksc_sgl.answers import branch_answer
from rksc_sgl.calibration.blend_certificate import RULE
from rksc_sgl.calibration.recorded_lines import Recordings
from rksc_sgl.errors import RkscError, VerificationError
from rksc_sgl.generated.finish import is_truncated
from rksc_sgl.options import KEY

EXACT, BLEND, MERGE, AGAIN = "exact", "blend", "merge", "exact again"
ARMS = {EXACT: "exact", BLEND: "blend", MERGE: "merge", AGAIN: "exact"}  # what each asks to share


@dataclass(frozen=True)
class Settings:
    """What the recorded runs are runs of; a file holds runs of one."""

    model: str
    seed: int
    branches: int
    worked: int
    max_tokens: int
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    rule: int = RULE  # that says what a blend computes
    shared_slots: bool = False  # whether blended branches use slots of their donors


@dataclass(frozen=True)
class Branch:
    """One branch in one arm.

    Attributes:
        text: what it wrote.
        tokens: that it generated.
        truncated: cut by the token limit.
        right: by the problem's own grader.
        shared: ``blend`` or ``merge`` where KV or prompt of another branch was taken, by the server's report; ``exact``
            where it was computed as it is, and empty where neither can be said.
        declined: why no more was shared; empty where the report does not say.
        computed: tokens of its prompt that were computed, as so many that go through all layers.
        p_yes: of its verification; None where it was not verified, for it wrote nothing.
        mass: of what the model would reply to the verification, how much is a label at all.
        judged: the mode of its verification, by the server's report; empty without one.
    """

    text: str
    tokens: int
    truncated: bool
    right: bool
    shared: str
    declined: str
    computed: float
    p_yes: float | None
    mass: float | None
    judged: str

    @cached_property
    def answer(self) -> str | None:
        """With which it votes."""
        return branch_answer(self.text, truncated=self.truncated)


@dataclass(frozen=True)
class Fork:
    """One problem in one arm.

    Attributes:
        branches: in their order; the first is computed as it is, and is what the others share with.
        selected: the branch that ``verify_gated`` takes by score; None where no branch wrote anything.
    """

    branches: list[Branch]
    selected: int | None

    @property
    def best(self) -> Branch | None:
        """The selected branch."""
        return None if self.selected is None else self.branches[self.selected]

    @property
    def best_answer(self) -> str | None:
        """Its answer."""
        return None if self.best is None else self.best.answer


@dataclass(frozen=True)
class Solved:
    """One problem in the arms that it was solved in, by their names; the exact one is among them."""

    source: str
    problem: str
    arms: dict[str, Fork]

    @property
    def key(self) -> tuple[str, str]:
        """Source and id."""
        return self.source, self.problem

    @classmethod
    def of_plain(cls, source: str, problem: str, arms: Mapping[str, Mapping[str, Any]]) -> Solved:
        """From the fields of a line."""
        forks = {name: Fork([Branch(**one) for one in arm["branches"]], arm["selected"]) for name, arm in arms.items()}
        if EXACT not in forks:
            raise KeyError(EXACT)
        return cls(source, problem, forks)


def recordings(path: Path) -> Recordings[Settings, Solved]:
    """The file of that path."""
    return Recordings(path, Settings, Solved.of_plain, "recorded answers")


class Arms:
    """Solves problems on a server.

    Args:
        endpoint: of a server with our plugin; nobody else may use it.
        max_tokens: of each branch.
        names: of the arms.

    Raises:
        RkscError: the server has no plugin.
    """

    def __init__(self, endpoint: Endpoint, max_tokens: int, names: Sequence[str] = tuple(ARMS)) -> None:
        info = endpoint.read_rksc_info()
        if info is None:
            raise RkscError(f"{endpoint.base_url} runs without the rksc plugin; start it with rksc serve")
        self.endpoint, self.max_tokens, self.names = endpoint, max_tokens, names
        self.layers = int(info["schedulers"][0]["exit"]["layers"])

    def solve(self, item: Item, progress: Callable[[], Any]) -> Solved:
        """One problem in each arm; nothing that was computed in one is there in the next.

        Raises:
            RkscError: a branch failed, or one that was to be computed as it is was not.
        """
        forks = {}
        for name in self.names:
            self.endpoint.flush_cache(wait_s=60.0)
            forks[name] = self._fork(item, ARMS[name])
            progress()
        return Solved(*item.key, forks)

    def _fork(self, item: Item, share: str) -> Fork:
        ran: list[Fork] = []
        _solve.run(item=item, share=share, arms=self, ran=ran, backend=self.endpoint)
        (fork,) = ran
        untouched = fork.branches if share == EXACT else fork.branches[:1]
        if any(branch.shared != EXACT for branch in untouched):
            raise RkscError(f"{item.problem.id}: with share {share} a branch that was to be exact is not")
        return fork

    def compute_first(self, group: Any, share: str) -> None:
        """Compute the prompt of the first branch ahead of the others, so that it is what they share with."""
        options = {"group": group.group_id, "branch": 0, "branches": len(group), "share": share}
        sampling = {"max_new_tokens": 0, "custom_params": {KEY: options}}
        self.endpoint.post_json("/generate", {"text": group[0].text(), "sampling_params": sampling})

    def fork_of(self, item: Item, group: Any, verdict: Verdict | None) -> Fork:
        """What became of the branches."""
        branches = []
        for index, state in enumerate(group):
            meta = state.get_meta_info("answer")
            text = state["answer"]
            branches.append(
                Branch(
                    text=text,
                    tokens=meta["completion_tokens"],
                    truncated=is_truncated(meta),
                    right=item.problem.grade(text),
                    **shared_by(meta.get(KEY) or {}, meta, self.layers),
                    **_judged(verdict, index),
                )
            )
        return Fork(branches, None if verdict is None else verdict.index)


@sgl.function
def _solve(s: Any, item: Item, share: str, arms: Arms, ran: list[Fork]) -> None:
    prompts = [sgl.system(SYSTEM) + sgl.user(prompt) + sgl.assistant_begin() for prompt in item.prompts]
    group = sgl.fork_similar(s, prompts, share=share)
    arms.compute_first(group, share)
    group += sgl.gen("answer", max_tokens=arms.max_tokens, temperature=0.0)
    group += sgl.assistant_end()
    failed = [state.error() for state in group if state.error() is not None]  # waits
    if failed:
        raise RkscError(f"{item.problem.id}: a branch failed, so that arms cannot be compared: {failed[0]}")
    ran.append(arms.fork_of(item, group, _verify(item, group)))


def _verify(item: Item, group: Any) -> Verdict | None:
    """The verdict on every branch at full depth; None where none of them wrote anything."""
    written = [bool(state["answer"].strip()) for state in group]
    try:
        verdict: Verdict = sgl.verify_gated(group, "answer", skip=SkipGate.never(), select="score", exit="off")
    except VerificationError:
        if any(written):
            raise
        return None
    failed = [error for error, wrote in zip(verdict.errors, written, strict=True) if wrote and error is not None]
    if failed:
        raise RkscError(f"{item.problem.id}: a verification failed, so that arms cannot be compared: {failed[0]}")
    return verdict


def _judged(verdict: Verdict | None, index: int) -> dict[str, Any]:
    if verdict is None:
        return {"p_yes": None, "mass": None, "judged": ""}
    mode = (verdict.reports[index] or {}).get("mode", "")
    return {"p_yes": verdict.scores[index], "mass": verdict.label_mass[index], "judged": mode}


def shared_by(report: Mapping[str, Any], meta: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """How a branch shared and what of its prompt was computed, by what the server says.

    Args:
        report: ``meta_info["rksc"]``.
        meta: ``meta_info``.
        layers: of the model.
    """
    mode, computed = report.get("mode", ""), float(meta["prompt_tokens"] - meta["cached_tokens"])
    probe = report.get("probe_layers", 0) / layers
    if mode == BLEND and report.get("taken_tokens"):
        computed -= report["taken_tokens"] * (1.0 - probe)
    elif mode == MERGE and report.get("replaced_tokens"):
        computed += report["replaced_tokens"] * probe  # of its own prompt; the rest is of the other's
    elif mode != EXACT:
        mode = ""
    return {"shared": mode, "declined": report.get("declined", ""), "computed": round(computed, 1)}
