"""SGLang's own load generator against stock SGLang and against ours: what it costs to have us, and to opt in.

``sglang.benchmark.serving`` with its data set ``generated-shared-prefix`` (random tokens, groups of requests with a
common beginning) sends the same requests in every arm:

* stock: SGLang's default tree, without our hooks (``benchmarks.bare_server``);
* ours: our server, requests that do not opt in;
* opted in: our server, requests that opt in with ``share="exact"``;
* stock again: the baseline against itself, which is the noise.

The generator sends one and the same extra body with all requests, so that none can say which fork it is of. Without a
fork there is no sibling to wait for, and donors of the whole cache (``share_scope="cache"``) are for blends and merges,
which compute something else; the prompts differ in all but their beginnings besides, which the tree shares anyway. What
is left is exact sharing: it changes no answer, so that the arm says what opting in costs under load.

After each run the server must have counted every request of "opted in", served with exact KV, and none of "ours": else
this ends with an error. So it does where a request fails. ``equal_tokens`` says whether prompts and answers had equally
many tokens in all arms, request by request. Prompts are of another seed in each round and the same in all arms of it,
at every concurrency; caches are flushed before each run; the order of the arms is reversed from round to round. Both
servers are up all the time, and one of them works.

Figures are the generator's own. Ratios are medians over rounds with 95% intervals by bootstrap, above 1 where the arm
is better than stock: more tokens a second, or less time. With equal tokens the ratios of both throughputs are one
number. A p99 of as few requests as these is nearly the slowest of them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.overhead import BareServer, check_bare, median_ratio
from rksc_sgl import Endpoint
from rksc_sgl.errors import RkscError
from rksc_sgl.metrics import REQUESTS
from rksc_sgl.model_fetch import DEFAULT_MODEL, resolve_model
from rksc_sgl.options import KEY
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess

STOCK, OURS, OPTED_IN, AGAIN = ARMS = ("stock", "ours", "opted in", "stock again")
NAMES = {OURS: "ours", OPTED_IN: "opted_in", AGAIN: "noise"}  # in the last line
OPTIONS = {"share": "exact"}
WARM_UP = 1  # requests that the generator sends ahead of those that it measures
MORE, LESS = True, False  # is better


@dataclass(frozen=True)
class Figure:
    """One of the generator's: its name there, its unit, and whether more of it is better."""

    name: str
    unit: str
    better: bool


FIGURES = {
    "throughput": Figure("output_throughput", "tokens/s", MORE),
    "input_throughput": Figure("input_throughput", "tokens/s", MORE),
    "ttft_p50": Figure("median_ttft_ms", "ms", LESS),
    "ttft_p99": Figure("p99_ttft_ms", "ms", LESS),
    "tpot_p50": Figure("median_tpot_ms", "ms", LESS),
}


@dataclass(frozen=True)
class Run:
    """One run of the generator.

    Attributes:
        figures: by the names of :data:`FIGURES`.
        tokens: of the prompt and of the answer of each request, in the order in which they were sent.
        cached: share of the prompts' tokens that was found in the cache.
    """

    figures: dict[str, float]
    tokens: tuple[tuple[int, int], ...]
    cached: float

    @classmethod
    def of(cls, told: dict[str, Any]) -> Run:
        """
        Args:
            told: the generator's result with its details.

        Raises:
            RkscError: a request failed, or the generator saw no token of most of them.
        """
        failed = [error for error in told["errors"] if error]
        if failed:
            raise RkscError(f"{len(failed)} of {len(told['errors'])} requests failed: {failed[0].strip()[-500:]}")
        figures = {name: float(told[figure.name]) for name, figure in FIGURES.items()}
        missing = [name for name, value in figures.items() if value <= 0.0]
        if missing:
            raise RkscError(f"the load generator measured no {', '.join(missing)}: answers need two tokens with a text")
        tokens = tuple(zip(told["input_lens"], told["output_lens"], strict=True))
        report = told["cache_report"]
        return cls(figures, tokens, report["total_cached_tokens"] / report["total_prompt_tokens"])


