"""Type stubs of TensorRT 8.6.1, 10 and 11, for mypy on a machine without TensorRT.

They are made from each version's own Python bindings: names, signatures, enums and properties, and whether those can be
assigned to. `python3 -m tests.tensorrt_stubs` writes them under build/tensorrt_stubs, and
`MYPYPATH=build/tensorrt_stubs/10 mypy deploy/tensorrt_10.py` then checks against that version.
"""

from __future__ import annotations

import keyword
import re
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from cldm.files import atomic_path
from tests import tensorrt_bindings

TARGET = Path(__file__).resolve().parent.parent / "build" / "tensorrt_stubs"
# The module has members called bool and float32 and the like, so built-in types go by their full names.
HEADER = """# mypy: ignore-errors
import builtins
import typing
from typing import Any, ClassVar, Sequence, Union, overload

__version__: builtins.str
"""
BUILTINS = ("int", "float", "bool", "str", "bytes", "object", "list", "tuple", "slice")
# What arguments of a type may be besides.
CONVERSIONS = {
    "Dims": "Union[Dims, Sequence[builtins.int]]",
    "Permutation": "Union[Permutation, Sequence[builtins.int]]",
    "FallbackString": "builtins.str",
    # Narrower than the bindings are, so that a method of ours that they call may say what it gets.
    "SupportsInt": "builtins.int",
    "SupportsFloat": "builtins.float",
    "SupportsIndex": "builtins.int",
}
# What the bindings give a class in ways of C that no docstring tells.
UNTOLD = {
    "Dims": "def __iter__(self) -> typing.Iterator[builtins.int]: ...",
    "IHostMemory": "def __buffer__(self, flags: builtins.int) -> builtins.memoryview: ...",
}
GENERICS = {
    **{"List": "builtins.list", "list": "builtins.list", "Tuple": "builtins.tuple", "tuple": "builtins.tuple"},
    **{"Dict": "builtins.dict", "dict": "builtins.dict", "Sequence": "Sequence", "Iterable": "typing.Iterable"},
    **{"Optional": "typing.Optional", "Union": "Union"},
}


