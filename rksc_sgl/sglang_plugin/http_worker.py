"""SGLang's application for one of several HTTP workers (``--tokenizer-worker-num``), with plugins loaded first.

Such a worker is a fresh process that imports the application by name, and SGLang loads no plugins there.
"""

from __future__ import annotations

from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.entrypoints.http_server import app  # noqa: E402

__all__ = ["app"]
