"""Attention for SGLang on a CPU: every distinct key is read once, however many sequences share it.

Per forward pass, :func:`~.plan.build_plan` finds out on the host which slots the sequences of a batch have in
common (``prefix_tree``), lays the reads out in tiles (``cover``, ``plan``) and every layer follows that plan
(``kernels``). ``reference`` is the same attention written out. Only ``backend`` knows SGLang.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from rksc_sgl.on_import import when_imported

BACKEND_NAME = "rksc_cpu"


def arm() -> None:
    """Make ``--attention-backend rksc_cpu`` known to SGLang, in the processes that load what it needs."""
    when_imported("sglang.srt.arg_groups.choices", _add_choice)
    when_imported("sglang.srt.layers.attention.attention_registry", _register)


def _add_choice(choices: ModuleType) -> None:
    if BACKEND_NAME not in choices.ATTENTION_BACKEND_CHOICES:
        choices.add_attention_backend_choices([BACKEND_NAME])


def _register(registry: ModuleType) -> None:
    def create(runner: Any) -> Any:
        from rksc_sgl.cpu_platform.attention.backend import RkscCpuAttnBackend

        return RkscCpuAttnBackend(runner)

    registry.register_attention_backend(BACKEND_NAME)(create)
