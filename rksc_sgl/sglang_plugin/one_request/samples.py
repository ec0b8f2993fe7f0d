"""``n > 1`` on SGLang's own endpoints, for requests that opted in: each sample is a branch of one group.

SGLang makes ``n`` copies of a request, ``custom_params`` and all, after one more that generates nothing, so that the
prompt is in the cache. Left alone, five requests would be counted for four samples, and all would say branch 0. Here
samples are numbered from the client's ``branch`` on, in a group of their own where it names none, and the first of them
is what the others wait for: SGLang's further request is not sent. With images it is, but does not count as a branch,
for branches do not wait for each other's images.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from rksc_sgl.options import KEY, RequestOptions, options_of
from rksc_sgl.placement.ranks import rank_of_fork
from rksc_sgl.sglang_plugin.memory.ending import tell_end


async def number_samples(
    original: Callable[..., AsyncIterator[Any]], manager: Any, obj: Any, request: Any, request_states: Any
) -> AsyncIterator[Any]:
    """AROUND hook on SGLang's handling of a request of several prompts or samples."""
    numbering = _Numbering(manager, obj) if getattr(obj, "parallel_sample_num", 1) > 1 else manager
    try:
        async for response in original(numbering, obj, request, request_states):
            yield response
    finally:
        if isinstance(numbering, _Numbering):
            numbering.tell_end()


class _Numbering:
    """SGLang's tokenizer manager for one request with ``n > 1``.

    SGLang sends one priming request for each prompt, and then ``n`` samples of each.
    """

    def __init__(self, manager: Any, obj: Any) -> None:
        self._manager = manager
        self._prompts, self._samples = obj.batch_size, obj.parallel_sample_num
        self._images = obj.contains_mm_input()
        self._options: list[RequestOptions | None] = []  # of each prompt; its group is there
        self._sent = 0
        self._named_here: list[str] = []  # groups that nobody else can know
        self._not_sent: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    async def _send_one_request(self, tokenized: Any) -> None:
        """As SGLang's."""
        params = tokenized.sampling_params
        if len(self._options) < self._prompts:
            options = options_of(params.custom_params)
            if options is not None and options.group is None:
                self._named_here.append(uuid.uuid4().hex)
                options = replace(options, group=self._named_here[-1])
            self._options.append(options)
            if options is not None and not self._images:
                self._not_sent.add(tokenized.rid)
                return
            if options is not None:
                params.custom_params = {name: value for name, value in params.custom_params.items() if name != KEY}
        else:
            prompt, sample = divmod(self._sent, self._samples)
            self._sent += 1
            options = self._options[prompt]
            if options is not None:
                tokenized.sampling_params = copy.copy(params)
                tokenized.sampling_params.custom_params = {
                    **params.custom_params,
                    KEY: numbered(options, sample, self._samples).to_mapping(),
                }
        if tokenized.routed_dp_rank is None:
            tokenized.routed_dp_rank = rank_of_fork(options, self._manager.elastic_worker_count)
        await self._manager._send_one_request(tokenized)

    def tell_end(self) -> None:
        """Nothing more of the groups that were named here is to come."""
        for group in self._named_here:
            tell_end(self._manager, group)

    def _wait_one_response(self, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        """As SGLang's; at once where nothing was sent."""
        if obj.rid not in self._not_sent:
            return self._manager._wait_one_response(obj, request)
        del self._manager.rid_to_state[obj.rid]
        return _nothing()


def numbered(options: RequestOptions, sample: int, samples: int) -> RequestOptions:
    """The options of one of several samples.

    Args:
        options: the client's; its ``branch`` is that of the first sample.
        sample: from 0.
        samples: ``n``.
    """
    branches = max(options.branches, options.branch + samples)
    return replace(options, branch=options.branch + sample, branches=branches)


async def _nothing() -> AsyncIterator[Any]:
    yield {}
