"""``verify_gated``: verify the branches of a fork in place, or skip it, and take the best.

The question "is this right?" is appended to the branch's own text, so the branch's KV is a cached prefix and a
verification costs the tokens of the question only. The verdict is read off the distribution of the next token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sglang.lang.chat_template import ChatTemplate
from sglang.lang.interpreter import ProgramState, ProgramStateGroup, StreamExecutor

from rksc_sgl.answers import branch_answer
from rksc_sgl.errors import (
    LabelError,
    OptionError,
    ServerError,
    ServerRefusedError,
    UnsupportedBackendError,
    VerificationError,
)
from rksc_sgl.frontend.endpoint import BranchEndpoint
from rksc_sgl.frontend.executors import wait_idle
from rksc_sgl.frontend.fork import BranchGroup
from rksc_sgl.generated.finish import is_truncated, why_ended
from rksc_sgl.options import KEY, RequestOptions
from rksc_sgl.verifying.course import Course, Member, course_of, course_of_record, exit_options, gate_of_profiles
from rksc_sgl.verifying.labels import LabelTokens, check_labels, resolve_labels
from rksc_sgl.verifying.question import DEFAULT_QUESTION, Turns, question_with_labels
from rksc_sgl.verifying.question import verification_suffix as suffix_of_turns
from rksc_sgl.verifying.reading import read_reply, said_of_mass
from rksc_sgl.verifying.select import Candidate, Selector, choose, selector_of, unresolved
from rksc_sgl.verifying.skip import SkipGate

logger = logging.getLogger(__name__)

__all__ = ["DEFAULT_QUESTION", "Verdict", "verification_suffix", "verify_gated"]

_AT_ONCE = 32  # verifications that are asked one by one


@dataclass
class Verdict:
    """What came of a fork. Lists have one entry for each branch.

    Attributes:
        best: the selected branch; ``verdict.best["answer"]`` is its text.
        index: its position in the group.
        scores: P(first label) of each verification; None where a branch failed or was not verified.
        label_mass: P(any label) of each verification: how much of what the model would reply is a label at all. Where
            it is next to nothing a score says nothing. None without a score, and where a verification left early: its
            last layers, which would tell, were not run.
        confidences: mean top-1 probability of each branch's tokens; None where it failed or was not measured.
        answers: the answer extracted from each branch's text; None where there is none.
        errors: what went wrong with each branch; None where nothing did. A branch with an error is never selected.
        skipped: True when the branch was selected without verification.
        reason: why verification was skipped, or why it was not, and what the selection rests on.
        new_tokens: prompt tokens that each verification computed (its prompt less what was cached); where it was
            asked for again at full depth, both times.
        tokens_spent: tokens computed by verification, in all.
        tokens_saved: tokens that verification did not compute: those of the branches that were cached, and the
            whole prompts where it was skipped.
        reports: ``meta_info["rksc"]`` of each verification; None where there is none.
    """

    best: ProgramState
    index: int
    scores: list[float | None]
    confidences: list[float | None]
    answers: list[str | None]
    errors: list[str | None]
    skipped: bool
    reason: str
    label_mass: list[float | None] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    tokens_spent: int = 0
    tokens_saved: int = 0
    reports: list[dict[str, Any] | None] = field(default_factory=list)


@dataclass(eq=False)
class _Branch:
    """A branch while it is being verified."""

    index: int
    state: ProgramState
    text: str = ""
    answer: str | None = None
    confidence: float | None = None
    blended: bool = False  # it was generated on approximate KV
    error: str | None = None
    score: float | None = None
    label_mass: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0  # over all times that it was asked
    margin_error: float = 0.0  # how far the margin of its verdict may be off, in logits
    report: dict[str, Any] | None = None

    @property
    def executor(self) -> StreamExecutor:
        return self.state.stream_executor


def verify_gated(
    branches: ProgramStateGroup,
    var: str,
    *,
    question: str | None = None,
    labels: Sequence[str] = ("YES", "NO"),
    skip: SkipGate | None = None,
    select: str | Selector = "vote",
    extract: str | Callable[[str], str | None] | None = None,
    exit: str = "certified",
    risk: float | None = None,
    scope: str = "selection",
) -> Verdict:
    """Select the best branch, and verify each branch's ``var`` in place where the selection needs that.

    With the defaults the branches vote:

    ===================================  =============================  =============================================
    answers                              verified                       what decides
    ===================================  =============================  =============================================
    one has the most votes               nobody                         the vote; of its branches the most confident
    two or more have the most votes      the branches that give these   of the tied answers, the largest sum of
                                                                        scores; of its branches the best score
    fewer than two branches have one     all branches                   the best score; ``reason`` says that its worth
                                                                        is unknown
    ===================================  =============================  =============================================

    A fork with ``early_stop`` has had its vote, and that decides: with ``select="vote"`` or ``"majority"``, no
    ``skip``, and the same variable and ``extract``. Ties go to the answer whose branch comes first. Nobody is verified,
    and ``reason`` says why the vote was decided. With every other selection it is among the branches that finished.
    Where all ended and fewer than two have an answer, the last row of the table holds.

    A score is P(first label) * sqrt(confidence). Nothing says that it is worth anything on your model: on some a branch
    with a high score is right no more often than another, which is why votes come first.

    Args:
        branches: a group made by :func:`rksc_sgl.fork_similar`.
        var: the name of the ``sgl.gen`` to verify.
        question: asked after the branch's text, as a user's turn where the program speaks in turns; ``{labels}``
            becomes the labels. None takes :data:`DEFAULT_QUESTION`.
        labels: what the model may reply, the affirmative one first; their spellings are found by the tokenizer.
        skip: when to do without verification; where it does not say so, all branches are verified.
            ``SkipGate.never()`` always verifies, ``SkipGate()`` unless all branches answer alike. None takes, with
            ``select="vote"``, the table above; with ``select="score"`` the rule that the server's profile certifies
            for this question and ``risk``; and else ``SkipGate()``.
        select: ``vote`` (above), ``score`` (the largest), ``weighted_majority`` (the answer with the largest sum of
            scores), ``majority`` (the most frequent answer, of several the first; never verifies, whatever ``skip``
            says), or a callable that takes the candidates and returns the index of one.
        extract: the answer with which a branch votes, by :func:`rksc_sgl.answers.branch_answer`: ``answer``, ``text``,
            ``json``, ``json:FIELD``, or a callable that takes the text and returns it or None. A branch that its token
            limit cut votes only with an answer that it stated, or that your callable found. None takes that of
            ``early_stop`` where ``var`` is the variable that votes there, and else ``answer``.
        exit: whether a verification may stop at an intermediate layer of the model: ``certified`` where the server
            has a profile for this question that says so, ``published`` by the uncertified rule of the paper, ``off``.
        risk: with ``certified``: the largest acceptable share of what ``scope`` names. None takes the server's, 0.01.
        scope: ``selection``: neither a verdict nor the selected branch may change; verdicts that the selection by score
            hangs on are asked for again at full depth. Only the selection by the scores of all branches is certified
            (``select="score"``, and a vote without answers to compare): nothing exits with another. ``verdict``: the
            scores may move as long as their verdicts stay, and the selection with them.

    Returns:
        The :class:`Verdict`. A failed or empty branch loses; it never brings the rest down. One that was stopped or
        never started is in ``errors`` too, and never selected.

    Raises:
        OptionError: an argument is of no use, or ``risk`` is not certified by the server's profile; the message names
            it, and nothing was sent.
        LabelError: the labels cannot be told apart by their first token.
        UnsupportedBackendError: verification is needed and the branches are not on an SGLang server.
        ServerError: the server went away.
        VerificationError: every branch failed.
    """
    if skip is not None and not isinstance(skip, SkipGate):
        raise OptionError(f"skip: must be a SkipGate or None, got {type(skip).__name__}")
    if question is not None and not isinstance(question, str):
        raise OptionError(f"question: must be a string or None, got {type(question).__name__}")
    selector_of(select)
    check_labels(labels)
    # The server's own check; which tokens the labels are does not matter for it.
    options = RequestOptions(op="verify", exit=exit, risk=risk, scope=scope, yes_ids=(0,), no_ids=(1,))
    if len(branches.states) == 0:
        raise OptionError("branches: the group has no branches")
    asked = question_with_labels(question, labels)

    extract, decides = _of_early_stop(branches, var, extract)
    members = [_collect(index, state, var, extract) for index, state in enumerate(branches.states)]
    if all(branch.error is not None for branch in members):
        raise _all_failed(members, branches)
    _check_risk(members, options)

    decided = _decided(branches, members) if decides and skip is None and select in ("vote", "majority") else None
    course = decided or course_of(
        select, skip, [_member(branch) for branch in members], lambda: _certified_gate(members, asked, risk)
    )
    try:
        return _carried_out(course, branches, members, select, asked, labels, options)
    finally:
        if isinstance(branches, BranchGroup):
            branches.tell_end()


def _carried_out(
    course: Course,
    branches: ProgramStateGroup,
    members: list[_Branch],
    select: str | Selector,
    asked: str,
    labels: Sequence[str],
    options: RequestOptions,
) -> Verdict:
    """Ask about the branches that the course wants to know of, and select one."""
    verified = [members[index] for index in course.verify]
    if verified:
        early = exit_options(options.exit, options.risk, options.scope, course)
        _verify(verified, asked, labels, early, resolve=course.by_score and options.scope == "selection")
    _count_unspent([branch for branch in members if branch not in verified], asked)
    # A branch can fail in verification too, so this is looked at again.
    alive = [branch for branch in members if branch.error is None]
    if not alive:
        raise _all_failed(members, branches)
    index = course.index
    if index is None:
        among = [members[place] for place in course.among if members[place].error is None] or alive
        index = choose(select, [_candidate(branch) for branch in among])
    verdict = _verdict(members, index, course, _warn_of_mass(verified, asked))
    logger.info(
        "verify_gated: branch %d of %d, %s (%s); %d tokens computed, %d saved",
        index,
        len(members),
        "verification skipped" if verdict.skipped else f"{len(course.verify)} verified",
        verdict.reason,
        verdict.tokens_spent,
        verdict.tokens_saved,
    )
    return verdict


def _of_early_stop(
    branches: ProgramStateGroup, var: str, extract: str | Callable[[str], str | None] | None
) -> tuple[str | Callable[[str], str | None], bool]:
    """The answer's extraction, and whether the fork's own vote is one about it."""
    spec = branches.early_stop if isinstance(branches, BranchGroup) else None
    if spec is None or spec.variable != var:
        return ("answer" if extract is None else extract), False
    return (spec.extract if extract is None else extract), extract is None or extract == spec.extract


def _decided(branches: ProgramStateGroup, members: list[_Branch]) -> Course | None:
    """The course of a fork whose own vote has an answer; None where that is nothing to go by."""
    assert isinstance(branches, BranchGroup) and branches.stopping is not None
    return course_of_record(branches.stopping, [_member(branch) for branch in members])


def _member(branch: _Branch) -> Member:
    return Member(branch.index, branch.answer, branch.confidence, branch.error)


def _collect(index: int, state: ProgramState, var: str, extract: str | Callable[[str], str | None]) -> _Branch:
    """Wait for a branch and take what it produced.

    From its executor and not by way of the state: SGLang's own wait for ever for a worker that is gone.
    """
    branch = _Branch(index, state)
    executor = state.stream_executor
    wait_idle(executor)
    if executor.error_ is not None:
        branch.error = str(executor.error_) or type(executor.error_).__name__
        return branch
    if executor.use_thread and executor.queue.unfinished_tasks:
        branch.error = (
            f"what was appended to it was never run: SGLang's worker of it ended before, with its program or in a "
            f"join; it has {sorted(executor.variables)}"
        )
        return branch
    if var not in executor.variables:
        branch.error = f"the branch has no variable {var!r}; it has {sorted(executor.variables)}"
        return branch
    text = executor.variables[var]
    if isinstance(text, list):
        branch.error = f"{var!r} holds {len(text)} continuations (n > 1); verify one text a branch"
        return branch
    if not isinstance(text, str):
        branch.error = f"{var!r} is no text but {type(text).__name__}"
        return branch
    if not text.strip():
        branch.error = f"{var!r} is empty"
        return branch
    meta_info = executor.meta_info.get(var) or {}
    if why := why_ended(meta_info):
        branch.error = why
        return branch
    branch.text = text
    branch.answer = branch_answer(text, extract, truncated=is_truncated(meta_info))
    branch.confidence = meta_info.get("confidence")
    branch.blended = (meta_info.get(KEY) or {}).get("mode") == "blend"
    return branch


def _check_risk(members: list[_Branch], options: RequestOptions) -> None:
    """Refuse here what the server would refuse of every branch.

    Raises:
        OptionError: no profile of the server certifies this risk; a server without any has nothing to refuse.
    """
    if options.risk is None or options.exit != "certified":
        return
    backend = next(branch for branch in members if branch.error is None).executor.backend
    if not isinstance(backend, BranchEndpoint) or _certifies(backend.rksc_info(), options):
        return
    if not _certifies(backend.read_rksc_info(), options):  # what was read first may be of a server before this
        can = sorted({risk for profile in _profiles(backend.rksc_info()) for risk in profile["risks"][options.scope]})
        raise OptionError(
            f"risk: no profile of {backend.base_url} certifies an exit for the {options.scope} at {options.risk:g}; "
            f"it can certify {', '.join(f'{risk:g}' for risk in can) or 'none'}"
        )


def _profiles(info: dict[str, Any] | None) -> list[dict[str, Any]]:
    return list(info["schedulers"][0]["exit"]["profiles"]) if info else []


def _certifies(info: dict[str, Any] | None, options: RequestOptions) -> bool:
    """Whether a server with this ``/rksc/info`` takes a request's risk."""
    profiles = _profiles(info)
    risks = [risk for profile in profiles for risk in profile["risks"][options.scope]]
    return not profiles or any(risk <= (options.risk or 0.0) for risk in risks)


