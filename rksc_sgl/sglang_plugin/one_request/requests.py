"""The requests of a fork: its branches' and their verifications', made from the one that SGLang converted."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rksc_sgl.generated.known_ids import ids_after
from rksc_sgl.options import KEY, RequestOptions
from rksc_sgl.verifying.labels import LabelTokens
from rksc_sgl.verifying.question import Turns, verification_suffix

EVENT_TOKENS = 16  # of an event of a branch, after its first token: an event for each would keep the process busy
_CARRIED = ("lora_path", "extra_key", "cache_salt", "priority", "routed_dp_rank", "routing_key", "custom_labels")


def branch_request(
    asked: Any,
    ids: Sequence[int],
    options: RequestOptions,
    *,
    rid: str,
    most_tokens: int | None,
    measured: bool,
    event_tokens: int = EVENT_TOKENS,
) -> Any:
    """The request of one branch.

    Args:
        asked: SGLang's ``GenerateReqInput``, as the client's was converted.
        ids: of its prompt.
        options: group, branch, and what it may share.
        rid: its own.
        most_tokens: that it may generate; None where the context decides.
        measured: whether the server tells the confidence of tokens; else it is made of log-probabilities.
        event_tokens: tokens after which it tells of them.
    """
    sampling = dict(asked.sampling_params)
    ours = replace(options, confidence=measured).to_mapping()
    custom = {**(sampling.get("custom_params") or {}), KEY: ours}
    sampling.update(n=1, custom_params=custom, max_new_tokens=most_tokens, stream_interval=event_tokens)
    if sampling.get("sampling_seed") is not None:  # branches of one seed would say the same
        sampling["sampling_seed"] += options.branch
    request = copy.copy(asked)
    request.rid, request.stream = rid, True
    request.text, request.input_ids = None, list(ids)
    request.sampling_params = sampling
    request.return_text_in_logprobs = bool(asked.return_logprob)
    if not measured:
        request.top_logprobs_num = max(1, asked.top_logprobs_num or 0)
        request.return_logprob = True
    return request


def new_rid(prefix: str | None) -> str:
    """An id of which no other begins with it: SGLang's aborts end every request whose id begins with theirs."""
    own = uuid.uuid4().hex
    return own if prefix is None else f"{prefix}-{own}"


@dataclass(frozen=True)
class Judge:
    """Asks about branches.

    Attributes:
        tokenizer: of the server.
        asked: SGLang's ``GenerateReqInput`` of the client's.
        tokens: of the labels.
        question: with the labels filled in.
        turns: of the chat; None where the question is plain text.
    """

    tokenizer: Any
    asked: Any
    tokens: LabelTokens
    question: str
    turns: Turns | None

    def prompt_ids(self, read: Sequence[int], generated: Mapping[str, Any]) -> list[int]:
        """Ids of a branch's verification: what it read and generated, as far as these are its text, and the question.

        Args:
            read: the prompt that was computed for the branch.
            generated: its text, ids and ``meta_info``.
        """
        known = ids_after("", read, dict(generated), self._spell)
        said = str(generated["text"])
        left = "" if known.text == said else said
        suffix = verification_suffix(self.question, self.turns)
        return [*known.ids, *self.tokenizer.encode(left + suffix, add_special_tokens=False)]

    def request(self, ids: Sequence[int], options: RequestOptions, exit: Mapping[str, Any], *, rid: str) -> Any:
        """The request of one verification.

        Args:
            ids: of its prompt.
            options: of the branch.
            exit: the options ``exit``, ``risk`` and ``scope``.
            rid: its own.
        """
        from sglang.srt.managers.io_struct import GenerateReqInput

        ours = {**options.to_mapping(), "op": "verify", **exit}
        ours.update(yes_ids=list(self.tokens.ids[0]), no_ids=self.tokens.other_ids)
        return GenerateReqInput(
            rid=rid,
            input_ids=list(ids),
            sampling_params={"max_new_tokens": 1, "temperature": 0, "custom_params": {KEY: ours}},
            return_logprob=True,
            token_ids_logprob=self.tokens.all_ids,
            received_time=self.asked.received_time,
            **{name: getattr(self.asked, name) for name in _CARRIED},
        )

    def _spell(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))
