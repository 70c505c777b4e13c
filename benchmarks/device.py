"""What a machine is, what it could do at best, and how much work the graphs are."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from typing import Any, Dict, List, Mapping, NamedTuple, Optional

from deploy.spec import STEPS, Build, graph_specs

CUBE = 8192  # side of the matrix product whose rate counts as the card's
PRODUCTS = 10  # of them a replay

# What a kernel's name tells, the first that fits.
KINDS = (
    ("attention", r"flash|fmha|attention|sdpa|softmax"),
    ("norm", r"norm|welford"),
    ("elementwise, fused", r"^triton_(poi|per|red)_"),
    ("convolution", r"conv|fprop|dgrad|winograd|implicit"),
    ("matrix product", r"gemm|matmul|cutlass|cublas|nvjet|splitk|^triton_tem_|^triton_mm"),
    ("copy", r"memcpy|memset|copy|cat|transpose|nchwtonhwc|nhwctonchw"),
    ("elementwise", r"elementwise|vectorized|silu|gelu|reduce"),
)


class Work(NamedTuple):
    """Of one run of a graph.

    Attributes
    ----------
    flops : int
        Multiplications and additions of convolutions, matrix products and attention.
    weight_bytes : int
        Parameters, each read once.
    """

    flops: int
    weight_bytes: int

    def floor(self, flops_a_second: float, bytes_a_second: float) -> float:
        """Milliseconds that neither arithmetic nor memory can go below, were the other free."""
        return 1e3 * max(self.flops / flops_a_second, self.weight_bytes / bytes_a_second)


def count_work(build: Build, steps: int) -> Dict[str, Work]:
    """The work of each graph, from the networks themselves on the meta device; time is for `steps` timesteps.

    The graphs of `deploy`: what they take out of the loop does not count as work of the step.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cldm.model import ControlLDM
    from deploy.graphs import build_graph

    work = {}
    with torch.device("meta"), torch.no_grad():
        model = ControlLDM(build.config)
        for name, spec in graph_specs(build).items():
            module = build_graph(name, model, build.precision, build.samples)
            shapes = [([steps if dim == STEPS else dim for dim in t.shape], t.dtype) for t in spec.inputs.values()]
            inputs = [torch.empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in shapes]
            with FlopCounterMode(display=False) as counter:
                module(*inputs)
            held = sum(p.numel() * p.element_size() for p in module.parameters())
            work[name] = Work(int(counter.get_total_flops()), held)
    return work


def kind_of(kernel: str) -> str:
    """Which sort of work a kernel does, as far as its name tells."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE)), "other")


def query_card(field: str) -> Optional[str]:
    """One field of `nvidia-smi --query-gpu` for the first card that this process may see; None where there is none."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    return _nvidia_smi(f"--query-gpu={field}", "-i", first)


def _nvidia_smi(*arguments: str) -> Optional[str]:
    command = ["nvidia-smi", *arguments, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def used_mebibytes() -> Optional[float]:
    """Memory of the card that is in use, by whomever; None where nothing tells it."""
    return _as_number(query_card("memory.used"))


def process_mebibytes() -> Optional[float]:
    """Memory of the cards that this process holds as the driver counts it; None where a container hides that."""
    lines = (_nvidia_smi("--query-compute-apps=pid,used_memory") or "").splitlines()
    found = [_as_number(line.split(",")[1]) for line in lines if line.split(",")[0].strip() == str(os.getpid())]
    return sum(value for value in found if value is not None) if found and None not in found else None


def _as_number(text: Optional[str]) -> Optional[float]:
    try:
        return float(text or "")
    except ValueError:  # such as [N/A] or [Insufficient Permissions]
        return None


class Device:
    """The machine as a contender: it tells what it is, and its rates. The options name the device and precision."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._device = str(options["device"])
        self._precision = str(options["precision"])

    def about(self) -> Dict[str, Any]:
        """Names and versions."""
        import torch

        from cldm.machine import available_cores, processor_name

        on_cuda = self._device.startswith("cuda")
        versions = {name: _version(name) for name in ("onnxruntime", "diffusers", "transformers", "triton", "tensorrt")}
        return {
            "device": torch.cuda.get_device_name(self._device) if on_cuda else processor_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(self._device))) if on_cuda else None,
            "driver": query_card("driver_version") if on_cuda else None,
            "torch": torch.__version__,
            "cuda": torch.version.cuda if on_cuda else None,
            "cudnn": torch.backends.cudnn.version() if on_cuda else None,
            "python": platform.python_version(),
            "processor": processor_name(),
            "cores": available_cores(),
            "threads": torch.get_num_threads(),
            **{name: version for name, version in versions.items() if version is not None},
            **torch_settings(),
        }

    def rates(self, rounds: int) -> Dict[str, Any]:
        """Best that the card does here: FLOP/s of a large product, and bytes read and written a second by a copy."""
        from benchmarks.group_norm import copy_bandwidth

        return {"flops_a_second": self._product_rate(rounds), "bytes_a_second": 1e6 * copy_bandwidth(rounds)}

    def _product_rate(self, rounds: int) -> float:
        import torch

        from benchmarks.group_norm import capture, time_in_turn
        from deploy.spec import PRECISIONS

        dtype = getattr(torch, PRECISIONS[self._precision])
        a, b = (torch.randn(CUBE, CUBE, device=self._device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        graph = capture(lambda i: torch.mm(a, b, out=out), PRODUCTS)
        microseconds = time_in_turn({"product": graph}, PRODUCTS, rounds)["product"].median
        return 2.0 * CUBE**3 / (microseconds * 1e-6)


def torch_settings() -> Dict[str, Any]:
    """What PyTorch may do beyond the arithmetic asked for; contenders leave it as it is unless they say so."""
    import torch

    return {
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


def _version(package: str) -> Optional[str]:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def busy_microseconds(intervals: List[Any]) -> float:
    """Length of the union of (start, end) pairs: the time in which at least one kernel runs."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
