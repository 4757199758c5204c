// Every kernel, compiled once per instruction set. The including file defines SHARDQ_SET_NAME (a string) and
// SHARDQ_SET_TABLE (an identifier) and may define faster versions of single steps before.
//
// Only headers without inline functions that could be emitted here: a copy built for a newer processor must never be
// the one that the linker keeps for all. A test demands that these objects hold no weak symbol.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#if defined(_MSC_VER) && !defined(__clang__)
#define SHARDQ_RESTRICT __restrict
#else
#define SHARDQ_RESTRICT __restrict__
#endif

namespace {

using namespace shardq;

#include "element.inl"
#include "spread.inl"

#include "absmax.inl"
#include "checksum.inl"
#include "count.inl"
#include "error.inl"
#include "error_values.inl"
#include "minmax.inl"
#include "narrow.inl"
#include "pack.inl"
#include "rtn.inl"
#include "rtn_error.inl"
#include "split.inl"
#include "sums.inl"
#include "transpose.inl"
#include "widen.inl"

#include "decode.inl"
#include "encode.inl"
#include "pack_columns.inl"

#include "lanes.inl"
#include "strip.inl"

#include "center_groups.inl"
#include "search_affine.inl"
#include "search_grid.inl"
#include "search_int.inl"
#include "search_ladder.inl"
#include "center_ladder.inl"

#include "blocks/tile.inl"

#include "blocks/line.inl"
#include "blocks/ray.inl"

#include "blocks/descent.inl"
#include "blocks/scales.inl"

#include "blocks/plain.inl"
#include "blocks/small.inl"

#include "blocks/super_blocks.inl"

#include "blocks/line_blocks.inl"
#include "blocks/ray_blocks.inl"
#include "blocks/iq4.inl"
#include "blocks/important.inl"

#include "blocks/dequantize.inl"
#include "blocks/quantize.inl"

}  // namespace

namespace shardq {

extern const Table SHARDQ_SET_TABLE;
const Table SHARDQ_SET_TABLE = {
    SHARDQ_SET_NAME, widen,          group_minmax,  rtn_int,       rtn_error_int, pack_bits,     unpack_bits,
    transpose_u32,   pack_columns,   split_words,   dequantize_int, error_int,    group_absmax,  group_range,   encode_scaled,
    encode_affine,   decode_scaled,  decode_affine, error_scaled,  error_affine,  narrow_columns, sum_errors,
    weigh_squares,   search_int,      center_groups, center_ladder,  search_affine, search_ladder, search_grid,   quantize_blocks, dequantize_blocks,
    error_values,   checksum,
};

}  // namespace shardq
