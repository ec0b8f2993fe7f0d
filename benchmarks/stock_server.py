"""A server on our CPU platform that computes as SGLang alone does: the baseline of ``benchmarks.cpu_decode``.

Every worker process is forked from this one, so the change is made in each of them.
"""

from __future__ import annotations

from sglang.srt.platforms.interface import SRTPlatform

from rksc_sgl.cpu_platform.platform import RkscCpuPlatform
from rksc_sgl.server_process import main

RkscCpuPlatform.init_backend = SRTPlatform.init_backend  # type: ignore[method-assign]
RkscCpuPlatform.post_load_model = SRTPlatform.post_load_model  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
