// The C signature of kernels.
#pragma once

#include "kv_forms.h"

// The stored form of GEMM weights: the element type, or codes (coded.h) if the file is compiled for them.
#if !defined(SAGE_WEIGHT)
#define SAGE_WEIGHT SAGE_ELEMENT
#endif

// Whether GEMMs multiply weights of integer codes with activations of 8 bits (int8_rows.h).
#if !defined(SAGE_INT8_ROWS)
#define SAGE_INT8_ROWS 0
#endif

// The stored form of KV caches: the element type, or codes (kv_forms.h) if the file is compiled for them.
#if !defined(SAGE_KV)
#define SAGE_KV SAGE_ELEMENT
#endif

// The kernels of the file that the library has, with a space after each. The compiler drops the others before it
// optimises.
namespace sage {
#if defined(SAGE_ONLY)
constexpr bool is_compiled(const char* name) {
    const char* at = name;
    for (const char* list = SAGE_ONLY; *list; ++list) {
        if (*list != ' ')
            at = at && *at == *list ? at + 1 : nullptr;
        else if (at && !*at)
            return true;
        else
            at = name;
    }
    return false;
}
#else
constexpr bool is_compiled(const char*) { return true; }
#endif
}  // namespace sage

// All kernels have this signature; the symbol is `sage_` and the op's name.
//   tensors  inputs, then outputs, in spec order; null for an absent one
//   sizes    R (the leading dims) if there are any, the op's dims, then for each tensor its strides, in elements,
//            of all declared dims but the last, which is contiguous
//   attrs    numbers in spec order: a bool as 0 or 1, an absent one as NaN, a string as its index among the choices
// The result is null, or an error message that is valid until the next error of this thread.
#define SAGE_KERNEL(name)                                                                                             \
    [[maybe_unused]] static void name##_kernel(void* const*, const int64_t*, const double*);                          \
    SAGE_EXPORT const char* sage_##name([[maybe_unused]] void* const* tensors, [[maybe_unused]] const int64_t* sizes, \
                                        [[maybe_unused]] const double* attrs) {                                       \
        if constexpr (sage::is_compiled(#name))                                                                       \
            return sage::invoke_guarded(#name, name##_kernel, tensors, sizes, attrs);                                 \
        else                                                                                                          \
            return #name ": not compiled into this library";                                                          \
    }                                                                                                                 \
    static void name##_kernel([[maybe_unused]] void* const* tensors, [[maybe_unused]] const int64_t* sizes,           \
                              [[maybe_unused]] const double* attrs)
