"""What a request may ask of its fork, what a server allows, and the checks of both."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from rksc_sgl.answers import extractor_of
from rksc_sgl.deciding import EarlyStop
from rksc_sgl.errors import OptionError
from rksc_sgl.options import KEY, MAX_BRANCHES, SHARE_MODES, RequestOptions, shown
from rksc_sgl.verifying.labels import check_labels
from rksc_sgl.verifying.select import NAMES

HEADER = "x-rksc-fork"
FORK_VARIABLE = "RKSC_FORK"
RETURNS = ("best", "all")
_NEEDS_SCORES = ("score", "weighted_majority")


@dataclass(frozen=True)
class Verification:
    """How branches are verified; see :func:`rksc_sgl.verify_gated`.

    Attributes:
        question: asked as the user's next turn; ``{labels}`` becomes the labels. None takes the default question.
        labels: what the model may reply, the affirmative one first.
        exit, risk, scope: early exit at an intermediate layer.
    """

    question: str | None = None
    labels: tuple[str, ...] = ("YES", "NO")
    exit: str = "certified"
    risk: float | None = None
    scope: str = "selection"

    def __post_init__(self) -> None:
        if self.question is not None and (not isinstance(self.question, str) or not self.question.strip()):
            raise OptionError(f"{KEY}.verify.question: must be a text, got {shown(self.question)}")
        try:
            check_labels(self.labels)
        except OptionError as error:
            raise OptionError(f"{KEY}.verify.{error}") from error
        object.__setattr__(self, "labels", tuple(self.labels))
        try:
            self.as_request()
        except OptionError as error:
            raise OptionError(str(error).replace(f"{KEY}.", f"{KEY}.verify.", 1)) from error

    def as_request(self) -> RequestOptions:
        """The options of a verification, with labels that stand for any."""
        return RequestOptions(op="verify", exit=self.exit, risk=self.risk, scope=self.scope, yes_ids=(0,), no_ids=(1,))


@dataclass(frozen=True)
class ForkOptions:
    """What is asked of a fork.

    Attributes:
        branches: how many; or a list of wordings of the last user message, a branch for each.
        share: what branches may reuse of each other's KV (``docs/sharing.md``).
        select: which branch is taken (:func:`rksc_sgl.verify_gated`): ``vote``, ``score``, ``weighted_majority``,
            ``majority``.
        verify: how branches are verified where the selection needs it: an object (:class:`Verification`), a question,
            or false for never: then confidence stands in for scores.
        early_stop: when the fork may stop: a policy's name or an object (:class:`rksc_sgl.EarlyStop`), or false.
        extract: the answer in a text: ``answer``, ``text``, ``json``, ``json:FIELD``. None takes ``json`` where the
            request asks for JSON, and else ``answer``.
        returned: ``return`` in JSON: the ``best`` (``n`` choices), or ``all`` that finished, the best first.
        deadline_s: seconds after which the best so far is returned; None takes the server's limit.
    """

    branches: int | tuple[str, ...] = 8
    share: str = "auto"
    select: str = "vote"
    verify: Verification | None = field(default_factory=Verification)
    early_stop: EarlyStop | None = field(default_factory=EarlyStop)
    extract: str | None = None
    returned: str = "best"
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "branches", _branches(self.branches))
        for name, value, choices in (
            ("share", self.share, SHARE_MODES),
            ("select", self.select, NAMES),
            ("return", self.returned, RETURNS),
        ):
            if not isinstance(value, str) or value not in choices:
                raise OptionError(f"{KEY}.{name}: must be one of {', '.join(choices)}, got {shown(value)}")
        if self.verify is None and self.select in _NEEDS_SCORES:
            raise OptionError(f"{KEY}.verify: select {self.select} needs the scores of verification, and it is off")
        if self.extract is not None:
            if not isinstance(self.extract, str):
                raise OptionError(f"{KEY}.extract: must be a string, got {shown(self.extract)}")
            try:
                extractor_of(self.extract)
            except OptionError as error:
                raise OptionError(f"{KEY}.{error}") from error
        if self.deadline_s is not None and not _is_positive(self.deadline_s):
            raise OptionError(f"{KEY}.deadline_s: must be a number of seconds above 0, got {shown(self.deadline_s)}")

    @property
    def count(self) -> int:
        """How many branches there are."""
        return self.branches if isinstance(self.branches, int) else len(self.branches)

    @property
    def wordings(self) -> tuple[str, ...] | None:
        """Wordings of the last user message, one a branch; None where all have the client's."""
        return None if isinstance(self.branches, int) else self.branches

    @classmethod
    def from_mapping(cls, values: Any) -> ForkOptions:
        """Of what came over HTTP.

        Raises:
            OptionError: naming the key that is unknown, of the wrong type or out of range.
        """
        known = {"return" if one.name == "returned" else one.name: one.name for one in fields(cls)}
        _check_keys(KEY, values, known)
        given = {known[name]: value for name, value in values.items() if value is not None or name in _NULL_SAYS}
        if "verify" in given:
            given["verify"] = _verification(given["verify"])
        if "early_stop" in given:
            given["early_stop"] = _early_stop(given["early_stop"])
        if isinstance(given.get("branches"), list):
            given["branches"] = tuple(given["branches"])
        return cls(**given)


