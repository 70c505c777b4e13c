// The kernels of GroupNorm and their launches; group_norm_plan.h says how a call is cut into blocks.
//
// Statistics. A thread sums its elements about the first of them, so what cancels is at most as many roundings as it
// has elements, whatever the mean; it then holds (count, mean, M2), where M2 is the sum of squared deviations. Such
// triples are merged by lane, warp, block, cluster and tile, each time about the first triple's mean. The order is
// fixed by sizes alone and no sum is atomic, so equal inputs give equal bits. NaN and infinity spread to all of
// their group.
#include "group_norm_device.cuh"
#include "group_norm_plan.h"

#include <cmath>
#include <mutex>

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
    int64_t pixelStride;
    uint32_t firstUnit;
    uint32_t channels;
    uint32_t pixels;
    uint32_t groupChannels;
    uint32_t unitsPerSample;
    uint32_t tiles;
    uint32_t chunk;        // of a tile: packs (run) or pixels (columns)
    uint32_t sharedPacks;  // of a thread
    uint32_t run;          // packs of a group
    Divisor runDivisor;    // NCHW: packs of one channel; NHWC: channels of a group
    Divisor groupDivisor;  // columns: channels of a group
    Divisor itemDivisor;   // columns: items of a group in one row
    uint32_t bundleChannels;
    uint32_t columns;
    uint32_t rows;
    uint32_t itemWidth;
    float epsilon;
    bool silu;
    bool nhwc;
    bool staged;            // the group's gamma, beta and bias go through shared memory
    bool parameterFloat;    // gamma and beta are FP32, else the data's type
    bool biasFloat;         // the same of the bias
    bool parameterAligned;  // gamma and beta allow 16-byte accesses
    bool biasAligned;
};

__device__ __forceinline__ uint32_t divide(uint32_t n, Divisor const& by) {
    return by.divisor == 1 ? n : multiplyHigh(n, by.multiplier) >> by.shift;
}

__device__ __forceinline__ uint32_t lower(uint32_t a, uint32_t b) { return a < b ? a : b; }

// The triple of `count` values whose distances from `shift` have this sum and this sum of squares.
__device__ __forceinline__ Moments makeMoments(float count, float shift, float sum, float squares) {
    if (!(count > 0.0F)) {
        return {0.0F, 0.0F, 0.0F};
    }
    float const mean = sum / count;
    float const m2 = squares - sum * mean;
    return {count, shift + mean, m2 < 0.0F ? 0.0F : m2};  // NaN is not below zero and stays
}

// Adds a triple to sums about `shift`. An empty one adds nothing, even where its distance would overflow.
__device__ __forceinline__ void addMoments(Moments const& m, float shift, float& count, float& sum, float& squares) {
    float const distance = m.count > 0.0F ? m.mean - shift : 0.0F;
    float const weighted = m.count * distance;
    count += m.count;
    sum += weighted;
    squares += m.m2 + weighted * distance;
}

// Sums over a warp, the same bits in every lane.
__device__ __forceinline__ Moments sumWarp(float count, float shift, float sum, float squares) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        count += shuffleXor(count, mask);
        sum += shuffleXor(sum, mask);
        squares += shuffleXor(squares, mask);
    }
    return makeMoments(count, shift, sum, squares);
}

// Merges the triples of a warp's lanes. Lane 0's is empty only where all are.
__device__ __forceinline__ Moments mergeWarp(Moments const& own) {
    float const shift = shuffleFrom(own.mean, 0);
    float count = 0.0F;
    float sum = 0.0F;
    float squares = 0.0F;
    addMoments(own, shift, count, sum, squares);
    return sumWarp(count, shift, sum, squares);
}

// Merges one group's partial moments of all tiles, a warp together.
__device__ __forceinline__ Moments mergeTiles(float const* partials, uint32_t tiles, uint32_t lane) {
    float const shift = loadShared(partials + 1);
    float count = 0.0F;
    float sum = 0.0F;
    float squares = 0.0F;
    for (uint32_t tile = lane; tile < tiles; tile += kWarp) {
        float const* place = partials + 3 * tile;
        addMoments({loadShared(place), loadShared(place + 1), loadShared(place + 2)}, shift, count, sum, squares);
    }
    return sumWarp(count, shift, sum, squares);
}

