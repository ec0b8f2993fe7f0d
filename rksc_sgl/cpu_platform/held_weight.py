"""A weight that is held once: in panels, in the type that its checkpoint has.

A 16-bit checkpoint's numbers are float32 numbers too, so that nothing is lost when they stay in 16 bits and all
arithmetic is float32: a decode step then reads half as much. :class:`Held` is where the numbers are. To SGLang
:class:`HeldWeight` is a parameter ``[out, in]`` of float32: whoever reads it gets a float32 copy, and what is written
to it as a whole is stored. Layers do neither: they send rows through the panels, see
:mod:`~rksc_sgl.cpu_platform.packed_linear`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from rksc_sgl.cpu_platform.mapped_memory import mapped_zeros
from rksc_sgl.cpu_platform.native.linear import TYPES, PanelWeight
from rksc_sgl.errors import HeldWeightError


def exact_type(stored: torch.dtype | None, more: torch.dtype) -> torch.dtype:
    """The smallest type of :data:`TYPES` that has the numbers of ``stored`` (None: there are none yet) and ``more``."""
    if more not in TYPES:
        return torch.float32
    return more if stored in (None, more) else torch.float32


class Held:
    """The numbers of one weight, in rows or in panels, never in both.

    Rows are what a loader writes to, one tensor of the checkpoint after another; they are packed when the next weight
    is written to, or when this one is used. So loading takes little more memory than the weights themselves.

    Args:
        outputs, inputs: its shape.
        declared: the type that a checkpoint's configuration names. It holds for made-up numbers (``--load-format
            dummy``); what is loaded brings its own.
        in_rows: it stays in rows, as an embedding that is only looked up does.
    """

    _written: weakref.ref[Held] | None = None  # the one that lies in rows because it was written to last

    def __init__(
        self, outputs: int, inputs: int, *, declared: torch.dtype = torch.float32, in_rows: bool = False
    ) -> None:
        self.shape = (outputs, inputs)
        self.declared, self.in_rows = exact_type(None, declared), in_rows
        self._rows: torch.Tensor | None = None
        self._panels: PanelWeight | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that its numbers are stored in; None before there are any."""
        there = self._rows if self._rows is not None else self._panels
        return None if there is None else there.dtype

    def to_write(self, dtype: torch.dtype) -> torch.Tensor:
        """Its rows ``[out, in]``, to be written to, in a type that has all numbers of ``dtype`` and its own.

        They are zeros where nothing was written.
        """
        last = None if Held._written is None else Held._written()
        if last is not None and last is not self:
            last.pack()
        Held._written = weakref.ref(self)
        wanted = exact_type(self.dtype, dtype)
        if self._rows is None:
            there = self._panels
            self._rows = mapped_zeros(self.shape, wanted, whole=True) if there is None else there.unpacked()
            self._panels = None
        self._rows = self._rows.to(wanted)
        return self._rows

    def replace(self, numbers: torch.Tensor) -> None:
        """All of it is ``numbers`` ``[out, in]``, in their type where that is one of :data:`TYPES`."""
        if numbers.shape != self.shape:
            raise ValueError(f"a weight {list(self.shape)} cannot become one of {list(numbers.shape)}")
        self._rows = self._panels = None
        self.to_write(numbers.dtype).copy_(numbers)
        self.pack()

    def pack(self) -> None:
        """Into panels, unless it stays in rows."""
        if not self.in_rows and self._rows is not None:
            self._panels, self._rows = PanelWeight.of(self._rows), None

    def panels(self) -> PanelWeight:
        """Its panels; from now on it is held in them."""
        self.in_rows = False
        if self._panels is None:
            self.to_write(self.dtype or self.declared)
            self.pack()
        assert self._panels is not None, "a weight is held where there is a library"
        return self._panels

    def lookup(self, numbers: torch.Tensor) -> torch.Tensor:
        """Rows, float32 ``[..., in]``, for numbers ``[...]``."""
        if self._rows is not None:
            return torch.nn.functional.embedding(numbers, self._rows).to(torch.float32)
        return self.panels().rows(numbers)

    def float32(self) -> torch.Tensor:
        """A copy of all of it, float32 ``[out, in]``."""
        if self._rows is not None:
            return self._rows.to(torch.float32, copy=True)
        return torch.zeros(self.shape) if self._panels is None else self._panels.unpacked().to(torch.float32)


class HeldWeight(torch.Tensor):
    """A float32 tensor ``[out, in]`` whose numbers are :class:`Held` elsewhere.

    Every operation works on a float32 copy. An operation in place on the whole tensor stores its result; one on a part
    of it (``weight[3:].fill_(0)``) changes only a copy, so that loaders go through :func:`load_into`.

    Raises:
        HeldWeightError: it is the target of an operation that cannot be stored (``out=``).
    """

    held: Held

    @staticmethod
    def __new__(cls, held: Held) -> HeldWeight:
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=torch.float32, device="cpu")
        made.held = held
        return made

    def __init__(self, held: Held) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"HeldWeight({list(self.shape)}, {self.held.dtype})"

    def numpy(self, *, force: bool = False) -> Any:
        return self.held.float32().numpy()

    def tolist(self) -> Any:
        return self.held.float32().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A view of a parameter is no inference tensor, also where one is asked for in inference mode.
        mode = torch.inference_mode(torch.is_inference_mode_enabled() and not func.is_view)
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            with mode:
                return cls(args[0].held)
        if func is torch.ops.aten.embedding.default and isinstance(args[0], cls):
            return args[0].held.lookup(args[1])
        if not func._schema.is_mutable:
            with mode:
                return func(*_copied(args), **{name: _copied(value) for name, value in kwargs.items()})
        target = args[0] if isinstance(args[0], cls) else None
        if target is None and any(
            isinstance(kwargs.get(one.name), cls) for one in func._schema.arguments if one.is_out
        ):
            raise HeldWeightError(f"{func}: what is written to a weight in panels in this way would be lost")
        others = _copied(args[1:])
        if target is None:
            return func(args[0], *others, **kwargs)
        if func is torch.ops.aten.copy_.default:
            target.held.replace(others[0].expand(target.shape))
            return target
        result = target.held.float32()
        func(result, *others, **kwargs)
        target.held.replace(result if target.held.dtype is not None else result.to(target.held.declared))
        return target


def _copied(value: Any) -> Any:
    """Arguments with a float32 copy of each held weight among them."""
    if isinstance(value, HeldWeight):
        return value.held.float32()
    return type(value)(map(_copied, value)) if isinstance(value, (tuple, list)) else value


def held_of(layer: Any) -> Held | None:
    """Where the weight of one of SGLang's layers is held; None where it is an ordinary tensor."""
    return getattr(getattr(layer, "weight", None), "held", None)


def load_into(original: Callable[..., None]) -> Callable[..., None]:
    """A parameter's weight loader that writes to its rows, in a type that has the checkpoint's numbers."""

    def load(param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        target = torch.nn.Parameter(param.held.to_write(loaded_weight.dtype), requires_grad=False)
        target.__dict__.update((name, value) for name, value in param.__dict__.items() if name != "held")
        original(target, loaded_weight, *args, **kwargs)

    return load


def float32_rows(layer: Any) -> torch.Tensor:
    """A layer's weight ``[out, in]`` as an ordinary float32 tensor: itself, or a copy where it is held otherwise.

    For who multiplies with all of it, as a rule that unembeds every layer does. The copy should not be kept for long.
    """
    held = held_of(layer)
    return layer.weight if held is None else held.float32()
