"""Re-ranking a query's best candidates by where the query stands in *their* rankings (MTFN's scheme, as DSRAN uses it).

A candidate's address is the query's 0-based position in the candidate's own ranking of all queries; the first k1 of the plain
ranking are put in ascending order of address. Addresses tie in nearly every row, so the sort is stable: equal addresses keep the order of similarity.
Everywhere the order of similarity is descending, ties to the smaller index.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .errors import DualmatchError
from .recall import Matrix, Ranks, RanksAcrossLines, nan_error, require_k, rows, shape_of

_COLUMNS_PER_TILE, _ROWS_PER_TILE = 64, 512
_GROUPS = 250
_REACHING_PER_PAIR = 16

Line = NDArray[np.float32]


def i2t(similarity: Matrix, k1: int = 15) -> Ranks:
    """Re-ranked captions of every image, int64 (images, k1), best first.

    The address of caption t for image i is the position of i in t's ranking of all images.

    Args:
        similarity: (images, captions), compared in float32; may be memory-mapped.
        k1: how many candidates to re-rank; the papers use 15.

    Raises:
        DualmatchError: no matrix of numbers, NaN in it, or k1 outside 1 … captions.
    """
    return reordered(*i2t_addresses(similarity, k1))


def t2i(similarity: Matrix, k1: int = 15) -> Ranks:
    """Re-ranked images of every caption, int64 (captions, k1), best first; otherwise as `i2t`."""
    return reordered(*t2i_addresses(similarity, k1))


def t2i_through_neighbours(similarity: Matrix, caption_similarity: Matrix, k1: int, k2: int) -> Ranks:
    """As `t2i`, but an image's address is the best position that any of the caption's k2 nearest captions has in its ranking.

    A caption is normally its own nearest, so k2 = 1 is `t2i`.

    Args:
        similarity: (images, captions).
        caption_similarity: (captions, captions).

    Raises:
        DualmatchError: NaN, k1 outside 1 … images, k2 outside 1 … captions, or sizes that do not fit.
    """
    _, num_captions = shape_of(similarity)
    if caption_similarity.shape != (num_captions, num_captions):
        raise DualmatchError(
            f"the similarity has {num_captions} captions, so the captions' own must be {(num_captions, num_captions)}, "
            f"got {caption_similarity.shape}."
        )
    return t2i_through(similarity, best_captions(caption_similarity, k2), k1)


def t2i_through(similarity: Matrix, neighbours_QN: Ranks, k1: int) -> Ranks:
    """`t2i_through_neighbours` where the nearest captions of every caption are known, int64 (captions, k2)."""
    candidates_QK = best_images(similarity, k1)
    shape = (len(candidates_QK), neighbours_QN.shape[1], k1)
    addresses_QNK = _positions(
        rows(similarity),
        np.broadcast_to(candidates_QK[:, None, :], shape),
        np.broadcast_to(neighbours_QN[:, :, None], shape),
    )
    return reordered(candidates_QK, addresses_QNK.min(axis=1))


def i2t_addresses(similarity: Matrix, k1: int = 15) -> tuple[Ranks, Ranks]:
    """Every image's k1 best captions in the order of similarity and their addresses, both int64 (images, k1); raises as `i2t`."""
    candidates_QK = best_captions(similarity, k1)
    scores_QK = np.take_along_axis(similarity, candidates_QK, axis=1).astype(np.float32)
    addresses_QK = _addresses_among_reaching(similarity, candidates_QK, scores_QK)
    if addresses_QK is None:
        addresses_QK = _counted_addresses(similarity, candidates_QK, scores_QK)
    return candidates_QK, addresses_QK


def _addresses_among_reaching(similarity: Matrix, candidates_QK: Ranks, scores_QK: Line) -> Ranks | None:
    """Addresses by sorting, caption by caption, the scores that reach the least of its pairs' scores; None where they are not few.

    They are few because a candidate's score is high in its row, and then mostly in its column. Among equal scores all over they are not.
    """
    num_images, num_captions = similarity.shape
    lowest = np.full(num_captions, np.inf, np.float32)
    np.minimum.at(lowest, candidates_QK.ravel(), scores_QK.ravel())

    # One thread: calls as short as these spend more on handing the interpreter over than a second core gives.
    places_of, scores_of, room = [], [], _REACHING_PER_PAIR * candidates_QK.size
    for index, row in rows(similarity):
        captions = (row >= lowest).nonzero()[0]
        room -= len(captions)
        if room < 0:
            return None
        places_of.append(captions + index * num_captions)
        scores_of.append(row[captions])
    places, scores = np.concatenate(places_of), np.concatenate(scores_of)
    captions = places % num_captions
    order = np.lexsort((places, -scores, captions))  # equal scores by the smaller image
    first = np.searchsorted(captions[order], np.arange(num_captions))
    positions = np.empty(len(places), np.int64)
    positions[order] = np.arange(len(places)) - first[captions[order]]
    pairs = np.arange(num_images)[:, None] * num_captions + candidates_QK
    return positions[np.searchsorted(places, pairs)]


