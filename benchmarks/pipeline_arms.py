"""The pipeline of a fork on one server: branches generate, each is verified; by plain requests or by our primitives.

:class:`Plain` sends SGLang's own ``/generate`` requests, as a client does that knows nothing of us (or, opted in, one
that names its fork). :class:`Ours` is a program with ``fork_similar`` and ``verify_gated``. Both generate the same
number of tokens in every branch and verify every branch.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sglang as sgl

from benchmarks.pipeline_items import Item
from benchmarks.verify_cost import JUDGE_PROMPT, LABELS
from programs.asking import opened
from rksc_sgl import Endpoint, SkipGate
from rksc_sgl.errors import RkscError
from rksc_sgl.options import KEY
from rksc_sgl.verifying.labels import label_logprobs, resolve_labels
from rksc_sgl.verifying.question import question_with_labels

PREFIX, PREFILL, DECODE, VERIFY = STAGES = ("prefix", "prefill", "decode", "verify")
TEMPERATURE = 0.8
DEPTH, KEEP = 3, 2  # of a tree: levels, and thoughts that are kept at each
STEPS = "Solve it step by step. Write only the next step when you are asked."
GO_ON = "Go on."
QUESTION = question_with_labels(None, LABELS)
UNSHARED = "stock"  # the mode of what did not opt in

Chat = list[dict[str, Any]]


@dataclass
class Ran:
    """One problem in one arm; sums over its branches.

    Attributes:
        seconds: from the first request to the last verdict.
        stages: seconds of each of :data:`STAGES`: the common prefix ahead of the branches, from the branches' first
            request to the first token of the last of them, from there to their end, and verification.
        generated: tokens that the branches generated.
        verified: branches that were verified.
        prompt: tokens of the branches' prompts.
        cached: of these, found in the cache.
        taken: of these, taken over from another branch (a blend).
        judged: prompt tokens that verification computed.
        modes: how the branches shared, by the server's reports.
        waited: branches that waited for the prefill of one of them.
        left_early: verifications that left before the last layer.
        left_out: branches that were stopped, or never started, because their vote was decided.
        answer: of their vote; None without one.
    """

    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    generated: int = 0
    verified: int = 0
    prompt: int = 0
    cached: int = 0
    taken: int = 0
    judged: int = 0
    modes: Counter[str] = field(default_factory=Counter)
    waited: int = 0
    left_early: int = 0
    left_out: int = 0
    answer: str | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of the block as that of a stage."""
        began = time.perf_counter()
        yield
        self.stages[name] += time.perf_counter() - began

    def count_generated(self, metas: Sequence[Mapping[str, Any]], seconds: float) -> None:
        """Add branches that ran side by side and together took so long.

        Raises:
            RkscError: the server does not tell when their first tokens were there.
        """
        if any("first_token_latency" not in meta for meta in metas):
            raise RkscError("the server tells nothing of first tokens: start it with --enable-metrics")
        received = min(meta["request_received_ts"] for meta in metas)
        first_tokens = max(meta["request_received_ts"] + meta["first_token_latency"] for meta in metas) - received
        self.stages[PREFILL] += first_tokens
        self.stages[DECODE] += max(0.0, seconds - first_tokens)
        for meta in metas:
            report = meta.get(KEY) or {}
            self.generated += meta["completion_tokens"]
            self.prompt += meta["prompt_tokens"]
            self.cached += meta["cached_tokens"]
            self.taken += report.get("taken_tokens", 0)
            self.modes[report.get("mode", UNSHARED)] += 1
            self.waited += "waited_passes" in report


