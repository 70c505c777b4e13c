// The kernels of GroupNorm and their launches; group_norm_plan.h says how a call is cut into blocks.
//
// Statistics. A thread sums its elements about a value near them, so what cancels is at most as many roundings as it
// has elements, whatever the mean; it then holds (count, mean, M2), where M2 is the sum of squared deviations. Such
// triples are merged by lane, warp, block, cluster and tile: for FP32 data the mean first and M2 about it after, for the
// half types in one go about the first triple's mean. The order is fixed by sizes alone and no sum is atomic, so equal
// inputs give equal bits. NaN and infinity spread to all of their group.
//
// Small maps are a race against latency: parameters are asked for together with the elements, indices come from
// multiplications, and what one thread can do for all is done by one.
//
// Overlap. Where a plan allows it, a launch begins while the one ahead of it in the stream still ends, so that starting
// it costs little. Every thread of every kernel waits for the end of all that stands ahead before it touches memory, even
// gamma and beta, which another kernel may have made, and allows the next launch to begin only then. So when a launch
// begins, all but the one just ahead of it has ended, whoever's kernels they are: one that relies on the kernel before
// its predecessor having ended is right to. Without the launch's attribute both instructions do nothing. A kernel ahead
// that never says that the next may begin says so by ending.
#include "group_norm_device.cuh"
#include "group_norm_plan.h"
#include "group_norm_types.cuh"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <type_traits>

namespace canny2image {
namespace {

struct Moments {
    float count;
    float mean;
    float m2;
};

// What one launch is told; by value, so that a captured graph keeps it.
struct Arguments {
    void const* x;
    void* y;
    void const* gamma;
    void const* beta;
    void const* bias;
    float* partials;  // Moments of [group of the batch][tile]
    int64_t sampleStride;
    uint32_t pixelStride;
    uint32_t firstUnit;
    uint32_t channels;
    uint32_t pixels;
    uint32_t groupChannels;
    uint32_t tiles;
    uint32_t chunk;        // of a tile: packs (run) or pixels (columns)
    uint32_t sharedPacks;  // of a thread
    uint32_t run;          // packs of a group
    Divisor tilesDivisor;
    Divisor unitsDivisor;    // units of a sample
    Divisor runDivisor;      // NCHW: packs of one channel; NHWC: channels of a group
    Divisor columnsDivisor;  // columns: packs of a bundle's channels
    Divisor rowsDivisor;     // columns: pixels that a block takes at once
    Divisor itemDivisor;     // columns: items of a group in one row
    Divisor parameterDivisor;  // samples that share a row of gamma and beta
    uint32_t bundleChannels;
    uint32_t itemWidth;
    float epsilon;
    bool silu;
    bool nhwc;
    bool staged;            // run: the group's gamma, beta and bias go through shared memory, as of wide packs always
    bool parameterFloat;    // gamma and beta are FP32, else the data's type
    bool biasFloat;         // the same of the bias
    bool parameterAligned;  // gamma and beta allow 16-byte accesses
    bool biasAligned;       // the same of the bias
};

__device__ __forceinline__ uint32_t divide(uint32_t n, Divisor const& by) {
    return by.divisor == 1 ? n : multiplyHigh(n, by.multiplier) >> by.shift;
}

// Where a sample's row of gamma and beta begins.
__device__ __forceinline__ int64_t parameterRow(Arguments const& a, uint32_t sample) {
    return static_cast<int64_t>(divide(sample, a.parameterDivisor)) * a.channels;
}

__device__ __forceinline__ uint32_t lower(uint32_t a, uint32_t b) { return a < b ? a : b; }

// The triple of `count` values whose distances from `shift` have this sum and this sum of squares.
__device__ __forceinline__ Moments makeMoments(float count, float shift, float sum, float squares) {
    if (!(count > 0.0F)) {
        return {0.0F, 0.0F, 0.0F};
    }
    float const mean = sum * reciprocalFast(count);
    float const m2 = squares - sum * mean;
    return {count, shift + mean, m2 < 0.0F ? 0.0F : m2};  // NaN is not below zero and stays
}

// Distance of a triple's mean; an empty one is nowhere, even where its distance would overflow.
__device__ __forceinline__ float distanceOf(Moments const& m, float shift) {
    return m.count > 0.0F ? m.mean - shift : 0.0F;
}

// Adds a triple to sums about `shift`.
__device__ __forceinline__ void addMoments(Moments const& m, float shift, float& count, float& sum, float& squares) {
    float const distance = distanceOf(m, shift);
    float const weighted = m.count * distance;
    count += m.count;
    sum += weighted;
    squares += m.m2 + weighted * distance;
}

// Merges the triples of `Lanes` neighbouring lanes; all of them get the same bits. The first of them is empty only where
// all are.
template <bool Exact, int Lanes>
__device__ __forceinline__ Moments mergeLanes(Moments const& own) {
    float const shift = shuffleFrom<Lanes>(own.mean, 0);
    float count = 0.0F;
    float sum = 0.0F;
    float squares = 0.0F;
    addMoments(own, shift, count, sum, squares);
#pragma unroll
    for (int mask = Lanes / 2; mask > 0; mask /= 2) {
        count += shuffleXor(count, mask);
        sum += shuffleXor(sum, mask);
        if (!Exact) {
            squares += shuffleXor(squares, mask);
        }
    }
    Moments merged = makeMoments(count, shift, sum, squares);
    if (Exact) {
        float const distance = distanceOf(own, merged.mean);
        float m2 = own.m2 + own.count * distance * distance;
#pragma unroll
        for (int mask = Lanes / 2; mask > 0; mask /= 2) {
            m2 += shuffleXor(m2, mask);
        }
        merged.m2 = m2;
    }
    return merged;
}

// Merges one group's partial moments of all tiles, a warp together.
template <bool Exact>
__device__ __forceinline__ Moments mergeTiles(float const* partials, uint32_t tiles, uint32_t lane) {
    float count = 0.0F;
    float sum = 0.0F;
    float squares = 0.0F;
    float const* const own = partials + 3 * lower(lane, tiles - 1);
    float const shift = loadShared(own + 1);
#pragma unroll 2
    for (uint32_t tile = lane; tile < tiles; tile += kWarp) {
        float const* place = partials + 3 * tile;
        addMoments({loadShared(place), loadShared(place + 1), loadShared(place + 2)}, shift, count, sum, squares);
    }
    return mergeLanes<Exact, kWarp>(makeMoments(count, shift, sum, squares));
}

__device__ __forceinline__ void storeMoments(float* place, Moments const& m) {
    place[0] = m.count;
    place[1] = m.mean;
    place[2] = m.m2;
}

__device__ __forceinline__ float deviationInverse(Moments const& m, float epsilon) {
    return reciprocalRoot(m.m2 * reciprocalFast(m.count) + epsilon);
}

template <typename T>
__device__ __forceinline__ float loadScalar(void const* base, int64_t index, bool isFloat) {
    return isFloat ? static_cast<float const*>(base)[index] : toFloat(static_cast<T const*>(base)[index]);
}

// V neighbouring parameters; `index` is a multiple of V, and V of 2.
template <typename T, int V>
__device__ __forceinline__ void loadParameters(
    void const* base, int64_t index, bool isFloat, bool aligned, float (&value)[V]) {
    if (aligned && !isFloat) {
        reinterpret_cast<Pack<T, V> const*>(static_cast<T const*>(base) + index)->unpack(value);
    } else if (aligned) {
#pragma unroll
        for (int i = 0; i < V; i += 2) {
            float2 const two = *reinterpret_cast<float2 const*>(static_cast<float const*>(base) + index + i);
            value[i] = two.x;
            value[i + 1] = two.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) {
            value[i] = loadScalar<T>(base, index + i, isFloat);
        }
    }
}

// What turns an element into a result. The mean is taken off before the multiplication: folded into the addition, its
// rounding would be scaled up where the deviation is small.
struct Affine {
    float centre;
    float scale;
    float beta;
};

__device__ __forceinline__ Affine makeAffine(float mean, float inverse, float4 const& parameters) {
    return {mean - parameters.z, inverse * parameters.x, parameters.y};
}

// Of the results of one pack, from its elements; `affineOf(j)` is for element j.
template <bool WithSilu, typename T, int V, typename AffineOf>
__device__ __forceinline__ void finish(Pack<T, V>& pack, AffineOf affineOf) {
    float value[V];
    pack.unpack(value);
#pragma unroll
    for (int j = 0; j < V; ++j) {
        Affine const by = affineOf(j);
        value[j] = (value[j] - by.centre) * by.scale + by.beta;
    }
    if constexpr (WithSilu && V > 1 && sizeof(T) == 2) {
#pragma unroll
        for (int j = 0; j < V; j += 2) {
            siluPair(value[j], value[j + 1]);
        }
    } else if constexpr (WithSilu) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
            value[j] = silu(value[j]);
        }
    }
    pack.pack(value);
}

