"""One pass with all policies that claimed something of its batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from rksc_sgl.layer_passes.contract import LayerPass, PassPolicy, Run


@dataclass(frozen=True)
class PassOutcome:
    """What a pass gave.

    Attributes:
        output: the logits processor's.
        seconds: by layer that was stopped at, the time from the beginning until all had decided there.
    """

    output: Any
    seconds: dict[int, float] = field(default_factory=dict)


def run_pass(layer_pass: LayerPass, policies: Sequence[PassPolicy]) -> PassOutcome:
    """Run to each layer at which somebody wants to look, let all decide there, and go on with what is left.

    Policies are asked in their order; a later one is told who left by an earlier one's decision. What they decided at
    a layer takes effect together, after the last of them.
    """
    with ExitStack() as stack:
        for policy in policies:
            stack.enter_context(policy.at_work())
        return _run(layer_pass, policies)


def _run(layer_pass: LayerPass, policies: Sequence[PassPolicy]) -> PassOutcome:
    began, seconds = time.perf_counter(), dict[int, float]()
    runs = {place: [(0, length)] for place, length in enumerate(layer_pass.lengths)}
    layer = 0
    while stop := min((stop for policy in policies for stop in policy.stops() if stop > layer), default=0):
        layer = stop
        looking = [one for one in policies if layer in one.stops()]
        if all(policy.probes for policy in looking):
            layer_pass.run_to_kv(layer)
        else:
            layer_pass.run_to(layer)
        before = dict(runs)
        for policy in looking:
            decision = policy.look(layer, layer_pass, runs.keys())
            for place in decision.leaving:
                del runs[place]
            for place, some in decision.runs.items():
                runs[place] = list(some)
        seconds[layer] = time.perf_counter() - began
        if not runs:
            break
        if runs != before:
            layer_pass.narrow([Run(place, *span) for place, spans in runs.items() for span in spans])
    output = layer_pass.finish() if runs else layer_pass.give_up()
    for policy in policies:
        policy.write(output)
    return PassOutcome(output, seconds)
