// Selection of the microkernel by instruction set: AMX tiles, else AVX512_BF16, else float32 multiply-adds. For coded
// weights AVX512_VNNI if codes are integers or E2M1, and AVX512_BF16 if they are E4M3, else float32 multiply-adds. With
// activations of 8 bits (SAGE_INT8_ROWS) AVX512_VNNI, else float32.
//
// SAGELLM_CPU_ISA (amx, avx512_bf16, avx512_vnni, fp32) requests another one, for tests; what the machine lacks is
// skipped.
#pragma once

#include "microkernel_amx.h"
#include "microkernel_int8.h"
#include "microkernel_int8_widened.h"
#include "microkernel_pairs.h"
#include "microkernel_vector.h"
#include "microkernel_widened.h"
#include "microkernel_words.h"

namespace sage {

inline bool allows(const char* name) {
    const char* requested = getenv("SAGELLM_CPU_ISA");
    return !requested || !*requested || !strcmp(requested, name);
}

template <class Element, class Weight, int ROWS, int PANELS>
struct MicrokernelFor {
    static const Microkernel<Element, Weight>& select() {
        if constexpr (IsCoded<Weight>::value) {
            constexpr bool IS_E4M3 = std::is_same<Weight, fp8_codes>::value;
            if constexpr (SAGE_INT8_ROWS && !IS_E4M3) {
#if defined(__AVX512VNNI__)
                if (allows("amx") || allows("avx512_bf16") || allows("avx512_vnni"))
                    return int8::MICROKERNEL<Element, Weight>;
#endif
                return int8_widened::MICROKERNEL<Element, Weight>;
            }
#if defined(__AVX512VNNI__)
            if constexpr (sizeof(Element) == 2 && !IS_E4M3)
                if (allows("amx") || allows("avx512_bf16") || allows("avx512_vnni"))
                    return integers::MICROKERNEL<Element, Weight>;
#endif
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
            if constexpr (std::is_same<Element, bf16>::value && IS_E4M3)
                if (allows("amx") || allows("avx512_bf16")) return widened::PAIR_MICROKERNEL<Weight>;
#endif
            return widened::FLOAT_MICROKERNEL<Element, Weight>;
        } else {
            return vectors::FLOAT_MICROKERNEL<Element, ROWS, PANELS>;
        }
    }
};

template <int ROWS, int PANELS>
struct MicrokernelFor<bf16, bf16, ROWS, PANELS> {
    static const Microkernel<bf16>& select() {
#if defined(SAGE_AMX)
        if (allows("amx") && amx::is_permitted()) return amx::MICROKERNEL;
#endif
#if defined(__AVX512BF16__)
        if (allows("amx") || allows("avx512_bf16")) return pairs::MICROKERNEL<ROWS, PANELS>;
#endif
        return vectors::FLOAT_MICROKERNEL<bf16, ROWS, PANELS>;
    }
};

// The microkernel of this machine, selected once per library. A block is ROWS by PANELS in registers of 16 floats, and
// SHORT_ROWS by SHORT_PANELS in shorter ones: all its sums have to fit into the registers.
template <class Element, class Weight, int ROWS, int PANELS, int SHORT_ROWS, int SHORT_PANELS>
inline const Microkernel<Element, Weight>& select_microkernel() {
    static_assert(PANELS > 1 && SHORT_PANELS > 1, "a block has a panel of a projection and one of its gate");
    constexpr bool IS_FULL = vectors::WIDTH == PANEL;
    constexpr int MAX_ROWS = IS_FULL ? ROWS : SHORT_ROWS, MAX_PANELS = IS_FULL ? PANELS : SHORT_PANELS;
    static const Microkernel<Element, Weight>& selected =
        MicrokernelFor<Element, Weight, MAX_ROWS, MAX_PANELS>::select();
    return selected;
}

}  // namespace sage
