// Random calls of GroupNorm, what must come of them in double precision, and one call made and judged. kernel_check.cu
// runs them on a GPU, tests/emulation/ on a machine without one.
#pragma once

#include "group_norm.h"
#include "group_norm_plan.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace canny2image::cases {

using Bytes = std::vector<unsigned char>;
using Random = std::mt19937_64;

// A CUDA function failed: nothing that follows would tell anything.
class CudaError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

inline void check(cudaError_t error, char const* what) {
    if (error != cudaSuccess) {
        throw CudaError(std::string(what) + ": " + cudaGetErrorString(error));
    }
}

// Device memory, freed with its owner.
class Memory {
public:
    explicit Memory(size_t size) : mSize(size) { check(cudaMalloc(&mData, size == 0 ? 1 : size), "cudaMalloc"); }
    ~Memory() { cudaFree(mData); }
    Memory(Memory const&) = delete;
    Memory& operator=(Memory const&) = delete;

    char* data() const { return static_cast<char*>(mData); }
    size_t size() const { return mSize; }
    void fill(int value) const { check(cudaMemset(mData, value, mSize), "cudaMemset"); }
    Bytes get() const {
        Bytes to(mSize);
        check(cudaMemcpy(to.data(), mData, mSize, cudaMemcpyDeviceToHost), "copy from the device");
        return to;
    }

private:
    void* mData{nullptr};
    size_t mSize;
};

// A graph of what `record` enqueues on the stream that it is given.
class Graph {
public:
    template <typename Record>
    Graph(cudaStream_t stream, Record record) {
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin of capture");
        record(stream);
        cudaGraph_t graph = nullptr;
        check(cudaStreamEndCapture(stream, &graph), "end of capture");
        check(cudaGraphInstantiateWithFlags(&mGraph, graph, 0), "graph");
        cudaGraphDestroy(graph);
    }
    ~Graph() { cudaGraphExecDestroy(mGraph); }
    Graph(Graph const&) = delete;
    Graph& operator=(Graph const&) = delete;
    void launch(cudaStream_t stream) const { check(cudaGraphLaunch(mGraph, stream), "graph launch"); }

private:
    cudaGraphExec_t mGraph{nullptr};
};

inline size_t sizeOf(DataType type) { return type == DataType::kFloat ? 4 : 2; }

inline char const* nameOf(DataType type) {
    return type == DataType::kFloat ? "fp32" : type == DataType::kHalf ? "fp16" : "bf16";
}

inline double read(unsigned char const* from, DataType type, size_t i) {
    if (type == DataType::kFloat) {
        return reinterpret_cast<float const*>(from)[i];
    }
    return type == DataType::kHalf ? __half2float(reinterpret_cast<__half const*>(from)[i])
                                   : __bfloat162float(reinterpret_cast<__nv_bfloat16 const*>(from)[i]);
}

inline void write(unsigned char* to, DataType type, size_t i, double value) {
    float const single = static_cast<float>(value);
    if (type == DataType::kFloat) {
        reinterpret_cast<float*>(to)[i] = single;
    } else if (type == DataType::kHalf) {
        reinterpret_cast<__half*>(to)[i] = __float2half_rn(single);
    } else {
        reinterpret_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(single);
    }
}

enum class Kind { kNormal, kTiny, kHuge, kLargeMean, kConstant, kOutlierFirst, kOneNan, kOneInfinity };
constexpr char const* kKindNames[] = {"normal", "tiny", "huge", "mean 1000", "constant", "outlier", "NaN", "infinity"};

struct Case {
    GroupNormParams params;  // without pointers
    Kind kind{Kind::kNormal};
    bool hasBias{false};
    double biasMean{0.0};
    double gain{1.0};  // of gamma: a large one brings results far from zero
    int shift{0};           // elements by which x and y are off their alignment
    int parameterShift{0};  // the same of gamma, beta and bias
};

inline size_t elementsOf(GroupNormParams const& p) {
    return static_cast<size_t>(p.batch * p.pixels * (p.layout == Layout::kNHWC ? p.pixelStride : p.channels));
}

// Of gamma, and of beta.
inline size_t parametersOf(GroupNormParams const& p) { return static_cast<size_t>(p.parameterRows * p.channels); }

