"""The profiles that a server exits by: found, checked, and asked for a rule."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rksc_sgl.calibration.profile import Profile, fingerprint_of_model, load
from rksc_sgl.calibration.thresholds import SCOPES, Scope
from rksc_sgl.early_exit.audit import Audit
from rksc_sgl.early_exit.rules import CertifiedRule, ExitRule
from rksc_sgl.errors import OptionError, ProfileError
from rksc_sgl.exit_settings import DEFAULT_RISK, Settings, profile_directory
from rksc_sgl.metrics import EXIT_AUDITS, EXIT_DISAGREEMENTS, EXIT_LAYERS_SAVED, EXITS, counters
from rksc_sgl.options import KEY, RequestOptions

logger = logging.getLogger(__name__)


def server_fingerprint(model: Path, dtype: str) -> str:
    """What a profile is valid for: a model's files and the number type in which they are served."""
    return f"{fingerprint_of_model(model)}/{dtype.removeprefix('torch.')}"


@dataclass(eq=False)
class ExitProfiles:
    """The profiles of one server process, and their audit."""

    profiles: tuple[Profile, ...] = ()
    fingerprint: str | None = None  # of the model as it is served; None where it could not be taken
    settings: Settings = field(default_factory=Settings)
    why_none: str = "this server has no profile for its model"
    audit: Audit = field(default_factory=Audit)
    _rules: dict[tuple[int, Scope, float], CertifiedRule] = field(default_factory=dict)

    @classmethod
    def for_server(cls, model: Path, dtype: str, settings: Settings) -> ExitProfiles:
        """Load what fits the model; what does not fit is named in one log line and left out."""
        audit = Audit(settings.audit_rate, settings.audit_stop)
        files = [settings.profile] if settings.profile else sorted(profile_directory().glob("profile-*.json"))
        try:
            here = server_fingerprint(model, dtype)
        except ProfileError as error:
            logger.warning("rksc: no layer exit: %s", error)
            return cls(settings=settings, audit=audit, why_none=str(error))
        if not files:
            logger.info("rksc: no profile in %s: verification runs at full depth", profile_directory())
            return cls(fingerprint=here, settings=settings, audit=audit)
        found, problems = [], []
        for file in files:
            try:
                profile = load(file)
                if profile.model_fingerprint == here:
                    found.append(profile)
                else:
                    problems.append(f"{file}: is of another model or number type")
            except ProfileError as error:
                problems.append(str(error))
        if settings.profile or not found:
            for problem in problems:
                logger.warning("rksc: no layer exit by this profile: %s", problem)
        for profile in found:
            points = ", ".join(f"{point.delta:g} ({point.scope})" for point in profile.points) or "none"
            logger.info("rksc: profile of %s (%s): certified risks %s", profile.created, profile.workload, points)
        return cls(tuple(found), here, settings, "; ".join(problems) or cls.why_none, audit)

    def rule(self, prompt_ids: Sequence[int], options: RequestOptions) -> tuple[ExitRule | None, str]:
        """The certified rule for a prompt, or None and the reason why it runs at full depth."""
        if not self.profiles:
            return None, self.why_none
        index = next((i for i, profile in enumerate(self.profiles) if _fits(profile, prompt_ids, options)), None)
        if index is None:
            return None, "no profile covers this verification prompt"
        profile = self.profiles[index]
        try:
            point = profile.point_for(DEFAULT_RISK if options.risk is None else options.risk, _scope(options))
        except ProfileError as error:
            return None, str(error)
        if not self.audit.allows(point.delta):
            return None, f"the audit refuted the certificate at {point.delta:g}"
        key = (index, point.scope, point.delta)
        if key not in self._rules:
            self._rules[key] = CertifiedRule(profile.readouts, point.t, point.delta, profile.yes_ids, profile.no_ids)
        return self._rules[key], ""

    def check_risk(self, options: RequestOptions) -> None:
        """Refuse a risk that no profile of this server certifies; without any profile there is nothing to refuse.

        Raises:
            OptionError: saying which risks are certified.
        """
        if options.risk is None or not self.profiles:
            return
        problems = []
        for profile in self.profiles:
            try:
                profile.point_for(options.risk, _scope(options))
                return
            except ProfileError as error:
                problems.append(str(error))
        raise OptionError(f"{KEY}.{problems[0]}")

    def count_exit(self, rule: str, layers: int) -> None:
        counters().add(EXITS, rule=rule)
        counters().add(EXIT_LAYERS_SAVED, layers)

    def count_audit(self, risk: float, disagrees: bool) -> None:
        counters().add(EXIT_AUDITS, risk=risk)
        counters().add(EXIT_DISAGREEMENTS, int(disagrees), risk=risk)
        self.audit.record(risk, disagrees)

    def describe(self) -> dict[str, Any]:
        """As plain values, for ``GET /rksc/info``."""
        return {
            "fingerprint": self.fingerprint,
            "trace": self.settings.trace,
            "profiles": [
                {
                    "question_ids": list(profile.question_ids),
                    "created": profile.created,
                    "workload": profile.workload,
                    "risks": {s: [p.delta for p in profile.points if p.scope == s] for s in SCOPES},
                    "skip": [{"risk": point.delta, "agreement": point.agreement} for point in profile.skip_points],
                }
                for profile in self.profiles
            ],
            "audited": sum(self.audit.audited.values()),
            "disagreed": sum(self.audit.disagreed.values()),
            "broken": sorted(self.audit.broken),
        }


def _scope(options: RequestOptions) -> Scope:
    return "selection" if options.scope == "selection" else "verdict"


def _fits(profile: Profile, prompt_ids: Sequence[int], options: RequestOptions) -> bool:
    """Whether the prompt asks the profile's question and, where the request names its labels, means the same ones."""
    if not profile.covers(prompt_ids):
        return False
    named = bool(options.yes_ids or options.no_ids)
    return not named or (set(options.yes_ids), set(options.no_ids)) == (set(profile.yes_ids), set(profile.no_ids))
