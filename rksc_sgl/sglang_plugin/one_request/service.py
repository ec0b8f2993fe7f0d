"""From an HTTP request to the answer of its fork."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import string
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from rksc_sgl.errors import HttpAnswerError, LabelError, NotForkableError, OptionError, ServerError
from rksc_sgl.generated.confidence import is_measured
from rksc_sgl.one_request.fork import Chosen, Completion, Failed, Fork
from rksc_sgl.one_request.options import HEADER, ForkOptions, ForkSettings
from rksc_sgl.one_request.told import progress_of, usage_of, verdict_of
from rksc_sgl.options import KEY, RequestOptions, shown
from rksc_sgl.sglang_plugin.inspection.prometheus_export import export_from_http
from rksc_sgl.sglang_plugin.one_request import answer
from rksc_sgl.sglang_plugin.one_request.counting import CLIENT, FAILED, count_fork, end_of
from rksc_sgl.sglang_plugin.one_request.dialects import Dialect, without_logprobs
from rksc_sgl.sglang_plugin.one_request.driver import Branch, Driver
from rksc_sgl.sglang_plugin.one_request.requests import EVENT_TOKENS, Judge, branch_request, new_rid
from rksc_sgl.sglang_plugin.passes.exit_profiles import profiles_of
from rksc_sgl.verifying.course import gate_of_profiles
from rksc_sgl.verifying.labels import LabelTokens, resolve_labels
from rksc_sgl.verifying.question import question_with_labels
from rksc_sgl.verifying.skip import SkipGate

logger = logging.getLogger(__name__)

_OF_A_FIELD = frozenset(string.ascii_letters + string.digits + "_.-[]")  # a message begins with it
PROGRESS_S = 1.0  # between the comments of a stream


def http_answer_of(error: Exception) -> HttpAnswerError:
    """What is answered to what was raised; where a request was wrong, the field is what the message begins with."""
    if isinstance(error, HttpAnswerError):
        return error
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"])
        return HttpAnswerError(f"{param}: {first['msg']}" if param else first["msg"], 400, param or None)
    status = getattr(error, "status_code", None)  # fastapi's
    if status is not None:
        return HttpAnswerError(str(getattr(error, "detail", error)), int(status))
    if not isinstance(error, ValueError):
        logger.error("one request: the fork failed", exc_info=error)
        return HttpAnswerError(f"internal error: {type(error).__name__}: {error}", 500)
    name, colon, _ = str(error).partition(": ")
    named = colon and not set(name) - _OF_A_FIELD
    return HttpAnswerError(str(error), 400, name if named else None)


@dataclass
class Prepared:
    """A fork that can be driven.

    Attributes:
        group: under which the server knows it.
        request: SGLang's, of the client.
        options: what is asked of the fork.
        fork, driver: its course, and what carries it out.
        built: SGLang's response of each branch that ended.
    """

    group: str
    request: Any
    options: ForkOptions
    fork: Fork
    driver: Driver
    built: dict[int, Any] = field(default_factory=dict)

    async def run(self) -> dict[str, Any]:
        """The answer.

        Raises:
            HttpAnswerError: no branch can be selected.
        """
        try:
            end = await self.driver.run(self.fork)
        except asyncio.CancelledError:
            self.fork.cancelled("its client went away")
            count_fork(self.fork, CLIENT)
            raise
        except Exception:
            count_fork(self.fork, FAILED)
            raise
        count_fork(self.fork, end_of(self.fork, end))
        if isinstance(end, Failed):
            raise HttpAnswerError(end.reason, self._status(end))
        return self._answer(end)

    def _answer(self, chosen: Chosen) -> dict[str, Any]:
        count = len(chosen.order) if self.options.returned == "all" else self.request.n
        usage = usage_of(self.fork, chosen.order[0], self.driver.facts)
        verdict = verdict_of(self.group, self.fork, chosen, self.driver.facts)
        return answer.whole(self.built, chosen.order[:count], self.group, usage, verdict)

    def _status(self, failed: Failed) -> int:
        if failed.late:
            return 504
        statuses = set(self.driver.statuses.values())
        return statuses.pop() if len(statuses) == 1 else 500


@dataclass(frozen=True)
class Stream:
    """Events that are still to come.

    Attributes:
        events: of the answer.
        release: to be called once the stream is over, whether or not it began.
    """

    events: AsyncGenerator[str, None]
    release: Callable[[], None]


class Service:
    """Forks of one HTTP process.

    Args:
        settings: defaults and limits.
    """

    def __init__(self, settings: ForkSettings) -> None:
        self.settings = settings
        self._running: set[object] = set()
        self._labels: dict[tuple[str, ...], LabelTokens] = {}
        self._measured: bool | None = None

    # -- the two kinds of answer -----------------------------------------------------------------------

    async def answered(self, dialect: Dialect, raw: Any) -> dict[str, Any] | Stream:
        """The answer, or the events of a stream.

        Raises:
            NotForkableError: SGLang can answer it, but no fork can.
            HttpAnswerError: of a request that is wrong, a server that is full, or a fork that failed.
        """
        export_from_http(dialect.manager)
        release = self._take_place()
        streams = False
        try:
            prepared = await self._prepare(dialect, raw)
            streams = bool(prepared.request.stream)
            return Stream(self._streamed(prepared), release) if streams else await prepared.run()
        except NotForkableError:
            raise
        except Exception as error:
            raise http_answer_of(error) from error
        finally:
            if not streams:
                release()

    async def _streamed(self, prepared: Prepared) -> AsyncGenerator[str, None]:
        from sglang.srt.entrypoints.openai.utils import should_include_usage
        from sglang.srt.runtime_context import get_serving

        include, every = should_include_usage(
            prepared.request.stream_options, get_serving().stream_response_default_include_usage
        )
        running = asyncio.create_task(prepared.run())
        try:
            yield answer.comment(progress_of(prepared.fork))
            while not running.done():
                await asyncio.wait({running}, timeout=PROGRESS_S)
                yield answer.comment(progress_of(prepared.fork))
            for event in answer.chunks(running.result(), include_usage=bool(include), every_usage=every):
                yield event
        except Exception as error:  # the status was sent long ago
            yield answer.data(answer.error(http_answer_of(error)))
            yield answer.DONE
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def _take_place(self) -> Callable[[], None]:
        """Count a fork; what is returned gives its place back, once.

        Raises:
            HttpAnswerError: there are as many as may be.
        """
        if len(self._running) >= self.settings.limits.forks:
            raise HttpAnswerError(
                f"this server runs at most {self.settings.limits.forks} forks at once; try again", 429
            )
        place = object()
        self._running.add(place)
        return lambda: self._running.discard(place)

    # -- a request becomes a fork ------------------------------------------------------------------------

    async def _prepare(self, dialect: Dialect, raw: Any) -> Prepared:
        """
        Raises:
            OptionError: the message names the field.
        """
        manager = dialect.manager
        if manager.tokenizer is None:
            raise OptionError("this server has no tokenizer (--skip-tokenizer-init), and a fork needs one")
        body, layers = await body_and_layers(raw)
        request = dialect.parse(body)
        options = self.settings.options(*layers, choices=request.n)
        dialect.check(request)
        if options.verify is not None:
            try:
                profiles_of(manager).check_risk(options.verify.as_request())
            except OptionError as error:
                raise OptionError(str(error).replace(f"{KEY}.", f"{KEY}.verify.", 1)) from error
        requests, asked = await self._converted(dialect, request, options, raw)
        ids = [list(one.input_ids) if one.input_ids else manager.tokenizer.encode(one.text) for one in asked]
        most = _most_tokens(asked[0], max(map(len, ids)), options.count, self.settings, manager)
        explicit = any("verify" in layer for layer in layers if layer)
        judge, options = self._judge(dialect, requests[0], asked[0], options, explicit=explicit)
        if self._measured is None:  # as the server was started; it does not change
            self._measured = is_measured(await _schedulers(manager))
        group = uuid.uuid4().hex
        branches = []
        for index in range(options.count):
            own = RequestOptions(group=group, branch=index, branches=options.count, share=options.share)
            place = index % len(asked)
            rid = new_rid(request.rid)
            made = branch_request(
                asked[place],
                ids[place],
                own,
                rid=rid,
                most_tokens=most,
                measured=self._measured,
                event_tokens=_event_tokens(options),
            )
            branches.append(Branch(own, made))
        built: dict[int, Any] = {}
        created = int(time.time())

        def read(branch: int, generated: dict[str, Any]) -> Completion:
            place = branch % len(asked)
            made = dialect.build(requests[place], without_logprobs(generated, asked[place]), created)
            if not hasattr(made, "choices"):
                raise ServerError("what it generated could not be read: the server's log says why")
            built[branch] = made
            return dialect.completion(made.choices[0], generated)

        driver = Driver(manager, branches, read, judge, self.settings.deadline_s(options), request.rid)
        profiles = await _profiles(manager) if options.select == "score" and judge is not None else []

        def certified_gate(branch: int) -> SkipGate | None:
            if judge is None or options.verify is None or not profiles:
                return None
            prompt = judge.prompt_ids(driver.read_by(branch), driver.generated[branch])
            return gate_of_profiles(profiles, prompt, options.verify.risk)

        extract = options.extract or ("json" if dialect.wants_json(request) else "answer")
        loop = asyncio.get_running_loop()
        fork = await loop.run_in_executor(
            None, lambda: Fork(options, extract, certified_gate=certified_gate, launch=_launch(options))
        )
        return Prepared(group, request, options, fork, driver, built)

    async def _converted(
        self, dialect: Dialect, request: Any, options: ForkOptions, raw: Any
    ) -> tuple[list[Any], list[Any]]:
        """The request of each wording, or the one of all branches; SGLang's own, and what it was converted to."""
        wordings = options.wordings
        copies = (
            [dialect.with_wording(request, wording) for wording in wordings]
            if wordings is not None
            else [request.model_copy(deep=True)]
        )
        received = time.monotonic()
        asked = []
        for one in copies:
            one.n = 1
            loop = asyncio.get_running_loop()
            converted = await loop.run_in_executor(None, dialect.convert, one, raw)
            converted.received_time = received
            asked.append(converted)
        return copies, asked

    def _judge(
        self, dialect: Dialect, request: Any, asked: Any, options: ForkOptions, *, explicit: bool
    ) -> tuple[Judge | None, ForkOptions]:
        """Who asks about branches, and the options with which that can be done.

        Where this model cannot be asked and nobody but our default wants to, nobody is verified.
        """
        verify = options.verify
        if verify is None:
            return None, options
        tokenizer = dialect.manager.tokenizer
        try:
            turns = dialect.turns(request)
            tokens = self._labels.get(verify.labels)
            if tokens is None:
                tokens = resolve_labels(verify.labels, lambda text: tokenizer.encode(text, add_special_tokens=False))
                if len(self._labels) < 1024:
                    self._labels[verify.labels] = tokens
        except (OptionError, LabelError) as error:
            if not explicit and "verify" not in self.settings.defaults and options.select in ("vote", "majority"):
                logger.info("one request: nobody is verified: %s", error)
                return None, replace(options, verify=None)
            if isinstance(error, LabelError):
                raise OptionError(f"{KEY}.verify.labels: {error}") from error
            raise
        return Judge(tokenizer, asked, tokens, question_with_labels(verify.question, verify.labels), turns), options


