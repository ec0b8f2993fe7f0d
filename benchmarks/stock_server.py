"""A server on our CPU platform that computes as SGLang alone does: the baseline of ``benchmarks.cpu_decode``.

Every worker process imports this module too, so the change is made in each of them.
"""

from __future__ import annotations

import sys

from sglang.srt.platforms.interface import SRTPlatform

from rksc_sgl.cpu_platform.platform import RkscCpuPlatform
from rksc_sgl.parent_death import end_with_parent
from rksc_sgl.server_process import serve_here

RkscCpuPlatform.post_load_model = SRTPlatform.post_load_model  # type: ignore[method-assign]

if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    serve_here(sys.argv[2:])
