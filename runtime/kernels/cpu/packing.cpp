// Packing of weights for the loader, and unpacking of rows for tables that are both embedding and head.
#include "packed.h"

namespace sage {

using E = SAGE_ELEMENT;

// w [groups][gates * N][K], with a row stride of `stride` elements -> packed
SAGE_KERNEL(pack) {
    const E* w = (const E*)tensors[0];
    E* packed = (E*)tensors[1];
    const int64_t groups = sizes[0], gates = sizes[1], N = sizes[2], K = sizes[3], group_stride = sizes[4],
                  stride = sizes[5];
    for (int64_t group = 0; group < groups; ++group)
        pack(packed + group * packed_size(gates, N, K), w + group * group_stride, stride, gates, N, K);
}

// ids [T], packed [V][K] -> rows [T][K]
SAGE_KERNEL(unpack_rows) {
    const int32_t* ids = (const int32_t*)tensors[0];
    const E* packed = (const E*)tensors[1];
    E* rows = (E*)tensors[2];
    const int64_t T = sizes[0], K = sizes[1], stride = sizes[2];
    parallel_for_rows(T, T * K, [&](int64_t row) { unpack_row(rows + row * stride, packed, ids[row], K); });
}

}  // namespace sage
