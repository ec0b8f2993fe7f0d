"""One self-contained page of what was measured: ``report.html`` beside the files of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import binomtest

from benchmarks.charts import Bar, Point, legend, lines, scatter, stacked_bars
from benchmarks.result_files import read
from rksc_sgl.errors import RkscError

STAGES = ("prefix", "prefill", "decode", "verify")
READS = ("found cached", "taken over (blend)", "computed")
KIND_SAYS = {
    "identical": "Equal prompts, the common prefix computed ahead of them",
    "divergent": "Each branch begins differently and reads the same material",
    "together": "Equal prompts that arrive together from a plain client",
    "tree": "A tree of three levels",
    "saturated": "Many forks at once (stages are shares of the whole time)",
}
HEADLINES = {
    "identical_vs_none": "identical prefix, over no reuse",
    "divergent_vs_none": "other openings, over no reuse",
    "divergent_vs_stock": "other openings, over SGLang",
    "together_vs_stock": "arriving together, over SGLang",
    "tree_vs_stock": "tree, over SGLang",
    "saturated_vs_stock": "many forks at once, over SGLang",
}
LOAD_ARMS = {"ours": "ours", "opted_in": "opted in", "noise": "stock again"}
LOAD_FIGURES = {
    "throughput": "Output tokens a second",
    "ttft_p50": "Time to first token, p50",
    "ttft_p99": "Time to first token, p99",
    "tpot_p50": "Time per output token, p50",
}
STYLE = Path(__file__).with_suffix(".css")


def make(directory: Path) -> Path:
    """Write the page of all files of results in a directory.

    Raises:
        RkscError: there is none, or one that cannot be read.
    """
    files = {path.stem: read(path) for path in sorted(directory.glob("*.json"))}
    if not files:
        raise RkscError(f"{directory}: has no files of results; make them: rksc bench")
    parts = ["<h1>Multi-branch reasoning on SGLang: what rksc_sgl is worth</h1>"]
    if "pipeline" in files:
        parts += _pipeline(files["pipeline"])
    if "ablation" in files:
        parts += _ablation(files["ablation"])
    if "load" in files:
        parts += _load(files["load"])
    if "sibling_stop" in files:
        parts += _stopping(files["sibling_stop"])
    parts.append("<h2>Everything that was measured</h2>")
    parts += [_all_of(name, content) for name, content in files.items()]
    page = directory / "report.html"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>rksc bench</title>'
    page.write_text(
        f'<!doctype html><html lang="en"><head>{head}<meta name="color-scheme" content="light dark">'
        f"<style>{STYLE.read_text()}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    return page


def machine_of(made: Mapping[str, Any]) -> str:
    """On what something was measured, in words."""
    memory = f"{made['memory_gb']:.0f} GB"
    cores = f"{made['cores']} core{'s' if made['cores'] > 1 else ''}"
    where = made["accelerator"] or f"{made['cpu']}, {cores}, no GPU"
    return f"{where}, {memory}; SGLang {made['sglang']}, torch {made['torch']}, rksc_sgl {made['rksc_sgl']}"


def _pipeline(content: Mapping[str, Any]) -> list[str]:
    settings, cells = content["settings"], content["cells"]
    usual = [
        cell for cell in cells if (cell["branches"], cell["material"]) == (settings["branches"], settings["material"])
    ]
    said = (
        f"{settings['model_path']}, {settings['problems']} problems of GSM8K a kind after about {settings['material']} "
        f"tokens of worked ones, {settings['branches']} branches of {settings['tokens']} tokens. "
        f"{machine_of(content['made'])}. The same model, platform and attention in every arm."
    )
    parts = [f"<p>{escape(said)}</p>", _tiles(content), "<h2>Time by stage</h2>"]
    parts.append(
        "<p>Mean over problems; whiskers reach from the fastest problem to the slowest. At the right: how much faster "
        "ours is, with the 95% interval. “stock again” is the baseline against itself.</p>"
    )
    parts.append(legend(STAGES))
    for cell in usual:
        parts += [f"<h3>{escape(_title(cell))}</h3>", _stages(cell)]
    parts += [
        "<h2>Reuse and recompute</h2>",
        "<p>Tokens of the branches' prompts; in brackets how the branches shared, as the server reported it.</p>",
        legend(READS),
    ]
    for cell in usual:
        parts += [f"<h3>{escape(_title(cell))}</h3>", _reads(cell)]
    parts += _sizes(cells, settings)
    if content["defaults"]:
        parts += _defaults(content["defaults"])
    return parts


def _title(cell: Mapping[str, Any]) -> str:
    return f"{cell['kind']}: {KIND_SAYS[cell['kind']]}"


def _tiles(content: Mapping[str, Any]) -> str:
    figures, tiles = content["figures"], []
    cells = {cell["kind"]: cell for cell in reversed(content["cells"])}
    for name, said in HEADLINES.items():
        if figures.get(name) is None:
            continue
        kind, _, other = name.partition("_vs_")
        _, low, high = cells[kind]["ratios"][other]
        tiles.append(
            f"<div><b>{figures[name]:.2f}×</b>{escape(said)}<br><small>95%: {low:.2f} to {high:.2f}</small></div>"
        )
    noise = f"<small>the baseline against itself: {figures['noise']:.3f}</small>" if figures["noise"] else ""
    return f'<div class="tiles">{"".join(tiles)}</div><p>{noise}</p>'


def _stages(cell: Mapping[str, Any]) -> str:
    bars = []
    for name, arm in cell["arms"].items():
        note = f"{fmean(arm['seconds']):.2f} s"
        if name in cell["ratios"]:
            ratio, low, high = cell["ratios"][name]
            note += f"; {ratio:.2f}× ({low:.2f}–{high:.2f})"
        # what lies between the stages is the client's, and little
        parts = {stage: fmean(arm["stages"][stage]) for stage in STAGES}
        bars.append(Bar(name, parts, min(arm["seconds"]), max(arm["seconds"]), note))
    return stacked_bars(bars, STAGES, "seconds")


def _reads(cell: Mapping[str, Any]) -> str:
    bars = []
    for name, arm in cell["arms"].items():
        taken = arm["taken"]
        counts = (arm["cached"], taken, arm["prompt"] - arm["cached"] - taken)
        parts = {read: count / len(arm["seconds"]) for read, count in zip(READS, counts, strict=True)}
        modes = ", ".join(f"{mode} {count}" for mode, count in arm["modes"].items())
        bars.append(Bar(name, parts, note=f"[{modes}]"))
    return stacked_bars(bars, READS, "tokens a problem")


def _sizes(cells: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[str]:
    parts: list[str] = []
    for kind in ("identical", "divergent"):
        own = [cell for cell in cells if cell["kind"] == kind]
        for varied, fixed, said in (
            ("branches", "material", "branches"),
            ("material", "branches", "tokens of material"),
        ):
            row = sorted((one for one in own if one[fixed] == settings[fixed]), key=lambda one: one[varied])
            if len(row) > 1:
                series = {
                    arm: [_point(cell[varied], cell["arms"][arm]["seconds"]) for cell in row]
                    for arm in ("none", "stock", "ours")
                }
                parts += [f"<h3>{kind}, by {said}</h3>", lines(series, said, "seconds a problem")]
    if parts:
        said = "<p>Mean over problems; whiskers reach from the fastest problem to the slowest.</p>"
        parts = ["<h2>Cost against branches and length</h2>", said, *parts]
    return parts


def _point(x: float, seconds: Sequence[float]) -> Point:
    return Point(x, fmean(seconds), min(seconds), max(seconds))


def _defaults(defaults: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = ["<h2>Tokens against accuracy, with a user's defaults</h2>"]
    for one in defaults:
        answers, stock = one["answers"], one["tokens"]["stock"]
        points = {}
        for name, accuracy in one["accuracy"].items():
            interval = binomtest(round(accuracy * answers), answers).proportion_ci()
            share = 100 * one["tokens"][name] / stock
            points[name] = [Point(share, 100 * accuracy, 100 * interval.low, 100 * interval.high, name)]
        ratios = "; ".join(
            f"{name}: {ratio:.2f}× ({low:.2f}–{high:.2f}), the same answer in {one['same_answer'][name]:.0%}"
            for name, (ratio, low, high) in one["ratios"].items()
        )
        said = f"{one['problems']} problems of {one['source']}, {one['at_once']} at once. Faster than stock: {ratios}."
        parts += [
            f"<h3>{one['branches']} branches</h3><p>{escape(said)} Whiskers: 95%.</p>",
            legend(list(points)),
            scatter(points, "tokens, % of stock's", "right answers, %"),
        ]
    return parts


def _ablation(content: Mapping[str, Any]) -> list[str]:
    figures, bars = content["figures"], []
    for name, one in figures["without"].items():
        low, high = one["interval"]
        again = f"{one['noise']:.2f} ({one['noise_interval'][0]:.2f}–{one['noise_interval'][1]:.2f})"
        bars.append(Bar(name, {"without": one["ratio"]}, low, high, f"{one['ratio']:.2f}×; noise {again}"))
    missing = [f"{name}: {why}" for name, why in figures["not_measured"].items()]
    said = (
        f"{figures['model']}, {figures['problems']} problems a kind of forks, {figures['branches']} branches, material "
        f"of about {figures['material']} tokens. Time without a mechanism over the time with all of them; whiskers: "
        "95%. Noise: everything against itself."
    )
    parts = ["<h2>What each mechanism is worth</h2>", f"<p>{escape(said)}</p>"]
    if bars:
        parts.append(stacked_bars(bars, ["without"], "times as long without it"))
    if missing:
        parts.append(f"<p>Not measured: {escape('; '.join(missing))}.</p>")
    return parts


def _load(content: Mapping[str, Any]) -> list[str]:
    figures = content["figures"]
    said = (
        f"{figures['model']}, SGLang's own load generator: {figures['requests']} requests in {figures['groups']} "
        f"groups with {figures['common']} common tokens. Times better than stock SGLang (above 1: more tokens a "
        "second, or less time), medians over rounds; whiskers: 95%. “stock again” is the noise."
    )
    parts = ["<h2>Under load</h2>", f"<p>{escape(said)}</p>", legend(list(LOAD_ARMS.values()))]
    for name, title in LOAD_FIGURES.items():
        series: dict[str, list[Point]] = {arm: [] for arm in LOAD_ARMS.values()}
        for concurrency, cell in figures["by_concurrency"].items():
            for key, arm in LOAD_ARMS.items():
                ratio = f"{name}_ratio_{key}"
                series[arm].append(Point(float(concurrency), cell[ratio], *cell["intervals"][ratio]))
        parts += [f"<h3>{title}</h3>", lines(series, "requests at once", "times better than stock")]
    return parts


def _stopping(content: Mapping[str, Any]) -> list[str]:
    figures = content["figures"]
    points: dict[str, list[Point]] = {}
    for policy, sizes in figures["policies"].items():
        for size, one in sizes.items():
            same = 100 * (1 - one["answer_same_as_full"])
            bound = 100 * (1 - one["same_lower95"])
            saved = 100 * (1 - one["tokens_fraction"])
            points.setdefault(policy, []).append(Point(saved, same, same, bound, size))
    return [
        "<h2>Risk against saving</h2>",
        f"<p>{figures['problems']} recorded forks, replayed under each policy of stopping; numbers are branches. "
        "Whiskers end at the 95% bound.</p>",
        legend(list(points)),
        scatter(points, "tokens saved, %", "another answer than all branches, %"),
    ]


def _all_of(name: str, content: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>" for key, value in content["figures"].items()
    )
    made = content["made"]
    return (
        f"<h3>{escape(name)}</h3><p><code>{escape(content.get('command', ''))}</code><br>{escape(machine_of(made))}; "
        f"{escape(made['at'])}</p><table>{rows}</table>"
    )