__device__ __forceinline__ void storeMoments(float* place, Moments const& m) {
    place[0] = m.count;
    place[1] = m.mean;
    place[2] = m.m2;
}

__device__ __forceinline__ float deviationInverse(Moments const& m, float epsilon) {
    return reciprocalRoot(m.m2 / m.count + epsilon);
}

template <typename T>
__device__ __forceinline__ float loadScalar(void const* base, int64_t index, bool isFloat) {
    return isFloat ? static_cast<float const*>(base)[index] : toFloat(static_cast<T const*>(base)[index]);
}

// V neighbouring parameters; `index` is a multiple of V.
template <typename T, int V>
__device__ __forceinline__ void loadParameters(
    void const* base, int64_t index, bool isFloat, bool aligned, float (&value)[V]) {
    if (aligned && !isFloat) {
        reinterpret_cast<Pack<T, V> const*>(static_cast<T const*>(base) + index)->unpack(value);
    } else if (aligned) {
#pragma unroll
        for (int i = 0; i < V; i += 4) {
            float4 const four = *reinterpret_cast<float4 const*>(static_cast<float const*>(base) + index + i);
            value[i] = four.x;
            value[i + 1] = four.y;
            value[i + 2] = four.z;
            value[i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) {
            value[i] = loadScalar<T>(base, index + i, isFloat);
        }
    }
}

__device__ __forceinline__ float finish(float x, float centre, float scale, float beta, bool withSilu) {
    float const y = (x - centre) * scale + beta;
    return withSilu ? silu(y) : y;
}

// ---------------------------------------------------------------------------------------------------------------------
// Runs: the elements of a (sample, group) as one sequence of packs, cut into tiles.

template <typename T, int V>
struct Run {
    Arguments const& a;
    uint32_t sample;
    uint32_t group;
    int64_t base;  // of the group's first element

    __device__ __forceinline__ explicit Run(Arguments const& arguments, uint32_t unit)
        : a(arguments), sample(unit / arguments.unitsPerSample), group(unit % arguments.unitsPerSample) {
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
        return base + pixel * a.pixelStride + (i - pixel * a.groupChannels);
    }
    __device__ __forceinline__ Pack<T, V> load(uint32_t i) const {
        return *reinterpret_cast<Pack<T, V> const*>(static_cast<T const*>(a.x) + place(i));
    }
    __device__ __forceinline__ float bias(uint32_t i) const {
        if (a.bias == nullptr) {
            return 0.0F;
        }
        int64_t const row = static_cast<int64_t>(sample) * a.channels + group * a.groupChannels;
        return loadScalar<T>(a.bias, row + channel(i), a.biasFloat);
    }
};

// Sums of a thread's elements about the first of them.
struct ThreadSums {
    float shift{0.0F};
    float sum{0.0F};
    float squares{0.0F};
    uint32_t packs{0};

    template <typename T, int V>
    __device__ __forceinline__ void add(Pack<T, V> const& pack, float bias) {
        float value[V];
        pack.unpack(value);
        if (packs == 0) {
            shift = value[0] + bias;
        }
        float const centre = shift - bias;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            float const distance = value[j] - centre;
            sum += distance;
            squares += distance * distance;
        }
        ++packs;
    }
};

// gamma, beta and bias of the group's channels, behind the held packs: three arrays of groupChannels floats.
template <typename T>
__device__ __forceinline__ void stageParameters(Arguments const& a, uint32_t sample, uint32_t group, float* staged) {
    for (uint32_t c = threadIdx.x; c < a.groupChannels; c += blockDim.x) {
        uint32_t const channel = group * a.groupChannels + c;
        staged[c] = loadScalar<T>(a.gamma, channel, a.parameterFloat);
        staged[a.groupChannels + c] = loadScalar<T>(a.beta, channel, a.parameterFloat);
        staged[2 * a.groupChannels + c] = a.bias == nullptr
            ? 0.0F
            : loadScalar<T>(a.bias, static_cast<int64_t>(sample) * a.channels + channel, a.biasFloat);
    }
}

