"""``verify_gated``: verify the branches of a fork in place, or skip it, and take the best.

The question "is this right?" is appended to the branch's own text, so the branch's KV is a cached prefix and a
verification costs the tokens of the question only. The verdict is read off the distribution of the next token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang.lang.chat_template import ChatTemplate
from sglang.lang.interpreter import ProgramState, ProgramStateGroup

from rksc_sgl.errors import (
    LabelError,
    OptionError,
    ServerError,
    ServerRefusedError,
    UnsupportedBackendError,
    VerificationError,
)
from rksc_sgl.exit_settings import DEFAULT_RISK
from rksc_sgl.frontend.answers import extract_answer
from rksc_sgl.frontend.endpoint import BranchEndpoint
from rksc_sgl.frontend.labels import LabelTokens, label_logprobs, resolve_labels
from rksc_sgl.frontend.select import NEEDS_SCORES, Candidate, Selector, choose, selector_of, unresolved
from rksc_sgl.frontend.skip import SkipDecision, SkipGate
from rksc_sgl.options import KEY, SCOPES

logger = logging.getLogger(__name__)

DEFAULT_QUESTION = "Is the answer above correct? Reply with {labels}."


@dataclass
class Verdict:
    """What came of a fork. Lists have one entry for each branch.

    Attributes:
        best: the selected branch; ``verdict.best["answer"]`` is its text.
        index: its position in the group.
        scores: P(first label) of each verification; None where a branch failed or was not verified.
        confidences: mean top-1 probability of each branch's tokens; None where it failed or was not measured.
        answers: the answer extracted from each branch's text; None where there is none.
        errors: what went wrong with each branch; None where nothing did. A branch with an error is never selected.
        skipped: True when the branch was selected without verification.
        reason: why verification was skipped, or why it was not.
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
    new_tokens: list[int] = field(default_factory=list)
    tokens_spent: int = 0
    tokens_saved: int = 0
    reports: list[dict[str, Any] | None] = field(default_factory=list)


@dataclass
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
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0  # over all times that it was asked
    report: dict[str, Any] | None = None


def verify_gated(
    branches: ProgramStateGroup,
    var: str,
    *,
    question: str | None = None,
    labels: Sequence[str] = ("YES", "NO"),
    skip: SkipGate | None = None,
    select: str | Selector = "score",
    extract: Callable[[str], str | None] = extract_answer,
    exit: str = "certified",
    risk: float | None = None,
    scope: str = "selection",
) -> Verdict:
    """Verify each branch's ``var`` in place, unless the branches are decisive, and select the best branch.

    Args:
        branches: a group made by :func:`rksc_sgl.fork_similar`.
        var: the name of the ``sgl.gen`` to verify.
        question: asked after the branch's text, as a user's turn where the program speaks in turns; ``{labels}``
            becomes the labels. None takes :data:`DEFAULT_QUESTION`.
        labels: what the model may reply, the affirmative one first; their spellings are found by the tokenizer.
        skip: when to do without verification; None takes, with ``select="score"``, the rule that the server's
            profile certifies for this question and ``risk``, and else ``SkipGate()``: only where all branches answer
            alike. ``SkipGate.never()`` always verifies.
        select: ``score`` (P(YES) * sqrt(confidence)), ``weighted_majority`` (the answer with the largest sum of
            these), ``majority`` (the most frequent answer, which needs no verification), or a callable that takes
            the candidates and returns the index of one.
        extract: the answer in a branch's text, in a form that can be compared, or None.
        exit: whether a verification may stop at an intermediate layer of the model: ``certified`` where the server
            has a profile for this question that says so, ``published`` by the uncertified rule of the paper, ``off``.
        risk: with ``certified``: the largest acceptable share of what ``scope`` names. None takes the server's, 0.01.
        scope: ``selection``: neither a verdict nor the selected branch may change; verdicts that the selection by score
            hangs on are asked for again at full depth, and with another selector nothing exits, for nothing else is
            certified. ``verdict``: the scores may move as long as their verdicts stay, and the selection with them.

    Returns:
        The :class:`Verdict`. A failed or empty branch loses; it never brings the rest down.

    Raises:
        OptionError: an argument is of no use; the message names it.
        LabelError: the labels cannot be told apart by their first token.
        UnsupportedBackendError: verification is needed and the branches are not on an SGLang server.
        ServerError: the server went away.
        VerificationError: every branch failed.
    """
    gate = SkipGate() if skip is None else skip
    if not isinstance(gate, SkipGate):
        raise OptionError(f"skip: must be a SkipGate or None, got {type(skip).__name__}")
    selector_of(select)
    if len(branches.states) == 0:
        raise OptionError("branches: the group has no branches")
    asked = (DEFAULT_QUESTION if question is None else question).replace("{labels}", " or ".join(labels))

    members = [_collect(index, state, var, extract) for index, state in enumerate(branches.states)]
    if all(branch.error is not None for branch in members):
        raise _all_failed(members, branches)

    if skip is None and select == "score":
        gate = _certified_gate(members, asked, risk) or gate
    decision = _decide(gate, members, select)
    if not decision.skip:
        _verify(members, asked, labels, _early(exit, risk, scope, select), resolve=scope == "selection")
    else:
        _count_unspent(members, asked)
    # A branch can fail in verification too, so this is looked at again.
    alive = [branch for branch in members if branch.error is None]
    if not alive:
        raise _all_failed(members, branches)
    index = decision.index
    if index is None or members[index].error is not None:
        index = choose(select, [_candidate(branch) for branch in alive])
    verdict = _verdict(members, index, decision)
    logger.info(
        "verify_gated: branch %d of %d, %s (%s); %d tokens computed, %d saved",
        index,
        len(members),
        "verification skipped" if decision.skip else "verified",
        decision.reason,
        verdict.tokens_spent,
        verdict.tokens_saved,
    )
    return verdict


