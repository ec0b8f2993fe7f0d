"""What a profile is valid for: the model as it is served, and the question with its labels.

A certificate holds for the numbers that it was made on. Each field of a :class:`Fingerprint` changes them: profile and
server must agree in all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rksc_sgl.errors import ProfileError

_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of each weights file, evenly spaced
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format


@dataclass(frozen=True)
class Fingerprint:
    """A model as a server serves it.

    Attributes:
        model: of :func:`fingerprint_of_model`.
        dtype: the number type that the model computes in.
        quantization: SGLang's name of the method that the server was asked for; ``none`` where the model is served as
            its files are (and these are in ``model``).
        kv_cache_dtype: of the KV cache; ``auto`` where it follows the model.
        attention_backend: SGLang's name; ``A prefill, B decode`` where the two differ.
        tp_size: how many ranks share each layer (tensor parallelism).
    """

    model: str
    dtype: str
    quantization: str
    kv_cache_dtype: str
    attention_backend: str
    tp_size: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), int if field.name == "tp_size" else str
            if type(value) is not kind or not value:
                wanted = "an integer from 1 on" if kind is int else "a string that is not empty"
                raise ProfileError(f"fingerprint.{field.name}: must be {wanted}, got {value!r}")
        if self.tp_size < 1:
            raise ProfileError(f"fingerprint.tp_size: must be an integer from 1 on, got {self.tp_size}")

    @classmethod
    def from_mapping(cls, values: Any) -> Fingerprint:
        """From plain values, as a profile's file and ``GET /rksc/info`` have them.

        Raises:
            ProfileError: no mapping, a field is missing, unknown or wrong; the message names it.
        """
        if not isinstance(values, Mapping):
            raise ProfileError(f"fingerprint: must be an object, got {type(values).__name__}")
        names = [field.name for field in fields(cls)]
        for name in names:
            if name not in values:
                raise ProfileError(f"fingerprint.{name}: is missing")
        for name in values:
            if name not in names:
                raise ProfileError(f"fingerprint.{name}: is unknown; the fields are {', '.join(names)}")
        return cls(**values)

    def differences(self, server: Fingerprint) -> list[str]:
        """Why a profile of this fingerprint is not valid on a server, a clause for each field; empty where it is."""
        if self.model != server.model:
            return ["is of another model"]
        return [
            f"is of {words} {getattr(self, name)}, this server runs {getattr(server, name)}"
            for name, words in _WORDS.items()
            if getattr(self, name) != getattr(server, name)
        ]


_WORDS = {
    "dtype": "number type",
    "quantization": "quantization",
    "kv_cache_dtype": "KV cache type",
    "attention_backend": "attention backend",
    "tp_size": "tensor-parallel size",
}


def canonical(value: Any) -> bytes:
    """One spelling of plain JSON values: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode(
        "utf-8", "surrogatepass"
    )


def checksum(value: Any) -> str:
    """SHA-256 of plain JSON values."""
    return hashlib.sha256(canonical(value)).hexdigest()


def fingerprint_of_prompt(question_ids: Sequence[int], yes_ids: Sequence[int], no_ids: Sequence[int]) -> str:
    """SHA-256 of what is asked in a verification, as the model sees it: the question's tokens and the labels'."""
    return checksum([list(question_ids), sorted(yes_ids), sorted(no_ids)])


def fingerprint_of_model(directory: str | Path) -> str:
    """SHA-256 of a model's directory: its configuration, its tensors' names, shapes and types, samples of its bytes.

    Reads about 256 KiB of each weights file, whatever its size. Tokenizer and chat template
    are not in it, nor is what a server makes of the weights: see :class:`Fingerprint`.

    Raises:
        ProfileError: no ``config.json``, no ``*.safetensors``, or one that cannot be read.
    """
    root, digest = Path(directory), hashlib.sha256()
    weights = sorted(root.glob("*.safetensors"))
    if not weights:
        raise ProfileError(f"{root}: has no *.safetensors to take a fingerprint of")
    try:
        config = json.loads((root / "config.json").read_bytes())
        digest.update(canonical(config))
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
        digest.update(canonical([sorted(rows, key=lambda row: row[0]), size - start]))
        for index in range(_SAMPLES):
            stream.seek(start + (last - start) * index // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
