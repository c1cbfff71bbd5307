"""The bundle: a directory that deployment gets, complete in itself, read only after every hash has been checked.

manifest.json            what everything is; the rest is listed in it with SHA-256 and size
image_encoder.onnx       pixels (and regions) to unit vectors
text_encoder.onnx        token ids to unit vectors
tokenizer.json           captions to token ids
parity.safetensors       sample inputs with torch's outputs, and torch's float32 embeddings of the gate's images and captions
parity.json              ids and content hashes of those images, the captions' texts, and which caption belongs to which image
engines/                 TensorRT engines, if any were compiled
README.md                the model card, with the measured recall
manifest.sig             a signature of the manifest, if it was signed (`runtime/signature.py`)

docs/integrity.md says what is checked when, and what is not.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .backends.base import TensorSpec
from .backends.engine_record import EngineRecord
from .bundle_files import MANIFEST, FileEntry, check_files, file_entry, read_checked, refuse_unlisted
from .configs import from_mapping
from .errors import DualmatchError
from .files import refuse_other_kind, sha256_of_bytes, strict_json, write_atomically
from .nodes import NodesOutput
from .onnx_files import external_files
from .preprocess import Preprocess
from .signature import SIGNATURE, Requirement, check_signature, required_keys, sign_manifest
from .tokenizer import TokenizerOptions

__all__ = [
    "MANIFEST", "Bundle", "EncoderEntry", "FileEntry", "Manifest", "bundle_hash", "file_entry", "load_bundle", "sign_bundle", "write_manifest",
]  # fmt: skip

FORMAT = "dualmatch-bundle"
VERSION = 1
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_DIMENSION = 65536
DTYPES = ("float32", "float16", "int64", "int32", "uint8", "bool")
"""What a graph's inputs and outputs may be."""

EncoderName = Literal["image", "text"]


@dataclass(frozen=True, kw_only=True)
class EncoderEntry:
    """One graph.

    Attributes:
        file: the ONNX file's name in the bundle.
        precision: `fp32`, `fp16` or `int8`: what the graph computes in; its inputs and outputs are float32 and int64 at any precision.
        opset: of the default ONNX domain.
        inputs, outputs: names, dtypes and shapes; a string in a shape is a dynamic axis.
        tolerance: largest absolute difference per component of a unit vector that was allowed against torch at export.
        measured: the largest that was seen, on the parity samples at several batch sizes and lengths.
        engine_file: the graph for TensorRT where that is another one: at int8, which onnxruntime and TensorRT code differently.
        quantisation: at int8: calibration data, clipping percentile, the layers that stay in float32 and the noise that int8 would add.
        nodes: a second output of the image encoder's graph, where export was asked for it; no engine has it.
    """

    file: str
    precision: Literal["fp32", "fp16", "int8"]
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tolerance: float
    measured: float
    engine_file: str = ""
    quantisation: Mapping[str, Any] = field(default_factory=dict)
    nodes: NodesOutput | None = None

    @property
    def engine_graph(self) -> str:
        """The file that TensorRT engines are compiled from."""
        return self.engine_file or self.file


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
    encoders: Mapping[EncoderName, EncoderEntry]
    tokenizer: TokenizerOptions
    preprocessing: Preprocess | None
    pad_policy: Literal["authors", "masked"]
    provenance: Mapping[str, Any]
    parity: Mapping[str, Any]
    caption_batch: int = 128
    engines: tuple[Mapping[str, Any], ...] = ()
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    def to_json(self) -> str:
        """The manifest's text. Options newer than the format are left out where they say nothing: what rewrites an older bundle's
        manifest (`dualmatch compile`) must not change its hash.
        """
        values = asdict(self)
        for entry in values["encoders"].values():
            for newer in ("engine_file", "quantisation", "nodes"):
                if not entry[newer]:
                    del entry[newer]
        return json.dumps({"format": FORMAT, "version": VERSION, **values}, indent=2, allow_nan=False) + "\n"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An opened bundle, all hashes checked.

    Attributes:
        path: the directory.
        hash: SHA-256 of the manifest (everything but the engines, which belong to one machine): what galleries name.
        signed_by: fingerprint of the key that signed the manifest, where a signature was required; else None.
    """

    path: Path
    manifest: Manifest
    hash: str
    signed_by: str | None = None

    def file(self, name: str) -> Path:
        """A listed file's path."""
        return self.path / name

    def encoder_path(self, encoder: EncoderName) -> Path:
        """The ONNX graph of one encoder."""
        return self.path / self.manifest.encoders[encoder].file

    def read(self, name: str) -> bytes:
        """The bytes of a listed file, checked once more as they are read: what is parsed is what was hashed.

        Raises:
            DualmatchError: the file has changed since the bundle was opened.
        """
        return read_checked(self.path, name, self.manifest.files[name])

    def graph(self, encoder: EncoderName, *, for_tensorrt: bool = False) -> bytes | Path:
        """One encoder's graph for a backend: its checked bytes, or its path where its weights lie in other files of the bundle.

        Args:
            for_tensorrt: the graph that TensorRT takes, where that is another one.
        """
        entry = self.manifest.encoders[encoder]
        name = entry.engine_graph if for_tensorrt else entry.file
        data = self.read(name)
        return self.path / name if external_files(data, name) else data


