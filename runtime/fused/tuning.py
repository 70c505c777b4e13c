"""Which tile sizes a matrix product runs with: measured once a GPU and kept in a file, or estimated.

No torch here.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from cldm.files import write_json

# What Hopper and Ampere's larger chips have; a smaller limit leaves out the configurations that do not fit.
SHARED_MEMORY = 227 * 1024


class Problem(NamedTuple):
    """A convolution or linear layer: (m, taps * cin + tail) by (n, taps * cin + tail), `nets` times.

    With `fp8` the weights lie in memory as FP8, a byte each, and the map as ever.
    """

    nets: int
    m: int
    n: int
    cin: int
    tail: int = 0
    taps: int = 1
    stride: int = 1
    gated: bool = False
    height: int = 1
    width: int = 0
    fp8: bool = False

    @property
    def images(self) -> int:
        return self.m // (self.height * self.width)

    @property
    def depth(self) -> int:
        return self.taps * self.cin + self.tail

    @property
    def flops(self) -> int:
        return 2 * self.nets * self.m * self.n * self.depth * (2 if self.gated else 1)

    @property
    def weight_elements(self) -> int:
        return self.nets * self.n * self.depth * (2 if self.gated else 1)

    def key(self) -> str:
        kind = "".join(
            part
            for part, there in (
                ("conv", self.taps == 9),
                ("up-conv", self.taps == 4),
                ("linear", self.taps == 1),
                (f"-stride{self.stride}", self.stride > 1),
                ("-gated", self.gated),
            )
            if there
        )
        size = f"m={self.m}" if self.taps == 1 else f"{self.images}x{self.height}x{self.width}"
        key = f"{kind} nets={self.nets} {size} n={self.n} cin={self.cin} tail={self.tail}"
        return f"{key} fp8" if self.fp8 else key


class Config(NamedTuple):
    """Tile of a program, its warps, blocks of the sum in flight, and programs that share one tile's sum.

    With `bx` the kernel for compute capability 9.0 runs, on boxes of bm / (by bx) images x by x bx pixels; with
    `columns` as well the one whose taps share boxes, so many of which are in flight, eight pixels wide, or eight high
    where bx is not 8. With `walk` the one whose rows stay runs: a program of `teams` times the warps takes so many
    tiles of channels. With `feeder` = 1 further warps copy the boxes, and `warps` only multiply.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    splits: int = 1
    by: int = 0
    bx: int = 0
    columns: int = 0
    teams: int = 1
    walk: int = 0
    feeder: int = 0


class AttentionConfig(NamedTuple):
    """Queries and keys of a tile, warps, and key blocks loaded ahead.

    With `teams` the kernel for compute capability 9.0 runs: so many teams of the warps share a tile's queries, and of
    each eight exponentials it takes so many `polynomials`.
    """

    bm: int
    bn: int
    warps: int
    stages: int
    teams: int = 0
    polynomials: int = 0


class AttentionProblem(NamedTuple):
    """`images` times `heads` heads of `dim` channels, each with `length` queries over `keys` keys."""

    length: int
    keys: int
    dim: int
    heads: int
    images: int
    causal: bool = False

    def key(self) -> str:
        kind = "causal attention" if self.causal else "attention"
        return f"{kind} {self.length}x{self.keys} dim={self.dim} heads={self.heads * self.images}"


class Card(NamedTuple):
    """What of a GPU decides which configurations can run."""

    name: str
    capability: int
    processors: int
    shared_memory: int
    boxes: bool = False


def shared_bytes(problem: Problem, config: Config) -> int:
    """Shared memory of a program: the blocks in flight, two bytes an element, and one of FP8 weights."""
    if config.walk:
        return _resident_bytes(problem, config)
    # With warps that feed also the barriers, and what these are told at their start.
    fed = 16 * (config.stages + config.columns) + 384 if config.feeder else 0
    if config.columns:
        return 1024 * column_groups(problem, config) + 2 * config.bn * config.bk * config.stages + fed
    row_bytes = 2 * config.bm + (1 if problem.fp8 else 2) * config.bn * (2 if problem.gated else 1)
    return row_bytes * config.bk * config.stages + fed


