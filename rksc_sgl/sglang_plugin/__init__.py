"""Everything of ours that runs inside SGLang's processes.

``register`` is the ``sglang.srt.plugins`` entry point. SGLang logs and swallows what goes wrong in a plugin, so
nothing here relies on that: what was applied is recorded, ``GET /rksc/info`` reports it from the live processes,
and ``rksc serve`` and ``rksc doctor`` refuse a server in which a hook is missing.
"""

from __future__ import annotations

import os

WORKER_VARIABLE = "SGLANG_HTTP_SERVER_APP_PATH"
WORKER = "rksc_sgl.sglang_plugin.http_worker:app"


def register() -> None:
    """Entry point: arm the attention backend, the radix backend and every hook."""
    os.environ.setdefault(WORKER_VARIABLE, WORKER)
    from rksc_sgl.cpu_platform import attention, without_triton
    from rksc_sgl.sglang_plugin import requests
    from rksc_sgl.sglang_plugin.wiring import hooks, radix_backend

    attention.arm()
    without_triton.arm()
    radix_backend.arm()
    requests.arm()
    hooks.arm()
