"""Early exit inside SGLang: which requests of a batch may leave, under which rule, and what is said about it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection
from functools import cache, partial
from typing import Any

import torch

from rksc_sgl.early_exit.leaving import Exits, Watched
from rksc_sgl.early_exit.paying import NOT_PAYING, can_pay
from rksc_sgl.early_exit.rules import ExitRule, PublishedRule, Verdict, margin_of, write_verdicts
from rksc_sgl.layer_passes.contract import Decision, LayerPass
from rksc_sgl.options import RequestOptions
from rksc_sgl.sglang_plugin.passes.claims import Batch
from rksc_sgl.sglang_plugin.passes.exit_profiles import ExitProfiles, profiles_of
from rksc_sgl.sglang_plugin.passes.pass_clock import clock_of
from rksc_sgl.sglang_plugin.passes.ranks import tp_group
from rksc_sgl.sglang_plugin.requests import PROMPT_LOGPROBS, wants_prompt_logprobs


class VerificationExits(Exits):
    """The exits of a batch's verifications, written where SGLang's sampler looks."""

    def __init__(self, batch: Batch, watched: list[Watched]) -> None:
        super().__init__(watched, batch.agree)
        self._batch = batch

    def look(self, layer: int, layer_pass: LayerPass, there: Collection[int]) -> Decision:
        with clock_of(self._batch.runner).timed_look():
            return super().look(layer, layer_pass, there)

    def write(self, output: Any) -> None:
        logits, found = output.next_token_logits, []
        for one in self.watched:
            verdict = _report(one, self._batch.requests[one.place], logits[one.place], self._batch.runner)
            if verdict is not None:
                found.append(verdict)
        write_verdicts(logits, found)


def claim(batch: Batch) -> VerificationExits | None:
    """The verifications of a batch that may leave or whose states are recorded; others say why not."""
    watched = []
    for place, req in enumerate(batch.requests):
        state = req.rksc
        if state is None or state.options.op != "verify" or state.exit_refusal:
            continue
        if req.extend_end < len(req.origin_input_ids):
            continue
        one, reason = (None, batch.refusal) if batch.refusal else _watch(batch.runner, place, req, state.options)
        state.exit = {"rule": None, "reason": reason}
        if one is not None:
            watched.append(one)
    _decline_what_cannot_pay(batch, watched)
    watched = [one for one in watched if one.rule is not None or one.trace_layers]
    return VerificationExits(batch, watched) if watched else None


def _decline_what_cannot_pay(batch: Batch, watched: list[Watched]) -> None:
    """Let nobody leave a pass that this would not make shorter."""
    runner, lengths = batch.runner, batch.forward_batch.extend_seq_lens_cpu
    leaving = [one for one in watched if one.rule is not None and not one.audited]
    cost = clock_of(runner).cost
    layers, rows = runner.model_config.num_hidden_layers, sum(lengths[one.place] for one in leaving)
    if not leaving or can_pay(leaving, sum(lengths), rows, layers, cost):
        return
    for one in leaving:
        one.rule = None
        batch.requests[one.place].rksc.exit = {"rule": None, "reason": NOT_PAYING}


def state(runner: Any) -> dict[str, Any]:
    """Profiles and counts of this process, as plain values."""
    return {"layers": runner.model_config.num_hidden_layers, **profiles_of(runner).describe()}


def _watch(runner: Any, place: int, req: Any, options: RequestOptions) -> tuple[Watched | None, str]:
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
        return None, PROMPT_LOGPROBS
    if req.grammar is not None:
        return None, "a grammar constrains the token"
    highest = max((*options.yes_ids, *options.no_ids), default=0)
    if highest >= runner.model_config.vocab_size:
        return None, f"label token {highest} is not in the vocabulary of {runner.model_config.vocab_size}"
    if options.exit == "published":
        if tp_group().world_size > 1:
            return None, "the published rule needs the whole vocabulary on one rank"
        layers = runner.model_config.num_hidden_layers
        return PublishedRule(
            _unembedding(runner.model.lm_head), options.yes_ids, options.no_ids, layers, options.theta, options.eps
        ), ""
    if req.rksc.blended:
        return None, "its KV is approximate, and the certificate is of exact KV"
    return server.rule(req.origin_input_ids, options)


@cache
def _unembedding(head: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """One and the same for every request, so that what several ask is measured once."""
    return partial(_unembed, head)


def _unembed(head: Any, states: torch.Tensor) -> torch.Tensor:
    """``[n, vocabulary]`` logits of states ``[n, hidden]``, as the model's own head makes them."""
    return head.quant_method.apply(head, states.to(head.weight.dtype))


def _report(one: Watched, req: Any, logits: torch.Tensor, runner: Any) -> Verdict | None:
    """What happened goes into the report; the verdict of one that left, which the sampler must be told."""
    report: dict[str, Any] = req.rksc.exit
    if one.trace:
        stacked = torch.stack([one.trace[layer] for layer in one.trace_layers]).contiguous().cpu().numpy()
        report["trace"] = base64.b64encode(stacked.astype("<f4").tobytes()).decode()
        report["trace_layers"] = list(one.trace_layers)
    if one.rule is None:
        return None
    server, layers = profiles_of(runner), runner.model_config.num_hidden_layers
    report.update(rule=one.rule.name, risk=one.rule.risk, layers=layers, layer=layers, layers_saved=0)
    if one.exit_layer is None or one.margin is None:
        report["reason"] = "the verdict was not certain before the last layer"
        return None
    if one.audited:
        exact = float(margin_of(logits[None].float(), one.rule.yes_ids, one.rule.no_ids))
        assert one.rule.risk is not None
        server.count_audit(one.rule.risk, (exact > 0) != (one.margin > 0))
        report.update(audited=True, foreseen=one.margin, margin=exact, error=0.0, reason="audited: ran to full depth")
        return None
    # Its deeper layers were never computed, so nothing of it may be found by another request.
    req.skip_radix_cache_insert = True
    server.count_exit(one.rule.name, layers - one.exit_layer)
    report.update(
        layer=one.exit_layer,
        layers_saved=layers - one.exit_layer,
        margin=one.margin,
        error=one.error,
        reason="",
    )
    return Verdict(one.place, one.margin, one.rule.yes_ids, one.rule.no_ids)
