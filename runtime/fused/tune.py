"""Times the candidates of each problem on the GPU at hand.

A measurement is a CUDA graph of launches that each read other weights, as the layers of a network do: weights that an
earlier launch left in the cache would make every candidate look faster than it is.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import torch
import triton

from cldm.machine import available_cores
from runtime.fused.ops import Fused, Scaling, Weights
from runtime.fused.tuning import (
    AttentionConfig,
    AttentionProblem,
    Card,
    Config,
    Problem,
    attention_candidates,
    candidates,
)

# More than any card's L2 cache, so that weights come from memory.
POOL_BYTES = 192 << 20
MOST_LAUNCHES = 16
# The version whose Gluon the kernels for compute capability 9.0 are written in.
GLUON_TRITON = "3.6."
REPLAYS = 4
NETWORK_REPLAYS = 14
# Of a network's time; less is not told from chance.
LEAST_GAIN = 0.001

Report = Callable[[str], None]
Launch = Callable[[], Any]


def card_of(device: str) -> Card:
    """What the tuning needs to know of a CUDA device."""
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", 99 * 1024)
    capability = 10 * found.major + found.minor
    # Gluon's interface still changes with each version of Triton; the other kernel runs on all.
    boxes = capability == 90 and triton.__version__.startswith(GLUON_TRITON)
    return Card(found.name, capability, found.multi_processor_count, shared, boxes)


class Bench:
    """Random operands and a stopwatch.

    Parameters
    ----------
    run : Fused
    device : str
    """

    def __init__(self, run: Fused, device: str) -> None:
        self.run = run
        self.device = device
        self.pool = self.random(POOL_BYTES // 2)

    @cached_property
    def pool_fp8(self) -> torch.Tensor:
        """As many numbers, half the bytes."""
        return self.pool.to(torch.float8_e4m3fn)

    def random(self, *shape: int) -> torch.Tensor:
        """Of the maps' type; zeros would be multiplied faster than real numbers."""
        return torch.randn(shape, device=self.device).to(self.run.dtype)

    def products(self, problem: Problem, shape: Tuple[int, ...]) -> List[Callable[[Config], Any]]:
        """A launch for each set of weights that fits the pool; `shape` is the input map's."""
        x = self.random(*shape)
        pool = self.pool_fp8 if problem.fp8 else self.pool
        rows = problem.n * (2 if problem.gated else 1)
        size = problem.nets * rows * problem.depth
        count = max(2, min(MOST_LAUNCHES, self.pool.numel() // size))
        step = (self.pool.numel() - size) // (count - 1) // 64 * 64
        bias = torch.randn(problem.nets, rows, device=self.device)
        scale, nets = (2, 1) if problem.taps == 4 else (1, problem.nets)
        out = self.random(nets, shape[1], scale * problem.height, scale * problem.width, problem.n)
        tail = self.random(*out.shape[:4], problem.tail) if problem.tail else None
        launches = []
        for i in range(count):
            matrix = pool[i * step : i * step + size].view(problem.nets, rows, problem.depth)
            scaling = None
            if problem.fp8:
                scaling = Scaling(torch.ones_like(bias), 1.0)
            weights = Weights(matrix, bias, problem.taps, problem.tail, problem.stride, problem.gated, fp8=scaling)

            def launch(config: Config, weights: Weights = weights) -> None:
                self.run.matmul(x, weights, out, tail=tail, config=config)

            launches.append(launch)
        return launches

    def attentions(self, problem: AttentionProblem) -> List[Callable[[AttentionConfig], Any]]:
        channels = problem.heads * problem.dim
        q = self.random(1, problem.images, 1, problem.length, channels)
        k, v = (self.random(1, problem.images, problem.keys, channels) for _ in range(2))

        def launch(config: AttentionConfig) -> None:
            self.run.attention(q, k, v, problem.heads, problem.causal, config=config)

        return [launch] * MOST_LAUNCHES

    def milliseconds(self, launches: Sequence[Launch]) -> float:
        """Time of one of the launches, the least of some replays."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in launches:
                launch()
        return min(_replay_times(graph, REPLAYS)[1:]) / len(launches)


class _Question:
    """A problem with its candidates and what launches them."""

    def __init__(self, key: str, work: int, configs: Sequence[Any], launches: Sequence[Callable[[Any], Any]]) -> None:
        self.key = key
        self.work = work
        self.configs = list(configs)
        self.launches = list(launches)


def tune(
    run: Fused,
    problems: Mapping[Problem, Tuple[int, ...]],
    attentions: Iterable[AttentionProblem],
    device: str,
    report: Report,
    seconds: float = 600.0,
) -> Dict[str, Dict[Tuple[int, ...], float]]:
    """Milliseconds of each candidate of each problem, by the problem's key, the fastest first.

    Parameters
    ----------
    run : Fused
        Its tuning says which card this is.
    problems : mapping of Problem to the shape of its input
    attentions : AttentionProblems
    device : str
    report : callable
        Takes lines of progress.
    seconds : float
        After this time the problems that are left, the smallest, are left out.
    """
    card, begin = run.tuning.card, time.perf_counter()
    bench = Bench(run, device)
    questions = [
        _Question(problem.key(), problem.flops, candidates(problem, card), bench.products(problem, shape))
        for problem, shape in problems.items()
    ]
    for attention in attentions:
        work = 4 * attention.images * attention.heads * attention.length * attention.keys * attention.dim
        questions.append(
            _Question(attention.key(), work, attention_candidates(attention, card), bench.attentions(attention))
        )
    questions.sort(key=lambda question: -question.work)
    count = sum(len(question.configs) for question in questions)
    report(f"tuning {len(questions)} kernels' tile sizes for {card.name}: {count} candidates, some minutes, once")
    # Where a candidate fails is seen when it is timed.
    run_all(
        (
            lambda launch=question.launches[0], config=config: launch(config)
            for question in questions
            for config in question.configs
        ),
        device,
    )
    torch.cuda.synchronize(device)
    found: Dict[str, Dict[Tuple[int, ...], float]] = {}
    told = time.perf_counter()
    for i, question in enumerate(questions):
        now = time.perf_counter()
        if now - begin > seconds:
            report(f"tuning: out of time, {len(questions) - i} problems keep estimates")
            break
        if now - told > 10:
            report(f"tuning: {i} of {len(questions)}, {now - begin:.0f} s")
            told = now
        times = _times(bench, question)
        if times:
            found[question.key] = times
    report(f"tuned in {time.perf_counter() - begin:.0f} s")
    return found


def refine(
    runs: Sequence[Fused],
    enqueue: Callable[[], None],
    ranked: Mapping[str, Sequence[Tuple[int, ...]]],
    weights: Mapping[str, float],
    device: str,
    report: Report,
    seconds: float = 120.0,
) -> float:
    """Choose among the best candidates of each problem by the time of the whole network; its milliseconds.

    Alone a kernel begins with an idle card and others' weights in the cache. In its network the kernel before is still
    at work, and part of its own weights has been fetched ahead. The tuning's table is changed in place.

    Parameters
    ----------
    runs : sequence of Fused
        What the network launches with; they have one tuning.
    enqueue : callable
        Launches the network once.
    ranked : mapping
        Candidates of each problem's key, the first one is where the search begins.
    weights : mapping
        What of the network's time each problem is about, to look at the largest first.
    device : str
    report : callable
        Takes lines of progress.
    seconds : float
        After this time the problems that are left keep their first candidate.
    """
    table, begin = runs[0].tuning.table, time.perf_counter()
    _compile_all(runs, enqueue, ranked, device)
    table.update({key: list(configs[0]) for key, configs in ranked.items() if configs})
    best = _captured(enqueue)
    start = told = _median(best)
    for i, key in enumerate(sorted(ranked, key=lambda key: -weights.get(key, 0.0))):
        if time.perf_counter() - begin > seconds:
            report(f"tuning: out of time, {len(ranked) - i} problems are as they were alone")
            break
        before = best
        for config in ranked[key][1:]:
            kept = table[key]
            table[key] = list(config)
            graph = _captured_or_none(enqueue)
            # Twice, as one of many measurements is always lucky.
            if graph is not None and _is_faster(graph, best) and _is_faster(graph, best):
                best = graph
            else:
                table[key] = kept
        now = told if best is before else _median(best)
        if told - now > 0.02 * start:
            report(f"tuning in place: {start:.3f} to {now:.3f} ms after {i + 1} of {len(ranked)} problems")
            told = now
    end = _median(best)
    report(f"tuned in place in {time.perf_counter() - begin:.0f} s: {start:.3f} to {end:.3f} ms")
    return end


def _compile_all(
    runs: Sequence[Fused], enqueue: Callable[[], None], ranked: Mapping[str, Sequence[Tuple[int, ...]]], device: str
) -> None:
    """Several at a time; one that cannot be compiled is found out when it is timed."""
    table = runs[0].tuning.table
    for place in range(max((len(configs) for configs in ranked.values()), default=0)):
        table.update({key: list(configs[place]) for key, configs in ranked.items() if place < len(configs)})
        with contextlib.ExitStack() as stack:
            launches = [stack.enter_context(run.putting_off()) for run in runs]
            enqueue()
        run_all([launch for of_run in launches for launch in of_run.values()], device)
    torch.cuda.synchronize(device)


def _captured(enqueue: Callable[[], None]) -> torch.cuda.CUDAGraph:
    enqueue()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        enqueue()
    return graph


def _captured_or_none(enqueue: Callable[[], None]) -> Optional[torch.cuda.CUDAGraph]:
    try:
        return _captured(enqueue)
    except Exception:  # as in `_failure`
        return None


def _median(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of a replay."""
    return statistics.median(_replay_times(graph, NETWORK_REPLAYS)[2:])


def _is_faster(graph: torch.cuda.CUDAGraph, than: torch.cuda.CUDAGraph) -> bool:
    """By more than noise; replayed in turns, as clocks drift by more than most candidates differ."""
    times: Tuple[List[float], List[float]] = ([], [])
    for _ in range(NETWORK_REPLAYS):
        for one, of_one in zip((graph, than), times):
            of_one += _replay_times(one, 1)
    return statistics.median(times[0]) < (1 - LEAST_GAIN) * statistics.median(times[1])


def _replay_times(graph: torch.cuda.CUDAGraph, count: int) -> List[float]:
    """Milliseconds of each of some replays, one after the other."""
    times = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def _times(bench: Bench, question: _Question) -> Dict[Tuple[int, ...], float]:
    times = {}
    for config in question.configs:
        launches = [lambda launch=launch, config=config: launch(config) for launch in question.launches]
        if _failure(launches[0]) is None:
            times[tuple(config)] = bench.milliseconds(launches)
    return dict(sorted(times.items(), key=lambda item: item[1]))


def _failure(launch: Launch) -> Optional[Exception]:
    """What a launch raised. A tile that a compiler or a card cannot take is no candidate; that is all it means."""
    try:
        launch()
    except Exception as error:  # Triton's errors have no common base
        return error
    return None


def run_all(launches: Iterable[Launch], device: str) -> List[Exception]:
    """Launch several at a time, so that the compilers work side by side; what was raised."""

    given = torch.device(device).index
    index = torch.cuda.current_device() if given is None else given

    def begin() -> None:
        # A new thread has no CUDA context until the runtime is used, and Triton's calls of the driver do not make one.
        torch.cuda.set_device(index)
        torch.zeros(1, device=index)

    with ThreadPoolExecutor(min(16, max(1, available_cores())), initializer=begin) as pool:
        return [error for error in pool.map(_failure, launches) if error is not None]
