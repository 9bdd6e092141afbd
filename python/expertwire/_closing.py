"""What everything that can be closed has."""

from __future__ import annotations

from typing import Any, TypeVar

Self = TypeVar("Self", bound="Closing")


class Closing:
    _native: Any

    def close(self) -> None:
        """Local: tells no other rank and waits for none. What is queued runs to its end first."""
        self._native.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()
