"""Every place where we hook SGLang 0.5.23, in one table.

``parameters`` are those of the hooked callable in the pinned release (:mod:`rksc_sgl.sglang_plugin.wiring.registry`).
"""

from __future__ import annotations

from rksc_sgl.cpu_platform import warm_fork, without_triton
from rksc_sgl.on_import import when_imported
from rksc_sgl.sglang_plugin import branch_state
from rksc_sgl.sglang_plugin.inspection import openai_reports, report, routes
from rksc_sgl.sglang_plugin.memory import seams, slots
from rksc_sgl.sglang_plugin.merging import departures
from rksc_sgl.sglang_plugin.offering import offers_here
from rksc_sgl.sglang_plugin.one_request import routes as one_request_routes
from rksc_sgl.sglang_plugin.one_request import samples
from rksc_sgl.sglang_plugin.passes import forward
from rksc_sgl.sglang_plugin.placing import budget, queue
from rksc_sgl.sglang_plugin.wiring import admission, registry
from rksc_sgl.sglang_plugin.wiring.registry import Hook

_HTTP = "sglang.srt.entrypoints.http_server"
_SERVING = "sglang.srt.entrypoints.openai.serving_base"
_CHAT = "sglang.srt.entrypoints.openai.serving_chat"
_COMPLETIONS = "sglang.srt.entrypoints.openai.serving_completions"
_TOKENIZER = "sglang.srt.managers.tokenizer_manager"
_SCHEDULER = "sglang.srt.managers.scheduler"
_ALLOCATION = "sglang.srt.mem_cache.allocation"
_ENGINE = "sglang.srt.entrypoints.engine"
_TOKENIZERS = "sglang.srt.utils.hf_transformers.tokenizer"
_WORKER = "sglang.srt.managers.tp_worker"
_RUNNER = "sglang.srt.model_executor.model_runner"
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater"
_BATCH = "sglang.srt.managers.schedule_batch"
_POLICY = "sglang.srt.managers.schedule_policy"
_SLOTS = "sglang.srt.mem_cache.allocator.token"
_TREE = "sglang.srt.mem_cache.unified_radix_cache"
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
        target=f"{_SERVING}.OpenAIServingBase.handle_request",
        module=_SERVING,
        kind="around",
        function=one_request_routes.fork_on_v1,
        parameters=("self", "request", "raw_request"),
        process="http",
        why="a request on /v1 that asks for a fork gets one: routers know no other path",
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
        target=f"{_CHAT}.OpenAIServingChat._handle_non_streaming_request",
        module=_CHAT,
        kind="around",
        function=openai_reports.report_in_answer,
        parameters=("self", "adapted_request", "request", "raw_request"),
        process="http",
        why="the report in metadata['rksc'] of a chat answer",
    ),
    Hook(
        target=f"{_CHAT}.OpenAIServingChat._generate_chat_stream",
        module=_CHAT,
        kind="around",
        function=openai_reports.report_in_stream,
        parameters=("self", "adapted_request", "request", "raw_request"),
        process="http",
        why="the same in the last chunk of its stream",
    ),
    Hook(
        target=f"{_COMPLETIONS}.OpenAIServingCompletion._handle_non_streaming_request",
        module=_COMPLETIONS,
        kind="around",
        function=openai_reports.report_in_answer,
        parameters=("self", "adapted_request", "request", "raw_request"),
        process="http",
        why="the same for /v1/completions",
    ),
    Hook(
        target=f"{_COMPLETIONS}.OpenAIServingCompletion._generate_completion_stream",
        module=_COMPLETIONS,
        kind="around",
        function=openai_reports.report_in_stream,
        parameters=("self", "adapted_request", "request", "raw_request"),
        process="http",
        why="the same for its stream",
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
        target=f"{_TOKENIZER}.TokenizerManager._handle_batch_request",
        module=_TOKENIZER,
        kind="around",
        function=samples.number_samples,
        parameters=("self", "obj", "request", "request_states"),
        process="tokenizer",
        why="n > 1: each sample is a branch of one group, counted once",
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
        target=f"{_SCHEDULER}.Scheduler.send_abort_output",
        module=_SCHEDULER,
        kind="after",
        function=report.count_aborted,
        parameters=("self", "abort_req", "req"),
        process="scheduler",
        why="requests that end in the waiting queue are counted",
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
        target=f"{_SCHEDULER}.Scheduler.run_event_loop",
        module=_SCHEDULER,
        kind="before",
        function=offers_here.make_offers,
        parameters=("self",),
        process="scheduler",
        why="what this server offers is read and tried before it serves",
    ),
    Hook(
        target=f"{_UPDATER}.SchedulerWeightUpdaterManager.record_weight_version_after_update",
        module=_UPDATER,
        kind="after",
        function=queue.forget_old_weights,
        parameters=("self", "weight_version"),
        process="scheduler",
        why="no certificate of other weights is used after an update",
    ),
    Hook(
        target=f"{_SCHEDULER}.Scheduler._create_generation_req",
        module=_SCHEDULER,
        kind="after",
        function=branch_state.attach_state,
        parameters=("self", "recv_req", "args", "kwargs"),
        process="scheduler",
        why="a request that opted in has a state of ours from its first moment in the scheduler",
    ),
    Hook(
        target=f"{_SCHEDULER}.Scheduler._get_new_batch_prefill_raw",
        module=_SCHEDULER,
        kind="around",
        function=queue.hold_siblings,
        parameters=("self", "prefill_delayer_single_pass", "running_batch"),
        process="scheduler",
        why="forks begin as a whole, siblings wait for their anchor, and each branch gets its namespace and its donor",
    ),
    Hook(
        target=f"{_POLICY}.PrefillAdder.add_one_req",
        module=_POLICY,
        kind="around",
        function=budget.admit_by_computed,
        parameters=("self", "req", "has_chunked_req", "truncation_align_size"),
        process="scheduler",
        why="a blend counts against a prefill batch's budget what it computes, so that siblings run in one pass",
    ),
    Hook(
        target=f"{_TREE}.UnifiedRadixCache.evict_for_alloc",
        module=_TREE,
        kind="around",
        function=seams.evict_with_leases,
        parameters=("self", "params", "allocation_reclaim_satisfied"),
        process="scheduler",
        why="what is kept of forks gives way to what runs, where nothing else can",
    ),
    Hook(
        target=f"{_TREE}.UnifiedRadixCache.reset",
        module=_TREE,
        kind="before",
        function=seams.forget_leases,
        parameters=("self",),
        process="scheduler",
        why="a flush ends what is kept of forks",
    ),
    Hook(
        target=f"{_SLOTS}.TokenToKVPoolAllocator.free",
        module=_SLOTS,
        kind="around",
        function=slots.free_unowned,
        parameters=("self", "free_index"),
        process="scheduler",
        why="a slot that a blended branch uses besides its donor is free when both have let go of it",
    ),
    Hook(
        target=f"{_SLOTS}.TokenToKVPoolAllocator.clear",
        module=_SLOTS,
        kind="before",
        function=slots.forget_owners,
        parameters=("self",),
        process="scheduler",
        why="a flush frees all slots, whoever owns them",
    ),
    Hook(
        target=f"{_TREE}.UnifiedRadixCache.evictable_size",
        module=_TREE,
        kind="after",
        function=slots.evictable_slots,
        parameters=("self",),
        process="scheduler",
        why="what can be evicted is counted in slots, of which one may be in two nodes",
    ),
    Hook(
        target=f"{_TREE}.UnifiedRadixCache.protected_size",
        module=_TREE,
        kind="after",
        function=slots.protected_slots,
        parameters=("self",),
        process="scheduler",
        why="the same for what is locked, so that SGLang's check for lost slots holds",
    ),
    Hook(
        target=f"{_BATCH}.ScheduleBatch._get_decode_retraction_order",
        module=_BATCH,
        kind="after",
        function=seams.keep_oldest_forks,
        parameters=("reqs",),
        process="scheduler",
        why="branches of the fork that came last are retracted first",
    ),
    Hook(
        target=f"{_BATCH}.ScheduleBatch.retract_decode",
        module=_BATCH,
        kind="around",
        function=seams.retract_whole_forks,
        parameters=("self",),
        process="scheduler",
        why="branches of a fork are retracted together",
    ),
    Hook(
        target=f"{_SCHEDULER}.Scheduler.abort_request",
        module=_SCHEDULER,
        kind="before",
        function=seams.hear_of_end,
        parameters=("self", "recv_req"),
        process="scheduler",
        why="a client says that a fork has ended",
    ),
    Hook(
        target=f"{_SCHEDULER}.Scheduler.on_idle",
        module=_SCHEDULER,
        kind="before",
        function=seams.expire_leases,
        parameters=("self",),
        process="scheduler",
        why="forks of which nothing is heard are given up",
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
        function=departures.finish_departure,
        parameters=("self", "batch", "result"),
        process="scheduler",
        why="a branch that was merged queues up again; prompts of the whole cache are remembered as donors",
    ),
    Hook(
        target=f"{_WORKER}.TpModelWorker.forward_batch_generation",
        module=_WORKER,
        kind="around",
        function=forward.remember_batch,
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
        function=forward.choose_mode,
        parameters=("self", "forward_batch", "pp_proxy_tensors", "reinit_attn_backend", "split_forward_count"),
        process="scheduler",
        why="a batch with verifications, blends or merges runs as a split prefill",
    ),
    Hook(
        target=f"{_RUNNER}.ModelRunner.forward_split_prefill",
        module=_RUNNER,
        kind="around",
        function=forward.run_layers,
        parameters=("self", "forward_batch", "reinit_attn_backend", "forward_count"),
        process="scheduler",
        why="the layers run in intervals, between which verdicts and merged branches leave and KV is taken over",
    ),
)


def arm() -> None:
    """Arm the table, and the HTTP routes with the HTTP server."""
    registry.arm(HOOKS)
    when_imported(_HTTP, routes.add_routes)
    when_imported(_HTTP, one_request_routes.add_routes)
