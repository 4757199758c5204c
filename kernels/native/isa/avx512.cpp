// x86-64-v4: AVX-512 F, BW, CD, DQ, VL.
#include <cstdint>

#include "x86_extremes.inl"
#include "x86_floats.inl"
#include "x86_tables.inl"

#define SHARDQ_SET_NAME "avx512"
#define SHARDQ_SET_TABLE avx512_table
#include "../bodies.inl"
