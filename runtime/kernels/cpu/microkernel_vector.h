// Microkernels in vector registers: for each step along K, a few vectors of the panels times one broadcast value per
// row.
//
// Everything is a float32 multiply-add: f16 and bf16 are widened, weights as they are read and x once when it is
// prepared; widening is exact. Prepared x: [rows][K], K padded with zeros. microkernel_pairs.h multiplies pairs of
// bf16.
#pragma once

#include <utility>

#include "microkernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace sage {
namespace vectors {

// Floats of one register, which is shorter than 16 lanes on some machines.
#if defined(__AVX512F__)
constexpr int64_t WIDTH = 16;
#elif defined(__AVX__)
constexpr int64_t WIDTH = 8;
#else
constexpr int64_t WIDTH = 4;
#endif
typedef float Reg __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t RegBits __attribute__((vector_size(WIDTH * 4)));

inline Reg multiply_add(Reg a, Reg b, Reg c) {
#if defined(__AVX512F__)
    return (Reg)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Reg)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_FEATURE_FMA) && defined(__aarch64__)
    return (Reg)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

inline Reg broadcast(const float* x) {
#if defined(__AVX512F__)
    return (Reg)_mm512_set1_ps(*x);
#elif defined(__AVX__)
    return (Reg)_mm256_broadcast_ss(x);
#elif defined(__aarch64__)
    return (Reg)vld1q_dup_f32(x);
#else
    return Reg{*x, *x, *x, *x};
#endif
}

// One step along K: reads GROUP elements of a panel as floats.

template <class Element>
struct Step;

template <>
struct Step<f32> {
    static constexpr int64_t GROUP = 1;
    static void read(Reg (&w)[GROUP], const f32* panel) { memcpy(&w[0], panel, sizeof(Reg)); }
};
template <>
struct Step<f16> {
    static constexpr int64_t GROUP = 1;
    static void read(Reg (&w)[GROUP], const f16* panel) {
#if defined(__AVX512F__)
        w[0] = (Reg)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)panel));
#elif defined(__F16C__)
        w[0] = (Reg)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)panel));
#else
        for (int64_t lane = 0; lane < WIDTH; ++lane) w[0][lane] = widen(panel[lane]);
#endif
    }
};
template <>
struct Step<bf16> {
    static constexpr int64_t GROUP = 2;
    static void read(Reg (&w)[GROUP], const bf16* panel) {
        RegBits pairs;
        memcpy(&pairs, panel, sizeof pairs);
        w[0] = bits_of<Reg>(pairs << 16);
        w[1] = bits_of<Reg>(pairs & 0xffff0000);
    }
};

template <class Element>
inline void prepare(void* prepared, const Element* const* x, int64_t rows, int64_t K) {
    int64_t padded = round_up(K, DEPTH);
    for (int64_t row = 0; row < rows; ++row) {
        float* out = (float*)prepared + row * padded;
        sweep(K, [&](auto k) { store(out, k, load(x[row], k)); });
        for (int64_t k = K; k < padded; ++k) out[k] = 0;
    }
}

template <class Element, int ROWS, int PANELS>
__attribute__((noinline)) void float_block(float* sums, const float* x, int64_t K, const Element* w,
                                           Prefetch prefetch) {
    using S = Step<Element>;
    constexpr int64_t REGS = PANELS * PANEL / WIDTH, PARTS = PANEL / WIDTH;
    const int64_t panel = K * PANEL;
    Reg sum[ROWS][REGS] = {};
    for (int64_t k = 0; k < K; k += S::GROUP, w += PANEL * S::GROUP) {
        if (k % DEPTH == 0) prefetch_step(prefetch);
        Reg read[REGS][S::GROUP];
#pragma GCC unroll 16
        for (int64_t r = 0; r < REGS; ++r) S::read(read[r], w + r / PARTS * panel + r % PARTS * WIDTH * S::GROUP);
#pragma GCC unroll 2
        for (int64_t d = 0; d < S::GROUP; ++d)
#pragma GCC unroll 16
            for (int64_t row = 0; row < ROWS; ++row) {
                const Reg value = broadcast(x + row * K + k + d);
#pragma GCC unroll 16
                for (int64_t r = 0; r < REGS; ++r) sum[row][r] = multiply_add(read[r][d], value, sum[row][r]);
            }
    }
    memcpy(sums, sum, sizeof sum);
}

// One function per number of rows and panels: all loop bounds are constants, so the sums of a block stay in registers.

template <class Element, class X>
using BlockFunction = void (*)(float*, const X*, int64_t, const Element*, Prefetch);

template <class Element, int ROWS, int PANELS>
struct FloatBlock {
    using X = float;
    static constexpr BlockFunction<Element, X> function = float_block<Element, ROWS, PANELS>;
};

template <class Element, template <class, int, int> class Kind, int ROWS, int PANELS>
struct Blocks {
    using X = typename Kind<Element, 1, 1>::X;

    template <size_t... I>
    static BlockFunction<Element, X> at(int64_t index, std::index_sequence<I...>) {
        static constexpr BlockFunction<Element, X> table[] = {
            Kind<Element, I / PANELS + 1, I % PANELS + 1>::function...};
        return table[index];
    }
    static void block(float* sums, const void* prepared, int64_t first, int64_t rows, int64_t K, const Element* w,
                      int64_t panels, Prefetch prefetch) {
        int64_t padded = round_up(K, DEPTH);
        auto function = at((rows - 1) * PANELS + panels - 1, std::make_index_sequence<ROWS * PANELS>{});
        function(sums, (const X*)prepared + first * padded, padded, w, prefetch);
    }
};

template <class Element, class Prepare, class Block>
constexpr Microkernel<Element> vector_microkernel(int rows, int panels, size_t x_size, Prepare prepare, Block block,
                                                  const char* name) {
    return {{{ANY_ROWS, rows, panels}}, 1, (int64_t)x_size, do_nothing, do_nothing, prepare, block, name};
}

template <class Element, int ROWS, int PANELS>
constexpr Microkernel<Element> FLOAT_MICROKERNEL = vector_microkernel<Element>(
    ROWS, PANELS, sizeof(float), prepare<Element>, Blocks<Element, FloatBlock, ROWS, PANELS>::block, "float32");

}  // namespace vectors
}  // namespace sage
