// Microkernels of coded weights (coded.h) that widen some inputs of their
// panels to scratch memory, and multiply these with all rows of a block.
//
// Floats: codes are widened and scaled, and multiplied in float32 in the order
// of K, as other weights are. Everywhere. Pairs: codes of E4M3 are exact in
// bf16; products of pairs with x in bf16 are added in float32, up to CHUNK
// inputs of a group by themselves, and then scaled. With AVX512_BF16 and
// AVX512_VBMI.
#pragma once

#include "coded.h"
#include "microkernel_pairs.h"
#include "microkernel_vector.h"

namespace sage {
namespace widened {

using vectors::broadcast;
using vectors::multiply_add;
using vectors::Reg;
using vectors::RegBits;
using vectors::WIDTH;

constexpr int64_t CHUNK = 128;                                   // inputs that are widened at a time, at most
constexpr bool IS_FULL = WIDTH == PANEL;                         // registers have the outputs of a panel
constexpr int ROWS = IS_FULL ? 6 : 3, PANELS = IS_FULL ? 4 : 2;  // whose sums fit into the registers
static_assert(PANELS > 1, "a block has a panel of a projection and one of its gate");
constexpr int BLOCK_ROWS = 10 * ROWS;
static_assert(BLOCK_ROWS * PANELS * PANEL <= MAX_SUMS, "a block has at most MAX_SUMS sums");

// Codes of the next inputs of some panels, which a tile prefetches line by line: of many at a time some are lost.
struct Ahead {
    const char* from;
    int64_t stride, panels;
    int64_t bytes;  // of 4 inputs

    void prefetch(int64_t k) const {
        for (int64_t p = 0; p < panels; ++p) __builtin_prefetch(from + p * stride + k / 4 * bytes, 0, 3);
    }
};

struct Floats32 {
    using X = float;
    static constexpr int64_t CHUNK = 32, DIRECT_ROWS = 0;

    // Inputs k to k + count of a panel, which are in one group:
    // widened[count][PANEL].
    template <class Weight>
    static void widen(float* widened, CodedPanel panel, int64_t k, int64_t count) {
        constexpr int64_t PARTS = PANEL / WIDTH;
        const int64_t at = k / panel.header->group * PANEL;
        Reg scale[PARTS], zero[PARTS], minimum[PARTS];
        for (int64_t r = 0; r < PARTS; ++r) {
            const bool has_minima = panel.header->minima;
            scale[r] = panel.scales<Reg>(at + r * WIDTH);
            zero[r] = has_minima ? Reg{} : panel.zeros<Reg>(at + r * WIDTH) + (float)Weight::CENTER;
            minimum[r] = has_minima ? panel.minima<Reg>(at + r * WIDTH) : Reg{};
        }
        for (int64_t part = k / 4; part < (k + count) / 4; ++part) {
            const char* step = panel.codes() + part / 8 * Weight::LINES * 64;
#pragma GCC unroll 4
            for (int64_t r = 0; r < PARTS; ++r) {
                const RegBits words = read_part<Weight, RegBits>(step, part % 8, r * WIDTH);
#pragma GCC unroll 4
                for (int64_t i = 0; i < 4; ++i) {
                    const RegBits codes = words >> (uint32_t)(8 * i) & 0xffu;
                    const Reg value = multiply_add(widen_codes<Weight, Reg>(codes) - zero[r], scale[r], -minimum[r]);
                    memcpy(widened + (part * 4 - k + i) * PANEL + r * WIDTH, &value, sizeof value);
                }
            }
        }
    }

