"""Branches with other openings and the same material: no reuse, stock RadixAttention, blends and merges.

Eight branches read the same thousand tokens (``--material`` for more), each after an opening of its own, so that no two
prompts begin alike; in every second one some facts are others (:mod:`benchmarks.divergent_items`). All arms run on
one server with the same attention: without reuse each branch has a cache namespace of its own; stock is SGLang's tree
as it is (``share="exact"``). Caches are flushed before every arm.

Time: the first branch is prefilled, then the seven others in one request, with one question each; the order of the
arms changes from set to set.

Quality: each branch is asked for several facts by prompts that begin alike. The exact run is without reuse, branch by
branch. The KL is of the next token's distribution, the answer's first, to the exact run's; its noise is stock with
branches in one batch. The control is the exact run of *another* branch: what an answer to another prompt would look
like. Recall is over the facts that the exact run answers rightly, so ``fact_recall_exact`` says what batching alone
does. ``donor_answers`` counts the answers that are what the first branch says where the branch itself says otherwise.
``found_by_kind`` counts facts of numbers, names, negations, units and dates.
Stock and merges run in the sets that are timed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest
from tqdm import tqdm

from benchmarks.divergent_items import KINDS, MOST_MATERIAL, OPENINGS, USUAL, Item, branches_of
from rksc_sgl import Endpoint
from rksc_sgl.model_fetch import DEFAULT_MODEL
from rksc_sgl.options import DEFAULT_DEVIATION, DEFAULT_MINIMUM_SPAN, DEFAULT_RECOMPUTE, KEY
from rksc_sgl.proof.divergence import divergence
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess

NONE, STOCK, BLEND, MERGE = "no reuse", "stock", "blend", "merge"
AGAIN = f"{STOCK} again"
BRANCHES = len(OPENINGS)
ANSWER_TOKENS = 8
TOP = 256  # most likely tokens that the KL is taken over; the rest is one outcome


@dataclass(frozen=True)
class Answer:
    """What a prompt got.

    Attributes:
        logprobs: of every generated token, the most likely ones by id.
        text: greedy continuation.
        tokens: its ids.
        report: of the server.
    """

    logprobs: tuple[Mapping[int, float], ...]
    text: str
    tokens: tuple[int, ...]
    report: Mapping[str, Any]

    def says(self, value: str) -> bool:
        """Whether it begins with this value, and with no longer word or number."""
        return re.match(rf"\s*{re.escape(value)}(?!\w)", self.text) is not None


@dataclass(frozen=True)
class Row:
    """One prompt in all arms.

    Attributes:
        item: what was asked.
        first: whether it was the branch's first question.
        exact: without reuse, branch by branch.
        control: the exact answer of another branch.
        arms: answers of the others by arm; not every prompt runs in every arm.
    """

    item: Item
    first: bool
    exact: Answer
    control: Answer
    arms: Mapping[str, Answer]

    @property
    def known(self) -> bool:
        """Whether the exact run answers rightly."""
        return self.exact.says(self.item.answer)

    def finds(self, arm: str) -> bool:
        """Whether an arm answers rightly."""
        return self.arms[arm].says(self.item.answer)

    def tells_donors(self, answer: Answer) -> bool:
        """Whether it answers with what the first branch says, where the branch itself says otherwise."""
        return self.item.changed and answer.says(self.item.donors)


class Arms:
    """Runs a set of branches in the arms.

    Args:
        blends: options of each blending arm by its name.
    """

    def __init__(self, endpoint: Endpoint, blends: Mapping[str, Mapping[str, Any]]) -> None:
        self.endpoint, self.blends = endpoint, blends

    def ask(self, arm: str, name: str, prompts: Sequence[tuple[int, Item]], tokens: int) -> list[Answer]:
        """Some prompts, with the index of their branch, in one request."""
        shared = dict(self.blends.get(arm, {"share": MERGE if arm == MERGE else "exact"}))
        sampling = []
        for index, _ in prompts:
            options = {"group": name, "branch": index, "branches": BRANCHES, **shared}
            sampling.append({"max_new_tokens": tokens, "temperature": 0, "custom_params": {KEY: options}})
        body: dict[str, Any] = {
            "text": [item.prompt for _, item in prompts],
            "sampling_params": sampling,
            "return_logprob": [True] * len(prompts),
            "top_logprobs_num": [TOP] * len(prompts),
        }
        if arm == NONE:
            body["extra_key"] = [f"{name}-{index}" for index, _ in prompts]
        return [_answer(one) for one in self.endpoint.post_json("/generate", body)]

    def timed(self, arm: str, name: str, branches: Sequence[Sequence[Item]]) -> float:
        """Seconds of the prefill of all branches but the first."""
        self.endpoint.flush_cache(wait_s=60.0)
        self.ask(arm, name, [(0, branches[0][0])], 1)
        began = time.perf_counter()
        self.ask(arm, name, [(index, items[0]) for index, items in enumerate(branches) if index], 1)
        return time.perf_counter() - began

    def answered(self, arm: str, name: str, branches: Sequence[Sequence[Item]]) -> list[list[Answer]]:
        """What the branches after the first answer: the first's prompt, then their first questions, then the others."""
        self.endpoint.flush_cache(wait_s=60.0)
        self.ask(arm, name, [(0, branches[0][0])], 1)
        after = list(enumerate(branches))[1:]
        answers = [[one] for one in self.ask(arm, name, [(index, items[0]) for index, items in after], ANSWER_TOKENS)]
        rest = [(index, item) for index, items in after for item in items[1:]]
        found = iter(self.ask(arm, name, rest, ANSWER_TOKENS) if rest else ())
        return [[*own, *(next(found) for _ in items[1:])] for own, (_, items) in zip(answers, after, strict=True)]

    def exact(self, name: str, branches: Sequence[Sequence[Item]]) -> list[list[Answer]]:
        """What the branches after the first answer one by one, without reuse of other branches."""
        self.endpoint.flush_cache(wait_s=60.0)
        answers = []
        for index, items in list(enumerate(branches))[1:]:
            own = self.ask(NONE, name, [(index, items[0])], ANSWER_TOKENS)
            rest = [(index, item) for item in items[1:]]
            answers.append([*own, *(self.ask(NONE, name, rest, ANSWER_TOKENS) if rest else ())])
        return answers


