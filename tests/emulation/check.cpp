// Runs the GroupNorm kernels' own text on emulated GPUs against sums in double precision, and checks all plans.
//
//   check [--cases N] [--plans N] [--seed S] [--verbose]
//
// --verbose prints each case with its error as a part of its bound. Exit status 0 where all is well, 1 where a check
// fails.
#include "plan_check.h"
#include "runtime.h"

#include "kernel_cases.h"

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace canny2image;
using namespace canny2image::cases;

// Of a case: few, so that it is fast, yet some groups outgrow a block's registers.
constexpr int64_t kMostElements = 24000;
constexpr int64_t kMostGroups = 12;  // of all samples; each costs the emulation of some blocks

struct Options {
    int cases{300};
    int plans{30000};
    uint64_t seed{1};
    bool verbose{false};
};

// What of the kernels' text a plan runs: the parts that the planner chooses, and the details that the case brings.
std::string partsOf(Case const& c, Plan const& plan) {
    char const* const shapes[] = {"run", "columns", "slices"};
    char const* const stages[] = {"held", "grid", "two kernels"};
    std::string parts = std::string(shapes[static_cast<int>(plan.shape)]) + ", " + stages[static_cast<int>(plan.stage)];
    if (plan.stage == Stage::kHeld) {
        parts += plan.tiles > 1 ? " by a cluster" : " by a block";
    }
    bool const isSlices = plan.shape == Shape::kSlices;
    int const few = isSlices ? fewPacks(plan.vector, static_cast<int>(sizeOf(c.params.dataType))) : kFewPacks;
    parts += plan.sharedPacks > 0 ? ", parked" : plan.packs > few ? ", many" : ", few";
    return parts + " packs of " + std::to_string(plan.vector) + " " + nameOf(c.params.dataType);
}

std::string detailsOf(Case const& c, Plan const& plan) {
    GroupNormParams const& p = c.params;
    char const* const rows = p.parameterRows == 1 ? "" : p.parameterRows == p.batch ? ", a row each" : ", shared rows";
    return partsOf(c, plan) + (c.hasBias ? ", bias" : "") + rows + ", items of " + std::to_string(plan.itemWidth);
}

// The plans that can run the case once it has memory: of its addresses only their alignment counts.
std::vector<Plan> plansOf(Case const& c) {
    GroupNormParams params = c.params;
    alignas(16) static char memory[64];
    params.x = params.y = memory + c.shift * sizeOf(params.dataType);
    return allPlans(params);
}

class Checker {
public:
    explicit Checker(Options const& options) : mOptions(options), mRandom(options.seed) {
        emulation::seedOrder(options.seed);
        check(cudaStreamCreateWithFlags(&mStream, 0), "stream");
    }
    ~Checker() { cudaStreamDestroy(mStream); }
    Checker(Checker const&) = delete;
    Checker& operator=(Checker const&) = delete;

    // Each case by the plan that is taken and by a chosen one. The number of failures.
    int run() {
        int failures = checkRefusals(mStream);
        for (int i = 0; i < mOptions.cases; ++i) {
            check(cudaSetDevice(i % static_cast<int>(emulation::devices().size())), "device");
            failures += runCase(i == 0       ? muchShared(Layout::kNCHW)
                                    : i == 1 ? muchShared(Layout::kNHWC)
                                    : i == 2 ? farFirst()
                                             : choose());
        }
        emulation::Coverage const kernels = emulation::coverage();
        for (auto const& [parts, count] : mParts) {
            std::printf("%d of %s\n", count, parts.c_str());
        }
        std::printf("%d cases by two plans each, %d failed\n", mOptions.cases, failures);
        std::printf("%zu of %zu kernels were launched\n", kernels.launched, kernels.all);
        return failures;
    }

private:
    struct Choice {
        Case c;
        size_t plan{0};
        double most{1.0};  // of the bound
    };

    // A case, and a plan that takes a little more shared memory than a kernel gets without asking.
    static Choice muchShared(Layout layout) {
        constexpr int64_t kUnasked = 48 * 1024;
        Choice choice;
        choice.c.params = sd15Params({1, 8, 4500}, layout);
        choice.c.params.groups = 1;
        choice.c.params.dataType = choice.c.params.parameterType = choice.c.params.biasType = DataType::kFloat;
        std::vector<Plan> const plans = plansOf(choice.c);
        auto const excess = [](Plan const& plan) {
            return plan.sharedBytes > kUnasked ? plan.sharedBytes - kUnasked : INT64_MAX;
        };
        auto const least = std::min_element(
            plans.begin(), plans.end(), [&](Plan const& a, Plan const& b) { return excess(a) < excess(b); });
        choice.plan = static_cast<size_t>(least - plans.begin());
        return choice;
    }