    // Adds the products of rows of x and widened inputs of panels to
    // sums[ROWS][PANELS][PANEL].
    template <int ROWS, int PANELS>
    static void multiply(float* sums, const float* x, int64_t stride, const float* widened, int64_t count,
                         const CodedPanel&, int64_t, const Ahead& ahead) {
        constexpr int64_t REGS = PANELS * PANEL / WIDTH, PARTS = PANEL / WIDTH;
        Reg sum[ROWS][REGS];
        memcpy(sum, sums, sizeof sum);
        for (int64_t k = 0; k < count; ++k) {
            if (k % 4 == 0) ahead.prefetch(k);
            Reg w[REGS];
#pragma GCC unroll 8
            for (int64_t r = 0; r < REGS; ++r)
                memcpy(&w[r], widened + (r / PARTS * CHUNK + k) * PANEL + r % PARTS * WIDTH, sizeof(Reg));
#pragma GCC unroll 8
            for (int64_t row = 0; row < ROWS; ++row) {
                const Reg value = broadcast(x + row * stride + k);
#pragma GCC unroll 8
                for (int64_t r = 0; r < REGS; ++r) sum[row][r] = multiply_add(w[r], value, sum[row][r]);
            }
        }
        memcpy(sums, sum, sizeof sum);
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
// The two bytes of the bf16 of each code of E4M3 without its sign.
struct E4M3Table {
    uint8_t low[128], high[128];
    constexpr E4M3Table() : low(), high() {
        for (int code = 0; code < 128; ++code) {
            int exponent = code >> 3, mantissa = code & 7;
            if (!exponent && mantissa)  // mantissa * 2^-9, as 2^e * 1.m
                for (exponent = 1; mantissa < 8; --exponent) mantissa *= 2;
            const int bits = code ? (exponent + 120) << 7 | (mantissa & 7) << 4 : 0;
            low[code] = (uint8_t)bits;
            high[code] = (uint8_t)(bits >> 8);
        }
    }
};
alignas(64) constexpr E4M3Table E4M3;

struct Pairs {
    using X = bf16;
    static constexpr int64_t CHUNK = widened::CHUNK, DIRECT_ROWS = 2;

    // E4M3 as bf16: pairs of the inputs 0 and 2, and 1 and 3, of each four.
    struct Widen {
        const __m512i low[2] = {_mm512_load_si512(E4M3.low), _mm512_load_si512(E4M3.low + 64)};
        const __m512i high[2] = {_mm512_load_si512(E4M3.high), _mm512_load_si512(E4M3.high + 64)};
        const __m512i sign = _mm512_set1_epi8((char)0x80), odd = _mm512_set1_epi16((short)0xff00);

        void operator()(__m512i (&pairs)[2], const char* from) const {
            const __m512i codes = _mm512_loadu_si512(from);
            const __m512i lower = _mm512_permutex2var_epi8(low[0], codes, low[1]);
            const __m512i upper =
                _mm512_or_si512(_mm512_permutex2var_epi8(high[0], codes, high[1]), _mm512_and_si512(codes, sign));
            pairs[0] = _mm512_or_si512(_mm512_slli_epi16(upper, 8), _mm512_andnot_si512(odd, lower));
            pairs[1] = _mm512_or_si512(_mm512_and_si512(upper, odd), _mm512_srli_epi16(lower, 8));
        }
    };

    template <int ROWS, int PANELS>
    static void add_scaled(float* sums, const __m512 (&sum)[ROWS][PANELS], const CodedPanel& w, int64_t at) {
#pragma GCC unroll 4
        for (int64_t p = 0; p < PANELS; ++p) {
            const __m512 scale = (__m512)w.next(p).scales<Floats>(at);
#pragma GCC unroll 8
            for (int64_t row = 0; row < ROWS; ++row) {
                float* total = sums + (row * PANELS + p) * PANEL;
                _mm512_storeu_ps(total, _mm512_fmadd_ps(sum[row][p], scale, _mm512_loadu_ps(total)));
            }
        }
    }

    // Inputs k to k + count of a panel, which are in one group: widened[count /
    // 2][PANEL][2].
    template <class Weight>
    static void widen(bf16* widened, CodedPanel panel, int64_t k, int64_t count) {
        const Widen widen;
        const char* from = panel.codes() + k / 4 * 64;
        for (int64_t i = 0; i < count / 4; ++i) {
            __m512i pairs[2];
            widen(pairs, from + i * 64);
            _mm512_storeu_si512(widened + i * 4 * PANEL, pairs[0]);
            _mm512_storeu_si512(widened + i * 4 * PANEL + 2 * PANEL, pairs[1]);
        }
    }

    template <int ROWS, int PANELS>
    static void multiply(float* sums, const bf16* x, int64_t stride, const bf16* widened, int64_t count,
                         const CodedPanel& w, int64_t at, const Ahead& ahead) {
        __m512 sum[ROWS][PANELS] = {};
        for (int64_t k = 0; k < count; k += 4) {
            ahead.prefetch(k);
            pairs::add_pair(sum, x + k, stride, widened + k * PANEL, CHUNK * PANEL);
            pairs::add_pair(sum, x + k + 2, stride, widened + (k + 2) * PANEL, CHUNK * PANEL);
        }
        add_scaled(sums, sum, w, at);
    }

    // As `widen` and `multiply` for few rows, without scratch memory.
    template <int ROWS, int PANELS>
    static void multiply_directly(float* sums, const bf16* x, int64_t stride, int64_t k, int64_t count,
                                  const CodedPanel& w, int64_t at, const Ahead& ahead) {
        const Widen widen;
        const int64_t panel = w.header->panel_bytes;
        const char* from = w.codes() + k / 4 * 64;
        __m512 sum[ROWS][PANELS] = {};
        for (int64_t i = 0; i < count; i += 4, from += 64)
#pragma GCC unroll 4
            for (int64_t p = 0; p < PANELS; ++p) {
                __builtin_prefetch(ahead.from + i * 16 + p * panel, 0, 3);
                __m512i words[2];
                widen(words, from + p * panel);
#pragma GCC unroll 4
                for (int64_t row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
                    for (int64_t j = 0; j < 2; ++j)
                        sum[row][p] = _mm512_dpbf16_ps(sum[row][p], (__m512bh)words[j],
                                                       pairs::broadcast_pair(x + row * stride + i + 2 * j));
            }
        add_scaled(sums, sum, w, at);
    }

    // [rows][K], each four elements in the order 0, 2, 1, 3.
    static void prepare(void* prepared, const bf16* const* x, int64_t rows, int64_t K) {
        pairs::copy_rows(prepared, x, rows, K, round_up(K, DEPTH));
        const int64_t count = rows * round_up(K, DEPTH);
        for (int64_t i = 0; i < count; i += DEPTH) {
            void* at = (bf16*)prepared + i;
            const __m512i swapped = _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(_mm512_loadu_si512(at), 0xd8), 0xd8);
            _mm512_storeu_si512(at, swapped);
        }
    }
};
#endif

template <class Kind, class Weight>
struct Blocks {
    using X = typename Kind::X;
    using Multiply = void (*)(float*, const X*, int64_t, const X*, int64_t, const CodedPanel&, int64_t, const Ahead&);
    using Directly = void (*)(float*, const X*, int64_t, int64_t, int64_t, const CodedPanel&, int64_t, const Ahead&);

    template <size_t... I>
    static Multiply at(int64_t index, std::index_sequence<I...>) {
        static constexpr Multiply table[] = {Kind::template multiply<I / PANELS + 1, I % PANELS + 1>...};
        return table[index];
    }
    template <size_t... I>
    static Directly directly_at(int64_t index, std::index_sequence<I...>) {
        static constexpr Directly table[] = {Kind::template multiply_directly<I / PANELS + 1, I % PANELS + 1>...};
        return table[index];
    }
    static void block(float* sums, const void* prepared, int64_t first, int64_t rows, int64_t K, CodedPanel w,
                      int64_t panels, Prefetch) {
        alignas(64) X scratch[PANELS * Kind::CHUNK * PANEL];
        const int64_t padded = round_up(K, DEPTH), group = w.header->group;
        const int64_t parts = (rows + ROWS - 1) / ROWS;
        memset(sums, 0, rows * panels * PANEL * sizeof(float));
        for (int64_t k = 0, count = 0; k < padded; k += count) {
            count = minimum(minimum(Kind::CHUNK, group - k % group), padded - k);
            const int64_t after = k + count;
            const char* next = after < padded ? w.codes() + after / DEPTH * Weight::LINES * 64 : w.next(panels).codes();
            Ahead ahead = {next, w.header->panel_bytes, panels, Weight::LINES * 8};
            if constexpr (Kind::DIRECT_ROWS > 0)
                if (rows <= Kind::DIRECT_ROWS) {
                    const X* x = (const X*)prepared + first * padded + k;
                    const auto multiply = directly_at((rows - 1) * PANELS + panels - 1,
                                                      std::make_index_sequence<Kind::DIRECT_ROWS * PANELS>{});
                    multiply(sums, x, padded, k, count, w, k / group * PANEL, ahead);
                    continue;
                }
            for (int64_t p = 0; p < panels; ++p)
                Kind::template widen<Weight>(scratch + p * Kind::CHUNK * PANEL, w.next(p), k, count);
            for (int64_t part = 0; part < parts; ++part) {
                const Range range = split_range(rows, 1, part, parts);
                const X* x = (const X*)prepared + (first + range.first) * padded + k;
                auto multiply =
                    at((range.count() - 1) * PANELS + panels - 1, std::make_index_sequence<ROWS * PANELS>{});
                const Range mine = split_range(panels, 1, part, parts);
                ahead.from = next + mine.first * w.header->panel_bytes;
                ahead.panels = mine.count();
                multiply(sums + range.first * panels * PANEL, x, padded, scratch, count, w, k / group * PANEL, ahead);
            }
        }
    }
};

template <class Element, class Weight, class Kind>
constexpr Microkernel<Element, Weight> microkernel(void (*prepare)(void*, const Element* const*, int64_t, int64_t),
                                                   const char* name) {
    return {{{ANY_ROWS, BLOCK_ROWS, PANELS}}, 1,   sizeof(typename Kind::X), do_nothing, do_nothing, prepare,
            Blocks<Kind, Weight>::block,      name};
}
template <class Element, class Weight>
constexpr Microkernel<Element, Weight> FLOAT_MICROKERNEL =
    microkernel<Element, Weight, Floats32>(vectors::prepare<Element>, "float32");
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
template <class Weight>
constexpr Microkernel<bf16, Weight> PAIR_MICROKERNEL = microkernel<bf16, Weight, Pairs>(Pairs::prepare, "AVX512_BF16");
#endif

}  // namespace widened
}  // namespace sage
