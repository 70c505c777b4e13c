// What the GroupNorm kernels ask of the machine: barriers, shuffles, shared memory, fast arithmetic.
//
// Everything that only a GPU can do stands here, so that the kernels' own text is index arithmetic and sums: with these
// functions replaced, the same text runs on a host, thread by thread. tests/emulation/device.h does so; it defines the
// name below first, and takes this file's place.
#ifndef CANNY2IMAGE_GROUP_NORM_DEVICE
#define CANNY2IMAGE_GROUP_NORM_DEVICE

#include <cooperative_groups.h>
#include <cuda_runtime_api.h>

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

// How the blocks of a cluster send one another 16 bytes each. In every block all threads call `openMailbox`, which says
// how many bytes will come; `waitForMailboxes`, after which those of all peers are open; any of them `send`; and all
// call `receive`, after which everything has come. That is once a launch. A block that has received may end: nothing is
// on its way to it any more. Devices before sm_90 have no clusters and are given none.
//
// The stores count their own bytes at the receiver. A barrier of the cluster that also orders memory would do, as it
// does where the compiler does not know such stores, but waits for the whole GPU's memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
#define CANNY2IMAGE_COUNTED_STORES
#endif

struct alignas(8) Mailbox {
    unsigned long long barrier;
};

__device__ __forceinline__ unsigned sharedAddress(void const* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void openMailbox(Mailbox* box, unsigned bytes) {
#if defined(CANNY2IMAGE_COUNTED_STORES)
    if (threadIdx.x == 0) {
        unsigned const place = sharedAddress(box);
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(place) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(place), "r"(bytes) : "memory");
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
    (void)box;
    (void)bytes;
}

__device__ __forceinline__ void waitForMailboxes() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Writes to the same place of shared memory in the cluster's block `rank`, whose mailbox lies where `box` does.
__device__ __forceinline__ void send(Mailbox* box, float4* local, unsigned rank, float4 const& value) {
#if defined(CANNY2IMAGE_COUNTED_STORES)
    unsigned place;
    unsigned barrier;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(place) : "r"(sharedAddress(local)), "r"(rank));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier) : "r"(sharedAddress(box)), "r"(rank));
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(place),
        "r"(__float_as_uint(value.x)), "r"(__float_as_uint(value.y)), "r"(__float_as_uint(value.z)),
        "r"(__float_as_uint(value.w)), "r"(barrier)
        : "memory");
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    *cooperative_groups::this_cluster().map_shared_rank(local, rank) = value;
#else
    *local = value;
#endif
    (void)box;
    (void)rank;
}

__device__ __forceinline__ void receive(Mailbox* box) {
#if defined(CANNY2IMAGE_COUNTED_STORES)
    unsigned done = 0;
    while (done == 0) {
        asm volatile(
            "{\n"
            ".reg .pred ready;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 ready, [%1], 0;\n"
            "selp.u32 %0, 1, 0, ready;\n"
            "}"
            : "=r"(done)
            : "r"(sharedAddress(box))
            : "memory");
    }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
    (void)box;
}

// Where a launch was allowed to begin before the one ahead of it ended: all that stands ahead has now ended, and what
// it wrote can be seen. Nothing else may be read or written before. Elsewhere it returns at once.
__device__ __forceinline__ void waitForPrevious() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once all blocks of the launch have said so, the next one may begin, if it was launched to.
__device__ __forceinline__ void letNextBegin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Starts a copy of 16 bytes to shared memory, past the registers and the SM's first-level cache. Of the thread that
// asked for it, `waitForCopies` ends it.
__device__ __forceinline__ void copyAsync(void* shared, void const* global) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    unsigned const place = sharedAddress(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(__cvta_generic_to_global(global))
                 : "memory");
#else
    *static_cast<uint4*>(shared) = *static_cast<uint4 const*>(global);
#endif
}

__device__ __forceinline__ void waitForCopies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Neighbouring words to device memory by one access: of a copy of an array the compiler now and then makes an access a
// word. It does not know that these write: no thread reads the place again, nor one that another thread writes.
__device__ __forceinline__ void storeWords(void* global, unsigned const (&words)[4]) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3]));
}
__device__ __forceinline__ void storeWords(void* global, unsigned const (&words)[2]) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(global)), "r"(words[0]),
                 "r"(words[1]));
}
__device__ __forceinline__ void storeWords(void* global, unsigned const (&words)[1]) {
    *static_cast<unsigned*>(global) = words[0];
}

// Four words of shared memory that `copyAsync` wrote, by one access.
__device__ __forceinline__ void loadSharedWords(void const* shared, unsigned (&words)[4]) {
    unsigned const place = sharedAddress(shared);
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(place));
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

// The greater one; NaN where `x` is NaN.
__device__ __forceinline__ float atLeast(float x, float least) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(least));
    return result;
#else
    return x < least ? least : x;
#endif
}

// The smaller one; `most` where `x` is NaN.
__device__ __forceinline__ float atMost(float x, float most) { return fminf(x, most); }

__device__ __forceinline__ float reciprocalRoot(float x) { return rsqrtf(x); }

__device__ __forceinline__ unsigned multiplyHigh(unsigned a, unsigned b) { return __umulhi(a, b); }

__device__ __forceinline__ float floatOfBits(unsigned bits) { return __uint_as_float(bits); }

__device__ __forceinline__ unsigned bitsOfFloat(float x) { return __float_as_uint(x); }

}  // namespace canny2image

#endif