def _collect(index: int, state: ProgramState, var: str, extract: Callable[[str], str | None]) -> _Branch:
    """Wait for a branch and take what it produced."""
    branch = _Branch(index, state)
    error = state.error()
    if error is not None:
        branch.error = str(error) or type(error).__name__
        return branch
    if var not in state:
        branch.error = f"the branch has no variable {var!r}; it has {sorted(state.stream_executor.variables)}"
        return branch
    text = state[var]
    if isinstance(text, list):
        branch.error = f"{var!r} holds {len(text)} continuations (n > 1); verify one text a branch"
        return branch
    if not text.strip():
        branch.error = f"{var!r} is empty"
        return branch
    meta_info = state.get_meta_info(var) or {}
    branch.text = text
    branch.answer = extract(text)
    branch.confidence = meta_info.get("confidence")
    branch.blended = (meta_info.get(KEY) or {}).get("mode") == "blend"
    return branch


def _early(exit: str, risk: float | None, scope: str, select: str | Selector) -> dict[str, Any]:
    """The options of early exit for every verification of the fork."""
    if scope not in SCOPES:
        raise OptionError(f"scope: must be one of {', '.join(SCOPES)}, got {scope!r}")
    if exit == "certified" and scope == "selection" and select != "score":
        logger.info("verify_gated: only the selection by score is certified: verification runs at full depth")
        return {"exit": "off"}
    return {"exit": exit, "risk": risk, "scope": scope if exit == "certified" else None}


def _decide(gate: SkipGate, members: list[_Branch], select: str | Selector) -> SkipDecision:
    if isinstance(select, str) and select not in NEEDS_SCORES:
        return SkipDecision(True, None, f"selection by {select} needs no verification")
    return gate.decide(
        [branch.answer if branch.error is None else None for branch in members],
        [branch.confidence if branch.error is None else None for branch in members],
    )


def _certified_gate(members: list[_Branch], question: str, risk: float | None) -> SkipGate | None:
    """The skip rule of the server's profile for this question; None where there is none.

    None with blended branches too: what was certified is of forks on exact KV.
    """
    if any(branch.blended for branch in members):
        logger.info("verify_gated: skipping is not certified for blended branches")
        return None
    alive = next(branch for branch in members if branch.error is None)
    backend = alive.state.stream_executor.backend
    info = backend.rksc_info() if isinstance(backend, BranchEndpoint) else None
    profiles = info["schedulers"][0]["exit"]["profiles"] if info else []
    ids = _prompt_ids(alive, question) if profiles else None
    if ids is None:
        return None
    for profile in profiles:
        if ids[-len(profile["question_ids"]) :] != profile["question_ids"]:
            continue
        bound = DEFAULT_RISK if risk is None else risk
        points = [point for point in profile["skip"] if point["risk"] <= bound]
        if points:
            best = max(points, key=lambda point: point["risk"])
            logger.info(
                "verify_gated: skipping is certified at %g from %g agreement on", best["risk"], best["agreement"]
            )
            return SkipGate(agreement=best["agreement"])
    return None


def _prompt(branch: _Branch, question: str) -> str:
    """The text of a branch's verification."""
    executor = branch.state.stream_executor
    return branch.state.text() + verification_suffix(question, executor.chat_template, branch.state.messages())


def _prompt_ids(branch: _Branch, question: str) -> list[int] | None:
    """Token ids of a branch's verification; None where they are not known on this side."""
    return _endpoint(branch).prompt_ids(_prompt(branch, question))