def _resident_bytes(problem: Problem, config: Config) -> int:
    """All of the rows, each team's ring of weights, and what its warps exchange results and biases through.

    And the barriers, as two programs may have to share a processor's memory to the last kilobyte.
    """
    rows = 2 * config.bm * config.bk * -(-problem.cin // config.bk)
    weights = 2 * config.bn * (2 if problem.gated else 1) * config.bk * config.stages
    return rows + config.teams * (weights + 512 * config.warps + 256)


def column_groups(problem: Problem, config: Config) -> int:
    """Rows of eight pixels that the boxes in flight have room for, a power of two; a box is higher than its tile."""
    images = config.bm // (config.by * config.bx)
    length = config.by if config.bx == 8 else config.bx
    rows = config.columns * images * (length + (2 if problem.taps == 9 else 1))
    return 1 << (rows - 1).bit_length()


def parts_ahead(problem: Problem, config: Config) -> int:
    """How many further tiles of 32-bit numbers a program's registers have room for: four, two or one."""
    sums = (2 if problem.gated else 1) + (1 if problem.fp8 else 0)
    numbers = sums * config.bm * config.bn // (32 * config.warps)
    return 4 if numbers <= 32 else 2 if numbers <= 64 else 1


# Of a thread of the warp that feeds, and of the three that fill its group up; the fewest that there can be.
FEEDER_REGISTERS = 24


def fed_registers(problem: Problem, config: Config) -> int:
    """Registers a thread with which the kernel with a feeding warp is launched; those that it leaves, the others take.

    As few as hold the sums and the epilogue: all of a processor's would keep the next kernel from beginning early.
    """
    numbers = config.bm * config.bn * (2 if problem.gated else 1) // (32 * config.warps)
    wanted = 104 if numbers <= 16 else 136 if numbers <= 32 else 200
    if numbers > 64 or (numbers > 32 and config.splits > 1):
        wanted = 232
    share = (wanted * config.warps + FEEDER_REGISTERS * 4) / (config.warps + 4)
    return 8 * math.ceil(share / 8)


def row_tiles(problem: Problem, config: Config) -> int:
    """Tiles that the output's pixels are cut into."""
    if not config.bx or problem.taps == 1:
        return -(-problem.m // config.bm)
    images = config.bm // (config.by * config.bx)
    return -(-problem.images // images) * -(-problem.height // config.by) * -(-problem.width // config.bx)


def tiles(problem: Problem, config: Config) -> int:
    return problem.nets * row_tiles(problem, config) * -(-problem.n // config.bn)


def box(problem: Problem, bm: int) -> Tuple[int, int]:
    """Height and width of the box of bm pixels that covers the map with the fewest tiles."""
    if problem.taps == 1:
        return 1, bm
    best = (0, 0, 0, 0)
    for by in (1, 2, 4, 8, 16, 32, 64):
        for bx in (1, 2, 4, 8, 16, 32, 64):
            if bm % (by * bx) == 0 and bm // (by * bx) <= max(1, 2 * problem.images - 1):
                count = row_tiles(problem, Config(bm, 1, 1, 1, 1, 1, by, bx))
                # The fewest tiles; among these the one whose neighbours share the least.
                rank = (-count, -abs(by - bx), by, bx)
                best = max(best, rank) if best[2] else rank
    return best[2], best[3]


def _box_is_whole(problem: Problem, config: Config, card: Card) -> bool:
    """Whether a configuration is one that the kernels for compute capability 9.0 compile for and compute all of."""
    sizes = (config.bm, config.bn, config.bk, config.by, config.bx)
    powers = min(sizes) > 0 and all(size & (size - 1) == 0 for size in sizes)
    if not (_boxes(problem, card) and powers and max(config.by, config.bx, config.bn) <= 256):
        return False
    # A product takes 8 channels and 16 numbers of the sum at least, and a box 256 images at most.
    if config.bn < 8 or config.bk < 16 or config.bm > 256 * config.by * config.bx:
        return False
    runs = config.warps in (4, 8) and config.bm >= 16 * config.warps and config.stages > 1
    line = (config.by, config.bx) == (1, config.bm)
    cut = line if problem.taps == 1 else config.bm % (config.by * config.bx) == 0
    # A strided map's odd pixels lie behind the even ones' channels.
    return runs and cut and (problem.stride == 1 or problem.cin % config.bk == 0)


def fits(problem: Problem, config: Config, card: Card) -> bool:
    """Whether a configuration can run a problem on a card."""
    boxed = config.bx or config.by or config.columns or config.walk
    if boxed and not _box_is_whole(problem, config, card):
        return False
    if shared_bytes(problem, config) > card.shared_memory or (problem.gated and config.splits > 1):
        return False
    if config.columns and (config.columns < 2 or not _shares_boxes(problem, config)):
        return False
    if config.walk and (config.walk < 0 or not _stays(problem, config)):
        return False
    if config.feeder and not _is_fed(problem, config):
        return False
    # A block's FP8 products are summed apart, and the kernel of 9.0 reads one block of the map ahead.
    if problem.fp8 and (config.bk < 32 or (config.bx and config.stages < 3)):
        return False
    rows = config.bm * config.bn * ((2 if problem.gated else 1) + (1 if problem.fp8 else 0))
    if rows > 128 * 256 or rows // (32 * config.warps) > 128:  # sums that do not fit the registers
        return False
    channels, of_tail = -(-problem.cin // config.bk), -(-problem.tail // config.bk)
    # The kernel whose taps share boxes cuts its sums between columns only.
    if config.columns and config.splits > (3 if problem.taps == 9 else 2) * channels + of_tail:
        return False
    return config.splits <= max(1, (problem.taps * channels + of_tail) // 2)


# Tiles with their warps, and the numbers of blocks to load ahead that are worth a try.
_SHAPES = (
    (128, 128, 4, (3, 4)),
    (128, 128, 8, (3, 4)),
    (128, 64, 4, (3, 4, 5)),
    (64, 128, 4, (3, 4, 5)),
    (64, 64, 4, (4, 6)),
    (64, 32, 4, (4, 6)),
    (128, 32, 4, (4, 6)),
    (128, 256, 8, (3, 4)),
    (256, 128, 8, (3, 4)),
    (256, 64, 8, (3, 4)),
    (64, 256, 4, (3, 4)),
    (32, 64, 4, (4, 6)),
    (16, 64, 2, (4, 6)),
    (128, 16, 4, (4,)),
)
_SPLITS = (1, 2, 3, 4, 6, 7, 8, 9, 12)


# The same for the kernel of compute capability 9.0.
_BOX_SHAPES = (
    (64, 32, 4, (6, 8, 12)),
    (64, 64, 4, (4, 6, 8, 12)),
    (64, 128, 4, (3, 4, 6, 8)),
    (64, 256, 4, (3, 4, 5)),
    (128, 32, 4, (4, 6)),
    (128, 64, 4, (3, 4, 6, 8)),
    (128, 128, 4, (3, 4, 6)),
    (128, 128, 8, (3, 4, 6)),
    (128, 256, 8, (3, 4)),
    (256, 64, 8, (3, 4, 5)),
    (256, 128, 8, (3, 4)),
)


# And with a warp that feeds: rows, channels, length of a block, warps that multiply, and depth.
_FED_SHAPES = (
    (64, 32, 64, 4, 10),
    (64, 64, 64, 4, 10),
    (64, 64, 128, 4, 5),
    (64, 128, 64, 4, 6),
    (128, 64, 64, 4, 6),
)
# Short sums end before the feeding warp is ahead: none of up to 320 channels, and no gated layer, was faster with one.
_SHORTEST_FED = 512


def _is_fed(problem: Problem, config: Config) -> bool:
    """Whether the kernels with feeding warps can run a problem, all but FP8, with boxes that are whole."""
    alone = config.feeder == 1 and config.bx > 0 and not config.walk and not problem.fp8
    # A product's numbers have to fit the registers of the launch, which of four warps are 128 or fewer.
    return alone and (config.bn <= 128 or config.warps == 8)


def _fed_shapes(problem: Problem) -> Iterator[Config]:
    """Deep rings, as the feeding warp runs ahead; not deeper than the sum is long."""
    if problem.gated or problem.depth < _SHORTEST_FED:
        return
    for bm, bn, bk, warps, depth in _FED_SHAPES:
        if problem.cin % bk == 0 and problem.tail % bk == 0:
            yield Config(bm, bn, bk, warps, min(depth, problem.depth // bk), 1, *box(problem, bm), feeder=1)


# Of the first kernel's tiles, those that may still win where the second can run.
_FEW_SHAPES = (
    (128, 128, 4, (4,)),
    (128, 64, 4, (3, 5)),
    (128, 32, 4, (6,)),
    (64, 128, 4, (3, 5)),
    (64, 64, 4, (4, 6)),
    (64, 32, 4, (6,)),
)


# And those of FP8 weights, of both kernels. The sums of a block take registers of their own.
_FP8_SHAPES = ((128, 128, 8, (3,)), (128, 64, 4, (3, 4)), (128, 64, 8, (3,)), (64, 64, 4, (3, 4)), (64, 32, 4, (4,)))
_FP8_BOX_SHAPES = (
    (64, 32, 4, (6, 10)),
    (64, 64, 4, (4, 8)),
    (64, 128, 4, (4, 6)),
    (128, 64, 4, (4, 6)),
    (128, 64, 8, (4, 6)),
    (128, 128, 8, (4, 5)),
    (256, 64, 8, (4,)),
)


def _shares_boxes(problem: Problem, config: Config) -> bool:
    """Whether the kernel whose taps share boxes can run a problem: whole blocks of 64 channels, boxes of 8 pixels."""
    channels = problem.cin % 64 == 0 and problem.tail % 64 == 0 and config.bk == 64
    return channels and problem.taps > 1 and problem.stride == 1 and 8 in (config.by, config.bx) and not problem.fp8


# The same of the kernel whose taps share boxes, and the boxes in flight.
_COLUMN_SHAPES = (
    (64, 64, 4, (6,), (3, 5)),
    (64, 128, 4, (4, 8), (3,)),
    (128, 64, 4, (4, 8), (3,)),
    (128, 128, 4, (4,), (3,)),
    (128, 128, 8, (4,), (3,)),
    (128, 256, 8, (4,), (3,)),
    (256, 64, 8, (4,), (3,)),
    (256, 128, 8, (4, 6), (3,)),
)


# Those of them that are worth a try with warps that feed, with their deepest ring.
_FED_COLUMN_SHAPES = ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8))


def _column_shapes(problem: Problem) -> Iterator[Config]:
    """Tiles of whole rows of eight pixels, or columns: of one image, or of two where they are low."""
    # Upright where that needs fewer tiles.
    ways = (False, True) if problem.height % 8 == 0 and problem.width % 8 > 0 else (False,)
    for bm, bn, warps, depths, boxes in _COLUMN_SHAPES:
        for images, upright in itertools.product((1, 2), ways):
            length = bm // (8 * images)
            # Not more rows of zeros than half a tile, nor images; a square stands and lies.
            far = length >= 2 * (problem.width if upright else problem.height)
            if images > problem.images or far or (upright and length == 8):
                continue
            by, bx = (8, length) if upright else (length, 8)
            for stages, columns in itertools.product(depths, boxes):
                config = Config(bm, bn, 64, warps, stages, 1, by, bx, columns)
                yield config
                if (bm, bn, warps) in _FED_COLUMN_SHAPES and (stages, columns) == (depths[-1], boxes[0]):
                    yield config._replace(feeder=1)


# Longer sums leave their rows no room, and gain little.
_LONGEST_RESIDENT = 640


def _stays(problem: Problem, config: Config) -> bool:
    """Whether the kernel whose rows stay can run a problem: a linear layer of few channels; tiles up to 256 wide."""
    plain = problem.taps == 1 and not problem.tail and not problem.fp8 and config.splits == 1 and not config.columns
    rows = (config.by, config.bx) == (1, config.bm) and config.bm >= 16 * config.warps and config.stages > 1
    columns = config.bn >= 32 and config.bn * (2 if problem.gated else 1) <= 256
    return plain and rows and columns and problem.cin <= _LONGEST_RESIDENT and config.teams in (1, 2)


# The same of the kernel whose rows stay: rows, channels (of gated layers half as many), warps of a team, and teams.
_RESIDENT_SHAPES = (
    (64, 64, 4, 1),
    (64, 128, 4, 1),
    (64, 128, 4, 2),
    (64, 256, 4, 2),
    (128, 64, 4, 1),
    (128, 64, 4, 2),
    (128, 128, 4, 1),
    (128, 128, 4, 2),
    (128, 128, 8, 1),
    (256, 64, 8, 1),
    (256, 64, 8, 2),
    (256, 128, 8, 1),
)
# A program that takes all of a processor's memory would keep the next kernel's from beginning early.
_RESIDENT_DEPTHS = (6, 5, 4, 3, 2)


def _resident_shapes(problem: Problem, card: Card) -> Iterator[Config]:
    """Each tile with the two walks that look best, and as many blocks in flight as there is room for."""
    # Two programs of one team share a processor where the memory suffices; each takes 1 KB of it for the system.
    half = (card.shared_memory + 1024) // 2 - 1024
    for bm, wide, warps, teams in _RESIDENT_SHAPES:
        if (bm, teams) == (256, 2) and not problem.gated:
            continue  # it spills where there is a residual
        config = Config(bm, wide // 2 if problem.gated else wide, 64, warps, 2, by=1, bx=bm, teams=teams, walk=1)
        shared = teams == 1 and shared_bytes(problem, config) <= half
        room = half if shared else card.shared_memory
        depths = [depth for depth in _RESIDENT_DEPTHS if shared_bytes(problem, config._replace(stages=depth)) <= room]
        if depths:
            places = card.processors * (2 if shared else 1)
            for walk in _walks(problem, config, places):
                yield config._replace(stages=depths[0], walk=walk)


def _walks(problem: Problem, config: Config, places: int) -> List[int]:
    """The two walks of the least time: so many tiles and, for its start, one more, for each round of programs."""
    rows, columns = problem.nets * row_tiles(problem, config), -(-problem.n // config.bn)
    times = {}
    for groups in range(1, columns // config.teams + 1):
        walk = -(-columns // groups)
        rounds = -(-rows * -(-columns // walk) // places)
        times[walk] = rounds * (-(-walk // config.teams) * config.teams + 1)
    return sorted(times, key=lambda walk: (times[walk], -walk))[:2]


def _boxes(problem: Problem, card: Card) -> bool:
    """Whether the kernel of compute capability 9.0 can run a problem; of strided ones those of whole blocks."""
    strided = problem.stride == 1 or (problem.taps == 9 and problem.cin % 64 == 0 and not problem.fp8)
    return card.boxes and strided and problem.cin >= 32 and problem.cin % 8 == 0 and problem.tail % 8 == 0


def _fp8_shapes(problem: Problem, card: Card) -> Iterator[Config]:
    """Tiles without splits; one byte a weight asks for longer blocks, where the channels allow it."""
    for bk in (128, 64, 32):
        if problem.cin % bk == 0 and problem.tail % bk == 0:
            for bm, bn, warps, depths in _FP8_SHAPES:
                for stages in depths if bk <= 64 else depths[:1]:
                    yield Config(bm, bn, bk, warps, stages)
            if _boxes(problem, card):
                for bm, bn, warps, depths in _FP8_BOX_SHAPES:
                    for stages in depths if bk <= 64 else (depths[0] - 1,):
                        yield Config(bm, bn, bk, warps, stages, 1, *box(problem, bm))
            if bk <= 64:
                return


def _shapes(problem: Problem, card: Card) -> Iterator[Config]:
    """Tiles without splits, of all kernels."""
    if problem.fp8:
        yield from _fp8_shapes(problem, card)
        return
    boxes = _boxes(problem, card)
    bk = next((size for size in (64, 32) if problem.cin % size == 0 and problem.tail % size == 0), 16)
    for bm, bn, warps, depths in _FEW_SHAPES if boxes and problem.n >= 32 else _SHAPES:
        for stages in depths:
            yield Config(bm, bn, bk, warps, stages)
    if boxes:
        for bm, bn, warps, depths in _BOX_SHAPES:
            for stages in depths:
                yield Config(bm, bn, 64 if problem.cin >= 64 else 32, warps, stages, 1, *box(problem, bm))
        yield from _fed_shapes(problem)
        if problem.taps > 1:
            yield from _column_shapes(problem)
        elif problem.cin >= 64:
            yield from _resident_shapes(problem, card)


def candidates(problem: Problem, card: Card) -> List[Config]:
    """Configurations worth timing: those that about fill the card."""
    found: List[Config] = []
    for shape in _shapes(problem, card):
        if shape.bm >= 2 * max(problem.m, 64) or shape.bn >= 2 * max(problem.n, 16):
            continue
        for splits in _SPLITS:
            config = shape._replace(splits=splits)
            programs = tiles(problem, config) * splits
            too_many = splits > 1 and programs > 2.5 * card.processors
            if config.walk:
                programs = -(-programs // config.walk)
            too_few = programs < 0.4 * card.processors and splits < _SPLITS[-1]
            if fits(problem, config, card) and not too_many and (not too_few or problem.gated):
                found.append(config)
    return found or [estimate(problem, card)]


def estimate(problem: Problem, card: Card) -> Config:
    """A configuration that is never far off, for problems that nobody measured."""
    bk = 64 if problem.cin % 64 == 0 else 32 if problem.cin % 32 == 0 else 16
    best: Optional[Config] = None
    for bm, bn, warps in ((128, 128, 8), (128, 64, 4), (64, 64, 4), (64, 32, 4), (32, 32, 2)):
        config = Config(bm, bn, bk, warps, 3)
        # The two sums of a large gated tile fill the registers, which on cards before 9.0 the operands need too.
        spills = problem.gated and bm > 64 and card.capability < 90
        if spills or not fits(problem, config, card):
            continue
        best = config
        if tiles(problem, config) >= card.processors:
            return config
    if best is None:
        best = Config(32, 32, 16, 2, 2)
    if not problem.gated:
        blocks = problem.depth // best.bk
        wanted = max(1, card.processors // max(1, tiles(problem, best)))
        best = best._replace(splits=max(1, min(wanted, blocks // 4, 8)))
    return best


def attention_fits(problem: AttentionProblem, config: AttentionConfig, card: Card) -> bool:
    """Whether the queries, and the keys and values in flight, fit the shared memory, and the sums the registers."""
    if config.teams:
        return card.boxes and _flash_fits(problem, config) and flash_bytes(problem, config) <= card.shared_memory
    # Nothing is copied ahead, which the kernel cannot do without (see there); one warp's products go another way.
    if config.stages < 2 and config.warps > 1:
        return False
    dim = 16 * -(-problem.dim // 16)
    shared = 2 * dim * (config.bm + 2 * config.bn * config.stages)
    registers = config.bm * (config.bn + dim) // (32 * config.warps)
    return shared <= card.shared_memory and registers <= 160


def flash_width(problem: AttentionProblem) -> int:
    """Channels of a head as they lie in the shared memory of the kernel of compute capability 9.0."""
    return max(64, 1 << (problem.dim - 1).bit_length())


def flash_bytes(problem: AttentionProblem, config: AttentionConfig) -> int:
    """Shared memory of a program of that kernel: queries, ring, what the teams' results are sorted in, barriers."""
    return 2 * flash_width(problem) * (config.bm + 2 * config.bn * config.stages) + 2048 * config.teams + 512


def _flash_numbers(problem: AttentionProblem, config: AttentionConfig) -> int:
    """Registers a thread of that kernel needs for a block's scores, its weights, and the result."""
    return config.bn // 2 + config.bn // 4 + flash_width(problem) // 2


def _flash_fits(problem: AttentionProblem, config: AttentionConfig) -> bool:
    """Whether that kernel can run a problem: TMA wants heads of whole 16 bytes; a block is awaited while two are used.

    A team has 136, or 232, registers a thread, one of two teams 240, one of three 160.
    """
    heads = not problem.causal and problem.dim % 8 == 0 and problem.dim <= 128
    teams = 1 <= config.teams <= 3 and config.warps == 4 and config.bm == 64 * config.teams
    registers = _flash_numbers(problem, config) <= (128 if config.teams == 3 else 192)
    # Weights of a block are an operand of products over 16 keys, and eight a thread go through the exponential at once.
    block = config.bn >= 16 and config.bn & (config.bn - 1) == 0
    return heads and teams and registers and block and config.stages >= 3 and 0 <= config.polynomials <= 8


def flash_registers(problem: AttentionProblem, config: AttentionConfig) -> Optional[int]:
    """Registers a thread that a program of that kernel starts with; its teams then take those of its other warps.

    Of programs of one team three or two share a processor; those of more have one for themselves. The assembler wants
    no product with more numbers than the registers of the start hold.
    """
    if config.teams > 1:
        return None
    return 80 if max(config.bn, flash_width(problem)) == 64 else 128


def flash_programs(problem: AttentionProblem, config: AttentionConfig, card: Card) -> int:
    """How many programs of that kernel run at once."""
    by_registers = {None: 1, 80: 3, 128: 2}[flash_registers(problem, config)]
    # Each takes 1 KB of the memory for the system.
    by_memory = (card.shared_memory + 1024) // (flash_bytes(problem, config) + 1024)
    return card.processors * min(by_registers, by_memory)


# Teams, keys of a block, blocks in flight, and polynomials of that kernel that are worth a try, by its width of a head.
_FLASH_SHAPES = {
    64: ((3, 128, 4, 0), (3, 128, 4, 1), (3, 64, 6, 0), (2, 128, 4, 0)),
    128: ((3, 64, 4, 0), (2, 64, 4, 0), (1, 64, 4, 0)),
}
# Over the 77 keys of a text it was slower everywhere.
_FEWEST_FLASH_KEYS = 128


def attention_candidates(problem: AttentionProblem, card: Card) -> List[AttentionConfig]:
    """Configurations worth timing."""
    shapes = [
        AttentionConfig(bm, bn, warps, stages)
        for bm, warps in ((32, 4), (64, 4), (128, 4), (128, 8))
        for bn in (32, 64, 128)
        for stages in (2, 3)
    ]
    flash = _FLASH_SHAPES.get(flash_width(problem), ()) if problem.keys >= _FEWEST_FLASH_KEYS else ()
    for teams, bn, stages, polynomials in flash:
        shapes.append(AttentionConfig(64 * teams, bn, 4, stages, teams, polynomials))
    return [
        config
        for config in shapes
        if config.bm < 2 * max(64 if config.teams else 32, problem.length)
        and config.bn < 2 * max(32, problem.keys)
        and attention_fits(problem, config, card)
    ]


def estimate_attention(problem: AttentionProblem, card: Card) -> AttentionConfig:
    """A configuration of the kernel that runs on all cards, for problems that nobody measured."""
    for config in (AttentionConfig(64, 64, 4, 2), AttentionConfig(64, 32, 4, 2), AttentionConfig(32, 32, 4, 2)):
        if attention_fits(problem, config, card):
            return config
    return AttentionConfig(16, 16, 1, 1)


class Tuning:
    """The configurations of one card.

    Parameters
    ----------
    card : Card
    table : mapping of problem keys to lists of numbers, the fields of a configuration
    """

    def __init__(self, card: Card, table: Optional[Mapping[str, Sequence[int]]] = None) -> None:
        self.card = card
        self.table: Dict[str, Sequence[int]] = dict(table or {})

    def config(self, problem: Problem) -> Config:
        """What was measured to be the fastest, or an estimate."""
        found = self.table.get(problem.key())
        if found is not None:
            config = Config(*found)
            if fits(problem, config, self.card):
                return config
        return self._of_fp16(problem) or estimate(problem, self.card)

    def _of_fp16(self, problem: Problem) -> Optional[Config]:
        """For an FP8 problem that nobody measured: the same one's tile in FP16, on more warps where it takes them."""
        found = self.table.get(problem._replace(fp8=False).key()) if problem.fp8 else None
        if found is None:
            return None
        config = Config(*found)._replace(columns=0, teams=1, walk=0, feeder=0)
        offered = (config, config._replace(warps=2 * config.warps))
        return next((one for one in offered if one.warps <= 8 and fits(problem, one, self.card)), None)

    def attention(self, problem: AttentionProblem) -> AttentionConfig:
        """The same for attention."""
        found = self.table.get(problem.key())
        if found is not None and attention_fits(problem, AttentionConfig(*found), self.card):
            return AttentionConfig(*found)
        return estimate_attention(problem, self.card)


def card_slug(card: Card) -> str:
    """The card's name as a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", card.name).strip("_")


def read_table(path: Path) -> Dict[str, List[int]]:
    """The configurations of a file that `write_table` left.

    Raises
    ------
    ValueError
        It is not such a file.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["configs"]
        return {str(key): _numbers(str(key), text) for key, text in stored.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of tile sizes: {error}; delete it, it is made again") from error


def _numbers(key: str, text: str) -> List[int]:
    """One row of a table; raises TypeError or ValueError where it is no configuration."""
    numbers = [int(number) for number in text.split()]
    config = AttentionConfig(*numbers) if "attention" in key else Config(*numbers)
    if min(config[: 4 if isinstance(config, AttentionConfig) else 6]) < 1:
        raise ValueError(f"{key} has {text}")
    if isinstance(config, AttentionConfig) and config.teams and config.bm != 64 * config.teams:
        raise ValueError(f"{key} has {text}, whose teams do not have 64 queries each")
    if isinstance(config, Config) and (config.bx or config.by):
        pixels = config.by * config.bx
        if min(config.by, config.bx) < 1 or config.bm % pixels:
            raise ValueError(f"{key} has {text}, whose box does not divide its tile")
    return numbers


def write_table(path: Path, card: Card, versions: Mapping[str, str], table: Mapping[str, Sequence[int]]) -> None:
    """Write configurations, and on what they were measured."""
    configs = {key: " ".join(str(number) for number in _row(key, numbers)) for key, numbers in table.items()}
    write_json(path, {"card": card._asdict(), "versions": dict(versions), "configs": configs})


def _row(key: str, numbers: Sequence[int]) -> Sequence[int]:
    """What a file needs of a row: the fields that have defaults are left out from the end while they have them."""
    row = list(numbers)
    if "attention" not in key:
        while len(row) > 6 and row[-1] == Config._field_defaults[Config._fields[len(row) - 1]]:
            row.pop()
    return row
