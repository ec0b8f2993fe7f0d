"""What a fetch says while it runs: a bar on a terminal, plain lines elsewhere, both on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of it that is done, 0 where that is not known."""


@contextmanager
def reporting(progress: Progress | bool) -> Iterator[Progress]:
    """The function to report to: the given one, one that shows on stderr (``True``), or one that is silent."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda stage, fraction: None
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _lines()


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task("", total=None)

        def show(stage: str, fraction: float) -> None:
            bar.update(task, description=stage, total=1.0 if fraction else None, completed=fraction)

        yield show


def _lines() -> Progress:
    """One line for each stage, when it begins."""
    seen = ""

    def show(stage: str, fraction: float) -> None:
        nonlocal seen
        if stage != seen:
            print(stage, file=sys.stderr, flush=True)
        seen = stage

    return show
