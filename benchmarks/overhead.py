"""What rksc costs requests that do not opt in: throughput of the same requests with it and without.

Two servers side by side with the same model, platform and attention; one has our radix backend and all hooks, the
other SGLang's default tree and none of our hooks (``benchmarks.bare_server``). Only one works at a time; which one
begins alternates. Caches are flushed before every repeat. The ratio is the median over many short pairs of repeats,
with a 95 % confidence interval by bootstrap; the noise is the baseline against itself: the median ratio of one of its
repeats to the next, and its interval. Generated tokens and ``cached_tokens`` of every request are compared, and so are
the baseline's with its own for the same prompts: which requests meet in a batch is a matter of timing, and with it the
last bits of their numbers. Both servers are started anew for every ``--starts``, in an order that alternates.

Where the machine's noise hides a difference of a percent, a clock in the scheduler does not: at the end a third server
does the same work with a stopwatch around every hook (``benchmarks.timed_server``); ``hook_share`` is what the hooks
in the scheduler themselves took of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from scipy.stats import bootstrap
from tqdm import tqdm

from rksc_sgl.errors import RkscError
from rksc_sgl.model_fetch import DEFAULT_MODEL, resolve_model
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess

FIRST_WORD, LAST_WORD = 1000, 40_000  # ids that are ordinary tokens in the embedded model's vocabulary
PREFIX, OWN = 128, 64  # tokens of a prompt that half of the requests share, and of each one's own
Outcome = tuple[list[int], int]


class BareServer(ServerProcess):
    """A server without our hooks."""

    module = "benchmarks.bare_server"


def check_bare(server: ServerProcess) -> None:
    """
    Raises:
        RkscError: the server is no baseline: it has our radix backend or our hooks.
    """
    if server.get_json("/server_info").get("radix_cache_backend") or any(server.get_json("/rksc/info")["schedulers"]):
        raise RkscError("the baseline must run on SGLang's default tree and without our hooks")


class TimedServer(ServerProcess):
    """Ours with stopwatches."""

    module = "benchmarks.timed_server"


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


@dataclass(frozen=True)
class Measured:
    """What the repeats gave.

    Attributes:
        seconds: of each repeat of both servers, in the same order.
        equal, compared: outcomes that were equal, and that were compared: ours with the baseline's ("rksc"), and the
            baseline's with its own ("bare").
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"bare": [], "rksc": []})
    equal: dict[str, int] = field(default_factory=lambda: {"bare": 0, "rksc": 0})
    compared: dict[str, int] = field(default_factory=lambda: {"bare": 0, "rksc": 0})


def compare(options: argparse.Namespace, start: int, measured: Measured, progress: tqdm) -> None:
    """Start both servers and measure some repeats."""
    servers: dict[str, ServerProcess] = {
        "bare": BareServer(["--model-path", resolve_model(options.model)]),
        "rksc": ServerProcess(server_arguments(["--model-path", options.model])),
    }
    with contextlib.ExitStack() as stack:
        for name in sorted(servers, reverse=bool(start % 2)):
            stack.enter_context(servers[name])
        check_bare(servers["bare"])
        for server in servers.values():
            run(server.url, prompts_of(999, 8), options.max_tokens, options.concurrency)  # warm
        before: list[Outcome] = []
        for repeat in range(options.repeats):
            prompts = prompts_of(start * options.repeats + repeat // 2, options.requests)
            found: dict[str, list[Outcome]] = {}
            for name in sorted(servers, reverse=bool(repeat % 2)):
                taken, found[name] = run(servers[name].url, prompts, options.max_tokens, options.concurrency)
                measured.seconds[name].append(taken)
            others = {"rksc": found["rksc"], **({"bare": before} if repeat % 2 else {})}
            for name, other in others.items():
                measured.equal[name] += sum(one == two for one, two in zip(found["bare"], other, strict=True))
                measured.compared[name] += len(other)
            before = found["bare"]
            progress.update()


def hook_share(options: argparse.Namespace) -> tuple[float, str]:
    """What our hooks themselves take of the scheduler's time, and which of them takes most."""
    with TimedServer(server_arguments(["--model-path", options.model])) as server:

        def seconds() -> dict[str, float]:
            return server.get_json("/rksc/info")["schedulers"][0]["hook_seconds"]

        run(server.url, prompts_of(999, 8), options.max_tokens, options.concurrency)  # warm
        before, total = seconds(), 0.0
        for repeat in range(4):
            total += run(server.url, prompts_of(repeat, options.requests), options.max_tokens, options.concurrency)[0]
        after = seconds()
    taken = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return sum(taken.values()) / total, max(taken, key=taken.__getitem__)


def median_ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """The median of ratios of pairs, and its 95 % confidence interval; of one pair that is the ratio itself."""
    ratios = np.asarray(above) / np.asarray(below)
    middle = round(float(np.median(ratios)), 4)
    if len(ratios) == 1:
        return middle, middle, middle
    found = bootstrap((ratios,), np.median, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return middle, round(float(found.low), 4), round(float(found.high), 4)


def summary(measured: Measured) -> dict[str, Any]:
    """The last line, as far as it is about throughput."""
    seconds, equal, requests = measured.seconds, measured.equal, measured.compared
    ratio, low, high = median_ratio(seconds["bare"], seconds["rksc"])
    noise, noise_low, noise_high = median_ratio(seconds["bare"][::2], seconds["bare"][1::2])
    return {
        "throughput_ratio": ratio,
        "ratio_interval": [low, high],
        "noise_ratio": noise,
        "noise_interval": [noise_low, noise_high],
        "requests": requests["rksc"],
        "equal": equal["rksc"],
        "bare_requests": requests["bare"],
        "bare_equal": equal["bare"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.overhead", description=__doc__)
    parser.add_argument("--model-path", dest="model", default=DEFAULT_MODEL)
    parser.add_argument("--requests", type=int, default=8, help="of one repeat")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=24, help="after a start; an even number")
    parser.add_argument("--starts", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.repeats < 4 or options.repeats % 2:
        parser.error("--repeats: an even number from 4 on")
    if options.starts < 1:
        parser.error("--starts: a number from 1 on")
    measured = Measured()
    with tqdm(total=options.starts * options.repeats, desc="repeats", file=sys.stderr) as progress:
        for start in range(options.starts):
            compare(options, start, measured, progress)
    share, largest = hook_share(options)
    result = summary(measured) | {"hook_share": round(share, 5), "largest_hook": largest}
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