def _verify(
    members: list[_Branch], question: str, labels: Sequence[str], early: dict[str, Any], *, resolve: bool
) -> None:
    """Ask for each branch that is alive; all in one request, so that they form one batch.

    Args:
        early: the options ``exit``, ``risk`` and ``scope``.
        resolve: whether to ask again, at full depth, for the verdicts that the selection by score hangs on.
    """
    alive = [branch for branch in members if branch.error is None]
    endpoint = _endpoint(alive[0])
    tokens = resolve_labels(labels, endpoint.tokenize)
    _ask_for(alive, question, tokens, early)
    answered = [branch for branch in alive if branch.error is None]
    if resolve and answered:
        unsure = unresolved([_candidate(branch) for branch in answered], [_error_of(branch) for branch in answered])
        again = [answered[place] for place in unsure]
        if again:
            logger.info("verify_gated: %d of %d verdicts are asked for again at full depth", len(again), len(alive))
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


def _error_of(branch: _Branch) -> float:
    """How far the margin of a verdict may be off, in logits; 0 at full depth."""
    return ((branch.report or {}).get("exit") or {}).get("error", 0.0)


def _endpoint(branch: _Branch) -> BranchEndpoint:
    backend = branch.state.stream_executor.backend
    if not isinstance(backend, BranchEndpoint):
        raise UnsupportedBackendError(
            f"verification reads token log-probabilities from an SGLang server, and this branch is on "
            f"{type(backend).__name__}; make the branches with fork_similar on a RuntimeEndpoint, or use "
            f"select='majority', which needs no verification"
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
        messages: the branch's turns so far; without any, the question is plain text.
    """
    if not messages:
        return f"\n\n{question}\n"
    prefix, suffix = template.get_prefix_and_suffix("user", list(messages))
    opening, _ = template.get_prefix_and_suffix("assistant", [*messages, {"role": "user", "content": question}])
    return f"{prefix}{question}{suffix}{opening}"


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
            logger.info("the batch of verifications was refused (%s); asking one by one", error)
    return [_ask_alone(endpoint, body) for body in bodies]


def _ask_alone(endpoint: BranchEndpoint, body: dict[str, Any]) -> Any:
    """One request by itself: an answer, or the server's refusal of just this one."""
    try:
        return endpoint.post_json("/generate", body)
    except ServerRefusedError as error:
        return error


def _take(branch: _Branch, response: dict[str, Any], tokens: LabelTokens) -> None:
    meta_info = response["meta_info"]
    logprobs = label_logprobs(meta_info)
    if not logprobs:
        branch.error = "verification failed: the server returned no log-probabilities of the labels"
        return
    try:
        branch.score = tokens.probabilities(logprobs)[0]
    except LabelError as error:
        branch.error = f"verification failed: {error}"
        return
    branch.new_tokens += meta_info["prompt_tokens"] - meta_info["cached_tokens"]
    branch.prompt_tokens = meta_info["prompt_tokens"]
    branch.cached_tokens = meta_info["cached_tokens"]
    branch.report = meta_info.get("rksc")


def _count_unspent(members: list[_Branch], question: str) -> None:
    """Length of the verification prompts that were not sent, where the ids are known."""
    for branch in members:
        backend = branch.state.stream_executor.backend
        if branch.error is not None or not isinstance(backend, BranchEndpoint):
            continue
        ids = _prompt_ids(branch, question)
        branch.prompt_tokens = branch.cached_tokens = len(ids) if ids is not None else 0


def _candidate(branch: _Branch) -> Candidate:
    return Candidate(branch.index, branch.text, branch.answer, branch.score, branch.confidence)


def _all_failed(members: list[_Branch], branches: ProgramStateGroup) -> Exception:
    """The error of a fork without a usable branch; the server's own where that is what stopped every branch."""
    causes = [state.error() for state in branches.states]
    if causes and all(isinstance(cause, ServerError) for cause in causes):
        return causes[0]
    listed = "; ".join(f"branch {branch.index}: {branch.error}" for branch in members)
    return VerificationError(f"every branch failed: {listed}")


def _verdict(members: list[_Branch], index: int, decision: SkipDecision) -> Verdict:
    return Verdict(
        best=members[index].state,
        index=index,
        scores=[branch.score for branch in members],
        confidences=[branch.confidence for branch in members],
        answers=[branch.answer for branch in members],
        errors=[branch.error for branch in members],
        skipped=decision.skip,
        reason=decision.reason,
        new_tokens=[branch.new_tokens for branch in members],
        tokens_spent=sum(branch.new_tokens for branch in members),
        tokens_saved=sum(branch.cached_tokens for branch in members),
        reports=[branch.report for branch in members],
    )
