"""A profile: read-outs, certified points and what they are valid for, in one JSON file that says when it is damaged.

The file is ``{"format", "version", "sha256", "body"}``; the checksum is that of the body in canonical form (sorted
keys, no spaces, UTF-8). Weights are base64 of little-endian float32, so that a profile comes back bit for bit.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from rksc_sgl.calibration.atomic_write import write_atomically
from rksc_sgl.calibration.readout import LinearReadout
from rksc_sgl.calibration.thresholds import SCOPES, CertifiedPoint, CurvePoint, Scope, SkipPoint
from rksc_sgl.errors import OptionError, ProfileError

FORMAT = "rksc-profile"
VERSION = 1
_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of each weights file, evenly spaced
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format

Row = TypeVar("Row", CertifiedPoint, SkipPoint, CurvePoint)


@dataclass(frozen=True)
class Profile:
    """What ``rksc calibrate`` found for one model and one verification prompt.

    Attributes:
        model_fingerprint: of :func:`fingerprint_of_model`.
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
        version: of the file's form.
    """

    model_fingerprint: str
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
    version: int = VERSION

    def __post_init__(self) -> None:
        if not self.model_fingerprint:
            raise ProfileError("model_fingerprint: must not be empty")
        for name in _IDS:
            if not getattr(self, name):
                raise ProfileError(f"{name}: must hold at least one token")
        if self.version != VERSION:
            raise ProfileError(f"version: must be {VERSION}, got {self.version!r}")
        if self.layers < 1:
            raise ProfileError(f"layers: must be at least 1, got {self.layers!r}")
        _check_readouts(self.readouts, self.layers)
        _check_open_share("alpha", self.alpha)
        _check_points(self)
        _check_date(self.created)

    def point_for(self, risk: float, scope: Scope = "verdict") -> CertifiedPoint:
        """The exit rule with the largest certified delta that is at most ``risk``; of a scope.

        Raises:
            OptionError: the risk is not a number from 0 to 1.
            ProfileError: nothing is certified at this risk; the message says which risks are.
        """
        chosen = [point for point in self.points if point.scope == scope]
        return _largest(chosen, risk, f"an exit rule for the {scope}")

    def skip_point_for(self, risk: float) -> SkipPoint:
        """The skip rule with the largest certified delta that is at most ``risk``.

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
        """Its name in a directory of profiles: one for each model and prompt."""
        return _file_name(self.model_fingerprint, self.prompt_fingerprint)

    def save(self, path: str | Path) -> None:
        """Write the file; it appears complete or not at all, and replaces an older one in one step.

        Raises:
            ProfileError: it could not be written.
        """
        target = Path(path)
        body = _body_of(self)
        document = {"format": FORMAT, "version": self.version, "sha256": _checksum(body), "body": body}
        text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, text.encode())
        except OSError as error:
            raise ProfileError(f"{target}: could not be written: {error}") from error


def load(path: str | Path) -> Profile:
    """Read a profile.

    Raises:
        ProfileError: it is not there, truncated, damaged, of a newer version, or a field is wrong; the message names
            the file, the field and what would be right.
    """
    try:
        return _profile_of(_document(Path(path)))
    except (ProfileError, OptionError) as error:
        raise ProfileError(f"{path}: {error}") from error


def fingerprint_of_prompt(question_ids: Sequence[int], yes_ids: Sequence[int], no_ids: Sequence[int]) -> str:
    """SHA-256 of what is asked in a verification, as the model sees it: the question's tokens and the labels'."""
    return _checksum([list(question_ids), sorted(yes_ids), sorted(no_ids)])


def fingerprint_of_model(directory: str | Path) -> str:
    """SHA-256 of a model's directory: its configuration, its tensors' names, shapes and types, samples of its bytes.

    Reads about 256 KiB of each weights file, whatever its size. What is not in it: tokenizer, chat template, and
    the number type or quantisation that a server casts the weights to.

    Raises:
        ProfileError: no ``config.json``, no ``*.safetensors``, or one that cannot be read.
    """
    root, digest = Path(directory), hashlib.sha256()
    weights = sorted(root.glob("*.safetensors"))
    if not weights:
        raise ProfileError(f"{root}: has no *.safetensors to take a fingerprint of")
    try:
        config = json.loads((root / "config.json").read_bytes())
        digest.update(_canonical(config))
        for file in weights:
            _add_weights(digest, file)
    except (OSError, ValueError) as error:
        raise ProfileError(f"{root}: no fingerprint could be taken: {error}") from error
    return digest.hexdigest()


