// How one GroupNorm call is cut into blocks. Host arithmetic only: no CUDA call, so it can be tested anywhere.
#pragma once

#include "group_norm.h"

#include <cstdint>
#include <string>

namespace canny2image {

constexpr int kWarpThreads = 32;
constexpr int kMaxThreads = 512;
constexpr int kThreadChoices[] = {256, 512, 128};
constexpr int kPartialBlocks[] = {4, 2, 8};  // of each of two kernels, an SM: several hide each other's waits
constexpr int kMaxCluster = 8;     // the largest that every device with clusters runs
constexpr int kFewPacks = 4;       // packs that a thread holds in registers: small tiles, many blocks an SM
constexpr int kManyPacks = 12;     // large tiles: 96 KiB a block of 512, which leaves registers for the sums

// The same two for accesses of any width: of narrower ones a thread can hold more.
constexpr int fewPacks(int vector, int size) noexcept { return vector * size < 16 ? 2 * kFewPacks : kFewPacks; }
constexpr int manyPacks(int vector, int size) noexcept {
    return vector * size == 4 ? 2 * kManyPacks : vector * size == 8 ? 16 : kManyPacks;
}

constexpr int kMaxTiles = 256;     // partial moments of one group
constexpr int64_t kMaxPartials = 16384;  // partial moments of one call, where its groups are fewer
constexpr int64_t kSmallGroup = 2048;    // elements of a group that one block holds on every device
constexpr int kStagedChannels = 1024;  // channels a group whose gamma, beta and bias runs stage in shared memory

// Division of numbers below 2^31 by one fixed number, as a multiplication.
struct Divisor {
    uint32_t divisor{1};
    uint32_t multiplier{0};
    uint32_t shift{0};
};

inline Divisor makeDivisor(uint32_t divisor) noexcept {
    Divisor result;
    result.divisor = divisor;
    if (divisor > 1) {
        uint32_t bits = 0;  // of divisor - 1: the exponent of the next power of two
        while ((uint64_t{1} << bits) < divisor) {
            ++bits;
        }
        result.multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + bits)) + divisor - 1) / divisor);
        result.shift = bits - 1;
    }
    return result;
}

// How often memory is read, and who waits for whom between the statistics and the normalisation.
enum class Stage : int32_t {
    kHeld,     // a block or a cluster holds its groups on chip: memory is read once
    kGrid,     // all blocks of a cooperative launch hold theirs, and meet at a barrier of the grid: read once
    kPartial,  // first of two kernels: moments of each tile go to the workspace
    kApply,    // second: merges them, reads again, writes
};

// Which elements form a tile.
enum class Shape : int32_t {
    kRun,      // a stretch of one group's elements, taken as one sequence; any layout, any alignment
    kColumns,  // NHWC: some pixels by the channels of some whole groups; a thread keeps to its columns
    kSlices,   // NHWC: some pixels by the channels of one group, in accesses of 16 bytes or fewer
};

constexpr char kOverlapVariable[] = "CANNY2IMAGE_GROUP_NORM_OVERLAP";

// What the device offers.
struct DeviceFacts {
    int32_t processors{132};
    int32_t sharedPerBlock{49152};  // the most that a kernel may ask for
    bool clusters{false};
    bool cooperative{false};
    bool overlap{false};  // a launch may begin before the one ahead of it has ended
};

struct Plan {
    Shape shape{Shape::kRun};
    Stage stage{Stage::kHeld};  // kPartial stands for the pair of kernels
    int32_t vector{1};          // elements an access
    int32_t packs{kFewPacks};   // register packs a thread
    int32_t sharedPacks{0};     // packs a thread holds in shared memory beside them
    int32_t threads{32};
    int32_t tiles{1};           // blocks that share a unit: the cluster's size for kHeld
    int64_t units{0};           // (sample, group) or (sample, bundle of groups)
    int64_t unitsPerLaunch{0};  // kGrid: as many as are resident together
    int64_t chunk{0};           // kRun: packs a tile; else pixels a tile
    int32_t bundleChannels{0};  // else: channels a unit
    int32_t columns{0};         // else: packs of a unit's channels
    int32_t rows{0};            // else: pixels that the block takes at once
    int32_t itemWidth{0};       // else: neighbouring channels of a pack that share a group whatever the pack
    int64_t sharedBytes{0};
    bool overlap{false};        // its launches begin while the one ahead of each ends; not of kGrid
    double cost{0};             // estimated microseconds, to choose by
};

