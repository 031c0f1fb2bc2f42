// Runner of a step: calls the kernels of a plan one after another, without returning to Python between them.
#include <cstdint>
#include <cstring>

#include "error.h"

extern "C" void sage_set_num_threads(int64_t count);  // of thread_pool.cpp

namespace {

using Kernel = const char* (*)(void* const* tensors, const int64_t* sizes, const double* attrs);

struct Call {
    Kernel kernel;
    void* const* tensors;
    const int64_t* sizes;
    const double* attrs;
};

}  // namespace

// Returns null, or the error message of the first call that fails, after which no others are made.
SAGE_EXPORT const char* sage_run(const Call* calls, int64_t num_calls, int64_t num_threads) {
    sage_set_num_threads(num_threads);
    for (int64_t i = 0; i < num_calls; ++i)
        if (const char* error = calls[i].kernel(calls[i].tensors, calls[i].sizes, calls[i].attrs)) return error;
    return nullptr;
}

// Copies a tensor of up to four dims to contiguous memory. sizes: bytes per element, the four dims, their strides.
SAGE_EXPORT const char* sage_gather_rows(void* const* tensors, const int64_t* sizes, const double*) {
    const int64_t width = sizes[0];
    const int64_t *dims = sizes + 1, *strides = sizes + 5;
    const char* source = static_cast<const char*>(tensors[0]);
    char* target = static_cast<char*>(tensors[1]);
    for (int64_t a = 0; a < dims[0]; ++a)
        for (int64_t b = 0; b < dims[1]; ++b)
            for (int64_t c = 0; c < dims[2]; ++c) {
                const char* row = source + (a * strides[0] + b * strides[1] + c * strides[2]) * width;
                if (strides[3] == 1) {
                    std::memcpy(target, row, dims[3] * width);
                    target += dims[3] * width;
                    continue;
                }
                for (int64_t d = 0; d < dims[3]; ++d, target += width)
                    std::memcpy(target, row + d * strides[3] * width, width);
            }
    return nullptr;
}
