"""Verification of models whose chat format leaves no place for a question, or that think first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rksc_sgl.errors import OptionError
from rksc_sgl.one_request.options import ForkOptions, ForkSettings
from rksc_sgl.sglang_plugin.one_request.dialects import Chat
from rksc_sgl.sglang_plugin.one_request.service import Service
from rksc_sgl.verifying.chat_affixes import ChatAffixes

AFFIXES = ChatAffixes(("<s>", "</s>"), ("<u>", "</u>"), ("<a>\n", "</a>"), None)


class Tokenizer:
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text]


def chat(affixes: ChatAffixes | None = AFFIXES, *, thinks: bool | None = None, **serving: Any) -> Chat:
    """A dialect whose template has these affixes; with a reasoning parser where it is said whether the model thinks."""
    detector = None if thinks is None else SimpleNamespace(think_start_token="<think>", think_end_token="</think>")
    attributes = {
        "is_gpt_oss": False,
        "chat_encoding_spec": None,
        "template_manager": SimpleNamespace(chat_template_name=None),
        "tokenizer_manager": SimpleNamespace(tokenizer=Tokenizer()),
        "_reasoning_detector": detector,
        "_get_reasoning_from_request": lambda request: thinks,
        **serving,
    }

    class OfAffixes(Chat):
        def _affixes_of(self, request: Any) -> ChatAffixes | None:
            return affixes

    return OfAffixes(SimpleNamespace(**attributes))


def judged(dialect: Chat, rksc: dict[str, Any], *, explicit: bool) -> tuple[Any, ForkOptions]:
    service = Service(ForkSettings())
    return service._judge(dialect, None, None, service.settings.options(rksc), explicit=explicit)


NOT_ASKED = {
    "harmony": chat(is_gpt_oss=True),
    "its own encoding": chat(chat_encoding_spec="dsv32"),
    "a template by name": chat(template_manager=SimpleNamespace(chat_template_name="chatml")),
    "no fixed text": chat(affixes=None),
}


@pytest.mark.parametrize("name", NOT_ASKED)
def test_a_model_that_cannot_be_asked_is_refused_where_that_was_asked_for(name: str) -> None:
    with pytest.raises(OptionError, match=r"^rksc\.verify: .*send rksc\.verify false"):
        judged(NOT_ASKED[name], {"verify": True}, explicit=True)
    with pytest.raises(OptionError, match=r"^rksc\.verify"):
        judged(NOT_ASKED[name], {"select": "score"}, explicit=False)
    judge, options = judged(NOT_ASKED[name], {}, explicit=False)
    assert judge is None and options.verify is None, "the default gives way"


def test_labels_that_begin_alike_are_refused_by_name() -> None:
    with pytest.raises(OptionError, match=r"^rksc\.verify\.labels: label 'no' cannot be told"):
        judged(chat(), {"verify": {"labels": ["no", "none"]}}, explicit=True)


@pytest.mark.parametrize(
    ("thinks", "opening"), [(None, "<a>\n"), (False, "<a>\n"), (True, "<a>\n<think>\n\n</think>\n\n")]
)
def test_a_thought_is_closed_where_the_model_would_think_first(thinks: bool | None, opening: str) -> None:
    turns = chat(thinks=thinks).turns(None)
    assert turns is not None
    assert (turns.closing, turns.user, turns.opening) == ("</a>", ("<u>", "</u>"), opening)


def test_a_thought_that_the_template_opens_is_closed_without_a_parser() -> None:
    turns = chat(ChatAffixes(("", ""), ("<u>", "</u>"), ("<a><think>\n", "</a>"), None)).turns(None)
    assert turns is not None and turns.opening == "<a><think>\n\n</think>\n\n"
