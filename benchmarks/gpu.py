"""What is faster, and what must not be slower: stock SGLang and ours side by side, in turns, on one device.

    python -m benchmarks.gpu --model-path MODEL --backends triton fa3

For each attention backend two servers are started, SGLang's own without our plugin and ours, and asked in turns: cold
prefills, blends of most of a prompt, forks of different openings before the same material, siblings that arrive
together, verifications of a fork, and requests that do not opt in. Every row is the median of the repeats with their
spread (slowest over fastest). Answers are checked: a blend must have taken tokens over, siblings must have computed
their beginning once.

``--platform cpu --quick`` runs every row on the CPU platform with a small random model, to see that the script works;
its times say nothing of a GPU. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_check import BACKENDS, DTYPES, QUESTION, SHAPES, Model, machine, profile_for
from benchmarks.overhead import BareServer
from rksc_sgl.calibration.fingerprint import Fingerprint, fingerprint_of_model
from rksc_sgl.cpu_platform import PLATFORM_NAME, accelerator_present
from rksc_sgl.errors import RkscError
from rksc_sgl.exit_settings import PROFILE_VARIABLE
from rksc_sgl.model_fetch import resolve_model
from rksc_sgl.options import KEY
from rksc_sgl.packed_attention.switch import PACKED_ATTENTION_VARIABLE
from rksc_sgl.placement.worth import PASS_TOKENS_VARIABLE
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.support.offers import ALLOW_VARIABLE

BRANCHES = 8
OPENING = 61  # tokens of a branch that its donor has not
VERIFIED = 26  # tokens of a verification behind what is cached
PUBLISHED = {"op": "verify", "exit": "published", "theta": 1e-6, "eps": 1e-6, "yes_ids": [40, 41], "no_ids": [50]}


@dataclass(frozen=True)
class Sizes:
    """How much is asked.

    Attributes:
        prompts: tokens of the prefills.
        common: tokens that openings stand before, and that siblings begin with.
        tokens: new tokens of each branch.
        plain: requests that do not opt in, so many at once.
        repeats: of every row.
    """

    prompts: Sequence[int] = (1024, 4096, 8192, 16384)
    common: Sequence[int] = (2048, 8192)
    tokens: int = 32
    plain: tuple[int, int] = (192, 48)
    repeats: int = 5


QUICK = Sizes(prompts=(256,), common=(200,), tokens=4, plain=(8, 4), repeats=2)


@dataclass
class Rows:
    """Seconds by row, in the order in which they were first measured."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        self.seconds.setdefault(name, []).append(seconds)

    def median(self, name: str) -> float:
        """Milliseconds."""
        return 1e3 * statistics.median(self.seconds[name])

    def to_plain(self) -> dict[str, Any]:
        """Median in milliseconds and spread of each row."""
        return {
            name: {"ms": round(self.median(name), 2), "spread": round(max(all_of) / max(min(all_of), 1e-9), 3)}
            for name, all_of in self.seconds.items()
        }


