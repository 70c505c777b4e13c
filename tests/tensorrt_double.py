"""A test double of the module `tensorrt`, made from the description of the real bindings of one version.

Its classes, functions, properties and enum members are those of that version and no others. A call that the bindings
would refuse (an unknown name, a wrong number of arguments, an unknown keyword, a wrong type) and an assignment to a
property that is missing or read-only raise at once what the bindings raise. What a call answers is up to the test:

    double = TensorRTDouble.load(10)
    engine = double.make("ICudaEngine", num_io_tensors=2)
    double.returns("Runtime.deserialize_cuda_engine", engine)
    double.returns("ICudaEngine.get_tensor_name", lambda call: ["x", "noise"][call["index"]])
    double.raises("ICudaEngine.create_execution_context", MemoryError("out of memory"))
    with double.installed():
        ...                                     # code that does `import tensorrt`
    assert double.names() == ["Logger", "Runtime", "Runtime.deserialize_cuda_engine"]
    assert not double.refused

Where the test says nothing, a function without a result answers None, one that answers true for success answers True,
and one that makes an object makes one; anything else raises `NotScripted`. Stricter than the bindings are: None where a
class is asked for and is not the default, and for bool, str and enum arguments anything but those.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import itertools
import math
import operator
import re
import sys
import types
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, NoReturn, Optional, Tuple, Type

import numpy as np

from tests import tensorrt_bindings

# Values rather than services: they work as they are, and what is done with them is not recorded.
VALUES = ("Dims", "Dims2", "Dims3", "Dims4", "DimsHW", "IHostMemory")
FUNCTIONS_OF_VALUES = ("volume", "nptype")
# Before Python 3.12 nothing shows that a class of an extension can be read as a buffer.
BUFFER = "IHostMemory"
# What pybind11 has no name for, with the class that it is: get_plugin_registry() of 10 and 11 imports it from Python.
UNNAMED_TYPES = {"detail.accessor<detail.accessor_policies.str_attr>": "IPluginRegistry"}
# What a bytearray has and a buffer of TensorRT has not.
NO_BUFFER = ("__len__", "__getitem__", "__setitem__", "__delitem__", "__iter__", "__contains__", "__add__", "__mul__")
INTEGERS = ("int", "SupportsInt", "SupportsIndex")
FLOATS = ("float", "SupportsFloat")
COMPARISONS = ("__lt__", "__le__", "__gt__", "__ge__")
NUMPY_TYPES = {
    **{"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT32": np.int32},
    **{"INT64": np.int64, "BOOL": np.bool_, "UINT8": np.uint8},
}


class NotScripted(BaseException):
    """The test has to say what a call answers, or said something that it never would.

    No subclass of Exception, so that the code under test does not take it for a failure that it handles.
    """


@dataclass(frozen=True, eq=False)
class Call:
    """One call or assignment that the code under test made.

    Parameters
    ----------
    name
        "Builder" for a constructor, "IBuilderConfig.set_flag" for a method, "IBuilderConfig.max_threads=" for an
        assignment, "get_plugin_registry" for a function. The class is the one that the bindings define it in.
    receiver
        The object; None for a function.
    arguments
        By name, what was passed; defaults are not in it. An assignment has "value".
    """

    name: str
    receiver: Any
    arguments: Dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


class TensorRTDouble:
    """One version of TensorRT for one test.

    Attributes
    ----------
    version, major
        Such as "10.13.3.9" and 10.
    module
        What `import tensorrt` gives while the double is installed.
    calls
        Every call and assignment, in order; reading a property is none.
    refused
        The messages of the calls and assignments that raised as the bindings would.
    """

    def __init__(self, description: Dict[str, Any]) -> None:
        self.version: str = description["version"]
        self.major = int(self.version.split(".")[0])
        self.calls: List[Call] = []
        self.refused: List[str] = []
        self._description = description
        self._scripts: Dict[Tuple[str, int], Callable[[Call], Any]] = {}
        self._kept: List[Any] = []  # objects that scripts are for, so that their ids stay theirs
        self._classes: Dict[str, Any] = {}
        for name in description["classes"]:
            self._class(name)
        self.module = self._module()

    @classmethod
    def load(cls, major: int) -> TensorRTDouble:
        """The double of TensorRT 8, 10 or 11.

        Raises
        ------
        tensorrt_bindings.BindingsMissing
            The bindings, which it is made from, cannot be had.
        """
        return cls(_description(major))

    @contextlib.contextmanager
    def installed(self) -> Iterator[types.ModuleType]:
        """Be `tensorrt` and `tensorrt_bindings` in `sys.modules`; afterwards what was there before is there again."""
        names = ("tensorrt", "tensorrt_bindings")
        before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
        sys.modules.update(dict.fromkeys(names, self.module))
        try:
            yield self.module
        finally:
            for name in names:
                sys.modules.pop(name, None)
            sys.modules.update(before)

    # ---- What the test says and asks

    def returns(self, target: str, answer: Any, on: Any = None) -> None:
        """Let `target` answer `answer`, or what it returns for the `Call` where it is a function.

        `target` is named as in `Call`; a property to be read is "ICudaEngine.num_io_tensors". With `on`, the answer is
        that of one object and goes before that of its class. A tuple stands for Dims, bytes for an IHostMemory.
        """
        is_function = callable(answer) and not isinstance(answer, (type, _Base))
        self._script(target, answer if is_function else lambda _: answer, on)

    def returns_each(self, target: str, answers: List[Any], on: Any = None) -> None:
        """Let `target` answer these one after the other; a call after the last raises `NotScripted`."""
        remaining = iter(answers)

        def answer(call: Call) -> Any:
            for value in remaining:
                return value
            raise NotScripted(f"{call} comes after the last of {len(answers)} answers")

        self._script(target, answer, on)

    def raises(self, target: str, error: BaseException, on: Any = None) -> None:
        def answer(_: Call) -> Any:
            raise error

        self._script(target, answer, on)

    def make(self, name: str, *data: bytes, **properties: Any) -> Any:
        """An object of class `name` without a call of its constructor; an IHostMemory is made of its bytes."""
        made = self._classes[name].__new__(self._classes[name])
        vars(made)["_ready"] = True
        if data:
            bytearray.__init__(made, *data)
        self.give(made, **properties)
        return made

    def give(self, receiver: Any, **properties: Any) -> None:
        """Let the properties of `receiver`, read-only ones too, have these values."""
        for name, value in properties.items():
            owner = self._owner(type(receiver).__name__, name, "properties")
            answer = self._described(owner)["properties"][name]["get"]
            vars(receiver)["_values"][name] = self._answer(f"{owner}.{name}", answer, value)

    def names(self) -> List[str]:
        return [call.name for call in self.calls]

    def calls_of(self, name: str) -> List[Call]:
        """The calls of one name.

        Raises
        ------
        ValueError
            This version has nothing of that name.
        """
        self._check_target(name)
        return [call for call in self.calls if call.name == name]

    def _script(self, target: str, answer: Callable[[Call], Any], on: Any) -> None:
        self._check_target(target)
        self._kept.append(on)
        self._scripts[target, 0 if on is None else id(on)] = answer

    def _check_target(self, target: str) -> None:
        plain, wants_setter = target.rstrip("="), target.endswith("=")
        owner, _, name = plain.rpartition(".")
        known = False
        if plain in self._description["functions"] or plain in self._classes:
            known = not wants_setter
        elif owner in self._classes:
            described = self._described(owner)
            accessors = described["properties"].get(name, {})
            known = bool(accessors.get("set" if wants_setter else "get")) or (
                name in described["methods"] and not wants_setter
            )
        if not known:
            raise ValueError(f"TensorRT {self.version} defines no {target}; an inherited name goes by its base class")

    # ---- Making the module

    def _described(self, name: str) -> Dict[str, Any]:
        return self._description["classes"][name]

    def _owner(self, name: str, attribute: str, kind: str) -> str:
        """The class that defines `attribute`: `name` or one that it comes from."""
        for cls in self._classes[name].__mro__:
            if cls.__qualname__ in self._classes and attribute in self._described(cls.__qualname__)[kind]:
                return cls.__qualname__
        raise ValueError(f"{name} of TensorRT {self.version} has no {attribute}")

    def _module(self) -> types.ModuleType:
        module = types.ModuleType("tensorrt", f"A test double of TensorRT {self.version}.")
        module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
        module.__version__ = self.version
        for name, cls in self._classes.items():
            if "." not in name:
                setattr(module, name, cls)
        for name, signatures in self._description["functions"].items():
            setattr(module, name, self._function(name, name, signatures, is_static=True))
        for name, reference in self._description["constants"].items():
            setattr(module, name, self._constant(reference))
        return module

    def _constant(self, reference: Dict[str, str]) -> Any:
        if "class" in reference:
            return self._class(reference["class"])
        return getattr(self._class(reference["enum"]), reference["member"])

    def _class(self, name: str) -> Any:
        if name not in self._classes:
            described = self._described(name)
            make = self._plain_class if described["members"] is None else self._enum_class
            self._classes[name] = make(name, described)
            for attribute, reference in described["constants"].items():
                type.__setattr__(self._classes[name], attribute, self._constant(reference))
        return self._classes[name]

    def _plain_class(self, name: str, described: Dict[str, Any]) -> Any:
        bases: Tuple[Any, ...] = tuple(self._class(base) for base in described["bases"]) or (_Base,)
        namespace: Dict[str, Any] = {"__module__": "tensorrt", "__qualname__": name, "_double": self}
        if name == BUFFER:
            bases += (bytearray,)
            namespace.update(dict.fromkeys(NO_BUFFER))
            namespace.update(__eq__=object.__eq__, __hash__=object.__hash__, __getattribute__=_no_bytearray)
        for method, signatures in described["methods"].items():
            called = name if method == "__init__" else f"{name}.{method}"
            function = self._function(method, called, signatures, method in described["static"])
            namespace[method] = staticmethod(function) if method in described["static"] else function
        namespace.setdefault("__init__", _no_constructor)
        for attribute, accessors in described["properties"].items():
            namespace[attribute] = _Property(self, name, attribute, accessors["get"], accessors["set"])
        if "__eq__" in described["methods"]:
            namespace["__hash__"] = None
        return _Meta(name.rpartition(".")[2], bases, dict(namespace, _described=frozenset(described["methods"])))

    def _enum_class(self, name: str, described: Dict[str, Any]) -> Any:
        namespace: Dict[str, Any] = {"__module__": "tensorrt", "__qualname__": name, "_facts": described["facts"]}
        namespace["_refused"] = self.refused
        for attribute in described["facts"]:
            namespace[attribute] = property(functools.partial(_fact, name=attribute))
        for comparison in COMPARISONS:
            if comparison in described["methods"]:
                namespace[comparison] = _comparison(comparison)
        cls = type(name.rpartition(".")[2], (_Enum,), namespace)
        cls.__members__ = {}
        for member, value in described["members"].items():
            made = next((other for other in cls.__members__.values() if other.value == value), None)
            if made is None:
                made = object.__new__(cls)
                made.__dict__.update(_name=member, _value=value)
            cls.__members__[member] = made
            setattr(cls, member, made)
        return cls

    def _function(self, name: str, called: str, signatures: List[Dict[str, Any]], is_static: bool) -> Any:
        def function(*args: Any, **kwargs: Any) -> Any:
            signature, arguments = self._bind(called, signatures, args, kwargs)
            receiver = None if is_static else args[0]
            call = Call(called, receiver, {key: value for key, value in arguments.items() if key != "self"})
            if name == "__init__":
                vars(receiver)["_ready"] = True
            if called.split(".")[0] not in VALUES and called not in FUNCTIONS_OF_VALUES and name not in BEHAVIOUR:
                self.calls.append(call)
            return self._call(call, signature["returns"])

        function.__name__ = name
        function.__qualname__ = called
        return function

    # ---- Calls

    def refuse(self, error: Type[Exception], text: str) -> NoReturn:
        """Raise what the bindings would, and keep it, as the code under test may take it for a failure it handles."""
        self.refused.append(f"TensorRT {self.version}: {text}")
        raise error(self.refused[-1])

    def _bind(
        self, called: str, signatures: List[Dict[str, Any]], args: Tuple[Any, ...], kwargs: Dict[str, Any]
    ) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        """The first overload that takes the arguments, and the arguments by name."""
        for signature in signatures:
            arguments = _match(signature["parameters"], args, kwargs, self.accepts)
            if arguments is not None:
                return signature, arguments
        known = "\n".join(f"    {number}. {_shown(called, one)}" for number, one in enumerate(signatures, 1))
        given = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
        return self.refuse(TypeError, f"{called}() does not take these arguments: {given}. It supports:\n{known}")

    def script_of(self, call: Call) -> Optional[Callable[[Call], Any]]:
        return self._scripts.get((call.name, id(call.receiver))) or self._scripts.get((call.name, 0))

    def _call(self, call: Call, returns: str) -> Any:
        script = self.script_of(call)
        if script is not None:
            return self._answer(call.name, returns, script(call))
        behaviour = BEHAVIOUR.get(call.name) or BEHAVIOUR.get(call.name.rpartition(".")[2])
        if behaviour is not None:
            return behaviour(call)
        if call.name in self._classes or returns == "None":
            return None
        if returns == "bool":
            return True
        if self._known(returns) is not None and not issubclass(self._known(returns), _Enum):
            return self.make(self._known(returns).__qualname__)
        raise NotScripted(f"the test has to say what {call} answers: {returns}")

    def _answer(self, name: str, returns: str, value: Any) -> Any:
        """A scripted answer, once it is one that the bindings may give."""
        cls = self._known(returns)
        if cls is not None and cls.__qualname__ == BUFFER and isinstance(value, bytes):
            return self.make(BUFFER, value)
        if cls is not None and cls.__qualname__ == "Dims" and isinstance(value, (tuple, list)):
            return cls(value)
        is_null = value is None and returns not in ("bool", *INTEGERS, *FLOATS)
        if name in self._classes or is_null or (value is None) == (returns == "None") and self.accepts(returns, value):
            return value
        raise NotScripted(f"{name} answers {returns}, never {value!r}")

    def _known(self, name: Optional[str]) -> Any:
        """The class of a type's name; some signatures have the C++ name, with an I before that of Python."""
        name = name or ""
        return self._classes.get(UNNAMED_TYPES.get(name, name)) or self._classes.get(name[1:])

    def accepts(self, type_name: str, value: Any) -> bool:
        """Whether an argument of type `type_name`, as signatures have it, takes `value`; True of unknown types."""
        if type_name in INTEGERS:
            return not isinstance(value, (float, str)) and (hasattr(value, "__index__") or hasattr(value, "__int__"))
        if type_name in FLOATS:
            return not isinstance(value, str) and (hasattr(value, "__float__") or hasattr(value, "__index__"))
        if type_name in ("buffer", "Buffer"):
            return _is_buffer(value)
        if type_name in ("bool", "str", "bytes", "list", "tuple", "slice", "None"):
            return isinstance(value, PYTHON_TYPES[type_name])
        if type_name in ("Callable", "function"):
            return callable(value)
        if type_name in PROTOCOLS:
            return hasattr(value, PROTOCOLS[type_name])
        generic = re.fullmatch(r"(?:List|list|Sequence|Iterable)\[(.*)\]", type_name)
        if generic:
            is_sequence = hasattr(value, "__iter__") and not isinstance(value, (str, bytes))
            return is_sequence and all(self.accepts(generic.group(1), item) for item in value)
        cls = self._known(type_name)
        return cls is None or isinstance(value, cls) or self._converts(cls.__qualname__, value)

    def _converts(self, name: str, value: Any) -> bool:
        """The conversions that the bindings make, such as numbers to a shape and an array to weights."""
        if name.startswith("Dims") or name == "Permutation":
            return self.accepts("List[int]", value)
        if name == "FallbackString":
            return isinstance(value, str)
        return name == "Weights" and hasattr(value, "__array__")


