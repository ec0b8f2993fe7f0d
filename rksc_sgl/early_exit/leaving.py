"""Verifications that leave a pass at an intermediate layer, once their rule is certain of the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from rksc_sgl.early_exit.rules import ExitRule, Gauge
from rksc_sgl.layer_passes.contract import Decision, LayerPass

Agreement = Callable[[torch.Tensor], torch.Tensor]  # makes a decision, or what it is made of, the same on every rank


@dataclass
class Watched:
    """A verification in the batch.

    Attributes:
        place: its place in the whole batch.
        rule: when it may leave; None only records states.
        audited: it goes on to full depth when it could leave, so that the two verdicts can be compared.
        trace_layers: layers whose state is recorded.
        exit_layer: layers that had run when it left, or could have.
        margin: as foreseen there.
        error: how far that may be off.
        trace: by layer, ``[hidden]``.
        measured: by layer, what its rule's gauge said.
    """

    place: int
    rule: ExitRule | None
    audited: bool = False
    trace_layers: tuple[int, ...] = ()
    exit_layer: int | None = None
    margin: float | None = None
    error: float = 0.0
    trace: dict[int, torch.Tensor] = field(default_factory=dict)
    measured: dict[int, Sequence[float]] = field(default_factory=dict)

    @property
    def left(self) -> bool:
        """Whether it is no longer computed."""
        return self.exit_layer is not None and not self.audited

    @property
    def rule_layers(self) -> Sequence[int]:
        """Layers at which its rule still looks."""
        return self.rule.layers if self.rule is not None and self.exit_layer is None else ()

    @property
    def stops(self) -> set[int]:
        """Layers at which something is still to be done for it."""
        return set() if self.left else {*self.trace_layers, *self.rule_layers}


class Exits:
    """The policy of a batch's verifications (:class:`~rksc_sgl.layer_passes.contract.PassPolicy`).

    A look is one measurement for all sequences and rules that need the same; it comes to the host in one transfer, and
    only where somebody could leave.

    Args:
        watched: what may leave or is recorded; filled in.
        agree: makes what is measured the same on every rank.
    """

    probes = False

    def __init__(self, watched: Sequence[Watched], agree: Agreement = lambda found: found) -> None:
        self.watched, self._agree = watched, agree
        self._measured: list[_Measured] = []  # that are still on the device

    def stops(self) -> Collection[int]:
        return {stop for one in self.watched for stop in one.stops}

    def at_work(self) -> AbstractContextManager[None]:
        return nullcontext()

    def look(self, layer: int, layer_pass: LayerPass, there: Collection[int]) -> Decision:
        due = [one for one in self.watched if layer in one.stops and one.place in there]
        if not due:
            return Decision()
        states = layer_pass.last_states([one.place for one in due])
        for one, state in zip(due, states, strict=True) if any(layer in one.trace_layers for one in due) else ():
            if layer in one.trace_layers:
                one.trace[layer] = state.float().clone()
        looking = [one for one in due if layer in one.rule_layers]
        if looking:
            self._measured.append(_Measured.of(layer, due, looking, states))
        if any(one.rule is not None and one.rule.can_leave(layer) for one in looking):
            self._bring()
            for one in looking:
                _decide(one, layer)
        return Decision(leaving={one.place for one in due if one.left})

    def _bring(self) -> None:
        """What was measured since the last time goes to the host, in one transfer."""
        numbers = [one.numbers.flatten() for one in self._measured]
        found = self._agree(numbers[0] if len(numbers) == 1 else torch.cat(numbers)).cpu().tolist()
        for one in self._measured:
            size = one.numbers.numel()
            one.tell(found[:size])
            found = found[size:]
        self._measured = []


@dataclass(frozen=True, eq=False)
class _Measured:
    """What all gauges said of a batch at one layer.

    Attributes:
        layer: how many layers had run.
        rows: who has which row.
        columns: where a gauge's numbers begin.
        numbers: float32 ``[rows, numbers of all gauges]``.
    """

    layer: int
    rows: Sequence[Watched]
    columns: dict[Gauge, int]
    numbers: torch.Tensor

    @classmethod
    def of(cls, layer: int, rows: Sequence[Watched], looking: Sequence[Watched], states: torch.Tensor) -> _Measured:
        gauges = list(dict.fromkeys(one.rule.gauge for one in looking if one.rule is not None))
        columns = dict(zip(gauges, accumulate((gauge.width for gauge in gauges), initial=0), strict=False))
        parts = [gauge.measure(layer, states) for gauge in gauges]
        return cls(layer, rows, columns, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))

    def tell(self, found: Sequence[float]) -> None:
        """Give everybody what its gauge said; the numbers, now on the host, row by row."""
        width = self.numbers.shape[1]
        for row, one in enumerate(self.rows):
            gauge = None if one.rule is None else one.rule.gauge
            if gauge in self.columns:
                begin = row * width + self.columns[gauge]
                one.measured[self.layer] = found[begin : begin + gauge.width]


def _decide(one: Watched, layer: int) -> None:
    """Ask its rule whether it may leave, of what was measured."""
    assert one.rule is not None
    look = one.rule.look(layer, one.measured)
    if look.certain and math.isfinite(look.margin):
        one.exit_layer, one.margin, one.error = layer, look.margin, look.error
