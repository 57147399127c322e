// Rows dealt to threads in pieces of some 20 us.
#pragma once

#include <cstdint>

#include "pool.h"

namespace dq {

constexpr int64_t kPiece = 1 << 14;  // elements of a piece: of Adam's step 350 KB of state

// body(first row, last row) over [0, rows), in pieces of about kPiece elements of k columns.
template <typename Body>
void in_pieces(int64_t rows, int64_t k, int threads, const Body& body) {
    const int64_t piece = k < kPiece ? kPiece / k : 1;
    parallel_rows((rows + piece - 1) / piece, threads, [&](int64_t begin, int64_t end) {
        body(begin * piece, end * piece < rows ? end * piece : rows);
    });
}

}  // namespace dq