class Plain:
    """Plain requests.

    Args:
        endpoint: of the server.
        tokens: of each branch, exactly.
        judge: verify by prompts of their own, which repeat problem and answer; else by a question after the branch's
            own text.
        reuse: whether requests may share KV; else each has a cache namespace of its own.
        names_fork: whether the branches say which fork they are of.
        exits: whether verifications may leave before the last layer, as the server's profile certifies it for verdicts.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        tokens: int,
        *,
        judge: bool,
        reuse: bool = True,
        names_fork: bool = False,
        exits: bool = False,
    ) -> None:
        self.endpoint, self.tokens, self.judge, self.reuse, self.names_fork = endpoint, tokens, judge, reuse, names_fork
        self.exits = exits
        self.labels = resolve_labels(LABELS, endpoint.tokenize)

    def fork(self, item: Item) -> Ran:
        """All branches arrive together; where they are alike, after a request that computes their common prefix."""
        return self._fork(item, prefix=self.reuse and len(set(item.prompts)) == 1)

    def together(self, item: Item) -> Ran:
        """All branches arrive together, and nothing before them."""
        return self._fork(item, prefix=False)

    def tree(self, item: Item) -> Ran:
        """Thoughts of a few tokens, the best of each level taken on."""
        ran, began, name = Ran(), time.perf_counter(), uuid.uuid4().hex
        kept: list[Chat] = [_chat(f"{item.prompts[0]}\n{STEPS}")]
        for _ in range(DEPTH):
            if self.reuse:
                with ran.stage(PREFIX):
                    self._ask([self._text(chat) for chat in kept], name, {"max_new_tokens": 0})
            chats = [chat for chat in kept for _ in range(item.branches // len(kept))]
            thoughts = self._generate(ran, chats, name)
            scores = self._verify(ran, chats, thoughts, name)
            best = sorted(range(len(chats)), key=lambda index: -scores[index])[:KEEP]
            kept = [[*chats[one], _said(thoughts[one]), *_chat(GO_ON)] for one in best]
        ran.seconds = time.perf_counter() - began
        return ran

    def _fork(self, item: Item, *, prefix: bool) -> Ran:
        ran, began, name = Ran(), time.perf_counter(), uuid.uuid4().hex
        chats = [_chat(prompt) for prompt in item.prompts]
        if prefix:
            with ran.stage(PREFIX):
                self._ask([self._text(chats[0])], name, {"max_new_tokens": 0})
        self._verify(ran, chats, self._generate(ran, chats, name), name)
        ran.seconds = time.perf_counter() - began
        return ran

    def _text(self, chat: Chat) -> str:
        return opened(self.endpoint.chat_template, chat)

    def _generate(self, ran: Ran, chats: Sequence[Chat], name: str) -> list[str]:
        began = time.perf_counter()
        sampling = {"max_new_tokens": self.tokens, "min_new_tokens": self.tokens, "temperature": TEMPERATURE}
        replies = self._ask([self._text(chat) for chat in chats], name, sampling)
        ran.count_generated([reply["meta_info"] for reply in replies], time.perf_counter() - began)
        return [reply["text"] for reply in replies]

    def _verify(self, ran: Ran, chats: Sequence[Chat], answers: Sequence[str], name: str) -> list[float]:
        """The score of each answer."""
        with ran.stage(VERIFY):
            ask_of = _judged if self.judge else _asked_in_place
            asked = [self._text(ask_of(*pair)) for pair in zip(chats, answers, strict=True)]
            replies = self._ask(asked, name, {"max_new_tokens": 1, "temperature": 0}, verifies=True)
            metas = [reply["meta_info"] for reply in replies]
            scores = [self.labels.probabilities(label_logprobs(meta))[0] for meta in metas]
        ran.verified += len(scores)
        ran.judged += sum(meta["prompt_tokens"] - meta["cached_tokens"] for meta in metas)
        ran.left_early += sum(_left_early(meta) for meta in metas)
        return scores

    def _ask(
        self, texts: Sequence[str], name: str, sampling: Mapping[str, Any], *, verifies: bool = False
    ) -> list[dict[str, Any]]:
        """Some requests that arrive together, of the fork of that name."""
        own = [dict(sampling) for _ in texts]
        body: dict[str, Any] = {"text": list(texts), "sampling_params": own}
        if self.names_fork or (verifies and self.exits):
            operation = self._verification() if verifies else {}
            for index, one in enumerate(own):
                named = {"group": name, "branch": index, "branches": len(texts)} if self.names_fork else {}
                one["custom_params"] = {KEY: {**named, **operation}}
        if verifies:
            body |= {"return_logprob": [True] * len(texts), "token_ids_logprob": [self.labels.all_ids] * len(texts)}
        if not self.reuse:
            body["extra_key"] = [uuid.uuid4().hex for _ in texts]
        return self.endpoint.post_json("/generate", body)

    def _verification(self) -> dict[str, Any]:
        if not self.exits:
            return {"op": "verify", "exit": "off"}
        labels = {"yes_ids": list(self.labels.ids[0]), "no_ids": self.labels.other_ids}
        return {"op": "verify", "exit": "certified", "scope": "verdict", **labels}


class Ours:
    """Programs with our primitives.

    Args:
        endpoint: of a server with our plugin.
        tokens: of each branch, exactly.
        share: of ``fork_similar``.
    """

    def __init__(self, endpoint: Endpoint, tokens: int, share: str = "auto") -> None:
        self.endpoint, self.tokens, self.share = endpoint, tokens, share

    def fork(self, item: Item) -> Ran:
        """See :meth:`Plain.fork`."""
        return self._run(_forked, item)

    def tree(self, item: Item) -> Ran:
        """See :meth:`Plain.tree`."""
        return self._run(_tree, item)

    def _run(self, program: Any, item: Item) -> Ran:
        ran, began = Ran(), time.perf_counter()
        program.run(item=item, arm=self, ran=ran, backend=self.endpoint)
        ran.seconds = time.perf_counter() - began
        return ran

    def generate(self, groups: Sequence[Any], variable: str, ran: Ran) -> None:
        """All branches of some forks, side by side."""
        began = time.perf_counter()
        written = {"max_tokens": self.tokens, "min_tokens": self.tokens, "temperature": TEMPERATURE}
        for group in groups:
            group += sgl.assistant(sgl.gen(variable, **written))
        states = [state for group in groups for state in group]
        failed = [state.error() for state in states if state.error() is not None]  # waits
        if failed:
            raise RkscError(f"a branch failed, so that arms cannot be compared: {failed[0]}")
        ran.count_generated([state.get_meta_info(variable) for state in states], time.perf_counter() - began)

    def verify(self, group: Any, variable: str, ran: Ran) -> list[tuple[float, Any]]:
        """Score and branch, of each."""
        verdict = sgl.verify_gated(group, variable, skip=SkipGate.never(), select="score", exit="off")
        failed = [error for error in verdict.errors if error is not None]
        if failed:
            raise RkscError(f"a branch failed, so that arms cannot be compared: {failed[0]}")
        ran.verified += len(verdict.scores)
        ran.judged += verdict.tokens_spent
        return list(zip(verdict.scores, group, strict=True))  # type: ignore[arg-type]


@sgl.function
def _forked(s: Any, item: Item, arm: Ours, ran: Ran) -> None:
    alike = len(set(item.prompts)) == 1
    if item.system is not None:
        s += sgl.system(item.system)
    if alike:
        s += sgl.user(item.prompts[0])
    with ran.stage(PREFIX):
        branches = item.branches if alike else [sgl.user(prompt) for prompt in item.prompts]
        group = sgl.fork_similar(s, branches, share=arm.share)
    arm.generate([group], "answer", ran)
    with ran.stage(VERIFY):
        arm.verify(group, "answer", ran)


@sgl.function
def _tree(s: Any, item: Item, arm: Ours, ran: Ran) -> None:
    s += sgl.user(f"{item.prompts[0]}\n{STEPS}")
    kept = [s]
    for depth in range(DEPTH):
        with ran.stage(PREFIX):
            groups = [sgl.fork_similar(state, item.branches // len(kept), share=arm.share) for state in kept]
        arm.generate(groups, f"step_{depth}", ran)
        with ran.stage(VERIFY):
            scored = [pair for group in groups for pair in arm.verify(group, f"step_{depth}", ran)]
        kept = [branch for _, branch in sorted(scored, key=lambda pair: -pair[0])[:KEEP]]
        for branch in kept:
            branch += sgl.user(GO_ON)


def _left_early(meta: Mapping[str, Any]) -> bool:
    """Whether a verification left before the last layer."""
    return bool(((meta.get(KEY) or {}).get("exit") or {}).get("layers_saved"))


def _chat(content: str) -> Chat:
    return [{"role": "user", "content": content}]


def _said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _asked_in_place(chat: Chat, answer: str) -> Chat:
    return [*chat, _said(answer), *_chat(QUESTION)]


def _judged(chat: Chat, answer: str) -> Chat:
    """The judge's prompt: all that was said before the answer, the answer, and the question."""
    before = "\n\n".join(turn["content"] for turn in chat)
    return _chat(JUDGE_PROMPT.format(problem=before, answer=answer))
