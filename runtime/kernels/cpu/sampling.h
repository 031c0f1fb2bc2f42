// Sampling of the next token from a row of logits: greedy, or drawn from the candidates that the filters keep.
#pragma once

#include "loops.h"

namespace sage {

// Sampling parameters of the rows of a step; null if no row sets one.
struct CandidateFilters {
    const float* temperature;
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const float* noise;

    bool may_draw() const { return temperature && noise; }
    bool draws(int64_t row) const { return may_draw() && !(temperature[row] <= 0); }
};

// The largest logit of a row and the first token that has it. NaN is larger than everything, as in torch.
struct ArgMax {
    float logit;
    int64_t token;

    bool precedes(const ArgMax& other) const {
        const bool is_nan = logit != logit, is_other_nan = other.logit != other.logit;
        if (is_nan != is_other_nan) return is_nan;
        return logit > other.logit || ((is_nan || logit == other.logit) && token < other.token);
    }
};

inline ArgMax argmax(const float* logits, int64_t length) {
    Max largest;
    sweep(length, [&](auto i) { largest.add(load(logits, i), i); });
    const float top = largest.total();
    for (int64_t token = 0; token < length; ++token)
        if (logits[token] == top || (top != top && logits[token] != logits[token])) return {top, token};
    return {top, 0};
}

// Finds the argmax of every row as the epilogue of the GEMM that computes the logits, block by block.
//
// A part of the GEMM passes the blocks of a row in order, so that among equal logits of a lane the first is kept; parts
// are merged in order, and lanes by a total order. The result therefore depends on the logits alone, not on the split.
class SampleEpilogue {
    struct LaneArgMax {
        Floats logit = broadcast(-INFINITY);
        Ints token = {};

        void update(Floats other, Ints tokens, Ints is_active) {
            const Ints is_nan = (other != other) & (logit == logit);
            const Ints is_better = is_active & ((other > logit) | is_nan);
            if (!any(is_better)) return;  // the case of almost all blocks
            logit = is_better ? other : logit;
            token = is_better ? tokens : token;
        }
    };

  public:
    // The argmax over the columns of one part.
    class Part {
      public:
        explicit Part(LaneArgMax* rows) : rows_(rows) {}

        // Returns the logit, so that the call can wrap a stored value.
        template <class Position>
        Floats observe(int64_t row, Position i, Floats logit) const {
            rows_[row].update(logit, LANE_NUMBERS + (int32_t)i.at, active_lanes(i));
            return logit;
        }

      private:
        LaneArgMax* rows_;
    };

    SampleEpilogue(int64_t rows, int64_t parts)
        : rows_(rows), parts_(parts), lanes_(scratch<LaneArgMax>(Scratch::SAMPLE_LANES, parts * rows)) {
        for (int64_t i = 0; i < parts * rows; ++i) lanes_[i] = LaneArgMax();
    }

    Part part(int64_t number) const { return Part(lanes_ + number * rows_); }

    ArgMax argmax(int64_t row) const {
        LaneArgMax all;
        for (int64_t part = 0; part < parts_; ++part) {
            const LaneArgMax& lanes = lanes_[part * rows_ + row];
            all.update(lanes.logit, lanes.token, ~Ints{});
        }
        ArgMax best = {all.logit[0], all.token[0]};
        for (int lane = 1; lane < LANES; ++lane) {
            const ArgMax candidate = {all.logit[lane], all.token[lane]};
            best = candidate.precedes(best) ? candidate : best;
        }
        return best;
    }

  private:
    int64_t rows_, parts_;
    LaneArgMax* lanes_;  // by part of the columns, then by row
};

// Sorts token ids by descending probability, equal ones by id: a bottom-up merge sort, which is stable.
inline void sort_by_probability(int32_t* order, int32_t* buffer, const float* probability, int64_t length) {
    for (int64_t width = 1; width < length; width *= 2) {
        for (int64_t start = 0; start < length; start += 2 * width) {
            int64_t middle = start + width < length ? start + width : length;
            int64_t stop = start + 2 * width < length ? start + 2 * width : length;
            for (int64_t a = start, b = middle, at = start; at < stop; ++at) {
                bool takes_a = b >= stop || (a < middle && probability[order[a]] >= probability[order[b]]);
                buffer[at] = takes_a ? order[a++] : order[b++];
            }
        }
        memcpy(order, buffer, length * sizeof *order);
    }
}

// Zeroes the probabilities of the tokens that min_p, top_k and then top_p, on the rest renormalised, filter out. The
// most probable token is always kept.
inline void apply_filters(float* probability, const int32_t* order, int64_t length, int64_t row,
                          const CandidateFilters& filters) {
    const float least = filters.min_p ? probability[order[0]] * filters.min_p[row] : 0.0f;
    const int64_t most = filters.top_k && filters.top_k[row] > 0 ? filters.top_k[row] : length;
    float kept = 0;
    for (int64_t rank = 0; rank < length; ++rank) {
        float& candidate = probability[order[rank]];
        if (candidate < least || rank >= most) candidate = 0;
        kept += candidate;
    }
    float before = 0;
    for (int64_t rank = 0; rank < length; ++rank) {
        float& candidate = probability[order[rank]];
        candidate /= kept;
        const float share = candidate;
        if (filters.top_p && before >= filters.top_p[row] && rank > 0) candidate = 0;
        before += share;
    }
}

inline int64_t draw_token(const float* logits, int64_t length, int64_t row, const CandidateFilters& filters,
                          float largest) {
    float* probability = scratch<float>(Scratch::PROBABILITIES, length);
    int32_t* order = scratch<int32_t>(Scratch::TOKEN_ORDER, 2 * length);
    Sum sum;
    sweep(length, [&](auto i) {
        const Floats weight = exp((load(logits, i) - largest) / filters.temperature[row]);
        sum.add(weight, i);
        store(probability, i, weight);
    });
    const float total = sum.total();
    for (int64_t token = 0; token < length; ++token) probability[token] /= total, order[token] = (int32_t)token;
    sort_by_probability(order, order + length, probability, length);
    apply_filters(probability, order, length, row, filters);
    double mass = 0, drawn = 0;
    for (int64_t token = 0; token < length; ++token) mass += probability[token];
    int64_t last = 0;
    for (int64_t token = 0; token < length; ++token) {
        if (probability[token] == 0) continue;
        last = token;
        drawn += probability[token];
        if (drawn > filters.noise[row] * mass) break;
    }
    return last;
}

// `best` is the argmax of the row.
inline int64_t sample_token(const float* logits, int64_t length, int64_t row, const CandidateFilters& filters,
                            ArgMax best) {
    return filters.draws(row) ? draw_token(logits, length, row, filters, best.logit) : best.token;
}

}  // namespace sage
