"""Ctrl-C that finishes the step: the first signal asks, the second one stops at once."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from dualmatch.runtime.errors import DualmatchError

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # torchrun and schedulers send the second


class TrainingStoppedError(DualmatchError):
    """Training stopped on request, after it saved itself."""


class StopRequests:
    """While it is open, SIGINT and SIGTERM set `requested`; a second one raises KeyboardInterrupt. Idle outside the main thread."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  (the signal module's signature)
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not through a stream, whose lock the interrupted code may hold.
        os.write(2, b"\nfinishing the step in hand, then saving; once more stops at once\n")
