"""A forward pass whose states are given, for verifications to leave."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rksc_sgl.early_exit.leaving import Agreement, Exits, Watched
from rksc_sgl.layer_passes.contract import Run
from rksc_sgl.layer_passes.runner import run_pass


class RecordedPass:
    """States are given for every layer and place; keeps what was run and who was there."""

    def __init__(self, states: dict[int, torch.Tensor], size: int) -> None:
        self.states, self.places, self.layer = states, list(range(size)), 0
        self.lengths = [1] * size
        self.ran: list[tuple[int, tuple[int, ...]]] = []

    def run_to(self, layer: int) -> None:
        assert layer > self.layer
        self.ran.append((layer, tuple(self.places)))
        self.layer = layer

    def run_to_kv(self, layer: int) -> None:
        self.run_to(layer)

    @property
    def depth(self) -> float:
        return 0.0

    def last_states(self, places: Sequence[int]) -> torch.Tensor:
        assert set(places) <= set(self.places)
        return self.states[self.layer][list(places)]

    def narrow(self, runs: Sequence[Run]) -> None:
        places = [run.place for run in runs]
        assert places == sorted(set(places)) and set(places) < set(self.places)
        self.places = places

    def finish(self) -> list[int]:
        return self.places

    def give_up(self) -> list[int]:
        return []


def walk(
    layer_pass: RecordedPass, size: int, watched: Sequence[Watched], agree: Agreement = lambda mask: mask
) -> list[int]:
    """The places that are computed to the end."""
    return run_pass(layer_pass, [RecordingExits(watched, agree)]).output


class RecordingExits(Exits):
    def write(self, output: list[int]) -> None:
        assert output == [place for place in output if not any(one.left for one in self.watched if one.place == place)]
