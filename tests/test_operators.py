"""Graphs against the operator tables of TensorRT's parsers: ours pass before and after surgery, bad ones do not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

import deploy.operators as operators
import tools.record_operators as record
from deploy.operators import Finding, OperatorError, check_operators, judge, require_operators
from deploy.spec import graph_specs
from deploy.surgery import fuse_file, fuse_group_norms
from tests.micro_model import shared_build

MAJORS = (8, 10, 11)
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
majors = pytest.mark.parametrize("major", MAJORS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def micro_files(base: Path, precision: str) -> Dict[str, Path]:
    build = shared_build(base, precision, 1)
    return {name: base / "micro-build" / build.folder_name / spec.file for name, spec in graph_specs(build).items()}


def recorded() -> Dict[str, Any]:
    return json.loads(operators.DATA.read_text(encoding="utf-8"))


# -- the project's graphs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_exported_and_rewritten_graphs_have_no_problem(precision: str, base: Path) -> None:
    used = set()
    for name, file in micro_files(base, precision).items():
        for major in MAJORS:
            verdict = require_operators(file, major)
            notes = {note.what for note in verdict.notes}
            norm = {"operator InstanceNormalization becomes InstanceNormalization_TRT"}
            wanted = norm if major == 8 and name in ("step", "decode") else set()
            assert notes == wanted | ({"input timesteps has the axis S"} if name == "time" else set())
            assert verdict.opset == 17
            assert not check_operators(file, major, plugin=False), "the plugin is wanted by rewritten graphs only"
            used |= set(verdict.operators)
        if name in ("step", "decode"):
            model = onnx.load(str(file))
            norms = len(fuse_group_norms(model).norms)
            for major in MAJORS:
                verdict = require_operators(model, major)
                assert verdict.operators["GroupNormSiLU"] == norms > 20
                assert sum(verdict.operators.values()) == len(model.graph.node)
                assert [note.what for note in verdict.notes] == ["operator GroupNormSiLU is the project's plugin"]
    # What the networks are made of. One that is new here is to be looked at in the tables of all three.
    conversions = {"Cast", "Clip", "Concat", "Expand", "Floor", "Gather", "Reshape", "Slice", "Split", "Transpose"}
    arithmetic = {"Add", "Conv", "Cos", "Div", "Erf", "Gemm", "MatMul", "Mul", "Resize", "Sigmoid", "Sin", "Sub"}
    norms_of = {"InstanceNormalization", "LayerNormalization", "Softmax", "Unsqueeze"}
    assert used == conversions | arithmetic | norms_of
    for table in recorded()["releases"].values():
        for name in used:
            row = table["operators"][name]
            assert row["supported"] and {"FP32", "FP16"} <= set(row["types"]), name


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rewritten_graphs_without_the_plugin_are_refused(precision: str, base: Path) -> None:
    model = onnx.load(str(micro_files(base, precision)["decode"]))
    norms = fuse_group_norms(model).norms
    for major in MAJORS:
        (problem,) = check_operators(model, major, plugin=False)
        assert "GroupNormSiLU" in problem.what and problem.nodes == tuple(norm.name for norm in norms)
        assert ("--groupnorm native" in problem.advice) == (major != 8), "8.6.1 has only the plugin"
        with pytest.raises(OperatorError, match=r"TensorRT 8|TensorRT 1[01]") as caught:
            require_operators(model, major, plugin=False)
        assert f"{norms[0].name}, {norms[1].name}, {norms[2].name} and {len(norms) - 3} more" in str(caught.value)


def test_weights_are_not_read(base: Path, tmp_path: Path) -> None:
    """A graph whose weights lie in a file is judged like the same with its weights inside."""
    source = micro_files(base, "fp16")["step"]
    file = tmp_path / "a.onnx"
    model = onnx.load(str(source))
    onnx.save_model(model, str(file), save_as_external_data=True, location="a.onnx.data", size_threshold=300)
    data = tmp_path / "a.onnx.data"
    data.write_bytes(b"\0" * data.stat().st_size)
    fuse_file(file, tmp_path / "b.onnx")
    for major in MAJORS:
        assert judge(file, major).notes == judge(source, major).notes
        assert not judge(file, major).problems and not judge(tmp_path / "b.onnx", major).problems


# -- graphs with one thing wrong -------------------------------------------------------------------------------------


def parsed(text: str, opset: int = 17, **constants: np.ndarray) -> onnx.ModelProto:
    """A model from ONNX's textual form, its constants beside it."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    for place, node in enumerate(model.graph.node):
        node.name = f"node{place}"
    return model


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def only(model: onnx.ModelProto, major: int) -> Finding:
    (problem,) = check_operators(model, major)
    return problem


