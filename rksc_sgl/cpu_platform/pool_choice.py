"""How much memory a server's weights and KV may take, so that the machine does not swap.

SGLang gives its KV pool what is free after loading, less a share of what was free before. What is free is asked of the
system and of the control groups that this process is in (containers, batch systems); a part of it is left for what a
pass computes on the way, SGLang's other processes, and whatever else runs here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rksc_sgl.errors import TooLittleMemoryError

logger = logging.getLogger(__name__)

LEFT_SHARE = 0.15  # of what is free before loading stays free
LEFT_AT_LEAST = 1.5e9  # bytes
HIGHEST = 0.98  # fraction that SGLang is told
_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Budget:
    """Memory in bytes.

    Attributes:
        free: what this process may still use, by the system and its control groups.
        left: what of it is not given to the server's weights and KV.
    """

    free: int
    left: int

    @property
    def given(self) -> int:
        return self.free - self.left

    @classmethod
    def of(cls, free: int) -> Budget:
        return cls(free, int(max(LEFT_SHARE * free, LEFT_AT_LEAST)))

    def fraction(self, ranks: int, weights: int, measured: float, *, limited: bool = False) -> float:
        """SGLang's ``mem_fraction_static`` with which the pools of all ranks get what the weights leave of this.

        Args:
            ranks: each has a pool of its own and a part of the weights.
            weights: bytes of all of them.
            measured: bytes that SGLang takes for free before loading.
            limited: the pools' size was given; this is only an upper bound.

        Raises:
            TooLittleMemoryError: the weights leave nothing, and nobody said how large the pool is to be.
        """
        if weights >= self.given and not limited:
            raise TooLittleMemoryError(
                f"the model's weights take {weights / 1e9:.1f} GB; {self.free / 1e9:.1f} GB are free here, of which "
                f"{self.left / 1e9:.1f} GB are to stay free. Take a smaller model or free some memory; "
                "--mem-fraction-static or --max-total-tokens serve it all the same"
            )
        return min(HIGHEST, (max(0, self.given - weights) / ranks + weights) / measured)


def free_memory(membership: Path = _MEMBERSHIP, groups: Path = _GROUPS) -> int:
    """Bytes that this process can take before the system swaps or a control group's limit is reached."""
    return min([psutil.virtual_memory().available, *_free_of_groups(membership, groups)])


def _free_of_groups(membership: Path, groups: Path) -> Iterator[int]:
    """What each control group over this process leaves. A limit that is none is larger than any memory."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = (
                groups / "memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        inner = root / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group != root and root not in group.parents:
                break
            free = _free_of_group(group, *names)
            if free is not None:
                yield free


def _free_of_group(group: Path, limit: str, used: str, reclaimable: str) -> int | None:
    try:
        most, now = (group / limit).read_text().strip(), int((group / used).read_text())
        statistics = (group / "memory.stat").read_text().split()
    except OSError:  # this group has no limit of its own, or is not visible from a container
        return None
    if most == "max":
        return None
    of_files = dict(zip(statistics[::2], statistics[1::2], strict=True)).get(reclaimable, "0")
    return max(0, int(most) - now + int(of_files))


def bytes_of_weights(model_path: str, compiled: bool) -> int:
    """What a model's weights will take, 0 where its files are not in a directory here.

    Args:
        compiled: weights are held as they are in the files; otherwise in float32 beside a copy.
    """
    files = [*Path(model_path).glob("*.safetensors")] if Path(model_path).is_dir() else []
    size = sum(file.stat().st_size for file in files)
    return size if compiled else 2 * size * (4 // _bytes_of_a_number(Path(model_path)))


def _bytes_of_a_number(model: Path) -> int:
    try:
        config = json.loads((model / "config.json").read_text())
    except OSError:
        return 4
    return 2 if (config.get("dtype") or config.get("torch_dtype")) in ("bfloat16", "float16") else 4


def memory_fraction(server_args: Any) -> float:
    """``mem_fraction_static`` for a server that was not given any; the log says what it takes.

    Raises:
        TooLittleMemoryError: the weights leave nothing for KV.
    """
    from sglang.srt.utils import get_available_gpu_memory

    from rksc_sgl.cpu_platform.native import build

    budget = Budget.of(free_memory())
    weights = bytes_of_weights(server_args.model_path, build.library() is not None)
    ranks = server_args.tp_size * server_args.pp_size * server_args.dp_size
    measured = get_available_gpu_memory("cpu", 0) * (1 << 30)
    fraction = budget.fraction(ranks, weights, measured, limited=server_args.max_total_tokens is not None)
    logger.info(
        "%.1f GB are free; weights and KV get up to %.1f GB, %.1f GB stay free (mem_fraction_static %.3f)",
        *(budget.free / 1e9, budget.given / 1e9, budget.left / 1e9, fraction),
    )
    return fraction


def pool_text(server_info: dict[str, Any]) -> str:
    """What a running server took for weights and KV, in one line, from its ``/server_info``."""
    used = server_info["internal_states"][0]["memory_usage"]
    weights, pool = (used[name] * (1 << 30) / 1e9 for name in ("weight", "kvcache"))
    return (
        f"memory: weights {weights:.1f} GB, KV pool up to {pool:.1f} GB for {used['token_capacity']} tokens; "
        f"{free_memory() / 1e9:.1f} GB free now"
    )
