"""``rksc calibrate``: a profile for one model and one verification question."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from rksc_sgl.cli.asked_server import asked_server
from rksc_sgl.cli.calibrate_blends import certify_blends
from rksc_sgl.errors import OptionError, RkscError
from rksc_sgl.exit_settings import TRACE_VARIABLE, profile_directory

if TYPE_CHECKING:
    from rksc_sgl.calibration.certificate import Certificate, HeldOutFigures
    from rksc_sgl.calibration.profile import Profile
    from rksc_sgl.calibration.thresholds import CertifiedPoint, SkipPoint

DEFAULT_RISKS = (0.005, 0.01, 0.02, 0.05)


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
    question: Annotated[
        str | None, typer.Option(help="The verification question; {labels} is filled in. Default: verify_gated's own.")
    ] = None,
    labels: Annotated[str, typer.Option(help="What the model may reply, the affirmative first.")] = "YES,NO",
    risk: Annotated[
        list[float] | None,
        typer.Option(
            help=f"Risk to certify; may be given several times. Default: {', '.join(map(str, DEFAULT_RISKS))}.",
            show_default=False,
        ),
    ] = None,
    delta: Annotated[list[float] | None, typer.Option(hidden=True, help="What --risk was called before.")] = None,
    alpha: Annotated[float, typer.Option(help="1 - confidence of each certificate.")] = 0.05,
    out: Annotated[Path | None, typer.Option(help="The profile. Default: in the cache, where servers look.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of risk against saving. Default: beside the profile.")] = None,
    traces: Annotated[Path | None, typer.Option(help="Directory of the traces, to go on from. Default: cache.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    blends: Annotated[
        bool, typer.Option("--blends", help="Certify blends instead, on prompts of --jsonl: share auto then blends.")
    ] = False,
    recompute: Annotated[
        list[float] | None,
        typer.Option(
            help="With --blends: share of the tokens that are computed all the same; several are tried. "
            "Default: 0.3 and 0.1.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="With --blends: of the answers; may be given several times. Default: 0 and 0.7."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="With --blends: of an answer.")] = 256,
) -> None:
    """Certify early exits of verification for one model and one question, and write the profile.

    Full-depth verifications of a workload are traced on a real server; a read-out a layer is fitted on some of the
    forks, thresholds are certified on others (Learn-then-Test), and the rest shows what they do. Interrupted, it
    goes on from the traces that it has. The profile is valid for servers that serve the model in the same way.

    With --blends, forks of your own prompts are answered and verified on exact and on blended KV, and a certificate is
    written where blending loses no more right answers than it wins, and changes no more verdicts, than the risk.
    """
    if (model_path is None) == (url is None):
        raise OptionError("--model-path or --url: give one of the two")
    if blends:
        certify_blends(
            model_path=model_path,
            url=url,
            jsonl=jsonl,
            risks=risk or [],
            alpha=alpha,
            recompute=recompute or [],
            temperatures=temperature or [],
            max_tokens=max_tokens,
            question=question,
            labels=labels,
            out=out,
            traces=traces,
            as_json=as_json,
        )
        return
    if recompute or temperature:
        raise OptionError("--recompute and --temperature: are for --blends only")
    # Not before it is needed: SGLang takes seconds to import.
    from rksc_sgl.calibration import workload
    from rksc_sgl.calibration.plot import plot_risk
    from rksc_sgl.calibration.profile import load
    from rksc_sgl.frontend.calibrating import Plan, calibrate_on, digest
    from rksc_sgl.frontend.verify import DEFAULT_QUESTION

    names = tuple(label.strip() for label in labels.split(","))
    built_in = f"built-in mix, {forks} forks of {branches}, seed {seed}"
    plan = Plan(
        question=(question or DEFAULT_QUESTION).replace("{labels}", " or ".join(names)),
        labels=names,
        forks=workload.from_jsonl(jsonl)
        if jsonl
        else list(workload.built_in(forks, branches=branches, seed=seed, families=workload.CALIBRATION_FAMILIES)),
        source=f"{jsonl.name}, {digest(jsonl.read_bytes())}" if jsonl else built_in,
        risks=risks_of(risk, delta),
        alpha=alpha,
        seed=seed,
    )
    with asked_server(model_path, url, {TRACE_VARIABLE: "1"}) as endpoint:
        profile, found = calibrate_on(endpoint, plan, traces, quiet=as_json)
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
            f"no exit rule could be certified at {', '.join(f'{value:g}' for value in plan.risks)}: take more forks "
            "(299 without an error are needed for 0.01) or a larger --risk; the profile says so to servers"
        )


def risks_of(risk: list[float] | None, delta: list[float] | None) -> tuple[float, ...]:
    """The risks to certify, ascending, each once.

    Args:
        risk: as given with ``--risk``.
        delta: as given with ``--delta``, which is the same by the name that it had before, and warns.

    Raises:
        OptionError: both are given.
    """
    if risk and delta:
        raise OptionError("--delta: is what --risk was called before; give --risk only")
    if delta:
        print("rksc: warning: --delta is called --risk now", file=sys.stderr)
    return tuple(sorted(set(risk or delta or DEFAULT_RISKS)))


def _summary(profile: Profile, found: Certificate, target: Path, picture: Path) -> dict[str, Any]:
    return {
        "profile": str(target),
        "plot": str(picture),
        "alpha": profile.alpha,
        "workload": profile.workload,
        "r2": {str(layer): round(value, 4) for layer, value in found.r2.items()},
        "points": [_plain(point) for point in profile.points],
        "skip_points": [_plain(point) for point in profile.skip_points],
        "test": [_plain(figures) for figures in found.test],
    }


def _plain(row: CertifiedPoint | SkipPoint | HeldOutFigures) -> dict[str, Any]:
    """A row as plain values; ``delta`` is what its risk was called before."""
    return {"delta": row.risk, **asdict(row)}


def _show(profile: Profile, found: Certificate, target: Path, picture: Path) -> None:
    table = Table(title=f"Certified with confidence {1 - profile.alpha:.0%} ({profile.workload})")
    for column in ("risk", "of", "threshold", "layers run", "flips on unseen forks", "other branch"):
        table.add_column(column, justify="right")
    for point, figures in zip(profile.points, found.test, strict=True):
        table.add_row(
            f"{point.risk:g}",
            point.scope,
            f"{point.t:g}",
            f"{point.layers_fraction:.0%}",
            f"{figures.flips} of {figures.calls}",
            f"{figures.selected_differs} of {figures.groups}",
        )
    console = Console()
    console.print(table)
    best = max(found.r2, key=lambda layer: found.r2[layer])
    console.print(f"read-outs: R2 {found.r2[best]:.2f} at layer {best} of {profile.layers}")
    for skip in profile.skip_points:
        console.print(f"skip at risk {skip.risk:g}: {skip.agreement:.0%} agree ({skip.skipped_share:.0%} of the forks)")
    console.print(f"profile {target}\nplot    {picture}")