def load_bundle(path: str | Path, *, require_signature: Requirement = None) -> Bundle:
    """Open a bundle: read its manifest, check size and SHA-256 of every file before anything parses it.

    Args:
        require_signature: a PEM file with the Ed25519 public keys of which one must have signed the manifest. None takes the file
            that $DUALMATCH_REQUIRE_SIGNATURE names, if it is set; False asks for no signature.

    Raises:
        DualmatchError: no bundle, another version, a file missing, changed or outside the bundle, a graph that asks for files which
            the manifest does not list, or a signature that is required and missing, stale, or by another key.
    """
    return _opened(Path(path), required_keys(require_signature))[0]


def sign_bundle(path: Path, key: Path) -> str:
    """Check a bundle as `load_bundle` does, and sign the manifest that was checked; returns the key's fingerprint.

    Args:
        key: a PEM file with an Ed25519 private key.

    Raises:
        DualmatchError: the bundle does not open, holds files that its manifest does not list, or the key cannot be read.
    """
    bundle, manifest = _opened(path, None)
    refuse_unlisted(bundle.path, bundle.manifest.files)
    text, fingerprint = sign_manifest(manifest, key)
    write_atomically(bundle.path / SIGNATURE, text)
    return fingerprint


def _opened(folder: Path, keys: Path | None) -> tuple[Bundle, bytes]:
    """The bundle, and its manifest's bytes as they were checked."""
    manifest_path = folder / MANIFEST
    if not folder.is_dir():
        if folder.is_file():
            raise DualmatchError(f"there is no bundle {folder}: it is a file, and a bundle is a folder.")
        raise DualmatchError(f"there is no bundle {folder}; `dualmatch export RUN --out {folder}` makes one.")
    refuse_other_kind(folder, "a bundle")
    if not manifest_path.is_file():
        raise DualmatchError(f"{folder} is not a bundle: it has no {MANIFEST}.")
    if manifest_path.is_symlink():
        raise DualmatchError(
            f"{manifest_path} is a link, which may lead outside it; a bundle holds its files itself, `cp -rL` copies one so."
        )
    with manifest_path.open("rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise DualmatchError(f"{manifest_path} is larger than {MAX_MANIFEST_BYTES} bytes; it cannot be a manifest.")
    signed_by = None if keys is None else check_signature(data, folder, keys)
    try:
        values = strict_json(data)
    except ValueError as error:
        raise DualmatchError(
            f"{manifest_path} is not valid JSON ({error}); the bundle is damaged, export it again."
        ) from None
    manifest = _manifest(values, manifest_path)
    check_files(folder, manifest.files)
    if signed_by is not None:
        refuse_unlisted(folder, manifest.files)
    return Bundle(path=folder, manifest=manifest, hash=bundle_hash(values), signed_by=signed_by), data


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


def _manifest(values: Any, path: Path) -> Manifest:
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DualmatchError(f"{path} is not the manifest of a dualmatch bundle.")
    version = values.get("version")
    if type(version) is not int or version != VERSION:  # True equals 1, but is not it
        raise DualmatchError(f"{path} has format version {version!r}; this dualmatch reads version {VERSION}.")
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
    _check_sizes(manifest, path)
    for needed in (
        "tokenizer.json",
        "parity.safetensors",
        "parity.json",
        *(name for entry in manifest.encoders.values() for name in (entry.file, entry.engine_graph)),
    ):
        if needed not in manifest.files:
            raise DualmatchError(f"{path} does not list {needed}; the bundle is damaged, export it again.")
    _check_engines(manifest, path)
    return manifest


def _check_engines(manifest: Manifest, path: Path) -> None:
    """Every engine's record is complete, its file is listed, and its profiles have shapes for the graph that it was built from."""
    graphs = {manifest.files[entry.engine_graph].sha256: entry for entry in manifest.encoders.values()}
    for index, values in enumerate(manifest.engines):
        try:
            record = from_mapping(EngineRecord, values, f"its engines[{index}]")
        except DualmatchError as error:
            raise DualmatchError(
                f"{path} has a damaged record of an engine ({str(error).rstrip('.')}); remove it, and compile the bundle again."
            ) from None
        if record.file not in manifest.files:
            raise DualmatchError(
                f"{path} does not list the file {record.file[:200]!r} of its engines[{index}]; the bundle is damaged, compile it again."
            )
        if (entry := graphs.get(record.onnx_sha256)) is None:
            continue  # of another graph: refused where it is asked for
        ranks = {spec.name: len(spec.shape) for spec in entry.inputs}
        for profile in record.profiles:
            fits = profile.shapes.keys() == ranks.keys() and all(
                len(shape) == ranks[name] for name, shapes in profile.shapes.items() for shape in shapes
            )
            if not fits:
                raise DualmatchError(
                    f"{path} gives the profile {profile.name[:200]!r} of its engines[{index}] other inputs or ranks than the graph's; "
                    "the bundle is damaged, compile it again."
                )


def _check_sizes(manifest: Manifest, path: Path) -> None:
    """What decides how much memory serving takes lies within reason, and agrees with what the graphs take."""
    sizes = {
        "embedding_dimension": (manifest.embedding_dimension, 1),
        "caption_batch": (manifest.caption_batch, 1),
        "tokenizer.max_length": (manifest.tokenizer.max_length, 0),
        "tokenizer.fixed_length": (manifest.tokenizer.fixed_length, 0),
    }
    for name, (value, least) in sizes.items():
        if not least <= value <= MAX_DIMENSION:
            raise DualmatchError(f"{path} has {name} {value}; it must lie between {least} and {MAX_DIMENSION}.")
    for encoder, entry in manifest.encoders.items():
        # What is checked of a file goes by its name.
        if other := [file for file in (entry.file, entry.engine_graph) if not file.endswith(".onnx")]:
            raise DualmatchError(
                f"{path} names {other[0][:200]!r} as the {encoder} encoder's graph, which is no .onnx file."
            )
        if len(entry.outputs) != 1 or entry.outputs[0].shape[-1:] != (manifest.embedding_dimension,):
            raise DualmatchError(
                f"{path} does not give the {encoder} encoder one output of {manifest.embedding_dimension} components; "
                "the bundle is damaged, export it again."
            )
        if entry.nodes is not None:
            try:
                entry.nodes.check(manifest.embedding_dimension)
            except DualmatchError as error:
                raise DualmatchError(f"{path} {error}; the bundle is damaged, export it again.") from None
        if not entry.inputs:
            raise DualmatchError(
                f"{path} gives the {encoder} encoder no inputs; the bundle is damaged, export it again."
            )
        for spec in (*entry.inputs, *entry.outputs, *(() if entry.nodes is None else (entry.nodes.output,))):
            if spec.dtype not in DTYPES:
                raise DualmatchError(
                    f"{path} gives {spec.name!r} of the {encoder} encoder the type {spec.dtype!r}; it must be one of {', '.join(DTYPES)}."
                )
            if not spec.shape or not isinstance(spec.shape[0], str):
                raise DualmatchError(
                    f"{path} gives {spec.name!r} of the {encoder} encoder the shape {list(spec.shape)}, which does not begin with "
                    "a batch of any size; the bundle is damaged, export it again."
                )
        for spec in entry.inputs:
            sizes_of_axes = [axis for axis in spec.shape if isinstance(axis, int)]
            if any(not 1 <= axis <= MAX_DIMENSION for axis in sizes_of_axes):
                raise DualmatchError(f"{path} has an input {spec.name!r} of shape {list(spec.shape)}; it is refused.")
            if spec.name == "pixels" and manifest.preprocessing is not None:
                size = manifest.preprocessing.image_size
                if spec.shape[1:] != (3, size, size):
                    raise DualmatchError(
                        f"{path} scales photographs to {size} x {size} pixels, but its graph takes {list(spec.shape)}; "
                        "the bundle is damaged, export it again."
                    )