PROTOCOLS = {"Iterable": "__iter__", "numpy.ndarray": "__array__"}
PYTHON_TYPES: Dict[str, Any] = {
    **{"bool": (bool, np.bool_), "str": str, "bytes": bytes, "list": list},
    **{"tuple": tuple, "slice": slice, "None": type(None)},
}


@functools.lru_cache(maxsize=None)
def _description(major: int) -> Dict[str, Any]:
    return tensorrt_bindings.load(major).describe()


def _is_buffer(value: Any) -> bool:
    try:
        memoryview(value)
    except TypeError:
        return False
    return True


def _shown(called: str, signature: Dict[str, Any]) -> str:
    parts = []
    for parameter in signature["parameters"]:
        default = f" = {parameter['default']}" if "default" in parameter else ""
        parts.append(f"{parameter['name']}: {parameter['type']}{default}")
    return f"{called}({', '.join(parts)}) -> {signature['returns']}"


def _match(
    parameters: List[Dict[str, Any]],
    args: Tuple[Any, ...],
    kwargs: Dict[str, Any],
    accepts: Callable[[str, Any], bool],
) -> Optional[Dict[str, Any]]:
    """The arguments by parameter; None where one is missing, too many, unknown or of another type."""
    positional, named = list(args), dict(kwargs)
    arguments: Dict[str, Any] = {}
    for parameter in parameters:
        name, kind = parameter["name"], parameter["kind"]
        if kind == "*":
            arguments[name], positional = positional, []
        elif kind == "**":
            arguments[name], named = named, {}
        elif positional and kind != "keyword":
            arguments[name] = positional.pop(0)
        elif name in named and kind != "positional":
            arguments[name] = named.pop(name)
        elif "default" not in parameter:
            return None
        if name in arguments and not kind.startswith("*"):
            is_default = arguments[name] is None and parameter.get("default") == "None"
            if not is_default and not accepts(parameter["type"], arguments[name]):
                return None
    return None if positional or named else arguments


