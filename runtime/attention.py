"""What the network looks at: heat maps from the nodes that an image encoder gives besides its embedding, without torch.

Each node is compared with the photograph's own embedding, or with a caption's, by dot product, and the nodes are ranked; the r-th of k
scores λ(k - r)², λ = 50, and a pixel has the scores of the boxes that it lies in (VSRN, section 4.5: summed; DSRAN's Fig. 6 ranks
likewise, and leaves open how ranks become brightness). DSRAN shows its 50 best regions and all cells of its grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .bundle import Bundle, Manifest
from .encoders import ImageEncoder
from .errors import DualmatchError
from .nodes import NodeGroup, NodeKind
from .preprocess import ImageLike, open_rgb

LAMBDA = 50
MOST_REGIONS = {"dsran": 50}
"""How many of the best regions a network's pictures show; all of them where it is not said."""

# Dark blue by violet and orange to light yellow, in steps of equal lightness, so that brighter always means more, in print too.
COLOURS = ("#04061c", "#2d125b", "#62197e", "#992d7e", "#ce446f", "#f26c60", "#fc9f6f", "#fdcf94", "#fcfdbf")
STRENGTH = 0.6


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """One photograph's nodes of one kind.

    Attributes:
        vectors: (n, D) float32, in the space of the embeddings.
        boxes: (n, 4) float64: x1, y1, x2, y2 in the photograph's pixels.
        tiled: the boxes are the same for every photograph. A pixel's scores are then averaged: how many boxes hold it says nothing
            about what it shows.
        view: left, top, right, bottom of what the network sees of the photograph with these nodes, in its pixels.
        most: how many of the best are shown; 0 for all.
    """

    vectors: NDArray[np.float32]
    boxes: NDArray[np.float64]
    tiled: bool
    view: tuple[float, float, float, float]
    most: int = 0


@dataclass(frozen=True, kw_only=True)
class AttentionMaps:
    """What the network looks at in one photograph.

    Attributes:
        width, height: of the photograph, upright, in pixels.
        embedding: (D,) float32, as the encoder gives it.
        nodes: by kind.
    """

    width: int
    height: int
    embedding: NDArray[np.float32]
    nodes: dict[NodeKind, Nodes]

    @property
    def kinds(self) -> tuple[NodeKind, ...]:
        """`global` and `regional`, or one of them."""
        return tuple(self.nodes)

    @property
    def maps(self) -> dict[NodeKind, NDArray[np.float32]]:
        """By kind, what makes the photograph's own embedding: (height, width) float32 in [0, 1]."""
        return {kind: self.heat(kind) for kind in self.nodes}

    def towards(self, vector: NDArray[np.floating]) -> dict[NodeKind, NDArray[np.float32]]:
        """By kind, where the photograph fits another embedding (D,), a caption's for one: (height, width) float32 in [0, 1]."""
        return {kind: self.heat(kind, vector=vector) for kind in self.nodes}

    def products(self, kind: NodeKind, vector: NDArray[np.floating] | None = None) -> NDArray[np.float32]:
        """Dot products (n,) of the nodes with the photograph's own embedding, or with another."""
        towards = self.embedding if vector is None else np.asarray(vector, np.float32)
        return self.nodes[kind].vectors @ towards

    def heat(
        self,
        kind: NodeKind,
        *,
        vector: NDArray[np.floating] | None = None,
        size: tuple[int, int] | None = None,
    ) -> NDArray[np.float32]:
        """One map in [0, 1], float32 (height, width): the scores of the boxes at each pixel, from the least to the most that is seen.

        Args:
            vector: (D,), what the nodes are compared with; None for the photograph's own embedding.
            size: (width, height) to draw at; None for the photograph's own.
        """
        width, height = size or (self.width, self.height)
        scale = np.array([width / self.width, height / self.height] * 2)
        nodes = self.nodes[kind]
        scores = rank_scores(self.products(kind, vector), most=nodes.most)
        summed, count = painted(nodes.boxes * scale, scores, width, height)
        heat = summed / np.maximum(count, 1) if nodes.tiled else summed.astype(np.float64)
        left, top, right, bottom = pixels_of(np.array([nodes.view]) * scale, width, height)[0]
        seen = np.zeros((height, width), dtype=bool)
        seen[top:bottom, left:right] = True
        low, high = heat[seen].min(), heat[seen].max()
        heat = np.where(seen, heat - low, 0.0) / max(high - low, 1e-12)
        return heat.clip(0, 1).astype(np.float32)


def has_attention(bundle: Bundle) -> bool:
    """Whether a bundle was exported with `--attention`."""
    return bundle.manifest.encoders["image"].nodes is not None


def attention_maps(
    encoder: ImageEncoder, images: Sequence[ImageLike], image_ids: Sequence[str] | None = None
) -> list[AttentionMaps]:
    """What the network looks at in each photograph.

    Args:
        encoder: opened with `attention=True`.
        images: photographs, as for `encoder.encode`.
        image_ids: what the region file knows them by, where regions come from one; by default the paths' file names.

    Raises:
        DualmatchError: a photograph cannot be read, the encoder was opened without attention, or its regions come from a file that
            does not tell where they lie.
    """
    found: list[AttentionMaps] = []
    for start in range(0, len(images), encoder.batch_size):
        rows = range(start, min(start + encoder.batch_size, len(images)))
        photographs = [open_rgb(images[row]) for row in rows]
        names = [_name(images[row], image_ids[row] if image_ids else None) for row in rows]
        prepared = [encoder.prepare(one, name) for one, name in zip(photographs, names, strict=True)]
        embeddings, nodes = encoder.encode_with_nodes(prepared)
        found += [
            _maps(encoder, photograph.size, name, embedding, of_image)
            for photograph, name, embedding, of_image in zip(photographs, names, embeddings, nodes, strict=True)
        ]
    return found


