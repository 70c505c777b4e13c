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
using emulation::copyAsync;
using emulation::gridDim;
using emulation::threadIdx;
using emulation::waitForCopies;
using emulation::waitForPrevious;

constexpr int kWarp = 32;

inline unsigned char* sharedMemory() { return emulation::dynamicShared(); }

inline void blockSync() { emulation::blockBarrier(); }

inline void letNextBegin() {}

template <int Words>
struct alignas(Words * sizeof(unsigned)) Access {
    unsigned words[Words];
};

template <int Words>
void storeWords(void* global, unsigned const (&words)[Words]) {
    std::memcpy(static_cast<Access<Words>*>(global)->words, words, sizeof(words));
}

inline void loadSharedWords(void const* shared, unsigned (&words)[4]) {
    std::memcpy(words, static_cast<Access<4> const*>(shared)->words, sizeof(words));
}

inline void gridSync() { emulation::gridBarrier(); }

template <int Width>
float shuffleFrom(float value, int lane) {
    return emulation::shuffle(value, emulation::laneIndex() / Width * Width + static_cast<unsigned>(lane));
}

inline float shuffleXor(float value, int mask) {
    return emulation::shuffle(value, emulation::laneIndex() ^ static_cast<unsigned>(mask));
}

// A mailbox by two barriers of the cluster, and a count of what comes.
struct Mailbox {
    unsigned expected;
    unsigned come;
};

inline void openMailbox(Mailbox* box, unsigned bytes) {
    if (threadIdx.x == 0) {
        *box = {bytes, 0};
    }
    emulation::clusterArrive();
}

inline void waitForMailboxes() { emulation::clusterWait(); }

inline void send(Mailbox* box, float4* local, unsigned rank, float4 const& value) {
    *static_cast<float4*>(emulation::peerShared(local, sizeof(value), rank)) = value;
    static_cast<Mailbox*>(emulation::peerShared(box, sizeof(*box), rank))->come += sizeof(value);
}

inline void receive(Mailbox* box) {
    emulation::clusterArrive();
    emulation::clusterWait();
    if (box->come != box->expected) {
        emulation::fail("hangs: other bytes come to a mailbox than it was opened for");
    }
}

inline float loadShared(float const* place) { return *place; }

inline float exp2Fast(float x) { return std::exp2(x); }

inline float reciprocalFast(float x) { return 1.0F / x; }

inline float atLeast(float x, float least) { return x < least ? least : x; }

inline float atMost(float x, float most) { return std::fmin(x, most); }

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
