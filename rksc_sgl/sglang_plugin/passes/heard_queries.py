"""The queries of some rows of a pass, heard where a layer's attention is given them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from rksc_sgl.blending.attended import attention_received
from rksc_sgl.sglang_plugin.passes.rotary_models import attention_modules

logger = logging.getLogger(__name__)


class HeardQueries:
    """Listens at one layer during a pass.

    SGLang's models call their attention (``RadixAttention``) as a module, so that a hook of PyTorch's sees what it is
    given; the CPU platform's own layers call such hooks too. Attention is computed from queries, keys, window and cap;
    sinks, and temperatures that depend on the position, are left out.

    Args:
        runner: SGLang's ``ModelRunner``.
        layer: from 0.
        rows: int64 ``[n]`` rows of the pass, on its device.
        places: int64 ``[n]`` their places in their sequences, on its device.
    """

    def __init__(self, runner: Any, layer: int, rows: torch.Tensor, places: torch.Tensor) -> None:
        self._attention = attention_modules(runner.model)[layer]
        self._pool = runner.token_to_kv_pool
        self._layer, self._rows, self._places = layer, rows, places
        self._queries: torch.Tensor | None = None
        self._handle: Any = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The first call of the layer's attention within is heard."""
        self._handle = self._attention.register_forward_pre_hook(self._hear)
        try:
            yield
        finally:
            self._handle.remove()
            self._queries = None

    def attention_received(self, sequences: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor | None:
        """How much the rows of each sequence attend to all of its tokens, one after another.

        Args:
            sequences: of each how many of the rows are its tokens, and the slots ``[n]`` of all its tokens.

        Returns:
            float32, as many as there are slots; None where nothing was heard, which is logged.
        """
        if self._queries is None:
            _warn_once(type(self._attention).__name__)
            return None
        attention, keys = self._attention, self._pool.get_key_buffer(self._layer)
        scaling, cap = float(attention.scaling), float(attention.logit_cap or 0.0)
        window = -1 if attention.sliding_window_size is None else int(attention.sliding_window_size)
        counts = [count for count, _ in sequences]
        parts = zip(self._queries.split(counts), self._places.split(counts), sequences, strict=True)
        return torch.cat(
            [
                attention_received(own, keys[slots], places, scaling=scaling, window=window, cap=cap)
                for own, places, (_, slots) in parts
            ]
        )

    def _hear(self, attention: Any, given: tuple[Any, ...]) -> None:
        if self._queries is None and given:
            queries = given[0].reshape(len(given[0]), attention.tp_q_head_num, -1)
            self._queries = queries[self._rows]
            self._handle.remove()  # the layers of a compiled stack run one by one while somebody listens


@cache
def _warn_once(kind: str) -> None:
    logger.warning("rksc: %s was not called with its queries, so blends compute what deviates most, whoever asks", kind)
