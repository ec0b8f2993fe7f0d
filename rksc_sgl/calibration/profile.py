"""A profile: read-outs, certified points and what they are valid for, in one JSON file that says when it is damaged.

The file is ``{"format", "version", "sha256", "body"}``; the checksum is that of the body in canonical form (sorted
keys, no spaces, UTF-8). Weights are base64 of little-endian float32, so that a profile comes back bit for bit.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from rksc_sgl.calibration.atomic_write import write_atomically
from rksc_sgl.calibration.fingerprint import Fingerprint, checksum, fingerprint_of_prompt
from rksc_sgl.calibration.thresholds import CertifiedPoint, CurvePoint, SkipPoint
from rksc_sgl.early_exit.readout import LinearReadout
from rksc_sgl.errors import OptionError, ProfileError
from rksc_sgl.options import SCOPES, Scope

FORMAT = "rksc-profile"
VERSION = 2

Row = TypeVar("Row", CertifiedPoint, SkipPoint, CurvePoint)


@dataclass(frozen=True)
class Profile:
    """What ``rksc calibrate`` found for one model and one verification prompt.

    Attributes:
        fingerprint: the model as it was served.
        question_ids: tokens with which a verification's prompt ends: the question, in the model's chat format.
        yes_ids: tokens that say the first label.
        no_ids: tokens that say another.
        layers: how many the model has.
        readouts: by layer (how many had run), each with the scale of its error; all of one hidden size.
        points: certified exit rules.
        alpha: 1 - confidence of each of the certificates.
        skip_points: certified skip rules.
        curve: risk against cost as measured, certified or not.
        workload: what was calibrated on, for people.
        created: ISO date.
    """

    fingerprint: Fingerprint
    question_ids: tuple[int, ...]
    yes_ids: tuple[int, ...]
    no_ids: tuple[int, ...]
    layers: int
    readouts: Mapping[int, LinearReadout]
    points: tuple[CertifiedPoint, ...]
    alpha: float
    skip_points: tuple[SkipPoint, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    workload: str = ""
    created: str = field(default_factory=lambda: date.today().isoformat())

    def __post_init__(self) -> None:
        for name in _IDS:
            if not getattr(self, name):
                raise ProfileError(f"{name}: must hold at least one token")
        if self.layers < 1:
            raise ProfileError(f"layers: must be at least 1, got {self.layers!r}")
        _check_readouts(self.readouts, self.layers)
        _check_open_share("alpha", self.alpha)
        _check_points(self)
        _check_date(self.created)

    def point_for(self, risk: float, scope: Scope = "verdict") -> CertifiedPoint:
        """The exit rule with the largest certified risk that is at most ``risk``; of a scope.

        Raises:
            OptionError: the risk is not a number from 0 to 1.
            ProfileError: nothing is certified at this risk; the message says which risks are.
        """
        chosen = [point for point in self.points if point.scope == scope]
        return _largest(chosen, risk, f"an exit rule for the {scope}")

    def skip_point_for(self, risk: float) -> SkipPoint:
        """The skip rule with the largest certified risk that is at most ``risk``.

        Raises:
            OptionError, ProfileError: as :meth:`point_for`.
        """
        return _largest(self.skip_points, risk, "a skip rule")

    @property
    def prompt_fingerprint(self) -> str:
        """Of :func:`fingerprint_of_prompt`."""
        return fingerprint_of_prompt(self.question_ids, self.yes_ids, self.no_ids)

    def covers(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt ends with the question that this profile was made for."""
        tail = len(self.question_ids)
        return len(prompt_ids) > tail and tuple(prompt_ids[-tail:]) == self.question_ids

    @property
    def file_name(self) -> str:
        """Its name in a directory of profiles: one for each way to serve a model, and prompt."""
        return f"profile-{checksum([asdict(self.fingerprint), self.prompt_fingerprint])[:32]}.json"

    def save(self, path: str | Path) -> None:
        """Write the file; it appears complete or not at all, and replaces an older one in one step.

        Raises:
            ProfileError: it could not be written.
        """
        target = Path(path)
        body = _body_of(self)
        document = {"format": FORMAT, "version": VERSION, "sha256": checksum(body), "body": body}
        text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, text.encode())
        except OSError as error:
            raise ProfileError(f"{target}: could not be written: {error}") from error


