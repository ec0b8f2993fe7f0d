"""The course of one fork: events in, actions out. No I/O, no threads, no clock.

Whoever drives it starts, aborts and verifies what the actions say, and tells what happens, one event after the other.
The vote is :class:`rksc_sgl.deciding.Decision`'s, and what comes after it is ``verify_gated``'s
(:mod:`rksc_sgl.verifying.course`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rksc_sgl.answers import AnswerClasses, branch_answer, calls_answer, same_answer
from rksc_sgl.deciding import Abort, Action, Decision, Done, EarlyStop, Record, Start
from rksc_sgl.one_request.options import ForkOptions
from rksc_sgl.verifying.course import Course, Member, course_of, course_of_record, exit_options
from rksc_sgl.verifying.reading import Reading, said_of_mass
from rksc_sgl.verifying.select import Candidate, choose, ranking, unresolved
from rksc_sgl.verifying.skip import SkipGate

_RUN_ALL = EarlyStop(policy=lambda standing: None, launch="all")


@dataclass(frozen=True)
class Completion:
    """What a branch came to.

    Attributes:
        text: of its answer, without its thought.
        calls: name and arguments of each tool that it calls.
        truncated: it was cut by its token limit.
        confidence: mean top-1 probability of its tokens; None where it was not measured.
        blended: it was generated on approximate KV.
    """

    text: str
    calls: tuple[tuple[str, str], ...] = ()
    truncated: bool = False
    confidence: float | None = None
    blended: bool = False


@dataclass(frozen=True)
class Ask:
    """Verify these branches, and report each with ``verified``.

    Attributes:
        branches: which.
        exit: the options ``exit``, ``risk`` and ``scope`` of the requests.
    """

    branches: tuple[int, ...]
    exit: dict[str, Any]


@dataclass(frozen=True)
class Unask:
    """End the verifications that are still open; they are not waited for any more."""

    branches: tuple[int, ...]


@dataclass(frozen=True)
class Chosen:
    """A branch is selected; there is nothing more to do.

    Attributes:
        order: every branch that may be selected, the best first.
        answer: the best one's; None where it has none.
        reason: why verification ran or not, and what the selection rests on.
        verified: branches that have a score.
        partial: the deadline passed before the fork was decided.
    """

    order: tuple[int, ...]
    answer: str | None
    reason: str
    verified: tuple[int, ...]
    partial: bool


@dataclass(frozen=True)
class Failed:
    """No branch can be selected; there is nothing more to do.

    Attributes:
        reason: of every branch.
        late: the deadline passed.
    """

    reason: str
    late: bool


ForkAction = Start | Abort | Ask | Unask | Chosen | Failed


@dataclass
class _Branch:
    completion: Completion | None = None
    answer: str | None = None
    error: str | None = None
    reading: Reading | None = None
    computed: int = 0  # prompt tokens of its verifications
    reused: int = 0


class Fork:
    """One fork.

    Args:
        options: what is asked.
        extract: the answer in a text.
        certified_gate: the skip rule that a profile certifies for a branch's verification, by the branch; called only
            where ``select`` is ``score``.
        launch: the order in which branches are launched, for ``probable`` takes them for draws of one kind; None for
            their own.
        equal: whether two different spellings are one answer.

    Raises:
        OptionError: the policy cannot decide so many branches.
    """

    def __init__(
        self,
        options: ForkOptions,
        extract: str = "answer",
        *,
        certified_gate: Callable[[int], SkipGate | None] = lambda branch: None,
        launch: Sequence[int] | None = None,
        equal: Callable[[str, str], bool] = same_answer,
    ) -> None:
        self.options = options
        self._extract = extract
        self._certified_gate = certified_gate
        self._at = list(range(options.count)) if launch is None else list(launch)
        self._place = {branch: place for place, branch in enumerate(self._at)}
        self._decision = Decision(options.count, options.early_stop or _RUN_ALL)
        self._classes = AnswerClasses(equal)
        self._branches = [_Branch() for _ in range(options.count)]
        self._course: Course | None = None
        self._open: set[int] = set()  # verifications
        self._asked_again = False
        self.end: Chosen | Failed | None = None

    # -- events --------------------------------------------------------------------------------------

    def start(self) -> list[ForkAction]:
        """Begin."""
        return self._after(self._decision.start())

    def tokens(self, branch: int, count: int, confidence: float | None = None) -> list[ForkAction]:
        """A branch generated so many more tokens, of this mean confidence."""
        return self._after(self._decision.tokens(self._place[branch], count, confidence))

    def finished(self, branch: int, completion: Completion) -> list[ForkAction]:
        """A branch ended by itself."""
        one = self._branches[branch]
        one.completion = completion
        if completion.calls:
            one.answer = calls_answer(completion.calls)
        elif completion.text.strip():
            one.answer = branch_answer(completion.text, self._extract, truncated=completion.truncated)
        else:
            one.error = "its text is empty"
        voted = self._decision.finished(
            self._place[branch],
            self._classes.of(one.answer),
            truncated=completion.truncated,
            confidence=completion.confidence,
        )
        return self._after(voted)

    def failed(self, branch: int, why: str) -> list[ForkAction]:
        """A branch ended with an error."""
        self._branches[branch].error = why
        return self._after(self._decision.failed(self._place[branch], why))

    def verified(self, branch: int, reading: Reading | None, why: str = "") -> list[ForkAction]:
        """A verification that was asked for has this reading; or None, and why it failed."""
        if self.end is not None or branch not in self._open:
            return []
        self._open.discard(branch)
        one = self._branches[branch]
        if reading is None:
            one.error = f"verification failed: {why}"
        else:
            one.reading = reading
            one.computed += reading.new_tokens
            one.reused += reading.cached_tokens
        return self._ask_again_or_choose() if not self._open else []

    def expired(self, why: str) -> list[ForkAction]:
        """The deadline passed: what there is decides now."""
        if self.end is not None:
            return []
        open_, self._open = tuple(sorted(self._open)), set()
        actions: list[ForkAction] = [Unask(open_)] if open_ else []
        if self._course is None:
            aborts = self._decision.cancelled(why)
            actions += [self._mapped(one) for one in aborts if isinstance(one, Abort)]
        for one in self._branches:
            one.reading = None  # scores of some only would favour the others
        alive = tuple(branch.index for branch in self._members() if branch.error is None) or self._textless()
        if not alive:
            return [*actions, self._fail(late=True, why=why)]
        self._course = Course((), alive, None, False, f"{why}: the selection is among the branches that had finished")
        return [*actions, self._choose(partial=True)]

    def cancelled(self, why: str) -> list[ForkAction]:
        """Nobody wants the answer any more: what runs is stopped, and nothing is selected."""
        if self.end is not None or self._course is not None:
            return []
        return [self._mapped(one) for one in self._decision.cancelled(why) if isinstance(one, Abort)]

    # -- what there is to tell -----------------------------------------------------------------------

    def record(self) -> Record:
        """What became of the branches so far, in their own order."""
        record = self._decision.record()
        done = record.done
        if done is not None and done.branch is not None:
            done = replace(done, branch=self._at[done.branch])
        ordered = tuple(record.branches[self._place[branch]] for branch in range(self.options.count))
        return replace(record, branches=ordered, done=done)

    def members(self) -> list[Member]:
        """Every branch as the selection sees it."""
        return self._members()

    def reading(self, branch: int) -> Reading | None:
        """Of its last verification."""
        return self._branches[branch].reading

    def verification_tokens(self, branch: int) -> tuple[int, int]:
        """Prompt tokens that its verifications computed, and that they found cached."""
        return self._branches[branch].computed, self._branches[branch].reused

    # -- inside --------------------------------------------------------------------------------------

    def _after(self, actions: list[Action]) -> list[ForkAction]:
        done = [one for one in actions if isinstance(one, Done)]
        mapped = [self._mapped(one) for one in actions if isinstance(one, (Start, Abort))]
        return [*mapped, *self._conclude()] if done and self._course is None else mapped

    def _mapped(self, action: Start | Abort) -> ForkAction:
        return replace(action, branches=tuple(self._at[place] for place in action.branches))

    def _members(self) -> list[Member]:
        record = self.record()
        members = []
        for index, (one, fate) in enumerate(zip(self._branches, record.branches, strict=True)):
            error = one.error
            if fate.fate in ("stopped", "not_started"):
                error = f"branch {index} was {fate.fate.replace('_', ' ')}: {fate.why}"
            elif fate.fate == "failed":
                error = fate.why
            elif one.completion is None:
                error = error or "it has not finished"
            confidence = None if one.completion is None else one.completion.confidence
            members.append(Member(index, one.answer, confidence, error))
        return members

    def _conclude(self) -> list[ForkAction]:
        """The vote is over: who is verified, or selected already."""
        members = self._members()
        if all(member.error is not None for member in members):
            textless = self._textless()
            if not textless:
                return [self._fail(late=False)]
            reason = "no branch has any text; the most confident is taken"
            self._course = Course((), textless, None, False, reason)
            return [self._choose()]
        options = self.options
        votes = options.early_stop is not None and options.select in ("vote", "majority")
        decided = course_of_record(self.record(), members) if votes else None
        self._course = decided or course_of(options.select, None, members, lambda: self._gate(members))
        if self._course.verify and options.verify is None:
            reason = f"{self._course.reason}; verification is off, and confidence stands in for scores"
            self._course = replace(self._course, verify=(), reason=reason)
        if not self._course.verify or options.verify is None:
            return [self._choose()]
        verify = options.verify
        self._open = set(self._course.verify)
        return [Ask(self._course.verify, exit_options(verify.exit, verify.risk, verify.scope, self._course))]

    def _textless(self) -> tuple[int, ...]:
        """Branches that finished without a text; where no other is left, a client gets what it would get of one."""
        fates = self.record().branches
        return tuple(
            index
            for index, (one, fate) in enumerate(zip(self._branches, fates, strict=True))
            if one.completion is not None and fate.fate == "finished" and one.reading is None
        )

    def _gate(self, members: Sequence[Member]) -> SkipGate | None:
        """The certified skip rule; what was certified is of forks on exact KV."""
        if self.options.verify is None or any(one.completion and one.completion.blended for one in self._branches):
            return None
        return self._certified_gate(next(member.index for member in members if member.error is None))

    def _ask_again_or_choose(self) -> list[ForkAction]:
        """All verifications are there; verdicts that the selection by score hangs on are asked for at full depth."""
        assert self._course is not None and self.options.verify is not None
        asked = [branch for branch in self._course.verify if self._branches[branch].error is None]
        if not self._asked_again and self._course.by_score and self.options.verify.scope == "selection" and asked:
            self._asked_again = True
            errors = [reading.error if (reading := self.reading(branch)) else 0.0 for branch in asked]
            again = tuple(asked[place] for place in unresolved([self._candidate(branch) for branch in asked], errors))
            if again:
                self._open = set(again)
                return [Ask(again, {"exit": "off"})]
        if all(member.error is not None for member in self._members()):
            return [self._fail(late=False)]
        return [self._choose()]

    def _choose(self, *, partial: bool = False) -> Chosen:
        assert self._course is not None
        alive = [member.index for member in self._members() if member.error is None] or list(self._course.among)
        first = self._course.index
        if first is None:
            among = [branch for branch in self._course.among if branch in alive] or alive
            first = choose(self.options.select, [self._candidate(branch) for branch in among])
        order = ranking(self.options.select, [self._candidate(branch) for branch in alive], first)
        verified = tuple(index for index, one in enumerate(self._branches) if one.reading is not None)
        masses = [reading.label_mass for branch in verified if (reading := self.reading(branch))]
        said = said_of_mass(masses)
        reason = f"{self._course.reason}; {said}" if said else self._course.reason
        answer = self._branches[first].answer
        chosen = Chosen(tuple(order), self._classes.of(answer), reason, verified, partial)
        self.end = chosen
        return chosen

    def _fail(self, *, late: bool, why: str = "") -> Failed:
        errors = [member.error or "" for member in self._members()]
        if late:
            reason = f"{why}, and no branch had finished"
        elif len(set(errors)) == 1:
            reason = f"every branch failed: {errors[0]}"
        else:
            listed = "; ".join(f"branch {index}: {error}" for index, error in enumerate(errors))
            reason = f"every branch failed: {listed}"
        self.end = Failed(reason, late)
        return self.end

    def _candidate(self, branch: int) -> Candidate:
        one = self._branches[branch]
        text = one.completion.text if one.completion else ""
        confidence = one.completion.confidence if one.completion else None
        return Candidate(branch, text, one.answer, one.reading.score if one.reading else None, confidence)
