"""Operands of the fused kernels and what they must give, in float64; for the interpreter and for a GPU alike."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from runtime.fused.fp8 import factor_of, quantise
from runtime.fused.ops import Fused, Weights
from runtime.fused.packing import Packer
from runtime.fused.tuning import Card, Config, Problem, box, fits

CARD = Card("a card of tests", 80, 16, 99 * 1024)
# Of a result that is rounded to the nearest once; uniform rounding gives 1.4e-4 to 2.8e-4.
HALF_ERROR = {torch.float16: 3e-4, torch.bfloat16: 2.4e-3}
# Of a sum of products of e4m3 numbers: a number's error is 2.6 % of it, a product's 3.7 %.
FP8_ERROR = 0.045


class Matmul(NamedTuple):
    """One product, by its sizes and by what is added to it.

    Attributes
    ----------
    kind : {"linear", "conv", "up"}
    residual, scale : int
        How many images have one of their own; 0 for none at all.
    margin : int
        Channels beside those of every map, in the tensor that it is a slice of.
    fp8 : float
        0, or by how much the maps' factors are larger than those that the largest number asks for.
    """

    kind: str = "linear"
    nets: int = 1
    batch: int = 1
    height: int = 3
    width: int = 5
    cin: int = 32
    n: int = 24
    stride: int = 1
    tail: int = 0
    gated: bool = False
    bias: bool = True
    shift: bool = False
    residual: int = 0
    scale: int = 0
    act: str = "none"
    margin: int = 0
    out: str = ""
    fp8: float = 0

    @property
    def taps(self) -> int:
        return {"linear": 1, "conv": 9, "up": 4}[self.kind]

    def problem(self) -> Problem:
        height, width = (-(-size // self.stride) for size in (self.height, self.width))
        nets = 4 if self.kind == "up" else self.nets
        m = self.batch * height * width
        made = Problem(nets, m, self.n, self.cin, self.tail, self.taps, self.stride, self.gated, height, width)
        return made._replace(fp8=self.fp8 > 0)


ACTIVATIONS = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Operands:
    """Tensors of a case, drawn on the CPU so that they are the same everywhere."""

    def __init__(self, case: Matmul, device: str = "cpu", dtype: torch.dtype = torch.float16) -> None:
        self.case = case
        self.device = device
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(len(repr(case)) + 7 * case.n + case.cin)
        c = case
        self.oh, self.ow = (-(-size // c.stride) * (2 if c.kind == "up" else 1) for size in (c.height, c.width))
        self.x = self.map(c.nets, c.batch, c.height, c.width, c.cin)
        self.tail = self.map(c.nets, c.batch, self.oh, self.ow, c.tail) if c.tail else None
        self.residual = self.map(c.nets, c.residual, self.oh, self.ow, c.n) if c.residual else None
        # As the step has them: the nets' numbers in one row, with others between them, and columns of a matrix.
        self.shift = (self.normal(c.nets * (c.n + 5)).to(device, dtype), c.n + 5) if c.shift else None
        self.scale = self.normal(c.scale, 3).to(device)[:, 1] if c.scale else None
        self.convs = [nn.Conv2d(c.cin, c.n, 3, padding=1) for _ in range(c.nets)] if c.kind == "up" else None
        self.weights = self._up_weights() if self.convs else self._weights()
        self.packed = self._fp8_weights() if case.fp8 else self.weights

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)

    def map(self, nets: int, batch: int, height: int, width: int, channels: int) -> torch.Tensor:
        """A slice of a map that has `margin` channels on both sides; there are numbers there that spoil every sum."""
        margin = self.case.margin
        whole = torch.full((nets, batch, height, width, channels + 2 * margin), 1e4)
        whole[..., margin : margin + channels] = self.normal(nets, batch, height, width, channels)
        return whole.to(self.device, self.dtype)[..., margin : margin + channels]

    def _weights(self) -> Weights:
        c = self.case
        rows, depth = c.n * (2 if c.gated else 1), c.taps * c.cin + c.tail
        matrix = (self.normal(c.nets, rows, depth) * depth**-0.5).to(self.device, self.dtype)
        bias = self.normal(c.nets, rows).to(self.device) if c.bias else None
        return Weights(matrix, bias, c.taps, c.tail, c.stride, c.gated)

    def _up_weights(self) -> Weights:
        assert self.convs is not None
        (conv,) = self.convs
        conv.requires_grad_(False)
        conv.weight.copy_(self.normal(*conv.weight.shape) * (9 * self.case.cin) ** -0.5)
        conv.bias.copy_(self.normal(self.case.n))
        return Packer(self.device, self.dtype).up_conv(conv)

    def _fp8_weights(self) -> Weights:
        maps = ((self.x, 1), (self.tail, 8))  # two factors that are not the same
        factors = [self.case.fp8 * factor_of(part * float(m.abs().max())) for m, part in maps if m is not None]
        matrix, scaling = quantise(self.weights.matrix, self.case.tail, *factors)
        return replace(self.weights, matrix=matrix, fp8=scaling)

    def rounded(self) -> Operands:
        """A copy whose numbers are those that FP8 multiplies."""
        scaling, other = self.packed.fp8, copy.copy(self)
        assert scaling is not None
        other.x = _e4m3(self.x, scaling.factor)
        other.tail = None if self.tail is None else _e4m3(self.tail, scaling.tail_factor)
        matrix = self.packed.matrix.double() * scaling.steps.double()[..., None]
        inner = self.packed.taps * self.case.cin
        matrix = torch.cat([matrix[..., :inner] * scaling.factor, matrix[..., inner:] * scaling.tail_factor], dim=2)
        other.weights = replace(self.weights, matrix=matrix)
        return other

    def wanted(self) -> torch.Tensor:
        """The (nets, B, OH, OW, N) result in float64, by PyTorch's convolutions."""
        nets = torch.stack([self._net(i) for i in range(self.case.nets)])
        if self.residual is not None:
            repeats = self.case.batch // self.case.residual
            nets = nets + self.residual.double().repeat(1, repeats, 1, 1, 1)
        return nets

    def _net(self, i: int) -> torch.Tensor:
        c = self.case
        x = self.x[i].double().permute(0, 3, 1, 2)
        if self.convs and self.weights.matrix.dtype == torch.float64:
            return ACTIVATIONS[c.act](self._by_phases(x)).permute(0, 2, 3, 1)
        if self.convs:
            conv = self.convs[i]
            enlarged = F.interpolate(x, scale_factor=2, mode="nearest")
            y = F.conv2d(enlarged, conv.weight.double().to(self.device), conv.bias.double().to(self.device), padding=1)
            return ACTIVATIONS[c.act](y).permute(0, 2, 3, 1)
        if c.gated:
            hidden, gate = self._layer(i, x, slice(0, c.n)), self._layer(i, x, slice(c.n, 2 * c.n))
            return (hidden * F.gelu(gate)).permute(0, 2, 3, 1)
        y = self._layer(i, x, slice(0, c.n))
        if self.shift is not None:
            vector, step = self.shift
            y = y + vector.double()[i * step : i * step + c.n, None, None]
        y = ACTIVATIONS[c.act](y)
        if self.scale is not None:
            y = y * self.scale.double().repeat_interleave(c.batch // c.scale)[:, None, None, None]
        return y.permute(0, 2, 3, 1)

    def _by_phases(self, x: torch.Tensor) -> torch.Tensor:
        """Four 2x2 convolutions, each of which makes the pixels of one place in their squares of four."""
        y = x.new_empty(self.case.batch, self.case.n, self.oh, self.ow)
        for phase, matrix in enumerate(self.weights.matrix):
            down, right = divmod(phase, 2)
            kernel = matrix.unflatten(1, (2, 2, self.case.cin)).permute(0, 3, 1, 2)
            around = F.pad(x, (1 - right, right, 1 - down, down))
            bias = None if self.weights.bias is None else self.weights.bias[phase].double()
            y[:, :, down::2, right::2] = F.conv2d(around, kernel, bias)
        return y

    def _layer(self, i: int, x: torch.Tensor, rows: slice) -> torch.Tensor:
        c = self.case
        matrix = self.weights.matrix[i, rows].double()
        bias = None if self.weights.bias is None else self.weights.bias[i, rows].double()
        size = 3 if c.kind == "conv" else 1
        kernel = matrix[:, : c.taps * c.cin].unflatten(1, (size, size, c.cin)).permute(0, 3, 1, 2)
        y = F.conv2d(x, kernel, bias, stride=c.stride, padding=size // 2)
        if self.tail is not None:
            y = y + F.conv2d(self.tail[i].double().permute(0, 3, 1, 2), matrix[:, c.taps * c.cin :, None, None])
        return y

    def target(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """A slice full of NaN for the result, and all of the tensor that it is a slice of; 7 beside the slice."""
        c = self.case
        dtype = getattr(torch, c.out) if c.out else self.dtype
        whole = torch.full((c.nets, c.batch, self.oh, self.ow, c.n + 2 * c.margin), 7.0)
        whole[..., c.margin : c.margin + c.n] = float("nan")
        whole = whole.to(self.device, dtype)
        return whole[..., c.margin : c.margin + c.n], whole

    def run(self, fused: Fused, config: Optional[Config], repeats: int = 1) -> Dict[str, Any]:
        """Relative error, whether all runs agree bit by bit, and what was written where nothing should be."""
        c = self.case
        results, beside = [], True
        for _ in range(repeats):
            out, whole = self.target()
            operands = (self.tail, self.shift, self.residual, self.scale)
            fused.matmul(self.x, self.packed, out, *operands, c.act, config)
            results.append(out.double())
            beside = beside and bool((whole[..., : c.margin] == 7).all() and (whole[..., c.margin + c.n :] == 7).all())
        (_, counters) = next(iter(fused._scratch.values()))
        of_fp8 = {"before rounding": relative(results[0], self.wanted())} if self.case.fp8 else {}
        return {
            **of_fp8,
            "error": relative(results[0], (self.rounded() if self.case.fp8 else self).wanted()),
            "same": all(torch.equal(result, results[0]) for result in results),
            "beside": beside,
            "counters": int(counters.abs().sum()),
        }

    def bound(self) -> float:
        """Largest relative error that rounding explains."""
        if self.case.fp8 and self.device != "cpu":
            return 2e-3  # tensor cores add FP8 products with 14 bits or so
        if self.case.out == "float32":
            return 2e-6 if self.device == "cpu" else 2e-5  # tensor cores cut off where a processor rounds
        # The summed weights of an up-convolution are rounded themselves.
        return HALF_ERROR[self.dtype] * (1.5 if self.case.kind == "up" else 1.0)


def _e4m3(map_: torch.Tensor, factor: float) -> torch.Tensor:
    """What is left of a map's numbers, in float64."""
    return (map_.float() * factor).clamp(-448, 448).to(torch.float8_e4m3fn).double() / factor


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to the wanted tensor's norm; NaN where one is found."""
    return float((found.double() - wanted).norm() / wanted.norm())


# Sums of 2 to 20 blocks, maps that no tile divides, channels that no block divides.
PLAIN = Config(16, 16, 16, 4, 2)
WIDE = Config(32, 32, 32, 4, 2)
MATMULS: Dict[str, Tuple[Matmul, Config]] = {
    "linear": (Matmul(batch=2, height=1, width=19), WIDE),
    "linear without bias": (Matmul(bias=False), PLAIN),
    "linear, one row": (Matmul(height=1, width=1), PLAIN),
    "linear, ragged": (Matmul(cin=40, n=21), WIDE),
    "linear, two nets": (Matmul(nets=2, batch=2, shift=True, residual=1), PLAIN),
    "linear, slices": (Matmul(nets=2, cin=24, n=20, residual=1, margin=8), PLAIN),
    "linear in FP32": (Matmul(cin=64, out="float32"), WIDE),
    "linear, silu": (Matmul(act="silu"), PLAIN),
    "linear, gelu": (Matmul(act="gelu"), PLAIN),
    "linear, quick gelu": (Matmul(act="quick_gelu"), PLAIN),
    "shift before the activation": (Matmul(shift=True, act="silu", residual=1), PLAIN),
    "scale and residual of all images": (Matmul(batch=4, scale=2, residual=2), PLAIN),
    "scale of one image": (Matmul(batch=3, scale=1, residual=1, act="silu"), PLAIN),
    "scale by image": (Matmul(batch=3, scale=3, margin=4), PLAIN),
    "gated": (Matmul(nets=2, cin=40, n=21, gated=True), WIDE),
    "gated, slices": (Matmul(n=32, gated=True, margin=8), PLAIN),
    "gated without bias": (Matmul(n=32, gated=True, bias=False), PLAIN),
    "conv": (Matmul("conv", batch=2, cin=32), WIDE),
    "conv, ragged": (Matmul("conv", cin=20, n=21), PLAIN),
    "conv of one pixel": (Matmul("conv", batch=2, height=1, width=1), PLAIN),
    "conv, two nets": (Matmul("conv", nets=2, batch=2, cin=16, shift=True, residual=2), PLAIN),
    "conv, slices": (Matmul("conv", nets=2, cin=16, margin=8, residual=1), PLAIN),
    "conv with a tail": (Matmul("conv", nets=2, cin=16, tail=32), PLAIN),
    "conv with a ragged tail": (Matmul("conv", cin=16, tail=24, margin=4), PLAIN),
    "conv, few channels of output": (Matmul("conv", n=4, out="float32"), PLAIN),
    "stride 2": (Matmul("conv", nets=2, batch=2, height=4, width=6, cin=16, stride=2), PLAIN),
    "stride 2, odd": (Matmul("conv", height=5, width=7, cin=16, stride=2, act="silu"), PLAIN),
    "up": (Matmul("up", batch=2), WIDE),
    "up, ragged": (Matmul("up", height=1, width=4, cin=20, n=21), PLAIN),
    "up, slices": (Matmul("up", height=2, width=2, margin=8, act="silu"), PLAIN),
}
# Blocks of 32 and of 64, and of 1000 numbers some that are cut off.
DEEP = Config(32, 16, 64, 4, 2)
FP8: Dict[str, Tuple[Matmul, Config]] = {
    "linear": (Matmul(batch=2, height=1, width=19, cin=64, out="float32", fp8=1), DEEP),
    "linear, two nets": (Matmul(nets=2, batch=2, shift=True, residual=1, fp8=1), WIDE),
    "linear, saturated": (Matmul(cin=64, fp8=64), DEEP),
    "scale by image": (Matmul(batch=4, cin=32, scale=2, residual=2, act="silu", fp8=1), WIDE),
    "gated": (Matmul(nets=2, n=40, gated=True, fp8=1), WIDE),
    "conv, two nets": (Matmul("conv", nets=2, batch=2, shift=True, residual=2, fp8=1), WIDE),
    "conv with a tail": (Matmul("conv", nets=2, cin=32, tail=64, margin=8, out="float32", fp8=1), WIDE),
    "stride 2": (Matmul("conv", batch=2, height=4, width=6, stride=2, fp8=1), WIDE),
    "up": (Matmul("up", batch=2, n=21, act="silu", fp8=1), WIDE),
}
MATMULS.update({f"fp8 {_name}": _case for _name, _case in FP8.items()})
# Parts that begin in the middle of a tap, in the tail, and behind the end.
_SPLIT = {
    "linear, two nets": (2,),
    "linear, slices": (3,),
    "scale and residual of all images": (2,),
    "conv, two nets": (2, 3),
    "conv with a tail": (2, 3, 7),
    "conv with a ragged tail": (3,),
    "stride 2": (5,),
    "up": (2, 3),
    "fp8 conv with a tail": (3,),
}
for _name, _counts in _SPLIT.items():
    for _count in _counts:
        _case, _config = MATMULS[_name]
        MATMULS[f"{_name}, {_count} parts"] = (_case, _config._replace(splits=_count))


class Attention(NamedTuple):
    """Sizes of one attention; `images` beyond `queries` repeat them, `key_images` serve as many in a row each."""

    dim: int
    nets: int = 1
    queries: int = 2
    images: int = 2
    key_images: int = 2
    length: int = 9
    keys: int = 21
    heads: int = 2
    causal: bool = False
    margin: int = 16

    def operands(self, device: str = "cpu", dtype: torch.dtype = torch.float16) -> Tuple[torch.Tensor, ...]:
        """Slices of wider rows, as of query, key and value side by side; the scores are a few units large."""
        generator = torch.Generator().manual_seed(self.dim + self.keys)
        channels = self.heads * self.dim
        rows = torch.randn((self.nets, self.queries, 1, self.length, channels + self.margin), generator=generator)
        pairs = torch.randn((self.nets, self.key_images, self.keys, 2 * channels + self.margin), generator=generator)
        q, kv = (2 * rows).to(device, dtype), pairs.to(device, dtype)
        return q[..., 8 : 8 + channels], kv[..., 8 : 8 + channels], kv[..., 8 + channels : 8 + 2 * channels]

    def wanted(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = q.double().flatten(2, 3).repeat(1, self.images // self.queries, 1, 1)
        k, v = (t.double().repeat_interleave(self.images // self.key_images, dim=1) for t in (k, v))
        q, k, v = (t.unflatten(3, (self.heads, self.dim)).transpose(2, 3) for t in (q, k, v))
        scores = q @ k.transpose(3, 4) / self.dim**0.5
        if self.causal:
            ahead = torch.ones(self.length, self.keys, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(ahead, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(2, 3).flatten(3, 4)[:, :, None]


ATTENTIONS: Dict[str, Attention] = {
    **{f"dim {dim}": Attention(dim) for dim in (8, 16, 24, 40, 64, 80)},
    "causal": Attention(16, length=21, causal=True),
    "causal, two blocks of rows": Attention(24, length=37, keys=37, causal=True),
    "keys of two halves": Attention(16, nets=2, queries=4, images=4),
    "queries of one half": Attention(16, nets=2, queries=2, images=4),
    "one query": Attention(40, queries=1, images=2, length=1),
    "keys that fill their blocks": Attention(16, keys=32),
    "rows that begin at odd multiples of 16 bytes": Attention(40, length=70, keys=100, margin=24),
}


# Whole blocks of channels, as the kernels with boxes want them, and sides that no tile divides.
RAGGED = {
    "conv": Matmul("conv", nets=2, batch=3, height=9, width=7, cin=64, n=40, margin=8, residual=3, shift=True),
    "tail": Matmul("conv", nets=2, batch=3, height=3, width=5, cin=128, n=24, tail=64, margin=8),
    "up": Matmul("up", batch=3, height=5, width=3, cin=128, n=24),
    "upright": Matmul("conv", batch=2, height=8, width=12, cin=64, n=72, act="silu"),
    "stride 2": Matmul("conv", nets=2, batch=3, height=6, width=10, cin=64, n=24, stride=2),
}


def boxed(case: Matmul, splits: int, card: Card) -> List[Config]:
    """Configurations of the kernel for compute capability 9.0 where it can run a case, however small."""
    problem = case.problem()
    if case.margin % 8:
        return []  # TMA's rows begin at whole multiples of 16 bytes
    bk = 64 if case.cin >= 64 else 32
    shapes = ((64, 32, 4, 3), (128, 64, 4, 4))
    made = [Config(bm, bn, bk, warps, stages, splits, *box(problem, bm)) for bm, bn, warps, stages in shapes]
    # And of the one with a warp that feeds: rings longer than the sum, and groups of warps that have to meet.
    made += [
        Config(bm, bn, bk, warps, stages, splits, *box(problem, bm), feeder=1)
        for bm, bn, warps, stages in ((64, 32, 4, 2), (64, 64, 4, 8), (128, 64, 8, 3))
    ]
    # And of the one whose taps share boxes, with tiles of one image and of two.
    made += [
        Config(bm, bn, bk, warps, stages, splits, by, 8, boxes)
        for bm, bn, warps, stages, by, boxes in ((64, 64, 4, 3, 8, 2), (64, 128, 4, 4, 4, 3), (128, 64, 8, 4, 16, 2))
    ]
    made += [
        Config(bm, bn, bk, warps, stages, splits, by, 8, boxes, feeder=1)
        for bm, bn, warps, stages, by, boxes in ((64, 64, 4, 2, 8, 2), (64, 32, 4, 7, 4, 4), (128, 64, 8, 3, 16, 3))
    ]
    # With eight pixels down.
    made.append(Config(64, 64, bk, 4, 4, splits, 8, 4, 3))
    # And of the one whose rows stay: tiles behind the last, a team without tiles, rings longer than a walk.
    made += [
        Config(bm, bn, bk, 4, stages, splits, by=1, bx=bm, teams=teams, walk=walk)
        for bm, bn, stages, teams, walk in ((64, 32, 2, 1, 1), (128, 32, 3, 1, 2), (64, 64, 3, 2, 1), (64, 32, 2, 2, 5))
    ]
    return [config for config in made if fits(problem, config, card)]
