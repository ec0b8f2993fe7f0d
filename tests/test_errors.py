"""Every error is in one tree, and the tree that is drawn is the one that there is."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys

import pytest

import rksc_sgl
from rksc_sgl import errors
from rksc_sgl.errors import RkscError

_NODE = re.compile(r"^    ((?:│   |    )*)(?:├── |└── )(\w+) +\S")


def drawn() -> dict[str, str]:
    """Parent of each error in the docstring's tree."""
    above = ["RkscError"]
    parents: dict[str, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        found = _NODE.match(line)
        if found:
            depth, name = len(found[1]) // 4, found[2]
            above = [*above[: depth + 1], name]
            parents[name] = above[-2]
    return parents


def descendants(of: type) -> list[type]:
    return [one for child in of.__subclasses__() for one in (child, *descendants(child))]


@pytest.mark.slow
def test_the_drawn_tree_holds_every_error_of_every_module_and_all_are_in_one_place() -> None:
    for module in pkgutil.walk_packages(rksc_sgl.__path__, "rksc_sgl."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    ours = [one for one in descendants(RkscError) if one.__module__.startswith("rksc_sgl")]
    assert {one.__module__ for one in ours} == {"rksc_sgl.errors"}
    parents = {
        one.__name__: next(base.__name__ for base in one.__bases__ if issubclass(base, RkscError)) for one in ours
    }
    assert drawn() == parents
    assert {one.__name__ for one in _exceptions_of_our_modules()} == {"RkscError", *parents}


def _exceptions_of_our_modules() -> set[type]:
    """Exceptions that our modules define; no warnings, nor signals within a worker, which nobody catches."""
    return {
        value
        for name, module in list(sys.modules.items())
        if name.startswith("rksc_sgl") and module is not None
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Exception)
        and not issubclass(value, Warning)
        and value.__module__.startswith("rksc_sgl")
    }
