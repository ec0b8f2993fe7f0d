"""Traces on disk, one file for each fork, so that a run that was interrupted goes on where it ended."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rksc_sgl.calibration.atomic_write import write_atomically
from rksc_sgl.calibration.thresholds import Traces
from rksc_sgl.errors import OptionError

_DESCRIPTION = "workload.json"


@dataclass(frozen=True)
class ForkRecord:
    """Full-depth verifications of one fork. B branches.

    Attributes:
        hidden: ``[B, layers, hidden]`` float32.
        margin: ``[B]``.
        confidence: ``[B]`` 0 to 1.
        answers: the extracted answer of each branch; "" where there is none.
        family: the task family.
    """

    hidden: npt.NDArray[np.float32]
    margin: npt.NDArray[np.float64]
    confidence: npt.NDArray[np.float64]
    answers: tuple[str, ...]
    family: str


class TraceStore:
    """A directory of fork records that belong to one model, question and workload.

    Args:
        directory: made where it is missing.
        description: what the records are of; plain JSON values.

    Raises:
        OptionError: the directory holds records of something else.
    """

    def __init__(self, directory: Path, description: dict[str, Any]) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / _DESCRIPTION
        if file.exists():
            known = json.loads(file.read_text())
            if known != json.loads(json.dumps(description)):
                changed = sorted(key for key in {*known, *description} if known.get(key) != description.get(key))
                raise OptionError(
                    f"{directory}: holds traces of another workload (other {', '.join(changed) or 'values'}); "
                    "choose another directory or delete it"
                )
        else:
            write_atomically(file, json.dumps(description, indent=1).encode())

    def has(self, index: int) -> bool:
        """Whether the record of this fork is there."""
        return self._file(index).exists()

    def put(self, index: int, record: ForkRecord) -> None:
        """Write a record; it appears complete or not at all."""
        content = io.BytesIO()
        np.savez(
            content,
            hidden=record.hidden,
            margin=record.margin,
            confidence=record.confidence,
            answers=np.array(record.answers, dtype=np.str_),
            family=np.array(record.family, dtype=np.str_),
        )
        write_atomically(self._file(index), content.getvalue())

    def get(self, index: int) -> ForkRecord:
        """
        Raises:
            OptionError: the record is missing or damaged.
        """
        file = self._file(index)
        try:
            with np.load(file, allow_pickle=False) as values:
                answers = tuple(str(answer) for answer in values["answers"])
                return ForkRecord(
                    values["hidden"], values["margin"], values["confidence"], answers, str(values["family"])
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise OptionError(f"{file}: cannot be read ({error}); delete it and run again") from error

    def _file(self, index: int) -> Path:
        return self.directory / f"fork-{index:06d}.npz"


def as_traces(records: Sequence[ForkRecord], layers: Sequence[int], model_layers: int) -> Traces:
    """All calls of these forks; the group of a call is the fork's position in ``records``."""
    sizes = [record.margin.size for record in records]
    return Traces(
        hidden=np.concatenate([record.hidden for record in records]),
        margin=np.concatenate([record.margin for record in records]),
        group=np.repeat(np.arange(len(records)), sizes),
        confidence=np.concatenate([record.confidence for record in records]),
        layers=tuple(layers),
        model_layers=model_layers,
        family=np.repeat(np.array([record.family for record in records]), sizes),
    )
