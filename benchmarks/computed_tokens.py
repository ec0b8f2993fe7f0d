"""Tokens that went through a server's model, whoever asked and however it ended: from SGLang's own counters.

What a client is told counts a prompt whether or not it was computed, and leaves out what a proxy throws away.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import httpx

from rksc_sgl.errors import RkscError

METRICS = "--enable-metrics"  # the server's flag for these counters
IDLE_S = 60.0
_COUNTER = re.compile(r'^sglang:realtime_tokens_total\{.*mode="(\w+)".*\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True)
class ComputedTokens:
    """
    Attributes:
        prompts: of prompts, computed.
        cached: of prompts, found in the cache.
        decoded: in decode steps, one for each token but the first of a generation.
    """

    prompts: int
    cached: int
    decoded: int

    @property
    def computed(self) -> int:
        """All that went through the model."""
        return self.prompts + self.decoded

    def __sub__(self, before: ComputedTokens) -> ComputedTokens:
        return ComputedTokens(self.prompts - before.prompts, self.cached - before.cached, self.decoded - before.decoded)


def flush(url: str) -> None:
    """Empty a server's cache, once all that it was asked has ended.

    Raises:
        RkscError: that has not come within a minute.
    """
    answer = httpx.post(f"{url}/flush_cache?timeout={IDLE_S:g}", timeout=2 * IDLE_S)
    if answer.status_code != 200:
        raise RkscError(f"{url} is not idle: {answer.text}")


def computed_tokens(url: str) -> ComputedTokens:
    """Since the server started.

    Raises:
        RkscError: it has no such counters.
    """
    answer = httpx.get(f"{url}/metrics", timeout=60.0, follow_redirects=True)
    if answer.status_code != 200:
        raise RkscError(f"{url} counts no tokens; start it with {METRICS}")
    counts: dict[str, int] = {}
    for mode, value in _COUNTER.findall(answer.text):
        counts[mode] = counts.get(mode, 0) + int(float(value))
    names = ("prefill_compute", "prefill_cache", "decode")
    return ComputedTokens(*(counts.get(name, 0) for name in names))
