"""Our server with every operation and every synchronization of its prefills counted, for ``pass_cost``.

Every worker process is forked from this one. ``GET /rksc/info`` has the last passes among what the scheduler reports,
as ``passes``. Decoder layers are SGLang's own, so that each of their operations is seen: what is compiled into one call
on our CPU platform are many launches elsewhere. An attention backend's call is one operation, whatever it does inside.

An operation is what PyTorch is asked for, views of a tensor included; a launch is one that computes or copies. A
synchronization is a read of a tensor by the host. On a CPU nothing tells a tensor of the device from one of the host,
so that every read counts, but of what was brought to the host before and of what the CPU platform itself reads.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rksc_sgl.on_import import when_imported
from rksc_sgl.options import KEY
from rksc_sgl.server_process import main
from rksc_sgl.sglang_plugin.inspection import report
from rksc_sgl.sglang_plugin.wiring import hooks

READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")
BEFORE, AFTER, ATTENTION = "before", "after", "attention"
KEPT = 16  # passes
_OF_A_TENSOR = "rksc_on_host"  # marks what was brought to the host


@dataclass
class PassCounts:
    """What one pass did, by place: ``before``, ``layer N`` (from 0), ``between N`` (before that layer), ``after``."""

    rows: int
    operations: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    reads: list[tuple[str, str]] = field(default_factory=list)  # place, and who read

    def to_plain(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "rows": self.rows,
            "operations": dict(self.operations),
            "launches": dict(self.launches),
            "reads": [list(one) for one in self.reads],
        }


class Counting(TorchDispatchMode):
    """Counts while it is active and not paused."""

    def __init__(self, counts: PassCounts) -> None:
        super().__init__()
        self.counts, self.place, self.paused = counts, BEFORE, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.paused:
            self._count(func, args, kwargs or {}, result)
        return result

    def _count(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        given, made = _tensors((args, kwargs)), _tensors(result)
        if (
            given
            and all(hasattr(one, _OF_A_TENSOR) or not one.ndim for one in given)
            and any(hasattr(one, _OF_A_TENSOR) for one in given)
        ):
            for one in made:
                setattr(one, _OF_A_TENSOR, True)
            return  # arithmetic of the host
        if func.overloadpacket in (torch.ops.aten.lift_fresh, torch.ops.aten.detach):
            return  # what torch.tensor and .data are made of
        self.counts.operations[self.place] += 1
        sources = {one.untyped_storage().data_ptr() for one in given}
        is_view = not func._schema.is_mutable and any(one.untyped_storage().data_ptr() in sources for one in made)
        if not is_view:
            self.counts.launches[self.place] += 1
        masks = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
        if masks and any(one is not None and one.dtype == torch.bool for one in args[1]):
            self.read("an index by a mask")

    def transferred(self, tensor: torch.Tensor) -> torch.Tensor:
        """Something of the host on the device: one operation, which the host does not wait for."""
        if self.paused:
            return tensor
        self.counts.operations[self.place] += 1
        self.counts.launches[self.place] += 1
        self.paused = True
        try:
            return tensor.view_as(tensor)
        finally:
            self.paused = False

    def read(self, what: str) -> None:
        """The host waits for the device, unless it is the CPU platform that asks."""
        if self.paused:
            return
        asker = _asker(sys._getframe(1))
        if "/cpu_platform/" not in asker:
            self.counts.reads.append((self.place, f"{what}: {asker}"))

    @contextmanager
    def inside(self, place: str, after: str) -> Iterator[None]:
        """What happens here is of a place, and what comes then of another."""
        self.place = place
        try:
            yield
        finally:
            self.place = after


_active: list[Counting] = []
_passes: deque[PassCounts] = deque(maxlen=KEPT)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [found for part in value for found in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _asker(frame: FrameType | None) -> str:
    """The nearest file and line that is neither PyTorch's nor ours here."""
    while frame is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return "nobody" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _watch_reads() -> None:
    for name in READS:
        setattr(torch.Tensor, name, _watched(name, getattr(torch.Tensor, name)))
    whither, from_numpy = torch.Tensor.to, torch.from_numpy

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        target = args[0] if args else kwargs.get("device")
        if not _active or not isinstance(target, (str, torch.device)):
            return whither(self, *args, **kwargs)
        if target == "cpu":  # by this name the host is meant, by a tensor's device the device
            return whither(self if hasattr(self, _OF_A_TENSOR) else self.cpu(), *args, **kwargs)
        result = whither(self, *args, **kwargs)
        return _active[-1].transferred(result) if hasattr(self, _OF_A_TENSOR) else result

    def marked(array: Any) -> torch.Tensor:
        result = from_numpy(array)
        setattr(result, _OF_A_TENSOR, True)
        return result

    torch.Tensor.to = to  # type: ignore[method-assign]
    torch.from_numpy = marked  # type: ignore[assignment]


