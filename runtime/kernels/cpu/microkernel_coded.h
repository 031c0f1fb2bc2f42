// Microkernels of coded weights (coded.h) in vector registers.
//
// With AVX512_VNNI and x of 16 bits: integer dot products. 32 elements of x become integers of 15 bits with one scale,
// a power of two. They are exact if they are at least 1/64 of the largest of the 32, and else within 2^-14 of it, far
// below the rounding of a result to bf16. Each is two bytes, so that a product takes two `vpdpbusd`; sums of 32
// products are exact in int32.
//
// Otherwise: the float32 multiply-adds of other weights, with codes that are widened and scaled as they are read.
#pragma once

#include "coded.h"
#include "microkernel_vector.h"

namespace sage {
namespace coded {

using vectors::broadcast;
using vectors::multiply_add;
using vectors::Reg;
using vectors::RegBits;
using vectors::WIDTH;

// Codes of one output at position `i` of a step, as floats with the center.
template <class Weight>
inline Reg widened(RegBits words, int64_t i) {
    constexpr bool IS_BYTE = Weight::STEP == 4;
    const RegBits codes = words >> (IS_BYTE ? 8 * i : 8 * (i % 4) + i / 4 * 4) & (IS_BYTE ? 0xff : 0xf);
    if constexpr (std::is_same<Weight, fp4_codes>::value) {
#if defined(__AVX512F__)
        const Floats values = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
        return (Reg)_mm512_permutexvar_ps((__m512i)codes, (__m512)values);
#else
        Reg found;
        for (int64_t lane = 0; lane < WIDTH; ++lane) found[lane] = Weight::VALUES[codes[lane]];
        return found;
#endif
    }
    typedef int32_t RegInts __attribute__((vector_size(WIDTH * 4)));
    return __builtin_convertvector((RegInts)codes, Reg);
}

template <class Weight, int ROWS, int PANELS>
__attribute__((noinline)) void float_block(float* sums, const float* x, int64_t K, CodedPanel w, Prefetch prefetch) {
    constexpr int64_t REGS = PANELS * PANEL / WIDTH, PARTS = PANEL / WIDTH, STEP = Weight::STEP;
    const int64_t group = w.header->group;
    Reg sum[ROWS][REGS] = {};
    for (int64_t first = 0; first < K; first += group) {
        Reg scale[REGS], offset[REGS];
        for (int64_t r = 0; r < REGS; ++r) {
            const int64_t at = first / group * PANEL + r % PARTS * WIDTH;
            const CodedPanel panel = w.next(r / PARTS);
            scale[r] = panel.scales<Reg>(at);
            offset[r] = -(panel.zeros<Reg>(at) + (float)Weight::CENTER) * scale[r];
        }
        const int64_t stop = first + group < K ? first + group : K;
        for (int64_t k = first; k < stop; k += STEP) {
            if (k % DEPTH == 0) prefetch_step(prefetch);
            RegBits words[REGS];
            for (int64_t r = 0; r < REGS; ++r)
                memcpy(&words[r], w.next(r / PARTS).codes() + k / STEP * PANEL * 4 + r % PARTS * WIDTH * 4,
                       sizeof(RegBits));
#pragma GCC unroll 8
            for (int64_t i = 0; i < STEP; ++i)
#pragma GCC unroll 8
                for (int64_t r = 0; r < REGS; ++r) {
                    const Reg value = multiply_add(widened<Weight>(words[r], i), scale[r], offset[r]);
#pragma GCC unroll 8
                    for (int64_t row = 0; row < ROWS; ++row)
                        sum[row][r] = multiply_add(value, broadcast(x + row * K + k + i), sum[row][r]);
                }
        }
    }
    memcpy(sums, sum, sizeof sum);
}

#if defined(__AVX512VNNI__)
// 32 elements of a row of x as integers: value = (256 * upper + lower) * scale.
struct XBlock {
    int8_t lower[DEPTH], upper[DEPTH];
    float scale;
    int32_t sum;       // of the integers
    float scaled_sum;  // sum * scale
};
constexpr int64_t X_BYTES = 3;  // per element
static_assert(sizeof(XBlock) <= X_BYTES * DEPTH, "prepared x has room for its blocks");

inline XBlock* block_at(void* prepared, int64_t i) { return (XBlock*)((char*)prepared + i * X_BYTES * DEPTH); }

template <class Position, class Element>
inline void quantise(XBlock& out, const Element* x, Position low, Position high) {
    const Floats a = load(x, low), b = load(x, high);
    const __m512 larger = _mm512_max_ps(_mm512_abs_ps((__m512)a), _mm512_abs_ps((__m512)b));
    const float most = _mm512_reduce_max_ps(larger);
    // most is at least 2^e and below 2^(e+1): the largest integer is below 2^14.
    const int32_t exponent = most > 0x1p-100f ? (int32_t)(bits_of<uint32_t>(most) >> 23) - 127 : -100;
    const float factor = bits_of<float>((uint32_t)(127 + 13 - exponent) << 23);
    const __m512i whole[2] = {_mm512_cvtps_epi32(_mm512_mul_ps((__m512)a, _mm512_set1_ps(factor))),
                              _mm512_cvtps_epi32(_mm512_mul_ps((__m512)b, _mm512_set1_ps(factor)))};
    for (int64_t half = 0; half < 2; ++half) {
        const __m512i lower = _mm512_srai_epi32(_mm512_slli_epi32(whole[half], 24), 24);
        const __m512i upper = _mm512_srai_epi32(_mm512_sub_epi32(whole[half], lower), 8);
        _mm_storeu_si128((__m128i*)(out.lower + half * 16), _mm512_cvtepi32_epi8(lower));
        _mm_storeu_si128((__m128i*)(out.upper + half * 16), _mm512_cvtepi32_epi8(upper));
    }
    // x - x is NaN for an infinity, too: the results of such rows are NaN.
    const __m512 odd = _mm512_add_ps(_mm512_sub_ps((__m512)a, (__m512)a), _mm512_sub_ps((__m512)b, (__m512)b));
    const bool is_finite = !_mm512_cmp_ps_mask(odd, odd, _CMP_UNORD_Q);
    out.scale = is_finite ? bits_of<float>((uint32_t)(127 - 13 + exponent) << 23) : NAN;
    out.sum = _mm512_reduce_add_epi32(_mm512_add_epi32(whole[0], whole[1]));
    out.scaled_sum = (float)out.sum * out.scale;
}

template <class Element>
inline void prepare_integers(void* prepared, const Element* const* x, int64_t rows, int64_t K) {
    const int64_t blocks = round_up(K, DEPTH) / DEPTH;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < blocks; ++i) {
            XBlock& out = *block_at(prepared, row * blocks + i);
            const Element* from = x[row] + i * DEPTH;
            const int64_t left = K - i * DEPTH;
            if (left >= DEPTH)
                quantise(out, from, Block{0}, Block{16});
            else
                quantise(out, from, Tail{0, minimum(left, 16)}, Tail{16, maximum(left - 16, 0)});
        }
}

// The codes of a step of one panel, four inputs of each output at a time.
template <class Weight>
inline void read_codes(__m512i (&codes)[Weight::STEP / 4], const char* from) {
    const __m512i bytes = _mm512_loadu_si512(from);
    if constexpr (Weight::STEP == 4) {
        codes[0] = bytes;
    } else {
        const __m512i mask = _mm512_set1_epi8(0xf);
        codes[0] = _mm512_and_si512(bytes, mask);
        codes[1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask);
        if constexpr (std::is_same<Weight, fp4_codes>::value) {
            const __m512i values = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)Weight::VALUES));
            for (auto& one : codes) one = _mm512_shuffle_epi8(values, one);
        }
    }
}

