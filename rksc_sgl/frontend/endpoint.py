"""The client side of one SGLang server.

:class:`Endpoint` is SGLang's ``RuntimeEndpoint`` over httpx: connections are kept, everything has a time limit, and
what goes wrong is a :class:`~rksc_sgl.errors.ServerError` that says so. :class:`BranchEndpoint` is the same for one
branch of a fork: it adds the branch's options to each request and keeps the branch's token ids.
"""

from __future__ import annotations

import json
import logging
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.chat_template import ChatTemplate, get_chat_template, get_chat_template_by_model_path
from sglang.lang.global_config import global_config

from rksc_sgl.errors import ServerRefusedError, ServerUnreachableError
from rksc_sgl.frontend.chat_affixes import chat_template_from_server
from rksc_sgl.frontend.confidence import mean_top1_probability
from rksc_sgl.frontend.token_trace import TokenTrace, trace_of_response
from rksc_sgl.options import KEY, RequestOptions

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
DEFAULT_TIMEOUT_S = 1800.0
_OPTIONAL_FIELDS = ("return_logprob", "logprob_start_len", "top_logprobs_num", "return_text_in_logprobs")


class RkscDegradedWarning(UserWarning):
    """A primitive runs with less than it was asked for; the text says what is missing and what happens instead."""


