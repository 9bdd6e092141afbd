"""What `import deep_ep` means, on expertwire: the first generation of DeepEP's API (`Buffer`).

A program that calls it runs unchanged with `python -m expertwire.deep_ep run SCRIPT`, or after
`python -m expertwire.deep_ep install`. Needs torch. What differs from DeepEP is in the README.
"""

from ._events import EventHandle, EventOverlap
from ._config import Config
from .buffer import Buffer, topk_idx_t

__version__ = "1.2.1+expertwire"
__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"]
