"""The matrix product for compute capability 9.0: tiles come by TMA, the tensor cores read them from shared memory.

A tile of a convolution's input is a box of pixels; moved by a tap it may stick out of the map, where TMA fills in the
zeros of the padding. So the inner loop has no addresses and no masks to work out. Written in Gluon, where the pipeline
is explicit: `STAGES` slots, each with a barrier that counts the bytes of its two or three boxes.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.fused.kernels import activate, sum_of_parts


@gluon.jit
def next_slot(slot, phase, STAGES: gl.constexpr):
    """A ring's next slot, and the phase of its barrier."""
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def copy_weights(
    tap, block, slot, w, net, n0, n, cin, b_slots, g_slots, bars, SIZE: gl.constexpr, GATED: gl.constexpr,
    BK: gl.constexpr,
):  # fmt: skip
    """Start the copy of a block of a tap's weights; the slot's barrier waits for all of its SIZE bytes.

    Behind the taps' channels, each with a whole number of blocks, lie those of the other map: tap TAPS.
    """
    bar = bars.index(slot)
    mbarrier.expect(bar, SIZE)
    at = tap * cin + block * BK
    tma.async_copy_global_to_shared(w, [net, n0, at], bar, b_slots.index(slot))
    if GATED:
        tma.async_copy_global_to_shared(w, [net, n + n0, at], bar, g_slots.index(slot))


