// Tokens grouped by expert: the rows of an expert form one GEMM.
#pragma once

#include "loops.h"

namespace sage {

struct Route {
    int64_t token, choice;
};

// A stable counting sort: the rows of an expert are in the order of their tokens. Expert `num_experts`, one more than
// the last, stands for those of other ranks. Uses scratch memory of this thread.
class Routes {
  public:
    Routes(const int32_t* experts, int64_t stride, int64_t tokens, int64_t choices, int64_t num_experts)
        : choices_(choices), first_(scratch<int64_t>(Scratch::ROUTE_STARTS, num_experts + 2)),
          order_(scratch<int64_t>(Scratch::ROUTE_ORDER, tokens * choices + 1)) {
        for (int64_t e = 0; e <= num_experts + 1; ++e) first_[e] = 0;
        for (int64_t i = 0; i < tokens * choices; ++i) ++first_[experts[i / choices * stride + i % choices] + 1];
        for (int64_t e = 0; e <= num_experts; ++e) first_[e + 1] += first_[e];
        for (int64_t i = 0; i < tokens * choices; ++i)
            order_[first_[experts[i / choices * stride + i % choices]]++] = i;
        for (int64_t e = num_experts + 1; e > 0; --e)
            first_[e] = first_[e - 1];  // each has advanced to the start of the next expert
        first_[0] = 0;
    }

    int64_t rows(int64_t expert) const { return first_[expert + 1] - first_[expert]; }
    Route at(int64_t expert, int64_t row) const {
        const int64_t i = order_[first_[expert] + row];
        return {i / choices_, i % choices_};
    }

  private:
    int64_t choices_;
    int64_t* first_;
    int64_t* order_;
};

}  // namespace sage
