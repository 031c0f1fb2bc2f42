// What the generated CPU kernels stand on. A kernel reads like its spec: `load` gives float32 lanes, `to<E>` rounds.
//
// Everything lives in namespace sage, kernels included, so that exp or tanh of a scalar means the ones here and not libm's.
// Nothing here depends on the compiler's idea of fast math: loops are vectorised by hand over 16 lanes.
#pragma once

#include "attention.h"
#include "elements.h"
#include "functions.h"
#include "loops.h"

// Every kernel has this one signature; the symbol is the op's name behind `sage_`.
//   tensors  inputs, then outputs, in spec order; null for an absent one
//   sizes    R (the leading dims) if there are any, the op's dims, then for every tensor its strides, in elements, for
//            all declared dims but the last, which is contiguous
//   attrs    numbers in spec order: a bool as 0 or 1, an absent one as NaN, a text as its index among the choices
#define SAGE_KERNEL(name) \
    extern "C" __attribute__((visibility("default"))) void sage_##name( \
        [[maybe_unused]] void* const* tensors, [[maybe_unused]] const int64_t* sizes, [[maybe_unused]] const double* attrs)
