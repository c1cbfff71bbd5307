"""torch encoder → ONNX graph, float32, with named dynamic axes."""

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
from torch import nn

from dualmatch.models.generalised_pooling import GeneralisedPooling
from dualmatch.runtime.backends import TensorSpec
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.nodes import NODES_OUTPUT

from .nodes import WithNodes
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
        output: the output's name; the nodes that a `WithNodes` gives besides are always called the same.

    Returns:
        The model as written.

    Raises:
        DualmatchError: torch cannot export it. Whether it exported what was asked is for the gate to say.
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
                output_names=[output, NODES_OUTPUT] if isinstance(encoder, WithNodes) else [output],
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


def _with_onnx_gru(encoder: nn.Module) -> nn.Module:
    """A copy in which every GRU exports as one operator."""
    copied = copy.deepcopy(encoder)
    for module in list(copied.modules()):
        if isinstance(module, GeneralisedPooling):
            continue  # its GRU is in no graph: a table of coefficients is
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
