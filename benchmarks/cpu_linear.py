"""Linear layers of the embedded model's sizes: our panels against oneDNN's packed weights and MKL.

Each way goes through all weights of the model (random numbers) once, so that none is left in a cache; the ways take
turns, and which one begins changes. The noise is MKL's slowest turn over its fastest. The share is of the time that
reading the weights once would take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.cpu_decode import read_bandwidth
from rksc_sgl.cpu_platform.native.linear import PanelWeight
from rksc_sgl.cpu_platform.packed_linear import ONEDNN_ROWS, OneDnnWeight
from rksc_sgl.errors import RkscError

LAYERS = 30
SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # [out, in] of a decoder layer
HEAD = (49152, 576)
OURS, ONEDNN, MKL = "panels", "oneDNN", "MKL"
Way = list[Callable[[torch.Tensor], torch.Tensor]]


def ways() -> dict[str, Way]:
    """The same weights in three ways."""
    weights = [torch.randn(shape) for shape in (*SHAPES * LAYERS, HEAD)]
    panels = [PanelWeight.of(weight) for weight in weights]
    if None in panels:
        raise RkscError("there is no C compiler here, or RKSC_NATIVE is 0: nothing to compare")
    return {
        OURS: [partial(one, bias=None) for one in panels if one is not None],
        ONEDNN: [partial(OneDnnWeight.of(weight), bias=None) for weight in weights],
        MKL: [partial(F.linear, weight=weight) for weight in weights],
    }


def seconds_of(way: Way, rows: int) -> float:
    """Seconds for some rows through every weight."""
    inputs = {width: torch.randn(rows, width) for width in (576, 1536)}
    began = time.perf_counter()
    for (_, width), linear in zip((*SHAPES * LAYERS, HEAD), way, strict=True):
        linear(inputs[width])
    return time.perf_counter() - began


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_linear", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(words)
    if not 0 < min(arguments.rows) <= max(arguments.rows) <= ONEDNN_ROWS:
        parser.error(f"--rows: numbers from 1 to {ONEDNN_ROWS}, beyond which oneDNN is not used")
    found: dict[int, dict[str, list[float]]] = {}
    with torch.inference_mode():
        compared = ways()
        bound = 4 * sum(outputs * inputs for outputs, inputs in (*SHAPES * LAYERS, HEAD)) / read_bandwidth()
        for rows in tqdm(arguments.rows, unit="rows", file=sys.stderr):
            taken: dict[str, list[float]] = {name: [] for name in compared}
            for repeat in range(arguments.repeats):
                for name in list(compared)[:: 1 - 2 * (repeat % 2)]:
                    taken[name].append(seconds_of(compared[name], rows))
            found[rows] = taken
    table = Table("rows", f"{OURS}, ms", f"{ONEDNN}, ms", f"{MKL}, ms", "noise", "share of reading", title="all layers")
    result: dict[str, dict[str, float]] = {}
    for rows, taken in found.items():
        ours, onednn, mkl = (statistics.median(taken[name]) for name in (OURS, ONEDNN, MKL))
        noise = max(taken[MKL]) / min(taken[MKL])
        result[str(rows)] = {"vs_onednn": round(onednn / ours, 2), "vs_mkl": round(mkl / ours, 2)}
        times = (f"{seconds * 1e3:.1f}" for seconds in (ours, onednn, mkl))
        table.add_row(str(rows), *times, f"{noise:.2f}", f"{bound / ours:.2f}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    print(json.dumps({"ratios": result, "lowest": min(min(one.values()) for one in result.values())}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
