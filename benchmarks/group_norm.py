#!/usr/bin/env python3
"""Every distinct GroupNorm of the pipeline: our operator against PyTorch, torch.compile and the speed of a copy.

The list comes from the networks themselves, run on the meta device: how often each norm runs in a step (UNet and
ControlNet, batch 2) and in a decode (batch 1), and whether a SiLU follows and a time bias comes before.

Each candidate is captured as a CUDA graph of many repetitions; the graphs of one norm are replayed in turn, timed with
CUDA events. Maps whose input and output do not fit the L2 cache go through enough buffers to miss it every time; the
floor for them is the bytes read once and written once over the measured speed of a large copy. Smaller ones stay in the
cache, as they do behind a convolution, and the floor is an elementwise kernel of the same size in such a graph.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cldm.machine import available_cores  # noqa: E402

LAYOUTS = ("nhwc", "nchw")
LARGE_MAP = 8 << 20  # bytes; what a map must exceed to be held to the copy's bandwidth
WANTED_LARGE, WANTED_SMALL, WANTED_STEP = 0.8, 1.5, 1.5
GRAPH_MICROSECONDS = 1500.0  # about what one replay of the floor should take: long against the clock's step
BYTES = 2  # fp16
OVERLAP_VARIABLE = "CANNY2IMAGE_GROUP_NORM_OVERLAP"  # of plugins/group_norm_plan.h
STEPS = 20  # of an image, for the order in which norms are compiled
COLUMNS = ("ours", "eager", "compile", "copy")  # those shown with their spread


@dataclasses.dataclass(frozen=True)
class Norm:
    """One distinct GroupNorm."""

    batch: int
    channels: int
    height: int
    width: int
    groups: int
    epsilon: float
    silu: bool
    bias: bool

    @property
    def map_bytes(self) -> int:
        return self.batch * self.channels * self.height * self.width * BYTES

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        around = f"{'silu' if self.silu else '-':<4} {'bias' if self.bias else '-'}"
        return f"{shape:<17} g{self.groups} {self.epsilon:.0e} {around}"


class Counted(NamedTuple):
    norm: Norm
    step: int  # runs a step
    decode: int  # runs a decode


class Spread(NamedTuple):
    """Microseconds a call."""

    median: float
    lowest: float
    highest: float


@dataclasses.dataclass
class Row:
    counted: Counted
    layout: str
    times: Dict[str, Spread]
    floor: float  # microseconds
    floor_is: str  # "copy" or "bandwidth"

    def ratio(self, over: str, under: str) -> Optional[float]:
        both = over in self.times and under in self.times
        return self.times[over].median / self.times[under].median if both else None


# The list of norms.


def count_norms(model: str, height: int, width: int) -> List[Counted]:
    """The distinct GroupNorms of a pipeline for height x width images, the most memory traffic an image first."""
    import torch

    from cldm.config import load_config
    from cldm.model import ControlLDM

    config = load_config(model)
    with torch.device("meta"), torch.no_grad():
        network = ControlLDM(config)
        latent = (config.autoencoder.latent_channels, height // 8, width // 8)
        context = torch.empty(2, 77, config.unet.context_dim)
        hint = torch.empty(2, 3, height, width)
        step = _record(lambda: network.predict_noise(torch.empty(2, *latent), torch.zeros(2), context, hint))
        decode = _record(lambda: network.decode(torch.empty(1, *latent)))
    norms = set(step) | set(decode)
    counted = [Counted(norm, step.count(norm), decode.count(norm)) for norm in norms]
    return sorted(counted, key=lambda c: (-(STEPS * c.step + c.decode) * c.norm.map_bytes, str(c.norm)))


def _record(run: Callable[[], Any]) -> List[Norm]:
    """The GroupNorms that `run` calls, in order."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: List[Tuple[str, Any, Any]] = []  # holds every tensor, so that no identity is given twice

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            calls.append((function.overloadpacket.__name__, args, result))
            return result

    with Recorder():
        run()
    activated = {id(args[0]) for name, args, _ in calls if name == "silu"}
    biased = set()
    for name, args, result in calls:
        if name == "add" and isinstance(args[1], torch.Tensor) and tuple(args[1].shape[2:]) == (1, 1):
            biased.add(id(result))
    return [
        Norm(*args[0].shape, args[6], args[7], id(result[0]) in activated, id(args[0]) in biased)
        for name, args, result in calls
        if name == "native_group_norm"
    ]


