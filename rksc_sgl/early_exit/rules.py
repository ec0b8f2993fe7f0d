"""When a verification may stop: the certified rule, and the published one for comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rksc_sgl.calibration.readout import LinearReadout
from rksc_sgl.calibration.thresholds import CONFIRMATION

PUBLISHED_FIRST_LAYER = 2
NOTHING = -1e4  # logit of tokens that are no label; finite, so that log-probabilities are too


@dataclass(frozen=True, eq=False)
class Look:
    """What a rule sees at a layer. n sequences.

    Attributes:
        margin: ``[n]`` float32, logit of YES less logit of NO as foreseen.
        certain: ``[n]`` bool: the sequence may leave. A NaN is never certain.
        error: how far ``margin`` may be off, in logits; the interval that selection must respect.
    """

    margin: torch.Tensor
    certain: torch.Tensor
    error: float


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

    def look(self, layer: int, states: torch.Tensor, memory: dict[int, torch.Tensor]) -> Look:
        """
        Args:
            layer: how many layers have run.
            states: ``[n, hidden]`` last position of each sequence with the final norm applied.
            memory: the rule's own notes by layer, for the same n sequences; the caller keeps them in step.
        """
        ...


class CertifiedRule:
    """A linear read-out for each layer; a sequence leaves when its margin is ``t`` error scales away from 0 and the
    look before said the same verdict with at least :data:`CONFIRMATION` of that distance.

    The same rule as in :mod:`rksc_sgl.calibration.thresholds`, which certifies it (Learn-then-Test, arXiv 2110.01052).
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
        self._readouts = {
            layer: (torch.from_numpy(one.weight.copy()), one.bias, one.scale) for layer, one in sorted(readouts.items())
        }
        self._before = dict(zip(list(self._readouts)[1:], self._readouts, strict=False))

    @property
    def layers(self) -> Sequence[int]:
        return tuple(self._readouts)

    def look(self, layer: int, states: torch.Tensor, memory: dict[int, torch.Tensor]) -> Look:
        weight, bias, scale = self._readouts[layer]
        margin = states.float() @ weight.to(states.device) + bias
        memory[layer] = margin
        earlier = self._before.get(layer)
        if earlier is None:
            return Look(margin, torch.zeros_like(margin, dtype=torch.bool), 0.0)
        confirmed = margin.sign() * memory[earlier] >= CONFIRMATION * self.t * self._readouts[earlier][2]
        return Look(margin, (margin.abs() >= self.t * scale) & confirmed, self.t * scale)


class PublishedRule:
    """The exit of RKSC as published (arXiv 2606.09937), with the final norm; uncertified, for comparison only.

    From layer 2 on: leave when the entropy of the unembedded last position is below ``theta`` nats and has moved by
    less than ``eps`` since the layer before.
    """

    name = "published"
    risk = None

    def __init__(
        self,
        unembedding: torch.Tensor,
        yes_ids: Sequence[int],
        no_ids: Sequence[int],
        layers: int,
        theta: float,
        eps: float,
    ) -> None:
        self.unembedding, self.theta, self.eps = unembedding, theta, eps
        self.yes_ids, self.no_ids = list(yes_ids), list(no_ids)
        self._layers = tuple(range(PUBLISHED_FIRST_LAYER - 1, layers - 1))

    @property
    def layers(self) -> Sequence[int]:
        return self._layers

    def look(self, layer: int, states: torch.Tensor, memory: dict[int, torch.Tensor]) -> Look:
        logits = (states.to(self.unembedding.dtype) @ self.unembedding.t()).float()
        logprobs = logits.log_softmax(dim=-1)
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
        before, memory[layer] = memory.get(layer - 1), entropy
        margin = margin_of(logits, self.yes_ids, self.no_ids)
        if before is None:
            return Look(margin, torch.zeros_like(entropy, dtype=torch.bool), 0.0)
        return Look(margin, (entropy < self.theta) & ((entropy - before).abs() < self.eps), 0.0)


def margin_of(logits: torch.Tensor, yes_ids: Sequence[int], no_ids: Sequence[int]) -> torch.Tensor:
    """``[n]`` log-odds of the YES against the NO tokens, from ``[n, vocabulary]`` logits or log-probabilities."""
    return logits[:, list(yes_ids)].logsumexp(dim=-1) - logits[:, list(no_ids)].logsumexp(dim=-1)


def verdict_logits(margin: float, yes_ids: Sequence[int], no_ids: Sequence[int], row: torch.Tensor) -> None:
    """Write logits ``[vocabulary]`` that hold nothing but this margin, spread evenly over each label's tokens."""
    row.fill_(NOTHING)
    row[list(yes_ids)] = margin - math.log(len(yes_ids))
    row[list(no_ids)] = -math.log(len(no_ids))
