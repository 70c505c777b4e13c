"""Attention for compute capability 9.0: keys and values come by TMA, and both products read them from shared memory.

A program is some teams of four warps with 64 queries each, which share a ring of blocks of keys and values, and a warp
that fills the ring. The teams drift apart, so that one's exponentials run beside another's products; and within a team
the product with a block's values runs beside the exponentials of the next block. With no more programs than run at
once, each takes several tiles of queries, and the ring is filled ahead across them.

A head is an axis of its own for TMA: what a block has beyond the head's channels is filled in with zeros. (After
FlashAttention-3, arXiv:2407.08608.)
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

from runtime.fused.fed import FEEDER_REGISTERS
from runtime.fused.resident import store_layout

# Numbers that one piece of assembly takes at a time.
PACK = gl.constexpr(8)
# 2^x for x from -0.5 to 0.5, from the last to the first: 0.05517167, 0.24261112, 0.69326099, 0.99992807, the cubic of
# the least relative error, which is 7.5e-5.
CUBIC = gl.constexpr(("0f3D61FBB0", "0f3E786F0D", "0f3F31798D", "0f3F7FFB49"))


@gluon.constexpr_function
def _exponentials(polynomials):
    """PTX of PACK powers of two of numbers up to 0, the first so many by the polynomial, as the others' unit is slow.

    x + 1.5 * 2^23 rounds x to a whole number n, which stands in the sum's lowest bits; 2^(x - n) is the polynomial's,
    and n is added to its exponent.
    """
    third, second, first, constant = CUBIC.value
    lines = [f"ex2.approx.ftz.f32 ${i}, ${PACK.value + i};" for i in range(polynomials, PACK.value)]
    for i in range(polynomials):
        lines += [
            f"max.ftz.f32 x, ${PACK.value + i}, 0fC2FC0000;",  # -126: what is less is as good as 0
            "add.rn.ftz.f32 r, x, 0f4B400000;",
            "sub.rn.ftz.f32 n, r, 0f4B400000;",
            "sub.rn.ftz.f32 x, x, n;",
            f"fma.rn.ftz.f32 y, x, {third}, {second};",
            f"fma.rn.ftz.f32 y, y, x, {first};",
            f"fma.rn.ftz.f32 y, y, x, {constant};",
            "mov.b32 e, r; shl.b32 e, e, 23; mov.b32 z, y; add.s32 z, z, e;",
            f"mov.b32 ${i}, z;",
        ]
    return "{ .reg .f32 x, r, n, y; .reg .b32 e, z; " + " ".join(lines) + " }"


@gluon.jit
def _place(tile, tiles_m, heads, batches):
    """A tile's place among a head's, its head, its net and its image."""
    head = tile // tiles_m
    image = head // heads
    return tile % tiles_m, head % heads, image // batches, image % batches


@gluon.jit
def _next(slot, phase, STAGES: gl.constexpr):
    """What `hopper.next_slot` gives, by selections: its branch makes other code of the loops here."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _fill(q, k, v, rings, grid, queries, keys_shared, PDL: gl.constexpr):
    """The warp that starts all copies: a tile's queries, then the keys and values block by block."""
    q_slots, k_slots, v_slots, q_full, q_empty, full, empty = rings
    tiles_m, tiles, heads, batches, blocks = grid
    TEAMS: gl.constexpr = q_slots.shape[0]
    ROWS: gl.constexpr = q_slots.shape[3]
    STAGES: gl.constexpr = k_slots.shape[0]
    BN: gl.constexpr = k_slots.shape[3]
    if PDL:
        gdc_wait()
    slot = 0
    phase = 1
    turn = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        place, head, net, image = _place(tile, tiles_m, heads, batches)
        for block in range(blocks):
            bar = full.index(slot)
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(bar, k.block_type.nbytes + v.block_type.nbytes)
            at = [net, image // keys_shared, block * BN, head, 0]
            tma.async_copy_global_to_shared(k, at, bar, k_slots.index(slot))
            tma.async_copy_global_to_shared(v, at, bar, v_slots.index(slot))
            slot, phase = _next(slot, phase, STAGES)
            # The queries' room becomes free later than the first block's.
            if block == 0:
                for team in gl.static_range(TEAMS):
                    bar = q_full.index(team)
                    mbarrier.wait(q_empty.index(team), turn)
                    mbarrier.expect(bar, q.block_type.nbytes)
                    at = [net, image % queries, (place * TEAMS + team) * ROWS, head, 0]
                    tma.async_copy_global_to_shared(q, at, bar, q_slots.index(team))
        turn ^= 1


@gluon.jit
def _scores(q, k, zeros, D1: gl.constexpr, D2: gl.constexpr):
    """Start q k.T over the first D1 + D2 channels."""
    scores = warpgroup_mma(q.slice(0, D1, 1), k.slice(0, D1, 1).permute((1, 0)), zeros, use_acc=False, is_async=True)
    if D2 > 0:
        scores = warpgroup_mma(q.slice(D1, D2, 1), k.slice(D1, D2, 1).permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def _weigh(scores, top, start, keys, factor, EVEN: gl.constexpr, BN: gl.constexpr, POLYNOMIALS: gl.constexpr):
    """The new maxima, what sums so far shrink by, the block's weights, and their sums of each thread."""
    layout: gl.constexpr = scores.type.layout
    ROWS: gl.constexpr = scores.shape[0]
    if not EVEN:
        columns = start + gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
        scores = gl.where((columns < keys)[None, :], scores, -1.0e30)
    higher = gl.maximum(top, gl.max(scores, axis=1))
    shrink = gl.exp2((top - higher) * factor)
    # One fused multiply-add a score: the factor goes into the exponent together with the maximum.
    exponents = scores * factor - (higher * factor)[:, None]
    p = gl.inline_asm_elementwise(
        _exponentials(POLYNOMIALS), "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f", [exponents],
        dtype=gl.float32, is_pure=True, pack=PACK,
    )  # fmt: skip
    # Two neighbouring columns of each eight are one thread's; the four threads of a row meet at the end.
    sums = gl.sum(p.reshape([ROWS, BN // 8, 4, 2]).permute([0, 2, 1, 3]).reshape([ROWS, 4, BN // 4]), axis=2)
    return higher, shrink, p, sums


@gluon.jit
def _attend(
    team: gl.constexpr, rings, grid, result, keys, factor, D: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
    EVEN: gl.constexpr, POLYNOMIALS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """A team's queries of each of its program's tiles."""
    out, length, ldo, out_net, out_batch = result
    q_slots, k_slots, v_slots, q_full, q_empty, full, empty = rings
    tiles_m, tiles, heads, batches, blocks = grid
    TEAMS: gl.constexpr = q_slots.shape[0]
    ROWS: gl.constexpr = q_slots.shape[3]
    STAGES: gl.constexpr = k_slots.shape[0]
    BN: gl.constexpr = k_slots.shape[3]
    WIDE: gl.constexpr = k_slots.shape[5]
    by_keys: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BN, 16]
    )
    by_channels: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, WIDE, 16]
    )
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=by_channels, k_width=2)
    of_scores: gl.constexpr = gl.SliceLayout(1, by_keys)
    of_result: gl.constexpr = gl.SliceLayout(1, by_channels)
    flat: gl.constexpr = store_layout(ROWS, WIDE, WARPS)
    dtype: gl.constexpr = v_slots.dtype
    zeros = gl.zeros((ROWS, BN), gl.float32, layout=by_keys)
    # The path around a loop would make the assembler wait for each product.
    gl.assume(blocks > 0)
    slot = 0
    phase = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        q = q_slots.index(team).reshape([ROWS, WIDE])
        mbarrier.wait(q_full.index(team), turn)
        turn ^= 1
        mbarrier.wait(full.index(slot), phase)
        scores = _scores(q, k_slots.index(slot).reshape([BN, WIDE]), zeros, D1, D2)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        top = gl.full((ROWS,), -1.0e30, gl.float32, layout=of_scores)
        top, shrink, p, total = _weigh(scores, top, 0, keys, factor, EVEN, BN, POLYNOMIALS)
        weights = gl.convert_layout(p.to(dtype), operand)
        acc = gl.zeros((ROWS, WIDE), gl.float32, layout=by_channels)
        for block in range(1, blocks):
            before = slot
            slot, phase = _next(slot, phase, STAGES)
            if block == 1:
                mbarrier.wait(full.index(slot), phase)
            scores = _scores(q, k_slots.index(slot).reshape([BN, WIDE]), zeros, D1, D2)
            acc = warpgroup_mma(weights, v_slots.index(before).reshape([BN, WIDE]), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(scores,))
            top, shrink, p, sums = _weigh(scores, top, block * BN, keys, factor, EVEN, BN, POLYNOMIALS)
            by_thread: gl.constexpr = gl.SliceLayout(1, total.type.layout)
            total = total * gl.convert_layout(shrink, by_thread, assert_trivial=True)[:, None] + sums
            following = gl.convert_layout(p.to(dtype), operand)
            # The next block is waited for here, as the assembler puts off what it may up to a branch: it would wait for
            # the product before the exponentials that should run beside it.
            ahead, ahead_phase = _next(slot, phase, STAGES)
            more = block + 1 < blocks
            mbarrier.wait(full.index(gl.where(more, ahead, slot)), gl.where(more, ahead_phase, phase))
            acc = warpgroup_mma_wait(0, deps=(acc,))
            gl.thread_barrier()
            mbarrier.arrive(empty.index(before))
            acc *= gl.convert_layout(shrink, of_result, assert_trivial=True)[:, None]
            weights = following
        gl.thread_barrier()
        mbarrier.arrive(q_empty.index(team))
        acc = warpgroup_mma(weights, v_slots.index(slot).reshape([BN, WIDE]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(slot))
        slot, phase = _next(slot, phase, STAGES)
        inverse = 1.0 / gl.convert_layout(gl.sum(total, axis=1), of_result)
        rounded = gl.convert_layout((acc * inverse[:, None]).to(dtype), flat)
        place, head, net, image = _place(tile, tiles_m, heads, batches)
        rows = (place * TEAMS + team) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, flat))
        channels = gl.arange(0, WIDE, layout=gl.SliceLayout(0, flat))
        spots = out + net.to(gl.int64) * out_net + image.to(gl.int64) * out_batch + head * D
        spots = spots + rows[:, None] * ldo + channels[None, :]
        gl.store(spots, rounded, mask=(rows < length)[:, None] & (channels < D)[None, :])


