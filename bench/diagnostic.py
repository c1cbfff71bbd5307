"""Backends of known behaviour, which measure the benchmark itself: null, throttled, stalling."""

import time
from collections.abc import Callable, Mapping, Sequence

from dualmatch.runtime.backends import Session, TensorSpec
from dualmatch.runtime.backends.base import Array
from dualmatch.runtime.errors import DualmatchError

NULL = "null"
THROTTLED, STALLING = "throttled", "stalling"
BEHAVIOURS = (THROTTLED, STALLING)
THROTTLE_FACTOR = 1.5
STALL_EVERY, STALL_S = 1000, 0.5


class NullSession(Session):
    """The null backend: every check of a session and no graph, so that what it takes is the harness's own.

    Args:
        answer: what every call gives back, for the checks of outputs.
    """

    def __init__(self, inputs: Sequence[TensorSpec], *, answer: Mapping[str, Array] | None = None) -> None:
        self.inputs, self.outputs = tuple(inputs), ()
        self.answer = dict(answer or {})
        self.backend = self.provider = NULL

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:  # noqa: ARG002
        return self.answer

    def _release(self) -> None: ...


class _Wrapped(Session):
    """Another session with a fault built in."""

    def __init__(self, session: Session, behaviour: str) -> None:
        self.session = session
        self.inputs, self.outputs = session.inputs, session.outputs
        self.backend, self.provider = f"{session.backend}+{behaviour}", f"{session.provider}, {behaviour} on purpose"

    def _release(self) -> None:
        self.session.close()


class ThrottledSession(_Wrapped):
    """Every call takes `factor` times as long: the rest is waited out."""

    def __init__(
        self,
        session: Session,
        *,
        factor: float = THROTTLE_FACTOR,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        super().__init__(session, THROTTLED)
        self.factor, self.clock = factor, clock

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        start = self.clock()
        results = self.session.run(feeds)
        until = start + round((self.clock() - start) * self.factor)
        # Not a sleep, which lasts longer than asked: the factor is to hold for calls of a few microseconds too.
        while self.clock() < until:
            pass
        return results


class StallingSession(_Wrapped):
    """One call in `every` stalls for `stall_s` seconds; the first to stall is number `every`."""

    def __init__(
        self,
        session: Session,
        *,
        every: int = STALL_EVERY,
        stall_s: float = STALL_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(session, STALLING)
        self.every, self.stall_s, self.sleep, self.calls = every, stall_s, sleep, 0

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.calls += 1
        if self.calls % self.every == 0:
            self.sleep(self.stall_s)
        return self.session.run(feeds)


def split_behaviour(backend: str) -> tuple[str, str | None]:
    """`onnxruntime+stalling` as (`onnxruntime`, `stalling`).

    Raises:
        DualmatchError: an unknown behaviour.
    """
    name, plus, behaviour = backend.partition("+")
    if plus and behaviour not in BEHAVIOURS:
        raise DualmatchError(
            f"backend {backend!r}: there is no behaviour {behaviour!r}; choose one of {', '.join(BEHAVIOURS)}."
        )
    return name, behaviour or None


def with_behaviour(session: Session, behaviour: str | None) -> Session:
    """The session, wrapped where a behaviour is named."""
    if behaviour == THROTTLED:
        return ThrottledSession(session)
    if behaviour == STALLING:
        return StallingSession(session)
    return session