inline size_t placeOf(GroupNormParams const& p, int64_t n, int64_t c, int64_t pixel) {
    int64_t const nhwc = (n * p.pixels + pixel) * p.pixelStride + c;
    return static_cast<size_t>(p.layout == Layout::kNHWC ? nhwc : (n * p.channels + c) * p.pixels + pixel);
}

inline Bytes makeValues(DataType type, size_t count, double mean, double deviation, Random& random) {
    std::normal_distribution<double> normal(mean, deviation > 0 ? deviation : 1.0);
    Bytes bytes(count * sizeOf(type));
    for (size_t i = 0; i < count; ++i) {
        write(bytes.data(), type, i, deviation > 0 ? normal(random) : mean);
    }
    return bytes;
}

inline Bytes makeInput(Case const& c, Random& random) {
    GroupNormParams const& p = c.params;
    bool const half = p.dataType == DataType::kHalf;
    double mean = 0.0;
    double deviation = 1.0;
    switch (c.kind) {
        case Kind::kTiny: deviation = half ? 1e-6 : 1e-20; break;
        case Kind::kHuge: deviation = half ? 1e4 : 1e15; break;
        case Kind::kLargeMean: mean = 1000.0; break;
        case Kind::kConstant: mean = 1000.0, deviation = 0.0; break;
        default: break;
    }
    Bytes x = makeValues(p.dataType, elementsOf(p), mean, deviation, random);
    if (c.kind == Kind::kOutlierFirst) {
        write(x.data(), p.dataType, 0, 30000.0);
    }
    if (c.kind == Kind::kOneNan || c.kind == Kind::kOneInfinity) {
        auto const among = [&](int64_t count) { return static_cast<int64_t>(random() % static_cast<uint64_t>(count)); };
        size_t const place = placeOf(p, among(p.batch), among(p.channels), among(p.pixels));
        write(x.data(), p.dataType, place,
            c.kind == Kind::kOneNan ? std::nan("") : -std::numeric_limits<double>::infinity());
    }
    return x;
}

struct Expected {
    std::vector<double> value;
    std::vector<double> bound;
};

// The operator in double precision, and how far a result of this type may lie from it: the rounding of the result, and
// some roundings of FP32 arithmetic on values as far from zero as the group's.
inline Expected compute(Case const& c, Bytes const& x, Bytes const& gamma, Bytes const& beta, Bytes const& bias) {
    GroupNormParams const& p = c.params;
    Expected result{std::vector<double>(elementsOf(p), 0.0), std::vector<double>(elementsOf(p), 0.0)};
    double const unit = p.dataType == DataType::kFloat ? 0x1p-24 : p.dataType == DataType::kHalf ? 0x1p-11 : 0x1p-8;
    int64_t const wide = p.channels / p.groups;
    double const count = static_cast<double>(wide) * static_cast<double>(p.pixels);
    for (int64_t n = 0; n < p.batch; ++n) {
        int64_t const row = n * p.parameterRows / p.batch;  // of gamma and beta
        for (int64_t c0 = 0; c0 < p.channels; c0 += wide) {
            auto const each = [&](auto action) {
                for (int64_t k = c0; k < c0 + wide; ++k) {
                    double const add = c.hasBias ? read(bias.data(), p.biasType, n * p.channels + k) : 0.0;
                    for (int64_t pixel = 0; pixel < p.pixels; ++pixel) {
                        size_t const place = placeOf(p, n, k, pixel);
                        action(k, place, read(x.data(), p.dataType, place) + add);
                    }
                }
            };
            double sum = 0.0;
            double squares = 0.0;
            double largest = 0.0;
            each([&](int64_t, size_t, double v) { sum += v; });
            double const mean = sum / count;
            each([&](int64_t, size_t, double v) {
                squares += (v - mean) * (v - mean);
                largest = std::max(largest, std::fabs(v));
            });
            double const inverse = 1.0 / std::sqrt(squares / count + p.epsilon);
            // Where all values of x are equal and nothing is added, the FP32 mean is exact.
            double const moved = c.kind == Kind::kConstant && !c.hasBias ? 0.0 : largest * inverse;
            each([&](int64_t k, size_t place, double v) {
                double const scale = read(gamma.data(), p.parameterType, row * p.channels + k);
                double const shift = read(beta.data(), p.parameterType, row * p.channels + k);
                double const y = (v - mean) * inverse * scale + shift;
                double const fp32 = 0x1p-22 * (std::fabs(scale) * (moved + 16.0 * std::fabs(v - mean) * inverse) +
                                        8.0 * std::fabs(shift) + 1.0);
                result.value[place] = p.activation == Activation::kSiLU ? y / (1.0 + std::exp(-y)) : y;
                result.bound[place] = 1.01 * unit * std::fabs(result.value[place]) + 1.2 * fp32;
            });
        }
    }
    return result;
}

