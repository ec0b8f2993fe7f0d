"""The radix-cache backend ``rksc``, selected with ``--radix-cache-backend rksc``.

Sharing between branches is exact at this point: the backend is SGLang's own choice of tree for the model, under
our name, so that what is active is visible in the server's log and every stock feature is kept.
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
