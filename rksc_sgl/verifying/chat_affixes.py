"""What a chat template puts before and after each role's message, cut out of its renderings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

SYSTEM, USER, ASSISTANT, LAST = "SysMark", "UserMark", "BotMark", "LastMark"

Render = Callable[[Sequence[tuple[str, str]], bool], str]
"""Takes messages as (role, content), and whether the assistant's answer is opened; returns the text."""


@dataclass(frozen=True)
class Renderings:
    """One template's renderings of conversations whose messages are the marks above.

    Attributes:
        question: system, user.
        prompt: the same, opened for the assistant's answer.
        conversation: system, user, assistant, user.
        answer: system, user, assistant.
        no_system: user alone.
        start: what the tokenizer puts before every text by itself (a begin-of-sequence token, or nothing).
    """

    question: str
    prompt: str
    conversation: str
    answer: str
    no_system: str
    start: str

    @classmethod
    def by(cls, render: Render, start: str) -> Renderings:
        """Render what is needed."""
        question = [("system", SYSTEM), ("user", USER)]
        answer = [*question, ("assistant", ASSISTANT)]
        return cls(
            question=render(question, False),
            prompt=render(question, True),
            conversation=render([*answer, ("user", LAST)], False),
            answer=render(answer, False),
            no_system=render([("user", USER)], False),
            start=start,
        )


@dataclass(frozen=True)
class ChatAffixes:
    """Text before and after each role's message.

    Attributes:
        system, user, assistant: before and after.
        default_system: the system message that the template inserts where there is none; None for none.
    """

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    default_system: str | None


def affixes_from_renderings(of: Renderings) -> ChatAffixes | None:
    """Cut the affixes out of the renderings; None where the template does more than wrap each message."""
    try:
        head, rest = of.question.split(SYSTEM)
        system_to_user, user_suffix = rest.split(USER)
        opened = of.prompt.split(USER)[1]
        assistant_suffix = of.answer.split(ASSISTANT)[1]
        assistant_to_user = of.conversation.split(ASSISTANT)[1].split(LAST)[0]
        user_alone = of.no_system.split(USER)[0]
    except (ValueError, IndexError):
        return None
    if not opened.startswith(user_suffix) or not assistant_to_user.startswith(assistant_suffix):
        return None
    user_prefix = assistant_to_user[len(assistant_suffix) :]
    if not user_prefix or not system_to_user.endswith(user_prefix):
        return None
    system_prefix = head.removeprefix(of.start)
    system_suffix = system_to_user.removesuffix(user_prefix)
    # Without a system message a template may insert its own.
    inserted = user_alone.removeprefix(of.start).removesuffix(user_prefix)
    default_system = None
    if inserted.startswith(system_prefix) and inserted.endswith(system_suffix):
        default_system = inserted.removeprefix(system_prefix).removesuffix(system_suffix) or None
    return ChatAffixes(
        system=(system_prefix, system_suffix),
        user=(user_prefix, user_suffix),
        assistant=(opened.removeprefix(user_suffix), assistant_suffix),
        default_system=default_system,
    )
