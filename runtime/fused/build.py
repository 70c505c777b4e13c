"""The fused networks of a model on one CUDA device, with tile sizes for its card. No torch at import."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from cldm.config import ModelConfig
from deploy.spec import PRECISIONS, Build, GraphSpec, graph_specs
from runtime.fused.session import FusedSession
from runtime.fused.tuning import Tuning, card_slug, read_table, write_table
from runtime.session import Session

Report = Callable[[str], None]

SHIPPED = Path(__file__).resolve().parent / "tables"
# Beside the weights: maps, the captured graph, cuBLAS's and CUDA's own.
OVERHEAD_BYTES = 1 << 30
# What a first start may spend on measuring tile sizes for one picture size.
TUNING_SECONDS = 180.0
SMALLEST_TUNED_CHANNELS = 128
# Of the candidates of a problem, so many are tried in its network.
REFINED = 6
# Ada's and later tensor cores take FP8.
FP8_CAPABILITY = (8, 9)


def fused_problem(device: str, precision: str) -> Optional[str]:
    """Why the fused networks cannot run in this precision on this device, or None."""
    if os.environ.get("HACKATHON_FUSED") == "0":
        return "HACKATHON_FUSED is 0"
    if not device.startswith("cuda"):
        return f"they are for CUDA devices, not for {device}"
    if precision == "fp32":
        return "they have no FP32 form"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"they need compute capability 8.0, and this GPU has {major}.{minor}"
    if precision == "fp8" and (major, minor) < FP8_CAPABILITY:
        return f"FP8 needs compute capability 8.9, and this GPU has {major}.{minor}"
    try:
        importlib.import_module("runtime.fused.kernels")
    except ImportError as error:
        return f"this version of triton is too old for them: {error}"
    return None


def require_memory(config: ModelConfig, device: str) -> None:
    """Raise MemoryError, before any work, where the device's free memory is too little for half precision."""
    import torch

    from cldm.checkpoint import shape_of_model

    model = shape_of_model(config)
    encoder = sum(parameter.numel() for parameter in model.first_stage_model.encoder.parameters())
    needed = 2 * (sum(parameter.numel() for parameter in model.parameters()) - encoder) + OVERHEAD_BYTES
    free, total = torch.cuda.mem_get_info(device)
    if free >= needed:
        return
    raise MemoryError(
        f"{config.name} in half precision needs some {needed / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} of its"
        f" {total / 1e9:.1f} GB free; stop other programs on it, or take --backend onnxruntime"
    )


