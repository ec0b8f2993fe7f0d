"""What passes cost on a real server that learns it, and where a number is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from rksc_sgl.placement import pass_times
from rksc_sgl.placement.pass_times import ENOUGH, EVERY
from rksc_sgl.placement.worth import PASS_TOKENS, PassCost
from rksc_sgl.server_arguments import server_arguments, take_switches
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.sglang_plugin.passes.pass_clock import PassClock
from rksc_sgl.testing import write_tiny_model


class Event:
    """A CUDA event that the device reaches when it is told to."""

    made: list[Event]
    seconds = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.recorded, self.reached = False, False
        self.made.append(self)

    def record(self) -> None:
        self.recorded = True

    def query(self) -> bool:
        return self.reached

    def elapsed_time(self, end: Event) -> float:
        assert self.recorded and end.reached
        return 1000.0 * self.seconds


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    made: list[Event] = []
    monkeypatch.setattr(Event, "made", made, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return made


def test_on_a_gpu_nobody_waits_for_a_pass_and_it_is_learned_from_when_it_has_ended(
    events: list[Event], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = tmp_path / "kept" / "here.json"
    clock = PassClock(PassCost(1000, overlaps=True), "constant", kept, "cuda")

    def run(tokens: int, seconds: float) -> None:
        monkeypatch.setattr(Event, "seconds", seconds)
        with clock.timed(tokens):
            pass

    for _ in range(EVERY // 2):
        run(10, 0.02)
        run(8000, 0.4)
    assert clock.cost.tokens == 1000, "none of them has ended"
    for event in events:
        event.reached = True
    monkeypatch.setattr(Event, "elapsed_time", lambda begin, end: 20.0 if events.index(begin) % 4 == 0 else 400.0)
    run(10, 0.02)
    assert clock.cost.tokens == 400 and "learned from 16 passes" in clock.times.source
    assert pass_times.load(kept, True) == clock.cost


def test_what_cannot_be_kept_is_said_once_and_learned_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    clock = PassClock(PassCost(1_000_000), "constant", tmp_path / "file" / "here.json", "cpu")
    clock.times.cost, clock.times.learned = PassCost(5), True
    for _ in range(2):
        with clock.timed(1):
            pass
    assert caplog.text.count("is not kept") == 1 and clock.cost.tokens == 5


def test_the_first_looks_are_timed_and_no_more() -> None:
    clock = PassClock(PassCost(1000, overlaps=True), "constant", None, "cpu")
    for _ in range(10):
        with clock.timed_look():
            pass
    assert clock.times.wants_looks, "a server that does not learn times none"
    clock.learning = True
    for _ in range(pass_times.LOOKS):
        assert clock.times.wants_looks
        with clock.timed_look():
            pass
    assert not clock.times.wants_looks


def served(model: Path, cache: Path, *flags: str) -> Any:
    arguments, variables = take_switches(["--model-path", str(model), "--max-total-tokens", "20000", *flags])
    return ServerProcess(server_arguments(arguments), variables={**variables, "RKSC_CACHE_DIR": str(cache)})


def cost_of(server: ServerProcess) -> dict[str, Any]:
    (scheduler,) = server.get_json("/rksc/info")["schedulers"]
    cost: dict[str, Any] = scheduler["pass_cost"]
    return cost


@pytest.mark.server
@pytest.mark.slow
def test_a_server_tries_what_a_pass_costs_learns_and_tells_the_next_one(tmp_path: Path) -> None:
    model, cache = write_tiny_model(tmp_path / "tiny-llama"), tmp_path / "cache"
    with served(model, cache, "--rksc-pass-tokens", "learn") as server:
        tried = cost_of(server)
        assert tried["source"] == "timed at the start" and tried["tokens"] > 0 and tried["look"] is None
        for index in range(4 * max(ENOUGH, EVERY)):
            long = 3 * tried["tokens"] + 8
            sizes = [1] if index % 2 else [500] * (long // 500) + [long % 500 + 1]
            prompts = [[index, number, *range(size)][:size] for number, size in enumerate(sizes)]
            body = {"input_ids": prompts, "sampling_params": {"max_new_tokens": 1}}
            httpx.post(f"{server.url}/generate", json=body, timeout=60.0).raise_for_status()
        found = cost_of(server)
    assert found["source"].startswith("learned from ") and found["tokens"] > 0
    (kept,) = (cache / "pass-times").glob("*.json")
    with served(model, cache, "--rksc-pass-tokens", "learn") as server:
        again = cost_of(server)
    assert again["source"] == f"learned by an earlier server ({kept})"
    assert again["tokens"] == pass_times.load(kept, False).tokens


@pytest.mark.server
@pytest.mark.slow
def test_a_number_that_is_given_is_used_and_a_cpu_has_its_constant(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny-llama")
    with served(model, tmp_path, "--rksc-pass-tokens", "7") as server:
        assert (cost_of(server)["tokens"], cost_of(server)["source"]) == (7, "given")
    with served(model, tmp_path) as server:
        assert (cost_of(server)["tokens"], cost_of(server)["source"]) == (PASS_TOKENS["cpu"], "constant")
    assert not (tmp_path / "pass-times").exists()
