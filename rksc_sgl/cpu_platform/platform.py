"""The platform object that SGLang consults for device facts and server defaults."""

from __future__ import annotations

import logging
import os
from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from rksc_sgl.cpu_platform import attention

logger = logging.getLogger(__name__)

_BINDING = "SGLANG_CPU_OMP_THREADS_BIND"
DEFAULT_MAX_RUNNING_REQUESTS = 256
DEFAULT_CHUNKED_PREFILL = 2048


class RkscCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Any x86-64 or Arm CPU, served by plain PyTorch operations."""

    # Out of tree, not CPU: SGLang's own CPU paths import a compiled sgl_kernel that needs AMX or CUDA.
    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Defaults with which ``--model-path M`` alone is enough; what the user gave stays."""
        defaults = {
            "device": "cpu",
            "dtype": "float32",
            "max_running_requests": DEFAULT_MAX_RUNNING_REQUESTS,
            "chunked_prefill_size": DEFAULT_CHUNKED_PREFILL,
        }
        for name, value in defaults.items():
            if getattr(server_args, name) in (None, "auto"):
                setattr(server_args, name, value)
        if server_args.mem_fraction_static is None:
            from rksc_sgl.cpu_platform.pool_choice import memory_fraction

            server_args.mem_fraction_static = memory_fraction(server_args)
        # An idle scheduler that polls takes a core from those that work: clients, the tokenizer, other servers.
        server_args.sleep_on_idle = True
        ranks = server_args.tp_size * server_args.pp_size * server_args.dp_size
        if ranks > 1 and not os.environ.get(_BINDING):
            os.environ[_BINDING] = cores_of_ranks(sorted(_usable_cores()), ranks)
        # SGLang has filled this in for every CPU by now (intel_amx, or torch_native on Arm): ask what was given.
        if (getattr(server_args, "_raw_input", None) or {}).get("attention_backend") is None:
            server_args.attention_backend = attention.BACKEND_NAME

    def get_device(self, device_id: int = 0) -> str:
        # The in-tree mixin returns a torch.device; server arguments want the string.
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return attention.BACKEND_NAME

    def get_kv_pool_cls(self, *, kind: Any) -> type | None:
        if kind != "mha":
            return None
        from rksc_sgl.cpu_platform.kv_pool import LazyMHATokenToKVPool

        return LazyMHATokenToKVPool

    def init_backend(self) -> None:
        from rksc_sgl.cpu_platform.packed_linear import hold_from_the_start

        hold_from_the_start()

    def post_load_model(self, model: Any) -> None:
        from rksc_sgl.cpu_platform.lean_layers import use_lean_layers
        from rksc_sgl.cpu_platform.packed_linear import use_packed_linear

        logger.info("weights are %s", use_packed_linear(model))
        model.rksc_decoder_layers = use_lean_layers(model)
        logger.info("decoder layers are %s", model.rksc_decoder_layers)

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> Any:
        import torch

        return torch.profiler.ProfilerActivity.CPU


def cores_of_ranks(cores: list[int], ranks: int) -> str:
    """The cores that each rank works on, as SGLang wants them in an environment variable: ``0,1|2,3``.

    SGLang itself gives each rank a NUMA node and refuses more ranks than nodes. Here the cores are dealt out in
    equal parts; with more ranks than cores, ranks share them.
    """
    share = max(1, len(cores) // ranks)
    parts = [[cores[(rank * share + place) % len(cores)] for place in range(share)] for rank in range(ranks)]
    return "|".join(",".join(map(str, part)) for part in parts)


def _usable_cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
