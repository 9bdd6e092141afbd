"""What `import deep_ep` means, on expertwire: three generations of DeepEP's API (`Buffer`,
`ElasticBuffer`, `EPBuffer`).

A program that calls it runs unchanged with `python -m expertwire.deep_ep run SCRIPT`, or after
`python -m expertwire.deep_ep install`. Needs torch. What differs from DeepEP is in the README.
"""

from ._events import EventHandle, EventOverlap
from ._config import Config
from .buffer import Buffer, topk_idx_t
from .elastic import ElasticBuffer, EPBuffer, EPHandle

__version__ = "2.1.0+expertwire"
__all__ = ["Buffer", "Config", "EPBuffer", "EPHandle", "ElasticBuffer", "EventHandle",
           "EventOverlap", "topk_idx_t"]