@gluon.jit
def copy_pixels(
    tap, block, slot, x, tail, x_net, b0, y0, x0, phase, cin, a_slots, bars, TAPS: gl.constexpr, STRIDE: gl.constexpr,
    HAS_TAIL: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """The same of the pixels: the tile's box, moved by the tap."""
    bar = bars.index(slot)
    a = a_slots.index(slot)
    if TAPS == 9:
        dy = tap // 3 - 1
        dx = tap % 3 - 1
    elif TAPS == 4:
        dy = tap // 2 - 1 + phase // 2
        dx = tap % 2 - 1 + phase % 2
    else:
        dy = 0
        dx = 0
    c = block * BK
    if STRIDE == 2:
        # Of every second pixel: the odd ones are half a row, and an odd pixel's channels a pixel's, further on. The
        # first tap's row is the odd one above.
        odd_y = dy & 1
        row = y0 - (dy < 0).to(gl.int32)
        column = x0 - (dx < 0).to(gl.int32)
        tma.async_copy_global_to_shared(x, [b0, row, odd_y, column, (dx & 1) * cin + c], bar, a)
    else:
        of_map = True
        if HAS_TAIL:
            of_map = tap < TAPS
        if of_map:
            tma.async_copy_global_to_shared(x, [x_net, b0, y0 + dy, x0 + dx, c], bar, a)
        else:
            tma.async_copy_global_to_shared(tail, [x_net, b0, y0, x0, c], bar, a)


@gluon.jit
def _load_weights(
    k, slot, w, net, n0, n, blocks, cin, b_slots, g_slots, bars, SIZE: gl.constexpr, TAPS: gl.constexpr,
    GATED: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Start the copy of the weights of block `k` of the sum."""
    tap = gl.minimum(k // blocks, TAPS)
    copy_weights(tap, k - tap * blocks, slot, w, net, n0, n, cin, b_slots, g_slots, bars, SIZE, GATED, BK)


@gluon.jit
def _load_pixels(
    k, slot, x, tail, x_net, b0, y0, x0, phase, cin, blocks, a_slots, bars, TAPS: gl.constexpr, STRIDE: gl.constexpr,
    HAS_TAIL: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """The same of the pixels."""
    tap = gl.minimum(k // blocks, TAPS)
    copy_pixels(
        tap, k - tap * blocks, slot, x, tail, x_net, b0, y0, x0, phase, cin, a_slots, bars, TAPS, STRIDE, HAS_TAIL, BK
    )  # fmt: skip


@gluon.constexpr_function
def rows_layout(BN, num_warps):
    """Of a tile in the registers: eight neighbouring channels a thread, for accesses of 16 bytes."""
    lanes = min(BN // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [num_warps, 1], [1, 0])


@gluon.jit
def tile_place(
    tile, tiles_x, tiles_y, images, BB: gl.constexpr, BY: gl.constexpr, BX: gl.constexpr, BN: gl.constexpr
):  # fmt: skip
    """A tile's first channel, column, row and image; neighbours have the same channels."""
    tiles_m = tiles_x * tiles_y * gl.cdiv(images, BB)
    tile_m = tile % tiles_m
    n0 = (tile // tiles_m) * BN
    x0 = (tile_m % tiles_x) * BX
    y0 = (tile_m // tiles_x % tiles_y) * BY
    b0 = (tile_m // (tiles_x * tiles_y)) * BB
    return n0, x0, y0, b0


@gluon.jit
def part_of_sum(split, splits, total, SPLIT: gl.constexpr):
    """The first block of a program's part of the sum, and that behind its last."""
    first = 0
    last = total
    if SPLIT:
        first = split * total // splits
        last = (split + 1) * total // splits
    return first, last


@gluon.jit
def box_pixels(
    b0, y0, x0, BY: gl.constexpr, BX: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, num_warps: gl.constexpr
):  # fmt: skip
    """Of a tile's rows, the pixels of a box: image, y and x of the output."""
    r = gl.arange(0, BM, layout=gl.SliceLayout(1, rows_layout(BN, num_warps)))
    image = b0 + r // (BY * BX)
    oy = y0 + r // BX % BY
    ox = x0 + r % BX
    return image, oy, ox


@gluon.jit
def epilogue_operands(
    image, oy, ox, n0, net, bias, shift, residual, images, N, OH, OW, ldr, bias_net, shift_net, residual_net,
    residual_rows, HAS_BIAS: gl.constexpr, HAS_SHIFT: gl.constexpr, HAS_RESIDUAL: gl.constexpr, GATED: gl.constexpr,
    BN: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """What `finish` adds: bias, the gate's bias, shift and residual."""
    flat: gl.constexpr = rows_layout(BN, num_warps)
    cols = n0 + gl.arange(0, BN, layout=gl.SliceLayout(0, flat))
    inside_n = cols < N
    far = net.to(gl.int64)
    bias_values, gate_bias, shift_values, residual_values = 0.0, 0.0, 0.0, 0.0
    if HAS_BIAS:
        bias_values = gl.load(bias + far * bias_net + cols, mask=inside_n, other=0.0)
        if GATED:
            gate_bias = gl.load(bias + far * bias_net + N + cols, mask=inside_n, other=0.0)
    if HAS_SHIFT:
        shift_values = gl.load(shift + far * shift_net + cols, mask=inside_n, other=0.0)
    if HAS_RESIDUAL:
        inside = ((image < images) & (oy < OH) & (ox < OW))[:, None] & inside_n[None, :]
        rows = ((image * OH + oy) * OW + ox) % residual_rows
        spots = residual + far * residual_net + rows[:, None] * ldr + cols[None, :]
        residual_values = gl.load(spots, mask=inside, other=0.0)
    return bias_values, gate_bias, shift_values, residual_values


@gluon.jit
def finish(
    acc, gate, operands, image, oy, ox, n0, tile, split, net, scale, out, partials, counters, steps, images, N, OH, OW,
    ldo, out_net, scale_step, scale_rows, splits, TAPS: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_SHIFT: gl.constexpr, HAS_RESIDUAL: gl.constexpr, HAS_SCALE: gl.constexpr,
    ACT: gl.constexpr, GATED: gl.constexpr, FP8: gl.constexpr, SPLIT: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    AHEAD: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Adds up a cut sum's parts, applies the epilogue and stores; row r of the tile is a pixel of an image."""
    flat: gl.constexpr = rows_layout(BN, num_warps)
    acc = gl.convert_layout(acc, flat)
    cols = n0 + gl.arange(0, BN, layout=gl.SliceLayout(0, flat))
    inside_n = cols < N
    inside_m = (image < images) & (oy < OH) & (ox < OW)
    inside = inside_m[:, None] & inside_n[None, :]
    rows = (image * OH + oy) * OW + ox
    far = net.to(gl.int64)

    done = True
    if SPLIT:
        tiles = gl.num_programs(0)
        whole = far * tiles + tile
        r = gl.arange(0, BM, layout=gl.SliceLayout(1, flat))
        parts = partials + whole * splits * (BM * BN) + r[:, None] * BN + (cols - n0)[None, :]
        gl.store(parts + split * (BM * BN), acc)
        gl.thread_barrier()
        arrived = gl.atomic_add(counters + whole, 1, sem="acq_rel", scope="gpu")
        done = arrived == splits - 1
        if done:
            gl.thread_barrier()
            acc = sum_of_parts(parts, splits, BM * BN, AHEAD)
            gl.store(counters + whole, 0)
    if done:
        if FP8:
            steps += far * (2 * N if GATED else N)
            acc *= gl.load(steps + cols, mask=inside_n, other=0.0)[None, :]
        if HAS_BIAS:
            acc += operands[0].to(gl.float32)[None, :]
        if GATED:
            gates = gl.convert_layout(gate, flat)
            if FP8:
                gates *= gl.load(steps + N + cols, mask=inside_n, other=0.0)[None, :]
            if HAS_BIAS:
                gates += operands[1].to(gl.float32)[None, :]
            acc = acc * activate(gates, "gelu")
        if HAS_SHIFT:
            acc += operands[2].to(gl.float32)[None, :]
        acc = activate(acc, ACT)
        if HAS_SCALE:
            factors = gl.load(scale + rows // scale_rows * scale_step, mask=inside_m, other=0.0)
            acc *= factors.to(gl.float32)[:, None]
        if HAS_RESIDUAL:
            acc += operands[3].to(gl.float32)
        if TAPS == 4:
            rows = ((image * OH + oy) * 2 + net // 2) * (2 * OW) + ox * 2 + net % 2
        gl.store(out + far * out_net + rows[:, None] * ldo + cols[None, :], acc.to(out.dtype.element_ty), mask=inside)


@gluon.jit(
    do_not_specialize=(
        "images",
        "OH",
        "OW",
        "splits",
        "scale_step",
        "scale_rows",
        "residual_rows",
        "cin",
        "blocks",
        "tail_blocks",
    ),
    do_not_specialize_on_alignment=("scale", "shift", "bias", "steps"),
)
def tma_matmul_kernel(
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
    images,
    N,
    OH,
    OW,
    cin,
    blocks,
    tail_blocks,
    ldr,
    ldo,
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
    TAPS: gl.constexpr,
    STRIDE: gl.constexpr,
    HAS_TAIL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_SHIFT: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    ACT: gl.constexpr,
    GATED: gl.constexpr,
    FP8: gl.constexpr,
    SPLIT: gl.constexpr,
    BB: gl.constexpr,
    BY: gl.constexpr,
    BX: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
    STATIC: gl.constexpr,
    PDL: gl.constexpr,
    num_warps: gl.constexpr,
):
    """What `kernels.matmul_kernel` computes; x (nets, B, H, W, C), w (nets, rows, K) as descriptors.

    With STRIDE 2 x is (nets B, H / 2, 2, W / 2, 2 C).
    """
    BM: gl.constexpr = BB * BY * BX
    tile = gl.program_id(0)
    split = gl.program_id(1)
    net = gl.program_id(2)
    n0, x0, y0, b0 = tile_place(tile, gl.cdiv(OW, BX), gl.cdiv(OH, BY), images, BB, BY, BX, BN)
    x_net = 0 if TAPS == 4 else net
    b_x = b0
    if STRIDE == 2:
        b_x += net * images
    first, last = part_of_sum(split, splits, TAPS * blocks + tail_blocks, SPLIT)
    # Without this the compiler keeps a path around the loop, and the assembler lets one product wait for the other.
    gl.assume(first < last)

    a_slots = gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_type.shape, x.layout)
    b_slots = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_type.shape, w.layout)
    g_slots = b_slots
    if GATED:
        g_slots = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_type.shape, w.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()

    size: gl.constexpr = x.block_type.nbytes + w.block_type.nbytes * (2 if GATED else 1)
    # Nobody writes STATIC weights, so their copies begin while the kernel before this one still runs.
    if PDL and not STATIC:
        gdc_wait()
    for i in gl.static_range(STAGES - 1):
        if first + i < last:
            _load_weights(first + i, i, w, net, n0, N, blocks, cin, b_slots, g_slots, bars, size, TAPS, GATED, BK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for i in gl.static_range(STAGES - 1):
        if first + i < last:
            _load_pixels(
                first + i, i, x, tail, x_net, b_x, y0, x0, net, cin, blocks, a_slots, bars, TAPS, STRIDE, HAS_TAIL, BK
            )  # fmt: skip
    image, oy, ox = box_pixels(b0, y0, x0, BY, BX, BM, BN, num_warps)
    # Read now, if the registers have room for it: behind the sum the card would wait for it.
    EARLY: gl.constexpr = AHEAD >= 2
    if EARLY:
        operands = epilogue_operands(
            image, oy, ox, n0, net, bias, shift, residual, images, N, OH, OW, ldr, bias_net, shift_net, residual_net,
            residual_rows, HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, GATED, BN, num_warps,
        )  # fmt: skip
    mma_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BN, 32 if FP8 else 16]
    )
    acc = gl.zeros((BM, BN), gl.float32, layout=mma_layout)
    gate = acc
    if GATED:
        gate = gl.zeros((BM, BN), gl.float32, layout=mma_layout)
    # FP8 maps are made in the registers, from what was read while the block before was multiplied.
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_layout, k_width=4)
    if FP8:
        zero = gl.zeros((BM, BN), gl.float32, layout=mma_layout)
        numbers = gl.zeros((BM, BK), a_slots.dtype, layout=operand)
        if first < last:
            mbarrier.wait(bars.index(0), 0)
            numbers = a_slots.index(0).reshape([BM, BK]).load(operand)
    for k in range(first, last):
        slot = (k - first) % STAGES
        mbarrier.wait(bars.index(slot), (k - first) // STAGES & 1)
        a = a_slots.index(slot).reshape([BM, BK])
        b = b_slots.index(slot).reshape([BN, BK]).permute((1, 0))
        if FP8:
            by = factor
            if HAS_TAIL:
                by = gl.where(k < TAPS * blocks, factor, tail_factor)
            small = (numbers * gl.to_tensor(by).to(numbers.dtype)).to(gl.float8e4nv)
            block = warpgroup_mma(small, b, zero, use_acc=False, is_async=True)
            if GATED:
                g = g_slots.index(slot).reshape([BN, BK]).permute((1, 0))
                gate_block = warpgroup_mma(small, g, zero, use_acc=False, is_async=True)
            # Behind the last block that one is read again.
            ahead = gl.minimum(k + 1, last - 1) - first
            mbarrier.wait(bars.index(ahead % STAGES), ahead // STAGES & 1)
            numbers = a_slots.index(ahead % STAGES).reshape([BM, BK]).load(operand)
            # The tensor cores add with 14 bits or so: a block's sum begins at zero, and is added to the others in FP32.
            if GATED:
                added, gate_added = warpgroup_mma_wait(0, deps=(block, gate_block))
                gate += gate_added
            else:
                added = warpgroup_mma_wait(0, deps=(block,))
            acc += added
        elif GATED:
            acc = warpgroup_mma(a, b, acc, is_async=True)
            g = g_slots.index(slot).reshape([BN, BK]).permute((1, 0))
            gate = warpgroup_mma(a, g, gate, is_async=True)
            # Products finish in order: with two of this block out, those of the block before are done.
            acc, gate = warpgroup_mma_wait(2, deps=(acc, gate))
        else:
            acc = warpgroup_mma(a, b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
        # All warps are done with the slot of the block before; it takes the block STAGES after that one.
        gl.thread_barrier()
        if k + STAGES - 1 < last:
            ahead = (k - first + STAGES - 1) % STAGES
            _load_weights(
                k + STAGES - 1, ahead, w, net, n0, N, blocks, cin, b_slots, g_slots, bars, size, TAPS, GATED, BK
            )  # fmt: skip
            _load_pixels(
                k + STAGES - 1, ahead, x, tail, x_net, b_x, y0, x0, net, cin, blocks, a_slots, bars, TAPS, STRIDE,
                HAS_TAIL, BK,
            )  # fmt: skip
    if GATED:
        acc, gate = warpgroup_mma_wait(0, deps=(acc, gate))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    gl.thread_barrier()
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(i))

    if not EARLY:
        operands = epilogue_operands(
            image, oy, ox, n0, net, bias, shift, residual, images, N, OH, OW, ldr, bias_net, shift_net, residual_net,
            residual_rows, HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, GATED, BN, num_warps,
        )  # fmt: skip
    finish(
        acc, gate, operands, image, oy, ox, n0, tile, split, net, scale, out, partials, counters, steps, images, N, OH,
        OW, ldo, out_net, scale_step, scale_rows, splits, TAPS, HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, HAS_SCALE, ACT,
        GATED, FP8, SPLIT, BM, BN, AHEAD, num_warps,
    )  # fmt: skip
