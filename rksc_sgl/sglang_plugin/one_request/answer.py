"""The answer of a fork in OpenAI's schema: whole, as the events of a stream, or an error."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rksc_sgl.errors import HttpAnswerError

PIECE = 64  # characters in a chunk of a text that is known already
DONE = "data: [DONE]\n\n"


def whole(
    built: Mapping[int, Any], order: Sequence[int], group: str, usage: dict[str, Any], verdict: dict[str, Any]
) -> dict[str, Any]:
    """The answer with these branches as its choices.

    Args:
        built: SGLang's response of each branch, with one choice.
        order: the branches to return, the best first.
        group: of the fork; the answer's id.
        usage: of the fork.
        verdict: ``rksc``.
    """
    choices = [built[branch].choices[0].model_copy(update={"index": index}) for index, branch in enumerate(order)]
    best = built[order[0]].model_copy(update={"choices": choices})
    return {**best.model_dump(mode="json"), "id": group, "usage": usage, "rksc": verdict}


def chunks(answer: Mapping[str, Any], *, include_usage: bool, every_usage: bool) -> Iterator[str]:
    """The events of a stream that says an answer, the last one included.

    Args:
        answer: as :func:`whole` gives it.
        include_usage: whether a last chunk without choices has ``usage``.
        every_usage: whether each chunk has it.
    """
    chat = answer["object"] == "chat.completion"
    kind = "chat.completion.chunk" if chat else "text_completion"
    common = {"id": answer["id"], "object": kind, "created": answer["created"], "model": answer["model"]}
    if every_usage:
        common["usage"] = answer["usage"]
    choices = answer["choices"]
    for choice in choices:
        parts = list(_chat_parts(choice) if chat else _text_parts(choice))
        for place, part in enumerate(parts):
            last = place == len(parts) - 1
            said = {"index": choice["index"], "logprobs": None, "finish_reason": None, **part}
            if last:
                said.update(finish_reason=choice["finish_reason"], matched_stop=choice["matched_stop"])
            told = {"rksc": answer["rksc"]} if last and choice is choices[-1] else {}
            yield data({**common, "choices": [said], **told})
    if include_usage:
        yield data({**common, "choices": [], "usage": answer["usage"]})
    yield DONE


def data(event: Mapping[str, Any]) -> str:
    """One event of a stream."""
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"


def comment(progress: Mapping[str, Any]) -> str:
    """What a client's reader of events passes over."""
    return f": rksc {json.dumps(progress)}\n\n"


def error(of: HttpAnswerError) -> dict[str, Any]:
    """An error as OpenAI's API has it."""
    kinds = {429: ("rate_limit_error", "too_many_forks"), 504: ("timeout_error", "deadline")}
    kind, code = kinds.get(of.status, ("invalid_request_error" if of.status < 500 else "server_error", None))
    return {"error": {"message": str(of), "type": kind, "param": of.param, "code": code}}


def _chat_parts(choice: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    message = choice["message"]
    yield {"delta": {"role": "assistant", "content": ""}}
    for piece in _pieces(message.get("reasoning_content") or ""):
        yield {"delta": {"reasoning_content": piece}}
    content, logprobs = message.get("content") or "", choice.get("logprobs")
    if logprobs is not None:  # they are of the whole text, so that is one chunk
        yield {"delta": {"content": content}, "logprobs": logprobs}
    else:
        for piece in _pieces(content):
            yield {"delta": {"content": piece}}
    calls = message.get("tool_calls")
    if calls:
        yield {"delta": {"tool_calls": [{**call, "index": place} for place, call in enumerate(calls)]}}
    yield {"delta": {}}


def _text_parts(choice: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if choice.get("logprobs") is not None:
        yield {"text": choice["text"], "logprobs": choice["logprobs"]}
    else:
        for piece in _pieces(choice["text"]):
            yield {"text": piece}
    yield {"text": ""}


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + PIECE] for start in range(0, len(text), PIECE))
