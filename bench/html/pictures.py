"""The report's sections with photographs: every trained network run on a data set, its answers, its failures, where it looks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.datasets import Dataset
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.page import image_tag, shown, thumbnail
from dualmatch.runtime.regions import RegionFile
from dualmatch.runtime.sheet import Hit, hit_list

from .attention import attention_section
from .found import Findings
from .models import Model, Progress, one_of_each, run_models
from .parts import Section

TOP = 5
NUM_FAILURES, NUM_DISAGREEMENTS = 3, 2  # each way, for every network
NUM_ATTENTION = 4  # photographs
THUMBNAIL = 200  # pixels, the longer side
PICTURES_STYLE = """
.lists { display: flex; flex-wrap: wrap; gap: 0 1.5rem; } .answers { flex: 1 1 30rem; min-width: 0; max-width: 46rem; margin-top: .6rem; } .answers > p { font-size: .85rem; margin: 0 0 .3rem; }
.answers .hits { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .5rem; } @media (min-width: 40rem) { .answers .hits { grid-template-columns: repeat(5, minmax(0, 1fr)); } }
.answers .facts { padding: .25rem .4rem; gap: 0 .4rem; font-size: .75rem; flex-wrap: wrap; white-space: nowrap; } .answers .facts .id { display: none; }
.query-photo { display: flex; flex-wrap: wrap; gap: 0 1.2rem; align-items: start; } .query-photo > figure { flex: 0 0 auto; margin-top: .6rem; max-width: 100%; }
.query-photo > .lists { flex: 1 1 18rem; min-width: 0; } .query-photo .answers { flex-basis: 17rem; }
ol.captions { margin: 0; padding: 0; list-style: none; font-size: .9rem; } ol.captions li { display: flex; gap: .5rem; padding: .2rem .4rem; border-bottom: 1px solid var(--line); }
ol.captions li > span:nth-child(2) { flex: 1; min-width: 0; } ol.captions li.right { box-shadow: inset 3px 0 0 var(--good); } ol.captions .mark { color: var(--good); font-weight: 600; white-space: nowrap; }
.looks { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem; margin-top: .6rem; } .looks img { width: 100%; max-width: 15rem; }
article > h3 { margin: 0; font-size: 1rem; }
"""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What running the bundles brought: the models with their recall, and sections."""

    models: Sequence[Model]
    sections: Sequence[Section]
    has_attention: bool


def pictures_of(
    found: Findings,
    dataset: Dataset,
    *,
    regions: RegionFile | None,
    num_queries: int,
    backend: str,
    threads: int,
    batch_size: int,
    progress: Progress | None,
) -> Pictures:
    """Encode `dataset` with one bundle of every trained network, and show what they find.

    Raises:
        DualmatchError: there is no bundle, or one cannot run on this data or backend.
    """
    chosen = one_of_each(found.bundles)
    if not chosen:
        raise DualmatchError(
            "--data runs bundles, and the folder holds none; `dualmatch export RUN --out BUNDLE` makes one."
        )
    models = run_models(
        chosen, dataset, regions=regions, backend=backend, threads=threads, batch_size=batch_size, progress=progress
    )
    show = Show(dataset, models)
    seen = spread(len(dataset.items), NUM_ATTENTION)
    attention = attention_section(
        [dataset.items[image] for image in seen], models, captions=[show.first_caption[image] for image in seen],
        regions=regions, backend=backend, threads=threads,
    )  # fmt: skip
    return Pictures(
        models=models,
        sections=[show.sheet(num_queries), show.failures(), *([attention] if attention else [])],
        has_attention=attention is not None,
    )