def _certified_gate(members: list[_Branch], question: str, risk: float | None) -> SkipGate | None:
    """The skip rule of the server's profile for this question; None where there is none.

    None with blended branches too: what was certified is of forks on exact KV.
    """
    if any(branch.blended for branch in members):
        logger.info("verify_gated: skipping is not certified for blended branches")
        return None
    alive = next(branch for branch in members if branch.error is None)
    backend = alive.executor.backend
    profiles = _profiles(backend.rksc_info()) if isinstance(backend, BranchEndpoint) else []
    ids = _prompt_ids(alive, question) if profiles else None
    if ids is None:
        return None
    return gate_of_profiles(profiles, ids, risk)


def _prompt(branch: _Branch, question: str) -> str:
    """The text of a branch's verification; a turn that the program has not closed yet is closed in it."""
    executor = branch.executor
    text, messages = executor.text_, list(executor.messages_)
    if executor.cur_role is not None:
        _, closing = executor.chat_template.get_prefix_and_suffix(executor.cur_role, messages)
        content = text[executor.cur_role_begin_pos :].lstrip()  # as SGLang closes a role
        messages.append({"role": executor.cur_role, "content": content})
        text += closing
    return text + verification_suffix(question, executor.chat_template, messages)


def _prompt_ids(branch: _Branch, question: str) -> list[int] | None:
    """Token ids of a branch's verification; None where they are not known on this side."""
    return _endpoint(branch).prompt_ids(_prompt(branch, question))


