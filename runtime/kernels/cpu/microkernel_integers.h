// Microkernel of coded weights (coded.h) in integers, with AVX512_VNNI.
//
// 32 elements of x become integers of 15 bits with one scale, a power of two: those of bf16 are exact if they are at
// least 1/64 of the largest of the 32, and the others are within 2^-14 of it. If more than half are below 1/16 of the
// largest, what rounding took of them becomes integers too, so that an outlier does not cost the others their bits.
// Each integer is two bytes, so that a product takes two `vpdpbusd`; sums of 32 products are exact in int32, in any
// order, and are added in float32 after scaling.
#pragma once

#include "coded.h"
#include "microkernel_vector.h"

#if defined(__AVX512VNNI__)
namespace sage {
namespace integers {

// 32 elements of a row of x: value = (256 * upper + lower) * scale.
struct Integers {
    int8_t bytes[2 * DEPTH];  // the lower and then the upper ones; or words, inputs 0, 2, 1 and 3 of each four
    float scale;
    int32_t sums[2];   // of the integers, of each half
    int32_t has_rest;  // whether a second step has what rounding took
};
struct XBlock {
    Integers whole, rest;
};
constexpr int64_t X_BYTES = 5;         // per element
constexpr int64_t AHEAD_BYTES = 2048;  // between codes that are read and those that are prefetched
static_assert(sizeof(XBlock) == X_BYTES * DEPTH, "prepared x consists of blocks");

// `most` is the largest absolute value. Leaves in x what rounding took.
template <bool ARE_WORDS>
inline void split(Integers& out, __m512 (&x)[2], float most) {
    // most is at least 2^e and below 2^(e+1): the largest integer is at most 2^14.
    const int32_t exponent = most > 0x1p-100f ? (int32_t)(bits_of<uint32_t>(most) >> 23) - 127 : -100;
    const __m512 factor = _mm512_set1_ps(bits_of<float>((uint32_t)(127 + 13 - exponent) << 23));
    out.scale = bits_of<float>((uint32_t)(127 - 13 + exponent) << 23);
    for (int64_t half = 0; half < 2; ++half) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(x[half], factor));
        if constexpr (ARE_WORDS) {
            const __m256i words = _mm512_cvtepi32_epi16(whole);
            const __m256i swapped = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8);
            _mm256_storeu_si256((__m256i*)(out.bytes + half * 32), swapped);
        } else {
            const __m512i lower = _mm512_srai_epi32(_mm512_slli_epi32(whole, 24), 24);
            const __m512i upper = _mm512_srai_epi32(_mm512_sub_epi32(whole, lower), 8);
            _mm_storeu_si128((__m128i*)(out.bytes + half * 16), _mm512_cvtepi32_epi8(lower));
            _mm_storeu_si128((__m128i*)(out.bytes + DEPTH + half * 16), _mm512_cvtepi32_epi8(upper));
        }
        out.sums[half] = _mm512_reduce_add_epi32(whole);
        x[half] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(out.scale), x[half]);
    }
}

inline float largest(const __m512 (&x)[2]) {
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(x[0]), _mm512_abs_ps(x[1])));
}

template <bool ARE_WORDS, class Position, class Element>
inline void quantise(XBlock& out, const Element* from, Position low, Position high) {
    __m512 x[2] = {(__m512)load(from, low), (__m512)load(from, high)};
    const float most = largest(x);
    // x - x is NaN for an infinity, too: the results of such rows are NaN.
    const __m512 odd = _mm512_add_ps(_mm512_sub_ps(x[0], x[0]), _mm512_sub_ps(x[1], x[1]));
    const bool is_finite = !_mm512_cmp_ps_mask(odd, odd, _CMP_UNORD_Q);
    int num_small = 0;
    for (const __m512& half : x) {
        const __mmask16 is_small = _mm512_cmp_ps_mask(_mm512_abs_ps(half), _mm512_set1_ps(most / 16), _CMP_LT_OQ);
        num_small += __builtin_popcount(_mm512_mask_cmp_ps_mask(is_small, half, _mm512_setzero_ps(), _CMP_NEQ_UQ));
    }
    split<ARE_WORDS>(out.whole, x, most);
    if (!is_finite) out.whole.scale = NAN;
    out.whole.has_rest = is_finite && num_small > DEPTH / 2;
    if (out.whole.has_rest) split<ARE_WORDS>(out.rest, x, largest(x));
}

template <bool ARE_WORDS, class Element>
inline void prepare(void* prepared, const Element* const* x, int64_t rows, int64_t K) {
    const int64_t blocks = round_up(K, DEPTH) / DEPTH;
    XBlock* out = (XBlock*)prepared;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < blocks; ++i, ++out) {
            const Element* from = x[row] + i * DEPTH;
            const int64_t left = K - i * DEPTH;
            if (left >= DEPTH)
                quantise<ARE_WORDS>(*out, from, Block{0}, Block{16});
            else
                quantise<ARE_WORDS>(*out, from, Tail{0, minimum(left, 16)}, Tail{16, maximum(left - 16, 0)});
        }
}

