"""The offers of a scheduler: made when it is ready to serve, by every rank alike."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from typing import Any
from weakref import WeakKeyDictionary

import torch

from rksc_sgl.sglang_plugin.memory import slots
from rksc_sgl.sglang_plugin.offering.server_facts import facts_of
from rksc_sgl.sglang_plugin.offering.walkable import prove_walkable
from rksc_sgl.sglang_plugin.passes import pass_clock, taking_over, token_confidence
from rksc_sgl.sglang_plugin.passes.split_pass import probe_layers, refusal_of_model
from rksc_sgl.sglang_plugin.placing import budget, certified_blends
from rksc_sgl.support import Offer, offers_of
from rksc_sgl.support.offers import ALLOW_VARIABLE

logger = logging.getLogger(__name__)

IN_INTERVALS = ("blend", "merge", "exit")  # what runs a model's layers in intervals

_made: WeakKeyDictionary[Any, dict[str, Offer]] = WeakKeyDictionary()


def make_offers(scheduler: Any) -> None:
    """BEFORE hook on the scheduler's event loop: nothing runs yet, and every rank comes by."""
    if offers_by(scheduler)["blend"].offered:
        runner = scheduler.tp_worker.model_runner
        with torch.no_grad():
            taking_over.prepare(runner, probe_layers(runner))
        budget.make_room(scheduler)
        slots.prepare(scheduler)
        certified_blends.read_certificate(scheduler)
    if any(offers_by(scheduler)[name].offered for name in IN_INTERVALS):
        pass_clock.start(scheduler)
    refusal = token_confidence.install(scheduler)
    if refusal:
        logger.warning("rksc: %s", refusal)


def offers_by(scheduler: Any) -> dict[str, Offer]:
    """What a scheduler offers, by capability."""
    if scheduler not in _made:
        _made[scheduler] = _offers(scheduler)
        for name, offer in _made[scheduler].items():
            if offer.warning:
                logger.warning("rksc: %s is offered untested: %s", name, offer.warning)
            elif not offer.offered:
                logger.warning("rksc: %s is not offered: %s", name, offer.refusal)
    return _made[scheduler]


def described(scheduler: Any) -> dict[str, Any]:
    """The offers as plain values, for ``GET /rksc/info``."""
    return {name: asdict(offer) for name, offer in offers_by(scheduler).items()}


def _offers(scheduler: Any) -> dict[str, Offer]:
    """The model is tried only where the rest of the server would allow what needs it."""
    allowed = os.environ.get(ALLOW_VARIABLE) == "1"
    walk_refusal = refusal_of_model(scheduler.tp_worker.model_runner.model)
    offers = offers_of(facts_of(scheduler, walk_refusal), allow_untested=allowed)
    if walk_refusal or not any(offers[name].offered for name in IN_INTERVALS):
        return offers
    return offers_of(facts_of(scheduler, prove_walkable(scheduler)), allow_untested=allowed)
