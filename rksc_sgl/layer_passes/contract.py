"""What a pass can do, and what a policy may decide in the middle of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Run:
    """Consecutive new tokens of one sequence of a batch.

    Attributes:
        place: the sequence's place in the batch.
        begin, end: among its new tokens, from 0.
    """

    place: int
    begin: int
    end: int


class LayerPass(Protocol):
    """A forward pass that runs some layers at a time and can lose tokens on the way."""

    @property
    def lengths(self) -> Sequence[int]:
        """New tokens of each sequence of the batch."""

    @property
    def depth(self) -> float:
        """How many layers have run for all that was there; a fraction where one has run in part."""

    def run_to(self, layer: int) -> None:
        """Run until ``layer`` layers have run."""

    def run_to_kv(self, layer: int) -> None:
        """Run until ``layer`` layers have their KV of all tokens; the last of them need not have run otherwise."""

    def last_states(self, places: Sequence[int]) -> torch.Tensor:
        """``[places, hidden]`` last position of these sequences, all there, with the final norm applied."""

    def narrow(self, runs: Sequence[Run]) -> None:
        """Go on with these runs only, of tokens that are there, in the order of the batch."""

    def finish(self) -> Any:
        """Run to the end; the logits processor's output for the whole batch, of no meaning where a sequence left."""

    def give_up(self) -> Any:
        """The logits processor's output where no sequence is left; of no meaning."""


@dataclass(frozen=True)
class Decision:
    """What a policy decided at a layer.

    Attributes:
        leaving: places of sequences that are computed no further.
        runs: by place, ``(begin, end)`` of the new tokens that are computed further; the KV of the others is there.
            A sequence that is not named goes on with all that it has.
    """

    leaving: Collection[int] = ()
    runs: Mapping[int, Sequence[tuple[int, int]]] = field(default_factory=dict)


class PassPolicy(Protocol):
    """Somebody who looks at a pass between its layers, for the sequences of the batch that it claimed.

    Attributes:
        probes: whether it compares prompts after the first layers, by their KV alone; the time until then is counted.
    """

    probes: bool

    def stops(self) -> Collection[int]:
        """Layers at which it still wants to look: how many have run then, below the model's number of layers."""

    def at_work(self) -> AbstractContextManager[None]:
        """What it needs around the pass: entered before the first layer, left after the last or when the pass fails."""

    def look(self, layer: int, layer_pass: LayerPass, there: Collection[int]) -> Decision:
        """Decide, after ``layer`` layers.

        Args:
            layer: one of its stops.
            layer_pass: has run so far.
            there: places of the sequences that are computed further, as far as others have decided.
        """

    def write(self, output: Any) -> None:
        """The pass is over: write into the logits processor's output what belongs there, and report."""
