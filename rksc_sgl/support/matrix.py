"""The allow-list as the tables of ``docs/support.md``; ``python -m rksc_sgl.support.matrix`` prints them."""

from __future__ import annotations

from rksc_sgl.support.axes import AXES, CAPABILITIES, RUNS, Axis, Cell, Row, Standing
from rksc_sgl.support.offers import refusal_text

HEADINGS = {"exact": "exact", "blend": "blend", "merge": "merge", "exit": "exit", "verify": "verify in place"}


def as_markdown() -> str:
    """Recorded runs, one table an axis, and every refusal in the words of the code."""
    parts = ["## Recorded runs", *(f"- **{name}**: {told}" for name, told in RUNS.items())]
    for axis in AXES:
        parts += [f"## {axis.name[0].upper()}{axis.name[1:]}", _table(axis), *_refusals(axis)]
    return "\n\n".join(parts) + "\n"


def _table(axis: Axis) -> str:
    lines = ["| | " + " | ".join(HEADINGS[name] for name in CAPABILITIES) + " |", "|---" * 6 + "|"]
    for row in axis.rows:
        lines.append(f"| {row.name} | " + " | ".join(map(_shown, row.cells)) + " |")
    return "\n".join(lines)


def _shown(cell: Cell) -> str:
    if cell.standing is Standing.RAN:
        return ", ".join(_short(part) for part in cell.text.split("; "))
    return {Standing.WRONG: "**refused**", Standing.STOCK: "SGLang's own", Standing.NOT_RUN: "not run"}[cell.standing]


def _short(evidence: str) -> str:
    """A test by its file, a run by its name."""
    return f"`{evidence.rsplit('/', 1)[-1].removesuffix('.py')}`" if evidence.endswith(".py") else evidence


def _refusals(axis: Axis) -> list[str]:
    lines = [f'- {row.name}: "{text}"' for row, text in _refusal_texts(axis)]
    return ["Refused with:", "\n".join(lines)] if lines else []


def _refusal_texts(axis: Axis) -> list[tuple[Row, str]]:
    found = [
        (row, refusal_text(name, axis, row, cell))
        for row in axis.rows
        for name, cell in zip(CAPABILITIES, row.cells, strict=True)
        if cell.standing is Standing.WRONG
    ]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    print(as_markdown(), end="")
