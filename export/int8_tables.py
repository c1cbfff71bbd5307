"""Word embeddings as int8 codes with a scale for each word: weight-only, the looked-up vectors are float32.

For onnxruntime the codes are looked up and then dequantised, so that a caption reads its own rows and no more. TensorRT takes int8 constants
only right in front of a DequantizeLinear: there the table stands behind one, which the builder places as it likes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

# Values of a table. A smaller one is no weight in a bundle, and each table costs two operators more.
LEAST_VALUES = 1 << 16


def is_table(node: onnx.NodeProto, weights: Mapping[str, TensorProto]) -> bool:
    """A lookup of computed or given ids in the rows of a large constant."""
    if node.op_type != "Gather" or node.input[0] not in weights or node.input[1] in weights:
        return False
    table = weights[node.input[0]]
    return (
        table.data_type == TensorProto.FLOAT
        and len(table.dims) == 2
        and table.dims[0] * table.dims[1] >= LEAST_VALUES
        and all(a.i == 0 for a in node.attribute if a.name == "axis")
    )


def lookup(
    node: onnx.NodeProto, codes: NDArray[np.int8], scales: NDArray[np.float32], *, for_engine: bool
) -> tuple[list[onnx.NodeProto], dict[str, NDArray[Any]]]:
    """What stands for a lookup: nodes, the last of the old one's name and output, and their constants."""
    table, ids, (output,) = node.input[0], node.input[1], node.output
    if for_engine:
        parts: dict[str, NDArray[Any]] = {
            f"{table}.codes": codes,
            f"{table}.scales": scales,
            f"{table}.zeros": np.zeros(len(scales), dtype=np.int8),
        }
        whole = f"{node.name}.table"
        return [
            helper.make_node("DequantizeLinear", list(parts), [whole], name=f"dequantise.{node.name}", axis=0),
            helper.make_node("Gather", [whole, ids], [output], name=node.name),
        ], parts
    constants: dict[str, NDArray[Any]] = {
        f"{table}.codes": codes,
        f"{table}.scales": scales[:, None],
        # A scale of its own for each row is no attribute of DequantizeLinear: codes become floats at 1, rows are multiplied behind.
        f"{table}.one": np.asarray(1, dtype=np.float32),
        f"{table}.zero": np.asarray(0, dtype=np.int8),
    }
    return [
        helper.make_node("Gather", [f"{table}.codes", ids], [f"{output}.codes"], name=f"{node.name}.codes"),
        helper.make_node(
            "DequantizeLinear",
            [f"{output}.codes", f"{table}.one", f"{table}.zero"],
            [f"{output}.units"],
            name=f"dequantise.{node.name}",
        ),
        helper.make_node("Gather", [f"{table}.scales", ids], [f"{output}.scales"], name=f"{node.name}.scales"),
        helper.make_node("Mul", [f"{output}.units", f"{output}.scales"], [output], name=node.name),
    ], constants