def _watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _active or hasattr(self, _OF_A_TENSOR):
            return original(self, *args, **kwargs)
        counting = _active[-1]
        counting.read(name)
        before, counting.paused = counting.paused, True
        try:
            result = original(self, *args, **kwargs)
            if isinstance(result, torch.Tensor):
                result = result.view_as(result)
                setattr(result, _OF_A_TENSOR, True)
        finally:
            counting.paused = before
        return result

    return read


def _arm_runner(module: ModuleType) -> None:
    forward = module.ModelRunner.forward

    def counted(runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        if not forward_batch.forward_mode.is_extend():
            return forward(runner, forward_batch, *args, **kwargs)
        _watch_layers(runner)
        counting = Counting(PassCounts(int(forward_batch.input_ids.shape[0])))
        _active.append(counting)
        try:
            with counting:
                return forward(runner, forward_batch, *args, **kwargs)
        finally:
            _active.pop()
            _passes.append(counting.counts)

    module.ModelRunner.forward = counted


def _arm_attention(module: ModuleType) -> None:
    forward = module.RadixAttention.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        if not _active or _active[-1].paused:
            return forward(*args, **kwargs)
        counting = _active[-1]
        counting.counts.operations[counting.place] += 1
        counting.counts.launches[counting.place] += 1
        counting.paused = True
        try:
            return forward(*args, **kwargs)
        finally:
            counting.paused = False

    module.RadixAttention.forward = counted


def _watch_layers(runner: Any) -> None:
    layers = runner.model.model.layers
    if hasattr(layers[0], "rksc_counted"):
        return
    for number, layer in enumerate(layers):
        after = AFTER if number + 1 == len(layers) else f"between {number + 1}"
        layer.rksc_counted, layer.forward = True, _in_layer(layer.forward, f"layer {number}", after)


def _in_layer(forward: Callable[..., Any], place: str, after: str) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        if not _active:
            return forward(*args, **kwargs)
        with _active[-1].inside(place, after):
            return forward(*args, **kwargs)

    return counted


def with_passes(result: Any, controller: Any, recv_req: Any) -> Any:
    """What the scheduler reports, with the passes since it was last asked."""
    report.add_internal_state(result, controller, recv_req)
    result.internal_state[KEY]["passes"] = [one.to_plain() for one in _passes]
    _passes.clear()
    return result


def _counted(hook: hooks.Hook) -> hooks.Hook:
    import dataclasses

    return dataclasses.replace(hook, function=with_passes) if hook.function is report.add_internal_state else hook


if __name__ == "__main__":
    from sglang.srt.platforms.interface import SRTPlatform

    from rksc_sgl.cpu_platform.platform import RkscCpuPlatform

    RkscCpuPlatform.init_backend = SRTPlatform.init_backend  # type: ignore[method-assign]
    RkscCpuPlatform.post_load_model = SRTPlatform.post_load_model  # type: ignore[method-assign]
    hooks.HOOKS = tuple(map(_counted, hooks.HOOKS))
    _watch_reads()
    when_imported("sglang.srt.model_executor.model_runner", _arm_runner)
    when_imported("sglang.srt.layers.radix_attention", _arm_attention)
    main()
