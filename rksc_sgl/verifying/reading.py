"""What the reply to a verification says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rksc_sgl.errors import LabelError
from rksc_sgl.options import KEY
from rksc_sgl.verifying.labels import LEAST_MASS, LabelTokens, label_logprobs


@dataclass(frozen=True)
class Reading:
    """One reply.

    Attributes:
        score: P(first label) among the labels.
        label_mass: P(any label); None where the verification left early, for its last layers were not run.
        prompt_tokens: of the verification.
        cached_tokens: of these, not computed.
        report: ``meta_info["rksc"]``; None where there is none.
    """

    score: float
    label_mass: float | None
    prompt_tokens: int
    cached_tokens: int
    report: dict[str, Any] | None

    @property
    def new_tokens(self) -> int:
        """Tokens that were computed."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def error(self) -> float:
        """How far the margin of the verdict may be off, in logits; 0 at full depth."""
        return float(((self.report or {}).get("exit") or {}).get("error", 0.0))


def read_reply(meta_info: Mapping[str, Any], tokens: LabelTokens) -> Reading:
    """Read a reply's ``meta_info``.

    Raises:
        LabelError: it has no log-probabilities of the labels, or none that can be compared.
    """
    logprobs = label_logprobs(meta_info)
    if not logprobs:
        raise LabelError("the server returned no log-probabilities of the labels")
    report = meta_info.get(KEY)
    left_early = ((report or {}).get("exit") or {}).get("layers_saved")
    return Reading(
        score=tokens.probabilities(logprobs)[0],
        label_mass=None if left_early else tokens.mass(logprobs),
        prompt_tokens=meta_info["prompt_tokens"],
        cached_tokens=meta_info["cached_tokens"],
        report=report,
    )


def said_of_mass(masses: Sequence[float | None]) -> str:
    """What is to be said where the model would hardly reply with a label; empty where it would.

    Args:
        masses: of every branch that was verified.
    """
    low = [mass for mass in masses if mass is not None and mass < LEAST_MASS]
    if not low:
        return ""
    return (
        f"the labels have {min(low):.2g} to {max(low):.2g} of the probability in {len(low)} of {len(masses)} "
        f"verifications, less than {LEAST_MASS:g}: these scores say little"
    )
