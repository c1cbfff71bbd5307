"""The bundle: a directory that deployment gets, complete in itself, read only after every hash has been checked.

manifest.json            what everything is; the rest is listed in it with SHA-256 and size
image_encoder.onnx       pixels (and regions) to unit vectors
text_encoder.onnx        token ids to unit vectors
tokenizer.json           captions to token ids
parity.safetensors       sample inputs with torch's outputs, and torch's float32 embeddings of the gate's images and captions
parity.json              ids and content hashes of those images, the captions' texts, and which caption belongs to which image
engines/                 TensorRT engines, if any were compiled
README.md                the model card, with the measured recall
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .backends.base import TensorSpec
from .configs import from_mapping
from .errors import DualmatchError
from .files import sha256_of_bytes, sha256_of_file, write_atomically
from .preprocess import Preprocess
from .tokenizer import TokenizerOptions

FORMAT = "dualmatch-bundle"
VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 2**20

EncoderName = Literal["image", "text"]


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of the bundle: SHA-256 in hexadecimal, size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class EncoderEntry:
    """One graph.

    Attributes:
        file: the ONNX file's name in the bundle.
        precision: `fp32` or `fp16`: what the graph computes in; its inputs and outputs are float32 and int64 at any precision.
        opset: of the default ONNX domain.
        inputs, outputs: names, dtypes and shapes; a string in a shape is a dynamic axis.
        tolerance: largest absolute difference per component of a unit vector that was allowed against torch at export.
        measured: the largest that was seen, on the parity samples at several batch sizes and lengths.
    """

    file: str
    precision: Literal["fp32", "fp16"]
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tolerance: float
    measured: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` says; see `Bundle` for the directory.

    Attributes:
        model: the network's name, and its configuration as the recipe had it.
        encoders: `image` and `text`.
        preprocessing: photographs to pixels; None for a network without pixels.
        pad_policy: `masked`: a caption's embedding depends on the caption alone; `authors`: padding counts, as in their code.
        caption_batch: how many captions the reference encodes together (it matters under `authors` only).
        provenance: checkpoint hash, recipe name, data set, tool versions.
        parity: what the gate measured, with its tolerances and its verdict.
        engines: compiled engines.
        files: every other file of the bundle.
    """

    model: Mapping[str, Any]
    embedding_dimension: int
    encoders: Mapping[str, EncoderEntry]
    tokenizer: TokenizerOptions
    preprocessing: Preprocess | None
    pad_policy: Literal["authors", "masked"]
    provenance: Mapping[str, Any]
    parity: Mapping[str, Any]
    caption_batch: int = 128
    engines: tuple[Mapping[str, Any], ...] = ()
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    def to_json(self) -> str:
        """The manifest's text."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=2) + "\n"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An opened bundle, all hashes checked.

    Attributes:
        path: the directory.
        hash: SHA-256 of the manifest (everything but the engines, which belong to one machine): what galleries name.
    """

    path: Path
    manifest: Manifest
    hash: str

    def file(self, name: str) -> Path:
        """A listed file's path."""
        return self.path / name

    def encoder_path(self, encoder: EncoderName) -> Path:
        """The ONNX graph of one encoder."""
        return self.path / self.manifest.encoders[encoder].file


def load_bundle(path: str | Path) -> Bundle:
    """Open a bundle: read its manifest, check size and SHA-256 of every file before anything parses it.

    Raises:
        DualmatchError: no bundle, another version, a file missing, changed or outside the bundle.
    """
    folder = Path(path)
    manifest_path = folder / MANIFEST
    if not folder.is_dir():
        raise DualmatchError(f"there is no bundle {folder}; `dualmatch export RUN --out {folder}` makes one.")
    if not manifest_path.is_file():
        raise DualmatchError(f"{folder} is not a bundle: it has no {MANIFEST}.")
    if manifest_path.stat().st_size > MAX_MANIFEST_BYTES:
        raise DualmatchError(f"{manifest_path} is larger than {MAX_MANIFEST_BYTES} bytes; it cannot be a manifest.")
    try:
        values = json.loads(manifest_path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DualmatchError(
            f"{manifest_path} is not valid JSON ({error}); the bundle is damaged, export it again."
        ) from None
    manifest = _manifest(values, manifest_path)
    for name, entry in manifest.files.items():
        _check_file(folder, name, entry)
    return Bundle(path=folder, manifest=manifest, hash=bundle_hash(values))


def bundle_hash(values: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's JSON values without its engines and their files: compiling an engine leaves galleries valid.

    Of the values as written, not of a `Manifest`: an option that a later release adds must not change what galleries name.
    """
    own = {name: entry for name, entry in values["files"].items() if not name.startswith("engines/")}
    identity = {name: value for name, value in values.items() if name != "engines"} | {"files": own}
    return sha256_of_bytes(json.dumps(identity, sort_keys=True).encode())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically."""
    write_atomically(folder / MANIFEST, manifest.to_json())


def file_entry(path: Path) -> FileEntry:
    """Hash and size of a file."""
    return FileEntry(sha256=sha256_of_file(path), bytes=path.stat().st_size)


def _manifest(values: Any, path: Path) -> Manifest:
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DualmatchError(f"{path} is not the manifest of a dualmatch bundle.")
    if values.get("version") != VERSION:
        raise DualmatchError(
            f"{path} has format version {values.get('version')}; this dualmatch reads version {VERSION}."
        )
    values = {name: value for name, value in values.items() if name not in ("format", "version")}
    try:
        manifest = from_mapping(Manifest, values, "it")
    except DualmatchError as error:
        raise DualmatchError(
            f"{path} is not a complete manifest ({str(error).rstrip('.')}); the bundle is damaged, export it again."
        ) from None
    if set(manifest.encoders) != {"image", "text"}:
        raise DualmatchError(f"{path} must describe the encoders image and text, it has {sorted(manifest.encoders)}.")
    if manifest.preprocessing is None and any(spec.name == "pixels" for spec in manifest.encoders["image"].inputs):
        raise DualmatchError(
            f"{path} does not say how photographs become pixels; the bundle is damaged, export it again."
        )
    for needed in (
        "tokenizer.json",
        "parity.safetensors",
        "parity.json",
        *(entry.file for entry in manifest.encoders.values()),
    ):
        if needed not in manifest.files:
            raise DualmatchError(f"{path} does not list {needed}; the bundle is damaged, export it again.")
    return manifest


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    path, parts = folder / name, Path(name).parts
    # A link may lead out; the check on the text comes first, because a name with a NUL cannot even be resolved.
    escapes = "\0" in name or not parts or Path(name).is_absolute() or ".." in parts
    if escapes or not path.resolve().is_relative_to(folder.resolve()):
        raise DualmatchError(f"the bundle {folder} lists {name!r}, which lies outside it; it is refused.")
    if not path.is_file():
        raise DualmatchError(f"the bundle {folder} lacks {name}; export it again.")
    size = path.stat().st_size
    if size != entry.bytes:
        raise DualmatchError(
            f"{path} has {size} bytes, the manifest says {entry.bytes}; the bundle is damaged, export it again."
        )
    if sha256_of_file(path) != entry.sha256:
        raise DualmatchError(
            f"{path} does not match the SHA-256 in the manifest; the bundle is damaged or was changed, export it again."
        )