namespace plan_detail {

inline int64_t ceilDiv(int64_t a, int64_t b) noexcept { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) noexcept { return a < b ? a : b; }
inline int64_t roundUp(int64_t a, int64_t b) noexcept { return ceilDiv(a, b) * b; }
inline int64_t elementSize(DataType type) noexcept { return type == DataType::kFloat ? 4 : 2; }

// The estimates behind the choices, in microseconds: fitted to the times of every plan for the norms of sd15 in FP16 on
// one H200 (`kernel_check --plans`, `tools/fit_group_norm_plan.py`), where the plans chosen take 1 % longer than the
// fastest in the mean and 9 % at worst; for norms left out of the fit 3 % and 26 %. They rank plans, no more: as times
// they are 15 % off. Where blocks are more than fit at once, they come in waves.
struct HeldCost {
    double start;
    double cluster;        // of any size
    double clusterDouble;  // for each doubling above two blocks
    double kilobyte;       // of what one SM holds
    double step;           // of a thread: one pack
    double items;          // a round of merging items
    double threads;        // 256 of a block
    double rows;           // a thousand rows of neighbouring bytes on one SM
    double blocks;         // a block on one SM
};
struct PairCost {
    double start;
    double kilobyte;  // of all, shared among the SMs
    double rows;      // a thousand rows, likewise
    double held;      // kilobytes that one SM has in hand
    double step;
    double items;
    double merge;  // a round of merging tiles
    double threads;
};
struct GridCost {
    double start;
    double kilobyte;
    double items;
    double merge;
};
constexpr HeldCost kHeldRun{0.193, 0.545, 0.000, 0.035, 0.240, 0.000, 0.503, 0.000, 0.336};
constexpr HeldCost kHeldColumns{1.099, 0.455, 0.244, 0.014, 0.326, 0.000, 1.284, 0.311, 0.209};
constexpr HeldCost kHeldSlices{0.129, 0.608, 0.000, 0.005, 0.175, 0.000, 0.667, 1.529, 0.403};
constexpr PairCost kPairRun{3.311, 0.031, 0.000, 0.058, 0.028, 0.000, 0.675, 0.289};
constexpr PairCost kPairColumns{3.662, 0.090, 1.038, 0.027, 0.000, 0.025, 0.580, 0.548};
constexpr GridCost kGridRun{5.563, 0.058, 0.000, 0.216};
constexpr GridCost kGridColumns{2.484, 0.056, 0.673, 3.058};

// Lays a thread's packs, one a step, into registers and shared memory; false where they do not fit.
inline bool hold(Plan& plan, int64_t steps, int64_t otherShared, DeviceFacts const& facts) noexcept {
    plan.packs = steps <= kFewPacks ? kFewPacks : kManyPacks;
    plan.sharedPacks = static_cast<int32_t>(steps > kManyPacks ? steps - kManyPacks : 0);
    if (steps < 1 || steps > 4 * kManyPacks || (plan.vector == 1 && steps > kFewPacks)) {
        return false;
    }
    plan.sharedBytes = static_cast<int64_t>(plan.sharedPacks) * plan.threads * 16 + otherShared;
    return plan.sharedBytes <= facts.sharedPerBlock - 1024;
}

struct Sizes {
    int64_t groupChannels;
    int64_t element;    // bytes
    int64_t totalBytes;
    int32_t limit;      // of tiles
};

// What a plan asks of one SM.
struct Load {
    double waves{1.0};
    double blocks{1.0};  // at once
    double kilobytes;    // of these blocks
    double steps;        // of a thread
    double items{0.0};   // rounds of a warp over the items of its groups
    double merge;        // rounds of a warp over the tiles of its groups
    double threads;      // of a block, in units of 256
    double rows{0.0};    // thousands of rows of neighbouring bytes
};

inline Load loadOf(Plan const& plan, int64_t steps, Sizes const& sizes, DeviceFacts const& facts) noexcept {
    bool const many = plan.packs > fewPacks(plan.vector, static_cast<int>(sizes.element));
    int64_t const registers = plan.shape == Shape::kRun ? (many ? 96 : 48)  // of the FP16 kernels
        : plan.shape == Shape::kColumns ? (many ? 120 : 72)
                                        : (many ? 104 : 56);
    int64_t const byRegisters = 65536 / (registers * plan.threads);
    int64_t const byShared = facts.sharedPerBlock / (plan.sharedBytes + 2048);
    int64_t const resident = smaller(smaller(byRegisters < 1 ? 1 : byRegisters, byShared < 1 ? 1 : byShared), 32);
    // Clusters of four and eight leave some SMs of each processing cluster idle.
    bool const large = plan.stage == Stage::kHeld && plan.tiles > 2;
    int64_t const most = large ? facts.processors * 9 / 10 : facts.processors;
    int64_t const processors = most < 1 ? 1 : most;
    int64_t const blocks = plan.units * plan.tiles;
    int64_t const groups = plan.shape == Shape::kColumns ? plan.bundleChannels / sizes.groupChannels : 1;
    int64_t const rounds = ceilDiv(groups, plan.threads / kWarpThreads);
    int64_t const elements = plan.chunk * (plan.shape == Shape::kRun ? plan.vector : plan.bundleChannels);
    Load load;
    load.merge = static_cast<double>(ceilDiv(plan.tiles, kWarpThreads) * rounds);
    if (plan.stage == Stage::kGrid) {
        load.merge = static_cast<double>(plan.tiles * rounds) / kWarpThreads;
    } else {
        load.waves = static_cast<double>(ceilDiv(blocks, processors * resident));
        load.blocks = static_cast<double>(smaller(resident, ceilDiv(blocks, processors)));
    }
    load.kilobytes = load.blocks * static_cast<double>(elements * sizes.element) / 1000.0;
    load.steps = static_cast<double>(steps);
    if (plan.shape == Shape::kColumns) {
        int64_t const items = plan.rows * (sizes.groupChannels / plan.itemWidth);
        load.items = static_cast<double>(ceilDiv(items, kWarpThreads) * rounds);
    }
    load.threads = plan.threads / 256.0;
    if (plan.shape != Shape::kRun) {
        load.rows = load.blocks * static_cast<double>(plan.chunk) / 1000.0;
    }
    return load;
}

inline double heldCost(Plan const& plan, Load const& load) noexcept {
    HeldCost const& c = plan.shape == Shape::kRun ? kHeldRun : plan.shape == Shape::kColumns ? kHeldColumns : kHeldSlices;
    int const doubled = (plan.tiles > 2 ? 1 : 0) + (plan.tiles > 4 ? 1 : 0);
    return c.start + (plan.tiles > 1 ? c.cluster + doubled * c.clusterDouble : 0.0) +
        load.waves *
        (c.kilobyte * load.kilobytes + c.step * load.steps + c.items * load.items + c.threads * load.threads +
            c.rows * load.rows + c.blocks * load.blocks);
}

inline double pairCost(Plan const& plan, Load const& load, int64_t allBytes, DeviceFacts const& facts) noexcept {
    PairCost const& c = plan.shape == Shape::kRun ? kPairRun : kPairColumns;
    double const share = static_cast<double>(allBytes) / 1000.0 / facts.processors;
    double const rows = load.kilobytes > 0.0 ? share * load.rows / load.kilobytes : 0.0;
    return c.start + c.kilobyte * share + c.rows * rows +
        load.waves *
        (c.held * load.kilobytes + c.step * load.steps + c.items * load.items + c.merge * load.merge +
            c.threads * load.threads);
}

// Sizes the launches of a cooperative plan; false where too many would be needed.
inline bool gridLaunches(Plan& plan, DeviceFacts const& facts) noexcept {
    plan.unitsPerLaunch = facts.processors / plan.tiles;
    return plan.unitsPerLaunch > 0 && ceilDiv(plan.units, plan.unitsPerLaunch) <= 8;
}

inline double gridCost(Plan const& plan, Load const& load) noexcept {
    GridCost const& c = plan.shape == Shape::kRun ? kGridRun : kGridColumns;
    return static_cast<double>(ceilDiv(plan.units, plan.unitsPerLaunch)) *
        (c.start + c.kilobyte * load.kilobytes + c.items * load.items + c.merge * load.merge);
}

inline int32_t partialTiles(int64_t units, int64_t most, int64_t blocks, DeviceFacts const& facts) noexcept {
    int64_t const wanted = ceilDiv(blocks * facts.processors, units);
    return static_cast<int32_t>(wanted < most ? wanted : most);
}

template <typename Consider>
void considerRuns(GroupNormParams const& p, int32_t vector, Sizes const& sizes, DeviceFacts const& facts,
    Consider consider) {
    int64_t const run = sizes.groupChannels * p.pixels / vector;
    int64_t const stage = sizes.groupChannels <= kStagedChannels ? sizes.groupChannels * 16 : 0;
    Plan base;
    base.vector = vector;
    base.units = p.batch * p.groups;
    auto cut = [&](Plan& plan, int64_t tiles, int64_t threads) {
        plan.tiles = static_cast<int32_t>(tiles);
        plan.chunk = ceilDiv(run, tiles);
        plan.threads = static_cast<int32_t>(smaller(threads, roundUp(plan.chunk, kWarpThreads)));
        return ceilDiv(plan.chunk, plan.threads);
    };

    int64_t const widest = facts.clusters ? kMaxCluster : 1;
    for (int32_t threads : kThreadChoices) {
        for (int64_t tiles = 1; tiles <= widest && tiles <= run; tiles *= 2) {
            Plan plan = base;
            int64_t const steps = cut(plan, tiles, threads);
            if (hold(plan, steps, stage, facts)) {
                plan.cost = heldCost(plan, loadOf(plan, steps, sizes, facts));
                consider(plan);
            }
        }
    }
    if (facts.cooperative && vector > 1) {
        int64_t const most = smaller(smaller(sizes.limit, facts.processors), run);
        int64_t const inShared = (facts.sharedPerBlock - 1024 - stage) / (kMaxThreads * 16);
        int64_t const perBlock = kMaxThreads * (kManyPacks + inShared);
        int64_t const fewest = ceilDiv(run, perBlock);
        int64_t const even = facts.processors / base.units;
        Plan plan = base;
        plan.stage = Stage::kGrid;
        int64_t const tiles = smaller(most, even > fewest ? even : fewest);
        if (fewest <= most && hold(plan, cut(plan, tiles, kMaxThreads), stage, facts) && gridLaunches(plan, facts)) {
            plan.packs = kManyPacks;
            plan.cost = gridCost(plan, loadOf(plan, 0, sizes, facts));
            consider(plan);
        }
    }
    for (int32_t threads : kThreadChoices) {
        for (int32_t blocks : kPartialBlocks) {
            Plan plan = base;
            plan.stage = Stage::kPartial;
            int64_t const most = smaller(sizes.limit, ceilDiv(run, threads * kFewPacks));
            int64_t const steps = cut(plan, partialTiles(base.units, most, blocks, facts), threads);
            plan.packs = kFewPacks;
            plan.sharedBytes = stage;
            plan.cost = pairCost(plan, loadOf(plan, steps, sizes, facts), sizes.totalBytes, facts);
            consider(plan);
        }
    }
}

// The greatest power of two up to `most`, itself one, that divides a group's channels.
inline int32_t commonWidth(int64_t groupChannels, int32_t most) noexcept {
    while (groupChannels % most != 0) {
        most /= 2;
    }
    return most;
}

// Cuts the pixels into `tiles`; gives the steps that a block needs, or 0 where the columns are too many.
inline int64_t cutColumns(Plan& plan, int64_t pixels, int64_t tiles, int64_t threads) noexcept {
    if (plan.columns > threads) {
        return 0;
    }
    plan.tiles = static_cast<int32_t>(tiles);
    plan.chunk = ceilDiv(pixels, tiles);
    plan.rows = static_cast<int32_t>(smaller(plan.chunk, threads / plan.columns));
    plan.threads = static_cast<int32_t>(roundUp(static_cast<int64_t>(plan.rows) * plan.columns, kWarpThreads));
    return ceilDiv(plan.chunk, plan.rows);
}

// Shared memory for each channel's parameters and results, each group's moments of a whole cluster, and the items.
inline int64_t columnsShared(Plan const& plan, int64_t groupChannels) noexcept {
    int64_t const items = static_cast<int64_t>(plan.rows) * plan.columns * (plan.vector / plan.itemWidth);
    return plan.bundleChannels * 16 + plan.bundleChannels / groupChannels * kMaxCluster * 16 + items * 8;
}

template <typename Consider>
void considerColumns(GroupNormParams const& p, int32_t vector, Sizes const& sizes, DeviceFacts const& facts,
    Consider consider) {
    int32_t const width = commonWidth(sizes.groupChannels, vector);
    int64_t const least = vector / width * sizes.groupChannels;
    for (int64_t bundle = least; bundle <= p.channels && bundle / vector <= kMaxThreads; bundle += least) {
        if (p.channels % bundle != 0) {
            continue;
        }
        Plan base;
        base.shape = Shape::kColumns;
        base.vector = vector;
        base.itemWidth = width;
        base.bundleChannels = static_cast<int32_t>(bundle);
        base.columns = static_cast<int32_t>(bundle / vector);
        base.units = p.batch * (p.channels / bundle);
        int64_t const widest = facts.clusters ? kMaxCluster : 1;
        for (int32_t threads : kThreadChoices) {
            for (int64_t tiles = 1; tiles <= widest && tiles <= p.pixels; tiles *= 2) {
                Plan plan = base;
                int64_t const steps = cutColumns(plan, p.pixels, tiles, threads);
                if (hold(plan, steps, columnsShared(plan, sizes.groupChannels), facts)) {
                    plan.cost = heldCost(plan, loadOf(plan, steps, sizes, facts));
                    consider(plan);
                }
            }
        }
        for (int64_t units = 1; facts.cooperative && units <= base.units; units *= 2) {
            int64_t const tiles = smaller(smaller(sizes.limit, facts.processors / units), p.pixels);
            Plan plan = base;
            plan.stage = Stage::kGrid;
            if (tiles < 1) {
                break;
            }
            int64_t const steps = cutColumns(plan, p.pixels, tiles, kMaxThreads);
            if (hold(plan, steps, columnsShared(plan, sizes.groupChannels), facts) && gridLaunches(plan, facts)) {
                plan.packs = kManyPacks;
                plan.cost = gridCost(plan, loadOf(plan, steps, sizes, facts));
                consider(plan);
            }
        }
        for (int32_t threads : kThreadChoices) {
            for (int32_t blocks : kPartialBlocks) {
                Plan plan = base;
                plan.stage = Stage::kPartial;
                if (plan.columns > threads) {
                    continue;
                }
                int64_t const most = smaller(sizes.limit, ceilDiv(p.pixels, threads / plan.columns * kFewPacks));
                int64_t const tiles = partialTiles(base.units, most, blocks, facts);
                int64_t const steps = cutColumns(plan, p.pixels, tiles, threads);
                plan.packs = kFewPacks;
                plan.sharedBytes = columnsShared(plan, sizes.groupChannels);
                if (plan.sharedBytes <= facts.sharedPerBlock - 1024) {
                    plan.cost = pairCost(plan, loadOf(plan, steps, sizes, facts), sizes.totalBytes, facts);
                    consider(plan);
                }
            }
        }
    }
}

template <typename Consider>
void considerSlices(GroupNormParams const& p, Sizes const& sizes, DeviceFacts const& facts, Consider consider) {
    int32_t const size = static_cast<int32_t>(sizes.element);
    int32_t const width = commonWidth(sizes.groupChannels, 16 / size);
    if (width * size < 4 || width < 2) {
        return;
    }
    Plan base;
    base.shape = Shape::kSlices;
    base.vector = base.itemWidth = width;
    base.bundleChannels = static_cast<int32_t>(sizes.groupChannels);
    base.columns = static_cast<int32_t>(sizes.groupChannels / width);
    base.units = p.batch * p.groups;
    int64_t const widest = facts.clusters ? kMaxCluster : 1;
    for (int32_t threads : kThreadChoices) {
        for (int64_t tiles = 1; tiles <= widest && tiles <= p.pixels; tiles *= 2) {
            Plan plan = base;
            int64_t const steps = cutColumns(plan, p.pixels, tiles, threads);
            if (steps < 1 || steps > manyPacks(width, size)) {
                continue;
            }
            plan.packs = steps <= fewPacks(width, size) ? fewPacks(width, size) : manyPacks(width, size);
            plan.cost = heldCost(plan, loadOf(plan, steps, sizes, facts));
            consider(plan);
        }
    }
}

}  // namespace plan_detail

