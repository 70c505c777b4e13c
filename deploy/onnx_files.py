"""ONNX files on disk: simplify, check, and keep large weights in one file beside the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Tuple

import onnx
from onnx import TensorProto

from deploy.spec import GraphSpec

ALIGNMENT = 4096
COPY_CHUNK = 1 << 24

ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
    "uint8": TensorProto.UINT8,
}


class NotOnnxError(ValueError):
    """A file cannot be read as an ONNX model; the message is the reader's."""


def load_graph(path: Path) -> onnx.ModelProto:
    """A model without what lies outside its file.

    Raises
    ------
    NotOnnxError
        It is no ONNX file, or a part of one.
    OSError
        It cannot be read.
    """
    try:
        return onnx.load(str(path), load_external_data=False)
    except OSError:
        raise
    except Exception as error:  # protobuf's DecodeError, whose home differs between versions
        raise NotOnnxError(str(error)) from error


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold what is constant. Weights that lie outside the graph's file are left alone, unread."""
    from polygraphy.backend.onnx import fold_constants
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.ERROR):
        return fold_constants(model)


def check_tensors(model: onnx.ModelProto, graph: GraphSpec) -> None:
    """Compare a graph's inputs and outputs, after shape inference, with its specification.

    Raises
    ------
    ValueError
        A name, shape or type differs.
    onnx.shape_inference.InferenceError
        The graph is inconsistent.
    """
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    found = {value.name: _describe(value) for value in [*inferred.graph.input, *inferred.graph.output]}
    wanted = {name: (list(t.shape), ONNX_TYPES[t.dtype]) for name, t in graph.tensors.items()}
    if found != wanted:
        raise ValueError(f"the exported graph {graph.name} has tensors {found}, its specification says {wanted}")


def _describe(value: onnx.ValueInfoProto) -> Tuple[List[object], int]:
    tensor = value.type.tensor_type
    return [d.dim_param or d.dim_value for d in tensor.shape.dim], tensor.elem_type


def is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def gather_external(model: onnx.ModelProto, source: Path, data_file: Path) -> int:
    """Copy the external tensors of `model`, which lie in files under `source`, into one file, and point to it.

    Streams, so that no more than a chunk is in memory. Returns the bytes written.
    """
    with open(data_file, "wb") as out:
        for tensor in model.graph.initializer:
            if is_external(tensor):
                out.write(b"\0" * (-out.tell() % ALIGNMENT))
                offset, length = out.tell(), 0
                entries = {entry.key: entry.value for entry in tensor.external_data}
                start = int(entries.get("offset", 0))
                with open(source / entries["location"], "rb") as file:
                    rest = (source / entries["location"]).stat().st_size - start
                    file.seek(start)
                    remaining = int(entries.get("length", rest))
                    while remaining:
                        chunk = file.read(min(COPY_CHUNK, remaining))
                        if not chunk:
                            raise OSError(f"{source / entries['location']} ended {remaining} bytes early")
                        out.write(chunk)
                        length += len(chunk)
                        remaining -= len(chunk)
                _point_to(tensor, {"location": data_file.name, "offset": str(offset), "length": str(length)})
        return out.tell()


def _point_to(tensor: TensorProto, entries: Dict[str, str]) -> None:
    del tensor.external_data[:]
    for key, value in entries.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def has_external(model: onnx.ModelProto) -> bool:
    return any(is_external(tensor) for tensor in model.graph.initializer)