# Text, constants, opset; what each major says of it ("" where it takes the graph).
CASES: List[Tuple[str, Dict[str, np.ndarray], int, Dict[int, str]]] = [
    (  # in opset 17, and in no table
        "g (float[2,3] x) => (float[2,3] y) { y = Bernoulli (x) }",
        *({}, 17, dict.fromkeys(MAJORS, "operator Bernoulli is not supported")),
    ),
    (
        "g (float[2,3] x) => (float[2,3] y) { y = Mish (x) }",
        *({}, 18, {8: "operator Mish is not supported", 10: "", 11: ""}),
    ),
    (
        "g (float[2,3] x) => (float[2,3] y) { y = Relu (x) }",
        *({}, 18, {8: "opset 18, where those up to 17 are taken", 10: "", 11: ""}),
    ),
    (
        "g (float[2,3] x) => (float[2,3] y) { y = Relu (x) }",
        *({}, 21, {8: "opset 21,", 10: "opset 21, where those from 9 to 20 are taken", 11: ""}),
    ),
    (
        "g (float[2,3] x) => (float[2,3] y) { y = Relu (x) }",
        *({}, 8, {8: "", 10: "opset 8, where those from 9", 11: "opset 8, where those from 9"}),
    ),
    (
        "g (bfloat16[2,3] x) => (bfloat16[2,3] y) { y = Sigmoid (x) }",
        *({}, 17, {8: "operator Sigmoid on BF16", 10: "", 11: ""}),
    ),
    (
        "g (int32[2,3] x) => (int32[2,3] y) { y = MatMul (x, w) }",
        *({"w": np.ones((3, 3), np.int32)}, 17, dict.fromkeys(MAJORS, "operator MatMul on INT32")),
    ),
    (  # 10.14 takes whole numbers, 10.1 does not, and a major is what all its releases take
        "g (int32[2,3] x) => (int32[2,3] y) { y = Pow (x, x) }",
        *({}, 17, {8: "operator Pow on INT32", 10: "operator Pow on INT32", 11: ""}),
    ),
    (
        "g (uint16[2,3] x) => (uint16[2,3] y) { y = Identity (x) }",
        *({}, 17, dict.fromkeys(MAJORS, "tensors of type UINT16")),
    ),
    (
        "g (string[2] x) => (string[2] y) { y = Identity (x) }",
        *({}, 17, dict.fromkeys(MAJORS, "tensors of type STRING")),
    ),
    (
        "g (int64[2] x) => (float[2] y) { y = Cast <to = 1> (x) }",
        *({}, 17, {8: "x, an input or output, is INT64, which this version makes INT32", 10: "", 11: ""}),
    ),
    (
        "g (float[2] x) => (double[2] y) { y = Cast <to = 11> (x) }",
        *({}, 17, dict.fromkeys(MAJORS, "y, an input or output, is DOUBLE, which this version makes FP32")),
    ),
    (
        "g (uint8[2] x) => (int32[2] y) { y = Cast <to = 6> (x) }",
        *({}, 17, dict.fromkeys(MAJORS, "bytes (UINT8) cast from or to INT32")),
    ),
    (
        "g (float[2] x) => (float[2] y) { b = Cast <to = 2> (x)  y = Cast <to = 1> (b) }",
        *({}, 17, dict.fromkeys(MAJORS, "bytes (UINT8) inside the graph")),
    ),
    (
        "g (uint8[2,2] x) => (uint8[2,2] y) { y = Transpose (x) }",
        *({}, 17, dict.fromkeys(MAJORS, "operator Transpose on UINT8")),
    ),
    (
        "g (float[N,3] x) => (float[N,3] y) { y = Relu (x) }",
        *({}, 17, dict.fromkeys(MAJORS, "input x has the shape ['N', 3]")),
    ),
    (
        "g (float[3] x) => (int64[1,k] y) { y = NonZero (x) }",
        *({}, 17, {8: "y, an input or output, is INT64", 10: "tensors whose type or shape", 11: "tensors whose type"}),
    ),
    (
        "g (float[1,1,2,2] x) => (float[1,1,4,4] y) { y = Resize <mode = \"cubic\"> (x, , s) }",
        *({"s": np.array([1, 1, 2, 2], np.float32)}, 17, dict.fromkeys(MAJORS, "operator Resize with mode cubic")),
    ),
    (
        "g (float[2,8] x, float[8] s) => (float[2,8] y, float[2,1] m) { y, m = LayerNormalization (x, s) }",
        *({}, 17, {8: "", 10: "operator LayerNormalization with more", 11: "operator LayerNormalization with more"}),
    ),
    (
        "g (float[2,4] x, int64[1] a) => (float[2,2] y) { y = Slice (x, b, e, a) }",
        {"b": ints(0), "e": ints(2)},
        17,
        {8: "a, an input or output, is INT64", 10: "operator Slice whose input axes is computed", 11: ""},
    ),
    (
        "g (float[2] x) => (float[2] y) { s = SequenceConstruct (x)  i = Constant <value_int = 0> ()"
        " y = SequenceAt (s, i) }",
        *({}, 17, dict.fromkeys(MAJORS, "operator SequenceConstruct is not supported")),
    ),
    (
        "g (seq(float[2]) x) => (int64 y) { y = SequenceLength (x) }",
        *({}, 17, dict.fromkeys(MAJORS, "x is no tensor (sequence type)")),
    ),
]  # fmt: skip