def _counted_addresses(similarity: Matrix, candidates_QK: Ranks, scores_QK: Line) -> Ranks:
    """Addresses by counting, down a pair's column, what ranks above the image's own row: no column is copied or sorted."""
    images = np.repeat(np.arange(len(similarity)), candidates_QK.shape[1])

    def counted(start: int, stop: int) -> Ranks:
        addresses = RanksAcrossLines(len(similarity), images, scores_QK.ravel(), candidates_QK.ravel())
        for index, row in rows(similarity, start, stop):
            addresses.count(index, row)
        return addresses.ranks()

    return np.sum(_in_parts(len(similarity), counted), axis=0).reshape(candidates_QK.shape)


def t2i_addresses(similarity: Matrix, k1: int = 15) -> tuple[Ranks, Ranks]:
    """Every caption's k1 best images in the order of similarity and their addresses, both int64 (captions, k1); raises as `i2t`."""
    candidates_QK = best_images(similarity, k1)
    return candidates_QK, _positions(rows(similarity), candidates_QK, _each_query(candidates_QK))


def best_captions(similarity: Matrix, k: int) -> Ranks:
    """The k best captions of every image, int64 (images, k), in the order of similarity; raises as `i2t`."""
    num_images, num_captions = shape_of(similarity)
    require_k(k, num_captions, "captions")
    return _best(rows(similarity), num_images, num_captions, k)


def best_images(similarity: Matrix, k: int) -> Ranks:
    """The k best images of every caption, int64 (captions, k), in the order of similarity; raises as `i2t`."""
    num_images, num_captions = shape_of(similarity)
    require_k(k, num_images, "images")
    return _best(columns(similarity), num_captions, num_images, k)


def _in_parts(num_rows: int, work: Callable[[int, int], Ranks]) -> list[Ranks]:
    """What `work` gives of rows from `start` to before `stop`, in order, in as many parts and threads as there are cores."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bounds = [num_rows * part // threads for part in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, bounds[:-1], bounds[1:]))


def columns(similarity: Matrix) -> Iterator[tuple[int, Line]]:
    """Each column with its index, contiguous and float32: `rows` of the transpose.

    A few columns are copied at a time, in tiles that stay in the cache: whole columns would miss it at every element.
    """
    similarity = np.asarray(similarity)
    num_rows, num_columns = similarity.shape
    tile = np.empty((min(_COLUMNS_PER_TILE, num_columns), num_rows), np.float32)
    for start in range(0, num_columns, len(tile)):
        stop = min(start + len(tile), num_columns)
        for top in range(0, num_rows, _ROWS_PER_TILE):
            tile[: stop - start, top : top + _ROWS_PER_TILE] = similarity[top : top + _ROWS_PER_TILE, start:stop].T
        for index, column in enumerate(tile[: stop - start], start):
            if np.isnan(column.max()):
                raise nan_error(int(np.isnan(column).argmax()), index)
            yield index, column


def _best(lines: Iterator[tuple[int, Line]], num_queries: int, num_items: int, k: int) -> Ranks:
    best_QK = np.empty((num_queries, k), np.int64)
    for query, (_, line) in enumerate(lines):
        # The k largest maxima of disjoint groups are k items, so the best k all reach the least of these maxima.
        if k <= _GROUPS < num_items:
            maxima = line[: num_items // _GROUPS * _GROUPS].reshape(-1, _GROUPS).max(axis=0)
            maxima.partition(_GROUPS - k)
            reaching = (line >= maxima[_GROUPS - k]).nonzero()[0]
        else:
            reaching = np.arange(num_items)
        best_QK[query] = reaching[(-line[reaching]).argsort(kind="stable")[:k]]
    return best_QK


def _each_query(candidates_QK: Ranks) -> Ranks:
    return np.broadcast_to(np.arange(len(candidates_QK))[:, None], candidates_QK.shape)


def _positions(lines: Iterator[tuple[int, Line]], line_of: Ranks, item_of: Ranks) -> Ranks:
    """For every pair, the 0-based position of the item in the ranking of the line; of the shape of both arguments."""
    items = item_of.ravel()
    by_line = np.argsort(line_of, axis=None, kind="stable")
    last_line = line_of.flat[by_line[-1]]
    bounds = np.searchsorted(line_of.ravel()[by_line], np.arange(last_line + 2)).tolist()
    positions = np.empty(len(items), np.int64)
    # Not strict: nothing is asked of the lines beyond the last.
    for (_, line), (start, stop) in zip(lines, pairwise(bounds), strict=False):
        if start < stop:
            pairs = by_line[start:stop]
            positions[pairs] = positions_in(line, items[pairs])
    return positions.reshape(line_of.shape)


def positions_in(line: Line, items: Ranks) -> Ranks:
    """The items' 0-based positions in the ranking of one line; of the shape (pairs,)."""
    scores = line[items]
    reaching = line[line >= np.minimum.reduce(scores)]
    reaching.sort()
    not_above = reaching.searchsorted(scores, side="right")
    positions = len(reaching) - not_above
    for pair in (not_above - reaching.searchsorted(scores) > 1).nonzero()[0]:
        positions[pair] += np.count_nonzero(line[: items[pair]] == scores[pair])
    return positions


def reordered(candidates_QK: Ranks, addresses_QK: Ranks) -> Ranks:
    """The candidates in ascending order of address, equal addresses in their given order."""
    return np.take_along_axis(candidates_QK, np.argsort(addresses_QK, axis=1, kind="stable"), axis=1)
