"""``benchmarks.bare_server`` without our HTTP routes too: to our frontend it is a server of SGLang alone."""

from __future__ import annotations

from benchmarks import bare_server
from rksc_sgl.server_process import main
from rksc_sgl.sglang_plugin.wiring import hooks, registry


def _arm() -> None:
    registry.arm(bare_server.hooks.HOOKS)


hooks.arm = _arm

if __name__ == "__main__":
    main()
