"""The profiles that a server exits by: found, checked, and asked for a rule."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from rksc_sgl.calibration.fingerprint import Fingerprint, fingerprint_of_model
from rksc_sgl.calibration.profile import Profile, load
from rksc_sgl.early_exit.audit import Audit
from rksc_sgl.early_exit.rules import CertifiedRule, ExitRule
from rksc_sgl.errors import OptionError, ProfileError
from rksc_sgl.exit_settings import DEFAULT_RISK, Settings, profile_directory
from rksc_sgl.metrics import EXIT_AUDITS, EXIT_DISAGREEMENTS, EXIT_LAYERS_SAVED, EXITS, counters
from rksc_sgl.options import KEY, SCOPES, RequestOptions, Scope

logger = logging.getLogger(__name__)

WEIGHTS_UPDATED = "the weights were updated since the server started, and profiles are of those that it started with"


def server_fingerprint(model: Path, dtype: str) -> Fingerprint:
    """What a profile must be of to be valid on the server that this process belongs to.

    Attention backend, KV cache type, quantization and tensor-parallel size are those of SGLang's published
    configuration, which every process of a server resolves before it is started (``server_args`` keeps what the
    operator wrote) and which nothing changes later.

    Args:
        model: directory of the model.
        dtype: of the model's configuration in this process.

    Raises:
        ProfileError: the model's files cannot be read.
    """
    from sglang.srt.runtime_context import attention_backends, get_context

    published = get_context().config_leaf
    prefill, decode = attention_backends()
    kv_cache_dtype = published("kv_cache_dtype")
    return Fingerprint(
        model=fingerprint_of_model(model),
        dtype=dtype.removeprefix("torch."),
        quantization=published("quantization") or "none",
        kv_cache_dtype="bfloat16" if kv_cache_dtype == "bf16" else kv_cache_dtype,
        attention_backend=prefill if prefill == decode else f"{prefill} prefill, {decode} decode",
        tp_size=published("tp_size"),
    )


@dataclass(eq=False)
class ExitProfiles:
    """The profiles of one server process, and their audit."""

    profiles: tuple[Profile, ...] = ()
    fingerprint: Fingerprint | None = None  # of the model as it is served; None where it could not be taken
    settings: Settings = field(default_factory=Settings)
    why_none: str = "this server has no profile for its model"
    audit: Audit = field(default_factory=Audit)
    _rules: dict[tuple[int, Scope, float], CertifiedRule] = field(default_factory=dict)

    @classmethod
    def for_server(cls, model: Path, dtype: str, settings: Settings) -> ExitProfiles:
        """The profiles that fit the server of this process."""
        try:
            here = server_fingerprint(model, dtype)
        except ProfileError as error:
            logger.warning("rksc: early exit is disabled: %s", error)
            audit = Audit(settings.audit_rate, settings.audit_stop)
            return cls(settings=settings, audit=audit, why_none=str(error))
        return cls.fitting(here, settings)

    @classmethod
    def fitting(cls, here: Fingerprint, settings: Settings) -> ExitProfiles:
        """Load the profiles that fit a server; one that does not is left out, and said why in one log line.

        Profiles of other models in the cache are passed over without a word: they are for other servers.
        """
        audit = Audit(settings.audit_rate, settings.audit_stop)
        files = [settings.profile] if settings.profile else sorted(profile_directory().glob("profile-*.json"))
        if not files:
            logger.info("rksc: no profile in %s: verification runs at full depth", profile_directory())
            return cls(fingerprint=here, settings=settings, audit=audit)
        found, problems = [], []
        for file in files:
            try:
                profile = load(file)
            except ProfileError as error:
                problems.append(str(error))
                continue
            differences = profile.fingerprint.differences(here)
            if not differences:
                found.append(profile)
            elif settings.profile or profile.fingerprint.model == here.model:
                problems.append(f"{file}: {'; '.join(differences)}")
        if settings.profile or not found:
            for problem in problems:
                logger.warning("rksc: profile ignored: %s", problem)
        for profile in found:
            points = ", ".join(f"{point.risk:g} ({point.scope})" for point in profile.points) or "none"
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
        if not self.audit.allows(point.risk):
            return None, f"the audit refuted the certificate at {point.risk:g}"
        key = (index, point.scope, point.risk)
        if key not in self._rules:
            self._rules[key] = CertifiedRule(profile.readouts, point.t, point.risk, profile.yes_ids, profile.no_ids)
        return self._rules[key], ""

    def retire(self) -> None:
        """The weights were updated: no profile is of them, whatever the model's files say."""
        self.profiles, self.why_none = (), WEIGHTS_UPDATED

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
            "fingerprint": None if self.fingerprint is None else asdict(self.fingerprint),
            "trace": self.settings.trace,
            "profiles": [
                {
                    "question_ids": list(profile.question_ids),
                    "created": profile.created,
                    "workload": profile.workload,
                    "risks": {s: [p.risk for p in profile.points if p.scope == s] for s in SCOPES},
                    "skip": [{"risk": point.risk, "agreement": point.agreement} for point in profile.skip_points],
                }
                for profile in self.profiles
            ],
            "audited": sum(self.audit.audited.values()),
            "disagreed": sum(self.audit.disagreed.values()),
            "broken": sorted(self.audit.broken),
        }


def profiles_of(process: Any) -> ExitProfiles:
    """Profiles, audit and switches of this process; read once.

    Args:
        process: SGLang's ``TokenizerManager`` or ``ModelRunner``: what says which model is served, and in which type.
    """
    return _profiles_of(process.server_args.model_path, str(process.model_config.dtype))


@cache
def _profiles_of(model: str, dtype: str) -> ExitProfiles:
    return ExitProfiles.for_server(Path(model), dtype, Settings.from_environment())


def _scope(options: RequestOptions) -> Scope:
    return "selection" if options.scope == "selection" else "verdict"


def _fits(profile: Profile, prompt_ids: Sequence[int], options: RequestOptions) -> bool:
    """Whether the prompt asks the profile's question and, where the request names its labels, means the same ones."""
    if not profile.covers(prompt_ids):
        return False
    named = bool(options.yes_ids or options.no_ids)
    return not named or (set(options.yes_ids), set(options.no_ids)) == (set(profile.yes_ids), set(profile.no_ids))
