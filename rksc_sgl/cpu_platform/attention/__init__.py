"""Attention for SGLang on a CPU: every distinct key is read once, however many sequences share it.

Per forward pass, :func:`~.plan.build_plan` finds out on the host which slots the sequences of a batch have in
common (``prefix_tree``), lays the reads out in tiles (``cover``, ``plan``) and every layer follows that plan
(``kernels``). ``reference`` is the same attention written out. Only ``backend`` knows SGLang.
"""

from __future__ import annotations

BACKEND_NAME = "rksc_cpu"


def register_attention_backend_rksc_cpu() -> None:
    """Make ``--attention-backend rksc_cpu`` known to SGLang; calling it again changes nothing."""
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.server_args import add_attention_backend_choices

    if BACKEND_NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([BACKEND_NAME])

    @register_attention_backend(BACKEND_NAME)
    def create_rksc_cpu_backend(runner):  # type: ignore[no-untyped-def]
        from .backend import RkscCpuAttnBackend

        return RkscCpuAttnBackend(runner)