def _add_weights(digest: Any, file: Path) -> None:
    """The tensors' table, the file's size, and evenly spaced blocks from the first byte of data to the last."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(size - 8, _MAX_HEADER):
            raise ValueError(f"{file.name} is not a safetensors file, or a truncated one")
        header = json.loads(stream.read(length))
        if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
            raise ValueError(f"{file.name} has no table of tensors")
        rows = [[name, e.get("dtype"), e.get("shape")] for name, e in header.items() if name != "__metadata__"]
        start = 8 + length
        last = max(start, size - _SAMPLE_BYTES)
        digest.update(_canonical([sorted(rows, key=lambda row: row[0]), size - start]))
        for index in range(_SAMPLES):
            stream.seek(start + (last - start) * index // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))


def _file_name(model_fingerprint: str, prompt_fingerprint: str) -> str:
    return f"profile-{_checksum([model_fingerprint, prompt_fingerprint])[:32]}.json"


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode(
        "utf-8", "surrogatepass"
    )


def _checksum(value: Any) -> str:
    return hashlib.sha256(_canonical(value)).hexdigest()


def _body_of(profile: Profile) -> dict[str, Any]:
    body: dict[str, Any] = {name: getattr(profile, name) for name in _PLAIN}
    body.update({name: list(getattr(profile, name)) for name in _IDS})
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
        raise ProfileError(f"truncated or damaged: {error}; make it anew with rksc calibrate") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ProfileError(f'format: must be an object with "format": "{FORMAT}"; this is no profile')
    version = _of_type(document, "version", int)
    if version > VERSION:
        raise ProfileError(f"version: {version} is newer than {VERSION}, which is what can be read; update rksc-sgl")
    body = _of_type(document, "body", dict)
    try:
        whole = _of_type(document, "sha256", str) == _checksum(body)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"body: damaged: {error}; make it anew with rksc calibrate") from error
    if not whole:
        raise ProfileError("sha256: does not fit the body: damaged or edited; make it anew with rksc calibrate")
    return {**body, "version": version}


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
    return Profile(readouts=readouts, version=_of_type(body, "version", int), **plain, **rows)


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
_TYPES: dict[str, type] = {"int": int, "float": float, "bool": bool, "Unit": str, "Scope": str}
_PLAIN: dict[str, type] = {
    "model_fingerprint": str,
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
    allowed = [point for point in points if point.delta <= risk]
    if not allowed:
        possible = ", ".join(f"{delta:g}" for delta in sorted({point.delta for point in points}))
        can = f"it can certify {possible}" if possible else "it certifies none"
        raise ProfileError(f"risk: {what} at {risk:g} is not certified by this profile; {can}")
    return max(allowed, key=lambda point: point.delta)


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
        _check_open_share("points.delta", point.delta)
        if point.t < 0.0:
            raise ProfileError(f"points.t: must be at least 0, got {point.t!r}")
        if point.scope not in SCOPES:
            raise ProfileError(f"points.scope: must be one of {', '.join(SCOPES)}, got {point.scope!r}")
        if point.unit not in ("group", "call"):
            raise ProfileError(f"points.unit: must be group or call, got {point.unit!r}")
    for skip in profile.skip_points:
        _check_open_share("skip_points.delta", skip.delta)
        if not 0.0 <= skip.agreement <= 1.0:
            raise ProfileError(f"skip_points.agreement: must be between 0 and 1, got {skip.agreement!r}")
    named = [("points", [point.delta for point in profile.points if point.scope == scope]) for scope in SCOPES]
    for name, deltas in [*named, ("skip_points", [point.delta for point in profile.skip_points])]:
        if len(set(deltas)) < len(deltas):
            raise ProfileError(f"{name}.delta: must differ from each other, got {sorted(deltas)}")


def _check_open_share(name: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise ProfileError(f"{name}: must be above 0 and below 1, got {value!r}")


def _check_date(created: str) -> None:
    try:
        date.fromisoformat(created)
    except ValueError as error:
        raise ProfileError(f"created: must be an ISO date such as 2026-01-31, got {created!r}") from error
