"""What a model's chat template puts before and after each role's message, read off the server.

SGLang's frontend picks a template by the model's name and falls back to ``USER:``/``ASSISTANT:`` for names that it
does not know, such as a local path. The server knows the tokenizer's own template: ``/tokenize`` renders messages
with it and ``/detokenize`` gives the text, so the affixes can be had from any SGLang server.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang.lang.chat_template import ChatTemplate

from rksc_sgl.errors import ServerRefusedError

logger = logging.getLogger(__name__)

NAME = "rksc-from-server"
SYSTEM, USER, ASSISTANT, LAST = "SysMark", "UserMark", "BotMark", "LastMark"
PostJson = Callable[[str, dict[str, Any]], Any]


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


def chat_template_from_server(post_json: PostJson) -> ChatTemplate | None:
    """The server's template as SGLang's frontend wants it, or None where it has none that fits.

    Args:
        post_json: sends a body to a path of the server and returns the parsed answer.
    """
    question = [("system", SYSTEM), ("user", USER)]
    answer = [*question, ("assistant", ASSISTANT)]
    try:
        renderings = Renderings(
            question=_render(post_json, question),
            prompt=_render(post_json, question, open_answer=True),
            conversation=_render(post_json, [*answer, ("user", LAST)]),
            answer=_render(post_json, answer),
            no_system=_render(post_json, [("user", USER)]),
            start=_text(post_json, post_json("/tokenize", {"prompt": ""})["tokens"]),
        )
        template = template_from_renderings(renderings)
    except ServerRefusedError as error:
        logger.warning("no chat template could be read from the server (%s)", error)
        return None
    if template is None:
        logger.warning("the server's chat template has no fixed text around each role's messages")
    return template


def template_from_renderings(of: Renderings) -> ChatTemplate | None:
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
    return ChatTemplate(
        name=NAME,
        default_system_prompt=default_system,  # type: ignore[arg-type]
        role_prefix_and_suffix={
            "system": (system_prefix, system_suffix),
            "user": (user_prefix, user_suffix),
            "assistant": (opened.removeprefix(user_suffix), assistant_suffix),
        },
        # Stop strings that the frontend would add to each request; the end-of-turn token stops by itself.
        stop_str=[],
    )


def _render(post_json: PostJson, messages: list[tuple[str, str]], open_answer: bool = False) -> str:
    body = {
        "messages": [{"role": role, "content": content} for role, content in messages],
        "add_generation_prompt": open_answer,
    }
    return _text(post_json, post_json("/tokenize", body)["tokens"])


def _text(post_json: PostJson, ids: list[int]) -> str:
    if not ids:
        return ""
    return post_json("/detokenize", {"tokens": ids, "skip_special_tokens": False})["text"]