# ---- Classes


class _Meta(type):
    """The type of the double's classes and of the subclasses that the code under test derives from them."""

    def __init__(cls, name: str, bases: Tuple[type, ...], namespace: Dict[str, Any]) -> None:
        super().__init__(name, bases, namespace)
        if "_described" not in namespace:
            _check_overrides(cls, namespace)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        if not vars(made).get("_ready"):
            raise TypeError(f"{cls.__mro__[1].__qualname__}.__init__() must be called when overriding __init__")
        return made


def _check_overrides(cls: Any, namespace: Dict[str, Any]) -> None:
    """Refuse a method that TensorRT could not call with what it passes, all by position."""
    for name, function in namespace.items():
        base = next((base for base in cls.__mro__[1:] if name in getattr(base, "_described", ())), None)
        if base is None or name.startswith("__") or not isinstance(function, types.FunctionType):
            continue
        signatures = base._double._described(base.__qualname__)["methods"][name]
        counts = {len(signature["parameters"]) for signature in signatures}
        code = function.__code__
        least = code.co_argcount - len(function.__defaults__ or ())
        most = math.inf if code.co_flags & VARIADIC else code.co_argcount
        if not any(least <= count <= most for count in counts):
            given = " or ".join(map(str, sorted(counts)))
            base._double.refuse(TypeError, f"{cls.__qualname__}.{name} is called with {given} arguments, self included")


