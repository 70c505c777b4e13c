#include "machine.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstring>
#include <map>
#include <memory>
#include <random>

namespace emulation {

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 * 1024;  // bytes; a kernel's frame takes a few KiB
constexpr size_t kGuard = 1024;      // bytes after shared memory that nobody may write
constexpr size_t kStackGuard = 16;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type

struct Fiber;

struct Copy {
    void* to;
    void const* from;
};

struct Barrier {
    char const* name{""};
    unsigned expected{0};
    unsigned arrived{0};
    unsigned round{0};  // how often all have arrived
    std::vector<Fiber*> waiting;
};

struct Warp {
    Barrier barrier;
    // Two in turn: one that all have filled may still be read while the next is being filled.
    std::array<std::array<float, kWarp>, 2> values;
};

struct Block {
    std::vector<unsigned char> shared;  // static, dynamic, guard
    Barrier barrier;
    std::vector<Warp> warps;
    unsigned begun{0};  // threads
    unsigned ended{0};
};

// One thread of a launch, and the stack that it runs on.
struct Fiber {
    std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
    ucontext_t start;
    jmp_buf place;  // where it goes on
    bool isStarted{false};
    uint3 thread;
    uint3 block;
    unsigned rank;  // of its block among those that run together
    unsigned lane;
    unsigned shuffles;
    Barrier const* waitsAt;
    bool arrived;  // at the cluster's barrier, and has not waited yet
    unsigned arrivalRound;
    bool hasWaited;  // for the launch ahead
    std::vector<Copy> copies;  // asked for and not ended
};

// The state of the launch that runs. There is one at a time.
Launch const* launch = nullptr;
std::vector<Block> together;
Barrier grid;
std::vector<Barrier> clusters;
struct StaticArray {
    char const* name;
    size_t offset;
};
std::vector<StaticArray> statics;
size_t staticsEnd = 0;

std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch: their stacks are costly to make
std::vector<Fiber*> ready;
Fiber* current = nullptr;
size_t unfinished = 0;
jmp_buf scheduler;
std::string failed;
std::mt19937_64 order(1);

std::map<void*, size_t> memory;  // of the device
bool isLocked = false;

// Every access to device memory is a fault while it is locked.
void lockMemory(bool locked) {
    for (auto const& [start, size] : memory) {
        mprotect(start, size, locked ? PROT_NONE : PROT_READ | PROT_WRITE);
    }
    isLocked = locked;
}

unsigned below(size_t count) { return static_cast<unsigned>(order() % count); }

// Contexts of ucontext.h begin a stack, and _longjmp changes to it from then on: swapcontext would call the kernel each
// time, for the signal mask. Nothing that these jumps pass over has a destructor.
__attribute__((noinline)) void leave() {
    if (_setjmp(current->place) == 0) {
        _longjmp(scheduler, 1);
    }
}

__attribute__((noinline)) void resume(Fiber& fiber) {
    current = &fiber;
    threadIdx = fiber.thread;
    blockIdx = fiber.block;
    if (_setjmp(scheduler) != 0) {
        return;
    }
    if (fiber.isStarted) {
        _longjmp(fiber.place, 1);
    }
    fiber.isStarted = true;
    setcontext(&fiber.start);
}

}  // namespace

void fail(char const* reason) {
    failed = reason;
    _longjmp(scheduler, 1);
}

namespace {

[[noreturn]] void failBySignal(int signal) {
    fail(signal == SIGILL ? "an access that is not aligned"
            : isLocked    ? "an access to device memory before the launch ahead has ended"
                          : "an access outside all memory");
}

// What a GPU answers with an error ends the launch, too. The compiler lets a thread trap at an unaligned access.
void catchSignals() {
    static bool isDone = false;
    if (!isDone) {
        struct sigaction action {};
        action.sa_handler = failBySignal;
        action.sa_flags = SA_NODEFER;  // the handler never returns
        for (int const signal : {SIGILL, SIGSEGV, SIGBUS}) {
            sigaction(signal, &action, nullptr);
        }
        isDone = true;
    }
}

Block& ownBlock() { return together[current->rank]; }

// What a fiber does: one thread of a launch after the other.
void threadLoop() {
    for (;;) {
        ++ownBlock().begun;
        launch->thread();
        if (current->arrived) {
            fail("a thread ended between its arrival at the cluster's barrier and its wait");
        }
        if (launch->overlap && !current->hasWaited) {
            fail("a thread of an overlapping launch ended and never waited for the launch ahead");
        }
        ++ownBlock().ended;
        --unfinished;
        leave();
    }
}

Fiber& fiberAt(size_t index) {
    while (fibers.size() <= index) {
        fibers.push_back(std::make_unique<Fiber>());
        Fiber& fiber = *fibers.back();
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = kStack;
        fiber.start.uc_link = nullptr;
        std::memset(fiber.stack.get(), kPoison, kStackGuard);  // the end that the stack grows towards
        makecontext(&fiber.start, threadLoop, 0);
    }
    return *fibers[index];
}

Barrier makeBarrier(char const* name, unsigned expected) {
    Barrier barrier;
    barrier.name = name;
    barrier.expected = expected;
    return barrier;
}

// Counts an arrival; the last one lets all go on.
unsigned arrive(Barrier& barrier) {
    unsigned const round = barrier.round;
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        ++barrier.round;
        ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
        barrier.waiting.clear();
    }
    return round;
}

