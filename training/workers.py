"""Loading ahead of the training thread: a bounded queue of batches that worker threads decode."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

P = TypeVar("P")
B = TypeVar("B")


class LoadedAhead(Generic[P, B]):
    """Iterates over `load(plan)` of all plans, in their order.

    Threads, not processes: decoding, scaling and reading files release Python's lock, and nothing has to be copied.

    Args:
        workers: threads; 0 loads in the caller's own.
        ahead: how many batches may be loaded or loading beyond the one in use; memory holds no more.

    Attributes:
        waited: seconds that the caller has waited for data so far.
    """

    def __init__(self, plans: Iterable[P], load: Callable[[P], B], *, workers: int, ahead: int = 4) -> None:
        self.plans, self.load, self.workers, self.ahead = plans, load, workers, ahead
        self.waited = 0.0

    def __iter__(self) -> Iterator[tuple[P, B]]:
        if not self.workers:
            for plan in self.plans:
                yield plan, self._timed(lambda plan=plan: self.load(plan))  # type: ignore[misc]
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="load")
        queue: deque[tuple[P, Future[B]]] = deque()
        try:
            for plan in self.plans:
                queue.append((plan, pool.submit(self.load, plan)))
                if len(queue) > self.ahead:
                    yield self._next(queue)
            while queue:
                yield self._next(queue)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _next(self, queue: "deque[tuple[P, Future[B]]]") -> tuple[P, B]:
        plan, future = queue.popleft()
        return plan, self._timed(future.result)

    def _timed(self, get: Callable[[], B]) -> B:
        started = time.perf_counter()
        try:
            return get()
        finally:
            self.waited += time.perf_counter() - started
