"""An evaluation harness from PyPI against one server, unchanged but for the URL: ``/v1`` and ``/rksc/v1``.

    python -m benchmarks.harness --source reading --problems 24

lm-eval's ``local-chat-completions`` with a task file of its own making, in an environment of its own that is made here
with uv (SGLang pins what it needs in other releases). It speaks OpenAI's API, knows nothing of us, and grades by
itself: a regular expression and an exact match. ``/rksc/v1`` runs the server's default fork of ``--branches``.

Tokens are those that went through the server's model, by SGLang's own counter; caches are flushed before each run,
which of the two begins alternates. Seconds are those from the first such token to the last, seen every quarter of one:
lm-eval takes longer to start. The last line is JSON.
"""

from __future__ import annotations

import argparse
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

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.computed_tokens import METRICS, ComputedTokens, computed_tokens, flush
from benchmarks.environments import environment
from programs.problems import GSM8K, READING, Problem, load_problems
from rksc_sgl.errors import RkscError
from rksc_sgl.model_fetch import DEFAULT_MODEL
from rksc_sgl.server_arguments import server_arguments, take_switches
from rksc_sgl.server_process import ServerProcess

PACKAGES = ["lm_eval[api]==0.4.13"]
TASK = "rksc_items"
TIMEOUT_S = 3600  # of one request, which is a whole fork; lm-eval gives up after 300 s otherwise
LOOK_S = 0.25  # between two looks at the server's counters
ROUTES = ("/v1", "/rksc/v1")
METRIC = "exact_match,answer"
SHOTS = 3  # worked examples before each item, where the source has some
# What lm-eval takes for the answer: its own GSM8K task's last number, and what is stated.
ANSWERS: dict[str, dict[str, Any]] = {
    GSM8K: {"function": "regex", "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)", "group_select": -1},
    READING: {"function": "regex", "regex_pattern": r"(answer is [^.\n]+)"},
}


