"""From the start of a server to its first token, ours against SGLang's own launcher on the same CPU platform.

SGLang's own spawns its workers after its main process has imported everything; ours forks them from a process that
imports at the same time. One start that does not count warms the file cache, then the two alternate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence

import httpx
from tqdm import tqdm

from rksc_sgl.model_fetch import DEFAULT_MODEL, resolve_model
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess

# What SGLang's log says at the end of each stage.
STAGES = {
    "imports and arguments": "] server_args=",
    "workers running": "Init parallel begin",
    "weights": "Load weight end",
    "KV pool": "Memory pool end",
    "listening": "Uvicorn running",
}


class StockProcess(ServerProcess):
    """SGLang's own launcher, without our plugin; only the platform is ours."""

    def command(self) -> list[str]:
        return [sys.executable, "-m", "sglang.launch_server", *self.args]

    def environment(self) -> dict[str, str]:
        return {**super().environment(), "SGLANG_PLUGINS": "rksc_cpu"}


class Stopwatch:
    """A log that notes when each stage ended."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def write(self, line: str) -> int:
        for stage, words in STAGES.items():
            if words in line:
                self.seconds.setdefault(stage, time.perf_counter() - self.began)
        return len(line)

    def flush(self) -> None:
        """Nothing is held back."""


def first_token(kind: type[ServerProcess], arguments: list[str]) -> dict[str, float]:
    """Seconds until the end of each stage, the last one being the first token."""
    watch = Stopwatch()
    with kind(arguments, log=watch) as server:  # type: ignore[arg-type]
        body = {"text": "The capital of France is", "sampling_params": {"max_new_tokens": 1}}
        httpx.post(f"{server.url}/generate", json=body, timeout=120.0, trust_env=False).raise_for_status()
        watch.seconds["first token"] = time.perf_counter() - watch.began
    return watch.seconds


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_start", description=__doc__)
    parser.add_argument("--model-path", default=DEFAULT_MODEL)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args(words)
    model = resolve_model(options.model_path)
    arms = {
        "ours": (ServerProcess, server_arguments(["--model-path", model])),
        "stock": (StockProcess, ["--model-path", model, "--attention-backend", "torch_native"]),
    }
    order = ["ours"] + [name for repeat in range(options.repeats) for name in (list(arms)[:: 1 - 2 * (repeat % 2)])]
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for place, name in enumerate(tqdm(order, unit="start", file=sys.stderr)):
        seconds = first_token(*arms[name])
        if place > 0:
            taken[name].append(seconds)
    medians = {
        name: {stage: round(statistics.median(run[stage] for run in runs), 1) for stage in runs[0]}
        for name, runs in taken.items()
    }
    for stage in medians["ours"]:
        print(f"{stage:24} ours {medians['ours'][stage]:6.1f} s   stock {medians['stock'].get(stage, 0):6.1f} s")
    ours, stock = medians["ours"]["first token"], medians["stock"]["first token"]
    print(
        json.dumps({"first_token_s": ours, "stock_first_token_s": stock, "ratio": round(stock / ours, 2)}), flush=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
