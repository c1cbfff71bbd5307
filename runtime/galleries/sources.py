"""What a gallery is made of: photographs in folders, lists, archives or columns, and captions in a file; each with an id that stays the same between runs."""

import json
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dualmatch.runtime.errors import DualmatchError

from .archives import ARCHIVE_SUFFIXES, is_archive_name, photos_of_tars
from .columns import photos_of_columns
from .patterns import files_of
from .photos import PHOTO_SUFFIXES, FilePhotos, Photo, is_photo_name
from .urls import is_url, local_path, photos_of_url

COLUMN_SUFFIXES = (".parquet", ".arrow")
STDIN = "-"


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionSource:
    """One caption.

    Attributes:
        id: the file's own id; else `<image>#<k>`, the k-th caption of that image counted from 0; else its line number.
        text: the caption as written; empty where there is none.
        image: the id of the image it describes, where the file says so.
        problem: why it cannot be encoded, if it cannot: found when it is its turn, so that rows stay in step.
    """

    id: str
    text: str
    image: str | None = None
    problem: str | None = None

    def fields(self) -> dict[str, str]:
        """What a gallery records beside row and id."""
        return {"caption": self.text} | ({} if self.image is None else {"image": self.image})


def photos_in(source: str | Path, *, column: str | None = None) -> Sequence[Photo]:
    """The photographs of a folder, a list of files, tar archives, or a column of parquet or arrow files.

    - A folder is read recursively, in the order of the relative paths; hidden files and folders are left out (macOS puts a
      hidden `._name.jpg` beside every photograph on foreign disks), linked folders are not entered.
    - A list (`.txt`, or `-` for standard input) names one file a line, relative to the list (to the working directory), and keeps its order.
    - `.tar`, `.tar.gz`, `.tgz` (webdataset's layout): every photograph in it, in the archive's order; see `compressed.py` for what gzip costs.
    - `.parquet`, or `.arrow` as Hugging Face `datasets` saves it: encoded photographs in a column of bytes or of `{bytes, path}`.
    - A list or archives in an object store, by URL (`s3://…`), see `urls.py`.

    Several archives or tables may be given by a pattern (`shards/*.tar`, `shards/{000..099}.tar`), in the order of the pattern or of their names.
    Whether a photograph can be decoded shows at encoding.

    Args:
        source: what to read.
        column: of parquet and arrow files; may be left out where only one column can hold photographs.

    Raises:
        DualmatchError: nothing there, no photograph in it, or a list with an empty or repeated line.
    """
    if str(source) == STDIN:
        return _photos_of_lines(_text_of("standard input", sys.stdin.buffer.read()), Path(), "standard input")
    if is_url(source):
        return photos_of_url(str(source), ids_of_lines)
    path = source = local_path(source)
    if path.is_dir():
        return _photos_of_folder(path)
    files = files_of(source)
    suffixes = {file.suffix.lower() for file in files}
    if files and all(is_archive_name(file.name) for file in files):
        return photos_of_tars(files, _folder_of(files))
    if files and suffixes <= set(COLUMN_SUFFIXES):
        return photos_of_columns(files, _folder_of(files), column)
    if not files:
        raise DualmatchError(f"photographs: there is no folder, list, archive or pattern's match {source}.")
    if suffixes != {".txt"} or len(files) > 1:
        raise DualmatchError(
            f"photographs: {source} is neither a folder nor a list (.txt, one path a line), nor .tar, .tar.gz, .parquet or .arrow files of one kind."
        )
    return _photos_of_lines(_decoded(path), path.parent, str(path))


def photos_root(source: str | Path) -> Path | None:
    """The folder that the ids of `photos_in(source)` are relative to; None where they lie in an object store."""
    if is_url(source):
        return None
    if str(source) == STDIN:
        return Path()
    path = local_path(source)
    if path.is_dir():
        return path
    return _folder_of(files_of(path) or [path])


