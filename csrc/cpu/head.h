// The logits of a head in two planes (prepared.h): the matmul reads the upper six bits of every row, and the lower two are
// read for the rows that a softmax notices.
//
// A logit that is d nats below the largest weighs e^-d, and so does its error. 6 bits for all rows cost SmolLM2-135M 4.9e-3
// nats of KL to its unquantized head. With 8 bits for the most likely rows, one of 32 at most, the whole decoder's KL to
// the definition rises from 6.7e-4 (8 bits for all) to 9.3e-4, at three quarters of the head's bytes.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dq {

// Rows further below the largest logit than this are never refined: e^-12 = 6e-6.
constexpr float kReach = 12.0f;

// Most rows refined of n: a bound on the time where no row stands out.
inline int64_t most_refined(int64_t n) { return std::min(n, std::max<int64_t>(64, n / 32)); }

}  // namespace dq