VARIADIC = 0x04  # of a code object that has *args


class _Base:
    """What all of the double's classes come from."""

    _double: Any = None

    def __new__(cls, *_: Any, **__: Any) -> Any:
        made = bytearray.__new__(cls) if issubclass(cls, bytearray) else object.__new__(cls)
        vars(made)["_values"] = {}
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        cls = type(self)
        # A class that the code under test derived has a __dict__, as any class of Python.
        if "_described" in vars(cls) and not isinstance(getattr(cls, name, None), _Property):
            self._double.refuse(AttributeError, f"{cls.__qualname__} has no property {name!r} to assign to")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"<{type(self).__qualname__} of the double>"


def _no_bytearray(self: Any, name: str) -> Any:
    """The `__getattribute__` of a buffer: as if it did not come from bytearray, whose methods it does not have."""
    if not name.startswith("_") and hasattr(bytearray, name) and name not in vars(type(self)):
        raise AttributeError(f"{type(self).__qualname__!r} object has no attribute {name!r}")
    return object.__getattribute__(self, name)


def _no_constructor(self: Any, *_: Any, **__: Any) -> None:
    self._double.refuse(TypeError, f"{type(self).__qualname__}: No constructor defined!")


class _Property:
    """A property that the test gives a value, or that has the one that the code under test assigned."""

    def __init__(self, double: TensorRTDouble, owner: str, name: str, getter: Optional[str], setter: Optional[str]):
        self.double, self.owner, self.name, self.getter, self.setter = double, owner, name, getter, setter

    def __get__(self, receiver: Any, owner: Any = None) -> Any:
        if receiver is None:
            return self
        called = f"{self.owner}.{self.name}"
        if self.getter is None:
            raise AttributeError(f"{called} of TensorRT {self.double.version} cannot be read")
        if self.name in vars(receiver)["_values"]:
            return vars(receiver)["_values"][self.name]
        script = self.double.script_of(Call(called, receiver))
        if script is not None:
            return self.double._answer(called, self.getter, script(Call(called, receiver)))
        if called not in BEHAVIOUR:
            raise NotScripted(f"the test has to say what {called} is: {self.getter}")
        return BEHAVIOUR[called](Call(called, receiver))

    def __set__(self, receiver: Any, value: Any) -> None:
        called, double = f"{self.owner}.{self.name}", self.double
        if self.setter is None:
            double.refuse(AttributeError, f"{called} is read-only")
        # Every class that is asked for here may be none again: a monitor, a recorder, an allocator.
        is_reset = value is None and double._known(self.setter) is not None
        if not is_reset and not double.accepts(self.setter, value):
            double.refuse(TypeError, f"{called} takes {self.setter}, not {value!r}")
        call = Call(f"{called}=", receiver, {"value": value})
        double.calls.append(call)
        script = double.script_of(call)
        if script is not None:
            script(call)
        vars(receiver)["_values"][self.name] = value


