"""``rksc calibrate --blends``: a certificate under which ``share="auto"`` blends."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from rksc_sgl.cache_directory import cache_directory
from rksc_sgl.cli.asked_server import asked_server
from rksc_sgl.errors import OptionError, RkscError
from rksc_sgl.exit_settings import profile_directory
from rksc_sgl.options import DEFAULT_MINIMUM_SPAN

if TYPE_CHECKING:
    from rksc_sgl.calibration.blend_certificate import BlendCertificate
    from rksc_sgl.frontend.endpoint import Endpoint

DEFAULT_RISK = 0.01
DEFAULT_SETTINGS = (0.3, 0.1)  # shares that are computed although a donor has them, from the safest on
DEFAULT_TEMPERATURES = (0.0, 0.7)
DEFAULT_TOKENS = 256


def certify_blends(
    *,
    model_path: str | None,
    url: str | None,
    jsonl: Path | None,
    risks: list[float],
    alpha: float,
    recompute: list[float],
    temperatures: list[float],
    max_tokens: int,
    question: str | None,
    labels: str,
    out: Path | None,
    traces: Path | None,
    as_json: bool,
) -> None:
    """Record forks on exact and on blended KV, and write a certificate where one can be given.

    Raises:
        OptionError: naming the option that is wrong or missing.
        RkscError: nothing could be certified, or the server failed.
    """
    from rksc_sgl.calibration.blend_certificate import BlendSetting, forks_needed
    from rksc_sgl.frontend.calibrating import digest
    from rksc_sgl.frontend.calibrating_blends import BlendPlan, certify_on, forks_from_jsonl
    from rksc_sgl.frontend.verify import DEFAULT_QUESTION

    if jsonl is None:
        raise OptionError(
            '--jsonl: blends are certified on prompts of your own: {"branches": ["...", "..."], "answer": "18"} a line'
        )
    if len(risks) > 1:
        raise OptionError("--risk: one risk for a certificate of blends, which is of the answers and of the verdicts")
    shares = sorted(set(recompute or DEFAULT_SETTINGS), reverse=True)
    if not all(0.0 <= one <= 1.0 for one in shares):
        raise OptionError(f"--recompute: must be from 0 to 1, got {', '.join(f'{one:g}' for one in shares)}")
    heats = sorted(set(temperatures or DEFAULT_TEMPERATURES))
    if heats[0] < 0.0:
        raise OptionError(f"--temperature: must be at least 0, got {heats[0]:g}")
    risk, names = (risks or [DEFAULT_RISK])[0], tuple(label.strip() for label in labels.split(","))
    forks = forks_from_jsonl(jsonl)
    graded = forks[0].answer is not None
    if not graded and heats != [0.0]:
        raise OptionError("--temperature: without known answers only 0: sampled answers differ by chance")
    plan = BlendPlan(
        forks=forks,
        source=f"{jsonl.name}, {digest(jsonl.read_bytes())}",
        settings=[BlendSetting(one, DEFAULT_MINIMUM_SPAN) for one in shares],
        temperatures=heats,
        max_tokens=max_tokens,
        question=(question or DEFAULT_QUESTION).replace("{labels}", " or ".join(names)),
        labels=names,
        risk=risk,
        alpha=alpha,
    )
    needed = forks_needed(risk, alpha, graded=graded)
    if len(forks) < needed:
        print(
            f"rksc: warning: {len(forks)} forks cannot certify a risk of {risk:g}, not even without a loss; "
            f"{needed} could",
            file=sys.stderr,
        )
    with asked_server(model_path, url) as endpoint:
        recordings = _file_of(endpoint, plan.source, traces)
        print(f"rksc: recorded in {recordings}", file=sys.stderr)
        made, tested = certify_on(endpoint, plan, recordings, quiet=as_json)
    target = None
    if made is not None:
        target = out or profile_directory() / made.file_name
        made.save(target)
    if as_json:
        print(json.dumps({"certificate": None if target is None else str(target), **_summary(made, tested, plan)}))
    else:
        _show(made, tested, target, plan)
    if made is None:
        raise RkscError(
            f"no setting could be certified at a risk of {risk:g}: take more forks ({needed} without a loss are "
            "needed), a larger --risk, or a larger --recompute; share auto stays exact"
        )


def _file_of(endpoint: Endpoint, source: str, traces: Path | None) -> Path:
    name = Path(str(endpoint.model_info["served_model_name"])).name
    return (traces or cache_directory("traces") / "blends") / f"{name}-{source.rpartition(' ')[2][:16]}.jsonl"


def _summary(made: BlendCertificate | None, tested: Any, plan: Any) -> dict[str, Any]:
    return {
        "risk": plan.risk,
        "alpha": plan.alpha,
        "forks": len(plan.forks),
        "workload": plan.source,
        "recompute": None if made is None else made.setting.recompute,
        "least_tokens": None if made is None else made.least_tokens,
        "tested": [asdict(one) for one in tested],
    }


def _show(made: BlendCertificate | None, tested: Any, target: Path | None, plan: Any) -> None:
    title = f"Blends beside exact KV, {len(plan.forks)} forks ({plan.source}), risk {plan.risk:g}"
    table = Table(title=title, box=box.SIMPLE)
    columns = ("recompute", "temperature", "forks", "computed", "right", "lost", "control", "verdicts", "selected", "p")
    for column in columns:
        table.add_column(column, justify="right")
    for one in tested:
        table.add_row(
            f"{one.recompute:g}",
            f"{one.temperature:g}",
            str(one.forks),
            f"{one.computed:.0%}",
            f"{one.right:.0%}",
            f"{one.lost:+.1%}",
            f"{one.control:+.1%}",
            f"{one.changed:.1%} change",
            f"{one.same_selection:.0%} same",
            f"{one.p:.3g}",
        )
    console = Console(width=120)
    console.print(table)
    if made is not None:
        console.print(
            f"certified with confidence {1 - plan.alpha:.0%}: recompute {made.setting.recompute:g}, for prompts of "
            f"{made.least_tokens} tokens or more. Servers of this model that start from now on blend with share auto; "
            f"without this file they do not:\n{target}",
            soft_wrap=True,
        )