def _verify(
    members: list[_Branch], question: str, labels: Sequence[str], early: dict[str, Any], *, resolve: bool
) -> None:
    """Ask for each branch; all in one request, so that they form one batch.

    Args:
        members: at least one, none of which failed.
        early: the options ``exit``, ``risk`` and ``scope``.
        resolve: whether to ask again, at full depth, for the verdicts that the selection by score hangs on.
    """
    tokens = resolve_labels(labels, _endpoint(members[0]).tokenize)
    _ask_for(members, question, tokens, early)
    answered = [branch for branch in members if branch.error is None]
    if resolve and answered:
        unsure = unresolved([_candidate(branch) for branch in answered], [branch.margin_error for branch in answered])
        again = [answered[place] for place in unsure]
        if again:
            logger.info("verify_gated: %d of %d verdicts are asked for again at full depth", len(again), len(members))
            _ask_for(again, question, tokens, {"exit": "off"})


def _ask_for(branches: list[_Branch], question: str, tokens: LabelTokens, early: dict[str, Any]) -> None:
    options = {name: value for name, value in early.items() if value is not None}
    options.update(yes_ids=list(tokens.ids[0]), no_ids=tokens.other_ids)
    bodies = [_request(branch, question, tokens, options) for branch in branches]
    responses = _ask(_endpoint(branches[0]), bodies)
    for branch, response in zip(branches, responses, strict=True):
        if isinstance(response, ServerError):
            branch.error = f"verification failed: {response}"
            continue
        _take(branch, response, tokens)