def print_list(counted: Sequence[Counted]) -> None:
    print(f"{'N x C x H x W, groups, epsilon, SiLU, bias':<43}{'MiB':>8}{'step':>6}{'decode':>8}")
    for c in counted:
        print(f"{c.norm!s:<43}{c.norm.map_bytes / 2**20:>8.2f}{c.step:>6}{c.decode:>8}")
    steps, decodes = (sum(column) for column in zip(*(c[1:] for c in counted)))
    print(f"{len(counted)} distinct; {steps} run a step, {decodes} a decode")


# The candidates.


def make_tensors(norm: Norm, layout: str, pairs: int) -> Tuple[List[Any], List[Any]]:
    """Inputs, one for each buffer pair, and [gamma, beta, bias or None]; parameters in the type of the data."""
    import torch

    generator = torch.Generator("cuda").manual_seed(1)
    options = {"device": "cuda", "dtype": torch.float16, "generator": generator}
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    shape = (norm.batch, norm.channels, norm.height, norm.width)
    inputs = [torch.randn(shape, **options).to(memory_format=memory_format) for _ in range(pairs)]
    bias = torch.randn((norm.batch, norm.channels), **options) if norm.bias else None
    return inputs, [1 + torch.randn(norm.channels, **options) / 4, torch.randn(norm.channels, **options), bias]


def pytorch_formula(norm: Norm) -> Callable[..., Any]:
    """What the networks do today, for one norm."""
    import torch.nn.functional as F

    def run(x: Any, gamma: Any, beta: Any, bias: Any) -> Any:
        if bias is not None:
            x = x + bias[:, :, None, None]
        y = F.group_norm(x, norm.groups, gamma, beta, norm.epsilon)
        return F.silu(y) if norm.silu else y

    return run


def our_operator(norm: Norm) -> Callable[..., Any]:
    from plugins.torch_operator import group_norm_silu

    activation = "silu" if norm.silu else "none"
    return lambda x, gamma, beta, bias: group_norm_silu(x, gamma, beta, bias, norm.groups, norm.epsilon, activation)


def allow_many_compilations() -> None:
    """All norms share one code object, of which PyTorch would compile 8 forms and then run eager."""
    import torch._dynamo

    for name in ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit", "accumulated_cache_size_limit"):
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, 4096)


def compile_ahead(argv: Sequence[str], workers: int, seconds: float) -> int:
    """Let processes of their own compile the same side by side, for the compiler's cache on disk; how many succeeded.

    Parameters
    ----------
    argv : sequence of str
        This program's arguments.
    workers : int
    seconds : float
        Those that take longer are stopped.
    """
    # Which kernel is the fastest is measured by whoever times them, when nothing else runs.
    environment = {**os.environ, "TORCHINDUCTOR_AUTOTUNE_LOCAL_CACHE": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, __file__, *argv, "--compile-share"]
    running = [
        subprocess.Popen([*command, f"{k}/{workers}"], env=environment, stdout=subprocess.DEVNULL)
        for k in range(workers)
    ]
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end and any(process.poll() is None for process in running):
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
            process.wait()
    return sum(process.returncode == 0 for process in running)


def compile_all(
    jobs: Sequence[Tuple[Counted, str]], mode: str, budget: float
) -> Dict[Tuple[Norm, str], Callable[..., Any]]:
    """Compiled forms of the formula by norm and layout, until `budget` seconds are over."""
    import torch
    from tqdm import tqdm

    allow_many_compilations()
    compiled: Dict[Tuple[Norm, str], Callable[..., Any]] = {}
    start = time.monotonic()
    for counted, layout in tqdm(jobs, desc=f"torch.compile {mode}", mininterval=5):
        if time.monotonic() - start > budget:
            break
        function = torch.compile(pytorch_formula(counted.norm), fullgraph=True, dynamic=False, mode=mode)
        inputs, parameters = make_tensors(counted.norm, layout, 1)
        function(inputs[0], *parameters)
        compiled[counted.norm, layout] = function
    return compiled


# The clock.


