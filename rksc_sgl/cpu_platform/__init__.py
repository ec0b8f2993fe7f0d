"""SGLang's runtime on a plain CPU: no AMX, no sgl_kernel, no CUDA.

SGLang asks every ``sglang.srt.platforms`` entry point for a platform class. A lone answer wins even over
CUDA, so :func:`activate` answers only where no accelerator is present, or where it was asked for by name.
"""

from __future__ import annotations

import os

PLATFORM_NAME = "rksc_cpu"
PLATFORM_CLASS = "rksc_sgl.cpu_platform.platform.RkscCpuPlatform"


def accelerator_present() -> str | None:
    """Name of the accelerator that PyTorch sees, or None."""
    import torch

    for name in ("cuda", "xpu", "npu", "musa", "mps"):
        module = getattr(torch, name, None)
        if module is not None and getattr(module, "is_available", lambda: False)():
            return name
    return None


def activate() -> str | None:
    """Entry point: the platform's class path, or None where SGLang's own platforms should serve.

    ``SGLANG_PLATFORM=rksc_cpu`` forces it; ``SGLANG_USE_CPU_ENGINE=1`` asks for SGLang's own CPU engine and is
    respected.
    """
    if os.environ.get("SGLANG_PLATFORM") == PLATFORM_NAME:
        return PLATFORM_CLASS
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    return None if accelerator_present() else PLATFORM_CLASS


def in_use() -> bool:
    """Whether the platform that SGLang has chosen in this process is ours. Imports SGLang's platforms."""
    from sglang.srt.platforms import current_platform

    return type(current_platform).__module__.startswith("rksc_sgl.")
