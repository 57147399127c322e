// AVX-512's kernels with matmuls in tiles (Sapphire Rapids and later).
#include "kernels.h"
#include "matmul_tiles.h"

namespace dq {
const Kernels& amx_kernels() {
    static const Kernels table = [] {
        Kernels found = kAvx512Kernels;
        found.name = "amx";
        found.matmul_int8 = matmul_in_tiles;
        found.round = round_to_half;
        return found;
    }();
    return table;
}
}  // namespace dq
