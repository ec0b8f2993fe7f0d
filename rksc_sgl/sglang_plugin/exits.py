"""Early exit inside SGLang: which requests of a batch may leave, under which rule, and what is said about it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rksc_sgl.early_exit.rules import ExitRule, PublishedRule, margin_of, verdict_logits
from rksc_sgl.early_exit.walk import Watched, walk
from rksc_sgl.exit_settings import Settings
from rksc_sgl.options import RequestOptions
from rksc_sgl.sglang_plugin.exit_profiles import ExitProfiles
from rksc_sgl.sglang_plugin.layer_pass import SplitPass
from rksc_sgl.sglang_plugin.opted import options_of_request, wants_prompt_logprobs


def profiles_of(process: Any) -> ExitProfiles:
    """Profiles, audit and switches of this process; read once.

    Args:
        process: SGLang's ``TokenizerManager`` or ``ModelRunner``: what says which model is served, and in which type.
    """
    return _profiles_of(process.server_args.model_path, str(process.model_config.dtype))


@cache
def _profiles_of(model: str, dtype: str) -> ExitProfiles:
    return ExitProfiles.for_server(Path(model), dtype, Settings.from_environment())


def run(layer_pass: SplitPass, watched: Sequence[Watched], requests: Sequence[Any]) -> Any:
    """The whole forward pass of a batch with verifications; the logits processor's output."""
    there = walk(layer_pass, len(layer_pass.lengths), watched, agreement())
    output = layer_pass.finish() if there else layer_pass.give_up()
    for one in watched:
        _settle(one, requests[one.place], output.next_token_logits[one.place], layer_pass.runner)
    return output


def exit_report(req: Any) -> dict[str, Any] | None:
    """What was decided about a verification, for its report; None before its pass."""
    return getattr(req, "rksc_exit", None)


def state(runner: Any) -> dict[str, Any]:
    """Profiles and counts of this process, as plain values."""
    return {"layers": runner.model_config.num_hidden_layers, **profiles_of(runner).describe()}


def watch(runner: Any, requests: Sequence[Any], refusal: str) -> list[Watched]:
    """The verifications of this batch that may leave or are traced.

    Args:
        refusal: why none of the batch can leave; empty if they can.
    """
    watched = []
    for place, req in enumerate(requests):
        options = options_of_request(req)
        if options is None or options.op != "verify" or req.extend_end < len(req.origin_input_ids):
            continue
        one, reason = (None, refusal) if refusal else _watch_one(runner, place, req, options)
        req.rksc_exit = {"rule": None, "reason": reason}
        if one is not None:
            watched.append(one)
    return watched


def _watch_one(runner: Any, place: int, req: Any, options: RequestOptions) -> tuple[Watched | None, str]:
    server = profiles_of(runner)
    traced = tuple(sorted(layer for layer in set(options.trace) if 0 < layer < runner.model_config.num_hidden_layers))
    if traced and not server.settings.trace:
        traced = ()
    rule, reason = _rule(runner, req, options, server)
    if rule is None and not traced:
        return None, reason
    audited = rule is not None and rule.risk is not None and server.audit.chooses(req.rid)
    return Watched(place, rule, audited=audited, trace_layers=traced), reason


def _rule(runner: Any, req: Any, options: RequestOptions, server: ExitProfiles) -> tuple[ExitRule | None, str]:
    """The rule under which a request may leave, or None and why not."""
    if options.exit == "off":
        return None, "exit is off"
    if req.sampling_params.max_new_tokens != 1 or len(req.output_ids) > 0:
        return None, "more than one token is asked for"
    if wants_prompt_logprobs(req):
        return None, "log-probabilities of the prompt are asked for"
    if req.grammar is not None:
        return None, "a grammar constrains the token"
    highest = max((*options.yes_ids, *options.no_ids), default=0)
    if highest >= runner.model_config.vocab_size:
        return None, f"label token {highest} is not in the vocabulary of {runner.model_config.vocab_size}"
    if options.exit == "published":
        if tp_group().world_size > 1:
            return None, "the published rule needs the whole vocabulary on one rank"
        layers = runner.model_config.num_hidden_layers
        unembedding = runner.model.lm_head.weight
        return PublishedRule(unembedding, options.yes_ids, options.no_ids, layers, options.theta, options.eps), ""
    if getattr(req, "rksc_blended", False):
        return None, "its KV is approximate, and the certificate is of exact KV"
    return server.rule(req.origin_input_ids, options)


def tp_group() -> Any:
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().tp_group


def agreement() -> Callable[[torch.Tensor], torch.Tensor]:
    """Rank 0 decides: a last bit that differs between ranks must not make them run different batches."""
    group = tp_group()
    if group.world_size == 1:
        return lambda mask: mask

    def agree(mask: torch.Tensor) -> torch.Tensor:
        return group.broadcast(mask.to(torch.int32), src=0).to(torch.bool)

    return agree


def _settle(one: Watched, req: Any, logits: torch.Tensor, runner: Any) -> None:
    """The verdict of one that left goes where the sampler looks; what happened goes into the report."""
    report: dict[str, Any] = req.rksc_exit
    if one.trace:
        stacked = torch.stack([one.trace[layer] for layer in one.trace_layers]).contiguous().cpu().numpy()
        report["trace"] = base64.b64encode(stacked.astype("<f4").tobytes()).decode()
        report["trace_layers"] = list(one.trace_layers)
    if one.rule is None:
        return
    server, layers = profiles_of(runner), runner.model_config.num_hidden_layers
    report.update(rule=one.rule.name, risk=one.rule.risk, layers=layers, layer=layers, layers_saved=0)
    if one.exit_layer is None or one.margin is None:
        report["reason"] = "the verdict was not certain before the last layer"
        return
    if one.audited:
        exact = float(margin_of(logits[None].float(), one.rule.yes_ids, one.rule.no_ids))
        assert one.rule.risk is not None
        server.count_audit(one.rule.risk, (exact > 0) != (one.margin > 0))
        report.update(audited=True, foreseen=one.margin, margin=exact, error=0.0, reason="audited: ran to full depth")
        return
    # Its deeper layers were never computed, so nothing of it may be found by another request.
    req.skip_radix_cache_insert = True
    verdict_logits(one.margin, one.rule.yes_ids, one.rule.no_ids, logits)
    server.count_exit(one.rule.name, layers - one.exit_layer)
    report.update(
        layer=one.exit_layer,
        layers_saved=layers - one.exit_layer,
        margin=one.margin,
        error=one.error,
        reason="",
    )
