"""Errors of the ``openai`` client as this project's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import openai

from rksc_sgl.errors import ServerRefusedError, ServerUnreachableError


@contextmanager
def server_errors(url: str) -> Iterator[None]:
    """What goes wrong here between an OpenAI client and a server.

    Args:
        url: of the server, for the message.

    Raises:
        ServerUnreachableError: the server went away.
        ServerRefusedError: it answered with an error status.
    """
    try:
        yield
    except openai.APIConnectionError as error:
        raise ServerUnreachableError(f"the server at {url} went away: {error}") from error
    except openai.APIStatusError as error:
        raise ServerRefusedError(f"{url}: {error}", error.status_code) from error
