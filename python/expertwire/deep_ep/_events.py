"""Events of CUDA streams; on the CPU backend everything has happened when a call returns."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Callable, List, Optional, Tuple

import torch


@lru_cache(maxsize=None)
def on_cuda() -> bool:
    """Whether tensors are on CUDA devices: asked once, for torch looks for them every time."""
    return torch.cuda.is_available()


class EventHandle:
    """A moment of the stream that is current when it is made."""

    def __init__(self) -> None:
        self._event = None
        if on_cuda():
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream())

    def current_stream_wait(self) -> None:
        """The current stream goes on when the moment has come."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class EventOverlap:
    """What a call returns: an event if it is asynchronous, and `event` None if it is not. As a context
    manager it waits at the end of its block."""

    def __init__(self, event: Optional[EventHandle] = None,
                 extra_tensors: Optional[Tuple[Any, ...]] = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors  # alive as long as this is
        self._hooks: List[Callable[[], Any]] = []
        self._release = False

    def register_hook_after_wait(self, hook: Callable[[], Any]) -> None:
        self._hooks.append(hook)

    def current_stream_wait(self, release_handle: bool = False) -> None:
        assert self.event is not None, "the call was not asynchronous: there is no event to wait for"
        self.event.current_stream_wait()
        if release_handle:
            self.event = self.extra_tensors = None
        for hook in self._hooks:
            hook()

    def __call__(self, release_handle: bool = False) -> "EventOverlap":
        self._release = release_handle
        return self

    def __enter__(self) -> "EventOverlap":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.event is not None:
            self.current_stream_wait(self._release)


def handle_of(event: Any) -> Optional[EventHandle]:
    """Callers give an EventOverlap, which may be empty, an EventHandle, or None."""
    return event.event if isinstance(event, EventOverlap) else event
