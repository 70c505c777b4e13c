"""Makes calls and assignments on real bindings or on the double, and says which are taken and which are refused.

The cases come from a description (`cases_of`) and hold plain values only, so that the same list goes to both sides. Run
as a program, in the interpreter that has the bindings, it reads the list and what makes each class from standard input
and writes one outcome a case to standard output: "accepted", "TypeError" or "AttributeError". What the bindings accept
goes on to the hollow objects of the stub libraries, which may end the process: those calls are made in a child each.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, Callable, Dict, Iterator, List, Optional

ACCEPTED = "accepted"
# Of a TypeError before the call; afterwards it is about what the hollow object answered.
BEFORE_THE_CALL = ("incompatible function arguments", "incompatible constructor arguments", "unable to convert call")
# Some loop over as many things as a hollow object says that there are.
CHILD_SECONDS = 0.3

# How code gets an object of each class; `trt` is the module, a class name in braces an object of that class.
FACTORIES = {
    "Logger": "trt.Logger()",
    "ILogger": "trt.Logger()",
    "Builder": "trt.Builder({Logger})",
    "INetworkDefinition": "{Builder}.create_network()",
    "IBuilderConfig": "{Builder}.create_builder_config()",
    "IOptimizationProfile": "{Builder}.create_optimization_profile()",
    "IPluginRegistry": "{Builder}.get_plugin_registry()",
    "IHostMemory": "{Builder}.build_serialized_network({INetworkDefinition}, {IBuilderConfig})",
    "ITimingCache": "{IBuilderConfig}.create_timing_cache(b'x')",
    "ITensor": "{INetworkDefinition}.add_input('x', trt.float32, (1, 2))",
    "OnnxParser": "trt.OnnxParser({INetworkDefinition}, {Logger})",
    "ParserError": "{OnnxParser}.get_error(0)",
    "Runtime": "trt.Runtime({Logger})",
    "ICudaEngine": "{Runtime}.deserialize_cuda_engine(b'x')",
    "IExecutionContext": "{ICudaEngine}.create_execution_context()",
    "EngineInspector": "{ICudaEngine}.create_engine_inspector()",
    "IRuntimeConfig": "{ICudaEngine}.create_runtime_config()",
    "ISerializationConfig": "{ICudaEngine}.create_serialization_config()",
    "Refitter": "trt.Refitter({ICudaEngine}, {Logger})",
    "Profiler": "trt.Profiler()",
    "IProfiler": "trt.Profiler()",
    "IProgressMonitor": "trt.IProgressMonitor()",
    "IErrorRecorder": "trt.IErrorRecorder()",
    "IGpuAllocator": "trt.IGpuAllocator()",
    "IOutputAllocator": "trt.IOutputAllocator()",
    "PluginField": "trt.PluginField('x')",
    "PluginFieldCollection": "trt.PluginFieldCollection()",
    "Weights": "trt.Weights()",
    "Dims": "trt.Dims((1, 2))",
}
SAMPLES: Dict[str, Any] = {
    **{"int": 1, "SupportsInt": 1, "float": 0.5, "SupportsFloat": 0.5, "bool": True, "str": "x", "FallbackString": "x"},
    **{"buffer": {"bytes": "x"}, "Buffer": {"bytes": "x"}, "bytes": {"bytes": "x"}, "Dims": [1, 2]},
}


# ---- The cases


def cases_of(description: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Right and wrong uses of every constructor, method and property of the classes that FACTORIES can make."""
    cases: List[Dict[str, Any]] = []
    for name, described in description["classes"].items():
        if name not in FACTORIES:
            continue
        for method, signatures in described["methods"].items():
            if not method.startswith("__") or method == "__init__":
                for signature in signatures:
                    cases.extend(_calls(description, name, method, signature["parameters"]))
        for attribute, accessors in described["properties"].items():
            cases.extend(_assignments(description, name, attribute, accessors))
        cases.append({"class": name, "set": "no_such_name", "args": [1]})
        cases.append({"class": name, "get": "no_such_name"})
    return cases


