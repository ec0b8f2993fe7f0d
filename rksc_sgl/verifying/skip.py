"""The skip gate: when the branches are decisive without verification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rksc_sgl.answers import agreement
from rksc_sgl.errors import OptionError


@dataclass(frozen=True)
class SkipDecision:
    """Whether verification is skipped.

    Attributes:
        skip: True to select without verification.
        index: the branch that is then selected; None when verification runs.
        reason: what decided, with the numbers.
    """

    skip: bool
    index: int | None
    reason: str


@dataclass(frozen=True)
class SkipGate:
    """Rules under which verification is skipped; either suffices.

    ``SkipGate()`` skips only where all branches give the same answer: verification could not change it. The
    published rule skips by confidence, which says nothing about being right: it is here to be chosen, not
    certified.

    Attributes:
        agreement: skip when at least this share of all branches gives one answer; None switches the rule off.
        min_confidence: with ``min_lead``, skip when the most confident branch reaches this (published: 0.70) ...
        min_lead: ... *and* leads the next one by this much (published: 0.06 absolute, 0.08 relative).
        lead: ``absolute``, or ``relative`` to the leader's confidence.
    """

    agreement: float | None = 1.0
    min_confidence: float | None = None
    min_lead: float | None = None
    lead: Literal["absolute", "relative"] = "absolute"

    def __post_init__(self) -> None:
        for name in ("agreement", "min_confidence", "min_lead"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise OptionError(f"skip.{name}: must be between 0 and 1, got {value!r}")
        if self.lead not in ("absolute", "relative"):
            raise OptionError(f"skip.lead: must be absolute or relative, got {self.lead!r}")
        if (self.min_confidence is None) != (self.min_lead is None):
            raise OptionError(
                "skip.min_confidence and skip.min_lead: the published rule needs both, got "
                f"{self.min_confidence!r} and {self.min_lead!r}"
            )

    @classmethod
    def published(cls, lead: Literal["absolute", "relative"] = "absolute") -> SkipGate:
        """RKSC's first stage of confidence-gated early exit (arXiv 2606.09937), uncertified."""
        return cls(agreement=None, min_confidence=0.70, min_lead=0.06 if lead == "absolute" else 0.08, lead=lead)

    @classmethod
    def never(cls) -> SkipGate:
        """Always verify."""
        return cls(agreement=None)

    def decide(self, answers: Sequence[str | None], confidences: Sequence[float | None]) -> SkipDecision:
        """Decide for branches with these extracted answers and confidences (None where a branch failed)."""
        if len(answers) < 2:
            return SkipDecision(False, None, "one branch: nothing to compare")
        reasons = []
        if self.agreement is not None:
            found = agreement(answers)
            reasons.append(f"{found.votes} of {len(answers)} branches agree")
            if found.leader is not None and found.share >= self.agreement:
                index = _most_confident(found.indices, confidences)
                return SkipDecision(True, index, f"agreement: {found.votes} of {len(answers)} branches answer alike")
        if self.min_confidence is not None and self.min_lead is not None:
            ranked = sorted(
                (index for index, value in enumerate(confidences) if value is not None),
                key=lambda index: -(confidences[index] or 0.0),
            )
            if len(ranked) >= 2:
                first, second = confidences[ranked[0]] or 0.0, confidences[ranked[1]] or 0.0
                lead = first - second
                if self.lead == "relative":
                    lead = lead / first if first else 0.0
                reasons.append(f"confidence {first:.3f}, {self.lead} lead {lead:.3f}")
                if first >= self.min_confidence and lead >= self.min_lead:
                    return SkipDecision(True, ranked[0], f"confidence: {reasons[-1]}")
        return SkipDecision(False, None, "; ".join(reasons) or "skip gate off")


def _most_confident(indices: Sequence[int], confidences: Sequence[float | None]) -> int:
    return max(indices, key=lambda index: (confidences[index] or 0.0, -index))
