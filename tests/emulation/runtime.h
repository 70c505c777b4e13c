// The CUDA runtime of the emulated machine: the functions that the GroupNorm launches and kernel_cases.h call.
#pragma once

#include "machine.h"

#include <cuda_runtime_api.h>

namespace emulation {

Device const& currentDevice();

// Checks a launch as CUDA does and runs it, or keeps it for the graph that is being captured.
cudaError_t enqueue(void const* kernel, Launch const& launch, cudaStream_t stream);

bool wasLaunched(void const* kernel);

// Of the kernels that a plan can lead to, how many were launched so far, and how many there are.
struct Coverage {
    size_t launched;
    size_t all;
};
Coverage coverage();

}  // namespace emulation
