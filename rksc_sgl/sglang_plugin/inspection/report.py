"""What was decided for a request, from the scheduler to its ``meta_info["rksc"]``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rksc_sgl.metrics import OF_SCHEDULERS, counters
from rksc_sgl.options import CONFIDENCE, KEY
from rksc_sgl.sglang_plugin.branch_state import Phase
from rksc_sgl.sglang_plugin.inspection import counting, inquiry, prometheus_export
from rksc_sgl.sglang_plugin.memory import slots
from rksc_sgl.sglang_plugin.memory.keeper import described, known_keeper_of
from rksc_sgl.sglang_plugin.offering import offers_here
from rksc_sgl.sglang_plugin.passes import exits, pass_clock, token_confidence
from rksc_sgl.sglang_plugin.passes.split_pass import probe_layers
from rksc_sgl.sglang_plugin.placing import certified_blends
from rksc_sgl.sglang_plugin.wiring import registry


def request_report(req: Any) -> dict[str, Any] | None:
    """The report of one scheduler request, or None where it did not opt in.

    ``mode`` says whose KV the request reads and writes, ``reused_tokens`` how many of its tokens were served from KV of
    the same prefix: exact reuse. With mode ``blend`` the KV is approximate: ``blended_before_tokens`` were found in the
    namespace of blended KV, ``taken_tokens`` were taken over from a donor. With mode ``merge`` the first
    ``replaced_tokens`` of the prompt were replaced by the donor's, ``merged_tokens`` of which were there already.
    ``declined`` says why nothing was shared.
    """
    state = req.rksc
    if state is None:
        return None
    options = state.options
    report: dict[str, Any] = {"mode": "exact", "op": options.op, "reused_tokens": req.cached_tokens}
    if state.blended:  # its KV may be approximate, whether it was found or is put there beside others'
        report.update(mode="blend", reused_tokens=0, blended_before_tokens=req.cached_tokens)
    elif state.canonical_tokens:
        merged = min(state.canonical_tokens, req.cached_tokens)
        report.update(mode="merge", reused_tokens=req.cached_tokens - merged, merged_tokens=merged)
    report.update(state.sharing.to_plain())
    if state.certified is not None and options.op == "branch":
        report["certified_blend"] = asdict(state.certified)
    if state.waited_passes:
        report["waited_passes"] = state.waited_passes
    if options.group is not None:
        report.update(group=options.group, branch=options.branch, branches=options.branches)
    if state.memory:
        report["memory"] = dict(state.memory)
    if state.exit is not None:
        report["exit"] = state.exit
    if state.confidence_refusal:
        report["confidence_refused"] = state.confidence_refusal
    if state.warnings:
        report["warnings"] = list(state.warnings)
    return report


def reporting_streamer_class(result: type, scheduler: Any) -> type:
    """AFTER hook: the scheduler's output streamer, with our report beside each request that opted in.

    Requests are counted on their way out, also where the report has no way to the client, and their prompts are
    remembered for `rksc tree`.
    """
    prometheus_export.export_from(scheduler)
    counts = counting.counts_here()

    class ReportingStreamer(result):  # type: ignore[valid-type,misc]
        # The embedded Rust front end has no channel for extra output fields and refuses a class that has some.
        has_additional_customized_info = scheduler.rust_server is None

        def stream_output(self, reqs: list[Any], return_logprob: bool, skip_req: Any = None) -> None:
            reqs = [req for req in reqs if req.rksc is None or not req.rksc.is_leaving]
            finishing = counting.about_to_finish(reqs, skip_req) if counts and self.is_generation else []
            super().stream_output(reqs, return_logprob, skip_req)
            for req in finishing:
                _finish(req)

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
            infos = super().build_additional_customized_info(reqs)
            reports = [request_report(req) for req in reqs]
            if any(reports):
                infos = {**infos, KEY: reports}
            if any(map(_wants_confidence, reqs)):
                infos = {**infos, CONFIDENCE: [_new_confidences(req) for req in reqs]}
            return infos

    return ReportingStreamer


def _wants_confidence(req: Any) -> bool:
    return req.rksc is not None and req.rksc.options.confidence


def _new_confidences(req: Any) -> list[float | None] | None:
    """Of the tokens that leave the scheduler now; None where nobody asked."""
    if not _wants_confidence(req):
        return None
    return req.rksc.confidences_until(len(req.output_ids_through_stop))


def count_aborted(result: Any, scheduler: Any, abort_req: Any, req: Any) -> Any:
    """AFTER hook: a request that ends in a queue, which no output streamer sees, is counted too."""
    keeper = known_keeper_of(scheduler)
    if keeper is not None:
        keeper.note_end(req, aborted=True)
    if req.rksc is not None and req.rksc.phase is not Phase.FINISHED:
        report = request_report(req)
        req.rksc.enter(Phase.FINISHED)
        if report is not None and counting.counts_here():
            counting.count_request(report, aborted=True)
    return result


def _finish(req: Any) -> None:
    """The last that the scheduler has to do with a request."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    inquiry.remember_prompt(req)
    report = request_report(req)
    if report is not None:
        req.rksc.enter(Phase.FINISHED)
        counting.count_request(report, aborted=isinstance(req.finished_reason, FINISH_ABORT))


def write_meta_info(
    original: Any,
    tokenizer_manager: Any,
    meta_info: dict[str, Any],
    state: Any,
    customized_info: dict[str, Any],
    index: int,
    finish_reason: Any,
) -> None:
    """AROUND hook: our report is one object per request, not a list that grows with the tokens; confidences are."""
    others = {key: values for key, values in customized_info.items() if key != KEY}
    if CONFIDENCE in others and others[CONFIDENCE][index] is None:
        del others[CONFIDENCE]  # it is of others in the batch
    original(tokenizer_manager, meta_info, state, others, index, finish_reason)
    reports = customized_info.get(KEY)
    if reports is not None and reports[index] is not None:
        meta_info[KEY] = reports[index]


def add_internal_state(result: Any, controller: Any, recv_req: Any) -> Any:
    """AFTER hook: what of ours is at work in the scheduler, and the answer where we asked it something."""
    from rksc_sgl.cpu_platform.packed_linear import weights_of

    scheduler = controller.scheduler
    runner = scheduler.tp_worker.model_runner
    result.internal_state[KEY] = {
        "tree_cache": type(scheduler.tree_cache).__name__,
        "attention_backend": type(runner.attn_backend).__name__,
        "decoder_layers": getattr(runner.model, "rksc_decoder_layers", "SGLang's own"),
        "weights": weights_of(runner.model),
        "offers": offers_here.described(scheduler),
        "pass_cost": pass_clock.described(runner),
        "probe_layers": probe_layers(runner),
        "certified_blend": certified_blends.described(scheduler),
        "hooks": registry.describe(),
        "exit": exits.state(runner),
        "confidence": token_confidence.described(scheduler),
        "memory": described(scheduler),
        "slots": slots.described(scheduler),
        "counters": counters().snapshot(OF_SCHEDULERS),
    }
    question = inquiry.Inquiry.from_rid(recv_req.rid)
    if question is not None and counting.counts_here():
        result.internal_state[inquiry.ANSWER] = inquiry.answer(question, scheduler)
    return result
