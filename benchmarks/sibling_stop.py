"""What stopping when the answer is decided saves, and how often the answer is that of all branches.

Records full runs of a server (``--model-path`` starts one, ``--url`` takes a running one) and replays every policy on
them, token by token; without either, replays what ``--recordings`` has. Fewer branches than were recorded are the first
of them. Then, with ``--live``, the policy runs on that server beside stock SGLang (``--stock-url``, or one that is
started: our CPU platform with SGLang's default tree and none of our hooks), whose clients ask for all branches:
tokens, right answers, and problems a minute. Only one of the servers works at a time; stock beside itself is the
noise. ``--synthetic`` needs no model: the bounds in 10,000 streams of each of several sets of answers, the worst ones
among them, and what the policies save for answers of a known share.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.fork_recordings import RecordedFork, Settings, load, record
from benchmarks.overhead import BareServer
from benchmarks.stop_live import compare
from programs.problems import GSM8K, load_problems
from rksc_sgl.cache_directory import cache_directory
from rksc_sgl.calibration.risk_control import clopper_pearson_upper
from rksc_sgl.deciding import EarlyStop, full_vote
from rksc_sgl.deciding.bound import Boundary, boundary, worst_case
from rksc_sgl.deciding.calibration import CalibratedCutoff, calibrate_cutoff
from rksc_sgl.deciding.replay import RecordedBranch, Replayed, replay
from rksc_sgl.deciding.streams import errors_and_looks, sets_of_answers, shuffled
from rksc_sgl.errors import OptionError, RkscError
from rksc_sgl.model_fetch import resolve_model
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess

SIZES = (8, 16, 32)
RISK = 0.01
FLAT = ("certain", 8)  # the policy and number of branches whose figures stand for the run
TRIALS = 10_000
REFUTED = 0.9999  # confidence with which the errors must be more than the risk before a bound is called refuted
SHARES = (1.0, 0.9, 0.75, 0.6)
OTHERS = (0.5, 0.25, 0.125, 0.125)  # of what the leader leaves, to each other answer
MEAN_TOKENS, SPREAD = 280, 0.19  # of a branch: a 1.5B model on GSM8K


@dataclass(frozen=True)
class Played:
    """One fork under one policy.

    Attributes:
        spent: tokens spent.
        total: tokens of all branches.
        same: whether the answer is that of all branches.
        correct: whether the branch that was taken is right.
        correct_full: whether the first branch with the answer of all is right.
    """

    spent: int
    total: int
    same: bool
    steps_ratio: float
    correct: bool
    correct_full: bool


def play(branches: Sequence[RecordedBranch], correct: Sequence[bool], spec: EarlyStop) -> Played:
    """Replay one fork and compare it with the vote of all."""
    found: Replayed = replay(branches, spec)
    answers = [branch.answer for branch in branches]
    winner = full_vote(answers)
    return Played(
        spent=found.record.tokens_spent,
        total=sum(branch.tokens for branch in branches),
        same=found.done.answer == winner,
        steps_ratio=found.steps_ratio,
        correct=found.done.branch is not None and correct[found.done.branch],
        correct_full=winner is not None and correct[answers.index(winner)],
    )


def figures(played: Sequence[Played]) -> dict[str, float]:
    """Of all forks of one policy."""
    same = sum(one.same for one in played)
    return {
        "tokens_fraction": round(sum(one.spent for one in played) / sum(one.total for one in played), 4),
        "answer_same_as_full": round(same / len(played), 4),
        "same_lower95": round(1.0 - clopper_pearson_upper(len(played) - same, len(played)), 4),
        "steps_ratio": round(float(np.mean([one.steps_ratio for one in played])), 3),
        "accuracy_full": round(float(np.mean([one.correct_full for one in played])), 4),
        "accuracy_stop": round(float(np.mean([one.correct for one in played])), 4),
    }


def policies(branches: int, threshold: float | None) -> dict[str, EarlyStop]:
    """What is replayed, by the name under which it is reported."""
    found = {
        "certain": EarlyStop("certain"),
        "certain, all at once": EarlyStop("certain", launch="all"),
        f"probable({RISK:g})": EarlyStop("probable", risk=RISK),
        "window": EarlyStop("window", window=min(5, max(2, branches // 2))),
    }
    if threshold is not None:
        found["confidence"] = EarlyStop("confidence", threshold=threshold)
    return found


def replay_all(forks: Sequence[RecordedFork], sizes: Sequence[int]) -> dict[str, dict[str, dict[str, float]]]:
    """Every policy on every fork, for each number of branches."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for size in sizes:
        given = [(fork.branches(size), fork.correct[:size]) for fork in forks]
        specs = policies(size, _threshold(forks))
        for name, spec in tqdm(specs.items(), desc=f"replay, {size} branches", unit="policy", file=sys.stderr):
            result.setdefault(name, {})[str(size)] = figures([play(*one, spec) for one in given])
        found = calibrated(given)
        if found is not None:
            spec = EarlyStop("probable", risk=RISK, cutoff=found.cutoff, calibrated_for=found.branches)
            result.setdefault(f"calibrated({RISK:g})", {})[str(size)] = figures(
                [play(*one, spec) for one in given[1::2]]
            )
    return result


