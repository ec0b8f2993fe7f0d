"""Every place where we hook SGLang 0.5.23, in one table.

A hook is armed with :func:`rksc_sgl.on_import.when_imported` and so applied only in the processes that load its
module. ``parameters`` are those of the hooked callable in the pinned release; ``rksc doctor`` and the tests compare
them with the installed one, so that an upgrade fails loudly and names what moved.
"""

from __future__ import annotations

import inspect
import logging
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

from rksc_sgl.cpu_platform import warm_fork, without_triton
from rksc_sgl.on_import import when_imported
from rksc_sgl.sglang_plugin import admission, departures, passes, report, routes, siblings

logger = logging.getLogger(__name__)

SGLANG_VERSION = "0.5.23"


@dataclass(frozen=True)
class Hook:
    """One hooked target.

    Attributes:
        target: dotted path, module first.
        kind: "before", "after" or "around", as SGLang's HookType.
        function: our side of it.
        parameters: names of the target's parameters in the pinned release.
        process: which of SGLang's processes loads it: "http", "tokenizer" (same process) or "scheduler".
        why: what it is for.
    """

    target: str
    module: str
    kind: str
    function: Callable[..., Any]
    parameters: tuple[str, ...]
    process: str
    why: str


_HTTP = "sglang.srt.entrypoints.http_server"
_CHAT = "sglang.srt.entrypoints.openai.serving_chat"
_COMPLETIONS = "sglang.srt.entrypoints.openai.serving_completions"
_TOKENIZER = "sglang.srt.managers.tokenizer_manager"
_SCHEDULER = "sglang.srt.managers.scheduler"
_ALLOCATION = "sglang.srt.mem_cache.allocation"
_ENGINE = "sglang.srt.entrypoints.engine"
_TOKENIZERS = "sglang.srt.utils.hf_transformers.tokenizer"
_WORKER = "sglang.srt.managers.tp_worker"
_RUNNER = "sglang.srt.model_executor.model_runner"
_STATE = "sglang.srt.managers.scheduler_components.internal_state"

HOOKS: tuple[Hook, ...] = (
    Hook(
        target=f"{_HTTP}.generate_contract_error",
        module=_HTTP,
        kind="after",
        function=admission.check_generate_body,
        parameters=("body",),
        process="http",
        why="a /generate body with bad rksc options answers 400, also when it asks for a stream",
    ),
    Hook(
        target=f"{_CHAT}.OpenAIServingChat._validate_request",
        module=_CHAT,
        kind="after",
        function=admission.check_openai_request,
        parameters=("self", "request"),
        process="http",
        why="the same for /v1/chat/completions",
    ),
    Hook(
        target=f"{_COMPLETIONS}.OpenAIServingCompletion._validate_request",
        module=_COMPLETIONS,
        kind="after",
        function=admission.check_openai_request,
        parameters=("self", "request"),
        process="http",
        why="the same for /v1/completions",
    ),
    Hook(
        target=f"{_TOKENIZER}.TokenizerManager._create_tokenized_object",
        module=_TOKENIZER,
        kind="before",
        function=admission.check_tokenizer_request,
        parameters=("self", "obj", "input_text", "input_ids", "input_embeds", "mm_inputs", "token_type_ids"),
        process="tokenizer",
        why="the same for sgl.Engine and every other way in",
    ),
    Hook(
        target=f"{_TOKENIZER}.TokenizerManager.update_request_meta_info",
        module=_TOKENIZER,
        kind="around",
        function=report.write_meta_info,
        parameters=("self", "meta_info", "state", "customized_info", "index", "finish_reason"),
        process="tokenizer",
        why="meta_info['rksc'] of the requests that opted in, and only of those",
    ),
    Hook(
        target=f"{_SCHEDULER}.Scheduler.get_output_streamer_class",
        module=_SCHEDULER,
        kind="after",
        function=report.reporting_streamer_class,
        parameters=("self",),
        process="scheduler",
        why="carries what was decided for a request from the scheduler to meta_info, and counts those that finish",
    ),
    Hook(
        target=f"{_STATE}.SchedulerInternalStateController.get_internal_state",
        module=_STATE,
        kind="after",
        function=report.add_internal_state,
        parameters=("self", "recv_req"),
        process="scheduler",
        why="GET /rksc/info, /rksc/stats and /rksc/tree see what the scheduler really has",
    ),
    Hook(
        target=f"{_ENGINE}._set_envs_and_config",
        module=_ENGINE,
        kind="after",
        function=warm_fork.use_for_workers,
        parameters=("server_args",),
        process="http",
        why="on the CPU platform workers are forked from the main process, which has imported SGLang",
    ),
    Hook(
        target=f"{_TOKENIZERS}.get_tokenizer",
        module=_TOKENIZERS,
        kind="around",
        function=warm_fork.tokenizer_once,
        parameters=(
            *("tokenizer_name", "args", "tokenizer_mode", "trust_remote_code"),
            *("tokenizer_revision", "tokenizer_backend", "kwargs"),
        ),
        process="http",
        why="forked workers do not load the tokenizer again",
    ),
    Hook(
        target=f"{_ALLOCATION}.get_last_loc",
        module=_ALLOCATION,
        kind="around",
        function=without_triton.last_slots,
        parameters=("req_to_token", "req_pool_indices_tensor", "prefix_lens_tensor"),
        process="scheduler",
        why="page sizes above 1 on a CPU, where there is no Triton",
    ),
    Hook(
        target=f"{_SCHEDULER}.Scheduler._get_new_batch_prefill_raw",
        module=_SCHEDULER,
        kind="around",
        function=siblings.hold_siblings,
        parameters=("self", "prefill_delayer_single_pass", "running_batch"),
        process="scheduler",
        why="siblings wait for their anchor, and each branch gets its namespace and its donor",
    ),
    Hook(
        target=f"{_SCHEDULER}.Scheduler.run_batch",
        module=_SCHEDULER,
        kind="after",
        function=departures.release_merged,
        parameters=("self", "batch", "pp_proxy_tensors"),
        process="scheduler",
        why="a branch that was merged gives its KV back and takes its donor's prompt",
    ),
    Hook(
        target=f"{_SCHEDULER}.Scheduler.get_next_batch_to_run",
        module=_SCHEDULER,
        kind="before",
        function=departures.part_from_batch,
        parameters=("self", "running_batch", "last_batch"),
        process="scheduler",
        why="a branch that was merged is not decoded with the batch that it left",
    ),
    Hook(
        target=f"{_SCHEDULER}.Scheduler.process_batch_result",
        module=_SCHEDULER,
        kind="after",
        function=departures.settle_results,
        parameters=("self", "batch", "result"),
        process="scheduler",
        why="a branch that was merged queues up again; prompts of the whole cache are remembered as donors",
    ),
    Hook(
        target=f"{_WORKER}.TpModelWorker.forward_batch_generation",
        module=_WORKER,
        kind="around",
        function=passes.remember_batch,
        parameters=(
            "self",
            "batch",
            "forward_batch",
            "pp_proxy_tensors",
            "is_verify",
            "skip_attn_backend_init",
            "capture_hidden_mode",
            "return_kv_loc_plan",
        ),
        process="scheduler",
        why="early exit, blends and merges: which requests are in the batch",
    ),
    Hook(
        target=f"{_RUNNER}.ModelRunner._forward_raw",
        module=_RUNNER,
        kind="around",
        function=passes.choose_mode,
        parameters=("self", "forward_batch", "pp_proxy_tensors", "reinit_attn_backend", "split_forward_count"),
        process="scheduler",
        why="a batch with verifications, blends or merges runs as a split prefill",
    ),
    Hook(
        target=f"{_RUNNER}.ModelRunner.forward_split_prefill",
        module=_RUNNER,
        kind="around",
        function=passes.run_layers,
        parameters=("self", "forward_batch", "reinit_attn_backend", "forward_count"),
        process="scheduler",
        why="the layers run in intervals, between which verdicts and merged branches leave and KV is taken over",
    ),
)


