"""Chat and text completions: from a body to SGLang's own request, and from what was generated to a choice.

Both go through SGLang's serving classes, so that prompts, grammars, tools and thoughts are what they are on ``/v1``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

from rksc_sgl.errors import NotForkableError, OptionError
from rksc_sgl.one_request.fork import Completion
from rksc_sgl.options import KEY
from rksc_sgl.verifying.chat_affixes import ChatAffixes, Renderings, affixes_from_renderings
from rksc_sgl.verifying.question import Turns, with_thought_closed

_THOUGHT = ("<think>", "</think>")  # of templates that open one where no reasoning parser is set
_NO_FORK = ("bootstrap_host", "bootstrap_room", "session_id", "session_params")


class Dialect(ABC):
    """One of the two endpoints.

    Args:
        serving: SGLang's class behind it.
    """

    name: str

    def __init__(self, serving: Any) -> None:
        self.serving = serving

    @property
    def manager(self) -> Any:
        """SGLang's tokenizer manager."""
        return self.serving.tokenizer_manager

    @abstractmethod
    def parse(self, body: dict[str, Any]) -> Any:
        """The body as SGLang's request.

        Raises:
            ValidationError: pydantic's, of a field that is wrong.
        """

    def check(self, request: Any) -> None:
        """
        Raises:
            NotForkableError: it asks for what a fork cannot do; the message names the field.
            OptionError: it is wrong.
        """
        for name in _NO_FORK:
            if getattr(request, name, None) is not None:
                raise NotForkableError(f"{name}: cannot be given to a fork, whose branches are requests of their own")
        if request.rid is not None and not isinstance(request.rid, str):
            raise OptionError(f"rid: must be one id, got {type(request.rid).__name__}")
        if isinstance(request.custom_params, dict) and KEY in request.custom_params:
            raise OptionError(f"custom_params.{KEY}: is the fork's own here; say what it is to do in the field {KEY}")
        if request.n < 1:
            raise OptionError(f"n: must be at least 1, got {request.n}")
        problem = self.serving._validate_request(request)
        if problem:
            raise OptionError(problem)

    @abstractmethod
    def with_wording(self, request: Any, wording: str) -> Any:
        """The request that asks this in place of its last user message.

        Raises:
            OptionError: it has none.
        """

    def convert(self, request: Any, raw: Any) -> Any:
        """SGLang's ``GenerateReqInput`` of a copy of the request, which it may change; slow, so off the event loop."""
        adapted, _ = self.serving._convert_to_internal_request(request, raw)
        for field in ("image_data", "video_data", "audio_data"):
            if getattr(adapted, field, None):
                raise NotForkableError(f"messages: {field.removesuffix('_data')} input cannot be forked; ask /v1")
        return adapted

    @abstractmethod
    def build(self, request: Any, generated: dict[str, Any], created: int) -> Any:
        """SGLang's response with the one choice that was generated; may be an error response of SGLang's."""

    @abstractmethod
    def completion(self, choice: Any, generated: dict[str, Any]) -> Completion:
        """What a choice says: text and calls of tools."""

    @abstractmethod
    def turns(self, request: Any) -> Turns | None:
        """What stands around the question of a verification; None where that is plain text.

        Raises:
            OptionError: nothing can be asked after this model's reply.
        """

    @abstractmethod
    def wants_json(self, request: Any) -> bool:
        """Whether the request asks for JSON."""