void wait(Barrier& barrier, unsigned round) {
    if (barrier.round == round) {
        barrier.waiting.push_back(current);
        current->waitsAt = &barrier;
        leave();
    }
}

void prepareBlocks(unsigned count, unsigned threads) {
    together.resize(count);
    for (Block& block : together) {
        block.shared.assign(kStaticShared + launch->dynamicShared + kGuard, kPoison);
        block.barrier = makeBarrier("the block's barrier", threads);
        block.warps.resize((threads + kWarp - 1) / kWarp);
        for (size_t i = 0; i < block.warps.size(); ++i) {
            unsigned const lanes = std::min<unsigned>(kWarp, threads - static_cast<unsigned>(i) * kWarp);
            block.warps[i].barrier = makeBarrier("a shuffle", lanes);
        }
        block.begun = block.ended = 0;
    }
    grid = makeBarrier("the grid's barrier", count * threads);
    clusters.assign(count / launch->cluster, makeBarrier("the cluster's barrier", launch->cluster * threads));
}

void prepareFibers(unsigned firstBlock, unsigned count, unsigned threads) {
    ready.clear();
    for (unsigned i = 0; i < count * threads; ++i) {
        Fiber& fiber = fiberAt(i);
        fiber.rank = i / threads;
        fiber.thread = make_uint3(i % threads, 0, 0);
        fiber.block = make_uint3(firstBlock + fiber.rank, 0, 0);
        fiber.lane = i % threads % kWarp;
        fiber.shuffles = 0;
        fiber.waitsAt = nullptr;
        fiber.arrived = false;
        fiber.hasWaited = false;
        fiber.copies.clear();
        ready.push_back(&fiber);
    }
    std::shuffle(ready.begin(), ready.end(), order);
    unfinished = ready.size();
}

// Which of `count` threads did not come where others wait.
std::string describeHang(unsigned count) {
    for (unsigned i = 0; i < count; ++i) {
        if (fibers[i]->waitsAt != nullptr) {
            return "hangs: block " + std::to_string(fibers[i]->block.x) + ", thread " +
                std::to_string(fibers[i]->thread.x) + " waits at " + fibers[i]->waitsAt->name + ", where " +
                std::to_string(fibers[i]->waitsAt->arrived) + " of " + std::to_string(fibers[i]->waitsAt->expected) +
                " threads came";
        }
    }
    return "hangs";
}

bool guardsHold(unsigned threadCount) {
    auto const isPoison = [](unsigned char byte) { return byte == kPoison; };
    return std::all_of(together.begin(), together.end(),
               [&](Block const& block) {
                   return std::all_of(block.shared.end() - kGuard, block.shared.end(), isPoison);
               }) &&
        std::all_of(fibers.begin(), fibers.begin() + threadCount,
            [&](auto const& fiber) { return std::all_of(&fiber->stack[0], &fiber->stack[kStackGuard], isPoison); });
}

// Runs `count` blocks that may meet.
bool runTogether(unsigned firstBlock, unsigned count) {
    unsigned const threads = launch->block.x;
    prepareBlocks(count, threads);
    prepareFibers(firstBlock, count, threads);
    // Either whoever could go on last, so that a few threads get far ahead of the others, or anyone.
    bool const isDepthFirst = below(2) == 0;
    while (!ready.empty() && failed.empty()) {
        if (!isDepthFirst) {
            std::swap(ready[below(ready.size())], ready.back());
        }
        Fiber& next = *ready.back();
        ready.pop_back();
        next.waitsAt = nullptr;
        resume(next);
    }
    if (failed.empty() && unfinished > 0) {
        failed = describeHang(count * threads);
    } else if (failed.empty() && !guardsHold(count * threads)) {
        failed = "wrote past a block's shared memory, or outgrew its stack";
    }
    return failed.empty();
}

}  // namespace