    // A thread begins with a value far from all others, of which it takes 31, one by one. About that value their squares
    // would leave an error of 0.4 of the bound.
    static Choice farFirst() {
        Choice choice;
        choice.c.params = sd15Params({1, 132, 8000}, Layout::kNCHW);
        choice.c.params.groups = 132;
        choice.c.params.dataType = choice.c.params.parameterType = choice.c.params.biasType = DataType::kFloat;
        choice.c.params.activation = Activation::kNone;
        choice.c.kind = Kind::kOutlierFirst;
        choice.c.shift = 1;
        choice.most = 0.15;
        std::vector<Plan> const plans = plansOf(choice.c);
        auto const threads = [](Plan const& plan) { return plan.tiles * plan.threads; };
        auto const fewest = std::min_element(
            plans.begin(), plans.end(), [&](Plan const& a, Plan const& b) { return threads(a) < threads(b); });
        choice.plan = static_cast<size_t>(fewest - plans.begin());
        return choice;
    }

    // Of some random cases and their plans, one whose parts were run least; of these, one whose details were.
    Choice choose() {
        constexpr int kDraws = 48;
        Choice best;
        std::pair<int, int> least{INT_MAX, INT_MAX};
        for (int draw = 0; draw < kDraws; ++draw) {
            Case c = randomCase(mRandom, kMostElements);
            if (mRandom() % 2 == 0) {  // which wide accesses need
                c.params.pixels = (c.params.pixels + 7) / 8 * 8;
            }
            if (c.params.batch * c.params.groups > kMostGroups) {
                continue;
            }
            std::vector<Plan> const plans = plansOf(c);
            size_t const first = mRandom() % plans.size();  // among equals
            for (size_t i = 0; i < plans.size(); ++i) {
                size_t const index = (first + i) % plans.size();
                std::pair<int, int> const runs{mParts[partsOf(c, plans[index])], mDetails[detailsOf(c, plans[index])]};
                if (runs < least) {
                    least = runs;
                    best = {c, index};
                }
            }
        }
        return best;
    }

    int runCase(Choice const& choice) {
        CaseRun const prepared(choice.c, mRandom);
        Plan const plan = prepared.plans()[choice.plan];
        ++mParts[partsOf(choice.c, plan)];
        ++mDetails[detailsOf(choice.c, plan)];
        return runPlan(choice, prepared, nullptr, prepared.path()) +
            runPlan(choice, prepared, &plan, describePlan(plan));
    }

    int runPlan(Choice const& choice, CaseRun const& prepared, Plan const* plan, std::string const& description) {
        double worst = 0.0;
        std::string fault;
        try {
            fault = prepared.run(mStream, plan, worst);
        } catch (CudaError const& error) {
            fault = error.what();
        }
        if (fault.empty() && worst > choice.most) {
            fault = "error beyond " + std::to_string(choice.most) + " of its bound";
        }
        if (!fault.empty() || mOptions.verbose) {
            std::printf("%-4s %6.3f of bound  %s | %s | %s%s%s\n", fault.empty() ? "ok" : "FAIL", worst,
                nameCase(choice.c).c_str(), emulation::currentDevice().name, description.c_str(), fault.empty() ? "" : ": ",
                fault.c_str());
        }
        return fault.empty() ? 0 : 1;
    }

    Options mOptions;
    Random mRandom;
    cudaStream_t mStream{nullptr};
    std::map<std::string, int> mParts;    // how often a plan was run for them
    std::map<std::string, int> mDetails;  // the same
};

bool parse(int argc, char** argv, Options& options) {
    for (int i = 1; i < argc; ++i) {
        bool const hasNext = i + 1 < argc;
        if (std::strcmp(argv[i], "--cases") == 0 && hasNext) {
            options.cases = std::atoi(argv[++i]);
        } else if (std::strcmp(argv[i], "--plans") == 0 && hasNext) {
            options.plans = std::atoi(argv[++i]);
        } else if (std::strcmp(argv[i], "--seed") == 0 && hasNext) {
            options.seed = std::strtoull(argv[++i], nullptr, 10);
        } else if (std::strcmp(argv[i], "--verbose") == 0) {
            options.verbose = true;
        } else {
            return false;
        }
    }
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    Options options;
    std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);  // to tell how far it came, should it crash
    if (!parse(argc, argv, options)) {
        std::fprintf(stderr, "usage: check [--cases N] [--plans N] [--seed S] [--verbose]\n");
        return 2;
    }
    int failures = options.plans > 0 ? emulation::checkPlans(options.plans, options.seed) : 0;
    failures += options.plans > 0 ? emulation::checkDivisors(options.plans, options.seed) : 0;
    failures += options.cases > 0 ? Checker(options).run() : 0;
    return failures == 0 ? 0 : 1;
}
