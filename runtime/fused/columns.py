"""Convolutions for compute capability 9.0 whose taps share what they read.

`hopper` copies a box of pixels for each of the nine taps, and so asks the L2 cache nine times for nearly the same
pixels, which for tiles of 128 x 64 is all that it delivers. Here a box is eight pixels wide and one or two rows higher
than the tile. Eight pixels of 64 channels are 1,024 bytes, the unit in which the tensor cores' operand repeats its
swizzle, so the taps of a column, which are whole rows of pixels apart, read the same box at other offsets: three boxes
in the place of nine, two in the place of four.

The rows of pixels of all images of a tile lie in one order, y outermost: y BB + b. Boxes and weights have rings of
their own, the boxes one of COLUMNS places and the weights one of STAGES.
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

from runtime.fused.hopper import epilogue_operands, finish, part_of_sum, rows_layout, tile_place


@gluon.jit
def load_weights(
    k, slot, w, net, n0, blocks, cin, b_slots, bars, NT: gl.constexpr, SWAP: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Start the copy of the weights of block `k`: NT blocks a column, top to bottom, then one a block of the tail."""
    bar = bars.index(slot)
    mbarrier.expect(bar, w.block_type.nbytes)
    column = gl.minimum(k // NT, NT * blocks)
    of_tail = k - column * NT
    block = column // NT
    # The matrix has the taps row by row, and behind them the tail's channels.
    across = column - block * NT
    tap = across * NT + of_tail if SWAP else of_tail * NT + across
    at = tap * cin + block * BK
    if column == NT * blocks:
        at = NT * NT * cin + of_tail * BK
    tma.async_copy_global_to_shared(w, [net, n0, at], bar, b_slots.index(slot))


@gluon.jit
def load_column(
    column, place, x, halo, tail, x_net, b0, y0, x0, blocks, pool, bars, NT: gl.constexpr, HAS_TAIL: gl.constexpr,
    BB: gl.constexpr, BY: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Start the copy of a column's box, NT - 1 rows higher than the tile, or of one of the tail, just as high."""
    bar = bars.index(place)
    base = place * ((BY + NT - 1) * BB)
    box = pool.index(base)._reinterpret(x.dtype, x.block_type.shape, x.layout)
    block = column // NT
    of_map = True
    if HAS_TAIL:
        of_map = column < NT * blocks
    if of_map:
        mbarrier.expect(bar, x.block_type.nbytes + halo.block_type.nbytes)
        rest = pool.index(base + BY * BB)._reinterpret(x.dtype, halo.block_type.shape, halo.layout)
        across = x0 + column - block * NT
        tma.async_copy_global_to_shared(x, [x_net, y0, b0, across, block * BK], bar, box)
        tma.async_copy_global_to_shared(halo, [x_net, y0 + BY, b0, across, block * BK], bar, rest)
    else:
        mbarrier.expect(bar, x.block_type.nbytes)
        # The tail is not moved: one row and one pixel further than the first tap of a convolution of nine.
        c = (column - NT * blocks) * BK
        tma.async_copy_global_to_shared(tail, [x_net, y0 + 1, b0, x0 + 1, c], bar, box)


@gluon.jit
def column_tile(
    tile, net, images, OH, OW, TAPS: gl.constexpr, SWAP: gl.constexpr, BB: gl.constexpr, BY: gl.constexpr,
    BN: gl.constexpr,
):  # fmt: skip
    """As `tile_place`; then the net whose map is read, and where the first tap falls in it."""
    tiles_x = gl.cdiv(OH if SWAP else OW, 8)
    tiles_y = gl.cdiv(OW if SWAP else OH, BY)
    n0, x0, y0, b0 = tile_place(tile, tiles_x, tiles_y, images, BB, BY, 8, BN)
    x_net = net
    left = x0 - 1
    top = y0 - 1
    if TAPS == 4:
        x_net = 0
        if SWAP:
            left += net // 2
            top += net % 2
        else:
            left += net % 2
            top += net // 2
    return n0, x0, y0, b0, x_net, left, top


@gluon.jit
def column_part(split, splits, convs, tail_blocks, NT: gl.constexpr, SPLIT: gl.constexpr):
    """A program's part of the sum, in columns and in blocks: NT a column, and one of the tail."""
    first, last = part_of_sum(split, splits, convs + tail_blocks, SPLIT)
    begin = NT * gl.minimum(first, convs) + gl.maximum(first - convs, 0)
    end = NT * gl.minimum(last, convs) + gl.maximum(last - convs, 0)
    return first, last, begin, end


@gluon.jit
def column_pixels(
    b0, y0, x0, BB: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, SWAP: gl.constexpr, num_warps: gl.constexpr
):  # fmt: skip
    """Of a tile's rows, of eight pixels side by side for each image: image, y and x of the output."""
    r = gl.arange(0, BM, layout=gl.SliceLayout(1, rows_layout(BN, num_warps)))
    image = b0 + r // 8 % BB
    oy = x0 + r % 8 if SWAP else y0 + r // (8 * BB)
    ox = y0 + r // (8 * BB) if SWAP else x0 + r % 8
    return image, oy, ox


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
    do_not_specialize_on_alignment=("scale", "shift", "bias"),
)
def column_conv_kernel(
    x,
    halo,
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
    TAPS: gl.constexpr,
    HAS_TAIL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_SHIFT: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    ACT: gl.constexpr,
    SPLIT: gl.constexpr,
    BB: gl.constexpr,
    BY: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
    COLUMNS: gl.constexpr,
    GROUPS: gl.constexpr,
    SWAP: gl.constexpr,
    STATIC: gl.constexpr,
    PDL: gl.constexpr,
    num_warps: gl.constexpr,
):
    """What `kernels.matmul_kernel` computes, for convolutions of 4 or 9 taps of stride 1 and blocks of whole channels.

    x, halo and tail are descriptors (nets, H, B, W, C) with boxes (1, BY, BB, 8, BK), the halo's NT - 1 rows high; w
    (nets, N, K). GROUPS is a power of two that COLUMNS boxes fit in, in rows of eight pixels. With
    SWAP rows are columns of the map: x is (nets, W, B, H, C).
    """
    NT: gl.constexpr = 3 if TAPS == 9 else 2
    BM: gl.constexpr = BY * BB * 8
    tile = gl.program_id(0)
    split = gl.program_id(1)
    net = gl.program_id(2)
    n0, x0, y0, b0, x_net, left, top = column_tile(tile, net, images, OH, OW, TAPS, SWAP, BB, BY, BN)
    convs = NT * blocks
    first, last, begin, end = column_part(split, splits, convs, tail_blocks, NT, SPLIT)
    # Without this the compiler keeps a path around the loop, and the assembler lets one product wait for the other.
    gl.assume(begin < end)

    flat: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=x.dtype.primitive_bitwidth, rank=2
    )
    pool = gl.allocate_shared_memory(x.dtype, [GROUPS, 8, BK], flat)
    b_slots = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_type.shape, w.layout)
    a_bars = gl.allocate_shared_memory(gl.int64, [COLUMNS, 1], mbarrier.MBarrierLayout())
    b_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COLUMNS):
        mbarrier.init(a_bars.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(b_bars.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()

    # Nobody writes STATIC weights, so their copies begin while the kernel before this one still runs.
    if PDL and not STATIC:
        gdc_wait()
    for i in gl.static_range(STAGES - 1):
        if begin + i < end:
            load_weights(begin + i, i, w, net, n0, blocks, cin, b_slots, b_bars, NT, SWAP, BK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for i in gl.static_range(COLUMNS):
        if first + i < last:
            load_column(
                first + i, i, x, halo, tail, x_net, b0, top, left, blocks, pool, a_bars, NT, HAS_TAIL, BB, BY, BK
            )  # fmt: skip

    image, oy, ox = column_pixels(b0, y0, x0, BB, BM, BN, SWAP, num_warps)
    # Read now, if the registers have room for it: behind the sum the card would wait for it.
    EARLY: gl.constexpr = AHEAD >= 2
    if EARLY:
        operands = epilogue_operands(
            image, oy, ox, n0, net, bias, shift, residual, images, N, OH, OW, ldr, bias_net, shift_net, residual_net,
            residual_rows, HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, False, BN, num_warps,
        )  # fmt: skip
    mma_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BN, 16]
    )
    acc = gl.zeros((BM, BN), gl.float32, layout=mma_layout)
    for k in range(begin, end):
        slot = (k - begin) % STAGES
        column = gl.minimum(k // NT, convs)
        row = k - column * NT
        if HAS_TAIL:  # noqa: SIM102 (the outer one is decided when the kernel is compiled)
            if column == convs:
                column += row
                row = 0
        passed = column - first
        mbarrier.wait(b_bars.index(slot), (k - begin) // STAGES & 1)
        if row == 0:
            mbarrier.wait(a_bars.index(passed % COLUMNS), passed // COLUMNS & 1)
        spot = passed % COLUMNS * ((BY + NT - 1) * BB) + row * BB
        a = pool.index(spot)._reinterpret(x.dtype, [BM, BK], flat)
        b = b_slots.index(slot).reshape([BN, BK]).permute((1, 0))
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        # All warps are done with the block before: its weights' slot is free, and its box where it was a column's last.
        gl.thread_barrier()
        if k + STAGES - 1 < end:
            ahead = (k - begin + STAGES - 1) % STAGES
            load_weights(k + STAGES - 1, ahead, w, net, n0, blocks, cin, b_slots, b_bars, NT, SWAP, BK)
        if (row == 0) & (passed > 0) & (column - 1 + COLUMNS < last):
            load_column(
                column - 1 + COLUMNS, (passed - 1) % COLUMNS, x, halo, tail, x_net, b0, top, left, blocks, pool, a_bars,
                NT, HAS_TAIL, BB, BY, BK,
            )  # fmt: skip
    acc = warpgroup_mma_wait(0, deps=(acc,))
    gl.thread_barrier()
    for i in gl.static_range(COLUMNS):
        mbarrier.invalidate(a_bars.index(i))
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(b_bars.index(i))

    if not EARLY:
        operands = epilogue_operands(
            image, oy, ox, n0, net, bias, shift, residual, images, N, OH, OW, ldr, bias_net, shift_net, residual_net,
            residual_rows, HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, False, BN, num_warps,
        )  # fmt: skip
    finish(
        acc, acc, operands, image, oy, ox, n0, tile, split, net, scale, out, partials, counters, partials, images, N,
        OH, OW, ldo, out_net, scale_step, scale_rows, splits, TAPS, HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, HAS_SCALE, ACT,
        False, False, SPLIT, BM, BN, AHEAD, num_warps,
    )  # fmt: skip
