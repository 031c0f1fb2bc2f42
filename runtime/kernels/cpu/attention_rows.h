// The rows of keys or values of one step of attention, as elements. Rows of codes are converted once for all query
// rows; their scales are factors of the scores, for keys, or of the weights, for values, so that no code is rounded.
#pragma once

#include "attention_gemm_f32.h"
#include "kv_forms.h"

namespace sage {

// The codes of a row, from position `at` on, as elements.
template <class E, class Stored>
inline void convert_codes(E* elements, const Stored* codes, int64_t at, int64_t width) {
    sweep(width - at, [&](auto i) { store(elements + at, i, load_codes(codes + at, i)); });
}

#if defined(__AVX512BF16__)
// 32 codes at a time. Integers are exact in bf16.
inline void convert_row(bf16* elements, const int8_kv* codes, int64_t width) {
    int64_t at = 0;
    for (; at + 32 <= width; at += 32) {
        const __m512i bytes = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(codes + at)));
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(bytes)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(bytes, 1)));
        _mm512_storeu_si512(elements + at, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    convert_codes(elements, codes, at, width);
}

// The codes 0 to 127 of float8 as bf16, for lookups of 32 codes at a time.
struct Float8Words {
    alignas(64) uint16_t word[128];

    Float8Words() {
        for (int code = 0; code < 128; ++code) {
            const fp8_kv one = {(uint8_t)code};
            word[code] = (uint16_t)(bits_of<uint32_t>(load_codes(&one, Tail{0, 1})[0]) >> 16);
        }
    }
};

inline void convert_row(bf16* elements, const fp8_kv* codes, int64_t width) {
    static const Float8Words words;
    __m512i table[4];
    for (int i = 0; i < 4; ++i) table[i] = _mm512_load_si512(words.word + 32 * i);
    const __m512i upper = _mm512_set1_epi16(0x40), sign = _mm512_set1_epi16((short)0x8000);
    int64_t at = 0;
    for (; at + 32 <= width; at += 32) {
        const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(codes + at)));
        const __m512i small = _mm512_permutex2var_epi16(table[0], code, table[1]);
        const __m512i large = _mm512_permutex2var_epi16(table[2], code, table[3]);
        const __m512i found = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(code, upper), small, large);
        _mm512_storeu_si512(elements + at, _mm512_or_si512(found, _mm512_and_si512(_mm512_slli_epi16(code, 8), sign)));
    }
    convert_codes(elements, codes, at, width);
}
#endif

template <class E, class Stored>
inline void convert_row(E* elements, const Stored* codes, int64_t width) {
    convert_codes(elements, codes, 0, width);
}

template <class E, class Stored>
class OpenedRows {
  public:
    OpenedRows(int64_t width, Scratch slot)
        : width_(width), row_length_(round_up(width, 2 * LANES)), elements_(scratch<E>(slot, KEYS * row_length_)) {
        for (int64_t key = 0; key < KEYS; ++key) row_[key] = elements_ + key * row_length_;
    }

    // The codes of 64 rows as elements; valid until the next call.
    const E* const* open(const Stored* const* row) {
        for (int64_t key = 0; key < KEYS; ++key) {
            scale_[key] = scale_of(row[key]);
            convert_row(elements_ + key * row_length_, codes_of(row[key]), width_);
        }
        return row_;
    }

    // Multiplies the scores of some rows by the scales of their keys.
    void scale(float* scores, int64_t rows) const {
        for (float* row = scores; row < scores + rows * KEYS; row += KEYS)
            for (int v = 0; v < KEYS; v += LANES) store(row, Block{v}, scaled(load(row, Block{v}), v));
    }

    // 16 values, of the keys from `key` on, times their scales.
    Floats scaled(Floats values, int64_t key) const { return values * load(scale_, Block{key}); }

  private:
    const int64_t width_, row_length_;
    E* const elements_;
    const E* row_[KEYS];
    float scale_[KEYS];
};

// Rows of elements are used where they are.
template <class E>
class OpenedRows<E, E> {
  public:
    OpenedRows(int64_t, Scratch) {}

    const E* const* open(const E* const* row) const { return row; }
    void scale(float*, int64_t) const {}
    Floats scaled(Floats values, int64_t) const { return values; }
};

}  // namespace sage
