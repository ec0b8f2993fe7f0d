"""Linear layers of a model's sizes: panels of bfloat16 and of float32 numbers, oneDNN's packed weights, and MKL.

All weights of the model (random numbers, the same for all ways) are gone through, so that none is left in a cache; at
each weight the ways take turns, and which one begins changes. What a way takes is the sum over the weights of its
median there, which a machine that is busy otherwise disturbs less than a whole pass. The noise is the same sum of the
third quartiles over that of the first ones, of float32 panels. The shares are of the time that reading the weights once
would take, at the highest rate seen in the run: of PyTorch's sum of a large block, or of float32 panels at one row.

``bits_equal`` says whether bfloat16 panels and float32 panels of the same numbers give the same results to the bit: of
the random weights, or of all weights of ``--model-path``, a 16-bit checkpoint. With that, a server is started on it and
one on a tiny model: ``resident_over_file`` is the proportional set size of the first one's scheduler less that of the
second's, over the size of the weights' files, and ``peak_over_file`` the same of the most that was resident at a time
while loading, pages of the files included.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from tqdm import tqdm

from benchmarks.cpu_decode import read_bandwidth
from rksc_sgl.cpu_platform.native.linear import PanelWeight
from rksc_sgl.cpu_platform.packed_linear import ONEDNN_ROWS, OneDnnWeight
from rksc_sgl.errors import RkscError
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.testing import write_tiny_model

HALF, OURS, ONEDNN, MKL = "bfloat16 panels", "panels", "oneDNN", "MKL"
MOST_ROWS = 4096
FEW = 16  # rows up to which a turn is short, and repeated more often
Way = list[Callable[[torch.Tensor], torch.Tensor]]


@dataclass(frozen=True)
class Sizes:
    """Weights ``[out, in]`` of a model: of each decoder layer, and of the head."""

    layers: int
    layer: tuple[tuple[int, int], ...]
    head: tuple[int, int]

    @property
    def all(self) -> tuple[tuple[int, int], ...]:
        return (*self.layer * self.layers, self.head)

    @property
    def numbers(self) -> int:
        return sum(outputs * inputs for outputs, inputs in self.all)


SIZES = {
    "smollm2-135m": Sizes(30, ((960, 576), (576, 576), (3072, 576), (576, 1536)), (49152, 576)),
    "qwen2.5-0.5b": Sizes(24, ((1152, 896), (896, 896), (9728, 896), (896, 4864)), (151936, 896)),
    "qwen2.5-1.5b": Sizes(28, ((2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960)), (151936, 1536)),
}


def ways(sizes: Sizes, names: Sequence[str]) -> dict[str, Way]:
    """The same weights in several ways."""
    made: dict[str, Way] = {name: [] for name in names}
    for shape in sizes.all:
        numbers = torch.randn(shape).bfloat16()
        weight = numbers.float()
        makers: dict[str, Callable[[], Callable[..., torch.Tensor]]] = {
            HALF: lambda numbers=numbers: _panels(numbers),  # type: ignore[misc]
            OURS: lambda weight=weight: _panels(weight),  # type: ignore[misc]
            ONEDNN: lambda weight=weight: partial(OneDnnWeight.of(weight), bias=None),  # type: ignore[misc]
            MKL: lambda weight=weight: partial(F.linear, weight=weight),  # type: ignore[misc]
        }
        for name in names:
            made[name].append(makers[name]())
    return made


def _panels(weight: torch.Tensor) -> Callable[..., torch.Tensor]:
    panels = PanelWeight.of(weight)
    if panels is None:
        raise RkscError("there is no C compiler here, or RKSC_NATIVE is 0: nothing to compare")
    return partial(panels, bias=None)


@dataclass(frozen=True)
class Taken:
    """Seconds of a way, ``[turns, weights]``."""

    turns: torch.Tensor

    def total(self, quantile: float = 0.5) -> float:
        """Of all weights, each with that quantile of its turns."""
        return float(self.turns.quantile(quantile, dim=0).sum())


def measure(compared: dict[str, Way], sizes: Sizes, rows: int, turns: int) -> dict[str, Taken]:
    """Some rows through every weight in every way."""
    inputs = {width: torch.randn(rows, width) for _, width in sizes.all}
    taken = {name: torch.zeros(turns, len(sizes.all), dtype=torch.float64) for name in compared}
    for turn in range(turns):
        for number, (_, width) in enumerate(sizes.all):
            for name in list(compared)[:: 1 - 2 * ((turn + number) % 2)]:
                began = time.perf_counter()
                compared[name][number](inputs[width])
                taken[name][turn, number] = time.perf_counter() - began
    return {name: Taken(seconds) for name, seconds in taken.items()}


def weights_of(model: Path) -> Iterator[torch.Tensor]:
    """All 16-bit matrices of a checkpoint."""
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safetensors' own)
                tensor = tensors.get_tensor(name)
                if tensor.dim() == 2 and tensor.dtype in (torch.bfloat16, torch.float16):
                    yield tensor


def same_bits(weights: Iterator[torch.Tensor]) -> bool:
    """Whether 16-bit panels give what float32 panels of the same numbers give. At least one weight is needed."""
    compared = 0
    for weight in weights:
        half, whole = _panels(weight), _panels(weight.float())
        for rows in (1, 8, 50):
            x = torch.randn(rows, weight.shape[1])
            if not torch.equal(half(x), whole(x)):
                return False
        compared += 1
    if compared == 0:
        raise RkscError("--model-path: no 16-bit matrix is in its safetensors files")
    return True


def memory_of_scheduler(model: Path) -> tuple[int, int]:
    """Bytes that the scheduler of a server on a model has: its proportional set size, and the most resident so far."""
    with ServerProcess(server_arguments(["--model-path", str(model), "--max-total-tokens", "20000"])) as server:
        processes = psutil.Process(server.pid).children(recursive=True)
        scheduler = next(one for one in processes if "sglang::scheduler" in " ".join(one.cmdline()))
        status = Path(f"/proc/{scheduler.pid}/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return scheduler.memory_full_info().pss, int(peak.split()[1]) * 1024


def over_file(model: Path) -> dict[str, float]:
    """What a model's weights take in a server, over the size of its files."""
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    with tempfile.TemporaryDirectory() as directory:
        tiny = memory_of_scheduler(write_tiny_model(Path(directory) / "tiny"))
    resident, peak = (mine - its for mine, its in zip(memory_of_scheduler(model), tiny, strict=True))
    return {"resident_over_file": round(resident / size, 3), "peak_over_file": round(peak / size, 3)}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_linear", description=__doc__)
    parser.add_argument("--shapes", choices=SIZES, default="qwen2.5-0.5b", help="the sizes of which model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--repeats", type=int, default=5, help="turns; four times as many up to 16 rows")
    parser.add_argument("--panels-only", action="store_true", help="without oneDNN and MKL, which take more memory")
    parser.add_argument("--model-path", type=Path, help="directory of a 16-bit checkpoint for bits and memory")
    arguments = parser.parse_args(words)
    most = MOST_ROWS if arguments.panels_only else ONEDNN_ROWS
    if not 0 < min(arguments.rows) <= max(arguments.rows) <= most:
        beyond = (
            "" if arguments.panels_only else f"; up to {MOST_ROWS} with --panels-only, for oneDNN is not used there"
        )
        parser.error(f"--rows: numbers from 1 to {most}{beyond}")
    sizes, found = SIZES[arguments.shapes], {}
    with torch.inference_mode():
        before = read_bandwidth()
        compared = ways(sizes, (HALF, OURS) if arguments.panels_only else (HALF, OURS, ONEDNN, MKL))
        for rows in tqdm(sorted({*arguments.rows, 1, 8}), unit="rows", file=sys.stderr):
            turns = arguments.repeats * (4 if rows <= FEW else 1)
            found[rows] = measure(compared, sizes, rows, turns)
        del compared
        of_panels = 4 * sizes.numbers / found[1][OURS].total()
        bandwidth = max(before, read_bandwidth(), of_panels)
        equal = same_bits(
            (torch.randn(shape).bfloat16() for shape in sizes.layer)
            if arguments.model_path is None
            else weights_of(arguments.model_path)
        )
    memory: dict[str, float | None] = {"resident_over_file": None, "peak_over_file": None}
    if arguments.model_path is not None:
        memory |= over_file(arguments.model_path)
    Console(width=None if sys.stdout.isatty() else 110).print(_table(arguments.shapes, found, sizes, bandwidth))
    ratios = {rows: _ratios(taken) for rows, taken in found.items()}
    to_others = [value for one in ratios.values() for name, value in one.items() if name != "bf16_vs_fp32"]
    result = {
        "shapes": arguments.shapes,
        "ratio_bf16_vs_fp32_b1": ratios[1]["bf16_vs_fp32"],
        "ratio_bf16_vs_fp32_b8": ratios[8]["bf16_vs_fp32"],
        "bits_equal": equal,
        **memory,
        "bandwidth_bound_fraction": _rounded(_share(found[1][HALF], 2 * sizes.numbers, bandwidth)),
        "lowest_bf16_vs_fp32": min(one["bf16_vs_fp32"] for one in ratios.values()),
        "lowest": min(to_others, default=None),
        "ratios": {str(rows): one for rows, one in ratios.items()},
    }
    print(json.dumps(result), flush=True)
    return 0 if equal else 1


