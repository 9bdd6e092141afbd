"""expertwire moves tokens between the ranks of Mixture-of-Experts layers.

*Dispatch* sends each token to the ranks that hold its experts; *combine* brings the results home and
sums them. `LowLatency` is for small batches, `HighThroughput` for large ones. Importing this touches no
GPU and needs no torch.
"""

from typing import Any, Optional

from . import _native
from ._errors import (CapacityError, Error, FailedEarlier, InvalidArgument, InvalidUsage, Mismatch,
                      PeerLost, Refused, SystemFailure, Timeout, Unsupported)
from ._native import Handle, Queue, cuda_device_count
from ._types import (DispatchLayout, HighThroughputCombine, HighThroughputDispatch,
                     LowLatencyDispatch, Status)
from .communicator import Communicator, run_in_process
from .high_throughput import EVERY_ROW, HighThroughput
from .low_latency import LowLatency

__version__ = _native.__version__

__all__ = [
    "CapacityError", "Communicator", "DispatchLayout", "EVERY_ROW", "Error", "FailedEarlier", "Handle",
    "HighThroughput", "HighThroughputCombine", "HighThroughputDispatch", "InvalidArgument",
    "InvalidUsage", "LowLatency", "LowLatencyDispatch", "Mismatch", "PeerLost", "Queue", "Refused",
    "Status", "SystemFailure", "Timeout", "Unsupported", "cuda_device_count", "dispatch_layout",
    "run_in_process",
]


def dispatch_layout(topk_idx: Any, experts: int, ranks: int,
                    communicator: Optional[Communicator] = None) -> DispatchLayout:
    """Counts where the tokens of `topk_idx` [T, K] (int32 or int64, on the host) go. Local. Nodes are
    those of `communicator`; without one every rank is on node 0."""
    native = communicator._native if communicator is not None else None
    return DispatchLayout(*_native.dispatch_layout(topk_idx, experts, ranks, native))
