"""Self-consistency and best-of-N: the proxies and libraries that people put before a server, and one request of ours.

    python -m benchmarks.peers --source reading --problems 24

`optillm` (a proxy) and `its-hub` (a library) from PyPI, each in an environment of its own that is made here with uv
(optillm asks for 6 GB), before one stock server: SGLang's default tree and none of our hooks, on the same platform
(``benchmarks.bare_server``). Ours is one request of the same client to our server. All get the same chats, so many
problems at once, and as many samples: optillm's self_consistency takes 5, whatever one says, and samples at temperature
1, so these are the defaults. What a user writes is a file in ``benchmarks/peer_programs``.

Accuracy is that of the problems' own graders. Tokens are those that went through the server's model, by SGLang's own
counter, judges' prompts and samples that nobody read included. The caches are flushed before every turn, and which arm
begins changes. Times are the median of the turns; the noise is an arm's slowest turn over its fastest. Lines are those
of the user's program, and of the commands that start a proxy. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.computed_tokens import METRICS, ComputedTokens, computed_tokens, flush
from benchmarks.environments import environment
from benchmarks.overhead import BareServer
from programs.asking import SYSTEM
from programs.problems import GSM8K, READING, Problem, load_problems
from rksc_sgl.errors import RkscError
from rksc_sgl.model_fetch import DEFAULT_MODEL, resolve_model
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess, free_port

PROGRAMS = Path(__file__).with_name("peer_programs")
RUNNER = Path(__file__).with_name("peer_runner.py")
PACKAGES = {"optillm": ["optillm==0.4.0"], "its-hub": ["its_hub[lm]==1.2.0"]}
START_S = 120.0  # of a proxy
WARM_UP = 7919  # seed of the problem that is solved before the clock runs


@dataclass(frozen=True)
class Arm:
    """One way to do it.

    Attributes:
        name: in the table.
        program: what the user writes, in :data:`PROGRAMS`.
        package: which it needs, of :data:`PACKAGES`; None for ours and the ``openai`` client.
        approach: of optillm's proxy; None without a proxy.
        ours: whether it asks our server.
    """

    name: str
    program: str
    package: str | None = None
    approach: str | None = None
    ours: bool = False


ARMS = (
    Arm("one sample", "openai_client"),
    Arm("optillm self_consistency", "openai_client", "optillm", "self_consistency"),
    Arm("its-hub SelfConsistency", "its_hub_self_consistency", "its-hub"),
    Arm("its-hub AdaptiveSelfConsistency", "its_hub_adaptive", "its-hub"),
    Arm("its-hub BetaSelfConsistency", "its_hub_beta", "its-hub"),
    Arm("rksc vote", "rksc_vote", ours=True),
    Arm("optillm bon", "openai_client", "optillm", "bon"),
    Arm("its-hub BestOfN", "its_hub_best_of_n", "its-hub"),
    Arm("rksc score", "rksc_score", ours=True),
)


@dataclass(frozen=True)
class Turn:
    """All problems once."""

    seconds: float
    tokens: ComputedTokens
    right: int
    errors: int


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    try:
        result = measure(arguments)
    except RkscError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 1
    Console(width=120).print(_table(result))
    for name, reason in result["left_out"].items():
        print(f"left out: {name}: {reason}")
    print(json.dumps(result))
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of every arm that could be run.

    Raises:
        RkscError: a server is not there, or counts no tokens.
    """
    problems = load_problems(arguments.source, arguments.problems, arguments.seed)
    chosen = [arm for arm in ARMS if not arguments.only or arm.name in arguments.only]
    left_out: dict[str, str] = {}
    environments = _environments(chosen, left_out)
    turns: dict[str, list[Turn]] = {arm.name: [] for arm in chosen}
    with _servers(arguments) as (stock, ours):
        for turn in range(arguments.turns):
            for arm in chosen if turn % 2 == 0 else chosen[::-1]:
                if arm.name in left_out or arm.package in left_out:
                    continue
                try:
                    programs = environments.get(arm.package or "")
                    turns[arm.name].append(_turn(arm, ours if arm.ours else stock, programs, problems, arguments))
                except RkscError as error:
                    left_out[arm.name] = str(error)
                    continue
                last = turns[arm.name][-1]
                said = f"{last.right} of {len(problems)} right, {last.tokens.computed} tokens, {last.seconds:.1f} s"
                print(f"turn {turn + 1}: {arm.name}: {said}", file=sys.stderr, flush=True)
    measured = {arm.name: _figures(arm, turns[arm.name], len(problems)) for arm in chosen if turns[arm.name]}
    return {
        "model": arguments.model_path,
        "source": arguments.source,
        "problems": len(problems),
        "samples": arguments.samples,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "at_once": arguments.at_once,
        "turns": arguments.turns,
        "arms": measured,
        "left_out": left_out,
    }