template <class Weight>
inline __m512i part_of(const char* step, int64_t part) {
    const __m512i codes = (__m512i)read_part<Weight, Bits>(step, part);
    if constexpr (!std::is_same<Weight, fp4_codes>::value) return codes;
    const __m512i values = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)fp4_codes::VALUES));
    return _mm512_shuffle_epi8(values, codes);
}

inline __m512i four_bytes(const int8_t* x) {
    int32_t bytes;
    memcpy(&bytes, x, sizeof bytes);
    return _mm512_set1_epi32(bytes);
}

// The sum of the integers of half `half`, or of both. Without a sign, as those of a row that is not finite wrap around.
template <bool IS_WHOLE>
inline int32_t sum_of(const Integers& x, int64_t half) {
    return IS_WHOLE ? (int32_t)((uint32_t)x.sums[0] + (uint32_t)x.sums[1]) : x.sums[half];
}

// Scales of a group, and what is subtracted for each unit of the sum of x.
template <int PANELS>
struct Group {
    __m512 scale[PANELS], offset[PANELS];
    bool has_offset;
    int32_t center;
};

// Codes of a step of the first panel, and those to prefetch meanwhile: of many prefetches at a time some are lost.
struct Codes {
    const char *step, *ahead;
};

// Adds the bytes of x times codes: the upper ones to `sum`, the lower ones to `lower`.
template <class Weight, int PARTS, bool UPPER, bool LOWER, int ROWS, int PANELS>
inline __attribute__((always_inline)) void add_products(__m512i (&sum)[ROWS][PANELS], __m512i (&lower)[ROWS][PANELS],
                                                        const Integers* const* x, Codes at, int64_t panel,
                                                        int64_t first) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < PARTS; ++i) {
        if (UPPER && (first + i) * Weight::LINES % 8 < Weight::LINES) {
            const char* line = at.ahead + (first + i) * Weight::LINES / 8 * 64;
#pragma GCC unroll 4
            for (int64_t p = 0; p < PANELS; ++p) __builtin_prefetch(line + p * panel, 0, 3);
        }
        __m512i codes[PANELS];
#pragma GCC unroll 4
        for (int64_t p = 0; p < PANELS; ++p) codes[p] = part_of<Weight>(at.step + p * panel, first + i);
#pragma GCC unroll 4
        for (int64_t row = 0; row < ROWS; ++row) {
            if constexpr (UPPER) {
                const __m512i bytes = four_bytes(x[row]->bytes + DEPTH + (first + i) * 4);
#pragma GCC unroll 4
                for (int64_t p = 0; p < PANELS; ++p) sum[row][p] = _mm512_dpbusd_epi32(sum[row][p], codes[p], bytes);
            }
            if constexpr (LOWER) {
                const __m512i bytes = four_bytes(x[row]->bytes + (first + i) * 4);
#pragma GCC unroll 4
                for (int64_t p = 0; p < PANELS; ++p)
                    lower[row][p] = _mm512_dpbusd_epi32(lower[row][p], codes[p], bytes);
            }
        }
    }
}

// PARTS parts of a step: integers of some rows times codes of some panels, scaled and added to sums.
template <class Weight, int PARTS, int ROWS, int PANELS>
inline __attribute__((always_inline)) void add_parts(float* sums, const Integers* const* x, Codes at, int64_t panel,
                                                     int64_t first, const Group<PANELS>& group) {
    constexpr bool IS_SMALL = ROWS * PANELS <= 8;  // the registers have room for the sums of both bytes
    __m512i sum[ROWS][PANELS] = {}, lower[ROWS][PANELS] = {};
    add_products<Weight, PARTS, true, IS_SMALL>(sum, lower, x, at, panel, first);
    int32_t x_sums[ROWS];
#pragma GCC unroll 4
    for (int64_t row = 0; row < ROWS; ++row) {
        x_sums[row] = sum_of<PARTS == 8>(*x[row], first / 4);
        // Without a sign, as those of a row that is not finite wrap around.
        const __m512i centers = _mm512_set1_epi32((int32_t)(0 - (uint32_t)group.center * (uint32_t)x_sums[row]));
#pragma GCC unroll 4
        for (int64_t p = 0; p < PANELS; ++p) {
            const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(sum[row][p], 8), centers);
            sum[row][p] = IS_SMALL ? _mm512_add_epi32(upper, lower[row][p]) : upper;
        }
    }
    if constexpr (!IS_SMALL) {
        asm("" : "+r"(at.step));  // or the compiler would keep all codes in registers, and spill the sums
        add_products<Weight, PARTS, false, true>(sum, sum, x, at, panel, first);
    }