@dataclass(frozen=True)
class ForkLimits:
    """What a server allows; each HTTP worker process by itself.

    Attributes:
        branches: of one fork.
        tokens: of one fork, the prompt once and all that its branches may generate. A request that names no number
            of tokens gets at most its share of it.
        forks: at once.
        deadline_s: of one fork, seconds.
    """

    branches: int = 64
    tokens: int = 262_144
    forks: int = 256
    deadline_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("branches", "tokens", "forks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"limits.{name}: must be a whole number from 1 on, got {shown(value)}")
        if self.branches > MAX_BRANCHES:
            raise OptionError(f"limits.branches: must be at most {MAX_BRANCHES}, got {self.branches}")
        if not _is_positive(self.deadline_s):
            raise OptionError(f"limits.deadline_s: must be a number of seconds above 0, got {shown(self.deadline_s)}")


@dataclass(frozen=True)
class ForkSettings:
    """A server's defaults and limits: ``rksc serve --rksc-fork '{"branches": 4, "limits": {"forks": 32}}'``.

    Attributes:
        defaults: keys and values as a request may give them.
        limits: under the key ``limits``.
        v1: whether SGLang's own ``/v1/chat/completions`` and ``/v1/completions`` answer with a fork where a request
            says nothing of one. Those that ask for a fork get one there in any case.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    limits: ForkLimits = field(default_factory=ForkLimits)
    v1: bool = False

    @classmethod
    def from_json(cls, text: str) -> ForkSettings:
        """
        Raises:
            OptionError: it is no JSON object, or a key or value is of no use; the message names it.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise OptionError(f"must be a JSON object, got {shown(text)}: {error}") from error
        if not isinstance(values, dict):
            raise OptionError(f"must be a JSON object, got {shown(text)}")
        limits, v1 = values.pop("limits", {}), values.pop("v1", False)
        _check_keys("limits", limits, {one.name for one in fields(ForkLimits)})
        if not isinstance(v1, bool):
            raise OptionError(f"v1: must be true or false, got {shown(v1)}")
        settings = cls(values, ForkLimits(**limits), v1)
        settings.options()
        return settings

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> ForkSettings:
        """What ``rksc serve`` handed to this process.

        Raises:
            OptionError: as :meth:`from_json`.
        """
        return cls.from_json(environment.get(FORK_VARIABLE) or "{}")

    def options(self, *layers: Any, choices: int = 1) -> ForkOptions:
        """What a request asks for, checked against the limits.

        Args:
            layers: objects of keys and values, later ones first; None for one that was not given.
            choices: ``n`` of the request.

        Raises:
            OptionError: naming the key.
        """
        merged: dict[str, Any] = dict(self.defaults)
        for layer in layers:
            if layer is not None:
                _check_keys(KEY, layer, None)
                merged.update(layer)
        asked = ForkOptions.from_mapping(merged)
        if asked.count > self.limits.branches:
            raise OptionError(
                f"{KEY}.branches: must be at most {self.limits.branches} on this server, got {asked.count}"
            )
        if asked.deadline_s is not None and asked.deadline_s > self.limits.deadline_s:
            raise OptionError(
                f"{KEY}.deadline_s: must be at most {self.limits.deadline_s:g} on this server, got {asked.deadline_s:g}"
            )
        return self._with_choices(asked, choices, any("early_stop" in layer for layer in layers if layer))

    def to_plain(self) -> dict[str, Any]:
        """As plain values, for ``GET /rksc/info``."""
        return {"defaults": dict(self.defaults), "limits": asdict(self.limits), "v1": self.v1}

    def deadline_s(self, options: ForkOptions) -> float:
        """Seconds that a fork may take."""
        return self.limits.deadline_s if options.deadline_s is None else options.deadline_s

    @staticmethod
    def _with_choices(asked: ForkOptions, choices: int, stop_was_asked_for: bool) -> ForkOptions:
        """Several choices need as many branches that finish."""
        if choices > asked.count:
            raise OptionError(f"n: must be at most {KEY}.branches, which is {asked.count}, got {choices}")
        if (choices > 1 or asked.returned == "all") and asked.early_stop is not None and not stop_was_asked_for:
            return replace(asked, early_stop=None)
        if choices > 1 and asked.early_stop is not None:
            raise OptionError(
                f"{KEY}.early_stop: must be false where n is {choices}: a branch that is stopped is no choice to return"
            )
        return asked


_NULL_SAYS = ("verify", "early_stop")  # null means off there, and nothing elsewhere


def _branches(value: Any) -> int | tuple[str, ...]:
    if isinstance(value, tuple):
        if not value or not all(isinstance(one, str) and one.strip() for one in value):
            raise OptionError(f"{KEY}.branches: must be a number or a list of texts, got {shown(list(value))}")
        count = len(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        count = value
    else:
        raise OptionError(f"{KEY}.branches: must be a number or a list of texts, got {shown(value)}")
    if not 1 <= count <= MAX_BRANCHES:
        raise OptionError(f"{KEY}.branches: must be 1 to {MAX_BRANCHES}, got {count}")
    return value


def _verification(value: Any) -> Verification | None:
    if value is None or value is False:
        return None
    if value is True:
        return Verification()
    if isinstance(value, str):
        return Verification(question=value)
    if not isinstance(value, Mapping):
        raise OptionError(f"{KEY}.verify: must be an object, a question, true or false, got {shown(value)}")
    _check_keys(f"{KEY}.verify", value, {one.name for one in fields(Verification)})
    return Verification(**value)


def _early_stop(value: Any) -> EarlyStop | None:
    if value is None or value is False:
        return None
    if value is True:
        return EarlyStop()
    for name, instead in (("variable", "the fork has one text"), ("extract", f"say {KEY}.extract")):
        if isinstance(value, Mapping) and name in value:
            raise OptionError(f"{KEY}.early_stop.{name}: is not of a request's fork; {instead}")
    try:
        return EarlyStop.from_mapping(value)
    except OptionError as error:
        raise OptionError(f"{KEY}.{error}") from error


def _check_keys(of: str, values: Any, known: Any) -> None:
    if not isinstance(values, Mapping):
        raise OptionError(f"{of}: must be an object, got {shown(values)}")
    for name in values:
        if known is not None and name not in known:
            raise OptionError(f"{of}.{shown(name)[1:-1]}: unknown; there are {', '.join(known)}")


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
