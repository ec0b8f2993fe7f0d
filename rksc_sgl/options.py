"""What a request may ask of us under ``custom_params["rksc"]``, and the check of it.

The same check runs in the client (before a request is sent) and in the server (at admission, where a violation
answers 400), so that both name the same key in the same words. SGLang carries ``custom_params`` from any
client to the scheduler; values are scalars.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from rksc_sgl.errors import OptionError

KEY = "rksc"
CONFIDENCE = "rksc_confidence"  # of each token, in meta_info
SHARE_MODES = ("auto", "exact", "blend", "merge")
SHARE_SCOPES = ("group", "cache")
OPERATIONS = ("branch", "verify")
EXITS = ("certified", "published", "off")
Scope: TypeAlias = Literal["verdict", "selection"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
DEFAULT_THETA, DEFAULT_EPS = 8.0, 3.0  # nats; arXiv 2606.09937
DEFAULT_MINIMUM_SPAN, DEFAULT_RECOMPUTE, DEFAULT_DEVIATION = 16, 0.1, 0.0
DEFAULT_TAU = 0.75
MAX_LABEL_IDS = 64
MAX_TRACE_LAYERS = 64
MAX_GROUP_LENGTH = 128
MAX_BRANCHES = 4096
MAX_SHOWN = 120  # characters of a wrong value that a message repeats


@dataclass(frozen=True)
class RequestOptions:
    """Options of one request.

    Attributes:
        group: identifier of the fork that this branch belongs to; None for a request on its own.
        root: of a fork that was made of a fork's branch: the group of the first one, whose data-parallel rank it takes.
        branch: index of this branch in its fork, from 0.
        branches: number of branches in the fork.
        share: how the branch may reuse KV of its siblings. ``exact`` only ever reuses the KV of identical prefixes;
            ``blend`` also takes over the KV of tokens that a sibling has at other places, which is approximate;
            ``merge`` replaces the branch's prompt by a sibling's that asks the same in other words; ``auto`` takes
            what changes no answer: identical prefixes.
        allow_merge: whether ``auto`` and ``blend`` may merge too; a blend is what cannot be merged.
        tau: with merges: the least similarity of hidden states, from -1 to 1, beside what the content guard demands.
        share_scope: whose KV a blend or merge may take: the ``group``'s, or any prompt's of the same namespace that is
            in the ``cache``.
        minimum_span: with blends: the shortest run of equal tokens that is taken over.
        recompute: with blends: the largest share of the tokens that could be taken over and are computed all the same,
            because their state moved and the prompt's end attends to them. The few that follow a change always are, and
            count in it.
        deviation: with blends: how far a token's values must be from the donor's, relative to these, to have moved.
        confidence: whether ``meta_info["rksc_confidence"]`` has, for each generated token, the probability of the most
            likely one, as ``top_logprobs_num=1`` would say it; with op ``branch``.
        op: ``branch`` for generation, ``verify`` for the verification of a branch.
        exit: of a verification: ``certified`` stops at an intermediate layer where the server's profile allows it;
            ``published`` follows the published entropy rule, which is certified by nothing; ``off`` never stops.
        risk: with ``certified``: the largest share of changed verdicts; None takes the server's.
        scope: with ``certified``: risk of what: a changed ``verdict``, or that or a changed ``selection`` by score.
        yes_ids: tokens that say the first label, as they are in ``token_ids_logprob``.
        no_ids: tokens that say any other label.
        theta: with ``published``: the entropy below which to stop, nats.
        eps: with ``published``: how little the entropy must have moved, nats.
        trace: layers whose last hidden state is reported; for calibration, on servers that allow it.
    """

    group: str | None = None
    root: str | None = None
    branch: int = 0
    branches: int = 1
    share: str = "auto"
    allow_merge: bool = False
    tau: float = DEFAULT_TAU
    share_scope: str = "group"
    minimum_span: int = DEFAULT_MINIMUM_SPAN
    recompute: float = DEFAULT_RECOMPUTE
    deviation: float = DEFAULT_DEVIATION
    confidence: bool = False
    op: str = "branch"
    exit: str = "certified"
    risk: float | None = None
    scope: str = "verdict"
    yes_ids: tuple[int, ...] = ()
    no_ids: tuple[int, ...] = ()
    theta: float = DEFAULT_THETA
    eps: float = DEFAULT_EPS
    trace: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for key, value in (("group", self.group), ("root", self.root)):
            if value is not None:
                _check_type(key, value, str, "a string")
                if not 0 < len(value) <= MAX_GROUP_LENGTH:
                    raise OptionError(f"{KEY}.{key}: must have 1 to {MAX_GROUP_LENGTH} characters, got {len(value)}")
        _check_type("branches", self.branches, int, "an integer")
        if not 1 <= self.branches <= MAX_BRANCHES:
            raise OptionError(f"{KEY}.branches: must be 1 to {MAX_BRANCHES}, got {self.branches}")
        _check_type("branch", self.branch, int, "an integer")
        if not 0 <= self.branch < self.branches:
            raise OptionError(f"{KEY}.branch: must be 0 to branches - 1 = {self.branches - 1}, got {self.branch}")
        self._check_sharing()
        _check_choice("op", self.op, OPERATIONS)
        _check_type("confidence", self.confidence, bool, "true or false")
        if self.confidence and self.op != "branch":
            raise OptionError(f"{KEY}.confidence: is for op branch only, and this is op {self.op}")
        self._check_exit()

    @property
    def blends(self) -> bool:
        """Whether KV of a donor's equal tokens may be taken over."""
        return self.share == "blend"

    @property
    def merges(self) -> bool:
        """Whether the prompt may be replaced by another that asks the same."""
        return self.share == "merge" or self.allow_merge

    def _check_sharing(self) -> None:
        _check_choice("share", self.share, SHARE_MODES)
        _check_choice("share_scope", self.share_scope, SHARE_SCOPES)
        _check_type("allow_merge", self.allow_merge, bool, "true or false")
        if self.allow_merge and self.share == "exact":
            raise OptionError(f"{KEY}.allow_merge: is for share auto or blend, and this is share {self.share}")
        if self.share_scope == "cache" and self.share == "exact":
            raise OptionError(f"{KEY}.share_scope: is for blends and merges; exact reuse always sees the whole cache")
        _check_number("tau", self.tau)
        if not -1.0 <= self.tau <= 1.0:
            raise OptionError(f"{KEY}.tau: must be from -1 to 1, got {self.tau}")
        _check_type("minimum_span", self.minimum_span, int, "an integer")
        if self.minimum_span < 1:
            raise OptionError(f"{KEY}.minimum_span: must be at least 1, got {self.minimum_span}")
        for key in ("recompute", "deviation"):
            _check_number(key, getattr(self, key))
            if getattr(self, key) < 0.0 or (key == "recompute" and self.recompute > 1.0):
                raise OptionError(f"{KEY}.{key}: must be from 0 on, recompute at most 1, got {getattr(self, key)}")

    def _check_exit(self) -> None:
        _check_choice("exit", self.exit, EXITS)
        _check_choice("scope", self.scope, SCOPES)
        if self.risk is not None:
            _check_number("risk", self.risk)
            if not 0.0 < self.risk < 1.0:
                raise OptionError(f"{KEY}.risk: must be above 0 and below 1, got {self.risk}")
        for key in ("theta", "eps"):
            _check_number(key, getattr(self, key))
        for key, most in (("yes_ids", MAX_LABEL_IDS), ("no_ids", MAX_LABEL_IDS), ("trace", MAX_TRACE_LAYERS)):
            object.__setattr__(self, key, _integers(key, getattr(self, key), most))
        both = set(self.yes_ids) & set(self.no_ids)
        if both:
            raise OptionError(f"{KEY}.yes_ids: must share no token with no_ids, got {shown(sorted(both))} in both")
        if self.exit == "published" and not (self.yes_ids and self.no_ids):
            raise OptionError(f"{KEY}.yes_ids: exit published needs yes_ids and no_ids, the tokens of the labels")
        if self.op != "verify":
            for key in ("exit", "risk", "scope", "yes_ids", "no_ids", "theta", "eps", "trace"):
                if getattr(self, key) != getattr(type(self), key):
                    raise OptionError(f"{KEY}.{key}: is for op verify only, and this is op {self.op}")

    @classmethod
    def from_mapping(cls, values: Any) -> RequestOptions:
        """Parse the value under ``custom_params["rksc"]``.

        Raises:
            OptionError: naming the key that is unknown, of the wrong type or out of range.
        """
        if not isinstance(values, Mapping):
            raise OptionError(f"{KEY}: must be an object of options, got {type(values).__name__}")
        known = [field.name for field in fields(cls)]
        for key in map(str, values):
            if key not in known:
                raise OptionError(f"{KEY}.{key[:MAX_SHOWN]}: unknown option; the options are {', '.join(known)}")
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """The options that differ from their defaults, as sent in ``custom_params["rksc"]``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            field.name: list(values[field.name]) if isinstance(values[field.name], tuple) else values[field.name]
            for field in fields(self)
            if values[field.name] != field.default
        }


def options_of(custom_params: Any) -> RequestOptions | None:
    """The options in a request's ``custom_params``, or None where it did not opt in.

    Raises:
        OptionError: the request opted in with options that are not valid.
    """
    if not isinstance(custom_params, Mapping) or KEY not in custom_params:
        return None
    return RequestOptions.from_mapping(custom_params[KEY])


def shown(value: Any) -> str:
    """A value as it is shown in a message, however long it is."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}… ({len(text)} characters)"


def _check_type(key: str, value: Any, expected: type, name: str) -> None:
    # bool is an int to Python, not to a caller
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise OptionError(f"{KEY}.{key}: must be {name}, got {shown(value)}")


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{KEY}.{key}: must be one of {', '.join(choices)}, got {shown(value)}")


def _check_number(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise OptionError(f"{KEY}.{key}: must be a finite number, got {shown(value)}")


def _integers(key: str, values: Any, most: int) -> tuple[int, ...]:
    right = isinstance(values, (list, tuple)) and all(type(value) is int and value >= 0 for value in values)
    if not right or len(values) > most:
        raise OptionError(f"{KEY}.{key}: must be a list of at most {most} integers from 0 on, got {shown(values)}")
    return tuple(values)
