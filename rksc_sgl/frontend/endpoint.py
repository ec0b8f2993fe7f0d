"""The client side of one SGLang server.

:class:`Endpoint` is SGLang's ``RuntimeEndpoint`` over our :class:`~rksc_sgl.http_client.HttpClient`.
:class:`BranchEndpoint` is the same for one branch of a fork: it adds the branch's options to each request and keeps the
branch's token ids.
"""

from __future__ import annotations

import logging
import threading
import uuid
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.chat_template import ChatTemplate, get_chat_template, get_chat_template_by_model_path
from sglang.lang.global_config import global_config

from rksc_sgl.errors import OptionError, ServerError, ServerRefusedError, UnsupportedBackendError
from rksc_sgl.frontend.chat_affixes import chat_template_from_server
from rksc_sgl.generated.confidence import is_measured, mean_top1_probability
from rksc_sgl.generated.finish import why_ended
from rksc_sgl.generated.known_ids import KnownIds, PromptLedger, ids_after
from rksc_sgl.generated.streamed import StreamedAnswer
from rksc_sgl.http_client import DEFAULT_TIMEOUT_S, Connection, HttpClient
from rksc_sgl.options import CONFIDENCE, KEY, RequestOptions
from rksc_sgl.placement.ranks import rank_of_fork

if TYPE_CHECKING:
    from rksc_sgl.frontend.stopping import BranchRun

logger = logging.getLogger(__name__)

ROUTING_KEY = "x-smg-routing-key"  # by it SGLang's routers keep requests on one worker
_TOKENS_AN_EVENT = 16  # of a stream that is only followed for the confidence of its tokens
# What routers serve under another name than a server. They have no more routes of this kind (docs/scale_out.md).
_OF_ROUTERS = {"/model_info": "/get_model_info", "/server_info": "/get_server_info"}
_OPTIONAL_FIELDS = ("return_logprob", "logprob_start_len", "top_logprobs_num", "return_text_in_logprobs")


class RkscDegradedWarning(UserWarning):
    """A primitive runs with less than it was asked for; the text says what is missing and what happens instead."""


