"""Recall and re-ranking straight from embeddings: the similarity matrix passes by in blocks of lines and is never kept.

A line is one item's scores with all queries. From image to text the lines are captions: with a whole line at hand every image's
position in that caption's ranking, the caption's address, is known, so one matrix product yields the ranks of both directions and the
re-ranked captions. From text to image the lines are images, in a pass of its own.

All is exact on the scores that pass by. These are `similarity.similarity_matrix`'s up to float32 rounding: a BLAS may round the last
bit of a dot product by the shape of the call.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import recall
from .errors import DualmatchError
from .recall import Ranks, RanksAcrossLines, RanksWithinLines, Recall, require_k
from .rerank import Line, positions_in, reordered
from .similarity import Embeddings, check_embeddings, ensemble

Models = Sequence[tuple[Embeddings, Embeddings]]
"""For each model its (images (n, d), captions (m, d)), float16 or float32; the similarities of several are averaged."""

Side = Sequence[Embeddings]
Block = NDArray[np.float32]
Addresses = Callable[[Line, Ranks], Ranks]

_BLOCK_BYTES = 20 * 2**20
_MOST_LINES = 1024
_SCORES_AT_ONCE = 2**21
_GROUPS = 64
_OWN_CAPTIONS, _OWN_IMAGES = 512, 128


def evaluate(
    models: Models,
    *,
    caption_image: ArrayLike,
    folds: int = 1,
    k1_i2t: int = 0,
    k1_t2i: int = 0,
    split: str | None = None,
) -> Recall:
    """`recall.evaluate` of embeddings, without their similarity matrix.

    Args:
        models: one model's embeddings, or several models' for an ensemble.
        caption_image, folds, split: as for `recall.evaluate`.
        k1_i2t, k1_t2i: how many candidates to re-rank, 0 for none; from text to image costs a second matrix product.

    Raises:
        DualmatchError: as `recall.evaluate` and `similarity_matrix`, before anything is multiplied.
    """
    num_images, num_captions = check_models(models)
    image_of = recall.checked_caption_image(num_images, num_captions, caption_image)
    recall.require_folds(image_of, num_images, folds, k1_i2t=k1_i2t, k1_t2i=k1_t2i)
    parts = []
    for images, captions in recall.fold_members(image_of, num_images, folds):
        part = [(left[images], right[captions]) for left, right in models]
        owner = image_of[captions] - images.start
        of_images, of_captions, candidates = _ranks(part, owner, k1_i2t)
        if candidates is not None:
            of_images = recall.reranked_i2t(of_images, candidates, owner)
        if k1_t2i:
            images_, captions_ = _sides(part)
            of_captions = recall.reranked_t2i(of_captions, _reranked(images_, captions_, k1_t2i, positions_in), owner)
        parts.append((of_images, of_captions))
    return recall.summary(parts, image_of, split=split, ensemble=len(models), k1_i2t=k1_i2t, k1_t2i=k1_t2i)


def ranks(models: Models, caption_image: ArrayLike, k1: int = 0) -> tuple[Ranks, Ranks, Ranks | None]:
    """`recall.ranks`, and with a `k1` also `rerank.i2t`, in one pass; raises as `evaluate`.

    Returns:
        0-based ranks (images,) and (captions,), and the re-ranked captions (images, k1) or None.
    """
    num_images, num_captions = check_models(models)
    image_of = recall.checked_caption_image(num_images, num_captions, caption_image)
    if k1:
        require_k(k1, num_captions, "captions")
    return _ranks(models, image_of, k1)


def _ranks(models: Models, image_of: Ranks, k1: int) -> tuple[Ranks, Ranks, Ranks | None]:
    images, captions = _sides(models)
    num_images, num_captions = len(images[0]), len(captions[0])
    within = RanksWithinLines(num_captions, np.arange(num_captions), image_of)
    expected = _own_scores(images, captions, image_of)
    while True:
        best = _best_own(expected, image_of)
        across = RanksAcrossLines(num_captions, best, expected[best])
        seen = np.empty_like(expected)
        ranks_of_captions = np.empty(num_captions, np.int64)
        running = _Candidates(num_images, k1, positions_in) if k1 else None
        for start, block in _blocks(captions, images):
            here = slice(start, start + len(block))
            seen[here] = block[np.arange(len(block)), image_of[here]]
            for caption, line in enumerate(block, start):
                ranks_of_captions[caption] = within.rank(caption, line)
                across.count(caption, line)
            if running is not None:
                running.offer(start, block)
        if np.array_equal(seen, expected):
            return across.ranks(), ranks_of_captions, running.reranked() if running else None
        # This BLAS rounds by the shape of the call: the scores that passed by are the true ones, and pass by once more.
        expected = seen


def i2t(models: Models, k1: int = 15) -> Ranks:
    """`rerank.i2t` of embeddings, int64 (images, k1); raises as it."""
    require_k(k1, check_models(models)[1], "captions")
    images, captions = _sides(models)
    return _reranked(captions, images, k1, positions_in)


def t2i(models: Models, k1: int = 15) -> Ranks:
    """`rerank.t2i` of embeddings, int64 (captions, k1); raises as it."""
    require_k(k1, check_models(models)[0], "images")
    images, captions = _sides(models)
    return _reranked(images, captions, k1, positions_in)


def t2i_through_neighbours(models: Models, k1: int, k2: int) -> Ranks:
    """`rerank.t2i_through_neighbours` of embeddings, the captions' own similarity too, int64 (captions, k1); raises as it."""
    num_images, num_captions = check_models(models)
    require_k(k1, num_images, "images")
    require_k(k2, num_captions, "captions")
    images, captions = _sides(models)
    neighbours_QN = neighbours(captions, k2)

    def addresses(line: Line, queries: Ranks) -> Ranks:
        near = neighbours_QN[queries]
        return positions_in(line, near.ravel()).reshape(near.shape).min(axis=1)

    return _reranked(images, captions, k1, addresses)