class Chat(Dialect):
    """``/chat/completions``."""

    name = "chat.completion"

    def __init__(self, serving: Any) -> None:
        super().__init__(serving)
        self._affixes: dict[str, ChatAffixes | None] = {}

    def parse(self, body: dict[str, Any]) -> Any:
        from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

        return ChatCompletionRequest(**body)

    def with_wording(self, request: Any, wording: str) -> Any:
        if request.input_ids is not None:
            raise OptionError(f"{KEY}.branches: wordings replace a message, and input_ids are given in place of these")
        reworded = request.model_copy(deep=True)
        for message in reversed(reworded.messages):
            if message.role == "user":
                message.content = wording
                return reworded
        raise OptionError(f"{KEY}.branches: wordings are of the last user message, and there is none")

    def build(self, request: Any, generated: dict[str, Any], created: int) -> Any:
        return self.serving._build_chat_response(request, [generated], created)

    def completion(self, choice: Any, generated: dict[str, Any]) -> Completion:
        calls = choice.message.tool_calls or []
        return Completion(
            text=choice.message.content or "",
            calls=tuple((call.function.name or "", call.function.arguments or "") for call in calls),
        )

    def turns(self, request: Any) -> Turns | None:
        serving = self.serving
        own_format = serving.chat_encoding_spec is not None or serving.template_manager.chat_template_name is not None
        if serving.is_gpt_oss or own_format:
            raise OptionError(f"{KEY}.verify: cannot be asked in this model's chat format; send {KEY}.verify false")
        affixes = self._affixes_of(request)
        if affixes is None:
            raise OptionError(
                f"{KEY}.verify: this model's chat template has no fixed text around each turn to ask a question in; "
                f"send {KEY}.verify false"
            )
        opening, closing = affixes.assistant
        detector = serving._reasoning_detector
        start, end = _THOUGHT if detector is None else (detector.think_start_token, detector.think_end_token)
        thinks = detector is not None and serving._get_reasoning_from_request(request)
        return Turns(closing, affixes.user, with_thought_closed(opening, start, end, thinks=thinks))

    def wants_json(self, request: Any) -> bool:
        return _wants_json(request)

    def _affixes_of(self, request: Any) -> ChatAffixes | None:
        """The template's affixes with the request's template arguments, which may switch thoughts."""
        from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

        arguments = {name: value for name, value in (request.chat_template_kwargs or {}).items() if name != KEY}
        key = repr((sorted(arguments.items(), key=repr), request.reasoning_effort))
        if key not in self._affixes:
            tokenizer = self.manager.tokenizer

            def render(messages: Any, opened: bool) -> str:
                turns = [{"role": role, "content": content} for role, content in messages]
                asked = ChatCompletionRequest(
                    messages=turns,
                    chat_template_kwargs=dict(arguments),
                    reasoning_effort=request.reasoning_effort,
                )
                asked._format_add_generation_prompt = opened
                ids = self.serving._process_messages(asked, False).prompt_ids
                return ids if isinstance(ids, str) else tokenizer.decode(ids, skip_special_tokens=False)

            try:
                renderings = Renderings.by(render, tokenizer.decode(tokenizer.encode(""), skip_special_tokens=False))
                found = affixes_from_renderings(renderings)
            except ValueError:  # the template refuses such a conversation
                found = None
            if len(self._affixes) > 64:  # arguments of clients' own making
                self._affixes.clear()
            self._affixes[key] = found
        return self._affixes[key]


class Text(Dialect):
    """``/completions``."""

    name = "text_completion"

    def parse(self, body: dict[str, Any]) -> Any:
        from sglang.srt.entrypoints.openai.protocol import CompletionRequest

        return CompletionRequest(**body)

    def check(self, request: Any) -> None:
        prompt = request.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise NotForkableError(f"prompt: one prompt is one fork, got {len(prompt)}")
            request.prompt = prompt[0]
        if request.suffix is not None:
            raise NotForkableError("suffix: a text that is filled in cannot be forked; ask /v1")
        super().check(request)

    def with_wording(self, request: Any, wording: str) -> Any:
        reworded = request.model_copy(deep=True)
        reworded.prompt = wording
        return reworded

    def build(self, request: Any, generated: dict[str, Any], created: int) -> Any:
        return self.serving._build_completion_response(request, [generated], created)

    def completion(self, choice: Any, generated: dict[str, Any]) -> Completion:
        return Completion(text=generated["text"])  # without the prompt that a choice may echo

    def turns(self, request: Any) -> Turns | None:
        return None

    def wants_json(self, request: Any) -> bool:
        return _wants_json(request) or request.json_schema is not None


def _wants_json(request: Any) -> bool:
    return request.response_format is not None and request.response_format.type in ("json_schema", "json_object")


def without_logprobs(generated: dict[str, Any], asked: Any) -> dict[str, Any]:
    """A copy of what was generated, with only those log-probabilities that the client asked for.

    SGLang's builders change a finish reason, so that is copied too.

    Args:
        generated: text, ids and ``meta_info``.
        asked: SGLang's request, as it was converted.
    """
    meta_info = dict(generated["meta_info"])
    meta_info["finish_reason"] = copy.deepcopy(meta_info.get("finish_reason"))
    if not asked.return_logprob:
        for key in [one for one in meta_info if one.startswith(("input_", "output_")) and "logprobs" in one]:
            del meta_info[key]
    elif not asked.top_logprobs_num:
        for key in [one for one in meta_info if "top_logprobs" in one]:
            del meta_info[key]
    return {**generated, "meta_info": meta_info}