class Side:
    """One of the two servers."""

    def __init__(self, name: str, server: ServerProcess, model: Model) -> None:
        self.name, self.server, self.model = name, server, model
        self._client = httpx.Client(timeout=600.0, trust_env=False)

    def flush(self) -> None:
        answer = self._client.post(f"{self.server.url}/flush_cache", params={"timeout": 30})
        answer.raise_for_status()

    def ask(self, prompts: Sequence[list[int]], options: Sequence[dict[str, Any] | None], tokens: int = 1) -> Any:
        """The answers' ``meta_info`` and the seconds until all were there; the prompts arrive together."""
        plain = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        sampling = [plain if one is None else {**plain, "custom_params": {KEY: one}} for one in options]
        body = {"input_ids": list(prompts), "sampling_params": sampling}
        began = time.perf_counter()
        response = self._client.post(f"{self.server.url}/generate", json=body)
        seconds = time.perf_counter() - began
        if response.status_code != 200:
            raise RkscError(f"{self.name}: /generate answered {response.status_code}: {response.text[:300]}")
        return [answer["meta_info"] for answer in response.json()], seconds

    def words(self, seed: int, count: int) -> list[int]:
        return random.Random(seed).choices(range(min(100, self.model.vocabulary // 4), self.model.vocabulary), k=count)


class Bench:
    """All rows on the two servers of one attention backend."""

    def __init__(self, stock: Side, ours: Side, sizes: Sizes) -> None:
        self.stock, self.ours, self.sizes, self.rows = stock, ours, sizes, Rows()
        self._forks = 0

    def run(self) -> dict[str, Any]:
        """Every row, as often as it is to be repeated; one more before, which is not counted."""
        for repeat in range(self.sizes.repeats + 1):
            if repeat == 1:
                self.rows = Rows()
            for measure in (self.prefills, self.openings, self.siblings, self.verifications, self.plain):
                measure(repeat)
        return self.rows.to_plain()

    def prefills(self, repeat: int) -> None:
        """Cold, blended and cached prefills of one prompt."""
        for size in self.sizes.prompts:
            material = self.ours.words(size + repeat, size - OPENING)
            donor, prompt = ([*self.ours.words(seed, OPENING), *material] for seed in (2 * repeat, 2 * repeat + 1))
            for side in self._in_turns(repeat):
                side.flush()
                self._timed(f"prefill {size}: {side.name}, exact", side, [prompt])
                self._timed(f"prefill {size}: {side.name}, all but one token cached", side, [prompt])
            for recompute in (None, 0.2):
                fork = self._fork(2, share="blend", **({} if recompute is None else {"recompute": recompute}))
                self.ours.flush()
                self.ours.ask([donor], fork[:1])
                name = f"prefill {size}: ours, blend" + ("" if recompute is None else f", recompute {recompute}")
                (meta,) = self._timed(name, self.ours, [prompt], fork[1:])
                taken = meta[KEY].get("taken_tokens", 0)
                _expect(taken > size / 4, f"{name}: {taken} tokens were taken over: {meta[KEY]}")

    def openings(self, repeat: int) -> None:
        """Branches with different openings before the same material."""
        for common in self.sizes.common:
            material = self.ours.words(7 * common + repeat, common)
            prompts = [[*self.ours.words(100 + index, OPENING), *material] for index in range(BRANCHES)]
            for side in self._in_turns(repeat):
                side.flush()
                fork = self._fork(BRANCHES, share="blend") if side is self.ours else [None] * BRANCHES
                name = f"{BRANCHES} openings before {common}: {side.name}"
                metas = self._timed(name, side, prompts, fork, self.sizes.tokens)
                if side is self.ours:
                    blended = sum(meta[KEY]["mode"] == "blend" for meta in metas)
                    _expect(blended == BRANCHES - 1, f"{name}: {blended} of {BRANCHES - 1} siblings were blended")

    def siblings(self, repeat: int) -> None:
        """Branches that begin alike and arrive together; stock also with a request before that fills the cache."""
        for common in self.sizes.common:
            material = self.ours.words(11 * common + repeat, common)
            prompts = [[*material, *self.ours.words(200 + index, 8)] for index in range(BRANCHES)]
            title = f"{BRANCHES} siblings of {common}"
            none: list[dict[str, Any] | None] = [None] * BRANCHES
            self.stock.flush()
            self._timed(f"{title}: stock", self.stock, prompts, none, self.sizes.tokens)
            self.stock.flush()
            began = time.perf_counter()
            self.stock.ask([material], [None])
            self.stock.ask(prompts, none, self.sizes.tokens)
            self.rows.add(f"{title}: stock, primed", time.perf_counter() - began)
            for share in ("auto", "exact"):
                self.ours.flush()
                fork = self._fork(BRANCHES, share=share)
                metas = self._timed(f"{title}: ours, {share}", self.ours, prompts, fork, self.sizes.tokens)
                computed = sum(meta["prompt_tokens"] - meta["cached_tokens"] for meta in metas)
                _expect(computed < 2 * common, f"{title}, {share}: {computed} tokens were computed")

    def verifications(self, repeat: int) -> None:
        """A question behind what is cached, of the branches of a fork."""
        common = self.sizes.common[0]
        material = self.ours.words(13 * common + repeat, common)
        branches = [[*material, *self.ours.words(300 + index, 64)] for index in range(BRANCHES)]
        asked = [[*one, *self.ours.words(400, VERIFIED - len(QUESTION)), *QUESTION] for one in branches]
        arms: list[tuple[str, Side, dict[str, Any] | None]] = [
            ("stock", self.stock, None),
            ("ours, no exit", self.ours, {"op": "verify", "exit": "off"}),
            ("ours, certified exit", self.ours, {"op": "verify"}),
            ("ours, a look at every layer that never exits", self.ours, PUBLISHED),
        ]
        for name, side, options in arms if repeat % 2 else arms[::-1]:
            side.flush()
            side.ask([material], [None])
            side.ask(branches, [None] * BRANCHES)
            self._timed(f"verification of {BRANCHES}: {name}", side, asked, [options] * BRANCHES)

    def plain(self, repeat: int) -> None:
        """Requests that do not opt in, many at once."""
        count, together = self.sizes.plain
        prompts = [self.ours.words(500 + 1000 * repeat + index, 192) for index in range(count)]
        for side in self._in_turns(repeat):
            side.flush()
            began = time.perf_counter()
            with ThreadPoolExecutor(together) as pool:
                list(pool.map(partial(side.ask, options=[None], tokens=self.sizes.tokens), [[one] for one in prompts]))
            self.rows.add(f"{count} plain requests, {together} at once: {side.name}", time.perf_counter() - began)

    def _timed(
        self,
        name: str,
        side: Side,
        prompts: Sequence[list[int]],
        options: Sequence[dict[str, Any] | None] | None = None,
        tokens: int = 1,
    ) -> Any:
        metas, seconds = side.ask(prompts, options or [None] * len(prompts), tokens)
        self.rows.add(name, seconds)
        return metas

    def _in_turns(self, repeat: int) -> Sequence[Side]:
        return (self.stock, self.ours) if repeat % 2 else (self.ours, self.stock)

    def _fork(self, branches: int, **options: Any) -> list[dict[str, Any] | None]:
        self._forks += 1
        fork = {"group": f"gpu {self._forks}", "branches": branches, **options}
        return [{**fork, "branch": index} for index in range(branches)]


def measure(backend: str, model: Model, given: argparse.Namespace) -> dict[str, Any]:
    """Both servers of one attention backend, and every row."""
    dtype = given.dtype or DTYPES[given.platform]
    sizes = QUICK if given.quick else Sizes(repeats=given.repeats)
    arguments = server_arguments(
        ["--model-path", str(model.path), "--attention-backend", backend, "--dtype", dtype, *given.flags]
    )
    platform = {"SGLANG_PLATFORM": PLATFORM_NAME} if given.platform == "cpu" else {}
    profile = profile_for(model, Fingerprint(fingerprint_of_model(model.path), dtype, "none", "auto", backend, 1))
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        profile.save(Path(directory) / "profile.json")
        # Blends are measured where they would be declined too; what the decision needs is what is measured here.
        variables = {PROFILE_VARIABLE: f"{directory}/profile.json", ALLOW_VARIABLE: "1", PASS_TOKENS_VARIABLE: "0"}
        if given.packed_attention:
            variables[PACKED_ATTENTION_VARIABLE] = "1"
        bare = BareServer(arguments, variables=platform)
        stock = bare if platform else ServerProcess(arguments, variables={"SGLANG_PLUGINS": "none"})
        ours = ServerProcess(arguments, variables=platform | variables)
        for server in (stock, ours):
            stack.enter_context(server)
        rows = Bench(Side("stock", stock, model), Side("ours", ours, model), sizes).run()
    return {"backend": backend, "dtype": dtype, "packed_attention": given.packed_attention, "rows": rows}


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['backend']}: milliseconds, median of the repeats")
    for column in ("row", "ms", "slowest / fastest"):
        table.add_column(column, justify="left" if column == "row" else "right")
    for name, row in result["rows"].items():
        table.add_row(name, f"{row['ms']:.1f}", f"{row['spread']:.2f}")
    Console(stderr=True).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--backends", nargs="+", help="attention backends (default: triton fa3 flashinfer; on the CPU "
                        "rksc_cpu)")  # fmt: skip
    parser.add_argument("--model-path", help="a name, a Hugging Face id or a path (default: a random model)")
    parser.add_argument("--dtype", help="default: bfloat16, on the CPU float32")
    parser.add_argument("--repeats", type=int, default=5, help="of every row (default: 5)")
    parser.add_argument("--quick", action="store_true", help="short prompts and two repeats: does the script work?")
    parser.add_argument("--packed-attention", action="store_true", help="ours with --rksc-packed-attention")
    parser.add_argument("flags", nargs="*", help="flags of both servers, after --")
    given = parser.parse_args(arguments)
    if given.platform == "gpu" and accelerator_present() is None:
        print("gpu: PyTorch sees no accelerator here; --platform cpu --quick tries the script", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as directory:
        if given.model_path is None:
            from rksc_sgl.testing import write_tiny_model

            path = write_tiny_model(Path(directory) / "random", **SHAPES[given.platform])
        else:
            path = Path(resolve_model(given.model_path))
        model = Model.at(path)
        results = []
        for backend in given.backends or BACKENDS[given.platform][: 1 if given.platform == "cpu" else None]:
            results.append(measure(backend, model, given))
            show(results[-1])
    print(json.dumps({**machine(), "model": model.path.name, "backends": results}))
    return 0


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RkscError(otherwise)


if __name__ == "__main__":
    sys.exit(main())
