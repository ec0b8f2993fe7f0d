"""An HTTP server of a test, served from a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import HTTPServer


@contextmanager
def serving(server: HTTPServer, release: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Serve until the block ends, however it ends; ``release`` lets requests go that still wait."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        release()
        server.shutdown()
        server.server_close()
        thread.join()