// The worst error as a part of its bound; above 1 fails, as do NaN where none belongs and the reverse.
inline double compare(Expected const& expected, unsigned char const* got, DataType type) {
    double worst = 0.0;
    for (size_t i = 0; i < expected.value.size(); ++i) {
        double const y = read(got, type, i);
        double const want = expected.value[i];
        if (std::isnan(want) || std::isnan(y)) {
            worst = std::isnan(want) == std::isnan(y) ? worst : 1e30;
        } else if (y != want) {
            worst = std::max(worst, std::fabs(y - want) / std::max(expected.bound[i], 1e-300));
        }
    }
    return worst;
}

inline std::string nameCase(Case const& c) {
    GroupNormParams const& p = c.params;
    char text[256];
    std::snprintf(text, sizeof(text),
        "%lld x %lld x %lld /%d stride %lld %s %s par %lld %s%s%s%s%s eps %g shift %d, %d %s",
        static_cast<long long>(p.batch), static_cast<long long>(p.channels), static_cast<long long>(p.pixels), p.groups,
        static_cast<long long>(p.pixelStride), p.layout == Layout::kNHWC ? "NHWC" : "NCHW", nameOf(p.dataType),
        static_cast<long long>(p.parameterRows), nameOf(p.parameterType), c.hasBias ? " bias" : "",
        c.hasBias && c.biasMean > 0.0 ? " of 1000" : "",
        p.activation == Activation::kSiLU ? " silu" : "", c.gain > 1.0 ? " gain" : "",
        static_cast<double>(p.epsilon), c.shift, c.parameterShift, kKindNames[static_cast<int>(c.kind)]);
    return text;
}

inline std::vector<Plan> allPlans(GroupNormParams const& params) {
    DeviceFacts facts;
    std::vector<Plan> plans;
    check(deviceFacts(facts), "device");
    considerPlans(params, allowsVectors(params), facts, [&](Plan const& plan) { plans.push_back(plan); });
    return plans;
}

constexpr size_t kGuard = 256;
constexpr int kPoison = 0x7f;  // what no kernel may leave in y, nor change around it

// One case on the device: correct, within its memory, and the same bits again, in a graph and in place.
class CaseRun {
public:
    CaseRun(Case const& c, Random& random)
        : mParams(c.params), mParameterShift(c.parameterShift), mX(makeInput(c, random)),
          mGamma(makeValues(c.params.parameterType, parametersOf(c.params), c.gain, 0.3 * c.gain, random)),
          mBeta(makeValues(c.params.parameterType, parametersOf(c.params), 0.0, 0.3, random)),
          mBias(makeValues(c.params.biasType, c.params.batch * c.params.channels, c.biasMean, 1.0, random)),
          mOffset(kGuard + c.shift * sizeOf(c.params.dataType)), mXDevice(mX.size() + 2 * kGuard),
          mYDevice(mX.size() + 2 * kGuard), mGammaDevice(mGamma.size() + kGuard), mBetaDevice(mBeta.size() + kGuard),
          mBiasDevice(mBias.size() + kGuard), mWorkspace(groupNormWorkspaceSize(c.params) + kGuard) {
        mParams.x = mXDevice.data() + mOffset;
        mParams.y = mYDevice.data() + mOffset;
        mParams.gamma = put(mGammaDevice, mGamma, mParams.parameterType);
        mParams.beta = put(mBetaDevice, mBeta, mParams.parameterType);
        void const* const bias = put(mBiasDevice, mBias, mParams.biasType);
        mParams.channelBias = c.hasBias ? bias : nullptr;
        mExpected = compute(c, mX, mGamma, mBeta, mBias);
    }

