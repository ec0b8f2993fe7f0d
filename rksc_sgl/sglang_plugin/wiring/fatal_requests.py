"""Requests that would end SGLang 0.5.23, or keep it from everybody else: found before they reach the scheduler.

What raises in SGLang's scheduler ends the server. Its HTTP server and tokenizer check much, but not everything that
the scheduler takes for granted: that a prompt has a token, that tokens are of the vocabulary, that a field of one
request is not the list that a batch would have, that a count can be counted to. Every kind here was seen to end a
server, by the fuzz over all fields of ``/generate`` in ``tests/sglang_plugin/test_fatal_requests.py``.

Two moments see a request: its JSON body, so that also a stream answers 400 (:func:`problem_of_body`), and each single
request after tokenization, whatever way it came (:func:`problem_of_request`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MOST_SAMPLES = 4096  # of one prompt: SGLang makes a request of each before it looks at any


@dataclass(frozen=True)
class Limits:
    """What a server can take.

    Attributes:
        vocabulary: tokens of the model.
    """

    vocabulary: int


def problem_of_body(body: Any, limits: Limits) -> str | None:
    """What in a ``/generate`` body would end the server, naming the field; None where nothing would.

    What SGLang itself refuses is left to it.
    """
    if not isinstance(body, dict):
        return None
    prompts, batch = _prompts(body)
    problems = [_problem_of_prompt(prompt, limits, _continues(body)) for prompt in prompts]
    problems.append(_problem_of_samples(body.get("sampling_params")))
    if body.get("positional_embed_overrides") is not None:
        problems.append("positional_embed_overrides: cannot be given as JSON; use sgl.Engine")
    for name, check in _SINGLE.items():
        value = body.get(name)
        values: Iterable[Any] = value if batch and isinstance(value, list) else [value]
        problems += [check(name, one, limits) for one in values]
    return next((problem for problem in problems if problem), None)


def problem_of_request(request: Any, input_ids: Any, limits: Limits) -> str | None:
    """The same of one request after tokenization.

    Args:
        request: SGLang's ``GenerateReqInput``, of a single prompt.
        input_ids: its tokens; None where it brings embeddings.
    """
    problems = []
    if getattr(request, "input_embeds", None) is None:
        prompt = input_ids if isinstance(input_ids, list) else list(input_ids or ())
        problems.append(_problem_of_prompt(prompt, limits, _continues(vars(request))))
    overrides = getattr(request, "positional_embed_overrides", None)
    if overrides is not None and not hasattr(overrides, "reconstruct"):
        kind = type(overrides).__name__
        problems.append(f"positional_embed_overrides: must be SGLang's PositionalEmbeds, got {kind}")
    problems += [check(name, getattr(request, name, None), limits) for name, check in _SINGLE.items()]
    return next((problem for problem in problems if problem), None)


def _prompts(body: Mapping[str, Any]) -> tuple[list[Any], bool]:
    """The prompts of a body, as text or tokens, and whether they are a batch."""
    text, ids = body.get("text"), body.get("input_ids")
    if text is not None:
        return (text, True) if isinstance(text, list) else ([text], False)
    if isinstance(ids, list) and ids and isinstance(ids[0], list):
        return ids, True
    return ([] if ids is None else [ids]), False


def _continues(fields: Mapping[str, Any]) -> bool:
    """Whether a session has the beginning of the prompt, so that the request may bring nothing more."""
    session = fields.get("session_params")
    return isinstance(session, dict) and bool(session.get("id"))


def _problem_of_prompt(prompt: Any, limits: Limits, continues: bool) -> str | None:
    if isinstance(prompt, (str, list)) and not prompt and not continues:
        return "prompt: must have at least one token, got an empty one"
    if not isinstance(prompt, list):
        return None
    if not prompt or any(kind is bool or not issubclass(kind, int) for kind in set(map(type, prompt))):
        return None  # SGLang says so itself
    # Prompts are long and every request comes by, twice: nothing here may be a loop in Python.
    if min(prompt) >= 0 and max(prompt) < limits.vocabulary:
        return None
    outside = next(token for token in prompt if not 0 <= token < limits.vocabulary)
    return f"input_ids: must be from 0 to {limits.vocabulary - 1}, the model's vocabulary; got {outside}"


def _problem_of_samples(params: Any) -> str | None:
    """How many answers are asked for."""
    for one in params if isinstance(params, list) else [params]:
        for name in ("n", "beam_width") if isinstance(one, dict) else ():
            count = one.get(name)
            if isinstance(count, (int, float)) and count > MOST_SAMPLES:
                return f"sampling_params.{name}: must be at most {MOST_SAMPLES}, got {_short(count)}"
    return None


def _count(lowest: int, highest: Callable[[Limits], int]) -> Callable[[str, Any, Limits], str | None]:
    def check(name: str, value: Any, limits: Limits) -> str | None:
        if value is None:
            return None
        most = highest(limits)
        if isinstance(value, int) and lowest <= value <= most:
            return None
        return f"{name}: must be a whole number from {lowest} to {most}, got {_short(value)}"

    return check


def _one_of(what: str, fits: Callable[[Any], bool]) -> Callable[[str, Any, Limits], str | None]:
    def check(name: str, value: Any, limits: Limits) -> str | None:
        return None if value is None or fits(value) else f"{name}: must be {what}, got {_short(value)}"

    return check


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_TEXT = _one_of("a string for each prompt", lambda value: isinstance(value, str))
_SWITCH = _one_of("true or false for each prompt", lambda value: isinstance(value, bool))
_SINGLE: dict[str, Callable[[str, Any, Limits], str | None]] = {
    "logprob_start_len": _count(-1, lambda limits: 2**31 - 1),
    "top_logprobs_num": _count(0, lambda limits: limits.vocabulary),
    "return_logprob": _SWITCH,
    "return_sampling_mask": _SWITCH,
    "return_hidden_states": _one_of(
        'true, false or "last" for each prompt', lambda value: isinstance(value, bool) or value == "last"
    ),
    "lora_path": _TEXT,
    "lora_id": _TEXT,
    "custom_logit_processor": _TEXT,
    "bootstrap_host": _TEXT,
    "bootstrap_pair_key": _TEXT,
    "bootstrap_port": _count(0, lambda limits: 65535),
    "bootstrap_room": _count(0, lambda limits: 2**63 - 1),
    "decode_tp_size": _count(1, lambda limits: 2**16),
}
