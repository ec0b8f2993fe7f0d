"""SGLang's split prefill as a pass that can lose rows between layers, and which batches and models can run so."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rksc_sgl.errors import RkscError
from rksc_sgl.layer_passes.contract import Run
from rksc_sgl.sglang_plugin.passes.attention_adapters import writing_first
from rksc_sgl.sglang_plugin.passes.narrowed_batch import bind_plan, refusal_of_narrowing
from rksc_sgl.sglang_plugin.passes.packing import Packing, packing_for
from rksc_sgl.sglang_plugin.passes.transfers import to_device

logger = logging.getLogger(__name__)


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
        self.starts = [0, *accumulate(self.lengths)]
        self.runs: Sequence[Run] = [Run(place, 0, length) for place, length in enumerate(self.lengths)]
        self.rows: NDArray[np.int64] = np.arange(self.starts[-1])  # of the whole batch, that are still there
        self.layer = 0
        self._share = 0.0  # of the layer after these, that has run for all that is there
        self._fresh = True  # attention metadata must be made for the current batch
        self._packing: Packing | None = None  # the current batch's attention, where it is not the backend's

    def run_to(self, layer: int) -> None:
        """Run until ``layer`` layers have run; not the last one, see :meth:`finish`."""
        if layer > self.layer:
            self._advance(layer)

    @property
    def depth(self) -> float:
        """Layers that have run for all that was there; a fraction where of one only KV was computed."""
        return self.layer + self._share

    def run_to_kv(self, layer: int) -> None:
        """Run until ``layer`` layers have their KV of all tokens.

        Of the last of them only what KV needs is computed where the model can do that (``rksc_write_kv``, of the CPU
        platform's own layers): whoever goes on runs it whole. Other models run it whole for all.
        """
        self.run_to(layer - 1)
        write = getattr(self.runner.model, "rksc_write_kv", None)
        self._share = 0.0 if write is None or layer == 1 else write(self.current, layer - 1)
        if not self._share:
            self.run_to(layer)

    def _hidden(self) -> torch.Tensor:
        """``[rows there, hidden]`` complete state between two layers."""
        from sglang.srt.layers.layer_boundary.residual import batch as residual_batch

        return residual_batch.stream_of(self.current).snapshot(self.current.hidden_states)

    def last_states(self, places: Sequence[int]) -> torch.Tensor:
        """``[places, hidden]`` last position of these sequences, all there, with the final norm applied."""
        ends = {run.place: self.starts[run.place] + run.end - 1 for run in self.runs}
        hidden = self._hidden()
        (rows,) = to_device([np.searchsorted(self.rows, [ends[place] for place in places])], hidden.device)
        return self.runner.model.model.norm(hidden[rows])

    def narrow(self, runs: Sequence[Run]) -> None:
        """Go on with these runs of rows that are there, in the order of the batch."""
        refusal = refusal_of_narrowing(self.full)
        if refusal:
            raise RkscError(f"{refusal}, but it was narrowed; the check at server start missed this")
        rows = self._rows_of(runs)
        narrowed = _Narrowed.of(self.full, runs, rows, np.searchsorted(self.rows, rows))
        hidden = self._hidden()[narrowed.kept]
        self.current, self.runs, self.rows = narrowed.batch_of(self.full), runs, rows
        self.current.split_index = self.layer
        self._write(hidden)
        self._packing = packing_for(self.runner, self.current, runs)

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

    def _rows_of(self, runs: Sequence[Run]) -> NDArray[np.int64]:
        """Rows of the whole batch, ascending."""
        return np.concatenate([np.arange(run.begin, run.end) + self.starts[run.place] for run in runs])

    def _advance(self, layer: int) -> Any:
        with self._attention():
            fresh = self._fresh and self._packing is None
            result = self._run(self.current, reinit_attn_backend=fresh, forward_count=layer - self.layer)
        self._fresh, self.layer, self._share = False, layer, 0.0
        return result

    def _attention(self) -> AbstractContextManager[None]:
        """What the attention of the current batch needs."""
        if self._packing is not None:
            return self._packing.in_use()
        return writing_first(self.runner.attn_backend) if self.current is not self.full else nullcontext()

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
            (rows,) = to_device([self.rows], hidden.device)
            whole[rows] = hidden
            return original(self.full.input_ids, whole, lm_head, self.full, *args, **kwargs)

        if self.current is self.full:
            yield
            return
        processor.forward = forward
        try:
            yield
        finally:
            del processor.forward


@dataclass(frozen=True, eq=False)
class _Narrowed:
    """Some rows of an extend batch in runs, on the host and, brought there at once, on the device.

    Attributes:
        runs: consecutive rows, each a sequence of its own from here on.
        prefixes, lengths: of the runs, on the host.
        kept: int64 ``[n]`` these rows among those that were there until now.
        rows: int64 ``[n]`` these rows among those of the whole batch.
        places: int64 ``[runs]`` their sequences' places in the whole batch.
        ends, begins, sizes, offsets: int64 ``[runs]`` the runs' last position and one, their prefix, how many tokens
            they have, and where their rows begin.
    """

    runs: Sequence[Run]
    prefixes: list[int]
    lengths: list[int]
    kept: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor
    ends: torch.Tensor
    begins: torch.Tensor
    sizes: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, full: Any, runs: Sequence[Run], rows: NDArray[np.int64], kept: NDArray[np.int64]) -> _Narrowed:
        prefixes = [full.extend_prefix_lens_cpu[run.place] + run.begin for run in runs]
        lengths = [run.end - run.begin for run in runs]
        numbers = (
            *(kept, rows, [run.place for run in runs], np.add(prefixes, lengths), prefixes, lengths),
            [0, *accumulate(lengths[:-1])],
        )
        return cls(runs, prefixes, lengths, *to_device(numbers, full.input_ids.device))

    def batch_of(self, full: Any) -> Any:
        """A copy of the whole batch whose sequences are the runs."""
        batch = copy.copy(full)
        ends = torch.from_numpy(np.add(self.prefixes, self.lengths))
        batch.input_ids, batch.positions = full.input_ids[self.rows], full.positions[self.rows]
        batch.req_pool_indices = full.req_pool_indices[self.places]
        if full.orig_seq_lens is not None:
            batch.orig_seq_lens = full.orig_seq_lens[self.places]
        if full.req_pool_indices_cpu is not None:
            batch.req_pool_indices_cpu = full.req_pool_indices_cpu[[run.place for run in self.runs]]
        batch.seq_lens = self.ends.to(full.seq_lens.dtype)
        batch.seq_lens_cpu = None if full.seq_lens_cpu is None else ends.to(full.seq_lens_cpu.dtype)
        batch.seq_lens_sum = int(np.sum(self.prefixes) + np.sum(self.lengths))
        batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu = self.prefixes, self.lengths
        batch.extend_prefix_lens = self.begins.to(full.extend_prefix_lens.dtype)
        batch.extend_seq_lens = self.sizes.to(full.extend_seq_lens.dtype)
        batch.extend_start_loc = self.offsets.to(full.extend_start_loc.dtype)
        batch.batch_size, batch.extend_num_tokens = len(self.runs), sum(self.lengths)
        if full.rids is not None:
            batch.rids = [full.rids[run.place] for run in self.runs]
        bind_plan(batch, full, self.rows)
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
    logger.warning("rksc: early exits, blends and merges are disabled: %s", reason)
    return reason


def refusal_of_batch(batch: Any) -> str:
    """Why a batch cannot run in layer intervals, on a server that can; empty if it can."""
    captured = batch.capture_hidden_mode
    refusal = refusal_of_narrowing(batch)
    if refusal:
        return refusal
    # fmt: off
    unsupported = {
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
