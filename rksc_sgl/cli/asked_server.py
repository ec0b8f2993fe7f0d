"""The server that a command asks: one that runs, or one of its own."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess

if TYPE_CHECKING:
    from rksc_sgl.frontend.endpoint import Endpoint


@contextlib.contextmanager
def asked_server(
    model_path: str | None, url: str | None, variables: Mapping[str, str] | None = None
) -> Iterator[Endpoint]:
    """The server at ``url``, else one of this model, which is started with these variables and ended again."""
    from rksc_sgl.frontend.endpoint import Endpoint

    if url is not None:
        yield Endpoint(url)
        return
    assert model_path is not None
    arguments = server_arguments(["--model-path", model_path])
    print(f"rksc: starting a server of {model_path}", file=sys.stderr)
    with ServerProcess(arguments, variables=dict(variables or {})) as server:
        yield Endpoint(server.url)