def _answer(response: dict[str, Any]) -> Answer:
    meta = response["meta_info"]
    logprobs = tuple({int(token): float(value) for value, token, *_ in one} for one in meta["output_top_logprobs"])
    return Answer(logprobs, response["text"], tuple(response["output_ids"]), meta.get(KEY) or {})


def time_sets(arms: Arms, sets: int, questions: int, material: int = USUAL) -> dict[str, list[float]]:
    """Seconds of the seven others by arm; the blends are those of the first options."""
    seconds: dict[str, list[float]] = {NONE: [], STOCK: [], next(iter(arms.blends)): [], AGAIN: []}
    for seed in tqdm(range(sets), desc="timed sets", file=sys.stderr):
        branches = branches_of(seed, arms.endpoint.chat_template, questions, material)
        order = list(seconds)
        random.Random(seed).shuffle(order)
        for arm in order:
            seconds[arm].append(arms.timed(STOCK if arm == AGAIN else arm, f"timed {seed} {arm}", branches))
    return seconds


def ask_sets(arms: Arms, sets: int, controlled: int, questions: int, merges: bool, material: int = USUAL) -> list[Row]:
    """What every prompt got; stock and, where it is offered, merging only in the first ``controlled`` sets."""
    rows = []
    for seed in tqdm(range(sets), desc="quality sets", file=sys.stderr):
        branches = branches_of(seed, arms.endpoint.chat_template, questions, material)
        exact = arms.exact(f"set {seed}", branches)
        names = [*arms.blends, *([STOCK, *([MERGE] if merges else [])] if seed < controlled else [])]
        found = {arm: arms.answered(arm, f"set {seed} {arm}", branches) for arm in names}
        for place, items in enumerate(branches[1:]):
            for number, item in enumerate(items):
                others = {arm: answers[place][number] for arm, answers in found.items()}
                control = exact[place - 1][number]  # the first one's is the last branch
                rows.append(Row(item, number == 0, exact[place][number], control, others))
    return rows


def compute_fraction(report: Mapping[str, Any], layers: int) -> float:
    """Token-layers that a blended prefill computed, as a share of the whole."""
    taken, computed = report.get("taken_tokens", 0), report.get("computed_tokens", 0)
    if not taken:
        return 1.0
    return 1.0 - taken * (layers - report["probe_layers"]) / (layers * (taken + computed))


def slots_fraction(report: Mapping[str, Any]) -> float:
    """KV slots that a branch owns, as a share of its prompt."""
    taken, computed = report.get("taken_tokens", 0), report.get("computed_tokens", 0)
    return 1.0 - report.get("shared_slots", 0) / (taken + computed) if taken else 1.0


def found_by(rows: Sequence[Row], arm: str) -> list[bool]:
    """Of the facts known to the exact run that an arm was asked for, whether it finds each."""
    return [row.finds(arm) for row in rows if row.known and arm in row.arms]