inline __m512i four_bytes(const int8_t* x) {
    int32_t bytes;
    memcpy(&bytes, x, sizeof bytes);
    return _mm512_set1_epi32(bytes);
}

template <class Weight, int ROWS, int PANELS>
__attribute__((noinline)) void integer_block(float* sums, const void* x, int64_t K, CodedPanel w, Prefetch prefetch) {
    constexpr int64_t STEP = Weight::STEP, PARTS = STEP / 4;
    const int64_t blocks = K / DEPTH, group_blocks = w.header->group / DEPTH, panel = w.header->panel_bytes;
    const bool has_zeros = w.header->zeros;
    const char* codes = w.codes();
    __m512 sum[ROWS][PANELS] = {}, scale[PANELS], zero[PANELS];
    for (int64_t first = 0, group = 0; first < blocks; first += group_blocks, ++group) {
#pragma GCC unroll 4
        for (int64_t p = 0; p < PANELS; ++p) {
            scale[p] = (__m512)w.next(p).scales<Floats>(group * PANEL);
            if (has_zeros) zero[p] = _mm512_mul_ps((__m512)w.next(p).zeros<Floats>(group * PANEL), scale[p]);
        }
        for (int64_t b = first; b < first + group_blocks && b < blocks; ++b) {
            prefetch_step(prefetch);
            __m512i lower[ROWS][PANELS], upper[ROWS][PANELS] = {};
            const XBlock* rows[ROWS];
#pragma GCC unroll 8
            for (int64_t row = 0; row < ROWS; ++row) {
                rows[row] = (const XBlock*)((const char*)x + (row * blocks + b) * X_BYTES * DEPTH);
                const __m512i start = _mm512_set1_epi32(rows[row]->sum * (int32_t)-Weight::CENTER);
#pragma GCC unroll 4
                for (int64_t p = 0; p < PANELS; ++p) lower[row][p] = start;
            }
#pragma GCC unroll 8
            for (int64_t k = 0; k < DEPTH; k += STEP, codes += PANEL * 4) {
                __m512i read[PANELS][PARTS];
#pragma GCC unroll 4
                for (int64_t p = 0; p < PANELS; ++p) read_codes<Weight>(read[p], codes + p * panel);
#pragma GCC unroll 2
                for (int64_t part = 0; part < PARTS; ++part)
#pragma GCC unroll 8
                    for (int64_t row = 0; row < ROWS; ++row) {
                        const __m512i x_lower = four_bytes(rows[row]->lower + k + part * 4);
                        const __m512i x_upper = four_bytes(rows[row]->upper + k + part * 4);
#pragma GCC unroll 4
                        for (int64_t p = 0; p < PANELS; ++p) {
                            lower[row][p] = _mm512_dpbusd_epi32(lower[row][p], read[p][part], x_lower);
                            upper[row][p] = _mm512_dpbusd_epi32(upper[row][p], read[p][part], x_upper);
                        }
                    }
            }
#pragma GCC unroll 8
            for (int64_t row = 0; row < ROWS; ++row) {
                const __m512 x_scale = _mm512_set1_ps(rows[row]->scale);
#pragma GCC unroll 4
                for (int64_t p = 0; p < PANELS; ++p) {
                    const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(upper[row][p], 8), lower[row][p]);
                    sum[row][p] =
                        _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_mul_ps(scale[p], x_scale), sum[row][p]);
                }
                if (has_zeros) {
                    const __m512 x_sum = _mm512_set1_ps(rows[row]->scaled_sum);
                    for (int64_t p = 0; p < PANELS; ++p) sum[row][p] = _mm512_fnmadd_ps(zero[p], x_sum, sum[row][p]);
                }
            }
        }
    }
    memcpy(sums, sum, sizeof sum);
}
#endif

