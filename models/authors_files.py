"""The authors' files, read without executing anything: PyTorch checkpoints in both of its formats, and vocabulary pickles."""

import mmap
import sys
import zipfile
from argparse import Namespace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .safe_pickle import DATA_BUILDERS, Builder, interpret, object_builders, reading, refuse

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")

_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
}


def read_torch_file(path: Path) -> Any:
    """What `torch.save` wrote, in the format before PyTorch 1.6 or in the zip format since, from Python 2 or 3.

    Returns:
        Tensors on the CPU, dicts, lists, tuples, numbers, strings, bytes, and `argparse.Namespace`; an OrderedDict comes as a dict, a
        NumPy float64 as a float.

    Raises:
        DualmatchError: no such file, a damaged one, or one that holds anything else.
    """
    with reading(path, "checkpoint"), path.open("rb") as file:
        start = file.read(4)
        if not start:
            refuse("it is empty")
        return _read_zip(file) if start == b"PK\x03\x04" else _read_legacy(file)


def read_vocabulary(path: Path) -> dict[str, int]:
    """Ids by word from a pickled `Vocabulary` of the authors: <pad> 0, <start> 1, <end> 2, <unk> 3, then words without gaps.

    Raises:
        DualmatchError: no such file, a damaged one, one that holds anything but a vocabulary, or ids that contradict the above.
    """
    builders = {**DATA_BUILDERS, **object_builders("__main__.Vocabulary", "vocab.Vocabulary")}
    with reading(path, "vocabulary"), path.open("rb") as file:
        if not file.read(1):
            refuse("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            vocabulary = interpret(data, builders)
        ids = getattr(vocabulary, "word2idx", None)
        if not isinstance(vocabulary, Namespace) or not isinstance(ids, dict):
            refuse("it is no Vocabulary with word2idx")
        if not all(isinstance(word, str) and type(index) is int for word, index in ids.items()):
            refuse("its word2idx does not give a number for each word")
        if sorted(ids.values()) != list(range(len(ids))):
            refuse(f"its ids are not 0 to {len(ids) - 1}, each once")
        if any(ids.get(word) != index for index, word in enumerate(SPECIALS)):
            refuse(f"it does not begin with {', '.join(SPECIALS)}")
        return ids


class _Storages:
    """The flat tensors that a checkpoint's tensors are views of, by the file's keys."""

    def __init__(self, file: BinaryIO) -> None:
        self.bytes_left = file.seek(0, 2)
        self.by_key: dict[str, Tensor] = {}
        file.seek(0)

    def __call__(self, *description: Any) -> Tensor:
        """The storage of this description; claiming more than the file can hold is refused before memory is set aside."""
        tag, kind, key, _device, length, *view = description
        if (
            tag != "storage"
            or str(kind) not in _DTYPES
            or type(length) is not int
            or length < 0
            or view not in ([], [None])
        ):
            refuse("a tensor's storage is described in a way that PyTorch's files do not use")
        dtype = _DTYPES[str(kind)]
        if key not in self.by_key:
            self.bytes_left -= length * dtype.itemsize
            if self.bytes_left < 0:
                refuse(f"it claims a tensor of {length * dtype.itemsize:,} bytes, more than the file has left")
            self.by_key[key] = torch.empty(length, dtype=dtype)
        flat = self.by_key[key]
        if flat.dtype != dtype or len(flat) != length:
            refuse(f"it describes the storage {key!r} in two ways")
        return flat


def _tensor(flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2; the latter's gradient flag and hooks are left out."""
    if not isinstance(flat, Tensor) or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        refuse("a tensor is described in a way that PyTorch's files do not use")
    # as_strided checks the last element; a step of 0 could still claim any number of them.
    if prod(size) > len(flat):
        refuse(f"a tensor of shape {list(size)} is larger than its storage of {len(flat)} numbers")
    return flat.as_strided(size, stride, offset)


_CHECKPOINT_BUILDERS: dict[str, Builder] = {
    **DATA_BUILDERS,
    **object_builders("argparse.Namespace"),
    **dict.fromkeys(_DTYPES, lambda *_: refuse("it calls what is only a type's name")),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
}


def _read_legacy(file: BinaryIO) -> Any:
    """Pickles of a magic number, a version, the machine's facts, the object, and the storages' keys; then the storages in that order."""
    storages = _Storages(file)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:1] != b"\x80" or interpret(data, {}) != LEGACY_MAGIC or interpret(data, {}) != LEGACY_VERSION:
            refuse("it is no file of torch.save")
        if not interpret(data, {})["little_endian"]:
            refuse("it was written on a big-endian machine")
        found = interpret(data, _CHECKPOINT_BUILDERS, storages)
        keys = interpret(data, {})
        for key in keys:
            flat = storages.by_key.pop(key)
            _copy(flat, data.read(8), data.read(flat.nbytes))
        if storages.by_key:
            refuse(f"it lacks {len(storages.by_key)} of its storages")
    return found


def _read_zip(file: BinaryIO) -> Any:
    """An archive of the pickled object (data.pkl) and a member for each storage, none compressed."""
    storages = _Storages(file)
    with zipfile.ZipFile(file) as archive:
        objects = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(objects) != 1:
            refuse("it is a zip archive, but no file of torch.save")
        folder = objects[0].removesuffix("data.pkl")
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > member.compress_size:
                refuse("it is a compressed zip archive, which torch.save does not write")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            refuse("it was written on a big-endian machine")
        with archive.open(objects[0]) as pickled:
            found = interpret(pickled, _CHECKPOINT_BUILDERS, storages)
        for key, flat in storages.by_key.items():
            _copy(flat, None, archive.read(f"{folder}data/{key}"))
    return found


def _copy(flat: Tensor, length: bytes | None, raw: bytes) -> None:
    announced = None if length is None else (int.from_bytes(length, "little") if len(length) == 8 else -1)
    if len(raw) != flat.nbytes or announced not in (None, len(flat)):
        refuse("a tensor's numbers are cut off or of another length than announced")
    if raw:
        flat.view(torch.uint8).copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))


assert sys.byteorder == "little"  # as every machine that PyTorch is released for
