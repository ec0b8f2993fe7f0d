"""Which hooks are in place in this process: armed when their module is loaded, and checked against the pinned SGLang.

A hook is armed with :func:`rksc_sgl.on_import.when_imported` and so applied only in the processes that load its
module. ``rksc doctor`` and the tests compare ``parameters`` with the installed release, so that an upgrade fails loudly
and names what moved.
"""

from __future__ import annotations

import inspect
import logging
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

from rksc_sgl.on_import import when_imported

logger = logging.getLogger(__name__)

SGLANG_VERSION = "0.5.23"


@dataclass(frozen=True)
class Hook:
    """One hooked target.

    Attributes:
        target: dotted path, module first.
        kind: "before", "after" or "around", as SGLang's HookType.
        function: our side of it.
        parameters: names of the target's parameters in the pinned release.
        process: which of SGLang's processes loads it: "http", "tokenizer" (same process) or "scheduler".
        why: what it is for.
    """

    target: str
    module: str
    kind: str
    function: Callable[..., Any]
    parameters: tuple[str, ...]
    process: str
    why: str


@dataclass(frozen=True)
class HookState:
    """Whether a hook is in place in this process.

    Attributes:
        applied: None while its module has not been loaded here.
        problem: what is wrong, None if nothing.
    """

    target: str
    applied: bool | None
    problem: str | None


_problems: dict[str, str] = {}
_armed: tuple[Hook, ...] = ()


def arm(hooks: Iterable[Hook]) -> None:
    """Apply each hook as soon as its module is loaded."""
    global _armed
    _armed = tuple(hooks)
    for hook in _armed:
        when_imported(hook.module, partial(_apply, hook))


def problem_of(hook: Hook) -> str | None:
    """What is wrong with a hook's target in the installed SGLang, or None. Imports the target's module."""
    try:
        target = pkgutil.resolve_name(hook.target)
    except (AttributeError, ImportError) as error:
        return f"{hook.target} does not exist ({error})"
    parameters = tuple(inspect.signature(target).parameters)
    if parameters != hook.parameters:
        return f"{hook.target} takes {parameters}, expected {hook.parameters}"
    return None


def states() -> list[HookState]:
    """The state of every armed hook in this process."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    result = []
    for hook in _armed:
        problem = _problems.get(hook.target)
        applied = True if hook.target in HookRegistry._patched else (False if problem else None)
        result.append(HookState(hook.target, applied, problem))
    return result


def _apply(hook: Hook, module: ModuleType) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    problem = problem_of(hook)
    if problem is None:
        HookRegistry.register(hook.target, hook.function, HookType(hook.kind))
        HookRegistry.apply_hooks()
        if hook.target not in HookRegistry._patched:
            problem = f"{hook.target} could not be patched; SGLang's log says why"
    if problem is not None:
        _problems[hook.target] = problem
        logger.error("rksc: %s. This build hooks SGLang %s; `rksc doctor` shows all targets.", problem, SGLANG_VERSION)


def describe() -> dict[str, dict[str, Any]]:
    """:func:`states` as plain values, for reports."""
    return {state.target: {"applied": state.applied, "problem": state.problem} for state in states()}
