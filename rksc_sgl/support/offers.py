"""What is offered on a server: every axis must allow it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rksc_sgl.support.axes import AXES, CAPABILITIES, WORDS, Axis, Cell, Row, Standing
from rksc_sgl.support.facts import Facts

ALLOW_UNTESTED = "--rksc-allow-untested"
ALLOW_VARIABLE = "RKSC_ALLOW_UNTESTED"  # the same, from `rksc serve` to SGLang's processes


@dataclass(frozen=True)
class Offer:
    """One capability on one server.

    Attributes:
        offered: whether requests may have it.
        refusal: what is refused and what would work; empty where it is offered.
        evidence: the tests and runs that stand behind it, "; " between them; empty where it is not offered, or where
            it is SGLang's own work alone.
        untested: whether it was not run with something that this server has.
        warning: what was not run, for every report; empty unless it is offered all the same.
    """

    offered: bool
    refusal: str
    evidence: str
    untested: bool
    warning: str = ""


def offers_of(facts: Facts, *, allow_untested: bool = False) -> dict[str, Offer]:
    """What a server offers, by capability (:data:`~rksc_sgl.support.axes.CAPABILITIES`).

    Args:
        allow_untested: offer, with a warning, also what nobody ran; never what is known to be wrong.
    """
    rows = [(axis, row_of(axis, facts)) for axis in AXES]
    return {name: _offer(name, place, rows, facts, allow_untested) for place, name in enumerate(CAPABILITIES)}


def row_of(axis: Axis, facts: Facts) -> Row:
    """The first row of an axis that applies to a server."""
    return next(row for row in axis.rows if row.applies(facts))


def refusal_text(capability: str, axis: Axis, row: Row, cell: Cell, facts: Facts | None = None) -> str:
    """Why one cell refuses a capability; empty where it does not.

    Args:
        facts: of the server; without them their names stay in braces.
    """
    if cell.standing is Standing.WRONG:
        return cell.text if facts is None else cell.text.format_map(asdict(facts))
    if cell.standing is Standing.NOT_RUN:
        named = row.name if facts is None else _named(axis, row, facts)
        ran = _one_of(_ran(capability, axis))
        return f"{_not_run(capability, axis, named)}; it ran with {ran}"
    return ""


def _ran(capability: str, axis: Axis) -> list[str]:
    """The rows of an axis on which a capability ran."""
    place = CAPABILITIES.index(capability)
    return [row.name for row in axis.rows if row.cells[place].standing is Standing.RAN]


def _one_of(names: list[str]) -> str:
    return " or ".join(filter(None, ["; ".join(names[:-1]), names[-1]]))


def _offer(capability: str, place: int, rows: list[tuple[Axis, Row]], facts: Facts, allow_untested: bool) -> Offer:
    by_standing: dict[Standing, list[tuple[Axis, Row]]] = {standing: [] for standing in Standing}
    for axis, row in rows:
        by_standing[row.cells[place].standing].append((axis, row))
    unrun = by_standing[Standing.NOT_RUN]
    refused = by_standing[Standing.WRONG] or ([] if allow_untested else unrun)
    if refused:
        texts = [refusal_text(capability, axis, row, row.cells[place], facts) for axis, row in refused]
        known = bool(by_standing[Standing.WRONG])
        remedy = "" if known else f". {ALLOW_UNTESTED} offers it all the same"
        return Offer(False, ". ".join(texts) + remedy, "", bool(unrun))
    evidence = [part for _, row in by_standing[Standing.RAN] for part in row.cells[place].text.split("; ")]
    warning = "; ".join(_not_run(capability, axis, _named(axis, row, facts)) for axis, row in unrun)
    return Offer(True, "", "; ".join(dict.fromkeys(evidence)), bool(unrun), warning)


def _not_run(capability: str, axis: Axis, named: str) -> str:
    return f"{WORDS[capability]} was not run with this {axis.name} ({named})"


def _named(axis: Axis, row: Row, facts: Facts) -> str:
    """A row, and what of it the server has where the row is of more than one thing."""
    # fmt: off
    particular = {
        "attention backend": facts.attention, "model family": facts.model, "KV pool": f"{facts.pool}, {facts.kv_dtype}",
        "weight quantization": facts.quantization, "speculative decoding": facts.speculative,
        "prefix cache": facts.tree, "KV tier besides the device": facts.tiers,
    }.get(axis.name, "")
    # fmt: on
    return row.name if not particular or particular in row.name else f"{row.name}: {particular}"
