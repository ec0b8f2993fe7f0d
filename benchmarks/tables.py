"""The tables of README and docs that show results: written from the files of ``rksc bench``, never by hand.

    python -m benchmarks.tables          # writes them; a test fails where a table and its file part

A document holds a place for each: ``<!-- rksc bench: NAME -->`` up to ``<!-- end -->``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.report import machine_of
from benchmarks.result_files import read
from rksc_sgl.errors import RkscError

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/measurements.md")
RESULTS = ROOT / "benchmarks/results"
PLACE = re.compile(r"<!-- rksc bench: (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)
FIGURES_OF_LOAD = {
    "throughput": "output, tokens a second",
    "input_throughput": "input, tokens a second",
    "ttft_p50": "time to first token, p50, ms",
    "ttft_p99": "time to first token, p99, ms",
    "tpot_p50": "time per output token, p50, ms",
}
MISSING = "Not measured yet: `rksc bench` makes this table.\n"


def headline(content: Mapping[str, Any]) -> str:
    """The article's figures and ours beside them."""
    figures, cells = content["figures"], {cell["kind"]: cell for cell in reversed(content["cells"])}

    def shown(kind: str, arm: str) -> str:
        if kind not in cells:
            return "not run"
        ratio, low, high = cells[kind]["ratios"][arm]
        return f"**{ratio:.2f}** ({low:.2f} to {high:.2f})"

    branches = content["settings"]["branches"]
    rows = [
        (f"{branches} branches of one prompt, over no KV reuse", "3.008 mean, 3.990 peak", shown("identical", "none")),
        ("the same, over SGLang's prefix cache", "1.66, over a stand-in for one", shown("identical", "stock")),
        (f"{branches} openings before the same material, over no KV reuse", "", shown("divergent", "none")),
        ("the same, over SGLang's prefix cache", "", shown("divergent", "stock")),
        (f"{branches} siblings that arrive together, over SGLang's prefix cache", "", shown("together", "stock")),
        ("tree of three levels, over SGLang's prefix cache", "", shown("tree", "stock")),
        ("many forks at once, over SGLang's prefix cache", "", shown("saturated", "stock")),
    ]
    if content["defaults"]:
        ratio = _ratio(content["defaults"][0]["ratios"]["certain"])
        same = f"same answer in {figures['same_answer']:.0%}, stock's own in {figures['same_answer_noise']:.0%}"
        rows.append(("votes that stop when decided, over stock with all branches", "", f"{ratio}; {same}"))
    return _table(("times faster", "article", "here (95%)"), rows) + f"\n{_conditions(content)}\n"


def pipeline(content: Mapping[str, Any]) -> str:
    """Every kind and arm at the usual size."""
    settings, rows = content["settings"], []
    for cell in content["cells"]:
        if (cell["branches"], cell["material"]) == (settings["branches"], settings["material"]):
            rows += [(cell["kind"], *_arm(cell, name)) for name in cell["arms"]]
    columns = ("kind", "arm", "seconds", "of these verification", "prompt tokens computed", "ours is faster by")
    return _table(columns, rows) + f"\n{_conditions(content)}\n"


def sizes(content: Mapping[str, Any]) -> str:
    """What changes with branches and material."""
    rows = []
    for cell in content["cells"]:
        if cell["kind"] in ("identical", "divergent"):
            versus = [_ratio(cell["ratios"][arm]) for arm in ("none", "stock")]
            rows.append((cell["kind"], str(cell["branches"]), str(cell["material"]), *versus, _ratio(cell["noise"])))
    return _table(("kind", "branches", "material", "over no reuse", "over stock", "noise"), rows)


def defaults(content: Mapping[str, Any]) -> str:
    """What a user gets who asks for nothing."""
    rows = []
    for one in content["defaults"]:
        for arm, seconds in one["seconds"].items():
            ratio, same = one["ratios"].get(arm), one["same_answer"].get(arm)
            rows.append(
                (
                    str(one["branches"]),
                    arm,
                    f"{fmean(seconds):.2f}",
                    str(one["tokens"][arm]),
                    f"{one['accuracy'][arm]:.0%}",
                    "" if same is None else f"{same:.0%}",
                    "" if ratio is None else _ratio(ratio),
                )
            )
    columns = ("branches", "arm", "seconds a round", "tokens", "right", "stock's answer", "faster than stock by")
    return _table(columns, rows)