async def body_and_layers(raw: Any) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The body without what is ours, and what is ours: of the header, the template's arguments, the body.

    Raises:
        OptionError: the message names what is wrong.
    """
    media_type = raw.headers.get("content-type", "").lower().partition(";")[0].strip()
    if media_type != "application/json":  # as SGLang's own routes: a browser's form sends no such thing unasked
        raise OptionError(f"content-type: must be application/json, got {shown(media_type)}")
    try:
        body = json.loads(await raw.body())
    except (ValueError, RecursionError) as error:
        raise OptionError(f"the body must be JSON: {error}") from error
    if not isinstance(body, dict):
        raise OptionError(f"the body must be a JSON object, got {type(body).__name__}")
    in_header = raw.headers.get(HEADER)
    if in_header is not None:
        try:
            in_header = json.loads(in_header)
        except ValueError as error:
            raise OptionError(f"{HEADER}: must be a JSON object: {error}") from error
    arguments, in_arguments = body.get("chat_template_kwargs"), None
    if isinstance(arguments, dict) and KEY in arguments:
        in_arguments = arguments[KEY]
        body["chat_template_kwargs"] = {name: value for name, value in arguments.items() if name != KEY}
    said = (in_header, in_arguments, body.get(KEY))
    layers: tuple[Any, ...] = tuple({} if one is True else one for one in said)  # true takes the defaults
    return {name: value for name, value in body.items() if name != KEY}, layers


def _most_tokens(asked: Any, prompt: int, branches: int, settings: ForkSettings, manager: Any) -> int | None:
    """How many tokens each branch may generate; None where the context says it.

    Raises:
        OptionError: all branches together may generate more than a fork may have.
    """
    limit = settings.limits.tokens
    share = (limit - prompt) // branches
    if share < 1:
        raise OptionError(
            f"the prompt has {prompt} tokens, and a fork of {branches} branches at most {limit} on this server"
        )
    most = asked.sampling_params.get("max_new_tokens")
    room = max(1, manager.model_config.context_len - prompt)
    if most is not None and most < 1:
        raise NotForkableError(f"max_tokens: a branch must generate at least 1 token, got {most}")
    if most is None:
        return None if room <= share else share
    if min(most, room) > share:
        raise OptionError(
            f"max_tokens: {branches} branches of {most} tokens and a prompt of {prompt} are more than the {limit} "
            f"tokens that a fork may have on this server; ask for at most {share}"
        )
    return int(most)


async def _profiles(manager: Any) -> Sequence[dict[str, Any]]:
    """The scheduler's: it knows whether the weights were updated since."""
    if not profiles_of(manager).profiles:
        return []
    first = (await _schedulers(manager))[0] or {}
    return list((first.get("exit") or {}).get("profiles") or [])


async def _schedulers(manager: Any) -> list[dict[str, Any] | None]:
    """What each scheduler says of itself.

    Waited for to its end also where the client leaves: SGLang would give the answer to whoever asks next.
    """
    return [state.get(KEY) for state in await asyncio.shield(manager.get_internal_state())]


def _launch(options: ForkOptions) -> list[int] | None:
    """``probable`` takes branches for draws of one kind, so that other wordings are launched in a random order."""
    stop = options.early_stop
    if stop is None or stop.policy != "probable" or options.wordings is None:
        return None
    return random.sample(range(options.count), options.count)


def _event_tokens(options: ForkOptions) -> int:
    """Tokens after which a branch tells of them: no more than the window whose confidence a policy follows."""
    stop = options.early_stop
    return min(EVENT_TOKENS, stop.window_size) if stop is not None and stop.policy == "confidence" else EVENT_TOKENS
