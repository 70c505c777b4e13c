// The kernels and launches of the GroupNorm plugin for the emulated machine, and what must know their types.
#include "device.h"  // first: in the place of group_norm_device.cuh
#include "runtime.h"

#include "../../plugins/group_norm_kernels.cu"

#include <set>

namespace {

using namespace canny2image;

void const* addressOf(Kernel kernel) { return reinterpret_cast<void const*>(kernel); }

template <typename T>
using PaddingKernel = void (*)(T*, int64_t, int64_t, int64_t);

// What a thread of the padding kernel does; nothing where `kernel` is not that of T.
template <typename T>
std::function<void()> paddingThread(void const* kernel, void** pointers) {
    PaddingKernel<T> const padding = paddingKernel<T>;
    if (kernel != reinterpret_cast<void const*>(padding)) {
        return nullptr;
    }
    return [padding, y = *static_cast<T**>(pointers[0]), pixels = *static_cast<int64_t*>(pointers[1]),
               channels = *static_cast<int64_t*>(pointers[2]), stride = *static_cast<int64_t*>(pointers[3])] {
        padding(y, pixels, channels, stride);
    };
}

// Every kernel that a plan can lead to.
std::set<void const*> allKernels() {
    std::set<void const*> all;
    for (DataType type : {DataType::kFloat, DataType::kHalf, DataType::kBFloat16}) {
        int const size = static_cast<int>(plan_detail::elementSize(type));
        for (int vector : {1, 2, 4, 8}) {
            for (int packs : {kFewPacks, kManyPacks, fewPacks(vector, size), manyPacks(vector, size)}) {
                for (Stage stage : {Stage::kHeld, Stage::kGrid, Stage::kPartial, Stage::kApply}) {
                    Plan plan;
                    plan.vector = vector;
                    plan.packs = packs;
                    for (Shape shape : {Shape::kRun, Shape::kColumns, Shape::kSlices}) {
                        plan.shape = shape;
                        bool const exists = shape != Shape::kSlices || (vector > 1 && vector * size <= 16);
                        if (exists) {
                            all.insert(addressOf(kernelFor(type, plan, stage)));
                        }
                    }
                }
            }
        }
    }
    return all;
}

}  // namespace

namespace emulation {

Coverage coverage() {
    std::set<void const*> const all = allKernels();
    size_t launched = 0;
    for (void const* kernel : all) {
        launched += wasLaunched(kernel) ? 1 : 0;
    }
    return {launched, all.size()};
}

}  // namespace emulation

extern "C" {

cudaError_t cudaLaunchKernelExC(cudaLaunchConfig_t const* config, void const* function, void** pointers) {
    emulation::Launch launch;
    launch.grid = config->gridDim;
    launch.block = config->blockDim;
    launch.dynamicShared = config->dynamicSmemBytes;
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        cudaLaunchAttribute const& attribute = config->attrs[i];
        if (attribute.id == cudaLaunchAttributeClusterDimension) {
            launch.cluster = attribute.val.clusterDim.x;
        } else if (attribute.id == cudaLaunchAttributeCooperative) {
            launch.cooperative = attribute.val.cooperative != 0;
        } else if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
            launch.overlap = attribute.val.programmaticStreamSerializationAllowed != 0;
        } else {
            return cudaErrorInvalidValue;
        }
    }
    Kernel const kernel = reinterpret_cast<Kernel>(const_cast<void*>(function));
    launch.thread = [kernel, arguments = *static_cast<Arguments const*>(pointers[0])] { kernel(arguments); };
    return emulation::enqueue(function, launch, config->stream);
}

cudaError_t cudaLaunchKernel(
    void const* function, dim3 grid, dim3 block, void** pointers, size_t shared, cudaStream_t stream) {
    emulation::Launch launch;
    launch.grid = grid;
    launch.block = block;
    launch.dynamicShared = shared;
    for (auto const make : {paddingThread<float>, paddingThread<__half>, paddingThread<__nv_bfloat16>}) {
        if (!launch.thread) {
            launch.thread = make(function, pointers);
        }
    }
    return launch.thread ? emulation::enqueue(function, launch, stream) : cudaErrorInvalidDeviceFunction;
}

}  // extern "C"
