"""The report's section on what the networks look at, drawn on photographs of the data set (DSRAN's Fig. 6, VSRN's Fig. 5)."""

from collections.abc import Sequence

from dualmatch.runtime.attention import AttentionMaps, attention_maps, has_attention, overlay
from dualmatch.runtime.datasets import ImageItem
from dualmatch.runtime.encoders import ImageEncoder
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.nodes import NodeKind
from dualmatch.runtime.page import image_tag, shown, thumbnail
from dualmatch.runtime.regions import RegionFile

from .models import Model
from .parts import Section

SIDE = 240  # pixels, the longer side
NOTE = (
    "Brighter counts for more. Each node of the image graph is compared with an embedding by dot product, and ranked; the r-th of k scores "
    "50 (k - r)², and a pixel has the scores of the boxes that it lies in, summed; averaged where every photograph has the same boxes. Once "
    "against the photograph's own embedding: what made it; once against the caption's: where it fits these words, which is what a score rests on."
)


def attention_section(
    items: Sequence[ImageItem],
    models: Sequence[Model],
    *,
    captions: Sequence[int],
    regions: RegionFile | None,
    backend: str,
    threads: int,
) -> Section | None:
    """Heat maps of every network whose bundle gives its nodes; None where none does, or the photographs are not at hand.

    Args:
        items: the photographs, a few.
        captions: for each the index of one of its captions.
    """
    looking = [model for model in models if has_attention(model.bundle)]
    if not looking or not all(item.path or item.encoded for item in items):
        return None
    found: list[tuple[Model, list[AttentionMaps]]] = []
    notes = []
    for model in looking:
        try:
            with ImageEncoder(
                model.bundle, backend=backend, threads=threads, batch_size=1, regions=regions, attention=True
            ) as encoder:
                photographs = [item.read_bytes() for item in items]
                found.append((model, attention_maps(encoder, photographs, [item.id for item in items])))
        except DualmatchError as error:  # an engine leaves the nodes out, a region file may not say where they lie
            notes.append(f'<p class="bad">{shown(model.label)}: {shown(str(error))}</p>')
    body = [f'<p class="soft">{NOTE}</p>', *notes]
    for number, (item, caption) in enumerate(zip(items, captions, strict=True)):
        small = thumbnail(item.read_bytes(), SIDE, name=item.id)
        if isinstance(small, str):
            continue
        text = item.captions[0]
        figures = [f"<figure>{image_tag(small, text)}<figcaption>{shown(item.id)}</figcaption></figure>"]
        for model, maps in found:
            one = maps[number]
            for kind in one.kinds:
                for words, vector in (("its own embedding", None), ("the caption", model.captions[caption])):
                    picture = overlay(small, one.heat(kind, vector=vector, size=small.size))
                    place, numbers = _strongest(one, kind, vector)
                    alternative = f"{model.label}, {kind} nodes against {words}: strongest at the {place} of “{text}”"
                    figures.append(
                        f"<figure>{image_tag(picture, alternative)}<figcaption><b>{shown(model.label)}</b>, {kind}, against {words}. "
                        f"Strongest: {place}, {numbers}</figcaption></figure>"
                    )
        body.append(f'<article><h3>“{shown(text)}”</h3><div class="looks">{"".join(figures)}</div></article>')
    return Section(key="attention", title="What the networks look at", body=body)


def _strongest(maps: AttentionMaps, kind: NodeKind, vector: object) -> tuple[str, str]:
    """Where the best node lies, in words and in pixels, with its product."""
    products = maps.products(kind, vector)  # type: ignore[arg-type]
    best = int(products.argmax())
    left, top, right, bottom = maps.nodes[kind].boxes[best]
    across, down = (left + right) / 2 / maps.width, (top + bottom) / 2 / maps.height
    column = "left" if across < 0.4 else "right" if across > 0.6 else ""
    line = "top" if down < 0.4 else "bottom" if down > 0.6 else ""
    place = " ".join(filter(None, (line, column))) or "middle"
    numbers = f"x {left:.0f} to {right:.0f}, y {top:.0f} to {bottom:.0f} of {maps.width} by {maps.height} pixels, product {products[best]:.2f}"
    return place, numbers