// ---------------------------------------------------------------------------------------------------------------------
// Runs: the elements of a (sample, group) as one sequence of packs, cut into tiles.

template <typename T, int V>
struct Run {
    Arguments const& a;
    uint32_t sample;
    uint32_t group;
    int64_t base;  // of the group's first element

    __device__ __forceinline__ Run(Arguments const& arguments, uint32_t unit)
        : a(arguments), sample(divide(unit, arguments.unitsDivisor)),
          group(unit - sample * arguments.unitsDivisor.divisor) {
        int64_t const first = static_cast<int64_t>(group) * a.groupChannels;
        base = sample * a.sampleStride + (a.nhwc ? first : first * a.pixels);
    }
    // Of pack `i`: which of the group's channels, and where in memory. NHWC comes in packs of one element only.
    __device__ __forceinline__ uint32_t channel(uint32_t i) const {
        uint32_t const quotient = divide(i, a.runDivisor);
        return a.nhwc ? i - quotient * a.groupChannels : quotient;
    }
    __device__ __forceinline__ int64_t place(uint32_t i) const {
        if (V > 1 || !a.nhwc) {
            return base + static_cast<int64_t>(i) * V;
        }
        uint32_t const pixel = divide(i, a.runDivisor);
        return base + static_cast<int64_t>(pixel) * a.pixelStride + (i - pixel * a.groupChannels);
    }
    __device__ __forceinline__ Pack<T, V> const* source(uint32_t i) const {
        return reinterpret_cast<Pack<T, V> const*>(static_cast<T const*>(a.x) + place(i));
    }
    __device__ __forceinline__ void store(uint32_t i, Pack<T, V> const& pack) const {
        storePack(reinterpret_cast<Pack<T, V>*>(static_cast<T*>(a.y) + place(i)), pack);
    }
    // gamma, beta and bias of one of the group's channels, from memory.
    __device__ __forceinline__ float4 parameters(uint32_t c) const {
        uint32_t const index = group * a.groupChannels + c;
        float const bias = a.bias == nullptr
            ? 0.0F
            : loadScalar<T>(a.bias, static_cast<int64_t>(sample) * a.channels + index, a.biasFloat);
        int64_t const place = parameterRow(a, sample) + index;
        return make_float4(loadScalar<T>(a.gamma, place, a.parameterFloat),
            loadScalar<T>(a.beta, place, a.parameterFloat), bias, 0.0F);
    }
};

// Sums of a thread's elements about the mean of its first pack, or of all so far (`recentre`). Of a pack, `biasOf(j)` is
// added to element j.
template <typename T, int V>
struct ThreadSums {
    static constexpr int kChains = V > 1 ? 2 : 1;  // of additions, which wait for one another
    float shift{0.0F};
    float sum[kChains]{};
    float squares[kChains]{};
    uint32_t packs{0};

    template <typename BiasOf>
    __device__ __forceinline__ void begin(Pack<T, V> const& pack, BiasOf biasOf) {
        float value[V];
        pack.unpack(value);
        float total = 0.0F;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            total += value[j] + biasOf(j);
        }
        shift = total * (1.0F / V);
    }
    template <typename BiasOf>
    __device__ __forceinline__ void add(Pack<T, V> const& pack, BiasOf biasOf) {
        float value[V];
        pack.unpack(value);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            float const distance = value[j] - (shift - biasOf(j));
            sum[j % kChains] += distance;
            squares[j % kChains] += distance * distance;
        }
        ++packs;
        // A single first value may lie far from the others, and the squares of their distances would drown the rest.
        if (V == 1 && (packs & (packs - 1)) == 0) {
            recentre();
        }
    }
    // About the mean so far: each time that the count has doubled, the distances from a first outlier halve.
    __device__ __forceinline__ void recentre() {
        static_assert(V > 1 || kChains == 1, "one chain is looked at");
        float const mean = sum[0] * reciprocalFast(static_cast<float>(packs));
        float const deviations = squares[0] - sum[0] * mean;
        squares[0] = deviations < 0.0F ? 0.0F : deviations;  // NaN is not below zero and stays
        shift += mean;
        sum[0] = 0.0F;
    }
    __device__ __forceinline__ Moments moments() const {
        float const sums = kChains > 1 ? sum[0] + sum[kChains - 1] : sum[0];
        float const all = kChains > 1 ? squares[0] + squares[kChains - 1] : squares[0];
        return makeMoments(static_cast<float>(packs * V), shift, sums, all);
    }
};

// Merges a block's threads: every thread gets the block's triple.
template <bool Exact>
__device__ __forceinline__ Moments mergeBlock(Moments const& own) {
    CANNY2IMAGE_SHARED(Moments, warps, kMaxThreads / kWarp);
    uint32_t const lane = threadIdx.x % kWarp;
    Moments const warp = mergeLanes<Exact, kWarp>(own);
    if (lane == 0) {
        warps[threadIdx.x / kWarp] = warp;
    }
    blockSync();
    constexpr int kWarps = kMaxThreads / kWarp;
    uint32_t const place = lane % kWarps;
    return mergeLanes<Exact, kWarps>(place < blockDim.x / kWarp ? warps[place] : Moments{0.0F, 0.0F, 0.0F});
}

