#include "runtime.h"

#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

// What CUDA's opaque handles point to.
struct CUstream_st {
    CUgraph_st* capture{nullptr};
};
struct CUgraph_st {
    std::vector<emulation::Launch> launches;
};
struct CUgraphExec_st {
    std::vector<emulation::Launch> launches;
};

namespace emulation {
namespace {

constexpr unsigned kMostThreads = 512;          // what the kernels' launch bounds say
constexpr unsigned kMostCluster = 8;            // what every device with clusters runs
constexpr size_t kSharedUnasked = 48 * 1024;    // bytes that a kernel gets without asking for more

int deviceIndex = 0;
std::map<void const*, size_t> sharedAsked;  // by kernel
std::set<void const*> launched;
std::string lastFailure;

cudaError_t runNow(Launch const& launch) {
    return run(launch, lastFailure) ? cudaSuccess : cudaErrorLaunchFailure;
}

bool isAllowed(void const* kernel, Launch const& launch) {
    Device const& device = currentDevice();
    size_t const asked = sharedAsked.count(kernel) == 0 ? kSharedUnasked - kStaticShared : sharedAsked[kernel];
    bool const clustersFit = launch.cluster == 1 ||
        (device.major >= 9 && device.ptxVersion >= 90 && launch.cluster <= kMostCluster &&
            launch.grid.x % launch.cluster == 0);
    bool const cooperationFits =
        !launch.cooperative || (device.cooperative && launch.grid.x <= static_cast<unsigned>(device.processors));
    bool const overlapFits =
        !launch.overlap || (device.major >= 9 && device.driverVersion >= 12030 && !launch.cooperative);
    return overlapFits && launch.grid.x > 0 && launch.block.x > 0 && launch.block.x <= kMostThreads && clustersFit &&
        cooperationFits && launch.dynamicShared <= asked &&
        launch.dynamicShared + kStaticShared <= static_cast<size_t>(device.sharedPerBlock);
}

}  // namespace

Device const& currentDevice() { return devices()[static_cast<size_t>(deviceIndex)]; }

bool wasLaunched(void const* kernel) { return launched.count(kernel) > 0; }

cudaError_t enqueue(void const* kernel, Launch const& launch, cudaStream_t stream) {
    if (!isAllowed(kernel, launch)) {
        return cudaErrorInvalidConfiguration;
    }
    launched.insert(kernel);
    if (stream != nullptr && stream->capture != nullptr) {
        stream->capture->launches.push_back(launch);
        return cudaSuccess;
    }
    return runNow(launch);
}

}  // namespace emulation

using namespace emulation;

extern "C" {

cudaError_t cudaGetDevice(int* device) {
    *device = deviceIndex;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || static_cast<size_t>(device) >= devices().size()) {
        return cudaErrorInvalidDevice;
    }
    deviceIndex = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
    Device const& device = devices()[static_cast<size_t>(index)];
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = device.processors; return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device.sharedPerBlock; return cudaSuccess;
        case cudaDevAttrCooperativeLaunch: *value = device.cooperative ? 1 : 0; return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor: *value = device.major; return cudaSuccess;
        default: return cudaErrorInvalidValue;
    }
}

cudaError_t cudaDriverGetVersion(int* version) {
    *version = currentDevice().driverVersion;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void const*) {
    attributes->ptxVersion = currentDevice().ptxVersion;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(void const* kernel, cudaFuncAttribute attribute, int value) {
    bool const known = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value >= 0;
    if (!known || value + static_cast<int>(kStaticShared) > currentDevice().sharedPerBlock) {
        return cudaErrorInvalidValue;
    }
    sharedAsked[kernel] = static_cast<size_t>(value);
    return cudaSuccess;
}

char const* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorLaunchFailure ? lastFailure.c_str()
        : error == cudaErrorInvalidConfiguration ? "a launch that the device does not allow"
                                                 : "an error of the emulated runtime";
}

cudaError_t cudaMalloc(void** memory, size_t size) {
    *memory = emulation::allocate(size);
    return *memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
    emulation::release(memory);
    return cudaSuccess;
}

cudaError_t cudaMemset(void* memory, int value, size_t size) {
    std::memset(memory, value, size);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, void const* from, size_t size, cudaMemcpyKind) {
    std::memcpy(to, from, size);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = new CUstream_st;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    stream->capture = new CUgraph_st;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    *graph = stream->capture;
    stream->capture = nullptr;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* ready, cudaGraph_t graph, unsigned long long) {
    *ready = new CUgraphExec_st{graph->launches};
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
    for (Launch const& launch : graph->launches) {
        cudaError_t const error = runNow(launch);
        if (error != cudaSuccess) {
            return error;
        }
    }
    return cudaSuccess;
}

// Everything has run when the call that asked for it returns.
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return stream != nullptr && stream->capture != nullptr ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

}  // extern "C"
