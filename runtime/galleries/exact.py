"""Exact top-k over vectors that arrive piece by piece: candidates by fast products, then scored again, one by one, alike everywhere.

Q queries, N vectors of a piece, D dimension, K candidates of a query.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from queue import SimpleQueue
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.errors import DualmatchError

Float32 = NDArray[np.float32]
Positions = NDArray[np.int64]
Piece = tuple[Positions, NDArray[Any]]
Engine = Literal["numpy", "numkong"]
ENGINES: tuple[Engine, ...] = ("numpy", "numkong")

SCORE_BYTES = 16 * 2**20  # of scores held at a time
SPARE_CANDIDATES, MAX_CANDIDATES = 16, 4096  # beyond k at first, and where more are looked for among near-equal scores
SLACK = 2e-6  # by which a product of matrices may differ from a sum, for vectors of about unit norm
WIDEN_ROWS = 512  # widened at a time by a thread: half a megabyte to a few, so that it stays in the core's cache
FEW_QUERIES = 4  # up to which NumPy multiplies what it has just widened, slice by slice
# numkong multiplies float16 without widening it, NumPy's product of matrices is faster per query (docs/search.md, "Speed").
NUMKONG_QUERIES, NUMKONG_BYTES = 256, 4 * 2**20
# A float16's bits, moved to where float32 keeps them: sign, then exponent and fraction 13 bits higher. As the two count exponents
# from 15 and 127, the number so read is 2^-112 times the float16's; the queries carry 2^112 in return. Exact, and ten times NumPy's cast.
HALF_BITS = np.int32(-0x70002000)
HALF_SCALE = 112


def choose_engine(num_queries: int, num_bytes: int, dtype: np.dtype[Any]) -> Engine:
    """What is faster at so many queries on so many bytes of vectors, among what is installed."""
    worth_it = dtype == np.float16 and num_queries <= NUMKONG_QUERIES and num_bytes >= NUMKONG_BYTES
    return "numkong" if worth_it and find_spec("numkong") is not None else "numpy"


def exact_search(
    pieces: Callable[[], Iterable[Piece]],
    queries: Float32,
    k: int,
    *,
    fetch: Callable[[Positions], Float32],
    count: int,
    engine: Engine = "numpy",
    threads: int = 1,
) -> tuple[Float32, Positions]:
    """The k best of all pieces by dot product, accumulated in float32, equal scores by position.

    Args:
        pieces: gives (positions, ascending over all pieces; vectors float16 or float32 (N, D)).
        queries: float32 (Q, D), finite.
        k: how many; fewer vectors give all there are.
        fetch: vectors at positions, float32 (n, D), to score candidates again.
        count: how many vectors the pieces have in all.
        engine: what finds candidates; the answer does not depend on it.
        threads: that scan; NumPy's product of matrices uses those of its BLAS.

    Returns:
        scores float32 and positions int64, each (Q, min(k, count)), best first.

    Raises:
        DualmatchError: vectors that are not finite.
    """
    k, num_candidates = min(k, count), min(k + SPARE_CANDIDATES, count)
    scores, positions = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    todo = np.arange(len(queries) if count else 0)
    # Candidates of a query are compared with each other only, so each query may be scaled: by powers of two, that is exactly.
    _, exponents = np.frexp(np.abs(queries).max(axis=1, initial=0))
    scaled = np.ldexp(queries, -exponents[:, None])
    while len(todo):
        asked = scaled[todo]
        if engine == "numkong":
            best = _scan_with_numkong(pieces(), asked, num_candidates, threads)
        else:
            best = _scan_with_numpy(pieces(), asked, num_candidates, threads)
        scores[todo], positions[todo] = scored_again(best.positions, asked, k, fetch)
        if num_candidates >= (count if engine == "numkong" else min(count, MAX_CANDIDATES)):
            break
        # What was no candidate scores at most as the last candidate did, give or take the scan's error: is that clearly too little?
        error = SLACK * np.linalg.norm(asked, axis=1)
        if engine == "numkong":
            error += np.linalg.norm(asked - asked.astype(np.float16), axis=1)
        todo = todo[best.scores[:, -1] + error >= scores[todo, -1]]
        num_candidates = min(num_candidates if engine == "numkong" else 8 * num_candidates, count)
        engine = "numpy"
    return np.ldexp(scores, exponents[:, None]), positions


class _Best:
    """The best candidates so far of every query, (Q, K), best first, equal scores by position."""

    def __init__(self, num_queries: int, num_candidates: int) -> None:
        # Filled with -inf and offered in position order, so that a later candidate enters only by scoring strictly higher.
        self.scores = np.full((num_queries, num_candidates), -np.inf, dtype=np.float32)
        self.positions = np.zeros(self.scores.shape, dtype=np.int64)

    def offer(self, chosen: slice, scores_QN: Float32, positions_N: Positions) -> None:
        """Take what is better among the scores of the queries `chosen`."""
        highest = scores_QN.max(axis=1)
        require_finite(highest)
        rows = np.flatnonzero(highest > self.scores[chosen, -1])
        if not len(rows):
            return
        scores = scores_QN if len(rows) == len(scores_QN) else scores_QN[rows]
        better = scores > self.scores[chosen][rows, -1:]
        counts = np.count_nonzero(better, axis=1)
        if counts.max() > self.scores.shape[1]:
            columns = top_k(scores, self.scores.shape[1])
            offered = np.take_along_axis(scores, columns, axis=1)
        else:  # a few per query: the usual case after the first pieces
            where, found = np.nonzero(better)
            place = np.arange(len(where)) - np.repeat(np.cumsum(counts) - counts, counts)
            columns = np.zeros((len(rows), counts.max()), dtype=np.int64)
            offered = np.full(columns.shape, -np.inf, dtype=np.float32)
            columns[where, place], offered[where, place] = found, scores[where, found]
        self.merge(np.arange(len(self.scores))[chosen][rows], offered, positions_N[columns])

    def merge(self, rows: NDArray[np.int64], scores: Float32, positions: Positions) -> None:
        """Merge candidates, (rows, any number) each and in position order among equals, into these rows."""
        scores = np.concatenate([self.scores[rows], scores], axis=1)
        positions = np.concatenate([self.positions[rows], positions], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self.scores.shape[1]]
        self.scores[rows] = np.take_along_axis(scores, order, axis=1)
        self.positions[rows] = np.take_along_axis(positions, order, axis=1)


def _scan_with_numpy(pieces: Iterable[Piece], queries: Float32, num_candidates: int, threads: int) -> _Best:
    best = _Best(len(queries), num_candidates)
    raised = np.ldexp(queries, HALF_SCALE)
    scratch = np.empty((0, queries.shape[1]), dtype=np.float32)
    # A piece of scratch for each thread: fresh memory costs more than the widening.
    own_scratch: SimpleQueue[Float32] = SimpleQueue()
    for _ in range(threads):
        own_scratch.put(np.empty((WIDEN_ROWS, queries.shape[1]), dtype=np.float32))
    with _threads(threads) as each:
        for positions, vectors in pieces:
            is_half = vectors.dtype == np.float16
            if is_half and len(queries) <= FEW_QUERIES:
                scores = np.empty((len(queries), len(vectors)), dtype=np.float32)
                each(partial(_score_slice, vectors, raised, scores, own_scratch), _slices(len(vectors)))
                best.offer(slice(None), scores, positions)
                continue
            if is_half and len(scratch) < len(vectors):
                scratch = np.empty(vectors.shape, dtype=np.float32)
            wide = scratch[: len(vectors)] if is_half else vectors
            if is_half:
                each(partial(_widen_slice, vectors, wide), _slices(len(vectors)))
            step = max(1, SCORE_BYTES // (4 * len(vectors)))
            for first in range(0, len(queries), step):
                chosen = slice(first, first + step)
                best.offer(chosen, (raised if is_half else queries)[chosen] @ wide.T, positions)
    return best


def _slices(num_rows: int) -> list[slice]:
    return [slice(first, first + WIDEN_ROWS) for first in range(0, num_rows, WIDEN_ROWS)]


def _score_slice(
    half: NDArray[np.float16], queries: Float32, scores: Float32, own_scratch: "SimpleQueue[Float32]", rows: slice
) -> None:
    """Widened and multiplied while it is in the core's cache, without the threads of BLAS: best where widening is most of the work."""
    scratch = own_scratch.get()
    wide = scratch[: len(half[rows])]
    widen(half[rows], wide)
    for query, of_query in zip(queries, scores, strict=True):
        np.vecdot(wide, query, out=of_query[rows])
    own_scratch.put(scratch)