// Triples as blocks send them, and back; of a block that is not there, an empty one.
__device__ __forceinline__ float4 asMessage(Moments const& m) { return make_float4(m.count, m.mean, m.m2, 0.0F); }

__device__ __forceinline__ Moments messageOf(float4 const* messages, uint32_t rank, uint32_t tiles) {
    if (rank >= tiles) {
        return {0.0F, 0.0F, 0.0F};
    }
    float4 const message = messages[rank];
    return {message.x, message.y, message.z};
}

// What the blocks of a cluster meet in, where each sends one triple.
struct ClusterMemory {
    float4* messages;
    Mailbox* box;

    __device__ __forceinline__ void open(uint32_t tiles) const {
        openMailbox(box, tiles * static_cast<uint32_t>(sizeof(float4)));
    }
};

// Merges the blocks of a cluster: all threads get the cluster's triple.
template <bool Exact>
__device__ __forceinline__ Moments mergeCluster(
    Moments const& block, ClusterMemory const& memory, uint32_t tile, uint32_t tiles) {
    waitForMailboxes();
    if (threadIdx.x < tiles) {
        send(memory.box, memory.messages + tile, threadIdx.x, asMessage(block));
    }
    receive(memory.box);
    return mergeLanes<Exact, kMaxCluster>(messageOf(memory.messages, threadIdx.x % kMaxCluster, tiles));
}

// This block's number. The second of two kernels begins with what the first read last and the cache still has.
__device__ __forceinline__ uint32_t blockOf(Stage stage) {
    return stage == Stage::kApply ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
}

