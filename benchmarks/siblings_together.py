"""Siblings that arrive together: from how many common tokens on waiting for one prefill of them is not slower.

    python -m benchmarks.siblings_together --model-path smollm2-135m-instruct

Two servers of ours, one whose siblings always wait and one whose siblings never do (``--rksc-pass-tokens``), get equal
forks in turns: so many branches with a common beginning and a few tokens of their own, one request, one new token each,
the cache flushed before. For each length of the beginning the ratio of the two times is printed (above 1: waiting is
faster), as the median of all pairs, with the spread of the arm that never waits as the noise. The last line is JSON:
``break_even_tokens``, the tokens that all waiting siblings together do not compute at the shortest beginning from which
on waiting was never slower, and what was measured on the way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import httpx
import numpy as np
from tqdm import tqdm

from rksc_sgl.options import KEY
from rksc_sgl.server_arguments import server_arguments, take_switches
from rksc_sgl.server_process import ServerProcess

OWN_TOKENS = 8
FIRST_ID, LAST_ID = 1000, 9000  # plain words of any vocabulary


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = _parse(argv)
    times: dict[int, dict[str, list[float]]] = {size: {"waits": [], "never": []} for size in arguments.common}
    computed: dict[int, dict[str, int]] = {size: {} for size in arguments.common}
    with _server(arguments.model_path, 0) as waits, _server(arguments.model_path, 10**9) as never:
        arms = {"waits": waits.url, "never": never.url}
        for _ in tqdm(range(2), desc="warming up"):
            for url in arms.values():
                _fork(url, arguments.branches, max(arguments.common), 0)
        steps = [(repeat, size) for repeat in range(arguments.repeats) for size in arguments.common]
        for repeat, size in tqdm(steps, desc="forks"):
            order = list(arms.items()) if repeat % 2 else list(arms.items())[::-1]
            for name, url in order:
                seconds, tokens = _fork(url, arguments.branches, size, 1 + repeat)
                times[size][name].append(seconds)
                computed[size][name] = tokens
    return _result(arguments, times, computed)


def _result(arguments: argparse.Namespace, times: Any, computed: Any) -> dict[str, Any]:
    rows = {}
    for size, arms in times.items():
        ratio = statistics.median(never / waits for never, waits in zip(arms["never"], arms["waits"], strict=True))
        rows[size] = {
            "ratio": round(ratio, 3),
            "noise": round(max(arms["never"]) / min(arms["never"]), 3),
            "saved_tokens": computed[size]["never"] - computed[size]["waits"],
        }
        print(f"{size:6d} common tokens: waiting {ratio:.2f} times as fast, {rows[size]}")
    right = [size for size in rows if all(rows[other]["ratio"] >= 1.0 for other in rows if other >= size)]
    result = {
        "model": arguments.model_path,
        "branches": arguments.branches,
        "break_even_common": min(right, default=None),
        "break_even_tokens": rows[min(right)]["saved_tokens"] if right else None,
        "by_common": rows,
    }
    print(json.dumps(result))
    return result


def _server(model: str, pass_tokens: int) -> ServerProcess:
    flags = ["--model-path", model, "--max-total-tokens", "20000", "--rksc-pass-tokens", str(pass_tokens)]
    left, variables = take_switches(flags)
    return ServerProcess(server_arguments(left), variables=variables)


def _fork(url: str, branches: int, common: int, seed: int) -> tuple[float, int]:
    """Seconds that a fork takes, and prompt tokens that were computed for it."""
    source = np.random.default_rng(1000 * common + seed)
    beginning = source.integers(FIRST_ID, LAST_ID, common).tolist()
    prompts = [[*beginning, *source.integers(FIRST_ID, LAST_ID, OWN_TOKENS).tolist()] for _ in range(branches)]
    fork = {"group": f"{common}-{seed}", "branches": branches, "share": "exact"}
    options = [{**fork, "branch": index} for index in range(branches)]
    body = {
        "input_ids": prompts,
        "sampling_params": [{"max_new_tokens": 1, "custom_params": {KEY: one}} for one in options],
    }
    httpx.post(f"{url}/flush_cache", params={"timeout": 10}, timeout=30.0, trust_env=False).raise_for_status()
    began = time.perf_counter()
    response = httpx.post(f"{url}/generate", json=body, timeout=600.0, trust_env=False)
    seconds = time.perf_counter() - began
    response.raise_for_status()
    metas = [answer["meta_info"] for answer in response.json()]
    return seconds, sum(meta["prompt_tokens"] - meta["cached_tokens"] for meta in metas)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default="smollm2-135m-instruct", help="the model that is served")
    parser.add_argument("--branches", type=int, default=8, help="siblings of a fork")
    parser.add_argument("--common", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64, 256], help="common tokens")
    parser.add_argument("--repeats", type=int, default=7, help="forks for each length and arm")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
