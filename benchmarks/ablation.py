"""What each mechanism is worth in the pipelines: the time without it over the time with all of them.

Pipelines are those of ``benchmarks.pipeline``: branches generate, each is verified. Every problem runs with everything,
with everything again, which is the noise, and without one mechanism at a time, on one server, in an order that changes
from problem to problem, caches flushed before each; the first problem of each kind runs once ahead of them, uncounted,
to warm up. No fork has room for all mechanisms, so each is left out where it applies:

* together (equal prompts that arrive together, by plain requests that name their fork), without

  * siblings_wait: waiting for one prefill. Requests do not name their fork, and all compute their prompts;
  * in_place: verification after the branch's own text. A judge's prompt repeats problem and answer instead, and the
    certified exit goes with it: its certificate is of the question in place;
  * certified_exit: verifications that leave before the last layer, certified for verdicts. All run to the last layer;

* divergent (each branch begins with an opening of its own and reads the same material), without

  * blends, which approximate: ``share="exact"`` in place of ``share="blend"``;

* reworded (each branch begins with another instruction that does not change what is asked), without

  * merges: ``share="exact"`` in place of ``share="merge"``;

* votes (what a user gets who asks for nothing: short answers, ``early_stop="certain"``), without

  * skip: verification only where votes do not decide. All branches that ended are verified;
  * stop: branches are not started, or are ended, once the vote is decided. All run.

In the first three, branches of all arms generate equally many tokens and all are verified (``equal_tokens``); divergent
and reworded ones verify at full depth. In votes tokens differ, as stopping is about that, and so do samples:
``same_answer`` is how often the vote has the answer that it has with everything, ``same_answer_noise`` how often
everything has that of its own other run.

Ratios are medians over problems, above 1 where the mechanism saves time, with 95% intervals by bootstrap. By what the
server and the programs report, a mechanism must have been at work with everything, and not without it: else this ends
with an error. What cannot be measured is named with the reason (``not_measured``): the exit where the server has no
profile, blends and merges where it does not offer them. Attention of the CPU platform that reads a common prefix once
is not among them: no option switches it off by itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.fork_recordings import Settings
from benchmarks.overhead import median_ratio
from benchmarks.pipeline import Cell, one_by_one
from benchmarks.pipeline_arms import Ours, Plain, Ran
from benchmarks.pipeline_defaults import CERTAIN, SPECS, TEMPERATURE, equal_answers, vote
from benchmarks.pipeline_items import ALL, items, reworded
from programs.problems import READING, Problem, load_problems
from rksc_sgl import EarlyStop, Endpoint, SkipGate
from rksc_sgl.errors import RkscError
from rksc_sgl.model_fetch import DEFAULT_MODEL
from rksc_sgl.server_arguments import server_arguments, take_switches
from rksc_sgl.server_process import ServerProcess

EVERYTHING, AGAIN = "everything", "everything again"
TOGETHER, DIVERGENT, REWORDED, VOTES = KINDS = ("together", "divergent", "reworded", "votes")
SIBLINGS, IN_PLACE, EXIT = "siblings_wait", "in_place", "certified_exit"
BLENDS, MERGES, SKIP, STOP = "blends", "merges", "skip", "stop"


@dataclass(frozen=True)
class Mechanism:
    """What can be left out.

    Attributes:
        kind: of forks, in which it applies.
        without: what is done in its place.
        at_work: how much it did in a run; 0 or less where it did nothing.
    """

    kind: str
    without: str
    at_work: Callable[[Ran], int]


MECHANISMS = {
    SIBLINGS: Mechanism(TOGETHER, "every branch computes its prompt", lambda ran: ran.waited),
    BLENDS: Mechanism(DIVERGENT, "identical prefixes only", lambda ran: ran.taken),
    MERGES: Mechanism(REWORDED, "identical prefixes only", lambda ran: ran.modes["merge"]),
    IN_PLACE: Mechanism(TOGETHER, "a judge's prompt", lambda ran: -ran.judged),
    SKIP: Mechanism(VOTES, "every branch that ended is verified", lambda ran: int(ran.verified == 0)),
    EXIT: Mechanism(TOGETHER, "every verification runs all layers", lambda ran: ran.left_early),
    STOP: Mechanism(VOTES, "all branches run", lambda ran: ran.left_out),
}


class Pipelines:
    """The arms of each kind on one server.

    Args:
        endpoint: of the server.
        options: of the command line.
        exits: whether verifications may leave early.
    """

    def __init__(self, endpoint: Endpoint, options: argparse.Namespace, *, exits: bool) -> None:
        self.endpoint, self.options, self.exits = endpoint, options, exits

    def measure(self, kind: str, names: Sequence[str]) -> Cell:
        """Every problem with everything, twice, and without each of these mechanisms."""
        options = self.options
        cell = Cell(kind, options.branches, options.material)
        made = self._votes() if kind == VOTES else self._forks(kind)
        arms = {arm: (self.endpoint, made[arm]) for arm in (EVERYTHING, *names)}
        arms[AGAIN] = arms[EVERYTHING]
        given = self._given(kind)
        made[EVERYTHING](given[0])  # warms up
        said = f"{kind}, {options.branches} branches, without {', '.join(names)}"
        with tqdm(total=len(arms) * len(given), desc=said, file=sys.stderr) as bar:
            one_by_one(arms, given, cell, bar.update)
        return cell

    def _given(self, kind: str) -> Sequence[Any]:
        """The problems of a kind of forks."""
        options = self.options
        if kind == VOTES:
            return load_problems(READING, options.problems, options.seed)
        sizes = (options.problems, options.branches, options.material)
        tokens_of = lambda text: len(self.endpoint.tokenize(text))  # noqa: E731
        if kind == REWORDED:
            return reworded(*sizes, tokens_of, seed=options.seed)
        return items(*sizes, tokens_of, openings=kind == DIVERGENT, seed=options.seed)

    def _forks(self, kind: str) -> dict[str, Callable[[Any], Ran]]:
        tokens = self.options.tokens
        if kind == TOGETHER:
            found = {
                EVERYTHING: Plain(self.endpoint, tokens, judge=False, names_fork=True, exits=self.exits),
                SIBLINGS: Plain(self.endpoint, tokens, judge=False, exits=self.exits),
                IN_PLACE: Plain(self.endpoint, tokens, judge=True, names_fork=True),
                EXIT: Plain(self.endpoint, tokens, judge=False, names_fork=True),
            }
            return {name: arm.together for name, arm in found.items()}
        share, name = ("blend", BLENDS) if kind == DIVERGENT else ("merge", MERGES)
        return {
            EVERYTHING: Ours(self.endpoint, tokens, share).fork,
            name: Ours(self.endpoint, tokens, "exact").fork,
        }

    def _votes(self) -> dict[str, Callable[[Any], Ran]]:
        certain = SPECS[CERTAIN]
        return {
            EVERYTHING: lambda problem: self._voted(problem, certain, None),
            SKIP: lambda problem: self._voted(problem, certain, SkipGate.never()),
            STOP: lambda problem: self._voted(problem, None, None),
        }

    def _voted(self, problem: Problem, spec: EarlyStop | None, skip: SkipGate | None) -> Ran:
        settings = Settings("", "", 0, self.options.branches, self.options.answer_tokens, TEMPERATURE, confidence=False)
        began = time.perf_counter()
        voted = vote(self.endpoint, problem, settings, spec, skip)
        return Ran(
            seconds=time.perf_counter() - began,
            generated=voted.solved.tokens,
            verified=voted.verified,
            left_out=voted.left_out,
            answer=voted.solved.answer,
        )


def not_offered(scheduler: Mapping[str, Any], model: str) -> dict[str, str]:
    """The mechanisms that a server does not have, and why.

    Args:
        scheduler: what ``GET /rksc/info`` tells of it.
        model: for the message.
    """
    offers = scheduler["offers"]
    capabilities = {SIBLINGS: "exact", BLENDS: "blend", MERGES: "merge", EXIT: "exit"}
    refused = {name: offers[one]["refusal"] for name, one in capabilities.items() if not offers[one]["offered"]}
    if not any(profile["risks"]["verdict"] for profile in scheduler["exit"]["profiles"]):
        refused.setdefault(EXIT, f"no profile fits {model}; make one: rksc calibrate --model-path {model}")
    return refused


def measure(endpoint: Endpoint, options: argparse.Namespace) -> tuple[list[Cell], dict[str, str]]:
    """The kinds with what was left out in each, and what was not measured.

    Raises:
        RkscError: a mechanism was not at work, or could not be left out; or the server has no plugin.
    """
    info = endpoint.rksc_info()
    if info is None or not all(info["schedulers"]):
        raise RkscError(f"the server at {endpoint.base_url} has none of these mechanisms: start it with rksc serve")
    refused = not_offered(info["schedulers"][0], options.model_path)
    pipelines = Pipelines(endpoint, options, exits=EXIT not in refused)
    cells = []
    for kind in KINDS:
        names = [name for name in options.mechanisms if MECHANISMS[name].kind == kind and name not in refused]
        if names:
            cells.append(pipelines.measure(kind, names))
            for name in names:
                check(name, cells[-1])
    unasked = dict.fromkeys((name for name in MECHANISMS if name not in options.mechanisms), "not asked for")
    return cells, {**refused, **unasked}


def check(name: str, cell: Cell) -> None:
    """
    Raises:
        RkscError: a mechanism did not do more with everything than without it, or went on without it.
    """
    at_work = MECHANISMS[name].at_work
    everything, without = (sum(map(at_work, cell.runs[arm])) for arm in (EVERYTHING, name))
    if without > 0:
        raise RkscError(f"{name}: it was at work in the runs without it too, so that they say nothing of it")
    if everything <= without:
        raise RkscError(f"{name}: it was never at work ({cell.kind}), so that nothing can be said of it")


def figures(name: str, cell: Cell) -> dict[str, Any]:
    """What leaving out one mechanism changes."""
    ratio, *interval = cell.ratio(name, EVERYTHING)
    noise, *noise_interval = cell.ratio(AGAIN, EVERYTHING)
    result = {
        "kind": cell.kind,
        "replaced_by": MECHANISMS[name].without,
        "ratio": ratio,
        "interval": interval,
        "noise": noise,
        "noise_interval": noise_interval,
    }
    if cell.kind == VOTES:
        same = {"same_answer": same_answer(cell, name), "same_answer_noise": same_answer(cell, AGAIN)}
        return {**result, **same}
    return {**result, "equal_tokens": equal_tokens(cell, name)}


def equal_tokens(cell: Cell, name: str) -> bool:
    """Whether an arm generated as much and verified as many branches as everything, problem by problem."""
    return Cell(
        cell.kind, cell.branches, cell.material, {one: cell.runs[one] for one in (EVERYTHING, name)}
    ).equal_tokens


def same_answer(cell: Cell, arm: str) -> float:
    """Share of the problems whose vote has the answer that it has with everything."""
    pairs = zip(cell.runs[EVERYTHING], cell.runs[arm], strict=True)
    same = [equal_answers(one.answer, other.answer) for one, other in pairs]
    return round(sum(same) / len(same), 4)


def summary(cells: Sequence[Cell], not_measured: Mapping[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """The last line."""
    found = {name: figures(name, cell) for cell in cells for name in cell.runs if name in MECHANISMS}
    again, everything = ([ran.seconds for cell in cells for ran in cell.runs[arm]] for arm in (AGAIN, EVERYTHING))
    return {
        "without": {name: found[name] for name in MECHANISMS if name in found},
        "noise": median_ratio(again, everything)[0] if again else None,
        "not_measured": dict(not_measured),
        "equal_tokens": all(one.get("equal_tokens", True) for one in found.values()),
        "model": options.model_path,
        "problems": options.problems,
        "branches": options.branches,
        "material": options.material,
        "tokens": options.tokens,
        "seed": options.seed,
    }


def show(result: Mapping[str, Any]) -> None:
    """A table for people."""
    table = Table("without", "instead", "times as long", "95%", "everything again", "95%", "same", title="ablation")
    for name, one in result["without"].items():
        if "same_answer" in one:
            same = f"answers {one['same_answer']:.0%}, again {one['same_answer_noise']:.0%}"
        else:
            same = "tokens" if one["equal_tokens"] else "NOT EVEN TOKENS"
        spans = [f"{low:.2f} to {high:.2f}" for low, high in (one["interval"], one["noise_interval"])]
        table.add_row(name, one["replaced_by"], f"{one['ratio']:.2f}", spans[0], f"{one['noise']:.2f}", spans[1], same)
    for name, why in result["not_measured"].items():
        table.add_row(name, f"not measured: {why}")
    Console(stderr=True, width=132).print(table)


@contextmanager
def _served(options: argparse.Namespace) -> Iterator[Endpoint]:
    if options.url is not None:
        yield Endpoint(options.url)
        return
    # without metrics no server tells when first tokens were there
    flags, variables = take_switches(["--model-path", options.model_path, "--enable-metrics", *options.server])
    print(f"starting a server with {options.model_path} ...", file=sys.stderr, flush=True)
    with ServerProcess(server_arguments(flags), variables=variables) as server:
        yield Endpoint(server.url)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", default=DEFAULT_MODEL)
    parser.add_argument("--url", help="a running server of ours with --enable-metrics, instead of one")
    parser.add_argument(
        "--mechanisms", nargs="+", choices=MECHANISMS, default=list(MECHANISMS), metavar="NAME", help="some of them"
    )
    parser.add_argument("--problems", type=int, default=10, help="of each kind of forks")
    parser.add_argument("--branches", type=int, default=8)
    parser.add_argument("--material", type=int, default=1024, help="tokens of worked problems before each, about")
    parser.add_argument("--tokens", type=int, default=32, help="that every branch generates, but for votes")
    parser.add_argument("--answer-tokens", type=int, default=32, help="of each branch at most, in votes")
    parser.add_argument("--seed", type=int, default=0, help="of the worked problems, and of those of votes")
    parser.add_argument(
        "--quick", action="store_true", help="a first look, in minutes: few problems, less material and fewer tokens"
    )
    parser.add_argument("--server", nargs=argparse.REMAINDER, default=[], help="arguments of the server started; last")
    options = parser.parse_args(arguments)
    if options.quick:
        options.problems, options.material, options.tokens = 3, 384, 16
    if min(options.problems, options.tokens, options.answer_tokens) < 1 or options.branches < 2:
        parser.error("--problems, --tokens, --answer-tokens: must be 1 or more, --branches 2 or more")
    if options.problems > ALL // 2:
        parser.error(f"--problems: must be at most {ALL // 2}; the other items are worked ones")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    try:
        with _served(options) as endpoint:
            cells, not_measured = measure(endpoint, options)
    except RkscError as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 1
    result = summary(cells, not_measured, options)
    show(result)
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
