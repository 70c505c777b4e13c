"""Triton kernels of the CUDA fast path: one matrix product for every convolution and linear layer, and its neighbours.

All maps are channels-last: a row is a pixel (or a token), its channels lie side by side. The UNet's encoder and the
ControlNet have the same layers with other weights, so every kernel takes a number of `nets` in the grid's last axis;
a stride says how far apart the nets' tensors lie.

Sums are FP32. With `SPLITS` above 1 the sum over the input channels is cut between several programs; the one that
comes last adds the parts in a fixed order, so the result is the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACT: tl.constexpr):
    """Of FP32 values; the Gluon kernels call it too."""
    if ACT == "silu":
        x = x * _sigmoid(x)
    elif ACT == "quick_gelu":
        x = x * _sigmoid(1.702 * x)
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x


@triton.jit
def _quantise(a, factor, FP8: tl.constexpr):
    """A block of a map as the tensor cores take it; in FP8 (e4m3) times a power of two.

    Beyond 448 the card's conversion saturates: to this type it has no other form (PTX's cvt, satfinite).
    """
    if FP8:
        a = (a * tl.full((), factor, a.dtype)).to(tl.float8e4nv)
    return a


@triton.jit
def _add_product(a, b, acc, FP8: tl.constexpr):
    """acc + a @ b.T.

    The tensor cores of 8.9 and 9.0 add FP8 products with 14 bits or so. So a block's sum begins at zero, and is added
    to those before in FP32.
    """
    if FP8:
        acc += tl.dot(a, b.T, max_num_imprecise_acc=b.shape[1])
    else:
        acc = tl.dot(a, b.T, acc)
    return acc


@triton.jit
def sum_of_parts(parts, splits, STEP: tl.constexpr, AHEAD: tl.constexpr):
    """A tile of a cut sum, its parts in order, STEP numbers apart; the Gluon kernels call it too.

    AHEAD parts are on their way at a time, 1, 2 or 4: one after the other each takes the L2 cache's whole latency.
    """
    acc = tl.load(parts, cache_modifier=".cg")
    for part in range(1, splits, AHEAD):
        # Behind the last part that one is read again, and not added: loads under a condition are not sent in a row.
        one = tl.load(parts + part * STEP, cache_modifier=".cg")
        if AHEAD >= 2:
            two = tl.load(parts + tl.minimum(part + 1, splits - 1) * STEP, cache_modifier=".cg")
        if AHEAD == 4:
            three = tl.load(parts + tl.minimum(part + 2, splits - 1) * STEP, cache_modifier=".cg")
            four = tl.load(parts + tl.minimum(part + 3, splits - 1) * STEP, cache_modifier=".cg")
        acc += one
        if AHEAD >= 2:
            acc += tl.where(part + 1 < splits, two, 0.0)
        if AHEAD == 4:
            acc += tl.where(part + 2 < splits, three, 0.0)
            acc += tl.where(part + 3 < splits, four, 0.0)
    return acc


@triton.jit
def _operands(
    bias, shift, residual, N, inside_n, inside_out, HAS_BIAS: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """What the epilogue adds: bias, the gate's bias, shift and residual, of a tile's pointers."""
    bias_values, gate_bias, shift_values, residual_values = 0.0, 0.0, 0.0, 0.0
    if HAS_BIAS:
        bias_values = tl.load(bias, mask=inside_n, other=0.0)
        if GATED:
            gate_bias = tl.load(bias + N, mask=inside_n, other=0.0)
    if HAS_SHIFT:
        shift_values = tl.load(shift, mask=inside_n, other=0.0)
    if HAS_RESIDUAL:
        residual_values = tl.load(residual, mask=inside_out, other=0.0)
    return bias_values, gate_bias, shift_values, residual_values


@triton.jit
def _begin(PDL: tl.constexpr):
    """With programmatic launch a kernel starts while the one before still runs, and waits here for its results."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