template <typename T, int V, int R, Stage S>
__global__ void __launch_bounds__(kMaxThreads, R <= kFewPacks ? 2 : 1) runKernel(Arguments const a) {
    CANNY2IMAGE_SHARED(float4, messages, kMaxCluster);
    CANNY2IMAGE_SHARED(Mailbox, mailbox, 1);
    ClusterMemory const meeting{messages, mailbox};
    constexpr bool kExact = sizeof(T) == 4;
    constexpr bool kParks = (S == Stage::kHeld || S == Stage::kGrid) && R == kManyPacks;
    uint32_t const block = blockOf(S);
    uint32_t const wholeUnit = divide(block, a.tilesDivisor);
    uint32_t const tile = block - wholeUnit * a.tiles;
    uint32_t const unit = a.firstUnit + wholeUnit;
    uint32_t const lane = threadIdx.x % kWarp;
    uint32_t const step = blockDim.x;
    uint32_t const first = lower(tile * a.chunk, a.run) + threadIdx.x;
    uint32_t const end = lower((tile + 1) * a.chunk, a.run);
    bool const cluster = S == Stage::kHeld && a.tiles > 1;
    if (cluster) {
        meeting.open(a.tiles);
    }
    Run<T, V> const run(a, unit);
    Pack<T, V>* const parked = reinterpret_cast<Pack<T, V>*>(sharedMemory()) + threadIdx.x;  // this thread's alone
    float4* const staged = reinterpret_cast<float4*>(sharedMemory() + static_cast<size_t>(a.sharedPacks) * step * 16);
    float* const partials = a.partials + static_cast<size_t>(unit) * a.tiles * 3;

    waitForPrevious();
    letNextBegin();

    Pack<T, V> held[R];
    auto const loadBatch = [&](uint32_t batch) {
#pragma unroll
        for (int k = 0; k < R; ++k) {
            if (batch + k * step < end) {
                held[k] = *run.source(batch + k * step);
            }
        }
    };
    // `action(pack's number, its place)` for what this thread holds in shared memory.
    auto const forParked = [&](auto action) {
#pragma unroll 4
        for (uint32_t k = 0; k < a.sharedPacks; ++k) {
            uint32_t const i = first + (R + k) * step;
            if (i < end) {
                action(i, parked + k * step);
            }
        }
    };
    auto const parametersOf = [&](uint32_t i) {
        uint32_t const c = run.channel(i);
        return V > 1 || a.staged ? staged[c] : run.parameters(c);
    };
    auto const biasOf = [&](uint32_t i) {
        float const bias = a.bias == nullptr ? 0.0F : parametersOf(i).z;
        return [bias](int) { return bias; };
    };

    loadBatch(first);
    if constexpr (kParks) {
        forParked([&](uint32_t i, Pack<T, V>* place) { copyAsync(place, run.source(i)); });
    }
    if ((V > 1 || a.staged) && (S != Stage::kPartial || a.bias != nullptr)) {
        for (uint32_t c = threadIdx.x; c < a.groupChannels; c += step) {
            staged[c] = run.parameters(c);
        }
        if (a.bias != nullptr || S == Stage::kApply) {
            blockSync();  // without a bias, the barrier of mergeBlock is soon enough
        }
    }

    Moments all{0.0F, 0.0F, 0.0F};
    if constexpr (S != Stage::kApply) {
        ThreadSums<T, V> sums;
        if (first < end) {
            sums.begin(held[0], biasOf(first));
        }
        for (uint32_t batch = first; batch < end; batch += R * step) {
            if (S == Stage::kPartial && batch != first) {
                loadBatch(batch);
            }
#pragma unroll
            for (int k = 0; k < R; ++k) {
                if (batch + k * step < end) {
                    sums.add(held[k], biasOf(batch + k * step));
                }
            }
            if (S != Stage::kPartial) {
                break;  // the rest is parked below
            }
        }
        if constexpr (kParks) {
            waitForCopies();
            forParked([&](uint32_t i, Pack<T, V> const* place) { sums.add(loadParked(place), biasOf(i)); });
        }
        all = mergeBlock<kExact>(sums.moments());
        if constexpr (S == Stage::kPartial || S == Stage::kGrid) {
            if (threadIdx.x == 0) {
                storeMoments(partials + 3 * tile, all);
            }
            if constexpr (S == Stage::kPartial) {
                return;
            }
            gridSync();
        }
    }
    if (cluster) {
        all = mergeCluster<kExact>(all, meeting, tile, a.tiles);
    } else if constexpr (S != Stage::kHeld) {
        all = mergeTiles<kExact>(partials, a.tiles, lane);
    }
    float const inverse = deviationInverse(all, a.epsilon);

    auto const writeAll = [&](auto withSilu) {
        auto const write = [&](uint32_t i, Pack<T, V> pack) {
            Affine const by = makeAffine(all.mean, inverse, parametersOf(i));
            finish<decltype(withSilu)::value>(pack, [&](int) { return by; });
            run.store(i, pack);
        };
        for (uint32_t batch = first; batch < end; batch += R * step) {
            if (S == Stage::kApply && batch != first) {
                loadBatch(batch);
            }
#pragma unroll
            for (int k = 0; k < R; ++k) {
                if (batch + k * step < end) {
                    write(batch + k * step, held[k]);
                }
            }
            if (S != Stage::kApply) {
                break;
            }
        }
        if constexpr (kParks) {
            forParked([&](uint32_t i, Pack<T, V> const* place) { write(i, loadParked(place)); });
        }
    };
    if (a.silu) {
        writeAll(std::true_type{});
    } else {
        writeAll(std::false_type{});
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Slices: NHWC, one group of some pixels, held by a block or a cluster. Accesses are as narrow as it takes for none to
// leave the group, so a thread's channels are fixed and all its sums are of one group. Worth its short rows where a map
// is small and waiting is what costs.

template <typename T, int V, int R>
__global__ void __launch_bounds__(kMaxThreads, R < kManyPacks ? 2 : 1) sliceKernel(Arguments const a) {
    CANNY2IMAGE_SHARED(float4, messages, kMaxCluster);
    CANNY2IMAGE_SHARED(Mailbox, mailbox, 1);
    ClusterMemory const meeting{messages, mailbox};
    constexpr bool kExact = sizeof(T) == 4;
    using P = Pack<T, V>;
    uint32_t const unit = divide(blockIdx.x, a.tilesDivisor);
    uint32_t const tile = blockIdx.x - unit * a.tiles;
    uint32_t const sample = divide(unit, a.unitsDivisor);
    uint32_t const group = unit - sample * a.unitsDivisor.divisor;
    uint32_t const rows = a.rowsDivisor.divisor;
    uint32_t const row = divide(threadIdx.x, a.columnsDivisor);
    uint32_t const column = threadIdx.x - row * a.columnsDivisor.divisor;
    uint32_t const channel = group * a.groupChannels + column * V;
    uint32_t const begin = lower(tile * a.chunk, a.pixels);
    uint32_t const end = lower((tile + 1) * a.chunk, a.pixels);
    // Threads past the last row have no pixels; they still meet every barrier.
    uint32_t const first = row < rows ? begin + row : end;
    if (a.tiles > 1) {
        meeting.open(a.tiles);
    }
    int64_t const place = sample * a.sampleStride + static_cast<int64_t>(first) * a.pixelStride + channel;
    int64_t const step = static_cast<int64_t>(rows) * a.pixelStride;
    T const* const x = static_cast<T const*>(a.x) + place;
    T* const y = static_cast<T*>(a.y) + place;
    waitForPrevious();
    letNextBegin();

    P held[R];
#pragma unroll
    for (int k = 0; k < R; ++k) {
        if (first + k * rows < end) {
            held[k] = *reinterpret_cast<P const*>(x + k * step);
        }
    }
    float gamma[V];
    float beta[V];
    float bias[V] = {};
    int64_t const parameter = parameterRow(a, sample) + channel;
    loadParameters<T>(a.gamma, parameter, a.parameterFloat, a.parameterAligned, gamma);
    loadParameters<T>(a.beta, parameter, a.parameterFloat, a.parameterAligned, beta);
    if (a.bias != nullptr) {
        loadParameters<T>(a.bias, static_cast<int64_t>(sample) * a.channels + channel, a.biasFloat, a.biasAligned, bias);
    }

    ThreadSums<T, V> sums;
    auto const biasOf = [&](int j) { return bias[j]; };
#pragma unroll
    for (int k = 0; k < R; ++k) {
        if (first + k * rows < end) {
            if (k == 0) {
                sums.begin(held[k], biasOf);
            }
            sums.add(held[k], biasOf);
        }
    }
    Moments all = mergeBlock<kExact>(sums.moments());
    if (a.tiles > 1) {
        all = mergeCluster<kExact>(all, meeting, tile, a.tiles);
    }
    float const inverse = deviationInverse(all, a.epsilon);

    Affine by[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
        by[j] = makeAffine(all.mean, inverse, make_float4(gamma[j], beta[j], bias[j], 0.0F));
    }
    auto const writeAll = [&](auto withSilu) {
#pragma unroll
        for (int k = 0; k < R; ++k) {
            if (first + k * rows < end) {
                finish<decltype(withSilu)::value>(held[k], [&](int j) { return by[j]; });
                storePack(reinterpret_cast<P*>(y + k * step), held[k]);
            }
        }
    };
    if (a.silu) {
        writeAll(std::true_type{});
    } else {
        writeAll(std::false_type{});
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Columns: NHWC, some pixels by a bundle of whole groups. Thread (row, column) takes every rows-th pixel of one pack of
// channels, so that neighbouring threads read neighbouring addresses and each thread's channels are fixed. A pack may
// straddle groups: sums are kept by channel and joined to groups at the end.

template <typename T>
struct ColumnSums {
    static constexpr int V = kVector<T>;
    float shift[V];
    float sum[V];
    float squares[V];

    __device__ __forceinline__ void begin(Pack<T, V> const& pack) {
        pack.unpack(shift);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            sum[j] = squares[j] = 0.0F;
        }
    }
    __device__ __forceinline__ void add(Pack<T, V> const& pack) {
        float value[V];
        pack.unpack(value);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            float const distance = value[j] - shift[j];
            sum[j] += distance;
            squares[j] += distance * distance;
        }
    }
};

// The pixels of a tile by the rows of threads that take them: the first `longer` rows one more than the others.
struct RowPixels {
    uint32_t whole;
    uint32_t longer;

    __device__ __forceinline__ RowPixels(uint32_t pixels, Divisor const& rows)
        : whole(divide(pixels, rows)), longer(pixels - whole * rows.divisor) {}
    __device__ __forceinline__ uint32_t of(uint32_t row) const { return whole + (row < longer ? 1 : 0); }
};

// Where the dynamic shared memory of a columns block lies: parked packs, then these.
struct ColumnMemory {
    float4* parameters;  // gamma, beta and bias of each channel; at last what makes an `Affine`
    float4* groups;      // moments of [group][block of the cluster]
    float* mean;         // of items [row][item of the row]
    float* m2;           // the same

    __device__ __forceinline__ ColumnMemory(Arguments const& a, uint32_t itemsPerRow, uint32_t groupCount) {
        parameters = reinterpret_cast<float4*>(sharedMemory() + static_cast<size_t>(a.sharedPacks) * blockDim.x * 16);
        groups = parameters + a.bundleChannels;
        mean = reinterpret_cast<float*>(groups + groupCount * kMaxCluster);
        m2 = mean + static_cast<size_t>(a.rowsDivisor.divisor) * itemsPerRow;
    }
};

// Joins neighbouring pairs of triples, of Width / 2 channels and `count` pixels each, where items are that wide.
template <int V, int Width>
__device__ __forceinline__ void joinPairs(float (&mean)[V], float (&m2)[V], float count, uint32_t itemWidth) {
    if (itemWidth >= Width) {
        float const half = 0.5F * (count * (Width / 2));  // n * n / (n + n)
#pragma unroll
        for (int j = 0; j < V / Width; ++j) {
            float const distance = mean[2 * j + 1] - mean[2 * j];
            m2[j] = (m2[2 * j] + m2[2 * j + 1]) + distance * distance * half;
            mean[j] = mean[2 * j] + 0.5F * distance;
        }
    }
}

// A thread's channels, of `pixels` pixels, to items of `itemWidth` channels.
template <typename T>
__device__ __forceinline__ void storeItems(
    Arguments const& a, ColumnSums<T> const& own, float const (&bias)[kVector<T>], ColumnMemory const& memory,
    uint32_t place, uint32_t pixels) {
    constexpr int V = kVector<T>;
    uint32_t const perPack = V / a.itemWidth;
    float const count = static_cast<float>(pixels);
    float const inverse = pixels == 0 ? 0.0F : reciprocalFast(count);
    float mean[V];
    float m2[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
        float const distance = own.sum[j] * inverse;
        float const deviations = own.squares[j] - own.sum[j] * distance;
        mean[j] = own.shift[j] + distance + bias[j];
        m2[j] = deviations < 0.0F ? 0.0F : deviations;  // NaN is not below zero and stays
    }
    joinPairs<V, 2>(mean, m2, count, a.itemWidth);
    joinPairs<V, 4>(mean, m2, count, a.itemWidth);
    if constexpr (V == 8) {
        joinPairs<V, 8>(mean, m2, count, a.itemWidth);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
        if (j < static_cast<int>(perPack)) {
            memory.mean[place * perPack + j] = mean[j];
            memory.m2[place * perPack + j] = m2[j];
        }
    }
}

// One group's items of this block, merged by a warp.
template <bool Exact>
__device__ __forceinline__ Moments mergeItems(
    Arguments const& a, ColumnMemory const& memory, uint32_t group, uint32_t itemsPerRow, RowPixels const& pixels,
    uint32_t lane) {
    uint32_t const perGroup = a.itemDivisor.divisor;
    uint32_t const start = group * perGroup;
    uint32_t const total = a.rowsDivisor.divisor * perGroup;
    auto const placeOf = [&](uint32_t i, uint32_t row) { return row * itemsPerRow + start + (i - row * perGroup); };
    uint32_t const own = lower(lane, total - 1);
    float const shift = memory.mean[placeOf(own, divide(own, a.itemDivisor))];
    float count = 0.0F;
    float sum = 0.0F;
    float squares = 0.0F;
#pragma unroll 4
    for (uint32_t i = lane; i < total; i += kWarp) {
        uint32_t const row = divide(i, a.itemDivisor);
        uint32_t const place = placeOf(i, row);
        float const elements = static_cast<float>(pixels.of(row) * a.itemWidth);
        addMoments({elements, memory.mean[place], memory.m2[place]}, shift, count, sum, squares);
    }
    return mergeLanes<Exact, kWarp>(makeMoments(count, shift, sum, squares));
}

// What each channel of a group is multiplied and shifted by, a warp together.
__device__ __forceinline__ void storeAffine(
    Arguments const& a, ColumnMemory const& memory, uint32_t group, Moments const& m, uint32_t lane) {
    float const inverse = deviationInverse(m, a.epsilon);
    for (uint32_t i = lane; i < a.groupChannels; i += kWarp) {
        uint32_t const c = group * a.groupChannels + i;
        Affine const by = makeAffine(m.mean, inverse, memory.parameters[c]);
        memory.parameters[c] = make_float4(by.centre, by.scale, by.beta, 0.0F);
    }
}

template <typename T, int R, Stage S>
__global__ void __launch_bounds__(kMaxThreads, 1) columnsKernel(Arguments const a) {
    CANNY2IMAGE_SHARED(Mailbox, mailbox, 1);
    constexpr int V = kVector<T>;
    constexpr bool kExact = sizeof(T) == 4;
    constexpr bool kParks = (S == Stage::kHeld || S == Stage::kGrid) && R == kManyPacks;
    using P = Pack<T, V>;
    uint32_t const block = blockOf(S);
    uint32_t const wholeUnit = divide(block, a.tilesDivisor);
    uint32_t const tile = block - wholeUnit * a.tiles;
    uint32_t const unit = a.firstUnit + wholeUnit;
    uint32_t const sample = divide(unit, a.unitsDivisor);
    uint32_t const columns = a.columnsDivisor.divisor;
    uint32_t const rows = a.rowsDivisor.divisor;
    uint32_t const row = divide(threadIdx.x, a.columnsDivisor);
    uint32_t const column = threadIdx.x - row * columns;
    uint32_t const base = (unit - sample * a.unitsDivisor.divisor) * a.bundleChannels;  // first channel of the bundle
    uint32_t const channel = base + column * V;
    uint32_t const begin = lower(tile * a.chunk, a.pixels);
    uint32_t const end = lower((tile + 1) * a.chunk, a.pixels);
    // Threads past the last row have no pixels; they still meet every barrier.
    uint32_t const first = row < rows ? begin + row : end;
    uint32_t const itemsPerRow = columns * (V / a.itemWidth);
    uint32_t const groupCount = divide(itemsPerRow, a.itemDivisor);
    bool const cluster = S == Stage::kHeld && a.tiles > 1;
    if (cluster) {
        openMailbox(mailbox, groupCount * a.tiles * static_cast<uint32_t>(sizeof(float4)));
    }
    T const* const x = static_cast<T const*>(a.x) + sample * a.sampleStride + channel;
    T* const y = static_cast<T*>(a.y) + sample * a.sampleStride + channel;
    auto const source = [&](uint32_t pixel) {
        return reinterpret_cast<P const*>(x + static_cast<int64_t>(pixel) * a.pixelStride);
    };
    P* const parked = reinterpret_cast<P*>(sharedMemory()) + threadIdx.x;  // this thread's alone
    // `action(pixel, its pack's place)` for what this thread holds in shared memory.
    auto const forParked = [&](auto action) {
#pragma unroll 4
        for (uint32_t k = 0; k < a.sharedPacks; ++k) {
            uint32_t const pixel = first + (R + k) * rows;
            if (pixel < end) {
                action(pixel, parked + k * blockDim.x);
            }
        }
    };
    waitForPrevious();
    letNextBegin();

    P held[R];
    auto const loadBatch = [&](uint32_t batch) {
#pragma unroll
        for (int k = 0; k < R; ++k) {
            if (batch + k * rows < end) {
                held[k] = *source(batch + k * rows);
            }
        }
    };
    loadBatch(first);
    if constexpr (kParks) {
        forParked([&](uint32_t pixel, P* place) { copyAsync(place, source(pixel)); });
    }

    uint32_t const warp = threadIdx.x / kWarp;
    uint32_t const lane = threadIdx.x % kWarp;
    uint32_t const warps = blockDim.x / kWarp;
    ColumnMemory const memory(a, itemsPerRow, groupCount);
    float* const partials = a.partials + static_cast<size_t>(unit) * groupCount * a.tiles * 3;
    int64_t const biasRow = static_cast<int64_t>(sample) * a.channels;
    if constexpr (S != Stage::kPartial) {
        int64_t const parameters = parameterRow(a, sample);
        for (uint32_t c = threadIdx.x; c < a.bundleChannels; c += blockDim.x) {
            float const bias = a.bias == nullptr ? 0.0F : loadScalar<T>(a.bias, biasRow + base + c, a.biasFloat);
            memory.parameters[c] = make_float4(loadScalar<T>(a.gamma, parameters + base + c, a.parameterFloat),
                loadScalar<T>(a.beta, parameters + base + c, a.parameterFloat), bias, 0.0F);
        }
    }

    if constexpr (S != Stage::kApply) {
        float bias[V] = {};
        auto const loadBias = [&] {
            if (a.bias != nullptr) {
                loadParameters<T>(a.bias, biasRow + channel, a.biasFloat, a.biasAligned, bias);
            }
        };
        if constexpr (S != Stage::kPartial) {  // there its registers are needed for the loop, and its wait hides
            loadBias();
        }
        ColumnSums<T> sums;
        sums.begin(first < end ? held[0] : P{});
        for (uint32_t batch = first; batch < end; batch += R * rows) {
            if (S == Stage::kPartial && batch != first) {
                loadBatch(batch);
            }
#pragma unroll
            for (int k = 0; k < R; ++k) {
                if (batch + k * rows < end) {
                    sums.add(held[k]);
                }
            }
            if (S != Stage::kPartial) {
                break;  // the rest is parked below
            }
        }
        if constexpr (kParks) {
            waitForCopies();
            forParked([&](uint32_t, P const* place) { sums.add(loadParked(place)); });
        }
        if constexpr (S == Stage::kPartial) {
            loadBias();
        }
        if (row < rows) {
            storeItems<T>(a, sums, bias, memory, threadIdx.x, RowPixels(end - begin, a.rowsDivisor).of(row));
        }
    }
    blockSync();

    if (cluster) {
        waitForMailboxes();
    }
    if constexpr (S != Stage::kApply) {
        RowPixels const pixels(end - begin, a.rowsDivisor);
        for (uint32_t g = warp; g < groupCount; g += warps) {
            Moments const m = mergeItems<kExact>(a, memory, g, itemsPerRow, pixels, lane);
            if constexpr (S == Stage::kPartial || S == Stage::kGrid) {
                if (lane == 0) {
                    storeMoments(partials + (static_cast<size_t>(g) * a.tiles + tile) * 3, m);
                }
            } else if (!cluster) {
                storeAffine(a, memory, g, m, lane);
            } else if (lane < a.tiles) {
                send(mailbox, memory.groups + g * kMaxCluster + tile, lane, asMessage(m));
            }
        }
        if constexpr (S == Stage::kPartial) {
            return;
        }
    }
    if constexpr (S == Stage::kGrid) {
        gridSync();
    }
    if constexpr (S == Stage::kGrid || S == Stage::kApply) {
        for (uint32_t g = warp; g < groupCount; g += warps) {
            float const* const own = partials + static_cast<size_t>(g) * a.tiles * 3;
            storeAffine(a, memory, g, mergeTiles<kExact>(own, a.tiles, lane), lane);
        }
    }
    if (cluster) {
        receive(mailbox);
        for (uint32_t g = warp; g < groupCount; g += warps) {
            Moments const own = messageOf(memory.groups + g * kMaxCluster, lane % kMaxCluster, a.tiles);
            storeAffine(a, memory, g, mergeLanes<kExact, kMaxCluster>(own), lane);
        }
    }
    blockSync();

    Affine by[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
        float4 const ready = memory.parameters[column * V + j];
        by[j].centre = ready.x;
        by[j].scale = ready.y;
        by[j].beta = ready.z;
    }
    auto const writeAll = [&](auto withSilu) {
        auto const write = [&](uint32_t pixel, P pack) {
            finish<decltype(withSilu)::value>(pack, [&](int j) { return by[j]; });
            storePack(reinterpret_cast<P*>(y + static_cast<int64_t>(pixel) * a.pixelStride), pack);
        };
        for (uint32_t batch = first; batch < end; batch += R * rows) {
            if (S == Stage::kApply && batch != first) {
                loadBatch(batch);
            }
#pragma unroll
            for (int k = 0; k < R; ++k) {
                if (batch + k * rows < end) {
                    write(batch + k * rows, held[k]);
                }
            }
            if (S != Stage::kApply) {
                break;
            }
        }
        if constexpr (kParks) {
            forParked([&](uint32_t pixel, P const* place) { write(pixel, loadParked(place)); });
        }
    };
    if (a.silu) {
        writeAll(std::true_type{});
    } else {
        writeAll(std::false_type{});
    }
}

// Zeros in the channels between `channels` and the pixel's stride.
template <typename T>
__global__ void paddingKernel(T* y, int64_t pixels, int64_t channels, int64_t pixelStride) {
    int64_t const padding = pixelStride - channels;
    int64_t const total = pixels * padding;
    for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < total;
         i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
        int64_t const pixel = i / padding;
        y[pixel * pixelStride + channels + (i - pixel * padding)] = fromFloat<T>(0.0F);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The host's side.

using Kernel = void (*)(Arguments);

template <typename T>
Kernel columnsKernelOf(Stage stage, bool many) noexcept {
    switch (stage) {
        case Stage::kHeld:
            return many ? columnsKernel<T, kManyPacks, Stage::kHeld> : columnsKernel<T, kFewPacks, Stage::kHeld>;
        case Stage::kGrid: return columnsKernel<T, kManyPacks, Stage::kGrid>;
        case Stage::kPartial: return columnsKernel<T, kFewPacks, Stage::kPartial>;
        default: return columnsKernel<T, kFewPacks, Stage::kApply>;
    }
}

template <typename T>
Kernel runKernelOf(Stage stage, bool many, bool scalar) noexcept {
    constexpr int V = kVector<T>;
    switch (stage) {
        case Stage::kHeld:
            return scalar ? runKernel<T, 1, kFewPacks, Stage::kHeld>
                : many    ? runKernel<T, V, kManyPacks, Stage::kHeld>
                          : runKernel<T, V, kFewPacks, Stage::kHeld>;
        case Stage::kGrid: return runKernel<T, V, kManyPacks, Stage::kGrid>;
        case Stage::kPartial:
            return scalar ? runKernel<T, 1, kFewPacks, Stage::kPartial> : runKernel<T, V, kFewPacks, Stage::kPartial>;
        default: return scalar ? runKernel<T, 1, kFewPacks, Stage::kApply> : runKernel<T, V, kFewPacks, Stage::kApply>;
    }
}

template <typename T>
Kernel sliceKernelOf(Plan const& plan) noexcept {
    bool const many = plan.packs > fewPacks(plan.vector, sizeof(T));
    if constexpr (sizeof(T) == 2) {
        if (plan.vector == 8) {
            return many ? sliceKernel<T, 8, manyPacks(8, 2)> : sliceKernel<T, 8, fewPacks(8, 2)>;
        }
    }
    if (plan.vector == 4) {
        return many ? sliceKernel<T, 4, manyPacks(4, sizeof(T))> : sliceKernel<T, 4, fewPacks(4, sizeof(T))>;
    }
    return many ? sliceKernel<T, 2, manyPacks(2, sizeof(T))> : sliceKernel<T, 2, fewPacks(2, sizeof(T))>;
}

template <typename T>
Kernel kernelOf(Plan const& plan, Stage stage) noexcept {
    bool const many = plan.packs > kFewPacks;
    if (plan.shape == Shape::kSlices) {
        return sliceKernelOf<T>(plan);
    }
    return plan.shape == Shape::kColumns ? columnsKernelOf<T>(stage, many)
                                         : runKernelOf<T>(stage, many, plan.vector == 1);
}

Kernel kernelFor(DataType type, Plan const& plan, Stage stage) noexcept {
    switch (type) {
        case DataType::kFloat: return kernelOf<float>(plan, stage);
        case DataType::kHalf: return kernelOf<__half>(plan, stage);
        default: return kernelOf<__nv_bfloat16>(plan, stage);
    }
}

// What the current device offers; asked once a device.
cudaError_t readFacts(int device, DeviceFacts& facts) noexcept {
    int major = 0;
    int cooperative = 0;
    cudaError_t error = cudaDeviceGetAttribute(&facts.processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&facts.sharedPerBlock, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
    }
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    }
    // The device may be newer than the code that was compiled for it: clusters want both.
    cudaFuncAttributes code{};
    if (error == cudaSuccess) {
        Kernel const kernel = runKernel<__half, kVector<__half>, kFewPacks, Stage::kHeld>;
        error = cudaFuncGetAttributes(&code, reinterpret_cast<void const*>(kernel));
    }
    facts.cooperative = cooperative != 0;
    facts.clusters = major >= 9 && code.ptxVersion >= 90;
    int driver = 0;
    if (error == cudaSuccess) {
        error = cudaDriverGetVersion(&driver);
    }
    // In a captured graph it takes a runtime and a driver of CUDA 12.3.
    char const* const asked = std::getenv(kOverlapVariable);
    bool const refused = asked != nullptr && std::strcmp(asked, "0") == 0;
    facts.overlap = facts.clusters && CUDART_VERSION >= 12030 && driver >= 12030 && !refused;
    return error;
}

bool aligned(void const* pointer) noexcept { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

Arguments makeArguments(GroupNormParams const& p, Plan const& plan, void* workspace) noexcept {
    Arguments a{};
    a.x = p.x;
    a.y = p.y;
    a.gamma = p.gamma;
    a.beta = p.beta;
    a.bias = p.channelBias;
    a.partials = static_cast<float*>(workspace);
    a.nhwc = p.layout == Layout::kNHWC;
    a.sampleStride = p.pixels * (a.nhwc ? p.pixelStride : p.channels);
    a.pixelStride = static_cast<uint32_t>(p.pixelStride);
    a.channels = static_cast<uint32_t>(p.channels);
    a.pixels = static_cast<uint32_t>(p.pixels);
    a.groupChannels = static_cast<uint32_t>(p.channels / p.groups);
    a.tiles = static_cast<uint32_t>(plan.tiles);
    a.tilesDivisor = makeDivisor(a.tiles);
    a.unitsDivisor = makeDivisor(static_cast<uint32_t>(plan.units / p.batch));
    a.parameterDivisor = makeDivisor(static_cast<uint32_t>(p.batch / p.parameterRows));
    a.chunk = static_cast<uint32_t>(plan.chunk);
    a.sharedPacks = static_cast<uint32_t>(plan.sharedPacks);
    a.epsilon = p.epsilon;
    a.silu = p.activation == Activation::kSiLU;
    a.parameterFloat = p.parameterType == DataType::kFloat;
    a.biasFloat = p.biasType == DataType::kFloat;
    // Of several rows: only slices read them so, and theirs are a whole number of packs long.
    a.parameterAligned = aligned(p.gamma) && aligned(p.beta);
    a.biasAligned = aligned(p.channelBias);
    if (plan.shape == Shape::kRun) {
        a.run = static_cast<uint32_t>(a.groupChannels * p.pixels / plan.vector);
        a.runDivisor = makeDivisor(a.nhwc ? a.groupChannels : static_cast<uint32_t>(p.pixels / plan.vector));
        a.staged = a.groupChannels <= kStagedChannels;
    } else {
        a.bundleChannels = static_cast<uint32_t>(plan.bundleChannels);
        a.columnsDivisor = makeDivisor(static_cast<uint32_t>(plan.columns));
        a.rowsDivisor = makeDivisor(static_cast<uint32_t>(plan.rows));
        a.itemWidth = static_cast<uint32_t>(plan.itemWidth);  // slices: unused, as the next
        a.itemDivisor = makeDivisor(a.groupChannels / a.itemWidth);
    }
    return a;
}

cudaError_t launchStage(
    DataType type, Plan const& plan, Stage stage, Arguments arguments, int64_t units, cudaStream_t stream) noexcept {
    Kernel const kernel = kernelFor(type, plan, stage);
    void const* const function = reinterpret_cast<void const*>(kernel);
    if (plan.sharedBytes > 40 * 1024) {  // with the kernel's own arrays, near what is granted without asking
        cudaError_t const error = cudaFuncSetAttribute(
            function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.sharedBytes));
        if (error != cudaSuccess) {
            return error;
        }
    }
    cudaLaunchAttribute attributes[2]{};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(units * plan.tiles));
    config.blockDim = dim3(static_cast<unsigned>(plan.threads));
    config.dynamicSmemBytes = static_cast<size_t>(plan.sharedBytes);
    config.stream = stream;
    config.attrs = attributes;
    auto const add = [&](cudaLaunchAttributeID id) -> cudaLaunchAttributeValue& {
        cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
        attribute.id = id;
        return attribute.val;
    };
    if (stage == Stage::kGrid) {
        add(cudaLaunchAttributeCooperative).cooperative = 1;
    } else if (stage == Stage::kHeld && plan.tiles > 1) {
        cudaLaunchAttributeValue& value = add(cudaLaunchAttributeClusterDimension);
        value.clusterDim.x = static_cast<unsigned>(plan.tiles);
        value.clusterDim.y = 1;
        value.clusterDim.z = 1;
    }
    if (plan.overlap) {
        add(cudaLaunchAttributeProgrammaticStreamSerialization).programmaticStreamSerializationAllowed = 1;
    }
    void* pointers[] = {&arguments};
    return cudaLaunchKernelExC(&config, function, pointers);
}

template <typename T>
cudaError_t launchPaddingOf(GroupNormParams const& p, unsigned blocks, cudaStream_t stream) noexcept {
    void (*const kernel)(T*, int64_t, int64_t, int64_t) = paddingKernel<T>;
    T* y = static_cast<T*>(p.y);
    int64_t pixels = p.batch * p.pixels;
    int64_t channels = p.channels;
    int64_t stride = p.pixelStride;
    void* pointers[] = {&y, &pixels, &channels, &stride};
    return cudaLaunchKernel(reinterpret_cast<void const*>(kernel), dim3(blocks), dim3(256), pointers, 0, stream);
}

cudaError_t launchPadding(GroupNormParams const& p, cudaStream_t stream) noexcept {
    int64_t const total = p.batch * p.pixels * (p.pixelStride - p.channels);
    int64_t const blocks = plan_detail::smaller(plan_detail::ceilDiv(total, 256), 4096);
    switch (p.dataType) {
        case DataType::kFloat: return launchPaddingOf<float>(p, static_cast<unsigned>(blocks), stream);
        case DataType::kHalf: return launchPaddingOf<__half>(p, static_cast<unsigned>(blocks), stream);
        default: return launchPaddingOf<__nv_bfloat16>(p, static_cast<unsigned>(blocks), stream);
    }
}

bool isType(DataType type) noexcept {
    return type == DataType::kFloat || type == DataType::kHalf || type == DataType::kBFloat16;
}

}  // namespace