@majors
@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"\W+", "-", case[0])[:60])
def test_one_thing_wrong(case: Tuple[str, Dict[str, np.ndarray], int, Dict[int, str]], major: int) -> None:
    text, constants, opset, said = case
    model = parsed(text, opset, **constants)
    problems = check_operators(model, major)
    found = [problem.what for problem in problems]
    if not said[major]:
        assert found == []
        return
    assert any(what.startswith(said[major]) for what in found), found
    assert all(problem.advice for problem in problems)
    with pytest.raises(OperatorError, match=re.escape(said[major])) as caught:
        require_operators(model, major)
    assert f"TensorRT {major}" in str(caught.value) and problems[0].advice in str(caught.value)


@majors
def test_native_group_norm(major: int) -> None:
    """GroupNormalization is of opset 18, and 8.6.1 ends at 17, whatever its table says of the name."""
    text = "g (float[1,4,2,2] x, float[2] s, float[2] b) => (float[1,4,2,2] y)"
    text += " { y = GroupNormalization <num_groups = 2> (x, s, b) }"
    problems = check_operators(parsed(text, 18), major)
    assert [problem.what[:8] for problem in problems] == (["opset 18"] if major == 8 else [])
    missing = only(parsed(text, 17), major)
    assert missing.what == "operator GroupNormalization is not in opset 17" and missing.nodes == ("node0",)


