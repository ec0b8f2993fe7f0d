"""What placement is given and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from rksc_sgl.donors.forks import Donor, ForkKey, Namespace
from rksc_sgl.options import RequestOptions
from rksc_sgl.placement.report import SharingReport
from rksc_sgl.placement.worth import LEAST_TOKENS


@dataclass(frozen=True, eq=False)
class Branch:
    """A request that waits to be placed.

    Attributes:
        options: what it asked for.
        ids: int64 ``[n]`` its prompt.
        namespace: what SGLang keeps its KV apart by.
        exact, blended: how many of its tokens the tree has under its own key, and under that of blended KV.
        fixed: why its prompt cannot be replaced by another; empty if it can.
        whole: why every layer of every token must be computed for it; empty if not.
        shift: at how many positions later than from 0 on the blended KV stands.
        most_shift: at how many positions later its KV may stand, for there to be room for what it generates; 0 where
            slots have one owner, so that nothing is gained by it.
    """

    options: RequestOptions
    ids: NDArray[np.int64]
    namespace: Namespace
    exact: int
    blended: int
    fixed: str = ""
    whole: str = ""
    shift: int = 0
    most_shift: int = 0

    @property
    def little_left(self) -> bool:
        """Whether so few tokens are left to compute that neither a blend nor the second step of a merge pays."""
        return self.ids.size - max(self.exact, self.blended) < LEAST_TOKENS

    @property
    def key(self) -> ForkKey | None:
        """Its fork; None without a group."""
        return None if self.options.group is None else ForkKey(self.options.group, *self.namespace)

    @property
    def reads_blended(self) -> bool:
        """Whether blended KV of this very prompt is there, and more of it than of exact KV."""
        return self.blended > self.exact


@dataclass(frozen=True, eq=False)
class Resident:
    """A donor, and how much of it the tree has.

    Attributes:
        donor: whose prompt.
        cached: its tokens, from the first on, that are there.
    """

    donor: Donor
    cached: int

    def is_whole(self, page: int) -> bool:
        """Whether all of it is there, but for a part of a page."""
        return self.cached > self.donor.tokens.size - page

    def is_lost(self, minimum_span: int) -> bool:
        """Whether nothing is there that a branch could take."""
        return self.cached < min(self.donor.tokens.size - 1, minimum_span)


@dataclass(frozen=True)
class ForkFacts:
    """What a fork has for one more of its branches.

    Attributes:
        anchor: the prompt that is being prefilled, and whose KV siblings may wait for.
        donors: prompts whose KV is there, oldest first.
        anchor_gone: there was an anchor until now, and it ended before its KV was in the tree.
        donors_gone: there were donors until now, and the KV of all of them is gone.
        siblings: its branches that wait in the queue, with the one that is being placed, without the anchor.
    """

    anchor: Donor | None = None
    donors: tuple[Resident, ...] = ()
    anchor_gone: bool = False
    donors_gone: bool = False
    siblings: int = 1


@dataclass(frozen=True, eq=False)
class BlendPlan:
    """What a branch may take over.

    Attributes:
        donor: whose KV.
        extra_key: the donor's namespace in the tree.
        source: int64 ``[n]``, the donor position of each token of the branch, -1 where there is none.
        always: bool ``[n]``, tokens that are computed also where the donor has them: after breaks.
        options: of the request.
        shift: its tokens stand at positions from here on, so that most stand where they do in the donor.
    """

    donor: Donor
    extra_key: str | None
    source: NDArray[np.int64]
    always: NDArray[np.bool_]
    options: RequestOptions
    shift: int = 0

    def computed(self, begin: int) -> int:
        """How many of its tokens, from ``begin`` on, go through all layers, as far as is known before the probe."""
        candidates = self.source[begin:] >= 0
        leading = int((candidates & self.always[begin:]).sum())
        moved = int(self.options.recompute * int(candidates.sum()))
        return int((~candidates).sum()) + max(leading, moved)


@dataclass(frozen=True, eq=False)
class MergePlan:
    """Whose prompt a branch may take in place of its own: the content guard agreed, the similarity is to be measured.

    Attributes:
        donor: the prompt that asks the same.
        extra_key: the donor's namespace in the tree.
        key: the fork in which the merge is remembered; None for a request without a group.
        tau: the least similarity.
        centre: ``[probe layers, heads * size]`` what the values of all prompts have in common; None until it is
            computed.
    """

    donor: Donor
    extra_key: str | None
    key: ForkKey | None
    tau: float
    centre: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Placement:
    """What a branch gets.

    Attributes:
        waits_for: it goes on waiting for this prompt; nothing else is decided then.
        waits_until: so many of that prompt's tokens must be in the tree before it is looked at again.
        is_anchor: its siblings may wait for it from now on.
        blended: it reads and writes the namespace of blended KV.
        shift: at how many positions later than from 0 on that KV stands.
        blend: what it may take over.
        merge: whose prompt it may take.
        adopts: a donor that its fork has from now on.
        report: what there is to say.
    """

    waits_for: Donor | None = None
    waits_until: int = 0
    is_anchor: bool = False
    blended: bool = False
    shift: int = 0
    blend: BlendPlan | None = None
    merge: MergePlan | None = None
    adopts: Donor | None = None
    report: SharingReport = field(default_factory=SharingReport)