class Endpoint(RuntimeEndpoint):
    """A connection to an SGLang server, for ``sgl.set_default_backend``.

    The chat template is the server's own, read through ``/tokenize``, where SGLang's frontend has none for
    the model's name.

    Args:
        base_url: for example ``http://127.0.0.1:30000``.
        api_key: sent as a bearer token.
        verify: path of a CA bundle.
        chat_template_name: one of SGLang's frontend templates, instead of the automatic choice.
        timeout: seconds that one request may take.

    Raises:
        ServerUnreachableError: nobody answers at ``base_url``.
        ServerRefusedError: the server answered with an error status.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        verify: str | None = None,
        chat_template_name: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        BaseBackend.__init__(self)
        self.support_concate_and_append = True
        self.base_url = base_url.rstrip("/")
        self.api_key = api_key
        self.verify = verify
        self._client = _client(self.base_url, api_key, verify, timeout)
        self.model_info = self.get_json("/model_info")
        if chat_template_name is not None:
            self.chat_template = get_chat_template(chat_template_name)
        else:
            self.chat_template = self._choose_chat_template()
        self._token_cache: dict[str, list[int]] = {}
        self._server_info: dict[str, Any] | None = None
        self._server_info_known = False
        self._lock = threading.Lock()

    @classmethod
    def of(cls, backend: RuntimeEndpoint) -> Endpoint:
        """An Endpoint to the same server as ``backend``, made once for each backend object."""
        if isinstance(backend, Endpoint):
            return backend
        endpoint = _endpoints.get(backend)
        if endpoint is None:
            endpoint = cls(backend.base_url, backend.api_key, backend.verify)
            endpoint.chat_template = backend.chat_template
            _endpoints[backend] = endpoint
        return endpoint

    # -- transport ---------------------------------------------------------------------------------

    def get_json(self, path: str) -> Any:
        """Answer of ``GET path``."""
        return self._checked(self._send("GET", path, None)).json()

    def post_json(self, path: str, body: dict[str, Any]) -> Any:
        """Answer of ``POST path``."""
        return self._checked(self._send("POST", path, body)).json()

    def stream_json(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed ``POST path``."""
        try:
            with self._client.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    response.read()
                    self._checked(response)
                for line in response.iter_lines():
                    if not line.startswith("data:"):
                        continue
                    payload = line[5:].strip()
                    if payload == "[DONE]":
                        return
                    event = json.loads(payload)
                    if "error" in event:
                        error = event["error"]
                        raise ServerRefusedError(
                            f"{self.base_url} refused the request: {error.get('message', error)}",
                            int(error.get("code", 400)),
                        )
                    yield event
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        try:
            return self._client.request(method, path, json=body)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.TransportError) -> ServerUnreachableError:
        reason = str(error) or type(error).__name__
        return ServerUnreachableError(
            f"the SGLang server at {self.base_url} cannot be reached or went away ({reason}); "
            f"is it running? `rksc serve --model-path M` starts one"
        )

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if response.status_code == 200:
            return response
        try:
            content = response.json()
            detail = content.get("error", content) if isinstance(content, dict) else content
            message = detail.get("message", detail) if isinstance(detail, dict) else detail
        except json.JSONDecodeError:
            message = response.text or response.reason_phrase
        raise ServerRefusedError(
            f"{self.base_url}{response.request.url.path} answered {response.status_code}: {message}",
            response.status_code,
        )

    # -- what the server is --------------------------------------------------------------------------

    def rksc_info(self) -> dict[str, Any] | None:
        """``GET /rksc/info``, read once; None from a server without our plugin."""
        with self._lock:
            if not self._server_info_known:
                response = self._send("GET", "/rksc/info", None)
                self._server_info = None if response.status_code == 404 else self._checked(response).json()
                self._server_info_known = True
                if self._server_info is None:
                    warnings.warn(
                        f"the server at {self.base_url} runs without the rksc plugin: branches share only what "
                        "its own prefix cache finds, and responses carry no meta_info['rksc']",
                        RkscDegradedWarning,
                        stacklevel=3,
                    )
            return self._server_info

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text`` as the server's tokenizer gives them, without special tokens added."""
        ids = self._token_cache.get(text)
        if ids is None:
            ids = self.post_json("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
            if len(self._token_cache) < 4096:
                self._token_cache[text] = ids
        return ids

    def _choose_chat_template(self) -> ChatTemplate:
        template = get_chat_template_by_model_path(self.model_info["model_path"])
        if template.name != "default":
            return template
        return chat_template_from_server(self.post_json) or template

    # -- SGLang's backend interface ------------------------------------------------------------------

    def flush_cache(self, wait_s: float = 0.0) -> None:
        """Empty the server's cache, which it does only while it is idle; ``wait_s`` is how long to wait for that."""
        self._checked(self._send("POST", f"/flush_cache?timeout={wait_s:g}", None))

    def get_server_info(self) -> Any:
        return self.get_json("/server_info")

    def cache_prefix(self, prefix_str: str) -> None:
        self.post_json("/generate", {"text": prefix_str, "sampling_params": {"max_new_tokens": 0}})

    def commit_lazy_operations(self, s: Any) -> None:
        data: dict[str, Any] = {"text": s.text_, "sampling_params": {"max_new_tokens": 0}}
        self._add_images(s, data)
        self._generate_http_request(s, data)

    fill_image = commit_lazy_operations

    def generate(self, s: Any, sampling_params: Any) -> tuple[Any, Any]:
        response = self.post_json("/generate", self._body(s, sampling_params))
        if isinstance(response, list):  # n > 1
            return [one["text"] for one in response], [one["meta_info"] for one in response]
        return response["text"], response["meta_info"]

    def generate_stream(self, s: Any, sampling_params: Any) -> Iterator[tuple[str, Any]]:
        position = 0
        for event in self.stream_json("/generate", {**self._body(s, sampling_params), "stream": True}):
            text = event["text"][position:]
            position += len(text)
            yield text, event["meta_info"]

    def _body(self, s: Any, sampling_params: Any) -> dict[str, Any]:
        self._handle_dtype_to_regex(sampling_params)
        body: dict[str, Any] = {
            "text": s.text_,
            "sampling_params": {
                "skip_special_tokens": global_config.skip_special_tokens_in_output,
                "spaces_between_special_tokens": global_config.spaces_between_special_tokens_in_out,
                **sampling_params.to_srt_kwargs(),
            },
        }
        for field in _OPTIONAL_FIELDS:
            value = getattr(sampling_params, field, None)
            if value is not None:
                body[field] = value
        self._add_images(s, body)
        return body

    def _generate_http_request(self, s: Any, data: dict[str, Any]) -> Any:
        self._add_images(s, data)
        return self.post_json("/generate", data)

    def concatenate_and_append(self, src_rids: list[str], dst_rid: str) -> None:
        body = {"src_rids": src_rids, "dst_rid": dst_rid}
        self.post_json("/concate_and_append_request", body)


class BranchEndpoint(Endpoint):
    """The endpoint of one branch: the group's options on every request, ids kept, confidence measured.

    ``meta_info`` of each generation gets ``confidence``: the mean over the generated tokens of the probability of
    the most likely token (RKSC's c_b), or None where no token was generated.
    """

    def __init__(self, endpoint: Endpoint, options: RequestOptions, trace: TokenTrace | None) -> None:
        # Shares everything of the fork's endpoint; nothing is fetched again.
        self.__dict__.update(endpoint.__dict__)
        self.endpoint_of_group = endpoint
        self.options = options
        self.trace = trace
        self.sends_options = endpoint.rksc_info() is not None

    def generate(self, s: Any, sampling_params: Any) -> tuple[Any, Any]:
        asked = _asked_logprobs(sampling_params)
        prompt_text = s.text_
        response = self.post_json("/generate", self._body(s, sampling_params))
        if isinstance(response, list):  # n > 1: several continuations, no single trace
            for one in response:
                _settle_meta_info(one["meta_info"], asked)
            return [one["text"] for one in response], [one["meta_info"] for one in response]
        self._follow(prompt_text, response)
        _settle_meta_info(response["meta_info"], asked)
        return response["text"], response["meta_info"]

    def generate_stream(self, s: Any, sampling_params: Any) -> Iterator[tuple[str, Any]]:
        asked = _asked_logprobs(sampling_params)
        prompt_text = s.text_
        position = 0
        event: dict[str, Any] | None = None
        for event in self.stream_json("/generate", {**self._body(s, sampling_params), "stream": True}):
            text = event["text"][position:]
            position += len(text)
            if event["meta_info"].get("finish_reason"):
                self._follow(prompt_text, event)
            _settle_meta_info(event["meta_info"], asked)
            yield text, event["meta_info"]

    def prompt_ids(self, text: str) -> list[int] | None:
        """Ids of ``text``: the known ones, then those of what was added since; None where nothing is known."""
        if self.trace is None or not self.trace.covers(text):
            return None
        added = text[len(self.trace.text) :]
        return [*self.trace.ids, *(self.tokenize(added) if added else [])]

    def request_options(self, **changes: Any) -> dict[str, Any]:
        """The ``custom_params`` of this branch's requests."""
        if not self.sends_options:
            return {}
        return {"custom_params": {KEY: {**self.options.to_mapping(), **changes}}}

    def _body(self, s: Any, sampling_params: Any) -> dict[str, Any]:
        body = super()._body(s, sampling_params)
        ids = self.prompt_ids(s.text_) if not s.images_ else None
        if ids is not None:
            del body["text"]
            body["input_ids"] = ids
        body["sampling_params"].update(self.request_options())
        body["return_prompt_token_ids"] = True
        body["return_logprob"] = True
        body["top_logprobs_num"] = max(1, body.get("top_logprobs_num") or 0)
        return body

    def _generate_http_request(self, s: Any, data: dict[str, Any]) -> Any:
        data["sampling_params"] = {**data.get("sampling_params", {}), **self.request_options()}
        return super()._generate_http_request(s, data)

    def _follow(self, prompt_text: str, response: dict[str, Any]) -> None:
        prompt_ids = response.get("prompt_token_ids")
        if prompt_ids is not None:
            self.trace = trace_of_response(prompt_text, prompt_ids, response)


_endpoints: weakref.WeakKeyDictionary[RuntimeEndpoint, Endpoint] = weakref.WeakKeyDictionary()


def _client(base_url: str, api_key: str | None, verify: str | None, timeout: float) -> httpx.Client:
    return httpx.Client(
        base_url=base_url,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        verify=verify if verify else True,
        timeout=httpx.Timeout(timeout, connect=CONNECT_TIMEOUT_S),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        trust_env=False,
    )


def _asked_logprobs(sampling_params: Any) -> tuple[bool, int]:
    """Whether the caller asked for logprobs, and for how many alternatives."""
    return bool(sampling_params.return_logprob), sampling_params.top_logprobs_num or 0


def _settle_meta_info(meta_info: dict[str, Any], asked: tuple[bool, int]) -> None:
    """Turn the logprobs into a confidence and drop those that the caller did not ask for."""
    meta_info["confidence"] = mean_top1_probability(meta_info.get("output_top_logprobs") or [])
    asked_logprob, asked_top = asked
    dropped: Sequence[str] = ()
    if not asked_logprob:
        dropped = [key for key in meta_info if key.startswith(("input_", "output_")) and "logprobs" in key]
    elif not asked_top:
        dropped = [key for key in meta_info if "top_logprobs" in key]
    for key in dropped:
        del meta_info[key]