def recall(rows: Sequence[Row], arm: str) -> float | None:
    """Share of the facts known to the exact run that an arm finds; None where it was asked for none of them."""
    return _mean(found_by(rows, arm))


def loss_interval(rows: Sequence[Row], arm: str) -> list[float] | None:
    """Exact binomial 95% interval of the share of known facts that an arm loses; None where it was asked for none."""
    found = found_by(rows, arm)
    if not found:
        return None
    interval = binomtest(found.count(False), len(found)).proportion_ci()
    return [round(float(interval.low), 5), round(float(interval.high), 5)]


def by_kind(rows: Sequence[Row], arm: str, kind: str) -> dict[str, int]:
    """Of the facts of a kind: how many the exact run finds, and how many of these the arm finds; changed ones apart."""
    known = [row for row in rows if row.known and row.item.kind == kind and arm in row.arms]
    changed = [row for row in known if row.item.changed]
    return {
        "known": len(known),
        "found": sum(row.finds(arm) for row in known),
        "known_changed": len(changed),
        "found_changed": sum(row.finds(arm) for row in changed),
    }


def donor_answers(rows: Sequence[Row], arm: str) -> int:
    """Answers that are what the donor says, where the branch says otherwise."""
    return sum(row.tells_donors(row.arms[arm]) for row in rows if arm in row.arms)


def parting(exact: Answer, other: Answer) -> tuple[int, float] | None:
    """Where two answers part: the token's index, and by how many nats the exact run preferred its own choice.

    None where they do not. Up to there both read the same, so a small preference says that little parted them.
    """
    for place, (own, others) in enumerate(zip(exact.tokens, other.tokens, strict=False)):
        if own != others:
            lowest = min(exact.logprobs[place].values())
            return place, exact.logprobs[place][own] - exact.logprobs[place].get(others, lowest)
    return None if len(exact.tokens) == len(other.tokens) else (min(len(exact.tokens), len(other.tokens)), 0.0)


def quality(rows: Sequence[Row], arm: str, layers: int) -> dict[str, Any]:
    """How a blending arm compares with the exact run."""
    rows = [row for row in rows if arm in row.arms]
    reports = [row.arms[arm].report for row in rows if row.first]
    divergences = [divergence(row.exact.logprobs[0], row.arms[arm].logprobs[0]) for row in rows]
    partings = [parting(row.exact, row.arms[arm]) for row in rows]
    within = [one for one in partings if one is not None]
    changed, unchanged = _by_change(rows)
    return {
        "compute_fraction": _mean([compute_fraction(report, layers) for report in reports]),
        "kv_slots_per_branch_fraction": _mean([slots_fraction(report) for report in reports]),
        "blended": sum(bool(report.get("taken_tokens")) for report in reports),
        "kl_median": _rounded(_quantile(divergences, 0.5), 6),
        "kl_p95": _rounded(_quantile(divergences, 0.95), 6),
        "greedy_agree": _mean([one is None for one in partings]),
        "parted_in_fact": sum(row.known != row.finds(arm) for row in rows),
        "parted_by_nats": _rounded(_quantile([nats for _, nats in within], 0.5), 3),
        "fact_recall_blend": recall(rows, arm),
        "fact_loss_interval_blend": loss_interval(rows, arm),
        "fact_recall_blend_changed": recall(changed, arm),
        "fact_recall_blend_unchanged": recall(unchanged, arm),
        "donor_answers": donor_answers(rows, arm),
        "found_by_kind": {kind: by_kind(rows, arm, kind) for kind in KINDS},
    }


def summary(
    seconds: Mapping[str, Sequence[float]], rows: Sequence[Row], blends: Sequence[str], layers: int
) -> dict[str, Any]:
    """The last line; figures of blends are those of the first options, and by all where there are more."""
    changed, unchanged = _by_change(rows)
    result = {
        "prefill_ratio_vs_stock": _ratio(seconds.get(STOCK), seconds.get(blends[0])),
        "prefill_ratio_vs_none": _ratio(seconds.get(NONE), seconds.get(blends[0])),
        "noise_ratio": _ratio(*sorted((seconds.get(STOCK, ()), seconds.get(AGAIN, ())), key=sum, reverse=True)),
        "timed_sets": len(seconds.get(STOCK, ())),
        "branches": sum(row.first for row in rows),
        **quality(rows, blends[0], layers),
        **_against_exact(rows),
        "facts_asked": len(rows),
        "facts_known": sum(row.known for row in rows),
        "facts_asked_changed": len(changed),
        "facts_known_changed": sum(row.known for row in changed),
        "facts_known_unchanged": sum(row.known for row in unchanged),
        "fact_recall_exact": recall(rows, STOCK),
        "donor_answers_exact": sum(row.tells_donors(row.exact) for row in changed),
        **_merged(rows),
    }
    if len(blends) > 1:
        result["by_options"] = {arm: quality(rows, arm, layers) for arm in blends}
    return result


