"""The gate's findings to look at: one self-contained HTML page with the queries that flipped, their photographs as thumbnails."""

from collections.abc import Sequence
from pathlib import Path

from .errors import DualmatchError
from .files import refuse_unwritable, write_atomically
from .page import image_tag, page, shown, table, thumbnail
from .stages import HALF_MAX, Magnitude
from .verify import NamedFlip, Verification

THUMBNAIL = 240  # pixels, the longer side
NUM_PICTURED = 60  # flipped queries with thumbnails; the others follow as text, so that a broken export's page still opens on a phone


def check_report_path(path: Path) -> None:
    """Refuse, before anything long runs, a path that no report can be written to.

    Raises:
        DualmatchError: another suffix than .html, a folder of that name, or a place where nothing can be written.
    """
    if path.suffix.lower() != ".html" or path.is_dir():
        raise DualmatchError(f"the gate's report is one .html file, not {path}; give another name.")
    refuse_unwritable(path, "the gate's report")


def write_gate_report(found: Verification, path: Path, *, title: str) -> None:
    """Write the page.

    Raises:
        DualmatchError: it cannot be written.
    """
    check_report_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, gate_report(found, title=title))
    except OSError as error:
        raise DualmatchError(f"the gate's report {path} cannot be written: {error.strerror}.") from None


def gate_report(found: Verification, *, title: str) -> str:
    """The page's HTML; every number on it is text."""
    kind = "good" if found.decision.verdict == "pass" else "bad"
    parts = [
        f"<h1>{shown(title)}</h1>",
        f'<p class="verdict {kind}"><b>{found.decision.verdict.upper()}</b>: {shown(found.decision.reason)}</p>',
        "<h2>Stages</h2>",
        table(("stage", "graph", "status", "found"), [(s.name, s.graph, s.status, s.found) for s in found.stages]),
        *_retrieval(found),
        *_tolerances(found),
        *(_magnitudes(name, tensors) for name, tensors in found.magnitudes.items() if tensors),
        *_flips(found),
    ]
    return page(title, "\n".join(parts))


def _retrieval(found: Verification) -> list[str]:
    comparison = found.comparison
    if comparison is None:
        return []
    rows = []
    for label, recall in (("torch", comparison.before), ("this export", comparison.after)):
        cells = [f"{value:.2f}" for way in (recall.i2t, recall.t2i) for value in (way.r1, way.r5, way.r10)]
        rows.append((label, *cells, f"{recall.rsum:.2f}"))
    heads = ("", "i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10", "Rsum")
    cosines = [
        (name, *(f"{value:.6f}" for value in quantiles))
        for name, quantiles in (("images", comparison.image_cosine), ("captions", comparison.caption_cosine))
    ]
    return [
        "<h2>Retrieval on the same pairs</h2>",
        table(heads, rows),
        f'<p class="soft">{shown(str(comparison.before.protocol))}</p>',
        f"<p>Loss of Rsum {comparison.rsum_loss:.2f}, 95 % bound {comparison.bound:.2f}.</p>",
        f"<p>Same first answer {comparison.same_first:.2f} %, first ten in common {comparison.overlap_at_10:.2f} %.</p>",
        f"<p>Hits lost {comparison.hits_lost}, won {comparison.hits_won}, net {comparison.hits_won - comparison.hits_lost:+d}.</p>",
        "<h2>Cosine between before and after</h2>",
        table(("", "worst", "1st percentile", "median"), cosines),
    ]


def _tolerances(found: Verification) -> list[str]:
    smallest = found.decision.smallest
    if smallest is None:
        return []
    allowed = found.tolerances
    rows = [("worst cosine, at least", f"{allowed.worst_cosine:g}", f"{smallest.worst_cosine:.6f}")]
    if allowed.component is None:
        rows.append(("loss of Rsum, at most", f"{allowed.rsum_loss:g}", f"{smallest.rsum_loss:g}"))
    else:
        rows.append(("difference of a component, at most", f"{allowed.component:g}", f"{smallest.component:g}"))
    return ["<h2>Tolerances</h2>", table(("", "allowed", "smallest that would have passed"), rows)]


def _magnitudes(name: str, tensors: Sequence[Magnitude]) -> str:
    rows = [(one.tensor, one.operator, f"{one.largest:.4g}", f"{100 * one.share:.2f} %") for one in tensors]
    tensors_table = table(("tensor", "operator", "largest magnitude", "of float16's range"), rows)
    return (
        f"<h2>Largest magnitudes, {shown(name)} encoder</h2>\n"
        f'<p class="soft">On real inputs, in float32; float16 ends at {HALF_MAX:.0f}.</p>\n'
        f"<details><summary>{len(rows)} tensors, the largest {rows[0][2]} ({rows[0][3]})</summary>\n{tensors_table}\n</details>"
    )


def _flips(found: Verification) -> list[str]:
    if found.comparison is None:
        return []
    flips = found.flips
    parts = [f"<h2>{len(flips)} flipped queries</h2>"]
    if not flips:
        return [*parts, "<p>No answer entered or left the first 1, 5 or 10.</p>"]
    parts += [_pictured(flip, found) for flip in flips[:NUM_PICTURED]]
    if rest := flips[NUM_PICTURED:]:
        rows = [(flip.direction, flip.query, str(flip.rank_before), str(flip.rank_after)) for flip in rest]
        parts.append(table(("", "query", "rank before", "rank after"), rows))
    return parts


def _pictured(flip: NamedFlip, found: Verification) -> str:
    of_image = flip.direction == "i2t"
    kind = "bad" if flip.rank_after > flip.rank_before else "good"
    query = "" if of_image else f"<p>“{shown(flip.query)}”</p>"
    head = (
        f'<p><b>{flip.direction}</b> <span class="{kind}">rank {flip.rank_before} → {flip.rank_after}</span></p>{query}'
    )
    if of_image:
        figures = [_figure(flip.image, "the query", found)]
        answers = [("first before", flip.first_before), ("first after", flip.first_after)]
        texts = "".join(f'<p><span class="soft">{label}:</span> “{shown(text)}”</p>' for label, text in answers)
        return f'<article>{head}{texts}<div class="row">{"".join(figures)}</div></article>'
    pictured = {flip.image: ["right"]}
    pictured.setdefault(flip.first_before, []).append("first before")
    pictured.setdefault(flip.first_after, []).append("first after")
    figures = [_figure(image, ", ".join(labels), found) for image, labels in pictured.items()]
    return f'<article>{head}<div class="row">{"".join(figures)}</div></article>'


def _figure(image_id: str, label: str, found: Verification) -> str:
    picture = _thumbnail(image_id, found)
    return f"<figure>{picture}<figcaption>{shown(label)}: {shown(image_id)}</figcaption></figure>"


def _thumbnail(image_id: str, found: Verification) -> str:
    item = found.photographs.get(image_id)
    if item is None:
        return "<p>no photograph</p>"
    try:
        data = item.read_bytes()
    except (OSError, DualmatchError):
        return "<p>cannot be shown</p>"  # it was encoded a moment ago: removed since
    return image_tag(thumbnail(data, THUMBNAIL, name=image_id), image_id)
