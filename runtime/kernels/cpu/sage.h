// What the generated CPU kernels stand on. A kernel reads like its spec: `load` gives float32 lanes, `to<E>` rounds.
//
// Everything lives in namespace sage, kernels included, so that exp or tanh of a scalar means the ones here and not libm's.
// Nothing here depends on the compiler's idea of fast math: loops are vectorised by hand over 16 lanes.
#pragma once

#include "attention.h"
#include "kernel.h"
#include "routing.h"
#include "sampling.h"