def _against_exact(rows: Sequence[Row]) -> dict[str, Any]:
    """What the exact run differs from itself by, and from another branch."""
    again = [(row.exact, row.arms[STOCK]) for row in rows if STOCK in row.arms]
    noise = [divergence(one.logprobs[0], other.logprobs[0]) for one, other in again]
    control = [divergence(row.exact.logprobs[0], row.control.logprobs[0]) for row in rows]
    return {
        "noise_kl": _rounded(_quantile(noise, 0.5), 9),
        "control_kl": _rounded(_quantile(control, 0.5), 4),
        "greedy_agree_exact": _mean([one.tokens == other.tokens for one, other in again]),
    }


def _merged(rows: Sequence[Row]) -> dict[str, Any]:
    """What became of the branches that might merge."""
    rows = [row for row in rows if MERGE in row.arms]
    reports = [row.arms[MERGE].report for row in rows]
    declined = Counter(report.get("declined", "no reason given") for report in reports if report.get("mode") != MERGE)
    return {
        "fact_recall_merge": recall(rows, MERGE),
        "fact_recall_merge_changed": recall(_by_change(rows)[0], MERGE),
        "donor_answers_merge": donor_answers(rows, MERGE) if rows else None,
        "merged": sum(report.get("mode") == MERGE for report in reports) if rows else None,
        "merges_declined": dict(declined.most_common()) if rows else None,
    }


def _by_change(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    return [row for row in rows if row.item.changed], [row for row in rows if not row.item.changed]


def _ratio(one: Sequence[float] | None, other: Sequence[float] | None) -> float | None:
    return round(sum(one) / sum(other), 3) if one and other else None


def _mean(values: Sequence[float]) -> float | None:
    return round(statistics.fmean(values), 4) if values else None


def _quantile(values: Sequence[float], share: float) -> float | None:
    return sorted(values)[int(share * (len(values) - 1))] if values else None


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def show(result: Mapping[str, Any]) -> None:
    table = Table("figure", "value", title="seven branches after the first, other openings")
    for name, value in result.items():
        if name != "by_options":
            table.add_row(name, str(value))
    console = Console(stderr=True)
    console.print(table)
    by_options = result.get("by_options", {})
    if by_options:
        others = Table("figure", *by_options, title="by options")
        for name in next(iter(by_options.values())):
            others.add_row(name, *(str(one[name]) for one in by_options.values()))
        console.print(others)


def blends_of(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The options of each blending arm by its name."""
    fixed = {"share": BLEND, "minimum_span": options.minimum_span, "deviation": options.deviation}
    return {f"{BLEND} {share:g}": {**fixed, "recompute": share} for share in options.recompute}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.divergent_prefix", description=__doc__)
    parser.add_argument("--model-path", dest="model", default=DEFAULT_MODEL)
    parser.add_argument("--sets", type=int, default=2, help="sets that are timed; stock and merges answer in these")
    parser.add_argument("--quality-sets", type=int, default=5, help="sets whose answers are compared")
    parser.add_argument("--questions", type=int, default=3, choices=range(1, 5), help="facts asked of each branch")
    parser.add_argument("--material", type=int, default=USUAL, help="tokens that all branches read, about")
    parser.add_argument("--recompute", type=float, nargs="+", default=[DEFAULT_RECOMPUTE], help="the first is timed")
    parser.add_argument("--deviation", type=float, default=DEFAULT_DEVIATION)
    parser.add_argument("--minimum-span", type=int, default=DEFAULT_MINIMUM_SPAN)
    options = parser.parse_args(arguments)
    if not USUAL <= options.material <= MOST_MATERIAL:
        parser.error(f"--material: must be {USUAL} to {MOST_MATERIAL}, got {options.material}")
    blends = blends_of(options)
    with ServerProcess(server_arguments(["--model-path", options.model])) as server:
        info = server.get_json("/rksc/info")
        arms = Arms(Endpoint(server.url), blends)
        seconds = time_sets(arms, options.sets, options.questions, options.material)
        merges = MERGE in info["share_modes"]
        rows = ask_sets(arms, options.quality_sets, options.sets, options.questions, merges, options.material)
    result = summary(seconds, rows, list(blends), info["schedulers"][0]["exit"]["layers"])
    show(result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
