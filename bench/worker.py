"""A fresh process for one case, so that no case inherits another's caches, threads, memory or clocks.

`python -m dualmatch.bench.worker` is the child: it takes pickled messages on standard input and answers on standard output, both
of them private pipes between the two processes.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import traceback
from types import TracebackType
from typing import IO, Any, Self

from dualmatch.runtime.errors import DualmatchError

from .case import Bench, Case
from .result import CaseResult


class Worker:
    """A `Bench` in a process of its own.

    Raises:
        DualmatchError: what opening the case raises there, or the process ended by itself.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dualmatch.bench.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            self._ask(case)
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the `Bench` over there."""
        return self._ask((method, arguments))

    def _ask(self, message: Any) -> Any:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(message, process.stdin)
            process.stdin.flush()
            kind, answer = pickle.load(process.stdout)  # noqa: S301  (the child is this package)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = process.wait()
            reason = f"signal {-code} (9 may be the system, short of memory)" if code < 0 else f"exit code {code}"
            raise DualmatchError(
                f"the process that measured the {self.case.encoder} encoder on {self.case.backend} ended by itself: {reason}."
            ) from None
        if kind == "refused":
            raise DualmatchError(answer)
        if kind == "missing":
            raise ModuleNotFoundError(answer[0], name=answer[1])
        if kind == "broken":
            raise RuntimeError(f"in the process of a case:\n{answer}")
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.kill()
        self.close()


def measure_in_process(case: Case) -> CaseResult:
    """Measure a case in a fresh process.

    Raises:
        DualmatchError: as `Worker`.
    """
    with Worker(case) as worker:
        result: CaseResult = worker.call("result")
        return result


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    bench: Bench | None = None
    while True:
        try:
            message = pickle.load(requests)  # noqa: S301  (the parent is this package)
        except EOFError:
            return
        answer: tuple[str, Any]
        try:
            if bench is None:
                bench = Bench(message)
                answer = ("done", None)
            else:
                method, arguments = message
                answer = ("done", getattr(bench, method)(*arguments))
        except DualmatchError as error:
            answer = ("refused", str(error))
        except ModuleNotFoundError as error:
            answer = ("missing", (str(error), error.name))
        except Exception:  # noqa: BLE001  (it is raised again on the other side)
            answer = ("broken", traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()


def main() -> None:
    """Answer the parent until it closes the pipe."""
    # Engines print to standard output from C++, which would end up in the midst of an answer.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(KeyboardInterrupt):
        _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
