// Packed weights of small codes: a weight is (code - center - zero) * scale, with a scale, and a zero if there are any,
// per output and group of inputs.
//
//   header      CodedHeader
//   panels      [gates * ceil(N/16)] of
//     scales    [groups][16] of f32, bf16 or f16, padded to a cache line
//     zeros     [groups][16] of i8, padded to a cache line; absent in most formats
//     codes     [ceil(K/32)*32/STEP][16][4 bytes]   STEP inputs of each output, as the operand of vpdpbusd
//
// The low halves of the 4 bytes of an output are its first inputs if two codes share a byte. K is padded with centers,
// N with scales of 0. A group is a multiple of 32 inputs, or all of them.
#pragma once

#include "packed.h"

namespace sage {

struct CodedHeader {
    int64_t group;        // inputs of a scale, a multiple of DEPTH
    int64_t panel_bytes;  // with scales and zeros
    int64_t zeros;        // offset of the zeros in a panel, or 0
    int64_t codes;        // offset of the codes in a panel
    int64_t scale_type;   // 0: f32, 1: bf16, 2: f16
};
constexpr int64_t CODED_HEADER_BYTES = 64;
static_assert(sizeof(CodedHeader) <= CODED_HEADER_BYTES, "panels begin at a cache line");

// The forms of codes, with which a kernel is compiled: bytes, halves of bytes, and E2M1 in units of 1/2.

struct int8_codes {
    char byte;
    static constexpr int64_t STEP = 4, CENTER = 128;
};
struct int4_codes {
    char byte;
    static constexpr int64_t STEP = 8, CENTER = 8;
};
struct fp4_codes {
    char byte;
    static constexpr int64_t STEP = 8, CENTER = 12;
    // Twice the value of each code, plus CENTER.
    static constexpr uint8_t VALUES[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
};

template <class Weight>
inline int64_t code_value(int64_t code) {
    return code;
}
template <>
inline int64_t code_value<fp4_codes>(int64_t code) {
    return fp4_codes::VALUES[code];
}

template <class Weight>
struct IsCoded {
    static constexpr bool value = false;
};
template <>
struct IsCoded<int8_codes> {
    static constexpr bool value = true;
};
template <>
struct IsCoded<int4_codes> {
    static constexpr bool value = true;
};
template <>
struct IsCoded<fp4_codes> {
    static constexpr bool value = true;
};

// The first panel of a block. Scales and zeros are at the index of a group times PANEL.
struct CodedPanel {
    const CodedHeader* header;
    const char* panel;

    CodedPanel next(int64_t panels) const { return {header, panel + panels * header->panel_bytes}; }
    const char* codes() const { return panel + header->codes; }

    // WIDTH scales from `at` on, in a vector of floats.
    template <class Reg>
    Reg scales(int64_t at) const {
        Reg found;
        constexpr int64_t WIDTH = sizeof(Reg) / sizeof(float);
        if (header->scale_type == 0) {
            memcpy(&found, panel + at * 4, sizeof found);
        } else {
            float wide[LANES];
            Halves bits = {};
            memcpy(&bits, panel + at * 2, WIDTH * 2);
            const Floats values = header->scale_type == 1 ? widen(bits, bf16{}) : widen(bits, f16{});
            memcpy(wide, &values, sizeof wide);
            memcpy(&found, wide, sizeof found);
        }
        return found;
    }
    template <class Reg>
    Reg zeros(int64_t at) const {
        Reg found = {};
        constexpr int64_t WIDTH = sizeof(Reg) / sizeof(float);
        const int8_t* from = (const int8_t*)panel + header->zeros + at;
        if (header->zeros)
            for (int64_t lane = 0; lane < WIDTH; ++lane) found[lane] = from[lane];
        return found;
    }
};

template <class Weight>
struct CodedPanels {
    using At = CodedPanel;
    const char* first;
    int64_t bytes, step_bytes;
    const CodedHeader* header;

    static CodedPanels of(const Weight* w, int64_t K) {
        const CodedHeader* header = (const CodedHeader*)w;
        const int64_t steps = round_up(K, DEPTH) / DEPTH, lines = header->panel_bytes / 64;
        return {(const char*)w + CODED_HEADER_BYTES, header->panel_bytes, (lines + steps / 2) / steps * 64, header};
    }
    At at(int64_t panel) const { return {header, first + panel * bytes}; }
};
template <>
struct Panels<int8_codes> : CodedPanels<int8_codes> {
    Panels(CodedPanels<int8_codes> of) : CodedPanels<int8_codes>(of) {}
};
template <>
struct Panels<int4_codes> : CodedPanels<int4_codes> {
    Panels(CodedPanels<int4_codes> of) : CodedPanels<int4_codes>(of) {}
};
template <>
struct Panels<fp4_codes> : CodedPanels<fp4_codes> {
    Panels(CodedPanels<fp4_codes> of) : CodedPanels<fp4_codes>(of) {}
};

// Row n of a coded [N][K], as `unpack_row` of other weights; the table has one gate.
template <class Element, class Weight>
inline void unpack_coded_row(Element* row, const Weight* packed, int64_t n, int64_t K) {
    constexpr int64_t STEP = Weight::STEP;
    const CodedPanel panel = Panels<Weight>(Panels<Weight>::of(packed, K)).at(n / PANEL);
    const int64_t group = panel.header->group;
    for (int64_t k = 0; k < K; ++k) {
        const int64_t at = k / group * PANEL, i = k % STEP;
        const uint8_t byte = (panel.codes() + (k / STEP * PANEL + n % PANEL) * 4)[i % 4];
        const int64_t code = STEP == 4 ? byte : byte >> i / 4 * 4 & 0xf;
        const float value = (float)(code_value<Weight>(code) - Weight::CENTER) - panel.zeros<Floats>(at)[n % PANEL];
        store_element(row + k, to<Element>(value * panel.scales<Floats>(at)[n % PANEL]));
    }
}
template <class Element>
inline void unpack_row(Element* row, const int8_codes* packed, int64_t n, int64_t K) {
    unpack_coded_row(row, packed, n, K);
}
template <class Element>
inline void unpack_row(Element* row, const int4_codes* packed, int64_t n, int64_t K) {
    unpack_coded_row(row, packed, n, K);
}
template <class Element>
inline void unpack_row(Element* row, const fp4_codes* packed, int64_t n, int64_t K) {
    unpack_coded_row(row, packed, n, K);
}

}  // namespace sage
