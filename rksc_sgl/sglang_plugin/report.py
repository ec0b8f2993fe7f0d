"""What was decided for a request, from the scheduler to its ``meta_info["rksc"]``."""

from __future__ import annotations

from typing import Any

from rksc_sgl.metrics import counters
from rksc_sgl.options import KEY
from rksc_sgl.sglang_plugin import counting, exits, inquiry, prometheus_export
from rksc_sgl.sglang_plugin.opted import options_of_request


def request_report(req: Any) -> dict[str, Any] | None:
    """The report of one scheduler request, or None where it did not opt in.

    ``mode`` says how the prefix came to be, ``reused_tokens`` how many of its tokens were served from KV of the same
    prefix: exact reuse. With mode ``blend`` the KV is approximate: ``blended_before_tokens`` were found in the
    namespace of blended KV, ``taken_tokens`` were taken over from a donor. With mode ``merge`` the first
    ``replaced_tokens`` of the prompt were replaced by the donor's, ``merged_tokens`` of which were there already.
    ``declined`` says why nothing was shared.
    """
    options = options_of_request(req)
    if options is None:
        return None
    report: dict[str, Any] = {"mode": "exact", "op": options.op, "reused_tokens": req.cached_tokens}
    canonical = getattr(req, "rksc_canonical", 0)
    if getattr(req, "rksc_blended", False) and req.cached_tokens > 0:
        report.update(mode="blend", reused_tokens=0, blended_before_tokens=req.cached_tokens)
    elif canonical:
        merged = min(canonical, req.cached_tokens)
        report.update(mode="merge", reused_tokens=req.cached_tokens - merged, merged_tokens=merged)
    report.update(getattr(req, "rksc_report", {}))
    if getattr(req, "rksc_waited", 0):
        report["waited_passes"] = req.rksc_waited
    if options.group is not None:
        report.update(group=options.group, branch=options.branch, branches=options.branches)
    verification = exits.exit_report(req)
    if verification is not None:
        report["exit"] = verification
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
            reqs = [req for req in reqs if getattr(req, "rksc_leaving", None) is None]
            finishing = counting.about_to_finish(reqs, skip_req) if counts and self.is_generation else []
            super().stream_output(reqs, return_logprob, skip_req)
            for req in finishing:
                _settle(req)

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
            reports = [request_report(req) for req in reqs]
            inherited = super().build_additional_customized_info(reqs)
            return {**inherited, KEY: reports} if any(reports) else inherited

    return ReportingStreamer


def _settle(req: Any) -> None:
    """The last that the scheduler has to do with a request."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    inquiry.remember_prompt(req)
    report = request_report(req)
    if report is not None:
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
    """AROUND hook: our report is one object per request, not a list that grows with the tokens."""
    others = {key: values for key, values in customized_info.items() if key != KEY}
    original(tokenizer_manager, meta_info, state, others, index, finish_reason)
    reports = customized_info.get(KEY)
    if reports is not None and reports[index] is not None:
        meta_info[KEY] = reports[index]


def add_internal_state(result: Any, controller: Any, recv_req: Any) -> Any:
    """AFTER hook: what of ours is at work in the scheduler, and the answer where we asked it something."""
    from rksc_sgl.sglang_plugin import hooks

    scheduler = controller.scheduler
    runner = scheduler.tp_worker.model_runner
    result.internal_state[KEY] = {
        "tree_cache": type(scheduler.tree_cache).__name__,
        "attention_backend": type(runner.attn_backend).__name__,
        "decoder_layers": getattr(runner.model, "rksc_decoder_layers", "SGLang's own"),
        "hooks": hooks.describe(),
        "exit": exits.state(runner),
        "counters": counters().snapshot(),
    }
    question = inquiry.Inquiry.from_rid(recv_req.rid)
    if question is not None and counting.counts_here():
        result.internal_state[inquiry.ANSWER] = inquiry.answer(question, scheduler)
    return result
