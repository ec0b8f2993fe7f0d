"""What a blend counts against the budget of a prefill batch: what it computes, not the length of its prompt.

SGLang bounds a prefill batch by tokens (``--chunked-prefill-size``, ``--max-prefill-tokens``), each of which it takes
to go through all layers. Of a blend's tokens most go through the probe only, so that by SGLang's count one or two
siblings of some thousand tokens fill a batch that could compute all of them, and each batch costs a pass. A blend that
fits by what it will compute is therefore admitted whole. Its slots are counted as ever.

In the probe's layers all of its tokens are rows of one batch, more than SGLang has planned memory for. Half of what is
free when the server has started has to hold them; rank 0 says how many that are, for all ranks make the same batches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch

from rksc_sgl.placement.worth import computed_by_blend
from rksc_sgl.sglang_plugin.passes.ranks import agreement
from rksc_sgl.sglang_plugin.passes.split_pass import probe_layers

logger = logging.getLogger(__name__)

VALUE_BYTES = 4  # of an activation, at most
FREE_SHARE = 0.5  # of the free memory that the rows of a probe may take


@dataclass(frozen=True)
class ProbeRoom:
    """What a server's prefill batches may hold in the layers of a probe.

    Attributes:
        rows: tokens of all sequences.
        probe_share: layers of the probe, as a share of the model's.
    """

    rows: int
    probe_share: float


_rooms: WeakKeyDictionary[Any, ProbeRoom] = WeakKeyDictionary()
_room: ContextVar[ProbeRoom | None] = ContextVar("rksc_probe_room", default=None)


def make_room(scheduler: Any) -> None:
    """Find out how many rows a probe may have, on all ranks alike; before that every token counts."""
    runner = scheduler.tp_worker.model_runner
    rows = agreement()(torch.tensor([rows_of_memory(runner)], device=runner.device))
    _rooms[scheduler] = ProbeRoom(int(rows), probe_layers(runner) / runner.model_config.num_hidden_layers)
    logger.info("rksc: a probe may have %d rows", int(rows))


@contextmanager
def admitting(scheduler: Any) -> Iterator[None]:
    """A prefill batch of this scheduler is made."""
    token = _room.set(_rooms.get(scheduler))
    try:
        yield
    finally:
        _room.reset(token)


def admit_by_computed(
    original: Callable[..., Any], adder: Any, req: Any, has_chunked_req: bool, truncation_align_size: int | None
) -> Any:
    """AROUND hook: a blend is admitted to a prefill batch by what it computes."""
    charged = _charged(adder, req)
    if charged is None:
        return original(adder, req, has_chunked_req, truncation_align_size)
    tokens, before = _tokens(req), len(adder.can_run_list)
    _raise(adder, tokens - charged)
    result = original(adder, req, has_chunked_req, truncation_align_size)
    if len(adder.can_run_list) > before and adder.new_chunked_req is not req:
        req.rksc.sharing.budget_tokens = charged
    else:
        _raise(adder, charged - tokens)
    return result


def _tokens(req: Any) -> int:
    return len(req.full_untruncated_fill_ids) - req.prefix_len


def _raise(adder: Any, tokens: int) -> None:
    adder.rem_input_tokens += tokens
    if adder.rem_chunk_tokens is not None:
        adder.rem_chunk_tokens += tokens


def _charged(adder: Any, req: Any) -> int | None:
    """What a request counts where it is a blend that fits into the batch because of that; None where it is not."""
    room, state = _room.get(), req.rksc
    if room is None or state is None or state.blend is None:
        return None
    tokens, prompt = _tokens(req), state.blend.source.size
    after_prompt = min(tokens, max(0, len(req.full_untruncated_fill_ids) - prompt))
    computed = state.blend.computed(req.prefix_len) + after_prompt
    charged = math.ceil(computed_by_blend(tokens, computed, room.probe_share))
    fits = adder.rem_chunk_tokens is None or charged <= adder.rem_chunk_tokens
    rows = tokens + sum(one.extend_len for one in adder.can_run_list)
    return charged if fits and rows <= room.rows and charged < tokens else None


def rows_of_memory(runner: Any) -> int:
    """Rows of a layer that half of the free memory of a server's device holds."""
    device = torch.device(runner.device)
    free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    return int(FREE_SHARE * free / bytes_of_row(runner.model_config))


def bytes_of_row(model_config: Any) -> int:
    """What one token takes in a layer, at most: its states before and after, and those within attention and MLP."""
    hidden = model_config.hidden_size
    inner = max(getattr(model_config.hf_text_config, "intermediate_size", None) or 0, 4 * hidden)
    return VALUE_BYTES * (6 * hidden + 3 * inner)
