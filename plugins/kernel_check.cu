// Checks the GroupNorm kernels on the machine's GPU against sums in double precision on the host, and times them.
//
//   nvcc -std=c++17 -O3 -arch=native plugins/kernel_check.cu plugins/group_norm_kernels.cu -o kernel_check
//   ./kernel_check [--cases N] [--seed S] [--no-timing | --plans FILE]
//
// Exit status 0 where all is well, 1 where a check fails, 2 where CUDA does. For compute-sanitizer use few cases and
// --no-timing. --plans times every plan that could run each norm of sd15, not the one taken only, and writes them
// to a file of comma-separated values, to which tools/fit_group_norm_plan.py fits the estimates of
// group_norm_plan.h. Plans whose launches overlap are timed both ways.
#include "group_norm.h"
#include "group_norm_plan.h"
#include "kernel_cases.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace {

using namespace canny2image;
using namespace canny2image::cases;

int checkCases(int count, uint64_t seed, cudaStream_t stream) {
    constexpr int64_t kMostElements = 4000000;
    Random random(seed);
    std::vector<Case> cases;
    for (GroupNormParams const& params : allSd15Params()) {
        cases.emplace_back();
        cases.back().params = params;
    }
    cases.resize(std::min<size_t>(cases.size(), static_cast<size_t>(count)));
    while (cases.size() < static_cast<size_t>(count)) {
        cases.push_back(randomCase(random, kMostElements));
    }
    int failures = 0;
    for (Case const& c : cases) {
        double worst = 0.0;
        CaseRun const prepared(c, random);
        std::vector<Plan> const plans = prepared.plans();
        for (Plan const* const plan : {static_cast<Plan const*>(nullptr), &plans[random() % plans.size()]}) {
            std::string const fault = prepared.run(stream, plan, worst);
            std::string const path = plan == nullptr ? prepared.path() : describePlan(*plan);
            failures += fault.empty() ? 0 : 1;
            std::printf("%-4s %6.3f of bound  %s | %s%s%s\n", fault.empty() ? "ok" : "FAIL", worst, nameCase(c).c_str(),
                path.c_str(), fault.empty() ? "" : ": ", fault.c_str());
        }
    }
    std::printf("%zu cases by two plans each, %d failed\n", cases.size(), failures);
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
Timing timeGraph(cudaStream_t stream, int calls, Record record, int repeats) {
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

// One norm to be timed: its memory, and how many launches make a graph.
struct Bench {
    Bench(GroupNormParams const& norm, bool cold, cudaDeviceProp const& device, size_t fewestCalls)
        : params(norm), size(elementsOf(norm) * sizeOf(norm.dataType)),
          buffers(size, cold, static_cast<size_t>(device.l2CacheSize)),
          parameters(parametersOf(norm) * sizeOf(norm.parameterType)),
          workspace(groupNormWorkspaceSize(norm)) {
        // Whole rounds over the buffers, so that none is still in the cache when its turn comes again.
        size_t const pairs = buffers.memory.size() / 2;
        calls = (fewestCalls + pairs - 1) / pairs * pairs;
        parameters.fill(0x3c);
        check(cudaDeviceSynchronize(), "buffers");
        params.gamma = params.beta = parameters.data();
        params.x = buffers.x(0);
        params.y = buffers.y(0);
    }

    // `launch(stream)` enqueues one call on `params`, whose x and y are each pair of buffers in turn.
    template <typename Launch>
    Timing time(cudaStream_t stream, int repeats, Launch launch) {
        return timeGraph(
            stream, static_cast<int>(calls),
            [&](cudaStream_t on) {
                for (size_t i = 0; i < calls; ++i) {
                    params.x = buffers.x(i);
                    params.y = buffers.y(i);
                    check(launch(on), "launch");
                }
            },
            repeats);
    }

    GroupNormParams params;
    size_t size;
    Buffers buffers;
    Memory parameters;
    Memory workspace;
    size_t calls{0};
};

void timeShape(GroupNormParams const& norm, bool cold, cudaDeviceProp const& device, cudaStream_t stream) {
    constexpr int kRepeats = 30;
    Bench bench(norm, cold, device, 40);
    GroupNormParams const& params = bench.params;
    size_t const size = bench.size;
    Timing const ours = bench.time(stream, kRepeats, [&](cudaStream_t on) {
        return launchGroupNorm(params, bench.workspace.data(), bench.workspace.size(), on);
    });
    DeviceFacts facts;
    check(deviceFacts(facts), "device");
    Plan apart = planGroupNorm(params, allowsVectors(params), facts);
    apart.overlap = false;
    Timing const waiting = bench.time(
        stream, kRepeats, [&](cudaStream_t on) { return launchPlan(params, apart, bench.workspace.data(), on); });
    unsigned const packs = static_cast<unsigned>(size / 16);
    unsigned const blocks = std::min((packs + 255) / 256, 8U * static_cast<unsigned>(device.multiProcessorCount));
    Timing const copy = bench.time(stream, kRepeats, [&](cudaStream_t on) {
        copyKernel<<<blocks, 256, 0, on>>>(static_cast<uint4 const*>(params.x), static_cast<uint4*>(params.y), packs);
        return cudaGetLastError();
    });
    std::printf(
        "| %lld x %lld x %lld | %s | %s | %.2f | %.2f (%.2f to %.2f) | %.2f (%.2f to %.2f) | %.2f (%.2f to %.2f) | "
        "%.2f | %.0f | %s |\n",
        static_cast<long long>(params.batch), static_cast<long long>(params.channels),
        static_cast<long long>(params.pixels), params.layout == Layout::kNHWC ? "NHWC" : "NCHW", cold ? "cold" : "warm",
        static_cast<double>(size) / 0x1p20, ours.median, ours.least, ours.most, waiting.median, waiting.least,
        waiting.most, copy.median, copy.least, copy.most, copy.median / ours.median,
        2.0 * static_cast<double>(size) / ours.median / 1000.0, groupNormPath(params).c_str());
}

void timeAll(cudaDeviceProp const& device, cudaStream_t stream) {
    std::printf(
        "\nfp16 with SiLU; microseconds a launch in a graph of at least 40, median (least to most) of 30 graphs after "
        "3.\nwarm: the same input and output each time, from the L2 cache of %.0f MiB where both fit; cold: buffers of "
        "4 times that cache in turn.\napart: the same plan, no launch of which begins before the one ahead has "
        "ended, as no copy does.\n\n",
        device.l2CacheSize / 0x1p20);
    std::printf(
        "| N x C x pixels | layout | cache | MiB | norm us | apart us | copy us | copy / norm | norm GB/s | path |\n");
    std::printf("|---|---|---|---|---|---|---|---|---|---|\n");
    for (GroupNormParams const& params : allSd15Params()) {
        for (bool cold : {false, true}) {
            timeShape(params, cold, device, stream);
        }
    }
}

// The plan that the estimates choose, without overlap too, and the fastest.
void printChoice(GroupNormParams const& params, std::vector<Plan> const& plans, std::vector<double> const& times) {
    size_t chosen = plans.size();
    size_t apart = plans.size();
    for (size_t i = 0; i < plans.size(); ++i) {
        bool const overlaps = plans[i].overlap || plans[i].stage == Stage::kGrid;
        size_t& best = overlaps ? chosen : apart;
        if (best == plans.size() || plans[i].cost < plans[best].cost) {
            best = i;
        }
    }
    chosen = chosen == plans.size() ? apart : chosen;
    size_t const fastest = static_cast<size_t>(std::min_element(times.begin(), times.end()) - times.begin());
    std::printf("%lld x %lld x %lld %s: chosen %.2f us (", static_cast<long long>(params.batch),
        static_cast<long long>(params.channels), static_cast<long long>(params.pixels),
        params.layout == Layout::kNHWC ? "NHWC" : "NCHW", times[chosen]);
    if (apart < plans.size() && plans[chosen].overlap) {
        std::printf("%.2f apart, ", times[apart]);
    }
    std::printf("%s), fastest %.2f us (%s%s)\n", describePlan(plans[chosen]).c_str(), times[fastest],
        describePlan(plans[fastest]).c_str(), plans[fastest].overlap ? ", overlapping" : "");
}

void timePlans(GroupNormParams const& norm, cudaDeviceProp const& device, cudaStream_t stream, std::FILE* file) {
    bool const cold = 2 * elementsOf(norm) * sizeOf(norm.dataType) > static_cast<size_t>(device.l2CacheSize);
    Bench bench(norm, cold, device, 20);
    GroupNormParams const& params = bench.params;
    DeviceFacts facts;
    check(deviceFacts(facts), "device");
    std::vector<Plan> plans = allPlans(params);
    for (size_t i = plans.size(); i-- > 0;) {
        if (plans[i].overlap) {
            plans.push_back(plans[i]);
            plans.back().overlap = false;
        }
    }
    std::vector<double> times;
    for (Plan const& plan : plans) {
        Timing const time = bench.time(stream, 7, [&](cudaStream_t on) {
            return launchPlan(params, plan, bench.workspace.data(), on);
        });
        writePlan(file, params, cold, plan, facts, time.median, time.least);
        times.push_back(time.median);
    }
    printChoice(params, plans, times);
}

void writePlans(char const* path, cudaDeviceProp const& device, cudaStream_t stream) {
    std::FILE* const file = std::fopen(path, "w");
    if (file == nullptr) {
        std::fprintf(stderr, "kernel_check: cannot write %s\n", path);
        std::exit(2);
    }
    writePlanColumns(file);
    for (GroupNormParams const& params : allSd15Params()) {
        timePlans(params, device, stream, file);
    }
    std::fclose(file);
}

// The number of failures.
int checkAndTime(int cases, uint64_t seed, bool timing, char const* plans) {
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
    return failures;
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
    try {
        return checkAndTime(cases, seed, timing, plans) == 0 ? 0 : 1;
    } catch (CudaError const& error) {
        std::fprintf(stderr, "kernel_check: %s\n", error.what());
        return 2;
    }
}