def _calls(
    description: Dict[str, Any], name: str, method: str, parameters: List[Dict[str, Any]]
) -> Iterator[Dict[str, Any]]:
    case = {"class": name, "call": method}
    inner = [parameter for parameter in parameters if parameter["name"] != "self"]
    samples = [_sample(description, parameter["type"]) for parameter in inner]
    # Too many is too many and an unknown keyword unknown whatever the others are.
    yield {**case, "args": [1] * 30, "kwargs": {}}
    yield {**case, "args": [], "kwargs": {"no_such_name": 1}}
    if None in samples:
        return
    yield {**case, "args": samples, "kwargs": {}}
    required = [sample for sample, parameter in zip(samples, inner) if "default" not in parameter]
    if required and len(required) < len(samples) and "default" not in inner[len(required) - 1]:
        yield {**case, "args": required, "kwargs": {}}
    if required:
        yield {**case, "args": required[:-1], "kwargs": {}}
    # By keyword: refused where the bindings gave the parameter no name.
    names = [parameter["name"] for parameter in inner]
    yield {**case, "args": [], "kwargs": dict(zip(names, samples))}
    yield {**case, "args": samples[:1], "kwargs": dict(zip(names, samples), no_such_name=1)}
    for index in range(len(samples)):
        yield {**case, "args": [*samples[:index], {"anything": 0}, *samples[index + 1 :]], "kwargs": {}}


def _assignments(
    description: Dict[str, Any], name: str, attribute: str, accessors: Dict[str, Optional[str]]
) -> Iterator[Dict[str, Any]]:
    case = {"class": name, "set": attribute}
    if accessors["set"] is None:
        yield {**case, "args": [1]}
    elif _sample(description, accessors["set"]) is not None:
        yield {**case, "args": [_sample(description, accessors["set"])]}
        yield {**case, "args": [{"anything": 0}]}
    if accessors["get"] is None:
        yield {"class": name, "get": attribute}


def _sample(description: Dict[str, Any], type_name: str) -> Any:
    """A value of a type, in values that JSON has; None where there is none to be had."""
    generic = type_name.partition("[")
    if generic[0] in ("List", "list", "Sequence"):
        item = _sample(description, generic[2][:-1])
        return None if item is None else [item]
    if type_name in SAMPLES:
        return SAMPLES[type_name]
    described = description["classes"].get(type_name)
    if described is not None and described["members"]:
        return {"enum": type_name, "member": next(iter(described["members"]))}
    return {"object": type_name} if described is not None and type_name in FACTORIES else None


# ---- Trying them


class Prober:
    """Objects of every class of one module, made when they are first asked for, and the cases tried on them."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self._objects: Dict[str, Any] = {}

    def make(self, name: str) -> Any:
        if name not in self._objects:
            expression, names = FACTORIES[name], {}
            for other in FACTORIES:
                if "{" + other + "}" in expression:
                    names[other] = self.make(other)
                    expression = expression.replace("{" + other + "}", other)
            self._objects[name] = eval(expression, {"trt": self.module, **names})
        return self._objects[name]

    def value(self, encoded: Any) -> Any:
        if isinstance(encoded, list):
            return [self.value(item) for item in encoded]
        if not isinstance(encoded, dict):
            return encoded
        if "bytes" in encoded:
            return encoded["bytes"].encode()
        if "object" in encoded:
            return self.make(encoded["object"])
        if "anything" in encoded:
            return object()
        found = self.module
        for part in encoded["enum"].split("."):
            found = getattr(found, part)
        return getattr(found, encoded["member"])

    def action(self, case: Dict[str, Any]) -> Callable[[], Any]:
        if case.get("call") == "__init__":
            target: Any = getattr(self.module, case["class"])
        else:
            target = self.make(case["class"])
        if "get" in case:
            return lambda: getattr(target, case["get"])
        args = [self.value(value) for value in case["args"]]
        if "set" in case:
            return lambda: setattr(target, case["set"], *args)
        kwargs = {name: self.value(value) for name, value in case["kwargs"].items()}
        function = target if case["call"] == "__init__" else getattr(target, case["call"])
        return lambda: function(*args, **kwargs)


def main() -> None:
    import tensorrt

    prober = Prober(tensorrt)
    for case in json.load(sys.stdin):
        action = prober.action(case)
        outcome = _in_child(action) if case["child"] else _outcome(action)
        print(json.dumps(outcome), flush=True)


def _outcome(action: Callable[[], Any]) -> str:
    try:
        action()
    except AttributeError:
        return "AttributeError"
    except TypeError as error:
        return "TypeError" if any(text in str(error) for text in BEFORE_THE_CALL) else ACCEPTED
    except Exception:
        return ACCEPTED
    return ACCEPTED


def _in_child(action: Callable[[], Any]) -> str:
    outcomes = [ACCEPTED, "TypeError", "AttributeError"]
    child = os.fork()
    if not child:
        signal.setitimer(signal.ITIMER_REAL, CHILD_SECONDS)
        for stream in (1, 2):  # a logger prints
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os._exit(outcomes.index(_outcome(action)))
    status = os.waitpid(child, 0)[1]
    # Killed by a signal: the hollow object was read as more than it is, so the arguments were taken.
    return ACCEPTED if os.WIFSIGNALED(status) else outcomes[os.WEXITSTATUS(status)]


if __name__ == "__main__":
    main()
