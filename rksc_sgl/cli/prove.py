"""``rksc prove``: whether a running server reuses what it says, and nothing else."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from rksc_sgl import __version__
from rksc_sgl.cli.tree import DEFAULT_URL, TIMEOUT_S, UNBROKEN
from rksc_sgl.errors import ServerVersionError
from rksc_sgl.http_client import HttpClient
from rksc_sgl.proof.arms import OPTIONAL, Steps, arms_of, measure
from rksc_sgl.proof.outcome import Proof, Row, judge
from rksc_sgl.proof.texts import prompts

FULL = "float32"
NOT_OFFERED = "not offered by this server"


def prove(
    url: Annotated[str, typer.Option(help="The server. Its cache is flushed; others should not use it.")] = DEFAULT_URL,
    api_key: Annotated[str | None, typer.Option(help="The server's key, if it has one; the administrator's.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of every row; times are their medians.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Prove on real text that a running server reuses what it says, and nothing else.

    Cold, exact, blended, merged and declined prefills, requests that did not opt in, and the noise of a repeat: tokens,
    seconds, and the KL of the next token to the exact run. Exit code 1 where reuse silently does not happen, where an
    answer is not its prompt's, or where somebody who did not ask for it meets approximate KV. Times are not judged.
    """
    found = prove_server(url.rstrip("/"), api_key, repeats)
    if as_json:
        print(json.dumps(_summary(found, repeats)))
    else:
        _show(found, repeats)
    sys.exit(0 if found.proof.proven else 1)


@dataclass(frozen=True)
class ProvenServer:
    """What a proof found of a server.

    Attributes:
        url: of the server.
        proof: the result.
        numbers: the number types that it computes in.
        declined: by :data:`~rksc_sgl.proof.arms.OPTIONAL`, why the server does not offer it.
    """

    url: str
    proof: Proof
    numbers: str
    declined: dict[str, str]


def prove_server(url: str, api_key: str | None = None, repeats: int = 1) -> ProvenServer:
    """Run a proof on a server, whose cache is flushed.

    Raises:
        ServerVersionError: it runs another version of this package.
        ServerError: it refused a request or went away.
    """
    with HttpClient(url, api_key, timeout=TIMEOUT_S) as client:
        info = client.get_json("/rksc/info")
    check_version(url, info)
    # Not before it is needed: SGLang takes seconds to import.
    from rksc_sgl.frontend.endpoint import Endpoint

    endpoint = Endpoint(url, api_key)
    declined = declined_in(info)
    offered = [name for name in OPTIONAL if name not in declined]
    numbers = number_types(endpoint.get_server_info())
    plan = arms_of(offered)
    measured = measure(endpoint, prompts(), plan, repeats, _progress)
    return ProvenServer(url, judge(measured, plan, offered, full_precision=numbers == FULL), numbers, declined)


def check_version(url: str, info: dict[str, Any]) -> None:
    """Refuse a server whose answers we might misread.

    Raises:
        ServerVersionError: it runs another version of this package.
    """
    if info.get("version") != __version__:
        raise ServerVersionError(
            f"the server at {url} runs rksc-sgl {info.get('version', 'of an unknown version')}, and this is "
            f"{__version__}: use the same version on both sides"
        )


def declined_in(info: dict[str, Any]) -> dict[str, str]:
    """Which of :data:`~rksc_sgl.proof.arms.OPTIONAL` a server declines, and why, from its ``/rksc/info``.

    One that a single scheduler of several declines is declined, for any of them may get a request.
    """
    offers = [state["offers"] for state in info["schedulers"] if state is not None]
    return {name: one[name]["refusal"] for one in offers for name in OPTIONAL if not one[name]["offered"]}


def number_types(server_info: dict[str, Any]) -> str:
    """The model's number type, and that of its KV where it is another; ``auto`` is what the model's files say."""
    model, kv = server_info["dtype"], server_info["kv_cache_dtype"]
    return model if kv in ("auto", model) else f"{model} with KV in {kv}"


def _progress(steps: Steps) -> Any:
    return tqdm(steps, desc="prove", unit="run", file=sys.stderr)


def _summary(found: ProvenServer, repeats: int) -> dict[str, Any]:
    proof = found.proof
    return {
        "proven": proof.proven,
        "verdict": proof.verdict,
        "notes": list(proof.notes),
        "blend_offered": "blend" in proof.offered,
        "merge_offered": "merge" in proof.offered,
        "number_types": found.numbers,
        "repeats": repeats,
        "noise_limit": proof.noise_limit,
        "blend_limit": proof.blend_limit,
        "rows": [{**asdict(row), "ok": row.ok} for row in proof.rows],
    }


def _show(found: ProvenServer, repeats: int) -> None:
    proof = found.proof
    table = Table(
        title=f"{found.url}, {found.numbers}, {repeats} {'run' if repeats == 1 else 'runs'} a row",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in _COLUMNS:
        words = column in ("run", "shared tokens", "ok")
        table.add_column(column, justify="left" if words else "right", no_wrap=not words)
    for row in proof.rows:
        table.add_row(*_cells(row))
    shown = {row.name for row in proof.rows}
    missing = [arm.name for arm in arms_of(OPTIONAL) if arm.name not in shown]
    for name in missing:
        table.add_row(name, *([""] * (len(_COLUMNS) - 2)), "-")
    console = Console(width=None if sys.stdout.isatty() else UNBROKEN, highlight=False)
    console.print(table)
    for row in proof.rows:
        declined = f" (the server: {row.declined})" if row.declined else ""
        console.print(escape(f"  {row.name}: {row.expected}{declined}"))
    for name in missing:
        console.print(f"  {name}: {NOT_OFFERED}")
    for name, refusal in found.declined.items():
        console.print(escape(f"{name} is not offered: {refusal}"))
    console.print(
        f"KL: of the next token, to the same prompt's exact run, in nats, the largest of the runs; up to "
        f"{proof.noise_limit:.2g} is noise, and a blend may have {proof.blend_limit:.2g}."
    )
    for note in proof.notes:
        console.print(f"note: {note}")
    console.print(escape(proof.verdict))


_COLUMNS = ("run", "prompt", "cached", "shared tokens", "computed", "seconds", "of cold", "KL", "ok")
_SHARED = ("reused", "taken", "recomputed", "merged", "replaced")


def _cells(row: Row) -> list[str]:
    kinds = {kind: getattr(row, f"{kind}_tokens") for kind in _SHARED}
    return [
        row.name,
        str(row.prompt_tokens),
        str(row.cached_tokens),
        ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count),
        str(row.computed_tokens),
        f"{row.seconds:.2f}",
        f"{row.ratio:.2f}",
        f"{row.kl:.1e}" if row.kl else "0",
        "yes" if row.ok else "NO",
    ]
