#include "plan_check.h"

#include "group_norm_plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

namespace emulation {
namespace {

using namespace canny2image;
using Random = std::mt19937_64;

constexpr int64_t kLimit = INT32_MAX;  // of what the kernels count in 32 bits
constexpr int kMostReports = 10;

template <typename T>
T pick(Random& random, std::vector<T> const& from) {
    return from[random() % from.size()];
}

// Up to `most`, small numbers as often as large ones.
int64_t anyScale(Random& random, int64_t most) {
    std::uniform_real_distribution<double> logarithm(0.0, std::log(static_cast<double>(most)));
    return static_cast<int64_t>(std::exp(logarithm(random)));
}

DeviceFacts randomDevice(Random& random) {
    DeviceFacts facts;
    facts.processors = pick<int32_t>(random, {1, 2, 5, 16, 46, 80, 108, 132, 148});
    facts.sharedPerBlock = pick<int32_t>(random, {49152, 101376, 166912, 232448});
    facts.clusters = random() % 2 == 0;
    facts.cooperative = random() % 3 != 0;
    facts.overlap = random() % 2 == 0;
    return facts;
}

GroupNormParams randomSizes(Random& random) {
    GroupNormParams p;
    bool const isHuge = random() % 16 == 0;
    p.groups = pick<int32_t>(random, {1, 2, 3, 4, 8, 32, 33});
    int64_t const wide = random() % 2 == 0 ? pick<int64_t>(random, {4, 8, 10, 16, 20, 30, 40, 60, 80})
                                           : anyScale(random, isHuge ? 100000 : 200);
    p.channels = wide * p.groups;
    p.pixels = anyScale(random, isHuge ? kLimit / wide : std::min<int64_t>(200000, kLimit / wide));
    if (random() % 2 == 0) {
        p.pixels = std::min((p.pixels + 7) / 8 * 8, kLimit / wide / 8 * 8);
    }
    p.pixels = std::max<int64_t>(p.pixels, 1);
    p.batch = anyScale(random, isHuge ? 1000 : 8);
    p.layout = random() % 2 == 0 ? Layout::kNHWC : Layout::kNCHW;
    p.dataType = pick<DataType>(random, {DataType::kFloat, DataType::kHalf, DataType::kBFloat16});
    p.pixelStride = p.channels;
    return p;
}

// Adds the first broken rule to none, or nothing.
class Rules {
public:
    void expect(bool holds, char const* rule) {
        if (!holds && mBroken.empty()) {
            mBroken = rule;
        }
    }
    std::string const& broken() const { return mBroken; }

private:
    std::string mBroken;
};

// Units, tiles and threads between them take each element once: tiles are stretches of `chunk`, cut off at the end.
void checkCover(GroupNormParams const& p, Plan const& plan, Rules& rules) {
    bool const isRun = plan.shape == Shape::kRun;
    int64_t const wide = p.channels / p.groups;
    int64_t const total = isRun ? wide * p.pixels / plan.vector : p.pixels;
    rules.expect(plan.tiles >= 1 && plan.chunk >= 1, "tiles and chunks are not empty");
    rules.expect(plan.chunk * plan.tiles >= total, "the tiles reach the end");
    rules.expect((plan.tiles + int64_t{1}) * plan.chunk <= UINT32_MAX, "the end of a tile is a number of 32 bits");
    int64_t const each = isRun ? plan.threads : plan.rows;  // of a tile, at one step
    rules.expect(each >= 1, "a step takes something");
    bool const isHeld = plan.stage == Stage::kHeld || plan.stage == Stage::kGrid;
    rules.expect(!isHeld || each * (plan.packs + plan.sharedPacks) >= plan.chunk, "what is held is all of a tile");
    if (isRun) {
        rules.expect(plan.units == p.batch * p.groups, "a unit is a group");
        rules.expect(plan.vector == 1 || (p.layout == Layout::kNCHW && p.pixels % plan.vector == 0),
            "no access of a run leaves its channel");
        return;
    }
    rules.expect(p.layout == Layout::kNHWC, "columns and slices are for NHWC");
    rules.expect(plan.units * plan.bundleChannels == p.batch * p.channels, "the units have all channels");
    rules.expect(plan.bundleChannels % wide == 0 && p.channels % plan.bundleChannels == 0, "a unit has whole groups");
    rules.expect(plan.columns * plan.vector == plan.bundleChannels, "the columns are the unit's channels");
    rules.expect(plan.rows * plan.columns <= plan.threads, "a step has threads enough");
    rules.expect(plan.vector % plan.itemWidth == 0 && wide % plan.itemWidth == 0, "an item is of one group");
    if (plan.shape == Shape::kSlices) {
        rules.expect(plan.bundleChannels == wide && plan.stage == Stage::kHeld && plan.sharedPacks == 0,
            "a slice is one group in registers");
    }
}

void checkLimits(GroupNormParams const& p, Plan const& plan, DeviceFacts const& facts, Rules& rules) {
    rules.expect(plan.threads >= kWarpThreads && plan.threads <= kMaxThreads && plan.threads % kWarpThreads == 0,
        "blocks are whole warps, and not too many");
    rules.expect(plan.sharedBytes >= static_cast<int64_t>(plan.sharedPacks) * plan.threads * 16 &&
            plan.sharedBytes <= facts.sharedPerBlock - 1024,
        "shared memory suffices");
    rules.expect(plan.units * plan.tiles <= kLimit, "the grid is not too large");
    rules.expect(plan.stage == Stage::kHeld ? plan.tiles <= (facts.clusters ? kMaxCluster : 1)
                                            : plan.tiles <= std::min(tileLimit(p), kMaxTiles),
        "tiles fit a cluster, or the workspace");
    int64_t const moments = plan.stage == Stage::kHeld ? 0 : p.batch * p.groups * plan.tiles;
    rules.expect(moments * 3 * static_cast<int64_t>(sizeof(float)) <= static_cast<int64_t>(groupNormWorkspaceSize(p)),
        "the workspace holds the moments of all tiles");
    rules.expect(plan.stage != Stage::kApply, "the second kernel is no plan");
    if (plan.stage == Stage::kGrid) {
        rules.expect(!plan.overlap, "no cooperative launch overlaps");
        rules.expect(facts.cooperative && plan.unitsPerLaunch >= 1 &&
                plan.unitsPerLaunch * plan.tiles <= facts.processors,
            "a cooperative launch is resident");
    }
    rules.expect(std::isfinite(plan.cost) && plan.cost > 0.0, "the estimate is a time");
}

bool isSame(Plan const& a, Plan const& b) {
    return a.cost == b.cost && a.shape == b.shape && a.stage == b.stage && a.tiles == b.tiles &&
        a.threads == b.threads && a.units == b.units && a.chunk == b.chunk;
}

std::string nameSizes(GroupNormParams const& p) {
    return std::to_string(p.batch) + " x " + std::to_string(p.channels) + " x " + std::to_string(p.pixels) + " /" +
        std::to_string(p.groups) + (p.layout == Layout::kNHWC ? " NHWC" : " NCHW") + " type " +
        std::to_string(static_cast<int>(p.dataType));
}

}  // namespace

int checkPlans(int sizes, uint64_t seed) {
    Random random(seed);
    long plans = 0;
    int faults = 0;
    auto const report = [&](GroupNormParams const& p, std::string const& plan, std::string const& rule) {
        if (++faults <= kMostReports) {
            std::printf("FAIL %s | %s: not so: %s\n", nameSizes(p).c_str(), plan.c_str(), rule.c_str());
        }
    };
    for (int i = 0; i < sizes; ++i) {
        DeviceFacts const facts = randomDevice(random);
        GroupNormParams const p = randomSizes(random);
        bool const vectorised = random() % 5 != 0;
        char const* const refused = checkGroupNorm(p);
        if (refused != nullptr) {
            report(p, "sizes", refused);
            continue;
        }
        Plan const chosen = planGroupNorm(p, vectorised, facts);
        bool isAmong = false;
        considerPlans(p, vectorised, facts, [&](Plan const& plan) {
            Rules rules;
            checkCover(p, plan, rules);
            checkLimits(p, plan, facts, rules);
            rules.expect(plan.cost >= chosen.cost, "the plan chosen is the cheapest");
            rules.expect(vectorised || plan.vector == 1, "accesses are as narrow as they must be");
            isAmong = isAmong || isSame(plan, chosen);
            ++plans;
            if (!rules.broken().empty()) {
                report(p, describePlan(plan), rules.broken());
            }
        });
        if (!isAmong) {
            report(p, describePlan(chosen), "the plan chosen is one of those that can run");
        }
    }
    std::printf("%d sizes, %ld plans, %d faults\n", sizes, plans, faults);
    return faults;
}

int checkDivisors(int divisors, uint64_t seed) {
    Random random(seed);
    int faults = 0;
    for (int i = 0; i < divisors; ++i) {
        uint32_t const divisor = static_cast<uint32_t>(i < 2000 ? i + 1 : anyScale(random, kLimit));
        Divisor const by = makeDivisor(divisor);
        uint32_t const multiple = static_cast<uint32_t>(kLimit) / divisor * divisor;
        for (uint32_t const n : {0U, 1U, divisor - 1, divisor, multiple - 1, multiple, static_cast<uint32_t>(kLimit),
                 static_cast<uint32_t>(random() % (uint64_t{1} << 31))}) {
            uint32_t const high = static_cast<uint32_t>(uint64_t{n} * by.multiplier >> 32);
            uint32_t const quotient = divisor == 1 ? n : high >> by.shift;
            if (quotient != n / divisor && ++faults <= kMostReports) {
                std::printf("FAIL %u / %u is not %u\n", n, divisor, quotient);
            }
        }
    }
    std::printf("%d divisors, %d faults\n", divisors, faults);
    return faults;
}

}  // namespace emulation