    std::vector<Plan> plans() const { return allPlans(mParams); }

    // What `launchGroupNorm` takes, described.
    std::string path() const { return groupNormPath(mParams); }

    // An empty string, or what is wrong, by one of `plans`, or by what `launchGroupNorm` takes where it is null.
    // `worst` is the error as a part of its bound.
    std::string run(cudaStream_t stream, Plan const* plan, double& worst) const {
        GroupNormParams params = mParams;
        auto const launch = [&](cudaStream_t on) {
            check(plan == nullptr ? launchGroupNorm(params, mWorkspace.data(), mWorkspace.size() - kGuard, on)
                                  : launchPlan(params, *plan, mWorkspace.data(), on),
                "launch");
        };
        reset();
        launch(stream);
        Bytes const first = finish(stream, mYDevice);
        worst = compare(mExpected, first.data() + mOffset, params.dataType);
        if (!(worst <= 1.0)) {
            return "error beyond its bound";
        }
        if (!guardsHold(first)) {
            return "wrote outside y or the workspace";
        }
        for (int again = 0; again < 2; ++again) {
            reset();
            launch(stream);
            if (finish(stream, mYDevice) != first) {
                return "other bits the second time";
            }
        }
        reset();
        Graph const graph(stream, launch);
        graph.launch(stream);
        if (finish(stream, mYDevice) != first) {
            return "other bits in a graph";
        }
        reset();
        params.y = mXDevice.data() + mOffset;
        launch(stream);
        if (finish(stream, mXDevice) != first) {
            return "other bits in place";
        }
        bool const overlaps = plan != nullptr && plan->overlap;
        if (overlaps && thereAndBack(stream, launch, params, true) != thereAndBack(stream, launch, params, false)) {
            return "other bits where one launch reads what the one ahead wrote";
        }
        return "";
    }

private:
    // The second of two launches of `params`: from x to y, and from there back to x. In a graph, or with waits between.
    template <typename Launch>
    Bytes thereAndBack(cudaStream_t stream, Launch launch, GroupNormParams& params, bool inGraph) const {
        auto const both = [&](cudaStream_t on) {
            params.x = mXDevice.data() + mOffset;
            params.y = mYDevice.data() + mOffset;
            launch(on);
            if (!inGraph) {
                check(cudaStreamSynchronize(on), "kernel");
            }
            params.x = mYDevice.data() + mOffset;
            params.y = mXDevice.data() + mOffset;
            launch(on);
        };
        reset();
        if (!inGraph) {
            both(stream);
            return finish(stream, mXDevice);
        }
        Graph const graph(stream, both);
        graph.launch(stream);
        return finish(stream, mXDevice);
    }
    void reset() const {
        mXDevice.fill(kPoison);
        mYDevice.fill(kPoison);
        mWorkspace.fill(0xff);
        check(cudaMemcpy(mXDevice.data() + mOffset, mX.data(), mX.size(), cudaMemcpyHostToDevice), "copy of x");
        check(cudaDeviceSynchronize(), "reset");  // the stream does not wait for the default one
    }
    void const* put(Memory const& memory, Bytes const& values, DataType type) const {
        char* const place = memory.data() + mParameterShift * sizeOf(type);
        memory.fill(0xff);
        check(cudaMemcpy(place, values.data(), values.size(), cudaMemcpyHostToDevice), "copy of parameters");
        return place;
    }
    Bytes finish(cudaStream_t stream, Memory const& memory) const {
        check(cudaStreamSynchronize(stream), "kernel");
        return memory.get();
    }
    bool guardsHold(Bytes const& y) const {
        Bytes const workspace = mWorkspace.get();
        auto const poisoned = [&](size_t from, size_t to) {
            return std::all_of(y.begin() + from, y.begin() + to, [](unsigned char b) { return b == kPoison; });
        };
        return poisoned(0, mOffset) && poisoned(mOffset + mX.size(), y.size()) &&
            std::all_of(workspace.end() - kGuard, workspace.end(), [](unsigned char b) { return b == 0xff; });
    }

