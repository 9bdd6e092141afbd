"""The names that callers import from `deep_ep.utils`."""

from ._events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
