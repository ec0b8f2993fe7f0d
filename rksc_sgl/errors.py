"""Every error that a caller can meet, in one tree.

::

    RkscError
    ├── OptionError            a value handed to us is unknown, of the wrong type or out of range
    │   └── NotForkableError         a request that SGLang can answer, but no fork can
    ├── ModelFetchError        the embedded model cannot be downloaded, verified or converted
    ├── ServerError            the server said no, or is not there
    │   ├── ServerUnreachableError   no connection, or it broke in the middle
    │   ├── ServerRefusedError       an answer with an error status
    │   └── ServerVersionError       it runs another version of this package
    ├── HttpAnswerError        what a route of ours answers with an error status
    ├── ServerStartError       a server of ours ended, or did not become ready, before it could serve
    ├── UnsupportedBackendError      the language backend cannot do what was asked
    ├── LabelError             verification labels that the tokenizer cannot tell apart
    ├── VerificationError      no branch could be verified
    ├── BranchStoppedError     a branch was stopped, or never started, for the answer of its fork was decided
    ├── RotationError          cached keys cannot be moved to another position
    ├── MetricError            a counter that there is not, or one with other labels
    ├── HeldWeightError        a weight in panels was used in a way that would lose what is written to it
    ├── TooLittleMemoryError   a model's weights do not fit into what is free
    ├── NativeBuildError       the compiled layer operations of the CPU platform cannot be had
    ├── TreeListingError       the radix tree of a server cannot be listed
    └── ProfileError           a calibration profile is damaged, newer, of another model, or cannot certify a risk

Messages say what was got and what would be right.
"""

from __future__ import annotations


class RkscError(Exception):
    """Base of all errors raised by this package."""


class OptionError(RkscError, ValueError):
    """A named option is unknown, of the wrong type, or out of range."""


class NotForkableError(OptionError):
    """SGLang can answer the request, but no fork can."""


class ModelFetchError(RkscError):
    """The embedded model could not be downloaded, verified or converted."""


class ServerError(RkscError):
    """Something is wrong between us and the server."""


class ServerUnreachableError(ServerError):
    """No connection could be made, or it broke before the answer was complete."""


class ServerRefusedError(ServerError):
    """The server answered with an error status.

    Attributes:
        status: HTTP status code.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ServerVersionError(ServerError):
    """The server runs another version of this package, so that its answers might be misread."""


class HttpAnswerError(RkscError):
    """A route of ours answers with an error status.

    Attributes:
        status: HTTP status code.
        param: the field of the request that is wrong; None where it is none.
    """

    def __init__(self, message: str, status: int, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class ServerStartError(RkscError):
    """The server ended, or did not become ready, before it could serve; the message has the end of its log."""


class UnsupportedBackendError(RkscError):
    """The SGLang language backend in use cannot do what was asked."""


class LabelError(RkscError, ValueError):
    """The verification labels cannot be told apart by their first token."""


class VerificationError(RkscError):
    """No branch could be verified."""


class BranchStoppedError(RkscError):
    """The branch was stopped, or never started: the answer of its fork was decided without it."""


class RotationError(RkscError):
    """Keys cannot be re-rotated: not those of this model, or not to this position."""


class MetricError(RkscError, ValueError):
    """A counter or a label that the catalogue does not have, or an amount that no counter can grow by."""


class HeldWeightError(RkscError):
    """A weight in panels was used in a way that would lose what is written to it."""


class TooLittleMemoryError(RkscError):
    """A model's weights do not fit into what is free."""


class NativeBuildError(RkscError):
    """The compiled layer operations of the CPU platform cannot be had; PyTorch operations take their place."""


class TreeListingError(RkscError):
    """The radix tree cannot be listed: a kind that we cannot walk, or a listing that we cannot read."""


class ProfileError(RkscError):
    """A calibration profile cannot be read, is of another model or prompt, or cannot certify what was asked."""