def _ratios(taken: dict[str, Taken]) -> dict[str, float]:
    """How many times faster, for those ways that were measured."""
    pairs = {"bf16_vs_fp32": (OURS, HALF), "vs_onednn": (ONEDNN, OURS), "vs_mkl": (MKL, OURS)}
    return {
        key: _rounded(taken[slower].total() / taken[faster].total())
        for key, (slower, faster) in pairs.items()
        if slower in taken
    }


def _rounded(value: float) -> float:
    """To three digits; what is small stays above 0, as where other work held one way up for a turn."""
    return float(f"{value:.3g}")


def _share(taken: Taken, size: int, bandwidth: float) -> float:
    return size / bandwidth / taken.total()


def _table(title: str, found: dict[int, dict[str, Taken]], sizes: Sizes, bandwidth: float) -> Table:
    names = list(next(iter(found.values())))
    headings = ("rows", *(f"{name}, ms" for name in names), "noise", "share of reading: bfloat16", "float32")
    table = Table(*headings, title=f"all layers of {title}, {bandwidth / 1e9:.0f} GB/s")
    for rows, taken in found.items():
        times = (f"{taken[name].total() * 1e3:.1f}" for name in names)
        shares = (_share(taken[name], size * sizes.numbers, bandwidth) for name, size in ((HALF, 2), (OURS, 4)))
        noise = taken[OURS].total(0.75) / taken[OURS].total(0.25)
        table.add_row(str(rows), *times, f"{noise:.2f}", *(f"{share:.2f}" for share in shares))
    return table


if __name__ == "__main__":
    sys.exit(main())