def neighbours(captions: Side, k: int) -> Ranks:
    """The k captions nearest to each caption, itself among them, best first, int64 (captions, k).

    Args:
        captions: for each model its embeddings of the captions (m, d).
    """
    require_k(k, check_models([(side, side) for side in captions])[0], "captions")
    return _reranked(captions, captions, k, None)


def check_models(models: Models) -> tuple[int, int]:
    """The numbers of images and captions.

    Raises:
        DualmatchError: no model, embeddings that do not fit each other, or NaN or infinity in them.
    """
    sizes = {check_embeddings(images, captions) for images, captions in models}
    if len(sizes) != 1 or 0 in (size := next(iter(sizes))):
        raise DualmatchError(
            f"a ranking needs images and captions, as many of each model; found {sorted(sizes)} images and captions."
        )
    return size


class _Candidates:
    """The best k items of every query among the lines so far, with their addresses, best first.

    Args:
        addresses: (line, queries) -> (queries,): the addresses of the line's item for these queries; None for none.
    """

    def __init__(self, num_queries: int, k: int, addresses: Addresses | None) -> None:
        self._k, self._addresses_of = k, addresses
        self._scores = np.full((num_queries, k), -np.inf, np.float32)
        self._items = np.zeros((num_queries, k), np.int64)
        self._addresses = np.zeros((num_queries, k), np.int64)

    def offer(self, start: int, block_LQ: Block) -> None:
        """Take in the lines from `start` on; lines come in ascending order."""
        step = max(1, _SCORES_AT_ONCE // len(block_LQ))
        parts = [self._take_in(start, block_LQ, slice(left, left + step)) for left in range(0, block_LQ.shape[1], step)]
        if self._addresses_of is not None:
            queries, places = (np.concatenate(pairs) for pairs in zip(*parts, strict=True))
            lines = self._items[queries, places] - start
            self._addresses[queries, places] = self._addresses_at(block_LQ, lines, queries)

    def _take_in(self, start: int, block_LQ: Block, among: slice) -> tuple[Ranks, Ranks]:
        """Where newcomers now stand: their queries and their places among these queries' best, (newcomers,) each."""
        part = block_LQ[:, among]
        lines, queries = np.divmod(np.flatnonzero(part > self._cutoffs(part, among)), part.shape[1])
        queries += among.start
        if not len(lines):
            return queries, lines
        # Newcomers side by side, as many columns as the luckiest query has; the rest of a row is -inf.
        order = np.argsort(queries, kind="stable")
        lines, queries = lines[order], queries[order]
        touched, first, count = np.unique(queries, return_index=True, return_counts=True)
        row = np.repeat(np.arange(len(touched)), count)
        column = self._k + np.arange(len(queries)) - np.repeat(first, count)
        shape = (len(touched), self._k + int(count.max()))
        scores, items, addresses = (
            np.full(shape, -np.inf, np.float32),
            np.full(shape, -1, np.int64),
            np.empty(shape, np.int64),
        )
        scores[:, : self._k], items[:, : self._k] = self._scores[touched], self._items[touched]
        addresses[:, : self._k] = self._addresses[touched]
        scores[row, column], items[row, column] = block_LQ[lines, queries], start + lines
        # Stable: what came earlier has the smaller index.
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self._k]
        self._scores[touched] = np.take_along_axis(scores, best, axis=1)
        self._items[touched] = items = np.take_along_axis(items, best, axis=1)
        self._addresses[touched] = np.take_along_axis(addresses, best, axis=1)
        newcomers, places = np.nonzero((best >= self._k) & (items >= 0))
        return touched[newcomers], places

    def reranked(self) -> Ranks:
        """The items of every query in ascending order of address, int64 (queries, k)."""
        return reordered(self._items, self._addresses)

    def _cutoffs(self, block_LQ: Block, among: slice) -> Block:
        """A score for each of these queries that none of its best k, if new, stays at or below."""
        cutoffs = self._scores[among, -1]
        if np.isneginf(cutoffs).any() and len(block_LQ) // _GROUPS > 1 and self._k <= _GROUPS:
            # The k largest maxima of disjoint groups are k items, so the best k all reach the least of these maxima.
            groups = block_LQ[: len(block_LQ) // _GROUPS * _GROUPS].reshape(-1, _GROUPS, block_LQ.shape[1]).max(axis=0)
            groups.partition(_GROUPS - self._k, axis=0)
            reached = np.nextafter(groups[_GROUPS - self._k], np.float32(-np.inf))
            cutoffs = np.maximum(cutoffs, reached)
        return cutoffs

    def _addresses_at(self, block_LQ: Block, lines: Ranks, queries: Ranks) -> Ranks:
        assert self._addresses_of is not None
        addresses = np.empty(len(lines), np.int64)
        order = np.argsort(lines, kind="stable")
        bounds = np.flatnonzero(np.diff(lines[order], prepend=-1, append=-1)).tolist()
        for start, stop in pairwise(bounds):
            pairs = order[start:stop]
            addresses[pairs] = self._addresses_of(block_LQ[lines[pairs[0]]], queries[pairs])
        return addresses


def _reranked(lines: Side, queries: Side, k: int, addresses: Addresses | None) -> Ranks:
    candidates = _Candidates(len(queries[0]), k, addresses)
    for start, block in _blocks(lines, queries):
        candidates.offer(start, block)
    return candidates.reranked()


def _blocks(lines: Side, queries: Side) -> Iterator[tuple[int, Block]]:
    """Scores of a few lines with all queries, float32 (≤ 1024, queries); the next are multiplied while these are looked at.

    A block is overwritten two blocks later.
    """
    whole = [side.astype(np.float32, copy=False) for side in queries]
    num_lines, num_queries = len(lines[0]), len(queries[0])
    step = max(1, min(num_lines, _MOST_LINES, _BLOCK_BYTES // (4 * num_queries * len(lines))))
    buffers = np.empty((2, step, num_queries), np.float32)

    def product(start: int) -> Block:
        block = buffers[start // step % 2, : min(step, num_lines - start)]
        return _product([side[start : start + step] for side in lines], whole, block)

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(product, 0)
        for start in range(0, num_lines, step):
            block = coming.result()
            if start + step < num_lines:
                coming = pool.submit(product, start + step)
            yield start, block


def _product(lines: Side, queries: Side, out: Block) -> Block:
    """Dot products, or the average of several models'; `out` is filled and returned."""
    lines = [side.astype(np.float32, copy=False) for side in lines]
    if len(lines) == 1:
        return np.matmul(lines[0], queries[0].T, out=out)
    return ensemble([left @ right.T for left, right in zip(lines, queries, strict=True)], out=out)


def _sides(models: Models) -> tuple[Side, Side]:
    return [images for images, _ in models], [captions for _, captions in models]


def _own_scores(images: Side, captions: Side, image_of: Ranks) -> NDArray[np.float32]:
    """The score of every caption with its own image (captions,), from products with few other images."""
    scores = np.empty(len(image_of), np.float32)
    order = np.argsort(image_of, kind="stable")
    for start in range(0, len(order), _OWN_CAPTIONS):
        rows = order[start : start + _OWN_CAPTIONS]
        # A very narrow product may be rounded in another way than a wide one.
        first = max(0, min(int(image_of[rows[0]]), len(images[0]) - _OWN_IMAGES))
        stop = max(int(image_of[rows[-1]]) + 1, first + _OWN_IMAGES)
        others = [side[first:stop].astype(np.float32, copy=False) for side in images]
        block = np.empty((len(rows), len(others[0])), np.float32)
        _product([side[rows] for side in captions], others, block)
        scores[rows] = block[np.arange(len(rows)), image_of[rows] - first]
    return scores


def _best_own(scores: NDArray[np.float32], image_of: Ranks) -> Ranks:
    """Every image's best own caption, of equals the first, (images,)."""
    by_image = np.lexsort((np.arange(len(scores)), -scores, image_of))
    return by_image[np.searchsorted(image_of[by_image], np.arange(int(image_of.max()) + 1))]