def calibrated(given: Sequence[tuple[list[RecordedBranch], list[bool]]]) -> CalibratedCutoff | None:
    """A cutoff from every second fork; None where these are too few to certify one."""
    try:
        return calibrate_cutoff([[branch.answer for branch in branches] for branches, _ in given[::2]], RISK)
    except OptionError as error:
        print(f"no calibrated cutoff: {error}", file=sys.stderr)
        return None


def _threshold(forks: Sequence[RecordedFork]) -> float | None:
    """The lowest tenth of the branches' mean log-probabilities; None where these were not recorded."""
    means = [float(np.mean(one)) for fork in forks for one in fork.confidence if one]
    return float(np.quantile(means, 0.1)) if means else None


def leader_share(forks: Sequence[RecordedFork]) -> float:
    """Mean share of the most frequent answer among all branches of a problem."""
    shares = []
    for fork in forks:
        answers = [branch.answer for branch in fork.branches(len(fork.texts))]
        winner = full_vote(answers)
        shares.append(0.0 if winner is None else answers.count(winner) / len(answers))
    return float(np.mean(shares))


def summary(forks: Sequence[RecordedFork], sizes: Sequence[int]) -> dict[str, Any]:
    """The figures of a run."""
    replayed = replay_all(forks, sizes)
    policy, size = FLAT
    flat = replayed[policy].get(str(size)) or replayed[policy][str(sizes[0])]
    return {
        "problems": len(forks),
        "leader_share": round(leader_share(forks), 4),
        "policies": replayed,
        "tokens_fraction": flat["tokens_fraction"],
        "answer_same_as_full": flat["answer_same_as_full"],
    }


# -- synthetic -----------------------------------------------------------------------------------------


def bounds(trials: int, sizes: Sequence[int] = SIZES, risks: Sequence[float] = (0.01, 0.05)) -> list[dict[str, Any]]:
    """For each boundary and set of answers: errors in random orders of these answers, and looks taken."""
    rows = []
    generator = np.random.default_rng(0)
    for size in sizes:
        for risk in risks:
            limit: Boundary = boundary(size, risk)
            worst = worst_case(size, limit.region)[0]
            for name, votes in sets_of_answers(limit).items():
                wrong, looks = errors_and_looks(shuffled(votes, size, trials, generator), limit)
                errors = int(wrong.sum())
                lower = 1.0 - clopper_pearson_upper(trials - errors, trials, REFUTED)
                rows.append(
                    {
                        "branches": size,
                        "risk": risk,
                        "answers": name,
                        "votes": votes,
                        "worst_case": round(worst, 5),
                        "error": float(wrong.mean()),
                        "error_upper95": round(clopper_pearson_upper(errors, trials), 5),
                        "refuted": lower > risk,
                        "branches_looked_at": float(looks.mean()) / size,
                    }
                )
    return rows


