"""The CPU platform against SGLang's own arithmetic, on whole model steps of two real servers.

The noise printed beside each ratio is the baseline against itself: its slowest repeat over its fastest.

The baseline is ``torch_native`` attention with SGLang's linear layers (``benchmarks.stock_server``). Both have our
platform otherwise: an idle server that polls, as SGLang's does by default, would slow down the one that is measured.

Both servers run the same model side by side; one works at a time, and which one begins alternates. For every cell
the generated tokens are compared. A decode step's time is that of a long generation less that of a short one, so
that HTTP, tokenizing and prefill cancel.

Cells in which the baseline would take from ten minutes to an hour are measured on our server alone. ``growth`` is our
step with the most branches on the longest shared prefix over the step of one sequence with it: what the branches cost,
whose common keys and values are read once.

``--alone`` measures our server only, on shared prefixes, for models whose baseline takes too much time or memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import httpx
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from rksc_sgl.model_fetch import DEFAULT_MODEL
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess

BASELINE, OURS = "torch_native", "rksc_cpu"
STEPS = 32
HEAVY = 24_000  # sequences x prefix from which on the baseline takes minutes; fewer steps there
HEAVY_STEPS = 4
TOO_HEAVY = 50_000  # with a shared prefix, from which on the baseline takes too long; with others it does from HEAVY on
EXTEND = 8
FIRST_WORD, LAST_WORD = 1000, 40_000  # ids that are ordinary tokens in the embedded model's vocabulary


@dataclass(frozen=True)
class Cell:
    """One workload: ``batch`` sequences with prefixes of ``prefix`` tokens, the same or different ones."""

    batch: int
    prefix: int
    shared: bool

    @property
    def heavy(self) -> bool:
        return self.batch * self.prefix > HEAVY

    @property
    def ours_alone(self) -> bool:
        return self.heavy and (not self.shared or self.batch * self.prefix > TOO_HEAVY)

    @property
    def steps(self) -> int:
        return HEAVY_STEPS if self.heavy and not self.ours_alone else STEPS

    def prompts(self, seed: int) -> list[list[int]]:
        """Token ids of each sequence; also with a shared prefix each has a last token of its own."""
        source = random.Random(seed)
        common = _words(source, self.prefix - 1)
        prompts = []
        for index in range(self.batch):
            prefix = common if self.shared else _words(source, self.prefix - 1)
            prompts.append([*prefix, FIRST_WORD + index])
        return prompts


@dataclass(frozen=True)
class Outcome:
    """Seconds of each server and whether their tokens were equal.

    Attributes:
        seconds: median of each server's repeats; the baseline's is missing where ours was measured alone.
        noise: the slowest repeat over the fastest, of the baseline where it ran; 1 if there was one repeat. No ratio
            below it means much.
        equal: whether both gave the same tokens in every repeat.
    """

    seconds: dict[str, float]
    noise: float
    equal: bool

    @property
    def ratio(self) -> float:
        return self.seconds[BASELINE] / self.seconds[OURS]


class StockArithmetic(ServerProcess):
    """A server whose model is computed as SGLang alone computes it."""

    module = "benchmarks.stock_server"


class Server:
    """A server and what is asked of it."""

    def __init__(self, process: ServerProcess) -> None:
        self.client = httpx.Client(base_url=process.url, timeout=3600.0, trust_env=False)

    def flush(self) -> None:
        self.client.post("/flush_cache").raise_for_status()

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]], list[int]]:
        """Wall time, generated ids and cached prompt tokens of a greedy batch."""
        params = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        began = time.perf_counter()
        response = self.client.post("/generate", json={"input_ids": prompts, "sampling_params": params})
        seconds = time.perf_counter() - began
        response.raise_for_status()
        answers = response.json()
        return (
            seconds,
            [one["output_ids"] for one in answers],
            [one["meta_info"]["cached_tokens"] for one in answers],
        )


def decode_step(cell: Cell, server: Server, seed: int) -> tuple[float, list[list[int]]]:
    """Seconds of one decode step with every prefix cached, and the tokens."""
    prompts = cell.prompts(seed)
    server.flush()
    server.generate(prompts[:1], 1)
    server.generate(prompts, 1)
    short, _, cached = server.generate(prompts, 1)
    assert min(cached) >= cell.prefix - 1, f"prefixes were not cached: {cached}"
    long, tokens, _ = server.generate(prompts, cell.steps + 1)
    return (long - short) / cell.steps, tokens


def prefill(server: Server, length: int, seed: int) -> tuple[float, list[list[int]]]:
    """Seconds of a cold prefill of ``length`` tokens, and the token after it."""
    server.flush()
    seconds, tokens, cached = server.generate([_words(random.Random(seed), length)], 1)
    assert cached == [0], f"the prefill was not cold: {cached} tokens were cached"
    return seconds, tokens


def extend(server: Server, prefix: int, seed: int) -> tuple[float, list[list[int]]]:
    """Seconds of :data:`EXTEND` new tokens on a cached prefix, and the token after them."""
    source = random.Random(seed)
    common = _words(source, prefix)
    server.flush()
    server.generate([common], 1)
    tail = _words(source, EXTEND)
    seconds, tokens, cached = server.generate([[*common, *tail]], 1)
    assert cached[0] >= prefix - 1, f"the prefix was not cached: {cached}"
    return seconds, tokens


def compare(
    servers: dict[str, Server], work: Callable[[Server, int], tuple[float, list[list[int]]]], repeats: int
) -> Outcome:
    """Run the same work on all, in turns that alternate who begins; medians of the seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    equal = True
    for repeat in range(repeats):
        names = list(servers) if repeat % 2 == 0 else list(servers)[::-1]
        tokens = {}
        for name in names:
            taken, tokens[name] = work(servers[name], repeat)
            seconds[name].append(taken)
        equal = equal and all(one == tokens[OURS] for one in tokens.values())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    noisy = seconds[BASELINE if BASELINE in seconds else OURS]
    return Outcome(medians, max(noisy) / min(noisy), equal)