def _folder_of(files: Sequence[Path]) -> Path:
    parents = {file.parent for file in files}
    return parents.pop() if len(parents) == 1 else Path(os.path.commonpath(parents))


def captions_in(path: Path, *, images: Collection[str] | None = None) -> list[CaptionSource]:
    """The captions of a text file (`.txt`, one a line), of JSONL (`caption`, optional `id` and `image`), or of a `captions.json`.

    Args:
        path: the file; its suffix says which of the three it is. Keys of JSONL that are not named above are ignored.
        images: ids of the photographs at hand; a caption of any other image is then an error.

    Raises:
        DualmatchError: an unreadable file or line (with its number), a repeated id, or an image that is not there. A line or entry
            without usable text is no error: it keeps its row, with the problem said.
    """
    if not path.is_file():
        raise DualmatchError(f"captions: there is no file {path}.")
    readers = {".txt": _captions_of_text, ".jsonl": _captions_of_jsonl, ".json": _captions_of_json}
    if path.suffix.lower() not in readers:
        raise DualmatchError(f"captions: {path} is none of .txt (one caption a line), .jsonl and captions.json.")
    known = None if images is None else frozenset(images)
    captions: list[CaptionSource] = []
    first_place: dict[str, str] = {}
    for place, caption in readers[path.suffix.lower()](path):
        if caption.id in first_place:
            raise DualmatchError(f"{path}, {place}: the id {caption.id!r} is taken by {first_place[caption.id]}.")
        if known is not None and caption.image is not None and caption.image not in known:
            raise DualmatchError(
                f"{path}, {place}: image {caption.image!r} is not among the {len(known)} photographs at hand."
            )
        first_place[caption.id] = place
        captions.append(caption)
    if not captions:
        raise DualmatchError(f"captions: {path} holds no caption.")
    return captions


def _photos_of_folder(folder: Path) -> FilePhotos:
    ids: list[str] = []
    others: Counter[str] = Counter()
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        inside = os.path.relpath(parent, folder)
        prefix = "" if inside == os.curdir else f"{inside}/"
        for name in names:
            if is_photo_name(name):
                ids.append(prefix + name)
            else:
                suffix = ".tar.gz" if name.lower().endswith(".tar.gz") else os.path.splitext(name)[1].lower()  # noqa: PTH122  (a million names)
                others["hidden" if name.startswith(".") else suffix or "without suffix"] += 1
    if not ids:
        found = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items())) or "no file at all"
        inside_them = [suffix for suffix in (*ARCHIVE_SUFFIXES, *COLUMN_SUFFIXES) if others[suffix]]
        advice = f"; for the photographs in them give '{folder}/*{inside_them[0]}'" if inside_them else ""
        raise DualmatchError(
            f"no photograph ({', '.join(PHOTO_SUFFIXES)}) in folder {folder}; it holds {found}{advice}."
        )
    ids.sort()
    return FilePhotos(ids, folder)


def _photos_of_lines(text: str, folder: Path, name: str) -> FilePhotos:
    return FilePhotos(_ids_of_lines(text, name), folder)


def ids_of_lines(data: bytes, name: str) -> list[str]:
    """The lines of a list of photographs; `name` is the list's, for errors.

    Raises:
        DualmatchError: not UTF-8, an empty line, one that occurs twice, or none.
    """
    return _ids_of_lines(_text_of(name, data), name)


def _ids_of_lines(text: str, name: str) -> list[str]:
    first_line: dict[str, int] = {}
    for number, line in _lines(text):
        if not line:
            raise DualmatchError(f"{name}, line {number}: the line is empty; remove it or fill it in.")
        id_ = line if "://" in line else PurePosixPath(line).as_posix()
        if id_ in first_line:
            raise DualmatchError(f"{name}, line {number}: {id_!r} stands on line {first_line[id_]} already.")
        first_line[id_] = number
    if not first_line:
        raise DualmatchError(f"photographs: the list of {name} is empty.")
    return list(first_line)


