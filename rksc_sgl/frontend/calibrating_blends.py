"""The part of a certificate of blends that talks to a server: forks on exact KV, again, and on blended KV.

Each fork is a few prompts that have much in common. On exact KV and on blended KV its branches answer, and the texts of
the exact run are verified in place, on KV of the same kind: so a verdict that changes does so because of the KV and not
because of another text. The exact run is repeated in batches of another shape: a long answer parts after any
disturbance, and what that loses and wins is the control.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rksc_sgl.answers import branch_answer, classes_of
from rksc_sgl.calibration.blend_certificate import RULE, BlendCertificate, BlendSetting, ForkLoss, certified
from rksc_sgl.calibration.fingerprint import Fingerprint
from rksc_sgl.calibration.recorded_lines import Recordings
from rksc_sgl.errors import OptionError, RkscError
from rksc_sgl.frontend.endpoint import Endpoint
from rksc_sgl.frontend.tracing import verification_prompt, verifications
from rksc_sgl.generated.finish import is_truncated
from rksc_sgl.options import KEY
from rksc_sgl.verifying.labels import LabelTokens, label_logprobs, resolve_labels

LEAST_BRANCHES = 2


@dataclass(frozen=True)
class BlendFork:
    """Prompts of one fork.

    Attributes:
        branches: the user's turn of each; the first is what the others share with.
        answer: the right one; None where it is not known.
    """

    branches: tuple[str, ...]
    answer: str | None = None


@dataclass(frozen=True)
class BlendPlan:
    """What is to be recorded and certified.

    Attributes:
        forks: prompts.
        source: what they are, for people.
        settings: to be tried, from the one that computes most on.
        temperatures: of the answers.
        max_tokens: of an answer.
        question: of the verification, labels filled in.
        labels: the affirmative one first.
        risk: of both losses.
        alpha: 1 - confidence.
    """

    forks: Sequence[BlendFork]
    source: str
    settings: Sequence[BlendSetting]
    temperatures: Sequence[float]
    max_tokens: int
    question: str
    labels: tuple[str, ...]
    risk: float
    alpha: float


@dataclass(frozen=True)
class RunSettings:
    """What recorded forks are runs of; a file holds runs of one."""

    fingerprint: dict[str, Any]
    source: str
    settings: list[list[float]]
    temperatures: list[float]
    max_tokens: int
    question: str
    labels: list[str]
    rule: int = 1  # that says what a blend computes; the first files did not name it
    shared_slots: bool = False  # whether blended branches used slots of their donors


@dataclass(frozen=True)
class Arm:
    """The branches of a fork in one run.

    Attributes:
        texts: what they wrote.
        truncated: cut by the token limit.
        taken: tokens of each prompt whose KV was taken over.
        prompts: tokens of each prompt.
        margins: of the verification of each text of the exact run, on the KV of this run; empty for the control.
    """

    texts: list[str]
    truncated: list[bool]
    taken: list[int]
    prompts: list[int]
    margins: list[float]


@dataclass(frozen=True)
class RecordedBlends:
    """A fork in all runs, by temperature.

    Attributes:
        index: of the fork in its plan.
        exact, again: on exact KV.
        blended: with each setting.
    """

    index: int
    exact: list[Arm]
    again: list[Arm]
    blended: list[list[Arm]]

    @classmethod
    def of_plain(cls, index: int, exact: Any, again: Any, blended: Any) -> RecordedBlends:
        """From the fields of a line."""
        arms = [[Arm(**one) for one in run] for run in (exact, again, *blended)]
        return cls(index, arms[0], arms[1], arms[2:])


def forks_from_jsonl(path: Path) -> list[BlendFork]:
    """Forks of a file: ``{"branches": ["...", "..."], "answer": "18"}`` a line, the answer only where it is known.

    Raises:
        OptionError: the file cannot be read, or a line is no such fork; the message names it.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"jsonl: {path} cannot be read: {error}") from error
    found = [_fork_of(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise OptionError(f"jsonl: {path} has no forks")
    known = sum(fork.answer is not None for fork in found)
    if 0 < known < len(found):
        raise OptionError(
            f"jsonl: {path}: answer: {known} of {len(found)} forks have one; a certificate is of forks that all have "
            "one, or of forks that have none"
        )
    return found


def _fork_of(line: str, where: str) -> BlendFork:
    wanted = 'must be {"branches": ["a prompt", "another"], "answer": "18"}, the answer only where it is known'
    try:
        values = json.loads(line)
        branches, answer = values["branches"], values.get("answer")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OptionError(f"jsonl: {where}: {wanted}") from error
    right = isinstance(branches, list) and all(isinstance(one, str) and one.strip() for one in branches)
    if not right or not (answer is None or isinstance(answer, str)) or set(values) - {"branches", "answer"}:
        raise OptionError(f"jsonl: {where}: {wanted}")
    if len(branches) < LEAST_BRANCHES:
        raise OptionError(f"jsonl: {where}: branches: must be at least {LEAST_BRANCHES}, got {len(branches)}")
    return BlendFork(tuple(branches), answer)


def certify_on(
    endpoint: Endpoint, plan: BlendPlan, recordings: Path, *, quiet: bool
) -> tuple[BlendCertificate | None, tuple[Any, ...]]:
    """Record the forks that the file does not have, and certify.

    Args:
        endpoint: of a server with our plugin; its cache is flushed, so nobody else may use it.
        recordings: of an earlier run, to go on from; each fork is appended when it is done.

    Returns:
        The certificate, None where no setting could be certified; and what was tested.

    Raises:
        RkscError: the server has no plugin or does not blend, or the recorded forks cannot be certified.
    """
    facts = _facts(endpoint)
    fingerprint, shared_slots = facts["exit"]["fingerprint"], endpoint.shares_slots()
    run = RunSettings(
        fingerprint,
        plan.source,
        [[one.recompute, one.minimum_span] for one in plan.settings],
        list(plan.temperatures),
        plan.max_tokens,
        plan.question,
        list(plan.labels),
        RULE,
        shared_slots,
    )
    file = Recordings(recordings, RunSettings, RecordedBlends.of_plain, "recorded blends")
    done = {one.index: one for one in file.resume(run)}
    recorder = Recorder(endpoint, plan)
    bar = tqdm(total=len(plan.forks), desc="exact and blended", unit="fork", file=sys.stderr, disable=quiet)
    with file.appending() as append, bar:
        for index, fork in enumerate(plan.forks):
            if index not in done:
                done[index] = recorder.record(index, fork)
                append(done[index])
            bar.update()
    rows = [done[index] for index in range(len(plan.forks))]
    layers = int(facts["exit"]["layers"])
    share = facts["probe_layers"] / layers
    recorded = [
        (setting, {heat: losses(plan, rows, place, number, share) for number, heat in enumerate(plan.temperatures)})
        for place, setting in enumerate(plan.settings)
    ]
    setting, tested = certified(recorded, plan.risk, plan.alpha)
    if setting is None:
        return None, tested
    tokens = [one.tokens for _, by_heat in recorded for found in by_heat.values() for one in found]
    made = BlendCertificate(
        fingerprint=Fingerprint.from_mapping(fingerprint),
        setting=setting,
        risk=plan.risk,
        alpha=plan.alpha,
        least_tokens=min(tokens),
        shared_slots=shared_slots,
        tested=tested,
        workload=plan.source,
    )
    return made, tested


def losses(
    plan: BlendPlan, rows: Sequence[RecordedBlends], setting: int, temperature: int, probe_share: float
) -> list[ForkLoss]:
    """Of the forks in which a setting blended somebody at a temperature."""
    found = []
    for row in rows:
        exact, again = row.exact[temperature], row.again[temperature]
        blended = row.blended[setting][temperature]
        places = [place for place, taken in enumerate(blended.taken) if taken]
        if places:
            found.append(loss_of(plan.forks[row.index].answer, exact, again, blended, places, probe_share))
    return found


def loss_of(
    answer: str | None, exact: Arm, again: Arm, blended: Arm, places: Sequence[int], probe_share: float
) -> ForkLoss:
    """One fork, of whose branches these were blended."""
    names = classes_of([answer, *_answers(exact), *_answers(again), *_answers(blended)])
    right, count = names[0], len(exact.texts)
    arms = [names[1 + start * count : 1 + (start + 1) * count] for start in range(3)]
    of_exact, of_again, of_blended = ([arm[place] for place in places] for arm in arms)

    def lost(others: Sequence[str | None]) -> float:
        pairs = list(zip(of_exact, others, strict=True))
        if answer is None:
            return sum(one != other for one, other in pairs) / len(pairs)
        return sum((one == right) - (other == right) for one, other in pairs) / len(pairs)

    verdicts = [(exact.margins[place] > 0) != (blended.margins[place] > 0) for place in places]
    selected = [arm.margins.index(max(arm.margins)) for arm in (exact, blended)]
    kept = sum(blended.prompts[place] for place in places)
    taken = sum(blended.taken[place] for place in places)
    good = [name == right if answer is not None else name is not None for name in of_exact]
    return ForkLoss(
        lost=lost(of_blended),
        changed=sum(verdicts) / len(verdicts),
        right=sum(good) / len(good),
        graded=answer is not None,
        computed=1.0 - (1.0 - probe_share) * taken / kept,
        tokens=min(blended.prompts[place] for place in places),
        control=lost(of_again),
        same_selection=arms[0][selected[0]] == arms[0][selected[1]],
    )


def _answers(arm: Arm) -> list[str | None]:
    return [branch_answer(text, truncated=cut) for text, cut in zip(arm.texts, arm.truncated, strict=True)]


class Recorder:
    """Runs forks on a server."""

    def __init__(self, endpoint: Endpoint, plan: BlendPlan) -> None:
        self.endpoint, self.plan = endpoint, plan
        self.tokens: LabelTokens = resolve_labels(plan.labels, endpoint.tokenize)
        self._groups = 0

    def record(self, index: int, fork: BlendFork) -> RecordedBlends:
        """A fork in all runs; nothing that was computed in one is there in the next.

        Raises:
            ServerError: the server went away or refused a request.
            RkscError: a run that was to be exact was not.
        """
        prompts = [self._prompt(text) for text in fork.branches]
        exact: list[Arm] = []
        again: list[Arm] = []
        blended: list[list[Arm]] = [[] for _ in self.plan.settings]
        for temperature in self.plan.temperatures:
            first = self._run(fork, prompts, temperature, {"share": "exact"}, None, len(prompts))
            exact.append(first)
            again.append(self._run(fork, prompts, temperature, {"share": "exact"}, [], (len(prompts) + 1) // 2))
            for place, setting in enumerate(self.plan.settings):
                options = {"share": "blend", "recompute": setting.recompute, "minimum_span": setting.minimum_span}
                blended[place].append(self._run(fork, prompts, temperature, options, first.texts, len(prompts)))
        return RecordedBlends(index, exact, again, blended)

    def _prompt(self, text: str) -> list[int]:
        template = self.endpoint.chat_template
        messages = [{"role": "user", "content": text}]
        opening, _ = template.get_prefix_and_suffix("assistant", messages)
        return self.endpoint.tokenize(template.get_prompt(messages) + opening)

    def _run(
        self,
        fork: BlendFork,
        prompts: Sequence[Sequence[int]],
        temperature: float,
        sharing: Mapping[str, Any],
        judged: Sequence[str] | None,
        at_once: int,
    ) -> Arm:
        """One run; of the texts ``judged`` each is verified after its own branch's prompt, its own texts where None."""
        self.endpoint.flush_cache(wait_s=60.0)
        self._groups += 1
        group = f"calibrate blends {self._groups}"
        options = [
            {"group": group, "branch": place, "branches": len(prompts), **sharing} for place in range(len(prompts))
        ]
        self._generate(prompts[:1], options[:1], temperature, 0)  # what the others share with
        answers = []
        for start in range(0, len(prompts), at_once):
            part = slice(start, start + at_once)
            answers += self._generate(prompts[part], options[part], temperature, self.plan.max_tokens)
        metas = [answer["meta_info"] for answer in answers]
        taken = [(meta.get(KEY) or {}).get("taken_tokens") or 0 for meta in metas]
        if sharing["share"] == "exact" and any(taken):
            raise RkscError(f"{self.endpoint.base_url}: a branch that was to be exact was blended")
        texts = [answer["text"] for answer in answers]
        return Arm(
            texts,
            [is_truncated(meta) for meta in metas],
            taken,
            [meta["prompt_tokens"] for meta in metas],
            self._margins(fork, texts if judged is None else judged, group, sharing),
        )

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: Sequence[Mapping[str, Any]],
        temperature: float,
        tokens: int,
    ) -> list[Any]:
        sampling = [
            {"max_new_tokens": tokens, "temperature": temperature, "custom_params": {KEY: dict(one)}} for one in options
        ]
        body = {"input_ids": [list(ids) for ids in prompts], "sampling_params": sampling}
        found: list[Any] = self.endpoint.post_json("/generate", body)
        return found

    def _margins(self, fork: BlendFork, texts: Sequence[str], group: str, sharing: Mapping[str, Any]) -> list[float]:
        """Log-odds of the first label after each text, on the KV that its branch's prompt has now."""
        if not texts:
            return []
        asked = [
            verification_prompt(self.endpoint, problem, text, self.plan.question)
            for problem, text in zip(fork.branches, texts, strict=True)
        ]
        labels = {"yes_ids": list(self.tokens.ids[0]), "no_ids": self.tokens.other_ids}
        options = {"exit": "off", "group": group, **labels, **sharing}
        metas = verifications(self.endpoint, asked, self.tokens, options)
        return [self.tokens.margin(label_logprobs(meta)) for meta in metas]


def _facts(endpoint: Endpoint) -> dict[str, Any]:
    info = endpoint.rksc_info()
    if info is None:
        raise RkscError(f"{endpoint.base_url} runs without the rksc plugin; start it with `rksc serve`")
    facts: dict[str, Any] = info["schedulers"][0]
    if not facts["offers"]["blend"]["offered"]:
        raise RkscError(f"{endpoint.base_url} does not blend: {facts['offers']['blend']['refusal']}")
    if facts["exit"]["fingerprint"] is None:
        raise RkscError(f"{endpoint.base_url}: no fingerprint could be taken of the model; its log says why")
    return facts
