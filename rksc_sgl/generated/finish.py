"""How a generation ended, as ``meta_info["finish_reason"]`` has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_truncated(meta_info: Mapping[str, Any]) -> bool:
    """Whether it was cut by its token limit."""
    return _reason(meta_info).get("type") == "length"


def why_ended(meta_info: Mapping[str, Any]) -> str:
    """Why somebody else had the server end it, which makes it a part of an answer and none; empty where nobody did."""
    reason = _reason(meta_info)
    if reason.get("type") != "abort":
        return ""
    return f"the server ended the request: {reason.get('message') or 'no reason given'}"


def _reason(meta_info: Mapping[str, Any]) -> Mapping[str, Any]:
    return meta_info.get("finish_reason") or {}