def _name(image: ImageLike, image_id: str | None) -> str | None:
    return Path(image).name if image_id is None and isinstance(image, str | Path) else image_id


def _maps(
    encoder: ImageEncoder,
    size: tuple[int, int],
    name: str | None,
    embedding: NDArray[np.float32],
    vectors: NDArray[np.float32],
) -> AttentionMaps:
    manifest = encoder.bundle.manifest
    assert encoder.nodes is not None
    nodes: dict[NodeKind, Nodes] = {}
    start = 0
    for group in encoder.nodes.groups:
        most = MOST_REGIONS.get(str(manifest.model.get("name")), 0) if group.kind == "regional" else 0
        left, top, right, bottom = view = _view(manifest, group, size)
        fractions = np.array(group.boxes) if group.boxes else _boxes_from_file(encoder, name, size)
        nodes[group.kind] = Nodes(
            vectors=vectors[start : start + group.count],
            boxes=fractions * ([right - left, bottom - top] * 2) + [left, top, left, top],
            tiled=bool(group.boxes),
            view=view,
            most=most,
        )
        start += group.count
    return AttentionMaps(width=size[0], height=size[1], embedding=embedding, nodes=nodes)


def _view(manifest: Manifest, group: NodeGroup, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Of a photograph the trunk sees what pre-processing leaves; regions from a file are of all of it."""
    if group.boxes and manifest.preprocessing is not None:
        return manifest.preprocessing.view(*size)
    return 0.0, 0.0, float(size[0]), float(size[1])


def _boxes_from_file(encoder: ImageEncoder, name: str | None, size: tuple[int, int]) -> NDArray[np.float64]:
    """Boxes in fractions of the photograph's sides."""
    assert encoder.regions is not None
    assert name is not None  # without, `prepare` found no regions
    return encoder.regions.boxes(name, *size).astype(np.float64)


def rank_scores(products: NDArray[np.floating], *, most: int = 0) -> NDArray[np.int64]:
    """λ(k - r)² for the node that comes r-th of k by its product (the first: r = 1), (n,); equal ones in the nodes' order.

    Args:
        products: (n,) dot products.
        most: only so many of the best count; the others score 0. 0 counts all.
    """
    count = min(most or len(products), len(products))
    scores = np.zeros(len(products), np.int64)
    best = np.argsort(-products, kind="stable")[:count]
    scores[best] = LAMBDA * (count - 1 - np.arange(count)) ** 2
    return scores


def painted(
    boxes: NDArray[np.floating], scores: NDArray[np.int64], width: int, height: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """At every pixel the sum of the scores of the boxes that hold it, and how many hold it: int64 (height, width) each.

    Args:
        boxes: (n, 4): x1, y1, x2, y2 in pixels.
        scores: (n,).
    """
    # Steps at the corners, summed along both axes: as quick for a thousand boxes as for one, and exact.
    left, top, right, bottom = pixels_of(boxes, width, height).T

    def summed(weights: NDArray[np.int64]) -> NDArray[np.int64]:
        steps = np.zeros((height + 1, width + 1), np.int64)
        for y, x, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
            np.add.at(steps, (y, x), sign * weights)
        return steps.cumsum(axis=0).cumsum(axis=1)[:height, :width]

    return summed(scores), summed(np.ones_like(scores))


def pixels_of(boxes: NDArray[np.floating], width: int, height: int) -> NDArray[np.int64]:
    """Boxes (n, 4) on whole pixels of the picture, none empty."""
    corners = np.floor(np.asarray(boxes, np.float64) + 0.5).astype(np.int64)
    limits = np.array([width, height])
    first = corners[:, :2].clip(0, limits - 1)
    return np.concatenate([first, np.maximum(corners[:, 2:].clip(0, limits), first + 1)], axis=1)


def overlay(photo: Image.Image, heat: NDArray[np.floating]) -> Image.Image:
    """The photograph in grey under a map's colours, RGB, of the photograph's size.

    Args:
        photo: upright, as `preprocess.open_rgb` gives it, at any size.
        heat: (height, width) in [0, 1]; scaled to the photograph's size where it has another.

    Raises:
        DualmatchError: `heat` is no map.
    """
    if heat.ndim != 2 or not heat.size:
        raise DualmatchError(f"a heat map is (height, width), not {list(heat.shape)}.")
    levels = Image.fromarray((heat.clip(0, 1) * 255).round().astype(np.uint8))
    if levels.size != photo.size:
        levels = levels.resize(photo.size, Image.Resampling.BILINEAR)
    coloured = Image.fromarray(colour_table()[np.asarray(levels)])
    return Image.blend(photo.convert("L").convert("RGB"), coloured, STRENGTH)


def colour_table() -> NDArray[np.uint8]:
    """The colours of 0 … 255, (256, 3)."""
    anchors: NDArray[Any] = np.array([[int(one[i : i + 2], 16) for i in (1, 3, 5)] for one in COLOURS])
    places = np.linspace(0, len(COLOURS) - 1, 256)
    return (
        np.stack([np.interp(places, np.arange(len(COLOURS)), anchors[:, i]) for i in range(3)], axis=1)
        .round()
        .astype(np.uint8)
    )
