"""What a model's chat template puts before and after each role's message, read off the server.

SGLang's frontend picks a template by the model's name and falls back to ``USER:``/``ASSISTANT:`` for names that it
does not know, such as a local path. The server knows the tokenizer's own template: ``/v1/tokenize`` renders messages
with it and ``/v1/detokenize`` gives the text, so the affixes can be had from any SGLang server.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from sglang.lang.chat_template import ChatTemplate

from rksc_sgl.errors import ServerRefusedError
from rksc_sgl.verifying.chat_affixes import Renderings, affixes_from_renderings

logger = logging.getLogger(__name__)

NAME = "rksc-from-server"
PostJson = Callable[[str, dict[str, Any]], Any]


def chat_template_from_server(post_json: PostJson) -> ChatTemplate | None:
    """The server's template as SGLang's frontend wants it, or None where it has none that fits.

    Args:
        post_json: sends a body to a path of the server and returns the parsed answer.
    """
    try:
        start = _text(post_json, post_json("/v1/tokenize", {"prompt": ""})["tokens"])
        renderings = Renderings.by(lambda messages, opened: _render(post_json, messages, opened), start)
        template = template_from_renderings(renderings)
    except ServerRefusedError as error:
        logger.warning("no chat template could be read from the server (%s)", error)
        return None
    if template is None:
        logger.warning("the server's chat template has no fixed text around each role's messages")
    return template


def template_from_renderings(of: Renderings) -> ChatTemplate | None:
    """The template with the affixes of these renderings; None where there are none."""
    affixes = affixes_from_renderings(of)
    if affixes is None:
        return None
    return ChatTemplate(
        name=NAME,
        default_system_prompt=affixes.default_system,  # type: ignore[arg-type]
        role_prefix_and_suffix={"system": affixes.system, "user": affixes.user, "assistant": affixes.assistant},
        # Stop strings that the frontend would add to each request; the end-of-turn token stops by itself.
        stop_str=[],
    )


def _render(post_json: PostJson, messages: Sequence[tuple[str, str]], open_answer: bool) -> str:
    body = {
        "messages": [{"role": role, "content": content} for role, content in messages],
        "add_generation_prompt": open_answer,
    }
    return _text(post_json, post_json("/v1/tokenize", body)["tokens"])


def _text(post_json: PostJson, ids: list[int]) -> str:
    if not ids:
        return ""
    return post_json("/v1/detokenize", {"tokens": ids, "skip_special_tokens": False})["text"]