cudaError_t deviceFacts(DeviceFacts& facts) noexcept {
    constexpr int kDevices = 64;
    static std::mutex mutex;
    static DeviceFacts known[kDevices];
    static bool isKnown[kDevices];
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess || device >= kDevices) {
        return error != cudaSuccess ? error : readFacts(device, facts);
    }
    std::lock_guard<std::mutex> const lock(mutex);
    if (!isKnown[device]) {
        error = readFacts(device, known[device]);
        isKnown[device] = error == cudaSuccess;
    }
    facts = known[device];
    return error;
}

bool allowsVectors(GroupNormParams const& p) noexcept {
    int64_t const vector = p.dataType == DataType::kFloat ? 4 : 8;
    return aligned(p.x) && aligned(p.y) && (p.layout == Layout::kNCHW || p.pixelStride % vector == 0);
}

char const* checkGroupNorm(GroupNormParams const& p) noexcept {
    constexpr int64_t kLimit = INT32_MAX;
    if (p.batch < 1 || p.channels < 1 || p.pixels < 1) {
        return "batch, channels and pixels must be positive";
    }
    if (p.groups < 1 || p.channels % p.groups != 0) {
        return "groups must be positive and divide the channels";
    }
    if (p.channels > kLimit || p.pixels > kLimit || p.channels / p.groups > kLimit / p.pixels) {
        return "a group has more than 2^31 - 1 elements";
    }
    if (p.batch > kLimit / p.groups / kMaxCluster) {
        return "batch times groups is beyond 2^28";
    }
    if (!(p.epsilon >= 0.0F) || std::isinf(p.epsilon)) {
        return "epsilon must be finite and not negative";
    }
    if (p.activation != Activation::kNone && p.activation != Activation::kSiLU) {
        return "unknown activation";
    }
    if (p.layout != Layout::kNCHW && p.layout != Layout::kNHWC) {
        return "unknown layout";
    }
    if (p.layout == Layout::kNHWC && p.pixelStride < p.channels) {
        return "pixelStride is less than the channels";
    }
    if (p.layout == Layout::kNHWC && p.pixelStride > kLimit) {
        return "pixelStride is beyond 2^31 - 1";
    }
    if (!isType(p.dataType)) {
        return "unknown data type";
    }
    if (p.parameterType != DataType::kFloat && p.parameterType != p.dataType) {
        return "gamma and beta must be FP32 or of the data's type";
    }
    if (p.parameterRows < 1 || (p.batch > 0 && p.batch % p.parameterRows != 0)) {
        return "the rows of gamma and beta do not divide the batch";
    }
    if (p.biasType != DataType::kFloat && p.biasType != p.dataType) {
        return "channelBias must be FP32 or of the data's type";
    }
    return nullptr;
}

