// The k largest elements of a row with their positions, in falling order.
//
// NaN is larger than everything; of equal elements the one with the lower position comes first. A heap holds the best
// elements so far with the worst on top, so that most blocks of a long row are rejected by one comparison.
#pragma once

#include <algorithm>

#include "loops.h"
#include "scratch.h"

namespace sage {

template <class Number>
struct Candidate {
    Number value;
    int32_t index;
};

template <class Number>
inline bool comes_before(const Candidate<Number>& a, const Candidate<Number>& b) {
    const bool a_is_nan = a.value != a.value, b_is_nan = b.value != b.value;
    if (a_is_nan || b_is_nan) return a_is_nan && (!b_is_nan || a.index < b.index);
    return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// `NUMBER` distinguishes the selections of a row, which are alive at the same time.
template <class Number, int NUMBER>
class TopK {
  public:
    explicit TopK(int64_t k)
        : k_(k), heap_(scratch<Candidate<Number>>(slot(Scratch::TOP_CANDIDATES), k)),
          values_(scratch<Number>(slot(Scratch::TOP_VALUES), k)),
          indices_(scratch<int32_t>(slot(Scratch::TOP_INDICES), k)) {}

    template <class Lanes>
    void add(Lanes value, Block i) {
        if (count_ == k_ && (k_ == 0 || !any(condition(~(value <= heap_[0].value))))) return;
        for (int lane = 0; lane < LANES; ++lane) offer(value[lane], (int32_t)i.at + lane);
    }
    template <class Lanes>
    void add(Lanes value, Tail i) {
        for (int64_t lane = 0; lane < i.count; ++lane) offer(value[lane], (int32_t)(i.at + lane));
    }

    // Ends the selection; `values` and `indices` may then be read.
    void finish() {
        std::sort_heap(heap_, heap_ + count_, comes_before<Number>);
        for (int64_t i = 0; i < count_; ++i) {
            values_[i] = heap_[i].value;
            indices_[i] = heap_[i].index;
        }
    }
    const Number* values() const { return values_; }
    const int32_t* indices() const { return indices_; }

  private:
    static Scratch slot(Scratch first) { return (Scratch)((int)first + NUMBER); }

    void offer(Number value, int32_t index) {
        const Candidate<Number> candidate = {value, index};
        if (count_ < k_) {
            heap_[count_++] = candidate;
        } else {
            if (k_ == 0 || !comes_before(candidate, heap_[0])) return;
            std::pop_heap(heap_, heap_ + count_, comes_before<Number>);
            heap_[count_ - 1] = candidate;
        }
        std::push_heap(heap_, heap_ + count_, comes_before<Number>);
    }

    int64_t k_, count_ = 0;
    Candidate<Number>* heap_;
    Number* values_;
    int32_t* indices_;
};

}  // namespace sage
