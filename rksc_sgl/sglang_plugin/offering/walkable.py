"""Proof, before anybody is served, that the layers of a model can be walked: one pass of a few tokens, both ways.

SGLang's split prefill exists for some models and is not used by SGLang itself unless ``--enable-pdmux`` is given, so
that it may be out of step with the rest: that of Gemma 1, 2 and 3 begins no residual stream in this release, and what
raises between two layers raises in the scheduler and ends the server. What a model can do is therefore tried once at
the start. The pass is made of a request of our own with slots of its own, which are given back.
"""

from __future__ import annotations

import logging
from array import array
from typing import Any

import torch

from rksc_sgl.layer_passes.contract import Run
from rksc_sgl.sglang_plugin.passes.own_batch import own_batch
from rksc_sgl.sglang_plugin.passes.split_pass import SplitPass

logger = logging.getLogger(__name__)

TOKENS = 2  # the first of them leaves after the first layer
ALLOWED = 0.05  # of the spread of the logits: two orders of summation in 16 bits, not another result


def prove_walkable(scheduler: Any) -> str:
    """Why a model cannot be walked layer by layer; empty if it can.

    The last of a few tokens goes through all layers, the others leave after the first one; the logits must be those of
    an ordinary pass. To be called by every rank of a server at the same time and between two batches, for the model's
    collective operations run. A model that fails fails on all ranks alike.

    Args:
        scheduler: SGLang's ``Scheduler``, its pools empty or not.
    """
    runner = scheduler.tp_worker.model_runner
    name = type(runner.model).__name__
    refusal = _refusal_of_trying(scheduler)
    if refusal:
        return f"the layers of {name} cannot be walked: {refusal}"
    scheduler.forward_stream.wait_stream(scheduler.schedule_stream)
    try:
        with torch.no_grad(), scheduler.forward_stream_ctx, own_batch(scheduler, _tokens(scheduler)) as batch:
            expected = _ordinary_logits(runner, batch)
            found = _walked_logits(runner, batch)
            difference = float((found - expected).abs().max())
            spread = float(expected.max() - expected.min())
    except Exception as error:  # whatever it is, it would have ended the server at the first request that walks
        logger.warning("rksc: the layers of %s cannot be walked", name, exc_info=True)
        return f"the layers of {name} cannot be walked: {type(error).__name__}: {error}"
    scheduler.schedule_stream.wait_stream(scheduler.forward_stream)
    if difference <= ALLOWED * spread:  # False for NaN
        return ""
    return (
        f"the layers of {name} can be walked, but to other logits: {difference:.3g} apart "
        f"where the logits of an ordinary pass spread over {spread:.3g}"
    )


def _refusal_of_trying(scheduler: Any) -> str:
    """Why not even a pass can be tried; empty if it can."""
    from sglang.srt.runtime_context import get_parallel

    runner = scheduler.tp_worker.model_runner
    unsupported = {
        "it has no split prefill": not hasattr(runner.model, "forward_split_prefill"),
        "it has no final norm where one is looked for": not hasattr(getattr(runner.model, "model", None), "norm"),
        "it has a single layer": runner.model_config.num_hidden_layers < 2,
        "no rank has all of them (pipeline parallelism)": get_parallel().pp_size > 1,
        "batches are padded to those of other ranks (data-parallel attention)": scheduler.require_mlp_sync,
    }
    return next((reason for reason, found in unsupported.items() if found), "")


def _tokens(scheduler: Any) -> array[int]:
    return array("q", [(7 * place + 3) % scheduler.model_config.vocab_size for place in range(TOKENS)])


def _forward_batch(runner: Any, batch: Any) -> Any:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    return ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)


def _ordinary_logits(runner: Any, batch: Any) -> torch.Tensor:
    """``[vocabulary]`` float32, after the last token."""
    output = runner.forward(_forward_batch(runner, batch))
    return output.logits_output.next_token_logits[0].float()


def _walked_logits(runner: Any, batch: Any) -> torch.Tensor:
    """The same, where the other tokens left after the first layer; the slots have their KV from the ordinary pass."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    forward_batch = _forward_batch(runner, batch)
    forward_batch.forward_mode = ForwardMode.SPLIT_PREFILL
    with forward_context(ForwardContext(attn_backend=runner.attn_backend), forward_batch=forward_batch):
        runner._prepare_eager_forward_batch(forward_batch)
        walk = SplitPass(runner, forward_batch, runner.forward_split_prefill)
        walk.run_to(1)
        walk.narrow([Run(0, TOKENS - 1, TOKENS)])
        return walk.finish().next_token_logits[0].float()
