"""HTTP routes that we add to SGLang's server."""

from __future__ import annotations

from types import ModuleType
from typing import Any


def add_routes(http_server: ModuleType) -> None:
    """Add ``GET /rksc/info``: our version and what is at work in the live processes."""

    async def rksc_info() -> dict[str, Any]:
        from sglang.srt.platforms import current_platform

        from rksc_sgl import __version__
        from rksc_sgl.options import KEY, OPERATIONS, SHARE_MODES
        from rksc_sgl.sglang_plugin import hooks

        tokenizer_manager = http_server.get_global_state().tokenizer_manager
        scheduler_states = await tokenizer_manager.get_internal_state()
        return {
            "version": __version__,
            "share_modes": list(SHARE_MODES),
            "operations": list(OPERATIONS),
            "platform": repr(current_platform),
            "radix_cache_backend": tokenizer_manager.config_value("radix_cache_backend"),
            "attention_backend": tokenizer_manager.config_value("attention_backend"),
            "hooks": hooks.describe(),
            "schedulers": [state.get(KEY) for state in scheduler_states],
        }

    http_server.app.add_api_route("/rksc/info", rksc_info, methods=["GET"])
