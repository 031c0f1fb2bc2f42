// The C signature of kernels, and what all of them stand on.
#pragma once

#include "loops.h"

// Every kernel has this one signature; the symbol is the op's name behind `sage_`.
//   tensors  inputs, then outputs, in spec order; null for an absent one
//   sizes    R (the leading dims) if there are any, the op's dims, then for every tensor its strides, in elements, for
//            all declared dims but the last, which is contiguous
//   attrs    numbers in spec order: a bool as 0 or 1, an absent one as NaN, a text as its index among the choices
#define SAGE_KERNEL(name) \
    extern "C" __attribute__((visibility("default"))) void sage_##name( \
        [[maybe_unused]] void* const* tensors, [[maybe_unused]] const int64_t* sizes, [[maybe_unused]] const double* attrs)