def _widen_slice(half: NDArray[np.float16], out: Float32, rows: slice) -> None:
    widen(half[rows], out[rows])


def widen(half: NDArray[np.float16], out: Float32) -> None:
    """Write `half`, finite, times 2^-112 (`HALF_SCALE`) into `out`, exactly."""
    bits = out.view(np.int32)
    np.copyto(bits, half.view(np.int16))  # copies of the sign bit fill the upper half; the mask takes all but one away
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, HALF_BITS, out=bits)


def _scan_with_numkong(pieces: Iterable[Piece], queries: Float32, num_candidates: int, threads: int) -> _Best:
    from numkong import cdist, dots_pack, dots_packed

    # Half-precision queries, because it multiplies vectors of one type.
    asked = queries.astype(np.float16)
    packed = dots_pack(asked)
    shared, lock = iter(pieces), Lock()

    def scan(best: _Best) -> _Best:
        while True:
            with lock:
                if (piece := next(shared, None)) is None:
                    return best
            positions, vectors = piece
            # Both leave Python to the other threads while they multiply; for one query the simpler is the faster.
            product = cdist(asked, vectors, "dot") if len(asked) == 1 else dots_packed(vectors, packed)
            scores = np.asarray(product, dtype=np.float32)
            best.offer(slice(None), scores if len(asked) == 1 else scores.T, positions)

    with ThreadPoolExecutor(threads, thread_name_prefix="scan") as pool:
        best, *others = pool.map(scan, [_Best(len(queries), num_candidates) for _ in range(threads)])
    for other in others:
        best.merge(np.arange(len(queries)), other.scores, other.positions)
    return best


