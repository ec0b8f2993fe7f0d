"""The platform object that SGLang consults for device facts and server defaults."""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class RkscCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Any x86-64 or Arm CPU, served by plain PyTorch operations."""

    # Out of tree, not CPU: SGLang's own CPU paths import a compiled sgl_kernel that needs AMX or CUDA.
    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Defaults with which ``--model-path M`` alone is enough."""
        if server_args.device in (None, "auto"):
            server_args.device = "cpu"
        if server_args.dtype == "auto":
            server_args.dtype = "float32"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> Any:
        import torch

        return torch.profiler.ProfilerActivity.CPU
