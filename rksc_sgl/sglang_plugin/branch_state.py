"""What we know of one of the scheduler's requests, and where it stands: ``req.rksc``, our only mark on a request.

A request that did not opt in has None there. The phases::

    NEW ──────────────▶ PLACED ──▶ PROBING ──▶ COMPUTED ──▶ FINISHED
     └──▶ HELD ──────────▲  ▲ ◀───────┤           │
          (waits for     │  └─────────┼───────────┘ retracted by SGLang
           its anchor)   └── MERGED ◀─┘
                            (left its batch, and comes back with its donor's prompt)

Any phase may end in FINISHED: a request can be aborted wherever it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from rksc_sgl.donors.forks import Donor, ForkKey
from rksc_sgl.options import RequestOptions, options_of
from rksc_sgl.placement.compare import Comparisons
from rksc_sgl.placement.report import SharingReport
from rksc_sgl.placement.values import BlendPlan, MergePlan
from rksc_sgl.sglang_plugin.passes import token_confidence
from rksc_sgl.sglang_plugin.placing.certified_blends import CertifiedBlend, under_certificate


class Phase(Enum):
    """Where a request stands with us."""

    NEW = auto()  # in the scheduler, not looked at
    HELD = auto()  # stays in the waiting queue until its anchor's KV is there
    PLACED = auto()  # decided: SGLang may schedule it
    PROBING = auto()  # in a pass of ours
    MERGED = auto()  # left its batch; not yet back in the queue
    COMPUTED = auto()  # its prompt is computed, and it generates
    FINISHED = auto()  # its last output has left the scheduler


_NEXT: dict[Phase, set[Phase]] = {
    Phase.NEW: {Phase.HELD, Phase.PLACED},
    Phase.HELD: {Phase.PLACED},
    Phase.PLACED: {Phase.PROBING, Phase.COMPUTED},
    Phase.PROBING: {Phase.PLACED, Phase.MERGED},  # PLACED: its results, or its next chunk, are still to come
    Phase.MERGED: {Phase.PLACED},
    Phase.COMPUTED: {Phase.PLACED},  # retracted, and queued again
    Phase.FINISHED: set(),
}


@dataclass(slots=True, eq=False)
class BranchState:
    """One request that opted in.

    Attributes:
        options: what it asked for.
        phase: where it stands; changed by :meth:`enter` only.
        waits_for: the prompt that it waits for while HELD.
        waits_until: how many of that prompt's tokens must be in the tree.
        waited_passes: scheduling steps that it was held for.
        arrived_s: when it was first made to wait for siblings that come with it; None where it was not.
        compared: its prompt beside donors; None before it was compared with one, and after it was placed.
        blended: it reads and writes the namespace of blended KV.
        shift: its tokens stand at so many positions later than from 0 on.
        blend: what it may take over.
        merge: whose prompt it may take; None once that is decided. While MERGED, the prompt that it takes.
        canonical_tokens: how much of its prompt is a donor's since it was merged.
        sharing: what is said of all that.
        exit_refusal: why this server has no early exits for a verification; empty where it has.
        exit: what is said of a verification's exit; None before its pass.
        warnings: what was not run of what it asked for, on a server that offers it all the same.
        confidence_refusal: why the confidence of its tokens is not measured, where it asked for that; else empty.
        confidences: of each of its tokens, where it asked for that; None for one that was not measured.
        confidences_told: how many of them have left the scheduler.
        fork: of which it is a request, as memory is kept for it; None before it was looked at, and where it is of none.
        arrival: of that fork, in the order of all.
        memory: what is said of all that.
        certified: it asked for ``auto`` and may be blended under this certificate; then ``options`` say how.
    """

    options: RequestOptions
    phase: Phase = Phase.NEW
    waits_for: Donor | None = None
    waits_until: int = 0
    waited_passes: int = 0
    arrived_s: float | None = None
    compared: Comparisons | None = None
    blended: bool = False
    shift: int = 0
    blend: BlendPlan | None = None
    merge: MergePlan | None = None
    canonical_tokens: int = 0
    sharing: SharingReport = field(default_factory=SharingReport)
    exit_refusal: str = ""
    exit: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    confidence_refusal: str = ""
    confidences: list[float | None] = field(default_factory=list)
    confidences_told: int = 0
    fork: ForkKey | None = None
    arrival: int | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    certified: CertifiedBlend | None = None

    def enter(self, phase: Phase) -> None:
        """Move on to another phase."""
        allowed = phase is Phase.FINISHED or phase in _NEXT[self.phase]
        assert allowed, f"a branch cannot go from {self.phase.name} to {phase.name}"
        self.phase = phase

    def note_confidence(self, index: int, value: float) -> None:
        """How sure the model was of its token at this place, counted from the first that it generated."""
        del self.confidences[index:]
        self.confidences += [None] * (index - len(self.confidences))
        self.confidences.append(value)

    def confidences_until(self, tokens: int) -> list[float | None]:
        """What was not told yet of this many first tokens; it counts as told."""
        told, self.confidences_told = self.confidences_told, tokens
        found = self.confidences[told:tokens]
        return found + [None] * (tokens - told - len(found))

    @property
    def is_undecided(self) -> bool:
        """Whether it waits in the queue and may still be given something."""
        return self.phase in (Phase.NEW, Phase.HELD)

    @property
    def is_leaving(self) -> bool:
        """Whether it left its batch and is not back in the queue yet."""
        return self.phase is Phase.MERGED

    @property
    def needs_pass(self) -> bool:
        """Whether there is something to do for it between the layers of its prefill."""
        exits = self.options.op == "verify" and not self.exit_refusal
        return exits or self.blend is not None or self.merge is not None


def attach_state(result: Any, scheduler: Any, recv_req: Any, *args: Any, **kwargs: Any) -> Any:
    """AFTER hook: a request that opted in gets its state when the scheduler makes it."""
    options = options_of(result.sampling_params.custom_params)
    if options is None:
        result.rksc = None
        return result
    options, certified = under_certificate(scheduler, options, len(result.origin_input_ids))
    refusal = token_confidence.install(scheduler) if options.confidence else ""
    result.rksc = BranchState(options, confidence_refusal=refusal, certified=certified)
    return result