def ablation(content: Mapping[str, Any]) -> str:
    """What each mechanism is worth."""
    figures, rows = content["figures"], []
    for name, one in figures["without"].items():
        if "same_answer" in one:
            same = f"answers {one['same_answer']:.0%}, again {one['same_answer_noise']:.0%}"
        else:
            same = f"tokens: {'yes' if one['equal_tokens'] else 'NO'}"
        ratio, noise = ([one[key], *one[f"{before}interval"]] for key, before in (("ratio", ""), ("noise", "noise_")))
        rows.append((name, one["kind"], one["replaced_by"], _ratio(ratio), _ratio(noise), same))
    columns = ("without", "forks", "instead", "times as long", "noise", "same")
    missing = "".join(f" Not measured: {name} ({why})." for name, why in figures["not_measured"].items())
    asked = (
        f"{figures['problems']} problems a kind, {figures['branches']} branches, material of about "
        f"{figures['material']} tokens"
    )
    said = f"`{content['command']}`: {figures['model']}, {asked}; {machine_of(content['made'])}.{missing}"
    return _table(columns, rows) + f"\n{said}\n"


def load(content: Mapping[str, Any]) -> str:
    """Under SGLang's own load generator."""
    figures, rows = content["figures"], []
    for concurrency, cell in figures["by_concurrency"].items():
        for name, said in FIGURES_OF_LOAD.items():
            arms = [f"{name}_ratio_{arm}" for arm in ("ours", "opted_in", "noise")]
            ratios = [_ratio([cell[arm], *cell["intervals"][arm]]) for arm in arms]
            rows.append((concurrency, said, f"{cell['medians']['stock'][name]:,.1f}", *ratios))
    asked = (
        f"{figures['requests']} requests in {figures['groups']} groups, {figures['common']} common tokens, "
        f"{figures['own']} of their own, {figures['tokens']} generated"
    )
    equal = "yes" if figures["equal_tokens"] else "NO"
    said = f"`{content['command']}`: {figures['model']}, {asked}; {machine_of(content['made'])}. Equal tokens: {equal}."
    columns = ("at once", "figure", "stock", "ours, times better", "opted in", "noise")
    return _table(columns, rows) + f"\n{said}\n"


TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "headline": ("pipeline", headline),
    "pipeline": ("pipeline", pipeline),
    "sizes": ("pipeline", sizes),
    "defaults": ("pipeline", defaults),
    "ablation": ("ablation", ablation),
    "load": ("load", load),
}


def filled(text: str, results: Path = RESULTS) -> str:
    """A document with its tables as the files of results have them.

    Raises:
        RkscError: a place names no table.
    """

    def table(place: re.Match[str]) -> str:
        name = place[1]
        if name not in TABLES:
            raise RkscError(f"rksc bench: {name}: there is no such table; there are {', '.join(TABLES)}")
        benchmark, made = TABLES[name]
        path = results / f"{benchmark}.json"
        return f"<!-- rksc bench: {name} -->\n{made(read(path)) if path.exists() else MISSING}<!-- end -->"

    return PLACE.sub(table, text)


def _arm(cell: Mapping[str, Any], name: str) -> tuple[str, ...]:
    arm = cell["arms"][name]
    runs = len(arm["seconds"])
    computed = (arm["prompt"] - arm["cached"] - arm["taken"] + arm["judged"]) / runs
    ratio = cell["ratios"].get(name)
    return (
        name,
        f"{fmean(arm['seconds']):.2f}",
        f"{fmean(arm['stages']['verify']):.2f}",
        f"{computed:,.0f}",
        "" if ratio is None else _ratio(ratio),
    )


def _ratio(one: Sequence[float]) -> str:
    return f"{one[0]:.2f} ({one[1]:.2f} to {one[2]:.2f})"


def _conditions(content: Mapping[str, Any]) -> str:
    settings, figures = content["settings"], content["figures"]
    command = content.get("command", "python -m benchmarks.pipeline")
    asked = (
        f"{settings['problems']} GSM8K problems after about {settings['material']} tokens of worked ones, "
        f"{settings['branches']} branches of {settings['tokens']} tokens, every branch verified"
    )
    return (
        f"`{command}`: {settings['model_path']}, {asked}; {machine_of(content['made'])}. SGLang runs on the same "
        f"platform with the same attention, and verifies by a judge's prompt; against itself it measures "
        f"{figures['noise']:.3f}. Equal tokens in all arms: {'yes' if figures['equal_tokens'] else 'NO'}."
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text()
        after = filled(before)
        path.write_text(after)
        print(f"{name}: {'as it was' if after == before else 'tables written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
