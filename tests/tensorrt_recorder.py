"""Describes the `tensorrt` module that it imports, as JSON on standard output: what has which name and signature.

Run by tests/tensorrt_bindings.py in the interpreter that has the bindings, so the standard library of Python 3.8 is all
it may use. pybind11 writes the signatures into docstrings, "name(self: module.X, a: int, b: float = 0.0) -> bool"; one
line for each overload, and "(arg0: module.X) -> int" for the getter of a property.
"""

from __future__ import annotations

import contextlib
import enum
import inspect
import json
import re
import sys
from typing import Any, Dict, List, Optional, Tuple

# What every class has, and what pybind11 keeps for itself.
NOT_RECORDED = {"__del__", "__getstate__", "__setstate__", "__repr__", "__str__", "__init_subclass__"}
OPENING, CLOSING = "([{<", ")]}>"
CPP_NAMESPACES = re.compile(r"\b(?:nvinfer1|nvonnxparser|nvuffparser|nvcaffeparser1)::(?:v_\w+::)?")


def main() -> None:
    import tensorrt

    json.dump(describe(tensorrt), sys.stdout)  # unsorted: an enum's aliases come after the member they stand for


def describe(module: Any) -> Dict[str, Any]:
    """The version, classes (enums among them), functions and constants of `module`, in values that JSON has."""
    classes: Dict[str, Any] = {}
    functions: Dict[str, Any] = {}
    constants: Dict[str, Any] = {}
    for name, value in sorted(vars(module).items()):
        if isinstance(value, type):
            _add_class(classes, value)
        elif name.startswith("_") or inspect.ismodule(value):
            continue
        elif inspect.isbuiltin(value):
            functions[name] = parse_docstring(value.__doc__)
        elif inspect.isfunction(value):
            functions[name] = [_python_signature(value)]
        elif _is_enum(type(value)):
            constants[name] = _reference(value)
    return {"version": module.__version__, "classes": classes, "functions": functions, "constants": constants}


def _add_class(classes: Dict[str, Any], cls: type) -> None:
    """Describe `cls`, the classes that it comes from and those inside it, unless they are there."""
    if not cls.__module__.startswith("tensorrt") or cls.__qualname__ in classes:
        return
    classes[cls.__qualname__] = {}
    classes[cls.__qualname__] = _describe_class(cls)
    for other in [*cls.__bases__, *(value for value in vars(cls).values() if isinstance(value, type))]:
        _add_class(classes, other)


def _describe_class(cls: type) -> Dict[str, Any]:
    methods: Dict[str, Any] = {}
    static: List[str] = []
    properties: Dict[str, Any] = {}
    constants: Dict[str, Any] = {}
    for name, value in vars(cls).items():
        if name in NOT_RECORDED or name.startswith(("__pybind11", "_pybind11")) or value is None:
            continue
        if isinstance(value, property) and not name.startswith("_"):
            properties[name] = {"get": _property_type(value.fget, -1), "set": _property_type(value.fset, 1)}
        elif isinstance(value, staticmethod):
            static.append(name)
            methods[name] = _signatures(value.__func__)
        elif inspect.isroutine(value) or callable(getattr(value, "__func__", None)):
            signatures = _signatures(getattr(value, "__func__", value))
            if signatures:
                methods[name] = signatures
        elif isinstance(value, type):
            constants[name] = {"class": value.__qualname__}
        elif _is_enum(type(value)) and not _is_enum(cls):
            constants[name] = _reference(value)
    return {
        "bases": [base.__qualname__ for base in cls.__bases__ if base.__module__.startswith("tensorrt")],
        "methods": methods,
        "static": static,
        "properties": properties,
        "constants": constants,
        # Aliases included, which `__members__` maps to the member that they stand for.
        "members": {name: int(value) for name, value in cls.__members__.items()} if _is_enum(cls) else None,
        "facts": _facts(cls, properties) if _is_enum(cls) else {},
        # With a __dict__, an instance takes any attribute.
        "dynamic": bool(getattr(cls, "__dictoffset__", 0)),
    }


def _facts(cls: Any, properties: Dict[str, Any]) -> Dict[str, Any]:
    """By property and member, what an enum's members say of themselves, such as the itemsize of a data type."""
    extra = [name for name in properties if name not in ("name", "value")]
    facts: Dict[str, Any] = {name: {} for name in extra}
    for name in extra:
        for member, value in cls.__members__.items():
            with contextlib.suppress(KeyError, TypeError):  # of a type that has no size
                facts[name][member] = getattr(value, name)
    return facts


def _is_enum(cls: type) -> bool:
    return hasattr(cls, "__members__") or issubclass(cls, enum.Enum)