@contextmanager
def _threads(count: int) -> Iterator[Callable[[Callable[[slice], None], list[slice]], None]]:
    """A function that runs another one on each slice, in `count` threads."""

    def alone(work: Callable[[slice], None], slices: list[slice]) -> None:
        for rows in slices:
            work(rows)

    if count == 1:
        yield alone
        return
    with ThreadPoolExecutor(count, thread_name_prefix="widen") as pool:

        def together(work: Callable[[slice], None], slices: list[slice]) -> None:
            list(pool.map(work, slices))

        yield together


def scored_again(
    candidates: Positions, queries: Float32, k: int, fetch: Callable[[Positions], Float32]
) -> tuple[Float32, Positions]:
    """Candidates (Q, K) scored one by one, so that a score depends on nothing but query and vector; the k best of each."""
    num_candidates = candidates.shape[1]
    scores, positions = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    step = max(1, SCORE_BYTES // (4 * max(1, num_candidates) * queries.shape[1]))
    for first in range(0, len(queries), step):
        chosen = slice(first, first + step)
        ordered = np.sort(candidates[chosen], axis=1)
        vectors = fetch(ordered.ravel()).reshape(*ordered.shape, queries.shape[1])
        again = np.vecdot(vectors, queries[chosen, None])
        require_finite(again)
        order = np.argsort(-again, axis=1, kind="stable")[:, :k]
        scores[chosen] = np.take_along_axis(again, order, axis=1)
        positions[chosen] = np.take_along_axis(ordered, order, axis=1)
    return scores, positions


def require_finite(scores: NDArray[Any]) -> None:
    """Refuse NaN and infinity, which rank nothing."""
    if not np.isfinite(scores).all():
        raise DualmatchError("the gallery holds NaN or infinity: run `dualmatch gallery check` on it.")


def top_k(scores: Float32, k: int) -> NDArray[np.int64]:
    """Columns of the k highest scores of every row, best first, equal scores by the smaller column.

    Args:
        scores: (rows, columns), without NaN.

    Returns:
        int64 (rows, min(k, columns)).
    """
    num_columns = scores.shape[1]
    if num_columns <= k:
        return np.argsort(-scores, axis=1, kind="stable")
    columns = np.argpartition(scores, num_columns - k, axis=1)[:, num_columns - k :]
    threshold = np.take_along_axis(scores, columns, axis=1).min(axis=1, keepdims=True)
    # A partition picks among columns equal to the k-th score as it likes: rows where more of them exist than fit choose again.
    for row in np.flatnonzero((scores >= threshold).sum(axis=1) > k):
        above, tied = np.flatnonzero(scores[row] > threshold[row]), np.flatnonzero(scores[row] == threshold[row])
        columns[row] = np.concatenate([above, tied[: k - len(above)]])
    columns.sort(axis=1)
    order = np.argsort(-np.take_along_axis(scores, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)
