// The way of this machine: AMX tiles, else AVX512_BF16, else float32 multiply-adds. SAGELLM_LINEAR (amx, pairs, floats)
// asks for another one, for tests; what the machine lacks is passed over.
#pragma once

#include "tiles_amx.h"
#include "tiles_vector.h"

namespace sage {

// Sizes of blocks in registers of 16 lanes, and in narrower ones, of which a machine has fewer.
struct BlockSizes {
    int rows, panels, narrow_rows, narrow_panels;
};

inline bool allows(const char* name) {
    const char* asked = getenv("SAGELLM_LINEAR");
    return !asked || !*asked || !strcmp(asked, name);
}

template <class Element, int ROWS, int PANELS>
struct WayOf {
    static const Way<Element>& choose() { return vectors::FLOATING<Element, ROWS, PANELS>; }
};

template <int ROWS, int PANELS>
struct WayOf<bf16, ROWS, PANELS> {
    static const Way<bf16>& choose() {
#if defined(SAGE_AMX)
        if (allows("amx") && amx::is_permitted()) return amx::WAY;
#endif
#if defined(__AVX512BF16__)
        if (allows("amx") || allows("pairs")) return vectors::PAIRED<ROWS, PANELS>;
#endif
        return vectors::FLOATING<bf16, ROWS, PANELS>;
    }
};

template <class Element, int ROWS, int PANELS, int NARROW_ROWS, int NARROW_PANELS>
inline const Way<Element>& way() {
    constexpr bool WIDE = vectors::WIDTH == PANEL;
    static const Way<Element>& chosen =
        WayOf<Element, WIDE ? ROWS : NARROW_ROWS, WIDE ? PANELS : NARROW_PANELS>::choose();
    return chosen;
}

}  // namespace sage