@gluon.jit(do_not_specialize=("length", "keys", "tiles_m", "tiles", "heads", "batches", "queries", "keys_shared"))
def flash_attention_kernel(
    q,
    k,
    v,
    out,
    length,
    keys,
    ldo,
    out_net,
    out_batch,
    tiles_m,
    tiles,
    heads,
    batches,
    queries,
    keys_shared,
    factor,
    D: gl.constexpr,
    D1: gl.constexpr,
    D2: gl.constexpr,
    EVEN: gl.constexpr,
    STAGES: gl.constexpr,
    TEAMS: gl.constexpr,
    POLYNOMIALS: gl.constexpr,
    PDL: gl.constexpr,
    num_warps: gl.constexpr,
):
    """What `kernels.attention_kernel` computes, not causal; q, k, v (nets, images, rows, heads, D) as descriptors.

    Of the channels, D1 + D2 are multiplied: D and a few of the zeros behind them.

    A program takes every so many-th of `tiles` tiles of queries, `tiles_m` of which are a head's.
    """
    q_slots = gl.allocate_shared_memory(q.dtype, [TEAMS] + q.block_type.shape, q.layout)
    k_slots = gl.allocate_shared_memory(k.dtype, [STAGES] + k.block_type.shape, k.layout)
    v_slots = gl.allocate_shared_memory(v.dtype, [STAGES] + v.block_type.shape, v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [TEAMS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [TEAMS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(TEAMS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=TEAMS)
    fence_async_shared()
    gl.thread_barrier()
    if PDL:
        gdc_launch_dependents()

    rings = (q_slots, k_slots, v_slots, q_full, q_empty, full, empty)
    grid = (tiles_m, tiles, heads, batches, gl.cdiv(keys, k.block_type.shape[2]))
    result = (out, length, ldo, out_net, out_batch)
    # The numbers of registers are those that `tuning` counts with.
    if TEAMS == 1:
        gl.warp_specialize(
            [
                (_attend, (0, rings, grid, result, keys, factor, D, D1, D2, EVEN, POLYNOMIALS, num_warps)),
                (_fill, (q, k, v, rings, grid, queries, keys_shared, PDL)),
            ],
            [1],
            [FEEDER_REGISTERS],
        )
    elif TEAMS == 2:
        gl.warp_specialize(
            [
                (_attend, (0, rings, grid, result, keys, factor, D, D1, D2, EVEN, POLYNOMIALS, num_warps)),
                (_attend, (1, rings, grid, result, keys, factor, D, D1, D2, EVEN, POLYNOMIALS, num_warps)),
                (_fill, (q, k, v, rings, grid, queries, keys_shared, PDL)),
            ],
            [num_warps, 1],
            [240, FEEDER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (0, rings, grid, result, keys, factor, D, D1, D2, EVEN, POLYNOMIALS, num_warps)),
                (_attend, (1, rings, grid, result, keys, factor, D, D1, D2, EVEN, POLYNOMIALS, num_warps)),
                (_attend, (2, rings, grid, result, keys, factor, D, D1, D2, EVEN, POLYNOMIALS, num_warps)),
                (_fill, (q, k, v, rings, grid, queries, keys_shared, PDL)),
            ],
            [num_warps, num_warps, 1],
            [160, 160, FEEDER_REGISTERS],
        )
