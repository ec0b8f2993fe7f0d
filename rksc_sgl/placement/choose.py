"""Where a waiting branch goes: it waits for an anchor, takes a donor's KV or prompt, or is prefilled as it is.

Pure: what is cached, which donors there are and what the server can do come in as values, and a
:class:`~rksc_sgl.placement.values.Placement` goes out. Whoever calls reads the tree and carries it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rksc_sgl.placement.compare import Comparison, Comparisons
from rksc_sgl.placement.report import SharingReport
from rksc_sgl.placement.values import BlendPlan, Branch, ForkFacts, MergePlan, Placement, Resident
from rksc_sgl.placement.worth import LEAST_TOKENS, NOT_FASTER, PassCost, faster_blending, worth_blending, worth_waiting

ANCHOR_GONE = "the anchor that it could have shared with is gone"
DONOR_GONE = "the KV of its donor is gone"
DONORS_GONE = "the KV of its donors is gone"
TOO_FEW = "too few tokens are left to compute"
TOO_FEW_ALIGN = "too few tokens align for what is cached"
TOO_FEW_TAKEN = "too few tokens would be taken over: recompute, and what follows a change, leave too little"
AUTO_IS_EXACT = "share auto takes identical prefixes only"
NOT_PROBED = "its batch could not be probed"
NO_GROUP = "without a group there is no donor"


@dataclass(frozen=True)
class Server:
    """What a server can do with prompts; found once, when it starts.

    Attributes:
        blend_refusal, merge_refusal: why it cannot blend or merge; empty if it can.
        probe_share: layers that a probe runs for every token, as a share of the model's.
        page: tokens of a page of KV.
        pass_cost: what a pass takes.
    """

    blend_refusal: str = ""
    merge_refusal: str = ""
    probe_share: float = 0.0
    page: int = 1
    pass_cost: PassCost = field(default_factory=PassCost)


def place_alone(branch: Branch) -> Placement:
    """A request without donors: a verification, or one that has neither a fork nor the whole cache."""
    if branch.options.op == "branch" and branch.options.merges:
        return Placement(report=SharingReport(declined=NO_GROUP))
    return _reading(branch)


def _reading(branch: Branch) -> Placement:
    """As it is, from what blended KV there is of it."""
    return Placement(blended=branch.reads_blended, shift=branch.shift if branch.reads_blended else 0)


def place_beside(branch: Branch, donors: Sequence[Resident], server: Server, compared: Comparisons) -> Placement:
    """A branch beside donors whose KV is there."""
    return _Beside(branch, server, compared, SharingReport()).place(donors)


def place_in_fork(
    branch: Branch, fork: ForkFacts, others: Sequence[Resident], server: Server, compared: Comparisons
) -> Placement:
    """A branch of a fork.

    Args:
        branch: the branch.
        fork: what its fork has.
        others: donors outside the fork that it may take as well.
        server: what the server can do.
        compared: the branch beside donors.
    """
    report = SharingReport()
    if fork.anchor is not None:
        until = _waits_until(branch, compared.with_donor(fork.anchor), fork.siblings, server, report)
        if until:
            return Placement(waits_for=fork.anchor, waits_until=until, report=report)
        _say_not_shared(branch, report, TOO_FEW if branch.options.merges else TOO_FEW_ALIGN)
    donors = (*fork.donors, *others)
    alone = fork.anchor is None and not fork.donors
    if alone and (fork.anchor_gone or fork.donors_gone):
        report.decline(ANCHOR_GONE if fork.anchor_gone else DONORS_GONE)
    if branch.options.share == "auto" and report.is_empty and not (alone or branch.little_left):
        known = [fork.anchor] if fork.anchor is not None else []
        known += [one.donor for one in donors]
        aligned = max(compared.with_donor(donor).alignment.aligned for donor in known)
        sizes = (branch.ids.size, branch.exact, aligned, server.probe_share)
        if worth_blending(*sizes) and faster_blending(*sizes, server.pass_cost, fork.siblings):
            report.decline(AUTO_IS_EXACT)
    if alone and not donors:
        return Placement(is_anchor=True, report=report)
    beside = _Beside(branch, server, compared, report, fork.siblings).place(donors)
    if alone and beside.adopts is None:
        return replace(beside, is_anchor=True)
    return beside


def _waits_until(branch: Branch, beside: Comparison, siblings: int, server: Server, report: SharingReport) -> int:
    """How much of an anchor a branch waits for: the common beginning, or all of it; 0 where it is not worth it."""
    options, tokens, cached = branch.options, branch.ids.size, max(branch.exact, branch.blended)
    common = min(beside.common, tokens - 1) // server.page * server.page  # the last token is always computed
    if worth_waiting(common - cached, siblings, server.pass_cost.tokens):
        return common
    gain = 0
    if options.merges and not (server.merge_refusal or branch.fixed):
        if beside.guard.same:
            gain = tokens
        else:
            report.decline(f"content guard: {beside.guard.reason}", donor=beside.donor.name)
    blends = options.blends and not (server.blend_refusal or branch.whole) and beside.common + LEAST_TOKENS <= tokens
    taken = beside.taken(options) if blends else 0
    if blends and faster_blending(tokens, cached, taken, server.probe_share, server.pass_cost, siblings):
        gain = max(gain, taken)
    return beside.donor.tokens.size if worth_blending(tokens, cached, gain, 0.0) else 0


def _say_not_shared(branch: Branch, report: SharingReport, reason: str, beside: Comparison | None = None) -> None:
    """Decline, where the branch asked for more than identical prefixes and no better reason was given."""
    options = branch.options
    if not (options.blends or options.merges) or (options.share == "auto" and branch.little_left):
        return
    if branch.options.share == "blend" or report.is_empty:
        if beside is None:
            report.decline(reason)
        else:
            report.decline(reason, donor=beside.donor.name, aligned_tokens=beside.alignment.aligned)


class _Beside:
    """The placement of one branch beside its donors."""

    def __init__(
        self, branch: Branch, server: Server, compared: Comparisons, report: SharingReport, siblings: int = 1
    ) -> None:
        self.branch, self.server, self.compared, self.report = branch, server, compared, report
        self.siblings = siblings

    def place(self, donors: Sequence[Resident]) -> Placement:
        branch, options = self.branch, self.branch.options
        merge = self._merge(donors) if options.merges else None
        if not options.blends:
            return Placement(merge=merge, report=self.report)
        if not donors:
            return replace(_reading(branch), merge=merge, report=self.report)
        blend = self._blend(donors)
        if blend is None:
            return Placement(merge=merge, report=self.report)
        return Placement(
            blended=True, shift=blend.shift, blend=blend, merge=merge, adopts=blend.donor, report=self.report
        )

    def _blend(self, donors: Sequence[Resident]) -> BlendPlan | None:
        """From the donor that has most of it; None where that is not worth it."""
        branch, server = self.branch, self.server
        best = max((self.compared.with_donor(one.donor) for one in donors), key=lambda one: one.alignment.aligned)
        refusal = server.blend_refusal or branch.whole
        if refusal:
            _say_not_shared(branch, self.report, refusal, best)
            return None
        sizes = (branch.ids.size, branch.exact, best.taken(branch.options), server.probe_share)
        worth = worth_blending(*sizes)
        faster = faster_blending(*sizes, server.pass_cost, max(1, self.siblings))
        if not (worth and faster) and not branch.reads_blended:
            could = worth_blending(branch.ids.size, branch.exact, best.alignment.aligned, server.probe_share)
            reason = NOT_FASTER if worth else TOO_FEW_TAKEN if could else TOO_FEW_ALIGN
            _say_not_shared(branch, self.report, reason, best)
            return None
        if not branch.options.merges:
            self.report.declined = None
        self.report.donor, self.report.aligned_tokens = best.donor.name, best.alignment.aligned
        shift = branch.shift if branch.reads_blended else best.shift if best.shift <= branch.most_shift else 0
        key = branch.namespace.extra_key
        return BlendPlan(best.donor, key, best.alignment.source, best.always, branch.options, shift)

    def _merge(self, donors: Sequence[Resident]) -> MergePlan | None:
        """With the first donor that asks the same; the report says why there is none."""
        branch, report = self.branch, self.report
        compared = [self.compared.with_donor(one.donor) for one in donors]
        if not donors or any(one.begins_with_donor for one in compared):
            return None  # what a donor has from the start is exact reuse
        refusal = self.server.merge_refusal or branch.fixed or (TOO_FEW if branch.little_left else "")
        if refusal:
            _say_not_shared(branch, report, refusal)
            return None
        same = [one for one, beside in zip(donors, compared, strict=True) if beside.guard.same]
        whole = [one.donor for one in same if one.is_whole(self.server.page)]
        if not same:
            report.decline(f"content guard: {compared[0].guard.reason}", donor=compared[0].donor.name)
            return None
        if not whole:
            report.decline(DONORS_GONE, donor=same[0].donor.name)
            return None
        report.decline(NOT_PROBED, donor=whole[0].name)  # until it is
        return MergePlan(whole[0], branch.namespace.extra_key, branch.key, branch.options.tau)


@dataclass(frozen=True)
class Followed:
    """Whether a prompt that was merged before is read as the one that it was merged with.

    Attributes:
        replaces: it is.
        drop: the alias is no longer valid: its prompt is gone.
        declined: why it is not followed; empty where it is.
    """

    replaces: bool = False
    drop: bool = False
    declined: str = ""


def follow_alias(canonical: Resident, fixed: str, length: int, limit: int, page: int) -> Followed:
    """Decide for a prompt that begins as one that was merged.

    Args:
        canonical: the prompt that it was merged with.
        fixed: why the request's prompt cannot be replaced; empty if it can.
        length: of the prompt after it.
        limit: tokens that a prompt of this server has fewer than.
        page: tokens of a page of KV.
    """
    if not canonical.is_whole(page):
        return Followed(drop=True, declined="the prompt that it was merged with is gone")
    if fixed or length >= limit:
        return Followed(declined=fixed or "the prompt that it was merged with makes it too long")
    return Followed(replaces=True)
