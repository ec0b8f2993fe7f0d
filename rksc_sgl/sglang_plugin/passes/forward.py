"""Where a forward pass becomes ours: an extend batch runs in layer intervals where somebody wants to look between them.

Three hooks work together. ``TpModelWorker.forward_batch_generation`` knows the requests; ``ModelRunner._forward_raw``
prepares the pass, and is told to run it as a split prefill where a policy claims something; and
``ModelRunner.forward_split_prefill`` is then called once and runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from rksc_sgl.layer_passes.contract import PassPolicy
from rksc_sgl.layer_passes.runner import run_pass
from rksc_sgl.metrics import PROBE_SECONDS, counters
from rksc_sgl.sglang_plugin.branch_state import Phase
from rksc_sgl.sglang_plugin.passes import blends, exits, merges, token_confidence
from rksc_sgl.sglang_plugin.passes.claims import Batch
from rksc_sgl.sglang_plugin.passes.pass_clock import clock_of
from rksc_sgl.sglang_plugin.passes.ranks import agreement
from rksc_sgl.sglang_plugin.passes.split_pass import SplitPass, probe_layers, refusal_of_batch

CLAIMS: tuple[Callable[[Batch], PassPolicy | None], ...] = (merges.claim, blends.claim, exits.claim)  # asked in order


@dataclass(frozen=True)
class Claimed:
    """A batch of which something was claimed."""

    batch: Batch
    policies: Sequence[PassPolicy]


_scheduled: ContextVar[Any] = ContextVar("rksc_scheduled", default=None)
_claimed: ContextVar[Claimed | None] = ContextVar("rksc_claimed", default=None)


def remember_batch(original: Callable[..., Any], worker: Any, batch: Any = None, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook: the scheduler's batch, for the hooks below."""
    known = None if batch is None or args or kwargs.get("forward_batch") is not None else batch
    if known is not None:
        token_confidence.note_rows(worker.model_runner, known)
    token = _scheduled.set(known)
    try:
        return original(worker, batch, *args, **kwargs)
    finally:
        _scheduled.reset(token)


def choose_mode(original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook: an extend batch of which a policy claims something runs as a split prefill."""
    scheduled = _scheduled.get()
    if scheduled is None:
        return original(runner, forward_batch, *args, **kwargs)
    with shifted_positions(forward_batch, scheduled.reqs):
        return _in_mode(original, runner, forward_batch, scheduled, *args, **kwargs)


def _in_mode(
    original: Callable[..., Any], runner: Any, forward_batch: Any, scheduled: Any, *args: Any, **kwargs: Any
) -> Any:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    if forward_batch.forward_mode != ForwardMode.EXTEND:
        return original(runner, forward_batch, *args, **kwargs)
    claimed = _claim(runner, forward_batch, scheduled)
    if claimed is None:
        clock = clock_of(runner)
        with clock.timed(forward_batch.extend_num_tokens) if clock.learning else nullcontext():
            return original(runner, forward_batch, *args, **kwargs)
    token = _claimed.set(claimed)
    forward_batch.forward_mode = ForwardMode.SPLIT_PREFILL
    try:
        return original(runner, forward_batch, *args, **kwargs)
    finally:
        forward_batch.forward_mode = ForwardMode.EXTEND
        _claimed.reset(token)


@contextmanager
def shifted_positions(forward_batch: Any, requests: Sequence[Any]) -> Iterator[None]:
    """Within, tokens of a shifted branch stand at later positions than their places in their sequence.

    Rotary positions matter by their differences only, so that nothing but rounding changes. Sampling with a seed takes
    positions, too, and comes after the pass: those are the places.
    """
    shifts = [0 if req.rksc is None else req.rksc.shift for req in requests]
    if not any(shifts):
        yield
        return
    later, places = torch.tensor(shifts), forward_batch.positions
    if not forward_batch.forward_mode.is_decode():
        later = later.repeat_interleave(torch.tensor(forward_batch.extend_seq_lens_cpu))
    # Rows after those of the requests are other beams of some, which are never shifted.
    later = torch.nn.functional.pad(later, (0, places.numel() - later.numel()))
    forward_batch.positions = places + later.to(places.device, places.dtype)
    try:
        yield
    finally:
        forward_batch.positions = places


def run_layers(
    original: Callable[..., Any],
    runner: Any,
    forward_batch: Any,
    reinit_attn_backend: bool = False,
    forward_count: int = 1,
) -> Any:
    """AROUND hook: our own pass, where :func:`choose_mode` asked for one; SGLang's own split prefill otherwise."""
    claimed = _claimed.get()
    if claimed is None:
        return original(runner, forward_batch, reinit_attn_backend, forward_count)

    def run(part: Any, **kwargs: Any) -> Any:
        return original(runner, part, **kwargs)

    states = [req.rksc for req in claimed.batch.requests if req.rksc is not None and req.rksc.needs_pass]
    for state in states:
        state.enter(Phase.PROBING)
    outcome = run_pass(SplitPass(runner, forward_batch, run), claimed.policies)
    for state in states:
        if not state.is_leaving:
            state.enter(Phase.PLACED)
    if any(policy.probes for policy in claimed.policies):
        counters().add(PROBE_SECONDS, outcome.seconds[probe_layers(runner)])
    return outcome.output


def _claim(runner: Any, forward_batch: Any, scheduled: Any) -> Claimed | None:
    """What there is to do with a batch; None where it is an ordinary one."""
    if not any(req.rksc is not None and req.rksc.needs_pass for req in scheduled.reqs):
        return None
    batch = Batch(runner, forward_batch, scheduled, refusal_of_batch(forward_batch), agreement())
    policies = [policy for claim in CLAIMS if (policy := claim(batch)) is not None]
    return Claimed(batch, policies) if policies else None