def _endpoint(branch: _Branch) -> BranchEndpoint:
    backend = branch.executor.backend
    if not isinstance(backend, BranchEndpoint):
        raise UnsupportedBackendError(
            f"verification reads token log-probabilities from an SGLang server, and this branch is on "
            f"{type(backend).__name__}; make the branches with fork_similar on a RuntimeEndpoint, or use "
            f"select='majority', which never verifies"
        )
    return backend


def _request(branch: _Branch, question: str, tokens: LabelTokens, options: dict[str, Any]) -> dict[str, Any]:
    endpoint, text = _endpoint(branch), _prompt(branch, question)
    ids = endpoint.prompt_ids(text)
    return {
        **({"text": text} if ids is None else {"input_ids": ids}),
        "sampling_params": {"max_new_tokens": 1, "temperature": 0, **endpoint.request_options(op="verify", **options)},
        "return_logprob": True,
        "token_ids_logprob": tokens.all_ids,
    }


def verification_suffix(question: str, template: ChatTemplate, messages: Sequence[dict[str, Any]]) -> str:
    """What is appended to a branch's text to ask about it.

    Args:
        question: the question, labels filled in.
        template: the program's chat template.
        messages: the branch's turns so far, all closed; without any, the question is plain text.
    """
    if not messages:
        return suffix_of_turns(question, None)
    user = template.get_prefix_and_suffix("user", list(messages))
    opening, _ = template.get_prefix_and_suffix("assistant", [*messages, {"role": "user", "content": question}])
    return suffix_of_turns(question, Turns("", user, opening))


