"""``rksc prove``: whether a running server reuses what it says, and nothing else."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from rksc_sgl import __version__
from rksc_sgl.cli.tree import DEFAULT_URL, UNBROKEN, get_from_plugin
from rksc_sgl.errors import ServerVersionError
from rksc_sgl.proof.arms import DECLINED_MERGE, MERGE, Steps, arms_of, measure
from rksc_sgl.proof.texts import prompts
from rksc_sgl.proof.verdict import Proof, Row, judge

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
    url = url.rstrip("/")
    info = get_from_plugin(url, "/rksc/info", {}, api_key)
    check_version(url, info)
    # Not before it is needed: SGLang takes seconds to import.
    from rksc_sgl.frontend.endpoint import Endpoint

    endpoint = Endpoint(url, api_key)
    merges = "merge" in info["share_modes"]
    dtype = str(endpoint.get_server_info()["dtype"])
    plan = arms_of(merges)
    measured = measure(endpoint, prompts(), plan, repeats, _progress)
    proof = judge(measured, plan, merges, full_precision=dtype == "float32")
    if as_json:
        print(json.dumps(_summary(proof, dtype, repeats)))
    else:
        _show(proof, url, dtype, repeats)
    sys.exit(0 if proof.proven else 1)


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


def _progress(steps: Steps) -> Any:
    return tqdm(steps, desc="prove", unit="run", file=sys.stderr)


def _summary(proof: Proof, dtype: str, repeats: int) -> dict[str, Any]:
    return {
        "proven": proof.proven,
        "verdict": proof.verdict,
        "notes": list(proof.notes),
        "merge_offered": proof.merges,
        "dtype": dtype,
        "repeats": repeats,
        "noise_limit": proof.noise_limit,
        "blend_limit": proof.blend_limit,
        "rows": [{**asdict(row), "ok": row.ok} for row in proof.rows],
    }


def _show(proof: Proof, url: str, dtype: str, repeats: int) -> None:
    table = Table(title=f"{url}, {dtype}, {repeats} {'run' if repeats == 1 else 'runs'} a row; tokens, nats")
    table.add_column("run")
    for column in _NUMBERS:
        table.add_column(column, justify="right")
    table.add_column("seconds", justify="right")
    table.add_column("of cold", justify="right")
    table.add_column("KL", justify="right")
    table.add_column("ok")
    table.add_column("expected")
    for row in proof.rows:
        table.add_row(*_cells(row))
    if not proof.merges:
        for name in (MERGE, DECLINED_MERGE):
            table.add_row(name, *([""] * (len(_NUMBERS) + 4)), NOT_OFFERED)
    console = Console(width=None if sys.stdout.isatty() else UNBROKEN)
    console.print(table)
    console.print(
        f"KL is that of the next token to the same prompt's exact run, the largest of the runs; up to "
        f"{proof.noise_limit:.2g} it is noise, and a blend may have {proof.blend_limit:.2g}."
    )
    for note in proof.notes:
        console.print(f"note: {note}")
    console.print(escape(proof.verdict))


_NUMBERS = {
    "prompt": "prompt_tokens",
    "cached": "cached_tokens",
    "reused": "reused_tokens",
    "taken": "taken_tokens",
    "merged": "merged_tokens",
    "recomputed": "recomputed_tokens",
    "replaced": "replaced_tokens",
    "computed": "computed_tokens",
}  # column -> attribute of a row


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        *(str(getattr(row, attribute)) for attribute in _NUMBERS.values()),
        f"{row.seconds:.2f}",
        f"{row.ratio:.2f}",
        f"{row.kl:.1e}",
        "yes" if row.ok else "NO",
        row.expected,
    ]
