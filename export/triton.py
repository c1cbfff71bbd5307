"""A bundle as a model repository of NVIDIA's Triton Inference Server; needs neither torch nor onnx.

NAME_image      pixels (and regions) to embeddings: the ONNX graph, or its TensorRT engine
NAME_text       token ids to embeddings: likewise
NAME_tokenizer  captions to token ids, in the Python backend
NAME_caption    captions to embeddings: the ensemble of the two before

The fields of config.pbtxt are those of Triton's `model_config.proto`.
"""

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualmatch.runtime.backends import TensorSpec
from dualmatch.runtime.bundle import Bundle, EncoderName
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import FOLDER_KINDS, refuse_unwritable

MAX_BATCH = 64
QUEUE_DELAY_US = 1000
PAD_MULTIPLE = 8
_TYPES = {
    "float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64", "int32": "TYPE_INT32", "uint8": "TYPE_UINT8", "bool": "TYPE_BOOL",
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class Word:
    """An enumeration's value or a number that text format writes without quotes."""

    text: str


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """What serves one encoder: the file's bytes, its name in the repository, the fields that name its backend, the largest batch and
    length that it takes (0 for no limit).
    """

    data: bytes
    file: str
    fields: Mapping[str, Any]
    max_batch: int
    max_length: int = 0


def model_names(name: str) -> tuple[str, str, str, str]:
    """The repository's models: image, text, tokenizer, caption.

    Raises:
        DualmatchError: `name` cannot be a folder's name.
    """
    if not _NAME.fullmatch(name):
        raise DualmatchError(f"{name!r} cannot name models; take letters, digits, dots, dashes and underscores.")
    return f"{name}_image", f"{name}_text", f"{name}_tokenizer", f"{name}_caption"


def refuse_existing_models(out: Path, name: str) -> None:
    """Refuse a repository that holds models of this name already, before any work is done.

    Raises:
        DualmatchError: it does, `out` is not a folder, or nothing can be written there.
    """
    if out.exists() and not out.is_dir():
        raise DualmatchError(f"the model repository {out} is a file; give a folder.")
    for file, (kind, _) in FOLDER_KINDS.items():
        if (out / file).is_file():
            raise DualmatchError(f"{out} is {kind}; give the model repository a folder of its own.")
    for model in model_names(name):
        refuse_unwritable(out / model, "the model")
        if (out / model).exists() or (out / model).is_symlink():
            raise DualmatchError(
                f"the model repository {out} has a model {model} already; give another --name, or remove it."
            )


def write_triton_repository(
    bundle: Bundle,
    out: Path,
    *,
    name: str = "dualmatch",
    engines: str | None = None,
    max_batch: int = MAX_BATCH,
    queue_delay_us: int = QUEUE_DELAY_US,
) -> list[str]:
    """Write a bundle's four models into the repository `out`, beside what it holds already; returns their names.

    Args:
        name: what the models' names begin with.
        engines: a flavour of the bundle's engines to serve in place of its ONNX graphs; Triton loads `tensorrt` only.
        max_batch: most items that Triton puts into one batch; an engine's profile may allow fewer.
        queue_delay_us: how long Triton waits for a batch to fill, in microseconds.

    Raises:
        DualmatchError: models of this name are there, the bundle has no such engine, or its graphs keep weights in other files.
    """
    refuse_existing_models(out, name)
    image, text, tokenizer, caption = model_names(name)
    manifest = bundle.manifest
    options = manifest.tokenizer
    graphs = {encoder: _graph(bundle, encoder, engines, max_batch) for encoder in manifest.encoders}
    dynamic_batching = {"max_queue_delay_microseconds": Word(str(queue_delay_us))}
    caption_input = {"name": "caption", "data_type": Word("TYPE_STRING"), "dims": [Word("1")]}
    token_ids, embedding = manifest.encoders["text"].inputs[0], manifest.encoders["text"].outputs[0]
    text_batch = graphs["text"].max_batch

    configs: dict[str, dict[str, Any]] = {}
    encoder_of: dict[str, EncoderName] = {image: "image", text: "text"}
    for model, encoder in encoder_of.items():
        entry, graph = manifest.encoders[encoder], graphs[encoder]
        configs[model] = {
            **graph.fields,
            "max_batch_size": Word(str(graph.max_batch)),
            "input": [_tensor(spec) for spec in entry.inputs],
            "output": [_tensor(spec) for spec in entry.outputs],
            "dynamic_batching": dynamic_batching,
            "parameters": _parameters(bundle, {"precision": entry.precision}),
        }
    # Where padding counts, a caption is padded as its own request asks for and no further.
    multiple = PAD_MULTIPLE if manifest.pad_policy == "masked" else 1
    configs[tokenizer] = {
        "backend": "python",
        "max_batch_size": Word(str(text_batch)),
        "input": [caption_input],
        "output": [_tensor(token_ids)],
        "instance_group": [{"count": Word("1"), "kind": Word("KIND_CPU")}],
        "parameters": _parameters(
            bundle,
            {
                "tokenizer_sha256": manifest.files["tokenizer.json"].sha256,
                "max_length": str(options.max_length),
                "fixed_length": str(options.fixed_length),
                "keep_last_special": str(options.keep_last_special).lower(),
                "pad_multiple": str(multiple),
                "pad_limit": str(graphs["text"].max_length or options.max_length),
            },
        ),
    }
    configs[caption] = {
        "platform": "ensemble",
        "max_batch_size": Word(str(text_batch)),
        "input": [caption_input],
        "output": [_tensor(embedding)],
        "ensemble_scheduling": {
            "step": [_step(tokenizer, "caption", token_ids.name), _step(text, token_ids.name, embedding.name)]
        },
        "parameters": _parameters(bundle, {}),
    }
    files: dict[str, Mapping[str, bytes]] = {
        image: {graphs["image"].file: graphs["image"].data},
        text: {graphs["text"].file: graphs["text"].data},
        tokenizer: {
            "model.py": Path(__file__).with_name("triton_tokenizer.py").read_bytes(),
            "tokenizer.json": bundle.read("tokenizer.json"),
        },
        # Triton wants a version's folder of an ensemble too, and empty folders get lost on the way to many a store.
        caption: {"README": b"An ensemble has no file of its own; its steps are in config.pbtxt.\n"},
    }
    _write(out, {model: (_text_format({"name": model, **configs[model]}), files[model]) for model in configs})
    return list(configs)


def _graph(bundle: Bundle, encoder: EncoderName, engines: str | None, max_batch: int) -> _Graph:
    entry = bundle.manifest.encoders[encoder]
    for spec in (*entry.inputs, *entry.outputs):
        assert isinstance(spec.shape[0], str), "export makes the batch axis dynamic"
    if engines is None:
        data = bundle.graph(encoder)
        if isinstance(data, Path):
            raise DualmatchError(f"{data} keeps weights in other files, which is not supported in a model repository.")
        return _Graph(data=data, file="model.onnx", fields={"backend": "onnxruntime"}, max_batch=max_batch)
    if engines != "tensorrt":
        raise DualmatchError(
            f"Triton's TensorRT backend loads engines of the flavour 'tensorrt', not {engines!r}; leave --engines out to serve the ONNX graphs."
        )
    graph_hash = bundle.manifest.files[entry.engine_graph].sha256
    found = [e for e in bundle.manifest.engines if e.get("flavour") == engines and e.get("onnx_sha256") == graph_hash]
    if not found:
        raise DualmatchError(
            f"the bundle {bundle.path} has no {engines} engine of its {encoder} encoder; `dualmatch compile {bundle.path} --flavour {engines}` makes one."
        )
    profiles = found[0]["profiles"]
    batches = [_batches(profile) for profile in profiles]
    # The one profile with the largest batches, which must take single items too: Triton's batcher may send any number up to the most.
    index = max((i for i, (least, _) in enumerate(batches) if least == 1), key=lambda i: batches[i][1], default=None)
    if index is None:
        raise DualmatchError(
            f"no profile of {found[0]['file']} takes a batch of 1; compile it with one that begins at 1, as `throughput` does."
        )
    fields = {
        "platform": "tensorrt_plan",
        "instance_group": [{"count": Word("1"), "kind": Word("KIND_GPU"), "profile": [str(index)]}],
    }
    longest = [
        profiles[index]["shapes"][spec.name]["max"][1]
        for spec in entry.inputs
        if spec.shape[1:] and isinstance(spec.shape[1], str)
    ]
    return _Graph(
        data=bundle.read(str(found[0]["file"])),
        file="model.plan",
        fields=fields,
        max_batch=min(max_batch, batches[index][1]),
        max_length=min(longest, default=0),
    )


def _batches(profile: Mapping[str, Any]) -> tuple[int, int]:
    """(smallest, largest) batch of a profile as the manifest holds it."""
    shapes = list(profile["shapes"].values())
    return max(shape["min"][0] for shape in shapes), min(shape["max"][0] for shape in shapes)


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    """Without the batch axis, which Triton adds; -1 is a dynamic axis."""
    dims = [Word("-1" if isinstance(axis, str) else str(axis)) for axis in spec.shape[1:]]
    return {"name": spec.name, "data_type": Word(_TYPES[spec.dtype]), "dims": dims}


def _step(model: str, source: str, target: str) -> dict[str, Any]:
    return {
        "model_name": model,
        "model_version": Word("-1"),
        "input_map": {"key": source, "value": source},
        "output_map": {"key": target, "value": target},
    }


def _parameters(bundle: Bundle, values: Mapping[str, str]) -> list[dict[str, Any]]:
    """Entries of the map `parameters`; the bundle's hash is what galleries name, so a client can tell what to search in."""
    return [
        {"key": key, "value": {"string_value": value}} for key, value in {"bundle_hash": bundle.hash, **values}.items()
    ]


def _text_format(fields: Mapping[str, Any], indent: str = "") -> str:
    """A message in protobuf's text format: a list is a repeated field, a mapping a message, a text is quoted and a `Word` is not."""
    lines = []
    for key, value in fields.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Mapping):
                lines.append(f"{indent}{key} {{\n{_text_format(one, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{key}: {one.text if isinstance(one, Word) else _quoted(one)}\n")
    return "".join(lines)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _write(out: Path, models: Mapping[str, tuple[str, Mapping[str, bytes]]]) -> None:
    """Build all models aside, then move them in, the ensemble last: a server that polls the repository finds its steps there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    moved: Sequence[Path] = []
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=".part") as building:
        for model, (config, files) in models.items():
            folder = Path(building) / model / "1"
            folder.mkdir(parents=True)
            for file, data in files.items():
                (folder / file).write_bytes(data)
            (folder.parent / "config.pbtxt").write_text(config, encoding="utf-8")
        out.mkdir(exist_ok=True)
        try:
            for model in models:
                (Path(building) / model).rename(out / model)
                moved = [*moved, out / model]
        except BaseException:
            for path in moved:
                shutil.rmtree(path)
            raise