def made_up(share: float, branches: int, problems: int, seed: int = 0) -> list[RecordedFork]:
    """Forks whose answers are drawn with this share of the leader, with lengths of a real model's branches."""
    generator = np.random.default_rng(seed)
    probabilities = [share, *((1.0 - share) * np.array(OTHERS))]
    forks = []
    for problem in range(problems):
        answers = generator.choice(len(probabilities), size=branches, p=probabilities)
        tokens = np.maximum(1, generator.normal(MEAN_TOKENS, SPREAD * MEAN_TOKENS, branches)).astype(int)
        forks.append(
            RecordedFork(
                problem=f"made-up-{share:g}-{problem}",
                texts=[f"The answer is {answer}." for answer in answers],
                tokens=tokens.tolist(),
                truncated=[False] * branches,
                correct=[bool(answer == 0) for answer in answers],
                failed=[None] * branches,
                confidence=[[]] * branches,
            )
        )
    return forks


def synthetic(trials: int, problems: int) -> dict[str, Any]:
    """The bounds, and what is saved at known shares."""
    rows = bounds(trials)
    table = Table("N", "risk", "worst case", "answers", "errors", "95% bound", "looked at", box=box.SIMPLE)
    for row in rows:
        numbers = (f"{row[name]:g}" for name in ("branches", "risk", "worst_case"))
        found = (f"{row[name]:g}" for name in ("error", "error_upper95"))
        table.add_row(*numbers, row["answers"], *found, f"{row['branches_looked_at']:.2f}")
    _console().print(table)
    saved: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    mixed: list[RecordedFork] = []
    for share in tqdm(SHARES, desc="shares", file=sys.stderr):
        mixed += made_up(share, max(SIZES), problems)
        saved[f"{share:g}"] = replay_all(mixed[-problems:], SIZES)
        _print(saved[f"{share:g}"], f"leader's share {share:g}")
    np.random.default_rng(0).shuffle(mixed)  # type: ignore[arg-type]
    saved["mixed"] = replay_all(mixed, SIZES)
    _print(saved["mixed"], "all of these together")
    worst = max(rows, key=lambda row: row["error"] / row["risk"])
    return {
        "trials": trials,
        "sets_of_answers": len(rows),
        "worst_cases": {f"{row['branches']}, {row['risk']:g}": row["worst_case"] for row in rows},
        "bounds_hold": not any(row["refuted"] for row in rows),
        "largest_error_over_risk": round(worst["error"] / worst["risk"], 3),
        "shares": saved,
    }


# -- the command ---------------------------------------------------------------------------------------


def _print(replayed: dict[str, dict[str, dict[str, float]]], title: str) -> None:
    columns = ("policy", "N", "tokens", "time", "same answer", "at least (95%)", "right: all", "right")
    table = Table(*columns, title=title, box=box.SIMPLE)
    for name, sizes in replayed.items():
        for size, one in sizes.items():
            table.add_row(
                name,
                size,
                f"{one['tokens_fraction']:.2f}",
                f"{one['steps_ratio']:.1f}",
                f"{one['answer_same_as_full']:.3f}",
                f"{one['same_lower95']:.3f}",
                f"{one['accuracy_full']:.3f}",
                f"{one['accuracy_stop']:.3f}",
            )
    _console().print(table)


def _console() -> Console:
    return Console(file=sys.stderr, width=120)


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        model=options.model_path or _model_of(options.url),
        source=options.source,
        seed=options.seed,
        branches=options.branches,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        confidence=options.confidence,
    )


def _recorded(url: str, options: argparse.Namespace) -> list[RecordedFork]:
    problems = load_problems(options.source, options.problems, options.seed)
    record(url, problems, _settings(options), options.recordings, options.at_once)
    asked = {problem.id for problem in problems}
    return [fork for fork in load(options.recordings)[1] if fork.problem in asked]


def _lived(stock_url: str, url: str, options: argparse.Namespace) -> dict[str, Any]:
    settings = replace(_settings(options), branches=options.live_branches)
    risk = RISK if options.live_policy == "probable" else None
    spec = EarlyStop(options.live_policy, risk=risk)
    problems = load_problems(options.source, options.live, options.seed)
    return compare(stock_url, url, problems, settings, spec, options.live_at_once, options.live_turns)