// The most tiles a group that any plan may use: it bounds the workspace.
inline int32_t tileLimit(GroupNormParams const& params) noexcept {
    int64_t const limit = kMaxPartials / (params.batch * params.groups);
    return static_cast<int32_t>(limit < 1 ? 1 : limit > kMaxTiles ? kMaxTiles : limit);
}

// True where every device holds each group in one block, so that no workspace is wanted.
inline bool alwaysHeld(GroupNormParams const& params) noexcept {
    return params.channels / params.groups * params.pixels <= kSmallGroup;
}

// Calls `consider(Plan const&)` with every plan that can run. `vectorised`: x and y allow 16-byte accesses.
template <typename Consider>
void considerPlans(GroupNormParams const& params, bool vectorised, DeviceFacts const& facts, Consider consider) {
    using namespace plan_detail;
    int64_t const size = elementSize(params.dataType);
    int32_t const vector = static_cast<int32_t>(16 / size);
    Sizes const sizes{params.channels / params.groups, size, params.batch * params.channels * params.pixels * size,
                tileLimit(params)};
    bool const held = alwaysHeld(params);  // without a workspace
    DeviceFacts offered = facts;
    offered.cooperative = facts.cooperative && !held;
    bool found = false;
    auto allowed = [&](Plan plan) {
        if (!held || plan.stage == Stage::kHeld) {
            found = true;
            plan.overlap = facts.overlap && plan.stage != Stage::kGrid;
            consider(static_cast<Plan const&>(plan));
        }
    };
    if (params.layout == Layout::kNHWC && vectorised && params.channels % vector == 0) {
        considerColumns(params, vector, sizes, offered, allowed);
        considerSlices(params, sizes, offered, allowed);
    } else if (params.layout == Layout::kNCHW && vectorised && params.pixels % vector == 0 &&
        sizes.groupChannels <= kStagedChannels) {
        considerRuns(params, vector, sizes, offered, allowed);
    }
    if (!found) {
        considerRuns(params, 1, sizes, offered, allowed);
    }
}

