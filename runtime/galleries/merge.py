"""Several galleries into a new one: the parts of one list (`--rows`) into the bytes of a single run, or galleries of one bundle."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import sha256_of_bytes, write_atomically

from .edit import Duplicates, is_part, joined, without_duplicates
from .gallery import Gallery
from .index import INDEX_FILE, QUARANTINE_FILE, FileRecord, GalleryIndex, relative
from .store import commit, disk_errors, is_own, locked, remove

Progress = Callable[[str, int, int], None]


def merge(
    paths: Sequence[Path], out: Path, *, duplicates: Duplicates = "refuse", progress: Progress | None = None
) -> GalleryIndex:
    """Merge finished galleries into `out`, which appears complete or not at all; a killed merge is simply started again.

    Parts of one list, in any order, become the gallery that one run over the list writes, to the byte. Other galleries
    follow each other as given: rows are counted on, folders of photographs are kept apart.

    Raises:
        DualmatchError: fewer than two, different bundles, kinds, dimensions or dtypes, parts that lack rows or overlap, an id
            that occurs twice (unless told which to keep), `out` exists, or a damaged file.
    """
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        raise DualmatchError("a merge takes at least two different galleries.")
    galleries = [Gallery.open(path) for path in paths]
    parts = [is_part(gallery.index) for gallery in galleries]
    if any(parts):
        galleries = _parts_in_order(galleries)
    for gallery in galleries[1:]:
        galleries[0].index.require_alike(gallery.path, gallery.index)
    if (out / INDEX_FILE).exists():
        raise DualmatchError(f"gallery {out} exists already; give another path, or `gallery append` to it.")
    with disk_errors(out, "nothing is kept"), locked(out):
        if foreign := sorted(path.name for path in out.iterdir() if not is_own(path.name)):
            raise DualmatchError(f"{out} is no gallery but holds {foreign[0]}; give a path that does not exist yet.")
        try:
            remove(out)
            index = _copied(galleries, out, progress, one_list=any(parts))
            commit(out, without_duplicates(galleries, index, duplicates))
        except BaseException:
            remove(out)
            raise
    return index


def _parts_in_order(galleries: Sequence[Gallery]) -> list[Gallery]:
    """Parts of one list by their rows; refused unless they are all of it, each row once."""
    first = galleries[0].index
    for gallery in galleries:
        index = gallery.index
        same = (index.source_hash, index.rows, index.batch_size, index.rows_per_shard)
        if same != (first.source_hash, first.rows, first.batch_size, first.rows_per_shard):
            raise DualmatchError(
                f"gallery {gallery.path} (rows {index.part[0]}:{index.part[1]} of {index.rows}) was encoded from another list, "
                f"or cut otherwise, than {galleries[0].path} (rows {first.part[0]}:{first.part[1]} of {first.rows}): "
                "parts merge with parts of the same list only."
            )
    ordered = sorted(galleries, key=lambda gallery: gallery.index.part)
    reached = 0
    for gallery in ordered:
        begin, end = gallery.index.part
        if begin != reached:
            what = f"rows {reached}:{begin} are in none" if begin > reached else f"rows {begin}:{reached} are in two"
            raise DualmatchError(f"the parts are not one list: {what} of the given galleries.")
        reached = end
    if reached != first.rows:
        raise DualmatchError(
            f"the parts are not one list: rows {reached}:{first.rows} are in none of the given galleries."
        )
    return ordered


def _copied(galleries: Sequence[Gallery], out: Path, progress: Progress | None, *, one_list: bool) -> GalleryIndex:
    write_atomically(out / QUARANTINE_FILE, b"")
    first = galleries[0]
    root = None if first.index.root is None else relative(first.path / first.index.root, out)
    index = replace(
        first.index,
        bundle_path=relative(first.bundle_path, out),
        root=root,
        source_hash=first.index.source_hash if one_list else sha256_of_bytes(b""),
        rows=first.index.rows if one_list else 0,
        part=(0, first.index.rows if one_list else 0),
        quarantine=FileRecord(file=QUARANTINE_FILE, bytes=0, sha256=sha256_of_bytes(b"")),
        shards=(),
    )
    for number, gallery in enumerate(galleries, 1):
        if progress is not None:
            progress("galleries", number, len(galleries))
        index = joined(out, index, gallery, len(index.shards), offset=0 if one_list else None)
    return index