size_t groupNormWorkspaceSize(GroupNormParams const& params) noexcept {
    if (checkGroupNorm(params) != nullptr || alwaysHeld(params)) {
        return 0;
    }
    size_t const groups = static_cast<size_t>(params.batch) * static_cast<size_t>(params.groups);
    return groups * static_cast<size_t>(tileLimit(params)) * sizeof(Moments);
}

std::string groupNormPath(GroupNormParams const& params) {
    char const* const fault = checkGroupNorm(params);
    DeviceFacts facts;
    if (fault != nullptr) {
        return fault;
    }
    cudaError_t const error = deviceFacts(facts);
    return error != cudaSuccess ? cudaGetErrorString(error)
                                : describePlan(planGroupNorm(params, allowsVectors(params), facts));
}

cudaError_t launchPlan(
    GroupNormParams const& params, Plan const& plan, void* workspace, cudaStream_t stream) noexcept {
    Arguments arguments = makeArguments(params, plan, workspace);
    cudaError_t error = cudaSuccess;
    if (plan.stage == Stage::kPartial) {
        error = launchStage(params.dataType, plan, Stage::kPartial, arguments, plan.units, stream);
        if (error == cudaSuccess) {
            error = launchStage(params.dataType, plan, Stage::kApply, arguments, plan.units, stream);
        }
    } else {
        int64_t const perLaunch = plan.stage == Stage::kGrid ? plan.unitsPerLaunch : plan.units;
        for (int64_t unit = 0; error == cudaSuccess && unit < plan.units; unit += perLaunch) {
            arguments.firstUnit = static_cast<uint32_t>(unit);
            int64_t const units = plan_detail::smaller(perLaunch, plan.units - unit);
            error = launchStage(params.dataType, plan, plan.stage, arguments, units, stream);
        }
    }
    if (error == cudaSuccess && params.layout == Layout::kNHWC && params.pixelStride > params.channels) {
        error = launchPadding(params, stream);
    }
    return error;
}

cudaError_t launchGroupNorm(
    GroupNormParams const& params, void* workspace, size_t workspaceSize, cudaStream_t stream) noexcept {
    bool const missing =
        params.x == nullptr || params.y == nullptr || params.gamma == nullptr || params.beta == nullptr;
    if (missing || checkGroupNorm(params) != nullptr) {
        return cudaErrorInvalidValue;
    }
    size_t const wanted = groupNormWorkspaceSize(params);
    if (workspaceSize < wanted || (wanted > 0 && workspace == nullptr)) {
        return cudaErrorInvalidValue;
    }
    DeviceFacts facts;
    cudaError_t const error = deviceFacts(facts);
    if (error != cudaSuccess) {
        return error;
    }
    return launchPlan(params, planGroupNorm(params, allowsVectors(params), facts), workspace, stream);
}

}  // namespace canny2image
