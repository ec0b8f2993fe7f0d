"""The radix-cache backend ``rksc``: another name for SGLang's own choice of tree.

Nothing needs the name: our hooks work on the default tree. ``--radix-cache-backend rksc`` is accepted for servers that
were started so before, and costs what any named backend does in SGLang 0.5.23: no external cache linker, no int8 Mamba
checkpoints, no KV sharding.
"""

from __future__ import annotations

from types import ModuleType

from rksc_sgl.on_import import when_imported

BACKEND_NAME = "rksc"
_REGISTRY = "sglang.srt.mem_cache.registry"


def arm() -> None:
    """Register the backend with SGLang's radix-cache registry, in the processes that load it."""
    when_imported(_REGISTRY, _register)


def _register(registry: ModuleType) -> None:
    if registry.get_radix_cache_factory(BACKEND_NAME) is None:
        registry.register_radix_cache_backend(BACKEND_NAME, registry.default_radix_cache_factory)