@majors
def test_unknown_operators_and_domains(major: int) -> None:
    model = parsed("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    model.graph.node[0].op_type = "Strange"
    assert only(model, major).what == "operator Strange is not supported"
    model.graph.node[0].domain = "com.example"
    assert only(model, major).what == "operator Strange of the domain com.example"


@majors
def test_branches_are_looked_into(major: int) -> None:
    inside = [
        helper.make_graph(
            [helper.make_node(op, ["x"], [op], name=op)], op, [], [helper.make_tensor_value_info(op, 1, [2])]
        )
        for op in ("Relu", "Bernoulli")
    ]
    node = helper.make_node("If", ["c"], ["y"], name="branch", then_branch=inside[0], else_branch=inside[1])
    ends = [("x", FLOAT, [2]), ("c", TensorProto.BOOL, []), ("y", FLOAT, [2])]
    values = [helper.make_tensor_value_info(*end) for end in ends]
    model = helper.make_model(helper.make_graph([node], "g", values[:2], values[2:]))
    model.opset_import[0].version = 17
    problem = only(model, major)
    assert problem.what == "operator Bernoulli is not supported" and problem.nodes == ("Bernoulli",)


@majors
def test_local_functions_and_sparse_constants(major: int) -> None:
    model = parsed("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    node = helper.make_node("Relu", ["a"], ["b"])
    model.functions.append(helper.make_function("own", "F", ["a"], ["b"], [node], model.opset_import))
    assert only(model, major).what == "local functions own.F"
    del model.functions[:]
    model.graph.sparse_initializer.add()
    assert only(model, major).what == "sparse constants"


@majors
def test_inconsistent_types(major: int) -> None:
    """Strongly typed networks convert nothing by themselves, and ONNX does not allow it either."""
    problem = only(parsed("g (float[2] x, float16[2] z) => (float[2] y) { y = Add (x, z) }"), major)
    assert problem.what.startswith("the graph is inconsistent (")


def plugin_model(kind: int, parameter: int = FLOAT, output: Optional[int] = None) -> onnx.ModelProto:
    node = helper.make_node(
        *("GroupNormSiLU", ["x", "gamma", "beta"], ["y"]),
        **{"domain": "canny2image", "name": "norm", "groups": 2, "plugin_version": "1"},
    )
    kinds: Sequence[Tuple[str, int, List[int]]] = [
        ("x", kind, [1, 4, 2, 2]),
        ("gamma", parameter, [4]),
        ("beta", parameter, [4]),
        ("y", kind if output is None else output, [1, 4, 2, 2]),
    ]
    values = [helper.make_tensor_value_info(*value) for value in kinds]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("canny2image", 1)]
    return helper.make_model(helper.make_graph([node], "g", values[:3], values[3:]), opset_imports=opsets)


@majors
def test_types_of_the_plugin(major: int) -> None:
    for kind in (FLOAT, HALF):
        assert check_operators(plugin_model(kind), major) == []
    assert len(check_operators(plugin_model(TensorProto.BFLOAT16), major)) == (1 if major == 8 else 0)
    for wrong in (plugin_model(HALF, HALF), plugin_model(TensorProto.INT32), plugin_model(FLOAT, output=HALF)):
        assert only(wrong, major).what.startswith("operator GroupNormSiLU on FP") and only(wrong, major).nodes == (
            "norm",
        )


def test_notes_on_narrowed_types() -> None:
    model = parsed(
        "g (float[4] x) => (float[4] y) { i = Cast <to = 7> (x)  j = Add (i, one)  d = Cast <to = 11> (j)"
        "  c = Cast <to = 1> (d)  y = Slice (c, b, e) }",
        **{"one": ints(1, 1, 1, 1), "b": ints(0), "e": ints(2**62)},
    )
    for major in MAJORS:
        verdict = judge(model, major)
        notes = {note.what.split(" in this")[0]: note.nodes for note in verdict.notes}
        assert not verdict.problems and set(notes["DOUBLE is FP32"]) == {"node2", "node3"}
        assert ("INT64 is INT32" in notes) == (major == 8)
        assert notes.get("INT64 constants beyond INT32, which are clamped") == (("e",) if major == 8 else None)


def test_unknown_versions() -> None:
    model = parsed("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    for major in (7, 9, 12):
        with pytest.raises(OperatorError, match=f"TensorRT {major} has no table .*8, 10, 11"):
            check_operators(model, major)


# -- files and the command -------------------------------------------------------------------------------------------


def test_damaged_files(base: Path, tmp_path: Path) -> None:
    source = micro_files(base, "fp16")["decode"]
    content = source.read_bytes()
    file = tmp_path / "a.onnx"
    for length in (0, 1, 7, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(OperatorError, match=r"a\.onnx is no (whole )?ONNX"):
            check_operators(file, 10)
    headless = onnx.load(str(source))
    del headless.graph.node[-1:]  # as a file that ends where a field does
    onnx.save(headless, str(file))
    with pytest.raises(OperatorError, match="no whole ONNX graph"):
        check_operators(file, 10)
    with pytest.raises(FileNotFoundError):
        check_operators(tmp_path / "absent.onnx", 10)


def test_damaged_weights(base: Path, tmp_path: Path) -> None:
    file, data = tmp_path / "a.onnx", tmp_path / "a.onnx.data"
    model = onnx.load(str(micro_files(base, "fp16")["decode"]))
    onnx.save_model(model, str(file), save_as_external_data=True, location=data.name, size_threshold=300)
    assert check_operators(file, 10) == []
    with open(data, "r+b") as opened:
        opened.truncate(data.stat().st_size - 1)
    with pytest.raises(OperatorError, match=r"a\.onnx\.data is truncated"):
        check_operators(file, 10)
    data.unlink()
    with pytest.raises(OperatorError, match=r"a\.onnx\.data, with the values of .*, is missing"):
        check_operators(file, 10)


def test_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = micro_files(base, "fp16")
    assert operators.main([str(files["text"]), str(files["time"])]) == 0
    out = capsys.readouterr().out
    assert out.count("nothing is in the way") == 6 and "by the tables of 10.1.0 and 10.14.0" in out
    fused = tmp_path / "fused.onnx"
    fuse_file(files["decode"], fused)
    assert operators.main([str(fused), "--tensorrt", "10"]) == 0
    assert "GroupNormSiLU is the project's plugin (22 places)" in capsys.readouterr().out
    assert operators.main([str(fused), "--tensorrt", "10", "--no-plugin"]) == 1
    out = capsys.readouterr().out
    assert "TensorRT 10" in out and "1 problem\n  problem: operator GroupNormSiLU" in out
    shutil.copy(fused, tmp_path / "short.onnx")
    (tmp_path / "short.onnx").write_bytes(fused.read_bytes()[:1000])
    for bad in (tmp_path / "short.onnx", tmp_path / "absent.onnx"):
        assert operators.main([str(bad)]) == 1
        err = capsys.readouterr().err
        assert err.startswith("deploy.operators: ") and bad.name in err and len(err.splitlines()) == 1


# -- the tables ------------------------------------------------------------------------------------------------------


def test_tables_are_consistent() -> None:
    content = recorded()
    assert content["repository"] == "https://github.com/onnx/onnx-tensorrt" and content["path"] == "docs/operators.md"
    assert {name for names in operators.RELEASES.values() for name in names} == set(content["releases"])
    schemas = {schema.name for schema in onnx.defs.get_all_schemas()}
    history = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    own = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}  # of the time before ONNX 1.5
    for release, table in content["releases"].items():
        assert re.fullmatch("[0-9a-f]{40}", table["commit"])
        assert table["opsets"][1] >= 17 and table["opsets"][0] in (None, 9)
        assert set(table["narrowed"]) == ({"INT64", "DOUBLE"} if release.startswith("8") else {"DOUBLE"})
        assert ("BF16" in table["types"]) == (not release.startswith("8")) and set(table["types"]) <= record.TYPES
        assert set(table["operators"]) <= history | own
        for name, row in table["operators"].items():
            assert set(row.get("types", [])) <= set(table["types"]), name
            assert row["supported"] or set(row) == {"supported"}
    # Nothing that a parser once had was lost, so that what holds for 10.1 and 10.14 holds between them.
    supported = [
        {name for name, row in table["operators"].items() if row["supported"]} for table in content["releases"].values()
    ]
    assert all(older <= newer for older, newer in zip(supported, supported[1:]))
    assert len(schemas - set.union(*supported)) > 20  # the tables have gaps, and are no list of all there is


TABLE = """# Operators

TensorRT 10.1 supports operators in the inclusive range of opset 9 to opset 20. And more.

TensorRT supports the following ONNX data types: DOUBLE, FLOAT32, FLOAT16, BFLOAT16, INT64, UINT8, and BOOL

> Note: TensorRT will attempt to cast DOUBLE down to FLOAT, if necessary.

| Operator | Supported  | Supported Types | Restrictions |
|----------|------------|-----------------|--------------|
| One      | Y          | FP32, FP16, INF64, |
| Two      | N          |
| Three    | Y          | BOOL | `axes` must be an initializer       |
| Four     | Y          | FP32 | Supported resize modes: `nearest`, `linear`.<br />Supported nearest modes: `floor` |
| Five     | Y          | FP32 | Only the first output `Y` is supported.
| Six      | Y          | FP32| Something else
| Seven    | Y          |
"""


def filled(text: str) -> str:
    return text + "".join(f"| Op{number} | Y | FP32 |\n" for number in range(100))


def test_recorder_reads_all_forms() -> None:
    facts = record.parse_table(filled(TABLE))
    assert facts["opsets"] == [9, 20] and facts["narrowed"] == {"DOUBLE": "FP32"}
    assert facts["types"] == ["BF16", "BOOL", "DOUBLE", "FP16", "FP32", "INT64", "UINT8"]
    rows = facts["operators"]
    assert rows["One"] == {"supported": True, "types": ["FP32", "FP16", "INT64"]}
    assert rows["Two"] == {"supported": False}
    assert rows["Three"] == {"supported": True, "types": ["BOOL"], "constant": ["axes"]}
    assert rows["Four"]["values"] == {"mode": ["nearest", "linear"], "nearest_mode": ["floor"]}
    assert rows["Five"]["outputs"] == 1 and rows["Six"]["more"] is True and rows["Seven"]["types"] == []
    old = "TensorRT 8.6 supports operators up to Opset 17. It will cast down INT64 to INT32 and DOUBLE down to FLOAT.\n"
    facts = record.parse_table(filled(old))
    assert facts["opsets"] == [None, 17] and facts["narrowed"] == {"INT64": "INT32", "DOUBLE": "FP32"}


def test_recorder_replaces_one_release(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table, output = tmp_path / "operators.md", tmp_path / "data.json"
    shutil.copy(operators.DATA, output)
    table.write_text(filled(TABLE), encoding="utf-8")
    arguments = [str(table), "--release", "11.1.0", "--commit", "0" * 40, "--output", str(output)]
    assert record.main(arguments) == 0 and "106 operators of 107, opset 20" in capsys.readouterr().out
    before, after = recorded()["releases"], json.loads(output.read_text(encoding="utf-8"))["releases"]
    assert list(after) == ["8.6.1", "10.1.0", "10.14.0", "11.1.0"] and after["11.1.0"]["commit"] == "0" * 40
    assert {name: before[name] for name in list(before)[:3]} == {name: after[name] for name in list(after)[:3]}
    record.write_tables(output, before)
    assert output.read_bytes() == operators.DATA.read_bytes(), "the data file is as the tool writes it"


def test_recorder_refuses_other_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table, output = tmp_path / "operators.md", tmp_path / "data.json"
    fine = ["--release", "10.2.0", "--commit", "a" * 40]
    cases = [
        ("# nothing\n", fine, "no table"),
        (TABLE, fine, "no table"),
        (filled(TABLE).replace("BOOL |", "FP13 |"), fine, "FP13"),
        (filled(TABLE).replace("| N  ", "| ?  "), fine, "neither Y nor N"),
        (filled(TABLE), ["--release", "ten", "--commit", "a" * 40], "a release is numbers"),
        (filled(TABLE), ["--release", "10.2.0", "--commit", "10.2-GA"], "40 hexadecimal digits"),
    ]
    for text, arguments, said in cases:
        table.write_text(text, encoding="utf-8")
        assert record.main([str(table), *arguments, "--output", str(output)]) == 1
        assert said in capsys.readouterr().err
    assert record.main([str(tmp_path / "absent.md"), *fine, "--output", str(output)]) == 1
    assert "absent.md" in capsys.readouterr().err and not output.exists()
