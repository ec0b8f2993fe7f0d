"""What a wheel has beside the package: the programs and benchmarks, under the package's name.

Only in wheels that are installed for good: an editable install finds them in the checkout. (Hatch can rewrite paths by
settings alone, but then refuses editable installs.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LEFT_OUT = {"__pycache__", "results"}  # results are of the machine that made them


class BundleHook(BuildHookInterface):
    """Puts ``programs`` and ``benchmarks`` where ``rksc_sgl.bundled`` looks for them."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            root = Path(self.root)
            for path in (*(root / "programs").rglob("*"), *(root / "benchmarks").rglob("*")):
                place = path.relative_to(root)
                if path.is_file() and not LEFT_OUT & set(place.parts):
                    build_data["force_include"][str(path)] = f"rksc_sgl/bundled/{place.as_posix()}"
