"""Full-depth verifications with what earlier layers held, asked of a server that was started with ``--rksc-trace``."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sglang.lang.chat_template import ChatTemplate

from rksc_sgl.errors import RkscError
from rksc_sgl.frontend.endpoint import Endpoint
from rksc_sgl.frontend.verify import verification_suffix
from rksc_sgl.options import KEY
from rksc_sgl.verifying.labels import LabelTokens, label_logprobs


@dataclass(frozen=True)
class Trace:
    """One verification at full depth.

    Attributes:
        hidden: ``[layers, hidden]`` float32, the last position after each traced layer, final norm applied.
        margin: log-odds of the first label against the others.
    """

    hidden: npt.NDArray[np.float32]
    margin: float


def verification_prompt(endpoint: Endpoint, problem: str, answer: str, question: str) -> list[int]:
    """Token ids of a verification as :func:`rksc_sgl.verify_gated` asks it of a branch that answered a problem."""
    template: ChatTemplate = endpoint.chat_template
    messages = [{"role": "user", "content": problem}, {"role": "assistant", "content": answer}]
    return endpoint.tokenize(template.get_prompt(messages) + verification_suffix(question, template, messages))


def question_ids(endpoint: Endpoint, question: str, prompts: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """The tokens of the question with which all of these prompts end.

    Raises:
        RkscError: they end with less than the question: its tokens hang on the text before it.
    """
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    alone = endpoint.tokenize(verification_suffix(question, endpoint.chat_template, messages))
    common = len(alone)
    for prompt in prompts:
        common = min(common, _common_end(alone, prompt))
    if common < len(endpoint.tokenize(question)):
        raise RkscError(
            f"question: only {common} of its {len(alone)} tokens are the same after every answer; end it with a full "
            "stop or a line break, so that its tokens do not hang on the text before it"
        )
    return tuple(alone[len(alone) - common :])


def trace(
    endpoint: Endpoint, prompts: Sequence[Sequence[int]], tokens: LabelTokens, layers: Sequence[int]
) -> list[Trace]:
    """Verify at full depth, in one batch.

    Args:
        prompts: token ids of verifications.
        layers: whose states to bring: how many layers had run.

    Raises:
        RkscError: the server sends no traces.
    """
    labels = {"yes_ids": list(tokens.ids[0]), "no_ids": tokens.other_ids}
    metas = verifications(endpoint, prompts, tokens, {"exit": "off", "trace": list(layers), **labels})
    return [_trace_of(meta_info, tokens, layers) for meta_info in metas]


def verifications(
    endpoint: Endpoint, prompts: Sequence[Sequence[int]], tokens: LabelTokens, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """The ``meta_info`` of each verification, asked for in one batch.

    Args:
        prompts: token ids of verifications.
        options: under ``custom_params["rksc"]``, besides ``op``.
    """
    sampling = {"max_new_tokens": 1, "temperature": 0, "custom_params": {KEY: {"op": "verify", **options}}}
    body = {
        "input_ids": [list(prompt) for prompt in prompts],
        "sampling_params": [sampling] * len(prompts),
        "return_logprob": [True] * len(prompts),
        "token_ids_logprob": [tokens.all_ids] * len(prompts),
    }
    return [response["meta_info"] for response in endpoint.post_json("/generate", body)]


def _trace_of(meta_info: dict[str, Any], tokens: LabelTokens, layers: Sequence[int]) -> Trace:
    report = (meta_info.get(KEY) or {}).get("exit") or {}
    if report.get("trace_layers") != list(layers):
        raise RkscError(
            f"the server sent no traces of layers {list(layers)} ({report.get('reason') or 'no report'}); start it "
            "with `rksc serve --rksc-trace`"
        )
    hidden = np.frombuffer(base64.b64decode(report["trace"]), dtype="<f4").reshape(len(layers), -1)
    return Trace(hidden.astype(np.float32), tokens.margin(label_logprobs(meta_info)))


def _common_end(first: Sequence[int], second: Sequence[int]) -> int:
    length = 0
    while length < min(len(first), len(second)) and first[-1 - length] == second[-1 - length]:
        length += 1
    return length
