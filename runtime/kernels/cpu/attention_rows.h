// The rows of keys or values of one step of attention, as elements. Rows of codes are converted once for all query
// rows; their scales are factors of the scores, for keys, or of the weights, for values, so that no code is rounded.
#pragma once

#include "attention_gemm_f32.h"
#include "kv_forms.h"

namespace sage {

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
            const Stored* codes = codes_of(row[key]);
            E* elements = elements_ + key * row_length_;
            sweep(width_, [&](auto i) { store(elements, i, load_codes(codes, i)); });
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