class FusedNetworks:
    """Makes the networks once, and the sessions of any size on them.

    Parameters
    ----------
    model : ControlLDM
        Its weights are copied to the device in half precision; on a CPU it stays where it is.
    device : str
    precision : {"fp16", "bf16", "fp8"}
        FP8 is FP16 but for the large products of the step and the decoder, see `fp8`.
    folder : Path
        Compiled kernels and measured tile sizes are kept below.
    report : callable
        Takes lines of progress.
    """

    def __init__(self, model: Any, device: str, precision: str, folder: Path, report: Report) -> None:
        # Looked at when triton first compiles.
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
        import torch

        from runtime.fused.ops import Fused
        from runtime.fused.tune import card_of

        self._device = device
        self._folder = folder / "tuning"
        self._report = report
        self._dtype = getattr(torch, PRECISIONS[precision])
        card = card_of(device)
        self._tuning = Tuning(card, self._stored(card))
        overlap = card.capability >= 90 and _cuda_version() >= (12, 3)
        self.run = Fused(self._tuning, self._dtype, pdl=overlap)
        # For the hint's kernels, which are longer than a launch takes and begin slower when they wait for one another,
        # and for the step's on a stream of their own.
        self.run_apart = Fused(self._tuning, self._dtype)
        self._networks = self._make(model, precision)
        # On a small model launches are all that takes time, whatever the tiles.
        self._tunes = model.config.unet.model_channels >= SMALLEST_TUNED_CHANNELS

    def _stored(self, card: Any) -> Dict[str, List[int]]:
        """Tile sizes that ship with the repository, and over them those measured here."""
        table: Dict[str, List[int]] = {}
        for path in (SHIPPED / f"{card_slug(card)}.json", self._path(card)):
            if path.is_file():
                table.update(read_table(path))
        return table

    def _path(self, card: Any) -> Path:
        return self._folder / f"{card_slug(card)}.json"

    def _make(self, model: Any, precision: str) -> Dict[str, Any]:
        from runtime.fused.networks import FusedDecode, FusedHint, FusedStep, FusedText, FusedTime

        ranges = self._ranges(model) if precision == "fp8" else None
        return {
            "text": FusedText(model, self.run, self._device),
            "hint": FusedHint(model, self.run_apart, self._device),
            "time": FusedTime(model, self._device),
            "step": FusedStep(model, self.run, self._device, self.run_apart, ranges),
            "decode": FusedDecode(model, self.run, self._device, ranges),
        }

    def _ranges(self, model: Any) -> Mapping[Any, float]:
        """How large the layers' inputs get; what the run takes is free again before anything is packed."""
        import torch

        from runtime.fused.fp8 import input_ranges

        self._report("fp8: a short run in FP16 shows how large the layers' inputs get")
        ranges = input_ranges(model, self._device)
        torch.cuda.empty_cache()
        return ranges

    def sessions(self, build: Build) -> Mapping[str, Session]:
        """Sessions for a build's graphs, once the tile sizes that its shapes need are known."""
        specs = graph_specs(build)
        if self._tunes:
            self._tune(specs)
        self._compile(specs)
        return {name: FusedSession(network, specs[name]) for name, network in self._networks.items()}

    def _launching(self) -> List[Tuple[str, Any]]:
        """All but the time graph's, which launches none of the kernels."""
        return [(name, network) for name, network in self._networks.items() if name != "time"]

    def _tune(self, specs: Mapping[str, GraphSpec]) -> None:
        """Measure the tile sizes of problems that no table has, and keep them."""
        table = self._tuning.table
        found = self._measure(specs, TUNING_SECONDS, lambda key: key not in table)
        if found:
            table.update({key: list(next(iter(times))) for key, times in found.items()})
            self._write(self._path(self._tuning.card))

    def _measure(
        self, specs: Mapping[str, GraphSpec], seconds: float, wanted: Callable[[str], bool]
    ) -> Dict[str, Dict[Tuple[int, ...], float]]:
        """Milliseconds of the candidates of the wanted problems, each alone, the fastest first."""
        from runtime.fused.tune import tune

        self._ask([(network, specs[name]) for name, network in self._launching()])
        found: Dict[str, Dict[Tuple[int, ...], float]] = {}
        for run in (self.run, self.run_apart):
            problems = {problem: shape for problem, shape in run.asked.items() if wanted(problem.key())}
            attentions = [problem for problem in run.asked_attention if wanted(problem.key())]
            if problems or attentions:
                found.update(tune(run, problems, attentions, self._device, self._report, seconds))
        return found

    def retune(self, build: Build, path: Path, seconds: float = 900.0) -> None:
        """Measure the tile sizes of a build's problems anew, first alone and then in their networks, and write them.

        Parameters
        ----------
        build : Build
        path : Path
            The table that is written; other problems' rows in it are kept.
        seconds : float
            For the candidates alone; the networks take up to a third more.
        """
        import torch

        from runtime.fused.tune import refine

        specs, table = graph_specs(build), self._tuning.table
        table.clear()
        if path.is_file():
            table.update(read_table(path))
        found = self._measure(specs, seconds, lambda key: True)
        uses = self.run.uses + self.run_apart.uses
        ranked = {key: list(times)[:REFINED] for key, times in found.items()}
        weights = {key: uses[key] * next(iter(times.values())) for key, times in found.items()}
        table.update({key: list(configs[0]) for key, configs in ranked.items()})
        # A problem that several networks have is chosen for the step, which runs the most often.
        for name, network in sorted(self._launching(), key=lambda pair: pair[0] != "step"):
            asked = self._ask([(network, specs[name])])
            inputs, outputs = _random(specs[name].inputs, self._device), _zeros(specs[name].outputs, self._device)
            with torch.no_grad():
                refine(
                    (self.run, self.run_apart),
                    lambda network=network, inputs=inputs, outputs=outputs: network(inputs, outputs),
                    {key: ranked.pop(key) for key in asked if key in ranked},
                    weights,
                    self._device,
                    self._report,
                    seconds / 12,
                )
        self._write(path)

    def _ask(self, networks: Sequence[Tuple[Any, GraphSpec]]) -> List[str]:
        """Let `run` and `run_apart` note the problems of these networks and no others; their keys."""
        runs = (self.run, self.run_apart)
        for run in runs:
            run.asked.clear()
            run.asked_attention.clear()
            run.uses.clear()
        for network, spec in networks:
            network(_meta(spec.inputs), _meta(spec.outputs))
        return [key for run in runs for key in run.uses]

    def _write(self, path: Path) -> None:
        import torch
        import triton

        versions = {"torch": torch.__version__, "triton": triton.__version__}
        write_table(path, self._tuning.card, versions, self._tuning.table)

    def _compile(self, specs: Mapping[str, GraphSpec]) -> None:
        """Compile what the networks launch, several kernels at a time: one after the other it takes a minute."""
        import torch

        from runtime.fused.tune import run_all

        with torch.no_grad(), self.run.putting_off() as launches, self.run_apart.putting_off() as apart:
            for name, network in self._launching():
                network(_zeros(specs[name].inputs, self._device), _zeros(specs[name].outputs, self._device))
        errors = run_all([*launches.values(), *apart.values()], self._device)
        if errors:
            raise errors[0]
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


def _random(tensors: Mapping[str, Any], device: str) -> Dict[str, Any]:
    """Normal numbers, as zeros are multiplied faster; integers stay 0."""
    made = _zeros(tensors, device)
    for tensor in made.values():
        if tensor.is_floating_point():
            tensor.normal_()
    return made


def _zeros(tensors: Mapping[str, Any], device: str) -> Dict[str, Any]:
    import torch

    return {
        name: torch.zeros(tuple(tensor.shape), dtype=getattr(torch, tensor.dtype), device=device)
        for name, tensor in tensors.items()
    }


def _meta(tensors: Mapping[str, Any]) -> Dict[str, Any]:
    import torch

    return {
        name: torch.empty(tuple(tensor.shape), dtype=getattr(torch, tensor.dtype), device="meta")
        for name, tensor in tensors.items()
    }


def _cuda_version() -> Tuple[int, ...]:
    import torch

    return tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