class StubWriter:
    """The stub of one version.

    Parameters
    ----------
    description : dict
        As tests/tensorrt_recorder.py writes it.
    """

    def __init__(self, description: Dict[str, Any]) -> None:
        self._classes: Dict[str, Dict[str, Any]] = description["classes"]
        self._functions: Dict[str, Any] = description["functions"]
        self._constants: Dict[str, Any] = description["constants"]

    def text(self) -> str:
        lines = [HEADER]
        for name in self._classes:
            if "." not in name:
                lines += [*self._class(name), ""]
        for name, signatures in self._functions.items():
            lines += list(self._overloads(name, signatures, False))
        lines += [f"{name}: {reference['enum']}" for name, reference in self._constants.items()]
        return "\n".join(lines) + "\n"

    def _class(self, name: str) -> Iterator[str]:
        described = self._classes[name]
        bases = ", ".join(described["bases"])
        yield f"class {name.rpartition('.')[2]}({bases}):" if bases else f"class {name.rpartition('.')[2]}:"
        body = [*self._nested(name), *self._constants_of(name), *self._members(name)]
        for attribute, accessors in described["properties"].items():
            body += self._property(attribute, accessors)
        for method, signatures in described["methods"].items():
            # The comparisons that mypy knows of `object` are left as they are there.
            if method not in ("__eq__", "__ne__", "__hash__"):
                body += self._overloads(method, signatures, True, method in described["static"])
        body += [UNTOLD[name]] if name in UNTOLD else []
        yield from (f"    {line}" for line in body or ["..."])

    def _nested(self, name: str) -> Iterator[str]:
        for other in self._classes:
            if other.rpartition(".")[0] == name:
                yield from self._class(other)

    def _constants_of(self, name: str) -> Iterator[str]:
        for constant, reference in self._classes[name]["constants"].items():
            if "enum" in reference and _is_name(constant):
                yield f"{constant}: ClassVar[{reference['enum']}]"
            elif "class" in reference and reference["class"] != f"{name}.{constant}":
                yield f"{constant} = {reference['class']}"

    def _members(self, name: str) -> Iterator[str]:
        members = self._classes[name]["members"]
        for member in members or ():
            if _is_name(member):
                yield f"{member}: ClassVar[{name}]"
        if members is not None:
            yield "__members__: ClassVar[builtins.dict[builtins.str, Any]]"

    def _property(self, name: str, accessors: Dict[str, Optional[str]]) -> Iterator[str]:
        getter = "Any" if accessors["get"] is None else self._type(accessors["get"], is_argument=False)
        yield "@builtins.property"
        yield f"def {name}(self) -> {getter}: ..."
        if accessors["set"] is not None:
            yield f"@{name}.setter"
            yield f"def {name}(self, value: {self._type(accessors['set'], is_argument=True)}) -> None: ..."

    def _overloads(
        self, name: str, signatures: List[Dict[str, Any]], is_method: bool, is_static: bool = False
    ) -> Iterator[str]:
        for signature in signatures:
            if len(signatures) > 1:
                yield "@overload"
            if is_static:
                yield "@builtins.staticmethod"
            parameters = self._parameters(signature["parameters"], is_method and not is_static)
            result = "None" if name == "__init__" else self._type(signature["returns"], is_argument=False)
            yield f"def {name}({parameters}) -> {result}: ..."

    def _parameters(self, parameters: List[Dict[str, Any]], has_self: bool) -> str:
        words: List[str] = []
        last_positional = -1
        starred = False
        # C++ may want a parameter after one that has a default; Python may not, and wants both.
        wanted = [
            i for i, one in enumerate(parameters) if "default" not in one and one["kind"] in ("positional", "either")
        ]
        for index, parameter in enumerate(parameters):
            kind = parameter["kind"]
            if kind == "keyword" and not starred:
                words.append("*")
            starred = starred or kind in ("*", "keyword")
            words.append(self._parameter(parameter, has_self and index == 0, index < max(wanted, default=0)))
            if kind == "positional":
                last_positional = len(words)
        if last_positional > int(has_self):
            words.insert(last_positional, "/")
        return ", ".join(words)

    def _parameter(self, parameter: Dict[str, Any], is_self: bool, is_wanted: bool) -> str:
        kind = parameter["kind"]
        if is_self:
            return "self"
        if kind in ("*", "**"):
            return f"{kind}{parameter['name']}: Any"
        annotation = self._type(parameter["type"], is_argument=True)
        if parameter.get("default") == "None":
            annotation = f"typing.Optional[{annotation}]"
        name = parameter["name"] + ("_" if keyword.iskeyword(parameter["name"]) else "")  # no call can name it anyway
        return f"{name}: {annotation}" + (" = ..." if "default" in parameter and not is_wanted else "")

    def _type(self, text: str, is_argument: bool) -> str:
        """A type of the bindings as mypy reads it; Any for what has no name in Python."""
        generic = re.fullmatch(r"(\w+)\[(.*)\]", text)
        if generic and generic.group(1) in GENERICS:
            inner = ", ".join(self._type(part, is_argument) for part in _split(generic.group(2)))
            # An argument that is a list there takes any sequence.
            outer = "Sequence" if is_argument and generic.group(1) in ("List", "list") else GENERICS[generic.group(1)]
            return f"{outer}[{inner}]"
        if text == "None":
            return "None"
        if text in BUILTINS:
            return "Any" if text == "object" else f"builtins.{text}"
        if is_argument and text in CONVERSIONS:
            return CONVERSIONS[text]
        return next((name for name in (text, text[1:]) if name in self._classes), "Any")


def _split(text: str) -> List[str]:
    """The comma-separated parts of what stands in brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def write_stubs(major: int, target: Path = TARGET) -> Path:
    """The folder with `tensorrt.pyi` of a major version, to go into MYPYPATH.

    Raises
    ------
    tests.tensorrt_bindings.BindingsMissing
        Its bindings cannot be had.
    """
    folder = target / str(major)
    with atomic_path(folder / "tensorrt.pyi") as temporary:
        text = StubWriter(tensorrt_bindings.load(major).describe()).text()
        temporary.write_text(text, encoding="utf-8")
    return folder


def main() -> int:
    for major in tensorrt_bindings.MAJORS:
        reason = tensorrt_bindings.missing_reason(major)
        print(reason or f"{write_stubs(major) / 'tensorrt.pyi'}: TensorRT {tensorrt_bindings.load(major).version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