    GroupNormParams mParams;
    int mParameterShift;
    Bytes mX;
    Bytes mGamma;
    Bytes mBeta;
    Bytes mBias;
    size_t mOffset;
    Memory mXDevice;
    Memory mYDevice;
    Memory mGammaDevice;
    Memory mBetaDevice;
    Memory mBiasDevice;
    Memory mWorkspace;
    Expected mExpected;
};

template <typename T>
T pick(Random& random, std::vector<T> const& from) {
    return from[random() % from.size()];
}

// A case of at most about `elements` elements.
inline Case randomCase(Random& random, int64_t elements) {
    Case c;
    GroupNormParams& p = c.params;
    auto const oneIn = [&](int count) { return random() % static_cast<unsigned>(count) == 0; };
    int64_t const wide = pick<int64_t>(random, {1, 2, 3, 4, 5, 7, 8, 10, 16, 20, 30, 33, 40, 60, 80, 1030});
    p.groups = pick<int32_t>(random, {1, 2, 3, 4, 8, 32});
    p.batch = pick<int64_t>(random, {1, 2, 3, 4});
    p.parameterRows = pick<int64_t>(random, {1, p.batch % 2 == 0 ? 2 : 1, p.batch});
    p.channels = wide * p.groups;
    p.pixels = pick<int64_t>(random, {1, 2, 7, 24, 25, 63, 96, 100, 384, 1000, 1536, 4097, 6144, 24576, 98304});
    while (p.batch * p.channels * p.pixels > elements && p.pixels > 1) {
        p.pixels = p.pixels / 4 + 1;
    }
    p.layout = oneIn(2) ? Layout::kNHWC : Layout::kNCHW;
    p.dataType = pick<DataType>(random, {DataType::kFloat, DataType::kHalf, DataType::kBFloat16});
    p.parameterType = oneIn(2) ? DataType::kFloat : p.dataType;
    p.biasType = oneIn(2) ? DataType::kFloat : p.dataType;
    p.activation = oneIn(2) ? Activation::kSiLU : Activation::kNone;
    p.epsilon = pick<float>(random, {1e-5F, 1e-6F, 0.1F});
    p.pixelStride = p.layout == Layout::kNHWC ? p.channels : 0;
    if (p.layout == Layout::kNHWC && oneIn(3)) {
        p.pixelStride = oneIn(4) ? p.channels + 3 : (p.channels + 7) / 8 * 8 + (oneIn(4) ? 8 : 0);
    }
    c.hasBias = oneIn(2);
    c.biasMean = oneIn(4) ? 1000.0 : 0.0;
    c.gain = oneIn(4) ? 100.0 : 1.0;
    c.shift = oneIn(6) ? 1 + static_cast<int>(random() % 3) : 0;
    c.parameterShift = oneIn(6) ? 1 : 0;
    c.kind = oneIn(2) ? Kind::kNormal : static_cast<Kind>(random() % 8);
    return c;
}

struct Shape3 {
    int64_t batch;
    int64_t channels;
    int64_t pixels;
};

// Every GroupNorm of sd15 at 256 x 384: UNet and ControlNet with the two halves of guidance, then the decoder.
constexpr Shape3 kSd15[] = {{2, 320, 1536}, {2, 640, 1536}, {2, 960, 1536}, {2, 320, 384}, {2, 640, 384}, {2, 960, 384},
    {2, 1280, 384}, {2, 1920, 384}, {2, 640, 96}, {2, 1280, 96}, {2, 1920, 96}, {2, 2560, 96}, {2, 1280, 24},
    {2, 2560, 24}, {1, 512, 1536}, {1, 512, 6144}, {1, 512, 24576}, {1, 256, 24576}, {1, 256, 98304}, {1, 128, 98304}};

// What the CUDA path's encoder calls: UNet and ControlNet as one batch, whose halves have parameters of their own.
constexpr Shape3 kSd15TwoNets[] = {
    {4, 320, 1536}, {4, 320, 384}, {4, 640, 384}, {4, 640, 96}, {4, 1280, 96}, {4, 1280, 24}};

inline GroupNormParams sd15Params(Shape3 const& shape, Layout layout) {
    GroupNormParams p;
    p.batch = shape.batch;
    p.channels = shape.channels;
    p.pixels = shape.pixels;
    p.pixelStride = shape.channels;
    p.groups = 32;
    p.epsilon = 1e-5F;
    p.activation = Activation::kSiLU;
    p.layout = layout;
    p.dataType = p.parameterType = p.biasType = DataType::kHalf;
    return p;
}