def spread(count: int, wanted: int) -> list[int]:
    """So many indices evenly spaced over 0 … count - 1, or all."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int)).tolist()


class Show:
    """Queries with the answers of all models one below the other."""

    def __init__(self, dataset: Dataset, models: Sequence[Model]) -> None:
        self.items, self.captions, self.models = dataset.items, dataset.captions, models
        self.image_of = np.array(dataset.caption_image)
        self.first_caption = {int(image): index for index, image in reversed(list(enumerate(self.image_of)))}

    def sheet(self, count: int) -> Section:
        """Evenly spaced queries both ways: not chosen, so that what they show is the rule."""
        queries = spread(len(self.items), 2 * count)
        note = f'<p class="soft">Queries evenly spaced over {len(self.items)} images, not chosen; right answers are marked.</p>'
        body = [note, "<h3>Text to image</h3>"]
        body += [self.text_query(self.first_caption[image]) for image in queries[::2]]
        body.append("<h3>Image to text</h3>")
        body += [self.image_query(image) for image in queries[1::2]]
        return Section(key="sheets", title=f"Retrieval: the first {TOP} answers", body=body)

    def failures(self) -> Section:
        """The queries whose right answer is farthest down, one an image; and where two networks differ most."""
        body = ['<p class="soft">The last answer of each row is the best right one, with its rank.</p>']
        for model in self.models:
            others = [other for other in self.models if other is not model]
            ways = (("Text to image", model.caption_ranks, self.image_of, self.text_query),
                    ("Image to text", model.image_ranks, np.arange(len(self.items)), self.image_query))  # fmt: skip
            for words, ranks, owner, query in ways:
                worst = _deepest(ranks, owner, NUM_FAILURES)
                if worst:
                    body.append(f"<h3>{words}: farthest from right, {shown(model.label)}</h3>")
                    body += [query(index, [model], with_right=True) for index in worst]
            for other in others:
                gap = model.caption_ranks - other.caption_ranks
                missed = np.where((other.caption_ranks == 0) & (model.caption_ranks >= TOP), gap, 0)
                if apart := _deepest(missed, self.image_of, NUM_DISAGREEMENTS):
                    body.append(
                        f"<h3>Text to image: {shown(other.label)} is right at once, {shown(model.label)} is not</h3>"
                    )
                    body += [self.text_query(index, [other, model], with_right=True) for index in apart]
        if len(body) == 1:
            body = ["<p>None: every first answer is right.</p>"]
        return Section(key="failures", title="Failures worth looking at", body=body)

    def text_query(self, caption: int, models: Sequence[Model] = (), *, with_right: bool = False) -> str:
        """A caption and the photographs that each model finds for it."""
        own = int(self.image_of[caption])
        parts = []
        for model in models or self.models:
            scores = model.images @ model.captions[caption]
            rank = int(model.caption_ranks[caption])
            best = np.argsort(-scores, kind="stable")[:TOP].tolist()
            if with_right and rank >= TOP:
                best[-1] = own
            hits = [
                Hit(
                    score=float(scores[image]), id=self.items[image].id, image=self.items[image].read_bytes(), right=image == own,
                    rank=rank + 1 if image == own else None, alt=self.alternative(image),
                )
                for image in best
            ]  # fmt: skip
            parts.append(self.answers(model, rank, hit_list(hits, side=THUMBNAIL)))
        return f"<article><h3>“{shown(self.captions[caption])}”</h3><div class='lists'>{''.join(parts)}</div></article>"

    def image_query(self, image: int, models: Sequence[Model] = (), *, with_right: bool = False) -> str:
        """A photograph and the captions that each model finds for it."""
        parts = []
        for model in models or self.models:
            scores = model.captions @ model.images[image]
            rank = int(model.image_ranks[image])
            order = np.argsort(-scores, kind="stable")
            best = order[:TOP].tolist()
            if with_right and rank >= TOP:
                best[-1] = int(order[rank])
            lines = []
            for place, caption in enumerate(best):
                right = int(self.image_of[caption]) == image
                mark = '<span class="mark">✓ right</span>' if right else ""
                number = rank + 1 if with_right and place == TOP - 1 and rank >= TOP else place + 1
                lines.append(
                    f'<li{" class=right" if right else ""}><span class="soft">{number}</span>'
                    f"<span>{shown(self.captions[caption])}</span>{mark}<b>{scores[caption]:.3f}</b></li>"
                )
            parts.append(self.answers(model, rank, f'<ol class="captions">{"".join(lines)}</ol>'))
        item = self.items[image]
        picture = image_tag(thumbnail(item.read_bytes(), THUMBNAIL, name=item.id), self.alternative(image))
        caption = f"<figcaption>{shown(item.id)}</figcaption>"
        return f'<article class="query-photo"><figure>{picture}{caption}</figure><div class="lists">{"".join(parts)}</div></article>'

    def answers(self, model: Model, rank: int, inner: str) -> str:
        """One model's answers below its name."""
        kind = "good" if rank == 0 else "soft"
        name = f"<b>{shown(model.label)}</b> · " if len(self.models) > 1 else ""
        return f'<div class="answers"><p>{name}<span class="{kind}">first right answer: rank {rank + 1}</span></p>{inner}</div>'

    def alternative(self, image: int) -> str:
        """What a photograph shows, in the words of its first caption."""
        return self.items[image].captions[0]


def _deepest(ranks: NDArray[np.int64], owner: NDArray[np.int64], count: int) -> list[int]:
    """The indices of the largest positive ranks, at most one for each owner, the first of equals."""
    found: dict[int, int] = {}
    for index in np.argsort(-ranks, kind="stable").tolist():
        if ranks[index] <= 0 or len(found) == count:
            break
        found.setdefault(int(owner[index]), index)
    return list(found.values())
