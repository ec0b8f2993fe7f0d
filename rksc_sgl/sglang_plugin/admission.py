"""Admission: options under ``custom_params["rksc"]`` are checked before a request costs anything."""

from __future__ import annotations

from typing import Any

from rksc_sgl.errors import OptionError
from rksc_sgl.options import options_of
from rksc_sgl.sglang_plugin import exits
from rksc_sgl.sglang_plugin.resident import is_reserved


def option_error(sampling_params: Any, tokenizer_manager: Any) -> str | None:
    """What is wrong with the options in one or several sampling parameter objects, or None."""
    for params in sampling_params if isinstance(sampling_params, list) else [sampling_params]:
        custom_params = params.get("custom_params") if isinstance(params, dict) else None
        try:
            options = options_of(custom_params)
            if options is not None:
                exits.profiles_of(tokenizer_manager).check_risk(options)
        except OptionError as error:
            return str(error)
    return None


def check_generate_body(result: str | None, body: Any) -> str | None:
    """AFTER hook: SGLang's own complaint about a ``/generate`` body comes first, then ours."""
    if result is not None or not isinstance(body, dict):
        return result
    from sglang.srt.entrypoints.http_server import get_global_state

    return option_error(body.get("sampling_params"), get_global_state().tokenizer_manager)


def check_openai_request(result: str | None, serving: Any, request: Any) -> str | None:
    """AFTER hook on the OpenAI-compatible endpoints' request validation."""
    if result is not None:
        return result
    return option_error({"custom_params": request.custom_params}, serving.tokenizer_manager)


def check_tokenizer_request(*args: Any, **kwargs: Any) -> None:
    """BEFORE hook: the way in that all requests share, for those that came by no endpoint above.

    Raises:
        OptionError: a ValueError, which SGLang answers with status 400.
    """
    tokenizer_manager = kwargs["self"] if "self" in kwargs else args[0]
    obj = kwargs["obj"] if "obj" in kwargs else args[1]
    if is_reserved(getattr(obj, "extra_key", None)):
        raise OptionError("extra_key: ends with what marks blended KV; choose another")
    problem = option_error(getattr(obj, "sampling_params", None), tokenizer_manager)
    if problem is not None:
        raise OptionError(problem)