// One function per number of rows and panels, as in microkernel_vector.h. Prepared x has `size` bytes per element.
template <class Weight, template <class, int, int> class Kind, int ROWS, int PANELS>
struct Blocks {
    using Function = void (*)(float*, const void*, int64_t, CodedPanel, Prefetch);

    template <size_t... I>
    static Function at(int64_t index, std::index_sequence<I...>) {
        static constexpr Function table[] = {Kind<Weight, I / PANELS + 1, I % PANELS + 1>::block...};
        return table[index];
    }
    static void block(float* sums, const void* prepared, int64_t first, int64_t rows, int64_t K, CodedPanel w,
                      int64_t panels, Prefetch prefetch) {
        const int64_t padded = round_up(K, DEPTH);
        auto function = at((rows - 1) * PANELS + panels - 1, std::make_index_sequence<ROWS * PANELS>{});
        const char* x = (const char*)prepared + first * padded * Kind<Weight, 1, 1>::X_SIZE;
        function(sums, x, padded, w, prefetch);
    }
};

template <class Weight, int ROWS, int PANELS>
struct FloatBlock {
    static constexpr int64_t X_SIZE = sizeof(float);
    static void block(float* sums, const void* x, int64_t K, CodedPanel w, Prefetch prefetch) {
        float_block<Weight, ROWS, PANELS>(sums, (const float*)x, K, w, prefetch);
    }
};
template <class Element, class Weight, int ROWS, int PANELS>
constexpr Microkernel<Element, Weight> FLOAT_MICROKERNEL = {ROWS,
                                                            PANELS,
                                                            ROWS,
                                                            PANELS,
                                                            1,
                                                            sizeof(float),
                                                            do_nothing,
                                                            do_nothing,
                                                            vectors::prepare<Element>,
                                                            Blocks<Weight, FloatBlock, ROWS, PANELS>::block,
                                                            "float32"};

#if defined(__AVX512VNNI__)
template <class Weight, int ROWS, int PANELS>
struct IntegerBlock {
    static constexpr int64_t X_SIZE = X_BYTES;
    static void block(float* sums, const void* x, int64_t K, CodedPanel w, Prefetch prefetch) {
        if constexpr (ROWS * PANELS <= 8) integer_block<Weight, ROWS, PANELS>(sums, x, K, w, prefetch);
    }
};
// Blocks of up to 4 rows by 2 panels, or of 2 rows by 4 panels: the registers hold the sums of 8.
template <class Element, class Weight>
constexpr Microkernel<Element, Weight> INTEGER_MICROKERNEL = {4,
                                                              2,
                                                              2,
                                                              4,
                                                              1,
                                                              X_BYTES,
                                                              do_nothing,
                                                              do_nothing,
                                                              prepare_integers<Element>,
                                                              Blocks<Weight, IntegerBlock, 4, 4>::block,
                                                              "AVX512_VNNI"};
#endif

}  // namespace coded
}  // namespace sage
