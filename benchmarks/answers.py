"""Does sharing cost right answers? Forks whose branches blend or merge, beside the same forks on exact KV.

Each problem is solved by a fork of branches that begin with instructions of their own and then read the same worked
problems and the question (:mod:`benchmarks.answers_items`), greedily. Arms: exact, blend, merge, and exact again, which
is the noise; ``--arms`` runs some of them; caches are flushed between them. The prompt of a fork's first branch is
computed first, so that it is what the others share with; it is exact in every arm and compared in none. Of the others
those are compared that were blended or merged by the server's report. Those that were not are counted by its reason.

Then every branch is verified where it stands, at full depth: do verdicts and selections stay the same on blended KV?
On the exact arm: what is verification worth at all? Intervals are a bootstrap over problems
(:mod:`benchmarks.answers_figures`).

Every problem is appended to a file of recordings when it is done, and a run that was interrupted goes on. ``--replay``,
or ``--recordings`` without a server, only makes the figures again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.answers_arms import ARMS, EXACT, Arms, Settings, Solved, recordings
from benchmarks.answers_figures import COMPARED, summary
from benchmarks.answers_items import OPENINGS, SOURCES, Item, items
from rksc_sgl import Endpoint
from rksc_sgl.cache_directory import cache_directory
from rksc_sgl.errors import OptionError, RkscError
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess


def record(url: str, asked: Sequence[Item], options: argparse.Namespace) -> None:
    """Solve the problems that the file does not have yet.

    Raises:
        OptionError: the file holds runs of other settings.
        RkscError: a branch failed, or the server went away; what was finished is in the file.
    """
    endpoint = Endpoint(url)
    names = [name for name in ARMS if name in options.arms]
    settings = Settings(
        *(_model_of(endpoint), options.seed, options.branches, options.worked, options.max_tokens, names),
        shared_slots=endpoint.shares_slots(),
    )
    file = recordings(options.recordings)
    done = {row.key for row in file.resume(settings)}
    missing = [item for item in asked if item.key not in done]
    arms = Arms(endpoint, options.max_tokens, names)
    total, known = len(asked) * len(names), (len(asked) - len(missing)) * len(names)
    bar = tqdm(total=total, initial=known, desc="answers", unit="fork", file=sys.stderr)
    with file.appending() as append, bar:
        for item in missing:
            append(arms.solve(item, bar.update))


def result_of(settings: Settings, rows: Sequence[Solved]) -> dict[str, Any]:
    """The last line."""
    sources = list(dict.fromkeys(row.source for row in rows))
    return {
        "settings": asdict(settings),
        "all": summary(rows),
        "sources": {source: summary([row for row in rows if row.source == source]) for source in sources},
    }


def show(result: Mapping[str, Any]) -> None:
    """Tables for people."""
    console = Console(file=sys.stderr, width=132)
    parts = dict(result["sources"]) if len(result["sources"]) > 1 else {}
    for name, figures in {**parts, "all": result["all"]}.items():
        console.print(_sharing(name, figures))
        console.print(_verification(name, figures["verification"]))


def _sharing(name: str, figures: Mapping[str, Any]) -> Table:
    ran = [arm for arm in COMPARED if arm in figures]
    table = Table("beside the exact arm", *ran, title=f"{name}: {figures['problems']} problems", box=box.SIMPLE)
    columns = [figures[arm] for arm in ran]
    for label, key in (
        ("branches after the first", "branches"),
        ("of these compared", "pairs"),
        ("right in both", "both"),
        ("lost", "lost"),
        ("won", "won"),
        ("right in neither", "neither"),
        ("accuracy, exact", "accuracy_exact"),
        ("accuracy", "accuracy"),
        ("difference", "difference"),
        ("95%", "interval"),
        ("McNemar's p", "mcnemar_p"),
        ("problems that lose one, at most (95%)", "losing_problems_upper95"),
        ("equal answers", "equal_answers"),
        ("equal texts", "equal_texts"),
        ("prompt tokens computed, of the exact arm's", "computed_fraction"),
    ):
        table.add_row(label, *(_shown(one[key]) for one in columns))
    for label, key in (
        ("equal verdicts", "equal_verdicts"),
        ("equal verdicts on equal texts", "equal_verdicts_on_equal_texts"),
        ("verdicts that are YES, exact", "yes_exact"),
        ("equal selections", "equal_selections"),
        ("equal answers selected", "equal_selected_answers"),
    ):
        table.add_row(label, *(_shown(one["judge"][key]) for one in columns))
    table.add_row("not compared, because", *(_counted(one["declined"]) for one in columns))
    return table


def _verification(name: str, figures: Mapping[str, Any]) -> Table:
    table = Table("what verification is worth", "", "95%", "problems", title=f"{name}, exact arm", box=box.SIMPLE)
    rows = {f"right: {one}": value for one, value in figures["accuracy"].items()}
    rows |= {f"AUC within a problem: {one}": value for one, value in figures["auc_within"].items()}
    for label, value in rows.items():
        table.add_row(label, _shown(value["mean"]), _shown(value["interval"]), str(value["n"]))
    table.add_row("AUC of P(YES), all branches", _shown(figures["auc"]), "", "")
    table.add_row("probability of a label at all", _shown(figures["label_mass"]), "", "")
    return table


def _counted(reasons: Mapping[str, int]) -> str:
    return "\n".join(f"{count}: {reason}" for reason, count in reasons.items())


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return " to ".join(map(_shown, value)) if isinstance(value, list) else f"{value:.4g}"


def _model_of(endpoint: Endpoint) -> str:
    return Path(str(endpoint.model_info["served_model_name"])).name


@contextmanager
def _served(options: argparse.Namespace) -> Iterator[str]:
    if options.url is not None:
        yield options.url
        return
    print(f"starting a server with {options.model_path} ...", file=sys.stderr, flush=True)
    with ServerProcess(server_arguments(["--model-path", options.model_path, *options.server])) as server:
        yield server.url


def _asked(options: argparse.Namespace) -> list[Item]:
    chosen = {"branches": options.branches, "worked": options.worked, "seed": options.seed}
    return [item for source in dict.fromkeys(options.sources) for item in items(source, options.problems, **chosen)]


def _file_of(options: argparse.Namespace) -> Path:
    """Where answers are recorded unless a file is named."""
    name = f"{Path(options.model_path or 'running-server').name}-{options.branches}.jsonl"
    return cache_directory("traces") / "answers" / name.replace(":", "-")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.answers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", help="answers of a server of this model, which is started and ended again")
    parser.add_argument("--url", help="answers of a running server; its cache is flushed, so nobody else may use it")
    parser.add_argument("--recordings", type=Path, metavar="F", help="JSON lines; appended to, or only replayed")
    parser.add_argument("--replay", action="store_true", help="ask no server, make the figures of what is recorded")
    parser.add_argument(
        "--sources", nargs="+", default=list(SOURCES), help=f"gsm8k, reading, reasoning-gym:TASK ({' '.join(SOURCES)})"
    )
    parser.add_argument(
        "--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS), metavar="ARM", help=f"{', '.join(ARMS)} (all)"
    )
    parser.add_argument("--problems", type=int, default=40, help="of each source (40)")
    parser.add_argument("--branches", type=int, default=len(OPENINGS), help=f"of each problem, 2 to {len(OPENINGS)}")
    parser.add_argument("--worked", type=int, default=4, help="worked problems that are read before each (4)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of each branch (256)")
    parser.add_argument("--seed", type=int, default=0, help="of generated problems and of the choice of worked ones")
    parser.add_argument("--server", nargs=argparse.REMAINDER, default=[], help="arguments of the server started; last")
    options = parser.parse_args(arguments)
    if options.url is None and options.model_path is None and options.recordings is None:
        parser.error("--model-path: name a model or, with --url, a running server; or a file of --recordings")
    if EXACT not in options.arms:
        parser.error(f"--arms: all others are compared with {EXACT}; name it too")
    if options.max_tokens < 1:
        parser.error("--max-tokens: must be 1 or more")
    options.replay = options.replay or (options.url is None and options.model_path is None)
    options.recordings = options.recordings or _file_of(options)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    print(f"recordings: {options.recordings}", file=sys.stderr)
    try:
        asked = None if options.replay else _asked(options)
        if asked is not None:
            with _served(options) as url:
                record(url, asked, options)
        settings, rows = recordings(options.recordings).load()
        if asked is not None:
            keys = {item.key for item in asked}
            rows = [row for row in rows if row.key in keys]
        if not rows:
            raise OptionError(f"recordings: {options.recordings} has no answers")
        result = result_of(settings, rows)
    except RkscError as error:
        print(f"answers: {error}", file=sys.stderr)
        return 1
    show(result)
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
