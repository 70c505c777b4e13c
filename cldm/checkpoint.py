"""Reading weights into a `ControlLDM`, strictly, without unpickling code and with one copy in memory."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import re
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cldm.config import ModelConfig
from cldm.machine import available_cores
from cldm.model import ControlLDM
from cldm.weights import CheckpointError, Weights

# Derived values that the original's checkpoint holds and these networks compute.
DERIVED = frozenset(
    [
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    ]
)
SHOWN = 10


class _WithoutInitialValues(TorchFunctionMode):
    """Inside, the functions of `torch.nn.init` that modules of PyTorch call leave tensors as they are.

    On the meta device there is nothing to fill; yet PyTorch imports its compiler there for a normal distribution, which
    takes a second or two.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Tuple[Any, ...] = (), kwargs: Optional[Dict[str, Any]] = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


def shape_of_model(config: ModelConfig) -> ControlLDM:
    """A `ControlLDM` on the meta device: names and shapes, and no weights."""
    with torch.device("meta"), _WithoutInitialValues():
        return ControlLDM(config)


def load_model(config: ModelConfig, weights: Weights) -> ControlLDM:
    """A `ControlLDM` in FP32, for inference, with the given weights.

    Raises
    ------
    CheckpointError
        The file is damaged, holds code, or its names or shapes are not the model's; the first ten are listed.
    """
    if int(torch.__version__.split(".")[0]) < 2:
        raise RuntimeError(f"torch 2.0 or newer is needed, this is {torch.__version__}: run bash preprocess.sh")
    model = shape_of_model(config)
    if weights.path is None:
        _fill_random(model, int(weights.seed or 0))
    else:
        with _open_tensors(weights.path) as tensors:
            _check_names(model, tensors, weights.path, config.name)
            for name, _ in list(model.named_parameters()):
                _set_parameter(model, name, tensors.get(name))
    return model.eval().requires_grad_(False)


class _Tensors:
    """Tensors of a file by name, read one at a time."""

    def __init__(self, shapes: Mapping[str, Tuple[int, ...]], get: Any) -> None:
        self.shapes = shapes
        self._get = get

    def get(self, name: str) -> torch.Tensor:
        """A tensor in FP32 that shares no memory with the file.

        Raises
        ------
        CheckpointError
            It holds no real numbers, as the integers of a quantised checkpoint.
        """
        tensor = self._get(name)
        if not tensor.is_floating_point():
            raise CheckpointError(f"{name} is {tensor.dtype} in the checkpoint; FP32, FP16 or BF16 weights are wanted")
        copy = torch.empty(tensor.shape, dtype=torch.float32)
        return copy.copy_(tensor)


@contextlib.contextmanager
def _open_tensors(path: Path) -> Iterator[_Tensors]:
    if path.suffix.lower() == ".safetensors":
        with _open_safetensors(path) as tensors:
            yield tensors
    else:
        state = _load_pickled(path)
        yield _Tensors({name: tuple(t.shape) for name, t in state.items()}, state.__getitem__)


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[_Tensors]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(str(path), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}); copy it again") from error
    with file:
        names = list(file.keys())
        yield _Tensors({name: tuple(file.get_slice(name).get_shape()) for name in names}, file.get_tensor)


def _load_pickled(path: Path) -> Dict[str, torch.Tensor]:
    options: Dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    # Mapped, the file's pages need not be held beside the model; torch has this since 2.1, for its zip format only.
    if zipfile.is_zipfile(path) and "mmap" in inspect.signature(torch.load).parameters:
        options["mmap"] = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols; what cannot be read is an error below
            state = torch.load(str(path), **options)
    except Exception as error:  # a damaged pickle fails in any way at all
        raise CheckpointError(_explain(path, error)) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(_is_named_tensor(item) for item in state.items()):
        raise CheckpointError(f"{path} is not a state_dict: a mapping from names to tensors was expected")
    return state


def _explain(path: Path, error: Exception) -> str:
    # torch's own message goes on to advise loading the file with code and all, so only the name is taken from it.
    refused = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
    if refused:
        return (
            f"{path} holds more than tensors ({refused.group(1)}) and was not unpickled: that could run code in it."
            " Save its state_dict alone, best as .safetensors"
        )
    return f"{path} is truncated or no checkpoint ({type(error).__name__}); copy it again"


def _is_named_tensor(item: Tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], torch.Tensor)


def _check_names(model: nn.Module, tensors: _Tensors, path: Path, name: str) -> None:
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = tensors.shapes
    missing = [key for key in wanted if key not in found]
    unexpected = [key for key in found if key not in wanted and key not in DERIVED]
    misshaped = [
        f"{key}: {found[key]} instead of {wanted[key]}" for key in wanted if key in found and found[key] != wanted[key]
    ]
    problems = [
        _list_names(kind, names)
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        if names
    ]
    if problems:
        raise CheckpointError(f"{path} is not a checkpoint of {name}:\n" + "\n".join(problems))


def _list_names(kind: str, names: List[str]) -> str:
    more = f"\n    and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"  {len(names)} {kind}:\n    " + "\n    ".join(names[:SHOWN]) + more


def _set_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    module._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _fill_random(model: nn.Module, seed: int) -> None:
    """Seeded weights under which activations keep their scale, so that errors measured on them mean something.

    Each parameter has a generator of its own, so that any number of threads draws the same: SD1.5 has 1.4e9 numbers.
    """
    # The largest first: one of them at the end would keep all threads but its own waiting.
    parameters = sorted(model.named_parameters(), key=lambda item: -item[1].numel())
    with ThreadPoolExecutor(available_cores()) as pool:
        values = pool.map(lambda item: _draw(seed, item[0], item[1].shape), parameters)
        for (name, _), value in zip(parameters, values):
            _set_parameter(model, name, value)


def _draw(seed: int, name: str, shape: torch.Size) -> torch.Tensor:
    """One parameter's weights, from a generator that is seeded by the SHA-256 of the seed and the parameter's name."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    mean, deviation = 0.0, 0.1
    if len(shape) > 1:
        deviation = shape[1:].numel() ** -0.5
    elif name.endswith(".weight"):
        mean = 1.0
    # By one function, which takes one thread: PyTorch's threads would only stand in the way of these.
    return torch.empty(shape).normal_(mean, deviation, generator=generator)