@contextmanager
def _servers(options: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    """Addresses of ours and of stock SGLang's, the second only where it is needed."""
    if options.url is not None:
        yield options.url, options.stock_url
        return
    arguments = ["--model-path", options.model_path, *options.server]
    print(f"starting a server with {options.model_path} ...", file=sys.stderr, flush=True)
    with ServerProcess(server_arguments(arguments)) as ours:
        if options.live == 0 or options.stock_url is not None:
            yield ours.url, options.stock_url
            return
        print("starting SGLang's own beside it ...", file=sys.stderr, flush=True)
        with BareServer(["--model-path", resolve_model(options.model_path), *options.server]) as stock:
            yield ours.url, stock.url


def _file_of(options: argparse.Namespace) -> Path:
    """Where runs are recorded unless a file is named."""
    name = f"{Path(options.model_path or 'running-server').name}-{options.source}-{options.branches}.jsonl"
    return cache_directory("traces") / "forks" / name.replace(":", "-")


def _model_of(url: str) -> str:
    try:
        return openai.OpenAI(base_url=f"{url.rstrip('/')}/v1", api_key="none", max_retries=0).models.list().data[0].id
    except openai.APIError as error:
        raise RkscError(f"{url}: says of no model ({error})") from error


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.sibling_stop", description=__doc__)
    parser.add_argument("--model-path", help="record with a server of this model, which is started and ended again")
    parser.add_argument("--url", help="record with a running server")
    parser.add_argument("--recordings", type=Path, metavar="F", help="JSON lines; appended to, or only replayed")
    parser.add_argument("--source", default=GSM8K, help="gsm8k, reading or reasoning-gym:TASK[,name=value...]")
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of generated problems")
    parser.add_argument("--branches", type=int, default=32, help="that are recorded of each problem")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--confidence", action="store_true", help="record the log-probability of each token")
    parser.add_argument("--at-once", type=int, default=32, help="requests in flight")
    parser.add_argument("--live", type=int, default=32, metavar="N", help="problems that are solved live; 0 for none")
    parser.add_argument("--live-branches", type=int, default=8)
    parser.add_argument("--live-policy", choices=("certain", "probable"), default="certain")
    parser.add_argument("--live-at-once", type=int, default=16, help="problems under way")
    parser.add_argument("--live-turns", type=int, default=2, help="of each server")
    parser.add_argument("--stock-url", help="a running server of stock SGLang with the same model")
    parser.add_argument("--server", nargs=argparse.REMAINDER, default=[], help="arguments of the servers started; last")
    parser.add_argument("--synthetic", action="store_true", help="no model: known truth")
    parser.add_argument("--trials", type=int, default=TRIALS, help="of each set of answers, with --synthetic")
    parser.add_argument("--made-up", type=int, default=700, help="problems of each share, with --synthetic")
    options = parser.parse_args(arguments)
    if options.synthetic:
        print(json.dumps(synthetic(options.trials, options.made_up)), flush=True)
        return 0
    serves = options.url is not None or options.model_path is not None
    if options.recordings is None and not serves:
        parser.error("--recordings: name a file to be replayed, or a server with --model-path or --url")
    if options.url is not None and options.live and options.stock_url is None:
        parser.error("--stock-url: name a server of stock SGLang to compare with, or say --live 0")
    if min(options.live, options.problems - 1, options.live_turns - 1, options.live_at_once - 1) < 0:
        parser.error("--live: must be 0 or more; --problems, --live-turns and --live-at-once: 1 or more")
    try:
        if serves:
            options.recordings = options.recordings or _file_of(options)
            print(f"recordings: {options.recordings}", file=sys.stderr)
            with _servers(options) as (url, stock_url):
                forks = _recorded(url, options)
                live = _lived(stock_url, url, options) if options.live and stock_url else {}
        else:
            forks, live = load(options.recordings)[1], {}
        if not forks:
            raise OptionError(f"recordings: {options.recordings} has no forks")
        recorded = min(len(fork.texts) for fork in forks)
        result = summary(forks, [size for size in SIZES if size <= recorded] or [recorded]) | live
    except RkscError as error:
        print(f"sibling_stop: {error}", file=sys.stderr)
        return 1
    _print(result["policies"], f"{len(forks)} problems, leader's share {result['leader_share']:.2f}")
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
