// Packed weights of small codes: a weight is (code - center - zero) * scale, with a scale, and a zero if there are any,
// per output and group of inputs; or code * scale - minimum.
//
//   header      CodedHeader
//   panels      [gates * ceil(N/16)] of
//     scales    [groups][16] of f32, bf16, f16, e8m0, i8 or e4m3
//     factors   [ceil(groups/2^shift)][16] of f16, by which scales in i8 are multiplied, or of f32, divisors of those
//               in e4m3
//     zeros     [groups][16] of i8; absent in most formats
//     minima    [ceil(groups/2^shift)][16] of f16, factors of the zeros, which are then minima
//     codes     [ceil(K/32)][LINES][16][4 bytes]
//
// Each part begins at a cache line. The codes of 32 inputs are 8 groups of 4 bytes, the operands of vpdpbusd; codes of
// 4 and 6 bits share these bytes. K is padded with centers, N with scales of 0. A group is a multiple of 16 inputs, or
// all.
#pragma once

#include <type_traits>

#include "packed.h"

namespace sage {

struct CodedHeader {
    int64_t group;        // inputs of a scale
    int64_t panel_bytes;  // with scales and zeros
    int64_t zeros;        // offset of the zeros in a panel, or 0
    int64_t codes;        // offset of the codes in a panel
    int64_t scale_type;   // 0: f32, 1: bf16, 2: f16, 3: e8m0, 4: i8, 5: e4m3
    int64_t factors;      // offset of the factors of scales in a panel
    int64_t minima;       // offset of the factors of minima in a panel, or 0
    int64_t shift;        // 2^shift groups have one factor
};
constexpr int64_t CODED_HEADER_BYTES = 64;
static_assert(sizeof(CodedHeader) <= CODED_HEADER_BYTES, "panels begin at a cache line");

// The forms of codes, with which a kernel is compiled: bytes, halves of bytes, halves and quarters, E2M1 in units of
// 1/2, and E4M3. LINES are the lines of 64 bytes for DEPTH inputs of a panel.

struct int8_codes {
    char byte;
    static constexpr int64_t LINES = 8, CENTER = 128;
};
struct int6_codes {
    char byte;
    static constexpr int64_t LINES = 6, CENTER = 32;
};
struct int4_codes {
    char byte;
    static constexpr int64_t LINES = 4, CENTER = 8;
};
struct fp4_codes {
    char byte;
    static constexpr int64_t LINES = 4, CENTER = 12;
    // Twice the value of each code, plus CENTER.
    static constexpr uint8_t VALUES[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
};
struct fp8_codes {
    char byte;
    static constexpr int64_t LINES = 8, CENTER = 0;
};

template <class Weight>
struct IsCoded
    : std::integral_constant<bool, std::is_same<Weight, int8_codes>::value || std::is_same<Weight, int6_codes>::value ||
                                       std::is_same<Weight, int4_codes>::value ||
                                       std::is_same<Weight, fp4_codes>::value ||
                                       std::is_same<Weight, fp8_codes>::value> {};

// The inputs 4 * part to 4 * part + 3 of outputs: a code in each byte of a word. `step` has DEPTH inputs of a panel;
// Words is a number or a vector of numbers of 32 bits, for the outputs from `output` on.
template <class Weight, class Words>
inline __attribute__((always_inline)) Words read_part(const char* step, int64_t part, int64_t output = 0) {
    Words low, high;
    const char* from = step + output * 4;
    if constexpr (Weight::LINES == 8) {
        memcpy(&low, from + part * 64, sizeof low);
        return low;
    } else {
        memcpy(&low, from + part / 2 * 64, sizeof low);
        low = low >> (uint32_t)(part % 2 * 4) & 0x0f0f0f0fu;
        if constexpr (Weight::LINES == 6) {
            memcpy(&high, from + (4 + part / 4) * 64, sizeof high);
            low |= (high >> (uint32_t)(part % 4 * 2) & 0x03030303u) << 4u;
        }
        return low;
    }
}

// e4m3 without NaN, in vectors of any length.
template <class To, class Words>
inline To widen_e4m3(Words codes) {
    typedef decltype((Words)codes < (Words)codes) Condition;
    const Words size = (codes & 0x7fu) << 20u;
    const To normal = bits_of<To>(size + (120u << 23)), tiny = __builtin_convertvector((Condition)(codes & 7u), To);
    const To value = size < (1u << 23) ? tiny * 0x1p-9f : normal;
    return bits_of<To>(bits_of<Words>(value) | (codes & 0x80u) << 24u);
}

// Codes as floats, with the center.
template <class Weight, class To, class Words>
inline To widen_codes(Words codes) {
    typedef decltype((Words)codes < (Words)codes) Signed;
    if constexpr (std::is_same<Weight, fp8_codes>::value) {
        return widen_e4m3<To>(codes);
    } else if constexpr (std::is_same<Weight, fp4_codes>::value) {
#if defined(__AVX512F__)
        const Floats values = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
        return (To)_mm512_permutexvar_ps((__m512i)codes, (__m512)values);
#else
        To found;
        for (uint64_t lane = 0; lane < sizeof(To) / sizeof(float); ++lane) found[lane] = Weight::VALUES[codes[lane]];
        return found;
#endif
    } else {
        return __builtin_convertvector((Signed)codes, To);
    }
}

// The first panel of a block. Scales and zeros are at the index of a group times PANEL.
struct CodedPanel {
    const CodedHeader* header;
    const char* panel;