class Endpoint(RuntimeEndpoint):
    """A connection to an SGLang server, or to a router before several, for ``sgl.set_default_backend``.

    The chat template is the server's own, read through ``/v1/tokenize``, where SGLang's frontend has none for
    the model's name. Routers render none.

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
        self.support_concate_and_append = False  # no server has a route that joins KV: ``join`` appends the texts
        self.base_url = base_url.rstrip("/")
        self.api_key = api_key
        self.verify = verify
        self._http = HttpClient(self.base_url, api_key, verify=verify, timeout=timeout)
        self.model_info = self._told("/model_info")
        self._model = self.model_info.get("served_model_name") or "unknown"
        if chat_template_name is not None:
            self.chat_template = get_chat_template(chat_template_name)
        else:
            self.chat_template = self._choose_chat_template()
        self._token_cache: dict[str, list[int]] = {}
        self._prompts = PromptLedger()
        self._streams_incrementally: list[bool] = []  # known from the first stream on; shared with the branches
        self._warned_of: set[str] = set()
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
        """The answer to ``GET path``."""
        return self._http.get_json(path)

    def post_json(self, path: str, body: dict[str, Any], connection: Connection | None = None) -> Any:
        """The answer to ``POST path``; ``connection`` is what may be closed of it."""
        return self._http.post_json(path, body, connection)

    def stream_json(
        self, path: str, body: dict[str, Any], connection: Connection | None = None
    ) -> Iterator[dict[str, Any]]:
        """The events of a streamed ``POST path``; ``connection`` is what may be closed of it."""
        return self._http.stream_json(path, body, connection)

    def _http_of(self, options: RequestOptions) -> HttpClient:
        """The client whose requests a router sends to the worker of this fork."""
        key = options.root or options.group
        return self._http if key is None else self._http.with_headers({ROUTING_KEY: key})

    # -- what the server is --------------------------------------------------------------------------

    def rksc_info(self) -> dict[str, Any] | None:
        """What our plugin tells of the server, read once; None from a server without it."""
        with self._lock:
            if not self._server_info_known:
                self._server_info = self.read_rksc_info()
                self._server_info_known = True
                if self._server_info is None:
                    warnings.warn(
                        f"the server at {self.base_url} runs without the rksc plugin, or behind a router that hides "
                        "it: branches share only what its own prefix cache finds, and responses carry no "
                        "meta_info['rksc']",
                        RkscDegradedWarning,
                        stacklevel=3,
                    )
            return self._server_info

    def read_rksc_info(self) -> dict[str, Any] | None:
        """``GET /rksc/info``; of a server behind a router only the ``schedulers`` of it, and of one worker."""
        told = self._get_or_none("/rksc/info")
        if told is not None:
            return told
        states = (self._get_or_none("/get_server_info") or {}).get("internal_states") or []
        schedulers = [state.get(KEY) for state in states]
        return {"schedulers": schedulers} if schedulers and all(schedulers) else None

    def _told(self, path: str) -> Any:
        """What a server tells of itself at ``path``, or a router of its workers under another name."""
        told = self._get_or_none(path)
        return self.get_json(_OF_ROUTERS[path]) if told is None else told

    def _get_or_none(self, path: str) -> Any:
        """The answer to ``GET path``; None where there is no such path."""
        try:
            return self.get_json(path)
        except ServerRefusedError as error:
            if error.status != 404:
                raise
            return None

    def measures_confidence(self) -> bool:
        """Whether the server tells how sure it was of each token without being asked for log-probabilities."""
        info = self.rksc_info()
        return info is not None and is_measured(info["schedulers"])

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text`` as the server's tokenizer gives them, without special tokens added."""
        ids = self._token_cache.get(text)
        if ids is None:
            body = {"model": self._model, "prompt": text, "add_special_tokens": False}
            ids = self.post_json("/v1/tokenize", body)["tokens"]
            if len(self._token_cache) < 4096:
                self._token_cache[text] = ids
        return ids

    def spell(self, ids: Sequence[int]) -> str | None:
        """The text of token ids, special tokens included; None from a server that cannot tell."""
        try:
            body = {"model": self._model, "tokens": list(ids), "skip_special_tokens": False}
            answer = self.post_json("/v1/detokenize", body)
        except ServerRefusedError as error:
            logger.info("what was generated is tokenized anew: %s", error)
            return None
        return str(answer["text"])

    def end_request(self, request: str) -> bool:
        """Ask the server to end a request, and every other whose id begins with this; False where it refuses to.

        It ignores what it does not know yet, or any more.
        """
        try:
            self._http.request("POST", "/abort_request", body={"rid": request})
        except ServerRefusedError as error:
            if self.warn_once("/abort_request"):
                warnings.warn(
                    f"branches that are stopped run on in the server, which refuses to end them: {error}",
                    RkscDegradedWarning,
                    stacklevel=2,
                )
            return False
        return True

    def end_fork(self, group: str) -> None:
        """Tell the server that nothing more of a fork is to come, so that it keeps nothing for it any longer."""
        try:
            self.post_json("/rksc/end_fork", {"group": group})
        except ServerError as error:  # what it keeps goes by itself after a while
            logger.info("the server was not told that fork %s has ended: %s", group, error)

    def keeps_forks(self) -> bool:
        """Whether the server keeps what a fork has computed until the fork has ended, and so wants to know of that."""
        return self._none_refuses("memory")

    def shares_slots(self) -> bool:
        """Whether blended branches use slots of their donors on the server."""
        return self._none_refuses("slots")

    def schedules_forks(self) -> bool:
        """Whether the server schedules a fork as a whole: its first branch computes what all have in common."""
        return self.keeps_forks() and all(one["offers"]["exact"]["offered"] for one in self._schedulers())

    def _none_refuses(self, what: str) -> bool:
        """Whether every scheduler tells of this, and none a reason why it is off."""
        schedulers = self._schedulers()
        return bool(schedulers) and all(what in one and one[what]["refusal"] is None for one in schedulers)

    def _schedulers(self) -> list[Any]:
        """What our plugin tells of each scheduler; nothing on a server without it."""
        return (self.rksc_info() or {}).get("schedulers") or []

    def warn_once(self, of: str) -> bool:
        """Whether this is the first time that somebody is to be warned of it, on this server."""
        with self._lock:
            first = of not in self._warned_of
            self._warned_of.add(of)
            return first

    def _streamed(self) -> StreamedAnswer:
        if not self._streams_incrementally:
            self._streams_incrementally.append(bool(self.get_server_info().get("incremental_streaming_output")))
        return StreamedAnswer(self._streams_incrementally[0])

    def _choose_chat_template(self) -> ChatTemplate:
        template = get_chat_template_by_model_path(self.model_info["model_path"])
        if template.name != "default":
            return template
        return chat_template_from_server(self.post_json) or template

    # -- SGLang's backend interface ------------------------------------------------------------------

    def flush_cache(self, wait_s: float = 0.0) -> None:
        """Empty the server's cache, which it does only while it is idle; ``wait_s`` is how long to wait for that."""
        self._http.request("POST", f"/flush_cache?timeout={wait_s:g}")

    def get_server_info(self) -> Any:
        return self._told("/server_info")

    def cache_prefix(self, prefix_str: str) -> None:
        self.post_json("/generate", {"text": prefix_str, "sampling_params": {"max_new_tokens": 0}})

    def commit_lazy_operations(self, s: Any) -> None:
        data: dict[str, Any] = {"text": s.text_, "sampling_params": {"max_new_tokens": 0}}
        self._add_images(s, data)
        self._generate_http_request(s, data)

    fill_image = commit_lazy_operations

    def compute_prefix(self, s: Any, options: RequestOptions) -> None:
        """Compute the text so far where the branches of a fork will look for it: on its worker, on its rank."""
        data: dict[str, Any] = {"text": s.text_, "sampling_params": {"max_new_tokens": 0}}
        info = self.rksc_info()
        rank = None if info is None else rank_of_fork(options, len(info["schedulers"]))
        if rank is not None:
            data["routed_dp_rank"] = rank
        self._add_images(s, data)
        self._http_of(options).post_json("/generate", data)

    def generate(self, s: Any, sampling_params: Any) -> tuple[Any, Any]:
        response = self.post_json("/generate", self._body(s, sampling_params))
        if isinstance(response, list):  # n > 1
            return [one["text"] for one in response], [one["meta_info"] for one in response]
        return response["text"], response["meta_info"]

    def generate_stream(self, s: Any, sampling_params: Any) -> Iterator[tuple[str, Any]]:
        for text, answer in self._stream(s, sampling_params):
            yield text, answer["meta_info"]

    def select(self, s: Any, choices: list[str], temperature: float, choices_method: Any) -> Any:
        _check_begun(s)
        return super().select(s, choices, temperature, choices_method)

    def _stream(self, s: Any, sampling_params: Any, every: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """What each event of a streamed generation adds, and the answer so far.

        Args:
            s: the executor.
            sampling_params: SGLang's.
            every: tokens between two events; None for the server's own.

        Raises:
            OptionError: several continuations are asked for: SGLang's frontend streams into one text.
        """
        if (sampling_params.n or 1) > 1:
            raise OptionError(
                f"n: {sampling_params.n} continuations cannot be streamed into one text; run the program without "
                "stream=True, or fork a branch for each"
            )
        answer = self._streamed()
        body = {**self._body(s, sampling_params), "stream": True}
        if every is not None:
            body["sampling_params"]["stream_interval"] = every
        for event in self.stream_json("/generate", body, self._connection(s)):
            yield answer.add(event), answer.response

    def _connection(self, s: Any) -> Connection | None:
        """What another thread may close of the generation that this executor is about; None where nobody would."""
        return None

    def _body(self, s: Any, sampling_params: Any) -> dict[str, Any]:
        _check_begun(s)
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


class BranchEndpoint(Endpoint):
    """The endpoint of one branch: the group's options on every request, ids kept, confidence measured.

    ``meta_info`` of each generation gets ``confidence``: the mean over the generated tokens of the probability of
    the most likely token (RKSC's c_b), or None where no token was generated.

    A branch that was merged reads another request's prompt, and so does every later request of it: the ids that it
    sends from then on are those. Where they are not known here, the server has to remember the merge.

    Attributes:
        known: the ids of the branch's text, as far as they are known.
        merged_with: the request whose prompt the branch reads, where its ids are not known here.
        run: of a branch that may be stopped: its generations have ids of their own, to be ended by.
    """

    def __init__(
        self, endpoint: Endpoint, options: RequestOptions, known: KnownIds | None, run: BranchRun | None = None
    ) -> None:
        # Shares everything of the fork's endpoint; nothing is fetched again.
        self.__dict__.update(endpoint.__dict__)
        self.endpoint_of_group = endpoint
        self.options = options
        self._http = endpoint._http_of(options)
        self.known = known
        self.merged_with: str | None = None
        self.run = run
        self.sends_options = endpoint.rksc_info() is not None

    def generate(self, s: Any, sampling_params: Any) -> tuple[Any, Any]:
        asked = _asked_logprobs(sampling_params)
        prompt_text = s.text_
        response = self._generated(s, sampling_params)
        several = isinstance(response, list)  # n > 1: the text goes on with the first
        self._follow(prompt_text, response[0] if several else response)
        for one in response if several else [response]:
            _settle_meta_info(one["meta_info"], asked)
        if several:
            return [one["text"] for one in response], [one["meta_info"] for one in response]
        return response["text"], response["meta_info"]

    def generate_stream(self, s: Any, sampling_params: Any) -> Iterator[tuple[str, Any]]:
        asked = _asked_logprobs(sampling_params)
        prompt_text = s.text_
        for text, answer in self._stream(s, sampling_params):
            if answer["meta_info"].get("finish_reason"):
                self._follow(prompt_text, answer)
            meta_info = dict(answer["meta_info"])  # the answer goes on with what is dropped here
            _settle_meta_info(meta_info, asked)
            yield text, meta_info

    def _generated(self, s: Any, sampling_params: Any) -> Any:
        """The answer to a generation. Where somebody follows its tokens it is streamed.

        Raises:
            ServerError: the server ended the request.
        """
        run = self._run_of(s)
        if run is not None and run.follows_confidence:
            # Each event repeats the tokens before it: one for every token would cost their number squared.
            every = min(run.window, _TOKENS_AN_EVENT)
            ((_, answer),) = deque(self._stream(s, sampling_params, every=every), maxlen=1)
            return answer
        response = self.post_json("/generate", self._body(s, sampling_params), self._connection(s))
        if run is not None and not isinstance(response, list):
            _tell(run, response["meta_info"], 0)
        for one in response if isinstance(response, list) else [response]:
            _check_not_ended(one["meta_info"])
        return response

    def _stream(self, s: Any, sampling_params: Any, every: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        told, run = 0, self._run_of(s)
        for text, answer in super()._stream(s, sampling_params, every):
            if run is not None:
                told = _tell(run, answer["meta_info"], told)
            _check_not_ended(answer["meta_info"])
            yield text, answer

    def _connection(self, s: Any) -> Connection | None:
        run = self._run_of(s)
        return None if run is None else run.connection

    def _run_of(self, s: Any) -> BranchRun | None:
        """The branch, where this is a generation of its own that may be ended."""
        own = self.run is not None and self.run.request is not None and getattr(s, "run", None) is self.run
        return self.run if own else None

    def select(self, s: Any, choices: list[str], temperature: float, choices_method: Any) -> Any:
        if self.merged_with is not None:
            raise UnsupportedBackendError(
                f"choices cannot be scored: this branch was merged with the prompt of request {self.merged_with}, "
                "whose tokens are not known here (share_scope='cache' finds prompts of other clients too); let it "
                "generate, with a regex for the choices, or fork with share_scope='group'"
            )
        return super().select(s, choices, temperature, choices_method)

    def commit_lazy_operations(self, s: Any) -> None:
        share = "exact" if self.options.share == "merge" else self.options.share
        self._ask_unmerged(s, {"text": s.text_, "sampling_params": {"max_new_tokens": 0}}, share)

    fill_image = commit_lazy_operations

    def prompt_ids(self, text: str) -> list[int] | None:
        """Ids of ``text``: the known ones, then those of what was added since; None where nothing is known."""
        if self.known is None or not self.known.covers(text):
            return None
        added = text[len(self.known.text) :]
        return [*self.known.ids, *(self.tokenize(added) if added else [])]

    def _prompt_tokens(self, text: str) -> list[int]:
        """Token ids of a prompt as the server would tokenize it, special tokens and all.

        Raises:
            UnsupportedBackendError: a router is before the server, and tokenizes without them.
        """
        try:
            return self.post_json("/tokenize", {"prompt": text})["tokens"]
        except ServerRefusedError as error:
            if error.status != 404:
                raise
            raise UnsupportedBackendError(
                f"share, allow_merge: a branch that may be merged needs /tokenize, which {self.base_url} does not "
                "serve, as no router does; fork without merges, or on the worker itself"
            ) from error

    def request_options(self, **changes: Any) -> dict[str, Any]:
        """The ``custom_params`` of this branch's requests."""
        if not self.sends_options:
            return {}
        return {"custom_params": {KEY: {**self.options.to_mapping(), **changes}}}

    def _body(self, s: Any, sampling_params: Any) -> dict[str, Any]:
        body = super()._body(s, sampling_params)
        run = self._run_of(s)
        if run is not None:
            if (sampling_params.n or 1) > 1 and not run.settled:
                raise OptionError(
                    f"n: {sampling_params.n} continuations have no vote; with early_stop, fork a branch for each"
                )
            if (sampling_params.n or 1) == 1:
                body["rid"] = run.request
        merges = self.sends_options and self.options.merges and not s.images_
        if merges and self.known is None:
            # Its ids must be known before it is sent: another branch may be merged with it before it is answered.
            self.known = KnownIds(s.text_, tuple(self._prompt_tokens(s.text_)))
        ids = self.prompt_ids(s.text_) if not s.images_ else None
        if ids is not None:
            del body["text"]
            body["input_ids"] = ids
            if merges and (sampling_params.n or 1) == 1:
                body.setdefault("rid", uuid.uuid4().hex)
                self._prompts.note(body["rid"], ids)
        body["return_prompt_token_ids"] = True
        if self.endpoint_of_group.measures_confidence():
            body["sampling_params"].update(self.request_options(confidence=True))
        else:
            body["sampling_params"].update(self.request_options())
            body["return_logprob"] = True
            body["top_logprobs_num"] = max(1, body.get("top_logprobs_num") or 0)
        return body

    def _generate_http_request(self, s: Any, data: dict[str, Any]) -> Any:
        """What ``select`` asks: it counts the tokens of one prompt in another, and scores are of exact KV."""
        return self._ask_unmerged(s, data, "exact")

    def _ask_unmerged(self, s: Any, data: dict[str, Any], share: str) -> Any:
        """A request that generates nothing, on the branch's own ids and without a merge."""
        if "text" in data and not s.images_:
            several = isinstance(data["text"], list)
            ids = [self.prompt_ids(text) for text in (data["text"] if several else [data["text"]])]
            if all(one is not None for one in ids):
                del data["text"]
                data["input_ids"] = ids if several else ids[0]
        if self.sends_options:
            options = replace(self.options, share=share, allow_merge=False, share_scope="group")
            data["sampling_params"] = {**data["sampling_params"], "custom_params": {KEY: options.to_mapping()}}
        return super()._generate_http_request(s, data)

    def _follow(self, prompt_text: str, response: dict[str, Any]) -> None:
        prompt_ids = response.get("prompt_token_ids")
        if prompt_ids is not None:
            read = self._prompt_read(prompt_ids, response["meta_info"])
            self.known = ids_after(prompt_text, read, response, self.spell)

    def _prompt_read(self, sent: list[int], meta_info: dict[str, Any]) -> list[int]:
        """The prompt that was computed for a request: the one that was sent, or with a merge the donor's."""
        report = meta_info.get(KEY) or {}
        replaced = report.get("replaced_tokens") or 0
        read, self.merged_with = sent, None
        if replaced:
            donor = self._prompts.find(report["donor"])
            read = sent if donor is None else [*donor, *sent[replaced:]]
            if donor is None or len(read) != meta_info["prompt_tokens"]:
                read, self.merged_with = sent, report["donor"]
        if self.options.merges and self.merged_with is None:
            self._prompts.note(meta_info["id"], read)
        return read


_endpoints: weakref.WeakKeyDictionary[RuntimeEndpoint, Endpoint] = weakref.WeakKeyDictionary()


def _check_begun(s: Any) -> None:
    """
    Raises:
        OptionError: there is no text to go on from; SGLang's server does not survive an empty prompt.
    """
    if not s.text_:
        raise OptionError("sgl.gen, sgl.select: the program has no text yet to go on from; append a prompt first")


def _tell(run: BranchRun, meta_info: dict[str, Any], told: int) -> int:
    """Report what a branch generated since the last time; its tokens so far."""
    tokens = int(meta_info.get("completion_tokens") or told)
    run.generated(tokens - told, mean_top1_probability(meta_info, told))
    return tokens


def _check_not_ended(meta_info: dict[str, Any]) -> None:
    """
    Raises:
        ServerError: somebody had the server end the request.
    """
    why = why_ended(meta_info)
    if why:
        raise ServerError(why)


def _asked_logprobs(sampling_params: Any) -> tuple[bool, int]:
    """Whether the caller asked for logprobs, and for how many alternatives."""
    return bool(sampling_params.return_logprob), sampling_params.top_logprobs_num or 0


def _settle_meta_info(meta_info: dict[str, Any], asked: tuple[bool, int]) -> None:
    """Turn what was measured of each token into a confidence and drop what the caller did not ask for."""
    meta_info["confidence"] = mean_top1_probability(meta_info)
    meta_info.pop(CONFIDENCE, None)
    asked_logprob, asked_top = asked
    dropped: Sequence[str] = ()
    if not asked_logprob:
        dropped = [key for key in meta_info if key.startswith(("input_", "output_")) and "logprobs" in key]
    elif not asked_top:
        dropped = [key for key in meta_info if "top_logprobs" in key]
    for key in dropped:
        del meta_info[key]
