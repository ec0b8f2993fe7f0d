"""Where a forward pass becomes ours: an extend batch runs in layer intervals, for exits or for blends and merges.

Three hooks work together. ``TpModelWorker.forward_batch_generation`` knows the requests; ``ModelRunner._forward_raw``
prepares the pass, and is told to run it as a split prefill where there is something to do between the layers; and
``ModelRunner.forward_split_prefill`` is then called once and runs them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from rksc_sgl.early_exit.walk import Watched
from rksc_sgl.metrics import PROBE_SECONDS, counters
from rksc_sgl.sglang_plugin import blends, exits, merges
from rksc_sgl.sglang_plugin.blends import BlendJob
from rksc_sgl.sglang_plugin.layer_pass import Run, SplitPass, probe_layers, refusal_of_model
from rksc_sgl.sglang_plugin.merges import MergeJob
from rksc_sgl.sglang_plugin.opted import options_of_request


@dataclass(frozen=True)
class Work:
    """What is to be done with a batch besides computing it."""

    watched: list[Watched]
    blended: list[BlendJob]
    merging: list[MergeJob]


_batch: ContextVar[Any] = ContextVar("rksc_batch", default=None)
_work: ContextVar[Work | None] = ContextVar("rksc_work", default=None)


def remember_batch(original: Callable[..., Any], worker: Any, batch: Any = None, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook: the scheduler's batch, for the hooks below."""
    known = None if batch is None or args or kwargs.get("forward_batch") is not None else batch
    token = _batch.set(known)
    try:
        return original(worker, batch, *args, **kwargs)
    finally:
        _batch.reset(token)


def choose_mode(original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook: an extend batch with verifications, blends or merges runs as a split prefill."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    batch = _batch.get()
    if batch is None or forward_batch.forward_mode != ForwardMode.EXTEND:
        return original(runner, forward_batch, *args, **kwargs)
    work = _work_in(runner, forward_batch, batch)
    if work is None:
        return original(runner, forward_batch, *args, **kwargs)
    token = _work.set(work)
    forward_batch.forward_mode = ForwardMode.SPLIT_PREFILL
    try:
        return original(runner, forward_batch, *args, **kwargs)
    finally:
        forward_batch.forward_mode = ForwardMode.EXTEND
        _work.reset(token)


def run_layers(
    original: Callable[..., Any],
    runner: Any,
    forward_batch: Any,
    reinit_attn_backend: bool = False,
    forward_count: int = 1,
) -> Any:
    """AROUND hook: our own pass, where :func:`choose_mode` asked for one; SGLang's own split prefill otherwise."""
    work = _work.get()
    if work is None:
        return original(runner, forward_batch, reinit_attn_backend, forward_count)
    requests = _batch.get().reqs

    def run(part: Any, **kwargs: Any) -> Any:
        return original(runner, part, **kwargs)

    layer_pass = SplitPass(runner, forward_batch, run)
    if work.blended or work.merging:
        return _share(layer_pass, work, requests)
    return exits.run(layer_pass, work.watched, requests)


def _share(layer_pass: SplitPass, work: Work, requests: Sequence[Any]) -> Any:
    """The whole forward pass of a batch with blends and merges; the logits processor's output."""
    began = time.perf_counter()
    layer_pass.run_to(probe_layers(layer_pass.runner))
    agree = exits.agreement()
    leaving = merges.decide(layer_pass.runner, work.merging, requests, agree)
    blended = [job for job in work.blended if job.place not in leaving]
    kept = blends.decide(layer_pass.runner, blended, requests, agree)
    runs: list[Run] = []
    for place, length in enumerate(layer_pass.lengths):
        if place not in leaving:
            runs += [Run(place, begin, end) for begin, end in kept.get(place, [(0, length)])]
    counters().add(PROBE_SECONDS, time.perf_counter() - began)
    if not runs:
        return layer_pass.give_up()
    layer_pass.narrow(runs)
    return layer_pass.finish()


def _work_in(runner: Any, forward_batch: Any, batch: Any) -> Work | None:
    """What there is to do with a batch; None where it is an ordinary one."""
    requests: Sequence[Any] = batch.reqs
    if not any(_is_special(req) for req in requests):
        return None
    refusal = refusal_of_batch(runner, forward_batch)
    blended = blends.jobs_of(forward_batch, requests, batch.tree_cache, refusal)
    merging = merges.jobs_of(forward_batch, requests, batch, refusal)
    sharing = "a batch with blends or merges runs at full depth" if blended or merging else ""
    watched = exits.watch(runner, requests, refusal or sharing)
    return Work(watched, blended, merging) if watched or blended or merging else None


def _is_special(req: Any) -> bool:
    """Whether a request is a verification, or has a plan for what it shares."""
    options = options_of_request(req)
    if options is None:
        return False
    plans = (getattr(req, name, None) for name in ("rksc_blend", "rksc_merge"))
    return options.op == "verify" or any(plan is not None for plan in plans)


def refusal_of_batch(runner: Any, batch: Any) -> str:
    """Why a batch cannot run in layer intervals; empty if it can."""
    from sglang.srt.runtime_context import get_parallel

    captured = batch.capture_hidden_mode
    refusal = refusal_of_model(runner.model)
    if refusal:
        return refusal
    # fmt: off
    unsupported = {
        "pipeline parallelism": get_parallel().pp_size > 1,
        "data-parallel attention": batch.global_num_tokens_cpu is not None,
        "LoRA": any(one is not None for one in batch.lora_ids or ()),
        "multimodal input": any(one is not None for one in batch.mm_inputs or ()),
        "embeddings as input": batch.input_embeds is not None or batch.replace_embeds is not None,
        "an encoder": batch.encoder_lens is not None,
        "positions of several dimensions": batch.mrope_positions is not None,
        "two-batch overlap": bool(batch.tbo_children),
        "hidden states in the answer": captured is not None and captured.need_capture(),
    }
    # fmt: on
    return next((f"a batch with {name} runs at full depth" for name, found in unsupported.items() if found), "")
