"""What rksc costs requests that do not opt in: throughput of the same requests with it and without.

Two servers side by side with the same model, platform and attention; one has our radix backend and all hooks, the
other SGLang's default tree and none of our hooks (``benchmarks.bare_server``). Only one works at a time; which one
begins alternates. Caches are flushed before every repeat. Generated tokens and ``cached_tokens`` of every request are
compared. The ratio is the median over the pairs of repeats; the noise is the baseline's slowest repeat over its
fastest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from tqdm import tqdm

from rksc_sgl.cli.serve import server_arguments
from rksc_sgl.errors import RkscError
from rksc_sgl.model_fetch import DEFAULT_MODEL, resolve_model
from rksc_sgl.server_process import ServerProcess

FIRST_WORD, LAST_WORD = 1000, 40_000  # ids that are ordinary tokens in the embedded model's vocabulary
PREFIX, OWN = 128, 64  # tokens of a prompt that half of the requests share, and of each one's own
Outcome = tuple[list[int], int]


class BareServer(ServerProcess):
    """A server without our hooks."""

    def command(self) -> list[str]:
        return [sys.executable, "-m", "benchmarks.bare_server", str(os.getpid()), *self.args]


def prompts_of(seed: int, count: int) -> list[list[int]]:
    """Prompts, every second of which begins with the same tokens."""
    source = random.Random(seed)
    common = [source.randint(FIRST_WORD, LAST_WORD) for _ in range(PREFIX)]
    own = [[source.randint(FIRST_WORD, LAST_WORD) for _ in range(OWN)] for _ in range(count)]
    return [(common if index % 2 else one) + one for index, one in enumerate(own)]


def run(url: str, prompts: Sequence[list[int]], tokens: int, concurrency: int) -> tuple[float, list[Outcome]]:
    """Seconds for all prompts, so many at a time; and what each one gave."""
    httpx.post(f"{url}/flush_cache", timeout=60.0).raise_for_status()

    def ask(prompt: list[int]) -> Outcome:
        sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling}
        answer = httpx.post(f"{url}/generate", json=body, timeout=600.0).raise_for_status().json()
        return answer["output_ids"], answer["meta_info"]["cached_tokens"]

    began = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        outcomes = list(pool.map(ask, prompts))
    return time.perf_counter() - began, outcomes


def summary(seconds: dict[str, list[float]], equal: int, requests: int) -> dict[str, Any]:
    """The last line."""
    pairs = [bare / ours for bare, ours in zip(seconds["bare"], seconds["rksc"], strict=True)]
    return {
        "throughput_ratio": round(statistics.median(pairs), 4),
        "ratio_lowest": round(min(pairs), 4),
        "ratio_highest": round(max(pairs), 4),
        "noise": round(max(seconds["bare"]) / min(seconds["bare"]), 4),
        "requests": requests,
        "equal": equal,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.overhead", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=6)
    options = parser.parse_args(arguments)
    seconds: dict[str, list[float]] = {"bare": [], "rksc": []}
    equal = 0
    with (
        BareServer(["--model-path", resolve_model(options.model)]) as bare,
        ServerProcess(server_arguments(["--model-path", options.model])) as ours,
    ):
        if bare.get_json("/server_info").get("radix_cache_backend") or any(bare.get_json("/rksc/info")["schedulers"]):
            raise RkscError("the baseline must run on SGLang's default tree and without our hooks")
        urls = {"bare": bare.url, "rksc": ours.url}
        for url in urls.values():
            run(url, prompts_of(999, 8), options.max_tokens, options.concurrency)  # warm
        for repeat in tqdm(range(options.repeats), desc="repeats", file=sys.stderr):
            prompts = prompts_of(repeat, options.requests)
            found: dict[str, list[Outcome]] = {}
            for name in sorted(urls, reverse=bool(repeat % 2)):
                taken, found[name] = run(urls[name], prompts, options.max_tokens, options.concurrency)
                seconds[name].append(taken)
            equal += sum(one == other for one, other in zip(found["bare"], found["rksc"], strict=True))
    print(json.dumps(summary(seconds, equal, options.requests * options.repeats)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
