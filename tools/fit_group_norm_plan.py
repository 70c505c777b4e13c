#!/usr/bin/env python3
"""Fit the estimates by which the GroupNorm kernels choose how to cut a call into blocks to the times of a GPU.

    bash benchmarks/group_norm_gpu.sh build/group_norm_logs          # on the GPU: times every plan of sd15's norms
    python3 tools/fit_group_norm_plan.py build/group_norm_logs/plans.csv

Prints the constants for plugins/group_norm_plan.h, which go in the place of those there, and how much longer than the
fastest plans those take that they choose: of the norms that they are fitted to, and of norms left out of the fit. A
new GPU wants it: the constants in the header are of one H200.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file, Python's path begins with tools/
    sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from environment import ensure_environment

    ensure_environment(["numpy", "scipy"])

import numpy as np  # noqa: E402
from scipy.optimize import minimize, nnls  # noqa: E402

# The planner's enumerations, as numbers in the table.
RUN, COLUMNS, SLICES = range(3)
HELD, GRID, PAIR = range(3)
HELD_NAMES = ("start", "cluster", "clusterDouble", "kilobyte", "step", "items", "threads", "rows", "blocks")
PAIR_NAMES = ("start", "kilobyte", "rows", "held", "step", "items", "merge", "threads")
GRID_NAMES = ("start", "kilobyte", "items", "merge")
# Of (shape, stage): the struct, the constant and the names of its members in group_norm_plan.h.
KINDS = {
    (RUN, HELD): ("HeldCost", "kHeldRun", HELD_NAMES),
    (COLUMNS, HELD): ("HeldCost", "kHeldColumns", HELD_NAMES),
    (SLICES, HELD): ("HeldCost", "kHeldSlices", HELD_NAMES),
    (RUN, PAIR): ("PairCost", "kPairRun", PAIR_NAMES),
    (COLUMNS, PAIR): ("PairCost", "kPairColumns", PAIR_NAMES),
    (RUN, GRID): ("GridCost", "kGridRun", GRID_NAMES),
    (COLUMNS, GRID): ("GridCost", "kGridColumns", GRID_NAMES),
}
# What the table does not tell, as sd15's norms are timed and as the planner has it.
GROUPS = 32
ELEMENT_BYTES = 2
WARP = 32
REGISTERS = {RUN: (48, 96), COLUMNS: (72, 120), SLICES: (56, 104)}  # of a thread, with few packs and with many
# How far, as a logarithm, an estimate may be above the least one and its plan still count as chosen, step by step: wide
# at first, so that all of the fast plans pull, at last about as narrow as two runs' times differ.
SOFTNESS = (0.2, 0.1, 0.05, 0.03)
# Of the estimates' mean squared error against the mean loss of time, as logarithms: without it constants choose well
# among the plans timed and mean little for others.
ERROR_WEIGHT = 0.2
SLOW = 0.3  # a plan that takes exp(SLOW) times as long as the fastest weighs half as much in that error
LEAST_ESTIMATE = 1e-3  # microseconds; has a logarithm
FOLDS = 5

Kind = Tuple[int, int]
Norm = Tuple[int, int, int, str]


class TableError(ValueError):
    """The table of times cannot be used; says why and what to do."""


@dataclass(frozen=True)
class Timing:
    """One plan of one norm, and how long it took: a line of the table, under its columns' names.

    Sizes are in elements, `shared_bytes` (of a block) and `shared_limit` (the most that a kernel may ask for) in bytes.
    """

    batch: int
    channels: int
    pixels: int
    layout: str
    shape: int
    vector: int
    stage: int
    bundle: int
    tiles: int
    threads: int
    packs: int
    units: int
    units_per_launch: int
    chunk: int
    rows: int
    shared_bytes: int
    overlap: int
    processors: int
    shared_limit: int
    median_us: float

    @property
    def norm(self) -> Norm:
        return self.batch, self.channels, self.pixels, self.layout

    @property
    def kind(self) -> Kind:
        return self.shape, self.stage

    def __str__(self) -> str:
        shape, stage = ("run", "columns", "slices")[self.shape], ("held", "grid", "two kernels")[self.stage]
        text = f"{shape}, {stage}, {self.tiles} tiles, {self.threads} threads, {self.packs} packs of {self.vector}"
        return text if self.shape == RUN else f"{text}, {self.bundle} channels"


def read_timings(path: Path) -> List[Timing]:
    """The table that `kernel_check --plans` wrote, without the plans that the planner would not take.

    Launches that may overlap always do; timed apart, they count only where the device has no overlap.

    Raises
    ------
    TableError
        A column is missing, a value is wrong, or there is nothing to fit to.
    OSError
        The file cannot be read.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [field.name for field in fields(Timing) if field.name not in (reader.fieldnames or ())]
        if missing:
            raise TableError(
                f"{path} has no column {', '.join(missing)}: make it anew with `kernel_check --plans {path}` as built"
                " from the present sources"
            )
        timings = [_parse(line, f"{path}, line {reader.line_num}") for line in reader]
    if not timings:
        raise TableError(f"{path} holds no times: `kernel_check --plans {path}` did not run to its end")
    overlapping = {timing.norm for timing in timings if timing.overlap}
    return [timing for timing in timings if timing.overlap or timing.stage == GRID or timing.norm not in overlapping]


