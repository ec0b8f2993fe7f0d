"""The primitives: fork into branches that know each other, verify them, take the best.

Thin over HTTP: whatever is done here can be done by any client of the server (see ``programs/openai_client.py``).
"""

from rksc_sgl.deciding import EarlyStop
from rksc_sgl.frontend.endpoint import Endpoint, RkscDegradedWarning
from rksc_sgl.frontend.fork import BranchGroup, fork_similar
from rksc_sgl.frontend.verify import DEFAULT_QUESTION, Verdict, verify_gated
from rksc_sgl.verifying.skip import SkipDecision, SkipGate

__all__ = [
    "DEFAULT_QUESTION",
    "BranchGroup",
    "EarlyStop",
    "Endpoint",
    "RkscDegradedWarning",
    "SkipDecision",
    "SkipGate",
    "Verdict",
    "fork_similar",
    "verify_gated",
]
