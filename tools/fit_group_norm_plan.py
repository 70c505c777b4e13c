#!/usr/bin/env python3
"""Fit the estimates by which the GroupNorm kernels choose how to cut a call into blocks to the times of a GPU.

    bash benchmarks/group_norm_gpu.sh build/group_norm_logs          # on the GPU: times every plan of sd15's norms
    python3 tools/fit_group_norm_plan.py build/group_norm_logs/plans.csv

Prints the constants for plugins/group_norm_plan.h, which go in the place of those there, and how much longer than the
fastest plans those take that they choose. A new GPU wants it: the constants in the header are of one H200.
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
from scipy.optimize import nnls  # noqa: E402

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
ROUNDS = 40

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
    processors = t.processors * 9 // 10 if t.stage == HELD and t.tiles > 2 else t.processors
    num_blocks = t.units * t.tiles
    return _ceil(num_blocks, max(processors * resident, 1)), min(resident, _ceil(num_blocks, t.processors))


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


@dataclass(frozen=True)
class Fit:
    """Constants by kind of plan, none negative, with three decimals; and what they choose for each norm."""

    constants: Dict[Kind, np.ndarray]
    choices: List[Choice]

    @property
    def mean_ratio(self) -> float:
        """Of the time of the plan chosen and the fastest one's, the mean over norms: 1 is best."""
        return float(np.mean([choice.ratio for choice in self.choices]))


def fit(timings: Sequence[Timing], rounds: int = ROUNDS) -> Fit:
    """Constants that choose well, by non-negative least squares of the relative errors.

    Slow plans weigh little, as only the order of the fast ones counts. In each round, plans that are estimated below
    the fastest and are not as fast gain weight, and so does the fastest; the best round's constants are kept.
    """
    times = np.array([timing.median_us for timing in timings])
    matrices = {
        kind: (np.array(members), np.array([features(timings[i]) for i in members], dtype=np.float64))
        for kind in KINDS
        if (members := [i for i, timing in enumerate(timings) if timing.kind == kind])
    }
    by_norm: Dict[Norm, List[int]] = {}
    for i, timing in enumerate(timings):
        by_norm.setdefault(timing.norm, []).append(i)
    norms = [np.array(members) for members in by_norm.values()]
    weights = np.empty(len(timings))
    for members in norms:
        slowness = times[members] / times[members].min()
        weights[members] = np.select([slowness < 1.2, slowness < 1.6], [1.0, 0.5], 0.1)
    best: Optional[Fit] = None
    for _ in range(rounds):
        constants, estimates = _solve(matrices, times, weights)
        choices = []
        for members in norms:
            chosen = members[np.argmin(estimates[members])]
            fastest = members[np.argmin(times[members])]
            choices.append(Choice(timings[chosen], float(estimates[chosen]), timings[fastest]))
            slow = times[members] > 1.02 * times[fastest]
            if times[chosen] > 1.02 * times[fastest]:
                weights[members[slow & (estimates[members] <= estimates[fastest])]] *= 1.35
                weights[fastest] *= 1.6
        found = Fit(constants, choices)
        if best is None or found.mean_ratio < best.mean_ratio:
            best = found
    if best is None:
        raise ValueError(f"rounds: {rounds}, at least one is wanted")
    return best


def _solve(
    matrices: Dict[Kind, Tuple[np.ndarray, np.ndarray]], times: np.ndarray, weights: np.ndarray
) -> Tuple[Dict[Kind, np.ndarray], np.ndarray]:
    """The constants of each kind, rounded as they are written, and the estimates of all plans by them."""
    constants = {}
    estimates = np.empty(len(times))
    for kind, (members, matrix) in matrices.items():
        scale = weights[members] / times[members]
        solution, _ = nnls(matrix * scale[:, None], weights[members])
        constants[kind] = np.round(solution, 3)
        estimates[members] = matrix @ constants[kind]
    return constants, estimates


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
    ordered = sorted(result.choices, key=lambda choice: -choice.ratio)
    total = sum(choice.chosen.median_us for choice in ordered) / sum(choice.fastest.median_us for choice in ordered)
    lines += [
        "",
        f"{len(ordered)} norms: the plans chosen take {result.mean_ratio:.3f} x the time of the fastest in the mean,"
        f" {ordered[0].ratio:.2f} x at worst, {total:.3f} x in the sum",
    ]
    for choice in ordered[:slowest]:
        batch, channels, pixels, layout = choice.chosen.norm
        lines.append(
            f"{choice.ratio:.2f} x  {batch} x {channels} x {pixels} {layout}: chosen {choice.chosen.median_us:.2f} us"
            f" ({choice.chosen}; estimate {choice.estimate:.2f}), fastest {choice.fastest.median_us:.2f} us"
            f" ({choice.fastest})"
        )
    return "\n".join(lines)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", type=Path, help="the table that `kernel_check --plans` wrote on the GPU")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of fitting with new weights (default {ROUNDS})")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    try:
        print(describe(fit(read_timings(args.plans), args.rounds)))
    except (OSError, TableError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