# Compiled once for all sizes of maps: a variant for each that divides by 16 would multiply what has to be compiled.
@triton.jit(
    do_not_specialize=("M", "H", "W", "OH", "OW", "splits", "scale_step", "scale_rows", "residual_rows"),
    do_not_specialize_on_alignment=("scale", "shift", "bias", "steps"),
)
def matmul_kernel(
    x,
    tail,
    w,
    bias,
    shift,
    residual,
    scale,
    out,
    partials,
    counters,
    M,
    N,
    CIN,
    CTAIL,
    H,
    W,
    OH,
    OW,
    ldx,
    ldtail,
    ldw,
    ldr,
    ldo,
    x_net,
    tail_net,
    w_net,
    bias_net,
    shift_net,
    residual_net,
    residual_rows,
    out_net,
    scale_step,
    scale_rows,
    splits,
    steps,
    factor,
    tail_factor,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    UP: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    FP8: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = residual + scale * act(conv(x) @ w.T + tail @ w_tail.T + bias + shift), or hidden * gelu(gate) if GATED.

    Rows are the M = batch * OH * OW pixels of the output. `w` is (N, TAPS * CIN + CTAIL); GATED has a second set of N
    rows below for the gate. UP is a 3x3 convolution of a map whose pixels count four times each: an output pixel sees
    2 x 2 input pixels, with one of four sets of summed weights by its place. The nets of the grid are these sets, and
    OH and OW the input's sizes.

    FP8: `w` holds e4m3 numbers that count `steps` (nets, rows of w) each, for maps times `factor` and `tail_factor`.
    """
    tiles_m = tl.cdiv(M, BM)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    net = tl.program_id(2).to(tl.int64)
    rows = (tile % tiles_m) * BM + tl.arange(0, BM)
    cols = (tile // tiles_m) * BN + tl.arange(0, BN)
    phase = tl.program_id(2)
    safe_rows = tl.where(rows < M, rows, 0)
    safe_cols = tl.where(cols < N, cols, 0)
    ks = tl.arange(0, BK)
    x += net * x_net
    w += net * w_net
    w_rows = w + safe_cols[:, None] * ldw + ks[None, :]
    image = safe_rows // (OH * OW)
    place = safe_rows % (OH * OW)
    oy = place // OW
    ox = place % OW
    blocks = tl.cdiv(CIN, BK)
    tail_blocks = 0
    if HAS_TAIL:
        tail_blocks = tl.cdiv(CTAIL, BK)
    total = TAPS * blocks + tail_blocks
    first = 0
    last = total
    if SPLIT:
        each = tl.cdiv(total, splits)
        first = split * each
        last = tl.minimum(first + each, total)
    acc = tl.zeros((BM, BN), tl.float32)
    gate = tl.zeros((BM, BN), tl.float32) if GATED else acc
    _begin(PDL)

    inside_n = cols < N
    inside_out = (rows < M)[:, None] & inside_n[None, :]
    bias += net * bias_net + cols
    shift += net * shift_net + cols
    residual += net * residual_net + (rows % residual_rows)[:, None] * ldr + cols[None, :]
    # What the epilogue adds is read now, if the registers have room for it: behind the sum the card would wait for it.
    EARLY: tl.constexpr = AHEAD >= 2
    if EARLY:
        operands = _operands(
            bias, shift, residual, N, inside_n, inside_out, HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, GATED
        )  # fmt: skip

    for k in tl.range(first, tl.minimum(last, TAPS * blocks), num_stages=STAGES):
        if TAPS == 1:
            c = k * BK
            if EVEN:
                a = tl.load(x + safe_rows[:, None] * ldx + (c + ks)[None, :])
            else:
                a = tl.load(x + safe_rows[:, None] * ldx + (c + ks)[None, :], mask=(c + ks)[None, :] < CIN, other=0.0)
            place_w = c
        else:
            tap = k // blocks
            c = (k - tap * blocks) * BK
            if UP:
                iy = oy + tap // 2 - 1 + phase // 2
                ix = ox + tap % 2 - 1 + phase % 2
            else:
                iy = oy * STRIDE + tap // 3 - 1
                ix = ox * STRIDE + tap % 3 - 1
            inside = (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W)
            pixel = (image * H + iy) * W + ix
            if EVEN:
                a = tl.load(x + pixel[:, None] * ldx + (c + ks)[None, :], mask=inside[:, None], other=0.0)
            else:
                inside_k = (c + ks)[None, :] < CIN
                a = tl.load(x + pixel[:, None] * ldx + (c + ks)[None, :], mask=inside[:, None] & inside_k, other=0.0)
            place_w = tap * CIN + c
        if EVEN:  # noqa: SIM108
            b = tl.load(w_rows + place_w)
        else:
            b = tl.load(w_rows + place_w, mask=(c + ks)[None, :] < CIN, other=0.0)
        a = _quantise(a, factor, FP8)
        acc = _add_product(a, b, acc, FP8)
        if GATED:
            if EVEN:
                g = tl.load(w_rows + N * ldw + place_w)
            else:
                g = tl.load(w_rows + N * ldw + place_w, mask=(c + ks)[None, :] < CIN, other=0.0)
            gate = _add_product(a, g, gate, FP8)

    if HAS_TAIL:
        tail += net * tail_net
        for k in tl.range(tl.maximum(first, TAPS * blocks), last, num_stages=STAGES):
            c = (k - TAPS * blocks) * BK
            if EVEN:
                a = tl.load(tail + safe_rows[:, None] * ldtail + (c + ks)[None, :])
                b = tl.load(w_rows + TAPS * CIN + c)
            else:
                inside_k = (c + ks)[None, :] < CTAIL
                a = tl.load(tail + safe_rows[:, None] * ldtail + (c + ks)[None, :], mask=inside_k, other=0.0)
                b = tl.load(w_rows + TAPS * CIN + c, mask=inside_k, other=0.0)
            acc = _add_product(_quantise(a, tail_factor, FP8), b, acc, FP8)

    done = True
    if SPLIT:
        tiles = tl.num_programs(0)
        whole = net * tiles + tile
        spot = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        mine = partials + (whole * splits + split) * (BM * BN)
        tl.store(mine + spot, acc)
        # Every thread's part is written before the count goes up, and the count is seen before any part is read.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + whole, 1, sem="acq_rel", scope="gpu")
        done = arrived == splits - 1
        if done:
            tl.debug_barrier()
            acc = sum_of_parts(partials + whole * splits * (BM * BN) + spot, splits, BM * BN, AHEAD)
            tl.store(counters + whole, 0)  # ready for the next launch
    if done:
        if FP8:
            steps += net * (2 * N if GATED else N)
            acc *= tl.load(steps + cols, mask=inside_n, other=0.0)[None, :]
            if GATED:
                gate *= tl.load(steps + N + cols, mask=inside_n, other=0.0)[None, :]
        if not EARLY:
            operands = _operands(
                bias, shift, residual, N, inside_n, inside_out, HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, GATED
            )  # fmt: skip
        if HAS_BIAS:
            acc += operands[0].to(tl.float32)[None, :]
        if GATED:
            if HAS_BIAS:
                gate += operands[1].to(tl.float32)[None, :]
            acc = acc * activate(gate, "gelu")
        if HAS_SHIFT:
            acc += operands[2].to(tl.float32)[None, :]
        acc = activate(acc, ACT)
        if HAS_SCALE:
            acc *= tl.load(scale + safe_rows // scale_rows * scale_step).to(tl.float32)[:, None]
        if HAS_RESIDUAL:
            acc += operands[3].to(tl.float32)
        if UP:
            rows = ((image * OH + oy) * 2 + phase // 2) * (2 * OW) + ox * 2 + phase % 2
        spots = out + net * out_net + rows[:, None] * ldo + cols[None, :]
        tl.store(spots, acc.to(out.dtype.element_ty), mask=inside_out)


@triton.jit(do_not_specialize=("M",))
def layer_norm_kernel(
    x,
    gamma,
    beta,
    out,
    M,
    C,
    ldx,
    ldo,
    x_net,
    out_net,
    param_net,
    eps,
    BM: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each of M rows of C channels, normalised; the variance is that of the centred row."""
    net = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BC)
    inside_c = cols < C
    inside = (rows < M)[:, None] & inside_c[None, :]
    g = tl.load(gamma + net * param_net + cols, mask=inside_c, other=0.0).to(tl.float32)
    b = tl.load(beta + net * param_net + cols, mask=inside_c, other=0.0).to(tl.float32)
    _begin(PDL)
    v = tl.load(x + net * x_net + rows[:, None] * ldx + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(v, axis=1) / C
    centred = tl.where(inside, v - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / C
    y = centred * tl.rsqrt(variance + eps)[:, None] * g[None, :] + b[None, :]
    tl.store(out + net * out_net + rows[:, None] * ldo + cols[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("L", "S", "batches", "queries", "keys_shared"))
def attention_kernel(
    q,
    k,
    v,
    out,
    L,
    S,
    ldq,
    ldk,
    ldv,
    ldo,
    q_net,
    k_net,
    v_net,
    out_net,
    q_batch,
    k_batch,
    v_batch,
    out_batch,
    batches,
    queries,
    keys_shared,
    factor,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Softmax attention of L queries over S keys, heads of D = D1 + D2 (less padding) channels (arXiv:2205.14135).

    `factor` is the scale of the scores times log2(e). Images beyond `queries` repeat the queries of the first;
    `keys_shared` images in a row have the same keys. EVEN: BN divides S, so no key needs a mask.

    Rows of q, k and v begin at multiples of 16 bytes, and the compiler has to know it to copy them ahead: what Triton
    3.6 makes for 9.0 of a loop over loads that it cannot copy ahead is wrong. Of strides that divide by 16 it does;
    where one does not, all of the three tensors' count UNIT elements.
    """
    if UNIT > 1:
        ldq, ldk, ldv = ldq * UNIT, ldk * UNIT, ldv * UNIT
        q_net, k_net, v_net = q_net * UNIT, k_net * UNIT, v_net * UNIT
        q_batch, k_batch, v_batch = q_batch * UNIT, k_batch * UNIT, v_batch * UNIT
    head = tl.program_id(1)
    net = (tl.program_id(2) // batches).to(tl.int64)
    image = (tl.program_id(2) % batches).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < L
    d1 = tl.arange(0, D1)
    d2 = D1 + tl.arange(0, D2 if D2 > 0 else 1)
    keys = tl.arange(0, BN)
    q += net * q_net + (image % queries) * q_batch + head * D
    k += net * k_net + (image // keys_shared) * k_batch + head * D
    v += net * v_net + (image // keys_shared) * v_batch + head * D
    out += net * out_net + image * out_batch + head * D
    _begin(PDL)
    q1 = tl.load(q + rows[:, None] * ldq + d1[None, :], mask=inside[:, None] & (d1 < D)[None, :], other=0.0)
    if D2 > 0:
        q2 = tl.load(q + rows[:, None] * ldq + d2[None, :], mask=inside[:, None] & (d2 < D)[None, :], other=0.0)
    top = tl.full((BM,), -1.0e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc1 = tl.zeros((BM, D1), tl.float32)
    acc2 = tl.zeros((BM, D2), tl.float32) if D2 > 0 else total
    for start in tl.range(0, S, BN, num_stages=STAGES):
        at = start + keys
        here = at < S
        k1 = tl.load(k + at[:, None] * ldk + d1[None, :], mask=here[:, None] & (d1 < D)[None, :], other=0.0)
        scores = tl.dot(q1, k1.T)
        if D2 > 0:
            k2 = tl.load(k + at[:, None] * ldk + d2[None, :], mask=here[:, None] & (d2 < D)[None, :], other=0.0)
            scores = tl.dot(q2, k2.T, scores)
        if CAUSAL:
            scores = tl.where(here[None, :] & (at[None, :] <= rows[:, None]), scores, -1.0e30)
        elif not EVEN:
            scores = tl.where(here[None, :], scores, -1.0e30)
        higher = tl.maximum(top, tl.max(scores, axis=1))
        # One fused multiply-add a score: the factor goes into the exponent together with the maximum.
        p = tl.exp2(scores * factor - (higher * factor)[:, None])
        shrink = tl.exp2((top - higher) * factor)
        total = total * shrink + tl.sum(p, axis=1)
        top = higher
        v1 = tl.load(v + at[:, None] * ldv + d1[None, :], mask=here[:, None] & (d1 < D)[None, :], other=0.0)
        acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * shrink[:, None])
        if D2 > 0:
            v2 = tl.load(v + at[:, None] * ldv + d2[None, :], mask=here[:, None] & (d2 < D)[None, :], other=0.0)
            acc2 = tl.dot(p.to(v2.dtype), v2, acc2 * shrink[:, None])
    acc1 = acc1 / total[:, None]
    spots = out + rows[:, None] * ldo + d1[None, :]
    tl.store(spots, acc1.to(out.dtype.element_ty), mask=inside[:, None] & (d1 < D)[None, :])
    if D2 > 0:
        acc2 = acc2 / total[:, None]
        spots = out + rows[:, None] * ldo + d2[None, :]
        tl.store(spots, acc2.to(out.dtype.element_ty), mask=inside[:, None] & (d2 < D)[None, :])


@triton.jit
def softmax_kernel(x, out, C, ldx, ldo, BC: tl.constexpr, PDL: tl.constexpr):
    """Softmax of each row of C scores."""
    row = tl.program_id(0)
    cols = tl.arange(0, BC)
    _begin(PDL)
    v = tl.load(x + row * ldx + cols, mask=cols < C, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(out + row * ldo + cols, (e / tl.sum(e, axis=0)).to(out.dtype.element_ty), mask=cols < C)


@triton.jit(do_not_specialize=("M", "H", "W", "samples", "x_channel", "x_image", "x_row", "x_col"))
def first_conv_kernel(
    x,
    w,
    bias,
    added,
    out,
    M,
    N,
    H,
    W,
    samples,
    factor,
    x_channel,
    x_image,
    x_row,
    x_col,
    ldw,
    w_net,
    bias_net,
    added_channel,
    out_net,
    CIN: tl.constexpr,
    STRIDE: tl.constexpr,
    ACT: tl.constexpr,
    ADDED_NET: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """3x3 convolution of a map of few channels, any strides and type, to channels-last rows, all taps in one product.

    The input is multiplied by `factor`. Images beyond `samples` repeat the first ones (the halves of guidance). To the
    net ADDED_NET the map `added` (N, H, W) is added.
    """
    tiles_m = tl.cdiv(M, BM)
    tile = tl.program_id(0)
    net = tl.program_id(1).to(tl.int64)
    rows = (tile % tiles_m) * BM + tl.arange(0, BM)
    cols = (tile // tiles_m) * BN + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    OH = (H + STRIDE - 1) // STRIDE
    OW = (W + STRIDE - 1) // STRIDE
    image = rows // (OH * OW)
    place = rows % (OH * OW)
    tap = ks // CIN
    iy = (place // OW)[:, None] * STRIDE + (tap // 3 - 1)[None, :]
    ix = (place % OW)[:, None] * STRIDE + (tap % 3 - 1)[None, :]
    inside = (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W) & (ks < 9 * CIN)[None, :] & (rows < M)[:, None]
    inside_n = cols < N
    b = tl.load(
        w + net * w_net + cols[:, None] * ldw + ks[None, :], mask=inside_n[:, None] & (ks < 9 * CIN)[None, :], other=0.0
    )
    shift = tl.load(bias + net * bias_net + cols, mask=inside_n, other=0.0).to(tl.float32)
    _begin(PDL)
    spots = (image % samples)[:, None] * x_image + iy * x_row + ix * x_col + (ks % CIN)[None, :] * x_channel
    a = tl.load(x + spots, mask=inside, other=0.0).to(tl.float32) * factor
    acc = tl.dot(a.to(b.dtype), b.T) + shift[None, :]
    inside_out = (rows < M)[:, None] & inside_n[None, :]
    if ADDED_NET >= 0:
        here = inside_out & (net == ADDED_NET)
        acc += tl.load(added + cols[None, :] * added_channel + place[:, None], mask=here, other=0.0).to(tl.float32)
    acc = activate(acc, ACT)
    tl.store(out + net * out_net + rows[:, None] * N + cols[None, :], acc.to(out.dtype.element_ty), mask=inside_out)


@triton.jit(do_not_specialize=("M",))
def guide_kernel(
    predicted,
    latent,
    noise_last,
    guidance,
    coefficients,
    latent_next,
    noise,
    M,
    AREA,
    N: tl.constexpr,
    BM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Guidance, and `A latent + B noise + C noise_last`.

    `predicted` are the M * N FP32 noises of the conditional half, channels-last, and behind them those of the other;
    latents and noises are (samples, N, H, W) of AREA = H * W pixels.
    """
    spots = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = spots < M * N
    image = spots // (N * AREA)
    channel = spots // AREA % N
    row = image * AREA + spots % AREA
    _begin(PDL)
    cond = tl.load(predicted + row * N + channel, mask=inside, other=0.0)
    uncond = tl.load(predicted + (M + row) * N + channel, mask=inside, other=0.0)
    guided = uncond + tl.load(guidance) * (cond - uncond)
    moved = tl.load(coefficients) * tl.load(latent + spots, mask=inside, other=0.0)
    moved += tl.load(coefficients + 1) * guided
    moved += tl.load(coefficients + 2) * tl.load(noise_last + spots, mask=inside, other=0.0)
    tl.store(latent_next + spots, moved, mask=inside)
    tl.store(noise + spots, guided, mask=inside)


@triton.jit
def pixels_kernel(
    x,
    w,
    bias,
    out,
    M,
    N,
    H,
    W,
    C,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """The autoencoder's last convolution, and from [-1, 1] to uint8 (samples, H, W, N), rounded down."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BN)
    safe_rows = tl.where(rows < M, rows, 0)
    place = safe_rows % (H * W)
    shift = tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)
    _begin(PDL)
    ks = tl.arange(0, BK)
    image = safe_rows // (H * W)
    acc = tl.zeros((BM, BN), tl.float32)
    blocks = tl.cdiv(C, BK)
    for k in tl.range(0, 9 * blocks, num_stages=STAGES):
        tap = k // blocks
        c = (k - tap * blocks) * BK + ks
        iy = place // W + tap // 3 - 1
        ix = place % W + tap % 3 - 1
        inside = ((iy >= 0) & (iy < H) & (ix >= 0) & (ix < W))[:, None] & (c < C)[None, :]
        pixel = (image * H + iy) * W + ix
        a = tl.load(x + pixel[:, None] * C + c[None, :], mask=inside, other=0.0)
        weights = w + cols[:, None] * (9 * C) + (tap * C + c)[None, :]
        b = tl.load(weights, mask=(cols < N)[:, None] & (c < C)[None, :], other=0.0)
        acc = tl.dot(a, b.T, acc)
    value = tl.minimum(tl.maximum((acc + shift[None, :]) * 127.5 + 127.5, 0.0), 255.0)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(out + rows[:, None] * N + cols[None, :], tl.floor(value).to(tl.uint8), mask=inside)


@triton.jit
def embed_kernel(ids, tokens, positions, out, L, C, BC: tl.constexpr, PDL: tl.constexpr):
    """Token plus position embedding of each of the rows of `ids`."""
    row = tl.program_id(0)
    cols = tl.arange(0, BC)
    inside = cols < C
    _begin(PDL)
    token = tl.load(ids + row).to(tl.int64)
    value = tl.load(tokens + token * C + cols, mask=inside).to(tl.float32)
    value += tl.load(positions + (row % L) * C + cols, mask=inside).to(tl.float32)
    tl.store(out + row * C + cols, value.to(out.dtype.element_ty), mask=inside)