class LoadGenerator:
    """``sglang.benchmark.serving`` in a process of its own, which imports it once.

    That process has a home directory of its own: the generator keeps prompts there, under a name that does not tell two
    tokenizers of one class apart.
    """

    def __enter__(self) -> LoadGenerator:
        self._stack = contextlib.ExitStack()
        self._home = self._stack.enter_context(tempfile.TemporaryDirectory())
        pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_move_home, initargs=(self._home,))
        self._pool = self._stack.enter_context(pool)
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def run(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Its result with details.

        Raises:
            RkscError: it failed.
        """
        path = Path(self._home) / "result.jsonl"
        path.unlink(missing_ok=True)
        self._pool.submit(_generate, [*arguments, "--output-file", str(path)]).result()
        return dict(json.loads(path.read_text()))


def _move_home(home: str) -> None:
    import huggingface_hub.constants  # noqa: F401  # it knows by now where models are

    os.environ["HOME"] = home


def _generate(arguments: list[str]) -> None:
    from sglang.benchmark import serving

    sys.argv, said = [serving.__name__, *arguments], io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            serving.cli_main()
    except (Exception, SystemExit) as error:
        raise RkscError(f"the load generator failed: {error!r}\n{said.getvalue()[-1000:]}") from error


def generator_arguments(
    options: argparse.Namespace, url: str, concurrency: int, seed: int, *, opts_in: bool
) -> list[str]:
    """The generator's command line for one run."""
    model = resolve_model(options.model_path)
    sampling: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_new_tokens": options.tokens}
    if opts_in:
        sampling["custom_params"] = {KEY: OPTIONS}
    flags = {
        "base-url": url,
        "model": model,
        "tokenizer": model,
        "dataset-name": "generated-shared-prefix",
        "gsp-num-groups": options.groups,
        "gsp-prompts-per-group": options.requests // options.groups,
        "gsp-system-prompt-len": options.common,
        "gsp-question-len": options.own,
        "gsp-output-len": options.tokens,
        "max-concurrency": concurrency,
        "seed": seed,
        "warmup-requests": WARM_UP,
        "extra-request-body": json.dumps({"sampling_params": sampling}),
    }
    switches = ["--tokenize-prompt", "--flush-cache", "--cache-report", "--output-details", "--disable-tqdm"]
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))] + switches


def opted_in_requests(server: Endpoint) -> Counter[str]:
    """Requests that opted in and have finished on a server, by how their prefix came to be; none without our hooks."""
    schedulers = (server.read_rksc_info() or {}).get("schedulers") or []
    found: Counter[str] = Counter()
    for scheduler in filter(None, schedulers):
        for series in scheduler["counters"].get(REQUESTS, ()):
            found[series["labels"]["mode"]] += int(series["value"])
    return found


def check_opted_in(arm: str, grown: Counter[str], requests: int) -> None:
    """
    Args:
        arm: one of ours.
        grown: what :func:`opted_in_requests` grew by.
        requests: that were sent.

    Raises:
        RkscError: other requests opted in than should have, or they were not served with exact KV.
    """
    expected = Counter(exact=requests) if arm == OPTED_IN else Counter[str]()
    if grown != expected:
        raise RkscError(
            f"{arm}: the server counted {dict(grown)} of {requests} requests as opted in, and it should be "
            f"{dict(expected)}: is it one of ours, and is nothing else asked of it?"
        )


@dataclass
class Cell:
    """One concurrency.

    Attributes:
        runs: by arm, one a round.
    """

    runs: dict[str, list[Run]] = field(default_factory=lambda: {arm: [] for arm in ARMS})

    def ratio(self, arm: str, name: str) -> tuple[float, float, float]:
        """How much better than stock an arm is by one figure, with its 95% interval."""
        own, stock = ([run.figures[name] for run in self.runs[one]] for one in (arm, STOCK))
        return median_ratio(own, stock) if FIGURES[name].better is MORE else median_ratio(stock, own)

    def median(self, arm: str, name: str) -> float:
        return statistics.median(run.figures[name] for run in self.runs[arm])

    @property
    def equal_tokens(self) -> bool:
        """Whether prompts and answers had equally many tokens in all arms of a round, request by request."""
        return all(len({run.tokens for run in row}) == 1 for row in zip(*self.runs.values(), strict=True))

    def plain(self) -> dict[str, Any]:
        """As the last line has it."""
        ratios = {
            f"{name}_ratio_{NAMES[arm]}": self.ratio(arm, name) for name in FIGURES for arm in (OURS, OPTED_IN, AGAIN)
        }
        return {
            **{name: ratio for name, (ratio, _, _) in ratios.items()},
            "intervals": {name: [low, high] for name, (_, low, high) in ratios.items()},
            "medians": {arm: {name: round(self.median(arm, name), 2) for name in FIGURES} for arm in ARMS},
            "cached": {arm: round(statistics.fmean(run.cached for run in self.runs[arm]), 4) for arm in ARMS},
        }