    CodedPanel next(int64_t panels) const { return {header, panel + panels * header->panel_bytes}; }
    const char* codes() const { return panel + header->codes; }

    // Scales from `at` on, in a vector of floats.
    template <class Reg>
    Reg scales(int64_t at) const {
        switch (header->scale_type) {
            case 0: return floats<Reg>(panel + at * 4);
            case 1: return halves<Reg, bf16>(panel + at * 2);
            case 2: return halves<Reg, f16>(panel + at * 2);
            case 3: return first<Reg>(bits_of<Floats>(bytes<Reg>(panel + at) << 23u));
            case 4: return integers<Reg>(panel + at) * halves<Reg, f16>(panel + header->factors + factor_at(at) * 2);
            default:
                return first<Reg>(widen_e4m3<Floats>(bytes<Reg>(panel + at))) /
                       floats<Reg>(panel + header->factors + factor_at(at) * 4);
        }
    }
    // What is subtracted of the codes before they are scaled.
    template <class Reg>
    Reg zeros(int64_t at) const {
        return header->zeros && !header->minima ? integers<Reg>(panel + header->zeros + at) : Reg{};
    }
    // What is subtracted of the scaled codes, in which case these have no center.
    template <class Reg>
    Reg minima(int64_t at) const {
        return integers<Reg>(panel + header->zeros + at) * halves<Reg, f16>(panel + header->minima + factor_at(at) * 2);
    }

  private:
    int64_t factor_at(int64_t at) const { return (at / PANEL >> header->shift) * PANEL + at % PANEL; }

    template <class Reg>
    static Reg first(Floats values) {
        Reg found;
        memcpy(&found, &values, sizeof found);
        return found;
    }
    template <class Reg>
    static Reg floats(const char* from) {
        Reg found;
        memcpy(&found, from, sizeof found);
        return found;
    }
    template <class Reg, class Element>
    static Reg halves(const char* from) {
        Halves bits = {};
        memcpy(&bits, from, sizeof(Reg) / 2);
        return first<Reg>(widen(bits, Element{}));
    }
    template <class Reg>
    static Bits bytes(const char* from) {
        typedef uint8_t Bytes __attribute__((vector_size(16)));
        Bytes read = {};
        memcpy(&read, from, sizeof(Reg) / 4);
        return __builtin_convertvector(read, Bits);
    }
    template <class Reg>
    static Reg integers(const char* from) {
        const Ints read = (Ints)(bytes<Reg>(from) << 24u) >> 24;
        return first<Reg>(__builtin_convertvector(read, Floats));
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
struct Panels<int6_codes> : CodedPanels<int6_codes> {
    Panels(CodedPanels<int6_codes> of) : CodedPanels<int6_codes>(of) {}
};
template <>
struct Panels<int4_codes> : CodedPanels<int4_codes> {
    Panels(CodedPanels<int4_codes> of) : CodedPanels<int4_codes>(of) {}
};
template <>
struct Panels<fp4_codes> : CodedPanels<fp4_codes> {
    Panels(CodedPanels<fp4_codes> of) : CodedPanels<fp4_codes>(of) {}
};
template <>
struct Panels<fp8_codes> : CodedPanels<fp8_codes> {
    Panels(CodedPanels<fp8_codes> of) : CodedPanels<fp8_codes>(of) {}
};

// Row n of a coded [N][K], as `unpack_row` of other weights; the table has one gate.
template <class Element, class Weight>
inline std::enable_if_t<IsCoded<Weight>::value> unpack_row(Element* row, const Weight* packed, int64_t n, int64_t K) {
    const CodedPanel panel = Panels<Weight>(Panels<Weight>::of(packed, K)).at(n / PANEL);
    const int64_t group = panel.header->group, lane = n % PANEL;
    float scale = 0, zero = 0, minimum = 0;
    for (int64_t k = 0; k < K; ++k) {
        if (k % group == 0) {
            const int64_t at = k / group * PANEL;
            scale = panel.scales<Floats>(at)[lane];
            zero = panel.header->minima ? 0 : Weight::CENTER + panel.zeros<Floats>(at)[lane];
            minimum = panel.header->minima ? panel.minima<Floats>(at)[lane] : 0;
        }
        const char* step = panel.codes() + k / DEPTH * Weight::LINES * 64;
        const uint32_t code = read_part<Weight, uint32_t>(step, k % DEPTH / 4, lane) >> k % 4 * 8 & 0xff;
        const float value = widen_codes<Weight, Floats>(Bits{} + code)[0];
        store_element(row + k, to<Element>((value - zero) * scale - minimum));
    }
}

}  // namespace sage
