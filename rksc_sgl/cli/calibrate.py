"""``rksc calibrate``: a profile for one model and one verification question."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from platformdirs import user_cache_path
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from rksc_sgl.calibration import workload
from rksc_sgl.calibration.certificate import Certificate, certificate
from rksc_sgl.calibration.plot import plot_risk
from rksc_sgl.calibration.profile import Profile, load
from rksc_sgl.calibration.trace_store import TraceStore, as_traces
from rksc_sgl.cli.serve import server_arguments
from rksc_sgl.errors import OptionError, RkscError
from rksc_sgl.exit_settings import TRACE_VARIABLE, profile_directory
from rksc_sgl.frontend.calibrating import Prompts, collect, prompts_of, skip_traces
from rksc_sgl.frontend.endpoint import Endpoint
from rksc_sgl.frontend.labels import LabelTokens, resolve_labels
from rksc_sgl.frontend.tracing import question_ids
from rksc_sgl.frontend.verify import DEFAULT_QUESTION
from rksc_sgl.server_process import ServerProcess

DEFAULT_DELTAS = (0.005, 0.01, 0.02, 0.05)
LAYERS_SHARE = 0.8  # an exit later than this saves too little to look


@dataclass(frozen=True)
class Plan:
    """What is to be calibrated."""

    question: str
    labels: tuple[str, ...]
    forks: list[workload.WorkloadFork]
    source: str
    deltas: tuple[float, ...]
    alpha: float
    seed: int


def calibrate(
    model_path: Annotated[
        str | None, typer.Option(help="Model to calibrate: an embedded model's name, a Hugging Face id, or a path.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="A running server, started with `rksc serve --rksc-trace`.")] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help='Your workload: {"problem": ..., "answers": [...]} a line. Default: built in.')
    ] = None,
    forks: Annotated[int, typer.Option(min=20, help="Forks of the built-in workload.")] = 1000,
    branches: Annotated[int, typer.Option(min=1, help="Answers a fork of the built-in workload.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the built-in workload and of the split.")] = 0,
    question: Annotated[str, typer.Option(help="The verification question.")] = DEFAULT_QUESTION,
    labels: Annotated[str, typer.Option(help="What the model may reply, the affirmative first.")] = "YES,NO",
    delta: Annotated[list[float], typer.Option(help="Risk to certify; may be given several times.")] = list(  # noqa: B006
        DEFAULT_DELTAS
    ),
    alpha: Annotated[float, typer.Option(help="1 - confidence of each certificate.")] = 0.05,
    out: Annotated[Path | None, typer.Option(help="The profile. Default: in the cache, where servers look.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of risk against saving. Default: beside the profile.")] = None,
    traces: Annotated[Path | None, typer.Option(help="Directory of the traces, to go on from. Default: cache.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Certify early exits of verification for one model and one question, and write the profile.

    Full-depth verifications of a workload are traced on a real server; a read-out a layer is fitted on some of the
    forks, thresholds are certified on others (Learn-then-Test), and the rest shows what they do. Interrupted, it
    goes on from the traces that it has.
    """
    if (model_path is None) == (url is None):
        raise OptionError("--model-path or --url: give one of the two")
    built_in = f"built-in mix, {forks} forks of {branches}, seed {seed}"
    plan = Plan(
        question=question.replace("{labels}", " or ".join(label.strip() for label in labels.split(","))),
        labels=tuple(label.strip() for label in labels.split(",")),
        forks=workload.from_jsonl(jsonl)
        if jsonl
        else list(workload.built_in(forks, branches=branches, seed=seed, families=workload.CALIBRATION_FAMILIES)),
        source=f"{jsonl.name}, {_digest(jsonl.read_bytes())}" if jsonl else built_in,
        deltas=tuple(sorted(set(delta))),
        alpha=alpha,
        seed=seed,
    )
    with _server(model_path, url) as endpoint:
        profile, found = run(endpoint, plan, traces, quiet=as_json)
    target = out or profile_directory() / profile.file_name
    profile.save(target)
    picture = plot or target.with_suffix(".png")
    plot_risk(profile, picture)
    load(target)
    if as_json:
        print(json.dumps(_summary(profile, found, target, picture)))
    else:
        _show(profile, found, target, picture)
    if not profile.points:
        raise RkscError(
            f"no exit rule could be certified at {', '.join(f'{value:g}' for value in plan.deltas)}: take more forks "
            "(299 without an error are needed for 0.01) or a larger --delta; the profile says so to servers"
        )