template <typename T, int V>
__device__ __forceinline__ void writeRun(
    Run<T, V> const& run, uint32_t i, Pack<T, V> pack, Moments const& all, float inverse, float const* staged) {
    Arguments const& a = run.a;
    uint32_t const c = run.channel(i);
    float gamma;
    float beta;
    float bias;
    if (a.staged) {
        gamma = staged[c];
        beta = staged[a.groupChannels + c];
        bias = staged[2 * a.groupChannels + c];
    } else {
        gamma = loadScalar<T>(a.gamma, run.group * a.groupChannels + c, a.parameterFloat);
        beta = loadScalar<T>(a.beta, run.group * a.groupChannels + c, a.parameterFloat);
        bias = run.bias(i);
    }
    float const centre = all.mean - bias;
    float const scale = inverse * gamma;
    float value[V];
    pack.unpack(value);
#pragma unroll
    for (int j = 0; j < V; ++j) {
        value[j] = finish(value[j], centre, scale, beta, a.silu);
    }
    pack.pack(value);
    *reinterpret_cast<Pack<T, V>*>(static_cast<T*>(a.y) + run.place(i)) = pack;
}

// Merges a block's threads: every thread gets the block's triple.
__device__ __forceinline__ Moments mergeBlock(ThreadSums const& own, float elements) {
    __shared__ Moments warps[kMaxThreads / kWarp];
    uint32_t const lane = threadIdx.x % kWarp;
    Moments const warp = mergeWarp(makeMoments(elements, own.shift, own.sum, own.squares));
    if (lane == 0) {
        warps[threadIdx.x / kWarp] = warp;
    }
    blockSync();
    return mergeWarp(lane < blockDim.x / kWarp ? warps[lane] : Moments{0.0F, 0.0F, 0.0F});
}

