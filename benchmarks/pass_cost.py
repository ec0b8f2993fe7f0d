"""What a pass costs before it computes: operations, launches and synchronizations, by layer and between layers.

A plain prefill, a blended one, a merged one, verifications that leave early, verifications without an exit, and the
same prompts without us run on a real server of a small random model, whose operations are counted as they are asked for
(``benchmarks.counted_server``). Nothing is timed: on an accelerator launches and waits are what a pass costs before it
computes, and they can be counted on a CPU.

The last line says, of two models of which one has twice the layers: reads by the host in a blended pass, operations
between the probe and the layer after it, operations of a later layer of a blended pass as a multiple of those of a
plain one, operations of a look at which one verification may leave, and all operations of verifications without an exit
as a multiple of those of the same prompts without us.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_check import DONOR, QUESTION, SAME, Model, profile_for
from rksc_sgl.calibration.fingerprint import Fingerprint, fingerprint_of_model
from rksc_sgl.errors import RkscError
from rksc_sgl.exit_settings import PROFILE_VARIABLE
from rksc_sgl.options import KEY
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.sglang_plugin.passes.split_pass import probed_of
from rksc_sgl.testing import write_tiny_model

PLAIN, BLENDED, MERGED, EXITING = "plain", "blended", "merged", "exiting"
IN_PLACE, UNASKED = "in_place", "unasked"
MATERIAL = 600  # tokens that a blend can take over
VERIFIED = 8  # verifications in a pass


class CountedServer(ServerProcess):
    module = "benchmarks.counted_server"


@dataclass(frozen=True)
class Pass:
    """One pass, as it was counted.

    Attributes:
        layers: of its model.
        operations, launches: by place.
        reads: place, and who read.
    """

    layers: int
    operations: dict[str, int]
    launches: dict[str, int]
    reads: list[tuple[str, str]]

    @property
    def probe(self) -> int:
        """Layers that run for every token."""
        return probed_of(self.layers)

    def between(self, layer: int) -> int:
        """Operations between a layer and the one before it."""
        return self.operations.get(f"between {layer}", 0)

    @property
    def total(self) -> int:
        """All operations."""
        return sum(self.operations.values())

    @property
    def of_a_late_layer(self) -> int:
        """Operations of the last layer but one, which all passes compute alike."""
        return self.operations[f"layer {self.layers - 2}"]


class Passes:
    """The kinds of passes on one server."""

    def __init__(self, server: ServerProcess, model: Model) -> None:
        self.server, self.model = server, model

    def all(self) -> dict[str, Pass]:
        """One pass of each kind; the first of a server is not counted, in which things are found and kept."""
        kinds = (self.plain, self.blended, self.merged, self.exiting, self.in_place, self.unasked)
        for kind in kinds:
            kind(f"first {kind.__name__}")
        found = {kind.__name__: kind("counted") for kind in kinds}
        return {kind: self._of(one) for kind, one in found.items()}

    def plain(self, name: str) -> dict[str, Any]:
        self._flush()
        self._ask([self._words(1, MATERIAL)], [None])
        return self._last()

    def blended(self, name: str) -> dict[str, Any]:
        self._flush()
        options = {"group": f"pass cost {name}", "branches": 2, "share": "blend"}
        material = self._words(2, MATERIAL)
        changed = [*material[:300], (material[300] + 1) % self.model.vocabulary, *material[301:]]
        self._ask([[*self._words(3, 20), *material]], [{**options, "branch": 0}])
        self._taken()
        report = self._ask([[*self._words(4, 33), *changed]], [{**options, "branch": 1}])[0]
        _expect(report["mode"] == "blend" and report["taken_tokens"] > MATERIAL / 2, report)
        return self._last()

    def merged(self, name: str) -> dict[str, Any]:
        self._flush()
        options = {"group": f"pass cost merge {name}", "branches": 2, "share": "merge", "tau": -1.0}
        self._ask([DONOR], [{**options, "branch": 0}], 4)
        self._taken()
        report = self._ask([SAME], [{**options, "branch": 1}])[0]
        _expect(report["mode"] == "merge", report)
        merged = max(self._taken(), key=lambda one: one["rows"])  # then its last token runs behind the donor's prompt
        return merged

    def exiting(self, name: str) -> dict[str, Any]:
        self._flush()
        reports = self._ask(self._verifications(), [{"op": "verify"}] * VERIFIED)
        layers = {report["exit"]["layer"] for report in reports}
        _expect(len(layers) > 1, {"verifications left at one layer": sorted(layers)})
        return self._last()

    def in_place(self, name: str) -> dict[str, Any]:
        self._flush()
        reports = self._ask(self._verifications(), [{"op": "verify", "exit": "off"}] * VERIFIED)
        _expect(all(report["exit"]["rule"] is None for report in reports), reports)
        return self._last()

    def unasked(self, name: str) -> dict[str, Any]:
        self._flush()
        self._ask(self._verifications(), [None] * VERIFIED)
        return self._last()

    def _verifications(self) -> list[list[int]]:
        return [[*self._words(100 + seed, 24 + seed), *QUESTION] for seed in range(VERIFIED)]

    def _of(self, counted: dict[str, Any]) -> Pass:
        reads = [(place, who) for place, who in counted["reads"]]
        return Pass(self.model.layers, counted["operations"], counted["launches"], reads)

    def _ask(self, prompts: Sequence[Any], options: Sequence[dict[str, Any] | None], tokens: int = 1) -> list[Any]:
        """The reports; several prompts come in one request and so in one pass."""
        named = "text" if isinstance(prompts[0], str) else "input_ids"
        plain = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        sampling = [plain if one is None else {**plain, "custom_params": {KEY: one}} for one in options]
        body = {named: list(prompts), "sampling_params": sampling}
        response = httpx.post(f"{self.server.url}/generate", json=body, timeout=180.0)
        if response.status_code != 200:
            raise RkscError(f"/generate answered {response.status_code}: {response.text[:300]}")
        return [answer["meta_info"].get(KEY) for answer in response.json()]

    def _taken(self) -> list[dict[str, Any]]:
        """The passes since the last call."""
        (scheduler,) = self.server.get_json("/rksc/info")["schedulers"]
        return scheduler["passes"]

    def _last(self) -> dict[str, Any]:
        return self._taken()[-1]

    def _flush(self) -> None:
        httpx.post(f"{self.server.url}/flush_cache", params={"timeout": 30}, timeout=60.0).raise_for_status()

    def _words(self, seed: int, count: int) -> list[int]:
        return random.Random(seed).choices(range(100, self.model.vocabulary), k=count)


@contextmanager
def counted_server(model: Model, *more: str) -> Iterator[ServerProcess]:
    """A server of a model, whose operations are counted; with these arguments too."""
    fingerprint = Fingerprint(fingerprint_of_model(model.path), "float32", "none", "auto", "rksc_cpu", 1)
    arguments = ["--model-path", str(model.path), "--max-total-tokens", "20000", "--disable-overlap-schedule", *more]
    with tempfile.TemporaryDirectory() as directory:
        profile = Path(directory) / "profile.json"
        profile_for(model, fingerprint).save(profile)
        with CountedServer(server_arguments(arguments), variables={PROFILE_VARIABLE: str(profile)}) as server:
            yield server


def count(layers: int) -> dict[str, Pass]:
    """One pass of each kind, of a random Llama with so many layers."""
    with tempfile.TemporaryDirectory() as directory:
        model = Model.at(write_tiny_model(Path(directory) / f"{layers}-layers", num_hidden_layers=layers))
        with counted_server(model) as server:
            return Passes(server, model).all()


def summary(passes: dict[str, Pass], doubled: dict[str, Pass]) -> dict[str, Any]:
    """The last line."""
    plain, blended, exiting = passes[PLAIN], passes[BLENDED], passes[EXITING]
    looks = [exiting.between(layer) for layer in range(1, exiting.layers) if exiting.between(layer)]
    return {
        "synchronizations_blend": len(blended.reads) - len(plain.reads),
        "operations_take_over": blended.between(blended.probe),
        "operations_take_over_double_layers": doubled[BLENDED].between(doubled[BLENDED].probe),
        "operations_layer_ratio": round(blended.of_a_late_layer / plain.of_a_late_layer, 3),
        "operations_look": max(looks),
        "operations_verify_ratio": round(passes[IN_PLACE].total / passes[UNASKED].total, 3),
    }


def show(passes: dict[str, Pass], reads: bool) -> None:
    """A table of the passes, and who reads."""
    console = Console(stderr=True)
    table = Table(title=f"operations (launches) of a pass, {passes[PLAIN].layers} layers")
    table.add_column("where")
    for kind in passes:
        table.add_column(kind, justify="right")
    layers = passes[PLAIN].layers
    places = ["before", *(name for n in range(layers) for name in (f"between {n}", f"layer {n}")), "after"]
    for place in places:
        if any(one.operations.get(place) for one in passes.values()):
            cells = (f"{one.operations.get(place, 0)} ({one.launches.get(place, 0)})" for one in passes.values())
            table.add_row(place, *cells)
    table.add_row("synchronizations", *(str(len(one.reads)) for one in passes.values()))
    console.print(table)
    for kind, one in passes.items() if reads else ():
        for place, who in one.reads:
            console.print(f"{kind}, {place}: {who}", soft_wrap=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.pass_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6, help="of one model; another has twice as many (default: 6)")
    parser.add_argument("--reads", action="store_true", help="say who reads, at each synchronization")
    options = parser.parse_args(arguments)
    if options.layers < 4:
        raise RkscError(f"--layers: must be at least 4, got {options.layers}")
    passes, doubled = count(options.layers), count(2 * options.layers)
    show(passes, options.reads)
    show(doubled, False)
    print(json.dumps(summary(passes, doubled)))
    return 0


def _expect(holds: bool, otherwise: Any) -> None:
    if not holds:
        raise RkscError(f"a pass is not of the kind that was to be counted: {otherwise}")


if __name__ == "__main__":
    sys.exit(main())
