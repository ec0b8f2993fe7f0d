"""What lets ``share="auto"`` blend: a certificate of blends that is of this model as this server serves it.

A request that says ``auto``, which is the default, and gives no settings of its own is then taken as one that asks for
``blend`` with the certified setting, where its prompt is not shorter than what was certified. Its verification looks
for blended KV, too. Without a certificate nothing changes.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from rksc_sgl.calibration.blend_certificate import BlendCertificate, load
from rksc_sgl.calibration.fingerprint import Fingerprint
from rksc_sgl.errors import ProfileError
from rksc_sgl.exit_settings import profile_directory
from rksc_sgl.options import DEFAULT_DEVIATION, DEFAULT_MINIMUM_SPAN, DEFAULT_RECOMPUTE, RequestOptions
from rksc_sgl.sglang_plugin.memory.slots import share_slots
from rksc_sgl.sglang_plugin.passes.exit_profiles import profiles_of
from rksc_sgl.sglang_plugin.passes.ranks import agreement

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CertifiedBlend:
    """How a server blends without being asked.

    Attributes:
        recompute, minimum_span: the certified setting.
        least_tokens: of a prompt.
        risk: that was certified.
    """

    recompute: float
    minimum_span: int
    least_tokens: int
    risk: float


_certified: WeakKeyDictionary[Any, CertifiedBlend] = WeakKeyDictionary()


def read_certificate(scheduler: Any) -> None:
    """Look for a certificate, on every rank alike: rank 0 says what it is."""
    fingerprint = profiles_of(scheduler.tp_worker.model_runner).fingerprint
    found = None if fingerprint is None else certificate_in(profile_directory(), fingerprint, share_slots(scheduler))
    numbers = [0.0] * 4
    if found is not None:
        setting = found.setting
        numbers = [setting.recompute, float(setting.minimum_span), float(found.least_tokens), found.risk]
    device = scheduler.tp_worker.model_runner.device
    agreed = agreement()(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()
    if agreed[1]:
        blend = CertifiedBlend(agreed[0], int(agreed[1]), int(agreed[2]), agreed[3])
        _certified[scheduler] = blend
        logger.info("rksc: share auto blends, as is certified: %s", blend)


def certificate_in(directory: Path, fingerprint: Fingerprint, shared_slots: bool) -> BlendCertificate | None:
    """The certificate of a server among the files of a directory; one that does not fit is said and left out.

    Args:
        directory: of profiles.
        fingerprint: of the model as it is served.
        shared_slots: whether blended branches use slots of their donors there.
    """
    for file in sorted(directory.glob("blends-*.json")):
        try:
            found = load(file)
        except ProfileError as error:
            logger.warning("rksc: certificate of blends ignored: %s", error)
            continue
        differences = list(found.fingerprint.differences(fingerprint))
        if found.shared_slots != shared_slots:
            here = "use" if shared_slots else "do not use"
            differences.append(f"here blended branches {here} slots of their donors, there it was otherwise")
        if not differences:
            return found
        if found.fingerprint.model == fingerprint.model:
            logger.warning("rksc: certificate of blends ignored: %s: %s", file, "; ".join(differences))
    return None


def retire(scheduler: Any) -> None:
    """The weights were updated: no certificate holds any more."""
    _certified.pop(scheduler, None)


def described(scheduler: Any) -> dict[str, Any] | None:
    """As plain values, for ``GET /rksc/info``; None without a certificate."""
    found = _certified.get(scheduler)
    return None if found is None else asdict(found)


def under_certificate(
    scheduler: Any, options: RequestOptions, tokens: int
) -> tuple[RequestOptions, CertifiedBlend | None]:
    """The options that a request has under the server's certificate, and that certificate where it changes them.

    Args:
        scheduler: SGLang's.
        options: as they were sent.
        tokens: of the request's prompt.
    """
    found = _certified.get(scheduler)
    if found is None or options.share != "auto" or options.share_scope != "group":
        return options, None
    own = (options.recompute, options.minimum_span, options.deviation)
    if own != (DEFAULT_RECOMPUTE, DEFAULT_MINIMUM_SPAN, DEFAULT_DEVIATION):
        return options, None
    if options.op == "branch" and (options.group is None or tokens < found.least_tokens):
        return options, None
    blended = replace(options, share="blend", recompute=found.recompute, minimum_span=found.minimum_span)
    return blended, found