std::vector<Device> const& devices() {
    // Few SMs, so that the cooperative launches stay small, and each thing that the planner asks for once absent.
    static std::vector<Device> const all{
        {"sm_90", 5, 232448, 9, true, 90, 12040},
        {"sm_80", 8, 166912, 8, true, 80, 12040},
        {"sm_90 without cooperative launches", 132, 232448, 9, false, 90, 13000},
        {"sm_89 with one SM", 1, 101376, 8, true, 89, 12000},
        {"sm_90 from PTX of sm_80, little shared memory", 16, 49152, 9, false, 80, 12040},
        {"sm_90 of an old driver", 5, 232448, 9, true, 90, 12020},
    };
    return all;
}

void* allocate(size_t size) {
    void* const start = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) {
        return nullptr;
    }
    memory[start] = size;
    return start;
}

void release(void* start) {
    auto const found = memory.find(start);
    if (found != memory.end()) {
        munmap(start, found->second);
        memory.erase(found);
    }
}

void seedOrder(uint64_t seed) { order.seed(seed); }

bool run(Launch const& work, std::string& failure) {
    catchSignals();
    launch = &work;
    blockDim = work.block;
    gridDim = work.grid;
    statics.clear();
    staticsEnd = 0;
    failed.clear();
    lockMemory(work.overlap);
    unsigned const count = work.cooperative ? work.grid.x : work.cluster;
    std::vector<unsigned> first;
    for (unsigned block = 0; block < work.grid.x; block += count) {
        first.push_back(block);
    }
    std::shuffle(first.begin(), first.end(), order);
    bool const right =
        std::all_of(first.begin(), first.end(), [&](unsigned block) { return runTogether(block, count); });
    failure = failed;
    lockMemory(false);
    if (!right) {
        fibers.clear();  // they stand in the middle of a thread
    }
    return right;
}

unsigned char* dynamicShared() { return ownBlock().shared.data() + kStaticShared; }

void* staticShared(char const* name, size_t size) {
    auto const isNamed = [&](StaticArray const& array) { return std::strcmp(array.name, name) == 0; };
    auto const found = std::find_if(statics.begin(), statics.end(), isNamed);
    if (found != statics.end()) {
        return ownBlock().shared.data() + found->offset;
    }
    size_t const offset = staticsEnd;
    staticsEnd += (size + 15) / 16 * 16;
    if (staticsEnd > kStaticShared) {
        fail("too much static shared memory");
    }
    statics.push_back({name, offset});
    return ownBlock().shared.data() + offset;
}

void* peerShared(void* local, size_t size, unsigned rank) {
    size_t const offset = static_cast<size_t>(static_cast<unsigned char*>(local) - ownBlock().shared.data());
    unsigned const first = current->rank / launch->cluster * launch->cluster;
    if (rank >= launch->cluster || offset + size > kStaticShared + launch->dynamicShared) {
        fail("an address of a peer's shared memory that is none");
    }
    Block& peer = together[first + rank];
    if (peer.begun == 0) {
        fail("uses a peer's shared memory before the peer began");
    }
    if (peer.ended == launch->block.x) {
        fail("uses a peer's shared memory after the peer ended");
    }
    return peer.shared.data() + offset;
}

void blockBarrier() { wait(ownBlock().barrier, arrive(ownBlock().barrier)); }

void gridBarrier() {
    if (!launch->cooperative) {
        fail("a barrier of the grid in a launch that is not cooperative");
    }
    wait(grid, arrive(grid));
}

void waitForPrevious() {
    current->hasWaited = true;
    if (isLocked) {  // of this launch's threads, the first to wait
        lockMemory(false);
    }
}

void copyAsync(void* shared, void const* global) { current->copies.push_back({shared, global}); }

void waitForCopies() {
    for (Copy const& copy : current->copies) {
        *static_cast<uint4*>(copy.to) = *static_cast<uint4 const*>(copy.from);
    }
    current->copies.clear();
}

void clusterArrive() {
    if (current->arrived) {
        fail("two arrivals at the cluster's barrier without a wait between them");
    }
    current->arrived = true;
    current->arrivalRound = arrive(clusters[current->rank / launch->cluster]);
}

void clusterWait() {
    if (!current->arrived) {
        fail("a wait at the cluster's barrier without an arrival");
    }
    current->arrived = false;
    wait(clusters[current->rank / launch->cluster], current->arrivalRound);
}

float shuffle(float value, unsigned lane) {
    Warp& warp = ownBlock().warps[current->thread.x / kWarp];
    std::array<float, kWarp>& values = warp.values[current->shuffles++ % 2];
    if (lane >= warp.barrier.expected) {
        fail("a shuffle from a lane that is not there");
    }
    values[current->lane] = value;
    wait(warp.barrier, arrive(warp.barrier));
    return values[lane];
}

unsigned laneIndex() { return current->lane; }

}  // namespace emulation
