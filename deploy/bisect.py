"""Which layer of an engine is the first that diverges: tensors inside the graph marked as outputs, round by round.

Each round builds an engine with a few marked tensors, evenly spread over those still in question, and compares them
with ONNX Runtime's in FP32. The next round looks between the last that agrees and the first that does not. Marking a
tensor keeps TensorRT from fusing across it, so few are marked at a time, and an error that vanishes when it is looked
at closely is told as that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import onnx

from cldm.files import atomic_path
from deploy.gate import Arrays, GateError, Tolerance, check_output
from deploy.onnx_files import ONNX_TYPES, load_graph
from deploy.spec import TensorSpec

# Tensors that are marked at once. Sixteen find one among 4,000 in three rounds.
MARKED = 16
FLOAT_TYPES = ("float32", "float16")

# Gives the named tensors, in the order of the graph, by building and running an engine or a session.
Evaluate = Callable[[Sequence[str]], Arrays]


@dataclass(frozen=True)
class Divergence:
    """Where an engine begins to differ.

    Attributes
    ----------
    tensor : str
        The first tensor that diverges.
    node : str
        The node of the graph that makes it, and its operator.
    after : str or None
        The last tensor before it that agrees; None where there is none.
    why : str
        How it differs.
    reproduced : bool
        False where it agreed again once the tensors right before it were marked, too: the error comes from a fusion of
        what lies between `after` and `tensor`.
    """

    tensor: str
    node: str
    after: Optional[str]
    why: str
    reproduced: bool = True

    def __str__(self) -> str:
        start = f"; {self.after} before it agrees" if self.after else ""
        text = f"the first tensor that diverges is {self.tensor}, made by {self.node}: {self.why}{start}"
        if not self.reproduced:
            text += ". With the tensors between marked it agrees: the error comes from fusing what lies between these"
        return text


def comparable_tensors(engine: Path, reference: Path) -> List[str]:
    """The floating-point tensors that nodes of both graphs make under one name and in one shape, in the first's order.

    Parameters
    ----------
    engine, reference : Path
        The graph that is built, and the FP32 one. The exporter names tensors after modules and operators, so that casts
        and surgery leave those of all other nodes as they are.
    """
    known = _floats(reference)
    ours = _floats(engine)
    return [name for name, tensor in ours.items() if name in known and known[name].shape == tensor.shape]


def _floats(file: Path) -> Dict[str, TensorSpec]:
    """Shape and type of each floating-point tensor that a node makes, of those with a fixed shape."""
    model = onnx.shape_inference.infer_shapes(load_graph(file), data_prop=True)
    described = {value.name: value for value in [*model.graph.value_info, *model.graph.output]}
    names = {number: name for name, number in ONNX_TYPES.items()}
    found: Dict[str, TensorSpec] = {}
    for node in model.graph.node:
        for name in node.output:
            tensor = described[name].type.tensor_type if name in described else None
            if tensor is None or names.get(tensor.elem_type) not in FLOAT_TYPES or node.op_type == "Constant":
                continue
            shape = tuple(dim.dim_value for dim in tensor.shape.dim)
            if tensor.HasField("shape") and all(dim > 0 for dim in shape):
                found[name] = TensorSpec(shape, names[tensor.elem_type])
    return found


def mark_outputs(source: Path, target: Path, names: Sequence[str]) -> Dict[str, TensorSpec]:
    """Write a graph whose outputs are the named tensors; gives their shapes and types.

    Parameters
    ----------
    target : Path
        In the folder of `source`, whose external weights it shares.
    """
    if target.parent.resolve() != source.parent.resolve():
        raise ValueError(f"{target} has to lie beside {source}, whose weights it shares")
    floats = _floats(source)
    model = load_graph(source)
    del model.graph.output[:]
    for name in names:
        spec = floats[name]
        value = onnx.helper.make_tensor_value_info(name, ONNX_TYPES[spec.dtype], list(spec.shape))
        model.graph.output.append(value)
    kept = [value for value in model.graph.value_info if value.name not in set(names)]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    with atomic_path(target) as temporary:
        onnx.save(model, str(temporary))
    return {name: floats[name] for name in names}


def first_divergence(
    names: Sequence[str],
    engine: Evaluate,
    reference: Evaluate,
    tolerance: Tolerance,
    makers: Mapping[str, str],
    report: Callable[[str], None],
    marked: int = MARKED,
) -> Optional[Divergence]:
    """The first of the tensors that the engine gets wrong; None where it gets all of the first round's right.

    Parameters
    ----------
    names : sequence of str
        In the order in which they are computed.
    makers : mapping
        For each tensor the node that makes it, in words.
    marked : int
        Tensors that are marked in one round.
    """
    before, end = -1, len(names) - 1
    found: Optional[Tuple[int, str]] = None
    while found is None or found[0] - before > 1:
        places = _spread(before + 1, end, marked)
        report(f"marking {len(places)} of {end - before} tensors, {names[places[0]]} to {names[places[-1]]}")
        wrong = _first_wrong([names[place] for place in places], engine, reference, tolerance)
        if wrong is None:
            return None if found is None else _describe(names, found, before, makers, False)
        index, why = wrong
        found = (places[index], why)
        before = places[index - 1] if index else before
        end = found[0]
        report(f"{names[found[0]]} diverges: {why}")
    return _describe(names, found, before, makers, True)


def _describe(
    names: Sequence[str], found: Tuple[int, str], before: int, makers: Mapping[str, str], reproduced: bool
) -> Divergence:
    name = names[found[0]]
    return Divergence(name, makers.get(name, "?"), names[before] if before >= 0 else None, found[1], reproduced)


def _spread(first: int, last: int, count: int) -> List[int]:
    """At most `count` numbers from `first` to `last`, the last among them, evenly apart."""
    total = last - first + 1
    if total <= count:
        return list(range(first, last + 1))
    return [first + (number + 1) * total // count - 1 for number in range(count)]


def _first_wrong(
    names: Sequence[str], engine: Evaluate, reference: Evaluate, tolerance: Tolerance
) -> Optional[Tuple[int, str]]:
    found, wanted = engine(names), reference(names)
    for index, name in enumerate(names):
        try:
            check_output(name, found[name], wanted[name].astype(np.float32), tolerance)
        except GateError as error:
            return index, str(error)
    return None


def makers_of(file: Path) -> Dict[str, str]:
    """For each tensor of a graph the node that makes it and its operator."""
    return {
        name: f"{node.name or 'a node without a name'} ({node.op_type})"
        for node in load_graph(file).graph.node
        for name in node.output
    }
