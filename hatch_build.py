"""What a wheel has beside the package: the programs and benchmarks, under the package's name.

Only in wheels that are installed for good: an editable install finds them in the checkout. (Hatch can rewrite paths by
settings alone, but then refuses editable installs.)
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BundleHook(BuildHookInterface):
    """Puts ``programs`` and ``benchmarks`` where ``rksc_sgl.bundled`` looks for them."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            for name in ("programs", "benchmarks"):
                build_data["force_include"][name] = f"rksc_sgl/bundled/{name}"
