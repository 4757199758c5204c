// What every processor of the architecture runs (SSE2 on x86-64, NEON on arm64).
#define SHARDQ_SET_NAME "baseline"
#define SHARDQ_SET_TABLE baseline_table
#include "../bodies.inl"
