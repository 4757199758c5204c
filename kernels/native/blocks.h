// The block formats of ggml: a row is a sequence of blocks, each with its scales and codes. contract_blocks.py says
// what is in them.
#pragma once

#include <cstdint>

namespace shardq {

enum class BlockType : int {
    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, TQ1_0, TQ2_0, MXFP4,
};

struct BlockFormat {
    const char* name;
    BlockType type;
    int64_t cols, size_bytes;  // of a block
};

constexpr BlockFormat kBlockFormats[] = {
    {"Q4_0", BlockType::Q4_0, 32, 18},      {"Q4_1", BlockType::Q4_1, 32, 20},
    {"Q5_0", BlockType::Q5_0, 32, 22},      {"Q5_1", BlockType::Q5_1, 32, 24},
    {"Q8_0", BlockType::Q8_0, 32, 34},      {"Q2_K", BlockType::Q2_K, 256, 84},
    {"Q3_K", BlockType::Q3_K, 256, 110},    {"Q4_K", BlockType::Q4_K, 256, 144},
    {"Q5_K", BlockType::Q5_K, 256, 176},    {"Q6_K", BlockType::Q6_K, 256, 210},
    {"IQ4_NL", BlockType::IQ4_NL, 32, 18},  {"IQ4_XS", BlockType::IQ4_XS, 256, 136},
    {"TQ1_0", BlockType::TQ1_0, 256, 54},   {"TQ2_0", BlockType::TQ2_0, 256, 66},
    {"MXFP4", BlockType::MXFP4, 32, 17},
};

// Blocks of a matrix, row by row.
struct Blocks {
    const uint8_t* data;
    int64_t count;
};

}  // namespace shardq
