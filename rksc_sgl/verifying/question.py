"""What is asked about a branch: the question, and the turns of a chat around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DEFAULT_QUESTION = "Is the answer above correct? Reply with {labels}."


@dataclass(frozen=True)
class Turns:
    """What a chat template puts around the turns of a verification.

    Attributes:
        closing: what ends the branch's own turn; empty where it was ended already.
        user: what stands before and after a user's message.
        opening: what opens the assistant's reply, up to its first token.
    """

    closing: str
    user: tuple[str, str]
    opening: str


def question_with_labels(question: str | None, labels: Sequence[str]) -> str:
    """The question as it is asked; None takes :data:`DEFAULT_QUESTION`, ``{labels}`` becomes the labels."""
    return (DEFAULT_QUESTION if question is None else question).replace("{labels}", " or ".join(labels))


def verification_suffix(question: str, turns: Turns | None) -> str:
    """What is appended to a branch's text to ask about it.

    Args:
        question: labels filled in.
        turns: of the chat; None where there are no turns: the question is plain text then.
    """
    if turns is None:
        return f"\n\n{question}\n"
    prefix, suffix = turns.user
    return f"{turns.closing}{prefix}{question}{suffix}{turns.opening}"


def with_thought_closed(opening: str, start: str, end: str, *, thinks: bool) -> str:
    """An assistant's opening after which the next token is the reply, where the model would think first.

    Args:
        opening: as the template gives it; it may open a thought by itself.
        start, end: what begins and ends a thought.
        thinks: whether the model begins a thought where the template does not.
    """
    if start and opening.rstrip().endswith(start):
        return f"{opening}\n{end}\n\n" if opening.endswith("\n") else f"{opening}\n\n{end}\n\n"
    return f"{opening}{start}\n\n{end}\n\n" if thinks else opening
