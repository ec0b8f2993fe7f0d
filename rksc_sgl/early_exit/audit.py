"""Whether the certificate still holds: a share of the exits is computed to full depth and compared."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field

from scipy import special

logger = logging.getLogger(__name__)

ALPHA = 0.05  # the warning is wrong with at most this probability, each time that it is looked


@dataclass
class Audit:
    """Counts disagreements between exits and full depth.

    Attributes:
        rate: share of exits that are audited, 0 to 1.
        stop: whether a broken certificate switches exits off.
        audited, disagreed: exits compared so far, by risk.
    """

    rate: float = 0.0
    stop: bool = False
    audited: dict[float, int] = field(default_factory=dict)
    disagreed: dict[float, int] = field(default_factory=dict)
    broken: set[float] = field(default_factory=set)

    def chooses(self, request_id: str) -> bool:
        """Whether a request is audited; by its id, so that every rank decides alike."""
        if self.rate <= 0.0:
            return False
        return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8], "big") < self.rate * 2**64

    def record(self, risk: float, disagrees: bool) -> None:
        """One comparison at a certified risk; warns once for each risk whose certificate is refuted."""
        self.audited[risk] = self.audited.get(risk, 0) + 1
        self.disagreed[risk] = self.disagreed.get(risk, 0) + int(disagrees)
        if risk not in self.broken and self._refuted(risk):
            self.broken.add(risk)
            logger.warning(
                "rksc: %d of %d audited exits differ from full depth, more than the certified %g: the profile does not "
                "fit this traffic%s; run rksc calibrate on it",
                self.disagreed[risk],
                self.audited[risk],
                risk,
                ", and exits at this risk are switched off" if self.stop else "",
            )

    def allows(self, risk: float | None) -> bool:
        """Whether exits at this risk may still happen."""
        return not (self.stop and risk in self.broken)

    def _refuted(self, risk: float) -> bool:
        """P(as many disagreements or more | the risk) is at most :data:`ALPHA` (exact binomial)."""
        errors, total = self.disagreed[risk], self.audited[risk]
        return errors > 0 and float(special.bdtrc(errors - 1, total, risk)) <= ALPHA
