"""RKSC for SGLang: branches share work, verification is cheap, every branch keeps its own meaning.

Importing this package adds ``sgl.fork_similar``, ``sgl.verify_gated``, ``ProgramState.fork_similar`` and
``ProgramStateGroup.verify_gated`` to SGLang, at once if SGLang is loaded and as soon as it is otherwise. It does
not import SGLang by itself.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from rksc_sgl.on_import import when_imported

if TYPE_CHECKING:
    from rksc_sgl.frontend import BranchGroup, EarlyStop, Endpoint, SkipGate, Verdict, fork_similar, verify_gated

__version__ = "0.1.0"
__all__ = [
    "BranchGroup",
    "EarlyStop",
    "Endpoint",
    "SkipGate",
    "Verdict",
    "__version__",
    "fork_similar",
    "verify_gated",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from rksc_sgl import frontend

        return getattr(frontend, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _fork_similar(*args: Any, **kwargs: Any) -> BranchGroup:
    """See :func:`rksc_sgl.fork_similar`."""
    from rksc_sgl import frontend

    return frontend.fork_similar(*args, **kwargs)


def _verify_gated(*args: Any, **kwargs: Any) -> Verdict:
    """See :func:`rksc_sgl.verify_gated`."""
    from rksc_sgl import frontend

    return frontend.verify_gated(*args, **kwargs)


def _add_functions(sglang: ModuleType) -> None:
    sglang.fork_similar = _fork_similar  # type: ignore[attr-defined]
    sglang.verify_gated = _verify_gated  # type: ignore[attr-defined]


def _add_methods(interpreter: ModuleType) -> None:
    interpreter.ProgramState.fork_similar = _fork_similar
    interpreter.ProgramStateGroup.verify_gated = _verify_gated


# SGLang loads our CPU platform, and with it this package, in the middle of its own import.
when_imported("sglang", _add_functions, unfinished=True)
when_imported("sglang.lang.interpreter", _add_methods)
