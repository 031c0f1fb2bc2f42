// The support library of the generated CPU kernels. A kernel reads like its spec: `load` returns float32, `to<E>`
// rounds.
//
// Everything is in namespace sage, kernels included, so that exp and tanh of a scalar are the functions here and not
// libm's. Nothing depends on fast-math flags: loops are vectorised by hand over vectors of 16.
#pragma once

#include "attention.h"
#include "file_io.h"
#include "integers.h"
#include "kernel.h"
#include "routing.h"
#include "sampling.h"
#include "scans.h"
#include "topk.h"