class _Enum:
    """The members of one enum. As with pybind11's they are no integers, but convert to them."""

    __members__: Dict[str, Any] = {}
    _name: str
    _value: int
    _facts: Dict[str, Dict[str, Any]] = {}
    _refused: List[str] = []

    def __new__(cls, value: Any) -> Any:
        for member in cls.__members__.values():
            if member._value == value:
                return member
        # pybind11 makes a member without a name; no code of ours should.
        text = f"{cls.__qualname__} has no member of value {value!r}"
        cls._refused.append(text)
        raise TypeError(text)

    @property
    def name(self) -> str:
        return self._name

    @property
    def value(self) -> int:
        return self._value

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__qualname__} member has no attribute {name!r} to assign to")

    def __int__(self) -> int:
        return self._value

    __index__ = __int__

    def __eq__(self, other: Any) -> bool:
        return type(other) is type(self) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self._name}"

    def __repr__(self) -> str:
        return f"<{self}: {self._value}>"


def _fact(member: _Enum, name: str) -> Any:
    for alias, value in member._facts[name].items():
        if type(member).__members__[alias] is member:
            return value
    raise TypeError(f"{member} has no {name}")


def _comparison(name: str) -> Any:
    def compare(self: _Enum, other: Any) -> bool:
        if type(other) is not type(self):
            raise TypeError("Expected an enumeration of matching type!")
        return getattr(operator, name)(self._value, other._value)

    return compare


