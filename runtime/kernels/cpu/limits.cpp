// Loops that measure what a machine can do: memory traffic, and multiply-adds of each instruction set.
//
// All threads run the same part of a loop at the same time. Python divides work by time (`runtime/bench/limits.py`).
#include "sage.h"

#if defined(__AMX_BF16__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sage {

constexpr int64_t LINE_FLOATS = 16;
constexpr int64_t PREFETCH_FLOATS = 2048;

// tensors: data, a total for each part. sizes: bytes, parts, streams that a part reads in turn, passes over the data.
SAGE_KERNEL(limit_read) {
    const float* data = (const float*)tensors[0];
    float* totals = (float*)tensors[1];
    const int64_t parts = sizes[1], streams = sizes[2], passes = sizes[3];
    const int64_t stream = sizes[0] / 4 / parts / streams / (4 * LINE_FLOATS) * (4 * LINE_FLOATS);
    parallel_for(parts, [&](int64_t part) {
        Floats sums[4] = {};
        const float* first = data + part * streams * stream;
        for (int64_t pass = 0; pass < passes; ++pass)
            for (int64_t i = 0; i < stream; i += 4 * LINE_FLOATS)
                for (int64_t s = 0; s < streams; ++s)
                    for (int64_t j = 0; j < 4; ++j) {
                        const float* line = first + s * stream + i + j * LINE_FLOATS;
                        if (streams > 1) __builtin_prefetch(line + PREFETCH_FLOATS);
                        sums[j] += *(const Floats*)line;
                    }
        totals[part] = (sums[0] + sums[1] + sums[2] + sums[3])[0];  // a use, so that the compiler keeps the loop
    });
}

// tensors: data. sizes: bytes, parts.
SAGE_KERNEL(limit_write) {
    char* data = (char*)tensors[0];
    const int64_t part = sizes[0] / sizes[1] / 64 * 64;
    parallel_for(sizes[1], [&](int64_t p) { memset(data + p * part, (int)p + 1, part); });
}

// tensors: source, target. sizes: bytes, parts.
SAGE_KERNEL(limit_copy) {
    const char* source = (const char*)tensors[0];
    char* target = (char*)tensors[1];
    const int64_t part = sizes[0] / sizes[1] / 64 * 64;
    parallel_for(sizes[1], [&](int64_t p) { memcpy(target + p * part, source + p * part, part); });
}

namespace limits {

// Independent sums in registers: enough to hide the latency of a multiply-add, few enough for 16 registers.
constexpr int SUMS = 12;

// A function that adds products to SUMS sums `steps` times, and the operations of one multiply-add.
struct Loop {
    void (*run)(float* out, int64_t steps);
    int64_t flops;
};

template <class Vector, class Multiply>
inline void accumulate(float* out, int64_t steps, Vector a, Vector b, Vector zero, Multiply multiply) {
    Vector sums[SUMS];
    for (int i = 0; i < SUMS; ++i) sums[i] = zero;
    for (int64_t step = 0; step < steps; ++step)
        for (int i = 0; i < SUMS; ++i) sums[i] = multiply(sums[i], a, b);
    for (int i = 0; i < SUMS; ++i) memcpy(out + i, &sums[i], sizeof(float));
}

#if defined(__AVX2__) && defined(__FMA__)
inline void avx2_f32(float* out, int64_t steps) {
    const __m256 one = _mm256_set1_ps(out[0]);
    accumulate(out, steps, one, one, _mm256_setzero_ps(),
               [](__m256 sum, __m256 a, __m256 b) { return _mm256_fmadd_ps(a, b, sum); });
}
#endif

#if defined(__AVX512F__)
inline void avx512_f32(float* out, int64_t steps) {
    const __m512 one = _mm512_set1_ps(out[0]);
    accumulate(out, steps, one, one, _mm512_setzero_ps(),
               [](__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); });
}
#endif

#if defined(__AVX512BF16__)
inline void avx512_bf16(float* out, int64_t steps) {
    const __m512i ones = _mm512_set1_epi16((short)0x3f80);
    accumulate(out, steps, (__m512)ones, (__m512)ones, _mm512_setzero_ps(),
               [](__m512 sum, __m512 a, __m512 b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); });
}
#endif

#if defined(__AVX512VNNI__)
inline void avx512_i8(float* out, int64_t steps) {
    const __m512i ones = _mm512_set1_epi8((char)out[0]);
    accumulate(out, steps, ones, ones, _mm512_setzero_si512(),
               [](__m512i sum, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sum, a, b); });
}
#endif

#if defined(SAGE_AMX)
// A block of 2 x 2 tiles of sums, its four operands from the L1 cache in every step.
alignas(64) const uint8_t TILES[4 * 1024] = {};

template <bool IS_I8>
inline void amx_tiles(float* out, int64_t steps) {
    amx::begin();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step) {
        _tile_loadd(4, TILES, 64);
        _tile_loadd(5, TILES + 1024, 64);
        _tile_loadd(6, TILES + 2048, 64);
        _tile_loadd(7, TILES + 3072, 64);
        if constexpr (IS_I8) {
#if defined(__AMX_INT8__)
            _tile_dpbusd(0, 4, 6);
            _tile_dpbusd(1, 4, 7);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
#endif
        } else {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    float sums[256];
    _tile_stored(0, sums, 64);
    out[0] = sums[0];
    amx::end();
}
#endif

// By number, as in limits.py; without `run` if the machine lacks the instructions.
inline Loop find_loop(int64_t number) {
    [[maybe_unused]] constexpr int64_t PER_SUM = 2 * SUMS;
    switch (number) {
#if defined(__AVX2__) && defined(__FMA__)
        case 0: return {avx2_f32, PER_SUM * 8};
#endif
#if defined(__AVX512F__)
        case 1: return {avx512_f32, PER_SUM * 16};
#endif
#if defined(__AVX512BF16__)
        case 2: return {avx512_bf16, PER_SUM * 32};
#endif
#if defined(__AVX512VNNI__)
        case 3: return {avx512_i8, PER_SUM * 64};
#endif
#if defined(SAGE_AMX)
        case 4:
            if (amx::is_permitted()) return {amx_tiles<false>, 4 * 2 * 16 * 16 * 32};
            break;
#if defined(__AMX_INT8__)
        case 5:
            if (amx::is_permitted()) return {amx_tiles<true>, 4 * 2 * 16 * 16 * 64};
            break;
#endif
#endif
    }
    return {nullptr, 0};
}

}  // namespace limits

// tensors: operations done, as int64. sizes: number of the loop, parts, steps. Does 0 operations without the loop.
SAGE_KERNEL(limit_multiply) {
    const limits::Loop loop = limits::find_loop(sizes[0]);
    *(int64_t*)tensors[0] = loop.flops * sizes[1] * sizes[2];
    if (!loop.run) return;
    parallel_for(sizes[1], [&](int64_t) {
        float out[limits::SUMS] = {1.0f};
        loop.run(out, sizes[2]);
        volatile float used = out[0];
        (void)used;
    });
}

}  // namespace sage