def _environments(arms: Sequence[Arm], left_out: dict[str, str]) -> dict[str, Path]:
    made = {}
    for package in dict.fromkeys(arm.package for arm in arms):
        if package is not None:
            try:
                made[package] = environment(package, PACKAGES[package])
            except RkscError as error:
                left_out[package] = str(error)
    return made


@contextlib.contextmanager
def _servers(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """URLs of the stock server and of ours; only one works at a time."""
    if arguments.url:
        yield arguments.stock_url, arguments.url
        return
    with contextlib.ExitStack() as stack:
        model = resolve_model(arguments.model_path)
        if arguments.top_p is not None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            model = str(_with_top_p(Path(model), directory / Path(model).name, arguments.top_p))
        print(f"starting two servers with {arguments.model_path} ...", file=sys.stderr, flush=True)
        stock = stack.enter_context(BareServer(["--model-path", model, METRICS]))
        if any(stock.get_json("/rksc/info")["schedulers"]):
            raise RkscError("the stock server has our hooks")
        yield stock.url, stack.enter_context(ServerProcess(server_arguments(["--model-path", model, METRICS]))).url


def _with_top_p(model: Path, directory: Path, top_p: float) -> Path:
    """The model with this ``top_p`` in its generation config, from where SGLang takes what a request does not say.

    Raises:
        RkscError: it is no directory.
    """
    if not model.is_dir():
        raise RkscError(f"--top-p: is for a model in a directory, and {model} is none")
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).symlink_to(file.resolve())
    config = directory / "generation_config.json"
    known = json.loads(config.read_text()) if config.exists() else {}
    config.unlink(missing_ok=True)
    config.write_text(json.dumps({**known, "top_p": top_p}))
    return directory


