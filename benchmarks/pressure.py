"""Forks on a server whose KV pool is smaller than what they need at once, ours beside stock SGLang.

    python -m benchmarks.pressure --model-path smollm2-135m-instruct

Five programs at a time fork a prompt into eight branches, generate, and verify every branch; plain requests come in
between, one every ``--plain-s`` seconds. Each pool of ``--pools`` (as a share of what the forks that run at once need
together) gets a server of ours and one without our hooks, one after the other, with the same prompts. ``computed`` is
what was computed of the prompts, in tokens a fork; what is more than with the largest pool on the same kind of server
was computed twice. The first fork on each server is not timed.

The last line is JSON: ``slowdown`` (time at the smallest pool over time at the largest), ``slowdown_at_0_9``,
``stock_slowdown``, ``computed_twice_fraction`` (of all prompt tokens that we computed at the smallest pool) and
``plain_p99_ratio_vs_stock`` (plain requests' time to the first token at the smallest pool).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import sglang as sgl
from tqdm import tqdm

import rksc_sgl
from rksc_sgl import SkipGate
from rksc_sgl.errors import ServerRefusedError
from rksc_sgl.http_client import HttpClient
from rksc_sgl.metrics import TOKENS_TWICE
from rksc_sgl.model_fetch import resolve_model
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess

WORDS = [
    "river",
    "stone",
    "market",
    "letter",
    "garden",
    "window",
    "bridge",
    "winter",
    "paper",
    "silver",
    "morning",
    "engine",
    "forest",
    "island",
    "candle",
]
QUESTION_TOKENS = 26  # of the default question, and what belongs to its turn
FIRST_ID, LAST_ID = 1000, 9000  # plain words of any vocabulary
PLAIN_PROMPT, PLAIN_NEW = 64, 8  # tokens of a plain request


class StockServer(ServerProcess):
    """Without anything of ours except the platform."""

    module = "benchmarks.unhooked_server"


@dataclass(frozen=True)
class Size:
    """What is asked of a server.

    Attributes:
        forks: in all; at_once: at a time.
        branches: of a fork.
        prompt: words of its prompt.
        new: tokens of a branch.
        plain_s: seconds between two plain requests.
    """

    forks: int = 10
    at_once: int = 5
    branches: int = 8
    prompt: int = 540
    new: int = 48
    plain_s: float = 1.0


@dataclass
class Run:
    """All forks once on one server.

    Attributes:
        seconds: for all of them.
        generation, verification: prompt tokens that were computed, of each fork.
        first_token_s: of each plain request.
        twice: what the server itself counted as computed twice; 0 on stock.
        memory: what ``/rksc/stats`` says of leases; None on stock.
    """

    seconds: float = 0.0
    generation: list[int] = field(default_factory=list)
    verification: list[int] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    twice: int = 0
    memory: dict[str, Any] | None = None

    @property
    def computed(self) -> int:
        return sum(self.generation) + sum(self.verification)

    @property
    def p99_s(self) -> float:
        return float(np.percentile(self.first_token_s, 99)) if self.first_token_s else 0.0


def prompt_of(fork: int, size: Size) -> str:
    """Words that no other fork begins with."""
    source = random.Random(1000 + fork)
    return " ".join([f"case {fork}:", *(source.choice(WORDS) for _ in range(size.prompt))])


@sgl.function
def _fork(s: Any, prompt: str, size: Size, run: Run) -> None:
    s += sgl.system("You are a careful assistant.") + sgl.user(prompt)
    branches = sgl.fork_similar(s, size.branches, share="exact")
    branches += sgl.assistant(sgl.gen("answer", max_tokens=size.new, temperature=1.0, ignore_eos=True))
    verdict = sgl.verify_gated(branches, "answer", select="score", skip=SkipGate.never())
    metas = [branch.stream_executor.meta_info["answer"] for branch in branches]
    run.generation.append(sum(meta["prompt_tokens"] - meta["cached_tokens"] for meta in metas))
    run.verification.append(sum(verdict.new_tokens))


def demand(model: str, size: Size) -> int:
    """KV slots that the forks that run at once need together."""
    from transformers import AutoTokenizer

    messages = [
        {"role": "system", "content": "You are a careful assistant."},
        {"role": "user", "content": prompt_of(0, size)},
    ]
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model))
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prefix = len(tokenizer.encode(prompt, add_special_tokens=False))
    return size.at_once * (prefix + size.branches * (size.new + QUESTION_TOKENS))


def measure(url: str, size: Size, said: str) -> Run:
    """All forks, so many at once, with plain requests in between."""
    run, warm = Run(), Run()
    endpoint = rksc_sgl.Endpoint(url)
    _fork.run(prompt=prompt_of(size.forks, size), size=size, run=warm, backend=endpoint)
    endpoint.flush_cache(wait_s=60.0)
    before, done = _twice(url), threading.Event()
    asking = threading.Thread(target=_ask_plainly, args=(url, size, run, done))
    began = time.perf_counter()
    asking.start()
    try:
        with ThreadPoolExecutor(size.at_once) as pool:
            forks = [
                pool.submit(_fork.run, prompt=prompt_of(fork, size), size=size, run=run, backend=endpoint)
                for fork in range(size.forks)
            ]
            for one in tqdm(forks, desc=said, unit="fork", file=sys.stderr):
                error = one.result().error()
                if error is not None:
                    raise error
        run.seconds = time.perf_counter() - began
    finally:
        done.set()
        asking.join()
    run.twice = _twice(url) - before
    run.memory = _stats(url).get("memory")
    return run


def _ask_plainly(url: str, size: Size, run: Run, done: threading.Event) -> None:
    """A plain request now and then, until all forks are done; each is waited for in a thread of its own."""
    source = np.random.default_rng(7)

    def ask(ids: list[int]) -> None:
        body = {
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": PLAIN_NEW, "ignore_eos": True},
            "stream": True,
        }
        began = time.perf_counter()
        with httpx.stream("POST", f"{url}/generate", json=body, timeout=600.0, trust_env=False) as response:
            response.raise_for_status()
            times = [time.perf_counter() - began for line in response.iter_lines() if line.startswith("data: {")]
        run.first_token_s.append(times[0])

    with ThreadPoolExecutor(64) as pool:
        asked = []
        while not done.wait(size.plain_s):
            asked.append(pool.submit(ask, source.integers(FIRST_ID, LAST_ID, PLAIN_PROMPT).tolist()))
        for one in asked:
            one.result()


def _stats(url: str) -> dict[str, Any]:
    """What our scheduler says; nothing on a server without it."""
    try:
        with HttpClient(url, timeout=60.0) as client:
            stats: dict[str, Any] = client.get_json("/rksc/stats", {"nodes": "false"})["schedulers"][0]
    except ServerRefusedError:
        return {}
    return stats


def _twice(url: str) -> int:
    series = _stats(url).get("counters", {}).get(TOKENS_TWICE, [])
    return sum(int(one["value"]) for one in series)


def summary(pools: Sequence[float], runs: dict[str, dict[float, Run]], size: Size) -> dict[str, Any]:
    """The last line.

    Args:
        pools: shares of the demand, the largest first.
        runs: of ``rksc`` and ``stock``, by share.
    """
    largest, smallest = pools[0], pools[-1]
    ours, stock = runs["rksc"], runs["stock"]
    middle = min(pools, key=lambda pool: abs(pool - 0.9))
    twice = max(0, ours[smallest].computed - ours[largest].computed)
    stock_twice = max(0, stock[smallest].computed - stock[largest].computed)
    below = stock[smallest].p99_s
    return {
        "slowdown": round(ours[smallest].seconds / ours[largest].seconds, 3),
        "slowdown_at_0_9": round(ours[middle].seconds / ours[largest].seconds, 3),
        "stock_slowdown": round(stock[smallest].seconds / stock[largest].seconds, 3),
        "computed_twice_fraction": round(twice / max(1, ours[smallest].computed), 4),
        "stock_computed_twice_fraction": round(stock_twice / max(1, stock[smallest].computed), 4),
        "plain_p99_ratio_vs_stock": round(ours[smallest].p99_s / below, 3) if below else None,
        "seconds": {
            name: {str(pool): round(run.seconds, 1) for pool, run in arm.items()} for name, arm in runs.items()
        },
        "plain_p99_s": {
            name: {str(pool): round(run.p99_s, 2) for pool, run in arm.items()} for name, arm in runs.items()
        },
        "forks": size.forks,
        "at_once": size.at_once,
    }


def _row(name: str, pool: float, slots: int, run: Run) -> str:
    generation, verification = statistics.mean(run.generation), statistics.mean(run.verification)
    return (
        f"{name:5s} {pool:4.2f} of the demand ({slots} slots): {run.seconds:6.1f} s, computed a fork: "
        f"generation {generation:.0f} (worst {max(run.generation)}), verification {verification:.0f} "
        f"(worst {max(run.verification)}); plain: {len(run.first_token_s)} requests, p99 {run.p99_s:.2f} s; "
        f"counted twice {run.twice}; {run.memory}"
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = _parse(argv)
    size = Size(forks=arguments.forks, at_once=arguments.at_once, new=arguments.new, plain_s=arguments.plain_s)
    pools = sorted(arguments.pools, reverse=True)
    arms = {"rksc": ServerProcess, "stock": StockServer}
    if arguments.no_stock:
        del arms["stock"]
    runs: dict[str, dict[float, Run]] = {name: {} for name in arms}
    needed = demand(arguments.model_path, size)
    for pool in pools:
        slots = round(pool * needed)
        flags = server_arguments(["--model-path", arguments.model_path, "--max-total-tokens", str(slots)])
        for name, kind in arms.items():
            with kind(flags) as server:
                runs[name][pool] = measure(server.url, size, f"{name}, {pool:g}")
            print(_row(name, pool, slots, runs[name][pool]), file=sys.stderr, flush=True)
    if arguments.no_stock:
        runs["stock"] = runs["rksc"]
    result = summary(pools, runs, size) | {"model": arguments.model_path}
    print(json.dumps(result))
    return result


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default="smollm2-135m-instruct", help="the model that is served")
    parser.add_argument("--pools", type=float, nargs="+", default=[1.4, 0.9, 0.6], help="shares of the demand")
    parser.add_argument("--forks", type=int, default=10, help="in all")
    parser.add_argument("--at-once", type=int, default=5, help="at a time")
    parser.add_argument("--new", type=int, default=48, help="tokens that a branch generates")
    parser.add_argument("--plain-s", type=float, default=1.0, help="seconds between two plain requests")
    parser.add_argument("--quick", action="store_true", help="five forks, the largest and the smallest pool")
    parser.add_argument("--no-stock", action="store_true", help="ours alone; what is compared with stock is then 1")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.forks, arguments.pools = 5, [max(arguments.pools), min(arguments.pools)]
    return arguments


if __name__ == "__main__":
    main()
