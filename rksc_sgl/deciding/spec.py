"""What a caller asks for: :class:`EarlyStop`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from rksc_sgl.answers import extractor_of
from rksc_sgl.deciding.bound import boundary, calibrated_boundary
from rksc_sgl.deciding.policies import Certain, GroupConfidence, Policy, Probable, Window
from rksc_sgl.errors import OptionError

POLICIES = ("certain", "probable", "window", "confidence")
LAUNCHES = ("all", "fewest")
_KEY = "early_stop"
_DEFAULT_WINDOW = {"window": 5, "confidence": 128}  # branches (ESC's for GSM8K), tokens
_DEFAULT_RISK = 0.01


@dataclass(frozen=True)
class EarlyStop:
    """When a fork may stop before all of its branches ended, and how branches are launched.

    Attributes:
        policy: ``certain``: the vote of all branches can no longer change. ``probable``: P(the vote of all branches
            has another answer) <= ``risk``. ``window``: a window of branches agrees (ESC; uncertified).
            ``confidence``: branches are dropped whose confidence falls below ``threshold`` (DeepConf; uncertified).
            Or a :class:`~rksc_sgl.deciding.Policy` of your own: a function of the standing.
        variable: the variable with the answer.
        extract: the answer in its text: ``answer``, ``text``, ``json``, ``json:FIELD``, or a callable
            (:func:`rksc_sgl.answers.extractor_of`).
        launch: ``all`` at once; the ``fewest`` that could decide, and again the fewest as soon as these cannot; or
            waves of fixed sizes, one number or several, the last of which is repeated. None: what suits the policy,
            ``fewest`` for ``certain`` and ``probable``, waves of a window for ``window``, else ``all``.
        risk: of ``probable``; 0.01 where it is None.
        cutoff: of ``probable``, calibrated on recorded branches; None for the exact bound, which needs none.
        calibrated_for: with a ``cutoff``: the number of branches that it was calibrated for; it holds for no other.
        window: of ``window``: its branches; of ``confidence``: its tokens. None for 5 and 128.
        threshold: of ``confidence``.

    Raises:
        OptionError: a value is unknown, of the wrong type, out of range, or not of this policy; the message names it.
    """

    policy: str | Policy = "certain"
    variable: str = "answer"
    extract: str | Callable[[str], str | None] = "answer"
    launch: str | int | tuple[int, ...] | None = None
    risk: float | None = None
    cutoff: float | None = None
    calibrated_for: int | None = None
    window: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.policy) and self.policy not in POLICIES:
            raise _wrong("policy", f"must be one of {', '.join(POLICIES)} or a callable", self.policy)
        if not isinstance(self.variable, str) or not self.variable:
            raise _wrong("variable", "must be the name of a variable", self.variable)
        try:
            extractor_of(self.extract)
        except OptionError as error:
            raise OptionError(f"{_KEY}.{error}") from error
        if isinstance(self.launch, list):
            object.__setattr__(self, "launch", tuple(self.launch))
        self._check_launch()
        self._check_of_policy("risk", ("probable",))
        self._check_of_policy("cutoff", ("probable",))
        self._check_of_policy("window", ("window", "confidence"))
        self._check_of_policy("threshold", ("confidence",))
        for name in ("risk", "cutoff"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0.0 < value < 1.0):
                raise _wrong(name, "must be above 0 and below 1", value)
        self._check_calibrated_for()
        if self.window is not None and not _is_count(self.window, 2 if self.policy == "window" else 1):
            raise _wrong("window", f"must be a whole number from {2 if self.policy == 'window' else 1} on", self.window)
        if self.policy == "confidence" and not _is_number(self.threshold):
            raise _wrong("threshold", "confidence needs a number", self.threshold)

    def _check_launch(self) -> None:
        launch = self.launch
        if launch is None or (isinstance(launch, str) and launch in LAUNCHES):
            if launch == "fewest" and self.policy == "confidence":
                raise _wrong("launch", "confidence has no fewest branches that could decide; take all or waves", launch)
            return
        sizes = launch if isinstance(launch, tuple) else (launch,)
        if not sizes or not all(_is_count(size, 1) for size in sizes):
            raise _wrong("launch", f"must be {', '.join(LAUNCHES)}, or sizes of waves from 1 on", launch)

    def _check_calibrated_for(self) -> None:
        if self.cutoff is None:
            if self.calibrated_for is not None:
                raise _wrong("calibrated_for", "goes with a cutoff only", self.calibrated_for)
            return
        if self.calibrated_for is None:
            raise _wrong(
                "calibrated_for",
                "a cutoff holds for one number of branches; give the one that it was calibrated for",
                self.calibrated_for,
            )
        if not _is_count(self.calibrated_for, 1):
            raise _wrong("calibrated_for", "must be a whole number from 1 on", self.calibrated_for)

    def _check_of_policy(self, name: str, policies: tuple[str, ...]) -> None:
        if getattr(self, name) is not None and self.policy not in policies:
            raise _wrong(name, f"goes with {' or '.join(policies)} only, not with {self.policy!r}", getattr(self, name))

    @property
    def launched(self) -> str | tuple[int, ...]:
        """``all``, ``fewest`` or the sizes of waves."""
        if self.launch is None:
            if self.policy == "window":
                return (self.window_size,)
            return "fewest" if self.policy in ("certain", "probable") else "all"
        return (self.launch,) if isinstance(self.launch, int) else self.launch

    @property
    def window_size(self) -> int:
        """Branches of ``window``, tokens of ``confidence``."""
        return self.window if self.window is not None else _DEFAULT_WINDOW.get(str(self.policy), 1)

    def policy_for(self, branches: int) -> Policy:
        """The policy for a fork of this many branches.

        Raises:
            OptionError: it cannot decide so many.
        """
        if callable(self.policy):
            return self.policy
        if self.policy == "window":
            return Window(self.window_size)
        if self.policy == "confidence":
            assert self.threshold is not None
            return GroupConfidence(self.threshold)
        if self.policy == "certain":
            return Certain()
        if self.cutoff is not None and branches != self.calibrated_for:
            raise OptionError(
                f"{_KEY}.cutoff: was calibrated for {self.calibrated_for} branches, and this fork has {branches}; "
                "calibrate one for it, or leave the cutoff out for the exact bound"
            )
        risk = _DEFAULT_RISK if self.risk is None else self.risk
        try:
            return Probable(
                boundary(branches, risk) if self.cutoff is None else calibrated_boundary(branches, risk, self.cutoff)
            )
        except OptionError as error:
            raise OptionError(f"{_KEY}.policy: {error}") from error

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON values, those that are not the default.

        Raises:
            OptionError: ``policy`` or ``extract`` is a callable, which cannot travel.
        """
        for name in ("policy", "extract"):
            if callable(getattr(self, name)):
                raise _wrong(name, "a callable cannot be sent to a server; give a name", getattr(self, name))
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if name == "policy" or value != type(self).__dataclass_fields__[name].default
        }

    @classmethod
    def from_mapping(cls, mapping: Any) -> EarlyStop:
        """Of what came over HTTP: a mapping, or the name of a policy alone.

        Raises:
            OptionError: it is something else, has a key that there is not, or a wrong value.
        """
        if isinstance(mapping, str):
            return cls(mapping)
        if not isinstance(mapping, Mapping):
            raise OptionError(f"{_KEY}: must be a policy's name or an object, got {type(mapping).__name__}")
        known = [one.name for one in fields(cls)]
        for name, value in mapping.items():
            if name not in known:
                raise OptionError(f"{_KEY}.{name}: unknown; there are {', '.join(known)}")
            if callable(value):
                raise _wrong(name, "must be a plain value", value)
        return cls(**mapping)


def _wrong(name: str, what: str, value: Any) -> OptionError:
    return OptionError(f"{_KEY}.{name}: {what}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
