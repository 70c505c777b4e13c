// What the GroupNorm kernels ask of the machine: barriers, shuffles, shared memory, fast arithmetic.
//
// Everything that only a GPU can do stands here, so that the kernels' own text is index arithmetic and sums: with these
// functions replaced, the same text runs on a host, thread by thread. tests/emulation/device.h does so; it defines the
// name below first, and takes this file's place.
#ifndef CANNY2IMAGE_GROUP_NORM_DEVICE
#define CANNY2IMAGE_GROUP_NORM_DEVICE

#include <cooperative_groups.h>

// Declares an array in the static shared memory of a block.
#define CANNY2IMAGE_SHARED(type, name, count) __shared__ type name[count]

namespace canny2image {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffU;

__device__ __forceinline__ unsigned char* sharedMemory() {
    extern __shared__ __align__(16) unsigned char bytes[];
    return bytes;
}

__device__ __forceinline__ void blockSync() { __syncthreads(); }

// Of the `Width` neighbouring lanes, the value of the one at `lane`.
template <int Width>
__device__ __forceinline__ float shuffleFrom(float value, int lane) {
    return __shfl_sync(kAllLanes, value, lane, Width);
}

__device__ __forceinline__ float shuffleXor(float value, int mask) { return __shfl_xor_sync(kAllLanes, value, mask); }

// The barrier of a cluster, in two halves: what a thread wrote before its arrival, all see after their wait. Every
// thread of the cluster does both. Devices before sm_90 have no clusters and are given none.
__device__ __forceinline__ void clusterArrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ __forceinline__ void clusterWait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Writes to the same place of shared memory in the cluster's block `rank`.
template <typename T>
__device__ __forceinline__ void storePeer(T* local, unsigned rank, T const& value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    *cooperative_groups::this_cluster().map_shared_rank(local, rank) = value;
#else
    (void)rank;
    *local = value;
#endif
}

// The barrier of a whole cooperative launch.
__device__ __forceinline__ void gridSync() { cooperative_groups::this_grid().sync(); }

// A value that another block of this launch may have written: not from this SM's first-level cache.
__device__ __forceinline__ float loadShared(float const* place) { return __ldcg(place); }

__device__ __forceinline__ float exp2Fast(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ float reciprocalFast(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ float reciprocalRoot(float x) { return rsqrtf(x); }

__device__ __forceinline__ unsigned multiplyHigh(unsigned a, unsigned b) { return __umulhi(a, b); }

__device__ __forceinline__ float floatOfBits(unsigned bits) { return __uint_as_float(bits); }

__device__ __forceinline__ unsigned bitsOfFloat(float x) { return __float_as_uint(x); }

}  // namespace canny2image

#endif
