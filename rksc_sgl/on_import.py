"""Run a callback when a module has been imported, without importing it ourselves.

SGLang loads plugins in every one of its processes, and each process imports only what it needs. Resolving a
hook's dotted path imports its module, which would pull the HTTP server into the scheduler and the scheduler
into the tokenizer. So a hook is applied when, and only where, the module that it names is loaded.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType

_callbacks: dict[str, list[Callable[[ModuleType], None]]] = {}
_finding = threading.local()


def when_imported(module_name: str, callback: Callable[[ModuleType], None], *, unfinished: bool = False) -> None:
    """Call ``callback(module)`` now if ``module_name`` is loaded, otherwise right after it has been loaded.

    An exception in the callback propagates to whoever imports the module.

    Args:
        unfinished: the callback can do with a module whose import has begun and not ended; that of a package
            is often under way when one of its parts loads us.

    Raises:
        RuntimeError: the import is under way and the callback cannot do with that; it would never be called.
    """
    module = sys.modules.get(module_name)
    if module is not None:
        if getattr(module.__spec__, "_initializing", False) and not unfinished:
            raise RuntimeError(f"{module_name} is being imported; what waits for the end of it would never run")
        callback(module)
        return
    if not any(isinstance(finder, _WatchingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WatchingFinder())
    _callbacks.setdefault(module_name, []).append(callback)


class _WatchingFinder(importlib.abc.MetaPathFinder):
    """Finds watched modules through the other finders and wraps their loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _callbacks or getattr(_finding, "name", None) == fullname:
            return None
        _finding.name = fullname
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            _finding.name = None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for callback in _callbacks.pop(fullname, []):
                callback(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
