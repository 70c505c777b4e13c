// A stand-in for GPUs: runs a kernel's text on the host, every thread of it on a stack of its own.
//
// Threads take turns and change at barriers only, in a random order that differs from launch to launch. Blocks that can
// meet (of a cluster, of a cooperative launch) run together, others one by one in a random order. Shared memory begins
// as NaN, and asynchronous copies to it end when they are waited for. What a GPU would answer with a hang, an error or
// silent damage fails the launch: barriers that not all threads reach, a peer's shared memory before it began or after
// it ended, writes past a block's shared memory, device memory that is touched before the launch ahead has ended, and,
// compiled with -fsanitize=alignment -fsanitize-undefined-trap-on-error, accesses that are not aligned.
//
// What it cannot show: races between two accesses without a barrier beside them, and the memory order of a real GPU.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace emulation {

struct Device {
    char const* name;
    int processors;
    int sharedPerBlock;  // the most that a kernel may ask for
    int major;           // of the compute capability
    bool cooperative;    // launches
    int ptxVersion;      // that the kernels were compiled for
    int driverVersion;
};

// Device memory, which no thread of an overlapping launch may touch before it has waited for what stands ahead.
void* allocate(size_t size);
void release(void* memory);

// All GPUs of this machine; cudaSetDevice takes an index of them.
std::vector<Device> const& devices();

struct Launch {
    dim3 grid;
    dim3 block;
    size_t dynamicShared{0};
    unsigned cluster{1};        // blocks
    bool cooperative{false};
    bool overlap{false};  // began before the launch ahead of it ended
    std::function<void()> thread;  // what each thread does
};

// Runs a launch to its end; false where it fails, with the reason in `failure`.
bool run(Launch const& launch, std::string& failure);

// The order of threads is random from this seed on.
void seedOrder(uint64_t seed);

// What follows is for the running thread.

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

constexpr size_t kStaticShared = 1024;  // bytes of a block, which the planner leaves free of a device's most

unsigned char* dynamicShared();
// The static array of this name, as CUDA's __shared__ declares it.
void* staticShared(char const* name, size_t size);
// The same place in the shared memory of the cluster's block `rank`.
void* peerShared(void* local, size_t size, unsigned rank);

void blockBarrier();
void gridBarrier();
void waitForPrevious();
void copyAsync(void* shared, void const* global);
void waitForCopies();
void clusterArrive();
void clusterWait();
[[noreturn]] void fail(char const* reason);  // ends the launch
// The value that this warp's lane `lane` gives; all lanes call it together.
float shuffle(float value, unsigned lane);
unsigned laneIndex();

}  // namespace emulation
