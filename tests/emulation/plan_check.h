// What every plan of group_norm_plan.h must keep, whatever the sizes and the device.
#pragma once

#include <cstdint>

namespace emulation {

// Random sizes on random devices; prints the faults and how many plans were looked at. The number of faults.
int checkPlans(int sizes, uint64_t seed);

// The divisions by multiplication against the processor's.
int checkDivisors(int divisors, uint64_t seed);

}  // namespace emulation
