"""Whether TensorRT's ONNX parser takes a graph, by the parser's own tables, before minutes are spent on building it.

The tables are facts of docs/operators.md of github.com/onnx/onnx-tensorrt, recorded with their commits by
tools/record_operators.py. A major's verdict holds for all its releases that were recorded: an operator, type or opset
must be in each of their tables. That the tables agree is no proof that a plan builds; that they do not is one that it
will not. `python3 -m deploy.operators FILE.onnx --tensorrt 10` prints the verdict.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, FrozenSet, Iterator, List, Optional, Sequence, Set, Tuple, Union

import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, numpy_helper

from deploy.onnx_files import NotOnnxError, is_external, load_graph
from deploy.spec import STEPS
from deploy.surgery import NAMESPACE, OP

DATA = Path(__file__).resolve().parent / "data" / "tensorrt_operators.json"
# The recorded releases that stand for each major; a table of 10.13 is between these two.
RELEASES = {8: ("8.6.1",), 10: ("10.1.0", "10.14.0"), 11: ("11.1.0",)}
SMALL = 4096  # constants of at most this many elements are looked into: shapes, axes, sizes
NAMED = 3  # nodes that a message names
# The tables' names of types, where they are not ONNX's.
TYPE_NAMES = {"FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "FP8", "FLOAT4E2M1": "FP4"}
PLUGIN_TYPES = frozenset(("FP32", "FP16", "BF16"))
BYTE_PARTNERS = ("FP32", "FP16")  # what a byte can be cast from and to: kUINT8 in NvInferRuntimeBase.h, 8.6 to 11.1

_REWRITE = "write it with other operators where the network is defined, and export again with export_onnx.py"
_OPSET = "export with the opset of deploy/export.py"
_PRECISION = "export with --precision fp16 or fp32"
_FIXED = "export with fixed shapes, as export_onnx.py does, or build with a profile for a named axis"
_PLUGIN = "build with --groupnorm plugin"


class OperatorError(ValueError):
    """A graph is not what this TensorRT can parse, or a file is no whole ONNX graph."""


@dataclass(frozen=True)
class Finding:
    """One thing that stops the parser, or is worth knowing: what it is, where, and what to do about it."""

    what: str
    nodes: Tuple[str, ...] = ()
    advice: str = ""

    def __str__(self) -> str:
        more = f" and {len(self.nodes) - NAMED} more" if len(self.nodes) > NAMED else ""
        where = f" at {', '.join(self.nodes[:NAMED])}{more}" if self.nodes else ""
        return f"{self.what}{where}" + (f": {self.advice}" if self.advice else "")


@dataclass(frozen=True)
class Verdict:
    """What the tables say of a graph: it can be parsed where `problems` is empty. `operators` counts its nodes."""

    name: str
    major: int
    opset: int
    operators: Dict[str, int]
    problems: Tuple[Finding, ...]
    notes: Tuple[Finding, ...]

    def __str__(self) -> str:
        by = f"TensorRT {self.major}, by the table{'s' * (len(RELEASES[self.major]) > 1)} of"
        what = f"{_count(sum(self.operators.values()), 'node')} of {_count(len(self.operators), 'operator')}"
        words = _count(len(self.problems), "problem") if self.problems else "nothing is in the way"
        lines = [f"{self.name}: {what}, opset {self.opset}. {by} {' and '.join(RELEASES[self.major])}: {words}"]
        lines += [f"  problem: {problem}" for problem in self.problems]
        for note in self.notes:
            where = f" ({_count(len(note.nodes), 'place')})" if note.nodes else ""
            lines.append(f"  note: {note.what}{where}" + (f": {note.advice}" if note.advice else ""))
        return "\n".join(lines)


def check_operators(model: Union[onnx.ModelProto, Path], major: int, plugin: bool = True) -> List[Finding]:
    """The problems of `judge`'s verdict, none where the graph can be parsed."""
    return list(judge(model, major, plugin).problems)


def require_operators(model: Union[onnx.ModelProto, Path], major: int, plugin: bool = True) -> Verdict:
    """`judge`, for a caller that is about to build.

    Raises
    ------
    OperatorError
        The parser would refuse the graph. The message names each operator, type or shape that is in the way, some of
        the nodes, and what to do.
    """
    verdict = judge(model, major, plugin)
    if verdict.problems:
        raise OperatorError(str(verdict))
    return verdict


