"""HTTP routes that we add to SGLang's server."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from rksc_sgl.metrics import OF_HTTP_PROCESSES, counters
from rksc_sgl.options import MAX_GROUP_LENGTH
from rksc_sgl.sglang_plugin.inspection.inquiry import ANSWER, DEFAULT_NODES, MAX_NODES, Inquiry
from rksc_sgl.sglang_plugin.memory.ending import tell_end
from rksc_sgl.sglang_plugin.wiring import registry


def add_routes(http_server: ModuleType) -> None:
    """Add ``GET /rksc/info``, ``/rksc/stats`` and ``/rksc/tree``: what is at work, what it did, what it holds.

    ``POST /rksc/end_fork`` says that a fork has ended.
    """
    from fastapi import Body, Query
    from sglang.srt.utils.auth import AuthLevel, auth_level

    async def rksc_info() -> dict[str, Any]:
        from sglang.srt.platforms import current_platform

        from rksc_sgl import __version__
        from rksc_sgl.one_request.options import ForkSettings
        from rksc_sgl.options import KEY, OPERATIONS, SHARE_MODES

        tokenizer_manager = http_server.get_global_state().tokenizer_manager
        scheduler_states = await tokenizer_manager.get_internal_state()
        return {
            "version": __version__,
            "share_modes": list(SHARE_MODES),
            "operations": list(OPERATIONS),
            "one_request": ForkSettings.from_environment().to_plain(),
            "platform": repr(current_platform),
            "radix_cache_backend": tokenizer_manager.config_value("radix_cache_backend"),
            "attention_backend": tokenizer_manager.config_value("attention_backend"),
            "hooks": registry.describe(),
            "schedulers": [state.get(KEY) for state in scheduler_states],
        }

    async def rksc_stats(nodes: bool = True) -> dict[str, Any]:
        tokenizer_manager = http_server.get_global_state().tokenizer_manager
        schedulers = await _ask(tokenizer_manager, Inquiry("stats", nodes=int(nodes)))
        return {"schedulers": schedulers, "http": {"counters": counters().snapshot(OF_HTTP_PROCESSES)}}

    # It shows other people's prompts, so where there is a key for administrators it asks for that.
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def rksc_tree(
        max_nodes: int = Query(DEFAULT_NODES, ge=1, le=MAX_NODES), depth: int | None = Query(None, ge=0)
    ) -> dict[str, Any]:
        tokenizer_manager = http_server.get_global_state().tokenizer_manager
        answers = await _ask(tokenizer_manager, Inquiry("tree", nodes=max_nodes, depth=depth))
        for answer in answers:
            for node in (answer["tree"] or {"nodes": ()})["nodes"]:
                node["text"] = _text(tokenizer_manager.tokenizer, node["first_ids"])
        return {"schedulers": answers}

    async def rksc_end_fork(group: str = Body(embed=True, min_length=1, max_length=MAX_GROUP_LENGTH)) -> dict[str, Any]:
        """Nothing more of a fork is to come, so that nothing is kept for it any longer."""
        tell_end(http_server.get_global_state().tokenizer_manager, group)
        return {}

    http_server.app.add_api_route("/rksc/end_fork", rksc_end_fork, methods=["POST"])
    for path, endpoint in (("/rksc/info", rksc_info), ("/rksc/stats", rksc_stats), ("/rksc/tree", rksc_tree)):
        http_server.app.add_api_route(path, endpoint, methods=["GET"])


async def _ask(tokenizer_manager: Any, inquiry: Inquiry) -> list[dict[str, Any]]:
    """The answer of every data-parallel scheduler."""
    from sglang.srt.managers.io_struct import GetInternalStateReq

    tokenizer_manager.auto_create_handle_loop()
    request = GetInternalStateReq(rid=inquiry.to_rid())
    responses = await tokenizer_manager.get_internal_state_communicator(request)
    return [response.internal_state[ANSWER] for response in responses]


def _text(tokenizer: Any, ids: list[int] | None) -> str | None:
    """What the ids spell; None where that cannot be told, as of the stand-ins for an image."""
    if tokenizer is None or ids is None or any(number >= len(tokenizer) for number in ids):
        return None
    return tokenizer.decode(ids)