def _reference(value: Any) -> Dict[str, Any]:
    return {"enum": type(value).__qualname__, "member": value.name}


def _signatures(function: Any) -> List[Dict[str, Any]]:
    if inspect.isfunction(function):
        return [_python_signature(function)]
    # A class without a constructor inherits the slot of object, which has no signature, and refuses every call.
    return parse_docstring(function.__doc__)


def _property_type(function: Any, position: int) -> Optional[str]:
    """The type that a getter returns (`position` -1) or a setter takes (1, after self); None where there is none."""
    if function is None:
        return None
    signatures = _signatures(function)
    if not signatures:
        return "object"
    return signatures[0]["returns"] if position < 0 else signatures[0]["parameters"][position]["type"]


def _python_signature(function: Any) -> Dict[str, Any]:
    kinds = {
        inspect.Parameter.POSITIONAL_ONLY: "positional",
        inspect.Parameter.POSITIONAL_OR_KEYWORD: "either",
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.KEYWORD_ONLY: "keyword",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        entry = {"name": parameter.name, "type": "object", "kind": kinds[parameter.kind]}
        if parameter.default is not inspect.Parameter.empty:
            entry["default"] = repr(parameter.default)
        parameters.append(entry)
    return {"parameters": parameters, "returns": "object"}


# ---- pybind11's docstrings


def parse_docstring(text: Optional[str]) -> List[Dict[str, Any]]:
    """The signatures of a function's overloads, in the order in which pybind11 tries them; none where it names none.

    Each has `parameters`, a list of {name, type, kind, default}, and the text of the type that it `returns`. `kind` is
    "positional", "either", "keyword", "*" or "**"; `default` is the text of the value and absent where there is none.
    """
    lines = (text or "").lstrip().split("\n")
    if len(lines) > 1 and lines[1].strip() == "Overloaded function.":
        numbered = [re.match(r"\d+\. (\w*\(.*)", line) for line in lines]
        lines = [match.group(1) for match in numbered if match]
    else:
        lines = lines[:1]
    return [signature for signature in map(parse_signature, lines) if signature is not None]


def parse_signature(line: str) -> Optional[Dict[str, Any]]:
    """One line "name(a: int, b: float = 0.0) -> bool"; None for a line that is none."""
    match = re.match(r"\w*\(", line)
    if match is None:
        return None
    inside, end = _up_to_bracket(line, match.end())
    arrow = re.match(r"\s*->\s*(.+)$", line[end:])
    if arrow is None:
        return None
    kind = "either"
    parameters: List[Dict[str, Any]] = []
    for part in inside:
        if part == "*":
            kind = "keyword"
        elif part == "/":
            for parameter in parameters:
                parameter["kind"] = "positional"
        else:
            parameters.append(_parse_parameter(part, kind))
    return {"parameters": parameters, "returns": _plain_type(arrow.group(1))}


def _up_to_bracket(line: str, start: int) -> Tuple[List[str], int]:
    """The comma-separated parts of `line` from `start` to the bracket that closes, and the index after that."""
    parts: List[str] = []
    depth, begin, quote = 0, start, ""
    for index in range(start, len(line)):
        character = line[index]
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in OPENING:
            depth += 1
        elif depth and character in CLOSING:
            depth -= 1
        elif not depth and character in ",)":
            parts.append(line[begin:index].strip())
            begin = index + 1
            if character == ")":
                return [part for part in parts if part], index + 1
    raise ValueError(f"no closing bracket in {line!r}")


def _parse_parameter(text: str, kind: str) -> Dict[str, Any]:
    stars = re.match(r"(\*{1,2})(\w+)", text)
    if stars:
        return {"name": stars.group(2), "type": "object", "kind": stars.group(1)}
    match = re.match(r"(\w+)\s*:\s*(.*?)(?:\s+=\s+(.*))?$", text)
    if match is None:
        raise ValueError(f"no parameter: {text!r}")
    name, annotation, default = match.groups()
    # pybind11 shows arguments that were given no name as arg0, arg1, ... and takes them by position only.
    entry = {"name": name, "type": _plain_type(annotation)}
    entry["kind"] = "positional" if re.fullmatch(r"arg\d+", name) or name == "self" else kind
    if default is not None:
        entry["default"] = default
    return entry


def _plain_type(text: str) -> str:
    """A type as the user writes it: without the extension module's path and the C++ namespaces."""
    text = re.sub(r"\btensorrt(?:_bindings)?(?:\.tensorrt)?\.", "", text.strip())
    text = CPP_NAMESPACES.sub("", text).replace("::", ".")
    return re.sub(r"\b(?:typing|typing_extensions|collections\.abc)\.", "", text)


if __name__ == "__main__":
    main()
