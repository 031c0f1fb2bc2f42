// The next token of one row of logits, greedy or drawn from what the cuts leave of the distribution.
#pragma once

#include "loops.h"

namespace sage {

// What the rows of a step ask for; null where none asks.
struct Cuts {
    const float* temperature;
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const float* noise;

    bool may_draw() const { return temperature && noise; }
    bool draws(int64_t row) const { return may_draw() && !(temperature[row] <= 0); }
};

// A row's largest logit, and the first token that has it; a NaN is larger than everything, as in torch.
struct Likeliest {
    float logit;
    int64_t token;

    bool is_before(const Likeliest& other) const {
        const bool is_nan = logit != logit, is_other_nan = other.logit != other.logit;
        if (is_nan != is_other_nan) return is_nan;
        return logit > other.logit || ((is_nan || logit == other.logit) && token < other.token);
    }
};

inline Likeliest likeliest(const float* logits, int64_t length) {
    Max largest;
    sweep(length, [&](auto i) { largest.add(load(logits, i), i); });
    const float top = largest.total();
    for (int64_t token = 0; token < length; ++token)
        if (logits[token] == top || (top != top && logits[token] != logits[token])) return {top, token};
    return {top, 0};
}

// Finds the likeliest token of every row while a product makes the logits, block by block. A part of the product sees
// blocks of a row in their order, so of equals in a lane the first is kept; parts are put together in their order, and
// lanes by an order that is total. So the result depends on the logits alone.
class SampleFollower {
    struct Lanes {
        Floats logit = lanes(-INFINITY);
        Ints token = {};

        void take(Floats other, Ints tokens, Ints counts) {
            const Ints is_nan = (other != other) & (logit == logit);
            const Ints is_better = counts & ((other > logit) | is_nan);
            if (!any(is_better)) return;  // by far most blocks
            logit = is_better ? other : logit;
            token = is_better ? tokens : token;
        }
    };

   public:
    // What one part has seen.
    class Part {
       public:
        explicit Part(Lanes* rows) : rows(rows) {}

        template <class Place>
        Floats with(int64_t row, Place i, Floats logit) const {
            rows[row].take(logit, LANE_NUMBERS + (int32_t)i.at, inside(i));
            return logit;
        }

       private:
        Lanes* rows;
    };

    SampleFollower(int64_t rows, int64_t parts) : rows(rows), parts(parts), all(scratch<Lanes>(0, parts * rows)) {
        for (int64_t i = 0; i < parts * rows; ++i) all[i] = Lanes();
    }

    Part part(int64_t number) const { return Part(all + number * rows); }

    Likeliest of(int64_t row) const {
        Lanes seen;
        for (int64_t part = 0; part < parts; ++part) {
            const Lanes& own = all[part * rows + row];
            seen.take(own.logit, own.token, ~Ints{});
        }
        Likeliest best = {seen.logit[0], seen.token[0]};
        for (int lane = 1; lane < LANES; ++lane) {
            const Likeliest one = {seen.logit[lane], seen.token[lane]};
            best = one.is_before(best) ? one : best;
        }
        return best;
    }

   private:
    int64_t rows, parts;
    Lanes* all;  // by part of the columns, then by row
};

// Sorts token ids by probability, the greatest first, of equals the smaller id first, by merging ever longer runs.
inline void sort_by_probability(int32_t* order, int32_t* other, const float* probability, int64_t length) {
    for (int64_t width = 1; width < length; width *= 2) {
        for (int64_t start = 0; start < length; start += 2 * width) {
            int64_t middle = start + width < length ? start + width : length;
            int64_t stop = start + 2 * width < length ? start + 2 * width : length;
            for (int64_t a = start, b = middle, at = start; at < stop; ++at) {
                bool takes_a = b >= stop || (a < middle && probability[order[a]] >= probability[order[b]]);
                other[at] = takes_a ? order[a++] : order[b++];
            }
        }
        memcpy(order, other, length * sizeof *order);
    }
}

// In `probability`, drops all but what min_p, top_k and (of what they leave) top_p keep; the likeliest always stays.
inline void cut(float* probability, const int32_t* order, int64_t length, int64_t row, const Cuts& cuts) {
    const float least = cuts.min_p ? probability[order[0]] * cuts.min_p[row] : 0.0f;
    const int64_t most = cuts.top_k && cuts.top_k[row] > 0 ? cuts.top_k[row] : length;
    float kept = 0;
    for (int64_t rank = 0; rank < length; ++rank) {
        float& one = probability[order[rank]];
        if (one < least || rank >= most) one = 0;
        kept += one;
    }
    float before = 0;
    for (int64_t rank = 0; rank < length; ++rank) {
        float& one = probability[order[rank]];
        one /= kept;
        const float own = one;
        if (cuts.top_p && before >= cuts.top_p[row] && rank > 0) one = 0;
        before += own;
    }
}

inline int64_t draw_token(const float* logits, int64_t length, int64_t row, const Cuts& cuts, float largest) {
    float* probability = scratch<float>(0, length);
    int32_t* order = scratch<int32_t>(0, 2 * length);
    Sum sum;
    sweep(length, [&](auto i) {
        const Floats weight = exp((load(logits, i) - largest) / cuts.temperature[row]);
        sum.add(weight, i);
        store(probability, i, weight);
    });
    const float total = sum.total();
    for (int64_t token = 0; token < length; ++token) probability[token] /= total, order[token] = (int32_t)token;
    sort_by_probability(order, order + length, probability, length);
    cut(probability, order, length, row, cuts);
    double mass = 0, drawn = 0;
    for (int64_t token = 0; token < length; ++token) mass += probability[token];
    int64_t last = 0;
    for (int64_t token = 0; token < length; ++token) {
        if (probability[token] == 0) continue;
        last = token;
        drawn += probability[token];
        if (drawn > cuts.noise[row] * mass) break;
    }
    return last;
}

// `known` is the row's likeliest token.
inline int64_t sample_token(const float* logits, int64_t length, int64_t row, const Cuts& cuts, Likeliest known) {
    return cuts.draws(row) ? draw_token(logits, length, row, cuts, known.logit) : known.token;
}

}  // namespace sage
