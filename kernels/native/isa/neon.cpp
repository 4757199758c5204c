// arm64: the same code as baseline, under the name that people ask for.
#define SHARDQ_SET_NAME "neon"
#define SHARDQ_SET_TABLE neon_table
#include "../bodies.inl"
