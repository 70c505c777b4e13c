"""The convolutions of `columns` with warps that only feed, as in `fed`: one copies the weights, and one the boxes.

Each ring has its own two barriers a place. A block's weights are free when the block is multiplied; a box is when the
last of its column's blocks is.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.fused.columns import column_part, column_pixels, column_tile, load_column, load_weights
from runtime.fused.fed import FEEDER_REGISTERS
from runtime.fused.hopper import epilogue_operands, finish, next_slot


@gluon.jit
def _feed_weights(
    w, begin, end, net, n0, blocks, cin, b_slots, full, empty, NT: gl.constexpr, SWAP: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, STATIC: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Copy the weights of blocks `begin` to `end`, one slot after the other."""
    # Nobody writes STATIC weights, so their copies begin while the kernel before this one still runs.
    if PDL and not STATIC:
        gdc_wait()
    ahead = gl.minimum(end - begin, STAGES)
    for i in range(ahead):
        load_weights(begin + i, i, w, net, n0, blocks, cin, b_slots, full, NT, SWAP, BK)
    if PDL:
        gdc_launch_dependents()
    slot = 0
    phase = 0
    for k in range(begin + STAGES, end):
        mbarrier.wait(empty.index(slot), phase)
        load_weights(k, slot, w, net, n0, blocks, cin, b_slots, full, NT, SWAP, BK)
        slot, phase = next_slot(slot, phase, STAGES)


@gluon.jit
def _feed_columns(
    x, halo, tail, first, last, x_net, b0, top, left, blocks, pool, full, empty, NT: gl.constexpr,
    HAS_TAIL: gl.constexpr, BB: gl.constexpr, BY: gl.constexpr, BK: gl.constexpr, COLUMNS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """The same of the boxes of columns `first` to `last`."""
    if PDL:
        gdc_wait()
    ahead = gl.minimum(last - first, COLUMNS)
    for i in range(ahead):
        load_column(first + i, i, x, halo, tail, x_net, b0, top, left, blocks, pool, full, NT, HAS_TAIL, BB, BY, BK)
    place = 0
    phase = 0
    for column in range(first + COLUMNS, last):
        mbarrier.wait(empty.index(place), phase)
        load_column(column, place, x, halo, tail, x_net, b0, top, left, blocks, pool, full, NT, HAS_TAIL, BB, BY, BK)
        place, phase = next_slot(place, phase, COLUMNS)


@gluon.jit
def _multiply(
    begin, end, convs, pool, a_full, a_empty, b_slots, b_full, b_empty, image, oy, ox, n0, net, bias, shift, residual,
    images, N, OH, OW, ldr, bias_net, shift_net, residual_net, residual_rows, NT: gl.constexpr,
    HAS_TAIL: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SHIFT: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    EARLY: gl.constexpr, BB: gl.constexpr, BY: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    COLUMNS: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Sums of the blocks, and what the epilogue adds where there is room to read it before."""
    if PDL:
        gdc_wait()  # other warps than those that feed: they read the residual, and write
    operands = (0.0, 0.0, 0.0, 0.0)
    if EARLY:
        operands = epilogue_operands(
            image, oy, ox, n0, net, bias, shift, residual, images, N, OH, OW, ldr, bias_net, shift_net, residual_net,
            residual_rows, HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, False, BN, num_warps,
        )  # fmt: skip
    BM: gl.constexpr = BY * BB * 8
    flat: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=pool.dtype.primitive_bitwidth, rank=2
    )
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BN, 16]
    )
    acc = gl.zeros((BM, BN), gl.float32, layout=layout)
    slot = 0
    before = 0
    phase = 0
    place = 0
    place_phase = 0
    # The row within the column, behind which the next box begins; sums begin and end with whole columns.
    row = 0
    for k in range(begin, end):
        mbarrier.wait(b_full.index(slot), phase)
        if row == 0:
            mbarrier.wait(a_full.index(place), place_phase)
        a = pool.index(place * ((BY + NT - 1) * BB) + row * BB)._reinterpret(pool.dtype, [BM, BK], flat)
        b = b_slots.index(slot).reshape([BN, BK]).permute((1, 0))
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        # All are done with the block before: its weights' slot is free, and its box where it was a column's last. To
        # expect no bytes is to arrive, as in `fed`.
        gl.thread_barrier()
        mbarrier.expect(b_empty.index(before), 0, pred=k > begin)
        mbarrier.expect(a_empty.index(gl.where(place == 0, COLUMNS, place) - 1), 0, pred=(row == 0) & (k > begin))
        before = slot
        slot, phase = next_slot(slot, phase, STAGES)
        row += 1
        rows = NT
        if HAS_TAIL:
            rows = gl.where(k < convs * NT, NT, 1)
        if row == rows:
            row = 0
            place, place_phase = next_slot(place, place_phase, COLUMNS)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    return acc, operands[0], operands[1], operands[2], operands[3]


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
def fed_column_conv_kernel(
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
    """What `columns.column_conv_kernel` computes, of the same operands; COLUMNS is two or more."""
    NT: gl.constexpr = 3 if TAPS == 9 else 2
    BM: gl.constexpr = BY * BB * 8
    tile = gl.program_id(0)
    split = gl.program_id(1)
    net = gl.program_id(2)
    n0, x0, y0, b0, x_net, left, top = column_tile(tile, net, images, OH, OW, TAPS, SWAP, BB, BY, BN)
    convs = NT * blocks
    first, last, begin, end = column_part(split, splits, convs, tail_blocks, NT, SPLIT)
    # Or else the path around the loop, with its sums of zeros, makes the assembler wait for each product.
    gl.assume(begin < end)

    flat: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=x.dtype.primitive_bitwidth, rank=2
    )
    pool = gl.allocate_shared_memory(x.dtype, [GROUPS, 8, BK], flat)
    b_slots = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_type.shape, w.layout)
    a_full = gl.allocate_shared_memory(gl.int64, [COLUMNS, 1], mbarrier.MBarrierLayout())
    a_empty = gl.allocate_shared_memory(gl.int64, [COLUMNS, 1], mbarrier.MBarrierLayout())
    b_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    b_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COLUMNS):
        mbarrier.init(a_full.index(i), count=1)
        mbarrier.init(a_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(b_full.index(i), count=1)
        mbarrier.init(b_empty.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()

    image, oy, ox = column_pixels(b0, y0, x0, BB, BM, BN, SWAP, num_warps)
    # Read before the sum, if the registers have room for it: behind it the card would wait for it.
    EARLY: gl.constexpr = AHEAD >= 2
    acc, bias_values, gate_bias, shift_values, residual_values = gl.warp_specialize(
        [
            (_multiply, (
                begin, end, convs, pool, a_full, a_empty, b_slots, b_full, b_empty, image, oy, ox, n0, net, bias,
                shift, residual, images, N, OH, OW, ldr, bias_net, shift_net, residual_net, residual_rows, NT,
                HAS_TAIL, HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, EARLY, BB, BY, BN, BK, STAGES, COLUMNS, PDL, num_warps,
            )),
            (_feed_weights, (
                w, begin, end, net, n0, blocks, cin, b_slots, b_full, b_empty, NT, SWAP, BK, STAGES, STATIC, PDL,
            )),
            (_feed_columns, (
                x, halo, tail, first, last, x_net, b0, top, left, blocks, pool, a_full, a_empty, NT, HAS_TAIL, BB, BY,
                BK, COLUMNS, PDL,
            )),
        ],
        [1, 1],
        [FEEDER_REGISTERS, FEEDER_REGISTERS],
    )  # fmt: skip
    operands = (bias_values, gate_bias, shift_values, residual_values)
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
