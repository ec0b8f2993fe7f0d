"""A chat, put into a program of SGLang."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sglang as sgl
from sglang.lang.interpreter import ProgramState

SYSTEM = "You are a careful mathematician."


def ask(s: ProgramState, messages: Sequence[dict[str, str]]) -> None:
    """Append each message as a turn of its role."""
    turns = {"system": sgl.system, "user": sgl.user, "assistant": sgl.assistant}
    for message in messages:
        s += turns[message["role"]](message["content"])


def opened(template: Any, messages: Sequence[dict[str, str]]) -> str:
    """A chat as one text that ends where the assistant's next turn begins.

    A turn of content None does not do that: SGLang's templates write the word "None" and close the turn.

    Args:
        template: SGLang's ``ChatTemplate``.
    """
    messages = list(messages)
    prefix, _ = template.get_prefix_and_suffix("assistant", messages)
    return str(template.get_prompt(messages)) + str(prefix)