def _captions_of_text(path: Path) -> Iterator[tuple[str, CaptionSource]]:
    for number, line in _lines(_decoded(path)):
        yield f"line {number}", CaptionSource(id=str(number), text=line, problem=None if line else "the line is empty")


def _captions_of_jsonl(path: Path) -> Iterator[tuple[str, CaptionSource]]:
    per_image: Counter[str] = Counter()
    for number, line in _lines(_decoded(path)):
        place = f"line {number}"
        if not line:
            yield place, CaptionSource(id=str(number), text="", problem="the line is empty")
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DualmatchError(f"{path}, {place}: not JSON ({error}).") from None
        if not isinstance(entry, dict):
            raise DualmatchError(f"{path}, {place}: expected an object with a 'caption', found {line[:40]}.")
        image = _text(entry["image"], "'image'", path, place) if entry.get("image") is not None else None
        default = str(number) if image is None else f"{image}#{per_image[image]}"
        own_id = entry.get("id")
        # Ids are often whole numbers in such files; any other type would be a mistake.
        id_ = default if own_id is None else str(own_id) if type(own_id) is int else _text(own_id, "'id'", path, place)
        if image is not None:
            per_image[image] += 1
        if "caption" not in entry:
            raise DualmatchError(f"{path}, {place}: expected an object with a 'caption', found {line[:40]}.")
        text, problem = _caption(entry["caption"])
        yield place, CaptionSource(id=id_, text=text, image=image, problem=problem)


def _captions_of_json(path: Path) -> Iterator[tuple[str, CaptionSource]]:
    try:
        content = json.loads(_decoded(path))
    except (ValueError, RecursionError) as error:
        raise DualmatchError(f"captions: {path} is not JSON ({error}).") from None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise DualmatchError(f'captions: {path} must hold {{"images": [{{"filename", "captions": […]}}, …]}}.')
    for index, entry in enumerate(images):
        place = f"entry {index} of 'images'"
        if not isinstance(entry, dict) or not isinstance(entry.get("captions"), list):
            raise DualmatchError(f"{path}, {place}: expected an object with a 'filename' and a list of 'captions'.")
        image = _text(entry.get("filename"), "'filename'", path, place)
        for k, caption in enumerate(entry["captions"]):
            text, problem = _caption(caption)
            source = CaptionSource(id=f"{image}#{k}", text=text, image=image, problem=problem)
            yield f"{place}, caption {k}", source


def _caption(value: Any) -> tuple[str, str | None]:
    """A caption stripped, and why it cannot be used; JSON can also smuggle in half a surrogate pair, which no tokenizer takes."""
    if not isinstance(value, str):
        return "", f"the caption is not text but {json.dumps(value)[:40]}"
    if not value.strip():
        return "", "the caption is empty"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "", "the caption holds half a surrogate pair, which is no text"
    return value.strip(), None


def _text(value: Any, what: str, path: Path, place: str) -> str:
    """`value` as stripped text."""
    if not isinstance(value, str) or not value.strip():
        raise DualmatchError(f"{path}, {place}: {what} must be text, found {json.dumps(value)[:40]}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DualmatchError(f"{path}, {place}: {what} holds half a surrogate pair, which is no text.") from None
    return value.strip()


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines, stripped; empty ones at the end are none, between others they may be lost entries."""
    # Not splitlines(), which also breaks a caption at a form feed or a Unicode line separator.
    if text.strip():
        yield from enumerate((line.strip() for line in text.rstrip().split("\n")), start=1)


def _decoded(path: Path) -> str:
    try:
        return _text_of(str(path), path.read_bytes())
    except OSError as error:
        raise DualmatchError(f"{path} cannot be read: {error.strerror}.") from None


def _text_of(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DualmatchError(f"{name}, line {line}: not UTF-8 ({error.reason}).") from None
