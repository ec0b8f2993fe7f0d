"""A chat as one text."""

from __future__ import annotations

import pytest
from sglang.lang.chat_template import get_chat_template

from programs.asking import opened

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]


@pytest.mark.parametrize("name", ["chatml", "llama-3-instruct", "llama-2-chat", "qwen"])
def test_an_opened_chat_goes_on_as_the_template_writes_the_assistants_turn(name: str) -> None:
    template = get_chat_template(name)
    _, suffix = template.get_prefix_and_suffix("assistant", CHAT)
    whole = template.get_prompt([*CHAT, {"role": "assistant", "content": "Seven."}])
    assert opened(template, CHAT) + "Seven." + suffix == whole
    assert "None" not in opened(template, CHAT)
