"""The report for clients of the OpenAI-compatible endpoints: ``metadata["rksc"]``, in the answer or a last chunk.

SGLang gives ``meta_info`` to chat answers that are not streamed, if asked, and to nobody else. A request that opted in
gets its report without asking: one object, or with ``n > 1`` a list by index.
"""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from rksc_sgl.options import KEY

END = "data: [DONE]\n\n"


class _Tapped:
    """SGLang's tokenizer manager, with the reports that pass through it kept by index."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self.reports: dict[int, Any] = {}
        self.id = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    async def generate_request(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """As SGLang's."""
        async for content in self._manager.generate_request(*args, **kwargs):
            for place, one in enumerate(content if isinstance(content, list) else [content]):
                report = one["meta_info"].get(KEY)
                self.id = one["meta_info"]["id"]
                if report is not None:
                    self.reports[one.get("index", place)] = report
            yield content

    def told(self) -> Any:
        """The report of one choice, or a list of them in their order."""
        reports = [self.reports[index] for index in sorted(self.reports)]
        return reports[0] if len(reports) == 1 else reports


async def report_in_answer(original: Callable[..., Any], serving: Any, adapted: Any, request: Any, raw: Any) -> Any:
    """AROUND hook on an endpoint's answer that is not streamed."""
    if not _opted_in(request):
        return await original(serving, adapted, request, raw)
    tapped = _with_tap(serving)
    answer = await original(tapped, adapted, request, raw)
    if tapped.tokenizer_manager.reports and hasattr(answer, "metadata"):
        answer.metadata = {**(answer.metadata or {}), KEY: tapped.tokenizer_manager.told()}
    return answer


async def report_in_stream(
    original: Callable[..., Any], serving: Any, adapted: Any, request: Any, raw: Any
) -> AsyncIterator[str]:
    """AROUND hook on an endpoint's stream: one more chunk before its end, without choices, as the one of usage is."""
    if not _opted_in(request):
        async for event in original(serving, adapted, request, raw):
            yield event
        return
    tapped = _with_tap(serving)
    kind = "chat.completion.chunk" if hasattr(request, "messages") else "text_completion"
    async for event in original(tapped, adapted, request, raw):
        tap = tapped.tokenizer_manager
        if event == END and tap.reports:
            chunk = {"id": tap.id, "object": kind, "created": 0, "model": request.model, "choices": []}
            yield f"data: {json.dumps({**chunk, 'metadata': {KEY: tap.told()}})}\n\n"
        yield event


def _opted_in(request: Any) -> bool:
    return isinstance(request.custom_params, dict) and KEY in request.custom_params


def _with_tap(serving: Any) -> Any:
    """The endpoint, for one request, with a tokenizer manager whose reports are kept."""
    tapped = copy.copy(serving)
    tapped.tokenizer_manager = _Tapped(serving.tokenizer_manager)
    return tapped
