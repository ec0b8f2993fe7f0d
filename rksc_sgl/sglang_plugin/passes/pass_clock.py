"""How long passes take on this server: tried when it starts, then learned from the passes that it runs anyway.

What decides whether a blend or an early exit is faster is how many tokens a pass computes in the time that it costs
before it computes (:mod:`rksc_sgl.placement.pass_times`). A number that is given with ``--rksc-pass-tokens`` is used as
it is. Otherwise it is measured on CUDA; a CPU has its constant unless ``learn`` is given.

Passes in which something was claimed are not timed: their layers do not all compute the same tokens. With several ranks
only the start counts, of which rank 0 tells the others: ranks that learned by themselves would decide differently.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from rksc_sgl.cache_directory import cache_directory
from rksc_sgl.calibration.fingerprint import checksum
from rksc_sgl.placement.pass_times import PassTimes, Timed, differs, load, save, tokens_of_two
from rksc_sgl.placement.worth import LEARN, PASS_TOKENS_VARIABLE, PassCost, learns
from rksc_sgl.sglang_plugin.passes.exit_profiles import profiles_of
from rksc_sgl.sglang_plugin.passes.own_batch import own_batch
from rksc_sgl.sglang_plugin.passes.ranks import agreement, tp_group

logger = logging.getLogger(__name__)

FEW, MANY, TRIES = 2, 2048, 3  # tokens of a short and of a long pass that are tried at the start, and how often each
UNREAD = 64  # timed passes whose events may still be to come


class PassClock:
    """Times the passes of one server.

    Args:
        known: what is taken to be true at first, and its source.
        kept: file for what was learned; None keeps nothing.
        device: kind of device, as torch names it.
    """

    def __init__(self, known: PassCost, source: str, kept: Path | None, device: str) -> None:
        self.times = PassTimes(known, source)
        self.learning = False
        self._kept, self._told = kept, load(kept, known.overlaps) if kept is not None else None
        self._cuda = device == "cuda"
        self._open: deque[tuple[int, Any, Any]] = deque(maxlen=UNREAD)

    @property
    def cost(self) -> PassCost:
        """What a pass takes, as far as is known."""
        return self.times.cost

    @contextmanager
    def timed(self, tokens: int) -> Iterator[None]:
        """A pass that computes so many tokens in every layer; its time is learned from once it is known."""
        self._read()
        if not self._cuda:
            began = time.perf_counter()
            yield
            self.times.note(Timed(tokens, time.perf_counter() - began))
            self._keep()
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._open.append((tokens, begin, end))

    @contextmanager
    def timed_look(self) -> Iterator[None]:
        """A look; the first few are waited for, so that they can be timed."""
        if not (self.learning and self.times.wants_looks):
            yield
            return
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        self.times.note_look(time.perf_counter() - began)

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _read(self) -> None:
        """Learn from the passes that have ended; nobody waits for one."""
        while self._open and self._open[0][2].query():
            tokens, begin, end = self._open.popleft()
            self.times.note(Timed(tokens, begin.elapsed_time(end) / 1000.0))
            self._keep()

    def _keep(self) -> None:
        if not self.times.learned or (self._told is not None and not differs(self.cost, self._told)):
            return
        logger.info("rksc: a pass costs %d tokens before it computes (%s)", self.cost.tokens, self.times.source)
        self._told = self.cost
        if self._kept is None:
            return
        try:
            save(self._kept, self.cost)
        except OSError as error:
            logger.warning("rksc: what a pass costs is not kept: %s", error)
            self._kept = None


_clocks: WeakKeyDictionary[Any, PassClock] = WeakKeyDictionary()


def clock_of(runner: Any) -> PassClock:
    """The clock of a ``ModelRunner``; until :func:`start` it knows the constant of its device, or what was given.

    Raises:
        OptionError: the environment says no number.
    """
    if runner not in _clocks:
        device = torch.device(runner.device).type
        source = "constant" if os.environ.get(PASS_TOKENS_VARIABLE, LEARN) == LEARN else "given"
        _clocks[runner] = PassClock(PassCost.on(device), source, None, device)
    return _clocks[runner]


def described(runner: Any) -> dict[str, Any]:
    """As plain values, for ``GET /rksc/info``."""
    clock = clock_of(runner)
    return {**asdict(clock.cost), "source": clock.times.source}


def start(scheduler: Any) -> None:
    """Find out what a pass costs, on every rank at the same time and between two batches."""
    runner = scheduler.tp_worker.model_runner
    device = torch.device(runner.device).type
    if not learns(device):
        return
    known, kept = PassCost.on(device), _file_of(runner)
    alone = tp_group().world_size == 1
    before = load(kept, known.overlaps) if kept is not None and alone else None
    if before is not None:
        clock = PassClock(before, f"learned by an earlier server ({kept})", kept, device)
    else:
        tried = _tried(scheduler, known, device)
        clock = PassClock(tried or known, "constant" if tried is None else "timed at the start", kept, device)
    clock.learning = alone
    _clocks[runner] = clock
    logger.info("rksc: a pass costs %d tokens before it computes (%s)", clock.cost.tokens, clock.times.source)


def _file_of(runner: Any) -> Path | None:
    """Where it is kept for this model as it is served on this device; None where that cannot be told."""
    fingerprint = profiles_of(runner).fingerprint
    if fingerprint is None:
        return None
    kind = torch.device(runner.device).type
    name = torch.cuda.get_device_name() if kind == "cuda" else kind
    return cache_directory("pass-times") / f"{checksum([asdict(fingerprint), name])[:24]}.json"


def _tried(scheduler: Any, known: PassCost, device: str) -> PassCost | None:
    """From a short and a long pass; None where the pools have no room for the long one."""
    runner = scheduler.tp_worker.model_runner
    free = scheduler.token_to_kv_pool_allocator.available_size() - 2 * scheduler.page_size
    many = min(MANY, free, scheduler.max_req_input_len - 1)
    if many < 8 * FEW:
        return None
    scheduler.forward_stream.wait_stream(scheduler.schedule_stream)
    with torch.no_grad(), scheduler.forward_stream_ctx:
        short, long = (Timed(tokens, _seconds(scheduler, runner, tokens, device)) for tokens in (FEW, many))
    scheduler.schedule_stream.wait_stream(scheduler.forward_stream)
    found = tokens_of_two(short, long, known.overlaps)
    tokens = torch.tensor([found], dtype=torch.float64, device=runner.device)
    return PassCost(int(agreement()(tokens)), known.overlaps)


def _seconds(scheduler: Any, runner: Any, tokens: int, device: str) -> float:
    """Median of a few passes; the first, in which things are compiled, does not count."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    ids = array("q", [(7 * place + 3) % scheduler.model_config.vocab_size for place in range(tokens)])
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(TRIES + 1):
        with own_batch(scheduler, ids) as batch:
            forward_batch = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
            wait()
            began = time.perf_counter()
            runner.forward(forward_batch)
            wait()
            times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
