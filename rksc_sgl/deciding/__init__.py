"""When the answer of a fork is decided, and what to do until then: events in, actions out. No SGLang, no I/O."""

from rksc_sgl.deciding.actions import Abort, Action, BranchRecord, Done, Record, Start, Verify
from rksc_sgl.deciding.decision import Decision
from rksc_sgl.deciding.policies import Policy, Ruling
from rksc_sgl.deciding.spec import EarlyStop
from rksc_sgl.deciding.standing import Outcome, Standing, full_vote

__all__ = [
    "Abort",
    "Action",
    "BranchRecord",
    "Decision",
    "Done",
    "EarlyStop",
    "Outcome",
    "Policy",
    "Record",
    "Ruling",
    "Standing",
    "Start",
    "Verify",
    "full_vote",
]
