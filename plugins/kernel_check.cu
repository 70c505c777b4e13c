// Checks the GroupNorm kernels on the machine's GPU against sums in double precision on the host, and times them.
//
//   nvcc -std=c++17 -O3 -arch=native plugins/kernel_check.cu plugins/group_norm_kernels.cu -o kernel_check
//   ./kernel_check [--cases N] [--seed S] [--no-timing | --plans FILE]
//
// Exit status 0 where all is well, 1 where a check fails, 2 where CUDA does. For compute-sanitizer use few cases and
// --no-timing. --plans times every plan that could run each norm of sd15, not the one taken only, and writes them
// to a file of comma-separated values: what the estimates of group_norm_plan.h are fitted to.
#include "group_norm.h"
#include "group_norm_plan.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace {

using namespace canny2image;
using Bytes = std::vector<unsigned char>;
using Random = std::mt19937_64;

void check(cudaError_t error, char const* what) {
    if (error != cudaSuccess) {
        std::fprintf(stderr, "kernel_check: %s: %s\n", what, cudaGetErrorString(error));
        std::exit(2);
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
    void put(Bytes const& from) const {
        check(cudaMemcpy(mData, from.data(), from.size(), cudaMemcpyHostToDevice), "copy to the device");
    }
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

size_t sizeOf(DataType type) { return type == DataType::kFloat ? 4 : 2; }

char const* nameOf(DataType type) {
    return type == DataType::kFloat ? "fp32" : type == DataType::kHalf ? "fp16" : "bf16";
}

double read(unsigned char const* from, DataType type, size_t i) {
    if (type == DataType::kFloat) {
        return reinterpret_cast<float const*>(from)[i];
    }
    return type == DataType::kHalf ? __half2float(reinterpret_cast<__half const*>(from)[i])
                                   : __bfloat162float(reinterpret_cast<__nv_bfloat16 const*>(from)[i]);
}

void write(unsigned char* to, DataType type, size_t i, double value) {
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
    int shift{0};  // elements by which x and y are off their alignment
};

size_t elementsOf(GroupNormParams const& p) {
    return static_cast<size_t>(p.batch * p.pixels * (p.layout == Layout::kNHWC ? p.pixelStride : p.channels));
}

size_t placeOf(GroupNormParams const& p, int64_t n, int64_t c, int64_t pixel) {
    int64_t const nhwc = (n * p.pixels + pixel) * p.pixelStride + c;
    return static_cast<size_t>(p.layout == Layout::kNHWC ? nhwc : (n * p.channels + c) * p.pixels + pixel);
}

Bytes makeValues(DataType type, size_t count, double mean, double deviation, Random& random) {
    std::normal_distribution<double> normal(mean, deviation > 0 ? deviation : 1.0);
    Bytes bytes(count * sizeOf(type));
    for (size_t i = 0; i < count; ++i) {
        write(bytes.data(), type, i, deviation > 0 ? normal(random) : mean);
    }
    return bytes;
}

Bytes makeInput(Case const& c, Random& random) {
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
Expected compute(Case const& c, Bytes const& x, Bytes const& gamma, Bytes const& beta, Bytes const& bias) {
    GroupNormParams const& p = c.params;
    Expected result{std::vector<double>(elementsOf(p), 0.0), std::vector<double>(elementsOf(p), 0.0)};
    double const unit = p.dataType == DataType::kFloat ? 0x1p-24 : p.dataType == DataType::kHalf ? 0x1p-11 : 0x1p-8;
    int64_t const wide = p.channels / p.groups;
    double const count = static_cast<double>(wide) * static_cast<double>(p.pixels);
    for (int64_t n = 0; n < p.batch; ++n) {
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
                double const scale = read(gamma.data(), p.parameterType, k);
                double const shift = read(beta.data(), p.parameterType, k);
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
double compare(Expected const& expected, unsigned char const* got, DataType type) {
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

std::string nameCase(Case const& c) {
    GroupNormParams const& p = c.params;
    char text[256];
    std::snprintf(text, sizeof(text), "%lld x %lld x %lld /%d stride %lld %s %s par %s%s%s eps %g shift %d %s",
        static_cast<long long>(p.batch), static_cast<long long>(p.channels), static_cast<long long>(p.pixels), p.groups,
        static_cast<long long>(p.pixelStride), p.layout == Layout::kNHWC ? "NHWC" : "NCHW", nameOf(p.dataType),
        nameOf(p.parameterType), c.hasBias ? " bias" : "", p.activation == Activation::kSiLU ? " silu" : "",
        static_cast<double>(p.epsilon), c.shift, kKindNames[static_cast<int>(c.kind)]);
    return text;
}

std::vector<Plan> allPlans(GroupNormParams const& params) {
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
        : mCase(c), mX(makeInput(c, random)),
          mGamma(makeValues(c.params.parameterType, c.params.channels, 1.0, 0.3, random)),
          mBeta(makeValues(c.params.parameterType, c.params.channels, 0.0, 0.3, random)),
          mBias(makeValues(c.params.biasType, c.params.batch * c.params.channels, 0.0, 1.0, random)),
          mOffset(kGuard + c.shift * sizeOf(c.params.dataType)), mXDevice(mX.size() + 2 * kGuard),
          mYDevice(mX.size() + 2 * kGuard), mGammaDevice(mGamma.size()), mBetaDevice(mBeta.size()),
          mBiasDevice(mBias.size()), mWorkspace(groupNormWorkspaceSize(c.params) + kGuard) {
        mGammaDevice.put(mGamma);
        mBetaDevice.put(mBeta);
        mBiasDevice.put(mBias);
    }

    // An empty string, or what is wrong. `worst` is the error as a part of its bound. `choice` picks one of the plans
    // that could run; 0 stands for the one that `launchGroupNorm` takes.
    std::string run(cudaStream_t stream, uint64_t choice, double& worst, std::string& path) {
        GroupNormParams params = mCase.params;
        params.x = mXDevice.data() + mOffset;
        params.y = mYDevice.data() + mOffset;
        params.gamma = mGammaDevice.data();
        params.beta = mBetaDevice.data();
        params.channelBias = mCase.hasBias ? mBiasDevice.data() : nullptr;
        std::vector<Plan> const plans = allPlans(params);
        Plan const& plan = plans[choice % plans.size()];
        path = choice == 0 ? groupNormPath(params) : describePlan(plan);
        auto const launch = [&](cudaStream_t on) {
            check(choice == 0 ? launchGroupNorm(params, mWorkspace.data(), mWorkspace.size() - kGuard, on)
                              : launchPlan(params, plan, mWorkspace.data(), on),
                "launch");
        };
        reset();
        launch(stream);
        Bytes const first = finish(stream, mYDevice);
        worst = compare(compute(mCase, mX, mGamma, mBeta, mBias), first.data() + mOffset, params.dataType);
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
        return "";
    }

private:
    void reset() const {
        mXDevice.fill(kPoison);
        mYDevice.fill(kPoison);
        mWorkspace.fill(0xff);
        check(cudaMemcpy(mXDevice.data() + mOffset, mX.data(), mX.size(), cudaMemcpyHostToDevice), "copy of x");
        check(cudaDeviceSynchronize(), "reset");  // the stream does not wait for the default one
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

    Case mCase;
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
};

template <typename T>
T pick(Random& random, std::vector<T> const& from) {
    return from[random() % from.size()];
}

Case randomCase(Random& random) {
    Case c;
    GroupNormParams& p = c.params;
    auto const oneIn = [&](int count) { return random() % static_cast<unsigned>(count) == 0; };
    int64_t const wide = pick<int64_t>(random, {1, 2, 3, 4, 5, 7, 8, 10, 16, 20, 30, 33, 40, 60, 80});
    p.groups = pick<int32_t>(random, {1, 2, 3, 4, 8, 32});
    p.batch = pick<int64_t>(random, {1, 2, 3});
    p.channels = wide * p.groups;
    p.pixels = pick<int64_t>(random, {1, 2, 7, 24, 25, 63, 96, 100, 384, 1000, 1536, 4097, 6144, 24576, 98304});
    while (p.batch * p.channels * p.pixels > 4000000) {
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
    c.shift = oneIn(6) ? 1 + static_cast<int>(random() % 3) : 0;
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

GroupNormParams sd15Params(Shape3 const& shape, Layout layout) {
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

int checkCases(int count, uint64_t seed, cudaStream_t stream) {
    Random random(seed);
    std::vector<Case> cases;
    for (Shape3 const& shape : kSd15) {
        for (Layout layout : {Layout::kNCHW, Layout::kNHWC}) {
            Case c;
            c.params = sd15Params(shape, layout);
            cases.push_back(c);
        }
    }
    cases.resize(std::min<size_t>(cases.size(), static_cast<size_t>(count)));
    while (cases.size() < static_cast<size_t>(count)) {
        cases.push_back(randomCase(random));
    }
    int failures = 0;
    for (Case const& c : cases) {
        double worst = 0.0;
        std::string path;
        CaseRun prepared(c, random);
        for (uint64_t const choice : {uint64_t{0}, 1 + random() % 1000}) {  // the plan taken, and any other
            std::string const fault = prepared.run(stream, choice, worst, path);
            failures += fault.empty() ? 0 : 1;
            std::printf("%-4s %6.3f of bound  %s | %s%s%s\n", fault.empty() ? "ok" : "FAIL", worst, nameCase(c).c_str(),
                path.c_str(), fault.empty() ? "" : ": ", fault.c_str());
        }
    }
    std::printf("%zu cases by two plans each, %d failed\n", cases.size(), failures);
    return failures;
}

// Calls that must be refused, and that refuse without harm to the next.
int checkRefusals(cudaStream_t stream) {
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
    if (workspace.size() > 0) {
        refused("a small workspace", good, workspace.size() - 1);
    }
    return failures;
}

__global__ void copyKernel(uint4 const* from, uint4* to, unsigned count) {
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        to[i] = from[i];
    }
}

struct Timing {
    double median;
    double least;
    double most;
};

// Microseconds of one launch, from graphs of `calls` launches each.
template <typename Record>
Timing timeGraph(cudaStream_t stream, int calls, Record record, int repeats = 30) {
    constexpr int kWarmUp = 3;
    Graph const graph(stream, record);
    cudaEvent_t begin = nullptr;
    cudaEvent_t end = nullptr;
    check(cudaEventCreate(&begin), "event");
    check(cudaEventCreate(&end), "event");
    std::vector<double> times;
    for (int i = 0; i < kWarmUp + repeats; ++i) {
        float milliseconds = 0.0F;
        check(cudaEventRecord(begin, stream), "event");
        graph.launch(stream);
        check(cudaEventRecord(end, stream), "event");
        check(cudaEventSynchronize(end), "timed graph");
        check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
        if (i >= kWarmUp) {
            times.push_back(1000.0 * milliseconds / calls);
        }
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    std::sort(times.begin(), times.end());
    return {times[times.size() / 2], times.front(), times.back()};
}

// Inputs and outputs, one pair or as many as outgrow the L2 cache several times.
struct Buffers {
    Buffers(size_t size, bool cold, size_t cache) {
        size_t const pairs = cold ? 4 * cache / (2 * size) + 2 : 1;
        for (size_t i = 0; i < 2 * pairs; ++i) {
            memory.push_back(std::make_unique<Memory>(size));
            memory.back()->fill(0x3c);  // an ordinary number in every type
        }
    }
    char* x(size_t call) const { return memory[2 * call % memory.size()]->data(); }
    char* y(size_t call) const { return memory[(2 * call + 1) % memory.size()]->data(); }
    std::vector<std::unique_ptr<Memory>> memory;
};

void timeShape(GroupNormParams params, bool cold, cudaDeviceProp const& device, cudaStream_t stream) {
    constexpr size_t kFewestCalls = 40;
    size_t const size = elementsOf(params) * sizeOf(params.dataType);
    Buffers const buffers(size, cold, static_cast<size_t>(device.l2CacheSize));
    // Whole rounds over the buffers, so that none is still in the cache when its turn comes again.
    size_t const pairs = buffers.memory.size() / 2;
    size_t const calls = (kFewestCalls + pairs - 1) / pairs * pairs;
    Memory const parameters(static_cast<size_t>(params.channels) * sizeOf(params.parameterType));
    Memory const workspace(groupNormWorkspaceSize(params));
    parameters.fill(0x3c);
    check(cudaDeviceSynchronize(), "buffers");
    params.gamma = params.beta = parameters.data();
    Timing const norm = timeGraph(stream, static_cast<int>(calls), [&](cudaStream_t on) {
        for (size_t i = 0; i < calls; ++i) {
            params.x = buffers.x(i);
            params.y = buffers.y(i);
            check(launchGroupNorm(params, workspace.data(), workspace.size(), on), "launchGroupNorm");
        }
    });
    unsigned const packs = static_cast<unsigned>(size / 16);
    unsigned const blocks = std::min((packs + 255) / 256, 8U * static_cast<unsigned>(device.multiProcessorCount));
    Timing const copy = timeGraph(stream, static_cast<int>(calls), [&](cudaStream_t on) {
        for (size_t i = 0; i < calls; ++i) {
            copyKernel<<<blocks, 256, 0, on>>>(
                reinterpret_cast<uint4 const*>(buffers.x(i)), reinterpret_cast<uint4*>(buffers.y(i)), packs);
            check(cudaGetLastError(), "copy");
        }
    });
    std::printf(
        "| %lld x %lld x %lld | %s | %s | %.2f | %.2f (%.2f to %.2f) | %.2f (%.2f to %.2f) | %.2f | %.0f | %s |\n",
        static_cast<long long>(params.batch), static_cast<long long>(params.channels),
        static_cast<long long>(params.pixels), params.layout == Layout::kNHWC ? "NHWC" : "NCHW", cold ? "cold" : "warm",
        static_cast<double>(size) / 0x1p20, norm.median, norm.least, norm.most, copy.median, copy.least, copy.most,
        copy.median / norm.median, 2.0 * static_cast<double>(size) / norm.median / 1000.0,
        groupNormPath(params).c_str());
}

void timeAll(cudaDeviceProp const& device, cudaStream_t stream) {
    std::printf(
        "\nfp16 with SiLU; microseconds a launch in a graph of at least 40, median (least to most) of 30 graphs after "
        "3.\nwarm: the same input and output each time, from the L2 cache of %.0f MiB where both fit; cold: buffers of "
        "4 times that cache in turn.\n\n",
        device.l2CacheSize / 0x1p20);
    std::printf("| N x C x pixels | layout | cache | MiB | norm us | copy us | copy / norm | norm GB/s | path |\n");
    std::printf("|---|---|---|---|---|---|---|---|---|\n");
    for (Shape3 const& shape : kSd15) {
        for (Layout layout : {Layout::kNCHW, Layout::kNHWC}) {
            for (bool cold : {false, true}) {
                timeShape(sd15Params(shape, layout), cold, device, stream);
            }
        }
    }
}

void timePlans(GroupNormParams params, cudaDeviceProp const& device, cudaStream_t stream, std::FILE* file) {
    constexpr size_t kFewestCalls = 20;
    size_t const size = elementsOf(params) * sizeOf(params.dataType);
    bool const cold = 2 * size > static_cast<size_t>(device.l2CacheSize);
    Buffers const buffers(size, cold, static_cast<size_t>(device.l2CacheSize));
    size_t const pairs = buffers.memory.size() / 2;
    size_t const calls = (kFewestCalls + pairs - 1) / pairs * pairs;
    Memory const parameters(static_cast<size_t>(params.channels) * sizeOf(params.parameterType));
    Memory const workspace(groupNormWorkspaceSize(params));
    parameters.fill(0x3c);
    check(cudaDeviceSynchronize(), "buffers");
    params.gamma = params.beta = parameters.data();
    params.x = buffers.x(0);
    params.y = buffers.y(0);
    for (Plan const& plan : allPlans(params)) {
        Timing const time = timeGraph(
            stream, static_cast<int>(calls),
            [&](cudaStream_t on) {
                for (size_t i = 0; i < calls; ++i) {
                    params.x = buffers.x(i);
                    params.y = buffers.y(i);
                    check(launchPlan(params, plan, workspace.data(), on), "launchPlan");
                }
            },
            7);
        std::fprintf(file, "%lld,%lld,%lld,%s,%s,%d,%d,%d,%d,%d,%d,%d,%d,%lld,%lld,%lld,%d,%lld,%.3f,%.3f,%.3f\n",
            static_cast<long long>(params.batch), static_cast<long long>(params.channels),
            static_cast<long long>(params.pixels), params.layout == Layout::kNHWC ? "NHWC" : "NCHW",
            cold ? "cold" : "warm", static_cast<int>(plan.shape), plan.vector,
            static_cast<int>(plan.stage), plan.bundleChannels, plan.tiles, plan.threads,
            plan.packs, plan.sharedPacks, static_cast<long long>(plan.units),
            static_cast<long long>(plan.unitsPerLaunch), static_cast<long long>(plan.chunk), plan.rows,
            static_cast<long long>(plan.sharedBytes), plan.cost, time.median, time.least);
    }
}

void writePlans(char const* path, cudaDeviceProp const& device, cudaStream_t stream) {
    std::FILE* const file = std::fopen(path, "w");
    if (file == nullptr) {
        std::fprintf(stderr, "kernel_check: cannot write %s\n", path);
        std::exit(2);
    }
    std::fprintf(file, "batch,channels,pixels,layout,cache,shape,vector,stage,bundle,tiles,threads,packs,shared_packs,units,"
                       "units_per_launch,chunk,rows,shared_bytes,estimate_us,median_us,least_us\n");
    for (Shape3 const& shape : kSd15) {
        for (Layout layout : {Layout::kNCHW, Layout::kNHWC}) {
            timePlans(sd15Params(shape, layout), device, stream, file);
        }
    }
    std::fclose(file);
}

}  // namespace

int main(int argc, char** argv) {
    int cases = 400;
    uint64_t seed = 1;
    bool timing = true;
    char const* plans = nullptr;
    for (int i = 1; i < argc; ++i) {
        bool const hasNext = i + 1 < argc;
        if (std::strcmp(argv[i], "--cases") == 0 && hasNext) {
            cases = std::max(0, std::atoi(argv[++i]));
        } else if (std::strcmp(argv[i], "--seed") == 0 && hasNext) {
            seed = std::strtoull(argv[++i], nullptr, 10);
        } else if (std::strcmp(argv[i], "--no-timing") == 0) {
            timing = false;
        } else if (std::strcmp(argv[i], "--plans") == 0 && hasNext) {
            plans = argv[++i];
        } else {
            std::fprintf(stderr, "usage: kernel_check [--cases N] [--seed S] [--no-timing | --plans FILE]\n");
            return 2;
        }
    }
    int index = 0;
    cudaDeviceProp device{};
    cudaStream_t stream = nullptr;
    check(cudaGetDevice(&index), "device");
    check(cudaGetDeviceProperties(&device, index), "device");
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    std::printf("%s, compute capability %d.%d, %d SMs, CUDA %d\n", device.name, device.major, device.minor,
        device.multiProcessorCount, CUDART_VERSION);
    int const failures = checkRefusals(stream) + checkCases(cases, seed, stream);
    if (failures == 0 && plans != nullptr) {
        writePlans(plans, device, stream);
    } else if (failures == 0 && timing) {
        timeAll(device, stream);
    }
    check(cudaStreamDestroy(stream), "stream");
    return failures == 0 ? 0 : 1;
}