def load(path: str | Path) -> Profile:
    """Read a profile.

    Raises:
        ProfileError: it is not there, truncated, damaged, of another version, or a field is wrong; the message names
            the file, the field and what would be right.
    """
    try:
        return _profile_of(_document(Path(path)))
    except (ProfileError, OptionError) as error:
        raise ProfileError(f"{path}: {error}") from error


def _body_of(profile: Profile) -> dict[str, Any]:
    body: dict[str, Any] = {name: getattr(profile, name) for name in _PLAIN}
    body.update({name: list(getattr(profile, name)) for name in _IDS})
    body["fingerprint"] = asdict(profile.fingerprint)
    body["readouts"] = [
        {
            "layer": layer,
            "weight": base64.b64encode(readout.weight.astype("<f4").tobytes()).decode(),
            "bias": readout.bias,
            "scale": readout.scale,
        }
        for layer, readout in sorted(profile.readouts.items())
    ]
    for name in _ROWS:
        body[name] = [asdict(row) for row in getattr(profile, name)]
    return body


def _document(path: Path) -> dict[str, Any]:
    """The body, after everything that can be said of the file as a whole."""
    try:
        document = json.loads(path.read_bytes().decode(), parse_constant=_refuse_constant)
    except OSError as error:
        raise ProfileError(f"could not be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"truncated or damaged: {error}; make a new one with `rksc calibrate`") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ProfileError(f'format: must be an object with "format": "{FORMAT}"; this is no profile')
    version = _of_type(document, "version", int)
    if version > VERSION:
        raise ProfileError(f"version: {version} is newer than {VERSION}, which is what can be read; update rksc-sgl")
    if version < VERSION:
        raise ProfileError(
            f"version: {version} is older than {VERSION}, which is what can be read; make a new profile with "
            "`rksc calibrate`"
        )
    body = _of_type(document, "body", dict)
    try:
        whole = _of_type(document, "sha256", str) == checksum(body)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"body: damaged: {error}; make a new one with `rksc calibrate`") from error
    if not whole:
        raise ProfileError("sha256: does not fit the body: damaged or edited; make a new one with `rksc calibrate`")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _profile_of(body: dict[str, Any]) -> Profile:
    plain: dict[str, Any] = {name: _of_type(body, name, kind) for name, kind in _PLAIN.items()}
    plain.update({name: _token_ids(body, name) for name in _IDS})
    rows: dict[str, Any] = {
        name: tuple(_row(entry, name, kind) for entry in _of_type(body, name, list)) for name, kind in _ROWS.items()
    }
    readouts: dict[int, LinearReadout] = {}
    for entry in _of_type(body, "readouts", list):
        layer, readout = _readout(entry)
        if layer in readouts:
            raise ProfileError(f"readouts: layer {layer} is there twice")
        readouts[layer] = readout
    fingerprint = Fingerprint.from_mapping(_of_type(body, "fingerprint", dict))
    return Profile(fingerprint=fingerprint, readouts=readouts, **plain, **rows)


def _readout(entry: Any) -> tuple[int, LinearReadout]:
    encoded = _of_type(entry, "weight", str, "readouts.")
    try:
        weight = np.frombuffer(base64.b64decode(encoded, validate=True), dtype="<f4").astype(np.float32)
    except (binascii.Error, ValueError) as error:
        raise ProfileError(f"readouts.weight: must be base64 of float32 numbers: {error}") from error
    bias, scale = (_of_type(entry, name, float, "readouts.") for name in ("bias", "scale"))
    return _of_type(entry, "layer", int, "readouts."), LinearReadout(weight, bias, scale)


def _token_ids(body: dict[str, Any], name: str) -> tuple[int, ...]:
    values = _of_type(body, name, list)
    if not all(type(value) is int and value >= 0 for value in values):
        raise ProfileError(f"{name}: must be integers from 0 on")
    return tuple(values)