def judge(model: Union[onnx.ModelProto, Path], major: int, plugin: bool = True) -> Verdict:
    """Compare a graph with what a major version's parser takes: opset, operators, types, shapes, constants.

    Parameters
    ----------
    model : onnx.ModelProto or Path
        Weights are not read. Of a path, external files are seen to be there and long enough.
    major : int
        Of TensorRT: 8 (8.6.1), 10 or 11.
    plugin : bool
        The plugin library of `deploy.surgery`'s operator will be loaded before the graph is parsed.

    Raises
    ------
    OperatorError
        The major is unknown, or the file is no ONNX graph or is truncated.
    OSError
        The file cannot be read.
    """
    table = parser_table(major)
    name = "the graph"
    if not isinstance(model, onnx.ModelProto):
        name, model = str(model), _load(Path(model))
    return _Judge(table, major, plugin).judge(name, model)


# -- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """What all of some releases take. `operators` has those that all support, with fields as they are recorded."""

    opsets: Tuple[Optional[int], int]
    types: FrozenSet[str]
    narrowed: Dict[str, str]
    operators: Dict[str, Dict[str, Any]]


@functools.lru_cache(maxsize=None)
def parser_table(major: int) -> Table:
    """What all recorded releases of a major take.

    Raises
    ------
    OperatorError
        There are none.
    """
    if major not in RELEASES:
        known = ", ".join(str(number) for number in sorted(RELEASES))
        raise OperatorError(f"TensorRT {major} has no table of operators here; install one of {known}")
    recorded = json.loads(DATA.read_text(encoding="utf-8"))["releases"]
    tables = [recorded[release] for release in RELEASES[major]]
    lows = [table["opsets"][0] for table in tables if table["opsets"][0] is not None]
    names = set.intersection(*(set(table["operators"]) for table in tables))
    operators = {name: _common([table["operators"][name] for table in tables]) for name in names}
    return Table(
        (max(lows) if lows else None, min(table["opsets"][1] for table in tables)),
        frozenset.intersection(*(frozenset(table["types"]) for table in tables)),
        {wide: narrow for table in tables for wide, narrow in table["narrowed"].items()},
        {name: operator for name, operator in operators.items() if operator["supported"]},
    )


def _common(rows: List[Dict[str, Any]]) -> Dict[str, Any]:
    """What an operator may be by all of its rows."""
    stated = [set(row["types"]) for row in rows if row.get("types")]
    values: Dict[str, Set[str]] = {}
    for row in rows:
        for name, allowed in row.get("values", {}).items():
            values[name] = values.get(name, set(allowed)) & set(allowed)
    return {
        "supported": all(row["supported"] for row in rows),
        "types": set.intersection(*stated) if stated else set(),
        "constant": {name for row in rows for name in row.get("constant", [])},
        "values": values,
        "outputs": min((row["outputs"] for row in rows if "outputs" in row), default=None),
        "more": any(row.get("more", False) for row in rows),
    }


# -- the graph -------------------------------------------------------------------------------------------------------


