"""Calls of tools as an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence


def calls_answer(calls: Sequence[tuple[str, str]]) -> str:
    """One form for equal calls: names and arguments count, not their spelling, nor the order of parallel calls.

    Args:
        calls: name and arguments of each, the arguments as JSON text; what is no JSON is compared as text.
    """
    return json.dumps(sorted(([name, _arguments(text)] for name, text in calls), key=json.dumps), ensure_ascii=False)


def _arguments(text: str) -> str:
    try:
        return json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text.strip()
