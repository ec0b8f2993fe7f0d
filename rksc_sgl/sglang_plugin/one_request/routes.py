"""``/rksc/v1``, where one request is one fork; and ``/v1``, where one that asks for it is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from types import ModuleType
from typing import Any

from rksc_sgl.errors import HttpAnswerError, NotForkableError, OptionError
from rksc_sgl.one_request.options import HEADER, ForkSettings
from rksc_sgl.options import KEY
from rksc_sgl.sglang_plugin.one_request import answer
from rksc_sgl.sglang_plugin.one_request.dialects import Chat, Dialect, Text
from rksc_sgl.sglang_plugin.one_request.service import Service, Stream, body_and_layers, http_answer_of

PREFIX = "/rksc"
_DIALECTS: dict[str, type[Dialect]] = {"/v1/chat/completions": Chat, "/v1/completions": Text}
_OWN_ANSWER = f"; this server forks what comes here, unless it says {KEY} false (--rksc-fork, v1)"


class Forks:
    """Answers with forks, in one HTTP process.

    Args:
        settings: defaults and limits.
    """

    def __init__(self, settings: ForkSettings) -> None:
        self._service = Service(settings)
        self._dialects: dict[str, Dialect] = {}

    def dialect(self, path: str, serving: Any) -> Dialect:
        """How the endpoint at one of SGLang's paths speaks."""
        known = self._dialects.get(path)
        if known is None or known.serving is not serving:
            known = self._dialects[path] = _DIALECTS[path](serving)
        return known

    async def asked_on_v1(self, request: Any, raw: Any) -> bool | None:
        """Whether a request on ``/v1`` is a fork because it says so; None where the server's default decides.

        Raises:
            OptionError: what it says cannot be read.
        """
        if HEADER not in raw.headers and KEY.encode() not in await raw.body():
            return None
        _, layers = await body_and_layers(raw)
        said = [one for one in layers if one is not None]
        if said:
            return said[-1] is not False
        client_drives = isinstance(request.custom_params, dict) and KEY in request.custom_params
        return False if client_drives else None

    @property
    def every_v1(self) -> bool:
        """Whether a request on ``/v1`` that says nothing is a fork."""
        return self._service.settings.v1

    async def answer(self, dialect: Dialect, raw: Any, unasked: Callable[[], Awaitable[Any]] | None = None) -> Any:
        """A fork's answer, while its client is there.

        Args:
            unasked: of a request that did not ask for a fork: SGLang's own answer, for what cannot be forked.
        """
        from fastapi.responses import ORJSONResponse
        from starlette.requests import ClientDisconnect

        nobody = ORJSONResponse({}, status_code=499)
        try:
            await raw.body()  # from here on, all that there is to receive is that the client left
        except ClientDisconnect:
            return nobody
        working = asyncio.create_task(self._service.answered(dialect, raw))
        if not await _before_client_leaves(working, raw.receive):
            return nobody
        try:
            answered = working.result()
        except NotForkableError as error:
            return _refusal(http_answer_of(error)) if unasked is None else await unasked()
        except HttpAnswerError as error:
            hint = _OWN_ANSWER if unasked is not None and error.status == 400 else ""
            return _refusal(HttpAnswerError(f"{error}{hint}", error.status, error.param))
        return ORJSONResponse(answered) if isinstance(answered, dict) else _event_stream(answered)


def add_routes(http_server: ModuleType) -> None:
    """Add ``/rksc/v1`` to SGLang's server.

    Raises:
        OptionError: the defaults that this process was started with are of no use.
    """
    from starlette.requests import Request

    forks = http_server.app.state.rksc_forks = Forks(ForkSettings.from_environment())

    async def chat_completions(raw: Any) -> Any:
        return await forks.answer(forks.dialect("/v1/chat/completions", raw.app.state.openai_serving_chat), raw)

    async def completions(raw: Any) -> Any:
        return await forks.answer(forks.dialect("/v1/completions", raw.app.state.openai_serving_completion), raw)

    add = http_server.app.add_api_route
    for path, endpoint in (("/v1/chat/completions", chat_completions), ("/v1/completions", completions)):
        endpoint.__annotations__ = {"raw": Request}  # FastAPI reads it, and this module imports no FastAPI
        add(PREFIX + path, endpoint, methods=["POST"], response_model=None)
    add(f"{PREFIX}/v1/models", http_server.available_models, methods=["GET"])
    add(f"{PREFIX}/v1/models/{{model:path}}", http_server.retrieve_model, methods=["GET"])


async def fork_on_v1(original: Callable[..., Any], serving: Any, request: Any, raw: Any) -> Any:
    """AROUND hook on the handling of a request by any of SGLang's OpenAI endpoints."""
    from starlette.requests import Request

    route = raw.scope.get("route") if isinstance(raw, Request) else None  # gRPC's is none
    path = getattr(route, "path", None)
    if path not in _DIALECTS:
        return await original(serving, request, raw)
    forks: Forks = raw.app.state.rksc_forks
    try:
        asked = await forks.asked_on_v1(request, raw)
    except OptionError as error:
        return _refusal(http_answer_of(error))
    if asked or (asked is None and forks.every_v1):
        own = None if asked else partial(original, serving, request, raw)
        return await forks.answer(forks.dialect(path, serving), raw, own)
    arguments = getattr(request, "chat_template_kwargs", None)
    if arguments and KEY in arguments:  # false
        request.chat_template_kwargs = {name: value for name, value in arguments.items() if name != KEY} or None
    return await original(serving, request, raw)


def _refusal(error: HttpAnswerError) -> Any:
    from fastapi.responses import ORJSONResponse

    headers = {"Retry-After": "1"} if error.status == 429 else None
    return ORJSONResponse(answer.error(error), status_code=error.status, headers=headers)


async def _before_client_leaves(working: asyncio.Task[Any], receive: Any) -> bool:
    """Whether a task came to its end; where the client leaves first it is cancelled, and ends before this returns."""
    leaving = asyncio.create_task(_client_leaves(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.done()
    finally:
        ended = working.done()
        leaving.cancel()
        if not ended:
            working.cancel()
        await asyncio.gather(leaving, *([] if ended else [working]), return_exceptions=True)


async def _client_leaves(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event_stream(stream: Stream) -> Any:
    """A response that sends events, and ends them as soon as the client leaves.

    Starlette's own leaves a generator where it is when its client is gone, until it is collected.
    """
    from starlette.responses import Response

    class EventStream(Response):
        media_type = "text/event-stream"

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            sending = asyncio.create_task(self._send_all(send))
            try:
                if await _before_client_leaves(sending, receive):
                    with contextlib.suppress(OSError):  # the client left in the middle of what was sent to it
                        sending.result()
            finally:
                stream.release()

        async def _send_all(self, send: Any) -> None:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            async with contextlib.aclosing(stream.events):
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                async for event in stream.events:
                    await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    return EventStream()
