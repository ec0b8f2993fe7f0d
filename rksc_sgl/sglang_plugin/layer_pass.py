"""SGLang's split prefill as a pass that can lose rows between layers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Consecutive new tokens of one sequence of an extend batch.

    Attributes:
        place: the sequence's place in the batch.
        begin, end: among its new tokens, from 0.
    """

    place: int
    begin: int
    end: int


class SplitPass:
    """Runs an extend batch in layer intervals, after any of which it can go on with some of its rows only.

    What is left is a copy of the ``ForwardBatch`` in which each :class:`Run` is a sequence of its own on the same
    slots: what comes before it is its prefix, whoever wrote the KV there. Keys and values of a layer are written for
    the whole batch before attention reads any, so later runs of a sequence see the earlier ones. The logits processor
    is given the whole batch at the end, with zeros for the rows that were left out: those of a sequence whose last
    token was left out mean nothing.
    """

    def __init__(self, runner: Any, forward_batch: Any, run: Callable[..., Any]) -> None:
        """
        Args:
            runner: SGLang's ``ModelRunner``.
            forward_batch: an extend batch in mode SPLIT_PREFILL, before its first layer.
            run: ``ModelRunner.forward_split_prefill`` as SGLang has it, bound.
        """
        self.runner, self.full, self.current, self._run = runner, forward_batch, forward_batch, run
        self.layers = runner.model_config.num_hidden_layers
        self.lengths: list[int] = list(forward_batch.extend_seq_lens_cpu)
        self.starts = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        self.runs: Sequence[Run] = [Run(place, 0, length) for place, length in enumerate(self.lengths)]
        self.rows = self._rows_of(self.runs)  # of the whole batch, that are still there
        self.layer = 0
        self._fresh = True  # attention metadata must be made for the current batch

    def run_to(self, layer: int) -> None:
        """Run until ``layer`` layers have run; not the last one, see :meth:`finish`."""
        if layer > self.layer:
            self._advance(layer)

    def _hidden(self) -> torch.Tensor:
        """``[rows there, hidden]`` complete state between two layers."""
        from sglang.srt.layers.layer_boundary.residual import batch as residual_batch

        return residual_batch.stream_of(self.current).snapshot(self.current.hidden_states)

    def last_states(self) -> torch.Tensor:
        """``[sequences there, hidden]`` last position of each, with the final norm applied."""
        ends = torch.tensor(self.current.extend_seq_lens_cpu).cumsum(0) - 1
        return self.runner.model.model.norm(self._hidden()[ends].contiguous())

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these of the sequences that are there (places among them, ascending)."""
        self.narrow([self.runs[place] for place in places])

    def narrow(self, runs: Sequence[Run]) -> None:
        """Go on with these runs of rows that are there, in the order of the batch."""
        rows = self._rows_of(runs)
        hidden = self._hidden()[torch.searchsorted(self.rows, rows).to(self.full.input_ids.device)]
        self.current, self.runs, self.rows = _batch_of(self.full, runs, rows), runs, rows
        self.current.split_index = self.layer
        self._write(hidden)

    def finish(self) -> Any:
        """Run to the end with what is there; the logits processor's output for the whole batch."""
        with self._logits_of_the_whole_batch():
            return self._advance(self.layers)

    def give_up(self) -> Any:
        """The logits processor's output where nobody needs another layer; of no meaning.

        The last layer runs for one row: a model offers its logits processor only at the end of it.
        """
        first = self.runs[0]
        self.narrow([Run(first.place, first.begin, first.begin + 1)])
        self.current.split_index = self.layer = self.layers - 1
        return self.finish()

    def _rows_of(self, runs: Sequence[Run]) -> torch.Tensor:
        """Rows of the whole batch, ascending."""
        return torch.cat([torch.arange(self.starts[r.place] + r.begin, self.starts[r.place] + r.end) for r in runs])

    def _advance(self, layer: int) -> Any:
        result = self._run(self.current, reinit_attn_backend=self._fresh, forward_count=layer - self.layer)
        self._fresh, self.layer = False, layer
        return result

    def _write(self, hidden: torch.Tensor) -> None:
        from sglang.srt.layers.layer_boundary.residual import batch as residual_batch

        self.current.hidden_states = residual_batch.set_written(hidden, self.current)
        self._fresh = True

    @contextmanager
    def _logits_of_the_whole_batch(self) -> Iterator[None]:
        processor = self.runner.model.logits_processor
        original = processor.forward

        def forward(input_ids: Any, hidden: torch.Tensor, lm_head: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            whole = hidden.new_zeros(self.starts[-1], hidden.shape[1])
            whole[self.rows.to(hidden.device)] = hidden
            return original(self.full.input_ids, whole, lm_head, self.full, *args, **kwargs)

        if self.current is self.full:
            yield
            return
        processor.forward = forward
        try:
            yield
        finally:
            del processor.forward


def _batch_of(full: Any, runs: Sequence[Run], rows: torch.Tensor) -> Any:
    """A copy of an extend batch whose sequences are runs of its rows."""
    batch = copy.copy(full)
    device = full.input_ids.device
    places = torch.tensor([run.place for run in runs])
    prefixes = [full.extend_prefix_lens_cpu[run.place] + run.begin for run in runs]
    lengths = [run.end - run.begin for run in runs]
    ends = torch.tensor([prefix + length for prefix, length in zip(prefixes, lengths, strict=True)])
    rows = rows.to(device)
    for name in ("input_ids", "positions", "out_cache_loc"):
        setattr(batch, name, getattr(full, name)[rows])
    for name in ("req_pool_indices", "req_pool_indices_cpu", "orig_seq_lens"):
        value = getattr(full, name, None)
        setattr(batch, name, None if value is None else value[places.to(value.device)])
    batch.seq_lens = ends.to(full.seq_lens)
    batch.seq_lens_cpu = None if full.seq_lens_cpu is None else ends.to(full.seq_lens_cpu)
    batch.seq_lens_sum = int(ends.sum())
    batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu = prefixes, lengths
    batch.extend_prefix_lens = torch.tensor(prefixes).to(full.extend_prefix_lens)
    batch.extend_seq_lens = torch.tensor(lengths).to(full.extend_seq_lens)
    batch.extend_start_loc = torch.tensor([0, *lengths[:-1]]).cumsum(0).to(full.extend_start_loc)
    batch.batch_size, batch.extend_num_tokens = len(runs), int(rows.numel())
    if full.rids is not None:
        batch.rids = [full.rids[run.place] for run in runs]
    return batch


def probe_layers(runner: Any) -> int:
    """How many layers run for every token of a prompt that shares."""
    return probed_of(runner.model_config.num_hidden_layers)


def probed_of(layers: int) -> int:
    """How many layers of a model with so many are the probe: a fifteenth, at least two."""
    return max(2, layers // 15)


def refusal_of_model(model: Any) -> str:
    """Why a model cannot run in layer intervals; empty if it can."""
    if hasattr(model, "forward_split_prefill") and hasattr(getattr(model, "model", None), "norm"):
        return ""
    return _said_once(f"{type(model).__name__} has no split prefill")


@cache
def _said_once(reason: str) -> str:
    logger.warning("rksc: neither early exits nor blends nor merges: %s", reason)
    return reason
