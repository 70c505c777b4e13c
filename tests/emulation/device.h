// Takes the place of plugins/group_norm_device.cuh where the kernels run on the emulated machine: the same functions,
// and CUDA's words that a host compiler does not know.
#pragma once

#define CANNY2IMAGE_GROUP_NORM_DEVICE

// CUDA's headers leave these words alone where they are there.
#define __device__
#define __global__
#define __shared__

#include "machine.h"

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstring>

#undef __forceinline__
#define __forceinline__ inline
#undef __launch_bounds__
#define __launch_bounds__(...)

#define CANNY2IMAGE_SHARED(type, name, count) \
    type* const name = static_cast<type*>(emulation::staticShared(#name, sizeof(type) * (count)))

namespace canny2image {

using emulation::blockDim;
using emulation::blockIdx;
using emulation::clusterArrive;
using emulation::clusterWait;
using emulation::gridDim;
using emulation::threadIdx;

constexpr int kWarp = 32;

inline unsigned char* sharedMemory() { return emulation::dynamicShared(); }

inline void blockSync() { emulation::blockBarrier(); }

inline void gridSync() { emulation::gridBarrier(); }

template <int Width>
float shuffleFrom(float value, int lane) {
    return emulation::shuffle(value, emulation::laneIndex() / Width * Width + static_cast<unsigned>(lane));
}

inline float shuffleXor(float value, int mask) {
    return emulation::shuffle(value, emulation::laneIndex() ^ static_cast<unsigned>(mask));
}

template <typename T>
void storePeer(T* local, unsigned rank, T const& value) {
    *static_cast<T*>(emulation::peerShared(local, sizeof(T), rank)) = value;
}

inline float loadShared(float const* place) { return *place; }

inline float exp2Fast(float x) { return std::exp2(x); }

inline float reciprocalFast(float x) { return 1.0F / x; }

inline float reciprocalRoot(float x) { return 1.0F / std::sqrt(x); }

inline unsigned multiplyHigh(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

inline float floatOfBits(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}

inline unsigned bitsOfFloat(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}

}  // namespace canny2image
