"""Prefill of branches with other openings and the same material: no reuse, stock RadixAttention, blends.

Eight branches read the same thousand tokens of made-up facts, each after an opening of its own, so that no two prompts
begin alike; in half of them some of the numbers are others. Each is asked for one of its facts. The first branch is
prefilled, then the seven others in one request. All arms run on one server with the same attention: without reuse each
request has a cache namespace of its own; stock is SGLang's tree as it is (``share="exact"``). Caches are flushed before
every arm and the order alternates.

The KL is of the next token's distribution to the exact run's; its noise is the exact run against itself, branches in
one batch against one by one. The control is the exact run of *another* branch of the same set: what an answer to
another prompt would look like. Facts are counted over the questions that the exact run answers rightly when its
branches are run one by one, so ``fact_recall_exact`` says what batching alone does.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from rksc_sgl import Endpoint
from rksc_sgl.cli.serve import server_arguments
from rksc_sgl.model_fetch import DEFAULT_MODEL
from rksc_sgl.options import KEY
from rksc_sgl.proof.divergence import divergence
from rksc_sgl.server_process import ServerProcess

NONE, STOCK, BLEND = "no reuse", "stock", "blend"
BRANCHES = 8
FACTS = 44
CHANGED = 4  # facts of every second branch that are others than the first branch's; one of them is asked for
ANSWER_TOKENS = 8
TOP = 256  # most likely tokens that the KL is taken over; the rest is one outcome
OPENINGS = (
    "Read the notes below with care, then answer the question about them.",
    "You are given the inventory of a company. Use nothing else to answer what is asked at the end.",
    "Below is what an auditor wrote down last spring. Someone wants to know one number from it.",
    "These lines come from a warehouse log. Look up what is asked after them and reply briefly.",
    "A clerk has copied the following list by hand. Please find the entry that the question is about.",
    "Here is a long report. It is not in any order. At its end there is a question on one of its lines.",
    "Consider the records that follow; they are complete and correct. Then give the number that is asked for.",
    "The text after this sentence holds everything that you need. Do not guess, look it up, and answer.",
)
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey", "pink", "silver", "golden")
OBJECTS = (
    *("lamp", "chair", "table", "clock", "kettle", "ladder", "mirror", "carpet", "bucket", "basket", "blanket"),
    *("bottle", "candle", "curtain", "drawer", "hammer", "helmet", "jacket", "kennel", "lantern", "mattress"),
    *("needle", "pillow", "piano", "pitcher", "ribbon", "saddle", "scarf", "shovel", "sofa", "spoon", "statue"),
    *("suitcase", "teapot", "tent", "trumpet", "umbrella", "vase", "violin", "wagon", "wallet", "wardrobe", "whistle"),
    *("wheel",),
)
LINE = "The {name} has the number {number} and stands in row {row} of the hall. "


@dataclass(frozen=True)
class Branch:
    """One prompt and the number that answers it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Answer:
    """What a branch got.

    Attributes:
        logprobs: of the next token, the most likely ones.
        text: greedy continuation.
        tokens: its ids.
        report: of the server.
    """

    logprobs: dict[int, float]
    text: str
    tokens: tuple[int, ...]
    report: dict[str, Any]


def branches_of(seed: int, template: Any) -> list[Branch]:
    """A set: the same facts after eight openings; every second branch has some other numbers, and is asked for one."""
    source = random.Random(seed)
    names = [f"{source.choice(COLOURS)} {thing}" for thing in source.sample(OBJECTS, FACTS)]
    numbers, rows = [source.randint(100, 999) for _ in names], [source.randint(1, 40) for _ in names]
    result = []
    for index, opening in enumerate(OPENINGS):
        own = list(numbers)
        changed = source.sample(range(FACTS), CHANGED) if index % 2 else []
        for fact in changed:
            own[fact] = source.randint(100, 999)
        asked = source.choice(changed) if changed else source.randrange(FACTS)
        lines = [LINE.format(name=name, number=n, row=row) for name, n, row in zip(names, own, rows, strict=True)]
        question = f"Which number does the {names[asked]} have?"
        messages = [
            {"role": "user", "content": f"{opening}\n\n{''.join(lines)}\n\n{question}"},
            {"role": "assistant", "content": None},
        ]
        start = f"The {names[asked]} has the number "  # digits are tokens: the next one tells answers apart
        result.append(Branch(template.get_prompt(messages) + start, str(own[asked])))
    return result


class Arms:
    """Runs a set of branches in the arms."""

    def __init__(self, endpoint: Endpoint, options: dict[str, Any]) -> None:
        self.endpoint, self.options = endpoint, options

    def ask(self, arm: str, name: str, branches: Sequence[Branch], first: int, tokens: int) -> list[Answer]:
        """Some branches of a set in one request; ``first`` is the index of the first of them."""
        sampling = []
        for index in range(first, first + len(branches)):
            options = {"group": name, "branch": index, "branches": BRANCHES}
            options |= {"share": "exact"} if arm != BLEND else {"share": "blend", **self.options}
            sampling.append({"max_new_tokens": tokens, "temperature": 0, "custom_params": {KEY: options}})
        body: dict[str, Any] = {
            "text": [branch.prompt for branch in branches],
            "sampling_params": sampling,
            "return_logprob": [True] * len(branches),
            "top_logprobs_num": [TOP] * len(branches),
        }
        if arm == NONE:
            body["extra_key"] = [f"{name}-{index}" for index in range(first, first + len(branches))]
        return [_answer(one) for one in self.endpoint.post_json("/generate", body)]

    def timed(self, arm: str, name: str, branches: Sequence[Branch]) -> tuple[float, float]:
        """Seconds of the first branch's prefill, and of the others'."""
        self.endpoint.flush_cache()
        began = time.perf_counter()
        self.ask(arm, name, branches[:1], 0, 1)
        between = time.perf_counter()
        self.ask(arm, name, branches[1:], 1, 1)
        return between - began, time.perf_counter() - between

    def answered(self, arm: str, name: str, branches: Sequence[Branch]) -> list[Answer]:
        """What each branch answers."""
        self.endpoint.flush_cache()
        first = self.ask(arm, name, branches[:1], 0, ANSWER_TOKENS)
        return [*first, *self.ask(arm, name, branches[1:], 1, ANSWER_TOKENS)]

    def alone(self, name: str, branches: Sequence[Branch]) -> list[Answer]:
        """The same, one by one, without reuse."""
        self.endpoint.flush_cache()
        return [self.ask(NONE, f"{name} alone", [one], index, ANSWER_TOKENS)[0] for index, one in enumerate(branches)]