def _load(path: Path) -> onnx.ModelProto:
    try:
        model = load_graph(path)
    except NotOnnxError as error:
        raise OperatorError(f"{path} is no ONNX file, or is truncated: {error}; export it again") from error
    graph = model.graph
    made = {name for node in graph.node for name in node.output}
    made |= {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    if not (graph.node and graph.output and model.opset_import) or any(v.name not in made for v in graph.output):
        raise OperatorError(f"{path} is no whole ONNX graph; export it again with export_onnx.py")
    for tensor in graph.initializer:
        if is_external(tensor):
            _check_external(tensor, path.parent)
    return model


def _check_external(tensor: TensorProto, folder: Path) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file = folder / entries.get("location", "")
    if not file.is_file():
        raise OperatorError(f"{file}, with the values of {tensor.name}, is missing; export it again")
    end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
    if file.stat().st_size < end:
        raise OperatorError(f"{file} is truncated: {tensor.name} ends at byte {end}; export it again")


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose large constants are inputs of their type and shape, so that shape inference copies no weights."""
    bare = onnx.ModelProto(ir_version=model.ir_version)
    bare.opset_import.extend(model.opset_import)
    bare.graph.name = model.graph.name
    for part in ("node", "input", "output", "value_info"):
        getattr(bare.graph, part).extend(getattr(model.graph, part))
    inputs = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= SMALL and not is_external(tensor):
            bare.graph.initializer.append(tensor)
        elif tensor.name not in inputs:  # graphs of before IR version 4 name them there too
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            bare.graph.input.append(value)
    return bare


def _values(graph: onnx.GraphProto) -> List[ValueInfoProto]:
    return [*graph.input, *graph.output, *graph.value_info]


def _type_name(elem_type: int) -> str:
    if elem_type not in TensorProto.DataType.values():
        return f"number {elem_type}"  # of a newer ONNX
    name = TensorProto.DataType.Name(elem_type)
    return TYPE_NAMES.get(name, name)


def _subgraphs(node: NodeProto) -> List[onnx.GraphProto]:
    graphs = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return graphs + [graph for attribute in node.attribute for graph in attribute.graphs]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


@dataclass
class _Scope:
    """What is known of the tensors that a graph's nodes can see, those of graphs around it included."""

    types: Dict[str, str] = field(default_factory=dict)
    shapes: Dict[str, List[Union[int, str]]] = field(default_factory=dict)
    constants: Set[str] = field(default_factory=set)

    def inside(self, graph: onnx.GraphProto) -> _Scope:
        scope = _Scope(dict(self.types), dict(self.shapes), set(self.constants))
        for value in _values(graph):
            tensor = value.type.tensor_type
            if tensor.elem_type:
                scope.types[value.name] = _type_name(tensor.elem_type)
            if tensor.HasField("shape"):
                scope.shapes[value.name] = [dim.dim_value or dim.dim_param for dim in tensor.shape.dim]
        for constant in graph.initializer:
            scope.types[constant.name] = _type_name(constant.data_type)
            scope.constants.add(constant.name)
        scope.constants.update(name for node in graph.node if node.op_type == "Constant" for name in node.output)
        return scope


# -- the verdict -----------------------------------------------------------------------------------------------------


class _Judge:
    """Collects what is found about one graph; the same thing found at several nodes is one finding."""

    def __init__(self, table: Table, major: int, plugin: bool) -> None:
        self._table, self._major, self._plugin = table, major, plugin
        self._problems: Dict[Tuple[str, str], List[str]] = {}
        self._notes: Dict[Tuple[str, str], List[str]] = {}
        self._operators: Counter = Counter()
        self._ends: Set[str] = set()
        self._opset = 0

    def judge(self, name: str, model: onnx.ModelProto) -> Verdict:
        self._check_model(model)
        bare = self._inferred(_skeleton(model))
        self._ends = {value.name for value in [*model.graph.input, *model.graph.output]}
        scope = _Scope(constants={tensor.name for tensor in model.graph.initializer}).inside(bare.graph)
        dynamic = self._check_ends(model.graph, scope)
        self._check_nodes(bare.graph, scope)
        if not self._problems:  # what cannot be parsed has no shapes, and the reason was given
            self._check_shapes(bare.graph, scope, dynamic)
        self._check_wide_constants(bare.graph)
        problems, notes = (
            tuple(Finding(what, tuple(nodes), advice) for (what, advice), nodes in found.items())
            for found in (self._problems, self._notes)
        )
        return Verdict(name, self._major, self._opset, dict(sorted(self._operators.items())), problems, notes)

    def _problem(self, what: str, advice: str, node: Optional[str] = None) -> None:
        self._problems.setdefault((what, advice), []).extend([] if node is None else [node])

    def _note(self, what: str, advice: str = "", node: Optional[str] = None) -> None:
        self._notes.setdefault((what, advice), []).extend([] if node is None else [node])

    def _check_model(self, model: onnx.ModelProto) -> None:
        versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
        self._opset = versions[0] if versions else 0
        low, high = self._table.opsets
        if not (low or 1) <= self._opset <= high:
            taken = f"from {low} to {high}" if low else f"up to {high}"
            self._problem(f"opset {self._opset}, where those {taken} are taken", _OPSET)
        if model.functions:
            names = [f"{function.domain}.{function.name}" for function in model.functions]
            self._problem(f"local functions {', '.join(names)}", "inline them with onnx.inliner")
        if model.graph.sparse_initializer:
            self._problem("sparse constants", "store them densely")
        for value in _values(model.graph):
            kind = value.type.WhichOneof("value")
            if kind not in (None, "tensor_type"):
                self._problem(f"{value.name} is no tensor ({kind.replace('_', ' ')})", _REWRITE)

    def _inferred(self, bare: onnx.ModelProto) -> onnx.ModelProto:
        try:
            return onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True)
        except Exception as error:  # InferenceError, which onnx does not name in all its versions, and others
            unknown = {node.op_type for node in bare.graph.node} - set(self._table.operators) - {OP}
            if not unknown:
                self._problem(f"the graph is inconsistent ({str(error).strip().splitlines()[0]})", _OPSET)
        return bare

    def _check_ends(self, graph: onnx.GraphProto, scope: _Scope) -> bool:
        """Types and shapes of the graph's inputs and outputs; whether an input has an axis without a length."""
        dynamic = False
        constants = {tensor.name for tensor in graph.initializer}
        for value in [value for value in graph.input if value.name not in constants]:
            shape = scope.shapes.get(value.name)
            dynamic = dynamic or STEPS in (shape or [])
            if shape is None or any(not dim or (isinstance(dim, str) and dim != STEPS) for dim in shape):
                self._problem(f"input {value.name} has the shape {shape or 'unknown'}", _FIXED)
            elif STEPS in shape:
                self._note(f"input {value.name} has the axis {STEPS}", "the build gives its range in a profile")
        for value in [*graph.input, *graph.output]:
            wide = scope.types.get(value.name, "")
            if wide in self._table.narrowed and value.name not in constants:
                narrow = self._table.narrowed[wide]
                self._problem(
                    f"{value.name}, an input or output, is {wide}, which this version makes {narrow}",
                    f"make it {narrow} in deploy/spec.py and the graph, or cast it there",
                )
        return dynamic

    # -- nodes

    def _check_nodes(self, graph: onnx.GraphProto, scope: _Scope) -> None:
        for node in graph.node:
            name = node.name or (node.output[0] if node.output else node.op_type)
            self._operators[node.op_type] += 1
            if node.op_type == OP and node.domain == NAMESPACE:
                self._check_plugin(node, name, scope)
            elif node.domain not in ("", "ai.onnx"):
                self._problem(f"operator {node.op_type} of the domain {node.domain}", _REWRITE, name)
            else:
                self._check_operator(node, name, scope)
            for tensor in [*node.input, *node.output]:
                kind = scope.types.get(tensor, "")
                if kind and kind not in self._table.types:
                    advice = _PRECISION if kind == "BF16" else _REWRITE
                    self._problem(f"tensors of type {kind}, which this version does not have", advice, name)
            for inner in _subgraphs(node):
                self._check_nodes(inner, scope.inside(inner))

    def _check_plugin(self, node: NodeProto, name: str, scope: _Scope) -> None:
        if not self._plugin:
            advice = "make the plugin with preprocess.sh"
            advice += "" if self._major == 8 else ", or build with --groupnorm native"
            self._problem(f"operator {OP}, the project's plugin, which is not to be loaded", advice, name)
            return
        self._note(f"operator {OP} is the project's plugin", "its library is to be loaded first", name)
        data = {scope.types.get(tensor, "") for tensor in [*node.input[:1], *node.input[3:], *node.output]}
        parameters = {scope.types.get(tensor, "") for tensor in node.input[1:3]}
        if len(data) != 1 or not data <= PLUGIN_TYPES or parameters != {"FP32"}:
            found = ", ".join(sorted((data | parameters) - {""})) or "unknown types"
            self._problem(f"operator {OP} on {found}", "export and rewrite the graph anew", name)

    def _check_operator(self, node: NodeProto, name: str, scope: _Scope) -> None:
        op = node.op_type
        row = self._table.operators.get(op)
        if row is None:
            self._problem(f"operator {op} is not supported", _PLUGIN if "Normalization" in op else _REWRITE, name)
            return
        try:
            schema = onnx.defs.get_schema(op, min(self._opset, onnx.defs.onnx_opset_version()), "")
        except onnx.defs.SchemaError:
            self._problem(f"operator {op} is not in opset {self._opset}", _OPSET, name)
            return
        self._check_types(node, name, scope, row, schema)
        self._check_restrictions(node, name, scope, row, schema)
        if op == "InstanceNormalization" and self._major == 8:
            self._note(f"operator {op} becomes InstanceNormalization_TRT", "load TensorRT's own plugins first", name)

    def _check_types(
        self, node: NodeProto, name: str, scope: _Scope, row: Dict[str, Any], schema: onnx.defs.OpSchema
    ) -> None:
        """Types of data, which is what shares its type with the first input or output; the rest are shapes, indices."""
        first = [side[0].type_str for side in (schema.inputs, schema.outputs) if side]
        variables = {kind for kind in first if "(" not in kind}  # tensor(int64) and its like are fixed by the operator
        for side, formal in ((node.input, schema.inputs), (node.output, schema.outputs)):
            for place, tensor in enumerate(side):
                kind = scope.types.get(tensor, "")
                if not tensor or not kind or formal[min(place, len(formal) - 1)].type_str not in variables:
                    continue
                narrow = self._table.narrowed.get(kind, kind)
                if narrow != kind:
                    self._note(f"{kind} is {narrow} in this version, and clamped to what that holds", "", name)
                if row["types"] and narrow not in row["types"]:
                    advice = _PLUGIN if "Normalization" in node.op_type else _PRECISION
                    if kind not in ("FP16", "BF16"):
                        advice = "cast around it in the graph"
                    self._problem(f"operator {node.op_type} on {kind}", advice, name)
        if node.op_type in ("Cast", "CastLike"):
            self._check_bytes(node, name, scope)

    def _check_bytes(self, node: NodeProto, name: str, scope: _Scope) -> None:
        """Bytes are only inputs and outputs of a graph, cast from or to a floating-point type there."""
        kinds = [scope.types.get(tensor, "") for tensor in [node.input[0], node.output[0]]]
        for kind, tensor, other in zip(kinds, [node.input[0], node.output[0]], reversed(kinds)):
            if kind == "UINT8" and tensor not in self._ends:
                self._problem("bytes (UINT8) inside the graph", "keep them at its inputs and outputs", name)
            elif kind == "UINT8" and other not in BYTE_PARTNERS:
                self._problem(f"bytes (UINT8) cast from or to {other}", "cast them from or to FP32 or FP16", name)

    def _check_restrictions(
        self, node: NodeProto, name: str, scope: _Scope, row: Dict[str, Any], schema: onnx.defs.OpSchema
    ) -> None:
        op = node.op_type
        for formal, tensor in zip(schema.inputs, node.input):
            if formal.name in row["constant"] and tensor and tensor not in scope.constants:
                self._problem(f"operator {op} whose input {formal.name} is computed", "make it a constant", name)
        given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        for attribute, allowed in row["values"].items():
            formal = schema.attributes.get(attribute)
            value = given.get(attribute, formal.default_value.s if formal is not None else None)
            value = value.decode() if isinstance(value, bytes) else value
            if value is not None and value not in allowed:
                self._problem(f"operator {op} with {attribute} {value}", f"use {', '.join(sorted(allowed))}", name)
        if row["outputs"] is not None and any(node.output[row["outputs"] :]):
            self._problem(f"operator {op} with more outputs than {row['outputs']}", _REWRITE, name)
        if row["more"]:
            self._note(f"operator {op} is supported with reservations", "see the parser's docs/operators.md", name)

    # -- shapes and constants

    def _check_shapes(self, graph: onnx.GraphProto, scope: _Scope, dynamic: bool) -> None:
        """All shapes are known when the graph is parsed; where an input has a free axis, at least all ranks are."""
        for node in graph.node:
            for tensor in filter(None, node.output):
                shape = scope.shapes.get(tensor)
                fixed = shape is not None and (dynamic or all(isinstance(dim, int) for dim in shape))
                if not fixed or tensor not in scope.types:
                    self._problem("tensors whose type or shape depends on values", _FIXED, node.name or tensor)

    def _check_wide_constants(self, graph: onnx.GraphProto) -> None:
        """Say which whole numbers a version that narrows INT64 changes; an open end of a slice then means the same."""
        if "INT64" not in self._table.narrowed:
            return
        for tensor in graph.initializer:
            if tensor.data_type == TensorProto.INT64:
                values = numpy_helper.to_array(tensor)
                if values.size and max(abs(int(values.min())), abs(int(values.max()))) > 2**31 - 1:
                    self._note("INT64 constants beyond INT32, which are clamped", "", tensor.name)


# -- the command -----------------------------------------------------------------------------------------------------


def _verdicts(files: Sequence[Path], majors: Sequence[int], plugin: bool) -> Iterator[Verdict]:
    for file in files:
        for major in majors:
            yield judge(file, major, plugin)


def main(argv: Optional[List[str]] = None) -> int:
    """The exit status: 0, or 1 where a graph cannot be parsed or a file cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python3 -m deploy.operators", description="Whether TensorRT's parser takes graphs, by its own tables."
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.onnx")
    parser.add_argument("--tensorrt", type=int, choices=sorted(RELEASES), help="major version (default: all of them)")
    parser.add_argument("--no-plugin", action="store_true", help="the plugin library will not be loaded")
    args = parser.parse_args(argv)
    failed = False
    majors = [args.tensorrt] if args.tensorrt else sorted(RELEASES)
    try:
        for verdict in _verdicts(args.files, majors, not args.no_plugin):
            print(verdict)
            failed = failed or bool(verdict.problems)
    except (OperatorError, OSError) as error:
        print(f"deploy.operators: {error}", file=sys.stderr)
        return 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
