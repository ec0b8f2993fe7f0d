"""SGLang's split prefill as a pass that can lose sequences between layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch


class SplitPass:
    """Runs an extend batch in layer intervals; sequences that left are computed no further.

    What is left is compacted: a copy of the ``ForwardBatch`` with the rows of those that stay, and the complete
    hidden state written back as the residual. The last layer runs for the whole batch again, with zeros for those
    that left, so that the logits processor finds the batch that it was told of; their logits mean nothing.
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
        self.places = list(range(forward_batch.batch_size))
        self.layer = 0
        self._fresh = True  # attention metadata must be made for the current batch

    def run_to(self, layer: int) -> None:
        if layer > self.layer:
            result = self._run(self.current, reinit_attn_backend=self._fresh, forward_count=layer - self.layer)
            assert result is None or layer == self.layers, "a split prefill ended before its last layer"
            self._fresh = False
            self.layer = layer

    def last_states(self) -> torch.Tensor:
        ends = torch.tensor(self.current.extend_seq_lens_cpu).cumsum(0) - 1
        return self.runner.model.model.norm(self._hidden()[ends].contiguous())

    def keep(self, places: Sequence[int]) -> None:
        hidden = self._hidden()
        rows = _rows_of(self.current.extend_seq_lens_cpu, places)
        compact = _compacted(self.current, list(places), rows)
        self._write(compact, hidden[rows])
        self.current = compact
        self.places = [self.places[place] for place in places]

    def finish(self, there: Sequence[int]) -> Any:
        """Run to the end; the logits processor's output for the whole batch.

        Args:
            there: places in the whole batch that stayed, as :func:`rksc_sgl.early_exit.walk.walk` returns them.
        """
        if self.current is self.full and there:
            return self._run(self.full, reinit_attn_backend=self._fresh, forward_count=self.layers - self.layer)
        if there:
            self.run_to(self.layers - 1)
        hidden = self._hidden()
        whole = hidden.new_zeros(self.full.input_ids.shape[0], hidden.shape[1])
        if there:
            whole[_rows_of(self.full.extend_seq_lens_cpu, self.places)] = hidden
        self.full.split_index = self.layers - 1
        self._write(self.full, whole)
        return self._run(self.full, reinit_attn_backend=True, forward_count=1)

    def _hidden(self) -> torch.Tensor:
        """``[rows, hidden]`` complete state between two layers."""
        from sglang.srt.layers.layer_boundary.residual import batch as residual_batch

        return residual_batch.stream_of(self.current).snapshot(self.current.hidden_states)

    def _write(self, forward_batch: Any, hidden: torch.Tensor) -> None:
        from sglang.srt.layers.layer_boundary.residual import batch as residual_batch

        forward_batch.hidden_states = residual_batch.set_written(hidden, forward_batch)
        self._fresh = True


def _rows_of(lengths: Sequence[int], places: Sequence[int]) -> torch.Tensor:
    """Rows of these sequences in a ragged batch."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return torch.cat([torch.arange(int(starts[place]), int(starts[place + 1])) for place in places])


def _compacted(batch: Any, places: list[int], rows: torch.Tensor) -> Any:
    """A copy of an extend batch with some of its sequences."""
    compact = copy.copy(batch)
    device = batch.input_ids.device
    here, rows = torch.tensor(places, device=device), rows.to(device)
    for name in ("input_ids", "positions", "out_cache_loc"):
        setattr(compact, name, getattr(batch, name)[rows])
    for name in ("req_pool_indices", "seq_lens", "orig_seq_lens", "extend_seq_lens", "extend_prefix_lens"):
        value = getattr(batch, name, None)
        setattr(compact, name, None if value is None else value[here])
    for name in ("seq_lens_cpu", "req_pool_indices_cpu"):
        value = getattr(batch, name, None)
        setattr(compact, name, None if value is None else value[here.cpu()])
    for name in ("extend_seq_lens_cpu", "extend_prefix_lens_cpu", "extend_logprob_start_lens_cpu", "rids"):
        value = getattr(batch, name, None)
        setattr(compact, name, None if value is None else [value[place] for place in places])
    compact.batch_size = len(places)
    compact.extend_num_tokens = int(rows.numel())
    compact.seq_lens_sum = int(compact.seq_lens_cpu.sum()) if compact.seq_lens_cpu is not None else None
    lengths = torch.tensor([0, *compact.extend_seq_lens_cpu[:-1]], dtype=torch.int64)
    compact.extend_start_loc = lengths.cumsum(0).to(device=device, dtype=batch.extend_start_loc.dtype)
    return compact
