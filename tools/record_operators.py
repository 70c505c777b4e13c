#!/usr/bin/env python3
"""Record which ONNX operators a release of TensorRT's parser supports, from the parser's own table.

    git -C onnx-tensorrt show 6ba67d3:docs/operators.md > operators.md
    python3 tools/record_operators.py operators.md --release 8.6.1 --commit 6ba67d3428e05f690145373ca87fb8d32f98df45

The table is docs/operators.md of github.com/onnx/onnx-tensorrt. A release's commit is the submodule parsers/onnx of the
release's tag in github.com/NVIDIA/TensorRT. The facts go into deploy/data/tensorrt_operators.json, where they replace
those of the same release; other releases stay.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, from any directory

from cldm.files import atomic_path  # noqa: E402

DATA = ROOT / "deploy" / "data" / "tensorrt_operators.json"
REPOSITORY, TABLE = "https://github.com/onnx/onnx-tensorrt", "docs/operators.md"

LONG_NAMES = {"FLOAT": "FP32", "FLOAT32": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16"}
MISPRINTS = {"INF64": "INT64"}  # at ConstantOfShape in the tables of 10.0 to 10.14
TYPES = {"FP32", "FP16", "BF16", "FP8", "FP4", "INT4", "INT8", "INT32", "INT64", "UINT8", "BOOL", "DOUBLE"}

OPSETS = re.compile(r"supports operators (?:up to Opset (\d+)|in the inclusive range of opset (\d+) to opset (\d+))")
NARROWED = re.compile(r"(INT64|DOUBLE) (?:down )?to (INT32|FLOAT)\b")
CONSTANT = re.compile(r"`(\w+)` must be (?:an initializer|a constant tensor|a build-time constant|resolvable to a con)")
MODES = {
    "coordinate_transformation_mode": re.compile(r"resize transformation modes: ([^.<]*)"),
    "mode": re.compile(r"resize modes: ([^.<]*)"),
    "nearest_mode": re.compile(r"nearest modes: ([^.<]*)"),
}


class TableError(ValueError):
    """A file is not the parser's table of operators, or is one in a form that is not known here."""


def parse_table(text: str) -> Dict[str, Any]:
    """The facts of one operators.md.

    Returns
    -------
    dict
        `opsets`: lowest, or None where the file does not say, and highest. `types`: all that are taken anywhere.
        `narrowed`: types by the one that the parser makes of them. `operators`: by name, see `_operator`.

    Raises
    ------
    TableError
        The file is something else, or names a type that is not known.
    """
    opsets = OPSETS.search(text)
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in text.splitlines() if line.startswith("| ")]
    operators = {row[0]: _operator(row) for row in rows if row[0] != "Operator"}
    if opsets is None or len(operators) < 100:
        raise TableError(
            f"this is no table of operators: {len(operators)} rows, opsets {'' if opsets else 'not '}named"
        )
    alone, low, high = opsets.groups()
    listed = re.search(r"following ONNX data types: (.*)", text)
    narrowed = {wide: LONG_NAMES.get(narrow, narrow) for wide, narrow in NARROWED.findall(text)}
    types = set(_types(listed.group(1).replace("and ", ""))) if listed else set()
    types |= {name for operator in operators.values() for name in operator.get("types", [])}
    return {
        "opsets": [int(low) if low else None, int(high or alone)],
        "types": sorted(types | set(narrowed) | set(narrowed.values())),
        "narrowed": narrowed,
        "operators": operators,
    }


def _operator(row: List[str]) -> Dict[str, Any]:
    """`supported`, and where it is so: `types`, empty where the table names none, and what the remarks demand.

    `constant`: inputs that must be known when the graph is parsed; `values`: those that an attribute may have;
    `outputs`: how many may be used; `more`: true where the remarks say what none of these can.
    """
    if row[1] not in ("Y", "N"):
        raise TableError(f"{row[0]} is marked {row[1]!r}, neither Y nor N")
    if row[1] == "N":
        return {"supported": False}
    remarks = row[3] if len(row) > 3 else ""
    found: Dict[str, Any] = {"supported": True, "types": _types(row[2] if len(row) > 2 else "")}
    constant = CONSTANT.findall(remarks)
    values = {name: re.findall(r"`(\w+)`", part) for name, p in MODES.items() for part in p.findall(remarks)}
    first_only = "Only the first output" in remarks
    found.update({"constant": constant} if constant else {})
    found.update({"values": values} if values else {})
    found.update({"outputs": 1} if first_only else {})
    found.update({"more": True} if remarks and not (constant or values or first_only) else {})
    return found


def _types(text: str) -> List[str]:
    names = [MISPRINTS.get(name, LONG_NAMES.get(name, name)) for name in re.split(r"[,\s]+", text.strip()) if name]
    unknown = sorted(set(names) - TYPES)
    if unknown:
        raise TableError(f"types that are not known here: {', '.join(unknown)}")
    return names


def write_tables(file: Path, tables: Dict[str, Any]) -> None:
    """Write all releases as JSON, an operator to a line, so that two of them can be compared by eye and by diff."""
    lines = ["{", f' "repository": {json.dumps(REPOSITORY)},', f' "path": {json.dumps(TABLE)},', ' "releases": {']
    for place, (release, table) in enumerate(sorted(tables.items(), key=lambda item: _numbers(item[0]))):
        lines.append(f"  {json.dumps(release)}: {{")
        lines += [f"   {json.dumps(k)}: {json.dumps(v)}," for k, v in table.items() if k != "operators"]
        rows = [
            f"    {json.dumps(name)}: {json.dumps(table['operators'][name])}" for name in sorted(table["operators"])
        ]
        lines += ['   "operators": {', ",\n".join(rows), "   }", "  }," if place < len(tables) - 1 else "  }"]
    with atomic_path(file) as temporary:
        temporary.write_text("\n".join([*lines, " }", "}", ""]), encoding="utf-8")


def _numbers(release: str) -> List[int]:
    return [int(part) for part in release.split(".")]


def main(argv: Optional[List[str]] = None) -> int:
    """The exit status: 0, or 1 after an error, with a line on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="docs/operators.md of the parser")
    parser.add_argument("--release", required=True, help="of TensorRT, as 10.1.0")
    parser.add_argument("--commit", required=True, help="of the parser, in full")
    parser.add_argument("--output", type=Path, default=DATA, help="file to change (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        if not re.fullmatch(r"\d+(\.\d+)+", args.release) or not re.fullmatch(r"[0-9a-f]{40}", args.commit):
            raise TableError("a release is numbers with dots between, a commit 40 hexadecimal digits")
        facts = {"commit": args.commit, **parse_table(args.table.read_text(encoding="utf-8"))}
        tables = json.loads(args.output.read_text(encoding="utf-8"))["releases"] if args.output.exists() else {}
        write_tables(args.output, {**tables, args.release: facts})
    except (OSError, ValueError) as error:
        print(f"record_operators: {error}", file=sys.stderr)
        return 1
    supported = sum(operator["supported"] for operator in facts["operators"].values())
    print(
        f"{args.output}: {args.release}, {supported} operators of {len(facts['operators'])}, opset {facts['opsets'][1]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