@dataclass(frozen=True)
class Run:
    """One run of the harness."""

    accuracy: float
    seconds: float
    tokens: ComputedTokens


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    try:
        result = measure(arguments)
    except RkscError as error:
        print(f"harness: {error}", file=sys.stderr)
        return 1
    Console(width=120).print(_table(result))
    print(json.dumps(result))
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of both routes.

    Raises:
        RkscError: the harness or a server could not be run.
    """
    problems = load_problems(arguments.source, arguments.problems, arguments.seed)
    programs = environment("lm-eval", PACKAGES)
    runs: dict[str, list[Run]] = {route: [] for route in ROUTES}
    with _server(arguments) as url, tempfile.TemporaryDirectory() as directory:
        write_task(Path(directory), problems, arguments)
        for turn in range(arguments.turns):
            for route in ROUTES if turn % 2 == 0 else ROUTES[::-1]:
                flush(url)
                before = computed_tokens(url)
                accuracy, seconds = evaluate(programs, Path(directory), url, route, arguments.at_once)
                flush(url)
                tokens = computed_tokens(url) - before
                runs[route].append(Run(accuracy, seconds, tokens))
                said = f"{accuracy:.2f} right, {tokens.computed} tokens, {seconds:.1f} s"
                print(f"turn {turn + 1}: {route}: {said}", file=sys.stderr, flush=True)
    return {
        "model": arguments.model_path,
        "harness": PACKAGES[0],
        "source": arguments.source,
        "problems": len(problems),
        "branches": arguments.branches,
        "temperature": arguments.temperature,
        "at_once": arguments.at_once,
        "turns": arguments.turns,
        "routes": {route: _figures(runs[route]) for route in ROUTES},
    }


def write_task(directory: Path, problems: Sequence[Problem], arguments: argparse.Namespace) -> None:
    """The task file of lm-eval, and its items and worked examples beside it."""
    others = load_problems(arguments.source, SHOTS, arguments.seed + 1)
    shots = [one.examples[0] for one in others if one.examples]
    items = [(one.question, f"answer is {one.reference}" if shots else one.reference) for one in problems]
    files = {"test": items, "shots": shots or items[:1]}
    for name, rows in files.items():
        lines = [json.dumps({"question": question, "reply": reply}) for question, reply in rows]
        (directory / f"{name}.jsonl").write_text("\n".join(lines))
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {name: str(directory / f"{name}.jsonl") for name in files}},
        "test_split": "test",
        "fewshot_split": "shots",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": len(shots),
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{reply}}",
        "generation_kwargs": {
            "until": ["<|im_end|>"],
            "do_sample": True,
            "temperature": arguments.temperature,
            "max_gen_toks": arguments.max_tokens,
        },
        "filter_list": [{"name": "answer", "filter": [ANSWERS[arguments.source], {"function": "take_first"}]}],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "regexes_to_ignore": [",", r"\$", r"\.$"],
            }
        ],
    }
    (directory / f"{TASK}.yaml").write_text(json.dumps(task, indent=1))  # JSON is YAML


def evaluate(programs: Path, directory: Path, url: str, route: str, at_once: int) -> tuple[float, float]:
    """Accuracy, and the seconds in which the server worked.

    Raises:
        RkscError: the harness failed.
    """
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryFile("w+") as log:
        model = f"model=default,base_url={url}{route}/chat/completions"
        model += f",num_concurrent={at_once},max_retries=1,timeout={TIMEOUT_S}"
        command = [str(programs / "lm_eval"), "run", "--model", "local-chat-completions", "--model_args", model]
        command += ["--tasks", TASK, "--include_path", str(directory), "--apply_chat_template", "--output_path", out]
        alone = {"HF_HOME": f"{out}/hf", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}
        with subprocess.Popen(command, env={**os.environ, **alone}, stdout=log, stderr=log) as process:
            try:
                seconds = _seconds_of_work(process, url)
            finally:
                process.kill()
        found = list(Path(out).rglob("results_*.json"))
        if process.returncode or len(found) != 1:
            log.seek(0)
            raise RkscError(f"lm_eval failed: {log.read().strip()[-1000:]}")
        told = json.loads(found[0].read_text())
    return float(told["results"][TASK][METRIC]), seconds


def _seconds_of_work(process: subprocess.Popen[Any], url: str) -> float:
    """Until a process ends: from the first token that the server computes to the last."""
    began, ended, looked, known = None, 0.0, time.perf_counter(), computed_tokens(url)
    while process.poll() is None:
        time.sleep(LOOK_S)
        now = computed_tokens(url)
        if now != known:
            began, ended, known = looked if began is None else began, time.perf_counter(), now
        looked = time.perf_counter()
    return 0.0 if began is None else ended - began


@contextlib.contextmanager
def _server(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.url:
        yield arguments.url
        return
    print(f"starting a server with {arguments.model_path} ...", file=sys.stderr, flush=True)
    fork = json.dumps({"branches": arguments.branches})
    flags, variables = take_switches(["--model-path", arguments.model_path, METRICS, "--rksc-fork", fork])
    with ServerProcess(server_arguments(flags), variables=variables) as server:
        yield server.url


def _figures(runs: Sequence[Run]) -> dict[str, float]:
    seconds = [run.seconds for run in runs]
    mean = lambda values: round(sum(values) / len(runs), 1)  # noqa: E731
    return {
        "accuracy": round(sum(run.accuracy for run in runs) / len(runs), 4),
        "tokens_computed": mean(run.tokens.computed for run in runs),
        "prompts_computed": mean(run.tokens.prompts for run in runs),
        "prompts_cached": mean(run.tokens.cached for run in runs),
        "decoded": mean(run.tokens.decoded for run in runs),
        "seconds": round(statistics.median(seconds), 2),
        "noise": round(max(seconds) / min(seconds), 3),
    }


def _table(result: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("route")
    columns = list(result["routes"][ROUTES[0]])
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for route, figures in result["routes"].items():
        table.add_row(route, *(f"{figures[column]:g}" for column in columns))
    return table


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.harness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", default=DEFAULT_MODEL, help="of the server that is started")
    parser.add_argument("--url", help=f"a server that was started with {METRICS}, and a fork of its own choice")
    parser.add_argument("--source", default=READING, choices=list(ANSWERS))
    parser.add_argument("--problems", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of generated problems")
    parser.add_argument("--branches", type=int, default=8, help="of the fork that /rksc/v1 makes of a request")
    parser.add_argument("--max-tokens", type=int, default=32, help="of each branch")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--at-once", type=int, default=4, help="requests of the harness under way")
    parser.add_argument("--turns", type=int, default=3, help="of each route")
    parser.add_argument("--quick", action="store_true", help="4 problems, one turn")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.problems, arguments.turns = 4, 1
    return arguments


if __name__ == "__main__":
    sys.exit(main())
