"""One continuation, put together from the events of a stream."""

from __future__ import annotations

from typing import Any

from rksc_sgl.options import CONFIDENCE

_LISTS = ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs", CONFIDENCE)


class StreamedAnswer:
    """What a stream has said so far.

    SGLang sends the whole continuation in each event, or, with ``--incremental-streaming-output``, only what is new:
    text, token ids and log-probabilities; the rest of ``meta_info`` is of the whole in both.

    Args:
        incremental: whether the server sends only what is new.

    Attributes:
        response: as the answer to a request that does not stream would be now.
    """

    def __init__(self, incremental: bool) -> None:
        self._incremental = incremental
        self.response: dict[str, Any] = {"text": "", "output_ids": [], "meta_info": {}}

    def add(self, event: dict[str, Any]) -> str:
        """Take the next event; the text that it adds."""
        known = self.response
        self.response = dict(event)
        meta_info = self.response["meta_info"]
        aborted = (meta_info.get("finish_reason") or {}).get("type") == "abort"
        if not self._incremental or aborted:  # the event of an abort has the whole text in both
            return str(event["text"][len(known["text"]) :])
        self.response["text"] = known["text"] + event["text"]
        self.response["output_ids"] = known["output_ids"] + event.get("output_ids", [])
        self.response["meta_info"] = dict(meta_info)
        for key in _LISTS:
            if key in meta_info:
                self.response["meta_info"][key] = known["meta_info"].get(key, []) + meta_info[key]
        return str(event["text"])
