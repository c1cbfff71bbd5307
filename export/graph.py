"""torch encoder → ONNX graph, float32, with named dynamic axes; and the graph's first check against torch."""

import copy
import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from dualmatch.runtime.backends import TensorSpec, open_session
from dualmatch.runtime.errors import DualmatchError

from .onnx_gru import OnnxGru

if TYPE_CHECKING:
    from collections.abc import Iterator

OPSET = 20
BATCH, LENGTH = "batch", "length"


def export_encoder(
    encoder: nn.Module, examples: Mapping[str, torch.Tensor], path: Path, *, output: str
) -> onnx.ModelProto:
    """Write an encoder as one ONNX graph.

    Args:
        encoder: in evaluation mode, float32.
        examples: an input of each name, batch first; integer inputs are (batch, length) and get a dynamic length too.
        path: the `.onnx` file to write.
        output: the output's name.

    Returns:
        The model as written.

    Raises:
        DualmatchError: torch cannot export it, or an axis that must be dynamic was frozen.
    """
    exported = _with_onnx_gru(encoder)
    axes = {
        name: {0: BATCH, 1: LENGTH} if not example.is_floating_point() else {0: BATCH}
        for name, example in examples.items()
    }
    shared = {BATCH: torch.export.Dim(BATCH, min=1, max=65536), LENGTH: torch.export.Dim(LENGTH, min=1, max=65536)}
    with _quiet():
        try:
            program = torch.onnx.export(
                exported,
                kwargs=dict(examples),
                dynamo=True,
                input_names=list(examples),
                output_names=[output],
                dynamic_shapes={name: {axis: shared[dim] for axis, dim in dims.items()} for name, dims in axes.items()},
                opset_version=OPSET,
                verbose=False,
            )
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DualmatchError(f"torch cannot export the encoder to ONNX: {reason}") from error
    assert program is not None
    model = program.model_proto
    _strip_notes(model)
    _check_axes(model, axes, output)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return model


def specs(values: Sequence[Any]) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes of a graph's inputs or outputs."""
    result = []
    for value in values:
        tensor = value.type.tensor_type
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
        result.append(
            TensorSpec(
                name=value.name, dtype=dtype, shape=tuple(d.dim_param or int(d.dim_value) for d in tensor.shape.dim)
            )
        )
    return tuple(result)


def largest_difference(encoder: nn.Module, path: Path, batches: Sequence[Mapping[str, NDArray[Any]]]) -> float:
    """Run torch and the graph on each batch; the largest absolute difference per component.

    Raises:
        DualmatchError: shapes differ, torch gives NaN or infinity, or the graph does not run or gives them.
    """
    worst = 0.0
    with open_session(path) as session:
        for feeds in batches:
            with torch.inference_mode():
                wanted = encoder(**{name: torch.from_numpy(value) for name, value in feeds.items()}).numpy()
            shapes = {name: list(value.shape) for name, value in feeds.items()}
            if not np.isfinite(wanted).all():  # max() below would pass over NaN
                raise DualmatchError(f"torch gives NaN or infinity for inputs {shapes}.")
            try:
                (got,) = session.run(feeds).values()
            except DualmatchError:
                raise
            except Exception as error:  # a backend's own exception: a shape frozen inside the graph, say
                raise DualmatchError(f"{path.name} does not run on inputs {shapes}: {error}") from error
            if got.shape != wanted.shape:
                raise DualmatchError(
                    f"{path.name} gives {list(got.shape)} for inputs {shapes}, torch gives {list(wanted.shape)}."
                )
            worst = max(worst, float(np.abs(got - wanted).max()))
    return worst


def _with_onnx_gru(encoder: nn.Module) -> nn.Module:
    """A copy in which every GRU exports as one operator."""
    copied = copy.deepcopy(encoder)
    for module in list(copied.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GRU):
                setattr(module, name, OnnxGru(child))
    return copied.eval()


def _strip_notes(model: onnx.ModelProto) -> None:
    """Drop stack traces and other notes of the exporter: they name files of the machine that exported."""
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    model.graph.doc_string = ""
    model.doc_string = ""


def _check_axes(model: onnx.ModelProto, axes: Mapping[str, Mapping[int, str]], output: str) -> None:
    wanted = {**axes, output: {0: BATCH}}
    for spec in (*specs(model.graph.input), *specs(model.graph.output)):
        for axis, name in wanted[spec.name].items():
            if spec.shape[axis] != name:
                raise DualmatchError(
                    f"the exported graph froze axis {axis} of {spec.name!r} at {spec.shape[axis]}; it must be dynamic ({name})."
                )


@contextmanager
def _quiet() -> "Iterator[None]":
    """Silence the exporter's remarks about packages that it does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
