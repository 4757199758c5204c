// x86-64-v3: AVX2, FMA, F16C, BMI.
#include <cstdint>

#include "x86_extremes.inl"
#include "x86_floats.inl"
#include "x86_tables.inl"

#define SHARDQ_SET_NAME "avx2"
#define SHARDQ_SET_TABLE avx2_table
#include "../bodies.inl"