def _parse(line: Dict[str, Optional[str]], where: str) -> Timing:
    converters = {"int": int, "float": float, "str": str}
    values = {}
    for field in fields(Timing):
        text = line[field.name]
        try:
            values[field.name] = converters[str(field.type)]("" if text is None else text)
        except ValueError:
            raise TableError(
                f"{where}: {field.name} is {text!r}, no number; where the run was stopped there, delete the line"
            ) from None
    timing = Timing(**values)
    if timing.kind not in KINDS:
        raise TableError(f"{where}: the planner makes no plan of shape {timing.shape} and stage {timing.stage}")
    positive = [timing.batch, timing.pixels, timing.vector, timing.tiles, timing.threads, timing.units, timing.chunk]
    positive += [timing.processors, timing.shared_limit, timing.units_per_launch if timing.stage == GRID else 1]
    positive += [1, 1] if timing.shape == RUN else [timing.rows, timing.bundle]
    if min(positive) < 1 or timing.channels < GROUPS or timing.channels % GROUPS:
        raise TableError(f"{where}: these sizes are of no plan for {GROUPS} groups")
    if not 0 < timing.median_us < float("inf"):
        raise TableError(f"{where}: a time of {timing.median_us} us")
    return timing


def features(t: Timing) -> Tuple[float, ...]:
    """What each constant of the plan's kind is multiplied by in its estimate.

    The same arithmetic as loadOf, heldCost, pairCost and gridCost of plugins/group_norm_plan.h, for FP16.
    """
    group_channels = t.channels // GROUPS
    groups = t.bundle // group_channels if t.shape == COLUMNS else 1
    rounds = _ceil(groups, t.threads // WARP)
    waves, blocks = (1, 1) if t.stage == GRID else _occupancy(t)
    kilobytes = blocks * t.chunk * (t.vector if t.shape == RUN else t.bundle) * ELEMENT_BYTES / 1000
    steps = _ceil(t.chunk, t.threads if t.shape == RUN else t.rows)
    items = 0
    if t.shape == COLUMNS:
        items = _ceil(t.rows * (group_channels // _common_width(group_channels, t.vector)), WARP) * rounds
    threads = t.threads / 256
    rows = 0.0 if t.shape == RUN else blocks * t.chunk / 1000
    if t.stage == HELD:
        doubled = (t.tiles > 2) + (t.tiles > 4)
        on_each = (kilobytes, steps, items, threads, rows, blocks)
        return (1, t.tiles > 1, doubled, *(waves * value for value in on_each))
    if t.stage == GRID:
        launches = _ceil(t.units, t.units_per_launch)
        return tuple(launches * value for value in (1, kilobytes, items, t.tiles * rounds / WARP))
    share = t.batch * t.channels * t.pixels * ELEMENT_BYTES / 1000 / t.processors
    on_each = (kilobytes, steps, items, _ceil(t.tiles, WARP) * rounds, threads)
    return (1, share, share * rows / kilobytes, *(waves * value for value in on_each))


def _occupancy(t: Timing) -> Tuple[int, int]:
    """How many waves of blocks there are, and how many blocks an SM has at once."""
    few = 8 if t.shape == SLICES and t.vector * ELEMENT_BYTES < 16 else 4
    by_registers = 65536 // (REGISTERS[t.shape][t.packs > few] * t.threads)
    by_shared = t.shared_limit // (t.shared_bytes + 2048)
    resident = min(max(by_registers, 1), max(by_shared, 1), 32)
    # Clusters of four and eight leave some SMs of each processing cluster idle.
    processors = max(t.processors * 9 // 10, 1) if t.stage == HELD and t.tiles > 2 else t.processors
    num_blocks = t.units * t.tiles
    return _ceil(num_blocks, processors * resident), min(resident, _ceil(num_blocks, processors))


def _common_width(group_channels: int, most: int) -> int:
    while group_channels % most:
        most //= 2
    return most


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Choice:
    """Of one norm: the plan with the least estimate, in microseconds, and the fastest."""

    chosen: Timing
    estimate: float
    fastest: Timing

    @property
    def ratio(self) -> float:
        return self.chosen.median_us / self.fastest.median_us


def mean_ratio(choices: Sequence[Choice]) -> float:
    """Of the time of the plan chosen and the fastest one's, the mean over norms: 1 is best."""
    return float(np.mean([choice.ratio for choice in choices]))


@dataclass(frozen=True)
class Fit:
    """Constants by kind of plan, none negative, with three decimals; and what they choose for each norm.

    `error` is that of the estimates: the root of the mean squared logarithm of estimate / time, where slow plans weigh
    little.
    """

    constants: Dict[Kind, np.ndarray]
    choices: List[Choice]
    error: float


class _Table:
    """The plans of a table as one linear problem: all kinds' constants in one vector, `spans` says which are whose."""

    def __init__(self, timings: Sequence[Timing]) -> None:
        norms = _by_norm(timings)
        self.timings = [timing for members in norms for timing in members]
        rows = [features(timing) for timing in self.timings]
        widths = {timing.kind: len(row) for timing, row in zip(self.timings, rows)}
        ends = np.cumsum(list(widths.values()))
        self.spans = {kind: slice(end - width, end) for (kind, width), end in zip(widths.items(), ends)}
        self.matrix = np.zeros((len(rows), ends[-1]))
        for i, (timing, row) in enumerate(zip(self.timings, rows)):
            self.matrix[i, self.spans[timing.kind]] = row
        self.times = np.array([timing.median_us for timing in self.timings])
        sizes = [len(members) for members in norms]
        self.starts = np.cumsum([0, *sizes[:-1]])  # of the norms
        self.norm = np.repeat(np.arange(len(norms)), sizes)
        self.loss = np.log(self.times / np.minimum.reduceat(self.times, self.starts)[self.norm])
        weights = 1 / (1 + (self.loss / SLOW) ** 2)
        # Each norm's sum is the same: there are far more plans for NHWC.
        self.weights = weights / np.add.reduceat(weights, self.starts)[self.norm] / len(norms)

    def least_squares(self) -> np.ndarray:
        """Constants of the least relative errors."""
        values = np.zeros(self.matrix.shape[1])
        scale = np.sqrt(self.weights)
        for kind, span in self.spans.items():
            own = [timing.kind == kind for timing in self.timings]
            values[span], _ = nnls(self.matrix[own, span] * (scale / self.times)[own, None], scale[own])
        return values

    def objective(self, values: np.ndarray) -> float:
        """The loss of time by the plans of the least estimates, and the estimates' error."""
        estimates = self.matrix @ values
        members = np.split(estimates, self.starts[1:])
        chosen = self.starts + [int(np.argmin(each)) for each in members]
        return float(self.loss[chosen].mean()) + ERROR_WEIGHT * self.error(values) ** 2

    def error(self, values: np.ndarray) -> float:
        logarithms = np.log(np.maximum(self.matrix @ values, LEAST_ESTIMATE) / self.times)
        return float(np.sqrt(self.weights @ logarithms**2))

    def softened(self, values: np.ndarray, softness: float) -> Tuple[float, np.ndarray]:
        """The objective, and its gradient, were plans chosen by chance: the likelier, the lower their estimates.

        The chances are those of a softmax of -log(estimate) / softness among a norm's plans.
        """
        estimates = np.maximum(self.matrix @ values, LEAST_ESTIMATE)
        scores = -np.log(estimates) / softness
        chances = np.exp(scores - np.maximum.reduceat(scores, self.starts)[self.norm])
        chances /= np.add.reduceat(chances, self.starts)[self.norm]
        losses = np.add.reduceat(chances * self.loss, self.starts)
        errors = np.log(estimates / self.times)
        value = losses.mean() + ERROR_WEIGHT * (self.weights @ errors**2)
        by_logarithm = chances * (losses[self.norm] - self.loss) / (softness * len(losses))
        by_logarithm += 2 * ERROR_WEIGHT * self.weights * errors
        return float(value), self.matrix.T @ (by_logarithm / estimates)


def fit(timings: Sequence[Timing], softness: Sequence[float] = SOFTNESS) -> Fit:
    """Constants that choose well, and whose estimates are not far off.

    The fit starts from non-negative least squares, which weighs errors that change no choice like those that do. From
    there it descends on the loss of time by the choices, which are softened for the sake of a gradient and become sharp
    step by step. Of each step's constants, as rounded, those are kept that choose best by the sharp rule.
    """
    table = _Table(timings)
    values = table.least_squares()
    found = [np.round(values, 3)]
    for each in softness:
        bounds = [(0, None)] * len(values)
        options = {"maxiter": 300, "maxfun": 600}
        values = minimize(table.softened, values, (each,), "L-BFGS-B", jac=True, bounds=bounds, options=options).x
        found.append(np.round(values, 3))
    best = min(found, key=table.objective)
    constants = {kind: best[span] for kind, span in table.spans.items()}
    return Fit(constants, choose(timings, constants), table.error(best))


def choose(timings: Sequence[Timing], constants: Dict[Kind, np.ndarray]) -> List[Choice]:
    """What these constants choose for each norm; plans of a kind without constants are not chosen."""
    choices = []
    for members in _by_norm(timings):
        estimates = [
            float(np.dot(features(timing), constants[timing.kind])) if timing.kind in constants else np.inf
            for timing in members
        ]
        chosen = int(np.argmin(estimates))
        fastest = min(members, key=lambda timing: timing.median_us)
        choices.append(Choice(members[chosen], estimates[chosen], fastest))
    return choices


def held_out(timings: Sequence[Timing], folds: int = FOLDS) -> List[Choice]:
    """What constants choose for norms that they are not fitted to: every fifth size, in both layouts, left out in turn.

    Raises
    ------
    TableError
        The table has fewer sizes than folds.
    """
    sizes = list(dict.fromkeys(timing.norm[:3] for timing in timings))
    if len(sizes) < folds:
        raise TableError(f"{len(sizes)} sizes: at least {folds} are wanted to leave one in {folds} out")
    choices: List[Choice] = []
    for fold in range(folds):
        left = set(sizes[fold::folds])
        rest = fit([timing for timing in timings if timing.norm[:3] not in left])
        choices += choose([timing for timing in timings if timing.norm[:3] in left], rest.constants)
    return choices


def _by_norm(timings: Sequence[Timing]) -> List[List[Timing]]:
    norms: Dict[Norm, List[Timing]] = {}
    for timing in timings:
        norms.setdefault(timing.norm, []).append(timing)
    return list(norms.values())


def describe(result: Fit, slowest: int = 5) -> str:
    """The lines for group_norm_plan.h, then how good the choices are, with the worst of them."""
    lines = []
    for kind, (struct, name, members) in KINDS.items():
        if kind in result.constants:
            lines.append(
                f"constexpr {struct} {name}{{{', '.join(f'{value:.3f}' for value in result.constants[kind])}}};"
            )
        else:
            lines.append(f"// {name}: no such plan was timed; leave its {len(members)} constants as they are.")
    lines += ["", _summary(result.choices)]
    layouts = sorted({choice.chosen.layout for choice in result.choices})
    for layout in layouts if len(layouts) > 1 else []:
        lines.append(f"of these {_summary([one for one in result.choices if one.chosen.layout == layout], layout)}")
    lines.append(f"the estimates are {100 * result.error:.0f} % off (root mean square, slow plans weigh little)")
    ordered = sorted(result.choices, key=lambda choice: -choice.ratio)
    for choice in ordered[:slowest]:
        batch, channels, pixels, layout = choice.chosen.norm
        lines.append(
            f"{choice.ratio:.2f} x  {batch} x {channels} x {pixels} {layout}: chosen {choice.chosen.median_us:.2f} us"
            f" ({choice.chosen}; estimate {choice.estimate:.2f}), fastest {choice.fastest.median_us:.2f} us"
            f" ({choice.fastest})"
        )
    return "\n".join(lines)


def _summary(choices: Sequence[Choice], what: str = "norms") -> str:
    total = sum(choice.chosen.median_us for choice in choices) / sum(choice.fastest.median_us for choice in choices)
    return (
        f"{len(choices)} {what}: the plans chosen take {mean_ratio(choices):.3f} x the time of the fastest in the mean,"
        f" {max(choice.ratio for choice in choices):.2f} x at worst, {total:.3f} x in the sum"
    )


def describe_held_out(timings: Sequence[Timing]) -> str:
    """How good the choices are for norms left out of the fit, or why that is not known."""
    try:
        choices = held_out(timings)
    except TableError as error:
        return f"not known how well constants choose for norms left out of the fit ({error})"
    worst = max(choices, key=lambda choice: choice.ratio)
    batch, channels, pixels, layout = worst.chosen.norm
    return (
        f"left out of the fit, every {FOLDS}th size in turn, {_summary(choices)}"
        f" (worst: {batch} x {channels} x {pixels} {layout})"
    )


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", type=Path, help="the table that `kernel_check --plans` wrote on the GPU")
    args = parser.parse_args(argv)
    try:
        timings = read_timings(args.plans)
        print(describe(fit(timings)), flush=True)
        print(f"\n{describe_held_out(timings)}")
    except (OSError, TableError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
