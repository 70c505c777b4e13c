"""The product of `hopper` with a warp that only feeds: it copies tiles, and the others only multiply.

There all warps meet after each block, issue the next copies, and only then go on: of a small tile that takes longer
than its products. Here a slot has two barriers. `full` counts the bytes that arrive; on `empty` the multiplying warps
say that they are done with the slot, and the feeding warp, which runs ahead as far as there are slots, waits for that.
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

from runtime.fused.hopper import (
    box_pixels,
    copy_pixels,
    copy_weights,
    epilogue_operands,
    finish,
    next_slot,
    part_of_sum,
    tile_place,
)
from runtime.fused.tuning import FEEDER_REGISTERS as _FEEDER_REGISTERS

FEEDER_REGISTERS = gl.constexpr(_FEEDER_REGISTERS)


@gluon.jit
def _next_block(tap, block, blocks, TAPS: gl.constexpr):
    """The block of the sum behind one: the next of its tap, or the first of the next tap; the other map is the last."""
    block += 1
    if (block == blocks) & (tap < TAPS):
        block = 0
        tap += 1
    return tap, block


@gluon.jit
def _feed(
    x, tail, w, first, last, net, n0, N, x_net, b0, y0, x0, cin, blocks, a_slots, b_slots, g_slots, full, empty,
    TAPS: gl.constexpr, STRIDE: gl.constexpr, HAS_TAIL: gl.constexpr, GATED: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, STATIC: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Copy blocks `first` to `last` of the sum, one slot after the other."""
    size: gl.constexpr = x.block_type.nbytes + w.block_type.nbytes * (2 if GATED else 1)
    begin = gl.minimum(first // blocks, TAPS)
    ahead = gl.minimum(last - first, STAGES)
    # Nobody writes STATIC weights, so their copies begin while the kernel before this one still runs.
    if PDL and not STATIC:
        gdc_wait()
    tap = begin
    block = first - begin * blocks
    for i in range(ahead):
        copy_weights(tap, block, i, w, net, n0, N, cin, b_slots, g_slots, full, size, GATED, BK)
        tap, block = _next_block(tap, block, blocks, TAPS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tap = begin
    block = first - begin * blocks
    for i in range(ahead):
        copy_pixels(
            tap, block, i, x, tail, x_net, b0, y0, x0, net, cin, a_slots, full, TAPS, STRIDE, HAS_TAIL, BK
        )  # fmt: skip
        tap, block = _next_block(tap, block, blocks, TAPS)
    slot = 0
    phase = 0
    for _ in range(first + STAGES, last):
        mbarrier.wait(empty.index(slot), phase)
        copy_weights(tap, block, slot, w, net, n0, N, cin, b_slots, g_slots, full, size, GATED, BK)
        copy_pixels(
            tap, block, slot, x, tail, x_net, b0, y0, x0, net, cin, a_slots, full, TAPS, STRIDE, HAS_TAIL, BK
        )  # fmt: skip
        tap, block = _next_block(tap, block, blocks, TAPS)
        slot, phase = next_slot(slot, phase, STAGES)


@gluon.jit
def _multiply(
    first, last, a_slots, b_slots, g_slots, full, empty, image, oy, ox, n0, net, bias, shift, residual, images, N, OH,
    OW, ldr, bias_net, shift_net, residual_net, residual_rows, HAS_BIAS: gl.constexpr, HAS_SHIFT: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, GATED: gl.constexpr, EARLY: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Sums of the blocks, and what the epilogue adds where there is room to read it before."""
    if PDL:
        gdc_wait()  # other warps than the one that feeds: they read the residual, and write
    operands = (0.0, 0.0, 0.0, 0.0)
    if EARLY:
        operands = epilogue_operands(
            image, oy, ox, n0, net, bias, shift, residual, images, N, OH, OW, ldr, bias_net, shift_net, residual_net,
            residual_rows, HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, GATED, BN, num_warps,
        )  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BN, 16]
    )
    acc = gl.zeros((BM, BN), gl.float32, layout=layout)
    gate = acc
    if GATED:
        gate = gl.zeros((BM, BN), gl.float32, layout=layout)
    slot = 0
    before = 0
    phase = 0
    for k in range(first, last):
        mbarrier.wait(full.index(slot), phase)
        a = a_slots.index(slot).reshape([BM, BK])
        b = b_slots.index(slot).reshape([BN, BK]).permute((1, 0))
        acc = warpgroup_mma(a, b, acc, is_async=True)
        if GATED:
            g = g_slots.index(slot).reshape([BN, BK]).permute((1, 0))
            gate = warpgroup_mma(a, g, gate, is_async=True)
            # Products finish in order: with two of this block out, those of the block before are done.
            acc, gate = warpgroup_mma_wait(2, deps=(acc, gate))
        else:
            acc = warpgroup_mma_wait(1, deps=(acc,))
        # The multiplying warps meet, and one thread says that all are done with the block before. (`arrive` would make
        # them meet a second time, before the next wait; to expect no bytes is to arrive, too.)
        gl.thread_barrier()
        mbarrier.expect(empty.index(before), 0, pred=k > first)
        before = slot
        slot, phase = next_slot(slot, phase, STAGES)
    if GATED:
        acc, gate = warpgroup_mma_wait(0, deps=(acc, gate))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    return acc, gate, operands[0], operands[1], operands[2], operands[3]


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
def fed_matmul_kernel(
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
    TAPS: gl.constexpr,
    STRIDE: gl.constexpr,
    HAS_TAIL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_SHIFT: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    ACT: gl.constexpr,
    GATED: gl.constexpr,
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
    """What `hopper.tma_matmul_kernel` computes, of the same operands but for FP8."""
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
    # Or else the path around the loop, with its sums of zeros, makes the assembler wait for each product.
    gl.assume(first < last)

    a_slots = gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_type.shape, x.layout)
    b_slots = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_type.shape, w.layout)
    g_slots = b_slots
    if GATED:
        g_slots = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_type.shape, w.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()

    image, oy, ox = box_pixels(b0, y0, x0, BY, BX, BM, BN, num_warps)
    # Read before the sum, if the registers have room for it: behind it the card would wait for it.
    EARLY: gl.constexpr = AHEAD >= 2
    acc, gate, bias_values, gate_bias, shift_values, residual_values = gl.warp_specialize(
        [
            (_multiply, (
                first, last, a_slots, b_slots, g_slots, full, empty, image, oy, ox, n0, net, bias, shift, residual,
                images, N, OH, OW, ldr, bias_net, shift_net, residual_net, residual_rows, HAS_BIAS, HAS_SHIFT,
                HAS_RESIDUAL, GATED, EARLY, BM, BN, BK, STAGES, PDL, num_warps,
            )),
            (_feed, (
                x, tail, w, first, last, net, n0, N, x_net, b_x, y0, x0, cin, blocks, a_slots, b_slots, g_slots, full,
                empty, TAPS, STRIDE, HAS_TAIL, GATED, BK, STAGES, STATIC, PDL,
            )),
        ],
        [1],
        [FEEDER_REGISTERS],
    )  # fmt: skip
    operands = (bias_values, gate_bias, shift_values, residual_values)
    if not EARLY:
        operands = epilogue_operands(
            image, oy, ox, n0, net, bias, shift, residual, images, N, OH, OW, ldr, bias_net, shift_net, residual_net,
            residual_rows, HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, GATED, BN, num_warps,
        )  # fmt: skip
    finish(
        acc, gate, operands, image, oy, ox, n0, tile, split, net, scale, out, partials, counters, partials, images, N,
        OH, OW, ldo, out_net, scale_step, scale_rows, splits, TAPS, HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, HAS_SCALE, ACT,
        GATED, False, SPLIT, BM, BN, AHEAD, num_warps,
    )  # fmt: skip