# ---- Values


def _shape(call: Call) -> List[int]:
    return vars(call.receiver)["_values"]["shape"]


def _make_shape(call: Call) -> None:
    values = list(call.arguments.values())
    is_one = len(values) == 1 and hasattr(values[0], "__iter__")
    vars(call.receiver)["_values"]["shape"] = [int(value) for value in (values[0] if is_one else values)]


def _item(call: Call) -> Any:
    (index,) = call.arguments.values()
    found = _shape(call)[index]
    return tuple(found) if isinstance(index, slice) else found


def _assign_item(call: Call) -> None:
    index, value = call.arguments.values()
    _shape(call)[index] = value


def _numpy_type(call: Call) -> Any:
    name = call["trt_type"].name
    if name not in NUMPY_TYPES:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return NUMPY_TYPES[name]


# What works without a script, by the name of the call, or of the method where many classes have it.
BEHAVIOUR: Dict[str, Callable[[Call], Any]] = {
    **{name: _make_shape for name in VALUES if name != BUFFER},
    "Dims.__len__": lambda call: len(_shape(call)),
    "Dims.__getitem__": _item,
    "Dims.__setitem__": _assign_item,
    "Dims.__eq__": lambda call: tuple(_shape(call)) == tuple(*call.arguments.values()),
    "Dims.MAX_DIMS": lambda _: 8,
    f"{BUFFER}.nbytes": lambda call: memoryview(call.receiver).nbytes,
    "__enter__": lambda call: call.receiver,
    "__exit__": lambda _: None,
    "volume": lambda call: functools.reduce(operator.mul, itertools.chain(*call.arguments.values()), 1),
    "nptype": _numpy_type,
}