def read_bandwidth(repeats: int = 7) -> float:
    """Bytes that PyTorch reads in a second from memory larger than any cache."""
    import torch

    block = torch.ones(1 << 27, dtype=torch.float32)  # 512 MiB
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - began)
    return block.numel() * 4 / best


def bytes_of_step(model: str, cell: Cell) -> int:
    """Bytes of weights and of distinct KV that one decode step must read."""
    from pathlib import Path

    config = json.loads((Path(model) / "config.json").read_text())
    weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    if not config.get("tie_word_embeddings", False):  # of an embedding of its own, only the rows of the tokens are read
        size = {"bfloat16": 2, "float16": 2}.get(config.get("dtype") or config.get("torch_dtype"), 4)
        weights -= config["vocab_size"] * config["hidden_size"] * size
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * 4
    distinct = cell.prefix if cell.shared else cell.prefix * cell.batch
    return weights + token * distinct


@contextlib.contextmanager
def running_servers(model: str, names: Sequence[str], tokens: int) -> Iterator[tuple[dict[str, Server], str]]:
    """Servers with room for some tokens of KV, and the model's directory."""
    with contextlib.ExitStack() as stack:
        servers = {}
        arguments = server_arguments(["--model-path", model, "--max-total-tokens", str(tokens)])
        for name in names:
            kind = StockArithmetic if name == BASELINE else ServerProcess
            process = stack.enter_context(kind([*arguments, "--attention-backend", name]))
            servers[name] = Server(process)
        yield servers, arguments[arguments.index("--model-path") + 1]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_decode", description=__doc__)
    parser.add_argument("--model-path", default=DEFAULT_MODEL)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prefixes", type=int, nargs="+", default=[256, 1331, 4096])
    parser.add_argument("--all", action="store_true", help="the baseline also in cells where it takes up to an hour")
    parser.add_argument("--alone", action="store_true", help="only our server, without the baseline")
    arguments = parser.parse_args(words)
    cells = [
        Cell(batch, prefix, shared)
        for prefix in arguments.prefixes
        for batch in arguments.batches
        for shared in ((True,) if batch == 1 or arguments.alone else (True, False))
    ]
    for needed in (Cell(8, 1331, True), Cell(8, 1331, False), Cell(1, 1331, True)):
        if needed not in cells and (needed.shared or not arguments.alone):
            cells.append(needed)
    tokens = 16_000 + max(cell.batch * cell.prefix for cell in cells)
    names = (OURS,) if arguments.alone else (BASELINE, OURS)
    with running_servers(arguments.model_path, names, tokens) as (servers, model):
        bandwidth = read_bandwidth()
        outcomes: dict[Cell, Outcome] = {}
        for cell in tqdm(cells, unit="cell", file=sys.stderr):
            repeats = 1 if cell.heavy else arguments.repeats
            chosen = {OURS: servers[OURS]} if cell.ours_alone and not arguments.all else servers
            outcomes[cell] = compare(chosen, partial(decode_step, cell), repeats)
        cold = compare(servers, lambda server, seed: prefill(server, 1331, seed), arguments.repeats)
        short = compare(servers, lambda server, seed: extend(server, 1331, seed), arguments.repeats)
    Console(width=None if sys.stdout.isatty() else 110).print(_table(outcomes, cold, short))
    main_cell, one = Cell(8, 1331, True), Cell(1, 1331, True)
    bound = {cell: bytes_of_step(model, cell) / bandwidth / outcomes[cell].seconds[OURS] for cell in (main_cell, one)}
    compared = {}
    if not arguments.alone:
        compared = {
            "ratio_b8_p1331": outcomes[main_cell],
            "ratio_b1_p1331": outcomes[one],
            "ratio_b8_p1331_unshared": outcomes[Cell(8, 1331, False)],
            "ratio_prefill_1331": cold,
            "ratio_extend_8_on_1331": short,
        }
    result = {
        **{name: round(outcome.ratio, 2) for name, outcome in compared.items()},
        "tokens_per_second_b1": round(1 / outcomes[one].seconds[OURS], 2),
        "tokens_per_second_b8": round(8 / outcomes[main_cell].seconds[OURS], 2),
        "prefill_tokens_per_second": round(1331 / cold.seconds[OURS], 1),
        "bandwidth_bound_fraction": round(bound[main_cell], 3),
        "bandwidth_bound_fraction_b1": round(bound[one], 3),
        "noise": round(max(outcome.noise for outcome in (*outcomes.values(), cold, short)), 2),
        "growth": growth(outcomes),
        "tokens_equal": all(outcome.equal for outcome in (*outcomes.values(), cold, short)),
    }
    print(json.dumps(result), flush=True)
    return 0 if result["tokens_equal"] else 1


