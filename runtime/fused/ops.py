"""The fast path's operators on torch tensors: shapes in, one Triton launch out.

Maps are (nets, B, H, W, C) with the channels side by side and rows of pixels a fixed distance apart, so that a slice
of a concatenation's channels is one too. On the meta device nothing runs: `matmul` then notes what it was asked for,
which is how the shapes to tune are found.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Callable, Collection, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import torch
import torch.nn.functional as F

from runtime.fused.tuning import (
    AttentionConfig,
    AttentionProblem,
    Config,
    Problem,
    Tuning,
    column_groups,
    estimate,
    fed_registers,
    flash_programs,
    flash_registers,
    flash_width,
    parts_ahead,
    row_tiles,
)

LOG2_E = math.log2(math.e)
# The kernels' offsets within a net's map are 32-bit integers.
MOST_ELEMENTS = 2**31 - 1


class Scaling(NamedTuple):
    """What the numbers of an FP8 matrix count, and what the maps that it multiplies are to be multiplied by first.

    Attributes
    ----------
    steps : (nets, rows of the matrix) float32 tensor
        Where there is no FP8, a stand-in that no kernel looks at.
    factor, tail_factor : float
        Powers of two; of the map, and of the tail's.
    """

    steps: torch.Tensor
    factor: float
    tail_factor: float = 1.0


@dataclass(frozen=True)
class Weights:
    """Packed weights of a convolution or linear layer of one or more nets.

    Attributes
    ----------
    matrix : (nets, N, K) tensor
        K is taps x in_channels, the taps outermost, then the channels of a 1x1 convolution of another map (`tail`).
        Gated layers have 2 N rows, the gate's last.
    bias : (nets, N) float32 tensor, optional
    taps : {1, 4, 9}
        4 is a convolution of a map whose pixels count four times each, see `Packer.up_conv`; it has four matrices.
    tail : int
    stride : {1, 2}
    gated : bool
    static : bool
        Nothing on the device writes the matrix, so a kernel may read it while the one before still runs.
    fp8 : Scaling, optional
        Of a matrix of float8_e4m3fn.
    """

    matrix: torch.Tensor
    bias: Optional[torch.Tensor] = None
    taps: int = 1
    tail: int = 0
    stride: int = 1
    gated: bool = False
    static: bool = True
    fp8: Optional[Scaling] = None

    @property
    def out_channels(self) -> int:
        rows = self.matrix.shape[1]
        return rows // 2 if self.gated else rows

    @property
    def in_channels(self) -> int:
        return (self.matrix.shape[2] - self.tail) // self.taps


class Affine(NamedTuple):
    """Scale and shift of a norm: (nets, C) float32 each."""

    gamma: torch.Tensor
    beta: torch.Tensor
    epsilon: float
    groups: int = 0


class _Epilogue:
    """What all products do with their sums, in the order in which the kernels take it."""

    def __init__(
        self,
        problem: Problem,
        weights: Weights,
        out: torch.Tensor,
        shift: Optional[Tuple[torch.Tensor, int]],
        residual: Optional[torch.Tensor],
        scale: Optional[torch.Tensor],
        act: str,
    ) -> None:
        bias = weights.bias
        self._problem = problem
        # Where there is none, the kernel is compiled without it and looks at no stand-in.
        self.tensors = (
            weights.matrix if bias is None else bias,
            weights.matrix if shift is None else shift[0],
            out if residual is None else residual,
            out if scale is None else scale,
            out,
        )
        self.row_steps = (0 if residual is None else residual.stride(3), out.stride(3))
        self.net_steps = (
            0 if bias is None else bias.stride(0),
            0 if shift is None else shift[1],
            0 if residual is None else residual.stride(0),
            problem.m if residual is None else residual.shape[1:4].numel(),
            out.stride(0) if out.shape[0] > 1 else 0,
            0 if scale is None else scale.stride(0),
            1 if scale is None else problem.m // scale.shape[0],
        )
        self._flags = {
            "HAS_BIAS": bias is not None,
            "HAS_SHIFT": shift is not None,
            "HAS_RESIDUAL": residual is not None,
            "HAS_SCALE": scale is not None,
            "ACT": act,
        }

    def options(self, config: Config, without: Collection[str] = ()) -> Dict[str, Any]:
        """Compile-time values that the kernels have, but for those `without` which one does."""
        values = {
            **self._flags,
            "TAPS": self._problem.taps,
            "HAS_TAIL": self._problem.tail > 0,
            "GATED": self._problem.gated,
            "FP8": self._problem.fp8,
            "SPLIT": config.splits > 1,
            "BN": config.bn,
            "BK": config.bk,
            "STAGES": config.stages,
            "AHEAD": parts_ahead(self._problem, config),
            "num_warps": config.warps,
        }
        return {name: value for name, value in values.items() if name not in without}


class _Product(NamedTuple):
    """One launch of a matrix product: what `Fused.matmul` was asked for, and how it is to run."""

    problem: Problem
    config: Config
    x: torch.Tensor
    weights: Weights
    tail: Optional[torch.Tensor]
    epilogue: _Epilogue


class Fused:
    """Launches the kernels.

    Parameters
    ----------
    tuning : Tuning
        Tile sizes by problem.
    dtype : torch.dtype
        Of the maps: float16 or bfloat16.
    pdl : bool
        Programmatic dependent launch; needs compute capability 9.0.
    """

    def __init__(self, tuning: Tuning, dtype: torch.dtype = torch.float16, pdl: bool = False) -> None:
        self.tuning = tuning
        self.dtype = dtype
        self.pdl = pdl
        self.asked: Dict[Problem, Tuple[int, ...]] = {}
        self.uses: Counter[str] = Counter()
        self.asked_attention: Set[AttentionProblem] = set()
        self._put_off: Optional[Dict[Tuple[Any, ...], Callable[[], None]]] = None
        self._scratch: Dict[torch.device, Tuple[torch.Tensor, torch.Tensor]] = {}
        # Kept: graphs that were captured with them go on using them.
        self._outgrown: List[Tuple[torch.Tensor, torch.Tensor]] = []

    def empty(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=like.device)

    def matmul(
        self,
        x: torch.Tensor,
        weights: Weights,
        out: Optional[torch.Tensor] = None,
        tail: Optional[torch.Tensor] = None,
        shift: Optional[Tuple[torch.Tensor, int]] = None,
        residual: Optional[torch.Tensor] = None,
        scale: Optional[torch.Tensor] = None,
        act: str = "none",
        config: Optional[Config] = None,
    ) -> torch.Tensor:
        """residual + scale * act(conv(x) + bias + shift); the activation of a gated layer is its own.

        Parameters
        ----------
        x : (nets, B, H, W, C) tensor
        weights : Weights
        out : (nets, B, OH, OW, N) tensor, optional
        tail : (nets, B, OH, OW, weights.tail) tensor
            Goes through the 1x1 convolution that is packed behind the first.
        shift : (vector, step) pair, optional
            N numbers to add for the first net, those of the next `step` elements on.
        residual : (nets, R, OH, OW, N) tensor, optional
            Images of the output beyond R repeat the first.
        scale : (rows,) strided tensor, optional
            A factor for each `B / rows` images in a row; for one net.

        Raises
        ------
        ValueError
            The weights are for other channels, or a map is too large or not rows of pixels.
        """
        nets, batch, height, width, channels = x.shape
        up = weights.taps == 4
        oh, ow = (-(-size // weights.stride) for size in (height, width))
        n = weights.out_channels
        if channels != weights.in_channels or weights.matrix.shape[0] != (4 if up else nets):
            raise ValueError(f"{tuple(x.shape)} does not fit weights {tuple(weights.matrix.shape)}")
        problem = Problem(
            nets=weights.matrix.shape[0],
            m=batch * oh * ow,
            n=n,
            cin=channels,
            tail=weights.tail,
            taps=weights.taps,
            stride=weights.stride,
            gated=weights.gated,
            height=oh,
            width=ow,
            fp8=weights.fp8 is not None,
        )
        if out is None:
            factor = 2 if up else 1
            like = weights.matrix if weights.matrix.is_meta else x
            out = self.empty(like, nets, batch, factor * oh, factor * ow, n)
        for name, map_ in (("input", x), ("output", out), ("tail", tail), ("residual", residual)):
            _check_map(name, map_)
        if out.is_meta:
            self.asked[problem] = tuple(x.shape)
            self.uses[problem.key()] += 1
            return out
        chosen = config or self.tuning.config(problem)
        if chosen.bx and weights.stride > 1 and not _is_even(x):
            chosen = estimate(problem, self.tuning.card)
        launch = self._launch_matmul
        if chosen.walk:
            launch = self._launch_resident
        elif chosen.columns:
            launch = self._launch_columns
        elif chosen.feeder:
            launch = self._launch_fed
        elif chosen.bx:
            launch = self._launch_boxes
        epilogue = _Epilogue(problem, weights, out, shift, residual, scale, act)
        launch(_Product(problem, chosen, x, weights, tail, epilogue))
        return out

    def _launch_matmul(self, product: _Product) -> None:
        from runtime.fused.kernels import matmul_kernel

        problem, config, x, weights, tail, epilogue = product
        matrix = weights.matrix
        tiles = row_tiles(problem, config) * -(-problem.n // config.bn)
        self._launch(
            matmul_kernel,
            (tiles, config.splits, problem.nets),
            x,
            x if tail is None else tail,
            matrix,
            *epilogue.tensors,
            *self._split_scratch(x.device, problem, config, tiles),
            problem.m,
            problem.n,
            problem.cin,
            problem.tail,
            *x.shape[2:4],
            problem.height,
            problem.width,
            x.stride(3),
            0 if tail is None else tail.stride(3),
            matrix.stride(1),
            *epilogue.row_steps,
            x.stride(0) if x.shape[0] > 1 else 0,
            0 if tail is None else tail.stride(0),
            matrix.stride(0),
            *epilogue.net_steps,
            config.splits,
            *(weights.fp8 or Scaling(matrix, 1.0)),
            STRIDE=problem.stride,
            UP=problem.taps == 4,
            EVEN=problem.cin % config.bk == 0 and problem.tail % config.bk == 0,
            BM=config.bm,
            num_stages=config.stages,
            **epilogue.options(config),
        )

    def _launch_boxes(self, product: _Product) -> None:
        from runtime.fused.hopper import tma_matmul_kernel

        grid, operands, boxes = self._boxes(product)
        scaling = product.weights.fp8 or Scaling(product.weights.matrix, 1.0)
        options = product.epilogue.options(product.config)
        self._launch(tma_matmul_kernel, grid, *operands, *scaling, **boxes, **options)

    def _launch_fed(self, product: _Product) -> None:
        from runtime.fused.fed import fed_matmul_kernel

        grid, operands, boxes = self._boxes(product)
        options = product.epilogue.options(product.config, without=("FP8",))
        registers = fed_registers(product.problem, product.config)
        self._launch(fed_matmul_kernel, grid, *operands, maxnreg=registers, **boxes, **options)

    def _boxes(self, product: _Product) -> Tuple[Tuple[int, ...], Tuple[Any, ...], Dict[str, Any]]:
        """The grid, operands and compile-time values of both kernels that take boxes of pixels."""
        problem, config, x, weights, tail, _ = product
        linear = problem.taps == 1
        sizes = (1, 1, problem.m) if linear else (problem.images, problem.height, problem.width)
        images_of_box = config.bm // (config.by * config.bx)
        block = (1, images_of_box, config.by, config.bx, config.bk)
        maps = _strided_descriptor(x, block) if problem.stride > 1 else _map_descriptor(x, block, linear)
        grid, operands = self._behind_maps(product, *sizes)
        options = {
            "BB": images_of_box,
            "BY": config.by,
            "BX": config.bx,
            "STRIDE": problem.stride,
            "STATIC": weights.static,
        }
        return grid, (maps, maps if tail is None else _map_descriptor(tail, block, linear), *operands), options

    def _behind_maps(
        self, product: _Product, images: int, height: int, width: int
    ) -> Tuple[Tuple[int, ...], Tuple[Any, ...]]:
        """The grid of the kernels that take boxes, and their operands from the weights on; of a map of such a size."""
        problem, config, x, weights, _, epilogue = product
        matrix = weights.matrix
        tiles = row_tiles(problem, config) * -(-problem.n // config.bn)
        operands = (
            _descriptor(matrix, list(matrix.shape), list(matrix.stride()), (1, config.bn, config.bk)),
            *epilogue.tensors,
            *self._split_scratch(x.device, problem, config, tiles),
            images,
            problem.n,
            height,
            width,
            problem.cin,
            -(-problem.cin // config.bk),
            -(-problem.tail // config.bk),
            *epilogue.row_steps,
            *epilogue.net_steps,
            config.splits,
        )
        return (tiles, config.splits, problem.nets), operands

    def _launch_columns(self, product: _Product) -> None:
        problem, config, x, weights, tail, epilogue = product
        kernel = _column_kernel(config)
        swap = config.bx != 8
        images = config.bm // (config.by * config.bx)
        by = config.bx if swap else config.by
        block = (1, by, images, 8, config.bk)
        maps = _column_descriptor(x, block, swap)
        grid, operands = self._behind_maps(product, problem.images, problem.height, problem.width)
        options = epilogue.options(config, without=("GATED", "FP8"))
        if config.feeder:
            options["maxnreg"] = fed_registers(problem, config)
        self._launch(
            kernel,
            grid,
            maps,
            _column_descriptor(x, (1, 2 if problem.taps == 9 else 1, *block[2:]), swap),
            maps if tail is None else _column_descriptor(tail, block, swap),
            *operands,
            BB=images,
            BY=by,
            SWAP=swap,
            COLUMNS=config.columns,
            GROUPS=column_groups(problem, config),
            STATIC=weights.static,
            **options,
        )

    def _launch_resident(self, product: _Product) -> None:
        from runtime.fused.resident import resident_matmul_kernel

        problem, config, x, weights, _, epilogue = product
        parts = 2 if problem.gated else 1
        groups = -(-problem.n // (config.bn * config.walk))
        self._launch(
            resident_matmul_kernel,
            (row_tiles(problem, config) * groups, problem.nets),
            _map_descriptor(x, (1, 1, 1, config.bm, config.bk), flat=True),
            _parts_descriptor(weights.matrix, parts, (1, parts, config.bn, config.bk)),
            *epilogue.tensors,
            problem.m,
            problem.n,
            config.walk,
            *epilogue.row_steps,
            *epilogue.net_steps,
            BLOCKS=-(-problem.cin // config.bk),
            BM=config.bm,
            TEAMS=config.teams,
            STATIC=weights.static,
            **epilogue.options(config, without=("TAPS", "HAS_TAIL", "FP8", "SPLIT", "AHEAD")),
        )

    def _launch(self, kernel: Any, grid: Tuple[int, ...], *operands: Any, **options: Any) -> None:
        """Every launch: at once, or where they are put off, noted unless one that needs the same compilation is."""
        if self.pdl:
            options["launch_pdl"] = True

        def go() -> None:
            kernel[grid](*operands, PDL=self.pdl, **options)

        if self._put_off is None:
            go()
        else:
            self._put_off.setdefault(_variant(kernel, operands, options), go)

    @contextlib.contextmanager
    def putting_off(self) -> Iterator[Dict[Tuple[Any, ...], Callable[[], None]]]:
        """Inside, launches are only noted, one of each that needs a compilation of its own.

        Run later, in any order, they compute nothing of use; but then everything is compiled.
        """
        self._put_off = {}
        try:
            yield self._put_off
        finally:
            self._put_off = None

    def _split_scratch(
        self, device: torch.device, problem: Problem, config: Config, tiles: int
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Room for the parts of sums, and counters that are 0 between launches.

        One for all launches: they run one after the other. Kernels on two streams at once need two `Fused`.
        """
        floats, counts = 1, 1
        if config.splits > 1:
            counts = tiles * problem.nets
            floats = counts * config.splits * config.bm * config.bn
        found = self._scratch.get(device)
        if found is None or found[0].numel() < floats or found[1].numel() < counts:
            if found is not None:
                self._outgrown.append(found)
                # Twice as large each time, so that what is kept is never more than what is used.
                floats, counts = max(floats, 2 * found[0].numel()), max(counts, 2 * found[1].numel())
            floats, counts = max(floats, 8 << 20), max(counts, 4096)
            found = (torch.empty(floats, device=device), torch.zeros(counts, dtype=torch.int32, device=device))
            self._scratch[device] = found
        return found

    def layer_norm(self, x: torch.Tensor, norm: Affine) -> torch.Tensor:
        """Over the last axis of a (nets, B, H, W, C) map."""
        from runtime.fused.kernels import layer_norm_kernel

        nets, batch, height, width, channels = x.shape
        out = self.empty(x, *x.shape)
        _check_map("input", x)
        if x.device.type == "meta":
            return out
        padded = _power_of_two(channels)
        rows = max(1, 2048 // padded)
        m = batch * height * width
        self._launch(
            layer_norm_kernel,
            (-(-m // rows), nets),
            x,
            norm.gamma,
            norm.beta,
            out,
            m,
            channels,
            x.stride(3),
            out.stride(3),
            x.stride(0),
            out.stride(0),
            norm.gamma.stride(0),
            norm.epsilon,
            BM=rows,
            BC=padded,
            num_warps=4,
        )
        return out

    def group_norm(self, x: torch.Tensor, norm: Affine, act: str = "silu") -> torch.Tensor:
        """Of a dense (nets, B, H, W, C) map, by the GroupNorm plugin's kernels."""
        if x.device.type == "meta":
            return self.empty(x, *x.shape)
        from plugins.torch_operator import group_norm_silu, unavailable_reason

        if x.is_cuda and unavailable_reason() is not None:
            return _plain_group_norm(x, norm, act)
        maps = x.flatten(0, 1).permute(0, 3, 1, 2)
        y = group_norm_silu(maps, norm.gamma, norm.beta, None, norm.groups, norm.epsilon, act)
        return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        causal: bool = False,
        images: int = 0,
        config: Optional[AttentionConfig] = None,
    ) -> torch.Tensor:
        """Softmax attention.

        Parameters
        ----------
        q : (nets, Q, H, W, C) tensor
        k, v : (nets, K, S, C) tensors
            Each serves B / K images in a row.
        heads : int
        images : int
            B of the (nets, B, H, W, C) result; images beyond Q repeat the queries of the first. Default Q.
        causal : bool
            A query sees the keys up to its own place.

        Raises
        ------
        ValueError
            Rows do not begin at multiples of 16 bytes, or a head has an odd number of channels.
        """
        # TMA takes no others, and the kernel for all cards cannot copy them ahead (see there).
        for name, rows in (("queries", q), ("keys", k), ("values", v)):
            if not _has_whole_rows(rows):
                raise ValueError(
                    f"the {name} {tuple(rows.shape)} with strides {rows.stride()} do not begin at multiples of 16 bytes"
                )
        nets, queries, height, width, channels = q.shape
        batch = images or queries
        out = self.empty(q, nets, batch, height, width, channels)
        length, keys, dim = height * width, k.shape[2], channels // heads
        if dim % 2:
            raise ValueError(f"{heads} heads of {channels} channels have {dim} each, an odd number")
        problem = AttentionProblem(length, keys, dim, heads, nets * batch, causal)
        if q.device.type == "meta":
            self.asked_attention.add(problem)
            self.uses[problem.key()] += 1
            return out
        chosen = config or self.tuning.attention(problem)
        launch = self._launch_flash if chosen.teams else self._launch_attention
        launch(problem, chosen, q, k, v, out)
        return out

    def _launch_attention(
        self,
        problem: AttentionProblem,
        config: AttentionConfig,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        from runtime.fused.kernels import attention_kernel

        dim, batch = problem.dim, out.shape[1]
        d1, d2 = _parts_of_head(dim)
        eight = 16 // q.element_size()
        unit = 1 if all(step % 16 == 0 for x in (q, k, v) for step in x.stride()[:-1]) else eight
        self._launch(
            attention_kernel,
            (-(-problem.length // config.bm), problem.heads, problem.images),
            q,
            k,
            v,
            out,
            problem.length,
            problem.keys,
            q.stride(3) // unit,
            k.stride(2) // unit,
            v.stride(2) // unit,
            out.stride(3),
            q.stride(0) // unit,
            k.stride(0) // unit,
            v.stride(0) // unit,
            out.stride(0),
            q.stride(1) // unit,
            k.stride(1) // unit,
            v.stride(1) // unit,
            out.stride(1),
            batch,
            q.shape[1],
            batch // k.shape[1],
            dim**-0.5 * LOG2_E,
            D=dim,
            D1=d1,
            D2=d2,
            CAUSAL=problem.causal,
            EVEN=problem.keys % config.bn == 0,
            UNIT=unit,
            BM=config.bm,
            BN=config.bn,
            STAGES=config.stages,
            num_warps=config.warps,
            num_stages=config.stages,
        )

    def _launch_flash(
        self,
        problem: AttentionProblem,
        config: AttentionConfig,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        from runtime.fused.flash import flash_attention_kernel

        tiles_m = -(-problem.length // config.bm)
        tiles = tiles_m * problem.heads * problem.images
        batch, wide = out.shape[1], flash_width(problem)
        d1, d2 = _parts_of_head(problem.dim)
        self._launch(
            flash_attention_kernel,
            (min(tiles, flash_programs(problem, config, self.tuning.card)),),
            _heads_descriptor(q.flatten(2, 3), problem.heads, config.bm // config.teams, wide),
            *(_heads_descriptor(x, problem.heads, config.bn, wide) for x in (k, v)),
            out,
            problem.length,
            problem.keys,
            out.stride(3),
            out.stride(0),
            out.stride(1),
            tiles_m,
            tiles,
            problem.heads,
            batch,
            q.shape[1],
            batch // k.shape[1],
            problem.dim**-0.5 * LOG2_E,
            D=problem.dim,
            D1=d1,
            D2=d2,
            EVEN=problem.keys % config.bn == 0,
            STAGES=config.stages,
            TEAMS=config.teams,
            POLYNOMIALS=config.polynomials,
            num_warps=config.warps,
            maxnreg=flash_registers(problem, config),
        )

    def softmax(self, x: torch.Tensor) -> torch.Tensor:
        """Of the rows of a dense (1, 1, 1, R, C) map."""
        from runtime.fused.kernels import softmax_kernel

        out = self.empty(x, *x.shape)
        if x.device.type == "meta":
            return out
        channels = x.shape[-1]
        self._launch(
            softmax_kernel, (x.numel() // channels,), x, out, channels, channels, channels, BC=_power_of_two(channels)
        )
        return out

    def first_conv(
        self,
        x: torch.Tensor,
        weights: Weights,
        images: int,
        factor: float = 1.0,
        act: str = "none",
        added: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """3x3 convolution of a map of few channels.

        Parameters
        ----------
        x : (samples, C, H, W) tensor of any type and strides
            Multiplied by `factor` first.
        images : int
            B of the (nets, B, OH, OW, N) result; images beyond the samples repeat them.
        added : (1, N, OH, OW) tensor, optional
            Added to what the last net makes.
        """
        from runtime.fused.kernels import first_conv_kernel

        samples, channels, height, width = x.shape
        nets, n = weights.matrix.shape[:2]
        oh, ow = (-(-size // weights.stride) for size in (height, width))
        out = self.empty(x, nets, images, oh, ow, n)
        _check_map("output", out)
        if x.device.type == "meta":
            return out
        m = images * oh * ow
        bm, bn = 64, min(64, max(16, _power_of_two(n)))
        self._launch(
            first_conv_kernel,
            (-(-m // bm) * -(-n // bn), nets),
            x,
            weights.matrix,
            weights.bias,
            x if added is None else added,
            out,
            m,
            n,
            height,
            width,
            samples,
            factor,
            x.stride(1),
            x.stride(0),
            x.stride(2),
            x.stride(3),
            weights.matrix.stride(1),
            weights.matrix.stride(0),
            weights.bias.stride(0),
            0 if added is None else added.stride(1),
            out.stride(0),
            CIN=channels,
            STRIDE=weights.stride,
            ACT=act,
            ADDED_NET=-1 if added is None else nets - 1,
            BM=bm,
            BN=bn,
            BK=max(16, _power_of_two(9 * channels)),
            num_warps=4,
        )
        return out

    def guide(
        self,
        predicted: torch.Tensor,
        latent: torch.Tensor,
        noise_last: torch.Tensor,
        guidance_scale: torch.Tensor,
        coefficients: torch.Tensor,
        latent_next: torch.Tensor,
        noise: torch.Tensor,
    ) -> None:
        """Guidance and the update, of (1, 2 samples, H, W, C) float32 predictions; the rest as in the graph."""
        from runtime.fused.kernels import guide_kernel

        if predicted.device.type == "meta":
            return
        _, images, height, width, channels = predicted.shape
        m = images // 2 * height * width
        self._launch(
            guide_kernel,
            (-(-m * channels // 256),),
            predicted,
            latent,
            noise_last,
            guidance_scale,
            coefficients,
            latent_next,
            noise,
            m,
            height * width,
            N=channels,
            BM=256,
            num_warps=4,
        )

    def pixels(self, x: torch.Tensor, weights: Weights, out: torch.Tensor) -> None:
        """The last convolution of a (1, N, H, W, C) map, into an (N, H, W, 3) uint8 image."""
        from runtime.fused.kernels import pixels_kernel

        if x.device.type == "meta":
            return
        _, images, height, width, channels = x.shape
        m = images * height * width
        self._launch(
            pixels_kernel,
            (-(-m // 128),),
            x,
            weights.matrix,
            weights.bias,
            out,
            m,
            weights.out_channels,
            height,
            width,
            channels,
            BM=128,
            BN=16,
            BK=_block_of(channels, 64),
            STAGES=3,
            num_warps=4,
            num_stages=3,
        )

    def embed(self, ids: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(B, L) ids to the (1, B, 1, L, C) sums of token and position embedding."""
        from runtime.fused.kernels import embed_kernel

        batch, length = ids.shape
        channels = tokens.shape[1]
        out = self.empty(ids, 1, batch, 1, length, channels)
        if ids.device.type != "meta":
            self._launch(
                embed_kernel,
                (batch * length,),
                ids,
                tokens,
                positions,
                out,
                length,
                channels,
                BC=_power_of_two(channels),
            )
        return out


def _column_kernel(config: Config) -> Any:
    if config.feeder:
        from runtime.fused.fed_columns import fed_column_conv_kernel

        return fed_column_conv_kernel
    from runtime.fused.columns import column_conv_kernel

    return column_conv_kernel


def _variant(kernel: Any, operands: Sequence[Any], options: Mapping[str, Any]) -> Tuple[Any, ...]:
    """What Triton compiles a launch for: types, divisibility by 16, ones, boxes, and compile-time values."""
    kinds: List[Any] = []
    for operand in operands:
        if isinstance(operand, torch.Tensor):
            kinds.append((operand.dtype, operand.data_ptr() % 16 == 0))
        elif isinstance(operand, int):
            kinds.append((operand == 1, operand % 16 == 0, operand < 2**31))
        else:
            kinds.append((type(operand), tuple(getattr(operand, "block_shape", ()))))
    return (kernel, tuple(kinds), tuple(sorted(options.items())))


def _check_map(name: str, x: Optional[torch.Tensor]) -> None:
    """Raise ValueError unless a (nets, B, H, W, C) map is what the kernels can address."""
    if x is None:
        return
    _, batch, height, width, channels = x.shape
    image, row, pixel, channel = x.stride()[1:]
    rows = (height == 1 or row == width * pixel) and (batch == 1 or image == height * width * pixel)
    if not rows or (channels > 1 and channel != 1):
        raise ValueError(f"the {name} {tuple(x.shape)} with strides {x.stride()} is no row of pixels")
    if (batch * height * width - 1) * pixel + channels > MOST_ELEMENTS:
        raise ValueError(
            f"the {name} {tuple(x.shape)} has more elements than 32-bit offsets reach:"
            " take fewer samples or a smaller picture"
        )


def _plain_group_norm(x: torch.Tensor, norm: Affine, act: str) -> torch.Tensor:
    """By PyTorch's kernels, where the plugin's cannot be compiled; three launches a net instead of one for all."""
    nets = []
    for net, gamma, beta in zip(x, norm.gamma, norm.beta):
        y = F.group_norm(net.permute(0, 3, 1, 2).float(), norm.groups, gamma, beta, norm.epsilon)
        nets.append((F.silu(y) if act == "silu" else y).permute(0, 2, 3, 1))
    return torch.stack(nets).to(x.dtype)


def _map_descriptor(x: torch.Tensor, block: Tuple[int, ...], flat: bool) -> Any:
    """A (nets, B, H, W, C) map for TMA; `flat` makes one long row of all pixels of a net."""
    nets, batch, height, width, channels = x.shape
    step = x.stride(3)
    shape = [nets, 1, 1, batch * height * width, channels] if flat else list(x.shape)
    # Strides of axes with one entry are never used, but TMA wants them divisible by 16 bytes.
    pixels = shape[2] * shape[3]
    net_step = x.stride(0) if nets > 1 else shape[1] * pixels * step
    return _descriptor(x, shape, [net_step, pixels * step, shape[3] * step, step, 1], block)


def _is_even(x: torch.Tensor) -> bool:
    """Whether a map is what `_strided_descriptor` can describe: dense, of even height and width."""
    return x.is_contiguous() and x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0


def _strided_descriptor(x: torch.Tensor, block: Tuple[int, ...]) -> Any:
    """A (nets, B, H, W, C) map for TMA as (nets B, H / 2, 2, W / 2, 2 C), in which every second pixel is a box."""
    nets, batch, height, width, channels = x.shape
    row = width * channels
    shape = [nets * batch, height // 2, 2, width // 2, 2 * channels]
    return _descriptor(
        x, shape, [height * row, 2 * row, row, 2 * channels, 1], (block[1], block[2], 1, block[3], block[4])
    )


def _column_descriptor(x: torch.Tensor, block: Tuple[int, ...], swap: bool) -> Any:
    """A (nets, B, H, W, C) map for TMA as (nets, H, B, W, C): the images of a box lie side by side in each row.

    With `swap` its columns are the rows.
    """
    nets, batch, height, width, channels = x.shape
    step = x.stride(3)
    image = height * width * step
    net_step = x.stride(0) if nets > 1 else batch * image
    rows, pixels = (height, width * step), (width, step)
    if swap:
        rows, pixels = pixels, rows
    strides = [net_step, rows[1], image, pixels[1], 1]
    return _descriptor(x, [nets, rows[0], batch, pixels[0], channels], strides, block)


def _parts_descriptor(matrix: torch.Tensor, parts: int, block: Tuple[int, ...]) -> Any:
    """A (nets, rows, K) matrix for TMA as (nets, parts, rows of a part, K): a gated layer's two are one box."""
    nets, rows, depth = matrix.shape
    net, row = matrix.stride()[:2]
    return _descriptor(matrix, [nets, parts, rows // parts, depth], [net, rows // parts * row, row, 1], block)


def _has_whole_rows(x: torch.Tensor) -> bool:
    """Whether the rows, images and nets of a map begin at multiples of 16 bytes."""
    steps = [step for step, size in zip(x.stride()[:-1], x.shape) if size > 1]
    return x.data_ptr() % 16 == 0 and all(step * x.element_size() % 16 == 0 for step in steps)


def _heads_descriptor(x: torch.Tensor, heads: int, rows: int, wide: int) -> Any:
    """(nets, images, rows, C) rows for TMA as (nets, images, rows, heads, channels of one): beyond them are zeros."""
    nets, images, length, channels = x.shape
    net, image, row = x.stride()[:3]
    # As in `_map_descriptor`.
    row = row if length > 1 else channels
    image = image if images > 1 else length * row
    net = net if nets > 1 else images * image
    dim = channels // heads
    shape, strides = [nets, images, length, heads, dim], [net, image, row, dim, 1]
    return _descriptor(x, shape, strides, (1, 1, rows, 1, wide))


def _descriptor(tensor: torch.Tensor, shape: List[int], strides: List[int], block: Tuple[int, ...]) -> Any:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    element = {torch.bfloat16: gl.bfloat16, torch.float8_e4m3fn: gl.float8e4nv}.get(tensor.dtype, gl.float16)
    layout = gl.NVMMASharedLayout.get_default_for(list(block), element)
    return TensorDescriptor(tensor, shape, strides, list(block), layout)


def _block_of(channels: int, most: int) -> int:
    """The largest power of two up to `most` that divides the channels, 16 at least."""
    return max(16, math.gcd(channels, most))


def _parts_of_head(dim: int) -> Tuple[int, int]:
    """A head's channels as one power of two, or the sum of two; at least 16 each, which tensor cores take at once."""
    first = max(16, 1 << (dim.bit_length() - 1))
    return first, 0 if first >= dim else max(16, _power_of_two(dim - first))


def _power_of_two(value: int) -> int:
    return 1 << max(0, (value - 1).bit_length())