def _turn(
    arm: Arm, server: str, programs: Path | None, problems: Sequence[Problem], arguments: argparse.Namespace
) -> Turn:
    """
    Raises:
        RkscError: its program or proxy could not be run.
    """
    python = str(programs / "python") if programs is not None and arm.approach is None else sys.executable
    with contextlib.ExitStack() as stack:
        url = f"{server}/rksc/v1" if arm.ours else f"{server}/v1"
        if arm.approach is not None:
            assert programs is not None
            url = stack.enter_context(_optillm(programs, arm.approach, url, arguments.samples))
        asked = {
            "program": str(PROGRAMS / f"{arm.program}.py"),
            "url": url,
            "chats": [problem.messages(SYSTEM) for problem in problems],
            "warm_up": load_problems(arguments.source, 1, WARM_UP)[0].messages(SYSTEM),
            "at_once": arguments.at_once,
            "samples": arguments.samples,
            "max_tokens": arguments.max_tokens,
            "temperature": arguments.temperature,
        }
        errors = stack.enter_context(tempfile.TemporaryFile("w+"))
        runner = stack.enter_context(
            subprocess.Popen(
                [python, str(RUNNER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        )
        stack.callback(runner.kill)
        assert runner.stdin is not None and runner.stdout is not None
        runner.stdin.write(json.dumps(asked) + "\n")
        runner.stdin.flush()
        if runner.stdout.readline().strip() != "ready":
            errors.seek(0)
            raise RkscError(f"its program did not run: {errors.read().strip()[-600:]}")
        flush(server)
        before = computed_tokens(server)
        runner.stdin.write("go\n")
        runner.stdin.flush()
        told = json.loads(runner.stdout.readline())
        flush(server)  # waits for what a client left behind
        tokens = computed_tokens(server) - before
    failed = [error for error in told["errors"] if error]
    if failed:
        print(f"{arm.name}: {len(failed)} of {len(problems)} failed, such as: {failed[0][:300]}", file=sys.stderr)
    right = sum(problem.grade(text) for problem, text in zip(problems, told["texts"], strict=True))
    return Turn(told["seconds"], tokens, right, len(failed))


@contextlib.contextmanager
def _optillm(programs: Path, approach: str, url: str, samples: int) -> Iterator[str]:
    """A proxy before a server; its own URL.

    Raises:
        RkscError: it did not start.
    """
    port = free_port()
    command = [str(programs / "optillm"), "--approach", approach, "--base-url", url, "--port", str(port)]
    with tempfile.TemporaryFile("w+") as log:
        proxy = subprocess.Popen(
            [*command, "--best-of-n", str(samples)],
            env={**os.environ, "OPENAI_API_KEY": "none"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            until = time.monotonic() + START_S
            while not _is_healthy(port):
                if proxy.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RkscError(f"optillm did not start: {log.read().strip()[-600:]}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            proxy.terminate()
            proxy.wait()


def _is_healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5.0).status_code == 200
    except httpx.TransportError:
        return False


def _figures(arm: Arm, turns: Sequence[Turn], problems: int) -> dict[str, Any]:
    seconds = [turn.seconds for turn in turns]
    mean = lambda values: round(sum(values) / len(turns), 1)  # noqa: E731
    return {
        "accuracy": round(sum(turn.right for turn in turns) / (problems * len(turns)), 4),
        "tokens_computed": mean(turn.tokens.computed for turn in turns),
        "prompts_computed": mean(turn.tokens.prompts for turn in turns),
        "prompts_cached": mean(turn.tokens.cached for turn in turns),
        "decoded": mean(turn.tokens.decoded for turn in turns),
        "seconds": round(statistics.median(seconds), 2),
        "noise": round(max(seconds) / min(seconds), 3),
        "errors": sum(turn.errors for turn in turns),
        "lines": lines_of(PROGRAMS / f"{arm.program}.py") + (arm.approach is not None),
    }


def lines_of(program: Path) -> int:
    """Lines that a user writes: without empty ones and the docstring."""
    source = program.read_text()
    first = ast.parse(source).body[0]
    lines = source.splitlines()[first.end_lineno :]
    return sum(bool(line.strip()) for line in lines)


def _table(result: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    columns = ("accuracy", "tokens_computed", "prompts_computed", "decoded", "seconds", "noise", "errors", "lines")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for name, figures in result["arms"].items():
        table.add_row(name, *(f"{figures[column]:g}" for column in columns))
    return table


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", default=DEFAULT_MODEL, help="of the servers that are started")
    parser.add_argument("--url", help="our server, started with " + METRICS + "; needs --stock-url")
    parser.add_argument("--stock-url", help="of the server that the others ask")
    parser.add_argument("--source", default=READING, choices=[READING, GSM8K])
    parser.add_argument("--problems", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of generated problems")
    parser.add_argument("--samples", type=int, default=5, help="of each problem")
    parser.add_argument("--max-tokens", type=int, default=32, help="of each sample")
    parser.add_argument("--temperature", type=float, default=1.0, help="optillm's is 1, whatever one says")
    parser.add_argument(
        "--top-p", type=float, help="what the model's generation config says, where it should say something else"
    )
    parser.add_argument("--at-once", type=int, default=4, help="problems under way")
    parser.add_argument("--turns", type=int, default=3, help="of each arm")
    parser.add_argument("--only", nargs="+", metavar="ARM", choices=[arm.name for arm in ARMS], help="these arms")
    parser.add_argument("--quick", action="store_true", help="4 problems, one turn")
    arguments = parser.parse_args(argv)
    if bool(arguments.url) != bool(arguments.stock_url):
        parser.error("--url and --stock-url go together")
    if arguments.url and arguments.top_p is not None:
        parser.error("--top-p: is for servers that are started here")
    if arguments.quick:
        arguments.problems, arguments.turns = 4, 1
    return arguments


if __name__ == "__main__":
    sys.exit(main())