def capture(call: Callable[[int], Any], repeats: int) -> Any:
    """A CUDA graph of `repeats` calls; `call` takes the repetition's number."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(3):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repeats):
            call(i)
    return graph


def time_in_turn(graphs: Dict[str, Any], repeats: int, rounds: int) -> Dict[str, Spread]:
    """Microseconds a call of each graph; in every round each graph has its turn, the first two rounds do not count."""
    import torch

    samples: Dict[str, List[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 2):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 2:
                samples[name].append(start.elapsed_time(end) * 1000 / repeats)
    return {name: Spread(statistics.median(s), min(s), max(s)) for name, s in samples.items()}


def keep_outputs(function: Callable[..., Any], inputs: List[Any], parameters: List[Any]) -> Callable[[int], Any]:
    """Call number i, which reads input i and writes the memory that the output of that input had before."""
    outputs: List[Any] = [None] * len(inputs)

    def call(i: int) -> None:
        slot = i % len(inputs)
        outputs[slot] = None
        outputs[slot] = function(inputs[slot], *parameters)

    return call


def copy_bandwidth(rounds: int) -> float:
    """Bytes a microsecond, read and written ones together, of the best of two copies of 1 GiB."""
    import torch

    x = torch.ones(1 << 29, device="cuda", dtype=torch.float16)
    y = torch.empty_like(x)
    graphs = {
        "copy": capture(lambda i: torch.neg(x, out=y), 4),
        "memcpy": capture(lambda i: y.copy_(x), 4),
    }
    times = time_in_turn(graphs, 4, rounds)
    return 2 * x.numel() * BYTES / min(spread.median for spread in times.values())


def measure(
    counted: Counted, layout: str, compiled: Optional[Callable[..., Any]], bandwidth: float, l2: int, rounds: int
) -> Row:
    """Time all candidates of one norm in one layout.

    Raises
    ------
    RuntimeError
        The candidates' results differ by more than fp16 explains.
    """
    import torch

    norm = counted.norm
    traffic = 2 * norm.map_bytes
    fits = traffic <= l2
    pairs = 1 if fits else -(-4 * l2 // traffic)
    repeats = max(2, round(GRAPH_MICROSECONDS / (traffic / bandwidth + 3) / pairs)) * pairs
    inputs, parameters = make_tensors(norm, layout, pairs)
    functions = {"ours": our_operator(norm), "eager": pytorch_formula(norm)}
    if compiled is not None:
        functions["compile"] = compiled
    check_results(norm, layout, functions, inputs[0], parameters)
    graphs = {name: capture(keep_outputs(f, inputs, parameters), repeats) for name, f in functions.items()}
    targets = [torch.empty_like(x) for x in inputs]
    graphs["copy"] = capture(lambda i: torch.neg(inputs[i % pairs], out=targets[i % pairs]), repeats)
    graphs["memcpy"] = capture(lambda i: targets[i % pairs].copy_(inputs[i % pairs]), repeats)
    times = time_in_turn(graphs, repeats, rounds)
    floor = times["copy"].median if fits else traffic / bandwidth
    return Row(counted, layout, times, floor, "copy" if fits else "bandwidth")


def check_results(
    norm: Norm, layout: str, functions: Dict[str, Callable[..., Any]], x: Any, parameters: List[Any]
) -> None:
    """Each candidate against the formula in FP32."""
    wanted = pytorch_formula(norm)(x.float(), *(p if p is None else p.float() for p in parameters))
    for name, function in functions.items():
        error = float((function(x, *parameters).float() - wanted).norm() / wanted.norm())
        if not error < 2e-3:
            raise RuntimeError(f"{norm} {layout}: {name} is off by {error:.1e} (relative)")


# The report.


def print_rows(rows: Sequence[Row]) -> None:
    print(f"{'norm':<43}{'':>5}{'step':>5}{'dec':>4}", end="")
    print("".join(f"{name + ', us':>25}" for name in COLUMNS), end="")
    print(f"{'memcpy':>8}{'floor':>9}{'  of':<10}{'floor/ours':>11}{'compile/ours':>13}")
    for row in rows:
        cells = ""
        for name in COLUMNS:
            spread = row.times.get(name)
            text = "-" if spread is None else f"{spread.median:.2f} ({spread.lowest:.2f}-{spread.highest:.2f})"
            cells += f"{text:>25}"
        gain = row.ratio("compile", "ours")
        print(
            f"{row.counted.norm!s:<43}{row.layout:>5}{row.counted.step:>5}{row.counted.decode:>4}{cells}"
            f"{row.times['memcpy'].median:>8.2f}{row.floor:>9.2f}  {row.floor_is:<10}"
            f"{row.floor / row.times['ours'].median:>9.2f}{'-' if gain is None else f'{gain:.2f}':>13}"
        )


def sums(rows: Sequence[Row]) -> List[Dict[str, Any]]:
    """Microseconds a step and a decode by layout; `compared` says how many runs have a compiled form to compare."""
    result = []
    for layout in LAYOUTS:
        for part in ("step", "decode"):
            mine = [(getattr(row.counted, part), row) for row in rows if row.layout == layout]
            both = [(n, row) for n, row in mine if "compile" in row.times]
            entry: Dict[str, Any] = {"layout": layout, "part": part, "runs": sum(n for n, _ in mine)}
            entry["compared"] = sum(n for n, _ in both)
            for name in ("ours", "eager"):
                entry[name] = sum(n * row.times[name].median for n, row in mine)
            entry["floor"] = sum(n * row.floor for n, row in mine)
            entry["compile"] = sum(n * row.times["compile"].median for n, row in both)
            entry["ours_where_compared"] = sum(n * row.times["ours"].median for n, row in both)
            result.append(entry)
    return result


def judge(rows: Sequence[Row], totals: Sequence[Dict[str, Any]], tolerance: float) -> List[Dict[str, Any]]:
    """What was wanted, what was found, and whether it is met."""
    large = [row.floor / row.times["ours"].median for row in rows if row.counted.norm.map_bytes > LARGE_MAP]
    small = [row.times["ours"].median / row.floor for row in rows if row.counted.norm.map_bytes <= LARGE_MAP]
    gains = [gain for gain in (row.ratio("compile", "ours") for row in rows) if gain is not None]
    whole = len(gains) == len(rows)
    found = [
        (f"maps over 8 MiB reach {WANTED_LARGE} of the copy's speed; worst", min(large, default=0.0), WANTED_LARGE, 1),
        (
            f"smaller maps take at most {WANTED_SMALL} of the copy kernel; worst",
            max(small, default=0.0),
            WANTED_SMALL,
            -1,
        ),
        (
            f"never slower than torch.compile ({tolerance:.0%} for noise); worst",
            min(gains, default=0.0),
            1 - tolerance,
            1,
        ),
    ]
    for entry in totals:
        if entry["part"] == "step":
            gain = entry["compile"] / entry["ours_where_compared"] if entry["compared"] else 0.0
            found.append((f"torch.compile over ours in a step, {entry['layout']}", gain, WANTED_STEP, 1))
    result = []
    for text, value, bound, sign in found:
        met = sign * value >= sign * bound
        if "torch.compile" in text and not whole:
            text += f" (only {len(gains)} of {len(rows)} compiled)"
        result.append({"wanted": text, "found": value, "bound": bound, "met": met})
    return result


def print_summary(totals: Sequence[Dict[str, Any]], judged: Sequence[Dict[str, Any]]) -> None:
    names = ("ours", "eager", "floor", "compile", "ours_where_compared")
    print(f"\n{'sums, us':<14}{'runs':>6}" + "".join(f"{name:>21}" for name in names) + f"{'compared':>10}")
    for entry in totals:
        cells = "".join(f"{entry[name]:>21.1f}" for name in names)
        print(f"{entry['part'] + ' ' + entry['layout']:<14}{entry['runs']:>6}{cells}{entry['compared']:>10}")
    print()
    for entry in judged:
        verdict = "met    " if entry["met"] else "NOT MET"
        print(f"{verdict} {entry['wanted']}: {entry['found']:.2f} (bound {entry['bound']:.2f})")


def as_json(rows: Sequence[Row]) -> List[Dict[str, Any]]:
    return [
        {
            **dataclasses.asdict(row.counted.norm),
            "step": row.counted.step,
            "decode": row.counted.decode,
            "layout": row.layout,
            "floor": row.floor,
            "floor_is": row.floor_is,
            "microseconds": {name: spread._asdict() for name, spread in row.times.items()},
        }
        for row in rows
    ]


def parse_arguments(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sd15")
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--limit", type=int, help="only so many norms, the most memory traffic first")
    parser.add_argument("--rounds", type=int, default=11, help="timed replays of each graph")
    parser.add_argument(
        "--compile-mode", default="max-autotune-no-cudagraphs", help="of torch.compile; none: leave out"
    )
    parser.add_argument("--compile-budget", type=float, default=150, help="seconds; norms left then are not compared")
    parser.add_argument(
        "--compile-workers",
        type=int,
        default=min(12, available_cores()),
        help="processes that compile ahead, side by side; 1: none (default: cores, at most 12)",
    )
    parser.add_argument("--tolerance", type=float, default=0.02, help="by how much ours may be slower than compiled")
    parser.add_argument(
        "--no-overlap", action="store_true", help="our kernels begin only when the one ahead has ended, as others do"
    )
    parser.add_argument("--output", type=Path, help="JSON file for all numbers")
    parser.add_argument("--shapes-only", action="store_true", help="print the list of norms; needs no GPU")
    parser.add_argument("--compile-share", metavar="K/N", help=argparse.SUPPRESS)  # only compile every N-th norm
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    return args


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_arguments(argv)
    counted = count_norms(args.model, args.height, args.width)[: args.limit]
    print_list(counted)
    if args.shapes_only:
        return 0
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device; --shapes-only runs without one", file=sys.stderr)
        return 1
    jobs = [(c, layout) for c in counted for layout in args.layouts]
    with torch.no_grad():
        if args.compile_share is not None:
            k, n = (int(number) for number in args.compile_share.split("/"))
            compile_all(jobs[k::n], args.compile_mode, args.compile_budget)
            return 0
        return benchmark(args, jobs)


def benchmark(args: argparse.Namespace, jobs: Sequence[Tuple[Counted, str]]) -> int:
    import torch
    from tqdm import tqdm

    from cldm.files import write_json
    from plugins import torch_operator

    start = time.monotonic()
    if args.no_overlap:
        os.environ[OVERLAP_VARIABLE] = "0"  # looked at on the first launch
    torch_operator.load()  # a missing compiler is said before the long part
    properties = torch.cuda.get_device_properties(0)
    l2 = getattr(properties, "L2_cache_size", 50 << 20)
    bandwidth = copy_bandwidth(args.rounds)
    about = {
        "device": properties.name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "l2_bytes": l2,
        "copy_bytes_a_second": bandwidth * 1e6,
        "rounds": args.rounds,
        "compile_mode": args.compile_mode,
        "overlap": os.environ.get(OVERLAP_VARIABLE) != "0",
    }
    compiled: Dict[Tuple[Norm, str], Callable[..., Any]] = {}
    if args.compile_mode != "none":
        begin = time.monotonic()
        if args.compile_workers > 1:
            done = compile_ahead(args.argv, args.compile_workers, args.compile_budget / 2)
            print(f"compiled ahead by {done} of {args.compile_workers} processes")
        left = args.compile_budget - (time.monotonic() - begin)
        compiled = compile_all(jobs, args.compile_mode, left)
        about["compile_seconds"] = time.monotonic() - begin
    rows = [
        measure(c, layout, compiled.get((c.norm, layout)), bandwidth, l2, args.rounds)
        for c, layout in tqdm(jobs, desc="timing", mininterval=5)
    ]
    about["seconds"] = time.monotonic() - start
    totals = sums(rows)
    judged = judge(rows, totals, args.tolerance)
    print(
        f"\n{about['device']}, torch {about['torch']}, CUDA {about['cuda']}, fp16 data and parameters; copy of 1 GiB"
        f" {bandwidth / 1e6:.2f} TB/s, L2 {l2 / 2**20:.0f} MiB; CUDA graphs in turn, 2 warm-up replays, median of"
        f" {args.rounds} (lowest-highest); {len(compiled)} of {len(jobs)} compiled in"
        f" {about.get('compile_seconds', 0):.0f} s; {about['seconds']:.0f} s in all; our launches"
        f" {'may overlap the one ahead' if about['overlap'] else 'wait for the end of the one ahead'}"
    )
    print_rows(rows)
    print_summary(totals, judged)
    if args.output is not None:
        write_json(args.output, {"about": about, "rows": as_json(rows), "sums": totals, "wanted": judged})
    return 0


if __name__ == "__main__":
    sys.exit(main())
