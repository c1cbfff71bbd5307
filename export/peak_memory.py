"""The largest resident set of this process over a stretch of work, from Linux's own high-water mark."""

from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Sets the high-water mark back when it is made; nothing is sampled, so no short peak is missed."""

    def __init__(self) -> None:
        try:
            _CLEAR.write_text("5", encoding="ascii")  # proc(5): resets VmHWM to the present resident set
            self._reset = True
        except OSError:
            self._reset = False

    def peak_bytes(self) -> int | None:
        """The largest resident set since, in bytes; None where the mark could not be set back or read."""
        if not self._reset:
            return None
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
