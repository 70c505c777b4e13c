"""The matrix product for compute capability 9.0 of linear layers whose sums are short: the rows stay.

With K of 320 a tile of `hopper` is five blocks long, and its start and its epilogue take longer than its products.
Here a program loads its rows of the input once, all of K, and walks over some tiles of the output's channels. The
weights come through a ring that does not run dry between tiles: while a tile's epilogue runs, the weights of the next
arrive. The L2 cache is asked for the weights once for each BM rows, and for the rows once for each walk.

A program is one team of warps, or two that share the rows: each has a ring of its own and takes every second tile, so
that one team's epilogue runs while the other's products do.

A gated layer's hidden channels and gates lie in one slot of the ring, one behind the other, and are one operand of
twice the channels: the rows are read from shared memory once for both.
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

from runtime.fused.hopper import next_slot
from runtime.fused.kernels import activate


@gluon.constexpr_function
def store_layout(BM, BN, num_warps):
    """Eight neighbouring channels a thread, in the warp whose sums they are: four threads exchange what they have."""
    registers = [[0, 1], [0, 2], [0, 4], [8, 0]]
    registers += [[0, 1 << i] for i in range(5, BN.bit_length() - 1)]
    registers += [[1 << i, 0] for i in range((16 * num_warps).bit_length() - 1, BM.bit_length() - 1)]
    warps = [[16 << i, 0] for i in range(num_warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], warps, [], [BM, BN])


@gluon.jit
def fast_gelu(x):
    """GELU by erf's approximation 7.1.26 of Abramowitz and Stegun, whose error is at most 1.5e-7.

    0.5 x (1 + erf(x / sqrt 2)) is max(x, 0) - |x| P(t) exp(-x^2 / 2) with t = 1 / (1 + p |x| / sqrt 2) and half their
    polynomial P: no difference of nearly equal numbers, and two of the slow instructions.
    """
    size = gl.minimum(gl.abs(x), 32.0)  # beyond it the product below is 0, which of infinity it would not be
    t = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + 0.23164188 * size], dtype=gl.float32, is_pure=True, pack=1
    )
    # exp(-x^2 / 2) as a power of two.
    bell = gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * x * -0.72134752], dtype=gl.float32, is_pure=True, pack=1
    )
    p = 0.5307027145 * t - 0.7265760135
    p = p * t + 0.7107068705
    p = p * t - 0.142248368
    p = p * t + 0.127414796
    return gl.maximum(x, 0.0) - (size * t) * (p * bell)


@gluon.jit
def _load_weights(
    t, slot, w, net, n0, b_slots, bars, BLOCKS: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """Start the copy of block `t` of a walk that begins at channel n0, BLOCKS a tile, every STEP-th tile."""
    bar = bars.index(slot)
    mbarrier.expect(bar, w.block_type.nbytes)
    tile = t // BLOCKS
    tma.async_copy_global_to_shared(
        w, [net, 0, n0 + tile * (STEP * BN), (t - tile * BLOCKS) * BK], bar, b_slots.index(slot)
    )


@gluon.jit
def _by_channel(numbers, n0, N, BN: gl.constexpr, WARPS: gl.constexpr):
    """A tile's channels of a vector, one a thread: they arrive while the tile is multiplied."""
    columns = gl.arange(0, BN, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    return gl.load(numbers + n0 + columns, mask=columns < N - n0, other=0.0).to(gl.float32)


@gluon.jit
def _residuals(
    residual, m0, n0, far, M, N, ldr, residual_net, residual_rows, BM: gl.constexpr, BN: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """A tile of the residual, as it is stored."""
    layout: gl.constexpr = store_layout(BM, BN, WARPS)
    rows = m0 + gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    cols = n0 + gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
    spots = residual + far * residual_net + (rows % residual_rows)[:, None] * ldr + cols[None, :]
    return gl.load(spots, mask=(rows < M)[:, None] & (cols < N)[None, :], other=0.0)


@gluon.jit
def _store_tile(
    acc, biases, gate_biases, shifts, residuals, m0, n0, net, residual, scale, out, M, N, ldr, ldo, residual_net,
    residual_rows, out_net, scale_step, scale_rows, HAS_BIAS: gl.constexpr, HAS_SHIFT: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, HAS_SCALE: gl.constexpr, ACT: gl.constexpr, GATED: gl.constexpr, EARLY: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The epilogue of `hopper.finish`, of which what goes by channels is done where the products left the sums."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BN, 16])
    by_column: gl.constexpr = gl.SliceLayout(0, layout)
    if GATED:
        hidden, gates = acc.reshape([BM, 2, BN]).permute([0, 2, 1]).split()
        acc = gl.convert_layout(hidden, layout, assert_trivial=True)
        gates = gl.convert_layout(gates, layout, assert_trivial=True)
        if HAS_BIAS:
            gates += gl.convert_layout(gate_biases, by_column)[None, :]
    if HAS_BIAS:
        acc += gl.convert_layout(biases, by_column)[None, :]
    if GATED:
        acc = acc * fast_gelu(gates)
    if HAS_SHIFT:
        acc += gl.convert_layout(shifts, by_column)[None, :]
    acc = fast_gelu(acc) if ACT == "gelu" else activate(acc, ACT)

    flat: gl.constexpr = store_layout(BM, BN, WARPS)
    far = net.to(gl.int64)
    rows = m0 + gl.arange(0, BM, layout=gl.SliceLayout(1, flat))
    cols = n0 + gl.arange(0, BN, layout=gl.SliceLayout(0, flat))
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    if HAS_SCALE or HAS_RESIDUAL:
        acc = gl.convert_layout(acc, flat)
        if HAS_SCALE:
            factors = gl.load(scale + rows // scale_rows * scale_step, mask=rows < M, other=0.0)
            acc *= factors.to(gl.float32)[:, None]
        if HAS_RESIDUAL:
            if not EARLY:
                residuals = _residuals(residual, m0, n0, far, M, N, ldr, residual_net, residual_rows, BM, BN, WARPS)
            acc += residuals.to(gl.float32)
        result = acc.to(out.dtype.element_ty)
    else:
        result = gl.convert_layout(acc.to(out.dtype.element_ty), flat)
    gl.store(out + far * out_net + rows[:, None] * ldo + cols[None, :], result, mask=inside)


@gluon.jit
def _walk(
    w, net, m0, n0, count, a_slots, a_bars, b_slots, bars, bias, shift, residual, scale, out, M, N, ldr, ldo, bias_net,
    shift_net, residual_net, residual_rows, out_net, scale_step, scale_rows, HAS_BIAS: gl.constexpr,
    HAS_SHIFT: gl.constexpr, HAS_RESIDUAL: gl.constexpr, HAS_SCALE: gl.constexpr, ACT: gl.constexpr,
    GATED: gl.constexpr, BLOCKS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, TEAMS: gl.constexpr, WARPS: gl.constexpr, WAITS: gl.constexpr,
):  # fmt: skip
    """A team's `count` tiles, the first at channel n0; STAGES blocks of weights are on their way already."""
    if WAITS:
        gdc_wait()  # other warps than those that waited: they read the residual
    WIDE: gl.constexpr = 2 * BN if GATED else BN
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, WIDE, 16]
    )
    # Where the registers have room, the residual is read before the products: behind them the warps would wait for it.
    EARLY: gl.constexpr = BM * BN <= 64 * 32 * WARPS
    total = count * BLOCKS
    far = net.to(gl.int64)
    slot = 0
    phase = 0
    for tile in range(count):
        n_tile = n0 + tile * (TEAMS * BN)
        # Where there is none, any number stands for it.
        biases = n_tile
        gate_biases = n_tile
        shifts = n_tile
        if HAS_BIAS:
            biases = _by_channel(bias + far * bias_net, n_tile, N, BN, WARPS)
            if GATED:
                gate_biases = _by_channel(bias + far * bias_net + N, n_tile, N, BN, WARPS)
        if HAS_SHIFT:
            shifts = _by_channel(shift + far * shift_net, n_tile, N, BN, WARPS)
        residuals = n_tile
        if HAS_RESIDUAL and EARLY:
            residuals = _residuals(residual, m0, n_tile, far, M, N, ldr, residual_net, residual_rows, BM, BN, WARPS)
        acc = gl.zeros((BM, WIDE), gl.float32, layout=layout)
        for k in range(BLOCKS):
            # The rows' barriers have one phase, and stay behind it.
            mbarrier.wait(a_bars.index(k), 0)
            mbarrier.wait(bars.index(slot), phase)
            a = a_slots.index(k).reshape([BM, BK])
            b = b_slots.index(slot).reshape([WIDE, BK]).permute((1, 0))
            acc = warpgroup_mma(a, b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            # All warps are done with the slot of the block before; it takes the block STAGES after that one.
            gl.thread_barrier()
            ahead = tile * BLOCKS + k - 1 + STAGES
            if (k > 0) & (ahead < total):
                before = gl.where(slot == 0, STAGES, slot) - 1
                _load_weights(ahead, before, w, net, n0, b_slots, bars, BLOCKS, BN, BK, TEAMS)
            slot, phase = next_slot(slot, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        gl.thread_barrier()
        # The same of the tile's last block, before the epilogue and not behind it.
        ahead = (tile + 1) * BLOCKS - 1 + STAGES
        if ahead < total:
            before = gl.where(slot == 0, STAGES, slot) - 1
            _load_weights(ahead, before, w, net, n0, b_slots, bars, BLOCKS, BN, BK, TEAMS)
        _store_tile(
            acc, biases, gate_biases, shifts, residuals, m0, n_tile, net, residual, scale, out, M, N, ldr, ldo,
            residual_net, residual_rows, out_net, scale_step, scale_rows, HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, HAS_SCALE,
            ACT, GATED, EARLY, BM, BN, WARPS,
        )  # fmt: skip


@gluon.jit(
    do_not_specialize=("M", "walk", "scale_step", "scale_rows", "residual_rows"),
    do_not_specialize_on_alignment=("scale", "shift", "bias"),
)
def resident_matmul_kernel(
    x,
    w,
    bias,
    shift,
    residual,
    scale,
    out,
    M,
    N,
    walk,
    ldr,
    ldo,
    bias_net,
    shift_net,
    residual_net,
    residual_rows,
    out_net,
    scale_step,
    scale_rows,
    HAS_BIAS: gl.constexpr,
    HAS_SHIFT: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    ACT: gl.constexpr,
    GATED: gl.constexpr,
    BLOCKS: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    TEAMS: gl.constexpr,
    STATIC: gl.constexpr,
    PDL: gl.constexpr,
    num_warps: gl.constexpr,
):
    """out = residual + scale * act(x w.T + bias + shift) of linear layers; BLOCKS BK is K, or more.

    x (nets, 1, 1, M, K) and w (nets, 1 or 2, N, K) are descriptors. A program takes BM rows and `walk` tiles of BN
    channels; with two TEAMS of `num_warps` warps each they take them in turn.
    """
    tiles_m = gl.cdiv(M, BM)
    m0 = gl.program_id(0) % tiles_m * BM
    first = gl.program_id(0) // tiles_m * walk
    net = gl.program_id(1)
    count = gl.minimum(walk, gl.cdiv(N, BN) - first)
    n0 = first * BN

    a_slots = gl.allocate_shared_memory(x.dtype, [BLOCKS] + x.block_type.shape, x.layout)
    a_bars = gl.allocate_shared_memory(gl.int64, [BLOCKS, 1], mbarrier.MBarrierLayout())
    b_slots = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_type.shape, w.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    c_slots = b_slots
    c_bars = bars
    if TEAMS == 2:
        c_slots = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_type.shape, w.layout)
        c_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BLOCKS):
        mbarrier.init(a_bars.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
        if TEAMS == 2:
            mbarrier.init(c_bars.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()

    # Nobody writes STATIC weights, so their copies begin while the kernel before this one still runs.
    if PDL and not STATIC:
        gdc_wait()
    mine = (count + TEAMS - 1) // TEAMS
    others = count - mine
    for i in gl.static_range(STAGES):
        if i < mine * BLOCKS:
            _load_weights(i, i, w, net, n0, b_slots, bars, BLOCKS, BN, BK, TEAMS)
    if TEAMS == 2:
        for i in gl.static_range(STAGES):
            if i < others * BLOCKS:
                _load_weights(i, i, w, net, n0 + BN, c_slots, c_bars, BLOCKS, BN, BK, TEAMS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for i in gl.static_range(BLOCKS):
        mbarrier.expect(a_bars.index(i), x.block_type.nbytes)
        tma.async_copy_global_to_shared(x, [net, 0, 0, m0, i * BK], a_bars.index(i), a_slots.index(i))

    if TEAMS == 1:
        _walk(
            w, net, m0, n0, mine, a_slots, a_bars, b_slots, bars, bias, shift, residual, scale, out, M, N, ldr, ldo,
            bias_net, shift_net, residual_net, residual_rows, out_net, scale_step, scale_rows, HAS_BIAS, HAS_SHIFT,
            HAS_RESIDUAL, HAS_SCALE, ACT, GATED, BLOCKS, BM, BN, BK, STAGES, TEAMS, num_warps, False,
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_walk, (
                    w, net, m0, n0, mine, a_slots, a_bars, b_slots, bars, bias, shift, residual, scale, out, M, N, ldr,
                    ldo, bias_net, shift_net, residual_net, residual_rows, out_net, scale_step, scale_rows, HAS_BIAS,
                    HAS_SHIFT, HAS_RESIDUAL, HAS_SCALE, ACT, GATED, BLOCKS, BM, BN, BK, STAGES, TEAMS, num_warps,
                    False,
                )),
                (_walk, (
                    w, net, m0, n0 + BN, others, a_slots, a_bars, c_slots, c_bars, bias, shift, residual, scale, out,
                    M, N, ldr, ldo, bias_net, shift_net, residual_net, residual_rows, out_net, scale_step, scale_rows,
                    HAS_BIAS, HAS_SHIFT, HAS_RESIDUAL, HAS_SCALE, ACT, GATED, BLOCKS, BM, BN, BK, STAGES, TEAMS,
                    num_warps, PDL,
                )),
            ],
            [num_warps],
            [65536 // (64 * num_warps) - 16],
        )  # fmt: skip
