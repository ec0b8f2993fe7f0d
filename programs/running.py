"""What the programs share: options, the server, the loop over problems."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from programs.problems import GSM8K, Problem, load_problems
from programs.report import Row, finish, summary
from rksc_sgl.deciding import EarlyStop
from rksc_sgl.errors import RkscError, ServerUnreachableError
from rksc_sgl.frontend import Endpoint
from rksc_sgl.model_fetch import DEFAULT_MODEL
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess

Solve = Callable[[Problem, argparse.Namespace], Row]


def options(program: str, about: str) -> argparse.ArgumentParser:
    """The options that every program has."""
    parser = argparse.ArgumentParser(prog=f"rksc run {program.replace('_', '-')}", description=about)
    parser.add_argument("--url", help="a running server; without it one is started and ended again")
    parser.add_argument("--model-path", default=DEFAULT_MODEL, help="model of the server that is started")
    parser.add_argument("--source", default=GSM8K, help="gsm8k, reading or reasoning-gym:TASK[,name=value...]")
    parser.add_argument("--problems", type=int, default=4, help="how many problems")
    parser.add_argument("--branches", type=int, default=8, help="branches of each problem")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of each branch at most")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--parallel", type=int, default=4, help="problems that are worked on at once")
    parser.add_argument("--seed", type=int, default=0, help="of generated problems")
    parser.add_argument("--json", type=Path, metavar="F", help="write the last line to this file too")
    return parser


def add_early_stop(parser: argparse.ArgumentParser, default: str | None, said: str) -> None:
    """The options of programs whose forks may stop early.

    Args:
        default: of ``--early-stop``.
        said: the same in words.
    """
    parser.add_argument(
        "--early-stop",
        default=default,
        choices=["certain", "probable", "off"],
        help=f"when the vote counts as decided; samples that cannot matter any more are not started (default {said})",
    )
    parser.add_argument(
        "--risk", type=float, help="of --early-stop probable: P(another answer than that of all samples), 0.01"
    )


def early_stop_of(arguments: argparse.Namespace) -> EarlyStop | None:
    """
    Raises:
        OptionError: the risk is out of range, or goes with no such policy.
    """
    return None if arguments.early_stop == "off" else EarlyStop(arguments.early_stop, risk=arguments.risk)


@contextmanager
def endpoint_of(arguments: argparse.Namespace) -> Iterator[Endpoint]:
    """The server that was named, or one of our own that ends with the program."""
    if arguments.url:
        yield Endpoint(arguments.url)
        return
    print(f"starting a server with {arguments.model_path} ...", file=sys.stderr, flush=True)
    with ServerProcess(server_arguments(["--model-path", arguments.model_path])) as server:
        yield Endpoint(server.url)


def run(program: str, solve: Solve, arguments: argparse.Namespace) -> int:
    """Solve each problem, print table and JSON line; the exit code.

    A problem that fails is a row with its error; a server that went away ends the run.
    """
    # A branch that fails is reported in its verdict; SGLang prints a traceback of each as well.
    warnings.filterwarnings("ignore", message="Error in stream_executor")
    try:
        if hasattr(arguments, "early_stop"):
            early_stop_of(arguments)  # refused once, and before a server is started
        problems = load_problems(arguments.source, arguments.problems, arguments.seed)
        with endpoint_of(arguments) as endpoint:
            import sglang as sgl

            sgl.set_default_backend(endpoint)
            began = time.perf_counter()
            rows = _solve_all(solve, problems, arguments)
            wall_s = time.perf_counter() - began
            finish(
                rows,
                summary(program, endpoint.model_info["served_model_name"], rows, arguments.branches, wall_s),
                arguments.json,
            )
    except RkscError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return 0 if all(row.error is None for row in rows) else 1


def _solve_all(solve: Solve, problems: list[Problem], arguments: argparse.Namespace) -> list[Row]:
    def one(problem: Problem) -> Row:
        try:
            return solve(problem, arguments)
        except ServerUnreachableError:
            raise
        except RkscError as error:
            return Row(problem.id, problem.question, error=str(error))

    with ThreadPoolExecutor(max(1, arguments.parallel)) as pool:
        pending = [pool.submit(one, problem) for problem in problems]
        try:
            return [future.result() for future in tqdm(pending, unit="problem", file=sys.stderr)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
