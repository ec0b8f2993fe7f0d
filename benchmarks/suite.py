"""The benchmarks that say what this is worth: each writes a file of results, and all of them make one page.

    rksc bench --quick

``--quick`` runs the pipelines and the load with few problems and requests, in minutes. Without it every benchmark below
runs, which takes hours on two cores; ``--only`` names some of them. A file of results has the figures, what they were
made of, the command, its seeds, the machine and the versions; ``report.html`` shows them all. Nothing else should run
beside it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.result_files import read, write
from rksc_sgl.errors import RkscError
from rksc_sgl.model_fetch import DEFAULT_MODEL

RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of the suite.

    Attributes:
        name: of its module and of its file of results.
        says: what it measures.
        arguments: of a whole run.
        quick: of a quick one; None where it is left out of it.
        writes: whether it writes its file by itself (``--out``), with more than its last line.
        model: whether it runs a model.
    """

    name: str
    says: str
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] | None = None
    writes: bool = False
    model: bool = True


BENCHMARKS = (
    Benchmark("pipeline", "whole pipelines against no reuse and against SGLang", quick=("--quick",), writes=True),
    Benchmark("ablation", "what each mechanism is worth in the pipelines", quick=("--quick",)),
    Benchmark("load", "SGLang's own load generator, beside stock: ours, and opted in", quick=("--quick",)),
    Benchmark("siblings_together", "from how many common tokens on waiting pays", ("--repeats", "3")),
    Benchmark("divergent_prefix", "blends: prefill, and what they change", ("--quality-sets", "20")),
    Benchmark("blend_rules", "what of a blend has to be computed: computed tokens against what they lose"),
    Benchmark(
        "sibling_stop",
        "what stopping saves, replayed on recorded forks",
        ("--source", "reading", "--problems", "40", "--max-tokens", "32", "--at-once", "64", "--live", "16"),
    ),
    Benchmark("overhead", "what it costs requests that do not opt in"),
    Benchmark("donor_index", "looking up a donor among many prompts", model=False),
    Benchmark("cpu_decode", "the CPU platform", ("--prefixes", "1331", "--batches", "1", "8")),
)


def run(benchmark: Benchmark, model: str, directory: Path, *, quick: bool) -> None:
    """Run one benchmark in a process of its own and write its file of results.

    Raises:
        RkscError: it failed, or its last line is no JSON object.
    """
    arguments = [*((benchmark.quick or ()) if quick else benchmark.arguments)]
    if benchmark.model:
        arguments += ["--model-path", model]
    path = directory / f"{benchmark.name}.json"
    words = ["-m", f"benchmarks.{benchmark.name}", *arguments, *(["--out", str(path)] if benchmark.writes else [])]
    began = time.monotonic()
    process = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    lines = process.stdout.strip().splitlines()
    if process.returncode != 0 or not lines:
        raise RkscError(f"{benchmark.name} ended with exit code {process.returncode}")
    try:
        figures = json.loads(lines[-1])
    except ValueError as error:
        raise RkscError(f"{benchmark.name}: its last line is no JSON: {lines[-1][:200]!r}") from error
    content = read(path) if benchmark.writes else {}
    more = {key: value for key, value in content.items() if key not in ("benchmark", "figures", "made")}
    more |= {
        "command": shlex.join(["python", *words[:2], *arguments]),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    write(path, benchmark.name, figures, **more)
    print(f"{path}: {json.dumps(figures)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    listed = "\n".join(f"  {one.name:18} {one.says}" for one in BENCHMARKS)
    parser = argparse.ArgumentParser(
        prog="rksc bench",
        description=f"{__doc__}\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [one.name for one in BENCHMARKS]
    parser.add_argument("--quick", action="store_true", help="the pipelines and the load, of few problems and requests")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="some of them")
    parser.add_argument("--model-path", default=DEFAULT_MODEL)
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"directory of results and page ({RESULTS})")
    parser.add_argument(
        "--report", action="store_true", help="run nothing, make the page of the results that are there"
    )
    options = parser.parse_args(arguments)
    chosen = [one for one in BENCHMARKS if one.name in options.only and (one.quick is not None or not options.quick)]
    if options.report:
        chosen = []
    elif not chosen:
        parser.error("--only: none of these has a quick run")
    failed = []
    for benchmark in chosen:
        print(f"{benchmark.name}: {benchmark.says} ...", file=sys.stderr, flush=True)
        try:
            run(benchmark, options.model_path, options.out, quick=options.quick)
        except RkscError as error:
            failed.append(benchmark.name)
            print(f"rksc bench: {error}", file=sys.stderr)
    try:
        page = report.make(options.out)
    except RkscError as error:
        print(f"rksc bench: {error}", file=sys.stderr)
        return 1
    print(f"report: {page}", file=sys.stderr)
    print(json.dumps({"ran": [one.name for one in chosen], "failed": failed, "report": str(page)}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
