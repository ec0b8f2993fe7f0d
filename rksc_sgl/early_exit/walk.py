"""One verification batch through the layers: look, let the certain ones leave, go on with the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from rksc_sgl.early_exit.rules import ExitRule


class LayerPass(Protocol):
    """A forward pass that can be run a few layers at a time and can lose sequences on the way."""

    def run_to(self, layer: int) -> None:
        """Run until ``layer`` layers have run."""

    def last_states(self) -> torch.Tensor:
        """``[sequences there, hidden]`` last position of each, with the final norm applied."""

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these of the sequences that are there (places among them, ascending)."""


@dataclass
class Watched:
    """A verification in the batch.

    Attributes:
        place: its place in the whole batch.
        rule: when it may leave; None only collects a trace.
        audited: it goes on to full depth when it could leave, so that the two verdicts can be compared.
        trace_layers: layers whose state is kept.
        exit_layer: layers that had run when it left, or could have.
        margin: as foreseen there.
        error: how far that may be off.
        trace: by layer, ``[hidden]``.
        notes: the rule's own, by layer.
    """

    place: int
    rule: ExitRule | None
    audited: bool = False
    trace_layers: tuple[int, ...] = ()
    exit_layer: int | None = None
    margin: float | None = None
    error: float = 0.0
    trace: dict[int, torch.Tensor] = field(default_factory=dict)
    notes: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def left(self) -> bool:
        """Whether it is no longer computed."""
        return self.exit_layer is not None and not self.audited

    @property
    def looking(self) -> bool:
        return self.rule is not None and self.exit_layer is None


def walk(
    layer_pass: LayerPass,
    batch_size: int,
    watched: Sequence[Watched],
    agree: Callable[[torch.Tensor], torch.Tensor] = lambda mask: mask,
) -> list[int]:
    """Run to the last layer at which somebody looks.

    Args:
        layer_pass: at layer 0 with all sequences.
        batch_size: sequences in the batch; those that are not watched stay to the end.
        watched: what may leave or is traced; filled in.
        agree: makes a ``[n]`` bool decision the same on every rank.

    Returns:
        Places of the batch that are still there, ascending.
    """
    there = list(range(batch_size))
    stops = sorted({layer for one in watched for layer in (*one.trace_layers, *(one.rule.layers if one.rule else ()))})
    for layer in stops:
        due = [one for one in watched if not one.left and _is_due(one, layer)]
        if not due:
            continue
        layer_pass.run_to(layer)
        states = layer_pass.last_states()
        index = {place: position for position, place in enumerate(there)}
        for one in due:
            if layer in one.trace_layers:
                one.trace[layer] = states[index[one.place]].float().clone()
        _look(layer, [one for one in due if one.looking and layer in one.rule.layers], states, index, agree)  # type: ignore[union-attr]
        gone = {one.place for one in watched if one.left}
        staying = [place for place in there if place not in gone]
        if len(staying) < len(there) and staying:
            layer_pass.keep([index[place] for place in staying])
        there = staying
        if not there:
            break
    return there


def _is_due(one: Watched, layer: int) -> bool:
    return layer in one.trace_layers or (one.looking and layer in one.rule.layers)  # type: ignore[union-attr]


def _look(
    layer: int,
    looking: Sequence[Watched],
    states: torch.Tensor,
    index: dict[int, int],
    agree: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Ask each rule once for all of its sequences; one transfer from the device for each."""
    rules = {id(one.rule): one.rule for one in looking}
    for key, rule in rules.items():
        assert rule is not None
        members = [one for one in looking if id(one.rule) == key]
        known = set.intersection(*(set(one.notes) for one in members))
        memory = {note: torch.stack([one.notes[note] for one in members]) for note in known}
        look = rule.look(layer, states[[index[one.place] for one in members]], memory)
        for note, values in memory.items():
            for one, value in zip(members, values, strict=True):
                one.notes[note] = value
        certain = agree(look.certain & look.margin.isfinite())
        outcome = torch.stack([look.margin.double(), certain.double()]).cpu()
        for one, margin, leaves in zip(members, outcome[0].tolist(), outcome[1].tolist(), strict=True):
            if leaves:
                one.exit_layer, one.margin, one.error = layer, margin, look.error
