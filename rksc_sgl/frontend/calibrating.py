"""The part of a calibration that talks to a server: full-depth traces of a workload, one record a fork."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rksc_sgl.calibration.thresholds import SkipTraces
from rksc_sgl.calibration.trace_store import ForkRecord, TraceStore
from rksc_sgl.calibration.workload import WorkloadFork
from rksc_sgl.frontend.answers import agreement, extract_answer
from rksc_sgl.frontend.endpoint import Endpoint
from rksc_sgl.frontend.labels import LabelTokens
from rksc_sgl.frontend.select import Candidate, by_score
from rksc_sgl.frontend.skip import SkipGate
from rksc_sgl.frontend.tracing import trace, verification_prompt

FORKS_A_BATCH = 8


@dataclass(frozen=True)
class Prompts:
    """Verification prompts of a fork, as token ids."""

    index: int
    fork: WorkloadFork
    ids: tuple[tuple[int, ...], ...]


def prompts_of(endpoint: Endpoint, index: int, fork: WorkloadFork, question: str) -> Prompts:
    """Tokenize the verifications of one fork."""
    ids = (tuple(verification_prompt(endpoint, fork.problem, answer, question)) for answer in fork.answers)
    return Prompts(index, fork, tuple(ids))


def collect(
    endpoint: Endpoint,
    forks: Sequence[Prompts],
    tokens: LabelTokens,
    layers: Sequence[int],
    store: TraceStore,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Trace the forks that the store has not yet, a few at a time; what is done stays done.

    Args:
        progress: called with the number of forks that were finished since the last call.

    Raises:
        ServerError: the server went away; the store keeps what was finished.
    """
    missing = [prompts for prompts in forks if not store.has(prompts.index)]
    progress(len(forks) - len(missing))
    for start in range(0, len(missing), FORKS_A_BATCH):
        batch = missing[start : start + FORKS_A_BATCH]
        # The first of each fork before the others, so that these find the problem's KV in the cache.
        first = trace(endpoint, [one.ids[0] for one in batch], tokens, layers)
        rest = [ids for one in batch for ids in one.ids[1:]]
        others = iter(trace(endpoint, rest, tokens, layers) if rest else ())
        for prompts, head in zip(batch, first, strict=True):
            traces = [head, *(next(others) for _ in prompts.ids[1:])]
            store.put(
                prompts.index,
                ForkRecord(
                    hidden=np.stack([one.hidden for one in traces]),
                    margin=np.array([one.margin for one in traces]),
                    confidence=np.array(prompts.fork.confidences),
                    answers=tuple(extract_answer(answer) or "" for answer in prompts.fork.answers),
                    family=prompts.fork.family,
                ),
            )
        progress(len(batch))


def skip_traces(records: Iterable[ForkRecord]) -> SkipTraces:
    """What the skip gate would have seen of each fork, and whether skipping would have taken another answer."""
    shares, leads, differs = [], [], []
    for record in records:
        answers = [answer or None for answer in record.answers]
        confidences = [float(value) for value in record.confidence]
        found = agreement(answers)
        ranked = sorted(confidences, reverse=True)
        shares.append(found.share if found.leader is not None else 0.0)
        leads.append(ranked[0] - ranked[1] if len(ranked) > 1 else 0.0)
        differs.append(_skipping_differs(answers, confidences, [float(margin) for margin in record.margin]))
    return SkipTraces(np.array(shares), np.array(leads), np.array(differs, dtype=np.bool_))


def _skipping_differs(answers: list[str | None], confidences: list[float], margins: list[float]) -> bool:
    skipped = SkipGate(agreement=1e-9).decide(answers, confidences).index
    if skipped is None:  # no branch has an answer: never skipped
        return False
    scores = (1.0 / (1.0 + np.exp(-margin)) for margin in margins)
    candidates = [
        Candidate(index, "", answer, float(score), confidence)
        for index, (answer, score, confidence) in enumerate(zip(answers, scores, confidences, strict=True))
    ]
    return answers[skipped] != answers[by_score(candidates)]