#pragma GCC unroll 4
    for (int64_t row = 0; row < ROWS; ++row) {
        const __m512 x_scale = _mm512_set1_ps(x[row]->scale), x_sum = _mm512_set1_ps((float)x_sums[row]);
#pragma GCC unroll 4
        for (int64_t p = 0; p < PANELS; ++p) {
            float* to = sums + (row * PANELS + p) * PANEL;
            __m512 total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[row][p]), _mm512_mul_ps(group.scale[p], x_scale),
                                           _mm512_loadu_ps(to));
            if (group.has_offset) total = _mm512_fnmadd_ps(group.offset[p], _mm512_mul_ps(x_sum, x_scale), total);
            _mm512_storeu_ps(to, total);
        }
    }
}

// A step of rows, and what rounding took of those with a rest.
template <class Weight, int PARTS, int ROWS, int PANELS>
inline __attribute__((always_inline)) void add_rows(float* sums, const XBlock* x, int64_t stride, Codes at,
                                                    int64_t panel, int64_t first, const Group<PANELS>& group) {
    const Integers* rows[ROWS];
    int32_t has_rest = 0;
#pragma GCC unroll 4
    for (int64_t row = 0; row < ROWS; ++row) {
        rows[row] = &x[row * stride].whole;
        has_rest |= rows[row]->has_rest;
    }
    add_parts<Weight, PARTS, ROWS, PANELS>(sums, rows, at, panel, first, group);
    if (__builtin_expect(has_rest, 0))
        for (int64_t row = 0; row < ROWS; ++row) {
            const Integers* rest = &x[row * stride].rest;
            if (rows[row]->has_rest)
                add_parts<Weight, PARTS, 1, PANELS>(sums + row * PANELS * PANEL, &rest, at, panel, first, group);
        }
}

template <class Weight, int ROWS, int PANELS>
__attribute__((noinline)) void block(float* sums, const XBlock* x, int64_t K, CodedPanel w, Prefetch prefetch) {
    const CodedHeader& header = *w.header;
    const int64_t blocks = K / DEPTH, panel = header.panel_bytes, step_bytes = Weight::LINES * 64;
    const char *codes = w.codes(), *next = w.next(PANELS).codes() - blocks * step_bytes;
    // The codes of a step of this block, or of the next one behind its end.
    const auto step = [&](int64_t b) -> Codes {
        const int64_t ahead = b + AHEAD_BYTES / step_bytes;
        if (!prefetch.into_l1) prefetch_step(prefetch);
        return {codes + b * step_bytes, (ahead < blocks ? codes : next) + ahead * step_bytes};
    };
    Group<PANELS> group;
    group.has_offset = header.zeros;
    group.center = header.minima ? 0 : Weight::CENTER;
    const auto begin = [&](int64_t at) {
#pragma GCC unroll 4
        for (int64_t p = 0; p < PANELS; ++p) {
            const CodedPanel of = w.next(p);
            group.scale[p] = (__m512)of.scales<Floats>(at);
            if (header.minima)
                group.offset[p] = (__m512)of.minima<Floats>(at);
            else if (header.zeros)
                group.offset[p] = _mm512_mul_ps((__m512)of.zeros<Floats>(at), group.scale[p]);
        }
    };
    memset(sums, 0, ROWS * PANELS * PANEL * sizeof(float));
    if (header.group < DEPTH) {
        for (int64_t b = 0; b < blocks; ++b) {
            const Codes at = step(b);
            for (int64_t half = 0; half < 2; ++half) {
                begin((2 * b + half) * PANEL);
                add_rows<Weight, 4, ROWS>(sums, x + b, blocks, at, panel, half * 4, group);
            }
        }
        return;
    }
    const int64_t group_blocks = header.group / DEPTH;
    for (int64_t first = 0, at = 0; first < blocks; first += group_blocks, at += PANEL) {
        begin(at);
        for (int64_t b = first; b < first + group_blocks && b < blocks; ++b)
            add_rows<Weight, 8, ROWS>(sums, x + b, blocks, step(b), panel, 0, group);
    }
}

// One function per number of rows and panels, as in microkernel_vector.h.
template <class Weight, int ROWS, int PANELS>
struct Blocks {
    using Function = void (*)(float*, const XBlock*, int64_t, CodedPanel, Prefetch);

    template <size_t... I>
    static Function at(int64_t index, std::index_sequence<I...>) {
        static constexpr Function table[] = {function<I / PANELS + 1, I % PANELS + 1>()...};
        return table[index];
    }
    template <int R, int P>
    static constexpr Function function() {
        if constexpr (R <= 2 || P <= 2) return integers::block<Weight, R, P>;
        return nullptr;
    }
    static void block(float* sums, const void* prepared, int64_t first, int64_t rows, int64_t K, CodedPanel w,
                      int64_t panels, Prefetch prefetch) {
        const int64_t padded = round_up(K, DEPTH);
        const Function compute = at((rows - 1) * PANELS + panels - 1, std::make_index_sequence<ROWS * PANELS>{});
        compute(sums, (const XBlock*)prepared + first * padded / DEPTH, padded, w, prefetch);
    }
};

}  // namespace integers
}  // namespace sage
#endif
