"""The part of a calibration that talks to a server: full-depth traces of a workload, and the profile from them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rksc_sgl.answers import agreement, classes_of, extract_answer
from rksc_sgl.cache_directory import cache_directory
from rksc_sgl.calibration.certificate import Certificate, certificate
from rksc_sgl.calibration.fingerprint import Fingerprint
from rksc_sgl.calibration.profile import Profile
from rksc_sgl.calibration.thresholds import SkipOutcomes
from rksc_sgl.calibration.trace_store import ForkRecord, TraceStore, as_traces
from rksc_sgl.calibration.workload import WorkloadFork
from rksc_sgl.errors import RkscError
from rksc_sgl.frontend.endpoint import Endpoint
from rksc_sgl.frontend.tracing import question_ids, trace, verification_prompt
from rksc_sgl.verifying.labels import LabelTokens, resolve_labels
from rksc_sgl.verifying.select import by_score, candidates_of
from rksc_sgl.verifying.skip import SkipGate

FORKS_A_BATCH = 8
LAYERS_SHARE = 0.8  # an exit later than this saves too little to look


@dataclass(frozen=True)
class Plan:
    """What is to be calibrated.

    Attributes:
        question: with the labels filled in.
        labels: the affirmative one first.
        forks: the workload.
        source: what the workload is, for people.
        risks: to certify.
        alpha: 1 - confidence of each certificate.
        seed: of the split.
    """

    question: str
    labels: tuple[str, ...]
    forks: Sequence[WorkloadFork]
    source: str
    risks: tuple[float, ...]
    alpha: float
    seed: int


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


def calibrate_on(endpoint: Endpoint, plan: Plan, directory: Path | None, *, quiet: bool) -> tuple[Profile, Certificate]:
    """Trace what is missing, fit and certify."""
    facts = _server_facts(endpoint)
    fingerprint = Fingerprint.from_mapping(facts["fingerprint"])
    tokens = resolve_labels(plan.labels, endpoint.tokenize)
    bar = {"disable": quiet, "file": sys.stderr, "dynamic_ncols": True}
    prompts: list[Prompts] = []
    for index, fork in enumerate(tqdm(plan.forks, desc="tokenize", unit="fork", **bar)):
        prompts.append(prompts_of(endpoint, index, fork, plan.question))
    asked = question_ids(endpoint, plan.question, [ids for one in prompts for ids in one.ids])
    model_layers = facts["layers"]
    layers = tuple(range(2, int(LAYERS_SHARE * model_layers) + 1, 2)) or (1,)
    store = _store(plan, fingerprint, asked, tokens, layers, directory)
    with tqdm(total=len(prompts), desc="verify at full depth", unit="fork", **bar) as shown:
        collect(endpoint, prompts, tokens, layers, store, shown.update)
    records = [store.get(one.index) for one in prompts]
    traces = as_traces(records, layers, model_layers)
    found = certificate(traces, skip_outcomes(records), plan.risks, plan.alpha, seed=plan.seed)
    profile = Profile(
        fingerprint=fingerprint,
        question_ids=asked,
        yes_ids=tokens.ids[0],
        no_ids=tuple(tokens.other_ids),
        layers=model_layers,
        readouts=found.readouts,
        points=found.points,
        alpha=plan.alpha,
        skip_points=found.skip_points,
        curve=found.curve,
        workload=plan.source,
    )
    return profile, found


def skip_outcomes(records: Iterable[ForkRecord]) -> SkipOutcomes:
    """What the skip gate would have seen of each fork, and whether skipping would have taken another answer."""
    shares, differs = [], []
    for record in records:
        answers = [answer or None for answer in record.answers]
        confidences = [float(value) for value in record.confidence]
        found = agreement(answers)
        shares.append(found.share if found.leader is not None else 0.0)
        differs.append(_skipping_differs(answers, confidences, [float(margin) for margin in record.margin]))
    return SkipOutcomes(np.array(shares), np.array(differs, dtype=np.bool_))


def _skipping_differs(answers: list[str | None], confidences: list[float], margins: list[float]) -> bool:
    skipped = SkipGate(agreement=1e-9).decide(answers, confidences).index
    if skipped is None:  # no branch has an answer: never skipped
        return False
    classes = classes_of(answers)
    return classes[skipped] != classes[by_score(candidates_of(margins, confidences))]


def _server_facts(endpoint: Endpoint) -> dict[str, Any]:
    info = endpoint.rksc_info()
    if info is None:
        raise RkscError(f"{endpoint.base_url} runs without the rksc plugin; start it with `rksc serve --rksc-trace`")
    exits: dict[str, Any] = info["schedulers"][0]["exit"]
    if not exits["trace"]:
        raise RkscError(f"{endpoint.base_url} gives no traces; start it with `rksc serve --rksc-trace`")
    if exits["fingerprint"] is None:
        raise RkscError(f"{endpoint.base_url}: no fingerprint could be taken of the model; its log says why")
    return exits


def _store(
    plan: Plan,
    fingerprint: Fingerprint,
    asked: tuple[int, ...],
    tokens: LabelTokens,
    layers: tuple[int, ...],
    directory: Path | None,
) -> TraceStore:
    content = digest(json.dumps([asdict(fork) for fork in plan.forks], sort_keys=True).encode())
    description = {
        "fingerprint": asdict(fingerprint),
        "question_ids": list(asked),
        "label_ids": [list(ids) for ids in tokens.ids],
        "layers": list(layers),
        "workload": content,
    }
    name = digest(json.dumps(description, sort_keys=True).encode())
    return TraceStore(directory or cache_directory("traces") / name, description)


def digest(data: bytes) -> str:
    """A short name for a content."""
    return hashlib.sha256(data).hexdigest()[:16]
