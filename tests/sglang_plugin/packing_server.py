"""A server on the CPU platform whose narrowed batches attend in the GPUs' packed operation, in Triton's interpreter.

Decoder layers are SGLang's own, which call their backend as they do everywhere. ``PACKING_RESULT`` names a file that
says how many layers were computed so.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sglang.srt.platforms.interface import SRTPlatform

from rksc_sgl.cpu_platform.platform import RkscCpuPlatform
from rksc_sgl.server_process import main
from rksc_sgl.sglang_plugin.passes import packing

RkscCpuPlatform.post_load_model = SRTPlatform.post_load_model  # type: ignore[method-assign]
packing.BACKENDS.add("RkscCpuAttnBackend")
packing.RkscCpuAttnBackend = type("NoBackend", (), {})  # type: ignore[misc, assignment]  # as if it were another one
packing.GAP = 0  # the plain computation joins no runs
_calls = 0
_original = packing.TritonPacking.forward_extend


def _counted(*args: Any, **kwargs: Any) -> Any:
    global _calls
    _calls += 1
    Path(os.environ["PACKING_RESULT"]).write_text(str(_calls))
    return _original(*args, **kwargs)


packing.TritonPacking.forward_extend = _counted  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