def measure(ours: Endpoint, stock: Endpoint, options: argparse.Namespace) -> dict[int, Cell]:
    """All rounds, by concurrency.

    Raises:
        RkscError: a request failed, or the server did not serve it as it was asked.
    """
    cells = {concurrency: Cell() for concurrency in options.concurrency}
    total = options.rounds * len(cells) * len(ARMS)
    with LoadGenerator() as generator, tqdm(total=total, desc="load", unit="run", file=sys.stderr) as progress:
        for number in range(options.rounds):
            for concurrency, cell in cells.items():
                for arm in ARMS if number % 2 == 0 else ARMS[::-1]:
                    server = ours if arm in (OURS, OPTED_IN) else stock
                    before = opted_in_requests(server)
                    server.flush_cache(wait_s=60.0)
                    told = generator.run(
                        generator_arguments(
                            options, server.base_url, concurrency, options.seed + number, opts_in=arm == OPTED_IN
                        )
                    )
                    cell.runs[arm].append(Run.of(told))
                    if server is ours:
                        check_opted_in(arm, opted_in_requests(server) - before, options.requests + WARM_UP)
                    progress.update()
    return cells


def summary(cells: dict[int, Cell], options: argparse.Namespace) -> dict[str, Any]:
    """The last line."""
    return {
        "by_concurrency": {str(concurrency): cell.plain() for concurrency, cell in cells.items()},
        "equal_tokens": all(cell.equal_tokens for cell in cells.values()),
        "model": options.model_path,
        "opted_in_with": OPTIONS,
        "rounds": options.rounds,
        "requests": options.requests,
        "groups": options.groups,
        "common": options.common,
        "own": options.own,
        "tokens": options.tokens,
        "seed": options.seed,
    }


def show(result: dict[str, Any]) -> None:
    """A table for people."""
    table = Table("concurrency", "figure", STOCK, "ours", "95%", "opted in", "95%", "noise", "95%", title="load")
    for concurrency, cell in result["by_concurrency"].items():
        for name, figure in FIGURES.items():
            row = [concurrency, name, f"{cell['medians'][STOCK][name]:.4g} {figure.unit}"]
            for arm in NAMES.values():
                low, high = cell["intervals"][f"{name}_ratio_{arm}"]
                row += [f"{cell[f'{name}_ratio_{arm}']:.2f}", f"{low:.2f} to {high:.2f}"]
            table.add_row(*row)
    Console(stderr=True, width=132).print(table)


@contextlib.contextmanager
def _served(options: argparse.Namespace) -> Iterator[tuple[Endpoint, Endpoint]]:
    if options.url is not None:
        yield Endpoint(options.url), Endpoint(options.stock_url)
        return
    print(f"starting a server with {options.model_path}, and stock SGLang's beside it ...", file=sys.stderr, flush=True)
    with (
        ServerProcess(server_arguments(["--model-path", options.model_path, *options.server])) as ours,
        BareServer(["--model-path", resolve_model(options.model_path), *options.server]) as stock,
    ):
        check_bare(stock)
        yield Endpoint(ours.url), Endpoint(stock.url)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", default=DEFAULT_MODEL)
    parser.add_argument("--url", help="a running server of ours, instead of one")
    parser.add_argument("--stock-url", help="a running server of stock SGLang with the same model, with --url")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16], help="requests at once")
    parser.add_argument("--requests", type=int, default=64, help="of a run")
    parser.add_argument("--groups", type=int, default=8, help="of requests with a common beginning")
    parser.add_argument("--common", type=int, default=256, help="tokens with which the prompts of a group begin")
    parser.add_argument("--own", type=int, default=64, help="tokens after them")
    parser.add_argument("--tokens", type=int, default=32, help="that every request generates")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts of the first round")
    parser.add_argument("--quick", action="store_true", help="a first look, in minutes: few requests, two rounds")
    parser.add_argument("--server", nargs=argparse.REMAINDER, default=[], help="arguments of the servers started; last")
    options = parser.parse_args(arguments)
    if options.quick:
        options.concurrency, options.requests, options.groups, options.rounds = [1, 4], 16, 4, 2
        options.common, options.tokens = 128, 16
    if (options.url is None) != (options.stock_url is None):
        parser.error("--url and --stock-url: name both servers or none")
    if min(options.groups, options.common, options.own, options.rounds) < 1 or options.tokens < 2:
        parser.error("--groups, --common, --own, --rounds: must be 1 or more, --tokens 2 or more")
    if options.requests < 1 or options.requests % options.groups:
        parser.error(f"--requests: must be equally many in each of {options.groups} groups, got {options.requests}")
    if not 1 <= min(options.concurrency) <= max(options.concurrency) <= options.requests:
        parser.error(f"--concurrency: must be 1 to --requests = {options.requests}, got {options.concurrency}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    try:
        with _served(options) as (ours, stock):
            cells = measure(ours, stock, options)
    except RkscError as error:
        print(f"load: {error}", file=sys.stderr)
        return 1
    result = summary(cells, options)
    show(result)
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