template <typename T, int V, int R, Stage S>
__global__ void __launch_bounds__(kMaxThreads, R <= kFewPacks ? 2 : 1) runKernel(Arguments const a) {
    __shared__ Moments published;
    uint32_t const unit = a.firstUnit + blockIdx.x / a.tiles;
    uint32_t const tile = blockIdx.x % a.tiles;
    uint32_t const lane = threadIdx.x % kWarp;
    uint32_t const step = blockDim.x;
    uint32_t const first = lower(tile * a.chunk, a.run) + threadIdx.x;
    uint32_t const end = lower((tile + 1) * a.chunk, a.run);
    Run<T, V> const run(a, unit);
    Pack<T, V>* const parked = reinterpret_cast<Pack<T, V>*>(sharedMemory()) + threadIdx.x;  // this thread's alone
    float* const staged = reinterpret_cast<float*>(sharedMemory() + static_cast<size_t>(a.sharedPacks) * step * 16);
    float* const partials = a.partials + static_cast<size_t>(unit) * a.tiles * 3;

    Pack<T, V> held[R];
    Moments all{0.0F, 0.0F, 0.0F};
    if constexpr (S != Stage::kApply) {
        ThreadSums sums;
        for (uint32_t batch = first; batch < end; batch += R * step) {
#pragma unroll
            for (int k = 0; k < R; ++k) {
                if (batch + k * step < end) {
                    held[k] = run.load(batch + k * step);
                }
            }
#pragma unroll
            for (int k = 0; k < R; ++k) {
                if (batch + k * step < end) {
                    sums.add(held[k], run.bias(batch + k * step));
                }
            }
            if (S != Stage::kPartial) {
                break;  // the rest is parked below
            }
        }
        if constexpr (S != Stage::kPartial && R == kManyPacks) {
            for (uint32_t k = 0; k < a.sharedPacks; k += kFewPacks) {
                Pack<T, V> some[kFewPacks];
                uint32_t const from = first + (R + k) * step;
#pragma unroll
                for (int j = 0; j < kFewPacks; ++j) {
                    if (k + j < a.sharedPacks && from + j * step < end) {
                        some[j] = run.load(from + j * step);
                    }
                }
#pragma unroll
                for (int j = 0; j < kFewPacks; ++j) {
                    if (k + j < a.sharedPacks && from + j * step < end) {
                        sums.add(some[j], run.bias(from + j * step));
                        parked[(k + j) * step] = some[j];
                    }
                }
            }
        }
        if (S != Stage::kPartial && a.staged) {
            stageParameters<T>(a, run.sample, run.group, staged);  // seen by all after the barrier of mergeBlock
        }
        all = mergeBlock(sums, static_cast<float>(sums.packs) * V);
        if constexpr (S == Stage::kPartial || S == Stage::kGrid) {
            if (threadIdx.x == 0) {
                storeMoments(partials + 3 * tile, all);
            }
            if constexpr (S == Stage::kPartial) {
                return;
            }
            gridSync();
        }
    } else if (a.staged) {
        stageParameters<T>(a, run.sample, run.group, staged);
        blockSync();
    }

    bool const cluster = S == Stage::kHeld && a.tiles > 1;
    if (cluster) {
        if (threadIdx.x == 0) {
            published = all;
        }
        clusterArrive();
        clusterWait();
        all = mergeWarp(lane < a.tiles ? *peerShared(&published, lane) : Moments{0.0F, 0.0F, 0.0F});
        clusterArrive();  // this block has read its peers; the wait at the end keeps its own memory until they have too
    } else if constexpr (S != Stage::kHeld) {
        all = mergeTiles(partials, a.tiles, lane);
    }
    float const inverse = deviationInverse(all, a.epsilon);

    for (uint32_t batch = first; batch < end; batch += R * step) {
        if constexpr (S == Stage::kApply) {
#pragma unroll
            for (int k = 0; k < R; ++k) {
                if (batch + k * step < end) {
                    held[k] = run.load(batch + k * step);
                }
            }
        }
#pragma unroll
        for (int k = 0; k < R; ++k) {
            if (batch + k * step < end) {
                writeRun(run, batch + k * step, held[k], all, inverse, staged);
            }
        }
        if (S != Stage::kApply) {
            break;
        }
    }
    if constexpr (S != Stage::kApply && R == kManyPacks) {
        for (uint32_t k = 0; k < a.sharedPacks; ++k) {
            uint32_t const i = first + (R + k) * step;
            if (i < end) {
                writeRun(run, i, parked[k * step], all, inverse, staged);
            }
        }
    }
    if (cluster) {
        clusterWait();
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
    uint32_t packs{0};

    __device__ __forceinline__ ColumnSums() {
#pragma unroll
        for (int j = 0; j < V; ++j) {
            shift[j] = sum[j] = squares[j] = 0.0F;
        }
    }
    __device__ __forceinline__ void add(Pack<T, V> const& pack) {
        float value[V];
        pack.unpack(value);
        if (packs == 0) {
#pragma unroll
            for (int j = 0; j < V; ++j) {
                shift[j] = value[j];
            }
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
            float const distance = value[j] - shift[j];
            sum[j] += distance;
            squares[j] += distance * distance;
        }
        ++packs;
    }
};

// Where the dynamic shared memory of a columns block lies: parked packs, then these.
struct ColumnMemory {
    float* mean;          // of items [row][item of the row]
    float* m2;            // the same
    uint32_t* rowPacks;   // pixels that each row of threads took
    Moments* groups;      // of this block, for its cluster
    float2* results;      // mean and inverse deviation of each group

    __device__ __forceinline__ explicit ColumnMemory(Arguments const& a, uint32_t itemsPerRow) {
        uint32_t const groupCount = a.bundleChannels / a.groupChannels;
        results = reinterpret_cast<float2*>(sharedMemory() + static_cast<size_t>(a.sharedPacks) * blockDim.x * 16);
        mean = reinterpret_cast<float*>(results + groupCount);
        m2 = mean + static_cast<size_t>(a.rows) * itemsPerRow;
        groups = reinterpret_cast<Moments*>(m2 + static_cast<size_t>(a.rows) * itemsPerRow);
        rowPacks = reinterpret_cast<uint32_t*>(groups + groupCount);
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

// A thread's channels to items of `itemWidth` channels, in the first V / itemWidth places.
template <typename T>
__device__ __forceinline__ void storeItems(
    Arguments const& a, ColumnSums<T> const& own, float const (&bias)[kVector<T>], ColumnMemory const& memory,
    uint32_t row, uint32_t column) {
    constexpr int V = kVector<T>;
    uint32_t const perPack = V / a.itemWidth;
    float const count = static_cast<float>(own.packs);
    float mean[V];
    float m2[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
        Moments const m = makeMoments(count, own.shift[j], own.sum[j], own.squares[j]);
        mean[j] = m.mean + bias[j];
        m2[j] = m.m2;
    }
    joinPairs<V, 2>(mean, m2, count, a.itemWidth);
    joinPairs<V, 4>(mean, m2, count, a.itemWidth);
    if constexpr (V == 8) {
        joinPairs<V, 8>(mean, m2, count, a.itemWidth);
    }
    uint32_t const place = (row * a.columns + column) * perPack;
#pragma unroll
    for (int j = 0; j < V; ++j) {
        if (j < static_cast<int>(perPack)) {
            memory.mean[place + j] = mean[j];
            memory.m2[place + j] = m2[j];
        }
    }
    if (column == 0) {
        memory.rowPacks[row] = own.packs;
    }
}

// One group's items of this block, merged by a warp.
__device__ __forceinline__ Moments mergeItems(
    Arguments const& a, ColumnMemory const& memory, uint32_t group, uint32_t itemsPerRow, uint32_t lane) {
    uint32_t const perGroup = a.itemDivisor.divisor;
    uint32_t const start = group * perGroup;
    uint32_t const total = a.rows * perGroup;
    float const shift = memory.mean[start];
    float count = 0.0F;
    float sum = 0.0F;
    float squares = 0.0F;
#pragma unroll 4
    for (uint32_t i = lane; i < total; i += kWarp) {
        uint32_t const row = divide(i, a.itemDivisor);
        uint32_t const place = row * itemsPerRow + start + (i - row * perGroup);
        float const elements = static_cast<float>(memory.rowPacks[row] * a.itemWidth);
        addMoments({elements, memory.mean[place], memory.m2[place]}, shift, count, sum, squares);
    }
    return sumWarp(count, shift, sum, squares);
}

// One group's triples of all blocks of the cluster, merged by one thread.
__device__ __forceinline__ Moments mergePeers(Moments* own, uint32_t tiles) {
    float const shift = peerShared(own, 0)->mean;
    float count = 0.0F;
    float sum = 0.0F;
    float squares = 0.0F;
#pragma unroll 4
    for (uint32_t rank = 0; rank < tiles; ++rank) {
        addMoments(*peerShared(own, rank), shift, count, sum, squares);
    }
    return makeMoments(count, shift, sum, squares);
}

template <typename T, int R, Stage S>
__global__ void __launch_bounds__(kMaxThreads, S == Stage::kPartial || S == Stage::kApply ? 2 : 1)
    columnsKernel(Arguments const a) {
    constexpr int V = kVector<T>;
    using P = Pack<T, V>;
    uint32_t const unit = a.firstUnit + blockIdx.x / a.tiles;
    uint32_t const tile = blockIdx.x % a.tiles;
    uint32_t const warp = threadIdx.x / kWarp;
    uint32_t const lane = threadIdx.x % kWarp;
    uint32_t const sample = unit / a.unitsPerSample;
    uint32_t const row = threadIdx.x / a.columns;
    uint32_t const column = threadIdx.x % a.columns;
    uint32_t const groupCount = a.bundleChannels / a.groupChannels;
    uint32_t const itemsPerRow = a.columns * (V / a.itemWidth);
    uint32_t const channel = unit % a.unitsPerSample * a.bundleChannels + column * V;
    uint32_t const end = lower((tile + 1) * a.chunk, a.pixels);
    // Threads past the last row have no pixels; they still meet every barrier.
    uint32_t const first = row < a.rows ? lower(tile * a.chunk, a.pixels) + row : end;
    uint32_t const step = a.rows;
    T const* const x = static_cast<T const*>(a.x) + sample * a.sampleStride + channel;
    T* const y = static_cast<T*>(a.y) + sample * a.sampleStride + channel;
    auto load = [&](uint32_t pixel) { return *reinterpret_cast<P const*>(x + pixel * a.pixelStride); };
    P* const parked = reinterpret_cast<P*>(sharedMemory()) + threadIdx.x;  // this thread's alone
    ColumnMemory const memory(a, itemsPerRow);
    float* const partials = a.partials + static_cast<size_t>(unit) * groupCount * a.tiles * 3;

    int64_t const biasPlace = static_cast<int64_t>(sample) * a.channels + channel;

    P held[R];
    if constexpr (S != Stage::kApply) {
        ColumnSums<T> sums;
        for (uint32_t batch = first; batch < end; batch += R * step) {
#pragma unroll
            for (int k = 0; k < R; ++k) {
                if (batch + k * step < end) {
                    held[k] = load(batch + k * step);
                }
            }
#pragma unroll
            for (int k = 0; k < R; ++k) {
                if (batch + k * step < end) {
                    sums.add(held[k]);
                }
            }
            if (S != Stage::kPartial) {
                break;  // the rest is parked below
            }
        }
        if constexpr (S != Stage::kPartial && R == kManyPacks) {
            for (uint32_t k = 0; k < a.sharedPacks; k += kFewPacks) {
                P some[kFewPacks];
                uint32_t const from = first + (R + k) * step;
#pragma unroll
                for (int j = 0; j < kFewPacks; ++j) {
                    if (k + j < a.sharedPacks && from + j * step < end) {
                        some[j] = load(from + j * step);
                    }
                }
#pragma unroll
                for (int j = 0; j < kFewPacks; ++j) {
                    if (k + j < a.sharedPacks && from + j * step < end) {
                        sums.add(some[j]);
                        parked[(k + j) * blockDim.x] = some[j];
                    }
                }
            }
        }
        if (row < a.rows) {
            float bias[V] = {};
            if (a.bias != nullptr) {
                loadParameters<T>(a.bias, biasPlace, a.biasFloat, a.biasAligned, bias);
            }
            storeItems<T>(a, sums, bias, memory, row, column);
        }
        blockSync();
    }

    // Asked for before the waits that follow, without a register held for them. Every column of a block is some
    // thread's, so threads past the last row ask for parameters that exist.
    if constexpr (S != Stage::kPartial) {
        prefetch(static_cast<char const*>(a.gamma) + channel * static_cast<size_t>(a.parameterFloat ? 4 : sizeof(T)));
        prefetch(static_cast<char const*>(a.beta) + channel * static_cast<size_t>(a.parameterFloat ? 4 : sizeof(T)));
    }

    bool const cluster = S == Stage::kHeld && a.tiles > 1;
    if constexpr (S != Stage::kApply) {
        for (uint32_t g = warp; g < groupCount; g += blockDim.x / kWarp) {
            Moments const m = mergeItems(a, memory, g, itemsPerRow, lane);
            if (lane == 0) {
                if constexpr (S == Stage::kPartial || S == Stage::kGrid) {
                    storeMoments(partials + (static_cast<size_t>(g) * a.tiles + tile) * 3, m);
                } else if (cluster) {
                    memory.groups[g] = m;
                } else {
                    memory.results[g] = make_float2(m.mean, deviationInverse(m, a.epsilon));
                }
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
        for (uint32_t g = warp; g < groupCount; g += blockDim.x / kWarp) {
            Moments const m = mergeTiles(partials + static_cast<size_t>(g) * a.tiles * 3, a.tiles, lane);
            if (lane == 0) {
                memory.results[g] = make_float2(m.mean, deviationInverse(m, a.epsilon));
            }
        }
    }
    if (cluster) {
        clusterArrive();
        clusterWait();
        for (uint32_t g = threadIdx.x; g < groupCount; g += blockDim.x) {
            Moments const m = mergePeers(memory.groups + g, a.tiles);
            memory.results[g] = make_float2(m.mean, deviationInverse(m, a.epsilon));
        }
    }
    blockSync();
    if (cluster) {
        clusterArrive();  // this block has read its peers; the wait at the end keeps its own memory until they have too
    }

    float centre[V];
    float scale[V];
    float beta[V];
    loadParameters<T>(a.gamma, channel, a.parameterFloat, a.parameterAligned, scale);
    loadParameters<T>(a.beta, channel, a.parameterFloat, a.parameterAligned, beta);
#pragma unroll
    for (int j = 0; j < V; ++j) {
        float2 const result = memory.results[divide(column * V + j, a.groupDivisor)];
        centre[j] = result.x;
        scale[j] *= result.y;
    }
    if (a.bias != nullptr) {  // read again, near at hand by now, rather than kept in registers all the while
        float bias[V];
        loadParameters<T>(a.bias, biasPlace, a.biasFloat, a.biasAligned, bias);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            centre[j] -= bias[j];
        }
    }
    auto write = [&](uint32_t pixel, P pack) {
        float value[V];
        pack.unpack(value);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            value[j] = finish(value[j], centre[j], scale[j], beta[j], a.silu);
        }
        pack.pack(value);
        *reinterpret_cast<P*>(y + pixel * a.pixelStride) = pack;
    };
    for (uint32_t batch = first; batch < end; batch += R * step) {
        if constexpr (S == Stage::kApply) {
#pragma unroll
            for (int k = 0; k < R; ++k) {
                if (batch + k * step < end) {
                    held[k] = load(batch + k * step);
                }
            }
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
    if constexpr (S != Stage::kApply && R == kManyPacks) {
        for (uint32_t k = 0; k < a.sharedPacks; ++k) {
            uint32_t const pixel = first + (R + k) * step;
            if (pixel < end) {
                write(pixel, parked[k * blockDim.x]);
            }
        }
    }
    if (cluster) {
        clusterWait();
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
Kernel kernelOf(Plan const& plan, Stage stage) noexcept {
    bool const many = plan.packs > kFewPacks;
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
    a.pixelStride = p.pixelStride;
    a.channels = static_cast<uint32_t>(p.channels);
    a.pixels = static_cast<uint32_t>(p.pixels);
    a.groupChannels = static_cast<uint32_t>(p.channels / p.groups);
    a.unitsPerSample = static_cast<uint32_t>(plan.units / p.batch);
    a.tiles = static_cast<uint32_t>(plan.tiles);
    a.chunk = static_cast<uint32_t>(plan.chunk);
    a.sharedPacks = static_cast<uint32_t>(plan.sharedPacks);
    a.epsilon = p.epsilon;
    a.silu = p.activation == Activation::kSiLU;
    a.parameterFloat = p.parameterType == DataType::kFloat;
    a.biasFloat = p.biasType == DataType::kFloat;
    a.parameterAligned = aligned(p.gamma) && aligned(p.beta);
    a.biasAligned = aligned(p.channelBias);
    if (plan.shape == Shape::kRun) {
        a.run = static_cast<uint32_t>(a.groupChannels * p.pixels / plan.vector);
        a.runDivisor = makeDivisor(a.nhwc ? a.groupChannels : static_cast<uint32_t>(p.pixels / plan.vector));
        a.staged = a.groupChannels <= kStagedChannels;
    } else {
        a.bundleChannels = static_cast<uint32_t>(plan.bundleChannels);
        a.columns = static_cast<uint32_t>(plan.columns);
        a.rows = static_cast<uint32_t>(plan.rows);
        a.itemWidth = static_cast<uint32_t>(plan.itemWidth);
        a.groupDivisor = makeDivisor(a.groupChannels);
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
    cudaLaunchAttribute attribute{};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(units * plan.tiles));
    config.blockDim = dim3(static_cast<unsigned>(plan.threads));
    config.dynamicSmemBytes = static_cast<size_t>(plan.sharedBytes);
    config.stream = stream;
    config.attrs = &attribute;
    if (stage == Stage::kGrid) {
        attribute.id = cudaLaunchAttributeCooperative;
        attribute.val.cooperative = 1;
        config.numAttrs = 1;
    } else if (stage == Stage::kHeld && plan.tiles > 1) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = static_cast<unsigned>(plan.tiles);
        attribute.val.clusterDim.y = 1;
        attribute.val.clusterDim.z = 1;
        config.numAttrs = 1;
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
    if (!isType(p.dataType)) {
        return "unknown data type";
    }
    if (p.parameterType != DataType::kFloat && p.parameterType != p.dataType) {
        return "gamma and beta must be FP32 or of the data's type";
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
