"""Admission: before a request costs anything, its options are checked, and whether it would end the server."""

from __future__ import annotations

from typing import Any

from rksc_sgl.errors import OptionError
from rksc_sgl.options import options_of, shown
from rksc_sgl.placement.ranks import rank_of_fork
from rksc_sgl.sglang_plugin.passes.exit_profiles import profiles_of
from rksc_sgl.sglang_plugin.tree import is_reserved
from rksc_sgl.sglang_plugin.wiring.fatal_requests import Limits, problem_of_body, problem_of_request

RESERVED = "extra_key: ends with what marks blended KV; choose another"


def option_error(sampling_params: Any, tokenizer_manager: Any) -> str | None:
    """What is wrong with the options in one or several sampling parameter objects, or None."""
    for params in sampling_params if isinstance(sampling_params, list) else [sampling_params]:
        custom_params = params.get("custom_params") if isinstance(params, dict) else None
        try:
            if not (custom_params is None or isinstance(custom_params, dict)):
                raise OptionError(f"custom_params: must be an object, got {shown(custom_params)}")
            options = options_of(custom_params)
            if options is not None:
                profiles_of(tokenizer_manager).check_risk(options)
        except OptionError as error:
            return str(error)
    return None


def check_generate_body(result: str | None, body: Any) -> str | None:
    """AFTER hook: SGLang's own complaint about a ``/generate`` body comes first, then ours."""
    if result is not None or not isinstance(body, dict):
        return result
    from sglang.srt.entrypoints.http_server import get_global_state

    if is_reserved(body.get("extra_key")):
        return RESERVED
    manager = get_global_state().tokenizer_manager
    return problem_of_body(body, _limits(manager)) or option_error(body.get("sampling_params"), manager)


def check_openai_request(result: str | None, serving: Any, request: Any) -> str | None:
    """AFTER hook on the OpenAI-compatible endpoints' request validation."""
    if result is not None:
        return result
    if is_reserved(getattr(request, "extra_key", None)):
        return RESERVED
    return option_error({"custom_params": request.custom_params}, serving.tokenizer_manager)


def check_tokenizer_request(*args: Any, **kwargs: Any) -> None:
    """BEFORE hook: the way in that all requests share, for those that came by no endpoint above.

    Here a request of a fork also gets its data-parallel rank.

    Raises:
        OptionError: a ValueError, which SGLang answers with status 400.
    """
    from sglang.srt.managers.io_struct import GenerateReqInput

    tokenizer_manager = kwargs["self"] if "self" in kwargs else args[0]
    obj = kwargs["obj"] if "obj" in kwargs else args[1]
    if is_reserved(getattr(obj, "extra_key", None)):
        raise OptionError(RESERVED)
    problem = option_error(getattr(obj, "sampling_params", None), tokenizer_manager)
    if problem is None and isinstance(obj, GenerateReqInput):
        input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[3]
        problem = problem_of_request(obj, input_ids, _limits(tokenizer_manager))
    if problem is not None:
        raise OptionError(problem)
    if isinstance(obj, GenerateReqInput):
        options = options_of((obj.sampling_params or {}).get("custom_params"))
        if obj.routed_dp_rank is None:
            obj.routed_dp_rank = rank_of_fork(options, tokenizer_manager.elastic_worker_count)


def _limits(tokenizer_manager: Any) -> Limits:
    return Limits(tokenizer_manager.model_config.vocab_size)
