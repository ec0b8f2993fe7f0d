"""Switches of early exit, from ``rksc serve`` to SGLang's processes by way of the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rksc_sgl.cache_directory import cache_directory
from rksc_sgl.errors import OptionError

DEFAULT_RISK = 0.01  # of verifications that name none
PROFILE_VARIABLE = "RKSC_PROFILE"
AUDIT_RATE_VARIABLE = "RKSC_AUDIT_RATE"
AUDIT_STOP_VARIABLE = "RKSC_AUDIT_STOP"
TRACE_VARIABLE = "RKSC_TRACE"


def profile_directory() -> Path:
    """Where ``rksc calibrate`` writes profiles and a server looks for its own."""
    return cache_directory("profiles")


@dataclass(frozen=True)
class Settings:
    """Switches of a server; ``rksc serve`` hands them to SGLang's processes in the environment.

    Attributes:
        profile: a profile's file; None looks in :func:`profile_directory`.
        audit_rate: share of exits that are compared with full depth.
        audit_stop: whether a broken certificate switches exits off.
        trace: whether requests may ask for hidden states, as calibration does.
    """

    profile: Path | None = None
    audit_rate: float = 0.0
    audit_stop: bool = False
    trace: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """
        Raises:
            OptionError: the audit rate is not a share.
        """
        text = environment.get(AUDIT_RATE_VARIABLE, "0")
        try:
            rate = float(text)
        except ValueError:
            rate = -1.0
        if not 0.0 <= rate <= 1.0:
            raise OptionError(f"{AUDIT_RATE_VARIABLE}: must be a number from 0 to 1, got {text!r}")
        profile = environment.get(PROFILE_VARIABLE)
        return cls(
            profile=Path(profile) if profile else None,
            audit_rate=rate,
            audit_stop=environment.get(AUDIT_STOP_VARIABLE) == "1",
            trace=environment.get(TRACE_VARIABLE) == "1",
        )