def _row(entry: Any, name: str, kind: type[Row]) -> Row:
    return kind(**{item.name: _of_type(entry, item.name, _TYPES[str(item.type)], f"{name}.") for item in fields(kind)})


def _of_type(values: Any, key: str, kind: type, prefix: str = "") -> Any:
    if not isinstance(values, dict):
        raise ProfileError(f"{prefix or 'body'}: must hold objects, got {type(values).__name__}")
    if key not in values:
        raise ProfileError(f"{prefix}{key}: is missing; must be {_NAMES[kind]}")
    value: Any = values[key]
    right: Any = (int, float) if kind is float else kind
    # bool is an int to Python, not to a reader
    if not isinstance(value, right) or (isinstance(value, bool) and kind is not bool):
        raise ProfileError(f"{prefix}{key}: must be {_NAMES[kind]}, got {type(value).__name__}")
    if kind is not float:
        return value
    if not abs(value) <= 1e300:
        raise ProfileError(f"{prefix}{key}: must be a finite number")
    return float(value)


_NAMES: dict[type, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
_TYPES: dict[str, type] = {"int": int, "float": float, "Scope": str}
_PLAIN: dict[str, type] = {
    "layers": int,
    "alpha": float,
    "workload": str,
    "created": str,
}
_IDS = ("question_ids", "yes_ids", "no_ids")
_ROWS: dict[str, type] = {"points": CertifiedPoint, "skip_points": SkipPoint, "curve": CurvePoint}


def _largest(points: Sequence[Any], risk: float, what: str) -> Any:
    if isinstance(risk, bool) or not isinstance(risk, (int, float)) or not 0.0 <= risk <= 1.0:
        raise OptionError(f"risk: must be a number from 0 to 1, got {risk!r}")
    allowed = [point for point in points if point.risk <= risk]
    if not allowed:
        possible = ", ".join(f"{one:g}" for one in sorted({point.risk for point in points}))
        can = f"it can certify {possible}" if possible else "it certifies none"
        raise ProfileError(f"risk: {what} at {risk:g} is not certified by this profile; {can}")
    return max(allowed, key=lambda point: point.risk)


def _check_readouts(readouts: Mapping[int, LinearReadout], layers: int) -> None:
    for layer in readouts:
        if not 1 <= layer < layers:
            raise ProfileError(f"readouts.layer: must be 1 to layers - 1 = {layers - 1}, got {layer!r}")
    sizes = {readout.weight.size for readout in readouts.values()}
    if len(sizes) > 1 or 0 in sizes:
        raise ProfileError(f"readouts.weight: must all be of one hidden size above 0, got {sorted(sizes)}")


def _check_points(profile: Profile) -> None:
    for name in _ROWS:
        for row in getattr(profile, name):
            for key, value in asdict(row).items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise ProfileError(f"{name}.{key}: must be finite, got {value!r}")
    for point in profile.points:
        _check_open_share("points.risk", point.risk)
        if point.t < 0.0:
            raise ProfileError(f"points.t: must be at least 0, got {point.t!r}")
        if point.scope not in SCOPES:
            raise ProfileError(f"points.scope: must be one of {', '.join(SCOPES)}, got {point.scope!r}")
    for skip in profile.skip_points:
        _check_open_share("skip_points.risk", skip.risk)
        if not 0.0 <= skip.agreement <= 1.0:
            raise ProfileError(f"skip_points.agreement: must be between 0 and 1, got {skip.agreement!r}")
    named = [("points", [point.risk for point in profile.points if point.scope == scope]) for scope in SCOPES]
    for name, risks in [*named, ("skip_points", [point.risk for point in profile.skip_points])]:
        if len(set(risks)) < len(risks):
            raise ProfileError(f"{name}.risk: must differ from each other, got {sorted(risks)}")


def _check_open_share(name: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise ProfileError(f"{name}: must be above 0 and below 1, got {value!r}")


def _check_date(created: str) -> None:
    try:
        date.fromisoformat(created)
    except ValueError as error:
        raise ProfileError(f"created: must be an ISO date such as 2026-01-31, got {created!r}") from error
