"""Whole pipelines of multi-branch reasoning, on a real engine: fork, generate, verify every branch, select.

Arms, all with the same model, platform and attention:

* none: no request shares KV with another; each branch is judged by a prompt that repeats problem and answer;
* stock: SGLang's default tree (a server without our hooks), with the same judge prompts;
* stock again: the baseline against itself, which is the noise;
* stock, in place: the same tree, but the question after the branch's own text;
* ours: ``fork_similar`` and ``verify_gated``, never skipped and at full depth.

Kinds of forks, of GSM8K problems after worked ones:

* identical: all branches have one prompt, which is computed once ahead of them, as SGLang's own ``fork`` does;
* divergent: each branch begins with an opening of its own and reads the same material after it. Ours asks for
  ``share="blend"``, which approximates; the arm "ours, exact" is what the default ``share="auto"`` does there;
* together: equal prompts that arrive together from a client of plain requests, nothing computed ahead of them; ours
  only names the fork;
* tree: three levels of thoughts, the two best of each taken on;
* saturated: many identical forks at once;
* sizes: identical and divergent forks, with one of branches and material varied at a time.

In all of these the branches of every arm generate equally many tokens and every branch is verified; ``equal_tokens``
says so. The kind "defaults" is what a user gets who asks for nothing: forks whose vote may be decided early
(``early_stop="certain"``, and ``probable`` with a risk of 1%), verified only where votes do not decide, many at once,
beside stock SGLang that samples all branches and votes too. There tokens differ, and ``same_answer`` says how often the
answer is stock's, ``same_answer_noise`` how often stock's is its own of another run (samples differ).

Arms take turns in an order that changes from problem to problem, caches are flushed before each, and only one server
works at a time. Ratios are medians over problems (or rounds), above 1 where ours is faster, with 95% intervals by
bootstrap. The last line is JSON; ``--out`` has what it was made of, by stage.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.overhead import BareServer, check_bare, median_ratio
from benchmarks.pipeline_arms import DEPTH, PREFILL, PREFIX, STAGES, Ours, Plain, Ran
from benchmarks.pipeline_defaults import CERTAIN, PROBABLE, Answers, solve_all
from benchmarks.pipeline_items import ALL, Item, items
from benchmarks.result_files import write
from programs.problems import READING, load_problems
from rksc_sgl import Endpoint
from rksc_sgl.model_fetch import DEFAULT_MODEL, resolve_model
from rksc_sgl.server_arguments import server_arguments, without
from rksc_sgl.server_process import ServerProcess

NONE, STOCK, AGAIN, IN_PLACE, OURS, EXACT = "none", "stock", "stock again", "stock, in place", "ours", "ours, exact"
IDENTICAL, DIVERGENT, TOGETHER, TREE, SATURATED = "identical", "divergent", "together", "tree", "saturated"
DEFAULTS = "defaults"
KINDS = (IDENTICAL, DIVERGENT, TOGETHER, TREE, SATURATED, DEFAULTS)
SIZES = {"branches": (4, 8, 16), "material": (256, 1024, 2048)}
MANY = 32  # branches at which the defaults are measured too

Given = TypeVar("Given")  # an item
Solve = Callable[[Item], Ran]


@dataclass(frozen=True)
class Cell:
    """One kind at one size.

    Attributes:
        kind: of :data:`KINDS`.
        branches, material: the size; material in tokens.
        runs: by arm, one a problem (or round), in the same order.
    """

    kind: str
    branches: int
    material: int
    runs: dict[str, list[Ran]] = field(default_factory=dict)

    def ratio(self, above: str, below: str = OURS, stage: str | None = None) -> tuple[float, float, float]:
        """How much longer one arm takes than another, with its 95% interval; of the whole, or of a stage."""
        return median_ratio(self._seconds(above, stage), self._seconds(below, stage))

    def _seconds(self, arm: str, stage: str | None) -> list[float]:
        # prefill is all that comes before the branches' last first token, the common prefix included
        if stage is None:
            return [ran.seconds for ran in self.runs[arm]]
        stages = (PREFIX, PREFILL) if stage == PREFILL else (stage,)
        return [sum(ran.stages[one] for one in stages) for ran in self.runs[arm]]

    def plain(self) -> dict[str, Any]:
        """As it is written to a file."""
        arms = {}
        for arm, runs in self.runs.items():
            counts = ("generated", "verified", "prompt", "cached", "taken", "judged")
            arms[arm] = {
                "seconds": [round(ran.seconds, 4) for ran in runs],
                "stages": {name: [round(ran.stages[name], 4) for ran in runs] for name in STAGES},
                **{name: sum(getattr(ran, name) for ran in runs) for name in counts},
                "modes": dict(self.modes(arm)),
            }
        versus = {arm: list(self.ratio(arm)) for arm in self.runs if arm != OURS}
        noise = list(self.ratio(STOCK, AGAIN)) if AGAIN in self.runs else None
        return {
            "kind": self.kind,
            "branches": self.branches,
            "material": self.material,
            "arms": arms,
            "ratios": versus,  # of ours: median and 95% interval
            "prefill_ratios": {arm: list(self.ratio(arm, stage=PREFILL)) for arm in versus},
            "noise": noise,
            "equal_tokens": self.equal_tokens,
        }

    def modes(self, arm: str) -> Counter[str]:
        """How the branches of an arm shared."""
        return sum((ran.modes for ran in self.runs[arm]), Counter())

    @property
    def equal_tokens(self) -> bool:
        """Whether every arm generated equally much and verified as many branches, problem by problem."""
        rows = zip(*self.runs.values(), strict=True)
        return all(len({(ran.generated, ran.verified) for ran in row}) == 1 for row in rows)


class Servers:
    """Ours and stock SGLang's, one of which works at a time.

    Args:
        ours, stock: addresses of running servers of one model.
        tokens: of each branch.
    """

    def __init__(self, ours: str, stock: str, tokens: int) -> None:
        self.ours, self.stock = Endpoint(ours), Endpoint(stock)
        self.tokens = tokens

    def arms(self, kind: str) -> dict[str, tuple[Endpoint, Solve]]:
        """The arms of a kind: which server works, and how it solves one item."""
        plain = {
            NONE: Plain(self.stock, self.tokens, judge=True, reuse=False),
            STOCK: Plain(self.stock, self.tokens, judge=True),
            AGAIN: Plain(self.stock, self.tokens, judge=True),
            IN_PLACE: Plain(self.stock, self.tokens, judge=False),
        }
        method = {TOGETHER: "together", TREE: "tree"}.get(kind, "fork")
        if kind == SATURATED:
            del plain[NONE]
        found = {name: (self.stock, getattr(arm, method)) for name, arm in plain.items()}
        if kind == TOGETHER:
            found[OURS] = (self.ours, Plain(self.ours, self.tokens, judge=False, names_fork=True).together)
            return found
        found[OURS] = (self.ours, getattr(Ours(self.ours, self.tokens, self._share(kind)), method))
        if kind == DIVERGENT:
            found[EXACT] = (self.ours, Ours(self.ours, self.tokens).fork)
        return found

    @staticmethod
    def _share(kind: str) -> str:
        return "blend" if kind == DIVERGENT else "auto"

    def items(self, kind: str, count: int, branches: int, material: int, seed: int) -> list[Item]:
        tokens_of = lambda text: len(self.ours.tokenize(text))  # noqa: E731
        return items(count, branches, material, tokens_of, openings=kind == DIVERGENT, seed=seed)


def one_by_one(
    arms: Mapping[str, tuple[Endpoint, Callable[[Given], Ran]]],
    given: Sequence[Given],
    cell: Cell,
    progress: Callable[[], Any],
) -> None:
    """Every item in every arm; the order of the arms changes."""
    for index, item in enumerate(given):
        order = list(arms)
        random.Random(index).shuffle(order)
        found = {}
        for name in order:
            endpoint, solve = arms[name]
            endpoint.flush_cache(wait_s=60.0)
            found[name] = solve(item)
            progress()
        for name in arms:
            cell.runs.setdefault(name, []).append(found[name])


def all_at_once(
    arms: Mapping[str, tuple[Endpoint, Solve]],
    given: Sequence[Item],
    rounds: int,
    cell: Cell,
    progress: Callable[[], Any],
) -> None:
    """All items side by side, so many times; a round is one run."""
    for number in range(rounds):
        order = list(arms)
        random.Random(number).shuffle(order)
        found = {}
        for name in order:
            endpoint, solve = arms[name]
            endpoint.flush_cache(wait_s=60.0)
            seconds, runs = solve_all(solve, given, len(given))
            found[name] = _together(seconds, runs)
            progress()
        for name in arms:
            cell.runs.setdefault(name, []).append(found[name])


def _together(seconds: float, runs: Sequence[Ran]) -> Ran:
    """Forks that ran side by side as one; their stages lie beside each other, so that these are shares of the time."""
    stages = {name: sum(ran.stages[name] for ran in runs) for name in STAGES}
    whole = sum(stages.values())
    counts = ("generated", "verified", "prompt", "cached", "taken", "judged")
    return Ran(
        seconds=seconds,
        stages={name: seconds * value / whole for name, value in stages.items()},
        modes=sum((ran.modes for ran in runs), Counter()),
        **{name: sum(getattr(ran, name) for ran in runs) for name in counts},
    )


def measure(servers: Servers, options: argparse.Namespace) -> list[Cell]:
    """All kinds but the defaults, and the sizes."""
    cells = [Cell(kind, options.branches, options.material) for kind in options.kinds if kind != DEFAULTS]
    if options.sizes:
        cells += [
            Cell(kind, *size)
            for kind in (IDENTICAL, DIVERGENT)
            if kind in options.kinds
            for size in other_sizes(options.branches, options.material)
        ]
    for cell in cells:
        arms = servers.arms(cell.kind)
        if (cell.branches, cell.material) != (options.branches, options.material):
            arms = {name: arms[name] for name in (NONE, STOCK, AGAIN, OURS)}
        saturated = cell.kind == SATURATED
        count = options.at_once if saturated else options.problems
        given = servers.items(cell.kind, count, cell.branches, cell.material, options.seed)
        said = f"{cell.kind}, {cell.branches} branches, material of {cell.material} tokens"
        with tqdm(total=len(arms) * (options.rounds if saturated else len(given)), desc=said, file=sys.stderr) as bar:
            if saturated:
                all_at_once(arms, given, options.rounds, cell, bar.update)
            else:
                one_by_one(arms, given, cell, bar.update)
    return cells


def other_sizes(branches: int, material: int) -> list[tuple[int, int]]:
    """The sizes beside the usual one, of which they differ in one thing."""
    return [
        *((other, material) for other in SIZES["branches"] if other != branches),
        *((branches, other) for other in SIZES["material"] if other != material),
    ]


def measure_defaults(servers: Servers, options: argparse.Namespace, branches: int) -> Answers:
    """What a user gets who asks for nothing, beside stock SGLang with all branches and a vote."""
    return Answers.measure(
        servers.ours,
        servers.stock,
        load_problems(options.answer_source, options.answer_problems, options.seed),
        options.answer_source,
        branches,
        options.answer_tokens,
        options.at_once,
        options.rounds,
    )


def summary(cells: Sequence[Cell], defaults: Sequence[Answers]) -> dict[str, Any]:
    """The last line; what was not run is null."""
    usual = {cell.kind: cell for cell in reversed(cells)}  # the first of each kind

    def ratio(kind: str, arm: str, stage: str | None = None) -> float | None:
        return usual[kind].ratio(arm, stage=stage)[0] if kind in usual else None

    once, again = (
        [ran.seconds for cell in cells if AGAIN in cell.runs for ran in cell.runs[arm]] for arm in (STOCK, AGAIN)
    )
    result: dict[str, Any] = {
        "identical_vs_none": ratio(IDENTICAL, NONE),
        "identical_vs_stock": ratio(IDENTICAL, STOCK),
        "divergent_vs_none": ratio(DIVERGENT, NONE),
        "divergent_vs_stock": ratio(DIVERGENT, STOCK),
        "together_vs_stock": ratio(TOGETHER, STOCK),
        "together_prefill_vs_stock": ratio(TOGETHER, STOCK, PREFILL),
        "tree_vs_stock": ratio(TREE, STOCK),
        "saturated_vs_stock": ratio(SATURATED, STOCK),
        "noise": median_ratio(once, again)[0] if once else None,
        "equal_tokens": all(cell.equal_tokens for cell in cells) if cells else None,
    }
    first = defaults[0].figures() if defaults else {}
    for name, arm in (("defaults", CERTAIN), ("probable", PROBABLE)):
        result[f"{name}_vs_stock"] = first["ratios"][arm][0] if first else None
        result[f"same_answer_{name}"] = first["same_answer"][arm] if first else None
    result["same_answer"] = result.pop("same_answer_defaults")
    result["same_answer_noise"] = first["same_answer"][AGAIN] if first else None
    result["modes"] = {kind: dict(cell.modes(OURS)) for kind, cell in usual.items()}
    return result


def show(cells: Sequence[Cell], defaults: Sequence[Answers]) -> None:
    """Tables for people."""
    console = Console(stderr=True, width=132)
    for cell in cells:
        title = f"{cell.kind}: {cell.branches} branches, material of about {cell.material} tokens"
        table = Table("arm", "seconds", *STAGES, "ours is faster by", "95%", "mode of the branches", title=title)
        for arm, runs in cell.runs.items():
            mean = sum(ran.seconds for ran in runs) / len(runs)
            stages = [f"{sum(ran.stages[name] for ran in runs) / len(runs):.2f}" for name in STAGES]
            ratio = cell.ratio(arm)
            modes = ", ".join(f"{mode} {count}" for mode, count in cell.modes(arm).items())
            shown = ["", ""] if arm == OURS else [f"{ratio[0]:.2f}", f"{ratio[1]:.2f} to {ratio[2]:.2f}"]
            table.add_row(arm, f"{mean:.2f}", *stages, *shown, modes)
        console.print(table)
    for one in defaults:
        figures = one.figures()
        title = f"defaults: {one.branches} branches, {one.problems} problems of {one.source}, {one.at_once} at once"
        table = Table("arm", "seconds", "tokens", "right", "stock's answer", "faster by", "95%", title=title)
        for arm in figures["seconds"]:
            ratio = figures["ratios"].get(arm)
            shown = [f"{ratio[0]:.2f}", f"{ratio[1]:.2f} to {ratio[2]:.2f}"] if ratio else ["", ""]
            same = figures["same_answer"].get(arm)
            table.add_row(
                arm,
                f"{np.mean(figures['seconds'][arm]):.2f}",
                str(figures["tokens"][arm]),
                f"{figures['accuracy'][arm]:.2f}",
                "" if same is None else f"{same:.2f}",
                *shown,
            )
        console.print(table)


@contextmanager
def _served(options: argparse.Namespace) -> Iterator[Servers]:
    if options.url is not None:
        yield Servers(options.url, options.stock_url, options.tokens)
        return
    flags = ["--enable-metrics", *options.server]  # without it no server tells when first tokens were there
    print(f"starting a server with {options.model_path}, and stock SGLang's beside it ...", file=sys.stderr, flush=True)
    with (
        ServerProcess(server_arguments(["--model-path", options.model_path, *flags])) as ours,
        BareServer(["--model-path", resolve_model(options.model_path), *flags]) as stock,
    ):
        check_bare(stock)
        yield Servers(ours.url, stock.url, options.tokens)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", default=DEFAULT_MODEL)
    parser.add_argument("--url", help="a running server of ours with --enable-metrics, instead of one")
    parser.add_argument("--stock-url", help="a running server of stock SGLang with the same model, with --url")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--problems", type=int, default=10, help="of each kind and size")
    parser.add_argument("--branches", type=int, default=8)
    parser.add_argument("--material", type=int, default=1024, help="tokens of worked problems before each, about")
    parser.add_argument("--tokens", type=int, default=32, help="that every branch generates (in trees, every thought)")
    parser.add_argument("--sizes", action=argparse.BooleanOptionalAction, default=True, help="other sizes too")
    parser.add_argument("--at-once", type=int, default=8, help="forks at once: saturated, defaults")
    parser.add_argument("--rounds", type=int, default=5, help="of saturated and defaults")
    parser.add_argument("--answer-source", default=READING, help="problems of the defaults: reading, gsm8k, ...")
    parser.add_argument("--answer-problems", type=int, default=16, help="of the defaults")
    parser.add_argument("--answer-tokens", type=int, default=32, help="of each branch at most, in the defaults")
    parser.add_argument("--seed", type=int, default=0, help="of the worked problems, and of generated problems")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a first look, in minutes: two problems, less material and fewer tokens",
    )
    parser.add_argument("--out", type=Path, help="write figures, times by stage, machine and versions to this file")
    parser.add_argument("--server", nargs=argparse.REMAINDER, default=[], help="arguments of the servers started; last")
    options = parser.parse_args(arguments)
    if options.quick:
        options.problems, options.sizes, options.at_once, options.rounds, options.answer_problems = 2, False, 4, 2, 8
        options.material, options.tokens = 384, 16
    if (options.url is None) != (options.stock_url is None):
        parser.error("--url and --stock-url: name both servers or none")
    if min(options.problems, options.tokens, options.at_once, options.rounds, options.answer_problems) < 1:
        parser.error("--problems, --tokens, --at-once, --rounds, --answer-problems: must be 1 or more")
    if max(options.problems, options.at_once) > ALL // 2:
        parser.error(f"--problems, --at-once: must be at most {ALL // 2}; the other items are worked ones")
    if options.branches < 4 or options.branches % 2:
        parser.error("--branches: must be even and 4 or more, for a tree keeps two of each level")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    with _served(options) as servers:
        cells = measure(servers, options)
        sizes = dict.fromkeys([options.branches, *([MANY] if options.sizes else [])])
        defaults = [measure_defaults(servers, options, size) for size in sizes if DEFAULTS in options.kinds]
    show(cells, defaults)
    result = summary(cells, defaults)
    if options.out is not None:
        settings = {name: value for name, value in vars(options).items() if name not in ("out", "url", "stock_url")}
        write(
            options.out,
            "pipeline",
            result,
            settings=settings | {"depth": DEPTH},
            cells=[cell.plain() for cell in cells],
            defaults=[one.figures() for one in defaults],
            command=shlex.join(["python", "-m", "benchmarks.pipeline", *asked_for(arguments)]),
        )
    print(json.dumps(result), flush=True)
    return 0


def asked_for(arguments: Sequence[str] | None) -> list[str]:
    """The command line, but for the file that the results go to."""
    return without(sys.argv[1:] if arguments is None else arguments, "--out")


if __name__ == "__main__":
    sys.exit(main())