def _answer(response: dict[str, Any]) -> Answer:
    meta = response["meta_info"]
    logprobs = {int(token): float(value) for value, token, *_ in meta["output_top_logprobs"][0]}
    return Answer(logprobs, response["text"], tuple(response["output_ids"]), meta.get(KEY) or {})


def measure(endpoint: Endpoint, options: argparse.Namespace) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """Seconds of the seven others by arm, and for every branch what came of it."""
    arms = Arms(endpoint, {"recompute": options.recompute} if options.recompute is not None else {})
    seconds: dict[str, list[float]] = {NONE: [], STOCK: [], BLEND: [], f"{STOCK} again": []}
    rows: list[dict[str, Any]] = []
    for seed in tqdm(range(options.sets), desc="sets", file=sys.stderr):
        branches = branches_of(seed, endpoint.chat_template)
        order = list(seconds)
        random.Random(seed).shuffle(order)
        for arm in order:
            seconds[arm].append(arms.timed(arm.removesuffix(" again"), f"set {seed} {arm}", branches)[1])
        alone = arms.alone(f"set {seed}", branches)
        exact = arms.answered(STOCK, f"set {seed} exact", branches)
        blend = arms.answered(BLEND, f"set {seed} quality", branches)
        for index in range(1, BRANCHES):
            rows.append(
                {
                    "kl": divergence(alone[index].logprobs, blend[index].logprobs),
                    "noise": divergence(alone[index].logprobs, exact[index].logprobs),
                    "control": divergence(alone[index].logprobs, alone[index - 1].logprobs),
                    "agree": alone[index].tokens == blend[index].tokens,
                    "agree_exact": alone[index].tokens == exact[index].tokens,
                    "known": branches[index].answer in alone[index].text,
                    "exact": branches[index].answer in exact[index].text,
                    "blend": branches[index].answer in blend[index].text,
                    "changed": index % 2 == 1,
                    "report": blend[index].report,
                }
            )
    return seconds, rows


def compute_fraction(report: dict[str, Any], layers: int) -> float:
    """Token-layers that a blended prefill computed, as a share of the whole."""
    taken, computed = report.get("taken_tokens", 0), report.get("computed_tokens", 0)
    if not taken:
        return 1.0
    return 1.0 - taken * (layers - report["probe_layers"]) / (layers * (taken + computed))


def recall(rows: Sequence[dict[str, Any]], arm: str) -> float | None:
    """Share of the facts known to the exact run, one by one, that an arm finds."""
    known = [row for row in rows if row["known"]]
    return round(statistics.fmean(row[arm] for row in known), 4) if known else None


def summary(seconds: dict[str, list[float]], rows: Sequence[dict[str, Any]], layers: int) -> dict[str, Any]:
    """The last line."""
    total = {arm: sum(values) for arm, values in seconds.items()}
    divergences = sorted(row["kl"] for row in rows)
    noise = (total[STOCK], total[f"{STOCK} again"])
    return {
        "prefill_ratio_vs_stock": round(total[STOCK] / total[BLEND], 3),
        "prefill_ratio_vs_none": round(total[NONE] / total[BLEND], 3),
        "noise_ratio": round(max(noise) / min(noise), 3),
        "compute_fraction": round(statistics.fmean(compute_fraction(row["report"], layers) for row in rows), 4),
        "blended": sum(row["report"].get("mode") == "blend" for row in rows),
        "branches": len(rows),
        "kl_median": round(statistics.median(divergences), 6),
        "kl_p95": round(divergences[int(0.95 * (len(divergences) - 1))], 6),
        "noise_kl": round(statistics.median(row["noise"] for row in rows), 9),
        "control_kl": round(statistics.median(row["control"] for row in rows), 4),
        "greedy_agree": round(statistics.fmean(row["agree"] for row in rows), 4),
        "greedy_agree_exact": round(statistics.fmean(row["agree_exact"] for row in rows), 4),
        "facts_known": sum(row["known"] for row in rows),
        "fact_recall_exact": recall(rows, "exact"),
        "fact_recall_blend": recall(rows, "blend"),
        "fact_recall_blend_changed": recall([row for row in rows if row["changed"]], "blend"),
        "fact_recall_merge": None,
    }


def show(result: dict[str, Any]) -> None:
    table = Table("figure", "value", title="seven branches after the first, other openings")
    for name, value in result.items():
        table.add_row(name, str(value))
    Console(stderr=True).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.divergent_prefix", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--sets", type=int, default=12)
    parser.add_argument("--recompute", type=float, help="default: the server's")
    options = parser.parse_args(arguments)
    with ServerProcess(server_arguments(["--model-path", options.model])) as server:
        layers = server.get_json("/rksc/info")["schedulers"][0]["exit"]["layers"]
        seconds, rows = measure(Endpoint(server.url), options)
    result = summary(seconds, rows, layers)
    show(result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
