"""What a gallery is made of: photographs in a folder or a list, captions in a file; each with an id that stays the same between runs."""

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dualmatch.runtime.errors import DualmatchError

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True, kw_only=True)
class PhotoSource:
    """One photograph, not yet read.

    Attributes:
        id: its path relative to the folder (or to the list file's folder), with forward slashes.
        path: the file.
    """

    id: str
    path: Path

    def fields(self) -> dict[str, str]:
        """What a gallery records beside row and id: nothing, the id says where the file is."""
        return {}


@dataclass(frozen=True, kw_only=True)
class CaptionSource:
    """One caption.

    Attributes:
        id: the file's own id; else `<image>#<k>`, the k-th caption of that image counted from 0; else its line number.
        text: the caption as written.
        image: the id of the image it describes, where the file says so.
    """

    id: str
    text: str
    image: str | None = None

    def fields(self) -> dict[str, str]:
        """What a gallery records beside row and id."""
        return {"caption": self.text} | ({} if self.image is None else {"image": self.image})


def photos_in(path: Path) -> list[PhotoSource]:
    """The photographs of a folder, or of a list file.

    A folder is read recursively, in the order of the relative paths; hidden files and folders are left out (macOS puts a
    hidden `._name.jpg` beside every photograph on foreign disks), linked folders are not entered. A list file (`.txt`)
    names one file a line, relative to itself, and keeps its order. Whether a photograph can be decoded shows at encoding.

    Raises:
        DualmatchError: nothing there, no photograph in it, or a list with an empty or repeated line.
    """
    if path.is_dir():
        return _photos_of_folder(path)
    if not path.exists():
        raise DualmatchError(f"photographs: there is no folder or list file {path}.")
    if path.suffix.lower() != ".txt":
        raise DualmatchError(f"photographs: {path} is neither a folder nor a list file (.txt, one path a line).")
    return _photos_of_list(path)


def photos_root(path: Path) -> Path:
    """The folder that the ids of `photos_in(path)` are relative to."""
    return path if path.is_dir() else path.parent


def captions_in(path: Path, *, images: Collection[str] | None = None) -> list[CaptionSource]:
    """The captions of a text file (`.txt`, one a line), of JSONL (`caption`, optional `id` and `image`), or of a `captions.json`.

    Args:
        path: the file; its suffix says which of the three it is. Keys of JSONL that are not named above are ignored.
        images: ids of the photographs at hand; a caption of any other image is then an error.

    Raises:
        DualmatchError: an unreadable file, line or entry (with its number), a repeated id, or an image that is not there.
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


def _photos_of_folder(folder: Path) -> list[PhotoSource]:
    ids: list[str] = []
    others: Counter[str] = Counter()
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            file = Path(parent, name)
            if not name.startswith(".") and file.suffix.lower() in PHOTO_SUFFIXES:
                ids.append(file.relative_to(folder).as_posix())
            else:
                others["hidden" if name.startswith(".") else file.suffix.lower() or "without suffix"] += 1
    if not ids:
        found = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items())) or "no file at all"
        raise DualmatchError(f"no photograph ({', '.join(PHOTO_SUFFIXES)}) in folder {folder}; it holds {found}.")
    return [PhotoSource(id=id_, path=folder / id_) for id_ in sorted(ids)]


def _photos_of_list(path: Path) -> list[PhotoSource]:
    first_line: dict[str, int] = {}
    for number, line in _lines(path):
        id_ = PurePosixPath(line).as_posix()
        if id_ in first_line:
            raise DualmatchError(f"{path}, line {number}: {id_!r} stands on line {first_line[id_]} already.")
        first_line[id_] = number
    if not first_line:
        raise DualmatchError(f"photographs: list file {path} is empty.")
    return [PhotoSource(id=id_, path=path.parent / id_) for id_ in first_line]


def _captions_of_text(path: Path) -> Iterator[tuple[str, CaptionSource]]:
    for number, line in _lines(path):
        yield f"line {number}", CaptionSource(id=str(number), text=line)


def _captions_of_jsonl(path: Path) -> Iterator[tuple[str, CaptionSource]]:
    per_image: Counter[str] = Counter()
    for number, line in _lines(path):
        place = f"line {number}"
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
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
        yield place, CaptionSource(id=id_, text=_text(entry.get("caption"), "'caption'", path, place), image=image)


def _captions_of_json(path: Path) -> Iterator[tuple[str, CaptionSource]]:
    try:
        content = json.loads(_decoded(path))
    except (json.JSONDecodeError, RecursionError) as error:
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
            text = _text(caption, f"caption {k}", path, place)
            yield f"{place}, caption {k}", CaptionSource(id=f"{image}#{k}", text=text, image=image)


def _text(value: Any, what: str, path: Path, place: str) -> str:
    """`value` as stripped text; JSON can also smuggle in half a surrogate pair, which no tokenizer takes."""
    if not isinstance(value, str) or not value.strip():
        raise DualmatchError(f"{path}, {place}: {what} must be text, found {json.dumps(value)[:40]}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DualmatchError(f"{path}, {place}: {what} holds half a surrogate pair, which is no text.") from None
    return value.strip()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, stripped. An empty line between others is an error: it may be a lost entry; at the end it is none."""
    # Not splitlines(), which also breaks a caption at a form feed or a Unicode line separator.
    lines = [line.strip() for line in _decoded(path).rstrip().split("\n")]
    for number, line in enumerate(lines, start=1):
        if line:
            yield number, line
        elif len(lines) > 1:
            raise DualmatchError(f"{path}, line {number}: the line is empty; remove it or fill it in.")


def _decoded(path: Path) -> str:
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise DualmatchError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DualmatchError(f"{path}, line {line}: not UTF-8 ({error.reason}).") from None