def run(endpoint: Endpoint, plan: Plan, directory: Path | None, *, quiet: bool) -> tuple[Profile, Certificate]:
    """Trace what is missing, fit and certify."""
    facts = _server_facts(endpoint)
    tokens = resolve_labels(plan.labels, endpoint.tokenize)
    bar = {"disable": quiet, "file": sys.stderr, "dynamic_ncols": True}
    prompts: list[Prompts] = []
    for index, fork in enumerate(tqdm(plan.forks, desc="tokenize", unit="fork", **bar)):
        prompts.append(prompts_of(endpoint, index, fork, plan.question))
    asked = question_ids(endpoint, plan.question, [ids for one in prompts for ids in one.ids])
    model_layers = facts["layers"]
    layers = tuple(range(2, int(LAYERS_SHARE * model_layers) + 1, 2)) or (1,)
    store = _store(plan, facts, asked, tokens, layers, directory)
    with tqdm(total=len(prompts), desc="verify at full depth", unit="fork", **bar) as shown:
        collect(endpoint, prompts, tokens, layers, store, lambda done: _step(shown, done))
    records = [store.get(one.index) for one in prompts]
    traces = as_traces(records, layers, model_layers)
    found = certificate(traces, skip_traces(records), plan.deltas, plan.alpha, seed=plan.seed)
    profile = Profile(
        model_fingerprint=facts["fingerprint"],
        question_ids=asked,
        yes_ids=tokens.ids[0],
        no_ids=tuple(token for ids in tokens.ids[1:] for token in ids),
        layers=model_layers,
        readouts=found.readouts,
        points=found.points,
        alpha=plan.alpha,
        skip_points=found.skip_points,
        curve=found.curve,
        workload=plan.source,
    )
    return profile, found


@contextlib.contextmanager
def _server(model_path: str | None, url: str | None) -> Iterator[Endpoint]:
    if url is not None:
        yield Endpoint(url)
        return
    assert model_path is not None
    before = os.environ.get(TRACE_VARIABLE)
    os.environ[TRACE_VARIABLE] = "1"
    try:
        arguments = server_arguments(["--model-path", model_path])
        print(f"rksc: starting a server of {model_path}", file=sys.stderr)
        with ServerProcess(arguments) as server:
            yield Endpoint(server.url)
    finally:
        if before is None:
            del os.environ[TRACE_VARIABLE]
        else:
            os.environ[TRACE_VARIABLE] = before


def _server_facts(endpoint: Endpoint) -> dict[str, Any]:
    info = endpoint.rksc_info()
    if info is None:
        raise RkscError(f"{endpoint.base_url} runs without the rksc plugin; start it with `rksc serve --rksc-trace`")
    exits: dict[str, Any] = info["schedulers"][0]["exit"]
    if not exits["trace"]:
        raise RkscError(f"{endpoint.base_url} gives no traces; start it with `rksc serve --rksc-trace`")
    if exits["fingerprint"] is None:
        raise RkscError(f"{endpoint.base_url}: no fingerprint could be taken of the model; its log says why")
    return exits


def _store(
    plan: Plan,
    facts: dict[str, Any],
    asked: tuple[int, ...],
    tokens: LabelTokens,
    layers: tuple[int, ...],
    directory: Path | None,
) -> TraceStore:
    content = _digest(json.dumps([asdict(fork) for fork in plan.forks], sort_keys=True).encode())
    description = {
        "model": facts["fingerprint"],
        "question_ids": list(asked),
        "label_ids": [list(ids) for ids in tokens.ids],
        "layers": list(layers),
        "workload": content,
    }
    name = _digest(json.dumps(description, sort_keys=True).encode())
    return TraceStore(directory or user_cache_path("rksc") / "traces" / name, description)


def _step(bar: Any, done: int) -> None:
    bar.update(done)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _summary(profile: Profile, found: Certificate, target: Path, picture: Path) -> dict[str, Any]:
    return {
        "profile": str(target),
        "plot": str(picture),
        "alpha": profile.alpha,
        "workload": profile.workload,
        "r2": {str(layer): round(value, 4) for layer, value in found.r2.items()},
        "points": [asdict(point) for point in profile.points],
        "skip_points": [asdict(point) for point in profile.skip_points],
        "test": [asdict(figures) for figures in found.test],
    }


def _show(profile: Profile, found: Certificate, target: Path, picture: Path) -> None:
    table = Table(title=f"Certified with confidence {1 - profile.alpha:.0%} ({profile.workload})")
    for column in ("risk", "threshold", "layers run", "covers", "flips on unseen forks", "other branch"):
        table.add_column(column, justify="right")
    for point, figures in zip(profile.points, found.test, strict=True):
        table.add_row(
            f"{point.delta:g}",
            f"{point.t:g}",
            f"{point.layers_fraction:.0%}",
            "verdicts and selection" if point.selection_certified else "verdicts only",
            f"{figures.flips} of {figures.calls}",
            f"{figures.selected_differs} of {figures.groups}",
        )
    console = Console()
    console.print(table)
    best = max(found.r2, key=lambda layer: found.r2[layer])
    console.print(f"read-outs: R2 {found.r2[best]:.2f} at layer {best} of {profile.layers}")
    for skip in profile.skip_points:
        console.print(
            f"skip at risk {skip.delta:g}: {skip.agreement:.0%} agree ({skip.skipped_share:.0%} of the forks)"
        )
    console.print(f"profile {target}\nplot    {picture}")
