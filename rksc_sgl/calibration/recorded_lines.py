"""Files that a long run appends to and goes on from: the settings in the first line, then one JSON line a record."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from rksc_sgl.errors import OptionError

Settings = TypeVar("Settings")
Record = TypeVar("Record")


@dataclass(frozen=True)
class Recordings(Generic[Settings, Record]):
    """One such file.

    Attributes:
        path: of the file; it need not exist before it is written.
        settings: makes the settings, a dataclass, of the fields of the first line.
        record: makes a record, a dataclass, of the fields of another line.
        holds: what the records are, for messages.
    """

    path: Path
    settings: Callable[..., Settings]
    record: Callable[..., Record]
    holds: str

    def load(self) -> tuple[Settings, list[Record]]:
        """What is in the file; a last line that was cut is left out.

        Raises:
            OptionError: it is missing or no such file.
        """
        try:
            lines = self.path.read_text().splitlines(keepends=True)
            complete = [json.loads(line) for line in lines if line.endswith("\n")]
            return self.settings(**complete[0]), [self.record(**one) for one in complete[1:]]
        except (OSError, ValueError, TypeError, IndexError, KeyError) as error:
            raise OptionError(f"recordings: {self.path} cannot be read as {self.holds} ({error})") from error

    def resume(self, settings: Any) -> list[Record]:
        """The records that are there already; the file is made, or cut back to its last complete line.

        Raises:
            OptionError: it holds runs of other settings, or is no such file.
        """
        if not self.path.exists() or self.path.stat().st_size == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(asdict(settings)) + "\n")
            return []
        known, records = self.load()
        if known != settings:
            changed = [name for name, value in asdict(settings).items() if getattr(known, name) != value]
            raise OptionError(
                f"recordings: {self.path} holds runs of other settings ({', '.join(changed)}); "
                "name another file or delete it"
            )
        content = self.path.read_bytes()
        if not content.endswith(b"\n"):
            self.path.write_bytes(content[: content.rfind(b"\n") + 1])
        return records

    @contextmanager
    def appending(self) -> Iterator[Callable[[Any], None]]:
        """What appends a record, which is on the disk when it returns."""
        with self.path.open("a") as stream:

            def append(record: Any) -> None:
                stream.write(json.dumps(asdict(record)) + "\n")
                stream.flush()
                os.fsync(stream.fileno())

            yield append
