"""When a verification may stop: the certified rule, and the published one for comparison.

What a rule needs of a state is measured on the device, for all sequences of a batch at once and once for all rules that
need the same (:class:`Gauge`); a rule decides on the host, of a few numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rksc_sgl.early_exit.certainty import error_of, may_leave
from rksc_sgl.early_exit.readout import LinearReadout

PUBLISHED_FIRST_LAYER = 2
NOTHING = -1e4  # logit of tokens that are no label; finite, so that log-probabilities are too


@dataclass(frozen=True)
class Look:
    """What a rule sees of one sequence at a layer.

    Attributes:
        margin: logit of YES less logit of NO as foreseen.
        certain: the sequence may leave. A NaN is never certain.
        error: how far ``margin`` may be off, in logits; the interval that selection must respect.
    """

    margin: float
    certain: bool
    error: float


class Gauge(Protocol):
    """What is measured of states. Gauges that measure the same are equal."""

    @property
    def width(self) -> int:
        """Numbers of a state."""

    def measure(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            layer: how many layers have run.
            states: ``[n, hidden]`` last position of each sequence with the final norm applied.

        Returns:
            float32 ``[n, width]``, on the states' device.
        """
        ...


class ExitRule(Protocol):
    """A rule looks at given layers; layer l is the state after l layers have run."""

    @property
    def name(self) -> str: ...

    @property
    def risk(self) -> float | None: ...

    @property
    def yes_ids(self) -> Sequence[int]: ...

    @property
    def no_ids(self) -> Sequence[int]: ...

    @property
    def layers(self) -> Sequence[int]: ...

    @property
    def gauge(self) -> Gauge: ...

    def can_leave(self, layer: int) -> bool:
        """Whether a sequence could leave at this look, whatever is measured there."""
        ...

    def look(self, layer: int, measured: Mapping[int, Sequence[float]]) -> Look:
        """
        Args:
            layer: how many layers have run.
            measured: by layer, what the gauge said of one sequence there and at its earlier looks.
        """
        ...


class LinearGauge:
    """A linear read-out for each layer."""

    width = 1

    def __init__(self, readouts: Mapping[int, LinearReadout]) -> None:
        self.readouts = readouts
        self._on_device: dict[tuple[int, torch.device], torch.Tensor] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LinearGauge) and other.readouts is self.readouts

    def __hash__(self) -> int:
        return id(self.readouts)

    def measure(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        readout, key = self.readouts[layer], (layer, states.device)
        if key not in self._on_device:
            self._on_device[key] = torch.from_numpy(readout.weight.copy()).to(states.device)
        return (states.float() @ self._on_device[key] + readout.bias).unsqueeze(1)


class CertifiedRule:
    """A linear read-out for each layer; :func:`rksc_sgl.early_exit.certainty.may_leave` says when a sequence leaves.

    Calibration certifies that same function (Learn-then-Test, arXiv 2110.01052).
    """

    name = "certified"

    def __init__(
        self,
        readouts: Mapping[int, LinearReadout],
        t: float,
        risk: float,
        yes_ids: Sequence[int],
        no_ids: Sequence[int],
    ) -> None:
        self.t, self.risk, self.yes_ids, self.no_ids = t, risk, yes_ids, no_ids
        self.gauge = LinearGauge(readouts)
        self._layers = tuple(sorted(readouts))
        self._scales = {layer: readouts[layer].scale for layer in self._layers}
        self._before = dict(zip(self._layers[1:], self._layers, strict=False))

    @property
    def layers(self) -> Sequence[int]:
        return self._layers

    def can_leave(self, layer: int) -> bool:
        return layer in self._before  # nothing confirms the first look

    def look(self, layer: int, measured: Mapping[int, Sequence[float]]) -> Look:
        margin, scale, earlier = measured[layer][0], self._scales[layer], self._before.get(layer)
        before = None if earlier is None else (measured[earlier][0], self._scales[earlier])
        return Look(margin, bool(may_leave(margin, scale, self.t, before)), error_of(scale, self.t))


@dataclass(frozen=True)
class EntropyGauge:
    """Margin and entropy of the unembedded state.

    Attributes:
        unembed: from states ``[n, hidden]`` to logits ``[n, vocabulary]``.
    """

    unembed: Callable[[torch.Tensor], torch.Tensor]
    yes_ids: tuple[int, ...]
    no_ids: tuple[int, ...]

    width = 2

    def measure(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        logits = self.unembed(states).float()
        logprobs = logits.log_softmax(dim=-1)
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
        return torch.stack((margin_of(logits, self.yes_ids, self.no_ids), entropy), dim=1)


class PublishedRule:
    """The exit of RKSC as published (arXiv 2606.09937), with the final norm; uncertified, for comparison only.

    From layer 2 on: leave when the entropy of the unembedded last position is below ``theta`` nats and has moved by
    less than ``eps`` since the layer before.
    """

    name = "published"
    risk = None

    def __init__(
        self,
        unembed: Callable[[torch.Tensor], torch.Tensor],
        yes_ids: Sequence[int],
        no_ids: Sequence[int],
        layers: int,
        theta: float,
        eps: float,
    ) -> None:
        self.theta, self.eps = theta, eps
        self.yes_ids, self.no_ids = list(yes_ids), list(no_ids)
        self.gauge = EntropyGauge(unembed, tuple(yes_ids), tuple(no_ids))
        self._layers = tuple(range(PUBLISHED_FIRST_LAYER - 1, layers - 1))

    @property
    def layers(self) -> Sequence[int]:
        return self._layers

    def can_leave(self, layer: int) -> bool:
        return layer != self._layers[0]

    def look(self, layer: int, measured: Mapping[int, Sequence[float]]) -> Look:
        margin, entropy = measured[layer]
        before = measured.get(layer - 1)
        still = before is not None and abs(entropy - before[1]) < self.eps
        return Look(margin, entropy < self.theta and still, 0.0)


def margin_of(logits: torch.Tensor, yes_ids: Sequence[int], no_ids: Sequence[int]) -> torch.Tensor:
    """``[n]`` log-odds of the YES against the NO tokens, from ``[n, vocabulary]`` logits or log-probabilities."""
    return logits[:, list(yes_ids)].logsumexp(dim=-1) - logits[:, list(no_ids)].logsumexp(dim=-1)


@dataclass(frozen=True)
class Verdict:
    """What a sequence that left says.

    Attributes:
        row: of the logits.
        margin: log-odds of the YES against the NO tokens.
    """

    row: int
    margin: float
    yes_ids: Sequence[int]
    no_ids: Sequence[int]


def write_verdicts(logits: torch.Tensor, verdicts: Sequence[Verdict]) -> None:
    """Write into rows of logits ``[n, vocabulary]`` nothing but these margins, spread evenly over each label's tokens.

    A few operations, however many verdicts there are.
    """
    if not verdicts:
        return
    labels = [
        (one.row, token, logit)
        for one in verdicts
        for ids, share in ((one.yes_ids, one.margin), (one.no_ids, 0.0))
        for token, logit in ((token, share - math.log(len(ids))) for token in ids)
    ]
    rows, tokens, values = zip(*labels, strict=True)
    device = logits.device
    logits[torch.tensor([one.row for one in verdicts], device=device)] = NOTHING
    places = torch.tensor([rows, tokens], device=device)
    logits[places[0], places[1]] = torch.tensor(values, dtype=logits.dtype, device=device)
