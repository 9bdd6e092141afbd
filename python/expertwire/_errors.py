"""What expertwire raises: one class a kind of fault, all of them `Error`."""

from __future__ import annotations


class Error(RuntimeError):
    """The message names the argument or the peer, the value seen and what is allowed.

    `rank` reports, `peer` is the rank that it speaks of, `phase` where in an operation it arose; -1
    and "" where there is none.
    """

    def __init__(self, message: str, rank: int = -1, peer: int = -1, phase: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.peer = peer
        self.phase = phase

    def __reduce__(self):
        return type(self), (str(self), self.rank, self.peer, self.phase)


class InvalidArgument(Error, ValueError):
    """An argument is outside what is allowed; nothing was sent."""


class InvalidUsage(Error):
    """A call in the wrong order, or on the wrong object; nothing was sent."""


class Mismatch(Error):
    """Ranks disagree about something they must agree on."""


class CapacityError(Error, MemoryError):
    """A buffer is too small for what was asked of it."""


class Timeout(Error, TimeoutError):
    """A wait reached its deadline."""


class PeerLost(Error, ConnectionError):
    """A peer's process died or left while it was still needed."""


class Refused(Error):
    """A peer could not prove that it belongs to this job."""


class Unsupported(Error):
    """This build or machine cannot do it."""


class SystemFailure(Error, OSError):
    """A call to the operating system failed."""


class FailedEarlier(Error):
    """The object failed in an earlier call and cannot be used any more."""


#: In the order of the codes of C++.
BY_CODE = (InvalidArgument, InvalidUsage, Mismatch, CapacityError, Timeout, PeerLost, Refused,
           Unsupported, SystemFailure, FailedEarlier)
