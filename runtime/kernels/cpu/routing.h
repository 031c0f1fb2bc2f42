// Expert routing of one token: scores, group selection, the top experts and their weights.
#pragma once

#include "loops.h"

namespace sage {

struct Routing {
    int64_t chosen;
    bool is_softmax;  // else sigmoid
    bool renormalizes;
    float factor;
    int64_t groups, top_groups, scores_per_group;
};

inline void score_experts(float* scores, int64_t count, bool is_softmax) {
    if (!is_softmax) return sweep(count, [&](auto i) { store(scores, i, sigmoid(load(scores, i))); });
    Max largest;
    sweep(count, [&](auto i) { largest.add(load(scores, i), i); });
    Sum sum;
    sweep(count, [&](auto i) {
        const Floats weight = exp(load(scores, i) - largest.total());
        sum.add(weight, i);
        store(scores, i, weight);
    });
    sweep(count, [&](auto i) { store(scores, i, load(scores, i) / sum.total()); });
}

// The index of the largest value that is not taken yet, the first of equal ones. NaN is larger than everything, as in
// torch.topk.
inline int64_t take_largest(const float* values, bool* is_taken, int64_t count) {
    int64_t best = -1;
    for (int64_t at = 0; at < count; ++at) {
        if (is_taken[at]) continue;
        const bool is_better =
            best < 0 || values[at] > values[best] || (values[at] != values[at] && values[best] == values[best]);
        best = is_better ? at : best;
    }
    is_taken[best] = true;
    return best;
}

// Masks the experts outside of the best groups.
inline void keep_groups(float* choice, bool* is_taken, int64_t count, const Routing& routing) {
    const int64_t width = count / routing.groups;
    float* group_scores = scratch<float>(Scratch::EXPERT_GROUP_SCORES, routing.groups);
    memset(is_taken, 0, count);
    for (int64_t g = 0; g < routing.groups; ++g) {
        group_scores[g] = 0;
        for (int64_t i = 0; i < routing.scores_per_group && i < width; ++i)
            group_scores[g] += choice[g * width + take_largest(choice + g * width, is_taken + g * width, width)];
    }
    memset(is_taken, 0, count);
    for (int64_t kept = 0; kept < routing.top_groups; ++kept) take_largest(group_scores, is_taken, routing.groups);
    for (int64_t g = 0; g < routing.groups; ++g)
        for (int64_t i = 0; !is_taken[g] && i < width; ++i) choice[g * width + i] = -INFINITY;
}

// On entry `scores` has the logits and `choice` the bias; `choice` then has the biased scores, which select the
// experts, whereas their weights come from the scores without the bias.
inline void route(float* scores, float* choice, int64_t count, const Routing& routing, int32_t* experts,
                  float* weights) {
    bool* is_taken = scratch<bool>(Scratch::EXPERTS_TAKEN, count);
    score_experts(scores, count, routing.is_softmax);
    sweep(count, [&](auto i) { store(choice, i, load(scores, i) + load(choice, i)); });
    if (routing.groups > 1) keep_groups(choice, is_taken, count, routing);
    memset(is_taken, 0, count);
    float sum = 0;
    for (int64_t a = 0; a < routing.chosen; ++a) {
        const int64_t best = take_largest(choice, is_taken, count);
        experts[a] = (int32_t)best;
        weights[a] = scores[best];
        sum += scores[best];
    }
    for (int64_t a = 0; a < routing.chosen; ++a)
        weights[a] = (routing.renormalizes ? weights[a] / (sum + 1e-20f) : weights[a]) * routing.factor;
}

}  // namespace sage
