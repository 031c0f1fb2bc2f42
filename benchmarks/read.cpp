// Memory read rate: sums 64-byte lines, with one prefetched stream per thread.
#include "sage.h"

namespace sage {

SAGE_KERNEL(read) {
    const float* data = (const float*)tensors[0];
    const int64_t parts = sizes[1], part = sizes[0] / parts / (4 * LANES) * (4 * LANES);
    float* totals = scratch<float>(Scratch::PREPARED_ROWS, parts);
    parallel_for(parts, [&](int64_t p) {
        Floats sums[4] = {};
        for (int64_t i = 0; i < part; i += 4 * LANES)
            for (int64_t j = 0; j < 4; ++j) {
                __builtin_prefetch(data + p * part + i + j * LANES + 2048);
                sums[j] += load(data + p * part + i + j * LANES, Block{0});
            }
        totals[p] = (sums[0] + sums[1] + sums[2] + sums[3])[0];
    });
    *(float*)tensors[1] = totals[0];  // a use of the sums, so that the compiler keeps the loop
}

}  // namespace sage