def growth(outcomes: dict[Cell, Outcome]) -> dict[str, float]:
    """Our step with the most branches on the longest shared prefix that was measured, over one sequence's with it."""
    measured = {cell for cell in outcomes if cell.shared and Cell(1, cell.prefix, True) in outcomes}
    most = max(measured, key=lambda cell: (cell.prefix, cell.batch))
    ratio = outcomes[most].seconds[OURS] / outcomes[Cell(1, most.prefix, True)].seconds[OURS]
    return {"batch": most.batch, "prefix": most.prefix, "step_ratio": round(ratio, 2)}


def _table(outcomes: dict[Cell, Outcome], cold: Outcome, short: Outcome) -> Table:
    table = Table(title="milliseconds: a decode step, or a whole request")
    for heading in ("work", BASELINE, OURS, "ratio", "noise", "tokens equal"):
        table.add_column(heading, justify="left" if heading == "work" else "right")
    rows = {
        **{
            f"decode, batch {cell.batch}, prefix {cell.prefix} {'shared' if cell.shared else 'each'}"
            f"{'' if cell.steps == STEPS else f' ({cell.steps} steps)'}": outcome
            for cell, outcome in outcomes.items()
        },
        "prefill of 1331 tokens": cold,
        f"{EXTEND} tokens on a cached prefix of 1331": short,
    }
    for name, outcome in rows.items():
        compared = BASELINE in outcome.seconds
        table.add_row(
            name,
            f"{outcome.seconds[BASELINE] * 1e3:.1f}" if compared else "",
            f"{outcome.seconds[OURS] * 1e3:.1f}",
            f"{outcome.ratio:.2f}" if compared else "",
            f"{outcome.noise:.2f}",
            ("yes" if outcome.equal else "no") if compared else "",
        )
    return table


def _words(source: random.Random, count: int) -> list[int]:
    return [source.randrange(FIRST_WORD, LAST_WORD) for _ in range(count)]


if __name__ == "__main__":
    sys.exit(main())