def _ask(endpoint: BranchEndpoint, bodies: list[dict[str, Any]]) -> list[Any]:
    """Each request's answer, or the server's refusal of it; in one batch where that can be."""
    keys = {"input_ids" if "input_ids" in body else "text" for body in bodies}
    if len(keys) == 1:
        (key,) = keys
        batch = {
            key: [body[key] for body in bodies],
            "sampling_params": [body["sampling_params"] for body in bodies],
            "return_logprob": [True] * len(bodies),
            "token_ids_logprob": [body["token_ids_logprob"] for body in bodies],
        }
        try:
            return endpoint.post_json("/generate", batch)
        except ServerRefusedError as error:
            logger.info("the batch of verifications was refused (%s); each is asked by itself", error)
    with ThreadPoolExecutor(min(len(bodies), _AT_ONCE)) as pool:
        return list(pool.map(partial(_ask_alone, endpoint), bodies))


def _ask_alone(endpoint: BranchEndpoint, body: dict[str, Any]) -> Any:
    """One request by itself: an answer, or the server's refusal of just this one."""
    try:
        return endpoint.post_json("/generate", body)
    except ServerRefusedError as error:
        return error


def _take(branch: _Branch, response: dict[str, Any], tokens: LabelTokens) -> None:
    try:
        reading = read_reply(response["meta_info"], tokens)
    except LabelError as error:
        branch.error = f"verification failed: {error}"
        return
    branch.score, branch.label_mass, branch.margin_error = reading.score, reading.label_mass, reading.error
    branch.new_tokens += reading.new_tokens
    branch.prompt_tokens, branch.cached_tokens = reading.prompt_tokens, reading.cached_tokens
    branch.report = reading.report


def _warn_of_mass(verified: list[_Branch], question: str) -> str:
    """What is to be said where the model would hardly reply with a label; empty where it would."""
    said = said_of_mass([branch.label_mass for branch in verified])
    if not said:
        return ""
    if _endpoint(verified[0]).warn_once(question):
        logger.warning("verify_gated: %s; ask so that the model replies with a label. It was asked: %s", said, question)
    return said


def _count_unspent(members: list[_Branch], question: str) -> None:
    """Length of the verification prompts that were not sent, where the ids are known."""
    for branch in members:
        backend = branch.executor.backend
        if branch.error is not None or not isinstance(backend, BranchEndpoint):
            continue
        ids = _prompt_ids(branch, question)
        branch.prompt_tokens = branch.cached_tokens = len(ids) if ids is not None else 0


def _candidate(branch: _Branch) -> Candidate:
    return Candidate(branch.index, branch.text, branch.answer, branch.score, branch.confidence)


def _all_failed(members: list[_Branch], branches: ProgramStateGroup) -> Exception:
    """The error of a fork without a usable branch; the server's own where that is what stopped every branch."""
    causes = [state.stream_executor.error_ for state in branches.states]
    if causes and all(isinstance(cause, ServerError) for cause in causes):
        return causes[0]
    errors = [branch.error for branch in members]
    if len(set(errors)) == 1:
        return VerificationError(f"every branch failed: {errors[0]}")
    listed = "; ".join(f"branch {branch.index}: {branch.error}" for branch in members)
    return VerificationError(f"every branch failed: {listed}")


def _verdict(members: list[_Branch], index: int, course: Course, of_mass: str) -> Verdict:
    return Verdict(
        best=members[index].state,
        index=index,
        scores=[branch.score for branch in members],
        confidences=[branch.confidence for branch in members],
        answers=[branch.answer for branch in members],
        errors=[branch.error for branch in members],
        skipped=not course.verify,
        reason=f"{course.reason}; {of_mass}" if of_mass else course.reason,
        label_mass=[branch.label_mass for branch in members],
        new_tokens=[branch.new_tokens for branch in members],
        tokens_spent=sum(branch.new_tokens for branch in members),
        tokens_saved=sum(branch.cached_tokens for branch in members),
        reports=[branch.report for branch in members],
    )
