"""The decision of one fork: events in, actions out. No I/O, no threads, no clock.

The caller starts, aborts and verifies what the actions say, and tells what happens; events of one decision must come
one after the other. What a caller does with real branches can race with what it is told: a branch that was aborted may
still finish, which changes nothing but the record.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from rksc_sgl.deciding.actions import Abort, Action, BranchRecord, Done, Fate, Record, Start, Verify
from rksc_sgl.deciding.policies import Policy, Ruling
from rksc_sgl.deciding.spec import EarlyStop
from rksc_sgl.deciding.standing import Outcome, Standing
from rksc_sgl.errors import OptionError


@dataclass
class _Branch:
    fate: Fate = "waiting"
    why: str | None = None
    tokens: int = 0
    ended_at: int | None = None
    outcome: Outcome | None = None  # set once, when its vote or its lack of one is known
    late_answer: str | None = None  # of one that finished after it was aborted
    abandoned: bool = False
    verifying: bool = False
    recent: deque[tuple[int, float]] = field(default_factory=deque)  # tokens and their mean confidence
    lowest_confidence: float | None = None


class Decision:
    """One fork of N branches, numbered in the order of launch.

    Every event returns the actions that follow from it; :meth:`start` gives the first. After :class:`Done` no more
    branches are started. Where branches have different prompts, number them in a random order: ``probable`` takes them
    for draws of one kind.

    Args:
        branches: N.
        spec: when to stop.

    Raises:
        OptionError: ``branches`` is not positive, or more than the policy can decide.
    """

    def __init__(self, branches: int, spec: EarlyStop) -> None:
        if isinstance(branches, bool) or not isinstance(branches, int) or branches < 1:
            raise OptionError(f"branches: must be a whole number from 1 on, got {branches!r}")
        self.spec = spec
        self._policy: Policy | None = spec.policy_for(branches)
        self._launch = spec.launched
        self._waves = 0
        self._branches = [_Branch() for _ in range(branches)]
        self._started = 0
        self._done: Done | None = None
        self._policy_error: str | None = None

    @property
    def done(self) -> Done | None:
        """How the fork was decided; None while it is not."""
        return self._done

    # -- events ------------------------------------------------------------------------------------

    def start(self) -> list[Action]:
        """Begin."""
        if self._started or self._done:
            raise OptionError("start: this decision has begun")
        return self._next()

    def branch_started(self, index: int) -> list[Action]:
        """A branch that was to be started runs."""
        branch = self._known(index)
        if branch.fate == "stopped" and branch.late_answer is None:
            return [Abort((index,), branch.why or "")]  # the abort may have come before there was anything to end
        return []

    def tokens(self, index: int, count: int, confidence: float | None = None) -> list[Action]:
        """A branch generated ``count`` more tokens, of this mean confidence."""
        branch = self._known(index)
        if count < 0:
            raise OptionError(f"tokens: must be 0 or more, got {count!r}")
        branch.tokens += count
        if confidence is None or count == 0 or branch.fate != "running":
            return []
        self._slide(branch, count, confidence)
        threshold = self.spec.threshold
        if callable(self.spec.policy) or (
            threshold is not None and branch.lowest_confidence is not None and branch.lowest_confidence < threshold
        ):
            return self._next()
        return []

    def finished(
        self,
        index: int,
        answer: str | None,
        *,
        truncated: bool = False,
        score: float | None = None,
        confidence: float | None = None,
    ) -> list[Action]:
        """A branch ended by itself.

        Args:
            index: which.
            answer: the name of its answer's class; None for no vote. Of a branch that was cut, only what it stated
                (:func:`rksc_sgl.answers.branch_answer`).
            truncated: it was cut by its token limit.
            score: of its verification, where that is known already.
            confidence: mean confidence of its tokens.
        """
        branch = self._known(index)
        if branch.fate == "stopped":
            branch.late_answer = answer
            return []
        self._check_running(index, branch)
        branch.fate, branch.ended_at = "finished", self._tokens_spent()
        branch.outcome = Outcome(answer or None, truncated, score, confidence)
        return self._next()

    def failed(self, index: int, why: str) -> list[Action]:
        """A branch ended with an error; it has no vote."""
        branch = self._known(index)
        if branch.fate == "stopped":
            return []
        self._check_running(index, branch)
        branch.fate, branch.why, branch.ended_at = "failed", why, self._tokens_spent()
        branch.outcome = Outcome(None)
        return self._next()

    def verified(self, index: int, score: float | None) -> list[Action]:
        """A branch that was to be verified has this score; None where verification failed."""
        branch = self._known(index)
        if branch.outcome is None:
            raise OptionError(f"verified: branch {index} has not finished")
        branch.verifying = False
        old = branch.outcome
        branch.outcome = Outcome(old.answer, old.truncated, score, old.confidence)
        return self._next()

    def abandoned(self, index: int) -> list[Action]:
        """A branch that was stopped runs on all the same, because nobody can end it."""
        branch = self._known(index)
        if branch.fate != "stopped":
            raise OptionError(f"abandoned: branch {index} was not stopped, it is {branch.fate}")
        branch.abandoned = True
        return []

    def cancelled(self, why: str) -> list[Action]:
        """Nobody waits for the answer any more: everything that runs is ended."""
        if self._done is not None:
            return []
        return self._finish(Ruling(stop=why, reason="cancelled"), None)

    # -- the record --------------------------------------------------------------------------------

    def standing(self) -> Standing:
        """What policies see."""
        return Standing(
            outcomes=tuple(branch.outcome for branch in self._branches),
            started=self._started,
            tokens=tuple(branch.tokens for branch in self._branches),
            lowest_confidence=tuple(branch.lowest_confidence for branch in self._branches),
        )

    def record(self) -> Record:
        """What became of every branch so far."""
        return Record(
            branches=tuple(self._record_of(branch) for branch in self._branches),
            done=self._done,
            tokens_spent=self._tokens_spent(),
            tokens_saved=self._tokens_saved(),
            policy_error=self._policy_error,
        )

    @staticmethod
    def _record_of(branch: _Branch) -> BranchRecord:
        voted = branch.outcome if branch.fate != "stopped" else None
        return BranchRecord(
            fate=branch.fate,
            why=branch.why,
            tokens=branch.tokens,
            ended_at=branch.ended_at,
            answer=branch.late_answer if voted is None else voted.answer,
            truncated=voted is not None and voted.truncated,
            abandoned=branch.abandoned,
        )

    # -- inside ------------------------------------------------------------------------------------

    def _next(self) -> list[Action]:
        """Ask the policy, and do what it says."""
        actions: list[Action] = []
        while self._done is None:
            ruling = self._ruling()
            if ruling.stop is not None:
                return actions + self._finish(ruling, ruling.answer)
            dropped = self._drop(ruling, actions)
            asked = self._ask_to_verify(ruling, actions)
            started = self._start_more(ruling, actions)
            if dropped:
                continue  # votes that are missing now may decide
            waiting = any(branch.fate == "running" or branch.verifying for branch in self._branches)
            if not (started or asked or waiting):
                everything = f"all {len(self._branches)} branches ended"
                return actions + self._finish(Ruling(stop=everything, probability=0.0, reason="all_ended"), None)
            break
        return actions

    def _ruling(self) -> Ruling:
        """What the policy says; nothing more of a policy that raised: then all branches run and vote."""
        if self._policy is not None:
            try:
                ruling = self._policy(self.standing())
                if ruling is None or isinstance(ruling, str):
                    ruling = Ruling(stop=ruling)
                if not isinstance(ruling, Ruling):
                    raise TypeError(f"must return a Ruling, a reason or None, got {type(ruling).__name__}")
                self._check(ruling)
                return ruling
            except Exception as error:  # a caller's own code: whatever it raises must not lose the branches
                self._policy_error = f"{type(error).__name__}: {error}"
                self._policy, self._launch = None, "all"
        return Ruling(fewest=len(self._branches))

    def _check(self, ruling: Ruling) -> None:
        for name, indices in (("drop", ruling.drop), ("verify", ruling.verify)):
            for index in indices:
                if not isinstance(index, int) or not 0 <= index < len(self._branches):
                    raise ValueError(f"{name}: there is no branch {index!r}")
        for index in ruling.verify:
            if self._branches[index].fate != "finished":
                raise ValueError(f"verify: branch {index} has not finished")

    def _drop(self, ruling: Ruling, actions: list[Action]) -> list[int]:
        by_reason: dict[str, list[int]] = {}
        for index, why in ruling.drop.items():
            if self._branches[index].fate == "running":
                by_reason.setdefault(why, []).append(index)
        for why, indices in by_reason.items():
            for index in indices:
                self._stop(self._branches[index], why)
                self._branches[index].outcome = Outcome(None, dropped=True)
            actions.append(Abort(tuple(indices), why))
        return [index for indices in by_reason.values() for index in indices]

    def _ask_to_verify(self, ruling: Ruling, actions: list[Action]) -> list[int]:
        asked = [index for index in ruling.verify if self._needs_score(index)]
        for index in asked:
            self._branches[index].verifying = True
        if asked:
            actions.append(Verify(tuple(asked)))
        return asked

    def _needs_score(self, index: int) -> bool:
        branch = self._branches[index]
        return not branch.verifying and branch.outcome is not None and branch.outcome.score is None

    def _start_more(self, ruling: Ruling, actions: list[Action]) -> list[int]:
        left = len(self._branches) - self._started
        running = any(branch.fate == "running" for branch in self._branches)
        if self._launch == "all":
            count = left
        elif any(branch.verifying for branch in self._branches):
            count = 0  # the policy waits for scores
        elif self._launch == "fewest":
            count = ruling.fewest if running else max(1, ruling.fewest)
        elif running:
            count = 0
        else:
            count = int(self._launch[min(self._waves, len(self._launch) - 1)])
            self._waves += 1
        first, self._started = self._started, self._started + max(0, min(count, left))
        starting = list(range(first, self._started))
        for index in starting:
            self._branches[index].fate = "running"
        if starting:
            actions.append(Start(tuple(starting)))
        return starting

    def _finish(self, ruling: Ruling, answer: str | None) -> list[Action]:
        standing = self.standing()
        votes = standing.votes()
        ruling = self._without_the_dropped(ruling, standing)
        if ruling.reason != "cancelled" and answer is None:
            answer = votes.leader
        assert ruling.stop is not None
        voters = [index for index, outcome in enumerate(standing.outcomes) if outcome is not None]
        branch = next((i for i in voters if answer is not None and standing.outcomes[i].answer == answer), None)  # type: ignore[union-attr]
        self._done = Done(
            answer=answer,
            branch=branch,
            reason=ruling.reason,
            statement=ruling.stop,
            probability=ruling.probability,
            votes=tuple(votes.counts.items()),
        )
        ended = [index for index, one in enumerate(self._branches) if one.fate == "running"]
        for one in self._branches:
            if one.fate == "running":
                self._stop(one, ruling.stop)
            elif one.fate == "waiting":
                one.fate, one.why, one.ended_at = "not_started", ruling.stop, self._tokens_spent()
        aborts: list[Action] = [Abort(tuple(ended), ruling.stop)] if ended else []
        return [*aborts, self._done]

    def _without_the_dropped(self, ruling: Ruling, standing: Standing) -> Ruling:
        """The ruling without what it promises about the vote of all branches, where some were dropped.

        The vote of the others may well be certain; that of all is not, for those would have voted too.
        """
        dropped = sum(outcome is not None and outcome.dropped for outcome in standing.outcomes)
        if not dropped or ruling.reason == "cancelled":
            return ruling
        were, they = ("branches were", "they") if dropped > 1 else ("branches was", "it")
        return replace(
            ruling,
            stop=f"{ruling.stop}; {dropped} of {standing.branches} {were} dropped, and nobody knows what {they} would "
            "have answered",
            probability=None,
            reason="confidence" if self.spec.policy == "confidence" else "policy",
        )

    def _stop(self, branch: _Branch, why: str) -> None:
        branch.fate, branch.why, branch.ended_at = "stopped", why, self._tokens_spent()

    def _slide(self, branch: _Branch, count: int, confidence: float) -> None:
        """Move the window over the last tokens on, and note its mean where it is full."""
        size = self.spec.window_size
        branch.recent.append((count, confidence))
        while sum(tokens for tokens, _ in branch.recent) - branch.recent[0][0] >= size:
            branch.recent.popleft()
        excess = sum(tokens for tokens, _ in branch.recent) - size
        if excess < 0:
            return
        oldest, mean = branch.recent[0]
        total = sum(tokens * value for tokens, value in branch.recent) - excess * mean
        assert excess < oldest
        lowest = branch.lowest_confidence
        branch.lowest_confidence = total / size if lowest is None else min(lowest, total / size)

    def _known(self, index: int) -> _Branch:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self._branches):
            raise OptionError(f"branch: must be 0 to {len(self._branches) - 1}, got {index!r}")
        branch = self._branches[index]
        if branch.fate in ("waiting", "not_started"):
            raise OptionError(f"branch: {index} was never asked to start")
        return branch

    @staticmethod
    def _check_running(index: int, branch: _Branch) -> None:
        if branch.fate != "running":
            raise OptionError(f"branch: {index} has ended already, it {branch.fate}")

    def _tokens_spent(self) -> int:
        return sum(branch.tokens for branch in self._branches)

    def _tokens_saved(self) -> int:
        lengths = [branch.tokens for branch in self._branches if branch.fate == "finished"]
        if not lengths:
            return 0
        mean = sum(lengths) / len(lengths)
        return round(sum(max(0.0, mean - branch.tokens) for branch in self._unfinished()))

    def _unfinished(self) -> Iterable[_Branch]:
        return (one for one in self._branches if one.fate in ("stopped", "not_started") and not one.abandoned)