@dataclass(frozen=True)
class HookState:
    """Whether a hook is in place in this process.

    Attributes:
        applied: None while its module has not been loaded here.
        problem: what is wrong, None if nothing.
    """

    target: str
    applied: bool | None
    problem: str | None


_problems: dict[str, str] = {}
_armed: tuple[Hook, ...] = ()


def arm(hooks: Iterable[Hook]) -> None:
    """Apply each hook as soon as its module is loaded, and the HTTP routes with the HTTP server."""
    global _armed
    _armed = tuple(hooks)
    for hook in _armed:
        when_imported(hook.module, partial(_apply, hook))
    when_imported(_HTTP, routes.add_routes)


def problem_of(hook: Hook) -> str | None:
    """What is wrong with a hook's target in the installed SGLang, or None. Imports the target's module."""
    try:
        target = pkgutil.resolve_name(hook.target)
    except (AttributeError, ImportError) as error:
        return f"{hook.target} does not exist ({error})"
    parameters = tuple(inspect.signature(target).parameters)
    if parameters != hook.parameters:
        return f"{hook.target} takes {parameters}, expected {hook.parameters}"
    return None


def states() -> list[HookState]:
    """The state of every armed hook in this process."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    result = []
    for hook in _armed:
        problem = _problems.get(hook.target)
        applied = True if hook.target in HookRegistry._patched else (False if problem else None)
        result.append(HookState(hook.target, applied, problem))
    return result


def _apply(hook: Hook, module: ModuleType) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    problem = problem_of(hook)
    if problem is None:
        HookRegistry.register(hook.target, hook.function, HookType(hook.kind))
        HookRegistry.apply_hooks()
        if hook.target not in HookRegistry._patched:
            problem = f"{hook.target} could not be patched; SGLang's log says why"
    if problem is not None:
        _problems[hook.target] = problem
        logger.error("rksc: %s. This build hooks SGLang %s; `rksc doctor` shows all targets.", problem, SGLANG_VERSION)


def describe() -> dict[str, dict[str, Any]]:
    """:func:`states` as plain values, for reports."""
    return {state.target: {"applied": state.applied, "problem": state.problem} for state in states()}