// Every norm of sd15 in both layouts, and those of two networks in the one that has them.
inline std::vector<GroupNormParams> allSd15Params() {
    std::vector<GroupNormParams> all;
    for (Shape3 const& shape : kSd15) {
        for (Layout layout : {Layout::kNCHW, Layout::kNHWC}) {
            all.push_back(sd15Params(shape, layout));
        }
    }
    for (Shape3 const& shape : kSd15TwoNets) {
        all.push_back(sd15Params(shape, Layout::kNHWC));
        all.back().parameterRows = 2;
    }
    return all;
}

// The table of plans and their times that tools/fit_group_norm_plan.py reads: its first line, and one for each plan.
inline void writePlanColumns(std::FILE* file) {
    std::fprintf(file,
        "batch,channels,pixels,layout,cache,shape,vector,stage,bundle,tiles,threads,packs,shared_packs,units,"
        "units_per_launch,chunk,rows,shared_bytes,overlap,processors,shared_limit,estimate_us,median_us,least_us\n");
}

inline void writePlan(std::FILE* file, GroupNormParams const& params, bool cold, Plan const& plan,
    DeviceFacts const& facts, double median, double least) {
    std::fprintf(file, "%lld,%lld,%lld,%s,%s,%d,%d,%d,%d,%d,%d,%d,%d,%lld,%lld,%lld,%d,%lld,%d,%d,%d,%.3f,%.3f,%.3f\n",
        static_cast<long long>(params.batch), static_cast<long long>(params.channels),
        static_cast<long long>(params.pixels), params.layout == Layout::kNHWC ? "NHWC" : "NCHW", cold ? "cold" : "warm",
        static_cast<int>(plan.shape), plan.vector, static_cast<int>(plan.stage), plan.bundleChannels, plan.tiles,
        plan.threads, plan.packs, plan.sharedPacks, static_cast<long long>(plan.units),
        static_cast<long long>(plan.unitsPerLaunch), static_cast<long long>(plan.chunk), plan.rows,
        static_cast<long long>(plan.sharedBytes), plan.overlap ? 1 : 0, facts.processors, facts.sharedPerBlock,
        plan.cost, median, least);
}

// Calls that must be refused, and that refuse without harm to the next.
inline int checkRefusals(cudaStream_t stream) {
    GroupNormParams good = sd15Params({2, 320, 1536}, Layout::kNHWC);
    Memory const memory(elementsOf(good) * 2);
    Memory const workspace(groupNormWorkspaceSize(good));
    good.x = good.y = memory.data();
    good.gamma = good.beta = memory.data();
    int failures = 0;
    auto const refused = [&](char const* what, GroupNormParams const& p, size_t size) {
        bool const right = launchGroupNorm(p, workspace.data(), size, stream) == cudaErrorInvalidValue;
        failures += right ? 0 : 1;
        std::printf("%-4s refuses %s\n", right ? "ok" : "FAIL", what);
    };
    GroupNormParams bad = good;
    bad.groups = 33;
    refused("groups that do not divide the channels", bad, workspace.size());
    bad = good;
    bad.pixelStride = 319;
    refused("a stride below the channels", bad, workspace.size());
    bad = good;
    bad.x = nullptr;
    refused("no input", bad, workspace.size());
    bad = good;
    bad.biasType = DataType::kBFloat16;
    refused("a bias of a third type", bad, workspace.size());
    bad = good;
    bad.batch = 3;
    bad.pixels = good.pixels / 3;
    bad.parameterRows = 2;
    refused("rows of gamma and beta that do not divide the batch", bad, workspace.size());
    bad.parameterRows = 6;
    refused("more rows of gamma and beta than samples", bad, workspace.size());
    for (int64_t rows : {0, -1}) {
        bad.parameterRows = rows;
        refused("no rows of gamma and beta", bad, workspace.size());
    }
    if (workspace.size() > 0) {
        refused("a small workspace", good, workspace.size() - 1);
    }
    return failures;
}

}  // namespace canny2image::cases