// The cheapest of them by its estimate.
inline Plan planGroupNorm(GroupNormParams const& params, bool vectorised, DeviceFacts const& facts) {
    Plan best;
    considerPlans(params, vectorised, facts, [&](Plan const& plan) {
        if (best.units == 0 || plan.cost < best.cost) {
            best = plan;
        }
    });
    return best;
}

// The plan in a few words, for reports: "columns, cluster of 8, 16 units, 512 threads, 4+0 packs of 8".
inline std::string describePlan(Plan const& plan) {
    std::string const channels = std::to_string(plan.bundleChannels);
    std::string text = plan.shape == Shape::kRun ? "run"
        : plan.shape == Shape::kColumns          ? "columns of " + channels
                                                 : "slices of " + channels;
    std::string const tiles = std::to_string(plan.tiles);
    if (plan.stage == Stage::kHeld) {
        text += plan.tiles == 1 ? ", one block" : ", cluster of " + tiles;
    } else if (plan.stage == Stage::kGrid) {
        text += ", grid of " + tiles + " by " + std::to_string(plan.unitsPerLaunch);
    } else {
        text += ", two kernels of " + tiles;
    }
    return text + ", " + std::to_string(plan.units) + " units, " + std::to_string(plan.threads) + " threads, " +
        std::to_string(plan.packs) + "+" + std::to_string(plan.sharedPacks) + " packs of " +
        std::to_string(plan.vector);
}

// The plan that `launchGroupNorm` would take on the current device, described.
std::string groupNormPath(GroupNormParams const& params);

// What `launchGroupNorm` plans with: the current device, and whether these pointers and strides allow wide accesses.
cudaError_t deviceFacts(DeviceFacts& facts) noexcept;
bool allowsVectors(GroupNormParams const& params) noexcept;

// `launchGroupNorm` by a plan of `considerPlans` for these parameters, to compare plans. The workspace is as large as
// `groupNormWorkspaceSize` says.
cudaError_t launchPlan(GroupNormParams const& params, Plan const& plan, void* workspace, cudaStream_t stream) noexcept;

}  // namespace canny2image
