"""How sure the model was of each token: the probability of the most likely one, of requests that ask for it.

SGLang's sampling observer sees the logits of a pass, sends what it makes of them to the host beside the sampled tokens,
and is told which of these were committed. It costs one maximum and one sum over the vocabulary for each row that asks;
``top_logprobs_num=1``, which says the same, sorts, copies and sends the tokens' texts too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

ROWS = "rksc_confidence"  # of SGLang's sampling information for one pass: whose confidence is measured

_refusals: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


@dataclass(frozen=True)
class Row:
    """One row of a pass and its request."""

    row: int
    req: Any


def install(scheduler: Any) -> str:
    """Measure on this scheduler where that is possible; why it is not, empty where it is."""
    if scheduler not in _refusals:
        _refusals[scheduler] = _refusal(scheduler)
        if not _refusals[scheduler]:
            scheduler.tp_worker.model_runner.sampling_observer = ConfidenceObserver()
    return _refusals[scheduler]


def described(scheduler: Any) -> dict[str, Any]:
    """The same as plain values, for ``GET /rksc/info``."""
    refusal = install(scheduler)
    return {"offered": not refusal, "refusal": refusal}


def _refusal(scheduler: Any) -> str:
    from sglang.srt.runtime_context import get_parallel

    args, runner = scheduler.server_args, scheduler.tp_worker.model_runner
    found = {
        "speculative decoding, which samples several tokens a pass": not scheduler.spec_algorithm.is_none(),
        "pipeline parallelism, where the first rank does not sample": get_parallel().pp_size > 1,
        "PD multiplexing, whose passes we do not see": bool(args.enable_pdmux),
        "disaggregation, where another server samples the first token": scheduler.disaggregation_mode.value != "null",
        "data-parallel attention, which pads the batch": bool(args.enable_dp_attention),
        "the embedded Rust front end, which has no field for it": scheduler.rust_server is not None,
        "this way of sampling, which SGLang shows to nobody": not runner.supports_sampling_observer(),
        "a sampling observer of somebody else": runner.sampling_observer is not None,
    }
    reason = next((reason for reason, there in found.items() if there), "")
    return f"the confidence of tokens is not measured with {reason}: ask for top_logprobs_num" if reason else ""


def note_rows(runner: Any, batch: Any) -> None:
    """Say on the sampling information of a pass, which is of this pass only, whose confidence is measured.

    Args:
        runner: the model runner.
        batch: the scheduler's, with its requests in the order of rows.
    """
    if batch.sampling_info is None or not isinstance(runner.sampling_observer, ConfidenceObserver):
        return
    rows = tuple(
        Row(row, req) for row, req in enumerate(batch.reqs) if req.rksc is not None and req.rksc.options.confidence
    )
    setattr(batch.sampling_info, ROWS, rows)


class ConfidenceObserver:
    """SGLang's ``SamplingObserver``."""

    def is_active(self, sampling_info: Any) -> bool:
        return bool(getattr(sampling_info, ROWS, ()))

    def before_grammar(self, logits: torch.Tensor, sampling_info: Any) -> OnDevice:
        rows: tuple[Row, ...] = getattr(sampling_info, ROWS)
        if sampling_info.grammar_mask is not None or sampling_info.logit_bias is not None:
            logits = logits.clone()  # as they will be sampled from
            if sampling_info.grammar_mask is not None:
                sampling_info.grammar_mask.apply(logits)
            if sampling_info.logit_bias is not None:
                logits.add_(sampling_info.logit_bias)
        temperatures = sampling_info.temperatures
        if len(rows) < len(logits):
            places = torch.tensor([one.row for one in rows], device=logits.device)
            logits, temperatures = logits[places], temperatures[places]
        return OnDevice(rows, top_probability(logits, temperatures))

    def after_sample(self, state: OnDevice, token_ids: torch.Tensor) -> OnDevice:
        return state


def top_probability(logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """``[rows]`` the largest probability of each row.

    Args:
        logits: ``[rows, vocabulary]``.
        temperatures: ``[rows, 1]``.
    """
    scaled = logits.float() / temperatures
    return (scaled.max(-1).values - scaled.logsumexp(-1)).exp()


@dataclass(frozen=True)
class OnDevice:
    """What was measured in one pass; SGLang's ``DeviceAuxiliaryOutput``."""

    rows: Sequence[Row]
    values: torch.Tensor

    def copy_to_host(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> OnHost:
        return OnHost(self.rows, copy_tensor(self.values))


@dataclass(frozen=True)
class OnHost:
    """The same for the scheduler; SGLang's ``HostAuxiliaryOutput``."""

    rows: Sequence[Row]
    values: torch.Tensor

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Keep what was measured for tokens that the request really got: not those of a chunk of its prompt."""
        committed = {id(req): commit for req, commit in zip(batch.reqs, commits, strict=True) if commit is not None}
        for one, value in zip(self.rows, self.values.tolist(), strict=True):
            commit = committed.get(id(one.req))
            if commit is not None:
                one.req.rksc.note_confidence(commit.output_index, value)
