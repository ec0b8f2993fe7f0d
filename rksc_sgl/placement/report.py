"""What is said about how a branch shared, in ``meta_info["rksc"]``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(slots=True)
class SharingReport:
    """What was decided for one branch, and what came of it. None, or False, where there is nothing to say.

    Attributes:
        mode: ``blend`` once KV was taken over; otherwise the mode follows from what the request read.
        donor: the request whose KV or prompt was taken, or could have been.
        aligned_tokens: tokens of the branch that the donor has too.
        similarity: of hidden states: 1 - mean deviation of a blend's tokens, or the gate's score of a merge.
        probe_layers: layers that ran for every token; a fraction where one ran in part.
        taken_tokens: tokens whose KV was taken over, which is approximate.
        shared_slots: of these, those for which the donor's own slots are used, so that they take no memory.
        computed_tokens: tokens that were computed in every layer.
        recomputed_tokens: those of them that the donor has too.
        budget_tokens: what it counted against the budget of its prefill batch, where that is less than its length.
        replaced_tokens: tokens of the branch's own prompt that the donor's prompt replaced.
        alias_dropped: an earlier merge could not be followed, because its prompt left the cache.
        declined: why no more was shared: few fixed words, for it labels a counter.
    """

    mode: str | None = None
    donor: str | None = None
    aligned_tokens: int | None = None
    similarity: float | None = None
    probe_layers: float | None = None
    taken_tokens: int | None = None
    shared_slots: int | None = None
    computed_tokens: int | None = None
    recomputed_tokens: int | None = None
    budget_tokens: int | None = None
    replaced_tokens: int | None = None
    alias_dropped: bool = False
    declined: str | None = None

    def decline(self, reason: str, *, donor: str | None = None, aligned_tokens: int | None = None) -> None:
        """Say why no more was shared, and with whom it could have been."""
        self.declined = reason
        self.donor = donor if donor is not None else self.donor
        self.aligned_tokens = aligned_tokens if aligned_tokens is not None else self.aligned_tokens

    @property
    def is_empty(self) -> bool:
        """Whether nothing was said yet."""
        return not self.to_plain()

    def to_plain(self) -> dict[str, Any]:
        """What there is to say, by name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if value is not None and value is not False}
