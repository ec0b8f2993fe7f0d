"""A chat, put into a program of SGLang."""

from __future__ import annotations

from collections.abc import Sequence

import sglang as sgl
from sglang.lang.interpreter import ProgramState

SYSTEM = "You are a careful mathematician."


def ask(s: ProgramState, messages: Sequence[dict[str, str]]) -> None:
    """Append each message as a turn of its role."""
    turns = {"system": sgl.system, "user": sgl.user, "assistant": sgl.assistant}
    for message in messages:
        s += turns[message["role"]](message["content"])
