"""Results that nobody measured, for tests of what is made of results."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import ablation, load, pipeline
from benchmarks.load import Run
from benchmarks.pipeline import AGAIN, DIVERGENT, EXACT, IDENTICAL, IN_PLACE, KINDS, NONE, OURS, STOCK, Cell
from benchmarks.pipeline_arms import Ran
from benchmarks.pipeline_defaults import CERTAIN, PROBABLE, Answers
from benchmarks.result_files import write
from benchmarks.stop_live import Solved

SETTINGS = {"model_path": "a-model", "problems": 2, "branches": 8, "material": 1024, "tokens": 32, "seed": 0}
SECONDS = {NONE: 8.0, STOCK: 2.0, AGAIN: 2.1, IN_PLACE: 1.9, OURS: 1.0, EXACT: 2.0}


def ran(seconds: float, generated: int = 256, prefill: float = 0.5, taken: int = 0) -> Ran:
    """One run, of whose prompts 900 of 1,000 tokens were cached or taken over."""
    stages = {"prefix": 0.0, "prefill": prefill, "decode": seconds / 2, "verify": seconds / 4}
    return Ran(seconds, stages, generated, 8, 1000, 900 - taken, taken, 200, Counter(exact=8))


def cell(kind: str, branches: int = 8, material: int = 1024) -> Cell:
    arms = SECONDS if kind == DIVERGENT else {name: value for name, value in SECONDS.items() if name != EXACT}
    runs = {
        name: [ran(value, taken=700 * (kind == DIVERGENT and name == OURS)), ran(value * 1.1)]
        for name, value in arms.items()
    }
    return Cell(kind, branches, material, runs)


def answers(branches: int = 8) -> Answers:
    rounds = {
        STOCK: [(2.0, [Solved(100, True, "7"), Solved(100, False, None)])],
        AGAIN: [(2.2, [Solved(100, True, "7.0"), Solved(100, False, "3")])],
        CERTAIN: [(1.0, [Solved(50, True, "7"), Solved(60, False, None)])],
        PROBABLE: [(0.5, [Solved(20, False, "8"), Solved(60, False, None)])],
    }
    return Answers(branches, 2, 2, "reading", rounds)


def write_pipeline(directory: Path, **figures: Any) -> Path:
    """A file as ``rksc bench`` makes it, with some figures replaced."""
    cells = [cell(kind) for kind in KINDS[:-1]]
    cells += [cell(kind, *size) for kind in (IDENTICAL, DIVERGENT) for size in pipeline.other_sizes(8, 1024)]
    made = [answers(8), answers(32)]
    path = directory / "pipeline.json"
    write(
        path,
        "pipeline",
        pipeline.summary(cells, made) | figures,
        settings=SETTINGS,
        cells=[one.plain() for one in cells],
        defaults=[one.figures() for one in made],
        command="rksc bench --quick",
    )
    return path


def ablated(kind: str, *names: str, noise: float = 1.0) -> Cell:
    """Two problems of one kind: two seconds without a mechanism, one with everything, where each is at work."""
    on = {"waited": 7, "taken": 700, "left_early": 3, "left_out": 3, "answer": "7"}
    votes = kind == ablation.VOTES
    working = replace(ran(1.0), modes=Counter(exact=1, merge=7), verified=0 if votes else 8, **on)
    arms = {ablation.EVERYTHING: working, ablation.AGAIN: replace(working, seconds=noise)}
    for name in names:
        verified = 5 if name == ablation.SKIP else working.verified
        arms[name] = replace(ran(2.0), verified=verified, judged=400, answer="7.0")
    return Cell(kind, 8, 1024, {name: [one, one] for name, one in arms.items()})


def write_ablation(directory: Path) -> Path:
    """A file as ``rksc bench`` makes it."""
    cells = [
        ablated(ablation.TOGETHER, ablation.SIBLINGS, ablation.IN_PLACE),
        ablated(ablation.VOTES, ablation.SKIP, ablation.STOP),
    ]
    options = Namespace(model_path="a-model", problems=2, branches=8, material=1024, tokens=32, seed=0)
    figures = ablation.summary(cells, {ablation.EXIT: "no profile"}, options)
    path = directory / "ablation.json"
    write(path, "ablation", figures, command="python -m benchmarks.ablation")
    return path


def load_run(value: float, tokens: tuple[tuple[int, int], ...] = ((10, 4), (10, 4))) -> Run:
    """One run of which all figures are one number."""
    return Run(dict.fromkeys(load.FIGURES, value), tokens, 0.25)


def load_cell() -> load.Cell:
    """Two rounds: ours has twice the figures of stock, and who opts in half of them."""
    values = {load.STOCK: 2.0, load.OURS: 4.0, load.OPTED_IN: 1.0, load.AGAIN: 2.0}
    return load.Cell({arm: [load_run(value), load_run(value)] for arm, value in values.items()})


def write_load(directory: Path) -> Path:
    """A file as ``rksc bench`` makes it."""
    sizes = {"requests": 64, "groups": 8, "common": 256, "own": 64, "tokens": 32, "rounds": 2, "seed": 0}
    figures = load.summary({1: load_cell(), 16: load_cell()}, Namespace(model_path="a-model", **sizes))
    path = directory / "load.json"
    write(path, "load", figures, command="python -m benchmarks.load")
    return path
